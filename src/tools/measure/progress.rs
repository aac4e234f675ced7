//! The progress of a long measurement, on a terminal.

use std::io::{self, IsTerminal, Write};

/// One line on stderr, written over and over; nothing where stderr is no terminal.
pub struct Progress;

impl Progress {
    /// Replaces the line.
    pub fn show(&self, text: &str) {
        if io::stderr().is_terminal() {
            // EL (ECMA-48 § 8.3.41) clears what a longer line left.
            let _ = write!(io::stderr(), "\r{text}\x1b[K");
        }
    }

    /// Removes the line, so that something else can be written.
    pub fn clear(&self) {
        self.show("");
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.clear();
    }
}
