//! What came out: a table for people, JSON for programs.

use std::fmt;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{BenchArgs, Row};
use crate::config::VmConfig;
use crate::tools::measure::{HostFacts, Summary, shown};

/// The results, as `--json` writes them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Version of this format: 1.
    pub format: u32,
    /// The version of minivmm.
    pub minivmm: String,
    /// What was booted.
    pub guest: Guest,
    /// The marker's text.
    pub until: String,
    /// Rounds measured.
    pub runs: u32,
    /// Rounds before them.
    pub warmup: u32,
    /// Where.
    pub host: HostFacts,
    /// Every monitor, minivmm first.
    pub vmms: Vec<VmmReport>,
}

/// What every monitor booted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Guest {
    /// The kernel's file.
    pub kernel: PathBuf,
    /// Its size in bytes.
    pub kernel_bytes: u64,
    /// The initrd's file.
    pub initrd: Option<PathBuf>,
    /// Its size in bytes.
    pub initrd_bytes: Option<u64>,
    /// The kernel command line.
    pub cmdline: String,
    /// vCPUs.
    pub cpus: u8,
    /// RAM in MiB.
    pub memory_mib: u64,
}

/// One monitor's results. Times count from just before fork and exec.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VmmReport {
    /// As --vs calls it.
    pub name: String,
    /// What it says of its version.
    pub version: String,
    /// The command.
    pub command: Vec<String>,
    /// What differs from the others.
    pub differs: String,
    /// To the first byte on the console.
    pub first_output: Option<Summary>,
    /// To the marker.
    pub marker: Option<Summary>,
    /// To the end of the process.
    pub end: Option<Summary>,
    /// Its median to the marker, divided by minivmm's.
    pub marker_ratio: Option<f64>,
    /// Its median to the end, divided by minivmm's.
    pub end_ratio: Option<f64>,
    /// Private memory outside the guest's RAM when the marker was there, in KiB.
    pub own_kib: Option<u64>,
    /// Private memory within the guest's RAM, in KiB.
    pub guest_kib: Option<u64>,
    /// The exit statuses that it ended with, 128 and the number for a signal.
    pub statuses: Vec<i32>,
    /// Why it was not measured, or not to the end.
    pub error: Option<String>,
}

impl Report {
    pub(super) fn new(args: &BenchArgs, guest: &VmConfig, host: HostFacts, rows: &[Row]) -> Self {
        let size = |path: &PathBuf| path.metadata().map_or(0, |file| file.len());
        let mut report = Self {
            format: 1,
            minivmm: env!("CARGO_PKG_VERSION").into(),
            guest: Guest {
                kernel: guest.kernel.clone(),
                kernel_bytes: size(&guest.kernel),
                initrd: guest.initrd.clone(),
                initrd_bytes: guest.initrd.as_ref().map(size),
                cmdline: guest.kernel_cmdline(),
                cpus: guest.cpus,
                memory_mib: guest.memory.bytes >> 20,
            },
            until: args.until.clone(),
            runs: args.runs,
            warmup: args.warmup,
            host,
            vmms: rows.iter().map(VmmReport::new).collect(),
        };
        let median = |summary: &Option<Summary>| summary.as_ref().map(|summary| summary.median_ms);
        let own = report
            .minivmm()
            .map(|row| (median(&row.marker), median(&row.end)));
        for row in &mut report.vmms {
            let (marker, end) = own.unwrap_or_default();
            row.marker_ratio = median(&row.marker).zip(marker).map(|(a, b)| a / b);
            row.end_ratio = median(&row.end).zip(end).map(|(a, b)| a / b);
        }
        report
    }

    /// minivmm's row.
    pub fn minivmm(&self) -> Option<&VmmReport> {
        self.vmms.iter().find(|row| row.name == "minivmm")
    }

    /// As JSON.
    pub(super) fn json(&self, out: &mut dyn Write) -> io::Result<()> {
        serde_json::to_writer_pretty(&mut *out, self)?;
        writeln!(out)
    }

    /// As a table.
    pub(super) fn table(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "{}", self.guest)?;
        writeln!(
            out,
            "{} runs of each in turn after {} that are not counted; ms from just before fork and exec",
            self.runs, self.warmup
        )?;
        let marker = format!("marker: \"{}\" on the console", self.until);
        type Column = fn(&VmmReport) -> (&Option<Summary>, Option<f64>);
        let blocks: [(&str, Column); 3] = [
            ("first byte on the console", |row| (&row.first_output, None)),
            (&marker, |row| (&row.marker, row.marker_ratio)),
            ("end of the process", |row| (&row.end, row.end_ratio)),
        ];
        for (title, column) in blocks {
            let rows = self.vmms.iter().map(|row| (row, column(row)));
            let rows: Vec<_> = rows
                .filter_map(|(row, (times, ratio))| Some((row, times.as_ref()?, ratio)))
                .collect();
            if rows.is_empty() {
                continue;
            }
            writeln!(
                out,
                "\n{:<18} {:>9} {:>9} {:>9} {:>9} {:>10}   {title}",
                "", "median", "p90", "p99", "least", "x minivmm"
            )?;
            for (row, times, ratio) in rows {
                let ratio = ratio.map_or(String::new(), |ratio| format!("{ratio:.2}"));
                writeln!(
                    out,
                    "{:<18} {:>9.2} {:>9.2} {:>9.2} {:>9.2} {ratio:>10}",
                    row.name, times.median_ms, times.p90_ms, times.p99_ms, times.min_ms
                )?;
            }
        }
        writeln!(
            out,
            "\n{:<18} {:>9} {:>9}   private memory at the marker, KiB",
            "", "own", "guest"
        )?;
        let kib = |kib: Option<u64>| kib.map_or("unknown".into(), |kib| kib.to_string());
        for row in self.vmms.iter().filter(|row| row.marker.is_some()) {
            writeln!(
                out,
                "{:<18} {:>9} {:>9}",
                row.name,
                kib(row.own_kib),
                kib(row.guest_kib)
            )?;
        }
        writeln!(out)?;
        for row in &self.vmms {
            writeln!(out, "{} ({}): {}", row.name, row.version, row.shown())?;
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

impl VmmReport {
    fn new(row: &Row) -> Self {
        let [first_output, marker, end] = row.summaries();
        let text = |word: &std::ffi::OsString| word.to_string_lossy().into_owned();
        Self {
            name: row.vmm.name.into(),
            version: row.vmm.version(),
            command: row.vmm.words.iter().map(text).collect(),
            differs: row.vmm.differs.into(),
            first_output,
            marker,
            end,
            marker_ratio: None,
            end_ratio: None,
            own_kib: row.memory.map(|memory| memory.own_bytes >> 10),
            guest_kib: row.memory.map(|memory| memory.guest_bytes >> 10),
            statuses: row.statuses.clone(),
            error: row.error.clone(),
        }
    }

    /// The command as one would type it.
    fn shown(&self) -> String {
        let words: Vec<_> = self.command.iter().map(Into::into).collect();
        shown(&words)
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
