//! What can go wrong between a kernel file and a guest that is ready to start.

use std::fmt;
use std::io;
use std::path::PathBuf;

use vm_memory::GuestMemoryError;

use super::compression::Compression;

/// What a file was given as; it names the file in messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The file given as the kernel.
    Kernel,
    /// The file given as the initrd.
    Initrd,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Kernel => "kernel",
            Role::Initrd => "initrd",
        })
    }
}

/// Why a kernel, its initrd or its command line cannot be loaded. Each message names the file, the value and the hint.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// What was given cannot be booted.
    #[error("{0}")]
    Refused(String),
    /// The host could not do this to a file.
    #[error("cannot {0}")]
    Host(String, #[source] io::Error),
    /// The kernel itself does not fit.
    #[error(
        "memory too small: the kernel {path} needs at least {need_mib} MiB, the VM has {have_mib} MiB"
    )]
    MemoryTooSmall {
        /// The kernel file.
        path: PathBuf,
        /// End of the memory that the kernel needs, in MiB.
        need_mib: u64,
        /// What the VM has, in MiB.
        have_mib: u64,
    },
    /// The initrd does not fit beside the kernel.
    #[error("{0}")]
    InitrdTooBig(String),
    /// Guest memory refused an access.
    #[error("cannot write {0} to guest memory at {1:#x}")]
    GuestMemory(&'static str, u64, #[source] GuestMemoryError),
}

/// Why a bzImage cannot be booted directly and has to decompress itself.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DirectBootError {
    /// What is in it cannot be loaded so.
    #[error("{0}")]
    Refused(String),
    /// It cannot be read, or the kernel in it cannot be loaded at all.
    #[error(transparent)]
    Kernel(#[from] BootError),
    /// The compressed data is truncated or wrong.
    #[error("its {0} payload is damaged")]
    Damaged(Compression, #[source] io::Error),
    /// A system call failed.
    #[error("cannot {0}")]
    Host(&'static str, #[source] io::Error),
    /// Guest memory refused an access.
    #[error("cannot relocate it")]
    Memory(#[from] GuestMemoryError),
}
