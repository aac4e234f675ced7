//! The sandbox: what each thread of a running VM is held by, what comes of a call that it refuses, and hosts that lack a part.

mod common;

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use common::{PATIENCE, boot_tiny, run, wait};
use log::LevelFilter;
use minivmm::cli::log::start_log;
use minivmm::cli::process::install_fault_handlers;
use minivmm::config::SandboxMode;
use minivmm::sandbox::{Paths, Role, Sandbox};
use minivmm_devices::thread::ThreadKind;

/// Names a mode, a thread and a call to [`the_call`].
const CALL: &str = "MINIVMM_TEST_CALL";

/// The exit status of a process whose call was made.
const MADE: i32 = 42;

/// What /proc says of each thread of a VM that runs, by name, once `is_ready`.
fn threads(
    vm: &Child,
    is_ready: impl Fn(&BTreeMap<String, String>) -> bool,
) -> BTreeMap<String, String> {
    let end = Instant::now() + PATIENCE;
    loop {
        let tasks = fs::read_dir(format!("/proc/{}/task", vm.id())).unwrap();
        let read = |task: fs::DirEntry| {
            let name = fs::read_to_string(task.path().join("comm")).ok()?;
            let status = fs::read_to_string(task.path().join("status")).ok()?;
            Some((name.trim().to_owned(), status))
        };
        let threads = tasks.filter_map(|task| read(task.ok()?)).collect();
        if is_ready(&threads) {
            return threads;
        }
        assert!(Instant::now() < end, "{threads:?}");
        thread::sleep(Duration::from_millis(5));
    }
}

fn field<'a>(status: &'a str, name: &str) -> &'a str {
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|line| line.strip_prefix(':'))
        .unwrap_or_default()
        .trim()
}

#[test]
fn every_thread_of_a_running_vm_is_confined() {
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(1 << 20).unwrap();
    let disk = format!("path={}", disk.path().display());
    for (mode, restart) in [("strict", "exit"), ("strict", "restart"), ("off", "exit")] {
        let args = [
            "--sandbox",
            mode,
            "--on-reboot",
            restart,
            "--cpus",
            "2",
            "--rng",
            "--disk",
            &disk,
        ];
        let mut command = boot_tiny("ends", "h", &args);
        let mut vm = command.stdin(Stdio::piped()).spawn().unwrap();
        let seccomp = if mode == "off" { "0" } else { "2" };
        let found = threads(&vm, |threads| {
            threads.contains_key("vcpu1")
                && threads.contains_key("virtio-rng")
                && threads
                    .values()
                    .all(|status| field(status, "Seccomp") == seccomp)
        });
        assert!(found.len() >= 6, "{found:?}");
        for (name, status) in found.iter().filter(|_| mode == "strict") {
            assert_eq!(field(status, "NoNewPrivs"), "1", "{name}");
            // Where a restart opens files again: CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, if they were held.
            let spared = if restart == "restart" && name == "minivmm" {
                6
            } else {
                0
            };
            let held = u64::from_str_radix(field(status, "CapPrm"), 16).unwrap();
            assert_eq!(held & !spared, 0, "{name}");
        }
        vm.kill().unwrap();
        wait(vm, PATIENCE);
    }
}

/// Makes a call as a thread of a kind would, in a process of its own: only one that [`CALL`] asks for.
#[test]
fn the_call() {
    let Ok(wanted) = env::var(CALL) else { return };
    let [mode, kind, call] = wanted.split(' ').collect::<Vec<_>>()[..] else {
        panic!("{wanted}")
    };
    install_fault_handlers();
    start_log(LevelFilter::Warn);
    let mode = match mode {
        "strict" => SandboxMode::Strict,
        "log" => SandboxMode::Log,
        _ => SandboxMode::Off,
    };
    let parent = std::os::unix::process::parent_id().cast_signed();
    let sandbox = Sandbox::new(mode, Role::Main).unwrap();
    match kind {
        "main" => sandbox.confine_main(Paths::default).unwrap(),
        "vcpu" => sandbox.confine(ThreadKind::Vcpu).unwrap(),
        "block" => sandbox.confine(ThreadKind::Block).unwrap(),
        "rng" => sandbox.confine(ThreadKind::Rng).unwrap(),
        _ => sandbox.confine(ThreadKind::Console).unwrap(),
    }
    // Without a sandbox they do no harm: all succeed but for that of process 0, and that on no KVM.
    let none = std::ptr::null_mut::<libc::c_void>();
    #[allow(unsafe_code, reason = "the calls are what is tested")]
    // SAFETY: the calls are given numbers, strings and null pointers; a child ends at once.
    let result = unsafe {
        match call {
            "socket" => libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0).into(),
            "openat" => {
                libc::openat(libc::AT_FDCWD, c"/etc/passwd".as_ptr(), libc::O_RDONLY).into()
            }
            "ptrace" => libc::ptrace(libc::PTRACE_DETACH, 0, none, none),
            "kill" => libc::kill(parent, 0).into(),
            "mmap" => libc::mmap(
                none,
                4096,
                libc::PROT_EXEC,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            ) as i64,
            "clone" => {
                let child = libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0);
                if child == 0 {
                    libc::_exit(0);
                }
                child
            }
            "io_uring_setup" => libc::syscall(libc::SYS_io_uring_setup, 1, [0u64; 15].as_mut_ptr()),
            // KVM_CREATE_VM
            _ => libc::ioctl(0, 0xae01, 0).into(),
        }
    };
    let result = (result == -1).then(std::io::Error::last_os_error);
    assert!(
        ["ioctl", "ptrace"].contains(&call) || result.is_none(),
        "{call}: {result:?}"
    );
    std::process::exit(MADE);
}

#[test]
fn a_refused_call_is_named_and_ends_the_process() {
    let calls = [
        "socket",
        "openat",
        "ptrace",
        "kill",
        "mmap",
        "clone",
        "io_uring_setup",
        "ioctl",
    ];
    let refused = |mode: &str, kind: &str, call: &str| {
        let output = Command::new(env::current_exe().unwrap())
            .args(["--exact", "the_call", "--nocapture", "--test-threads=1"])
            .env(CALL, [mode, kind, call].join(" "))
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code(), stderr)
    };
    for call in calls {
        for kind in ["main", "vcpu", "block", "rng", "console"] {
            let (status, stderr) = refused("strict", kind, call);
            assert_eq!(status, Some(125), "{kind} {call}: {stderr}");
            let line = format!("minivmm: error: the sandbox refused a system call: {call}");
            assert!(
                stderr.contains(&line) && stderr.contains(" by thread the_call\n"),
                "{kind}: {stderr}"
            );
        }
        let (status, stderr) = refused("log", "vcpu", call);
        assert_eq!(status, Some(MADE), "{call}: {stderr}");
        let line = format!("minivmm: warning: the sandbox would refuse a system call: {call}");
        assert!(stderr.contains(&line), "{call}: {stderr}");
        let (status, stderr) = refused("off", "vcpu", call);
        assert_eq!(status, Some(MADE), "{call}: {stderr}");
        assert!(!stderr.contains("sandbox"), "{call}: {stderr}");
    }
}

/// Has the kernel of `command` answer that it does not know `calls`.
fn without(command: &mut Command, calls: &[i64]) {
    let instruction = |code, jf, k| libc::sock_filter { code, jt: 0, jf, k };
    let (load, equal, answer) = (
        libc::BPF_LD | libc::BPF_W | libc::BPF_ABS,
        libc::BPF_JMP | libc::BPF_JEQ,
        libc::BPF_RET,
    );
    // The number of the call is the first field.
    let mut program = vec![instruction(load as u16, 0, 0)];
    for call in calls {
        program.push(instruction(equal as u16, 1, *call as u32));
        let unknown = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;
        program.push(instruction(answer as u16, 0, unknown));
    }
    program.push(instruction(answer as u16, 0, libc::SECCOMP_RET_ALLOW));
    let install = move || {
        let program = libc::sock_fprog {
            len: program.len() as u16,
            filter: program.as_ptr().cast_mut(),
        };
        // SAFETY: the kernel copies the program, which is alive.
        #[allow(unsafe_code, reason = "a filter of the child alone")]
        let result = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
            libc::prctl(
                libc::PR_SET_SECCOMP,
                libc::SECCOMP_MODE_FILTER,
                &raw const program,
            )
        };
        match result {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    };
    #[allow(unsafe_code, reason = "a filter of the child alone")]
    // SAFETY: installing a filter makes two system calls and allocates nothing.
    unsafe {
        command.pre_exec(install)
    };
}

#[test]
fn a_host_that_lacks_a_part_runs_vms_unless_all_is_required() {
    let landlock = libc::SYS_landlock_create_ruleset;
    for (lacks, names) in [
        (&[landlock][..], &["Landlock"][..]),
        (&[libc::SYS_seccomp], &["seccomp"]),
        (&[landlock, libc::SYS_seccomp], &["seccomp", "Landlock"]),
    ] {
        let mut command = boot_tiny("hello", "", &["-v", "--sandbox", "strict"]);
        without(&mut command, lacks);
        let ended = run(&mut command);
        ended.assert_code(0);
        for name in names {
            let line = format!("the host's kernel lacks {name}");
            assert!(ended.stderr.contains(&line), "{name}: {}", ended.stderr);
        }
        let mut command = boot_tiny("hello", "", &["--require-sandbox"]);
        without(&mut command, lacks);
        let ended = run(&mut command);
        ended.assert_code(125);
        assert!(ended.stderr.contains(names[0]), "{}", ended.stderr);
    }
}

#[test]
fn what_is_required_cannot_be_off() {
    for mode in ["log", "off"] {
        let args = ["--require-sandbox", "--sandbox", mode];
        run(&mut boot_tiny("hello", "", &args)).assert_code(2);
    }
}
