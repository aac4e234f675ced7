//! The kernel inside a bzImage: an ELF file, behind it perhaps a relocation table, both compressed as one.

use std::io;

use super::bytes::u32_at;
use super::bzimage::BzImage;
use super::decompress::decompress;
use super::error::BootError;
use super::format::{Compression, hex};
use super::input::InputFile;

/// Why a payload cannot be decompressed on the host. The guest may still be able to.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PayloadError {
    /// The kernel file cannot be read.
    #[error(transparent)]
    Read(#[from] BootError),
    /// A format that Linux does not pack its kernels in, or none.
    #[error("its payload begins with {0}, which is not a compression format of Linux kernels")]
    UnknownFormat(String),
    /// The sizes cannot be true: a kernel unpacks itself within its init_size.
    #[error(
        "its payload of {packed} bytes claims to hold {unpacked}, where the kernel has room for {room} (init_size)"
    )]
    TooLarge {
        /// Bytes of the payload.
        packed: u64,
        /// Bytes that it claims to hold.
        unpacked: u64,
        /// The kernel's init_size.
        room: u64,
    },
    /// There is no decoder for it here.
    #[error("minivmm has no decoder for {0}")]
    Unsupported(Compression),
    /// The compressed data is truncated or wrong.
    #[error("its {0} payload is damaged")]
    Damaged(Compression, #[source] io::Error),
    /// The decompressed payload is not a kernel.
    #[error("its {0} payload is not an ELF file")]
    NotElf(Compression),
}

/// How the payload is compressed, by its first bytes.
pub(crate) fn format(input: &InputFile, image: &BzImage) -> Result<Compression, PayloadError> {
    let mut head = [0; 8];
    let len = usize::try_from(image.payload_len().min(8)).unwrap_or(8);
    let head = head.get_mut(..len).unwrap_or_default();
    input.read_exact(image.payload_offset(), head, "its payload")?;
    match Compression::identify(head) {
        Some(Compression::Lz4Frame) | None => Err(PayloadError::UnknownFormat(hex(head))),
        Some(format) => Ok(format),
    }
}

/// Decompresses the payload. Memory use is at most twice the kernel's init_size, plus the decoder's.
pub(crate) fn unpack(input: &InputFile, image: &BzImage) -> Result<Vec<u8>, PayloadError> {
    let format = format(input, image)?;
    let damaged = |source| PayloadError::Damaged(format, source);
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
        return Err(PayloadError::TooLarge {
            packed: len,
            unpacked: unpacked.into(),
            room: room.into(),
        });
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
        io::ErrorKind::Unsupported => PayloadError::Unsupported(format),
        _ => damaged(source),
    })?;
    if u32_at(&kernel, 0) != Some(u32::from_le_bytes(*b"\x7fELF")) {
        return Err(PayloadError::NotElf(format));
    }
    Ok(kernel)
}
