//! What a virtio device is to its transport.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::queue::Virtqueue;
use crate::state::SaveState;

/// A virtio device. The transport calls it, with status, features and queue parameters checked:
///
/// ```text
///            start             stop (a reset, a fault, the end)          stop gives the queues
/// stopped ----------> running ----------------------------------> stopping ---------------> stopped
///    ^ |                 | ^                                        | ^
///    +-+ stop            +-+ notify, write_config                   +-+ stop
/// ```
///
/// Whatever the state, the transport may ask for the type, features, queue sizes and configuration. Dropping a device
/// stops it. What it saves and restores, in the stopped state, is what the transport does not know.
pub trait VirtioDevice: SaveState + Send {
    /// The device ID (§ 5).
    fn device_type(&self) -> u32;

    /// Feature bits of this kind of device; those of the transport and the rings are added by the transport.
    fn features(&self) -> u64;

    /// The largest size of each queue: a power of two, at most 32768.
    fn queue_sizes(&self) -> &[u16];

    /// Reads the configuration space at `offset`. `data` is zero; what lies beyond the space stays so.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the configuration space. Most devices have nothing there that a driver may write.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// The driver has set DRIVER_OK: begin. Called in the stopped state alone. An error leaves the device stopped.
    fn start(&mut self, resources: Resources) -> io::Result<()>;

    /// The driver has made buffers available in this queue, which is one that `start` handed over. Must not block.
    fn notify(&mut self, queue: u16);

    /// By queue, eventfds to which a notification may be written at any time in place of a call of `notify`; a hypervisor
    /// does that without a way through the vCPU's thread.
    fn notifiers(&self) -> &[EventFd] {
        &[]
    }

    /// Stops all work, in this way. Once the last request has been completed or dropped, it hands the queues back, which say
    /// where they stand; in the stopped state there are none. `None` says that the host has not let go of a request, and of
    /// guest memory, within `wait`: the transport calls again, perhaps with another mode.
    fn stop(&mut self, mode: StopMode, wait: Duration) -> Option<Vec<Virtqueue>>;
}

/// What becomes of the requests that a device has taken from its queues when it stops. It takes no others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopMode {
    /// They are carried out to their end: the device is to go on from where it stands.
    Drain,
    /// They end as soon as the host lets go of them, with an error if need be.
    Cancel,
}

/// What a device works with while it runs.
pub struct Resources {
    /// Guest RAM.
    pub mem: GuestMemoryMmap,
    /// The features that the driver has accepted, all of them.
    pub features: u64,
    /// The queues that the driver has made ready; each knows its index.
    pub queues: Vec<Virtqueue>,
    /// How the device tells the driver, and the transport.
    pub interrupt: Interrupt,
    /// The driver is the one that the device was stopped under, without a reset since: it has taken another queue back, or
    /// the VM was paused or restored. The device goes on where it was.
    pub resumed: bool,
}

/// Where the interrupts of a device go: what differs between transports.
pub trait InterruptTarget: Send + Sync {
    /// This queue has new used buffers.
    fn used_buffers(&self, queue: u16);
    /// The configuration or the device status has changed.
    fn config_changed(&self);
    /// The device has been reset: nothing that it has told is of interest any more.
    fn reset(&self);
}

/// The device's way to its driver. Clones are one and the same.
#[derive(Clone)]
pub struct Interrupt(Arc<Shared>);

struct Shared {
    target: Box<dyn InterruptTarget>,
    needs_reset: AtomicBool,
    config_generation: AtomicU32,
    /// It has been warned of; a guest that goes on breaking rules cannot flood the log.
    reported: AtomicBool,
}

impl Interrupt {
    /// Interrupts that end at `target`.
    pub fn new(target: impl InterruptTarget + 'static) -> Self {
        Self(Arc::new(Shared {
            target: Box::new(target),
            needs_reset: AtomicBool::new(false),
            config_generation: AtomicU32::new(0),
            reported: AtomicBool::new(false),
        }))
    }

    /// Tells the driver of used buffers in this queue.
    pub fn used_buffers(&self, queue: u16) {
        self.0.target.used_buffers(queue);
    }

    /// Tells the driver of a change in the configuration space. A driver must not be able to read the new values before.
    pub fn config_changed(&self) {
        self.0.config_generation.fetch_add(1, Ordering::AcqRel);
        self.0.target.config_changed();
    }

    /// Sets DEVICE_NEEDS_RESET and tells the driver (§ 2.1.2). Whoever calls this does no more work.
    pub fn needs_reset(&self, why: &dyn fmt::Display) {
        self.set_needs_reset(why);
        self.config_changed();
    }

    /// The same without a word to the driver: before DRIVER_OK, a device sends nothing (§ 2.1.2).
    pub(super) fn set_needs_reset(&self, why: &dyn fmt::Display) {
        let level = if self.0.reported.swap(true, Ordering::Relaxed) {
            log::Level::Debug
        } else {
            log::Level::Warn
        };
        log::log!(
            level,
            "a virtio device has stopped until its driver resets it: {why}"
        );
        self.0.needs_reset.store(true, Ordering::Release);
    }

    /// How often the configuration space has changed (§ 2.5.1): a driver that reads it in pieces sees whether they belong
    /// together.
    pub(super) fn config_generation(&self) -> u32 {
        self.0.config_generation.load(Ordering::Acquire)
    }

    /// Whether DEVICE_NEEDS_RESET is set.
    pub(super) fn is_reset_needed(&self) -> bool {
        self.0.needs_reset.load(Ordering::Acquire)
    }

    /// The device is as it was saved.
    pub(super) fn restore(&self, needs_reset: bool, config_generation: u32) {
        self.0.needs_reset.store(needs_reset, Ordering::Release);
        let generation = &self.0.config_generation;
        generation.store(config_generation, Ordering::Release);
    }

    /// The device has been reset.
    pub(super) fn reset(&self) {
        self.0.needs_reset.store(false, Ordering::Release);
        self.0.target.reset();
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
