//! Opens files for output.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

/// Opens or creates the file without truncating it. Does not wait for the reader of a FIFO.
pub fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(|error| match error.raw_os_error() {
            Some(libc::ENXIO) => {
                io::Error::other(if path.metadata().is_ok_and(|m| m.file_type().is_fifo()) {
                    "nobody reads this FIFO; start its reader first"
                } else {
                    "it is a socket or a device without a driver"
                })
            }
            _ => error,
        })
}
