//! What is to be run.

use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use minivmm_devices::thread::ThreadStarter;
use vm_memory::GuestMemoryMmap;

use super::run_error::RunError;
use super::snapshot_at::SnapshotAt;
use crate::NOTICE;
use crate::config::VmConfig;
use crate::console::{Console, ConsoleInput};
use crate::observe::timeline::Timeline;
use crate::run::Claim;
use crate::vmm::error::{VmError, host};
use crate::vmm::networks::Networks;
use crate::vmm::prepare::{BuildTimes, Identity, Prepared};
use crate::vmm::snapshot::load::Snapshot;
use crate::vmm::working_set::{Recorder, WorkingSet};

/// What is to be run.
#[derive(Default)]
pub struct Plan {
    /// The VM.
    pub config: VmConfig,
    /// What it goes on from; without it, it boots.
    pub snapshot: Option<(Arc<Snapshot>, Identity)>,
    /// Whether it is to be saved.
    pub snapshot_at: Option<SnapshotAt>,
    /// The streams of the container's program that it runs, if that is what it does.
    pub streams: Option<Streams>,
    /// The files without a name that the configuration has by their descriptors, and one that keeps the image in the store until the
    /// VM's disk does.
    pub files: Vec<File>,
    /// The name by which other processes know it, if it has one.
    pub claim: Option<Claim>,
}

impl Plan {
    /// Removes the template, if that is what it goes on from: KVM, say, may have been loaded with other options since it was made.
    pub(super) fn forget_template(&self) {
        if let (Some((template, _)), Some(_)) = (&self.snapshot, self.streams) {
            match std::fs::remove_file(&template.path) {
                Ok(()) => log::warn!("the VM's template is removed: the next one makes another"),
                Err(e) => log::warn!("cannot remove {}: {e}", template.path.display()),
            }
        }
    }

    /// The console, and where a container's program has it for its streams, stderr for COM1; and the input.
    pub(super) fn open_consoles(
        &self,
        threads: &ThreadStarter,
    ) -> Result<(Console, Option<Console>, ConsoleInput), RunError> {
        let (console, input) = Console::open(&self.config.serial, threads)?;
        if let Some(path) = console.pty_path() {
            log::info!(target: NOTICE, "the console is {}", path.display());
        }
        let Some(streams) = self.streams else {
            return Ok((console, None, input));
        };
        if streams.init.is_some() {
            let input = match streams.interactive {
                true => input,
                false => ConsoleInput::none(),
            };
            return Ok((console, None, input));
        }
        let framed = ConsoleInput::framed(streams.interactive);
        let (input, credit) = framed.map_err(host("an eventfd"))?;
        console.tell_of_lost_reader(credit.reader_gone());
        Ok((console, Some(Console::stderr(threads)?), input))
    }

    /// What notes the pages that the VM with this RAM touches, if that is wanted.
    pub(super) fn recorder(&self, mem: &GuestMemoryMmap) -> Option<Recorder<'_>> {
        let (snapshot, _) = self.snapshot.as_ref()?;
        let WorkingSet::Wanted(file) = &snapshot.working_set else {
            return None;
        };
        Recorder::open(file, mem)
            .inspect_err(|e| log::info!("the pages that the VM touches are not noted: {e}"))
            .ok()
    }

    /// Opens files and loads the kernel, or the snapshot.
    pub(super) fn prepare(
        &self,
        networks: &Networks,
        threads: &ThreadStarter,
        after_reset: bool,
        timeline: &mut Timeline,
    ) -> Result<Prepared, VmError> {
        let mut times = BuildTimes::default();
        let prepared = match &self.snapshot {
            None => Prepared::boot(&self.config, networks, threads, !after_reset, &mut times),
            Some((snapshot, identity)) => {
                let identity = identity.clone();
                let config = &self.config;
                Prepared::restore(snapshot, config, networks, identity, threads, &mut times)
            }
        };
        timeline.note_build(&times);
        let prepared = prepared?;
        if let Some(at) = &self.snapshot_at {
            at.check(&prepared)?;
        }
        Ok(prepared)
    }
}

/// What a container's program has from this process.
#[derive(Debug, Clone, Copy)]
pub struct Streams {
    /// A terminal of its own.
    pub terminal: bool,
    /// What comes on stdin.
    pub interactive: bool,
    /// Its own are the kernel's console, for logins: it is an init, which has this long to power off at a signal to end it.
    pub init: Option<Duration>,
}

impl Streams {
    /// Whether this process's terminal is the program's.
    pub(super) fn share_terminal(self) -> bool {
        self.terminal && self.interactive
    }
}
