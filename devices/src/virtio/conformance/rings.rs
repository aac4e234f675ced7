//! Rings as they should be: requests, bursts, indirect tables, stops and resets.

use super::*;

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
            assert_eq!(driver.wait_used(), (2 * head, driver.answer));
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
        driver.descriptor_in(table, 1, SEAM - 10, driver.answer, WRITE, 7);
        // The write flag of a descriptor that refers to a table says nothing (§ 2.7.5.3.2).
        driver.descriptor(3, table, 48, INDIRECT | WRITE, 9);
        driver.offer(3);
        driver.notify();
        assert_eq!(driver.wait_used(), (3, driver.answer));
        // A direct descriptor may come before a table.
        driver.descriptor(0, header, 10, NEXT, 1);
        driver.descriptor(1, table, 32, INDIRECT, 0);
        driver.descriptor_in(table, 0, header + 10, 6, NEXT, 1);
        driver.offer(0);
        driver.notify();
        assert_eq!(driver.wait_used(), (0, driver.answer));
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
        assert_eq!(
            (driver.wait_used(), driver.wait_used()),
            ((0, driver.answer), (0, driver.answer))
        );
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
