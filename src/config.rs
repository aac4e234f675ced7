//! What a VM is made of: one type for the command line and for a JSON file.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::boot::BootProtocol;
use crate::console::SerialMode;
use crate::memory;

/// Kernel command line of a microVM: the console, a reset rather than a hang after a panic, and few messages, since
/// every byte on a serial line costs the guest two exits.
pub const DEFAULT_CMDLINE: &str = "console=ttyS0 panic=-1 quiet";

/// Most vCPUs of a VM.
pub const MAX_CPUS: u8 = 64;

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
    #[error("no kernel: name one with --kernel FILE, or in a file given with --config")]
    NoKernel,
    /// Not a possible number of vCPUs.
    #[error("{0} vCPUs are not possible: --cpus takes 1 to {MAX_CPUS}")]
    Cpus(u8),
    /// Not a possible size.
    #[error("{0} of memory is not possible: --memory takes 16M to 4T, in whole pages of 4 KiB{1}")]
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

/// What to do when the guest resets the machine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
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

impl TryFrom<String> for Span {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Span> for String {
    fn from(span: Span) -> Self {
        humantime::format_duration(span.0).to_string()
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
    /// Kernel command line, in place of [`DEFAULT_CMDLINE`].
    pub cmdline: Option<String>,
    /// What is added to the command line.
    pub append: Option<String>,
    /// Number of vCPUs.
    pub cpus: u8,
    /// Guest RAM.
    pub memory: MemorySize,
    /// Where the serial console goes.
    pub serial: SerialMode,
    /// What a reset does.
    pub on_reboot: OnReboot,
    /// Longest time from the start of minivmm to the guest's end.
    pub deadline: Option<Span>,
    /// How the kernel is entered.
    pub boot_protocol: BootProtocol,
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
            serial: SerialMode::default(),
            on_reboot: OnReboot::default(),
            deadline: None,
            boot_protocol: BootProtocol::default(),
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
        serde_json::from_str(&text).map_err(|source| ConfigError::Parse {
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
        if !(memory::MIN_SIZE..=memory::MAX_SIZE).contains(&bytes) || !bytes.is_multiple_of(4096) {
            let hint = if bytes < 1 << 20 {
                "; did you leave out the unit, as in 512M?"
            } else {
                ""
            };
            return Err(ConfigError::Memory(self.memory, hint));
        }
        Ok(())
    }

    /// The kernel command line: the default or its replacement, then what is appended.
    pub fn kernel_cmdline(&self) -> String {
        let base = self.cmdline.as_deref().unwrap_or(DEFAULT_CMDLINE);
        let append = self.append.as_deref().unwrap_or_default();
        [base, append]
            .iter()
            .map(|s| s.trim())
            .filter(|s| !s.is_empty())
            .collect::<Vec<_>>()
            .join(" ")
    }
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
    fn sizes_print_as_they_are_written() {
        for text in ["16M", "2G", "1T", "20K", "1B"] {
            assert_eq!(text.parse::<MemorySize>().unwrap().to_string(), text);
        }
        assert_eq!("1GiB".parse::<MemorySize>().unwrap().bytes, 1 << 30);
        assert_eq!("0.5G".parse::<MemorySize>().unwrap().bytes, 1 << 29);
    }
}
