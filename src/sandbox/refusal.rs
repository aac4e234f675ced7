//! A system call that the sandbox refuses, in words.

use std::fmt;

use syscalls::Sysno;

/// A system call, and the thread that made it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Call<N> {
    /// The call's number.
    pub number: i64,
    /// Its second argument, which is the request of an ioctl.
    pub request: u32,
    /// The thread's name.
    pub thread: N,
}

impl<N: fmt::Display> fmt::Display for Call<N> {
    /// It allocates nothing: a signal handler may do it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = usize::try_from(self.number).ok().and_then(Sysno::new);
        match number {
            Some(call) => write!(f, "{} ({})", call.name(), self.number)?,
            None => write!(f, "number {}", self.number)?,
        }
        if number == Some(Sysno::ioctl) {
            write!(f, " {:#x}", self.request)?;
        }
        write!(f, " by thread {}", self.thread)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_named_and_ioctls_have_their_request() {
        let call = |number| Call {
            number,
            request: 0xae01,
            thread: "vcpu0",
        };
        assert_eq!(
            call(libc::SYS_openat).to_string(),
            "openat (257) by thread vcpu0"
        );
        assert_eq!(
            call(libc::SYS_ioctl).to_string(),
            "ioctl (16) 0xae01 by thread vcpu0"
        );
        assert_eq!(call(9999).to_string(), "number 9999 by thread vcpu0");
        assert_eq!(call(-1).to_string(), "number -1 by thread vcpu0");
    }
}
