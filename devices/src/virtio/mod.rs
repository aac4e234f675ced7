//! virtio 1.2: devices that share guest memory with their driver.
//!
//! A device ([`device::VirtioDevice`]) knows its kind, its features, its configuration space and its requests. All that
//! devices have in common is elsewhere: the [`transport`] owns status, features and the queues' parameters; a
//! [`queue::Virtqueue`] walks the rings; a [`worker::QueueWorker`] serves queues on a thread of its own.
//!
//! Everything that is read from guest memory is read once, checked, and used from the copy. A driver that breaks the
//! rules of the transport or of a ring gets DEVICE_NEEDS_RESET (§ 2.1.2): its device does nothing more until it is reset.
//!
//! Locks: vCPUs reach a transport through the bus, with its lock held. Workers hold none of it: they have a queue and an
//! interrupt of their own, so that a transport may wait for its device's workers.

pub mod blk;
pub mod console;
pub mod device;
pub mod net;
pub mod queue;
mod resources;
pub mod rng;
pub mod transport;
mod vectored;
pub mod vsock;
pub mod worker;

#[cfg(test)]
mod conformance;
#[cfg(test)]
mod state_tests;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// VIRTIO_F_VERSION_1 (§ 6): the driver knows virtio 1.
pub const F_VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
/// VIRTIO_F_EVENT_IDX (§ 6): each side says at which entry it wants to be told.
pub const F_EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
/// VIRTIO_F_INDIRECT_DESC (§ 6): a descriptor may refer to a table of descriptors.
pub const F_INDIRECT_DESC: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC;
