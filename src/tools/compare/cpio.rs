//! A directory tree as an initramfs, in the cpio format newc (Documentation/driver-api/early-userspace/buffer-format.rst).

use std::collections::HashMap;
use std::fs::{self, File, Metadata};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{major, minor};

/// Why a tree cannot be packed.
#[derive(Debug, thiserror::Error)]
pub(super) enum PackError {
    /// The host refused to read it.
    #[error("cannot read {}", path.display())]
    Read {
        /// What of it.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The format has 32 bits for a size.
    #[error("{} has {bytes} bytes: an initramfs holds files up to 4 GiB", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// The file changed meanwhile.
    #[error("{} changed while it was read", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// The archive cannot be written.
    #[error("cannot write the initramfs")]
    Write(#[source] io::Error),
}

/// Packs everything below `root`: owners, modes, times, links, devices. A file with several names is stored once. What another
/// file system has mounted there stays out. Returns the bytes of the files' content.
pub(super) fn pack(root: &Path, out: &mut dyn Write) -> Result<u64, PackError> {
    let mut archive = Archive {
        root,
        device: stat(root)?.dev(),
        inodes: HashMap::new(),
        content: 0,
        out,
    };
    archive.directory(root)?;
    archive
        .header(b"TRAILER!!!", &Header::default())
        .map_err(PackError::Write)?;
    Ok(archive.content)
}

struct Archive<'a> {
    root: &'a Path,
    device: u64,
    /// The archive's numbers for the files that have more than one name.
    inodes: HashMap<u64, u32>,
    content: u64,
    out: &'a mut dyn Write,
}

/// What an entry says besides its name.
#[derive(Default)]
struct Header {
    inode: u32,
    mode: u32,
    uid: u32,
    gid: u32,
    links: u32,
    mtime: u32,
    size: u32,
    device: (u32, u32),
}

fn stat(path: &Path) -> Result<Metadata, PackError> {
    fs::symlink_metadata(path).map_err(read(path))
}

fn read(path: &Path) -> impl FnOnce(io::Error) -> PackError {
    let path = path.to_owned();
    move |source| PackError::Read { path, source }
}

impl Archive<'_> {
    /// All that is in a directory, in the order of names, so that the same tree gives the same bytes.
    fn directory(&mut self, path: &Path) -> Result<(), PackError> {
        let entries = fs::read_dir(path).map_err(read(path))?;
        let mut paths: Vec<PathBuf> = entries
            .map(|entry| Ok(entry?.path()))
            .collect::<io::Result<_>>()
            .map_err(read(path))?;
        paths.sort();
        for path in paths {
            let meta = stat(&path)?;
            self.entry(&path, &meta)?;
            if meta.is_dir() && meta.dev() == self.device {
                self.directory(&path)?;
            }
        }
        Ok(())
    }

    fn entry(&mut self, path: &Path, meta: &Metadata) -> Result<(), PackError> {
        let kind = meta.file_type();
        let mut header = Header {
            mode: meta.mode(),
            uid: meta.uid(),
            gid: meta.gid(),
            links: 1,
            mtime: u32::try_from(meta.mtime()).unwrap_or_default(),
            ..Header::default()
        };
        if kind.is_block_device() || kind.is_char_device() {
            header.device = (major(meta.rdev()), minor(meta.rdev()));
        }
        // Numbers from 1 on: an inode's own number may have more than 32 bits.
        let next = self.inodes.len() as u32 + 1;
        let mut first = true;
        if meta.nlink() > 1 && !meta.is_dir() {
            // Only those of several names need one.
            header.links = meta.nlink() as u32;
            header.inode = *self.inodes.entry(meta.ino()).or_insert_with(|| next);
            first = header.inode == next;
        }
        if kind.is_symlink() {
            let target = fs::read_link(path).map_err(read(path))?;
            let target = target.as_os_str().as_bytes();
            header.size = target.len() as u32;
            return self.write(path, &header, |out| out.write_all(target));
        }
        if !kind.is_file() || !first {
            return self.write(path, &header, |_| Ok(()));
        }
        let bytes = meta.len();
        header.size = u32::try_from(bytes).map_err(|_| PackError::TooLarge {
            path: path.to_owned(),
            bytes,
        })?;
        self.content += bytes;
        let mut file = File::open(path).map_err(read(path))?;
        let mut copied = 0;
        self.write(path, &header, |out| {
            copied = io::copy(&mut io::Read::take(&mut file, bytes), out)?;
            Ok(())
        })?;
        if copied == bytes {
            Ok(())
        } else {
            Err(PackError::Changed {
                path: path.to_owned(),
            })
        }
    }

    /// An entry and its content.
    fn write(
        &mut self,
        path: &Path,
        header: &Header,
        content: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> Result<(), PackError> {
        let name = path.strip_prefix(self.root).unwrap_or(path);
        self.header(name.as_os_str().as_bytes(), header)
            .and_then(|()| content(self.out))
            .and_then(|()| pad(self.out, header.size as usize))
            .map_err(PackError::Write)
    }

    fn header(&mut self, name: &[u8], header: &Header) -> io::Result<()> {
        write!(self.out, "070701")?;
        for field in [
            header.inode,
            header.mode,
            header.uid,
            header.gid,
            header.links,
            header.mtime,
            header.size,
            0,
            0,
            header.device.0,
            header.device.1,
            name.len() as u32 + 1,
            0,
        ] {
            write!(self.out, "{field:08X}")?;
        }
        self.out.write_all(name)?;
        self.out.write_all(b"\0")?;
        pad(self.out, 110 + name.len() + 1)
    }
}

/// Zeroes up to a multiple of four.
fn pad(out: &mut dyn Write, size: usize) -> io::Result<()> {
    out.write_all(&[0; 3][..size.wrapping_neg() & 3])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::process::Command;

    /// What GNU cpio or busybox makes of an archive.
    fn unpacked(archive: &[u8]) -> Option<tempfile::TempDir> {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a.cpio"), archive).unwrap();
        let program = ["cpio", "busybox"]
            .into_iter()
            .find_map(crate::tools::measure::find_program)?;
        let mut command = Command::new(&program);
        if program.ends_with("busybox") {
            command.arg("cpio");
        }
        let status = command
            .args(["-idm", "-F", "a.cpio"])
            .current_dir(dir.path())
            .stderr(std::process::Stdio::null())
            .status();
        assert!(status.unwrap().success());
        Some(dir)
    }

    #[test]
    fn a_tree_comes_out_as_it_went_in() {
        let root = tempfile::tempdir().unwrap();
        let file = |name: &str| root.path().join(name);
        fs::create_dir_all(file("a/b")).unwrap();
        fs::write(file("a/data"), vec![7; 70001]).unwrap();
        fs::set_permissions(file("a/data"), fs::Permissions::from_mode(0o4711)).unwrap();
        fs::hard_link(file("a/data"), file("z-second-name")).unwrap();
        fs::write(file("a/other"), "x").unwrap();
        fs::hard_link(file("a/other"), file("a/b/other")).unwrap();
        symlink("../a/data", file("a/link")).unwrap();
        fs::write(file("empty"), "").unwrap();
        let mut archive = Vec::new();
        assert_eq!(pack(root.path(), &mut archive).unwrap(), 70002);
        assert!(archive.len() < 75000, "the second name costs no content");
        let mut again = Vec::new();
        pack(root.path(), &mut again).unwrap();
        assert!(archive == again);

        let Some(dir) = unpacked(&archive) else {
            return crate::skip::skip("neither cpio nor busybox is installed");
        };
        let made = |name: &str| fs::symlink_metadata(dir.path().join(name)).unwrap();
        let (first, second) = (made("a/data"), made("z-second-name"));
        assert_eq!((first.len(), first.mode() & 0o7777), (70001, 0o4711));
        assert_eq!((first.ino(), first.nlink()), (second.ino(), 2));
        assert_eq!(made("a/other").ino(), made("a/b/other").ino());
        assert_ne!(made("a/other").ino(), first.ino());
        assert_eq!(
            fs::read_link(dir.path().join("a/link")).unwrap(),
            Path::new("../a/data")
        );
        assert_eq!(made("empty").len(), 0);
        assert_eq!(first.mtime(), stat(&file("a/data")).unwrap().mtime());
    }

    #[test]
    fn special_files_have_their_numbers() {
        let mut archive = Vec::new();
        let null = Path::new("/dev/null");
        let meta = stat(null).unwrap();
        Archive {
            root: Path::new("/dev"),
            device: 0,
            inodes: HashMap::new(),
            content: 0,
            out: &mut archive,
        }
        .entry(null, &meta)
        .unwrap();
        let text = String::from_utf8(archive).unwrap();
        assert!(text.starts_with("070701"));
        // rdevmajor and rdevminor, namesize, check and the name.
        assert!(
            text.contains("00000001000000030000000500000000null\0"),
            "{text}"
        );
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        let error = pack(Path::new("/nowhere"), &mut Vec::new()).unwrap_err();
        assert_eq!(error.to_string(), "cannot read /nowhere");
    }
}
