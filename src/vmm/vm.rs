//! A VM: an object with a lifecycle.
//!
//! ```text
//!  Prepared::new      Prepared::build     Vm::start           Vm::pause
//! ---------------> Prepared ------> built --------> running <-----------> paused
//!                                     |                |      Vm::resume    |
//!                                     |  Vm::join      | an end, Vm::join   |
//!                                     +----------------+---------> ended <--+
//! ```
//!
//! All of its state is in one owner and nothing is global: one process can run several. What ends it, from wherever that comes, goes
//! through its [`Control`].

use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm, VmFd};
use minivmm_devices::THREAD_STACK;
use minivmm_devices::block::{Access, Disk, DiskOptions};
use minivmm_devices::chardev::{ConsoleDevice, ConsoleOutput, Kick, TerminalSize};
use minivmm_devices::event::{EventSink, GuestEvent};
use minivmm_devices::platform::serial::Serial;
use minivmm_devices::thread::ThreadStarter;
use minivmm_devices::virtio::blk::Block;
use minivmm_devices::virtio::console::Console as VirtioConsole;
use minivmm_devices::virtio::device::VirtioDevice;
use minivmm_devices::virtio::rng::Rng;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::control::{Control, End};
use super::error::{VmError, host, refused};
use super::machine::{self, Machine, VirtioSpec};
use super::memory;
use super::outcome::Outcome;
use super::vcpu::exit::Buses;
use super::vcpu::profile::ExitProfile;
use super::vcpu::{self, RunningVcpu, TakeJob, Vcpu};
use crate::acpi;
use crate::arch::irqchip::IrqChip;
use crate::arch::sleep::Sleep;
use crate::arch::{layout, mptable, regs};
use crate::boot::{self, BootSource, KernelFormat, LoadedKernel};
use crate::config::{DiskConfig, MemorySize, VmConfig};
use crate::host::kvm;

/// How long vCPUs may take to stand still: an exit's handling is bounded by far less.
const PAUSE_LIMIT: Duration = Duration::from_secs(10);

/// A console device, in the hands of its bus and of the console's owner.
pub type SharedConsole = Arc<Mutex<dyn ConsoleDevice>>;

/// When a VM's steps were done, as far as they were.
#[derive(Debug, Clone, Copy, Default)]
pub struct BuildTimes {
    /// Guest RAM has its addresses in the process.
    pub memory_mapped: Option<Instant>,
    /// Kernel, initrd and command line are in guest RAM.
    pub kernel_loaded: Option<Instant>,
    /// KVM has made the VM.
    pub vm_created: Option<Instant>,
    /// vCPUs, devices and tables are made.
    pub vm_ready: Option<Instant>,
}

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
    /// Whether exits are counted by kind and device.
    pub profile_exits: bool,
}

/// A VM with its memory and kernel in place.
pub struct Prepared {
    // Dropped in this order: KVM's view of the memory goes before the memory.
    fd: Arc<VmFd>,
    kvm: Arc<Kvm>,
    /// The CPUID that this host's KVM can give a guest.
    supported: CpuId,
    mem: GuestMemoryMmap,
    kernel: LoadedKernel,
    cmdline: String,
    config: VmConfig,
    /// In the order of the configuration.
    disks: Vec<Block>,
    threads: ThreadStarter,
}

impl Prepared {
    /// Opens all files, makes the VM and its RAM, and loads the kernel. The VM's threads are started by
    /// `threads`. `times` has what was reached when it fails.
    pub fn new(
        config: &VmConfig,
        threads: &ThreadStarter,
        times: &mut BuildTimes,
    ) -> Result<Self, VmError> {
        config.validate()?;
        machine::check_capacity(config)?;
        let kvm = Arc::new(kvm::open()?);
        let supported = ask_for_cpuid(&kvm);
        let cmdline = boot::suit_cmdline(&machine::cmdline_with_devices(config));
        let disks = config.disks.iter();
        let disks = disks.map(|disk| open_disk(disk, config.cpus, threads));
        let disks = disks.collect::<Result<_, _>>()?;
        let mem = memory::create(config.memory.bytes)?;
        if config.mergeable {
            memory::warn_without_ksm();
            memory::enable_ksm(&mem)?;
        }
        times.memory_mapped = Some(Instant::now());
        let cache = config.kernel_cache.then(boot::default_cache_dir).flatten();
        let kernel = boot::load(
            &mem,
            &BootSource {
                kernel: &config.kernel,
                initrd: config.initrd.as_deref(),
                cmdline: &cmdline,
                protocol: config.boot_protocol,
                rsdp: layout::ACPI_START,
                cache: cache.as_deref(),
            },
        )?;
        times.kernel_loaded = Some(Instant::now());
        if is_stock_linux(&kernel) && kvm::is_pvm() {
            return Err(VmError::SoftwareKvm {
                kernel: config.kernel.clone(),
            });
        }
        let max = kvm.get_max_vcpus();
        if usize::from(config.cpus) > max {
            return Err(VmError::TooManyCpus {
                asked: config.cpus,
                max,
            });
        }
        let fd = create_vm(&kvm)?;
        let supported = supported()?;
        // Before the memslots, where KVM would refuse the address with an error number only.
        check_address_bits(config.memory, &supported)?;
        // Memslots come before the interrupt controller: afterwards each waits for an SRCU grace period.
        memory::register(&fd, &mem)?;
        fd.set_tss_address(layout::KVM_TSS_START as usize)
            .map_err(refused("KVM_SET_TSS_ADDR"))?;
        times.vm_created = Some(Instant::now());
        Ok(Self {
            fd: Arc::new(fd),
            kvm,
            supported,
            mem,
            kernel,
            cmdline,
            config: config.clone(),
            disks,
            threads: threads.clone(),
        })
    }

    /// Makes interrupt controllers, vCPUs and devices, and writes the tables by which the guest finds them.
    pub fn build(
        mut self,
        console: ConsoleEnds,
        observers: Observers,
        times: &mut BuildTimes,
    ) -> Result<Vm, VmError> {
        let control = Arc::new(Control::new().map_err(host("an eventfd"))?);
        let interrupts = IrqChip::new(Arc::clone(&self.fd))
            .map_err(refused("KVM_ENABLE_CAP (KVM_CAP_SPLIT_IRQCHIP)"))?;
        let vcpus = self.make_vcpus(observers.profile_exits)?;

        let console_ready = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        let console_ready = Arc::new(console_ready.map_err(host("an eventfd"))?);
        let kicked = Arc::clone(&console_ready);
        // An eventfd refuses a write only when its counter is full; then its reader is awake.
        let kick: Kick = Arc::new(move || _ = kicked.write(1));
        let com1 = interrupts.line(layout::COM1_GSI);
        let serial = Serial::new(com1, console.serial, Arc::clone(&kick));
        let serial = Arc::new(Mutex::new(serial));
        let mut user_console: SharedConsole = serial.clone();
        let events = event_sink(&control, observers.boot_mark);
        let mut machine = Machine::new(&interrupts, &events, &serial)?;

        let (mut disks, mut hvc0) = (self.disks.drain(..), Some((console.virtio, kick)));
        for spec in machine::virtio_devices(&self.config) {
            let device: Option<Box<dyn VirtioDevice>> = match spec {
                VirtioSpec::Disk(..) => disks.next().map(|disk| Box::new(disk) as _),
                VirtioSpec::Rng => {
                    let rng = Rng::new(&self.threads).map_err(host("a device's thread"))?;
                    Some(Box::new(rng))
                }
                VirtioSpec::Console => hvc0.take().map(|(output, kick)| {
                    let device = VirtioConsole::new(output, kick, console.size);
                    user_console = device.port();
                    Box::new(device) as _
                }),
            };
            if let Some(device) = device {
                machine.attach_virtio(&spec.name(), device, &self.mem, &interrupts)?;
            }
        }
        drop(disks);

        let (mem, cpus) = (&self.mem, self.config.cpus);
        acpi::write_tables(mem, cpus, &machine.acpi).map_err(VmError::BootTables)?;
        mptable::write(mem, cpus).map_err(VmError::BootTables)?;
        regs::write_boot_tables(mem, self.kernel.entry).map_err(VmError::BootTables)?;
        times.vm_ready = Some(Instant::now());
        Ok(Vm {
            vcpus: Vcpus::Still(vcpus),
            machine,
            serial,
            user_console,
            console_ready,
            control,
            parts: self,
        })
    }

    fn make_vcpus(&self, profiled: bool) -> Result<Vec<Vcpu>, VmError> {
        let tsc_deadline = self.kvm.check_extension(Cap::TscDeadlineTimer);
        let cpus = self.config.cpus;
        let make = |index| {
            let entry = (index == 0).then_some(self.kernel.entry);
            let supported = &self.supported;
            let mut vcpu = Vcpu::new(&self.fd, index, cpus, supported, tsc_deadline, entry)?;
            vcpu.profile = profiled.then(ExitProfile::default);
            Ok(vcpu)
        };
        (0..cpus).map(make).collect()
    }

    /// What was loaded.
    pub fn kernel(&self) -> &LoadedKernel {
        &self.kernel
    }
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
    /// Starts the vCPUs, the boot vCPU last: on a thread of its own, or on one that `first_thread` gives its job to. `before` comes
    /// when all other threads are there and the guest has not begun. When this fails, the VM has ended.
    pub fn start(
        &mut self,
        before: impl FnOnce() -> Result<(), VmError>,
        first_thread: Option<TakeJob>,
    ) -> Result<(), VmError> {
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
            vcpu.start(buses, control, &self.parts.threads, thread)
        };
        let start_all = || -> Result<(), VmError> {
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

    /// All devices that send to the console.
    pub fn senders(&self) -> [SharedConsole; 2] {
        [self.serial.clone(), self.user_console.clone()]
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

/// Opens what a disk needs of the host.
fn open_disk(disk: &DiskConfig, cpus: u8, threads: &ThreadStarter) -> Result<Block, VmError> {
    let access = match (disk.read_only, disk.ephemeral) {
        (true, _) => Access::ReadOnly,
        (false, true) => Access::Ephemeral,
        (false, false) => Access::ReadWrite,
    };
    let options = DiskOptions {
        access,
        force_raw: disk.format.is_some(),
        block_size: disk.sector,
    };
    let opened = Disk::open(&disk.path, options)?;
    let id = disk.id.as_deref().unwrap_or_default();
    let queues = disk.queues.unwrap_or(cpus.into());
    let engine = disk.engine.unwrap_or_default();
    Block::new(opened, id, queues, engine, threads).map_err(host("a device's thread"))
}

/// What devices report, turned into the VM's end.
fn event_sink(
    control: &Arc<Control>,
    boot_mark: Option<Box<dyn Fn(u8) + Send + Sync>>,
) -> EventSink {
    let control = Arc::clone(control);
    Arc::new(move |event| match event {
        GuestEvent::PowerOff => control.end(Outcome::PowerOff),
        GuestEvent::Reset => control.end(Outcome::Reset),
        GuestEvent::Panicked => control.end(Outcome::Panicked),
        GuestEvent::Exit(status) => control.end(Outcome::Exit(status)),
        GuestEvent::BootMark(mark) => {
            if let Some(observe) = &boot_mark {
                observe(mark);
            }
        }
    })
}

/// Asks KVM which CPUID it can give a guest, on a thread of its own; what is returned waits for the answer. KVM executes some 30
/// CPUID instructions for it. Where the host is a virtual machine itself, each is an exit: 0.3 ms in all, while a kernel can be
/// loaded and a VM made.
fn ask_for_cpuid(kvm: &Arc<Kvm>) -> impl FnOnce() -> Result<CpuId, VmError> {
    let kvm = Arc::clone(kvm);
    let ask = move || kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES);
    let thread = thread::Builder::new()
        .name("cpuid".to_owned())
        .stack_size(THREAD_STACK)
        .spawn(ask.clone());
    move || {
        let answer = thread.ok().and_then(|thread| thread.join().ok());
        answer
            .unwrap_or_else(ask)
            .map_err(refused("KVM_GET_SUPPORTED_CPUID"))
    }
}

/// KVM_CREATE_VM is interrupted by any signal that arrives in it.
fn create_vm(kvm: &Kvm) -> Result<VmFd, VmError> {
    loop {
        match kvm.create_vm() {
            Err(e) if e.errno() == libc::EINTR => {}
            Err(e) if e.errno() == libc::EBUSY => return Err(VmError::Busy),
            result => return result.map_err(refused("KVM_CREATE_VM")),
        }
    }
}

/// CPUID leaf 0x80000008 EAX, bits 0-7: physical address bits.
fn check_address_bits(asked: MemorySize, supported: &CpuId) -> Result<(), VmError> {
    let bits = crate::arch::cpuid::physical_address_bits(supported);
    let end = memory::end_of_ram(asked.bytes);
    if bits < 64 && end > 1 << bits {
        return Err(VmError::TooMuchMemory { asked, end, bits });
    }
    Ok(())
}

/// Whether this is a kernel of a distribution's size and not a guest made for the purpose.
fn is_stock_linux(kernel: &LoadedKernel) -> bool {
    kernel.format == KernelFormat::BzImage || kernel.kernel_bytes > 4 << 20
}
