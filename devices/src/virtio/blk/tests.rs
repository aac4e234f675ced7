use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::sync::Mutex;

use proptest::prelude::*;
use tempfile::NamedTempFile;
use virtio_bindings::virtio_blk::*;

use super::*;
use crate::block::DiskMode::{self, Ephemeral, ReadOnly, ReadWrite};
use crate::block::{DiskError, DiskOptions};
use crate::bus::BusDevice;
use crate::virtio::testing::{DATA, Driver, END, HIGH, INDIRECT, NEXT, SEAM, WRITE};

mod ephemeral;
mod host;
mod queues;
mod requests;

const OK: u8 = VIRTIO_BLK_S_OK as u8;
const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;
const ENGINES: [Engine; 2] = [Engine::IoUring, Engine::Sync];

/// Sectors of the test disk.
const SECTORS: u64 = 67;
const STATUS: u64 = DATA + 0x100;
const BUFFER: u64 = DATA + 0x8000;

/// What the test disk contains at first.
fn pattern() -> Vec<u8> {
    (0..SECTORS * 512)
        .map(|n| (n / 512 * 7 + n % 251) as u8)
        .collect()
}

struct Rig {
    driver: Driver,
    file: NamedTempFile,
}

impl Rig {
    fn new(engine: Engine, mode: DiskMode, without: u64) -> Self {
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(&pattern()).unwrap();
        let disk = Disk::open(file.path(), mode).unwrap();
        let driver = Driver::started(
            Box::new(Block::new(disk, "a-serial", 1, engine, &ThreadStarter::default()).unwrap()),
            without,
        );
        Self { driver, file }
    }

    fn header(&self, kind: u32, sector: u64) {
        self.driver.write(DATA, &header(kind, sector));
    }

    /// A request of header, `data` and status; gives the status and the length written.
    fn request(&mut self, kind: u32, sector: u64, data: &[(u64, u32, u16)]) -> (u8, u32) {
        self.header(kind, sector);
        let mut chain = vec![(DATA, 16, 0)];
        chain.extend_from_slice(data);
        chain.push((STATUS, 1, WRITE));
        self.chain(&chain)
    }

    /// A chain whose status is at [`STATUS`].
    fn chain(&mut self, chain: &[(u64, u32, u16)]) -> (u8, u32) {
        self.driver.write(STATUS, &[0xee]);
        let len = self.driver.request(chain);
        (self.driver.read(STATUS, 1)[0], len)
    }

    fn contents(&self) -> Vec<u8> {
        fs::read(self.file.path()).unwrap()
    }
}

pub(in crate::virtio) fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0xaa; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

/// A device of one queue.
fn block(disk: Disk, engine: Engine) -> Box<Block> {
    Box::new(Block::new(disk, "", 1, engine, &ThreadStarter::default()).unwrap())
}

/// A disk of `queues` queues on this file, started.
fn multi_queue(file: &NamedTempFile, engine: Engine, mode: DiskMode, queues: u16) -> Driver {
    let disk = Disk::open(file.path(), mode).unwrap();
    let mut driver = Driver::new(Box::new(
        Block::new(disk, "", queues, engine, &ThreadStarter::default()).unwrap(),
    ));
    driver.queues = 0..queues;
    driver.start(0);
    driver
}

fn segment(sector: u64, count: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(count.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

/// Puts a request in the driver's current queue, without a word to the device; its head is 4 times `place`.
fn put(driver: &mut Driver, place: u16, kind: u32, sector: u64, data: &[(u64, u32, u16)]) {
    let space = space(driver, place);
    driver.write(space, &header(kind, sector));
    driver.write(space + 16, &[0xee]);
    let mut chain = vec![(space, 16, 0)];
    chain.extend_from_slice(data);
    chain.push((space + 16, 1, WRITE));
    driver.chain(4 * place, &chain);
    driver.offer(4 * place);
}

/// Where the header and the status of a request are.
fn space(driver: &Driver, place: u16) -> u64 {
    DATA + 0x800 * u64::from(driver.queue) + 0x20 * u64::from(place)
}

/// A request alone in the driver's current queue.
fn submit(driver: &mut Driver, kind: u32, sector: u64, data: (u64, u32, u16)) {
    put(driver, 0, kind, sector, &[data]);
    driver.notify();
}

/// Waits for it and gives its status.
fn status(driver: &mut Driver) -> u8 {
    driver.wait_used();
    driver.read(space(driver, 0) + 16, 1)[0]
}

/// A disk whose bytes are not in memory, so that they come late.
fn cold_file(len: u64) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    std::io::copy(
        &mut File::open("/dev/urandom").unwrap().take(len),
        &mut file,
    )
    .unwrap();
    file.as_file().sync_all().unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    file
}
