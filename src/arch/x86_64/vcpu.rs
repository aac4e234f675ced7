//! A vCPU's state: its setup for boot, and what is read from it after the guest has ended.

use std::fmt;

use kvm_bindings::{CpuId, Msrs, kvm_regs, kvm_sregs};
use kvm_ioctls::VcpuFd;

use super::regs::Entry;
use super::{cpuid, msrs, regs};

/// Why a vCPU's state cannot be set.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// An ioctl failed.
    #[error("{0} failed")]
    Refused(&'static str, #[source] kvm_ioctls::Error),
    /// KVM rejected an MSR.
    #[error("KVM_SET_MSRS failed at MSR {0:#x}")]
    Msr(u32),
    /// A part of a saved state is impossible.
    #[error("the saved {0} is impossible")]
    Nonsense(&'static str),
    /// Saved by a KVM with another size of XSAVE state.
    #[error("it has {0} bytes of XSAVE state, and this host's KVM takes {1}")]
    XsaveSize(usize, usize),
    /// Saved on a host with another TSC, and this one's cannot be scaled.
    #[error("its TSC runs at {0} kHz, this host's at {1} kHz, and KVM cannot scale it")]
    TscFrequency(u32, u32),
    /// Nothing was saved of this vCPU.
    #[error("no state of it was saved")]
    Missing,
    /// What KVM keeps of a guest's own guests is not saved.
    #[error("the guest has turned its own virtualization on, which cannot be saved")]
    Nested,
}

pub(super) fn refused(ioctl: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> StateError {
    move |source| StateError::Refused(ioctl, source)
}

/// Gives vCPU `index` of `cpus` its state at boot. `entry` is for the boot vCPU only; the others wait for their start-up IPI.
pub fn set_up(
    fd: &VcpuFd,
    index: u8,
    cpus: u8,
    supported: &CpuId,
    tsc_deadline: bool,
    entry: Option<Entry>,
) -> Result<(), StateError> {
    fd.set_cpuid2(&cpuid::vcpu_cpuid(supported, index, cpus, tsc_deadline))
        .map_err(refused("KVM_SET_CPUID2"))?;
    let entries = msrs::boot_msrs();
    if let Ok(list) = Msrs::from_entries(&entries) {
        let set = fd.set_msrs(&list).map_err(refused("KVM_SET_MSRS"))?;
        if let Some(refused) = entries.get(set) {
            return Err(StateError::Msr(refused.index));
        }
    }
    let Some(entry) = entry else {
        return Ok(());
    };
    let sregs = fd.get_sregs().map_err(refused("KVM_GET_SREGS"))?;
    let (regs, sregs) = regs::boot_registers(entry, sregs);
    fd.set_sregs(&sregs).map_err(refused("KVM_SET_SREGS"))?;
    fd.set_regs(&regs).map_err(refused("KVM_SET_REGS"))?;
    fd.set_fpu(&regs::boot_fpu())
        .map_err(refused("KVM_SET_FPU"))
}

/// Whether the vCPU is in its state after INIT.
pub fn is_at_reset_vector(fd: &VcpuFd) -> bool {
    let registers = fd.get_regs().and_then(|r| Ok((r, fd.get_sregs()?)));
    registers.is_ok_and(|(regs, sregs)| regs::are_at_reset_vector(&regs, &sregs))
}

/// Whether a triple fault may be Linux's `reboot=t`, which loads an IDT with limit 0 (arch/x86/kernel/idt.c, idt_invalidate).
/// AMD processors reset the IDT limit on a triple fault, so there every one counts.
pub fn may_have_reset_by_triple_fault(fd: &VcpuFd) -> bool {
    let invalidated = |sregs: kvm_sregs| sregs.idt.limit == 0;
    is_at_reset_vector(fd) || fd.get_sregs().is_ok_and(invalidated)
}

/// Whether the vCPU's kvm-clock is enabled. Linux disables it before an orderly reboot, but not before a reset after a panic
/// (arch/x86/kernel/kvm.c, kvm_guest_cpu_offline).
pub fn has_kvm_clock_on(fd: &VcpuFd) -> bool {
    const MSR_KVM_SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;
    const ENABLED: u64 = 1;
    msrs::get_msr(fd, MSR_KVM_SYSTEM_TIME_NEW).is_ok_and(|msr| msr & ENABLED != 0)
}

/// Registers for a post-mortem; they are shown as a few lines.
pub struct Registers(kvm_regs, kvm_sregs);

impl Registers {
    /// Asks KVM.
    pub fn read(fd: &VcpuFd) -> Result<Self, kvm_ioctls::Error> {
        Ok(Self(fd.get_regs()?, fd.get_sregs()?))
    }

    /// RIP; `None` after a reset.
    pub fn instruction_pointer(&self) -> Option<u64> {
        (!regs::are_at_reset_vector(&self.0, &self.1)).then_some(self.0.rip)
    }
}

impl fmt::Display for Registers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(regs, sregs) = self;
        if self.instruction_pointer().is_none() {
            return f.write_str(
                "registers: those after a reset (AMD processors do not keep the others at a triple fault)",
            );
        }
        let rows = [
            [
                ("rip", regs.rip),
                ("rsp", regs.rsp),
                ("rflags", regs.rflags),
            ],
            [("rax", regs.rax), ("rbx", regs.rbx), ("rcx", regs.rcx)],
            [("rdx", regs.rdx), ("rsi", regs.rsi), ("rdi", regs.rdi)],
            [("cr0", sregs.cr0), ("cr2", sregs.cr2), ("cr3", sregs.cr3)],
            [
                ("cr4", sregs.cr4),
                ("efer", sregs.efer),
                ("cs", sregs.cs.selector.into()),
            ],
        ];
        let row = |row: &[(&str, u64); 3]| {
            row.map(|(name, value)| format!("{name:>6}={value:#018x}"))
                .join(" ")
        };
        f.write_str(&rows.iter().map(row).collect::<Vec<_>>().join("\n"))
    }
}
