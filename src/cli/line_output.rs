//! The console of one of several VMs that share a stdout: whole lines, with the VM's index in front.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use minivmm_devices::chardev::ConsoleOutput;

/// Bytes after which a line is passed on without its end.
const MAX_LINE: usize = 4096;
/// Bytes that the sink had no room for, above which no more are taken: [`ConsoleOutput::has_room`] is true when there are none, and
/// the bytes that it promises room for may end a line of MAX_LINE and some empty ones.
const MAX_PENDING: usize = 2 * MAX_LINE;
/// How long [`LineOutput::finish`] waits between two looks at whether the sink has room.
const FINISH_STEP: Duration = Duration::from_millis(10);

/// See the module. A device has it, and who is to finish it when that is gone.
#[derive(Clone)]
pub(super) struct LineOutput(Arc<Mutex<Lines>>);

struct Lines {
    index: u32,
    line: Vec<u8>,
    /// Lines that the sink had no room for.
    pending: Vec<u8>,
    sink: Box<dyn ConsoleOutput>,
}

impl LineOutput {
    /// Lines of VM `index`, to `sink`.
    pub(super) fn new(index: u32, sink: Box<dyn ConsoleOutput>) -> Self {
        Self(Arc::new(Mutex::new(Lines {
            index,
            line: Vec::new(),
            pending: Vec::new(),
            sink,
        })))
    }

    /// Passes on what there is, and waits for the sink to take it until `give_up` says that it need not.
    pub(super) fn finish(&self, give_up: &dyn Fn() -> bool) {
        if !self.lines().line.is_empty() {
            self.lines().end_line();
        }
        while !self.lines().flush() && !give_up() {
            thread::sleep(FINISH_STEP);
        }
    }

    fn lines(&self) -> MutexGuard<'_, Lines> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lines {
    /// Passes the line on.
    fn end_line(&mut self) {
        self.pending
            .extend_from_slice(format!("{}: ", self.index).as_bytes());
        self.pending.append(&mut self.line);
        self.pending.push(b'\n');
        self.flush();
    }

    /// Whether the sink has taken all.
    fn flush(&mut self) -> bool {
        if !self.pending.is_empty() {
            let taken = self.sink.write(&self.pending);
            self.pending.drain(..taken.min(self.pending.len()));
        }
        self.pending.is_empty()
    }
}

impl ConsoleOutput for LineOutput {
    fn write(&mut self, bytes: &[u8]) -> usize {
        let mut lines = self.lines();
        lines.flush();
        let mut taken = 0;
        for byte in bytes {
            if lines.pending.len() > MAX_PENDING {
                break;
            }
            taken += 1;
            match byte {
                b'\r' => {}
                b'\n' => lines.end_line(),
                byte => {
                    lines.line.push(*byte);
                    if lines.line.len() >= MAX_LINE {
                        lines.end_line();
                    }
                }
            }
        }
        taken
    }

    fn has_room(&self) -> bool {
        let mut lines = self.lines();
        // Only a sink that was asked and has none calls back; it may have got some since it was written to.
        loop {
            let is_flushed = lines.flush();
            if !lines.sink.has_room() {
                return false;
            }
            if is_flushed {
                return true;
            }
        }
    }

    fn call_back(&self) {
        self.lines().sink.call_back();
    }
}

#[cfg(test)]
mod tests {
    use minivmm_devices::chardev::MIN_ROOM;

    use super::*;

    /// A buffer with so much room left.
    #[derive(Default)]
    struct Buffer {
        room: usize,
        seen: Vec<u8>,
        /// It owes a call.
        tx_blocked: bool,
    }

    struct Sink(Arc<Mutex<Buffer>>);

    impl ConsoleOutput for Sink {
        fn write(&mut self, bytes: &[u8]) -> usize {
            let mut buffer = self.0.lock().unwrap();
            let taken = bytes.len().min(buffer.room);
            buffer.room -= taken;
            buffer.seen.extend(&bytes[..taken]);
            taken
        }

        fn has_room(&self) -> bool {
            let mut buffer = self.0.lock().unwrap();
            let has_room = buffer.room >= MIN_ROOM;
            buffer.tx_blocked |= !has_room;
            has_room
        }

        fn call_back(&self) {}
    }

    fn output(index: u32, room: usize) -> (LineOutput, Arc<Mutex<Buffer>>) {
        let buffer = Arc::new(Mutex::new(Buffer {
            room,
            ..Buffer::default()
        }));
        (
            LineOutput::new(index, Box::new(Sink(Arc::clone(&buffer)))),
            buffer,
        )
    }

    #[test]
    fn lines_come_whole_with_the_index_in_front() {
        let text = b"one\r\ntwo\n\nthree";
        for cut in 0..text.len() {
            let (mut output, buffer) = output(7, 100);
            for piece in [&text[..cut], &text[cut..]] {
                assert_eq!(output.write(piece), piece.len());
            }
            assert_eq!(buffer.lock().unwrap().seen, b"7: one\n7: two\n7: \n");
            output.finish(&|| false);
            assert!(buffer.lock().unwrap().seen.ends_with(b"\n7: three\n"));
        }
    }

    /// A device writes only after it was told of room.
    #[test]
    fn output_goes_on_after_a_full_buffer() {
        let (mut output, buffer) = output(7, 5);
        assert_eq!(output.write(b"one\n"), 4);
        for (more, has_room, seen) in [
            (0, false, "7: on"),
            (2, false, "7: one\n"),
            (MIN_ROOM, true, "7: one\n"),
        ] {
            buffer.lock().unwrap().room += more;
            assert_eq!(output.has_room(), has_room);
            let mut buffer = buffer.lock().unwrap();
            assert_eq!(buffer.seen, seen.as_bytes());
            assert_eq!(std::mem::take(&mut buffer.tx_blocked), !has_room);
        }
    }

    #[test]
    fn what_room_was_promised_for_is_taken() {
        let (mut output, buffer) = output(u32::MAX, 2 * MAX_LINE);
        assert_eq!(output.write(&[b'x'; MAX_LINE - 1]), MAX_LINE - 1);
        buffer.lock().unwrap().room = MIN_ROOM;
        assert!(output.has_room());
        for _ in 0..MIN_ROOM {
            assert_eq!(output.write(b"\n"), 1);
        }
        // Of more, no more than is bounded.
        let taken = output.write(&[b'\n'; 4 * MAX_LINE]);
        assert!(taken > 0 && output.lines().pending.len() < MAX_PENDING + MAX_LINE);
    }

    #[test]
    fn the_end_waits_for_room_unless_it_need_not() {
        let (mut output, buffer) = output(7, 5);
        output.write(b"one\ntwo");
        output.finish(&|| true);
        assert_eq!(buffer.lock().unwrap().seen, b"7: on");
        let give_up = || {
            buffer.lock().unwrap().room += 1;
            false
        };
        output.finish(&give_up);
        assert_eq!(buffer.lock().unwrap().seen, b"7: one\n7: two\n");
    }
}
