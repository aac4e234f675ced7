//! Whoever started a VM can stop it, whatever its disk does.

mod common;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use common::fuse::{Fuse, Mode};
use common::{PATIENCE, boot_tiny, expect, run, signal, wait};

/// A deadline for tests that wait for what should come, so that they end if it does not.
const PATIENT: &str = "100s";

const ENGINES: [&str; 2] = ["io_uring", "sync"];

/// A guest that wants of its disk as much at once as a queue holds, 15.9 GiB: see guest-kernels/tiny/hog.S.
fn hog(cmdline: &str, disk: &str, deadline: &str) -> std::process::Command {
    let mut command = boot_tiny("hog", cmdline, &["--disk", disk]);
    command.args(["--deadline", deadline]);
    command
}

#[test]
fn a_guest_with_a_queue_full_of_the_largest_requests_is_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    File::create(&path).unwrap().set_len(8 << 30).unwrap();
    for engine in ENGINES {
        for access in [",ro", "", ",ephemeral"] {
            if (engine, access) == ("io_uring", ",ephemeral") {
                continue;
            }
            let disk = format!("path={}{access},engine={engine}", path.display());
            let mut child = hog("hr", &disk, PATIENT).spawn().unwrap();
            expect(&mut child, "S");
            signal(&child, "TERM");
            assert_eq!(wait(child, PATIENCE).status.code(), Some(143), "{disk}");
            run(&mut hog("hr", &disk, "300ms")).assert_code(124);
            // It resets the disk with all that in flight.
            for after in ["pr", "rr"] {
                run(&mut hog(after, &disk, PATIENT)).assert_code(0);
            }
        }
    }
}

/// Waits for the end of a VM on a hung disk. Should it not end, the disk has to go first: such a process cannot be killed.
fn end_of(mut child: Child, disk: Fuse) -> Output {
    let limit = Instant::now() + PATIENCE;
    while child.try_wait().unwrap().is_none() && Instant::now() < limit {
        thread::sleep(Duration::from_millis(1));
    }
    let ended = child.try_wait().unwrap().is_some();
    drop(disk);
    let output = wait(child, PATIENCE);
    assert!(ended, "it hung with its disk: {output:?}");
    output
}

/// Whether one of its threads is in the state D of proc_pid_stat(5).
fn waits_for_a_disk(child: &Child) -> bool {
    let threads = fs::read_dir(format!("/proc/{}/task", child.id()));
    threads.into_iter().flatten().flatten().any(|thread| {
        let stat = fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        stat.rsplit(") ")
            .next()
            .is_some_and(|rest| rest.starts_with('D'))
    })
}

/// A VM on a disk that hangs with the first that the guest wants of it.
fn on_a_hung_disk(
    cmdline: &str,
    mode: Mode,
    engine: &str,
    deadline: &str,
    args: &[&str],
) -> Option<(Child, Fuse)> {
    let disk = Fuse::mount()?;
    let access = if cmdline[1..].starts_with('r') {
        ",ro"
    } else {
        ""
    };
    let option = format!("path={}{access},engine={engine}", disk.disk().display());
    let mut child = hog(cmdline, &option, deadline)
        .args(args)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    expect(&mut child, "R");
    disk.set(mode);
    let mut keys = child.stdin.take().unwrap();
    keys.write_all(b"!").unwrap();
    expect(&mut child, "S");
    let limit = Instant::now() + PATIENCE;
    // Before a thread waits for it, a request may be cancelled.
    while !(disk.is_hung() && waits_for_a_disk(&child)) {
        assert!(Instant::now() < limit, "nothing comes to the disk");
        thread::sleep(Duration::from_millis(1));
    }
    // The guest goes on.
    keys.write_all(b"!").unwrap();
    Some((child, disk))
}

#[test]
fn a_hung_disk_cannot_keep_a_vm() {
    for engine in ENGINES {
        // Not a write that the server has taken: the host's kernel lets no process go before that is answered.
        for mode in [Mode::Holds, Mode::Deaf] {
            let Some((child, disk)) = on_a_hung_disk("hri", mode, engine, PATIENT, &[]) else {
                return;
            };
            signal(&child, "TERM");
            let status = end_of(child, disk).status.code();
            assert_eq!(status, Some(143), "{engine} {mode:?}");
        }
        let Some((child, disk)) = on_a_hung_disk("hri", Mode::Holds, engine, "2s", &[]) else {
            return;
        };
        assert_eq!(end_of(child, disk).status.code(), Some(124), "{engine}");
    }
}

#[test]
fn a_vm_that_waits_for_a_hung_disk_to_be_saved_can_be_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let at = format!("7={}", dir.path().join("snapshot").display());
    let saved = ["--snapshot-at", &at];
    for engine in ENGINES {
        let Some((child, disk)) = on_a_hung_disk("mri", Mode::Holds, engine, PATIENT, &saved)
        else {
            return;
        };
        // Most likely, the guest has written the mark by then.
        thread::sleep(Duration::from_millis(500));
        signal(&child, "TERM");
        let output = end_of(child, disk);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(143), "{engine}: {stderr}");
        assert!(!stderr.contains("has not completed"), "{engine}: {stderr}");
        let Some((child, disk)) = on_a_hung_disk("mri", Mode::Holds, engine, "5s", &saved) else {
            return;
        };
        let output = end_of(child, disk);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(124), "{engine}: {stderr}");
        assert!(!stderr.contains("has not completed"), "{engine}: {stderr}");
    }
}

#[test]
fn guest_status_is_kept_when_a_hung_disk_is_stopped() {
    for engine in ENGINES {
        let Some((child, disk)) = on_a_hung_disk("rri", Mode::Holds, engine, "2s", &[]) else {
            return;
        };
        assert_eq!(end_of(child, disk).status.code(), Some(0), "{engine}");
        for mode in [Mode::Holds, Mode::Deaf] {
            let Some((mut child, disk)) = on_a_hung_disk("rri", mode, engine, PATIENT, &[]) else {
                return;
            };
            let mut said = String::new();
            let mut stderr = BufReader::new(child.stderr.as_mut().unwrap());
            stderr.read_line(&mut said).unwrap();
            assert!(said.contains("the guest has ended"), "{said}");
            signal(&child, "TERM");
            assert_eq!(
                end_of(child, disk).status.code(),
                Some(0),
                "{engine} {mode:?}"
            );
        }
    }
}

#[test]
fn a_reset_waits_for_the_disk_and_the_vcpu_does_not() {
    for engine in ENGINES {
        let Some((mut child, disk)) = on_a_hung_disk("pri", Mode::Holds, engine, PATIENT, &[])
        else {
            return;
        };
        expect(&mut child, "P");
        thread::sleep(Duration::from_millis(100));
        assert_eq!(child.try_wait().unwrap(), None, "{engine}");
        disk.set(Mode::Fails);
        assert_eq!(end_of(child, disk).status.code(), Some(0), "{engine}");
    }
}

#[test]
fn a_vm_that_a_hung_disk_keeps_from_being_saved_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let at = format!("7={},exit", dir.path().join("snapshot").display());
    for engine in ENGINES {
        let args = ["--snapshot-at", &at];
        let Some((mut child, disk)) = on_a_hung_disk("mri", Mode::Holds, engine, PATIENT, &args)
        else {
            return;
        };
        expect(&mut child, "M");
        signal(&child, "TERM");
        let output = end_of(child, disk);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(143), "{engine}: {stderr}");
        let why = "the VM was not saved: cannot save the devices: disk 0: the host has not completed its requests";
        assert!(stderr.contains(why), "{engine}: {stderr}");
        assert_eq!(dir.path().read_dir().unwrap().count(), 0);
    }
}

#[test]
fn a_vm_whose_disk_cannot_be_made_durable_is_not_saved_and_goes_on() {
    let Some(disk) = Fuse::mount() else { return };
    disk.set(Mode::NotDurable);
    let dir = tempfile::tempdir().unwrap();
    let at = format!("7={},exit", dir.path().join("snapshot").display());
    let path = format!("path={}", disk.disk().display());
    let args = ["--snapshot-at", &at, "--disk", &path];
    let ended = run(&mut boot_tiny("marks", "", &args));
    ended.assert_code(0);
    assert_eq!(ended.out(), "abc");
    let why = "the VM was not saved: cannot make durable what the guest has written to its disks";
    ended.assert_said(why);
    assert_eq!(dir.path().read_dir().unwrap().count(), 0);
}

#[test]
fn a_vm_on_a_remote_disk_boots_again() {
    /// More than any VM needs that has let go of what the boots before it had.
    const MAX_FILES: usize = 40;
    for access in ["", ",ro", ",ephemeral"] {
        let Some(disk) = Fuse::mount() else { return };
        let disk = format!("path={}{access}", disk.disk().display());
        let args = [
            "--on-reboot",
            "restart",
            "--deadline",
            "500ms",
            "-v",
            "--disk",
        ];
        let mut command = boot_tiny("ends", "r", &[&args[..], &[&disk]].concat());
        let child = command.spawn().unwrap();
        let files = format!("/proc/{}/fd", child.id());
        thread::sleep(Duration::from_millis(400));
        let files = fs::read_dir(files).unwrap().count();
        let output = wait(child, PATIENCE);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(124), "{access}: {stderr}");
        let boots = stderr.matches("booting again").count();
        assert!(boots >= 2, "{access}: {boots} {stderr}");
        assert!(files < MAX_FILES, "{access}: {files} files, {boots} boots");
    }
}
