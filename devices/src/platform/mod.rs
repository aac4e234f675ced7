//! The few pre-virtio devices that a modern Linux guest still needs: a UART, an IOAPIC, and registers to end with.

pub mod control;
pub mod generation_id;
pub mod i8042;
pub mod ioapic;
pub mod pci;
pub mod power;
pub mod pvpanic;
pub mod serial;

/// Answers a read of any width with byte-wide registers, as the hardware does that splits it.
fn read_bytes(offset: u64, data: &mut [u8], mut register: impl FnMut(u64) -> u8) {
    for (offset, byte) in (offset..=u64::MAX).zip(data) {
        *byte = register(offset);
    }
}

/// Splits a write of any width over byte-wide registers.
fn write_bytes(offset: u64, data: &[u8], mut register: impl FnMut(u64, u8)) {
    for (offset, byte) in (offset..=u64::MAX).zip(data) {
        register(offset, *byte);
    }
}

#[cfg(test)]
mod state_tests;

#[cfg(test)]
mod testing {
    use std::sync::{Arc, Mutex};

    use crate::bus::BusDevice;
    use crate::event::{EventSink, GuestEvent};

    /// An event sink, and what it was told.
    pub(super) fn events() -> (EventSink, Arc<Mutex<Vec<GuestEvent>>>) {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = seen.clone();
        (Arc::new(move |event| log.lock().unwrap().push(event)), seen)
    }

    /// One byte, read.
    pub(super) fn inb(device: &mut dyn BusDevice, offset: u64) -> u8 {
        let mut data = [0];
        device.read(offset, &mut data);
        data[0]
    }

    /// Accesses of every size at every offset, in range and far out of it: nothing may panic.
    pub(super) fn hammer(device: &mut dyn BusDevice, len: u64) {
        for offset in (0..len + 4).chain([0xff, 0xfff, u64::from(u32::MAX), u64::MAX - 1, u64::MAX])
        {
            for size in [0, 1, 2, 3, 4, 7, 8, 64] {
                for fill in [0, 1, 0x55, 0xfe, 0xff] {
                    device.write(offset, &vec![fill; size]);
                    device.read(offset, &mut vec![fill; size]);
                }
            }
        }
    }
}
