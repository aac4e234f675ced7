//! A thread that serves queues, so that no vCPU waits for their requests.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use super::queue::{Chain, QueueError, Virtqueue};
use super::resources::{Interrupt, Resources, StopMode};
use crate::thread::{STACK_SIZE, ThreadKind, ThreadStarter};

/// Requests that are completed before the driver hears of them, at most: it is told when the queue has run empty, and
/// in a long burst this often, so that it can go on in parallel.
const BATCH: u32 = 16;

/// Most bytes of a worker beside guest RAM, without what it serves its queues with: its stack, and a few pages for the stack of
/// its signals and for its channels.
pub(super) const MEMORY_BOUND: usize = STACK_SIZE + (32 << 10);

/// A worker: its thread starts with the device, and sleeps until the device starts. Dropping it stops it, and waits for what
/// the host still does for it.
pub struct QueueWorker {
    signal: Arc<Signal>,
    /// `None` only while it is being dropped.
    runs: Option<Sender<Resources>>,
    stopped: Receiver<Vec<Virtqueue>>,
    is_running: bool,
    /// Of a worker that has stopped, while others of its device have not.
    queues: Vec<Virtqueue>,
    thread: Option<JoinHandle<()>>,
}

/// How a worker is told that there is something to do.
struct Signal {
    /// By queue. They are never read: each write is an edge.
    notifiers: Vec<(u16, EventFd)>,
    epoll: Epoll,
    stop: AtomicU8,
}

/// Values of [`Signal::stop`].
const RUN: u8 = 0;
const DRAIN: u8 = 1;
const CANCEL: u8 = 2;

impl QueueWorker {
    /// A worker for these queues. From start to stop it works as `serve` does,
    /// which returns once [`WorkerContext::must_stop`] says so. `descriptors` wake it too, each time that they become readable.
    pub fn new(
        threads: &ThreadStarter,
        kind: ThreadKind,
        name: String,
        queues: Range<u16>,
        descriptors: &[RawFd],
        mut serve: impl for<'m> FnMut(
            &'m WorkerContext,
            &mut [QueueContext<'m>],
        ) -> Result<(), QueueError>
        + Send
        + 'static,
    ) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let notifiers = queues.map(|queue| Ok((queue, EventFd::new(EFD_CLOEXEC)?)));
        let notifiers = notifiers.collect::<io::Result<Vec<_>>>()?;
        let events = notifiers.iter().map(|(_, event)| event.as_raw_fd());
        for fd in events.chain(descriptors.iter().copied()) {
            let edge = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
            epoll.ctl(ControlOperation::Add, fd, edge)?;
        }
        let signal = Arc::new(Signal {
            notifiers,
            epoll,
            stop: AtomicU8::new(RUN),
        });
        let (runs, to_run) = channel::<Resources>();
        let (has_stopped, stopped) = channel();
        let signalled = Arc::clone(&signal);
        let thread = threads.spawn(kind, name, move || {
            for run in to_run {
                let worker = WorkerContext {
                    mem: run.mem,
                    features: run.features,
                    resumed: run.resumed,
                    interrupt: run.interrupt,
                    signal: Arc::clone(&signalled),
                };
                let context = |queue| QueueContext {
                    queue,
                    worker: &worker,
                    unreported: 0,
                };
                let mut queues: Vec<_> = run.queues.into_iter().map(context).collect();
                if let Err(e) = serve(&worker, &mut queues) {
                    worker.interrupt.needs_reset(&e);
                }
                let queues = queues.into_iter().map(|context| context.queue).collect();
                // It fails only for a worker that is being dropped.
                let _ = has_stopped.send(queues);
            }
        })?;
        Ok(Self {
            signal,
            runs: Some(runs),
            stopped,
            is_running: false,
            queues: Vec::new(),
            thread: Some(thread),
        })
    }

    fn serves(&self, queue: u16) -> bool {
        self.signal.notifiers.iter().any(|(own, _)| *own == queue)
    }

    /// Starts those of a device's workers that have queues among its resources.
    pub fn start_all(workers: &mut [Self], mut resources: Resources) {
        let mut queues = std::mem::take(&mut resources.queues);
        for worker in workers {
            let own = queues.extract_if(.., |queue| worker.serves(queue.index()));
            let run = Resources {
                queues: own.collect(),
                mem: resources.mem.clone(),
                interrupt: resources.interrupt.clone(),
                ..resources
            };
            if !run.queues.is_empty() {
                worker.signal.stop.store(RUN, Ordering::Release);
                // It fails only where a panic of the thread does not end the process.
                worker.is_running = worker
                    .runs
                    .as_ref()
                    .is_some_and(|runs| runs.send(run).is_ok());
            }
        }
    }

    /// An eventfd to which a notification of this queue may be written at any time; a hypervisor does that without a way through
    /// the vCPU's thread.
    pub fn notifier(workers: &[Self], queue: u16) -> Option<&EventFd> {
        let mut notifiers = workers.iter().flat_map(|worker| &worker.signal.notifiers);
        let (_, event) = notifiers.find(|(index, _)| *index == queue)?;
        Some(event)
    }

    /// Has the worker of this queue look into it.
    pub fn notify(workers: &[Self], queue: u16) {
        if let Some(event) = Self::notifier(workers, queue) {
            // This cannot fail, nor block before it was written 2^64 times.
            let _ = event.write(1);
        }
    }

    /// Stops all of a device's workers at once, so that it waits for one request and not for one of each queue. When they
    /// have ended within `wait`, it takes the queues back; the workers that have not will end.
    pub fn stop_all(
        workers: &mut [Self],
        mode: StopMode,
        wait: Duration,
    ) -> Option<Vec<Virtqueue>> {
        workers.iter().for_each(|worker| worker.ask_to_stop(mode));
        let limit = Instant::now() + wait;
        for worker in workers.iter_mut().filter(|worker| worker.is_running) {
            let left = limit.saturating_duration_since(Instant::now());
            match worker.stopped.recv_timeout(left) {
                Err(RecvTimeoutError::Timeout) => return None,
                queues => worker.queues = queues.unwrap_or_default(),
            }
            worker.is_running = false;
        }
        let queues = workers.iter_mut().flat_map(|w| w.queues.drain(..));
        Some(queues.collect())
    }

    /// A worker that was told to cancel does not drain its queue any more.
    fn ask_to_stop(&self, mode: StopMode) {
        let stop = match mode {
            StopMode::Drain => DRAIN,
            StopMode::Cancel => CANCEL,
        };
        if self.is_running
            && self.signal.stop.fetch_max(stop, Ordering::AcqRel) < stop
            && let Some((_, event)) = self.signal.notifiers.first()
        {
            let _ = event.write(1);
        }
    }
}

impl Drop for QueueWorker {
    fn drop(&mut self) {
        self.ask_to_stop(StopMode::Cancel);
        self.runs = None;
        if let Some(thread) = self.thread.take() {
            // It fails only where a panic does not end the process.
            let _ = thread.join();
        }
    }
}

/// What all queues of a worker share, on the worker's thread.
pub struct WorkerContext {
    /// Guest RAM.
    pub mem: GuestMemoryMmap,
    /// The features that the driver has accepted.
    pub features: u64,
    /// See [`Resources::resumed`].
    pub resumed: bool,
    interrupt: Interrupt,
    signal: Arc<Signal>,
}

impl WorkerContext {
    /// Has each queue take its `turn` at once, and then whenever there is a notification or a further descriptor has
    /// become readable, until the worker must stop. A turn says whether it is done until then.
    pub fn run<'m>(
        &'m self,
        queues: &mut [QueueContext<'m>],
        mut turn: impl FnMut(&mut QueueContext<'m>) -> Result<bool, QueueError>,
    ) -> Result<(), QueueError> {
        while !self.must_stop() {
            #[cfg(feature = "attack-port")]
            crate::attack::turn();
            let mut all_done = true;
            for queue in &mut *queues {
                all_done &= turn(queue)?;
            }
            if all_done {
                self.wait()?;
            }
        }
        Ok(())
    }

    /// Whether the worker is to end, or the driver has broken the rules, in another queue perhaps.
    pub fn must_stop(&self) -> bool {
        self.signal.stop.load(Ordering::Acquire) != RUN || self.interrupt.is_reset_needed()
    }

    /// Whether requests in hand are to be cut short: [`StopMode::Cancel`].
    pub fn is_cancelled(&self) -> bool {
        self.signal.stop.load(Ordering::Acquire) == CANCEL || self.interrupt.is_reset_needed()
    }

    /// From now on, one of the further descriptors wakes the worker for these events alone, each time that they occur; if they
    /// have occurred already, at once.
    pub fn watch(&self, fd: RawFd, events: EventSet) -> Result<(), QueueError> {
        let event = EpollEvent::new(events | EventSet::EDGE_TRIGGERED, 0);
        let done = self.signal.epoll.ctl(ControlOperation::Modify, fd, event);
        done.map_err(QueueError::Host)
    }

    /// Tells the driver of a change in the configuration space.
    pub fn config_changed(&self) {
        self.interrupt.config_changed();
    }

    /// Waits for a notification, a further descriptor, or until the worker must stop. A notification that came since the
    /// last wait is not lost.
    pub fn wait(&self) -> Result<(), QueueError> {
        match self.signal.epoll.wait(-1, &mut [EpollEvent::default(); 8]) {
            // What breaks it off may be the kernel's work for a completion.
            Err(e) if e.kind() != io::ErrorKind::Interrupted => Err(QueueError::Host(e)),
            _ => Ok(()),
        }
    }
}

/// One of a worker's queues, on the worker's thread.
pub struct QueueContext<'m> {
    queue: Virtqueue,
    /// What it shares with the others.
    pub worker: &'m WorkerContext,
    /// Completed requests of which the driver has not heard.
    unreported: u32,
}

impl<'m> QueueContext<'m> {
    /// A turn that handles one request after the other, in `chain`. `handle` does what a chain asks for and returns how many
    /// bytes of its writable part were written; its error is for a request that cannot be answered, and stops the device.
    pub fn handle_all(
        &mut self,
        chain: &mut Chain<'m>,
        mut handle: impl FnMut(&mut Chain<'m>) -> Result<u32, QueueError>,
    ) -> Result<bool, QueueError> {
        while self.pop(chain)? {
            let written = handle(chain)?;
            self.complete(chain.head(), written)?;
        }
        self.report()?;
        self.ask_for_notification()
    }

    /// Its number.
    pub fn index(&self) -> u16 {
        self.queue.index()
    }

    /// Entries of the queue: more requests than that cannot be in flight.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Takes the next request; `false` if there is none or the worker must stop. There are no notifications while requests
    /// are being taken.
    pub fn pop(&mut self, chain: &mut Chain<'m>) -> Result<bool, QueueError> {
        if self.worker.must_stop() {
            return Ok(false);
        }
        self.queue.disable_notifications(&self.worker.mem)?;
        self.queue.pop(&self.worker.mem, chain)
    }

    /// Puts back the request that was taken last of those that are not completed: it is the next again.
    pub fn put_back(&mut self) {
        self.queue.put_back();
    }

    /// Gives a request back. The driver hears of it now and then by itself, and for certain by `report`.
    pub fn complete(&mut self, head: u16, written: u32) -> Result<(), QueueError> {
        self.complete_together(&[(head, written)])
    }

    /// The same for requests that the driver must see all at once.
    pub fn complete_together(&mut self, requests: &[(u16, u32)]) -> Result<(), QueueError> {
        self.queue.complete_together(&self.worker.mem, requests)?;
        self.unreported += requests.len() as u32;
        if self.unreported >= BATCH {
            return self.report();
        }
        Ok(())
    }

    /// Tells the driver of what was completed, if it wants to know.
    pub fn report(&mut self) -> Result<(), QueueError> {
        if self.unreported > 0 {
            self.unreported = 0;
            if self.queue.needs_interrupt(&self.worker.mem)? {
                self.worker.interrupt.used_buffers();
            }
        }
        Ok(())
    }

    /// Asks for a notification of the next request; `false` if one is there already, of which none tells.
    pub fn ask_for_notification(&mut self) -> Result<bool, QueueError> {
        Ok(!self.queue.enable_notifications(&self.worker.mem)?)
    }
}

#[cfg(test)]
mod tests;
