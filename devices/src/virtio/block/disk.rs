//! The file behind a disk: opened, locked, read and written in place. Its format is raw; a file that is seen to have another one
//! is refused.

use std::env;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{FallocateFlags, fallocate, fdatasync};
use rustix::io::{Errno, retry_on_intr};

use super::SECTOR_SIZE;
use super::format;
use super::open::{Access, DiskError, DiskOptions, block_size, failed, open_and_lock};
use super::overlay::{MAX_LEN as MAX_EPHEMERAL_LEN, Overlay};
use crate::virtio::queue::Buffers;

/// iovecs that the kernel takes in one call (UIO_MAXIOV).
const MAX_IOVECS: usize = 1024;

/// Room for an iovec.
pub(super) const NO_IOVEC: libc::iovec = libc::iovec {
    iov_base: std::ptr::null_mut(),
    iov_len: 0,
};

/// Longest piece of a read or write, in bytes: what the host may do before it is asked again whether to go on. It is as long as
/// the requests that Linux makes.
pub(super) const PIECE: u64 = 1 << 20;

/// Longest piece, in bytes, of a range that is given back to the host or made zeroes, which costs the host less.
const CLEAR_PIECE: u64 = 64 << 20;

/// Zeroes to write where the host has no faster way.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// Direction of a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    /// From the disk to the guest.
    Read,
    /// From the guest to the disk.
    Write,
}

/// Says that a request is to be cut short. Long ones are carried out in pieces, and it is asked between them.
pub(super) type Cancelled<'a> = &'a dyn Fn() -> bool;

/// An error if a request is to be cut short.
fn go_on(cancelled: Cancelled<'_>) -> io::Result<()> {
    if cancelled() {
        return Err(Errno::CANCELED.into());
    }
    Ok(())
}

/// An open and locked disk. The lock goes with it.
pub struct Disk {
    file: File,
    /// The same file, opened once more, with the lock.
    _lock: File,
    /// Where writes go, if the file is to stay as it is.
    overlay: Option<Overlay>,
    sectors: u64,
    block_size: u32,
    read_only: bool,
    path: PathBuf,
    flush_failed: AtomicBool,
    /// Whether a failure was reported.
    failed: AtomicBool,
}

impl Disk {
    /// Opens and locks `path`: for itself alone if it may write there, together with other readers if not.
    pub fn open(path: &Path, options: impl Into<DiskOptions>) -> Result<Self, DiskError> {
        let options = options.into();
        let access = options.access;
        let (file, lock) = open_and_lock(path, access == Access::ReadWrite)?;
        let len = (&file)
            .seek(SeekFrom::End(0))
            .map_err(failed("find the size of", path))?;
        if len < SECTOR_SIZE {
            return Err(DiskError::Empty {
                path: path.to_owned(),
                len,
            });
        }
        if !options.force_raw
            && let Some(format) = format::identify(&file, len).map_err(failed("read", path))?
        {
            return Err(DiskError::NotRaw {
                path: path.to_owned(),
                format,
            });
        }
        let block_size = block_size(path, &file, options.block_size)?;
        if block_size != SECTOR_SIZE as u32 && !len.is_multiple_of(block_size.into()) {
            return Err(DiskError::Uneven {
                path: path.to_owned(),
                len,
                block_size,
            });
        }
        if !len.is_multiple_of(SECTOR_SIZE) {
            log::warn!(
                "the disk {} has {len} bytes, no multiple of 512: the guest does not see the last {}",
                path.display(),
                len % SECTOR_SIZE
            );
        }
        let sectors = len / SECTOR_SIZE;
        let overlay = match access {
            Access::Ephemeral if len > MAX_EPHEMERAL_LEN => {
                return Err(DiskError::TooLong {
                    path: path.to_owned(),
                    len,
                });
            }
            Access::Ephemeral => {
                let overlay = Overlay::new(sectors * SECTOR_SIZE);
                Some(overlay.map_err(|source| DiskError::Temporary {
                    path: path.to_owned(),
                    dir: env::temp_dir(),
                    source,
                })?)
            }
            Access::ReadOnly | Access::ReadWrite => None,
        };
        Ok(Self {
            file,
            _lock: lock,
            overlay,
            sectors,
            block_size,
            read_only: access == Access::ReadOnly,
            path: path.to_owned(),
            flush_failed: AtomicBool::new(false),
            failed: AtomicBool::new(false),
        })
    }

    /// Its length in sectors of 512 bytes, as it was when it was opened.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Bytes in a logical block.
    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    /// The file, if all reads and writes are its.
    pub(super) fn plain_file(&self) -> Option<BorrowedFd<'_>> {
        self.overlay.is_none().then(|| self.file.as_fd())
    }

    /// Whether nothing may be written to it.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// The same with another file behind it.
    #[cfg(test)]
    pub(super) fn with_file(self, file: File) -> Self {
        Self { file, ..self }
    }

    /// Moves all of `buffers` from or to the bytes at `offset`, straight from and to guest memory. `iovecs` is room to
    /// work in.
    pub(super) fn transfer(
        &self,
        direction: Direction,
        buffers: &Buffers<'_>,
        offset: u64,
        iovecs: &mut Vec<libc::iovec>,
        cancelled: Cancelled<'_>,
    ) -> io::Result<()> {
        describe(buffers, iovecs);
        let (mut rest, len, mut done) = (iovecs.as_mut_slice(), buffers.len(), 0);
        while done < len {
            go_on(cancelled)?;
            let (at, piece) = (offset + done, PIECE.min(len - done));
            let (file, count) = match &self.overlay {
                Some(overlay) if direction == Direction::Write => {
                    rest = overlay.change(&self.file, at, piece, |top| {
                        transfer(top, direction, rest, at, piece)
                    })?;
                    done += piece;
                    continue;
                }
                Some(overlay) => overlay.place(&self.file, at, piece),
                None => (&self.file, piece),
            };
            rest = transfer(file, direction, rest, at, count)?;
            done += count;
        }
        Ok(())
    }

    /// Makes durable what was written (§ 5.2.6.2), where that is to last.
    pub(super) fn flush(&self) -> io::Result<()> {
        if self.read_only || self.overlay.is_some() {
            return Ok(());
        }
        self.flushed(retry_on_intr(|| fdatasync(&self.file)).map_err(Into::into))
    }

    /// What to answer to a flush of the file that came to `result`. The host tells of lost writes once and then takes what it
    /// has for durable (fsync(2)), so that after one that failed, in whichever queue, no flush can be trusted.
    pub(super) fn flushed<T>(&self, result: io::Result<T>) -> io::Result<T> {
        if let Err(e) = &result {
            if !self.flush_failed.swap(true, Ordering::AcqRel) {
                self.failed.store(true, Ordering::Release);
                log::warn!(
                    "the host cannot make durable what was written to the disk {}: {e}",
                    self.path.display()
                );
            }
        } else if self.flush_failed.load(Ordering::Acquire) {
            return Err(io::Error::other("an earlier flush failed"));
        }
        result
    }

    /// Reports the first failure of the host: a guest, which sees an I/O error for each, has no words for its cause.
    pub(super) fn report(&self, error: &io::Error) {
        let is_cancelled = Errno::from_io_error(error) == Some(Errno::CANCELED)
            || error.kind() == io::ErrorKind::Interrupted;
        if is_cancelled || self.failed.swap(true, Ordering::AcqRel) {
            return;
        }
        let path = self.path.display();
        if error.kind() == io::ErrorKind::UnexpectedEof {
            log::warn!("the disk {path} has become shorter than it was: the guest gets I/O errors");
        } else {
            log::warn!("the disk {path} fails: {error}; the guest gets an I/O error");
        }
    }

    /// Gives a range back to the host. That is a hint: a host that cannot has nothing to do.
    pub(super) fn discard(
        &self,
        offset: u64,
        len: u64,
        cancelled: Cancelled<'_>,
    ) -> io::Result<()> {
        if self.overlay.is_some() {
            return self.write_zeroes(offset, len, true, cancelled);
        }
        in_pieces(offset, len, |offset, len| {
            go_on(cancelled)?;
            match punch_hole(&self.file, offset, len) {
                Err(Errno::OPNOTSUPP) => Ok(()),
                result => Ok(result?),
            }
        })
    }

    /// Makes a range read as zeroes; with `unmap`, its room may be given back to the host.
    pub(super) fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        unmap: bool,
        cancelled: Cancelled<'_>,
    ) -> io::Result<()> {
        in_pieces(offset, len, |offset, len| match &self.overlay {
            // No file system hands its room out in advance.
            Some(overlay) => overlay.change(&self.file, offset, len, |top| {
                write_zeroes(top, offset, len, true, cancelled)
            }),
            None => write_zeroes(&self.file, offset, len, unmap, cancelled),
        })
    }
}

/// Does something with each piece of a range that is to be cleared.
fn in_pieces(
    offset: u64,
    len: u64,
    mut clear: impl FnMut(u64, u64) -> io::Result<()>,
) -> io::Result<()> {
    (0..len.div_ceil(CLEAR_PIECE)).try_for_each(|piece| {
        let done = piece * CLEAR_PIECE;
        clear(offset + done, CLEAR_PIECE.min(len - done))
    })
}

/// Makes `iovecs` those of `buffers`.
pub(super) fn describe(buffers: &Buffers<'_>, iovecs: &mut Vec<libc::iovec>) {
    iovecs.clear();
    iovecs.extend(buffers.slices().iter().map(|slice| libc::iovec {
        iov_base: slice.ptr_guard_mut().as_ptr().cast(),
        iov_len: slice.len(),
    }));
}

/// Moves `len` bytes between the file at `offset` and guest memory; gives what is left of the iovecs.
fn transfer<'a>(
    file: &File,
    direction: Direction,
    mut iovecs: &'a mut [libc::iovec],
    mut offset: u64,
    mut len: u64,
) -> io::Result<&'a mut [libc::iovec]> {
    while len > 0 {
        let count = transfer_some(file, direction, iovecs, offset, len)?;
        offset += count as u64;
        len -= count as u64;
        let used_up = advance(iovecs, count);
        iovecs = iovecs.get_mut(used_up..).unwrap_or_default();
    }
    Ok(iovecs)
}

/// Moves at least one byte and at most `len`; says how many.
#[allow(
    unsafe_code,
    reason = "the safe interfaces to vectored I/O want slices, which guest memory must not be made into: the guest \
              writes it at any time"
)]
fn transfer_some(
    file: &File,
    direction: Direction,
    iovecs: &[libc::iovec],
    offset: u64,
    len: u64,
) -> io::Result<usize> {
    let mut part = NO_IOVEC;
    let (ptr, count, _) = front(iovecs, len, &mut part);
    let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
    let fd = file.as_raw_fd();
    loop {
        // SAFETY: `ptr` points to at least `count` iovecs, in `iovecs` or in `part`. Each lies within a `VolatileSlice` that `Disk::transfer`'s
        // caller holds, a piece of a live mapping, readable and writable, which the kernel checks besides; nothing in this
        // process keeps references to guest memory. The file descriptor is open as long as `file` is there.
        let result = unsafe {
            match direction {
                Direction::Read => libc::preadv(fd, ptr, count as libc::c_int, offset),
                Direction::Write => libc::pwritev(fd, ptr, count as libc::c_int, offset),
            }
        };
        match usize::try_from(result) {
            // The file was truncated since it was opened.
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => return Ok(count),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

/// The beginning of `iovecs`, at most `len` bytes: where, how many iovecs, and how many bytes. It is as many whole iovecs as there
/// is room for, or the beginning of one, which then is in `part`.
pub(super) fn front(
    iovecs: &[libc::iovec],
    len: u64,
    part: &mut libc::iovec,
) -> (*const libc::iovec, u32, u64) {
    let (mut count, mut bytes) = (0, 0);
    for iovec in iovecs.iter().take(MAX_IOVECS) {
        let more = bytes + iovec.iov_len as u64;
        if more > len {
            break;
        }
        (count, bytes) = (count + 1, more);
    }
    match iovecs.first() {
        Some(first) if count == 0 => {
            *part = libc::iovec {
                iov_len: len as usize,
                ..*first
            };
            (part, 1, len)
        }
        _ => (iovecs.as_ptr(), count, bytes),
    }
}

fn write_zeroes(
    file: &File,
    offset: u64,
    len: u64,
    unmap: bool,
    cancelled: Cancelled<'_>,
) -> io::Result<()> {
    go_on(cancelled)?;
    let fast = if unmap {
        punch_hole(file, offset, len)
    } else {
        let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        fallocate(file, flags, offset, len)
    };
    match fast {
        Err(Errno::OPNOTSUPP) => {}
        result => return Ok(result?),
    }
    let (mut offset, mut left) = (offset, len);
    while left > 0 {
        go_on(cancelled)?;
        let count = left.min(ZEROES.len() as u64);
        let zeroes = ZEROES.get(..count as usize).unwrap_or_default();
        file.write_all_at(zeroes, offset)?;
        offset += count;
        left -= count;
    }
    Ok(())
}

fn punch_hole(file: &File, offset: u64, len: u64) -> Result<(), Errno> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(file, flags, offset, len)
}

/// Takes `count` bytes off the front; says how many iovecs that used up.
pub(super) fn advance(iovecs: &mut [libc::iovec], mut count: usize) -> usize {
    let mut used_up = 0;
    for iovec in iovecs {
        if count < iovec.iov_len {
            iovec.iov_base = iovec.iov_base.wrapping_byte_add(count);
            iovec.iov_len -= count;
            break;
        }
        count -= iovec.iov_len;
        used_up += 1;
    }
    used_up
}
