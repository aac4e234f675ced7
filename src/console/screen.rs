//! What the guest has done to the terminal that shows its output. The end of a VM may cut a full-screen program off at any
//! byte, and the terminal has to be fit for a shell afterwards.
//!
//! The names of the control sequences are those of ECMA-48 and of xterm's ctlseqs.

use std::collections::VecDeque;

const ESC: u8 = 0x1b;
const CAN: u8 = 0x18;
const SUB: u8 = 0x1a;
const BEL: u8 = 0x07;
const SHIFT_OUT: u8 = 0x0e;
const SHIFT_IN: u8 = 0x0f;

/// Longest control sequence that is understood; a longer one goes by.
const LONGEST: usize = 64;

/// Modes that guests turn (DECSET, DECRST), and how a shell expects them. Those that switch screens come first: what
/// follows is then done to the shell's screen.
const MODES: [(u16, bool); 16] = [
    (47, false),   // alternate screen
    (1047, false), // alternate screen
    (1049, false), // alternate screen, cursor saved
    (1, false),    // cursor keys of their own
    (5, false),    // reverse video
    (7, true),     // long lines wrap
    (25, true),    // the cursor is visible
    (1000, false), // mouse: buttons
    (1002, false), // mouse: drags
    (1003, false), // mouse: all motion
    (1004, false), // focus reports
    (1005, false), // mouse: UTF-8
    (1006, false), // mouse: SGR
    (1015, false), // mouse: urxvt
    (2004, false), // pastes are bracketed
    (2026, false), // output is held back
];
/// How many of the modes, from the first, are about the alternate screen.
const ALTERNATE: usize = 3;

#[derive(Debug, Default, Clone, Copy, PartialEq)]
enum Parser {
    #[default]
    Text,
    Escape,
    /// Behind ESC and the first byte of a character set's name.
    CharacterSet,
    /// Behind ESC [.
    Control,
    /// A title, say: until BEL or ESC \.
    String,
}

/// Reads along with the output to a terminal.
#[derive(Debug, Default)]
pub(super) struct Screen {
    /// The terminal's answers would not reach the guest but the next program that reads the terminal, so it is not asked.
    hide_queries: bool,
    parser: Parser,
    /// The sequence that is being received.
    sequence: Vec<u8>,
    modes: Modes,
    /// Something stands on the current line.
    mid_line: bool,
    colours: bool,
    keypad: bool,
    character_set: bool,
    shifted_out: bool,
    scroll_region: bool,
}

#[derive(Debug)]
struct Modes([bool; MODES.len()]);

impl Default for Modes {
    fn default() -> Self {
        Self(MODES.map(|(_, expected)| expected))
    }
}

impl Screen {
    /// A terminal's screen. With `hide_queries`, questions to the terminal (where is the cursor, what are you) are left out.
    pub(super) fn new(hide_queries: bool) -> Self {
        Self {
            hide_queries,
            ..Self::default()
        }
    }

    /// Takes the guest's next byte, and adds what is to be written to `out`.
    pub(super) fn push(&mut self, byte: u8, out: &mut VecDeque<u8>) {
        // A sequence within another breaks that off.
        if byte == ESC && !self.sequence.is_empty() {
            if self.hide_queries {
                out.extend(&self.sequence);
            }
            self.sequence.clear();
        }
        self.sequence.push(byte);
        self.parser = self.parse(byte);
        let inside = matches!(self.parser, Parser::Escape | Parser::Control);
        if !self.hide_queries {
            out.push_back(byte);
        } else if !inside && !self.is_query() {
            out.extend(&self.sequence);
        }
        if !inside {
            self.sequence.clear();
        }
    }

    /// What makes the terminal fit for a shell again; empty if the guest has left it so. From here on it is taken to be.
    pub(super) fn settle(&mut self) -> Vec<u8> {
        let fresh = Self::new(self.hide_queries);
        let screen = std::mem::replace(self, fresh);
        let mut out = Vec::new();
        if screen.parser != Parser::Text {
            out.push(CAN);
        }
        for ((mode, expected), is) in MODES.into_iter().zip(screen.modes.0) {
            if is != expected {
                let verb = if expected { 'h' } else { 'l' };
                out.extend(format!("\x1b[?{mode}{verb}").into_bytes());
            }
        }
        for (needed, cure) in [
            (screen.keypad, "\x1b>"),
            (screen.shifted_out, "\x0f"),
            (screen.character_set, "\x1b(B"),
            // It moves the cursor: saved before, restored after.
            (screen.scroll_region, "\x1b7\x1b[r\x1b8"),
            (screen.colours, "\x1b[m"),
            (screen.mid_line, "\r\n"),
        ] {
            if needed {
                out.extend(cure.bytes());
            }
        }
        out
    }

    fn parse(&mut self, byte: u8) -> Parser {
        match (self.parser, byte) {
            (_, CAN | SUB) => Parser::Text,
            (_, ESC) => Parser::Escape,
            (Parser::Text, _) => {
                self.text(byte);
                Parser::Text
            }
            (Parser::Escape, b'[') => Parser::Control,
            (Parser::Escape, b']' | b'P' | b'X' | b'^' | b'_') => Parser::String,
            (Parser::Escape, b'(' | b')' | b'*' | b'+') => Parser::CharacterSet,
            (Parser::Escape, _) => {
                match byte {
                    b'=' | b'>' => self.keypad = byte == b'=',
                    // Everything is as after power-on.
                    b'c' => {
                        *self = Self {
                            sequence: std::mem::take(&mut self.sequence),
                            ..Self::new(self.hide_queries)
                        }
                    }
                    _ => {}
                }
                Parser::Text
            }
            (Parser::CharacterSet, _) => {
                self.character_set = byte != b'B';
                Parser::Text
            }
            (Parser::Control, 0x40..=0x7e) => {
                self.control();
                Parser::Text
            }
            (Parser::Control, _) if self.sequence.len() < LONGEST => Parser::Control,
            (Parser::Control, _) => Parser::Text,
            (Parser::String, BEL) => Parser::Text,
            (Parser::String, _) => Parser::String,
        }
    }

    fn text(&mut self, byte: u8) {
        match byte {
            SHIFT_OUT | SHIFT_IN => self.shifted_out = byte == SHIFT_OUT,
            _ if self.modes.0.iter().take(ALTERNATE).any(|on| *on) => {}
            b'\n' => self.mid_line = false,
            0..0x20 | 0x7f => {}
            _ => self.mid_line = true,
        }
    }

    /// A control sequence is complete.
    fn control(&mut self) {
        let Some((parameters, last)) = parts(&self.sequence) else {
            return;
        };
        match (parameters, last) {
            ([b'?', parameters @ ..], b'h' | b'l') => {
                for parameter in parameters.split(|b| *b == b';') {
                    let number = str::from_utf8(parameter).ok().and_then(|n| n.parse().ok());
                    if let Some(at) = MODES.iter().position(|(mode, _)| Some(*mode) == number) {
                        self.modes.0[at] = last == b'h';
                    }
                }
            }
            ([b'<'..=b'?', ..], _) => {}
            (parameters, b'm') => self.colours = !matches!(parameters, b"" | b"0"),
            (parameters, b'r') => self.scroll_region = !parameters.is_empty(),
            _ => {}
        }
    }

    /// A report of status or cursor (DSR), or of what the terminal is (DA).
    fn is_query(&self) -> bool {
        matches!(parts(&self.sequence), Some((_, b'n' | b'c')))
    }
}

/// Parameters and last byte of a control sequence.
fn parts(sequence: &[u8]) -> Option<(&[u8], u8)> {
    match sequence {
        [ESC, b'[', parameters @ .., last] => Some((parameters, *last)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn written(screen: &mut Screen, text: &[u8]) -> Vec<u8> {
        let mut out = VecDeque::new();
        text.iter().for_each(|byte| screen.push(*byte, &mut out));
        out.into()
    }

    fn settled(text: &str) -> String {
        let mut screen = Screen::new(false);
        assert_eq!(written(&mut screen, text.as_bytes()), text.as_bytes());
        let cure = String::from_utf8(screen.settle()).unwrap();
        assert!(screen.settle().is_empty(), "once is enough");
        cure
    }

    #[test]
    fn a_guest_that_leaves_the_terminal_in_order_gets_nothing() {
        for text in [
            "",
            "reboot: Power down\r\n",
            "a\n\r",
            "\x1b[1;31mred\x1b[0m\r\n",
            "\x1b[?1049h\x1b[?25lvi, full of text\x1b[?25h\x1b[?1049l",
            "\x1b[?2004h# ls\r\n\x1b[?2004l\r",
            "\x1b]0;title\x07\x1b]0;title\x1b\\",
            "\x1b(0lqk\x1b(B\r\n\x0eaa\x0f\r\n",
            "\x1b=\x1b>\x1b7\x1b8\x1b[2J\x1b[H",
            "mouse \x1b[?1000;1006h\x1b[31mreset\x1bc",
            "\x1b[?25\x1b[?25l\x1b[?25h",
        ] {
            assert_eq!(settled(text), "", "{text:?}");
        }
    }

    #[test]
    fn what_was_left_is_undone() {
        for (text, cure) in [
            ("/ # ", "\r\n"),
            ("/ # \x1b[6n", "\r\n"),
            ("50%\r", "\r\n"),
            ("\x1b[?1049h\x1b[?25l text", "\x1b[?1049l\x1b[?25h"),
            ("\x1b[?1000;1006h", "\x1b[?1000l\x1b[?1006l"),
            ("\x1b[?2004h# ", "\x1b[?2004l\r\n"),
            ("\x1b[1;31mred", "\x1b[m\r\n"),
            ("\x1b[?1h\x1b=", "\x1b[?1l\x1b>"),
            ("\x1b(0\x0e", "\x0f\x1b(B"),
            ("\x1b[2;20r", "\x1b7\x1b[r\x1b8"),
            ("\x1b]0;half a ti", "\x18"),
            ("\x1b[31", "\x18"),
        ] {
            assert_eq!(settled(text), cure, "{text:?}");
        }
    }

    #[test]
    fn queries_are_hidden_where_no_answer_can_come() {
        for (text, shown) in [
            ("/ # \x1b[6n", "/ # "),
            ("\x1b[5n\x1b[?6n\x1b[c\x1b[>0cx", "x"),
            ("\x1b[1mbold\x1b[m", "\x1b[1mbold\x1b[m"),
            ("\x1b]0;n\x07c\x1b(Bn", "\x1b]0;n\x07c\x1b(Bn"),
            ("\x1bcn", "\x1bcn"),
        ] {
            let mut screen = Screen::new(true);
            let out = written(&mut screen, text.as_bytes());
            assert_eq!(String::from_utf8(out).unwrap(), shown, "{text:?}");
        }
    }

    proptest! {
        /// Nothing but whole queries is ever held back for good, memory is bounded, and the cure is one.
        #[test]
        fn any_bytes_do(text in proptest::collection::vec(prop_oneof![
            Just(b"\x1b[".to_vec()),
            Just(b"\x1b[?1049h".to_vec()),
            Just(b"\x1b[6n".to_vec()),
            proptest::collection::vec(any::<u8>(), 0..80),
        ], 0..20)) {
            let text = text.concat();
            let mut open = Screen::new(false);
            prop_assert_eq!(&written(&mut open, &text), &text);
            let mut screen = Screen::new(true);
            let out = written(&mut screen, &text);
            prop_assert!(out.len() <= text.len() && screen.sequence.len() < LONGEST);
            let cure = open.settle();
            let mut again = Screen::new(false);
            written(&mut again, &text);
            written(&mut again, &cure);
            prop_assert!(again.settle().is_empty());
        }
    }
}
