//! The guest's physical memory map, which the kernel gets as an e820 table or in the PVH start information.

use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::layout;

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
/// The tables between the end of conventional memory and 1 MiB (EBDA, ACPI, MP table) are reserved, not "ACPI reclaimable":
/// a PC has its firmware ROM there, and kernels expect no usable memory.
pub fn memory_map(mem: &GuestMemoryMmap) -> Vec<MapEntry> {
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
