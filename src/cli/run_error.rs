//! Why a VM could not be run, and what to change on the command line.

use crate::boot::BootError;
use crate::config::ConfigError;
use crate::console::ConsoleError;
use crate::image::ImageError;
use crate::run::KernelError;
use crate::sandbox::SandboxError;
use crate::vmm::error::VmError;
use crate::vmm::memory::MemoryError;
use crate::vmm::snapshot::error::SnapshotError;

/// Why a VM could not be run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The VM.
    #[error("{0}{hint}", hint = hint(.0))]
    Vm(#[from] VmError),
    /// The console cannot be opened.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// The VM's threads cannot be confined.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// The image cannot be used.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A file of its user's.
    #[error("cannot read {0}")]
    File(String, #[source] std::io::Error),
    /// There is no kernel for it.
    #[error("{0}: give --kernel FILE")]
    Kernel(#[from] KernelError),
    /// The command line asks for what cannot be.
    #[error("{0}")]
    Usage(String),
}

/// What to change on the command line.
fn hint(error: &VmError) -> String {
    match error {
        VmError::TooManyCpus(..) => ": give a smaller --cpus".into(),
        VmError::TooMuchMemory(..) => ": give a smaller --memory".into(),
        VmError::Memory(MemoryError::Map(..)) => " (--memory)".into(),
        VmError::Memory(MemoryError::Merge(_)) => " (--mergeable)".into(),
        VmError::Boot(BootError::MemoryTooSmall { need_mib, .. }) => {
            format!("; raise it with --memory {need_mib}M or more")
        }
        VmError::Boot(BootError::InitrdTooBig(_)) => {
            " (--memory says how much memory it has)".into()
        }
        VmError::Snapshot(SnapshotError::Disk(id, ..)) => {
            format!(" (--disk id={id},path=FILE names the file to use)")
        }
        VmError::Config(error) => config_hint(error).into(),
        _ => String::new(),
    }
}

/// The same for a configuration.
pub fn config_hint(error: &ConfigError) -> &'static str {
    match error {
        ConfigError::NoKernel => ": give --kernel FILE, or a file that names one with --config",
        _ => "",
    }
}
