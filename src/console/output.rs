//! Output of the guest: a bounded buffer that the vCPU thread fills and a thread of its own reads and drains.
//!
//! The vCPU thread only copies: it neither blocks nor scans. While the buffer is full, a UART's transmitter is busy, a virtio
//! console leaves buffers in its queue, and the guest waits. When half of the buffer is free again, the device is notified.
//!
//! Locks: `observer` comes before `state`; `ready` is never held together with another. The device's lock is held by callers of [`Sink`], so
//! the callback in `ready`, which takes that lock, is called with none held.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use minivmm_devices::chardev::{ConsoleOutput, MIN_ROOM};
use minivmm_devices::thread::{STACK_SIZE, ThreadKind, ThreadStarter};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use vmm_sys_util::eventfd::EventFd;

use super::destination::{Destination, Written, write_some};
use super::pty;

/// Capacity of the buffer in bytes.
pub(super) const CAPACITY: usize = 1 << 20;
/// Arrival times that are kept; what comes later counts as having come with the last of them.
const MAX_ARRIVALS: usize = 4096;
/// Most bytes of memory that the output of all consoles takes: the thread's stack; buffer and arrival times, each beside what it
/// was before it last grew; and what is being written.
pub const OUTPUT_MEMORY_BOUND: usize =
    STACK_SIZE + 2 * (CAPACITY + MAX_ARRIVALS * size_of::<(Instant, usize)>()) + 8 * CHUNK;
/// After the buffer was full, the device is notified when no more than this is pending.
const LOW_WATER: usize = CAPACITY / 2;
/// Bytes per write(2): what a pipe that is ready for writing always takes (PIPE_BUF).
const CHUNK: usize = 4096;
/// How long to wait for the rest of a line, so that a line takes one write(2) and not one per byte.
const LINGER: Duration = Duration::from_micros(500);
/// Bytes that came within this time of each other may count as having come at once.
const SAME_TIME: Duration = Duration::from_micros(10);
/// How long [`Shared::finish`] waits between two looks at whether to give up.
const FINISH_STEP: Duration = Duration::from_millis(20);
/// How long a cancelled thread may take to end. It takes longer only if it is stuck in a write(2).
const CANCEL_LIMIT: Duration = Duration::from_millis(100);
/// How long, at the end, a pty's reader may read nothing: attached terminals are forgotten, readers of stdout are not.
const PTY_PATIENCE: Duration = Duration::from_secs(1);
/// How long, then, between two looks at whether it has read more.
const PTY_STEP: Duration = Duration::from_millis(2);

/// Reads the guest's output as it comes, on the console's thread.
pub trait OutputObserver: Send {
    /// Bytes that came at this time.
    fn push(&mut self, bytes: &[u8], came: Instant);
}

type Callback = Arc<dyn Fn() + Send + Sync>;

/// What the sinks, the thread and the [`super::Console`] share.
pub(super) struct Shared {
    observer: Mutex<Option<Box<dyn OutputObserver>>>,
    state: Mutex<State>,
    /// The thread has something to do.
    work: Condvar,
    /// The thread has ended.
    ended: Condvar,
    ready: Mutex<Option<Callback>>,
    /// An event when nobody reads any more, where that is not to be said.
    reader_gone: OnceLock<Arc<EventFd>>,
    /// An eventfd: the thread stops waiting for its reader.
    cancel: OwnedFd,
    pty: Option<Arc<OwnedFd>>,
}

#[derive(Default)]
pub(super) struct State {
    pending: VecDeque<u8>,
    /// Bytes at the front of `pending` that the observer has.
    read: usize,
    /// Arrival times and lengths of the bytes that it does not have. Empty unless `watch_arrivals`.
    arrivals: VecDeque<(Instant, usize)>,
    watch_arrivals: bool,
    /// Bytes of this run of the VM.
    pub(super) bytes: u64,
    last: Option<u8>,
    /// The output goes to a terminal.
    on_terminal: bool,
    pub(super) dropped: u64,
    /// The thread has not ended.
    running: bool,
    /// The thread waits, for any byte or for a line's end.
    waiting: Waiting,
    /// A device found no room, or requested a notification.
    tx_blocked: bool,
    /// The thread ends when nothing is pending.
    closing: bool,
}

impl State {
    /// Ends the line that the guest has left unfinished on a terminal.
    fn end_line(&mut self) {
        if self.on_terminal && self.last.is_some_and(|byte| byte != b'\n') {
            self.pending.extend(b"\r\n");
        }
    }

    fn push(&mut self, bytes: &[u8]) {
        self.bytes += bytes.len() as u64;
        self.last = bytes.last().copied().or(self.last);
        self.pending.extend(bytes);
        if self.watch_arrivals {
            let now = Instant::now();
            let is_full = self.arrivals.len() == MAX_ARRIVALS;
            match self.arrivals.back_mut() {
                Some((at, len)) if now.duration_since(*at) < SAME_TIME || is_full => {
                    *len += bytes.len();
                }
                _ => self.arrivals.push_back((now, bytes.len())),
            }
        }
    }

    /// Copies the next bytes that the observer does not have, and says when they came.
    fn read(&mut self, bytes: &mut Vec<u8>) -> Instant {
        let mut len = CHUNK.min(self.pending.len() - self.read);
        let mut came = Instant::now();
        if let Some((at, left)) = self.arrivals.front_mut() {
            (came, len) = (*at, len.min(*left));
            *left -= len;
            if *left == 0 {
                self.arrivals.pop_front();
            }
        }
        bytes.clear();
        bytes.extend(self.pending.range(self.read..self.read + len));
        self.read += len;
        came
    }

    /// Whether the device must be notified of room.
    fn owes_tx_notify(&self) -> bool {
        self.tx_blocked && self.pending.len() <= LOW_WATER
    }

    #[cfg(test)]
    pub(super) fn is_running(&self) -> bool {
        self.running
    }
}

#[derive(Default, PartialEq)]
enum Waiting {
    #[default]
    No,
    ForByte,
    ForLine,
}

impl Shared {
    /// Starts the output. Without a destination, it is only read.
    pub(super) fn start(
        destination: Option<Destination>,
        on_terminal: bool,
        threads: &ThreadStarter,
    ) -> io::Result<Arc<Self>> {
        let shared = Arc::new(Self {
            observer: Mutex::default(),
            state: Mutex::new(State {
                running: true,
                on_terminal,
                ..State::default()
            }),
            work: Condvar::new(),
            ended: Condvar::new(),
            ready: Mutex::new(None),
            reader_gone: OnceLock::new(),
            cancel: eventfd(0, EventfdFlags::CLOEXEC)?,
            pty: match &destination {
                Some(Destination::Pty(master)) => Some(Arc::clone(master)),
                _ => None,
            },
        });
        let of_thread = shared.clone();
        threads.spawn(ThreadKind::Console, "console".to_owned(), move || {
            of_thread.run(destination);
        })?;
        Ok(shared)
    }

    /// Forgets the output of the VM before: see [`super::Console::start_of_vm`].
    pub(super) fn start_of_vm(&self, observer: Box<dyn OutputObserver>, watch_arrivals: bool) {
        let mut current = self.observer();
        *current = Some(observer);
        let mut state = self.state();
        state.end_line();
        state.read = state.pending.len();
        state.arrivals.clear();
        state.watch_arrivals = watch_arrivals;
        (state.bytes, state.last) = (0, None);
    }

    /// Gives the observer all that has come.
    pub(super) fn observe(&self) {
        let mut observer = self.observer();
        let mut piece = Vec::new();
        loop {
            let came = self.state().read(&mut piece);
            if piece.is_empty() {
                return;
            }
            if let Some(observer) = &mut *observer {
                observer.push(&piece, came);
            }
        }
    }

    fn observer(&self) -> MutexGuard<'_, Option<Box<dyn OutputObserver>>> {
        self.observer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn tell_of_lost_reader(&self, event: Arc<EventFd>) {
        // One that is set already stays.
        let _ = self.reader_gone.set(event);
    }

    pub(super) fn set_ready(&self, callback: Callback) {
        *self.ready.lock().unwrap_or_else(PoisonError::into_inner) = Some(callback);
    }

    /// Ends the output: see [`super::Console::finish`].
    pub(super) fn finish(&self, give_up: &dyn Fn() -> bool) {
        let (mut left, mut since) = (usize::MAX, Instant::now());
        self.close();
        while self.wait_for_end(FINISH_STEP) {
            let now_left = self.state().pending.len();
            if now_left != left {
                (left, since) = (now_left, Instant::now());
            }
            if give_up() || (self.pty.is_some() && since.elapsed() > PTY_PATIENCE) {
                self.cancel();
                if self.wait_for_end(CANCEL_LIMIT) {
                    log::warn!("the console's reader is stuck; leaving it");
                }
                return;
            }
        }
        self.await_pty_reader(give_up);
    }

    /// Once the master is closed, what an attached reader has not read is gone.
    fn await_pty_reader(&self, give_up: &dyn Fn() -> bool) {
        let Some(master) = &self.pty else { return };
        let (mut left, mut since) = (usize::MAX, Instant::now());
        loop {
            let now_left = pty::unread(master);
            if now_left != left {
                (left, since) = (now_left, Instant::now());
            }
            if left == 0 || since.elapsed() > PTY_PATIENCE || give_up() {
                return;
            }
            thread::sleep(PTY_STEP);
        }
    }

    /// Lets the thread end once everything is written.
    pub(super) fn close(&self) {
        let mut state = self.state();
        state.end_line();
        state.closing = true;
        drop(state);
        self.work.notify_all();
    }

    /// Lets the thread end without waiting for its reader any longer.
    pub(super) fn cancel(&self) {
        // It cannot fail but by overflow, and then the event is there already.
        let _ = rustix::io::write(&self.cancel, &1u64.to_ne_bytes());
        self.close();
    }

    /// Waits for the thread's end for so long, and returns whether it still runs.
    fn wait_for_end(&self, limit: Duration) -> bool {
        let (state, _) = self
            .ended
            .wait_timeout_while(self.state(), limit, |state| state.running)
            .unwrap_or_else(PoisonError::into_inner);
        state.running
    }

    fn run(&self, mut destination: Option<Destination>) {
        let mut chunk = Vec::with_capacity(CHUNK);
        while self.next_chunk(&mut chunk) {
            if chunk.is_empty() {
                continue;
            }
            match write_some(destination.as_ref(), &chunk, &self.cancel) {
                Written::Bytes(len) => self.consumed(len, 0),
                Written::Nobody => self.consumed(chunk.len(), chunk.len()),
                Written::NotYet => {}
                Written::Cancelled => break,
                Written::Failed(e) => {
                    let name = destination.as_ref().map_or("", Destination::name);
                    match self.reader_gone.get().filter(|_| e == Errno::PIPE) {
                        // It is refused only when the counter is full; then the event is there already.
                        Some(gone) => drop(gone.write(1)),
                        None => log::warn!(
                            "cannot write the console to {name}: {}; the guest's output is discarded from here on",
                            io::Error::from(e)
                        ),
                    }
                    destination = None;
                }
            }
        }
        let mut state = self.state();
        state.running = false;
        state.dropped += state.pending.len() as u64;
        state.pending = VecDeque::new();
        state.read = 0;
        drop(state);
        self.ended.notify_all();
        self.notify_tx_space();
    }

    /// Waits for something to do: calls the devices that wait for that, reads what has come, and copies the next piece to be
    /// written, if there is one. `false` when all is written and no more will come. How fast that is written makes no
    /// difference to the reading.
    fn next_chunk(&self, chunk: &mut Vec<u8>) -> bool {
        let idle = |state: &mut State| {
            state.pending.is_empty() && !state.closing && !state.owes_tx_notify()
        };
        let unfinished = |state: &mut State| {
            !state.closing && state.pending.len() < CHUNK && state.pending.back() != Some(&b'\n')
        };
        let mut state = self.state();
        if idle(&mut state) {
            state.waiting = Waiting::ForByte;
            state = self
                .work
                .wait_while(state, idle)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if !state.pending.is_empty() && unfinished(&mut state) {
            state.waiting = Waiting::ForLine;
            (state, _) = self
                .work
                .wait_timeout_while(state, LINGER, unfinished)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.waiting = Waiting::No;
        let owes_tx_notify = state.owes_tx_notify();
        drop(state);
        if owes_tx_notify {
            self.notify_tx_space();
        }
        self.observe();
        #[cfg(feature = "attack-port")]
        minivmm_devices::attack::turn();
        let state = self.state();
        chunk.clear();
        chunk.extend(state.pending.iter().take(CHUNK.min(state.read)));
        !(state.closing && state.pending.is_empty())
    }

    /// `len` bytes have left the buffer, and `dropped` of them went nowhere.
    fn consumed(&self, len: usize, dropped: usize) {
        let mut state = self.state();
        state.pending.drain(..len);
        state.read -= len;
        state.dropped += dropped as u64;
    }

    fn notify_tx_space(&self) {
        if std::mem::take(&mut self.state().tx_blocked) {
            let callback = self
                .ready
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone();
            if let Some(callback) = callback {
                callback();
            }
        }
    }
}

/// A device's end of the buffer.
pub(super) struct Sink(pub(super) Arc<Shared>);

impl ConsoleOutput for Sink {
    fn write(&mut self, bytes: &[u8]) -> usize {
        let mut state = self.0.state();
        if !state.running {
            state.dropped += bytes.len() as u64;
            return bytes.len();
        }
        let room = CAPACITY.saturating_sub(state.pending.len());
        let taken = bytes.get(..room).unwrap_or(bytes);
        let accepted = taken.len();
        state.push(taken);
        let wake = match state.waiting {
            Waiting::No => false,
            Waiting::ForByte => accepted > 0,
            Waiting::ForLine => state.pending.len() >= CHUNK || taken.last() == Some(&b'\n'),
        };
        if wake {
            state.waiting = Waiting::No;
        }
        drop(state);
        if wake {
            self.0.work.notify_all();
        }
        accepted
    }

    fn has_room(&self) -> bool {
        let mut state = self.0.state();
        let room = !state.running || state.pending.len() + MIN_ROOM <= CAPACITY;
        state.tx_blocked |= !room;
        room
    }

    fn call_back(&self) {
        let mut state = self.0.state();
        state.tx_blocked = true;
        let wake = std::mem::take(&mut state.waiting) != Waiting::No;
        drop(state);
        if wake {
            self.0.work.notify_all();
        }
    }
}
