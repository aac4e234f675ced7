//! The file behind a disk: opened, locked, read and written in place. Its format is raw; a file that is seen to have another one
//! is refused.

use std::env;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::fdatasync;
use rustix::io::{Errno, retry_on_intr};

use vm_memory::VolatileSlice;

use super::format;
use super::identity::DiskIdentity;
use super::open::{
    DiskError, DiskMode, DiskOptions, EXAMINED, SECTOR_SIZE, block_size, failed, is_remote,
    open_and_lock, refused,
};
use super::overlay::{MAX_LEN as MAX_EPHEMERAL_LEN, Overlay};
use super::saved::{self, SavedOverlay};
use super::transfer::{
    Cancelled, Direction, PIECE, describe, go_on, punch_hole, transfer, write_zeroes,
};

/// Longest piece, in bytes, of a range that is given back to the host or made zeroes, which costs the host less.
const CLEAR_PIECE: u64 = 64 << 20;

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
    is_remote: bool,
    path: PathBuf,
    flush_failed: AtomicBool,
    /// Whether a failure was reported.
    failed: AtomicBool,
}

impl Disk {
    /// Opens and locks `path`: for itself alone if it may write there, together with other readers if not.
    pub fn open(path: &Path, options: impl Into<DiskOptions>) -> Result<Self, DiskError> {
        let options = options.into();
        let mode = options.mode;
        let refuse = |what: String| Err(refused(path, what));
        let (file, lock) = open_and_lock(path, mode == DiskMode::ReadWrite)?;
        let len = (&file)
            .seek(SeekFrom::End(0))
            .map_err(failed(EXAMINED, path))?;
        // Without a medium, as it were: a VM that goes on from a snapshot may find one.
        let is_vacant = len == 0 && mode == DiskMode::ReadOnly && options.force_raw;
        if len < SECTOR_SIZE && !is_vacant {
            return refuse(format!("has {len} bytes: less than one sector of 512"));
        }
        if !options.force_raw
            && let Some(format) = format::identify(&file, len).map_err(failed("read", path))?
        {
            let (name, command) = (format.name, format.command(path));
            return refuse(format!(
                "is {name}, and a disk is raw: {command} makes one of it; if these bytes are a disk's own, add format=raw"
            ));
        }
        let block_size = block_size(path, &file, options.block_size)?;
        if block_size != SECTOR_SIZE as u32 && !len.is_multiple_of(block_size.into()) {
            return refuse(format!(
                "has {len} bytes, which is no multiple of its sectors of {block_size}"
            ));
        }
        if !len.is_multiple_of(SECTOR_SIZE) {
            log::warn!(
                "the disk {} has {len} bytes, no multiple of 512: the guest does not see the last {}",
                path.display(),
                len % SECTOR_SIZE
            );
        }
        let sectors = len / SECTOR_SIZE;
        let overlay = match mode {
            DiskMode::Ephemeral if len > MAX_EPHEMERAL_LEN => {
                return refuse(format!(
                    "has {len} bytes: an ephemeral disk has {MAX_EPHEMERAL_LEN} (16 TiB) at most"
                ));
            }
            DiskMode::Ephemeral => {
                let no_place = |e| {
                    let dir = env::temp_dir();
                    let what = format!(
                        "has no place for what is written to it: cannot make a file in {} (set TMPDIR)",
                        dir.display()
                    );
                    refused(path, what).because(e)
                };
                Some(Overlay::new(sectors * SECTOR_SIZE).map_err(no_place)?)
            }
            DiskMode::ReadOnly | DiskMode::ReadWrite => None,
        };
        Ok(Self {
            is_remote: is_remote(&file),
            file,
            _lock: lock,
            overlay,
            sectors,
            block_size,
            read_only: mode == DiskMode::ReadOnly,
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
    pub(crate) fn plain_file(&self) -> Option<BorrowedFd<'_>> {
        self.overlay.is_none().then(|| self.file.as_fd())
    }

    /// Whether what is written does not go to the file.
    pub(crate) fn has_overlay(&self) -> bool {
        self.overlay.is_some()
    }

    /// Whether nothing may be written to it.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Whether to close its file may be to wait for another process or machine.
    pub fn is_remote(&self) -> bool {
        self.is_remote
    }

    /// Most bytes that it takes, whatever is written to it; its queues have theirs.
    pub(crate) fn memory_bound(&self) -> usize {
        self.overlay.as_ref().map_or(0, Overlay::memory_bound)
    }

    /// The same with another file behind it.
    #[cfg(test)]
    pub(crate) fn with_file(self, file: File) -> Self {
        Self { file, ..self }
    }

    /// Moves all of `slices`, `len` bytes, from or to the bytes at `offset`, straight from and to guest memory. `iovecs` is room
    /// to work in.
    pub(crate) fn transfer(
        &self,
        direction: Direction,
        slices: &[VolatileSlice<'_>],
        len: u64,
        offset: u64,
        iovecs: &mut Vec<libc::iovec>,
        cancelled: Cancelled<'_>,
    ) -> io::Result<()> {
        describe(slices, iovecs);
        let (mut rest, mut done) = (iovecs.as_mut_slice(), 0);
        while done < len {
            go_on(cancelled)?;
            let (at, piece) = (offset + done, PIECE.min(len - done));
            let (file, at, count) = match &self.overlay {
                Some(overlay) if direction == Direction::Write => {
                    rest = overlay.change(&self.file, at, piece, |top| {
                        transfer(top, direction, rest, at, piece)
                    })?;
                    done += piece;
                    continue;
                }
                Some(overlay) => overlay.place(&self.file, at, piece),
                None => (&self.file, at, piece),
            };
            rest = transfer(file, direction, rest, at, count)?;
            done += count;
        }
        Ok(())
    }

    /// What must be the same when a snapshot is restored.
    pub fn identity(&self) -> Result<DiskIdentity, DiskError> {
        let metadata = self.file.metadata();
        let metadata = metadata.map_err(failed(EXAMINED, &self.path))?;
        Ok(DiskIdentity::new(
            &self.path,
            self.sectors * SECTOR_SIZE,
            &metadata,
        ))
    }

    /// Writes what an ephemeral disk holds to `out` at `at`, where there are zeroes or nothing so far; says how many bytes long that
    /// is. Other disks hold nothing. It is an error once `cancelled` says so. To be called while the VM is paused.
    pub fn save_overlay(
        &self,
        out: &File,
        at: u64,
        cancelled: &dyn Fn() -> bool,
    ) -> io::Result<u64> {
        let Some(overlay) = &self.overlay else {
            return Ok(0);
        };
        let len = self.sectors * SECTOR_SIZE;
        let place = |offset, len| overlay.place(&self.file, offset, len);
        saved::save(&overlay.changed(), len, place, (out, at), cancelled)
    }

    /// Gives an ephemeral disk what was saved, `len` bytes at `offset` of `file`. It stays there, and is only read.
    pub fn restore_overlay(
        &mut self,
        file: Arc<File>,
        offset: u64,
        len: u64,
    ) -> Result<(), DiskError> {
        let path = &self.path;
        let damaged = |why| {
            refused(
                path,
                format!("cannot be given what was written to it: {why}"),
            )
        };
        let Some(overlay) = &mut self.overlay else {
            return Err(damaged("the disk is not ephemeral".into()));
        };
        let saved = SavedOverlay::open(file, offset, len, self.sectors * SECTOR_SIZE);
        overlay.restore(saved.map_err(damaged)?);
        Ok(())
    }

    /// Makes durable what was written (§ 5.2.6.2), where that is to last.
    pub fn flush(&self) -> io::Result<()> {
        if self.read_only || self.overlay.is_some() {
            return Ok(());
        }
        self.flushed(retry_on_intr(|| fdatasync(&self.file)).map_err(Into::into))
    }

    /// What to answer to a flush of the file that came to `result`. The host tells of lost writes once and then takes what it
    /// has for durable (fsync(2)), so that after one that failed, in whichever queue, no flush can be trusted.
    pub(crate) fn flushed<T>(&self, result: io::Result<T>) -> io::Result<T> {
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
    pub(crate) fn report(&self, error: &io::Error) {
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
    pub(crate) fn discard(
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
    pub(crate) fn write_zeroes(
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
