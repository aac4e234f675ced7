//! The processes of the guest. All that lose their parent become children of the first process, which reaps them.
#![allow(
    unsafe_code,
    reason = "no safe interface looks at a child that has ended and leaves it"
)]

use std::collections::HashMap;
use std::io;
use std::process::Command;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use rustix::process::{Pid, WaitOptions, WaitStatus, waitpid};

/// Programs that were started here, and who is told of their exit statuses.
type Started = HashMap<Pid, Sender<u8>>;

/// See the module.
#[derive(Clone, Default)]
pub(super) struct Children(Arc<Shared>);

#[derive(Default)]
struct Shared {
    started: Mutex<Started>,
    new: Condvar,
}

impl Children {
    /// Reaps children from now on.
    pub(super) fn reap() -> Self {
        let children = Self::default();
        let reaper = children.clone();
        thread::spawn(move || reaper.reap_all());
        children
    }

    /// Starts a program. Its exit status comes, as a shell has it, when it has ended.
    pub(super) fn spawn(&self, command: &mut Command) -> io::Result<(Pid, Receiver<u8>)> {
        let (tell, status) = channel();
        // A child that cannot become the program is waited for here: nothing is reaped meanwhile.
        let mut started = self.started();
        let child = command.spawn()?;
        let pid = Pid::from_child(&child);
        started.insert(pid, tell);
        self.0.new.notify_one();
        Ok((pid, status))
    }

    fn started(&self) -> MutexGuard<'_, Started> {
        (self.0.started.lock()).unwrap_or_else(PoisonError::into_inner)
    }

    fn reap_all(&self) {
        loop {
            match ended_child() {
                Ok(Some(pid)) => {
                    let mut started = self.started();
                    if let Ok(Some((_, status))) = waitpid(Some(pid), WaitOptions::NOHANG)
                        && let Some(tell) = started.remove(&pid)
                    {
                        // It fails where nobody waits for it.
                        let _ = tell.send(status_of(status));
                    }
                }
                Ok(None) => {}
                // There is no child.
                Err(_) => {
                    let started = self.started();
                    let none = |started: &mut Started| started.is_empty();
                    let wait = self.0.new.wait_while(started, none);
                    drop(wait.unwrap_or_else(PoisonError::into_inner));
                }
            }
        }
    }
}

/// Waits for a child to end, and leaves it to be reaped. An error if there is no child.
fn ended_child() -> io::Result<Option<Pid>> {
    // SAFETY: an all-zero siginfo is a valid value.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes a siginfo, which lives until the call returns.
    let result = unsafe { libc::waitid(libc::P_ALL, 0, &mut info, libc::WEXITED | libc::WNOWAIT) };
    if result != 0 {
        let error = io::Error::last_os_error();
        return match error.kind() {
            io::ErrorKind::Interrupted => Ok(None),
            _ => Err(error),
        };
    }
    // SAFETY: waitid has filled it in, for a child.
    Ok(Pid::from_raw(unsafe { info.si_pid() }))
}

fn status_of(status: WaitStatus) -> u8 {
    let signal = status.terminating_signal().map(|signal| 128 + signal);
    let status = status.exit_status().or(signal).unwrap_or(125);
    u8::try_from(status).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(clippy::zombie_processes, reason = "waitpid takes it")]
    fn a_status_is_what_a_shell_has() {
        for (script, wanted) in [("exit 3", 3), ("kill -9 $$", 137)] {
            let child = Command::new("sh").args(["-c", script]).spawn().unwrap();
            let pid = Pid::from_child(&child);
            let ended = waitpid(Some(pid), WaitOptions::empty()).unwrap();
            assert_eq!(status_of(ended.unwrap().1), wanted);
        }
    }
}
