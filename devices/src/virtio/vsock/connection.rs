//! One connection: a stream of the host, and what the guest knows of it.
//!
//! What comes from the host is read into the guest's buffers, as much as its credit allows. What comes from the guest is
//! written at once, and what the host does not take waits in a buffer that the guest's credit bounds (§ 5.10.6.3).

use std::io;
use std::num::Wrapping;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{Shutdown, shutdown};
use vmm_sys_util::epoll::EventSet;

use super::packet::{BOTH, HEADER_LEN, Header, NO_RECEIVE, NO_SEND, op};
use super::stream::{parse_connect, read_line};
use crate::virtio::queue::{Buffers, window};
use crate::virtio::vectored::{Iovecs, append};

/// Bytes from the guest that may wait for the host. Linux sends up to 64 KiB in a packet; two of them keep it busy.
pub(super) const BUFFER_SIZE: usize = 128 << 10;

/// How long a program of the host may take for its CONNECT line, which may be typed.
pub(super) const GREETING_LIMIT: Duration = Duration::from_secs(30);

/// How long the guest may take to accept a connection.
const REQUEST_LIMIT: Duration = Duration::from_secs(10);

/// How long the guest may take to reset a connection that is closed.
const CLOSE_LIMIT: Duration = Duration::from_secs(10);

/// How far a connection has come.
#[derive(Debug, PartialEq, Eq)]
enum State {
    /// A program of the host has sent this much of its CONNECT line.
    Greeting(Vec<u8>),
    /// The guest is to accept it.
    Requested,
    Established,
    /// The guest has closed it; the host has not taken all that came before.
    Detached,
}

/// What a step of a connection leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    Stay,
    /// The host asks for a connection to this port of the guest.
    Request(u32),
    /// It ends as soon as the host has what came from the guest.
    Detach,
    /// It ends now.
    Drop,
}

pub(super) struct Connection {
    stream: UnixStream,
    state: State,
    /// Whether to read or write may succeed: the host is only asked again after epoll(7) has said so.
    is_readable: bool,
    is_writable: bool,
    /// The host sends no more.
    at_end: bool,
    /// The host takes no more.
    is_broken: bool,
    /// From the guest, for the host.
    unsent: Vec<u8>,
    /// Bytes from the guest that are no longer here, and how many of them the guest knows of.
    forwarded: Wrapping<u32>,
    told: Wrapping<u32>,
    /// Bytes to the guest, how many of them it has let go of, and how many it has room for.
    sent: Wrapping<u32>,
    peer_forwarded: Wrapping<u32>,
    peer_buffer: u32,
    /// The guest has been asked for credit since it gave some last.
    has_asked: bool,
    /// Operations to be sent, by bit.
    pending: u16,
    /// Flags of SHUTDOWN that came from the guest, and that went there.
    guest_shut: u32,
    shut: u32,
    /// The guest knows of it.
    pub(super) is_announced: bool,
    /// It waits for its turn to send to the guest.
    pub(super) is_queued: bool,
    /// When the other side must have done its part.
    pub(super) deadline: Option<Instant>,
}

impl Connection {
    fn new(stream: UnixStream, state: State) -> Self {
        Self {
            stream,
            state,
            is_readable: true,
            is_writable: true,
            at_end: false,
            is_broken: false,
            unsent: Vec::new(),
            forwarded: Wrapping(0),
            told: Wrapping(0),
            sent: Wrapping(0),
            peer_forwarded: Wrapping(0),
            peer_buffer: 0,
            has_asked: false,
            pending: 0,
            guest_shut: 0,
            shut: 0,
            is_announced: false,
            is_queued: false,
            deadline: None,
        }
    }

    /// Of a program of the host that has connected.
    pub(super) fn from_host(stream: UnixStream) -> Self {
        Self {
            deadline: Some(Instant::now() + GREETING_LIMIT),
            ..Self::new(stream, State::Greeting(Vec::new()))
        }
    }

    /// Of the guest, whose request came in `header`.
    pub(super) fn from_guest(stream: UnixStream, header: &Header) -> Self {
        let mut connection = Self {
            is_announced: true,
            pending: 1 << op::RESPONSE,
            ..Self::new(stream, State::Established)
        };
        connection.note_credit(header);
        connection
    }

    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// The host's program has asked for a port of the guest, which hears of it next.
    pub(super) fn request(&mut self) {
        self.state = State::Requested;
        self.pending = 1 << op::REQUEST;
        self.deadline = Some(Instant::now() + REQUEST_LIMIT);
    }

    /// The guest is to do without it. Whether there is something that the host has to get first.
    pub(super) fn detach(&mut self) -> bool {
        self.state = State::Detached;
        (self.pending, self.shut, self.deadline) = (0, 0, None);
        let _ = shutdown(&self.stream, Shutdown::Read);
        !self.unsent.is_empty()
    }

    /// Whether it counts as half-open.
    pub(super) fn is_half_open(&self) -> bool {
        matches!(self.state, State::Greeting(_) | State::Requested)
    }

    /// Whether only the host still has something to do for it.
    pub(super) fn is_detached(&self) -> bool {
        self.state == State::Detached
    }

    /// epoll(7) has told of it.
    pub(super) fn on_events(&mut self, events: EventSet) -> Next {
        let ends = EventSet::READ_HANG_UP | EventSet::HANG_UP | EventSet::ERROR;
        self.is_readable |= events.intersects(EventSet::IN | ends);
        self.is_writable |= events.contains(EventSet::OUT);
        if events.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            self.give_up();
        }
        self.advance()
    }

    /// Does what the host allows.
    pub(super) fn advance(&mut self) -> Next {
        match &mut self.state {
            State::Greeting(line) => match read_line(&self.stream, line) {
                Ok(true) => parse_connect(line).map_or(Next::Drop, Next::Request),
                Ok(false) => {
                    self.is_readable = false;
                    Next::Stay
                }
                Err(_) => Next::Drop,
            },
            State::Requested if self.is_broken => Next::Drop,
            State::Requested => Next::Stay,
            State::Established | State::Detached => {
                self.flush();
                match self.state {
                    State::Detached if self.unsent.is_empty() => Next::Drop,
                    _ => Next::Stay,
                }
            }
        }
    }

    /// A packet of the guest, with this payload. [`Next::Drop`] says that it breaks a rule.
    pub(super) fn on_packet(
        &mut self,
        header: &Header,
        host: u32,
        payload: &Buffers<'_>,
        iovecs: &mut Iovecs,
    ) -> Next {
        self.note_credit(header);
        self.is_announced = true;
        match (header.op, &self.state) {
            (op::RST, _) => return Next::Detach,
            (op::RESPONSE, State::Requested) => {
                let line = format!("OK {host}\n");
                if !matches!(rustix::io::write(&self.stream, line.as_bytes()), Ok(n) if n == line.len())
                {
                    return Next::Drop;
                }
                self.state = State::Established;
                self.deadline = None;
            }
            (op::RW, State::Established) => {
                let len = header.len as usize;
                let is_allowed = len <= BUFFER_SIZE.saturating_sub(self.unsent.len())
                    && payload.len() >= u64::from(header.len)
                    && self.guest_shut & NO_SEND == 0;
                if !is_allowed {
                    return Next::Drop;
                }
                self.forward(payload, len, iovecs);
            }
            (op::CREDIT_UPDATE, State::Established) => {}
            (op::CREDIT_REQUEST, State::Established) => self.pending |= 1 << op::CREDIT_UPDATE,
            (op::SHUTDOWN, State::Established) => {
                self.guest_shut |= header.flags & BOTH;
                if self.guest_shut == BOTH {
                    return Next::Detach;
                }
                if self.guest_shut & NO_RECEIVE != 0 {
                    let _ = shutdown(&self.stream, Shutdown::Read);
                    self.is_readable = true;
                }
                self.flush();
            }
            _ => return Next::Drop,
        }
        Next::Stay
    }

    fn note_credit(&mut self, header: &Header) {
        let before = self.credit();
        self.peer_buffer = header.buf_alloc;
        self.peer_forwarded = Wrapping(header.fwd_cnt);
        self.has_asked &= self.credit() <= before;
    }

    /// Bytes that the guest has room for: none where it says that it has let go of more than there were.
    fn credit(&self) -> u32 {
        let in_flight = (self.sent - self.peer_forwarded).0;
        self.peer_buffer.saturating_sub(in_flight)
    }

    /// Writes what there is for the host, behind what waits already.
    fn forward(&mut self, payload: &Buffers<'_>, len: usize, iovecs: &mut Iovecs) {
        let slices = payload.slices().iter().copied();
        let mut done = 0;
        if self.unsent.is_empty() && self.is_writable && !self.is_broken && len > 0 {
            match iovecs.write(&self.stream, window(slices.clone(), 0, len)) {
                Ok(written) => done = written.unwrap_or(0),
                Err(_) => self.give_up(),
            }
            self.is_writable = done == len;
        }
        if self.is_broken {
            self.forwarded += len as u32;
        } else {
            self.forwarded += done as u32;
            append(&mut self.unsent, window(slices, done, len - done));
        }
        self.tell_credit();
    }

    /// Writes what waits. Then the host learns that the guest sends no more, if that is so.
    fn flush(&mut self) {
        while !self.unsent.is_empty() && self.is_writable {
            match rustix::io::write(&self.stream, &self.unsent) {
                Ok(count) => {
                    self.forwarded += count as u32;
                    self.unsent.drain(..count);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.is_writable = false,
                Err(_) => self.give_up(),
            }
        }
        if self.unsent.is_empty() {
            // Idle connections take no memory.
            self.unsent = Vec::new();
            if self.guest_shut & NO_SEND != 0 {
                let _ = shutdown(&self.stream, Shutdown::Write);
            }
        }
        self.tell_credit();
    }

    /// The host takes no more: what was for it is gone.
    fn give_up(&mut self) {
        self.is_broken = true;
        self.forwarded += std::mem::take(&mut self.unsent).len() as u32;
    }

    /// The guest hears of room when it knows of little: it may wait for it, with any amount to send.
    fn tell_credit(&mut self) {
        let untold = (self.forwarded - self.told).0 as usize;
        let in_use = self.unsent.len() + untold;
        if untold > 0 && in_use > BUFFER_SIZE / 2 && self.state == State::Established {
            self.pending |= 1 << op::CREDIT_UPDATE;
        }
    }

    /// Whether there may be something to send to the guest.
    pub(super) fn has_packet(&self) -> bool {
        self.pending != 0 || self.can_read() || self.shutdown_due() != self.shut
    }

    fn can_read(&self) -> bool {
        self.state == State::Established
            && self.is_readable
            && !self.at_end
            && (self.credit() > 0 || !self.has_asked)
    }

    /// Flags of SHUTDOWN that the guest should know of.
    fn shutdown_due(&self) -> u32 {
        if self.state != State::Established {
            return 0;
        }
        let is_done = self.guest_shut & NO_SEND != 0 && self.unsent.is_empty();
        let no_send = if self.at_end { NO_SEND } else { 0 };
        if self.is_broken || self.at_end && is_done {
            return no_send | NO_RECEIVE;
        }
        no_send
    }

    /// The next packet for the guest: operation, flags and the length of its payload, which is in `buffers` behind the header.
    pub(super) fn next_packet(
        &mut self,
        buffers: &Buffers<'_>,
        iovecs: &mut Iovecs,
    ) -> Option<(u16, u32, usize)> {
        let mut first = [op::REQUEST, op::RESPONSE].into_iter();
        let first = first.find(|op| self.pending & 1 << op != 0);
        let mut packet = first.map(|op| (op, 0, 0));
        if packet.is_none() && self.can_read() {
            packet = match self.read(buffers, iovecs) {
                0 if self.credit() == 0 && !self.at_end => {
                    self.has_asked = true;
                    Some((op::CREDIT_REQUEST, 0, 0))
                }
                0 => None,
                len => Some((op::RW, 0, len)),
            };
        }
        let due = self.shutdown_due();
        if packet.is_none() && due != self.shut {
            self.shut = due;
            if due == BOTH {
                self.deadline = Some(Instant::now() + CLOSE_LIMIT);
            }
            packet = Some((op::SHUTDOWN, due, 0));
        }
        if packet.is_none() && self.pending & 1 << op::CREDIT_UPDATE != 0 {
            packet = Some((op::CREDIT_UPDATE, 0, 0));
        }
        let (operation, ..) = packet?;
        // Each packet tells of credit.
        self.pending &= !(1 << operation | 1 << op::CREDIT_UPDATE);
        self.told = self.forwarded;
        self.is_announced = true;
        packet
    }

    /// `fwd_cnt` of the next packet.
    pub(super) fn forwarded(&self) -> u32 {
        self.forwarded.0
    }

    /// Reads from the host what the guest has credit and `buffers` have room for.
    fn read(&mut self, buffers: &Buffers<'_>, iovecs: &mut Iovecs) -> usize {
        let slices = buffers.slices().iter().copied();
        let mut slices = window(slices, HEADER_LEN, self.credit() as usize).peekable();
        if slices.peek().is_none() {
            return 0;
        }
        let count = match iovecs.read(&self.stream, slices) {
            Ok(Some(count)) => count,
            Ok(None) => {
                self.is_readable = false;
                0
            }
            Err(e) => {
                self.at_end = true;
                if e.kind() != io::ErrorKind::UnexpectedEof {
                    self.give_up();
                }
                0
            }
        };
        self.sent += count as u32;
        count
    }
}
