//! The VM generation ID (Microsoft, "Virtual Machine Generation ID", 2012): 16 random bytes in guest memory that are others after a
//! restore, and an interrupt that says so. ACPI's generic event device (ACPI 6.5 § 5.6.9) makes of it a notification of the
//! device VMGENCTR, at which Linux, since 5.18, reseeds its random numbers.

use std::io;

use rustix::rand::{GetRandomFlags, getrandom};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::interrupt::IrqLine;
use crate::state::{Record, SaveState, StateError, Suspend, from_record, to_record};

/// Version of the saved state.
const STATE_VERSION: u32 = 1;

/// Length of the ID in bytes.
const LEN: usize = 16;

/// The generation ID and its interrupt.
pub struct GenerationId {
    mem: GuestMemoryMmap,
    address: GuestAddress,
    irq: IrqLine,
    /// Restored, and not resumed yet.
    restored: bool,
}

impl GenerationId {
    /// An ID at `address`, which must be a multiple of 8 in memory that the guest leaves alone. Nothing is written there yet.
    pub fn new(mem: GuestMemoryMmap, address: GuestAddress, irq: IrqLine) -> Self {
        Self {
            mem,
            address,
            irq,
            restored: false,
        }
    }

    /// Writes a new ID. A restored device does that itself when it goes on.
    pub fn renew(&self) -> io::Result<()> {
        let mut bytes = [0; LEN];
        getrandom(&mut bytes[..], GetRandomFlags::empty())?;
        let written = self.mem.write_slice(&bytes, self.address);
        written.map_err(io::Error::other)
    }
}

impl SaveState for GenerationId {
    /// Nothing: the ID is in guest memory.
    fn save(&self) -> Result<Box<Record>, StateError> {
        let Self {
            mem: _,
            address: _,
            irq: _,
            restored: _,
        } = self;
        to_record(STATE_VERSION, ())
    }

    fn restore(&mut self, record: &Record) -> Result<(), StateError> {
        from_record::<()>(STATE_VERSION, record)?;
        self.restored = true;
        Ok(())
    }
}

impl Suspend for GenerationId {
    fn resume(&mut self) -> bool {
        if std::mem::take(&mut self.restored) {
            match self.renew() {
                Ok(()) => self.irq.signal(),
                Err(e) => log::error!("the guest does not learn that it was restored: {e}"),
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::virtio::testing::Pulses;

    #[test]
    fn only_a_restore_gives_a_new_id_and_says_so() {
        let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4096)]).unwrap();
        let read = || {
            let mut bytes = [0; 24];
            mem.read_slice(&mut bytes, GuestAddress(64)).unwrap();
            assert_eq!(bytes[16..], [0; 8], "16 bytes and no more");
            bytes
        };
        let pulses = Arc::new(Pulses::default());
        let make = || {
            let line = pulses.line();
            GenerationId::new(mem.clone(), GuestAddress(64), line)
        };
        let mut booted = make();
        assert_eq!(read(), [0; 24]);
        booted.renew().unwrap();
        let first = read();
        assert_ne!(first[..16], [0; 16]);
        assert!(booted.resume());
        assert_eq!((read(), pulses.take()), (first, 0), "a pause is none");
        let saved = booted.save().unwrap();
        let mut restored = make();
        restored.restore(&saved).unwrap();
        assert_eq!((read(), pulses.take()), (first, 0));
        assert!(restored.resume());
        assert_ne!(read(), first);
        assert_eq!(pulses.take(), 1);
        assert!(restored.resume());
        assert_eq!(pulses.take(), 0);
        let outside = GenerationId::new(mem, GuestAddress(4090), IrqLine::new(|| Ok(())));
        assert!(outside.renew().is_err());
    }
}
