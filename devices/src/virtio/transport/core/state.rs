//! Pausing, saving and restoring what every transport has.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK,
};

use super::super::super::device::StopMode;
use super::super::super::queue::{QueueState, check_rings};
use super::{Core, Registers, STATUS_STEPS, State, Then};
use crate::state::{Record, StateError};

/// The saved state of a device with its status, features and queue parameters.
#[derive(Serialize, Deserialize)]
pub struct SavedCore {
    device_type: u32,
    #[serde(flatten)]
    registers: Registers,
    needs_reset: bool,
    config_generation: u32,
    queues: Vec<SavedQueue>,
    device: Box<Record>,
}

#[derive(Serialize, Deserialize)]
struct SavedQueue {
    size: u16,
    ready: bool,
    descriptors: u64,
    available: u64,
    used: u64,
    next_avail: u16,
    next_used: u16,
}

impl From<&QueueState> for SavedQueue {
    fn from(queue: &QueueState) -> Self {
        let QueueState {
            // The device's.
            max_size: _,
            next_avail,
            next_used,
            // Follows from the features.
            event_idx_enabled: _,
            size,
            ready,
            desc_table,
            avail_ring,
            used_ring,
        } = *queue;
        Self {
            size,
            ready,
            descriptors: desc_table,
            available: avail_ring,
            used: used_ring,
            next_avail,
            next_used,
        }
    }
}

impl Core {
    /// See [`crate::state::Suspend::pause`].
    pub fn pause(&mut self, wait: Duration) -> bool {
        let end = Instant::now() + wait;
        if let State::Stopping(mode, Then::GoOn) = self.state {
            self.state = State::Stopping(mode, Then::Pause);
        }
        // The driver may have asked for a stop, too, after which some devices go on.
        self.finish_stop(wait);
        if self.state == State::Running {
            self.state = State::Stopping(StopMode::Drain, Then::Pause);
            self.finish_stop(end.saturating_duration_since(Instant::now()));
        }
        !self.is_stopping()
    }

    /// See [`crate::state::Suspend::resume`].
    pub fn resume(&mut self) -> bool {
        match self.state {
            State::Paused => {
                self.state = State::Stopped;
                self.start(true);
            }
            State::Stopping(mode, Then::Pause) => self.state = State::Stopping(mode, Then::GoOn),
            _ => self.poll_stop(),
        }
        !matches!(self.state, State::Stopping(_, Then::GoOn))
    }

    /// Whether the driver may wait for used buffers.
    pub fn has_active_queues(&self) -> bool {
        self.state == State::Running && self.queues.iter().any(|queue| queue.ready)
    }

    /// The state of a paused device.
    pub fn save(&self) -> Result<SavedCore, StateError> {
        let Self {
            device,
            mem: _,
            interrupt,
            registers,
            state,
            queues,
        } = self;
        if !matches!(state, State::Stopped | State::Paused) {
            return Err(StateError::NotPaused);
        }
        Ok(SavedCore {
            device_type: device.device_type(),
            registers: *registers,
            needs_reset: interrupt.is_reset_needed(),
            config_generation: interrupt.config_generation(),
            queues: queues.iter().map(SavedQueue::from).collect(),
            device: device.save()?,
        })
    }

    /// Takes over a saved state, with the checks that a driver's writes go through. Nothing runs before [`Core::resume`].
    pub fn restore(&mut self, saved: SavedCore, interrupt_status: u32) -> Result<(), StateError> {
        let device_type = self.device.device_type();
        if saved.device_type != device_type {
            let why = format!(
                "is {}, and the device here {device_type}",
                saved.device_type
            );
            return Err(StateError::value("device_type", why));
        }
        // Some features follow from it.
        self.device.restore(&saved.device)?;
        let runs = self.check_status(&saved)?;
        let sizes = self.device.queue_sizes();
        if saved.queues.len() != sizes.len() {
            let why = format!(
                "are {}, and the device here has {}",
                saved.queues.len(),
                sizes.len()
            );
            return Err(StateError::value("queues", why));
        }
        let queues = saved.queues.iter().zip(sizes);
        let queues = queues.map(|(queue, max)| self.check_queue(queue, *max, runs));
        self.queues = queues.collect::<Result<_, _>>()?;
        self.registers = saved.registers;
        self.interrupt
            .restore(interrupt_status, saved.needs_reset, saved.config_generation);
        self.state = if runs { State::Paused } else { State::Stopped };
        Ok(())
    }

    /// Checks status and features; says whether the device is one that runs.
    fn check_status(&self, saved: &SavedCore) -> Result<bool, StateError> {
        let Registers {
            status: written,
            driver_features: features,
            ..
        } = saved.registers;
        let status = written & !VIRTIO_CONFIG_S_FAILED;
        // 0 and each step with all before it (§ 3.1.1).
        let mut reached = 0;
        let is_possible = status == 0
            || STATUS_STEPS.iter().any(|step| {
                reached |= step;
                reached == status
            });
        if !is_possible {
            return Err(StateError::value("status", format!("is {written:#x}")));
        }
        let offered = self.offered_features();
        if status & VIRTIO_CONFIG_S_FEATURES_OK != 0 && !self.are_features_possible(features) {
            let why = format!("are {features:#x}, and the device here offers {offered:#x}");
            return Err(StateError::value("driver_features", why));
        }
        Ok(written & VIRTIO_CONFIG_S_FAILED == 0
            && status & VIRTIO_CONFIG_S_DRIVER_OK != 0
            && !saved.needs_reset)
    }

    fn check_queue(
        &self,
        saved: &SavedQueue,
        max_size: u16,
        runs: bool,
    ) -> Result<QueueState, StateError> {
        let size = saved.size;
        if !size.is_power_of_two() || size > max_size {
            let why = format!("has size {size}, which is not a power of two from 1 to {max_size}");
            return Err(StateError::value("a queue", why));
        }
        // A pause ends all requests that were taken.
        if runs && saved.next_avail != saved.next_used {
            let why = format!(
                "has {} taken and {} used",
                saved.next_avail, saved.next_used
            );
            return Err(StateError::value("a queue", why));
        }
        let queue = QueueState {
            max_size,
            next_avail: saved.next_avail,
            next_used: saved.next_used,
            event_idx_enabled: false,
            size,
            ready: saved.ready,
            desc_table: saved.descriptors,
            avail_ring: saved.available,
            used_ring: saved.used,
        };
        if queue.ready {
            check_rings(&queue, &self.mem).map_err(|e| StateError::value("a queue:", e))?;
        }
        Ok(queue)
    }
}
