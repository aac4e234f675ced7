//! Who could have written a file.

use std::fs::{DirBuilder, File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::process::geteuid;

/// Whether this user owns the file or directory and no other may write to it.
pub fn is_ours(metadata: &Metadata) -> bool {
    metadata.uid() == geteuid().as_raw() && metadata.mode() & 0o022 == 0
}

/// Opens a directory that only this user can write to, and creates it if necessary.
pub fn open_own_dir(path: &Path) -> io::Result<File> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    let dir = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW)
        .open(path)?;
    if is_ours(&dir.metadata()?) {
        Ok(dir)
    } else {
        Err(io::Error::other(
            "it belongs to another user, or others may write to it",
        ))
    }
}
