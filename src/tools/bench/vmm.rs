//! The monitors that can be measured, and how each is told of one and the same guest.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::json;

use crate::config::VmConfig;
use crate::tools::measure::find_program;

/// A monitor besides minivmm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Other {
    /// QEMU's machine type microvm.
    Qemu,
    /// Firecracker.
    Firecracker,
    /// Cloud Hypervisor.
    CloudHypervisor,
    /// kvmtool, whose program is called lkvm.
    Kvmtool,
    /// crosvm.
    Crosvm,
    /// None: minivmm alone
    None,
}

/// How a monitor's stdout is to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stdout {
    /// The console and nothing else.
    Console,
    /// The console, after words of the monitor's own: its first byte says nothing.
    Mixed,
}

/// A monitor as it is on this host.
#[derive(Debug)]
pub struct Vmm {
    /// As --vs calls it.
    pub name: &'static str,
    /// Its program.
    pub program: PathBuf,
    /// The command that boots the guest.
    pub words: Vec<OsString>,
    /// What is on its stdout.
    pub stdout: Stdout,
    /// What differs from the others, for the report.
    pub differs: &'static str,
}

impl Other {
    /// All there are.
    pub const ALL: [Self; 5] = [
        Self::Qemu,
        Self::Firecracker,
        Self::CloudHypervisor,
        Self::Kvmtool,
        Self::Crosvm,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Qemu => "qemu",
            Self::Firecracker => "firecracker",
            Self::CloudHypervisor => "cloud-hypervisor",
            Self::Kvmtool => "kvmtool",
            Self::Crosvm => "crosvm",
            Self::None => "none",
        }
    }

    /// The names that its program goes by.
    pub fn programs(self) -> &'static [&'static str] {
        match self {
            Self::Qemu => &["qemu-system-x86_64"],
            Self::Firecracker => &["firecracker"],
            Self::CloudHypervisor => &["cloud-hypervisor"],
            Self::Kvmtool => &["lkvm", "kvmtool"],
            Self::Crosvm => &["crosvm"],
            Self::None => &[],
        }
    }

    /// This monitor, if its program is on the PATH; `scratch` is a directory for its files.
    pub fn find(self, guest: &VmConfig, scratch: &Path) -> std::io::Result<Option<Vmm>> {
        let Some(program) = self.programs().iter().find_map(|name| find_program(name)) else {
            return Ok(None);
        };
        let mut words = vec![program.clone().into_os_string()];
        words.extend(match self {
            Self::Qemu => qemu(guest),
            Self::Firecracker => firecracker(guest, scratch)?,
            Self::CloudHypervisor => cloud_hypervisor(guest),
            Self::Kvmtool => kvmtool(guest),
            Self::Crosvm => crosvm(guest),
            Self::None => Vec::new(),
        });
        Ok(Some(Vmm {
            name: self.name(),
            program,
            words,
            stdout: match self {
                Self::Kvmtool => Stdout::Mixed,
                _ => Stdout::Console,
            },
            differs: self.differs(),
        }))
    }

    fn differs(self) -> &'static str {
        match self {
            Self::Qemu => {
                "microvm without PIT, PIC and RTC; firmware (qboot) runs before a bzImage; isa-serial on stdio"
            }
            Self::Firecracker => {
                "takes an ELF vmlinux, no bzImage; has no ACPI power-off, so a guest that powers off halts for ever: have it \
                 reset, or give --stop-at-marker"
            }
            Self::CloudHypervisor => {
                "takes a PVH vmlinux, newer versions a bzImage; PCI; serial on stdio"
            }
            Self::Kvmtool => {
                "puts words of its own before the command line (noapic noacpi pci=conf1 reboot=k panic=1 ...); writes of itself \
                 to stdout, so that its first console byte is not known"
            }
            Self::Crosvm => {
                "one process (--disable-sandbox); adds virtual hardware's words to the command line; serial on stdout"
            }
            Self::None => "",
        }
    }
}

impl fmt::Display for Other {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// minivmm itself: the very program that measures.
pub(super) fn minivmm(guest: &VmConfig) -> std::io::Result<Vmm> {
    let program = std::env::current_exe()?;
    let mut all: Vec<OsString> = vec![program.clone().into()];
    all.extend(words(
        guest,
        "--serial stdio",
        &[
            ("--cpus", &guest.cpus.to_string()),
            ("--memory", &guest.memory.to_string()),
            ("--kernel", &guest.kernel),
            ("--cmdline", &guest.kernel_cmdline()),
        ],
        "--initrd",
    ));
    Ok(Vmm {
        name: "minivmm",
        program,
        words: all,
        stdout: Stdout::Console,
        differs: "",
    })
}

impl Vmm {
    /// The first line of what it says of its version.
    pub fn version(&self) -> String {
        // kvmtool knows the word, not the option.
        let argument = match self.name {
            "kvmtool" => "version",
            _ => "--version",
        };
        let output = Command::new(&self.program)
            .arg(argument)
            .stdin(Stdio::null())
            .output();
        let text = output.map(|output| output.stdout).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        text.lines().next().unwrap_or("unknown").trim().to_owned()
    }
}

fn mib(guest: &VmConfig) -> u64 {
    guest.memory.bytes >> 20
}

/// Fixed words, then options with their values, then the initrd if there is one.
fn words(
    guest: &VmConfig,
    fixed: &str,
    options: &[(&str, &dyn AsRef<OsStr>)],
    initrd: &str,
) -> Vec<OsString> {
    let mut words: Vec<OsString> = fixed.split(' ').map(OsString::from).collect();
    let initrd = guest
        .initrd
        .iter()
        .map(|path| (initrd, path as &dyn AsRef<OsStr>));
    for (option, value) in options.iter().copied().chain(initrd) {
        words.extend([option.into(), value.as_ref().to_owned()]);
    }
    words
}

/// QEMU's options for its machine type microvm without what a PC has from before (docs/system/i386/microvm.rst); the guest's own
/// follow.
pub const QEMU_MICROVM: &str = "-M microvm,pit=off,pic=off,rtc=off -enable-kvm -cpu host,-arch-capabilities -nodefaults \
     -no-user-config -no-reboot -display none -serial stdio";

fn qemu(guest: &VmConfig) -> Vec<OsString> {
    words(
        guest,
        QEMU_MICROVM,
        &[
            ("-smp", &guest.cpus.to_string()),
            ("-m", &format!("{}M", mib(guest))),
            ("-kernel", &guest.kernel),
            ("-append", &guest.kernel_cmdline()),
        ],
        "-initrd",
    )
}

/// docs/getting-started.md; only errors are logged, since the log goes to stdout.
fn firecracker(guest: &VmConfig, scratch: &Path) -> std::io::Result<Vec<OsString>> {
    let file = scratch.join("firecracker.json");
    let config = json!({
        "boot-source": {
            "kernel_image_path": guest.kernel,
            "initrd_path": guest.initrd,
            "boot_args": guest.kernel_cmdline(),
        },
        "drives": [],
        "machine-config": { "vcpu_count": guest.cpus, "mem_size_mib": mib(guest) },
    });
    std::fs::write(&file, config.to_string())?;
    let fixed = ["--no-api", "--level", "Error", "--config-file"];
    let mut words: Vec<OsString> = fixed.map(OsString::from).into();
    words.push(file.into());
    Ok(words)
}

/// README.md, "Custom Kernel and Disk Image"
fn cloud_hypervisor(guest: &VmConfig) -> Vec<OsString> {
    words(
        guest,
        "--serial tty --console off",
        &[
            ("--cpus", &format!("boot={}", guest.cpus)),
            ("--memory", &format!("size={}M", mib(guest))),
            ("--kernel", &guest.kernel),
            ("--cmdline", &guest.kernel_cmdline()),
        ],
        "--initramfs",
    )
}

/// Documentation/kvmtool.1
fn kvmtool(guest: &VmConfig) -> Vec<OsString> {
    words(
        guest,
        "run --console serial --network mode=none",
        &[
            ("--cpus", &guest.cpus.to_string()),
            ("--mem", &mib(guest).to_string()),
            ("--kernel", &guest.kernel),
            ("--params", &guest.kernel_cmdline()),
        ],
        "--initrd",
    )
}

/// docs/book/src/running_crosvm/
fn crosvm(guest: &VmConfig) -> Vec<OsString> {
    let mut words = words(
        guest,
        "run --disable-sandbox --serial type=stdout,hardware=serial,num=1",
        &[
            ("--cpus", &guest.cpus.to_string()),
            ("--mem", &mib(guest).to_string()),
            ("--params", &guest.kernel_cmdline()),
        ],
        "--initrd",
    );
    words.push(guest.kernel.clone().into());
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::DEFAULT_CMDLINE;
    use crate::tools::measure::shown;

    fn guest() -> VmConfig {
        VmConfig {
            kernel: "/boot/vm linux".into(),
            initrd: Some("/i.cpio".into()),
            append: Some("-- true".into()),
            cpus: 2,
            ..VmConfig::default()
        }
    }

    #[test]
    fn each_is_told_of_the_same_guest() {
        let cmdline = format!("{DEFAULT_CMDLINE} -- true");
        let scratch = tempfile::tempdir().unwrap();
        let guest = guest();
        let json = firecracker(&guest, scratch.path()).unwrap();
        let json = std::fs::read_to_string(json.last().unwrap()).unwrap();
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(
            json,
            json!({
                "boot-source": {"kernel_image_path": "/boot/vm linux", "initrd_path": "/i.cpio", "boot_args": cmdline},
                "drives": [],
                "machine-config": {"vcpu_count": 2, "mem_size_mib": 256},
            })
        );
        let own = minivmm(&guest).unwrap().words;
        for (words, cpus, memory) in [
            (qemu(&guest), "-smp 2", "-m 256M"),
            (
                cloud_hypervisor(&guest),
                "--cpus boot=2",
                "--memory size=256M",
            ),
            (kvmtool(&guest), "--cpus 2", "--mem 256"),
            (crosvm(&guest), "--cpus 2", "--mem 256"),
            (own, "--cpus 2", "--memory 256M"),
        ] {
            let line = shown(&words);
            for wanted in [
                cpus,
                memory,
                "'/boot/vm linux'",
                "/i.cpio",
                &format!("'{cmdline}'"),
            ] {
                assert!(line.contains(wanted), "no {wanted} in {line}");
            }
        }
    }

    #[test]
    fn a_guest_may_have_no_initrd() {
        let guest = VmConfig {
            initrd: None,
            ..guest()
        };
        for words in [
            qemu(&guest),
            cloud_hypervisor(&guest),
            kvmtool(&guest),
            crosvm(&guest),
        ] {
            assert!(!shown(&words).contains("init"), "{words:?}");
        }
    }
}
