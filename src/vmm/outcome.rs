//! Why a VM ended.

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
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VcpuFailure {
    /// An exception while delivering a double fault (SDM vol. 3 § 6.15): the guest has no handlers left.
    #[error("the guest triple-faulted")]
    TripleFault,
    /// The processor refused to enter the guest, for this reason of the hardware's.
    #[error("the processor refused to enter the guest (reason {0:#x})")]
    EntryFailed(u64),
    /// KVM does not know the instruction that it had to emulate (KVM_INTERNAL_ERROR_EMULATION).
    #[error("KVM could not emulate the guest's instruction")]
    Emulation,
    /// KVM gave up for another reason: KVM_INTERNAL_ERROR_*, 2 is simultaneous exceptions, 3 event delivery.
    #[error("KVM internal error {0}")]
    InternalError(u32),
    /// KVM_RUN failed with this error number.
    #[error("KVM_RUN failed: {}", std::io::Error::from_raw_os_error(*.0))]
    RunFailed(i32),
    /// An exit that minivmm does not know.
    #[error("KVM stopped with an unknown exit: {0}")]
    UnknownExit(String),
}
