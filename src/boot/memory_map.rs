//! What is where in the guest's physical memory, as the kernel is told by e820 or PVH.

use std::ops::Range;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::error::BootError;
use super::input::InputFile;
use super::ram::{GuestMemory, MIB};
use crate::arch::layout;

/// A kernel in guest memory.
pub(crate) struct Loaded {
    /// GPA of its 64-bit entry.
    pub(crate) entry: u64,
    /// Its memory.
    pub(crate) range: Range<u64>,
    /// Bytes that came from the file.
    pub(crate) file_bytes: u64,
    /// Whether it is to randomize the rest of its address space as well.
    pub(crate) kaslr: bool,
}

/// Type of an address range; the numbers are the same for e820 and PVH (ACPI 6.5 § 15, table 15.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RangeType {
    /// Usable memory.
    Ram = 1,
    /// Not to be used by the kernel.
    Reserved = 2,
}

/// One entry of the memory map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapEntry {
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub size: u64,
    /// What it is.
    pub range_type: RangeType,
}

/// The memory map, ascending.
///
/// The tables between the end of conventional memory and 1 MiB (EBDA, ACPI, MP table) are reserved and not of the type
/// "ACPI reclaimable": they lie where a PC has its firmware ROM, and kernels expect no memory to gain there.
pub fn memory_map(mem: &GuestMemory) -> Vec<MapEntry> {
    let mut map = Vec::with_capacity(4);
    let mut add = |start: u64, end: u64, range_type| {
        if end > start {
            map.push(MapEntry {
                start,
                size: end - start,
                range_type,
            });
        }
    };
    for region in mem.iter() {
        let start = region.start_addr().0;
        let end = start.saturating_add(region.len());
        if start < layout::HIGH_RAM_START {
            add(start, end.min(layout::CONVENTIONAL_END), RangeType::Ram);
            add(
                layout::CONVENTIONAL_END,
                layout::HIGH_RAM_START,
                RangeType::Reserved,
            );
            add(layout::HIGH_RAM_START, end, RangeType::Ram);
        } else {
            add(start, end, RangeType::Ram);
        }
    }
    map
}

/// End of the memory that begins at address 0; 0 if there is none.
pub(crate) fn low_ram_end(mem: &GuestMemory) -> u64 {
    mem.find_region(GuestAddress(0))
        .map_or(0, |region| region.len())
}

/// All of the VM's memory in bytes.
fn total(mem: &GuestMemory) -> u64 {
    mem.iter()
        .map(|region| region.len())
        .fold(0, u64::saturating_add)
}

/// Bytes as MiB, rounded up.
pub(crate) fn mib_ceil(bytes: u64) -> u64 {
    bytes.div_ceil(MIB)
}

/// Checks that RAM extends at least to `end_gpa`, which lies below the MMIO gap.
pub(crate) fn check_fits(
    input: &InputFile,
    mem: &GuestMemory,
    end_gpa: u64,
) -> Result<(), BootError> {
    if end_gpa > low_ram_end(mem) {
        return Err(BootError::MemoryTooSmall {
            path: input.path().to_owned(),
            need_mib: mib_ceil(end_gpa),
            have_mib: total(mem) / MIB,
        });
    }
    Ok(())
}
