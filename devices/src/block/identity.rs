//! Which file a disk is: what a snapshot keeps of a disk whose data it does not hold.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// A disk's file when it was saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskIdentity {
    /// Where it was opened. This is a hint: a snapshot of foreign origin may name any file.
    pub path: PathBuf,
    /// Length in bytes.
    pub len: u64,
    /// Last change in seconds since 1970, and nanoseconds.
    pub modified: (i64, i64),
    /// The device that it is on, and its number there.
    pub inode: (u64, u64),
}

impl DiskIdentity {
    pub(super) fn new(path: &Path, len: u64, metadata: &Metadata) -> Self {
        Self {
            path: path.to_owned(),
            len,
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            inode: (metadata.dev(), metadata.ino()),
        }
    }

    /// What is different, but for the path, from a file of which this was saved. Empty if it is the same, unchanged.
    pub fn differences(&self, now: &Self) -> Vec<String> {
        let mut differences = Vec::new();
        if self.len != now.len {
            differences.push(format!("it had {} bytes and has {}", self.len, now.len));
        }
        if self.inode != now.inode {
            differences.push("it is another file".into());
        }
        if self.modified != now.modified {
            differences.push("it was written to since".into());
        }
        differences
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Disk, DiskMode};

    #[test]
    fn a_disk_that_has_changed_is_not_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let identity = || {
            let disk = Disk::open(&path, DiskMode::ReadOnly).unwrap();
            disk.identity().unwrap()
        };
        std::fs::write(&path, [1; 1024]).unwrap();
        let file = std::fs::File::open(&path).unwrap();
        let saved = identity();
        assert_eq!(saved.differences(&identity()), [""; 0]);
        let json = serde_json::to_string(&saved).unwrap();
        assert_eq!(saved, serde_json::from_str(&json).unwrap());
        file.set_modified(std::time::UNIX_EPOCH).unwrap();
        assert_eq!(saved.differences(&identity()), ["it was written to since"]);
        std::fs::rename(&path, dir.path().join("old")).unwrap();
        std::fs::write(&path, [1; 512]).unwrap();
        assert_eq!(
            saved.differences(&identity())[..2],
            ["it had 1024 bytes and has 512", "it is another file"]
        );
    }
}
