//! The file behind a disk: opened, locked, read and written in place. Its format is raw, never probed.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, FlockOperation, fallocate, fdatasync, flock, ioctl_blksszget};
use rustix::io::Errno;

use super::SECTOR_SIZE;
use crate::virtio::queue::Buffers;

/// iovecs that the kernel takes in one call (UIO_MAXIOV).
const MAX_IOVECS: usize = 1024;

/// Zeroes to write where the host has no faster way.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// Why a disk cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The file cannot be opened.
    #[error("cannot open the disk {}{}", path.display(), how(*read_only, source))]
    Open {
        /// The file.
        path: PathBuf,
        /// Whether it was to be read only.
        read_only: bool,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// Neither a regular file nor a block device.
    #[error("the disk {} is neither a regular file nor a block device", path.display())]
    Kind {
        /// The file.
        path: PathBuf,
    },
    /// Another process has it.
    #[error(
        "the disk {} is in use by another process or by another disk of this VM; a disk can be shared when all open it \
         read-only (ro)",
        path.display()
    )]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// The host refused to tell or do something.
    #[error("cannot {what} the disk {}", path.display())]
    Host {
        /// What it refused.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// Not one sector long.
    #[error("the disk {} has {len} bytes: less than one sector of 512", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        len: u64,
    },
}

/// What it was to be opened for, and the mend where there may be one.
fn how(read_only: bool, error: &io::Error) -> &'static str {
    use io::ErrorKind::{PermissionDenied, ReadOnlyFilesystem};
    match error.kind() {
        _ if read_only => "",
        PermissionDenied | ReadOnlyFilesystem => {
            " for writing (with ro, it would be opened for reading alone)"
        }
        _ => " for writing",
    }
}

/// Direction of a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    /// From the disk to the guest.
    Read,
    /// From the guest to the disk.
    Write,
}

/// An open and locked disk. The lock goes with it.
pub struct Disk {
    file: File,
    sectors: u64,
    block_size: u32,
    read_only: bool,
}

impl Disk {
    /// Opens and locks `path`: for itself alone if it may write, together with other readers if not.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, DiskError> {
        let host = |what| {
            move |source| DiskError::Host {
                what,
                path: path.to_owned(),
                source,
            }
        };
        let mut file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            // A FIFO that is named by mistake must not hang.
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(|source| DiskError::Open {
                path: path.to_owned(),
                read_only,
                source,
            })?;
        let kind = file
            .metadata()
            .map_err(host("read the metadata of"))?
            .file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DiskError::Kind {
                path: path.to_owned(),
            });
        }
        // flock and not fcntl: it belongs to the open file, so that no other open and close of this process drops it,
        // and udev keeps off a block device that is locked so.
        let lock = if read_only {
            FlockOperation::NonBlockingLockShared
        } else {
            FlockOperation::NonBlockingLockExclusive
        };
        flock(&file, lock).map_err(|errno| match errno {
            Errno::WOULDBLOCK => DiskError::InUse {
                path: path.to_owned(),
            },
            errno => host("lock")(errno.into()),
        })?;
        let len = file
            .seek(SeekFrom::End(0))
            .map_err(host("find the size of"))?;
        let block_size = if kind.is_block_device() {
            ioctl_blksszget(&file).map_err(|e| host("find the block size of")(e.into()))?
        } else {
            SECTOR_SIZE as u32
        };
        let sectors = len / SECTOR_SIZE;
        if sectors == 0 {
            return Err(DiskError::Empty {
                path: path.to_owned(),
                len,
            });
        }
        if !len.is_multiple_of(SECTOR_SIZE) {
            log::warn!(
                "the disk {} has {len} bytes, no multiple of 512: the guest does not see the last {}",
                path.display(),
                len % SECTOR_SIZE
            );
        }
        Ok(Self {
            file,
            sectors,
            block_size,
            read_only,
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

    /// Whether nothing may be written to it.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// A disk whose every write fails in the host.
    #[cfg(test)]
    pub(super) fn claim_writable(self) -> Self {
        Self {
            read_only: false,
            ..self
        }
    }

    /// Moves all of `buffers` from or to the bytes at `offset`, straight from and to guest memory.
    pub(super) fn transfer(
        &self,
        direction: Direction,
        buffers: &Buffers<'_>,
        mut offset: u64,
    ) -> io::Result<()> {
        let mut iovecs: Vec<libc::iovec> = buffers
            .slices()
            .iter()
            .map(|slice| libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            })
            .collect();
        let mut done = 0;
        while let Some(rest) = iovecs.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let count = self.transfer_some(direction, rest, offset)?;
            offset += count as u64;
            done += advance(rest, count);
        }
        Ok(())
    }

    #[allow(
        unsafe_code,
        reason = "the safe interfaces to vectored I/O want slices, which guest memory must not be made into: the guest \
                  writes it at any time"
    )]
    fn transfer_some(
        &self,
        direction: Direction,
        iovecs: &[libc::iovec],
        offset: u64,
    ) -> io::Result<usize> {
        let fd = self.file.as_raw_fd();
        let count = iovecs.len().min(MAX_IOVECS) as libc::c_int;
        let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        let ptr = iovecs.as_ptr();
        loop {
            // SAFETY: `ptr` points to at least `count` iovecs. Each lies within a `VolatileSlice` that `transfer`'s
            // caller holds, a piece of a live mapping, readable and writable, which the kernel checks besides; nothing in
            // this process keeps references to guest memory. The file descriptor is open as long as `self.file`.
            let result = unsafe {
                match direction {
                    Direction::Read => libc::preadv(fd, ptr, count, offset),
                    Direction::Write => libc::pwritev(fd, ptr, count, offset),
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

    /// Makes durable what was written (§ 5.2.6.2).
    pub(super) fn flush(&self) -> io::Result<()> {
        if self.read_only {
            return Ok(());
        }
        Ok(fdatasync(&self.file)?)
    }

    /// Gives a range back to the host. That is a hint: a host that cannot has nothing to do.
    pub(super) fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        match self.punch_hole(offset, len) {
            Err(Errno::OPNOTSUPP) => Ok(()),
            result => Ok(result?),
        }
    }

    /// Makes a range read as zeroes; with `unmap`, its room may be given back to the host.
    pub(super) fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let fast = if unmap {
            self.punch_hole(offset, len)
        } else {
            let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
            fallocate(&self.file, flags, offset, len)
        };
        match fast {
            Err(Errno::OPNOTSUPP) => {}
            result => return Ok(result?),
        }
        let (mut offset, mut left) = (offset, len);
        while left > 0 {
            let count = left.min(ZEROES.len() as u64);
            let zeroes = ZEROES.get(..count as usize).unwrap_or_default();
            self.file.write_all_at(zeroes, offset)?;
            offset += count;
            left -= count;
        }
        Ok(())
    }

    fn punch_hole(&self, offset: u64, len: u64) -> Result<(), Errno> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&self.file, flags, offset, len)
    }
}

/// Takes `count` bytes off the front; says how many iovecs that used up.
fn advance(iovecs: &mut [libc::iovec], mut count: usize) -> usize {
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
