//! Filters of system calls, installed on the calling thread.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::raw::c_uint;

use super::filter::compile;
use super::rules::Role;

/// What comes of a call that the table does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    /// SIGSYS.
    Signal,
    /// A listener is told, and the call made.
    Notify,
}

impl Refusal {
    fn action(self) -> u32 {
        match self {
            Self::Signal => libc::SECCOMP_RET_TRAP,
            Self::Notify => libc::SECCOMP_RET_USER_NOTIF,
        }
    }
}

/// Whether the host's kernel can filter system calls like this.
pub(super) fn is_available(refusal: Refusal) -> bool {
    let action = refusal.action();
    seccomp(
        libc::SECCOMP_GET_ACTION_AVAIL,
        0,
        (&raw const action).cast(),
    )
    .is_ok()
}

/// Restricts the calling thread to what its role needs, and threads that it starts. With [`Refusal::Notify`] the result is the
/// listener, unless the thread that started this one has one already: then its list goes on to hold.
pub(super) fn install(role: Role, refusal: Refusal) -> io::Result<Option<OwnedFd>> {
    let program = compile(role, refusal.action());
    let Ok(len) = program.len().try_into() else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let fprog = libc::sock_fprog {
        len,
        filter: program.as_ptr().cast_mut().cast(),
    };
    let flags = match refusal {
        Refusal::Signal => 0,
        Refusal::Notify => libc::SECCOMP_FILTER_FLAG_NEW_LISTENER as c_uint,
    };
    match (
        seccomp(
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            (&raw const fprog).cast(),
        ),
        refusal,
    ) {
        (Ok(_), Refusal::Signal) => Ok(None),
        #[allow(unsafe_code, reason = "the kernel gives a file descriptor as a number")]
        // SAFETY: the descriptor is new, and nothing else owns it.
        (Ok(fd), Refusal::Notify) => Ok(Some(unsafe { OwnedFd::from_raw_fd(fd) })),
        (Err(e), Refusal::Notify) if e.raw_os_error() == Some(libc::EBUSY) => Ok(None),
        (Err(e), _) => Err(e),
    }
}

#[allow(unsafe_code, reason = "no safe interface has seccomp(2)")]
fn seccomp(operation: c_uint, flags: c_uint, args: *const libc::c_void) -> io::Result<i32> {
    // SAFETY: the callers hand over what the operation reads: an action, or a program with its length, all of it alive.
    match unsafe { libc::syscall(libc::SYS_seccomp, operation, flags, args) } {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result as i32),
    }
}
