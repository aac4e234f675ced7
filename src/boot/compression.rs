//! The compression formats of kernels and initrds.

use std::fmt;

/// Compression formats that Linux uses for kernels and initrds (boot.rst, "payload_offset"; lib/decompress.c).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// gzip, RFC 1952.
    Gzip,
    /// bzip2.
    Bzip2,
    /// LZMA, the legacy format before xz.
    Lzma,
    /// xz.
    Xz,
    /// LZO in an lzop file.
    Lzo,
    /// LZ4 in its frame format, which the kernel does not read.
    Lz4Frame,
    /// LZ4 in its legacy frame format, which the kernel reads.
    Lz4Legacy,
    /// Zstandard, RFC 8878.
    Zstd,
}

impl Compression {
    /// Recognizes a format by its magic number.
    pub fn identify(head: &[u8]) -> Option<Self> {
        const MAGICS: [(&[u8], Compression); 9] = [
            (b"\x1f\x8b", Compression::Gzip),
            (b"\x1f\x9e", Compression::Gzip),
            (b"BZh", Compression::Bzip2),
            (b"\x5d\x00\x00", Compression::Lzma),
            (b"\xfd7zXZ\x00", Compression::Xz),
            (b"\x89LZO", Compression::Lzo),
            (b"\x04\x22\x4d\x18", Compression::Lz4Frame),
            (b"\x02\x21\x4c\x18", Compression::Lz4Legacy),
            (b"\x28\xb5\x2f\xfd", Compression::Zstd),
        ];
        MAGICS
            .into_iter()
            .find(|(magic, _)| head.starts_with(magic))
            .map(|(_, compression)| compression)
    }

    /// Its name, that of the kernel's option for it after `CONFIG_RD_` and `CONFIG_KERNEL_`, and the program that decompresses it.
    pub(super) fn names(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Self::Gzip => ("gzip", "GZIP", "gzip"),
            Self::Bzip2 => ("bzip2", "BZIP2", "bzip2"),
            Self::Lzma => ("LZMA", "LZMA", "xz"),
            Self::Xz => ("xz", "XZ", "xz"),
            Self::Lzo => ("LZO", "LZO", "lzop"),
            Self::Lz4Frame => ("LZ4 (frame format)", "LZ4", "lz4"),
            Self::Lz4Legacy => ("LZ4 (legacy format)", "LZ4", "lz4"),
            Self::Zstd => ("zstd", "ZSTD", "zstd"),
        }
    }

    /// The name of the kernel's option for it, after `CONFIG_RD_` and `CONFIG_KERNEL_`.
    pub fn config_suffix(self) -> &'static str {
        self.names().1
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.names().0)
    }
}
