//! What is left to see of a guest that died: registers, last access, console, and what most often makes a guest end so.

use std::fmt::Write;

use kvm_bindings::{kvm_regs, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::arch::x86_64::regs;
use crate::boot::{self, Entry, LoadedKernel};
use crate::config::ConsoleKind;
use crate::vmm::outcome::Outcome;
use crate::vmm::vcpu::{Vcpu, VcpuFailure};

/// Bytes of code shown at the instruction pointer.
const CODE_BYTES: usize = 16;

/// What the VM has to say about its end.
pub struct Scene<'a> {
    /// Why the VM ended.
    pub outcome: &'a Outcome,
    /// The vCPU to look at: the one that failed, or the boot vCPU.
    pub vcpu: &'a Vcpu,
    /// Guest RAM.
    pub mem: &'a GuestMemoryMmap,
    /// What was loaded.
    pub kernel: &'a LoadedKernel,
    /// Which device the console is.
    pub console: ConsoleKind,
    /// Bytes that the guest has written to its console.
    pub console_bytes: u64,
    /// The kernel command line.
    pub cmdline: &'a str,
}

impl Scene<'_> {
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
                    " without a word on the console"
                } else {
                    ""
                };
                format!("{end}{silent}")
            }
        }
    }

    /// A few lines for stderr.
    pub fn report(&self) -> String {
        let mut out = String::new();
        let registers = self
            .vcpu
            .fd
            .get_regs()
            .and_then(|r| Ok((r, self.vcpu.fd.get_sregs()?)));
        // Writing to a string cannot fail.
        let _ = writeln!(
            out,
            "vCPU {} after {} exits; bytes on the console: {}",
            self.vcpu.index, self.vcpu.exits, self.console_bytes
        );
        match self.vcpu.last_access {
            Some(access) => _ = writeln!(out, "last access: {access}"),
            None => _ = writeln!(out, "last access: none, the guest never left its memory"),
        }
        match &registers {
            Ok((regs, sregs)) => self.registers(&mut out, regs, sregs),
            Err(e) => _ = writeln!(out, "registers: KVM does not give them: {e}"),
        }
        if let Some(message) = self.unheard_panic() {
            let _ = write!(
                out,
                "  the kernel panicked: {message}; with panic=-1 on its command line it would reset the machine then"
            );
            return out;
        }
        let rip = registers.map(|(regs, _)| regs.rip).ok();
        let _ = write!(out, "likely cause: {}", self.likely_cause(rip));
        out
    }

    /// The message of a kernel that has hung since it panicked.
    fn unheard_panic(&self) -> Option<String> {
        let stopped = matches!(
            self.outcome,
            Outcome::Deadline | Outcome::Quit | Outcome::Signal(_)
        );
        let message = || boot::panic_message(self.mem, &self.kernel.kernel_range);
        stopped.then(message).flatten()
    }

    fn registers(&self, out: &mut String, regs: &kvm_regs, sregs: &kvm_sregs) {
        if regs::are_at_reset_vector(regs, sregs) {
            let _ = writeln!(
                out,
                "registers: those after a reset (AMD processors do not keep the others at a triple fault)"
            );
            return;
        }
        let rows = [
            [
                ("rip", regs.rip),
                ("rsp", regs.rsp),
                ("rflags", regs.rflags),
            ],
            [("rax", regs.rax), ("rbx", regs.rbx), ("rcx", regs.rcx)],
            [("rdx", regs.rdx), ("rsi", regs.rsi), ("rdi", regs.rdi)],
            [("cr0", sregs.cr0), ("cr2", sregs.cr2), ("cr3", sregs.cr3)],
            [
                ("cr4", sregs.cr4),
                ("efer", sregs.efer),
                ("cs", sregs.cs.selector.into()),
            ],
        ];
        for row in rows {
            let row = row.map(|(name, value)| format!("{name:>6}={value:#018x}"));
            let _ = writeln!(out, "{}", row.join(" "));
        }
        if let Some(code) = self.code_at(regs.rip) {
            let hex: Vec<String> = code.iter().map(|b| format!("{b:02x}")).collect();
            let _ = writeln!(out, "code at rip: {}", hex.join(" "));
        }
    }

    /// The bytes at a guest virtual address, if it is mapped to RAM.
    fn code_at(&self, rip: u64) -> Option<[u8; CODE_BYTES]> {
        let translation = self.vcpu.fd.translate_gva(rip).ok()?;
        let mut code = [0; CODE_BYTES];
        (translation.valid != 0)
            .then(|| {
                self.mem
                    .read_slice(&mut code, GuestAddress(translation.physical_address))
                    .ok()
            })
            .flatten()?;
        Some(code)
    }

    fn likely_cause(&self, rip: Option<u64>) -> &'static str {
        let at_entry = matches!(
            (self.kernel.entry, rip),
            (Entry::Linux64 { rip: entry, .. }, Some(rip)) if rip == entry
        );
        let listens = self.cmdline.contains(self.console.parameter());
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
                VcpuFailure::InternalError { .. } | VcpuFailure::EntryFailed { .. },
            ) => {
                "the guest reached a state or an instruction that this host's KVM does not handle; `minivmm doctor` says \
                 what KVM offers, the kernel's log (dmesg) may name the instruction"
            }
            Outcome::VcpuFailed(VcpuFailure::RunFailed { errno })
                if *errno == libc::EFAULT || *errno == libc::ENOMEM =>
            {
                "the host could not give the guest a page of its memory: it is out of memory, or a memory limit was hit"
            }
            Outcome::VcpuFailed(_) => "this host's KVM; `minivmm doctor` says what it offers",
            _ if self.console_bytes > 0 => "the last lines on the console tell more",
            _ if !listens => match self.console {
                ConsoleKind::Serial => {
                    "the kernel command line names no console=ttyS0, so that the guest may well have run, unseen"
                }
                ConsoleKind::Virtio => {
                    "the kernel command line names no console=hvc0, so that the guest may well have run, unseen"
                }
            },
            _ if self.console == ConsoleKind::Virtio => {
                "the guest may well have run, unseen: virtio_mmio and virtio_console must be built into the kernel, or \
                 modules that the initrd loads; `--console serial` needs neither"
            }
            _ => {
                "the kernel reset or hung before it had a console: too little memory, a kernel without a serial driver, \
                 or a host whose KVM is too slow for it (see `minivmm doctor`); `--append earlyprintk=ttyS0` may show more"
            }
        }
    }
}

/// How loudly an end calls for a post-mortem: a vCPU that failed, or a guest that ended without a word although it had a
/// console to say it on, is an error; one that had to be stopped may be worth a look. A tiny guest that ends on purpose
/// says so by power-off or exit port.
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
