//! Why a VM ended.

use std::fmt;

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
    /// It was saved, and was to end then.
    Saved,
    /// The user typed the quit command at the console.
    Quit,
}

impl Outcome {
    /// Whether the VM was stopped from outside, by somebody who does not want to wait for it.
    pub fn is_external(&self) -> bool {
        matches!(self, Self::Signal(_) | Self::Quit | Self::Deadline)
    }
}

/// Why a vCPU cannot go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VcpuFailure {
    /// An exception while delivering a double fault (SDM vol. 3 § 6.15): the guest has no handlers left.
    TripleFault,
    /// The processor refused to enter the guest.
    EntryFailed {
        /// The hardware's reason code.
        reason: u64,
    },
    /// KVM gave up, most often because it had to emulate an instruction that it does not know.
    InternalError {
        /// KVM_INTERNAL_ERROR_*: 1 is emulation, 2 simultaneous exceptions, 3 event delivery.
        suberror: u32,
    },
    /// KVM_RUN failed.
    RunFailed {
        /// The error number.
        errno: i32,
    },
    /// An exit that minivmm does not know.
    UnknownExit(String),
}

impl fmt::Display for VcpuFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TripleFault => write!(f, "the guest triple-faulted"),
            Self::EntryFailed { reason } => {
                write!(
                    f,
                    "the processor refused to enter the guest (reason {reason:#x})"
                )
            }
            Self::InternalError { suberror: 1 } => {
                write!(f, "KVM could not emulate the guest's instruction")
            }
            Self::InternalError { suberror } => write!(f, "KVM internal error {suberror}"),
            Self::RunFailed { errno } => {
                write!(
                    f,
                    "KVM_RUN failed: {}",
                    std::io::Error::from_raw_os_error(*errno)
                )
            }
            Self::UnknownExit(exit) => write!(f, "KVM stopped with an unknown exit: {exit}"),
        }
    }
}
