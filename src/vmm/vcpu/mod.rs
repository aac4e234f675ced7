//! vCPUs: each is made, started on a thread of its own, paused and resumed, and given back when the VM has ended.

pub mod exit;
pub mod profile;
mod run_page;
pub mod thread;

use std::os::fd::{AsRawFd, BorrowedFd, IntoRawFd, RawFd};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::KVM_INTERNAL_ERROR_EMULATION;
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use minivmm_devices::thread::{STACK_SIZE, ThreadKind, ThreadStarter};
use rustix::process::getpid;
use rustix::thread::gettid;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler, unblock_signal};

use super::control::{Control, Request};
use super::outcome::{Outcome, VcpuFailure};
use crate::arch;
use crate::arch::sleep::Sleep;
use exit::{BusAccess, Buses, handle_exit, port_read, port_write};
use profile::{BusRegion, ExitProfile};
use run_page::RunPage;

/// Most bytes of memory that a vCPU's thread takes, whatever its guest does: the stack, what it shares with KVM, the stack of its
/// signals, and a count of exits for each device.
pub const MEMORY_BOUND: usize = STACK_SIZE + (64 << 10);

/// Why a vCPU could not be made or started.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// KVM refused to make it.
    #[error("KVM refused to create vCPU {0}")]
    Create(u8, #[source] kvm_ioctls::Error),
    /// KVM refused its state.
    #[error("KVM refused the state of vCPU {0}")]
    State(u8, #[source] arch::vcpu::StateError),
    /// What it shares with KVM cannot be mapped.
    #[error("cannot map the state of vCPU {0}; raise the limit on memory (ulimit -v)")]
    Map(u8, #[source] std::io::Error),
    /// The host could not make a thread.
    #[error(
        "cannot start a thread for vCPU {0}; raise the limit on processes (ulimit -u, pids.max) or on memory (ulimit -v)"
    )]
    Thread(u8, #[source] std::io::Error),
}

/// What a vCPU's thread does: it runs the vCPU until the VM ends, and gives it back.
pub type Job = Box<dyn FnOnce() -> Vcpu + Send>;

/// Gives a job to a thread, which has been told to confine itself, and says how to wait for the job's end.
pub type TakeJob = Box<dyn FnOnce(Job) -> Join>;

/// Waits for a job's end.
pub type Join = Box<dyn FnOnce() -> Option<Vcpu> + Send>;

/// A vCPU that does not run.
pub struct Vcpu {
    /// KVM's handle.
    pub fd: VcpuFd,
    /// Its index, which is its APIC ID.
    pub index: u8,
    /// The last access that left the guest.
    pub last_access: Option<BusAccess>,
    /// Exits from the guest, all kinds.
    pub exits: u64,
    /// More about them, for a timeline.
    pub profile: Option<ExitProfile>,
    page: Arc<RunPage>,
    state: Arc<ThreadState>,
}

/// What a vCPU's thread tells of itself.
#[derive(Default)]
struct ThreadState {
    /// Its number, once it has one.
    id: AtomicI32,
    /// How deeply the vCPU slept when it was last paused.
    sleep: Mutex<Sleep>,
}

impl ThreadState {
    fn sleep(&self) -> MutexGuard<'_, Sleep> {
        self.sleep.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What came of entering the guest once.
enum Step {
    /// An exit was handled.
    Handled,
    /// A signal, or `immediate_exit`: no access is half done now (Documentation/virt/kvm/api.rst, KVM_RUN).
    Interrupted,
    /// The guest has ended.
    Ended(Outcome),
}

impl Vcpu {
    /// Makes vCPU `index`, which has no state yet but KVM's own.
    pub fn new(vm: &VmFd, index: u8) -> Result<Self, VcpuError> {
        let fd = vm
            .create_vcpu(index.into())
            .map_err(|source| VcpuError::Create(index, source))?;
        let page = RunPage::map(&fd).map_err(|e| VcpuError::Map(index, e.into()))?;
        Ok(Self {
            fd,
            index,
            last_access: None,
            exits: 0,
            profile: None,
            page: Arc::new(page),
            state: Arc::default(),
        })
    }

    /// Runs the vCPU until the VM ends: on `thread`, which takes a job, or on a new one.
    pub fn start(
        mut self,
        buses: Arc<Buses>,
        control: Arc<Control>,
        threads: &ThreadStarter,
        thread: Option<TakeJob>,
    ) -> Result<RunningVcpu, VcpuError> {
        let (index, page) = (self.index, Arc::clone(&self.page));
        let fd = self.fd.as_raw_fd();
        let state = Arc::clone(&self.state);
        let job = move || {
            self.state.id.store(gettid().as_raw_pid(), Ordering::SeqCst);
            // Whoever started minivmm may have blocked the signal, and a process inherits that.
            if let Err(e) = unblock_signal(SIGRTMIN()) {
                log::debug!("vCPU {index} cannot be kicked out of a guest that spins: {e:?}");
            }
            self.run(&buses, &control);
            self
        };
        let join: Join = match thread {
            Some(take) => take(Box::new(job)),
            None => {
                let thread = threads.spawn(ThreadKind::Vcpu, format!("vcpu{index}"), job);
                let thread = thread.map_err(|source| VcpuError::Thread(index, source))?;
                Box::new(move || thread.join().ok())
            }
        };
        Ok(RunningVcpu {
            join,
            fd,
            page,
            state,
        })
    }

    fn run(&mut self, buses: &Buses, control: &Control) {
        if let Some(profile) = &mut self.profile {
            profile.first_run();
        }
        loop {
            match control.request() {
                Request::Run => {
                    if self.step_or_end(buses, control) {
                        // The kick may be for a pause that was given up: the guest goes on, unless there is another request.
                        self.page.take_kick();
                    }
                }
                Request::Pause => {
                    // The one that asked may not have done it yet. With this, KVM_RUN completes the last access and goes no further.
                    self.page.kick();
                    while !self.step_or_end(buses, control) {}
                    *self.state.sleep() = Sleep::of(&self.fd).unwrap_or(Sleep::Awake);
                    control.park();
                    self.page.take_kick();
                    // The guest's watchdogs must know that it did not hang. It fails where the guest has no kvm-clock.
                    let _ = self.fd.kvmclock_ctrl();
                }
                Request::End => return,
            }
        }
    }

    /// Enters the guest once. `true` if it was interrupted, or has ended.
    fn step_or_end(&mut self, buses: &Buses, control: &Control) -> bool {
        match self.step(buses) {
            Ok(Step::Handled) => return false,
            Ok(Step::Interrupted) => {}
            Ok(Step::Ended(outcome)) => control.end(outcome),
            Err(failure) => control.end_by(Outcome::VcpuFailed(failure), Some(self.index)),
        }
        true
    }

    /// Enters the guest once and handles the exit.
    fn step(&mut self, buses: &Buses) -> Result<Step, VcpuFailure> {
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            Err(e) if e.errno() == libc::EAGAIN => return Ok(Step::Handled),
            Err(e) if e.errno() == libc::EINTR => return Ok(Step::Interrupted),
            Err(e) => return Err(VcpuFailure::RunFailed(e.errno())),
        };
        self.exits += 1;
        if let Some(profile) = &mut self.profile {
            profile.exit(&exit);
        }
        let access = match exit {
            VcpuExit::IoIn(port, data) => {
                port_read(&buses.pio, port, self.page.port_width(), data);
                BusAccess::new(port.into(), true, false, data)
            }
            VcpuExit::IoOut(port, data) => {
                port_write(&buses.pio, port, self.page.port_width(), data);
                BusAccess::new(port.into(), true, true, data)
            }
            VcpuExit::MmioRead(address, data) => {
                buses.mmio.read(address, data);
                BusAccess::new(address, false, false, data)
            }
            VcpuExit::MmioWrite(address, data) => {
                buses.mmio.write(address, data);
                BusAccess::new(address, false, true, data)
            }
            VcpuExit::InternalError => {
                let suberror = self.page.internal_error();
                // An INIT to the boot vCPU: it would start again from the firmware, and KVM finds no memory there.
                if arch::vcpu::is_at_reset_vector(&self.fd) {
                    return Ok(Step::Ended(Outcome::Reset));
                }
                return Err(match suberror {
                    KVM_INTERNAL_ERROR_EMULATION => VcpuFailure::Emulation,
                    suberror => VcpuFailure::InternalError(suberror),
                });
            }
            exit => {
                let ended = handle_exit(&exit)?;
                return Ok(ended.map_or(Step::Handled, Step::Ended));
            }
        };
        self.last_access = Some(access);
        if let Some(profile) = &mut self.profile {
            let bus = if access.is_port {
                &buses.pio
            } else {
                &buses.mmio
            };
            profile.handled(BusRegion {
                is_port: access.is_port,
                base: bus.base_of(access.address),
            });
        }
        Ok(Step::Handled)
    }
}

/// A vCPU on its thread.
pub struct RunningVcpu {
    join: Join,
    fd: RawFd,
    page: Arc<RunPage>,
    state: Arc<ThreadState>,
}

impl RunningVcpu {
    /// Makes KVM_RUN return now or when it is called next; the vCPU's thread then sees what is asked of it. To be called after the
    /// request.
    pub fn kick(&self) {
        self.page.kick();
        // One that has no number yet finds the flag when it enters the guest.
        let id = self.state.id.load(Ordering::SeqCst);
        if id != 0 {
            let process = getpid().as_raw_pid();
            #[allow(unsafe_code, reason = "musl's pthread_kill(3) names no process")]
            // SAFETY: it takes three numbers. A thread that has gone gets no signal, and one of this process that has its number now has
            // a handler for it, which does nothing.
            unsafe {
                libc::syscall(libc::SYS_tgkill, process, id, SIGRTMIN())
            };
        }
    }

    /// KVM's handle of the vCPU, which stands: its thread keeps it meanwhile.
    #[allow(unsafe_code, reason = "the descriptor is known by its number")]
    pub fn handle(&self, vm: &VmFd) -> Result<VcpuFd, kvm_ioctls::Error> {
        // SAFETY: the thread, which is parked, owns the descriptor, so it is open.
        let fd = unsafe { BorrowedFd::borrow_raw(self.fd) };
        let fd = fd
            .try_clone_to_owned()
            .map_err(|e| kvm_ioctls::Error::new(e.raw_os_error().unwrap_or(libc::EBADF)))?;
        // SAFETY: it is a vCPU of this VM, and the new handle becomes the descriptor's owner.
        unsafe { vm.create_vcpu_from_rawfd(fd.into_raw_fd()) }
    }

    /// How deeply it slept when it was last paused.
    pub fn sleep(&self) -> Sleep {
        *self.state.sleep()
    }

    /// Waits for the thread, and gives the vCPU back.
    pub fn join(self) -> Option<Vcpu> {
        (self.join)()
    }
}

/// Installs the handler of the signal that interrupts KVM_RUN. The handler does nothing: the interruption is the point.
pub fn install_kick_handler() -> Result<(), vmm_sys_util::errno::Error> {
    extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(SIGRTMIN(), ignore)
}
