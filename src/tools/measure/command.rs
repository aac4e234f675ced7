//! Programs and their command lines: found, called, shown; and what they said last.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::process::die_with_parent;

/// Runs a program to its end, without input; an error has its last words.
pub(crate) fn call<W: AsRef<OsStr>>(program: &str, words: &[W]) -> Result<(), String> {
    call_command(Command::new(program).args(words).stdin(Stdio::null()))
}

/// The same for one whose words and input are given.
pub(crate) fn call_command(command: &mut Command) -> Result<(), String> {
    die_with_parent(command);
    let program = command.get_program().display().to_string();
    match command.output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(format!(
            "{program}: {}: {}",
            output.status,
            last_lines(&output.stderr)
        )),
        Err(error) => Err(format!("cannot run {program}: {error}")),
    }
}

/// The first line that a program prints, if it prints any.
pub(crate) fn first_line<W: AsRef<OsStr>>(program: &Path, words: &[W]) -> Option<String> {
    let mut command = Command::new(program);
    let output = command.args(words).stdin(Stdio::null()).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    Some(text.lines().next()?.trim().to_owned())
}

/// The program of this name on the PATH.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join(name))
        .find(|file| {
            file.is_file() && rustix::fs::access(file, rustix::fs::Access::EXEC_OK).is_ok()
        })
}

/// A command as one would type it in a shell, programs without their directories.
pub fn shown(words: &[OsString]) -> String {
    let program = words.first().map(|word| {
        let name = Path::new(word).file_name().unwrap_or(word);
        quoted(name)
    });
    let words = words.iter().skip(1).map(|word| quoted(word));
    program
        .into_iter()
        .chain(words)
        .collect::<Vec<_>>()
        .join(" ")
}

fn quoted(word: &OsStr) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_./,=:+@%".contains(&b);
    let text = word.to_string_lossy();
    if !word.is_empty() && word.as_bytes().iter().all(|b| plain(*b)) {
        text.into_owned()
    } else {
        format!("'{}'", text.replace('\'', "'\\''"))
    }
}

/// The last lines of a program's output, on one line, without what a terminal would act on.
pub(crate) fn last_lines(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    let last = lines.get(lines.len().saturating_sub(3)..);
    let line = last
        .unwrap_or_default()
        .join(" | ")
        .replace(|c: char| c.is_control(), "");
    match line.chars().count().checked_sub(300) {
        None | Some(0) => line,
        Some(skip) => format!("... {}", line.chars().skip(skip).collect::<String>()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_shown_as_typed() {
        let words = ["/usr/bin/vmm", "--append", "a b='c'", "", "x=1,y"].map(OsString::from);
        assert_eq!(shown(&words), "vmm --append 'a b='\\''c'\\''' '' x=1,y");
        assert_eq!(last_lines(b"a\nb\r\n\n\x1b[31mc\nd\n"), "b | [31mc | d");
    }
}
