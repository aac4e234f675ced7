//! The results as a table and as JSON, and their comparison with an earlier run.

use std::fmt;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::tools::error::{ToolError, cannot};
use crate::tools::measure::{HostFacts, Summary, read_report, shown, write_times};

/// minivmm's own name in the report.
pub(super) const MINIVMM: &str = "minivmm";

/// A marker that the first byte on the console completes.
pub(super) const ANY_BYTE: &str = "";

/// The results, as `--json` writes them.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Report {
    /// Version of this format: 1.
    pub(super) format: u32,
    /// The version of minivmm.
    pub(super) minivmm: String,
    /// What was booted.
    pub(super) guest: Guest,
    /// The marker's text.
    pub(super) until: String,
    /// Rounds measured.
    pub(super) runs: u32,
    /// Rounds before them.
    pub(super) warmup: u32,
    /// Where.
    pub(super) host: HostFacts,
    /// Every VMM, minivmm first.
    pub(super) vmms: Vec<VmmReport>,
}

/// What every VMM booted.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Guest {
    pub(super) kernel: PathBuf,
    pub(super) kernel_bytes: u64,
    pub(super) initrd: Option<PathBuf>,
    pub(super) initrd_bytes: Option<u64>,
    pub(super) cmdline: String,
    pub(super) cpus: u8,
    pub(super) memory_mib: u64,
}

/// One VMM's results. Times count from just before fork and exec.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct VmmReport {
    /// As --vs calls it.
    pub(super) name: String,
    /// What it says of its version.
    pub(super) version: String,
    /// The command.
    pub(super) command: Vec<String>,
    /// What differs from the others.
    pub(super) differs: String,
    /// To the guest's first instruction, where it was measured: of restores, each in a run of its own.
    pub(super) first_instruction: Option<Summary>,
    /// To the first byte on the console.
    pub(super) first_output: Option<Summary>,
    /// To the marker.
    pub(super) marker: Option<Summary>,
    /// To the end of the process.
    pub(super) end: Option<Summary>,
    /// Its median to the marker, divided by minivmm's.
    pub(super) marker_ratio: Option<f64>,
    /// Its median to the end, divided by minivmm's.
    pub(super) end_ratio: Option<f64>,
    /// Private memory outside the guest's RAM when the marker appeared, in KiB.
    pub(super) own_kib: Option<u64>,
    /// Private memory within the guest's RAM, in KiB.
    pub(super) guest_kib: Option<u64>,
    /// The exit statuses that it ended with, 128 and the number for a signal.
    pub(super) statuses: Vec<i32>,
    /// Why it was not measured, or not to the end.
    pub(super) error: Option<String>,
}

/// How medians compare, where both were measured.
fn ratio(now: &Option<Summary>, before: &Option<Summary>) -> Option<f64> {
    Some(now.as_ref()?.median_ms / before.as_ref()?.median_ms)
}

impl Report {
    /// Reads the report of an earlier run.
    pub(super) fn read(path: &Path) -> Result<Self, ToolError> {
        let file = path.display();
        let report: Self = read_report("baseline", path, "bench")?;
        match report.minivmm() {
            Some(VmmReport {
                marker: Some(_), ..
            }) => Ok(report),
            _ => Err(cannot(format!("use the baseline {file}"))(
                "it has no times of minivmm",
            )),
        }
    }

    fn minivmm(&self) -> Option<&VmmReport> {
        self.vmms.iter().find(|row| row.name == MINIVMM)
    }

    /// Compares every VMM with minivmm, which is the first.
    pub(super) fn with_ratios(mut self) -> Self {
        if let Some((minivmm, others)) = self.vmms.split_first_mut() {
            for row in others {
                row.marker_ratio = ratio(&row.marker, &minivmm.marker);
                row.end_ratio = ratio(&row.end, &minivmm.end);
            }
            minivmm.marker_ratio = minivmm.marker.as_ref().map(|_| 1.0);
            minivmm.end_ratio = minivmm.end.as_ref().map(|_| 1.0);
        }
        self
    }

    /// Whether minivmm takes no longer than `max_ratio` times what it took in the report `before`; logs how it compares.
    pub(super) fn holds(&self, path: &Path, before: &Self, max_ratio: f64) -> bool {
        let path = path.display();
        if !self.host.is_like(&before.host) {
            log::warn!("the baseline {path} is of another host: {}", before.host);
        }
        if self.guest != before.guest || self.until != before.until {
            log::warn!("the baseline {path} is of another guest: {}", before.guest);
        }
        let (Some(now), Some(before)) = (self.minivmm(), before.minivmm()) else {
            return true;
        };
        let mut holds = true;
        for (what, ratio) in [
            ("marker", ratio(&now.marker, &before.marker)),
            ("process end", ratio(&now.end, &before.end)),
        ] {
            let Some(ratio) = ratio else { continue };
            let words = format!("{what}: {ratio:.2} times the baseline's median");
            if ratio > max_ratio {
                holds = false;
                log::error!("{words}, more than {max_ratio}");
            } else {
                log::info!(target: crate::NOTICE, "{words}");
            }
        }
        holds
    }

    pub(super) fn table(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "{}", self.guest)?;
        writeln!(
            out,
            "{} runs of each in turn after {} that are not counted; ms from just before fork and exec",
            self.runs, self.warmup
        )?;
        // One that any byte completes is the first byte.
        let has_marker = self.until != ANY_BYTE;
        let marker = format!("marker: \"{}\" on the console", self.until);
        type Column = fn(&VmmReport) -> (&Option<Summary>, Option<f64>);
        let blocks: [(&str, Column); 4] = [
            ("first instruction of the guest", |row| {
                (&row.first_instruction, None)
            }),
            ("first byte on the console", |row| (&row.first_output, None)),
            (&marker, |row| (&row.marker, row.marker_ratio)),
            ("end of the process", |row| (&row.end, row.end_ratio)),
        ];
        for (title, column) in blocks {
            if title == marker && !has_marker {
                continue;
            }
            let rows = self.vmms.iter().filter_map(|row| {
                let (times, ratio) = column(row);
                Some((row.name.as_str(), times.as_ref()?, ratio))
            });
            write_times(out, title, MINIVMM, &rows.collect::<Vec<_>>())?;
        }
        writeln!(
            out,
            "\n{:<18} {:>9} {:>9}   private memory at the marker, KiB",
            "", "own", "guest"
        )?;
        let kib = |kib: Option<u64>| kib.map_or("unknown".into(), |kib| kib.to_string());
        for row in self.vmms.iter().filter(|row| row.marker.is_some()) {
            let (own, guest) = (kib(row.own_kib), kib(row.guest_kib));
            writeln!(out, "{:<18} {own:>9} {guest:>9}", row.name)?;
        }
        writeln!(out)?;
        for row in &self.vmms {
            let command: Vec<_> = row.command.iter().map(Into::into).collect();
            writeln!(out, "{} ({}): {}", row.name, row.version, shown(&command))?;
            if !row.differs.is_empty() {
                writeln!(out, "    differs: {}", row.differs)?;
            }
            if row.statuses.iter().any(|status| *status != 0) {
                writeln!(out, "    ended with status {:?}", row.statuses)?;
            }
            if let Some(error) = &row.error {
                writeln!(out, "    FAILED: {error}")?;
            }
        }
        writeln!(out, "\n{}", self.host)
    }
}

impl fmt::Display for Guest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let file = |path: &Path, bytes: u64| format!("{} ({} KiB)", path.display(), bytes >> 10);
        write!(f, "{}", file(&self.kernel, self.kernel_bytes))?;
        if let (Some(initrd), Some(bytes)) = (&self.initrd, self.initrd_bytes) {
            write!(f, ", {}", file(initrd, bytes))?;
        }
        write!(
            f,
            ", \"{}\", {} CPUs, {} MiB",
            self.cmdline, self.cpus, self.memory_mib
        )
    }
}
