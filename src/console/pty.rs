//! A pseudo-terminal that others attach to and detach from as they like.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

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
    // A master whose slave was never open looks like one with somebody attached; once closed it reports a hang-up.
    drop(rustix::pty::ioctl_tiocgptpeer(
        &master,
        OpenptFlags::RDWR | OpenptFlags::NOCTTY,
    )?);
    // The file description is ours alone, so this disturbs nobody.
    rustix::io::ioctl_fionbio(&master, true)?;
    Ok((master, path))
}
