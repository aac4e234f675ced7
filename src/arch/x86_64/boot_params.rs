//! The zero page of the Linux boot protocol (Documentation/arch/x86/zero-page.rst).

use std::ops::Range;

use linux_loader::bootparam::{boot_params, setup_header};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::layout;
use super::memory_map::memory_map;

/// Offset of the setup header in the file and in boot_params (boot.rst, "The Real-Mode Kernel Header").
pub const SETUP_HEADER_OFFSET: usize = 0x1f1;
/// Value of `boot_flag`.
pub const BOOT_FLAG: u16 = 0xaa55;
/// Value of `header`: "HdrS".
pub const HEADER_MAGIC: u32 = 0x5372_6448;
/// `loadflags`: the protected-mode part belongs above 1 MiB.
pub const LOADED_HIGH: u8 = 1;

/// `loadflags`: the kernel's image has been placed at random (boot.rst, "loadflags", bit 1).
const KASLR_FLAG: u8 = 1 << 1;
/// `type_of_loader` of a loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;

/// The setup header of a kernel that has none, an ELF one: what early Linux code looks at.
pub fn default_setup_header() -> setup_header {
    setup_header {
        boot_flag: BOOT_FLAG,
        header: HEADER_MAGIC,
        version: 0x20f,
        loadflags: LOADED_HIGH,
        // Linux's default, CONFIG_PHYSICAL_ALIGN.
        kernel_alignment: 0x20_0000,
        cmdline_size: 2047,
        ..Default::default()
    }
}

/// Writes boot_params for a kernel with this setup header, given as the bytes that begin at 0x1f1. With `kaslr` the kernel
/// randomizes its memory regions, as after its decompressor has randomized its image.
pub fn write(
    mem: &GuestMemoryMmap,
    header_bytes: &[u8],
    initrd: Option<&Range<u64>>,
    kaslr: bool,
) -> Result<(), GuestMemoryError> {
    let mut params = boot_params::default();
    let header_end = SETUP_HEADER_OFFSET + header_bytes.len();
    if let Some(target) = params
        .as_mut_slice()
        .get_mut(SETUP_HEADER_OFFSET..header_end)
    {
        target.copy_from_slice(header_bytes);
    }

    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.loadflags &= LOADED_HIGH;
    if kaslr {
        params.hdr.loadflags |= KASLR_FLAG;
    }
    params.hdr.setup_data = 0;
    params.hdr.heap_end_ptr = 0;
    // "normal": do not ask for a video mode. Only the real-mode code, which does not run, would use it.
    params.hdr.vid_mode = 0xffff;
    (params.hdr.cmd_line_ptr, params.ext_cmd_line_ptr) = halves(layout::CMDLINE_START);
    let (start, size) = initrd.map_or((0, 0), |range| (range.start, range.end - range.start));
    (params.hdr.ramdisk_image, params.ext_ramdisk_image) = halves(start);
    (params.hdr.ramdisk_size, params.ext_ramdisk_size) = halves(size);
    params.acpi_rsdp_addr = layout::ACPI_START;

    // e820_table is packed, so it is filled as a copy.
    let mut table = params.e820_table;
    for (slot, entry) in table.iter_mut().zip(memory_map(mem)) {
        *slot = entry;
        params.e820_entries += 1;
    }
    params.e820_table = table;

    mem.write_obj(params, GuestAddress(layout::BOOT_PARAMS_START))
}

/// The low and the high 32 bits.
fn halves(value: u64) -> (u32, u32) {
    (value as u32, (value >> 32) as u32)
}
