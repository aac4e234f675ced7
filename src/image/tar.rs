//! Reads tar archives: ustar, pax and GNU. Every size, number and name is bounded before it is used, and nothing is kept but
//! the member at hand.

use std::collections::BTreeMap;
use std::io::{self, Read, Seek};
use std::ops::Range;

use tar::{EntryType, GnuExtSparseHeader, GnuSparseHeader, Header};

use super::limits::{MAX_IMAGE_BYTES, MAX_PATH, MAX_XATTRS, bad};
use super::pax::{Extended, Sparse, number};

/// Bytes of a block; headers and content begin at multiples of it.
pub(super) const BLOCK: usize = 512;
/// Longest extended header in bytes: all attributes of a member, its names and what else a writer adds.
const MAX_EXTENDED: u64 = MAX_XATTRS as u64 + (64 << 10);
/// Most pieces of a sparse file.
const MAX_PIECES: usize = 1 << 18;

/// What a member is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    Directory,
    Symlink,
    HardLink,
    /// The type bits of its mode, S_IFCHR and the like.
    Special(u32),
}

/// A member's header, its extended headers applied.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) kind: Kind,
    pub(super) path: Vec<u8>,
    /// Target of a link.
    pub(super) link: Vec<u8>,
    /// Permissions, with set-user-ID and the like.
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Seconds and nanoseconds since 1970.
    pub(super) mtime: (i64, u32),
    /// Major and minor number of a device.
    pub(super) device: (u32, u32),
    pub(super) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Bytes of the file.
    pub(super) size: u64,
    /// Offset and length of its pieces that are in the archive; the rest is zero.
    pub(super) pieces: Vec<(u64, u64)>,
}

/// An archive that is read from its beginning to its end.
pub(super) struct Archive<R> {
    reader: R,
    /// Skips as many bytes; false if there are fewer.
    skip: fn(&mut R, u64) -> io::Result<bool>,
    /// Bytes of content that are left of the member, and of what fills its last block.
    left: u64,
    padding: u64,
    /// Bytes read.
    position: u64,
}

impl<R: Read> Archive<R> {
    pub(super) fn new(reader: R) -> Self {
        Self {
            reader,
            skip: |reader, bytes| Ok(io::copy(&mut reader.take(bytes), &mut io::sink())? == bytes),
            left: 0,
            padding: 0,
            position: 0,
        }
    }

    /// Where the next byte is that is to be read: behind a header, the member's content.
    pub(super) fn position(&self) -> u64 {
        self.position
    }

    /// Goes on with the next member; `None` at the end of the archive.
    pub(super) fn next(&mut self) -> io::Result<Option<Member>> {
        let mut extended = Extended::default();
        // For all headers in front of one member.
        let mut room = MAX_EXTENDED;
        loop {
            self.skip_content()?;
            let mut header = Header::new_old();
            if !self.read_header(&mut header)? {
                return if extended.is_empty() {
                    Ok(None)
                } else {
                    Err(bad("it ends behind an extended header"))
                };
            }
            let kind = header.entry_type();
            let is_extension = matches!(
                kind,
                EntryType::XHeader
                    | EntryType::XGlobalHeader
                    | EntryType::GNULongName
                    | EntryType::GNULongLink
            );
            // Go's archive/tar, and so docker, reads no content behind these, whatever size they claim (isHeaderOnlyType): the
            // next member begins at once.
            let is_header_only = matches!(
                kind,
                EntryType::Link
                    | EntryType::Symlink
                    | EntryType::Char
                    | EntryType::Block
                    | EntryType::Directory
                    | EntryType::Fifo
            );
            // Where both headers have a size, pax's counts, here and where the next member begins (CVE-2025-62518).
            let size = match extended.size {
                _ if is_header_only => 0,
                Some(size) if !is_extension => size,
                _ => header.entry_size()?,
            };
            if size > MAX_IMAGE_BYTES {
                return Err(bad(format!("a member of {size} bytes is too large")));
            }
            if is_extension {
                let left = room.checked_sub(size);
                room = left.ok_or_else(|| bad(format!("an extended header of {size} bytes")))?;
            }
            self.left = size;
            self.padding = size.next_multiple_of(BLOCK as u64) - size;
            match kind {
                EntryType::XHeader => extended.read_pax(&self.extension(size)?)?,
                // Defaults for all members, which no writer of images has use for.
                EntryType::XGlobalHeader => _ = self.extension(size)?,
                EntryType::GNULongName => extended.path = Some(self.long_name(size)?),
                EntryType::GNULongLink => extended.link = Some(self.long_name(size)?),
                _ => return self.member(&header, size, extended).map(Some),
            }
        }
    }

    /// Reads from the current member's stored content.
    pub(super) fn read_exact(&mut self, buf: &mut [u8]) -> io::Result<()> {
        self.left = (self.left.checked_sub(buf.len() as u64))
            .ok_or_else(|| bad("a member is shorter than it says"))?;
        self.fill(buf)
    }

    fn fill(&mut self, buf: &mut [u8]) -> io::Result<()> {
        self.position += buf.len() as u64;
        self.reader.read_exact(buf).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => bad("it is cut off"),
            _ => e,
        })
    }

    /// Reads what is behind the archive's end, and gives the reader back.
    pub(super) fn finish(mut self) -> io::Result<R> {
        io::copy(&mut self.reader, &mut io::sink())?;
        Ok(self.reader)
    }

    fn skip_content(&mut self) -> io::Result<()> {
        let (left, padding) = (
            std::mem::take(&mut self.left),
            std::mem::take(&mut self.padding),
        );
        self.position += left + padding;
        if !(self.skip)(&mut self.reader, left)? {
            return Err(bad("it is cut off"));
        }
        // Some writers end behind the last byte: then there is no next header either.
        (self.skip)(&mut self.reader, padding).map(drop)
    }

    /// False at the end: a block of zeroes, or no more bytes.
    fn read_header(&mut self, header: &mut Header) -> io::Result<bool> {
        let block = header.as_mut_bytes();
        let mut count = 0;
        while let Some(rest) = block.get_mut(count..).filter(|rest| !rest.is_empty()) {
            match self.reader.read(rest) {
                Ok(0) if count == 0 => return Ok(false),
                Ok(0) => return Err(bad("it is cut off")),
                Ok(n) => count += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        self.position += BLOCK as u64;
        if block.iter().all(|byte| *byte == 0) {
            return Ok(false);
        }
        // The checksum itself counts as spaces.
        let sum: u32 = (block.iter().enumerate())
            .map(|(at, byte)| {
                if (148..156).contains(&at) {
                    32
                } else {
                    u32::from(*byte)
                }
            })
            .sum();
        if header.cksum().is_ok_and(|stored| stored == sum) {
            Ok(true)
        } else {
            Err(bad("it is no tar archive, or damaged"))
        }
    }

    /// The content of an extended header.
    fn extension(&mut self, size: u64) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; size as usize];
        self.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn long_name(&mut self, size: u64) -> io::Result<Vec<u8>> {
        let mut name = self.extension(size)?;
        name.truncate(name.iter().position(|b| *b == 0).unwrap_or(name.len()));
        Ok(name)
    }

    fn member(&mut self, header: &Header, stored: u64, extended: Extended) -> io::Result<Member> {
        let kind = header.entry_type();
        let path = (extended.sparse_name).or(extended.path);
        let path = path.unwrap_or_else(|| header.path_bytes().into_owned());
        let shown = String::from_utf8_lossy(&path).into_owned();
        let wrong = |what: &str| bad(format!("'{shown}': {what}"));
        if path.len() > MAX_PATH {
            return Err(bad(format!("a name of {} bytes", path.len())));
        }
        let mut member = Member {
            // Before POSIX, a directory was a file whose name ends so.
            kind: match kind {
                EntryType::Regular if path.ends_with(b"/") => Kind::Directory,
                EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => Kind::File,
                EntryType::Directory => Kind::Directory,
                EntryType::Symlink => Kind::Symlink,
                EntryType::Link => Kind::HardLink,
                EntryType::Char => Kind::Special(libc::S_IFCHR),
                EntryType::Block => Kind::Special(libc::S_IFBLK),
                EntryType::Fifo => Kind::Special(libc::S_IFIFO),
                other => return Err(wrong(&format!("type {:#x}", other.as_byte()))),
            },
            link: (extended.link)
                .or_else(|| Some(header.link_name_bytes()?.into_owned()))
                .unwrap_or_default(),
            mode: header.mode()? & 0o7777,
            uid: id(extended.uid.map_or_else(|| header.uid(), Ok)?)
                .ok_or_else(|| wrong("its user ID has more than 32 bits"))?,
            gid: id(extended.gid.map_or_else(|| header.gid(), Ok)?)
                .ok_or_else(|| wrong("its group ID has more than 32 bits"))?,
            mtime: match extended.mtime {
                Some(time) => time,
                None => (i64::try_from(header.mtime()?).unwrap_or(0), 0),
            },
            device: (0, 0),
            xattrs: extended.xattrs,
            size: stored,
            pieces: vec![(0, stored)],
            path,
        };
        if member.link.len() > MAX_PATH {
            return Err(wrong(&format!("a link of {} bytes", member.link.len())));
        }
        // Readers do not agree: to Go, type '0' is a file and NUL a header without content; GNU tar skips the content of both.
        if member.kind == Kind::Directory && stored > 0 {
            return Err(wrong("a directory with content"));
        }
        if matches!(kind, EntryType::Char | EntryType::Block) {
            member.device = device(header)?;
        }
        let sparse = extended.sparse;
        if kind == EntryType::GNUSparse || (sparse.size.is_some() && member.kind == Kind::File) {
            self.read_pieces(header, sparse, &mut member)
                .map_err(|e| wrong(&format!("a damaged sparse file: {e}")))?;
        }
        Ok(member)
    }

    /// Where the content of a sparse file belongs, which its header says in GNU tar's own format, or extended ones (its manual,
    /// "Storing Sparse Files").
    fn read_pieces(
        &mut self,
        header: &Header,
        sparse: Sparse,
        member: &mut Member,
    ) -> io::Result<()> {
        let (size, map) = match sparse.size {
            None => self.read_gnu_map(header)?,
            Some(size) if sparse.is_in_content => (size, self.read_map()?),
            Some(size) => (size, sparse.map),
        };
        if size > MAX_IMAGE_BYTES {
            return Err(bad("it is too large"));
        }
        member.size = size;
        member.pieces.clear();
        let (mut end, mut total) = (0, 0);
        for piece in map.chunks(2) {
            let &[offset, length] = piece else {
                return Err(bad("half a piece"));
            };
            let next = offset.checked_add(length);
            let next = next.filter(|next| offset >= end && *next <= size);
            end = next.ok_or_else(|| bad("its pieces overlap"))?;
            total += length;
            member.pieces.push((offset, length));
        }
        if total != self.left {
            return Err(bad("its sizes do not agree"));
        }
        Ok(())
    }

    /// The file's size, and offset and length of each piece.
    fn read_gnu_map(&mut self, header: &Header) -> io::Result<(u64, Vec<u64>)> {
        let gnu = (header.as_gnu()).ok_or_else(|| bad("no header of GNU tar"))?;
        let mut map = Vec::new();
        let mut add = |list: &[GnuSparseHeader]| -> io::Result<()> {
            for piece in list.iter().filter(|piece| !piece.is_empty()) {
                map.extend([piece.offset()?, piece.length()?]);
            }
            check_pieces(&map)
        };
        add(&gnu.sparse)?;
        let mut more = gnu.is_extended();
        while more {
            let mut extension = GnuExtSparseHeader::new();
            self.position += BLOCK as u64;
            self.reader.read_exact(extension.as_mut_bytes())?;
            add(extension.sparse())?;
            more = extension.is_extended();
        }
        Ok((gnu.real_size()?, map))
    }

    /// The map in front of the content, in whole blocks: how many pieces there are, and offset and length of each, a number a line.
    fn read_map(&mut self) -> io::Result<Vec<u64>> {
        let (mut numbers, mut digits) = (Vec::new(), Vec::new());
        loop {
            let mut block = [0; BLOCK];
            self.read_exact(&mut block)?;
            for byte in block {
                if byte == b'\n' {
                    numbers.push(number(&digits).ok_or_else(|| bad("no number in its map"))?);
                    digits.clear();
                } else {
                    digits.push(byte);
                }
            }
            check_pieces(&numbers)?;
            match numbers.first() {
                Some(pieces) if (numbers.len() as u64).div_ceil(2) > *pieces => break,
                // Longer than what fills the last block.
                _ if digits.len() > BLOCK => return Err(bad("no number in its map")),
                _ => {}
            }
        }
        Ok(numbers.split_off(1))
    }
}

fn check_pieces(map: &[u64]) -> io::Result<()> {
    if map.len() > 2 * MAX_PIECES {
        return Err(bad("too many pieces"));
    }
    Ok(())
}

impl<R: Read + Seek> Archive<R> {
    /// Does not read what it skips. A member that is cut off shows when it is read.
    pub(super) fn seeking(reader: R) -> Self {
        Self {
            skip: |reader, bytes| {
                let bytes = i64::try_from(bytes).map_err(io::Error::other)?;
                reader.seek_relative(bytes).map(|()| true)
            },
            ..Self::new(reader)
        }
    }
}

/// Major and minor number of a device. A field that is empty is 0, as in Go: some writers leave it so.
fn device(header: &Header) -> io::Result<(u32, u32)> {
    let number = |at: Range<usize>, read: fn(&Header) -> io::Result<Option<u32>>| {
        let field = header.as_bytes().get(at).unwrap_or_default();
        let is_empty = field.iter().all(|byte| matches!(byte, 0 | b' '));
        let number = if is_empty { None } else { read(header)? };
        io::Result::Ok(number.unwrap_or(0))
    };
    Ok((
        number(329..337, Header::device_major)?,
        number(337..345, Header::device_minor)?,
    ))
}

fn id(number: u64) -> Option<u32> {
    u32::try_from(number).ok()
}
