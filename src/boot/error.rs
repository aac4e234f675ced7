//! What can go wrong between a kernel file and a guest that is ready to start.

use std::fmt;
use std::io;
use std::path::PathBuf;

use vm_memory::GuestMemoryError;

use crate::config::BootProtocol;

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
    /// No such file.
    #[error("there is no {0} at {1}; check the path")]
    Missing(Role, PathBuf),
    /// The file may not be read.
    #[error(
        "the {0} {1} may not be read by this user: permission denied; check its mode and owner (ls -l {1})"
    )]
    Permission(Role, PathBuf),
    /// The file cannot be opened for another reason.
    #[error("cannot open the {0} {1}")]
    Open(Role, PathBuf, #[source] io::Error),
    /// A directory, a pipe, a device.
    #[error("the {0} {1} is {2}, not a regular file; give the {0} file itself")]
    NotRegular(Role, PathBuf, &'static str),
    /// A file of length 0.
    #[error("the {0} {1} is empty; build or download it again")]
    Empty(Role, PathBuf),
    /// Reading failed.
    #[error("cannot read the {0} {1}")]
    Read(Role, PathBuf, #[source] io::Error),
    /// The file ends before what its headers promise.
    #[error(
        "the {role} {path} is truncated: {what} ends at byte {need}, the file has {have} bytes; copy or download it again"
    )]
    Truncated {
        /// What the file was given as.
        role: Role,
        /// The file.
        path: PathBuf,
        /// The part that is cut.
        what: String,
        /// Bytes the file must have.
        need: u64,
        /// Bytes it has.
        have: u64,
    },
    /// A file of no known kind.
    #[error(
        "{path} is not a kernel: its {len} bytes begin with {head}; give a Linux bzImage (vmlinuz) or an x86 ELF kernel (vmlinux)"
    )]
    NotAKernel {
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        len: u64,
        /// Its first bytes, in hexadecimal.
        head: String,
    },
    /// A file of a known kind that cannot be what it was given as.
    #[error("the {role} {path} is {what}; {hint}")]
    WrongKind {
        /// What the file was given as.
        role: Role,
        /// The file.
        path: PathBuf,
        /// What the file is, with its article.
        what: String,
        /// What to do.
        hint: String,
    },
    /// A kernel for 32-bit processors.
    #[error(
        "{0} is a 32-bit kernel ({1}); give a 64-bit one (CONFIG_64BIT=y, \"amd64\" or \"x86_64\" in a package's name)"
    )]
    Kernel32(PathBuf, &'static str),
    /// A bzImage older than the 64-bit boot protocol.
    #[error(
        "{} speaks boot protocol {}.{:02}; 2.12 (Linux 3.8) is the oldest with a 64-bit entry, give a newer kernel",
        .0.display(),
        .1 >> 8,
        .1 & 0xff
    )]
    ProtocolTooOld(PathBuf, u16),
    /// The file's headers contradict themselves.
    #[error("the kernel {0} is damaged or not a kernel: {1}; copy or download it again")]
    Malformed(PathBuf, String),
    /// The kernel does not have the entry point that was asked for.
    #[error("{path} cannot be started by the {protocol} protocol: {why}")]
    NoSuchEntry {
        /// The file.
        path: PathBuf,
        /// The protocol asked for.
        protocol: BootProtocol,
        /// The reason and the hint.
        why: &'static str,
    },
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
    #[error(
        "the initrd {path} ({size} bytes) does not fit: between the end of the kernel ({floor:#x}) and {ceiling:#x} there are {room} bytes; {hint}"
    )]
    InitrdTooBig {
        /// The initrd file.
        path: PathBuf,
        /// Its length in bytes.
        size: u64,
        /// First GPA it might take.
        floor: u64,
        /// End of the memory it might take.
        ceiling: u64,
        /// Bytes between the two.
        room: u64,
        /// What to do.
        hint: String,
    },
    /// The command line is longer than the kernel reads.
    #[error("the kernel command line has {len} bytes, this kernel takes {max} at most; shorten it")]
    CmdlineTooLong {
        /// Its length in bytes, without the NUL.
        len: usize,
        /// The kernel's limit, without the NUL.
        max: usize,
    },
    /// The command line holds a byte that would end or split it.
    #[error("the kernel command line has {0} at byte {1}; remove it")]
    CmdlineByte(&'static str, usize),
    /// Guest memory refused an access.
    #[error("cannot write {0} to guest memory at {1:#x}")]
    GuestMemory(&'static str, u64, #[source] GuestMemoryError),
}
