//! The filter of a thread's system calls: the table's lines for its role, as a program of classic BPF (seccomp(2)).
//!
//! When a filter is installed, the kernel checks and compiles it, which takes a time for each instruction: there are few. It also tries
//! it with each number that a system call can have, to have the answer ready where no argument matters. That takes longer than
//! filters cost in a VM's life, and the kernel gives it up at the first look at an argument: so each program begins with one.

use std::collections::BTreeMap;

use rustix::process::getpid;
use rustix::thread::gettid;

use super::rules::{Role, TABLE, When};

/// <linux/audit.h>: a call of the 64-bit table, or of x32's, whose numbers have bit 30 set.
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;

/// <linux/seccomp.h>: offsets in struct seccomp_data, all in bytes.
const NUMBER: u32 = 0;
const ARCH: u32 = 4;
const ARGS: u32 = 16;

/// <linux/bpf_common.h>
const LD_W_ABS: u16 = 0x20;
const JEQ_K: u16 = 0x15;
const JSET_K: u16 = 0x45;
const RET_K: u16 = 0x06;

/// struct sock_filter of <linux/filter.h>.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Instruction {
    code: u16,
    /// How many instructions are skipped if the comparison holds, and if not.
    jt: u8,
    jf: u8,
    k: u32,
}

type Program = Vec<Instruction>;

const fn jump(code: u16, k: u32, jt: u8, jf: u8) -> Instruction {
    Instruction { code, jt, jf, k }
}

const fn load(offset: u32) -> Instruction {
    jump(LD_W_ABS, offset, 0, 0)
}

const fn answer(action: u32) -> Instruction {
    jump(RET_K, action, 0, 0)
}

const ALLOW: Instruction = answer(libc::SECCOMP_RET_ALLOW);

/// The filter of this role, for the calling thread. `refusal` is the action for calls that the table does not have.
pub(super) fn compile(role: Role, refusal: u32) -> Program {
    let mut always = Vec::new();
    let mut others = BTreeMap::<u32, Vec<When>>::new();
    for rule in TABLE.iter().filter(|rule| rule.applies_to(role)) {
        match rule.when {
            When::Always => always.push(rule.call as u32),
            when => others.entry(rule.call as u32).or_default().push(when),
        }
    }
    // Of all other tables of system calls, none is allowed, and of x32's none has a number that is asked for.
    let mut program = vec![
        load_arg(0),
        load(ARCH),
        jump(JEQ_K, AUDIT_ARCH_X86_64, 1, 0),
        answer(libc::SECCOMP_RET_KILL_PROCESS),
    ];
    program.extend(one_of(NUMBER, &always));
    for (call, cases) in others {
        program.extend(if_call(call, decide(&cases, refusal)));
    }
    // Their callers take another call. No filter sees the flags of clone3(2), for which the C library has clone(2), and what a
    // ring will do, which until it is restricted is anything: the disks of another boot go without.
    let absent = |call, error| {
        let error = answer(libc::SECCOMP_RET_ERRNO | error as u32);
        if_call(call as u32, vec![error])
    };
    program.extend(absent(libc::SYS_clone3, libc::ENOSYS));
    if role == Role::Restart {
        program.extend(absent(libc::SYS_io_uring_setup, libc::EPERM));
    }
    program.push(answer(refusal));
    program
}

/// Does this if it is this call whose number was loaded.
fn if_call(call: u32, mut program: Program) -> Program {
    program.insert(0, jump(JEQ_K, call, 0, program.len() as u8));
    program
}

/// What is done with a call that is allowed in any of these cases.
fn decide(cases: &[When], refusal: u32) -> Program {
    let mut program = Vec::new();
    for when in cases {
        match *when {
            When::Always => {}
            When::OneOf(arg, values) => program.extend(one_of(arg_offset(arg), values)),
            When::OwnProcess(arg) => {
                program.extend(one_of(arg_offset(arg), &[getpid().as_raw_pid() as u32]));
            }
            When::OwnThread(arg) => {
                program.extend(one_of(arg_offset(arg), &[gettid().as_raw_pid() as u32]));
            }
            When::Not(arg, value) => {
                program.extend([load_arg(arg), jump(JEQ_K, value, 1, 0), ALLOW])
            }
            When::Without(arg, bits) => {
                program.extend([load_arg(arg), jump(JSET_K, bits, 1, 0), ALLOW]);
            }
        }
    }
    program.push(answer(refusal));
    program
}

/// Allows the call if what is at this offset has one of these values.
fn one_of(offset: u32, values: &[u32]) -> Program {
    let mut program = vec![load(offset)];
    // As many as a jump can skip.
    for values in values.chunks(usize::from(u8::MAX)) {
        for (left, value) in (0..values.len() as u8).rev().zip(values) {
            program.push(jump(JEQ_K, *value, left, u8::from(left == 0)));
        }
        program.push(ALLOW);
    }
    program
}

/// Where the lower 32 bits of an argument are.
const fn arg_offset(arg: u8) -> u32 {
    ARGS + 8 * arg as u32
}

const fn load_arg(arg: u8) -> Instruction {
    load(arg_offset(arg))
}

#[cfg(test)]
mod tests {
    use minivmm_devices::thread::ThreadKind;

    use super::*;

    const REFUSED: u32 = libc::SECCOMP_RET_TRAP;
    const ROLES: [Role; 11] = [
        Role::Main,
        Role::Socket,
        Role::Save,
        Role::Restart,
        Role::Of(ThreadKind::Vcpu),
        Role::Of(ThreadKind::Block),
        Role::Of(ThreadKind::Rng),
        Role::Of(ThreadKind::Net),
        Role::Of(ThreadKind::Vsock),
        Role::Of(ThreadKind::VsockConnect),
        Role::Of(ThreadKind::Console),
    ];

    /// What the kernel would answer.
    fn interpret(program: &[Instruction], arch: u32, number: u32, args: [u32; 6]) -> u32 {
        let (mut at, mut value) = (0, 0);
        loop {
            let Instruction { code, jt, jf, k } = program[at];
            let skip = |holds| usize::from(if holds { jt } else { jf });
            at += 1 + match code {
                LD_W_ABS => {
                    value = match k {
                        NUMBER => number,
                        ARCH => arch,
                        _ => {
                            assert_eq!(k % 8, 0);
                            args[(k - ARGS) as usize / 8]
                        }
                    };
                    0
                }
                JEQ_K => skip(value == k),
                JSET_K => skip(value & k != 0),
                RET_K => return k,
                _ => panic!("{code:#x}"),
            };
        }
    }

    /// What the table says.
    fn expected(role: Role, number: u32, args: [u32; 6]) -> u32 {
        if i64::from(number) == libc::SYS_clone3 {
            return libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;
        }
        if role == Role::Restart && i64::from(number) == libc::SYS_io_uring_setup {
            return libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
        }
        let arg = |arg: u8| args[usize::from(arg)];
        let allowed = TABLE.iter().any(|rule| {
            let met = match rule.when {
                When::Always => true,
                When::OneOf(of, values) => values.contains(&arg(of)),
                When::Not(of, value) => arg(of) != value,
                When::Without(of, bits) => arg(of) & bits == 0,
                When::OwnProcess(of) => arg(of) == getpid().as_raw_pid() as u32,
                When::OwnThread(of) => arg(of) == gettid().as_raw_pid() as u32,
            };
            rule.applies_to(role) && rule.call == i64::from(number) && met
        });
        if allowed {
            libc::SECCOMP_RET_ALLOW
        } else {
            REFUSED
        }
    }

    /// All that the table compares with, and neighbours of it.
    fn values() -> Vec<u32> {
        let mut values = vec![
            0,
            u32::MAX,
            std::process::id(),
            gettid().as_raw_pid() as u32,
        ];
        for rule in TABLE {
            match rule.when {
                When::OneOf(_, of) => values.extend(of),
                When::Not(_, value) | When::Without(_, value) => values.push(value),
                When::Always | When::OwnProcess(_) | When::OwnThread(_) => {}
            }
        }
        let near = |value: u32| [value, value.wrapping_add(1), value.wrapping_sub(1)];
        let mut values: Vec<_> = values.into_iter().flat_map(near).collect();
        values.sort_unstable();
        values.dedup();
        values
    }

    #[test]
    fn programs_answer_what_the_table_says() {
        let values = values();
        for role in ROLES {
            let program = compile(role, REFUSED);
            let answers = |number: u32, args| {
                let answer = interpret(&program, AUDIT_ARCH_X86_64, number, args);
                let expected = expected(role, number, args);
                assert_eq!(answer, expected, "{role:?} {number} {args:x?}");
            };
            for number in (0..600).chain([u32::MAX - 1, u32::MAX]) {
                answers(number, [u32::MAX - 7; 6]);
            }
            // Arguments matter only here, and only one at a time.
            for rule in TABLE
                .iter()
                .filter(|rule| !matches!(rule.when, When::Always))
            {
                for value in &values {
                    for arg in 0..6 {
                        let mut args = [u32::MAX - 7; 6];
                        args[arg] = *value;
                        answers(rule.call as u32, args);
                    }
                }
            }
        }
    }

    #[test]
    fn calls_of_other_tables_are_refused() {
        const AUDIT_ARCH_I386: u32 = 0x4000_0003;
        for role in ROLES {
            let program = compile(role, REFUSED);
            for number in 0..600 {
                let x32 = 0x4000_0000 | number;
                let answer = interpret(&program, AUDIT_ARCH_X86_64, x32, [0; 6]);
                assert_eq!(answer, REFUSED, "{role:?} {number}");
                let answer = interpret(&program, AUDIT_ARCH_I386, number, [0; 6]);
                assert_eq!(answer, libc::SECCOMP_RET_KILL_PROCESS, "{role:?} {number}");
            }
        }
    }

    #[test]
    fn filters_are_quick_to_install() {
        for role in ROLES {
            let program = compile(role, REFUSED);
            // Here the kernel ceases to try it with a number.
            assert_eq!(program[0], load_arg(0));
            let most = match role {
                Role::Of(_) => 110,
                Role::Main => 150,
                _ => 400,
            };
            assert!(program.len() <= most, "{role:?}: {}", program.len());
        }
    }
}
