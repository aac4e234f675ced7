//! Unpacked kernels, kept for the next boot.
//!
//! An entry is what was in a bzImage, and its name is that file's identity. It comes into being whole: it is written under
//! another name, brought to the disk, stamped and renamed. The stamp is the bzImage's time of modification in whole seconds;
//! an entry that anybody has written to since has another time and is not used. Entries are read, never mapped: nothing that
//! happens to one reaches a running guest.

use std::fs::{self, DirBuilder, File, FileTimes, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::process::geteuid;
use tempfile::NamedTempFile;

use super::input::FileIdentity;

/// Most files, and most bytes that they may take on the disk. The oldest go first.
const MAX_FILES: usize = 8;
const MAX_BYTES: u64 = 512 << 20;
/// A file that changed later than so long ago may change again without its times showing it: file systems count them in
/// steps, the coarsest of 2 s.
const SETTLED: Duration = Duration::from_secs(2);

/// The user's kernel cache: $XDG_CACHE_HOME, or else ~/.cache (XDG Base Directory Specification), and there a directory whose
/// name ends with the version of what is in it. `None` if the environment names no such place.
pub fn default_dir() -> Option<PathBuf> {
    let absolute = |name| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    let base = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")))?;
    Some(base.join("minivmm/kernels-v1"))
}

/// A directory of unpacked kernels that is ours alone.
#[derive(Debug)]
pub(crate) struct KernelCache {
    dir: PathBuf,
}

impl KernelCache {
    /// Takes the directory, and makes it first if need be.
    pub(crate) fn open(dir: &Path) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        let metadata = fs::symlink_metadata(dir)?;
        if !metadata.is_dir() {
            Err(io::Error::other("it is a symbolic link"))
        } else if !is_ours(&metadata) {
            Err(io::Error::other(
                "it belongs to another user, or others may write to it",
            ))
        } else {
            Ok(Self {
                dir: dir.to_owned(),
            })
        }
    }

    /// The entry for this file, if there is one that can be trusted.
    pub(crate) fn get(&self, id: &FileIdentity) -> Option<File> {
        // Neither through a link nor held up by a pipe of that name.
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(self.entry(id))
            .ok()?;
        let metadata = file.metadata().ok()?;
        let untouched = (metadata.mtime(), metadata.mtime_nsec()) == (stamp(id) as i64, 0);
        (metadata.is_file() && is_ours(&metadata) && untouched).then_some(file)
    }

    /// Keeps what `write` writes for the file `id`.
    pub(crate) fn put(
        &self,
        id: &FileIdentity,
        write: impl FnOnce(&File) -> io::Result<()>,
    ) -> io::Result<()> {
        let changed = Duration::from_secs(u64::try_from(id.ctime.0).unwrap_or(0)) + SETTLED;
        if SystemTime::UNIX_EPOCH + changed >= SystemTime::now() {
            return Err(io::Error::other("the kernel has changed only just now"));
        }
        let temporary = NamedTempFile::new_in(&self.dir)?;
        let file = temporary.as_file();
        write(file)?;
        file.sync_all()?;
        let time = SystemTime::UNIX_EPOCH + Duration::from_secs(stamp(id));
        file.set_times(FileTimes::new().set_modified(time))?;
        temporary.persist(self.entry(id))?;
        self.tidy()
    }

    fn entry(&self, id: &FileIdentity) -> PathBuf {
        let FileIdentity {
            dev,
            ino,
            len,
            mtime,
            ctime,
        } = id;
        self.dir.join(format!(
            "{dev:x}-{ino:x}-{len:x}-{}.{}-{}.{}",
            mtime.0, mtime.1, ctime.0, ctime.1
        ))
    }

    /// Removes what is too much, the oldest first, and with it what a killed writer has left.
    fn tidy(&self) -> io::Result<()> {
        let mut files = Vec::new();
        for file in fs::read_dir(&self.dir)? {
            let file = file?;
            // What has gone in the meantime was another's to remove.
            if let Ok(metadata) = file.metadata() {
                files.push((
                    metadata.ctime(),
                    metadata.ctime_nsec(),
                    metadata.blocks() * 512,
                    file.path(),
                ));
            }
        }
        files.sort();
        let mut bytes = 0u64;
        for (count, (.., size, path)) in files.iter().rev().enumerate() {
            bytes = bytes.saturating_add(*size);
            if count >= MAX_FILES || (count > 0 && bytes > MAX_BYTES) {
                fs::remove_file(path)?;
            }
        }
        Ok(())
    }
}

/// Whether nobody else has a hand in this file or directory.
fn is_ours(metadata: &Metadata) -> bool {
    metadata.uid() == geteuid().as_raw() && metadata.mode() & 0o022 == 0
}

/// The time that an entry for this file bears, in seconds since 1970.
fn stamp(id: &FileIdentity) -> u64 {
    u64::try_from(id.mtime.0).unwrap_or(0)
}
