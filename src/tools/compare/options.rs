//! What is compared, and how: the arguments of `compare`.

use std::path::PathBuf;

use clap::Args;

use crate::config::{MAX_CPUS, MemorySize, Span};

const HELP: &str = "\
Measured are crun, runc, podman and docker, as far as they are on the PATH (docker by its running daemon), and minivmm. They get a \
copy of DIR or IMAGE, which stays as it is; minivmm gets it packed as an initramfs, and minivmm run as an image. None has a network or \
any input. One that fails is reported with its error, and the others go on.

Examples:
  minivmm compare --rootfs alpine --kernel bzImage -- /bin/ls -l /
  minivmm compare --image debian:12 --kernel bzImage -- /bin/ls -l /
  minivmm compare --rootfs alpine --kernel bzImage --cold --html report.html --json report.json -- /bin/true

Exit status:
  0          all that are installed were measured
  1          one of them failed; its row says how
  2          the command line is wrong
  125        nothing could be measured; stderr says why
  130, 143   stopped by SIGINT, by SIGTERM";

#[allow(missing_docs, reason = "--help has what stands at the subcommand")]
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub struct CompareOptions {
    /// Directory with the root file system
    #[arg(long, value_name = "DIR", required_unless_present = "image")]
    pub(super) rootfs: Option<PathBuf>,
    /// Container image in place of a directory, as minivmm run takes it; fsck.erofs (package erofs-utils) unpacks it
    #[arg(long, value_name = "IMAGE", conflicts_with = "rootfs")]
    pub(super) image: Option<String>,
    /// Kernel of the virtual machine [default: the one that this host runs, /boot/vmlinuz-RELEASE]
    #[arg(short, long, value_name = "FILE")]
    pub(super) kernel: Option<PathBuf>,
    /// Add to the kernel command line
    #[arg(long, value_name = "STRING", allow_hyphen_values = true)]
    pub(super) append: Vec<String>,
    /// vCPUs
    #[arg(short, long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=MAX_CPUS.into()))]
    pub(super) cpus: u8,
    /// Memory of the virtual machine [default: 256M, or more for a large root]
    #[arg(short, long, value_name = "SIZE")]
    pub(super) memory: Option<MemorySize>,
    /// Measured runs of each
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) runs: u32,
    /// Measure cold runs as well: before each, the host's page cache is dropped, which only root may do and which slows down
    /// everything else on the host
    #[arg(long)]
    pub(super) cold: bool,
    /// Longest time of a run; a runtime that takes longer is killed, and left out from then on
    #[arg(long, value_name = "TIME", default_value = "60s")]
    pub(super) timeout: Span,
    /// Add to the runs of an earlier report of the same comparison, which --json wrote; it may be the file that --json names
    #[arg(long, value_name = "FILE")]
    pub(super) add: Option<PathBuf>,
    /// Print JSON, or also write it to a file
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "-")]
    pub(super) json: Option<PathBuf>,
    /// Write a report with plots
    #[arg(long, value_name = "FILE")]
    pub(super) html: Option<PathBuf>,
    /// What to run, and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub(super) command: Vec<String>,
}

impl CompareOptions {
    /// What the root is called.
    pub(super) fn root(&self) -> String {
        let rootfs = self.rootfs.as_ref().map(|dir| dir.display().to_string());
        rootfs.or(self.image.clone()).unwrap_or_default()
    }
}
