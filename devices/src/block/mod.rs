//! What reads and writes a disk: a raw file or a host block device, with a temporary overlay or without, one request
//! at a time ([`Disk`]) or many at once through io_uring ([`ring`]). It knows no virtio.

mod disk;
mod format;
mod identity;
mod open;
mod overlay;
pub mod ring;
mod saved;
mod transfer;

pub use disk::Disk;
pub use format::Format;
pub use identity::DiskIdentity;
pub use open::{DiskError, DiskMode, DiskOptions, Engine, SECTOR_SIZE};
pub(crate) use transfer::Cancelled;
pub use transfer::Direction;
