//! Applies a layer, a tar archive, to the tree (OCI image specification 1.1, layer.md). Content goes into the image at once.

use std::fs::File;
use std::io::{self, Read};

use super::erofs::Data;
use super::limits::{MAX_IMAGE_BYTES, MAX_MEMBERS, MAX_XATTRS, bad};
use super::tar::{Archive, Kind, Member};
use super::tree::{Content, ENTRY_BYTES, Id, Inode, ROOT, Tree, components};

/// What a name in a layer begins with that removes the name behind it from lower layers.
const WHITEOUT: &[u8] = b".wh.";
/// The name that removes all that lower layers have in its directory.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Other names of AUFS itself.
const AUFS: &[u8] = b".wh..wh.";

/// The kinds of extended attributes that an image may set. Others belong to a host: labels, an overlay's own.
const XATTRS: &[&[u8]] = &[
    b"security.capability",
    b"system.posix_acl_access",
    b"system.posix_acl_default",
];

/// A file system to be, from layers.
pub(super) struct Merge {
    pub(super) tree: Tree,
    data: Data,
    members: usize,
    bytes: u64,
    /// Bytes of archives that may yet be read: headers, padding and what follows an archive's end take time, too.
    pub(super) unread: u64,
}

/// Fails where it has read more than it may: an archive that is too long is not to look like a whole one.
struct Limited<R> {
    reader: R,
    left: u64,
}

impl<R: Read> Read for Limited<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let count = self.reader.read(buf)?;
        self.left = self.left.checked_sub(count as u64).ok_or_else(|| {
            let limit = MAX_IMAGE_BYTES >> 30;
            bad(format!("its archives have more than {limit} GiB, unpacked"))
        })?;
        Ok(count)
    }
}

/// A hard link whose target is not there yet.
struct Pending {
    directory: Id,
    name: Vec<u8>,
    target: Vec<u8>,
}

impl Merge {
    /// `file` is empty.
    pub(super) fn new(file: File) -> Self {
        Self {
            tree: Tree::new(),
            data: Data::new(file),
            members: 0,
            bytes: 0,
            unread: MAX_IMAGE_BYTES,
        }
    }

    /// Applies a layer; reads the whole of `reader`. `whiteouts` is whether names can remove what lower layers have.
    pub(super) fn layer(&mut self, reader: impl Read, whiteouts: bool) -> io::Result<()> {
        self.tree.next_layer();
        let mut archive = Archive::new(Limited {
            reader,
            left: self.unread,
        });
        let mut pending = Vec::new();
        while let Some(member) = archive.next()? {
            self.count(member.size)?;
            let path = String::from_utf8_lossy(&member.path).into_owned();
            self.member(member, &mut archive, whiteouts, &mut pending)
                .map_err(|e| match e.kind() {
                    io::ErrorKind::InvalidData => bad(format!("'{path}': {e}")),
                    _ => e,
                })?;
        }
        for link in pending {
            let shown = String::from_utf8_lossy(&link.name).into_owned();
            let target = self.target(&link.target)?;
            let target = target.ok_or_else(|| {
                let to = String::from_utf8_lossy(&link.target).into_owned();
                bad(format!(
                    "'{shown}' is a hard link to '{to}', which is not there"
                ))
            })?;
            self.tree.link(link.directory, &link.name, target, false)?;
        }
        self.unread = archive.finish()?.left;
        Ok(())
    }

    /// Writes the rest of the file system. Returns the file.
    pub(super) fn finish(self) -> io::Result<File> {
        self.data.finish(&self.tree)
    }

    /// Holds an image to its limits.
    pub(super) fn count(&mut self, bytes: u64) -> io::Result<()> {
        self.members += 1;
        self.bytes = self.bytes.saturating_add(bytes);
        if self.members > MAX_MEMBERS {
            return Err(bad(format!("it has more than {MAX_MEMBERS} files")));
        }
        if self.bytes > MAX_IMAGE_BYTES {
            let limit = MAX_IMAGE_BYTES >> 30;
            return Err(bad(format!("its files have more than {limit} GiB")));
        }
        Ok(())
    }

    /// Content of a file, for the tree.
    pub(super) fn file(
        &mut self,
        size: u64,
        pieces: &[(u64, u64)],
        read: impl FnMut(&mut [u8]) -> io::Result<()>,
    ) -> io::Result<Content> {
        let block = self.data.write(size, pieces, read)?;
        Ok(Content::File { block, size })
    }

    fn member(
        &mut self,
        member: Member,
        archive: &mut Archive<impl Read>,
        whiteouts: bool,
        pending: &mut Vec<Pending>,
    ) -> io::Result<()> {
        let path = components(&member.path)
            .ok_or_else(|| bad("a name that no file in an image can have"))?;
        let Some((name, parents)) = path.split_last() else {
            // The root itself.
            return match member.kind {
                Kind::Directory => self.tree.set_attributes(ROOT, inode(&member, None)?),
                _ => Err(bad("the root is no directory")),
            };
        };
        if whiteouts && (name.starts_with(WHITEOUT) || parents.iter().any(|p| p.starts_with(AUFS)))
        {
            return self.whiteout(name, parents);
        }
        let mut directory = || {
            let found = self.tree.directory(parents, true)?;
            found.ok_or_else(|| bad("no directory for it"))
        };
        let directory = directory()?;
        match member.kind {
            Kind::HardLink => {
                let target = member.link;
                match self.target(&target)? {
                    Some(id) => self.tree.link(directory, name, id, true),
                    None => {
                        self.tree.weigh(ENTRY_BYTES + name.len() + target.len())?;
                        pending.push(Pending {
                            directory,
                            name: name.to_vec(),
                            target,
                        });
                        Ok(())
                    }
                }
            }
            Kind::File => {
                let content =
                    self.file(member.size, &member.pieces, |buf| archive.read_exact(buf))?;
                let inode = inode(&member, Some(content))?;
                self.tree.add(directory, name, inode).map(drop)
            }
            _ => {
                let inode = inode(&member, None)?;
                self.tree.add(directory, name, inode).map(drop)
            }
        }
    }

    fn whiteout(&mut self, name: &[u8], parents: &[&[u8]]) -> io::Result<()> {
        let Some(directory) = self.tree.directory(parents, false)? else {
            return Ok(());
        };
        if name == OPAQUE {
            return self.tree.hide_all(directory);
        }
        match name.strip_prefix(WHITEOUT) {
            Some(b"" | b"." | b"..") => Err(bad("a whiteout of nothing")),
            Some(hidden) if !name.starts_with(AUFS) => self.tree.hide(directory, hidden),
            _ => Ok(()),
        }
    }

    /// The target of a hard link: a path from the image's root.
    fn target(&mut self, path: &[u8]) -> io::Result<Option<Id>> {
        let path = components(path).ok_or_else(|| bad("a hard link out of the image"))?;
        self.tree.find(&path)
    }
}

/// Whether an image may set this extended attribute.
pub(super) fn keeps_xattr(name: &[u8]) -> bool {
    name.starts_with(b"user.") || XATTRS.contains(&name)
}

/// Numbers of a device in 32 bits (new_encode_dev in Linux).
pub(super) fn device_number(major: u32, minor: u32) -> io::Result<u32> {
    if major >= 1 << 12 || minor >= 1 << 20 {
        return Err(bad(format!("a device with numbers {major}:{minor}")));
    }
    Ok((minor & 0xff) | (major << 8) | ((minor & !0xff) << 12))
}

/// What a member is in the tree; `file` is the content of a regular file.
fn inode(member: &Member, file: Option<Content>) -> io::Result<Inode> {
    let (kind, content) = match (&member.kind, file) {
        (_, Some(file)) => (libc::S_IFREG, file),
        (Kind::Special(kind), _) => {
            let number = match *kind {
                libc::S_IFIFO => 0,
                _ => device_number(member.device.0, member.device.1)?,
            };
            (*kind, Content::Special(number))
        }
        (Kind::Symlink, _) => {
            if member.link.is_empty() || member.link.len() >= super::limits::MAX_PATH {
                return Err(bad("a symbolic link of a wrong length"));
            }
            (libc::S_IFLNK, Content::Symlink(member.link.clone()))
        }
        _ => (libc::S_IFDIR, Content::Directory(Default::default())),
    };
    let xattrs = member.xattrs.iter().filter(|(key, _)| keeps_xattr(key));
    let xattrs: std::collections::BTreeMap<_, _> =
        xattrs.map(|(k, v)| (k.clone(), v.clone())).collect();
    let bytes: usize = xattrs.iter().map(|(k, v)| k.len() + v.len() + 8).sum();
    if bytes > MAX_XATTRS || xattrs.keys().any(|key| key.len() > 255) {
        return Err(bad("too many extended attributes"));
    }
    let permissions = match member.kind {
        Kind::Symlink => 0o777,
        _ => member.mode,
    };
    Ok(Inode {
        uid: member.uid,
        gid: member.gid,
        mtime: member.mtime,
        xattrs,
        ..Inode::new(kind | permissions, content)
    })
}
