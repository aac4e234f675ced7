//! Disks for what the program of an image writes, in place of memory: ext4 in sparse files in the user's data directory. One that is
//! kept has a name and belongs to an image. The others have no name, and are gone with their VM, however that ends.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::running::{check_name, lock};
use crate::about;
use crate::host::limits::free_bytes;
use crate::host::ownership::open_own_dir;
use crate::image::Digest;
use crate::tools::measure::{call_command, find_program};

/// The program that makes a file system, where it is if it is not on the PATH, and how to get it.
const PROGRAM: &str = "mke2fs";
const SBIN: &str = "/usr/sbin/mke2fs";
const INSTALL: &str = "mke2fs is not installed: install the package e2fsprogs";
/// Bytes of a disk that is kept, unless its size is given.
const DEFAULT_BYTES: u64 = 10 << 30;
/// Sizes are multiples of this: the blocks of ext4.
const BLOCK: u64 = 4096;
/// What the name of a kept disk's file ends with, and the name of one that is being made.
const SUFFIX: &str = ".ext4";
const NEW: &str = ".new";
/// Where ext4 has its superblock; s_magic and s_volume_name in it (Linux, Documentation/filesystems/ext4/super.rst).
const SUPERBLOCK: u64 = 1024;
const MAGIC: (u64, [u8; 2]) = (0x38, [0x53, 0xef]);
const LABEL: (u64, usize) = (0x78, 16);

/// A disk that is kept.
#[derive(Debug)]
pub struct Kept {
    /// Its name.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// What it takes of the host's disk.
    pub used: u64,
    /// The beginning of its image's digest.
    pub image: String,
    /// When it was last written to.
    pub changed: SystemTime,
}

/// All of the user's disks.
#[derive(Debug)]
pub struct Disks(PathBuf);

impl Disks {
    /// Opens the directory below `data`, and makes it if it is not there.
    pub fn open(data: Option<&Path>) -> io::Result<Self> {
        let none = || io::Error::other("there is no place for them: set HOME or XDG_DATA_HOME");
        let dir = data.ok_or_else(none)?.join("disks");
        open_own_dir(&dir).map_err(about(dir.display()))?;
        Ok(Self(dir))
    }

    /// A new disk without a name.
    pub fn temporary(&self, bytes: u64) -> io::Result<File> {
        let file = tempfile::tempfile_in(&self.0)?;
        // What is lost with the VM needs no journal.
        self.make(&file, bytes, &["-O", "^has_journal"])?;
        Ok(file)
    }

    /// The disk with this name, which is made for `image` if it is not there. No other VM has it.
    pub fn keep(&self, name: &str, bytes: Option<u64>, image: &Digest) -> io::Result<PathBuf> {
        check_name(name)?;
        let label: String = image.hex().chars().take(LABEL.1).collect();
        let _guard = lock(&self.0)?;
        let path = self.path(name);
        if fs::symlink_metadata(&path).is_err_and(|e| e.kind() == ErrorKind::NotFound) {
            let new = self.0.join(NEW);
            let mut options = OpenOptions::new();
            // What an interrupted run has left is overwritten.
            options.read(true).write(true).create(true).truncate(true);
            let file = options.mode(0o600).open(&new)?;
            let made = self.make(&file, bytes.unwrap_or(DEFAULT_BYTES), &["-L", &label]);
            let made = made.and_then(|()| file.sync_all());
            if let Err(e) = made {
                let _ = fs::remove_file(&new);
                return Err(e);
            }
            fs::rename(new, &path)?;
            return Ok(path);
        }
        let (file, disk) = self.look(name)?;
        check_unused(name, &file)?;
        if disk.image != label {
            let why = format!(
                "it belongs to another image, {}: take another name, or remove it",
                disk.image
            );
            return Err(about(format_args!("'{name}'"))(io::Error::other(why)));
        }
        match bytes {
            Some(bytes) if whole_blocks(bytes) != disk.bytes => {
                let why = format!("it has {} bytes, and that stays", disk.bytes);
                Err(about(format_args!("'{name}'"))(io::Error::other(why)))
            }
            _ => Ok(path),
        }
    }

    /// Those that are kept, by name.
    pub fn list(&self) -> io::Result<Vec<Kept>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.0)? {
            let file = entry?.file_name();
            let name = file.to_str().and_then(|file| file.strip_suffix(SUFFIX));
            // Others are not this program's.
            found.extend(
                name.and_then(|name| self.look(name).ok())
                    .map(|(_, disk)| disk),
            );
        }
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }

    /// Removes one that no VM has.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        check_name(name)?;
        let _guard = lock(&self.0)?;
        let file = File::open(self.path(name)).map_err(about(format_args!("'{name}'")))?;
        check_unused(name, &file)?;
        fs::remove_file(self.path(name))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(format!("{name}{SUFFIX}"))
    }

    /// Opens a kept disk, and reads what it is.
    fn look(&self, name: &str) -> io::Result<(File, Kept)> {
        let path = self.path(name);
        let mut options = OpenOptions::new();
        options
            .read(true)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
        let read = || -> io::Result<_> {
            let file = options.open(&path)?;
            let (mut magic, mut label) = ([0; 2], [0; LABEL.1]);
            file.read_exact_at(&mut magic, SUPERBLOCK + MAGIC.0)?;
            file.read_exact_at(&mut label, SUPERBLOCK + LABEL.0)?;
            if magic != MAGIC.1 {
                return Err(io::Error::other("no magic number"));
            }
            Ok((file, label))
        };
        let what = format_args!("{} is no disk with ext4", path.display());
        let (file, label) = read().map_err(about(what))?;
        let metadata = file.metadata()?;
        let disk = Kept {
            name: name.to_owned(),
            bytes: metadata.len(),
            used: metadata.blocks() * 512,
            image: String::from_utf8_lossy(&label)
                .trim_end_matches('\0')
                .to_owned(),
            changed: metadata.modified()?,
        };
        Ok((file, disk))
    }

    /// Makes a file system in an empty file.
    fn make(&self, file: &File, bytes: u64, options: &[&str]) -> io::Result<()> {
        let bytes = whole_blocks(bytes);
        file.set_len(bytes)?;
        if let Some(free) = free_bytes(&self.0).filter(|free| *free < bytes) {
            log::warn!(
                "{} has {} MiB free: the VM gets I/O errors when its disk of {} MiB has taken that",
                self.0.display(),
                free >> 20,
                bytes >> 20
            );
        }
        let program = find_program(PROGRAM).unwrap_or_else(|| SBIN.into());
        if !program.is_file() {
            return Err(io::Error::new(ErrorKind::NotFound, INSTALL));
        }
        let mut command = Command::new(program);
        command.args(["-q", "-t", "ext4", "-m", "0", "-E", "lazy_journal_init=1"]);
        // The file may have no name.
        command.args(options).arg("/proc/self/fd/0");
        call_command(command.stdin(file.try_clone()?)).map_err(io::Error::other)
    }
}

fn whole_blocks(bytes: u64) -> u64 {
    bytes / BLOCK * BLOCK
}

/// A VM has its disks' files locked.
fn check_unused(name: &str, file: &File) -> io::Result<()> {
    match flock(file, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => {
            let why = io::Error::other("a VM that runs has it");
            Err(about(format_args!("'{name}'"))(why))
        }
        locked => Ok(locked?),
    }
}

#[cfg(test)]
mod tests {
    use minivmm_devices::block::{Disk, DiskMode};

    use super::*;

    const SIZE: u64 = 64 << 20;

    #[test]
    fn a_kept_disk_is_its_images_and_one_vms() {
        let dir = tempfile::tempdir().unwrap();
        let disks = Disks::open(Some(dir.path())).unwrap();
        let image = |digit: char| -> Digest {
            format!("sha256:{}", digit.to_string().repeat(64))
                .parse()
                .unwrap()
        };
        let (one, other) = (image('1'), image('2'));
        let refused = |name: &str, bytes, image, wanted: &str| {
            let error = disks.keep(name, bytes, image).unwrap_err().to_string();
            assert!(error.contains(wanted), "{wanted}: {error}");
        };
        refused("../x", None, &one, "is no name");
        // What a run leaves that is interrupted while it makes a disk is no disk, and not in the way of the next one.
        fs::write(disks.0.join(NEW), vec![1; 1 << 20]).unwrap();
        refused("a", Some(4096), &one, "mke2fs: exit status");
        let path = disks.keep("a", Some(SIZE + 1), &one).unwrap();
        assert_eq!(disks.keep("a", Some(SIZE), &one).unwrap(), path);
        assert_eq!(disks.keep("a", None, &one).unwrap(), path);
        refused("a", Some(2 * SIZE), &one, "'a': it has 67108864 bytes");
        refused("a", None, &other, "another image, 1111111111111111");
        // A VM's disk, as its device opens it.
        let disk = Disk::open(&path, DiskMode::ReadWrite).unwrap();
        assert_eq!(disk.sectors() * 512, SIZE);
        refused("a", None, &one, "'a': a VM that runs has it");
        assert!(disks.remove("a").is_err());
        fs::write(disks.path("b"), vec![0; 1 << 20]).unwrap();
        refused("b", None, &one, "b.ext4 is no disk with ext4");
        fs::create_dir(disks.path("c")).unwrap();
        refused("c", None, &one, "c.ext4 is no disk with ext4");
        let list = disks.list().unwrap();
        let [kept] = list.as_slice() else {
            panic!("{list:?}")
        };
        assert_eq!((kept.name.as_str(), kept.bytes), ("a", SIZE));
        assert!(kept.used < SIZE / 4, "{kept:?}");
        drop(disk);
        disks.remove("a").unwrap();
        assert!(!path.exists() && disks.remove("a").is_err());
    }

    #[test]
    fn a_temporary_disk_has_no_name() {
        let dir = tempfile::tempdir().unwrap();
        let disks = Disks::open(Some(dir.path())).unwrap();
        let file = disks.temporary(SIZE).unwrap();
        assert_eq!(fs::read_dir(&disks.0).unwrap().count(), 0);
        let disk = Disk::open(&crate::run::descriptor(&file), DiskMode::ReadWrite).unwrap();
        assert_eq!(disk.sectors() * 512, SIZE);
        let mut magic = [0; 2];
        file.read_exact_at(&mut magic, SUPERBLOCK + MAGIC.0)
            .unwrap();
        assert_eq!(magic, MAGIC.1);
        drop((file, disk));
        disks.temporary(u64::MAX).unwrap_err();
    }
}
