//! What `run` and `exec` have in common: how a program in a VM has its streams and its environment.

use clap::Args;

use super::run::RunError;

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
    #[arg(short, long, value_name = "NAME[=VALUE]")]
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

/// NAME=VALUE; for a name alone, the value that it has here, if it has one.
pub(super) fn variable(text: &str) -> Option<String> {
    if text.contains('=') {
        return Some(text.to_owned());
    }
    Some(format!("{text}={}", std::env::var(text).ok()?))
}
