//! What a guest can make minivmm take of the host beside its RAM: no more than `--timeline` says.

mod common;

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use common::fuse::{Fuse, Mode};
use common::{PATIENCE, boot_tiny, expect, signal, wait};
use procfs::process::{MMapPath, Process, VmFlags};
use serde_json::Value;
use tempfile::NamedTempFile;

/// What the kernel counts in batches, and pages of functions that have not run before.
const SLACK: u64 = 256 << 10;

/// Guest RAM, as tests/common has it.
const RAM: u64 = 16 << 20;

/// A process's memory without guest RAM and the pages of files, in bytes.
struct Memory {
    now: u64,
    most: u64,
}

fn memory(pid: u32) -> Memory {
    let process = Process::new(pid as i32).unwrap();
    // Guest RAM alone is anonymous and left out of core dumps.
    let maps = process.smaps().unwrap();
    let ram = maps.iter().filter(|map| {
        map.pathname == MMapPath::Anonymous && map.extension.vm_flags.contains(VmFlags::DD)
    });
    let sum = |field: &str| ram.clone().map(|map| map.extension.map[field]).sum::<u64>();
    assert_eq!(sum("Size"), RAM, "guest RAM");
    let status = process.status().unwrap();
    let own = |kib: Option<u64>| (kib.unwrap() << 10) - sum("Rss");
    Memory {
        now: own(status.rssanon),
        most: own(status.vmhwm) - (status.rssfile.unwrap() << 10),
    }
}

/// Runs a tiny guest until it is `settled`. Gives the most memory that minivmm has had, without guest RAM and pages of files, and its
/// timeline, which it has no time for on a disk that hangs.
fn peak(
    guest: &str,
    cmdline: &str,
    args: &[&str],
    settled: impl Fn(&mut Child),
) -> (Memory, Value) {
    let file = NamedTempFile::new().unwrap();
    let timeline = file.path().to_str().unwrap();
    // A confined process shows its memory to root alone.
    let own = ["--timeline", timeline, "--sandbox", "off"];
    let mut command = boot_tiny(guest, cmdline, &[args, &own].concat());
    command.stdin(Stdio::piped());
    let mut child = command.spawn().unwrap();
    settled(&mut child);
    let memory = memory(child.id());
    signal(&child, "TERM");
    let output = wait(child, PATIENCE);
    assert_eq!(output.status.code(), Some(143), "{output:?}");
    let json = fs::read(file.path()).unwrap();
    (memory, serde_json::from_slice(&json).unwrap_or_default())
}

fn bound(timeline: &Value, device: &str) -> u64 {
    let mut bounds = timeline["memory_bounds"].as_array().unwrap().iter();
    let bound = bounds.find(|bound| bound["name"] == device);
    bound.unwrap_or_else(|| panic!("no {device}: {timeline}"))["bytes"]
        .as_u64()
        .unwrap()
}

/// Long enough for what a guest does at once, also on a busy host.
fn a_while(_: &mut Child) {
    thread::sleep(Duration::from_secs(2));
}

/// A guest that does all it can makes minivmm take more than a quiet one does, at least so much at the end, and at no time more than
/// the devices that it does it with are said to.
#[track_caller]
fn assert_bounded(
    hostile: &(Memory, Value),
    quiet: &(Memory, Value),
    devices: &[&str],
    least: u64,
) {
    let bounds: u64 = devices.iter().map(|name| bound(&quiet.1, name)).sum();
    let now = hostile.0.now.saturating_sub(quiet.0.now);
    let most = hostile.0.most.saturating_sub(quiet.0.most);
    assert!(now >= least, "{devices:?}: the guest took only {now}");
    let more = now.max(most);
    assert!(more <= bounds + SLACK, "{devices:?}: {more} of {bounds}");
}

#[test]
fn console_output_that_nobody_reads_is_bounded() {
    let quiet = peak("ends", "mh", &[], a_while);
    let hostile = peak("flood", "", &[], a_while);
    assert_bounded(&hostile, &quiet, &["console output"], 0);
    let hvc = ["--console", "virtio"];
    let quiet = peak("ends", "mh", &hvc, a_while);
    for (chains, least) in [("", 0), ("m", 512 << 10)] {
        let hostile = peak("console-flood", chains, &hvc, a_while);
        assert_bounded(&hostile, &quiet, &["console output", "console"], least);
    }
}

fn with_disk(path: &Path, engine: &str) -> [String; 2] {
    let option = format!("path={},ro,queues=1,engine={engine}", path.display());
    ["--disk".to_owned(), option]
}

/// 256 requests at once, each with as many pieces as there can be, on a disk that answers none.
#[test]
fn requests_in_flight_are_bounded() {
    for engine in ["io_uring", "sync"] {
        for pieces in ["hrl", "hrs"] {
            let Some(disk) = Fuse::mount() else { return };
            let option = with_disk(&disk.disk(), engine);
            let option = option.each_ref().map(String::as_str);
            let quiet = peak("ends", "mh", &option, a_while);
            let hostile = peak("hog", pieces, &option, |child| {
                expect(child, "R");
                disk.set(Mode::Holds);
                child.stdin.take().unwrap().write_all(b"!").unwrap();
                let start = Instant::now();
                while !disk.is_hung() {
                    assert!(start.elapsed() < PATIENCE, "nothing comes to the disk");
                    thread::sleep(Duration::from_millis(1));
                }
                thread::sleep(Duration::from_secs(1));
            });
            assert_bounded(&hostile, &quiet, &["disk 0"], 0);
        }
    }
}

#[test]
fn each_device_has_its_bound() {
    let disk = NamedTempFile::new().unwrap();
    disk.as_file().set_len(1 << 30).unwrap();
    let ephemeral = format!("path={},ephemeral,queues=2", disk.path().display());
    let args = ["--rng", "--cpus", "2", "--console", "virtio", "--disk"];
    let (_, timeline) = peak("ends", "mh", &[&args[..], &[&ephemeral]].concat(), a_while);
    let one = bound(&timeline, "rng");
    // Two threads, and a bit for each of its clusters.
    assert!(bound(&timeline, "disk 0") > 2 * one + (32 << 10));
    for device in ["vCPU 0", "vCPU 1", "console output", "console"] {
        assert!(bound(&timeline, device) > 0);
    }
    // They are in the table, too, and few enough to count on.
    let all = timeline["memory_bounds"].as_array().unwrap();
    let sum: u64 = all.iter().map(|b| b["bytes"].as_u64().unwrap()).sum();
    assert!(sum < 8 << 20, "{timeline}");
}
