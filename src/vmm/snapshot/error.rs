//! Why a snapshot cannot be written or read.

use std::io;
use std::path::PathBuf;

use crate::arch::vcpu::StateError;

/// Why a file cannot be used as a snapshot.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// It does not begin like one.
    #[error("it is not a snapshot")]
    NoSnapshot,
    /// Written by a version that this one cannot follow.
    #[error("it has format version {major}.{minor}, and this minivmm reads {known}.x")]
    Version {
        /// The file's major version.
        major: u16,
        /// The file's minor version.
        minor: u16,
        /// The major version that can be read.
        known: u16,
    },
    /// Of another architecture.
    #[error("it is of another architecture (ELF machine {0}, not x86-64)")]
    Architecture(u32),
    /// The header was changed.
    #[error("its header is damaged: the checksum is wrong")]
    HeaderChecksum,
    /// A section was changed.
    #[error("it is damaged: the checksum of section {0} is wrong")]
    Checksum(u32),
    /// RAM was changed.
    #[error("it is damaged: the checksum of the guest's memory is wrong")]
    RamChecksum,
    /// The file ends too early.
    #[error("it is cut short")]
    Truncated,
    /// The table of sections makes no sense.
    #[error("its table of sections is impossible")]
    Table,
    /// A section that is not known, and not optional.
    #[error("it has a section (kind {0}) that this minivmm does not know: it is from a newer one")]
    UnknownSection(u32),
    /// A section that must be there once.
    #[error("it has not exactly one section of kind {0}")]
    Count(u32),
    /// A section has other bytes than it should.
    #[error("its {0} cannot be read")]
    Section(
        &'static str,
        #[source] Box<dyn std::error::Error + Send + Sync>,
    ),
    /// Sections disagree.
    #[error("it has {0}")]
    Mismatch(String),
    /// The host could not read it.
    #[error("it cannot be read")]
    Read(#[source] io::Error),
}

/// See the module.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The file cannot be opened.
    #[error("cannot open the snapshot {}", .0.display())]
    Open(PathBuf, #[source] io::Error),
    /// The file is no snapshot, or a broken one.
    #[error("cannot use the snapshot {}", .0.display())]
    Format(PathBuf, #[source] FormatError),
    /// It was taken on another host, and this one lacks something.
    #[error(
        "the snapshot {} was taken on another host ({host}), and this one lacks what its guest was told of: {}",
        path.display(), missing.join(", ")
    )]
    OtherHost {
        /// The file.
        path: PathBuf,
        /// Where it was taken.
        host: String,
        /// What is missing.
        missing: Vec<String>,
    },
    /// The file that is to be written cannot be made.
    #[error("cannot write a snapshot to {}", .0.display())]
    Write(PathBuf, #[source] io::Error),
    /// It would be written over the file that the VM came from.
    #[error("cannot write a snapshot to {}: the VM runs from this file; name another", .0.display())]
    OwnSource(PathBuf),
    /// The vCPUs did not stop.
    #[error("the VM did not stop to be saved")]
    NotPaused,
    /// It was no longer wanted.
    #[error("it was stopped")]
    Stopped,
    /// KVM refused to give a vCPU's state.
    #[error("cannot read the state of vCPU {0}")]
    Vcpu(u8, #[source] StateError),
    /// KVM refused to give the VM's state.
    #[error("{0} failed")]
    Kvm(&'static str, #[source] kvm_ioctls::Error),
    /// What the guest has written would not outlast a failure of the host.
    #[error("cannot make durable what the guest has written to its disks")]
    Flush(#[source] io::Error),
    /// The devices cannot be paused or saved.
    #[error("cannot save the devices")]
    Devices(#[source] minivmm_devices::state::StateError),
    /// The user names a file for a disk that is not there.
    #[error("the snapshot's VM has no disk {id}; it has {}", if known.is_empty() { "none".into() } else { known.join(", ") })]
    NoDisk {
        /// What the user called it.
        id: String,
        /// What its disks are called.
        known: Vec<String>,
    },
    /// A disk cannot be what it was.
    #[error("cannot use {} as disk {id} of the snapshot's VM", path.display())]
    Disk {
        /// Its serial number or its number.
        id: String,
        /// Its file.
        path: PathBuf,
        /// What is wrong with that.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A disk that only one VM can write to.
    #[error("the snapshot's VM writes to the disk {}: VMs that go on side by side can only share what is read-only or ephemeral", .0.display())]
    SharedDisk(PathBuf),
    /// A network that only one VM can have.
    #[error(
        "VMs that go on side by side cannot share a TAP interface or a published port: each can have a passt of its own, without ports"
    )]
    SharedNetwork,
    /// The file was changed while a VM ran from it.
    #[error("the snapshot {} was changed while a VM ran from it", .0.display())]
    Changed(PathBuf),
    /// Something of the VM that is not saved.
    #[error("{0} cannot be saved")]
    Unsupported(String),
}
