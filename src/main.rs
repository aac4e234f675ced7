//! The command line of minivmm: parse, start the log, run, print the error chain, return the exit status.

use std::error::Error;
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::process::exit;
use std::sync::Arc;
use std::time::Instant;

use clap::Parser;
use minivmm::cli::{Cli, Command, DoctorArgs, LogArgs, VmArgs};
use minivmm::config::ConfigError;
use minivmm::exit_status::Outcome;
use minivmm::json_file::JsonFile;
use minivmm::timeline::{Point, Timeline};
use minivmm::tools::error::ToolError;
use minivmm::tools::{bench, compare, doctor};
use minivmm::watch::Watch;
use minivmm::{console, error_chain, exit_status, vm};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

fn main() {
    let started = Instant::now();
    let cli = Cli::parse();
    start_log(&cli.log);
    end_in_good_order_on_panic();
    let status = match cli.command {
        Some(Command::Doctor(args)) => run_doctor(&args),
        Some(Command::Bench(args)) => tool_status(bench::run(&args.into(), &mut io::stdout())),
        Some(Command::Compare(args)) => tool_status(compare::run(&args.into(), &mut io::stdout())),
        None => run_vm(cli.vm, started, cli.timeline),
    };
    console::restore_terminal();
    exit(status.into())
}

/// Runs the VM. Where a timeline is asked for, it is given however the VM ends, but not if the command line was wrong.
fn run_vm(args: VmArgs, started: Instant, wanted: Option<Option<PathBuf>>) -> u8 {
    let mut timeline = match wanted {
        Some(_) => Timeline::start(started),
        None => Timeline::default(),
    };
    // Before any file is opened: each of them may be where nobody answers.
    let deadline = args.deadline.and_then(|span| span.after(started));
    let watch = match vm::watch(deadline) {
        Ok(watch) => watch,
        Err(e) => return failure(&e),
    };
    let signals = Arc::clone(watch.signals());
    let config = match args.into_config() {
        Ok(config) => config,
        Err(e) => return usage_error(&e),
    };
    timeline.note(Point::ConfigRead);
    let file = match wanted.flatten().map(JsonFile::open).transpose() {
        Ok(file) => file,
        Err(e) => return failure(&e),
    };
    let status = match vm::run(&config, started, watch, &mut timeline) {
        Ok(outcome) => outcome.exit_status(),
        Err(vm::VmError::Config(e)) => return usage_error(&e),
        Err(e @ vm::VmError::TooManyDevices(_)) => {
            failure(&e);
            return exit_status::USAGE;
        }
        Err(e) => failure(&e),
    };
    match (timeline.finish(status), file) {
        (Some(report), Some(file)) => {
            let _watch = Watch::start(signals, None, None);
            if let Err(e) = file.write(&report) {
                failure(&e);
            }
        }
        (Some(report), None) => PatientStderr.print(&report.to_string()),
        (None, _) => {}
    }
    status
}

/// What the command line says can be wrong; what a file says is one of the things that minivmm cannot go on with.
fn usage_error(error: &ConfigError) -> u8 {
    let status = failure(error);
    match error {
        ConfigError::Read { .. } | ConfigError::TooLarge { .. } | ConfigError::Parse { .. } => {
            status
        }
        ConfigError::NoKernel
        | ConfigError::Cpus(_)
        | ConfigError::Disk { .. }
        | ConfigError::Memory(..) => exit_status::USAGE,
    }
}

/// Prints an error and its causes, once, on one line.
fn failure(error: &dyn Error) -> u8 {
    console::restore_terminal();
    log::error!("{}", error_chain(error));
    exit_status::MONITOR_FAILED
}

/// A tool's exit status: 1 where it says no.
fn tool_status(result: Result<bool, ToolError>) -> u8 {
    match result {
        Ok(good) => u8::from(!good),
        Err(e) => {
            let status = failure(&e);
            match e {
                ToolError::Usage(_) => exit_status::USAGE,
                ToolError::Stopped(signal) => Outcome::Signal(signal).exit_status(),
                ToolError::Failed { .. } | ToolError::Output(_) => status,
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

/// minivmm's words go to stderr; where that is a raw terminal, a line needs the carriage return.
fn start_log(args: &LogArgs) {
    let on_terminal = std::io::stderr().is_terminal();
    let level = match (args.quiet, args.verbose) {
        (true, _) => log::LevelFilter::Off,
        (_, 0) => log::LevelFilter::Warn,
        (_, 1) => log::LevelFilter::Info,
        _ => log::LevelFilter::Debug,
    };
    let mut builder = env_logger::Builder::new();
    builder.filter_level(level);
    if !args.quiet {
        builder.filter_module(vm::NOTICE, level.max(log::LevelFilter::Info));
    }
    builder
        .target(env_logger::Target::Pipe(Box::new(PatientStderr)))
        .format(move |out, record| {
            let level = match record.level() {
                log::Level::Error => "error: ",
                log::Level::Warn => "warning: ",
                _ => "",
            };
            let end = if on_terminal && console::is_raw() {
                "\r\n"
            } else {
                "\n"
            };
            let message = record.args().to_string().replace('\n', end);
            write!(out, "minivmm: {level}{message}{end}")
        })
        .init();
}

/// stderr for a thread that must not wait for ever: a guest can make its vCPU's thread log, and a reader that has stopped
/// would hold that thread, and with it the VM's end. A message that nobody takes for so long is lost.
struct PatientStderr;

impl PatientStderr {
    const PATIENCE: Timespec = Timespec {
        tv_sec: 0,
        tv_nsec: 200_000_000,
    };
    /// What a pipe that is ready for writing takes without a wait.
    const PIPE_BUF: usize = 4096;

    fn print(&mut self, text: &str) {
        for piece in text.as_bytes().chunks(Self::PIPE_BUF) {
            // Nobody to tell.
            let _ = self.write_all(piece);
        }
    }
}

impl Write for PatientStderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let stderr = rustix::stdio::stderr();
        match poll(
            &mut [PollFd::new(&stderr, PollFlags::OUT)],
            Some(&Self::PATIENCE),
        ) {
            Ok(0) => Ok(bytes.len()),
            _ => io::stderr().write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A panic is a bug in minivmm: the terminal is put right, and the status is not that of a guest that panicked (an abort
/// would be 134).
fn end_in_good_order_on_panic() {
    std::panic::set_hook(Box::new(|info| {
        console::restore_terminal();
        // Not eprintln, which panics when nobody reads.
        let _ = writeln!(io::stderr(), "minivmm: this is a bug in minivmm: {info}");
        exit(exit_status::MONITOR_FAILED.into())
    }));
}
