//! Sections in which pages of zeros may be holes.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::file::{Bulk, PAGE_SIZE};

/// Bytes that are read at once when a checksum is computed.
const PIECE: u64 = 1 << 20;

/// The checksum of a [`Bulk`] section: over each page of 4 KiB that has a byte other than zero, its number and its bytes. Whether a
/// page of zeros is a hole makes no difference.
#[derive(Default)]
pub(super) struct SparseChecksum(crc32fast::Hasher);

impl SparseChecksum {
    /// Adds page `number` of the section. Pages are added in order, those of zeros left out.
    pub(super) fn add(&mut self, number: u64, page: &[u8]) {
        self.0.update(&number.to_le_bytes());
        self.0.update(page);
    }

    /// The checksum.
    pub(super) fn finish(self) -> u32 {
        self.0.finalize()
    }
}

/// Whether all bytes are zero.
pub(super) fn is_zero(page: &[u8]) -> bool {
    // By the line, which is compiled to vector instructions.
    page.chunks(64)
        .all(|line| line.iter().fold(0, |all, byte| all | byte) == 0)
}

/// The checksum of what is in the file.
pub(super) fn checksum(file: &File, bulk: Bulk) -> io::Result<u32> {
    let mut sum = SparseChecksum::default();
    let mut piece = vec![0; PIECE as usize];
    let mut at = 0;
    while let Some(mut data) = next_data(file, bulk, at)? {
        at = data.end;
        while data.start < data.end {
            let len = (data.end - data.start).min(PIECE);
            let bytes = piece.get_mut(..len as usize).unwrap_or_default();
            file.read_exact_at(bytes, bulk.offset + data.start)?;
            for (number, page) in (data.start / PAGE_SIZE..).zip(bytes.chunks(PAGE_SIZE as usize)) {
                if !is_zero(page) {
                    sum.add(number, page);
                }
            }
            data.start += len;
        }
    }
    Ok(sum.finish())
}

/// The first run of pages at `at` or behind it that is no hole, as offsets into the section. Where the file system knows no holes, all
/// is data.
pub(in crate::vmm) fn next_data(
    file: &File,
    bulk: Bulk,
    at: u64,
) -> io::Result<Option<Range<u64>>> {
    if at >= bulk.len {
        return Ok(None);
    }
    let data = match seek(file.as_fd(), SeekFrom::Data(bulk.offset + at)) {
        Ok(data) => data.saturating_sub(bulk.offset) / PAGE_SIZE * PAGE_SIZE,
        Err(Errno::NXIO) => return Ok(None),
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some(at..bulk.len)),
        Err(e) => return Err(e.into()),
    };
    let data = data.max(at);
    if data >= bulk.len {
        return Ok(None);
    }
    let hole = seek(file.as_fd(), SeekFrom::Hole(bulk.offset + data))?;
    let end = hole.saturating_sub(bulk.offset).next_multiple_of(PAGE_SIZE);
    // The file may have changed in between: a run has a page at least.
    Ok(Some(data..end.max(data + PAGE_SIZE).min(bulk.len)))
}
