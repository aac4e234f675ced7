//! A guest that has broken out: in builds with the feature `attack-port` alone, which the tests of the sandbox make.
//!
//! A word written to the port says what to try, and in which thread. The guest's exit status says what came of it.

#![allow(
    unsafe_code,
    reason = "it calls the host's kernel as code would that has taken over a thread"
)]

use std::io::Error;
use std::ptr::{null, null_mut};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use io_uring::{IoUring, opcode, types};

use crate::bus::BusDevice;
use crate::event::{EventSink, GuestEvent};

/// The I/O port, of two bytes.
pub const PORT: u16 = 0xfa;
/// Its length.
pub const PORT_LEN: u64 = 2;

/// The guest's status when the host's kernel has done the call, or has had a reason of its own not to.
pub const DONE: u8 = 77;

/// <linux/kvm.h>
const KVM_CREATE_VM: libc::Ioctl = 0xae01;
const KVM_SET_USER_MEMORY_REGION: libc::Ioctl = 0x4020_ae46;

/// What is to be tried by the next thread with such a name.
struct Attack {
    call: u8,
    thread: &'static str,
    events: EventSink,
}

/// Every thread looks here.
static NEXT: Mutex<Option<Attack>> = Mutex::new(None);

fn next() -> MutexGuard<'static, Option<Attack>> {
    NEXT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The port. The first byte is the call, the second one the kind of thread.
pub struct AttackPort(pub EventSink);

impl BusDevice for AttackPort {
    fn read(&mut self, _offset: u64, _data: &mut [u8]) {}

    fn write(&mut self, _offset: u64, data: &[u8]) {
        let [call, thread] = *data else { return };
        let thread = match thread {
            b'v' => "vcpu",
            b'b' => "virtio-blk",
            b'r' => "virtio-rng",
            b'n' => "virtio-net",
            b'c' => "console",
            _ => "main",
        };
        *next() = Some(Attack {
            call,
            thread,
            events: self.0.clone(),
        });
        turn();
    }
}

/// Called by each thread now and then: carries out an attack that is meant for it.
pub fn turn() {
    let current = thread::current();
    let is_ours = |attack: &mut Attack| {
        let name = current.name();
        name.is_some_and(|name| name.starts_with(attack.thread))
    };
    let attack = next().take_if(is_ours);
    if let Some(attack) = attack {
        let status = match carry_out(attack.call) {
            true => DONE,
            false => Error::last_os_error().raw_os_error().unwrap_or(0) as u8,
        };
        (attack.events)(GuestEvent::Exit(status));
    }
}

/// Tries a call. `true` if the kernel has done it, or has looked at its arguments and found that such a thing is not there or not
/// allowed: then nothing keeps the call from where it would be.
fn carry_out(call: u8) -> bool {
    let answered = |result: i64, or: &[i32]| {
        let errno = Error::last_os_error().raw_os_error();
        result >= 0 || errno.is_some_and(|errno| or.contains(&errno))
    };
    // SAFETY: the strings end with NUL and the pointers are to live values, or null where that is allowed. The child of clone has a
    // copy of this stack, and ends at once.
    unsafe {
        match call {
            b'x' => {
                let args = [c"sh".as_ptr(), c"-c".as_ptr(), c"exit 77".as_ptr(), null()];
                answered(libc::execv(c"/bin/sh".as_ptr(), args.as_ptr()).into(), &[])
            }
            b'o' => {
                let (at, root) = (libc::AT_FDCWD, c"/".as_ptr());
                answered(
                    libc::syscall(libc::SYS_openat, at, root, libc::O_RDONLY),
                    &[],
                )
            }
            b's' => answered(
                libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0).into(),
                &[],
            ),
            b't' => answered(
                libc::ptrace(libc::PTRACE_SEIZE, i32::MAX, 0, 0),
                &[libc::ESRCH],
            ),
            b'm' => {
                let none = c"/nowhere".as_ptr();
                let result = libc::mount(none, none, c"tmpfs".as_ptr(), 0, null());
                answered(result.into(), &[libc::EPERM, libc::ENOENT])
            }
            b'c' => {
                let child = libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0);
                if child == 0 {
                    libc::_exit(0);
                }
                answered(child, &[])
            }
            b'k' => answered(libc::kill(1, 0).into(), &[libc::EPERM]),
            b'u' => open_by_a_ring(),
            b'v' => (0..256).any(|fd| libc::ioctl(fd, KVM_CREATE_VM, 0) >= 0),
            b'y' => {
                // A memslot that is not there, to be removed.
                let region = [400u64, 0, 0, 0];
                (0..256).any(|fd| {
                    let result = libc::ioctl(fd, KVM_SET_USER_MEMORY_REGION, &region);
                    answered(result.into(), &[libc::EINVAL])
                })
            }
            b'e' => {
                let rwx = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
                let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                libc::mmap(null_mut(), 4096, rwx, private, -1, 0) != libc::MAP_FAILED
            }
            b'f' => answered(libc::memfd_create(c"code".as_ptr(), 0).into(), &[]),
            b'g' => answered(
                libc::syscall(libc::SYS_tgkill, 1, 1, 0),
                &[libc::EPERM, libc::ESRCH],
            ),
            b'i' => answered(libc::ioctl(0, libc::TIOCSTI, c"x").into(), &[libc::ENOTTY]),
            b'w' => answered(libc::fcntl(0, libc::F_SETOWN, 1).into(), &[libc::EPERM]),
            b'd' => answered(libc::fchmod(-1, 0o4755).into(), &[libc::EBADF]),
            b'p' => answered(libc::prctl(libc::PR_SET_DUMPABLE, 1).into(), &[]),
            _ => false,
        }
    }
}

/// Opens a directory by a ring of its own, which no filter of system calls sees.
fn open_by_a_ring() -> bool {
    let open = opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), c"/".as_ptr()).build();
    let Ok(mut ring) = IoUring::new(2) else {
        return false;
    };
    // SAFETY: the path is static.
    let pushed = unsafe { ring.submission().push(&open) };
    pushed.is_ok()
        && ring.submit_and_wait(1).is_ok()
        && ring.completion().next().is_some_and(|e| e.result() >= 0)
}
