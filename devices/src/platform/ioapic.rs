//! The I/O APIC's register model (Intel 82093AA data sheet, § 3).
//!
//! It only translates redirection entries into MSI routes, see [`MsiRoutes`]. An interrupt line sends the MSI of its pin
//! straight to the local APIC. Lines are edge-triggered: remote IRR is never set, and an EOI needs no action.

use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;
use crate::state::{Record, SaveState, StateError, Suspend, from_record, to_record};

/// Version of the saved state.
const STATE_VERSION: u32 = 1;

/// Interrupt input pins.
pub const PINS: u32 = 24;
/// Length of the MMIO range, in bytes.
pub const LEN: u64 = 0x1000;

mod spec {
    /// Index register.
    pub(super) const IOREGSEL: u64 = 0x00;
    /// Data register.
    pub(super) const IOWIN: u64 = 0x10;

    pub(super) const INDEX_ID: u8 = 0x00;
    pub(super) const INDEX_VERSION: u8 = 0x01;
    pub(super) const INDEX_ARBITRATION: u8 = 0x02;
    /// First of the redirection entries, two registers each, low half first.
    pub(super) const INDEX_REDIRECTION: u8 = 0x10;

    /// The 82093AA's version. 0x20 and later would have an EOI register.
    pub(super) const VERSION: u32 = 0x11;
    /// ID: bits 27:24.
    pub(super) const ID_MASK: u32 = 0x0f00_0000;

    pub(super) const VECTOR_MASK: u64 = 0xff;
    pub(super) const DELIVERY_MODE_SHIFT: u32 = 8;
    pub(super) const DELIVERY_MODE_MASK: u64 = 0b111;
    pub(super) const DESTINATION_LOGICAL: u64 = 1 << 11;
    pub(super) const TRIGGER_LEVEL: u64 = 1 << 15;
    pub(super) const MASKED: u64 = 1 << 16;
    pub(super) const DESTINATION_SHIFT: u32 = 56;
    /// What a write can change: vector, delivery and destination mode, polarity (13), trigger mode, mask; destination.
    /// Not the delivery status (12) and the remote IRR (14), nor the reserved bits.
    pub(super) const WRITABLE: u64 = 0xff00_0000_0001_afff;
}

/// A message-signalled interrupt, in the format of SDM vol. 3 § 11.11.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Msi {
    /// Where the message is written: 0xfee.....
    pub address: u64,
    /// What is written.
    pub data: u32,
}

impl Msi {
    /// Address bits 31:20 of every message.
    const ADDRESS_BASE: u64 = 0xfee0_0000;
    const ADDRESS_DESTINATION_SHIFT: u32 = 12;
    const ADDRESS_LOGICAL: u64 = 1 << 2;
    const DATA_ASSERT: u32 = 1 << 14;
    const DATA_LEVEL: u32 = 1 << 15;

    /// The MSI for a redirection entry. `None` if the entry is masked, or if its delivery mode cannot be sent as an MSI:
    /// ExtINT (there is no 8259 to supply the vector) and the reserved modes.
    fn from_entry(entry: u64) -> Option<Self> {
        let delivery_mode = (entry >> spec::DELIVERY_MODE_SHIFT) & spec::DELIVERY_MODE_MASK;
        if entry & spec::MASKED != 0 || matches!(delivery_mode, 0b011 | 0b110 | 0b111) {
            return None;
        }
        let destination = entry >> spec::DESTINATION_SHIFT;
        let mut address = Self::ADDRESS_BASE | (destination << Self::ADDRESS_DESTINATION_SHIFT);
        if entry & spec::DESTINATION_LOGICAL != 0 {
            address |= Self::ADDRESS_LOGICAL;
        }
        let mut data =
            ((entry & spec::VECTOR_MASK) | (delivery_mode << spec::DELIVERY_MODE_SHIFT)) as u32;
        if entry & spec::TRIGGER_LEVEL != 0 {
            data |= Self::DATA_LEVEL | Self::DATA_ASSERT;
        }
        Some(Self { address, data })
    }
}

/// Where the MSI routes that the guest programs go.
pub trait MsiRoutes: Send {
    /// From now on, an edge on `pin` sends `msi`. `None` means masked: an edge stays pending. Called only when the route
    /// changes, with the I/O APIC locked. All pins start masked.
    fn set_route(&mut self, pin: u32, msi: Option<Msi>);

    /// The masked pins at which an edge is pending, a bit each.
    fn pending(&self) -> u32;

    /// Makes an edge pending at these pins, all of them masked.
    fn set_pending(&mut self, pins: u32);
}

/// What the guest can see, as plain data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    index: u8,
    id: u32,
    entries: [u64; PINS as usize],
}

/// The I/O APIC.
pub struct Ioapic {
    state: State,
    router: Box<dyn MsiRoutes>,
}

impl Ioapic {
    /// An I/O APIC after reset: all pins masked.
    pub fn new(router: Box<dyn MsiRoutes>) -> Self {
        Self {
            state: State {
                index: 0,
                id: 0,
                entries: [spec::MASKED; PINS as usize],
            },
            router,
        }
    }

    fn read_register(&self) -> u32 {
        match self.state.index {
            spec::INDEX_ID | spec::INDEX_ARBITRATION => self.state.id,
            spec::INDEX_VERSION => spec::VERSION | ((PINS - 1) << 16),
            index => match self.entry(index) {
                Some((_, entry, shift)) => (entry >> shift) as u32,
                None => 0,
            },
        }
    }

    fn write_register(&mut self, value: u32) {
        let index = self.state.index;
        if index == spec::INDEX_ID {
            self.state.id = value & spec::ID_MASK;
        } else if let Some((pin, old, shift)) = self.entry(index) {
            let written = (old & !(u64::from(u32::MAX) << shift)) | (u64::from(value) << shift);
            let new = written & spec::WRITABLE;
            if let Some(entry) = self.state.entries.get_mut(pin) {
                *entry = new;
            }
            let route = Msi::from_entry(new);
            if route != Msi::from_entry(old) {
                self.router.set_route(pin as u32, route);
            }
        }
    }

    /// The redirection entry for a register index: pin, value, and the bit at which the register starts.
    fn entry(&self, index: u8) -> Option<(usize, u64, u32)> {
        let register = index.checked_sub(spec::INDEX_REDIRECTION)?;
        let pin = usize::from(register / 2);
        let entry = self.state.entries.get(pin)?;
        Some((pin, *entry, u32::from(register % 2) * 32))
    }
}

impl BusDevice for Ioapic {
    /// Registers are 32 bits wide. Other widths read the bytes that exist, and zeros.
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        super::read_bytes(offset, data, |offset| {
            let register = match offset & !3 {
                spec::IOREGSEL => u32::from(self.state.index),
                spec::IOWIN => self.read_register(),
                _ => 0,
            };
            (register >> ((offset & 3) * 8)) as u8
        });
    }

    /// Only a write at the start of a register has an effect. Narrower values are zero-extended, as in KVM's I/O APIC.
    fn write(&mut self, offset: u64, data: &[u8]) {
        let Some(low) = data.first() else { return };
        match offset {
            spec::IOREGSEL => self.state.index = *low,
            spec::IOWIN => {
                let value = data
                    .iter()
                    .take(4)
                    .rev()
                    .fold(0, |value, byte| (value << 8) | u32::from(*byte));
                self.write_register(value);
            }
            _ => {}
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Saved {
    registers: State,
    pending: u32,
}

impl SaveState for Ioapic {
    fn save(&self) -> Result<Box<Record>, StateError> {
        let Self { state, router } = self;
        let saved = Saved {
            registers: state.clone(),
            pending: router.pending(),
        };
        to_record(STATE_VERSION, saved)
    }

    fn restore(&mut self, record: &Record) -> Result<(), StateError> {
        let Saved { registers, pending } = from_record(STATE_VERSION, record)?;
        if registers.id & !spec::ID_MASK != 0 {
            return Err(StateError::value("id", format!("is {:#x}", registers.id)));
        }
        let mut routed = 0;
        for (pin, entry) in (0..).zip(&registers.entries) {
            if entry & !spec::WRITABLE != 0 {
                let why = format!("has reserved bits at pin {pin}: {entry:#x}");
                return Err(StateError::value("entries", why));
            }
            routed |= u32::from(Msi::from_entry(*entry).is_some()) << pin;
        }
        if pending >> PINS != 0 || pending & routed != 0 {
            let why = format!("has pins that are not masked or do not exist: {pending:#x}");
            return Err(StateError::value("pending", why));
        }
        for (pin, entry) in (0..).zip(&registers.entries) {
            self.router.set_route(pin, Msi::from_entry(*entry));
        }
        self.router.set_pending(pending);
        self.state = registers;
        Ok(())
    }
}

impl Suspend for Ioapic {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::testing::hammer;
    use proptest::prelude::*;
    use std::sync::{Arc, Mutex};

    type Routes = Arc<Mutex<Vec<(u32, Option<Msi>)>>>;

    struct Recorder(Routes);

    impl MsiRoutes for Recorder {
        fn set_route(&mut self, pin: u32, msi: Option<Msi>) {
            assert!(pin < PINS);
            self.0.lock().unwrap().push((pin, msi));
        }

        fn pending(&self) -> u32 {
            0
        }

        fn set_pending(&mut self, pins: u32) {
            assert_eq!(pins, 0);
        }
    }

    fn ioapic() -> (Ioapic, Routes) {
        let routes = Routes::default();
        (Ioapic::new(Box::new(Recorder(routes.clone()))), routes)
    }

    fn read(dev: &mut Ioapic, index: u8) -> u32 {
        let mut data = [0; 4];
        dev.write(0, &u32::from(index).to_le_bytes());
        dev.read(0x10, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(dev: &mut Ioapic, index: u8, value: u32) {
        dev.write(0, &u32::from(index).to_le_bytes());
        dev.write(0x10, &value.to_le_bytes());
    }

    #[test]
    fn after_reset_it_is_an_82093aa_with_all_pins_masked() {
        let (mut dev, routes) = ioapic();
        assert_eq!(read(&mut dev, 1), 0x0017_0011);
        for pin in 0..24 {
            assert_eq!(read(&mut dev, 0x10 + 2 * pin), 0x10000);
            assert_eq!(read(&mut dev, 0x11 + 2 * pin), 0);
        }
        assert_eq!(read(&mut dev, 0x40), 0);
        assert!(routes.lock().unwrap().is_empty());
    }

    #[test]
    fn the_id_keeps_four_bits_and_the_version_none() {
        let (mut dev, _) = ioapic();
        write(&mut dev, 0, u32::MAX);
        write(&mut dev, 1, 0);
        write(&mut dev, 2, 0);
        assert_eq!(read(&mut dev, 0), 0x0f00_0000);
        assert_eq!(read(&mut dev, 2), 0x0f00_0000);
        assert_eq!(read(&mut dev, 1), 0x0017_0011);
    }

    #[test]
    fn an_entry_becomes_a_route_only_when_it_changes() {
        let (mut dev, routes) = ioapic();
        write(&mut dev, 0x19, 3 << 24);
        assert!(routes.lock().unwrap().is_empty(), "masked");
        // Pin 4, fixed, physical, edge, vector 0x31, processor 3.
        write(&mut dev, 0x18, 0x31);
        let msi = Some(Msi {
            address: 0xfee0_3000,
            data: 0x31,
        });
        assert_eq!(*routes.lock().unwrap(), [(4, msi)]);
        write(&mut dev, 0x18, 0x31);
        // An MSI has no polarity.
        write(&mut dev, 0x18, 0x2031);
        assert_eq!(routes.lock().unwrap().len(), 1);
        write(&mut dev, 0x18, 0x1_2031);
        assert_eq!(routes.lock().unwrap().last(), Some(&(4, None)));
        // Logical, lowest priority, level.
        write(&mut dev, 0x18, 0x8000 | 0x800 | 0x100 | 0x42);
        let msi = Some(Msi {
            address: 0xfee0_3004,
            data: 0xc142,
        });
        assert_eq!(routes.lock().unwrap().last(), Some(&(4, msi)));
        assert_eq!(routes.lock().unwrap().len(), 3);
    }

    #[test]
    fn read_only_and_reserved_bits_do_not_stick() {
        let (mut dev, _) = ioapic();
        write(&mut dev, 0x10, u32::MAX);
        write(&mut dev, 0x11, u32::MAX);
        assert_eq!(read(&mut dev, 0x10), 0x1_afff);
        assert_eq!(read(&mut dev, 0x11), 0xff00_0000);
    }

    #[test]
    fn modes_that_no_message_carries_have_no_route() {
        let (mut dev, routes) = ioapic();
        for mode in [3, 6, 7] {
            write(&mut dev, 0x10, mode << 8 | 0x30);
        }
        assert!(routes.lock().unwrap().is_empty());
        write(&mut dev, 0x10, 4 << 8);
        assert_eq!(
            *routes.lock().unwrap(),
            [(
                0,
                Some(Msi {
                    address: 0xfee0_0000,
                    data: 0x400
                })
            )]
        );
    }

    #[test]
    fn odd_accesses_are_answered() {
        let (mut dev, _) = ioapic();
        write(&mut dev, 1, 0);
        let mut byte = [0];
        dev.read(0x12, &mut byte);
        assert_eq!(byte, [0x17]);
        let mut wide = [0xaa; 8];
        dev.read(0x10, &mut wide);
        assert_eq!(wide, [0x11, 0, 0x17, 0, 0, 0, 0, 0]);
        dev.write(0, &[0x10]);
        dev.write(0x10, &[0x55]);
        assert_eq!(read(&mut dev, 0x10), 0x55);
        dev.write(0x12, &[0xff]);
        dev.write(0x40, &[0x55, 0, 0, 0]);
        assert_eq!(read(&mut dev, 0x10), 0x55);
        hammer(&mut dev, 0x100);
    }

    proptest! {
        /// Whatever is written, the routes reported last are those that the entries stand for.
        #[test]
        fn routes_follow_the_entries(
            ops in proptest::collection::vec((0u8..0x50, any::<u32>()), 0..200),
        ) {
            let (mut dev, routes) = ioapic();
            for (index, value) in ops {
                write(&mut dev, index, value);
            }
            let mut current = [None; PINS as usize];
            for (pin, msi) in routes.lock().unwrap().iter() {
                prop_assert_ne!(current[*pin as usize], *msi);
                current[*pin as usize] = *msi;
            }
            for (pin, route) in current.iter().enumerate() {
                prop_assert_eq!(*route, Msi::from_entry(dev.state.entries[pin]));
                prop_assert_eq!(dev.state.entries[pin] & !spec::WRITABLE, 0);
            }
        }

        #[test]
        fn no_access_panics(
            ops in proptest::collection::vec((any::<bool>(), 0u64..0x50, proptest::collection::vec(any::<u8>(), 0..10)), 0..200),
        ) {
            let (mut dev, _) = ioapic();
            for (is_write, offset, mut data) in ops {
                if is_write {
                    dev.write(offset, &data);
                } else {
                    dev.read(offset, &mut data);
                }
            }
        }
    }
}
