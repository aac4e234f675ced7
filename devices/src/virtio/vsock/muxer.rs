//! The connections of a guest, each with a stream of the host.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::connection::{BUFFER_SIZE, Connection, Next};
use super::packet::{HEADER_LEN, HOST_CID, Header, NO_PORT, Ports, STREAM, op};
use crate::virtio::queue::Buffers;
use crate::virtio::vectored::Iovecs;

/// Most connections at a time, half-open ones included: half of what a process may usually have of open files.
pub(super) const MAX_CONNECTIONS: usize = 512;

/// Most of them that a program of the host has begun and the guest has not accepted.
pub(super) const MAX_HALF_OPEN: usize = 64;

/// Resets that may wait for the guest's buffers before no more of its packets are looked at.
const MAX_RESETS: usize = 256;

/// The first of the ports that programs of the host have, as in Firecracker.
const FIRST_PORT: u32 = 1 << 30;

/// What epoll(7) says of the listener, the timer and the reserved connection: no connection has such ports.
const LISTENER: Ports = Ports {
    host: 0,
    guest: NO_PORT,
};
const TIMER: Ports = Ports {
    host: 1,
    guest: NO_PORT,
};
const RESERVED: Ports = Ports {
    host: 2,
    guest: NO_PORT,
};

/// How often deadlines are looked at, while there are some.
const TICK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 250_000_000,
};

/// How long a driver may take to give up its connections after a restore before new ones begin all the same. Connects of Linux wait
/// for 2 s.
const HOLD_LIMIT: Timespec = Timespec {
    tv_sec: 1,
    tv_nsec: 0,
};

/// Most bytes of all connections, and of what waits for the guest. A list grows to twice of what it needs.
pub(super) const MEMORY_BOUND: usize = MAX_CONNECTIONS
    * (2 * BUFFER_SIZE + 4 * size_of::<Connection>())
    + 2 * (MAX_RESETS + 2 * MAX_CONNECTIONS) * size_of::<Header>()
    + Iovecs::MEMORY_BOUND;

/// Connects to what listens at a port of the host, without waiting for it; the stream does not block.
pub type Connect = Box<dyn FnMut(u32) -> io::Result<UnixStream> + Send>;

/// What a guest reaches on the host, and what reaches the guest.
pub struct HostSide {
    /// Where programs of the host connect to. Must not block.
    pub listener: UnixListener,
    /// Where the guest's connections go; without it, it can make none.
    pub connect: Option<Connect>,
    /// A connection whose other end this process has: it is accepted when something comes on it. Must not block.
    pub reserved: Option<UnixStream>,
}

pub(super) struct Muxer {
    host: Option<HostSide>,
    epoll: Epoll,
    timer: OwnedFd,
    is_ticking: bool,
    cid: u64,
    connections: HashMap<Ports, Connection>,
    /// Those that may have something for the guest, in turn.
    ready: VecDeque<Ports>,
    resets: VecDeque<Header>,
    /// The port of the host that was taken last, if it is not below [`FIRST_PORT`]. The next are behind it.
    pub(super) last_port: u32,
    /// Room for a packet's, so that none is made for each.
    iovecs: Iovecs,
    /// Programs of the host may wait to be accepted.
    may_accept: bool,
    /// See [`Muxer::hold`].
    held_until: Option<Instant>,
}

impl Muxer {
    pub(super) fn new(host: Option<HostSide>) -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let muxer = Self {
            host,
            epoll: Epoll::new()?,
            timer: timerfd_create(TimerfdClockId::Monotonic, flags)?,
            is_ticking: false,
            cid: 0,
            connections: HashMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            last_port: 0,
            iovecs: Iovecs::default(),
            may_accept: false,
            held_until: None,
        };
        muxer.watch(&muxer.timer, ControlOperation::Add, TIMER)?;
        if let Some(host) = &muxer.host {
            muxer.watch(&host.listener, ControlOperation::Add, LISTENER)?;
            if let Some(stream) = &host.reserved {
                muxer.watch(stream, ControlOperation::Add, RESERVED)?;
            }
        }
        Ok(muxer)
    }

    /// Each event is told once, so that nothing is to be done for what cannot go on now.
    fn watch(&self, file: &impl AsFd, how: ControlOperation, ports: Ports) -> io::Result<()> {
        let events =
            EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        let event = EpollEvent::new(events, ports.token());
        self.epoll.ctl(how, file.as_fd().as_raw_fd(), event)
    }

    /// Readable when there is something to [`Muxer::poll`].
    pub(super) fn fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// The guest has this context ID, and none of the connections if its driver is new.
    pub(super) fn start(&mut self, cid: u64, resumed: bool) {
        self.cid = cid;
        if !resumed {
            self.close_all();
            self.held_until = None;
        }
    }

    /// Sends nothing but resets until [`Muxer::release`], or for [`HOLD_LIMIT`]. The driver is to drop the connections of before a
    /// restore, and Linux, which looks for packets before events, drops those with them that have come since.
    pub(super) fn hold(&mut self) {
        let limit = Duration::try_from(HOLD_LIMIT).unwrap_or_default();
        self.held_until = Some(Instant::now() + limit);
        self.set_timer(HOLD_LIMIT);
    }

    pub(super) fn release(&mut self) {
        self.held_until = None;
    }

    /// Whether it is held now. What the host has is not looked at meanwhile.
    pub(super) fn is_held(&mut self) -> bool {
        let now = Instant::now();
        self.held_until = self.held_until.filter(|until| *until > now);
        self.held_until.is_some()
    }

    /// Closes all connections without a word to the guest.
    pub(super) fn close_all(&mut self) {
        self.connections = HashMap::new();
        self.ready = VecDeque::new();
        self.resets = VecDeque::new();
    }

    /// Looks what the host has for the guest. `true` says that there may be more.
    pub(super) fn poll(&mut self) -> io::Result<bool> {
        let mut events = [EpollEvent::default(); 64];
        let count = match self.epoll.wait(0, &mut events) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => return Ok(true),
            count => count?,
        };
        for event in events.iter().take(count) {
            match Ports::from_token(event.data()) {
                LISTENER => self.may_accept = true,
                TIMER => self.tick(),
                RESERVED if event.event_set().contains(EventSet::IN) => self.accept_reserved(),
                ports => {
                    let connection = self.connections.get_mut(&ports);
                    if let Some(next) = connection.map(|c| c.on_events(event.event_set())) {
                        self.follow(ports, next);
                    }
                }
            }
        }
        self.accept();
        Ok(count == events.len())
    }

    /// What a step of this connection leads to.
    fn follow(&mut self, ports: Ports, next: Next) {
        match next {
            Next::Stay => self.enqueue(ports),
            Next::Request(port) => self.request(ports, port),
            Next::Detach => self.detach(ports),
            Next::Drop => {
                if self.remove(ports).is_some_and(|c| c.is_announced) && ports.guest != NO_PORT {
                    self.resets.push_back(Header::reset_of(ports, self.cid));
                }
            }
        }
    }

    fn enqueue(&mut self, ports: Ports) {
        if let Some(connection) = self.connections.get_mut(&ports)
            && connection.has_packet()
            && !std::mem::replace(&mut connection.is_queued, true)
        {
            self.ready.push_back(ports);
        }
    }

    fn remove(&mut self, ports: Ports) -> Option<Connection> {
        let connection = self.connections.remove(&ports)?;
        if connection.is_queued {
            self.ready.retain(|other| *other != ports);
        }
        Some(connection)
    }

    /// The first that the guest has closed, of those of which the host has not taken everything. The ports of the host tell how old they are.
    fn oldest_detached(&self) -> Option<Ports> {
        let detached = self.connections.iter().filter(|(_, c)| c.is_detached());
        let first = self.last_port.wrapping_add(1);
        detached
            .map(|(ports, _)| *ports)
            .min_by_key(|ports| ports.host.wrapping_sub(first))
    }

    /// Whether there may be another one. A program of the host that never reads keeps no guest from that.
    fn has_room(&self) -> bool {
        self.connections.len() < MAX_CONNECTIONS || self.oldest_detached().is_some()
    }

    fn insert(&mut self, ports: Ports, connection: Connection, how: ControlOperation) {
        if self.connections.len() >= MAX_CONNECTIONS
            && let Some(oldest) = self.oldest_detached()
        {
            self.remove(oldest);
        }
        // It fails for lack of memory, and then the host sees that its stream is closed.
        if self.watch(connection.stream(), how, ports).is_ok() {
            self.ensure_tick(connection.deadline.is_some());
            self.connections.insert(ports, connection);
        }
    }

    /// A port of the host that no connection has, without one of the guest.
    fn free_port(&mut self) -> Ports {
        loop {
            let host = self.last_port.wrapping_add(1).max(FIRST_PORT);
            self.last_port = host;
            if self.connections.keys().all(|ports| ports.host != host) {
                let guest = NO_PORT;
                return Ports { host, guest };
            }
        }
    }

    fn accept(&mut self) {
        while self.may_accept && self.has_room() {
            let half_open = self.connections.values().filter(|c| c.is_half_open());
            let (Some(host), true) = (&self.host, half_open.count() < MAX_HALF_OPEN) else {
                return;
            };
            match accept_with(&host.listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
                Ok(stream) => {
                    let ports = self.free_port();
                    let connection = Connection::from_host(stream.into());
                    self.insert(ports, connection, ControlOperation::Add);
                }
                Err(Errno::AGAIN) => self.may_accept = false,
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(e) => {
                    // Most likely there are too many open files; it is tried again later.
                    log::debug!("a connection to the vsock device waits: {e}");
                    return self.ensure_tick(true);
                }
            }
        }
    }

    fn accept_reserved(&mut self) {
        let host = self.host.as_mut();
        if let Some(stream) = host.and_then(|host| host.reserved.take()) {
            let (ports, connection) = (self.free_port(), Connection::from_host(stream));
            self.insert(ports, connection, ControlOperation::Modify);
        }
    }

    /// A program of the host asks for a port of the guest.
    fn request(&mut self, from: Ports, guest: u32) {
        let ports = Ports { guest, ..from };
        if let Some(mut connection) = self.remove(from)
            && guest != NO_PORT
            && !self.connections.contains_key(&ports)
        {
            connection.request();
            let next = connection.advance();
            self.insert(ports, connection, ControlOperation::Modify);
            self.follow(ports, next);
        }
    }

    /// The guest has closed this connection.
    fn detach(&mut self, ports: Ports) {
        if let Some(mut connection) = self.remove(ports)
            && connection.detach()
        {
            let ports = self.free_port();
            self.insert(ports, connection, ControlOperation::Modify);
        }
    }

    /// Looks at deadlines again in a while, if there `is_reason`.
    fn ensure_tick(&mut self, is_reason: bool) {
        if is_reason && !self.is_ticking {
            self.set_timer(TICK);
        }
    }

    fn set_timer(&mut self, it_value: Timespec) {
        let spec = Itimerspec {
            it_interval: Timespec::default(),
            it_value,
        };
        let set = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &spec);
        self.is_ticking = set.is_ok();
    }

    fn tick(&mut self) {
        // What is not read is no new event: the timer is set again.
        self.is_ticking = false;
        let now = Instant::now();
        let late = |c: &Connection| c.deadline.is_some_and(|deadline| deadline <= now);
        let late = self.connections.iter().filter(|(_, c)| late(c));
        let late: Vec<Ports> = late.map(|(ports, _)| *ports).collect();
        late.into_iter()
            .for_each(|ports| self.follow(ports, Next::Drop));
        self.ensure_tick(self.connections.values().any(|c| c.deadline.is_some()));
    }

    /// Whether resets wait, and the guest is to take them before it sends more.
    pub(super) fn is_full(&self) -> bool {
        self.resets.len() >= MAX_RESETS
    }

    /// The guest has sent a packet, with this payload.
    pub(super) fn receive(&mut self, header: &Header, payload: &Buffers<'_>) {
        let ports = header.ports();
        let is_valid = header.src_cid == self.cid
            && header.dst_cid == HOST_CID
            && header.kind == STREAM
            && ports.guest != NO_PORT;
        let connection = self.connections.get_mut(&ports);
        match connection.filter(|_| is_valid) {
            Some(connection) => {
                let next = connection.on_packet(header, ports.host, payload, &mut self.iovecs);
                if next == Next::Detach && header.op != op::RST {
                    self.resets.push_back(header.reset());
                }
                self.follow(ports, next);
            }
            None if header.op == op::RST => {}
            None if header.op == op::REQUEST && is_valid => self.connect(ports, header),
            None => self.resets.push_back(header.reset()),
        }
    }

    /// The guest asks for a port of the host.
    fn connect(&mut self, ports: Ports, header: &Header) {
        let has_room = self.has_room();
        let connect = self.host.as_mut().and_then(|host| host.connect.as_mut());
        let stream = match connect {
            Some(connect) if has_room => connect(ports.host),
            _ => Err(io::ErrorKind::ConnectionRefused.into()),
        };
        match stream {
            Ok(stream) => {
                let connection = Connection::from_guest(stream, header);
                self.insert(ports, connection, ControlOperation::Add);
                self.enqueue(ports);
            }
            Err(e) => {
                log::debug!("the guest connects to port {} of the host: {e}", ports.host);
                self.resets.push_back(header.reset());
            }
        }
    }

    /// Whether there is something to send.
    pub(super) fn has_packet(&self) -> bool {
        !self.resets.is_empty() || self.held_until.is_none() && !self.ready.is_empty()
    }

    /// Puts the next packet into these buffers, which have room for a header; `None` if there is none after all.
    pub(super) fn send(&mut self, buffers: &Buffers<'_>) -> Option<u32> {
        if let Some(header) = self.resets.pop_front() {
            return Some(buffers.write_front(&header.bytes()) as u32);
        }
        while let Some(ports) = self.ready.pop_front() {
            let Some(connection) = self.connections.get_mut(&ports) else {
                continue;
            };
            connection.is_queued = false;
            let Some((op, flags, len)) = connection.next_packet(buffers, &mut self.iovecs) else {
                continue;
            };
            let header = Header {
                len: len as u32,
                op,
                flags,
                buf_alloc: BUFFER_SIZE as u32,
                fwd_cnt: connection.forwarded(),
                ..Header::reset_of(ports, self.cid)
            };
            let has_deadline = connection.deadline.is_some();
            self.ensure_tick(has_deadline);
            self.enqueue(ports);
            buffers.write_front(&header.bytes());
            return Some((HEADER_LEN + len) as u32);
        }
        None
    }
}
