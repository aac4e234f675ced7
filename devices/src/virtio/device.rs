//! What a virtio device is to its transport.

use std::io;
use std::time::Duration;

use super::queue::Virtqueue;
pub use super::resources::{Interrupt, Resources, StopMode};
use super::worker::QueueWorker;
use crate::state::SaveState;

/// A virtio device. The transport calls it, with status, features and queue parameters checked:
///
/// ```text
///            start             stop (a reset, a fault, the end)          stop gives the queues
/// stopped ----------> running ----------------------------------> stopping ---------------> stopped
///    ^ |                 | ^                                        | ^
///    +-+ stop            +-+ notify                                 +-+ stop
/// ```
///
/// Whatever the state, the transport may ask for the type, features, queue sizes and configuration. Dropping a device
/// stops it. Where `workers` serve its queues, the last three of the calls here are theirs. What it saves and restores, in the stopped state, is what the transport does not know.
pub trait VirtioDevice: SaveState + Send {
    /// The device ID (§ 5).
    fn device_type(&self) -> u32;

    /// Feature bits of this kind of device; those of the transport and the rings are added by the transport.
    fn features(&self) -> u64;

    /// The largest size of each queue: a power of two, at most 32768.
    fn queue_sizes(&self) -> &[u16];

    /// Reads the configuration space at `offset`. `data` is zero; what lies beyond the space stays so.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// The threads that serve its queues; a device without any starts, is notified and stops in ways of its own.
    fn workers(&mut self) -> &mut [QueueWorker] {
        &mut []
    }

    /// The driver has set DRIVER_OK: begin. Called in the stopped state alone. An error leaves the device stopped.
    fn start(&mut self, resources: Resources) -> io::Result<()> {
        QueueWorker::start_all(self.workers(), resources);
        Ok(())
    }

    /// The driver has made buffers available in this queue, which is one that `start` handed over. Must not block.
    fn notify(&mut self, queue: u16) {
        QueueWorker::notify(self.workers(), queue);
    }

    /// Stops all work, in this way. Once the last request has been completed or dropped, it hands the queues back, which say
    /// where they stand; in the stopped state there are none. `None` says that the host has not let go of a request, and of
    /// guest memory, within `wait`: the transport calls again, perhaps with another mode.
    fn stop(&mut self, mode: StopMode, wait: Duration) -> Option<Vec<Virtqueue>> {
        QueueWorker::stop_all(self.workers(), mode, wait)
    }
}

/// Reads a configuration space that is these bytes (§ 2.5): a helper for [`VirtioDevice::read_config`].
pub(super) fn read_config_bytes(space: &[u8], offset: u64, data: &mut [u8]) {
    let from = usize::try_from(offset)
        .ok()
        .and_then(|offset| space.get(offset..));
    for (byte, value) in data.iter_mut().zip(from.unwrap_or_default()) {
        *byte = *value;
    }
}
