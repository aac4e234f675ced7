//! Saving and restoring platform devices.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use proptest::collection::vec;
use proptest::prelude::*;

use super::ioapic::{Ioapic, Msi, MsiRoutes};
use super::pci::PciConfig;
use super::power::AcpiPower;
use super::serial::Serial;
use super::testing::{events, inb};
use crate::bus::BusDevice;
use crate::chardev::{ConsoleDevice, ConsoleOutput};
use crate::state::{Record, SaveState, Suspend};
use crate::virtio::testing::Pulses;

trait Device: BusDevice + Suspend {}

impl<T: BusDevice + Suspend> Device for T {}

/// Always has room, or never.
struct Host(Arc<AtomicBool>);

impl ConsoleOutput for Host {
    fn write(&mut self, bytes: &[u8]) -> usize {
        if self.has_room() { bytes.len() } else { 0 }
    }

    fn has_room(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    fn call_back(&self) {}
}

fn serial() -> (Serial, Arc<Pulses>, Arc<AtomicBool>) {
    let (pulses, room) = (Arc::new(Pulses::default()), Arc::new(AtomicBool::new(true)));
    let (line, host) = (pulses.line(), Box::new(Host(room.clone())));
    (Serial::new(line, host, Arc::new(|| {})), pulses, room)
}

/// The routes that were set last, and pending edges.
#[derive(Clone, Default)]
struct Routes(Arc<Mutex<[Option<Msi>; 24]>>, Arc<AtomicU32>);

impl MsiRoutes for Routes {
    fn set_route(&mut self, pin: u32, msi: Option<Msi>) {
        self.0.lock().unwrap()[pin as usize] = msi;
    }

    fn pending(&self) -> u32 {
        self.1.load(Ordering::Relaxed)
    }

    fn set_pending(&mut self, pins: u32) {
        self.1.store(pins, Ordering::Relaxed);
    }
}

fn device(kind: usize) -> Box<dyn Device> {
    match kind {
        0 => Box::new(serial().0),
        1 => Box::new(Ioapic::new(Box::new(Routes::default()))),
        2 => Box::new(AcpiPower::new(events().0)),
        _ => Box::new(PciConfig::new(events().0)),
    }
}

fn record(json: &str) -> &Record {
    serde_json::from_str(json).unwrap()
}

proptest! {
    #[test]
    fn a_restored_device_is_the_saved_one(
        kind in 0usize..4,
        accesses in vec((0u64..0x18, vec(any::<u8>(), 1..5), any::<bool>()), 0..100),
        later in vec((0u64..0x18, 1usize..5), 0..20),
    ) {
        let mut saved = device(kind);
        for (offset, data, is_write) in accesses {
            if is_write {
                saved.write(offset, &data);
            } else {
                saved.read(offset, &mut data.clone());
            }
        }
        prop_assert!(saved.pause(std::time::Duration::ZERO));
        let state = saved.save().unwrap();
        let mut restored = device(kind);
        restored.restore(&state).unwrap();
        let again = restored.save().unwrap();
        prop_assert_eq!(again.get(), state.get());
        assert!(restored.resume());
        assert!(saved.resume());
        // A driver sees no difference.
        for (offset, len) in later {
            let (mut ours, mut theirs) = (vec![0; len], vec![0; len]);
            saved.read(offset, &mut ours);
            restored.read(offset, &mut theirs);
            prop_assert_eq!(ours, theirs);
        }
    }

    /// Whatever numbers a record has, restoring it is an error, or gives a device that can be used.
    #[test]
    fn any_numbers_are_taken_or_refused(kind in 0usize..4, numbers in vec(any::<u64>(), 40)) {
        let template = device(kind).save().unwrap();
        let mut numbers = numbers.iter();
        let mut pieces = template.get().split_inclusive(|c: char| !c.is_ascii_digit());
        let mut json: String = pieces.by_ref().take(12).collect();
        for piece in pieces {
            let end = piece.trim_start_matches(|c: char| c.is_ascii_digit());
            match numbers.next() {
                Some(number) if end.len() < piece.len() => json += &format!("{}{end}", number % 300),
                _ => json += piece,
            }
        }
        let mut restored = device(kind);
        if restored.restore(record(&json)).is_ok() {
            assert!(restored.resume());
            for offset in 0..0x18 {
                restored.write(offset, &[0x13]);
                restored.read(offset, &mut [0; 4]);
            }
            restored.save().unwrap();
        }
    }
}

#[test]
fn a_restored_uart_interrupts_once_more_for_what_is_pending() {
    let restored = |saved: &Serial| {
        let (mut serial, pulses, room) = serial();
        serial.restore(&saved.save().unwrap()).unwrap();
        assert_eq!(pulses.take(), 0, "not before the local APICs are there");
        (serial, pulses, room)
    };
    let (mut saved, pulses, room) = serial();
    // RTS and OUT2; the transmit interrupt, of which the guest has not heard yet.
    saved.write(4, &[0x0a]);
    saved.write(1, &[0x02]);
    assert_eq!(pulses.take(), 1);
    assert!(saved.resume());
    assert_eq!(pulses.take(), 0, "a mere pause loses nothing");
    let (mut serial, pulses, _) = restored(&saved);
    assert!(serial.resume());
    assert_eq!((pulses.take(), inb(&mut serial, 2)), (1, 0x02));
    // Received bytes, a break among them.
    saved.write(1, &[0x05]);
    assert_eq!(saved.receive(b"x"), 1);
    let (mut serial, pulses, _) = restored(&saved);
    assert!(serial.resume());
    assert_eq!((pulses.take(), inb(&mut serial, 0)), (1, b'x'));
    // A guest that waits for room: the new host has some.
    assert_eq!(inb(&mut saved, 0), b'x');
    room.store(false, Ordering::Relaxed);
    saved.write(1, &[0x02]);
    assert_eq!(inb(&mut saved, 5) & 0x20, 0);
    let (mut serial, pulses, _) = restored(&saved);
    assert!(serial.resume());
    assert_eq!((pulses.take(), inb(&mut serial, 2)), (1, 0x02));
    let (mut serial, pulses, room) = restored(&saved);
    room.store(false, Ordering::Relaxed);
    assert!(serial.resume());
    assert_eq!(pulses.take(), 0);
    room.store(true, Ordering::Relaxed);
    serial.on_tx_space();
    assert_eq!(pulses.take(), 1);
}

#[test]
fn a_restored_ioapic_has_its_routes_and_pending_edges() {
    let mut saved = Ioapic::new(Box::new(Routes::default()));
    saved.write(0, &[0x18]);
    saved.write(0x10, &[0x31, 0, 0, 0]);
    let state = saved.save().unwrap();
    let state = state.get().replace(r#""pending":0"#, r#""pending":32"#);
    let routes = Routes::default();
    let mut restored = Ioapic::new(Box::new(routes.clone()));
    restored.restore(record(&state)).unwrap();
    assert_eq!(restored.save().unwrap().get(), state);
    assert_eq!(routes.1.load(Ordering::Relaxed), 1 << 5);
    let routed: Vec<_> = (0..24)
        .filter(|pin| routes.0.lock().unwrap()[*pin].is_some())
        .collect();
    assert_eq!(routed, [4]);
}

#[test]
fn a_state_that_no_guest_can_bring_about_is_refused() {
    let rx = format!(
        r#""rx":[{}]"#,
        [r#"{"byte":1,"is_break":false}"#; 17].join(",")
    );
    for (kind, from, to, error) in [
        (
            0,
            r#""rx":[]"#,
            rx.as_str(),
            "rx holds 17 bytes of 16 at most",
        ),
        (0, r#""ier":0"#, r#""ier":16"#, "ier has unknown bits: 0x10"),
        (0, r#""fcr":0"#, r#""fcr":2"#, "fcr has unknown bits: 0x2"),
        (0, r#""mcr":0"#, r#""mcr":32"#, "mcr has unknown bits: 0x20"),
        (1, r#""id":0"#, r#""id":1"#, "id is 0x1"),
        (
            1,
            "[65536,",
            "[69632,",
            "entries has reserved bits at pin 0: 0x11000",
        ),
        (1, "[65536,", "[", "invalid length 23"),
        (1, "[65536,", "[65536,65536,", "trailing characters"),
        (
            1,
            "\"pending\":0",
            "\"pending\":16777216",
            "pending has pins that are not masked or do not exist",
        ),
        (
            1,
            "\"pending\":0",
            "\"pending\":4294967296",
            "invalid value",
        ),
        (
            2,
            "\"state\":0",
            "\"state\":32",
            "sleep_control has unknown bits: 0x20",
        ),
        (3, "[0,", "[", "invalid length 3"),
    ] {
        let state = device(kind).save().unwrap();
        let wrong = state.get().replacen(from, to, 1);
        assert_ne!(wrong, state.get(), "{from}");
        let found = device(kind).restore(record(&wrong)).unwrap_err();
        assert!(found.to_string().contains(error), "{error}: {found}");
    }
}
