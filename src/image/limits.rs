//! What an image may have at most. Images are foreign: these bound the memory and the disk that one can take.

use std::io;

/// Bytes of all files in all layers, unpacked, and so of one file.
pub(super) const MAX_IMAGE_BYTES: u64 = 32 << 30;
/// Members of all layers, and files and directories of the image: a member's path can make directories.
pub(super) const MAX_MEMBERS: usize = 1_000_000;
/// Directories below one another.
pub(super) const MAX_DEPTH: usize = 128;
/// Bytes of a path (PATH_MAX).
pub(super) const MAX_PATH: usize = 4096;
/// Bytes of a name (NAME_MAX).
pub(super) const MAX_NAME: usize = 255;
/// Bytes of a file's extended attributes, names and values.
pub(super) const MAX_XATTRS: usize = 64 << 10;
/// Bytes that all names, links, directories and extended attributes of the tree take in memory.
pub(super) const MAX_METADATA: usize = 256 << 20;
/// Symbolic links on the way to a file, as in Linux (MAXSYMLINKS).
pub(super) const MAX_SYMLINKS: usize = 40;
/// Layers of an image.
pub(super) const MAX_LAYERS: usize = 512;
/// Bytes of an index, manifest or configuration.
pub(super) const MAX_JSON: u64 = 4 << 20;
/// Indexes that name one another.
pub(super) const MAX_INDEXES: usize = 8;

/// An error that says what is wrong with an image.
pub(super) fn bad(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}
