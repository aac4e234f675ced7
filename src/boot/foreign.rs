//! Kernels of other boot protocols than Linux's and PVH, recognized by name.

use memchr::memmem;

use super::error::BootError;
use super::input::InputFile;

/// Where a multiboot header is: in the first 8 KiB, or 32 KiB for version 2 (Multiboot Specification, § 3.1.1; version 2, § 3.1.1).
const HEADERS_LEN: usize = 32 << 10;
const MULTIBOOT: [u8; 4] = 0x1bad_b002u32.to_le_bytes();
const MULTIBOOT2: [u8; 4] = 0xe852_50d6u32.to_le_bytes();

/// Bytes of a file that are searched for a name; known kernels are smaller.
const SEARCHED: u64 = 16 << 20;
/// Version strings of kernels that have no other signature.
const NAMES: [(&[u8], &str); 3] = [
    (b"Xen version ", "the Xen hypervisor"),
    (b"GNU Mach", "GNU Mach"),
    (b"U-Boot 2", "the boot loader U-Boot"),
];

/// The error for a kernel of another boot protocol, if the file is one: recognized by its multiboot header or, with `odd` (an
/// otherwise unknown file), by its version string.
pub(super) fn refuse(input: &InputFile, odd: bool) -> Result<Option<BootError>, BootError> {
    let mut headers = vec![0; HEADERS_LEN];
    let len = input.read_some(0, &mut headers)?;
    headers.truncate(len);
    let multiboot = headers
        .chunks_exact(4)
        .any(|word| word == MULTIBOOT || word == MULTIBOOT2);
    if !multiboot && !odd {
        return Ok(None);
    }
    let mut file = vec![0; usize::try_from(input.len().min(SEARCHED)).unwrap_or(0)];
    let len = input.read_some(0, &mut file)?;
    file.truncate(len);
    let name = NAMES
        .iter()
        .find(|(text, _)| memmem::find(&file, text).is_some());
    let what = match name {
        Some((_, name)) => *name,
        None if multiboot => "a multiboot kernel, not Linux",
        None => return Ok(None),
    };
    let hint = "minivmm boots Linux (bzImage, vmlinux) and ELF kernels with a PVH entry: give one of these";
    Ok(Some(input.wrong_kind(what, hint)))
}
