//! A kernel's build configuration, and what its options mean for a guest.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use super::check::Check;
use super::check::Verdict::{self, Info, Warn};

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

/// Options beside ACPI that a guest should have: name, how much it matters that one is off, and what that means.
const OPTIONS: [(&str, Verdict, &str); 8] = [
    ("VIRTIO_MMIO", Warn, "no disks, no network"),
    ("VIRTIO_BLK", Warn, "no disks"),
    ("SERIAL_8250_CONSOLE", Warn, "the guest is silent on COM1"),
    (
        "BLK_DEV_INITRD",
        Warn,
        "no initrd: the root must be on a disk",
    ),
    ("KVM_GUEST", Warn, "no kvm-clock: booting takes longer"),
    ("DEVTMPFS", Warn, "the initrd must make its device nodes"),
    ("SMP", Info, "it uses one CPU, and boots faster for that"),
    ("PVH", Info, "its vmlinux starts by the Linux protocol only"),
];

/// What the options mean for a guest of this VMM.
pub(crate) fn check_config(config: &KernelConfig) -> Vec<Check> {
    let build = |name: &str| format!("build the kernel with CONFIG_{name}=y");
    let mut checks = vec![match (config.has("ACPI"), config.has("X86_MPPARSE")) {
        (true, true) => Check::ok("CONFIG_ACPI", "yes, and the MP table (CONFIG_X86_MPPARSE)"),
        (true, false) => Check::ok("CONFIG_ACPI", "yes; no MP table, so acpi=off does not work"),
        (false, true) => Check::info(
            "CONFIG_ACPI",
            "no: CPUs and interrupts come from the MP table (CONFIG_X86_MPPARSE)",
        ),
        (false, false) => Check::warn(
            "CONFIG_ACPI",
            "no, and no MP table: one CPU, and devices without interrupts",
        )
        .hint(build("ACPI")),
    }];
    for (name, verdict, without) in OPTIONS {
        let subject = format!("CONFIG_{name}");
        checks.push(match (config.get(name), verdict) {
            (Setting::Yes, Warn) => Check::ok(subject, "yes"),
            (Setting::Yes, _) => Check::info(subject, "yes"),
            (Setting::Module, _) => {
                let found = "a module, which the initrd must load";
                Check::info(subject, found)
            }
            (Setting::No, Warn) => Check::warn(subject, format!("no: {without}")).hint(build(name)),
            (Setting::No, _) => Check::info(subject, format!("no: {without}")),
        });
    }
    let cmdline = "VIRTIO_MMIO_CMDLINE_DEVICES";
    if !config.has("ACPI") && !config.has(cmdline) {
        let found = "no, and no ACPI: virtio devices will not be found";
        checks.push(Check::warn(format!("CONFIG_{cmdline}"), found).hint(build(cmdline)));
    }
    let formats = ["GZIP", "BZIP2", "LZMA", "XZ", "LZO", "LZ4", "ZSTD"];
    let formats = formats.into_iter();
    let formats: Vec<_> = std::iter::once("plain cpio".to_owned())
        .chain(
            formats
                .filter(|format| config.has(&format!("RD_{format}")))
                .map(str::to_lowercase),
        )
        .collect();
    checks.push(Check::info("initrd formats", formats.join(", ")));
    checks
}

#[cfg(test)]
mod tests {
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
