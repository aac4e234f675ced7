//! The sandbox of a VM that is run from the command line.

use std::path::PathBuf;
use std::process::exit;
use std::sync::Arc;

use minivmm_devices::thread::ThreadStarter;

use super::exit_status::VMM_FAILED;
use super::plan::Plan;
use super::snapshot_at::SnapshotAt;
use crate::boot;
use crate::config::{OnReboot, VmConfig};
use crate::host::kvm;
use crate::sandbox::{Paths, Role, Sandbox, SandboxError};
use crate::{console, error_chain};

/// What the main thread does for `plan`.
pub(super) fn main_role(plan: &Plan) -> Role {
    if plan.config.on_reboot == OnReboot::Restart {
        Role::Restart
    } else if plan.snapshot_at.is_some() {
        Role::Save
    } else if plan.config.vsock.is_some() {
        Role::Socket
    } else {
        Role::Main
    }
}

/// The sandbox that `config` asks for, with a main thread that does this. What the host's kernel lacks of it is said, or an error if
/// it is required.
pub(super) fn sandbox(config: &VmConfig, main: Role) -> Result<Arc<Sandbox>, SandboxError> {
    let sandbox = Sandbox::new(config.sandbox, main)?;
    for part in sandbox.missing() {
        if config.require_sandbox {
            return Err(SandboxError::Missing(part));
        }
        // Without Landlock, most that it would refuse is refused by seccomp.
        let level = match part {
            "Landlock" => log::Level::Info,
            _ => log::Level::Warn,
        };
        log::log!(
            level,
            "the host's kernel lacks {part}: the sandbox goes without it"
        );
    }
    Ok(Arc::new(sandbox))
}

/// Starts threads that are confined, or end the process.
pub(super) fn threads(sandbox: &Arc<Sandbox>) -> ThreadStarter {
    let sandbox = Arc::clone(sandbox);
    ThreadStarter::new(move |kind| {
        if let Err(e) = sandbox.confine(kind) {
            console::restore_terminal();
            log::error!("{}", error_chain(&e));
            exit(VMM_FAILED.into());
        }
    })
}

/// What the main thread opens while a guest runs: a pty again at its end, where a snapshot is put, and all that it takes to boot again.
pub(super) fn paths(plan: &Plan, pty: Option<PathBuf>) -> Paths {
    let config = &plan.config;
    let mut paths = Paths::default();
    paths
        .write
        .extend(plan.snapshot_at.as_ref().map(SnapshotAt::dir));
    paths.write.extend(pty);
    let socket = config.vsock.as_ref().and_then(|vsock| vsock.path.as_ref());
    let socket_dir = socket.and_then(|path| path.parent());
    // Of a name alone, the parent is empty.
    paths.sockets.extend(socket_dir.map(|dir| dir.join(".")));
    if config.on_reboot == OnReboot::Restart {
        paths.read.push(config.kernel.clone());
        paths.read.extend(config.initrd.clone());
        paths.write.push(kvm::DEVICE.into());
        if config.kernel_cache {
            paths.read.extend(boot::default_cache_dir());
        }
        for disk in &config.disks {
            let written = !disk.read_only && !disk.ephemeral;
            let list = if written {
                &mut paths.write
            } else {
                &mut paths.read
            };
            list.push(disk.path.clone());
        }
        if config.disks.iter().any(|disk| disk.ephemeral) {
            paths.write.push(std::env::temp_dir());
        }
    }
    paths
}
