//! virtio over MMIO, version 2 (§ 4.2).

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_mmio::*;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::core::state::SavedCore;
use super::core::{Core, Half, Ring};
use crate::bus::BusDevice;
use crate::interrupt::IrqLine;
use crate::state::{Record, SaveState, StateError, Suspend, from_record, to_record};
use crate::virtio::device::{Interrupt, VirtioDevice};

/// Version of the saved state.
const STATE_VERSION: u32 = 1;

/// Length of the register window in bytes, configuration space included.
pub const LEN: u64 = 0x1000;

/// Offset of the register to which a driver writes, with 32 bits, the number of a queue that has available buffers.
pub const QUEUE_NOTIFY: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;

/// Notifications of a queue that are exits before it gets an ioeventfd. A VM that ends within 14 ms of having got one waits
/// that long for an SRCU grace period in Linux 6.18; an ioeventfd saves 2 to 3 us over an exit. So exits have cost about as
/// much by then: a VM never pays more than twice what the better choice would have cost it, however long it runs.
pub const EXITS_BEFORE_IOEVENTFD: u32 = 4096;

/// MagicValue: "virt", little-endian.
const MAGIC: u32 = u32::from_le_bytes(*b"virt");
/// Version: the registers of virtio 1.
const VERSION_2: u32 = 2;
/// VendorID: any value will do; Linux shows it.
const VENDOR: u32 = u32::from_le_bytes(*b"mini");

/// A device behind MMIO registers.
///
/// Registers are accessed with aligned 32-bit accesses (§ 4.2.2.2); any other access to them reads as zero or is lost.
/// The configuration space takes every width.
pub struct MmioTransport {
    core: Core,
    interrupt: Interrupt,
    ioeventfds: Option<Ioeventfds>,
    /// Restored, and not resumed yet.
    restored: bool,
}

/// Has the hypervisor write an eventfd when the driver notifies a queue, by its number.
pub type RegisterIoeventfd = Box<dyn FnMut(u32, &EventFd) -> io::Result<()> + Send>;

struct Ioeventfds {
    register: RegisterIoeventfd,
    /// By queue, notifications that came as exits.
    notifications: BTreeMap<u16, u32>,
}

impl MmioTransport {
    /// Puts `device` behind registers; its interrupts go to `line`, an edge each.
    pub fn new(device: Box<dyn VirtioDevice>, mem: GuestMemoryMmap, line: IrqLine) -> Self {
        let interrupt = Interrupt::new(line);
        Self {
            core: Core::new(device, mem, interrupt.clone()),
            interrupt,
            ioeventfds: None,
            restored: false,
        }
    }

    /// Gives a queue that is notified [`EXITS_BEFORE_IOEVENTFD`] times an ioeventfd.
    pub fn use_ioeventfds(&mut self, register: RegisterIoeventfd) {
        self.ioeventfds = Some(Ioeventfds {
            register,
            notifications: BTreeMap::new(),
        });
    }

    fn notify(&mut self, queue: u32) {
        self.core.notify(queue);
        let Some(ioeventfds) = &mut self.ioeventfds else {
            return;
        };
        let index = u16::try_from(queue).ok();
        let Some((index, event)) = index.and_then(|i| Some((i, self.core.notifier(i)?))) else {
            return;
        };
        let count = ioeventfds.notifications.entry(index).or_default();
        *count = count.saturating_add(1);
        if *count == EXITS_BEFORE_IOEVENTFD
            && let Err(e) = (ioeventfds.register)(queue, event)
        {
            log::info!("each notification of virtqueue {queue} remains an exit: no ioeventfd: {e}");
        }
    }

    fn read_register(&self, offset: u32) -> u32 {
        match offset {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION_2,
            VIRTIO_MMIO_DEVICE_ID => self.core.device_type(),
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => self.core.device_features(),
            VIRTIO_MMIO_QUEUE_NUM_MAX => self.core.queue().map_or(0, |queue| queue.max_size.into()),
            VIRTIO_MMIO_QUEUE_READY => self.core.queue().map_or(0, |queue| queue.ready.into()),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt.status(),
            VIRTIO_MMIO_STATUS => self.core.status(),
            // No shared memory: length and base of each region are -1.
            VIRTIO_MMIO_SHM_LEN_LOW..=VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            VIRTIO_MMIO_CONFIG_GENERATION => self.core.config_generation(),
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u32, value: u32) {
        use Half::{High, Low};
        use Ring::{Available, Descriptors, Used};
        let core = &mut self.core;
        match offset {
            VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt.acknowledge(value),
            VIRTIO_MMIO_STATUS => core.set_status(value),
            _ if core.is_stopping() => {}
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => core.registers.device_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES => core.set_driver_features(value),
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => core.registers.driver_features_select = value,
            VIRTIO_MMIO_QUEUE_SEL => core.registers.queue_select = value,
            VIRTIO_MMIO_QUEUE_NUM => core.set_queue_size(value),
            VIRTIO_MMIO_QUEUE_READY => core.set_queue_ready(value & 1 != 0),
            VIRTIO_MMIO_QUEUE_NOTIFY => self.notify(value),
            VIRTIO_MMIO_QUEUE_DESC_LOW => core.set_queue_address(Descriptors, Low, value),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => core.set_queue_address(Descriptors, High, value),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => core.set_queue_address(Available, Low, value),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => core.set_queue_address(Available, High, value),
            VIRTIO_MMIO_QUEUE_USED_LOW => core.set_queue_address(Used, Low, value),
            VIRTIO_MMIO_QUEUE_USED_HIGH => core.set_queue_address(Used, High, value),
            _ => {}
        }
    }
}

/// Whether an access is one to the configuration space, and at which of its offsets.
fn config_offset(offset: u64) -> Option<u64> {
    offset.checked_sub(VIRTIO_MMIO_CONFIG.into())
}

/// The register at `offset`, for an access of four bytes that is aligned.
fn register(offset: u64, len: usize) -> Option<u32> {
    let offset = u32::try_from(offset).ok()?;
    (len == 4 && offset.is_multiple_of(4)).then_some(offset)
}

impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.core.poll_stop();
        if let Some(offset) = config_offset(offset) {
            return self.core.read_config(offset, data);
        }
        let value = register(offset, data.len()).map_or(0, |offset| self.read_register(offset));
        data.fill(0);
        for (byte, value) in data.iter_mut().zip(value.to_le_bytes()) {
            *byte = value;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.core.poll_stop();
        // No device has anything in its configuration space that a driver may write.
        if config_offset(offset).is_none()
            && let Some(offset) = register(offset, data.len())
            && let Ok(value) = data.try_into()
        {
            self.write_register(offset, u32::from_le_bytes(value));
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Saved {
    interrupt_status: u32,
    core: SavedCore,
}

impl SaveState for MmioTransport {
    fn save(&self) -> Result<Box<Record>, StateError> {
        let Self {
            core,
            interrupt,
            // A restored queue earns its ioeventfd anew.
            ioeventfds: _,
            restored: _,
        } = self;
        let saved = Saved {
            interrupt_status: interrupt.status(),
            core: core.save()?,
        };
        to_record(STATE_VERSION, saved)
    }

    fn restore(&mut self, record: &Record) -> Result<(), StateError> {
        let saved: Saved = from_record(STATE_VERSION, record)?;
        let status = saved.interrupt_status;
        if status & !(VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG) != 0 {
            let why = format!("has unknown bits: {status:#x}");
            return Err(StateError::value("interrupt_status", why));
        }
        self.core.restore(saved.core, status)?;
        self.restored = true;
        Ok(())
    }
}

impl Suspend for MmioTransport {
    fn pause(&mut self, wait: Duration) -> bool {
        self.core.pause(wait)
    }

    /// After a restore, an interrupt may have been lost, or one that EVENT_IDX did not ask for then.
    fn resume(&mut self) -> bool {
        let resumed = self.core.resume();
        if std::mem::take(&mut self.restored) {
            if self.core.has_active_queues() {
                self.interrupt.used_buffers();
            } else {
                self.interrupt.repeat();
            }
        }
        resumed
    }
}
