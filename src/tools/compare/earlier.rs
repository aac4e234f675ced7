//! An earlier report of the same comparison, to which this one adds.

use super::report::{Report, RowReport};
use super::row::Row;

impl Report {
    /// Takes over the runs of an earlier report of the same.
    pub(super) fn add(&mut self, earlier: Self, rows: &mut [Row]) -> Result<(), String> {
        let vm = |report: &Self| (report.vm_memory_mib, report.vm_cpus);
        let root = |report: &Self| (report.rootfs.clone(), report.rootfs_bytes);
        for (what, same) in [
            ("format", self.format == earlier.format),
            ("version of minivmm", self.minivmm == earlier.minivmm),
            ("root", root(self) == root(&earlier)),
            ("command", self.command == earlier.command),
            ("kernel", self.kernel == earlier.kernel),
            ("size of virtual machine", vm(self) == vm(&earlier)),
            ("kind of cold runs", self.cold == earlier.cold),
            ("host", self.host.is_like(&earlier.host)),
        ] {
            if !same {
                return Err(format!("it is of another {what}"));
            }
        }
        let names = |row: &RowReport| (row.name.clone(), row.version.clone());
        let now = rows.iter().map(|row| names(&row.report));
        if !now.eq(earlier.rows.iter().map(names)) {
            return Err("it is of other runtimes, or other versions of them".into());
        }
        self.runs = self.runs.saturating_add(earlier.runs);
        for (row, earlier) in rows.iter_mut().zip(earlier.rows) {
            // What failed stays left out.
            row.report = RowReport {
                warm_first_output: earlier.warm_first_output,
                warm_end: earlier.warm_end,
                cold_first_output: earlier.cold_first_output,
                cold_end: earlier.cold_end,
                statuses: earlier.statuses,
                peak_kib: earlier.peak_kib,
                processes: earlier.processes,
                error: earlier.error,
                ..std::mem::take(&mut row.report)
            };
        }
        Ok(())
    }
}
