//! Observers of a VM: console scanner, boot timeline, post-mortem.

pub mod memory;
pub mod phases;
pub mod post_mortem;
pub mod timeline;
pub mod transcript;
