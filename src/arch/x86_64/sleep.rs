//! Tells a vCPU that has halted for good from one that idles, by what can wake it.

use kvm_bindings::{KVM_MP_STATE_HALTED, KVM_MP_STATE_UNINITIALIZED};
use kvm_ioctls::{Error, VcpuFd};

use super::msrs::{IA32_TSC_DEADLINE, get_msr};

/// RFLAGS, bit 9: interrupts are taken.
const RFLAGS_IF: u64 = 1 << 9;

/// The local APIC's timer, by offset in its page: vector table entry, initial and current count (SDM vol. 3 § 11.5.4).
const LVT_TIMER: usize = 0x320;
const INITIAL_COUNT: usize = 0x380;
const CURRENT_COUNT: usize = 0x390;
const LVT_MASKED: u32 = 1 << 16;

/// How deeply a vCPU sleeps.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Sleep {
    /// It runs, or its timer will wake it.
    #[default]
    Awake,
    /// Only an interrupt from a device or another vCPU can wake it.
    NoTimer,
    /// Nothing but an NMI or INIT can wake it: interrupts are off, or it has not been started.
    ForGood,
}

impl Sleep {
    /// Of a vCPU that is not in KVM_RUN.
    pub fn of(vcpu: &VcpuFd) -> Result<Self, Error> {
        match vcpu.get_mp_state()?.mp_state {
            KVM_MP_STATE_UNINITIALIZED => Ok(Self::ForGood),
            KVM_MP_STATE_HALTED if vcpu.get_regs()?.rflags & RFLAGS_IF == 0 => Ok(Self::ForGood),
            KVM_MP_STATE_HALTED if !is_timer_armed(vcpu)? => Ok(Self::NoTimer),
            _ => Ok(Self::Awake),
        }
    }
}

fn is_timer_armed(vcpu: &VcpuFd) -> Result<bool, Error> {
    let apic = vcpu.get_lapic()?;
    let register = |offset: usize| {
        let bytes = apic.regs.get(offset..offset + 4).unwrap_or_default();
        (bytes.iter().rev()).fold(0, |value, byte| value << 8 | u32::from(*byte as u8))
    };
    let lvt = register(LVT_TIMER);
    Ok(lvt & LVT_MASKED == 0
        && match lvt >> 17 & 3 {
            0 => register(CURRENT_COUNT) != 0,
            1 => register(INITIAL_COUNT) != 0,
            _ => get_msr(vcpu, IA32_TSC_DEADLINE)? != 0,
        })
}
