//! `minivmm doctor`: what this host and these files can and cannot do, with hints.

mod check;
mod config;
mod host;
mod initrd;
mod kernel;
mod limits;
mod network;
mod sandbox;
mod scan;

use std::io::{self, IsTerminal, Write};
use std::path::Path;

use serde::Serialize;

use crate::escaped;

pub use check::{Check, Verdict};
pub use config::{KernelConfig, Setting};
pub use host::check_host;
pub use initrd::check_initrd;
pub use kernel::{KernelReport, inspect_kernel};

/// All that the doctor found, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Report {
    /// Whether Linux can boot: no check failed.
    can_boot: bool,
    host: Vec<Check>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kernel: Option<KernelReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    initrd: Option<Vec<Check>>,
}

/// Checks the host, and the kernel and initrd if they are given; prints a table or one JSON object to `out`. Returns
/// whether Linux can boot.
pub fn run(
    kernel: Option<&Path>,
    initrd: Option<&Path>,
    json: bool,
    out: &mut dyn Write,
) -> io::Result<bool> {
    let kernel = kernel.map(inspect_kernel);
    let config = kernel.as_ref().and_then(|report| report.config.as_ref());
    let initrd = initrd.map(|path| check_initrd(path, config));
    let mut report = Report {
        can_boot: true,
        host: check_host(),
        kernel,
        initrd,
    };
    report.can_boot = sections(&report)
        .iter()
        .flat_map(|(_, checks)| checks.iter())
        .all(|check| check.verdict != Verdict::Fail);

    if json {
        serde_json::to_writer_pretty(&mut *out, &report)?;
        writeln!(out)?;
    } else {
        let colour = io::stdout().is_terminal()
            && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        write_table(out, &report, colour)?;
    }
    Ok(report.can_boot)
}

/// The report's parts that have anything in them.
fn sections(report: &Report) -> Vec<(&'static str, &[Check])> {
    let kernel = report.kernel.as_ref().map(|kernel| &kernel.checks);
    [
        ("host", Some(&report.host)),
        ("kernel", kernel),
        ("initrd", report.initrd.as_ref()),
    ]
    .into_iter()
    .filter_map(|(title, checks)| Some((title, checks?.as_slice())))
    .collect()
}

fn write_table(out: &mut dyn Write, report: &Report, colour: bool) -> io::Result<()> {
    let sections = sections(report);
    let checks = || sections.iter().flat_map(|(_, checks)| checks.iter());
    let width = checks()
        .map(|check| check.subject.chars().count())
        .max()
        .unwrap_or(0);
    for (title, checks) in &sections {
        writeln!(out, "{title}")?;
        for check in *checks {
            let (word, start) = check.verdict.shown();
            let (start, end) = if colour { (start, "\x1b[0m") } else { ("", "") };
            let (subject, found) = (escaped(&check.subject), escaped(&check.found));
            writeln!(out, "  {start}{word:<4}{end}  {subject:<width$}  {found}")?;
            if let Some(hint) = &check.hint {
                writeln!(out, "        {:<width$}  -> {}", "", escaped(hint))?;
            }
        }
    }
    let failed = checks()
        .filter(|check| check.verdict == Verdict::Fail)
        .count();
    match failed {
        0 => writeln!(out, "Linux can boot here."),
        1 => writeln!(out, "Linux cannot boot here: 1 check failed."),
        _ => writeln!(out, "Linux cannot boot here: {failed} checks failed."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_aligned_and_has_hints() {
        let report = Report {
            can_boot: false,
            host: vec![
                Check::ok("KVM", "works"),
                Check::fail("/dev/kvm", "absent").hint("modprobe kvm_amd"),
            ],
            kernel: None,
            initrd: Some(vec![Check::info("size", "5 MiB")]),
        };
        let mut out = Vec::new();
        write_table(&mut out, &report, false).unwrap();
        let expected = "host\n  ok    KVM       works\n  FAIL  /dev/kvm  absent\n                  -> modprobe kvm_amd\ninitrd\n  info  size      5 MiB\nLinux cannot boot here: 1 check failed.\n";
        assert_eq!(String::from_utf8(out).unwrap(), expected);
    }

    #[test]
    fn json_is_one_object() {
        let mut out = Vec::new();
        let can_boot = run(Some(Path::new("/nowhere/k")), None, true, &mut out).unwrap();
        assert!(!can_boot);
        let value: serde_json::Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(value["can_boot"], false);
        assert_eq!(value["kernel"]["checks"][0]["verdict"], "fail");
        assert!(
            value["host"]
                .as_array()
                .is_some_and(|checks| !checks.is_empty())
        );
    }
}
