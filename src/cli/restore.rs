//! Arguments of `restore`.

use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, ValueEnum};
use minivmm_devices::platform::control::MAX_ARGUMENT;

use super::log::LogArgs;
use super::plan::Plan;
use super::run::RunError;
use super::snapshot_at::SnapshotAt;
use crate::config::{
    ConsoleTarget, DiskConfig, NetConfig, OnReboot, SandboxMode, Span, VmConfig, VsockConfig,
};
use crate::vmm::error::{VmError, host};
use crate::vmm::prepare::Identity;
use crate::vmm::snapshot::load::Snapshot;

/// Linux before 6.10 computes a wrong time when its clock jumps by more.
const LONGEST_JUMP: Duration = Duration::from_secs(600);

/// How the guest's clocks go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum ClockMode {
    /// Where they stood when the VM was saved
    Continue,
    /// As if they had run since
    Realtime,
}

const HELP: &str = "\
The VM goes on behind the instruction that wrote the boot mark. It has the vCPUs, the memory and the devices that it had; the \
console is this terminal again unless --serial says otherwise. Exit status as for a VM that boots.

Example:
  minivmm --kernel bzImage --initrd rootfs.cpio --snapshot-at 7=ready.snap,exit
  minivmm restore ready.snap --argument job-17";

/// A snapshot that was read, and how its VMs go on.
pub(super) struct Restorable {
    pub(super) config: VmConfig,
    pub(super) snapshot: Arc<Snapshot>,
    pub(super) identity: Identity,
}

// A snapshot, and how its VMs go on: arguments. No documentation, see LogArgs.
#[derive(Debug, Args)]
pub(super) struct SnapshotSource {
    /// Snapshot, written by --snapshot-at
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Whether the guest's clocks go on where they stood, or as if they had run since
    #[arg(long, value_enum, default_value = "continue")]
    clock: ClockMode,
    /// What the guest can read at its boot-mark port
    #[arg(long, value_name = "TEXT", conflicts_with = "argument_file")]
    argument: Option<String>,
    /// The same, from a file of at most 64 KiB
    #[arg(long, value_name = "FILE")]
    argument_file: Option<PathBuf>,
    /// Use FILE as the disk with this serial number, or with this number if it has none, whatever the snapshot says of it; it must hold what the disk held
    #[arg(long = "disk", value_name = "id=ID,path=FILE", value_parser = parse_disk)]
    disks: Vec<(String, PathBuf)>,
    /// Connect the VM's first network device, or with a further --net the next: passt[,publish=[IP:]HOST:GUEST[/tcp|/udp]]...[,host-loopback], tap=NAME or fd=N; without it, the device's link is down
    #[arg(long = "net", value_name = "passt|tap=NAME|fd=N[,...]", value_parser = parse_net)]
    nets: Vec<NetConfig>,
}

/// Of what a network device can be given, its network.
fn parse_net(text: &str) -> Result<NetConfig, String> {
    let net: NetConfig = text.parse()?;
    match (net.mac, net.queues) {
        (None, None) => Ok(net),
        (Some(_), _) => Err("the guest's address is as the snapshot says: leave out mac".into()),
        _ => Err("the number of queues is as the snapshot says: leave out queues".into()),
    }
}

/// Of what a disk can be given, its name and its file.
fn parse_disk(text: &str) -> Result<(String, PathBuf), String> {
    let mut disk: DiskConfig = text.parse()?;
    let (id, path) = (disk.id.take(), std::mem::take(&mut disk.path));
    match id {
        Some(id) if disk == DiskConfig::default() => Ok((id, path)),
        _ => Err("write id=ID,path=FILE: all else is as the snapshot says".into()),
    }
}

/// Of what a socket device can be given, its socket.
fn parse_vsock(text: &str) -> Result<PathBuf, String> {
    let mut vsock: VsockConfig = text.parse()?;
    match vsock.path.take() {
        Some(path) if vsock == VsockConfig::default() => Ok(path),
        _ => Err("write path=SOCKET: all else is as the snapshot says".into()),
    }
}

#[allow(missing_docs, reason = "--help has what stands at the subcommand")]
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub struct RestoreArgs {
    /// What it goes on from.
    #[command(flatten)]
    source: SnapshotSource,
    /// Where the console goes: stdio, pty (its path goes to stderr), file=PATH (output only), none
    #[arg(long, value_name = "WHERE", default_value = "stdio")]
    serial: ConsoleTarget,
    /// Unix socket of the VM's socket device, which it had when it was saved; without it, nothing on the host reaches the guest
    #[arg(long, value_name = "path=SOCKET", value_parser = parse_vsock)]
    vsock: Option<PathBuf>,
    /// End with status 124 after this time, as in 500ms, 10s or 2min
    #[arg(long, value_name = "TIME")]
    pub deadline: Option<Span>,
    /// Save the VM when its guest writes this boot mark, as without restore; to another file than the one it comes from
    #[arg(long, value_name = "MARK=FILE[,exit]")]
    snapshot_at: Option<SnapshotAt>,
    /// Say when what happened: a table on stderr when the VM has ended, or JSON in FILE
    #[arg(long, value_name = "FILE", num_args = 0..=1)]
    pub timeline: Option<Option<PathBuf>>,
    /// How much to say on stderr.
    #[command(flatten)]
    pub log: LogArgs,
}

impl RestoreArgs {
    /// Reads the snapshot and says what is to be run.
    pub fn into_plan(self) -> Result<Plan, RunError> {
        let mut source = self.source.open(self.serial, self.deadline)?;
        match (&mut source.config.vsock, self.vsock) {
            (Some(vsock), path) => vsock.path = path,
            (None, None) => {}
            (None, Some(_)) => {
                let error = io::Error::other("the VM had none when it was saved");
                return Err(host("the socket device")(error).into());
            }
        }
        Ok(Plan {
            config: source.config,
            snapshot: Some((source.snapshot, source.identity)),
            snapshot_at: self.snapshot_at,
            ..Plan::default()
        })
    }
}

impl SnapshotSource {
    /// Reads the snapshot.
    pub(super) fn open(
        self,
        serial: ConsoleTarget,
        deadline: Option<Span>,
    ) -> Result<Restorable, RunError> {
        let argument = match (self.argument, self.argument_file) {
            (Some(text), _) => text.into_bytes(),
            (None, Some(path)) => {
                read_argument(&path).map_err(host("the argument from its file"))?
            }
            (None, None) => Vec::new(),
        };
        if argument.len() > MAX_ARGUMENT {
            let error = io::Error::other(format!("it is longer than {MAX_ARGUMENT} bytes"));
            return Err(host("the guest's argument")(error).into());
        }
        let mut snapshot = Snapshot::open(&self.file).map_err(VmError::from)?;
        for (id, path) in &self.disks {
            snapshot.use_for_disk(id, path).map_err(VmError::from)?;
        }
        let mut nets = self.nets;
        let count = snapshot.meta.config.nets.len();
        if nets.len() > count {
            let error = format!("the VM had {count} network devices when it was saved");
            return Err(host("the networks")(io::Error::other(error)).into());
        }
        for index in nets.len()..count {
            log::warn!("net {index} has no network, and its link is down: give --net for each");
        }
        nets.resize_with(count, NetConfig::default);
        for (net, saved) in nets.iter_mut().zip(&snapshot.meta.config.nets) {
            net.queues = saved.queues;
        }
        snapshot.is_realtime = self.clock == ClockMode::Realtime;
        let since = snapshot.age();
        if snapshot.is_realtime && since > LONGEST_JUMP {
            log::warn!(
                "the guest's clocks jump by {}: Linux before 6.10 may compute a wrong time",
                humantime::format_duration(Duration::from_secs(since.as_secs()))
            );
        }
        // What the file says of the console's file, of networks and sockets is not followed: they may be anybody's.
        let vsock = snapshot.meta.config.vsock.clone();
        let config = VmConfig {
            serial,
            nets,
            vsock: vsock.map(|vsock| VsockConfig {
                path: None,
                ..vsock
            }),
            deadline,
            on_reboot: OnReboot::Exit,
            sandbox: SandboxMode::default(),
            ..snapshot.meta.config.clone()
        };
        Ok(Restorable {
            config,
            snapshot: Arc::new(snapshot),
            identity: Identity { index: 0, argument },
        })
    }
}

fn read_argument(path: &std::path::Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?
        .take(MAX_ARGUMENT as u64 + 1)
        .read_to_end(&mut bytes)?;
    Ok(bytes)
}
