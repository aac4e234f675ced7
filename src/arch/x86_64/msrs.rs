//! Model-specific registers: those that differ from KVM's reset values when a kernel is entered without firmware, and those
//! that are part of a vCPU's state.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Error, VcpuFd};

/// IA32_TIME_STAMP_COUNTER.
pub const IA32_TSC: u32 = 0x10;

/// IA32_TSC_DEADLINE: when the local APIC's timer goes off, 0 for never (SDM vol. 3 § 11.5.4.1).
pub const IA32_TSC_DEADLINE: u32 = 0x6e0;

/// IA32_MISC_ENABLE, bit 0: fast string operations, which firmware turns on (SDM vol. 4 table 2-2).
const IA32_MISC_ENABLE: u32 = 0x1a0;
const FAST_STRINGS: u64 = 1 << 0;

/// IA32_MTRR_DEF_TYPE: MTRRs on (bit 11), all memory write-back (type 6). Left at its reset value, the kernel would
/// take all memory for uncached (SDM vol. 3 § 12.11.2.1).
const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLE_WRITE_BACK: u64 = 1 << 11 | 6;

/// MSRs that KVM emulates and KVM_GET_MSR_INDEX_LIST leaves out: the other MTRRs (SDM vol. 3 § 12.11.2).
const UNLISTED: [std::ops::RangeInclusive<u32>; 4] =
    [0x200..=0x20f, 0x250..=0x250, 0x258..=0x259, 0x268..=0x26f];

/// Hyper-V's, which a guest has no use for: CPUID does not offer them.
const HYPER_V: std::ops::RangeInclusive<u32> = 0x4000_0000..=0x4000_0fff;

/// The MSRs to set on every vCPU before its first instruction.
pub fn boot_msrs() -> [kvm_msr_entry; 2] {
    [
        (IA32_MISC_ENABLE, FAST_STRINGS),
        (IA32_MTRR_DEF_TYPE, MTRR_ENABLE_WRITE_BACK),
    ]
    .map(|(index, data)| msr(index, data))
}

/// An MSR with its value.
pub(super) fn msr(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        data,
        ..Default::default()
    }
}

/// Reads those of the MSRs that this vCPU has.
pub(super) fn get_msrs(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, Error> {
    let mut wanted: Vec<kvm_msr_entry> = indices.iter().map(|index| msr(*index, 0)).collect();
    let mut read = Vec::with_capacity(wanted.len());
    while !wanted.is_empty() {
        let mut msrs = Msrs::from_entries(&wanted).map_err(|_| Error::new(libc::E2BIG))?;
        let count = fd.get_msrs(&mut msrs)?;
        read.extend(msrs.as_slice().iter().take(count));
        // KVM stops at the first that the vCPU does not have.
        wanted.drain(..wanted.len().min(count + 1));
    }
    Ok(read)
}

/// Reads one, which is 0 if the vCPU does not have it.
pub(super) fn get_msr(fd: &VcpuFd, index: u32) -> Result<u64, Error> {
    Ok(get_msrs(fd, &[index])?.first().map_or(0, |msr| msr.data))
}

/// The MSRs of a vCPU's state in the order in which they are set, but for [`IA32_TSC_DEADLINE`], which comes after them:
/// those that KVM lists and those that it does not.
pub fn saved_msrs(listed: &[u32]) -> Vec<u32> {
    let mut msrs: Vec<u32> = listed.to_vec();
    msrs.extend(UNLISTED.into_iter().flatten());
    msrs.push(IA32_MTRR_DEF_TYPE);
    msrs.retain(|index| !HYPER_V.contains(index) && *index != IA32_TSC_DEADLINE);
    msrs.sort_unstable();
    msrs.dedup();
    msrs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mtrrs_are_saved_though_kvm_lists_none() {
        let msrs = saved_msrs(&[0x4b56_4d01, IA32_TSC_DEADLINE, IA32_TSC, 0x4000_0001, 0x200]);
        assert_eq!(msrs.first(), Some(&IA32_TSC));
        assert_eq!(msrs.last(), Some(&0x4b56_4d01));
        assert!(msrs.contains(&IA32_MTRR_DEF_TYPE) && msrs.contains(&0x26f));
        assert!(!msrs.contains(&IA32_TSC_DEADLINE) && !msrs.contains(&0x4000_0001));
        assert!(msrs.is_sorted_by(|a, b| a < b));
    }
}
