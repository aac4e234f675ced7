//! virtio devices driven by tiny guests.

mod common;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::process::Stdio;

use common::{PATIENCE, boot_tiny, expect, run, signal, wait};

#[test]
fn virtio_device_survives_a_hostile_driver() {
    for (case, status) in [("o", 64), ("b", 79), ("r", 64)] {
        let ended = run(&mut boot_tiny("virtio", case, &["--rng"]));
        assert_eq!(ended.code(), status, "{case}: {}", ended.stderr);
        let warned = ended.stderr.contains("until its driver resets it");
        assert_eq!(warned, case == "b", "{case}: {}", ended.stderr);
    }
    // Without the device there is nothing at its address.
    run(&mut boot_tiny("virtio", "o", &[])).assert_code(99);
}

#[test]
fn a_disk_is_reset_with_requests_in_flight() {
    const WRITTEN: usize = 64 << 10;
    for engine in ["io_uring", "sync"] {
        let mut disk = tempfile::NamedTempFile::new().unwrap();
        disk.write_all(&[0xa5; WRITTEN + 4096]).unwrap();
        let option = format!("path={},engine={engine}", disk.path().display());
        let ended = run(&mut boot_tiny("disk", "", &["--disk", &option]));
        ended.assert_code(0);
        assert_eq!(ended.stderr, "", "{engine}");
        let bytes = fs::read(disk.path()).unwrap();
        let (written, rest) = bytes.split_at(WRITTEN);
        assert!(written.iter().all(|byte| *byte == 0x5a), "{engine}");
        assert!(rest == [0xa5; 4096], "{engine}");
    }
}

/// An ioeventfd makes a young VM end later, so that a queue gets one only when it is busy. Then its notifications are no exits.
#[test]
fn a_busy_disk_takes_few_exits() {
    const READS: usize = 20_000;
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(1 << 20).unwrap();
    let option = format!("path={}", disk.path().display());
    let exits = |reads: usize| {
        let args = ["--disk", &option, "-v"];
        let ended = run(&mut boot_tiny("reads", &reads.to_string(), &args));
        ended.assert_code(0);
        let (_, rest) = ended.stderr.split_once("vCPU exits: ").unwrap();
        rest.split(';').next().unwrap().parse::<usize>().unwrap()
    };
    let few = exits(100);
    assert!((100..200).contains(&few), "{few}");
    let many = exits(READS);
    assert!((few..READS / 2).contains(&many), "{many}");
}

#[test]
fn a_disk_is_locked_while_its_vm_runs_and_free_after() {
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(1 << 20).unwrap();
    let path = disk.path().to_str().unwrap();
    let writable = format!("path={path}");
    let read_only = format!("path={path},ro");
    let boot = |disk: &str| boot_tiny("hello", "", &["--disk", disk]);
    // A VM that runs until it is stopped; its echo says that it runs.
    let hold = |disk: &str| {
        let mut command = boot_tiny("echo", "", &["--disk", disk]);
        let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
        child.stdin.as_mut().unwrap().write_all(b"x").unwrap();
        let mut byte = [0];
        child
            .stdout
            .as_mut()
            .unwrap()
            .read_exact(&mut byte)
            .unwrap();
        child
    };
    let stop = |child| {
        signal(&child, "TERM");
        assert_eq!(wait(child, PATIENCE).status.code(), Some(143));
    };

    let writer = hold(&writable);
    for disk in [&writable, &read_only] {
        let refused = run(&mut boot(disk));
        refused.assert_code(125);
        assert!(
            refused.stderr.contains(path) && refused.stderr.contains("in use by another process"),
            "{}",
            refused.stderr
        );
    }
    stop(writer);
    let reader = hold(&read_only);
    run(&mut boot(&read_only)).assert_code(0);
    run(&mut boot(&writable)).assert_code(125);
    stop(reader);
    run(&mut boot(&writable)).assert_code(0);
    // Twice in one VM is one time too many, unless both only read.
    run(boot(&writable).args(["--disk", &writable])).assert_code(125);
    run(boot(&read_only).args(["--disk", &read_only])).assert_code(0);
    // A VM that boots again has let go of its disk in between.
    let mut command = boot_tiny("ends", "r", &["--disk", &writable]);
    command.args(["--on-reboot", "restart", "--deadline", "300ms"]);
    run(&mut command).assert_code(124);
}

#[test]
fn a_vsock_has_its_socket_as_long_as_its_vm_runs() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v.sock");
    let option = format!("path={}", path.display());
    let mut command = boot_tiny("echo", "", &["--vsock", &option]);
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.as_mut().unwrap().write_all(b"x").unwrap();
    expect(&mut child, "x");
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    // Until a driver is there, programs wait.
    let mut stream = UnixStream::connect(&path).unwrap();
    stream.write_all(b"CONNECT 1\n").unwrap();
    let refused = run(&mut boot_tiny("hello", "", &["--vsock", &option]));
    refused.assert_code(125);
    let error = "in use by another process";
    refused.assert_said(error);
    signal(&child, "TERM");
    let output = wait(child, PATIENCE);
    assert_eq!(output.status.code(), Some(143), "{output:?}");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert!(!path.exists());
    assert_eq!(stream.read(&mut [0]).unwrap_or(0), 0);
    // A VM that boots again makes it again; one that was killed has left it.
    let mut command = boot_tiny("ends", "r", &["--vsock", &option]);
    command.args(["--on-reboot", "restart", "--deadline", "300ms"]);
    run(&mut command).assert_code(124);
    assert!(!path.exists());
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    run(&mut boot_tiny("hello", "", &["--vsock", &option])).assert_code(0);
    assert!(!path.exists());
}
