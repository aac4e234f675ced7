//! `--timeline`: tiny guests whose boots are known, and what is reported of them.

mod common;

use std::fs;
use std::time::Duration;

use common::{Ended, boot_tiny, run, run_with_input};
use rustix::time::{ClockId, clock_gettime};
use serde_json::Value;
use tempfile::NamedTempFile;

/// Runs the guest `ends`, or another, with a timeline in a file.
fn timeline_of(guest: &str, cmdline: &str, args: &[&str]) -> (Ended, Value) {
    let file = NamedTempFile::new().unwrap();
    let path = file.path().to_str().unwrap();
    let ended = run(boot_tiny(guest, cmdline, args).args(["--timeline", path]));
    let json = fs::read_to_string(path).unwrap();
    let timeline = serde_json::from_str(&json).unwrap_or_else(|e| panic!("{e}: {json}"));
    (ended, timeline)
}

/// The names of all events, in order.
fn names(timeline: &Value) -> Vec<&str> {
    let events = timeline["events"].as_array().unwrap();
    events.iter().map(|e| e["name"].as_str().unwrap()).collect()
}

fn at(timeline: &Value, name: &str) -> u64 {
    let events = timeline["events"].as_array().unwrap();
    let event = events.iter().find(|event| event["name"] == name);
    event.unwrap_or_else(|| panic!("no {name}"))["at_ns"]
        .as_u64()
        .unwrap()
}

fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32).as_nanos() as u64
}

const BEFORE_THE_GUEST: [&str; 7] = [
    "process_start",
    "main",
    "config_read",
    "memory_mapped",
    "kernel_loaded",
    "vm_created",
    "vm_ready",
];

#[test]
fn timeline_events_are_in_order() {
    // A mark, "tiny# ", a mark, power off.
    let (ended, timeline) = timeline_of("ends", "bmbp", &["--cpus", "2"]);
    ended.assert_code(0);
    assert_eq!((&*ended.out(), &*ended.stderr), ("tiny# ", ""));
    let told = names(&timeline);
    let (before, guest) = told.split_at(BEFORE_THE_GUEST.len());
    assert_eq!(before, BEFORE_THE_GUEST);
    assert_eq!(
        guest,
        [
            "first_run",
            "boot_mark",
            "first_console_byte",
            "first_user_output",
            "boot_mark",
            "last_exit",
            "vcpus_stopped",
            "memory_measured",
            "process_end"
        ]
    );
    let events = timeline["events"].as_array().unwrap();
    assert!(events.is_sorted_by_key(|event| event["at_ns"].as_u64().unwrap()));
    for mark in events.iter().filter(|event| event["name"] == "boot_mark") {
        assert_eq!(mark["value"], 7);
    }
    assert_eq!(
        (&timeline["version"], &timeline["status"]),
        (&1.into(), &0.into())
    );
    assert_eq!(timeline["kernel"]["format"], "elf64");
    assert_eq!(timeline["kernel"]["loading"], "copied");
    assert!(timeline["kernel"]["bytes"].as_u64().unwrap() > 0);
    assert_eq!(timeline["initrd"], Value::Null);
    let memory = |whose: &str| timeline["memory"][whose].as_u64().unwrap();
    assert!((1..16 << 20).contains(&memory("own_bytes")), "{timeline}");
    assert!((1..16 << 20).contains(&memory("guest_bytes")), "{timeline}");
}

#[test]
fn exits_are_counted_by_kind_and_device() {
    // Each byte of "tiny# " takes one read of the line status and one write.
    let (_, timeline) = timeline_of("ends", "bmp", &[]);
    let exits = &timeline["exits"];
    let count = |kind: &str| exits["kinds"][kind].as_u64().unwrap();
    assert_eq!(
        (count("io_in"), count("io_out"), count("mmio_write")),
        (6, 8, 0)
    );
    assert_eq!(exits["total"], 14);
    let devices: Vec<(&str, u64)> = exits["devices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|d| (d["name"].as_str().unwrap(), d["exits"].as_u64().unwrap()))
        .collect();
    assert_eq!(devices[0], ("COM1", 12));
    assert!(devices.contains(&("boot-mark port", 1)) && devices.contains(&("ACPI power", 1)));
    let console = &timeline["console"];
    assert_eq!(
        (&console["bytes"], &console["com1_exits"]),
        (&6.into(), &12.into())
    );
    let handling = exits["devices"][0]["handling_ns"].as_u64().unwrap();
    let round_trip = exits["round_trip_ns"].as_u64().unwrap();
    let cost = console["com1_cost_ns"].as_u64().unwrap();
    assert_eq!(cost, handling + 12 * round_trip);
    let guest = at(&timeline, "vcpus_stopped") - at(&timeline, "first_run");
    assert!(0 < handling && cost < guest, "{cost} of {guest}");
}

#[test]
fn the_process_starts_after_its_parent_asked_and_before_main() {
    let before = monotonic_ns();
    let (_, timeline) = timeline_of("hello", "", &[]);
    let after = monotonic_ns();
    let start = &timeline["process_start"];
    let within = start["within_ns"].as_u64().unwrap();
    let (start, main) = (
        start["monotonic_ns"].as_u64().unwrap(),
        at(&timeline, "main"),
    );
    assert!(before <= start + within, "{before} {start} {within}");
    assert!(main > 0, "exec takes time");
    assert!(start + at(&timeline, "process_end") < after);
}

#[test]
fn timeline_records_a_failed_vm() {
    for (cmdline, status) in [("mt", 139), ("mPr", 134), ("mc", 134), ("me*", 42)] {
        let (ended, timeline) = timeline_of("ends", cmdline, &[]);
        ended.assert_code(status);
        assert_eq!(timeline["status"], status, "{cmdline}");
        assert_eq!(names(&timeline).last(), Some(&"process_end"), "{cmdline}");
        assert!(names(&timeline).contains(&"first_user_output"), "{cmdline}");
    }
    let (ended, timeline) = timeline_of("ends", "bs", &["--deadline", "2s"]);
    ended.assert_code(124);
    assert!(at(&timeline, "vcpus_stopped") - at(&timeline, "main") >= 2_000_000_000);
    // The last exit is the guest's own, and not the kick that ends its spinning.
    assert!(at(&timeline, "last_exit") < at(&timeline, "main") + 2_000_000_000);
    // The kernel's log is no output of userspace.
    let (_, timeline) = timeline_of("ends", "Pr", &[]);
    assert!(names(&timeline).contains(&"first_console_byte"));
    assert!(!names(&timeline).contains(&"first_user_output"));
}

#[test]
fn a_vm_that_cannot_be_built_has_a_timeline_to_there() {
    let (ended, timeline) = timeline_of("ends", "p", &["--disk", "path=/dev/null"]);
    ended.assert_code(125);
    assert_eq!(timeline["status"], 125);
    assert_eq!(
        names(&timeline),
        ["process_start", "main", "config_read", "process_end"]
    );
    assert_eq!(
        (&timeline["boots"], &timeline["kernel"]),
        (&0.into(), &Value::Null)
    );
}

#[test]
fn timeline_is_of_the_first_boot() {
    // Each boot takes what its UART can hold; the last waits for more.
    let file = NamedTempFile::new().unwrap();
    let path = file.path().to_str().unwrap();
    let args = [
        "--on-reboot",
        "restart",
        "--deadline",
        "3s",
        "--timeline",
        path,
    ];
    let ended = run_with_input(&mut boot_tiny("ends", "bmwr", &args), &[b'.'; 200]);
    let timeline: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    ended.assert_code(124);
    assert!(timeline["boots"].as_u64().unwrap() >= 2, "{timeline}");
    let mut told = names(&timeline);
    told.sort_unstable();
    let all = told.len();
    told.dedup();
    assert_eq!(told.len(), all, "{told:?}");
    assert_eq!(timeline["console"]["bytes"], 6);
}

#[test]
fn a_flood_of_marks_is_counted_and_not_kept() {
    let (_, timeline) = timeline_of("abuse", "b", &["--deadline", "1s"]);
    let marks = names(&timeline)
        .iter()
        .filter(|n| **n == "boot_mark")
        .count();
    assert_eq!(marks, 64);
    assert!(timeline["boot_marks_lost"].as_u64().unwrap() > 100);
}

#[test]
fn without_a_file_it_is_a_table_on_stderr() {
    for args in [&["--timeline"][..], &["-q", "--timeline"]] {
        let ended = run(&mut boot_tiny("ends", "bmp", args));
        ended.assert_code(0);
        assert_eq!(ended.out(), "tiny# ");
        for part in [
            "process start (known to within ",
            "loaded: kernel (ELF, ",
            "boot mark 7",
            "first output of userspace",
            "process end, status 0",
            "exits: 14 (io_in 6, io_out 8)",
            "COM1",
            "console: 6 bytes; COM1 took 12 exits, ",
        ] {
            ended.assert_said(part);
        }
        assert!(!ended.stderr.contains("minivmm: "), "{}", ended.stderr);
    }
}

#[test]
fn unwritable_timeline_is_refused_before_the_boot() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let precious = path("rootfs.cpio");
    fs::write(&precious, "070701").unwrap();
    for (file, what) in [
        (path(""), "Is a directory"),
        (path("missing/t.json"), "No such file"),
        ("-".to_owned(), "leave the file out for a table on stderr"),
        (precious.clone(), "exists and is not JSON"),
    ] {
        let mut command = boot_tiny("hello", "", &[]);
        let ended = run(command.arg(format!("--timeline={file}")));
        ended.assert_code(125);
        assert_eq!(ended.out(), "", "no guest ran");
        ended.assert_said(what);
    }
    assert_eq!(fs::read_to_string(&precious).unwrap(), "070701");
}

#[test]
fn an_older_timeline_is_replaced() {
    let file = NamedTempFile::new().unwrap();
    fs::write(&file, "{".repeat(100_000)).unwrap();
    let path = file.path().to_str().unwrap();
    run(boot_tiny("hello", "", &[]).args(["--timeline", path])).assert_code(0);
    serde_json::from_str::<Value>(&fs::read_to_string(path).unwrap()).unwrap();
    // A full disk is an error message; the status stays the guest's.
    let ended = run(boot_tiny("hello", "", &[]).args(["--timeline", "/dev/full"]));
    ended.assert_code(0);
    ended.assert_said("No space left");
}
