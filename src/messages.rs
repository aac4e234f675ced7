//! What minivmm says: on stderr, in lines that begin with its name; what is from a file or a guest cannot command a
//! terminal.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};

use log::LevelFilter;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::console;
use crate::vmm::vm::NOTICE;

/// Starts the log: messages of `level`, and what the user has to know to go on unless it is off. Where stderr is a raw
/// terminal, a line needs the carriage return.
pub fn start_log(level: LevelFilter) {
    let on_terminal = io::stderr().is_terminal();
    let mut builder = env_logger::Builder::new();
    builder.filter_level(level);
    if level != LevelFilter::Off {
        builder.filter_module(NOTICE, level.max(LevelFilter::Info));
    }
    builder
        .target(env_logger::Target::Pipe(Box::new(TimedStderr)))
        .format(move |out, record| {
            let level = match record.level() {
                log::Level::Error => "error: ",
                log::Level::Warn => "warning: ",
                _ => "",
            };
            let end = if on_terminal && console::is_raw() {
                "\r\n"
            } else {
                "\n"
            };
            let text = record.args().to_string();
            let mut lines = text.split('\n').map(escaped);
            let first = lines.next().unwrap_or_default();
            write!(out, "minivmm: {level}{first}{end}")?;
            // A name with a newline in it cannot pass for another message.
            lines.try_for_each(|line| write!(out, "  {line}{end}"))
        })
        .init();
}

/// `text` with each character that a terminal would act on, a newline among them, as a program in Rust or C would have
/// it: `\n`, `\u{1b}`.
pub fn escaped(text: &str) -> Cow<'_, str> {
    if !text.contains(acts_on_terminal) {
        return text.into();
    }
    let mut shown = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        if acts_on_terminal(c) {
            // Writing to a string cannot fail.
            let _ = write!(shown, "{}", c.escape_default());
        } else {
            shown.push(c);
        }
    }
    shown.into()
}

/// Control characters (C0, DEL and C1), and those by which Unicode hides or turns around the text beside them.
fn acts_on_terminal(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}')
}

/// A writer that escapes what it is given, but for the ends of lines.
pub struct Escaping<W>(pub W);

impl<W: Write> Write for Escaping<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for piece in String::from_utf8_lossy(bytes).split_inclusive('\n') {
            let (line, end) = match piece.strip_suffix('\n') {
                Some(line) => (line, "\n"),
                None => (piece, ""),
            };
            self.0.write_all(escaped(line).as_bytes())?;
            self.0.write_all(end.as_bytes())?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// stderr for a thread that must not wait for ever: a guest can make its vCPU's thread log, and a reader that has stopped
/// would hold that thread, and with it the VM's end. A message that nobody takes for so long is lost.
pub struct TimedStderr;

impl TimedStderr {
    const PATIENCE: Timespec = Timespec {
        tv_sec: 0,
        tv_nsec: 200_000_000,
    };
    /// What a pipe that is ready for writing takes without a wait.
    const PIPE_BUF: usize = 4096;

    /// Writes a text that has its ends of lines.
    pub fn print(&mut self, text: &str) {
        for piece in text.as_bytes().chunks(Self::PIPE_BUF) {
            // Nobody to tell.
            let _ = self.write_all(piece);
        }
    }
}

impl Write for TimedStderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let stderr = rustix::stdio::stderr();
        match poll(
            &mut [PollFd::new(&stderr, PollFlags::OUT)],
            Some(&Self::PATIENCE),
        ) {
            Ok(0) => Ok(bytes.len()),
            _ => io::stderr().write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terminals_are_not_commanded() {
        assert_eq!(escaped("a b/ü.img"), "a b/ü.img");
        assert_eq!(
            escaped("\x1b]0;x\x07\r\n\u{9b}31m\u{7f}\u{202e}\t"),
            "\\u{1b}]0;x\\u{7}\\r\\n\\u{9b}31m\\u{7f}\\u{202e}\\t"
        );
        let mut out = Escaping(Vec::new());
        write!(out, "a\x1bb\nc\r\n").unwrap();
        assert_eq!(out.0, b"a\\u{1b}b\nc\\r\n");
    }
}
