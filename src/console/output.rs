//! Output of the guest: a bounded buffer that the vCPU thread fills and a thread of its own drains.
//!
//! The vCPU thread never waits here. When the buffer is full, a UART shows a busy transmitter, a virtio console leaves what
//! comes in its queue, and the guest waits; when half of it is free again, the device is told.
//!
//! Locks: `ready` and `state` are each taken alone. The device's lock is held by callers of [`Sink`], so the callback in
//! `ready`, which takes that lock, is called with neither held.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use minivmm_devices::THREAD_STACK;
use minivmm_devices::console::{ConsoleOutput, MIN_ROOM};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use vmm_sys_util::signal::block_signal;

use super::pty;
use super::transcript::Transcript;

/// Bytes that wait for the host at most.
pub(super) const CAPACITY: usize = 1 << 20;
/// After the buffer was full, the device is told when no more than this waits.
const LOW_WATER: usize = CAPACITY / 2;
/// Bytes written at once: what a pipe that is ready for writing always takes (PIPE_BUF).
const CHUNK: usize = 4096;
/// How long the rest of a line is awaited, so that a line is one write(2) and not one for each byte.
const LINGER: Duration = Duration::from_micros(500);
/// How long [`Shared::finish`] waits between two looks at whether to give up.
const FINISH_STEP: Duration = Duration::from_millis(20);
/// How long a cancelled thread may take to end. It takes longer only if it is stuck in a write(2).
const CANCEL_LIMIT: Duration = Duration::from_millis(100);
/// How long, at the end, a pty's reader may read nothing: attached terminals are forgotten, readers of stdout are not.
const PTY_PATIENCE: Duration = Duration::from_secs(1);
/// How long, then, between two looks at whether it has read more.
const PTY_STEP: Duration = Duration::from_millis(2);
/// The thread leaves these to the others, whose signalfd or handlers they are for. SIGXFSZ is its own: blocked, a file
/// that has reached the limit is an error to report like any other.
const BLOCKED: [libc::c_int; 11] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGALRM,
    libc::SIGTERM,
    libc::SIGTSTP,
    libc::SIGXFSZ,
    libc::SIGCHLD,
    libc::SIGCONT,
];

/// Where the output ends.
#[derive(Clone)]
pub(super) enum Destination {
    /// stdout or a file; the name is for messages.
    Stream(Arc<OwnedFd>, String),
    /// A pty's master: what is sent while nobody is attached is dropped.
    Pty(Arc<OwnedFd>),
}

type Callback = Arc<dyn Fn() + Send + Sync>;

/// What the sinks, the thread and the [`super::Console`] share.
pub(super) struct Shared {
    state: Mutex<State>,
    /// The thread has something to do.
    work: Condvar,
    /// The thread has ended.
    ended: Condvar,
    ready: Mutex<Option<Callback>>,
    /// An eventfd: the thread stops waiting for its reader.
    cancel: OwnedFd,
    pty: Option<Arc<OwnedFd>>,
}

#[derive(Default)]
pub(super) struct State {
    pending: VecDeque<u8>,
    /// The output goes to a terminal.
    on_terminal: bool,
    pub(super) transcript: Transcript,
    pub(super) dropped: u64,
    /// The thread has not ended: pending bytes go somewhere.
    running: bool,
    /// The thread waits, for any byte or for a line's end.
    waiting: Waiting,
    /// A device was told that there is no room.
    starved: bool,
    /// The thread ends when nothing is pending.
    closing: bool,
}

impl State {
    /// Ends the line that the guest has left unfinished on a terminal.
    pub(super) fn end_line(&mut self) {
        if self.on_terminal && self.transcript.is_mid_line() {
            self.pending.extend(b"\r\n");
        }
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
    /// Starts the output. Without a destination, it is only remembered.
    pub(super) fn start(
        destination: Option<Destination>,
        on_terminal: bool,
    ) -> io::Result<Arc<Self>> {
        let shared = Arc::new(Self {
            state: Mutex::new(State {
                running: destination.is_some(),
                on_terminal,
                ..State::default()
            }),
            work: Condvar::new(),
            ended: Condvar::new(),
            ready: Mutex::new(None),
            cancel: eventfd(0, EventfdFlags::CLOEXEC)?,
            pty: match &destination {
                Some(Destination::Pty(master)) => Some(Arc::clone(master)),
                _ => None,
            },
        });
        if let Some(destination) = destination {
            let shared = shared.clone();
            thread::Builder::new()
                .name("console".to_owned())
                .stack_size(THREAD_STACK)
                .spawn(move || shared.run(&destination))?;
        }
        Ok(shared)
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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

    fn run(&self, destination: &Destination) {
        for signal in BLOCKED {
            let _ = block_signal(signal);
        }
        let mut chunk = Vec::with_capacity(CHUNK);
        while self.next_chunk(&mut chunk) {
            match write_some(destination, &chunk, &self.cancel) {
                Written::Bytes(len) => self.consumed(len, 0),
                Written::Nobody => self.consumed(chunk.len(), chunk.len()),
                Written::Cancelled => break,
                Written::Failed(e) => {
                    let name = match destination {
                        Destination::Stream(_, name) => name,
                        Destination::Pty(_) => "the pty",
                    };
                    log::warn!(
                        "cannot write the console to {name}: {}; the guest's output is discarded from here on",
                        io::Error::from(e)
                    );
                    break;
                }
            }
        }
        let mut state = self.state();
        state.running = false;
        state.dropped += state.pending.len() as u64;
        state.pending = VecDeque::new();
        drop(state);
        self.ended.notify_all();
        self.tell_ready();
    }

    /// Waits for output and copies the next piece of it; `false` when all is written and no more will come.
    fn next_chunk(&self, chunk: &mut Vec<u8>) -> bool {
        let mut state = self.state();
        if state.pending.is_empty() && !state.closing {
            state.waiting = Waiting::ForByte;
            state = self
                .work
                .wait_while(state, |state| state.pending.is_empty() && !state.closing)
                .unwrap_or_else(PoisonError::into_inner);
        }
        let unfinished = |state: &State| {
            !state.closing && state.pending.len() < CHUNK && state.pending.back() != Some(&b'\n')
        };
        if unfinished(&state) {
            state.waiting = Waiting::ForLine;
            (state, _) = self
                .work
                .wait_timeout_while(state, LINGER, |state| unfinished(state))
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.waiting = Waiting::No;
        chunk.clear();
        chunk.extend(state.pending.iter().take(CHUNK));
        !chunk.is_empty()
    }

    /// `len` bytes have left the buffer, and `dropped` of them went nowhere.
    fn consumed(&self, len: usize, dropped: usize) {
        let mut state = self.state();
        state.pending.drain(..len);
        state.dropped += dropped as u64;
        let tell = state.starved && state.pending.len() <= LOW_WATER;
        drop(state);
        if tell {
            self.tell_ready();
        }
    }

    fn tell_ready(&self) {
        if std::mem::take(&mut self.state().starved) {
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
            // Discarded is taken, too: the guest shall not wait for a reader that is gone.
            state.transcript.push(bytes);
            state.dropped += bytes.len() as u64;
            return bytes.len();
        }
        let accepted = bytes
            .len()
            .min(CAPACITY.saturating_sub(state.pending.len()));
        let taken = &bytes[..accepted];
        state.transcript.push(taken);
        state.pending.extend(taken);
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
        state.starved |= !room;
        room
    }
}

enum Written {
    Bytes(usize),
    /// Nobody is attached to the pty.
    Nobody,
    Cancelled,
    Failed(Errno),
}

/// Writes a part of `chunk`, waiting for the reader. The file description of stdout is shared with the shell, so it
/// stays as it is, blocking or not; poll makes both wait in the same place, where the wait can be cancelled.
fn write_some(destination: &Destination, chunk: &[u8], cancel: &OwnedFd) -> Written {
    let (fd, is_pty) = match destination {
        Destination::Stream(fd, _) => (fd.as_fd(), false),
        Destination::Pty(fd) => (fd.as_fd(), true),
    };
    loop {
        let mut fds = [
            PollFd::new(&fd, PollFlags::OUT),
            PollFd::new(cancel, PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Err(Errno::INTR) => continue,
            Err(e) => return Written::Failed(e),
            Ok(_) => {}
        }
        let (ready, cancelled) = (fds[0].revents(), !fds[1].revents().is_empty());
        if is_pty && ready.contains(PollFlags::HUP) {
            return Written::Nobody;
        }
        if ready.is_empty() && cancelled {
            return Written::Cancelled;
        }
        match rustix::io::write(fd, chunk) {
            Ok(len) if len > 0 => return Written::Bytes(len),
            Err(Errno::INTR) => {}
            // Ready, and yet it takes nothing: cannot be for long, but must not spin either.
            Ok(_) | Err(Errno::AGAIN) if cancelled => return Written::Cancelled,
            Ok(_) | Err(Errno::AGAIN) => thread::sleep(Duration::from_millis(1)),
            Err(Errno::IO) if is_pty => return Written::Nobody,
            Err(e) => return Written::Failed(e),
        }
    }
}
