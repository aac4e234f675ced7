//! How a kernel is entered: the value of `--boot-protocol`.

use std::fmt;

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

impl fmt::Display for BootProtocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Linux64 => "linux64",
            Self::Pvh => "pvh",
        })
    }
}
