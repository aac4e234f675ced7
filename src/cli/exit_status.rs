//! The process's exit status, which scripts rely on: docs/reference.md has the table.

use crate::vmm::outcome::Outcome;

/// The command line is wrong.
pub const USAGE: u8 = 2;
/// minivmm itself could not go on: host, kernel file or configuration.
pub const VMM_FAILED: u8 = 125;

/// The status that says why a VM ended.
pub fn exit_status(outcome: &Outcome) -> u8 {
    match outcome {
        Outcome::PowerOff | Outcome::Reset | Outcome::Saved => 0,
        Outcome::Exit(status) => *status,
        Outcome::Deadline => 124,
        // As a shell reports a process that a signal ended; quitting at the console counts as an interrupt.
        Outcome::Signal(signal) => of_signal(*signal),
        Outcome::Quit => of_signal(libc::SIGINT),
        Outcome::Panicked => 134,
        Outcome::VcpuFailed(_) => 139,
    }
}

/// The status of a process that was stopped by this signal.
pub fn of_signal(signal: i32) -> u8 {
    128u8.wrapping_add(signal as u8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::outcome::VcpuFailure;

    #[test]
    fn statuses_are_those_scripts_rely_on() {
        for (outcome, status) in [
            (Outcome::PowerOff, 0),
            (Outcome::Reset, 0),
            (Outcome::Saved, 0),
            (Outcome::Exit(255), 255),
            (Outcome::Deadline, 124),
            (Outcome::Signal(libc::SIGINT), 130),
            (Outcome::Signal(libc::SIGTERM), 143),
            (Outcome::Quit, 130),
            (Outcome::Panicked, 134),
            (Outcome::VcpuFailed(VcpuFailure::TripleFault), 139),
        ] {
            assert_eq!(exit_status(&outcome), status, "{outcome:?}");
        }
    }
}
