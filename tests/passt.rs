//! passt as a process of minivmm's: it starts with the VM, and ends with it however that ends. What goes through it is in tests/net.rs.

mod common;

use std::env;
use std::fs::{self, Permissions};
use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::thread;
use std::time::Duration;

use common::http::free_port;
use common::limit::within;
use common::skip::skip;
use common::{PATIENCE, boot_tiny, children, kill, minivmm, run, signal, wait};
use tempfile::TempDir;

/// Saves a tiny guest with this network at mark 7; restored, it prints "tiny# " and spins.
fn save(net: &str, dir: &TempDir) -> PathBuf {
    let path = dir.path().join("snapshot");
    let at = format!("7={},exit", path.display());
    let args = ["--net", net, "--snapshot-at", &at];
    run(&mut boot_tiny("ends", "bms", &args)).assert_code(0);
    path
}

fn has_passt() -> bool {
    Command::new("passt").arg("--version").output().is_ok()
}

fn is_open(port: u16) -> bool {
    TcpStream::connect(("127.0.0.1", port)).is_ok()
}

/// Waits for the first words of a guest, "tiny# ".
fn wait_for_guest(child: &mut Child) {
    let mut word = [0; 6];
    let stdout = child.stdout.as_mut().unwrap();
    stdout.read_exact(&mut word).unwrap();
}

#[test]
fn a_missing_passt_names_its_package() {
    let mut command = boot_tiny("hello", "", &["--net", "passt"]);
    let ended = run(command.env("PATH", "/var/empty"));
    ended.assert_code(125);
    let error = "error: passt is not on the PATH; install the package passt";
    ended.assert_said(error);
    assert_eq!(ended.out(), "", "the guest did not run");
}

#[test]
fn a_port_in_use_is_an_error_before_the_boot() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let net = format!("passt,publish={}:80", address.port());
    let ended = run(&mut boot_tiny("hello", "", &["--net", &net]));
    ended.assert_code(125);
    // The C libraries have words of their own for EADDRINUSE.
    let error = format!("cannot publish TCP port {address}: Address ");
    let is_named = ended.stderr.contains(&error) && ended.stderr.contains("in use");
    assert!(is_named, "{}", ended.stderr);
    assert_eq!(ended.out(), "");
}

/// A directory with this shell script as passt.
fn fake_passt(script: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("passt");
    fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
    dir
}

#[test]
fn what_passt_says_minivmm_says() {
    let dir = fake_passt(
        "printf 'No\\033such \"interface\"\\n\\nFailed to send 31 bytes to syslog\\n' >&2
        echo \"Couldn't get any nameserver address\" >&2; printf last >&2",
    );
    let mut command = boot_tiny("ends", "ms", &["--net", "passt"]);
    command.env("PATH", dir.path());
    let mut child = command.spawn().unwrap();
    wait_for_guest(&mut child);
    let gone = within(PATIENCE, || children(child.id()).is_empty().then_some(()));
    signal(&child, "TERM");
    let output = wait(child, PATIENCE);
    gone.expect("the process ends and is waited for");
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(143), "the VM went on: {err}");
    let wanted =
        "minivmm: warning: passt: No\\u{1b}such \"interface\"\nminivmm: warning: passt: last\n";
    assert!(err.contains(wanted), "{err}");
    assert!(!err.contains("syslog"), "{err}");
}

/// It does not see that its socket is closed.
#[test]
fn a_passt_that_is_stuck_ends_with_a_killed_minivmm() {
    let dir = fake_passt("exec sleep 3600");
    let mut command = boot_tiny("ends", "ms", &["--net", "passt"]);
    let path = format!("{}:{}", dir.path().display(), env::var("PATH").unwrap());
    let mut child = command.env("PATH", path).spawn().unwrap();
    wait_for_guest(&mut child);
    let cmdline = |pid| fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let sleeps = || {
        let mut pids = children(child.id()).into_iter();
        pids.find(|pid| cmdline(*pid).starts_with(b"sleep"))
    };
    let pid = within(PATIENCE, sleeps).expect("it runs");
    signal(&child, "KILL");
    wait(child, PATIENCE);
    // What is left of a process until it is waited for has no command line.
    let ended = within(PATIENCE, || cmdline(pid).is_empty().then_some(()));
    ended.expect("it ends");
}

#[test]
fn passt_ends_with_the_vm_however_that_ends() {
    if !has_passt() {
        return skip("passt is not installed");
    }
    for how in ["KILL", "TERM", "poweroff"] {
        let port = free_port();
        let net = format!("passt,publish={port}:80");
        let letters = if how == "poweroff" { "mwp" } else { "ms" };
        let mut command = boot_tiny("ends", letters, &["--net", &net]);
        command.stdin(std::process::Stdio::piped());
        let mut child = command.spawn().unwrap();
        wait_for_guest(&mut child);
        let opened = within(PATIENCE, || is_open(port).then_some(()));
        let pids = children(child.id());
        if how == "poweroff" {
            let mut stdin = child.stdin.take().unwrap();
            std::io::Write::write_all(&mut stdin, b"x").unwrap();
        } else {
            signal(&child, how);
        }
        let output = wait(child, PATIENCE);
        opened.unwrap_or_else(|| panic!("{how}: the port opens: {output:?}"));
        assert_eq!(pids.len(), 1, "{how}");
        // After an end that minivmm sees, the port is free at once.
        if how != "KILL" {
            assert!(!is_open(port), "{how}: {output:?}");
        }
        let closed = within(PATIENCE, || (!is_open(port)).then_some(()));
        closed.unwrap_or_else(|| panic!("{how}: passt is still there"));
        let err = String::from_utf8_lossy(&output.stderr);
        assert!(!err.contains("passt"), "{how}: {err}");
    }
}

#[test]
fn a_reset_keeps_passt_and_a_signal_ends_it() {
    if !has_passt() {
        return skip("passt is not installed");
    }
    let args = ["--net", "passt", "--on-reboot", "restart"];
    let mut child = boot_tiny("ends", "mr", &args).spawn().unwrap();
    wait_for_guest(&mut child);
    let first = within(PATIENCE, || {
        Some(children(child.id())).filter(|pids| pids.len() == 1)
    });
    // Some more boots.
    (0..5).for_each(|_| wait_for_guest(&mut child));
    thread::sleep(Duration::from_millis(100));
    let last = children(child.id());
    // Signals that minivmm waits for itself are not blocked in it.
    let is_sent = last.iter().all(|pid| kill(*pid, "TERM"));
    let gone = within(PATIENCE, || children(child.id()).is_empty().then_some(()));
    signal(&child, "TERM");
    let output = wait(child, PATIENCE);
    assert_eq!(output.status.code(), Some(143), "{output:?}");
    assert_eq!(first.expect("passt starts"), last);
    assert!(is_sent && gone.is_some(), "{output:?}");
}

#[test]
fn a_restored_vm_has_the_network_that_its_user_names() {
    if !has_passt() {
        return skip("passt is not installed");
    }
    let dir = tempfile::tempdir().unwrap();
    let path = save("passt,publish=1:80", &dir);
    let down =
        "minivmm: warning: net 0 has no network, and its link is down: give --net for each\n";
    // What the snapshot says of ports is not followed.
    for (args, passts, err) in [
        (&[][..], 0, down),
        (&["--net", "passt"], 1, ""),
        (&["--net", "passt,host-loopback"], 1, ""),
    ] {
        let mut command = minivmm(&["restore"]);
        let mut child = command.arg(&path).args(args).spawn().unwrap();
        wait_for_guest(&mut child);
        let started = within(PATIENCE, || {
            (children(child.id()).len() == passts).then_some(())
        });
        signal(&child, "TERM");
        let output = wait(child, PATIENCE);
        assert!(started.is_some(), "{args:?}: {output:?}");
        assert_eq!(output.status.code(), Some(143), "{output:?}");
        assert_eq!(String::from_utf8_lossy(&output.stderr), err);
    }
    for (command, args, code, why) in [
        (
            "restore",
            &["--net", "passt", "--net", "tap=t"][..],
            125,
            "the VM had 1 network devices",
        ),
        (
            "restore",
            &["--net", "passt,mac=02:00:00:00:00:01"],
            2,
            "leave out mac",
        ),
        (
            "restore",
            &["--net", "tap=t,queues=2"],
            2,
            "leave out queues",
        ),
        ("restore", &["--net", "tap="], 2, "no network"),
        (
            "fork",
            &["-n", "2", "--net", "tap=t"],
            125,
            "cannot share a TAP interface",
        ),
        (
            "fork",
            &["-n", "2", "--net", "passt,publish=1:80"],
            125,
            "cannot share",
        ),
    ] {
        let ended = run(minivmm(&[command]).arg(&path).args(args));
        ended.assert_code(code);
        ended.assert_said(why);
    }
    let info = run(minivmm(&["snapshot", "info"]).arg(&path));
    info.assert_printed(&["network        0: passt\n"]);
}

#[test]
fn each_fork_has_a_passt_of_its_own() {
    if !has_passt() {
        return skip("passt is not installed");
    }
    let dir = tempfile::tempdir().unwrap();
    let path = save("passt", &dir);
    let args = ["fork", "-n", "3", "-j", "3", "--net", "passt"];
    let child = minivmm(&args).arg(&path).spawn().unwrap();
    let started = within(PATIENCE, || (children(child.id()).len() == 3).then_some(()));
    signal(&child, "TERM");
    let output = wait(child, PATIENCE);
    assert!(started.is_some(), "{output:?}");
    assert_eq!(output.status.code(), Some(143), "{output:?}");
    let warning = "minivmm: warning: 3 of 3 VMs did not end with status 0\n";
    assert_eq!(String::from_utf8_lossy(&output.stderr), warning);
}
