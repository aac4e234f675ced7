//! `ps` and `stop`: the VMs of images that run.

use std::io::Write;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use clap::Args;
use rustix::process::Signal;

use super::images::{each, print};
use super::run::RunError;
use crate::boot;
use crate::console::MAX_FORWARDED;
use crate::guest::Exec;
use crate::run::{Running, Vm};
use crate::vmm::error::host;
use crate::{error_chain, escaped};

/// How often a VM is looked at that is to end, and how long one may take that has been told not to ask its program.
const PERIOD: Duration = Duration::from_millis(10);
const END_TIMEOUT: Duration = Duration::from_secs(2);
/// Characters of a command that are listed.
const COMMAND_WIDTH: usize = 40;

#[allow(missing_docs, reason = "--help has what stands at the subcommand")]
#[derive(Debug, Args)]
pub struct StopArgs {
    /// Seconds that the program has to end by itself, after the image's stop signal, or with --init image, the VM after its poweroff
    #[arg(short, long, value_name = "SECONDS", default_value_t = 10)]
    time: u32,
    /// Name of a VM, as minivmm ps lists it
    #[arg(value_name = "NAME", required = true)]
    vms: Vec<String>,
}

/// The directory of the VMs that run.
pub(super) fn running() -> Result<Running, RunError> {
    let cache = boot::cache_dir();
    Ok(Running::open(cache.as_deref()).map_err(host("the directory of running VMs"))?)
}

/// The one with this name.
pub(super) fn find(name: &str) -> Result<Vm, RunError> {
    let found = running()?.find(name);
    let found = found.map_err(host("the directory of running VMs"))?;
    found.ok_or_else(|| RunError::Usage(format!("no VM with the name '{name}' is running")))
}

/// Lists them.
pub fn list(out: &mut dyn Write) -> Result<(), RunError> {
    let vms = running()?.list();
    let vms = vms.map_err(host("the directory of running VMs"))?;
    print(out, |out| {
        let name = "NAME";
        writeln!(
            out,
            "{name:<20} {:>8}  {:<10} {:<24} COMMAND",
            "PID", "UP", "IMAGE"
        )?;
        for vm in &vms {
            let up = SystemTime::now()
                .duration_since(vm.started)
                .unwrap_or_default();
            let up = humantime::format_duration(Duration::from_secs(up.as_secs()));
            let (name, pid, image) = (&vm.name, vm.info.pid, escaped(&vm.info.image));
            let command: String = escaped(&vm.info.command)
                .chars()
                .take(COMMAND_WIDTH)
                .collect();
            let up = up.to_string().replace(' ', "");
            writeln!(out, "{name:<20} {pid:>8}  {up:<10} {image:<24} {command}")?;
        }
        Ok(())
    })
}

/// Ends VMs: by the image's signal to the program, or the poweroff of an image with an init of its own, then by signals that the VMM takes for
/// itself, then by SIGKILL.
pub fn stop(args: &StopArgs, out: &mut dyn Write) -> Result<(), RunError> {
    each(&args.vms, |name| {
        stop_one(name, Duration::from_secs(args.time.into()))?;
        // The output is for scripts alone: the VM has been stopped whether it is read or not.
        let _ = writeln!(out, "{name}");
        Ok(())
    })
}

fn stop_one(name: &str, limit: Duration) -> Result<(), RunError> {
    let vm = find(name)?;
    let send = |signal| vm.signal(signal).map_err(host("the VM's process"));
    let request = match vm.info.stop_signal {
        _ if vm.info.is_init => Some(Exec::poweroff()),
        signal => signal.map(Exec::signal),
    };
    let ended = if let Some(request) = request {
        ask(&vm, &request, limit).unwrap_or_else(|e| {
            log::warn!("cannot have '{name}' end itself: {}", error_chain(&e));
            false
        })
    } else {
        send(Signal::TERM)?;
        wait(&vm, limit)?
    };
    if !ended {
        // One by one: signals that are pending do not add up. The last is not forwarded.
        for _ in 0..=MAX_FORWARDED {
            send(Signal::TERM)?;
            thread::sleep(PERIOD);
        }
        if !wait(&vm, END_TIMEOUT)? {
            send(Signal::KILL)?;
            wait(&vm, END_TIMEOUT)?;
        }
    }
    Ok(())
}

/// Has the VM's first process do what ends the VM, and waits for that; whether it has come.
fn ask(vm: &Vm, request: &Exec, limit: Duration) -> Result<bool, RunError> {
    let begin = Instant::now();
    let connection = vm.start(request, limit);
    let _connection = connection.map_err(host("the VM's socket"))?;
    wait(vm, limit.saturating_sub(begin.elapsed()))
}

/// Waits for the VM's end, and no longer than this; whether it has come.
fn wait(vm: &Vm, limit: Duration) -> Result<bool, RunError> {
    let limit = Instant::now() + limit;
    loop {
        if vm
            .has_ended()
            .map_err(host("the directory of running VMs"))?
        {
            return Ok(true);
        }
        if Instant::now() >= limit {
            return Ok(false);
        }
        thread::sleep(PERIOD);
    }
}
