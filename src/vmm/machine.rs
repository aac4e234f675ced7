//! The machine: which devices it has, at which addresses and interrupts, and how a guest finds them.
//!
//! Virtio devices get their slots in the order in which they are attached. ACPI's tables, names in logs and timelines come from that.

use std::sync::{Arc, Mutex};

use minivmm_devices::block::Disk;
use minivmm_devices::bus::{BusDevice, BusError};
use minivmm_devices::event::EventSink;
use minivmm_devices::platform::control::{self, BootMarkPort, ExitPort};
use minivmm_devices::platform::generation_id::GenerationId;
use minivmm_devices::platform::i8042::{self, I8042};
use minivmm_devices::platform::ioapic;
use minivmm_devices::platform::pci::{self, PciConfig};
use minivmm_devices::platform::power::{self, AcpiPower};
use minivmm_devices::platform::pvpanic::{self, Pvpanic};
use minivmm_devices::platform::serial::{self, Serial};
use minivmm_devices::state::{Devices, Suspend};
use minivmm_devices::virtio::device::VirtioDevice;
use minivmm_devices::virtio::transport::mmio::{self, MmioTransport};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::error::{VmError, host};
use super::vcpu::exit::Buses;
use super::vcpu::profile::BusRegion;
use crate::acpi::{AcpiDevice, Hid};
use crate::arch::irqchip::IrqChip;
use crate::arch::layout;
use crate::config::{ConsoleKind, VmConfig, join_words};

/// ACPI's ID of a virtio-mmio device, as Linux knows it (drivers/virtio/virtio_mmio.c).
const VIRTIO_MMIO_HID: &str = "LNRO0005";

/// What COM1 is called.
pub const COM1: &str = "COM1";

/// How many virtio devices a configuration asks for.
fn count_virtio_devices(config: &VmConfig) -> usize {
    config.disks.len()
        + config.nets.len()
        + usize::from(config.rng)
        + usize::from(config.console == ConsoleKind::Virtio)
        + usize::from(config.vsock.is_some())
}

/// The place of a virtio device: its registers and its interrupt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct VirtioSlot(usize);

impl VirtioSlot {
    /// GPA of the registers.
    fn base(self) -> u64 {
        layout::VIRTIO_MMIO_START + self.0 as u64 * layout::VIRTIO_MMIO_SIZE
    }

    /// GSI of the interrupt.
    fn gsi(self) -> u32 {
        layout::VIRTIO_GSI_FIRST + self.0 as u32
    }

    /// The parameter that tells a kernel without ACPI of the device (Documentation/admin-guide/kernel-parameters.txt).
    fn parameter(self) -> String {
        let size_kib = layout::VIRTIO_MMIO_SIZE >> 10;
        format!(
            "virtio_mmio.device={size_kib}K@{:#x}:{}",
            self.base(),
            self.gsi()
        )
    }
}

/// The kernel's command line: the configuration's; one with `acpi=off` also tells of the virtio devices, which a kernel finds
/// through ACPI otherwise.
pub fn cmdline_with_devices(config: &VmConfig) -> String {
    let line = config.kernel_cmdline();
    // What comes behind "--" is init's.
    let (kernel, init) = match line.find(" -- ") {
        Some(at) => line.split_at(at),
        None => (line.as_str(), ""),
    };
    if !kernel.split_whitespace().any(|word| word == "acpi=off") {
        return line;
    }
    let slots = (0..count_virtio_devices(config)).map(VirtioSlot);
    let parameters: Vec<String> = slots.map(VirtioSlot::parameter).collect();
    join_words([kernel, &parameters.join(" "), init])
}

/// Refuses a configuration with more virtio devices than there are slots.
pub fn check_capacity(config: &VmConfig) -> Result<(), VmError> {
    match count_virtio_devices(config) {
        count if count > layout::MAX_VIRTIO_DEVICES => Err(VmError::TooManyDevices(count)),
        _ => Ok(()),
    }
}

/// The VM's devices and how a guest finds them.
pub struct Machine {
    /// What vCPUs access.
    pub buses: Arc<Buses>,
    /// What the DSDT tells.
    pub acpi: Vec<AcpiDevice>,
    /// The devices that have state, by the names that they have on the buses.
    pub state: Devices,
    /// The disks in their order.
    pub disks: Vec<Arc<Disk>>,
    /// Where a restored guest reads who it is.
    pub boot_mark: Arc<Mutex<BootMarkPort>>,
    /// Most bytes that each virtio device takes beside guest RAM, whatever its driver does. Other devices keep a few registers.
    pub memory_bounds: Vec<(String, usize)>,
    next_slot: usize,
}

impl Machine {
    /// A machine with the devices that every VM has: I/O APIC, COM1, and the ports by which a guest ends or reports.
    pub fn new(
        interrupts: &IrqChip,
        events: &EventSink,
        serial: &Arc<Mutex<Serial>>,
    ) -> Result<Self, BusError> {
        let mut machine = Self {
            buses: Arc::default(),
            acpi: Vec::new(),
            state: Devices::default(),
            disks: Vec::new(),
            boot_mark: Arc::new(Mutex::new(BootMarkPort::new(events.clone()))),
            memory_bounds: Vec::new(),
            next_slot: 0,
        };
        let name = "I/O APIC";
        let ioapic = interrupts.ioapic.clone();
        machine.state.add(name, ioapic.clone());
        let base = layout::IOAPIC_START;
        machine.buses.mmio.map(name, base, ioapic::LEN, ioapic)?;
        let event = || events.clone();
        let exit = ExitPort(event());
        let mark = Arc::clone(&machine.boot_mark);
        let (exit_len, pvpanic_len) = (control::EXIT_PORT_LEN, pvpanic::PORT_LEN);
        machine.attach_port("exit port", layout::EXIT_PORT, exit_len, exit)?;
        let (port, len) = (layout::BOOT_MARK_PORT.into(), control::BOOT_MARK_PORT_LEN);
        machine.buses.pio.map("boot-mark port", port, len, mark)?;
        machine.attach_port("i8042", layout::I8042_PORT, i8042::LEN, I8042(event()))?;
        let power = AcpiPower::new(event());
        machine.attach_saved("ACPI power", layout::ACPI_POWER_PORT, power::LEN, power)?;
        let pci = PciConfig::new(event());
        machine.attach_saved("PCI", layout::PCI_CONFIG_PORT, pci::LEN, pci)?;
        #[cfg(feature = "attack-port")]
        {
            use minivmm_devices::attack::{AttackPort, PORT, PORT_LEN};
            machine.attach_port("attack port", PORT, PORT_LEN, AttackPort(event()))?;
        }
        let pvpanic = Pvpanic(event());
        machine.attach_port("pvpanic", layout::PVPANIC_PORT, pvpanic_len, pvpanic)?;
        machine.acpi.push(AcpiDevice {
            ports: Some((layout::PVPANIC_PORT, pvpanic_len as u8)),
            ..AcpiDevice::new("PEVT".into(), Hid::Acpi("QEMU0001"))
        });
        let serial = serial.clone();
        machine.state.add(COM1, serial.clone());
        let (port, len) = (layout::COM1_PORT.into(), serial::PORT_LEN);
        machine.buses.pio.map(COM1, port, len, serial)?;
        machine.acpi.push(AcpiDevice {
            ports: Some((layout::COM1_PORT, serial::PORT_LEN as u8)),
            gsi: Some(layout::COM1_GSI),
            ..AcpiDevice::new(COM1.into(), Hid::Eisa("PNP0501"))
        });
        Ok(machine)
    }

    fn attach_port(
        &mut self,
        name: &str,
        port: u16,
        count: u64,
        device: impl BusDevice + 'static,
    ) -> Result<(), BusError> {
        let device = Arc::new(Mutex::new(device));
        self.buses.pio.map(name, port.into(), count, device)
    }

    /// The same for a device that has state.
    fn attach_saved(
        &mut self,
        name: &str,
        port: u16,
        count: u64,
        device: impl BusDevice + Suspend + 'static,
    ) -> Result<(), BusError> {
        let device = Arc::new(Mutex::new(device));
        self.state.add(name, device.clone());
        self.buses.pio.map(name, port.into(), count, device)
    }

    /// Attaches a VM generation ID, and the generic event device that tells of a new one. A VM that boots is given its first.
    pub fn attach_generation_id(
        &mut self,
        mem: &GuestMemoryMmap,
        interrupts: &IrqChip,
        boots: bool,
    ) -> Result<(), VmError> {
        let (address, gsi) = (layout::GENERATION_ID_START, layout::GENERATION_GSI);
        let line = interrupts.line(gsi);
        let id = GenerationId::new(mem.clone(), GuestAddress(address), line);
        if boots {
            id.renew().map_err(host("a generation ID"))?;
        }
        self.state.add("generation ID", Arc::new(Mutex::new(id)));
        self.acpi.extend(AcpiDevice::generation_id(address, gsi));
        Ok(())
    }

    /// Puts a virtio device into the next slot. `memory_bound` is what it takes at most beside guest RAM, in bytes.
    pub fn attach_virtio(
        &mut self,
        name: &str,
        memory_bound: usize,
        device: Box<dyn VirtioDevice>,
        mem: &GuestMemoryMmap,
        interrupts: &IrqChip,
    ) -> Result<(), BusError> {
        self.memory_bounds.push((name.to_owned(), memory_bound));
        let index = self.next_slot;
        let slot = VirtioSlot(index);
        self.next_slot += 1;
        let line = interrupts.line(slot.gsi());
        let mut transport = MmioTransport::new(device, mem.clone(), line);
        transport.use_ioeventfds(interrupts.ioeventfds(slot.base() + mmio::QUEUE_NOTIFY));
        let transport = Arc::new(Mutex::new(transport));
        self.state.add(name, transport.clone());
        let (base, len) = (slot.base(), layout::VIRTIO_MMIO_SIZE);
        self.buses.mmio.map(name, base, len, transport)?;
        self.acpi.push(AcpiDevice {
            uid: index as u32,
            mmio: Some((slot.base() as u32, layout::VIRTIO_MMIO_SIZE as u32)),
            gsi: Some(slot.gsi()),
            ..AcpiDevice::new(format!("VR{index:02}"), Hid::Acpi(VIRTIO_MMIO_HID))
        });
        Ok(())
    }

    /// Takes the devices away, for whoever stops them: the machine has none from here on.
    pub fn take_devices(&mut self) -> Arc<Buses> {
        self.state = Devices::default();
        self.disks.clear();
        std::mem::take(&mut self.buses)
    }

    /// What people call the device at `place`.
    pub fn name_of(&self, place: BusRegion) -> String {
        let bus = if place.is_port {
            &self.buses.pio
        } else {
            &self.buses.mmio
        };
        let name = place.base.and_then(|base| bus.name_of(base));
        name.unwrap_or_else(|| {
            let what = if place.is_port { "ports" } else { "addresses" };
            format!("{what} without a device")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{DEFAULT_CMDLINE, DiskConfig};

    #[test]
    fn every_virtio_device_has_a_place_of_its_own() {
        assert_eq!(
            VirtioSlot(1).parameter(),
            "virtio_mmio.device=4K@0xd0001000:6"
        );
        let last = VirtioSlot(layout::MAX_VIRTIO_DEVICES - 1);
        assert_eq!(last.gsi(), layout::VIRTIO_GSI_LAST);
        assert_eq!(layout::VIRTIO_GSI_LAST + 1, ioapic::PINS);
        assert!(last.base() + layout::VIRTIO_MMIO_SIZE <= layout::IOAPIC_START);
        assert_eq!(mmio::LEN, layout::VIRTIO_MMIO_SIZE);
    }

    fn with_disks(count: usize) -> VmConfig {
        VmConfig {
            disks: vec![DiskConfig::default(); count],
            ..VmConfig::default()
        }
    }

    #[test]
    fn a_machine_has_room_for_so_many_devices() {
        let full = VmConfig {
            rng: true,
            ..with_disks(18)
        };
        check_capacity(&full).unwrap();
        let error = check_capacity(&with_disks(20)).unwrap_err().to_string();
        assert!(error.contains("20") && error.contains("19"), "{error}");
    }

    #[test]
    fn a_kernel_without_acpi_is_told_of_its_virtio_devices() {
        let line = |append: &str, disks: usize| {
            let config = VmConfig {
                append: Some(append.into()),
                ..with_disks(disks)
            };
            cmdline_with_devices(&config)
        };
        assert!(!line("-- acpi=off", 1).contains("virtio_mmio"));
        assert!(!line("noacpi=off", 1).contains("virtio_mmio"));
        assert!(!line("acpi=off", 0).contains("virtio_mmio"));
        assert_eq!(
            line("acpi=off -- sh -c 'a  b'", 1),
            format!(
                "{DEFAULT_CMDLINE} acpi=off virtio_mmio.device=4K@0xd0000000:5 -- sh -c 'a  b'"
            )
        );
    }
}
