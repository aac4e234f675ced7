//! As much of the PC keyboard controller as `reboot=k` needs: the reset command.
//!
//! Linux polls the status register for "input buffer empty" before it writes the command; all ones there would cost it
//! 131 ms, so the status is always zero: never busy, no data.

use super::{read_bytes, write_bytes};
use crate::bus::BusDevice;
use crate::event::{EventSink, GuestEvent};

/// Offset of the command (write) and status (read) register from the data register, port 0x60.
pub const COMMAND_OFFSET: u64 = 4;
/// Length of the port range, in bytes: 0x60 to 0x64.
pub const LEN: u64 = 5;

/// Pulse output line 0 of the controller, which is the processor's reset.
const COMMAND_RESET: u8 = 0xfe;

/// The keyboard controller without a keyboard.
pub struct I8042(pub EventSink);

impl BusDevice for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        read_bytes(offset, data, |offset| match offset {
            // Between data and command lie ports of other chips; port 0x61 reading 0 makes a kernel without kvm-clock
            // wait for ever in its TSC calibration, so they float like ports without a device.
            0 | COMMAND_OFFSET => 0,
            _ => 0xff,
        });
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        write_bytes(offset, data, |offset, value| {
            if offset == COMMAND_OFFSET && value == COMMAND_RESET {
                (self.0)(GuestEvent::Reset);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::testing::{events, hammer, inb};

    #[test]
    fn only_the_reset_command_is_an_event() {
        let (sink, seen) = events();
        let mut dev = I8042(sink);
        for offset in 0..COMMAND_OFFSET {
            dev.write(offset, &[COMMAND_RESET]);
        }
        for command in (0..=u8::MAX).filter(|c| *c != COMMAND_RESET) {
            dev.write(COMMAND_OFFSET, &[command]);
        }
        assert!(seen.lock().unwrap().is_empty());
        dev.write(COMMAND_OFFSET, &[COMMAND_RESET]);
        assert_eq!(*seen.lock().unwrap(), [GuestEvent::Reset]);
        hammer(&mut dev, LEN);
    }

    #[test]
    fn it_is_never_busy_and_has_no_data() {
        let mut dev = I8042(events().0);
        assert_eq!(inb(&mut dev, 0), 0);
        assert_eq!(inb(&mut dev, COMMAND_OFFSET), 0);
        assert_eq!(inb(&mut dev, 1), 0xff);
    }
}
