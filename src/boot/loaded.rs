//! What a kernel file was, and what was loaded of it.

use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::arch::regs::Entry;

/// Format of a kernel file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KernelFormat {
    /// A bzImage, which decompresses itself.
    BzImage,
    /// A 64-bit ELF kernel (vmlinux).
    Elf64,
    /// A 32-bit ELF kernel with a PVH entry.
    Elf32,
}

/// How a file came into guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Loading {
    /// Its bytes were read into guest memory.
    Copied,
    /// A bzImage: what is in it was decompressed for this boot.
    Decompressed,
    /// A bzImage: what is in it had been decompressed before.
    Cached,
}

impl fmt::Display for Loading {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Loading::Copied => "copied",
            Loading::Decompressed => "decompressed",
            Loading::Cached => "cached",
        })
    }
}

/// What was loaded, and where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadedKernel {
    /// How to start it.
    pub entry: Entry,
    /// What the kernel file is.
    pub format: KernelFormat,
    /// The kernel's own version string, where its header has one.
    pub version: Option<String>,
    /// Bytes of the kernel file that were loaded.
    pub kernel_bytes: u64,
    /// How the kernel was loaded.
    pub kernel_loading: Loading,
    /// GPAs that the kernel needs before it has read the memory map.
    pub kernel_range: Range<u64>,
    /// GPAs of the initrd, as long as its file.
    pub initrd_range: Option<Range<u64>>,
}

/// A kernel in guest memory.
pub(crate) struct PlacedKernel {
    /// GPA of its 64-bit entry.
    pub(crate) entry: u64,
    /// Its memory.
    pub(crate) range: Range<u64>,
    /// Bytes that came from the file.
    pub(crate) file_bytes: u64,
    /// Whether it is to randomize the rest of its address space as well.
    pub(crate) kaslr: bool,
}
