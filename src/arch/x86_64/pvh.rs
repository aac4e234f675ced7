//! The start information of the PVH boot protocol (xen/include/public/arch-x86/hvm/start_info.h, version 1):
//! `hvm_start_info`, the module list and the memory map, in one page.

use std::ops::Range;

use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::layout;
use super::memory_map::memory_map;

/// "xEn3" with bit 7 of the E set.
const START_MAGIC: u32 = 0x336e_c578;
/// Offset of the module list in the page.
const MODULES_OFFSET: u64 = 0x40;
/// Offset of the memory map in the page.
const MEMORY_MAP_OFFSET: u64 = 0x80;

/// Writes the start information.
pub fn write(mem: &GuestMemoryMmap, initrd: Option<&Range<u64>>) -> Result<(), GuestMemoryError> {
    let modules_gpa = layout::PVH_INFO_START + MODULES_OFFSET;
    let map_gpa = layout::PVH_INFO_START + MEMORY_MAP_OFFSET;

    let map = memory_map(mem);
    for (gpa, entry) in (map_gpa..)
        .step_by(size_of::<hvm_memmap_table_entry>())
        .zip(&map)
    {
        let entry = hvm_memmap_table_entry {
            addr: entry.addr,
            size: entry.size,
            type_: entry.r#type,
            reserved: 0,
        };
        mem.write_obj(entry, GuestAddress(gpa))?;
    }
    if let Some(range) = initrd {
        let module = hvm_modlist_entry {
            paddr: range.start,
            size: range.end - range.start,
            // No command line of its own.
            cmdline_paddr: 0,
            reserved: 0,
        };
        mem.write_obj(module, GuestAddress(modules_gpa))?;
    }
    let info = hvm_start_info {
        magic: START_MAGIC,
        version: 1,
        flags: 0,
        nr_modules: initrd.is_some().into(),
        modlist_paddr: if initrd.is_some() { modules_gpa } else { 0 },
        cmdline_paddr: layout::CMDLINE_START,
        rsdp_paddr: layout::ACPI_START,
        memmap_paddr: map_gpa,
        memmap_entries: u32::try_from(map.len()).unwrap_or(0),
        reserved: 0,
    };
    mem.write_obj(info, GuestAddress(layout::PVH_INFO_START))
}
