//! `minivmm bench`: boots the same guest again and again, in minivmm and in the other VMMs that are installed, in turn.

mod options;
mod report;
mod vmm;

use std::io::Write;
use std::path::{Path, PathBuf};

use super::error::{ToolError, cannot};
use super::measure::{self, HostFacts, Output, Progress, Run, Summary, Watch};
use crate::config::VmConfig;
use crate::console::Signals;
use crate::error_chain;
use crate::observe::memory::GuestShare;
use crate::vmm::snapshot::load::Snapshot;

pub use options::{BenchOptions, DEMO_MARKER};
use report::{ANY_BYTE, Guest, MINIVMM, Report, VmmReport};
pub use vmm::QEMU_MICROVM;
use vmm::Vmm;
use vmm::{OTHER_VMMS, OtherVmm};

/// A VMM, and what was found.
struct Row {
    vmm: Vmm,
    report: VmmReport,
}

/// Measures boots of `guest`, and writes a table or JSON to `out`. Returns whether minivmm is as fast as the baseline demands.
///
/// To be called from a process's first thread, before it has others: signals are blocked for all that follow.
pub fn run(
    guest: VmConfig,
    options: &BenchOptions,
    out: &mut dyn Write,
) -> Result<bool, ToolError> {
    let guest = check(guest, options)?;
    let baseline = options.baseline.as_deref();
    let baseline = baseline
        .map(|path| Report::read(path).map(|report| (path, report)))
        .transpose()?;
    let output = Output::open(options.json.as_deref())?;
    let scratch = tempfile::tempdir().map_err(cannot("make a directory for temporary files"))?;
    let vmms = find(options, &guest, scratch.path())?;
    let mut rows: Vec<Row> = vmms.into_iter().map(Row::new).collect();
    let host = HostFacts::read();
    let signals = Signals::block().map_err(cannot("take signals"))?;
    let progress = Progress;
    let rounds = options.warmup + options.runs;
    for round in 0..rounds {
        for row in rows.iter_mut().filter(|row| row.report.error.is_none()) {
            let name = row.vmm.name;
            progress.show(&format!("{}/{rounds} {name}", round + 1));
            row.round(options, round, &guest, &signals)?;
            if let Some(error) = &row.report.error {
                progress.clear();
                // Without minivmm there is nothing to compare with.
                if name == MINIVMM {
                    return Err(cannot("measure minivmm")(error.as_str()));
                }
                log::warn!("{name}: {error}");
            }
        }
    }
    drop(progress);

    let size = |path: &PathBuf| path.metadata().map_or(0, |file| file.len());
    let report = Report {
        format: 1,
        minivmm: env!("CARGO_PKG_VERSION").into(),
        guest: Guest {
            kernel_bytes: size(&guest.kernel),
            initrd_bytes: guest.initrd.as_ref().map(size),
            cmdline: guest.kernel_cmdline(),
            cpus: guest.cpus,
            memory_mib: guest.memory.bytes >> 20,
            kernel: guest.kernel,
            initrd: guest.initrd,
        },
        until: options.marker().to_owned(),
        runs: options.runs,
        warmup: options.warmup,
        host,
        vmms: rows.into_iter().map(|row| row.report).collect(),
    }
    .with_ratios();
    output.write(&report, Report::table, out)?;
    Ok(baseline.is_none_or(|(path, before)| report.holds(path, &before, options.max_ratio)))
}

/// What is booted by all of them.
fn check(mut guest: VmConfig, options: &BenchOptions) -> Result<VmConfig, ToolError> {
    let usage = |what: &str| Err(ToolError::Usage(what.into()));
    if let Some(path) = &options.restore {
        let snapshot = Snapshot::open(path).map_err(cannot("measure restores"))?;
        return Ok(snapshot.meta.config.clone());
    }
    if options.marker().is_empty() {
        return usage("--until needs some text that the guest prints");
    }
    guest
        .validate()
        .map_err(|e| ToolError::Usage(error_chain(&e)))?;
    if !guest.memory.bytes.is_multiple_of(1 << 20) {
        return usage(&format!(
            "{} of memory is not a whole number of MiB, which some VMMs need: give --memory as in 256M",
            guest.memory
        ));
    }
    // Each VMM has errors of its own for a missing file, and some are hard to read.
    let absolute = |path: &Path| {
        path.canonicalize()
            .map_err(cannot(format!("read {}", path.display())))
    };
    guest.kernel = absolute(&guest.kernel)?;
    guest.initrd = guest.initrd.as_deref().map(absolute).transpose()?;
    Ok(guest)
}

/// minivmm, and the others that are wanted and installed.
fn find(options: &BenchOptions, guest: &VmConfig, scratch: &Path) -> Result<Vec<Vmm>, ToolError> {
    let own_file = cannot("find this program's own file");
    if let Some(path) = &options.restore {
        return Ok(vec![vmm::restore(path, scratch).map_err(own_file)?]);
    }
    let mut vmms = vec![vmm::minivmm(guest).map_err(own_file)?];
    let vs = &options.vs;
    let wanted = |vmm: &&OtherVmm| vs.is_empty() || vs.iter().any(|name| name == vmm.name);
    for other in OTHER_VMMS.iter().filter(wanted) {
        match other
            .find(guest, scratch)
            .map_err(cannot("write a configuration"))?
        {
            Some(vmm) => vmms.push(vmm),
            None if vs.is_empty() => {}
            None => {
                return Err(ToolError::Usage(format!(
                    "{} is not on the PATH (looked for {}); install it, or leave it out of --vs",
                    other.name,
                    other.programs.join(", ")
                )));
            }
        }
    }
    Ok(vmms)
}

impl Row {
    fn new(vmm: Vmm) -> Self {
        let text = |word: &std::ffi::OsString| word.to_string_lossy().into_owned();
        Self {
            report: VmmReport {
                name: vmm.name.into(),
                version: vmm.version(),
                command: vmm.words.iter().map(text).collect(),
                differs: vmm.differs.into(),
                ..VmmReport::default()
            },
            vmm,
        }
    }

    /// One boot. What goes wrong with it is noted; an error ends the whole measurement.
    fn round(
        &mut self,
        options: &BenchOptions,
        round: u32,
        guest: &VmConfig,
        signals: &Signals,
    ) -> Result<(), ToolError> {
        let report = &mut self.report;
        let mut memory = None;
        let mut sample = |pid| memory = GuestShare::read(pid, guest.memory.bytes);
        let watch = Watch {
            marker: Some(options.marker()),
            limit: options.timeout.0,
            stop_at_marker: options.stop_at_marker,
            sample: (round == 0).then_some(&mut sample),
            sample_every: None,
        };
        let run = match measure::run(&self.vmm.words, watch, signals) {
            Ok(run) => run,
            Err(stopped @ ToolError::Stopped(_)) => return Err(stopped),
            Err(error) => {
                report.error = Some(error_chain(&error));
                return Ok(());
            }
        };
        report.error = trouble(&run, options);
        if round == 0 {
            report.own_kib = memory.map(|memory| memory.own_bytes >> 10);
            report.guest_kib = memory.map(|memory| memory.guest_bytes >> 10);
        }
        if report.error.is_none() && round >= options.warmup {
            measure::note_status(&mut report.statuses, &run);
            let first_output = run.first_output.filter(|_| !self.vmm.is_talkative());
            // A timeline is written when the guest has ended.
            let first_instruction = match options.stop_at_marker {
                true => None,
                false => self.vmm.first_instruction(options.timeout.0, signals)?,
            };
            Summary::add(&mut report.first_instruction, first_instruction);
            Summary::add(&mut report.first_output, first_output);
            Summary::add(&mut report.marker, run.marker);
            Summary::add(&mut report.end, run.end);
        }
        Ok(())
    }
}

/// What is wrong with a run, and what to do about it.
fn trouble(run: &Run, options: &BenchOptions) -> Option<String> {
    let timeout = options.timeout;
    let said = |bytes: &[u8]| match measure::last_lines(bytes) {
        words if words.is_empty() => "nothing".to_owned(),
        words => format!("'{words}'"),
    };
    let last = || {
        let (console, stderr) = (said(&run.stdout), said(&run.stderr));
        format!(
            "name with --until what your guest prints; last on the console: {console}; on stderr: {stderr}"
        )
    };
    let marker = match options.marker() {
        ANY_BYTE => "anything".to_owned(),
        until => format!("'{until}'"),
    };
    match (run.marker, run.end, run.timed_out) {
        (None, _, timed_out) => {
            let how = match (timed_out, run.status) {
                (true, _) => format!("killed after {timeout} (--timeout)"),
                (false, Some(status)) => format!("ended ({status})"),
                (false, None) => "ended".to_owned(),
            };
            let last = last();
            Some(format!("{how} without {marker} on its console; {last}"))
        }
        (Some(_), None, true) => Some(format!(
            "killed after {timeout}: the guest did not end after {marker}; have it power off (the demo initramfs does with \
             --append '-- true'), or give --stop-at-marker"
        )),
        _ => None,
    }
}
