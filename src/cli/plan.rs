//! What is to be run.

use std::fs::File;
use std::sync::Arc;

use super::snapshot_at::SnapshotAt;
use crate::config::VmConfig;
use crate::run::Claim;
use crate::vmm::prepare::Identity;
use crate::vmm::snapshot::load::Snapshot;

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
    /// The file behind the configuration's initrd, if it has no name.
    pub initramfs: Option<File>,
    /// The name by which other processes know it, if it has one.
    pub claim: Option<Claim>,
}

/// What a container's program has from this process.
#[derive(Debug, Clone, Copy)]
pub struct Streams {
    /// A terminal of its own.
    pub terminal: bool,
    /// What comes on stdin.
    pub interactive: bool,
}

impl Streams {
    /// Whether this process's terminal is the program's.
    pub(super) fn share_terminal(self) -> bool {
        self.terminal && self.interactive
    }
}
