//! The guest's physical address map, ascending. Every address is a GPA in bytes.
//!
//! The map below 1 MiB follows the PC, because that is where kernels look for firmware tables.

/// Global descriptor table for the boot entry (5 entries of 8 bytes).
pub const GDT_START: u64 = 0x500;
/// Interrupt descriptor table for the boot entry: one empty entry, so that an early exception is a triple fault
/// and not a jump into nowhere.
pub const IDT_START: u64 = 0x540;

/// PVH start information (`hvm_start_info`, then its memory map and module list): 4 KiB.
pub const PVH_INFO_START: u64 = 0x6000;

/// Linux boot parameters, the "zero page": 4 KiB.
pub const BOOT_PARAMS_START: u64 = 0x7000;

/// Boot page tables: 1 PML4 page, 1 PDPT page and 4 page-directory pages that map the first 4 GiB one to one.
pub const PAGE_TABLES_START: u64 = 0x9000;

/// Kernel command line, NUL included.
pub const CMDLINE_START: u64 = 0x2_0000;
/// Room for the command line in bytes, NUL included; above every kernel's own COMMAND_LINE_SIZE.
pub const CMDLINE_MAX_SIZE: u64 = 0x1_0000;

/// End of conventional memory; the extended BIOS data area begins here on a PC.
pub const CONVENTIONAL_END: u64 = 0x9_fc00;

/// ACPI tables, the RSDP first: Linux scans 0xe0000-0xfffff for it (ACPI 6.5 § 5.2.5.1).
pub const ACPI_START: u64 = 0xe_0000;
/// Room for the ACPI tables in bytes.
pub const ACPI_MAX_SIZE: u64 = 0xf000;

/// VM generation ID: 16 bytes.
pub const GENERATION_ID_START: u64 = 0xe_f000;

/// MP floating pointer structure and table: a kernel scans 0xf0000-0xfffff for it (MP 1.4 § 4).
pub const MPTABLE_START: u64 = 0xf_0000;
/// Room for the MP table in bytes.
pub const MPTABLE_MAX_SIZE: u64 = 0xfff0;
/// The real-mode reset vector, f000:fff0: on a PC, the BIOS's entry point. A stub there resets the machine. Linux jumps to
/// it as its last reboot method; on hardware-reduced ACPI, where Linux assumes EFI, it is the first one that works
/// (arch/x86/kernel/reboot.c, reboot_init).
pub const RESET_VECTOR: u64 = 0xf_fff0;

/// High memory: where kernels may be loaded, and RAM as far as [`MMIO_GAP_START`].
pub const HIGH_RAM_START: u64 = 0x10_0000;

/// First address of the 32-bit MMIO gap: no RAM from here to 4 GiB.
pub const MMIO_GAP_START: u64 = 0xc000_0000;
/// First virtio-mmio window; each is [`VIRTIO_MMIO_SIZE`] long and they are contiguous.
pub const VIRTIO_MMIO_START: u64 = 0xd000_0000;
/// Bytes of a virtio-mmio window: a page, so that each can be mapped separately.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;
/// I/O APIC registers (SDM vol. 3 § 11.4.1 has the local APIC at 1 MiB behind it).
pub const IOAPIC_START: u64 = 0xfec0_0000;
/// Local APIC registers, emulated by KVM.
pub const LAPIC_START: u64 = 0xfee0_0000;
/// KVM's scratch pages on Intel hosts: three for the TSS, and right below them, where KVM puts it by itself, one for the
/// identity map.
pub const KVM_TSS_START: u64 = 0xfffb_d000;
/// End of the MMIO gap: RAM continues at 4 GiB.
pub const MMIO_GAP_END: u64 = 0x1_0000_0000;

/// I/O port that takes the guest's exit status (one byte).
pub const EXIT_PORT: u16 = 0xf4;
/// I/O port that takes boot marks (one byte).
pub const BOOT_MARK_PORT: u16 = 0xf5;
/// First I/O port of the i8042, used only for its reset command.
pub const I8042_PORT: u16 = 0x60;
/// First I/O port of COM1.
pub const COM1_PORT: u16 = 0x3f8;
/// I/O port of pvpanic.
pub const PVPANIC_PORT: u16 = 0x505;
/// I/O ports of the ACPI sleep control, sleep status and reset registers, in this order (ACPI 6.5 § 4.8.3.7, 4.8.3.6).
pub const ACPI_POWER_PORT: u16 = 0x600;
/// First I/O port of the PCI configuration mechanism.
pub const PCI_CONFIG_PORT: u16 = 0xcf8;

/// GSI of the generic event device, which tells of a new VM generation ID. On a PC it is COM2's.
pub const GENERATION_GSI: u32 = 3;
/// GSI of COM1, as on a PC.
pub const COM1_GSI: u32 = 4;
/// GSI of the first virtio device; each has one of its own, up to [`VIRTIO_GSI_LAST`].
pub const VIRTIO_GSI_FIRST: u32 = 5;
/// The last pin of the I/O APIC.
pub const VIRTIO_GSI_LAST: u32 = 23;
/// How many virtio devices there is room for.
pub const MAX_VIRTIO_DEVICES: usize = (VIRTIO_GSI_LAST - VIRTIO_GSI_FIRST + 1) as usize;
