//! `disks`: what VMs of images have kept.

use std::io::Write;

use clap::Args;

use super::images::{each, print};
use super::run::RunError;
use crate::boot;
use crate::mib;
use crate::run::Disks;
use crate::vmm::error::host;

#[allow(missing_docs, reason = "--help has what stands at the subcommand")]
#[derive(Debug, Args)]
pub struct DisksArgs {
    /// Remove disks by their names
    #[arg(long, value_name = "NAME", num_args = 1..)]
    remove: Vec<String>,
}

/// The user's disks.
pub(super) fn disks() -> Result<Disks, RunError> {
    let data = boot::data_dir();
    Ok(Disks::open(data.as_deref()).map_err(host("the directory of disks"))?)
}

/// Removes disks, or else lists all.
pub fn run(args: &DisksArgs, out: &mut dyn Write) -> Result<(), RunError> {
    let disks = disks()?;
    if !args.remove.is_empty() {
        return each(&args.remove, |name| {
            Ok(disks.remove(name).map_err(host("a disk"))?)
        });
    }
    let list = disks.list().map_err(host("the directory of disks"))?;
    print(out, |out| {
        writeln!(
            out,
            "{:<20} {:>12} {:>12}  {:<16}  CHANGED",
            "NAME", "SIZE", "USED", "IMAGE"
        )?;
        for disk in &list {
            let changed = humantime::format_rfc3339_seconds(disk.changed);
            let (size, used) = (mib(disk.bytes), mib(disk.used));
            let (name, image) = (&disk.name, &disk.image);
            writeln!(
                out,
                "{name:<20} {size:>12} {used:>12}  {image:<16}  {changed}"
            )?;
        }
        Ok(())
    })
}
