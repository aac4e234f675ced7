//! An address space with devices in it: guest ports and MMIO alike.

use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use thiserror::Error;

/// A device on a bus. Offsets count from the start of the range that the access fell in; `data` is as long as the
/// access, and the bus promises that the access lies inside the range. Values are little-endian.
pub trait BusDevice: Send {
    /// The guest reads: fill all of `data`.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// The guest writes `data`.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// Why a device cannot be mapped.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum BusError {
    /// The range has no addresses.
    #[error("the range at {0:#x} is empty")]
    Empty(u64),
    /// The range runs past the end of the address space.
    #[error("the range at {0:#x} of length {1:#x} runs past the end of the address space")]
    Overflow(u64, u64),
    /// Another device has some of these addresses.
    #[error("the range {0:#x?} overlaps a device at {1:#x?}")]
    Overlap(RangeInclusive<u64>, RangeInclusive<u64>),
}

/// A named range of addresses and the device behind it.
struct Region {
    name: String,
    base: u64,
    /// Inclusive, so that a range may end with the address space.
    last: u64,
    device: Arc<Mutex<dyn BusDevice>>,
}

impl Region {
    fn lock(&self) -> MutexGuard<'_, dyn BusDevice + 'static> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many of the `len` bytes from `addr`, an address in the range, lie in the range.
    fn reach(&self, addr: u64, len: usize) -> usize {
        usize::try_from(self.last - addr).map_or(len, |behind| len.min(behind.saturating_add(1)))
    }
}

/// Devices by address. Regions can be mapped while vCPUs run. An access locks only the device that it reaches, and no
/// lock of the bus while the device handles it.
#[derive(Default)]
pub struct Bus {
    /// Sorted by `base`, disjoint.
    regions: RwLock<Vec<Arc<Region>>>,
    unclaimed_reads: AtomicU64,
    unclaimed_writes: AtomicU64,
}

impl Bus {
    /// Maps `device` at `base..base + len`. A device may be mapped at several ranges; offsets are relative to each.
    pub fn map(
        &self,
        name: &str,
        base: u64,
        len: u64,
        device: Arc<Mutex<dyn BusDevice>>,
    ) -> Result<(), BusError> {
        let reach = len.checked_sub(1).ok_or(BusError::Empty(base))?;
        let last = base.checked_add(reach);
        let last = last.ok_or(BusError::Overflow(base, len))?;
        let mut regions = self.regions.write().unwrap_or_else(PoisonError::into_inner);
        let index = regions.partition_point(|r| r.last < base);
        if let Some(other) = regions.get(index).filter(|r| r.base <= last) {
            return Err(BusError::Overlap(base..=last, other.base..=other.last));
        }
        let region = Region {
            name: name.to_owned(),
            base,
            last,
            device,
        };
        regions.insert(index, Arc::new(region));
        Ok(())
    }

    /// Reads; returns whether a device answered. Where none does, `data` becomes all ones.
    ///
    /// The device at the first address gets as much of the access as lies in its range: `outl` of a status to the one-byte
    /// exit port is common. The rest, which a real bus would give to the next device, reads as ones or is lost.
    pub fn read(&self, addr: u64, data: &mut [u8]) -> bool {
        data.fill(0xff);
        let Some((region, offset)) = self.find(addr) else {
            self.unclaimed_reads.fetch_add(1, Ordering::Relaxed);
            return false;
        };
        let len = region.reach(addr, data.len());
        if let Some(data) = data.get_mut(..len) {
            region.lock().read(offset, data);
        }
        true
    }

    /// Writes; returns whether a device took it.
    pub fn write(&self, addr: u64, data: &[u8]) -> bool {
        let Some((region, offset)) = self.find(addr) else {
            self.unclaimed_writes.fetch_add(1, Ordering::Relaxed);
            return false;
        };
        let len = region.reach(addr, data.len());
        if let Some(data) = data.get(..len) {
            region.lock().write(offset, data);
        }
        true
    }

    /// The first address of the region that `addr` lies in; `None` where no device is.
    pub fn base_of(&self, addr: u64) -> Option<u64> {
        self.find(addr).map(|(region, _)| region.base)
    }

    /// The name of the region that `addr` lies in; `None` where no device is.
    pub fn name_of(&self, addr: u64) -> Option<String> {
        self.find(addr).map(|(region, _)| region.name.clone())
    }

    /// How many reads no device answered.
    pub fn unclaimed_reads(&self) -> u64 {
        self.unclaimed_reads.load(Ordering::Relaxed)
    }

    /// How many writes no device took.
    pub fn unclaimed_writes(&self) -> u64 {
        self.unclaimed_writes.load(Ordering::Relaxed)
    }

    fn find(&self, addr: u64) -> Option<(Arc<Region>, u64)> {
        let regions = self.regions.read().unwrap_or_else(PoisonError::into_inner);
        let region = regions.get(regions.partition_point(|r| r.last < addr))?;
        Some((Arc::clone(region), addr.checked_sub(region.base)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Default)]
    struct Recorder {
        id: u8,
        writes: Vec<(u64, Vec<u8>)>,
    }

    impl BusDevice for Recorder {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(self.id.wrapping_add(offset as u8));
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            self.writes.push((offset, data.to_vec()));
        }
    }

    fn device(id: u8) -> Arc<Mutex<Recorder>> {
        Arc::new(Mutex::new(Recorder {
            id,
            ..Recorder::default()
        }))
    }

    #[test]
    fn accesses_reach_their_device_by_offset() {
        let bus = Bus::default();
        let (a, b) = (device(0x10), device(0x20));
        bus.map("test", 0x3f8, 8, a.clone()).unwrap();
        bus.map("test", 0x60, 5, b.clone()).unwrap();
        let mut data = [0];
        assert!(bus.read(0x3ff, &mut data));
        assert_eq!(data, [0x17]);
        assert!(bus.read(0x60, &mut data));
        assert_eq!(data, [0x20]);
        assert!(bus.write(0x3f9, &[1, 2]));
        assert_eq!(a.lock().unwrap().writes, [(1, vec![1, 2])]);
        assert!(b.lock().unwrap().writes.is_empty());
    }

    #[test]
    fn a_device_gets_what_lies_in_its_range() {
        let bus = Bus::default();
        let (a, b) = (device(0x10), device(0x20));
        bus.map("test", 0xf4, 1, a.clone()).unwrap();
        bus.map("test", u64::MAX - 1, 2, b.clone()).unwrap();
        let mut data = [0; 4];
        assert!(bus.read(0xf4, &mut data));
        assert_eq!(data, [0x10, 0xff, 0xff, 0xff]);
        assert!(bus.write(0xf4, &[1, 2, 3, 4]));
        assert_eq!(a.lock().unwrap().writes, [(0, vec![1])]);
        assert!(bus.read(u64::MAX, &mut data));
        assert_eq!(data, [0x21, 0xff, 0xff, 0xff]);
        assert!(bus.write(u64::MAX - 1, &[1, 2, 3]));
        assert_eq!(b.lock().unwrap().writes, [(0, vec![1, 2])]);
    }

    #[test]
    fn unclaimed_accesses_read_ones_and_are_counted() {
        let bus = Bus::default();
        bus.map("test", 0x100, 4, device(0)).unwrap();
        for (addr, len) in [
            (0xff, 1),
            (0xff, 2),
            (0x104, 1),
            (u64::MAX, 1),
            (u64::MAX, 2),
        ] {
            let mut data = vec![0; len];
            assert!(!bus.read(addr, &mut data), "{addr:#x}");
            assert!(data.iter().all(|b| *b == 0xff));
            assert!(!bus.write(addr, &data));
        }
        assert_eq!((bus.unclaimed_reads(), bus.unclaimed_writes()), (5, 5));
        assert!(bus.read(0x100, &mut []));
    }

    #[test]
    fn bad_ranges_are_refused() {
        let bus = Bus::default();
        assert_eq!(bus.map("test", 7, 0, device(0)), Err(BusError::Empty(7)));
        assert_eq!(
            bus.map("test", u64::MAX, 2, device(0)),
            Err(BusError::Overflow(u64::MAX, 2))
        );
        bus.map("test", u64::MAX, 1, device(0)).unwrap();
        bus.map("test", 0x100, 0x10, device(0)).unwrap();
        for (base, len) in [
            (0x100, 0x10),
            (0xff, 2),
            (0x10f, 1),
            (0x104, 1),
            (0, 0x1000),
        ] {
            assert!(
                matches!(
                    bus.map("test", base, len, device(0)),
                    Err(BusError::Overlap(..))
                ),
                "{base:#x}"
            );
        }
        bus.map("test", 0xff, 1, device(0)).unwrap();
        bus.map("test", 0x110, 1, device(0)).unwrap();
    }

    #[test]
    fn regions_come_and_go_while_others_are_accessed() {
        let bus = Bus::default();
        bus.map("stays", 0, 1, device(1)).unwrap();
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                (0..10_000).all(|_| {
                    let mut data = [0];
                    bus.read(0, &mut data) && data == [1]
                })
            });
            for address in 0x10..1000 {
                assert_eq!(bus.name_of(address), None);
                bus.map("comes", address, 1, device(2)).unwrap();
                assert_eq!(bus.name_of(address).as_deref(), Some("comes"));
            }
            assert!(reader.join().unwrap());
        });
    }

    #[test]
    fn a_device_that_panicked_once_is_still_reachable() {
        let bus = Bus::default();
        let dev = device(1);
        bus.map("test", 0, 1, dev.clone()).unwrap();
        let _ = std::thread::spawn(move || {
            let _guard = dev.lock().unwrap();
            panic!("poison the lock");
        })
        .join();
        let mut data = [0];
        assert!(bus.read(0, &mut data));
    }

    proptest! {
        /// The sorted search finds what a walk over all ranges finds.
        #[test]
        fn lookup_matches_a_linear_search(
            ranges in proptest::collection::vec((0u64..200, 1u64..20), 0..12),
            accesses in proptest::collection::vec((0u64..240, 1usize..9), 1..40),
        ) {
            let bus = Bus::default();
            let mut kept: Vec<(u64, u64)> = Vec::new();
            for (base, len) in ranges {
                let free = kept.iter().all(|(b, l)| base + len <= *b || b + l <= base);
                prop_assert_eq!(bus.map("test", base, len, device(0)).is_ok(), free);
                if free {
                    kept.push((base, len));
                }
            }
            for (addr, len) in accesses {
                let hit = kept.iter().find(|(b, l)| (*b..b + l).contains(&addr));
                let mut data = vec![0; len];
                prop_assert_eq!(bus.read(addr, &mut data), hit.is_some());
                prop_assert_eq!(bus.base_of(addr), hit.map(|(b, _)| *b));
                prop_assert_eq!(data[0], hit.map_or(0xff, |(b, _)| (addr - b) as u8));
            }
        }
    }
}
