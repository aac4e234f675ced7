//! Whatever a snapshot says of devices, restoring it is an error, or gives devices that work after a reset.
#![no_main]

use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use minivmm_devices::block::{Disk, DiskMode};
use minivmm_devices::bus::BusDevice;
use minivmm_devices::interrupt::IrqLine;
use minivmm_devices::platform::ioapic::{Ioapic, Msi, MsiRoutes};
use minivmm_devices::platform::pci::PciConfig;
use minivmm_devices::platform::power::AcpiPower;
use minivmm_devices::platform::serial::Serial;
use minivmm_devices::state::{Devices, Suspend};
use minivmm_devices::thread::ThreadStarter;
use minivmm_devices::virtio::device::VirtioDevice;
use minivmm_devices::virtio::rng::Rng;
use minivmm_devices::virtio::testing::{Driver, USED};
use minivmm_devices::virtio::transport::mmio::MmioTransport;
use minivmm_fuzz::{DISK_SIZE, DiskKind, Number, Place, block, console, edited, file, path};
use vm_memory::{Bytes, GuestAddress};

#[derive(Debug, Arbitrary)]
enum Kind {
    Rng,
    Block(DiskKind),
    Console,
}

#[derive(Debug, Arbitrary)]
enum Input {
    /// No JSON, most often.
    Bytes(Vec<u8>),
    /// What was saved of a virtio device that runs, with other numbers at some places, and other memory.
    Edited(Kind, Vec<(u8, Number)>, Vec<(Place, [u8; 16])>),
    /// The same of the platform's devices.
    Platform(Vec<(u8, Number)>),
    /// The table and the length of an ephemeral disk's data.
    Overlay(Vec<(u8, u8)>, Option<u64>, u32),
}

struct NoRoutes;

impl MsiRoutes for NoRoutes {
    fn set_route(&mut self, _: u32, _: Option<Msi>) {}

    fn pending(&self) -> u32 {
        0
    }

    fn set_pending(&mut self, _: u32) {}
}

fn platform() -> Devices {
    let events = || -> minivmm_devices::event::EventSink { Arc::new(|_| {}) };
    let serial = Serial::new(
        IrqLine::new(|| Ok(())),
        Box::new(console().2),
        Arc::new(|| {}),
    );
    let mut devices = Devices::default();
    let mut add = |name: &str, device: Arc<Mutex<dyn Suspend>>| devices.add(name, device);
    add("serial", Arc::new(Mutex::new(serial)));
    let ioapic = Ioapic::new(Box::new(NoRoutes));
    add("ioapic", Arc::new(Mutex::new(ioapic)));
    add("power", Arc::new(Mutex::new(AcpiPower::new(events()))));
    add("pci", Arc::new(Mutex::new(PciConfig::new(events()))));
    devices
}

fn restore(devices: &Devices, state: &[u8]) {
    if devices.restore(state).is_ok() {
        assert!(devices.resume());
        devices.pause(Duration::from_secs(20), &|| false).unwrap();
        let again = devices.save().unwrap();
        devices.restore(&again).unwrap();
        assert!(devices.resume());
    }
}

fn virtio(kind: Kind, edits: &[(u8, Number)], memory: &[(Place, [u8; 16])]) {
    let disk = file(&[0; DISK_SIZE]);
    let device: Box<dyn VirtioDevice> = match kind {
        Kind::Rng => Box::new(Rng::new(&ThreadStarter::default()).unwrap()),
        Kind::Block(kind) => Box::new(block(&disk, kind)),
        Kind::Console => Box::new(console().0),
    };
    let mut driver = Driver::started(device, 0);
    let mem = driver.mem.clone();
    let none = Box::new(Rng::new(&ThreadStarter::default()).unwrap());
    let none = MmioTransport::new(none, mem.clone(), IrqLine::new(|| Ok(())));
    let transport = std::mem::replace(&mut driver.transport, none);
    let transport = Arc::new(Mutex::new(transport));
    let mut devices = Devices::default();
    devices.add("device", transport.clone());
    devices.pause(Duration::from_secs(20), &|| false).unwrap();
    let saved = devices.save().unwrap();
    for (place, bytes) in memory {
        let _ = mem.write_slice(bytes, GuestAddress(place.address()));
    }
    restore(&devices, &edited(&saved, edits));
    for register in (0..0x100).step_by(4) {
        transport.lock().unwrap().read(register, &mut [0; 4]);
    }
    drop(devices);
    driver.transport = Arc::into_inner(transport).unwrap().into_inner().unwrap();
    driver.start(0);
    driver.read(USED, 4);
}

fuzz_target!(|input: Input| match input {
    Input::Bytes(bytes) => restore(&platform(), &bytes),
    Input::Edited(kind, edits, memory) => virtio(kind, &edits, &memory),
    Input::Platform(edits) => {
        let devices = platform();
        restore(&devices, &edited(&devices.save().unwrap(), &edits));
    }
    Input::Overlay(runs, count, len) => {
        let (base, saved) = (file(&[1; DISK_SIZE]), file(&[]));
        let mut table = count.unwrap_or(runs.len() as u64).to_le_bytes().to_vec();
        for (first, count) in runs {
            table.extend(u64::from(first).to_le_bytes());
            table.extend(u64::from(count).to_le_bytes());
        }
        saved.write_all_at(&table, 0).unwrap();
        let len = u64::from(len % (1 << 20));
        saved.set_len(len).unwrap();
        let mut disk = Disk::open(&path(&base), DiskMode::Ephemeral).unwrap();
        if disk.restore_overlay(Arc::new(saved), 0, len).is_ok() {
            disk.save_overlay(&file(&[]), 0, &|| false).unwrap();
        }
    }
});
