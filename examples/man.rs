//! Writes the man pages and the shell completions, all of them from the definition of the command line: `make man`.

use std::env;
use std::fs;
use std::io;
use std::path::Path;

use clap::CommandFactory;
use clap_complete::Shell;
use minivmm::cli::Cli;

/// Writes `minivmm.1` and a page for each subcommand, and completions for bash, fish and zsh, into `dir`.
pub(crate) fn generate(dir: &Path) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    clap_mangen::generate_to(Cli::command(), dir)?;
    for shell in [Shell::Bash, Shell::Fish, Shell::Zsh] {
        clap_complete::generate_to(shell, &mut Cli::command(), "minivmm", dir)?;
    }
    Ok(())
}

#[allow(dead_code, reason = "the test of this example has no use for it")]
fn main() -> io::Result<()> {
    match env::args_os().nth(1) {
        Some(dir) => generate(Path::new(&dir)),
        None => Err(io::Error::other("usage: man DIR")),
    }
}
