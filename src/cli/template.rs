//! The templates of `run`: snapshots of VMs in which the first process waits for its orders, in the user's cache.
//!
//! A template is found by a digest of all that it was made from, and used on the host and in the boot of the host in which it was made.
//! It need not outlive that boot, but is synced: what the host fails to write later would be zeroes. What was written to since has
//! another modification time, and is not used.

use std::fs::{File, FileTimes};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use rustix::fs::{MemfdFlags, memfd_create};
use vmm_sys_util::eventfd::EventFd;

use super::confine;
use super::run::RunError;
use crate::boot;
use crate::config::{ConsoleTarget, DiskConfig, NetConfig, VmConfig, VsockConfig};
use crate::console::Console;
use crate::error_chain;
use crate::guest::{Setup, TEMPLATE_MARK};
use crate::host::ownership::{is_ours, open_own_dir, tidy};
use crate::image::Digest;
use crate::run::{descriptor, ingredients, initramfs};
use crate::sandbox::Role;
use crate::vmm::error::{VmError, host};
use crate::vmm::event_loop::EventLoop;
use crate::vmm::networks::Networks;
use crate::vmm::outcome::Outcome;
use crate::vmm::prepare::{BuildTimes, Prepared};
use crate::vmm::snapshot::load::Snapshot;
use crate::vmm::snapshot::save::Target;
use crate::vmm::vm::{ConsoleEnds, Observers, Vm};
use crate::vmm::working_set::WorkingSet;

/// Limits of the cache: number of files, of which each template has two, and bytes on disk. Those that were not used for longest go
/// first.
const MAX_FILES: usize = 16;
const MAX_BYTES: u64 = 1 << 30;
/// What follows a template's name in that of the file that says which pages its VMs touch.
const PAGES: &str = "pages";
/// When a template was last written to, as its modification time says.
const UNTOUCHED: SystemTime = UNIX_EPOCH;

/// The template for `config`, which is made if it is not there; `None` if it cannot be had, which is said.
pub(super) fn get(config: &VmConfig) -> Option<Snapshot> {
    match get_or_make(config) {
        Ok(template) => Some(template),
        Err(e) => {
            // Where the fault is with no file, a VM that boots meets it too.
            let level = match e {
                RunError::Vm(VmError::Snapshot(_) | VmError::Host(..)) => log::Level::Warn,
                _ => log::Level::Info,
            };
            let why = error_chain(&e);
            log::log!(level, "there is no template, so the VM boots: {why}");
            None
        }
    }
}

fn get_or_make(config: &VmConfig) -> Result<Snapshot, RunError> {
    let failed = || host("the directory of templates");
    let none = || io::Error::other("there is no place for it: set XDG_CACHE_HOME or HOME");
    let cache = boot::cache_dir().ok_or_else(none).map_err(failed())?;
    let dir = cache.join("templates-v1");
    let opened = open_own_dir(&dir).map_err(failed())?;
    let config = of_any_image(config);
    let path = dir.join(name(&config).map_err(host("what a template is made from"))?);
    if path.exists() {
        match open(&path) {
            Ok(template) => {
                log::info!("going on from the template {}", path.display());
                return Ok(template);
            }
            Err(e) => log::info!("the template is made anew: {}", error_chain(&e)),
        }
    }
    let begin = Instant::now();
    make(config, &path)?;
    log::info!(
        "made the template {} in {:.1?}",
        path.display(),
        begin.elapsed()
    );
    tidy(&opened, is_own_name, MAX_FILES, MAX_BYTES).map_err(failed())?;
    open(&path)
}

/// The same VM without what differs from one image, or one run, to the next: its disk is empty.
fn of_any_image(config: &VmConfig) -> VmConfig {
    let (disks, nets) = (config.disks.iter(), config.nets.iter());
    let disks = disks.map(|disk| DiskConfig {
        path: Default::default(),
        ..disk.clone()
    });
    let nets = nets.map(|net| NetConfig {
        fixed_address: net.fixed_address,
        ..NetConfig::default()
    });
    let vsock = config.vsock.as_ref().map(|vsock| VsockConfig {
        path: None,
        ..vsock.clone()
    });
    VmConfig {
        disks: disks.collect(),
        nets: nets.collect(),
        vsock,
        deadline: None,
        ..config.clone()
    }
}

/// A digest of all that a template is made from.
fn name(config: &VmConfig) -> io::Result<String> {
    let made_from = (
        env!("CARGO_PKG_VERSION"),
        ingredients(&config.kernel)?,
        config,
    );
    let digest = Digest::of(&serde_json::to_vec(&made_from)?);
    Ok(digest.hex().to_owned())
}

/// Whether a file is a template, what it has beside it, or one that was not completed.
fn is_own_name(name: &[u8]) -> bool {
    let stem = name.strip_suffix(PAGES.as_bytes());
    let stem = stem.and_then(|stem| stem.strip_suffix(b"."));
    let stem = stem.unwrap_or(name);
    name.starts_with(b".") && name.len() > 2
        || stem.len() == 64 && stem.iter().all(u8::is_ascii_hexdigit)
}

fn open(path: &Path) -> Result<Snapshot, RunError> {
    let mut template = Snapshot::open(path).map_err(VmError::from)?;
    let usable = || {
        let metadata = template.file.metadata()?;
        if !template.is_from_this_host {
            return Err(io::Error::other(
                "it was made on another host, or before this host was started",
            ));
        }
        if !is_ours(&metadata) || metadata.modified()? != UNTOUCHED || metadata.mode() & 0o077 != 0
        {
            return Err(io::Error::other("it was changed since it was made"));
        }
        // The inode's time of change follows, by which templates go.
        template
            .file
            .set_times(FileTimes::new().set_accessed(SystemTime::now()))
    };
    usable().map_err(|e| RunError::File(path.display().to_string(), e))?;
    match working_set(path) {
        Ok(set) => template.working_set = set,
        Err(e) => log::info!("the VM's pages come one by one: {e}"),
    }
    Ok(template)
}

/// What is known of the pages that VMs of the template at `path` touch.
fn working_set(path: &Path) -> io::Result<WorkingSet> {
    let mut options = File::options();
    let options = options.read(true).write(true).create(true).mode(0o600);
    let options = options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    let file = options.open(path.with_extension(PAGES))?;
    let metadata = file.metadata()?;
    if !metadata.is_file() || !is_ours(&metadata) {
        return Err(io::Error::other("the file of pages is another user's"));
    }
    WorkingSet::open(file)
}

/// Boots a VM of minivmm's own first process and saves it when that waits for its orders. Nothing of an image runs in it.
fn make(config: VmConfig, path: &Path) -> Result<(), RunError> {
    let mut target = Target::create(path, None).map_err(VmError::from)?;
    let initrd = initramfs(&config, Setup::default()).map_err(host("the initramfs"))?;
    let empty =
        memfd_create("empty", MemfdFlags::CLOEXEC).map_err(|e| host("an empty disk")(e.into()))?;
    let disks = config.disks.iter().map(|disk| DiskConfig {
        path: descriptor(&empty),
        ..disk.clone()
    });
    let config = VmConfig {
        initrd: Some(descriptor(&initrd)),
        disks: disks.collect(),
        ..config
    };
    let sandbox = confine::sandbox(&config, Role::Save)?;
    let threads = confine::threads(&sandbox);
    let networks = Networks::open(&config, &threads)?;
    let mut times = BuildTimes::default();
    let parts = Prepared::new(&config, &networks, &threads, &mut times)?;
    let (console, _) = Console::open(&ConsoleTarget::None, &threads)?;
    let ends = ConsoleEnds {
        serial: console.sink(),
        virtio: console.sink(),
        size: None,
    };
    let held = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
    let held = held.map_err(host("an eventfd"))?;
    let observers = Observers {
        hold_at: Some((TEMPLATE_MARK, held.try_clone().map_err(host("an eventfd"))?)),
        ..Observers::default()
    };
    let mut vm = Vm::build(parts, ends, observers, &mut times)?;
    vm.start(|| Ok::<_, RunError>(()), None)?;
    let control = vm.control();
    // Signals and the deadline are watched by another thread.
    let wait = || {
        let mut events = EventLoop::new()?;
        events.add(&held, false, ())?;
        events.add(control.ended(), false, ())?;
        events.wait(None).map(drop)
    };
    wait().map_err(host("the event loop"))?;
    if !vm.pause() {
        let end = control
            .how_it_ended()
            .map(|end| format!("{:?}", end.outcome));
        let why = format!(
            "it ended before its first process was ready: {}",
            end.unwrap_or_default()
        );
        return Err(host("a VM to be a template")(io::Error::other(why)).into());
    }
    target
        .write(&vm, TEMPLATE_MARK, &|| false)
        .map_err(VmError::from)?;
    vm.control().end(Outcome::Saved);
    // It would say nothing of this one.
    match std::fs::remove_file(path.with_extension(PAGES)) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(host("the cache")(e).into()),
        _ => {}
    }
    let named = target.publish(complete);
    named.map_err(VmError::from)?;
    Ok(())
}

/// Waits until a template is written, and marks it.
fn complete(file: &File) -> io::Result<()> {
    file.sync_data()?;
    file.set_modified(UNTOUCHED)
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use super::*;

    #[test]
    fn a_template_that_cannot_be_written_is_none() {
        // A pipe has times, but cannot be synced.
        let (pipe, _) = std::io::pipe().unwrap();
        let file = File::from(OwnedFd::from(pipe));
        file.set_modified(UNTOUCHED).unwrap();
        assert!(complete(&file).is_err());
    }
}
