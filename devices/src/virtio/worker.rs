//! A thread that runs the requests of one queue, so that no vCPU waits for them.

use std::io;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use vm_memory::GuestMemoryMmap;

use super::device::Interrupt;
use super::queue::{Chain, QueueError, Virtqueue};

/// Requests that are completed before the driver hears of them, at most: it is told when the queue has run empty, and
/// in a long burst this often, so that it can go on in parallel.
const BATCH: u32 = 16;

/// What a device does with a request.
pub trait Handler: Send + 'static {
    /// Does what `chain` asks for and returns how many bytes of its writable part were written. An error is for a
    /// request that cannot be answered; it stops the device.
    fn handle(&mut self, chain: &mut Chain<'_>) -> Result<u32, QueueError>;
}

/// A running worker. Dropping it stops it.
pub struct Worker {
    queue: u16,
    stop: Arc<AtomicBool>,
    /// `None` only while it is being stopped.
    thread: Option<JoinHandle<Virtqueue>>,
}

impl Worker {
    /// Starts a thread that looks into the queue at once, and then whenever it is notified.
    pub fn start(
        name: String,
        mut queue: Virtqueue,
        mem: GuestMemoryMmap,
        interrupt: Interrupt,
        mut handler: impl Handler,
    ) -> io::Result<Self> {
        let index = queue.index();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::Builder::new().name(name).spawn(move || {
            if let Err(e) = run(&mut queue, &mem, &interrupt, &mut handler, &stopped) {
                interrupt.needs_reset(&e);
            }
            queue
        })?;
        Ok(Self {
            queue: index,
            stop,
            thread: Some(thread),
        })
    }

    /// The number of its queue.
    pub fn queue(&self) -> u16 {
        self.queue
    }

    /// Has the worker look into its queue.
    pub fn notify(&self) {
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
    }

    /// Has the worker end after the request in hand.
    pub fn ask_to_stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.notify();
    }

    /// Waits for the request in hand and takes the queue back.
    pub fn stop(mut self) -> Option<Virtqueue> {
        self.join()
    }

    fn join(&mut self) -> Option<Virtqueue> {
        self.ask_to_stop();
        let thread = self.thread.take()?;
        match thread.join() {
            Ok(queue) => Some(queue),
            // A bug, and not to be hidden.
            Err(panic) if !thread::panicking() => resume_unwind(panic),
            Err(_) => None,
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.join();
    }
}

fn run(
    queue: &mut Virtqueue,
    mem: &GuestMemoryMmap,
    interrupt: &Interrupt,
    handler: &mut impl Handler,
    stop: &AtomicBool,
) -> Result<(), QueueError> {
    let mut chain = Chain::default();
    while !stop.load(Ordering::Acquire) {
        queue.disable_notifications(mem)?;
        let mut unreported = 0;
        while !stop.load(Ordering::Acquire) && queue.pop(mem, &mut chain)? {
            let written = handler.handle(&mut chain)?;
            queue.complete(mem, chain.head(), written)?;
            unreported += 1;
            if unreported == BATCH {
                unreported = 0;
                report(queue, mem, interrupt)?;
            }
        }
        if unreported > 0 {
            report(queue, mem, interrupt)?;
        }
        if !queue.enable_notifications(mem)? && !stop.load(Ordering::Acquire) {
            // A notification that came since is not lost: `unpark` leaves a token.
            thread::park();
        }
    }
    Ok(())
}

fn report(
    queue: &mut Virtqueue,
    mem: &GuestMemoryMmap,
    interrupt: &Interrupt,
) -> Result<(), QueueError> {
    if queue.needs_interrupt(mem)? {
        interrupt.used_buffers(queue.index());
    }
    Ok(())
}
