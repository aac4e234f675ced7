//! Saving a VM at a boot mark: the option, and what it does in the event loop.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Instant;

use vmm_sys_util::eventfd::EventFd;

use crate::console::Signals;
use crate::error_chain;
use crate::vmm::outcome::Outcome;
use crate::vmm::prepare::Prepared;
use crate::vmm::snapshot::error::SnapshotError;
use crate::vmm::snapshot::load::Snapshot;
use crate::vmm::snapshot::save::{Target, check_unused, directory};
use crate::vmm::vm::Vm;

/// When a VM is saved, where to, and whether it ends then. Written `MARK=FILE[,exit]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotAt {
    mark: u8,
    path: PathBuf,
    exit: bool,
}

impl SnapshotAt {
    /// The directory that the file will be in.
    pub(super) fn dir(&self) -> PathBuf {
        directory(&self.path).into()
    }

    /// Refuses a VM that uses the file.
    pub(super) fn check(&self, vm: &Prepared) -> Result<(), SnapshotError> {
        check_unused(&self.path, vm)
    }
}

impl FromStr for SnapshotAt {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (mark, rest) = text.split_once('=').unwrap_or((text, ""));
        let mark = mark
            .parse()
            .map_err(|_| format!("'{mark}' is no boot mark: a number from 0 to 255"))?;
        let (path, exit) = match rest.strip_suffix(",exit") {
            Some(path) => (path, true),
            None => (rest, false),
        };
        if path.is_empty() {
            return Err("no file: write MARK=FILE".into());
        }
        Ok(Self {
            mark,
            path: path.into(),
            exit,
        })
    }
}

/// A VM's snapshot before it is taken.
pub(super) struct Saver {
    at: SnapshotAt,
    target: Target,
    /// Readable when the VM is held at the mark.
    pub(super) held: EventFd,
}

impl Saver {
    /// Opens what it needs, if the VM is to be saved. `source` is what the VM was restored from.
    pub(super) fn open(
        at: Option<&SnapshotAt>,
        source: Option<&Snapshot>,
    ) -> Result<Option<Self>, SnapshotError> {
        let Some(at) = at else {
            return Ok(None);
        };
        let held = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        Ok(Some(Self {
            at: at.clone(),
            target: Target::create(&at.path, source)?,
            held: held.map_err(|source| SnapshotError::Write(at.path.clone(), source))?,
        }))
    }

    /// Where the VM is to be held, and how that is told.
    pub(super) fn hold_at(&self) -> io::Result<(u8, EventFd)> {
        Ok((self.at.mark, self.held.try_clone()?))
    }

    /// Saves the VM, which is held, and lets it go on or ends it. When it cannot be saved, it goes on; a signal and the deadline
    /// end it. Gives what [`Vm::resume_devices`] does.
    pub(super) fn save(self, vm: &Vm, signals: &Signals, deadline: Option<Instant>) -> bool {
        let Self { at, mut target, .. } = self;
        let control = vm.control();
        let stop = || {
            if let Some(signal) = signals.stop_requested() {
                control.end(Outcome::Signal(signal));
            }
            if deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                control.end(Outcome::Deadline);
            }
            control.how_it_ended().is_some()
        };
        let written = if vm.pause() {
            target.write(vm, at.mark, &stop)
        } else {
            let error = "the VM did not stop to be saved";
            Err(SnapshotError::Refused(error.into()))
        };
        // Where the VM ends here, what its guest has asked of its disks and they have not begun is for those that go on from it.
        let ends = at.exit && written.is_ok();
        let mut resumed = ends || vm.resume_devices();
        // The guest's memory is copied: the disk need not be waited for.
        if !at.exit {
            control.release();
        }
        match written.and_then(|()| target.publish(File::sync_all)) {
            Ok(path) => {
                log::info!("saved to {}", path.display());
                if at.exit {
                    control.end(Outcome::Saved);
                }
            }
            Err(e) => {
                log::error!("the VM was not saved: {}", error_chain(&e));
                if ends {
                    resumed = vm.resume_devices();
                }
                control.release();
            }
        }
        resumed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_a_file_and_whether_to_end() {
        let at = |path: &str, exit| SnapshotAt {
            mark: 7,
            path: path.into(),
            exit,
        };
        assert_eq!("7=a".parse(), Ok(at("a", false)));
        assert_eq!("7=a=b,exit".parse(), Ok(at("a=b", true)));
        for wrong in ["", "7", "7=", "256=a", "x=a", "7=,exit"] {
            assert!(wrong.parse::<SnapshotAt>().is_err(), "{wrong}");
        }
    }
}
