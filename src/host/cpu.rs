//! The host's processor: what a boot asks, from CPUID; the rest, from /proc/cpuinfo, which takes long to read where there are
//! hundreds of processors.

use std::arch::x86_64::{__cpuid, CpuidResult};
use std::fs::File;
use std::io::{BufRead, BufReader};

/// What this processor's CPUID says in a leaf.
#[allow(unsafe_code, unused_unsafe, reason = "safe in newer versions of Rust")]
pub fn cpuid(leaf: u32) -> CpuidResult {
    // SAFETY: every x86-64 processor has the instruction.
    unsafe { __cpuid(leaf) }
}

/// Whether the processor has hardware virtualization: VT-x (SDM vol. 2, CPUID leaf 1, ECX bit 5) or AMD-V (APM vol. 3, leaf
/// 0x80000001, ECX bit 2).
pub fn has_virtualization() -> bool {
    cpuid(1).ecx & 1 << 5 != 0 || cpuid(0x8000_0001).ecx & 1 << 2 != 0
}

/// Whether this host is a virtual machine that QEMU emulates in software (TCG), by the hypervisor's signature (CPUID leaf 0x40000000).
/// On a processor without a hypervisor that leaf has something else.
pub fn is_emulated_by_qemu() -> bool {
    let leaf = cpuid(0x4000_0000);
    [leaf.ebx, leaf.ecx, leaf.edx].map(u32::to_le_bytes) == [*b"TCGT", *b"CGTC", *b"GTCG"]
}

/// The first processor of /proc/cpuinfo.
#[derive(Debug, Clone, Default)]
pub struct Cpu {
    /// Its model name; empty without /proc.
    pub model: String,
    /// Whether its virtualization would be AMD's.
    pub amd: bool,
    /// The flag vmx or svm.
    pub virtualization: bool,
    /// The flag hypervisor: this host is itself a virtual machine.
    pub hypervisor: bool,
}

impl Cpu {
    /// This host's; empty without /proc.
    pub fn read() -> Self {
        File::open("/proc/cpuinfo").map_or_else(
            |_| Self::default(),
            |file| Self::parse(BufReader::new(file)),
        )
    }

    pub(crate) fn parse(cpuinfo: impl BufRead) -> Self {
        let mut cpu = Self::default();
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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_processor_is_read() {
        let cpuinfo = "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC\nflags\t\t: fpu svm\n\nprocessor\t: 1\nflags\t: hypervisor\n";
        let cpu = Cpu::parse(cpuinfo.as_bytes());
        assert!(cpu.amd && cpu.virtualization && !cpu.hypervisor);
        assert_eq!(cpu.model, "AMD EPYC");
    }
}
