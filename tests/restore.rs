//! Ring 3: Linux guests that go on from a snapshot. Where and how it runs, see tests/linux.rs.

mod common;

use std::collections::BTreeSet;

use common::linux::{Saved, expect_restored, kernel, values, with_witnesses};
use common::terminal::Terminal;
use common::{minivmm, run};

fn cloud() -> String {
    kernel("cloud", "bzImage")
}

#[test]
fn a_restored_guest_goes_on_with_its_timers_and_its_own_time_and_randomness() {
    for (flavor, cpus) in [("cloud", 1), ("cloud", 4), ("generic", 2)] {
        expect_restored(&kernel(flavor, "bzImage"), cpus);
    }
}

#[test]
fn a_restored_guest_is_saved_and_restored_again() {
    let again =
        with_witnesses("echo generation $MINIVMM_GENERATION").replace("snapshot 7", "snapshot 8");
    let first = Saved::new(&cloud(), &[], &format!("guestctl snapshot 7; {again}"));
    let second = first.path("second");
    let at = format!("8={},exit", second.display());
    first.restore(&["--snapshot-at", &at]).assert_code(0);
    let ended = run(minivmm(&["restore"]).arg(second));
    ended
        .assert_code(0)
        .assert_printed(&["generation 2\r\n", "witnesses done\r\n"]);
}

#[test]
fn a_restored_guest_is_typed_to() {
    let saved = Saved::new(&cloud(), &[], "guestctl snapshot 7 sh");
    let terminal = Terminal::new();
    let mut session = terminal.run(minivmm(&["restore"]).arg(saved.snapshot()));
    terminal.type_in("echo $((6*7))-typed\r");
    terminal.wait_for("42-typed\r\n");
    // While the shell reads a line, Ctrl-C is no signal.
    terminal.type_in("echo run''ning; sleep 1000\r");
    terminal.wait_for("\r\nrunning\r\n");
    terminal.type_in("\x03");
    terminal.type_in("echo status $?; exit 3\r");
    terminal.wait_for("status 130");
    assert_eq!(session.status(), 3, "{}", terminal.text());
}

/// As many forks as random numbers of each kind: the kernel's, those of a process that was saved, and UUIDs.
#[track_caller]
fn expect_different(kernel: &str, count: usize, rest: &str) -> String {
    const COMMAND: &str =
        "echo this is $MINIVMM_INDEX; echo random $(head -c 16 /dev/urandom | sha256sum);
        echo uuid $(cat /proc/sys/kernel/random/uuid)";
    let saved = Saved::new(kernel, &[], &with_witnesses(&format!("{COMMAND}{rest}")));
    let mut fork = minivmm(&["fork", "-n", &count.to_string(), "-j", "2"]);
    let ended = run(fork.arg(saved.snapshot()));
    ended.assert_code(0);
    let out = ended.out();
    for index in 0..count {
        let wanted = format!("{index}: this is {index}");
        let is_there = out.lines().any(|line| line.trim_end() == wanted);
        assert!(is_there, "no {wanted:?} in: {out}");
    }
    for name in ["random ", "uuid ", "getrandom "] {
        let all: BTreeSet<&str> = values(&out, &format!(" {name}")).into_iter().collect();
        assert_eq!(all.len(), count, "{name}: {out}");
    }
    out
}

#[test]
fn forked_guests_know_who_they_are_and_differ() {
    const COUNT: usize = 4;
    const LOOK: &str =
        "; for i in $(seq 200); do dmesg | grep [c]rng.reseeded && break; usleep 50000; done";
    // Without a driver for the generation ID.
    expect_different(&cloud(), COUNT, "");
    // With one, whose line the log has.
    let out = expect_different(&kernel("6.12", "bzImage"), COUNT, LOOK);
    let reseeded = out.matches("crng reseeded due to virtual machine fork");
    assert_eq!(reseeded.count(), COUNT, "{out}");
}
