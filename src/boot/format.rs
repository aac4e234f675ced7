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

    /// The name of the kernel's option for it, after `CONFIG_RD_` and `CONFIG_KERNEL_`.
    pub fn config_suffix(self) -> &'static str {
        match self {
            Compression::Gzip => "GZIP",
            Compression::Bzip2 => "BZIP2",
            Compression::Lzma => "LZMA",
            Compression::Xz => "XZ",
            Compression::Lzo => "LZO",
            Compression::Lz4Frame | Compression::Lz4Legacy => "LZ4",
            Compression::Zstd => "ZSTD",
        }
    }

    /// The command that decompresses a file to its standard output.
    fn command(self) -> &'static str {
        match self {
            Compression::Gzip => "gzip -dc",
            Compression::Bzip2 => "bzip2 -dc",
            Compression::Lzma | Compression::Xz => "xz -dc",
            Compression::Lzo => "lzop -dc",
            Compression::Lz4Frame | Compression::Lz4Legacy => "lz4 -dc",
            Compression::Zstd => "zstd -dc",
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Compression::Gzip => "gzip",
            Compression::Bzip2 => "bzip2",
            Compression::Lzma => "LZMA",
            Compression::Xz => "xz",
            Compression::Lzo => "LZO",
            Compression::Lz4Frame => "LZ4 (frame format)",
            Compression::Lz4Legacy => "LZ4 (legacy format)",
            Compression::Zstd => "zstd",
        })
    }
}

/// What a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FileKind {
    BzImage,
    Elf,
    Cpio,
    OldCpio,
    Compressed(Compression),
    Arm64Image,
    RiscvImage,
    EfiZboot,
    EfiApplication,
    UImage,
    AndroidBoot,
    DeviceTree,
    Qcow2,
    Tar,
    Script,
    Unknown,
}

impl FileKind {
    /// Recognizes a file by its first bytes.
    pub(crate) fn identify(head: &[u8]) -> Self {
        // A bzImage with an EFI stub is a PE file as well, so its own magic is asked first.
        if has_magic(head, 0x202, b"HdrS") {
            return FileKind::BzImage;
        }
        const MAGICS: [(usize, &[u8], FileKind); 15] = [
            (0, b"\x7fELF", FileKind::Elf),
            (0, b"070701", FileKind::Cpio),
            (0, b"070702", FileKind::Cpio),
            (0, b"070707", FileKind::OldCpio),
            (0, b"\xc7\x71", FileKind::OldCpio),
            (0x38, b"ARM\x64", FileKind::Arm64Image),
            (0x38, b"RSC\x05", FileKind::RiscvImage),
            (4, b"zimg", FileKind::EfiZboot),
            (0, b"MZ", FileKind::EfiApplication),
            (0, b"\x27\x05\x19\x56", FileKind::UImage),
            (0, b"ANDROID!", FileKind::AndroidBoot),
            (0, b"\xd0\x0d\xfe\xed", FileKind::DeviceTree),
            (0, b"QFI\xfb", FileKind::Qcow2),
            (257, b"ustar", FileKind::Tar),
            (0, b"#!", FileKind::Script),
        ];
        MAGICS
            .into_iter()
            .find(|(offset, magic, _)| has_magic(head, *offset, magic))
            .map(|(_, _, kind)| kind)
            .or_else(|| Compression::identify(head).map(FileKind::Compressed))
            .unwrap_or(FileKind::Unknown)
    }
}

/// The error about a file that was given as the kernel and is neither a bzImage nor ELF.
pub(crate) fn not_a_kernel(input: &InputFile, kind: FileKind, head: &[u8]) -> BootError {
    let path = input.path();
    let shown = path.display();
    let (what, hint) = match kind {
        FileKind::BzImage | FileKind::Elf | FileKind::Unknown => {
            if let Ok(Some(foreign)) = foreign::refuse(input, true) {
                return foreign;
            }
            return BootError::NotAKernel {
                path: path.to_owned(),
                len: input.len(),
                head: hex(head),
            };
        }
        FileKind::Cpio | FileKind::OldCpio => (
            "a cpio archive, as initrds are".to_owned(),
            "give it as the initrd, and a kernel as the kernel".to_owned(),
        ),
        FileKind::Compressed(compression) => (
            format!("compressed with {compression}"),
            format!(
                "if it is a vmlinux, decompress it first: {} {shown} > vmlinux; if it is an initrd, give it as that",
                compression.command()
            ),
        ),
        FileKind::Arm64Image => (
            "a kernel for ARM64 (AArch64 Image)".to_owned(),
            "this VM is x86-64: give a kernel built for x86_64 (amd64)".to_owned(),
        ),
        FileKind::RiscvImage => (
            "a kernel for RISC-V (Image)".to_owned(),
            "this VM is x86-64: give a kernel built for x86_64 (amd64)".to_owned(),
        ),
        FileKind::EfiZboot => (
            "a compressed EFI kernel image (zboot) of another architecture".to_owned(),
            "this VM is x86-64: give a kernel built for x86_64 (amd64)".to_owned(),
        ),
        FileKind::EfiApplication => (
            "an EFI application without a Linux setup header".to_owned(),
            format!(
                "if it is a unified kernel image, take the kernel out: objcopy -O binary -j .linux {shown} bzImage"
            ),
        ),
        FileKind::UImage => (
            "a U-Boot image (uImage)".to_owned(),
            "give the bzImage or vmlinux it was made from".to_owned(),
        ),
        FileKind::AndroidBoot => (
            "an Android boot image".to_owned(),
            "unpack it (unpack_bootimg) and give the kernel that is in it".to_owned(),
        ),
        FileKind::DeviceTree => (
            "a device tree or FIT image".to_owned(),
            "give the bzImage or vmlinux it was made from".to_owned(),
        ),
        FileKind::Qcow2 => (
            "a qcow2 disk image".to_owned(),
            "give the kernel that is in it".to_owned(),
        ),
        FileKind::Tar => (
            "a tar archive".to_owned(),
            "unpack it and give the kernel that is in it".to_owned(),
        ),
        FileKind::Script => (
            "a script".to_owned(),
            "give a bzImage (vmlinuz) or a vmlinux".to_owned(),
        ),
    };
    BootError::WrongKind {
        role: Role::Kernel,
        path: path.to_owned(),
        what,
        hint,
    }
}

/// Rejects files that cannot be an initrd. Unknown formats pass: the kernel may support them.
pub(crate) fn check_initrd_kind(input: &InputFile, head: &[u8]) -> Result<(), BootError> {
    let (what, hint) = match FileKind::identify(head) {
        FileKind::BzImage => (
            "a Linux kernel (bzImage)",
            "give it as the kernel, and a cpio archive as the initrd",
        ),
        FileKind::Elf => (
            "an ELF file",
            "an initrd is a cpio archive; this may be a kernel",
        ),
        FileKind::Arm64Image | FileKind::RiscvImage | FileKind::EfiZboot => (
            "a kernel for another architecture",
            "an initrd is a cpio archive",
        ),
        FileKind::EfiApplication => ("an EFI application", "an initrd is a cpio archive"),
        FileKind::Tar => (
            "a tar archive, which no kernel unpacks",
            "repack it: (cd DIR && find . | cpio -o -H newc) > initrd.cpio",
        ),
        FileKind::OldCpio => (
            "a cpio archive in an old format, which no kernel unpacks",
            "repack it in the newc format (cpio -o -H newc)",
        ),
        FileKind::Qcow2 => ("a qcow2 disk image", "an initrd is a cpio archive"),
        _ => return Ok(()),
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
