//! The VMMs that can be measured, and the command line of each for one and the same guest.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};

use super::report::MINIVMM;
use crate::config::VmConfig;
use crate::console::Signals;
use crate::tools::error::{ToolError, cannot};
use crate::tools::measure::{self, Watch, find_program, first_line};

/// A VMM besides minivmm.
#[derive(Debug)]
pub(super) struct OtherVmm {
    /// As --vs calls it.
    pub(super) name: &'static str,
    /// What it is.
    pub(super) about: &'static str,
    /// The names that its program goes by.
    pub(super) programs: &'static [&'static str],
    /// What differs from the others, for the report.
    differs: &'static str,
    /// Its arguments, as [`expand`] takes them.
    arguments: &'static str,
}

/// QEMU's options for its machine type microvm without a PC's legacy devices (docs/system/i386/microvm.rst), and more.
macro_rules! qemu_microvm {
    ($more:literal) => {
        concat!(
            "-M microvm,pit=off,pic=off,rtc=off -enable-kvm -cpu host,-arch-capabilities -nodefaults -no-user-config ",
            "-no-reboot -display none -serial stdio",
            $more
        )
    };
}

/// QEMU's options for its machine type microvm; the guest's follow.
pub const QEMU_MICROVM: &str = qemu_microvm!("");

/// All that are known.
pub(super) const OTHER_VMMS: [OtherVmm; 5] = [
    OtherVmm {
        name: "qemu",
        about: "QEMU's machine type microvm",
        programs: &["qemu-system-x86_64"],
        differs: "microvm without PIT, PIC and RTC; firmware (qboot) runs before a bzImage; isa-serial on stdio",
        arguments: qemu_microvm!(
            " -smp {cpus} -m {mib}M -kernel {kernel} -append {cmdline} -initrd {initrd}"
        ),
    },
    OtherVmm {
        name: "firecracker",
        about: "Firecracker",
        programs: &["firecracker"],
        differs: "takes an ELF vmlinux, no bzImage; has no ACPI power-off, so a guest that powers off never ends: have it \
                  reset, or give --stop-at-marker",
        // docs/getting-started.md; only errors are logged, since the log goes to stdout.
        arguments: "--no-api --level Error --config-file {config}",
    },
    OtherVmm {
        name: "cloud-hypervisor",
        about: "Cloud Hypervisor",
        programs: &["cloud-hypervisor"],
        differs: "takes a PVH vmlinux, newer versions a bzImage; PCI; serial on stdio",
        // README.md, "Custom Kernel and Disk Image"
        arguments: "--serial tty --console off --cpus boot={cpus} --memory size={mib}M --kernel {kernel} --cmdline {cmdline} \
                    --initramfs {initrd}",
    },
    OtherVmm {
        name: KVMTOOL,
        about: "kvmtool, whose program is called lkvm",
        programs: &["lkvm", "kvmtool"],
        differs: "puts options of its own before the command line (noapic noacpi pci=conf1 reboot=k panic=1 ...); prints messages \
                  of its own to stdout, so its first console byte is not known",
        // Documentation/kvmtool.1
        arguments: "run --console serial --network mode=none --cpus {cpus} --mem {mib} --kernel {kernel} --params {cmdline} \
                    --initrd {initrd}",
    },
    OtherVmm {
        name: "crosvm",
        about: "crosvm",
        programs: &["crosvm"],
        differs: "one process (--disable-sandbox); adds options for its virtual hardware to the command line; serial on stdout",
        // docs/book/src/running_crosvm/
        arguments: "run --disable-sandbox --serial type=stdout,hardware=serial,num=1 --cpus {cpus} --mem {mib} --params {cmdline} \
                    --initrd {initrd} {kernel}",
    },
];

const KVMTOOL: &str = "kvmtool";

/// A VMM as it is installed on this host.
#[derive(Debug)]
pub(super) struct Vmm {
    pub(super) name: &'static str,
    /// The command that boots the guest.
    pub(super) words: Vec<OsString>,
    /// Where a run is to write a timeline from which the time of the first instruction is known.
    timeline: Option<PathBuf>,
    pub(super) differs: &'static str,
}

impl OtherVmm {
    /// This VMM, if its program is on the PATH; `scratch` is a directory for its files.
    pub(super) fn find(&self, guest: &VmConfig, scratch: &Path) -> io::Result<Option<Vmm>> {
        let Some(program) = self.programs.iter().find_map(|name| find_program(name)) else {
            return Ok(None);
        };
        let mut words = vec![program.into_os_string()];
        words.extend(expand(self.arguments, guest, scratch)?);
        Ok(Some(Vmm {
            name: self.name,
            words,
            timeline: None,
            differs: self.differs,
        }))
    }
}

/// minivmm itself: the very program that measures.
pub(super) fn minivmm(guest: &VmConfig) -> io::Result<Vmm> {
    let mut words = vec![std::env::current_exe()?.into_os_string()];
    let arguments = "--serial stdio --cpus {cpus} --memory {mib}M --kernel {kernel} --cmdline {cmdline} --initrd {initrd}";
    words.extend(expand(arguments, guest, Path::new(""))?);
    Ok(Vmm {
        name: MINIVMM,
        words,
        timeline: None,
        differs: "",
    })
}

/// minivmm that restores a snapshot.
pub(super) fn restore(snapshot: &Path, scratch: &Path) -> io::Result<Vmm> {
    let program = std::env::current_exe()?;
    Ok(Vmm {
        name: MINIVMM,
        words: vec![program.into(), "restore".into(), snapshot.into()],
        timeline: Some(scratch.join("timeline.json")),
        differs: "",
    })
}

impl Vmm {
    /// Whether it prints messages of its own to stdout, so that its first byte says nothing about the console.
    pub(super) fn is_talkative(&self) -> bool {
        self.name == KVMTOOL
    }

    /// When, in another run, the guest's first instruction came, from just before the process was made. That run writes a timeline,
    /// which would make the others' ends later.
    pub(super) fn first_instruction(
        &self,
        limit: Duration,
        signals: &Signals,
    ) -> Result<Option<Duration>, ToolError> {
        let Some(file) = &self.timeline else {
            return Ok(None);
        };
        let mut words = self.words.clone();
        words.extend(["--timeline".into(), file.clone().into()]);
        let watch = Watch {
            limit,
            ..Watch::default()
        };
        let start = Duration::try_from(clock_gettime(ClockId::Monotonic)).unwrap_or_default();
        if measure::run(&words, watch, signals)?.timed_out {
            return Ok(None);
        }
        let text = fs::read(file).map_err(cannot("read a timeline"))?;
        let timeline: Value = serde_json::from_slice(&text).map_err(cannot("read a timeline"))?;
        let events = timeline.get("events").and_then(Value::as_array);
        let mut events = events.into_iter().flatten();
        let first = events.find(|event| event.get("name") == Some(&json!("first_run")));
        let after = first.and_then(|event| event.get("at_ns")?.as_u64());
        let from = timeline.pointer("/process_start/monotonic_ns");
        let at = from.and_then(Value::as_u64).zip(after);
        Ok(at.and_then(|(from, after)| Duration::from_nanos(from + after).checked_sub(start)))
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

/// The words of a command line for a guest: {kernel}, {initrd}, {cmdline}, {cpus}, {mib}, and {config} for a file in `scratch`
/// as Firecracker reads it. Without an initrd, its option goes too.
fn expand(arguments: &str, guest: &VmConfig, scratch: &Path) -> io::Result<Vec<OsString>> {
    let mut words: Vec<&str> = arguments.split(' ').collect();
    if guest.initrd.is_none()
        && let Some(at) = words.iter().position(|word| *word == "{initrd}")
    {
        words.drain(at - 1..=at);
    }
    let mib = guest.memory.bytes >> 20;
    let expanded = words.into_iter().map(|word| {
        Ok(match word {
            "{kernel}" => guest.kernel.clone().into(),
            "{initrd}" => guest.initrd.clone().unwrap_or_default().into(),
            "{cmdline}" => guest.kernel_cmdline().into(),
            "{config}" => {
                let file = scratch.join("firecracker.json");
                let config = json!({
                    "boot-source": {
                        "kernel_image_path": guest.kernel,
                        "initrd_path": guest.initrd,
                        "boot_args": guest.kernel_cmdline(),
                    },
                    "drives": [],
                    "machine-config": { "vcpu_count": guest.cpus, "mem_size_mib": mib },
                });
                std::fs::write(&file, config.to_string())?;
                file.into()
            }
            _ => word
                .replace("{cpus}", &guest.cpus.to_string())
                .replace("{mib}", &mib.to_string())
                .into(),
        })
    });
    expanded.collect()
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
        expand(vmm.arguments, guest, Path::new("")).unwrap()
    }

    #[test]
    fn all_boot_the_same_guest() {
        let cmdline = format!("{DEFAULT_CMDLINE} -- true");
        let scratch = tempfile::tempdir().unwrap();
        let guest = guest();
        let firecracker = &OTHER_VMMS[1];
        let json = expand(firecracker.arguments, &guest, scratch.path()).unwrap();
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
