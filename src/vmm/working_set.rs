//! The pages of guest RAM that a restored VM touches: noted at the end of one VM, and brought in for later ones of the same snapshot
//! before their guests run, so that few of them cost an exit.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, BorrowedFd};

use kvm_bindings::kvm_pre_fault_memory;
use kvm_ioctls::VcpuFd;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::ioctl::{Updater, ioctl, opcode};
use rustix::mm::Advice;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::memory::advise;
use super::snapshot::file::{Bulk, PAGE_SIZE};
use super::snapshot::sparse::next_data;

/// Most pages that are brought in: 16 MiB of memory for each VM, at most.
const MAX_PAGES: usize = 4096;
/// Bits of an entry of pagemap (Linux, Documentation/admin-guide/mm/pagemap.rst).
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_FILE: u64 = 1 << 61;
/// Most pages that get a mapping of their own: each makes two, and a process can have some 65,000 (vm.max_map_count).
const MAX_APART: usize = 16384;
/// Entries that are read at once.
const CHUNK: usize = 4096;

/// A page of the RAM below the MMIO gap.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Page {
    number: u32,
    /// 1 if it was written, and so is the VM's own.
    written: u32,
}

/// What is known of the pages that the VMs of a snapshot touch.
#[derive(Debug, Default)]
pub enum WorkingSet {
    /// Nothing.
    #[default]
    Unknown,
    /// Nothing; a VM that ends is to note it in this file, which is locked.
    Wanted(File),
    /// These, in ascending order.
    Known(Vec<Page>),
}

impl WorkingSet {
    /// Reads what a [`Recorder`] has written to `file`. If it holds nothing of that kind, it is emptied, for the first process that
    /// comes.
    pub fn open(mut file: File) -> io::Result<Self> {
        let limit = size_of::<u32>() + MAX_PAGES * size_of::<Page>();
        let mut bytes = Vec::new();
        (&file).take(limit as u64 + 1).read_to_end(&mut bytes)?;
        if let Some(pages) = parse(&bytes) {
            return Ok(Self::Known(pages));
        }
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Ok(Self::Unknown);
        }
        file.set_len(0)?;
        file.rewind()?;
        Ok(Self::Wanted(file))
    }

    /// Has the host give the VM its own copies of the pages that are written, and KVM map all of them for the guest where it can
    /// (Linux 6.12, Documentation/virt/kvm/api.rst, KVM_PRE_FAULT_MEMORY). What fails is left for the guest to touch.
    pub fn bring_in(&self, mem: &GuestMemoryMmap, vcpu: &VcpuFd) {
        let (Self::Known(pages), Some(region)) = (self, mem.iter().next()) else {
            return;
        };
        let is_there = |page: &&Page| u64::from(page.number) < region.len() / PAGE_SIZE;
        let pages = || pages.iter().filter(is_there);
        let written = pages().filter(|page| page.written != 0);
        let populate = |(first, count)| {
            let bytes = (first * PAGE_SIZE) as usize..((first + count) * PAGE_SIZE) as usize;
            advise(region, bytes, Advice::LinuxPopulateWrite)
        };
        if let Err(e) = runs(written).try_for_each(populate) {
            log::debug!("pages are copied when the guest writes to them: {e}");
        }
        if let Err(e) = runs(pages()).try_for_each(|(first, count)| pre_fault(vcpu, first, count)) {
            log::debug!("pages are mapped when the guest touches them: {e}");
        }
    }
}

fn parse(bytes: &[u8]) -> Option<Vec<Page>> {
    let (sum, pages) = bytes.split_first_chunk()?;
    let is_whole = u32::from_le_bytes(*sum) == crc32fast::hash(pages);
    let pages = <[Page]>::ref_from_bytes(pages).ok()?;
    (is_whole && pages.len() <= MAX_PAGES).then(|| pages.to_vec())
}

/// The first page and the number of those in a row.
fn runs<'a>(pages: impl Iterator<Item = &'a Page>) -> impl Iterator<Item = (u64, u64)> {
    let mut numbers = pages.map(|page| u64::from(page.number)).peekable();
    std::iter::from_fn(move || {
        let first = numbers.next()?;
        let mut count = 1;
        while numbers.next_if_eq(&(first + count)).is_some() {
            count += 1;
        }
        Some((first, count))
    })
}

fn pre_fault(vcpu: &VcpuFd, first: u64, count: u64) -> Result<(), Errno> {
    const CODE: u32 = opcode::read_write::<kvm_pre_fault_memory>(0xae, 0xd5);
    let mut range = kvm_pre_fault_memory {
        gpa: first * PAGE_SIZE,
        size: count * PAGE_SIZE,
        ..Default::default()
    };
    // It may be interrupted; then it says how far it has come.
    while range.size > 0 {
        let before = range.size;
        #[allow(unsafe_code, reason = "kvm-ioctls does not have this one")]
        // SAFETY: the descriptor is open as long as `vcpu` is borrowed; KVM reads and writes one structure of this type.
        let result = unsafe {
            let fd = BorrowedFd::borrow_raw(vcpu.as_raw_fd());
            ioctl(fd, Updater::<CODE, _>::new(&mut range))
        };
        if range.size >= before {
            return result.and(Err(Errno::AGAIN));
        }
    }
    Ok(())
}

/// Notes what a VM touches.
pub struct Recorder<'a> {
    pagemap: File,
    out: &'a File,
}

impl<'a> Recorder<'a> {
    /// One for a VM that has not run yet, whose RAM is mapped privately from a file; it writes to `out`. All that it needs is opened
    /// here.
    pub fn open(out: &'a File, mem: &GuestMemoryMmap) -> io::Result<Self> {
        let mut pagemap = File::open("/proc/self/pagemap")?;
        if let Some(region) = mem.iter().next() {
            keep_pages_apart(region)?;
            let first = region.as_ptr() as u64 / PAGE_SIZE;
            pagemap.seek(SeekFrom::Start(first * size_of::<u64>() as u64))?;
        }
        Ok(Self { pagemap, out })
    }

    /// Writes which pages the VM has touched. Of one that has touched too many, only those count that it has not written: memory is not
    /// spent on what another VM hardly needs.
    pub fn record(mut self, mem: &GuestMemoryMmap) {
        if let Err(e) = self.write(mem) {
            log::info!("cannot note the pages that the VM touched: {e}");
        }
    }

    fn write(&mut self, mem: &GuestMemoryMmap) -> io::Result<()> {
        let mut pages = self.touched(mem)?;
        if pages.len() > MAX_PAGES {
            pages.retain(|page| page.written == 0);
            pages.truncate(MAX_PAGES);
        }
        let pages = pages.as_bytes();
        let sum = crc32fast::hash(pages).to_le_bytes();
        // In one piece, so that a process that reads it now finds nothing or all.
        self.out.write_all(&[&sum, pages].concat())
    }

    fn touched(&mut self, mem: &GuestMemoryMmap) -> io::Result<Vec<Page>> {
        let mut left = mem
            .iter()
            .next()
            .map_or(0, |region| region.len() / PAGE_SIZE) as usize;
        let mut entries = vec![0u64; CHUNK.min(left)];
        let mut pages = Vec::new();
        let mut numbers = 0..;
        while left > 0 {
            entries.truncate(left);
            self.pagemap.read_exact(entries.as_mut_bytes())?;
            left -= entries.len();
            let touched = entries.iter().zip(numbers.by_ref());
            let touched = touched.filter(|(entry, _)| *entry & (PRESENT | SWAPPED) != 0);
            pages.extend(touched.map(|(entry, number)| Page {
                number,
                written: u32::from(entry & OF_FILE == 0),
            }));
        }
        Ok(pages)
    }
}

/// At a read, Linux maps neighbours as well that are in the page cache, but none beyond the mapping: advice that differs from page to
/// page makes each of them a mapping of its own. That needs to be done only where the file is no hole.
fn keep_pages_apart(region: &GuestRegionMmap) -> io::Result<()> {
    let Some(place) = region.file_offset() else {
        return Ok(());
    };
    let ram = Bulk {
        offset: place.start(),
        len: region.len(),
        crc: 0,
    };
    let (mut at, mut left) = (0, MAX_APART);
    while let Some(data) = next_data(place.file(), ram, at)? {
        let pages = data.start / PAGE_SIZE..data.end / PAGE_SIZE;
        for odd in pages.filter(|page| page % 2 == 1).take(left) {
            let begin = (odd * PAGE_SIZE) as usize;
            advise(region, begin..begin + PAGE_SIZE as usize, Advice::Random)?;
            left -= 1;
        }
        at = data.end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::vmm::memory::map_file;

    fn pages(set: &WorkingSet) -> Vec<(u32, u32)> {
        match set {
            WorkingSet::Known(pages) => pages
                .iter()
                .map(|page| (page.number, page.written))
                .collect(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_a_vm_touched_is_known_to_the_next() {
        let ram = tempfile::tempfile().unwrap();
        ram.set_len(1 << 20).unwrap();
        // Neighbours, which would be mapped with the one that is read.
        for page in 0..64 {
            std::os::unix::fs::FileExt::write_all_at(&ram, &[1], page * PAGE_SIZE).unwrap();
        }
        let mem = map_file(1 << 20, &Arc::new(ram), 0).unwrap();
        let noted = tempfile::NamedTempFile::new().unwrap();
        let reopen = || WorkingSet::open(noted.reopen().unwrap()).unwrap();
        let wanted = reopen();
        let WorkingSet::Wanted(file) = &wanted else {
            panic!("{wanted:?}");
        };
        assert!(matches!(reopen(), WorkingSet::Unknown), "one notes it");
        let recorder = Recorder::open(file, &mem).unwrap();
        let mut byte = [0];
        mem.read_slice(&mut byte, GuestAddress(9 * PAGE_SIZE))
            .unwrap();
        mem.read_slice(&mut byte, GuestAddress(20 * PAGE_SIZE))
            .unwrap();
        mem.write_slice(&byte, GuestAddress(20 * PAGE_SIZE))
            .unwrap();
        mem.write_slice(&byte, GuestAddress(200 * PAGE_SIZE))
            .unwrap();
        recorder.record(&mem);
        assert_eq!(pages(&reopen()), [(9, 0), (20, 1), (200, 1)]);
    }

    #[test]
    fn of_a_vm_that_touched_much_nothing_counts_that_it_wrote() {
        let len = (MAX_PAGES as u64 + 2) * PAGE_SIZE;
        let ram = tempfile::tempfile().unwrap();
        ram.set_len(len).unwrap();
        let mem = map_file(len, &Arc::new(ram), 0).unwrap();
        let noted = tempfile::NamedTempFile::new().unwrap();
        let file = noted.reopen().unwrap();
        let recorder = Recorder::open(&file, &mem).unwrap();
        for page in 0..=MAX_PAGES as u64 {
            mem.write_slice(&[1], GuestAddress(page * PAGE_SIZE))
                .unwrap();
        }
        recorder.record(&mem);
        let set = WorkingSet::open(noted.reopen().unwrap()).unwrap();
        assert_eq!(pages(&set), []);
    }

    #[test]
    fn a_file_with_something_else_is_written_anew() {
        let whole = |bytes: &[u8]| [&crc32fast::hash(bytes).to_le_bytes(), bytes].concat();
        assert_eq!(parse(&whole(&[0; 16])).unwrap().len(), 2);
        assert_eq!(parse(&whole(&[])).unwrap().len(), 0);
        let mut flipped = whole(&[0; 16]);
        flipped[9] ^= 1;
        let long = vec![0; (MAX_PAGES + 1) * 8];
        for bytes in [vec![], vec![0; 3], whole(&[0; 15]), whole(&long), flipped] {
            assert!(parse(&bytes).is_none());
            let noted = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(noted.path(), &bytes).unwrap();
            let set = WorkingSet::open(noted.reopen().unwrap()).unwrap();
            assert!(matches!(set, WorkingSet::Wanted(_)), "{set:?}");
            assert_eq!(noted.path().metadata().unwrap().len(), 0);
        }
    }

    #[test]
    fn runs_are_pages_in_a_row() {
        let page = |number| Page { number, written: 0 };
        let some = [3, 4, 5, 9, 9, u32::MAX].map(page);
        let found: Vec<_> = runs(some.iter()).collect();
        assert_eq!(found, [(3, 3), (9, 1), (9, 1), (u32::MAX.into(), 1)]);
    }
}
