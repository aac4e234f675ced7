//! The kernel inside a bzImage: an ELF file, behind it perhaps a relocation table, both compressed as one.

use std::io;

use super::bytes::u32_at;
use super::bzimage::BzImage;
use super::compression::Compression;
use super::decompress::decompress;
use super::error::DirectBootError;
use super::format::hex;
use super::input::InputFile;

/// How the payload is compressed, by its first bytes.
pub(crate) fn format(input: &InputFile, image: &BzImage) -> Result<Compression, DirectBootError> {
    let mut head = [0; 8];
    let len = usize::try_from(image.payload_len().min(8)).unwrap_or(8);
    let head = head.get_mut(..len).unwrap_or_default();
    input.read_exact(image.payload_offset(), head, "its payload")?;
    match Compression::identify(head) {
        Some(Compression::Lz4Frame) | None => Err(DirectBootError::Refused(format!(
            "its payload begins with {}, which is not a compression format of Linux kernels",
            hex(head)
        ))),
        Some(format) => Ok(format),
    }
}

/// Decompresses the payload. Memory use is at most twice the kernel's init_size, plus the decoder's.
pub(crate) fn unpack(input: &InputFile, image: &BzImage) -> Result<Vec<u8>, DirectBootError> {
    let format = format(input, image)?;
    let damaged = |source| DirectBootError::Damaged(format, source);
    let cut = || damaged(io::ErrorKind::UnexpectedEof.into());

    // The last four bytes are the length of what is inside. gzip ends with it; to the other formats the build adds it
    // (scripts/Makefile.lib, size_append).
    let len = image.payload_len();
    let size_at = len.checked_sub(4).ok_or_else(cut)?;
    let mut size = [0; 4];
    input.read_exact(image.payload_offset() + size_at, &mut size, "its payload")?;
    let unpacked = u32::from_le_bytes(size);
    let room = image.header.init_size;
    if u64::from(unpacked) > room.into() || len > room.into() {
        return Err(DirectBootError::Refused(format!(
            "its payload of {len} bytes claims to hold {unpacked}, where the kernel has room for {room} (init_size)"
        )));
    }
    let stream_len = if format == Compression::Gzip {
        len
    } else {
        size_at
    };
    let mut packed = vec![0; usize::try_from(stream_len).map_err(|_| cut())?];
    input.read_exact(image.payload_offset(), &mut packed, "its payload")?;
    let mut kernel = vec![0; usize::try_from(unpacked).map_err(|_| cut())?];
    decompress(format, &packed, &mut kernel).map_err(|source| match source.kind() {
        io::ErrorKind::Unsupported => {
            DirectBootError::Refused(format!("minivmm has no decoder for {format}"))
        }
        _ => damaged(source),
    })?;
    if u32_at(&kernel, 0) != Some(u32::from_le_bytes(*b"\x7fELF")) {
        let why = format!("its {format} payload is not an ELF file");
        return Err(DirectBootError::Refused(why));
    }
    Ok(kernel)
}
