//! A VM: an object with a lifecycle.
//!
//! ```text
//!  Prepared::new        Vm::build        Vm::start           Vm::pause
//! ---------------> Prepared ------> built --------> running <-----------> paused
//!                                     |                |      Vm::resume    |
//!                                     |  Vm::join      | an end, Vm::join   |
//!                                     +----------------+---------> ended <--+
//! ```
//!
//! All of its state is in one owner and nothing is global: one process can run several. What ends it, from wherever that comes, goes
//! through its [`Control`].

use std::fs::File;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use kvm_ioctls::Cap;
use minivmm_devices::chardev::{ConsoleDevice, ConsoleOutput, Kick, TerminalSize};
use minivmm_devices::platform::serial::Serial;
use minivmm_devices::virtio::console::Console as VirtioConsole;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::attach::attach_virtio_devices;
use super::control::{Control, End};
use super::error::{VmError, host, refused};
use super::machine::Machine;
use super::outcome::Outcome;
use super::prepare::{BuildTimes, Origin, Prepared};
use super::vcpu::exit::Buses;
use super::vcpu::profile::ExitProfile;
use super::vcpu::{self, RunningVcpu, TakeJob, Vcpu, VcpuError};
use crate::acpi;
use crate::arch;
use crate::arch::irqchip::IrqChip;
use crate::arch::sleep::Sleep;
use crate::arch::state::StateSupport;
use crate::arch::{layout, mptable, regs};
use crate::boot::LoadedKernel;
use crate::config::{ConsoleKind, VmConfig};

/// How long vCPUs may take to stand still: an exit's handling is bounded by far less.
const PAUSE_LIMIT: Duration = Duration::from_secs(10);

/// A console device, in the hands of its bus and of the console's owner.
pub type SharedConsole = Arc<Mutex<dyn ConsoleDevice>>;

/// The host's ends of the consoles.
pub struct ConsoleEnds {
    /// Where COM1 sends to.
    pub serial: Box<dyn ConsoleOutput>,
    /// Where hvc0 sends to, if there is one.
    pub virtio: Box<dyn ConsoleOutput>,
    /// The size of the user's terminal.
    pub size: Option<TerminalSize>,
}

/// What is told of a VM while it runs.
#[derive(Default)]
pub struct Observers {
    /// Called with each boot mark, on the vCPU's thread: it must not block.
    pub boot_mark: Option<Box<dyn Fn(u8) + Send + Sync>>,
    /// At the first of these boot marks, the VM is held until [`Control::release`], and the eventfd is written.
    pub hold_at: Option<(u8, EventFd)>,
    /// Whether exits are counted by kind and device.
    pub profile_exits: bool,
}

/// A VM that is built, runs, is paused, or has ended.
pub struct Vm {
    vcpus: Vcpus,
    machine: Machine,
    serial: Arc<Mutex<Serial>>,
    user_console: SharedConsole,
    console_ready: Arc<EventFd>,
    control: Arc<Control>,
    parts: Prepared,
}

enum Vcpus {
    /// Before the start, and after the end.
    Still(Vec<Vcpu>),
    Running(Vec<RunningVcpu>),
}

impl Vm {
    /// Makes a VM of what was prepared: interrupt controllers, vCPUs and devices; and writes the tables by which the guest finds them.
    pub fn build(
        mut parts: Prepared,
        console: ConsoleEnds,
        observers: Observers,
        times: &mut BuildTimes,
    ) -> Result<Self, VmError> {
        let control = Arc::new(Control::new().map_err(host("an eventfd"))?);
        let interrupts = IrqChip::new(Arc::clone(&parts.fd))
            .map_err(refused("KVM_ENABLE_CAP (KVM_CAP_SPLIT_IRQCHIP)"))?;
        let vcpus = make_vcpus(&parts, observers.profile_exits)?;

        let console_ready = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        let console_ready = Arc::new(console_ready.map_err(host("an eventfd"))?);
        let kicked = Arc::clone(&console_ready);
        // An eventfd refuses a write only when its counter is full; then its reader is awake.
        let kick: Kick = Arc::new(move || _ = kicked.write(1));
        let com1 = interrupts.line(layout::COM1_GSI);
        let serial = Serial::new(com1, console.serial, Arc::clone(&kick));
        let serial = Arc::new(Mutex::new(serial));
        let mut user_console: SharedConsole = serial.clone();
        let events = control.event_sink(observers.boot_mark, observers.hold_at);
        let mut machine = Machine::new(&interrupts, &events, &serial)?;
        if parts.config.generation_id {
            let boots = matches!(parts.origin, Origin::Boot(_));
            machine.attach_generation_id(&parts.mem, &interrupts, boots)?;
        }

        let hvc0 = (parts.config.console == ConsoleKind::Virtio)
            .then(|| VirtioConsole::new(console.virtio, kick, console.size));
        if let Some(hvc0) = &hvc0 {
            user_console = hvc0.port();
        }
        attach_virtio_devices(&mut machine, &mut parts, hvc0, &interrupts)?;

        match &mut parts.origin {
            Origin::Boot(_) => write_tables(&parts, &machine)?,
            Origin::Snapshot(snapshot, restored) => {
                let set = parts.fd.set_clock(&snapshot.clock());
                set.map_err(refused("KVM_SET_CLOCK"))?;
                let restored_devices = machine.state.restore(&snapshot.devices);
                restored_devices.map_err(VmError::Devices)?;
                if let Some(boot_vcpu) = vcpus.first() {
                    snapshot.working_set.bring_in(&parts.mem, &boot_vcpu.fd);
                }
                if let Some(restored) = restored.take() {
                    let mark = machine.boot_mark.lock();
                    let mut mark = mark.unwrap_or_else(PoisonError::into_inner);
                    mark.set_restored(restored);
                }
            }
        }
        times.vm_ready = Some(Instant::now());
        let vm = Self {
            vcpus: Vcpus::Still(vcpus),
            machine,
            serial,
            user_console,
            console_ready,
            control,
            parts,
        };
        if let Origin::Snapshot(..) = vm.parts.origin {
            // They hold no request of the host's.
            let _ = vm.resume_devices();
        }
        Ok(vm)
    }

    /// Starts the vCPUs, the boot vCPU last: on a thread of its own, or on one that `first_thread` gives its job to. `before` comes
    /// when all other threads are there and the guest has not begun. When this fails, the VM has ended.
    pub fn start<E: From<VmError>>(
        &mut self,
        before: impl FnOnce() -> Result<(), E>,
        first_thread: Option<TakeJob>,
    ) -> Result<(), E> {
        vcpu::install_kick_handler().map_err(|e| host("the kick signal")(e.into()))?;
        let Vcpus::Still(vcpus) = &mut self.vcpus else {
            return Ok(());
        };
        let mut vcpus = std::mem::take(vcpus).into_iter();
        let Some(boot_vcpu) = vcpus.next() else {
            return Ok(());
        };
        let mut running = Vec::with_capacity(vcpus.len() + 1);
        let start = |vcpu: Vcpu, thread| {
            let (buses, control) = (Arc::clone(&self.machine.buses), Arc::clone(&self.control));
            let vcpu = vcpu.start(buses, control, &self.parts.threads, thread);
            vcpu.map_err(VmError::from)
        };
        let start_all = || -> Result<(), E> {
            for vcpu in vcpus {
                running.push(start(vcpu, None)?);
            }
            before()?;
            running.insert(0, start(boot_vcpu, first_thread)?);
            Ok(())
        };
        let result = start_all();
        if result.is_err() {
            self.control.end(Outcome::Quit);
        }
        self.vcpus = Vcpus::Running(running);
        result
    }

    /// Has all vCPUs stand still between two instructions, with their last access to a device completed. `false` if the VM does not
    /// run or has ended meanwhile.
    pub fn pause(&self) -> bool {
        let Vcpus::Running(vcpus) = &self.vcpus else {
            return false;
        };
        if !self.control.ask_to_pause() {
            return false;
        }
        vcpus.iter().for_each(RunningVcpu::kick);
        let paused = self.control.await_pause(vcpus.len(), PAUSE_LIMIT);
        if !paused {
            self.control.resume();
        }
        paused
    }

    /// Lets paused vCPUs go on. Each tells its guest that it was paused, so that no watchdog takes it for a hang.
    pub fn resume(&self) {
        self.control.resume();
    }

    /// Has paused or restored devices go on. `false` says that the host has not completed a request for which a pause was given up:
    /// this is to be called again in a moment, and the VM can go on meanwhile.
    #[must_use]
    pub fn resume_devices(&self) -> bool {
        self.machine.state.resume()
    }

    /// The running vCPUs.
    pub(super) fn running(&self) -> &[RunningVcpu] {
        match &self.vcpus {
            Vcpus::Still(_) => &[],
            Vcpus::Running(vcpus) => vcpus,
        }
    }

    /// The connection to the socket device that the configuration reserves for the owner of the VM.
    pub fn reserved_connection(&self) -> Option<&File> {
        self.parts.socket.as_ref()?.reserved.as_ref()
    }

    /// What it was built of.
    pub(super) fn parts(&self) -> &Prepared {
        &self.parts
    }

    /// Pauses the VM for a moment and says what could wake its guest: the vCPU that sleeps least decides.
    pub fn sleep(&self) -> Sleep {
        let Vcpus::Running(vcpus) = &self.vcpus else {
            return Sleep::Awake;
        };
        if !self.pause() {
            return Sleep::Awake;
        }
        let sleep = vcpus.iter().map(RunningVcpu::sleep).min();
        self.resume();
        sleep.unwrap_or(Sleep::Awake)
    }

    /// Waits for all vCPUs' threads; a VM that has not ended is stopped.
    pub fn join(&mut self) -> End {
        self.control.end(Outcome::Quit);
        if let Vcpus::Running(vcpus) = &mut self.vcpus {
            let vcpus = std::mem::take(vcpus);
            vcpus.iter().for_each(RunningVcpu::kick);
            self.vcpus = Vcpus::Still(vcpus.into_iter().filter_map(RunningVcpu::join).collect());
        }
        self.control.how_it_ended().unwrap_or(End {
            outcome: Outcome::Quit,
            vcpu: None,
        })
    }

    /// The vCPUs before the start and after [`Vm::join`], the boot vCPU first.
    pub fn vcpus(&self) -> &[Vcpu] {
        match &self.vcpus {
            Vcpus::Still(vcpus) => vcpus,
            Vcpus::Running(_) => &[],
        }
    }

    /// What ends it, and says that it has.
    pub fn control(&self) -> &Arc<Control> {
        &self.control
    }

    /// The device that the user's terminal is connected to.
    pub fn console(&self) -> &SharedConsole {
        &self.user_console
    }

    /// All devices that send to the console, as long as they are there.
    pub fn senders(&self) -> [Weak<Mutex<dyn ConsoleDevice>>; 2] {
        [self.serial.clone(), self.user_console.clone()]
            .map(|device: SharedConsole| Arc::downgrade(&device))
    }

    /// Readable when the console's device can take input again.
    pub fn console_ready(&self) -> &EventFd {
        &self.console_ready
    }

    /// COM1.
    pub fn serial(&self) -> &Mutex<Serial> {
        &self.serial
    }

    /// The devices.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Takes the devices away from a VM that has ended, for whoever stops them: a disk may take its time.
    pub fn take_devices(&mut self) -> Arc<Buses> {
        self.machine.take_devices()
    }

    /// Guest RAM.
    pub fn mem(&self) -> &GuestMemoryMmap {
        &self.parts.mem
    }

    /// What was loaded.
    pub fn kernel(&self) -> &LoadedKernel {
        &self.parts.kernel
    }

    /// The kernel's command line.
    pub fn cmdline(&self) -> &str {
        &self.parts.cmdline
    }

    /// What it was made from.
    pub fn config(&self) -> &VmConfig {
        &self.parts.config
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.join();
    }
}

fn make_vcpus(parts: &Prepared, profiled: bool) -> Result<Vec<Vcpu>, VmError> {
    let cpus = parts.config.cpus;
    let vcpus = (0..cpus).map(|index| {
        let mut vcpu = Vcpu::new(&parts.fd, index)?;
        vcpu.profile = profiled.then(ExitProfile::default);
        Ok(vcpu)
    });
    let vcpus: Vec<Vcpu> = vcpus.collect::<Result<_, VcpuError>>()?;
    match &parts.origin {
        Origin::Boot(supported) => {
            let tsc_deadline = parts.kvm.check_extension(Cap::TscDeadlineTimer);
            set_states(&vcpus, |Vcpu { fd, index, .. }| {
                let entry = (*index == 0).then_some(parts.kernel.entry);
                arch::vcpu::set_up(fd, *index, cpus, supported, tsc_deadline, entry)
            })?;
        }
        Origin::Snapshot(snapshot, _) => {
            let support = StateSupport::of(&parts.kvm);
            let mut states = snapshot.vcpus.iter().cloned();
            // All vCPUs have the same TSC.
            let advance = snapshot.clock_advance();
            set_states(&vcpus, |vcpu| {
                let mut state = states.next().ok_or(arch::vcpu::StateError::Missing)?;
                state.advance_tsc(advance);
                state.restore(&vcpu.fd, &support, vcpu.index == 0)
            })?;
        }
    }
    Ok(vcpus)
}

fn set_states(
    vcpus: &[Vcpu],
    mut set: impl FnMut(&Vcpu) -> Result<(), arch::vcpu::StateError>,
) -> Result<(), VcpuError> {
    vcpus.iter().try_for_each(|vcpu| {
        let index = vcpu.index;
        set(vcpu).map_err(|source| VcpuError::State(index, source))
    })
}

/// Writes the tables by which a kernel finds its machine.
fn write_tables(parts: &Prepared, machine: &Machine) -> Result<(), VmError> {
    let (mem, cpus) = (&parts.mem, parts.config.cpus);
    acpi::write_tables(mem, cpus, &machine.acpi).map_err(VmError::BootTables)?;
    mptable::write(mem, cpus).map_err(VmError::BootTables)?;
    regs::write_boot_tables(mem, parts.kernel.entry).map_err(VmError::BootTables)
}
