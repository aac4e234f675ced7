//! Device models of minivmm.
//!
//! This crate knows buses ([`bus`]), interrupt lines ([`interrupt`]), guest memory ([`virtio`]) and what a guest can
//! report to the VMM ([`event`]), and how all of that is paused, saved and restored ([`state`]). It does not depend on
//! KVM, so everything in it is tested without a hypervisor.
//!
//! Locks: a device lives in an `Arc<Mutex<_>>` that the [`bus`] takes for one access. Callbacks that a device is given
//! (event sinks, interrupt triggers, console output, kicks) are called with that lock held: they must neither block nor
//! come back to the same device.

#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::indexing_slicing
    )
)]

#[cfg(feature = "attack-port")]
#[path = "../../tests/attack/port.rs"]
pub mod attack;
pub mod block;
pub mod bus;
pub mod chardev;
pub mod event;
pub mod interrupt;
pub mod platform;
#[cfg(test)]
#[path = "../../tests/common/skip.rs"]
mod skip;
pub mod state;
pub mod thread;
pub mod virtio;
pub use thread::STACK_SIZE as THREAD_STACK;
