//! minivmm as a process: what it inherits, what it does without memory, what it lets through to a terminal.

mod common;

use std::fs::{self, Permissions};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::json;

use common::{Ended, PATIENCE, boot_tiny, minivmm, run, signal, tiny, wait};

/// `command` behind a shell's words, such as `ulimit -v 20000;`, and before its redirections.
fn shell(before: &str, command: &Command, redirections: &str) -> Command {
    let mut shell = Command::new("sh");
    shell
        .args(["-c", &format!("{before} exec \"$@\" {redirections}"), "sh"])
        .arg(command.get_program())
        .args(command.get_args())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    shell
}

/// The files that a process has open.
fn open_files(pid: u32) -> Vec<String> {
    fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .filter_map(|entry| fs::read_link(entry.unwrap().path()).ok())
        .map(|target| target.display().to_string())
        .collect()
}

/// What minivmm has open while its guest, which spins, runs.
#[track_caller]
fn open_in_the_running_vm(mut command: Command) -> Vec<String> {
    let mut child = command.spawn().unwrap();
    // The guest's first words, "tiny# ".
    let mut word = [0; 6];
    let started = child.stdout.as_mut().unwrap().read_exact(&mut word);
    let open = open_files(child.id());
    signal(&child, "TERM");
    let output = wait(child, PATIENCE);
    assert!(started.is_ok(), "no guest: {output:?}");
    assert_eq!(output.status.code(), Some(143));
    open
}

#[test]
fn inherited_files_are_closed() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().to_str().unwrap();
    // At the first descriptor, between and far behind those that minivmm opens; a shell has one digit alone.
    // A confined process shows to root alone what it has open.
    let command = boot_tiny("ends", "ms", &["--sandbox", "off"]);
    let opened = format!("3<{path} 5<{path} 9<{path}");
    let open = open_in_the_running_vm(shell("", &command, &opened));
    assert!(!open.iter().any(|file| file == path), "{open:?}");
}

/// A descriptor is a right of its own: code that breaks out of a VM could read by it what its user may not even open.
#[test]
fn a_secret_that_only_root_may_read_is_closed() {
    const NOBODY: &str = "65534";
    if !rustix::process::geteuid().is_root() {
        return common::skip::skip("only root has files that others may not read");
    }
    // Where anybody may open what the test built, and /dev/kvm.
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let public = |name: &str, from: &Path| {
        fs::copy(from, path(name)).unwrap();
        fs::set_permissions(path(name), Permissions::from_mode(0o755)).unwrap();
    };
    public("minivmm", Path::new(env!("CARGO_BIN_EXE_minivmm")));
    public("guest", &tiny("ends"));
    fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
    let secret = path("secret");
    fs::write(&secret, "root's").unwrap();
    fs::set_permissions(&secret, Permissions::from_mode(0o600)).unwrap();
    let to_kvm = format!(
        "mount -t tmpfs -o mode=755 none /mnt; mknod -m 666 /mnt/kvm c 10 232; mount --bind /mnt/kvm /dev/kvm; \
         exec 3<{secret} 9<{secret};"
    );
    let drop_root = format!("setpriv --reuid={NOBODY} --regid={NOBODY} --clear-groups");
    let under = |run: &str| {
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "sh", "-ec"])
            .arg(format!("{to_kvm} exec {drop_root} {run}"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    };
    // The way there leads past the file's permissions, and lets the descriptor through.
    run(&mut under(&format!("sh -c '! cat {secret} && cat <&3'"))).assert_printed(&["root's"]);
    let (minivmm, guest) = (path("minivmm"), path("guest"));
    let vm = format!("{minivmm} --memory 16M --cmdline ms --kernel {guest}");
    let open = open_in_the_running_vm(under(&vm));
    assert!(!open.contains(&secret), "{open:?}");
}

#[test]
fn what_an_argument_names_stays_open() {
    let dir = tempfile::tempdir().unwrap();
    let json = dir.path().join("vm.json");
    let kernel = tiny("hello");
    fs::write(
        &json,
        format!(r#"{{"memory": "16M", "kernel": {kernel:?}}}"#),
    )
    .unwrap();
    let (json, kernel) = (json.to_str().unwrap(), kernel.to_str().unwrap());
    for (args, redirections) in [
        (&["--config", "/dev/fd/8"][..], format!("8<{json}")),
        // As a shell gives what a command prints: a pipe.
        (&["--config", "/dev/fd/0"], format!("<{json}")),
        (
            &["--memory", "16M", "--kernel", "/proc/self/fd/3"],
            format!("3<{kernel} 4<{json}"),
        ),
    ] {
        let ended = run(&mut shell("", &minivmm(args), &redirections));
        ended.assert_code(0);
        assert_eq!(ended.out(), "!", "{args:?}");
    }
}

/// tests/attack.rs has a build in which a guest can say what code would do that has broken out.
#[cfg(not(feature = "attack-port"))]
#[test]
fn nothing_here_carries_out_attacks() {
    let ended = run(&mut boot_tiny("attack", "ove", &["-v"]));
    ended.assert_code(5);
    let unclaimed = "unclaimed accesses: 0 reads, 1 writes";
    ended.assert_said(unclaimed);
}

/// Whatever it is that gets no memory, the status is not that of a guest whose kernel panicked.
#[test]
fn a_lack_of_memory_is_minivmms_failure() {
    let config = tempfile::NamedTempFile::new().unwrap();
    let json = format!(r#"{{"append": "{}"}}"#, "x".repeat(1_000_000));
    fs::write(&config, json).unwrap();
    let command = boot_tiny("hello", "", &["--config", config.path().to_str().unwrap()]);
    let under = |kib: u32| run(&mut shell(&format!("ulimit -v {kib};"), &command, ""));
    // With less, not even the program can be loaded.
    let least = (1000..100_000)
        .step_by(100)
        .find(|kib| under(*kib).status.code().is_some_and(|code| code != 127))
        .expect("a limit under which it starts");
    let (mut aborted, mut without_stack) = (0, 0);
    for kib in (least..least + 6000).step_by(150) {
        let ended = under(kib);
        // A stack that cannot grow: the kernel has no other word for it, and no handler a stack to run on.
        if ended.status.signal() == Some(libc::SIGSEGV) {
            without_stack += 1;
            continue;
        }
        ended.assert_code(125);
        ended.assert_said("minivmm: error: ");
        aborted += u32::from(ended.stderr.contains("memory allocation of"));
    }
    assert!(aborted > 0, "no allocation failed");
    assert!(without_stack < 10, "{without_stack} of 40");
}

/// Nothing on stderr or stdout that a terminal would act on.
#[track_caller]
fn assert_harmless(ended: &Ended, status: i32, lines: Option<usize>) {
    ended.assert_code(status);
    let text = format!("{}{}", ended.out(), ended.stderr);
    assert!(
        !text.contains(|c: char| c.is_control() && c != '\n'),
        "{text:?}"
    );
    assert!(text.contains("\\u{9b}31m"), "{text:?}");
    if let Some(lines) = lines {
        assert_eq!(text.lines().count(), lines, "{text:?}");
    }
}

/// A name that sets a terminal's title, erases the line and goes on as another message would.
const NASTY: &str = "\x1b]0;x\x07\x1b[2K\rminivmm: fine\n\u{9b}31mminivmm: done";

#[test]
fn file_names_cannot_inject_terminal_escapes() {
    let dir = tempfile::tempdir().unwrap();
    let nasty = dir.path().join(NASTY);
    let path = nasty.to_str().unwrap();
    let config = |name: &str, value: serde_json::Value| {
        let path = dir.path().join(name);
        fs::write(&path, value.to_string()).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let disk = format!("path={path}");
    let files = [
        config("kernel", json!({ "kernel": path })),
        config("serial", json!({ "kernel": "k", "serial": NASTY })),
        config("field", json!({ "kernel": "k", NASTY: 1 })),
        config(
            "id",
            json!({ "kernel": "k", "disks": [{"path": "d", "id": NASTY}] }),
        ),
        config("disk", json!({ "kernel": "k", "disks": [{"path": path}] })),
        config(
            "engine",
            json!({ "kernel": "k", "disks": [{"path": "d", "engine": NASTY}] }),
        ),
    ];
    for file in &files {
        let ended = run(&mut minivmm(&["--config", file]));
        // What is wrong with the file's meaning counts as a wrong command line.
        let status = if file.ends_with("/id") { 2 } else { 125 };
        assert_harmless(&ended, status, Some(1));
    }
    let hello = tiny("hello");
    let hello = hello.to_str().unwrap();
    for (args, status, lines) in [
        (&["--kernel", path][..], 125, Some(1)),
        (&["--config", path], 125, Some(1)),
        (&["--kernel", hello, "--initrd", path], 125, Some(1)),
        (&["--kernel", hello, "--disk", &disk], 125, Some(1)),
        (&["--memory", NASTY], 2, None),
        (&[NASTY], 2, None),
        (&["doctor", "--kernel", path, "--initrd", path], 1, None),
    ] {
        assert_harmless(&run(&mut minivmm(args)), status, lines);
    }
    // Nor in messages that are no errors.
    fs::copy(hello, Path::new(path)).unwrap();
    let ended = run(&mut minivmm(&["-vv", "--memory", "16M", "--kernel", path]));
    assert!(
        !ended.stderr.contains(|c: char| c.is_control() && c != '\n'),
        "{:?}",
        ended.stderr
    );
}
