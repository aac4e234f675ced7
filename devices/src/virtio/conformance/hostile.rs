//! Broken rings and hostile drivers.

use super::*;

/// A fault's name, and what the driver does.
type Fault = (&'static str, Box<dyn Fn(&mut Driver)>);

const TABLE: u64 = DATA + 0x1000;

fn offered(name: &'static str, prepare: impl Fn(&Driver) + 'static) -> Fault {
    let breaks = move |driver: &mut Driver| {
        prepare(driver);
        driver.offer(0);
    };
    (name, Box::new(breaks))
}

/// Heads and chains of descriptors.
fn broken_chains() -> Vec<Fault> {
    vec![
        ("head beyond the table", Box::new(|d| d.offer(16))),
        ("head far beyond", Box::new(|d| d.offer(u16::MAX))),
        offered("next beyond", |d| d.descriptor(0, DATA, 16, NEXT, 16)),
        offered("a loop of one", |d| d.descriptor(0, DATA, 16, NEXT, 0)),
        offered("a loop of two, writable", |d| {
            d.descriptor(0, DATA, 16, NEXT | WRITE, 1);
            d.descriptor(1, DATA, 16, NEXT | WRITE, 0);
        }),
        offered("readable behind writable", |d| {
            d.descriptor(0, DATA, 21, NEXT | WRITE, 1);
            d.descriptor(1, DATA, 16, 0, 0);
        }),
        (
            "an index too far ahead",
            Box::new(|d| d.set_avail_index(17)),
        ),
        (
            "an index that went back",
            Box::new(|d| d.set_avail_index(u16::MAX)),
        ),
    ]
}

/// Indirect tables.
fn broken_tables() -> Vec<Fault> {
    vec![
        offered("a loop in an indirect table", |d| {
            d.descriptor(0, TABLE, 32, INDIRECT, 0);
            d.descriptor_in(TABLE, 0, DATA, 16, NEXT, 1);
            d.descriptor_in(TABLE, 1, DATA, 16, NEXT, 0);
        }),
        offered("next beyond an indirect table", |d| {
            d.descriptor(0, TABLE, 32, INDIRECT, 0);
            d.descriptor_in(TABLE, 0, DATA, 16, NEXT, 2);
        }),
        offered("nested tables", |d| {
            d.descriptor(0, TABLE, 16, INDIRECT, 0);
            d.descriptor_in(TABLE, 0, TABLE, 16, INDIRECT, 0);
        }),
        offered("a table and a next", |d| {
            d.descriptor(0, TABLE, 16, INDIRECT | NEXT, 1);
            d.descriptor_in(TABLE, 0, DATA, 21, WRITE, 0);
            d.descriptor(1, DATA, 21, WRITE, 0);
        }),
        offered("an odd table", |d| d.descriptor(0, TABLE, 24, INDIRECT, 0)),
        offered("an empty table", |d| d.descriptor(0, TABLE, 0, INDIRECT, 0)),
        offered("a huge table", |d| {
            d.descriptor(0, TABLE, 0xffff_fff0, INDIRECT, 0)
        }),
        offered("a table in the gap", |d| {
            d.descriptor(0, GAP, 16, INDIRECT, 0)
        }),
        offered("a table at the end of the address space", |d| {
            d.descriptor(0, u64::MAX - 15, 32, INDIRECT, 0);
        }),
    ]
}

/// Addresses and lengths.
fn broken_buffers() -> Vec<Fault> {
    vec![
        offered("a buffer in the gap", |d| {
            d.descriptor(0, GAP, 21, WRITE, 0)
        }),
        offered("a buffer into the gap", |d| {
            d.descriptor(0, GAP - 20, 21, WRITE, 0)
        }),
        offered("a buffer past RAM", |d| {
            d.descriptor(0, END - 1, 2, WRITE, 0)
        }),
        offered("a buffer of 4 GiB", |d| {
            d.descriptor(0, 0, u32::MAX, WRITE, 0)
        }),
        offered("more than 4 GiB in all", |d| {
            d.descriptor(0, TABLE, 300 * 16, INDIRECT, 0);
            for n in 0..300 {
                let next = if n == 299 { 0 } else { NEXT };
                d.descriptor_in(TABLE, n, HIGH, 0x100_0000, WRITE | next, n + 1);
            }
        }),
        offered("a buffer that wraps", |d| {
            d.descriptor(0, u64::MAX - 3, 8, WRITE, 0)
        }),
    ]
}

#[test]
fn a_broken_ring_needs_a_reset() {
    each(|device, kind| {
        let mut driver = Driver::new(device);
        let faults = [broken_chains(), broken_tables(), broken_buffers()];
        for (case, breaks) in faults.into_iter().flatten() {
            driver.start(0);
            breaks(&mut driver);
            driver.notify();
            driver.expect_needs_reset(&format!("{kind}: {case}"));
        }
        // A table without the feature.
        driver.start(F_INDIRECT_DESC);
        driver.descriptor(0, DATA, 16, INDIRECT, 0);
        driver.descriptor_in(DATA, 0, DATA + 0x100, 21, WRITE, 0);
        driver.offer(0);
        driver.notify();
        driver.expect_needs_reset(kind);
    });
}

#[test]
fn what_came_before_the_fault_is_done() {
    each(|device, kind| {
        let mut driver = Driver::started(device, 0);
        driver.chain(0, &driver.any_chain());
        driver.offer(0);
        driver.offer(999);
        driver.notify();
        assert_eq!(driver.wait_used(), (0, driver.answer));
        driver.expect_needs_reset(kind);
    });
}

#[test]
fn rings_must_be_aligned_and_in_ram() {
    each(|device, kind| {
        let mut driver = Driver::new(device);
        let wrapping = u64::MAX - 0xf;
        for (case, descriptors, available, used) in [
            ("descriptors misaligned", DESCRIPTORS + 8, AVAILABLE, USED),
            ("available misaligned", DESCRIPTORS, AVAILABLE + 1, USED),
            ("used misaligned", DESCRIPTORS, AVAILABLE, USED + 2),
            ("descriptors in the gap", GAP, AVAILABLE, USED),
            ("available in the gap", DESCRIPTORS, GAP + 0x1000, USED),
            ("used into the gap", DESCRIPTORS, AVAILABLE, GAP - 0x10),
            ("descriptors past RAM", END, AVAILABLE, USED),
            ("used past RAM", DESCRIPTORS, AVAILABLE, END - 0x10),
            ("descriptors wrap", wrapping, AVAILABLE, USED),
            ("available wraps", DESCRIPTORS, wrapping, USED),
            ("used wraps", DESCRIPTORS, AVAILABLE, wrapping),
        ] {
            driver.negotiate(0);
            driver.pulses.take();
            driver.set_rings(16, descriptors, available, used);
            assert_eq!(driver.get(VIRTIO_MMIO_QUEUE_READY), 0, "{kind}: {case}");
            assert_ne!(driver.status() & NEEDS_RESET, 0, "{kind}: {case}");
            // Nothing is said before DRIVER_OK; then it is.
            assert_eq!(driver.pulses.take(), 0, "{kind}: {case}");
            driver.driver_ok();
            driver.expect_needs_reset(case);
        }
        // Rings over one another, and over their data, hurt the guest alone.
        driver.negotiate(0);
        driver.set_rings(16, DESCRIPTORS, DESCRIPTORS, DESCRIPTORS);
        driver.driver_ok();
        driver.notify();
        driver.start(0);
        driver.any_request();
    });
}

/// Something a hostile driver does.
#[derive(Debug, Clone)]
enum Act {
    Register(u32, u32),
    Descriptor(u16, u64, u32, u16, u16),
    Offer(u16),
    AvailIndex(u16),
    Scribble(u64, Vec<u8>),
    Start,
    Notify,
}

fn act() -> impl Strategy<Value = Act> {
    let value = prop_oneof![0u32..32, any::<u32>()];
    let place = prop_oneof![
        Just(DESCRIPTORS),
        Just(AVAILABLE),
        Just(USED),
        Just(DATA),
        Just(SEAM - 9),
        Just(GAP - 9),
        Just(END - 9),
        any::<u64>(),
    ];
    let flags = prop_oneof![0u16..8, any::<u16>()];
    let len = prop_oneof![
        Just(1u32),
        Just(16),
        Just(21),
        Just(512),
        0u32..600,
        any::<u32>()
    ];
    // Requests, and the rings with their flags and event indices.
    let scribbled = prop_oneof![
        DATA..DATA + 0x200,
        AVAILABLE..AVAILABLE + 40,
        USED..USED + 140
    ];
    prop_oneof![
        2 => ((0u32..0x44).prop_map(|n| n * 4), value).prop_map(|(r, v)| Act::Register(r, v)),
        6 => (0u16..17, place, len, flags, 0u16..17)
            .prop_map(|(i, a, l, f, n)| Act::Descriptor(i, a, l, f, n)),
        4 => (0u16..17).prop_map(Act::Offer),
        1 => any::<u16>().prop_map(Act::AvailIndex),
        2 => (scribbled, proptest::collection::vec(0u8..16, 1..32))
            .prop_map(|(a, b)| Act::Scribble(a, b)),
        2 => Just(Act::Start),
        4 => Just(Act::Notify),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]
    /// Whatever a driver does, nothing panics, no thread is left in the way, and after a reset all is well.
    #[test]
    fn a_hostile_driver_is_survived(kind in 0..KINDS.len(), acts in proptest::collection::vec(act(), 1..60)) {
        let mut driver = Driver::started(device(KINDS[kind]), 0);
        for act in acts {
            match act {
                Act::Register(register, value) => driver.set(register, value),
                Act::Descriptor(index, address, len, flags, next) => {
                    driver.descriptor(index, address, len, flags, next);
                }
                Act::Offer(head) => driver.offer(head),
                Act::AvailIndex(index) => driver.set_avail_index(index),
                Act::Scribble(address, bytes) => driver.write(address, &bytes),
                Act::Start => driver.start(0),
                Act::Notify => driver.notify(),
            }
        }
        driver.start(0);
        driver.any_request();
    }
}

/// The descriptors of a request change all the time while it is looked at.
#[test]
fn rewrites_between_check_and_use_are_survived() {
    each(|device, _| {
        let mut driver = Driver::started(device, 0);
        let rewriter = {
            let mem = driver.mem.clone();
            let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
            let stopped = stop.clone();
            let thread = std::thread::spawn(move || {
                let mut n = 0u32;
                while !stopped.load(std::sync::atomic::Ordering::Relaxed) {
                    n = n.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    let len = [0, 16, 513, u32::MAX][n as usize >> 8 & 3];
                    let flags = (n >> 16 & 7) as u16;
                    let bytes =
                        u64::from(flags) << 32 | u64::from(len) | u64::from(n >> 20 & 31) << 48;
                    let at = DESCRIPTORS + 16 * u64::from(n >> 4 & 3) + 8;
                    vm_memory::Bytes::write_obj(&mem, bytes, vm_memory::GuestAddress(at)).unwrap();
                }
            });
            (stop, thread)
        };
        for round in 0..400 {
            driver.chain(0, &driver.any_chain());
            driver.offer(0);
            driver.notify();
            if driver.status() & NEEDS_RESET != 0 || round % 16 == 15 {
                driver.start(0);
            }
        }
        rewriter.0.store(true, std::sync::atomic::Ordering::Relaxed);
        rewriter.1.join().unwrap();
        driver.start(0);
        driver.any_request();
    });
}
