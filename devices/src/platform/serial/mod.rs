//! A 16550A UART (National Semiconductor PC16550D data sheet, § 8), with flow control toward the host both ways.
//!
//! Transmission takes no time, so the transmitter is always empty unless the host's buffer is full. Then the guest
//! sees a busy transmitter and waits, as on a slow line: the vCPU thread never blocks and no buffer grows. In the other
//! direction, the host delivers no more than the receive FIFO has room for, and nothing before the guest has opened the
//! port: Linux clears the FIFO when it opens it, which would lose early input from a pipe.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::{read_bytes, write_bytes};
use crate::bus::BusDevice;
use crate::chardev::{ConsoleDevice, ConsoleOutput, Kick, MIN_ROOM};
use crate::interrupt::IrqLine;
use crate::state::{Record, SaveState, StateError, Suspend, from_record, to_record};

#[cfg(test)]
mod tests;

/// Length of the port range, in bytes.
pub const PORT_LEN: u64 = 8;
/// Version of the saved state.
const STATE_VERSION: u32 = 1;
/// Bytes that each of the FIFOs holds.
const FIFO_LEN: usize = MIN_ROOM;

mod spec {
    // Registers, by offset. Those at 0 and 1 are the divisor latch while DLAB is set.
    /// Receive buffer (read), transmit holding register (write), divisor latch low.
    pub(super) const DATA: u64 = 0;
    /// Interrupt enable, divisor latch high.
    pub(super) const IER: u64 = 1;
    /// Interrupt identification (read), FIFO control (write).
    pub(super) const IIR_FCR: u64 = 2;
    pub(super) const LCR: u64 = 3;
    pub(super) const MCR: u64 = 4;
    pub(super) const LSR: u64 = 5;
    pub(super) const MSR: u64 = 6;
    pub(super) const SCR: u64 = 7;

    pub(super) const IER_RECEIVE: u8 = 1 << 0;
    pub(super) const IER_TRANSMIT: u8 = 1 << 1;
    pub(super) const IER_LINE_STATUS: u8 = 1 << 2;
    /// The bits that exist; the modem lines (bit 3) never change, so their interrupt never comes.
    pub(super) const IER_MASK: u8 = 0x0f;

    // Interrupt identification, highest priority first.
    pub(super) const IIR_LINE_STATUS: u8 = 0x06;
    pub(super) const IIR_RECEIVE: u8 = 0x04;
    pub(super) const IIR_TIMEOUT: u8 = 0x0c;
    pub(super) const IIR_TRANSMIT: u8 = 0x02;
    pub(super) const IIR_NONE: u8 = 0x01;
    pub(super) const IIR_FIFOS_ENABLED: u8 = 0xc0;

    pub(super) const FCR_ENABLE: u8 = 1 << 0;
    pub(super) const FCR_CLEAR_RECEIVE: u8 = 1 << 1;
    pub(super) const FCR_TRIGGER_SHIFT: u8 = 6;

    pub(super) const LCR_DLAB: u8 = 1 << 7;

    pub(super) const MCR_DTR: u8 = 1 << 0;
    pub(super) const MCR_RTS: u8 = 1 << 1;
    pub(super) const MCR_OUT1: u8 = 1 << 2;
    pub(super) const MCR_OUT2: u8 = 1 << 3;
    pub(super) const MCR_LOOPBACK: u8 = 1 << 4;
    pub(super) const MCR_MASK: u8 = 0x1f;

    pub(super) const LSR_DATA_READY: u8 = 1 << 0;
    pub(super) const LSR_OVERRUN: u8 = 1 << 1;
    /// The character at the front of the FIFO is a break.
    pub(super) const LSR_BREAK: u8 = 1 << 4;
    /// Transmit holding register empty.
    pub(super) const LSR_THRE: u8 = 1 << 5;
    /// Transmitter empty as well.
    pub(super) const LSR_TEMT: u8 = 1 << 6;

    pub(super) const MSR_CTS: u8 = 1 << 4;
    pub(super) const MSR_DSR: u8 = 1 << 5;
    pub(super) const MSR_RI: u8 = 1 << 6;
    pub(super) const MSR_DCD: u8 = 1 << 7;

    /// 9600 baud, where firmware would leave it.
    pub(super) const DIVISOR_AFTER_RESET: u16 = 12;
}

/// A character in the receive FIFO.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Received {
    byte: u8,
    /// It is a break, and the guest has not been told: § 8.4, LSR 4.
    is_break: bool,
}

impl From<u8> for Received {
    fn from(byte: u8) -> Self {
        Self {
            byte,
            is_break: false,
        }
    }
}

/// What the guest can see, and what is on its way, as plain data.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    ier: u8,
    /// FCR is write-only to the guest; bit 0 and the trigger level are kept.
    fcr: u8,
    lcr: u8,
    mcr: u8,
    scr: u8,
    divisor: u16,
    rx: VecDeque<Received>,
    /// A byte came while the receive FIFO was full (in loopback: the host never sends too much).
    overrun: bool,
    /// The transmitter has become empty, and the guest has not been told yet.
    transmit_pending: bool,
    /// The guest has been shown a busy transmitter; the host has yet to say that there is room again.
    waiting_for_room: bool,
    /// The host holds input that did not fit and wants a kick when there is room. Not saved: the host that restores the VM may
    /// hold some.
    #[serde(skip, default = "yes")]
    input_held_back: bool,
    /// Bytes that the guest sent while the transmitter was busy, and that are lost.
    dropped: u64,
}

fn yes() -> bool {
    true
}

/// Causes of an interrupt, as a set.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Causes {
    line_status: bool,
    receive: bool,
    transmit: bool,
}

/// The UART.
pub struct Serial {
    state: State,
    /// As of the last [`Serial::update`].
    causes: Causes,
    irq: IrqLine,
    output: Box<dyn ConsoleOutput>,
    input_ready: Kick,
}

impl Serial {
    /// A UART that interrupts on `irq` and sends to `output`. [`ConsoleDevice`] says what `input_ready`, the kick, is.
    pub fn new(irq: IrqLine, output: Box<dyn ConsoleOutput>, input_ready: Kick) -> Self {
        let state = State {
            divisor: spec::DIVISOR_AFTER_RESET,
            // The host may have had input before this UART existed.
            input_held_back: true,
            ..State::default()
        };
        Self {
            state,
            causes: Causes::default(),
            irq,
            output,
            input_ready,
        }
    }

    /// How many bytes were lost because the guest sent them without waiting for room.
    pub fn dropped(&self) -> u64 {
        self.state.dropped
    }

    fn room(&self) -> usize {
        let listens =
            self.state.ier & spec::IER_RECEIVE != 0 && self.state.mcr & spec::MCR_RTS != 0;
        if !listens || self.loopback() {
            return 0;
        }
        self.rx_capacity().saturating_sub(self.state.rx.len())
    }

    fn rx_capacity(&self) -> usize {
        if self.fifos_enabled() { FIFO_LEN } else { 1 }
    }

    fn fifos_enabled(&self) -> bool {
        self.state.fcr & spec::FCR_ENABLE != 0
    }

    fn loopback(&self) -> bool {
        self.state.mcr & spec::MCR_LOOPBACK != 0
    }

    fn dlab(&self) -> bool {
        self.state.lcr & spec::LCR_DLAB != 0
    }

    /// Whether the guest may send. In loopback the host's side does not matter.
    fn transmitter_empty(&mut self) -> bool {
        if self.loopback() || self.output.has_room() {
            return true;
        }
        self.state.waiting_for_room = true;
        false
    }

    /// Bytes in the receive FIFO at which it interrupts.
    fn trigger_level(&self) -> usize {
        match (
            self.fifos_enabled(),
            self.state.fcr >> spec::FCR_TRIGGER_SHIFT,
        ) {
            (false, _) | (true, 0) => 1,
            (true, 1) => 4,
            (true, 2) => 8,
            (true, _) => 14,
        }
    }

    fn current_causes(&self) -> Causes {
        let enabled = |bit| self.state.ier & bit != 0;
        Causes {
            line_status: enabled(spec::IER_LINE_STATUS)
                && (self.state.overrun || self.state.rx.front().is_some_and(|c| c.is_break)),
            receive: enabled(spec::IER_RECEIVE) && !self.state.rx.is_empty(),
            transmit: enabled(spec::IER_TRANSMIT) && self.state.transmit_pending,
        }
    }

    /// To be called after any change of the registers: signals the interrupt for each cause that became active (a spurious
    /// interrupt is better than a lost one), and kicks the host if it holds input.
    fn update(&mut self) {
        let (old, new) = (self.causes, self.current_causes());
        self.causes = new;
        if new.line_status && !old.line_status
            || new.receive && !old.receive
            || new.transmit && !old.transmit
        {
            self.irq.signal();
        }
        // Only when the FIFO is empty, so that the host delivers 16 bytes at a time.
        if self.state.input_held_back && self.state.rx.is_empty() && self.room() > 0 {
            self.state.input_held_back = false;
            (self.input_ready)();
        }
    }

    fn transmit(&mut self, byte: u8) {
        // A write clears the cause, which becomes active again at once: an edge if the guest had acknowledged it.
        if self.loopback() {
            if self.state.rx.len() < self.rx_capacity() {
                self.state.rx.push_back(byte.into());
            } else {
                self.state.overrun = true;
            }
            self.state.transmit_pending = true;
            return;
        }
        if self.output.write(&[byte]) == 0 {
            self.state.dropped = self.state.dropped.saturating_add(1);
        }
        self.state.transmit_pending = self.transmitter_empty();
    }

    fn interrupt_identification(&mut self) -> u8 {
        let causes = self.current_causes();
        let id = if causes.line_status {
            spec::IIR_LINE_STATUS
        } else if causes.receive && self.state.rx.len() >= self.trigger_level() {
            spec::IIR_RECEIVE
        } else if causes.receive {
            // Bytes take no time, so neither does the wait for four characters' time.
            spec::IIR_TIMEOUT
        } else if causes.transmit {
            // Reading it is the acknowledgement.
            self.state.transmit_pending = false;
            spec::IIR_TRANSMIT
        } else {
            spec::IIR_NONE
        };
        if self.fifos_enabled() {
            id | spec::IIR_FIFOS_ENABLED
        } else {
            id
        }
    }

    fn line_status(&mut self) -> u8 {
        let mut lsr = 0;
        if let Some(front) = self.state.rx.front_mut() {
            lsr |= spec::LSR_DATA_READY;
            if std::mem::take(&mut front.is_break) {
                lsr |= spec::LSR_BREAK;
            }
        }
        if std::mem::take(&mut self.state.overrun) {
            lsr |= spec::LSR_OVERRUN;
        }
        if self.transmitter_empty() {
            lsr |= spec::LSR_THRE | spec::LSR_TEMT;
        }
        lsr
    }

    /// The modem lines: a peer that is always there, or in loopback the guest's own outputs.
    fn modem_status(&self) -> u8 {
        if !self.loopback() {
            return spec::MSR_CTS | spec::MSR_DSR | spec::MSR_DCD;
        }
        [
            (spec::MCR_RTS, spec::MSR_CTS),
            (spec::MCR_DTR, spec::MSR_DSR),
            (spec::MCR_OUT1, spec::MSR_RI),
            (spec::MCR_OUT2, spec::MSR_DCD),
        ]
        .iter()
        .filter(|(output, _)| self.state.mcr & output != 0)
        .fold(0, |msr, (_, input)| msr | input)
    }

    fn read_register(&mut self, offset: u64) -> u8 {
        let [divisor_low, divisor_high] = self.state.divisor.to_le_bytes();
        let value = match offset {
            spec::DATA if self.dlab() => divisor_low,
            spec::DATA => self.state.rx.pop_front().unwrap_or_default().byte,
            spec::IER if self.dlab() => divisor_high,
            spec::IER => self.state.ier,
            spec::IIR_FCR => self.interrupt_identification(),
            spec::LCR => self.state.lcr,
            spec::MCR => self.state.mcr,
            spec::LSR => self.line_status(),
            spec::MSR => self.modem_status(),
            spec::SCR => self.state.scr,
            _ => 0xff,
        };
        self.update();
        value
    }

    fn write_register(&mut self, offset: u64, value: u8) {
        let [divisor_low, divisor_high] = self.state.divisor.to_le_bytes();
        match offset {
            spec::DATA if self.dlab() => {
                self.state.divisor = u16::from_le_bytes([value, divisor_high])
            }
            spec::DATA => self.transmit(value),
            spec::IER if self.dlab() => {
                self.state.divisor = u16::from_le_bytes([divisor_low, value])
            }
            spec::IER => self.enable_interrupts(value & spec::IER_MASK),
            spec::IIR_FCR => self.control_fifos(value),
            spec::LCR => self.state.lcr = value,
            spec::MCR => self.state.mcr = value & spec::MCR_MASK,
            spec::SCR => self.state.scr = value,
            // LSR and MSR are read-only.
            _ => {}
        }
        self.update();
    }

    /// Enabling the transmit interrupt while the transmitter is empty raises it at once; Linux starts sending that way.
    fn enable_interrupts(&mut self, ier: u8) {
        let newly = ier & !self.state.ier;
        self.state.ier = ier;
        if newly & spec::IER_TRANSMIT != 0 {
            self.state.transmit_pending = self.transmitter_empty();
        }
    }

    /// Unlike the real one, switching the FIFOs on or off loses no received byte unless the guest asks to clear them:
    /// Linux switches them on after it has enabled the receive interrupt, when input may already have come.
    fn control_fifos(&mut self, fcr: u8) {
        // Without the enable bit, the others are not programmed.
        let enabled = fcr & spec::FCR_ENABLE != 0;
        self.state.fcr = if enabled {
            fcr & (spec::FCR_ENABLE | 0b11 << spec::FCR_TRIGGER_SHIFT)
        } else {
            0
        };
        if enabled && fcr & spec::FCR_CLEAR_RECEIVE != 0 {
            self.state.rx.clear();
        }
    }
}

impl ConsoleDevice for Serial {
    /// Room in the receive FIFO, 0 until the guest has enabled the receive interrupt and raised RTS. RTS tells a driver that
    /// has opened the port from one that probes it: Linux's enables every interrupt for a moment to identify the UART, then
    /// discards what it received. (DTR is up by then, for the kernel's console.)
    fn rx_space(&mut self) -> usize {
        let room = self.room();
        self.state.input_held_back |= room == 0;
        room
    }

    fn receive(&mut self, bytes: &[u8]) -> usize {
        let accepted = self.rx_space().min(bytes.len());
        let accepted_bytes = bytes.iter().take(accepted).copied();
        self.state.rx.extend(accepted_bytes.map(Received::from));
        self.state.input_held_back |= accepted < bytes.len();
        self.update();
        accepted
    }

    /// A break is a zero with a bit in the line status.
    fn send_break(&mut self) -> bool {
        if self.rx_space() == 0 {
            return false;
        }
        self.state.rx.push_back(Received {
            byte: 0,
            is_break: true,
        });
        self.update();
        true
    }

    fn on_tx_space(&mut self) {
        if self.state.waiting_for_room && self.output.has_room() {
            self.state.waiting_for_room = false;
            self.state.transmit_pending = true;
            self.update();
        }
    }
}

impl BusDevice for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        read_bytes(offset, data, |offset| self.read_register(offset));
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        write_bytes(offset, data, |offset, value| {
            self.write_register(offset, value)
        });
    }
}

impl SaveState for Serial {
    fn save(&self) -> Result<Box<Record>, StateError> {
        // The causes follow from the registers.
        let Self {
            state,
            causes: _,
            irq: _,
            output: _,
            input_ready: _,
        } = self;
        to_record(STATE_VERSION, state)
    }

    fn restore(&mut self, record: &Record) -> Result<(), StateError> {
        let state: State = from_record(STATE_VERSION, record)?;
        if state.rx.len() > FIFO_LEN {
            let why = format!("holds {} bytes of {FIFO_LEN} at most", state.rx.len());
            return Err(StateError::value("rx", why));
        }
        let fcr_mask = spec::FCR_ENABLE | 0b11 << spec::FCR_TRIGGER_SHIFT;
        for (field, value, mask) in [
            ("ier", state.ier, spec::IER_MASK),
            ("fcr", state.fcr, fcr_mask),
            ("mcr", state.mcr, spec::MCR_MASK),
        ] {
            if value & !mask != 0 {
                return Err(StateError::value(
                    field,
                    format!("has unknown bits: {value:#x}"),
                ));
            }
        }
        self.state = state;
        self.causes = Causes::default();
        Ok(())
    }
}

impl Suspend for Serial {
    /// After a restore, each cause that the guest has not acknowledged interrupts once more.
    fn resume(&mut self) -> bool {
        self.on_tx_space();
        self.update();
        true
    }
}
