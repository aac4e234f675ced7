//! `minivmm bench`: boots the same guest again and again, with minivmm and with what other monitors there are, in turn.

mod baseline;
mod report;
mod vmm;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;

use crate::cli::GuestArgs;
use crate::config::{ConfigError, Span, VmConfig};
use crate::event_loop::Signals;
use crate::exit_status;
use crate::json_file::{JsonFile, JsonFileError};
use crate::tools::measure::{self, GuestShare, HostFacts, Progress, Run, RunError, Summary, Watch};

pub use report::{Report, VmmReport};
pub use vmm::{Other, QEMU_MICROVM};
use vmm::{Stdout, Vmm};

/// What the demo initramfs prints when its first process runs.
pub const DEMO_MARKER: &str = "minivmm-demo: userspace";

/// Exit status when minivmm has become slower than the baseline.
pub const REGRESSION: u8 = 1;

const HELP: &str = "\
The clock starts just before the fork and exec of a monitor's process. It is read at the first byte on its console, at the
marker (--until) and at the end of the process. In each round every monitor boots once, so that what disturbs the host disturbs
all alike. Memory is looked at in the first round, which is not counted: private pages (smaps) within the guest's RAM,
and all others.

Examples:
  minivmm bench --kernel bzImage --initrd build/demo.cpio --append '-- true'
      against every other monitor on the PATH; the demo initramfs runs 'true' and powers off
  minivmm bench --kernel bzImage --initrd initrd.img --until 'login:' --stop-at-marker --vs qemu
  minivmm bench ... --vs none --json now.json --baseline before.json --max-ratio 1.2

Exit status:
  0          minivmm was measured, and is not slower than the baseline allows
  1          minivmm is slower than the baseline allows
  2          the command line is wrong, or a monitor named with --vs is not there
  125        minivmm's guest did not get to its end, or the host refused something; stderr says why
  130, 143   stopped by SIGINT, by SIGTERM; no monitor is left running";

/// Arguments of `bench`.
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub struct BenchArgs {
    /// What is booted.
    #[command(flatten)]
    pub guest: GuestArgs,
    /// Rounds that are measured
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    pub runs: u32,
    /// Rounds before them that are not
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub warmup: u32,
    /// Monitors to measure against [default: all that are on the PATH]
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    pub vs: Vec<Other>,
    /// The marker: text on the console up to which a boot is measured; the default is the demo initramfs' first line
    #[arg(long, value_name = "TEXT", default_value = DEMO_MARKER)]
    pub until: String,
    /// Kill each monitor when the marker is there, for guests that do not end by themselves
    #[arg(long)]
    pub stop_at_marker: bool,
    /// Longest time of a boot; a monitor that takes longer is killed, and left out from then on
    #[arg(long, value_name = "TIME", default_value = "60s")]
    pub timeout: Span,
    /// Print JSON, or write it to a file beside the table
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "-")]
    pub json: Option<PathBuf>,
    /// Compare minivmm's medians with those in a JSON file of an earlier run
    #[arg(long, value_name = "FILE")]
    pub baseline: Option<PathBuf>,
    /// How many times the baseline's median is still well
    #[arg(
        long,
        value_name = "RATIO",
        default_value_t = 1.1,
        requires = "baseline"
    )]
    pub max_ratio: f64,
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The guest cannot be.
    #[error(transparent)]
    Guest(#[from] ConfigError),
    /// Some monitors take whole MiB only.
    #[error(
        "{0} of memory is not a whole number of MiB, which some monitors want: give --memory as in 256M"
    )]
    Memory(crate::config::MemorySize),
    /// An empty text is everywhere.
    #[error("--until wants some text that the guest prints")]
    Marker,
    /// No such program.
    #[error(
        "{name} is not on the PATH (looked for {programs}); install it, or leave it out of --vs"
    )]
    NotFound {
        /// As --vs calls it.
        name: Other,
        /// Its names.
        programs: String,
    },
    /// A file of the guest.
    #[error("cannot read {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The earlier run cannot be used.
    #[error(transparent)]
    Baseline(#[from] baseline::BaselineError),
    /// The results have no place.
    #[error(transparent)]
    Output(#[from] JsonFileError),
    /// The host refused something.
    #[error("cannot {what}")]
    Host {
        /// What was tried.
        what: String,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// minivmm itself did not do what was to be measured.
    #[error("minivmm: {0}")]
    Minivmm(String),
    /// Asked to stop.
    #[error("stopped by signal {0}")]
    Stopped(i32),
}

impl BenchError {
    /// The process's exit status.
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::Memory(_) | Self::Marker | Self::NotFound { .. } | Self::Guest(_) => {
                exit_status::USAGE
            }
            Self::Stopped(signal) => exit_status::Outcome::Signal(*signal).exit_status(),
            _ => exit_status::MONITOR_FAILED,
        }
    }
}

fn host(what: impl Into<String>) -> impl FnOnce(io::Error) -> BenchError {
    let what = what.into();
    move |source| BenchError::Host { what, source }
}

/// A monitor and what its runs were like.
struct Row {
    vmm: Vmm,
    first_output: Vec<Duration>,
    marker: Vec<Duration>,
    end: Vec<Duration>,
    memory: Option<GuestShare>,
    statuses: Vec<i32>,
    /// Why it is measured no longer.
    error: Option<String>,
}

/// Measures, and writes a table or JSON to `out`. Returns the exit status.
///
/// To be called from a process's first thread, before it has others: signals are blocked for all that follow.
pub fn run(args: &BenchArgs, out: &mut dyn Write) -> Result<u8, BenchError> {
    let guest = guest(args)?;
    let baseline = args.baseline.as_deref().map(baseline::read).transpose()?;
    let to_stdout = args.json.as_deref() == Some(Path::new("-"));
    let file = args.json.clone().filter(|_| !to_stdout);
    let file = file.map(JsonFile::open).transpose()?;
    let scratch = tempfile::tempdir().map_err(host("make a directory for temporary files"))?;
    let mut rows: Vec<Row> = find(args, &guest, scratch.path())?
        .into_iter()
        .map(Row::new)
        .collect();
    let host_facts = HostFacts::read();
    let signals = Signals::block().map_err(host("take signals"))?;
    let mut progress = Progress::default();
    let rounds = args.warmup + args.runs;
    for round in 0..rounds {
        for row in rows.iter_mut().filter(|row| row.error.is_none()) {
            progress.say(&format!("{}/{rounds} {}", round + 1, row.vmm.name));
            row.round(args, round, &guest, &signals)?;
            if let Some(error) = &row.error {
                progress.clear();
                // Without minivmm there is nothing to compare with.
                if row.vmm.name == "minivmm" {
                    return Err(BenchError::Minivmm(error.clone()));
                }
                log::warn!("{}: {error}", row.vmm.name);
            }
        }
    }
    drop(progress);

    let report = Report::new(args, &guest, host_facts, &rows);
    if to_stdout {
        report.json(out).map_err(host("write the results"))?;
    } else {
        report.table(out).map_err(host("write the results"))?;
    }
    if let Some(file) = file {
        file.write(&report)?;
    }
    match baseline {
        Some(baseline) if !baseline.holds(&report, args.max_ratio) => Ok(REGRESSION),
        _ => Ok(0),
    }
}

/// What is to be booted, by all.
fn guest(args: &BenchArgs) -> Result<VmConfig, BenchError> {
    if args.until.is_empty() {
        return Err(BenchError::Marker);
    }
    let mut guest = args.guest.clone().over(VmConfig::default());
    guest.validate()?;
    if !guest.memory.bytes.is_multiple_of(1 << 20) {
        return Err(BenchError::Memory(guest.memory));
    }
    // Each monitor has errors of its own for a file that is not there, and some are hard to read.
    let absolute = |path: &Path| {
        path.canonicalize().map_err(|source| BenchError::File {
            path: path.to_owned(),
            source,
        })
    };
    guest.kernel = absolute(&guest.kernel)?;
    guest.initrd = guest.initrd.as_deref().map(absolute).transpose()?;
    Ok(guest)
}

/// minivmm, and the others that are wanted and there.
fn find(args: &BenchArgs, guest: &VmConfig, scratch: &Path) -> Result<Vec<Vmm>, BenchError> {
    let mut vmms = vec![vmm::minivmm(guest).map_err(host("find this program's own file"))?];
    let all = args.vs.is_empty();
    let wanted = if all { &Other::ALL[..] } else { &args.vs };
    for name in wanted {
        match name
            .find(guest, scratch)
            .map_err(host("write a configuration"))?
        {
            Some(vmm) => vmms.push(vmm),
            None if all || *name == Other::None => {}
            None => {
                return Err(BenchError::NotFound {
                    name: *name,
                    programs: name.programs().join(", "),
                });
            }
        }
    }
    Ok(vmms)
}

impl Row {
    fn new(vmm: Vmm) -> Self {
        Self {
            vmm,
            first_output: Vec::new(),
            marker: Vec::new(),
            end: Vec::new(),
            memory: None,
            statuses: Vec::new(),
            error: None,
        }
    }

    /// One boot. What goes wrong with it is noted; an error is the end of all.
    fn round(
        &mut self,
        args: &BenchArgs,
        round: u32,
        guest: &VmConfig,
        signals: &Signals,
    ) -> Result<(), BenchError> {
        let mut memory = None;
        let mut look = |pid| memory = GuestShare::read(pid, guest.memory.bytes);
        let watch = Watch {
            marker: Some(&args.until),
            limit: args.timeout.0,
            stop_at_marker: args.stop_at_marker,
            look: (round == 0).then_some(&mut look),
            look_every: None,
        };
        let run = match measure::run(&self.vmm.words, watch, signals) {
            Ok(run) => run,
            Err(RunError::Stopped(signal)) => return Err(BenchError::Stopped(signal)),
            Err(error) => {
                self.error = Some(crate::error_chain(&error));
                return Ok(());
            }
        };
        self.error = trouble(&run, args);
        if round == 0 {
            self.memory = memory;
        }
        if self.error.is_none() && round >= args.warmup {
            self.marker.extend(run.marker);
            self.end.extend(run.end);
            if self.vmm.stdout == Stdout::Console {
                self.first_output.extend(run.first_output);
            }
            let status = measure::status_code(run.status);
            self.statuses
                .extend(status.filter(|status| !self.statuses.contains(status)));
        }
        Ok(())
    }

    fn summaries(&self) -> [Option<Summary>; 3] {
        [&self.first_output, &self.marker, &self.end].map(|times| Summary::new(times))
    }
}

/// What is wrong with a run, and what to do about it.
fn trouble(run: &Run, args: &BenchArgs) -> Option<String> {
    let until = &args.until;
    let said = |bytes: &[u8]| match measure::last_lines(bytes) {
        words if words.is_empty() => "nothing".to_owned(),
        words => format!("'{words}'"),
    };
    let last = || {
        format!(
            "last on the console: {}; on stderr: {}",
            said(&run.stdout),
            said(&run.stderr)
        )
    };
    match (run.marker, run.end, run.timed_out) {
        (None, _, true) => Some(format!(
            "killed after {}: '{until}' was not on the console; name with --until what your guest prints, or give it longer with \
             --timeout; {}",
            args.timeout,
            last()
        )),
        (None, _, false) => Some(format!(
            "ended{} without '{until}' on its console; name with --until what your guest prints; {}",
            run.status
                .map_or(String::new(), |status| format!(" ({status})")),
            last()
        )),
        (Some(_), None, true) => Some(format!(
            "killed after {}: the guest did not end after '{until}'; have it power off (the demo initramfs does with --append '-- \
             true'), or give --stop-at-marker",
            args.timeout
        )),
        _ => None,
    }
}
