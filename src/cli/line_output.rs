//! The console of one of several VMs that share a stdout: whole lines, with the VM's index in front.

use minivmm_devices::chardev::ConsoleOutput;

/// Bytes after which a line is passed on without its end.
const MAX_LINE: usize = 4096;

/// See the module.
pub(super) struct LineOutput {
    index: u32,
    line: Vec<u8>,
    /// Lines that the sink had no room for.
    pending: Vec<u8>,
    sink: Box<dyn ConsoleOutput>,
}

impl LineOutput {
    /// Lines of VM `index`, to `sink`.
    pub(super) fn new(index: u32, sink: Box<dyn ConsoleOutput>) -> Self {
        Self {
            index,
            line: Vec::new(),
            pending: Vec::new(),
            sink,
        }
    }

    /// Passes the line on.
    fn end_line(&mut self) {
        self.pending
            .extend_from_slice(format!("{}: ", self.index).as_bytes());
        self.pending.append(&mut self.line);
        self.pending.push(b'\n');
        self.flush();
    }

    fn flush(&mut self) {
        if !self.pending.is_empty() {
            let taken = self.sink.write(&self.pending);
            self.pending.drain(..taken.min(self.pending.len()));
        }
    }
}

impl ConsoleOutput for LineOutput {
    fn write(&mut self, bytes: &[u8]) -> usize {
        self.flush();
        let mut taken = 0;
        for byte in bytes {
            if !self.pending.is_empty() {
                break;
            }
            taken += 1;
            match byte {
                b'\r' => {}
                b'\n' => self.end_line(),
                byte => {
                    self.line.push(*byte);
                    if self.line.len() >= MAX_LINE {
                        self.end_line();
                    }
                }
            }
        }
        taken
    }

    fn has_room(&self) -> bool {
        self.pending.is_empty() && self.sink.has_room()
    }

    fn call_back(&self) {
        self.sink.call_back();
    }
}

impl Drop for LineOutput {
    fn drop(&mut self) {
        if !self.line.is_empty() {
            self.end_line();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    /// Takes at most so many bytes.
    struct Narrow(usize, Arc<Mutex<Vec<u8>>>);

    impl ConsoleOutput for Narrow {
        fn write(&mut self, bytes: &[u8]) -> usize {
            let taken = bytes.len().min(self.0);
            self.1.lock().unwrap().extend(&bytes[..taken]);
            taken
        }

        fn has_room(&self) -> bool {
            self.0 > 0
        }

        fn call_back(&self) {}
    }

    #[test]
    fn lines_come_whole_with_the_index_in_front() {
        for room in [1, 3, 100] {
            let seen = Arc::default();
            let mut output = LineOutput::new(7, Box::new(Narrow(room, Arc::clone(&seen))));
            let mut rest = &b"one\r\ntwo\n\nthree"[..];
            while !rest.is_empty() {
                let taken = output.write(rest);
                rest = &rest[taken..];
            }
            while !output.has_room() {
                output.write(b"");
            }
            assert_eq!(*seen.lock().unwrap(), b"7: one\n7: two\n7: \n");
            if room == 100 {
                drop(output);
                assert!(seen.lock().unwrap().ends_with(b"7: three\n"));
            }
        }
    }
}
