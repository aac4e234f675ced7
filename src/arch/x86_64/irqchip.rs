//! Interrupts: the I/O APIC in user space, and its wires.
//!
//! The interrupt controller is split: KVM has the local APICs, this process the I/O APIC. A device that pulls its wire
//! makes one KVM_SIGNAL_MSI with the message that the guest has programmed for that pin. That needs neither GSI routes
//! nor irqfds, which cost start-up and teardown time (an SRCU grace period each) and would gain nothing for a device
//! whose work is done in this process anyway.
//!
//! The other way, from the guest to a device's thread, KVM has ioeventfds, for queues that are busy.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{KVM_CAP_SPLIT_IRQCHIP, kvm_enable_cap, kvm_msi};
use kvm_ioctls::{IoEventAddress, VmFd};
use minivmm_devices::interrupt::{InterruptSink, IrqLine};
use minivmm_devices::platform::ioapic::{self, Ioapic, Msi, MsiRouter};
use minivmm_devices::virtio::transport::mmio::RegisterIoeventfd;

/// What the guest has programmed for each I/O APIC pin.
type PinTable = Arc<[Mutex<PinState>]>;

/// An I/O APIC pin.
#[derive(Default)]
struct PinState {
    /// What a pulse sends; `None` while the pin is masked.
    msi: Option<Msi>,
    /// A pulse came while it was masked.
    pending: bool,
}

/// The I/O APIC and the wires that lead to it.
pub struct Interrupts {
    /// The register model, for the MMIO bus.
    pub ioapic: Arc<Mutex<Ioapic>>,
    vm: Arc<VmFd>,
    pins: PinTable,
}

impl Interrupts {
    /// Splits the VM's interrupt controller. All memslots must be there before, all vCPUs come after.
    pub fn new(vm: Arc<VmFd>) -> Result<Self, kvm_ioctls::Error> {
        let mut cap = kvm_enable_cap {
            cap: KVM_CAP_SPLIT_IRQCHIP,
            ..Default::default()
        };
        // GSIs that belong to the I/O APIC: KVM tells of an end of interrupt for these.
        cap.args[0] = u64::from(ioapic::PINS);
        vm.enable_cap(&cap)?;

        let pins: PinTable = (0..ioapic::PINS).map(|_| Mutex::default()).collect();
        let ioapic = Ioapic::new(Box::new(Router {
            vm: Arc::clone(&vm),
            pins: Arc::clone(&pins),
        }));
        Ok(Self {
            ioapic: Arc::new(Mutex::new(ioapic)),
            vm,
            pins,
        })
    }

    /// For queues that are notified at this GPA: has KVM write an eventfd when the guest writes the queue's number there, with
    /// 32 bits, so that the vCPU goes on at once. It ends with the VM.
    pub fn ioeventfds(&self, gpa: u64) -> RegisterIoeventfd {
        let vm = Arc::clone(&self.vm);
        Box::new(move |queue, event| {
            Ok(vm.register_ioevent(event, &IoEventAddress::Mmio(gpa), queue)?)
        })
    }

    /// The wire that ends at I/O APIC pin `gsi`.
    pub fn line(&self, gsi: u32) -> IrqLine {
        IrqLine::new(Arc::new(Pin {
            vm: Arc::clone(&self.vm),
            pins: Arc::clone(&self.pins),
            gsi,
        }))
    }
}

/// Takes what the guest programs from the register model.
struct Router {
    vm: Arc<VmFd>,
    pins: PinTable,
}

impl MsiRouter for Router {
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
}

/// An I/O APIC input. A pulse at a masked pin is sent when it is unmasked. The 82093AA forgets an edge there, but it would see a
/// level that is still high, and a pulse stands for either: one interrupt too many does no harm, a lost one hangs a driver.
struct Pin {
    vm: Arc<VmFd>,
    pins: PinTable,
    gsi: u32,
}

impl InterruptSink for Pin {
    fn signal(&self) -> io::Result<()> {
        let Some(slot) = self.pins.get(self.gsi as usize) else {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        };
        let msi = {
            let mut state = lock(slot);
            state.pending |= state.msi.is_none();
            state.msi
        };
        Ok(msi.map_or(Ok(()), |msi| send(&self.vm, msi))?)
    }
}

fn lock(slot: &Mutex<PinState>) -> MutexGuard<'_, PinState> {
    slot.lock().unwrap_or_else(PoisonError::into_inner)
}

fn send(vm: &VmFd, msi: Msi) -> Result<(), kvm_ioctls::Error> {
    // Zero means that a guest's local APIC refused the vector: the guest's affair.
    vm.signal_msi(kvm_msi {
        address_lo: msi.address as u32,
        address_hi: (msi.address >> 32) as u32,
        data: msi.data,
        ..Default::default()
    })?;
    Ok(())
}
