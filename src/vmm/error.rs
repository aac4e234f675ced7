//! Why a VM could not be built or run.

use std::path::PathBuf;

use minivmm_devices::block::DiskError;
use minivmm_devices::bus::BusError;
use minivmm_devices::state::StateError;
use vm_memory::GuestMemoryError;

use super::memory::MemoryError;
use super::snapshot::error::SnapshotError;
use super::vcpu::VcpuError;
use crate::arch::layout;
use crate::boot::BootError;
use crate::config::{ConfigError, MemorySize};
use crate::host::kvm::OpenError;
use crate::host::passt::PasstError;
use crate::host::tap::TapError;
use crate::host::vsock::VsockError;

/// See the module.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// The configuration is impossible.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// More devices than the machine has room for.
    #[error(
        "{0} disks, networks, entropy devices and consoles: the machine has room for {max}",
        max = layout::MAX_VIRTIO_DEVICES
    )]
    TooManyDevices(usize),
    /// Kernel or initrd cannot be loaded.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A disk cannot be opened.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A TAP device cannot be used.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// A socket cannot be made.
    #[error(transparent)]
    Vsock(#[from] VsockError),
    /// passt cannot be used.
    #[error(transparent)]
    Passt(#[from] PasstError),
    /// The networks that were opened are not those of the configuration.
    #[error("the configuration has {0} networks, of which {1} are open")]
    Networks(usize, usize),
    /// Guest RAM cannot be made.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A vCPU cannot be made.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// No KVM for this process.
    #[error(transparent)]
    OpenKvm(#[from] OpenError),
    /// Another hypervisor has the processor.
    #[error(
        "KVM refused to create a VM: another hypervisor (VirtualBox, VMware) holds the processor's virtualization; stop it"
    )]
    Busy,
    /// KVM refused a step of the set-up.
    #[error("{0} failed")]
    Kvm(&'static str, #[source] kvm_ioctls::Error),
    /// More vCPUs than KVM makes: its limit, and the configuration's.
    #[error("this host's KVM makes {0} vCPUs at most, not {1}")]
    TooManyCpus(usize, u8),
    /// More memory than the processor can address: its size, the first GPA behind it, and the address bits.
    #[error("{0} of guest memory end at {1:#x}, beyond the {2} physical address bits of this host")]
    TooMuchMemory(MemorySize, u64, u8),
    /// A stock kernel, on a KVM that cannot run one.
    #[error(
        "this host's KVM is PVM, without hardware virtualization: it emulates {} so slowly that it would seem to hang; run \
         minivmm on a host with VT-x or AMD-V, or in the lab: tests/lab/run (`minivmm doctor` tells more)",
        .0.display()
    )]
    SoftwareKvm(PathBuf),
    /// Guest memory refused an access within RAM.
    #[error("cannot write the boot tables to guest memory")]
    BootTables(#[source] GuestMemoryError),
    /// Two devices claim one address.
    #[error("cannot lay out the devices")]
    Bus(#[from] BusError),
    /// A snapshot cannot be used or written.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// What was saved of the devices does not fit.
    #[error("cannot restore the devices")]
    Devices(#[source] StateError),
    /// The host refused something.
    #[error("cannot set up {0}")]
    Host(&'static str, #[source] std::io::Error),
}

/// For what the host refuses.
pub fn host(what: &'static str) -> impl FnOnce(std::io::Error) -> VmError {
    move |source| VmError::Host(what, source)
}

/// For what KVM refuses.
pub fn refused(step: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> VmError {
    move |source| VmError::Kvm(step, source)
}
