//! The results as a table and as JSON.

use std::io::{self, Write};

use serde::{Deserialize, Serialize};

use crate::tools::measure::{HostFacts, Summary, TimesRow, write_times};

/// The results, as `--json` writes them.
#[derive(Debug, Serialize, Deserialize)]
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
    /// Every runtime that is installed, the virtual machines last.
    pub(super) rows: Vec<RowReport>,
}

/// One runtime's results. Times count from just before fork and exec of its command.
#[derive(Debug, Default, Serialize, Deserialize)]
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
    /// What else the command shares with the host.
    pub(super) shares: String,
    /// Why it was not measured, or not to the end.
    pub(super) error: Option<String>,
}

impl Report {
    /// Compares medians with those of the first container runtime that worked, and what all printed.
    pub(super) fn compare(&mut self) {
        let median = |row: &RowReport| Some(row.warm_end.as_ref()?.median_ms);
        let mut containers = self.rows.iter().filter(|row| !row.is_vm);
        if let Some((name, base)) =
            containers.find_map(|row| Some((row.name.clone(), median(row)?)))
        {
            for row in &mut self.rows {
                row.end_ratio = median(row).map(|ms| ms / base);
            }
            self.reference = Some(name);
        }
        let worked = || self.rows.iter().filter(|row| row.error.is_none());
        self.same_output =
            worked().all(|row| Some(&row.output) == worked().next().map(|row| &row.output));
    }

    pub(super) fn table(&self, out: &mut dyn Write) -> io::Result<()> {
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
        for (title, rows) in self.times() {
            write_times(out, title, reference, &rows)?;
        }
        writeln!(
            out,
            "\n{:<18} {:>9} {:>9} {:>9} {:>10} {:>10} {:>9}  {:<24} status",
            "", "image", "kernel", "programs", "memory", "daemons", "prepare", "kernel seen"
        )?;
        for row in self.rows.iter().filter(|row| row.error.is_none()) {
            writeln!(
                out,
                "{:<18} {:>9} {:>9} {:>9} {:>10} {:>10} {:>6.0} ms  {:<24} {:?}",
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

    /// Every kind of times that was measured: its title, and a row for each runtime.
    pub(super) fn times(&self) -> impl Iterator<Item = (&'static str, Vec<TimesRow<'_>>)> {
        type Column = fn(&RowReport) -> (&Option<Summary>, Option<f64>);
        let kinds: [(&str, Column); 4] = [
            ("end of the process, warm", |row| {
                (&row.warm_end, row.end_ratio)
            }),
            ("first output, warm", |row| (&row.warm_first_output, None)),
            ("end of the process, cold", |row| (&row.cold_end, None)),
            ("first output, cold", |row| (&row.cold_first_output, None)),
        ];
        kinds.into_iter().map(|(title, column)| {
            let rows = self.rows.iter().filter_map(|row| {
                let (times, ratio) = column(row);
                Some((row.name.as_str(), times.as_ref()?, ratio))
            });
            (title, rows.collect())
        })
    }
}

impl RowReport {
    /// What the command shares with the host, and what not.
    fn sharing(&self) -> String {
        let namespaces = match &self.own_namespaces[..] {
            [] => String::new(),
            names => format!("; own namespaces: {}", names.join(", ")),
        };
        format!("shares {}{namespaces}", self.shares)
    }
}

/// A size in MiB, if there is any.
fn mib(bytes: u64) -> String {
    match bytes {
        0 => "-".into(),
        _ => crate::mib(bytes),
    }
}
