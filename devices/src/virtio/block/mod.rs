//! The block device (§ 5.2): a raw file or host block device as a disk.

mod disk;
mod format;
mod open;
mod overlay;
mod request;
#[cfg(test)]
mod tests;
mod uring;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

pub use disk::Disk;
pub use format::Format;
pub use open::{Access, DiskError, DiskOptions};
use request::Requests;
use uring::Uring;

use super::device::{Resources, StopMode, VirtioDevice, read_config_bytes};
use super::queue::{QueueError, Virtqueue};
use super::worker::{Serving, Worker};

/// Device ID (§ 5).
pub const DEVICE_TYPE: u32 = 2;

/// Longest serial number in bytes: VIRTIO_BLK_T_GET_ID has room for no more (§ 5.2.6).
pub const MAX_ID_LEN: usize = 20;

/// The unit of capacity and offsets, in bytes (§ 5.2.4).
const SECTOR_SIZE: u64 = 512;

/// Most queues of a disk. Each is a thread, and with io_uring a ring; one interrupt serves them all, so that more of them
/// bring nothing.
pub const MAX_QUEUES: u16 = 8;

const QUEUE_SIZES: [u16; MAX_QUEUES as usize] = [256; MAX_QUEUES as usize];
/// Data segments of a request: what the queue has room for beside header and status, which need a descriptor each.
const SEG_MAX: u32 = 254;

/// Physical block size in bytes: what file systems and disks of today have.
const PHYSICAL_BLOCK_SIZE: u32 = 4096;

/// Longest discard in sectors, 2 GiB, and longest write of zeroes, 64 MiB: on a host that must write these itself a
/// request should still end soon, since the others of its queue wait for it.
const MAX_DISCARD_SECTORS: u32 = 1 << 22;
const MAX_WRITE_ZEROES_SECTORS: u32 = 1 << 17;

/// How the host's file is read and written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Engine {
    /// Through io_uring, all requests of a queue at once.
    #[default]
    IoUring,
    /// With preadv and pwritev, one request of a queue after the other.
    Sync,
}

/// The device.
pub struct Block {
    disk: Arc<Disk>,
    id: [u8; MAX_ID_LEN],
    config: [u8; 60],
    engine: Engine,
    /// Of each queue.
    notifiers: Vec<EventFd>,
    workers: Vec<Worker>,
}

impl Block {
    /// A device for `disk` with this serial number, of which the first [`MAX_ID_LEN`] bytes count, and as many queues, but
    /// at least one and at most [`MAX_QUEUES`].
    pub fn new(disk: Disk, serial: &str, queues: u16, engine: Engine) -> io::Result<Self> {
        let queues = queues.clamp(1, MAX_QUEUES);
        let mut id = [0; MAX_ID_LEN];
        for (byte, value) in id.iter_mut().zip(serial.bytes()) {
            *byte = value;
        }
        let notifiers = (0..queues).map(|_| EventFd::new(EFD_CLOEXEC));
        Ok(Self {
            config: config_space(&disk, queues),
            disk: Arc::new(disk),
            id,
            engine,
            notifiers: notifiers.collect::<io::Result<_>>()?,
            workers: Vec::new(),
        })
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

/// What a queue's worker does.
fn serve(requests: Requests, engine: Engine, serving: &mut Serving<'_>) -> Result<(), QueueError> {
    // What the ring cannot do: to find out where each part of a request lies, and to flush each write.
    let plain_file = requests.disk.plain_file();
    if let (Engine::IoUring, false, Some(file)) = (engine, requests.write_through, plain_file) {
        // Setting a ring up takes milliseconds: it is done for a guest that uses its disk.
        while serving.ask_for_notification()? {
            if serving.must_stop() {
                return Ok(());
            }
            serving.wait();
        }
        match Uring::new(&requests, file, serving) {
            Ok(mut uring) => return uring.run(serving),
            Err(e) => log::info!(
                "a disk is read and written without io_uring, which is not to be had: {e}"
            ),
        }
    }
    let (mut iovecs, cancelled) = (Vec::new(), serving.cancelled());
    serving.run(|chain| {
        let (status, operation) = requests.parse(chain)?;
        let result =
            operation.and_then(|op| requests.carry_out(op, chain, &mut iovecs, &cancelled));
        Ok(status.answer(&requests.disk, result))
    })
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        let always = 1 << VIRTIO_BLK_F_SEG_MAX
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
        QUEUE_SIZES.get(..self.notifiers.len()).unwrap_or_default()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    fn start(&mut self, resources: Resources) -> io::Result<()> {
        // § 5.2.6.2: to a driver that cannot flush, a completed write is on the disk.
        let write_through = resources.features & 1 << VIRTIO_BLK_F_FLUSH == 0;
        self.workers = resources
            .queues
            .into_iter()
            .map(|queue| {
                let requests = Requests {
                    disk: Arc::clone(&self.disk),
                    id: self.id,
                    write_through,
                };
                let engine = self.engine;
                let name = format!("virtio-blk {}", queue.index());
                let notifier = self.notifiers.get(usize::from(queue.index()));
                let event = notifier.ok_or(io::ErrorKind::NotFound)?.try_clone()?;
                let (mem, interrupt) = (resources.mem.clone(), resources.interrupt.clone());
                Worker::start(name, event, queue, mem, interrupt, move |serving| {
                    serve(requests, engine, serving)
                })
            })
            .collect::<io::Result<_>>()?;
        Ok(())
    }

    fn notify(&mut self, queue: u16) {
        let worker = self.workers.iter().find(|worker| worker.queue() == queue);
        worker.into_iter().for_each(Worker::notify);
    }

    fn notifiers(&self) -> &[EventFd] {
        &self.notifiers
    }

    fn stop(&mut self, mode: StopMode, wait: Duration) -> Option<Vec<Virtqueue>> {
        Worker::stop_all(&mut self.workers, mode, wait)
    }
}
