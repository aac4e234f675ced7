//! `run`: a container image as a VM.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use minivmm_devices::platform::control::MAX_ARGUMENT;
use nix::sys::signal::Signal;
use rustix::process::getpid;
use rustix::rand::{GetRandomFlags, getrandom};

use super::disks::disks;
use super::log::LogArgs;
use super::plan::{Plan, Streams};
use super::program::{ProgramArgs, given, variables_of_file};
use super::pull::RegistryArgs;
use super::run::RunError;
use super::running::running;
use super::template;
use crate::boot;
use crate::config::{
    ConsoleKind, DEFAULT_CMDLINE, DiskConfig, DiskFormat, MAX_CPUS, MemorySize, PublishedPort,
    Span, VmConfig, VsockConfig,
};
use crate::guest::{INIT, Orders, Setup};
use crate::host::passt;
use crate::image::{ImageConfig, Source, Stored};
use crate::run::{Claim, Info, descriptor, find_kernel, initramfs, passt_network};
use crate::tools::measure::find_program;
use crate::vmm::error::host;
use crate::vmm::prepare::Identity;
use crate::vmm::snapshot::Snapshot;

/// What every program finds in its environment, unless the image or the user says otherwise.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Process 1 of an image, unless the user says otherwise.
const SBIN_INIT: &str = "/sbin/init";

const HELP: &str = "\
IMAGE is an OCI layout (a directory or an archive), an archive of docker save or podman save, or - for one on stdin; \
FILE:NAME takes one of several images. With --rootfs it is a directory or an archive of a root file system. Any other IMAGE \
is one in the store, by name or digest, as minivmm images lists it, or else one in a registry, by docker's rules for names. What the program \
writes goes to memory and ends with the VM, unless --disk-size or --keep says otherwise.

Examples:
  minivmm run -it debian:12 bash
  docker save nginx | minivmm run - nginx -v
  minivmm run -it --keep work --disk-size 20G debian:12 bash
  minivmm run --rootfs ./root /bin/sh -c 'uname -a; exit 3'

Exit status: that of the program, 128 + N if signal N ended it; 125 if minivmm could not go on, 126 if the program cannot be \
executed, 127 if it is not there; otherwise as without a subcommand.";

#[allow(missing_docs, reason = "--help has what stands at the subcommand")]
#[derive(Debug, Args)]
#[command(
    after_help = HELP,
    disable_help_flag = true,
    override_usage = "minivmm run [OPTIONS] IMAGE [COMMAND...]"
)]
pub struct RunArgs {
    /// Streams and environment.
    #[command(flatten)]
    program: ProgramArgs,
    /// Set the variables of a file, one a line; may be given again
    #[arg(long, value_name = "FILE")]
    env_file: Vec<PathBuf>,
    /// Work directory, made if it is not there [default: the image's, or /]
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// Run the program as this user, by the image's names or by numbers [default: the image's, or root]
    #[arg(short, long, value_name = "USER[:GROUP]")]
    user: Option<String>,
    /// Run this in place of the image's entrypoint; an empty one is none
    #[arg(long, value_name = "PROGRAM")]
    entrypoint: Option<String>,
    /// Have the image's /sbin/init, or COMMAND, be process 1 in place of minivmm's own. Its console is a serial one, for logins: stdout,
    /// with -i stdin as well, with -it the terminal, which Ctrl-A x quits
    #[arg(long, value_name = "WHOSE", value_parser = ["image"], conflicts_with_all = ["user", "workdir", "entrypoint"])]
    init: Option<String>,
    /// Seconds that the image's init has to power off after a signal to minivmm
    #[arg(long, value_name = "SECONDS", default_value_t = 10, requires = "init")]
    stop_timeout: u32,
    /// Name for minivmm exec and stop [default: eight digits at random]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Name of the machine [default: the first digits of the image's digest]
    #[arg(short, long, value_name = "NAME")]
    hostname: Option<String>,
    /// Let the program write to nothing but /dev/shm and what it mounts itself
    #[arg(long)]
    read_only: bool,
    /// What the program writes goes to a disk of this size instead of memory; it takes no more of this host than is written, in
    /// ~/.local/share/minivmm/disks (or $XDG_DATA_HOME), and ends with the VM. With --keep, the size of a disk that is not there yet
    #[arg(long, value_name = "SIZE", conflicts_with = "read_only")]
    disk_size: Option<MemorySize>,
    /// Keep what the program writes on a disk with this name, which is made if it is not there [default size: 10G]. Later runs of the same
    /// image find it there; one VM at a time can have it. minivmm disks lists and removes such disks
    #[arg(long, value_name = "NAME", conflicts_with = "read_only")]
    keep: Option<String>,
    /// Network [default: passt where it is installed and this host has a default route, else none]
    #[arg(long, value_name = "MODE", value_parser = ["passt", "none"])]
    network: Option<String>,
    /// Have a port of this host lead to one of the program's, on 127.0.0.1 unless told otherwise; may be given again
    #[arg(short, long, value_name = "[IP:]HOST:GUEST[/tcp|/udp]")]
    publish: Vec<PublishedPort>,
    /// Memory, as in 512m or 2g
    #[arg(short, long, value_name = "SIZE", default_value = "512M")]
    memory: MemorySize,
    /// vCPUs, 1 to 64
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=MAX_CPUS.into()))]
    cpus: u8,
    /// Linux kernel [default: the small kernel, if it was built, else this host's /boot/vmlinuz]. Modules that it needs come from
    /// lib/modules beside it or from /lib/modules
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// IMAGE is a root file system, a directory or an archive
    #[arg(long)]
    rootfs: bool,
    /// Registry of the image.
    #[command(flatten)]
    registry: RegistryArgs,
    /// End with status 124 after this time, as in 500ms, 10s or 2min
    #[arg(long, value_name = "TIME")]
    pub deadline: Option<Span>,
    /// Say when what happened: a table on stderr when the VM has ended, or JSON in FILE
    #[arg(long, value_name = "FILE", num_args = 0..=1, require_equals = true)]
    pub timeline: Option<Option<PathBuf>>,
    /// Boot the VM. Without it, it goes on from a template in the cache, where its kernel has booted and waits for an image; the
    /// first run with this kernel, memory, CPUs and network makes it
    #[arg(long)]
    cold: bool,
    /// Accepted for docker's sake: nothing of a VM stays but what --keep says
    #[arg(long)]
    rm: bool,
    /// Print help
    #[arg(long, action = clap::ArgAction::Help)]
    help: Option<bool>,
    /// Say more about minivmm itself, given twice even more
    #[arg(long, action = clap::ArgAction::Count, conflicts_with = "quiet")]
    verbose: u8,
    /// Say nothing about minivmm itself
    #[arg(short, long)]
    quiet: bool,
    /// What to run, with program and arguments in place of the image's own. All that follows the image is the program's, options too
    #[arg(value_name = "IMAGE", required = true, trailing_var_arg = true)]
    image: Vec<String>,
}

impl RunArgs {
    /// The level of the log. There is no -v: docker has it for something else.
    pub fn log_level(&self) -> log::LevelFilter {
        let (quiet, verbose) = (self.quiet, self.verbose);
        LogArgs { verbose, quiet }.level()
    }

    /// The image, and what follows it.
    fn words(&self) -> (&str, &[String]) {
        let words = self.image.split_first();
        words.map_or(("", &[]), |(image, command)| (image, command))
    }

    /// Finds image and kernel and says what is to be run.
    pub fn into_plan(self) -> Result<Plan, RunError> {
        self.program.check_terminal()?;
        let kernel = match &self.kernel {
            Some(kernel) => kernel.clone(),
            None => find_kernel(&boot::cache_dir().unwrap_or_default())?,
        };
        let (image, _) = self.words();
        let source = if self.rootfs {
            Source::Root(image.into())
        } else {
            Source::parse(image)
        };
        let stored = self.registry.load(&source, self.quiet)?;
        let mut orders = self.orders(&stored)?;
        let mut nets = Vec::new();
        if self.has_network()? {
            let (device, network) = passt_network(self.publish.clone());
            nets.push(device);
            orders.network = Some(network);
        }
        let claim = self.claim(&orders, &stored.meta.config)?;
        let (disk, disk_file) = self.disk(&stored, &mut orders)?.unzip();
        let mut config = VmConfig {
            kernel,
            // No console but COM1: hvc0 is for the program's streams. An init would have a login there.
            cmdline: Some(format!("{DEFAULT_CMDLINE} loglevel=1 rdinit={INIT}")),
            cpus: self.cpus,
            memory: self.memory,
            disks: [(stored.root, true)]
                .into_iter()
                .chain(disk.map(|path| (path, false)))
                .map(|(path, read_only)| DiskConfig {
                    path,
                    format: Some(DiskFormat::Raw),
                    read_only,
                    ..DiskConfig::default()
                })
                .collect(),
            nets,
            vsock: Some(VsockConfig {
                path: Some(claim.socket()),
                accept_only: true,
                reserve: orders.is_init,
                ..VsockConfig::default()
            }),
            console: match orders.is_init {
                true => ConsoleKind::Serial,
                false => ConsoleKind::Virtio,
            },
            deadline: self.deadline,
            ..VmConfig::default()
        };
        let (snapshot, initramfs) = match self.template(&config, &orders)? {
            Some(restored) => (Some(restored), None),
            None => {
                let setup = Setup {
                    orders: Some(orders),
                    ..Setup::default()
                };
                let initrd = initramfs(&config, setup).map_err(host("the initramfs"))?;
                config.initrd = Some(descriptor(&initrd));
                (None, Some(initrd))
            }
        };
        let files = [disk_file.flatten(), initramfs, stored.lock];
        Ok(Plan {
            config,
            snapshot,
            streams: Some(Streams {
                init: (self.init.as_ref()).map(|_| Duration::from_secs(self.stop_timeout.into())),
                terminal: self.program.tty,
                interactive: self.program.interactive,
            }),
            files: files.into_iter().flatten().collect(),
            claim: Some(claim),
            ..Plan::default()
        })
    }

    /// What the VM goes on from, with its disk and what its guest is told; `None` if it is to boot.
    fn template(
        &self,
        config: &VmConfig,
        orders: &Orders,
    ) -> Result<Option<(Arc<Snapshot>, Identity)>, RunError> {
        // Of the disks, only the one that is read can be an empty one before. Process 1 of a template is minivmm's own.
        if self.cold || orders.is_init || config.disks.len() > 1 {
            return Ok(None);
        }
        let argument = serde_json::to_vec(orders).map_err(|e| host("the orders")(e.into()))?;
        if argument.len() > MAX_ARGUMENT {
            log::info!("the environment is too long for a template, so the VM boots");
            return Ok(None);
        }
        let Some(mut template) = template::get(config) else {
            return Ok(None);
        };
        for (disk, config) in template.disks.iter_mut().zip(&config.disks) {
            disk.use_file(&config.path);
        }
        let identity = Identity { index: 0, argument };
        Ok(Some((Arc::new(template), identity)))
    }

    /// What the guest is to do: the image's configuration with the arguments over it.
    fn orders(&self, stored: &Stored) -> Result<Orders, RunError> {
        let config = &stored.meta.config;
        let digest = stored.meta.digest.hex();
        let digits = digest.get(..12).unwrap_or(digest);
        let hostname = self.hostname.clone().unwrap_or_else(|| digits.to_owned());
        let is_name = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
        if hostname.is_empty() || hostname.len() > 63 || !hostname.chars().all(is_name) {
            return Err(RunError::Usage(format!("'{hostname}' is no host name")));
        }
        let environment = self.environment(config, &hostname)?;
        let is_init = self.init.is_some();
        let of_init = ImageConfig {
            cmd: Some(vec![SBIN_INIT.to_owned()]),
            ..ImageConfig::default()
        };
        let config = if is_init { &of_init } else { config };
        let user = given(self.user.clone()).or_else(|| config.user.clone());
        let directory = given(self.workdir.clone()).or_else(|| config.working_dir.clone());
        Ok(Orders {
            command: command(config, self.entrypoint.as_deref(), self.words().1),
            is_init,
            environment,
            user: user.unwrap_or_default(),
            directory: Path::new("/")
                .join(directory.unwrap_or_default())
                .to_string_lossy()
                .into_owned(),
            hostname,
            terminal: self.program.tty,
            read_only: self.read_only,
            disk: None,
            network: None,
        })
    }

    /// The disk for what is written, if it is not memory; and its file, if it has no name.
    fn disk(
        &self,
        stored: &Stored,
        orders: &mut Orders,
    ) -> Result<Option<(PathBuf, Option<File>)>, RunError> {
        let bytes = self.disk_size.map(|size| size.bytes);
        if self.keep.is_none() && bytes.is_none() {
            return Ok(None);
        }
        // What is removed is given back to the host.
        let mut options = "discard".to_owned();
        let disks = disks()?;
        let disk = match (&self.keep, bytes) {
            (Some(name), _) => {
                let path = disks.keep(name, bytes, &stored.meta.digest);
                (path.map_err(name_or("--keep", "the VM's disk"))?, None)
            }
            (None, bytes) => {
                // Nor does what ends with the VM have to be durable.
                options += ",nobarrier";
                let file = disks.temporary(bytes.unwrap_or_default());
                let file = file.map_err(host("the VM's disk"))?;
                (descriptor(&file), Some(file))
            }
        };
        orders.disk = Some(options);
        Ok(Some(disk))
    }

    /// Takes the VM's name.
    fn claim(&self, orders: &Orders, config: &ImageConfig) -> Result<Claim, RunError> {
        let name = match &self.name {
            Some(name) => name.clone(),
            None => {
                let mut bytes = [0; 4];
                getrandom(&mut bytes, GetRandomFlags::empty())
                    .map_err(|e| host("random numbers")(e.into()))?;
                format!("{:08x}", u32::from_ne_bytes(bytes))
            }
        };
        let info = Info {
            image: self.words().0.to_owned(),
            command: orders.command.join(" "),
            is_init: orders.is_init,
            stop_signal: config.stop_signal.as_deref().and_then(signal_number),
            pid: getpid().as_raw_pid(),
        };
        let claim = running()?.claim(&name, &info);
        claim.map_err(name_or("--name", "the VM's name"))
    }

    /// Whether the VM is to have a network.
    fn has_network(&self) -> Result<bool, RunError> {
        match self.network.as_deref() {
            Some("none") if !self.publish.is_empty() => {
                let why = "-p needs a network; leave out --network none".to_owned();
                Err(RunError::Usage(why))
            }
            Some(mode) => Ok(mode != "none"),
            None if self.publish.is_empty() => {
                Ok(find_program(passt::PROGRAM).is_some() && passt::has_way_out())
            }
            None => Ok(true),
        }
    }

    /// The image's variables, those of files, and those that were given; later ones count.
    fn environment(&self, config: &ImageConfig, hostname: &str) -> Result<Vec<String>, RunError> {
        let mut list = vec![PATH.to_owned(), format!("HOSTNAME={hostname}")];
        list.extend(self.program.term());
        list.extend(config.env.iter().flatten().cloned());
        for path in &self.env_file {
            list.extend(variables_of_file(path)?);
        }
        self.program.set_variables(&mut list);
        Ok(list)
    }
}

/// For what the host refuses, or else a name that is none.
fn name_or(option: &'static str, what: &'static str) -> impl FnOnce(std::io::Error) -> RunError {
    move |e| match e.kind() {
        std::io::ErrorKind::InvalidInput => RunError::Usage(format!("{option}: {e}")),
        _ => host(what)(e).into(),
    }
}

/// The number of a signal that has this name, with or without SIG, or number; SIGTERM stays with who sends it, and so does one for real
/// time, which the guest's first process cannot send.
fn signal_number(text: &str) -> Option<u8> {
    let name = text.to_ascii_uppercase();
    let named = || Signal::from_str(&format!("SIG{}", name.trim_start_matches("SIG"))).ok();
    let numbered = || Signal::try_from(name.parse::<i32>().ok()?).ok();
    let signal = named().or_else(numbered)?;
    (signal != Signal::SIGTERM).then_some(signal as u8)
}

/// Arguments replace the image's own; an entrypoint that is given takes those of the image away.
fn command(config: &ImageConfig, entrypoint: Option<&str>, arguments: &[String]) -> Vec<String> {
    let (first, default) = match entrypoint {
        Some("") => (Vec::new(), None),
        Some(program) => (vec![program.to_owned()], None),
        None => (
            config.entrypoint.clone().unwrap_or_default(),
            config.cmd.clone(),
        ),
    };
    let rest = if arguments.is_empty() {
        default.unwrap_or_default()
    } else {
        arguments.to_vec()
    };
    [first, rest].concat()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    #[test]
    fn arguments_replace_the_command_and_keep_the_entrypoint() {
        let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let config = ImageConfig {
            entrypoint: Some(words("/entry -x")),
            cmd: Some(words("a b")),
            ..ImageConfig::default()
        };
        let run = |entrypoint, arguments: &[&str]| {
            let arguments: Vec<String> = arguments.iter().map(|word| word.to_string()).collect();
            command(&config, entrypoint, &arguments).join(" ")
        };
        assert_eq!(run(None, &[]), "/entry -x a b");
        assert_eq!(run(None, &["c"]), "/entry -x c");
        assert_eq!(run(Some("p"), &[]), "p");
        assert_eq!(run(Some("p"), &["c"]), "p c");
        assert_eq!(run(Some(""), &["c"]), "c");
    }

    #[test]
    fn options_end_at_the_image() {
        let parsed = |words: &str| Cli::try_parse_from(words.split(' '));
        let run = |words: &str| match parsed(words).unwrap().command {
            Some(Command::Run(args)) => args,
            _ => panic!("no run"),
        };
        let args = run("minivmm run -it -e A=b -m 1g ./i sh -c -x --rm");
        assert_eq!(args.words().0, "./i");
        assert_eq!(args.words().1, ["sh", "-c", "-x", "--rm"]);
        // So that an entrypoint can have them.
        for option in ["--help", "-q", "-- -x", "-h db", "--rm", "--no-such"] {
            let args = run(&format!("minivmm run ./i {option}"));
            assert_eq!(args.words().1.join(" "), option);
        }
        assert!(args.program.tty && args.program.interactive);
        let mut given = Vec::new();
        args.program.set_variables(&mut given);
        assert_eq!(given, ["A=b"]);
        assert_eq!(args.memory.bytes, 1 << 30);
        for unknown in [
            "-d",
            "-v /a:/b",
            "--privileged",
            "-p 80",
            "--network bridge",
        ] {
            assert!(
                parsed(&format!("minivmm run {unknown} ./i")).is_err(),
                "{unknown}"
            );
        }
    }

    #[test]
    fn a_stop_signal_has_a_name_or_a_number() {
        for (text, wanted) in [
            ("SIGQUIT", Some(3)),
            ("quit", Some(3)),
            ("28", Some(28)),
            ("SIGTERM", None),
            ("SIGRTMIN+3", None),
            ("0", None),
            ("x", None),
        ] {
            assert_eq!(signal_number(text), wanted, "{text}");
        }
    }
}
