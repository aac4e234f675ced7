//! What came out: a table for people, JSON for programs.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use serde::Serialize;

use super::runtime::{Job, Runtime};
use super::{CompareArgs, Comparison, DROP_CACHES, Row, Times, html};
use crate::tools::measure::{HostFacts, Summary, shown};

/// The results, as `--json` writes them.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// Version of this format: 1.
    pub(super) format: u32,
    /// The version of minivmm.
    pub(super) minivmm: String,
    /// The root file system.
    pub(super) rootfs: String,
    /// Bytes of its files.
    pub(super) rootfs_bytes: u64,
    /// The command.
    pub(super) command: Vec<String>,
    /// The virtual machine's kernel file.
    pub(super) kernel: String,
    /// Memory of the virtual machine in MiB.
    pub(super) vm_memory_mib: u64,
    /// vCPUs of the virtual machine.
    pub(super) vm_cpus: u8,
    /// Measured runs of each, cold and warm.
    pub(super) runs: u32,
    /// What was done to have a cold run, or why there is none.
    pub(super) cold: String,
    /// Where.
    pub(super) host: HostFacts,
    /// The runtime whose warm medians are the measure of the others: the first container runtime that worked.
    pub(super) reference: Option<String>,
    /// Whether the command printed the same everywhere.
    pub(super) same_output: bool,
    /// Every runtime that is there, minivmm last.
    pub(super) rows: Vec<RowReport>,
}

/// One runtime's results. Times count from just before fork and exec of its command.
#[derive(Debug, Serialize)]
pub(super) struct RowReport {
    /// The runtime.
    pub(super) name: String,
    /// Whether it is a virtual machine.
    pub(super) is_vm: bool,
    /// What it says of its version.
    pub(super) version: String,
    /// The command line.
    pub(super) command: String,
    /// Once, before all runs: import of an image, a configuration, an initramfs.
    pub(super) prepare_ms: f64,
    /// Bytes that are shipped for this command: its root file system as an image.
    pub(super) image_bytes: u64,
    /// Bytes of the kernel that is shipped with it.
    pub(super) kernel_bytes: u64,
    /// Bytes of the programs that a host must have, shared libraries aside.
    pub(super) programs_bytes: u64,
    /// Those programs.
    pub(super) programs: Vec<String>,
    /// First byte of the command's output, right after a run.
    pub(super) warm_first_output: Option<Summary>,
    /// End of the process, right after a run.
    pub(super) warm_end: Option<Summary>,
    /// First byte of the command's output, files not in memory.
    pub(super) cold_first_output: Option<Summary>,
    /// End of the process, files not in memory.
    pub(super) cold_end: Option<Summary>,
    /// Its warm median to the end divided by the reference's.
    pub(super) end_ratio: Option<f64>,
    /// Most private memory of all processes of a run together, in KiB, as far as looks every 5 ms saw it.
    pub(super) peak_kib: u64,
    /// Most processes at once.
    pub(super) processes: usize,
    /// Private memory of its daemons, in KiB.
    pub(super) daemons_kib: u64,
    /// The kernel's release as a program sees it.
    pub(super) kernel_seen: Option<String>,
    /// Whether a program's exit status arrived.
    pub(super) status_handed_on: bool,
    /// Statuses that the command ended with.
    pub(super) statuses: Vec<i32>,
    /// The command's output in the last run, or the last 64 KiB of it.
    pub(super) output: String,
    /// Namespaces that the runtime's processes have of their own.
    pub(super) own_namespaces: Vec<String>,
    /// What else of the host the command meets.
    pub(super) shares: String,
    /// Why it was not measured, or not to the end.
    pub(super) error: Option<String>,
}

/// How it was measured, for every form of the report.
pub(super) const METHOD: &[&str] = &[
    "Every time counts from just before the fork and exec of the runtime's command on this host. First output is the first byte of \
     the command's output that arrives here; the end is the end of that process.",
    "In each round every runtime ran the command once, one runtime after another; where cold runs were asked for, once cold and right after it once warm.",
    "All had the same root: crun, runc and podman a copy of the directory, docker an image imported from that copy, minivmm that \
     copy packed as an initramfs. crun and runc had their own default configuration (spec), podman and docker their defaults, none \
     a network, none any input.",
    "Memory is the private memory (smaps_rollup) of all processes of a run together, the most that was seen in a run of its own, \
     in looks every 5 ms. minivmm's contains what its guest touched.",
    "Kernel and status come from a run of a small program that prints uname's release and ends with status 42.",
];

/// What it does not show.
pub(super) const LIMITS: &[&str] = &[
    "A look every 5 ms does not see what lives shorter. The host's kernel memory (page tables, namespaces, KVM) is not counted, nor \
     are files that several processes map, nor the page cache: it holds a container's files, while a virtual machine's are in its \
     own memory.",
    "Percentiles are measured times (nearest rank): with few runs, p90 and p99 are the slowest run.",
    "In the virtual machine, stdout and stderr are one serial line. It has the root in memory, so nothing is written to a disk; \
     file capabilities and other extended attributes are not there.",
    "Root in a container lacks most capabilities (it may not read a file of another owner that says so); root in the virtual machine \
     has all, of its own kernel.",
    "What is shared says how a runtime is set up, not how strong the boundary is.",
];

impl Report {
    pub(super) fn new(comparison: &Comparison<'_>, host: HostFacts, rows: &[Row]) -> Self {
        let args = comparison.args;
        let mut report = Self {
            format: 1,
            minivmm: env!("CARGO_PKG_VERSION").into(),
            rootfs: args.rootfs.display().to_string(),
            rootfs_bytes: comparison.vm.content_bytes,
            command: args.command.clone(),
            kernel: comparison.vm.kernel.display().to_string(),
            vm_memory_mib: comparison.vm.memory.bytes >> 20,
            vm_cpus: comparison.vm.cpus,
            runs: args.runs,
            cold: cold(comparison),
            host,
            reference: None,
            same_output: same_output(rows),
            rows: rows
                .iter()
                .map(|row| RowReport::new(row, comparison))
                .collect(),
        };
        let median = |row: &RowReport| row.warm_end.as_ref().map(|times| times.median_ms);
        let reference = report
            .rows
            .iter()
            .find(|row| !row.is_vm && median(row).is_some());
        if let Some((name, base)) = reference.and_then(|row| Some((row.name.clone(), median(row)?)))
        {
            for row in &mut report.rows {
                row.end_ratio = median(row).map(|ms| ms / base);
            }
            report.reference = Some(name);
        }
        report
    }

    /// The table to `out`, or JSON where `--json` has no file; and the page that is wanted.
    pub(super) fn write(&self, args: &CompareArgs, out: &mut dyn Write) -> io::Result<()> {
        if let Some(path) = &args.html {
            fs::write(path, html::page(self))?;
        }
        if args.json.as_deref() == Some(Path::new("-")) {
            serde_json::to_writer_pretty(&mut *out, self)?;
            return writeln!(out);
        }
        self.table(out)
    }

    fn table(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(
            out,
            "{} on {} ({}); the virtual machine has {}, {} MiB, {} CPUs",
            self.command.join(" "),
            self.rootfs,
            mib(self.rootfs_bytes),
            self.kernel,
            self.vm_memory_mib,
            self.vm_cpus
        )?;
        writeln!(
            out,
            "{} runs of each in turn; ms from just before fork and exec; cold: {}",
            self.runs, self.cold
        )?;
        let reference = self.reference.as_deref().unwrap_or("none");
        for i in 0..RowReport::TIMES {
            let mut title = "";
            let mut rows = Vec::new();
            for row in &self.rows {
                let (name, times, ratio) = row.times(i);
                title = name;
                rows.extend(times.map(|times| (row, times, ratio)));
            }
            if rows.is_empty() {
                continue;
            }
            let ratio_title = format!("x {reference}");
            writeln!(
                out,
                "\n{:<10} {:>9} {:>9} {:>9} {:>9} {ratio_title:>10}   {title}",
                "", "median", "p90", "p99", "least"
            )?;
            for (row, times, ratio) in rows {
                let ratio = ratio.map_or(String::new(), |ratio| format!("{ratio:.2}"));
                writeln!(
                    out,
                    "{:<10} {:>9.2} {:>9.2} {:>9.2} {:>9.2} {ratio:>10}",
                    row.name, times.median_ms, times.p90_ms, times.p99_ms, times.min_ms
                )?;
            }
        }
        writeln!(
            out,
            "\n{:<10} {:>9} {:>9} {:>9} {:>10} {:>10} {:>9}  {:<24} status",
            "", "image", "kernel", "programs", "memory", "daemons", "prepare", "kernel seen"
        )?;
        for row in self.rows.iter().filter(|row| row.error.is_none()) {
            writeln!(
                out,
                "{:<10} {:>9} {:>9} {:>9} {:>10} {:>10} {:>6.0} ms  {:<24} {:?}",
                row.name,
                mib(row.image_bytes),
                mib(row.kernel_bytes),
                mib(row.programs_bytes),
                mib(row.peak_kib << 10),
                mib(row.daemons_kib << 10),
                row.prepare_ms,
                row.kernel_seen.as_deref().unwrap_or_default(),
                row.statuses
            )?;
        }
        writeln!(out)?;
        for row in &self.rows {
            writeln!(out, "{} ({}): {}", row.name, row.version, row.command)?;
            match &row.error {
                Some(error) => writeln!(out, "    FAILED: {error}")?,
                None => writeln!(out, "    {}", row.sharing())?,
            }
        }
        if !self.same_output {
            writeln!(out, "\nThe command's output is not the same everywhere.")?;
        }
        writeln!(out, "\n{}", self.host)
    }
}

impl RowReport {
    fn new(row: &Row, comparison: &Comparison<'_>) -> Self {
        let Comparison { image, vm, .. } = comparison;
        let runtime = row.runtime;
        let is_vm = runtime == Runtime::Minivmm;
        let (programs, programs_bytes) = runtime.shipped();
        let kernel = vm.kernel.metadata().map_or(0, |file| file.len());
        let warm = summaries(&row.warm);
        let cold = summaries(&row.cold);
        Self {
            name: runtime.name().into(),
            is_vm,
            version: runtime.version(&row.program),
            command: shown(&runtime.command(&row.program, image, vm, Job::Command)),
            prepare_ms: row.prepare.as_secs_f64() * 1e3,
            image_bytes: if is_vm {
                vm.initramfs_bytes
            } else {
                vm.content_bytes
            },
            kernel_bytes: if is_vm { kernel } else { 0 },
            programs_bytes,
            programs,
            warm_first_output: warm.0,
            warm_end: warm.1,
            cold_first_output: cold.0,
            cold_end: cold.1,
            end_ratio: None,
            peak_kib: row.seen.peak_bytes >> 10,
            processes: row.seen.processes,
            daemons_kib: row.daemons_bytes >> 10,
            status_handed_on: row.kernel.is_some(),
            kernel_seen: row.kernel.clone(),
            statuses: row.statuses.clone(),
            output: String::from_utf8_lossy(&row.stdout).into_owned(),
            own_namespaces: row.seen.namespaces.iter().cloned().collect(),
            shares: runtime.shares().into(),
            error: row.error.clone(),
        }
    }

    /// How many kinds of times there are.
    pub(super) const TIMES: usize = 4;

    /// One kind of times: its title, the times, and their median divided by the reference's.
    pub(super) fn times(&self, kind: usize) -> (&'static str, Option<&Summary>, Option<f64>) {
        match kind {
            0 => (
                "end of the process, warm",
                self.warm_end.as_ref(),
                self.end_ratio,
            ),
            1 => ("first output, warm", self.warm_first_output.as_ref(), None),
            2 => ("end of the process, cold", self.cold_end.as_ref(), None),
            _ => ("first output, cold", self.cold_first_output.as_ref(), None),
        }
    }

    /// What the command shares with the host, and what not.
    pub(super) fn sharing(&self) -> String {
        let namespaces = match &self.own_namespaces[..] {
            [] => String::new(),
            names => format!("; own namespaces: {}", names.join(", ")),
        };
        format!("shares {}{namespaces}", self.shares)
    }
}

fn summaries(times: &Times) -> (Option<Summary>, Option<Summary>) {
    (Summary::new(&times.first_output), Summary::new(&times.end))
}

/// What was done for a cold run, and what it cannot do.
fn cold(comparison: &Comparison<'_>) -> String {
    let done = match &comparison.cold {
        Err(error) => return format!("not measured ({error})"),
        Ok(()) => format!("page cache, directories and inodes dropped before ({DROP_CACHES})"),
    };
    let in_memory = |path: &Path| {
        // linux/magic.h, TMPFS_MAGIC
        rustix::fs::statfs(path).is_ok_and(|fs| fs.f_type == 0x0102_1994)
    };
    let files = [
        (comparison.image.root.as_path(), "root and initramfs"),
        (&comparison.vm.kernel, "kernel"),
    ];
    let stay: Vec<&str> = files
        .into_iter()
        .filter_map(|(path, name)| in_memory(path).then_some(name))
        .collect();
    if stay.is_empty() {
        done
    } else {
        format!(
            "{done}; but {} are on tmpfs, and stay in memory",
            stay.join(" and ")
        )
    }
}

fn same_output(rows: &[Row]) -> bool {
    let mut outputs = rows
        .iter()
        .filter(|row| row.error.is_none())
        .map(|row| &row.stdout);
    let first = outputs.next();
    outputs.all(|output| Some(output) == first)
}

/// A size in MiB, as people read it.
pub(super) fn mib(bytes: u64) -> String {
    match bytes {
        0 => "-".into(),
        _ => format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20)),
    }
}
