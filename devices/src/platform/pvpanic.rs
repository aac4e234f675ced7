//! pvpanic: the guest kernel reports that it panicked (QEMU docs/specs/pvpanic.rst).

use super::{read_bytes, write_bytes};
use crate::bus::BusDevice;
use crate::event::{EventSink, GuestEvent};

/// Length of the port range, in bytes.
pub const PORT_LEN: u64 = 1;

/// Bit 0, in the byte read and in the byte written: the guest panicked.
const PANICKED: u8 = 1 << 0;

/// The pvpanic port. Reads tell which events are understood; Linux uses only those.
pub struct Pvpanic(pub EventSink);

impl BusDevice for Pvpanic {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        read_bytes(
            offset,
            data,
            |offset| if offset == 0 { PANICKED } else { 0xff },
        );
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        write_bytes(offset, data, |offset, value| {
            if offset == 0 && value & PANICKED != 0 {
                (self.0)(GuestEvent::Panicked);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::testing::{events, hammer, inb};

    #[test]
    fn only_the_panic_bit_is_an_event() {
        let (sink, seen) = events();
        let mut dev = Pvpanic(sink);
        assert_eq!(inb(&mut dev, 0), 1);
        dev.write(0, &[0]);
        dev.write(0, &[2]);
        assert!(seen.lock().unwrap().is_empty());
        dev.write(0, &[1]);
        dev.write(0, &[3, 0xff]);
        assert_eq!(
            *seen.lock().unwrap(),
            [GuestEvent::Panicked, GuestEvent::Panicked]
        );
        hammer(&mut dev, PORT_LEN);
    }
}
