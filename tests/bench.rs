//! `minivmm bench`, with a tiny guest in minivmm and scripts in place of the other monitors.

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use common::terminal::Terminal;
use common::{Ended, kill, minivmm, run, tiny};
use serde_json::Value;
use tempfile::TempDir;

/// What works like a monitor: it notes how it was called, and its guest prints what the tiny one does.
const WORKING: &str = r#"case "$*" in *ersion) echo "$0 9.9"; exit ;; esac
echo "${0##*/} $*" >>"$LOG"; printf '!'"#;

/// A PATH with monitors that are scripts.
struct Fakes(TempDir);

impl Fakes {
    fn new(scripts: &[(&str, &str)]) -> Self {
        let fakes = Self(tempfile::tempdir().unwrap());
        for (name, script) in scripts {
            let path = fakes.0.path().join(name);
            fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        fakes
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A measurement of a tiny guest that prints `!` and powers off.
    fn bench(&self, args: &[&str]) -> Command {
        let mut command = minivmm(&["bench", "--memory", "16M", "--until", "!", "--runs", "2"]);
        let path = format!("{}:/usr/bin:/bin", self.0.path().display());
        command
            .arg("--kernel")
            .arg(tiny("hello"))
            .args(args)
            .env("PATH", path)
            .env("LOG", self.file("log"));
        command
    }

    /// The same, with JSON to read.
    #[track_caller]
    fn report(&self, args: &[&str]) -> Value {
        let ended = run(self.bench(args).arg("--json"));
        ended.assert_code(0);
        serde_json::from_slice(&ended.stdout).unwrap()
    }

    /// Whether a process that a script has written its id of lives.
    fn alive(&self, name: &str) -> bool {
        let pid = fs::read_to_string(self.file(name)).unwrap();
        let stat = fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
        !stat.is_empty() && !stat.contains(") Z ")
    }

    /// Whether it is gone: a moment after it was killed.
    fn gone(&self, name: &str) -> bool {
        (0..1000).any(|_| {
            thread::sleep(Duration::from_millis(10));
            !self.alive(name)
        })
    }
}

/// A monitor that never gets anywhere, nor does its child.
const HANGING: &str = r#"case "$*" in *ersion) exit ;; esac
sleep 1000 & echo $! >"${LOG%/*}/child"; echo $$ >"${LOG%/*}/pid"; echo stuck >&2; wait"#;

fn by_name<'a>(report: &'a Value, name: &str) -> &'a Value {
    let vmms = report["vmms"].as_array().unwrap();
    vmms.iter().find(|vmm| vmm["name"] == name).expect(name)
}

#[track_caller]
fn assert_error(ended: &Ended, code: i32, words: &[&str]) {
    ended.assert_code(code);
    for word in words {
        ended.assert_said(word);
    }
}

#[test]
fn all_available_vmms_are_measured() {
    let all = [
        "qemu-system-x86_64",
        "firecracker",
        "cloud-hypervisor",
        "lkvm",
        "crosvm",
    ];
    let fakes = Fakes::new(&all.map(|name| (name, WORKING)));
    let report = fakes.report(&[]);
    let names: Vec<_> = report["vmms"]
        .as_array()
        .unwrap()
        .iter()
        .map(|vmm| vmm["name"].as_str().unwrap())
        .collect();
    assert_eq!(
        names,
        [
            "minivmm",
            "qemu",
            "firecracker",
            "cloud-hypervisor",
            "kvmtool",
            "crosvm"
        ]
    );
    for vmm in report["vmms"].as_array().unwrap() {
        for times in ["marker", "end"] {
            let times = &vmm[times];
            assert_eq!(times["samples_ms"].as_array().unwrap().len(), 2, "{vmm}");
            assert!(times["min_ms"].as_f64() <= times["median_ms"].as_f64());
            assert!(times["median_ms"].as_f64() <= times["p99_ms"].as_f64());
        }
        assert!(vmm["marker_ratio"].as_f64().unwrap() > 0.0);
        assert_eq!(vmm["statuses"], serde_json::json!([0]), "{vmm}");
        assert_eq!(vmm["error"], Value::Null);
    }
    assert_eq!(by_name(&report, "minivmm")["marker_ratio"], 1.0);
    // Its first words on stdout are its own.
    assert_eq!(by_name(&report, "kvmtool")["first_output"], Value::Null);
    assert!(
        by_name(&report, "qemu")["version"]
            .as_str()
            .unwrap()
            .ends_with("9.9")
    );
    assert!(report["host"]["cpus"].as_u64().unwrap() > 0);

    // Three rounds, the first of which is not counted.
    let log = fs::read_to_string(fakes.file("log")).unwrap();
    let called: Vec<_> = log
        .lines()
        .map(|line| line.split(' ').next().unwrap())
        .collect();
    assert_eq!(called, [all, all, all].concat());
    assert!(log.contains(minivmm::config::DEFAULT_CMDLINE), "{log}");
}

#[test]
fn a_table_names_what_was_measured() {
    let fakes = Fakes::new(&[("crosvm", WORKING)]);
    let json = fakes.file("result.json");
    let ended = run(&mut fakes.bench(&["--vs", "crosvm", "--json", json.to_str().unwrap()]));
    ended.assert_code(0);
    for wanted in [
        "2 runs of each in turn after 1",
        "first byte on the console",
        "marker: \"!\" on the console",
        "end of the process",
        "crosvm run --disable-sandbox",
        "differs: one process",
        "load average",
    ] {
        assert!(ended.out().contains(wanted), "no {wanted}: {}", ended.out());
    }
    assert_eq!(ended.stderr, "");
    let report: Value = serde_json::from_slice(&fs::read(json).unwrap()).unwrap();
    assert_eq!(report["vmms"].as_array().unwrap().len(), 2);
}

#[test]
fn hung_vmm_is_killed_and_the_others_continue() {
    let fakes = Fakes::new(&[("lkvm", HANGING), ("crosvm", WORKING)]);
    let report = fakes.report(&["--timeout", "5s", "--vs", "kvmtool,crosvm"]);
    let kvmtool = by_name(&report, "kvmtool");
    assert_eq!(kvmtool["marker"], Value::Null);
    let error = kvmtool["error"].as_str().unwrap();
    assert!(
        error.contains("killed after 5s") && error.contains("stuck"),
        "{error}"
    );
    assert!(by_name(&report, "crosvm")["marker"].is_object());
    assert!(fakes.gone("pid") && fakes.gone("child"));
}

#[test]
fn failed_vmm_is_quoted() {
    let script = "echo 'cannot read this kernel' >&2; exit 7";
    let fakes = Fakes::new(&[("firecracker", script)]);
    let ended = run(&mut fakes.bench(&["--vs", "firecracker"]));
    ended.assert_code(0);
    let wanted = "FAILED: ended (exit status: 7) without '!' on its console";
    assert!(ended.out().contains(wanted), "{}", ended.out());
    ended.assert_said("cannot read this kernel");
}

#[test]
fn guests_that_stay_are_stopped_at_the_marker() {
    // Its child is known before the marker is there.
    let child = r#"sleep 1000 & echo $! >"${LOG%/*}/child"; printf '!'; wait"#;
    let script = WORKING.replace("printf '!'", child);
    let fakes = Fakes::new(&[("crosvm", &script)]);
    let ended = run(&mut fakes.bench(&["--timeout", "5s"]));
    ended.assert_code(0);
    assert!(
        ended.out().contains("the guest did not end after '!'"),
        "{}",
        ended.out()
    );
    let report = fakes.report(&["--stop-at-marker"]);
    let crosvm = by_name(&report, "crosvm");
    assert!(
        crosvm["marker"].is_object() && crosvm["end"].is_null(),
        "{crosvm}"
    );
    assert!(fakes.gone("child"));
}

#[test]
fn a_regression_has_a_status_of_its_own() {
    let fakes = Fakes::new(&[]);
    let mut report = fakes.report(&["--vs", "none"]);
    let path = fakes.file("baseline.json");
    let against = |report: &Value, ratio: &str| {
        fs::write(&path, report.to_string()).unwrap();
        let path = path.to_str().unwrap();
        run(&mut fakes.bench(&["--vs", "none", "--baseline", path, "--max-ratio", ratio]))
    };
    assert_error(&against(&report, "1000"), 0, &["marker: ", "process end: "]);
    report["vmms"][0]["marker"]["median_ms"] = 1e-6.into();
    assert_error(
        &against(&report, "1000"),
        1,
        &["times the baseline's median, more than 1000"],
    );
    report["host"]["cpu"] = "Another".into();
    assert_error(
        &against(&report, "1000"),
        1,
        &["is of another host: Another"],
    );
    report["vmms"][0]["name"] = "qemu".into();
    assert_error(&against(&report, "1000"), 125, &["no times of minivmm"]);
    assert_error(
        &against(&Value::Null, "1000"),
        125,
        &["is not what minivmm bench --json writes"],
    );
}

#[test]
fn mistakes_are_named() {
    let fakes = Fakes::new(&[]);
    let bench = |args: &[&str]| run(&mut fakes.bench(args));
    assert_error(
        &bench(&["--vs", "crosvm"]),
        2,
        &["crosvm is not on the PATH"],
    );
    assert_error(&bench(&["--vs", "xen"]), 2, &["xen", "cloud-hypervisor"]);
    assert_error(&bench(&["--runs", "0"]), 2, &["--runs"]);
    assert_error(&bench(&["--max-ratio", "2"]), 2, &["--baseline"]);
    assert_error(
        &bench(&["--initrd", "/nowhere"]),
        125,
        &["cannot read /nowhere"],
    );
    assert_error(
        &bench(&["--baseline", "/nowhere"]),
        125,
        &["the baseline /nowhere"],
    );
    let ended = run(&mut minivmm(&["bench", "--vs", "none"]));
    assert_error(&ended, 2, &["no kernel"]);
    // The tiny guest says nothing but one sign.
    let mut command = minivmm(&["bench", "--memory", "16M", "--vs", "none", "--kernel"]);
    assert_error(
        &run(command.arg(tiny("hello"))),
        125,
        &[
            "without 'minivmm-demo: userspace' on its console",
            "--until",
            "'!'",
        ],
    );
}

#[test]
fn no_process_is_left_running() {
    for (signal, status) in [("INT", Some(130)), ("TERM", Some(143)), ("KILL", None)] {
        let fakes = Fakes::new(&[("crosvm", HANGING)]);
        let child = fakes.bench(&["--vs", "crosvm"]).spawn().unwrap();
        wait_for(&fakes.file("pid"));
        assert!(fakes.alive("pid"));
        common::signal(&child, signal);
        let output = common::wait(child, common::PATIENCE);
        assert_eq!(output.status.code(), status, "SIG{signal}");
        assert!(fakes.gone("pid"), "SIG{signal}");
        if signal == "KILL" {
            // Its own child is beyond the kernel's reach, but not beyond this test's.
            let pid = fs::read_to_string(fakes.file("child")).unwrap();
            kill(pid.trim().parse().unwrap(), "KILL");
        } else {
            assert!(fakes.gone("child"), "SIG{signal}");
        }
    }
}

/// Waits until a script has written this.
fn wait_for(file: &Path) {
    for _ in 0..6000 {
        if fs::read_to_string(file).is_ok_and(|text| text.ends_with('\n')) {
            return;
        }
        thread::sleep(Duration::from_millis(10));
    }
    panic!("{} does not appear", file.display());
}

#[test]
fn a_terminal_shows_how_far_it_is() {
    // The terminal's shell has an environment of its own, so there is nothing to measure against.
    let fakes = Fakes::new(&[]);
    let terminal = Terminal::new();
    let mut session = terminal.run(&fakes.bench(&["--vs", "none"]));
    assert_eq!(session.status(), 0);
    let screen = terminal.text();
    for wanted in ["1/3 minivmm", "3/3 minivmm", "load average"] {
        assert!(screen.contains(wanted), "no {wanted}: {screen:?}");
    }
}

#[test]
fn results_overwrite_nothing_but_json() {
    let fakes = Fakes::new(&[]);
    let file = fakes.file("rootfs.cpio");
    fs::write(&file, "070701").unwrap();
    let mut command = fakes.bench(&["--vs", "none", "--json", file.to_str().unwrap()]);
    let ended = run(&mut command);
    ended.assert_code(125);
    ended.assert_said("exists and is not JSON");
    assert_eq!(fs::read_to_string(file).unwrap(), "070701");
}

#[test]
fn restores_are_measured_up_to_the_first_instruction() {
    let dir = tempfile::tempdir().unwrap();
    let snapshot = dir.path().join("snapshot");
    let at = format!("7={},exit", snapshot.display());
    let save = ["--snapshot-at", &at];
    run(&mut common::boot_tiny("marks", "", &save)).assert_code(0);
    let bench = |args: &[&str]| {
        let mut command = minivmm(&["bench", "--runs", "3", "--restore"]);
        run(command.arg(&snapshot).args(args))
    };
    let ended = bench(&["--json"]);
    ended.assert_code(0);
    let report: Value = serde_json::from_slice(&ended.stdout).unwrap();
    let row = by_name(&report, "minivmm");
    for point in ["first_instruction", "first_output", "marker", "end"] {
        let times = row[point]["samples_ms"].as_array().unwrap();
        assert!(times.len() == 3 && times.iter().all(|ms| ms.as_f64() > Some(0.0)));
    }
    assert_eq!(report["vmms"].as_array().unwrap().len(), 1);
    assert_eq!(report["guest"]["memory_mib"], 16);
    let ended = bench(&["--until", "c"]);
    ended
        .assert_code(0)
        .assert_printed(&["first instruction of the guest", "marker: \"c\""]);
    // A guest that does not end by itself.
    let at = format!("8={},exit", snapshot.display());
    let save = ["--snapshot-at", &at];
    run(&mut common::boot_tiny("marks", "m", &save)).assert_code(0);
    bench(&["--stop-at-marker"]).assert_code(0);
    assert_error(
        &bench(&["--until", "x", "--timeout", "1s"]),
        125,
        &["killed", "without 'x'"],
    );
    run(&mut common::boot_tiny("marks", "", &save)).assert_code(0);
    assert_error(&bench(&["--until", "x"]), 125, &["ended", "without 'x'"]);
    assert_error(&bench(&["--cpus", "2"]), 2, &["--restore"]);
}
