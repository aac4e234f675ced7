//! The first line of the host's streams.

use std::io;
use std::os::unix::net::UnixStream;

use rustix::io::Errno;

/// Longest CONNECT line in bytes.
const MAX_LINE: usize = 32;

/// Reads to the end of the line and no byte more, since what follows is the guest's; `false` if it has not come yet.
pub(super) fn read_line(stream: &UnixStream, line: &mut Vec<u8>) -> io::Result<bool> {
    while line.len() < MAX_LINE {
        let mut byte = [0];
        match rustix::io::read(stream, &mut byte) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => line.extend(byte),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(false),
            Err(e) => return Err(e.into()),
        }
        if byte == *b"\n" {
            return Ok(true);
        }
    }
    Err(io::ErrorKind::InvalidData.into())
}

/// The port of a line `CONNECT PORT`, as Firecracker reads it.
pub(super) fn parse_connect(line: &[u8]) -> Option<u32> {
    let mut words = str::from_utf8(line).ok()?.split_whitespace();
    let is_connect = words.next()?.eq_ignore_ascii_case("connect");
    is_connect.then(|| words.next()?.parse().ok()).flatten()
}
