//! Why a VM ended: what a device, a vCPU or a signal reported, and what the guest's state says of it.

use std::sync::Arc;

use super::control::End;
use super::outcome::{Outcome, VcpuFailure};
use super::vm::Vm;
use crate::arch;
use crate::boot;

/// Decides why a VM ended, for which [`Vm::join`] gives `end`. `saw_panic` says whether the panic of a kernel is on the console. With
/// the outcome comes the message of a panic that is not.
pub fn decide(vm: &Vm, end: &End, saw_panic: bool) -> (Outcome, Option<String>) {
    let culprit = vm.vcpus().get(usize::from(end.vcpu.unwrap_or(0)));
    let is_reset = match end.outcome {
        Outcome::Reset => true,
        Outcome::VcpuFailed(VcpuFailure::TripleFault) => {
            boot::reboots_by_triple_fault(vm.cmdline())
                && culprit.is_some_and(|vcpu| arch::vcpu::may_have_reset_by_triple_fault(&vcpu.fd))
        }
        _ => false,
    };
    if !is_reset {
        return (end.outcome.clone(), None);
    }
    // Early in its boot a kernel cannot tell pvpanic: the panic is a line on the console, then a reset.
    if saw_panic {
        return (Outcome::Panicked, None);
    }
    // If nobody hears that console, the line is still in its log.
    let mut vcpus = vm.vcpus().iter();
    let abrupt = vcpus.any(|vcpu| arch::vcpu::has_kvm_clock_on(&vcpu.fd));
    match abrupt.then(|| panic_message(vm)).flatten() {
        Some(message) => (Outcome::Panicked, Some(message)),
        None => (Outcome::Reset, None),
    }
}

/// The message of the panic that the guest's kernel has in its log.
pub fn panic_message(vm: &Vm) -> Option<String> {
    boot::panic_message(vm.mem(), &vm.kernel().kernel_range)
}

/// What to do after what looks like the last line of a panic, after which a kernel hangs: end, unless somebody prints an old log,
/// which the kernel's own does not have.
pub fn on_panic_end(vm: &Vm) -> Arc<dyn Fn() + Send + Sync> {
    let (mem, kernel) = (vm.mem().clone(), vm.kernel().kernel_range.clone());
    let control = Arc::clone(vm.control());
    Arc::new(move || {
        if boot::panic_message(&mem, &kernel).is_some() {
            control.end(Outcome::Panicked);
        }
    })
}
