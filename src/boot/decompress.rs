//! The compression formats of Linux kernels, as the kernel's own build makes them (scripts/Makefile.lib).

use std::io::{self, Read};

use flate2::read::GzDecoder;
use lzma_rust2::{LzmaReader, XzReader};
use ruzstd::decoding::StreamingDecoder;

use super::bytes::{cut, damaged, u32_at};
use super::compression::Compression;

/// Most memory in KiB that an LZMA or xz decoder may take for its dictionary: twice what Linux packs its kernels with
/// (scripts/xz_wrap.sh). zstd's decoder has a limit of its own, 128 MiB, which is what Linux packs with.
const MAX_DICTIONARY_KIB: u32 = 256 << 10;
/// A block of LZ4's legacy frame has this many bytes unpacked, the last one perhaps fewer (lib/decompress_unlz4.c).
const LZ4_BLOCK: usize = 8 << 20;
/// Begins a legacy frame, and in the place of a block's size the next one.
const LZ4_LEGACY_MAGIC: u32 = 0x184c_2102;

/// Unpacks `packed` into `out`, which it must fill exactly. However much `packed` would give, no more than `out` is written.
/// bzip2 and LZO are unsupported: no distribution packs its kernel with them, and a kernel can decompress itself.
pub(crate) fn decompress(format: Compression, packed: &[u8], out: &mut [u8]) -> io::Result<()> {
    match format {
        Compression::Gzip => fill(GzDecoder::new(packed), out),
        Compression::Lzma => fill(
            LzmaReader::new_mem_limit(packed, MAX_DICTIONARY_KIB, None)?,
            out,
        ),
        Compression::Xz => fill(
            XzReader::new_mem_limit(packed, false, MAX_DICTIONARY_KIB),
            out,
        ),
        Compression::Zstd => zstd(packed, out),
        Compression::Lz4Legacy => lz4_legacy(packed, out),
        Compression::Bzip2 | Compression::Lzo | Compression::Lz4Frame => {
            Err(io::ErrorKind::Unsupported.into())
        }
    }
}

/// Reads to the end, where decoders check their sums.
fn fill(mut decoder: impl Read, out: &mut [u8]) -> io::Result<()> {
    decoder.read_exact(out)?;
    if decoder.read(&mut [0])? == 0 {
        Ok(())
    } else {
        Err(damaged("more than it declares comes out of it"))
    }
}

fn zstd(packed: &[u8], out: &mut [u8]) -> io::Result<()> {
    let mut decoder = StreamingDecoder::new(packed).map_err(damaged)?;
    fill(&mut decoder, out)?;
    let decoder = decoder.into_frame_decoder();
    match decoder.get_checksum_from_data() {
        Some(sum) if decoder.get_calculated_checksum() != Some(sum) => {
            Err(damaged("wrong checksum"))
        }
        _ => Ok(()),
    }
}

/// The format that `lz4 -l` writes: the magic number, then blocks, each behind its packed size.
fn lz4_legacy(packed: &[u8], out: &mut [u8]) -> io::Result<()> {
    let (mut packed, mut out) = (packed, out);
    while !packed.is_empty() {
        let word = u32_at(packed, 0).ok_or_else(cut)?;
        packed = packed.get(4..).unwrap_or_default();
        if word == LZ4_LEGACY_MAGIC {
            continue;
        }
        let (block, rest) = usize::try_from(word)
            .ok()
            .and_then(|len| packed.split_at_checked(len))
            .ok_or_else(cut)?;
        let room = out.len().min(LZ4_BLOCK);
        let target = out.get_mut(..room).unwrap_or_default();
        let written = lz4_flex::block::decompress_into(block, target).map_err(damaged)?;
        packed = rest;
        out = out.get_mut(written..).unwrap_or_default();
    }
    if out.is_empty() { Ok(()) } else { Err(cut()) }
}
