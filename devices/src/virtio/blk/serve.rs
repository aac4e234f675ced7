//! What a disk's worker does with its queue: one request after the other, or as many at once as a ring takes.

use std::io;
use std::mem;
use std::sync::Arc;

use super::request::{Failure, Operation, Requests, Status};
use crate::block::ring::{Job, Ring};
use crate::block::{Direction, Disk, Engine};
use crate::virtio::queue::{Buffers, Chain, QueueError, bad, max_pieces};
use crate::virtio::worker::{QueueContext, WorkerContext};

/// Most bytes of what a queue of this size is served with: its chain, the iovecs of one request, and of all on the ring.
pub(super) const fn memory_bound(size: u16) -> usize {
    let pieces = max_pieces(size);
    // A vector that grows may be twice as long as it must.
    let iovecs = 2 * pieces * size_of::<libc::iovec>();
    let answers = size as usize * size_of::<Option<(Status<'_>, u64)>>();
    Chain::memory_bound(size) + iovecs + answers + Ring::memory_bound(size, pieces)
}

/// The ring of a queue of this size, if the disk has this engine and can have it.
pub(super) fn new_ring(disk: &Arc<Disk>, engine: Engine, queue_size: u16) -> Option<Ring> {
    if engine == Engine::Sync || disk.has_overlay() {
        return None;
    }
    usable(Ring::new(Arc::clone(disk), queue_size))
}

fn usable<T>(result: io::Result<T>) -> Option<T> {
    result
        .inspect_err(|e| log::info!("io_uring unavailable ({e}); using synchronous I/O"))
        .ok()
}

/// Serves a worker's queues from a start of the device to its stop; its only one through `ring`, if there is one.
pub(super) fn serve<'m>(
    requests: &Requests,
    ring: &mut Option<Ring>,
    worker: &'m WorkerContext,
    queues: &mut [QueueContext<'m>],
) -> Result<(), QueueError> {
    // What a ring cannot do: to flush each write.
    if !requests.write_through
        && let [queue] = &mut *queues
        && let Some(mut at_hand) = ring.take()
        && usable(at_hand.attach(&worker.mem)).is_some()
    {
        let served = ThroughRing::new(requests, &mut at_hand, queue.size()).serve(queue);
        *ring = (at_hand.in_flight() == 0).then_some(at_hand);
        return served;
    }
    let (mut chain, mut iovecs) = (Chain::default(), Vec::new());
    worker.run(queues, |queue| {
        queue.handle_all(&mut chain, |chain| {
            let (status, operation) = requests.parse(chain)?;
            let result = operation.and_then(|op| {
                requests.carry_out(op, chain, &mut iovecs, &|| worker.is_cancelled())
            });
            Ok(status.answer(&requests.disk, result))
        })
    })
}

/// A queue whose requests are in flight together.
struct ThroughRing<'m, 'r> {
    requests: &'r Requests,
    ring: &'r mut Ring,
    /// By head: where the answer of a request in flight goes, and how many bytes of data the driver gets if it succeeds.
    answers: Vec<Option<(Status<'m>, u64)>>,
    chain: Chain<'m>,
    iovecs: Vec<libc::iovec>,
}

impl<'m, 'r> ThroughRing<'m, 'r> {
    fn new(requests: &'r Requests, ring: &'r mut Ring, size: u16) -> Self {
        Self {
            requests,
            ring,
            answers: (0..size).map(|_| None).collect(),
            chain: Chain::default(),
            iovecs: Vec::new(),
        }
    }

    /// Works until the worker must stop, or the driver breaks a rule; then nothing is in flight, unless the ring fails.
    fn serve(&mut self, queue: &mut QueueContext<'m>) -> Result<(), QueueError> {
        let worker = queue.worker;
        let served = worker.run(std::slice::from_mut(queue), |queue| self.turn(queue));
        let mut cancelled = false;
        while self.ring.in_flight() > 0 || self.ring.has_unsubmitted() {
            // To cancel may be asked for while the requests are carried out to their end.
            if worker.is_cancelled() && !mem::replace(&mut cancelled, true) {
                self.ring.cancel().map_err(QueueError::Host)?;
            }
            self.exchange(queue)?;
            if self.ring.in_flight() > 0 && !self.ring.has_unsubmitted() {
                worker.wait()?;
            }
        }
        served
    }

    /// Takes all requests that are there, or as many as may be in flight, submits them at once, and gives back what is done.
    fn turn(&mut self, queue: &mut QueueContext<'m>) -> Result<bool, QueueError> {
        let mut is_empty = false;
        while !is_empty && self.ring.has_room() && !queue.worker.must_stop() {
            while self.ring.has_room() && queue.pop(&mut self.chain)? {
                self.begin(queue)?;
            }
            queue.report()?;
            is_empty = self.ring.has_room() && queue.ask_for_notification()?;
        }
        self.exchange(queue)?;
        Ok((is_empty || !self.ring.has_room()) && !self.ring.has_unsubmitted())
    }

    /// Starts a request on the ring, or carries it out at once.
    fn begin(&mut self, queue: &mut QueueContext<'m>) -> Result<(), QueueError> {
        let (head, requests, worker) = (self.chain.head(), self.requests, queue.worker);
        if self.ring.is_busy(head) {
            return bad(format!(
                "the chain at {head} was made available again while the device has it"
            ));
        }
        let (status, operation) = requests.parse(&mut self.chain)?;
        let (job, data, wanted) = match operation {
            Ok(Operation::Transfer(Direction::Read, offset)) => {
                let data = &self.chain.writable;
                (Job::Transfer(Direction::Read, offset), data, data.len())
            }
            // A write goes to the host's page cache. Few file systems do that for io_uring but in a thread of its own,
            // which takes several times as long: worth it only for what else is in flight.
            Ok(Operation::Transfer(Direction::Write, offset)) if self.ring.in_flight() > 0 => {
                let job = Job::Transfer(Direction::Write, offset);
                (job, &self.chain.readable, 0)
            }
            Ok(Operation::Flush) if !requests.disk.is_read_only() => {
                (Job::Flush, &self.chain.readable, 0)
            }
            other => {
                let (chain, iovecs) = (&self.chain, &mut self.iovecs);
                let result = other.and_then(|op| {
                    requests.carry_out(op, chain, iovecs, &|| worker.is_cancelled())
                });
                return queue.complete(head, status.answer(&requests.disk, result));
            }
        };
        if let Some(answer) = self.answers.get_mut(usize::from(head)) {
            *answer = Some((status, wanted));
        }
        start(self.ring, head, job, data).map_err(QueueError::Host)
    }

    /// Submits what was started, and gives back what is done.
    fn exchange(&mut self, queue: &mut QueueContext<'m>) -> Result<(), QueueError> {
        if self.ring.in_flight() == 0 && !self.ring.has_unsubmitted() {
            return Ok(());
        }
        self.ring.submit().map_err(QueueError::Host)?;
        loop {
            let completed = self.ring.completed(queue.worker.is_cancelled());
            let Some((head, result)) = completed.map_err(QueueError::Host)? else {
                return queue.report();
            };
            let answer = self.answers.get_mut(usize::from(head));
            if let Some((status, wanted)) = answer.and_then(Option::take) {
                let result = result.map(|()| wanted).map_err(Failure::Io);
                queue.complete(head, status.answer(&self.requests.disk, result))?;
            }
        }
    }
}

#[allow(unsafe_code, reason = "the ring cannot see where buffers lie")]
fn start(ring: &mut Ring, head: u16, job: Job, data: &Buffers<'_>) -> io::Result<()> {
    // SAFETY: a chain's buffers lie in the worker's memory, to which `serve` has attached the ring.
    unsafe { ring.start(head, job, data.slices(), data.len()) }
}
