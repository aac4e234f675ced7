//! Several queues, many requests in flight, stops and resets.

use super::*;

#[test]
fn every_queue_works_alone_and_with_the_others() {
    for engine in ENGINES {
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(&pattern()).unwrap();
        let mut driver = multi_queue(&file, engine, ReadWrite, MAX_QUEUES);
        let mut config = [0; 2];
        driver.transport.read(0x100 + 34, &mut config);
        assert_eq!(u16::from_le_bytes(config), MAX_QUEUES);
        let round = |driver: &mut Driver, queues: &[u16]| {
            for queue in queues {
                driver.queue = *queue;
                let at = BUFFER + 512 * u64::from(*queue);
                driver.write(at, &[0; 512]);
                submit(driver, VIRTIO_BLK_T_IN, u64::from(*queue), (at, 512, WRITE));
            }
            for queue in queues {
                driver.queue = *queue;
                assert_eq!(status(driver), OK);
                let at = 512 * usize::from(*queue);
                assert_eq!(
                    driver.read(BUFFER + at as u64, 512),
                    pattern()[at..at + 512]
                );
            }
        };
        let all: Vec<u16> = (0..MAX_QUEUES).collect();
        for _ in 0..20 {
            round(&mut driver, &all);
        }
        // One is taken back; the others go on from where they stand.
        driver.take_back(3);
        let others: Vec<u16> = all.iter().copied().filter(|queue| *queue != 3).collect();
        for _ in 0..20 {
            round(&mut driver, &others);
        }
        driver.queue = 3;
        let before = driver.used_index();
        driver.offer(0);
        driver.notify();
        // Again with fewer queues than there are, and a reset under requests of all.
        for queues in [2, MAX_QUEUES] {
            driver.queues = 0..queues;
            driver.start(0);
            round(&mut driver, &all[..queues.into()]);
        }
        assert_eq!(before, 20);
        for queue in all {
            driver.queue = queue;
            submit(&mut driver, VIRTIO_BLK_T_IN, 0, (BUFFER, 512, WRITE));
        }
        driver.reset();
        let before: Vec<u16> = (0..MAX_QUEUES)
            .map(|queue| used_of(&mut driver, queue))
            .collect();
        std::thread::yield_now();
        let after: Vec<u16> = (0..MAX_QUEUES)
            .map(|queue| used_of(&mut driver, queue))
            .collect();
        assert_eq!(before, after);
        driver.start(0);
        driver.any_request();
    }
}

fn used_of(driver: &mut Driver, queue: u16) -> u16 {
    driver.queue = queue;
    driver.used_index()
}

#[test]
fn a_fault_in_one_queue_stops_all() {
    for engine in ENGINES {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let mut driver = multi_queue(&file, engine, ReadWrite, 2);
        driver.queue = 1;
        driver.offer(999);
        driver.notify();
        driver.expect_needs_reset("a bad head in queue 1");
    }
}

#[test]
fn many_requests_are_in_flight_at_once() {
    const COUNT: u16 = 60;
    for engine in ENGINES {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let disk = Disk::open(file.path(), ReadWrite).unwrap();
        let mut driver = Driver::new(block(disk, engine));
        driver.size = 256;
        driver.start(0);
        let buffer = |place: u16| HIGH + 0x2000 * u64::from(place);
        for round in 0..20u8 {
            // Writes, with a flush among them and what fails; then reads of what was written.
            for kind in [VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_IN] {
                for place in 0..COUNT {
                    let is_write = kind == VIRTIO_BLK_T_OUT;
                    let sector = u64::from(place) * 8;
                    let value = if is_write { round ^ place as u8 } else { 0xff };
                    driver.write(buffer(place), &[value; 4096]);
                    let flags = if is_write { 0 } else { WRITE };
                    match place % 10 {
                        7 => put(&mut driver, place, VIRTIO_BLK_T_FLUSH, 0, &[]),
                        8 => put(
                            &mut driver,
                            place,
                            kind,
                            1 << 40,
                            &[(buffer(place), 512, flags)],
                        ),
                        _ => {
                            let (first, second) = (
                                (buffer(place), 1000, flags),
                                (buffer(place) + 1000, 3096, flags),
                            );
                            put(&mut driver, place, kind, sector, &[first, second]);
                        }
                    }
                }
                driver.notify();
                let mut done = [false; COUNT as usize];
                for _ in 0..COUNT {
                    let (head, len) = driver.wait_used();
                    let place = head as u16 / 4;
                    assert!(
                        !std::mem::replace(&mut done[usize::from(place)], true),
                        "{head} twice"
                    );
                    let status = driver.read(space(&driver, place) + 16, 1)[0];
                    let (wanted, moved) = match place % 10 {
                        7 => (OK, 0),
                        8 => (IOERR, 0),
                        _ if kind == VIRTIO_BLK_T_IN => (OK, 4096),
                        _ => (OK, 0),
                    };
                    assert_eq!((status, len), (wanted, moved + 1), "{place}");
                    if moved > 0 {
                        assert_eq!(
                            driver.read(buffer(place), 4096),
                            [round ^ place as u8; 4096]
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn as_many_requests_as_the_queue_has_entries_are_in_flight_at_once() {
    const COUNT: u16 = 256;
    for engine in ENGINES {
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(&pattern()).unwrap();
        let disk = Disk::open(file.path(), ReadWrite).unwrap();
        let mut driver = Driver::new(block(disk, engine));
        driver.size = COUNT;
        driver.start(0);
        // An indirect table each, so that they take one entry each.
        let place = |head: u16| HIGH + 0x1000 * u64::from(head);
        for head in 0..COUNT {
            let (table, sector) = (place(head), u64::from(head) % SECTORS);
            driver.write(table + 0x100, &header(VIRTIO_BLK_T_IN, sector));
            driver.descriptor_in(table, 0, table + 0x100, 16, NEXT, 1);
            driver.descriptor_in(table, 1, table + 0x200, 512, NEXT | WRITE, 2);
            driver.descriptor_in(table, 2, table + 0x400, 1, WRITE, 0);
            driver.descriptor(head, table, 3 * 16, INDIRECT, 0);
            driver.offer(head);
        }
        driver.notify();
        for _ in 0..COUNT {
            assert_eq!(driver.wait_used().1, 513);
        }
        for head in 0..COUNT {
            let at = usize::from(head) % SECTORS as usize * 512;
            assert_eq!(
                driver.read(place(head) + 0x200, 512),
                pattern()[at..at + 512]
            );
            assert_eq!(driver.read(place(head) + 0x400, 1), [OK]);
        }
    }
}

#[test]
fn a_head_in_flight_cannot_be_made_available_again() {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let mut driver = multi_queue(&file, Engine::IoUring, ReadWrite, 1);
    put(&mut driver, 0, VIRTIO_BLK_T_IN, 0, &[(BUFFER, 512, WRITE)]);
    driver.offer(0);
    driver.notify();
    driver.expect_needs_reset("a head twice");
}

#[test]
fn after_a_reset_the_memory_is_the_drivers_again() {
    for engine in ENGINES {
        let file = cold_file(8 << 20);
        let mut driver = multi_queue(&file, engine, ReadWrite, 1);
        for round in 0..8 {
            driver.start(0);
            driver.write(HIGH, &[0; 0x40_0000]);
            for place in 0..4 {
                let at = HIGH + 0x10_0000 * u64::from(place);
                put(
                    &mut driver,
                    place,
                    VIRTIO_BLK_T_IN,
                    2048 * round,
                    &[(at, 0x10_0000, WRITE)],
                );
            }
            driver.notify();
            if round % 2 == 0 {
                driver.wait_used();
            }
            driver.reset();
            driver.write(HIGH, &[0x5a; 0x40_0000]);
            std::thread::sleep(std::time::Duration::from_millis(5));
            assert!(
                driver
                    .read(HIGH, 0x40_0000)
                    .iter()
                    .all(|byte| *byte == 0x5a)
            );
        }
    }
}

#[test]
fn a_stop_loses_no_request_and_does_none_twice() {
    for engine in ENGINES {
        let file = cold_file(8 << 20);
        let mut driver = multi_queue(&file, engine, ReadWrite, 2);
        for round in 0..4u16 {
            driver.start(0);
            for place in 0..4 {
                let (at, sector) = (
                    HIGH + 0x10_0000 * u64::from(place),
                    2048 * u64::from(round * 4 + place) % 16384,
                );
                put(
                    &mut driver,
                    place,
                    VIRTIO_BLK_T_IN,
                    sector,
                    &[(at, 0x10_0000, WRITE)],
                );
            }
            driver.notify();
            // Taking one queue back stops the device and starts it again with the other.
            driver.take_back(1);
            let mut heads: Vec<u32> = (0..4).map(|_| driver.wait_used().0).collect();
            heads.sort_unstable();
            assert_eq!(heads, [0, 4, 8, 12]);
            driver.any_request();
            assert_eq!(driver.used_index(), 5);
        }
    }
}
