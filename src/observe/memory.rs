//! What a VMM's process holds in memory that no other process has, and how much of it is its guest's.

use std::io::BufRead;

use procfs::process::{MemoryMap, MemoryMaps, Process};
use procfs::{FromBufRead, ProcResult};
use serde::Serialize;

use crate::arch::layout::MMIO_GAP_START;
use crate::host::memory::private_bytes;

/// Memory of a VMM's process that no other process shares, in bytes: resident or swapped out, in anonymous or file pages. What
/// the kernel keeps for it, KVM's page tables among it, is not part of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct GuestShare {
    /// Within the guest's RAM: what the guest has touched.
    pub guest_bytes: u64,
    /// All else: what the VMM needs for itself.
    pub own_bytes: u64,
}

impl GuestShare {
    /// Reads it of another process whose guest has `ram` bytes. `None` without such a process.
    pub fn read(pid: u32, ram: u64) -> Option<Self> {
        Self::of(&Process::new(pid as i32).ok()?.smaps().ok()?.0, ram)
    }

    /// Reads it from /proc/PID/smaps. The kernel goes through page tables for that: it takes milliseconds with a large guest.
    pub fn from_smaps(smaps: impl BufRead, ram: u64) -> ProcResult<Option<Self>> {
        Ok(Self::of(&MemoryMaps::from_buf_read(smaps)?.0, ram))
    }

    /// VMMs do not agree on a name for the guest's RAM, but it has a size: it is the adjoining mappings that add up to exactly so
    /// much, or to the two parts that lie below and above minivmm's MMIO gap. `None` without such mappings.
    fn of(maps: &[MemoryMap], ram: u64) -> Option<Self> {
        let guest_bytes = adjoining(maps, ram).or_else(|| {
            let high = ram.checked_sub(MMIO_GAP_START)?;
            Some(adjoining(maps, MMIO_GAP_START)? + adjoining(maps, high)?)
        })?;
        let all: u64 = maps.iter().map(private_bytes).sum();
        Some(Self {
            guest_bytes,
            own_bytes: all - guest_bytes,
        })
    }
}

/// The private memory of the mappings without a gap between them that have `size` bytes together.
fn adjoining(maps: &[MemoryMap], size: u64) -> Option<u64> {
    (0..maps.len()).find_map(|first| {
        let maps = maps.get(first..)?;
        let start = maps.first()?.address.0;
        let mut end = start;
        let mut private = 0;
        for map in maps {
            if map.address.0 != end || map.address.1 - start > size {
                return None;
            }
            end = map.address.1;
            private += private_bytes(map);
            if end - start == size {
                return Some(private);
            }
        }
        None
    })
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::BufReader;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::vmm::memory;

    fn share(smaps: &str, ram: u64) -> Option<GuestShare> {
        GuestShare::from_smaps(smaps.as_bytes(), ram).unwrap()
    }

    #[test]
    fn what_the_guest_has_touched_is_the_guests() {
        // No other test's guest has so much.
        const SIZE: u64 = 67 << 20;
        let mem = memory::create(SIZE).unwrap();
        let read = || {
            let smaps = BufReader::new(File::open("/proc/self/smaps").unwrap());
            GuestShare::from_smaps(smaps, SIZE).unwrap().unwrap()
        };
        let before = read();
        assert!(
            before.guest_bytes < SIZE && before.own_bytes > 0,
            "{before:?}"
        );
        for page in (0..SIZE).step_by(4096) {
            mem.write_obj(1u8, GuestAddress(page)).unwrap();
        }
        assert_eq!(read().guest_bytes, SIZE);
    }

    const SMAPS: &str = "\
00400000-00500000 r-xp 00000000 fe:00 42                         /usr/bin/vmm
Private_Clean:       100 kB
Private_Dirty:        20 kB
7f0000000000-7f0000400000 rw-p 00000000 00:00 0 
Private_Dirty:         8 kB
Private_Hugetlb:    2048 kB
7f0000400000-7f0000500000 r-xp 00000000 fe:00 7                  /boot/vmlinux
Shared_Clean:       1024 kB
Private_Dirty:         4 kB
7f0000500000-7f0001000000 rw-p 00000000 00:00 0 
7f0001000000-7f0001001000 rw-s 00000000 00:0e 9                  anon_inode:kvm-vcpu:0
Private_Dirty:         4 kB
";

    #[test]
    fn guest_ram_is_found_by_its_size() {
        let found = share(SMAPS, 16 << 20).unwrap();
        assert_eq!(
            (found.guest_bytes >> 10, found.own_bytes >> 10),
            (2060, 124)
        );
        // No mapping, nor any that adjoin, of such a size.
        assert_eq!(share(SMAPS, 32 << 20), None);
        assert_eq!(share("", 16 << 20), None);
        assert_eq!(GuestShare::read(u32::MAX >> 1, 16 << 20), None);
    }

    #[test]
    fn guest_ram_may_lie_in_two_parts() {
        let smaps = "\
7f0000000000-7f00c0000000 rw-p 00000000 00:00 0 
Private_Dirty:         5 kB
7f1000000000-7f1040000000 rw-p 00000000 00:00 0 
Private_Dirty:         7 kB
7f2000000000-7f2000001000 rw-p 00000000 00:00 0 
Private_Dirty:         4 kB
";
        let found = share(smaps, 4 << 30).unwrap();
        assert_eq!((found.guest_bytes >> 10, found.own_bytes >> 10), (12, 4));
    }
}
