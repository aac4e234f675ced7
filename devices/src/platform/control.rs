//! Two ports of minivmm's own, one byte each: the guest's exit status and its boot marks.
//!
//! A wider access counts as its first byte: `outl` of a status reports one event, not four.

use crate::bus::BusDevice;
use crate::event::{EventSink, GuestEvent};

/// Length of each port's range, in bytes.
pub const PORT_LEN: u64 = 1;

/// The exit port: the byte written is the workload's status, as `docker run` gives it. Reads as 0xff.
pub struct ExitPort(EventSink);

impl ExitPort {
    /// A port that reports [`GuestEvent::Exit`].
    pub fn new(events: EventSink) -> Self {
        Self(events)
    }
}

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

/// The boot-mark port: the VMM time-stamps each byte written. Reads as 0xff.
pub struct BootMarkPort(EventSink);

impl BootMarkPort {
    /// A port that reports [`GuestEvent::BootMark`].
    pub fn new(events: EventSink) -> Self {
        Self(events)
    }
}

impl BusDevice for BootMarkPort {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (0, Some(mark)) = (offset, data.first()) {
            (self.0)(GuestEvent::BootMark(*mark));
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
        let mut exit = ExitPort::new(sink.clone());
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
        hammer(&mut exit, PORT_LEN);
        hammer(&mut mark, PORT_LEN);
    }
}
