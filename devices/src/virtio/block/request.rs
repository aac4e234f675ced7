//! Requests of a block device (§ 5.2.6).

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::disk::{Direction, Disk};
use super::{MAX_DISCARD_SECTORS, MAX_ID_LEN, MAX_WRITE_ZEROES_SECTORS, SECTOR_SIZE};
use crate::virtio::queue::{Buffers, Chain, QueueError};
use crate::virtio::worker::Handler;

/// `type`, `reserved` and `sector` of `struct virtio_blk_req`, in bytes.
const HEADER_LEN: usize = 16;

/// `struct virtio_blk_discard_write_zeroes`, in bytes.
const SEGMENT_LEN: usize = 16;

/// Why a request fails: its status.
#[derive(Debug, thiserror::Error)]
enum Failure {
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

/// Carries out requests, on the queue's worker.
pub(super) struct Requests {
    disk: Arc<Disk>,
    id: [u8; MAX_ID_LEN],
    /// Every write is flushed before it is completed.
    write_through: bool,
}

impl Requests {
    pub(super) fn new(disk: Arc<Disk>, id: [u8; MAX_ID_LEN], write_through: bool) -> Self {
        Self {
            disk,
            id,
            write_through,
        }
    }

    /// Returns how many bytes of data the driver gets.
    fn carry_out(&self, chain: &mut Chain<'_>) -> Result<u64, Failure> {
        let mut header = [0; HEADER_LEN];
        if !chain.readable.read_front(&mut header) {
            return Err(Malformed("a header of less than 16 bytes"));
        }
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let (kind, sector) = (
            u32::from_le_bytes([t0, t1, t2, t3]),
            u64::from_le_bytes(sector),
        );
        let (given, wanted) = (&mut chain.readable, &chain.writable);
        match kind {
            VIRTIO_BLK_T_IN if given.is_empty() => {
                let offset = self.data_offset(sector, wanted)?;
                self.disk.transfer(Direction::Read, wanted, offset)?;
                Ok(wanted.len())
            }
            VIRTIO_BLK_T_OUT if wanted.is_empty() => {
                self.check_writable()?;
                let offset = self.data_offset(sector, given)?;
                self.disk.transfer(Direction::Write, given, offset)?;
                self.written()
            }
            VIRTIO_BLK_T_FLUSH if given.is_empty() && wanted.is_empty() => {
                self.disk.flush()?;
                Ok(0)
            }
            VIRTIO_BLK_T_GET_ID if given.is_empty() => {
                if wanted.len() < MAX_ID_LEN as u64 {
                    return Err(Malformed("no room for the device's ID"));
                }
                Ok(wanted.write_front(&self.id) as u64)
            }
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if wanted.is_empty() => {
                self.check_writable()?;
                self.clear(kind, given)?;
                self.written()
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

    fn check_writable(&self) -> Result<(), Failure> {
        if self.disk.is_read_only() {
            return Err(Malformed("a write to a read-only disk"));
        }
        Ok(())
    }

    fn written(&self) -> Result<u64, Failure> {
        if self.write_through {
            self.disk.flush()?;
        }
        Ok(0)
    }

    /// Where the data of a read or write lie, in bytes: whole sectors, at least one, all of them on the disk.
    fn data_offset(&self, sector: u64, data: &Buffers<'_>) -> Result<u64, Failure> {
        if data.is_empty() || !data.len().is_multiple_of(SECTOR_SIZE) {
            return Err(Malformed("data that are no whole number of sectors"));
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
    fn clear(&self, kind: u32, given: &mut Buffers<'_>) -> Result<(), Failure> {
        let mut segment = [0; SEGMENT_LEN];
        if given.len() != SEGMENT_LEN as u64 || !given.read_front(&mut segment) {
            return Err(Malformed("not one segment of 16 bytes"));
        }
        let [
            s0,
            s1,
            s2,
            s3,
            s4,
            s5,
            s6,
            s7,
            c0,
            c1,
            c2,
            c3,
            f0,
            f1,
            f2,
            f3,
        ] = segment;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let count = u32::from_le_bytes([c0, c1, c2, c3]);
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
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
        if is_discard {
            self.disk.discard(offset, len)?;
        } else {
            self.disk.write_zeroes(offset, len, flags != 0)?;
        }
        Ok(())
    }
}

impl Handler for Requests {
    fn handle(&mut self, chain: &mut Chain<'_>) -> Result<u32, QueueError> {
        let Some(status_byte) = chain.writable.take_last_byte() else {
            return Err(QueueError::Unanswerable(
                "a block request without a status byte",
            ));
        };
        let (status, written) = match self.carry_out(chain) {
            Ok(written) => (VIRTIO_BLK_S_OK, written),
            Err(failure) => {
                log::debug!("a block request fails: {failure}");
                match failure {
                    Unsupported => (VIRTIO_BLK_S_UNSUPP, 0),
                    _ => (VIRTIO_BLK_S_IOERR, 0),
                }
            }
        };
        status_byte.copy_from(&[status as u8]);
        Ok(u32::try_from(written + 1).unwrap_or(u32::MAX))
    }
}
