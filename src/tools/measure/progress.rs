//! How far a long measurement has come, for whoever waits at a terminal.

use std::io::{self, IsTerminal, Write};

/// One line on stderr, written over and over; nothing where stderr is no terminal.
pub struct Progress {
    shown: bool,
    terminal: bool,
}

impl Default for Progress {
    fn default() -> Self {
        Self {
            shown: false,
            terminal: io::stderr().is_terminal(),
        }
    }
}

impl Progress {
    /// Replaces the line.
    pub fn say(&mut self, text: &str) {
        if self.terminal {
            // EL (ECMA-48 § 8.3.41) clears what a longer line left.
            let _ = write!(io::stderr(), "\r{text}\x1b[K");
            self.shown = true;
        }
    }

    /// Takes the line away, so that something else can be written.
    pub fn clear(&mut self) {
        if std::mem::take(&mut self.shown) {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.clear();
    }
}
