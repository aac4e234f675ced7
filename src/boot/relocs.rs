//! The relocation table of a 64-bit kernel (arch/x86/tools/relocs.c), and what the kernel's own decompressor does with it
//! (arch/x86/boot/compressed/misc.c, handle_relocations).
//!
//! The table is a list of 32-bit words, the low halves of virtual addresses. Zeros divide it: a zero, the places of 64-bit
//! addresses, a zero, those of 32-bit distances from per-CPU data, a zero, those of 32-bit addresses. Linux 6.15 and later
//! have no distances, and no zero for them.

use vm_memory::{Bytes, VolatileSlice};

use super::error::DirectBootError;

/// Where the kernel's image is in virtual memory if it is at physical address 0, __START_KERNEL_map: its low half, the high
/// half being all ones.
const START_KERNEL_MAP: u32 = 0x8000_0000;

/// The places in a kernel that hold what depends on its virtual address, as the low halves of their own addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Relocations {
    add64: Vec<u32>,
    sub32: Vec<u32>,
    add32: Vec<u32>,
}

impl Relocations {
    /// Parses the table; `None` if it is not one.
    pub(crate) fn parse(table: &[u8]) -> Option<Self> {
        let (words, []) = table.as_chunks() else {
            return None;
        };
        let words: Vec<u32> = words.iter().map(|word| u32::from_le_bytes(*word)).collect();
        let lists: Vec<&[u32]> = words.split(|word| *word == 0).take(5).collect();
        let (add64, sub32, add32) = match *lists.as_slice() {
            [[], add64, add32] => (add64, [].as_slice(), add32),
            [[], add64, sub32, add32] => (add64, sub32, add32),
            _ => return None,
        };
        Some(Self {
            add64: add64.to_vec(),
            sub32: sub32.to_vec(),
            add32: add32.to_vec(),
        })
    }

    /// Relocates `image`, a kernel linked for the physical address `link`, by `delta` bytes of virtual address.
    pub(crate) fn apply(
        &self,
        image: &VolatileSlice<'_>,
        link: u64,
        delta: u64,
    ) -> Result<(), DirectBootError> {
        let at = |word: u32| {
            let offset = u64::from(word.wrapping_sub(START_KERNEL_MAP)).wrapping_sub(link);
            // What lies below the kernel has wrapped around and is beyond its end.
            usize::try_from(offset).unwrap_or(usize::MAX)
        };
        let outside = |word: u32| {
            let address = u64::from(word) | u64::from(u32::MAX) << 32;
            DirectBootError::Refused(format!(
                "its relocation table names {address:#x}, which is not in the kernel"
            ))
        };
        for &word in &self.add64 {
            let value: u64 = image.read_obj(at(word)).map_err(|_| outside(word))?;
            let moved = value.wrapping_add(delta);
            image
                .write_obj(moved, at(word))
                .map_err(|_| outside(word))?;
        }
        for (list, delta) in [(&self.sub32, delta.wrapping_neg()), (&self.add32, delta)] {
            for &word in list {
                let value: u32 = image.read_obj(at(word)).map_err(|_| outside(word))?;
                let moved = value.wrapping_add(delta as u32);
                image
                    .write_obj(moved, at(word))
                    .map_err(|_| outside(word))?;
            }
        }
        Ok(())
    }
}
