//! Registers, features, status and queue set-up.

use super::*;

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
        assert_eq!(driver.wait_used(), (0, driver.answer));
        // A flood of them does nothing.
        for _ in 0..10_000 {
            driver.notify();
        }
        driver.any_request();
    });
}

#[test]
fn a_busy_queue_gets_an_ioeventfd_once() {
    each(|mut device, kind| {
        let workers = device.workers();
        let queues = (0..8).filter(|queue| QueueWorker::notifier(workers, *queue).is_some());
        let queues = queues.count();
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
        let registered = std::mem::take(&mut *registered.lock().unwrap());
        let Some((_, event)) = registered.into_iter().find(|(queue, _)| *queue == 0) else {
            return;
        };
        // From now on the hypervisor notifies, after a reset as well.
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
