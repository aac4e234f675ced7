//! The filter of a thread's system calls: the table's lines for its role, as a program of classic BPF (seccomp(2)).
//!
//! When a filter is installed, the kernel tries it with each number that a system call can have, and then compiles it: what counts is how
//! few instructions lie before an answer, and how many there are. So numbers are searched for as in a balanced tree.

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
const JA: u16 = 0x05;
const JEQ_K: u16 = 0x15;
const JGE_K: u16 = 0x35;
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
    let mut calls = BTreeMap::<u32, Vec<When>>::new();
    for rule in TABLE.iter().filter(|rule| rule.applies_to(role)) {
        calls.entry(rule.call as u32).or_default().push(rule.when);
    }
    let calls = calls.into_iter();
    let mut answers: BTreeMap<u32, Program> = calls
        .map(|(call, when)| (call, decide(&when, refusal)))
        .collect();
    // Their callers take another call. No filter sees the flags of clone3(2), for which the C library has clone(2), and what a
    // ring will do, which until it is restricted is anything: the disks of another boot go without.
    let absent = |error: i32| vec![answer(libc::SECCOMP_RET_ERRNO | error as u32)];
    answers.insert(libc::SYS_clone3 as u32, absent(libc::ENOSYS));
    if role == Role::Restart {
        answers.insert(libc::SYS_io_uring_setup as u32, absent(libc::EPERM));
    }
    let mut program = vec![
        load(ARCH),
        jump(JEQ_K, AUDIT_ARCH_X86_64, 1, 0),
        answer(libc::SECCOMP_RET_KILL_PROCESS),
        load(NUMBER),
    ];
    program.extend(search(&ranges(answers, refusal)));
    program
}

/// What is done with the numbers from each of these on, to the next. The last range holds all numbers of x32.
fn ranges(answers: BTreeMap<u32, Program>, refusal: u32) -> Vec<(u32, Program)> {
    let mut ranges = vec![(0, vec![answer(refusal)])];
    for (number, program) in answers {
        // A range that this number begins is empty.
        ranges.pop_if(|(first, _)| *first == number);
        ranges.push((number, program));
        ranges.push((number + 1, vec![answer(refusal)]));
    }
    ranges.dedup_by(|range, before| range.1 == before.1);
    ranges
}

/// Finds the range of the number that was loaded, in as few steps for one as for another.
fn search(ranges: &[(u32, Program)]) -> Program {
    let (low, high) = ranges.split_at(ranges.len() / 2);
    let Some((first, program)) = high.first() else {
        return Vec::new();
    };
    if low.is_empty() {
        return program.clone();
    }
    let low = search(low);
    let mut program = match u8::try_from(low.len()) {
        Ok(over) => vec![jump(JGE_K, *first, over, 0)],
        Err(_) => vec![jump(JGE_K, *first, 0, 1), jump(JA, low.len() as u32, 0, 0)],
    };
    program.extend(low);
    program.extend(search(high));
    program
}

/// What is done with a call that is allowed in any of these cases.
fn decide(cases: &[When], refusal: u32) -> Program {
    if cases.iter().any(|when| matches!(when, When::Always)) {
        return vec![ALLOW];
    }
    let mut program = Vec::new();
    for when in cases {
        match *when {
            When::Always => {}
            When::OneOf(arg, values) => program.extend(one_of(arg, values)),
            When::OwnProcess(arg) => program.extend(one_of(arg, &[getpid().as_raw_pid() as u32])),
            When::OwnThread(arg) => program.extend(one_of(arg, &[gettid().as_raw_pid() as u32])),
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

/// Allows the call if the argument has one of these values.
fn one_of(arg: u8, values: &[u32]) -> Program {
    let mut program = vec![load_arg(arg)];
    // As many as a jump can skip.
    for values in values.chunks(usize::from(u8::MAX)) {
        for (left, value) in (0..values.len() as u8).rev().zip(values) {
            program.push(jump(JEQ_K, *value, left, u8::from(left == 0)));
        }
        program.push(ALLOW);
    }
    program
}

/// The lower 32 bits of an argument.
const fn load_arg(arg: u8) -> Instruction {
    load(ARGS + 8 * arg as u32)
}

#[cfg(test)]
mod tests {
    use minivmm_devices::thread::ThreadKind;

    use super::*;

    const REFUSED: u32 = libc::SECCOMP_RET_TRAP;
    const ROLES: [Role; 8] = [
        Role::Main,
        Role::Save,
        Role::Restart,
        Role::Of(ThreadKind::Vcpu),
        Role::Of(ThreadKind::Block),
        Role::Of(ThreadKind::Rng),
        Role::Of(ThreadKind::Net),
        Role::Of(ThreadKind::Console),
    ];

    /// What the kernel would answer, and after how many instructions.
    fn interpret(program: &[Instruction], arch: u32, number: u32, args: [u32; 6]) -> (u32, usize) {
        let (mut at, mut value) = (0, 0);
        for steps in 1.. {
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
                JA => k as usize,
                JEQ_K => skip(value == k),
                JGE_K => skip(value >= k),
                JSET_K => skip(value & k != 0),
                RET_K => return (k, steps),
                _ => panic!("{code:#x}"),
            };
        }
        unreachable!()
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
                let (answer, _) = interpret(&program, AUDIT_ARCH_X86_64, number, args);
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
                let (answer, _) = interpret(&program, AUDIT_ARCH_X86_64, x32, [0; 6]);
                assert_eq!(answer, REFUSED, "{role:?} {number}");
                let (answer, _) = interpret(&program, AUDIT_ARCH_I386, number, [0; 6]);
                assert_eq!(answer, libc::SECCOMP_RET_KILL_PROCESS, "{role:?} {number}");
            }
        }
    }

    #[test]
    fn no_number_takes_more_than_sixteen_instructions_to_find() {
        for role in ROLES {
            let program = compile(role, REFUSED);
            for number in 0..600 {
                // Without those that look at arguments.
                let when = |rule: &super::super::rules::Rule| i64::from(number) == rule.call;
                if TABLE
                    .iter()
                    .filter(|rule| when(rule))
                    .all(|rule| matches!(rule.when, When::Always))
                {
                    let (_, steps) = interpret(&program, AUDIT_ARCH_X86_64, number, [0; 6]);
                    assert!(steps <= 16, "{role:?} {number}: {steps}");
                }
            }
        }
    }
}
