//! The kernel command line: checked, then written with its NUL.

use vm_memory::{Bytes, GuestAddress};

use super::error::BootError;
use super::ram::GuestMemory;
use crate::arch::layout;

/// Longest command line of a kernel that does not say, without the NUL: x86 Linux has COMMAND_LINE_SIZE 2048.
pub(crate) const DEFAULT_MAX: usize = 2047;

/// The words that are the kernel's: those before "--" (kernel/params.c, parse_args).
pub(crate) fn words(cmdline: &str) -> impl Iterator<Item = &str> {
    cmdline.split_whitespace().take_while(|word| *word != "--")
}

/// Parameters that cannot work on this machine, their replacements, and why. Command lines published for other VMMs have
/// them.
const UNSUITED: [(&str, &str, &str); 11] = [
    ("noapic", "", NO_8259),
    ("acpi=noirq", "", NO_8259),
    ("acpi=ht", "", NO_8259),
    ("pci=noacpi", "", NO_8259),
    // Both also mean noapic.
    ("nosmp", "maxcpus=1", NO_8259),
    ("maxcpus=0", "maxcpus=1", NO_8259),
    ("nolapic", "", NO_OTHER_TIMER),
    ("disableapic", "", NO_OTHER_TIMER),
    ("nolapic_timer", "", NO_OTHER_TIMER),
    ("no-kvmclock", "", NO_OTHER_CLOCK),
    ("nopv", "", NO_OTHER_CLOCK),
];
const NO_8259: &str = "interrupts come by the I/O APIC and ACPI, and there is no 8259";
const NO_OTHER_TIMER: &str = "the local APIC has the only timer";
const NO_OTHER_CLOCK: &str = "only kvm-clock gives the frequency of the TSC";

/// Removes or replaces parameters that cannot work, with a warning for each.
pub(crate) fn suit(cmdline: &str) -> String {
    edit(cmdline, |word| {
        let (_, new, why) = UNSUITED.iter().find(|(unsuited, ..)| word == *unsuited)?;
        let change = match *new {
            "" => "is left out of the kernel command line".to_owned(),
            new => format!("becomes {new} on the kernel command line"),
        };
        log::warn!("{word} {change}: {why} in this machine");
        Some(new)
    })
}

/// Removes `acpi=off` and the device parameters that only a kernel without ACPI needs.
pub(crate) fn with_acpi(cmdline: &str) -> String {
    edit(cmdline, |word| {
        let unwanted = word == "acpi=off" || word.starts_with("virtio_mmio.device=");
        unwanted.then_some("")
    })
}

/// Replaces the kernel's parameters for which `new` returns something; an empty string removes one.
fn edit(cmdline: &str, new: impl Fn(&str) -> Option<&'static str>) -> String {
    // What follows "--" is for init and stays unchanged, with its quotes and spaces.
    let init_at = [
        cmdline.starts_with("-- ").then_some(0),
        cmdline.find(" -- "),
    ];
    let init_at = init_at.into_iter().flatten().min().unwrap_or(cmdline.len());
    let (kernel, init) = cmdline.split_at(init_at);
    let words = kernel.split(' ').filter_map(|word| match new(word) {
        Some("") => None,
        new => Some(new.unwrap_or(word)),
    });
    words.collect::<Vec<_>>().join(" ") + init
}

/// Whether a Linux with this command line resets the machine by a triple fault: `reboot=t`, and `reboot=p`, which first
/// tries a port that is not there (kernel/reboot.c, reboot_setup; arch/x86/kernel/reboot.c).
pub(crate) fn reboots_by_triple_fault(cmdline: &str) -> bool {
    words(cmdline)
        .filter_map(|word| word.strip_prefix("reboot="))
        .flat_map(|value| value.split(','))
        .filter_map(|part| part.strip_prefix("panic_").unwrap_or(part).chars().next())
        .filter(|letter| "baktep".contains(*letter))
        .last()
        .is_some_and(|letter| "tp".contains(letter))
}

/// Checks `cmdline` against the kernel's limit and writes it to its place.
pub(crate) fn write(mem: &GuestMemory, cmdline: &str, kernel_max: usize) -> Result<(), BootError> {
    let room = usize::try_from(layout::CMDLINE_MAX_SIZE).unwrap_or(usize::MAX) - 1;
    let max = kernel_max.min(room);
    if cmdline.len() > max {
        let len = cmdline.len();
        return Err(BootError::Refused(format!(
            "the kernel command line has {len} bytes, this kernel takes {max} at most; shorten it"
        )));
    }
    if let Some(offset) = cmdline.find(['\0', '\n', '\r']) {
        let what = match cmdline.as_bytes().get(offset) {
            Some(0) => "a NUL",
            _ => "a line break",
        };
        return Err(BootError::Refused(format!(
            "the kernel command line has {what} at byte {offset}; remove it"
        )));
    }
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    mem.write_slice(&bytes, GuestAddress(layout::CMDLINE_START))
        .map_err(|source| BootError::GuestMemory("the command line", layout::CMDLINE_START, source))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_work_is_left_out_or_replaced() {
        let published = "console=ttyS0 reboot=k panic=1 pci=off noapic acpi=off  a=\"b  c\" nosmp -- sh  -c noapic";
        assert_eq!(
            suit(published),
            "console=ttyS0 reboot=k panic=1 pci=off acpi=off  a=\"b  c\" maxcpus=1 -- sh  -c noapic"
        );
        assert_eq!(
            with_acpi("acpi=off a virtio_mmio.device=4K@0xd0000000:5 -- acpi=off"),
            "a -- acpi=off"
        );
        for same in ["", " ", "-- nosmp", "a  b", "noapicx maxcpus=01 x=noapic "] {
            assert_eq!(suit(same), same);
        }
    }

    #[test]
    fn the_last_way_to_reboot_counts() {
        for cmdline in [
            "reboot=t",
            "a reboot=w,t b",
            "reboot=k reboot=p",
            "reboot=pci,force -- reboot=k",
        ] {
            assert!(reboots_by_triple_fault(cmdline), "{cmdline}");
        }
        for cmdline in [
            "",
            "reboot=k",
            "reboot=t,k",
            "reboot=t reboot=acpi",
            "reboot=",
            "xreboot=t",
            "-- reboot=t",
            "reboot=panic_warm",
        ] {
            assert!(!reboots_by_triple_fault(cmdline), "{cmdline}");
        }
    }
}
