//! Guest RAM as loaders have it.

use std::path::Path;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::error::BootError;

/// Guest RAM, without dirty tracking.
pub(crate) type GuestMemory = GuestMemoryMmap<()>;

/// 1 MiB in bytes.
pub const MIB: u64 = 1 << 20;

/// End of the memory that begins at address 0; 0 if there is none.
pub(crate) fn low_ram_end(mem: &GuestMemory) -> u64 {
    mem.find_region(GuestAddress(0))
        .map_or(0, |region| region.len())
}

/// All of the VM's memory in bytes.
fn total(mem: &GuestMemory) -> u64 {
    mem.iter()
        .map(|region| region.len())
        .fold(0, u64::saturating_add)
}

/// Bytes as MiB, rounded up.
pub(crate) fn mib_ceil(bytes: u64) -> u64 {
    bytes.div_ceil(MIB)
}

/// Checks that RAM extends at least to `end_gpa`, which lies below the MMIO gap.
pub(crate) fn check_fits(path: &Path, mem: &GuestMemory, end_gpa: u64) -> Result<(), BootError> {
    if end_gpa > low_ram_end(mem) {
        return Err(BootError::MemoryTooSmall {
            path: path.to_owned(),
            need_mib: mib_ceil(end_gpa),
            have_mib: total(mem) / MIB,
        });
    }
    Ok(())
}
