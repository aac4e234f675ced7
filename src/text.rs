//! Text for people: what is from a file or a guest cannot command their terminal.

use std::borrow::Cow;
use std::error::Error;
use std::fmt::{self, Write as _};
use std::io::{self, Write};

/// An error and its causes on one line, escaped. A cause that the message ends with already, as some libraries make it, is not
/// repeated.
pub fn error_chain(error: &dyn Error) -> String {
    let mut chain = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if !chain.ends_with(&text) {
            chain.push_str(": ");
            chain.push_str(&text);
        }
        cause = error.source();
    }
    escaped(&chain).into_owned()
}

/// Says of an error what it is about, as a file's path.
pub(crate) fn about(what: impl fmt::Display) -> impl Fn(io::Error) -> io::Error {
    move |e| io::Error::new(e.kind(), format!("{what}: {e}"))
}

/// A size with a unit that leaves few digits.
pub(crate) fn size(bytes: u64) -> String {
    match bytes {
        0..0x400 => format!("{bytes} bytes"),
        0x400..0x10_0000 => format!("{:.1} KiB", bytes as f64 / f64::from(1 << 10)),
        _ => mib(bytes),
    }
}

/// A size in MiB.
pub(crate) fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// The text in `bytes` up to a NUL or the end of the line, if that is printable ASCII.
pub fn printable(bytes: &[u8]) -> Option<String> {
    let text = bytes.split(|byte| *byte == 0 || *byte == b'\n').next()?;
    let good = !text.is_empty()
        && text
            .iter()
            .all(|byte| byte.is_ascii_graphic() || *byte == b' ');
    good.then(|| String::from_utf8_lossy(text).into_owned())
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
