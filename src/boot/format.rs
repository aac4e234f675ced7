//! What kind of file this is, by its first bytes.

use super::bytes::has_magic;
use super::compression::Compression;
use super::error::BootError;
use super::foreign;
use super::input::InputFile;

/// What a file is.
#[derive(Debug, Clone, Copy)]
pub(crate) enum FileKind {
    BzImage,
    Elf,
    Cpio,
    Compressed(Compression),
    /// What it is, and a hint.
    Foreign(&'static str, &'static str),
    Unknown,
}

/// Kinds of files that are neither a kernel for this machine nor an initrd: where their magic number is, the number, what they are, with
/// an article, and what to do where a kernel is wanted.
const FOREIGN: [(usize, &[u8], &str, &str); 12] = [
    (0, b"070707", OLD_CPIO, NOT_THE_INITRD),
    (0, b"\xc7\x71", OLD_CPIO, NOT_THE_INITRD),
    (0x38, b"ARM\x64", "a kernel for ARM64 (AArch64 Image)", X86),
    (0x38, b"RSC\x05", "a kernel for RISC-V (Image)", X86),
    (4, b"zimg", "a compressed EFI kernel image (zboot)", X86),
    (
        0,
        b"MZ",
        "an EFI application without a Linux setup header",
        "if it is a unified kernel image, take the kernel out: objcopy -O binary -j .linux FILE bzImage",
    ),
    (0, b"\x27\x05\x19\x56", "a U-Boot image (uImage)", ORIGIN),
    (0, b"ANDROID!", "an Android boot image", UNPACK),
    (0, b"\xd0\x0d\xfe\xed", "a device tree or FIT image", ORIGIN),
    (0, b"QFI\xfb", "a qcow2 disk image", UNPACK),
    (257, b"ustar", "a tar archive", UNPACK),
    (0, b"#!", "a script", ORIGIN),
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
            .find(|(offset, magic, ..)| has_magic(head, *offset, magic));
        foreign
            .map(|(_, _, what, hint)| Self::Foreign(what, hint))
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
            return BootError::Refused(format!(
                "{} is not a kernel: its {} bytes begin with {}; give a Linux bzImage (vmlinuz) or an x86 ELF kernel (vmlinux)",
                input.path().display(),
                input.len(),
                hex(head)
            ));
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
        FileKind::Foreign(what, hint) => (what.to_owned(), hint.to_owned()),
    };
    input.wrong_kind(&what, &hint)
}

/// Rejects files that cannot be an initrd. Unknown formats pass: the kernel may support them.
pub(crate) fn check_initrd_kind(input: &InputFile, head: &[u8]) -> Result<(), BootError> {
    let (what, hint) = match FileKind::identify(head) {
        FileKind::BzImage => ("a Linux kernel (bzImage)", NOT_THE_INITRD),
        FileKind::Elf => ("an ELF file", NOT_THE_INITRD),
        FileKind::Foreign(what, _) => (
            what,
            "an initrd is a cpio archive: (cd DIR && find . | cpio -o -H newc) > initrd.cpio",
        ),
        FileKind::Cpio | FileKind::Compressed(_) | FileKind::Unknown => return Ok(()),
    };
    Err(input.wrong_kind(what, hint))
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
