//! Ring 3: real Linux. Stock distribution kernels boot to userspace, on a host whose KVM can run them or in the lab.
//!
//! `make test` runs it where it can run; on a KVM that cannot, every test here fails and says so. It is no part of a plain
//! `cargo test`. The guests come from `make guests`.

mod common;

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::Command;
use std::thread;
use std::time::Duration;

use common::limit::watch;
use common::linux::{boot, boot_command, expect, guest, initramfs, kernel, virtio};
use common::terminal::Terminal;
use common::{PATIENCE, minivmm, run, run_with_input, wait};

/// The MemTotal that /proc/meminfo showed, in MiB.
fn mem_total_mib(out: &str) -> u64 {
    let line = out
        .lines()
        .find(|line| line.contains("MemTotal:"))
        .expect("MemTotal");
    line.split_whitespace()
        .nth(1)
        .unwrap()
        .parse::<u64>()
        .unwrap()
        >> 10
}

#[test]
fn cloud_bzimage() {
    let version = expect(
        &kernel("cloud", "bzImage"),
        &[],
        "uname -r; nproc",
        &["-cloud-amd64", "\n1\r\n"],
    )
    .out();
    let host = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert!(
        !version.contains(host.trim()),
        "its own kernel, not the host's"
    );
}

#[test]
fn little_memory_and_much() {
    let cloud = kernel("cloud", "bzImage");
    // What a kernel keeps for itself, at most: its image, and its page structures (1/64 of RAM).
    for (size, mib) in [("128M", 128), ("6G", 6144)] {
        let ended = expect(
            &cloud,
            &["--memory", size],
            "cat /proc/meminfo",
            &["MemTotal"],
        );
        let total = mem_total_mib(&ended.out());
        assert!(
            total <= mib && total >= mib - mib / 32 - 60,
            "{size}: MemTotal is {total} MiB"
        );
    }
}

#[test]
fn memory_above_4_gib_takes_none_away() {
    let cloud = kernel("cloud", "bzImage");
    let [below, above] = ["3072M", "3073M"].map(|size| {
        let args = ["--memory", size];
        let ended = expect(&cloud, &args, "cat /proc/meminfo", &["MemTotal"]);
        mem_total_mib(&ended.out())
    });
    // With bounce buffers it would be 66 MiB.
    assert!(above + 8 > below, "{below} MiB, {above} MiB");
}

#[test]
fn poweroff_exits_0_promptly() {
    let mut command = minivmm(&[
        "--kernel",
        &kernel("cloud", "bzImage"),
        "--initrd",
        &initramfs(),
    ]);
    let ended = run_with_input(&mut command, b"echo here-I-am\npoweroff\n");
    ended.assert_code(0);
    assert!(ended.out().contains("\nhere-I-am"), "{}", ended.out());
}

#[test]
fn reboot_exits_or_restarts() {
    let cloud = kernel("cloud", "bzImage");
    let args = ["--kernel", &cloud, "--initrd", &initramfs()];
    run_with_input(&mut minivmm(&args), b"reboot\n").assert_code(0);
    // Restarted, it boots, resets and boots again until it is stopped.
    for cache in [&[][..], &["--no-kernel-cache"]] {
        let args = [&["--on-reboot", "restart"], cache].concat();
        let mut child = boot_command(&cloud, &args, "busybox reboot -f")
            .spawn()
            .unwrap();
        let _watched = watch(&child);
        let lines = BufReader::new(child.stdout.as_mut().unwrap()).lines();
        let boots = lines
            .map_while(Result::ok)
            .filter(|line| line.contains("minivmm-demo: userspace"));
        assert_eq!(boots.take(3).count(), 3, "{args:?}");
        common::signal(&child, "TERM");
        assert_eq!(wait(child, PATIENCE).status.code(), Some(143), "{args:?}");
    }
}

#[test]
fn exit_port_status_is_the_exit_status() {
    boot(&kernel("cloud", "bzImage"), &[], "exit 42").assert_code(42);
}

#[test]
fn panic_exits_134() {
    // No root file system: an early panic, before any module could tell pvpanic.
    let mut command = minivmm(&["--kernel", &kernel("cloud", "bzImage")]);
    let ended = run(&mut command);
    ended.assert_code(134);
    assert!(
        ended.out().contains("Kernel panic - not syncing"),
        "{}",
        ended.out()
    );
    // And one from a running system.
    let ended = boot(
        &kernel("cloud", "bzImage"),
        &[],
        "echo c > /proc/sysrq-trigger",
    );
    ended.assert_code(134);
}

#[test]
fn too_little_memory_is_refused() {
    let ended = run(&mut minivmm(&[
        "--kernel",
        &kernel("cloud", "bzImage"),
        "--memory",
        "32M",
    ]));
    ended.assert_code(125);
    ended.assert_said("memory");
}

#[test]
fn debian_initrd_reaches_its_rescue_shell() {
    let initrd = guest("debian-initrd", &["cloud"]);
    let mut command = minivmm(&["--kernel", &kernel("cloud", "bzImage"), "--memory", "512M"]);
    command.args([
        "--initrd",
        initrd.to_str().unwrap(),
        // With panic=, which minivmm's default has, Debian's scripts reset rather than give a shell.
        "--cmdline",
        "console=ttyS0 break=premount",
    ]);
    let ended = run_with_input(&mut command, b"echo rescue-$((6*7)); poweroff -f\n");
    ended.assert_code(0);
    assert!(ended.out().contains("rescue-42"), "{}", ended.out());
}

#[test]
fn virtio_rng_feeds_the_guest() {
    let out = virtio("entropy", &["--rng"], &["virtio_rng.0"]);
    assert!(out.contains("\n4000\r\n"), "{out}");
}

/// minivmm with Debian's virtio modules and its console on hvc0.
fn on_hvc0() -> Command {
    let initramfs = common::project("build/virtio.cpio");
    let mut command = minivmm(&["--kernel", &kernel("cloud", "bzImage")]);
    command.args(["--console", "virtio", "--initrd"]);
    command.arg(initramfs);
    command
}

#[test]
fn a_session_on_hvc0() {
    let terminal = Terminal::new();
    terminal.resize(31, 111);
    let before = terminal.modes();
    let mut session = terminal.run(&on_hvc0());
    terminal.wait_for("/ # ");
    terminal.type_in("tty; stty size\r");
    terminal.wait_for("\r\n/dev/hvc0\r\n31 111\r\n");
    terminal
        .type_in("sh -c 'trap \"stty size; exit\" WINCH; echo go; while :; do sleep 1; done'\r");
    terminal.wait_for("\r\ngo\r\n");
    terminal.resize(50, 132);
    terminal.wait_for("\r\n50 132\r\n");
    terminal.type_in("sh -c 'echo now; exec sleep 1000'\r");
    terminal.wait_for("\r\nnow\r\n");
    terminal.type_in("\x03");
    terminal.type_in("echo status $?\r");
    terminal.wait_for("\r\nstatus 130\r\n");

    terminal.type_in("\x01bh");
    terminal.wait_for("sysrq: HELP");

    let paste: String = (0..160).map(|i| format!("{i:03} {:x<60}\n", "")).collect();
    terminal.type_in("echo ready; cat > /tmp/pasted\r");
    terminal.wait_for("\r\nready\r\n");
    terminal.type_in(&paste);
    terminal.type_in("\x04");
    terminal.type_in("wc -c < /tmp/pasted; cut -c 1-3 /tmp/pasted | tr -d '\\n' | wc -c\r");
    terminal.wait_for(&format!("\r\n{}\r\n480\r\n", paste.len()));

    terminal.type_in("poweroff\r");
    assert_eq!(session.status(), 0);
    assert_eq!(terminal.modes(), before);
}

#[test]
fn early_input_to_hvc0_is_not_lost() {
    let ended = run_with_input(&mut on_hvc0(), b"echo here-I-am on $(tty)\nexec poweroff\n");
    ended.assert_code(0);
    let out = ended.out();
    assert!(out.contains("\nhere-I-am on /dev/hvc0"), "{out}");
}

#[test]
fn panic_exits_134_with_and_without_hvc0() {
    let mut command = on_hvc0();
    command.args(["--append", "-- sh -c \"echo c > /proc/sysrq-trigger\""]);
    let with_driver = run(&mut command);
    // Without its driver there is nothing but the early console on COM1.
    let without = run(&mut minivmm(&[
        "--kernel",
        &kernel("cloud", "bzImage"),
        "--console",
        "virtio",
    ]));
    for ended in [with_driver, without] {
        ended.assert_code(134);
        let out = ended.out();
        assert_eq!(
            out.matches("Kernel panic - not syncing").count(),
            1,
            "{out}"
        );
    }
}

#[test]
fn sigterm_ends_a_running_guest_at_once() {
    let child = minivmm(&[
        "--kernel",
        &kernel("cloud", "bzImage"),
        "--initrd",
        &initramfs(),
        "--cpus",
        "2",
    ])
    .spawn()
    .unwrap();
    thread::sleep(Duration::from_secs(3));
    common::signal(&child, "TERM");
    let output = wait(child, Duration::from_secs(10));
    assert_eq!(output.status.code(), Some(143));
}

#[test]
fn a_session_at_a_terminal() {
    let mut command = minivmm(&["--kernel", &kernel("cloud", "bzImage")]);
    command.args(["--initrd", &initramfs()]);
    let terminal = Terminal::new();
    let before = terminal.modes();
    let mut session = terminal.run(&command);
    terminal.wait_for("/ # ");
    assert!(terminal.is_raw());
    terminal.type_in("echo $((6*7))-lines\r");
    terminal.wait_for("\r\n42-lines\r\n");
    // The arrow key recalls it.
    terminal.type_in("\x1b[A\r");
    terminal.wait_for_times("\r\n42-lines\r\n", 2);
    // Another shell, so that the word comes from where Ctrl-C goes to.
    terminal.type_in("sh -c 'echo now; exec sleep 1000'\r");
    terminal.wait_for("\r\nnow\r\n");
    terminal.resize(50, 132);
    terminal.type_in("\x03");
    terminal.type_in("echo status $?\r");
    terminal.wait_for("\r\nstatus 130\r\n");

    // SysRq, of which h is no command but a call for help.
    terminal.type_in("\x01bh");
    terminal.wait_for("sysrq: HELP");

    // A paste, in lines: a terminal that edits lines takes 4095 bytes of one.
    let paste: String = (0..160).map(|i| format!("{i:03} {:x<60}\n", "")).collect();
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), &paste).unwrap();
    let sum = Command::new("md5sum").arg(file.path()).output().unwrap();
    let sum = String::from_utf8(sum.stdout).unwrap();
    let (sum, _) = sum.split_once(' ').unwrap();
    // By then, the shell has handed the terminal over.
    terminal.type_in("echo go; cat > /tmp/pasted\r");
    terminal.wait_for("\r\ngo\r\n");
    terminal.type_in(&paste);
    terminal.type_in("\x04");
    terminal.type_in("wc -c < /tmp/pasted; md5sum < /tmp/pasted\r");
    terminal.wait_for(&format!("\r\n{}\r\n{sum}  -\r\n", paste.len()));

    terminal.type_in("poweroff\r");
    assert_eq!(session.status(), 0);
    assert_eq!(terminal.modes(), before);
    let text = terminal.text();
    assert!(text.ends_with("\r\n"), "the prompt begins a line: {text:?}");
}

#[test]
fn a_timeline_names_the_phases_of_a_boot() {
    let (kernel, initramfs) = (kernel("cloud", "bzImage"), initramfs());
    // At log level 7 the kernel says when it starts init. The demo guest's init makes boot mark 1 before it says a word.
    let loud = ["init_run", "boot_mark", "first_user_output", "login_prompt"];
    for (log, phases) in [("loglevel=7", &loud[..]), ("quiet", &loud[1..])] {
        let file = tempfile::NamedTempFile::new().unwrap();
        let append = format!("{log} -- sh -c \"printf 'debian login: '\"");
        let mut command = minivmm(&["--kernel", &kernel, "--initrd", &initramfs]);
        command.args(["--append", &append]);
        run(command.arg("--timeline").arg(file.path())).assert_code(0);
        let json = fs::read_to_string(&file).unwrap();
        let timeline: serde_json::Value = serde_json::from_str(&json).unwrap();
        let mut names: Vec<&str> = timeline["events"]
            .as_array()
            .unwrap()
            .iter()
            .map(|event| event["name"].as_str().unwrap())
            .collect();
        names.retain(|name| loud.contains(name));
        assert_eq!(names, phases, "{json}");
        assert_eq!(
            timeline["initrd"]["bytes"],
            fs::metadata(&initramfs).unwrap().len()
        );
        assert!(
            timeline["exits"]["kinds"]["io_out"].as_u64() >= timeline["console"]["bytes"].as_u64()
        );
    }
}

#[test]
fn bench_measures_linux_beside_qemu() {
    let bzimage = kernel("cloud", "bzImage");
    let mut command = minivmm(&["bench", "--runs", "2", "--vs", "qemu", "--json"]);
    command.args(["--kernel", &bzimage, "--initrd", &initramfs()]);
    command.args(["--append", "-- true", "--timeout", "1h"]);
    let child = command.spawn().unwrap();
    let output = wait(child, Duration::from_secs(600));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    for vmm in report["vmms"].as_array().unwrap() {
        assert_eq!(vmm["error"], serde_json::Value::Null);
        let ms = |what: &str| vmm[what]["median_ms"].as_f64().unwrap();
        assert!(ms("first_output") <= ms("marker"), "{vmm}");
        assert!(ms("marker") < ms("end"), "{vmm}");
        // Linux has touched some of its memory, and no more than it has.
        let guest_kib = vmm["guest_kib"].as_u64().expect("found by its size");
        assert!((8 << 10..=256 << 10).contains(&guest_kib), "{vmm}");
    }
    let own_kib = |i: usize| report["vmms"][i]["own_kib"].as_u64().unwrap();
    assert!(own_kib(0) > 0 && own_kib(0) < own_kib(1), "{report}");
}

#[test]
fn compare_runs_one_root_in_containers_and_in_a_guest() {
    let root = tempfile::tempdir().unwrap();
    let busybox = guest("fetch", &["--offline", "busybox"]).join("busybox");
    // Whatever a root can have; what is seen of it must be the same everywhere.
    let script = "cd $ROOT; mkdir -p bin tmp x/deep/er; cp $BUSYBOX bin/busybox; ln -s busybox bin/sh
        cd x; echo content >hard; ln hard deep/link; ln -s deep/link soft; mkfifo pipe; mknod null c 1 3
        head -c 70000 /dev/urandom >odd; chown 123:4567 odd; chmod 6755 odd; touch empty -d @1000000000";
    let made = Command::new("sh")
        .args(["-ec", script])
        .env("ROOT", root.path())
        .env("BUSYBOX", busybox)
        .status();
    assert!(made.unwrap().success());
    // Sizes and links of directories are their file system's own affair.
    let look = "cd /x; busybox stat -c '%n %F %h %u %g %a %t %T %s %Y' hard soft pipe null odd empty deep/link
        busybox stat -c '%n %F %u %a %Y' deep deep/er; cat soft; busybox md5sum odd
        echo \"<$1>\" \"<$2>\" \"$HOME\"; test -c /dev/null && test -d /proc/self; busybox tty; read nothing; exit 7";
    let mut command = minivmm(&["compare", "--runs", "1", "--timeout", "1h", "--json"]);
    command
        .arg("--rootfs")
        .arg(root.path())
        .args(["--kernel", &kernel("cloud", "bzImage")])
        .args(["--", "sh", "-c", look, "sh", "a  b", ""])
        // docker's daemon does not run, and a docker without one is a failure.
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    let child = command.spawn().unwrap();
    let output = wait(child, Duration::from_secs(600));
    let stderr = String::from_utf8_lossy(&output.stderr);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect(&stderr);
    let rows = report["rows"].as_array().unwrap();
    for name in ["minivmm", "minivmm restore"] {
        let vm = rows.iter().find(|row| row["name"] == name).unwrap();
        assert_eq!(vm["error"], serde_json::Value::Null);
        assert_eq!(vm["statuses"], serde_json::json!([7]));
        let release = vm["kernel_seen"].as_str().unwrap();
        assert!(release.ends_with("cloud-amd64"), "{vm}");
        let median = |time: &str| vm[time]["median_ms"].as_f64();
        assert!(median("warm_first_output") < median("warm_end"), "{vm}");
    }

    let container = |row: &&serde_json::Value| row["name"] == "crun" || row["name"] == "runc";
    let containers: Vec<_> = rows.iter().filter(container).collect();
    if containers.is_empty() {
        return common::skip::skip("neither crun nor runc is installed to compare with");
    }
    let host = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    for row in containers {
        assert_eq!(row["error"], serde_json::Value::Null);
        assert_eq!(row["statuses"], serde_json::json!([7]));
        assert_eq!(row["kernel_seen"], host.trim());
        assert!(
            row["own_namespaces"]
                .as_array()
                .unwrap()
                .contains(&"pid".into()),
            "{row}"
        );
    }
    assert_eq!(report["same_output"], true, "{report}");
}
#[test]
fn a_panic_without_a_reset_is_134() {
    let mut command = minivmm(&["--kernel", &kernel("cloud", "bzImage")]);
    command.args(["--cmdline", "console=ttyS0 quiet"]);
    let ended = run(&mut command);
    ended.assert_code(134);
    assert!(ended.out().ends_with("]---\r\n"), "{}", ended.out());
}

#[test]
fn a_panic_that_nobody_hears_is_134() {
    let unheard = |cmdline: &str| {
        let mut command = minivmm(&["--kernel", &kernel("cloud", "bzImage")]);
        command.args(["--initrd", &initramfs(), "--cmdline"]);
        let ended = run(command.arg(format!("console=hvc0 panic=-1 quiet {cmdline}")));
        assert_eq!(ended.out(), "");
        ended
    };
    let ended = unheard("rdinit=/bin/busybox -- false");
    ended.assert_code(134);
    ended.assert_said("on the console: Attempted to kill init!");
    // The orderly one.
    unheard("rdinit=/bin/busybox -- reboot -f").assert_code(0);
}
