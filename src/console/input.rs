//! Input for the guest: from stdin or the pty's master into its console, as much as the guest has room for.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use minivmm_devices::chardev::{ConsoleDevice, TerminalSize};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, retry_on_intr};
use rustix::termios::tcgetwinsize;

use super::escape::{Escape, HELP, Key};
use super::frames::Credit;
use super::terminal;
use crate::guest::frames::{INPUT, RESIZE, SIGNAL, frame};
use crate::vmm::event_loop::EventLoop;

/// Bytes of read-ahead for a guest that does not read its input. A terminal is read ahead of the guest so that `Ctrl-A x` works
/// then. When this is full, the terminal is not read, and nothing is lost.
const LOOK_AHEAD: usize = 64 << 10;
/// How many SIGINTs and SIGTERMs a container's program is sent, as docker does it.
pub const MAX_FORWARDED: u32 = 2;
/// Bytes per read(2).
const CHUNK: usize = 4096;

/// What came of [`ConsoleInput::pump`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum InputOutcome {
    /// Nothing more for now: call again when the file descriptor is readable or the console kicks.
    Continue,
    /// The user asked to quit.
    Quit,
    /// There will be no more input; stop watching the file descriptor, but go on calling on kicks.
    Ended,
}

enum Source {
    None,
    Terminal(OwnedFd, Escape),
    /// A pipe, a file, a socket.
    Stream(OwnedFd),
    Pty(Arc<OwnedFd>),
}

/// The guest's input, driven by the event loop.
pub struct ConsoleInput {
    source: Source,
    /// Read and not yet taken by the guest.
    ahead: VecDeque<u8>,
    /// A break comes before that.
    break_pending: bool,
    ended: bool,
    /// What goes to the guest goes in frames; how much input may.
    framed: Option<Arc<Credit>>,
    /// Signals to end it that a container's program was sent, or would have been.
    forwarded: u32,
}

enum Read {
    Bytes(usize),
    NotReady,
    End,
}

impl ConsoleInput {
    /// For a guest without input.
    pub fn none() -> Self {
        Self::new(Source::None)
    }

    pub(super) fn stdin() -> Self {
        match io::stdin().as_fd().try_clone_to_owned() {
            Ok(fd) => Self::from_fd(fd),
            // Without a stdin there is no input.
            Err(_) => Self::none(),
        }
    }

    pub(super) fn from_fd(fd: OwnedFd) -> Self {
        if rustix::termios::isatty(&fd) {
            Self::new(Source::Terminal(fd, Escape::default()))
        } else {
            Self::new(Source::Stream(fd))
        }
    }

    pub(super) fn pty(master: Arc<OwnedFd>) -> Self {
        Self::new(Source::Pty(master))
    }

    fn new(source: Source) -> Self {
        Self {
            ended: matches!(source, Source::None),
            source,
            ahead: VecDeque::new(),
            break_pending: false,
            framed: None,
            forwarded: 0,
        }
    }

    /// Input for a container's program, in frames, of stdin if it is `interactive`, and how much it may be. Keys are the program's own.
    pub fn framed(interactive: bool) -> io::Result<(Self, Arc<Credit>)> {
        let input = if interactive {
            Self::stdin()
        } else {
            Self::none()
        };
        let credit = Arc::new(Credit::new()?);
        let mut input = Self {
            framed: Some(Arc::clone(&credit)),
            ..input
        };
        if input.ended {
            input.ahead.extend(frame(INPUT, &[]));
        }
        Ok((input, credit))
    }

    /// How much input a container's program may be sent.
    pub fn credit(&self) -> Option<&Arc<Credit>> {
        self.framed.as_ref()
    }

    /// Sends a container's program a signal with the next [`ConsoleInput::pump`], if that is what runs: else `false`, and after
    /// [`MAX_FORWARDED`] of those that are to end it, since it was told often enough.
    pub fn forward_signal(&mut self, signal: i32) -> bool {
        let ends = [libc::SIGINT, libc::SIGTERM].contains(&signal);
        self.forwarded += u32::from(ends);
        if self.framed.is_none() || self.forwarded > MAX_FORWARDED {
            return false;
        }
        self.ahead.extend(frame(SIGNAL, &[signal as u8]));
        true
    }

    /// Likewise the size of the terminal, if it has one.
    pub fn send_size(&mut self) {
        if self.framed.is_some()
            && let Ok(size) = tcgetwinsize(io::stdout())
        {
            let content = [size.ws_row.to_le_bytes(), size.ws_col.to_le_bytes()].concat();
            self.ahead.extend(frame(RESIZE, &content));
        }
    }

    /// Has `events` say `token` when it is time for [`ConsoleInput::pump`]. A regular file and /dev/null are no sources: they are
    /// always ready, and the console's kicks are enough.
    pub fn add_to<T: Copy>(&self, events: &mut EventLoop<T>, token: T) -> io::Result<()> {
        if let Some(credit) = &self.framed {
            events.add(credit.room(), true, token)?;
        }
        self.fd().map_or(Ok(()), |fd| events.add(&fd, true, token))
    }

    /// Where input comes from; none where none can come.
    pub(super) fn fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.source {
            _ if self.ended => None,
            Source::None => None,
            Source::Terminal(fd, _) | Source::Stream(fd) => Some(fd.as_fd()),
            Source::Pty(fd) => Some(fd.as_fd()),
        }
    }

    /// Moves what is there to the guest, as far as the guest has room; never blocks.
    ///
    /// To be called once at the start, when the file descriptor becomes readable, when the console kicks, and after a SIGCONT.
    pub fn pump(&mut self, console: &Mutex<impl ConsoleDevice + ?Sized>) -> InputOutcome {
        let mut buffer = [0; CHUNK];
        loop {
            self.deliver(console);
            if self.ended {
                return InputOutcome::Ended;
            }
            let room = match (&self.framed, &self.source) {
                (Some(credit), _) if self.ahead.is_empty() => credit.left(),
                (Some(_), _) => 0,
                (None, Source::Terminal(..)) => LOOK_AHEAD.saturating_sub(self.ahead.len()),
                _ if self.ahead.is_empty() => lock(console).rx_space(),
                _ => 0,
            };
            if room == 0 {
                return InputOutcome::Continue;
            }
            let buffer = buffer.get_mut(..room.min(CHUNK)).unwrap_or_default();
            match self.read(buffer) {
                Read::Bytes(len) => {
                    if self.accept(buffer.get(..len).unwrap_or_default()) == InputOutcome::Quit {
                        return InputOutcome::Quit;
                    }
                }
                Read::NotReady => return InputOutcome::Continue,
                Read::End => {
                    self.ended = true;
                    if self.framed.is_some() {
                        self.ahead.extend(frame(INPUT, &[]));
                    }
                }
            }
        }
    }

    /// The size of the terminal that the input comes from, 0 by 0 where it has none; `None` if there can be no input.
    pub fn terminal_size(&self) -> Option<TerminalSize> {
        let size = match &self.source {
            Source::None => return None,
            Source::Stream(_) => None,
            Source::Terminal(fd, _) => tcgetwinsize(fd).ok(),
            Source::Pty(master) => tcgetwinsize(master).ok(),
        };
        Some(TerminalSize {
            columns: size.map_or(0, |size| size.ws_col),
            rows: size.map_or(0, |size| size.ws_row),
        })
    }

    #[cfg(test)]
    pub(super) fn ahead_len(&self) -> usize {
        self.ahead.len()
    }

    /// Gives the guest what has been read already.
    fn deliver(&mut self, console: &Mutex<impl ConsoleDevice + ?Sized>) {
        if self.framed.as_ref().is_some_and(|credit| !credit.is_open()) {
            return;
        }
        if self.break_pending {
            self.break_pending = !lock(console).send_break();
        }
        if !self.break_pending && !self.ahead.is_empty() {
            let taken = lock(console).receive(self.ahead.make_contiguous());
            self.ahead.drain(..taken);
        }
    }

    fn accept(&mut self, bytes: &[u8]) -> InputOutcome {
        if let Some(credit) = &self.framed {
            credit.spend(bytes.len());
            self.ahead.extend(frame(INPUT, bytes));
            return InputOutcome::Continue;
        }
        let Source::Terminal(_, escape) = &mut self.source else {
            self.ahead.extend(bytes);
            return InputOutcome::Continue;
        };
        for byte in bytes {
            match escape.key(*byte) {
                Key::Guest(keys) => self.ahead.extend(keys.iter().flatten()),
                Key::Pending => {}
                // What the guest has not read goes, as at Ctrl-C: a key of that could pass for the SysRq command.
                Key::Break => {
                    self.ahead.clear();
                    self.break_pending = true;
                }
                Key::Quit => return InputOutcome::Quit,
                // Not eprint, which panics without a stderr.
                Key::Help => drop(io::stderr().write_all(HELP.as_bytes())),
            }
        }
        InputOutcome::Continue
    }

    /// Reads if there is something to read. stdin shares its file description with the shell, so it stays blocking, and
    /// is asked first.
    fn read(&self, buffer: &mut [u8]) -> Read {
        let (fd, is_pty) = match &self.source {
            Source::None => return Read::End,
            Source::Terminal(fd, _) if !terminal::ready_for_input(fd) => return Read::NotReady,
            Source::Terminal(fd, _) | Source::Stream(fd) => (fd.as_fd(), false),
            Source::Pty(fd) => (fd.as_fd(), true),
        };
        let mut fds = [PollFd::new(&fd, PollFlags::IN)];
        let at_once = Timespec::default();
        // Retry on EINTR: the epoll edge for this input has passed.
        let ready = match retry_on_intr(|| poll(&mut fds, Some(&at_once))) {
            Ok(0) => return Read::NotReady,
            Ok(_) => fds[0].revents(),
            Err(e) => return end_of_input(e),
        };
        if is_pty && !ready.contains(PollFlags::IN) {
            // Hung up: no terminal is attached now, but one may attach later.
            return Read::NotReady;
        }
        match retry_on_intr(|| rustix::io::read(fd, &mut *buffer)) {
            Ok(0) | Err(Errno::IO) if is_pty => Read::NotReady,
            Ok(0) => Read::End,
            Ok(len) => Read::Bytes(len),
            Err(Errno::AGAIN) => Read::NotReady,
            Err(e) => end_of_input(e),
        }
    }
}

fn end_of_input(e: Errno) -> Read {
    log::warn!(
        "cannot read the console's input: {}; the guest gets no more of it",
        io::Error::from(e)
    );
    Read::End
}

fn lock<C: ?Sized>(console: &Mutex<C>) -> MutexGuard<'_, C> {
    console.lock().unwrap_or_else(PoisonError::into_inner)
}
