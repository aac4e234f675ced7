//! From the configuration to devices: address, interrupt and bus of each.

use std::sync::{Arc, Mutex};

use minivmm_devices::bus::{Bus, BusDevice, BusError};
use minivmm_devices::event::EventSink;
use minivmm_devices::platform::control::{self, BootMarkPort, ExitPort};
use minivmm_devices::platform::i8042::{self, I8042};
use minivmm_devices::platform::ioapic;
use minivmm_devices::platform::pci::{self, PciConfig};
use minivmm_devices::platform::power::{self, AcpiPower};
use minivmm_devices::platform::pvpanic::{self, Pvpanic};
use minivmm_devices::platform::serial::{self, Serial};
use minivmm_devices::virtio::block::Block;
use minivmm_devices::virtio::console::Console;
use minivmm_devices::virtio::device::VirtioDevice;
use minivmm_devices::virtio::rng::Rng;
use minivmm_devices::virtio::transport::mmio::{self, MmioTransport};
use vm_memory::GuestMemoryMmap;

use crate::acpi::{AcpiDevice, Hid};
use crate::arch::x86_64::irqchip::Interrupts;
use crate::arch::x86_64::layout;
use crate::config::{VmConfig, join_words};
use crate::observe::timeline::Place;
use crate::vmm::vcpu::Buses;
use crate::vmm::vm::VmError;

/// ACPI's ID of a virtio-mmio device, as Linux knows it (drivers/virtio/virtio_mmio.c).
const VIRTIO_MMIO_HID: &str = "LNRO0005";

/// What the configuration's devices need from the host, opened.
#[derive(Default)]
pub struct HostResources {
    /// Disks in the order in which the guest finds them.
    pub disks: Vec<Block>,
    /// Whether there is an entropy device.
    pub rng: bool,
}

/// A virtio device's place: what a kernel's `virtio_mmio.device=` tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VirtioSlot(usize);

impl VirtioSlot {
    /// GPA of the registers.
    pub fn base(self) -> u64 {
        layout::VIRTIO_MMIO_START + self.0 as u64 * layout::VIRTIO_MMIO_SIZE
    }

    /// GSI of the interrupt.
    pub fn gsi(self) -> u32 {
        layout::VIRTIO_GSI_FIRST + self.0 as u32
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
    let devices = virtio_parameters(config.virtio_devices());
    join_words([kernel, &devices, init])
}

/// Refuses a configuration with more virtio devices than there are addresses and interrupts for.
pub fn check_capacity(config: &VmConfig) -> Result<(), VmError> {
    match config.virtio_devices() {
        count if count > layout::MAX_VIRTIO_DEVICES => Err(VmError::TooManyDevices(count)),
        _ => Ok(()),
    }
}

/// The parameters that tell a kernel without ACPI of `count` virtio devices, which it cannot find by itself
/// (Documentation/admin-guide/kernel-parameters.txt).
fn virtio_parameters(count: usize) -> String {
    let parameters: Vec<String> = (0..count)
        .map(VirtioSlot)
        .map(|slot| {
            let size_kib = layout::VIRTIO_MMIO_SIZE >> 10;
            format!(
                "virtio_mmio.device={size_kib}K@{:#x}:{}",
                slot.base(),
                slot.gsi()
            )
        })
        .collect();
    parameters.join(" ")
}

/// What people call the device at `place`.
pub fn device_name(place: Place) -> String {
    const PORTS: [(u16, &str); 7] = [
        (layout::EXIT_PORT, "exit port"),
        (layout::BOOT_MARK_PORT, "boot-mark port"),
        (layout::I8042_PORT, "i8042"),
        (layout::COM1_PORT, "COM1"),
        (layout::PVPANIC_PORT, "pvpanic"),
        (layout::ACPI_POWER_PORT, "ACPI power"),
        (layout::PCI_CONFIG_PORT, "PCI"),
    ];
    match (place.is_port, place.base) {
        (true, None) => "ports without a device".into(),
        (false, None) => "addresses without a device".into(),
        (true, Some(base)) => match PORTS.iter().find(|(port, _)| u64::from(*port) == base) {
            Some((_, name)) => (*name).into(),
            None => format!("port {base:#x}"),
        },
        (false, Some(layout::IOAPIC_START)) => "I/O APIC".into(),
        (false, Some(base)) => match base.checked_sub(layout::VIRTIO_MMIO_START) {
            Some(offset) => format!("virtio {}", offset / layout::VIRTIO_MMIO_SIZE),
            None => format!("address {base:#x}"),
        },
    }
}

/// The VM's devices and how a guest finds them.
pub struct DeviceManager {
    /// The buses that vCPUs access.
    pub buses: Buses,
    /// What the DSDT tells.
    pub acpi: Vec<AcpiDevice>,
    /// COM1.
    pub serial: Arc<Mutex<Serial>>,
    virtio_devices: usize,
}

impl DeviceManager {
    /// Attaches every device. The configuration has been checked to have room for all.
    pub fn new(
        interrupts: &Interrupts,
        events: &EventSink,
        mem: &GuestMemoryMmap,
        serial: Serial,
        console: Option<Console>,
        resources: HostResources,
    ) -> Result<Self, VmError> {
        let mut devices = Self {
            buses: Buses {
                pio: Bus::default(),
                mmio: Bus::default(),
            },
            acpi: Vec::new(),
            serial: Arc::new(Mutex::new(serial)),
            virtio_devices: 0,
        };
        devices
            .buses
            .mmio
            .insert(layout::IOAPIC_START, ioapic::LEN, interrupts.ioapic.clone())?;
        devices.attach_port(
            layout::EXIT_PORT,
            control::PORT_LEN,
            ExitPort::new(events.clone()),
        )?;
        devices.attach_port(
            layout::BOOT_MARK_PORT,
            control::PORT_LEN,
            BootMarkPort::new(events.clone()),
        )?;
        devices.attach_port(layout::I8042_PORT, i8042::LEN, I8042::new(events.clone()))?;
        devices.attach_port(
            layout::ACPI_POWER_PORT,
            power::LEN,
            AcpiPower::new(events.clone()),
        )?;
        devices.attach_port(
            layout::PCI_CONFIG_PORT,
            pci::LEN,
            PciConfig::new(events.clone()),
        )?;
        devices.attach_pvpanic(events)?;
        devices.attach_serial()?;
        let HostResources { disks, rng } = resources;
        for disk in disks {
            devices.attach_virtio(Box::new(disk), mem, interrupts)?;
        }
        if rng {
            devices.attach_virtio(Box::<Rng>::default(), mem, interrupts)?;
        }
        if let Some(console) = console {
            devices.attach_virtio(Box::new(console), mem, interrupts)?;
        }
        Ok(devices)
    }

    fn attach_port(
        &mut self,
        port: u16,
        count: u64,
        device: impl BusDevice + 'static,
    ) -> Result<(), BusError> {
        self.buses
            .pio
            .insert(port.into(), count, Arc::new(Mutex::new(device)))
    }

    fn attach_pvpanic(&mut self, events: &EventSink) -> Result<(), BusError> {
        self.attach_port(
            layout::PVPANIC_PORT,
            pvpanic::PORT_LEN,
            Pvpanic::new(events.clone()),
        )?;
        self.acpi.push(AcpiDevice {
            name: "PEVT".into(),
            hid: Hid::Acpi("QEMU0001"),
            uid: 0,
            ports: Some((layout::PVPANIC_PORT, pvpanic::PORT_LEN as u8)),
            mmio: None,
            gsi: None,
        });
        Ok(())
    }

    fn attach_serial(&mut self) -> Result<(), BusError> {
        self.buses.pio.insert(
            layout::COM1_PORT.into(),
            serial::PORT_LEN,
            self.serial.clone(),
        )?;
        self.acpi.push(AcpiDevice {
            name: "COM1".into(),
            hid: Hid::Eisa("PNP0501"),
            uid: 0,
            ports: Some((layout::COM1_PORT, serial::PORT_LEN as u8)),
            mmio: None,
            gsi: Some(layout::COM1_GSI),
        });
        Ok(())
    }

    fn attach_virtio(
        &mut self,
        device: Box<dyn VirtioDevice>,
        mem: &GuestMemoryMmap,
        interrupts: &Interrupts,
    ) -> Result<(), VmError> {
        let index = self.virtio_devices;
        let slot = VirtioSlot(index);
        self.virtio_devices += 1;
        let line = interrupts.line(slot.gsi());
        let mut transport = MmioTransport::new(device, mem.clone(), line);
        transport.use_ioeventfds(interrupts.ioeventfds(slot.base() + mmio::QUEUE_NOTIFY));
        self.buses.mmio.insert(
            slot.base(),
            layout::VIRTIO_MMIO_SIZE,
            Arc::new(Mutex::new(transport)),
        )?;
        self.acpi.push(AcpiDevice {
            name: format!("VR{index:02}"),
            hid: Hid::Acpi(VIRTIO_MMIO_HID),
            uid: index as u32,
            ports: None,
            mmio: Some((slot.base() as u32, layout::VIRTIO_MMIO_SIZE as u32)),
            gsi: Some(slot.gsi()),
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{DEFAULT_CMDLINE, DiskConfig};

    #[test]
    fn devices_have_names() {
        let name = |is_port, base| device_name(Place { is_port, base });
        assert_eq!(name(true, Some(layout::COM1_PORT.into())), "COM1");
        assert_eq!(name(true, Some(1)), "port 0x1");
        assert_eq!(name(false, Some(VirtioSlot(3).base())), "virtio 3");
        assert_eq!(name(false, Some(layout::IOAPIC_START)), "I/O APIC");
        assert_eq!(name(false, Some(0xa000)), "address 0xa000");
        assert_eq!(name(false, None), "addresses without a device");
    }

    #[test]
    fn every_virtio_device_has_a_place_of_its_own() {
        assert_eq!(
            virtio_parameters(2),
            "virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6"
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
