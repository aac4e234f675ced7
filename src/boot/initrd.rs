//! The initrd: as high as the kernel and the memory allow, out of the way of a kernel that grows or moves.

use std::ops::Range;
use std::path::Path;

use super::error::BootError;
use super::inspect;
use super::ram::{GuestMemory, MIB, low_ram_end, mib_ceil};
use crate::arch::layout;

const PAGE: u64 = 4096;

/// Memory that a small userland needs besides kernel and initrd, in MiB; only for the advice in a message.
const USERLAND_MIB: u64 = 64;

/// Loads the initrd `path` above `floor`, the end of the kernel, and below `ceiling`, the kernel's limit.
pub(crate) fn load(
    mem: &GuestMemory,
    path: &Path,
    floor: u64,
    ceiling: u64,
) -> Result<Range<u64>, BootError> {
    let input = inspect::initrd(path)?;
    let size = input.len();
    let ram_end = low_ram_end(mem);
    // Linux keeps the size in 32 bits (ramdisk_size) unless ext_ramdisk_size is set; below the MMIO gap it always fits.
    let top = ceiling.min(ram_end);
    let start = top
        .checked_sub(size)
        .map(|start| start / PAGE * PAGE)
        .filter(|start| *start >= floor);
    let Some(start) = start else {
        return Err(too_big(path, size, floor, top, ram_end));
    };
    input.read_into(mem, start, 0, size, "the initrd")?;
    Ok(start..start + size)
}

fn too_big(path: &Path, size: u64, floor: u64, ceiling: u64, ram_end: u64) -> BootError {
    // Unpacked, the initrd is there a second time before its archive is freed.
    let need_mib =
        mib_ceil(floor.saturating_add(size.saturating_mul(2))).saturating_add(USERLAND_MIB);
    let hint = if ceiling < ram_end {
        "the kernel's own limit (initrd_addr_max) forbids more: make the initrd smaller".to_owned()
    } else if floor.saturating_add(size) > layout::MMIO_GAP_START {
        format!(
            "kernel and initrd must fit below {} MiB together: make the initrd smaller",
            layout::MMIO_GAP_START / MIB
        )
    } else {
        format!("raise the VM's memory, say to {need_mib}M, or make the initrd smaller")
    };
    let (path, room) = (path.display(), ceiling.saturating_sub(floor));
    BootError::InitrdTooBig(format!(
        "the initrd {path} ({size} bytes) does not fit: between the end of the kernel ({floor:#x}) and {ceiling:#x} there are {room} bytes; {hint}"
    ))
}
