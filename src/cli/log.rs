//! What minivmm says: on stderr, in lines that begin with its name.

use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Args;
use log::LevelFilter;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;

use crate::{NOTICE, console, escaped};

// How much minivmm says on stderr. As documentation, it would stand in place of a subcommand's in its help.
#[allow(missing_docs, reason = "--help has what stands at the subcommand")]
#[derive(Debug, Default, Args)]
pub struct LogArgs {
    /// Say more: -v informs, -vv debugs
    #[arg(short, long, action = clap::ArgAction::Count, conflicts_with = "quiet")]
    pub verbose: u8,
    /// Say nothing: the exit status tells all
    #[arg(short, long)]
    pub quiet: bool,
}

impl LogArgs {
    /// The level of the log.
    pub fn level(&self) -> LevelFilter {
        match (self.quiet, self.verbose) {
            (true, _) => LevelFilter::Off,
            (_, 0) => LevelFilter::Warn,
            (_, 1) => LevelFilter::Info,
            _ => LevelFilter::Debug,
        }
    }
}

/// Starts the log: messages of `level`, and what the user has to know to go on unless it is off. Where stderr is a raw
/// terminal, a line needs the carriage return.
pub fn start_log(level: LevelFilter) {
    let on_terminal = io::stderr().is_terminal();
    let mut builder = env_logger::Builder::new();
    builder.filter_level(level);
    if level != LevelFilter::Off {
        builder.filter_module(NOTICE, level.max(LevelFilter::Info));
    }
    builder
        .target(env_logger::Target::Pipe(Box::new(TimedStderr)))
        .format(move |out, record| {
            let level = match record.level() {
                log::Level::Error => "error: ",
                log::Level::Warn => "warning: ",
                _ => "",
            };
            let end = if on_terminal && console::is_raw() {
                "\r\n"
            } else {
                "\n"
            };
            let text = record.args().to_string();
            let mut lines = text.split('\n').map(escaped);
            let first = lines.next().unwrap_or_default();
            write!(out, "minivmm: {level}{first}{end}")?;
            // A name with a newline in it cannot pass for another message.
            lines.try_for_each(|line| write!(out, "  {line}{end}"))
        })
        .init();
}

/// stderr for a thread that must not wait for ever: a guest can make its vCPU's thread log, and a reader that has stopped
/// would hold that thread, and with it the VM's end. A message that nobody takes for so long is lost, and the next ones wait no
/// longer until somebody reads again.
pub struct TimedStderr;

/// The last message was lost.
static STUCK: AtomicBool = AtomicBool::new(false);

impl TimedStderr {
    const PATIENCE: Timespec = Timespec {
        tv_sec: 0,
        tv_nsec: 200_000_000,
    };
    /// What a pipe that is ready for writing takes without a wait.
    const PIPE_BUF: usize = 4096;

    /// Writes a text that has its ends of lines.
    pub fn print(&mut self, text: &str) {
        for piece in text.as_bytes().chunks(Self::PIPE_BUF) {
            // Nobody to tell.
            let _ = self.write_all(piece);
        }
    }
}

impl Write for TimedStderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let stderr = rustix::stdio::stderr();
        let patience = match STUCK.load(Ordering::Relaxed) {
            true => Timespec::default(),
            false => Self::PATIENCE,
        };
        // A vCPU's thread is interrupted when the VM ends.
        let ready =
            retry_on_intr(|| poll(&mut [PollFd::new(&stderr, PollFlags::OUT)], Some(&patience)));
        STUCK.store(ready == Ok(0), Ordering::Relaxed);
        match ready {
            Ok(0) => Ok(bytes.len()),
            _ => io::stderr().write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
