//! The guest's physical memory map, which the kernel gets as an e820 table or in the PVH start information.

use linux_loader::bootparam::boot_e820_entry;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::layout;

/// Usable memory. The types have the same numbers in e820 and PVH (ACPI 6.5 § 15, table 15.1).
const RAM: u32 = 1;
/// Not to be used by the kernel.
const RESERVED: u32 = 2;

/// The memory map, ascending.
///
/// The tables between the end of conventional memory and 1 MiB (EBDA, ACPI, MP table) are reserved, not "ACPI reclaimable":
/// a PC has its firmware ROM there, and kernels expect no usable memory.
pub fn memory_map(mem: &GuestMemoryMmap) -> Vec<boot_e820_entry> {
    let mut map = Vec::with_capacity(4);
    let mut add = |addr: u64, end: u64, r#type| {
        if end > addr {
            let size = end - addr;
            map.push(boot_e820_entry { addr, size, r#type });
        }
    };
    for region in mem.iter() {
        let start = region.start_addr().0;
        let end = start.saturating_add(region.len());
        if start < layout::HIGH_RAM_START {
            add(start, end.min(layout::CONVENTIONAL_END), RAM);
            add(layout::CONVENTIONAL_END, layout::HIGH_RAM_START, RESERVED);
            add(layout::HIGH_RAM_START, end, RAM);
        } else {
            add(start, end, RAM);
        }
    }
    map
}
