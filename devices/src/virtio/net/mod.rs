//! The network device (§ 5.1): the front end of a [`Link`].

mod link;
mod serve;
#[cfg(test)]
pub(super) mod tests;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, PoisonError};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};

pub use link::{Link, LinkStatus, OFFLOADS, SetOffloads, SharedLink};

use super::device::{Interrupt, Resources, VirtioDevice, read_config_bytes};
use super::worker::{self, QueueWorker};
use crate::state::{Record, SaveState, StateError, from_record, to_record};
use crate::thread::{ThreadKind, ThreadStarter};

/// Device ID (§ 5).
pub const DEVICE_TYPE: u32 = 1;

/// Version of the saved state.
const STATE_VERSION: u32 = 1;

/// Most pairs of queues that a device has.
pub const MAX_PAIRS: u16 = 8;

const QUEUE_SIZE: u16 = 256;
/// `receiveq1`, `transmitq1` and on, and behind more than one pair the control queue (§ 5.1.2).
const QUEUE_SIZES: [u16; MAX_QUEUES] = [QUEUE_SIZE; MAX_QUEUES];
const MAX_QUEUES: usize = 2 * MAX_PAIRS as usize + 1;

/// Least MTU that a driver is told of: Linux refuses to use a device with less (ETH_MIN_MTU).
const MIN_MTU: u16 = 68;

/// What the driver reads in the configuration space, and must find again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NetOptions {
    /// The interface's address.
    pub mac: [u8; 6],
    /// Longest packet that the link carries, if that is known.
    pub mtu: Option<u16>,
    /// Pairs of queues, at least one and at most [`MAX_PAIRS`]: as many as the link has.
    pub pairs: u16,
}

impl NetOptions {
    fn queues(&self) -> u16 {
        2 * self.pairs + u16::from(self.pairs > 1)
    }
}

/// What is saved of it.
#[derive(Serialize, Deserialize)]
struct Saved {
    mac: [u8; 6],
    mtu: Option<u16>,
    /// Those that the driver uses; their number follows from that of the queues.
    #[serde(default = "one")]
    pairs: u16,
}

fn one() -> u16 {
    1
}

/// The device.
pub struct Net {
    options: NetOptions,
    features: u64,
    link: Arc<LinkStatus>,
    /// Pairs of queues that the driver uses (§ 5.1.6.5.5).
    pairs: Arc<AtomicU16>,
    /// After a restore the driver sees the link go down and up again: its network may be another one, and even where it is the
    /// same, switches have to learn where it is now. What asks for an address by DHCP asks again; connections live on.
    shows_down: AtomicBool,
    /// While the driver has the device running, and after that.
    interrupt: Option<Interrupt>,
    workers: [QueueWorker; 1],
}

impl Net {
    /// Most bytes that it takes beside guest RAM.
    pub fn memory_bound(&self) -> usize {
        let lists = serve::memory_bound(self.options.pairs, QUEUE_SIZE);
        worker::MEMORY_BOUND + lists + link::MEMORY_BOUND
    }

    /// A device with its thread. The link serves one device at a time, and another one after that.
    pub fn new(
        shared: SharedLink,
        options: NetOptions,
        threads: &ThreadStarter,
    ) -> io::Result<Self> {
        let link = shared.lock().unwrap_or_else(PoisonError::into_inner);
        let mtu = options.mtu.filter(|mtu| *mtu >= MIN_MTU);
        let options = NetOptions {
            mtu,
            pairs: options.pairs.clamp(1, MAX_PAIRS),
            ..options
        };
        let multiqueue = match options.pairs {
            1 => 0,
            _ => 1 << VIRTIO_NET_F_MQ | 1 << VIRTIO_NET_F_CTRL_VQ,
        };
        let features = 1 << VIRTIO_NET_F_MAC
            | 1 << VIRTIO_NET_F_STATUS
            | 1 << VIRTIO_NET_F_MRG_RXBUF
            | mtu.map_or(0, |_| 1 << VIRTIO_NET_F_MTU)
            | multiqueue
            | link.features();
        let status = Arc::clone(link.status());
        let descriptors = (0..link.queues()).map(|queue| link.fd(queue));
        let descriptors = descriptors.collect::<io::Result<Vec<_>>>()?;
        drop(link);
        let pairs = Arc::new(AtomicU16::new(1));
        let in_use = Arc::clone(&pairs);
        let (kind, name) = (ThreadKind::Net, "virtio-net".into());
        let worker = QueueWorker::new(
            threads,
            kind,
            name,
            0..options.queues(),
            &descriptors,
            move |worker, queues| {
                let mut link = shared.lock().unwrap_or_else(PoisonError::into_inner);
                serve::serve(&mut link, mtu, options.pairs, &in_use, worker, queues)
            },
        )?;
        Ok(Self {
            options,
            features,
            link: status,
            pairs,
            shows_down: AtomicBool::new(false),
            interrupt: None,
            workers: [worker],
        })
    }

    fn status(&self) -> u16 {
        if let Some(interrupt) = &self.interrupt
            && self.shows_down.swap(false, Ordering::Relaxed)
        {
            // It goes up as soon as the driver knows that it was down.
            interrupt.config_changed();
            return 0;
        }
        if self.link.is_up() {
            VIRTIO_NET_S_LINK_UP as u16
        } else {
            0
        }
    }
}

/// Where the configuration space has the status, 16 bits.
const STATUS: u64 = 6;

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        let sizes = QUEUE_SIZES.get(..self.options.queues().into());
        sizes.unwrap_or(&QUEUE_SIZES)
    }

    /// `struct virtio_net_config` (§ 5.1.4).
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let end = offset.saturating_add(data.len() as u64);
        let reads_status = offset < STATUS + 2 && end > STATUS;
        let status = if reads_status { self.status() } else { 0 };
        let mut space = [0; 12];
        let (mac, rest) = space.split_at_mut(6);
        mac.copy_from_slice(&self.options.mac);
        // status, max_virtqueue_pairs, mtu
        let fields = [status, self.options.pairs, self.options.mtu.unwrap_or(0)];
        for (place, field) in rest.chunks_exact_mut(2).zip(fields) {
            place.copy_from_slice(&field.to_le_bytes());
        }
        read_config_bytes(&space, offset, data);
    }

    fn start(&mut self, resources: Resources) -> io::Result<()> {
        self.interrupt = Some(resources.interrupt.clone());
        if !resources.resumed {
            self.pairs.store(1, Ordering::Relaxed);
        }
        if self.shows_down.load(Ordering::Relaxed) {
            resources.interrupt.config_changed();
        }
        QueueWorker::start_all(&mut self.workers, resources);
        Ok(())
    }

    fn workers(&mut self) -> &mut [QueueWorker] {
        &mut self.workers
    }
}

impl SaveState for Net {
    fn save(&self) -> Result<Box<Record>, StateError> {
        let Self {
            options: NetOptions { mac, mtu, pairs: _ },
            // The transport's to check.
            features: _,
            link: _,
            pairs,
            shows_down: _,
            interrupt: _,
            workers: _,
        } = self;
        let saved = Saved {
            mac: *mac,
            mtu: *mtu,
            pairs: pairs.load(Ordering::Relaxed),
        };
        to_record(STATE_VERSION, saved)
    }

    /// The address is the one that the driver knows, whatever the new VM's would be.
    fn restore(&mut self, record: &Record) -> Result<(), StateError> {
        let Saved { mac, mtu, pairs } = from_record(STATE_VERSION, record)?;
        if !(1..=self.options.pairs).contains(&pairs) {
            let why = format!("are {pairs} in use, and it has {}", self.options.pairs);
            return Err(StateError::value("pairs of queues", why));
        }
        if mtu > self.options.mtu {
            let text = |mtu: Option<u16>| mtu.map_or("unknown".into(), |mtu| mtu.to_string());
            let (was, is) = (text(mtu), text(self.options.mtu));
            let why = format!("was {was}; here it is {is}");
            return Err(StateError::value("the network's MTU", why));
        }
        self.options.mac = mac;
        self.options.mtu = mtu;
        self.pairs.store(pairs, Ordering::Relaxed);
        self.shows_down = AtomicBool::new(true);
        Ok(())
    }
}
