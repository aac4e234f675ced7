//! The socket device (§ 5.10): the guest's streams, each of them one of the host.

mod connection;
mod muxer;
mod packet;
mod serve;
mod stream;
#[cfg(test)]
pub(super) mod tests;

use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use muxer::{Connect, HostSide};

use super::device::{VirtioDevice, read_config_bytes};
use super::worker::{self, QueueWorker};
use crate::state::{Record, SaveState, StateError, from_record, to_record};
use crate::thread::{ThreadKind, ThreadStarter};
use muxer::Muxer;
use serve::Shared;

/// Device ID (§ 5).
pub const DEVICE_TYPE: u32 = 19;

/// Context IDs that a guest can have (§ 5.10.4): below are the host's, above is none.
pub const CIDS: std::ops::RangeInclusive<u32> = 3..=u32::MAX - 1;

/// Version of the saved state. In version 1 it was the context ID only, as a number.
const STATE_VERSION: u32 = 2;

/// For packets to the guest, packets from it, and events (§ 5.10.2).
const QUEUE_SIZES: [u16; 3] = [256; 3];

/// What is saved of it.
#[derive(Serialize, Deserialize)]
struct Saved {
    cid: u32,
    /// The guest may still have sockets whose other ends had ports up to this one.
    last_port: u32,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum AnySaved {
    Current(Saved),
    Cid(u32),
}

/// The device.
pub struct Vsock {
    shared: Arc<Shared>,
    workers: [QueueWorker; 1],
}

impl Vsock {
    /// Most bytes that it takes beside guest RAM.
    pub const MEMORY_BOUND: usize =
        worker::MEMORY_BOUND + muxer::MEMORY_BOUND + serve::memory_bound(QUEUE_SIZES[0]);

    /// The device of a guest with this context ID, with its thread. Without a host side, nothing is within the guest's reach.
    pub fn new(host: Option<HostSide>, cid: u32, threads: &ThreadStarter) -> io::Result<Self> {
        let shared = Arc::new(Shared::new(cid));
        let connects = host.as_ref().is_some_and(|host| host.connect.is_some());
        let kind = if connects {
            ThreadKind::VsockConnect
        } else {
            ThreadKind::Vsock
        };
        let name = "virtio-vsock".into();
        let mut muxer = Muxer::new(host)?;
        let (descriptors, seen) = ([muxer.fd()], Arc::clone(&shared));
        let worker = QueueWorker::new(
            threads,
            kind,
            name,
            0..3,
            &descriptors,
            move |worker, queues| serve::serve(&mut muxer, &seen, worker, queues),
        )?;
        Ok(Self {
            shared,
            workers: [worker],
        })
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    /// None: without any, there are streams (§ 5.10.3).
    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// `struct virtio_vsock_config` (§ 5.10.4).
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let cid = u64::from(self.shared.cid());
        read_config_bytes(&cid.to_le_bytes(), offset, data);
    }

    fn workers(&mut self) -> &mut [QueueWorker] {
        &mut self.workers
    }
}

impl SaveState for Vsock {
    /// Connections are not saved: their other ends are programs of this host.
    fn save(&self) -> Result<Box<Record>, StateError> {
        let Self { shared, workers: _ } = self;
        let saved = Saved {
            cid: shared.cid(),
            last_port: shared.last_port(),
        };
        to_record(STATE_VERSION, saved)
    }

    fn restore(&mut self, record: &Record) -> Result<(), StateError> {
        let Saved { cid, last_port } = match from_record(STATE_VERSION, record)? {
            AnySaved::Current(saved) => saved,
            AnySaved::Cid(cid) => Saved { cid, last_port: 0 },
        };
        if !CIDS.contains(&cid) {
            let why = format!("is {cid}, not one of {CIDS:?}");
            return Err(StateError::value("the guest's context ID", why));
        }
        self.shared.restore(cid, last_port);
        Ok(())
    }
}
