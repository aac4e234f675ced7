//! Frames that the host refuses, or cannot hand over.

use std::net::UdpSocket;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use vm_memory::VolatileSlice;

use super::*;
use crate::virtio::net::link::MAX_LOST;

/// One whose csum_start is beyond its end, say.
#[test]
fn a_frame_that_the_host_refuses_is_lost() {
    let mut driver = Driver::new(device(Link::packets(
        vec![UnixDatagram::unbound().unwrap().into()],
        Some(note_offloads),
    )));
    start(&mut driver, 0);
    for _ in 0..3 {
        send(&mut driver, &pattern(100, 0));
        assert!(is_up(&mut driver));
    }
}

/// One of which Linux's tun_put_user knows no header, say.
#[test]
fn a_frame_that_the_host_cannot_hand_over_is_lost() {
    let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
    let ours = UdpSocket::bind("127.0.0.1:0").unwrap();
    let (address, to) = (ours.local_addr().unwrap(), peer.local_addr().unwrap());
    ours.connect(to).unwrap();
    drop(peer);
    // Nothing listens there: the next read fails, and the one after that does not.
    ours.send(&[0]).unwrap();
    let mut driver = Driver::new(device(Link::packets(vec![ours.into()], None)));
    start(&mut driver, 0);
    offer(&mut driver, 0..2, 0x1_0000);
    let peer = UdpSocket::bind(to).unwrap();
    peer.send_to(&[9; HEADER_LEN + 60], address).unwrap();
    assert_eq!(received(&mut driver).1, [9; 60]);
    assert!(is_up(&mut driver));
}

#[test]
fn a_packet_device_that_always_fails_keeps_no_thread_busy() {
    let flags = SocketFlags::empty();
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
    let mut link = Link::packets(vec![socket], None).unwrap();
    let mut buffer = [0; 100];
    let mut receive = || {
        let buffers = [VolatileSlice::from(&mut buffer[..])].into_iter();
        link.receive(0, buffers, 0).unwrap()
    };
    for _ in 0..2 {
        let lost = (0..).take_while(|_| receive() == Some(0)).count();
        assert_eq!(lost, MAX_LOST as usize - 1);
    }
}
