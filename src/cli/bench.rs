//! Arguments of `bench`.

use clap::Args;

use super::guest::GuestArgs;
use crate::config::VmConfig;
use crate::tools::bench::BenchOptions;

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
    /// What is measured.
    #[command(flatten)]
    pub options: BenchOptions,
}

impl BenchArgs {
    /// What is booted.
    pub fn guest(&self) -> VmConfig {
        self.guest.clone().over(VmConfig::default())
    }
}
