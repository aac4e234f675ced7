//! A VM: built in boot order, run, ended.

use std::mem;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm, VmFd};
use minivmm_devices::THREAD_STACK;
use minivmm_devices::chardev::{ConsoleDevice, Kick, TerminalSize};
use minivmm_devices::event::{EventSink, GuestEvent};
use minivmm_devices::platform::serial::Serial;
use minivmm_devices::virtio::block::{Access, Block, Disk, DiskError, DiskOptions};
use minivmm_devices::virtio::console::Console as VirtioConsole;
use vm_memory::{GuestMemoryError, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::acpi;
use crate::arch::x86_64::irqchip::Interrupts;
use crate::arch::x86_64::{layout, mptable, regs};
use crate::boot::{self, BootError, BootSource, KernelFormat, LoadedKernel};
use crate::config::{ConfigError, ConsoleKind, ConsoleTarget, MemorySize, OnReboot, VmConfig};
use crate::console::{self, Console, ConsoleError, ConsoleInput, RawTerminal};
use crate::host::kvm::{self, OpenError, open as open_kvm};
use crate::observe::post_mortem::{self, Scene};
use crate::observe::timeline::{BootMarks, Point, Timeline};
use crate::vmm::event_loop::{EventLoop, Signals};
use crate::vmm::machine::{self, DeviceManager, HostResources};
use crate::vmm::memory::{self, MemoryError};
use crate::vmm::outcome::Outcome;
use crate::vmm::release;
use crate::vmm::vcpu::{self, Control, RunningVcpu, Vcpu, VcpuError, VcpuFailure};
use crate::vmm::watch::Watch;

/// The log's target for what the user has to know to go on, which is no warning.
pub const NOTICE: &str = "minivmm::notice";

/// After a stop from outside, the last console output may take so long to be read.
pub(crate) const FLUSH: Duration = Duration::from_millis(50);

/// A console device, in the hands of its bus and of the event loop.
type SharedConsole = Arc<Mutex<dyn ConsoleDevice>>;

/// What is to be logged when a VM has ended and its console is done.
type LastWords = Vec<(log::Level, String)>;

/// Why a VM could not be built or run.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// The configuration is impossible.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// More devices than the machine has room for.
    #[error(
        "{0} disks, entropy devices and consoles: the machine has room for {max}",
        max = layout::MAX_VIRTIO_DEVICES
    )]
    TooManyDevices(usize),
    /// The console cannot be opened.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// Kernel or initrd cannot be loaded.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A disk cannot be had.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// Guest RAM cannot be made.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A vCPU cannot be made.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// No KVM for this process.
    #[error(transparent)]
    OpenKvm(#[from] OpenError),
    /// Another hypervisor has the processor.
    #[error(
        "KVM refused to create a VM: another hypervisor (VirtualBox, VMware) holds the processor's virtualization; stop it"
    )]
    Busy,
    /// KVM refused a step of the set-up.
    #[error("KVM refused to {step}")]
    Kvm {
        /// What was asked of KVM.
        step: &'static str,
        /// What KVM said.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// More vCPUs than KVM makes.
    #[error("this host's KVM makes {max} vCPUs at most, not {asked}: give a smaller --cpus")]
    TooManyCpus {
        /// From the configuration.
        asked: u8,
        /// KVM's limit.
        max: usize,
    },
    /// More memory than the processor can address.
    #[error(
        "{asked} of guest memory end at {end:#x}, beyond the {bits} physical address bits of this host: give a smaller \
         --memory"
    )]
    TooMuchMemory {
        /// From the configuration.
        asked: MemorySize,
        /// First GPA behind the RAM.
        end: u64,
        /// What CPUID says of the host.
        bits: u8,
    },
    /// A stock kernel, on a KVM that cannot run one.
    #[error(
        "this host's KVM is PVM, without hardware virtualization: it emulates {} so slowly that it would seem to hang; run \
         minivmm on a host with VT-x or AMD-V, or in the lab: tests/lab/run (`minivmm doctor` tells more)",
        kernel.display()
    )]
    SoftwareKvm {
        /// The kernel.
        kernel: PathBuf,
    },
    /// Guest memory refused an access within RAM.
    #[error("cannot write the boot tables to guest memory")]
    BootTables(#[source] GuestMemoryError),
    /// Two devices claim one address.
    #[error("cannot lay out the devices")]
    Bus(#[from] minivmm_devices::bus::BusError),
    /// The host refused an event source.
    #[error("cannot set up {what}")]
    Host {
        /// What was to be set up.
        what: &'static str,
        /// What the host said.
        #[source]
        source: std::io::Error,
    },
}

fn host(what: &'static str) -> impl FnOnce(std::io::Error) -> VmError {
    move |source| VmError::Host { what, source }
}

fn refused(step: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> VmError {
    move |source| VmError::Kvm { step, source }
}

/// From now on, signals that ask minivmm to end, and the deadline, end the process.
///
/// To be called from a process's first thread, before it has others: signals are blocked for all that follow.
pub fn watch(deadline: Option<Instant>) -> Result<Watch, VmError> {
    let signals = Signals::block().map_err(host("signal handling"))?;
    start_watch(&Arc::new(signals), deadline, None)
}

fn start_watch(
    signals: &Arc<Signals>,
    deadline: Option<Instant>,
    console: Option<Console>,
) -> Result<Watch, VmError> {
    Watch::start(Arc::clone(signals), deadline, console)
        .map_err(|source| VcpuError::Thread { index: 0, source }.into())
}

/// Builds the VM that `config` describes and runs it to its end, again after every reset if the configuration wants it.
/// `started` is where the deadline counts from; what happens when goes to `timeline`. While the VM is not ready for signals
/// and deadline, `watch` is.
pub fn run(
    config: &VmConfig,
    started: Instant,
    watch: Watch,
    timeline: &mut Timeline,
) -> Result<Outcome, VmError> {
    config.validate()?;
    machine::check_capacity(config)?;
    let signals = Arc::clone(watch.signals());
    vcpu::install_kick_handler().map_err(|e| host("the kick signal")(e.into()))?;
    let deadline = config.deadline.and_then(|span| span.after(started));
    watch.set_deadline(deadline);

    // Files and KVM are looked at before the terminal is touched, so that errors are read on a sane one.
    if config.mergeable {
        memory::warn_without_ksm();
    }
    let vm = Vm::prepare(config, timeline)?;
    let (console, mut input) = Console::open(&config.serial)?;
    let terminal = match config.serial {
        ConsoleTarget::Stdio => RawTerminal::enter().map_err(host("the terminal"))?,
        _ => None,
    };
    if let Some(path) = console.pty_path() {
        log::info!(target: NOTICE, "the console is {}", path.display());
    }
    let ended = run_boots(vm, watch, config, &console, &mut input, deadline, timeline);
    // A guest that ended by itself, or cannot be started again, has its last words delivered however slow the reader is.
    // Whoever stops a VM does not want to wait for that.
    let stopped = ended
        .as_ref()
        .is_ok_and(|(outcome, _)| outcome.is_external());
    let limit = Instant::now() + FLUSH;
    console.finish(&|| {
        let late = Instant::now() > limit;
        if late {
            // Keys go nowhere any more; cooked, Ctrl-C at least is a signal.
            console::restore_terminal();
        }
        signals.stop_requested().is_some()
            || (stopped && late)
            || deadline.is_some_and(|deadline| Instant::now() > deadline)
    });
    if console.bytes_dropped() > 0 {
        log::info!(
            "{} bytes of console output went nowhere",
            console.bytes_dropped()
        );
    }
    // Behind the guest's last words, and on a terminal that is no longer raw.
    drop(terminal);
    let (outcome, last_words) = ended?;
    say(last_words);
    Ok(outcome)
}

/// Runs the VM to its end, and again after every reset if the configuration wants it.
fn run_boots(
    mut vm: Vm,
    mut watch: Watch,
    config: &VmConfig,
    console: &Console,
    input: &mut ConsoleInput,
    deadline: Option<Instant>,
    timeline: &mut Timeline,
) -> Result<(Outcome, LastWords), VmError> {
    loop {
        let signals = Arc::clone(watch.signals());
        console.start_of_vm(timeline.watches_boot());
        let (outcome, last_words) = vm
            .boot(console, input.terminal_size(), timeline)?
            .run(watch, input, deadline, timeline)?;
        if outcome != Outcome::Reset || config.on_reboot != OnReboot::Restart {
            return Ok((outcome, last_words));
        }
        say(last_words);
        log::info!("the guest reset the machine: booting again");
        watch = start_watch(&signals, deadline, Some(console.clone()))?;
        vm = Vm::prepare(config, timeline)?;
    }
}

fn say(words: LastWords) {
    for (level, text) in words {
        log::log!(level, "{text}");
    }
}

/// A VM with its memory and kernel in place.
struct Vm {
    // Dropped in this order: KVM's view of the memory goes before the memory.
    fd: Arc<VmFd>,
    kvm: Arc<Kvm>,
    /// The CPUID that this host's KVM can give a guest.
    supported: CpuId,
    mem: GuestMemoryMmap,
    kernel: LoadedKernel,
    cmdline: String,
    cpus: u8,
    console: ConsoleKind,
    has_disks: bool,
    resources: HostResources,
}

impl Vm {
    /// Makes the VM and its RAM, and loads the kernel.
    fn prepare(config: &VmConfig, timeline: &mut Timeline) -> Result<Self, VmError> {
        let kvm = Arc::new(open_kvm()?);
        let supported = ask_for_cpuid(&kvm);
        let cmdline = boot::suit_cmdline(&machine::cmdline_with_devices(config));
        let resources = open_resources(config)?;
        let mem = memory::create(config.memory.bytes)?;
        if config.mergeable {
            memory::let_merge(&mem)?;
        }
        timeline.note(Point::MemoryMapped);
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
        timeline.note_kernel(&kernel);

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
        // Before the memslots, where KVM would refuse the address with an error number alone.
        check_address_bits(config.memory, &supported)?;
        // Memslots come before the interrupt controller: afterwards each waits for an SRCU grace period.
        memory::register(&fd, &mem)?;
        fd.set_tss_address(layout::KVM_TSS_START as usize)
            .map_err(refused("place its scratch pages"))?;
        timeline.note(Point::VmCreated);
        Ok(Self {
            fd: Arc::new(fd),
            kvm,
            supported,
            mem,
            kernel,
            cmdline,
            cpus: config.cpus,
            console: config.console,
            has_disks: !resources.disks.is_empty(),
            resources,
        })
    }

    /// Makes interrupt controllers, vCPUs and devices, and writes the tables by which the guest finds them.
    fn boot(
        mut self,
        console: &Console,
        size: Option<TerminalSize>,
        timeline: &mut Timeline,
    ) -> Result<BootedVm, VmError> {
        let control = Arc::new(Control::new().map_err(host("an eventfd"))?);
        let interrupts = Interrupts::new(Arc::clone(&self.fd)).map_err(refused(
            "split the interrupt controller (KVM_CAP_SPLIT_IRQCHIP)",
        ))?;

        let tsc_deadline = self.kvm.check_extension(Cap::TscDeadlineTimer);
        let vcpus = (0..self.cpus)
            .map(|index| {
                let entry = (index == 0).then_some(self.kernel.entry);
                Vcpu::new(
                    &self.fd,
                    index,
                    self.cpus,
                    &self.supported,
                    tsc_deadline,
                    entry,
                )
            })
            .collect::<Result<Vec<_>, _>>()?;

        let guest_ready = Arc::new(
            EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(host("an eventfd"))?,
        );
        let kicked = Arc::clone(&guest_ready);
        // An eventfd refuses a write only when its counter is full; then the event loop is awake.
        let kick: Kick = Arc::new(move || _ = kicked.write(1));
        let com1 = interrupts.line(layout::COM1_GSI);
        let serial = Serial::new(com1, console.sink(), Arc::clone(&kick));
        let virtio = (self.console == ConsoleKind::Virtio)
            .then(|| VirtioConsole::new(console.sink(), kick, size));
        let port = virtio.as_ref().map(VirtioConsole::port);
        let devices = DeviceManager::new(
            &interrupts,
            &event_sink(&control, timeline.boot_marks()),
            &self.mem,
            serial,
            virtio,
            mem::take(&mut self.resources),
        )?;
        let serial = Arc::clone(&devices.serial);
        let com1: SharedConsole = serial.clone();
        let user_console = port.unwrap_or_else(|| com1.clone());
        // COM1 sends to the same place, the input is the console's alone.
        let senders = [&com1, &user_console].map(Arc::downgrade);
        console.on_output_ready(Arc::new(move || {
            for sender in senders.iter().filter_map(Weak::upgrade) {
                sender
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .output_ready();
            }
        }));

        acpi::write_tables(&self.mem, self.cpus, &devices.acpi).map_err(VmError::BootTables)?;
        mptable::write(&self.mem, self.cpus).map_err(VmError::BootTables)?;
        regs::write_boot_tables(&self.mem, self.kernel.entry).map_err(VmError::BootTables)?;
        timeline.note(Point::VmReady);
        Ok(BootedVm {
            vcpus,
            devices,
            serial,
            user_console,
            control,
            guest_ready,
            console: console.clone(),
            vm: self,
        })
    }
}

impl Vm {
    /// What the machine's end says of its kernel, and the message of a panic that did not come to the console.
    fn explain(
        &self,
        ended: Outcome,
        culprit: Option<&Vcpu>,
        vcpus: &[Vcpu],
        console: &Console,
    ) -> (Outcome, Option<String>) {
        let is_reset = match ended {
            Outcome::Reset => true,
            Outcome::VcpuFailed(VcpuFailure::TripleFault) => {
                boot::reboots_by_triple_fault(&self.cmdline)
                    && culprit.is_some_and(Vcpu::may_have_reset_by_triple_fault)
            }
            _ => false,
        };
        if !is_reset {
            return (ended, None);
        }
        // Early in its boot a kernel cannot tell pvpanic: the panic is a line on the console, then a reset.
        if console.saw_panic() {
            return (Outcome::Panicked, None);
        }
        // If nobody hears that console, the line is still in its log.
        let unheard = vcpus
            .iter()
            .any(Vcpu::has_kvm_clock_on)
            .then(|| self.panic_message());
        match unheard.flatten() {
            Some(message) => (Outcome::Panicked, Some(message)),
            None => (Outcome::Reset, None),
        }
    }

    fn panic_message(&self) -> Option<String> {
        boot::panic_message(&self.mem, &self.kernel.kernel_range)
    }

    /// What to do after what looks like the last line of a panic, after which a kernel hangs: end, unless somebody prints an old log,
    /// which the kernel's own does not have.
    fn on_panic_end(&self, control: &Arc<Control>) -> Arc<dyn Fn() + Send + Sync> {
        let (mem, kernel) = (self.mem.clone(), self.kernel.kernel_range.clone());
        let control = Arc::clone(control);
        Arc::new(move || {
            if boot::panic_message(&mem, &kernel).is_some() {
                control.end(Outcome::Panicked);
            }
        })
    }
}

/// A VM that is ready for its first instruction.
struct BootedVm {
    vcpus: Vec<Vcpu>,
    devices: DeviceManager,
    serial: Arc<Mutex<Serial>>,
    /// The device that the user's terminal is connected to.
    user_console: SharedConsole,
    control: Arc<Control>,
    guest_ready: Arc<EventFd>,
    console: Console,
    vm: Vm,
}

impl BootedVm {
    /// Runs the VM to its end and stops all of its threads.
    fn run(
        self,
        watch: Watch,
        input: &mut ConsoleInput,
        deadline: Option<Instant>,
        timeline: &mut Timeline,
    ) -> Result<(Outcome, LastWords), VmError> {
        let signals = Arc::clone(watch.signals());
        let events = EventLoop::new(&self.control, &signals, input, self.guest_ready, deadline)
            .map_err(host("the event loop"))?;
        self.console
            .on_panic_end(Some(self.vm.on_panic_end(&self.control)));
        let buses = Arc::new(self.devices.buses);
        let mut running: Vec<RunningVcpu> = Vec::with_capacity(self.vcpus.len());
        let mut started = Ok(());
        let mut watch = Some(watch);
        for mut vcpu in self.vcpus {
            vcpu.profile = timeline.exit_profile();
            match vcpu.start(Arc::clone(&buses), Arc::clone(&self.control), watch.take()) {
                Ok(vcpu) => running.push(vcpu),
                Err(e) => {
                    started = Err(e);
                    self.control.end(Outcome::Quit);
                    break;
                }
            }
        }
        let looped = events.run(&self.user_console);
        // Should the loop itself have failed, the vCPUs are still to be told.
        self.control.end(Outcome::Quit);
        running.iter().for_each(RunningVcpu::kick);
        let vcpus: Vec<Vcpu> = running.into_iter().filter_map(RunningVcpu::join).collect();
        self.console.on_panic_end(None);
        let profiles = vcpus.iter().filter_map(|vcpu| vcpu.profile.as_ref());
        let (phases, bytes) = (self.console.phases(), self.console.bytes_out());
        timeline.end_of_boot(profiles, phases, bytes, &self.vm.mem);

        let (ended, culprit) = self.control.outcome().unwrap_or((Outcome::Quit, None));
        let reads = buses.pio.unclaimed_reads() + buses.mmio.unclaimed_reads();
        let writes = buses.pio.unclaimed_writes() + buses.mmio.unclaimed_writes();
        let interrupted = if self.vm.has_disks {
            release::release(buses, &self.vm.mem, &ended, &signals, deadline)
        } else {
            drop(buses);
            None
        };
        started?;
        looped.map_err(host("the event loop"))?;

        let culprit = vcpus.get(usize::from(culprit.unwrap_or(0)));
        let (mut outcome, unheard) = self.vm.explain(ended, culprit, &vcpus, &self.console);
        // A guest that ended by itself has its own status, but is not booted again.
        if let (Outcome::Reset, Some(stop)) = (&outcome, interrupted) {
            outcome = stop;
        }
        let summary = format!(
            "the VM ended: {outcome:?}; vCPU exits: {}; unclaimed accesses: {reads} reads, {writes} writes",
            vcpus.iter().map(|v| v.exits).sum::<u64>(),
        );
        let mut last_words = vec![(log::Level::Info, summary)];
        if let Some(message) = unheard {
            let error = format!(
                "the guest's kernel panicked, and did not say so on the console: {message}; does its command line name {}?",
                self.vm.console.parameter()
            );
            last_words.push((log::Level::Error, error));
        }
        let lost = self
            .serial
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .dropped();
        if lost > 0 {
            let warning = format!(
                "{lost} bytes of console output were lost: the guest did not wait for their reader"
            );
            last_words.push((log::Level::Warn, warning));
        }
        let console_bytes = self.console.bytes_out();
        if let Some(level) = post_mortem::level(&outcome, console_bytes)
            && log::log_enabled!(level)
            && let Some(vcpu) = culprit
        {
            let scene = Scene {
                outcome: &outcome,
                vcpu,
                mem: &self.vm.mem,
                kernel: &self.vm.kernel,
                console: self.vm.console,
                console_bytes,
                cmdline: &self.vm.cmdline,
            };
            last_words.push((level, format!("{}\n{}", scene.headline(), scene.report())));
        }
        Ok((outcome, last_words))
    }
}

/// Opens what the devices need: before the terminal is touched, and before time is spent on anything else.
fn open_resources(config: &VmConfig) -> Result<HostResources, VmError> {
    let disks = config
        .disks
        .iter()
        .map(|disk| {
            let queues = disk.queues.unwrap_or(config.cpus.into());
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
            let engine = disk.engine.unwrap_or_default();
            Block::new(opened, id, queues, engine).map_err(host("an eventfd"))
        })
        .collect::<Result<_, VmError>>()?;
    Ok(HostResources {
        disks,
        rng: config.rng,
    })
}

/// What devices report, turned into the VM's end.
fn event_sink(control: &Arc<Control>, marks: Option<BootMarks>) -> EventSink {
    let control = Arc::clone(control);
    Arc::new(move |event| match event {
        GuestEvent::PowerOff => control.end(Outcome::PowerOff),
        GuestEvent::Reset => control.end(Outcome::Reset),
        GuestEvent::Panicked => control.end(Outcome::Panicked),
        GuestEvent::Exit(status) => control.end(Outcome::Exit(status)),
        GuestEvent::BootMark(mark) => {
            if let Some(marks) = &marks {
                marks.note(mark);
            }
            log::info!("boot mark {mark}");
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
            .map_err(refused("tell the CPUID that it supports"))
    }
}

/// KVM_CREATE_VM is broken off by any signal that arrives in it.
fn create_vm(kvm: &Kvm) -> Result<VmFd, VmError> {
    loop {
        match kvm.create_vm() {
            Err(e) if e.errno() == libc::EINTR => {}
            Err(e) if e.errno() == libc::EBUSY => return Err(VmError::Busy),
            result => return result.map_err(refused("create a VM")),
        }
    }
}

/// CPUID leaf 0x80000008 EAX, bits 0-7: physical address bits.
fn check_address_bits(asked: MemorySize, supported: &CpuId) -> Result<(), VmError> {
    let leaf = supported
        .as_slice()
        .iter()
        .find(|e| e.function == 0x8000_0008);
    let bits = leaf.map_or(36, |e| e.eax as u8);
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
