//! The cpio format newc, in which Linux takes an initramfs (Documentation/driver-api/early-userspace/buffer-format.rst).

use std::collections::HashMap;
use std::fs::{self, File, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use rustix::fs::{major, minor};

use crate::about;
use crate::image::Listing;

/// The name of the member that ends an archive.
pub(super) const TRAILER: &[u8] = b"TRAILER!!!";

/// Bytes of a header before the name.
pub(super) const HEADER_LEN: usize = 110;

/// What stands before a member's content.
#[derive(Debug, Default)]
pub(super) struct Header {
    pub(super) name: Vec<u8>,
    inode: u32,
    mode: u32,
    uid: u32,
    gid: u32,
    links: u32,
    mtime: u32,
    /// Bytes of the content.
    pub(super) size: u32,
    device: (u32, u32),
}

impl Header {
    /// A member that is nothing but a name and the size of its content.
    pub(super) fn new(name: &[u8], size: u32) -> Self {
        Self {
            name: name.into(),
            size,
            ..Self::default()
        }
    }

    /// Writes a header; the content has to follow, and [`padding`] after it.
    pub(super) fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        let name_len = self.name.len() + 1;
        write!(out, "070701")?;
        for field in [
            self.inode,
            self.mode,
            self.uid,
            self.gid,
            self.links,
            self.mtime,
            self.size,
            0,
            0,
            self.device.0,
            self.device.1,
            name_len as u32,
            0,
        ] {
            write!(out, "{field:08X}")?;
        }
        out.write_all(&self.name)?;
        out.write_all(&[0])?;
        pad(HEADER_LEN + name_len, out)
    }
}

/// Writes a member with this content. `mode` has the type's bits; a device has numbers.
pub(crate) fn write_member(
    out: &mut dyn Write,
    name: &str,
    mode: u32,
    device: (u32, u32),
    content: &[u8],
) -> io::Result<()> {
    let size = u32::try_from(content.len()).map_err(io::Error::other)?;
    let header = Header {
        mode,
        device,
        links: 1,
        ..Header::new(name.as_bytes(), size)
    };
    header.write(out)?;
    out.write_all(content)?;
    pad(content.len(), out)
}

/// Ends an archive.
pub(crate) fn write_end(out: &mut dyn Write) -> io::Result<()> {
    Header::new(TRAILER, 0).write(out)
}

/// Whether a member begins here; the second format has checksums, which nobody looks at.
pub(super) fn is_member(bytes: &[u8]) -> bool {
    bytes.starts_with(b"070701") || bytes.starts_with(b"070702")
}

/// Zeroes that follow `size` bytes, up to a multiple of four.
pub(super) fn padding(size: usize) -> usize {
    size.wrapping_neg() & 3
}

fn pad(size: usize, out: &mut dyn Write) -> io::Result<()> {
    (0..padding(size)).try_for_each(|_| out.write_all(&[0]))
}

/// Packs everything below `root`: owners, modes, times, links, devices. A file with several names is stored once. Other file
/// systems mounted there stay out. Returns the bytes of the files' content.
pub(super) fn pack(root: &Path, out: &mut dyn Write) -> io::Result<u64> {
    let mut archive = Archive {
        root,
        inodes: HashMap::new(),
        content: 0,
        out,
    };
    for (path, metadata) in Listing::read(root)?.below_root() {
        archive
            .entry(path, metadata)
            .map_err(about(path.display()))?;
    }
    write_end(archive.out)?;
    Ok(archive.content)
}

struct Archive<'a> {
    root: &'a Path,
    /// The archive's numbers for the files that have more than one name.
    inodes: HashMap<u64, u32>,
    content: u64,
    out: &'a mut dyn Write,
}

impl Archive<'_> {
    fn entry(&mut self, path: &Path, meta: &Metadata) -> io::Result<()> {
        let kind = meta.file_type();
        let name = path.strip_prefix(self.root).unwrap_or(path);
        let mut header = Header {
            mode: meta.mode(),
            uid: meta.uid(),
            gid: meta.gid(),
            links: 1,
            mtime: u32::try_from(meta.mtime()).unwrap_or_default(),
            ..Header::new(name.as_os_str().as_bytes(), 0)
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
            let target = fs::read_link(path)?;
            let target = target.as_os_str().as_bytes();
            return self.member(header, target.len() as u64, target);
        }
        if !kind.is_file() || !first {
            return self.member(header, 0, io::empty());
        }
        let file = File::open(path)?;
        self.content += meta.len();
        self.member(header, meta.len(), file)
    }

    /// A header and `size` bytes of content.
    fn member(&mut self, header: Header, size: u64, content: impl Read) -> io::Result<()> {
        let size_32 = u32::try_from(size).map_err(|_| {
            io::Error::other(format!(
                "{size} bytes; an initramfs holds files up to 4 GiB"
            ))
        })?;
        let header = Header {
            size: size_32,
            ..header
        };
        header.write(self.out)?;
        if io::copy(&mut content.take(size), self.out)? != size {
            return Err(io::Error::other("it changed while it was read"));
        }
        pad(size as usize, self.out)
    }
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
    fn a_packed_tree_unpacks_unchanged() {
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
        assert_eq!(
            first.mtime(),
            fs::symlink_metadata(file("a/data")).unwrap().mtime()
        );
    }

    #[test]
    fn device_nodes_keep_their_numbers() {
        let mut archive = Vec::new();
        let null = Path::new("/dev/null");
        let meta = fs::symlink_metadata(null).unwrap();
        Archive {
            root: Path::new("/dev"),
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
    fn unreadable_files_are_named() {
        let error = pack(Path::new("/nowhere"), &mut Vec::new()).unwrap_err();
        assert!(error.to_string().starts_with("/nowhere: "), "{error}");
    }
}
