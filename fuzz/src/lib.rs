//! What the fuzz targets share: devices on files in memory, and addresses worth trying.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use arbitrary::Arbitrary;
use minivmm_devices::block::{Disk, DiskMode, Engine};
use minivmm_devices::chardev::{ConsoleDevice, ConsoleOutput, TerminalSize};
use minivmm_devices::thread::ThreadStarter;
use minivmm_devices::virtio::blk::Block;
use minivmm_devices::virtio::console::Console;
use minivmm_devices::virtio::testing::{AVAILABLE, DATA, DESCRIPTORS, END, GAP, SEAM, USED};
use rustix::fs::{MemfdFlags, memfd_create};
use serde_json::Value;

/// Bytes of a disk: no multiple of 4 KiB.
pub const DISK_SIZE: usize = 64 * 1024 + 512;

/// A file in memory with these bytes.
pub fn file(bytes: &[u8]) -> File {
    let mut file = File::from(memfd_create("fuzz", MemfdFlags::CLOEXEC).unwrap());
    file.write_all(bytes).unwrap();
    file
}

/// Where it can be opened.
pub fn path(file: &File) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

/// What a disk has at first: each sector another byte.
pub fn disk_bytes() -> Vec<u8> {
    (0..DISK_SIZE).map(|at| (at / 512) as u8 ^ 0x5a).collect()
}

/// How a disk is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Arbitrary)]
pub enum DiskKind {
    IoUring,
    Sync,
    ReadOnly,
    Ephemeral,
}

/// A block device on `file`.
pub fn block(file: &File, kind: DiskKind) -> Block {
    let (mode, engine) = match kind {
        DiskKind::IoUring => (DiskMode::ReadWrite, Engine::IoUring),
        DiskKind::Sync => (DiskMode::ReadWrite, Engine::Sync),
        DiskKind::ReadOnly => (DiskMode::ReadOnly, Engine::IoUring),
        DiskKind::Ephemeral => (DiskMode::Ephemeral, Engine::Sync),
    };
    let disk = Disk::open(&path(file), mode).unwrap();
    Block::new(disk, "fuzz", 1, engine, &ThreadStarter::default()).unwrap()
}

/// A host that takes `room` bytes of a console's output.
#[derive(Clone)]
pub struct Host(pub Arc<Mutex<usize>>);

impl ConsoleOutput for Host {
    fn write(&mut self, bytes: &[u8]) -> usize {
        let mut room = self.0.lock().unwrap();
        let taken = bytes.len().min(*room);
        *room -= taken;
        taken
    }

    fn has_room(&self) -> bool {
        *self.0.lock().unwrap() >= minivmm_devices::chardev::MIN_ROOM
    }

    fn call_back(&self) {}
}

/// A console, its host's side and its host's room.
pub fn console() -> (Console, Arc<Mutex<dyn ConsoleDevice>>, Host) {
    let host = Host(Arc::new(Mutex::new(0)));
    let size = TerminalSize {
        columns: 80,
        rows: 25,
    };
    let console = Console::new(Box::new(host.clone()), Arc::new(|| {}), Some(size));
    let port = console.port();
    (console, port, host)
}

/// A guest physical address, most often one near something.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub enum Place {
    Data(u16),
    Descriptors(u16),
    Available(u8),
    Used(u8),
    BeforeSeam(u8),
    BeforeGap(u8),
    BeforeEnd(u8),
    Anywhere(u64),
}

impl Place {
    pub fn address(self) -> u64 {
        match self {
            Self::Data(offset) => DATA + u64::from(offset),
            Self::Descriptors(offset) => DESCRIPTORS + u64::from(offset % 0x2000),
            Self::Available(offset) => AVAILABLE + u64::from(offset),
            Self::Used(offset) => USED + u64::from(offset),
            Self::BeforeSeam(offset) => SEAM - u64::from(offset),
            Self::BeforeGap(offset) => GAP - u64::from(offset),
            Self::BeforeEnd(offset) => END - u64::from(offset),
            Self::Anywhere(address) => address,
        }
    }
}

/// A descriptor of a queue.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub struct Descriptor {
    pub place: Place,
    pub len: Length,
    pub flags: u8,
    pub next: u8,
}

/// A length in bytes, most often a small one.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub enum Length {
    Small(u8),
    Sectors(u8),
    Descriptors(u8),
    Any(u32),
}

impl Length {
    pub fn bytes(self) -> u32 {
        match self {
            Self::Small(bytes) => bytes.into(),
            Self::Sectors(count) => u32::from(count % 16) * 512,
            Self::Descriptors(count) => u32::from(count) * 16,
            Self::Any(bytes) => bytes,
        }
    }
}

/// A number of a saved state.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub enum Number {
    Small(u8),
    Address(Place),
    Any(u64),
}

impl Number {
    pub fn value(self) -> u64 {
        match self {
            Self::Small(value) => value.into(),
            Self::Address(place) => place.address(),
            Self::Any(value) => value,
        }
    }
}

/// The numbers of a saved state, in its order.
fn numbers(value: &mut Value) -> Vec<&mut Value> {
    match value {
        Value::Number(_) => vec![value],
        Value::Array(list) => list.iter_mut().flat_map(numbers).collect(),
        Value::Object(map) => map.values_mut().flat_map(numbers).collect(),
        _ => Vec::new(),
    }
}

/// A JSON text with other numbers at some places.
pub fn edited(saved: &[u8], edits: &[(u8, Number)]) -> Vec<u8> {
    let mut value = serde_json::from_slice(saved).unwrap();
    let mut numbers = numbers(&mut value);
    for (index, number) in edits {
        let index = usize::from(*index) % numbers.len();
        *numbers[index] = number.value().into();
    }
    serde_json::to_vec(&value).unwrap()
}
