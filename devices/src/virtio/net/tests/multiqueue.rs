//! A device with two pairs of queues.

use super::*;

/// Behind two pairs.
const CONTROL: u16 = 4;
/// Two of them hold any frame.
const LONGEST: u32 = 0x1_0000;

fn two_pairs() -> (Box<dyn VirtioDevice>, [UnixDatagram; 2]) {
    let (first, peer) = UnixDatagram::pair().unwrap();
    let (second, other) = UnixDatagram::pair().unwrap();
    let link = Link::packets(vec![first.into(), second.into()], Some(note_offloads));
    (with_pairs(link, 2), [peer, other])
}

/// Both pairs, with buffers to receive, and the control queue.
fn start(driver: &mut Driver) {
    driver.size = 64;
    driver.queues = 0..5;
    driver.start(0);
    for (queue, heads) in [(0, 0..8), (2, 8..16)] {
        driver.queue = queue;
        for head in heads {
            driver.chain(head, &[(buffer(head), LONGEST, WRITE)]);
            driver.offer(head);
        }
        driver.notify();
    }
}

/// Gives a command to a control queue; says what the answer is.
fn command(driver: &mut Driver, queue: u16, bytes: &[u8]) -> u8 {
    driver.queue = queue;
    driver.write(DATA, bytes);
    driver.write(DATA + 64, &[0xee]);
    let len = bytes.len() as u32;
    assert_eq!(driver.request(&[(DATA, len, 0), (DATA + 64, 1, WRITE)]), 1);
    driver.read(DATA + 64, 1)[0]
}

/// The network's frame comes in this queue.
#[track_caller]
fn expect_frame(driver: &mut Driver, peer: &UnixDatagram, queue: u16) {
    peer.send(&[7; 12 + 60]).unwrap();
    driver.queue = queue;
    let (head, len) = driver.wait_used();
    assert_eq!(len, 72);
    assert_eq!(driver.read(buffer(head as u16) + 12, 60), [7; 60]);
    driver.offer(head as u16);
    driver.notify();
}

#[test]
fn the_driver_says_how_many_pairs_it_uses() {
    let (device, peers) = two_pairs();
    let mut driver = Driver::new(device);
    start(&mut driver);
    assert_eq!(config(&mut driver)[8..10], [2, 0]);
    // Until it has said so, one, to which all comes.
    for peer in &peers {
        expect_frame(&mut driver, peer, 0);
    }
    let refused: [&[u8]; 9] = [
        &[4, 0, 0, 0],
        &[4, 0, 3, 0],
        &[4, 0, 2, 1],
        &[4, 1, 2, 0],
        &[0, 0, 2, 0],
        &[4, 0, 2],
        &[4, 0, 2, 0, 0],
        &[4],
        &[255; 4],
    ];
    for bytes in refused {
        assert_eq!(command(&mut driver, CONTROL, bytes), 1, "{bytes:?}");
        expect_frame(&mut driver, &peers[1], 0);
    }
    assert_eq!(command(&mut driver, CONTROL, &[4, 0, 2, 0]), 0);
    for (peer, queue) in [(&peers[0], 0), (&peers[1], 2), (&peers[1], 2)] {
        expect_frame(&mut driver, peer, queue);
    }
    // And what it sends goes out by the same.
    for (queue, peer) in [(1, &peers[0]), (3, &peers[1])] {
        driver.queue = queue;
        driver.write(DATA, &[0; 12 + 60]);
        assert_eq!(driver.request(&[(DATA, 72, 0)]), 0);
        assert_eq!(peer.recv(&mut [0; 100]).unwrap(), 72);
    }
    // Buffers that a queue has and does not need are the driver's again after a reset, which begins with one pair.
    assert_eq!(command(&mut driver, CONTROL, &[4, 0, 1, 0]), 0);
    expect_frame(&mut driver, &peers[1], 0);
    start(&mut driver);
    expect_frame(&mut driver, &peers[1], 0);
}

#[test]
fn a_restored_driver_uses_as_many_pairs() {
    let (device, _peers) = two_pairs();
    let mut driver = Driver::new(device);
    start(&mut driver);
    assert_eq!(command(&mut driver, CONTROL, &[4, 0, 2, 0]), 0);
    let (device, peers) = two_pairs();
    driver.restore(|| device);
    assert!(driver.transport.resume());
    expect_frame(&mut driver, &peers[1], 2);
    expect_frame(&mut driver, &peers[0], 0);
}

#[test]
fn pairs_that_it_does_not_have_are_not_restored() {
    let (mut device, _peers) = two_pairs();
    for (pairs, fits) in [(0, false), (1, true), (2, true), (3, false)] {
        let saved = Saved {
            mac: OPTIONS.mac,
            mtu: None,
            pairs,
        };
        let record = to_record(STATE_VERSION, saved).unwrap();
        assert_eq!(device.restore(&record).is_ok(), fits, "{pairs}");
    }
}

/// § 5.1.2: its control queue is behind that.
#[test]
fn a_driver_may_know_one_pair_only() {
    let (device, peers) = two_pairs();
    let mut driver = Driver::new(device);
    driver.size = 64;
    driver.queues = 0..3;
    driver.start(1 << VIRTIO_NET_F_MQ);
    assert_eq!(command(&mut driver, 2, &[0, 0, 1, 0]), 1);
    offer(&mut driver, 0..8, LONGEST);
    for peer in &peers {
        expect_frame(&mut driver, peer, 0);
    }
}

#[test]
fn a_command_without_room_for_an_answer_needs_a_reset() {
    let (device, _peers) = two_pairs();
    let mut driver = Driver::new(device);
    start(&mut driver);
    driver.queue = CONTROL;
    driver.write(DATA, &[4, 0, 2, 0]);
    driver.chain(0, &[(DATA, 4, 0)]);
    driver.offer(0);
    driver.notify();
    wait("DEVICE_NEEDS_RESET", || driver.status() & 64 != 0);
}

/// Linux waits for its commands without end, and a TAP interface may be deleted while its guest runs.
#[test]
fn commands_are_answered_when_the_packet_device_is_gone() {
    let queues = [(); 2].map(|()| UnixDatagram::unbound().unwrap().into());
    let is_gone: SetOffloads = |_, _| Err(io::Error::from_raw_os_error(libc::EBADFD));
    let link = Link::packets(queues.into(), Some(is_gone));
    let mut driver = Driver::new(with_pairs(link, 2));
    for _ in 0..2 {
        start(&mut driver);
        assert_eq!(command(&mut driver, CONTROL, &[4, 0, 2, 0]), 0);
        assert!(!is_up(&mut driver));
        send(&mut driver, &pattern(100, 0));
    }
}
