//! The console against a driver of each of its queues, and a host that is slow.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::sync_channel;
use std::thread;

use proptest::prelude::*;
use virtio_bindings::virtio_mmio::*;

use super::*;
use crate::bus::BusDevice;
use crate::virtio::testing::*;

pub(in crate::virtio) const SIZE: TerminalSize = TerminalSize {
    columns: 80,
    rows: 25,
};

/// A host that takes `room` bytes.
#[derive(Clone, Default)]
pub(in crate::virtio) struct Host(Arc<Mutex<(Vec<u8>, usize)>>, Arc<AtomicUsize>);

impl Host {
    pub(in crate::virtio) fn with_room(room: usize) -> Self {
        Self(Arc::new(Mutex::new((Vec::new(), room))), Arc::default())
    }

    pub(in crate::virtio) fn take(&self) -> Vec<u8> {
        std::mem::take(&mut self.0.lock().unwrap().0)
    }

    /// Whether it was asked to call back since this was last asked.
    fn was_asked(&self) -> bool {
        self.1.swap(0, Ordering::Relaxed) > 0
    }

    pub(in crate::virtio) fn make_room(&self, room: usize) {
        self.0.lock().unwrap().1 = room;
    }
}

impl ConsoleOutput for Host {
    fn write(&mut self, bytes: &[u8]) -> usize {
        let (sent, room) = &mut *self.0.lock().unwrap();
        let taken = bytes.len().min(*room);
        *room -= taken;
        sent.extend_from_slice(&bytes[..taken]);
        taken
    }

    fn has_room(&self) -> bool {
        self.0.lock().unwrap().1 >= crate::chardev::MIN_ROOM
    }

    fn call_back(&self) {
        self.1.fetch_add(1, Ordering::Relaxed);
    }
}

/// A console whose user types without end, as much at a time as the conformance suite's requests have room for. It has no
/// size, which the suite would have to read.
pub(in crate::virtio) fn fed() -> Console {
    let (kick, kicks) = sync_channel(1);
    let kick = Arc::new(move || _ = kick.try_send(()));
    let console = Console::new(Box::new(Host::default()), kick, None);
    let port = Arc::downgrade(&console.port);
    thread::spawn(move || {
        // Until the console, which has the kick, is dropped.
        while kicks.recv().is_ok() {
            while let Some(port) = port.upgrade()
                && port.lock().unwrap().rx_space() > 0
            {
                port.lock().unwrap().receive(&[b'x'; 21]);
            }
        }
    });
    console
}

/// A console, its driver and its host.
struct Bench {
    driver: Driver,
    port: Arc<Mutex<dyn ConsoleDevice>>,
    host: Host,
    kicks: Arc<AtomicUsize>,
}

impl Bench {
    fn new(queue: u16, room: usize) -> Self {
        let (host, kicks) = (Host::with_room(room), Arc::new(AtomicUsize::new(0)));
        let count = kicks.clone();
        let kick = Arc::new(move || _ = count.fetch_add(1, Ordering::Relaxed));
        let console = Console::new(Box::new(host.clone()), kick, Some(SIZE));
        let port = console.port();
        let mut driver = Driver::new(Box::new(console));
        driver.queues = queue..queue + 1;
        let mut bench = Self {
            driver,
            port,
            host,
            kicks,
        };
        bench.start();
        bench
    }

    /// A driver that has come so far that it takes input.
    fn start(&mut self) {
        self.driver.start(0);
        self.config();
    }

    fn config(&mut self) -> [u8; 8] {
        let mut config = [0; 8];
        self.driver
            .transport
            .read(VIRTIO_MMIO_CONFIG.into(), &mut config);
        config
    }

    fn wants(&self) -> usize {
        self.port.lock().unwrap().rx_space()
    }

    fn receive(&self, bytes: &[u8]) -> usize {
        self.port.lock().unwrap().receive(bytes)
    }

    fn on_tx_space(&self) {
        self.port.lock().unwrap().on_tx_space();
    }

    fn kicked(&self) -> bool {
        self.kicks.swap(0, Ordering::Relaxed) > 0
    }

    /// Offers a chain of these buffers, the first of them in descriptor `head`.
    fn offer(&mut self, head: u16, buffers: &[(u64, u32, u16)]) {
        self.driver.chain(head, buffers);
        self.driver.offer(head);
        self.driver.notify();
    }
}

fn text(len: usize) -> Vec<u8> {
    (0..len).map(|n| (n * 7 + n / 251) as u8).collect()
}

#[test]
fn what_the_driver_sends_has_gone_when_its_notification_returns() {
    let mut bench = Bench::new(1, 1 << 20);
    bench.driver.write(DATA, b"hello, world");
    bench.offer(0, &[(DATA, 5, 0), (DATA, 0, 0), (DATA + 5, 7, 0)]);
    assert_eq!(bench.host.take(), b"hello, world");
    assert_eq!(bench.driver.wait_used(), (0, 0));
    // Nothing to send, and buffers that only the device could write.
    bench.offer(3, &[(DATA, 0, 0)]);
    bench.offer(4, &[(DATA, 9, WRITE)]);
    assert_eq!(bench.host.take(), b"");
    assert_eq!(
        (bench.driver.wait_used(), bench.driver.wait_used()),
        ((3, 0), (4, 0))
    );
}

#[test]
fn a_slow_host_makes_the_driver_wait_and_loses_nothing() {
    let mut bench = Bench::new(1, 0);
    let sent = text(10_000);
    bench.driver.write(SEAM - 6000, &sent);
    bench.offer(0, &[(SEAM - 6000, 10_000, 0)]);
    bench.offer(1, &[(SEAM - 6000, 17, 0)]);
    bench.driver.notify();
    let mut got = Vec::new();
    while got.len() < sent.len() {
        assert_eq!(bench.driver.used_index(), 0, "{}", got.len());
        bench.host.make_room(1000);
        bench.on_tx_space();
        let piece = bench.host.take();
        assert!(!piece.is_empty());
        got.extend(piece);
    }
    assert_eq!(got, sent);
    bench.host.make_room(100);
    bench.on_tx_space();
    assert_eq!(bench.host.take(), sent[..17]);
    assert_eq!(
        (bench.driver.wait_used(), bench.driver.wait_used()),
        ((0, 0), (1, 0))
    );
}

#[test]
fn a_reset_forgets_what_was_half_sent() {
    let mut bench = Bench::new(1, 20);
    bench.driver.write(DATA, &text(100));
    bench.offer(0, &[(DATA, 100, 0)]);
    assert_eq!(bench.host.take(), text(20));
    bench.host.make_room(1000);
    bench.start();
    assert_eq!(bench.host.take(), b"");
    bench.offer(0, &[(DATA, 100, 0)]);
    assert_eq!(bench.host.take(), text(100));
}

#[test]
fn no_notification_sends_without_end() {
    let mut bench = Bench::new(1, usize::MAX);
    // 1 MiB, as much as a chain may have.
    for n in 0..63 {
        bench
            .driver
            .descriptor_in(DATA, n, HIGH, 16 << 10, NEXT, n + 1);
    }
    bench.driver.descriptor_in(DATA, 63, HIGH, 16 << 10, 0, 0);
    bench.driver.descriptor(0, DATA, 64 * 16, INDIRECT, 0);
    bench.driver.offer(0);
    bench.driver.notify();
    let burst = bench.host.take().len();
    assert!(burst <= BURST * PIECE && burst > BURST / 2 * PIECE);
    // The host is asked to go on, and from where it was.
    assert!(bench.host.was_asked());
    bench.on_tx_space();
    assert_eq!(bench.host.take().len(), burst);
    assert!(bench.host.was_asked());
    // Shorter than what has been sent of it: done.
    bench.driver.descriptor(0, DATA, 16, INDIRECT, 0);
    bench.driver.descriptor_in(DATA, 0, HIGH, 100, 0, 0);
    bench.on_tx_space();
    assert_eq!(bench.host.take(), b"");
    assert_eq!(bench.driver.wait_used(), (0, 0));
    assert!(!bench.host.was_asked());
}

#[test]
fn a_chain_of_more_than_a_mebibyte_needs_a_reset() {
    let mut bench = Bench::new(1, usize::MAX);
    bench.offer(0, &[(HIGH, 1 << 20, 0)]);
    while bench.host.was_asked() {
        bench.on_tx_space();
    }
    assert_eq!(bench.host.take().len(), 1 << 20);
    assert_eq!(bench.driver.wait_used(), (0, 0));
    bench.offer(0, &[(HIGH, 1 << 20, 0), (HIGH, 1, 0)]);
    assert_eq!(bench.host.take(), b"");
    assert_ne!(bench.driver.status() & NEEDS_RESET, 0);
    assert!(!bench.host.was_asked());
}

#[test]
fn a_queue_that_is_taken_back_disturbs_no_other() {
    let mut bench = Bench::new(0, 20);
    bench.driver.queues = 0..2;
    bench.start();
    bench.driver.queue = 1;
    bench.driver.write(DATA, &text(100));
    bench.offer(0, &[(DATA, 100, 0)]);
    assert_eq!(bench.host.take(), text(100)[..20]);
    // Input goes no more; the rest of the output comes, and once.
    bench.host.make_room(1000);
    bench.driver.set(VIRTIO_MMIO_QUEUE_SEL, 0);
    bench.driver.set(VIRTIO_MMIO_QUEUE_READY, 0);
    assert_eq!(bench.host.take(), text(100)[20..]);
    assert_eq!(bench.driver.wait_used(), (0, 0));
    assert_eq!(bench.wants(), 0);

    // And the other way round: who has read the size need not do so again.
    bench.start();
    bench.driver.set(VIRTIO_MMIO_QUEUE_SEL, 1);
    bench.driver.set(VIRTIO_MMIO_QUEUE_READY, 0);
    bench.driver.queue = 0;
    bench.offer(0, &[(DATA, 4, WRITE)]);
    assert_eq!(bench.receive(b"text"), 4);
}

#[test]
fn input_waits_for_buffers_and_the_kick_tells_of_them() {
    let mut bench = Bench::new(0, 0);
    assert!(bench.kicked(), "there may be input already");
    assert_eq!(bench.wants(), 0);
    assert_eq!(bench.receive(b"early"), 0);
    bench.offer(0, &[(DATA, 4, WRITE)]);
    assert!(bench.kicked());
    assert_eq!(bench.wants(), PIECE);
    bench.driver.pulses.take();
    assert_eq!(bench.receive(b"early"), 4);
    assert!(bench.driver.pulses.take() > 0);
    assert_eq!(bench.driver.wait_used(), (0, 4));
    assert_eq!(bench.driver.read(DATA, 4), b"earl");
    // Held back: told once.
    assert!(!bench.kicked());
    bench.offer(0, &[(DATA, 4, WRITE)]);
    assert!(bench.kicked());
    bench.offer(1, &[(DATA, 4, WRITE)]);
    assert!(!bench.kicked());
    assert_eq!(bench.receive(b"y"), 1);
    assert_eq!(bench.driver.wait_used(), (0, 1));
    assert_eq!(bench.driver.read(DATA, 2), b"ya");
}

#[test]
fn input_waits_until_the_driver_has_read_the_size() {
    let mut bench = Bench::new(0, 0);
    bench.driver.start(0);
    bench.offer(0, &[(DATA, 4, WRITE)]);
    assert_eq!((bench.wants(), bench.receive(b"text")), (0, 0));
    bench.kicked();
    bench.config();
    assert!(bench.kicked());
    assert_eq!(bench.receive(b"text"), 4);
    // One that knows of no size will not read it.
    bench.driver.start(F_SIZE);
    bench.offer(0, &[(DATA, 4, WRITE)]);
    assert_eq!(bench.receive(b"text"), 4);
}

#[test]
fn a_break_is_what_linux_takes_for_one() {
    let mut bench = Bench::new(0, 0);
    assert!(!bench.port.lock().unwrap().send_break(), "no buffer");
    bench.kicked();
    bench.offer(0, &[(DATA, 4, WRITE)]);
    assert!(bench.kicked());
    assert!(bench.port.lock().unwrap().send_break());
    assert_eq!(bench.driver.read(DATA, 1), b"\x0f");
}

#[test]
fn a_stopped_driver_is_given_nothing_and_the_next_all() {
    let mut bench = Bench::new(0, 0);
    bench.offer(0, &[(DATA, 100, WRITE)]);
    bench.driver.set_status(0);
    assert_eq!((bench.wants(), bench.receive(b"lost?")), (0, 0));
    bench.start();
    bench.offer(0, &[(DATA, 100, WRITE)]);
    assert_eq!(bench.receive(b"not lost"), 8);
    assert_eq!(bench.driver.read(DATA, 8), b"not lost");
}

#[test]
fn a_receive_buffer_without_room_needs_a_reset() {
    for buffer in [(DATA, 0, WRITE), (DATA, 10, 0)] {
        let mut bench = Bench::new(0, 0);
        bench.offer(0, &[(DATA, 3, WRITE)]);
        bench.offer(1, &[buffer]);
        assert_eq!(bench.receive(b"typed"), 3, "what fitted has arrived");
        assert_ne!(bench.driver.status() & NEEDS_RESET, 0);
        assert_eq!((bench.wants(), bench.receive(b"ed")), (0, 0));
        bench.start();
        bench.offer(0, &[(DATA, 3, WRITE)]);
        assert_eq!(bench.receive(b"ed"), 2);
    }
}

#[test]
fn the_size_is_told_at_the_start_and_when_it_changes() {
    let mut bench = Bench::new(0, 0);
    assert_eq!(bench.config(), [80, 0, 25, 0, 0, 0, 0, 0]);
    assert_eq!(
        bench.driver.get(VIRTIO_MMIO_INTERRUPT_STATUS),
        VIRTIO_MMIO_INT_CONFIG
    );
    bench
        .driver
        .set(VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INT_CONFIG);
    let generation = bench.driver.get(VIRTIO_MMIO_CONFIG_GENERATION);
    bench.port.lock().unwrap().resize(SIZE);
    assert_eq!(bench.driver.get(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    let wide = TerminalSize {
        columns: 300,
        rows: 50,
    };
    bench.port.lock().unwrap().resize(wide);
    assert_eq!(
        bench.driver.get(VIRTIO_MMIO_INTERRUPT_STATUS),
        VIRTIO_MMIO_INT_CONFIG
    );
    assert_eq!(bench.config()[..4], [44, 1, 50, 0]);
    assert_ne!(bench.driver.get(VIRTIO_MMIO_CONFIG_GENERATION), generation);
    // Not to a driver that did not ask, and not while nothing runs.
    bench.driver.start(F_SIZE);
    assert_eq!(bench.driver.get(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    bench.port.lock().unwrap().resize(SIZE);
    assert_eq!(bench.driver.get(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    bench.driver.set_status(0);
    bench.port.lock().unwrap().resize(wide);
    assert_eq!(bench.driver.get(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
}

#[test]
fn without_a_user_there_is_no_size() {
    let kick = Arc::new(|| {});
    let console = Console::new(Box::new(Host::default()), kick, None);
    console.port().lock().unwrap().resize(SIZE);
    assert_eq!(console.features(), 0);
    let mut config = [0; 8];
    console.read_config(0, &mut config);
    assert_eq!(config, [0; 8]);
}

proptest! {
    /// However buffers, input and room come, each byte arrives once and in order, both ways.
    #[test]
    fn nothing_is_lost_or_doubled(
        typed in proptest::collection::vec(1usize..6000, 1..8),
        buffers in proptest::collection::vec(1u32..5000, 1..8),
        rooms in proptest::collection::vec(16usize..3000, 1..8),
    ) {
        let mut bench = Bench::new(0, 0);
        let sent = text(typed.iter().sum());
        let (mut ahead, mut got) = (0, Vec::new());
        let mut lens = typed.iter();
        let mut typed_so_far = 0;
        let mut buffers_of = buffers.iter().cycle();
        while got.len() < sent.len() {
            typed_so_far += lens.next().copied().unwrap_or(0);
            let len = *buffers_of.next().unwrap();
            bench.offer(0, &[(DATA, len, WRITE)]);
            ahead += bench.receive(&sent[ahead..typed_so_far]);
            if ahead > got.len() {
                let (_, written) = bench.driver.wait_used();
                got.extend(bench.driver.read(DATA, written as usize));
            } else {
                bench.start();
            }
        }
        prop_assert_eq!(&got, &sent);

        let mut bench = Bench::new(1, 0);
        let mut rooms_of = rooms.iter().cycle();
        let mut got = Vec::new();
        for (n, len) in buffers.iter().enumerate() {
            bench.driver.write(DATA + 0x2000 * n as u64, &text(*len as usize));
            bench.offer(n as u16, &[(DATA + 0x2000 * n as u64, *len, 0)]);
        }
        while usize::from(bench.driver.used_index()) < buffers.len() {
            bench.host.make_room(*rooms_of.next().unwrap());
            bench.on_tx_space();
            got.extend(bench.host.take());
        }
        let wanted: Vec<u8> = buffers.iter().flat_map(|len| text(*len as usize)).collect();
        prop_assert_eq!(got, wanted);
    }
}
