//! How a kernel is entered: the value of `--boot-protocol`.

use serde::{Deserialize, Serialize};

/// Which protocol starts the kernel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BootProtocol {
    /// A bzImage by the Linux protocol, an ELF kernel by PVH if it has the note and else by the Linux protocol.
    #[default]
    Auto,
    /// The 64-bit Linux boot protocol.
    Linux64,
    /// PVH.
    Pvh,
}
