//! Readers of a VM's data: when what happened, and what is left to see of a guest that died.

pub mod post_mortem;
pub mod timeline;
