//! Where a snapshot was taken: whether that is this host, in this boot.

use std::fs;

use serde::{Deserialize, Serialize};

use crate::host::cpu::cpuid;

/// What tells one boot of one host from another. Where it is the same, KVM supports what it did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFingerprint {
    /// Random, new in every boot of the host.
    boot_id: String,
    /// Release and version of the host's kernel.
    pub kernel: String,
    /// Family, model and stepping: CPUID leaf 1, EAX.
    signature: u32,
    /// Revision of the microcode; empty where the host does not tell.
    microcode: String,
}

impl HostFingerprint {
    /// This host's.
    pub fn read() -> Self {
        let text = |path| fs::read_to_string(path).unwrap_or_default().trim().into();
        let uname = rustix::system::uname();
        Self {
            boot_id: text("/proc/sys/kernel/random/boot_id"),
            kernel: format!(
                "{} {}",
                uname.release().to_string_lossy(),
                uname.version().to_string_lossy()
            ),
            signature: cpuid(1).eax,
            microcode: text("/sys/devices/system/cpu/cpu0/microcode/version"),
        }
    }

    /// Whether both are known to be the same boot of the same host.
    pub fn is_same(&self, other: &Self) -> bool {
        !self.boot_id.is_empty() && self == other
    }

    /// What the two differ in.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let Self {
            boot_id,
            kernel,
            signature,
            microcode,
        } = self;
        let mut found = Vec::new();
        let mut compare = |what: &str, saved: &str, now: &str| {
            if saved != now {
                found.push(format!("{what}: {saved} there, {now} here"));
            }
        };
        compare("boot", boot_id, &other.boot_id);
        compare("kernel", kernel, &other.kernel);
        let hex = |number| format!("{number:#x}");
        compare("processor", &hex(*signature), &hex(other.signature));
        compare("microcode", microcode, &other.microcode);
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_named() {
        let host = HostFingerprint::read();
        assert!(host.is_same(&host.clone()) && host.differences(&host).is_empty());
        let other = HostFingerprint {
            microcode: "0x99".into(),
            ..host.clone()
        };
        assert!(!host.is_same(&other));
        let found = host.differences(&other);
        assert!(
            found.len() == 1 && found[0].contains("0x99 here"),
            "{found:?}"
        );
        let unknown = HostFingerprint {
            boot_id: String::new(),
            ..host
        };
        assert!(!unknown.is_same(&unknown.clone()));
    }
}
