//! A network for a test alone, and servers in it.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::process::Command;
use std::sync::mpsc::{self, Receiver};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use rustix::thread::{UnshareFlags, unshare_unsafe};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::hex;

/// Connections that a guest has open at once.
const MANY: usize = 500;

pub(crate) fn sh(script: &str) {
    let done = Command::new("sh").args(["-ec", script]).status().unwrap();
    assert!(done.success(), "{script}");
}

/// Gives this test's thread, and what it starts, a network of its own: a way out, which passt wants, addresses of its own elsewhere,
/// a TAP interface `tap` of this MTU, and a resolver at 127.0.0.1.
pub(crate) fn own_network(mtu: u32) {
    own_network_with(mtu, "");
}

/// The same with further options for the TAP interface.
#[allow(unsafe_code, reason = "some flags of this call are unsafe")]
pub(crate) fn own_network_with(mtu: u32, tap: &str) {
    // SAFETY: the flags are none of those that take open files away from other threads.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET | UnshareFlags::NEWNS) }.expect("root");
    sh(&format!(
        "mount --make-rprivate /
        mount -t tmpfs none /mnt
        echo nameserver 127.0.0.1 >/mnt/resolv.conf
        mount --bind /mnt/resolv.conf /etc/resolv.conf
        ip link set lo up
        ip link add ext type dummy
        ip link set ext up
        ip addr add 192.0.2.2/24 dev ext
        ip addr add 2001:db8::2/64 dev ext nodad
        ip route add default via 192.0.2.1
        ip route add default via 2001:db8::1 dev ext
        ip tuntap add tap mode tap {tap}
        ip link set tap mtu {mtu} up
        ip addr add 10.9.0.1/24 dev tap
        ip addr add fd09::1/64 dev tap nodad"
    ));
}

/// Data of which no two parts are the same.
pub(crate) fn page() -> Vec<u8> {
    (0..2 << 20_u32)
        .map(|i| (i % 251 + i / 65536) as u8)
        .collect()
}

/// Calls this for each connection, on a thread of its own.
fn listen(address: &str, mut serve: impl FnMut(TcpStream) + Send + 'static) {
    let listener = TcpListener::bind(address).unwrap_or_else(|e| panic!("{address}: {e}"));
    thread::spawn(move || listener.incoming().flatten().for_each(&mut serve));
}

/// At each address the servers that a guest looks for: the page at port 8000, an echo for datagrams at 5001, and at 5000 what gives all that
/// comes on the first connection; at the first address also one for [`MANY`] connections, at 5002.
pub(crate) fn serve(addresses: &[&str]) -> Vec<JoinHandle<Vec<u8>>> {
    many(&format!("{}:5002", addresses[0]));
    let serve = |address: &&str| {
        web(&format!("{address}:8000"));
        udp_echo(&format!("{address}:5001"));
        let sink = TcpListener::bind(format!("{address}:5000")).unwrap();
        thread::spawn(move || {
            let mut data = Vec::new();
            sink.accept().unwrap().0.read_to_end(&mut data).unwrap();
            data
        })
    };
    addresses.iter().map(serve).collect()
}

/// Takes a request, and begins to answer it.
fn answer(stream: &mut TcpStream) {
    let mut line = String::new();
    _ = BufReader::new(&*stream).read_line(&mut line);
    _ = stream.write_all(b"HTTP/1.0 200 OK\r\n\r\n");
}

/// Has the files of this directory.
pub(crate) fn files(address: &str, directory: PathBuf) {
    listen(address, move |mut stream| {
        let mut line = String::new();
        _ = BufReader::new(&stream).read_line(&mut line);
        let name = line.split(' ').nth(1).unwrap_or_default();
        let file = fs::read(directory.join(name.trim_start_matches('/')));
        let (status, data) = match &file {
            Ok(data) => ("200 OK", data.as_slice()),
            Err(_) => ("404 Not Found", &b""[..]),
        };
        _ = write!(
            stream,
            "HTTP/1.0 {status}\r\nContent-Length: {}\r\n\r\n",
            data.len()
        );
        _ = stream.write_all(data);
    });
}

pub(crate) fn web(address: &str) {
    listen(address, |mut stream| {
        answer(&mut stream);
        _ = stream.write_all(&page());
    });
}

/// Sends for as long as it is taken, and takes what comes.
pub(crate) fn endless(address: &str) {
    listen(address, |stream| {
        let (mut stream, mut sent) = (stream.try_clone().unwrap(), stream);
        thread::spawn(move || {
            answer(&mut sent);
            while sent.write_all(&[0; 4096]).is_ok() {}
        });
        thread::spawn(move || std::io::copy(&mut stream, &mut std::io::sink()));
    });
}

/// Prints how far a long transfer has come.
struct Progress {
    direction: &'static str,
    start: Instant,
    bytes: u64,
}

impl Progress {
    fn of(direction: &'static str) -> Self {
        let start = Instant::now();
        Self {
            direction,
            start,
            bytes: 0,
        }
    }

    fn add(&mut self, len: usize) {
        const STEP: u64 = 64 << 20;
        let steps = self.bytes / STEP;
        self.bytes += len as u64;
        if self.bytes / STEP > steps {
            let (mib, time) = (self.bytes >> 20, self.start.elapsed());
            println!("{}: {mib} MiB after {time:.0?}", self.direction);
        }
    }
}

/// Sends the page again and again, for the last time when this is so, given how often it has been; then gives the sum of all.
pub(crate) fn pages_until(
    address: &str,
    is_last: impl Fn(usize) -> bool + Send + 'static,
) -> Receiver<String> {
    let (sender, sum) = mpsc::channel();
    let page = page();
    listen(address, move |mut stream| {
        answer(&mut stream);
        let mut sent = Sha256::new();
        let mut progress = Progress::of("to the guest");
        for pages in 0.. {
            let is_last = is_last(pages);
            stream.write_all(&page).unwrap();
            sent.update(&page);
            progress.add(page.len());
            if is_last {
                break;
            }
        }
        _ = sender.send(hex(&sent.finalize()));
    });
    sum
}

/// Takes all of one connection after the other, and gives the sum of so many bytes.
pub(crate) fn sum_of(address: &str, bytes: u64) -> Receiver<String> {
    let (sender, sum) = mpsc::channel();
    let (mut received, mut left, mut part) = (Sha256::new(), bytes, vec![0; 64 << 10]);
    let mut progress = None;
    listen(address, move |mut stream| {
        while let Ok(len @ 1..) = stream.read(&mut part) {
            received.update(&part[..len]);
            progress
                .get_or_insert_with(|| Progress::of("from the guest"))
                .add(len);
            left = left.saturating_sub(len as u64);
        }
        if left == 0 {
            _ = sender.send(hex(&received.finalize_reset()));
        }
    });
    sum
}

/// Says "first", and afterwards "again".
pub(crate) fn name_each_boot(address: &str) {
    let mut words = ["first"].into_iter();
    listen(address, move |mut stream| {
        let word = words.next().unwrap_or("again");
        answer(&mut stream);
        stream.write_all(word.as_bytes()).unwrap();
    });
}

/// Sends back what it gets, when it has all.
pub(crate) fn tcp_echo(address: &str) {
    listen(address, |mut stream| {
        let mut data = Vec::new();
        _ = stream.read_to_end(&mut data);
        _ = stream.write_all(&data);
    });
}

fn udp_echo(address: &str) {
    let socket = UdpSocket::bind(address).unwrap();
    thread::spawn(move || {
        let mut bytes = [0; 2048];
        while let Ok((len, from)) = socket.recv_from(&mut bytes) {
            _ = socket.send_to(&bytes[..len], from);
        }
    });
}

/// Gives a byte to each of [`MANY`] connections once it has all of them.
fn many(address: &str) {
    let mut streams = Vec::new();
    listen(address, move |stream| {
        streams.push(stream);
        if streams.len() == MANY {
            for mut stream in streams.drain(..) {
                _ = stream.write_all(b"x");
            }
        }
    });
}

/// Knows host.test, which is 192.0.2.77 (RFC 1035 § 4).
pub(crate) fn name_server() {
    let socket = UdpSocket::bind("127.0.0.1:53").unwrap();
    thread::spawn(move || {
        let mut query = [0; 512];
        while let Ok((len, from)) = socket.recv_from(&mut query) {
            let question = &query[12..len];
            let asks_for_a = question[question.len() - 4..] == [0, 1, 0, 1];
            let mut answer = query[..2].to_vec();
            answer.extend([0x81, 0x80, 0, 1, 0, u8::from(asks_for_a), 0, 0, 0, 0]);
            answer.extend(question);
            if asks_for_a {
                answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 77]);
            }
            _ = socket.send_to(&answer, from);
        }
    });
}

/// Packages for apt: one, whose program `greet` says what its script does not have as such.
pub(crate) fn repository() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    sh(&format!(
        "cd {}
        mkdir -p greet/DEBIAN greet/usr/bin
        printf '#!/bin/sh\necho greetings-$((6*7))\n' >greet/usr/bin/greet
        chmod 755 greet/usr/bin/greet
        printf '%s\n' 'Package: greet' 'Version: 1' 'Architecture: all' 'Maintainer: nobody <nobody@localhost>' \
            'Description: says something' >greet/DEBIAN/control
        dpkg-deb --root-owner-group -Znone --build greet greet.deb >/dev/null
        {{
            cat greet/DEBIAN/control
            echo Filename: ./greet.deb
            echo Size: $(stat -c %s greet.deb)
            echo SHA256: $(sha256sum <greet.deb | cut -d ' ' -f 1)
        }} >Packages",
        directory.path().display()
    ));
    directory
}
