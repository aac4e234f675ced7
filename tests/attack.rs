//! A guest that has broken out: what it can ask the host for in each kind of thread. The binary is a build of its own, in which a
//! port carries out what code would that has taken over a thread.

mod common;

use common::{Ended, boot_tiny, run};
use tempfile::NamedTempFile;

/// What the guest ends with when the host's kernel has done, or answered, the call.
const DONE: i32 = 77;

/// Letters of devices/src/attack.rs.
const THREADS: [(char, &str); 5] = [
    ('v', "vcpu0"),
    ('b', "virtio-blk 0"),
    ('r', "virtio-rng"),
    ('c', "console"),
    ('m', "main"),
];

/// Letters of devices/src/attack.rs, and what is called.
const CALLS: [(char, &str); 15] = [
    ('x', "execve"),
    ('o', "openat"),
    ('s', "socket"),
    ('t', "ptrace"),
    ('m', "mount"),
    ('c', "clone"),
    ('k', "kill"),
    ('u', "io_uring_setup"),
    ('v', "ioctl 0xae01"), // KVM_CREATE_VM
    ('e', "mmap"),         // to be executed
    ('f', "memfd_create"),
    ('g', "tgkill"),
    ('i', "ioctl 0x5412"), // TIOCSTI
    ('w', "fcntl"),        // F_SETOWN
    ('p', "prctl"),        // PR_SET_DUMPABLE
];

fn attack(call: char, thread: char, args: &[&str]) -> Ended {
    let disk = NamedTempFile::new().unwrap();
    disk.as_file().set_len(4096).unwrap();
    let disk = format!("path={},ro,queues=1", disk.path().display());
    let given = ["--disk", &disk, "--rng", "-v", "--deadline", "60s"];
    let cmdline = format!("{call}{thread}");
    run(&mut boot_tiny("attack", &cmdline, &[&given, args].concat()))
}

#[test]
fn an_unconfined_thread_may_do_what_its_user_may() {
    for (thread, name) in THREADS {
        for (call, what) in CALLS {
            let ended = attack(call, thread, &[]);
            assert_eq!(ended.code(), DONE, "{what} in {name}: {}", ended.stderr);
        }
    }
}
