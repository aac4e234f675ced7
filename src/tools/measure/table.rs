//! The results of a measurement, as a table or as JSON.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::stats::Summary;
use crate::host::report_file::ReportFile;
use crate::tools::error::{ToolError, cannot};

/// Reads the report that a subcommand has written earlier; `what` it is for this run.
pub(crate) fn read_report<R: DeserializeOwned>(
    what: &str,
    path: &Path,
    tool: &str,
) -> Result<R, ToolError> {
    let file = path.display();
    let text = fs::read_to_string(path).map_err(cannot(format!("read the {what} {file}")))?;
    serde_json::from_str(&text).map_err(cannot(format!(
        "use the {what} {file}, which is not what minivmm {tool} --json writes"
    )))
}

/// Where results go: a table or JSON to the output, JSON to a file.
pub(crate) struct Output {
    json_only: bool,
    file: Option<ReportFile>,
}

impl Output {
    /// `json` is what `--json` says: a file, or `-` for the output in place of the table. The file is opened, before time is
    /// spent on the measurement.
    pub(crate) fn open(json: Option<&Path>) -> Result<Self, ToolError> {
        let json_only = json == Some(Path::new("-"));
        let file = json.filter(|_| !json_only).map(PathBuf::from);
        Ok(Self {
            json_only,
            file: file.map(ReportFile::open).transpose()?,
        })
    }

    /// Writes the results.
    pub(crate) fn write<R: Serialize>(
        self,
        report: &R,
        table: fn(&R, &mut dyn Write) -> io::Result<()>,
        out: &mut dyn Write,
    ) -> Result<(), ToolError> {
        if self.json_only {
            serde_json::to_writer_pretty(&mut *out, report)
                .map_err(io::Error::from)
                .and_then(|()| writeln!(out))
        } else {
            table(report, out)
        }
        .map_err(cannot("write the results"))?;
        if let Some(file) = self.file {
            file.write_json(report)?;
        }
        Ok(())
    }
}

/// One line of a table of times: a name, the times, and their median divided by that of `versus`.
pub(crate) type TimesRow<'a> = (&'a str, &'a Summary, Option<f64>);

/// Writes a table of times, if there are any.
pub(crate) fn write_times(
    out: &mut dyn Write,
    title: &str,
    versus: &str,
    rows: &[TimesRow<'_>],
) -> io::Result<()> {
    if !rows.is_empty() {
        let versus = format!("x {versus}");
        writeln!(
            out,
            "\n{:<18} {:>9} {:>9} {:>9} {:>9} {versus:>10}   {title}",
            "", "median", "p90", "p99", "least"
        )?;
    }
    for (name, times, ratio) in rows {
        let ratio = ratio.map_or(String::new(), |ratio| format!("{ratio:.2}"));
        writeln!(
            out,
            "{name:<18} {:>9.2} {:>9.2} {:>9.2} {:>9.2} {ratio:>10}",
            times.median_ms, times.p90_ms, times.p99_ms, times.min_ms
        )?;
    }
    Ok(())
}
