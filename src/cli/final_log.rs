//! What is said of a VM that has ended, once its console is done.

use std::sync::PoisonError;

use crate::observe::post_mortem::{self, CrashReport};
use crate::vmm::control::End;
use crate::vmm::ending;
use crate::vmm::outcome::Outcome;
use crate::vmm::vm::Vm;

/// What is to be logged when a VM has ended and its console is done.
pub(super) type FinalLog = Vec<(log::Level, String)>;

/// What a VM that has ended came to, for the log.
pub(super) fn summary(vm: &Vm) -> String {
    let (pio, mmio) = (&vm.machine().buses.pio, &vm.machine().buses.mmio);
    format!(
        "vCPU exits: {}; unclaimed accesses: {} reads, {} writes",
        vm.vcpus().iter().map(|v| v.exits).sum::<u64>(),
        pio.unclaimed_reads() + mmio.unclaimed_reads(),
        pio.unclaimed_writes() + mmio.unclaimed_writes(),
    )
}

pub(super) fn emit(lines: FinalLog) {
    for (level, text) in lines {
        log::log!(level, "{text}");
    }
}

/// Why the VM ended, and what to say of it.
pub(super) fn explain(
    vm: &Vm,
    end: &End,
    interrupted: Option<Outcome>,
    saw_panic: bool,
    summary: &str,
) -> (Outcome, FinalLog) {
    let (mut outcome, unheard) = ending::decide(vm, end, saw_panic);
    // A guest that ended by itself has its own status, but is not booted again.
    if let (Outcome::Reset, Some(stop)) = (&outcome, interrupted) {
        outcome = stop;
    }
    let first = format!("the VM ended: {outcome:?}; {summary}");
    let mut lines = vec![(log::Level::Info, first)];
    if let Some(message) = unheard {
        let console = vm.config().console.parameter();
        let error = format!(
            "the guest's kernel panicked, and did not say so on the console: {message}; does its command line name \
             {console}?"
        );
        lines.push((log::Level::Error, error));
    }
    let serial = vm.serial().lock().unwrap_or_else(PoisonError::into_inner);
    let lost = serial.dropped();
    if lost > 0 {
        let warning = format!(
            "{lost} bytes of console output were lost: the guest did not wait for their reader"
        );
        lines.push((log::Level::Warn, warning));
    }
    (outcome, lines)
}

/// The report on a guest that died or was stopped, where one is wanted.
pub(super) fn report(
    vm: &Vm,
    end: &End,
    outcome: &Outcome,
    console_bytes: u64,
) -> Option<(log::Level, String)> {
    let level = post_mortem::level(outcome, console_bytes)?;
    let vcpu = vm.vcpus().get(usize::from(end.vcpu.unwrap_or(0)))?;
    let report = CrashReport {
        outcome,
        vcpu,
        vm,
        console_bytes,
    };
    let text = || format!("{}\n{}", report.headline(), report.report());
    log::log_enabled!(level).then(|| (level, text()))
}
