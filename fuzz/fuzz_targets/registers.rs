//! Whatever accesses a driver makes to the registers of a device, and whatever it writes to memory meanwhile, the device
//! works after a reset.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use minivmm_devices::bus::BusDevice;
use minivmm_devices::thread::ThreadStarter;
use minivmm_devices::virtio::device::VirtioDevice;
use minivmm_devices::virtio::rng::Rng;
use minivmm_devices::virtio::testing::Driver;
use minivmm_fuzz::{DISK_SIZE, Descriptor, DiskKind, Place, block, console, file};
use vm_memory::{Bytes, GuestAddress};

#[derive(Debug, Arbitrary)]
enum Kind {
    Rng,
    Block(DiskKind),
    Console,
}

#[derive(Debug, Arbitrary)]
enum Act {
    /// An aligned word.
    Register(u8, u32),
    Read(u16, u8),
    Write(u16, Vec<u8>),
    Memory(Place, [u8; 16]),
    Descriptor(u8, Descriptor),
    Queue(u8),
    Offer(u8),
    Notify,
    Start(u64),
    /// What the host does to a console.
    Host(u8),
}

fuzz_target!(|input: (Kind, Vec<Act>)| {
    let (kind, acts) = input;
    let (hvc, port, host) = console();
    let device: Box<dyn VirtioDevice> = match kind {
        Kind::Rng => Box::new(Rng::new(&ThreadStarter::default()).unwrap()),
        Kind::Block(kind) => Box::new(block(&file(&[0; DISK_SIZE]), kind)),
        Kind::Console => Box::new(hvc),
    };
    let mut driver = Driver::new(device);
    for act in acts {
        match act {
            Act::Register(index, value) => driver.set(u32::from(index % 0x48) * 4, value),
            Act::Read(offset, len) => {
                let mut data = vec![0; len.into()];
                driver.transport.read((offset % 0x1000).into(), &mut data);
            }
            Act::Write(offset, data) => driver.transport.write((offset % 0x1000).into(), &data),
            Act::Memory(place, bytes) => {
                // Where there is none, nothing is written.
                let _ = driver
                    .mem
                    .write_slice(&bytes, GuestAddress(place.address()));
            }
            Act::Descriptor(
                index,
                Descriptor {
                    place,
                    len,
                    flags,
                    next,
                },
            ) => {
                let (flags, next) = (u16::from(flags % 8), u16::from(next % 17));
                driver.descriptor(
                    u16::from(index % 16),
                    place.address(),
                    len.bytes(),
                    flags,
                    next,
                );
            }
            Act::Queue(queue) => driver.queue = u16::from(queue % 2),
            Act::Offer(head) => driver.offer(u16::from(head % 17)),
            Act::Notify => driver.notify(),
            Act::Start(without) => {
                driver.queue = 0;
                // VERSION_1 is not to be left out.
                driver.start(without & !(1 << 32));
            }
            Act::Host(room) => {
                *host.0.lock().unwrap() = usize::from(room) << 8;
                let mut port = port.lock().unwrap();
                port.on_tx_space();
                port.receive(&vec![b'x'; room.into()]);
            }
        }
    }
    driver.queue = 0;
    driver.start(0);
});
