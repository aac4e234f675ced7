//! What a snapshot says of its VM.

use minivmm_devices::block::DiskIdentity;
use serde::{Deserialize, Serialize};

use super::host::HostFingerprint;
use crate::boot::LoadedKernel;
use crate::config::VmConfig;

/// A snapshot's first section.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Meta {
    /// The minivmm that wrote it.
    pub writer: String,
    /// When the VM was paused, in nanoseconds since 1970.
    pub taken_at_ns: u64,
    /// The boot mark at which it was.
    pub mark: u8,
    /// How many snapshots the VM has been through, this one included.
    pub generation: u64,
    /// The VM. Its paths are only told, never opened.
    pub config: VmConfig,
    /// The files of its disks, in their order.
    pub disks: Vec<DiskIdentity>,
    /// The kernel's command line.
    pub cmdline: String,
    /// Where the kernel is in RAM, and what was loaded.
    pub kernel: LoadedKernel,
    /// Where it was taken.
    pub host: HostFingerprint,
    /// Model of the host's processor.
    pub processor: String,
}
