//! `fork`: VMs that go on side by side from one snapshot, in one process that has read it once.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use minivmm_devices::chardev::{ConsoleDevice, ConsoleOutput, tell_of_tx_space};
use minivmm_devices::thread::ThreadStarter;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use serde::Serialize;

use super::confine;
use super::exit_status::{VMM_FAILED, exit_status, of_signal};
use super::line_output::LineOutput;
use super::log::LogArgs;
use super::process;
use super::restore::{Restorable, SnapshotSource};
use super::run::RunError;
use super::watch::DRAIN_TIMEOUT;
use crate::config::{ConsoleTarget, Span};
use crate::console::{Console, Signals};
use crate::error_chain;
use crate::host::report_file::ReportFile;
use crate::sandbox::Role;
use crate::vmm::control::Control;
use crate::vmm::ending;
use crate::vmm::error::{VmError, host};
use crate::vmm::networks::Networks;
use crate::vmm::outcome::Outcome;
use crate::vmm::prepare::{BuildTimes, Identity, Prepared};
use crate::vmm::vcpu::thread::VcpuThread;
use crate::vmm::vm::{ConsoleEnds, Observers, Vm};

#[allow(missing_docs, reason = "--help has what stands at the subcommand")]
#[derive(Debug, Args)]
pub struct ForkArgs {
    /// What they go on from.
    #[command(flatten)]
    source: SnapshotSource,
    /// How many VMs
    #[arg(short = 'n', long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65536))]
    count: u32,
    /// How many at the same time [default: one per processor of the host]
    #[arg(short, long, value_name = "J", value_parser = clap::value_parser!(u32).range(1..=4096))]
    jobs: Option<u32>,
    /// End each with status 124 after this time, as in 500ms, 10s or 2min
    #[arg(long, value_name = "TIME")]
    deadline: Option<Span>,
    /// Write the console of each to a file of its own in this directory, named by its index, and not to stdout, in lines with the
    /// index in front
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Write each VM's exit status and times to FILE
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// How much to say on stderr.
    #[command(flatten)]
    pub log: LogArgs,
}

/// What became of one VM.
#[derive(Debug, Serialize)]
struct CloneReport {
    index: u32,
    status: u8,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    /// From the start of its making to the start of its vCPUs.
    started_us: u64,
    /// From there to its end.
    ran_us: u64,
}

/// What all VMs have in common.
struct Fork {
    source: Restorable,
    count: u32,
    next: AtomicU32,
    deadline: Option<Duration>,
    threads: ThreadStarter,
    output: Output,
    running: Mutex<Running>,
    /// An eventfd that counts the threads that have run their last VM.
    finished: OwnedFd,
}

/// Where consoles go.
enum Output {
    /// To stdout, by lines.
    Lines(Console),
    /// To a file each, in this directory.
    Files(PathBuf),
}

/// What ends a VM, and what has to know of room for output.
type Handles = (Arc<Control>, [Weak<Mutex<dyn ConsoleDevice>>; 2]);

/// The VMs that run, and what became of those that ran.
#[derive(Default)]
struct Running {
    /// What ends all of them, once it has come.
    stop: Option<Outcome>,
    clones: BTreeMap<u32, Handles>,
    reports: Vec<CloneReport>,
}

/// Runs the VMs, and gives the process's exit status.
pub fn run(args: ForkArgs, signals: &Signals) -> Result<u8, RunError> {
    let json = args.json.map(ReportFile::open).transpose();
    let json = json.map_err(|e| host("the report")(io::Error::other(e)))?;
    let source = args.source.open(ConsoleTarget::None, None)?;
    let nets = &source.config.nets;
    source.snapshot.check_fork(nets).map_err(VmError::from)?;
    process::name_file_on_bus_error(&source.snapshot.path);
    // The threads that make VMs need all that a VM is made of; those that a guest reaches are confined.
    let sandbox = confine::sandbox(&source.config, Role::Main)?;
    let threads = confine::threads(&sandbox);
    let output = match args.output {
        Some(dir) => Output::Files(dir),
        None => Output::Lines(Console::open(&ConsoleTarget::Stdio, &threads)?.0),
    };
    let jobs = match args.jobs {
        Some(jobs) => jobs,
        None => thread::available_parallelism().map_or(1, |n| n.get() as u32),
    };
    let fork = Arc::new(Fork {
        source,
        count: args.count,
        next: AtomicU32::new(0),
        deadline: args.deadline.map(|span| span.0),
        threads,
        output,
        running: Mutex::default(),
        finished: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)
            .map_err(|e| host("an eventfd")(e.into()))?,
    });
    fork.connect_output();
    let jobs = jobs.min(args.count);
    for number in 0..jobs {
        let vcpu = VcpuThread::start(&fork.threads).map_err(VmError::from)?;
        let fork = Arc::clone(&fork);
        thread::Builder::new()
            .name(format!("fork{number}"))
            .spawn(move || {
                fork.work(&vcpu);
                // It counts no further than there are threads.
                let _ = rustix::io::write(&fork.finished, &1u64.to_ne_bytes());
            })
            .map_err(host("a thread"))?;
    }
    let reports = fork.supervise(signals, jobs);
    let stop = fork.running().stop.clone();
    if let Output::Lines(console) = &fork.output {
        let limit = Instant::now() + DRAIN_TIMEOUT;
        let late = || stop.is_some() && Instant::now() > limit;
        console.finish(&|| late() || signals.stop_requested().is_some());
    }
    let failed = reports.iter().filter(|report| report.status != 0).count();
    if failed > 0 {
        log::warn!("{failed} of {} VMs did not end with status 0", args.count);
    }
    if let Some(json) = json {
        json.write_json(&reports)
            .map_err(|e| host("the report")(io::Error::other(e)))?;
    }
    Ok(match stop {
        Some(Outcome::Signal(signal)) => of_signal(signal),
        _ => u8::from(failed > 0 || reports.len() != args.count as usize),
    })
}

impl Fork {
    fn running(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells all devices when there is room for output again.
    fn connect_output(self: &Arc<Self>) {
        let Output::Lines(console) = &self.output else {
            return;
        };
        let fork = Arc::downgrade(self);
        console.on_output_ready(Arc::new(move || {
            let Some(fork) = fork.upgrade() else { return };
            let devices: Vec<_> = fork
                .running()
                .clones
                .values()
                .flat_map(|(_, devices)| devices.clone())
                .collect();
            tell_of_tx_space(&devices);
        }));
    }

    /// Waits for all threads that run VMs, and gives what became of these; a signal ends all VMs.
    fn supervise(&self, signals: &Signals, threads: u32) -> Vec<CloneReport> {
        let mut left = u64::from(threads);
        while left > 0 {
            let mut sources = [
                PollFd::new(signals, PollFlags::IN),
                PollFd::new(&self.finished, PollFlags::IN),
            ];
            // It fails for EINTR, or when memory is short: then it is tried again.
            let _ = poll(&mut sources, None);
            let mut ended = [0; 8];
            if rustix::io::read(&self.finished, &mut ended).is_ok() {
                left = left.saturating_sub(u64::from_ne_bytes(ended));
            }
            if let Some(signal) = signals.stop_requested() {
                let mut running = self.running();
                let stop = running.stop.get_or_insert(Outcome::Signal(signal)).clone();
                for (control, _) in running.clones.values() {
                    control.end(stop.clone());
                }
            }
        }
        let mut all = std::mem::take(&mut self.running().reports);
        all.sort_by_key(|report| report.index);
        all
    }

    /// Runs one VM after the other, with its boot vCPU on `vcpu`.
    fn work(&self, vcpu: &VcpuThread) {
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= self.count || self.running().stop.is_some() {
                return;
            }
            let mut times = [0; 2];
            let (status, error) = match self.clone_vm(index, vcpu, &mut times) {
                Ok(outcome) => {
                    let failure = match &outcome {
                        Outcome::VcpuFailed(failure) => Some(failure.to_string()),
                        _ => None,
                    };
                    (exit_status(&outcome), failure)
                }
                Err(e) => (VMM_FAILED, Some(error_chain(&e))),
            };
            if let Some(error) = &error {
                log::error!("VM {index}: {error}");
            }
            let [started_us, ran_us] = times;
            self.running().reports.push(CloneReport {
                index,
                status,
                error,
                started_us,
                ran_us,
            });
        }
    }

    /// From now on, a VM is told of room for output and of the end of all.
    fn insert(&self, index: u32, vm: &Vm) {
        let (control, senders) = (Arc::clone(vm.control()), vm.senders());
        let mut running = self.running();
        if let Some(stop) = running.stop.clone() {
            control.end(stop);
        }
        running.clones.insert(index, (control, senders.clone()));
        drop(running);
        // Its devices have gone on since they were restored: they may have missed a call.
        tell_of_tx_space(&senders);
    }

    fn clone_vm(
        &self,
        index: u32,
        vcpu: &VcpuThread,
        times: &mut [u64; 2],
    ) -> Result<Outcome, RunError> {
        let begin = Instant::now();
        let (console, own) = match &self.output {
            Output::Files(dir) => {
                let target = ConsoleTarget::File(dir.join(index.to_string()));
                let console = Console::open(&target, &self.threads)?.0;
                (console.clone(), Some(console))
            }
            Output::Lines(console) => (console.clone(), None),
        };
        let mut lines = Vec::new();
        let mut sink = || -> Box<dyn ConsoleOutput> {
            if own.is_some() {
                return console.sink();
            }
            let output = LineOutput::new(index, console.sink());
            lines.push(output.clone());
            Box::new(output)
        };
        let Restorable {
            config,
            snapshot,
            identity,
        } = &self.source;
        let identity = Identity {
            index,
            ..identity.clone()
        };
        let mut build = BuildTimes::default();
        let (networks, threads) = (Networks::open(config, &self.threads)?, &self.threads);
        let parts = Prepared::restore(snapshot, config, &networks, identity, threads, &mut build)?;
        let ends = ConsoleEnds {
            serial: sink(),
            virtio: sink(),
            size: None,
        };
        let mut vm = Vm::build(parts, ends, Observers::default(), &mut build)?;
        if let Some(console) = &own {
            let senders = vm.senders();
            console.on_output_ready(Arc::new(move || tell_of_tx_space(&senders)));
        }
        self.insert(index, &vm);
        times[0] = begin.elapsed().as_micros() as u64;
        let started: Result<(), RunError> = vm.start(|| Ok(()), Some(vcpu.take_job()));
        if started.is_ok() {
            vm.control().await_end(self.deadline);
        }
        vm.control().end(Outcome::Deadline);
        let end = vm.join();
        self.running().clones.remove(&index);
        times[1] = (begin.elapsed().as_micros() as u64).saturating_sub(times[0]);
        started?;
        let (outcome, _) = ending::decide(&vm, &end, false);
        drop(vm);
        let stopped = || self.running().stop.is_some();
        for output in lines {
            output.finish(&|| stopped() || outcome.is_external());
        }
        if let Some(console) = own {
            console.finish(&stopped);
        }
        // Memory that has gone may be an error of KVM_RUN or a guest without handlers.
        if let Outcome::VcpuFailed(_) = outcome {
            snapshot.check_unchanged().map_err(VmError::from)?;
        }
        Ok(outcome)
    }
}
