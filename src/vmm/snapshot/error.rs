//! Why a snapshot cannot be written or read.

use std::io;
use std::path::PathBuf;

/// Why a file cannot be used as a snapshot.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// It is none, or not one for this minivmm.
    #[error("it {0}")]
    Unusable(String),
    /// It was changed.
    #[error("it is damaged: the checksum of {0} is wrong")]
    Checksum(String),
    /// The file ends too early.
    #[error("it is cut short")]
    Truncated,
    /// The table of sections makes no sense.
    #[error("its table of sections is impossible")]
    Table,
    /// A section has other bytes than it should.
    #[error("its {0} cannot be read")]
    Section(
        &'static str,
        #[source] Box<dyn std::error::Error + Send + Sync>,
    ),
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
    /// The file that is to be written cannot be made.
    #[error("cannot write a snapshot to {}", .0.display())]
    Write(PathBuf, #[source] io::Error),
    /// A step of it failed.
    #[error("cannot {0}")]
    Step(String, #[source] Box<dyn std::error::Error + Send + Sync>),
    /// A disk, by its serial number or its number, cannot be what it was: what is wrong with its file.
    #[error("cannot use {path} as disk {0} of the snapshot's VM", path = .1.display())]
    Disk(
        String,
        PathBuf,
        #[source] Box<dyn std::error::Error + Send + Sync>,
    ),
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
