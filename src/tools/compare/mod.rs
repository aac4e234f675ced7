//! `minivmm compare`: one root file system and one command, run by each container runtime and by minivmm in a virtual machine.

mod earlier;
mod html;
mod image;
mod options;
mod processes;
mod report;
mod row;
mod runtime;

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::process::{WaitOptions, getpid, set_child_subreaper};

use super::error::{ToolError, cannot};
use super::measure::{self, HostFacts, Output, Progress, Run, Summary, Watch};
use crate::console::Signals;
use crate::error_chain;
use crate::host::report_file::ReportFile;

use image::{Image, PROBE_STATUS, VmImage};
pub use options::CompareOptions;
use processes::{Seen, daemons_bytes};
use report::Report;
use row::Row;
use runtime::{Job, Runtime};

/// Interval at which the memory of a run's processes is read.
const SAMPLE_EVERY: Duration = Duration::from_millis(5);

const DROP_CACHES: &str = "/proc/sys/vm/drop_caches";

/// All that a comparison needs while it runs.
struct Comparison<'a> {
    options: &'a CompareOptions,
    image: Image,
    vm: VmImage,
    signals: Signals,
    progress: Progress,
    /// Whether the page cache is dropped for cold runs, or why not.
    cold: Result<(), String>,
}

/// Compares, and writes a table or JSON to `out`. Returns whether all runtimes worked.
///
/// To be called from a process's first thread, before it has others: signals are blocked for all that follow.
pub fn run(options: &CompareOptions, out: &mut dyn Write) -> Result<bool, ToolError> {
    if let Some(rootfs) = &options.rootfs {
        let wrong = |why| ToolError::Usage(format!("--rootfs {}: {why}", rootfs.display()));
        match fs::metadata(rootfs) {
            Ok(meta) if meta.is_dir() => {}
            Ok(_) => return Err(wrong("not a directory".to_owned())),
            Err(error) => return Err(wrong(error.to_string())),
        }
    }
    let kernel = kernel(options)?;
    let earlier = options.add.as_deref();
    let earlier = earlier.map(|path| measure::read_report("report", path, "compare"));
    let earlier = earlier.transpose()?;
    let output = Output::open(options.json.as_deref())?;
    let page = options.html.clone().map(ReportFile::open_html);
    let page = page
        .transpose()
        .map_err(|e| ToolError::Usage(format!("--html: {}", error_chain(&e))))?;
    let scratch = tempfile::Builder::new()
        .prefix("minivmm-compare-")
        .tempdir()
        .map_err(cannot("make a directory for temporary files"))?;
    let signals = Signals::block().map_err(cannot("take signals"))?;
    // Processes whose parent ends, as a container's does in podman, become children of this one and are found among its
    // descendants.
    set_child_subreaper(Some(getpid())).map_err(cannot("adopt processes"))?;
    let host = HostFacts::read();
    let progress = Progress;
    progress.show("making the images");
    let store = image::store().map_err(cannot("open the store of images"))?;
    let image = Image::new(options, &store, scratch.path()).map_err(cannot("make the images"))?;
    let packing = Instant::now();
    let vm = VmImage::new(options, kernel, &image, store).map_err(cannot("make the images"))?;
    vm.warm_up();
    let packing = packing.elapsed();
    let mut rows: Vec<Row> = Runtime::ALL
        .into_iter()
        .filter_map(|runtime| Some(Row::new(runtime, runtime.find()?, &image, &vm)))
        .collect();
    for row in rows.iter_mut().filter(|row| row.report.is_vm) {
        row.report.prepare_ms = packing.as_secs_f64() * 1e3;
    }

    let mut comparison = Comparison {
        options,
        image,
        vm,
        signals,
        progress,
        cold: match options.cold {
            true => drop_caches().map_err(|error| format!("{DROP_CACHES}: {error}")),
            false => Err("not asked for".into()),
        },
    };
    let mut report = comparison.report(host);
    if let (Some(earlier), Some(path)) = (earlier, &options.add) {
        let file = path.display();
        report
            .add(earlier, &mut rows)
            .map_err(cannot(format!("add to the report {file}")))?;
    }
    let done = comparison.measure(&mut rows);
    comparison.progress.clear();
    for row in &rows {
        row.runtime.clean_up(&comparison.image);
        row.runtime.forget(&comparison.image);
    }
    done?;

    report.rows = rows.into_iter().map(|row| row.report).collect();
    report.compare();
    if let Some(page) = page {
        page.write(&html::page(&report))?;
    }
    output.write(&report, Report::table, out)?;
    Ok(report.rows.iter().all(|row| row.error.is_none()))
}

/// The kernel that was named, or the host's own.
fn kernel(options: &CompareOptions) -> Result<PathBuf, ToolError> {
    let path = options.kernel.clone().unwrap_or_else(|| {
        let system = rustix::system::uname();
        format!("/boot/vmlinuz-{}", system.release().to_string_lossy()).into()
    });
    fs::File::open(&path)
        .and_then(|_| path.canonicalize())
        .map_err(cannot(format!(
            "read the kernel {}; name one with --kernel FILE",
            path.display()
        )))
}

/// Drops the page cache, dentries and inodes.
fn drop_caches() -> io::Result<()> {
    rustix::fs::sync();
    fs::write(DROP_CACHES, "3")
}

impl Comparison<'_> {
    /// Prepares, probes and runs all, in turn; only a request to stop ends it before its time.
    fn measure(&mut self, rows: &mut [Row]) -> Result<(), ToolError> {
        for row in rows.iter_mut().filter(|row| !row.report.is_vm) {
            self.prepare(row)?;
        }
        // They are warm after this. The virtual machine that boots is without it, and in an emulated host each guest slows down the
        // next ones: the emulator has to discard its translated code when its memory is written to.
        self.inspect(rows.iter_mut().filter(|row| !row.report.is_vm))?;
        for round in 1..=self.options.runs {
            let title = format!("{round}/{}", self.options.runs);
            for row in rows.iter_mut() {
                if round == 1 && row.report.is_vm && row.runtime != Runtime::Minivmm {
                    self.prepare(row)?;
                    self.inspect(std::iter::once(&mut *row))?;
                }
                if self.cold.is_ok() {
                    self.show(&format!("{title} cold"), row);
                    // It worked before.
                    let _ = drop_caches();
                    self.timed(row, true)?;
                }
                // After a cold run, all that it has read is in memory again.
                self.show(&format!("{title} warm"), row);
                self.timed(row, false)?;
            }
        }
        self.inspect(
            rows.iter_mut()
                .filter(|row| row.runtime == Runtime::Minivmm),
        )
    }

    /// What is done once, before a runtime's first run.
    fn prepare(&mut self, row: &mut Row) -> Result<(), ToolError> {
        self.show("preparing", row);
        let start = Instant::now();
        if row.report.error.is_none() {
            row.report.error = row
                .runtime
                .prepare(&self.image, &self.vm, self.options.timeout)
                .err();
        }
        row.report.prepare_ms += start.elapsed().as_secs_f64() * 1e3;
        if row.runtime == Runtime::Restored {
            // The rest of the file are holes.
            let snapshot = self.vm.snapshot.metadata();
            row.report.image_bytes = snapshot.map_or(0, |file| file.blocks() * 512);
        }
        match self.signals.stop_requested() {
            Some(signal) => Err(ToolError::Stopped(signal)),
            None => Ok(()),
        }
    }

    /// Runs that do not count.
    fn inspect<'r>(&mut self, rows: impl Iterator<Item = &'r mut Row>) -> Result<(), ToolError> {
        let mut rows: Vec<_> = rows.collect();
        for row in &mut rows {
            self.probe(row)?;
        }
        rows.into_iter().try_for_each(|row| self.examine(row))
    }

    fn show(&self, what: &str, row: &Row) {
        if row.report.error.is_none() {
            self.progress
                .show(&format!("{what}: {}", row.runtime.name()));
        }
    }

    /// The kernel that a command sees, and whether its status arrives.
    fn probe(&mut self, row: &mut Row) -> Result<(), ToolError> {
        self.show("probing", row);
        let Some(run) = self.run(row, Job::Probe, None)? else {
            return Ok(());
        };
        let status = run.status.and_then(|status| status.code());
        let release = String::from_utf8_lossy(&run.stdout).trim().to_owned();
        if status != Some(PROBE_STATUS) || release.is_empty() || release.contains('\n') {
            // Those of a virtual machine that did something else.
            let report = &mut row.report;
            (report.warm_first_output, report.warm_end) = (None, None);
            (report.cold_first_output, report.cold_end) = (None, None);
            let how = run
                .status
                .map_or("killed".into(), |status| status.to_string());
            row.report.error = Some(format!(
                "does not run a program to its end (status {PROBE_STATUS} expected, got: {how}); {}",
                last_output(&run)
            ));
        } else {
            row.report.kernel_seen = Some(release);
            row.report.status_handed_on = true;
        }
        Ok(())
    }

    /// A run whose processes are examined.
    fn examine(&mut self, row: &mut Row) -> Result<(), ToolError> {
        self.show("measuring memory", row);
        let mut seen = Seen::before();
        self.run(row, Job::Command, Some(&mut |_| seen.look()))?;
        row.report.daemons_kib = daemons_bytes(row.runtime.daemons()) >> 10;
        row.report.peak_kib = row.report.peak_kib.max(seen.peak_bytes >> 10);
        row.report.processes = row.report.processes.max(seen.processes);
        row.report.own_namespaces = seen.namespaces.into_iter().collect();
        Ok(())
    }

    /// A run that counts.
    fn timed(&mut self, row: &mut Row, cold: bool) -> Result<(), ToolError> {
        let Some(run) = self.run(row, Job::Command, None)? else {
            return Ok(());
        };
        let report = &mut row.report;
        measure::note_status(&mut report.statuses, &run);
        let (first_output, end) = if cold {
            (&mut report.cold_first_output, &mut report.cold_end)
        } else {
            (&mut report.warm_first_output, &mut report.warm_end)
        };
        Summary::add(first_output, run.first_output);
        Summary::add(end, run.end);
        report.output = String::from_utf8_lossy(&run.stdout).into_owned();
        Ok(())
    }

    /// One run, to its end; `None` if this runtime has failed, now or before.
    fn run(
        &mut self,
        row: &mut Row,
        job: Job,
        sample: Option<&mut dyn FnMut(u32)>,
    ) -> Result<Option<Run>, ToolError> {
        if row.report.error.is_some() {
            return Ok(None);
        }
        let words = row
            .runtime
            .command(&row.program, &self.image, &self.vm, job);
        let watch = Watch {
            limit: self.options.timeout.0,
            sample_every: sample.is_some().then_some(SAMPLE_EVERY),
            sample,
            ..Watch::default()
        };
        let result = measure::run(&words, watch, &self.signals);
        // Adopted processes that have ended.
        while let Ok(Some(_)) = rustix::process::wait(WaitOptions::NOHANG) {}
        row.report.error = match result {
            Ok(run) if !run.timed_out => return Ok(Some(run)),
            Ok(run) => {
                row.runtime.clean_up(&self.image);
                Some(format!(
                    "killed after {} (--timeout); {}",
                    self.options.timeout,
                    last_output(&run)
                ))
            }
            Err(stopped @ ToolError::Stopped(_)) => return Err(stopped),
            Err(error) => Some(error_chain(&error)),
        };
        Ok(None)
    }

    /// What is compared, without results.
    fn report(&self, host: HostFacts) -> Report {
        Report {
            format: 1,
            minivmm: env!("CARGO_PKG_VERSION").into(),
            rootfs: self.options.root(),
            rootfs_bytes: self.vm.content_bytes,
            command: self.options.command.clone(),
            kernel: self.vm.config.kernel.display().to_string(),
            vm_memory_mib: self.vm.config.memory.bytes >> 20,
            vm_cpus: self.vm.config.cpus,
            runs: self.options.runs,
            cold: match &self.cold {
                Ok(()) => format!(
                    "page cache, directories and inodes dropped before ({DROP_CACHES}), not what is on tmpfs"
                ),
                Err(error) => format!("not measured ({error})"),
            },
            host,
            reference: None,
            same_output: false,
            rows: Vec::new(),
        }
    }
}

fn last_output(run: &Run) -> String {
    let [stderr, stdout] = [&run.stderr, &run.stdout].map(|bytes| measure::last_lines(bytes));
    format!("its last output: {stderr} {stdout}")
}
