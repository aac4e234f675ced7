//! A pseudo-terminal that others attach to and detach from as they like.

use std::ffi::OsString;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

use super::terminal::raw_modes;

/// Opens a pty: its master, and the path of the slave to attach to.
pub(super) fn open() -> Result<(OwnedFd, PathBuf), Errno> {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let path = PathBuf::from(OsString::from_vec(
        ptsname(&master, Vec::new())?.into_bytes(),
    ));
    // Raw, or the slave would echo the guest's output back as its input. The modes stay while the master is open.
    tcsetattr(
        &master,
        OptionalActions::Now,
        &raw_modes(&tcgetattr(&master)?),
    )?;
    // The master reports POLLHUP only after its slave has been opened and closed once.
    drop(slave(&master)?);
    // The file description is not shared, so O_NONBLOCK affects only this process.
    rustix::io::ioctl_fionbio(&master, true)?;
    Ok((master, path))
}

fn slave(master: impl AsFd) -> Result<OwnedFd, Errno> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    rustix::pty::ioctl_tiocgptpeer(master, flags)
}

/// How much of what was written to the master an attached reader has yet to read; 0 if nobody is attached.
pub(super) fn unread(master: &OwnedFd) -> usize {
    if ready(master, PollFlags::OUT).contains(PollFlags::HUP) {
        return 0;
    }
    // poll(2) on the slave flushes the tty buffer first, which FIONREAD alone would not count.
    let Ok(slave) = slave(master) else { return 0 };
    if !ready(&slave, PollFlags::IN).contains(PollFlags::IN) {
        return 0;
    }
    let count = rustix::io::ioctl_fionread(&slave).unwrap_or(0);
    usize::try_from(count).unwrap_or(usize::MAX)
}

fn ready(fd: impl AsFd, events: PollFlags) -> PollFlags {
    let mut fds = [PollFd::new(&fd, events)];
    let at_once = Timespec::default();
    match poll(&mut fds, Some(&at_once)) {
        Ok(_) => fds[0].revents(),
        Err(_) => PollFlags::empty(),
    }
}
