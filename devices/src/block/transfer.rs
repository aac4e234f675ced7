//! Synchronous I/O between a file and guest memory, and the iovecs that describe it.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use vm_memory::VolatileSlice;

/// iovecs that the kernel takes in one call (UIO_MAXIOV).
const MAX_IOVECS: usize = 1024;

/// Room for an iovec.
pub(super) const NO_IOVEC: libc::iovec = libc::iovec {
    iov_base: std::ptr::null_mut(),
    iov_len: 0,
};

/// Longest piece of a read or write, in bytes: what the host may do before it is asked again whether to go on. It is as long as
/// the requests that Linux makes.
pub(super) const PIECE: u64 = 1 << 20;

/// Zeroes to write where the host has no faster way.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// Direction of a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the disk to the guest.
    Read,
    /// From the guest to the disk.
    Write,
}

/// Says that a request is to be cut short. Long ones are carried out in pieces, and it is asked between them.
pub(crate) type Cancelled<'a> = &'a dyn Fn() -> bool;

/// An error if a request is to be cut short.
pub(super) fn go_on(cancelled: Cancelled<'_>) -> io::Result<()> {
    if cancelled() {
        return Err(Errno::CANCELED.into());
    }
    Ok(())
}

/// Makes `iovecs` those of `slices`.
pub(super) fn describe(slices: &[VolatileSlice<'_>], iovecs: &mut Vec<libc::iovec>) {
    iovecs.clear();
    iovecs.extend(slices.iter().map(|slice| libc::iovec {
        iov_base: slice.ptr_guard_mut().as_ptr().cast(),
        iov_len: slice.len(),
    }));
}

/// Moves `len` bytes between the file at `offset` and guest memory; gives what is left of the iovecs.
pub(super) fn transfer<'a>(
    file: &File,
    direction: Direction,
    mut iovecs: &'a mut [libc::iovec],
    mut offset: u64,
    mut len: u64,
) -> io::Result<&'a mut [libc::iovec]> {
    while len > 0 {
        let count = transfer_some(file, direction, iovecs, offset, len)?;
        offset += count as u64;
        len -= count as u64;
        let used_up = advance(iovecs, count);
        iovecs = iovecs.get_mut(used_up..).unwrap_or_default();
    }
    Ok(iovecs)
}

/// Moves at least one byte and at most `len`; says how many.
#[allow(
    unsafe_code,
    reason = "the safe interfaces to vectored I/O want slices, which guest memory must not be made into: the guest \
              writes it at any time"
)]
fn transfer_some(
    file: &File,
    direction: Direction,
    iovecs: &[libc::iovec],
    offset: u64,
    len: u64,
) -> io::Result<usize> {
    let mut part = NO_IOVEC;
    let (ptr, count, _) = front(iovecs, len, &mut part);
    let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
    let fd = file.as_raw_fd();
    loop {
        // SAFETY: `ptr` points to at least `count` iovecs, in `iovecs` or in `part`. Each lies within a `VolatileSlice` that `Disk::transfer`'s
        // caller holds, a piece of a live mapping, readable and writable, which the kernel checks besides; nothing in this
        // process keeps references to guest memory. The file descriptor is open as long as `file` is there.
        let result = unsafe {
            match direction {
                Direction::Read => libc::preadv(fd, ptr, count as libc::c_int, offset),
                Direction::Write => libc::pwritev(fd, ptr, count as libc::c_int, offset),
            }
        };
        match usize::try_from(result) {
            // The file was truncated since it was opened.
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => return Ok(count),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

/// The beginning of `iovecs`, at most `len` bytes: where, how many iovecs, and how many bytes. It is as many whole iovecs as there
/// is room for, or the beginning of one, which then is in `part`.
pub(super) fn front(
    iovecs: &[libc::iovec],
    len: u64,
    part: &mut libc::iovec,
) -> (*const libc::iovec, u32, u64) {
    let (mut count, mut bytes) = (0, 0);
    for iovec in iovecs.iter().take(MAX_IOVECS) {
        let more = bytes + iovec.iov_len as u64;
        if more > len {
            break;
        }
        (count, bytes) = (count + 1, more);
    }
    match iovecs.first() {
        Some(first) if count == 0 => {
            *part = libc::iovec {
                iov_len: len as usize,
                ..*first
            };
            (part, 1, len)
        }
        _ => (iovecs.as_ptr(), count, bytes),
    }
}

pub(super) fn write_zeroes(
    file: &File,
    offset: u64,
    len: u64,
    unmap: bool,
    cancelled: Cancelled<'_>,
) -> io::Result<()> {
    go_on(cancelled)?;
    let fast = if unmap {
        punch_hole(file, offset, len)
    } else {
        let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        fallocate(file, flags, offset, len)
    };
    match fast {
        Err(Errno::OPNOTSUPP) => {}
        result => return Ok(result?),
    }
    let (mut offset, mut left) = (offset, len);
    while left > 0 {
        go_on(cancelled)?;
        let count = left.min(ZEROES.len() as u64);
        let zeroes = ZEROES.get(..count as usize).unwrap_or_default();
        file.write_all_at(zeroes, offset)?;
        offset += count;
        left -= count;
    }
    Ok(())
}

pub(super) fn punch_hole(file: &File, offset: u64, len: u64) -> Result<(), Errno> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(file, flags, offset, len)
}

/// Takes `count` bytes off the front; says how many iovecs that used up.
pub(super) fn advance(iovecs: &mut [libc::iovec], mut count: usize) -> usize {
    let mut used_up = 0;
    for iovec in iovecs {
        if count < iovec.iov_len {
            iovec.iov_base = iovec.iov_base.wrapping_byte_add(count);
            iovec.iov_len -= count;
            break;
        }
        count -= iovec.iov_len;
        used_up += 1;
    }
    used_up
}
