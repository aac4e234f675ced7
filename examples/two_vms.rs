//! Two VMs in one process, with minivmm as a library.
//!
//! ```text
//! guest-kernels/tiny/build build/tiny
//! cargo run --example two_vms -- build/tiny/hello build/tiny/hello
//! ```

use std::env;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use minivmm::config::VmConfig;
use minivmm::vmm::error::VmError;
use minivmm::vmm::event_loop::EventLoop;
use minivmm::vmm::networks::Networks;
use minivmm::vmm::outcome::Outcome;
use minivmm::vmm::prepare::{BuildTimes, Prepared};
use minivmm::vmm::vm::{ConsoleEnds, Observers, Vm};
use minivmm_devices::chardev::ConsoleOutput;
use minivmm_devices::thread::ThreadStarter;

/// Longest output that is kept of a VM: a guest must not choose how much memory its host uses.
const OUTPUT_LIMIT: usize = 16 << 20;

/// Console output kept in memory. Clones are the same output.
#[derive(Clone, Default)]
pub(crate) struct Captured(Arc<Mutex<Vec<u8>>>);

impl Captured {
    /// What the guest has written so far.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        bytes.clone()
    }
}

impl ConsoleOutput for Captured {
    fn write(&mut self, bytes: &[u8]) -> usize {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let room = OUTPUT_LIMIT.saturating_sub(kept.len());
        kept.extend(bytes.iter().take(room));
        // What is beyond the limit is dropped, so that the guest never waits.
        bytes.len()
    }

    fn has_room(&self) -> bool {
        true
    }

    fn call_back(&self) {}
}

/// Builds a VM of 16 MiB and starts its vCPU. `cmdline` goes to its kernel.
pub(crate) fn start(kernel: &Path, cmdline: &str) -> Result<(Vm, Captured), Box<dyn Error>> {
    let config = VmConfig {
        kernel: kernel.to_owned(),
        cmdline: Some(cmdline.to_owned()),
        memory: "16M".parse()?,
        ..VmConfig::default()
    };
    let output = Captured::default();
    let console = ConsoleEnds {
        serial: Box::new(output.clone()),
        virtio: Box::new(output.clone()),
        size: None,
    };
    let mut times = BuildTimes::default();
    let threads = ThreadStarter::default();
    let networks = Networks::open(&config, &threads)?;
    let prepared = Prepared::new(&config, &networks, &threads, &mut times)?;
    let mut vm = Vm::build(prepared, console, Observers::default(), &mut times)?;
    vm.start::<VmError>(|| Ok(()), None)?;
    Ok((vm, output))
}

/// Waits until every VM has ended, on one event loop, and says how each did.
pub(crate) fn wait_for_all(vms: &mut [Vm]) -> Result<Vec<Outcome>, Box<dyn Error>> {
    let mut events = EventLoop::new()?;
    for (index, vm) in vms.iter().enumerate() {
        events.add(vm.control().ended(), false, index)?;
    }
    let mut running = vms.len();
    while running > 0 {
        for index in events.wait(None)? {
            events.remove(vms[index].control().ended())?;
            running -= 1;
        }
    }
    Ok(vms.iter_mut().map(|vm| vm.join().outcome).collect())
}

#[allow(dead_code, reason = "the test of this example has no use for it")]
fn main() -> Result<(), Box<dyn Error>> {
    let kernels: Vec<PathBuf> = env::args_os().skip(1).map(PathBuf::from).collect();
    if kernels.len() != 2 {
        return Err("usage: two_vms KERNEL KERNEL".into());
    }
    let (mut vms, mut outputs) = (Vec::new(), Vec::new());
    for kernel in &kernels {
        let (vm, output) = start(kernel, "")?;
        vms.push(vm);
        outputs.push(output);
    }
    let outcomes = wait_for_all(&mut vms)?;
    for ((kernel, outcome), output) in kernels.iter().zip(outcomes).zip(outputs) {
        let text = String::from_utf8_lossy(&output.bytes()).into_owned();
        println!("{}: {outcome:?}, console {text:?}", kernel.display());
    }
    Ok(())
}
