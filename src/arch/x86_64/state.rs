//! A vCPU's whole state in KVM's own structures: read from a vCPU that stands, encoded, and set on one that has not run.
//!
//! The order of the steps matters (Documentation/virt/kvm/api.rst): SREGS has the APIC base, and so comes before the LAPIC;
//! the LAPIC has the timer's mode, without which a TSC deadline is refused; SET_REGS clears pending exceptions, and so
//! comes before the events.

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, Xsave, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::msrs::{IA32_TSC, IA32_TSC_DEADLINE, get_msrs, msr, saved_msrs};
use super::vcpu::{StateError, refused};
use crate::host::cpu;

/// Bytes of XSAVE state that every KVM has; KVM_CAP_XSAVE2 says where there is more.
const XSAVE_MIN: usize = size_of::<kvm_xsave>();
/// Most bytes of it that are accepted: AMX has 11 KiB.
const XSAVE_MAX: usize = 64 << 10;
/// Most MSRs that are accepted.
const MSRS_MAX: usize = 1024;
/// TSC frequencies that differ by less, in parts per million, are the same: KVM measures with that precision.
const TSC_TOLERANCE_PPM: u64 = 250;

/// CR4 and EFER bits of a guest that is itself a hypervisor (SDM vol. 3 § 2.5, APM vol. 2 § 3.1.7).
const CR4_VMXE: u64 = 1 << 13;
const EFER_SVME: u64 = 1 << 12;

/// Type of a segment that is a TSS not in use (SDM vol. 3 § 3.5).
const AVAILABLE_TSS: u8 = 9;

/// What this host's KVM can do for a vCPU's state.
#[derive(Debug, Clone)]
pub struct StateSupport {
    xsave_len: usize,
    tsc_control: bool,
    emulated_by_qemu: bool,
}

impl StateSupport {
    /// Asks KVM.
    pub fn of(kvm: &Kvm) -> Self {
        let xsave2 = usize::try_from(kvm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        Self {
            xsave_len: xsave2.max(XSAVE_MIN),
            tsc_control: kvm.check_extension(Cap::TscControl),
            emulated_by_qemu: cpu::is_emulated_by_qemu(),
        }
    }
}

/// The state of a vCPU.
#[derive(Debug, Clone)]
pub struct VcpuState {
    fixed: FixedState,
    /// XSAVE area, at least 4096 bytes.
    xsave: Vec<u8>,
    cpuid: Vec<kvm_cpuid_entry2>,
    /// In the order in which they are set.
    msrs: Vec<kvm_msr_entry>,
}

/// What has the same size for every vCPU.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct FixedState {
    tsc_khz: u32,
    /// Entries of CPUID and MSRs, and bytes of XSAVE state.
    counts: [u32; 3],
    mp_state: kvm_mp_state,
    reserved: u32,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xcrs: kvm_xcrs,
    debugregs: kvm_debugregs,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
}

/// Why bytes are no vCPU's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the state of a vCPU has a wrong length or count")]
pub struct DecodeError;

impl VcpuState {
    /// Reads the state of a vCPU that is not in KVM_RUN.
    pub fn save(fd: &VcpuFd, kvm: &Kvm, support: &StateSupport) -> Result<Self, StateError> {
        // First: to read it makes KVM accept a pending INIT or SIPI.
        let mp_state = fd.get_mp_state().map_err(refused("KVM_GET_MP_STATE"))?;
        let regs = fd.get_regs().map_err(refused("KVM_GET_REGS"))?;
        let sregs = fd.get_sregs().map_err(refused("KVM_GET_SREGS"))?;
        if sregs.cr4 & CR4_VMXE != 0 || sregs.efer & EFER_SVME != 0 {
            return Err(StateError::Nested);
        }
        let xsave = save_xsave(fd, support.xsave_len)?;
        let xcrs = fd.get_xcrs().map_err(refused("KVM_GET_XCRS"))?;
        let debugregs = fd.get_debug_regs().map_err(refused("KVM_GET_DEBUGREGS"))?;
        // A timer that goes off between these two is in both; the other way round it would be in neither.
        let deadline = read_msrs(fd, &[IA32_TSC_DEADLINE])?;
        let lapic = fd.get_lapic().map_err(refused("KVM_GET_LAPIC"))?;
        let tsc_khz = fd.get_tsc_khz().map_err(refused("KVM_GET_TSC_KHZ"))?;
        let cpuid = fd
            .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
            .map_err(refused("KVM_GET_CPUID2"))?;
        let known = kvm
            .get_msr_index_list()
            .map_err(refused("KVM_GET_MSR_INDEX_LIST"))?;
        let mut msrs = read_msrs(fd, &saved_msrs(known.as_slice()))?;
        msrs.extend(deadline);
        let events = fd
            .get_vcpu_events()
            .map_err(refused("KVM_GET_VCPU_EVENTS"))?;
        let cpuid = cpuid.as_slice().to_vec();
        let fixed = FixedState {
            tsc_khz,
            counts: [cpuid.len(), msrs.len(), xsave.len()].map(|count| count as u32),
            mp_state,
            reserved: 0,
            regs,
            sregs,
            xcrs,
            debugregs,
            lapic,
            events,
        };
        Ok(Self {
            fixed,
            xsave,
            cpuid,
            msrs,
        })
    }

    /// Sets the state on a vCPU that has not run. Of a VM's vCPUs, the one whose state is set first is `first`, and none may run before
    /// all have theirs.
    pub fn restore(
        &self,
        fd: &VcpuFd,
        support: &StateSupport,
        first: bool,
    ) -> Result<(), StateError> {
        let fixed = &self.fixed;
        let cpuid = CpuId::from_entries(&self.cpuid).map_err(|_| StateError::Nonsense("CPUID"))?;
        fd.set_cpuid2(&cpuid).map_err(refused("KVM_SET_CPUID2"))?;
        restore_tsc_frequency(fd, fixed.tsc_khz, support)?;
        fd.set_mp_state(fixed.mp_state)
            .map_err(refused("KVM_SET_MP_STATE"))?;
        fd.set_regs(&fixed.regs).map_err(refused("KVM_SET_REGS"))?;
        let mut sregs = fixed.sregs;
        if support.emulated_by_qemu {
            // KVM on AMD reports TR as a busy TSS whatever the processor has (svm_get_segment). Where the processor is QEMU's, a guest
            // goes on with that, and QEMU takes I/O permissions only from a TSS that is not busy (check_io): all port accesses outside
            // of ring 0 would fault. A processor of silicon looks at the type only when TR is loaded.
            sregs.tr.type_ = AVAILABLE_TSS;
        }
        fd.set_sregs(&sregs).map_err(refused("KVM_SET_SREGS"))?;
        restore_xsave(fd, &self.xsave, support.xsave_len)?;
        // A host without XSAVE has none, and refuses even that.
        if fixed.xcrs.nr_xcrs != 0 {
            fd.set_xcrs(&fixed.xcrs).map_err(refused("KVM_SET_XCRS"))?;
        }
        fd.set_debug_regs(&fixed.debugregs)
            .map_err(refused("KVM_SET_DEBUGREGS"))?;
        fd.set_lapic(&fixed.lapic)
            .map_err(refused("KVM_SET_LAPIC"))?;
        if first {
            self.unsettle_tsc(fd)?;
        }
        set_msrs(fd, &self.msrs)?;
        fd.set_vcpu_events(&fixed.events)
            .map_err(refused("KVM_SET_VCPU_EVENTS"))?;
        // A clock that has jumped must not look like a hang to the guest's watchdogs. It fails where the guest has no kvm-clock.
        _ = fd.kvmclock_ctrl();
        Ok(())
    }

    /// KVM takes a TSC that is within a second of that of the VM's last write for an attempt to synchronize, and changes nothing (kvm_synchronize_tsc).
    /// That is right for the other vCPUs; the first, of a guest that ran for less than a second, would be put back to zero.
    fn unsettle_tsc(&self, fd: &VcpuFd) -> Result<(), StateError> {
        const FAR_AWAY: u64 = 1 << 50;
        let tsc = self.msrs.iter().find(|msr| msr.index == IA32_TSC);
        tsc.map_or(Ok(()), |tsc| {
            set_msrs(fd, &[msr(IA32_TSC, tsc.data ^ FAR_AWAY)])
        })
    }

    /// Lets the TSC count as if `nanoseconds` had passed since the state was saved.
    pub fn advance_tsc(&mut self, nanoseconds: u64) {
        let cycles = u128::from(nanoseconds) * u128::from(self.fixed.tsc_khz) / 1_000_000;
        for msr in self.msrs.iter_mut().filter(|msr| msr.index == IA32_TSC) {
            msr.data = msr.data.wrapping_add(cycles as u64);
        }
    }

    /// What CPUID tells the guest.
    pub fn cpuid(&self) -> &[kvm_cpuid_entry2] {
        &self.cpuid
    }

    /// The frequency of its TSC in kHz.
    pub fn tsc_khz(&self) -> u32 {
        self.fixed.tsc_khz
    }

    /// The state as bytes: KVM's structures, one after the other.
    pub fn encode(&self) -> Vec<u8> {
        let Self {
            fixed,
            xsave,
            cpuid,
            msrs,
        } = self;
        [fixed.as_bytes(), xsave, cpuid.as_bytes(), msrs.as_bytes()].concat()
    }

    /// The state that [`Self::encode`] wrote. Counts are checked before anything is allocated.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let (fixed, mut rest) = FixedState::read_from_prefix(bytes).map_err(|_| DecodeError)?;
        let [cpuid, msrs, xsave] = fixed.counts.map(|count| count as usize);
        if !(1..=KVM_MAX_CPUID_ENTRIES).contains(&cpuid)
            || msrs > MSRS_MAX
            || !(XSAVE_MIN..=XSAVE_MAX).contains(&xsave)
            || !xsave.is_multiple_of(size_of::<u32>())
        {
            return Err(DecodeError);
        }
        let state = Self {
            fixed,
            xsave: rest.split_off(..xsave).ok_or(DecodeError)?.to_vec(),
            cpuid: take(&mut rest, cpuid)?,
            msrs: take(&mut rest, msrs)?,
        };
        rest.is_empty().then_some(state).ok_or(DecodeError)
    }
}

fn take<T: FromBytes>(rest: &mut &[u8], count: usize) -> Result<Vec<T>, DecodeError> {
    let mut one = || {
        let (value, behind) = T::read_from_prefix(rest).map_err(|_| DecodeError)?;
        *rest = behind;
        Ok(value)
    };
    (0..count).map(|_| one()).collect()
}

fn restore_tsc_frequency(
    fd: &VcpuFd,
    saved: u32,
    support: &StateSupport,
) -> Result<(), StateError> {
    let host = fd.get_tsc_khz().map_err(refused("KVM_GET_TSC_KHZ"))?;
    let difference = u64::from(saved.abs_diff(host)) * 1_000_000;
    if difference <= TSC_TOLERANCE_PPM * u64::from(host) {
        return Ok(());
    }
    if !support.tsc_control {
        return Err(StateError::TscFrequency(saved, host));
    }
    fd.set_tsc_khz(saved).map_err(refused("KVM_SET_TSC_KHZ"))
}

#[allow(unsafe_code, reason = "KVM decides how much of the area it writes")]
fn save_xsave(fd: &VcpuFd, len: usize) -> Result<Vec<u8>, StateError> {
    if len == XSAVE_MIN {
        let xsave = fd.get_xsave().map_err(refused("KVM_GET_XSAVE"))?;
        return Ok(xsave.region.as_bytes().to_vec());
    }
    let mut area = new_area(len)?;
    // SAFETY: the area has the size that KVM_CAP_XSAVE2 names.
    unsafe { fd.get_xsave2(&mut area) }.map_err(refused("KVM_GET_XSAVE2"))?;
    let mut bytes = area.as_fam_struct_ref().xsave.region.as_bytes().to_vec();
    bytes.extend_from_slice(area.as_slice().as_bytes());
    bytes.truncate(len);
    Ok(bytes)
}

#[allow(unsafe_code, reason = "KVM decides how much of the area it reads")]
fn restore_xsave(fd: &VcpuFd, saved: &[u8], len: usize) -> Result<(), StateError> {
    // KVM reads as much as it wants, whatever there is.
    if saved.len() != len {
        return Err(StateError::XsaveSize(saved.len(), len));
    }
    let mut area = new_area(len)?;
    let (region, extra) = saved
        .split_at_checked(XSAVE_MIN)
        .ok_or(StateError::Nonsense("XSAVE"))?;
    let words = area.as_mut_slice().as_mut_bytes();
    let extra_len = extra.len();
    words
        .get_mut(..extra_len)
        .ok_or(StateError::Nonsense("XSAVE"))?
        .copy_from_slice(extra);
    // SAFETY: the length of the flexible array is not touched.
    let fixed = unsafe { area.as_mut_fam_struct() };
    fixed.xsave.region.as_mut_bytes().copy_from_slice(region);
    // SAFETY: the area has the size that KVM_CAP_XSAVE2 names.
    unsafe { fd.set_xsave2(&area) }.map_err(refused("KVM_SET_XSAVE"))
}

fn new_area(len: usize) -> Result<Xsave, StateError> {
    let words = len.saturating_sub(XSAVE_MIN).div_ceil(size_of::<u32>());
    Xsave::new(words).map_err(|_| StateError::Nonsense("XSAVE"))
}

fn read_msrs(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, StateError> {
    get_msrs(fd, indices).map_err(refused("KVM_GET_MSRS"))
}

/// Sets MSRs in their order. One that KVM does not set is an error unless it has the value.
fn set_msrs(fd: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), StateError> {
    let mut rest = entries;
    while !rest.is_empty() {
        let msrs = Msrs::from_entries(rest).map_err(|_| StateError::Nonsense("list of MSRs"))?;
        let count = fd.set_msrs(&msrs).map_err(refused("KVM_SET_MSRS"))?;
        rest = rest.get(count..).unwrap_or_default();
        if let Some((refused, behind)) = rest.split_first() {
            let now = read_msrs(fd, &[refused.index])?;
            if now.first().is_none_or(|now| now.data != refused.data) {
                return Err(StateError::Msr(refused.index));
            }
            rest = behind;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use zerocopy::FromZeros;

    fn state() -> VcpuState {
        let mut fixed = FixedState::new_zeroed();
        fixed.tsc_khz = 2_000_000;
        fixed.counts = [3, 2, XSAVE_MIN as u32 + 8];
        fixed.regs.rip = 0x1234;
        VcpuState {
            fixed,
            xsave: vec![7; XSAVE_MIN + 8],
            cpuid: vec![kvm_cpuid_entry2::default(); 3],
            msrs: vec![msr(IA32_TSC, 1000), msr(IA32_TSC_DEADLINE, 9)],
        }
    }

    #[test]
    fn what_is_encoded_is_decoded() {
        let bytes = state().encode();
        let decoded = VcpuState::decode(&bytes).unwrap();
        assert_eq!(decoded.encode(), bytes);
        assert_eq!(decoded.fixed.regs.rip, 0x1234);
        assert_eq!(decoded.msrs[1].data, 9);
    }

    #[test]
    fn every_cut_and_every_count_too_large_is_refused() {
        let bytes = state().encode();
        for len in 0..bytes.len() {
            assert!(VcpuState::decode(&bytes[..len]).is_err(), "{len}");
        }
        assert!(VcpuState::decode(&[&bytes[..], &[0]].concat()).is_err());
        for (field, values) in [
            (1, [0, 257, u32::MAX]),
            (2, [1025, 1 << 20, u32::MAX]),
            (3, [0, 4092, u32::MAX]),
        ] {
            for value in values {
                let mut bytes = bytes.clone();
                bytes[field * 4..][..4].copy_from_slice(&value.to_le_bytes());
                assert!(VcpuState::decode(&bytes).is_err(), "{field}: {value}");
            }
        }
    }

    #[test]
    fn the_tsc_advances_at_its_frequency() {
        let mut state = state();
        state.advance_tsc(1_000_000);
        assert_eq!(state.msrs[0].data, 2_001_000);
        assert_eq!(state.msrs[1].data, 9);
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..20_000)) {
            let _ = VcpuState::decode(&bytes);
        }
    }
}
