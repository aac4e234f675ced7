//! What carries a network device's frames: a descriptor that is handed in, with one of two ways to mark where a frame ends.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
};
use vm_memory::VolatileSlice;

use crate::virtio::queue::{Buffers, window};
use crate::virtio::vectored::{Iovecs, MAX_IOVECS, append};

/// Length of `struct virtio_net_hdr_v1` (§ 5.1.6), in front of each frame.
pub(super) const HEADER_LEN: usize = 12;
/// Where `num_buffers` is in it, 16 bits.
pub(super) const NUM_BUFFERS: usize = 10;

/// What a packet device may do for both sides: partial checksums, and segments of TCP longer than the MTU.
pub const OFFLOADS: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN;

/// Longest frame in bytes: the longest IP packet behind an Ethernet header with a VLAN tag.
pub(super) const MAX_FRAME: usize = 65535 + 18;

/// Shortest frame: an Ethernet header.
const MIN_FRAME: usize = 14;

/// Frames in a row that a packet device fails to hand over before its next event is waited for: what fails each time must not keep
/// a thread busy.
pub(super) const MAX_LOST: u32 = 64;

/// Most bytes of a link: its iovecs, and a frame that was sent in part.
pub(super) const MEMORY_BOUND: usize = Iovecs::MEMORY_BOUND + (128 << 10);

/// Tells a packet device which of the features in [`OFFLOADS`] the driver has accepted.
pub type SetOffloads = fn(BorrowedFd<'_>, u64) -> io::Result<()>;

/// A link that outlives its device, for the next boot's. Only the device that runs holds the lock.
pub type SharedLink = Arc<Mutex<Link>>;

/// The way to the network. It goes up when it is made and down, for good, when its other end is gone.
pub struct Link {
    /// A packet device's queues, or a stream.
    fds: Vec<OwnedFd>,
    kind: Kind,
    status: Arc<LinkStatus>,
    /// Frames in a row that a packet device has failed to hand over.
    lost: u32,
    iovecs: Iovecs,
}

/// What is known of a link beside its device.
#[derive(Debug, Default)]
pub struct LinkStatus {
    is_up: AtomicBool,
    /// When a driver has first used it while it was up.
    pub first_up: OnceLock<Instant>,
    /// When the first frame went to the guest.
    pub first_received: OnceLock<Instant>,
    /// When the first one came from it.
    pub first_sent: OnceLock<Instant>,
}

impl LinkStatus {
    pub(super) fn is_up(&self) -> bool {
        self.is_up.load(Ordering::Acquire)
    }
}

/// Notes that this happens now, unless it has happened before.
pub(super) fn note(first: &OnceLock<Instant>) {
    first.get_or_init(Instant::now);
}

enum Kind {
    Packets(Option<SetOffloads>),
    Stream(Stream),
}

/// Where a stream stands. It outlives a reset of the device: the other end does not start its frames anew.
#[derive(Default)]
struct Stream {
    /// The next frame's length, of which so many bytes have come.
    word: [u8; 4],
    word_len: usize,
    /// Length of the frame that comes now; 0 while it is not known.
    frame: usize,
    /// Bytes to be thrown away first.
    skip: usize,
    /// What the other end has not taken of the frame that was sent last.
    unsent: Vec<u8>,
}

/// What became of a frame that was to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sent {
    /// It is gone, if only because no network can carry it.
    Done,
    /// Nothing of it is sent: there is no room.
    Blocked,
}

impl Link {
    /// A packet device by the descriptors of its queues: each read and write is one frame behind `struct virtio_net_hdr_v1`, as a TAP
    /// device has it with IFF_VNET_HDR. Without `set_offloads`, it knows neither partial checksums nor segments.
    pub fn packets(queues: Vec<OwnedFd>, set_offloads: Option<SetOffloads>) -> io::Result<Self> {
        Self::new(queues, Kind::Packets(set_offloads))
    }

    /// A stream socket: each frame follows its length, 32 bits with the most significant byte first, as passt and QEMU have it.
    pub fn stream(fd: OwnedFd) -> io::Result<Self> {
        Self::new(vec![fd], Kind::Stream(Stream::default()))
    }

    /// No network: a link that is down for good. With offloads, a driver that has agreed on them may keep them: its frames go nowhere.
    pub fn unplugged(offloads: bool) -> io::Result<Self> {
        let set: SetOffloads = |_, _| Ok(());
        let socket = UnixDatagram::unbound()?.into();
        let link = Self::packets(vec![socket], offloads.then_some(set))?;
        link.status.is_up.store(false, Ordering::Release);
        Ok(link)
    }

    fn new(fds: Vec<OwnedFd>, kind: Kind) -> io::Result<Self> {
        for fd in &fds {
            fcntl_setfl(fd, fcntl_getfl(fd)? | OFlags::NONBLOCK)?;
        }
        Ok(Self {
            fds,
            kind,
            status: Arc::new(LinkStatus {
                is_up: AtomicBool::new(true),
                ..LinkStatus::default()
            }),
            lost: 0,
            iovecs: Iovecs::default(),
        })
    }

    /// The descriptor of this queue.
    pub(super) fn fd(&self, queue: usize) -> io::Result<RawFd> {
        Ok(of_queue(&self.fds, queue)?.as_raw_fd())
    }

    /// Queues that it has.
    pub(super) fn queues(&self) -> usize {
        self.fds.len()
    }

    /// See there.
    pub fn status(&self) -> &Arc<LinkStatus> {
        &self.status
    }

    /// Features that it makes possible.
    pub(super) fn features(&self) -> u64 {
        match self.kind {
            Kind::Packets(Some(_)) => OFFLOADS,
            _ => 0,
        }
    }

    /// The driver has accepted these features.
    pub(super) fn set_offloads(&self, features: u64) -> io::Result<()> {
        match self.kind {
            Kind::Packets(Some(set)) => set(of_queue(&self.fds, 0)?.as_fd(), features),
            _ => Ok(()),
        }
    }

    /// The other end is gone. `true` if that is new.
    pub(super) fn went_down(&self, why: &io::Error) -> bool {
        let is_new = self.status.is_up.swap(false, Ordering::AcqRel);
        if is_new {
            log::warn!("a network device has lost its link: {why}");
        }
        is_new
    }

    /// The length of a stream's frame that comes now, or `longest` of a packet device; `None` if nothing has come.
    pub(super) fn frame_len(&mut self, longest: usize) -> io::Result<Option<usize>> {
        if !self.status.is_up() {
            return Ok(None);
        }
        let Kind::Stream(stream) = &mut self.kind else {
            return Ok(Some(longest));
        };
        let fd = of_queue(&self.fds, 0)?;
        let mut waste = [0; 4096];
        while stream.skip > 0 {
            let len = stream.skip.min(waste.len());
            let part = VolatileSlice::from(waste.get_mut(..len).unwrap_or_default());
            match self.iovecs.read(fd, [part].into_iter())? {
                Some(count) => stream.skip -= count,
                None => return Ok(None),
            }
        }
        while stream.frame == 0 {
            let rest = stream
                .word
                .get_mut(stream.word_len..)
                .unwrap_or_default()
                .into();
            match self.iovecs.read(fd, [rest].into_iter())? {
                Some(count) => stream.add_to_word(count)?,
                None => return Ok(None),
            }
        }
        Ok(Some(stream.frame))
    }

    /// Receives what has come of the frame, in this queue, into `buffers`, which have room for `frame` bytes behind a header, and of which `done`
    /// bytes of the frame are there already. Gives the bytes behind the header that are there now; `None` if nothing has come.
    ///
    /// A packet device's frame for which there is no room is lost, and 0; so is one that it cannot express.
    pub(super) fn receive<'m>(
        &mut self,
        queue: usize,
        buffers: impl Iterator<Item = VolatileSlice<'m>> + Clone,
        done: usize,
    ) -> io::Result<Option<usize>> {
        let fd = of_queue(&self.fds, queue)?;
        match &mut self.kind {
            Kind::Packets(_) => {
                let buffers = buffers.take(MAX_IOVECS - 1);
                let room: usize = buffers.clone().map(|slice| slice.len()).sum();
                // The kernel does not say that it has cut a frame, but fills this then.
                let mut too_much = [0];
                let slices = window(buffers, 0, room);
                let slices = slices.chain([VolatileSlice::from(&mut too_much[..])]);
                let count = match self.iovecs.read(fd, slices) {
                    Err(e) if !is_gone(&e) => {
                        log::debug!("a frame for the guest is lost: {e}");
                        self.lost = (self.lost + 1) % MAX_LOST;
                        return Ok((self.lost > 0).then_some(0));
                    }
                    count => count?,
                };
                self.lost = 0;
                Ok(count.map(|count| {
                    if count > room {
                        0
                    } else {
                        count.saturating_sub(HEADER_LEN)
                    }
                }))
            }
            Kind::Stream(stream) => {
                let left = stream.frame.saturating_sub(done);
                let slices = window(buffers, HEADER_LEN + done, left);
                // With the next frame's length.
                let slices = slices.chain([VolatileSlice::from(&mut stream.word[..])]);
                let Some(count) = self.iovecs.read(fd, slices)? else {
                    return Ok(None);
                };
                let of_frame = count.min(left);
                if of_frame == left {
                    stream.frame = 0;
                    stream.word_len = 0;
                    stream.add_to_word(count - of_frame)?;
                }
                Ok(Some(done + of_frame))
            }
        }
    }

    /// Whether `done` bytes are the whole of the frame that came.
    pub(super) fn is_whole(&self, frame: usize, done: usize) -> bool {
        matches!(self.kind, Kind::Packets(_)) || frame == done
    }

    /// Whether [`Link::frame_len`] is what is coming, so that a frame that has no room can be skipped.
    pub(super) fn knows_length(&self) -> bool {
        matches!(self.kind, Kind::Stream(_))
    }

    /// Throws away what is still to come of the frame, of which `done` bytes have come.
    pub(super) fn skip_frame(&mut self, done: usize) {
        if let Kind::Stream(stream) = &mut self.kind {
            stream.skip += stream.frame.saturating_sub(done);
            stream.frame = 0;
            stream.word_len = 0;
        }
    }

    /// Sends a frame behind its header, by this queue.
    pub(super) fn send(&mut self, queue: usize, packet: &Buffers<'_>) -> io::Result<Sent> {
        let len = usize::try_from(packet.len()).unwrap_or(usize::MAX);
        let lengths = HEADER_LEN + MIN_FRAME..=HEADER_LEN + MAX_FRAME;
        if !self.status.is_up() || !lengths.contains(&len) || packet.slices().len() >= MAX_IOVECS {
            return Ok(Sent::Done);
        }
        let slices = packet.slices().iter().copied();
        let fd = of_queue(&self.fds, queue)?;
        let stream = match &mut self.kind {
            Kind::Packets(_) => {
                return match self.iovecs.write(fd, slices) {
                    Ok(None) => Ok(Sent::Blocked),
                    Err(e) if is_gone(&e) => Err(e),
                    Ok(Some(_)) => {
                        note(&self.status.first_sent);
                        Ok(Sent::Done)
                    }
                    // A header that says nothing sensible, or an interface that is down.
                    Err(e) => {
                        log::debug!("a frame is lost: {e}");
                        Ok(Sent::Done)
                    }
                };
            }
            Kind::Stream(stream) => stream,
        };
        if !stream.unsent.is_empty() {
            return Ok(Sent::Blocked);
        }
        let frame = len - HEADER_LEN;
        let mut word = (frame as u32).to_be_bytes();
        let slices = window(slices, HEADER_LEN, frame);
        let all = [VolatileSlice::from(&mut word[..])]
            .into_iter()
            .chain(slices);
        let Some(count) = self.iovecs.write(fd, all.clone())? else {
            return Ok(Sent::Blocked);
        };
        note(&self.status.first_sent);
        append(&mut stream.unsent, window(all, count, frame + 4 - count));
        Ok(Sent::Done)
    }

    /// Sends what is left of the frame that was sent last; `false` if something still is.
    pub(super) fn flush(&mut self) -> io::Result<bool> {
        let Kind::Stream(stream) = &mut self.kind else {
            return Ok(true);
        };
        if !self.status.is_up() {
            stream.unsent.clear();
        }
        let fd = of_queue(&self.fds, 0)?;
        while !stream.unsent.is_empty() {
            let rest = [VolatileSlice::from(&mut stream.unsent[..])];
            match self.iovecs.write(fd, rest.into_iter())? {
                Some(count) => drop(stream.unsent.drain(..count)),
                None => return Ok(false),
            }
        }
        Ok(true)
    }
}

/// A stream carries the frames of all queues, and so does what is not plugged in.
fn of_queue(fds: &[OwnedFd], queue: usize) -> io::Result<&OwnedFd> {
    let fd = fds.get(queue).or(fds.first());
    fd.ok_or_else(|| ErrorKind::NotConnected.into())
}

impl Stream {
    fn add_to_word(&mut self, count: usize) -> io::Result<()> {
        self.word_len += count;
        if self.word_len == self.word.len() {
            let frame = u32::from_be_bytes(self.word) as usize;
            if !(1..=MAX_FRAME).contains(&frame) {
                let why = format!("its other end announces a frame of {frame} bytes");
                return Err(io::Error::new(ErrorKind::InvalidData, why));
            }
            (self.frame, self.word_len) = (frame, 0);
        }
        Ok(())
    }
}

/// Whether a packet device no longer exists, from drivers/net/tun.c.
pub(super) fn is_gone(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EBADFD)
}
