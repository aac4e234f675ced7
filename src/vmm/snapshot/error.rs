//! Why a snapshot cannot be written or read.

use std::io;
use std::path::PathBuf;

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
    /// It was changed.
    #[error("it is damaged: the checksum of {0} is wrong")]
    Checksum(String),
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
    /// A step of it failed.
    #[error("cannot {0}")]
    Step(String, #[source] Box<dyn std::error::Error + Send + Sync>),
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
    /// What cannot be, and why.
    #[error("{0}")]
    Refused(String),
}

/// That a step failed.
pub(super) fn failed<E: Into<Box<dyn std::error::Error + Send + Sync>>>(
    step: impl ToString,
) -> impl FnOnce(E) -> SnapshotError {
    move |source| SnapshotError::Step(step.to_string(), source.into())
}
