//! Mode log: a thread that is told of each call that would be refused, reports it, and lets it pass.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use minivmm_devices::THREAD_STACK;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use super::refusal::Call;

/// The thread, and where it gets listeners from.
pub(super) struct Supervisor(Arc<Shared>);

struct Shared {
    /// Written when there is a new listener.
    changed: OwnedFd,
    new: Mutex<Vec<OwnedFd>>,
}

impl Supervisor {
    /// Starts the thread, which nothing confines.
    pub(super) fn start() -> io::Result<Self> {
        let shared = Arc::new(Shared {
            changed: eventfd(0, EventfdFlags::CLOEXEC)?,
            new: Mutex::default(),
        });
        let of_thread = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("sandbox-log".to_owned())
            .stack_size(THREAD_STACK)
            .spawn(move || of_thread.run())?;
        Ok(Self(shared))
    }

    /// Takes the listener of a thread that has just confined itself.
    pub(super) fn watch(&self, listener: OwnedFd) {
        self.0
            .new
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(listener);
        // It fails only when the counter is full; then the thread is awake.
        let _ = rustix::io::write(&self.0.changed, &1u64.to_ne_bytes());
    }
}

impl Shared {
    fn run(&self) {
        let mut listeners = Vec::<OwnedFd>::new();
        let mut reported = BTreeSet::new();
        loop {
            let fds = std::iter::once(&self.changed).chain(&listeners);
            let mut fds: Vec<_> = fds.map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
            // It fails for EINTR, or when memory is short: then it is tried again.
            let _ = poll(&mut fds, None);
            let events: Vec<PollFlags> = fds.iter().map(PollFd::revents).collect();
            let mut events = events.into_iter();
            let changed = events.next().is_some_and(|events| !events.is_empty());
            listeners.retain(|listener| {
                let events = events.next().unwrap_or(PollFlags::empty());
                if events.contains(PollFlags::IN) {
                    let_pass(listener, |call| {
                        if reported.insert(call.clone()) {
                            log::warn!("the sandbox would refuse a system call: {call}");
                        }
                    });
                }
                // All threads that it was for have ended.
                !events.contains(PollFlags::HUP)
            });
            if changed {
                let _ = rustix::io::read(&self.changed, &mut [0u8; 8]);
                let mut new = self.new.lock().unwrap_or_else(PoisonError::into_inner);
                listeners.append(&mut mem::take(&mut new));
            }
        }
    }
}

/// Takes a call from a listener, reports it, and has the kernel make it, unless the thread has gone, or was interrupted and will
/// try again.
#[allow(unsafe_code, reason = "no safe interface has these ioctls")]
fn let_pass(listener: &OwnedFd, mut report: impl FnMut(Call<String>)) {
    // SAFETY: zeroes are a valid value, and what the kernel demands.
    let mut made: libc::seccomp_notif = unsafe { mem::zeroed() };
    let fd = listener.as_raw_fd();
    // SAFETY: the kernel writes one such structure.
    if unsafe { libc::ioctl(fd, libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut made) } != 0 {
        return;
    }
    // While the thread waits, its number is its own.
    let name = fs::read_to_string(format!("/proc/{}/comm", made.pid)).unwrap_or_default();
    let [_, request, ..] = made.data.args;
    report(Call {
        number: made.data.nr.into(),
        request: request as u32,
        thread: name.trim_end().to_owned(),
    });
    let answer = libc::seccomp_notif_resp {
        id: made.id,
        val: 0,
        error: 0,
        flags: libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32,
    };
    // SAFETY: the kernel reads one such structure. It fails if the thread has gone meanwhile.
    unsafe { libc::ioctl(fd, libc::SECCOMP_IOCTL_NOTIF_SEND, &raw const answer) };
}
