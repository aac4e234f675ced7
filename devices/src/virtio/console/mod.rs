//! The console device (§ 5.3): one port, which is hvc0 to Linux.
//!
//! It has no thread. What the driver sends is taken on the vCPU's thread that notifies, so that a driver that waits for
//! that, as Linux's does, waits no time; what it gets is brought by the host's thread. Neither blocks: while the host has
//! no room, or the driver no buffers, all stays where it is, and a chain is taken from its ring only when it is done.
//!
//! A driver that knows of the terminal's size is given no input before it has read that size. Linux's throws away what
//! comes while it is still being set up (in_intr of drivers/char/virtio_console.c), long after it has offered its buffers;
//! but the change of configuration that it is told of at the start it looks at only when it is done with that.

#[cfg(test)]
pub(super) mod tests;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use vm_memory::GuestMemoryMmap;

use super::device::{Interrupt, Resources, StopMode, VirtioDevice, read_config_bytes};
use super::queue::{Buffers, Chain, QueueError, Virtqueue};
use crate::chardev::{ConsoleDevice, ConsoleOutput, Kick, TerminalSize};
use crate::state::{Record, SaveState, StateError, from_record, to_record};

/// Device ID (§ 5).
pub const DEVICE_TYPE: u32 = 3;

/// Version of the saved state.
const STATE_VERSION: u32 = 1;

/// VIRTIO_CONSOLE_F_SIZE (§ 5.3.3): the configuration space has the terminal's size.
const F_SIZE: u64 = 1;

/// `receiveq` and `transmitq` of port 0 (§ 5.3.2).
const QUEUE_SIZES: [u16; 2] = [64; 2];
const RECEIVE: u16 = 0;

/// Bytes that are copied at once. Linux sends and receives as many at most.
const PIECE: usize = 4096;

/// Pieces and chains that are sent in one go. A driver that adds more all the time must not hold its vCPU in here: the
/// host's thread asks for each further go.
const BURST: usize = 64;

/// Longest chain that is sent. Each notification may stand for a full queue of chains, which the host works off while the
/// guest sleeps; without a limit, that would be 256 GiB of the same few pages. Drivers send a page at most.
const MAX_CHAIN_BYTES: u64 = 1 << 20;

/// The device.
pub struct Console {
    port: Arc<Mutex<Port>>,
}

impl Console {
    /// Most bytes that it takes beside guest RAM; what the host has still to write is its output's.
    pub const MEMORY_BOUND: usize = Chain::memory_bound(QUEUE_SIZES[0]);

    /// A console that sends to `output`. `size` is that of the user's terminal, 0 by 0 if it is not known, and none where
    /// nobody types; [`ConsoleDevice`] says what `kick` is.
    pub fn new(output: Box<dyn ConsoleOutput>, kick: Kick, size: Option<TerminalSize>) -> Self {
        let port = Port {
            running: None,
            output,
            kick,
            size,
            known_size: size,
            sent: 0,
            takes_input: false,
            // The host may have had input before this device existed.
            input_held_back: true,
        };
        Self {
            port: Arc::new(Mutex::new(port)),
        }
    }

    /// The host's side.
    pub fn port(&self) -> Arc<Mutex<dyn ConsoleDevice>> {
        self.port.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Port> {
        self.port.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        self.lock().size.map_or(0, |_| F_SIZE)
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// `struct virtio_console_config` (§ 5.3.4), of which the size is all that these features give a meaning.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut port = self.lock();
        let Some(size) = port.size else { return };
        let [c0, c1] = size.columns.to_le_bytes();
        let [r0, r1] = size.rows.to_le_bytes();
        read_config_bytes(&[c0, c1, r0, r1], offset, data);
        if port.running.is_some() && !std::mem::replace(&mut port.takes_input, true) {
            port.input_wanted();
        }
    }

    fn start(&mut self, resources: Resources) -> io::Result<()> {
        let mut running = Running {
            mem: resources.mem,
            interrupt: resources.interrupt,
            has_size: resources.features & F_SIZE != 0,
            receive: None,
            transmit: None,
        };
        for queue in resources.queues {
            match queue.index() {
                RECEIVE => running.receive = Some(queue),
                _ => running.transmit = Some(queue),
            }
        }
        let mut port = self.lock();
        if !resources.resumed {
            port.sent = 0;
            port.takes_input = !running.has_size;
        }
        if port.known_size != port.size || !resources.resumed {
            port.known_size = port.size;
            running.tell_size();
        }
        port.running = Some(running);
        port.on_tx_space();
        port.input_wanted();
        Ok(())
    }

    fn notify(&mut self, queue: u16) {
        match queue {
            RECEIVE => self.lock().input_wanted(),
            _ => self.lock().on_tx_space(),
        }
    }

    fn stop(&mut self, _: StopMode, _: Duration) -> Option<Vec<Virtqueue>> {
        let stopped = self.lock().running.take().into_iter();
        let queues = stopped.flat_map(|running| [running.receive, running.transmit]);
        Some(queues.flatten().collect())
    }
}

#[derive(Serialize, Deserialize)]
struct Saved {
    /// Columns and rows.
    size: Option<(u16, u16)>,
    sent: u64,
    takes_input: bool,
}

impl SaveState for Console {
    fn save(&self) -> Result<Box<Record>, StateError> {
        let Port {
            // Its queues are the transport's to save.
            running: _,
            output: _,
            kick: _,
            size: _,
            known_size,
            sent,
            takes_input,
            // The next host may hold some as well.
            input_held_back: _,
        } = &*self.lock();
        let saved = Saved {
            size: known_size.map(|size| (size.columns, size.rows)),
            sent: *sent,
            takes_input: *takes_input,
        };
        to_record(STATE_VERSION, saved)
    }

    /// Whether there is a size was agreed on with the driver; which it is, this host decides.
    fn restore(&mut self, record: &Record) -> Result<(), StateError> {
        let saved: Saved = from_record(STATE_VERSION, record)?;
        let mut port = self.lock();
        let known = saved
            .size
            .map(|(columns, rows)| TerminalSize { columns, rows });
        port.size = known.map(|known| port.size.unwrap_or(known));
        port.known_size = known;
        port.sent = saved.sent;
        port.takes_input = saved.takes_input;
        port.input_held_back = true;
        Ok(())
    }
}

/// What the driver's side and the host's share.
struct Port {
    /// While the driver has the device running, and keeps to the rules.
    running: Option<Running>,
    output: Box<dyn ConsoleOutput>,
    kick: Kick,
    size: Option<TerminalSize>,
    /// Which size the driver was told of. A pause or a restore may have changed it.
    known_size: Option<TerminalSize>,
    /// Bytes of the next chain in `transmitq` that have been sent: the host had no room for the rest.
    sent: u64,
    /// Whether the driver has read the size, or knows of none.
    takes_input: bool,
    /// The host holds input that did not fit; it wants a kick when there is room.
    input_held_back: bool,
}

struct Running {
    mem: GuestMemoryMmap,
    interrupt: Interrupt,
    has_size: bool,
    receive: Option<Virtqueue>,
    transmit: Option<Virtqueue>,
}

impl Running {
    fn tell_size(&self) {
        if self.has_size {
            self.interrupt.config_changed();
        }
    }
}

impl Port {
    /// Does something with the queues, if there are any. A fault in them ends that until the next reset.
    fn run<T: Default>(
        &mut self,
        act: impl FnOnce(&mut Self, &mut Running) -> Result<T, QueueError>,
    ) -> T {
        let Some(mut running) = self.running.take() else {
            return T::default();
        };
        match act(self, &mut running) {
            Ok(done) => {
                self.running = Some(running);
                done
            }
            Err(e) => {
                running.interrupt.needs_reset(&e);
                T::default()
            }
        }
    }

    /// The driver may have room for what the host held back.
    fn input_wanted(&mut self) {
        if std::mem::take(&mut self.input_held_back) {
            (self.kick)();
        }
    }

    fn transmit(&mut self, running: &mut Running) -> Result<(), QueueError> {
        let Running {
            mem,
            interrupt,
            transmit: Some(queue),
            ..
        } = running
        else {
            return Ok(());
        };
        let mut chain = Chain::default();
        let mut left = BURST;
        while self.output.has_room() {
            if left == 0 {
                self.output.call_back();
                break;
            }
            left -= 1;
            if !queue.pop(mem, &mut chain)? {
                if queue.enable_notifications(mem)? {
                    continue;
                }
                break;
            }
            if chain.readable.len() > MAX_CHAIN_BYTES {
                let why = "more than 1 MiB of console output in one chain";
                return Err(QueueError::Unanswerable(why));
            }
            if !self.send(&mut chain.readable, &mut left) {
                queue.put_back();
                continue;
            }
            self.sent = 0;
            queue.complete(mem, chain.head(), 0)?;
            if queue.needs_interrupt(mem)? {
                interrupt.used_buffers();
            }
        }
        Ok(())
    }

    /// Sends what has not been sent of a chain, `left` pieces at most; `false` if something is left of it.
    fn send(&mut self, text: &mut Buffers<'_>, left: &mut usize) -> bool {
        let mut piece = [0; PIECE];
        // A driver that has made the chain shorter meanwhile is done with it.
        text.skip(self.sent);
        while !text.is_empty() {
            let len = usize::try_from(text.len()).unwrap_or(PIECE).min(PIECE);
            let piece = piece.get_mut(..len).unwrap_or_default();
            text.read_front(piece);
            let taken = self.output.write(piece);
            self.sent += taken as u64;
            *left = left.saturating_sub(1);
            if taken < len || (*left == 0 && !text.is_empty()) {
                return false;
            }
        }
        true
    }
}

impl ConsoleDevice for Port {
    fn rx_space(&mut self) -> usize {
        let has_buffers = self.run(|port, running| match &mut running.receive {
            Some(queue) if port.takes_input => queue.enable_notifications(&running.mem),
            _ => Ok(false),
        });
        self.input_held_back |= !has_buffers;
        if has_buffers { PIECE } else { 0 }
    }

    fn receive(&mut self, bytes: &[u8]) -> usize {
        let mut taken = 0;
        self.run(|port, running| {
            let (Some(queue), true) = (&mut running.receive, port.takes_input) else {
                return Ok(());
            };
            let mem = &running.mem;
            let mut chain = Chain::default();
            while taken < bytes.len() {
                if !queue.pop(mem, &mut chain)? {
                    if queue.enable_notifications(mem)? {
                        continue;
                    }
                    break;
                }
                let len = chain
                    .writable
                    .write_front(bytes.get(taken..).unwrap_or_default());
                if len == 0 {
                    let why = "a console's receive buffer without room";
                    return Err(QueueError::Unanswerable(why));
                }
                queue.complete(mem, chain.head(), len as u32)?;
                taken += len;
            }
            if taken > 0 && queue.needs_interrupt(mem)? {
                running.interrupt.used_buffers();
            }
            Ok(())
        });
        self.input_held_back |= taken < bytes.len();
        taken
    }

    /// The host has no break to send; Ctrl-O is what Linux takes for one (drivers/tty/hvc/hvc_console.c, hvc_poll).
    fn send_break(&mut self) -> bool {
        self.receive(b"\x0f") == 1
    }

    fn on_tx_space(&mut self) {
        self.run(Self::transmit);
    }

    fn resize(&mut self, size: TerminalSize) {
        if self.size.is_some_and(|old| old != size) {
            self.size = Some(size);
            if let Some(running) = &self.running {
                self.known_size = self.size;
                running.tell_size();
            }
        }
    }
}
