//! The host that a measurement was made on.

use std::fmt;
use std::fs;

use procfs::{Current, LoadAverage, Meminfo};
use rustix::system::uname;
use serde::{Deserialize, Serialize};

use crate::host::cpu::Cpu;
use crate::host::kvm::Modules;

/// What decides how long a boot takes on a host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HostFacts {
    /// The processor's model name.
    pub cpu: String,
    /// Processors that this process may use.
    pub cpus: usize,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// The host's kernel release.
    pub kernel: String,
    /// KVM's modules, as in `kvm_amd`.
    pub kvm: String,
    /// Whether the host is itself a virtual machine: then its KVM is nested, or made of software.
    pub virtual_machine: bool,
    /// The first processor's frequency governor, where there is one.
    pub governor: Option<String>,
    /// Load average of the last minute when the measurement began.
    pub load: f64,
}

impl HostFacts {
    /// Reads this host's; what cannot be read is empty or 0.
    pub fn read() -> Self {
        let cpu = Cpu::read();
        let governor =
            fs::read_to_string("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").ok();
        Self {
            cpu: cpu.model,
            cpus: std::thread::available_parallelism().map_or(0, usize::from),
            memory_mib: Meminfo::current().map_or(0, |memory| memory.mem_total >> 20),
            kernel: uname().release().to_string_lossy().into_owned(),
            kvm: Modules::read().names(),
            virtual_machine: cpu.hypervisor,
            governor: governor.map(|text| text.trim().to_owned()),
            load: LoadAverage::current().map_or(0.0, |load| load.one.into()),
        }
    }

    /// Whether times of both hosts can be compared: all but the load is the same.
    pub fn is_like(&self, other: &Self) -> bool {
        let without_load = |facts: &Self| Self {
            load: 0.0,
            ..facts.clone()
        };
        without_load(self) == without_load(other)
    }
}

impl fmt::Display for HostFacts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}, {} CPUs, {} MiB{}; Linux {}, {}; governor {}; load average {} at the start",
            self.cpu,
            self.cpus,
            self.memory_mib,
            if self.virtual_machine {
                ", itself a virtual machine"
            } else {
                ""
            },
            self.kernel,
            self.kvm,
            self.governor.as_deref().unwrap_or("unknown"),
            self.load,
        )
    }
}
