//! `snapshot info` and `snapshot verify`: what a snapshot holds, and whether it is whole.

use std::io::{self, Write};
use std::path::PathBuf;
use std::time::{Duration, UNIX_EPOCH};

use clap::{Args, Subcommand};
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;

use super::images::print;
use super::run::RunError;
use crate::host::kvm;
use crate::vmm::error::{VmError, host};
use crate::vmm::snapshot::file::MAJOR;
use crate::vmm::snapshot::host::HostFingerprint;
use crate::vmm::snapshot::load::Snapshot;

#[allow(missing_docs, reason = "--help has what stands at the subcommand")]
#[derive(Debug, Args)]
pub struct SnapshotArgs {
    /// What to do.
    #[command(subcommand)]
    command: SnapshotCommand,
}

#[derive(Debug, Subcommand)]
enum SnapshotCommand {
    /// Say what is in it, where it was taken, and what this host has not
    Info {
        /// Snapshot
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Read all of it and compare it with its checksums; status 0 only if it is whole
    Verify {
        /// Snapshot
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
}

/// Does what the arguments say.
pub fn run(args: &SnapshotArgs, out: &mut dyn Write) -> Result<(), RunError> {
    match &args.command {
        SnapshotCommand::Info { file } => {
            let snapshot = Snapshot::open(file).map_err(VmError::from)?;
            print(out, |out| info(&snapshot, out))
        }
        SnapshotCommand::Verify { file } => {
            let snapshot = Snapshot::open(file).map_err(VmError::from)?;
            snapshot.verify().map_err(VmError::from)?;
            let written = writeln!(out, "{}: all checksums are right", file.display());
            Ok(written.map_err(host("stdout"))?)
        }
    }
}

fn info(snapshot: &Snapshot, out: &mut dyn Write) -> io::Result<()> {
    let meta = &snapshot.meta;
    let (size, on_disk) = snapshot.size();
    let kib = |bytes: u64| format!("{} KiB", bytes.div_ceil(1024));
    let taken = UNIX_EPOCH.checked_add(Duration::from_nanos(meta.taken_at_ns));
    let taken = taken.map(|at| humantime::format_rfc3339_seconds(at).to_string());
    let tsc = snapshot.vcpus.first().map_or(0, |vcpu| vcpu.tsc_khz());
    let mut line = |name: &str, value: String| writeln!(out, "{name:<14} {value}");
    line(
        "format",
        format!("{MAJOR}.{}, by {}", snapshot.minor, meta.writer),
    )?;
    line("taken", taken.unwrap_or_default())?;
    line("boot mark", meta.mark.to_string())?;
    line("generation", meta.generation.to_string())?;
    line("vCPUs", format!("{}, TSC {tsc} kHz", meta.config.cpus))?;
    line("memory", meta.config.memory.to_string())?;
    line("file", format!("{}, {} on disk", kib(size), kib(on_disk)))?;
    line("kernel", meta.config.kernel.display().to_string())?;
    line("command line", meta.cmdline.clone())?;
    for disk in &snapshot.disks {
        line(
            "disk",
            format!("{}: {}", disk.id, disk.identity.path.display()),
        )?;
    }
    for (index, net) in meta.config.nets.iter().enumerate() {
        let what = match net.passt {
            true => "passt",
            false if net.is_unplugged() => "none",
            false => "a TAP interface",
        };
        line("network", format!("{index}: {what}"))?;
    }
    line("host", format!("{}, {}", meta.processor, meta.host.kernel))?;
    if snapshot.is_from_this_host {
        line("this host", "the same, in the same boot".to_owned())?;
        return Ok(());
    }
    for difference in meta.host.differences(&HostFingerprint::read()) {
        line("this host", difference)?;
    }
    let supported = kvm::open().ok();
    let supported = supported.and_then(|kvm| kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).ok());
    match supported.map(|supported| snapshot.missing(&supported)) {
        None => line("missing here", "unknown: KVM cannot be asked".to_owned())?,
        Some(missing) if missing.is_empty() => line("missing here", "nothing".to_owned())?,
        Some(missing) => missing
            .into_iter()
            .try_for_each(|feature| line("missing here", feature))?,
    }
    Ok(())
}
