//! The power registers of hardware-reduced ACPI (ACPI 6.5 § 4.8.3.7 and § 4.8.3.6): how Linux powers off and resets.

use super::{read_bytes, write_bytes};
use crate::bus::BusDevice;
use crate::event::{EventSink, GuestEvent};
use crate::state::{Record, SaveState, StateError, Suspend, from_record, to_record};

/// Version of the saved state.
const STATE_VERSION: u32 = 1;

/// Offset of SLEEP_CONTROL_REG.
pub const SLEEP_CONTROL_OFFSET: u64 = 0;
/// Offset of SLEEP_STATUS_REG.
pub const SLEEP_STATUS_OFFSET: u64 = 1;
/// Offset of RESET_REG.
pub const RESET_OFFSET: u64 = 2;
/// Length of the register block, in bytes.
pub const LEN: u64 = 3;

/// SLP_TYP of soft off: what `\_S5` in the DSDT must return.
pub const SLEEP_TYPE_S5: u8 = 5;
/// What the guest writes to the reset register: RESET_VALUE in the FADT.
pub const RESET_VALUE: u8 = 1;

/// SLEEP_CONTROL_REG: bits 4:2 are SLP_TYP.
const SLP_TYP_SHIFT: u8 = 2;
const SLP_TYP_MASK: u8 = 0b111;
/// SLEEP_CONTROL_REG: go to sleep now. Write only.
const SLP_EN: u8 = 1 << 5;

/// The sleep control, sleep status and reset registers, one byte each.
pub struct AcpiPower {
    events: EventSink,
    /// SLP_TYP as last written; SLP_EN reads as zero.
    sleep_control: u8,
}

impl AcpiPower {
    /// Registers that report [`GuestEvent::PowerOff`] and [`GuestEvent::Reset`].
    pub fn new(events: EventSink) -> Self {
        Self {
            events,
            sleep_control: 0,
        }
    }
}

impl BusDevice for AcpiPower {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        read_bytes(offset, data, |offset| match offset {
            SLEEP_CONTROL_OFFSET => self.sleep_control,
            // WAK_STS is set on waking up, and this machine never sleeps; the reset register is write-only.
            SLEEP_STATUS_OFFSET | RESET_OFFSET => 0,
            _ => 0xff,
        });
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        write_bytes(offset, data, |offset, value| match offset {
            SLEEP_CONTROL_OFFSET => {
                self.sleep_control = value & (SLP_TYP_MASK << SLP_TYP_SHIFT);
                let sleep_type = (value >> SLP_TYP_SHIFT) & SLP_TYP_MASK;
                if value & SLP_EN != 0 && sleep_type == SLEEP_TYPE_S5 {
                    (self.events)(GuestEvent::PowerOff);
                } else if value & SLP_EN != 0 {
                    log::debug!(
                        "the guest asked for sleep type {sleep_type}, which this machine does not have"
                    );
                }
            }
            RESET_OFFSET if value == RESET_VALUE => (self.events)(GuestEvent::Reset),
            _ => {}
        });
    }
}

impl SaveState for AcpiPower {
    fn save(&self) -> Result<Box<Record>, StateError> {
        let Self {
            events: _,
            sleep_control,
        } = self;
        to_record(STATE_VERSION, sleep_control)
    }

    fn restore(&mut self, record: &Record) -> Result<(), StateError> {
        let sleep_control: u8 = from_record(STATE_VERSION, record)?;
        if sleep_control & !(SLP_TYP_MASK << SLP_TYP_SHIFT) != 0 {
            let why = format!("has unknown bits: {sleep_control:#x}");
            return Err(StateError::value("sleep_control", why));
        }
        self.sleep_control = sleep_control;
        Ok(())
    }
}

impl Suspend for AcpiPower {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::testing::{events, hammer, inb};

    #[test]
    fn soft_off_needs_the_type_and_the_enable_bit() {
        let (sink, seen) = events();
        let mut dev = AcpiPower::new(sink);
        // Linux writes the type first, then the type with the enable bit.
        dev.write(SLEEP_CONTROL_OFFSET, &[SLEEP_TYPE_S5 << 2]);
        assert_eq!(inb(&mut dev, SLEEP_CONTROL_OFFSET), SLEEP_TYPE_S5 << 2);
        for other in (0..8).filter(|t| *t != SLEEP_TYPE_S5) {
            dev.write(SLEEP_CONTROL_OFFSET, &[other << 2 | SLP_EN]);
        }
        dev.write(SLEEP_STATUS_OFFSET, &[0xff]);
        assert!(seen.lock().unwrap().is_empty());
        dev.write(SLEEP_CONTROL_OFFSET, &[SLEEP_TYPE_S5 << 2 | SLP_EN]);
        assert_eq!(*seen.lock().unwrap(), [GuestEvent::PowerOff]);
        assert_eq!(inb(&mut dev, SLEEP_CONTROL_OFFSET) & SLP_EN, 0);
        assert_eq!(inb(&mut dev, SLEEP_STATUS_OFFSET), 0);
    }

    #[test]
    fn reset_needs_the_value() {
        let (sink, seen) = events();
        let mut dev = AcpiPower::new(sink);
        for value in [0, 2, 0xff] {
            dev.write(RESET_OFFSET, &[value]);
        }
        assert!(seen.lock().unwrap().is_empty());
        dev.write(RESET_OFFSET, &[RESET_VALUE]);
        assert_eq!(*seen.lock().unwrap(), [GuestEvent::Reset]);
        hammer(&mut dev, LEN);
    }
}
