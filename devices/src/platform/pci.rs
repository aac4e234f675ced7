//! A PCI bus without devices: configuration mechanism #1 (PCI Local Bus Specification 3.0, § 3.2.2.3.2), and the reset control
//! register that PC chipsets have among its ports.
//!
//! Without a configuration mechanism, Linux logs "PCI: Fatal: No config space access function found" to the console, whatever
//! its `pci=` option.

use crate::bus::BusDevice;
use crate::event::{EventSink, GuestEvent};
use crate::state::{Record, SaveState, StateError, Suspend, from_record, to_record};

/// Version of the saved state.
const STATE_VERSION: u32 = 1;

/// Length of the port range, in bytes.
pub const LEN: u64 = 8;

/// Offset of CONFIG_ADDRESS from port 0xcf8. It accepts only 32-bit accesses. CONFIG_DATA, behind it, reads as ones: the bus
/// has no devices.
const CONFIG_ADDRESS: u64 = 0;
/// Offset of the reset control register, a byte (Intel ICH9 data sheet, § 13.7.5).
const RESET_CONTROL: u64 = 1;
/// Its bit that resets the processor.
const RESET_CPU: u8 = 1 << 2;

/// The registers at ports 0xcf8 to 0xcff.
pub struct PciConfig {
    address: [u8; 4],
    events: EventSink,
}

impl PciConfig {
    /// A device that reports [`GuestEvent::Reset`].
    pub fn new(events: EventSink) -> Self {
        Self {
            address: [0; 4],
            events,
        }
    }
}

impl BusDevice for PciConfig {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match (offset, data.len()) {
            (CONFIG_ADDRESS, 4) => data.copy_from_slice(&self.address),
            (RESET_CONTROL, 1) => data.fill(0),
            _ => data.fill(0xff),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (CONFIG_ADDRESS, data) => {
                if let Ok(address) = data.try_into() {
                    self.address = address;
                }
            }
            (RESET_CONTROL, [value]) if value & RESET_CPU != 0 => (self.events)(GuestEvent::Reset),
            _ => {}
        }
    }
}

impl SaveState for PciConfig {
    fn save(&self) -> Result<Box<Record>, StateError> {
        let Self { address, events: _ } = self;
        to_record(STATE_VERSION, address)
    }

    fn restore(&mut self, record: &Record) -> Result<(), StateError> {
        self.address = from_record(STATE_VERSION, record)?;
        Ok(())
    }
}

impl Suspend for PciConfig {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::testing::{events, hammer, inb};

    #[test]
    fn the_mechanism_is_there_and_finds_no_device() {
        let (sink, seen) = events();
        let mut dev = PciConfig::new(sink);
        let mut data = [0; 4];
        // What pci_check_type1 does (Linux, arch/x86/pci/direct.c).
        dev.write(3, &[1]);
        dev.write(0, &0x8000_0000u32.to_le_bytes());
        dev.read(0, &mut data);
        assert_eq!(u32::from_le_bytes(data), 0x8000_0000);
        dev.read(4, &mut data);
        assert_eq!(u32::from_le_bytes(data), u32::MAX);
        // Narrower accesses do not reach the register.
        dev.write(0, &[1, 2]);
        dev.read(0, &mut data);
        assert_eq!(u32::from_le_bytes(data), 0x8000_0000);
        assert_eq!(inb(&mut dev, 0), 0xff);
        assert!(seen.lock().unwrap().is_empty());
    }

    #[test]
    fn the_reset_bit_resets() {
        let (sink, seen) = events();
        let mut dev = PciConfig::new(sink);
        assert_eq!(inb(&mut dev, 1), 0);
        dev.write(1, &[2]);
        assert!(seen.lock().unwrap().is_empty());
        dev.write(1, &[6]);
        assert_eq!(*seen.lock().unwrap(), [GuestEvent::Reset]);
        hammer(&mut dev, LEN);
    }
}
