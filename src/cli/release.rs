//! The end of a VM's devices, which may be in the hands of a host that does not answer.

use std::mem;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use minivmm_devices::block::Disk;
use vm_memory::GuestMemoryMmap;

use crate::console::{self, Signals};
use crate::vmm::memory;
use crate::vmm::outcome::Outcome;
use crate::vmm::vcpu::exit::Buses;

/// After a stop from outside, the host may take so long to finish with the disks.
const LIMIT: Duration = Duration::from_millis(30);

/// A VM that waits for longer says so.
const PATIENCE: Duration = Duration::from_secs(1);

/// How often a stop from outside is looked for.
const PERIOD: Duration = Duration::from_millis(5);

/// How long to wait for the host.
pub(super) struct Wait<'a> {
    /// Why the VM has ended. If it has by itself, there is no limit; if it was stopped from outside, [`LIMIT`] is.
    pub(super) outcome: &'a Outcome,
    /// What breaks the wait off.
    pub(super) signals: &'a Signals,
    /// The same.
    pub(super) deadline: Option<Instant>,
}

/// Stops the devices. That takes as long as the host likes, which may hold a request that cannot be cancelled. So a thread does
/// it, which keeps alive what the host may still use, guest memory above all, until the process ends.
///
/// To close the files of the `disks` may take as long as well, and ends for no signal. So no thread does that as long as
/// this waits, and a process of its own does it where it may have to wait for a server. Where the VM boots again, its
/// next boot would find them locked. So then a thread closes them, and a stop from outside may have to wait for the server.
///
/// The result is what broke the wait off.
pub(super) fn release(
    buses: Arc<Buses>,
    disks: Vec<Arc<Disk>>,
    mem: &GuestMemoryMmap,
    wait: &Wait<'_>,
    boots_again: bool,
) -> Option<Outcome> {
    if let Err(stop) = wait.until_dropped(buses) {
        leave_files(disks, mem);
        return stop;
    }
    if boots_again {
        return wait.until_dropped(disks).err().flatten();
    }
    if disks.iter().any(|disk| disk.is_remote()) {
        leave_files(disks, mem);
    }
    None
}

impl Wait<'_> {
    /// Has a thread drop `what`, and waits for that. The error is what broke the wait off; `None` if that was known before.
    fn until_dropped(&self, what: impl Send + 'static) -> Result<(), Option<Outcome>> {
        let start = Instant::now();
        let (alive_until_drop, alive) = mpsc::channel::<()>();
        let thread = thread::Builder::new()
            .name("release".into())
            .spawn(move || {
                let _alive = alive_until_drop;
                drop(what);
            });
        if let Err(e) = thread {
            log::debug!("no thread to stop the devices: {e}");
        }
        let mut told = false;
        while alive.recv_timeout(PERIOD) == Err(RecvTimeoutError::Timeout) {
            if self.outcome.is_external() {
                if start.elapsed() > LIMIT {
                    log::info!("the host has not finished with the disks: not waiting for it");
                    return Err(None);
                }
                continue;
            }
            let stop = self.signals.stop_requested().map(Outcome::Signal);
            let deadline = self.deadline;
            let is_late = deadline.is_some_and(|deadline| Instant::now() > deadline);
            if let Some(stop) = stop.or(is_late.then_some(Outcome::Deadline)) {
                return Err(Some(stop));
            }
            if start.elapsed() > PATIENCE && !mem::replace(&mut told, true) {
                // Keys go nowhere any more; cooked, Ctrl-C at least is a signal.
                console::lend_terminal();
                log::warn!("the guest has ended; waiting for the host to finish with its disks");
            }
        }
        Ok(())
    }
}

/// Leaves the open files to a process of their own, and keeps those of the disks open in this one. The kernel closes a process's
/// files at its end, and waits there for the server of a file on FUSE or NFS, SIGKILL or not; of a table that is shared, only
/// when its last process ends.
#[allow(unsafe_code, reason = "no safe interface has clone(2)")]
fn leave_files(disks: Vec<Arc<Disk>>, mem: &GuestMemoryMmap) {
    mem::forget(disks);
    // With gigabytes of page tables to copy, it would take too long.
    memory::keep_from_children(mem);
    let parent = std::process::id().cast_signed();
    // SAFETY: without CLONE_VM this is a fork: the child has one thread, on a copy of this one's stack, and calls nothing but
    // functions that are async-signal-safe. Guest memory, which it does not have, it does not touch.
    unsafe {
        if libc::syscall(libc::SYS_clone, libc::CLONE_FILES, 0, 0, 0, 0) == 0 {
            while libc::getppid() == parent {
                libc::usleep(1000);
            }
            // Whoever reads the output waits for its end.
            for fd in 0..3 {
                libc::close(fd);
            }
            libc::_exit(0);
        }
    }
}
