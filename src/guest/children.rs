//! The processes of the guest. All that lose their parent become children of the first process, which reaps them.

use std::collections::HashMap;
use std::io;
use std::process::Command;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use rustix::io::Errno;
use rustix::process::{
    Pid, Signal, WaitId, WaitIdOptions, WaitOptions, WaitStatus, kill_process_group, wait, waitid,
};

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
            // Leaves it to be reaped.
            let ended = waitid(WaitId::All, WaitIdOptions::EXITED | WaitIdOptions::NOWAIT);
            match ended {
                Ok(_) => {
                    let mut started = self.started();
                    if let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG)
                        && let Some(tell) = started.remove(&pid)
                    {
                        // It fails where nobody waits for it.
                        let _ = tell.send(status_of(status));
                    }
                }
                Err(Errno::INTR) => {}
                // There is no child.
                Err(_) => {
                    let started = self.started();
                    let none = |started: &mut Started| started.is_empty();
                    let waited = self.0.new.wait_while(started, none);
                    drop(waited.unwrap_or_else(PoisonError::into_inner));
                }
            }
        }
    }
}

/// Sends a program's process group the signal with this number, if there is one.
pub(super) fn send_signal(group: Pid, number: u8) {
    if let Some(signal) = Signal::from_named_raw(number.into()) {
        let _ = kill_process_group(group, signal);
    }
}

fn status_of(status: WaitStatus) -> u8 {
    let signal = status.terminating_signal().map(|signal| 128 + signal);
    let status = status.exit_status().or(signal).unwrap_or(125);
    u8::try_from(status).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::waitpid;

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
