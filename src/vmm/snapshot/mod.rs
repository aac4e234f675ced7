//! Snapshots: a paused VM in one file, and VMs that start from it.
//!
//! The file has a header of 4 KiB, sections, and guest RAM at a multiple of 2 MiB, in which pages of zeros are holes. [`mod@file`]
//! knows that layout, [`record`] what is in the sections. [`save`] writes a file, [`load`] reads one, disks.rs has what both do about disks.

mod disks;
pub mod error;
pub mod file;
pub mod host;
pub mod load;
pub mod record;
pub mod save;
pub(super) mod sparse;

pub use disks::SavedDisk;
pub use error::SnapshotError;
pub use load::Snapshot;
