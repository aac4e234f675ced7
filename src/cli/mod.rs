//! The command line. It opens no file but the configuration and builds nothing.

mod bench;
mod confine;
pub mod disks;
pub mod exec;
pub mod exit_status;
mod final_log;
pub mod fork;
mod guest;
mod guest_log;
pub mod images;
mod line_output;
pub mod log;
pub mod plan;
pub mod process;
mod program;
pub mod pull;
mod release;
mod restore;
pub mod run;
mod run_error;
mod run_image;
pub mod running;
pub mod snapshot;
mod snapshot_at;
mod template;
pub mod watch;

pub use bench::BenchArgs;
pub use disks::DisksArgs;
pub use exec::ExecArgs;
pub use fork::ForkArgs;
pub use guest::GuestArgs;
pub use images::RmiArgs;
pub use log::LogArgs;
#[cfg(feature = "registry")]
pub use pull::PullArgs;
pub use restore::RestoreArgs;
pub use run_image::RunArgs;
pub use running::StopArgs;
pub use snapshot::SnapshotArgs;
pub use snapshot_at::SnapshotAt;

use std::path::PathBuf;

use ::log::LevelFilter;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand};
use serde::de::value::StrDeserializer;
use serde::de::{DeserializeOwned, IntoDeserializer};

use crate::config::{
    BootProtocol, ConfigError, ConsoleKind, ConsoleTarget, DiskConfig, NetConfig, OnReboot,
    SandboxMode, Span, VmConfig, VsockConfig,
};
use crate::tools::compare::CompareOptions;

const EXAMPLES: &str = "\
Examples:
  minivmm --kernel bzImage --initrd rootfs.cpio
      boots to the initramfs on this terminal; Ctrl-A x quits
  minivmm --kernel bzImage --initrd rootfs.cpio --append '-- uname -r'
      gives the words behind -- to the guest's init
  minivmm --kernel bzImage --initrd rootfs.cpio --cpus 2 --memory 1G --deadline 30s
  minivmm --kernel bzImage --initrd initrd.img --disk path=root.img --append 'root=/dev/vda'
      boots from a disk, with the distribution's own initrd
  minivmm --config vm.json --memory 2G
      takes the VM from a file, but for its memory
  minivmm --kernel bzImage --initrd rootfs.cpio --timeline boot.json
      says when what happened, and what the guest's exits and its console have cost
  minivmm doctor --kernel bzImage
      says whether this host can boot this kernel, and what to do if not

Exit status:
  0          the guest powered off, or reset the machine
  0-255      the guest wrote this byte to I/O port 0xf4
  2          the command line is wrong
  124        --deadline passed first
  125        minivmm itself could not go on; stderr says why
  130, 143   stopped by Ctrl-A x or SIGINT, by SIGTERM
  134        the guest's kernel panicked
  139        the guest triple-faulted, or KVM could not run it";

/// A minimal virtual machine monitor: boots a Linux kernel in a KVM virtual machine.
#[derive(Debug, Parser)]
#[command(
    name = "minivmm",
    version,
    after_help = EXAMPLES,
    args_conflicts_with_subcommands = true,
    max_term_width = 120
)]
pub struct Cli {
    /// What to do; without one, run a VM
    #[command(subcommand)]
    pub command: Option<Command>,
    /// The VM to run.
    #[command(flatten)]
    pub vm: VmArgs,
    /// Save the VM when its guest writes this boot mark (a byte, at I/O port 0xf5) for the first time, as in --snapshot-at
    /// 7=ready.snap; with ,exit it ends then, with status 0, else it goes on. FILE has all of the guest's memory, and so its secrets.
    /// A VM with networks cannot be saved yet
    #[arg(long, value_name = "MARK=FILE[,exit]")]
    pub snapshot_at: Option<SnapshotAt>,
    /// Say when what happened, and what exits, console and memory came to: a table on stderr when the VM has ended, or
    /// JSON in FILE
    #[arg(long, value_name = "FILE", num_args = 0..=1)]
    pub timeline: Option<Option<PathBuf>>,
    /// How much to say on stderr.
    #[command(flatten)]
    pub log: LogArgs,
}

/// What minivmm does other than running a VM.
#[derive(Debug, Subcommand)]
// The VM path does not wait for what it has no use for.
#[command(defer = true)]
pub enum Command {
    /// Say what this host, and a kernel and initrd, can and cannot do; status 0 only if Linux can boot
    Doctor(DoctorArgs),
    /// Measure how long a guest takes to boot, in minivmm and in the other VMMs that are installed
    Bench(BenchArgs),
    /// Go on with a VM from its snapshot
    Restore(Box<RestoreArgs>),
    /// Go on with many VMs from one snapshot; status 0 only if all of them end with 0
    Fork(ForkArgs),
    /// Say what is in a snapshot, or check it
    Snapshot(SnapshotArgs),
    /// Run a container image as a VM
    Run(Box<RunArgs>),
    /// Run another program in a VM that runs an image
    Exec(ExecArgs),
    /// List the VMs that run images
    Ps,
    /// Stop such VMs: the program is asked to end, and the VM is ended if it does not
    Stop(StopArgs),
    /// Fetch a container image from a registry, to be run later
    #[cfg(feature = "registry")]
    Pull(PullArgs),
    /// List the images that were run or pulled, which are ready to run again
    Images,
    /// Remove such images
    Rmi(RmiArgs),
    /// List the disks on which runs have kept what they wrote, or remove some
    Disks(DisksArgs),
    /// Run one command on one root file system in container runtimes and in a virtual machine, and measure it
    Compare(CompareOptions),
}

#[allow(missing_docs, reason = "--help has what stands at the subcommand")]
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Kernel file to check
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Initrd to check
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// The command line of a subcommand, with which no option of a VM goes.
#[derive(Debug, Parser)]
#[command(name = "minivmm", version, max_term_width = 120)]
struct Tool {
    #[command(subcommand)]
    command: Command,
}

impl Cli {
    /// Parses the process's command line. Where it begins with a subcommand, the parser is made without the options of a VM, which
    /// a restore would only wait for.
    pub fn of_process() -> Result<Self, clap::Error> {
        let first = std::env::args_os().nth(1).unwrap_or_default();
        if !first.to_str().is_some_and(Command::has_subcommand) {
            return Self::try_parse();
        }
        Ok(Self {
            command: Some(Tool::try_parse()?.command),
            vm: VmArgs::default(),
            snapshot_at: None,
            timeline: None,
            log: LogArgs::default(),
        })
    }

    /// The level of the log.
    pub fn log_level(&self) -> LevelFilter {
        match &self.command {
            Some(Command::Restore(args)) => args.log.level(),
            Some(Command::Fork(args)) => args.log.level(),
            Some(Command::Run(args)) => args.log_level(),
            #[cfg(feature = "registry")]
            Some(Command::Pull(args)) => args.log.level(),
            _ => self.log.level(),
        }
    }
}

/// A parser of the words that a configuration file has for `T`, one of `names`.
fn one_of<T>(names: &'static [&'static str]) -> impl TypedValueParser<Value = T>
where
    T: DeserializeOwned + Clone + Send + Sync + 'static,
{
    PossibleValuesParser::new(names).try_map(|name| {
        let name: StrDeserializer<'_, serde::de::value::Error> = name.as_str().into_deserializer();
        T::deserialize(name)
    })
}

/// A VM; what is given here goes over what a configuration file says.
#[allow(
    rustdoc::broken_intra_doc_links,
    reason = "in help, brackets are what may be left out"
)]
#[derive(Debug, Default, Args)]
pub struct VmArgs {
    /// What is booted.
    #[command(flatten)]
    pub guest: GuestArgs,
    /// Disk, a raw image or a block device:
    /// path=FILE[,ro][,ephemeral][,format=raw][,sector=512|4096][,id=SERIAL][,queues=N][,engine=io_uring|sync], as in
    /// --disk path=root.img,id=root; may be given again, and the guest finds them in this order (/dev/vda, /dev/vdb, ...).
    /// What may be written is locked against other processes; ro disks can be shared. A kernel without ACPI is told of its
    /// disks if acpi=off is on its command line
    ///
    /// ephemeral: what the guest writes goes to a temporary file in $TMPDIR or /tmp and ends with the VM; FILE stays as it
    /// is, and any number of VMs can have it so. format: a file that looks like qcow2, VMDK and the like, or is compressed, is
    /// refused, but not with format=raw. sector: bytes in a logical block, if not the block device's own or 512: 4096 for the
    /// image of a disk with such sectors. queues: 1 to 8, without it one a vCPU. engine: io_uring, or without it
    /// where the host has none or the disk is ephemeral, sync: one request of a queue after the other
    #[arg(long, value_name = "DISK")]
    pub disk: Vec<DiskConfig>,
    /// Network device, which the guest finds as eth0, enp0s0 or the like; without it there is no network:
    /// passt[,mac=M][,publish=[IP:]HOST:GUEST[/tcp|/udp]]...[,host-loopback] or tap=NAME[,queues=N]|fd=N[,mac=M], as in --net passt,publish=8080:80 or
    /// --net tap=tap0; may be given again
    ///
    /// passt: a network without any rights, by the program of that name, which is started and ends with the VM; the guest gets its address
    /// by DHCP. publish: a port of this host that leads to one of the guest, on 127.0.0.1 unless an address is given. host-loopback: the
    /// gateway's address leads to this host, its servers on 127.0.0.1 included. tap: a TAP interface of this host, which exists (ip tuntap add tap0 mode tap user $USER) and is up. queues: pairs of queues, 1 to 8, without it one; more take an interface made with multi_queue, and a guest with as many vCPUs uses them. fd: an interface opened by
    /// the caller with IFF_NO_PI and IFF_VNET_HDR. mac: the guest's address; without it, one that stays the same as long as host,
    /// kernel, disks and interface do
    #[arg(long, value_name = "NET")]
    pub net: Vec<NetConfig>,
    /// Sockets between host and guest (virtio-vsock): path=SOCKET[,cid=N], as in --vsock path=v.sock. A program of the host connects
    /// to this Unix socket, writes "CONNECT PORT" and a newline, and reads "OK HOSTPORT" once the guest has accepted; what
    /// the guest connects to at port P of the host is the Unix socket SOCKET_P. cid: the guest's context ID, 3 without it
    #[arg(long, value_name = "VSOCK")]
    pub vsock: Option<VsockConfig>,
    /// Let the host merge equal pages of this guest and of all others that allow it, where its KSM runs (pages_to_scan and
    /// sleep_millisecs in /sys/kernel/mm/ksm say how fast): two guests share their kernel's text if it is not placed at random
    /// (nokaslr). What is merged is no longer in huge pages, and a guest can find out by timing what others have in memory, so
    /// not for guests that distrust each other
    #[arg(long)]
    pub mergeable: bool,
    /// Give the guest an entropy device (virtio-rng)
    #[arg(long)]
    pub rng: bool,
    /// Which device is the console: serial is COM1 (ttyS0); virtio (hvc0) costs the guest far fewer exits and knows the
    /// terminal's size, but its driver (virtio_console) is a module in many kernels, which the initrd must load then, and
    /// --append 'console=ttyS0 console=hvc0' gives it a console until then; COM1 stays, for output alone [default: serial]
    #[arg(long, value_name = "DEVICE", value_parser = one_of::<ConsoleKind>(&["serial", "virtio"]))]
    pub console: Option<ConsoleKind>,
    /// Where the console goes: stdio, pty (its path goes to stderr), file=PATH (output only; replaces what the file had), none
    /// [default: stdio]
    #[arg(long, value_name = "WHERE")]
    pub serial: Option<ConsoleTarget>,
    /// When the guest resets the machine: end with status 0, or boot again [default: exit]
    #[arg(long, value_name = "WHAT", value_parser = one_of::<OnReboot>(&["exit", "restart"]))]
    pub on_reboot: Option<OnReboot>,
    /// End with status 124 after this time, as in 500ms, 10s or 2min
    #[arg(long, value_name = "TIME")]
    pub deadline: Option<Span>,
    /// How the kernel is entered; auto takes PVH where an ELF file offers it [default: auto]
    #[arg(long, value_name = "HOW", value_parser = one_of::<BootProtocol>(&["auto", "linux64", "pvh"]))]
    pub boot_protocol: Option<BootProtocol>,
    /// Neither keep what was in a bzImage below ~/.cache/minivmm (or $XDG_CACHE_HOME) nor look for it there
    #[arg(long)]
    pub no_kernel_cache: bool,
    /// What happens when minivmm asks the host for something that a VM does not need, as a guest that has broken out of its VM
    /// would: strict ends minivmm with status 125; log says it on stderr and goes on; off leaves all to the VM's user
    /// [default: strict]
    #[arg(long, value_name = "MODE", value_parser = one_of::<SandboxMode>(&["strict", "log", "off"]))]
    pub sandbox: Option<SandboxMode>,
    /// End with status 125 where the host's kernel lacks a part of the sandbox (minivmm doctor says which)
    #[arg(long)]
    pub require_sandbox: bool,
    /// Take the VM from a JSON file with these fields: kernel, initrd, cmdline, append, cpus, memory, mergeable, disks,
    /// nets, vsock, rng, console, serial, on_reboot, deadline, boot_protocol, kernel_cache, sandbox, require_sandbox; as in {"kernel": "bzImage", "initrd": "rootfs.cpio",
    /// "memory": "512M", "disks": [{"path": "root.img", "ro": true, "id": "root"}]}
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// What was given, or else what was there.
fn over<T>(given: Vec<T>, base: Vec<T>) -> Vec<T> {
    if given.is_empty() { base } else { given }
}

impl VmArgs {
    /// The configuration file, if there is one, with these arguments over it.
    pub fn into_config(self) -> Result<VmConfig, ConfigError> {
        let base = match &self.config {
            Some(path) => VmConfig::from_file(path)?,
            None => VmConfig::default(),
        };
        let base = self.guest.over(base);
        Ok(VmConfig {
            disks: over(self.disk, base.disks),
            nets: over(self.net, base.nets),
            vsock: self.vsock.or(base.vsock),
            mergeable: self.mergeable || base.mergeable,
            rng: self.rng || base.rng,
            console: self.console.unwrap_or(base.console),
            serial: self.serial.unwrap_or(base.serial),
            on_reboot: self.on_reboot.unwrap_or(base.on_reboot),
            deadline: self.deadline.or(base.deadline),
            boot_protocol: self.boot_protocol.unwrap_or(base.boot_protocol),
            kernel_cache: base.kernel_cache && !self.no_kernel_cache,
            sandbox: self.sandbox.unwrap_or(base.sandbox),
            require_sandbox: self.require_sandbox || base.require_sandbox,
            ..base
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_go_over_the_file() {
        Cli::command_for_tests().debug_assert();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, r#"{"kernel": "k", "cpus": 4, "memory": "1G"}"#).unwrap();
        let path = file.path().to_str().unwrap();
        let cli = Cli::parse_from([
            "minivmm", "--config", path, "--memory", "2G", "--append", "a", "--append", "-- sh",
        ]);
        let config = cli.vm.into_config().unwrap();
        assert_eq!((config.cpus, config.memory.bytes), (4, 2 << 30));
        assert_eq!(config.append.as_deref(), Some("a -- sh"));
    }

    impl Cli {
        fn command_for_tests() -> clap::Command {
            <Self as clap::CommandFactory>::command()
        }
    }
}
