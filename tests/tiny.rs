//! Ring 2: tiny guests on whatever KVM there is. Exits, ports, MMIO, interrupts, and every row of the exit-status table.

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::SigSet;

use common::{PATIENCE, boot_tiny, kill, minivmm, run, run_with_input, signal, tiny, wait};

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
    assert!(
        ended.stderr.contains("the kernel panicked: tiny;"),
        "{}",
        ended.stderr
    );
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
    assert!(ended.stderr.contains("booting again"), "{}", ended.stderr);
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
        assert!(
            ended.stderr.contains("without any console output"),
            "{}",
            ended.stderr
        );
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
        assert!(ended.stderr.contains(part), "{part}: {}", ended.stderr);
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
    let ended = run(&mut boot_tiny(
        "ends",
        "r",
        &["--on-reboot", "restart", "--deadline", "1s", "-v"],
    ));
    let boots = ended.stderr.matches("booting again").count();
    assert!(boots >= 2, "{boots} restarts: {}", ended.stderr);
}

#[test]
fn output_is_delivered_where_a_restart_fails() {
    let dir = tempfile::tempdir().unwrap();
    let kernel = dir.path().join("lines");
    fs::copy(tiny("lines"), &kernel).unwrap();
    let args = ["--cmdline", "r", "--on-reboot", "restart", "--kernel"];
    let mut child = minivmm(&args).arg(&kernel).spawn().unwrap();
    let mut first = [0; 9];
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut first).unwrap();
    fs::remove_file(&kernel).unwrap();
    // Time enough to reset, and to end without its reader.
    thread::sleep(Duration::from_secs(1));
    let mut rest = Vec::new();
    stdout.read_to_end(&mut rest).unwrap();
    assert!(rest.ends_with(b"0000ffff\n"));
    assert_eq!(first.len() + rest.len(), 0x1_0000 * 9);
    assert_eq!(wait(child, PATIENCE).status.code(), Some(125));
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
fn ten_kilobytes_of_input_come_back_unharmed() {
    let mut input: Vec<u8> = (0..10_240u32).map(|i| b'!' + (i % 90) as u8).collect();
    let sum = input.iter().fold(0, |sum, byte| sum ^ byte);
    input.push(4);
    let ended = run_with_input(&mut boot_tiny("echo", "", &[]), &input);
    assert_eq!(ended.code(), i32::from(sum));
    assert_eq!(ended.stdout, &input[..input.len() - 1]);
}

#[test]
fn input_from_a_file_comes_too() {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(&file, b"hello\x04").unwrap();
    let mut command = boot_tiny("echo", "", &[]);
    command.stdin(fs::File::open(file.path()).unwrap());
    let ended = run(&mut command);
    assert_eq!(ended.out(), "hello");
}

#[test]
fn the_end_of_input_is_not_the_end_of_the_guest() {
    let ended = run_with_input(
        &mut boot_tiny("echo", "", &["--deadline", "500ms"]),
        b"hello",
    );
    ended.assert_code(124);
    assert_eq!(ended.out(), "hello");
}

#[test]
fn a_slow_reader_gets_every_byte() {
    let mut child = boot_tiny("lines", "", &[]).spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let reader = thread::spawn(move || {
        let mut all = Vec::new();
        let mut chunk = [0u8; 16384];
        loop {
            let count = stdout.read(&mut chunk).unwrap();
            if count == 0 {
                return all;
            }
            all.extend_from_slice(&chunk[..count]);
            thread::sleep(Duration::from_millis(10));
        }
    });
    assert_eq!(wait(child, PATIENCE).status.code(), Some(0));
    let expected: String = (0..0x1_0000).map(|i| format!("{i:08x}\n")).collect();
    assert!(
        reader.join().unwrap() == expected.into_bytes(),
        "lines are lost or torn"
    );
}

#[test]
fn closed_output_reader_does_not_end_the_guest() {
    let mut child = boot_tiny("lines", "", &[]).spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let mut first = [0u8; 9];
    stdout.read_exact(&mut first).unwrap();
    drop(stdout);
    let output = wait(child, PATIENCE);
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(&first, b"00000000\n");
}

#[test]
fn stalled_reader_bounds_memory_and_allows_signals() {
    let child = {
        let mut command = boot_tiny("flood", "", &[]);
        command.spawn().unwrap()
    };
    thread::sleep(Duration::from_secs(1));
    let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    let rss: u64 = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))
        .and_then(|value| value.trim().strip_suffix(" kB")?.trim().parse().ok())
        .unwrap();
    assert!(rss < 8 << 10, "{rss} KiB of private memory");
    signal(&child, "TERM");
    // Nobody reads while minivmm flushes: a second signal breaks that off.
    thread::sleep(Duration::from_millis(300));
    kill(child.id(), "TERM");
    let start = Instant::now();
    let mut child = child;
    while child.try_wait().unwrap().is_none() {
        assert!(
            start.elapsed() < Duration::from_secs(10),
            "two SIGTERMs and still there"
        );
        thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(child.wait().unwrap().code(), Some(143));
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
            "{before} exec {minivmm} --memory 16M --cmdline '{cmdline}' {args} --kernel {}",
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
    assert!(ended.stderr.contains("discarded"), "{}", ended.stderr);
    // EMFILE by its number: each C library has words of its own for it.
    for (limit, fragment) in [
        ("ulimit -n 4;", "(os error 24)"),
        ("ulimit -n 10;", "(os error 24)"),
        ("ulimit -v 15000;", "ulimit -v"),
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
fn unread_log_does_not_block() {
    let start = Instant::now();
    let mut child = boot_tiny("abuse", "b", &["-v", "--deadline", "1s"])
        .spawn()
        .unwrap();
    while child.try_wait().unwrap().is_none() {
        if start.elapsed() > Duration::from_secs(20) {
            _ = child.kill();
            panic!("minivmm waits for its log's reader");
        }
        thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(child.wait().unwrap().code(), Some(124));
}

#[test]
fn closed_standard_streams_are_tolerated() {
    let script = format!(
        "exec {} --memory 16M --cmdline p --kernel {} <&- >&- 2>&-",
        env!("CARGO_BIN_EXE_minivmm"),
        tiny("lines").display()
    );
    let status = std::process::Command::new("sh")
        .args(["-c", &script])
        .status()
        .unwrap();
    assert_eq!(status.code(), Some(0));
}

#[test]
fn the_console_goes_to_a_file_or_nowhere() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console");
    let serial = format!("file={}", path.display());
    let ended = run(&mut boot_tiny("hello", "", &["--serial", &serial]));
    ended.assert_code(0);
    assert_eq!(
        (fs::read_to_string(&path).unwrap(), ended.out()),
        ("!".into(), String::new())
    );
    let ended = run(&mut boot_tiny("hello", "", &["--serial", "none"]));
    ended.assert_code(0);
    assert_eq!(ended.out(), "");
    run(&mut boot_tiny("hello", "", &["--serial", "file=/"])).assert_code(125);
    run(&mut boot_tiny("hello", "", &["--serial", "file=/dev/full"])).assert_code(0);
}

#[test]
fn a_fifo_is_a_console_once_it_has_a_reader() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("fifo");
    let made = std::process::Command::new("mkfifo").arg(&path).status();
    assert!(made.unwrap().success());
    let serial = format!("file={}", path.display());
    let ended = run(&mut boot_tiny("hello", "", &["--serial", &serial]));
    ended.assert_code(125);
    assert!(ended.stderr.contains("reader first"), "{}", ended.stderr);
    let reader = fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(&path)
        .unwrap();
    run(&mut boot_tiny("hello", "", &["--serial", &serial])).assert_code(0);
    let mut text = String::new();
    { reader }.read_to_string(&mut text).unwrap();
    assert_eq!(text, "!");
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
    assert!(ended.stderr.contains("colour"), "{}", ended.stderr);
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

/// Seconds of CPU time that a process has used so far.
fn cpu_seconds(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    // Behind the name, which may have anything in it: utime and stime (proc(5), fields 14 and 15).
    let (_, rest) = stat.rsplit_once(") ").unwrap();
    let ticks: u64 = rest
        .split(' ')
        .skip(11)
        .take(2)
        .map(|ticks| ticks.parse::<u64>().unwrap())
        .sum();
    ticks as f64 / rustix::param::clock_ticks_per_second() as f64
}

#[test]
fn halted_guest_with_queued_requests_uses_no_cpu_time() {
    let args = ["--console", "virtio"];
    let mut command = boot_tiny("console-flood", "", &args);
    let child = command.stdout(Stdio::null()).spawn().unwrap();
    // Past the start, which takes some, also on a busy host.
    thread::sleep(Duration::from_secs(1));
    let at_start = cpu_seconds(child.id());
    thread::sleep(Duration::from_secs(3));
    let used = cpu_seconds(child.id()) - at_start;
    signal(&child, "TERM");
    let output = wait(child, PATIENCE);
    let log = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(143), "{log}");
    assert!(log.contains("until its driver resets it"), "{log}");
    assert!(used < 0.2, "{used} s of CPU time in 3 s");
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
