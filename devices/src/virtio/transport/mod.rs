//! How a driver reaches a virtio device (§ 4). What the transports have in common is in [`core`].

pub mod core;
pub mod mmio;
