//! Why a VM ended, and the process's exit status that says so.

use crate::vmm::vcpu::VcpuFailure;

/// Exit status for a wrong command line.
pub const USAGE: u8 = 2;
/// Exit status when minivmm itself could not go on: host, kernel file or configuration.
pub const MONITOR_FAILED: u8 = 125;

/// Why a VM ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The guest powered off.
    PowerOff,
    /// The guest reset the machine.
    Reset,
    /// The guest wrote this byte to the exit port.
    Exit(u8),
    /// The guest's kernel panicked.
    Panicked,
    /// A vCPU triple-faulted, or KVM could not run it.
    VcpuFailed(VcpuFailure),
    /// The deadline passed first.
    Deadline,
    /// A signal asked minivmm to stop.
    Signal(i32),
    /// The user typed the quit command at the console.
    Quit,
}

impl Outcome {
    /// Whether the VM was stopped from outside, by somebody who does not want to wait for it.
    pub fn is_external(&self) -> bool {
        matches!(self, Self::Signal(_) | Self::Quit | Self::Deadline)
    }

    /// The process's exit status.
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::PowerOff | Self::Reset => 0,
            Self::Exit(status) => *status,
            Self::Deadline => 124,
            // As a shell reports a process that a signal ended; quitting at the console counts as an interrupt.
            Self::Signal(signal) => 128u8.wrapping_add(*signal as u8),
            Self::Quit => 128 + libc::SIGINT as u8,
            Self::Panicked => 134,
            Self::VcpuFailed(_) => 139,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_are_those_scripts_rely_on() {
        for (outcome, status) in [
            (Outcome::PowerOff, 0),
            (Outcome::Reset, 0),
            (Outcome::Exit(255), 255),
            (Outcome::Deadline, 124),
            (Outcome::Signal(libc::SIGINT), 130),
            (Outcome::Signal(libc::SIGTERM), 143),
            (Outcome::Quit, 130),
            (Outcome::Panicked, 134),
            (Outcome::VcpuFailed(VcpuFailure::TripleFault), 139),
        ] {
            assert_eq!(outcome.exit_status(), status, "{outcome:?}");
        }
    }
}
