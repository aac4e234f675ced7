//! Many requests at once on a disk's file, through io_uring.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use io_uring::register::Restriction;
use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{IoUring, cqueue, opcode, squeue};
use rustix::io::Errno;
use vm_memory::{GuestMemoryMmap, VolatileSlice};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use super::disk::Disk;
use super::transfer::{self, Direction};

/// The disk, as a registered file.
const DISK: Fixed = Fixed(0);

/// What marks the end of an attempt to cancel; others are marked with their request's token.
const CANCEL: u64 = u64::MAX;

/// Bytes of data that a ring's requests have in flight before no other is taken. The host may have to move them all
/// before it lets go of guest memory. Pieces make it up to [`transfer::PIECE`] more.
const MAX_BYTES: u64 = 8 << 20;

/// iovecs of the requests in flight before no other is taken: far more than so many bytes need in pages. A driver could give each
/// byte a descriptor.
const MAX_IOVECS: usize = 4096;

/// iovecs for which a request's place keeps its room: as many as Linux's requests mostly have, and little beside guest RAM
/// when all places have had a request.
const KEPT_IOVECS: usize = 16;

/// <linux/io_uring.h>: run what the kernel has left to do for completions, even if none is waited for.
const IORING_ENTER_GETEVENTS: u32 = 1;

/// What a request is to do.
#[derive(Debug, Clone, Copy)]
pub enum Job {
    /// To move the data from or to this offset in bytes.
    Transfer(Direction, u64),
    /// To make durable what was written.
    Flush,
}

/// A ring and what is in flight on it. It may be made by one thread and used by another, always the same.
pub struct Ring {
    ring: IoUring,
    /// Written to when completions come. With DEFER_TASKRUN, polling the ring itself does not show those that are left to run.
    event: EventFd,
    disk: Arc<Disk>,
    /// By token. Its room is kept and used again.
    slots: Vec<Slot>,
    /// Entries of requests that are on the ring, and the bytes that they move.
    in_flight: usize,
    bytes: u64,
    /// Of all requests.
    iovecs: usize,
    /// What the requests' memory is part of; `None` before the first use.
    mem: Option<GuestMemoryMmap>,
}

/// The place of a request in flight. The kernel reads `iovecs` and `part` until it is done.
struct Slot {
    request: Option<Request>,
    iovecs: Vec<libc::iovec>,
    /// See [`transfer::front`].
    part: libc::iovec,
}

struct Request {
    job: Job,
    /// Bytes of data, how many have been moved, in how many whole iovecs, and how many are being moved.
    len: u64,
    moved: u64,
    used_up: usize,
    moving: u64,
}

#[allow(unsafe_code, reason = "iovecs are pointers to guest memory")]
// SAFETY: the pointers in `slots` are the kernel's to follow. No thread does, and what they point to stays mapped: `mem`.
unsafe impl Send for Ring {}

impl Ring {
    /// A ring for requests with tokens below `size`. An error if the host has none, or the disk has an overlay.
    pub fn new(disk: Arc<Disk>, size: u16) -> io::Result<Self> {
        let file = disk.plain_file().ok_or(io::ErrorKind::Unsupported)?;
        // Room for an entry of each request, and to cancel it.
        let entries = 2 * u32::from(size);
        // With completions worked on when they are waited for, which saves interruptions (Linux 6.1).
        let ring = IoUring::builder()
            .setup_r_disabled()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .build(entries)
            .or_else(|_| IoUring::builder().setup_r_disabled().build(entries))?;
        if !ring.params().is_feature_resource_tagging() {
            // Since 5.12 its threads are the process's own; before, no sandbox of the process held them.
            return Err(io::Error::other("it is older than Linux 5.13"));
        }
        let submitter = ring.submitter();
        submitter.register_files(&[file.as_raw_fd()])?;
        let event = EventFd::new(EFD_CLOEXEC)?;
        submitter.register_eventfd(event.as_raw_fd())?;
        submitter.register_restrictions(&mut [
            Restriction::sqe_op(opcode::Readv::CODE),
            Restriction::sqe_op(opcode::Writev::CODE),
            Restriction::sqe_op(opcode::Fsync::CODE),
            Restriction::sqe_op(opcode::AsyncCancel::CODE),
            Restriction::sqe_flags_allowed(squeue::Flags::FIXED_FILE.bits()),
        ])?;
        let slot = || Slot {
            request: None,
            iovecs: Vec::new(),
            part: transfer::NO_IOVEC,
        };
        Ok(Self {
            ring,
            event,
            disk,
            slots: std::iter::repeat_with(slot).take(size.into()).collect(),
            in_flight: 0,
            bytes: 0,
            iovecs: 0,
            mem: None,
        })
    }

    /// Gets ready for requests whose data lie in `mem`, on this thread from now on. Nothing may be in flight.
    pub fn attach(&mut self, mem: &GuestMemoryMmap) -> io::Result<()> {
        if self.mem.replace(mem.clone()).is_none() {
            self.ring.submitter().register_enable_rings()?;
        }
        Ok(())
    }

    /// What becomes readable, each time anew, when completions come.
    pub fn fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    /// Requests that are not done.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Whether it takes another request now.
    pub fn has_room(&self) -> bool {
        self.bytes < MAX_BYTES && self.iovecs < MAX_IOVECS
    }

    /// Most bytes of a ring for `size` requests, none with more than `pieces` pieces of data.
    pub const fn memory_bound(size: u16, pieces: usize) -> usize {
        // SQE 64 bytes, CQE 16, twice as many of these; an index for each SQE (<linux/io_uring.h>); and a page of heads and tails.
        let shared = 2 * size as usize * (64 + 2 * 16 + 4) + 4096;
        // A vector that grows may be twice as long as it must.
        let in_flight = 2 * (MAX_IOVECS + pieces);
        let iovecs = (in_flight + size as usize * KEPT_IOVECS) * size_of::<libc::iovec>();
        shared + size as usize * size_of::<Slot>() + iovecs
    }

    /// Whether something waits for [`Ring::submit`].
    pub fn has_unsubmitted(&mut self) -> bool {
        !self.ring.submission().is_empty()
    }

    /// Whether a request with this token is not done, or there can be none.
    pub fn is_busy(&self, token: u16) -> bool {
        let slot = self.slots.get(usize::from(token));
        slot.is_none_or(|slot| slot.request.is_some())
    }

    /// Takes a request whose data, `len` bytes, are `slices`. Its token must not be busy.
    ///
    /// # Safety
    ///
    /// `slices` lie in the memory that the ring is attached to.
    #[allow(unsafe_code, reason = "it cannot see where slices come from")]
    pub unsafe fn start(
        &mut self,
        token: u16,
        job: Job,
        slices: &[VolatileSlice<'_>],
        len: u64,
    ) -> io::Result<()> {
        if let Some(slot) = self.slots.get_mut(usize::from(token)) {
            transfer::describe(slices, &mut slot.iovecs);
            self.iovecs += slot.iovecs.len();
            slot.request = Some(Request {
                job,
                len,
                moved: 0,
                used_up: 0,
                moving: 0,
            });
        }
        self.push_piece(token)
    }

    /// Puts a request on the ring: the next piece of what is left of it.
    fn push_piece(&mut self, token: u16) -> io::Result<()> {
        let Some(Slot {
            request: Some(request),
            iovecs,
            part,
        }) = self.slots.get_mut(usize::from(token))
        else {
            return Ok(());
        };
        let rest = iovecs.get(request.used_up..).unwrap_or_default();
        let (iovecs, count, bytes) = transfer::front(rest, transfer::PIECE, part);
        let entry = match request.job {
            Job::Transfer(Direction::Read, offset) => opcode::Readv::new(DISK, iovecs, count)
                .offset(offset + request.moved)
                .build(),
            Job::Transfer(Direction::Write, offset) => opcode::Writev::new(DISK, iovecs, count)
                .offset(offset + request.moved)
                .build(),
            Job::Flush => opcode::Fsync::new(DISK).flags(FsyncFlags::DATASYNC).build(),
        };
        request.moving = bytes;
        self.bytes += bytes;
        self.in_flight += 1;
        self.push(&entry.user_data(token.into()))
    }

    #[allow(unsafe_code, reason = "the kernel uses what an entry points to")]
    fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        // SAFETY: an entry with pointers is one of `push_piece`'s. The iovecs are those of a slot, which is never moved, and whose
        // request stays there, and the iovecs with it, until the entry is completed. They lie in pieces of guest memory,
        // as `start` demands, which `mem` keeps mapped, readable and writable; nothing in this process keeps references to
        // it. `drop` frees neither while something is in flight.
        let pushed = unsafe { self.ring.submission().push(entry) };
        pushed.map_err(io::Error::other)
    }

    /// Has the kernel drop what it has not begun, or can break off.
    pub fn cancel(&mut self) -> io::Result<()> {
        for token in 0..self.slots.len() as u16 {
            if self.is_busy(token) {
                let cancel = opcode::AsyncCancel::new(token.into()).build();
                self.push(&cancel.user_data(CANCEL))?;
            }
        }
        Ok(())
    }

    /// Submits what was started, and has completions come in. It does not wait for any: [`Ring::fd`] tells of later
    /// ones.
    #[allow(unsafe_code, reason = "io_uring_enter(2), with flags of one's own")]
    pub fn submit(&mut self) -> io::Result<()> {
        let count = self.ring.submission().len() as u32;
        let submitter = self.ring.submitter();
        // SAFETY: there is no argument, and no more entries than were pushed.
        let entered =
            unsafe { submitter.enter::<libc::sigset_t>(count, 0, IORING_ENTER_GETEVENTS, None) };
        match entered.as_ref().map_err(Errno::from_io_error) {
            Ok(_) | Err(Some(Errno::INTR | Errno::BUSY)) => Ok(()),
            // The host has no memory for it now.
            Err(Some(Errno::AGAIN)) => {
                thread::sleep(Duration::from_millis(1));
                Ok(())
            }
            Err(_) => entered.map(|_| ()),
        }
    }

    /// The next request that is done, by its token; what is left of one is put on the ring again, unless it is `cancelled`.
    pub fn completed(&mut self, cancelled: bool) -> io::Result<Option<(u16, io::Result<()>)>> {
        loop {
            let Some(entry) = self.ring.completion().next() else {
                return Ok(None);
            };
            // What came of a request that was to be cancelled, its own entry says.
            if entry.user_data() != CANCEL
                && let Some(result) = self.complete(&entry, cancelled)?
            {
                return Ok(Some((entry.user_data() as u16, result)));
            }
        }
    }

    fn complete(
        &mut self,
        entry: &cqueue::Entry,
        cancelled: bool,
    ) -> io::Result<Option<io::Result<()>>> {
        let token = entry.user_data() as u16;
        let Some(slot) = self.slots.get_mut(usize::from(token)) else {
            return Ok(None);
        };
        let Some(request) = &mut slot.request else {
            return Ok(None);
        };
        self.in_flight -= 1;
        self.bytes -= mem::take(&mut request.moving);
        let result = match (request.job, u32::try_from(entry.result())) {
            (_, Err(_)) => match Errno::from_raw_os_error(-entry.result()) {
                Errno::INTR | Errno::AGAIN if !cancelled => {
                    return self.push_piece(token).map(|()| None);
                }
                errno => Err(errno.into()),
            },
            // The file was truncated since it was opened.
            (Job::Transfer(..), Ok(0)) => Err(io::ErrorKind::UnexpectedEof.into()),
            (Job::Transfer(..), Ok(count)) => {
                let rest = slot.iovecs.get_mut(request.used_up..).unwrap_or_default();
                request.used_up += transfer::advance(rest, count as usize);
                request.moved += u64::from(count);
                match request.moved < request.len {
                    true if cancelled => Err(Errno::CANCELED.into()),
                    true => return self.push_piece(token).map(|()| None),
                    false => Ok(()),
                }
            }
            (Job::Flush, Ok(_)) => Ok(()),
        };
        let result = match request.job {
            Job::Flush => self.disk.flushed(result),
            Job::Transfer(..) => result,
        };
        slot.request = None;
        self.iovecs -= slot.iovecs.len();
        slot.iovecs.clear();
        slot.iovecs.shrink_to(KEPT_IOVECS);
        Ok(Some(result))
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        if self.in_flight > 0 {
            // The kernel may still use all of it.
            mem::forget(mem::take(&mut self.slots));
            mem::forget(self.mem.take());
        }
    }
}

#[cfg(test)]
mod tests;
