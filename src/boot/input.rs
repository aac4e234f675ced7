//! A kernel or initrd file on the host: opened once, every length checked, each byte read at most once.

use std::fmt;
use std::fs::{self, File, FileType, Metadata, OpenOptions};
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::error::{BootError, Role};
use super::ram::GuestMemory;

/// Bytes of a file's beginning that tell what it is: enough for the setup header of a bzImage (boot.rst, "The
/// Real-Mode Kernel Header": at most 0x202 + 0xff) and for an ELF header.
pub(crate) const HEAD_LEN: usize = 0x400;

/// Most bytes asked of one read(2): Linux itself stops just below 2 GiB.
const MAX_READ: u64 = 1 << 30;

/// Length in bytes of runs of zeros that are not copied, if they begin at a multiple of it.
const HOLE: usize = 64 << 10;

/// An open regular file that is not empty, or what was unpacked from one.
#[derive(Debug)]
pub struct InputFile {
    role: Role,
    path: PathBuf,
    content: Content,
    len: u64,
    identity: FileIdentity,
}

#[derive(Debug)]
enum Content {
    File(File),
    /// No memfd: the kernel is unpacked again after a guest's reset, when the sandbox refuses memfd_create.
    Unpacked(Arc<Vec<u8>>),
}

/// Identifies a file and its content by inode and timestamps. A user cannot set the ctime, so an overwritten file always has a
/// new identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub(crate) struct FileIdentity {
    pub(crate) dev: u64,
    pub(crate) ino: u64,
    pub(crate) len: u64,
    /// Seconds and nanoseconds since 1970.
    pub(crate) mtime: (i64, i64),
    /// Likewise.
    pub(crate) ctime: (i64, i64),
}

impl FileIdentity {
    pub(crate) fn of(metadata: &Metadata) -> Self {
        Self {
            dev: metadata.dev(),
            ino: metadata.ino(),
            len: metadata.len(),
            mtime: (metadata.mtime(), metadata.mtime_nsec()),
            ctime: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

#[allow(clippy::len_without_is_empty, reason = "an empty file is refused")]
impl InputFile {
    /// Opens `path`. A FIFO or a device is refused before it is opened, so that opening neither blocks nor has side effects.
    pub(crate) fn open(role: Role, path: &Path) -> Result<Self, BootError> {
        let shown = path.display();
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => {
                BootError::Refused(format!("there is no {role} at {shown}; check the path"))
            }
            io::ErrorKind::PermissionDenied => BootError::Refused(format!(
                "the {role} {shown} may not be read by this user: permission denied; check its mode and owner (ls -l {shown})"
            )),
            _ => BootError::Host(format!("open the {role} {shown}"), source),
        };
        let regular = |file_type: FileType| match irregular(file_type) {
            None => Ok(()),
            Some(what) => Err(BootError::Refused(format!(
                "the {role} {shown} is {what}, not a regular file; give the {role} file itself"
            ))),
        };

        regular(fs::metadata(path).map_err(failed)?.file_type())?;
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(path)
            .map_err(failed)?;
        // Again, on the descriptor: the name may have changed hands in between.
        let metadata = file.metadata().map_err(failed)?;
        regular(metadata.file_type())?;
        if metadata.len() == 0 {
            return Err(BootError::Refused(format!(
                "the {role} {shown} is empty; build or download it again"
            )));
        }
        Ok(Self {
            role,
            path: path.to_owned(),
            content: Content::File(file),
            len: metadata.len(),
            identity: FileIdentity::of(&metadata),
        })
    }

    /// A file that this program has opened already; `path` is what messages call it.
    pub(crate) fn from_file(role: Role, path: &Path, file: File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        Ok(Self {
            role,
            path: path.to_owned(),
            content: Content::File(file),
            len: metadata.len(),
            identity: FileIdentity::of(&metadata),
        })
    }

    /// What was unpacked from this file.
    pub(crate) fn unpacked(&self, content: Arc<Vec<u8>>) -> Self {
        Self {
            role: self.role,
            path: self.path.clone(),
            len: content.len() as u64,
            content: Content::Unpacked(content),
            identity: self.identity,
        }
    }

    /// What the file was when it was opened.
    pub(crate) fn identity(&self) -> &FileIdentity {
        &self.identity
    }

    /// Whether the file is still what it was when it was opened.
    pub(crate) fn is_unchanged(&self) -> bool {
        match &self.content {
            Content::File(file) => file
                .metadata()
                .is_ok_and(|metadata| FileIdentity::of(&metadata) == self.identity),
            Content::Unpacked(_) => true,
        }
    }

    /// The file's path, as it was given.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The file's length in bytes when it was opened.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// The first [`HEAD_LEN`] bytes, or as many as there are.
    pub(crate) fn head(&self) -> Result<Vec<u8>, BootError> {
        let mut head = vec![0; HEAD_LEN];
        let count = self.read_some(0, &mut head)?;
        head.truncate(count);
        Ok(head)
    }

    /// The file, to be read in order.
    pub fn reader(&self) -> Box<dyn Read + '_> {
        match &self.content {
            Content::File(file) => Box::new(file),
            Content::Unpacked(content) => Box::new(&***content),
        }
    }

    /// Reads at `offset` until `buf` is full or the file ends; returns the bytes read.
    pub fn read_some(&self, offset: u64, buf: &mut [u8]) -> Result<usize, BootError> {
        let mut done = 0;
        while let Some(rest) = buf.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let at = offset.saturating_add(done as u64);
            let read = match &self.content {
                Content::File(file) => file.read_at(rest, at),
                Content::Unpacked(content) => part(content, at, u64::MAX).read(rest),
            };
            match read {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(self.read_failed(source)),
            }
        }
        Ok(done)
    }

    /// Fills `buf` from `offset`; `what` names the part in the message about a truncated file.
    pub(crate) fn read_exact(
        &self,
        offset: u64,
        buf: &mut [u8],
        what: &str,
    ) -> Result<(), BootError> {
        let end = self.check_range(offset, buf.len() as u64, what)?;
        let count = self.read_some(offset, buf)?;
        if count < buf.len() {
            Err(self.truncated(what, end, offset.saturating_add(count as u64)))
        } else {
            Ok(())
        }
    }

    /// Reads `len` bytes from `offset` straight into guest memory at `gpa`, which must be zero: holes in the file are left
    /// out.
    pub(crate) fn read_into(
        &self,
        mem: &GuestMemory,
        gpa: u64,
        offset: u64,
        len: u64,
        what: &'static str,
    ) -> Result<(), BootError> {
        let end = self.check_range(offset, len, what)?;
        let file = match &self.content {
            Content::File(file) => file,
            Content::Unpacked(content) => {
                for (at, data) in data_in(part(content, offset, len)) {
                    let target = gpa + at;
                    mem.write_slice(data, GuestAddress(target))
                        .map_err(|source| BootError::GuestMemory(what, target, source))?;
                }
                return Ok(());
            }
        };
        let mut at = offset;
        while at < end {
            // Without data from there on, there is no such position.
            let data = match seek(file, SeekFrom::Data(at)) {
                Err(Errno::NXIO) => end,
                result => result.map_err(|e| self.read_failed(e.into()))?,
            };
            if data >= end {
                break;
            }
            let hole = seek(file, SeekFrom::Hole(data))
                .and_then(|hole| seek(file, SeekFrom::Start(data)).map(|_| hole))
                .map_err(|e| self.read_failed(e.into()))?;
            let stop = hole.min(end);
            self.read_data(file, mem, gpa + (data - offset), data..stop, what)?;
            at = stop;
        }
        Ok(())
    }

    /// Reads `range` of the file, whose position is at the start of it.
    fn read_data(
        &self,
        mut file: &File,
        mem: &GuestMemory,
        gpa: u64,
        range: Range<u64>,
        what: &'static str,
    ) -> Result<(), BootError> {
        let Range { start, end } = range;
        let mut at = start;
        while at < end {
            let target = gpa + (at - start);
            let count = usize::try_from((end - at).min(MAX_READ)).unwrap_or(usize::MAX);
            match mem.read_volatile_from(GuestAddress(target), &mut file, count) {
                Ok(0) => return Err(self.truncated(what, end, at)),
                Ok(count) => at += count as u64,
                Err(GuestMemoryError::IOError(source)) => return Err(self.read_failed(source)),
                Err(source) => {
                    return Err(BootError::GuestMemory(what, target, source));
                }
            }
        }
        Ok(())
    }

    /// Checks that `len` bytes from `offset` lie in the file; returns their end.
    pub(crate) fn check_range(&self, offset: u64, len: u64, what: &str) -> Result<u64, BootError> {
        // An end past u64::MAX is past every file too: the saturated value says so well enough.
        let end = offset.saturating_add(len);
        if end > self.len {
            Err(self.truncated(what, end, self.len))
        } else {
            Ok(end)
        }
    }

    /// The error about headers that contradict themselves.
    pub(crate) fn malformed(&self, what: impl fmt::Display) -> BootError {
        BootError::Refused(format!(
            "the kernel {} is damaged or not a kernel: {what}; copy or download it again",
            self.path.display()
        ))
    }

    /// The error about a file of a known kind that cannot be what it was given as.
    pub(crate) fn wrong_kind(&self, what: &str, hint: &str) -> BootError {
        let (role, path) = (self.role, self.path.display());
        BootError::Refused(format!("the {role} {path} is {what}; {hint}"))
    }

    /// The error about a kernel for 32-bit processors.
    pub(crate) fn is_32_bit(&self, how: &str) -> BootError {
        BootError::Refused(format!(
            "{} is a 32-bit kernel ({how}); give a 64-bit one (CONFIG_64BIT=y, \"amd64\" or \"x86_64\" in a package's name)",
            self.path.display()
        ))
    }

    fn truncated(&self, what: &str, need: u64, have: u64) -> BootError {
        let (role, path) = (self.role, self.path.display());
        BootError::Refused(format!(
            "the {role} {path} is truncated: {what} ends at byte {need}, the file has {have} bytes; copy or download it again"
        ))
    }

    fn read_failed(&self, source: io::Error) -> BootError {
        let (role, path) = (self.role, self.path.display());
        BootError::Host(format!("read the {role} {path}"), source)
    }
}

/// At most `len` bytes of `content` from `offset`.
fn part(content: &[u8], offset: u64, len: u64) -> &[u8] {
    let clamped = |at: u64| usize::try_from(at).map_or(content.len(), |at| at.min(content.len()));
    let range = clamped(offset)..clamped(offset.saturating_add(len));
    content.get(range).unwrap_or_default()
}

/// The parts of `content` that are not zero, and where they begin.
pub(crate) fn data_in(content: &[u8]) -> impl Iterator<Item = (u64, &[u8])> {
    let chunks = (0..).step_by(HOLE).zip(content.chunks(HOLE));
    chunks.filter(|(_, chunk)| chunk.iter().any(|byte| *byte != 0))
}

/// What a file that is not a regular one is, with its article.
fn irregular(file_type: FileType) -> Option<&'static str> {
    if file_type.is_file() {
        None
    } else if file_type.is_dir() {
        Some("a directory")
    } else if file_type.is_fifo() {
        Some("a pipe (FIFO)")
    } else if file_type.is_socket() {
        Some("a socket")
    } else {
        Some("a device")
    }
}
