//! What a network device's worker does with its queues.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicU16, Ordering};

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_OK,
};
use vm_memory::VolatileSlice;
use vmm_sys_util::epoll::EventSet;

use super::link::{HEADER_LEN, Link, MAX_FRAME, NUM_BUFFERS, Sent, is_gone, note};
use crate::virtio::queue::{Chain, QueueError};
use crate::virtio::vectored::MAX_IOVECS;
use crate::virtio::worker::{QueueContext, WorkerContext};

/// Frames that one queue moves before it is the other's turn.
const BURST: u32 = 64;

/// Pieces of a chain that is kept to be used again.
const FEW_PIECES: usize = 16;

/// Most bytes of the lists for so many pairs of queues of this size, and a control queue behind more than one.
pub(super) const fn memory_bound(pairs: u16, size: u16) -> usize {
    // Chains with few pieces each; those that end with MAX_IOVECS pieces in all; and the transmitter's.
    let few = size as usize * 2 * FEW_PIECES * size_of::<VolatileSlice<'_>>();
    let chains = 3 * pairs as usize + (pairs > 1) as usize;
    pairs as usize * few + chains * Chain::memory_bound(size)
}

/// Serves the queues from a start of the device to its stop. `mtu` is that of the link; of `most` pairs of queues, the driver uses `in_use`.
pub(super) fn serve<'m>(
    link: &mut Link,
    mtu: Option<u16>,
    most: u16,
    in_use: &AtomicU16,
    worker: &'m WorkerContext,
    queues: &mut [QueueContext<'m>],
) -> Result<(), QueueError> {
    if link.status().is_up() {
        match link.set_offloads(worker.features) {
            // The commands of the driver are answered all the same: it may wait for them without end.
            Err(e) if is_gone(&e) => on_error(link, &e, worker),
            set => {
                set.map_err(QueueError::Host)?;
                note(&link.status().first_up);
            }
        }
    }
    // § 5.1.2: for a driver that knows one pair only, it is behind that.
    let control = match worker.features & 1 << VIRTIO_NET_F_MQ {
        0 => 2,
        _ => 2 * most,
    };
    let pairs = 0..usize::from(most);
    let receiver = |pair| Receiver::new(worker.features, mtu, pair);
    let mut receivers: Vec<_> = pairs.clone().map(receiver).collect();
    let mut transmitters: Vec<_> = pairs.map(Transmitter::new).collect();
    let mut command = Chain::default();
    let served = worker.run(queues, |queue| {
        let pair = usize::from(queue.index() / 2);
        let used = in_use.load(Ordering::Relaxed);
        if queue.index() == control {
            let done = queue.handle_all(&mut command, |command| obey(command, most, in_use))?;
            // A queue of a new pair may have been notified before.
            return Ok(done && used == in_use.load(Ordering::Relaxed));
        }
        match (receivers.get_mut(pair), transmitters.get_mut(pair)) {
            (Some(receiver), _) if queue.index() % 2 == 0 => {
                receiver.turn(link, queue, used.into())
            }
            (_, Some(transmitter)) => transmitter.turn(link, queue),
            _ => Ok(true),
        }
    });
    for queue in queues.iter_mut().filter(|queue| queue.index() % 2 == 0) {
        if let Some(receiver) = receivers.get_mut(usize::from(queue.index() / 2)) {
            receiver.give_back(link, queue);
        }
    }
    served
}

/// Does what a command of the control queue asks for (§ 5.1.6.5), if it is the number of pairs of queues that the driver uses.
fn obey(command: &mut Chain<'_>, most: u16, in_use: &AtomicU16) -> Result<u32, QueueError> {
    let mut bytes = [0; 4];
    let is_whole = command.readable.len() == 4 && command.readable.read_front(&mut bytes);
    let [class, number, low, high] = bytes;
    let pairs = u16::from_le_bytes([low, high]);
    let kind = (u32::from(class), u32::from(number));
    let is_known = is_whole && kind == (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET);
    if command.writable.is_empty() {
        let why = "a command without room for an answer";
        return Err(QueueError::Unanswerable(why));
    }
    let mut answer = VIRTIO_NET_ERR;
    if is_known && (1..=most).contains(&pairs) {
        in_use.store(pairs, Ordering::Relaxed);
        answer = VIRTIO_NET_OK;
    }
    command.writable.write_front(&[answer as u8]);
    Ok(1)
}

/// The other end of the link is gone; the driver learns of it.
fn on_error(link: &Link, error: &io::Error, worker: &WorkerContext) {
    if link.went_down(error) {
        worker.config_changed();
    }
}

/// How far a turn has come.
enum Step {
    /// There may be more to do.
    Going,
    /// The link has nothing.
    Idle,
    /// The driver must give more buffers first.
    NoBuffers,
}

fn pieces(chain: &Chain<'_>) -> usize {
    chain.readable.slices().len() + chain.writable.slices().len()
}

/// From the link to a receive queue. The link spreads its frames over all of its queues, so a pair that the driver uses also gets what
/// comes in those of pairs that it does not use.
struct Receiver<'m> {
    /// Number of its pair.
    pair: usize,
    /// Which of its queues of the link is read now, modulo their number.
    source: usize,
    /// Taken from the queue, and not used yet. Frames need many of them, and only when a frame has come does one know how many.
    taken: VecDeque<Chain<'m>>,
    spare: Vec<Chain<'m>>,
    is_mergeable: bool,
    /// Longest frame that a packet device may have for this driver.
    longest: usize,
    /// Bytes of a frame that has come in part.
    done: usize,
    used: Vec<(u16, u32)>,
}

impl<'m> Receiver<'m> {
    fn new(features: u64, mtu: Option<u16>, pair: usize) -> Self {
        let segments = 1 << VIRTIO_NET_F_GUEST_TSO4 | 1 << VIRTIO_NET_F_GUEST_TSO6;
        let longest = match mtu {
            // Behind an Ethernet header with a VLAN tag.
            Some(mtu) if features & segments == 0 => usize::from(mtu) + 18,
            _ => MAX_FRAME,
        };
        Self {
            pair,
            source: 0,
            taken: VecDeque::new(),
            spare: Vec::new(),
            is_mergeable: features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0,
            longest,
            done: 0,
            used: Vec::new(),
        }
    }

    fn turn(
        &mut self,
        link: &mut Link,
        queue: &mut QueueContext<'m>,
        used: usize,
    ) -> Result<bool, QueueError> {
        let own = (self.pair..link.queues()).step_by(used);
        if self.pair >= used || own.len() == 0 {
            return Ok(true);
        }
        let mut idle = 0;
        for _ in 0..BURST {
            let source = self.pair + self.source % own.len() * used;
            match self.receive(link, source, queue)? {
                Step::Going => idle = 0,
                Step::Idle => {
                    self.source += 1;
                    idle += 1;
                    if idle == own.len() {
                        queue.report()?;
                        return Ok(true);
                    }
                }
                Step::NoBuffers => {
                    queue.report()?;
                    if queue.ask_for_notification()? || queue.worker.must_stop() {
                        return Ok(true);
                    }
                }
            }
        }
        self.source += 1;
        queue.report()?;
        Ok(false)
    }

    fn receive(
        &mut self,
        link: &mut Link,
        source: usize,
        queue: &mut QueueContext<'m>,
    ) -> Result<Step, QueueError> {
        let frame = match link.frame_len(self.longest) {
            Ok(Some(len)) => len,
            Ok(None) => return Ok(Step::Idle),
            Err(e) => {
                on_error(link, &e, queue.worker);
                return Ok(Step::Idle);
            }
        };
        let needed = HEADER_LEN + frame;
        if !self.take_buffers(queue, needed)? {
            return Ok(Step::NoBuffers);
        }
        if link.knows_length() && self.room() < needed as u64 {
            link.skip_frame(0);
            return Ok(Step::Going);
        }
        let chains = if self.is_mergeable { usize::MAX } else { 1 };
        let slices = self.taken.iter().take(chains);
        let slices = slices.flat_map(|chain| chain.writable.slices().iter().copied());
        match link.receive(source, slices, self.done) {
            Ok(None) => Ok(Step::Idle),
            Err(e) => {
                on_error(link, &e, queue.worker);
                Ok(Step::Idle)
            }
            Ok(Some(0)) => Ok(Step::Going),
            Ok(Some(done)) if !link.is_whole(frame, done) => {
                self.done = done;
                Ok(Step::Going)
            }
            Ok(Some(len)) => {
                self.done = 0;
                self.deliver(HEADER_LEN + len, link.knows_length(), queue)?;
                note(&link.status().first_received);
                Ok(Step::Going)
            }
        }
    }

    /// Bytes that a frame and its header may have.
    fn room(&self) -> u64 {
        let chains = if self.is_mergeable { usize::MAX } else { 1 };
        let chains = self.taken.iter().take(chains);
        chains.map(|chain| chain.writable.len()).sum()
    }

    /// Takes buffers from the queue, enough for so many bytes if there are; `false` if the driver has to give more.
    fn take_buffers(
        &mut self,
        queue: &mut QueueContext<'m>,
        needed: usize,
    ) -> Result<bool, QueueError> {
        let size = usize::from(queue.size());
        while self.room() < needed as u64
            && (self.is_mergeable || self.taken.is_empty())
            && self.taken.len() < size
            && self.taken.iter().map(pieces).sum::<usize>() < MAX_IOVECS
        {
            let mut chain = self.spare.pop().unwrap_or_default();
            if !queue.pop(&mut chain)? {
                self.spare.push(chain);
                // A driver that has given as much as that is not going to give more for this frame.
                return Ok(self.taken.len() >= (size / 2).max(1));
            }
            let least = if self.taken.is_empty() { HEADER_LEN } else { 1 };
            if chain.writable.len() < least as u64 {
                let why = "a receive buffer without room";
                return Err(QueueError::Unanswerable(why));
            }
            self.taken.push_back(chain);
        }
        Ok(true)
    }

    /// Gives the driver a frame that is in the buffers: so many bytes, header and all. The header is the packet device's, or
    /// to be made: nothing is offloaded.
    fn deliver(
        &mut self,
        len: usize,
        make_header: bool,
        queue: &mut QueueContext<'m>,
    ) -> Result<(), QueueError> {
        let mut left = len as u64;
        self.used.clear();
        for chain in &self.taken {
            if left == 0 {
                break;
            }
            let count = left.min(chain.writable.len());
            self.used.push((chain.head(), count as u32));
            left -= count;
        }
        let num_buffers = (self.used.len() as u16).to_le_bytes();
        if let Some(first) = self.taken.front() {
            if make_header {
                first.writable.write_front(&[0; HEADER_LEN]);
            }
            first.writable.write_at(NUM_BUFFERS, &num_buffers);
        }
        let used = self.taken.drain(..self.used.len());
        self.spare
            .extend(used.filter(|chain| pieces(chain) <= FEW_PIECES));
        queue.complete_together(&self.used)
    }

    /// The device stops: what was not used is the queue's again.
    fn give_back(&mut self, link: &mut Link, queue: &mut QueueContext<'m>) {
        if self.done > 0 {
            link.skip_frame(self.done);
        }
        for _ in self.taken.drain(..) {
            queue.put_back();
        }
    }
}

/// From a transmit queue to the link's queue of the same number.
struct Transmitter<'m> {
    pair: usize,
    chain: Chain<'m>,
    /// The link has no room, and wakes the worker when it has.
    is_blocked: bool,
}

impl<'m> Transmitter<'m> {
    fn new(pair: usize) -> Self {
        Self {
            pair,
            chain: Chain::default(),
            is_blocked: false,
        }
    }

    fn turn(&mut self, link: &mut Link, queue: &mut QueueContext<'m>) -> Result<bool, QueueError> {
        for _ in 0..BURST {
            if !link.flush().unwrap_or_else(|e| {
                on_error(link, &e, queue.worker);
                true
            }) {
                return self.wait_for_room(link, queue);
            }
            if !queue.pop(&mut self.chain)? {
                queue.report()?;
                if queue.ask_for_notification()? || queue.worker.must_stop() {
                    return Ok(true);
                }
                continue;
            }
            match link.send(self.pair, &self.chain.readable) {
                Ok(Sent::Blocked) => {
                    queue.put_back();
                    return self.wait_for_room(link, queue);
                }
                Ok(Sent::Done) => {}
                Err(e) => on_error(link, &e, queue.worker),
            }
            queue.complete(self.chain.head(), 0)?;
            if std::mem::take(&mut self.is_blocked) {
                self.watch(link, queue, EventSet::IN)?;
            }
        }
        queue.report()?;
        Ok(false)
    }

    fn wait_for_room(
        &mut self,
        link: &Link,
        queue: &mut QueueContext<'m>,
    ) -> Result<bool, QueueError> {
        queue.report()?;
        if !std::mem::replace(&mut self.is_blocked, true) {
            self.watch(link, queue, EventSet::IN | EventSet::OUT)?;
        }
        Ok(true)
    }

    fn watch(
        &self,
        link: &Link,
        queue: &QueueContext<'m>,
        events: EventSet,
    ) -> Result<(), QueueError> {
        let fd = link.fd(self.pair).map_err(QueueError::Host)?;
        queue.worker.watch(fd, events)
    }
}
