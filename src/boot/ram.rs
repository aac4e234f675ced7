//! Guest RAM as loaders have it.

use vm_memory::GuestMemoryMmap;

/// Guest RAM, without dirty tracking.
pub(crate) type GuestMemory = GuestMemoryMmap<()>;

/// 1 MiB in bytes.
pub(crate) const MIB: u64 = 1 << 20;
