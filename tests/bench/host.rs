//! The machine that a benchmark ran on.

#![allow(dead_code, reason = "each benchmark uses its part")]

use std::fs;
use std::path::Path;
use std::process::Command;

use minivmm::tools::measure::HostFacts;

/// What the host is like now, and the versions of these programs.
pub(crate) fn host(programs: &[&str]) -> String {
    let versions: String = programs
        .iter()
        .filter_map(|program| version_of(program))
        .map(|version| format!("; {version}"))
        .collect();
    format!("{}{versions}", HostFacts::read())
}

/// The first line of what a program says of itself; `None` if there is no such program.
pub(crate) fn version_of(program: &str) -> Option<String> {
    let output = Command::new(program).arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines().next().map(str::to_owned)
}

/// The load average of the last minute.
pub(crate) fn load() -> String {
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    load.split(' ').next().unwrap_or_default().to_owned()
}

/// The command as one would type it, without the directories of this machine.
pub(crate) fn command_line(command: &Command) -> String {
    [command.get_program()]
        .into_iter()
        .chain(command.get_args())
        .map(|word| match Path::new(word).file_name() {
            Some(name) if word.as_encoded_bytes().starts_with(b"/") => name.to_string_lossy(),
            _ => word.to_string_lossy(),
        })
        .collect::<Vec<_>>()
        .join(" ")
}
