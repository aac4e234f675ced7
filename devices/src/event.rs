//! Events that a guest reports to the VMM through a device.

use std::sync::Arc;

/// Something the guest asked for or reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestEvent {
    /// The guest switched itself off (ACPI S5).
    PowerOff,
    /// The guest asked for a reset (i8042 or ACPI reset register).
    Reset,
    /// The guest kernel panicked and said so (pvpanic).
    Panicked,
    /// The guest ended with this status (exit port).
    Exit(u8),
    /// The guest passed a point worth a time stamp (boot-mark port).
    BootMark(u8),
}

/// Where devices report events. It is called on the vCPU thread with the device locked: it must not block, and must not
/// access the device.
pub type EventSink = Arc<dyn Fn(GuestEvent) + Send + Sync>;
