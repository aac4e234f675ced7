//! Writing a snapshot of a paused VM.

use std::env;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use minivmm_devices::virtio::blk::Block;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, linkat, open, renameat, unlinkat};
use rustix::io::Errno;
use tempfile::NamedTempFile;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};
use zerocopy::IntoBytes;

use super::disks::{identities, write_overlays};
use super::error::{SnapshotError, failed};
use super::file::{Bulk, Front, Kind, PAGE_SIZE};
use super::host::HostFingerprint;
use super::load::Snapshot;
use super::record::Meta;
use super::sparse::{SparseChecksum, is_zero};
use crate::arch::state::{StateSupport, VcpuState};
use crate::host::cpu::Cpu;
use crate::vmm::prepare::{Origin, Prepared};
use crate::vmm::vm::Vm;

/// How long devices may take to complete their requests.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);
/// Most bytes of RAM that are written at once; between two writes, a request to stop is looked for.
const WRITE_MAX: usize = 1 << 20;

/// A page's entry in /proc/self/pagemap says with these bits that the page is in memory or swapped out
/// (Documentation/admin-guide/mm/pagemap.rst).
const PAGE_EXISTS: u64 = 1 << 63 | 1 << 62;

/// A file that a snapshot will be written to. Until [`Target::publish`] it has no name, and what has the name stays as it is.
pub struct Target {
    path: PathBuf,
    file: Unpublished,
    pagemap: Option<File>,
    /// Where relative paths of disks begin.
    dir: PathBuf,
    host: HostFingerprint,
    processor: String,
}

enum Unpublished {
    /// A file without a name, which is gone when the process is.
    Nameless(File),
    /// Where the file system has no such files.
    Named(NamedTempFile),
}

impl Unpublished {
    fn file(&self) -> &File {
        match self {
            Self::Nameless(file) => file,
            Self::Named(file) => file.as_file(),
        }
    }
}

impl Target {
    /// Opens the file, and whatever else is needed to write it. A VM that was restored names its `source`.
    pub fn create(path: &Path, source: Option<&Snapshot>) -> Result<Self, SnapshotError> {
        if source.is_some_and(|source| source.is_file(path)) {
            return Err(SnapshotError::Refused(format!(
                "cannot write a snapshot to {}: the VM runs from this file; name another",
                path.display()
            )));
        }
        let file = create(path).map_err(unwritten(path))?;
        Ok(Self {
            path: path.to_owned(),
            file,
            // Without it, all of the RAM is read.
            pagemap: File::open("/proc/self/pagemap").ok(),
            dir: env::current_dir().unwrap_or_default(),
            host: HostFingerprint::read(),
            processor: Cpu::read().model,
        })
    }

    /// Writes the state of `vm`, which is held at boot mark `mark`. `stop` says that it is no longer wanted. Nothing of the VM is
    /// needed afterwards: its devices go on with [`Vm::resume_devices`].
    pub fn write(
        &mut self,
        vm: &Vm,
        mark: u8,
        stop: &dyn Fn() -> bool,
    ) -> Result<(), SnapshotError> {
        let devices = &vm.machine().state;
        match devices.pause(DRAIN_LIMIT, stop) {
            Ok(()) => self.write_paused(vm, mark, stop),
            Err(_) if stop() => Err(SnapshotError::Refused("it was stopped".into())),
            Err(e) => Err(failed("save the devices")(e)),
        }
    }

    fn write_paused(
        &mut self,
        vm: &Vm,
        mark: u8,
        stop: &dyn Fn() -> bool,
    ) -> Result<(), SnapshotError> {
        let (parts, disks) = (vm.parts(), &vm.machine().disks);
        // A file that relies on what the guest has written is no more durable than that. This may take long, and the clocks run.
        let flushed = disks.iter().try_for_each(|disk| disk.flush());
        flushed.map_err(failed(
            "make durable what the guest has written to its disks",
        ))?;
        // Completions have sent their interrupts, so the local APICs are final.
        let devices = vm.machine().state.save();
        let devices = devices.map_err(failed("save the devices"))?;
        let vcpus = save_vcpus(vm)?;
        let clock = parts.fd.get_clock().map_err(failed("read kvm-clock"))?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let meta = Meta {
            writer: format!("minivmm {}", env!("CARGO_PKG_VERSION")),
            taken_at_ns: now.map_or(0, |now| now.as_nanos() as u64),
            mark,
            generation: 1 + match &parts.origin {
                Origin::Boot(_) => 0,
                Origin::Snapshot(snapshot, _) => snapshot.meta.generation,
            },
            config: vm.config().clone(),
            disks: identities(disks, &self.dir).map_err(self.unwritten())?,
            cmdline: vm.cmdline().to_owned(),
            kernel: vm.kernel().clone(),
            host: self.host.clone(),
            processor: self.processor.clone(),
        };
        let meta = serde_json::to_vec(&meta).map_err(failed("describe the VM"))?;
        let mut sections = vec![
            (Kind::Meta, meta),
            (Kind::Clock, clock.as_bytes().to_vec()),
            (Kind::Devices, devices),
        ];
        sections.extend(vcpus.iter().map(|state| (Kind::Vcpu, state.encode())));
        let front = Front::new(&sections).map_err(failed("describe the VM"))?;
        let file = self.file.file();
        let write = || {
            let ram = self.write_ram(vm, front.ram_offset, stop)?;
            let overlays = write_overlays(disks, file, ram.offset + ram.len, stop)?;
            file.write_all_at(&front.finish(ram, &overlays), 0)
        };
        write().map_err(self.unwritten())
    }

    /// Writes each page that is not zero; returns where.
    fn write_ram(&self, vm: &Vm, offset: u64, stop: &dyn Fn() -> bool) -> io::Result<Bulk> {
        let source = match &vm.parts().origin {
            Origin::Boot(_) => None,
            Origin::Snapshot(snapshot, _) => Some(&**snapshot),
        };
        let len: u64 = vm.mem().iter().map(GuestMemoryRegion::len).sum();
        self.file.file().set_len(offset + len)?;
        let mut writer = RamWriter {
            file: self.file.file(),
            offset,
            sum: SparseChecksum::default(),
        };
        let mut start = 0;
        for region in vm.mem().iter() {
            let pages = self.candidates(region, start, source);
            writer.write_region(region, start, &pages, stop)?;
            start += region.len();
        }
        let crc = writer.sum.finish();
        Ok(Bulk { offset, len, crc })
    }

    /// The pages of a region that may have a byte that is not zero, each as `true`. `start` is where the region begins in the RAM.
    fn candidates(
        &self,
        region: &GuestRegionMmap,
        start: u64,
        source: Option<&Snapshot>,
    ) -> Vec<bool> {
        let count = (region.len() / PAGE_SIZE) as usize;
        let mut entries = vec![0u64; count];
        let at = region.as_ptr() as u64 / PAGE_SIZE * 8;
        let read = self
            .pagemap
            .as_ref()
            .is_some_and(|pagemap| pagemap.read_exact_at(entries.as_mut_bytes(), at).is_ok());
        if !read {
            return vec![true; count];
        }
        let exists = |entry: &u64| entry & PAGE_EXISTS != 0;
        let mut pages: Vec<bool> = entries.iter().map(exists).collect();
        let Some(source) = source else { return pages };
        // What was not touched since the restore is in the file.
        let (mut at, end) = (start, start + region.len());
        let page = |offset: u64| ((offset.clamp(start, end) - start) / PAGE_SIZE) as usize;
        while at < end {
            match source.next_data(at) {
                Ok(Some(data)) => {
                    let run = pages.get_mut(page(data.start)..page(data.end));
                    run.unwrap_or_default().fill(true);
                    at = data.end;
                }
                Ok(None) => break,
                Err(_) => return vec![true; count],
            }
        }
        pages
    }

    /// Gives the written file its name, in place of what has it, after what `finish` does to it.
    pub fn publish(
        self,
        finish: impl FnOnce(&File) -> io::Result<()>,
    ) -> Result<PathBuf, SnapshotError> {
        let unwritten = self.unwritten();
        let publish = || {
            finish(self.file.file())?;
            match self.file {
                Unpublished::Nameless(file) => link(&file, &self.path),
                Unpublished::Named(file) => Ok(file.persist(&self.path).map(drop)?),
            }
        };
        publish().map_err(unwritten)?;
        Ok(self.path)
    }

    fn unwritten(&self) -> impl Fn(io::Error) -> SnapshotError + use<> {
        unwritten(&self.path)
    }
}

/// Refuses to write a snapshot of a VM in place of a file that it uses.
pub fn check_unused(path: &Path, vm: &Prepared) -> Result<(), SnapshotError> {
    let inode = |path: &Path| path.metadata().ok().map(|stat| (stat.dev(), stat.ino()));
    let Some(file) = inode(path) else {
        return Ok(());
    };
    let is_disk = |disk: &Block| disk.disk().identity().is_ok_and(|id| id.inode == file);
    let is_file = |path: &PathBuf| inode(path) == Some(file);
    // What a restored VM was booted from is in its memory.
    let boots = matches!(vm.origin, Origin::Boot(_));
    let what = if vm.disks.iter().any(is_disk) {
        "disk"
    } else if boots && is_file(&vm.config.kernel) {
        "kernel"
    } else if boots && vm.config.initrd.as_ref().is_some_and(is_file) {
        "initrd"
    } else {
        return Ok(());
    };
    Err(SnapshotError::Refused(format!(
        "cannot write a snapshot to {}: this file is the VM's {what}; name another",
        path.display()
    )))
}

fn unwritten(path: &Path) -> impl Fn(io::Error) -> SnapshotError + use<> {
    let path = path.to_owned();
    move |source| SnapshotError::Write(path.clone(), source)
}

fn save_vcpus(vm: &Vm) -> Result<Vec<VcpuState>, SnapshotError> {
    let parts = vm.parts();
    let support = StateSupport::of(&parts.kvm);
    let save = |(index, vcpu): (u8, &crate::vmm::vcpu::RunningVcpu)| {
        let handle = vcpu.handle(&parts.fd);
        let handle = handle.map_err(failed("get at a vCPU"))?;
        let state = VcpuState::save(&handle, &parts.kvm, &support);
        state.map_err(failed(format!("read the state of vCPU {index}")))
    };
    (0..).zip(vm.running()).map(save).collect()
}

struct RamWriter<'a> {
    file: &'a File,
    /// Where the RAM begins in the file.
    offset: u64,
    sum: SparseChecksum,
}

impl RamWriter<'_> {
    fn write_region(
        &mut self,
        region: &GuestRegionMmap,
        start: u64,
        candidates: &[bool],
        stop: &dyn Fn() -> bool,
    ) -> io::Result<()> {
        #[allow(unsafe_code, reason = "guest memory as a slice")]
        // SAFETY: the mapping lives as long as `region`, and nobody writes to it: vCPUs and devices are paused.
        let ram = unsafe { std::slice::from_raw_parts(region.as_ptr(), region.len() as usize) };
        let mut run = 0..0;
        let pages = ram.chunks(PAGE_SIZE as usize);
        for ((number, page), candidate) in (0usize..).zip(pages).zip(candidates) {
            if !candidate || is_zero(page) {
                continue;
            }
            self.sum.add(start / PAGE_SIZE + number as u64, page);
            let at = number * PAGE_SIZE as usize;
            if run.end != at || run.len() >= WRITE_MAX {
                self.flush(ram, &run, start)?;
                run = at..at;
                if stop() {
                    return Err(io::Error::other("it was stopped"));
                }
            }
            run.end = at + page.len();
        }
        self.flush(ram, &run, start)
    }

    fn flush(&self, ram: &[u8], run: &std::ops::Range<usize>, start: u64) -> io::Result<()> {
        let bytes = ram.get(run.clone()).unwrap_or_default();
        let at = self.offset + start + run.start as u64;
        self.file.write_all_at(bytes, at)
    }
}

/// The directory that a snapshot of this name will be in.
pub fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    }
}

/// The directory of a path, and the name in it.
fn split(path: &Path) -> io::Result<(&Path, &OsStr)> {
    let name = path.file_name();
    let name = name.ok_or_else(|| io::Error::other("it is no file's name"))?;
    Ok((directory(path), name))
}

fn create(path: &Path) -> io::Result<Unpublished> {
    let (dir, _) = split(path)?;
    if path.symlink_metadata().is_ok_and(|there| !there.is_file()) {
        return Err(io::Error::other("it is there, and is no regular file"));
    }
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    match open(dir, flags, Mode::RUSR | Mode::WUSR) {
        Ok(fd) => Ok(Unpublished::Nameless(fd.into())),
        Err(Errno::OPNOTSUPP | Errno::ISDIR) => Ok(Unpublished::Named(
            // Readable and writable by its owner alone.
            tempfile::Builder::new()
                .prefix(".minivmm-")
                .tempfile_in(dir)?,
        )),
        Err(e) => Err(e.into()),
    }
}

/// Gives a nameless file this name.
fn link(file: &File, path: &Path) -> io::Result<()> {
    let own = format!("/proc/self/fd/{}", file.as_raw_fd());
    let (dir, name) = split(path)?;
    match linkat(CWD, &own, CWD, path, AtFlags::SYMLINK_FOLLOW) {
        Err(Errno::EXIST) => {}
        result => return Ok(result?),
    }
    // A link replaces nothing, a rename does.
    let mut aside = OsStr::new(".").to_owned();
    aside.push(name);
    aside.push(format!(".{}", std::process::id()));
    let aside = dir.join(aside);
    let link_aside = || linkat(CWD, &own, CWD, &aside, AtFlags::SYMLINK_FOLLOW);
    link_aside().or_else(|e| match e {
        Errno::EXIST => {
            // A process of the same ID was killed before it renamed the file: IDs come again, in containers soon.
            unlinkat(CWD, &aside, AtFlags::empty())?;
            link_aside()
        }
        e => Err(e),
    })?;
    renameat(CWD, &aside, CWD, path).inspect_err(|_| {
        // It failed already; what is left over is best effort.
        let _ = unlinkat(CWD, &aside, AtFlags::empty());
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;

    use super::*;

    #[test]
    fn what_a_killed_process_left_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("snapshot");
        let left = format!(".snapshot.{}", std::process::id());
        fs::write(&path, "old").unwrap();
        fs::write(dir.path().join(left), "half").unwrap();
        // Elsewhere no file is put aside.
        if let Unpublished::Nameless(mut file) = create(&path).unwrap() {
            file.write_all(b"new").unwrap();
            link(&file, &path).unwrap();
            assert_eq!(fs::read(&path).unwrap(), b"new");
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        }
    }
}
