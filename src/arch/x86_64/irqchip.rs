//! The interrupt controller: an I/O APIC in user space, and interrupt lines to it.
//!
//! The irqchip is split (KVM_CAP_SPLIT_IRQCHIP): KVM emulates the local APICs, this process the I/O APIC. A device that
//! signals its line makes one KVM_SIGNAL_MSI ioctl, with the message that the guest has programmed for that pin. GSI
//! routes and irqfds are not needed. They cost start-up and teardown time (an SRCU grace period each) and gain nothing
//! for a device that is emulated in this process.
//!
//! In the other direction, ioeventfds notify a device's thread of busy queues.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{KVM_CAP_SPLIT_IRQCHIP, kvm_enable_cap, kvm_msi};
use kvm_ioctls::{IoEventAddress, VmFd};
use minivmm_devices::interrupt::IrqLine;
use minivmm_devices::platform::ioapic::{self, Ioapic, Msi, MsiRoutes};
use minivmm_devices::virtio::transport::mmio::RegisterIoeventfd;

/// What the guest has programmed for each I/O APIC pin.
type PinTable = Arc<[Mutex<PinState>]>;

/// An I/O APIC pin.
#[derive(Default)]
struct PinState {
    /// The MSI that an edge sends; `None` while the pin is masked.
    msi: Option<Msi>,
    /// An edge came while the pin was masked.
    pending: bool,
}

/// The split irqchip: the I/O APIC and the lines to its pins.
pub struct IrqChip {
    /// The register model, for the MMIO bus.
    pub ioapic: Arc<Mutex<Ioapic>>,
    vm: Arc<VmFd>,
    pins: PinTable,
}

impl IrqChip {
    /// Enables the split irqchip. To be called after all memslots are set and before any vCPU is created.
    pub fn new(vm: Arc<VmFd>) -> Result<Self, kvm_ioctls::Error> {
        let mut cap = kvm_enable_cap {
            cap: KVM_CAP_SPLIT_IRQCHIP,
            ..Default::default()
        };
        // The number of I/O APIC pins, for which KVM reports EOIs.
        cap.args[0] = u64::from(ioapic::PINS);
        vm.enable_cap(&cap)?;

        let pins: PinTable = (0..ioapic::PINS).map(|_| Mutex::default()).collect();
        let ioapic = Ioapic::new(Box::new(PinRoutes {
            vm: Arc::clone(&vm),
            pins: Arc::clone(&pins),
        }));
        Ok(Self {
            ioapic: Arc::new(Mutex::new(ioapic)),
            vm,
            pins,
        })
    }

    /// Registers ioeventfds for the virtio queue notify register at `gpa`: a 32-bit write of the queue's number signals the
    /// queue's eventfd without an exit to user space. They stay registered as long as the VM exists.
    pub fn ioeventfds(&self, gpa: u64) -> RegisterIoeventfd {
        let vm = Arc::clone(&self.vm);
        Box::new(move |queue, event| {
            Ok(vm.register_ioevent(event, &IoEventAddress::Mmio(gpa), queue)?)
        })
    }

    /// The line to I/O APIC pin `gsi`. An edge on a masked pin is sent when the pin is unmasked. The 82093AA drops such an edge,
    /// but notices a level that is still high, and an edge here stands for either: a spurious interrupt does no harm, a lost one
    /// hangs a driver.
    pub fn line(&self, gsi: u32) -> IrqLine {
        let (vm, pins) = (Arc::clone(&self.vm), Arc::clone(&self.pins));
        IrqLine::new(move || {
            let Some(slot) = pins.get(gsi as usize) else {
                return Err(io::Error::from(io::ErrorKind::InvalidInput));
            };
            let msi = {
                let mut state = lock(slot);
                state.pending |= state.msi.is_none();
                state.msi
            };
            Ok(msi.map_or(Ok(()), |msi| send(&vm, msi))?)
        })
    }
}

/// Takes the MSI routes that the guest programs into the I/O APIC.
struct PinRoutes {
    vm: Arc<VmFd>,
    pins: PinTable,
}

impl MsiRoutes for PinRoutes {
    fn set_route(&mut self, pin: u32, msi: Option<Msi>) {
        log::debug!("I/O APIC pin {pin}: {msi:x?}");
        let Some(slot) = self.pins.get(pin as usize) else {
            return;
        };
        let mut state = lock(slot);
        state.msi = msi;
        if let Some(msi) = msi
            && std::mem::take(&mut state.pending)
            && let Err(e) = send(&self.vm, msi)
        {
            log::debug!("I/O APIC pin {pin}: {e}");
        }
    }

    fn pending(&self) -> u32 {
        let bit = |(pin, slot)| u32::from(lock(slot).pending) << pin;
        (0..).zip(self.pins.iter()).map(bit).sum()
    }

    fn set_pending(&mut self, pins: u32) {
        for (pin, slot) in (0..).zip(self.pins.iter()) {
            lock(slot).pending = pins >> pin & 1 != 0;
        }
    }
}

fn lock(slot: &Mutex<PinState>) -> MutexGuard<'_, PinState> {
    slot.lock().unwrap_or_else(PoisonError::into_inner)
}

fn send(vm: &VmFd, msi: Msi) -> Result<(), kvm_ioctls::Error> {
    // 0 means that the guest's local APIC blocked the interrupt, which is no error.
    vm.signal_msi(kvm_msi {
        address_lo: msi.address as u32,
        address_hi: (msi.address >> 32) as u32,
        data: msi.data,
        ..Default::default()
    })?;
    Ok(())
}
