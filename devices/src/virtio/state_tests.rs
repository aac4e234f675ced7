//! Pausing, saving and restoring virtio devices.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use proptest::collection::vec;
use proptest::prelude::*;
use serde_json::{Value, json};
use virtio_bindings::virtio_mmio::*;

use super::blk::Block;
use super::conformance::{KINDS, device};
use super::console::Console;
use super::console::tests::{Host, SIZE};
use super::device::{StopMode, VirtioDevice};
use super::queue::Virtqueue;
use super::rng::Rng;
use super::testing::*;
use super::worker::QueueWorker;
use super::{F_EVENT_IDX, F_INDIRECT_DESC};
use crate::block::{Disk, DiskMode, Engine};
use crate::chardev::TerminalSize;
use crate::interrupt::IrqLine;
use crate::state::{Record, SaveState, StateError, Suspend};
use crate::thread::ThreadStarter;
use crate::virtio::transport::mmio::MmioTransport;

#[test]
fn a_device_is_restored_at_every_step_of_its_driver() {
    let steps: [fn(&mut Driver); 6] = [
        |d| d.set_status(ACKNOWLEDGE | DRIVER),
        |d| d.negotiate(F_EVENT_IDX),
        |d| d.set_rings(8, DESCRIPTORS, AVAILABLE, USED),
        |d| d.driver_ok(),
        |d| d.set_status(1 << 20),
        |d| d.set_status(15 | FAILED),
    ];
    for kind in KINDS {
        let mut driver = Driver::new(device(kind));
        for step in steps {
            let registers = [
                VIRTIO_MMIO_STATUS,
                VIRTIO_MMIO_QUEUE_READY,
                VIRTIO_MMIO_DEVICE_FEATURES,
                VIRTIO_MMIO_INTERRUPT_STATUS,
                VIRTIO_MMIO_CONFIG_GENERATION,
            ];
            step(&mut driver);
            let before = registers.map(|register| driver.get(register));
            driver.pulses.take();
            driver.restore(|| device(kind));
            assert_eq!(driver.pulses.take(), 0, "{kind}: local APICs come first");
            assert_eq!(registers.map(|register| driver.get(register)), before);
            assert!(driver.transport.resume());
            // A running device and one with an interrupt that was not acknowledged.
            let is_told = before[3] != 0 || before[0] == 15;
            assert_eq!(driver.pulses.take() > 0, is_told, "{kind}: {before:x?}");
        }
        driver.start(0);
        driver.any_request();
    }
}

#[test]
fn a_mere_pause_interrupts_nobody() {
    for kind in KINDS {
        let mut driver = Driver::started(device(kind), 0);
        driver.any_request();
        for _ in 0..3 {
            assert!(driver.transport.pause(Duration::from_secs(20)));
            driver.pulses.take();
            assert!(driver.transport.resume());
            assert_eq!(driver.pulses.take(), 0, "{kind}");
            driver.any_request();
        }
        assert!(matches!(
            driver.transport.save(),
            Err(StateError::NotPaused)
        ));
    }
}

/// What happens to a queue.
#[derive(Debug, Clone, Copy)]
enum Act {
    Offer,
    Notify,
    Pause,
    Restore,
    /// Sleeps until an interrupt, unless there is nothing to wait for.
    Sleep,
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        8 => Just(Act::Offer),
        3 => Just(Act::Notify),
        1 => Just(Act::Pause),
        1 => Just(Act::Restore),
        2 => Just(Act::Sleep),
    ]
}

/// Requests at most in flight, of up to three descriptors each.
const SLOTS: u16 = 21;

/// A driver that sleeps until an interrupt tells it of used buffers.
struct Sleeper {
    driver: Driver,
    free: BTreeSet<u16>,
    /// By head, which write it is.
    in_flight: Vec<Option<u8>>,
    count: u8,
}

impl Sleeper {
    /// Offers a request: to a disk, a write of one byte's value to the sector of its head.
    fn offer(&mut self, is_disk: bool) {
        let Some(slot) = self.free.pop_first() else {
            return;
        };
        let (head, driver) = (3 * slot, &mut self.driver);
        let at = DATA + 0x1000 * u64::from(slot);
        self.count = self.count.wrapping_add(1);
        if is_disk {
            driver.write(at, &super::blk::tests::header(1, slot.into()));
            driver.write(at + 0x200, &[self.count; 512]);
            driver.chain(
                head,
                &[(at, 16, 0), (at + 0x200, 512, 0), (at + 16, 1, WRITE)],
            );
        } else {
            driver.chain(head, &[(at, 16, 0), (at + 0x200, driver.answer, WRITE)]);
        }
        self.in_flight[usize::from(slot)] = Some(self.count);
        driver.offer(head);
    }

    /// Takes what is used: each head once, and only one that was offered.
    fn collect(&mut self, disk: Option<&Path>) {
        while self.driver.used_index() != self.driver.used_so_far() {
            let (head, _) = self.driver.wait_used();
            let slot = head as u16 / 3;
            let value = self.in_flight[usize::from(slot)].take();
            let value = value.expect("done twice, or never asked for");
            if let Some(disk) = disk {
                let at = DATA + 0x1000 * u64::from(slot);
                assert_eq!(self.driver.read(at + 16, 1), [0], "the status");
                let bytes = std::fs::read(disk).unwrap();
                assert!(bytes[usize::from(slot) * 512..][..512] == [value; 512]);
            }
            self.free.insert(slot);
        }
    }

    fn sleep(&mut self, disk: Option<&Path>) {
        // The virtqueue_enable_cb of Linux: asks for the next one, then looks once more.
        loop {
            self.collect(disk);
            self.driver.set_used_event(self.driver.used_so_far());
            if self.driver.used_index() == self.driver.used_so_far() {
                break;
            }
        }
        if self.free.len() < SLOTS.into() {
            wait("an interrupt", || self.driver.pulses.take() > 0);
            self.collect(disk);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// With snapshots at any point, each request is done once, its driver hears of it, and its data arrive.
    #[test]
    fn no_request_is_lost_or_done_twice(
        kind in 0..KINDS.len(),
        without in prop_oneof![Just(0), Just(F_EVENT_IDX), Just(F_INDIRECT_DESC)],
        acts in vec(act(), 1..80),
    ) {
        let kind = KINDS[kind];
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(64 << 10).unwrap();
        // What an ephemeral disk holds is in a file of its own.
        let is_disk = ["block", "block, sync"].contains(&kind);
        let make = || -> Box<dyn VirtioDevice> {
            if !is_disk {
                return device(kind);
            }
            let engine = if kind == "block" { Engine::IoUring } else { Engine::Sync };
            let disk = Disk::open(file.path(), DiskMode::ReadWrite).unwrap();
            Box::new(Block::new(disk, "", 1, engine, &ThreadStarter::default()).unwrap())
        };
        let disk = is_disk.then_some(file.path());
        let mut driver = Driver::new(make());
        driver.size = 64;
        driver.start(without);
        let mut sleeper = Sleeper {
            driver,
            free: (0..SLOTS).collect(),
            in_flight: vec![None; SLOTS.into()],
            count: 0,
        };
        for act in acts {
            match act {
                Act::Offer => sleeper.offer(is_disk),
                Act::Notify => sleeper.driver.notify(),
                Act::Pause => {
                    assert!(sleeper.driver.transport.pause(Duration::from_secs(20)));
                    assert!(sleeper.driver.transport.resume());
                }
                Act::Restore => {
                    sleeper.driver.restore(make);
                    assert!(sleeper.driver.transport.resume());
                }
                Act::Sleep => {
                    sleeper.driver.notify();
                    sleeper.sleep(disk);
                }
            }
        }
        sleeper.driver.notify();
        while sleeper.free.len() < SLOTS.into() {
            sleeper.sleep(disk);
        }
        prop_assert_eq!(sleeper.driver.used_index(), sleeper.driver.offered_so_far());
    }

    /// Text of which a part was sent goes on behind it.
    #[test]
    fn no_byte_of_a_console_is_lost_or_sent_twice(
        texts in vec(1usize..10_000, 1..6),
        rooms in vec(0usize..8000, 1..12),
    ) {
        let host = Host::with_room(0);
        let make = || -> Box<dyn VirtioDevice> {
            Box::new(Console::new(Box::new(host.clone()), Arc::new(|| {}), Some(SIZE)))
        };
        let mut driver = Driver::new(make());
        driver.queues = 1..2;
        driver.start(0);
        let mut wanted = Vec::new();
        for (n, len) in (0..).zip(&texts) {
            let text: Vec<u8> = (0..*len).map(|at| (at + n) as u8).collect();
            let at = DATA + 0x4000 * n as u64;
            driver.write(at, &text);
            wanted.extend(text);
            driver.chain(n as u16, &[(at, *len as u32, 0)]);
            driver.offer(n as u16);
        }
        driver.notify();
        for room in rooms.into_iter().chain([1 << 20]) {
            host.make_room(room);
            driver.restore(make);
            assert!(driver.transport.resume());
        }
        prop_assert!(host.take() == wanted);
        for head in 0..texts.len() as u32 {
            prop_assert_eq!(driver.wait_used().0, head);
        }
    }
}

#[test]
fn a_restored_console_has_the_size_of_its_new_terminal() {
    let wide = TerminalSize {
        columns: 200,
        ..SIZE
    };
    for (old, new, seen, is_told) in [
        (Some(SIZE), Some(SIZE), SIZE.columns, false),
        (Some(SIZE), Some(wide), 200, true),
        // The driver was promised a size; or none.
        (Some(SIZE), None, SIZE.columns, false),
        (None, Some(SIZE), 0, false),
    ] {
        let make = |size| -> Box<dyn VirtioDevice> {
            Box::new(Console::new(
                Box::new(Host::default()),
                Arc::new(|| {}),
                size,
            ))
        };
        let mut driver = Driver::started(make(old), 0);
        driver.set(VIRTIO_MMIO_INTERRUPT_ACK, 3);
        let offered = driver.offered();
        driver.restore(|| make(new));
        assert!(driver.transport.resume());
        assert_eq!(driver.offered(), offered);
        let told = driver.get(VIRTIO_MMIO_INTERRUPT_STATUS) & VIRTIO_MMIO_INT_CONFIG != 0;
        let columns = driver.get(VIRTIO_MMIO_CONFIG) as u16;
        assert_eq!((columns, told), (seen, is_told));
    }
}

/// An entropy device that does not stop while its host hangs.
struct Hanging(Rng, Arc<AtomicBool>);

impl SaveState for Hanging {
    fn save(&self) -> Result<Box<Record>, StateError> {
        self.0.save()
    }

    fn restore(&mut self, record: &Record) -> Result<(), StateError> {
        self.0.restore(record)
    }
}

impl VirtioDevice for Hanging {
    fn device_type(&self) -> u32 {
        self.0.device_type()
    }

    fn features(&self) -> u64 {
        self.0.features()
    }

    fn queue_sizes(&self) -> &[u16] {
        self.0.queue_sizes()
    }

    fn read_config(&self, _: u64, _: &mut [u8]) {}

    fn workers(&mut self) -> &mut [QueueWorker] {
        self.0.workers()
    }

    fn stop(&mut self, mode: StopMode, wait: Duration) -> Option<Vec<Virtqueue>> {
        if self.1.load(Ordering::Relaxed) {
            return None;
        }
        self.0.stop(mode, wait)
    }
}

#[test]
fn a_pause_that_the_host_prevents_can_be_given_up() {
    let hangs = Arc::new(AtomicBool::new(false));
    let rng = Rng::new(&ThreadStarter::default()).unwrap();
    let mut driver = Driver::started(Box::new(Hanging(rng, hangs.clone())), 0);
    for _ in 0..2 {
        hangs.store(true, Ordering::Relaxed);
        assert!(!driver.transport.pause(Duration::ZERO));
        assert!(matches!(
            driver.transport.save(),
            Err(StateError::NotPaused)
        ));
        // Given up, wanted once more, and given up.
        assert!(!driver.transport.resume());
        assert!(!driver.transport.pause(Duration::ZERO));
        assert!(!driver.transport.resume());
        hangs.store(false, Ordering::Relaxed);
        wait("the end of a pause", || driver.transport.resume());
        assert_eq!(driver.status() & (DRIVER_OK | NEEDS_RESET), DRIVER_OK);
        driver.any_request();
    }
    // A reset that hangs is one that is waited for.
    hangs.store(true, Ordering::Relaxed);
    driver.set_status(0);
    assert!(!driver.transport.pause(Duration::ZERO));
    assert!(driver.transport.resume());
    hangs.store(false, Ordering::Relaxed);
    assert!(driver.transport.pause(Duration::from_secs(20)));
    assert!(driver.transport.resume());
    assert_eq!(driver.status(), 0);
    driver.start(0);
    driver.any_request();
}

fn saved(kind: &str) -> Value {
    let mut driver = Driver::started(device(kind), 0);
    driver.any_request();
    assert!(driver.transport.pause(Duration::from_secs(20)));
    serde_json::from_str(driver.transport.save().unwrap().get()).unwrap()
}

fn restore(kind: &str, state: &Value) -> Result<MmioTransport, StateError> {
    let mem = Driver::new(device("rng")).mem;
    let mut transport = MmioTransport::new(device(kind), mem, IrqLine::new(|| Ok(())));
    let record: Box<Record> = serde_json::value::to_raw_value(state).unwrap();
    transport.restore(&record)?;
    Ok(transport)
}

#[test]
fn a_state_that_no_driver_can_bring_about_is_refused() {
    let queue = |field: &str| format!("/state/core/queues/0/{field}");
    let core = |field: &str| format!("/state/core/{field}");
    for (pointer, value, error) in [
        ("/version".into(), json!(2), "version 2"),
        (
            "/state/interrupt_status".into(),
            json!(4),
            "interrupt_status has unknown bits: 0x4",
        ),
        (core("device_type"), json!(9), "device_type is 9"),
        (core("status"), json!(4), "status is 0x4"),
        (core("status"), json!(7), "status is 0x7"),
        (core("status"), json!(0x8f), ""),
        (core("status"), json!(0x1f), "status is 0x1f"),
        (core("driver_features"), json!(0), "driver_features are 0x0"),
        (
            core("driver_features"),
            json!(u64::MAX),
            "driver_features are 0xffff",
        ),
        (core("queues"), json!([]), "queues are 0"),
        (queue("size"), json!(0), "size 0"),
        (queue("size"), json!(3), "size 3"),
        (queue("size"), json!(32768), "size 32768"),
        (queue("descriptors"), json!(8), "not aligned"),
        (queue("available"), json!(GAP), "not in RAM"),
        (queue("used"), json!(u64::MAX - 3), "not in RAM"),
        (queue("used"), json!(END - 8), "not in RAM"),
        (queue("next_avail"), json!(7), "7 taken and 1 used"),
        (queue("next_avail"), json!(65536), "damaged"),
        (core("device"), json!(null), "damaged"),
        (core("device/version"), json!(3), "version 3"),
    ] {
        for kind in KINDS {
            let mut state = saved(kind);
            *state.pointer_mut(&pointer).unwrap() = value.clone();
            let found = restore(kind, &state).err().map(|e| e.to_string());
            let found = found.unwrap_or_default();
            assert!(found.contains(error), "{kind} {pointer}: {found}");
            assert_eq!(
                found.is_empty(),
                error.is_empty(),
                "{kind} {pointer}: {found}"
            );
        }
    }
    let mut larger = saved("block");
    *larger
        .pointer_mut("/state/core/device/state/sectors")
        .unwrap() = json!(4096);
    let found = restore("block", &larger).err().unwrap().to_string();
    assert!(found.contains("was 4096 sectors of 512 bytes, in blocks of 512; here it has 2048"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever is in memory and in a state, a restored device can be used after a reset.
    #[test]
    fn lies_are_refused_or_end_with_a_reset(
        kind in 0..KINDS.len(),
        field in 0usize..20,
        value in prop_oneof![any::<u64>(), 0u64..0x100, Just(GAP), Just(END - 16)],
        ring in vec(any::<u8>(), 64),
    ) {
        let mut driver = Driver::started(device(KINDS[kind]), 0);
        driver.any_request();
        assert!(driver.transport.pause(Duration::from_secs(20)));
        let mut state: Value = serde_json::from_str(driver.transport.save().unwrap().get()).unwrap();
        let mut numbers = Vec::new();
        pointers(&state["state"], "/state", &mut numbers);
        let pointer = &numbers[field % numbers.len()];
        *state.pointer_mut(pointer).unwrap() = json!(value);
        driver.write(AVAILABLE, &ring);
        if let Ok(restored) = restore(KINDS[kind], &state) {
            drop(restored);
            driver.transport = MmioTransport::new(
                device(KINDS[kind]),
                driver.mem.clone(),
                driver.pulses.line(),
            );
            let record: Box<Record> = serde_json::value::to_raw_value(&state).unwrap();
            driver.transport.restore(&record).unwrap();
            assert!(driver.transport.resume());
            driver.notify();
        }
        driver.start(0);
        driver.any_request();
    }
}

/// Where the numbers of a state are.
fn pointers(value: &Value, at: &str, found: &mut Vec<String>) {
    match value {
        Value::Number(_) => found.push(at.to_owned()),
        Value::Object(map) => map
            .iter()
            .for_each(|(key, value)| pointers(value, &format!("{at}/{key}"), found)),
        Value::Array(list) => list
            .iter()
            .enumerate()
            .for_each(|(key, value)| pointers(value, &format!("{at}/{key}"), found)),
        _ => {}
    }
}
