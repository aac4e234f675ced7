//! Snapshots of tiny guests: saved at a boot mark, restored, saved again; what is left when saving fails.

mod common;

use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, SystemTime};

use common::skip::skip;
use common::{Ended, boot_tiny, minivmm, run, tiny, wait};
use minivmm::vmm::snapshot::load::Snapshot;

/// Where a test's snapshots are.
struct Dir(tempfile::TempDir);

impl Dir {
    fn new() -> Self {
        Self(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.0.path()).unwrap();
        let name = |entry: std::io::Result<fs::DirEntry>| {
            entry.unwrap().file_name().into_string().unwrap()
        };
        let mut names: Vec<_> = entries.map(name).collect();
        names.sort();
        names
    }

    /// Boots a guest, which is saved at mark 7 and ends then.
    fn save(&self, guest: &str, cmdline: &str, args: &[&str]) -> PathBuf {
        let path = self.path("snapshot");
        let at = format!("7={},exit", path.display());
        let args = [&["--snapshot-at", &at], args].concat();
        let ended = run(&mut boot_tiny(guest, cmdline, &args));
        ended.assert_code(0);
        path
    }
}

fn restore(path: &Path, args: &[&str]) -> Ended {
    let mut command = minivmm(&["restore"]);
    run(command.arg(path).args(["--deadline", "200s"]).args(args))
}

#[test]
fn a_restored_vm_begins_behind_its_mark() {
    let dir = Dir::new();
    for (cmdline, args) in [
        ("", &[][..]),
        ("w", &["--cpus", "3"]),
        ("", &["--console", "virtio", "--rng"]),
    ] {
        let path = dir.save("marks", cmdline, args);
        assert_eq!(dir.names(), ["snapshot"]);
        let mode = path.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        for clock in ["continue", "realtime"] {
            let ended = restore(&path, &["--clock", clock]);
            ended.assert_code(0);
            assert_eq!(ended.out(), "bc", "{cmdline}: {}", ended.stderr);
            assert_eq!(ended.stderr, "");
        }
        Snapshot::open(&path).unwrap().verify().unwrap();
    }
}

/// What the file says of a socket's path is not followed.
#[test]
fn a_restored_vm_has_the_vsock_that_it_is_given() {
    let dir = Dir::new();
    let saved = format!("path={}", dir.path("saved").display());
    let path = dir.save("marks", "", &["--vsock", &saved]);
    assert_eq!(dir.names(), ["snapshot"]);
    fs::write(dir.path("saved"), "").unwrap();
    restore(&path, &[]).assert_code(0);
    let other = format!("path={}", dir.path("other").display());
    restore(&path, &["--vsock", &other]).assert_code(0);
    let refused = restore(&path, &["--vsock", &saved]);
    refused.assert_code(125);
    let error = "exists and is not a socket";
    refused.assert_said(error);
    restore(&path, &["--vsock", "path=v,cid=4"]).assert_code(2);
    assert_eq!(dir.names(), ["saved", "snapshot"]);
    let path = dir.save("marks", "", &[]);
    let refused = restore(&path, &["--vsock", &other]);
    refused.assert_code(125);
    let error = "the VM had none when it was saved";
    refused.assert_said(error);
}

#[test]
fn a_saved_vm_goes_on() {
    let dir = Dir::new();
    let path = dir.path("snapshot");
    fs::write(&path, "old").unwrap();
    let at = format!("8={}", path.display());
    let ended = run(&mut boot_tiny("marks", "", &["--snapshot-at", &at]));
    ended.assert_code(0);
    assert_eq!(ended.out(), "abc");
    assert_eq!(dir.names(), ["snapshot"]);
    assert_eq!(restore(&path, &[]).out(), "c");
}

#[test]
fn a_restored_vm_can_be_saved() {
    let dir = Dir::new();
    let first = dir.save("marks", "w", &[]);
    let second = dir.path("second");
    let at = format!("8={},exit", second.display());
    let ended = restore(&first, &["--snapshot-at", &at]);
    ended.assert_code(0);
    assert_eq!(ended.out(), "b");
    assert_eq!(restore(&second, &[]).out(), "c");
    let of = |path: &Path| {
        let snapshot = Snapshot::open(path).unwrap();
        snapshot.verify().unwrap();
        (snapshot.meta.generation, snapshot.size().1)
    };
    let ((one, used), (two, used_again)) = (of(&first), of(&second));
    assert_eq!((one, two), (1, 2));
    // What the restored VM has not touched came from the file.
    assert!(used >= 8 << 20 && used_again >= used, "{used} {used_again}");
}

#[test]
fn a_timer_goes_off_behind_a_restore() {
    let dir = Dir::new();
    for cmdline in ["", "p"] {
        let path = dir.save("timer", cmdline, &[]);
        for _ in 0..20 {
            let ended = restore(&path, &[]);
            ended.assert_code(5);
            assert_eq!(ended.out(), "t");
        }
    }
}

#[test]
fn the_guests_clock_goes_on_or_jumps() {
    let dir = Dir::new();
    let path = dir.save("marks", "", &[]);
    let mut snapshot = Snapshot::open(&path).unwrap();
    let saved = snapshot.clock().clock;
    assert_eq!(snapshot.clock().clock, saved);
    snapshot.is_realtime = true;
    let first = snapshot.clock().clock;
    assert!(first > saved);
    // A VM that starts later has a later time.
    thread::sleep(Duration::from_millis(50));
    assert!(snapshot.clock().clock >= first + 50_000_000);
}

#[test]
fn a_snapshot_never_replaces_what_the_vm_runs_from() {
    let dir = Dir::new();
    let path = dir.save("marks", "", &[]);
    let at = format!("8={}", path.display());
    let ended = restore(&path, &["--snapshot-at", &at]);
    ended.assert_code(125);
    assert!(ended.stderr.contains("the VM runs from this file"));
    assert_eq!(restore(&path, &[]).out(), "bc");
}

#[test]
fn a_snapshot_never_replaces_the_vms_files() {
    let dir = Dir::new();
    let path = |name: &str| dir.path(name).display().to_string();
    fs::copy(tiny("marks"), dir.path("kernel")).unwrap();
    fs::write(dir.path("disk"), [0; 512]).unwrap();
    fs::write(dir.path("initrd"), "initrd").unwrap();
    let contents = || ["kernel", "disk", "initrd"].map(|name| fs::read(dir.path(name)).unwrap());
    let before = contents();
    let disk = format!("path={},format=raw", path("disk"));
    let vm = |at: &str| {
        let mut command = minivmm(&["--memory", "16M", "--cmdline", "", "--snapshot-at", at]);
        command.args(["--kernel", &path("kernel"), "--initrd", &path("initrd")]);
        run(command.args(["--disk", &disk]))
    };
    let restored = |file: &str| {
        let at = format!("8={}", path(file));
        restore(&dir.path("snapshot"), &["--snapshot-at", &at])
    };
    vm(&format!("7={},exit", path("snapshot"))).assert_code(0);
    let refused = ["kernel", "disk", "initrd"].map(|name| (name, vm(&format!("7={}", path(name)))));
    for (name, ended) in refused.iter().chain(&[("disk", restored("disk"))]) {
        ended.assert_code(125);
        ended.assert_said(&format!("this file is the VM's {name}"));
        assert_eq!(ended.out(), "");
    }
    assert!(contents() == before);
}

#[test]
fn what_cannot_be_saved_is_refused_before_the_guest_runs() {
    let dir = Dir::new();
    let missing = format!("7={}", dir.path("none/snapshot").display());
    let folder = format!("7={}", dir.0.path().display());
    for (args, error) in [
        (&["--snapshot-at", &missing][..], "No such file"),
        (&["--snapshot-at", &folder], "no regular file"),
    ] {
        let ended = run(&mut boot_tiny("marks", "", args));
        ended.assert_code(125);
        ended.assert_said(error);
        assert_eq!(ended.out(), "");
    }
    assert_eq!(dir.names(), [""; 0]);
}

#[test]
fn a_full_disk_leaves_the_old_file_and_the_running_vm() {
    let dir = Dir::new();
    let path = dir.path("snapshot");
    let at = format!("7={},exit", path.display());
    let vm = boot_tiny("marks", "w", &["--snapshot-at", &at]);
    // A file system of 4 MiB for a VM that has written 8, in a mount namespace of minivmm's own; and a limit on a file's size. What
    // is there afterwards is looked at from inside.
    let full = "mount -t tmpfs -o size=4m full $0 || exit 77";
    for (namespace, limit) in [
        (&["--user", "--map-root-user", "--mount"][..], full),
        (&[], "trap '' XFSZ; ulimit -f 1024"),
    ] {
        let script = format!(
            "{limit}; printf old >$0/snapshot; \"$@\"; status=$?; ls -A $0; cat $0/snapshot; exit $status"
        );
        let mut command = Command::new("unshare");
        command.args(namespace).args(["sh", "-c", &script]);
        command.arg(dir.0.path()).arg(vm.get_program());
        command.args(vm.get_args()).stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let ended = run(&mut command);
        if matches!(ended.code(), 1 | 77 | 127) {
            skip(&format!("no mount namespace here: {}", ended.stderr));
            continue;
        }
        ended.assert_code(0);
        assert_eq!(ended.out(), "abcsnapshot\nold");
        let why = ["the VM was not saved", "cannot write a snapshot to"];
        assert!(
            why.iter().all(|why| ended.stderr.contains(why)),
            "{}",
            ended.stderr
        );
    }
}

#[test]
fn killed_while_it_saves_it_leaves_the_old_file_or_a_whole_new_one() {
    let dir = Dir::new();
    let path = dir.path("snapshot");
    let at = format!("7={}", path.display());
    for signal in ["KILL", "TERM"] {
        for delay in 0..15 {
            fs::write(&path, "old").unwrap();
            let mut child = boot_tiny("marks", "wm", &["--snapshot-at", &at])
                .spawn()
                .unwrap();
            thread::sleep(Duration::from_millis(delay * 3));
            common::kill(child.id(), signal);
            child.wait().unwrap();
            let is_old = fs::read(&path).unwrap() == b"old";
            if !is_old {
                Snapshot::open(&path).unwrap().verify().unwrap();
            }
            // To replace a file takes two steps. SIGKILL between them, microseconds apart, leaves the new file beside the old.
            for other in dir.names().iter().filter(|name| *name != "snapshot") {
                assert!(is_old && signal == "KILL", "{other}");
                let other = dir.path(other);
                Snapshot::open(&other).unwrap().verify().unwrap();
                fs::remove_file(other).unwrap();
            }
        }
    }
}

#[test]
fn a_file_cut_short_under_its_vm_ends_with_125() {
    let dir = Dir::new();
    let path = dir.save("marks", "m", &[]);
    let mut child = minivmm(&["restore"]).arg(&path).spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let mut seen = [0; 2];
    stdout.read_exact(&mut seen).unwrap();
    OpenOptions::new()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(4096)
        .unwrap();
    let output = wait(child, Duration::from_secs(100));
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(125), "{stderr}");
    assert!(stderr.contains(path.to_str().unwrap()), "{stderr}");
}

#[test]
fn info_and_verify_tell_what_is_there() {
    let dir = Dir::new();
    let path = dir.save("marks", "w", &["--cpus", "2"]);
    let command = |verb: &str| run(minivmm(&["snapshot", verb]).arg(&path));
    let kernel = tiny("marks");
    command("info").assert_code(0).assert_printed(&[
        "format         1.0",
        "boot mark      7",
        "vCPUs          2",
        "memory         16M",
        kernel.to_str().unwrap(),
        "this host      the same",
    ]);
    command("verify").assert_code(0);
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    // The last page of RAM was a hole.
    let end = file.metadata().unwrap().len();
    file.write_all_at(&[1], end - 1).unwrap();
    let damaged = command("verify");
    damaged.assert_code(125);
    assert!(damaged.stderr.contains("the guest's memory is wrong"));
}

#[test]
fn forks_run_side_by_side_and_say_how_they_ended() {
    let dir = Dir::new();
    let path = dir.save("marks", "w", &[]);
    let json = dir.path("report.json");
    let mut command = minivmm(&["fork"]);
    command.arg(&path).args(["-n", "30", "-j", "3", "--json"]);
    let ended = run(command.arg(&json));
    ended.assert_code(0);
    let out = ended.out();
    let mut lines: Vec<&str> = out.lines().collect();
    lines.sort_unstable();
    let mut wanted: Vec<String> = (0..30).map(|index| format!("{index}: bc")).collect();
    wanted.sort_unstable();
    assert_eq!(lines, wanted);
    let report: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(&json).unwrap()).unwrap();
    assert_eq!(report.as_array().unwrap().len(), 30);
    assert_eq!(
        (&report[29]["index"], &report[29]["status"]),
        (&29.into(), &0.into())
    );

    // A file for each, and a status that is not 0.
    let path = dir.save("timer", "", &[]);
    let output = dir.path("consoles");
    fs::create_dir(&output).unwrap();
    let mut command = minivmm(&["fork"]);
    command.arg(&path).args(["-n", "4", "--output"]);
    let ended = run(command.arg(&output));
    ended.assert_code(1);
    ended.assert_said("4 of 4 VMs");
    for index in 0..4 {
        let text = fs::read_to_string(output.join(index.to_string())).unwrap();
        assert_eq!(text, "t", "{index}");
    }
}

#[test]
fn a_signal_or_a_deadline_ends_all_forks() {
    let dir = Dir::new();
    let path = dir.save("marks", "m", &[]);
    let mut command = minivmm(&["fork"]);
    command.arg(&path).args(["-n", "100", "-j", "4"]);
    let child = command.spawn().unwrap();
    thread::sleep(Duration::from_millis(300));
    common::signal(&child, "INT");
    let output = wait(child, Duration::from_secs(60));
    assert_eq!(output.status.code(), Some(130));
    let mut command = minivmm(&["fork"]);
    command
        .arg(&path)
        .args(["-n", "3", "-j", "3", "--deadline", "100ms"]);
    run(&mut command).assert_code(1);
}

#[test]
fn a_signal_ends_forks_whose_output_nobody_reads() {
    let dir = Dir::new();
    let path = dir.save("marks", "m", &[]);
    let (_reader, mut writer) = std::io::pipe().unwrap();
    let size = rustix::pipe::fcntl_setpipe_size(&writer, 4096).unwrap();
    writer.write_all(&vec![b'.'; size]).unwrap();
    let mut command = minivmm(&["fork"]);
    command.arg(&path).args(["-n", "4", "-j", "2"]);
    let child = command.stdout(writer).spawn().unwrap();
    thread::sleep(Duration::from_millis(300));
    common::signal(&child, "TERM");
    let output = wait(child, Duration::from_secs(60));
    assert_eq!(output.status.code(), Some(143));
}

#[test]
fn forks_say_which_vcpus_failed_and_whether_the_file_is_why() {
    let dir = Dir::new();
    let path = dir.save("ends", "bt", &[]);
    let json = dir.path("report.json");
    let mut command = minivmm(&["fork"]);
    let args = ["-n", "50000", "-j", "1", "--json"];
    command.arg(&path).args(args).arg(&json);
    let mut child = command.spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let mut find = |text: &str| lines.any(|line| line.unwrap().contains(text));
    assert!(find("VM 0: the guest triple-faulted"));
    // A file that is cut short changes as well, but may end the whole process.
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.set_modified(SystemTime::UNIX_EPOCH).unwrap();
    assert!(find("was changed while a VM ran from it"));
    common::signal(&child, "TERM");
    assert_eq!(
        wait(child, Duration::from_secs(60)).status.code(),
        Some(143)
    );
    let report: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(&json).unwrap()).unwrap();
    assert_eq!(report[0]["status"], 139);
    assert_eq!(report[0]["error"], "the guest triple-faulted");
    let mut all = report.as_array().unwrap().iter();
    assert!(all.any(|vm| vm["status"] == 125));
}
