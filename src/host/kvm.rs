//! The host's KVM: its device, who may open it, and what kind of KVM it is.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use kvm_ioctls::Kvm;

use super::cpu;

/// KVM's device file.
pub const DEVICE: &str = "/dev/kvm";

/// The API version, unchanged since Linux 2.6.22 (Documentation/virt/kvm/api.rst § 4.1).
const API_VERSION: i32 = 12;

/// Why KVM cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot open {DEVICE}: {0}")]
pub struct OpenError(String);

/// Opens KVM. Errors include a hint.
pub fn open() -> Result<Kvm, OpenError> {
    let kvm = Kvm::new().map_err(|error| {
        OpenError(match error.errno() {
            libc::ENOENT => "it is not there; load KVM (modprobe kvm_intel or kvm_amd), turn VT-x or AMD-V on in the \
                             firmware, turn nested virtualization on for this VM, or pass the device into this container"
                .into(),
            libc::EACCES => format!("permission denied; {}", permission_hint(&device_group())),
            libc::ENODEV => "no KVM behind it; load it (modprobe kvm_intel or kvm_amd)".into(),
            _ => error.to_string(),
        })
    })?;
    match kvm.get_api_version() {
        API_VERSION => Ok(kvm),
        other => Err(OpenError(format!(
            "it has API version {other}, not {API_VERSION}, so it is not KVM's; make it again (rm {DEVICE}; mknod {DEVICE} c 10 232)"
        ))),
    }
}

/// The modules in /sys/module, which lists built-in ones too.
#[derive(Debug, Clone, Copy, Default)]
pub struct Modules {
    /// kvm_intel.
    pub intel: bool,
    /// kvm_amd.
    pub amd: bool,
    /// kvm_pvm.
    pub pvm: bool,
}

impl Modules {
    /// This host's; none without /sys.
    pub fn read() -> Self {
        let has = |name: &str| Path::new("/sys/module").join(name).exists();
        Self {
            intel: has("kvm_intel"),
            amd: has("kvm_amd"),
            pvm: has("kvm_pvm"),
        }
    }

    /// Those that run guests, as in `kvm_amd`; empty if there is none.
    pub fn names(self) -> String {
        [
            (self.intel, "kvm_intel"),
            (self.amd, "kvm_amd"),
            (self.pvm, "kvm_pvm"),
        ]
        .into_iter()
        .filter_map(|(there, name)| there.then_some(name))
        .collect::<Vec<_>>()
        .join(" ")
    }
}

/// Whether this host's KVM, which works, is PVM or another one in software: it runs guests that are made for it, and no
/// stock kernels.
pub fn is_pvm() -> bool {
    is_software(cpu::has_virtualization(), Modules::read())
}

/// KVM that works on a processor without hardware virtualization is software. Where the processor has it, kvm_pvm counts
/// only if neither hardware module is there, since those take precedence.
pub fn is_software(virtualization: bool, modules: Modules) -> bool {
    !virtualization || (modules.pvm && !modules.intel && !modules.amd)
}

/// The name of the group that owns /dev/kvm, or its number where it has none.
fn device_group() -> String {
    let Ok(metadata) = fs::metadata(DEVICE) else {
        return "kvm".into();
    };
    let gid = metadata.gid().to_string();
    let groups = fs::read_to_string("/etc/group").unwrap_or_default();
    let name = groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == gid).then(|| name.to_owned())
    });
    name.unwrap_or(gid)
}

/// What lets a user open /dev/kvm, which belongs to `group`.
fn permission_hint(group: &str) -> String {
    if group == "root" {
        "give it to a group of its own: groupadd kvm; chgrp kvm /dev/kvm; chmod 660 /dev/kvm; usermod -aG kvm $USER".into()
    } else {
        format!(
            "add yourself to the group that owns it: usermod -aG {group} $USER, then log in again"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn software_kvm_is_told_from_hardware() {
        let pvm = Modules {
            pvm: true,
            ..Modules::default()
        };
        let both = Modules { intel: true, ..pvm };
        assert!(is_software(false, Modules::default()));
        assert!(is_software(true, pvm));
        assert!(!is_software(true, both));
    }

    #[test]
    fn the_hint_names_the_group() {
        assert!(permission_hint("kvm").contains("usermod -aG kvm $USER"));
        assert!(permission_hint("root").contains("chgrp kvm"));
    }
}
