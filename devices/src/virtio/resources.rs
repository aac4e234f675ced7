//! What a virtio device works with from its start to its stop.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use vm_memory::GuestMemoryMmap;

use super::queue::Virtqueue;
use crate::interrupt::IrqLine;

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

/// The device's way to its driver. Clones are one and the same.
#[derive(Clone)]
pub struct Interrupt(Arc<Shared>);

struct Shared {
    line: IrqLine,
    /// InterruptStatus (§ 4.2.2), which is set before the edge: who sees the edge sees why.
    status: AtomicU32,
    needs_reset: AtomicBool,
    config_generation: AtomicU32,
    /// It has been warned of; a guest that goes on breaking rules cannot flood the log.
    reported: AtomicBool,
}

impl Interrupt {
    /// Interrupts by this line, an edge each.
    pub fn new(line: IrqLine) -> Self {
        Self(Arc::new(Shared {
            line,
            status: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
            config_generation: AtomicU32::new(0),
            reported: AtomicBool::new(false),
        }))
    }

    fn raise(&self, bits: u32) {
        self.0.status.fetch_or(bits, Ordering::AcqRel);
        self.0.line.signal();
    }

    /// Tells the driver of used buffers.
    pub fn used_buffers(&self) {
        self.raise(VIRTIO_MMIO_INT_VRING);
    }

    /// Tells the driver of a change in the configuration space. A driver must not be able to read the new values before.
    pub fn config_changed(&self) {
        self.0.config_generation.fetch_add(1, Ordering::AcqRel);
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    /// InterruptStatus: what the driver has been told and has not acknowledged.
    pub(super) fn status(&self) -> u32 {
        self.0.status.load(Ordering::Acquire)
    }

    /// The driver acknowledges these bits of it.
    pub(super) fn acknowledge(&self, bits: u32) {
        self.0.status.fetch_and(!bits, Ordering::AcqRel);
    }

    /// Signals the line once more, if the driver has not acknowledged all.
    pub(super) fn repeat(&self) {
        if self.status() != 0 {
            self.0.line.signal();
        }
    }

    /// Sets DEVICE_NEEDS_RESET and tells the driver (§ 2.1.2). The caller does no more work.
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
    pub(super) fn restore(&self, status: u32, needs_reset: bool, config_generation: u32) {
        self.0.status.store(status, Ordering::Release);
        self.0.needs_reset.store(needs_reset, Ordering::Release);
        let generation = &self.0.config_generation;
        generation.store(config_generation, Ordering::Release);
    }

    /// The device has been reset: nothing that it has told is of interest any more.
    pub(super) fn reset(&self) {
        self.0.needs_reset.store(false, Ordering::Release);
        self.0.status.store(0, Ordering::Release);
    }
}
