//! The disks of a snapshot's VM. The file holds what was written to the ephemeral ones; of the others, and of what is below an
//! ephemeral one, it only says which file that was.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use minivmm_devices::block::{Disk, DiskIdentity, DiskOptions};

use super::error::{FormatError, SnapshotError};
use super::file::Bulk;
use super::sparse::checksum;
use crate::config::DiskConfig;
use crate::host::ownership::is_ours;

/// A disk as it was when its VM was saved.
pub struct SavedDisk {
    /// Its serial number, or its place among the disks if it has none.
    pub id: String,
    /// Which file it was.
    pub identity: DiskIdentity,
    /// What was written to it, if it is ephemeral, and where that is.
    overlay: Option<(Arc<File>, Bulk)>,
    /// Whether its VM writes to the file.
    pub(super) is_written: bool,
    /// Whether the path in the snapshot may be opened.
    path_is_trusted: bool,
    /// What the user has named in its place.
    named: Option<PathBuf>,
}

impl SavedDisk {
    /// The disks of a snapshot that is `file`, with what it says of them.
    pub(super) fn all(
        file: &Arc<File>,
        configs: &[DiskConfig],
        identities: &[DiskIdentity],
        overlays: &[Bulk],
    ) -> Result<Vec<Self>, FormatError> {
        let ephemeral = configs.iter().filter(|config| config.ephemeral).count();
        if configs.len() != identities.len() || ephemeral != overlays.len() {
            return Err(FormatError::Unusable(format!(
                "has {} files and the writes of {} disks for a VM with {} disks, of which {ephemeral} are ephemeral",
                identities.len(),
                overlays.len(),
                configs.len(),
            )));
        }
        // Who else could have written the file could have named any other in it.
        let metadata = file.metadata().map_err(FormatError::Read)?;
        let path_is_trusted = is_ours(&metadata);
        let mut overlays = overlays.iter();
        let disks = configs.iter().zip(identities).enumerate();
        let disk = |(index, (config, identity)): (usize, (&DiskConfig, &DiskIdentity))| Self {
            id: config.id.clone().unwrap_or_else(|| index.to_string()),
            identity: identity.clone(),
            overlay: (config.ephemeral.then(|| overlays.next()).flatten())
                .map(|overlay| (Arc::clone(file), *overlay)),
            is_written: !config.ephemeral && !config.read_only,
            path_is_trusted,
            named: None,
        };
        Ok(disks.map(disk).collect())
    }

    /// Takes the file that the user names, which is trusted to hold what the VM left.
    pub fn use_file(&mut self, path: &Path) {
        self.named = Some(path.to_owned());
    }

    /// Opens it again, for one VM. A file that the user has not named must be the same, unchanged; one that was named, as long.
    pub(crate) fn open(&self, options: DiskOptions) -> Result<Disk, SnapshotError> {
        let path = self.named.as_ref().unwrap_or(&self.identity.path);
        let failed = |source| SnapshotError::Disk(self.id.clone(), path.clone(), source);
        if self.named.is_none() && !self.path_is_trusted {
            let why = "the snapshot is another user's, or others can write to it: files that it names are not opened";
            return Err(failed(why.into()));
        }
        let options = DiskOptions {
            // It was raw, whatever its guest has written since.
            force_raw: options.force_raw || self.named.is_none(),
            ..options
        };
        let mut disk = Disk::open(path, options).map_err(|e| failed(e.into()))?;
        let now = disk.identity().map_err(|e| failed(e.into()))?;
        let mut wanted = self.identity.clone();
        if self.named.is_some() {
            (wanted.modified, wanted.inode) = (now.modified, now.inode);
            if wanted.len == 0 {
                // An empty disk may get any content: its driver is told.
                wanted.len = now.len;
            }
        }
        let differences = wanted.differences(&now);
        if !differences.is_empty() {
            return Err(failed(differences.join(", ").into()));
        }
        if let Some((file, overlay)) = &self.overlay {
            let restored = disk.restore_overlay(Arc::clone(file), overlay.offset, overlay.len);
            restored.map_err(|e| failed(e.into()))?;
        }
        Ok(disk)
    }
}

/// Which files the disks are. A relative path is one from `dir`.
pub(super) fn identities(disks: &[Arc<Disk>], dir: &Path) -> io::Result<Vec<DiskIdentity>> {
    let identity = |disk: &Arc<Disk>| {
        let identity = disk.identity().map_err(io::Error::other)?;
        let path = dir.join(&identity.path);
        Ok(DiskIdentity { path, ..identity })
    };
    disks.iter().map(identity).collect()
}

/// Writes what the ephemeral disks hold to the file, one behind the other, from `at` on.
pub(super) fn write_overlays(
    disks: &[Arc<Disk>],
    file: &File,
    mut at: u64,
    stop: &dyn Fn() -> bool,
) -> io::Result<Vec<Bulk>> {
    let mut overlays = Vec::new();
    for disk in disks {
        let len = disk.save_overlay(file, at, stop)?;
        if len > 0 {
            let (offset, crc) = (at, 0);
            let mut overlay = Bulk { offset, len, crc };
            overlay.crc = checksum(file, overlay)?;
            overlays.push(overlay);
        }
        at += len;
    }
    Ok(overlays)
}
