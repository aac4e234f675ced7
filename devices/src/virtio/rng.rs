//! The entropy device (§ 5.4): fills buffers with the host's random numbers.

use std::io;

use rustix::rand::{GetRandomFlags, getrandom};

use super::device::VirtioDevice;
use super::queue::{Chain, QueueError};
use super::worker::{self, QueueWorker};
use crate::state::{Record, SaveState, StateError, from_record, to_record};
use crate::thread::{ThreadKind, ThreadStarter};

/// Device ID (§ 5).
pub const DEVICE_TYPE: u32 = 4;

/// Version of the saved state.
const STATE_VERSION: u32 = 1;

/// One queue, `requestq`.
const QUEUE_SIZES: [u16; 1] = [64];

/// Bytes that a request gets at most. Linux asks for 64; the device may give less than asked (§ 5.4.6.2).
const MAX_BYTES: usize = 4096;

/// The device. It has neither features nor configuration.
pub struct Rng {
    workers: [QueueWorker; 1],
}

impl Rng {
    /// Most bytes that it takes beside guest RAM.
    pub const MEMORY_BOUND: usize = worker::MEMORY_BOUND + Chain::memory_bound(QUEUE_SIZES[0]);

    /// A device with its thread.
    pub fn new(threads: &ThreadStarter) -> io::Result<Self> {
        let (kind, name) = (ThreadKind::Rng, "virtio-rng".into());
        let worker = QueueWorker::new(threads, kind, name, 0..1, &[], |worker, queues| {
            let mut chain = Chain::default();
            worker.run(queues, |queue| queue.handle_all(&mut chain, give_entropy))
        })?;
        Ok(Self { workers: [worker] })
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn workers(&mut self) -> &mut [QueueWorker] {
        &mut self.workers
    }
}

impl SaveState for Rng {
    /// Nothing: random numbers are the host's.
    fn save(&self) -> Result<Box<Record>, StateError> {
        let Self { workers: _ } = self;
        to_record(STATE_VERSION, ())
    }

    fn restore(&mut self, record: &Record) -> Result<(), StateError> {
        from_record(STATE_VERSION, record)
    }
}

fn give_entropy(chain: &mut Chain<'_>) -> Result<u32, QueueError> {
    let mut bytes = [0; MAX_BYTES];
    let wanted = usize::try_from(chain.writable.len()).unwrap_or(MAX_BYTES);
    let buffer = bytes.get_mut(..wanted.min(MAX_BYTES)).unwrap_or_default();
    // This blocks only in the first moments after the host's boot, and gives less than asked only after a signal.
    let given = getrandom(&mut *buffer, GetRandomFlags::empty()).unwrap_or(0);
    let given = buffer.get(..given).unwrap_or_default();
    Ok(chain.writable.write_front(given) as u32)
}
