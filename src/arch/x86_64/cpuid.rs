//! What CPUID tells the guest: what KVM supports on this host, and this VM's own topology.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Leaf 1 ECX: the local APIC timer has TSC-deadline mode; KVM_GET_SUPPORTED_CPUID never reports it.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1 ECX: a hypervisor is present.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1 EDX: EBX bits 16-23 are valid.
const HTT: u32 = 1 << 28;
/// Leaf 6 EAX: the local APIC timer runs in every C-state, so that no PIT or HPET is asked for.
const ARAT: u32 = 1 << 2;
/// KVM's features (Documentation/virt/kvm/x86/cpuid.rst).
const KVM_FEATURES: u32 = 0x4000_0001;
/// In EAX: asynchronous page faults. A guest that is saved while one is open would wait for its end for ever.
const ASYNC_PAGE_FAULTS: u32 = 1 << 4 | 1 << 10 | 1 << 14;

/// The CPUID table of vCPU `index` out of `cpus`, made from what KVM supports. vCPUs are cores, one thread each, of one
/// package; the APIC ID is the index.
pub fn vcpu_cpuid(supported: &CpuId, index: u8, cpus: u8, tsc_deadline: bool) -> CpuId {
    let apic_id = u32::from(index);
    let count = u32::from(cpus);
    // Bits of an APIC ID below the package (SDM vol. 3 § 9.9.1).
    let id_bits = count.next_power_of_two().trailing_zeros();

    let mut cpuid = supported.clone();
    let has_leaf_b = supported.as_slice().iter().any(|e| e.function == 0xb);
    let amd = supported
        .as_slice()
        .iter()
        .any(|e| e.function == 0 && matches!(&e.ebx.to_le_bytes(), b"Auth" | b"Hygo"));
    // The extended topology describes the host: leaf 0xb is built anew, its successors (0x1f of Intel, 0x80000026 of AMD),
    // which a kernel would ask first, are left out.
    cpuid.retain(|e| !matches!(e.function, 0xb | 0x1f | 0x8000_0026));
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 => {
                entry.ebx = entry.ebx & 0xffff | count.next_power_of_two() << 16 | apic_id << 24;
                entry.ecx |= HYPERVISOR;
                if tsc_deadline {
                    entry.ecx |= TSC_DEADLINE;
                }
                entry.edx = if cpus > 1 {
                    entry.edx | HTT
                } else {
                    entry.edx & !HTT
                };
            }
            // Caches: level 1 and 2 belong to a core, level 3 to the package; cores per package in bits 26-31.
            4 if entry.eax & 0x1f != 0 => {
                let level = entry.eax >> 5 & 0x7;
                let sharing = if level >= 3 {
                    count.next_power_of_two() - 1
                } else {
                    0
                };
                entry.eax = entry.eax & 0x3fff
                    | sharing << 14
                    | (count.next_power_of_two() - 1).min(63) << 26;
            }
            6 => entry.eax |= ARAT,
            KVM_FEATURES => entry.eax &= !ASYNC_PAGE_FAULTS,
            // AMD: cores in the package and the width of the core ID (APM vol. 3, CPUID Fn8000_0008); reserved by Intel.
            0x8000_0008 if amd => entry.ecx = id_bits << 12 | (count - 1),
            // AMD: cache sharing, as above (Fn8000_001D).
            0x8000_001d if entry.eax & 0x1f != 0 => {
                let level = entry.eax >> 5 & 0x7;
                let sharing = if level >= 3 { count - 1 } else { 0 };
                entry.eax = entry.eax & 0x3fff | sharing << 14;
            }
            // AMD: extended APIC ID, core ID, one thread a core, one node (Fn8000_001E).
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (apic_id, apic_id & 0xff, 0),
            _ => {}
        }
    }

    if has_leaf_b {
        // Subleaf 0: threads (type 1), one per core; subleaf 1: cores (type 2); subleaf 2 ends the list.
        for (subleaf, eax, ebx, kind) in [(0, 0, 1, 1), (1, id_bits, count, 2), (2, 0, 0, 0)] {
            let entry = kvm_cpuid_entry2 {
                function: 0xb,
                index: subleaf,
                flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                eax,
                ebx,
                ecx: kind << 8 | subleaf,
                edx: apic_id,
                ..Default::default()
            };
            // The table just lost at least one entry of leaf 0xb and holds KVM_MAX_CPUID_ENTRIES; should it be full all
            // the same, the guest finds its topology in leaf 1.
            if let Err(e) = cpuid.push(entry) {
                log::debug!("CPUID leaf 0xb subleaf {subleaf} left out: {e:?}");
            }
        }
    }
    cpuid
}

/// Registers of feature bits by leaf and subleaf: EAX, EBX, ECX and EDX, each as the bits that count. Left out are bits that follow the guest's
/// CR4 (OSXSAVE, OSPKE) and those that every VM gets.
const FEATURES: [(u32, u32, [u32; 4]); 10] = [
    (1, 0, [0, 0, !(TSC_DEADLINE | HYPERVISOR | 1 << 27), !HTT]),
    (7, 0, [0, !0, !(1 << 4), !0]),
    (7, 1, [!0, !0, !0, !0]),
    (7, 2, [0, 0, 0, !0]),
    (0xd, 0, [!0, 0, 0, !0]),
    (0xd, 1, [!0, 0, !0, !0]),
    (KVM_FEATURES, 0, [!0, 0, 0, 0]),
    (0x8000_0001, 0, [0, 0, !0, !0]),
    (0x8000_0007, 0, [0, 0, 0, !0]),
    (0x8000_0008, 0, [0, !0, 0, 0]),
];

/// What `guest` was told of and KVM does not support on this host, one line each.
pub fn missing_features(guest: &[kvm_cpuid_entry2], supported: &CpuId) -> Vec<String> {
    let find = |leaves: &[kvm_cpuid_entry2], function, index| {
        let found = leaves
            .iter()
            .find(|e| e.function == function && e.index == index);
        found.map_or([0; 4], |e| [e.eax, e.ebx, e.ecx, e.edx])
    };
    let supported = supported.as_slice();
    let mut missing = Vec::new();
    if find(guest, 0, 0).get(1..) != find(supported, 0, 0).get(1..) {
        missing.push("a processor of the same vendor".to_owned());
    }
    for (function, index, masks) in FEATURES {
        let (told, here) = (
            find(guest, function, index),
            find(supported, function, index),
        );
        let registers = ["EAX", "EBX", "ECX", "EDX"].into_iter().zip(masks);
        for ((register, mask), (told, here)) in registers.zip(told.into_iter().zip(here)) {
            let lost = told & !here & mask;
            for bit in (0..32).filter(|bit| lost >> bit & 1 != 0) {
                missing.push(format!(
                    "CPUID leaf {function:#x}.{index} {register} bit {bit}"
                ));
            }
        }
    }
    missing
}

/// How many bits a physical address has: leaf 0x80000008 EAX, bits 0-7, or 36 where it is not there.
pub fn physical_address_bits(supported: &CpuId) -> u8 {
    let mut leaves = supported.as_slice().iter();
    leaves
        .find(|leaf| leaf.function == 0x8000_0008)
        .map_or(36, |leaf| leaf.eax as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, eax: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ..Default::default()
        }
    }

    fn find(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid
            .as_slice()
            .iter()
            .find(|e| e.function == function && e.index == index)
            .unwrap()
    }

    #[test]
    fn topology_is_that_of_the_vm() {
        let vendor = u32::from_le_bytes(*b"Auth");
        let host = CpuId::from_entries(&[
            kvm_cpuid_entry2 {
                ebx: vendor,
                ..entry(0, 0, 0)
            },
            entry(1, 0, 0),
            entry(4, 0, 1 << 5 | 1 | 0x3f << 26),
            entry(4, 3, 3 << 5 | 3 | 0xfff << 14),
            entry(0xb, 0, 7),
            entry(0xb, 1, 7),
            entry(0x1f, 0, 7),
            entry(0x8000_0008, 0, 0),
            entry(0x8000_0026, 0, 7),
        ])
        .unwrap();
        let guest = vcpu_cpuid(&host, 2, 3, true);
        let leaf1 = find(&guest, 1, 0);
        assert_eq!(leaf1.ebx >> 16, 0x0204, "APIC ID 2, room for 4");
        assert_eq!(
            leaf1.ecx & (TSC_DEADLINE | HYPERVISOR),
            TSC_DEADLINE | HYPERVISOR
        );
        assert_ne!(leaf1.edx & HTT, 0);
        assert_eq!(
            find(&guest, 4, 0).eax >> 14,
            3 << 12,
            "L1 is a core's own, 4 core IDs"
        );
        assert_eq!(
            find(&guest, 4, 3).eax >> 14 & 0xfff,
            3,
            "L3 is the package's"
        );
        assert_eq!(find(&guest, 0xb, 1).ebx, 3);
        assert_eq!(find(&guest, 0xb, 1).eax, 2);
        assert_eq!(find(&guest, 0xb, 0).edx, 2);
        assert!(
            guest
                .as_slice()
                .iter()
                .all(|e| !matches!(e.function, 0x1f | 0x8000_0026))
        );
        assert_eq!(find(&guest, 0x8000_0008, 0).ecx, 2 << 12 | 2);
    }

    #[test]
    fn what_the_host_lacks_is_listed_by_bit() {
        let leaf7 = |ebx| kvm_cpuid_entry2 {
            ebx,
            ..entry(7, 0, 0)
        };
        let host = CpuId::from_entries(&[leaf7(0b100)]).unwrap();
        assert!(missing_features(&[leaf7(0b100)], &host).is_empty());
        let missing = missing_features(&[leaf7(0b1110)], &host);
        assert_eq!(
            missing,
            ["CPUID leaf 0x7.0 EBX bit 1", "CPUID leaf 0x7.0 EBX bit 3"]
        );
    }

    #[test]
    fn one_vcpu_claims_no_siblings_and_no_timer_that_kvm_lacks() {
        let host = CpuId::from_entries(&[kvm_cpuid_entry2 {
            edx: HTT,
            ..entry(1, 0, 0)
        }])
        .unwrap();
        let leaf1 = find(&vcpu_cpuid(&host, 0, 1, false), 1, 0);
        assert_eq!(leaf1.edx & HTT, 0);
        assert_eq!(leaf1.ecx & TSC_DEADLINE, 0);
        assert_eq!(leaf1.ebx >> 16, 1);
    }
}
