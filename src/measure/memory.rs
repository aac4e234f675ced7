//! What a process holds in memory that no other process has, by /proc/PID/smaps (proc_pid_smaps(5)).

use std::fs;
use std::io;

use crate::arch::x86_64::layout::MMIO_GAP_START;

/// One mapping of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapping {
    /// First address.
    pub start: u64,
    /// First address behind it.
    pub end: u64,
    /// Pages in memory that only this process maps, in KiB.
    pub private_kib: u64,
}

/// A VMM's private memory, in KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestShare {
    /// Within the guest's RAM: what the guest has touched.
    pub guest_kib: u64,
    /// All else: what the VMM needs for itself.
    pub own_kib: u64,
}

/// The mappings of a process that runs, in the order of their addresses.
pub fn mappings(pid: u32) -> io::Result<Vec<Mapping>> {
    Ok(parse(&fs::read_to_string(format!("/proc/{pid}/smaps"))?))
}

/// The private memory of a process that runs, in KiB.
pub fn private_kib(pid: u32) -> io::Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    Ok(text.lines().filter_map(private_line).sum())
}

/// A line that counts private pages; those of hugetlbfs have one of their own.
fn private_line(line: &str) -> Option<u64> {
    let (key, value) = line.split_once(':')?;
    matches!(key, "Private_Clean" | "Private_Dirty" | "Private_Hugetlb")
        .then(|| value.trim().strip_suffix(" kB")?.parse().ok())?
}

fn parse(smaps: &str) -> Vec<Mapping> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        if let Some((start, end)) = addresses(line) {
            mappings.push(Mapping {
                start,
                end,
                private_kib: 0,
            });
        } else if let (Some(mapping), Some(kib)) = (mappings.last_mut(), private_line(line)) {
            mapping.private_kib += kib;
        }
    }
    mappings
}

/// A mapping's first line, as in `7f00-7f10 rw-p ...`.
fn addresses(line: &str) -> Option<(u64, u64)> {
    let (start, end) = line.split(' ').next()?.split_once('-')?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    Some((number(start)?, number(end)?))
}

/// Tells a guest's RAM from the rest. It has no name that all VMMs agree on, but a size: it is the adjoining mappings that
/// add up to exactly `ram` bytes, or to the two parts that lie below and above minivmm's MMIO gap. `None` where there are none
/// such, rather than a wrong number.
pub fn guest_share(mappings: &[Mapping], ram: u64) -> Option<GuestShare> {
    let guest_kib = adjoining(mappings, ram).or_else(|| {
        let high = ram.checked_sub(MMIO_GAP_START)?;
        Some(adjoining(mappings, MMIO_GAP_START)? + adjoining(mappings, high)?)
    })?;
    let all: u64 = mappings.iter().map(|mapping| mapping.private_kib).sum();
    Some(GuestShare {
        guest_kib,
        own_kib: all - guest_kib,
    })
}

/// The private memory of the mappings without a gap between them that have `size` bytes together.
fn adjoining(mappings: &[Mapping], size: u64) -> Option<u64> {
    (0..mappings.len()).find_map(|first| {
        let mut private_kib = 0;
        let mut end = mappings[first].start;
        for mapping in &mappings[first..] {
            if mapping.start != end || mapping.end - mappings[first].start > size {
                return None;
            }
            end = mapping.end;
            private_kib += mapping.private_kib;
            if end - mappings[first].start == size {
                return Some(private_kib);
            }
        }
        None
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
00400000-00500000 r-xp 00000000 fe:00 42                         /usr/bin/vmm
Size:               1024 kB
Private_Clean:       100 kB
Private_Dirty:        20 kB
VmFlags: rd ex mr mw me
7f0000000000-7f0000400000 rw-p 00000000 00:00 0 
Private_Dirty:         8 kB
Private_Hugetlb:    2048 kB
7f0000400000-7f0000500000 r-xp 00000000 fe:00 7                  /boot/vm linux
Shared_Clean:       1024 kB
Private_Dirty:         4 kB
7f0000500000-7f0001000000 rw-p 00000000 00:00 0 
7f0001000000-7f0001001000 rw-s 00000000 00:0e 9                  anon_inode:kvm-vcpu:0
Private_Dirty:         4 kB
";

    #[test]
    fn guest_ram_is_found_by_its_size_through_what_is_mapped_over_it() {
        let mappings = parse(SMAPS);
        assert_eq!(mappings.len(), 5);
        assert_eq!(mappings[0].private_kib, 120);
        let share = guest_share(&mappings, 16 << 20).unwrap();
        assert_eq!((share.guest_kib, share.own_kib), (2060, 124));
        // No mapping, nor any two, of such a size.
        assert_eq!(guest_share(&mappings, 32 << 20), None);
        assert_eq!(guest_share(&[], 16 << 20), None);
    }

    #[test]
    fn guest_ram_may_lie_in_two_parts() {
        let mapping = |start: u64, size: u64, private_kib| Mapping {
            start,
            end: start + size,
            private_kib,
        };
        let mappings = [
            mapping(1 << 40, 3 << 30, 5),
            mapping(1 << 41, 1 << 30, 7),
            mapping(1 << 42, 4096, 4),
        ];
        let share = guest_share(&mappings, 4 << 30).unwrap();
        assert_eq!((share.guest_kib, share.own_kib), (12, 4));
    }

    #[test]
    fn this_process_has_private_memory() {
        let pid = std::process::id();
        let touched = vec![1u8; 8 << 20];
        let sum: u64 = mappings(pid).unwrap().iter().map(|m| m.private_kib).sum();
        assert!(sum >= 8 << 10, "{sum}");
        assert!(private_kib(pid).unwrap() >= 8 << 10);
        drop(touched);
    }
}
