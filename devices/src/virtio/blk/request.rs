//! Requests of a block device (§ 5.2.6).

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use vm_memory::VolatileSlice;

use crate::block::{Cancelled, Direction, Disk, SECTOR_SIZE};
use crate::virtio::queue::{Buffers, Chain, QueueError};

/// Longest serial number in bytes: VIRTIO_BLK_T_GET_ID has room for no more (§ 5.2.6).
pub const MAX_ID_LEN: usize = 20;

/// Data segments of a request: what a queue of 256 has room for beside header and status, which need a descriptor each.
pub(super) const SEG_MAX: u32 = 254;
/// Longest data segment in bytes, 256 KiB.
pub(super) const SIZE_MAX: u32 = 256 << 10;
/// Most bytes of data in a request, 63.5 MiB. What a queue holds, 15.9 GiB, is the most that its thread does for a guest that
/// has stopped.
const MAX_DATA: u64 = SEG_MAX as u64 * SIZE_MAX as u64;

/// Longest discard in sectors, 2 GiB, and longest write of zeroes, 64 MiB: on a host that must write these itself a
/// request should still end soon, since the others of its queue wait for it.
pub(super) const MAX_DISCARD_SECTORS: u32 = 1 << 22;
pub(super) const MAX_WRITE_ZEROES_SECTORS: u32 = 1 << 17;

/// `type`, `reserved` and `sector` of `struct virtio_blk_req`, in bytes.
const HEADER_LEN: usize = 16;

/// `struct virtio_blk_discard_write_zeroes`, in bytes.
const SEGMENT_LEN: usize = 16;

/// Why a request fails: its status.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// VIRTIO_BLK_S_IOERR: the request makes no sense.
    #[error("{0}")]
    Malformed(&'static str),
    /// VIRTIO_BLK_S_IOERR: the host could not do it.
    #[error("the host failed it: {0}")]
    Io(#[from] io::Error),
    /// VIRTIO_BLK_S_UNSUPP.
    #[error("not supported")]
    Unsupported,
}

use Failure::{Malformed, Unsupported};

/// What a request asks for, checked. Offsets and lengths are in bytes and lie on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    /// To move the data, which are one or more whole sectors.
    Transfer(Direction, u64),
    /// To make durable what was written.
    Flush,
    /// To tell the disk's serial number.
    GetId,
    /// To give a range back.
    Discard(u64, u64),
    /// To make a range zeroes, perhaps giving it back.
    WriteZeroes(u64, u64, bool),
}

/// Understands requests of one queue, and carries them out one by one.
pub(super) struct Requests {
    pub(super) disk: Arc<Disk>,
    pub(super) id: [u8; MAX_ID_LEN],
    /// Every write is flushed before it is completed.
    pub(super) write_through: bool,
}

impl Requests {
    /// Takes a request apart. What is left in `chain` are its data.
    pub(super) fn parse<'m>(
        &self,
        chain: &mut Chain<'m>,
    ) -> Result<(Status<'m>, Result<Operation, Failure>), QueueError> {
        let status = chain.writable.take_last_byte();
        let status = status.ok_or(QueueError::Unanswerable(
            "a block request without a status byte",
        ))?;
        Ok((Status(status), self.operation(chain)))
    }

    fn operation(&self, chain: &mut Chain<'_>) -> Result<Operation, Failure> {
        let mut header = [0; HEADER_LEN];
        if !chain.readable.read_front(&mut header) {
            return Err(Malformed("a header of less than 16 bytes"));
        }
        let header = u128::from_le_bytes(header);
        let (kind, sector) = (header as u32, (header >> 64) as u64);
        let (given, wanted) = (&mut chain.readable, &chain.writable);
        match kind {
            VIRTIO_BLK_T_IN if given.is_empty() => {
                let offset = self.data_offset(sector, wanted)?;
                Ok(Operation::Transfer(Direction::Read, offset))
            }
            VIRTIO_BLK_T_OUT if wanted.is_empty() => {
                self.check_writable()?;
                let offset = self.data_offset(sector, given)?;
                Ok(Operation::Transfer(Direction::Write, offset))
            }
            VIRTIO_BLK_T_FLUSH if given.is_empty() && wanted.is_empty() => Ok(Operation::Flush),
            VIRTIO_BLK_T_GET_ID if given.is_empty() => {
                if wanted.len() < MAX_ID_LEN as u64 {
                    return Err(Malformed("no room for the device's ID"));
                }
                Ok(Operation::GetId)
            }
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if wanted.is_empty() => {
                self.check_writable()?;
                self.clearing(kind, given)
            }
            VIRTIO_BLK_T_IN
            | VIRTIO_BLK_T_OUT
            | VIRTIO_BLK_T_FLUSH
            | VIRTIO_BLK_T_GET_ID
            | VIRTIO_BLK_T_DISCARD
            | VIRTIO_BLK_T_WRITE_ZEROES => Err(Malformed("data in the wrong direction")),
            _ => Err(Unsupported),
        }
    }

    /// Does it, and returns how many bytes of data the driver gets. `iovecs` is room to work in.
    pub(super) fn carry_out(
        &self,
        operation: Operation,
        chain: &Chain<'_>,
        iovecs: &mut Vec<libc::iovec>,
        cancelled: Cancelled<'_>,
    ) -> Result<u64, Failure> {
        let disk = &self.disk;
        match operation {
            Operation::Transfer(Direction::Read, offset) => {
                let (slices, len) = (chain.writable.slices(), chain.writable.len());
                disk.transfer(Direction::Read, slices, len, offset, iovecs, cancelled)?;
                return Ok(len);
            }
            Operation::Transfer(Direction::Write, offset) => {
                let (slices, len) = (chain.readable.slices(), chain.readable.len());
                disk.transfer(Direction::Write, slices, len, offset, iovecs, cancelled)?;
            }
            Operation::GetId => return Ok(chain.writable.write_front(&self.id) as u64),
            Operation::Flush => {
                disk.flush()?;
                return Ok(0);
            }
            Operation::Discard(offset, len) => disk.discard(offset, len, cancelled)?,
            Operation::WriteZeroes(offset, len, unmap) => {
                disk.write_zeroes(offset, len, unmap, cancelled)?;
            }
        }
        if self.write_through {
            disk.flush()?;
        }
        Ok(0)
    }

    fn check_writable(&self) -> Result<(), Failure> {
        if self.disk.is_read_only() {
            return Err(Malformed("a write to a read-only disk"));
        }
        Ok(())
    }

    /// Where the data of a read or write lie, in bytes: whole sectors, at least one and not too many, all of them on the disk.
    fn data_offset(&self, sector: u64, data: &Buffers<'_>) -> Result<u64, Failure> {
        if data.is_empty() || !data.len().is_multiple_of(SECTOR_SIZE) {
            return Err(Malformed("data that are no whole number of sectors"));
        }
        if data.len() > MAX_DATA {
            return Err(Malformed("more data than the device says it takes"));
        }
        self.check_range(sector, data.len() / SECTOR_SIZE)
    }

    /// The offset in bytes of a range of sectors that lies on the disk.
    fn check_range(&self, sector: u64, count: u64) -> Result<u64, Failure> {
        match sector.checked_add(count) {
            Some(end) if end <= self.disk.sectors() => Ok(sector * SECTOR_SIZE),
            _ => Err(Malformed("sectors past the end of the disk")),
        }
    }

    /// DISCARD and WRITE_ZEROES: one segment (`max_discard_seg`, `max_write_zeroes_seg`).
    fn clearing(&self, kind: u32, given: &mut Buffers<'_>) -> Result<Operation, Failure> {
        let mut segment = [0; SEGMENT_LEN];
        if given.len() != SEGMENT_LEN as u64 || !given.read_front(&mut segment) {
            return Err(Malformed("not one segment of 16 bytes"));
        }
        let segment = u128::from_le_bytes(segment);
        let (sector, count, flags) = (
            segment as u64,
            (segment >> 64) as u32,
            (segment >> 96) as u32,
        );
        let is_discard = kind == VIRTIO_BLK_T_DISCARD;
        let (known_flags, max) = if is_discard {
            (0, MAX_DISCARD_SECTORS)
        } else {
            (VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP, MAX_WRITE_ZEROES_SECTORS)
        };
        if flags & !known_flags != 0 {
            return Err(Unsupported);
        }
        if count == 0 || count > max {
            return Err(Malformed(
                "no sectors, or more than the device says it takes",
            ));
        }
        let offset = self.check_range(sector, count.into())?;
        let len = u64::from(count) * SECTOR_SIZE;
        Ok(if is_discard {
            Operation::Discard(offset, len)
        } else {
            Operation::WriteZeroes(offset, len, flags != 0)
        })
    }
}

/// Where a request's status goes.
pub(super) struct Status<'m>(VolatileSlice<'m>);

impl Status<'_> {
    /// Answers a request of `disk`, which has given the driver so many bytes of data. Returns what the device has written in
    /// all.
    pub(super) fn answer(&self, disk: &Disk, result: Result<u64, Failure>) -> u32 {
        let (status, written) = match result {
            Ok(written) => (VIRTIO_BLK_S_OK, written),
            Err(failure) => {
                log::debug!("a block request fails: {failure}");
                if let Failure::Io(error) = &failure {
                    disk.report(error);
                }
                match failure {
                    Unsupported => (VIRTIO_BLK_S_UNSUPP, 0),
                    _ => (VIRTIO_BLK_S_IOERR, 0),
                }
            }
        };
        self.0.copy_from(&[status as u8]);
        u32::try_from(written + 1).unwrap_or(u32::MAX)
    }
}
