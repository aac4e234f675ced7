//! The kernel command line: checked, then written with its NUL.

use vm_memory::{Bytes, GuestAddress};

use super::GuestMemory;
use super::error::BootError;
use crate::arch::x86_64::layout;

/// Longest command line of a kernel that does not say, without the NUL: x86 Linux has COMMAND_LINE_SIZE 2048.
pub(crate) const DEFAULT_MAX: usize = 2047;

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
