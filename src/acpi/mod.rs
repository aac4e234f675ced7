//! ACPI tables of a hardware-reduced machine (ACPI 6.5 § 4.1), generated from the device list.

use acpi_tables::Aml;
use acpi_tables::aml::{self, Path};
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use minivmm_devices::platform::power;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::arch::layout::{ACPI_MAX_SIZE, ACPI_POWER_PORT, ACPI_START, IOAPIC_START, LAPIC_START};

const OEM_ID: [u8; 6] = *b"MINIVM";
const OEM_TABLE_ID: [u8; 8] = *b"MINIVMM ";
const OEM_REVISION: u32 = 1;

const GENERATION_ID_NAME: &str = "VGEN";
/// What every driver of a VM generation ID knows it by.
const GENERATION_ID_CID: &str = "VM_Gen_Counter";
/// Notification values from 0x80 on are a device's own (§ 5.6.6); this is that of a new generation ID.
const NOTIFY_DEVICE: u8 = 0x80;

/// IAPC_BOOT_ARCH (§ 5.2.9.3): no VGA, no CMOS clock; the 8042 bit stays clear, so that no driver probes for one.
const BOOT_ARCH_NO_VGA: u16 = 1 << 2;
const BOOT_ARCH_NO_CMOS_RTC: u16 = 1 << 5;

/// A device that the guest learns of through the DSDT.
pub struct AcpiDevice {
    /// Four characters, unique in the scope `\_SB`.
    pub name: String,
    /// Plug-and-play or ACPI ID.
    pub hid: Hid,
    /// Tells devices of one `_HID` apart.
    pub uid: u32,
    /// I/O ports: the first and their number.
    pub ports: Option<(u16, u8)>,
    /// MMIO registers: the first address and their length in bytes.
    pub mmio: Option<(u32, u32)>,
    /// GSI, edge-triggered and active high as every wire of this machine.
    pub gsi: Option<u32>,
    /// What else it has.
    pub object: Option<AcpiObject>,
}

/// An object that some devices have.
pub enum AcpiObject {
    /// `ADDR` of a VM generation ID: its GPA.
    GenerationId(u64),
    /// `_EVT` of a generic event device (§ 5.6.9): its interrupt notifies the VM generation ID.
    NotifyGenerationId,
}

impl AcpiDevice {
    /// A device without anything but a name.
    pub fn new(name: String, hid: Hid) -> Self {
        Self {
            name,
            hid,
            uid: 0,
            ports: None,
            mmio: None,
            gsi: None,
            object: None,
        }
    }

    /// A VM generation ID at this GPA, and the generic event device whose interrupt tells of a new one.
    pub fn generation_id(gpa: u64, gsi: u32) -> [Self; 2] {
        let device = |name: &str, hid, gsi, object| Self {
            gsi,
            object: Some(object),
            ..Self::new(name.into(), Hid::Acpi(hid))
        };
        let id = AcpiObject::GenerationId(gpa);
        let event = AcpiObject::NotifyGenerationId;
        [
            device(GENERATION_ID_NAME, "VMGENCTR", None, id),
            device("GED_", "ACPI0013", Some(gsi), event),
        ]
    }
}

/// A `_HID`: compressed EISA form, or a string.
pub enum Hid {
    /// Such as PNP0501.
    Eisa(&'static str),
    /// Such as QEMU0001.
    Acpi(&'static str),
}

/// Writes all tables to [`ACPI_START`], where the RSDP comes first.
pub fn write_tables(
    mem: &GuestMemoryMmap,
    cpus: u8,
    devices: &[AcpiDevice],
) -> Result<(), GuestMemoryError> {
    let dsdt = dsdt(devices);
    let madt = madt(cpus);

    // The RSDP's room; it needs the XSDT's address.
    let mut image = vec![0u8; Rsdp::len()];
    let mut place = |table: &[u8]| {
        image.resize(image.len().next_multiple_of(16), 0);
        let address = ACPI_START + image.len() as u64;
        image.extend_from_slice(table);
        address
    };
    let dsdt_address = place(&dsdt);
    let fadt_address = place(&fadt(dsdt_address));
    let madt_address = place(&madt);
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt_address);
    xsdt.add_entry(madt_address);
    let xsdt_address = place(&bytes(&xsdt));
    image.splice(..Rsdp::len(), bytes(&Rsdp::new(OEM_ID, xsdt_address)));

    assert!(
        image.len() as u64 <= ACPI_MAX_SIZE,
        "64 vCPUs and every device there is take a tenth of the room"
    );
    mem.write_slice(&image, GuestAddress(ACPI_START))
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn fadt(dsdt_address: u64) -> Vec<u8> {
    let port = |offset: u64| {
        let address = u64::from(ACPI_POWER_PORT) + offset;
        GAS::new(
            AddressSpace::SystemIo,
            8,
            0,
            AccessSize::ByteAccess,
            address,
        )
    };
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt_address)
        .preferred_pm_profile(PmProfile::Unspecified)
        .flag(Flags::Wbinvd)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        // Without this a kernel looks for fixed-hardware buttons.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = (BOOT_ARCH_NO_VGA | BOOT_ARCH_NO_CMOS_RTC).into();
    fadt.reset_reg = port(power::RESET_OFFSET);
    fadt.reset_value = power::RESET_VALUE;
    fadt.sleep_control_reg = port(power::SLEEP_CONTROL_OFFSET);
    fadt.sleep_status_reg = port(power::SLEEP_STATUS_OFFSET);
    bytes(&fadt.finalize())
}

fn madt(cpus: u8) -> Vec<u8> {
    let lapic = LocalInterruptController::Address(LAPIC_START as u32);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, lapic);
    for cpu in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IOAPIC_START as u32, 0));
    bytes(&madt)
}

fn dsdt(devices: &[AcpiDevice]) -> Vec<u8> {
    // § 7.4.2: the values for SLP_TYP that enter S5.
    let s5 = power::SLEEP_TYPE_S5;
    let s5_package = aml::Package::new(vec![&s5, &aml::ZERO]);
    let s5_name = aml::Name::new(Path::new("_S5_"), &s5_package);

    let mut body = bytes(&s5_name);
    let device_bytes: Vec<u8> = devices.iter().flat_map(device).collect();
    body.extend_from_slice(&aml::Scope::raw(Path::new("\\_SB_"), device_bytes));

    let header_size = 36;
    let mut dsdt = Sdt::new(*b"DSDT", header_size, 2, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    dsdt.append_slice(&body);
    dsdt.as_slice().to_vec()
}

fn device(device: &AcpiDevice) -> Vec<u8> {
    let hid: Box<dyn Aml> = match device.hid {
        Hid::Eisa(id) => Box::new(aml::EISAName::new(id)),
        Hid::Acpi(id) => Box::new(id),
    };
    let mut resources: Vec<Box<dyn Aml>> = Vec::new();
    if let Some((port, count)) = device.ports {
        resources.push(Box::new(aml::IO::new(port, port, 1, count)));
    }
    if let Some((base, len)) = device.mmio {
        let read_write = true;
        resources.push(Box::new(aml::Memory32Fixed::new(read_write, base, len)));
    }
    if let Some(gsi) = device.gsi {
        let (consumer, edge, active_low, shared) = (true, true, false, false);
        resources.push(Box::new(aml::Interrupt::new(
            consumer, edge, active_low, shared, gsi,
        )));
    }
    let crs = aml::ResourceTemplate::new(resources.iter().map(AsRef::as_ref).collect());
    let (generation_id, cid) = (Path::new(GENERATION_ID_NAME), GENERATION_ID_CID);
    let notify = aml::Notify::new(&generation_id, &NOTIFY_DEVICE);
    let mut objects: Vec<Box<dyn Aml + '_>> = vec![
        Box::new(aml::Name::new(Path::new("_HID"), hid.as_ref())),
        Box::new(aml::Name::new(Path::new("_UID"), &device.uid)),
        Box::new(aml::Name::new(Path::new("_CRS"), &crs)),
    ];
    match device.object {
        Some(AcpiObject::GenerationId(gpa)) => {
            let (low, high) = (gpa as u32, (gpa >> 32) as u32);
            let package = aml::Package::new(vec![&low, &high]);
            objects.push(Box::new(aml::Name::new(Path::new("ADDR"), &package)));
            objects.push(Box::new(aml::Name::new(Path::new("_CID"), &cid)));
        }
        Some(AcpiObject::NotifyGenerationId) => {
            let children: Vec<&dyn Aml> = vec![&notify];
            objects.push(Box::new(aml::Method::new(
                Path::new("_EVT"),
                1,
                true,
                children,
            )));
        }
        None => {}
    }
    let objects = objects.iter().map(AsRef::as_ref).collect();
    bytes(&aml::Device::new(Path::new(&device.name), objects))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0u8, |s, b| s.wrapping_add(*b))
    }

    fn com1() -> AcpiDevice {
        AcpiDevice {
            name: "COM1".into(),
            hid: Hid::Eisa("PNP0501"),
            uid: 0,
            ports: Some((0x3f8, 8)),
            mmio: None,
            gsi: Some(4),
            object: None,
        }
    }

    #[test]
    fn a_device_has_its_registers_and_its_interrupt() {
        let aml = device(&AcpiDevice {
            name: "VR03".into(),
            hid: Hid::Acpi("LNRO0005"),
            uid: 3,
            ports: None,
            mmio: Some((0xd000_3000, 0x1000)),
            gsi: Some(8),
            object: None,
        });
        let has = |bytes: &[u8]| aml.windows(bytes.len()).any(|w| w == bytes);
        assert!(has(b"VR03") && has(b"LNRO0005\0"));
        // § 6.4.3.4: tag, length, writable, base, length.
        assert!(has(&[0x86, 9, 0, 1, 0, 0x30, 0, 0xd0, 0, 0x10, 0, 0]));
        // § 6.4.3.6: tag, length, consumer and edge and active high and exclusive, one interrupt, its number.
        assert!(has(&[0x89, 6, 0, 0b0011, 1, 8, 0, 0, 0]));
    }

    #[test]
    fn a_generation_id_has_its_address_and_an_event_device() {
        let [id, event] = AcpiDevice::generation_id(0x1_000e_f000, 3);
        let has = |aml: &[u8], bytes: &[u8]| aml.windows(bytes.len()).any(|w| w == bytes);
        let id = device(&id);
        assert!(has(&id, b"_HID\x0dVMGENCTR\0") && has(&id, b"_CID\x0dVM_Gen_Counter\0"));
        // A package of two numbers, low half first.
        assert!(has(&id, b"ADDR\x12\x08\x02\x0c\x00\xf0\x0e\x00\x01"));
        let event = device(&event);
        assert!(has(&event, b"_HID\x0dACPI0013\0"));
        // The same interrupt descriptor as any device's; a serialized method of one argument: Notify (VGEN, 0x80).
        assert!(has(&event, &[0x89, 6, 0, 0b0011, 1, 3, 0, 0, 0]));
        assert!(has(&event, b"_EVT\x09\x86VGEN\x0a\x80"));
    }

    #[test]
    fn every_table_is_reached_from_the_rsdp_and_adds_up_to_zero() {
        let mem = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        write_tables(&mem, 64, &[com1()]).unwrap();
        let read = |address: u64, len: usize| {
            let mut bytes = vec![0u8; len];
            mem.read_slice(&mut bytes, GuestAddress(address)).unwrap();
            bytes
        };
        let table = |address: u64| {
            let length = u32::from_le_bytes(read(address + 4, 4).try_into().unwrap());
            let table = read(address, length as usize);
            assert_eq!(sum(&table), 0, "{:?}", &table[..4]);
            table
        };
        let rsdp = read(ACPI_START, 36);
        assert_eq!(
            (&rsdp[..8], sum(&rsdp[..20]), sum(&rsdp)),
            (&b"RSD PTR "[..], 0, 0)
        );
        let xsdt = table(u64::from_le_bytes(rsdp[24..32].try_into().unwrap()));
        let mut signatures = Vec::new();
        for entry in xsdt[36..].chunks_exact(8) {
            let found = table(u64::from_le_bytes(entry.try_into().unwrap()));
            signatures.push(found[..4].to_vec());
            if &found[..4] == b"FACP" {
                let dsdt = table(u64::from_le_bytes(found[140..148].try_into().unwrap()));
                assert_eq!(&dsdt[..4], b"DSDT");
                assert!(dsdt.windows(4).any(|w| w == b"COM1"));
            }
        }
        assert_eq!(signatures, [b"FACP".to_vec(), b"APIC".to_vec()]);
    }
}
