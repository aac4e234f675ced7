//! Two ports of minivmm's own, one byte each: the guest's exit status and its boot marks.
//!
//! A wider access counts as its first byte: `outl` of a status reports one event, not four.
//!
//! Reads of the boot-mark port tell the guest of a restored VM who it is, and give it what a snapshot must not hold twice: random
//! bytes and the time. A guest whose process writes a mark, of which the VM is saved, reads it right behind that instruction:
//! nothing else of the guest that waits for this process can have run on the old state.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::bus::BusDevice;
use crate::event::{EventSink, GuestEvent};

/// Length of the exit port's range, in bytes.
pub const EXIT_PORT_LEN: u64 = 1;
/// Length of the boot-mark port's range, in bytes: room for an access of four bytes to its first.
pub const BOOT_MARK_PORT_LEN: u64 = 4;

/// The exit port: the byte written is the workload's status, as `docker run` gives it. Reads as 0xff.
pub struct ExitPort(pub EventSink);

impl BusDevice for ExitPort {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (0, Some(status)) = (offset, data.first()) {
            (self.0)(GuestEvent::Exit(*status));
        }
    }
}

/// What a restored VM's guest is told, by which it differs from others of the same snapshot.
pub struct Restored {
    /// How many restores lie between the boot and this VM.
    pub generation: u64,
    /// Random bytes that nobody else has.
    pub seed: [u8; 32],
    /// Which of the clones that were made at once it is.
    pub index: u32,
    /// The user's, at most [`MAX_ARGUMENT`] bytes.
    pub argument: Vec<u8>,
}

/// Longest argument of a restored VM in bytes.
pub const MAX_ARGUMENT: usize = 64 << 10;

/// What a restored VM's guest reads first.
const MAGIC: [u8; 4] = *b"MVM\x01";

impl Restored {
    /// What the guest reads, little-endian: the magic, the length of what follows, generation, wall time now in nanoseconds
    /// since 1970, seed, index, length of the argument and the argument. A later version may add fields behind it.
    fn stream(&self) -> Vec<u8> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let nanoseconds = now.map_or(0, |now| now.as_nanos() as u64);
        let argument = self.argument.get(..MAX_ARGUMENT).unwrap_or(&self.argument);
        let mut body = Vec::new();
        body.extend(self.generation.to_le_bytes());
        body.extend(nanoseconds.to_le_bytes());
        body.extend(self.seed);
        body.extend(self.index.to_le_bytes());
        body.extend((argument.len() as u32).to_le_bytes());
        body.extend(argument);
        [&MAGIC[..], &(body.len() as u32).to_le_bytes(), &body].concat()
    }

    /// What `read` finds at the port, in the guest, and the wall time; `None` in a VM that was not restored.
    pub fn read(mut read: impl FnMut(&mut [u8])) -> Option<(Self, u64)> {
        let mut head = [0; 8];
        read(&mut head);
        let length = u32::from_le_bytes(*head.strip_prefix(&MAGIC)?.first_chunk()?) as usize;
        let mut body = vec![0; Some(length).filter(|length| *length <= 2 * MAX_ARGUMENT)?];
        read(&mut body);
        let (generation, rest) = body.split_first_chunk()?;
        let (nanoseconds, rest) = rest.split_first_chunk()?;
        let (seed, rest) = rest.split_first_chunk()?;
        let (index, rest) = rest.split_first_chunk()?;
        let (length, argument) = rest.split_first_chunk()?;
        let length = u32::from_le_bytes(*length) as usize;
        let restored = Self {
            generation: u64::from_le_bytes(*generation),
            seed: *seed,
            index: u32::from_le_bytes(*index),
            argument: argument.get(..length)?.to_vec(),
        };
        Some((restored, u64::from_le_bytes(*nanoseconds)))
    }
}

/// What the boot-mark port has to say.
enum Message {
    /// Nothing, or no more.
    None,
    /// All of it. The time is taken when the guest begins to read.
    Unread(Restored),
    /// The rest.
    Rest(std::vec::IntoIter<u8>),
}

/// The boot-mark port: the VMM time-stamps each byte written. In a restored VM, reads give the bytes of [`Restored`] once, as many
/// as the access is wide; otherwise, and behind them, 0xff.
pub struct BootMarkPort {
    events: EventSink,
    message: Message,
}

impl BootMarkPort {
    /// A port that reports [`GuestEvent::BootMark`].
    pub fn new(events: EventSink) -> Self {
        Self {
            events,
            message: Message::None,
        }
    }

    /// Tells the guest that it was restored. It is no state: the next restore says it anew.
    pub fn set_restored(&mut self, restored: Restored) {
        self.message = Message::Unread(restored);
    }

    fn next_byte(&mut self) -> Option<u8> {
        if let Message::Unread(restored) = &self.message {
            self.message = Message::Rest(restored.stream().into_iter());
        }
        let Message::Rest(bytes) = &mut self.message else {
            return None;
        };
        let byte = bytes.next();
        if byte.is_none() {
            self.message = Message::None;
        }
        byte
    }
}

impl BusDevice for BootMarkPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let mut next = || if offset == 0 { self.next_byte() } else { None };
        data.fill_with(|| next().unwrap_or(0xff));
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (0, Some(mark)) = (offset, data.first()) {
            (self.events)(GuestEvent::BootMark(*mark));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::testing::{events, hammer, inb};

    #[test]
    fn a_byte_is_an_event_whatever_the_width() {
        let (sink, seen) = events();
        let mut exit = ExitPort(sink.clone());
        let mut mark = BootMarkPort::new(sink);
        exit.write(0, &[7]);
        exit.write(0, &[8, 0, 0, 0]);
        mark.write(0, &[1]);
        exit.write(1, &[9]);
        exit.write(0, &[]);
        assert_eq!(inb(&mut exit, 0), 0xff);
        assert_eq!(inb(&mut mark, 0), 0xff);
        assert_eq!(
            *seen.lock().unwrap(),
            [
                GuestEvent::Exit(7),
                GuestEvent::Exit(8),
                GuestEvent::BootMark(1)
            ]
        );
        hammer(&mut exit, EXIT_PORT_LEN);
        hammer(&mut mark, BOOT_MARK_PORT_LEN);
    }

    #[test]
    fn a_restored_guest_reads_who_it_is_once() {
        let mut port = BootMarkPort::new(events().0);
        assert_eq!(inb(&mut port, 0), 0xff);
        port.set_restored(Restored {
            generation: 3,
            seed: std::array::from_fn(|n| n as u8 + 100),
            index: 0x0102_0304,
            argument: b"one two".to_vec(),
        });
        let before = SystemTime::now();
        port.read(1, &mut [0; 3]);
        let mut read = |len| {
            let mut data = vec![0; len];
            port.read(0, &mut data);
            data
        };
        assert_eq!(read(1), [b'M']);
        assert_eq!(read(7), [b'V', b'M', 1, 63, 0, 0, 0]);
        assert_eq!(read(8), [3, 0, 0, 0, 0, 0, 0, 0]);
        let nanoseconds = u64::from_le_bytes(read(8).try_into().unwrap());
        let time = UNIX_EPOCH + std::time::Duration::from_nanos(nanoseconds);
        assert!(time >= before && time <= SystemTime::now());
        assert_eq!(read(32)[30..], [130, 131]);
        assert_eq!(read(8), [4, 3, 2, 1, 7, 0, 0, 0]);
        assert_eq!(read(9), *b"one two\xff\xff");
        assert_eq!(read(64), [0xff; 64]);
    }

    #[test]
    fn the_guest_reads_what_the_port_says() {
        let mut port = BootMarkPort::new(events().0);
        let read =
            |port: &mut BootMarkPort| Restored::read(|bytes| bytes.fill_with(|| inb(port, 0)));
        assert!(read(&mut port).is_none(), "a VM that booted");
        port.set_restored(Restored {
            generation: 9,
            seed: [7; 32],
            index: 5,
            // What is too long is cut.
            argument: vec![b'x'; MAX_ARGUMENT + 9],
        });
        let (restored, nanoseconds) = read(&mut port).unwrap();
        assert!(
            (restored.generation, restored.seed, restored.index) == (9, [7; 32], 5)
                && nanoseconds > 0
        );
        assert_eq!(restored.argument, [b'x'; MAX_ARGUMENT]);
        assert!(read(&mut port).is_none(), "it is said once");
        for cut in [8, 30, 71] {
            let (mut at, mut whole) = (0, port_stream());
            whole[4] = cut as u8 - 8;
            let cut = Restored::read(|bytes| {
                bytes.copy_from_slice(&whole[at..at + bytes.len()]);
                at += bytes.len();
            });
            assert!(cut.is_none());
        }
    }

    fn port_stream() -> Vec<u8> {
        let restored = Restored {
            generation: 1,
            seed: [0; 32],
            index: 0,
            argument: b"0123456789".to_vec(),
        };
        restored.stream()
    }
}
