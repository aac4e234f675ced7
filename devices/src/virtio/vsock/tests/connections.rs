//! Connections in both directions, from their first packet to their last.

use super::*;
use crate::bus::BusDevice;
use crate::virtio::queue::Buffers;
use crate::virtio::vectored::Iovecs;
use crate::virtio::vsock::connection::Connection;
use crate::virtio::vsock::packet::{NO_RECEIVE, NO_SEND};
use rustix::net::{Shutdown, shutdown};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

#[test]
fn the_guest_reads_its_cid() {
    let mut guest = Guest::new();
    let mut cid = [0; 8];
    guest.driver.transport.read(
        virtio_bindings::virtio_mmio::VIRTIO_MMIO_CONFIG.into(),
        &mut cid,
    );
    assert_eq!(u64::from_le_bytes(cid), 3);
}

#[test]
fn a_program_of_the_host_connects_as_to_firecracker() {
    let mut guest = Guest::new();
    let mut stream = guest.accept(1234);
    assert_eq!(guest.header.dst_port, 1 << 30);
    stream.write_all(b"to the guest").unwrap();
    let (header, data) = guest.receive();
    assert_eq!((header.op, &data[..]), (op::RW, &b"to the guest"[..]));
    guest.send(op::RW, b"to the host");
    let mut bytes = [0; 11];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"to the host");
    // The next one has the next port.
    let _other = guest.accept(1234);
    assert_eq!(guest.header.dst_port, (1 << 30) + 1);
}

#[test]
fn the_reserved_connection_begins_when_it_is_used() {
    let mut guest = Guest::new();
    guest.driver.start(0);
    guest.free = (0..16).collect();
    guest.give(16);
    guest.expect_silence();
    let reserved = guest.sockets.1.take().unwrap();
    let mut stream = guest.accept_on(reserved, 1024);
    stream.write_all(b"now").unwrap();
    assert_eq!(guest.receive().1, b"now");
}

#[test]
fn the_guest_connects_to_a_socket_of_the_host() {
    let mut guest = Guest::new();
    let listener = guest.sockets.listen(52);
    let mut stream = guest.connect(&listener);
    for len in [1, 2, 4095, 65535, 65536] {
        let data = pattern(len, len);
        guest.send(op::RW, &data);
        let mut bytes = vec![0; len];
        stream.read_exact(&mut bytes).unwrap();
        assert!(bytes == data, "{len}");
        stream.write_all(&data).unwrap();
        assert!(guest.receive_data(len) == data, "{len}");
    }
}

#[test]
fn a_port_at_which_nothing_listens_resets() {
    let mut guest = Guest::new();
    guest.send(op::REQUEST, &[]);
    let reset = guest.expect(op::RST);
    assert_eq!((reset.src_port, reset.dst_port), (52, 1000));
    // And one of the guest, to which the program reads the end of its stream.
    let mut stream = guest.sockets.connect();
    stream.write_all(b"connect 7\n").unwrap();
    let request = guest.expect(op::REQUEST);
    guest.header = packet(op::RST, 0);
    (guest.header.src_port, guest.header.dst_port) = (7, request.src_port);
    guest.send(op::RST, &[]);
    expect_end(&mut stream);
}

/// Cloud Hypervisor #7195: partial lines.
#[test]
fn a_connect_line_may_come_in_pieces_and_with_data_behind_it() {
    let mut guest = Guest::new();
    let mut stream = guest.sockets.connect();
    for byte in b"Connect   8 \r\nearly" {
        stream.write_all(&[*byte]).unwrap();
        thread::yield_now();
    }
    let request = guest.expect(op::REQUEST);
    assert_eq!(request.dst_port, 8);
    guest.expect_silence();
    (guest.header.src_port, guest.header.dst_port) = (8, request.src_port);
    guest.send(op::RESPONSE, &[]);
    assert_eq!(guest.receive_data(5), b"early");
}

#[test]
fn a_malformed_connect_line_ends_the_stream() {
    let mut guest = Guest::new();
    let long = [b"CONNECT ", &[b' '; 40][..], b"1\n"].concat();
    for line in [
        &b"\n"[..],
        b"CONNECT\n",
        b"CONNECT x\n",
        b"CONNECT -1\n",
        b"CONNECT 4294967296\n",
        b"CONNECT 4294967295\n",
        b"GET / HTTP/1.1\r\n",
        b"CONNECT \xff\n",
        &long,
    ] {
        let mut stream = guest.sockets.connect();
        stream.write_all(line).unwrap();
        expect_end(&mut stream);
    }
    // One that says nothing, and one that goes in the middle of its line.
    drop(guest.sockets.connect());
    guest.sockets.connect().write_all(b"CONNECT 5").unwrap();
    guest.expect_silence();
    guest.accept(9);
}

/// Cloud Hypervisor #8372: the other direction goes on.
#[test]
fn the_host_closes_its_direction_first() {
    let mut guest = Guest::new();
    let listener = guest.sockets.listen(52);
    let mut stream = guest.connect(&listener);
    let data = pattern(20_000, 1);
    stream.write_all(&data).unwrap();
    shutdown(&stream, Shutdown::Write).unwrap();
    assert!(guest.receive_data(data.len()) == data);
    assert_eq!(guest.expect(op::SHUTDOWN).flags, NO_SEND);
    guest.send(op::RW, b"still here");
    let mut bytes = [0; 10];
    stream.read_exact(&mut bytes).unwrap();
    // Both have ended: the guest is to forget it.
    guest.shut_down(NO_SEND);
    assert_eq!(guest.expect(op::SHUTDOWN).flags, BOTH);
    expect_end(&mut stream);
    guest.send(op::RST, &[]);
    guest.expect_silence();
}

#[test]
fn the_guest_closes_its_direction_first() {
    let mut guest = Guest::new();
    let listener = guest.sockets.listen(52);
    let mut stream = guest.connect(&listener);
    let data = pattern(BUFFER_SIZE / 2, 2);
    guest.send(op::RW, &data);
    guest.shut_down(NO_SEND);
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    assert!(bytes == data);
    stream.write_all(b"still here").unwrap();
    drop(stream);
    assert_eq!(guest.receive_data(10), b"still here");
    loop {
        if guest.expect(op::SHUTDOWN).flags == BOTH {
            break;
        }
    }
}

#[test]
fn a_guest_that_reads_no_more_is_told_to_the_host() {
    let mut guest = Guest::new();
    let listener = guest.sockets.listen(52);
    let mut stream = guest.connect(&listener);
    guest.shut_down(NO_RECEIVE);
    assert_eq!(guest.expect(op::SHUTDOWN).flags, NO_SEND);
    wait("EPIPE", || stream.write(b"x").is_err());
    guest.send(op::RW, b"yes");
    let mut bytes = [0; 3];
    stream.read_exact(&mut bytes).unwrap();
}

/// What came before the guest closed is the host's, also where the host takes its time: the guest's side ends at once.
#[test]
fn nothing_is_lost_of_a_closed_connection() {
    let mut guest = Guest::new();
    let listener = guest.sockets.listen(52);
    let mut stream = guest.connect(&listener);
    let sent = guest.close_with_data();
    // The ports are free again.
    let _other = guest.connect(&listener);
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    assert!(bytes == sent, "{} of {}", bytes.len(), sent.len());
}

#[test]
fn the_guest_hears_no_more_of_a_connection_that_it_closed() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let mut connection = Connection::from_guest(ours, &packet(op::REQUEST, 0));
    connection.on_events(EventSet::HANG_UP);
    let mut next = || connection.next_packet(&Buffers::default(), &mut Iovecs::default());
    assert_eq!(next(), Some((op::RESPONSE, 0, 0)));
    assert_eq!(next(), Some((op::SHUTDOWN, NO_RECEIVE, 0)));
    connection.detach();
    assert!(!connection.has_packet());
}

/// Firecracker #2464: a program that is gone, with data for it, is no signal.
#[test]
fn a_program_that_is_gone_is_told_to_the_guest() {
    let mut guest = Guest::new();
    let listener = guest.sockets.listen(52);
    let stream = guest.connect(&listener);
    let chunk = pattern(BUFFER_SIZE / 2, 3);
    guest.send(op::RW, &chunk);
    guest.send(op::RW, &chunk);
    drop(stream);
    let mut flags = 0;
    while flags != BOTH {
        let (header, _) = guest.receive();
        assert!([op::SHUTDOWN, op::CREDIT_UPDATE].contains(&header.op));
        flags = header.flags.max(flags);
    }
    // What the guest has sent meanwhile goes nowhere.
    guest.send(op::RW, b"late");
    guest.send(op::RST, &[]);
    // A new one may have the same ports.
    let _again = guest.connect(&listener);
}

/// Firecracker #6077 and #6031: neither a stream whose program is gone nor one whose guest has no credit is an event without end.
#[test]
fn what_cannot_go_on_wakes_nobody() {
    let sockets = Sockets::new();
    let listener = sockets.listen(52);
    let mut muxer = Muxer::new(Some(sockets.side())).unwrap();
    muxer.start(CID.into(), false);
    let wakes = Epoll::new().unwrap();
    let event = EpollEvent::new(EventSet::IN, 0);
    wakes.ctl(ControlOperation::Add, muxer.fd(), event).unwrap();
    let is_awake = || wakes.wait(50, &mut [event]).unwrap() > 0;
    let mut streams = Vec::new();
    for src_port in 0..2 {
        let request = Header {
            src_port,
            buf_alloc: 0,
            ..packet(op::REQUEST, 0)
        };
        muxer.receive(&request, &Buffers::default());
        streams.push(listener.accept().unwrap().0);
    }
    streams.pop();
    streams[0].write_all(b"for a guest without room").unwrap();
    assert!(is_awake());
    while muxer.poll().unwrap() {}
    assert!(!is_awake());
    streams[0].write_all(b"more").unwrap();
    assert!(is_awake());
}

#[test]
fn many_connections_do_not_mix() {
    let mut guest = Guest::new();
    let listener = guest.sockets.listen(52);
    let mut streams = Vec::new();
    for port in 0..64 {
        guest.header = packet(op::RW, 0);
        guest.header.src_port = port;
        guest.send(op::REQUEST, &[]);
        guest.expect(op::RESPONSE);
        streams.push(listener.accept().unwrap().0);
    }
    for (port, stream) in (0u32..).zip(&mut streams) {
        guest.header.src_port = port;
        let data = pattern(1000, port as usize);
        guest.send(op::RW, &data);
        let mut bytes = vec![0; 1000];
        stream.read_exact(&mut bytes).unwrap();
        assert!(bytes == data, "{port}");
    }
    for (port, stream) in streams.iter_mut().enumerate() {
        stream.write_all(&pattern(1000, port + 7)).unwrap();
    }
    let mut seen = [false; 64];
    for _ in 0..64 {
        let (header, data) = guest.receive();
        let port = header.dst_port as usize;
        assert!(header.op == op::RW && data == pattern(1000, port + 7));
        assert_eq!(header.fwd_cnt, 1000, "of this one alone");
        assert!(!std::mem::replace(&mut seen[port], true));
    }
}

#[test]
fn connections_survive_a_pause_and_end_with_a_reset() {
    let mut guest = Guest::new();
    let mut stream = guest.accept(1);
    for round in 0..3 {
        assert!(guest.driver.transport.pause(Duration::from_secs(20)));
        stream.write_all(&[round]).unwrap();
        assert!(guest.driver.transport.resume());
        assert_eq!(guest.receive_data(1), [round]);
    }
    guest.driver.reset();
    expect_end(&mut stream);
    guest.driver.start(0);
    guest.driver.queue = EVENT;
    assert_eq!(guest.driver.used_index(), 0, "nothing was restored");
}

/// § 5.10.6.6: after a restore the driver learns that its connections are gone, and what it sends for them is reset. New ones begin
/// when it has learnt it.
#[test]
fn a_restore_resets_all_connections() {
    let mut guest = Guest::new();
    let mut stream = guest.accept(1);
    let give_event = |guest: &mut Guest, head: u16| {
        guest.driver.queue = EVENT;
        let at = DATA + 0x4000 + 8 * u64::from(head);
        guest.driver.chain(head, &[(at, 4, WRITE)]);
        guest.driver.write(at, &[0xff; 4]);
        guest.driver.offer(head);
    };
    // As many as Linux gives.
    (0..8).for_each(|head| give_event(&mut guest, head));
    let sockets = Sockets::new();
    let listener = sockets.listen(52);
    guest.driver.restore(|| sockets.device());
    expect_end(&mut stream);
    guest.sockets = sockets;
    let mut stream = guest.sockets.connect();
    stream.write_all(b"CONNECT 2\n").unwrap();
    assert!(guest.driver.transport.resume());
    guest.send(op::RW, b"to nobody");
    guest.expect(op::RST);
    guest.driver.queue = EVENT;
    assert_eq!(guest.driver.wait_used(), (0, 4));
    assert_eq!(guest.driver.read(DATA + 0x4000, 4), [0; 4]);
    guest.header = packet(op::RW, 0);
    guest.send(op::REQUEST, &[]);
    let _accepted = listener.accept().unwrap();
    guest.expect_silence();
    give_event(&mut guest, 0);
    guest.driver.notify();
    let mut ops = [guest.receive().0, guest.receive().0].map(|header| header.op);
    ops.sort_unstable();
    assert_eq!(ops, [op::REQUEST, op::RESPONSE]);
    // Once, and the buffers are still there.
    assert!(guest.driver.transport.pause(Duration::from_secs(20)));
    assert!(guest.driver.transport.resume());
    guest.driver.queue = EVENT;
    assert_eq!(guest.driver.used_index(), guest.driver.used_so_far());
    guest.driver.restore(|| Sockets::new().device());
    assert!(guest.driver.transport.resume());
    assert_eq!(guest.driver.wait_used(), (1, 4));
}

/// One that gives no buffers for events, or does not handle them.
#[test]
fn a_restored_driver_may_ignore_events() {
    let mut guest = Guest::new();
    // The guest may still have a socket whose other end has this port.
    let _stream = guest.accept(1);
    let port = guest.header.dst_port;
    let sockets = Sockets::new();
    guest.driver.restore(|| sockets.device());
    guest.sockets = sockets;
    assert!(guest.driver.transport.resume());
    let _stream = guest.accept(2);
    assert_eq!(guest.header.dst_port, port + 1);
}

#[test]
fn the_guest_keeps_its_cid_when_it_is_restored() {
    let sockets = Sockets::new();
    let device = |cid| -> Box<dyn VirtioDevice> {
        Box::new(Vsock::new(None, cid, &ThreadStarter::default()).unwrap())
    };
    let mut driver = Driver::started(sockets.device(), 0);
    driver.restore(|| device(77));
    let mut cid = [0; 8];
    let config = virtio_bindings::virtio_mmio::VIRTIO_MMIO_CONFIG.into();
    driver.transport.read(config, &mut cid);
    assert_eq!(u64::from_le_bytes(cid), 3);
    let mut bad = Vsock::new(None, 3, &ThreadStarter::default()).unwrap();
    // As version 1 had it.
    bad.restore(&to_record(1, 77).unwrap()).unwrap();
    assert_eq!(bad.shared.cid(), 77);
    for cid in [0, 2, u32::MAX] {
        let saved = Saved { cid, last_port: 0 };
        let record = to_record(STATE_VERSION, saved).unwrap();
        let error = bad.restore(&record).unwrap_err().to_string();
        assert!(error.contains("context ID"), "{error}");
    }
}
