//! Whatever packets a guest sends and whatever programs of the host do, the socket device works after a reset, and each packet that
//! it sends is whole.
#![no_main]

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use minivmm_devices::thread::ThreadStarter;
use minivmm_devices::virtio::testing::{DATA, Driver, HIGH, NEEDS_RESET, WRITE, wait};
use minivmm_devices::virtio::vsock::{HostSide, Vsock};

/// A 32-bit number, most often one that means something.
#[derive(Debug, Clone, Copy, Arbitrary)]
enum Number {
    Small(u8),
    /// A port that a program of the host has.
    HostPort(u8),
    Any(u32),
}

impl Number {
    fn value(self) -> u32 {
        match self {
            Self::Small(value) => value.into(),
            Self::HostPort(value) => (1 << 30) + u32::from(value % 8),
            Self::Any(value) => value,
        }
    }
}

#[derive(Debug, Arbitrary)]
enum Act {
    Packet {
        cids: Option<(u64, u64)>,
        /// src_port, dst_port, len, flags, buf_alloc and fwd_cnt.
        words: [Number; 6],
        kind: Option<u16>,
        op: u8,
        payload: u16,
    },
    /// So many bytes of room for a packet.
    Buffer(u16),
    Connect(Vec<u8>),
    Write(u8, u16),
    Read(u8),
    Close(u8),
}

fuzz_target!(|acts: Vec<Act>| {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let name = format!(
        "minivmm-fuzz-{}-{}",
        std::process::id(),
        COUNT.fetch_add(1, Ordering::Relaxed)
    );
    let address = SocketAddr::from_abstract_name(name).unwrap();
    let listener = UnixListener::bind_addr(&address).unwrap();
    listener.set_nonblocking(true).unwrap();
    let streams = Arc::new(Mutex::new(VecDeque::new()));
    let accepted = Arc::clone(&streams);
    let connect = Box::new(move |port| {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        theirs.set_nonblocking(true)?;
        if port % 4 == 3 {
            return Err(std::io::ErrorKind::ConnectionRefused.into());
        }
        accepted.lock().unwrap().push_back(theirs);
        Ok(ours)
    });
    // As that of minivmm run to the image's first process.
    let (reserved, mut waiting) = UnixStream::pair().unwrap();
    reserved.set_nonblocking(true).unwrap();
    waiting.write_all(b"CONNECT 5\n").unwrap();
    let host = HostSide {
        listener,
        connect: Some(connect),
        reserved: Some(reserved),
    };
    let device = Vsock::new(Some(host), 3, &ThreadStarter::default()).unwrap();
    let mut driver = Driver::new(Box::new(device));
    driver.queues = 0..3;
    driver.start(0);
    for act in acts.into_iter().take(64) {
        match act {
            Act::Packet {
                cids,
                words,
                kind,
                op,
                payload,
            } => {
                let (from, to) = cids.unwrap_or((3, 2));
                let [src, dst, len, flags, room, done] = words.map(Number::value);
                let mut bytes = Vec::new();
                for cid in [from, to] {
                    bytes.extend(cid.to_le_bytes());
                }
                let types = u32::from(kind.unwrap_or(1)) | u32::from(op % 9) << 16;
                for word in [src, dst, len, types, flags, room, done] {
                    bytes.extend(word.to_le_bytes());
                }
                driver.queue = 1;
                driver.write(DATA, &bytes);
                driver.chain(0, &[(DATA, 44, 0), (HIGH, payload.into(), 0)]);
                driver.offer(0);
                driver.notify();
            }
            Act::Buffer(room) => {
                driver.queue = 0;
                driver.chain(
                    4,
                    &[
                        (HIGH + 0x2_0000, 44, WRITE),
                        (HIGH + 0x3_0000, room.into(), WRITE),
                    ],
                );
                driver.offer(4);
                driver.notify();
                if driver.used_index() != driver.used_so_far() {
                    let (_, written) = driver.wait_used();
                    let len = driver.read(HIGH + 0x2_0000 + 24, 4);
                    let len = u32::from_le_bytes(len.try_into().unwrap());
                    // The next packet may be in the same buffer already.
                    assert!((44..=44 + u32::from(room).max(len)).contains(&written));
                }
            }
            Act::Connect(line) => {
                if let Ok(mut stream) = UnixStream::connect_addr(&address) {
                    stream.set_nonblocking(true).unwrap();
                    let _ = stream.write(b"CONNECT ");
                    let _ = stream.write(&line);
                    streams.lock().unwrap().push_back(stream);
                }
            }
            Act::Write(index, len) => {
                if let Some(stream) = streams.lock().unwrap().get_mut(usize::from(index)) {
                    let _ = stream.write(&vec![b'x'; len.into()]);
                }
            }
            Act::Read(index) => {
                if let Some(stream) = streams.lock().unwrap().get_mut(usize::from(index)) {
                    let _ = stream.read(&mut [0; 4096]);
                }
            }
            Act::Close(index) => drop(streams.lock().unwrap().remove(usize::from(index))),
        }
    }
    driver.queue = 0;
    driver.start(0);
    assert_eq!(driver.status() & NEEDS_RESET, 0);
    driver.queue = 1;
    let mut reset = vec![0; 44];
    (reset[0], reset[8], reset[28], reset[30]) = (3, 2, 1, 5);
    driver.write(DATA, &reset);
    assert_eq!(driver.request(&[(DATA, 44, 0)]), 0);
    driver.queue = 0;
    driver.chain(0, &[(DATA, 44, WRITE)]);
    driver.offer(0);
    driver.notify();
    wait("a reset", || driver.used_index() == 1);
    assert_eq!(driver.read(DATA + 30, 1), [3]);
});
