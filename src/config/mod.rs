//! What a VM is made of: one type for the command line and for a JSON file.

mod boot;
mod console;

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use minivmm_devices::block::Engine;
use minivmm_devices::virtio::blk::{MAX_ID_LEN, MAX_QUEUES};

pub use boot::BootProtocol;
pub use console::{ConsoleTarget, ConsoleTargetError};

/// What a kernel is told whatever its console is: to reset rather than hang after a panic; to print little, since every byte on a
/// serial line costs two exits; and to leave out what costs time at boot. The PCI bus is empty, yet a kernel that finds an AMD
/// processor with a GART (not those since 2012) reads 16,000 of its registers, unless `pci=` says not to look early;
/// `pci=off` spares that as well, but has it log an error. With RAM above 4 GiB it would set 64 MiB of it aside
/// for devices that reach no further, which no device here is (`swiotlb=`). With a single CPU, Linux patches each LOCK prefix
/// away, 9,000 in Debian's: a guest that runs for long may be quicker if it does. And Debian's kernels test their ciphers.
/// docs/benchmarks.md has what each of them takes.
macro_rules! common_cmdline {
    () => {
        "panic=-1 quiet pci=conf1,noearly swiotlb=noforce noreplace-smp cryptomgr.notests"
    };
}

/// Kernel command line of a microVM whose console is COM1.
pub const DEFAULT_CMDLINE: &str = concat!("console=ttyS0 ", common_cmdline!());

/// The same for hvc0. Its driver may be a module, and without it a kernel would be silent even in a panic, so COM1 has the
/// messages until the driver takes over: behind `quiet`, since it prints what there is when it is read.
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
    /// The file cannot be read.
    #[error("cannot read the configuration {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: std::io::Error,
    },
    /// The file is larger than any configuration.
    #[error("{} is larger than 1 MiB: not a configuration of a VM", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// The file is not what it should be.
    #[error("cannot use the configuration {}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// No kernel was named.
    #[error("no kernel is named")]
    NoKernel,
    /// Not a possible number of vCPUs.
    #[error("{0} vCPUs are not possible: a VM has 1 to {MAX_CPUS}")]
    Cpus(u8),
    /// A disk that cannot be.
    #[error("disk {path}: {why}", path = path.display())]
    Disk {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// Not a possible size.
    #[error("{0} of memory is not possible: a VM has 16M to 4T, in whole pages of 4 KiB{1}")]
    Memory(MemorySize, &'static str),
}

/// A size of guest RAM. Written with a unit, as in `512M` or `2G`; units are powers of 1024.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MemorySize {
    /// Size in bytes.
    pub bytes: u64,
}

impl FromStr for MemorySize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match parse_size::Config::new()
            .with_binary()
            .parse_size(text.trim())
        {
            Ok(bytes) => Ok(Self { bytes }),
            Err(e) => Err(format!("{e}; write a number and a unit, as in 512M or 2G")),
        }
    }
}

impl TryFrom<String> for MemorySize {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<MemorySize> for String {
    fn from(size: MemorySize) -> Self {
        size.to_string()
    }
}

impl fmt::Display for MemorySize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, letter) = [
            (1 << 40, "T"),
            (1 << 30, "G"),
            (1 << 20, "M"),
            (1 << 10, "K"),
        ]
        .into_iter()
        .find(|(unit, _)| self.bytes >= *unit && self.bytes.is_multiple_of(*unit))
        .unwrap_or((1u64, "B"));
        write!(f, "{}{letter}", self.bytes / unit)
    }
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

/// A time span. Written with a unit, as in `500ms`, `10s` or `2min`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Span(pub Duration);

impl Span {
    /// So long after `start`; `None`, which is never, beyond what the clock can say.
    pub fn after(self, start: Instant) -> Option<Instant> {
        start.checked_add(self.0)
    }
}

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match humantime::parse_duration(text) {
            Ok(duration) => Ok(Self(duration)),
            Err(e) => Err(format!(
                "{e}; write a number and a unit, as in 500ms, 10s or 2min"
            )),
        }
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        humantime::format_duration(self.0).fmt(f)
    }
}

impl TryFrom<String> for Span {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Span> for String {
    fn from(span: Span) -> Self {
        span.to_string()
    }
}

/// How a disk is written on the command line.
const DISK_SYNTAX: &str = "path=FILE[,ro][,ephemeral][,format=raw][,sector=512|4096][,id=SERIAL][,queues=N]\
                           [,engine=io_uring|sync]";

/// The format of a disk's file. There is only one, which need not be named but for a file that looks like another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    /// Its bytes are the disk's.
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
    /// Its format, if that must be said.
    pub format: Option<DiskFormat>,
    /// Bytes in a logical block, 512 or 4096; without it, the block device's own, and 512 in a file.
    pub sector: Option<u32>,
    /// Serial number, by which a guest may find it.
    pub id: Option<String>,
    /// Number of queues; without it, one a vCPU up to [`MAX_QUEUES`].
    pub queues: Option<u16>,
    /// How the host's file is read and written; without it, through io_uring but for an ephemeral disk.
    pub engine: Option<Engine>,
}

impl DiskConfig {
    fn validate(&self) -> Result<(), String> {
        if self.path.as_os_str().is_empty() {
            return Err("no file: write path=FILE".into());
        }
        if self.ephemeral && self.read_only {
            return Err("ephemeral and ro: the guest either writes to a copy that goes with the VM, or it does not write".into());
        }
        if self.ephemeral && self.engine == Some(Engine::IoUring) {
            return Err(
                "ephemeral and engine=io_uring: an ephemeral disk has engine=sync alone".into(),
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
                "id '{}': a serial number has letters, digits and signs alone",
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
        let mut seen = Vec::new();
        for part in text.split(',') {
            let (key, value) = match part.split_once('=') {
                Some((key, value)) => (key, Some(value)),
                None => (part, None),
            };
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
                ("sector", Some(value)) => {
                    let sector = value.parse().map_err(|e| format!("'{part}': {e}"))?;
                    config.sector = Some(sector);
                }
                ("id", Some(value)) => config.id = Some(value.into()),
                ("queues", Some(value)) => {
                    let queues = value.parse().map_err(|e| format!("'{part}': {e}"))?;
                    config.queues = Some(queues);
                }
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
            if seen.contains(&key) {
                return Err(format!("'{part}': {key} comes twice"));
            }
            seen.push(key);
        }
        config.validate()?;
        Ok(config)
    }
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
    /// Whether there is a virtio entropy device.
    pub rng: bool,
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
            rng: false,
            console: ConsoleKind::default(),
            serial: ConsoleTarget::default(),
            on_reboot: OnReboot::default(),
            deadline: None,
            boot_protocol: BootProtocol::default(),
            kernel_cache: true,
        }
    }
}

impl VmConfig {
    /// Reads a JSON file. Fields that it lacks have their defaults; fields that are not known are errors.
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let read = |source| ConfigError::Read {
            path: path.to_owned(),
            source,
        };
        let file = File::open(path).map_err(read)?;
        let mut text = String::new();
        file.take(MAX_CONFIG_FILE + 1)
            .read_to_string(&mut text)
            .map_err(read)?;
        if text.len() as u64 > MAX_CONFIG_FILE {
            return Err(ConfigError::TooLarge {
                path: path.to_owned(),
            });
        }
        parse(&text).map_err(|source| ConfigError::Parse {
            path: path.to_owned(),
            source,
        })
    }

    /// Checks what no file or device need be asked about.
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
        for disk in &self.disks {
            disk.validate().map_err(|why| ConfigError::Disk {
                path: disk.path.clone(),
                why,
            })?;
        }
        Ok(())
    }

    /// How many virtio devices the machine has.
    pub fn virtio_devices(&self) -> usize {
        let virtio_console = self.console == ConsoleKind::Virtio;
        self.disks.len() + usize::from(self.rng) + usize::from(virtio_console)
    }

    /// The kernel command line: the default or its replacement, then what is appended.
    pub fn kernel_cmdline(&self) -> String {
        let base = self.cmdline.as_deref().unwrap_or(match self.console {
            ConsoleKind::Serial => DEFAULT_CMDLINE,
            ConsoleKind::Virtio => VIRTIO_CMDLINE,
        });
        join_words([base, self.append.as_deref().unwrap_or_default()])
    }
}

/// Serde also takes a structure for an array of its fields, in an order that is nobody's affair.
fn parse(json: &str) -> serde_json::Result<VmConfig> {
    let config = serde_json::from_str(json)?;
    let value: Value = serde_json::from_str(json)?;
    let disks = value.get("disks").and_then(Value::as_array);
    for (what, object) in std::iter::once(("a VM", &value))
        .chain(disks.into_iter().flatten().map(|disk| ("a disk", disk)))
    {
        if !object.is_object() {
            return Err(serde::de::Error::custom(format!(
                "{what} is written as an object: {{\"field\": value, ...}}"
            )));
        }
    }
    Ok(config)
}

/// Puts words together, but for parts that are empty.
pub fn join_words<const N: usize>(parts: [&str; N]) -> String {
    let parts: Vec<&str> = parts
        .iter()
        .map(|part| part.trim())
        .filter(|part| !part.is_empty())
        .collect();
    parts.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn parse(json: &str) -> Result<VmConfig, ConfigError> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(json.as_bytes()).unwrap();
        VmConfig::from_file(file.path())
    }

    #[test]
    fn json_has_the_fields_of_the_command_line() {
        let config = parse(
            r#"{"kernel": "k", "memory": "1G", "cpus": 2, "append": "-- sh", "deadline": "1m 30s",
                "on_reboot": "restart", "boot_protocol": "pvh", "serial": "file=/tmp/x"}"#,
        )
        .unwrap();
        assert_eq!((config.cpus, config.memory.bytes), (2, 1 << 30));
        assert_eq!(config.deadline, Some(Span(Duration::from_secs(90))));
        assert_eq!(config.kernel_cmdline(), format!("{DEFAULT_CMDLINE} -- sh"));
        config.validate().unwrap();
        let again: VmConfig =
            serde_json::from_str(&serde_json::to_string(&config).unwrap()).unwrap();
        assert_eq!(again, config);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let chain = |json: &str| {
            let error = parse(json).unwrap_err();
            format!("{error}: {}", std::error::Error::source(&error).unwrap())
        };
        assert!(chain(r#"{"kernel": "k", "memroy": "1G"}"#).contains("memroy"));
        assert!(chain(r#"{"kernel": "k", "memory": "1Q"}"#).contains("512M or 2G"));
        assert!(chain(r#"{"kernel": "k", "#).contains("EOF"));
        assert!(chain(r#"{"cpus": -1}"#).contains("-1"));
        assert!(chain(r#"["k"]"#).contains("a VM is written as an object"));
        assert!(chain("[]").contains("a VM is written as an object"));
        assert!(chain(r#"{"kernel": "k", "disks": [{"path": "a"}, ["b"]]}"#).contains("a disk is"));
        assert!(matches!(
            parse(&" ".repeat(1 << 21)),
            Err(ConfigError::TooLarge { .. })
        ));
    }

    #[test]
    fn limits_hold() {
        let config = |cpus, bytes| VmConfig {
            kernel: "k".into(),
            cpus,
            memory: MemorySize { bytes },
            ..VmConfig::default()
        };
        assert!(config(1, 16 << 20).validate().is_ok());
        assert!(matches!(
            config(0, 16 << 20).validate(),
            Err(ConfigError::Cpus(0))
        ));
        assert!(matches!(
            config(65, 16 << 20).validate(),
            Err(ConfigError::Cpus(65))
        ));
        assert!(config(1, 4 << 40).validate().is_ok());
        for bytes in [512, 1 << 20, (16 << 20) + 1, u64::MAX, (4 << 40) + 4096] {
            assert!(
                matches!(config(1, bytes).validate(), Err(ConfigError::Memory(..))),
                "{bytes}"
            );
        }
        let error = config(1, 512).validate().unwrap_err().to_string();
        assert!(error.contains("512B") && error.contains("unit"), "{error}");
        assert!(matches!(
            VmConfig::default().validate(),
            Err(ConfigError::NoKernel)
        ));
    }

    #[test]
    fn a_disk_is_written_as_its_help_says() {
        let disk = |text: &str| text.parse::<DiskConfig>();
        assert_eq!(
            disk("path=/a/b.img,ro,id=root"),
            Ok(DiskConfig {
                path: "/a/b.img".into(),
                read_only: true,
                id: Some("root".into()),
                ..DiskConfig::default()
            })
        );
        assert!(!disk("path=x").unwrap().read_only);
        let raw = disk("path=x,format=raw,sector=4096").unwrap();
        assert_eq!(
            (raw.format, raw.sector),
            (Some(DiskFormat::Raw), Some(4096))
        );
        let all = disk("engine=sync,queues=8,ephemeral,path=x").unwrap();
        assert!(all.ephemeral);
        assert_eq!((all.queues, all.engine), (Some(8), Some(Engine::Sync)));
        // An equals sign may be in a path.
        assert_eq!(disk("path=a=b").unwrap().path, PathBuf::from("a=b"));
        for (text, word) in [
            ("", "path=FILE"),
            ("disk.img", "path=FILE"),
            ("ro", "no file"),
            ("path=", "no file"),
            ("path=x,", "not known"),
            ("path=x,rw", "'rw'"),
            ("path=x,ro=1", "'ro=1'"),
            ("path=x,format=qcow2", "qemu-img convert"),
            ("path=x,format", "format=raw"),
            ("path=x,sector=1024", "512 or 4096"),
            ("path=x,sector=4k", "'sector=4k'"),
            ("path=x,sector", "'sector'"),
            ("path=x,queues=0", "1 to 8"),
            ("path=x,queues=9", "1 to 8"),
            ("path=x,queues=", "'queues='"),
            ("path=x,queues=-1", "'queues=-1'"),
            ("path=x,queues", "'queues'"),
            ("path=x,engine=aio", "engine=io_uring or"),
            ("path=x,engine", "engine=io_uring or"),
            ("path=x,ephemeral=1", "'ephemeral=1'"),
            ("path=x,ephemeral,ro", "ephemeral and ro"),
            ("path=x,engine=io_uring,ephemeral", "engine=sync"),
            ("path=x,path=y", "twice"),
            ("path=x,ro,ro", "twice"),
            ("path=x,id=", "1 to 20"),
            ("path=x,id=123456789012345678901", "1 to 20"),
            ("path=x,id=a b", "letters"),
            ("path=x,id=\u{e9}", "letters"),
        ] {
            let error = disk(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
        let config = parse(
            r#"{"kernel": "k", "rng": true, "mergeable": true, "disks": [{"path": "a,b", "engine": "io_uring", "queues": 2},
                {"path": "c", "ro": true, "id": "x", "format": "raw", "sector": 512}]}"#,
        )
        .unwrap();
        config.validate().unwrap();
        assert_eq!(config.disks[0].path, PathBuf::from("a,b"));
        assert!(config.rng && config.mergeable && config.disks[1].read_only);
        assert_eq!(config.disks[0].engine, Some(Engine::IoUring));
        assert_eq!(config.disks[1].format, Some(DiskFormat::Raw));
        assert_eq!(config.disks[1].sector, Some(512));
        for field in [
            r#""format": "qcow2""#,
            r#""engine": "aio""#,
            r#""queues": -1"#,
        ] {
            let json = format!(r#"{{"disks": [{{"path": "a", {field}}}]}}"#);
            assert!(matches!(parse(&json), Err(ConfigError::Parse { .. })));
        }
    }

    #[test]
    fn disks_have_limits() {
        let config = |id: &str| VmConfig {
            kernel: "k".into(),
            disks: vec![DiskConfig {
                path: "d".into(),
                id: Some(id.into()),
                ..DiskConfig::default()
            }],
            ..VmConfig::default()
        };
        config("x").validate().unwrap();
        let error = config("").validate().unwrap_err().to_string();
        assert!(error.contains("disk d: id ''"), "{error}");
    }

    #[test]
    fn a_virtio_console_has_its_own_command_line() {
        let config = parse(r#"{"kernel": "k", "console": "virtio", "append": "x"}"#).unwrap();
        assert_eq!(config.kernel_cmdline(), format!("{VIRTIO_CMDLINE} x"));
        assert_eq!(config.virtio_devices(), 1);
        assert!(VIRTIO_CMDLINE.contains(config.console.parameter()));
        assert!(DEFAULT_CMDLINE.contains(ConsoleKind::default().parameter()));
        assert!(parse(r#"{"kernel": "k", "console": "hvc0"}"#).is_err());
    }

    #[test]
    fn sizes_print_as_they_are_written() {
        for text in ["16M", "2G", "1T", "20K", "1B"] {
            assert_eq!(text.parse::<MemorySize>().unwrap().to_string(), text);
        }
        assert_eq!("1GiB".parse::<MemorySize>().unwrap().bytes, 1 << 30);
        assert_eq!("0.5G".parse::<MemorySize>().unwrap().bytes, 1 << 29);
    }
}
