//! Arguments of `bench`.

use std::path::PathBuf;

use clap::Args;
use clap::builder::{PossibleValue, PossibleValuesParser};

use super::guest::GuestArgs;
use crate::config::{Span, VmConfig};
use crate::tools::bench::{ANY_BYTE, BenchOptions, DEMO_MARKER, OTHER_VMMS};

const HELP: &str = "\
The clock starts just before the fork and exec of a VMM's process. It is read at the first byte on its console, at the marker \
(--until) and at the end of the process. In each round every VMM boots once, so that what disturbs the host disturbs all of them. \
Memory is read in the first round, which is not counted: private pages (smaps) within the guest's RAM, and all others. \
Run it as root: minivmm lets no other user read its memory map.

Examples:
  minivmm bench --kernel bzImage --initrd build/demo.cpio --append '-- true'
      against every other VMM on the PATH; the demo initramfs runs 'true' and powers off
  minivmm bench --kernel bzImage --initrd initrd.img --until 'login:' --stop-at-marker --vs qemu
  minivmm bench ... --vs none --json now.json --baseline before.json --max-ratio 1.2
  minivmm bench --restore ready.snap
      restores, up to the guest's first instruction as well; what is private of its memory is what a clone takes

Exit status:
  0          minivmm was measured, and is not slower than the baseline allows
  1          minivmm is slower than the baseline allows
  2          the command line is wrong, or a VMM named with --vs is not installed
  125        minivmm's guest did not get to its end, or the host refused something; stderr says why
  130, 143   stopped by SIGINT, by SIGTERM; no VMM is left running";

/// Measure how long a guest takes to boot, in minivmm and in the other VMMs that are installed
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub struct BenchArgs {
    /// What is booted.
    #[command(flatten)]
    guest: GuestArgs,
    /// Measure restores of this snapshot, in place of boots; of guests that end by themselves up to the first instruction, too
    #[arg(long, value_name = "FILE", conflicts_with_all = ["kernel", "initrd", "cmdline", "append", "cpus", "memory", "vs"])]
    restore: Option<PathBuf>,
    /// Rounds that are measured
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Rounds before them that are not
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    warmup: u32,
    /// VMMs to measure against [default: all that are on the PATH]
    #[arg(long, value_name = "NAME,...", value_delimiter = ',', value_parser = vmm_names())]
    vs: Vec<String>,
    /// The marker: text on the console up to which is measured [default: the demo initramfs' first line; with --restore the
    /// first byte]
    #[arg(long, value_name = "TEXT")]
    until: Option<String>,
    /// Kill each VMM when the marker appears, for guests that do not end by themselves
    #[arg(long)]
    stop_at_marker: bool,
    /// Longest time of a boot; a VMM that takes longer is killed, and left out from then on
    #[arg(long, value_name = "TIME", default_value = "60s")]
    timeout: Span,
    /// Print JSON, or also write it to a file
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "-")]
    json: Option<PathBuf>,
    /// Compare minivmm's medians with those in a JSON file of an earlier run
    #[arg(long, value_name = "FILE")]
    baseline: Option<PathBuf>,
    /// How many times the baseline's median is still acceptable
    #[arg(
        long,
        value_name = "RATIO",
        default_value_t = 1.1,
        requires = "baseline"
    )]
    max_ratio: f64,
}

/// No VMM but minivmm.
const NONE: &str = "none";

fn vmm_names() -> PossibleValuesParser {
    OTHER_VMMS
        .iter()
        .map(|vmm| PossibleValue::new(vmm.name).help(vmm.about))
        .chain([PossibleValue::new(NONE).help("Only minivmm")])
        .collect::<Vec<_>>()
        .into()
}

impl From<BenchArgs> for BenchOptions {
    fn from(args: BenchArgs) -> Self {
        let vs = args.vs.into_iter();
        let first = args.restore.as_ref().map_or(DEMO_MARKER, |_| ANY_BYTE);
        Self {
            restore: args.restore,
            guest: args.guest.over(VmConfig::default()),
            runs: args.runs,
            warmup: args.warmup,
            vs: (vs.len() > 0).then(|| vs.filter(|name| name != NONE).collect()),
            until: args.until.unwrap_or(first.into()),
            stop_at_marker: args.stop_at_marker,
            timeout: args.timeout,
            json: args.json,
            baseline: args.baseline,
            max_ratio: args.max_ratio,
        }
    }
}
