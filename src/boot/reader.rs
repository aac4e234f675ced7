//! An input file as a stream.

use std::io::{self, Read};

use super::input::InputFile;

/// A kernel or initrd file, read in order from an offset.
pub struct FileReader<'a> {
    input: &'a InputFile,
    /// Offset of the next byte.
    pub at: u64,
}

impl<'a> FileReader<'a> {
    /// A reader that begins at offset `at`.
    pub fn new(input: &'a InputFile, at: u64) -> Self {
        Self { input, at }
    }

    /// Skips bytes without reading them.
    pub fn skip(&mut self, count: u64) -> io::Result<()> {
        self.at = self.at.saturating_add(count);
        if self.at > self.input.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(())
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
