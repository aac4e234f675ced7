//! Reading a snapshot: everything but the RAM is read, checked and decoded at once; the RAM is mapped by each VM.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kvm_bindings::{CpuId, kvm_clock_data};
use zerocopy::FromBytes;

use super::disks::SavedDisk;
use super::error::{FormatError, SnapshotError};
use super::file::{Bulk, Kind, Sections};
use super::host::HostFingerprint;
use super::record::Meta;
use super::sparse::{checksum, next_data};
use crate::arch::cpuid;
use crate::arch::state::VcpuState;
use crate::config::NetConfig;
use crate::vmm::memory::end_of_ram;
use crate::vmm::working_set::WorkingSet;

/// A snapshot, ready for any number of VMs.
pub struct Snapshot {
    /// The file's name.
    pub path: PathBuf,
    /// The file.
    pub file: Arc<File>,
    stamp: Stamp,
    /// What it says of its VM.
    pub meta: Meta,
    /// Whether it was taken on this host since this host's boot.
    pub is_from_this_host: bool,
    clock: kvm_clock_data,
    /// Whether the guest's clocks go on as if they had run since the VM was saved.
    pub is_realtime: bool,
    /// The boot vCPU first.
    pub vcpus: Vec<VcpuState>,
    /// All devices' state.
    pub devices: Vec<u8>,
    /// In their order.
    pub disks: Vec<SavedDisk>,
    /// The format's minor version.
    pub minor: u16,
    /// Where the RAM is in the file.
    pub ram: Bulk,
    /// What is known of the RAM that its VMs touch.
    pub working_set: WorkingSet,
    overlays: Vec<Bulk>,
}

/// What tells a file from another one, or from itself after a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    file: (u64, u64),
    len: u64,
    modified: (i64, i64),
}

impl Stamp {
    fn of(file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::other("it is no regular file"));
        }
        Ok(Self {
            file: (metadata.dev(), metadata.ino()),
            len: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        })
    }
}

impl Snapshot {
    /// Opens a snapshot and checks all but its RAM.
    pub fn open(path: &Path) -> Result<Self, SnapshotError> {
        let failed = |source| SnapshotError::Open(path.to_owned(), source);
        // A FIFO without a writer would be waited for.
        let mut options = OpenOptions::new();
        let file = options.read(true).custom_flags(libc::O_NONBLOCK).open(path);
        let file = file.map_err(failed)?;
        let stamp = Stamp::of(&file).map_err(failed)?;
        Self::parse(path, file, stamp)
            .map_err(|source| SnapshotError::Format(path.to_owned(), source))
    }

    fn parse(path: &Path, file: File, stamp: Stamp) -> Result<Self, FormatError> {
        let sections = Sections::read(&file, stamp.len)?;
        let meta: Meta = serde_json::from_slice(sections.one(Kind::Meta)?)
            .map_err(|e| FormatError::Section("description", e.into()))?;
        let config = &meta.config;
        config
            .validate()
            .map_err(|e| FormatError::Section("description", e.into()))?;
        let memory = config.memory.bytes;
        if memory != sections.ram.len {
            let other = sections.ram.len;
            return Err(FormatError::Unusable(format!(
                "has {other} bytes of memory for a VM of {memory}"
            )));
        }
        let kernel = &meta.kernel.kernel_range;
        if kernel.start > kernel.end || kernel.end > end_of_ram(memory) {
            return Err(FormatError::Unusable(
                "has a kernel outside of the memory".to_owned(),
            ));
        }
        let file = Arc::new(file);
        let disks = SavedDisk::all(&file, &config.disks, &meta.disks, &sections.overlays)?;
        let vcpus = sections.all(Kind::Vcpu).map(VcpuState::decode);
        let vcpus: Vec<_> = vcpus
            .collect::<Result<_, _>>()
            .map_err(|e| FormatError::Section("vCPUs", e.into()))?;
        if vcpus.len() != usize::from(config.cpus) {
            let (there, wanted) = (vcpus.len(), config.cpus);
            return Err(FormatError::Unusable(format!(
                "has the state of {there} vCPUs for a VM of {wanted}"
            )));
        }
        let clock = kvm_clock_data::read_from_bytes(sections.one(Kind::Clock)?);
        let clock = clock
            .map_err(|_| FormatError::Unusable("has a clock of another size".to_owned()))?
            .clock;
        Ok(Self {
            path: path.to_owned(),
            file,
            stamp,
            is_from_this_host: meta.host.is_same(&HostFingerprint::read()),
            clock: kvm_clock_data {
                clock,
                ..Default::default()
            },
            is_realtime: false,
            vcpus,
            devices: sections.one(Kind::Devices)?.to_vec(),
            disks,
            minor: sections.minor,
            ram: sections.ram,
            working_set: WorkingSet::default(),
            overlays: sections.overlays,
            meta,
        })
    }

    /// How far the clocks of a VM that starts now are ahead of where they stood, in nanoseconds.
    pub fn clock_advance(&self) -> u64 {
        let since = match self.is_realtime {
            true => self.age(),
            false => Duration::ZERO,
        };
        since.as_nanos().try_into().unwrap_or(0)
    }

    /// The time since the VM was saved.
    pub fn age(&self) -> Duration {
        let taken = UNIX_EPOCH + Duration::from_nanos(self.meta.taken_at_ns);
        SystemTime::now().duration_since(taken).unwrap_or_default()
    }

    /// kvm-clock for a VM that starts now.
    pub fn clock(&self) -> kvm_clock_data {
        kvm_clock_data {
            clock: self.clock.clock.saturating_add(self.clock_advance()),
            ..self.clock
        }
    }

    /// Has a restored VM use this file for a disk, which is named by its serial number or its number.
    pub fn use_for_disk(&mut self, id: &str, path: &Path) -> Result<(), SnapshotError> {
        let named = self.disks.iter().position(|disk| disk.id == id);
        let named = named.or_else(|| id.parse().ok());
        match named.and_then(|index| self.disks.get_mut(index)) {
            Some(disk) => disk.use_file(path),
            None => {
                let known: Vec<&str> = self.disks.iter().map(|disk| &*disk.id).collect();
                let known = known.join(", ");
                let known = if known.is_empty() { "none" } else { &known };
                return Err(SnapshotError::Refused(format!(
                    "the snapshot's VM has no disk {id}; it has {known}"
                )));
            }
        }
        Ok(())
    }

    /// Refuses a VM of which there can be only one. `nets` are its networks now.
    pub fn check_fork(&self, nets: &[NetConfig]) -> Result<(), SnapshotError> {
        let is_own = |net: &NetConfig| net.tap.is_none() && net.fd.is_none();
        if !nets.iter().all(|net| is_own(net) && net.publish.is_empty()) {
            return Err(SnapshotError::Refused(
                "VMs that go on side by side cannot share a TAP interface or a published port: each can have a passt of its own, \
                 without ports"
                    .into(),
            ));
        }
        match self.disks.iter().find(|disk| disk.is_written) {
            Some(disk) => Err(SnapshotError::Refused(format!(
                "the snapshot's VM writes to the disk {}: VMs that go on side by side can only share what is read-only or ephemeral",
                disk.identity.path.display()
            ))),
            None => Ok(()),
        }
    }

    /// Reads all of the RAM and of what was written to ephemeral disks, and compares it with its checksums.
    pub fn verify(&self) -> Result<(), SnapshotError> {
        let failed = |source| SnapshotError::Format(self.path.clone(), source);
        let ram = (&self.ram, "the guest's memory");
        let overlays = self.overlays.iter().map(|bulk| (bulk, "a disk's writes"));
        for (bulk, what) in std::iter::once(ram).chain(overlays) {
            let sum = checksum(&self.file, *bulk).map_err(|e| match e.kind() {
                io::ErrorKind::UnexpectedEof => failed(FormatError::Truncated),
                _ => failed(FormatError::Read(e)),
            })?;
            if sum != bulk.crc {
                return Err(failed(FormatError::Checksum(what.into())));
            }
        }
        Ok(())
    }

    /// The first run of pages of RAM at `at` or behind it that is no hole, as offsets into the RAM.
    pub(super) fn next_data(&self, at: u64) -> io::Result<Option<Range<u64>>> {
        next_data(&self.file, self.ram, at)
    }

    /// Refuses a host whose KVM supports less than the guest was told.
    pub fn check_host(&self, supported: &CpuId) -> Result<(), SnapshotError> {
        let missing = self.missing(supported);
        if missing.is_empty() {
            return Ok(());
        }
        Err(SnapshotError::Refused(format!(
            "the snapshot {} was taken on another host ({}), and this one lacks what its guest was told of: {}",
            self.path.display(),
            self.meta.processor,
            missing.join(", ")
        )))
    }

    /// What the guest was told of and this host's KVM does not support.
    pub fn missing(&self, supported: &CpuId) -> Vec<String> {
        let boot = self.vcpus.first().map_or(&[][..], VcpuState::cpuid);
        cpuid::missing_features(boot, supported)
    }

    /// Whether the file is still what it was when it was opened.
    pub fn check_unchanged(&self) -> Result<(), SnapshotError> {
        if Stamp::of(&self.file).ok() == Some(self.stamp) {
            return Ok(());
        }
        let path = self.path.display();
        let error = format!("the snapshot {path} was changed while a VM ran from it");
        Err(SnapshotError::Refused(error))
    }

    /// Whether `path` is this file.
    pub(super) fn is_file(&self, path: &Path) -> bool {
        let stat = path.metadata();
        stat.is_ok_and(|stat| (stat.dev(), stat.ino()) == self.stamp.file)
    }

    /// Its size in bytes: with the holes, and on the disk.
    pub fn size(&self) -> (u64, u64) {
        let blocks = self.file.metadata().map_or(0, |metadata| metadata.blocks());
        (self.stamp.len, blocks * 512)
    }
}
