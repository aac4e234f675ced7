//! What `run` and `exec` have in common: how a program in a VM has its streams and its environment.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use clap::Args;

use super::run::RunError;

/// Longest file of variables in bytes.
const MAX_ENV_FILE: u64 = 1 << 20;

// No documentation comment: it would stand in place of the subcommand's in its help.
#[derive(Debug, Args)]
pub(super) struct ProgramArgs {
    /// Give the program what comes on stdin
    #[arg(short, long)]
    pub(super) interactive: bool,
    /// Give the program a terminal
    #[arg(short, long)]
    pub(super) tty: bool,
    /// Set a variable, or take it from minivmm's own environment; may be given again
    #[arg(short, long, value_name = "NAME[=VALUE]", value_parser = named)]
    env: Vec<String>,
}

impl ProgramArgs {
    /// A terminal of a program's own that takes input needs one here.
    pub(super) fn check_terminal(&self) -> Result<(), RunError> {
        if self.tty && self.interactive && !rustix::termios::isatty(std::io::stdin()) {
            let why = "-t needs a terminal on stdin; without one, give -i alone".to_owned();
            return Err(RunError::Usage(why));
        }
        Ok(())
    }

    /// What a program with a terminal finds in its environment.
    pub(super) fn term(&self) -> Option<String> {
        self.tty.then(|| "TERM=xterm".to_owned())
    }

    /// Adds the variables that were given. A name that has no value here takes away the one that it has in the list.
    pub(super) fn set_variables(&self, list: &mut Vec<String>) {
        for text in &self.env {
            match variable(text) {
                Some(set) => list.push(set),
                None => list.retain(|other| other.split('=').next() != Some(text)),
            }
        }
    }
}

/// An option's text. A script's variable may be empty: as with docker, that gives nothing.
pub(super) fn given(option: Option<String>) -> Option<String> {
    option.filter(|text| !text.is_empty())
}

fn named(text: &str) -> Result<String, &'static str> {
    match text.starts_with('=') || text.is_empty() {
        true => Err("it has no name"),
        false => Ok(text.to_owned()),
    }
}

/// NAME=VALUE; for a name alone, the value that it has here, if it has one.
fn variable(text: &str) -> Option<String> {
    if text.contains('=') {
        return Some(text.to_owned());
    }
    Some(format!("{text}={}", std::env::var(text).ok()?))
}

/// The variables of a file, one a line, as docker reads it.
pub(super) fn variables_of_file(path: &Path) -> Result<Vec<String>, RunError> {
    let text = read_text(path).map_err(|e| RunError::File(path.display().to_string(), e))?;
    let mut list = Vec::new();
    // Windows begins a file of UTF-8 so.
    for line in text.trim_start_matches('\u{feff}').lines() {
        let line = line.trim_start();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let name = line.split('=').next().unwrap_or_default();
        if name.is_empty() || name.contains(char::is_whitespace) {
            let why = format!("{}: '{name}' is no name of a variable", path.display());
            return Err(RunError::Usage(why));
        }
        list.extend(variable(line));
    }
    Ok(list)
}

fn read_text(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?
        .take(MAX_ENV_FILE + 1)
        .read_to_string(&mut text)?;
    if text.len() as u64 > MAX_ENV_FILE {
        let why = format!("it is longer than {MAX_ENV_FILE} bytes");
        return Err(io::Error::other(why));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_file(text: &str) -> Result<Vec<String>, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        variables_of_file(file.path()).map_err(|e| e.to_string())
    }

    #[test]
    fn files_have_variables_as_with_docker() {
        let text = "\u{feff}C=1\n\n  # no D=1\n  E=a b\nNOT_SET_HERE\n";
        assert_eq!(of_file(text).unwrap(), ["C=1", "E=a b"]);
        let long = format!("A={}", "x".repeat(MAX_ENV_FILE as usize));
        for (text, said) in [("=x", "''"), ("A B=1", "'A B'"), (&long, "")] {
            let error = of_file(text).unwrap_err();
            assert!(error.contains(said), "{error}");
        }
    }

    #[test]
    fn a_variable_has_a_name() {
        assert!(named("").is_err() && named("=x").is_err());
        assert!(named("A").is_ok() && named("A=").is_ok());
    }

    #[test]
    fn a_name_without_a_value_here_takes_the_variable_away() {
        let program = ProgramArgs {
            interactive: false,
            tty: false,
            env: ["NOT_SET_HERE", "B=2", "F="].map(str::to_owned).into(),
        };
        let mut list = ["NOT_SET_HERE=image", "B=image"].map(str::to_owned).into();
        program.set_variables(&mut list);
        assert_eq!(list, ["B=image", "B=2", "F="]);
    }
}
