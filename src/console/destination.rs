//! Where the console's output ends, and how it is written there.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

/// How long the thread waits for its reader until it looks again at what has come meanwhile.
const READER_STEP: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};

/// Where the output ends.
#[derive(Clone)]
pub(super) enum Destination {
    /// stdout or a file; the name is for messages.
    Stream(Arc<OwnedFd>, String),
    /// A pty's master: what is sent while nobody is attached is dropped.
    Pty(Arc<OwnedFd>),
}

impl Destination {
    /// What messages call it.
    pub(super) fn name(&self) -> &str {
        match self {
            Self::Stream(_, name) => name,
            Self::Pty(_) => "the pty",
        }
    }
}

/// What became of a piece.
pub(super) enum Written {
    Bytes(usize),
    /// There is no destination, or nobody is attached to the pty.
    Nobody,
    /// The reader takes its time.
    NotYet,
    Cancelled,
    Failed(Errno),
}

/// Writes a part of `chunk`, waiting for the reader. The file description of stdout is shared with the shell, so it
/// stays as it is, blocking or not; poll makes both wait in the same place, where the wait can be cancelled.
pub(super) fn write_some(
    destination: Option<&Destination>,
    chunk: &[u8],
    cancel: &OwnedFd,
) -> Written {
    let (fd, is_pty) = match destination {
        Some(Destination::Stream(fd, _)) => (fd.as_fd(), false),
        Some(Destination::Pty(fd)) => (fd.as_fd(), true),
        None => return Written::Nobody,
    };
    loop {
        let mut fds = [
            PollFd::new(&fd, PollFlags::OUT),
            PollFd::new(cancel, PollFlags::IN),
        ];
        match poll(&mut fds, Some(&READER_STEP)) {
            Err(Errno::INTR) => continue,
            Err(e) => return Written::Failed(e),
            Ok(0) => return Written::NotYet,
            Ok(_) => {}
        }
        let (ready, cancelled) = (fds[0].revents(), !fds[1].revents().is_empty());
        if is_pty && ready.contains(PollFlags::HUP) {
            return Written::Nobody;
        }
        if ready.is_empty() && cancelled {
            return Written::Cancelled;
        }
        match rustix::io::write(fd, chunk) {
            Ok(len) if len > 0 => return Written::Bytes(len),
            Err(Errno::INTR) => {}
            // Ready, but nothing was written: retry, without a busy loop.
            Ok(_) | Err(Errno::AGAIN) if cancelled => return Written::Cancelled,
            Ok(_) | Err(Errno::AGAIN) => thread::sleep(Duration::from_millis(1)),
            Err(Errno::IO) if is_pty => return Written::Nobody,
            Err(e) => return Written::Failed(e),
        }
    }
}
