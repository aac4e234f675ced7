//! Unpacked kernels, kept for the next boot.
//!
//! An entry is the decompressed kernel of a bzImage; its name is that file's identity. Entries are created atomically: written
//! under a temporary name, synced, stamped and renamed. The stamp is the bzImage's mtime in whole seconds. An entry that was
//! written to later has another mtime and is not used. Entries are read, never mapped, so that a change to one cannot reach a
//! running guest.
//!
//! The directory is opened once and all accesses are relative to that descriptor. The owner of a parent directory gains nothing
//! by renaming it or by replacing it with a symbolic link.

use std::fs::{File, FileTimes};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{AtFlags, Mode, OFlags, openat, renameat, unlinkat};
use rustix::rand::{GetRandomFlags, getrandom};

use super::input::FileIdentity;
use crate::host::ownership::{is_ours, open_own_dir, tidy};

/// Limits of the cache: number of files, and bytes on disk. The oldest entries are evicted first.
const MAX_FILES: usize = 8;
const MAX_BYTES: u64 = 512 << 20;
/// A file younger than this may change again without a new timestamp: the coarsest file system timestamps have a
/// granularity of 2 s.
const SETTLED: Duration = Duration::from_secs(2);
/// Prefix of files that are being written.
const TEMPORARY: &str = ".tmp";

/// The user's kernel cache: a directory whose name ends with the version of what is in it.
pub fn default_dir() -> Option<PathBuf> {
    Some(user_dir()?.join("kernels-v1"))
}

/// minivmm's directory in the user's cache: in $XDG_CACHE_HOME, or else ~/.cache (XDG Base Directory Specification). `None` if the
/// environment names no such place.
pub fn user_dir() -> Option<PathBuf> {
    base_dir("XDG_CACHE_HOME", ".cache")
}

/// The same for what is to stay: in $XDG_DATA_HOME, or else ~/.local/share.
pub fn data_dir() -> Option<PathBuf> {
    base_dir("XDG_DATA_HOME", ".local/share")
}

fn base_dir(variable: &str, below_home: &str) -> Option<PathBuf> {
    let absolute = |name| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    let base = absolute(variable).or_else(|| Some(absolute("HOME")?.join(below_home)))?;
    Some(base.join("minivmm"))
}

/// A directory of decompressed kernels that only this user can write to.
#[derive(Debug)]
pub(crate) struct KernelCache {
    dir: File,
}

impl KernelCache {
    /// Opens the directory, and creates it if necessary.
    pub(crate) fn open(dir: &Path) -> io::Result<Self> {
        let dir = open_own_dir(dir)?;
        Ok(Self { dir })
    }

    /// The entry for this file, if there is one that can be trusted.
    pub(crate) fn get(&self, id: &FileIdentity) -> Option<File> {
        // Do not follow a symbolic link, and do not block on a FIFO.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = openat(&self.dir, entry(id), flags, Mode::empty()).ok()?;
        let file = File::from(file);
        let metadata = file.metadata().ok()?;
        let untouched = (metadata.mtime(), metadata.mtime_nsec()) == (stamp(id) as i64, 0);
        (metadata.is_file() && is_ours(&metadata) && untouched).then_some(file)
    }

    /// Adds an entry for the file `id`, with the content that `write` writes.
    pub(crate) fn put(
        &self,
        id: &FileIdentity,
        write: impl FnOnce(&File) -> io::Result<()>,
    ) -> io::Result<()> {
        let changed = Duration::from_secs(u64::try_from(id.ctime.0).unwrap_or(0)) + SETTLED;
        if SystemTime::UNIX_EPOCH + changed >= SystemTime::now() {
            return Err(io::Error::other(
                "the kernel file was modified less than a few seconds ago",
            ));
        }
        let mut random = [0; 8];
        getrandom(&mut random, GetRandomFlags::empty())?;
        let temporary = format!("{TEMPORARY}{:016x}", u64::from_ne_bytes(random));
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = openat(&self.dir, &temporary, flags, Mode::RUSR | Mode::WUSR)?;
        let kept = self.keep(&file.into(), &temporary, id, write);
        if kept.is_err() {
            _ = unlinkat(&self.dir, &temporary, AtFlags::empty());
        }
        kept?;
        tidy(&self.dir, is_own_name, MAX_FILES, MAX_BYTES)
    }

    /// Renames the file `temporary` to the entry for `id`.
    fn keep(
        &self,
        file: &File,
        temporary: &str,
        id: &FileIdentity,
        write: impl FnOnce(&File) -> io::Result<()>,
    ) -> io::Result<()> {
        write(file)?;
        file.sync_all()?;
        let time = SystemTime::UNIX_EPOCH + Duration::from_secs(stamp(id));
        file.set_times(FileTimes::new().set_modified(time))?;
        Ok(renameat(&self.dir, temporary, &self.dir, entry(id))?)
    }
}

/// The name of the entry for a file.
fn entry(id: &FileIdentity) -> String {
    let FileIdentity {
        dev,
        ino,
        len,
        mtime,
        ctime,
    } = id;
    format!(
        "{dev:x}-{ino:x}-{len:x}-{}.{}-{}.{}",
        mtime.0, mtime.1, ctime.0, ctime.1
    )
}

/// Whether this is the name of an entry or of a temporary file: nothing else is removed.
fn is_own_name(name: &[u8]) -> bool {
    let is_hex = |part: &[u8]| part.iter().all(u8::is_ascii_hexdigit);
    match name.strip_prefix(TEMPORARY.as_bytes()) {
        Some(random) => random.len() == 16 && is_hex(random),
        None => {
            // A time before 1970 has a sign.
            let parts = name.split(|byte| b"-.".contains(byte));
            let mut parts = parts.filter(|part| !part.is_empty());
            let count = parts.clone().count();
            count == 7 && parts.all(is_hex)
        }
    }
}

/// The time that an entry for this file bears, in seconds since 1970.
fn stamp(id: &FileIdentity) -> u64 {
    u64::try_from(id.mtime.0).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;
    use std::os::unix::fs::symlink;

    use tempfile::TempDir;

    use super::*;

    fn id(ino: u64) -> FileIdentity {
        FileIdentity {
            dev: 0xfe01,
            ino,
            len: 0xabc,
            mtime: (-5, 6),
            ctime: (7, 8),
        }
    }

    fn names(dir: &Path) -> Vec<String> {
        let files = fs::read_dir(dir).unwrap();
        let names = files.map(|file| file.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = names.collect();
        names.sort();
        names
    }

    #[test]
    fn a_directory_swapped_for_a_link_leads_nowhere() {
        let top = TempDir::new().unwrap();
        let at = |name: &str| top.path().join(name);
        let cache = KernelCache::open(&at("cache")).unwrap();
        fs::create_dir(at("victim")).unwrap();
        for n in 0..12 {
            // Some bear an entry's name.
            let name = if n < 6 {
                format!("precious{n}")
            } else {
                entry(&id(n))
            };
            fs::write(at("victim").join(name), "x").unwrap();
        }
        let before = names(&at("victim"));
        fs::rename(at("cache"), at("moved")).unwrap();
        symlink(at("victim"), at("cache")).unwrap();
        for n in 0..10 {
            cache
                .put(&id(n), |mut file| file.write_all(b"kernel"))
                .unwrap();
        }
        assert_eq!(names(&at("victim")), before);
        assert_eq!(names(&at("moved")).len(), MAX_FILES);
        assert!(cache.get(&id(9)).is_some() && cache.get(&id(0)).is_none());
        assert!(KernelCache::open(&at("cache")).is_err());
    }

    #[test]
    fn only_the_caches_own_files_are_removed() {
        let dir = TempDir::new().unwrap();
        let cache = KernelCache::open(dir.path()).unwrap();
        let foreign = [
            "README",
            "1-2-3",
            "a-b-c-d-e-f-g-0",
            "1-2-3-4.5-6.seven",
            ".tmpabcdef",
        ];
        for name in foreign {
            fs::write(dir.path().join(name), "x").unwrap();
        }
        // Of writers that were killed, before all that is complete.
        let left: Vec<_> = (0..10).map(|n| format!("{TEMPORARY}{n:016x}")).collect();
        for name in &left {
            fs::write(dir.path().join(name), "x").unwrap();
        }
        std::thread::sleep(Duration::from_millis(20));
        for n in 0..MAX_FILES as u64 {
            cache.put(&id(n), |_| Ok(())).unwrap();
        }
        let failed = cache.put(&id(99), |_| Err(io::ErrorKind::StorageFull.into()));
        assert_eq!(failed.unwrap_err().kind(), io::ErrorKind::StorageFull);
        let mut wanted: Vec<_> = (0..MAX_FILES as u64).map(|n| entry(&id(n))).collect();
        wanted.extend(foreign.map(str::to_owned));
        wanted.sort();
        assert_eq!(names(dir.path()), wanted);
    }
}
