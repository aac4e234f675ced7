//! Ring 3: Linux guests that go on from a snapshot. Where and how it runs, see tests/linux.rs. With MINIVMM_TEST_LONG set, on each
//! kernel, with more vCPUs and as often as it takes to see what happens seldom.

mod common;

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use common::limit::watch;
use common::linux::{Saved, expect_restored, is_long, kernel, now, rounds, values, with_witnesses};
use common::terminal::Terminal;
use common::{minivmm, run};

fn cloud() -> String {
    kernel("cloud", "bzImage")
}

/// Kernels, each with a number of vCPUs: these, or all of them.
fn kernels(usual: &[(&'static str, usize)]) -> Vec<(String, usize)> {
    let all: Vec<_> = ["cloud", "generic", "6.12", "small"]
        .into_iter()
        .flat_map(|flavor| [1, 2, 4].map(|cpus| (flavor, cpus)))
        .collect();
    let kernels = if is_long() { &all } else { usual };
    let path = |(flavor, cpus): &(&str, usize)| {
        eprintln!("{flavor}, {cpus} vCPUs");
        (kernel(flavor, "bzImage"), *cpus)
    };
    kernels.iter().map(path).collect()
}

#[test]
fn a_restored_guest_goes_on_with_its_timers_and_its_own_time_and_randomness() {
    for (kernel, cpus) in kernels(&[("cloud", 1), ("cloud", 4), ("generic", 2)]) {
        expect_restored(&kernel, cpus);
    }
}

#[test]
fn a_restored_guest_is_saved_and_restored_again() {
    for (kernel, cpus) in kernels(&[("cloud", 2)]) {
        let again = with_witnesses("echo generation $MINIVMM_GENERATION")
            .replace("snapshot 7", "snapshot 8");
        let args = ["--cpus", &cpus.to_string()];
        let first = Saved::new(&kernel, &args, &format!("guestctl snapshot 7; {again}"));
        let second = first.path("second");
        let at = format!("8={},exit", second.display());
        first.restore(&["--snapshot-at", &at]).assert_code(0);
        let ended = run(minivmm(&["restore"]).arg(second));
        ended
            .assert_code(0)
            .assert_printed(&["generation 2\r\n", "witnesses done\r\n"]);
    }
}

#[test]
fn a_restored_guest_is_typed_to() {
    for (kernel, cpus) in kernels(&[("cloud", 1)]) {
        let args = ["--cpus", &cpus.to_string()];
        let saved = Saved::new(&kernel, &args, "guestctl snapshot 7 sh");
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
}

#[test]
fn an_idle_guest_goes_on_each_time() {
    let script = "guestctl snapshot 7 sh -c 'usleep 100000; echo awake'";
    let saved = Saved::new(&cloud(), &["--cpus", "2"], script);
    for _ in 0..rounds(10, 200) {
        let ended = saved.restore(&[]);
        ended.assert_code(0).assert_printed(&["awake\r\n"]);
    }
}

/// How many microseconds a restored guest's clock is off at most. Whatever way question and answer take, the guest read its clock
/// between them.
#[track_caller]
fn clock_error(saved: &Saved, args: &[&str]) -> u128 {
    let mut command = minivmm(&["restore"]);
    command.arg(saved.snapshot()).args(args);
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    let _watched = watch(&child);
    let mut stdin = child.stdin.take().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut ask = || {
        let asked = now();
        stdin.write_all(b"?\r").unwrap();
        loop {
            let line = lines.next().expect("the time").unwrap();
            // To the guest, the minute was none in which it hung.
            assert!(!line.contains("lockup"), "{line}");
            if let Some(time) = values(&line, "wall ").first() {
                let time: u128 = time.parse().unwrap();
                return now().abs_diff(time).max(time.abs_diff(asked));
            }
        }
    };
    // What the machine had no time for makes the way longer.
    let error = (0..50).map(|_| ask()).min().unwrap();
    // End of file, in a terminal's way.
    stdin.write_all(b"\x04").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
    error
}

#[test]
fn the_clock_is_right_a_minute_after_the_snapshot() {
    const TOLERANCE: u128 = 100_000;
    let cases = [("cloud", "continue"), ("6.12", "realtime")];
    let saved = cases.map(|(flavor, clock)| {
        let script = "guestctl snapshot 7 witness clock";
        let saved = Saved::new(&kernel(flavor, "bzImage"), &["--cpus", "2"], script);
        (flavor, clock, saved)
    });
    thread::sleep(Duration::from_secs(60));
    for (flavor, clock, saved) in saved {
        let error = clock_error(&saved, &["--clock", clock]);
        eprintln!("{flavor}, --clock {clock}: off by at most {error} us");
        assert!(error < TOLERANCE, "{flavor}, {clock}: {error}");
    }
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
    let count = rounds(4, 50);
    const LOOK: &str =
        "; for i in $(seq 200); do dmesg | grep [c]rng.reseeded && break; usleep 50000; done";
    // Without a driver for the generation ID.
    expect_different(&cloud(), count, "");
    // With one, whose line the log has.
    let out = expect_different(&kernel("6.12", "bzImage"), count, LOOK);
    let reseeded = out.matches("crng reseeded due to virtual machine fork");
    assert_eq!(reseeded.count(), count, "{out}");
}
