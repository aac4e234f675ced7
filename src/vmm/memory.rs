//! Guest RAM: regions around the MMIO gap, and the memslots that show them to KVM.

use std::fs::{self, File};
use std::ops::Range;
use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use rustix::io::Errno;
use rustix::mm::{Advice, madvise};
use vm_memory::mmap::{FromRangesError, MmapRegionError};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, MmapRegion,
};

use crate::arch::layout::{MMIO_GAP_END, MMIO_GAP_START};
use crate::config::MemorySize;

/// Bytes of a huge page.
const HUGE_PAGE: usize = 2 << 20;

/// Why guest RAM could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host's address space has no room.
    #[error(
        "cannot reserve address space for {0} of guest memory; ask for less, or raise its limit (ulimit -v)"
    )]
    Map(MemorySize, #[source] FromRangesError),
    /// The host does not let pages be merged.
    #[error(
        "the host does not let guest memory be merged{}; leave out \"mergeable\"",
        if .0 == &Errno::INVAL { ": its kernel has no KSM" } else { "" }
    )]
    Merge(#[source] Errno),
    /// KVM refused a memslot with this GPA and size.
    #[error("KVM refused guest memory at {0:#x}, {1:#x} bytes")]
    Memslot(u64, u64, #[source] kvm_ioctls::Error),
}

/// The GPA ranges of `size` bytes of RAM: from 0 to the MMIO gap, the rest from 4 GiB on.
fn ranges(size: u64) -> Vec<(GuestAddress, usize)> {
    let low = size.min(MMIO_GAP_START);
    let mut ranges = vec![(GuestAddress(0), low as usize)];
    if size > low {
        ranges.push((GuestAddress(MMIO_GAP_END), (size - low) as usize));
    }
    ranges
}

/// First GPA behind `size` bytes of RAM.
pub fn end_of_ram(size: u64) -> u64 {
    if size > MMIO_GAP_START {
        size + (MMIO_GAP_END - MMIO_GAP_START)
    } else {
        size
    }
}

/// Maps `size` bytes of guest RAM: private, anonymous, and not reserved, so that a guest may be given more than the
/// host has free and pays for what it touches; in huge pages where the host has them.
///
/// It is left out of core dumps, and the kernel does not merge it with mappings that are not (malloc's are anonymous,
/// too), so that /proc tells the guest's memory from minivmm's own.
pub fn create(size: u64) -> Result<GuestMemoryMmap, MemoryError> {
    let failed = |source| MemoryError::Map(MemorySize { bytes: size }, source);
    let regions = ranges(size)
        .into_iter()
        .map(|(start, len)| {
            let region = GuestRegionMmap::new(map_aligned(len)?, start)
                .ok_or(FromRangesError::InvalidGuestRegion)?;
            // The first one has tables and tiny kernels: for a few small pages, a huge one costs more than it saves.
            let first = if start.0 == 0 { HUGE_PAGE } else { 0 };
            for (offset, advice) in [(0, Advice::LinuxDontDump), (first, Advice::LinuxHugepage)] {
                // A host that does not know it makes no difference to the guest.
                if let Err(e) = advise(&region, offset..len, advice) {
                    log::debug!("the host does not take advice on guest memory ({advice:?}): {e}");
                }
            }
            Ok(region)
        })
        .collect::<Result<_, _>>()
        .map_err(failed)?;
    GuestMemoryMmap::from_regions(regions).map_err(|e| failed(e.into()))
}

/// Maps guest RAM from `offset` of a file on: privately, so that the file stays as it is and all VMs that map it share the pages that
/// none of them has written. The file must not shrink as long as the VM is there.
pub fn map_file(size: u64, file: &Arc<File>, offset: u64) -> Result<GuestMemoryMmap, MemoryError> {
    let failed = |source| MemoryError::Map(MemorySize { bytes: size }, source);
    let mut at = offset;
    let map = |(start, len): (GuestAddress, usize)| {
        let place = FileOffset::from_arc(Arc::clone(file), at);
        at += len as u64;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        let mapping = MmapRegion::build(Some(place), len, protection, flags)?;
        let region =
            GuestRegionMmap::new(mapping, start).ok_or(FromRangesError::InvalidGuestRegion)?;
        if let Err(e) = advise(&region, 0..len, Advice::LinuxDontDump) {
            log::debug!("guest memory will be in core dumps: {e}");
        }
        Ok(region)
    };
    let regions = ranges(size).into_iter().map(map).collect::<Result<_, _>>();
    let regions = regions.map_err(failed)?;
    GuestMemoryMmap::from_regions(regions).map_err(|e| failed(e.into()))
}

/// Maps `len` bytes at a multiple of a huge page: only where host addresses and GPAs agree that far, KVM uses huge pages for
/// the guest.
fn map_aligned(len: usize) -> Result<MmapRegion, MmapRegionError> {
    let mapping = MmapRegion::new(len)?;
    let excess = mapping.as_ptr() as usize % HUGE_PAGE;
    if excess == 0 {
        // Linux sees to it since 6.7.
        return Ok(mapping);
    }
    drop(mapping);
    // It gives the highest addresses that are free: with so many of them taken, a multiple. Should it not, nothing is lost.
    let _taken = MmapRegion::<()>::new(excess)?;
    MmapRegion::new(len)
}

/// Lets the host's KSM (Documentation/admin-guide/mm/ksm.rst) merge equal pages, of guest RAM and of what other processes let it
/// merge.
pub fn enable_ksm(mem: &GuestMemoryMmap) -> Result<(), MemoryError> {
    mem.iter().try_for_each(|region| {
        advise(region, 0..region.len() as usize, Advice::LinuxMergeable).map_err(MemoryError::Merge)
    })
}

/// Warns if KSM is there and does not run.
pub fn warn_without_ksm() {
    const RUNS: &str = "/sys/kernel/mm/ksm/run";
    if fs::read_to_string(RUNS).is_ok_and(|run| run.trim() != "1") {
        log::warn!(
            "no page of this guest will be merged: KSM does not run; as root, echo 1 >{RUNS}"
        );
    }
}

/// Has child processes not get it, so that it costs nothing to make one.
pub fn keep_from_children(mem: &GuestMemoryMmap) {
    for region in mem.iter() {
        // Without it a child just takes longer to make.
        if let Err(e) = advise(region, 0..region.len() as usize, Advice::LinuxDontFork) {
            log::debug!("guest memory will be copied to a child: {e}");
        }
    }
}

/// Advises the kernel on these bytes of a region.
pub(super) fn advise(
    region: &GuestRegionMmap,
    bytes: Range<usize>,
    advice: Advice,
) -> Result<(), Errno> {
    if bytes.is_empty() || bytes.end > region.len() as usize {
        return Ok(());
    }
    #[allow(unsafe_code, reason = "the kernel is handed addresses of this process")]
    // SAFETY: the addresses are within a live mapping; the advice does not change what is in it.
    unsafe {
        madvise(
            region.as_ptr().wrapping_add(bytes.start).cast(),
            bytes.len(),
            advice,
        )
    }
}

/// Registers every region as a memslot. To be called before any interrupt controller is there: afterwards each call
/// waits for an SRCU grace period.
pub fn register(vm: &VmFd, mem: &GuestMemoryMmap) -> Result<(), MemoryError> {
    for (slot, region) in (0u32..).zip(mem.iter()) {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        #[allow(unsafe_code, reason = "KVM is handed addresses of this process")]
        // SAFETY: the address and size are those of a live mapping, which the VM's owner keeps beside `vm` and drops
        // after it.
        unsafe { vm.set_user_memory_region(region) }.map_err(|source| {
            MemoryError::Memslot(region.guest_phys_addr, region.memory_size, source)
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_leaves_the_mmio_gap_free() {
        assert_eq!(ranges(16 << 20), [(GuestAddress(0), 16 << 20)]);
        assert_eq!(ranges(3 << 30), [(GuestAddress(0), 3 << 30)]);
        assert_eq!(
            ranges(6 << 30),
            [(GuestAddress(0), 3 << 30), (GuestAddress(4 << 30), 3 << 30)]
        );
        assert_eq!(end_of_ram(6 << 30), 7 << 30);
        assert_eq!(end_of_ram(1 << 30), 1 << 30);
    }
}
