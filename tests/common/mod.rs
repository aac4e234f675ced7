//! What the integration tests share: the binary, the tiny guests, and children that cannot outlive a test.

#![allow(dead_code, reason = "each test file uses its part")]

pub(crate) mod fuse;
pub(crate) mod http;
pub(crate) mod image;
pub(crate) mod limit;
pub(crate) mod linux;
pub(crate) mod network;
pub(crate) mod registry;
pub(crate) mod skip;
pub(crate) mod tap;
pub(crate) mod terminal;

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

pub(crate) use limit::PATIENCE;
use limit::within;
use sha2::{Digest, Sha256};

pub(crate) fn project(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// A tiny guest, assembled once a test process.
pub(crate) fn tiny(name: &str) -> PathBuf {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    let dir = DIR.get_or_init(|| {
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("tiny");
        let build = project("guest-kernels/tiny/build");
        let status = Command::new(build)
            .arg(&dir)
            .status()
            .expect("the build script runs");
        assert!(status.success(), "assembling the tiny guests");
        dir
    });
    dir.join(name)
}

/// A mode of the sandbox for the VMs of all tests but those that name one.
const SANDBOX: &str = "MINIVMM_TEST_SANDBOX";

/// minivmm with these arguments.
pub(crate) fn minivmm<S: AsRef<OsStr>>(args: &[S]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_minivmm"));
    let is = |arg: &S, option: &str| arg.as_ref() == option;
    let named = args
        .iter()
        .any(|arg| is(arg, "--sandbox") || is(arg, "--require-sandbox"));
    // A subcommand comes first.
    let runs = args
        .first()
        .is_some_and(|arg| arg.as_ref().as_encoded_bytes().starts_with(b"--"));
    if let Ok(mode) = env::var(SANDBOX)
        && runs
        && !named
    {
        command.args(["--sandbox", &mode]);
    }
    command
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// minivmm with a tiny guest.
pub(crate) fn boot_tiny(guest: &str, cmdline: &str, args: &[&str]) -> Command {
    let kernel = tiny(guest);
    let first = ["--memory", "16M", "--cmdline", cmdline, "--kernel"].map(OsStr::new);
    let args = args.iter().map(OsStr::new);
    minivmm(
        &first
            .into_iter()
            .chain([kernel.as_os_str()])
            .chain(args)
            .collect::<Vec<_>>(),
    )
}

/// What a finished minivmm left.
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: String,
    pub(crate) took: Duration,
}

impl Ended {
    pub(crate) fn code(&self) -> i32 {
        self.status
            .code()
            .unwrap_or_else(|| panic!("killed by a signal: {:?}", self.status))
    }

    pub(crate) fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    #[track_caller]
    pub(crate) fn assert_code(&self, code: i32) -> &Self {
        assert_eq!(
            self.code(),
            code,
            "stdout: {}\nstderr: {}",
            self.out(),
            self.stderr
        );
        self
    }

    /// Each of these is in its output.
    #[track_caller]
    pub(crate) fn assert_printed(&self, wanted: &[&str]) {
        for line in wanted {
            assert!(
                self.out().contains(line),
                "no {line:?} in: {}\n{}",
                self.out(),
                self.stderr
            );
        }
    }

    /// This is in what it has said on stderr.
    #[track_caller]
    pub(crate) fn assert_said(&self, wanted: &str) {
        let said = &self.stderr;
        assert!(said.contains(wanted), "no {wanted:?} in: {said}");
    }
}

/// Runs to the end with no input; a hang is killed and fails the test.
pub(crate) fn run(command: &mut Command) -> Ended {
    run_with_input(command, b"")
}

/// Runs to the end with this on its standard input, then end of file.
pub(crate) fn run_with_input(command: &mut Command, input: &[u8]) -> Ended {
    let start = Instant::now();
    if !input.is_empty() {
        command.stdin(Stdio::piped());
    }
    let mut child = command.spawn().expect("minivmm starts");
    let writer = child.stdin.take().map(|mut stdin| {
        let input = input.to_vec();
        // A guest that ends before it has read all is no error here.
        thread::spawn(move || _ = stdin.write_all(&input))
    });
    let output = wait(child, PATIENCE);
    if let Some(writer) = writer {
        writer.join().expect("the writer ends");
    }
    Ended {
        status: output.status,
        stdout: output.stdout,
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        took: start.elapsed(),
    }
}

/// Waits for what the guest writes.
#[track_caller]
pub(crate) fn expect(child: &mut Child, wanted: &str) {
    let mut got = vec![0; wanted.len()];
    let stdout = child.stdout.as_mut().unwrap();
    stdout.read_exact(&mut got).expect("the guest's output");
    assert_eq!(String::from_utf8_lossy(&got), wanted);
}

/// Waits for a child and collects its output; kills it and fails when it takes longer than `patience`.
pub(crate) fn wait(mut child: Child, patience: Duration) -> Output {
    fn drain(stream: Option<impl Read + Send + 'static>) -> thread::JoinHandle<Vec<u8>> {
        thread::spawn(move || {
            let mut bytes = Vec::new();
            if let Some(mut stream) = stream {
                _ = stream.read_to_end(&mut bytes);
            }
            bytes
        })
    }
    let stdout = drain(child.stdout.take());
    let stderr = drain(child.stderr.take());
    let status = within(patience, || {
        let status = child.try_wait().expect("wait for minivmm");
        if status.is_none() {
            thread::sleep(Duration::from_millis(1));
        }
        status
    });
    let Some(status) = status else {
        _ = child.kill();
        _ = child.wait();
        let stderr = String::from_utf8_lossy(&stderr.join().unwrap()).into_owned();
        let stdout = String::from_utf8_lossy(&stdout.join().unwrap()).into_owned();
        panic!("minivmm hung\nstdout: {stdout}\nstderr: {stderr}");
    };
    let output = Output {
        status,
        stdout: stdout.join().unwrap(),
        stderr: stderr.join().unwrap(),
    };
    if env::var_os(SANDBOX).is_some() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(!stderr.contains("the sandbox would refuse"), "{stderr}");
    }
    output
}

/// The processes that a process has started.
pub(crate) fn children(pid: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let lists =
        tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("children")).ok());
    let lists: Vec<_> = lists.collect();
    let pids = lists.iter().flat_map(|list| list.split_whitespace());
    pids.map(|pid| pid.parse().unwrap()).collect()
}

/// Sends a signal to a child.
pub(crate) fn signal(child: &Child, name: &str) {
    assert!(kill(child.id(), name), "SIG{name} could not be sent");
}

/// Sends a signal; `false` if there is no such process. By the shell's own kill: a small Debian has no other.
pub(crate) fn kill(pid: u32, name: &str) -> bool {
    let status = Command::new("sh")
        .args(["-c", &format!("kill -s {name} {pid}")])
        .stderr(Stdio::null())
        .status();
    status.expect("sh runs").success()
}

/// In hexadecimal digits.
pub(crate) fn sha256(data: &[u8]) -> String {
    hex(&Sha256::digest(data))
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
