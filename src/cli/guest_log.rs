//! What minivmm says of its guest while that runs: that nothing will wake it.

use std::time::{Duration, Instant};

use crate::arch::sleep::Sleep;
use crate::vmm::vm::Vm;

/// How often, with `-v`, the VM is asked whether anything can wake its guest.
const SLEEP_CHECK: Duration = Duration::from_secs(2);

/// Tells the user, once, of a guest that nothing will wake: it looks as if it idled.
pub(super) struct SleepCheck {
    pub(super) next: Instant,
    told: Sleep,
}

impl SleepCheck {
    pub(super) fn new() -> Self {
        Self {
            next: Instant::now() + SLEEP_CHECK,
            told: Sleep::Awake,
        }
    }

    /// Asks, if it is time.
    pub(super) fn look(&mut self, vm: &Vm, now: Instant) {
        if now < self.next {
            return;
        }
        self.next = now + SLEEP_CHECK;
        let sleep = vm.sleep();
        if sleep <= self.told {
            return;
        }
        self.told = sleep;
        match sleep {
            Sleep::ForGood => log::info!(
                "the guest has halted with interrupts off: nothing will wake it (a signal or Ctrl-A x ends minivmm)"
            ),
            _ => log::info!(
                "the guest sleeps without a timer: only a device can wake it, as a key does"
            ),
        }
    }
}
