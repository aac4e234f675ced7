//! The subcommands beside running a VM, and what they share.

pub mod bench;
pub mod compare;
pub mod doctor;
pub mod measure;
