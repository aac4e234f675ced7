//! Packets that break rules, and guests and programs of the host that want too much.

use super::*;
use crate::virtio::vsock::connection::Connection;
use crate::virtio::vsock::muxer::{MAX_CONNECTIONS, MAX_HALF_OPEN};
use crate::virtio::vsock::packet::NO_PORT;

#[test]
fn what_is_not_a_packet_of_this_guest_is_reset() {
    let mut guest = Guest::new();
    let _listener = guest.sockets.listen(52);
    let valid = packet(op::REQUEST, 0);
    for header in [
        Header {
            src_cid: 4,
            ..valid
        },
        Header {
            src_cid: 3 | 1 << 32,
            ..valid
        },
        Header {
            dst_cid: 1,
            ..valid
        },
        Header {
            dst_cid: 2 | 1 << 63,
            ..valid
        },
        Header { kind: 2, ..valid },
        Header { kind: 0, ..valid },
        Header { op: 0, ..valid },
        Header { op: 8, ..valid },
        Header {
            op: u16::MAX,
            ..valid
        },
        Header {
            src_port: NO_PORT,
            ..valid
        },
        Header {
            op: op::RW,
            ..valid
        },
        Header {
            op: op::RESPONSE,
            ..valid
        },
        Header {
            op: op::SHUTDOWN,
            flags: u32::MAX,
            ..valid
        },
        Header {
            op: op::CREDIT_REQUEST,
            ..valid
        },
    ] {
        guest.send_packet(&header, &[]);
        let reset = guest.expect(op::RST);
        assert_eq!(
            (reset.src_cid, reset.dst_cid),
            (header.dst_cid, header.src_cid)
        );
        assert_eq!(
            (reset.src_port, reset.dst_port),
            (header.dst_port, header.src_port)
        );
        assert_eq!(reset.kind, header.kind);
    }
    // A reset is answered by nothing.
    guest.send(op::RST, &[]);
    guest.expect_silence();
}

/// CVE-2019-18960, and packets that say more than they have.
#[test]
fn lengths_are_checked() {
    let mut guest = Guest::new();
    let listener = guest.sockets.listen(52);
    for (len, payload) in [(1, 0), (5, 4), (u32::MAX, 4), (BUFFER_SIZE as u32 + 1, 4)] {
        let mut stream = guest.connect(&listener);
        let header = Header {
            len,
            ..guest.header
        };
        guest.send_packet(&header, &pattern(payload, 0));
        guest.expect(op::RST);
        expect_end(&mut stream);
    }
    // No header at all.
    guest.driver.queue = TRANSMIT;
    for len in [1, 43] {
        assert_eq!(guest.driver.request(&[(DATA, len, 0)]), 0);
    }
    guest.expect_silence();
    // More than it says: the rest is not sent.
    let mut stream = guest.connect(&listener);
    let header = Header {
        len: 2,
        ..guest.header
    };
    guest.send_packet(&header, b"yes no");
    guest.send(op::RW, b"!");
    let mut bytes = [0; 3];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"ye!");
}

#[test]
fn operations_out_of_place_reset_the_connection() {
    let mut guest = Guest::new();
    let listener = guest.sockets.listen(52);
    for op in [op::REQUEST, op::RESPONSE, 0, 8] {
        let mut stream = guest.connect(&listener);
        guest.send(op, &[]);
        guest.expect(op::RST);
        expect_end(&mut stream);
    }
    // Before it has accepted.
    for op in [op::RW, op::SHUTDOWN, op::CREDIT_UPDATE] {
        let mut stream = guest.sockets.connect();
        stream.write_all(b"CONNECT 5\n").unwrap();
        let request = guest.expect(op::REQUEST);
        guest.header = packet(op, 0);
        (guest.header.src_port, guest.header.dst_port) = (5, request.src_port);
        guest.send(op, &[]);
        guest.expect(op::RST);
        expect_end(&mut stream);
    }
    // After it has said that it sends no more.
    let mut stream = guest.connect(&listener);
    guest.shut_down(2);
    guest.send(op::RW, b"x");
    guest.expect(op::RST);
    expect_end(&mut stream);
}

/// Descriptors without bound, by source port.
#[test]
fn a_guest_has_so_many_connections() {
    let mut guest = Guest::new();
    let listener = guest.sockets.listen(52);
    // Those that it has closed, and of which the host's programs have not read everything, go first, the oldest before others.
    let mut closed = [(); 2].map(|()| (guest.connect(&listener), guest.close_with_data()));
    let mut kept = Vec::new();
    let mut refused = 0;
    for port in 0..MAX_CONNECTIONS as u32 + 10 {
        guest.header = packet(op::RW, 0);
        guest.header.src_port = port;
        guest.send(op::REQUEST, &[]);
        match guest.receive().0.op {
            op::RESPONSE if kept.len() == MAX_CONNECTIONS - 2 => {
                kept.push(listener.accept().unwrap());
                let is_whole = closed.each_mut().map(|(stream, sent)| {
                    let mut bytes = Vec::new();
                    stream.read_to_end(&mut bytes).unwrap();
                    bytes == *sent
                });
                assert_eq!(is_whole, [false, true]);
            }
            op::RESPONSE => kept.push(listener.accept().unwrap()),
            op => {
                assert_eq!(op, op::RST);
                refused += 1;
            }
        }
    }
    assert_eq!((kept.len(), refused), (MAX_CONNECTIONS, 10));
    // Each that ends makes room.
    kept.pop();
    guest.header.src_port = MAX_CONNECTIONS as u32 - 1;
    loop {
        if guest.receive().0.flags == 3 {
            break;
        }
    }
    guest.send(op::RST, &[]);
    guest.connect(&listener);
}

/// Programs that say nothing keep others out for a while only, and do not use up the connections.
#[test]
fn half_open_connections_are_bounded() {
    let mut guest = Guest::new();
    let listener = guest.sockets.listen(52);
    let mut silent: Vec<_> = (0..MAX_HALF_OPEN)
        .map(|_| guest.sockets.connect())
        .collect();
    thread::sleep(Duration::from_millis(20));
    let mut late = guest.sockets.connect();
    late.write_all(b"CONNECT 5\n").unwrap();
    guest.expect_silence();
    let _other = guest.connect(&listener);
    silent.pop();
    assert_eq!(guest.expect(op::REQUEST).dst_port, 5);
}

#[test]
fn who_does_not_answer_in_time_is_given_up() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let mut connection = Connection::from_host(ours);
    let greeting = connection.deadline.unwrap();
    connection.request();
    let request = connection.deadline.unwrap();
    assert!(request < greeting);
    // The guest that does not accept: its program reads the end, and a reset follows.
    let mut guest = Guest::new();
    let mut stream = guest.sockets.connect();
    stream.write_all(b"CONNECT 5\n").unwrap();
    guest.expect(op::REQUEST);
    expect_end(&mut stream);
    guest.expect(op::RST);
}

/// A guest that sends without taking answers has to take them at last, and nothing grows meanwhile.
#[test]
fn resets_that_nobody_takes_are_bounded() {
    let mut guest = Guest::new();
    for _ in 0..16 {
        guest.send(op::RW, b"x");
        guest.take();
    }
    guest.driver.queue = TRANSMIT;
    guest.driver.write(DATA, &packet(op::RW, 0).bytes());
    let mut done = 0;
    for _ in 0..1000 {
        guest.driver.chain(0, &[(DATA, HEADER_LEN as u32, 0)]);
        guest.driver.offer(0);
        guest.driver.notify();
        let limit = std::time::Instant::now() + Duration::from_millis(200);
        while guest.driver.used_index() == guest.driver.used_so_far() {
            if std::time::Instant::now() > limit {
                break;
            }
        }
        if guest.driver.used_index() == guest.driver.used_so_far() {
            break;
        }
        guest.driver.wait_used();
        done += 1;
    }
    assert_eq!(done, 256);
    guest.give(16);
    for _ in 0..257 {
        guest.expect(op::RST);
    }
    guest.driver.queue = TRANSMIT;
    guest.driver.wait_used();
}

/// The header changes while it is looked at: what was checked is what is used.
#[test]
fn rewrites_of_a_header_are_survived() {
    let mut guest = Guest::new();
    let listener = guest.sockets.listen(52);
    let stream = guest.connect(&listener);
    guest.driver.write(DATA, &guest.header.bytes());
    let mem = guest.driver.mem.clone();
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let rewriter = thread::spawn(move || {
        let mut n = 0u32;
        while !stopped.load(std::sync::atomic::Ordering::Relaxed) {
            n = n.wrapping_add(1);
            let len = [0, 1, 4000, u32::MAX][n as usize % 4];
            let at = vm_memory::GuestAddress(DATA + 24);
            vm_memory::Bytes::write_obj(&mem, len, at).unwrap();
        }
    });
    for _ in 0..2000 {
        guest.driver.queue = TRANSMIT;
        let buffers = [(DATA, HEADER_LEN as u32 + 4000, 0)];
        assert_eq!(guest.driver.request(&buffers), 0);
        guest.driver.queue = RECEIVE;
        while guest.driver.used_index() != guest.driver.used_so_far() {
            guest.receive();
            guest.driver.queue = RECEIVE;
        }
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    rewriter.join().unwrap();
    drop(stream);
    guest.driver.start(0);
    guest.free = (0..16).collect();
    guest.give(16);
    guest.accept(1);
}
