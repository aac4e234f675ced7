//! The host's end of hvc0 where a container's program runs: its output, taken out of frames, and how much input it may be sent.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use minivmm_devices::chardev::ConsoleOutput;
use vmm_sys_util::eventfd::EventFd;

use crate::guest::frames::{ERROR, HEADER, OUTPUT, STATUS, TAKEN, WINDOW};

/// Input that is on its way to the program.
#[derive(Debug)]
pub struct Credit {
    under_way: AtomicUsize,
    /// The guest's terminal passes on all bytes as they are: nothing may be sent before.
    open: AtomicBool,
    room: EventFd,
    reader_gone: Arc<EventFd>,
}

impl Credit {
    pub(super) fn new() -> std::io::Result<Self> {
        let event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        Ok(Self {
            under_way: AtomicUsize::new(0),
            open: AtomicBool::new(false),
            room: event()?,
            reader_gone: Arc::new(event()?),
        })
    }

    /// Bytes that may be sent now.
    pub(super) fn left(&self) -> usize {
        WINDOW.saturating_sub(self.under_way.load(Ordering::Acquire))
    }

    /// Whether the guest has said that it is ready.
    pub fn is_open(&self) -> bool {
        self.open.load(Ordering::Acquire)
    }

    /// An event when there is room for more.
    pub fn room(&self) -> &EventFd {
        &self.room
    }

    /// An event when nobody reads the program's stdout any more.
    pub fn reader_gone(&self) -> &Arc<EventFd> {
        &self.reader_gone
    }

    pub(super) fn spend(&self, bytes: usize) {
        self.under_way.fetch_add(bytes, Ordering::AcqRel);
    }

    /// The program has taken so many; the guest may say anything.
    fn give_back(&self, bytes: usize) {
        self.open.store(true, Ordering::Release);
        let less = |under_way: usize| Some(under_way.saturating_sub(bytes));
        let _ = (self.under_way).fetch_update(Ordering::AcqRel, Ordering::Acquire, less);
        // It is refused only when the counter is full; then its reader is awake.
        let _ = self.room.write(1);
    }
}

/// Takes frames, and gives stdout and stderr what is in them.
pub struct FrameSink {
    output: Box<dyn ConsoleOutput>,
    error: Box<dyn ConsoleOutput>,
    credit: Arc<Credit>,
    /// Of the frame at hand: its beginning, and bytes of its content to come.
    header: Vec<u8>,
    left: usize,
    /// Content of a short frame.
    content: Vec<u8>,
    status: Option<u8>,
}

impl FrameSink {
    /// A sink in front of two others.
    pub fn new(
        output: Box<dyn ConsoleOutput>,
        error: Box<dyn ConsoleOutput>,
        credit: Arc<Credit>,
    ) -> Self {
        Self {
            output,
            error,
            credit,
            header: Vec::new(),
            left: 0,
            content: Vec::new(),
            status: None,
        }
    }

    /// The exit status, of a program that was run beside the image's own, when it has come.
    pub fn status(&self) -> Option<u8> {
        self.status
    }

    /// Takes content of the frame at hand; returns how many bytes it took.
    fn take(&mut self, bytes: &[u8]) -> usize {
        match self.header.first() {
            Some(&OUTPUT) => self.output.write(bytes),
            Some(&ERROR) => self.error.write(bytes),
            Some(&(TAKEN | STATUS)) => {
                self.content.extend(bytes);
                bytes.len()
            }
            // Of a guest that is none of ours.
            _ => bytes.len(),
        }
    }

    fn end_of_frame(&mut self) {
        match (self.header.first(), self.content.as_slice()) {
            (Some(&TAKEN), &[a, b, c, d]) => {
                let bytes = u32::from_le_bytes([a, b, c, d]);
                self.credit.give_back(bytes as usize);
            }
            (Some(&STATUS), &[status]) => self.status = Some(status),
            _ => {}
        }
        self.content.clear();
        self.header.clear();
    }
}

impl ConsoleOutput for FrameSink {
    fn write(&mut self, bytes: &[u8]) -> usize {
        let mut rest = bytes;
        while !rest.is_empty() {
            if self.header.len() < HEADER {
                let (head, behind) = rest.split_at(rest.len().min(HEADER - self.header.len()));
                self.header.extend(head);
                rest = behind;
                if let [_, low, high] = *self.header {
                    self.left = u16::from_le_bytes([low, high]).into();
                }
            } else {
                let content = rest.get(..self.left).unwrap_or(rest);
                let count = self.take(content);
                self.left -= count.min(self.left);
                if count < content.len() {
                    return bytes.len() - rest.len() + count;
                }
                rest = rest.get(count..).unwrap_or_default();
            }
            if self.header.len() == HEADER && self.left == 0 {
                self.end_of_frame();
            }
        }
        bytes.len()
    }

    fn has_room(&self) -> bool {
        self.output.has_room() && self.error.has_room()
    }

    fn call_back(&self) {
        self.output.call_back();
        self.error.call_back();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::guest::frames::frame;

    /// Takes a few bytes at a time.
    struct Slow(Arc<Mutex<Vec<u8>>>, usize);

    impl ConsoleOutput for Slow {
        fn write(&mut self, bytes: &[u8]) -> usize {
            let count = bytes.len().min(self.1);
            self.0.lock().unwrap().extend(&bytes[..count]);
            count
        }

        fn has_room(&self) -> bool {
            true
        }

        fn call_back(&self) {}
    }

    #[test]
    fn streams_come_out_whole_however_they_are_cut() {
        let sent: Vec<u8> = [
            frame(OUTPUT, b"one "),
            frame(ERROR, b"two "),
            frame(OUTPUT, b""),
            frame(99, b"what is this"),
            frame(TAKEN, &7u32.to_le_bytes()),
            frame(TAKEN, b"longer than it should be"),
            frame(OUTPUT, b"three"),
        ]
        .concat();
        for cut in 1..sent.len() {
            for room in [1, 3, 100] {
                let (out, err) = (Arc::default(), Arc::default());
                let credit = Arc::new(Credit::new().unwrap());
                credit.spend(10);
                let (slow_out, slow_err) =
                    (Slow(Arc::clone(&out), room), Slow(Arc::clone(&err), room));
                let mut sink =
                    FrameSink::new(Box::new(slow_out), Box::new(slow_err), credit.clone());
                for mut piece in [&sent[..cut], &sent[cut..]] {
                    while !piece.is_empty() {
                        piece = &piece[sink.write(piece)..];
                    }
                }
                assert_eq!(*out.lock().unwrap(), b"one three");
                assert_eq!(*err.lock().unwrap(), b"two ");
                assert_eq!(credit.left(), WINDOW - 3);
            }
        }
    }
}
