//! What a file is that is no raw image of a disk, by its signature. That is only ever asked to refuse it: a guest may write such
//! a signature on its raw disk, and must not choose by it how the host reads that disk next time.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Bytes at the beginning and at the end of a file in which signatures are.
const EDGE: usize = 512;

/// A format, and how to make a raw image of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Format {
    /// What people call it, with its article.
    pub name: &'static str,
    tool: Tool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tool {
    /// qemu-img, which calls the format this.
    QemuImg(&'static str),
    /// A program that takes the file's name and writes to its standard output.
    Filter(&'static str),
    /// A program that takes the names of both files.
    Converter(&'static str),
}

use Tool::{Converter, Filter, QemuImg};

impl Format {
    /// The command that makes a raw image of the file.
    pub fn command(self, path: &Path) -> String {
        let path = path.display();
        match self.tool {
            QemuImg(format) => format!("qemu-img convert -f {format} -O raw {path} {path}.raw"),
            Filter(program) => format!("{program} {path} >{path}.raw"),
            Converter(program) => format!("{program} {path} {path}.raw"),
        }
    }
}

/// Images that qemu-img converts: name, what it calls the format, place of the signature (behind the beginning, or before the end where
/// it is negative), signature. Not here is what a guest reads from a raw disk: partition tables, file systems, LUKS, ISO 9660, tar.
const IMAGES: [(&str, &str, isize, &[u8]); 16] = [
    // Version 1 of what became qcow2.
    ("a qcow image", "qcow", 0, b"QFI\xfb\0\0\0\x01"),
    ("a qcow2 image", "qcow2", 0, b"QFI\xfb"),
    ("a QED image", "qed", 0, b"QED\0"),
    ("a VMDK image", "vmdk", 0, b"KDMV"),
    ("a VMDK image", "vmdk", 0, b"COWD"),
    ("a VMDK image", "vmdk", 0, b"\xbe\xba\xfe\xca\0\0\0\0"),
    ("a VMDK descriptor", "vmdk", 0, b"# Disk DescriptorFile"),
    ("a VDI image", "vdi", 0x40, b"\x7f\x10\xda\xbe"),
    ("a VHD image", "vpc", 0, b"conectix"),
    // One of fixed size has a footer alone, which Virtual PC wrote with a byte less.
    ("a VHD image", "vpc", -512, b"conectix"),
    ("a VHD image", "vpc", -511, b"conectix"),
    ("a VHDX image", "vhdx", 0, b"vhdxfile"),
    ("a Parallels image", "parallels", 0, b"WithoutFreeSpace"),
    ("a Parallels image", "parallels", 0, b"WithouFreSpacExt"),
    ("a Bochs image", "bochs", 0, b"Bochs Virtual HD Image"),
    ("a DMG image", "dmg", -512, b"koly\0\0\0\x04\0\0\x02\0"),
];

/// Files that another program makes an image of: name, program, signature at the beginning.
const PACKED: [(&str, Tool, &[u8]); 8] = [
    ("an Android sparse image", Converter("simg2img"), SPARSE),
    ("compressed with gzip", Filter("gzip -dc"), b"\x1f\x8b\x08"),
    ("compressed with xz", Filter("xz -dc"), b"\xfd7zXZ\0"),
    ("compressed with zstd", Filter("zstd -dc"), ZSTD),
    ("compressed with bzip2", Filter("bzip2 -dc"), b"BZh"),
    (
        "compressed with lz4",
        Filter("lz4 -dc"),
        b"\x04\x22\x4d\x18",
    ),
    ("a ZIP archive", Filter("unzip -p"), b"PK\x03\x04"),
    ("a 7-Zip archive", Filter("7z x -so"), SEVEN_ZIP),
];
const SPARSE: &[u8] = b"\x3a\xff\x26\xed";
const ZSTD: &[u8] = b"\x28\xb5\x2f\xfd";
const SEVEN_ZIP: &[u8] = b"7z\xbc\xaf\x27\x1c";

/// What the file of `len` bytes is, if it is none that a guest could read as a disk.
pub(super) fn identify(file: &File, len: u64) -> io::Result<Option<Format>> {
    let (mut head, mut tail) = ([0; EDGE], [0; EDGE]);
    let edge = usize::try_from(len).map_or(EDGE, |len| len.min(EDGE));
    file.read_exact_at(head.get_mut(..edge).unwrap_or_default(), 0)?;
    let tail_len = edge as u64;
    file.read_exact_at(
        tail.get_mut(EDGE - edge..).unwrap_or_default(),
        len - tail_len,
    )?;
    let image = IMAGES.iter().find(|(_, _, at, signature)| {
        let place = match usize::try_from(*at) {
            Ok(at) => head.get(at..),
            Err(_) => tail.get(EDGE.saturating_add_signed(*at)..),
        };
        place.is_some_and(|bytes| bytes.starts_with(signature))
    });
    let packed = || PACKED.iter().find(|(_, _, start)| head.starts_with(start));
    let found = image.map(|(name, format, ..)| (*name, QemuImg(format)));
    let found = found.or_else(|| packed().map(|(name, tool, _)| (*name, *tool)));
    Ok(found.map(|(name, tool)| Format { name, tool }))
}

#[cfg(test)]
mod tests {
    use tempfile::NamedTempFile;

    use super::super::{Disk, DiskMode, DiskOptions};
    use super::*;

    const LEN: u64 = 64 << 10;

    /// A file of zeroes but for these bytes.
    fn with(at: u64, bytes: &[u8]) -> NamedTempFile {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(LEN).unwrap();
        file.as_file().write_all_at(bytes, at).unwrap();
        file
    }

    fn open(file: &NamedTempFile, force_raw: bool) -> Result<Disk, String> {
        let options = DiskOptions {
            mode: DiskMode::ReadWrite,
            force_raw,
            block_size: None,
        };
        Disk::open(file.path(), options).map_err(|e| e.to_string())
    }

    #[test]
    fn other_formats_are_refused_and_the_way_out_is_named() {
        for (at, signature, wanted) in [
            (0, &b"QFI\xfb\0\0\0\x03"[..], "qcow2 image"),
            (0, b"QFI\xfb\0\0\0\x01", "convert -f qcow -O raw"),
            (0, b"QED\0", "-f qed"),
            (0, b"KDMV\x01\0\0\0", "-f vmdk"),
            (0, b"COWD", "-f vmdk"),
            (0, b"# Disk DescriptorFile\nversion=1\n", "VMDK descriptor"),
            (0x40, b"\x7f\x10\xda\xbe", "-f vdi"),
            (LEN - 512, b"conectix", "-f vpc"),
            (LEN - 511, b"conectix", "-f vpc"),
            (0, b"conectix", "-f vpc"),
            (0, b"vhdxfile", "-f vhdx"),
            (0, b"WithoutFreeSpace", "-f parallels"),
            (0, b"WithouFreSpacExt", "-f parallels"),
            (0, b"\x1f\x8b\x08", "gzip -dc"),
            (0, b"\xfd7zXZ\0", "xz -dc"),
            (0, b"\x28\xb5\x2f\xfd", "zstd -dc"),
            (0, b"BZh91AY&SY", "bzip2 -dc"),
            (0, b"\x3a\xff\x26\xed", "simg2img"),
            // Raw: LUKS, ISO 9660, tar, FAT, and signatures where they mean nothing.
            (0, b"LUKS\xba\xbe", ""),
            (0x8001, b"CD001", ""),
            (257, b"ustar", ""),
            (0, b"\xeb\x3c\x90mkfs.fat", ""),
            (512, b"QFI\xfb\0\0\0\x03", ""),
            (LEN - 512, b"QFI\xfb\0\0\0\x03", ""),
        ] {
            let file = with(at, signature);
            let before = std::fs::read(file.path()).unwrap();
            match open(&file, false) {
                Ok(disk) => {
                    assert_eq!(wanted, "", "{signature:?} at {at} is taken");
                    assert_eq!(disk.sectors(), LEN / 512);
                }
                Err(error) => {
                    assert!(!wanted.is_empty() && error.contains(wanted), "{error}");
                    let path = file.path().to_str().unwrap();
                    for part in ["format=raw", path, &format!("{path}.raw")] {
                        assert!(error.contains(part), "{part}: {error}");
                    }
                }
            }
            assert_eq!(open(&file, true).unwrap().sectors(), LEN / 512);
            assert!(std::fs::read(file.path()).unwrap() == before);
        }
    }

    #[test]
    fn a_file_shorter_than_its_edges_is_looked_at() {
        let file = NamedTempFile::new().unwrap();
        for len in [512u64, 513, 700, 1023] {
            file.as_file().set_len(len).unwrap();
            assert_eq!(identify(file.as_file(), len).unwrap(), None);
        }
        file.as_file()
            .write_all_at(b"conectix", 1023 - 511)
            .unwrap();
        assert!(identify(file.as_file(), 1023).unwrap().is_some());
    }
}
