//! A thread that runs the requests of one queue, so that no vCPU waits for them.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::device::{Interrupt, StopMode};
use super::queue::{Chain, QueueError, Virtqueue};
use crate::THREAD_STACK;

/// Requests that are completed before the driver hears of them, at most: it is told when the queue has run empty, and
/// in a long burst this often, so that it can go on in parallel.
const BATCH: u32 = 16;

/// A running worker. Dropping it stops it, and waits for what the host still does for it.
pub struct Worker {
    queue: u16,
    signal: Arc<Signal>,
    /// Its other end goes with the thread: that is how to wait for it no longer than so long.
    alive: Receiver<Infallible>,
    /// `None` only while it is being stopped.
    thread: Option<JoinHandle<Virtqueue>>,
}

/// How a worker is told that there is something to do.
struct Signal {
    event: EventFd,
    stop: AtomicU8,
}

/// Values of [`Signal::stop`].
const RUN: u8 = 0;
const DRAIN: u8 = 1;
const CANCEL: u8 = 2;

impl Worker {
    /// Starts a thread that works on the queue as `work` does, which returns once [`Serving::must_stop`] says so.
    /// Notifications may come through `event` too.
    pub fn start(
        name: String,
        event: EventFd,
        mut queue: Virtqueue,
        mem: GuestMemoryMmap,
        interrupt: Interrupt,
        work: impl FnOnce(&mut Serving<'_>) -> Result<(), QueueError> + Send + 'static,
    ) -> io::Result<Self> {
        let index = queue.index();
        let signal = Arc::new(Signal {
            event,
            stop: AtomicU8::new(RUN),
        });
        let signalled = Arc::clone(&signal);
        let (alive_until_drop, alive) = channel();
        let thread = thread::Builder::new()
            .name(name)
            .stack_size(THREAD_STACK)
            .spawn(move || {
                let _alive = alive_until_drop;
                let mut serving = Serving {
                    queue: &mut queue,
                    mem: &mem,
                    interrupt: &interrupt,
                    signal: &signalled,
                    unreported: 0,
                };
                if let Err(e) = work(&mut serving) {
                    interrupt.needs_reset(&e);
                }
                queue
            })?;
        Ok(Self {
            queue: index,
            signal,
            alive,
            thread: Some(thread),
        })
    }

    /// The number of its queue.
    pub fn queue(&self) -> u16 {
        self.queue
    }

    /// Has the worker look into its queue.
    pub fn notify(&self) {
        // This cannot fail, nor block before it was written 2^64 times.
        let _ = self.signal.event.write(1);
    }

    /// Stops all of a device's workers at once, so that it waits for one request and not for one of each queue. When they
    /// have ended within `wait`, it takes the queues back; the workers stay, and end, if they have not.
    pub fn stop_all(
        workers: &mut Vec<Self>,
        mode: StopMode,
        wait: Duration,
    ) -> Option<Vec<Virtqueue>> {
        workers.iter().for_each(|worker| worker.ask_to_stop(mode));
        let limit = Instant::now() + wait;
        let ended = |worker: &Self| {
            let left = limit.saturating_duration_since(Instant::now());
            worker.alive.recv_timeout(left) != Err(RecvTimeoutError::Timeout)
        };
        workers
            .iter()
            .all(ended)
            .then(|| workers.drain(..).filter_map(|mut w| w.join()).collect())
    }

    /// A worker that was told to cancel does not drain its queue any more.
    fn ask_to_stop(&self, mode: StopMode) {
        let stop = match mode {
            StopMode::Drain => DRAIN,
            StopMode::Cancel => CANCEL,
        };
        if self.signal.stop.fetch_max(stop, Ordering::AcqRel) < stop {
            self.notify();
        }
    }

    fn join(&mut self) -> Option<Virtqueue> {
        // It fails only where a panic does not end the process.
        self.thread.take()?.join().ok()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.ask_to_stop(StopMode::Cancel);
        self.join();
    }
}

/// A worker's queue, on the worker's thread.
pub struct Serving<'m> {
    queue: &'m mut Virtqueue,
    /// Guest RAM.
    pub mem: &'m GuestMemoryMmap,
    interrupt: &'m Interrupt,
    signal: &'m Signal,
    /// Completed requests of which the driver has not heard.
    unreported: u32,
}

impl<'m> Serving<'m> {
    /// Looks into the queue at once, and then whenever there is a notification, and handles one request after the other
    /// until the worker must stop. `handle` does what a chain asks for and returns how many bytes of its writable part were
    /// written; its error is for a request that cannot be answered, and stops the device.
    pub fn run(
        &mut self,
        mut handle: impl FnMut(&mut Chain<'m>) -> Result<u32, QueueError>,
    ) -> Result<(), QueueError> {
        let mut chain = Chain::default();
        while !self.must_stop() {
            while self.pop(&mut chain)? {
                let written = handle(&mut chain)?;
                self.complete(chain.head(), written)?;
            }
            self.report()?;
            if self.ask_for_notification()? {
                self.wait();
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
        self.cancelled()()
    }

    /// The same for whoever carries out a request.
    pub fn cancelled(&self) -> impl Fn() -> bool + use<'m> {
        let (signal, interrupt) = (self.signal, self.interrupt);
        move || signal.stop.load(Ordering::Acquire) == CANCEL || interrupt.is_reset_needed()
    }

    /// Entries of the queue: more requests than that cannot be in flight.
    pub fn queue_size(&self) -> u16 {
        self.queue.size()
    }

    /// Takes the next request; `false` if there is none or the worker must stop. There are no notifications while requests
    /// are being taken.
    pub fn pop(&mut self, chain: &mut Chain<'m>) -> Result<bool, QueueError> {
        if self.must_stop() {
            return Ok(false);
        }
        self.queue.disable_notifications(self.mem)?;
        self.queue.pop(self.mem, chain)
    }

    /// Gives a request back. The driver hears of it now and then by itself, and for certain by `report`.
    pub fn complete(&mut self, head: u16, written: u32) -> Result<(), QueueError> {
        self.queue.complete(self.mem, head, written)?;
        self.unreported += 1;
        if self.unreported == BATCH {
            return self.report();
        }
        Ok(())
    }

    /// Tells the driver of what was completed, if it wants to know.
    pub fn report(&mut self) -> Result<(), QueueError> {
        if self.unreported > 0 {
            self.unreported = 0;
            if self.queue.needs_interrupt(self.mem)? {
                self.interrupt.used_buffers(self.queue.index());
            }
        }
        Ok(())
    }

    /// Asks for a notification of the next request; `false` if one is there already, of which none tells.
    pub fn ask_for_notification(&mut self) -> Result<bool, QueueError> {
        Ok(!self.queue.enable_notifications(self.mem)?)
    }

    /// Waits for a notification, or until the worker must stop. One that came since the last is not lost.
    pub fn wait(&self) {
        // A signal that breaks the wait off is a notification of nothing.
        let _ = self.signal.event.read();
    }

    /// The eventfd of the notifications, for another way to wait for them.
    pub fn event(&self) -> &'m EventFd {
        &self.signal.event
    }
}
