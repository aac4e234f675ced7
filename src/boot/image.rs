//! Strings in a kernel's memory: features before it runs, and its log after a panic.

use std::ops::Range;

use memchr::memmem;
use vm_memory::{Bytes, GuestAddress};

use super::ram::GuestMemory;
use crate::printable;

/// Bytes of guest memory that are searched at a time.
const PIECE: u64 = 1 << 20;
/// Longest message of a panic that is read; the kernel's own buffer for it has 1024 bytes.
const MAX_MESSAGE: usize = 256;

/// Logged by a kernel that reads an MP table (arch/x86/kernel/mpparse.c).
const MP_TABLE: &[u8] = b"Intel MultiProcessor Specification v1.";
/// Logged by a kernel that panics (kernel/panic.c).
const PANIC: &[u8] = b"Kernel panic - not syncing: ";

/// Whether the kernel in these GPAs can read an MP table.
pub(super) fn reads_mp_tables(mem: &GuestMemory, kernel: &Range<u64>) -> bool {
    find(mem, kernel.clone(), MP_TABLE).is_some()
}

/// The message with which the kernel in these GPAs has panicked. Its log buffer is among its variables (kernel/printk/printk.c,
/// __log_buf) as long as there are no more than 17 CPUs and no `log_buf_len=` asks for a larger one. No process writes there,
/// unless to /dev/kmsg, or in memory that the kernel needed for its start and then gave away.
pub fn panic_message(mem: &GuestMemory, kernel: &Range<u64>) -> Option<String> {
    let mut rest = kernel.clone();
    while let Some(at) = find(mem, rest.clone(), PANIC) {
        rest.start = at + PANIC.len() as u64;
        let mut text = [0; MAX_MESSAGE];
        let len = (rest.end - rest.start).min(MAX_MESSAGE as u64) as usize;
        let text = text.get_mut(..len)?;
        mem.read_slice(text, GuestAddress(rest.start)).ok()?;
        // Printk's formats, which are always there, have "%s" in this place.
        if !text.starts_with(b"%") {
            let end = text.iter().position(|byte| !(b' '..=b'~').contains(byte));
            return printable(text.get(..end.unwrap_or(len))?);
        }
    }
    None
}

/// The GPA of the first `needle` in `range`.
fn find(mem: &GuestMemory, range: Range<u64>, needle: &[u8]) -> Option<u64> {
    let finder = memmem::Finder::new(needle);
    let mut piece = vec![0; PIECE as usize + needle.len() - 1];
    let mut at = range.start;
    while at < range.end {
        let len = (range.end - at).min(piece.len() as u64) as usize;
        let piece = piece.get_mut(..len)?;
        mem.read_slice(piece, GuestAddress(at)).ok()?;
        if let Some(offset) = finder.find(piece) {
            return Some(at + offset as u64);
        }
        // The next piece begins with what may be the beginning of a needle.
        at += PIECE;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 4 << 20;

    fn memory() -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), SIZE as usize)]).unwrap()
    }

    fn put(mem: &GuestMemory, at: u64, text: &[u8]) {
        mem.write_slice(text, GuestAddress(at)).unwrap();
    }

    #[test]
    fn a_needle_is_found_wherever_it_lies() {
        let needle = b"needle";
        for start in [0, 7] {
            for at in [start, PIECE - 1, PIECE + start - 3, PIECE + start, SIZE - 6] {
                let mem = memory();
                put(&mem, at, needle);
                assert_eq!(find(&mem, start..SIZE, needle), Some(at));
                assert_eq!(find(&mem, start..at + 5, needle), None);
                assert_eq!(find(&mem, at + 1..SIZE, needle), None);
            }
        }
        // What is not all in memory is not found, and no error.
        assert_eq!(find(&memory(), SIZE..SIZE + 10, needle), None);
    }

    #[test]
    fn a_panic_is_read_from_the_log_and_not_from_its_format() {
        let mem = memory();
        put(&mem, 100, b"\x010Kernel panic - not syncing: %s\n\0");
        put(
            &mem,
            PIECE,
            b"---[ end Kernel panic - not syncing: %s ]---\n\0",
        );
        assert_eq!(panic_message(&mem, &(0..SIZE)), None);
        let log = b"Kernel panic - not syncing: Attempted to kill init!\xff\xff";
        put(&mem, 2 * PIECE - 10, log);
        let message = Some("Attempted to kill init!".to_owned());
        assert_eq!(panic_message(&mem, &(0..SIZE)), message);
        assert_eq!(panic_message(&mem, &(0..2 * PIECE)), None);
        // No byte that a terminal would act on.
        put(&mem, 0, b"Kernel panic - not syncing: a\x1b[2J\n");
        assert_eq!(panic_message(&mem, &(0..SIZE)), Some("a".into()));
        // At the end of memory.
        let mem = memory();
        put(&mem, SIZE - 29, b"Kernel panic - not syncing: x");
        assert_eq!(panic_message(&mem, &(0..SIZE)), Some("x".into()));
    }
}
