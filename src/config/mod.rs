//! What a VM is made of: one type for the command line and for a JSON file.

mod boot;
mod console;
mod disk;
mod list;
mod net;
mod units;
mod vsock;

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

pub use boot::BootProtocol;
pub use console::{ConsoleTarget, ConsoleTargetError};
pub use disk::{DiskConfig, DiskFormat};
pub use net::{MacAddress, NetConfig, PublishedPort};
pub use units::{MemorySize, Span};
pub use vsock::VsockConfig;

/// Has types that a configuration file writes as the command line does.
macro_rules! written_as_text {
    ($($type:ty),+) => {$(
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    )+};
}
written_as_text!(ConsoleTarget, MacAddress, MemorySize, PublishedPort, Span);

/// Default parameters for every console. Each saves boot time, except `panic=-1`, which resets after a panic instead of
/// hanging.
///
/// - `quiet`: every byte on the serial line costs two exits.
/// - `pci=conf1,noearly`: the PCI bus is empty, yet on an AMD processor with a GART (before 2012) early quirks read 16,000
///   configuration registers. `pci=off` avoids that too, but logs an error.
/// - `swiotlb=noforce`: with RAM above 4 GiB, Linux reserves 64 MiB of bounce buffers, which no device here needs.
/// - `noreplace-smp`: with one CPU, Linux patches out every LOCK prefix, 9,000 in Debian's kernels. A long-running guest may
///   be faster without this parameter.
/// - `cryptomgr.notests`: Debian's kernels self-test their ciphers.
///
/// docs/benchmarks.md has what each of them takes.
macro_rules! common_cmdline {
    () => {
        "panic=-1 quiet pci=conf1,noearly swiotlb=noforce noreplace-smp cryptomgr.notests"
    };
}

/// Kernel command line of a microVM whose console is COM1.
pub const DEFAULT_CMDLINE: &str = concat!("console=ttyS0 ", common_cmdline!());

/// The same for hvc0. Its driver may be a module, so early messages, even of a panic, go to COM1 until it is loaded. `earlycon`
/// comes after `quiet`, since it prints the log as soon as it is parsed.
pub const VIRTIO_CMDLINE: &str = concat!(
    "console=hvc0 ",
    common_cmdline!(),
    " earlycon=uart,io,0x3f8"
);

/// Most vCPUs of a VM.
pub const MAX_CPUS: u8 = 64;

/// Least guest RAM in bytes: 16 MiB.
pub const MIN_MEMORY: u64 = 16 << 20;
/// Most guest RAM in bytes: 4 TiB. It keeps every address calculation far from overflow; a host's own limit is lower or
/// comes later.
pub const MAX_MEMORY: u64 = 4 << 40;

/// Longest configuration file in bytes.
const MAX_CONFIG_FILE: u64 = 1 << 20;

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read, or is not what it should be.
    #[error("cannot use the configuration {}", .0.display())]
    File(PathBuf, #[source] io::Error),
    /// No kernel was named.
    #[error("no kernel is named")]
    NoKernel,
    /// An invalid number of vCPUs.
    #[error("{0} vCPUs are not possible: a VM has 1 to {MAX_CPUS}")]
    Cpus(u8),
    /// An invalid disk.
    #[error("disk {0}: {1}")]
    Disk(PathBuf, String),
    /// A required sandbox that refuses nothing.
    #[error("the sandbox is required, so it has to be strict")]
    Sandbox,
    /// An invalid network device.
    #[error("network: {0}")]
    Net(String),
    /// An invalid socket device.
    #[error("vsock: {0}")]
    Vsock(String),
    /// An invalid memory size.
    #[error("{0} of memory is not possible: a VM has 16M to 4T, in whole pages of 4 KiB{1}")]
    Memory(MemorySize, &'static str),
}

/// Which device is the guest's console.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ConsoleKind {
    /// COM1, which is ttyS0 to Linux.
    #[default]
    Serial,
    /// A virtio console, which is hvc0 to Linux.
    Virtio,
}

impl ConsoleKind {
    /// The parameter by which a kernel takes it for its console.
    pub fn parameter(self) -> &'static str {
        match self {
            Self::Serial => "console=ttyS0",
            Self::Virtio => "console=hvc0",
        }
    }
}

/// What to do when the guest resets the machine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnReboot {
    /// End with status 0.
    #[default]
    Exit,
    /// Boot again, in the same process.
    Restart,
}

/// How the threads of a VM are confined.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SandboxMode {
    /// What they do not need ends the process.
    #[default]
    Strict,
    /// What they do not need is logged, and done.
    Log,
    /// Not at all.
    Off,
}

/// All that describes a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VmConfig {
    /// Kernel file: bzImage, ELF vmlinux or PVH ELF.
    pub kernel: PathBuf,
    /// Initial RAM file system.
    pub initrd: Option<PathBuf>,
    /// Kernel command line, in place of [`DEFAULT_CMDLINE`] or [`VIRTIO_CMDLINE`].
    pub cmdline: Option<String>,
    /// What is added to the command line.
    pub append: Option<String>,
    /// Number of vCPUs.
    pub cpus: u8,
    /// Guest RAM.
    pub memory: MemorySize,
    /// Whether the host may merge equal pages of guest RAM, and of other processes that allow it.
    pub mergeable: bool,
    /// Disks, in the order in which the guest finds them.
    pub disks: Vec<DiskConfig>,
    /// Network devices, in the order in which the guest finds them.
    pub nets: Vec<NetConfig>,
    /// The socket device.
    pub vsock: Option<VsockConfig>,
    /// Whether there is a virtio entropy device.
    pub rng: bool,
    /// Whether the guest is told of a restore by a VM generation ID.
    pub generation_id: bool,
    /// Which device is the console.
    pub console: ConsoleKind,
    /// Where the console goes.
    pub serial: ConsoleTarget,
    /// What a reset does.
    pub on_reboot: OnReboot,
    /// Longest time from the start of minivmm to the guest's end.
    pub deadline: Option<Span>,
    /// How the kernel is entered.
    pub boot_protocol: BootProtocol,
    /// Whether unpacked kernels are kept in the user's cache directory.
    pub kernel_cache: bool,
    /// How the VM's threads are confined.
    pub sandbox: SandboxMode,
    /// Whether it is an error if the host cannot confine them in all ways.
    pub require_sandbox: bool,
}

impl Default for VmConfig {
    fn default() -> Self {
        Self {
            kernel: PathBuf::new(),
            initrd: None,
            cmdline: None,
            append: None,
            cpus: 1,
            memory: MemorySize { bytes: 256 << 20 },
            mergeable: false,
            disks: Vec::new(),
            nets: Vec::new(),
            vsock: None,
            rng: false,
            generation_id: false,
            console: ConsoleKind::default(),
            serial: ConsoleTarget::default(),
            on_reboot: OnReboot::default(),
            deadline: None,
            boot_protocol: BootProtocol::default(),
            kernel_cache: true,
            sandbox: SandboxMode::default(),
            require_sandbox: false,
        }
    }
}

impl VmConfig {
    /// Reads a JSON file. Fields that it lacks have their defaults; fields that are not known are errors.
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let read = || {
            let mut text = String::new();
            let file = File::open(path)?;
            file.take(MAX_CONFIG_FILE + 1).read_to_string(&mut text)?;
            if text.len() as u64 > MAX_CONFIG_FILE {
                let why = "it is larger than 1 MiB: not a configuration of a VM";
                return Err(io::Error::other(why));
            }
            Ok(parse(&text)?)
        };
        read().map_err(|source| ConfigError::File(path.to_owned(), source))
    }

    /// Checks what can be checked without access to files and devices.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.kernel.as_os_str().is_empty() {
            return Err(ConfigError::NoKernel);
        }
        if !(1..=MAX_CPUS).contains(&self.cpus) {
            return Err(ConfigError::Cpus(self.cpus));
        }
        let bytes = self.memory.bytes;
        if !(MIN_MEMORY..=MAX_MEMORY).contains(&bytes) || !bytes.is_multiple_of(4096) {
            let hint = if bytes < 1 << 20 {
                "; did you leave out the unit, as in 512M?"
            } else {
                ""
            };
            return Err(ConfigError::Memory(self.memory, hint));
        }
        if self.require_sandbox && self.sandbox != SandboxMode::Strict {
            return Err(ConfigError::Sandbox);
        }
        for disk in &self.disks {
            disk.validate()
                .map_err(|why| ConfigError::Disk(disk.path.clone(), why))?;
        }
        net::validate_all(&self.nets).map_err(ConfigError::Net)?;
        if let Some(vsock) = &self.vsock {
            vsock.validate().map_err(ConfigError::Vsock)?;
        }
        Ok(())
    }

    /// The kernel command line: the default or its replacement, then what is appended. The default has the kernel ask passt for its
    /// address. Not so with a TAP interface: where nobody answers, it would ask for minutes.
    pub fn kernel_cmdline(&self) -> String {
        let base = self.cmdline.as_deref().unwrap_or(match self.console {
            ConsoleKind::Serial => DEFAULT_CMDLINE,
            ConsoleKind::Virtio => VIRTIO_CMDLINE,
        });
        let asks = self.cmdline.is_none() && self.nets.iter().any(|net| net.passt);
        let dhcp = if asks { "ip=dhcp" } else { "" };
        join_words([base, dhcp, self.append.as_deref().unwrap_or_default()])
    }
}

/// Rejects arrays in place of objects. Serde would accept a structure as an array of its fields.
fn parse(json: &str) -> serde_json::Result<VmConfig> {
    let config = serde_json::from_str(json)?;
    let value: Value = serde_json::from_str(json)?;
    let list = |field, what| {
        let objects = value.get(field).and_then(Value::as_array);
        objects
            .into_iter()
            .flatten()
            .map(move |object| (what, object))
    };
    // Without one, it is null.
    let vsock = value.get("vsock").filter(|vsock| !vsock.is_null());
    for (what, object) in std::iter::once(("a VM", &value))
        .chain(list("disks", "a disk"))
        .chain(list("nets", "a network device"))
        .chain(vsock.map(|vsock| ("a socket device", vsock)))
    {
        if !object.is_object() {
            return Err(serde::de::Error::custom(format!(
                "{what} is written as an object: {{\"field\": value, ...}}"
            )));
        }
    }
    Ok(config)
}

/// Joins the parts that are not empty, with spaces.
pub fn join_words<const N: usize>(parts: [&str; N]) -> String {
    let parts: Vec<&str> = parts
        .iter()
        .map(|part| part.trim())
        .filter(|part| !part.is_empty())
        .collect();
    parts.join(" ")
}

#[cfg(test)]
mod tests;
