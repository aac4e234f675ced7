//! Registers at the boot entry, and the descriptor and page tables that they point to.

use kvm_bindings::{kvm_fpu, kvm_regs, kvm_segment, kvm_sregs};
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::layout::{GDT_START, IDT_START, PAGE_TABLES_START, RESET_VECTOR};

/// How the first vCPU enters the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Entry {
    /// 64-bit Linux boot protocol: long mode, interrupts off, memory below 4 GiB mapped one to one.
    Linux64 {
        /// First instruction.
        rip: u64,
        /// GPA of boot_params, for RSI.
        boot_params: u64,
    },
    /// PVH (Xen HVM direct boot): 32-bit protected mode, paging off.
    Pvh {
        /// First instruction.
        eip: u32,
        /// GPA of hvm_start_info, for EBX.
        start_info: u32,
    },
}

/// Bits of CR0, CR4 and EFER (SDM vol. 3 § 2.5, § 2.2.1).
const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// RFLAGS bit 1 is always set (SDM vol. 1 § 3.4.3).
const RFLAGS_RESERVED: u64 = 1 << 1;

/// Page-table entry bits: present, writable, and page size (a 2 MiB page in a page directory).
const PTE_PRESENT_RW: u64 = 0b11;
const PDE_2M: u64 = 1 << 7;
const PAGE_SIZE: u64 = 4096;
/// GiB that the boot page tables map one to one: all that 32-bit addresses reach, MMIO included.
const MAPPED_GIB: u64 = 4;

/// Selectors that the Linux boot protocol names: __BOOT_CS and __BOOT_DS.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
/// PVH asks for a 32-bit task-state segment in TR.
const TSS_SELECTOR: u16 = 0x20;

/// mov $0xfe, %al; out %al, $0x64; hlt: the i8042's reset command.
const RESET_STUB: [u8; 5] = [0xb0, 0xfe, 0xe6, 0x64, 0xf4];

/// The registers and tables with which the boot vCPU enters a kernel.
///
/// For [`Entry::Linux64`] the state is that of the Linux x86 boot protocol, section "64-bit Boot Protocol";
/// for [`Entry::Pvh`] that of Xen's "x86/HVM direct boot ABI".
pub fn boot_registers(entry: Entry, mut sregs: kvm_sregs) -> (kvm_regs, kvm_sregs) {
    let long_mode = matches!(entry, Entry::Linux64 { .. });
    let code = segment(CODE_SELECTOR, 0xb, long_mode);
    let data = segment(DATA_SELECTOR, 0x3, false);
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment {
        limit: 0x67,
        g: 0,
        s: 0,
        db: 0,
        ..segment(TSS_SELECTOR, 0xb, false)
    };
    sregs.gdt.base = GDT_START;
    sregs.gdt.limit = (size_of_val(&gdt(long_mode)) - 1) as u16;
    sregs.idt.base = IDT_START;
    sregs.idt.limit = 7;

    let regs = match entry {
        Entry::Linux64 { rip, boot_params } => {
            sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
            sregs.cr3 = PAGE_TABLES_START;
            sregs.cr4 = CR4_PAE;
            sregs.efer = EFER_LME | EFER_LMA;
            kvm_regs {
                rip,
                rsi: boot_params,
                rflags: RFLAGS_RESERVED,
                ..Default::default()
            }
        }
        Entry::Pvh { eip, start_info } => {
            sregs.cr0 = CR0_PE | CR0_ET;
            sregs.cr4 = 0;
            sregs.efer = 0;
            kvm_regs {
                rip: eip.into(),
                rbx: start_info.into(),
                rflags: RFLAGS_RESERVED,
                ..Default::default()
            }
        }
    };
    (regs, sregs)
}

/// The floating-point state after FNINIT (SDM vol. 1 § 8.1.5) and MXCSR at its reset value (§ 10.2.3).
pub fn boot_fpu() -> kvm_fpu {
    kvm_fpu {
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..Default::default()
    }
}

/// Whether the vCPU is at the reset vector, 0xfffffff0, in the state after a reset or an INIT (SDM vol. 3 § 10.1.1). There
/// is no firmware at that address, so a boot vCPU that gets there has been reset.
pub fn are_at_reset_vector(regs: &kvm_regs, sregs: &kvm_sregs) -> bool {
    regs.rip == 0xfff0 && sregs.cs.base == 0xffff_0000
}

/// Writes the descriptor tables, the reset stub and, for a 64-bit entry, the page tables.
pub fn write_boot_tables(mem: &GuestMemoryMmap, entry: Entry) -> Result<(), GuestMemoryError> {
    let long_mode = matches!(entry, Entry::Linux64 { .. });
    for (i, descriptor) in (0u64..).zip(gdt(long_mode)) {
        mem.write_obj(descriptor, GuestAddress(GDT_START + i * 8))?;
    }
    mem.write_obj(0u64, GuestAddress(IDT_START))?;
    mem.write_slice(&RESET_STUB, GuestAddress(RESET_VECTOR))?;
    if !long_mode {
        return Ok(());
    }

    let pdpt = PAGE_TABLES_START + PAGE_SIZE;
    let first_pd = pdpt + PAGE_SIZE;
    mem.write_obj(pdpt | PTE_PRESENT_RW, GuestAddress(PAGE_TABLES_START))?;
    let mut directory = [0u8; PAGE_SIZE as usize];
    for gib in 0..MAPPED_GIB {
        let pd = first_pd + gib * PAGE_SIZE;
        mem.write_obj(pd | PTE_PRESENT_RW, GuestAddress(pdpt + gib * 8))?;
        for (i, entry) in (0u64..).zip(directory.chunks_exact_mut(8)) {
            let page = (gib << 30) + (i << 21);
            entry.copy_from_slice(&(page | PTE_PRESENT_RW | PDE_2M).to_le_bytes());
        }
        mem.write_slice(&directory, GuestAddress(pd))?;
    }
    Ok(())
}

/// The null descriptor twice (0x08 is unused), code, data, and the task-state segment.
fn gdt(long_mode: bool) -> [u64; 5] {
    // SDM vol. 3 § 3.4.5: flat 4 GiB segments; the L and D/B bits differ between 64-bit and 32-bit code.
    let code = if long_mode {
        0x00af_9b00_0000_ffff
    } else {
        0x00cf_9b00_0000_ffff
    };
    [0, 0, code, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067]
}

/// A flat segment of ring 0 as KVM wants it; `kind` is the descriptor type (SDM vol. 3 § 3.4.5.1).
fn segment(selector: u16, kind: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}
