//! What every virtio device must do, whatever it is: these tests run over each of them.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use proptest::prelude::*;
use virtio_bindings::virtio_mmio::*;

use super::blk::Block;
use super::console;
use super::device::{StopMode, VirtioDevice};
use super::rng::Rng;
use super::testing::*;
use super::{F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1};
use crate::block::{Access, Disk, Engine};
use crate::bus::BusDevice;
use crate::thread::ThreadStarter;
use crate::virtio::transport::mmio;

const KINDS: [&str; 6] = [
    "rng",
    "console",
    "block",
    "block, sync",
    "block, read-only",
    "block, ephemeral",
];

fn device(kind: &str) -> Box<dyn VirtioDevice> {
    match kind {
        "rng" => Box::new(Rng::new(&ThreadStarter::default()).unwrap()),
        "console" => Box::new(console::tests::fed()),
        _ => {
            let file = tempfile::NamedTempFile::new().unwrap();
            file.as_file().set_len(1 << 20).unwrap();
            let (access, engine) = match kind {
                "block" => (Access::ReadWrite, Engine::IoUring),
                "block, sync" => (Access::ReadWrite, Engine::Sync),
                "block, read-only" => (Access::ReadOnly, Engine::IoUring),
                _ => (Access::Ephemeral, Engine::Sync),
            };
            let disk = Disk::open(file.path(), access).unwrap();
            Box::new(Block::new(disk, "serial", 1, engine, &ThreadStarter::default()).unwrap())
        }
    }
}

/// Runs a test on each device.
fn each(test: impl Fn(Box<dyn VirtioDevice>, &str)) {
    KINDS.iter().for_each(|kind| test(device(kind), kind));
}

#[test]
fn identity_and_features() {
    each(|device, kind| {
        let device_type = device.device_type();
        let own = device.features();
        let mut driver = Driver::new(device);
        assert_eq!(driver.get(VIRTIO_MMIO_MAGIC_VALUE), 0x7472_6976);
        assert_eq!(driver.get(VIRTIO_MMIO_VERSION), 2);
        assert_eq!(driver.get(VIRTIO_MMIO_DEVICE_ID), device_type);
        assert_eq!(driver.get(VIRTIO_MMIO_CONFIG_GENERATION), 0);
        let ours = F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC;
        assert_eq!(own & ours, 0, "{kind}: these are the transport's");
        assert_eq!(driver.offered(), own | ours);
        for select in [2, 3, u32::MAX] {
            driver.set(VIRTIO_MMIO_DEVICE_FEATURES_SEL, select);
            assert_eq!(driver.get(VIRTIO_MMIO_DEVICE_FEATURES), 0);
        }
        driver.set(VIRTIO_MMIO_SHM_SEL, 0);
        for register in [VIRTIO_MMIO_SHM_LEN_LOW, VIRTIO_MMIO_SHM_LEN_HIGH] {
            assert_eq!(driver.get(register), u32::MAX, "no shared memory");
        }
    });
}

#[test]
fn requests_are_answered_with_every_set_of_ring_features() {
    each(|device, _| {
        let mut driver = Driver::new(device);
        for without in [
            0,
            F_EVENT_IDX,
            F_INDIRECT_DESC,
            F_EVENT_IDX | F_INDIRECT_DESC,
        ] {
            driver.start(without);
            driver.pulses.take();
            // Around the ring several times.
            for n in 0..40 {
                driver.set_used_event(n);
                driver.any_request();
                wait("an interrupt", || driver.pulses.take() > 0);
                assert_eq!(
                    driver.get(VIRTIO_MMIO_INTERRUPT_STATUS),
                    VIRTIO_MMIO_INT_VRING
                );
                driver.set(VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INT_VRING);
                assert_eq!(driver.get(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
            }
        }
    });
}

#[test]
fn a_driver_that_wants_no_interrupts_gets_none() {
    each(|device, kind| {
        let mut driver = Driver::started(device, F_EVENT_IDX);
        driver.write(AVAILABLE, &1u16.to_le_bytes());
        driver.any_request();
        driver.start(0);
        driver.set_used_event(5);
        for _ in 0..5 {
            driver.any_request();
        }
        driver.reset();
        assert_eq!(driver.pulses.take(), 0, "{kind}");
    });
}

#[test]
fn a_burst_is_done_to_its_end() {
    each(|device, _| {
        let mut driver = Driver::new(device);
        driver.size = 64;
        driver.start(0);
        for head in 0..32 {
            driver.chain(2 * head, &driver.any_chain());
            driver.offer(2 * head);
        }
        driver.notify();
        for head in 0..32 {
            assert_eq!(driver.wait_used(), (2 * head, 21));
        }
    });
}

#[test]
fn indirect_tables_and_buffers_across_regions_work() {
    each(|device, _| {
        let mut driver = Driver::started(device, 0);
        let [(header, len, _), _] = driver.any_chain();
        let table = HIGH + 0x100;
        // Indirect tables need no alignment; an empty descriptor is no error.
        let table = table + 8;
        driver.descriptor_in(table, 0, header, len, NEXT, 2);
        driver.descriptor_in(table, 2, DATA, 0, NEXT, 1);
        driver.descriptor_in(table, 1, SEAM - 10, 21, WRITE, 7);
        // The write flag of a descriptor that refers to a table says nothing (§ 2.7.5.3.2).
        driver.descriptor(3, table, 48, INDIRECT | WRITE, 9);
        driver.offer(3);
        driver.notify();
        assert_eq!(driver.wait_used(), (3, 21));
        // A direct descriptor may come before a table.
        driver.descriptor(0, header, 10, NEXT, 1);
        driver.descriptor(1, table, 32, INDIRECT, 0);
        driver.descriptor_in(table, 0, header + 10, 6, NEXT, 1);
        driver.offer(0);
        driver.notify();
        assert_eq!(driver.wait_used(), (0, 21));
    });
}

#[test]
fn one_head_made_available_twice_is_done_twice() {
    each(|device, _| {
        let mut driver = Driver::started(device, 0);
        driver.chain(0, &driver.any_chain());
        driver.offer(0);
        driver.offer(0);
        driver.notify();
        assert_eq!((driver.wait_used(), driver.wait_used()), ((0, 21), (0, 21)));
    });
}

type Breaks = dyn Fn(&mut Driver);

/// What a driver may write into a ring that is wrong, by name.
fn broken_rings() -> Vec<(&'static str, Box<Breaks>)> {
    fn offered(prepare: impl Fn(&Driver) + 'static) -> Box<Breaks> {
        Box::new(move |driver| {
            prepare(driver);
            driver.offer(0);
        })
    }
    const TABLE: u64 = DATA + 0x1000;
    vec![
        ("head beyond the table", Box::new(|d| d.offer(16))),
        ("head far beyond", Box::new(|d| d.offer(u16::MAX))),
        (
            "next beyond",
            offered(|d| d.descriptor(0, DATA, 16, NEXT, 16)),
        ),
        (
            "a loop of one",
            offered(|d| d.descriptor(0, DATA, 16, NEXT, 0)),
        ),
        (
            "a loop of two, writable",
            offered(|d| {
                d.descriptor(0, DATA, 16, NEXT | WRITE, 1);
                d.descriptor(1, DATA, 16, NEXT | WRITE, 0);
            }),
        ),
        (
            "a loop in an indirect table",
            offered(|d| {
                d.descriptor(0, TABLE, 32, INDIRECT, 0);
                d.descriptor_in(TABLE, 0, DATA, 16, NEXT, 1);
                d.descriptor_in(TABLE, 1, DATA, 16, NEXT, 0);
            }),
        ),
        (
            "next beyond an indirect table",
            offered(|d| {
                d.descriptor(0, TABLE, 32, INDIRECT, 0);
                d.descriptor_in(TABLE, 0, DATA, 16, NEXT, 2);
            }),
        ),
        (
            "nested tables",
            offered(|d| {
                d.descriptor(0, TABLE, 16, INDIRECT, 0);
                d.descriptor_in(TABLE, 0, TABLE, 16, INDIRECT, 0);
            }),
        ),
        (
            "a table and a next",
            offered(|d| {
                d.descriptor(0, TABLE, 16, INDIRECT | NEXT, 1);
                d.descriptor_in(TABLE, 0, DATA, 21, WRITE, 0);
                d.descriptor(1, DATA, 21, WRITE, 0);
            }),
        ),
        (
            "an odd table",
            offered(|d| d.descriptor(0, TABLE, 24, INDIRECT, 0)),
        ),
        (
            "an empty table",
            offered(|d| d.descriptor(0, TABLE, 0, INDIRECT, 0)),
        ),
        (
            "a huge table",
            offered(|d| d.descriptor(0, TABLE, 0xffff_fff0, INDIRECT, 0)),
        ),
        (
            "a table in the gap",
            offered(|d| d.descriptor(0, GAP, 16, INDIRECT, 0)),
        ),
        (
            "a table at the end of the address space",
            offered(|d| {
                d.descriptor(0, u64::MAX - 15, 32, INDIRECT, 0);
            }),
        ),
        (
            "readable behind writable",
            offered(|d| {
                d.descriptor(0, DATA, 21, NEXT | WRITE, 1);
                d.descriptor(1, DATA, 16, 0, 0);
            }),
        ),
        (
            "a buffer in the gap",
            offered(|d| d.descriptor(0, GAP, 21, WRITE, 0)),
        ),
        (
            "a buffer into the gap",
            offered(|d| d.descriptor(0, GAP - 20, 21, WRITE, 0)),
        ),
        (
            "a buffer past RAM",
            offered(|d| d.descriptor(0, END - 1, 2, WRITE, 0)),
        ),
        (
            "a buffer of 4 GiB",
            offered(|d| d.descriptor(0, 0, u32::MAX, WRITE, 0)),
        ),
        (
            "more than 4 GiB in all",
            offered(|d| {
                d.descriptor(0, TABLE, 300 * 16, INDIRECT, 0);
                for n in 0..300 {
                    let next = if n == 299 { 0 } else { NEXT };
                    d.descriptor_in(TABLE, n, HIGH, 0x100_0000, WRITE | next, n + 1);
                }
            }),
        ),
        (
            "a buffer that wraps",
            offered(|d| d.descriptor(0, u64::MAX - 3, 8, WRITE, 0)),
        ),
        (
            "an index too far ahead",
            Box::new(|d| d.set_avail_index(17)),
        ),
        (
            "an index that went back",
            Box::new(|d| d.set_avail_index(u16::MAX)),
        ),
    ]
}

#[test]
fn a_broken_ring_needs_a_reset() {
    each(|device, kind| {
        let mut driver = Driver::new(device);
        for (case, breaks) in broken_rings() {
            driver.start(0);
            breaks(&mut driver);
            driver.notify();
            driver.expect_needs_reset(&format!("{kind}: {case}"));
        }
        // A table without the feature.
        driver.start(F_INDIRECT_DESC);
        driver.descriptor(0, DATA, 16, INDIRECT, 0);
        driver.descriptor_in(DATA, 0, DATA + 0x100, 21, WRITE, 0);
        driver.offer(0);
        driver.notify();
        driver.expect_needs_reset(kind);
    });
}

#[test]
fn what_came_before_the_fault_is_done() {
    each(|device, kind| {
        let mut driver = Driver::started(device, 0);
        driver.chain(0, &driver.any_chain());
        driver.offer(0);
        driver.offer(999);
        driver.notify();
        assert_eq!(driver.wait_used(), (0, 21));
        driver.expect_needs_reset(kind);
    });
}

#[test]
fn rings_must_be_aligned_and_in_ram() {
    each(|device, kind| {
        let mut driver = Driver::new(device);
        let wrapping = u64::MAX - 0xf;
        for (case, descriptors, available, used) in [
            ("descriptors misaligned", DESCRIPTORS + 8, AVAILABLE, USED),
            ("available misaligned", DESCRIPTORS, AVAILABLE + 1, USED),
            ("used misaligned", DESCRIPTORS, AVAILABLE, USED + 2),
            ("descriptors in the gap", GAP, AVAILABLE, USED),
            ("available in the gap", DESCRIPTORS, GAP + 0x1000, USED),
            ("used into the gap", DESCRIPTORS, AVAILABLE, GAP - 0x10),
            ("descriptors past RAM", END, AVAILABLE, USED),
            ("used past RAM", DESCRIPTORS, AVAILABLE, END - 0x10),
            ("descriptors wrap", wrapping, AVAILABLE, USED),
            ("available wraps", DESCRIPTORS, wrapping, USED),
            ("used wraps", DESCRIPTORS, AVAILABLE, wrapping),
        ] {
            driver.negotiate(0);
            driver.pulses.take();
            driver.set_rings(16, descriptors, available, used);
            assert_eq!(driver.get(VIRTIO_MMIO_QUEUE_READY), 0, "{kind}: {case}");
            assert_ne!(driver.status() & NEEDS_RESET, 0, "{kind}: {case}");
            // Nothing is said before DRIVER_OK; then it is.
            assert_eq!(driver.pulses.take(), 0, "{kind}: {case}");
            driver.driver_ok();
            driver.expect_needs_reset(case);
        }
        // Rings over one another, and over their data, hurt the guest alone.
        driver.negotiate(0);
        driver.set_rings(16, DESCRIPTORS, DESCRIPTORS, DESCRIPTORS);
        driver.driver_ok();
        driver.notify();
        driver.start(0);
        driver.any_request();
    });
}

#[test]
fn status_goes_step_by_step() {
    each(|device, kind| {
        let mut driver = Driver::new(device);
        for (case, steps) in [
            ("driver first", &[DRIVER][..]),
            ("features first", &[FEATURES_OK]),
            ("DRIVER_OK first", &[DRIVER_OK]),
            ("no features", &[1, 3, 7]),
            ("a bit taken back", &[1, 3, 1]),
            ("an unknown bit", &[1, 3, 3 | 16]),
            ("a high bit", &[1, 3, 0x103]),
            ("no VERSION_1, but on", &[1, 3, 11, 15]),
        ] {
            driver.reset();
            steps.iter().for_each(|step| driver.set_status(*step));
            assert_ne!(driver.status() & NEEDS_RESET, 0, "{kind}: {case}");
            assert_eq!(driver.status() & DRIVER_OK, 0, "{kind}: {case}");
        }
        // Features that are not offered, or without VERSION_1, are not agreed to.
        let offered = driver.offered();
        for features in [
            0,
            offered & !F_VERSION_1,
            offered | 1 << 40,
            offered | 1 << 24,
        ] {
            driver.reset();
            driver.set_status(1);
            driver.set_status(3);
            driver.accept(features);
            driver.set_status(11);
            assert_eq!(driver.status(), 3, "{kind}: {features:#x}");
        }
        // A driver that has given up.
        driver.start(0);
        driver.set_status(15 | FAILED);
        assert_eq!(driver.status(), 15 | FAILED);
        driver.chain(0, &driver.any_chain());
        driver.offer(0);
        driver.notify();
        driver.set_status(15 | FAILED);
        assert_eq!(driver.used_index(), 0, "{kind}");
        driver.start(0);
        driver.any_request();
    });
}

#[test]
fn what_was_agreed_on_does_not_change() {
    type Write = fn(&mut Driver);
    let late: [(&str, Write); 7] = [
        ("features", |d| d.accept(F_VERSION_1)),
        ("queue size", |d| d.set(VIRTIO_MMIO_QUEUE_NUM, 8)),
        ("descriptor address", |d| {
            d.set(VIRTIO_MMIO_QUEUE_DESC_LOW, 0x5000)
        }),
        ("available address", |d| {
            d.set(VIRTIO_MMIO_QUEUE_AVAIL_HIGH, 1)
        }),
        ("used address", |d| {
            d.set(VIRTIO_MMIO_QUEUE_USED_LOW, 0x5000)
        }),
        ("ready again", |d| d.set(VIRTIO_MMIO_QUEUE_READY, 1)),
        ("status", |d| d.set_status(3)),
    ];
    each(|device, kind| {
        let mut driver = Driver::new(device);
        for (case, write) in late {
            driver.start(0);
            driver.any_request();
            write(&mut driver);
            driver.expect_needs_reset(&format!("{kind}: {case}"));
            // Ready, but before DRIVER_OK.
            if case != "status" {
                driver.negotiate(0);
                driver.set_rings(16, DESCRIPTORS, AVAILABLE, USED);
                write(&mut driver);
                assert_ne!(driver.status() & NEEDS_RESET, 0, "{kind}: {case}");
            }
        }
    });
}

#[test]
fn queue_sizes_are_powers_of_two_up_to_the_maximum() {
    each(|device, kind| {
        let mut driver = Driver::new(device);
        let max = driver.get(VIRTIO_MMIO_QUEUE_NUM_MAX);
        assert!(max.is_power_of_two() && max <= 32768, "{kind}: {max}");
        for size in [0, 3, 15, max + 1, max * 2, 0x1_0000, 0x1_0010, u32::MAX] {
            driver.negotiate(0);
            driver.set(VIRTIO_MMIO_QUEUE_NUM, size);
            assert_ne!(driver.status() & NEEDS_RESET, 0, "{kind}: {size}");
        }
        for size in [1, 2, max] {
            driver.negotiate(0);
            driver.set_rings(size, DESCRIPTORS, AVAILABLE, USED);
            assert_eq!(driver.get(VIRTIO_MMIO_QUEUE_READY), 1, "{kind}: {size}");
        }
    });
}

#[test]
fn a_queue_that_is_not_there_has_nothing() {
    each(|device, kind| {
        let queues = device.queue_sizes().len() as u32;
        let mut driver = Driver::started(device, 0);
        for select in [queues, queues + 1, 0xffff, 0x1_0000, u32::MAX] {
            driver.set(VIRTIO_MMIO_QUEUE_SEL, select);
            assert_eq!(driver.get(VIRTIO_MMIO_QUEUE_NUM_MAX), 0, "{kind}: {select}");
            assert_eq!(driver.get(VIRTIO_MMIO_QUEUE_READY), 0);
            driver.set(VIRTIO_MMIO_QUEUE_NUM, 3);
            driver.set(VIRTIO_MMIO_QUEUE_DESC_LOW, 3);
            driver.set(VIRTIO_MMIO_QUEUE_READY, 1);
            driver.set(VIRTIO_MMIO_QUEUE_NOTIFY, select);
        }
        driver.any_request();
    });
}

#[test]
fn a_notification_out_of_time_is_nothing() {
    each(|device, _| {
        let mut driver = Driver::new(device);
        driver.notify();
        driver.negotiate(0);
        driver.notify();
        driver.set_rings(16, DESCRIPTORS, AVAILABLE, USED);
        driver.chain(0, &driver.any_chain());
        driver.offer(0);
        driver.notify();
        assert_eq!(driver.used_index(), 0);
        // What was there before DRIVER_OK is found without a notification.
        driver.driver_ok();
        assert_eq!(driver.wait_used(), (0, 21));
        // A flood of them does nothing.
        for _ in 0..10_000 {
            driver.notify();
        }
        driver.any_request();
    });
}

#[test]
fn a_busy_queue_gets_an_ioeventfd_once() {
    each(|device, kind| {
        let queues = device.notifiers().len();
        let mut driver = Driver::new(device);
        let registered = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&registered);
        driver.ioeventfds(move |queue, event| {
            seen.lock().unwrap().push((queue, event.try_clone()?));
            Ok(())
        });
        driver.start(0);
        // Of the last, nobody knows.
        for queue in [0, 1, u32::MAX] {
            for count in 1..=2 * mmio::EXITS_BEFORE_IOEVENTFD {
                driver.set(VIRTIO_MMIO_QUEUE_NOTIFY, queue);
                let expected = usize::from(count >= mmio::EXITS_BEFORE_IOEVENTFD);
                let registered = registered.lock().unwrap();
                let of_queue = registered.iter().filter(|(other, _)| *other == queue);
                let expected = if (queue as usize) < queues {
                    expected
                } else {
                    0
                };
                assert_eq!(of_queue.count(), expected, "{kind}: queue {queue}");
            }
        }
        let Some((queue, event)) = registered.lock().unwrap().pop() else {
            return;
        };
        // From now on the hypervisor notifies, after a reset as well.
        assert_eq!(queue, 0, "{kind}");
        for _ in 0..2 {
            driver.chain(0, &driver.any_chain());
            driver.offer(0);
            event.write(1).unwrap();
            driver.wait_used();
            driver.start(0);
        }
    });
}

#[test]
fn registers_take_aligned_words_alone() {
    each(|device, kind| {
        let mut driver = Driver::started(device, 0);
        for offset in 0..0x100u64 {
            for len in [0, 1, 2, 3, 5, 8, 64] {
                let mut data = vec![0xee; len];
                driver.transport.read(offset, &mut data);
                assert!(data.iter().all(|b| *b == 0), "{kind}: {len} at {offset:#x}");
                driver.transport.write(offset, &vec![0; len]);
            }
            if !offset.is_multiple_of(4) {
                let mut data = [0xee; 4];
                driver.transport.read(offset, &mut data);
                assert_eq!(data, [0; 4], "{kind}: {offset:#x}");
                driver.transport.write(offset, &[0; 4]);
            }
        }
        driver.any_request();
    });
}

#[test]
fn the_configuration_space_ends() {
    each(|device, _| {
        let mut driver = Driver::started(device, 0);
        let mut whole = [0; 256];
        driver.transport.read(0x100, &mut whole);
        for offset in (0..256).chain([mmio::LEN - 0x101, u64::from(u32::MAX), u64::MAX - 0x100]) {
            for len in [1, 2, 4, 8] {
                let mut data = vec![0xee; len];
                driver.transport.read(0x100 + offset, &mut data);
                for (at, byte) in (offset..=u64::MAX).zip(&data) {
                    let wanted = usize::try_from(at).ok().and_then(|at| whole.get(at));
                    assert_eq!(byte, wanted.unwrap_or(&0), "{at:#x}");
                }
                driver.transport.write(0x100 + offset, &vec![0xff; len]);
            }
        }
        let mut again = [0; 256];
        driver.transport.read(0x100, &mut again);
        assert_eq!(whole, again);
        driver.any_request();
    });
}

#[test]
fn every_access_to_every_register_is_survived() {
    each(|device, _| {
        let mut driver = Driver::new(device);
        for value in [0, 1, 2, 3, 7, 11, 15, 0x40, 0x80, 0xff, 0x1000, u32::MAX] {
            for register in (0..0x110).step_by(4) {
                driver.set(register, value);
                driver.get(register);
            }
        }
        driver.start(0);
        driver.any_request();
    });
}

#[test]
fn a_queue_can_be_taken_back() {
    each(|device, kind| {
        let mut driver = Driver::started(device, 0);
        driver.any_request();
        driver.take_back(0);
        driver.chain(0, &driver.any_chain());
        driver.offer(0);
        driver.notify();
        assert_eq!(driver.status() & NEEDS_RESET, 0, "{kind}");
        assert_eq!(driver.used_index(), 1, "{kind}");
        // It cannot be given again while the device runs, nor changed.
        for (register, value) in [(VIRTIO_MMIO_QUEUE_READY, 1), (VIRTIO_MMIO_QUEUE_NUM, 8)] {
            driver.start(0);
            driver.take_back(0);
            driver.set(register, value);
            assert_eq!(driver.get(VIRTIO_MMIO_QUEUE_READY), 0, "{kind}");
            driver.expect_needs_reset(kind);
        }
    });
}

#[test]
fn a_reset_with_requests_in_flight_ends_them() {
    each(|device, kind| {
        let mut driver = Driver::new(device);
        for round in 0..50 {
            driver.start(0);
            for head in 0..8 {
                driver.chain(2 * head, &driver.any_chain());
                driver.offer(2 * head);
            }
            driver.notify();
            if round % 2 == 0 {
                driver.wait_used();
            }
            driver.reset();
            // From here on the memory is the driver's again.
            let before = driver.read(USED, 0x100);
            driver.pulses.take();
            std::thread::yield_now();
            assert_eq!(driver.read(USED, 0x100), before, "{kind}");
            assert_eq!(driver.pulses.take(), 0, "{kind}");
        }
        driver.start(0);
        driver.any_request();
    });
}

#[test]
fn stopping_is_idempotent_and_says_where_the_queues_stand() {
    each(|mut device, kind| {
        for mode in [StopMode::Cancel, StopMode::Drain] {
            let queues = device.stop(mode, Duration::ZERO);
            assert!(queues.is_some_and(|queues| queues.is_empty()), "{kind}");
        }
    });
    each(|device, _| drop(Driver::started(device, 0)));
}

/// Something a hostile driver does.
#[derive(Debug, Clone)]
enum Act {
    Register(u32, u32),
    Descriptor(u16, u64, u32, u16, u16),
    Offer(u16),
    AvailIndex(u16),
    Scribble(u64, Vec<u8>),
    Start,
    Notify,
}

fn act() -> impl Strategy<Value = Act> {
    let value = prop_oneof![0u32..32, any::<u32>()];
    let place = prop_oneof![
        Just(DESCRIPTORS),
        Just(AVAILABLE),
        Just(USED),
        Just(DATA),
        Just(SEAM - 9),
        Just(GAP - 9),
        Just(END - 9),
        any::<u64>(),
    ];
    let flags = prop_oneof![0u16..8, any::<u16>()];
    let len = prop_oneof![
        Just(1u32),
        Just(16),
        Just(21),
        Just(512),
        0u32..600,
        any::<u32>()
    ];
    // Requests, and the rings with their flags and event indices.
    let scribbled = prop_oneof![
        DATA..DATA + 0x200,
        AVAILABLE..AVAILABLE + 40,
        USED..USED + 140
    ];
    prop_oneof![
        2 => ((0u32..0x44).prop_map(|n| n * 4), value).prop_map(|(r, v)| Act::Register(r, v)),
        6 => (0u16..17, place, len, flags, 0u16..17)
            .prop_map(|(i, a, l, f, n)| Act::Descriptor(i, a, l, f, n)),
        4 => (0u16..17).prop_map(Act::Offer),
        1 => any::<u16>().prop_map(Act::AvailIndex),
        2 => (scribbled, proptest::collection::vec(0u8..16, 1..32))
            .prop_map(|(a, b)| Act::Scribble(a, b)),
        2 => Just(Act::Start),
        4 => Just(Act::Notify),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]
    /// Whatever a driver does, nothing panics, no thread is left in the way, and after a reset all is well.
    #[test]
    fn a_hostile_driver_is_survived(kind in 0..KINDS.len(), acts in proptest::collection::vec(act(), 1..60)) {
        let mut driver = Driver::started(device(KINDS[kind]), 0);
        for act in acts {
            match act {
                Act::Register(register, value) => driver.set(register, value),
                Act::Descriptor(index, address, len, flags, next) => {
                    driver.descriptor(index, address, len, flags, next);
                }
                Act::Offer(head) => driver.offer(head),
                Act::AvailIndex(index) => driver.set_avail_index(index),
                Act::Scribble(address, bytes) => driver.write(address, &bytes),
                Act::Start => driver.start(0),
                Act::Notify => driver.notify(),
            }
        }
        driver.start(0);
        driver.any_request();
    }
}

/// The descriptors of a request change all the time while it is looked at.
#[test]
fn rewrites_between_check_and_use_are_survived() {
    each(|device, _| {
        let mut driver = Driver::started(device, 0);
        let rewriter = {
            let mem = driver.mem.clone();
            let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
            let stopped = stop.clone();
            let thread = std::thread::spawn(move || {
                let mut n = 0u32;
                while !stopped.load(std::sync::atomic::Ordering::Relaxed) {
                    n = n.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    let len = [0, 16, 513, u32::MAX][n as usize >> 8 & 3];
                    let flags = (n >> 16 & 7) as u16;
                    let bytes =
                        u64::from(flags) << 32 | u64::from(len) | u64::from(n >> 20 & 31) << 48;
                    let at = DESCRIPTORS + 16 * u64::from(n >> 4 & 3) + 8;
                    vm_memory::Bytes::write_obj(&mem, bytes, vm_memory::GuestAddress(at)).unwrap();
                }
            });
            (stop, thread)
        };
        for round in 0..400 {
            driver.chain(0, &driver.any_chain());
            driver.offer(0);
            driver.notify();
            if driver.status() & NEEDS_RESET != 0 || round % 16 == 15 {
                driver.start(0);
            }
        }
        rewriter.0.store(true, std::sync::atomic::Ordering::Relaxed);
        rewriter.1.join().unwrap();
        driver.start(0);
        driver.any_request();
    });
}
