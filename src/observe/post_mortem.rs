//! The report on a guest that died: registers, last access, console, and the likely cause.

use vm_memory::{Bytes, GuestAddress};

use crate::arch;
use crate::boot::{self, Entry};
use crate::config::ConsoleKind;
use crate::vmm::outcome::{Outcome, VcpuFailure};
use crate::vmm::vcpu::Vcpu;
use crate::vmm::vm::Vm;

/// Bytes of code shown at the instruction pointer.
const CODE_BYTES: usize = 16;

/// What a report is made from.
pub struct CrashReport<'a> {
    /// Why the VM ended.
    pub outcome: &'a Outcome,
    /// The vCPU to look at: the one that failed, or the boot vCPU.
    pub vcpu: &'a Vcpu,
    /// The VM.
    pub vm: &'a Vm,
    /// Bytes that the guest has written to its console.
    pub console_bytes: u64,
}

impl CrashReport<'_> {
    /// One line: how the VM ended.
    pub fn headline(&self) -> String {
        match self.outcome {
            Outcome::VcpuFailed(failure) => failure.to_string(),
            outcome => {
                let end = match outcome {
                    Outcome::Reset => "the guest reset the machine",
                    Outcome::Deadline => "the deadline passed",
                    _ => "the guest was stopped",
                };
                let silent = if self.console_bytes == 0 {
                    " without any console output"
                } else {
                    ""
                };
                format!("{end}{silent}")
            }
        }
    }

    /// A few lines for stderr.
    pub fn report(&self) -> String {
        let Vcpu { index, exits, .. } = self.vcpu;
        let bytes = self.console_bytes;
        let access = self.vcpu.last_access.map(|access| access.to_string());
        let access = access.unwrap_or("none, the guest never left its memory".into());
        let mut lines = vec![
            format!("vCPU {index} after {exits} exits; bytes on the console: {bytes}"),
            format!("last access: {access}"),
        ];
        let mut ip = None;
        match arch::vcpu::Registers::read(&self.vcpu.fd) {
            Ok(registers) => {
                lines.push(registers.to_string());
                ip = registers.instruction_pointer();
            }
            Err(e) => lines.push(format!("registers: KVM does not give them: {e}")),
        }
        if let Some(code) = ip.and_then(|ip| self.code_at(ip)) {
            let hex: Vec<String> = code.iter().map(|b| format!("{b:02x}")).collect();
            lines.push(format!("code at rip: {}", hex.join(" ")));
        }
        lines.push(match self.unheard_panic() {
            Some(message) => format!(
                "  the kernel panicked: {message}; with panic=-1 on its command line it would reset the machine then"
            ),
            None => format!("likely cause: {}", self.likely_cause(ip)),
        });
        lines.join("\n")
    }

    /// The panic message of a kernel that hung after its panic.
    fn unheard_panic(&self) -> Option<String> {
        let stopped = matches!(
            self.outcome,
            Outcome::Deadline | Outcome::Quit | Outcome::Signal(_)
        );
        let message = || boot::panic_message(self.vm.mem(), &self.vm.kernel().kernel_range);
        stopped.then(message).flatten()
    }

    /// The bytes at a guest virtual address, if it is mapped to RAM.
    fn code_at(&self, ip: u64) -> Option<[u8; CODE_BYTES]> {
        let translation = self.vcpu.fd.translate_gva(ip).ok()?;
        let mut code = [0; CODE_BYTES];
        (translation.valid != 0)
            .then(|| {
                self.vm
                    .mem()
                    .read_slice(&mut code, GuestAddress(translation.physical_address))
                    .ok()
            })
            .flatten()?;
        Some(code)
    }

    fn likely_cause(&self, ip: Option<u64>) -> &'static str {
        let at_entry = matches!(
            (self.vm.kernel().entry, ip),
            (Entry::Linux64 { rip: entry, .. }, Some(ip)) if ip == entry
        );
        let console = self.vm.config().console;
        let listens = self.vm.cmdline().contains(console.parameter());
        match self.outcome {
            Outcome::VcpuFailed(VcpuFailure::TripleFault)
                if self.console_bytes == 0 && at_entry =>
            {
                "the kernel's first instruction faulted: the file is not what its header says, or is damaged"
            }
            Outcome::VcpuFailed(VcpuFailure::TripleFault) if self.console_bytes == 0 => {
                "the kernel died before it had a console: too little memory, a CPU feature that it needs, or a damaged \
                 file; `--append earlyprintk=ttyS0` may show more"
            }
            Outcome::VcpuFailed(VcpuFailure::TripleFault) => {
                "a fault with no handler left; the last lines on the console tell more"
            }
            Outcome::VcpuFailed(
                VcpuFailure::Emulation
                | VcpuFailure::InternalError(_)
                | VcpuFailure::EntryFailed(_),
            ) => {
                "the guest reached a state or an instruction that this host's KVM does not handle; `minivmm doctor` says \
                 what KVM offers, the kernel's log (dmesg) may name the instruction"
            }
            Outcome::VcpuFailed(VcpuFailure::RunFailed(errno))
                if *errno == libc::EFAULT || *errno == libc::ENOMEM =>
            {
                "the host could not give the guest a page of its memory: it is out of memory, or a memory limit was hit"
            }
            Outcome::VcpuFailed(_) => "this host's KVM; `minivmm doctor` says what it offers",
            _ if self.console_bytes > 0 => "the last lines on the console tell more",
            _ if !listens => match console {
                ConsoleKind::Serial => {
                    "the kernel command line names no console=ttyS0, so the guest may have run without visible output"
                }
                ConsoleKind::Virtio => {
                    "the kernel command line names no console=hvc0, so the guest may have run without visible output"
                }
            },
            _ if console == ConsoleKind::Virtio => {
                "the guest may have run without visible output: virtio_mmio and virtio_console must be built into the kernel, or \
                 modules that the initrd loads; `--console serial` needs neither"
            }
            _ => {
                "the kernel reset or hung before it had a console: too little memory, a kernel without a serial driver, \
                 or a host whose KVM is too slow for it (see `minivmm doctor`); `--append earlyprintk=ttyS0` may show more"
            }
        }
    }
}

/// The log level of the post-mortem, `None` for no post-mortem. A failed vCPU, and a guest that ended without any console
/// output, are errors. A guest that had to be stopped is worth a note. Power-off and the exit port are normal ends.
pub fn level(outcome: &Outcome, console_bytes: u64) -> Option<log::Level> {
    match outcome {
        Outcome::VcpuFailed(_) => Some(log::Level::Error),
        Outcome::Reset if console_bytes == 0 => Some(log::Level::Error),
        Outcome::Deadline | Outcome::Quit | Outcome::Signal(_) if console_bytes == 0 => {
            Some(log::Level::Error)
        }
        Outcome::Deadline | Outcome::Quit | Outcome::Signal(_) => Some(log::Level::Info),
        _ => None,
    }
}
