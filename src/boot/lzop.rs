//! The file format of lzop around blocks of LZO1X (lib/decompress_unlzo.c; lzop's own lzop.c for the flags).

use std::io;

use super::bytes::{array, cut, damaged};

const MAGIC_LEN: usize = 9;
/// First version with a level, a minimum version and the time's high half in its header.
const LONG_HEADER: u16 = 0x940;

/// Flags: what sums stand before a block, of its bytes unpacked (D) or packed (C), and a filter in the header.
const ADLER32_D: u32 = 1 << 0;
const ADLER32_C: u32 = 1 << 1;
const CRC32_D: u32 = 1 << 8;
const CRC32_C: u32 = 1 << 9;
const HAS_FILTER: u32 = 1 << 11;

/// Unpacks an lzop file into `out`, which it must fill exactly. Its sums are not looked at, as in the kernel.
pub(super) fn decompress(packed: &[u8], mut out: &mut [u8]) -> io::Result<()> {
    let mut input = Input(packed);
    let flags = skip_header(&mut input)?;
    let sums = |mask: u32| 4 * (flags & mask).count_ones() as usize;
    loop {
        let unpacked_len = input.be32()? as usize;
        if unpacked_len == 0 {
            break;
        }
        let packed_len = input.be32()? as usize;
        input.take(sums(ADLER32_D | CRC32_D))?;
        // A block that would have grown is stored, and its sum is there once.
        if packed_len < unpacked_len {
            input.take(sums(ADLER32_C | CRC32_C))?;
        }
        let block = input.take(packed_len)?;
        let (target, rest) = std::mem::take(&mut out)
            .split_at_mut_checked(unpacked_len)
            .ok_or_else(|| damaged("more than it declares comes out of it"))?;
        let written = match packed_len == unpacked_len {
            true => {
                target.copy_from_slice(block);
                unpacked_len
            }
            false => lzo::decompress_into(block, target).map_err(damaged)?,
        };
        if written != unpacked_len {
            return Err(damaged(format!(
                "a block has {written} bytes unpacked, not {unpacked_len}"
            )));
        }
        out = rest;
    }
    if out.is_empty() { Ok(()) } else { Err(cut()) }
}

/// Steps over the header; returns its flags.
fn skip_header(input: &mut Input<'_>) -> io::Result<u32> {
    input.take(MAGIC_LEN)?;
    let version = u16::from_be_bytes(input.array()?);
    let long = version >= LONG_HEADER;
    // The library's version; then the least version that can read it, the method, the level.
    input.take(if long { 6 } else { 3 })?;
    let flags = input.be32()?;
    if flags & HAS_FILTER != 0 {
        input.take(4)?;
    }
    // Mode and time.
    input.take(if long { 12 } else { 8 })?;
    let [name_len] = input.array()?;
    // The name and the header's sum.
    input.take(usize::from(name_len) + 4)?;
    Ok(flags)
}

/// What is left of the file.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn take(&mut self, len: usize) -> io::Result<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or_else(cut)?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        array(self.take(N)?, 0).ok_or_else(cut)
    }

    fn be32(&mut self) -> io::Result<u32> {
        self.array().map(u32::from_be_bytes)
    }
}
