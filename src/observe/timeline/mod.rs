//! Where the time of a boot goes, for `--timeline`: events and their times, exits by device, what the console cost.
//!
//! The main thread records its events in [`Timeline`]. Each vCPU records its exits in an [`ExitProfile`] and the console its
//! [`Phases`]; both are collected when the VM has ended, so that recording takes no lock. A timeline that is off reads no
//! clock.
//!
//! It is the timeline of the first boot; a guest that resets the machine and boots again adds to the number of boots.

mod process_start;
mod record;
mod report;

use std::fs::File;
use std::io::BufReader;
use std::time::Instant;

use super::memory::GuestShare;
use super::phases::Phases;
use crate::vmm::networks::Networks;
use crate::vmm::prepare::BuildTimes;
use crate::vmm::vcpu::profile::ExitProfile;
use crate::vmm::vm::Vm;
use process_start::ProcessStart;
use record::MemoryBound;
pub use record::{BootMarks, Point};
pub use report::Report;

/// The kernel's account of this process's memory, made when it is read. It is to be opened before the guest runs: then nothing can.
const SMAPS: &str = "/proc/self/smaps";

/// The timeline of a process that boots a VM; the default is off.
#[derive(Debug, Default)]
pub struct Timeline(Option<Box<Record>>);

#[derive(Debug)]
struct Record {
    report: Report,
    marks: BootMarks,
    /// What the memory is to be measured with.
    memory_account: Option<File>,
}

impl Timeline {
    /// Watches from here on; `main` is when the program's own code began.
    ///
    /// To be called while the process has one thread: how long it has run is taken from that thread's account.
    pub fn start(main: Instant) -> Self {
        let start = ProcessStart::find(main);
        let mut report = Report::new(start);
        report.note([
            (Point::ProcessStart, Some(start.at)),
            (Point::Main, Some(main)),
        ]);
        Self(Some(Box::new(Record {
            report,
            marks: BootMarks::default(),
            memory_account: File::open(SMAPS).ok(),
        })))
    }

    /// Records that `point` is reached now. The first time counts.
    pub fn note(&mut self, point: Point) {
        self.note_all([(point, Some(Instant::now()))]);
    }

    /// Records the times of building the first VM.
    pub fn note_build(&mut self, times: &BuildTimes) {
        let BuildTimes {
            memory_mapped,
            kernel_loaded,
            vm_created,
            vm_ready,
        } = times;
        self.note_all([
            (Point::MemoryMapped, *memory_mapped),
            (Point::KernelLoaded, *kernel_loaded),
            (Point::VmCreated, *vm_created),
            (Point::VmReady, *vm_ready),
        ]);
    }

    fn note_all<const N: usize>(&mut self, points: [(Point, Option<Instant>); N]) {
        if let Some(watch) = &mut self.0 {
            watch.report.note(points);
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

    fn first_boot(&self) -> Option<&Record> {
        self.0.as_deref().filter(|watch| watch.report.boots == 0)
    }

    /// Collects what vCPUs and console recorded of a boot that has ended, and measures memory while the VM still exists.
    pub fn end_of_boot(&mut self, vm: &Vm, nets: &Networks, phases: Phases, console_bytes: u64) {
        let Some(watch) = &mut self.0 else { return };
        let report = &mut watch.report;
        report.boots += 1;
        if report.boots > 1 {
            return;
        }
        report.note([(Point::VcpusStopped, Some(Instant::now()))]);
        for (number, link) in (0..).zip(nets.status()) {
            for (point, at) in [
                (Point::LinkUp, &link.first_up),
                (Point::FirstPacketSent, &link.first_sent),
                (Point::FirstPacketReceived, &link.first_received),
            ] {
                if let Some(at) = at.get() {
                    report.add(point, *at, Some(number));
                }
            }
        }
        let account = watch.memory_account.take();
        let ram = vm.config().memory.bytes;
        match account.map(|smaps| GuestShare::from_smaps(BufReader::new(smaps), ram)) {
            Some(Ok(memory)) => report.memory = memory,
            Some(Err(e)) => log::info!("cannot measure the memory of minivmm: {e}"),
            None => log::info!("cannot measure the memory of minivmm without {SMAPS}"),
        }
        report.memory_bounds = MemoryBound::of(vm);
        report.note([(Point::MemoryMeasured, Some(Instant::now()))]);
        let mut exits = ExitProfile::default();
        let profiles = vm.vcpus().iter().filter_map(|vcpu| vcpu.profile.as_ref());
        profiles.for_each(|profile| exits.add(profile));
        report.set_exits(&exits, |place| vm.machine().name_of(place), console_bytes);
        report.set_kernel(vm.kernel());
        report.note([
            (Point::FirstRun, exits.first_run),
            (Point::FirstConsoleByte, phases.first_byte),
            (Point::InitRun, phases.init_run),
            (Point::FirstUserOutput, phases.user_output),
            (Point::LoginPrompt, phases.login_prompt),
            (Point::LastExit, exits.last_exit),
        ]);
    }

    /// The report, unless the timeline is off. The process ends now with this exit status.
    pub fn finish(self, status: u8) -> Option<Report> {
        let Record {
            mut report, marks, ..
        } = *self.0?;
        let (marks, lost) = marks.taken();
        for (value, at) in marks {
            report.add(Point::BootMark, at, Some(value));
        }
        (report.status, report.boot_marks_lost) = (status, lost);
        report.note([(Point::ProcessEnd, Some(Instant::now()))]);
        report.events.sort_by_key(|event| event.at_ns);
        Some(report)
    }
}
