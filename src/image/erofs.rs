//! Writes EROFS, uncompressed, in blocks of 4 KiB (Linux, fs/erofs/erofs_fs.h): first the content of all files, each at a block
//! of its own, then the directories that need blocks, then the inodes. Small directories and links lie behind their inodes.
//!
//! Blocks of zeroes are not written, so that they are holes in the image.

use std::fs::File;
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;

use super::limits::bad;
use super::tree::{Content, Id, Inode, ROOT, Tree};

/// Bytes of a block, and of a page of memory.
const BLOCK: usize = 4096;
/// Bytes that are read and written at once.
const CHUNK: usize = 64 * BLOCK;

/// EROFS_SUPER_MAGIC_V1, at [`SUPER_OFFSET`].
const MAGIC: u32 = 0xe0f5_e1e2;
/// Where the superblock begins.
const SUPER_OFFSET: usize = 1024;
/// EROFS_FEATURE_COMPAT_MTIME: the time of an inode is its mtime.
const MTIME: u32 = 2;
/// Bytes of an inode with 32-bit owners and a time (struct erofs_inode_extended).
const INODE: usize = 64;
/// Inodes are numbered by these bytes.
const SLOT: usize = 32;
/// Bytes of a directory entry without its name.
const DIRENT: usize = 12;
/// i_format: an extended inode, its data in blocks (EROFS_INODE_FLAT_PLAIN).
const PLAIN: u16 = 1;
/// Likewise, its data behind the inode (EROFS_INODE_FLAT_INLINE).
const INLINE: u16 = 1 | 2 << 1;
/// Bytes in front of an inode's extended attributes (struct erofs_xattr_ibody_header).
const XATTR_HEADER: usize = 12;
/// Prefixes of extended attributes and their numbers.
const XATTR_PREFIXES: &[(&[u8], u8)] = &[
    (b"user.", 1),
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"security.", 6),
];

/// The part of an image where files have their content.
pub(super) struct Data {
    file: File,
    /// The first block behind it.
    next: u32,
    buffer: Vec<u8>,
}

impl Data {
    /// `file` is empty.
    pub(super) fn new(file: File) -> Self {
        Self {
            file,
            next: 1,
            buffer: vec![0; CHUNK],
        }
    }

    /// Writes a file of `size` bytes, of which `read` gives `pieces`, offsets and lengths in ascending order; the rest is zero.
    /// Returns its first block.
    pub(super) fn write(
        &mut self,
        size: u64,
        pieces: &[(u64, u64)],
        mut read: impl FnMut(&mut [u8]) -> io::Result<()>,
    ) -> io::Result<u32> {
        let first = self.next;
        let start = u64::from(first) * BLOCK as u64;
        self.next = u32::try_from(size.div_ceil(BLOCK as u64))
            .ok()
            .and_then(|blocks| first.checked_add(blocks))
            .ok_or_else(|| bad("the image has more blocks than a file system can"))?;
        for (offset, length) in pieces {
            let mut done = 0;
            while done < *length {
                let count = CHUNK.min((length - done).try_into().unwrap_or(CHUNK));
                let buffer = self.buffer.get_mut(..count).unwrap_or_default();
                read(buffer)?;
                write_blocks(&self.file, buffer, start + offset + done)?;
                done += count as u64;
            }
        }
        Ok(first)
    }

    /// Writes the directories and inodes of `tree`, and the superblock. Returns the file.
    pub(super) fn finish(self, tree: &Tree) -> io::Result<File> {
        let layout = Layout::new(tree, self.next)?;
        layout.write(tree, &self.file)?;
        Ok(self.file)
    }
}

/// Writes `data`, but for runs of zeroes that a hole can stand for.
fn write_blocks(file: &File, data: &[u8], offset: u64) -> io::Result<()> {
    let zero = |block: &&[u8]| block.iter().all(|byte| *byte == 0);
    let blocks: Vec<&[u8]> = data.chunks(BLOCK).collect();
    let mut rest = data;
    let mut at = offset;
    for run in blocks.chunk_by(|a, b| zero(a) == zero(b)) {
        let length = run.iter().map(|block| block.len()).sum();
        let (bytes, behind) = rest.split_at_checked(length).unwrap_or((rest, &[]));
        if !run.first().is_some_and(zero) {
            file.write_all_at(bytes, at)?;
        }
        at += length as u64;
        rest = behind;
    }
    Ok(())
}

/// Where an inode is, and what it needs.
#[derive(Clone, Default)]
struct Place {
    /// Its number.
    nid: u64,
    links: u32,
    /// The directory that a directory is in.
    parent: Id,
    /// Bytes of extended attributes behind the inode.
    xattrs: usize,
    /// Bytes of a directory.
    size: u64,
    /// First block of a directory or link that does not lie behind its inode.
    block: Option<u32>,
}

struct Layout {
    /// Of each inode of the tree; number 0 is of none.
    places: Vec<Place>,
    /// The inodes that have a name, in the order in which they are written.
    order: Vec<Id>,
    /// The first block of inodes, and the first one behind them.
    meta: u32,
    end: u32,
}

impl Layout {
    fn new(tree: &Tree, first_free: u32) -> io::Result<Self> {
        let mut layout = Self {
            places: vec![Place::default(); tree.len()],
            order: Vec::new(),
            meta: 0,
            end: 0,
        };
        layout.walk(tree)?;
        // Bytes from the first inode's block on. The root has to be near the beginning, and no inode has number 0.
        let (mut at, mut next) = (SLOT, first_free);
        for id in &layout.order {
            let inode = tree.inode(*id)?;
            let Some(place) = layout.places.get_mut(*id) else {
                continue;
            };
            place.xattrs = xattr_bytes(inode)?;
            let head = INODE + place.xattrs;
            let data = match &inode.content {
                Content::Directory(_) => place.size,
                Content::Symlink(target) => target.len() as u64,
                _ => 0,
            };
            let inline = head as u64 + data <= BLOCK as u64;
            // Neither an inode nor what lies behind it as its data crosses the end of a block.
            let unit = if inline { head + data as usize } else { INODE };
            if at % BLOCK + unit > BLOCK {
                at = at.next_multiple_of(BLOCK);
            }
            place.nid = (at / SLOT) as u64;
            at += if inline { unit } else { head };
            at = at.next_multiple_of(SLOT);
            if !inline {
                place.block = Some(next);
                next = u32::try_from(data.div_ceil(BLOCK as u64))
                    .ok()
                    .and_then(|blocks| next.checked_add(blocks))
                    .ok_or_else(too_large)?;
            }
        }
        layout.meta = next;
        layout.end = u32::try_from(at.div_ceil(BLOCK))
            .ok()
            .and_then(|blocks| next.checked_add(blocks))
            .ok_or_else(too_large)?;
        Ok(layout)
    }

    /// Finds all that has a name, from the root on.
    fn walk(&mut self, tree: &Tree) -> io::Result<()> {
        let mut todo = vec![ROOT];
        self.place(ROOT)?.links = 2;
        while let Some(id) = todo.pop() {
            self.order.push(id);
            let Some(children) = tree.children(id) else {
                continue;
            };
            let mut size = 0;
            for block in blocks(tree, id) {
                size = size.max(block.end);
            }
            self.place(id)?.size = size;
            for entry in children.values() {
                let is_directory = tree.children(entry.id).is_some();
                let child = self.place(entry.id)?;
                child.links += 1;
                if is_directory {
                    child.links += 1;
                    child.parent = id;
                    self.place(id)?.links += 1;
                    todo.push(entry.id);
                } else if child.links == 1 {
                    todo.push(entry.id);
                }
            }
        }
        Ok(())
    }

    fn place(&mut self, id: Id) -> io::Result<&mut Place> {
        self.places.get_mut(id).ok_or_else(|| bad("no such inode"))
    }

    fn write(&self, tree: &Tree, file: &File) -> io::Result<()> {
        let mut out = BufWriter::with_capacity(CHUNK, file);
        let start_of = |block: u32| SeekFrom::Start(u64::from(block) * BLOCK as u64);
        for id in &self.order {
            let (inode, place) = (tree.inode(*id)?, self.at(*id)?);
            if let Some(block) = place.block {
                out.seek(start_of(block))?;
                out.write_all(&self.data(tree, *id, inode)?)?;
            }
        }
        out.seek(start_of(self.meta))?;
        let mut at = 0;
        for (number, id) in self.order.iter().enumerate() {
            let (inode, place) = (tree.inode(*id)?, self.at(*id)?);
            let start = place.nid as usize * SLOT;
            out.write_all(&vec![0; start - at])?;
            let mut record = self.inode(inode, place, number as u32 + 1)?;
            xattrs(inode, place.xattrs, &mut record);
            if place.block.is_none() {
                record.extend(self.data(tree, *id, inode)?);
            }
            out.write_all(&record)?;
            at = start + record.len();
        }
        out.flush()?;
        drop(out);
        file.set_len(u64::from(self.end) * BLOCK as u64)?;
        file.write_all_at(&self.superblock()?, SUPER_OFFSET as u64)
    }

    fn at(&self, id: Id) -> io::Result<&Place> {
        self.places.get(id).ok_or_else(|| bad("no such inode"))
    }

    /// What a directory or a link holds.
    fn data(&self, tree: &Tree, id: Id, inode: &Inode) -> io::Result<Vec<u8>> {
        match &inode.content {
            Content::Symlink(target) => Ok(target.clone()),
            Content::Directory(_) => {
                let mut data = Vec::new();
                for block in blocks(tree, id) {
                    data.resize(data.len().next_multiple_of(BLOCK), 0);
                    self.directory_block(tree, id, &block.names, &mut data)?;
                }
                Ok(data)
            }
            _ => Ok(Vec::new()),
        }
    }

    fn directory_block(
        &self,
        tree: &Tree,
        id: Id,
        names: &[(&[u8], Option<Id>)],
        data: &mut Vec<u8>,
    ) -> io::Result<()> {
        let mut name_at = names.len() * DIRENT;
        for (name, child) in names {
            let child = match child {
                Some(child) => *child,
                None if *name == b"." => id,
                None => self.at(id)?.parent,
            };
            data.extend(self.at(child)?.nid.to_le_bytes());
            data.extend((name_at as u16).to_le_bytes());
            data.extend([file_type(tree.inode(child)?.mode), 0]);
            name_at += name.len();
        }
        names.iter().for_each(|(name, _)| data.extend(*name));
        Ok(())
    }

    fn inode(&self, inode: &Inode, place: &Place, number: u32) -> io::Result<Vec<u8>> {
        let (size, value) = match &inode.content {
            Content::File { block, size } => (*size, *block),
            Content::Directory(_) => (place.size, place.block.unwrap_or(0)),
            Content::Symlink(target) => (target.len() as u64, place.block.unwrap_or(0)),
            Content::Special(number) => (0, *number),
        };
        let is_inline = place.block.is_none()
            && matches!(inode.content, Content::Directory(_) | Content::Symlink(_));
        let xattrs = match place.xattrs {
            0 => 0,
            bytes => 1 + u16::try_from((bytes - XATTR_HEADER) / 4).map_err(|_| too_large())?,
        };
        let mut record = Vec::with_capacity(INODE);
        record.extend((if is_inline { INLINE } else { PLAIN }).to_le_bytes());
        record.extend(xattrs.to_le_bytes());
        record.extend((inode.mode as u16).to_le_bytes());
        record.extend([0; 2]);
        record.extend(size.to_le_bytes());
        for field in [value, number, inode.uid, inode.gid] {
            record.extend(field.to_le_bytes());
        }
        record.extend(inode.mtime.0.to_le_bytes());
        record.extend(inode.mtime.1.to_le_bytes());
        record.extend(place.links.to_le_bytes());
        record.resize(INODE, 0);
        Ok(record)
    }

    /// struct erofs_super_block.
    fn superblock(&self) -> io::Result<Vec<u8>> {
        let root = u16::try_from(self.at(ROOT)?.nid).map_err(|_| too_large())?;
        let mut record = Vec::new();
        record.extend(MAGIC.to_le_bytes());
        // No checksum.
        record.extend(0u32.to_le_bytes());
        record.extend(MTIME.to_le_bytes());
        record.extend([BLOCK.trailing_zeros() as u8, 0]);
        record.extend(root.to_le_bytes());
        record.extend((self.order.len() as u64).to_le_bytes());
        // Built in 1970, so that the same image has the same bytes.
        record.extend([0; 12]);
        record.extend(self.end.to_le_bytes());
        record.extend(self.meta.to_le_bytes());
        record.resize(128, 0);
        Ok(record)
    }
}

fn too_large() -> io::Error {
    bad("the image is larger than a file system can be")
}

/// Names of one block of a directory, and where they end, in bytes from the directory's beginning. Without an inode it is "." or
/// "..".
struct NameBlock<'a> {
    names: Vec<(&'a [u8], Option<Id>)>,
    end: u64,
}

/// All names of a directory, sorted as bytes, in blocks.
fn blocks(tree: &Tree, id: Id) -> Vec<NameBlock<'_>> {
    let children = tree.children(id).into_iter().flatten();
    let mut names: Vec<(&[u8], Option<Id>)> = vec![(b".", None), (b"..", None)];
    names.extend(children.map(|(name, entry)| (name.as_slice(), Some(entry.id))));
    names.sort();
    let mut blocks: Vec<NameBlock<'_>> = Vec::new();
    let mut used = BLOCK;
    for name in names {
        let bytes = DIRENT + name.0.len();
        if used + bytes > BLOCK {
            used = 0;
            blocks.push(NameBlock {
                names: Vec::new(),
                end: 0,
            });
        }
        used += bytes;
        let start = (blocks.len().saturating_sub(1) * BLOCK) as u64;
        if let Some(block) = blocks.last_mut() {
            block.names.push(name);
            block.end = start + used as u64;
        }
    }
    blocks
}

/// EROFS_FT_*, which are those of directory entries elsewhere.
fn file_type(mode: u32) -> u8 {
    match mode & libc::S_IFMT {
        libc::S_IFREG => 1,
        libc::S_IFDIR => 2,
        libc::S_IFCHR => 3,
        libc::S_IFBLK => 4,
        libc::S_IFIFO => 5,
        libc::S_IFSOCK => 6,
        libc::S_IFLNK => 7,
        _ => 0,
    }
}

/// An extended attribute's number for its prefix, and the rest of its name.
fn split_name(name: &[u8]) -> Option<(u8, &[u8])> {
    (XATTR_PREFIXES.iter()).find_map(|(prefix, index)| Some((*index, name.strip_prefix(*prefix)?)))
}

/// Bytes of the extended attributes behind an inode.
fn xattr_bytes(inode: &Inode) -> io::Result<usize> {
    if inode.xattrs.is_empty() {
        return Ok(0);
    }
    let mut bytes = XATTR_HEADER;
    for (name, value) in &inode.xattrs {
        let (_, rest) = split_name(name).ok_or_else(|| bad("an unknown extended attribute"))?;
        if rest.len() > usize::from(u8::MAX) || value.len() > usize::from(u16::MAX) {
            return Err(bad("an extended attribute is too long"));
        }
        bytes += (4 + rest.len() + value.len()).next_multiple_of(4);
    }
    Ok(bytes)
}

fn xattrs(inode: &Inode, bytes: usize, record: &mut Vec<u8>) {
    if bytes == 0 {
        return;
    }
    let end = record.len() + bytes;
    record.extend([0; XATTR_HEADER]);
    for (name, value) in &inode.xattrs {
        if let Some((index, rest)) = split_name(name) {
            record.extend([rest.len() as u8, index]);
            record.extend((value.len() as u16).to_le_bytes());
            record.extend(rest);
            record.extend(value);
            record.resize(record.len().next_multiple_of(4), 0);
        }
    }
    record.resize(end, 0);
}
