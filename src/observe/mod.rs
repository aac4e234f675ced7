//! Readers of a VM's data: what its console says, when what happened, and what is left to see of a guest that died.

pub mod phases;
pub mod post_mortem;
pub mod timeline;
pub mod transcript;
