//! The store of images that are ready to run: a directory for each, with the file system and what else was in the image.
//!
//! An entry is made under another name, synced and renamed, so that it is whole or not there. Who makes it holds a lock of its
//! digest; another process that wants the same waits, and finds it. What a killed process leaves, the next one removes.

use std::fs::{self, DirBuilder, File, FileTimes, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::digest::Digest;
use super::oci::ImageConfig;
use super::reference::same_image;
use crate::host::limits::free_bytes;
use crate::host::ownership::open_own_dir;

/// Bytes on disk of all images; what has not been used for longest goes first.
const MAX_BYTES: u64 = 32 << 30;
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
}

/// The store.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
}

impl Store {
    /// Opens the store in `dir`, and creates it if necessary.
    pub fn open(dir: &Path) -> io::Result<Self> {
        let dir = dir.join(format!("v{VERSION}"));
        open_own_dir(&dir)?;
        Ok(Self { dir })
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
        if let Some(free) = free_bytes(&self.dir).filter(|free| *free < bytes) {
            let (dir, free, bytes) = (self.dir.display(), free >> 20, bytes.div_ceil(1 << 20));
            let why = format!("{dir} has {free} MiB free, and the image needs {bytes} MiB or more");
            return Err(io::Error::new(io::ErrorKind::StorageFull, why));
        }
        let temporary = self.dir.join(format!("{TEMPORARY}{name}"));
        remove(&temporary)?;
        DirBuilder::new().mode(0o700).create(&temporary)?;
        let made = self.make(&temporary, digest, make);
        if made.is_err() {
            _ = remove(&temporary);
        }
        made?;
        self.tidy(name)?;
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

    /// Gives an image a name, which another one loses if it had it.
    pub fn name(&self, stored: Stored, name: &str) -> io::Result<Stored> {
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
        // Under a name that no reader looks for: an entry is never half there.
        let temporary = self.dir.join(format!("{TEMPORARY}{name}"));
        remove(&temporary)?;
        match fs::rename(self.dir.join(name), &temporary) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        remove(&temporary)
    }

    /// The entry, which counts as used from now on.
    fn find(&self, name: &str) -> io::Result<Option<Stored>> {
        let found = self.find_unused(name)?;
        if let Some(stored) = &found {
            let now = FileTimes::new().set_modified(SystemTime::now());
            let meta = stored.root.with_file_name(META_FILE);
            OpenOptions::new().write(true).open(meta)?.set_times(now)?;
        }
        Ok(found)
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
        }))
    }

    /// Waits until no other process makes or removes this entry.
    fn lock(&self, name: &str) -> io::Result<File> {
        let path = self.dir.join(format!("{name}{LOCK}"));
        loop {
            let mut options = OpenOptions::new();
            let file = options.write(true).create(true).truncate(false).mode(0o600);
            let file = file.open(&path)?;
            flock(&file, FlockOperation::LockExclusive)?;
            // Another process may have removed the file while this one waited.
            let same = fs::metadata(&path).is_ok_and(|there| {
                file.metadata()
                    .is_ok_and(|ours| (ours.dev(), ours.ino()) == (there.dev(), there.ino()))
            });
            if same {
                return Ok(file);
            }
        }
    }

    /// Removes what killed processes have left, and the oldest images beyond the limit; `keep` is in use.
    fn tidy(&self, keep: &str) -> io::Result<()> {
        for entry in fs::read_dir(&self.dir)? {
            let file_name = entry?.file_name();
            let Some(name) = file_name.to_str().and_then(|n| n.strip_suffix(LOCK)) else {
                continue;
            };
            if name == keep || !is_entry(name) {
                continue;
            }
            let path = self.dir.join(&file_name);
            let Ok(lock) = OpenOptions::new().write(true).open(&path) else {
                continue;
            };
            if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
                remove(&self.dir.join(format!("{TEMPORARY}{name}")))?;
                _ = fs::remove_file(&path);
            }
        }
        let mut bytes = 0u64;
        for stored in self.list()? {
            bytes = bytes.saturating_add(stored.bytes);
            if bytes > MAX_BYTES && stored.meta.digest.hex() != keep {
                self.remove(&stored)?;
            }
        }
        Ok(())
    }
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
