//! Filters of system calls: compiled from the table, and installed on the calling thread.

use std::collections::BTreeMap;
use std::io;
use std::mem;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::raw::c_uint;

use rustix::process::getpid;
use rustix::thread::gettid;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, sock_filter,
};

use super::rules::{Role, Rule, TABLE, When};

/// <linux/bpf_common.h>
const BPF_LD_W_ABS: u16 = 0x20;
const BPF_JEQ_K: u16 = 0x15;
const BPF_JGE_K: u16 = 0x35;
const BPF_JA: u16 = 0x05;
const BPF_RET_K: u16 = 0x06;

/// Calls that are looked for one after the other. When a filter is installed, the kernel tries it with every number that there is, which
/// takes far longer without groups.
const GROUP: usize = 6;

/// What comes of a call that the table does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    /// SIGSYS.
    Signal,
    /// A listener is told, and the call made.
    Notify,
}

/// Whether the host's kernel can filter system calls like this.
pub(super) fn is_available(refusal: Refusal) -> bool {
    let action = match refusal {
        Refusal::Signal => libc::SECCOMP_RET_TRAP,
        Refusal::Notify => libc::SECCOMP_RET_USER_NOTIF,
    };
    seccomp(
        libc::SECCOMP_GET_ACTION_AVAIL,
        0,
        (&raw const action).cast(),
    )
    .is_ok()
}

/// Restricts the calling thread to what its role needs, and threads that it starts. With [`Refusal::Notify`] the result is the
/// listener, unless the thread that started this one has one already: then its list goes on to hold.
pub(super) fn install(role: Role, refusal: Refusal) -> io::Result<Option<OwnedFd>> {
    let program = compile(role, refusal).map_err(io::Error::other)?;
    let Ok(len) = program.len().try_into() else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let fprog = libc::sock_fprog {
        len,
        filter: program.as_ptr().cast_mut().cast(),
    };
    let flags = match refusal {
        Refusal::Signal => 0,
        Refusal::Notify => libc::SECCOMP_FILTER_FLAG_NEW_LISTENER as c_uint,
    };
    match (
        seccomp(
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            (&raw const fprog).cast(),
        ),
        refusal,
    ) {
        (Ok(_), Refusal::Signal) => Ok(None),
        #[allow(unsafe_code, reason = "the kernel gives a file descriptor as a number")]
        // SAFETY: the descriptor is new, and nothing else owns it.
        (Ok(fd), Refusal::Notify) => Ok(Some(unsafe { OwnedFd::from_raw_fd(fd) })),
        (Err(e), Refusal::Notify) if e.raw_os_error() == Some(libc::EBUSY) => Ok(None),
        (Err(e), _) => Err(e),
    }
}

#[allow(unsafe_code, reason = "no safe interface has seccomp(2)")]
fn seccomp(operation: c_uint, flags: c_uint, args: *const libc::c_void) -> io::Result<i32> {
    // SAFETY: the callers hand over what the operation reads: an action, or a program with its length, all of it alive.
    match unsafe { libc::syscall(libc::SYS_seccomp, operation, flags, args) } {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result as i32),
    }
}

/// The filter of this role, for the calling thread.
fn compile(role: Role, refusal: Refusal) -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules = BTreeMap::<i64, Vec<SeccompRule>>::new();
    let mut unconditional = Vec::new();
    for rule in TABLE.iter().filter(|rule| rule.applies_to(role)) {
        let of_call = rules.entry(rule.call).or_default();
        if let When::Always = rule.when {
            unconditional.push(rule.call);
        }
        of_call.extend(conditions(rule)?);
    }
    for call in unconditional {
        rules.insert(call, Vec::new());
    }
    let mut program = absent(libc::SYS_clone3, libc::ENOSYS);
    if role == Role::Restart {
        program.extend(absent(libc::SYS_io_uring_setup, libc::EPERM));
    }
    while let Some((number, _)) = rules.iter().nth(GROUP) {
        let rest = rules.split_off(&{ *number });
        let group = group(mem::replace(&mut rules, rest))?;
        // Over the group, for numbers behind it.
        program.push(instruction(BPF_JGE_K, 0, 1, first(&rules)));
        program.push(instruction(BPF_JA, 0, 0, group.len() as u32));
        program.extend(group);
    }
    program.extend(group(rules)?);
    if refusal == Refusal::Notify {
        // seccompiler has no name for it.
        for instruction in &mut program {
            if (instruction.code, instruction.k) == (BPF_RET_K, libc::SECCOMP_RET_TRAP) {
                instruction.k = libc::SECCOMP_RET_USER_NOTIF;
            }
        }
    }
    Ok(program)
}

fn first(rules: &BTreeMap<i64, Vec<SeccompRule>>) -> u32 {
    rules
        .keys()
        .next()
        .map_or(u32::MAX, |number| *number as u32)
}

/// The filter of some calls, which decides on all that reach it.
fn group(rules: BTreeMap<i64, Vec<SeccompRule>>) -> Result<BpfProgram, seccompiler::BackendError> {
    let (refused, allowed) = (SeccompAction::Trap, SeccompAction::Allow);
    SeccompFilter::new(rules, refused, allowed, TargetArch::x86_64)?.try_into()
}

fn instruction(code: u16, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

/// Instructions that answer a call with an error, and its caller takes another. No filter sees the flags of clone3(2), for which the C
/// library has clone(2), and what a ring will do, which until it is restricted is anything: the disks of another boot go
/// without.
fn absent(call: i64, error: i32) -> BpfProgram {
    vec![
        // The number of the call is the first field.
        instruction(BPF_LD_W_ABS, 0, 0, 0),
        instruction(BPF_JEQ_K, 0, 1, call as u32),
        instruction(BPF_RET_K, 0, 0, libc::SECCOMP_RET_ERRNO | error as u32),
    ]
}

/// One rule for each way in which a line of the table is met.
fn conditions(rule: &Rule) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
    let condition = |arg, operator, value: u32| {
        let condition =
            SeccompCondition::new(arg, SeccompCmpArgLen::Dword, operator, value.into())?;
        SeccompRule::new(vec![condition])
    };
    let equal = SeccompCmpOp::Eq;
    Ok(match rule.when {
        When::Always => Vec::new(),
        When::OneOf(arg, values) => {
            let rules = values
                .iter()
                .map(|value| condition(arg, equal.clone(), *value));
            rules.collect::<Result<_, _>>()?
        }
        When::Not(arg, value) => vec![condition(arg, SeccompCmpOp::Ne, value)?],
        When::Without(arg, bits) => vec![condition(arg, SeccompCmpOp::MaskedEq(bits.into()), 0)?],
        When::OwnProcess(arg) => vec![condition(
            arg,
            equal,
            getpid().as_raw_pid().cast_unsigned(),
        )?],
        When::OwnThread(arg) => vec![condition(
            arg,
            equal,
            gettid().as_raw_pid().cast_unsigned(),
        )?],
    })
}
