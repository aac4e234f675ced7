//! From the configuration to devices: address, interrupt and bus of each.

use std::sync::{Arc, Mutex};

use minivmm_devices::bus::{Bus, BusDevice, BusError};
use minivmm_devices::event::EventSink;
use minivmm_devices::legacy::control::{self, BootMarkPort, ExitPort};
use minivmm_devices::legacy::i8042::{self, I8042};
use minivmm_devices::legacy::ioapic;
use minivmm_devices::legacy::power::{self, AcpiPower};
use minivmm_devices::legacy::pvpanic::{self, Pvpanic};
use minivmm_devices::legacy::serial::{self, Serial};

use crate::acpi::{AcpiDevice, Hid};
use crate::arch::x86_64::layout;
use crate::interrupts::Interrupts;
use crate::vcpu::Buses;

/// The VM's devices and how a guest finds them.
pub struct DeviceManager {
    /// The buses that vCPUs access.
    pub buses: Buses,
    /// What the DSDT tells.
    pub acpi: Vec<AcpiDevice>,
    /// COM1, which the event loop feeds.
    pub serial: Arc<Mutex<Serial>>,
}

impl DeviceManager {
    /// Attaches every device.
    pub fn new(
        interrupts: &Interrupts,
        events: &EventSink,
        serial: Serial,
    ) -> Result<Self, BusError> {
        let mut devices = Self {
            buses: Buses {
                pio: Bus::default(),
                mmio: Bus::default(),
            },
            acpi: Vec::new(),
            serial: Arc::new(Mutex::new(serial)),
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
        devices.attach_pvpanic(events)?;
        devices.attach_serial()?;
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
            gsi: Some(layout::COM1_GSI),
        });
        Ok(())
    }
}
