//! Tiny guests on any KVM: exits, ports, MMIO, interrupts, and every row of the exit-status table.

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::SigSet;

use common::{PATIENCE, boot_tiny, minivmm, run, run_with_input, signal, tiny, wait};

#[test]
fn a_byte_then_power_off() {
    let ended = run(&mut boot_tiny("hello", "", &[]));
    ended.assert_code(0);
    assert_eq!(ended.out(), "!");
    assert_eq!(ended.stderr, "", "minivmm has nothing to say");
}

#[test]
fn a_byte_then_power_off_by_the_pvh_entry() {
    for protocol in ["auto", "pvh"] {
        let ended = run(&mut boot_tiny(
            "hello-pvh",
            "",
            &["--boot-protocol", protocol],
        ));
        ended.assert_code(0);
        assert_eq!(ended.out(), "!");
    }
}

#[test]
fn every_end_has_its_status() {
    for (cmdline, status) in [
        ("p", 0),
        ("r", 0),
        ("k", 0),
        ("9", 0),
        ("c", 134),
        ("Pr", 134),
        ("e*", 42),
        ("eA", 65),
        ("t", 139),
        ("t reboot=k", 139),
        // As asked for: a reset.
        ("t reboot=t", 0),
        ("t reboot=pci", 0),
        // But what resets itself in a panic has panicked.
        ("Pt reboot=t", 134),
    ] {
        let ended = run(&mut boot_tiny("ends", cmdline, &[]));
        assert_eq!(ended.code(), status, "{cmdline}: {}", ended.stderr);
    }
}

#[test]
fn panic_that_hangs_exits_134() {
    let ended = run(&mut boot_tiny("ends", "PEs", &["--deadline", "200s"]));
    ended.assert_code(134);
    assert!(ended.out().ends_with("tiny ]---\r\n"), "{}", ended.out());
    // The line alone may be an old log's, and the kernel may go on.
    run(&mut boot_tiny("ends", "PPp", &["--deadline", "200s"])).assert_code(0);
    let ended = run(&mut boot_tiny("log", "", &["--deadline", "200s"]));
    ended.assert_code(7);
    assert!(ended.out().contains("tiny ]---\r\n"), "{}", ended.out());
}

#[test]
fn silent_panic_is_found_in_the_kernel_log() {
    // All of them have the line in their memory, and none on the console.
    for (cmdline, status) in [("r", 0), ("Cr", 134), ("Cp", 0), ("Ct reboot=t", 134)] {
        let ended = run(&mut boot_tiny("ends", cmdline, &[]));
        assert_eq!(ended.code(), status, "{cmdline}: {}", ended.stderr);
        let told = ended
            .stderr
            .contains("panicked, and did not say so on the console: tiny;");
        assert_eq!(told, status == 134, "{cmdline}: {}", ended.stderr);
    }
    // One that hangs is not known to have panicked until somebody looks.
    let ended = run(&mut boot_tiny("ends", "s", &["--deadline", "300ms"]));
    ended.assert_code(124);
    ended.assert_said("the kernel panicked: tiny;");
}

#[test]
fn init_to_the_boot_cpu_is_a_reset() {
    for (cmdline, by) in [("l", "its local APIC"), ("i", "the I/O APIC")] {
        let args = ["--deadline", "60s"];
        let ended = run(&mut boot_tiny("init-ipi", cmdline, &args));
        assert_eq!(ended.code(), 0, "by {by}: {}", ended.stderr);
    }
    let args = ["--on-reboot", "restart", "--deadline", "1s", "-v"];
    let ended = run(&mut boot_tiny("init-ipi", "l", &args));
    ended.assert_code(124);
    ended.assert_said("booting again");
}

#[test]
fn exit_port_status_255() {
    // The guest hands on the exclusive-or of its input.
    run_with_input(&mut boot_tiny("echo", "", &[]), &[0xff, 4]).assert_code(255);
}

#[test]
fn a_deadline_ends_a_guest_that_spins_or_halts() {
    for cmdline in ["s", "h"] {
        let ended = run(&mut boot_tiny("ends", cmdline, &["--deadline", "200ms"]));
        ended.assert_code(124);
        ended.assert_said("without any console output");
        assert!(ended.stderr.contains("rip="), "registers: {}", ended.stderr);
    }
}

#[test]
fn signals_end_a_guest_that_spins_or_halts() {
    for cmdline in ["s", "h"] {
        for (name, status) in [("INT", 130), ("TERM", 143), ("HUP", 129)] {
            let child = boot_tiny("ends", cmdline, &["--cpus", "2"])
                .spawn()
                .unwrap();
            thread::sleep(Duration::from_millis(200));
            signal(&child, name);
            let output = wait(child, Duration::from_secs(20));
            assert_eq!(output.status.code(), Some(status), "{name} {cmdline}");
        }
    }
}

#[test]
fn a_triple_fault_leaves_a_post_mortem() {
    let ended = run(&mut boot_tiny("ends", "t", &[]));
    ended.assert_code(139);
    for part in ["triple-faulted", "bytes on the console: 0", "likely cause"] {
        ended.assert_said(part);
    }
}

#[test]
fn quiet_suppresses_the_post_mortem() {
    let ended = run(&mut boot_tiny("ends", "t", &["-q"]));
    ended.assert_code(139);
    assert_eq!(ended.stderr, "");
}

#[test]
fn restart_boots_again_in_the_same_process() {
    // The guest prints a line that looks like a panic, but resets each time: restart goes on until the deadline.
    let ended = run(&mut boot_tiny(
        "ends",
        "r",
        &["--on-reboot", "restart", "--deadline", "1s"],
    ));
    ended.assert_code(124);
    // With a socket too, which is made anew.
    let dir = tempfile::tempdir().unwrap();
    let socket = format!("--vsock=path={}", dir.path().join("v.sock").display());
    let args = ["--on-reboot", "restart", "--deadline", "1s", "-v", &socket];
    let ended = run(&mut boot_tiny("ends", "r", &args));
    ended.assert_code(124);
    let boots = ended.stderr.matches("booting again").count();
    assert!(boots >= 2, "{boots} restarts: {}", ended.stderr);
}

#[test]
fn guest_halted_for_good_is_reported() {
    const FOR_GOOD: &str = "nothing will wake it";
    const NO_TIMER: &str = "only a device can wake it";
    // Read until it is there: a failure is a hang, which the deadline ends.
    let tells = |cmdline, wanted: &str| {
        let args = ["--deadline", "60s", "--cpus", "2", "-v"];
        let mut child = boot_tiny("ends", cmdline, &args).spawn().unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap()).lines();
        let found = log.any(|line| line.unwrap().contains(wanted));
        signal(&child, "TERM");
        wait(child, PATIENCE);
        found
    };
    assert!(tells("h", FOR_GOOD));
    assert!(tells("i", NO_TIMER));
    let spinning = run(&mut boot_tiny("ends", "s", &["--deadline", "5s", "-v"]));
    let log = &spinning.stderr;
    assert!(!log.contains(FOR_GOOD) && !log.contains(NO_TIMER), "{log}");
}

#[test]
fn stop_is_reported_on_the_console() {
    let mut child = boot_tiny("clock", "", &["--deadline", "60s"])
        .spawn()
        .unwrap();
    let mut ready = [0];
    let stdout = child.stdout.as_mut().unwrap();
    stdout.read_exact(&mut ready).unwrap();
    // It ends when it is told, so that it was not before.
    thread::sleep(Duration::from_secs(1));
    assert!(child.try_wait().unwrap().is_none());
    signal(&child, "STOP");
    signal(&child, "CONT");
    assert_eq!(wait(child, PATIENCE).status.code(), Some(0));
}

#[test]
fn restarts_leak_nothing() {
    let args = ["--on-reboot", "restart", "--deadline", "3s", "--cpus", "2"];
    let child = boot_tiny("ends", "r", &args).spawn().unwrap();
    let most = |what: &str| {
        let dir = format!("/proc/{}/{what}", child.id());
        let end = Instant::now() + Duration::from_millis(500);
        let mut most = 0;
        while Instant::now() < end {
            most = most.max(fs::read_dir(&dir).unwrap().count());
        }
        most
    };
    let early = (most("fd"), most("task"));
    thread::sleep(Duration::from_millis(500));
    let late = (most("fd"), most("task"));
    assert!(
        late.0 <= early.0.max(20) && late.1 <= early.1.max(5),
        "{early:?} {late:?}"
    );
    assert_eq!(wait(child, PATIENCE).status.code(), Some(124));
}

#[test]
fn every_port_and_mmio_hole_can_be_accessed() {
    run(&mut boot_tiny("holes", "", &[])).assert_code(0);
}

#[test]
fn hostile_guest_accesses_are_survived() {
    for (cmdline, statuses) in [
        // outl to the exit port.
        ("w", 7..=7),
        // SMI, ExtINT and reserved delivery modes; a level-triggered interrupt arrives all the same.
        ("i", 0x42..=0x42),
        // Over its own ACPI tables and page tables.
        ("o", 139..=139),
        // MSRs: the number of faults from one that does not exist, fewer where the host's KVM ignores those.
        ("m", 0..=2),
        // Two processors flood the boot marks and end at once.
        ("2", 7..=7),
    ] {
        let args = ["--cpus", "2", "--deadline", "20s"];
        let ended = run(&mut boot_tiny("abuse", cmdline, &args));
        assert!(
            statuses.contains(&ended.code()),
            "{cmdline}: {} {}",
            ended.code(),
            ended.stderr
        );
    }
}

#[test]
fn one_string_instruction_may_be_longer_than_a_page() {
    let ended = run(&mut boot_tiny("abuse", "s", &[]));
    ended.assert_code(0);
    assert!(ended.stdout.iter().all(|byte| *byte == b'x'));
    assert_eq!(ended.stdout.len(), 10_000);
}

#[test]
fn an_interrupt_wakes_a_halted_vcpu_even_if_its_pin_was_masked() {
    for cmdline in ["", "m"] {
        run(&mut boot_tiny("irq", cmdline, &["--deadline", "20s"])).assert_code(0x42);
    }
}

#[test]
fn inherited_signal_mask_does_not_block_the_exit() {
    // On a thread of its own: a child inherits the mask of the thread that makes it.
    thread::spawn(|| {
        SigSet::all().thread_block().unwrap();
        let child = boot_tiny("ends", "h", &["--deadline", "300ms", "--cpus", "2"])
            .spawn()
            .unwrap();
        assert_eq!(wait(child, PATIENCE).status.code(), Some(124));
    })
    .join()
    .unwrap();
}

/// minivmm behind a shell's words, such as `ulimit -f 1;`.
fn shell(before: &str, cmdline: &str, guest: &str, args: &str) -> std::process::Command {
    let mut command = std::process::Command::new("sh");
    let minivmm = env!("CARGO_BIN_EXE_minivmm");
    let guest = tiny(guest);
    command
        .arg("-c")
        .arg(format!(
            "{before} exec {minivmm} --memory 64M --cmdline '{cmdline}' {args} --kernel {}",
            guest.display()
        ))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

#[test]
fn nohup_is_respected() {
    let child = shell("trap '' HUP;", "s", "ends", "--deadline 1s")
        .spawn()
        .unwrap();
    thread::sleep(Duration::from_millis(300));
    signal(&child, "HUP");
    assert_eq!(wait(child, PATIENCE).status.code(), Some(124));
}

#[test]
fn resource_limits_exit_cleanly() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("console");
    let serial = format!("--serial file={} --deadline 10s", file.display());
    let ended = run(&mut shell("ulimit -f 1;", "", "flood", &serial));
    ended.assert_code(124);
    ended.assert_said("discarded");
    // EMFILE by its number: each C library has words of its own for it.
    for (limit, fragment) in [
        ("ulimit -n 4;", "(os error 24)"),
        ("ulimit -n 10;", "(os error 24)"),
        ("ulimit -v 40000;", "ulimit -v"),
    ] {
        let ended = run(&mut shell(limit, "", "hello", ""));
        ended.assert_code(125);
        assert!(ended.stderr.contains(fragment), "{limit} {}", ended.stderr);
    }
    // The warning of a CPU limit; the kernel's kill would come with the hard limit.
    let ended = run(&mut shell("ulimit -St 1;", "s", "ends", "--deadline 60s"));
    ended.assert_code(128 + 24);
}

#[test]
fn arguments_override_the_configuration_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vm.json");
    let json =
        serde_json::json!({"kernel": tiny("ends"), "cmdline": "e*", "memory": "16M", "cpus": 2});
    fs::write(&path, json.to_string()).unwrap();
    let config = path.to_str().unwrap();
    run(&mut minivmm(&["--config", config])).assert_code(42);
    run(&mut minivmm(&["--config", config, "--cmdline", "eA"])).assert_code(65);
    fs::write(&path, r#"{"kernel": "k", "colour": "red"}"#).unwrap();
    let ended = run(&mut minivmm(&["--config", config]));
    ended.assert_code(125);
    ended.assert_said("colour");
}

#[test]
fn max_vcpus_boot() {
    for cpus in ["1", "2", "64"] {
        run(&mut boot_tiny("hello", "", &["--cpus", cpus])).assert_code(0);
    }
}

#[test]
fn memory_beyond_the_host_starts_or_is_refused() {
    let mut command = minivmm(&["--memory", "512G", "--kernel"]);
    command.arg(tiny("hello"));
    let ended = run(&mut command);
    // A host with fewer address bits says so; none may be slow or reserve the memory.
    assert!(matches!(ended.code(), 0 | 125), "{}", ended.stderr);
    assert!(
        ended.code() == 0 || ended.stderr.contains("physical address bits"),
        "{}",
        ended.stderr
    );
}
