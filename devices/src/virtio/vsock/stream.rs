//! The host's streams: their first line, and their bytes in guest memory.

use std::io;
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use vm_memory::VolatileMemoryError;

/// Longest CONNECT line in bytes.
const MAX_LINE: usize = 32;

/// Has a call made again that a signal broke off.
pub(super) fn retry(
    mut call: impl FnMut() -> Result<usize, VolatileMemoryError>,
) -> io::Result<usize> {
    loop {
        match call() {
            Err(VolatileMemoryError::IOError(e)) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(VolatileMemoryError::IOError(e)) => return Err(e),
            Err(e) => return Err(io::Error::other(e)),
            Ok(count) => return Ok(count),
        }
    }
}

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
