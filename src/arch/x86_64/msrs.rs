//! Model-specific registers that differ from KVM's reset values when a kernel is entered without firmware.

use kvm_bindings::kvm_msr_entry;

/// IA32_MISC_ENABLE, bit 0: fast string operations, which firmware turns on (SDM vol. 4 table 2-2).
const IA32_MISC_ENABLE: u32 = 0x1a0;
const FAST_STRINGS: u64 = 1 << 0;

/// IA32_MTRR_DEF_TYPE: MTRRs on (bit 11), all memory write-back (type 6). Left at its reset value, the kernel would
/// take all memory for uncached (SDM vol. 3 § 12.11.2.1).
const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLE_WRITE_BACK: u64 = 1 << 11 | 6;

/// The MSRs to set on every vCPU before its first instruction.
pub fn boot_msrs() -> [kvm_msr_entry; 2] {
    [
        (IA32_MISC_ENABLE, FAST_STRINGS),
        (IA32_MTRR_DEF_TYPE, MTRR_ENABLE_WRITE_BACK),
    ]
    .map(|(index, data)| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    })
}
