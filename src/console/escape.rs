//! The escape key of the terminal: Ctrl-A, then what to do.

/// Ctrl-A.
const ESCAPE: u8 = 0x01;

/// What `Ctrl-A h` prints. The terminal is raw: lines end with CR and LF.
pub(super) const HELP: &str = "\r\n\
    Ctrl-A x       stop the VM and quit\r\n\
    Ctrl-A b       send a BREAK, which Linux takes for SysRq: the next key is its command\r\n\
    Ctrl-A h       this help\r\n\
    Ctrl-A Ctrl-A  send Ctrl-A to the guest (so does Ctrl-A a)\r\n";

/// What a key asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Key {
    /// These go to the guest.
    Guest([Option<u8>; 2]),
    /// Nothing yet: it was the escape key.
    Pending,
    Quit,
    Break,
    Help,
}

/// The state between two keys.
#[derive(Debug, Default)]
pub(super) struct Escape {
    pending: bool,
}

impl Escape {
    pub(super) fn key(&mut self, byte: u8) -> Key {
        if !std::mem::take(&mut self.pending) {
            self.pending = byte == ESCAPE;
            return if self.pending {
                Key::Pending
            } else {
                Key::Guest([Some(byte), None])
            };
        }
        match byte {
            b'x' | b'X' => Key::Quit,
            b'b' | b'B' => Key::Break,
            b'h' | b'H' | b'?' => Key::Help,
            b'a' | b'A' | ESCAPE => Key::Guest([Some(ESCAPE), None]),
            // No command: the guest may know better, a screen or tmux in it for one.
            other => Key::Guest([Some(ESCAPE), Some(other)]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(input: &[u8]) -> (Vec<u8>, Vec<Key>) {
        let (mut escape, mut guest, mut others) = (Escape::default(), Vec::new(), Vec::new());
        for byte in input {
            match escape.key(*byte) {
                Key::Guest(bytes) => guest.extend(bytes.iter().flatten()),
                Key::Pending => {}
                other => others.push(other),
            }
        }
        (guest, others)
    }

    #[test]
    fn commands_are_taken_and_the_rest_goes_to_the_guest() {
        assert_eq!(run(b"ls\r"), (b"ls\r".to_vec(), vec![]));
        assert_eq!(run(b"a\x01xb"), (b"ab".to_vec(), vec![Key::Quit]));
        assert_eq!(
            run(b"\x01h\x01?x"),
            (b"x".to_vec(), vec![Key::Help, Key::Help])
        );
        assert_eq!(run(b"\x01bh"), (b"h".to_vec(), vec![Key::Break]));
        assert_eq!(run(b"\x01\x01x"), (b"\x01x".to_vec(), vec![]));
        assert_eq!(run(b"\x01a\x01"), (b"\x01".to_vec(), vec![]));
        assert_eq!(run(b"\x01c\x1b[A"), (b"\x01c\x1b[A".to_vec(), vec![]));
    }
}
