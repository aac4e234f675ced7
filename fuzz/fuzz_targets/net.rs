//! Whatever a guest sends and whatever its network does, with resets and restores between, each buffer of the network device's guest comes
//! back once and holds no more than fits; and after a reset the device works.
#![no_main]

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use minivmm_devices::state::Suspend;
use minivmm_devices::thread::ThreadStarter;
use minivmm_devices::virtio::device::VirtioDevice;
use minivmm_devices::virtio::net::{Link, Net, NetOptions, OFFLOADS};
use minivmm_devices::virtio::testing::{Driver, HIGH, NEEDS_RESET, WRITE, wait};

#[derive(Debug, Arbitrary)]
enum Act {
    /// The network sends a frame of so many bytes, or any bytes.
    Frame(u16),
    Bytes(Vec<u8>),
    /// The guest offers a buffer for frames, in pieces of these lengths.
    Offer([u16; 3]),
    /// It sends bytes behind this header, the same way.
    Send([u8; 12], [u16; 2]),
    /// The network takes so much.
    Take(u16),
    Pause,
    /// In a VM with this kind of network.
    Restore(Network),
    Reset,
    HangUp,
}

#[derive(Debug, Clone, Copy, Arbitrary)]
enum Network {
    Stream,
    Packets,
    None,
}

/// The other end of a link.
enum Peer {
    Stream(UnixStream),
    Packets(UnixDatagram),
    None,
}

impl Peer {
    fn send(&mut self, frame: &[u8]) {
        // It fails when there is no room, or nobody.
        let _ = match self {
            Self::Stream(stream) => {
                let word = (frame.len() as u32).to_be_bytes();
                stream.write(&[&word, frame].concat()).map(drop)
            }
            Self::Packets(socket) => socket.send(&[&[0; 12], frame].concat()).map(drop),
            Self::None => Ok(()),
        };
    }

    fn send_raw(&mut self, bytes: &[u8]) {
        let _ = match self {
            Self::Stream(stream) => stream.write(bytes),
            Self::Packets(socket) => socket.send(bytes),
            Self::None => Ok(0),
        };
    }

    fn take(&mut self, len: usize) {
        let mut bytes = vec![0; len];
        let _ = match self {
            Self::Stream(stream) => stream.read(&mut bytes),
            Self::Packets(socket) => socket.recv(&mut bytes),
            Self::None => Ok(0),
        };
    }
}

fn network(kind: Network) -> (Peer, Box<dyn VirtioDevice>) {
    let (peer, link) = match kind {
        Network::Stream => {
            let (ours, theirs) = UnixStream::pair().unwrap();
            theirs.set_nonblocking(true).unwrap();
            (Peer::Stream(theirs), Link::stream(OwnedFd::from(ours)))
        }
        Network::Packets => {
            let (ours, theirs) = UnixDatagram::pair().unwrap();
            theirs.set_nonblocking(true).unwrap();
            let link = Link::packets(vec![OwnedFd::from(ours)], Some(|_, _| Ok(())));
            (Peer::Packets(theirs), link)
        }
        Network::None => (Peer::None, Link::unplugged(true)),
    };
    let options = NetOptions {
        mac: [2, 0, 0, 0, 0, 1],
        mtu: Some(65520),
        pairs: 1,
    };
    let link = Arc::new(Mutex::new(link.unwrap()));
    let device = Net::new(link, options, &ThreadStarter::default()).unwrap();
    (peer, Box::new(device))
}

/// Buffers that the device may have of each queue at once, of three descriptors each.
const SLOTS: usize = 21;

/// What the device has: of each buffer, its length.
#[derive(Default)]
struct InFlight([[Option<u32>; SLOTS]; 2]);

impl InFlight {
    /// Gives a buffer to the device.
    fn offer(
        &mut self,
        driver: &mut Driver,
        queue: u16,
        header: &[u8],
        pieces: &[u16],
        flags: u16,
    ) {
        driver.queue = queue;
        let slots = &mut self.0[usize::from(queue)];
        let Some(slot) = slots.iter().position(Option::is_none) else {
            return;
        };
        let mut at = HIGH + 0x20_0000 * u64::from(queue) + 0x8000 * slot as u64;
        driver.write(at, header);
        let mut chain = Vec::new();
        // No more than the space of a slot.
        for len in pieces.iter().map(|len| u32::from(len % 0x2000)) {
            chain.push((at, len, flags));
            at += u64::from(len);
        }
        slots[slot] = Some(chain.iter().map(|(_, len, _)| len).sum());
        driver.chain(3 * slot as u16, &chain);
        driver.offer(3 * slot as u16);
        driver.notify();
    }

    /// Takes back what the device is done with.
    fn collect(&mut self, driver: &mut Driver) {
        for queue in 0..2 {
            driver.queue = queue;
            while driver.used_index() != driver.used_so_far() {
                let (head, len) = driver.wait_used();
                let room = self.0[usize::from(queue)][head as usize / 3].take();
                assert!(len <= room.expect("used twice, or never offered"));
            }
        }
    }
}

fuzz_target!(
    // The device writes to a network that has hung up. Rust's own main ignores the signal, libFuzzer's does not.
    init: unsafe {
        // SAFETY: no handler is installed.
        libc::signal(libc::SIGPIPE, libc::SIG_IGN);
    },
    |input: (Network, bool, Vec<Act>)| {
        let (kind, is_mergeable, acts) = input;
        let (mut peer, device) = network(kind);
        let mut driver = Driver::new(device);
        (driver.size, driver.queues) = (64, 0..2);
        // A driver with offloads would not be restored on a stream.
        let without = OFFLOADS | if is_mergeable { 0 } else { 1 << 15 };
        driver.start(without);
        let mut in_flight = InFlight::default();
        for act in acts.into_iter().take(64) {
            match act {
                Act::Frame(len) => peer.send(&vec![b'f'; len.into()]),
                Act::Bytes(bytes) => peer.send_raw(&bytes),
                Act::Offer(pieces) => in_flight.offer(&mut driver, 0, &[], &pieces, WRITE),
                Act::Send(header, [first, second]) => {
                    in_flight.offer(&mut driver, 1, &header, &[first, second], 0);
                }
                Act::Take(len) => peer.take(len.into()),
                Act::Pause => {
                    assert!(driver.transport.pause(Duration::from_secs(20)));
                    assert!(driver.transport.resume());
                }
                Act::Restore(kind) => {
                    let (new_peer, device) = network(kind);
                    driver.restore(|| device);
                    assert!(driver.transport.resume());
                    peer = new_peer;
                }
                Act::Reset => {
                    driver.start(without);
                    in_flight = InFlight::default();
                }
                Act::HangUp => peer = Peer::None,
            }
            in_flight.collect(&mut driver);
        }
        driver.start(without);
        let mut in_flight = InFlight::default();
        in_flight.offer(&mut driver, 1, &[0; 12], &[12, 60], 0);
        wait("a frame to be sent", || {
            peer.take(0x1_0000);
            driver.used_index() == 1
        });
        in_flight.collect(&mut driver);
        assert_eq!(driver.status() & NEEDS_RESET, 0);
    }
);
