//! The kernel command line: checked, then written with its NUL.

use vm_memory::{Bytes, GuestAddress};

use super::GuestMemory;
use super::error::BootError;
use crate::arch::x86_64::layout;

/// Longest command line of a kernel that does not say, without the NUL: x86 Linux has COMMAND_LINE_SIZE 2048.
pub(crate) const DEFAULT_MAX: usize = 2047;

/// The words that are the kernel's: those before "--" (kernel/params.c, parse_args).
pub(crate) fn words(cmdline: &str) -> impl Iterator<Item = &str> {
    cmdline.split_whitespace().take_while(|word| *word != "--")
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
        return Err(BootError::CmdlineTooLong {
            len: cmdline.len(),
            max,
        });
    }
    if let Some(offset) = cmdline.find(['\0', '\n', '\r']) {
        let what = match cmdline.as_bytes().get(offset) {
            Some(0) => "a NUL",
            _ => "a line break",
        };
        return Err(BootError::CmdlineByte { what, offset });
    }
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    mem.write_slice(&bytes, GuestAddress(layout::CMDLINE_START))
        .map_err(|source| BootError::GuestMemory {
            what: "the command line",
            gpa: layout::CMDLINE_START,
            source,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

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
