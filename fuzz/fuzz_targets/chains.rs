//! Whatever lies in the rings and tables of a queue, walking it ends, and the device works after a reset. Through the console,
//! which has no thread: what happens depends on the input alone.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use minivmm_devices::bus::BusDevice;
use minivmm_devices::virtio::testing::{DATA, Driver, NEEDS_RESET};
use minivmm_fuzz::{Descriptor, Place, console};
use vm_memory::{Bytes, GuestAddress};

#[derive(Debug, Arbitrary)]
struct Input {
    transmit: bool,
    size_log2: u8,
    without: u64,
    table: Vec<Descriptor>,
    /// At DATA.
    indirect: Vec<Descriptor>,
    heads: Vec<u8>,
    scribbles: Vec<(Place, u16)>,
    avail_index: Option<u16>,
    /// Bytes that the host takes and types, in turn.
    host: Vec<u16>,
}

fuzz_target!(|input: Input| {
    let (hvc, port, host) = console();
    let mut driver = Driver::new(Box::new(hvc));
    driver.queue = input.transmit.into();
    driver.size = 1 << (input.size_log2 % 7);
    // VERSION_1 is not to be left out.
    driver.start(input.without & !(1 << 32));
    // It takes no input before its size has been read.
    driver.transport.read(0x100, &mut [0; 4]);

    for (index, d) in (0..).zip(input.table.iter().take(64)) {
        let (address, len) = (d.place.address(), d.len.bytes());
        driver.descriptor(index, address, len, (d.flags % 8).into(), d.next.into());
    }
    for (index, d) in (0..).zip(input.indirect.iter().take(64)) {
        let (address, len) = (d.place.address(), d.len.bytes());
        driver.descriptor_in(
            DATA,
            index,
            address,
            len,
            (d.flags % 8).into(),
            d.next.into(),
        );
    }
    for head in &input.heads {
        driver.offer((*head).into());
    }
    for (place, value) in &input.scribbles {
        let _ = driver
            .mem
            .write_slice(&value.to_le_bytes(), GuestAddress(place.address()));
    }
    if let Some(index) = input.avail_index {
        driver.set_avail_index(index);
    }
    driver.notify();
    for bytes in &input.host {
        *host.0.lock().unwrap() = usize::from(*bytes);
        let mut port = port.lock().unwrap();
        port.on_tx_space();
        let typed = vec![b'x'; (*bytes).into()];
        let taken = port.receive(&typed);
        assert!(taken <= typed.len());
        drop(port);
        driver.notify();
    }
    if driver.status() & NEEDS_RESET != 0 {
        let used = driver.used_index();
        driver.notify();
        *host.0.lock().unwrap() = 1 << 16;
        port.lock().unwrap().on_tx_space();
        assert_eq!(port.lock().unwrap().receive(b"x"), 0);
        assert_eq!(driver.used_index(), used, "it goes on");
    }
    driver.queue = 0;
    driver.start(0);
});
