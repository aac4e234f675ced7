//! The main thread while the VM runs: console input, signals, the deadline and the VM's end.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use minivmm_devices::chardev::ConsoleDevice;
use nix::sys::signal::{SigSet, Signal, raise};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::console::{self, ConsoleInput, InputOutcome};
use crate::vmm::outcome::Outcome;
use crate::vmm::vcpu::Control;

/// Signals that end the VM in good order: all that are sent to end a process, by people, supervisors, timers and limits. What
/// an instruction sets off is not among them, nor is SIGABRT, by which a supervisor asks for a core dump.
const STOP_SIGNALS: [Signal; 13] = [
    Signal::SIGINT,
    Signal::SIGTERM,
    Signal::SIGHUP,
    Signal::SIGQUIT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGALRM,
    Signal::SIGVTALRM,
    Signal::SIGPROF,
    Signal::SIGSTKFLT,
    Signal::SIGIO,
    Signal::SIGPWR,
    Signal::SIGXCPU,
];

/// The process's signals, as a file descriptor.
pub struct Signals(SignalFd);

impl Signals {
    /// Blocks the signals in this thread and all that it starts, and takes them from a file descriptor instead. To be
    /// called before any other thread is there.
    ///
    /// What the parent has had ignored stays so: nohup does that to SIGHUP, a shell to its background's SIGINT.
    pub fn block() -> io::Result<Self> {
        let mut set: SigSet = STOP_SIGNALS
            .into_iter()
            .chain([Signal::SIGTSTP])
            .filter(|signal| !is_ignored(*signal))
            .collect();
        set.add(Signal::SIGCONT);
        set.add(Signal::SIGWINCH);
        set.thread_block()?;
        // A file size limit (ulimit -f) that the console's file reaches is a failed write, not an end.
        SigSet::from(Signal::SIGXFSZ).thread_block()?;
        Ok(Self(SignalFd::with_flags(
            &set,
            SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC,
        )?))
    }

    /// No signals at all, for tests that must not change those of their process.
    #[cfg(test)]
    pub(crate) fn none() -> io::Result<Self> {
        Ok(Self(SignalFd::with_flags(
            &SigSet::empty(),
            SfdFlags::SFD_NONBLOCK,
        )?))
    }

    /// The next signal that asks minivmm to end, if one has come. The terminal is lent to the shell for the time that
    /// minivmm is stopped.
    pub fn stop_requested(&self) -> Option<i32> {
        while let Ok(Some(info)) = self.0.read_signal() {
            match info.ssi_signo as i32 {
                libc::SIGCONT => console::reenter_raw(),
                libc::SIGWINCH => {}
                libc::SIGTSTP => {
                    console::lend_terminal();
                    stop_self();
                }
                signal => return Some(signal),
            }
        }
        None
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Does what SIGTSTP does by default: stops the process, unless nobody is there to have it go on (POSIX calls its process
/// group orphaned).
fn stop_self() {
    let stop = SigSet::from(Signal::SIGTSTP);
    let stopped = raise(Signal::SIGTSTP)
        .and_then(|()| stop.thread_unblock())
        .and_then(|()| stop.thread_block());
    if let Err(e) = stopped {
        log::warn!("cannot stop at SIGTSTP: {e}");
    }
    // It may not have stopped, and then no SIGCONT comes.
    console::reenter_raw();
}

#[allow(
    unsafe_code,
    reason = "no safe interface reads what is done about a signal"
)]
fn is_ignored(signal: Signal) -> bool {
    // SAFETY: an all-zero sigaction is a valid value.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: with a null new action, sigaction only writes the current one to `action`, which is ours.
    let result = unsafe { libc::sigaction(signal as i32, std::ptr::null(), &mut action) };
    result == 0 && action.sa_sigaction == libc::SIG_IGN
}

/// What the event loop waits for.
#[derive(Clone, Copy)]
enum Source {
    Ended,
    Signal,
    Input,
    GuestReady,
}

/// The main thread's loop for one run of a VM.
pub struct EventLoop<'a> {
    epoll: Epoll,
    control: &'a Control,
    signals: &'a Signals,
    input: &'a mut ConsoleInput,
    guest_ready: Arc<EventFd>,
    deadline: Option<Instant>,
}

impl<'a> EventLoop<'a> {
    /// Registers all sources. `guest_ready` is written when the guest can take more console input.
    pub fn new(
        control: &'a Control,
        signals: &'a Signals,
        input: &'a mut ConsoleInput,
        guest_ready: Arc<EventFd>,
        deadline: Option<Instant>,
    ) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let add = |fd: RawFd, events, source: Source| {
            epoll.ctl(
                ControlOperation::Add,
                fd,
                EpollEvent::new(events, source as u64),
            )
        };
        add(control.ended().as_raw_fd(), EventSet::IN, Source::Ended)?;
        add(signals.0.as_raw_fd(), EventSet::IN, Source::Signal)?;
        add(guest_ready.as_raw_fd(), EventSet::IN, Source::GuestReady)?;
        if let Some(fd) = input.fd() {
            match add(
                fd.as_raw_fd(),
                EventSet::IN | EventSet::EDGE_TRIGGERED,
                Source::Input,
            ) {
                // A regular file or /dev/null: always ready, so the guest's readiness is all there is to wait for.
                Err(e) if e.raw_os_error() == Some(libc::EPERM) => {}
                result => result?,
            }
        }
        Ok(Self {
            epoll,
            control,
            signals,
            input,
            guest_ready,
            deadline,
        })
    }

    /// Runs until the VM has ended.
    pub fn run(mut self, console: &Mutex<dyn ConsoleDevice>) -> io::Result<()> {
        let mut events = [EpollEvent::default(); 4];
        // A restarted VM may find input that was read from no edge of its own.
        self.pump(console);
        loop {
            let timeout = match self.deadline {
                None => -1,
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        self.control.end(Outcome::Deadline);
                        return Ok(());
                    }
                    // Rounded up, so that the last millisecond is not spun away.
                    i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX)
                }
            };
            let count = match self.epoll.wait(timeout, &mut events) {
                Ok(count) => count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            };
            for event in events.iter().take(count) {
                match event.data() {
                    d if d == Source::Ended as u64 => return Ok(()),
                    d if d == Source::Signal as u64 => {
                        if let Some(signal) = self.signals.stop_requested() {
                            self.control.end(Outcome::Signal(signal));
                            return Ok(());
                        }
                        // After a SIGCONT there may be input that gave no event, and a terminal of another size.
                        if let Some(size) = self.input.terminal_size() {
                            lock(console).resize(size);
                        }
                        self.pump(console);
                    }
                    d => {
                        if d == Source::GuestReady as u64 {
                            let _ = self.guest_ready.read();
                        }
                        self.pump(console);
                    }
                }
            }
        }
    }

    fn pump(&mut self, console: &Mutex<dyn ConsoleDevice>) {
        if self.input.pump(console) == InputOutcome::Quit {
            self.control.end(Outcome::Quit);
        }
    }
}

fn lock<C: ?Sized>(console: &Mutex<C>) -> MutexGuard<'_, C> {
    console.lock().unwrap_or_else(PoisonError::into_inner)
}
