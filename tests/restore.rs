//! Ring 3: Linux guests that go on from a snapshot. Where and how it runs, see tests/linux.rs.

mod common;

use std::collections::BTreeSet;

use common::linux::{Saved, expect_restored, kernel};
use common::{minivmm, run};

fn cloud() -> String {
    kernel("cloud", "bzImage")
}

#[test]
fn a_restored_guest_goes_on_with_its_timers_and_its_own_time_and_randomness() {
    for cpus in ["1", "2"] {
        expect_restored(&cloud(), &["--cpus", cpus]);
    }
}

#[test]
fn a_restored_guest_is_saved_and_restored_again() {
    let command = "guestctl snapshot 8 sh -c 'sleep 1; echo generation $MINIVMM_GENERATION'";
    let first = Saved::new(&cloud(), &[], command);
    let second = first.path("second");
    let at = format!("8={},exit", second.display());
    first.restore(&["--snapshot-at", &at]).assert_code(0);
    let ended = run(minivmm(&["restore"]).arg(second));
    ended.assert_code(0).assert_printed(&["generation 2\r\n"]);
}

#[test]
fn forked_guests_know_who_they_are_and_differ() {
    const COUNT: usize = 3;
    let command = "sh -c 'echo this is $MINIVMM_INDEX: $(head -c 16 /dev/urandom | sha256sum)'";
    let saved = Saved::new(&cloud(), &[], command);
    let mut fork = minivmm(&["fork", "-n", &COUNT.to_string(), "-j", "2"]);
    let ended = run(fork.arg(saved.snapshot()));
    ended.assert_code(0);
    let out = ended.out();
    let random = |index: usize| {
        let start = format!("{index}: this is {index}: ");
        let line = out.lines().find_map(|line| line.strip_prefix(&*start));
        line.unwrap_or_else(|| panic!("no {start:?} in: {out}"))
    };
    let all: BTreeSet<&str> = (0..COUNT).map(random).collect();
    assert_eq!(all.len(), COUNT, "{out}");
}
