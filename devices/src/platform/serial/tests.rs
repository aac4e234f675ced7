use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::spec::*;
use super::*;
use crate::platform::testing::{hammer, inb};
use crate::virtio::testing::Pulses;

/// A bounded host side.
struct Host {
    sent: Arc<Mutex<Vec<u8>>>,
    capacity: Arc<AtomicUsize>,
}

impl ConsoleOutput for Host {
    fn write(&mut self, bytes: &[u8]) -> usize {
        let mut sent = self.sent.lock().unwrap();
        let room = self
            .capacity
            .load(Ordering::Relaxed)
            .saturating_sub(sent.len());
        let accepted = room.min(bytes.len());
        sent.extend_from_slice(&bytes[..accepted]);
        accepted
    }
    fn has_room(&self) -> bool {
        self.sent.lock().unwrap().len() + FIFO_LEN <= self.capacity.load(Ordering::Relaxed)
    }

    fn call_back(&self) {}
}

struct Bench {
    serial: Serial,
    pulses: Arc<Pulses>,
    sent: Arc<Mutex<Vec<u8>>>,
    capacity: Arc<AtomicUsize>,
    kicks: Arc<AtomicUsize>,
}

impl Bench {
    fn new() -> Self {
        Self::with_capacity(1 << 20)
    }

    fn with_capacity(capacity: usize) -> Self {
        let pulses = Arc::new(Pulses::default());
        let sent = Arc::new(Mutex::new(Vec::new()));
        let capacity = Arc::new(AtomicUsize::new(capacity));
        let kicks = Arc::new(AtomicUsize::new(0));
        let counter = kicks.clone();
        let serial = Serial::new(
            pulses.line(),
            Box::new(Host {
                sent: sent.clone(),
                capacity: capacity.clone(),
            }),
            Arc::new(move || {
                counter.fetch_add(1, Ordering::Relaxed);
            }),
        );
        Self {
            serial,
            pulses,
            sent,
            capacity,
            kicks,
        }
    }

    /// As Linux leaves it when a process has opened the tty.
    fn opened() -> Self {
        let mut bench = Self::new();
        bench.open();
        bench
    }

    fn open(&mut self) {
        self.outb(IIR_FCR, FCR_ENABLE);
        self.outb(IIR_FCR, FCR_ENABLE | FCR_CLEAR_RECEIVE | 4);
        self.outb(IIR_FCR, 0);
        self.outb(LCR, 3);
        self.outb(MCR, MCR_OUT2);
        self.outb(IER, IER_RECEIVE | IER_LINE_STATUS);
        self.outb(IIR_FCR, FCR_ENABLE | 0x80);
        self.outb(MCR, MCR_OUT2 | MCR_DTR | MCR_RTS);
        self.pulses.take();
        self.kicks();
    }

    fn outb(&mut self, offset: u64, value: u8) {
        self.serial.write(offset, &[value]);
    }

    fn inb(&mut self, offset: u64) -> u8 {
        inb(&mut self.serial, offset)
    }

    fn kicks(&self) -> usize {
        self.kicks.swap(0, Ordering::Relaxed)
    }

    fn sent(&self) -> Vec<u8> {
        std::mem::take(&mut self.sent.lock().unwrap())
    }

    /// What serial8250_interrupt does: until the UART has nothing to say, read all that is there.
    fn service(&mut self) -> Vec<u8> {
        let mut got = Vec::new();
        while self.inb(IIR_FCR) & IIR_NONE == 0 {
            while self.inb(LSR) & LSR_DATA_READY != 0 {
                got.push(self.inb(DATA));
            }
        }
        got
    }
}

#[test]
fn bytes_reach_the_host() {
    let mut b = Bench::new();
    for byte in b"hello" {
        assert_eq!(b.inb(LSR), LSR_THRE | LSR_TEMT);
        b.outb(DATA, *byte);
    }
    assert_eq!(b.sent(), b"hello");
    assert_eq!(b.pulses.take(), 0);
}

/// The probe of drivers/tty/serial/8250/8250_port.c, autoconfig() and autoconfig_16550a() with every variant compiled in.
#[test]
fn linux_finds_a_plain_16550a() {
    let mut b = Bench::new();
    b.outb(IER, 0);
    assert_eq!(b.inb(IER) & 0x0f, 0);
    b.outb(IER, 0x0f);
    assert_eq!(b.inb(IER) & 0x0f, 0x0f);
    b.outb(IER, 0);
    // Loopback test.
    let mcr = b.inb(MCR);
    b.outb(MCR, MCR_LOOPBACK | 0x0a);
    assert_eq!(b.inb(MSR) & 0xf0, 0x90);
    b.outb(MCR, mcr);
    // FIFO detection; LCR 0xbf would open the EFR of a 16650.
    b.outb(LCR, 0xbf);
    b.outb(IIR_FCR, 0);
    b.outb(LCR, 0);
    b.outb(IIR_FCR, FCR_ENABLE);
    assert_eq!(b.inb(IIR_FCR) >> 6, 3);
    // No EFR: register 2 stays the IIR.
    for lcr in [0x80, 0xbf] {
        b.outb(LCR, lcr);
        assert_ne!(b.inb(IIR_FCR), 0);
    }
    // No National SuperIO: register 2 of bank 2 does not follow MCR's loopback bit.
    for mcr in [0, MCR_LOOPBACK] {
        b.outb(LCR, 0);
        b.outb(MCR, mcr);
        b.outb(LCR, 0xe0);
        assert_eq!(b.inb(IIR_FCR) & 0x10, 0);
    }
    b.outb(LCR, 0);
    b.outb(MCR, 0);
    // No 64-byte FIFO, with DLAB or without.
    for lcr in [0, 0x80] {
        b.outb(LCR, lcr);
        b.outb(IIR_FCR, FCR_ENABLE | 0x20);
        assert_eq!(b.inb(IIR_FCR) >> 5, 6);
    }
    b.outb(LCR, 0);
    // No XScale: the UART unit enable bit does not stick.
    b.outb(IER, 0x40);
    assert_eq!(b.inb(IER), 0);
    // The scratch register tells it from an 8250.
    for value in [0xa5, 0x5a] {
        b.outb(SCR, value);
        assert_eq!(b.inb(SCR), value);
    }
}

/// serial8250_do_startup(): the transmit interrupt must come back each time it is enabled.
#[test]
fn linux_finds_no_transmit_bugs() {
    let mut b = Bench::new();
    for _ in 0..2 {
        b.outb(IER, IER_TRANSMIT);
        assert_eq!(b.inb(IIR_FCR), IIR_TRANSMIT);
        assert_eq!(b.inb(IIR_FCR), IIR_NONE);
        b.outb(IER, 0);
    }
    assert_eq!(b.pulses.take(), 2);
}

#[test]
fn the_divisor_latch_hides_data_and_interrupt_enable() {
    let mut b = Bench::new();
    b.outb(IER, 0);
    b.outb(LCR, LCR_DLAB);
    assert_eq!((b.inb(DATA), b.inb(IER)), (12, 0));
    b.outb(DATA, 0x34);
    b.outb(IER, 0x12);
    assert_eq!((b.inb(DATA), b.inb(IER)), (0x34, 0x12));
    b.outb(LCR, 3);
    assert_eq!(b.inb(IER), 0);
    assert!(b.sent().is_empty());
}

#[test]
fn each_burst_is_one_edge() {
    let mut b = Bench::opened();
    b.outb(IER, IER_RECEIVE | IER_TRANSMIT);
    assert_eq!(b.pulses.take(), 1);
    assert_eq!(b.inb(IIR_FCR), IIR_FIFOS_ENABLED | IIR_TRANSMIT);
    for byte in 0..16 {
        b.outb(DATA, byte);
    }
    // Acknowledged, then sent: empty again, told once.
    assert_eq!(b.pulses.take(), 1);
    b.outb(IER, IER_RECEIVE);
    assert_eq!(b.inb(IIR_FCR), IIR_FIFOS_ENABLED | IIR_NONE);
}

#[test]
fn nothing_is_received_before_the_guest_opens_the_port() {
    let mut b = Bench::new();
    assert_eq!(b.serial.rx_space(), 0);
    assert_eq!(b.serial.receive(b"early"), 0);
    b.outb(IIR_FCR, FCR_ENABLE | FCR_CLEAR_RECEIVE);
    assert_eq!(b.kicks(), 0);
    b.outb(IER, IER_RECEIVE);
    b.outb(MCR, MCR_DTR);
    assert_eq!(b.kicks(), 0, "a probe does that, too");
    b.outb(MCR, MCR_DTR | MCR_RTS);
    assert_eq!(b.kicks(), 1);
    assert_eq!(b.serial.receive(b"early"), 5);
    assert_eq!(b.pulses.take(), 1);
    assert_eq!(b.service(), b"early");
}

#[test]
fn switching_the_fifos_on_loses_nothing() {
    let mut b = Bench::new();
    b.outb(IER, IER_RECEIVE);
    assert_eq!(b.serial.rx_space(), 0, "a probe: the modem lines are down");
    b.outb(MCR, MCR_RTS);
    assert_eq!(b.kicks(), 1);
    assert_eq!(b.serial.rx_space(), 1);
    assert_eq!(b.serial.receive(b"xy"), 1);
    b.outb(IIR_FCR, FCR_ENABLE | 0x80);
    assert_eq!(b.serial.rx_space(), 15);
    assert_eq!(b.service(), b"x");
}

#[test]
fn a_receive_interrupt_says_whether_the_trigger_is_reached() {
    let mut b = Bench::opened();
    b.serial.receive(b"1234567");
    assert_eq!(b.inb(IIR_FCR), IIR_FIFOS_ENABLED | IIR_TIMEOUT);
    b.serial.receive(b"8");
    assert_eq!(b.inb(IIR_FCR), IIR_FIFOS_ENABLED | IIR_RECEIVE);
    assert_eq!(b.pulses.take(), 1, "the line was high all along");
    assert_eq!(b.service(), b"12345678");
    b.serial.receive(b"9");
    assert_eq!(b.pulses.take(), 1);
}

#[test]
fn the_kick_comes_once_and_only_if_input_was_held_back() {
    let mut b = Bench::opened();
    assert_eq!(b.serial.receive(b"few"), 3);
    b.service();
    assert_eq!(b.kicks(), 0, "the host had no more");
    assert_eq!(b.serial.receive(&[b'x'; 40]), 16);
    b.inb(DATA);
    assert_eq!(b.kicks(), 0, "not empty yet");
    b.service();
    b.inb(DATA);
    assert_eq!(b.kicks(), 1);
    assert_eq!(b.serial.receive(&[b'x'; 16]), 16);
    assert_eq!(b.serial.rx_space(), 0);
    b.outb(IIR_FCR, FCR_ENABLE | FCR_CLEAR_RECEIVE);
    assert_eq!(b.kicks(), 1, "cleared is empty as well");
}

#[test]
fn a_long_paste_arrives_whole() {
    let mut b = Bench::opened();
    let paste: Vec<u8> = (0..10_000u32).map(|i| i as u8).collect();
    let (mut rest, mut got) = (&paste[..], Vec::new());
    while !rest.is_empty() || b.pulses.take() > 0 {
        rest = &rest[b.serial.receive(rest)..];
        got.extend(b.service());
    }
    assert_eq!(got, paste);
}

#[test]
fn a_full_host_makes_the_transmitter_busy() {
    let mut b = Bench::with_capacity(20);
    b.open();
    b.outb(IER, IER_TRANSMIT);
    b.inb(IIR_FCR);
    b.pulses.take();
    for byte in 0..16 {
        b.outb(DATA, byte);
    }
    assert_eq!(b.inb(LSR) & (LSR_THRE | LSR_TEMT), 0);
    b.pulses.take();
    b.serial.on_tx_space();
    assert_eq!(b.pulses.take(), 0, "still full");
    // A guest that does not look: what fits is sent, the rest is counted.
    for byte in 16..26 {
        b.outb(DATA, byte);
    }
    assert_eq!(b.serial.dropped(), 6);
    assert_eq!(b.sent(), (0..20).collect::<Vec<u8>>());
    b.serial.on_tx_space();
    assert_eq!(b.pulses.take(), 1);
    assert_eq!(b.inb(IIR_FCR) & 0xf, IIR_TRANSMIT);
    assert_eq!(b.inb(LSR), LSR_THRE | LSR_TEMT);
    b.serial.on_tx_space();
    assert_eq!(b.pulses.take(), 0);
}

#[test]
fn enabling_the_transmit_interrupt_while_full_waits_for_room() {
    let mut b = Bench::with_capacity(0);
    b.outb(IER, IER_TRANSMIT);
    assert_eq!(b.inb(IIR_FCR), IIR_NONE);
    b.capacity.store(100, Ordering::Relaxed);
    b.serial.on_tx_space();
    assert_eq!(b.inb(IIR_FCR), IIR_TRANSMIT);
    assert_eq!(b.pulses.take(), 1);
}

#[test]
fn loopback_returns_bytes_and_modem_lines() {
    let mut b = Bench::with_capacity(0);
    b.outb(IER, IER_RECEIVE | IER_LINE_STATUS);
    b.outb(MCR, MCR_LOOPBACK);
    assert_eq!(b.inb(MSR), 0);
    for (mcr, msr) in [
        (MCR_RTS, MSR_CTS),
        (MCR_DTR, MSR_DSR),
        (MCR_OUT1, MSR_RI),
        (MCR_OUT2, MSR_DCD),
    ] {
        b.outb(MCR, MCR_LOOPBACK | mcr);
        assert_eq!(b.inb(MSR), msr);
    }
    assert_eq!(b.serial.rx_space(), 0);
    b.outb(DATA, b'a');
    b.outb(DATA, b'b');
    assert_eq!(b.inb(IIR_FCR), IIR_LINE_STATUS);
    assert_eq!(
        b.inb(LSR),
        LSR_DATA_READY | LSR_OVERRUN | LSR_THRE | LSR_TEMT
    );
    assert_eq!(b.inb(IIR_FCR), IIR_RECEIVE);
    assert_eq!(b.inb(DATA), b'a');
    b.outb(MCR, 0);
    assert_eq!(b.inb(MSR), MSR_CTS | MSR_DSR | MSR_DCD);
    assert!(b.sent().is_empty());
}

#[test]
fn wide_accesses_are_split() {
    let mut b = Bench::new();
    b.serial.write(SCR, &[0x12, 0x34]);
    b.serial.write(LCR, &[LCR_DLAB, 0]);
    b.serial.write(DATA, &[0x34, 0x12]);
    let mut data = [0; 4];
    b.serial.read(DATA, &mut data);
    assert_eq!(data, [0x34, 0x12, IIR_NONE, LCR_DLAB]);
    let mut data = [0; 2];
    b.serial.read(SCR, &mut data);
    assert_eq!(data, [0x12, 0xff]);
    hammer(&mut b.serial, PORT_LEN);
}

#[derive(Debug, Clone)]
enum Op {
    Read(u64, usize),
    Write(u64, Vec<u8>),
    Receive(Vec<u8>),
    HostReads(usize),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        (0u64..10, 0usize..9).prop_map(|(offset, len)| Op::Read(offset, len)),
        (0u64..10, proptest::collection::vec(any::<u8>(), 0..9))
            .prop_map(|(offset, data)| Op::Write(offset, data)),
        proptest::collection::vec(any::<u8>(), 0..40).prop_map(Op::Receive),
        (0usize..64).prop_map(Op::HostReads),
    ]
}

#[test]
fn a_break_is_a_zero_with_a_bit_in_the_line_status() {
    let mut b = Bench::new();
    assert!(!b.serial.send_break(), "nobody listens");
    b.open();
    assert_eq!(b.serial.receive(b"a"), 1);
    assert!(b.serial.send_break());
    assert_eq!(b.serial.receive(b"h"), 1);
    // It shows when it is next, and once.
    assert_eq!(b.inb(IIR_FCR) & 0xf, IIR_TIMEOUT);
    assert_eq!(b.inb(LSR) & (LSR_DATA_READY | LSR_BREAK), LSR_DATA_READY);
    b.pulses.take();
    assert_eq!(b.inb(DATA), b'a');
    assert!(b.pulses.take() > 0);
    assert_eq!(b.inb(IIR_FCR) & 0xf, IIR_LINE_STATUS);
    let both = LSR_DATA_READY | LSR_BREAK;
    assert_eq!(b.inb(LSR) & both, both);
    assert_eq!(b.inb(LSR) & both, LSR_DATA_READY);
    assert_eq!((b.inb(DATA), b.inb(DATA)), (0, b'h'));
    // It needs room like any other.
    while b.serial.send_break() {}
    assert_eq!(b.serial.state.rx.len(), FIFO_LEN);
}

proptest! {
    /// Whatever a guest does, nothing panics or grows, and a cause that is up has been signalled.
    #[test]
    fn any_sequence_stays_bounded(ops in proptest::collection::vec(op(), 0..300)) {
        let mut b = Bench::with_capacity(64);
        for op in ops {
            let before = b.serial.causes;
            b.pulses.take();
            match op {
                Op::Read(offset, len) => b.serial.read(offset, &mut vec![0; len]),
                Op::Write(offset, data) => b.serial.write(offset, &data),
                Op::Receive(data) => {
                    let wanted = b.serial.rx_space();
                    prop_assert_eq!(b.serial.receive(&data), wanted.min(data.len()));
                }
                Op::HostReads(len) => {
                    let mut sent = b.sent.lock().unwrap();
                    let len = len.min(sent.len());
                    sent.drain(..len);
                    drop(sent);
                    b.serial.on_tx_space();
                }
            }
            prop_assert!(b.serial.state.rx.len() <= FIFO_LEN);
            prop_assert!(b.sent.lock().unwrap().len() <= 64);
            prop_assert_eq!(b.serial.causes, b.serial.current_causes());
            if before == Causes::default() && b.serial.causes != before {
                prop_assert!(b.pulses.take() > 0);
            }
        }
    }

    /// With a driver that opens the port and services interrupts, every input byte arrives, in order, however the host
    /// chops it: the kick is enough to know when to go on.
    #[test]
    fn flow_control_never_stalls(chunks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..50), 0..30)) {
        let mut b = Bench::opened();
        let (mut got, sent) = (Vec::new(), chunks.concat());
        for chunk in &chunks {
            let mut rest = &chunk[..];
            loop {
                rest = &rest[b.serial.receive(rest)..];
                prop_assert!(b.pulses.take() > 0);
                got.extend(b.service());
                if rest.is_empty() {
                    break;
                }
                prop_assert_eq!(b.kicks(), 1);
            }
        }
        prop_assert_eq!(got, sent);
    }
}
