//! What is to be run.

use std::sync::Arc;

use super::snapshot_at::SnapshotAt;
use crate::config::VmConfig;
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
}
