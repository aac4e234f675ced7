//! Where the time of a boot goes, for `--timeline`: when what happened, which exits, what the console cost.
//!
//! [`Timeline`] is the one owner. The main thread notes its own points in it. What happens on other threads is kept where
//! it happens, by each vCPU in its [`ExitProfile`] and by the console in its [`Phases`], and collected when the VM has
//! ended, so that watching shares nothing and waits for nothing. A timeline that is off notes nothing and reads no clock.
//!
//! It is the timeline of the first boot; a guest that resets the machine and boots again adds to the number of boots.

mod memory;
mod process_start;
mod report;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use serde::Serialize;

pub use report::Report;

use super::phases::Phases;
use crate::boot::LoadedKernel;
use crate::vmm::vcpu::profile::{ExitProfile, Place};
use crate::vmm::vm::{BuildTimes, Vm};
use memory::PrivateMemory;
use process_start::ProcessStart;

/// Boot marks that are kept; more are counted only.
const MAX_BOOT_MARKS: usize = 64;

/// A point in time; all but boot marks come once in a boot. In JSON the names are in snake case.
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
    /// The first line on the console that bears no time stamp of the kernel's log: see [`Phases::user_output`].
    FirstUserOutput,
    /// `HOST login: ` at the start of a line.
    LoginPrompt,
    /// The guest wrote to the boot-mark port.
    BootMark,
    /// The last exit that the guest itself made.
    LastExit,
    /// All vCPU threads have ended.
    VcpusStopped,
    /// The process's memory is measured, which takes its time only because there is a timeline.
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
    fn taken(&self) -> (Vec<(u8, Instant)>, u64) {
        let marks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        (marks.kept.clone(), marks.lost)
    }
}

/// The timeline of a process that boots a VM; the default is off.
#[derive(Debug, Default)]
pub struct Timeline(Option<Box<Watch>>);

#[derive(Debug)]
struct Watch {
    start: ProcessStart,
    /// Each point once, in no order.
    points: Vec<(Point, Instant)>,
    kernel: Option<LoadedKernel>,
    marks: BootMarks,
    exits: ExitProfile,
    /// What the devices are called that exits went to.
    names: BTreeMap<Place, String>,
    console_bytes: u64,
    memory: Option<PrivateMemory>,
    boots: u32,
}

impl Timeline {
    /// Watches from here on; `main` is when the program's own code began.
    ///
    /// To be called while the process has one thread: how long it has run is taken from that thread's account.
    pub fn start(main: Instant) -> Self {
        let start = ProcessStart::find(main);
        Self(Some(Box::new(Watch {
            points: vec![(Point::ProcessStart, start.at), (Point::Main, main)],
            start,
            kernel: None,
            marks: BootMarks::default(),
            exits: ExitProfile::default(),
            names: BTreeMap::new(),
            console_bytes: 0,
            memory: None,
            boots: 0,
        })))
    }

    /// Notes that `point` is reached, now. Its first time counts.
    pub fn note(&mut self, point: Point) {
        if let Some(watch) = &mut self.0 {
            watch.note(point, Instant::now());
        }
    }

    /// Notes what was reached when a VM was made, of the first.
    pub fn note_build(&mut self, times: &BuildTimes) {
        let BuildTimes {
            memory_mapped,
            kernel_loaded,
            vm_created,
            vm_ready,
        } = times;
        let Some(watch) = &mut self.0 else { return };
        for (point, at) in [
            (Point::MemoryMapped, memory_mapped),
            (Point::KernelLoaded, kernel_loaded),
            (Point::VmCreated, vm_created),
            (Point::VmReady, vm_ready),
        ] {
            if let Some(at) = at {
                watch.note(point, *at);
            }
        }
    }

    /// Whether the boot that comes is to be watched: the first, unless the timeline is off.
    pub fn watches_boot(&self) -> bool {
        self.first_boot().is_some()
    }

    /// Where to note boot marks, if this boot is watched.
    pub fn boot_marks(&self) -> Option<BootMarks> {
        self.first_boot().map(|watch| watch.marks.clone())
    }

    fn first_boot(&self) -> Option<&Watch> {
        self.0.as_deref().filter(|watch| watch.boots == 0)
    }

    /// Takes what vCPUs and console have seen of a boot that has ended, and looks at the memory while the VM is still there.
    pub fn end_of_boot(&mut self, vm: &Vm, phases: Phases, console_bytes: u64) {
        let Some(watch) = &mut self.0 else { return };
        watch.boots += 1;
        if watch.boots > 1 {
            return;
        }
        watch.note(Point::VcpusStopped, Instant::now());
        match PrivateMemory::read(vm.mem()) {
            Ok(memory) => watch.memory = Some(memory),
            Err(e) => log::info!("cannot measure the memory of minivmm: {e}"),
        }
        watch.note(Point::MemoryMeasured, Instant::now());
        let profiles = vm.vcpus().iter().filter_map(|vcpu| vcpu.profile.as_ref());
        profiles.for_each(|profile| watch.exits.add(profile));
        let name = |place: &Place| (*place, vm.machine().name_of(*place));
        watch.names = watch.exits.places.keys().map(name).collect();
        watch.kernel = Some(vm.kernel().clone());
        watch.console_bytes = console_bytes;
        for (point, at) in [
            (Point::FirstRun, watch.exits.first_run),
            (Point::FirstConsoleByte, phases.first_byte),
            (Point::InitRun, phases.init_run),
            (Point::FirstUserOutput, phases.user_output),
            (Point::LoginPrompt, phases.login_prompt),
            (Point::LastExit, watch.exits.last_exit),
        ] {
            if let Some(at) = at {
                watch.note(point, at);
            }
        }
    }

    /// The process ends now, with this exit status: what there is to say, unless the timeline is off.
    pub fn finish(self, status: u8) -> Option<Report> {
        let mut watch = self.0?;
        watch.note(Point::ProcessEnd, Instant::now());
        Some(Report::new(&watch, status))
    }
}

impl Watch {
    fn note(&mut self, point: Point, at: Instant) {
        if self.points.iter().all(|(noted, _)| *noted != point) {
            self.points.push((point, at));
        }
    }
}
