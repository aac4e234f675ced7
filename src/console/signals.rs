//! The process's signals, as a file descriptor; the terminal is lent to the shell while the process is stopped.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::terminal;

/// Signals that stop the VM cleanly: all that users, supervisors, timers and limits send to terminate a process. Not among them
/// are synchronous faults, and SIGABRT, with which a supervisor asks for a core dump.
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
                libc::SIGCONT => terminal::reenter_raw(),
                libc::SIGWINCH => {}
                libc::SIGTSTP => {
                    terminal::lend_terminal();
                    stop_self();
                }
                signal => return Some(signal),
            }
        }
        None
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The default action of SIGTSTP: stops the process, unless its process group is orphaned.
fn stop_self() {
    let stop = SigSet::from(Signal::SIGTSTP);
    // To the process: it is this thread that takes it, since all others block it.
    let sent =
        rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::TSTP);
    let stopped = sent
        .map_err(|e| nix::errno::Errno::from_raw(e.raw_os_error()))
        .and_then(|()| stop.thread_unblock())
        .and_then(|()| stop.thread_block());
    if let Err(e) = stopped {
        log::warn!("cannot stop at SIGTSTP: {e}");
    }
    // It may not have stopped, and then no SIGCONT comes.
    terminal::reenter_raw();
}

#[allow(unsafe_code, reason = "no safe interface reads an action")]
fn is_ignored(signal: Signal) -> bool {
    // SAFETY: an all-zero sigaction is a valid value.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: with a null new action, sigaction only writes the current one to `action`, which is ours.
    let result = unsafe { libc::sigaction(signal as i32, std::ptr::null(), &mut action) };
    result == 0 && action.sa_sigaction == libc::SIG_IGN
}
