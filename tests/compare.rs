//! `minivmm compare`, with scripts in place of the container runtimes. The virtual machine gets a tiny guest, which runs no command:
//! a runtime that does not work, on any KVM.

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use common::{Ended, minivmm, run, tiny};
use serde_json::Value;
use tempfile::TempDir;

/// What works like crun and runc: the probe prints a kernel's release and ends with 42, the command something else.
const OCI: &str = r#"echo "${0##*/} $*" >>"$LOG"
case "$1" in
    --version) echo "${0##*/} version 9" ;;
    spec) echo '{"process": {"user": {}}, "root": {}, "linux": {}}' >"$3/config.json" ;;
    run) if grep -q '"probe"' "$3/config.json"; then echo 6.0-fake; exit 42; fi; echo hi; sleep 0.1; exit 3 ;;
esac"#;

/// What hangs when it is to run something.
const HANGING: &str = r#"echo "${0##*/} $*" >>"$LOG"
case " $* " in *" run "*) echo $$ >"$LOG.pid"; sleep 1000 ;; esac"#;

struct Fakes {
    dir: TempDir,
}

impl Fakes {
    fn new(scripts: &[(&str, &str)]) -> Self {
        let fakes = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        fs::create_dir_all(fakes.file("root/bin")).unwrap();
        fs::create_dir(fakes.file("tmp")).unwrap();
        fs::create_dir(fakes.file("bin")).unwrap();
        fs::write(fakes.file("root/bin/tool"), vec![1; 3 << 20]).unwrap();
        for (name, script) in scripts {
            let path = fakes.file("bin").join(name);
            fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        // No real runtime of this machine's gets in between.
        for name in ["sh", "cp", "tar", "grep", "sleep", "cat", "find"] {
            let real = ["/bin", "/usr/bin"].map(|dir| Path::new(dir).join(name));
            let real = real.iter().find(|path| path.exists()).expect(name);
            std::os::unix::fs::symlink(real, fakes.file("bin").join(name)).unwrap();
        }
        fakes
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn compare(&self, args: &[&str]) -> Command {
        let mut command = minivmm(&["compare", "--runs", "2", "--memory", "64M"]);
        command
            .arg("--rootfs")
            .arg(self.file("root"))
            .arg("--kernel")
            .arg(tiny("hello"))
            .args(args)
            .args(["--", "/bin/tool", "a b", ""])
            .env("PATH", self.file("bin"))
            .env("TMPDIR", self.file("tmp"))
            .env("XDG_CACHE_HOME", self.file("cache"))
            .env("LOG", self.file("log"));
        command
    }

    fn log(&self) -> String {
        fs::read_to_string(self.file("log")).unwrap_or_default()
    }

    /// Nothing that compare made is left.
    fn assert_clean(&self) {
        assert_eq!(fs::read_dir(self.file("tmp")).unwrap().count(), 0);
        let names: Vec<_> = fs::read_dir(self.file("root")).unwrap().collect();
        assert_eq!(names.len(), 1, "{names:?}");
        let mut images = minivmm(&["images"]);
        let images = common::run(images.env("XDG_CACHE_HOME", self.file("cache")));
        assert_eq!(images.out().lines().count(), 1, "{}", images.out());
    }
}

fn by_name<'a>(report: &'a Value, name: &str) -> &'a Value {
    let rows = report["rows"].as_array().unwrap();
    rows.iter().find(|row| row["name"] == name).expect(name)
}

#[track_caller]
fn assert_error(ended: &Ended, code: i32, words: &[&str]) {
    ended.assert_code(code);
    for word in words {
        ended.assert_said(word);
    }
}

#[test]
fn failures_are_reported_beside_results() {
    let fakes = Fakes::new(&[("crun", OCI), ("podman", "echo no such luck >&2; exit 125")]);
    let html = fakes.file("report.html");
    let ended = run(&mut fakes.compare(&["--html", html.to_str().unwrap(), "--json"]));
    ended.assert_code(1);
    let report: Value = serde_json::from_slice(&ended.stdout).unwrap();
    // A report takes the place of an earlier one, and of nothing else.
    let other = fakes.file("report.txt");
    fs::write(&other, "precious").unwrap();
    let refused = run(&mut fakes.compare(&["--html", other.to_str().unwrap()]));
    assert_error(&refused, 2, &["exists and is not HTML"]);
    assert_eq!(fs::read_to_string(&other).unwrap(), "precious");

    let crun = by_name(&report, "crun");
    assert_eq!(crun["error"], Value::Null);
    assert_eq!(crun["kernel_seen"], "6.0-fake");
    assert_eq!(crun["statuses"], serde_json::json!([3]));
    assert_eq!(crun["status_handed_on"], true);
    assert_eq!(crun["end_ratio"], 1.0);
    assert_eq!(crun["version"], "crun version 9");
    let first = crun["warm_first_output"]["median_ms"].as_f64().unwrap();
    let end = crun["warm_end"]["median_ms"].as_f64().unwrap();
    assert!(first + 100.0 <= end, "{first} {end}");
    assert!(crun["peak_kib"].as_u64().unwrap() > 0);
    assert!(crun["cold_end"].is_null());
    assert_eq!(crun["kernel_bytes"], 0);
    // The tool and guestctl.
    let bytes = crun["image_bytes"].as_u64().unwrap();
    assert!((3 << 20..(3 << 20) + 16384).contains(&bytes), "{bytes}");
    assert_eq!(report["reference"], "crun");

    let podman = by_name(&report, "podman")["error"].as_str().unwrap();
    assert!(
        podman.contains("no such luck") && podman.contains("125"),
        "{podman}"
    );
    let vm = by_name(&report, "minivmm");
    let error = vm["error"].as_str().unwrap();
    assert!(
        error.contains("does not run a program to its end") && error.contains('!'),
        "{error}"
    );
    assert!(vm["image_bytes"].as_u64().unwrap() > 3 << 20);
    let kernel = tiny("hello").metadata().unwrap().len();
    assert_eq!(vm["kernel_bytes"], kernel);
    let rows = report["rows"].as_array().unwrap();
    let names: Vec<_> = rows
        .iter()
        .map(|row| row["name"].as_str().unwrap())
        .collect();
    let wanted = "crun, podman, minivmm, minivmm restore, minivmm run, minivmm run --cold";
    assert_eq!(names.join(", "), wanted);
    let restored = by_name(&report, "minivmm restore")["error"]
        .as_str()
        .unwrap();
    assert!(
        restored.contains("ended before it could be saved"),
        "{restored}"
    );

    let html = fs::read_to_string(html).unwrap();
    for wanted in [
        "<svg",
        "class=\"median\"",
        "6.0-fake",
        "no such luck",
        "prefers-color-scheme",
        "/bin/tool a b",
    ] {
        assert!(html.contains(wanted), "no {wanted}");
    }
    for unwanted in ["<script", "http:", "https:", "url(", "@import"] {
        assert!(!html.contains(unwanted), "{unwanted}");
    }
    fakes.assert_clean();
}

#[test]
fn a_table_has_it_all() {
    let fakes = Fakes::new(&[("crun", OCI), ("runc", OCI)]);
    let json = fakes.file("report.json");
    let ended = run(&mut fakes.compare(&["--json", json.to_str().unwrap()]));
    ended.assert_code(1);
    for wanted in [
        "/bin/tool a b",
        "x crun   end of the process, warm",
        "first output, warm",
        "cold: not measured (not asked for)",
        "6.0-fake",
        "crun run --bundle",
        "FAILED: does not run a program",
        "load average",
    ] {
        assert!(ended.out().contains(wanted), "no {wanted}: {}", ended.out());
    }
    assert!(
        !ended.out().contains("not the same everywhere"),
        "{}",
        ended.out()
    );
    let report: Value = serde_json::from_slice(&fs::read(json).unwrap()).unwrap();
    assert_eq!(report["same_output"], true);
    let vm = by_name(&report, "minivmm run");
    assert!(
        vm["error"]
            .as_str()
            .unwrap()
            .contains("does not run a program"),
        "{vm}"
    );
    assert!(vm["image_bytes"].as_u64().unwrap() > 3 << 20, "{vm}");
    // In turn: a configuration for each of two jobs, the probe, the look, two runs, and nothing left.
    let log = fakes.log();
    let runs: Vec<_> = log
        .lines()
        .filter(|line| line.contains(" run "))
        .map(|line| line.split(' ').next().unwrap())
        .collect();
    let expected = ["crun", "runc"].repeat(4);
    assert_eq!(runs, expected, "{log}");
    assert!(log.contains("crun delete --force"), "{log}");
}

#[test]
fn the_words_of_the_command_arrive_as_they_are() {
    let script = OCI.replace("echo hi", r#"cp "$3/config.json" "$LOG.json""#);
    let fakes = Fakes::new(&[("crun", &script)]);
    run(&mut fakes.compare(&[])).assert_code(1);
    let spec: Value = serde_json::from_slice(&fs::read(fakes.file("log.json")).unwrap()).unwrap();
    assert_eq!(
        spec["process"]["args"],
        serde_json::json!(["/bin/tool", "a b", ""])
    );
    let root = spec["root"]["path"].as_str().unwrap();
    assert!(
        root.ends_with("/root") && Path::new(root) != fakes.file("root"),
        "a copy: {root}"
    );
}

#[test]
fn a_runtime_that_hangs_is_killed_and_cleaned_up_after() {
    let fakes = Fakes::new(&[("crun", OCI), ("podman", HANGING)]);
    let ended = run(&mut fakes.compare(&["--timeout", "5s"]));
    ended.assert_code(1);
    assert!(
        ended.out().contains("FAILED: killed after 5s"),
        "{}",
        ended.out()
    );
    assert!(fakes.log().contains("podman rm --force minivmm-compare-"));
    let pid = fs::read_to_string(fakes.file("log.pid")).unwrap();
    assert!(!Path::new("/proc").join(pid.trim()).exists());
}

#[test]
fn a_comparison_that_is_stopped_leaves_nothing() {
    let fakes = Fakes::new(&[("podman", HANGING)]);
    let child = fakes.compare(&[]).spawn().unwrap();
    let pid = fakes.file("log.pid");
    for _ in 0..6000 {
        if fs::read_to_string(&pid).is_ok_and(|text| text.ends_with('\n')) {
            break;
        }
        thread::sleep(Duration::from_millis(10));
    }
    common::signal(&child, "TERM");
    let output = common::wait(child, common::PATIENCE);
    assert_eq!(output.status.code(), Some(143));
    let pid = fs::read_to_string(pid).unwrap();
    assert!(!Path::new("/proc").join(pid.trim()).exists());
    assert!(fakes.log().contains("podman rm --force minivmm-compare-"));
    fakes.assert_clean();
}

#[test]
fn mistakes_are_named() {
    let fakes = Fakes::new(&[]);
    let with = |args: &[&str]| {
        let mut command = minivmm(&["compare"]);
        run(command.args(args).env("PATH", fakes.file("bin")))
    };
    let root = fakes.file("root");
    let root = root.to_str().unwrap();
    assert_error(&with(&["--", "x"]), 2, &["--rootfs"]);
    assert_error(&with(&["--rootfs", root]), 2, &["COMMAND"]);
    assert_error(
        &with(&["--rootfs", "/nowhere", "--", "x"]),
        2,
        &["--rootfs /nowhere: No such file"],
    );
    let tool = format!("{root}/bin/tool");
    assert_error(
        &with(&["--rootfs", &tool, "--", "x"]),
        2,
        &["not a directory"],
    );
    assert_error(
        &with(&["--rootfs", root, "--kernel", "/nowhere", "--", "x"]),
        125,
        &["cannot read the kernel /nowhere", "--kernel FILE"],
    );
}

#[test]
fn runs_add_to_those_of_an_earlier_report() {
    let fakes = Fakes::new(&[("crun", OCI)]);
    let file = fakes.file("report.json");
    let json = file.to_str().unwrap();
    run(&mut fakes.compare(&["--json", json])).assert_code(1);
    let before: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    run(&mut fakes.compare(&["--json", json, "--add", json])).assert_code(1);
    let after: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    assert_eq!((&before["runs"], &after["runs"]), (&2.into(), &4.into()));
    let samples = |report: &Value| {
        let samples = &by_name(report, "crun")["warm_end"]["samples_ms"];
        samples.as_array().unwrap().clone()
    };
    let (before, after) = (samples(&before), samples(&after));
    assert_eq!(after.len(), 4);
    for (before, after) in before.iter().zip(&after) {
        let (before, after) = (before.as_f64().unwrap(), after.as_f64().unwrap());
        // Times are whole nanoseconds.
        assert!((before - after).abs() < 1e-5, "{before} {after}");
    }

    let other = &["--json", json, "--add", json, "--cpus", "2"];
    assert_error(
        &run(&mut fakes.compare(other)),
        125,
        &[
            "cannot add to the report",
            "another size of virtual machine",
        ],
    );
    fs::write(fakes.file("other.json"), "{}").unwrap();
    let other = fakes.file("other.json");
    assert_error(
        &run(&mut fakes.compare(&["--add", other.to_str().unwrap()])),
        125,
        &["other.json, which is not what minivmm compare --json writes"],
    );
    fakes.assert_clean();
}
