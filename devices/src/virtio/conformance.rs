//! What every virtio device must do, whatever it is: these tests run over each of them.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use proptest::prelude::*;
use virtio_bindings::virtio_mmio::*;

use super::blk::Block;
use super::console;
use super::device::{StopMode, VirtioDevice};
use super::net;
use super::rng::Rng;
use super::testing::*;
use super::vsock;
use super::worker::QueueWorker;
use super::{F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1};
use crate::block::{Disk, DiskMode, Engine};
use crate::bus::BusDevice;
use crate::thread::ThreadStarter;
use crate::virtio::transport::mmio;

mod hostile;
mod registers;
mod rings;

pub(super) const KINDS: [&str; 9] = [
    "rng",
    "net",
    "net, multiqueue",
    "vsock",
    "console",
    "block",
    "block, sync",
    "block, read-only",
    "block, ephemeral",
];

pub(super) fn device(kind: &str) -> Box<dyn VirtioDevice> {
    match kind {
        "rng" => Box::new(Rng::new(&ThreadStarter::default()).unwrap()),
        "net" => net::tests::fed(1),
        "net, multiqueue" => net::tests::fed(2),
        "vsock" => vsock::tests::fed(),
        "console" => Box::new(console::tests::fed()),
        _ => {
            let file = tempfile::NamedTempFile::new().unwrap();
            file.as_file().set_len(1 << 20).unwrap();
            let (mode, engine) = match kind {
                "block" => (DiskMode::ReadWrite, Engine::IoUring),
                "block, sync" => (DiskMode::ReadWrite, Engine::Sync),
                "block, read-only" => (DiskMode::ReadOnly, Engine::IoUring),
                _ => (DiskMode::Ephemeral, Engine::Sync),
            };
            let disk = Disk::open(file.path(), mode).unwrap();
            Box::new(Block::new(disk, "serial", 1, engine, &ThreadStarter::default()).unwrap())
        }
    }
}

/// Runs a test on each device.
fn each(test: impl Fn(Box<dyn VirtioDevice>, &str)) {
    KINDS.iter().for_each(|kind| test(device(kind), kind));
}
