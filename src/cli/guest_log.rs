//! What minivmm says of its guest while that runs: the boot marks that it writes, and that nothing will wake it.

use std::io;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use crate::arch::sleep::Sleep;
use crate::vmm::vm::Vm;

/// How often, with `-v`, the VM is asked whether anything can wake its guest.
const SLEEP_CHECK: Duration = Duration::from_secs(2);

/// Boot marks on their way to the log: the vCPU that writes one has the port's lock, and stderr may have a reader who does not read.
pub(super) struct MarkLog {
    marks: Receiver<u8>,
    /// Readable when there are marks.
    pub(super) written: EventFd,
}

impl MarkLog {
    /// Marks that wait at most; more are not logged.
    const CAPACITY: usize = 64;

    /// The log, and what to call with a mark.
    pub(super) fn new() -> io::Result<(Self, impl Fn(u8) + Send + Sync + 'static)> {
        let (sender, marks) = sync_channel(Self::CAPACITY);
        let written = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let wake = written.try_clone()?;
        let observe = move |mark| {
            if log::log_enabled!(log::Level::Info) && sender.try_send(mark).is_ok() {
                // An eventfd refuses a write only when its counter is full; then its reader is awake.
                let _ = wake.write(1);
            }
        };
        Ok((Self { marks, written }, observe))
    }

    /// Logs what has come.
    pub(super) fn emit(&self) {
        let _ = self.written.read();
        for mark in self.marks.try_iter() {
            log::info!("boot mark {mark}");
        }
    }
}

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
