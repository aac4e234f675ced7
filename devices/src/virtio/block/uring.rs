//! The io_uring engine: all requests of a queue at once.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::thread;
use std::time::Duration;

use io_uring::types::{Fd, Fixed, FsyncFlags};
use io_uring::{IoUring, cqueue, opcode, squeue};
use rustix::io::Errno;

use super::disk::{self, Direction, MAX_IOVECS};
use super::request::{Failure, Operation, Requests, Status};
use crate::virtio::queue::{Chain, QueueError};
use crate::virtio::worker::Serving;

/// The disk, as a registered file.
const DISK: Fixed = Fixed(0);
/// What marks a notification of the queue; others are marked with their request's head.
const NOTIFIED: u64 = u64::MAX;

/// A ring and what is in flight on it.
pub(super) struct Uring<'m, 'r> {
    ring: IoUring,
    requests: &'r Requests,
    /// By head. Its room is kept and used again.
    slots: Vec<Slot<'m>>,
    /// Entries of requests that are on the ring.
    in_flight: usize,
    /// The eventfd is being polled.
    polled: bool,
}

/// The place of a request in flight. The kernel reads `iovecs` until it is done.
#[derive(Default)]
struct Slot<'m> {
    request: Option<Request<'m>>,
    iovecs: Vec<libc::iovec>,
}

struct Request<'m> {
    status: Status<'m>,
    operation: Operation,
    /// Bytes of data, and how many have been moved, in how many whole iovecs.
    len: u64,
    moved: u64,
    used_up: usize,
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
            slots: (0..serving.queue_size()).map(|_| Slot::default()).collect(),
            in_flight: 0,
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
        while self.in_flight > 0 {
            if let Err(e) = self.wait(serving) {
                // The kernel may still use all of it.
                mem::forget(mem::take(&mut self.slots));
                mem::forget(serving.mem.clone());
                return Err(e);
            }
        }
        serving.report()?;
        result
    }

    /// Takes all requests that are there, submits them at once, and waits for a completion or a notification.
    fn turn(&mut self, serving: &mut Serving<'m>, chain: &mut Chain<'m>) -> Result<(), QueueError> {
        if !self.polled {
            let event = Fd(serving.event().as_raw_fd());
            let poll = opcode::PollAdd::new(event, libc::POLLIN as u32).multi(true);
            self.push(&poll.build().user_data(NOTIFIED))?;
            self.polled = true;
        }
        loop {
            while serving.pop(chain)? {
                self.begin(serving, chain)?;
            }
            serving.report()?;
            if serving.ask_for_notification()? || serving.must_stop() {
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
                let result = other.and_then(|op| requests.carry_out(op, chain, &mut slot.iovecs));
                return serving.complete(head, status.answer(result));
            }
        };
        disk::describe(data, &mut slot.iovecs);
        slot.request = Some(Request {
            status,
            operation,
            len: data.len(),
            moved: 0,
            used_up: 0,
        });
        self.submit(head)
    }

    /// Puts what is left of a request on the ring.
    fn submit(&mut self, head: u16) -> Result<(), QueueError> {
        let Some(Slot {
            request: Some(request),
            iovecs,
        }) = self.slots.get(usize::from(head))
        else {
            return Ok(());
        };
        let iovecs = iovecs.get(request.used_up..).unwrap_or_default();
        let count = iovecs.len().min(MAX_IOVECS) as u32;
        let entry = match request.operation {
            Operation::Transfer(Direction::Read, offset) => {
                opcode::Readv::new(DISK, iovecs.as_ptr(), count)
                    .offset(offset + request.moved)
                    .build()
            }
            Operation::Transfer(Direction::Write, offset) => {
                opcode::Writev::new(DISK, iovecs.as_ptr(), count)
                    .offset(offset + request.moved)
                    .build()
            }
            _ => opcode::Fsync::new(DISK).flags(FsyncFlags::DATASYNC).build(),
        };
        self.push(&entry.user_data(head.into()))?;
        self.in_flight += 1;
        Ok(())
    }

    #[allow(
        unsafe_code,
        reason = "the kernel reads and writes what an entry points to until it is completed"
    )]
    fn push(&mut self, entry: &squeue::Entry) -> Result<(), QueueError> {
        // SAFETY: an entry with pointers is one of `submit`'s. The iovecs are those of a slot, whose request stays there, and
        // the iovecs with it, until the entry is completed; `run` waits for that, or frees neither. They lie in pieces of
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
        self.in_flight -= 1;
        let head = entry.user_data() as u16;
        let Some(slot) = self.slots.get_mut(usize::from(head)) else {
            return Ok(());
        };
        let Some(request) = &mut slot.request else {
            return Ok(());
        };
        let result = match (request.operation, u32::try_from(entry.result())) {
            (_, Err(_)) => match Errno::from_raw_os_error(-entry.result()) {
                Errno::INTR | Errno::AGAIN => return self.submit(head),
                errno => Err(errno.into()),
            },
            // The file was truncated since it was opened.
            (Operation::Transfer(..), Ok(0)) => Err(io::ErrorKind::UnexpectedEof.into()),
            (Operation::Transfer(direction, _), Ok(count)) => {
                let rest = slot.iovecs.get_mut(request.used_up..).unwrap_or_default();
                request.used_up += disk::advance(rest, count as usize);
                request.moved += u64::from(count);
                if request.moved < request.len {
                    return self.submit(head);
                }
                Ok(if direction == Direction::Read {
                    request.len
                } else {
                    0
                })
            }
            (_, Ok(_)) => Ok(0),
        };
        let result = match request.operation {
            Operation::Flush => self.requests.disk.flushed(result),
            _ => result,
        };
        let written = request.status.answer(result.map_err(Failure::Io));
        slot.request = None;
        serving.complete(head, written)
    }
}
