//! vCPUs: set-up, the run loop, and what each exit means.

mod run_page;

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use kvm_bindings::{CpuId, Msrs, kvm_msr_entry, kvm_sregs};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use minivmm_devices::THREAD_STACK;
use minivmm_devices::bus::Bus;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler, unblock_signal};

use crate::arch::x86_64::{cpuid, msrs, regs};
use crate::boot::Entry;
use crate::observe::timeline::{ExitProfile, Place};
use crate::vmm::outcome::Outcome;
use crate::vmm::watch::Watch;
use run_page::RunPage;

/// Why a vCPU could not be made or started.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// KVM refused a step of the set-up.
    #[error("KVM refused to {step} of vCPU {index}")]
    SetUp {
        /// What was asked of KVM.
        step: &'static str,
        /// Which vCPU.
        index: u8,
        /// What KVM said.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// An MSR was not accepted.
    #[error("KVM refused MSR {msr:#x} of vCPU {index}")]
    Msr {
        /// The MSR's index.
        msr: u32,
        /// Which vCPU.
        index: u8,
    },
    /// The host could not make a thread.
    #[error(
        "cannot start a thread for vCPU {index}; raise the limit on processes (ulimit -u, pids.max) or on memory (ulimit -v)"
    )]
    Thread {
        /// Which vCPU.
        index: u8,
        /// What the host said.
        #[source]
        source: std::io::Error,
    },
}

/// Why a vCPU cannot go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VcpuFailure {
    /// An exception while delivering a double fault (SDM vol. 3 § 6.15): the guest has no handlers left.
    TripleFault,
    /// The processor refused to enter the guest.
    EntryFailed {
        /// The hardware's reason code.
        reason: u64,
    },
    /// KVM gave up, most often because it had to emulate an instruction that it does not know.
    InternalError {
        /// KVM_INTERNAL_ERROR_*: 1 is emulation, 2 simultaneous exceptions, 3 event delivery.
        suberror: u32,
    },
    /// KVM_RUN failed.
    RunFailed {
        /// The error number.
        errno: i32,
    },
    /// An exit that minivmm does not know.
    UnknownExit(String),
}

impl fmt::Display for VcpuFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TripleFault => write!(f, "the guest triple-faulted"),
            Self::EntryFailed { reason } => {
                write!(
                    f,
                    "the processor refused to enter the guest (reason {reason:#x})"
                )
            }
            Self::InternalError { suberror: 1 } => {
                write!(f, "KVM could not emulate the guest's instruction")
            }
            Self::InternalError { suberror } => write!(f, "KVM internal error {suberror}"),
            Self::RunFailed { errno } => {
                write!(
                    f,
                    "KVM_RUN failed: {}",
                    std::io::Error::from_raw_os_error(*errno)
                )
            }
            Self::UnknownExit(exit) => write!(f, "KVM stopped with an unknown exit: {exit}"),
        }
    }
}

/// The VM's end, decided once: by the first vCPU, device or signal that reports one.
pub struct Control {
    outcome: Mutex<Option<(Outcome, Option<u8>)>>,
    stopping: AtomicBool,
    ended: EventFd,
}

impl Control {
    /// A VM that has not ended.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self {
            outcome: Mutex::new(None),
            stopping: AtomicBool::new(false),
            ended: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
        })
    }

    /// Ends the VM for this reason, unless it has ended already.
    pub fn end(&self, outcome: Outcome) {
        self.end_by(outcome, None);
    }

    fn end_by(&self, outcome: Outcome, vcpu: Option<u8>) {
        let mut slot = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        if slot.is_none() {
            *slot = Some((outcome, vcpu));
            self.stopping.store(true, Ordering::Release);
            // An eventfd refuses a write only when its counter is full; then the event loop is awake.
            let _ = self.ended.write(1);
        }
    }

    /// Readable once the VM has ended.
    pub fn ended(&self) -> &EventFd {
        &self.ended
    }

    /// Why the VM ended, and the index of the vCPU whose failure it was.
    pub fn outcome(&self) -> Option<(Outcome, Option<u8>)> {
        self.outcome
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }
}

/// The two buses that a vCPU's accesses go to.
pub struct Buses {
    /// I/O ports.
    pub pio: Bus,
    /// Memory-mapped I/O.
    pub mmio: Bus,
}

/// The last access that left the guest, for the post-mortem.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    /// I/O port, or GPA.
    pub address: u64,
    /// Whether it went to an I/O port.
    pub is_port: bool,
    /// Whether it was a write.
    pub is_write: bool,
    /// The first four bytes, little-endian.
    pub value: u32,
}

impl Access {
    fn new(address: u64, is_port: bool, is_write: bool, data: &[u8]) -> Self {
        let value = data
            .iter()
            .take(4)
            .rev()
            .fold(0, |v, b| v << 8 | u32::from(*b));
        Self {
            address,
            is_port,
            is_write,
            value,
        }
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { address, value, .. } = self;
        let verb = if self.is_write { "write of" } else { "read of" };
        let place = if self.is_port { "I/O port" } else { "address" };
        write!(f, "{verb} {value:#x} at {place} {address:#x}")
    }
}

/// A vCPU before it runs, or after.
pub struct Vcpu {
    /// KVM's handle.
    pub fd: VcpuFd,
    page: Arc<RunPage>,
    /// Its index, which is its APIC ID.
    pub index: u8,
    /// The last access that left the guest.
    pub last_access: Option<Access>,
    /// Exits from the guest, all kinds.
    pub exits: u64,
    /// More about them, for a timeline.
    pub profile: Option<ExitProfile>,
}

impl Vcpu {
    /// Makes vCPU `index` of `cpus`. `entry` is for the boot vCPU alone; the others wait for their start-up IPI.
    pub fn new(
        vm: &VmFd,
        index: u8,
        cpus: u8,
        supported: &CpuId,
        tsc_deadline: bool,
        entry: Option<Entry>,
    ) -> Result<Self, VcpuError> {
        let refused = |step| {
            move |source| VcpuError::SetUp {
                step,
                index,
                source,
            }
        };
        let fd = vm
            .create_vcpu(index.into())
            .map_err(refused("create the state"))?;
        fd.set_cpuid2(&cpuid::vcpu_cpuid(supported, index, cpus, tsc_deadline))
            .map_err(refused("set the CPUID"))?;

        let entries = msrs::boot_msrs();
        if let Ok(list) = Msrs::from_entries(&entries) {
            let set = fd.set_msrs(&list).map_err(refused("set the MSRs"))?;
            if let Some(refused) = entries.get(set) {
                return Err(VcpuError::Msr {
                    msr: refused.index,
                    index,
                });
            }
        }
        if let Some(entry) = entry {
            let sregs = fd
                .get_sregs()
                .map_err(refused("read the system registers"))?;
            let (regs, sregs) = regs::boot_registers(entry, sregs);
            fd.set_sregs(&sregs)
                .map_err(refused("set the system registers"))?;
            fd.set_regs(&regs).map_err(refused("set the registers"))?;
            fd.set_fpu(&regs::boot_fpu())
                .map_err(refused("set the floating-point state"))?;
        }
        let page = RunPage::map(&fd).map_err(|e| {
            refused("map the shared page")(kvm_ioctls::Error::new(e.raw_os_error()))
        })?;
        Ok(Self {
            fd,
            page: Arc::new(page),
            index,
            last_access: None,
            exits: 0,
            profile: None,
        })
    }

    /// Runs the vCPU on a thread of its own until the VM ends: on that of `watch`, if there is one.
    pub fn start(
        mut self,
        buses: Arc<Buses>,
        control: Arc<Control>,
        watch: Option<Watch>,
    ) -> Result<RunningVcpu, VcpuError> {
        let index = self.index;
        let page = Arc::clone(&self.page);
        let run = move |ended: Option<Outcome>| {
            if let Some(outcome) = ended {
                control.end(outcome);
            }
            // Whoever started minivmm may have blocked the signal, and a process inherits that.
            if let Err(e) = unblock_signal(SIGRTMIN()) {
                log::debug!("vCPU {index} cannot be kicked out of a guest that spins: {e:?}");
            }
            self.run(&buses, &control);
            self
        };
        let thread = match watch {
            Some(watch) => watch.hand_over(Box::new(run)),
            None => thread::Builder::new()
                .name(format!("vcpu{index}"))
                .stack_size(THREAD_STACK)
                .spawn(move || Some(run(None)))
                .map_err(|source| VcpuError::Thread { index, source })?,
        };
        Ok(RunningVcpu { thread, page })
    }

    fn run(&mut self, buses: &Buses, control: &Control) {
        if let Some(profile) = &mut self.profile {
            profile.first_run();
        }
        while !control.is_stopping() {
            match self.step(buses) {
                Ok(None) => {}
                Ok(Some(outcome)) => control.end(outcome),
                Err(failure) => control.end_by(Outcome::VcpuFailed(failure), Some(self.index)),
            }
        }
    }

    fn is_at_reset_vector(&self) -> bool {
        let registers = self
            .fd
            .get_regs()
            .and_then(|r| Ok((r, self.fd.get_sregs()?)));
        registers.is_ok_and(|(regs, sregs)| regs::are_at_reset_vector(&regs, &sregs))
    }

    /// Whether a triple fault was how Linux reboots by `reboot=t`: with an interrupt descriptor table of no size
    /// (arch/x86/kernel/idt.c, idt_invalidate). AMD processors forget that, so that there any triple fault passes.
    pub fn may_have_reset_by_triple_fault(&self) -> bool {
        let invalidated = |sregs: kvm_sregs| sregs.idt.limit == 0;
        self.is_at_reset_vector() || self.fd.get_sregs().is_ok_and(invalidated)
    }

    /// Whether KVM still tells it the time. Linux has that stopped before it reboots, but not where it resets the machine because it
    /// has panicked (arch/x86/kernel/kvm.c, kvm_guest_cpu_offline).
    pub fn has_kvm_clock_on(&self) -> bool {
        const MSR_KVM_SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;
        const ENABLED: u64 = 1;
        let entry = kvm_msr_entry {
            index: MSR_KVM_SYSTEM_TIME_NEW,
            ..Default::default()
        };
        Msrs::from_entries(&[entry]).is_ok_and(|mut msrs| {
            let known = self.fd.get_msrs(&mut msrs) == Ok(1);
            known && msrs.as_slice().iter().any(|msr| msr.data & ENABLED != 0)
        })
    }

    /// Enters the guest once and handles the exit.
    fn step(&mut self, buses: &Buses) -> Result<Option<Outcome>, VcpuFailure> {
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => return Ok(None),
            Err(e) => return Err(VcpuFailure::RunFailed { errno: e.errno() }),
        };
        self.exits += 1;
        if let Some(profile) = &mut self.profile {
            profile.exit(&exit);
        }
        match exit {
            VcpuExit::IoIn(port, data) => {
                port_read(&buses.pio, port, self.page.port_width(), data);
                self.last_access = Some(Access::new(port.into(), true, false, data));
            }
            VcpuExit::IoOut(port, data) => {
                self.last_access = Some(Access::new(port.into(), true, true, data));
                port_write(&buses.pio, port, self.page.port_width(), data);
            }
            VcpuExit::MmioRead(address, data) => {
                buses.mmio.read(address, data);
                self.last_access = Some(Access::new(address, false, false, data));
            }
            VcpuExit::MmioWrite(address, data) => {
                self.last_access = Some(Access::new(address, false, true, data));
                buses.mmio.write(address, data);
            }
            VcpuExit::InternalError => {
                let suberror = self.page.internal_error();
                // An INIT to the boot vCPU: it would start again from the firmware, and KVM finds no memory there.
                if self.is_at_reset_vector() {
                    return Ok(Some(Outcome::Reset));
                }
                return Err(VcpuFailure::InternalError { suberror });
            }
            exit => return handle_exit(&exit),
        }
        // What comes here was an access, and is done.
        if let (Some(profile), Some(access)) = (&mut self.profile, self.last_access) {
            let bus = if access.is_port {
                &buses.pio
            } else {
                &buses.mmio
            };
            profile.handled(Place {
                is_port: access.is_port,
                base: bus.base_of(access.address),
            });
        }
        Ok(None)
    }
}

/// A vCPU on its thread.
pub struct RunningVcpu {
    thread: JoinHandle<Option<Vcpu>>,
    page: Arc<RunPage>,
}

impl RunningVcpu {
    /// Makes KVM_RUN return now and whenever it is called again; the vCPU thread then sees that the VM has ended.
    pub fn kick(&self) {
        self.page.request_exit();
        if let Err(e) = self.thread.kill(SIGRTMIN()) {
            log::debug!("vCPU thread has gone: {e}");
        }
    }

    /// Waits for the thread and gives the vCPU back.
    pub fn join(self) -> Option<Vcpu> {
        self.thread.join().ok().flatten()
    }
}

/// Installs the handler of the signal that breaks KVM_RUN off. The handler does nothing: the interruption is the point.
pub fn install_kick_handler() -> Result<(), vmm_sys_util::errno::Error> {
    extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(SIGRTMIN(), ignore)
}

/// A string instruction reads one port several times: each element is an access of its own.
fn port_read(pio: &Bus, port: u16, width: u8, data: &mut [u8]) {
    for element in data.chunks_mut(usize::from(width).max(1)) {
        pio.read(port.into(), element);
    }
}

fn port_write(pio: &Bus, port: u16, width: u8, data: &[u8]) {
    for element in data.chunks(usize::from(width).max(1)) {
        pio.write(port.into(), element);
    }
}

/// What an exit that is no device access means: go on (`None`), an orderly end, or a failure.
fn handle_exit(exit: &VcpuExit<'_>) -> Result<Option<Outcome>, VcpuFailure> {
    match exit {
        VcpuExit::Intr => Ok(None),
        // Every wire is a pulse: there is nothing to do when a level-triggered interrupt ends.
        VcpuExit::IoapicEoi(_) => Ok(None),
        VcpuExit::Shutdown => Err(VcpuFailure::TripleFault),
        VcpuExit::FailEntry(reason, _) => Err(VcpuFailure::EntryFailed { reason: *reason }),
        VcpuExit::SystemEvent(kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN, _) => {
            Ok(Some(Outcome::PowerOff))
        }
        VcpuExit::SystemEvent(kvm_bindings::KVM_SYSTEM_EVENT_RESET, _) => Ok(Some(Outcome::Reset)),
        VcpuExit::SystemEvent(kvm_bindings::KVM_SYSTEM_EVENT_CRASH, _) => {
            Ok(Some(Outcome::Panicked))
        }
        other => Err(VcpuFailure::UnknownExit(format!("{other:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use minivmm_devices::bus::BusDevice;

    struct Recorder(Vec<Vec<u8>>);

    impl BusDevice for Recorder {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8 + 1);
            self.0.push(data.to_vec());
        }
        fn write(&mut self, _: u64, data: &[u8]) {
            self.0.push(data.to_vec());
        }
    }

    #[test]
    fn a_string_instruction_is_one_access_an_element() {
        let device = Arc::new(Mutex::new(Recorder(Vec::new())));
        let mut pio = Bus::default();
        pio.insert(0x10, 4, device.clone()).unwrap();
        port_write(&pio, 0x10, 2, &[1, 2, 3, 4]);
        let mut data = [0; 3];
        port_read(&pio, 0x11, 1, &mut data);
        assert_eq!(data, [2, 2, 2]);
        // A width of zero, which KVM never reports, must not divide by zero.
        port_write(&pio, 0x10, 0, &[9]);
        let seen = &device.lock().unwrap().0;
        assert_eq!(seen[..2], [vec![1, 2], vec![3, 4]]);
        assert_eq!((seen.len(), &seen[5]), (6, &vec![9]));
    }

    #[test]
    fn exits_mean_what_the_contract_says() {
        assert_eq!(handle_exit(&VcpuExit::Intr), Ok(None));
        assert_eq!(handle_exit(&VcpuExit::IoapicEoi(3)), Ok(None));
        assert_eq!(
            handle_exit(&VcpuExit::Shutdown),
            Err(VcpuFailure::TripleFault)
        );
        assert_eq!(
            handle_exit(&VcpuExit::FailEntry(0x21, 0)),
            Err(VcpuFailure::EntryFailed { reason: 0x21 })
        );
        assert_eq!(
            handle_exit(&VcpuExit::SystemEvent(1, &[])),
            Ok(Some(Outcome::PowerOff))
        );
        assert_eq!(
            handle_exit(&VcpuExit::SystemEvent(2, &[])),
            Ok(Some(Outcome::Reset))
        );
        assert!(matches!(
            handle_exit(&VcpuExit::Hyperv),
            Err(VcpuFailure::UnknownExit(_))
        ));
        assert!(matches!(
            handle_exit(&VcpuExit::Unsupported(99)),
            Err(VcpuFailure::UnknownExit(_))
        ));
    }

    #[test]
    fn the_first_end_counts() {
        let control = Control::new().unwrap();
        assert_eq!(control.outcome(), None);
        control.end(Outcome::Exit(3));
        control.end(Outcome::Deadline);
        assert_eq!(control.outcome(), Some((Outcome::Exit(3), None)));
        assert_eq!(control.ended().read().unwrap(), 1);
    }
}
