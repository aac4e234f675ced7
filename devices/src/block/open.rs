//! What is asked of a disk's file before a guest gets it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock, fstatfs, ioctl_blksszget};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

/// The unit of a disk's capacity and of offsets on it, in bytes.
pub const SECTOR_SIZE: u64 = 512;

/// How the host's file is read and written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Engine {
    /// Through io_uring, all requests of a queue at once; but a write is made at once, in place, while nothing else is in flight.
    /// To most file systems a buffered write by io_uring takes several times as long.
    #[default]
    IoUring,
    /// With preadv and pwritev, one request of a queue after the other.
    Sync,
}

/// Why a disk cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("the disk {} {what}", path.display())]
pub struct DiskError {
    /// The disk's file.
    path: PathBuf,
    /// What is wrong with it.
    what: String,
    source: Option<io::Error>,
}

impl DiskError {
    /// The same with its cause.
    pub(super) fn because(mut self, source: io::Error) -> Self {
        self.source = Some(source);
        self
    }
}

/// The error about a disk that is not what it should be.
pub(super) fn refused(path: &Path, what: impl Into<String>) -> DiskError {
    DiskError {
        path: path.to_owned(),
        what: what.into(),
        source: None,
    }
}

/// What could not be done where the host does not tell what a disk is like.
pub(super) const EXAMINED: &str = "examined";

/// The error about what the host refused, from its own.
pub(super) fn failed(what: &str, path: &Path) -> impl FnOnce(io::Error) -> DiskError {
    move |source| refused(path, format!("cannot be {what}")).because(source)
}

/// What it was to be opened for, and the hint where there may be one.
fn how(for_writing: bool, error: &io::Error) -> &'static str {
    use io::ErrorKind::{PermissionDenied, ReadOnlyFilesystem};
    match error.kind() {
        _ if !for_writing => "opened",
        PermissionDenied | ReadOnlyFilesystem => {
            "opened for writing (with ro or ephemeral, it would be opened for reading alone)"
        }
        _ => "opened for writing",
    }
}

/// What a guest's writes do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskMode {
    /// They fail.
    ReadOnly,
    /// They go to the disk.
    ReadWrite,
    /// They go to a temporary file and are gone with the VM.
    Ephemeral,
}

/// How to open a disk.
#[derive(Debug, Clone, Copy)]
pub struct DiskOptions {
    /// What a guest's writes do.
    pub mode: DiskMode,
    /// Whether what looks like another format is taken for raw all the same.
    pub force_raw: bool,
    /// Bytes in a logical block, a power of two; without it, the block device's own, and 512 in a file.
    pub block_size: Option<u32>,
}

impl From<DiskMode> for DiskOptions {
    fn from(mode: DiskMode) -> Self {
        Self {
            mode,
            force_raw: false,
            block_size: None,
        }
    }
}

/// Opens the file twice, and locks the second.
pub(super) fn open_and_lock(path: &Path, for_writing: bool) -> Result<(File, File), DiskError> {
    let open = |flags| {
        OpenOptions::new()
            .read(true)
            .write(for_writing)
            .custom_flags(flags)
            .open(path)
            .map_err(|e| failed(how(for_writing, &e), path)(e))
    };
    // A FIFO that is named by mistake must not hang.
    let lock = open(libc::O_NONBLOCK)?;
    let metadata = lock.metadata().map_err(failed(EXAMINED, path))?;
    let kind = metadata.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(refused(
            path,
            "is neither a regular file nor a block device",
        ));
    }
    // flock and not fcntl: it belongs to the open file, so that no other open and close of this process drops it,
    // and udev keeps off a block device that is locked so.
    let operation = if for_writing {
        FlockOperation::NonBlockingLockExclusive
    } else {
        FlockOperation::NonBlockingLockShared
    };
    flock(&lock, operation).map_err(|errno| match errno {
        Errno::WOULDBLOCK => refused(
            path,
            "is in use by another process or by another disk of this VM; a disk can be shared when none of them writes to \
             it (ro or ephemeral)",
        ),
        errno => failed("locked", path)(errno.into()),
    })?;
    // Not the file that is locked: io_uring lets go of a file some 20 ms after the end of a process that was killed.
    let file = open(0)?;
    let same = file.metadata().map_err(failed(EXAMINED, path))?;
    if (same.dev(), same.ino()) != (metadata.dev(), metadata.ino()) {
        let replaced = io::Error::other("it was just replaced by another");
        return Err(failed("opened", path)(replaced));
    }
    // The host opens such a device for writing, and fails the writes.
    if for_writing
        && kind.is_block_device()
        && is_read_only(&file).map_err(failed(EXAMINED, path))?
    {
        return Err(refused(
            path,
            "is a read-only block device: add ro, or ephemeral for a guest that has to write",
        ));
    }
    Ok((file, lock))
}

/// Bytes in a logical block: what was asked for, or what is the file's own.
pub(super) fn block_size(path: &Path, file: &File, asked: Option<u32>) -> Result<u32, DiskError> {
    let metadata = file.metadata().map_err(failed(EXAMINED, path))?;
    if !metadata.file_type().is_block_device() {
        return Ok(asked.unwrap_or(SECTOR_SIZE as u32));
    }
    let own = ioctl_blksszget(file).map_err(|e| failed(EXAMINED, path)(e.into()))?;
    match asked {
        Some(asked) if asked < own => Err(refused(
            path,
            format!("has logical blocks of {own} bytes: sector={asked} is too small"),
        )),
        asked => Ok(asked.unwrap_or(own)),
    }
}

/// Whether the file is on a file system whose server, another process or machine, is waited for when the file is
/// closed.
pub(super) fn is_remote(file: &File) -> bool {
    /// <linux/magic.h>: FUSE, NFS, CIFS, SMB2, 9P, Ceph.
    const REMOTE: [u32; 6] = [
        0x6573_5546,
        0x6969,
        0xff53_4d42,
        0xfe53_4d42,
        0x0102_1997,
        0x00c3_6400,
    ];
    // The magic number has 32 bits; in the kernel's field, it may be extended by its sign. A local file system does not fail here.
    fstatfs(file).map_or(true, |fs| REMOTE.contains(&(fs.f_type as u32)))
}

/// Whether a block device takes no writes.
#[allow(unsafe_code, reason = "no safe interface has this ioctl")]
fn is_read_only(device: &File) -> io::Result<bool> {
    /// <linux/fs.h>
    const BLKROGET: libc::Ioctl = 0x125e;
    let mut read_only: libc::c_int = 0;
    // SAFETY: the descriptor is open, and the ioctl writes one int, for which there is room.
    match unsafe { libc::ioctl(device.as_raw_fd(), BLKROGET, &raw mut read_only) } {
        0 => Ok(read_only != 0),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use tempfile::NamedTempFile;

    use super::super::Disk;
    use super::*;

    fn open(len: u64, block_size: Option<u32>) -> Result<Disk, String> {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(len).unwrap();
        let options = DiskOptions {
            block_size,
            ..DiskMode::Ephemeral.into()
        };
        Disk::open(file.path(), options).map_err(|e| e.to_string())
    }

    #[test]
    fn a_disk_with_larger_sectors_is_a_whole_number_of_them() {
        let disk = open(3 * 4096, Some(4096)).unwrap();
        assert_eq!((disk.sectors(), disk.block_size()), (24, 4096));
        assert_eq!(open(3 * 4096, None).unwrap().block_size(), 512);
        for len in [512, 4095, 4097, 5 * 512, 1 << 20 | 512] {
            let error = open(len, Some(4096)).err().unwrap();
            for part in [&format!("{len} bytes"), "sectors of 4096"] {
                assert!(error.contains(part), "{part}: {error}");
            }
            assert_eq!(open(len.max(512), Some(512)).unwrap().block_size(), 512);
        }
    }
}
