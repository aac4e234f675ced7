use std::io::{ErrorKind, Read, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_INT_CONFIG};
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INTERRUPT_STATUS};
use virtio_bindings::virtio_net::{VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6};

use super::link::{HEADER_LEN, MAX_FRAME, NUM_BUFFERS};
use super::*;
use crate::bus::BusDevice;
use crate::state::Suspend;
use crate::virtio::testing::{DATA, Driver, HIGH, WRITE, wait};

mod lost;
mod multiqueue;

const OPTIONS: NetOptions = NetOptions {
    mac: [2, 0, 0, 0, 0, 7],
    mtu: Some(65520),
    pairs: 1,
};
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;

fn device(link: io::Result<Link>) -> Box<dyn VirtioDevice> {
    with_pairs(link, 1)
}

fn with_pairs(link: io::Result<Link>, pairs: u16) -> Box<dyn VirtioDevice> {
    let link = Arc::new(Mutex::new(link.unwrap()));
    let options = NetOptions { pairs, ..OPTIONS };
    Box::new(Net::new(link, options, &ThreadStarter::default()).unwrap())
}

/// A device to which its network sends frames without end, each of which fills a request of the conformance suite.
pub(in crate::virtio) fn fed(pairs: u16) -> Box<dyn VirtioDevice> {
    let (ours, mut peer) = UnixStream::pair().unwrap();
    thread::spawn(move || while peer.write_all(&framed(&[b'x'; 9])).is_ok() {});
    with_pairs(Link::stream(ours.into()), pairs)
}

fn framed(frame: &[u8]) -> Vec<u8> {
    [&(frame.len() as u32).to_be_bytes(), frame].concat()
}

/// Bytes that tell where they belong.
fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + i / 251 + seed) as u8).collect()
}

fn start(driver: &mut Driver, without: u64) {
    driver.size = 64;
    driver.queues = 0..2;
    driver.start(without);
}

fn stream(without: u64) -> (Driver, UnixStream) {
    let (ours, peer) = UnixStream::pair().unwrap();
    let mut driver = Driver::new(device(Link::stream(ours.into())));
    start(&mut driver, without);
    (driver, peer)
}

/// A packet device, as which a socket for datagrams will do.
fn packets(without: u64) -> (Driver, UnixDatagram) {
    let (ours, peer) = UnixDatagram::pair().unwrap();
    let mut driver = Driver::new(device(Link::packets(
        vec![ours.into()],
        Some(note_offloads),
    )));
    start(&mut driver, without);
    (driver, peer)
}

static NOTED: Mutex<Vec<u64>> = Mutex::new(Vec::new());

fn note_offloads(_: BorrowedFd<'_>, features: u64) -> io::Result<()> {
    NOTED.lock().unwrap().push(features & OFFLOADS);
    Ok(())
}

/// Where the receive buffer of this head is.
fn buffer(head: u16) -> u64 {
    HIGH + 0x1_0000 * u64::from(head)
}

fn offer(driver: &mut Driver, heads: std::ops::Range<u16>, len: u32) {
    driver.queue = RECEIVE;
    for head in heads {
        driver.chain(head, &[(buffer(head), len, WRITE)]);
        driver.offer(head);
    }
    driver.notify();
}

/// Waits for a frame; gives its header and its bytes.
#[track_caller]
fn received(driver: &mut Driver) -> (Vec<u8>, Vec<u8>) {
    driver.queue = RECEIVE;
    let (head, len) = driver.wait_used();
    let mut bytes = driver.read(buffer(head as u16), len as usize);
    let more = u16::from_le_bytes([bytes[NUM_BUFFERS], bytes[NUM_BUFFERS + 1]]) - 1;
    for _ in 0..more {
        // The driver sees all of them at once.
        assert_ne!(driver.used_index(), driver.used_so_far());
        let (head, len) = driver.wait_used();
        bytes.extend(driver.read(buffer(head as u16), len as usize));
    }
    let frame = bytes.split_off(HEADER_LEN);
    (bytes, frame)
}

/// Has a frame sent, in two buffers.
fn send(driver: &mut Driver, frame: &[u8]) {
    driver.queue = TRANSMIT;
    driver.write(DATA, &[0; HEADER_LEN]);
    driver.write(HIGH, frame);
    let buffers = [(DATA, HEADER_LEN as u32, 0), (HIGH, frame.len() as u32, 0)];
    assert_eq!(driver.request(&buffers), 0);
}

fn config(driver: &mut Driver) -> [u8; 12] {
    let mut space = [0; 12];
    driver.transport.read(VIRTIO_MMIO_CONFIG.into(), &mut space);
    space
}

fn is_up(driver: &mut Driver) -> bool {
    config(driver)[6] == 1
}

#[track_caller]
fn expect_down(driver: &mut Driver) {
    wait("the link's end", || !is_up(driver));
    wait("an interrupt", || {
        driver.get(VIRTIO_MMIO_INTERRUPT_STATUS) & VIRTIO_MMIO_INT_CONFIG != 0
    });
    // What is sent goes nowhere, and comes back.
    send(driver, &pattern(100, 0));
}

fn read_frame(peer: &mut UnixStream) -> Vec<u8> {
    let mut word = [0; 4];
    peer.read_exact(&mut word).unwrap();
    let mut frame = vec![0; u32::from_be_bytes(word) as usize];
    peer.read_exact(&mut frame).unwrap();
    frame
}

#[test]
fn the_driver_reads_address_status_and_mtu() {
    let (mut driver, _peer) = stream(0);
    let expected = [2, 0, 0, 0, 0, 7, 1, 0, 1, 0, 0xf0, 0xff];
    assert_eq!(config(&mut driver), expected);
    let offered = driver.offered();
    assert_eq!(offered & OFFLOADS, 0, "a stream has no header for them");
    for feature in [
        VIRTIO_NET_F_MAC,
        VIRTIO_NET_F_STATUS,
        VIRTIO_NET_F_MTU,
        VIRTIO_NET_F_MRG_RXBUF,
    ] {
        assert_ne!(offered & 1 << feature, 0, "{feature}");
    }
}

#[test]
fn frames_of_a_stream_go_both_ways() {
    for without in [0, MERGEABLE] {
        let (mut driver, mut peer) = stream(without);
        offer(&mut driver, 0..8, 0x1_0000);
        for (seed, len) in [1, 14, 60, 1514, 9000, 65534 - 14].into_iter().enumerate() {
            let frame = pattern(len, seed);
            peer.write_all(&framed(&frame)).unwrap();
            let (header, got) = received(&mut driver);
            assert!(got == frame, "{len}");
            assert_eq!(header, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
        }
        for len in [14, 60, 1514, 65520 + 14] {
            let frame = pattern(len, len);
            thread::scope(|scope| {
                let reader = scope.spawn(|| read_frame(&mut peer));
                send(&mut driver, &frame);
                assert!(reader.join().unwrap() == frame, "{len}");
            });
        }
    }
}

#[test]
fn a_frame_that_comes_in_pieces_is_one() {
    let (mut driver, mut peer) = stream(0);
    offer(&mut driver, 0..4, 100);
    let frame = pattern(300, 1);
    let bytes = [framed(&frame), framed(&frame[..50])].concat();
    for byte in bytes {
        peer.write_all(&[byte]).unwrap();
        thread::yield_now();
    }
    let (header, got) = received(&mut driver);
    assert_eq!((header[NUM_BUFFERS], got), (4, frame.clone()));
    offer(&mut driver, 0..1, 100);
    assert_eq!(received(&mut driver).1, &frame[..50]);
}

type SendFrame = Box<dyn FnMut(&[u8]) + Send>;

/// CVE-2020-16843: reception stopped when queue and network were both full.
#[test]
fn reception_goes_on_after_both_ends_were_full() {
    for link in ["stream", "packets"] {
        let frames = 200;
        let fill = |mut send: SendFrame| {
            thread::spawn(move || (0..frames).for_each(|seed| send(&pattern(2000, seed))))
        };
        let (mut driver, writer) = if link == "stream" {
            let (driver, mut peer) = stream(0);
            let send = move |frame: &[u8]| peer.write_all(&framed(frame)).unwrap();
            (driver, fill(Box::new(send)))
        } else {
            let (driver, peer) = packets(0);
            let send = move |frame: &[u8]| {
                let packet = [&[0; HEADER_LEN], frame].concat();
                assert_eq!(peer.send(&packet).unwrap(), packet.len());
            };
            (driver, fill(Box::new(send)))
        };
        // As many as a driver has that gives half a ring.
        offer(&mut driver, 0..32, 256);
        for seed in 0..frames {
            // The last notification may have come long before.
            if seed % 50 == 0 {
                thread::sleep(Duration::from_millis(5));
            }
            let got = received(&mut driver).1;
            assert!(got == pattern(2000, seed), "{link} {seed}");
            let next = seed as u16 * 8 % 32;
            offer(&mut driver, next..next + 8, 256);
        }
        writer.join().unwrap();
    }
}

#[test]
fn a_frame_without_room_is_dropped_and_the_next_is_not() {
    let (mut driver, mut peer) = stream(MERGEABLE);
    offer(&mut driver, 0..2, 1530);
    let long = pattern(9000, 1);
    peer.write_all(&[framed(&long), framed(&[7; 60])].concat())
        .unwrap();
    assert_eq!(received(&mut driver).1, [7; 60]);
    let (mut driver, peer) = packets(MERGEABLE);
    offer(&mut driver, 0..2, 1530);
    for len in [1519, 1518] {
        peer.send(&[0; HEADER_LEN + 2000][..HEADER_LEN + len])
            .unwrap();
    }
    assert_eq!(received(&mut driver).1.len(), 1518, "it just fits");
    assert_eq!(driver.used_index(), 1);
}

#[test]
fn impossible_lengths_end_the_link() {
    for word in [0, MAX_FRAME as u32 + 1, u32::MAX] {
        let (mut driver, mut peer) = stream(0);
        offer(&mut driver, 0..2, 100);
        peer.write_all(&word.to_be_bytes()).unwrap();
        expect_down(&mut driver);
        assert_eq!(driver.used_so_far(), 1, "{word}");
    }
}

#[test]
fn a_peer_that_goes_takes_the_link_down() {
    let (mut driver, peer) = stream(0);
    offer(&mut driver, 0..2, 100);
    assert!(is_up(&mut driver));
    drop(peer);
    expect_down(&mut driver);
    // A reset does not bring it back.
    start(&mut driver, 0);
    assert!(!is_up(&mut driver));
    // Amid a frame that it does not take.
    let (mut driver, peer) = stream(0);
    driver.queue = TRANSMIT;
    for head in 0..32 {
        driver.chain(2 * head, &[(DATA, 12, 0), (HIGH, 60000, 0)]);
        driver.offer(2 * head);
    }
    driver.notify();
    driver.wait_used();
    drop(peer);
    (1..32).for_each(|_| _ = driver.wait_used());
    assert!(!is_up(&mut driver));
}

#[test]
fn a_slow_peer_gets_every_frame_whole() {
    let (mut driver, mut peer) = stream(0);
    driver.queue = TRANSMIT;
    driver.write(DATA, &[0; HEADER_LEN]);
    let frame = pattern(60000, 3);
    driver.write(HIGH, &frame);
    for head in 0..32 {
        driver.chain(
            2 * head,
            &[(DATA, 12, 0), (HIGH, 60000 - u32::from(head), 0)],
        );
        driver.offer(2 * head);
    }
    driver.notify();
    // It is full by now: nothing else is sent until this side reads.
    driver.wait_used();
    for head in 0..32 {
        // A VM that is saved and goes on, amid a frame.
        assert!(driver.transport.pause(Duration::from_secs(20)));
        assert!(driver.transport.resume());
        assert!(read_frame(&mut peer) == frame[..60000 - head], "{head}");
    }
    (1..32).for_each(|_| _ = driver.wait_used());
    peer.set_nonblocking(true).unwrap();
    let nothing = peer.read(&mut [0]).unwrap_err();
    assert_eq!(nothing.kind(), ErrorKind::WouldBlock);
}

#[test]
fn a_reset_amid_a_frame_keeps_the_stream_in_step() {
    let (mut driver, mut peer) = stream(0);
    for cut in [2, 4, 5, 300] {
        offer(&mut driver, 0..8, 100);
        let (first, second) = (framed(&pattern(400, 1)), framed(&pattern(70, cut)));
        peer.write_all(&first[..cut]).unwrap();
        thread::sleep(Duration::from_millis(10));
        start(&mut driver, 0);
        offer(&mut driver, 0..8, 100);
        peer.write_all(&[&first[cut..], &second].concat()).unwrap();
        // The first is lost, unless it had not begun.
        let mut got = received(&mut driver).1;
        if got.len() == 400 {
            got = received(&mut driver).1;
        }
        assert_eq!(got, pattern(70, cut), "{cut}");
        start(&mut driver, 0);
    }
}

#[test]
fn packets_have_the_headers_of_the_device() {
    let (mut driver, peer) = packets(0);
    offer(&mut driver, 0..64, 2048);
    let header = [1, 1, 54, 0, 0xd4, 5, 34, 0, 16, 0, 0, 0];
    let frame = pattern(60000, 5);
    peer.send(&[&header[..], &frame].concat()).unwrap();
    let (got_header, got) = received(&mut driver);
    assert_eq!(got_header[..NUM_BUFFERS], header[..NUM_BUFFERS]);
    assert_eq!(got_header[NUM_BUFFERS], 30, "of 2 KiB");
    assert!(got == frame);
    driver.queue = TRANSMIT;
    driver.write(DATA, &header);
    driver.request(&[(DATA, 12, 0), (buffer(0) + 12, 2000, 0)]);
    let mut packet = [0; 3000];
    assert_eq!(peer.recv(&mut packet).unwrap(), 2012);
    assert_eq!(
        (&packet[..12], &packet[12..2012]),
        (&header[..], &frame[..2000])
    );
}

#[test]
fn frames_that_no_network_carries_are_dropped() {
    let (mut driver, peer) = packets(0);
    peer.set_nonblocking(true).unwrap();
    driver.queue = TRANSMIT;
    for len in [0, 1, 12, 25, 12 + MAX_FRAME as u32 + 1, 0x20_0000] {
        driver.request(&[(HIGH, len, 0)]);
        assert!(peer.recv(&mut [0; 16]).is_err(), "{len}");
    }
    driver.request(&[(HIGH, 26, 0)]);
    assert_eq!(peer.recv(&mut [0; 100]).unwrap(), 26);
}

#[test]
fn the_packet_device_learns_what_the_driver_accepts() {
    let tso = 1 << VIRTIO_NET_F_GUEST_TSO4 | 1 << VIRTIO_NET_F_GUEST_TSO6;
    for without in [0, tso, OFFLOADS] {
        let (mut driver, _peer) = packets(without);
        // Its answer comes when the worker has started.
        offer(&mut driver, 0..1, 2048);
        let accepted = OFFLOADS & !without;
        wait("the offloads", || NOTED.lock().unwrap().contains(&accepted));
    }
}

#[test]
fn a_receive_buffer_without_room_needs_a_reset() {
    for len in [1, 11] {
        let (mut driver, mut peer) = stream(0);
        peer.write_all(&framed(&[1; 60])).unwrap();
        offer(&mut driver, 0..1, len);
        wait("DEVICE_NEEDS_RESET", || driver.status() & 64 != 0);
    }
}

#[test]
fn a_driver_goes_on_without_a_network() {
    let (mut driver, _peer) = packets(0);
    offer(&mut driver, 0..2, 100);
    let offered = driver.offered();
    driver.restore(|| {
        let link = Arc::new(Mutex::new(Link::unplugged(true).unwrap()));
        let any = NetOptions {
            mtu: Some(u16::MAX),
            ..OPTIONS
        };
        Box::new(Net::new(link, any, &ThreadStarter::default()).unwrap())
    });
    assert!(driver.transport.resume());
    assert_eq!(driver.offered(), offered);
    expect_down(&mut driver);
    assert_eq!(config(&mut driver)[10..], [0xf0, 0xff], "the MTU of before");
    // Nor does a reset bring one.
    start(&mut driver, 0);
    assert!(!is_up(&mut driver));
    send(&mut driver, &pattern(100, 0));
}

#[test]
fn a_restored_driver_sees_the_link_go_down_and_up() {
    let (mut driver, _peer) = stream(0);
    let (ours, mut peer) = UnixStream::pair().unwrap();
    let link = Link::stream(ours.into()).unwrap();
    let known = Arc::clone(link.status());
    offer(&mut driver, 0..2, 100);
    let other = NetOptions {
        mac: [2, 9, 9, 9, 9, 9],
        ..OPTIONS
    };
    driver.restore(|| {
        let link = Arc::new(Mutex::new(link));
        Box::new(Net::new(link, other, &ThreadStarter::default()).unwrap())
    });
    assert!(driver.transport.resume());
    for up in [false, true] {
        let told = driver.get(VIRTIO_MMIO_INTERRUPT_STATUS);
        assert_ne!(told & VIRTIO_MMIO_INT_CONFIG, 0);
        driver.set(VIRTIO_MMIO_INTERRUPT_ACK, told);
        assert_eq!(config(&mut driver)[..7], [2, 0, 0, 0, 0, 7, u8::from(up)]);
    }
    wait("the link's use", || known.first_up.get().is_some());
    assert!(known.first_received.get().is_none());
    // The buffers that it had offered are still there.
    peer.write_all(&framed(&[3; 60])).unwrap();
    assert_eq!(received(&mut driver).1, [3; 60]);
    assert!(known.first_sent.get().is_none());
    send(&mut driver, &pattern(100, 0));
    let times = [&known.first_up, &known.first_received, &known.first_sent];
    let times = times.map(|time| *time.get().unwrap());
    assert!(times.is_sorted());
}
