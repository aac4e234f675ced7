//! The VMMs that can be measured, and the command line of each for one and the same guest.

use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::report::MINIVMM;
use crate::config::VmConfig;
use crate::tools::measure::{find_program, first_line};

/// The arguments that boot a guest; the path is a directory for files.
type Arguments = fn(&VmConfig, &Path) -> io::Result<Vec<OsString>>;

/// A VMM besides minivmm.
#[derive(Debug)]
pub struct OtherVmm {
    /// As --vs calls it.
    pub name: &'static str,
    /// What it is.
    pub about: &'static str,
    /// The names that its program goes by.
    pub(super) programs: &'static [&'static str],
    /// What differs from the others, for the report.
    differs: &'static str,
    arguments: Arguments,
}

/// All that are known.
pub const OTHER_VMMS: [OtherVmm; 5] = [
    OtherVmm {
        name: "qemu",
        about: "QEMU's machine type microvm",
        programs: &["qemu-system-x86_64"],
        differs: "microvm without PIT, PIC and RTC; firmware (qboot) runs before a bzImage; isa-serial on stdio",
        arguments: qemu,
    },
    OtherVmm {
        name: "firecracker",
        about: "Firecracker",
        programs: &["firecracker"],
        differs: "takes an ELF vmlinux, no bzImage; has no ACPI power-off, so a guest that powers off never ends: have it \
                  reset, or give --stop-at-marker",
        arguments: firecracker,
    },
    OtherVmm {
        name: "cloud-hypervisor",
        about: "Cloud Hypervisor",
        programs: &["cloud-hypervisor"],
        differs: "takes a PVH vmlinux, newer versions a bzImage; PCI; serial on stdio",
        arguments: cloud_hypervisor,
    },
    OtherVmm {
        name: KVMTOOL,
        about: "kvmtool, whose program is called lkvm",
        programs: &["lkvm", "kvmtool"],
        differs: "puts options of its own before the command line (noapic noacpi pci=conf1 reboot=k panic=1 ...); prints messages \
                  of its own to stdout, so its first console byte is not known",
        arguments: kvmtool,
    },
    OtherVmm {
        name: "crosvm",
        about: "crosvm",
        programs: &["crosvm"],
        differs: "one process (--disable-sandbox); adds options for its virtual hardware to the command line; serial on stdout",
        arguments: crosvm,
    },
];

const KVMTOOL: &str = "kvmtool";

/// A VMM as it is installed on this host.
#[derive(Debug)]
pub(super) struct Vmm {
    pub(super) name: &'static str,
    /// The command that boots the guest.
    pub(super) words: Vec<OsString>,
    pub(super) differs: &'static str,
}

impl OtherVmm {
    /// This VMM, if its program is on the PATH; `scratch` is a directory for its files.
    pub(super) fn find(&self, guest: &VmConfig, scratch: &Path) -> io::Result<Option<Vmm>> {
        let Some(program) = self.programs.iter().find_map(|name| find_program(name)) else {
            return Ok(None);
        };
        let mut words = vec![program.into_os_string()];
        words.extend((self.arguments)(guest, scratch)?);
        Ok(Some(Vmm {
            name: self.name,
            words,
            differs: self.differs,
        }))
    }
}

/// minivmm itself: the very program that measures.
pub(super) fn minivmm(guest: &VmConfig) -> io::Result<Vmm> {
    let mut all: Vec<OsString> = vec![std::env::current_exe()?.into()];
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
        name: MINIVMM,
        words: all,
        differs: "",
    })
}

impl Vmm {
    /// Whether it prints messages of its own to stdout, so that its first byte says nothing about the console.
    pub(super) fn is_talkative(&self) -> bool {
        self.name == KVMTOOL
    }

    /// The first line of what it says of its version.
    pub(super) fn version(&self) -> String {
        // kvmtool knows the word, not the option.
        let argument = if self.name == KVMTOOL {
            "version"
        } else {
            "--version"
        };
        let program = self.words.first().map(PathBuf::from).unwrap_or_default();
        first_line(&program, &[argument]).unwrap_or("unknown".into())
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

fn qemu(guest: &VmConfig, _: &Path) -> io::Result<Vec<OsString>> {
    Ok(words(
        guest,
        QEMU_MICROVM,
        &[
            ("-smp", &guest.cpus.to_string()),
            ("-m", &format!("{}M", mib(guest))),
            ("-kernel", &guest.kernel),
            ("-append", &guest.kernel_cmdline()),
        ],
        "-initrd",
    ))
}

/// docs/getting-started.md; only errors are logged, since the log goes to stdout.
fn firecracker(guest: &VmConfig, scratch: &Path) -> io::Result<Vec<OsString>> {
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
fn cloud_hypervisor(guest: &VmConfig, _: &Path) -> io::Result<Vec<OsString>> {
    Ok(words(
        guest,
        "--serial tty --console off",
        &[
            ("--cpus", &format!("boot={}", guest.cpus)),
            ("--memory", &format!("size={}M", mib(guest))),
            ("--kernel", &guest.kernel),
            ("--cmdline", &guest.kernel_cmdline()),
        ],
        "--initramfs",
    ))
}

/// Documentation/kvmtool.1
fn kvmtool(guest: &VmConfig, _: &Path) -> io::Result<Vec<OsString>> {
    Ok(words(
        guest,
        "run --console serial --network mode=none",
        &[
            ("--cpus", &guest.cpus.to_string()),
            ("--mem", &mib(guest).to_string()),
            ("--kernel", &guest.kernel),
            ("--params", &guest.kernel_cmdline()),
        ],
        "--initrd",
    ))
}

/// docs/book/src/running_crosvm/
fn crosvm(guest: &VmConfig, _: &Path) -> io::Result<Vec<OsString>> {
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
    Ok(words)
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

    fn arguments(name: &str, guest: &VmConfig) -> Vec<OsString> {
        let vmm = OTHER_VMMS.iter().find(|vmm| vmm.name == name).unwrap();
        (vmm.arguments)(guest, Path::new("")).unwrap()
    }

    #[test]
    fn all_boot_the_same_guest() {
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
            (arguments("qemu", &guest), "-smp 2", "-m 256M"),
            (
                arguments("cloud-hypervisor", &guest),
                "--cpus boot=2",
                "--memory size=256M",
            ),
            (arguments("kvmtool", &guest), "--cpus 2", "--mem 256"),
            (arguments("crosvm", &guest), "--cpus 2", "--mem 256"),
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
            arguments("qemu", &guest),
            arguments("cloud-hypervisor", &guest),
            arguments("kvmtool", &guest),
            arguments("crosvm", &guest),
        ] {
            assert!(!shown(&words).contains("init"), "{words:?}");
        }
    }
}
