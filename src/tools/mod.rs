//! The subcommands other than running a VM, and what they share.

pub mod bench;
pub mod compare;
pub(crate) mod cpio;
pub mod doctor;
pub mod error;
pub mod measure;
