//! The command line of minivmm: parse, start the log, run, print the error chain, return the exit status.

use std::env;
use std::error::Error;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::exit;
use std::sync::Arc;
use std::time::Instant;

use minivmm::cli::exit_status::{USAGE, VMM_FAILED, exit_status, of_signal};
use minivmm::cli::log::{TimedStderr, start_log};
use minivmm::cli::plan::Plan;
use minivmm::cli::run::RunError;
use minivmm::cli::watch::Watch;
use minivmm::cli::{
    Cli, Command, DoctorArgs, disks, exec, fork, images, process, run, running, snapshot,
};
use minivmm::config::{ConfigError, Span};
use minivmm::host::report_file::ReportFile;
use minivmm::observe::timeline::{Point, Timeline};
use minivmm::tools::error::ToolError;
use minivmm::tools::{bench, compare, doctor};
use minivmm::vmm::error::{VmError, host};
use minivmm::{Escaping, console, error_chain, guest};
use rustix::process::getpid;

#[cfg(target_env = "musl")]
#[global_allocator]
static ALLOCATOR: minivmm::host::heap::Heap = minivmm::host::heap::Heap;

fn main() {
    let started = Instant::now();
    if getpid().is_init() && env::args_os().next().is_some_and(|n| n == guest::INIT) {
        guest::main();
    }
    process::install_fault_handlers();
    #[allow(unsafe_code, reason = "it closes descriptors that nothing here owns")]
    // SAFETY: nothing has been opened yet.
    unsafe {
        process::close_inherited_files(env::args_os());
    }
    #[cfg(target_env = "gnu")]
    process::share_one_heap();
    let cli = Cli::of_process().unwrap_or_else(|e| wrong_command_line(&e));
    start_log(cli.log_level());
    let mut out = Escaping(io::stdout());
    let status = match cli.command {
        Some(Command::Doctor(args)) => run_doctor(&args),
        Some(Command::Bench(args)) => {
            tool_status(bench::run(args.guest(), &args.options, &mut out))
        }
        Some(Command::Compare(args)) => tool_status(compare::run(&args, &mut out)),
        Some(Command::Snapshot(args)) => done(snapshot::run(&args, &mut out)),
        Some(Command::Fork(args)) => {
            let forked = console::Signals::block()
                .map_err(|e| host("signal handling")(e).into())
                .and_then(|signals| fork::run(args, &signals));
            forked.unwrap_or_else(|e: RunError| failure(&e))
        }
        Some(Command::Run(mut args)) => {
            let (deadline, timeline) = (args.deadline, args.timeline.take());
            run_vm(|| args.into_plan(), deadline, started, timeline)
        }
        Some(Command::Exec(args)) => exec::run(args).unwrap_or_else(|e| failure(&e)),
        Some(Command::Ps) => done(running::list(&mut out)),
        Some(Command::Stop(args)) => done(running::stop(&args, &mut out)),
        #[cfg(feature = "registry")]
        Some(Command::Pull(args)) => done(args.run(&mut out)),
        Some(Command::Images) => done(images::list(&mut out)),
        Some(Command::Rmi(args)) => done(images::remove(&args)),
        Some(Command::Disks(args)) => done(disks::run(&args, &mut Escaping(io::stdout()))),
        Some(Command::Restore(mut args)) => {
            let (deadline, timeline) = (args.deadline, args.timeline.take());
            run_vm(|| args.into_plan(), deadline, started, timeline)
        }
        None => {
            let (args, snapshot_at) = (cli.vm, cli.snapshot_at);
            let deadline = args.deadline;
            let plan = || {
                let mut config = args.into_config().map_err(VmError::from)?;
                // The guest is to learn of each restore.
                config.generation_id |= snapshot_at.is_some();
                Ok(Plan {
                    config,
                    snapshot: None,
                    snapshot_at,
                    ..Plan::default()
                })
            };
            run_vm(plan, deadline, started, cli.timeline)
        }
    };
    console::restore_terminal();
    exit(status.into())
}

/// The status of what was done or failed.
fn done(result: Result<(), impl Error>) -> u8 {
    result.map_or_else(|e| failure(&e), |()| 0)
}

/// Prints help, or what is wrong with the command line, which may have come from anywhere.
fn wrong_command_line(error: &clap::Error) -> ! {
    if !error.use_stderr() {
        error.exit();
    }
    // Nobody to tell.
    let _ = write!(Escaping(TimedStderr), "{error}");
    exit(error.exit_code())
}

/// Runs the VM. Where a timeline is asked for, it is given however the VM ends, but not if the command line was wrong
/// or the preparation hung.
fn run_vm(
    plan: impl FnOnce() -> Result<Plan, RunError>,
    deadline: Option<Span>,
    started: Instant,
    wanted: Option<Option<PathBuf>>,
) -> u8 {
    let mut timeline = match wanted {
        Some(_) => Timeline::start(started),
        None => Timeline::default(),
    };
    // Before any file is opened: each of them may be where nobody answers.
    let deadline = deadline.and_then(|span| span.after(started));
    let watch = match run::watch(deadline) {
        Ok(watch) => watch,
        Err(e) => return failure(&e),
    };
    let signals = Arc::clone(watch.signals());
    let plan = match plan() {
        Ok(plan) => plan,
        Err(e) => return vm_failure(&e),
    };
    timeline.note(Point::ConfigRead);
    let file = match wanted.flatten().map(ReportFile::open).transpose() {
        Ok(file) => file,
        Err(e) => return failure(&e),
    };
    let status = match run::run(&plan, started, watch, &mut timeline) {
        Ok(outcome) => exit_status(&outcome),
        Err(e) => match vm_failure(&e) {
            USAGE => return USAGE,
            status => status,
        },
    };
    match (timeline.finish(status), file) {
        (Some(report), Some(file)) => {
            let _watch = Watch::start(signals, None, None);
            if let Err(e) = file.write_json(&report) {
                failure(&e);
            }
        }
        (Some(report), None) => TimedStderr.print(&report.to_string()),
        (None, _) => {}
    }
    status
}

/// What the command line says can be wrong; what a file says is one of the things that minivmm cannot go on with.
fn vm_failure(error: &RunError) -> u8 {
    console::restore_terminal();
    if let RunError::Vm(VmError::Config(error)) = error {
        log::error!("{}{}", error_chain(error), run::config_hint(error));
    } else {
        failure(error);
    }
    match error {
        RunError::Vm(VmError::Config(ConfigError::File(..))) => VMM_FAILED,
        RunError::Vm(VmError::Config(_) | VmError::TooManyDevices(_)) | RunError::Usage(_) => USAGE,
        _ => VMM_FAILED,
    }
}

/// Prints an error and its causes, once, on one line.
fn failure(error: &dyn Error) -> u8 {
    console::restore_terminal();
    log::error!("{}", error_chain(error));
    VMM_FAILED
}

/// A tool's exit status: 1 where it says no.
fn tool_status(result: Result<bool, ToolError>) -> u8 {
    match result {
        Ok(good) => u8::from(!good),
        Err(e) => {
            let status = failure(&e);
            match e {
                ToolError::Usage(_) => USAGE,
                ToolError::Stopped(signal) => of_signal(signal),
                ToolError::Failed(..) | ToolError::Output(_) => status,
            }
        }
    }
}

fn run_doctor(args: &DoctorArgs) -> u8 {
    let mut out = io::stdout().lock();
    let kernel = args.kernel.as_deref();
    match doctor::run(kernel, args.initrd.as_deref(), args.json, &mut out) {
        Ok(true) => 0,
        Ok(false) => 1,
        // A reader that has seen enough, as in `minivmm doctor | head`.
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => 1,
        Err(e) => failure(&e),
    }
}
