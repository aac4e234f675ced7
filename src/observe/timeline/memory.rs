//! What memory the process has to itself: the guest's RAM, and all else.

use std::fs::File;
use std::io::BufReader;
use std::ops::Range;

use procfs::process::{MemoryMap, MemoryMaps};
use procfs::{FromBufRead, ProcResult};
use serde::Serialize;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::console::OUTPUT_MEMORY_BOUND;
use crate::host::memory::private_bytes;
use crate::vmm::vcpu;
use crate::vmm::vm::Vm;

/// The kernel's account of this process's memory, made when it is read. It is to be opened before the guest runs: then nothing can.
pub(super) const ACCOUNT: &str = "/proc/self/smaps";

/// Memory of this process that no other process shares, in bytes: resident or swapped out, in anonymous or file pages. What
/// the kernel keeps for it, KVM's page tables among it, is not part of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(super) struct PrivateMemory {
    /// In guest RAM.
    pub(super) guest_bytes: u64,
    /// Everywhere else: minivmm's own.
    pub(super) own_bytes: u64,
}

impl PrivateMemory {
    /// Asks the kernel, page table by page table: it takes milliseconds with a large guest.
    pub(super) fn read(account: File, mem: &GuestMemoryMmap) -> ProcResult<Self> {
        let guest: Vec<Range<u64>> = mem
            .iter()
            .map(|region| region.as_ptr() as u64..region.as_ptr() as u64 + region.len())
            .collect();
        let maps = MemoryMaps::from_buf_read(BufReader::new(account))?;
        Ok(Self::sum(&maps.0, &guest))
    }

    fn sum(maps: &[MemoryMap], guest: &[Range<u64>]) -> Self {
        let mut sum = Self::default();
        for map in maps {
            let private = private_bytes(map);
            let (start, end) = map.address;
            if guest.iter().any(|ram| ram.start < end && start < ram.end) {
                sum.guest_bytes += private;
            } else {
                sum.own_bytes += private;
            }
        }
        sum
    }
}

/// Most that a device takes beside guest RAM, whatever its guest does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct MemoryBound {
    pub(super) name: String,
    pub(super) bytes: u64,
}

impl MemoryBound {
    /// Those of all that a guest can reach.
    pub(super) fn of(vm: &Vm) -> Vec<Self> {
        let vcpus = vm.vcpus().iter();
        let vcpus = vcpus.map(|vcpu| (format!("vCPU {}", vcpu.index), vcpu::MEMORY_BOUND));
        let output = ("console output".to_owned(), OUTPUT_MEMORY_BOUND);
        vcpus
            .chain([output])
            .chain(vm.machine().memory_bounds.iter().cloned())
            .map(|(name, bytes)| Self {
                name,
                bytes: bytes as u64,
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::vmm::memory;

    #[test]
    fn what_the_guest_has_touched_is_the_guests() {
        const SIZE: u64 = 64 << 20;
        let mem = memory::create(SIZE).unwrap();
        // The kernel may have merged it with the guest RAM of a test that runs at the same time.
        let read = || PrivateMemory::read(File::open(ACCOUNT).unwrap(), &mem).unwrap();
        let before = read();
        assert!(
            before.guest_bytes < SIZE && before.own_bytes > 0,
            "{before:?}"
        );
        for page in (0..SIZE).step_by(4096) {
            mem.write_obj(1u8, GuestAddress(page)).unwrap();
        }
        let after = read();
        assert!(after.guest_bytes >= SIZE, "{after:?}");
        // Were its address not known, it would be minivmm's own.
        let maps = BufReader::new(File::open(ACCOUNT).unwrap());
        let maps = MemoryMaps::from_buf_read(maps).unwrap();
        let all = PrivateMemory::sum(&maps.0, &[]);
        assert!(all.guest_bytes == 0 && all.own_bytes > SIZE, "{all:?}");
    }
}
