//! What a timeline records: events, boot marks, exits.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use serde::Serialize;

use crate::console::OUTPUT_MEMORY_BOUND;
use crate::vmm::vcpu;
use crate::vmm::vm::Vm;

/// Boot marks that are kept; more are counted only.
const MAX_BOOT_MARKS: usize = 64;

/// A point in time; all but boot marks and those of networks come once in a boot. In JSON the names are in snake case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Point {
    /// The kernel made the process: what `fork`, `exec` and the program's loading took is behind it.
    ProcessStart,
    /// The first line of minivmm's own.
    Main,
    /// The command line and the configuration file are read.
    ConfigRead,
    /// Guest RAM has its addresses in the process.
    MemoryMapped,
    /// Kernel, initrd and command line are in guest RAM.
    KernelLoaded,
    /// KVM has made the VM.
    VmCreated,
    /// vCPUs, devices and tables are made.
    VmReady,
    /// The boot vCPU enters the guest.
    FirstRun,
    /// The guest's first byte on its console.
    FirstConsoleByte,
    /// The kernel's line `Run PROGRAM as init process`, which it writes at log level 7 and up.
    InitRun,
    /// The first line on the console that bears no time stamp of the kernel's log: see [`crate::observe::phases::Phases::user_output`].
    FirstUserOutput,
    /// `HOST login: ` at the start of a line.
    LoginPrompt,
    /// The guest wrote to the boot-mark port.
    BootMark,
    /// The driver of a network began to use its link.
    LinkUp,
    /// The first packet came from a network's guest.
    FirstPacketSent,
    /// The first packet went to it.
    FirstPacketReceived,
    /// The last exit that the guest itself made.
    LastExit,
    /// All vCPU threads have ended.
    VcpusStopped,
    /// The process's memory has been measured, which only a timeline does.
    MemoryMeasured,
    /// minivmm has nothing more to do. What the kernel takes to remove the process comes after it.
    ProcessEnd,
}

/// The boot marks of a guest, noted by its vCPUs' threads.
#[derive(Debug, Clone, Default)]
pub struct BootMarks(Arc<Mutex<Marks>>);

#[derive(Debug, Default)]
struct Marks {
    kept: Vec<(u8, Instant)>,
    lost: u64,
}

impl BootMarks {
    /// Notes a mark, now.
    pub fn note(&self, value: u8) {
        let mut marks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if marks.kept.len() < MAX_BOOT_MARKS {
            marks.kept.push((value, Instant::now()));
        } else {
            marks.lost += 1;
        }
    }

    /// The marks, and how many more there were.
    pub(super) fn taken(&self) -> (Vec<(u8, Instant)>, u64) {
        let marks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        (marks.kept.clone(), marks.lost)
    }
}

/// Most that a device takes beside guest RAM, whatever its guest does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct MemoryBound {
    pub(super) name: String,
    pub(super) bytes: u64,
}

impl MemoryBound {
    /// Those of all that a guest can reach.
    pub(super) fn of(vm: &Vm) -> Vec<Self> {
        let vcpus = vm.vcpus().iter();
        let vcpus = vcpus.map(|vcpu| (format!("vCPU {}", vcpu.index), vcpu::MEMORY_BOUND));
        let output = ("console output".to_owned(), OUTPUT_MEMORY_BOUND);
        vcpus
            .chain([output])
            .chain(vm.machine().memory_bounds.iter().cloned())
            .map(|(name, bytes)| Self {
                name,
                bytes: bytes as u64,
            })
            .collect()
    }
}
