//! The store of images that are ready to run: a directory for each, with the file system and what else was in the image.
//!
//! An entry is made under another name, synced and renamed, so that it is whole or not there. Who makes it holds a lock of its
//! digest; another process that wants the same waits, and finds it. What a killed process leaves, the next one removes.
//!
//! A process that uses an image holds a shared lock of its root file, as its VM's disk does: such an image is not removed to make
//! room. The order of locks is names, digest, root file. What removes images while it holds one of them only tries to get
//! others, because two processes that want each other's would wait for ever.

use std::fs::{self, DirBuilder, File, FileTimes, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::digest::Digest;
use super::limits::{MAX_IMAGE_BYTES, bad};
use super::oci::ImageConfig;
use super::reference::same_image;
use crate::about;
use crate::host::limits::free_bytes;
use crate::host::ownership::{is_at, open_own_dir};

/// Bytes on disk of all images; what has not been used for longest goes first.
const MAX_BYTES: u64 = 32 << 30;
/// Bytes of an archive that are copied at a time, after a look at the free space.
const SPOOL_STEP: u64 = 1 << 20;
/// Version of what is in the entries: another one has another directory.
const VERSION: u32 = 1;
/// Names within an entry.
const ROOT_FILE: &str = "root.erofs";
const META_FILE: &str = "image.json";
/// What the name of an entry that is not whole begins with.
const TEMPORARY: &str = ".new-";
/// What the name of a lock ends with.
const LOCK: &str = ".lock";
/// The lock of all images' names.
const NAMES: &str = "names";

/// What is known of a stored image.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Meta {
    /// What it is called where it came from. Another image may get the name later.
    #[serde(default)]
    pub names: Vec<String>,
    /// That of its manifest.
    pub digest: Digest,
    /// How its program is started.
    pub config: ImageConfig,
}

/// A stored image.
#[derive(Debug)]
pub struct Stored {
    /// What is known of it.
    pub meta: Meta,
    /// Its root file system, EROFS.
    pub root: PathBuf,
    /// Bytes on disk.
    pub bytes: u64,
    /// When it was last used.
    pub used: SystemTime,
    /// Its root file with a shared lock, where this process uses it.
    pub(crate) lock: Option<File>,
}

/// The store.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    /// Free space where it is; tests replace it.
    pub(super) free_bytes: fn(&Path) -> Option<u64>,
}

impl Store {
    /// Opens the store in `dir`, and creates it if necessary.
    pub fn open(dir: &Path) -> io::Result<Self> {
        let dir = dir.join(format!("v{VERSION}"));
        open_own_dir(&dir)?;
        Ok(Self { dir, free_bytes })
    }

    /// The image with this digest; if it is not there, `make` writes its root file system into an empty file, which takes at least
    /// `bytes`, as far as is known before.
    pub fn get_or_make(
        &self,
        digest: &Digest,
        bytes: u64,
        make: impl FnOnce(File) -> io::Result<(ImageConfig, File)>,
    ) -> io::Result<Stored> {
        let name = digest.hex();
        if let Some(stored) = self.find(name)? {
            return Ok(stored);
        }
        let _lock = self.lock(name)?;
        if let Some(stored) = self.find(name)? {
            return Ok(stored);
        }
        let temporary = self.dir.join(format!("{TEMPORARY}{name}"));
        remove(&temporary)?;
        self.remove_leftovers(name)?;
        self.make_room(bytes)?;
        DirBuilder::new().mode(0o700).create(&temporary)?;
        let made = self.make(&temporary, digest, make);
        if made.is_err() {
            _ = remove(&temporary);
        }
        made?;
        self.keep_limit(name)?;
        self.find(name)?
            .ok_or_else(|| io::Error::other("the image was removed while it was made"))
    }

    fn make(
        &self,
        temporary: &Path,
        digest: &Digest,
        make: impl FnOnce(File) -> io::Result<(ImageConfig, File)>,
    ) -> io::Result<()> {
        let create = |name| {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create_new(true).mode(0o600);
            options.open(temporary.join(name))
        };
        let (config, root) = make(create(ROOT_FILE)?)?;
        root.sync_all()?;
        let meta = Meta {
            names: Vec::new(),
            digest: digest.clone(),
            config,
        };
        write_meta(&temporary.join(META_FILE), &meta)?;
        File::open(temporary)?.sync_all()?;
        fs::rename(temporary, self.dir.join(digest.hex()))?;
        File::open(&self.dir)?.sync_all()
    }

    /// Copies an archive, which is read in another order than it has, to a file without a name.
    pub(super) fn spool(&self, reader: &mut dyn Read) -> io::Result<File> {
        let mut file = tempfile::tempfile_in(&self.dir)?;
        let mut copied = 0;
        loop {
            self.make_room(SPOOL_STEP)
                .map_err(about("copying the archive"))?;
            let count = io::copy(&mut (&mut *reader).take(SPOOL_STEP), &mut file)?;
            copied += count;
            if copied > MAX_IMAGE_BYTES {
                return Err(bad("the archive is too large"));
            }
            if count < SPOOL_STEP {
                return Ok(file);
            }
        }
    }

    /// Sees to it that so many bytes are free. Where they are not, and images that no process uses have as many, removes such
    /// images: those without a name first, and what has not been used for longest.
    fn make_room(&self, bytes: u64) -> io::Result<()> {
        let free = || (self.free_bytes)(&self.dir).filter(|free| *free < bytes);
        let Some(mut lacking) = free().map(|free| bytes - free) else {
            return Ok(());
        };
        let mut images = self.list()?;
        images.retain(is_unused);
        images.sort_by_key(|image| (!image.meta.names.is_empty(), image.used));
        for image in &images {
            lacking = lacking.saturating_sub(image.bytes);
        }
        // An image that says it is huge removes nothing.
        if lacking == 0 {
            for image in &images {
                self.remove_unused(image)?;
                if free().is_none() {
                    return Ok(());
                }
            }
        }
        let Some(free) = free() else { return Ok(()) };
        let (dir, free, bytes) = (self.dir.display(), free >> 20, bytes.div_ceil(1 << 20));
        let why = format!("{dir} has {free} MiB free, and the image needs {bytes} MiB or more");
        Err(io::Error::new(io::ErrorKind::StorageFull, why))
    }

    /// Gives an image a name, which another one loses if it had it.
    pub fn name(&self, stored: Stored, name: &str) -> io::Result<Stored> {
        self.move_name(stored, name, false)
    }

    /// The same for one that takes the place of the other: that is removed, if it has no further name and no process uses it.
    pub(super) fn replace(&self, stored: Stored, name: &str) -> io::Result<Stored> {
        self.move_name(stored, name, true)
    }

    fn move_name(&self, stored: Stored, name: &str, removes_other: bool) -> io::Result<Stored> {
        let has_it = |meta: &Meta| meta.names.iter().any(|n| n == name);
        if has_it(&stored.meta) {
            return Ok(stored);
        }
        let _lock = self.lock(NAMES)?;
        for mut other in self.list()? {
            let is_it = other.meta.digest == stored.meta.digest;
            if is_it == has_it(&other.meta) {
                continue;
            }
            other.meta.names.retain(|n| n != name);
            if is_it {
                other.meta.names.push(name.to_owned());
            }
            let path = other.root.with_file_name(META_FILE);
            let new = path.with_extension("new");
            let used = FileTimes::new().set_modified(other.used);
            let written = write_meta(&new, &other.meta)
                .and_then(|file| file.set_times(used))
                .and_then(|()| fs::rename(new, path));
            match written {
                // It was removed meanwhile.
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                written => written?,
            }
            // With the lock of the names, so that it gets no other name meanwhile.
            if removes_other && other.meta.names.is_empty() {
                self.remove_unused(&other)?;
            }
        }
        self.used(stored)
    }

    /// The same image, as it is now; it counts as used.
    pub(super) fn used(&self, stored: Stored) -> io::Result<Stored> {
        self.find(stored.meta.digest.hex())?
            .ok_or_else(|| io::Error::other("the image was removed meanwhile"))
    }

    /// All images, the one that was used last first.
    pub fn list(&self) -> io::Result<Vec<Stored>> {
        let mut all = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let name = entry?.file_name();
            if let Some(name) = name.to_str().filter(|name| is_entry(name)) {
                all.extend(self.find_unused(name)?);
            }
        }
        all.sort_by_key(|stored| std::cmp::Reverse(stored.used));
        Ok(all)
    }

    /// The images with this name, by docker's rules for what may be left out, or a digest that begins so, with or without "sha256:".
    pub fn called(&self, name: &str) -> io::Result<Vec<Stored>> {
        let digest = name.strip_prefix("sha256:").unwrap_or(name);
        let is_digest = digest.len() >= 4 && digest.bytes().all(|b| b.is_ascii_hexdigit());
        let is_it = |other: &String| same_image(other, name);
        let mut found = self.list()?;
        found.retain(|stored| {
            stored.meta.names.iter().any(is_it)
                || (is_digest && stored.meta.digest.hex().starts_with(digest))
        });
        Ok(found)
    }

    /// Removes an image. VMs that run from it keep its file.
    pub fn remove(&self, stored: &Stored) -> io::Result<()> {
        let name = stored.meta.digest.hex();
        let _lock = self.lock(name)?;
        self.remove_locked(name)
    }

    /// Removes an image to make room, unless a process makes, removes or uses it. Waits for none of them.
    fn remove_unused(&self, stored: &Stored) -> io::Result<()> {
        let name = stored.meta.digest.hex();
        let Some(_lock) = self.try_lock(name)? else {
            return Ok(());
        };
        // Held until it is gone: a process that finds it now waits, and looks again.
        match lock_unused(stored) {
            Some(_unused) => self.remove_locked(name),
            None => Ok(()),
        }
    }

    fn remove_locked(&self, name: &str) -> io::Result<()> {
        // Under a name that no reader looks for: an entry is never half there.
        let temporary = self.dir.join(format!("{TEMPORARY}{name}"));
        remove(&temporary)?;
        match fs::rename(self.dir.join(name), &temporary) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        remove(&temporary)
    }

    /// The entry, which counts as used from now on, and stays in the store as long as what is returned.
    fn find(&self, name: &str) -> io::Result<Option<Stored>> {
        let Some(mut stored) = self.find_unused(name)? else {
            return Ok(None);
        };
        let lock = match File::open(&stored.root) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened?,
        };
        flock(&lock, FlockOperation::LockShared)?;
        // Another process may have removed it before.
        if !is_at(&lock, &stored.root) {
            return Ok(None);
        }
        stored.lock = Some(lock);
        let now = FileTimes::new().set_modified(SystemTime::now());
        let meta = stored.root.with_file_name(META_FILE);
        OpenOptions::new().write(true).open(meta)?.set_times(now)?;
        Ok(Some(stored))
    }

    fn find_unused(&self, name: &str) -> io::Result<Option<Stored>> {
        let entry = self.dir.join(name);
        let meta = match fs::read(entry.join(META_FILE)) {
            Ok(meta) => meta,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e),
        };
        let root = entry.join(ROOT_FILE);
        let (Ok(stat), Ok(used)) = (fs::metadata(&root), fs::metadata(entry.join(META_FILE)))
        else {
            return Ok(None);
        };
        Ok(Some(Stored {
            meta: serde_json::from_slice(&meta)?,
            root,
            bytes: stat.blocks() * 512,
            used: used.modified()?,
            lock: None,
        }))
    }

    /// Waits until no other process makes or removes this entry.
    fn lock(&self, name: &str) -> io::Result<File> {
        loop {
            let (path, file) = self.lock_file(name)?;
            flock(&file, FlockOperation::LockExclusive)?;
            // Another process may have removed the file while this one waited.
            if is_at(&file, &path) {
                return Ok(file);
            }
        }
    }

    /// The same lock, unless another process has it.
    fn try_lock(&self, name: &str) -> io::Result<Option<File>> {
        let (path, file) = self.lock_file(name)?;
        let locked = flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok();
        Ok((locked && is_at(&file, &path)).then_some(file))
    }

    fn lock_file(&self, name: &str) -> io::Result<(PathBuf, File)> {
        let path = self.dir.join(format!("{name}{LOCK}"));
        let mut options = OpenOptions::new();
        let options = options.write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(&path)?;
        Ok((path, file))
    }

    /// Removes what killed processes have left; `keep` is this process's.
    fn remove_leftovers(&self, keep: &str) -> io::Result<()> {
        for entry in fs::read_dir(&self.dir)? {
            let file_name = entry?.file_name();
            let Some(name) = file_name.to_str().and_then(|n| n.strip_suffix(LOCK)) else {
                continue;
            };
            if name == keep || !is_entry(name) {
                continue;
            }
            if let Some(_lock) = self.try_lock(name)? {
                remove(&self.dir.join(format!("{TEMPORARY}{name}")))?;
                _ = fs::remove_file(self.dir.join(&file_name));
            }
        }
        Ok(())
    }

    /// Removes the oldest images beyond the limit that no process uses; `keep` is in use.
    fn keep_limit(&self, keep: &str) -> io::Result<()> {
        let mut bytes = 0u64;
        for stored in self.list()? {
            bytes = bytes.saturating_add(stored.bytes);
            if bytes > MAX_BYTES && stored.meta.digest.hex() != keep {
                self.remove_unused(&stored)?;
            }
        }
        Ok(())
    }
}

/// The lock that no other process has while one uses the image.
fn lock_unused(stored: &Stored) -> Option<File> {
    let root = File::open(&stored.root).ok()?;
    let locked = flock(&root, FlockOperation::NonBlockingLockExclusive);
    locked.is_ok().then_some(root)
}

fn is_unused(stored: &Stored) -> bool {
    lock_unused(stored).is_some()
}

/// Whether this is the name of an entry: nothing else in the directory is looked at.
fn is_entry(name: &str) -> bool {
    name.len() == 64 && name.bytes().all(|b| b.is_ascii_hexdigit())
}

fn write_meta(path: &Path, meta: &Meta) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let mut file = options.open(path)?;
    file.write_all(&serde_json::to_vec(meta)?)?;
    file.sync_all()?;
    Ok(file)
}

/// Removes an entry, if it is there.
fn remove(entry: &Path) -> io::Result<()> {
    match fs::remove_dir_all(entry) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}
