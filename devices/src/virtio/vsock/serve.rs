//! What a vsock device's worker does with its three queues.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use super::muxer::Muxer;
use super::packet::{HEADER_LEN, Header};
use crate::virtio::queue::{Chain, QueueError};
use crate::virtio::worker::{QueueContext, WorkerContext};

/// For packets to the guest, and from it; the third is for events.
pub(super) const RECEIVE: u16 = 0;
pub(super) const TRANSMIT: u16 = 1;

/// Packets that one queue moves before it is the next one's turn.
const BURST: u32 = 64;

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (§ 5.10.6.6): all connections are gone, and the context ID may be another one.
const TRANSPORT_RESET: [u8; 4] = [0; 4];

/// Most bytes of the lists for queues of this size.
pub(super) const fn memory_bound(size: u16) -> usize {
    Chain::memory_bound(size)
}

/// What device and worker know of each other.
pub(super) struct Shared {
    cid: AtomicU32,
    /// [`Muxer::last_port`], while the worker has stopped.
    last_port: AtomicU32,
    /// The driver has not heard that it was restored, without the connections that it has.
    transport_reset: AtomicBool,
}

impl Shared {
    pub(super) fn new(cid: u32) -> Self {
        Self {
            cid: AtomicU32::new(cid),
            last_port: AtomicU32::new(0),
            transport_reset: AtomicBool::new(false),
        }
    }

    pub(super) fn cid(&self) -> u32 {
        self.cid.load(Ordering::Relaxed)
    }

    pub(super) fn last_port(&self) -> u32 {
        self.last_port.load(Ordering::Acquire)
    }

    pub(super) fn restore(&self, cid: u32, last_port: u32) {
        self.cid.store(cid, Ordering::Relaxed);
        self.last_port.store(last_port, Ordering::Release);
        self.transport_reset.store(true, Ordering::Release);
    }
}

/// Serves the queues from a start of the device to its stop.
pub(super) fn serve<'m>(
    muxer: &mut Muxer,
    shared: &Shared,
    worker: &'m WorkerContext,
    queues: &mut [QueueContext<'m>],
) -> Result<(), QueueError> {
    if !worker.resumed {
        shared.transport_reset.store(false, Ordering::Release);
    }
    muxer.start(shared.cid().into(), worker.resumed);
    muxer.last_port = shared.last_port();
    if shared.transport_reset.load(Ordering::Acquire) {
        muxer.hold();
    }
    let mut taken = None;
    let mut chain = Chain::default();
    let served = worker.run(queues, |queue| match queue.index() {
        RECEIVE => receive(muxer, &mut chain, queue),
        TRANSMIT => transmit(muxer, &mut chain, queue),
        _ => tell_events(muxer, shared, &mut taken, &mut chain, queue),
    });
    for queue in queues.iter_mut().filter(|queue| queue.index() > TRANSMIT) {
        (0..taken.unwrap_or(0)).for_each(|_| queue.put_back());
    }
    shared.last_port.store(muxer.last_port, Ordering::Release);
    if worker.is_cancelled() || served.is_err() {
        muxer.close_all();
    }
    served
}

/// Takes a request; `None` if there is none and the driver tells of the next one.
fn pop<'m>(chain: &mut Chain<'m>, queue: &mut QueueContext<'m>) -> Result<bool, QueueError> {
    loop {
        if queue.pop(chain)? {
            return Ok(true);
        }
        queue.report()?;
        if queue.ask_for_notification()? || queue.worker.must_stop() {
            return Ok(false);
        }
    }
}

/// From the host to the guest.
fn receive<'m>(
    muxer: &mut Muxer,
    chain: &mut Chain<'m>,
    queue: &mut QueueContext<'m>,
) -> Result<bool, QueueError> {
    let has_more = !muxer.is_held() && muxer.poll().map_err(QueueError::Host)?;
    for _ in 0..BURST {
        if !muxer.has_packet() {
            queue.report()?;
            return Ok(!has_more);
        }
        if !pop(chain, queue)? {
            return Ok(!has_more);
        }
        if chain.writable.len() < HEADER_LEN as u64 {
            let why = "a receive buffer without room for a header";
            return Err(QueueError::Unanswerable(why));
        }
        match muxer.send(&chain.writable) {
            Some(written) => queue.complete(chain.head(), written)?,
            None => queue.put_back(),
        }
    }
    queue.report()?;
    Ok(false)
}

/// From the guest to the host.
fn transmit<'m>(
    muxer: &mut Muxer,
    chain: &mut Chain<'m>,
    queue: &mut QueueContext<'m>,
) -> Result<bool, QueueError> {
    for count in 0..BURST {
        if muxer.is_full() || !pop(chain, queue)? {
            queue.report()?;
            // What it led to is the other queue's.
            return Ok(count == 0);
        }
        let mut header = [0; HEADER_LEN];
        // What is too short for a header belongs to nothing.
        if chain.readable.read_front(&mut header) {
            muxer.receive(&Header::parse(&header), &chain.readable);
        }
        queue.complete(chain.head(), 0)?;
    }
    queue.report()?;
    Ok(false)
}

/// Tells the driver that it was restored. Then all of its buffers are `taken`, so that another one says that it has handled the event.
fn tell_events<'m>(
    muxer: &mut Muxer,
    shared: &Shared,
    taken: &mut Option<u16>,
    chain: &mut Chain<'m>,
    queue: &mut QueueContext<'m>,
) -> Result<bool, QueueError> {
    if shared.transport_reset.load(Ordering::Acquire) && pop(chain, queue)? {
        let (head, written) = (chain.head(), chain.writable.write_front(&TRANSPORT_RESET));
        let mut others = 0;
        while others < queue.size() && pop(chain, queue)? {
            others += 1;
        }
        *taken = Some(others);
        queue.complete(head, written as u32)?;
        queue.report()?;
        shared.transport_reset.store(false, Ordering::Release);
    }
    if let Some(taken) = taken
        && muxer.is_held()
        && pop(chain, queue)?
    {
        *taken += 1;
        muxer.release();
        return Ok(false);
    }
    Ok(true)
}
