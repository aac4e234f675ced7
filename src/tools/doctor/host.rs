//! What this host offers to a guest: facts are gathered first, then judged, so that the judgement is tested with made-up
//! facts.

use std::time::{Duration, Instant};

use kvm_ioctls::{Cap, Kvm};

use super::check::Check;
use super::{limits, network, sandbox};
use crate::host::cpu::Cpu;
use crate::host::kvm::{self, Modules};

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
    missing: Vec<&'static str>,
    missing_useful: Vec<(&'static str, &'static str)>,
    recommended_vcpus: usize,
    max_vcpus: usize,
    /// How long KVM_CREATE_VM took, or why it failed.
    create_vm: Result<Duration, String>,
}

/// Checks what this host offers.
pub fn check_host() -> Vec<Check> {
    let (cpu, modules) = (Cpu::read(), Modules::read());
    let kvm = kvm::open().map(|kvm| ask_kvm(&kvm));
    let kvm = kvm.map_err(|error| Check::unusable(kvm::DEVICE, &error));
    let mut checks = check_kvm(kvm, &cpu, modules);
    checks.extend(sandbox::check_sandbox());
    checks.extend(limits::check_limits());
    checks.extend(network::check_networks());
    checks
}

fn ask_kvm(kvm: &Kvm) -> KvmFacts {
    let start = Instant::now();
    KvmFacts {
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

fn check_kvm(kvm: Result<KvmFacts, Check>, cpu: &Cpu, modules: Modules) -> Vec<Check> {
    let mut checks = vec![check_cpu(cpu, kvm.is_ok())];
    if cpu.hypervisor {
        checks.push(Check::info(
            "nested",
            "this host is itself a virtual machine: guests run slower than on bare metal",
        ));
    }
    match kvm {
        Ok(facts) => {
            checks.push(Check::ok(kvm::DEVICE, "opens"));
            checks.push(check_module(cpu, modules));
            checks.extend(check_facts(&facts));
        }
        Err(check) => checks.push(check),
    }
    checks
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
        Check::fail("processor", found).hint(enable_hint(cpu))
    }
}

fn enable_hint(cpu: &Cpu) -> &'static str {
    match (cpu.hypervisor, cpu.amd) {
        (true, _) => {
            "turn on nested virtualization for this virtual machine on its host, or use the lab: tests/lab/run"
        }
        (false, true) => "turn on SVM (AMD-V) in the firmware's set-up",
        (false, false) => "turn on virtualization (VT-x) in the firmware's set-up",
    }
}

fn check_module(cpu: &Cpu, modules: Modules) -> Check {
    // Without /proc there is no model, and no saying.
    let virtualization = cpu.virtualization || cpu.model.is_empty();
    if kvm::is_software(virtualization, modules) {
        let name = if modules.pvm {
            "PVM (kvm_pvm)"
        } else {
            "made of software (no vmx or svm in /proc/cpuinfo)"
        };
        return Check::fail(
            "KVM",
            format!("this KVM is {name}: it cannot run stock kernels, which need hardware virtualization"),
        )
        .hint("boot in the lab: tests/lab/run");
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
        .hint("use a newer host kernel (Linux 4.13 has them all)")
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
            .hint("another hypervisor (VirtualBox, VMware) may hold the processor: stop it; else see dmesg"),
    });
    checks
}

#[cfg(test)]
mod tests {
    use super::super::check::Verdict;
    use super::*;

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
        intel: true,
        amd: false,
        pvm: false,
    };
    const PVM: Modules = Modules {
        intel: false,
        amd: false,
        pvm: true,
    };

    #[test]
    fn a_good_host_fails_nothing() {
        assert!(fails(&check_kvm(Ok(facts()), &cpu(true, false), INTEL)).is_empty());
    }

    #[test]
    fn pvm_is_told_from_hardware() {
        for (virtualization, modules) in [(false, PVM), (false, Modules::default()), (true, PVM)] {
            let checks = check_kvm(Ok(facts()), &cpu(virtualization, true), modules);
            let fails = fails(&checks);
            assert_eq!(fails.len(), 1, "{checks:?}");
            assert!(fails[0].found.contains("cannot run stock kernels"));
            assert!(fails[0].hint.as_ref().unwrap().contains("tests/lab/run"));
        }
    }

    #[test]
    fn failures_have_hints() {
        let hint = |facts| {
            let checks = check_kvm(Ok(facts), &cpu(true, false), INTEL);
            let [fail] = fails(&checks)[..] else {
                panic!("{checks:?}")
            };
            fail.hint.clone().unwrap()
        };
        let old = KvmFacts {
            missing: vec!["KVM_CAP_SIGNAL_MSI"],
            ..facts()
        };
        assert!(hint(old).contains("newer host kernel"));
        let busy = KvmFacts {
            create_vm: Err("busy".to_owned()),
            ..facts()
        };
        assert!(hint(busy).contains("VirtualBox"));
        let absent = Check::fail("/dev/kvm", "absent");
        let checks = check_kvm(Err(absent.clone()), &cpu(true, false), Modules::default());
        assert_eq!(fails(&checks), [&absent]);
    }
}
