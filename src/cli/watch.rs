//! Signals and the deadline while a VM is prepared: the event loop, which looks at them later, is not there yet.
//!
//! Preparing a VM can take long, or for ever: KVM allocates tables for terabytes of memory, a kernel lies on a file server that
//! does not answer. A thread blocked in the host's kernel sees only fatal signals, so another thread watches: the boot
//! vCPU's, which has nothing else to do before there is a VM.

use std::io;
use std::os::fd::OwnedFd;
use std::process;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use minivmm_devices::THREAD_STACK;
use minivmm_devices::thread::{ThreadKind, ThreadStarter};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::exit_status::exit_status;
use crate::console::{self, Console, Signals};
use crate::vmm::control::Control;
use crate::vmm::outcome::Outcome;
use crate::vmm::vcpu::{Job, Join, Vcpu};

/// After an external stop, drain the console for at most 100 ms.
pub(super) const DRAIN_TIMEOUT: Duration = Duration::from_millis(100);

/// How long preparation may take to finish after a stop, so that the VM is torn down in order: 50 ms.
const GRACE: Duration = Duration::from_millis(50);

/// The boot vCPU's thread before it has its vCPU. It ends the process at a signal that asks for it, or when the deadline
/// passes. Dropping this ends the watch.
pub struct Watch {
    signals: Arc<Signals>,
    remote: Remote,
    thread: JoinHandle<Option<Vcpu>>,
}

/// Gives the thread its orders. Dropping it ends the watch.
struct Remote(Arc<Shared>);

struct Shared {
    /// Written when `orders` have changed.
    changed: OwnedFd,
    orders: Mutex<Orders>,
    console: Option<Console>,
}

struct Orders {
    deadline: Option<Instant>,
    /// What makes the thread one for a vCPU.
    threads: Option<ThreadStarter>,
    /// What the thread does once there is a vCPU, and what ends that VM.
    job: Option<(Job, Arc<Control>)>,
    over: bool,
}

impl Watch {
    /// Starts to watch. `console` is that of a guest that is started again.
    pub fn start(
        signals: Arc<Signals>,
        deadline: Option<Instant>,
        console: Option<Console>,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            changed: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?,
            orders: Mutex::new(Orders {
                deadline,
                threads: None,
                job: None,
                over: false,
            }),
            console,
        });
        let (watched, watcher) = (Arc::clone(&signals), Arc::clone(&shared));
        let thread = thread::Builder::new()
            .name("vcpu0".to_owned())
            .stack_size(THREAD_STACK)
            .spawn(move || watcher.run(&watched))?;
        Ok(Self {
            signals,
            remote: Remote(shared),
            thread,
        })
    }

    /// The signals that are watched.
    pub fn signals(&self) -> &Arc<Signals> {
        &self.signals
    }

    /// Moves the deadline.
    pub fn set_deadline(&self, deadline: Option<Instant>) {
        if self.remote.0.orders().deadline != deadline {
            self.remote.give(|orders| orders.deadline = deadline);
        }
    }

    /// Confines the thread, as one of a vCPU: while the VM is made, so that its start need not wait for that. A thread of `threads`
    /// can all that a watch needs.
    pub(super) fn confine(&self, threads: &ThreadStarter) {
        let threads = threads.clone();
        self.remote.give(|orders| orders.threads = Some(threads));
    }

    /// Ends the watch: the thread, which has been told to confine itself, does this instead. The caller looks at signals and
    /// deadline from now on.
    pub fn hand_over(self, job: Job, control: Arc<Control>) -> Join {
        self.remote.give(|orders| orders.job = Some((job, control)));
        let thread = self.thread;
        Box::new(move || thread.join().ok().flatten())
    }
}

impl Remote {
    fn give(&self, change: impl FnOnce(&mut Orders)) {
        change(&mut self.0.orders());
        // An eventfd refuses a write only when its counter is full; then the thread is awake.
        let _ = rustix::io::write(&self.0.changed, &1u64.to_ne_bytes());
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        self.give(|orders| orders.over = true);
    }
}

impl Shared {
    fn orders(&self) -> MutexGuard<'_, Orders> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, signals: &Signals) -> Option<Vcpu> {
        let mut end: Option<(Outcome, Instant)> = None;
        loop {
            let mut orders = self.orders();
            if let Some(threads) = orders.threads.take() {
                drop(orders);
                threads.adopt(ThreadKind::Vcpu);
                continue;
            }
            if let Some((job, control)) = orders.job.take() {
                drop(orders);
                // The end may have come before.
                if let Some((outcome, _)) = end {
                    control.end(outcome);
                }
                return Some(job());
            }
            if orders.over {
                return None;
            }
            let limit = match &end {
                Some((_, limit)) => Some(*limit),
                None => orders.deadline,
            };
            drop(orders);
            let left = limit.map(|limit| limit.saturating_duration_since(Instant::now()));
            let late = left.is_some_and(|left| left.is_zero());
            match &end {
                Some((outcome, _)) if late => self.leave(outcome),
                None if late => end = Some((Outcome::Deadline, Instant::now() + GRACE)),
                _ => self.wait(signals, left),
            }
            if let Some(signal) = signals.stop_requested() {
                end.get_or_insert((Outcome::Signal(signal), Instant::now() + GRACE));
            }
        }
    }

    /// Waits for a signal or a change of orders.
    fn wait(&self, signals: &Signals, limit: Option<Duration>) {
        let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
        let mut sources = [
            PollFd::new(signals, PollFlags::IN),
            PollFd::new(&self.changed, PollFlags::IN),
        ];
        // It fails for EINTR, or when memory is short: then it is tried again.
        let _ = poll(&mut sources, limit.as_ref());
        // Nothing to read is no error: it does not block.
        let _ = rustix::io::read(&self.changed, &mut [0u8; 8]);
    }

    /// Ends the process wherever its main thread is: what it waits for may never come.
    fn leave(&self, outcome: &Outcome) -> ! {
        let limit = Instant::now() + DRAIN_TIMEOUT;
        if let Some(console) = &self.console {
            console.finish(&|| Instant::now() > limit);
        }
        console::restore_terminal();
        match outcome {
            Outcome::Deadline => {
                log::error!("the deadline passed before the guest could be started")
            }
            outcome => log::info!("stopped: {outcome:?}"),
        }
        process::exit(exit_status(outcome).into())
    }
}
