//! What each kind of thread may ask the host's kernel for: one table.
//!
//! A new device, or a new thing that a thread does, adds lines here; a run in mode log says which.

use std::os::raw::c_long;

use kvm_bindings::{
    kvm_clock_data, kvm_cpuid2, kvm_debugregs, kvm_enable_cap, kvm_fpu, kvm_ioeventfd,
    kvm_lapic_state, kvm_mp_state, kvm_msi, kvm_msr_list, kvm_msrs, kvm_nested_state, kvm_regs,
    kvm_sregs, kvm_translation, kvm_userspace_memory_region, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use minivmm_devices::thread::ThreadKind;
use rustix::ioctl::opcode::{none, read, read_write, write};

/// What a thread does, and so which lines of the table are its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The event loop and the end of a VM. Threads that it starts for that are held by its list too.
    Main,
    /// The same where the VM has a socket, whose name is removed.
    Socket,
    /// The same where the VM is saved, which may have one too.
    Save,
    /// The same where a guest's reset builds the VM anew: all that anybody may, and what it takes to build one.
    Restart,
    /// A thread of the VM.
    Of(ThreadKind),
}

/// A line of the table: a system call, whose it is, and with which arguments.
pub(super) struct Rule {
    pub(super) call: c_long,
    roles: &'static [Role],
    pub(super) when: When,
}

/// Which calls are meant, by their arguments, counted from 0.
#[derive(Clone, Copy)]
pub(super) enum When {
    Always,
    /// The argument's lower 32 bits, which are all of an int, have one of these values.
    OneOf(u8, &'static [u32]),
    /// The argument's lower 32 bits do not have this value.
    Not(u8, u32),
    /// None of these bits is set.
    Without(u8, u32),
    /// The argument is the number of this process.
    OwnProcess(u8),
    /// The argument is the number of this thread.
    OwnThread(u8),
}

impl Rule {
    /// Whether it is one of this role's.
    pub(super) fn applies_to(&self, role: Role) -> bool {
        let inherited = match role {
            Role::Restart => true,
            Role::Socket | Role::Save => self.roles.contains(&Role::Main),
            VSOCK_CONNECT => self.roles.contains(&VSOCK),
            _ => false,
        };
        inherited || self.roles.contains(&role)
    }
}

const fn any(call: c_long, roles: &'static [Role]) -> Rule {
    only(call, roles, When::Always)
}

const fn only(call: c_long, roles: &'static [Role], when: When) -> Rule {
    Rule { call, roles, when }
}

const VCPU: Role = Role::Of(ThreadKind::Vcpu);
const BLOCK: Role = Role::Of(ThreadKind::Block);
const RNG: Role = Role::Of(ThreadKind::Rng);
const NET: Role = Role::Of(ThreadKind::Net);
const VSOCK: Role = Role::Of(ThreadKind::Vsock);
const VSOCK_CONNECT: Role = Role::Of(ThreadKind::VsockConnect);
const CONSOLE: Role = Role::Of(ThreadKind::Console);

const ALL: &[Role] = &[Role::Main, VCPU, BLOCK, RNG, NET, VSOCK, CONSOLE];
const MAIN: &[Role] = &[Role::Main];
const SAVE: &[Role] = &[Role::Save];
const RESTART: &[Role] = &[Role::Restart];

/// <linux/kvm.h>
const KVMIO: u8 = 0xae;

/// ioctls of every thread: to restore a terminal at a crash, and to send the guest an interrupt.
const COMMON_IOCTLS: &[u32] = &[
    libc::TIOCGPGRP as u32,
    libc::TCGETS as u32,
    libc::TCSETS as u32,
    libc::TCGETS2 as u32,
    libc::TCSETS2 as u32,
    write::<kvm_msi>(KVMIO, 0xa5), // KVM_SIGNAL_MSI
];

const VCPU_IOCTLS: &[u32] = &[
    none(KVMIO, 0x80),                    // KVM_RUN
    none(KVMIO, 0xad),                    // KVM_KVMCLOCK_CTRL
    write::<kvm_ioeventfd>(KVMIO, 0x79),  // KVM_IOEVENTFD, for a queue that is busy
    read::<kvm_regs>(KVMIO, 0x81),        // KVM_GET_REGS
    read::<kvm_sregs>(KVMIO, 0x83),       // KVM_GET_SREGS
    read::<kvm_lapic_state>(KVMIO, 0x8e), // KVM_GET_LAPIC
    read::<kvm_mp_state>(KVMIO, 0x98),    // KVM_GET_MP_STATE
    read_write::<kvm_msrs>(KVMIO, 0x88),  // KVM_GET_MSRS
];

/// The terminal's size, the end of a pty, and the post-mortem.
const MAIN_IOCTLS: &[u32] = &[
    libc::TIOCGWINSZ as u32,
    libc::TIOCGPTPEER as u32,
    libc::FIONREAD as u32,
    read::<kvm_regs>(KVMIO, 0x81),              // KVM_GET_REGS
    read::<kvm_sregs>(KVMIO, 0x83),             // KVM_GET_SREGS
    read_write::<kvm_translation>(KVMIO, 0x85), // KVM_TRANSLATE
    read_write::<kvm_msrs>(KVMIO, 0x88),        // KVM_GET_MSRS
];

/// What is asked of KVM about a VM that is saved.
const SAVE_IOCTLS: &[u32] = &[
    none(KVMIO, 0x03),                           // KVM_CHECK_EXTENSION
    none(KVMIO, 0x04),                           // KVM_GET_VCPU_MMAP_SIZE
    none(KVMIO, 0xa3),                           // KVM_GET_TSC_KHZ
    read_write::<kvm_msr_list>(KVMIO, 0x02),     // KVM_GET_MSR_INDEX_LIST
    read::<kvm_clock_data>(KVMIO, 0x7c),         // KVM_GET_CLOCK
    read::<kvm_lapic_state>(KVMIO, 0x8e),        // KVM_GET_LAPIC
    read_write::<kvm_cpuid2>(KVMIO, 0x91),       // KVM_GET_CPUID2
    read::<kvm_mp_state>(KVMIO, 0x98),           // KVM_GET_MP_STATE
    read::<kvm_vcpu_events>(KVMIO, 0x9f),        // KVM_GET_VCPU_EVENTS
    read::<kvm_debugregs>(KVMIO, 0xa1),          // KVM_GET_DEBUGREGS
    read::<kvm_xsave>(KVMIO, 0xa4),              // KVM_GET_XSAVE
    read::<kvm_xcrs>(KVMIO, 0xa6),               // KVM_GET_XCRS
    read_write::<kvm_nested_state>(KVMIO, 0xbe), // KVM_GET_NESTED_STATE
    read::<kvm_xsave>(KVMIO, 0xcf),              // KVM_GET_XSAVE2
];

/// What the guest's driver accepts.
const NET_IOCTLS: &[u32] = &[libc::TUNSETOFFLOAD as u32];

/// To open a disk, and to make a VM.
const RESTART_IOCTLS: &[u32] = &[
    0x125e, // BLKROGET
    0x1268, // BLKSSZGET
    libc::FIONBIO as u32,
    none(KVMIO, 0x00),                                 // KVM_GET_API_VERSION
    none(KVMIO, 0x01),                                 // KVM_CREATE_VM
    none(KVMIO, 0x41),                                 // KVM_CREATE_VCPU
    none(KVMIO, 0x47),                                 // KVM_SET_TSS_ADDR
    read_write::<kvm_cpuid2>(KVMIO, 0x05),             // KVM_GET_SUPPORTED_CPUID
    write::<kvm_userspace_memory_region>(KVMIO, 0x46), // KVM_SET_USER_MEMORY_REGION
    write::<kvm_enable_cap>(KVMIO, 0xa3),              // KVM_ENABLE_CAP
    write::<kvm_regs>(KVMIO, 0x82),                    // KVM_SET_REGS
    write::<kvm_sregs>(KVMIO, 0x84),                   // KVM_SET_SREGS
    write::<kvm_msrs>(KVMIO, 0x89),                    // KVM_SET_MSRS
    write::<kvm_fpu>(KVMIO, 0x8d),                     // KVM_SET_FPU
    write::<kvm_lapic_state>(KVMIO, 0x8f),             // KVM_SET_LAPIC
    write::<kvm_cpuid2>(KVMIO, 0x90),                  // KVM_SET_CPUID2
    write::<kvm_mp_state>(KVMIO, 0x99),                // KVM_SET_MP_STATE
];

/// What a C library makes a thread with; musl adds CLONE_DETACHED, which does nothing.
const THREAD: u32 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID) as u32;

/// Modes of programs that run as the owner of their file.
const SET_ID: u32 = libc::S_ISUID | libc::S_ISGID;

/// None that has the kernel send signals, as F_SETOWN does.
const FILE_FLAGS: &[u32] = &[
    libc::F_SETFD as u32,
    libc::F_GETFL as u32,
    libc::F_SETFL as u32,
    libc::F_DUPFD_CLOEXEC as u32,
];

/// Conditions, by the argument's place.
const NOT_EXECUTABLE: When = When::Without(2, libc::PROT_EXEC as u32);
const NOT_SIGSYS: When = When::Not(0, libc::SIGSYS as u32);
const THREAD_NAME: When = When::OneOf(0, &[libc::PR_SET_NAME as u32, libc::PR_GET_NAME as u32]);
const IS_OPEN: When = When::OneOf(1, &[libc::F_GETFD as u32]);
const UNIX_SOCKET: When = When::OneOf(0, &[libc::AF_UNIX as u32]);
const OF_DESCRIPTOR: When = When::OneOf(2, &[libc::AT_EMPTY_PATH as u32]);
const NO_NEW_PRIVILEGES: When = When::OneOf(0, &[libc::PR_SET_NO_NEW_PRIVS as u32]);
/// <linux/io_uring.h>: IORING_REGISTER_ENABLE_RINGS.
const ENABLE_RINGS: When = When::OneOf(1, &[12]);

pub(super) const TABLE: &[Rule] = &[
    // Whatever Rust and the C library do on a thread of their own accord, its end, and a crash.
    any(libc::SYS_futex, ALL),
    any(libc::SYS_read, ALL),
    any(libc::SYS_write, ALL),
    any(libc::SYS_close, ALL),
    any(libc::SYS_poll, ALL),
    any(libc::SYS_ppoll, ALL),
    only(libc::SYS_mmap, ALL, NOT_EXECUTABLE),
    only(libc::SYS_mprotect, ALL, NOT_EXECUTABLE),
    any(libc::SYS_munmap, ALL),
    any(libc::SYS_mremap, ALL),
    any(libc::SYS_madvise, ALL),
    any(libc::SYS_brk, ALL),
    any(libc::SYS_exit, ALL),
    any(libc::SYS_exit_group, ALL),
    any(libc::SYS_gettid, ALL),
    any(libc::SYS_getpid, ALL),
    any(libc::SYS_getpgrp, ALL),
    any(libc::SYS_getpgid, ALL),
    any(libc::SYS_sched_yield, ALL),
    any(libc::SYS_sched_getaffinity, ALL),
    any(libc::SYS_clock_gettime, ALL),
    any(libc::SYS_clock_nanosleep, ALL),
    any(libc::SYS_nanosleep, ALL),
    any(libc::SYS_restart_syscall, ALL),
    any(libc::SYS_getrandom, ALL),
    any(libc::SYS_rt_sigprocmask, ALL),
    any(libc::SYS_rt_sigreturn, ALL),
    any(libc::SYS_sigaltstack, ALL),
    // The handler that ends the process at a refused call stays.
    only(libc::SYS_rt_sigaction, ALL, NOT_SIGSYS),
    only(libc::SYS_tgkill, ALL, When::OwnProcess(0)),
    only(libc::SYS_kill, ALL, When::OwnProcess(0)),
    only(libc::SYS_tkill, ALL, When::OwnThread(0)),
    only(libc::SYS_prctl, ALL, THREAD_NAME),
    // Debug builds look at a descriptor before they close it.
    only(libc::SYS_fcntl, ALL, IS_OPEN),
    only(libc::SYS_ioctl, ALL, When::OneOf(1, COMMON_IOCTLS)),
    // Event loops and queue workers.
    any(libc::SYS_epoll_wait, ALL),
    any(libc::SYS_epoll_pwait, ALL),
    // The guest.
    only(libc::SYS_ioctl, &[VCPU], When::OneOf(1, VCPU_IOCTLS)),
    // Disks.
    any(libc::SYS_pread64, &[BLOCK]),
    any(libc::SYS_pwrite64, &[BLOCK]),
    any(libc::SYS_preadv, &[BLOCK]),
    any(libc::SYS_pwritev, &[BLOCK]),
    any(libc::SYS_fallocate, &[BLOCK]),
    any(libc::SYS_fdatasync, &[BLOCK]),
    any(libc::SYS_io_uring_enter, &[BLOCK]),
    only(libc::SYS_io_uring_register, &[BLOCK], ENABLE_RINGS),
    // Networks.
    any(libc::SYS_readv, &[NET, VSOCK]),
    any(libc::SYS_writev, &[NET, VSOCK]),
    any(libc::SYS_epoll_ctl, &[NET]),
    only(libc::SYS_ioctl, &[NET], When::OneOf(1, NET_IOCTLS)),
    // passt, when it has ended.
    any(libc::SYS_wait4, &[NET]),
    // Streams to Unix sockets, and a timer for those that do not answer.
    only(libc::SYS_socket, &[VSOCK_CONNECT], UNIX_SOCKET),
    any(libc::SYS_connect, &[VSOCK_CONNECT]),
    any(libc::SYS_accept4, &[VSOCK]),
    any(libc::SYS_shutdown, &[VSOCK]),
    any(libc::SYS_epoll_ctl, &[VSOCK]),
    any(libc::SYS_timerfd_settime, &[VSOCK]),
    // The event loop, and what comes at the end.
    any(libc::SYS_epoll_ctl, MAIN),
    any(libc::SYS_eventfd2, MAIN),
    any(libc::SYS_getppid, MAIN),
    any(libc::SYS_shutdown, MAIN),
    any(libc::SYS_ftruncate, MAIN),
    // The length of what a VM was restored from.
    any(libc::SYS_fstat, MAIN),
    only(libc::SYS_statx, MAIN, OF_DESCRIPTOR),
    only(libc::SYS_ioctl, MAIN, When::OneOf(1, MAIN_IOCTLS)),
    // A thread for the end of disks, and the process that their files are left to.
    only(
        libc::SYS_clone,
        MAIN,
        When::OneOf(
            0,
            &[
                THREAD,
                THREAD | libc::CLONE_DETACHED as u32,
                libc::CLONE_FILES as u32,
            ],
        ),
    ),
    any(libc::SYS_set_robust_list, MAIN),
    any(libc::SYS_rseq, MAIN),
    // A snapshot: its file, and what goes into it.
    only(libc::SYS_ioctl, SAVE, When::OneOf(1, SAVE_IOCTLS)),
    only(libc::SYS_fcntl, SAVE, When::OneOf(1, FILE_FLAGS)),
    only(libc::SYS_openat, SAVE, When::Without(3, SET_ID)),
    // As musl makes them.
    only(libc::SYS_open, SAVE, When::Without(2, SET_ID)),
    any(libc::SYS_stat, SAVE),
    any(libc::SYS_lstat, SAVE),
    any(libc::SYS_newfstatat, SAVE),
    any(libc::SYS_statx, SAVE),
    any(libc::SYS_lseek, SAVE),
    any(libc::SYS_pread64, SAVE),
    any(libc::SYS_pwrite64, SAVE),
    any(libc::SYS_fallocate, SAVE),
    any(libc::SYS_fsync, SAVE),
    any(libc::SYS_fdatasync, SAVE),
    only(libc::SYS_fchmod, SAVE, When::Without(1, SET_ID)),
    any(libc::SYS_linkat, SAVE),
    any(libc::SYS_renameat, SAVE),
    any(libc::SYS_renameat2, SAVE),
    any(libc::SYS_unlinkat, SAVE),
    any(libc::SYS_unlink, &[Role::Save, Role::Socket]),
    any(libc::SYS_uname, SAVE),
    // Another boot, which may do all of the above as well.
    any(libc::SYS_flock, RESTART),
    // Whether a disk's file is on another machine.
    any(libc::SYS_fstatfs, RESTART),
    // The cache of kernels, whose directory is there, and must be the user's own.
    any(libc::SYS_mkdir, RESTART),
    any(libc::SYS_geteuid, RESTART),
    any(libc::SYS_epoll_create1, RESTART),
    // The socket of a socket device, and its timer.
    only(libc::SYS_socket, RESTART, UNIX_SOCKET),
    any(libc::SYS_bind, RESTART),
    any(libc::SYS_listen, RESTART),
    any(libc::SYS_timerfd_create, RESTART),
    only(libc::SYS_ioctl, RESTART, When::OneOf(1, RESTART_IOCTLS)),
    // New threads confine themselves.
    only(libc::SYS_prctl, RESTART, NO_NEW_PRIVILEGES),
    any(libc::SYS_capset, RESTART),
    any(libc::SYS_seccomp, RESTART),
    any(libc::SYS_landlock_restrict_self, RESTART),
];
