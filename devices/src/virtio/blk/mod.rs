//! The block device (§ 5.2): the front end of a [`Disk`].

mod request;
mod serve;
#[cfg(test)]
pub(super) mod tests;

use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};

pub use request::MAX_ID_LEN;
use request::{MAX_DISCARD_SECTORS, MAX_WRITE_ZEROES_SECTORS, Requests, SEG_MAX, SIZE_MAX};

use super::device::{Resources, VirtioDevice, read_config_bytes};
use super::worker::{self, QueueWorker};
use crate::block::ring::Ring;
use crate::block::{Disk, Engine, SECTOR_SIZE};
use crate::state::{Record, SaveState, StateError, from_record, to_record};
use crate::thread::{ThreadKind, ThreadStarter};

/// Device ID (§ 5).
pub const DEVICE_TYPE: u32 = 2;

/// Version of the saved state.
const STATE_VERSION: u32 = 1;

/// Most queues of a disk. Each is a thread, and with io_uring a ring; one interrupt serves them all, so that more of them
/// bring nothing.
pub const MAX_QUEUES: u16 = 8;

const QUEUE_SIZE: u16 = 256;
const QUEUE_SIZES: [u16; MAX_QUEUES as usize] = [QUEUE_SIZE; MAX_QUEUES as usize];

/// Physical block size in bytes: what file systems and disks of today have.
const PHYSICAL_BLOCK_SIZE: u32 = 4096;

/// The device.
pub struct Block {
    disk: Arc<Disk>,
    config: [u8; 60],
    /// Whether the driver, which knows an empty disk, is to be told that it is none.
    was_empty: bool,
    /// Of each queue.
    workers: Vec<QueueWorker>,
}

impl Block {
    /// A device for `disk` with this serial number, of which the first [`MAX_ID_LEN`] bytes count, and as many queues, but
    /// at least one and at most [`MAX_QUEUES`], with a thread and perhaps a ring each.
    pub fn new(
        disk: Disk,
        serial: &str,
        queues: u16,
        engine: Engine,
        threads: &ThreadStarter,
    ) -> io::Result<Self> {
        let queues = queues.clamp(1, MAX_QUEUES);
        let mut id = [0; MAX_ID_LEN];
        for (byte, value) in id.iter_mut().zip(serial.bytes()) {
            *byte = value;
        }
        let mut block = Self {
            config: config_space(&disk, queues),
            was_empty: false,
            disk: Arc::new(disk),
            workers: Vec::new(),
        };
        for queue in 0..queues {
            let worker = block.worker(queue, id, engine, threads)?;
            block.workers.push(worker);
        }
        Ok(block)
    }

    /// What it reads and writes.
    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    /// Most bytes that it takes beside guest RAM.
    pub fn memory_bound(&self) -> usize {
        let queue = worker::MEMORY_BOUND + serve::memory_bound(QUEUE_SIZE);
        self.workers.len() * queue + self.disk.memory_bound()
    }

    /// Makes the worker of a queue.
    fn worker(
        &self,
        queue: u16,
        id: [u8; MAX_ID_LEN],
        engine: Engine,
        threads: &ThreadStarter,
    ) -> io::Result<QueueWorker> {
        let disk = Arc::clone(&self.disk);
        let mut ring = serve::new_ring(&disk, engine, QUEUE_SIZE);
        let descriptors: Vec<_> = ring.iter().map(Ring::fd).collect();
        let name = format!("virtio-blk {queue}");
        QueueWorker::new(
            threads,
            ThreadKind::Block,
            name,
            queue..queue + 1,
            &descriptors,
            move |worker, queues| {
                let requests = Requests {
                    disk: Arc::clone(&disk),
                    id,
                    // § 5.2.6.2: to a driver that cannot flush, a completed write is on the disk.
                    write_through: worker.features & 1 << VIRTIO_BLK_F_FLUSH == 0,
                };
                serve::serve(&requests, &mut ring, worker, queues)
            },
        )
    }
}

/// What the driver knows of the disk, and so must find again.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Saved {
    sectors: u64,
    block_size: u32,
}

impl SaveState for Block {
    fn save(&self) -> Result<Box<Record>, StateError> {
        let Self {
            disk: _,
            // Follows from the disk and the number of queues.
            config: _,
            was_empty: _,
            workers: _,
        } = self;
        to_record(STATE_VERSION, self.known())
    }

    fn restore(&mut self, record: &Record) -> Result<(), StateError> {
        let saved: Saved = from_record(STATE_VERSION, record)?;
        let here = self.known();
        self.was_empty = saved.sectors == 0 && here.sectors > 0 && self.disk.is_read_only();
        if saved != self.known() {
            let geometry = |disk: Saved| {
                format!(
                    "{} sectors of 512 bytes, in blocks of {}",
                    disk.sectors, disk.block_size
                )
            };
            let why = format!("was {}; here it has {}", geometry(saved), geometry(here));
            return Err(StateError::value("the disk", why));
        }
        Ok(())
    }
}

impl Block {
    fn known(&self) -> Saved {
        Saved {
            sectors: if self.was_empty {
                0
            } else {
                self.disk.sectors()
            },
            block_size: self.disk.block_size(),
        }
    }
}

/// `struct virtio_blk_config` (§ 5.2.4).
fn config_space(disk: &Disk, queues: u16) -> [u8; 60] {
    let block_size = disk.block_size();
    let in_blocks = (PHYSICAL_BLOCK_SIZE / block_size).max(1);
    let mut config = [0; 60];
    let mut put = |offset: usize, bytes: &[u8]| {
        if let Some(field) = config.get_mut(offset..offset + bytes.len()) {
            field.copy_from_slice(bytes);
        }
    };
    put(0, &disk.sectors().to_le_bytes()); // capacity
    put(8, &SIZE_MAX.to_le_bytes()); // size_max
    put(12, &SEG_MAX.to_le_bytes()); // seg_max
    put(20, &block_size.to_le_bytes()); // blk_size
    put(24, &[in_blocks.ilog2() as u8, 0]); // topology: physical_block_exp, alignment_offset
    put(26, &(in_blocks as u16).to_le_bytes()); // topology: min_io_size
    put(34, &queues.to_le_bytes()); // num_queues
    put(36, &MAX_DISCARD_SECTORS.to_le_bytes()); // max_discard_sectors
    put(40, &1u32.to_le_bytes()); // max_discard_seg
    let alignment = PHYSICAL_BLOCK_SIZE.max(block_size) / SECTOR_SIZE as u32;
    put(44, &alignment.to_le_bytes()); // discard_sector_alignment
    put(48, &MAX_WRITE_ZEROES_SECTORS.to_le_bytes()); // max_write_zeroes_sectors
    put(52, &1u32.to_le_bytes()); // max_write_zeroes_seg
    put(56, &[1]); // write_zeroes_may_unmap
    config
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        let always = 1 << VIRTIO_BLK_F_SIZE_MAX
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_TOPOLOGY
            | 1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_BLK_F_MQ;
        let more = if self.disk.is_read_only() {
            1 << VIRTIO_BLK_F_RO
        } else {
            1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        };
        always | more
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES.get(..self.workers.len()).unwrap_or_default()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    fn start(&mut self, resources: Resources) -> io::Result<()> {
        if std::mem::take(&mut self.was_empty) {
            resources.interrupt.config_changed();
        }
        QueueWorker::start_all(&mut self.workers, resources);
        Ok(())
    }

    fn workers(&mut self) -> &mut [QueueWorker] {
        &mut self.workers
    }
}
