//! The virtio devices of a VM, made of what was prepared for them.

use std::sync::Arc;

use minivmm_devices::virtio::console::Console as VirtioConsole;
use minivmm_devices::virtio::rng::Rng;
use minivmm_devices::virtio::vsock::Vsock;

use super::error::{VmError, host};
use super::machine::Machine;
use super::prepare::Prepared;
use crate::arch::irqchip::IrqChip;

/// Attaches the virtio devices that the configuration asks for, always in the same order: it decides on their places.
pub(super) fn attach_virtio_devices(
    machine: &mut Machine,
    parts: &mut Prepared,
    hvc0: Option<VirtioConsole>,
    interrupts: &IrqChip,
) -> Result<(), VmError> {
    let mem = &parts.mem;
    for (index, disk) in std::mem::take(&mut parts.disks).into_iter().enumerate() {
        machine.disks.push(Arc::clone(disk.disk()));
        let (name, bound) = (format!("disk {index}"), disk.memory_bound());
        machine.attach_virtio(&name, bound, Box::new(disk), mem, interrupts)?;
    }
    for (index, net) in std::mem::take(&mut parts.nets).into_iter().enumerate() {
        let (name, bound) = (format!("net {index}"), net.memory_bound());
        machine.attach_virtio(&name, bound, Box::new(net), mem, interrupts)?;
    }
    if parts.config.rng {
        let rng = Box::new(Rng::new(&parts.threads).map_err(host("a device's thread"))?);
        machine.attach_virtio("rng", Rng::MEMORY_BOUND, rng, mem, interrupts)?;
    }
    if let Some(hvc0) = hvc0.map(Box::new) {
        let bound = VirtioConsole::MEMORY_BOUND;
        machine.attach_virtio("console", bound, hvc0, mem, interrupts)?;
    }
    if let Some(vsock) = parts.vsock.take().map(Box::new) {
        machine.attach_virtio("vsock", Vsock::MEMORY_BOUND, vsock, mem, interrupts)?;
    }
    Ok(())
}
