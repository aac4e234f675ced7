//! What goes through hvc0, or a connection of the socket device, in both directions: frames of one byte that says what it is, two that say how long it is, least
//! significant first, and the content.

/// To the guest: input; an empty frame is its end. No more than [`WINDOW`] bytes are under way.
pub const INPUT: u8 = 1;
/// To the guest: rows and columns of the terminal, two bytes each, least significant first.
pub const RESIZE: u8 = 2;
/// To the guest: a signal for the program, one byte.
pub const SIGNAL: u8 = 3;
/// To the host: output.
pub const OUTPUT: u8 = 4;
/// To the host: output to stderr.
pub const ERROR: u8 = 5;
/// To the host: how many bytes of input the program has been given, in four bytes, least significant first. The first
/// one says that it is ready for frames: hvc0 would change bytes before that, as a terminal does.
pub const TAKEN: u8 = 6;

/// To the host: the exit status of a program that was run beside the image's own, one byte. It is the last frame.
pub const STATUS: u8 = 7;

/// Bytes of a frame without its content.
pub const HEADER: usize = 3;
/// Bytes of input that may be on their way to the program.
pub const WINDOW: usize = 64 << 10;

/// A frame.
pub fn frame(kind: u8, content: &[u8]) -> Vec<u8> {
    let length = u16::try_from(content.len()).unwrap_or(u16::MAX);
    let content = content.get(..usize::from(length)).unwrap_or(content);
    [&[kind], &length.to_le_bytes()[..], content].concat()
}
