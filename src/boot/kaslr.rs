//! Kernel address space layout randomization, as the kernel's own decompressor does it
//! (arch/x86/boot/compressed/kaslr.c): where in physical and where in virtual memory the kernel goes.

use std::ops::Range;

/// Bytes of virtual memory that a kernel with KASLR has for its image (KERNEL_IMAGE_SIZE): 1 GiB.
const IMAGE_SPACE: u64 = 1 << 30;
/// The lowest physical slot is the link address, or 512 MiB if that is lower.
const HIGHEST_MINIMUM: u64 = 512 << 20;
/// The least alignment of a 64-bit kernel (MIN_KERNEL_ALIGN): a page of 2 MiB.
pub(crate) const MIN_ALIGN: u64 = 2 << 20;

/// Where a kernel goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct KaslrSlot {
    /// GPA of its first byte.
    pub(crate) phys: u64,
    /// Offset of its first byte from __START_KERNEL_map in virtual memory.
    pub(crate) virt: u64,
}

/// Picks a slot by two random numbers for a kernel linked for the physical addresses `link`. Physical memory is free up to
/// `ram_end`.
pub(crate) fn choose(link: &Range<u64>, align: u64, ram_end: u64, random: [u64; 2]) -> KaslrSlot {
    let size = (link.end - link.start).next_multiple_of(align);
    let pick = |first: u64, end: u64, random: u64| {
        let slots = end.checked_sub(first + size).map(|room| 1 + room / align);
        slots.map(|slots| first + random % slots * align)
    };
    let [for_phys, for_virt] = random;
    let lowest = link.start.min(HIGHEST_MINIMUM).next_multiple_of(align);
    KaslrSlot {
        phys: pick(lowest, ram_end, for_phys).unwrap_or(link.start),
        virt: pick(link.start, IMAGE_SPACE, for_virt).unwrap_or(link.start),
    }
}

/// Whether the kernel leaves KASLR off for this command line.
pub(crate) fn is_off(cmdline: &str) -> bool {
    words(cmdline).any(|word| word == "nokaslr")
}

/// The parameter that limits where a kernel with KASLR may go, if there is one.
pub(crate) fn limit(cmdline: &str) -> Option<&str> {
    words(cmdline).find(|word| {
        ["mem=", "memmap=", "hugepages="]
            .iter()
            .any(|name| word.starts_with(name))
    })
}

/// The command line as the decompressor reads it (arch/x86/boot/cmdline.c): it knows neither quotes nor "--".
fn words(cmdline: &str) -> impl Iterator<Item = &str> {
    cmdline
        .split(|c: char| c <= ' ')
        .filter(|word| !word.is_empty())
}
