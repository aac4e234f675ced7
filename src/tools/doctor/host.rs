//! What this host offers to a guest: facts are gathered first, then judged, so that the judgement is tested with made-up
//! facts.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::time::{Duration, Instant};

use kvm_ioctls::{Cap, Kvm};

use super::{Check, limits};

/// The API version, unchanged since Linux 2.6.22 (Documentation/virt/kvm/api.rst § 4.1).
const KVM_API_VERSION: i32 = 12;

/// Capabilities without which no VM is built here.
const REQUIRED: [(Cap, &str); 4] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP"),
    (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// Capabilities that make a guest start sooner.
const USEFUL: [(Cap, &str, &str); 2] = [
    (
        Cap::TscDeadlineTimer,
        "KVM_CAP_TSC_DEADLINE_TIMER",
        "the guest calibrates its timer, which takes 100 ms",
    ),
    (
        Cap::Clocksource,
        "KVM_CAP_CLOCKSOURCE",
        "no kvm-clock: the guest measures its clocks, which takes longer",
    ),
];

/// What KVM says of itself.
#[derive(Debug, Clone)]
struct KvmFacts {
    api_version: i32,
    missing: Vec<&'static str>,
    missing_useful: Vec<(&'static str, &'static str)>,
    recommended_vcpus: usize,
    max_vcpus: usize,
    /// How long KVM_CREATE_VM took, or why it failed.
    create_vm: Result<Duration, String>,
}

/// Whether /dev/kvm can be used.
#[derive(Debug, Clone)]
enum DevKvm {
    Works(KvmFacts),
    Absent,
    NotADevice,
    Denied { group: String },
    Failed(String),
}

/// The first processor of /proc/cpuinfo.
#[derive(Debug, Clone, Default)]
pub(crate) struct Cpu {
    pub(crate) model: String,
    amd: bool,
    /// The flag vmx or svm.
    virtualization: bool,
    /// The flag hypervisor: this host is itself a virtual machine.
    pub(crate) hypervisor: bool,
}

/// The modules in /sys/module; a built-in one is there as well.
#[derive(Debug, Clone, Copy, Default)]
struct Modules {
    kvm: bool,
    intel: bool,
    amd: bool,
    pvm: bool,
}

/// Checks what this host offers.
pub fn check_host() -> Vec<Check> {
    let (cpu, modules) = (read_cpu(), read_modules());
    let mut checks = check_kvm(&open_kvm(), &cpu, modules);
    checks.extend(limits::check_limits());
    checks
}

/// Whether this host's KVM, which works, is PVM or another one in software: it runs guests that are made for it, and no
/// stock kernels.
pub fn host_is_pvm() -> bool {
    is_pvm(&read_cpu(), read_modules())
}

/// KVM that works on a processor without hardware virtualization is made of software. Where the processor has it, the
/// module counts only if it is alone: one of the hardware modules takes precedence when both are there.
fn is_pvm(cpu: &Cpu, modules: Modules) -> bool {
    // Without /proc there is no model, and no saying.
    let software = !cpu.virtualization && !cpu.model.is_empty();
    software || (modules.pvm && !modules.intel && !modules.amd)
}

/// This host's processor; empty without /proc.
pub(crate) fn read_cpu() -> Cpu {
    File::open("/proc/cpuinfo")
        .map_or_else(|_| Cpu::default(), |file| parse_cpu(BufReader::new(file)))
}

fn parse_cpu(cpuinfo: impl BufRead) -> Cpu {
    let mut cpu = Cpu::default();
    // The first processor's part ends with an empty line; all are alike, and there may be hundreds.
    for line in cpuinfo
        .lines()
        .map_while(Result::ok)
        .take_while(|line| !line.is_empty())
    {
        let Some((key, value)) = line.split_once(':') else {
            continue;
        };
        let value = value.trim();
        match key.trim() {
            "vendor_id" => cpu.amd = matches!(value, "AuthenticAMD" | "HygonGenuine"),
            "model name" => cpu.model = value.to_owned(),
            "flags" => {
                let has = |name: &str| value.split(' ').any(|flag| flag == name);
                cpu.virtualization = has("vmx") || has("svm");
                cpu.hypervisor = has("hypervisor");
            }
            _ => {}
        }
    }
    cpu
}

fn read_modules() -> Modules {
    let has = |name: &str| Path::new("/sys/module").join(name).exists();
    Modules {
        kvm: has("kvm"),
        intel: has("kvm_intel"),
        amd: has("kvm_amd"),
        pvm: has("kvm_pvm"),
    }
}

/// KVM's modules that are loaded or built in, as in `kvm_amd`; empty if there is none.
pub(crate) fn kvm_modules() -> String {
    let Modules {
        kvm: _,
        intel,
        amd,
        pvm,
    } = read_modules();
    [(intel, "kvm_intel"), (amd, "kvm_amd"), (pvm, "kvm_pvm")]
        .into_iter()
        .filter_map(|(there, name)| there.then_some(name))
        .collect::<Vec<_>>()
        .join(" ")
}

fn open_kvm() -> DevKvm {
    let metadata = match fs::metadata("/dev/kvm") {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return DevKvm::Absent,
        Err(error) => return DevKvm::Failed(error.to_string()),
    };
    if !metadata.file_type().is_char_device() {
        return DevKvm::NotADevice;
    }
    match Kvm::new() {
        Ok(kvm) => DevKvm::Works(ask_kvm(&kvm)),
        Err(error) if matches!(error.errno(), libc::EACCES | libc::EPERM) => DevKvm::Denied {
            group: group_name(metadata.gid()),
        },
        Err(error) => DevKvm::Failed(error.to_string()),
    }
}

fn ask_kvm(kvm: &Kvm) -> KvmFacts {
    let start = Instant::now();
    KvmFacts {
        api_version: kvm.get_api_version(),
        missing: REQUIRED
            .into_iter()
            .filter(|(cap, _)| !kvm.check_extension(*cap))
            .map(|(_, name)| name)
            .collect(),
        missing_useful: USEFUL
            .into_iter()
            .filter(|(cap, ..)| !kvm.check_extension(*cap))
            .map(|(_, name, without)| (name, without))
            .collect(),
        recommended_vcpus: kvm.get_nr_vcpus(),
        max_vcpus: kvm.get_max_vcpus(),
        create_vm: kvm
            .create_vm()
            .map(|_| start.elapsed())
            .map_err(|error| error.to_string()),
    }
}

/// The group's name, or its number where it has none.
fn group_name(gid: u32) -> String {
    fs::read_to_string("/etc/group")
        .ok()
        .and_then(|groups| {
            groups.lines().find_map(|line| {
                let mut fields = line.split(':');
                let name = fields.next()?;
                (fields.nth(1)?.parse() == Ok(gid)).then(|| name.to_owned())
            })
        })
        .unwrap_or_else(|| gid.to_string())
}

fn check_kvm(dev_kvm: &DevKvm, cpu: &Cpu, modules: Modules) -> Vec<Check> {
    let subject = "/dev/kvm";
    let mut checks = vec![check_cpu(cpu, matches!(dev_kvm, DevKvm::Works(_)))];
    if cpu.hypervisor {
        checks.push(Check::info(
            "nested",
            "this host is itself a virtual machine: guests run slower than on bare metal",
        ));
    }
    match dev_kvm {
        DevKvm::Works(facts) => {
            checks.push(Check::ok(subject, "opens"));
            checks.push(check_module(cpu, modules));
            checks.extend(check_facts(facts));
        }
        DevKvm::Absent => {
            checks.push(Check::fail(subject, "absent").mend(absent_mend(cpu, modules)))
        }
        DevKvm::NotADevice => checks.push(
            Check::fail(subject, "is not a character device")
                .mend("remove it and make it again: rm /dev/kvm && mknod /dev/kvm c 10 232"),
        ),
        DevKvm::Denied { group } => checks.push(
            Check::fail(
                subject,
                format!("permission denied; it belongs to the group {group}"),
            )
            .mend(denied_mend(group)),
        ),
        DevKvm::Failed(error) => {
            checks.push(
                Check::fail(subject, format!("cannot be opened: {error}"))
                    .mend(absent_mend(cpu, modules)),
            );
        }
    }
    checks
}

/// What lets this user open /dev/kvm.
pub fn kvm_permission_mend() -> String {
    let group = fs::metadata("/dev/kvm").map_or_else(|_| "kvm".into(), |m| group_name(m.gid()));
    denied_mend(&group)
}

fn denied_mend(group: &str) -> String {
    if group == "root" {
        "give it to a group of its own: groupadd kvm; chgrp kvm /dev/kvm; chmod 660 /dev/kvm; usermod -aG kvm $USER".into()
    } else {
        format!(
            "add yourself to the group that owns it: usermod -aG {group} $USER, then log in again"
        )
    }
}

fn check_cpu(cpu: &Cpu, kvm_works: bool) -> Check {
    let technology = if cpu.amd { "AMD-V (svm)" } else { "VT-x (vmx)" };
    let model = if cpu.model.is_empty() {
        "unknown"
    } else {
        &cpu.model
    };
    if cpu.virtualization {
        return Check::ok("processor", format!("{model}, with {technology}"));
    }
    let found = format!("{model}, without {technology}");
    // Where KVM works all the same, the line about the module says what that means.
    if kvm_works {
        Check::info("processor", found)
    } else {
        Check::fail("processor", found).mend(enable_mend(cpu))
    }
}

fn enable_mend(cpu: &Cpu) -> &'static str {
    match (cpu.hypervisor, cpu.amd) {
        (true, _) => {
            "turn on nested virtualization for this virtual machine on its host, or use the lab: tests/lab/run"
        }
        (false, true) => "turn on SVM (AMD-V) in the firmware's set-up",
        (false, false) => "turn on virtualization (VT-x) in the firmware's set-up",
    }
}

fn absent_mend(cpu: &Cpu, modules: Modules) -> String {
    let module = if cpu.amd { "kvm_amd" } else { "kvm_intel" };
    if !cpu.virtualization {
        enable_mend(cpu).to_owned()
    } else if modules.kvm && (modules.intel || modules.amd) {
        "KVM is loaded: in a container, pass the device in (docker run --device /dev/kvm)"
            .to_owned()
    } else {
        format!(
            "modprobe {module}; if that fails, virtualization is locked in the firmware's set-up (see dmesg)"
        )
    }
}

fn check_module(cpu: &Cpu, modules: Modules) -> Check {
    if is_pvm(cpu, modules) {
        let name = if modules.pvm {
            "PVM (kvm_pvm)"
        } else {
            "made of software (no vmx or svm in /proc/cpuinfo)"
        };
        return Check::fail(
            "KVM",
            format!("this KVM is {name}: it cannot run stock kernels, which need hardware virtualization"),
        )
        .mend("boot in the lab: tests/lab/run");
    }
    let name = match (modules.intel, modules.amd) {
        (true, false) => "kvm_intel",
        (false, true) => "kvm_amd",
        _ if cpu.amd => "kvm_amd, built in",
        _ => "kvm_intel, built in",
    };
    Check::ok("KVM", format!("hardware virtualization ({name})"))
}

fn check_facts(facts: &KvmFacts) -> Vec<Check> {
    let mut checks = Vec::new();
    checks.push(if facts.api_version == KVM_API_VERSION {
        Check::ok("KVM API", format!("version {KVM_API_VERSION}"))
    } else {
        Check::fail(
            "KVM API",
            format!("version {}, not {KVM_API_VERSION}", facts.api_version),
        )
        .mend("use Linux 2.6.22 or later")
    });
    checks.push(if facts.missing.is_empty() {
        Check::ok(
            "KVM capabilities",
            format!("all {} that are needed", REQUIRED.len()),
        )
    } else {
        Check::fail(
            "KVM capabilities",
            format!("missing: {}", facts.missing.join(", ")),
        )
        .mend("use a newer host kernel (Linux 4.13 has them all)")
    });
    checks.extend(
        facts
            .missing_useful
            .iter()
            .map(|(name, without)| Check::warn(*name, format!("missing: {without}"))),
    );
    checks.push(Check::info(
        "vCPUs",
        format!(
            "{} at most, {} recommended",
            facts.max_vcpus, facts.recommended_vcpus
        ),
    ));
    checks.push(match &facts.create_vm {
        Ok(time) => Check::ok("creating a VM", format!("works ({:.1} ms)", time.as_secs_f64() * 1e3)),
        Err(error) => Check::fail("creating a VM", error.clone())
            .mend("another hypervisor (VirtualBox, VMware) may hold the processor: stop it; else see dmesg"),
    });
    checks
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    const AMD: &str = "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC\nflags\t\t: fpu svm\n\nprocessor\t: 1\nflags\t: hypervisor\n";

    fn cpu(virtualization: bool, hypervisor: bool) -> Cpu {
        Cpu {
            model: "Test".to_owned(),
            amd: false,
            virtualization,
            hypervisor,
        }
    }

    fn facts() -> KvmFacts {
        KvmFacts {
            api_version: 12,
            missing: vec![],
            missing_useful: vec![],
            recommended_vcpus: 8,
            max_vcpus: 1024,
            create_vm: Ok(Duration::from_micros(400)),
        }
    }

    fn fails(checks: &[Check]) -> Vec<&Check> {
        checks
            .iter()
            .filter(|check| check.verdict == Verdict::Fail)
            .collect()
    }

    const INTEL: Modules = Modules {
        kvm: true,
        intel: true,
        amd: false,
        pvm: false,
    };
    const PVM: Modules = Modules {
        kvm: true,
        intel: false,
        amd: false,
        pvm: true,
    };

    #[test]
    fn the_first_processor_is_read() {
        let cpu = parse_cpu(AMD.as_bytes());
        assert!(cpu.amd && cpu.virtualization && !cpu.hypervisor);
        assert_eq!(cpu.model, "AMD EPYC");
    }

    #[test]
    fn a_good_host_fails_nothing() {
        assert!(
            fails(&check_kvm(
                &DevKvm::Works(facts()),
                &cpu(true, false),
                INTEL
            ))
            .is_empty()
        );
    }

    #[test]
    fn pvm_is_told_from_hardware() {
        for (virtualization, modules) in [(false, PVM), (false, Modules::default()), (true, PVM)] {
            let checks = check_kvm(&DevKvm::Works(facts()), &cpu(virtualization, true), modules);
            let fails = fails(&checks);
            assert_eq!(fails.len(), 1, "{checks:?}");
            assert!(fails[0].found.contains("cannot run stock kernels"));
            assert!(fails[0].mend.as_ref().unwrap().contains("tests/lab/run"));
        }
        assert!(!is_pvm(&cpu(true, false), Modules { pvm: true, ..INTEL }));
        assert!(!is_pvm(&Cpu::default(), INTEL), "/proc is not mounted");
    }

    #[test]
    fn each_trouble_has_its_mend() {
        let mend = |dev_kvm: DevKvm, cpu: Cpu, modules| {
            check_kvm(&dev_kvm, &cpu, modules)
                .into_iter()
                .filter(|check| check.verdict == Verdict::Fail)
                .filter_map(|check| check.mend)
                .collect::<Vec<_>>()
                .join("\n")
        };
        let none = Modules::default();
        assert!(
            mend(
                DevKvm::Denied {
                    group: "kvm".to_owned()
                },
                cpu(true, false),
                INTEL
            )
            .contains("usermod -aG kvm $USER")
        );
        assert!(
            mend(
                DevKvm::Denied {
                    group: "root".to_owned()
                },
                cpu(true, false),
                INTEL
            )
            .contains("chgrp kvm")
        );
        assert!(mend(DevKvm::Absent, cpu(true, false), none).contains("modprobe kvm_intel"));
        assert!(mend(DevKvm::Absent, parse_cpu(AMD.as_bytes()), none).contains("modprobe kvm_amd"));
        assert!(mend(DevKvm::Absent, cpu(true, false), INTEL).contains("--device /dev/kvm"));
        assert!(mend(DevKvm::Absent, cpu(false, false), none).contains("firmware"));
        assert!(mend(DevKvm::Absent, cpu(false, true), none).contains("nested"));
        let old = KvmFacts {
            missing: vec!["KVM_CAP_SIGNAL_MSI"],
            ..facts()
        };
        assert!(mend(DevKvm::Works(old), cpu(true, false), INTEL).contains("newer host kernel"));
        let busy = KvmFacts {
            create_vm: Err("busy".to_owned()),
            ..facts()
        };
        assert!(mend(DevKvm::Works(busy), cpu(true, false), INTEL).contains("VirtualBox"));
    }
}
