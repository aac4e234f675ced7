//! Status, features and queue parameters of a device (§ 2.1, § 2.2, § 3.1): the part that every transport has.
//!
//! A driver that breaks a rule gets DEVICE_NEEDS_RESET and a stopped device; what it wrote has no effect. Two things are
//! let pass without a word, because drivers do them and they do no harm: a selector out of range, which is how a driver
//! finds out how many queues there are, and a notification that nobody waits for.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::super::device::{Interrupt, Resources, StopMode, VirtioDevice};
use super::super::queue::{QueueError, QueueState, Virtqueue, bad, check_rings};
use super::super::worker::QueueWorker;
use super::super::{F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1};

pub(super) mod state;

/// What a driver sets in the device status (§ 2.1), each after the one before it (§ 3.1.1).
const STATUS_STEPS: [u32; 4] = [
    VIRTIO_CONFIG_S_ACKNOWLEDGE,
    VIRTIO_CONFIG_S_DRIVER,
    VIRTIO_CONFIG_S_FEATURES_OK,
    VIRTIO_CONFIG_S_DRIVER_OK,
];

/// Longest that a driver's access waits for a device to stop. A host that is well lets go of all requests within that time, so that
/// the access is over when it returns, which is what Linux relies on: it does not poll (drivers/virtio/virtio_mmio.c). Where
/// it is not, the vCPU goes on, and the driver can see in the device status, or in QueueReady, that it must wait.
const STOP_WAIT: Duration = Duration::from_millis(20);

/// What every transport offers beside the device's own features.
const TRANSPORT_FEATURES: u64 = F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC;

/// One of a queue's three addresses (§ 2.7).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ring {
    /// Descriptor table.
    Descriptors,
    /// Available ring, the "driver area".
    Available,
    /// Used ring, the "device area".
    Used,
}

/// Half of a 64-bit value that a driver accesses in two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Half {
    /// Bits 0-31.
    Low,
    /// Bits 32-63.
    High,
}

/// What the device does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Stopped,
    Running,
    /// It was running, and goes on where it stands.
    Paused,
    /// The host has not let go of every request. Until then, nothing but a reset has an effect.
    Stopping(StopMode, Then),
}

/// What follows when the device has stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    Nothing,
    Reset,
    Pause,
    /// The pause has been given up.
    GoOn,
    /// The driver has this queue back, and a device that was running goes on with the others.
    ReturnQueue {
        queue: u32,
        go_on: bool,
    },
}

/// A device with its status, features and queue parameters.
pub struct Core {
    device: Box<dyn VirtioDevice>,
    mem: GuestMemoryMmap,
    interrupt: Interrupt,
    /// What the driver has written.
    pub registers: Registers,
    state: State,
    queues: Vec<QueueState>,
}

/// What a driver writes, but for the parameters of queues.
#[derive(Clone, Copy, Default, Serialize, Deserialize)]
pub struct Registers {
    /// The device status; DEVICE_NEEDS_RESET is the interrupt's to know.
    status: u32,
    /// Which 32 of the offered feature bits the driver reads.
    pub device_features_select: u32,
    /// Which 32 feature bits the driver writes.
    pub driver_features_select: u32,
    driver_features: u64,
    /// The queue of which the driver reads and writes the parameters.
    pub queue_select: u32,
}

impl Core {
    /// The device after a reset.
    pub fn new(device: Box<dyn VirtioDevice>, mem: GuestMemoryMmap, interrupt: Interrupt) -> Self {
        let mut core = Self {
            device,
            mem,
            interrupt,
            registers: Registers::default(),
            state: State::Stopped,
            queues: Vec::new(),
        };
        core.stop(StopMode::Cancel, Then::Reset);
        core
    }

    /// The device's ID (§ 5).
    pub fn device_type(&self) -> u32 {
        self.device.device_type()
    }

    /// The device status (§ 2.1).
    pub fn status(&self) -> u32 {
        if self.interrupt.is_reset_needed() {
            self.registers.status | VIRTIO_CONFIG_S_NEEDS_RESET
        } else {
            self.registers.status
        }
    }

    /// Whether the device is still to stop; what the driver writes is lost meanwhile, but for the device status.
    pub fn is_stopping(&self) -> bool {
        matches!(self.state, State::Stopping(..))
    }

    /// The driver writes the device status. Zero is a reset, which is over when the status reads as zero: then no request is
    /// in flight.
    pub fn set_status(&mut self, new: u32) {
        if new == 0 {
            return self.stop(StopMode::Cancel, Then::Reset);
        }
        if self.is_stopping() {
            return;
        }
        let old = self.registers.status;
        // A bit once set goes only in a reset (§ 2.1.1). DEVICE_NEEDS_RESET is not the driver's.
        let known = STATUS_STEPS
            .iter()
            .fold(VIRTIO_CONFIG_S_FAILED, |all, bit| all | bit);
        let given = new & !VIRTIO_CONFIG_S_NEEDS_RESET;
        let fault = format_args!("device status {new:#x} written over {old:#x}");
        if given & !known != 0 || given & old != old {
            return self.fail(fault);
        }
        if given & VIRTIO_CONFIG_S_FAILED != 0 {
            // The driver has given up.
            self.registers.status |= VIRTIO_CONFIG_S_FAILED;
            return self.stop(StopMode::Cancel, Then::Nothing);
        }
        let mut before = true;
        for step in STATUS_STEPS {
            if given & step & !self.registers.status != 0 {
                if !before {
                    return self.fail(fault);
                }
                match step {
                    // § 3.1.1 step 6: the driver reads back whether the device agrees. To go on all the same is a fault.
                    VIRTIO_CONFIG_S_FEATURES_OK
                        if !self.are_features_possible(self.registers.driver_features) => {}
                    VIRTIO_CONFIG_S_DRIVER_OK => return self.start(false),
                    _ => self.registers.status |= step,
                }
            }
            before = self.registers.status & step != 0;
        }
    }

    fn are_features_possible(&self, accepted: u64) -> bool {
        accepted & !self.offered_features() == 0 && accepted & F_VERSION_1 != 0
    }

    fn offered_features(&self) -> u64 {
        self.device.features() | TRANSPORT_FEATURES
    }

    /// The selected 32 bits of the offered features (§ 2.2); zero beyond the 64 that there are.
    pub fn device_features(&self) -> u32 {
        match self.registers.device_features_select {
            0 => self.offered_features() as u32,
            1 => (self.offered_features() >> 32) as u32,
            _ => 0,
        }
    }

    /// The driver accepts features (§ 2.2.1).
    pub fn set_driver_features(&mut self, bits: u32) {
        if self.registers.status & VIRTIO_CONFIG_S_FEATURES_OK != 0 {
            return self.fail("features written when they were agreed on");
        }
        let half = match self.registers.driver_features_select {
            0 => Half::Low,
            1 => Half::High,
            _ => return,
        };
        set_half(&mut self.registers.driver_features, half, bits);
    }

    /// The selected queue's parameters, if there is such a queue.
    pub fn queue(&self) -> Option<&QueueState> {
        self.queues
            .get(usize::try_from(self.registers.queue_select).ok()?)
    }

    fn selected_queue(&mut self) -> Option<&mut QueueState> {
        self.queues
            .get_mut(usize::try_from(self.registers.queue_select).ok()?)
    }

    /// The driver sets the selected queue's size.
    pub fn set_queue_size(&mut self, size: u32) {
        self.change_queue(|queue, _| {
            let max = queue.max_size;
            if !size.is_power_of_two() || size > max.into() {
                return bad(format!(
                    "queue size {size} is not a power of two from 1 to {max}"
                ));
            }
            queue.size = size as u16;
            Ok(())
        });
    }

    /// The driver sets half of one of the selected queue's addresses.
    pub fn set_queue_address(&mut self, ring: Ring, half: Half, value: u32) {
        self.change_queue(|queue, _| {
            let address = match ring {
                Ring::Descriptors => &mut queue.desc_table,
                Ring::Available => &mut queue.avail_ring,
                Ring::Used => &mut queue.used_ring,
            };
            set_half(address, half, value);
            Ok(())
        });
    }

    /// The driver makes the selected queue ready, or takes it back, which it may do at any time (§ 4.2.2.2) and which is over
    /// when QueueReady reads as zero.
    pub fn set_queue_ready(&mut self, ready: bool) {
        if ready {
            return self.change_queue(|queue, mem| {
                check_rings(queue, mem)?;
                queue.ready = true;
                Ok(())
            });
        }
        if !self.queue().is_some_and(|queue| queue.ready) {
            return;
        }
        let then = Then::ReturnQueue {
            queue: self.registers.queue_select,
            go_on: self.state == State::Running,
        };
        self.stop(StopMode::Drain, then);
    }

    /// Changes the selected queue, which must be one that is not in use yet.
    fn change_queue(
        &mut self,
        change: impl FnOnce(&mut QueueState, &GuestMemoryMmap) -> Result<(), QueueError>,
    ) {
        let in_use = self.registers.status & VIRTIO_CONFIG_S_DRIVER_OK != 0;
        let mem = self.mem.clone();
        let Some(queue) = self.selected_queue() else {
            return;
        };
        let result = if queue.ready || in_use {
            bad("a queue changed that was ready, or in a running device")
        } else {
            change(queue, &mem)
        };
        if let Err(fault) = result {
            self.fail(fault);
        }
    }

    /// The driver notifies the device of available buffers in this queue (§ 2.9).
    pub fn notify(&mut self, queue: u32) {
        if let Ok(queue) = u16::try_from(queue)
            && self.state == State::Running
            && self
                .queues
                .get(usize::from(queue))
                .is_some_and(|queue| queue.ready)
        {
            self.device.notify(queue);
        }
    }

    /// See [`QueueWorker::notifier`].
    pub fn notifier(&mut self, queue: u16) -> Option<&EventFd> {
        QueueWorker::notifier(self.device.workers(), queue)
    }

    /// How often the configuration space has changed (§ 2.5.1).
    pub fn config_generation(&self) -> u32 {
        self.interrupt.config_generation()
    }

    /// The driver reads the configuration space (§ 2.5). What the device does not have is zero.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        self.device.read_config(offset, data);
    }

    /// DRIVER_OK, or the driver goes on without a queue: hands the ready queues to the device.
    fn start(&mut self, resumed: bool) {
        self.registers.status |= VIRTIO_CONFIG_S_DRIVER_OK;
        if self.interrupt.is_reset_needed() {
            // What was broken before is told now (§ 2.1.2).
            return self.interrupt.config_changed();
        }
        let indirect = self.registers.driver_features & F_INDIRECT_DESC != 0;
        let event_idx = self.registers.driver_features & F_EVENT_IDX != 0;
        let queues: Result<Vec<_>, _> = (0u16..)
            .zip(&mut self.queues)
            .filter(|(_, state)| state.ready)
            .map(|(index, state)| {
                state.event_idx_enabled = event_idx;
                Virtqueue::new(index, *state, indirect, &self.mem)
            })
            .collect();
        let started = queues.map_err(|e| e.to_string()).and_then(|queues| {
            let resources = Resources {
                mem: self.mem.clone(),
                features: self.registers.driver_features,
                queues,
                interrupt: self.interrupt.clone(),
                resumed,
            };
            self.device
                .start(resources)
                .map_err(|e| format!("the host lacks something: {e}"))
        });
        match started {
            Ok(()) => self.state = State::Running,
            Err(fault) => self.fail(fault),
        }
    }

    /// Stops the device, now or, if that takes longer, by and by.
    fn stop(&mut self, mode: StopMode, then: Then) {
        // Who waits for a reset already does not hold the vCPU once more.
        let wait = if self.is_stopping() {
            Duration::ZERO
        } else {
            STOP_WAIT
        };
        self.state = State::Stopping(mode, then);
        self.finish_stop(wait);
    }

    /// Looks whether a device that was to stop has done so: to be called before each access.
    pub fn poll_stop(&mut self) {
        if self.is_stopping() {
            self.finish_stop(Duration::ZERO);
        }
    }

    /// Notes where the queues of a device that has stopped stand, and does what follows.
    fn finish_stop(&mut self, wait: Duration) {
        let State::Stopping(mode, then) = self.state else {
            return;
        };
        let Some(queues) = self.device.stop(mode, wait) else {
            return;
        };
        for queue in queues {
            if let Some(state) = self.queues.get_mut(usize::from(queue.index())) {
                *state = queue.state();
            }
        }
        self.state = State::Stopped;
        match then {
            Then::Nothing => {}
            Then::Reset => self.reset(),
            // One that needs a reset has nothing to go on with.
            Then::Pause if self.interrupt.is_reset_needed() => {}
            Then::Pause => self.state = State::Paused,
            Then::GoOn => self.start(true),
            Then::ReturnQueue { queue, go_on } => {
                if let Some(queue) = self.queues.get_mut(queue as usize) {
                    queue.ready = false;
                    (queue.next_avail, queue.next_used) = (0, 0);
                }
                // The others stand where they stood.
                if go_on {
                    self.start(true);
                }
            }
        }
    }

    fn reset(&mut self) {
        // Nothing can set it now.
        self.interrupt.reset();
        self.registers = Registers::default();
        self.queues = self
            .device
            .queue_sizes()
            .iter()
            .map(|max| QueueState {
                max_size: *max,
                size: *max,
                ..QueueState::default()
            })
            .collect();
    }

    fn fail(&mut self, fault: impl fmt::Display) {
        self.stop(StopMode::Cancel, Then::Nothing);
        if self.registers.status & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            self.interrupt.needs_reset(&fault);
        } else {
            self.interrupt.set_needs_reset(&fault);
        }
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        // Without a wait: dropping the device waits.
        self.device.stop(StopMode::Cancel, Duration::ZERO);
    }
}

fn set_half(value: &mut u64, half: Half, bits: u32) {
    *value = match half {
        Half::Low => *value & !u64::from(u32::MAX) | u64::from(bits),
        Half::High => *value & u64::from(u32::MAX) | u64::from(bits) << 32,
    };
}
