//! What kind of file this is, by its first bytes.

use std::fmt;

use super::bytes::has_magic;
use super::error::{BootError, Role};
use super::foreign;
use super::input::InputFile;

/// Compression formats that Linux uses for kernels and initrds (boot.rst, "payload_offset"; lib/decompress.c).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// gzip, RFC 1952.
    Gzip,
    /// bzip2.
    Bzip2,
    /// LZMA, the legacy format before xz.
    Lzma,
    /// xz.
    Xz,
    /// LZO in an lzop file.
    Lzo,
    /// LZ4 in its frame format, which the kernel does not read.
    Lz4Frame,
    /// LZ4 in its legacy frame format, which the kernel reads.
    Lz4Legacy,
    /// Zstandard, RFC 8878.
    Zstd,
}

impl Compression {
    /// Recognizes a format by its magic number.
    pub fn identify(head: &[u8]) -> Option<Self> {
        const MAGICS: [(&[u8], Compression); 9] = [
            (b"\x1f\x8b", Compression::Gzip),
            (b"\x1f\x9e", Compression::Gzip),
            (b"BZh", Compression::Bzip2),
            (b"\x5d\x00\x00", Compression::Lzma),
            (b"\xfd7zXZ\x00", Compression::Xz),
            (b"\x89LZO", Compression::Lzo),
            (b"\x04\x22\x4d\x18", Compression::Lz4Frame),
            (b"\x02\x21\x4c\x18", Compression::Lz4Legacy),
            (b"\x28\xb5\x2f\xfd", Compression::Zstd),
        ];
        MAGICS
            .into_iter()
            .find(|(magic, _)| head.starts_with(magic))
            .map(|(_, compression)| compression)
    }

    /// Its name, that of the kernel's option for it after `CONFIG_RD_` and `CONFIG_KERNEL_`, and the program that decompresses it.
    fn names(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Self::Gzip => ("gzip", "GZIP", "gzip"),
            Self::Bzip2 => ("bzip2", "BZIP2", "bzip2"),
            Self::Lzma => ("LZMA", "LZMA", "xz"),
            Self::Xz => ("xz", "XZ", "xz"),
            Self::Lzo => ("LZO", "LZO", "lzop"),
            Self::Lz4Frame => ("LZ4 (frame format)", "LZ4", "lz4"),
            Self::Lz4Legacy => ("LZ4 (legacy format)", "LZ4", "lz4"),
            Self::Zstd => ("zstd", "ZSTD", "zstd"),
        }
    }

    /// The name of the kernel's option for it, after `CONFIG_RD_` and `CONFIG_KERNEL_`.
    pub fn config_suffix(self) -> &'static str {
        self.names().1
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.names().0)
    }
}

/// What a file is.
#[derive(Debug, Clone, Copy)]
pub(crate) enum FileKind {
    BzImage,
    Elf,
    Cpio,
    Compressed(Compression),
    Foreign(&'static Foreign),
    Unknown,
}

/// A kind of file that is neither a kernel for this machine nor an initrd.
#[derive(Debug)]
pub(crate) struct Foreign {
    /// Where its magic number is.
    offset: usize,
    magic: &'static [u8],
    /// What it is, with its article.
    what: &'static str,
    /// What to do where a kernel is wanted.
    hint: &'static str,
}

const fn kind(
    offset: usize,
    magic: &'static [u8],
    what: &'static str,
    hint: &'static str,
) -> Foreign {
    Foreign {
        offset,
        magic,
        what,
        hint,
    }
}

const FOREIGN: [Foreign; 12] = [
    kind(0, b"070707", OLD_CPIO, NOT_THE_INITRD),
    kind(0, b"\xc7\x71", OLD_CPIO, NOT_THE_INITRD),
    kind(0x38, b"ARM\x64", "a kernel for ARM64 (AArch64 Image)", X86),
    kind(0x38, b"RSC\x05", "a kernel for RISC-V (Image)", X86),
    kind(4, b"zimg", "a compressed EFI kernel image (zboot)", X86),
    kind(
        0,
        b"MZ",
        "an EFI application without a Linux setup header",
        "if it is a unified kernel image, take the kernel out: objcopy -O binary -j .linux FILE bzImage",
    ),
    kind(0, b"\x27\x05\x19\x56", "a U-Boot image (uImage)", ORIGIN),
    kind(0, b"ANDROID!", "an Android boot image", UNPACK),
    kind(0, b"\xd0\x0d\xfe\xed", "a device tree or FIT image", ORIGIN),
    kind(0, b"QFI\xfb", "a qcow2 disk image", UNPACK),
    kind(257, b"ustar", "a tar archive", UNPACK),
    kind(0, b"#!", "a script", ORIGIN),
];
const OLD_CPIO: &str = "a cpio archive in an old format, which no kernel unpacks";
const NOT_THE_INITRD: &str = "give a cpio archive as the initrd, and a kernel as the kernel";
const X86: &str = "this VM is x86-64: give a kernel built for x86_64 (amd64)";
const ORIGIN: &str = "give the bzImage (vmlinuz) or vmlinux that it is for";
const UNPACK: &str = "unpack it and give the kernel that is in it";

impl FileKind {
    /// Recognizes a file by its first bytes.
    pub(crate) fn identify(head: &[u8]) -> Self {
        // A bzImage with an EFI stub is a PE file as well, so its own magic is asked first.
        if has_magic(head, 0x202, b"HdrS") {
            return Self::BzImage;
        }
        if head.starts_with(b"\x7fELF") {
            return Self::Elf;
        }
        if head.starts_with(b"070701") || head.starts_with(b"070702") {
            return Self::Cpio;
        }
        let foreign = FOREIGN
            .iter()
            .find(|kind| has_magic(head, kind.offset, kind.magic));
        foreign
            .map(Self::Foreign)
            .or_else(|| Compression::identify(head).map(Self::Compressed))
            .unwrap_or(Self::Unknown)
    }
}

/// The error about a file that was given as the kernel and is neither a bzImage nor ELF.
pub(crate) fn not_a_kernel(input: &InputFile, kind: FileKind, head: &[u8]) -> BootError {
    let (what, hint) = match kind {
        FileKind::BzImage | FileKind::Elf | FileKind::Unknown => {
            if let Ok(Some(foreign)) = foreign::refuse(input, true) {
                return foreign;
            }
            return BootError::NotAKernel {
                path: input.path().to_owned(),
                len: input.len(),
                head: hex(head),
            };
        }
        FileKind::Cpio => (
            "a cpio archive, as initrds are".to_owned(),
            NOT_THE_INITRD.to_owned(),
        ),
        FileKind::Compressed(compression) => (
            format!("compressed with {compression}"),
            format!(
                "if it is a vmlinux, decompress it first: {} -dc {} > vmlinux; if it is an initrd, give it as that",
                compression.names().2,
                input.path().display()
            ),
        ),
        FileKind::Foreign(foreign) => (foreign.what.to_owned(), foreign.hint.to_owned()),
    };
    BootError::WrongKind {
        role: Role::Kernel,
        path: input.path().to_owned(),
        what,
        hint,
    }
}

/// Rejects files that cannot be an initrd. Unknown formats pass: the kernel may support them.
pub(crate) fn check_initrd_kind(input: &InputFile, head: &[u8]) -> Result<(), BootError> {
    let (what, hint) = match FileKind::identify(head) {
        FileKind::BzImage => ("a Linux kernel (bzImage)", NOT_THE_INITRD),
        FileKind::Elf => ("an ELF file", NOT_THE_INITRD),
        FileKind::Foreign(foreign) => (
            foreign.what,
            "an initrd is a cpio archive: (cd DIR && find . | cpio -o -H newc) > initrd.cpio",
        ),
        FileKind::Cpio | FileKind::Compressed(_) | FileKind::Unknown => return Ok(()),
    };
    Err(BootError::WrongKind {
        role: Role::Initrd,
        path: input.path().to_owned(),
        what: what.to_owned(),
        hint: hint.to_owned(),
    })
}

/// The first bytes in hexadecimal, and as text where they are text.
pub(super) fn hex(head: &[u8]) -> String {
    let first = head.get(..8).unwrap_or(head);
    let mut shown = first
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect::<Vec<_>>()
        .join(" ");
    if first
        .iter()
        .all(|byte| byte.is_ascii_graphic() || *byte == b' ')
    {
        shown.push_str(&format!(" (\"{}\")", String::from_utf8_lossy(first)));
    }
    shown
}
