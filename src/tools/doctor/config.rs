//! A kernel's build configuration, and what its options mean for a guest.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use super::check::Check;

/// Largest configuration that is read; Debian's has 270 KB.
pub(crate) const MAX_CONFIG_LEN: u64 = 4 << 20;

/// How an option is set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Setting {
    /// Built in.
    Yes,
    /// A module, which the initrd must bring.
    Module,
    /// Off, or unknown to this kernel.
    No,
}

/// The build configuration of a kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelConfig {
    /// Where it was found.
    pub origin: String,
    options: BTreeMap<String, String>,
}

impl KernelConfig {
    /// Parses the text of a .config file; `None` if there is no option in it.
    pub fn parse(origin: impl Into<String>, text: &str) -> Option<Self> {
        let options: BTreeMap<_, _> = text
            .lines()
            .filter(|line| line.starts_with("CONFIG_"))
            .filter_map(|line| line.split_once('='))
            .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
            .collect();
        (!options.is_empty()).then(|| Self {
            origin: origin.into(),
            options,
        })
    }

    /// Reads the configuration next to a kernel file, where distributions install it.
    pub(crate) fn next_to(kernel: &Path, version: Option<&str>) -> Option<Self> {
        let dir = kernel.parent()?;
        let release = version.and_then(|version| version.split_whitespace().next());
        // A release comes out of the file: it may name a file here, and nothing elsewhere.
        let release = release.filter(|release| !release.contains('/'));
        let names = release.map(|release| format!("config-{release}"));
        names
            .into_iter()
            .chain(["config".to_owned(), ".config".to_owned()])
            .find_map(|name| {
                let path = dir.join(name);
                if !path.metadata().ok()?.is_file() {
                    return None;
                }
                let mut text = Vec::new();
                File::open(&path)
                    .ok()?
                    .take(MAX_CONFIG_LEN)
                    .read_to_end(&mut text)
                    .ok()?;
                Self::parse(path.display().to_string(), &String::from_utf8_lossy(&text))
            })
    }

    /// How the option `CONFIG_<name>` is set.
    pub fn get(&self, name: &str) -> Setting {
        match self
            .options
            .get(&format!("CONFIG_{name}"))
            .map(String::as_str)
        {
            Some("y") => Setting::Yes,
            Some("m") => Setting::Module,
            _ => Setting::No,
        }
    }

    fn has(&self, name: &str) -> bool {
        self.get(name) == Setting::Yes
    }
}

fn build(name: &str) -> String {
    format!("build the kernel with CONFIG_{name}=y")
}

/// What the options mean for a guest of this VMM.
pub(crate) fn check_config(config: &KernelConfig) -> Vec<Check> {
    let mut checks = check_discovery(config);
    checks.extend(check_options(config));

    let formats: Vec<_> = ["GZIP", "BZIP2", "LZMA", "XZ", "LZO", "LZ4", "ZSTD"]
        .into_iter()
        .filter(|format| config.has(&format!("RD_{format}")))
        .map(str::to_lowercase)
        .collect();
    checks.push(Check::info(
        "initrd formats",
        if formats.is_empty() {
            "plain cpio".to_owned()
        } else {
            format!("plain cpio, {}", formats.join(", "))
        },
    ));
    checks
}

/// How the kernel finds CPUs, interrupts and devices.
fn check_discovery(config: &KernelConfig) -> Vec<Check> {
    let mut checks = Vec::new();
    checks.push(match (config.has("ACPI"), config.has("X86_MPPARSE")) {
        (true, mp_table) => Check::ok(
            "CONFIG_ACPI",
            if mp_table {
                "yes, and the MP table (CONFIG_X86_MPPARSE)"
            } else {
                "yes; no MP table, so acpi=off does not work"
            },
        ),
        (false, true) => Check::info(
            "CONFIG_ACPI",
            "no: CPUs and interrupts come from the MP table (CONFIG_X86_MPPARSE)",
        ),
        (false, false) => Check::warn(
            "CONFIG_ACPI",
            "no, and no MP table: one CPU, and devices without interrupts",
        )
        .hint(build("ACPI")),
    });
    let devices_found = config.has("ACPI") || config.has("VIRTIO_MMIO_CMDLINE_DEVICES");
    for (name, module, without) in [
        ("VIRTIO_MMIO", "virtio_mmio", "no disks, no network"),
        ("VIRTIO_BLK", "virtio_blk", "no disks"),
    ] {
        let subject = format!("CONFIG_{name}");
        checks.push(match config.get(name) {
            Setting::Yes => Check::ok(subject, "built in"),
            Setting::Module => Check::info(
                subject,
                format!("a module: the initrd must load {module} for disks"),
            ),
            Setting::No => Check::warn(subject, format!("no: {without}")).hint(build(name)),
        });
    }
    if !devices_found && config.get("VIRTIO_MMIO") != Setting::No {
        checks.push(
            Check::warn(
                "CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES",
                "no, and no ACPI: virtio devices will not be found",
            )
            .hint(build("VIRTIO_MMIO_CMDLINE_DEVICES")),
        );
    }
    checks
}

/// Options that are yes or no.
fn check_options(config: &KernelConfig) -> Vec<Check> {
    let mut checks = Vec::new();
    for (name, without) in [
        (
            "SERIAL_8250_CONSOLE",
            "no console on the serial port: the guest will be silent",
        ),
        (
            "BLK_DEV_INITRD",
            "no initrd: the root file system must be on a disk",
        ),
        (
            "KVM_GUEST",
            "no kvm-clock: booting takes longer, for the kernel must measure its clocks",
        ),
        ("DEVTMPFS", "the initrd must make its device nodes itself"),
    ] {
        let subject = format!("CONFIG_{name}");
        checks.push(if config.has(name) {
            Check::ok(subject, "yes")
        } else {
            Check::warn(subject, format!("not built in: {without}")).hint(build(name))
        });
    }
    for (name, with, without) in [
        (
            "SMP",
            "yes",
            "no: it uses one CPU, and boots faster for that",
        ),
        (
            "PVH",
            "yes: its vmlinux starts by PVH as well",
            "no: its vmlinux starts only by the Linux protocol",
        ),
    ] {
        checks.push(Check::info(
            format!("CONFIG_{name}"),
            if config.has(name) { with } else { without },
        ));
    }
    checks
}

#[cfg(test)]
mod tests {
    use super::super::check::Verdict;
    use super::*;

    #[test]
    fn options_are_read() {
        let text = "# comment\nCONFIG_A=y\nCONFIG_B=m\n# CONFIG_C is not set\nCONFIG_D=\"y\"\n";
        let config = KernelConfig::parse("test", text).unwrap();
        assert_eq!(config.get("A"), Setting::Yes);
        assert_eq!(config.get("B"), Setting::Module);
        assert_eq!(config.get("C"), Setting::No);
        assert_eq!(config.get("D"), Setting::No);
        assert_eq!(KernelConfig::parse("test", "no options\n=\n"), None);
    }

    #[test]
    fn a_kernel_without_a_console_gets_a_warning() {
        let config = KernelConfig::parse("test", "CONFIG_ACPI=y\nCONFIG_VIRTIO_MMIO=m\n").unwrap();
        let checks = check_config(&config);
        let find = |subject: &str| {
            checks
                .iter()
                .find(|check| check.subject == subject)
                .unwrap()
        };
        assert_eq!(find("CONFIG_ACPI").verdict, Verdict::Ok);
        assert_eq!(find("CONFIG_VIRTIO_MMIO").verdict, Verdict::Info);
        assert_eq!(find("CONFIG_SERIAL_8250_CONSOLE").verdict, Verdict::Warn);
        assert!(
            find("CONFIG_SERIAL_8250_CONSOLE")
                .hint
                .as_ref()
                .unwrap()
                .contains("=y")
        );
    }
}
