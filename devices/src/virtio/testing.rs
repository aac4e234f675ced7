//! A driver for tests and fuzz targets: it writes registers, descriptors and rings by hand, so that it can write them wrong.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "it is for tests, which fail where it fails"
)]

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::device::VirtioDevice;
use super::rng::Rng;
use super::transport::mmio::MmioTransport;
use super::vsock;
use crate::bus::BusDevice;
use crate::interrupt::IrqLine;
use crate::state::{SaveState, Suspend};
use crate::thread::ThreadStarter;

pub const NEXT: u16 = VRING_DESC_F_NEXT as u16;
pub const WRITE: u16 = VRING_DESC_F_WRITE as u16;
pub const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

pub const ACKNOWLEDGE: u32 = 1;
pub const DRIVER: u32 = 2;
pub const DRIVER_OK: u32 = 4;
pub const FEATURES_OK: u32 = 8;
pub const NEEDS_RESET: u32 = 64;
pub const FAILED: u32 = 128;

/// Where the test driver puts queue 0.
pub const DESCRIPTORS: u64 = 0x1000;
pub const AVAILABLE: u64 = 0x3000;
pub const USED: u64 = 0x4000;
/// Free for buffers, up to the first region's end and over it.
pub const DATA: u64 = 0x1_0000;
/// Here one region ends and the next begins.
pub const SEAM: u64 = 0x10_0000;
/// Here RAM ends below the gap.
pub const GAP: u64 = 0x20_0000;
/// Here it goes on.
pub const HIGH: u64 = 0x1_0000_0000;
/// And here it ends.
pub const END: u64 = HIGH + 0x100_0000;

/// The others have their rings so far above it, each further than the one before.
const OTHER_QUEUES: u64 = HIGH + 0x80_0000;
const QUEUE_SPACE: u64 = 0x1_0000;

/// Counts the pulses of an interrupt line.
#[derive(Default)]
pub struct Pulses(AtomicUsize);

impl Pulses {
    /// A line that is counted here.
    pub fn line(self: &Arc<Self>) -> IrqLine {
        let pulses = Arc::clone(self);
        IrqLine::new(move || {
            pulses.0.fetch_add(1, Ordering::Relaxed);
            Ok(())
        })
    }

    /// How many there were since this was last asked.
    pub fn take(&self) -> usize {
        self.0.swap(0, Ordering::Relaxed)
    }
}

/// Far more than a worker takes.
const PATIENCE: Duration = Duration::from_secs(20);

fn transport(
    device: Box<dyn VirtioDevice>,
    mem: &GuestMemoryMmap,
    pulses: &Arc<Pulses>,
) -> MmioTransport {
    MmioTransport::new(device, mem.clone(), pulses.line())
}

pub struct Driver {
    pub mem: GuestMemoryMmap,
    pub transport: MmioTransport,
    pub pulses: Arc<Pulses>,
    pub size: u16,
    /// Bytes that the device writes for `any_request`.
    pub answer: u32,
    /// The queue that it works with, and those that it makes ready.
    pub queue: u16,
    pub queues: Range<u16>,
    /// Of each queue.
    avail: [u16; 16],
    used: [u16; 16],
}

impl Driver {
    pub fn new(device: Box<dyn VirtioDevice>) -> Self {
        let mem = GuestMemoryMmap::from_ranges(&[
            (GuestAddress(0), SEAM as usize),
            (GuestAddress(SEAM), (GAP - SEAM) as usize),
            (GuestAddress(HIGH), (END - HIGH) as usize),
        ])
        .unwrap();
        let pulses = Arc::new(Pulses::default());
        // A status behind a disk's ID, or a packet's header.
        let answer = if device.device_type() == vsock::DEVICE_TYPE {
            44
        } else {
            21
        };
        Self {
            transport: transport(device, &mem, &pulses),
            mem,
            pulses,
            size: 16,
            answer,
            queue: 0,
            queues: 0..1,
            avail: [0; 16],
            used: [0; 16],
        }
    }

    /// Pauses the device and saves it, puts another in its place once it is gone, and restores that one, which is still paused.
    pub fn restore(&mut self, make: impl FnOnce() -> Box<dyn VirtioDevice>) {
        assert!(self.transport.pause(PATIENCE));
        let saved = self.transport.save().unwrap();
        let none = Box::new(Rng::new(&ThreadStarter::default()).unwrap());
        self.transport = transport(none, &self.mem, &self.pulses);
        self.transport = transport(make(), &self.mem, &self.pulses);
        self.transport.restore(&saved).unwrap();
        assert_eq!(self.transport.save().unwrap().get(), saved.get());
    }

    /// Has notifications of busy queues go another way.
    pub fn ioeventfds(
        &mut self,
        register: impl FnMut(u32, &EventFd) -> io::Result<()> + Send + 'static,
    ) {
        self.transport.use_ioeventfds(Box::new(register));
    }

    /// A driver that has come as far as DRIVER_OK with all features but these.
    pub fn started(device: Box<dyn VirtioDevice>, without: u64) -> Self {
        let mut driver = Self::new(device);
        driver.start(without);
        driver
    }

    /// Where the part of queue 0 at `at` is for the current queue.
    fn ring(&self, at: u64) -> u64 {
        match self.queue {
            0 => at,
            queue => OTHER_QUEUES + u64::from(queue) * QUEUE_SPACE + at,
        }
    }

    pub fn get(&mut self, register: u32) -> u32 {
        let mut data = [0xee; 4];
        self.transport.read(register.into(), &mut data);
        u32::from_le_bytes(data)
    }

    pub fn set(&mut self, register: u32, value: u32) {
        self.transport.write(register.into(), &value.to_le_bytes());
    }

    pub fn status(&mut self) -> u32 {
        self.get(VIRTIO_MMIO_STATUS)
    }

    pub fn set_status(&mut self, status: u32) {
        self.set(VIRTIO_MMIO_STATUS, status);
    }

    /// A reset, to its end: from then on the memory is the driver's.
    pub fn reset(&mut self) {
        self.set_status(0);
        wait("the end of a reset", || self.status() == 0);
    }

    /// Takes a queue back.
    pub fn take_back(&mut self, queue: u16) {
        self.set(VIRTIO_MMIO_QUEUE_SEL, queue.into());
        self.set(VIRTIO_MMIO_QUEUE_READY, 0);
        wait("a queue's return", || {
            self.get(VIRTIO_MMIO_QUEUE_READY) == 0
        });
    }

    pub fn offered(&mut self) -> u64 {
        self.set(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 0);
        let low = self.get(VIRTIO_MMIO_DEVICE_FEATURES);
        self.set(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
        u64::from(self.get(VIRTIO_MMIO_DEVICE_FEATURES)) << 32 | u64::from(low)
    }

    pub fn accept(&mut self, features: u64) {
        self.set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0);
        self.set(VIRTIO_MMIO_DRIVER_FEATURES, features as u32);
        self.set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
        self.set(VIRTIO_MMIO_DRIVER_FEATURES, (features >> 32) as u32);
    }

    /// Reset, up to FEATURES_OK.
    pub fn negotiate(&mut self, without: u64) {
        self.reset();
        (self.avail, self.used) = ([0; 16], [0; 16]);
        for queue in self.queues.clone() {
            self.queue = queue;
            self.write(self.ring(DESCRIPTORS), &[0; 0x4000]);
        }
        self.queue = self.queues.start;
        self.set_status(ACKNOWLEDGE);
        self.set_status(ACKNOWLEDGE | DRIVER);
        let features = self.offered() & !without;
        self.accept(features);
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
        assert_eq!(self.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK);
    }

    pub fn set_rings(&mut self, size: u32, descriptors: u64, available: u64, used: u64) {
        self.set(VIRTIO_MMIO_QUEUE_SEL, self.queue.into());
        self.set(VIRTIO_MMIO_QUEUE_NUM, size);
        for (register, address) in [
            (VIRTIO_MMIO_QUEUE_DESC_LOW, descriptors),
            (VIRTIO_MMIO_QUEUE_AVAIL_LOW, available),
            (VIRTIO_MMIO_QUEUE_USED_LOW, used),
        ] {
            self.set(register, address as u32);
            self.set(register + 4, (address >> 32) as u32);
        }
        self.set(VIRTIO_MMIO_QUEUE_READY, 1);
    }

    pub fn start(&mut self, without: u64) {
        self.negotiate(without);
        for queue in self.queues.clone().rev() {
            self.queue = queue;
            let [descriptors, available, used] =
                [DESCRIPTORS, AVAILABLE, USED].map(|at| self.ring(at));
            self.set_rings(self.size.into(), descriptors, available, used);
            assert_eq!(self.get(VIRTIO_MMIO_QUEUE_READY), 1);
        }
        self.driver_ok();
        assert_eq!(self.status() & (DRIVER_OK | NEEDS_RESET), DRIVER_OK);
    }

    pub fn driver_ok(&mut self) {
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    /// Writes descriptor `index` of the table at `table`.
    pub fn descriptor_in(
        &self,
        table: u64,
        index: u16,
        address: u64,
        len: u32,
        flags: u16,
        next: u16,
    ) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        let at = table + 16 * u64::from(index);
        self.mem.write_slice(&bytes, GuestAddress(at)).unwrap();
    }

    pub fn descriptor(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        self.descriptor_in(self.ring(DESCRIPTORS), index, address, len, flags, next);
    }

    /// Writes a chain of these buffers to the descriptors from `first` on.
    pub fn chain(&self, first: u16, buffers: &[(u64, u32, u16)]) {
        for (index, (address, len, flags)) in (first..).zip(buffers) {
            let is_last = index == first + buffers.len() as u16 - 1;
            let next = if is_last { 0 } else { NEXT };
            self.descriptor(index, *address, *len, flags | next, index + 1);
        }
    }

    /// Makes a head available.
    pub fn offer(&mut self, head: u16) {
        let avail = &mut self.avail[usize::from(self.queue)];
        let slot = AVAILABLE + 4 + 2 * u64::from(*avail % self.size);
        *avail = avail.wrapping_add(1);
        let index = *avail;
        self.write(self.ring(slot), &head.to_le_bytes());
        self.set_avail_index(index);
    }

    pub fn set_avail_index(&self, index: u16) {
        self.mem
            .store(
                index,
                GuestAddress(self.ring(AVAILABLE) + 2),
                std::sync::atomic::Ordering::Release,
            )
            .unwrap();
    }

    /// Under EVENT_IDX: the used index at which the driver wants an interrupt.
    pub fn set_used_event(&self, event: u16) {
        let at = self.ring(AVAILABLE) + 4 + 2 * u64::from(self.size);
        self.mem
            .write_slice(&event.to_le_bytes(), GuestAddress(at))
            .unwrap();
    }

    pub fn notify(&mut self) {
        self.set(VIRTIO_MMIO_QUEUE_NOTIFY, self.queue.into());
    }

    pub fn used_index(&self) -> u16 {
        self.mem
            .load(
                GuestAddress(self.ring(USED) + 2),
                std::sync::atomic::Ordering::Acquire,
            )
            .unwrap()
    }

    /// How many used entries were taken, modulo 2^16.
    pub fn used_so_far(&self) -> u16 {
        self.used[usize::from(self.queue)]
    }

    /// How many heads were made available, modulo 2^16.
    pub fn offered_so_far(&self) -> u16 {
        self.avail[usize::from(self.queue)]
    }

    /// The next used entry: head and length.
    pub fn wait_used(&mut self) -> (u32, u32) {
        let used = self.used[usize::from(self.queue)];
        wait("a used buffer", || self.used_index() != used);
        let entry = self.read(self.ring(USED) + 4 + 8 * u64::from(used % self.size), 8);
        self.used[usize::from(self.queue)] = used.wrapping_add(1);
        let word = |at: usize| u32::from_le_bytes(entry[at..at + 4].try_into().unwrap());
        (word(0), word(4))
    }

    /// Puts a chain at descriptor 0 and has it done; gives the length written.
    pub fn request(&mut self, buffers: &[(u64, u32, u16)]) -> u32 {
        self.chain(0, buffers);
        self.offer(0);
        self.notify();
        let (head, len) = self.wait_used();
        assert_eq!(head, 0);
        len
    }

    /// A request that every device here can do: to a block device, for its ID.
    pub fn any_request(&mut self) {
        let wrote = self.request(&self.any_chain());
        assert_eq!(wrote, self.answer);
    }

    pub fn any_chain(&self) -> [(u64, u32, u16); 2] {
        let mut header = [0; 16];
        header[0] = 8;
        self.write(DATA, &header);
        [(DATA, 16, 0), (DATA + 0x100, self.answer, WRITE)]
    }

    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.mem.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.mem
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }

    /// The device must ask for a reset, tell of it, do nothing more, and be well after the reset.
    #[track_caller]
    pub fn expect_needs_reset(&mut self, case: &str) {
        wait(case, || self.status() & NEEDS_RESET != 0);
        wait(case, || {
            self.get(VIRTIO_MMIO_INTERRUPT_STATUS) & VIRTIO_MMIO_INT_CONFIG != 0
        });
        let used = self.used_index();
        self.notify();
        self.driver_ok();
        assert_ne!(self.status() & NEEDS_RESET, 0, "{case}");
        assert_eq!(self.used_index(), used, "{case}: it goes on");
        self.start(0);
        assert_eq!(self.get(VIRTIO_MMIO_INTERRUPT_STATUS), 0, "{case}");
        self.any_request();
    }
}

/// Waits for what a worker does.
#[track_caller]
pub fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "{what}: nothing comes");
        std::thread::yield_now();
    }
}
