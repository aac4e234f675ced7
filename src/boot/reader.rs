//! An input file as a stream.

use std::io::{self, Read};

use super::input::InputFile;

/// A kernel or initrd file, read in order.
pub struct FileReader<'a> {
    input: &'a InputFile,
    /// Offset of the next byte.
    at: u64,
}

impl<'a> FileReader<'a> {
    /// A reader that begins at the file's beginning.
    pub fn new(input: &'a InputFile) -> Self {
        Self { input, at: 0 }
    }
}

impl Read for FileReader<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let count = self
            .input
            .read_some(self.at, buf)
            .map_err(io::Error::other)?;
        self.at += count as u64;
        Ok(count)
    }
}
