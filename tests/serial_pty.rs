//! The serial console on a pseudo-terminal of its own, which people attach to and detach from as they like.

mod common;

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use common::{PATIENCE, boot_tiny, signal, wait};

/// Starts minivmm; the pty that it names on stderr.
fn start(command: &mut Command) -> (Child, PathBuf) {
    let mut child = command.args(["--serial", "pty"]).spawn().unwrap();
    let mut line = String::new();
    let stderr = child.stderr.as_mut().unwrap();
    BufReader::with_capacity(1, stderr)
        .read_line(&mut line)
        .unwrap();
    let path = line.strip_prefix("minivmm: the console is ");
    let path = path.unwrap_or_else(|| panic!("{line:?}")).trim_end();
    (child, path.into())
}

fn attach(path: &Path) -> File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOCTTY)
        .open(path)
        .unwrap()
}

/// Reads up to the hang-up.
fn read_to_end(user: &mut File) -> Vec<u8> {
    let mut all = Vec::new();
    // A hang-up is an I/O error, or an end of file.
    _ = user.read_to_end(&mut all);
    all
}

fn code(child: Child) -> Option<i32> {
    wait(child, PATIENCE).status.code()
}

#[test]
fn pty_can_be_detached_and_reattached() {
    let (child, path) = start(&mut boot_tiny("echo", "", &[]));
    // No key is minivmm's own here, and none is translated or echoed: what comes back is the guest's.
    for keys in [&b"hello\r\x03\x1a\x01x\x1b[A"[..], b"again\n"] {
        let mut user = attach(&path);
        user.write_all(keys).unwrap();
        let mut got = vec![0; keys.len()];
        user.read_exact(&mut got).unwrap();
        assert_eq!(got, keys);
    }
    let mut user = attach(&path);
    let paste: Vec<u8> = (0..10_240u32).map(|i| b'!' + (i % 90) as u8).collect();
    let mut reader = user.try_clone().unwrap();
    let expected = paste.clone();
    let reader = thread::spawn(move || {
        let mut got = vec![0; expected.len()];
        reader.read_exact(&mut got).unwrap();
        assert!(got == expected);
    });
    user.write_all(&paste).unwrap();
    reader.join().unwrap();
    user.write_all(&[4]).unwrap();
    assert!(code(child).is_some());
}

#[test]
fn output_without_a_reader_is_dropped() {
    let (child, path) = start(&mut boot_tiny("ends", "mwmp", &[]));
    thread::sleep(Duration::from_millis(500));
    let mut user = attach(&path);
    user.write_all(b".").unwrap();
    assert_eq!(read_to_end(&mut user), b"tiny# ", "the second one alone");
    assert_eq!(code(child), Some(0));
}

#[test]
fn pty_reader_gets_all_output() {
    let (child, path) = start(&mut boot_tiny("ends", "wmp", &[]));
    let mut user = attach(&path);
    user.write_all(b".").unwrap();
    // The guest is gone long before it is read.
    thread::sleep(Duration::from_millis(300));
    assert_eq!(read_to_end(&mut user), b"tiny# ");
    assert_eq!(code(child), Some(0));
}

#[test]
fn stalled_pty_reader_delays_the_exit_by_one_second() {
    let (child, path) = start(&mut boot_tiny("ends", "wmp", &[]));
    let mut user = attach(&path);
    user.write_all(b".").unwrap();
    let start = Instant::now();
    assert_eq!(code(child), Some(0));
    assert!(start.elapsed() < Duration::from_secs(5));
    drop(user);
}

#[test]
fn signal_ends_the_vm_attached_or_not() {
    for attached in [false, true] {
        let (child, path) = start(&mut boot_tiny("flood", "", &[]));
        let user = attached.then(|| attach(&path));
        thread::sleep(Duration::from_millis(200));
        signal(&child, "TERM");
        let start = Instant::now();
        assert_eq!(code(child), Some(143));
        assert!(start.elapsed() < Duration::from_secs(2));
        drop(user);
    }
}

#[test]
fn quiet_does_not_tell_the_pty() {
    let mut command = boot_tiny("ends", "p", &["--serial", "pty", "-q"]);
    let ended = common::run(&mut command);
    ended.assert_code(0);
    assert_eq!(ended.stderr, "");
}
