//! `minivmm compare`: one root file system and one command, run by each container runtime and by minivmm in a virtual machine.

mod cpio;
mod html;
mod image;
mod processes;
mod report;
mod runtime;

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use rustix::process::{WaitOptions, getpid, set_child_subreaper};

use crate::config::{MAX_CPUS, MemorySize, Span};
use crate::event_loop::Signals;
use crate::exit_status::{MONITOR_FAILED, Outcome, USAGE};
use crate::json_file::{JsonFile, JsonFileError};
use crate::tools::measure::{self, HostFacts, Progress, Run, RunError, Watch};
use image::{Image, PROBE_STATUS, VmImage};
use processes::{Seen, daemons_bytes};
use report::Report;
use runtime::{Job, Runtime};

/// Between two looks at the memory of a run's processes.
const LOOK_EVERY: Duration = Duration::from_millis(5);

const DROP_CACHES: &str = "/proc/sys/vm/drop_caches";

const HELP: &str = "\
Measured are crun, runc, podman and docker, as far as they are on the PATH (docker by its running daemon), and minivmm. They get a
copy of DIR, so that DIR stays as it is; minivmm gets it packed as an initramfs. None has a network or any input. One that fails is
reported with its error, and the others go on.

Examples:
  minivmm compare --rootfs alpine --kernel bzImage -- /bin/ls -l /
  minivmm compare --rootfs alpine --kernel bzImage --cold --html report.html --json report.json -- /bin/true

Exit status:
  0          all that is there was measured
  1          one of them failed; its row says how
  2          the command line is wrong
  125        nothing could be measured; stderr says why
  130, 143   stopped by SIGINT, by SIGTERM";

/// Arguments of `compare`.
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub struct CompareArgs {
    /// Directory with the root file system
    #[arg(long, value_name = "DIR")]
    pub rootfs: PathBuf,
    /// Kernel of the virtual machine [default: the one that this host runs, /boot/vmlinuz-RELEASE]
    #[arg(short, long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Add to the kernel command line
    #[arg(long, value_name = "STRING", allow_hyphen_values = true)]
    pub append: Vec<String>,
    /// vCPUs
    #[arg(short, long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=MAX_CPUS.into()))]
    pub cpus: u8,
    /// Memory of the virtual machine [default: 256M, or more for a large root]
    #[arg(short, long, value_name = "SIZE")]
    pub memory: Option<MemorySize>,
    /// Measured runs of each
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    pub runs: u32,
    /// Measure cold runs as well: before each, the host's page cache is dropped, which only root may do and all that runs on the
    /// host feels
    #[arg(long)]
    pub cold: bool,
    /// Longest time of a run; a runtime that takes longer is killed, and left out from then on
    #[arg(long, value_name = "TIME", default_value = "60s")]
    pub timeout: Span,
    /// Print JSON, or write it to a file beside the table
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "-")]
    pub json: Option<PathBuf>,
    /// Write a report with plots
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// What to run, and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

/// Why nothing was compared.
#[derive(Debug, thiserror::Error)]
pub enum CompareError {
    /// No directory.
    #[error("--rootfs {}: {why}", path.display())]
    Rootfs {
        /// From the command line.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// No kernel.
    #[error("cannot read the kernel {}; name one with --kernel FILE", path.display())]
    Kernel {
        /// From the command line, or the host's.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The root cannot be made ready.
    #[error("cannot make the images: {0}")]
    Image(String),
    /// The results have no place.
    #[error(transparent)]
    Output(#[from] JsonFileError),
    /// The host refused something.
    #[error("cannot {what}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// Asked to stop.
    #[error("stopped by signal {0}")]
    Stopped(i32),
}

impl CompareError {
    /// The process's exit status.
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::Rootfs { .. } => USAGE,
            Self::Stopped(signal) => Outcome::Signal(*signal).exit_status(),
            _ => MONITOR_FAILED,
        }
    }
}

fn host<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> CompareError {
    move |source| CompareError::Host {
        what,
        source: source.into(),
    }
}

/// Times of one kind of run.
#[derive(Default)]
struct Times {
    first_output: Vec<Duration>,
    end: Vec<Duration>,
}

/// A runtime and what its runs were like.
struct Row {
    runtime: Runtime,
    program: PathBuf,
    prepare: Duration,
    /// The kernel's release as the probe saw it.
    kernel: Option<String>,
    seen: Seen,
    daemons_bytes: u64,
    cold: Times,
    warm: Times,
    statuses: Vec<i32>,
    /// The command's output in the last run.
    stdout: Vec<u8>,
    /// Why it is measured no longer.
    error: Option<String>,
}

/// All that a comparison needs while it runs.
struct Comparison<'a> {
    args: &'a CompareArgs,
    image: Image,
    vm: VmImage,
    signals: Signals,
    progress: Progress,
    /// Whether the page cache is dropped for cold runs, or why not.
    cold: Result<(), String>,
}

/// Compares, and writes a table or JSON to `out`. Returns the exit status.
///
/// To be called from a process's first thread, before it has others: signals are blocked for all that follow.
pub fn run(args: &CompareArgs, out: &mut dyn Write) -> Result<u8, CompareError> {
    let wrong = |why: String| CompareError::Rootfs {
        path: args.rootfs.clone(),
        why,
    };
    match fs::metadata(&args.rootfs) {
        Ok(meta) if meta.is_dir() => {}
        Ok(_) => return Err(wrong("not a directory".into())),
        Err(error) => return Err(wrong(error.to_string())),
    }
    let kernel = kernel(args)?;
    let json = args.json.clone().filter(|path| path != Path::new("-"));
    let json = json.map(JsonFile::open).transpose()?;
    let scratch = tempfile::Builder::new()
        .prefix("minivmm-compare-")
        .tempdir()
        .map_err(host("make a directory for temporary files"))?;
    let signals = Signals::block().map_err(host("take signals"))?;
    // Whose parent ends, as a container's does in podman, comes to this process and is found among its descendants.
    set_child_subreaper(Some(getpid())).map_err(host("adopt processes"))?;
    let host_facts = HostFacts::read();
    let mut progress = Progress::default();
    progress.say("making the images");
    let image = Image::new(args, scratch.path()).map_err(CompareError::Image)?;
    let packing = Instant::now();
    let vm = VmImage::new(args, kernel, &image)
        .map_err(|e| CompareError::Image(crate::error_chain(&e)))?;
    let mut rows: Vec<Row> = Runtime::CONTAINERS
        .into_iter()
        .chain([Runtime::Minivmm])
        .filter_map(|runtime| Some(Row::new(runtime, runtime.find()?)))
        .collect();
    for row in rows
        .iter_mut()
        .filter(|row| row.runtime == Runtime::Minivmm)
    {
        row.prepare = packing.elapsed();
    }

    let mut comparison = Comparison {
        args,
        image,
        vm,
        signals,
        progress,
        cold: match args.cold {
            true => drop_caches().map_err(|error| format!("{DROP_CACHES}: {error}")),
            false => Err("not asked for".into()),
        },
    };
    let done = comparison.measure(&mut rows);
    comparison.progress.clear();
    for row in &rows {
        row.runtime.clean_up(&comparison.image);
        row.runtime.forget(&comparison.image);
    }
    done?;

    let report = Report::new(&comparison, host_facts, &rows);
    report.write(args, out).map_err(host("write the results"))?;
    if let Some(json) = json {
        json.write(&report)?;
    }
    Ok(u8::from(rows.iter().any(|row| row.error.is_some())))
}

/// The kernel that was named, or the host's own.
fn kernel(args: &CompareArgs) -> Result<PathBuf, CompareError> {
    let path = args.kernel.clone().unwrap_or_else(|| {
        let release = rustix::system::uname()
            .release()
            .to_string_lossy()
            .into_owned();
        format!("/boot/vmlinuz-{release}").into()
    });
    match fs::File::open(&path).and_then(|_| path.canonicalize()) {
        Ok(path) => Ok(path),
        Err(source) => Err(CompareError::Kernel { path, source }),
    }
}

/// Has the kernel forget files, directories and inodes that it could read again.
fn drop_caches() -> io::Result<()> {
    rustix::fs::sync();
    fs::write(DROP_CACHES, "3")
}

impl Comparison<'_> {
    /// Prepares, probes and runs all, in turn; only a request to stop ends it before its time.
    fn measure(&mut self, rows: &mut [Row]) -> Result<(), CompareError> {
        for row in rows.iter_mut() {
            self.say("preparing", row);
            let start = Instant::now();
            row.note(row.runtime.prepare(&self.image));
            row.prepare += start.elapsed();
            if let Some(signal) = self.signals.stop_requested() {
                return Err(CompareError::Stopped(signal));
            }
        }
        for row in rows.iter_mut() {
            self.probe(row)?;
        }
        for row in rows.iter_mut() {
            self.look(row)?;
        }
        for round in 1..=self.args.runs {
            let title = format!("{round}/{}", self.args.runs);
            for row in rows.iter_mut() {
                if self.cold.is_ok() {
                    self.say(&format!("{title} cold"), row);
                    // It worked before.
                    let _ = drop_caches();
                    self.timed(row, |row| &mut row.cold)?;
                }
                // Behind a cold run, all that it has read is in memory again.
                self.say(&format!("{title} warm"), row);
                self.timed(row, |row| &mut row.warm)?;
            }
        }
        Ok(())
    }

    fn say(&mut self, what: &str, row: &Row) {
        if row.error.is_none() {
            self.progress
                .say(&format!("{what}: {}", row.runtime.name()));
        }
    }

    /// The kernel that a command sees, and whether its status arrives.
    fn probe(&mut self, row: &mut Row) -> Result<(), CompareError> {
        self.say("probing", row);
        let Some(run) = self.run(row, Job::Probe, None)? else {
            return Ok(());
        };
        let status = run.status.and_then(|status| status.code());
        let release = String::from_utf8_lossy(&run.stdout).trim().to_owned();
        if status != Some(PROBE_STATUS) || release.is_empty() || release.contains('\n') {
            let how = run
                .status
                .map_or("killed".into(), |status| status.to_string());
            row.note(Err(format!(
                "does not run a program to its end (status {PROBE_STATUS} expected, got: {how}); its last words: {} {}",
                measure::last_lines(&run.stderr),
                measure::last_lines(&run.stdout),
            )));
        } else {
            row.kernel = Some(release);
        }
        Ok(())
    }

    /// A run whose processes are looked at.
    fn look(&mut self, row: &mut Row) -> Result<(), CompareError> {
        self.say("looking at the memory", row);
        let mut seen = Seen::before();
        self.run(row, Job::Command, Some(&mut |_| seen.look()))?;
        row.daemons_bytes = daemons_bytes(row.runtime.daemons());
        row.seen = seen;
        Ok(())
    }

    /// A run that counts.
    fn timed(
        &mut self,
        row: &mut Row,
        times: fn(&mut Row) -> &mut Times,
    ) -> Result<(), CompareError> {
        let Some(run) = self.run(row, Job::Command, None)? else {
            return Ok(());
        };
        let times = times(row);
        times.first_output.extend(run.first_output);
        times.end.extend(run.end);
        let status = measure::status_code(run.status);
        row.statuses
            .extend(status.filter(|status| !row.statuses.contains(status)));
        row.stdout = run.stdout;
        Ok(())
    }

    /// One run, to its end; `None` if there is none of this runtime any more.
    fn run(
        &mut self,
        row: &mut Row,
        job: Job,
        look: Option<&mut dyn FnMut(u32)>,
    ) -> Result<Option<Run>, CompareError> {
        if row.error.is_some() {
            return Ok(None);
        }
        let words = row
            .runtime
            .command(&row.program, &self.image, &self.vm, job);
        let look_every = look.is_some().then_some(LOOK_EVERY);
        let watch = Watch {
            limit: self.args.timeout.0,
            look,
            look_every,
            ..Watch::default()
        };
        let result = measure::run(&words, watch, &self.signals);
        // What came to this process and has ended.
        while let Ok(Some(_)) = rustix::process::wait(WaitOptions::NOHANG) {}
        match result {
            Ok(run) if run.timed_out => {
                row.runtime.clean_up(&self.image);
                row.note(Err(format!(
                    "killed after {}: its last words: {} {}; give it longer with --timeout",
                    self.args.timeout,
                    measure::last_lines(&run.stderr),
                    measure::last_lines(&run.stdout),
                )));
                Ok(None)
            }
            Ok(run) => Ok(Some(run)),
            Err(RunError::Stopped(signal)) => Err(CompareError::Stopped(signal)),
            Err(error) => {
                row.note(Err(crate::error_chain(&error)));
                Ok(None)
            }
        }
    }
}

impl Row {
    fn new(runtime: Runtime, program: PathBuf) -> Self {
        Self {
            runtime,
            program,
            prepare: Duration::ZERO,
            kernel: None,
            seen: Seen::default(),
            daemons_bytes: 0,
            cold: Times::default(),
            warm: Times::default(),
            statuses: Vec::new(),
            stdout: Vec::new(),
            error: None,
        }
    }

    /// Keeps an error.
    fn note(&mut self, result: Result<(), String>) {
        if let Err(error) = result {
            self.error = Some(error);
        }
    }
}
