//! Files that are this user's alone, and directories of them.

use std::fs::{DirBuilder, File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{AtFlags, Dir, statat, unlinkat};
use rustix::io::Errno;
use rustix::process::geteuid;

/// Whether this user owns the file or directory and no other may write to it.
pub fn is_ours(metadata: &Metadata) -> bool {
    metadata.uid() == geteuid().as_raw() && metadata.mode() & 0o022 == 0
}

/// Whether this open file is the one that has this path now.
pub fn is_at(file: &File, path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|there| {
        file.metadata()
            .is_ok_and(|ours| (ours.dev(), ours.ino()) == (there.dev(), there.ino()))
    })
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

/// Removes from a cache what was made or used least recently beyond these limits, files that killed writers have left among it.
/// Files without a name of the cache's own are neither counted nor removed.
pub fn tidy(
    dir: &File,
    is_own_name: impl Fn(&[u8]) -> bool,
    max_files: usize,
    max_bytes: u64,
) -> io::Result<()> {
    let mut files = Vec::new();
    for file in Dir::read_from(dir)? {
        let file = file?;
        let name = file.file_name();
        if !is_own_name(name.to_bytes()) {
            continue;
        }
        // Another process may have removed it already.
        if let Ok(stat) = statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
            let size = u64::try_from(stat.st_blocks).unwrap_or(0) * 512;
            files.push((stat.st_ctime, stat.st_ctime_nsec, size, name.to_owned()));
        }
    }
    files.sort();
    let mut bytes = 0u64;
    for (count, (.., size, name)) in files.iter().rev().enumerate() {
        bytes = bytes.saturating_add(*size);
        if count >= max_files || (count > 0 && bytes > max_bytes) {
            match unlinkat(dir, name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
    Ok(())
}
