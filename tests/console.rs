//! The console of tiny guests: input and output through pipes, files and readers that stall.

mod common;

use std::fs;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use common::{PATIENCE, boot_tiny, kill, minivmm, run, run_with_input, signal, tiny, wait};

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
    ended.assert_said("reader first");
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
