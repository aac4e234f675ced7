//! `pull`: an image from a registry; and how far it is, on a terminal.

use std::cell::Cell;
use std::io::IsTerminal;
#[cfg(feature = "registry")]
use std::io::Write;
use std::time::{Duration, Instant};

use clap::Args;

use super::images::store;
#[cfg(feature = "registry")]
use super::log::LogArgs;
use super::log::TimedStderr;
use super::run::RunError;
use crate::image::{How, Progress, Source, Stored};
#[cfg(feature = "registry")]
use crate::vmm::error::host;

/// How long an image may take before there is anything to be seen of it, and how long a line stays at least.
const QUIET: Duration = Duration::from_millis(200);

// How a registry is talked to. As documentation, it would stand in place of the subcommand's in its help.
#[allow(missing_docs, reason = "--help has what stands at the subcommand")]
#[derive(Debug, Default, Args)]
pub struct RegistryArgs {
    /// Allow plain HTTP with the image's registry; without it, only with one on this host (localhost, 127.0.0.1)
    #[cfg(feature = "registry")]
    #[arg(long)]
    insecure_registry: bool,
}

impl RegistryArgs {
    /// Finds an image; on a terminal, unless it is to be quiet, shows how far it is.
    pub(super) fn load(&self, source: &Source, quiet: bool) -> Result<Stored, RunError> {
        let line = ProgressLine::new();
        let show = |progress: &Progress| line.show(progress);
        let how = How {
            #[cfg(feature = "registry")]
            insecure: self.insecure_registry,
            #[cfg(not(feature = "registry"))]
            insecure: false,
            progress: (!quiet && std::io::stderr().is_terminal()).then_some(&show),
        };
        Ok(source.load(&store()?, &how)?)
    }
}

#[allow(missing_docs, reason = "--help has what stands at the subcommand")]
#[cfg(feature = "registry")]
#[derive(Debug, Args)]
pub struct PullArgs {
    /// Registry of the image.
    #[command(flatten)]
    registry: RegistryArgs,
    /// How much to say on stderr.
    #[command(flatten)]
    pub log: LogArgs,
    /// Name of the image, [HOST[:PORT]/]PATH[:TAG][@DIGEST]
    #[allow(
        rustdoc::broken_intra_doc_links,
        reason = "in help, brackets are what may be left out"
    )]
    #[arg(value_name = "NAME")]
    name: String,
}

#[cfg(feature = "registry")]
impl PullArgs {
    /// Fetches the image, and prints its digest.
    pub fn run(self, out: &mut dyn Write) -> Result<(), RunError> {
        let source = Source::Registry(self.name);
        let stored = self.registry.load(&source, self.log.quiet)?;
        Ok(writeln!(out, "{}", stored.meta.digest).map_err(host("stdout"))?)
    }
}

/// A line on stderr that is written over and over, and gone in the end.
struct ProgressLine {
    /// When it may be written next.
    next: Cell<Instant>,
    shown: Cell<bool>,
}

impl ProgressLine {
    fn new() -> Self {
        Self {
            next: Cell::new(Instant::now() + QUIET),
            shown: Cell::new(false),
        }
    }

    fn show(&self, progress: &Progress) {
        let now = Instant::now();
        if now < self.next.get() {
            return;
        }
        self.next.set(now + QUIET);
        self.shown.set(true);
        let Progress {
            layer,
            layers,
            bytes,
            size,
        } = progress;
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let of = size.map(|size| format!(" of {:.1}", mib(size)));
        let text = format!(
            "\r\x1b[Klayer {layer} of {layers}: {:.1}{} MiB",
            mib(*bytes),
            of.unwrap_or_default()
        );
        TimedStderr.print(&text);
    }
}

impl Drop for ProgressLine {
    fn drop(&mut self) {
        if self.shown.get() {
            TimedStderr.print("\r\x1b[K");
        }
    }
}
