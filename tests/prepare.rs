//! What has to act while a VM is still being prepared: signals and the deadline, whatever minivmm waits for.

mod common;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use common::terminal::Terminal;
use common::{PATIENCE, minivmm, signal, tiny, wait};

/// `command` with a file system at `dir` whose server, a process beside minivmm, never answers.
fn with_hung_files(dir: &Path, command: &Command) -> Command {
    let options = "fd=4,rootmode=40000,user_id=0,group_id=0";
    let script = format!(
        "set -e; exec 4<>/dev/fuse
        mount -i -t fuse -o {options} hung {}
        sleep 300 >/dev/null 2>&1 &
        exec 4<&-
        exec \"$@\"",
        dir.display()
    );
    let mut hung = Command::new("unshare");
    hung.args(["--map-root-user", "--mount", "sh", "-c", &script, "sh"])
        .arg(command.get_program())
        .args(command.get_args())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    hung
}

/// Waits until a process waits in the kernel for something that is no event.
#[track_caller]
fn wait_until_hung(pid: u32) {
    let start = Instant::now();
    loop {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let is_minivmm = stat.contains("(minivmm) ");
        if is_minivmm && stat.contains(") D ") {
            return;
        }
        assert!(start.elapsed() < PATIENCE, "never hung: {stat}");
        assert!(!stat.contains(") Z "), "ended: {stat}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Starts minivmm with a hung file in each place that can have one.
fn with_each_hung_file(args: &[&str], mut check: impl FnMut(&str, Child)) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file").to_str().unwrap().to_owned();
    let hello = tiny("hello").to_str().unwrap().to_owned();
    let disk = format!("path={file},ro");
    let console = format!("file={file}");
    for place in [
        &["--kernel", &file][..],
        &["--config", &file],
        &["--kernel", &hello, "--initrd", &file],
        &["--kernel", &hello, "--disk", &disk],
        &["--kernel", &hello, "--serial", &console],
        &["--kernel", &hello, "--timeline", &file],
    ] {
        let mut command = minivmm(place);
        command.args(args);
        let child = with_hung_files(dir.path(), &command)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        check(&place.join(" "), child);
    }
}

#[test]
fn a_signal_ends_minivmm_whatever_file_it_waits_for() {
    with_each_hung_file(&[], |place, child| {
        wait_until_hung(child.id());
        signal(&child, "TERM");
        let output = wait(child, PATIENCE);
        assert_eq!(output.status.code(), Some(143), "{place}");
    });
}

#[test]
fn the_deadline_ends_minivmm_whatever_file_it_waits_for() {
    with_each_hung_file(&["--deadline", "200ms"], |place, child| {
        let output = wait(child, PATIENCE);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(124), "{place}: {stderr}");
        assert!(stderr.contains("deadline passed"), "{place}: {stderr}");
        assert_eq!(stderr.lines().count(), 1, "{place}: {stderr}");
    });
}

/// A deadline in a file is known only when that has been read.
#[test]
fn a_deadline_from_a_file_counts_too() {
    let dir = tempfile::tempdir().unwrap();
    let config = tempfile::NamedTempFile::new().unwrap();
    let kernel = dir.path().join("k");
    let json = format!(r#"{{"kernel": {kernel:?}, "deadline": "200ms"}}"#);
    fs::write(&config, json).unwrap();
    let command = minivmm(&["--config", config.path().to_str().unwrap()]);
    let child = with_hung_files(dir.path(), &command)
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    assert_eq!(wait(child, PATIENCE).status.code(), Some(124));
}

#[test]
fn a_signal_before_another_boot_restores_the_terminal() {
    let dir = tempfile::tempdir().unwrap();
    let hung = dir.path().join("hung");
    fs::create_dir(&hung).unwrap();
    let kernel = dir.path().join("kernel");
    symlink(tiny("ends"), &kernel).unwrap();
    // Waits for a key, then resets.
    let mut command = minivmm(&[
        "--memory",
        "16M",
        "--cmdline",
        "wr",
        "--on-reboot",
        "restart",
    ]);
    command.arg("--kernel").arg(&kernel);

    let terminal = Terminal::new();
    let before = terminal.modes();
    let mut session = terminal.run(&with_hung_files(&hung, &command));
    terminal.wait_until_raw(true);
    // From here on, the kernel is where nobody answers.
    let swap = dir.path().join("swap");
    symlink(hung.join("kernel"), &swap).unwrap();
    fs::rename(&swap, &kernel).unwrap();
    terminal.type_in(".");
    wait_until_hung(session.pid());
    assert!(terminal.is_raw());
    session.signal("TERM");
    assert_eq!(session.status(), 143, "{}", terminal.text());
    assert_eq!(terminal.modes(), before);
}
