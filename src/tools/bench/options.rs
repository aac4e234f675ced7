//! What is measured, and how: the arguments of `bench` beside the guest.

use std::path::PathBuf;

use clap::Args;
use clap::builder::{PossibleValue, PossibleValuesParser};

use super::report::ANY_BYTE;
use super::vmm::OTHER_VMMS;
use crate::config::Span;

/// What the demo initramfs prints when its first process runs.
pub const DEMO_MARKER: &str = "minivmm-demo: userspace";
/// No VMM but minivmm.
const NONE: &str = "none";

#[allow(missing_docs, reason = "--help has what stands at the subcommand")]
#[derive(Debug, Args)]
pub struct BenchOptions {
    /// Measure restores of this snapshot, in place of boots; of guests that end by themselves up to the first instruction, too
    #[arg(long, value_name = "FILE", conflicts_with_all = ["kernel", "initrd", "cmdline", "append", "cpus", "memory", "vs"])]
    pub(super) restore: Option<PathBuf>,
    /// Rounds that are measured
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) runs: u32,
    /// Rounds before them that are not
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) warmup: u32,
    /// VMMs to measure against [default: all that are on the PATH]
    #[arg(long, value_name = "NAME,...", value_delimiter = ',', value_parser = vmm_names())]
    pub(super) vs: Vec<String>,
    /// The marker: text on the console up to which is measured [default: the demo initramfs' first line; with --restore the
    /// first byte]
    #[arg(long, value_name = "TEXT")]
    pub(super) until: Option<String>,
    /// Kill each VMM when the marker appears, for guests that do not end by themselves
    #[arg(long)]
    pub(super) stop_at_marker: bool,
    /// Longest time of a boot; a VMM that takes longer is killed, and left out from then on
    #[arg(long, value_name = "TIME", default_value = "60s")]
    pub(super) timeout: Span,
    /// Print JSON, or also write it to a file
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "-")]
    pub(super) json: Option<PathBuf>,
    /// Compare minivmm's medians with those in a JSON file of an earlier run
    #[arg(long, value_name = "FILE")]
    pub(super) baseline: Option<PathBuf>,
    /// How many times the baseline's median is still acceptable
    #[arg(
        long,
        value_name = "RATIO",
        default_value_t = 1.1,
        requires = "baseline"
    )]
    pub(super) max_ratio: f64,
}

impl BenchOptions {
    /// What completes the marker.
    pub(super) fn marker(&self) -> &str {
        let default = self.restore.as_ref().map_or(DEMO_MARKER, |_| ANY_BYTE);
        self.until.as_deref().unwrap_or(default)
    }
}

fn vmm_names() -> PossibleValuesParser {
    OTHER_VMMS
        .iter()
        .map(|vmm| PossibleValue::new(vmm.name).help(vmm.about))
        .chain([PossibleValue::new(NONE).help("Only minivmm")])
        .collect::<Vec<_>>()
        .into()
}
