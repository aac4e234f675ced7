//! Credit (§ 5.10.6.3): no side sends what the other has no room for, and none waits for ever.

use super::*;
use crate::virtio::vsock::packet::NO_SEND;

/// Firecracker #1751 and libkrun #772: streams stalled at 64 to 240 KiB.
#[test]
fn long_streams_go_both_ways_through_full_buffers() {
    let mut guest = Guest::new();
    let listener = guest.sockets.listen(52);
    let stream = guest.connect(&listener);
    let total = 8 * BUFFER_SIZE;
    // An echo that is slow to begin.
    let echo = thread::spawn(move || {
        let (mut from, mut to) = (&stream, &stream);
        let mut buffer = vec![0; 10_000];
        let mut count = 0;
        while count < total {
            thread::sleep(Duration::from_micros(200));
            let n = from.read(&mut buffer).unwrap();
            to.write_all(&buffer[..n]).unwrap();
            count += n;
        }
        stream
    });
    let data = pattern(total, 4);
    let (mut sent, mut forwarded, mut got) = (0, 0, Vec::<u8>::new());
    while got.len() < total {
        let free = BUFFER_SIZE - (sent - forwarded);
        let len = free.min(30_001).min(total - sent);
        if len > 0 {
            guest.send(op::RW, &data[sent..sent + len]);
            sent += len;
            guest.driver.queue = RECEIVE;
            if guest.driver.used_index() == guest.driver.used_so_far() {
                continue;
            }
        }
        let (header, payload) = guest.receive();
        assert!(
            [op::RW, op::CREDIT_UPDATE].contains(&header.op),
            "{header:?}"
        );
        forwarded = header.fwd_cnt as usize;
        assert!(forwarded <= sent);
        got.extend(&payload);
        guest.header.fwd_cnt += header.len;
        if !payload.is_empty() {
            guest.send(op::CREDIT_UPDATE, &[]);
        }
    }
    assert!(got == data);
    echo.join().unwrap();
}

/// The guest is asked once, and gets no more than it has room for.
#[test]
fn the_guests_credit_is_kept_to() {
    let mut guest = Guest::new();
    let listener = guest.sockets.listen(52);
    let mut stream = guest.connect(&listener);
    guest.header.buf_alloc = 5000;
    guest.send(op::CREDIT_UPDATE, &[]);
    let data = pattern(30_000, 5);
    stream.write_all(&data).unwrap();
    let mut got = Vec::new();
    while got.len() < data.len() {
        let (header, payload) = guest.receive();
        match header.op {
            op::RW => got.extend(payload),
            op => {
                assert_eq!(op, op::CREDIT_REQUEST);
                guest.expect_silence();
                let in_flight = got.len() - guest.header.fwd_cnt as usize;
                assert_eq!(in_flight, 5000, "nothing less");
                guest.header.fwd_cnt = got.len() as u32;
                guest.send(op::CREDIT_UPDATE, &[]);
            }
        }
        let in_flight = got.len() - guest.header.fwd_cnt as usize;
        assert!(in_flight <= 5000, "{in_flight}");
    }
    assert!(got == data);
    // fwd_cnt beyond what was sent, and a buffer that shrinks, are no credit.
    for (buf_alloc, more) in [(5000, 1), (0, 0)] {
        guest.header.buf_alloc = buf_alloc;
        guest.header.fwd_cnt = got.len() as u32 + more;
        guest.send(op::CREDIT_UPDATE, &[]);
        stream.write_all(b"x").unwrap();
        guest.driver.queue = RECEIVE;
        thread::sleep(Duration::from_millis(20));
        while guest.driver.used_index() != guest.driver.used_so_far() {
            guest.expect(op::CREDIT_REQUEST);
        }
    }
}

#[test]
fn credit_is_told_when_it_is_asked_for() {
    let mut guest = Guest::new();
    let listener = guest.sockets.listen(52);
    let mut stream = guest.connect(&listener);
    guest.send(op::RW, &pattern(1000, 6));
    stream.read_exact(&mut [0; 1000]).unwrap();
    guest.expect_silence();
    guest.send(op::CREDIT_REQUEST, &[]);
    let update = guest.expect(op::CREDIT_UPDATE);
    assert_eq!(
        (update.fwd_cnt, update.buf_alloc as usize),
        (1000, BUFFER_SIZE)
    );
}

/// The host sends no more, but takes more than its buffer.
#[test]
fn credit_is_told_after_the_hosts_direction_is_closed() {
    let mut guest = Guest::new();
    let listener = guest.sockets.listen(52);
    let mut stream = guest.connect(&listener);
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(guest.expect(op::SHUTDOWN).flags, NO_SEND);
    let data = pattern(8 * BUFFER_SIZE, 9);
    let expected = data.clone();
    let host = thread::spawn(move || {
        let mut got = vec![0; expected.len()];
        stream.read_exact(&mut got).unwrap();
        assert!(got == expected);
    });
    let (mut sent, mut forwarded) = (0, 0);
    for chunk in data.chunks(BUFFER_SIZE / 4) {
        while sent + chunk.len() > forwarded + BUFFER_SIZE {
            forwarded = guest.expect(op::CREDIT_UPDATE).fwd_cnt as usize;
        }
        guest.send(op::RW, chunk);
        sent += chunk.len();
    }
    host.join().unwrap();
}

/// A guest that sends more than there is room for loses its connection, and the host what was too much.
#[test]
fn a_guest_cannot_send_without_credit() {
    let mut guest = Guest::new();
    let listener = guest.sockets.listen(52);
    let _stream = guest.connect(&listener);
    let chunk = pattern(BUFFER_SIZE / 2, 7);
    for _ in 0..64 {
        guest.send(op::RW, &chunk);
        guest.driver.queue = RECEIVE;
        while guest.driver.used_index() != guest.driver.used_so_far() {
            if guest.receive().0.op == op::RST {
                return;
            }
        }
    }
    panic!("it takes without end");
}

/// Firecracker #6031: a guest without receive buffers costs nothing, and loses nothing.
#[test]
fn what_comes_without_a_buffer_waits() {
    let mut guest = Guest::new();
    let listener = guest.sockets.listen(52);
    let mut stream = guest.connect(&listener);
    let data = pattern(16 * ROOM, 8);
    stream.write_all(&data).unwrap();
    let mut got = Vec::new();
    for _ in 0..16 {
        got.extend(guest.take().1);
    }
    stream.write_all(b"more").unwrap();
    stream.write_all(b" and more").unwrap();
    guest.expect_silence();
    guest.give(16);
    while got.len() < data.len() + 13 {
        got.extend(guest.receive().1);
    }
    assert!(got == [&data[..], b"more and more"].concat());
}
