//! A guest that has broken out: what it can ask the host for in each kind of thread. The binary is a build of its own, in which a
//! port carries out what code would that has taken over a thread.

mod common;

use std::sync::{Mutex, MutexGuard, PoisonError};

use common::skip::skip;
use common::tap::Tap;
use common::{Ended, boot_tiny, run};
use minivmm::sandbox::landlock_version;
use rustix::process::geteuid;
use tempfile::NamedTempFile;

/// What the guest ends with when the host's kernel has done, or answered, the call.
const DONE: i32 = 77;

/// Letters of tests/attack/port.rs.
const THREADS: [(char, &str); 6] = [
    ('v', "vcpu0"),
    ('b', "virtio-blk 0"),
    ('r', "virtio-rng"),
    ('n', "virtio-net"),
    ('c', "console"),
    ('m', "minivmm"),
];

/// Letters of tests/attack/port.rs, and what is called, as the sandbox says it.
const CALLS: [(char, &str); 17] = [
    ('x', "execve ("),
    ('o', "openat ("),
    ('s', "socket ("),
    ('t', "ptrace ("),
    ('m', "mount ("),
    ('c', "clone ("),
    ('k', "kill ("),                // of another process
    ('u', "io_uring_setup ("),      // to open by a ring of its own
    ('v', "ioctl (16) 0xae01"),     // KVM_CREATE_VM
    ('y', "ioctl (16) 0x4020ae46"), // KVM_SET_USER_MEMORY_REGION
    ('e', "mmap ("),                // to be executed
    ('f', "memfd_create ("),
    ('g', "tgkill ("),          // of another process
    ('i', "ioctl (16) 0x5412"), // TIOCSTI
    ('w', "fcntl ("),           // F_SETOWN
    ('d', "fchmod ("),          // to set-user-ID
    ('p', "prctl ("),           // PR_SET_DUMPABLE
];

fn attack(call: char, thread: char, args: &[&str]) -> Ended {
    let disk = NamedTempFile::new().unwrap();
    disk.as_file().set_len(4096).unwrap();
    let disk = format!("path={},ro,queues=1", disk.path().display());
    let _tap = (thread == 'n').then(tap);
    // The guest starts the first two devices.
    let first = match thread {
        'n' => ["--net", "tap=mvattack"],
        _ => ["--disk", &disk],
    };
    let given = [&first[..], &["--rng", "-v", "--deadline", "60s"]].concat();
    let cmdline = format!("{call}{thread}");
    run(&mut boot_tiny("attack", &cmdline, &[&given, args].concat()))
}

/// What a network device is on, for one VM at a time.
fn tap() -> (Tap, MutexGuard<'static, ()>) {
    static TURN: Mutex<()> = Mutex::new(());
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    (Tap::new("mvattack", 1500), turn)
}

/// All threads that there can be here.
fn threads() -> impl Iterator<Item = (char, &'static str)> {
    let is_root = geteuid().is_root();
    if !is_root {
        skip("only root can make a network interface for the network's thread");
    }
    THREADS
        .into_iter()
        .filter(move |(thread, _)| is_root || *thread != 'n')
}

#[track_caller]
fn assert_refused(ended: &Ended, what: &str, name: &str) {
    assert_eq!(ended.code(), 125, "{what} in {name}: {}", ended.stderr);
    let refused = ended.stderr.lines().any(|line| {
        line.contains(&format!("refused a system call: {what}"))
            && line.ends_with(&format!("by thread {name}"))
    });
    assert!(refused, "{what} in {name}: {}", ended.stderr);
}

#[test]
fn what_a_thread_may_not_do_ends_minivmm() {
    for (thread, name) in threads() {
        for (call, what) in CALLS {
            assert_refused(&attack(call, thread, &[]), what, name);
        }
    }
}

/// Its guest's reset has the main thread boot again: it may open the VM's files, and make a VM, but no ring, which could open others.
#[test]
fn what_restarts_a_guest_may_do_no_more_than_it_takes() {
    for (call, what) in CALLS {
        let ended = attack(call, 'm', &["--on-reboot", "restart"]);
        match call {
            'o' if landlock_version().is_some() => assert_eq!(ended.code(), libc::EACCES),
            'o' | 'v' | 'y' => assert_eq!(ended.code(), DONE, "{what}: {}", ended.stderr),
            'u' => assert_eq!(ended.code(), libc::EPERM, "{what}: {}", ended.stderr),
            _ => assert_refused(&ended, what, "minivmm"),
        }
    }
}

/// A snapshot is put where its directory is, and nowhere else.
#[test]
fn what_saves_a_guest_may_do_no_more_than_it_takes() {
    let dir = tempfile::tempdir().unwrap();
    let at = format!("9={}", dir.path().join("snapshot").display());
    for (call, what) in CALLS {
        let args = ["-v", "--deadline", "60s", "--snapshot-at", &at];
        let ended = run(&mut boot_tiny("attack", &format!("{call}mh"), &args));
        match call {
            'o' if landlock_version().is_some() => assert_eq!(ended.code(), libc::EACCES),
            'o' => assert_eq!(ended.code(), DONE, "{what}: {}", ended.stderr),
            _ => assert_refused(&ended, what, "minivmm"),
        }
    }
}

/// Without a sandbox they may: what is refused above is refused by it.
#[test]
fn an_unconfined_thread_may_do_what_its_user_may() {
    for (thread, name) in threads() {
        for (call, what) in CALLS {
            let ended = attack(call, thread, &["--sandbox", "off"]);
            assert_eq!(ended.code(), DONE, "{what} in {name}: {}", ended.stderr);
        }
    }
}

#[test]
fn what_would_be_refused_is_logged_and_done() {
    for (call, what) in CALLS {
        let ended = attack(call, 'c', &["--sandbox", "log"]);
        // A shell has no one to ask any more: the thread that logs has gone.
        if call != 'x' {
            assert_eq!(ended.code(), DONE, "{what}: {}", ended.stderr);
        }
        let logged = format!("would refuse a system call: {what}");
        assert!(ended.stderr.contains(&logged), "{what}: {}", ended.stderr);
    }
}
