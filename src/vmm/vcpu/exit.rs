//! Handles exits from the guest: device accesses and all other exit reasons (KVM_EXIT_*).

use std::fmt;

use kvm_ioctls::VcpuExit;
use minivmm_devices::bus::Bus;

use crate::vmm::outcome::{Outcome, VcpuFailure};

/// The two buses that a vCPU's accesses go to.
#[derive(Default)]
pub struct Buses {
    /// I/O ports.
    pub pio: Bus,
    /// Memory-mapped I/O.
    pub mmio: Bus,
}

/// The last access that left the guest, for the post-mortem.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BusAccess {
    /// I/O port, or GPA.
    pub address: u64,
    /// Whether it went to an I/O port.
    pub is_port: bool,
    /// Whether it was a write.
    pub is_write: bool,
    /// The first four bytes, little-endian.
    pub value: u32,
}

impl BusAccess {
    pub(super) fn new(address: u64, is_port: bool, is_write: bool, data: &[u8]) -> Self {
        let value = data
            .iter()
            .take(4)
            .rev()
            .fold(0, |v, b| v << 8 | u32::from(*b));
        Self {
            address,
            is_port,
            is_write,
            value,
        }
    }
}

impl fmt::Display for BusAccess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { address, value, .. } = self;
        let verb = if self.is_write { "write of" } else { "read of" };
        let place = if self.is_port { "I/O port" } else { "address" };
        write!(f, "{verb} {value:#x} at {place} {address:#x}")
    }
}

/// A string instruction reads one port several times: each element is an access of its own.
pub(super) fn port_read(pio: &Bus, port: u16, width: u8, data: &mut [u8]) {
    for element in data.chunks_mut(usize::from(width).max(1)) {
        pio.read(port.into(), element);
    }
}

pub(super) fn port_write(pio: &Bus, port: u16, width: u8, data: &[u8]) {
    for element in data.chunks(usize::from(width).max(1)) {
        pio.write(port.into(), element);
    }
}

/// What to do after an exit (KVM_EXIT_*) other than a port or MMIO access: go on (`None`), end the VM, or fail. New exit reasons
/// are handled here.
pub(super) fn handle_exit(exit: &VcpuExit<'_>) -> Result<Option<Outcome>, VcpuFailure> {
    match exit {
        VcpuExit::Intr => Ok(None),
        // All lines are edge-triggered: an EOI needs no action.
        VcpuExit::IoapicEoi(_) => Ok(None),
        VcpuExit::Shutdown => Err(VcpuFailure::TripleFault),
        VcpuExit::FailEntry(reason, _) => Err(VcpuFailure::EntryFailed(*reason)),
        VcpuExit::SystemEvent(kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN, _) => {
            Ok(Some(Outcome::PowerOff))
        }
        VcpuExit::SystemEvent(kvm_bindings::KVM_SYSTEM_EVENT_RESET, _) => Ok(Some(Outcome::Reset)),
        VcpuExit::SystemEvent(kvm_bindings::KVM_SYSTEM_EVENT_CRASH, _) => {
            Ok(Some(Outcome::Panicked))
        }
        other => Err(VcpuFailure::UnknownExit(format!("{other:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use minivmm_devices::bus::BusDevice;

    struct Recorder(Vec<Vec<u8>>);

    impl BusDevice for Recorder {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8 + 1);
            self.0.push(data.to_vec());
        }
        fn write(&mut self, _: u64, data: &[u8]) {
            self.0.push(data.to_vec());
        }
    }

    #[test]
    fn a_string_instruction_is_one_access_an_element() {
        let device = Arc::new(Mutex::new(Recorder(Vec::new())));
        let pio = Bus::default();
        pio.map("test", 0x10, 4, device.clone()).unwrap();
        port_write(&pio, 0x10, 2, &[1, 2, 3, 4]);
        let mut data = [0; 3];
        port_read(&pio, 0x11, 1, &mut data);
        assert_eq!(data, [2, 2, 2]);
        // A width of zero, which KVM never reports, must not divide by zero.
        port_write(&pio, 0x10, 0, &[9]);
        let seen = &device.lock().unwrap().0;
        assert_eq!(seen[..2], [vec![1, 2], vec![3, 4]]);
        assert_eq!((seen.len(), &seen[5]), (6, &vec![9]));
    }

    #[test]
    fn exits_mean_what_the_contract_says() {
        assert_eq!(handle_exit(&VcpuExit::Intr), Ok(None));
        assert_eq!(handle_exit(&VcpuExit::IoapicEoi(3)), Ok(None));
        assert_eq!(
            handle_exit(&VcpuExit::Shutdown),
            Err(VcpuFailure::TripleFault)
        );
        assert_eq!(
            handle_exit(&VcpuExit::FailEntry(0x21, 0)),
            Err(VcpuFailure::EntryFailed(0x21))
        );
        assert_eq!(
            handle_exit(&VcpuExit::SystemEvent(1, &[])),
            Ok(Some(Outcome::PowerOff))
        );
        assert_eq!(
            handle_exit(&VcpuExit::SystemEvent(2, &[])),
            Ok(Some(Outcome::Reset))
        );
        assert!(matches!(
            handle_exit(&VcpuExit::Hyperv),
            Err(VcpuFailure::UnknownExit(_))
        ));
        assert!(matches!(
            handle_exit(&VcpuExit::Unsupported(99)),
            Err(VcpuFailure::UnknownExit(_))
        ));
    }
}
