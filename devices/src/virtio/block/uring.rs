//! The io_uring engine: all requests of a queue at once.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::thread;
use std::time::Duration;

use io_uring::types::{Fd, Fixed, FsyncFlags};
use io_uring::{IoUring, cqueue, opcode, squeue};
use rustix::io::Errno;

use super::disk::{self, Direction};
use super::request::{Failure, Operation, Requests, Status};
use crate::virtio::queue::{Chain, QueueError};
use crate::virtio::worker::Serving;

/// The disk, as a registered file.
const DISK: Fixed = Fixed(0);
/// What marks a notification of the queue, and the end of an attempt to cancel; others are marked with their request's head.
const NOTIFIED: u64 = u64::MAX;
const CANCEL: u64 = u64::MAX - 1;

/// Bytes of data that a queue's requests have in flight before no other is taken. The host may have to move them all
/// before it lets go of guest memory. Pieces make it up to [`disk::PIECE`] more.
const MAX_BYTES: u64 = 8 << 20;

/// iovecs for which a request's place keeps its room: as many as Linux's requests mostly have, and little beside guest RAM
/// when all places have had a request.
const KEPT_IOVECS: usize = 16;

/// A ring and what is in flight on it.
pub(super) struct Uring<'m, 'r> {
    ring: IoUring,
    requests: &'r Requests,
    /// By head. Its room is kept and used again.
    slots: Vec<Slot<'m>>,
    /// Entries of requests that are on the ring, and the bytes that they move.
    in_flight: usize,
    bytes: u64,
    /// The eventfd is being polled.
    polled: bool,
}

/// The place of a request in flight. The kernel reads `iovecs` and `part` until it is done.
struct Slot<'m> {
    request: Option<Request<'m>>,
    iovecs: Vec<libc::iovec>,
    /// See [`disk::front`].
    part: libc::iovec,
}

impl Slot<'_> {
    fn new() -> Self {
        Self {
            request: None,
            iovecs: Vec::new(),
            part: disk::NO_IOVEC,
        }
    }
}

struct Request<'m> {
    status: Status<'m>,
    operation: Operation,
    /// Bytes of data, how many have been moved, in how many whole iovecs, and how many are being moved.
    len: u64,
    moved: u64,
    used_up: usize,
    moving: u64,
}

impl<'m, 'r> Uring<'m, 'r> {
    pub(super) fn new(
        requests: &'r Requests,
        file: BorrowedFd<'_>,
        serving: &Serving<'m>,
    ) -> io::Result<Self> {
        // Room for an entry of each request and for the poll.
        let entries = 2 * u32::from(serving.queue_size());
        // With completions worked on when they are waited for, which saves interruptions (Linux 6.1).
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .build(entries)
            .or_else(|_| IoUring::new(entries))?;
        if !ring.params().is_feature_resource_tagging() {
            // As old as this are polls that go on (IORING_POLL_ADD_MULTI).
            return Err(io::Error::other("it is older than Linux 5.13"));
        }
        ring.submitter().register_files(&[file.as_raw_fd()])?;
        Ok(Self {
            ring,
            requests,
            slots: (0..serving.queue_size()).map(|_| Slot::new()).collect(),
            in_flight: 0,
            bytes: 0,
            polled: false,
        })
    }

    /// Works until the worker must stop, or the driver breaks a rule; then nothing is in flight.
    pub(super) fn run(&mut self, serving: &mut Serving<'m>) -> Result<(), QueueError> {
        let mut chain = Chain::default();
        let mut result = Ok(());
        while result.is_ok() && !serving.must_stop() {
            result = self.turn(serving, &mut chain);
        }
        let mut cancelled = false;
        while self.in_flight > 0 {
            let ended = if serving.is_cancelled() && !mem::replace(&mut cancelled, true) {
                self.cancel()
            } else {
                // To cancel may be asked for meanwhile.
                self.listen(serving)
            };
            if let Err(e) = ended.and_then(|()| self.wait(serving)) {
                // The kernel may still use all of it.
                mem::forget(mem::take(&mut self.slots));
                mem::forget(serving.mem.clone());
                return Err(e);
            }
        }
        serving.report()?;
        result
    }

    /// Has the kernel drop what it has not begun, or can break off.
    fn cancel(&mut self) -> Result<(), QueueError> {
        for head in 0..self.slots.len() {
            if self
                .slots
                .get(head)
                .is_some_and(|slot| slot.request.is_some())
            {
                let cancel = opcode::AsyncCancel::new(head as u64);
                self.push(&cancel.build().user_data(CANCEL))?;
            }
        }
        Ok(())
    }

    /// Has notifications complete an entry.
    fn listen(&mut self, serving: &Serving<'m>) -> Result<(), QueueError> {
        if !mem::replace(&mut self.polled, true) {
            let event = Fd(serving.event().as_raw_fd());
            let poll = opcode::PollAdd::new(event, libc::POLLIN as u32).multi(true);
            self.push(&poll.build().user_data(NOTIFIED))?;
        }
        Ok(())
    }

    /// Takes all requests that are there, or as many as may be in flight, submits them at once, and waits for a completion or a
    /// notification.
    fn turn(&mut self, serving: &mut Serving<'m>, chain: &mut Chain<'m>) -> Result<(), QueueError> {
        self.listen(serving)?;
        loop {
            while self.bytes < MAX_BYTES && serving.pop(chain)? {
                self.begin(serving, chain)?;
            }
            serving.report()?;
            if self.bytes >= MAX_BYTES || serving.ask_for_notification()? || serving.must_stop() {
                break;
            }
        }
        self.wait(serving)
    }

    /// Puts a request on the ring, or carries it out at once.
    fn begin(
        &mut self,
        serving: &mut Serving<'m>,
        chain: &mut Chain<'m>,
    ) -> Result<(), QueueError> {
        let (head, requests) = (chain.head(), self.requests);
        let slot = self.slots.get_mut(usize::from(head));
        let Some(slot) = slot.filter(|slot| slot.request.is_none()) else {
            return Err(QueueError::InFlight(head));
        };
        let (status, operation) = requests.parse(chain)?;
        let (operation, data) = match operation {
            Ok(read @ Operation::Transfer(Direction::Read, _)) => (read, &chain.writable),
            // A write goes to the host's page cache. Few file systems do that for io_uring but in a thread of its own,
            // which takes several times as long: worth it only for what else is in flight.
            Ok(write @ Operation::Transfer(Direction::Write, _)) if self.in_flight > 0 => {
                (write, &chain.readable)
            }
            Ok(flush @ Operation::Flush) if !requests.disk.is_read_only() => {
                (flush, &chain.readable)
            }
            other => {
                let (cancelled, iovecs) = (serving.cancelled(), &mut slot.iovecs);
                let result = other.and_then(|op| requests.carry_out(op, chain, iovecs, &cancelled));
                iovecs.clear();
                iovecs.shrink_to(KEPT_IOVECS);
                return serving.complete(head, status.answer(&requests.disk, result));
            }
        };
        disk::describe(data, &mut slot.iovecs);
        slot.request = Some(Request {
            status,
            operation,
            len: data.len(),
            moved: 0,
            used_up: 0,
            moving: 0,
        });
        self.submit(head)
    }

    /// Puts a request on the ring: the next piece of what is left of it.
    fn submit(&mut self, head: u16) -> Result<(), QueueError> {
        let Some(Slot {
            request: Some(request),
            iovecs,
            part,
        }) = self.slots.get_mut(usize::from(head))
        else {
            return Ok(());
        };
        let rest = iovecs.get(request.used_up..).unwrap_or_default();
        let (iovecs, count, bytes) = disk::front(rest, disk::PIECE, part);
        let entry = match request.operation {
            Operation::Transfer(Direction::Read, offset) => opcode::Readv::new(DISK, iovecs, count)
                .offset(offset + request.moved)
                .build(),
            Operation::Transfer(Direction::Write, offset) => {
                opcode::Writev::new(DISK, iovecs, count)
                    .offset(offset + request.moved)
                    .build()
            }
            _ => opcode::Fsync::new(DISK).flags(FsyncFlags::DATASYNC).build(),
        };
        request.moving = bytes;
        self.bytes += bytes;
        self.push(&entry.user_data(head.into()))?;
        self.in_flight += 1;
        Ok(())
    }

    #[allow(
        unsafe_code,
        reason = "the kernel reads and writes what an entry points to until it is completed"
    )]
    fn push(&mut self, entry: &squeue::Entry) -> Result<(), QueueError> {
        // SAFETY: an entry with pointers is one of `submit`'s. The iovecs are those of a slot, which is never moved, and whose
        // request stays there, and the iovecs with it, until the entry is completed; `run` waits for that, or frees neither. They lie in pieces of
        // guest memory, which is mapped as long as `Serving::mem`, readable and writable; nothing in this process keeps
        // references to it.
        let pushed = unsafe { self.ring.submission().push(entry) };
        pushed.map_err(|full| QueueError::Engine(io::Error::other(full)))
    }

    /// Submits what was pushed, waits, and gives back what is done.
    fn wait(&mut self, serving: &mut Serving<'m>) -> Result<(), QueueError> {
        if let Err(error) = self.ring.submit_and_wait(1) {
            match Errno::from_io_error(&error) {
                Some(Errno::INTR | Errno::BUSY) => {}
                // The host has no memory for it now.
                Some(Errno::AGAIN) => thread::sleep(Duration::from_millis(1)),
                _ => return Err(QueueError::Engine(error)),
            }
        }
        loop {
            let next = self.ring.completion().next();
            match next {
                Some(entry) => self.complete(serving, &entry)?,
                None => return serving.report(),
            }
        }
    }

    fn complete(
        &mut self,
        serving: &mut Serving<'m>,
        entry: &cqueue::Entry,
    ) -> Result<(), QueueError> {
        if entry.user_data() == NOTIFIED {
            self.polled = cqueue::more(entry.flags());
            return match entry.result() {
                0.. => Ok(()),
                errno => Err(QueueError::Engine(io::Error::from_raw_os_error(-errno))),
            };
        }
        if entry.user_data() == CANCEL {
            // The request's own entry says what came of it.
            return Ok(());
        }
        self.in_flight -= 1;
        let head = entry.user_data() as u16;
        let Some(slot) = self.slots.get_mut(usize::from(head)) else {
            return Ok(());
        };
        let Some(request) = &mut slot.request else {
            return Ok(());
        };
        self.bytes -= mem::take(&mut request.moving);
        let result = match (request.operation, u32::try_from(entry.result())) {
            (_, Err(_)) => match Errno::from_raw_os_error(-entry.result()) {
                Errno::INTR | Errno::AGAIN if !serving.is_cancelled() => return self.submit(head),
                errno => Err(errno.into()),
            },
            // The file was truncated since it was opened.
            (Operation::Transfer(..), Ok(0)) => Err(io::ErrorKind::UnexpectedEof.into()),
            (Operation::Transfer(direction, _), Ok(count)) => {
                let rest = slot.iovecs.get_mut(request.used_up..).unwrap_or_default();
                request.used_up += disk::advance(rest, count as usize);
                request.moved += u64::from(count);
                match direction {
                    _ if request.moved < request.len && serving.is_cancelled() => {
                        Err(Errno::CANCELED.into())
                    }
                    _ if request.moved < request.len => return self.submit(head),
                    Direction::Read => Ok(request.len),
                    Direction::Write => Ok(0),
                }
            }
            (_, Ok(_)) => Ok(0),
        };
        let result = match request.operation {
            Operation::Flush => self.requests.disk.flushed(result),
            _ => result,
        };
        let written = request
            .status
            .answer(&self.requests.disk, result.map_err(Failure::Io));
        slot.request = None;
        slot.iovecs.clear();
        slot.iovecs.shrink_to(KEPT_IOVECS);
        serving.complete(head, written)
    }
}
