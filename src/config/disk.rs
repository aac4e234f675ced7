//! A disk: the value of `--disk`.

use std::path::PathBuf;
use std::str::FromStr;

use super::list::{for_each_key, number};
use minivmm_devices::block::Engine;
use minivmm_devices::virtio::blk::{MAX_ID_LEN, MAX_QUEUES};
use serde::{Deserialize, Serialize};

/// How a disk is written on the command line.
const DISK_SYNTAX: &str = "path=FILE[,ro][,ephemeral][,format=raw][,sector=512|4096][,id=SERIAL][,queues=N]\
                           [,engine=io_uring|sync]";

/// The format of a disk's file. The only one is raw. It must be given for a file that looks like another format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    /// The file's bytes are the disk's.
    Raw,
}

/// A disk. Written as its help says.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DiskConfig {
    /// Raw image or block device of the host.
    pub path: PathBuf,
    /// Whether the guest may only read it.
    #[serde(rename = "ro")]
    pub read_only: bool,
    /// Whether what the guest writes goes to a temporary file and not to [`DiskConfig::path`].
    pub ephemeral: bool,
    /// Its format, if given.
    pub format: Option<DiskFormat>,
    /// Bytes in a logical block, 512 or 4096; without it, the block device's own, and 512 in a file.
    pub sector: Option<u32>,
    /// Serial number, by which a guest may find it.
    pub id: Option<String>,
    /// Number of queues; by default one per vCPU, up to [`MAX_QUEUES`].
    pub queues: Option<u16>,
    /// How the host's file is read and written; without it, through io_uring but for an ephemeral disk.
    pub engine: Option<Engine>,
}

impl DiskConfig {
    pub(super) fn validate(&self) -> Result<(), String> {
        if self.path.as_os_str().is_empty() {
            return Err("no file: write path=FILE".into());
        }
        if self.ephemeral && self.read_only {
            return Err("ephemeral and ro exclude each other: an ephemeral disk is writable, and its changes are discarded with the VM".into());
        }
        if self.ephemeral && self.engine == Some(Engine::IoUring) {
            return Err(
                "ephemeral and engine=io_uring: an ephemeral disk supports only engine=sync".into(),
            );
        }
        if let Some(sector) = self.sector
            && ![512, 4096].contains(&sector)
        {
            return Err(format!(
                "sector={sector}: a disk has sectors of 512 or 4096 bytes"
            ));
        }
        if let Some(queues) = self.queues
            && !(1..=MAX_QUEUES).contains(&queues)
        {
            return Err(format!(
                "queues={queues}: a disk has 1 to {MAX_QUEUES} queues"
            ));
        }
        match &self.id {
            Some(id) if !(1..=MAX_ID_LEN).contains(&id.len()) => Err(format!(
                "id '{id}' has {} bytes: a serial number has 1 to {MAX_ID_LEN}",
                id.len()
            )),
            Some(id) if !id.bytes().all(|b| b.is_ascii_graphic()) => Err(format!(
                "id '{}': a serial number has only letters, digits and punctuation",
                id.escape_default()
            )),
            _ => Ok(()),
        }
    }
}

impl FromStr for DiskConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut config = Self::default();
        for_each_key(text, &[], |part, key, value| {
            match (key, value) {
                ("path", Some(value)) => config.path = value.into(),
                ("ro", None) => config.read_only = true,
                ("ephemeral", None) => config.ephemeral = true,
                ("format", Some("raw")) => config.format = Some(DiskFormat::Raw),
                ("format", _) => {
                    return Err(format!(
                        "'{part}': disks are raw; convert others (qemu-img convert -O raw), or write format=raw"
                    ));
                }
                ("sector", Some(value)) => config.sector = Some(number(part, value)?),
                ("id", Some(value)) => config.id = Some(value.into()),
                ("queues", Some(value)) => config.queues = Some(number(part, value)?),
                ("engine", Some("io_uring")) => config.engine = Some(Engine::IoUring),
                ("engine", Some("sync")) => config.engine = Some(Engine::Sync),
                ("engine", _) => {
                    return Err(format!("'{part}': write engine=io_uring or engine=sync"));
                }
                _ => {
                    return Err(format!(
                        "'{part}' is not known; write {DISK_SYNTAX} (a path with a comma can be given in a \
                         configuration file)"
                    ));
                }
            }
            Ok(())
        })?;
        config.validate()?;
        Ok(config)
    }
}
