mod connections;
mod credit;
mod hostile;

use std::cell::RefCell;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use tempfile::TempDir;

use super::connection::BUFFER_SIZE;
use super::packet::{BOTH, HEADER_LEN, HOST_CID, Header, STREAM, op};
use super::serve::{RECEIVE, TRANSMIT};
use super::*;
use crate::state::Suspend;
use crate::virtio::testing::{DATA, Driver, HIGH, WRITE, wait};

const CID: u32 = 3;
const EVENT: u16 = 2;

/// Bytes of a receive buffer's payload, as Linux has them.
const ROOM: usize = 4096;

/// The host's sockets, in a directory of their own; and its end of the reserved connection.
struct Sockets(TempDir, RefCell<Option<UnixStream>>);

impl Sockets {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap(), RefCell::default())
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("v")
    }

    fn side(&self) -> HostSide {
        let path = self.path();
        _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let connect_to = move |port| -> io::Result<UnixStream> {
            let address = SocketAddrUnix::new(path.with_extension(u32::to_string(&port)))?;
            let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
            let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
            connect(&socket, &address)?;
            Ok(socket.into())
        };
        let (ours, theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        self.1.replace(Some(ours));
        HostSide {
            listener,
            connect: Some(Box::new(connect_to)),
            reserved: Some(theirs),
        }
    }

    fn device(&self) -> Box<dyn VirtioDevice> {
        let threads = ThreadStarter::default();
        Box::new(Vsock::new(Some(self.side()), CID, &threads).unwrap())
    }

    /// What the guest reaches at this port.
    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.path().with_extension(port.to_string())).unwrap()
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.path()).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        stream
    }
}

/// A device for which programs of the host ask for connections without end: each request is a header.
pub(in crate::virtio) fn fed() -> Box<dyn VirtioDevice> {
    let sockets = Sockets::new();
    let device = sockets.device();
    thread::spawn(move || {
        let mut kept = std::collections::VecDeque::new();
        while let Ok(mut stream) = UnixStream::connect(sockets.path()) {
            // A reset of the device may have closed it already: the next one is for the driver after that.
            if stream.write_all(b"CONNECT 1\n").is_err() {
                continue;
            }
            kept.push_back(stream);
            if kept.len() > 16 {
                kept.pop_front();
                thread::sleep(Duration::from_micros(50));
            }
        }
    });
    device
}

/// A guest's driver, with as many receive buffers as it has been given.
struct Guest {
    driver: Driver,
    sockets: Sockets,
    /// The connection that [`Guest::send`] is for.
    header: Header,
    /// Heads of receive buffers that are free.
    free: Vec<u16>,
}

fn packet(op: u16, len: usize) -> Header {
    Header {
        src_cid: CID.into(),
        dst_cid: HOST_CID,
        src_port: 1000,
        dst_port: 52,
        len: len as u32,
        kind: STREAM,
        op,
        flags: 0,
        buf_alloc: 256 << 10,
        fwd_cnt: 0,
    }
}

/// Bytes that tell where they belong.
fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + i / 251 + seed) as u8).collect()
}

impl Guest {
    /// With 16 receive buffers.
    fn new() -> Self {
        let sockets = Sockets::new();
        let mut driver = Driver::new(sockets.device());
        driver.size = 64;
        driver.queues = 0..3;
        driver.start(0);
        let mut guest = Self {
            driver,
            sockets,
            header: packet(op::RW, 0),
            free: (0..16).collect(),
        };
        guest.give(16);
        guest
    }

    fn buffer(head: u16) -> u64 {
        HIGH + 0x2000 * u64::from(head)
    }

    /// Gives so many receive buffers: of two descriptors, as drivers had them before Linux 6.3, of one as since then, and of several that
    /// do not end where the header does (Firecracker #5485).
    fn give(&mut self, count: usize) {
        self.driver.queue = RECEIVE;
        for head in self.free.drain(..count) {
            let (header, room) = (HEADER_LEN as u32, ROOM as u32);
            let lengths: &[u32] = match head % 3 {
                0 => &[header, room],
                1 => &[header + room],
                _ => &[10, header - 3, 7, room - 14],
            };
            let mut at = Self::buffer(head);
            let piece = |len: &u32| {
                at += u64::from(*len);
                (at - u64::from(*len), *len, WRITE)
            };
            let buffers: Vec<_> = lengths.iter().map(piece).collect();
            self.driver.chain(4 * head, &buffers);
            self.driver.offer(4 * head);
        }
        self.driver.notify();
    }

    /// The next packet and its payload; the buffer is given again.
    #[track_caller]
    fn receive(&mut self) -> (Header, Vec<u8>) {
        let got = self.take();
        self.give(1);
        got
    }

    /// The same, and the buffer is kept.
    #[track_caller]
    fn take(&mut self) -> (Header, Vec<u8>) {
        self.driver.queue = RECEIVE;
        let (head, len) = self.driver.wait_used();
        let head = head as u16 / 4;
        self.free.push(head);
        let bytes = self.driver.read(Self::buffer(head), len as usize);
        let (header, payload) = bytes.split_first_chunk().unwrap();
        let header = Header::parse(header);
        assert_eq!(header.len as usize, payload.len());
        (header, payload.to_vec())
    }

    /// The next packet, which is to be of this kind.
    #[track_caller]
    fn expect(&mut self, op: u16) -> Header {
        let (header, _) = self.receive();
        assert_eq!(header.op, op, "{header:?}");
        header
    }

    /// No packet comes, as far as one can see in a moment.
    #[track_caller]
    fn expect_silence(&mut self) {
        thread::sleep(Duration::from_millis(20));
        self.driver.queue = RECEIVE;
        assert_eq!(self.driver.used_index(), self.driver.used_so_far());
    }

    /// Sends a packet, in one descriptor as Linux from 6.3 on or in two.
    fn send_packet(&mut self, header: &Header, payload: &[u8]) {
        self.driver.queue = TRANSMIT;
        self.driver
            .write(DATA, &[&header.bytes(), payload].concat());
        let (first, rest) = (HEADER_LEN as u32, payload.len() as u32);
        let buffers = match header.len % 2 {
            0 => vec![(DATA, first + rest, 0)],
            _ => vec![(DATA, first, 0), (DATA + u64::from(first), rest, 0)],
        };
        assert_eq!(self.driver.request(&buffers), 0);
    }

    fn send(&mut self, op: u16, payload: &[u8]) {
        let header = Header {
            op,
            len: payload.len() as u32,
            ..self.header
        };
        self.send_packet(&header, payload);
    }

    fn shut_down(&mut self, flags: u32) {
        let header = Header {
            op: op::SHUTDOWN,
            flags,
            ..self.header
        };
        self.send_packet(&header, &[]);
    }

    /// A connection that a program of the host has asked for, and what it reads.
    fn accept(&mut self, port: u32) -> UnixStream {
        let stream = self.sockets.connect();
        self.accept_on(stream, port)
    }

    /// The same, by this connection.
    fn accept_on(&mut self, mut stream: UnixStream, port: u32) -> UnixStream {
        writeln!(stream, "CONNECT {port}").unwrap();
        let request = self.expect(op::REQUEST);
        assert_eq!((request.src_cid, request.dst_cid), (HOST_CID, CID.into()));
        assert_eq!((request.dst_port, request.kind), (port, STREAM));
        assert_eq!(
            (request.buf_alloc as usize, request.fwd_cnt),
            (BUFFER_SIZE, 0)
        );
        self.header = packet(op::RW, 0);
        (self.header.src_port, self.header.dst_port) = (port, request.src_port);
        self.send(op::RESPONSE, &[]);
        let line = format!("OK {}\n", request.src_port);
        let mut bytes = vec![0; line.len()];
        stream.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes, line.as_bytes());
        stream
    }

    /// A connection of the guest's to this port.
    fn connect(&mut self, listener: &UnixListener) -> UnixStream {
        self.header = packet(op::RW, 0);
        self.send(op::REQUEST, &[]);
        let (stream, _) = listener.accept().unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        let response = self.expect(op::RESPONSE);
        assert_eq!((response.src_port, response.dst_port), (52, 1000));
        stream
    }

    /// Sends more than a socket takes, and closes the connection. Gives what was sent.
    fn close_with_data(&mut self) -> Vec<u8> {
        let (mut sent, mut forwarded) = (Vec::new(), 0);
        while sent.len() - forwarded <= BUFFER_SIZE / 2 {
            let data = pattern(BUFFER_SIZE / 4, sent.len());
            self.send(op::RW, &data);
            sent.extend(data);
            self.send(op::CREDIT_REQUEST, &[]);
            forwarded = self.expect(op::CREDIT_UPDATE).fwd_cnt as usize;
        }
        self.shut_down(BOTH);
        while self.receive().0.op != op::RST {}
        sent
    }

    /// Has the guest take `len` bytes, with credit for them.
    #[track_caller]
    fn receive_data(&mut self, len: usize) -> Vec<u8> {
        let mut data = Vec::new();
        while data.len() < len {
            let (header, payload) = self.receive();
            if header.op == op::RW {
                data.extend(payload);
                self.header.fwd_cnt += header.len;
                self.send(op::CREDIT_UPDATE, &[]);
            }
        }
        data
    }
}

/// The host's program sees the end of the stream.
#[track_caller]
fn expect_end(stream: &mut UnixStream) {
    match stream.read(&mut [0; 16]) {
        Ok(0) => {}
        Err(e) if e.kind() == ErrorKind::ConnectionReset => {}
        other => panic!("{other:?}"),
    }
}
