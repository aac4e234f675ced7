//! Linux guests: the kernels and initramfs of guest-kernels/, and boots of them.

use std::collections::BTreeSet;
use std::env;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tempfile::TempDir;

use super::skip::skip;
use super::terminal::{Session, Terminal};
use super::{Ended, minivmm, run};

/// What a script of guest-kernels/ prints: where in the cache a guest is. The lab has no network, so `make guests` has put
/// it there.
pub(crate) fn guest(script: &str, args: &[&str]) -> PathBuf {
    let output = Command::new(super::project("guest-kernels").join(script))
        .args(args)
        .output()
        .expect(script);
    assert!(
        output.status.success(),
        "{script}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout)
        .expect("a path")
        .trim()
        .into()
}

pub(crate) fn kernel(flavor: &str, file: &str) -> String {
    guest("fetch", &["--offline", flavor])
        .join(file)
        .to_str()
        .unwrap()
        .into()
}

/// Whether the cache has a kernel that not every machine has fetched or built. Where it has not, the test that asks is skipped.
pub(crate) fn has_kernel(flavor: &str) -> bool {
    let mut fetch = Command::new(super::project("guest-kernels/fetch"));
    let fetched = fetch.args(["--offline", flavor]).output().unwrap();
    if !fetched.status.success() {
        skip(&format!("the kernel {flavor} is not in the cache"));
    }
    fetched.status.success()
}

pub(crate) fn initramfs() -> String {
    super::project("build/demo.cpio").to_str().unwrap().into()
}

/// minivmm with the demo initramfs, unless `args` name another, that runs `script` with sh, its output on stdout.
pub(crate) fn boot_command(kernel: &str, args: &[&str], script: &str) -> Command {
    let append = format!("loglevel=4 -- sh -c \"{script}\"");
    let mut command = minivmm(&["--kernel", kernel]);
    if !args.contains(&"--initrd") {
        command.args(["--initrd", &initramfs()]);
    }
    command.args(["--append", &append]).args(args);
    command
}

/// A boot of the demo initramfs that runs `script` with sh, its output on stdout.
pub(crate) fn boot(kernel: &str, args: &[&str], script: &str) -> Ended {
    run(&mut boot_command(kernel, args, script))
}

/// Boots with `args`, and expects this in the output of `script` and status 0.
#[track_caller]
pub(crate) fn expect(kernel: &str, args: &[&str], script: &str, wanted: &[&str]) -> Ended {
    let ended = boot(kernel, args, script);
    ended.assert_code(0);
    ended.assert_printed(wanted);
    ended
}

/// minivmm with Debian's virtio modules, which runs a case of tests/guest/virtio.
pub(crate) fn virtio_command(case: &str, args: &[&str]) -> Command {
    let initramfs = super::project("build/virtio.cpio");
    let mut args = args.to_vec();
    args.extend(["--initrd", initramfs.to_str().unwrap()]);
    boot_command(
        &kernel("cloud", "bzImage"),
        &args,
        &format!("virtio {case}"),
    )
}

/// Runs it to the end, and expects this in its output and status 0.
#[track_caller]
pub(crate) fn virtio(case: &str, args: &[&str], wanted: &[&str]) -> String {
    let ended = run(&mut virtio_command(case, args));
    ended.assert_code(0);
    ended.assert_printed(wanted);
    ended.out()
}

/// Debian's disk, to be read alone.
pub(crate) fn debian_disk() -> PathBuf {
    guest("debian-disk", &[])
}

/// The whole of Debian, as a user has it, its root file system on this disk.
pub(crate) struct Debian {
    terminal: Terminal,
    session: Session,
}

impl Debian {
    /// With its own kernel and initrd.
    pub(crate) fn boot(disk: &str, args: &[&str]) -> Self {
        let initrd = guest("debian-initrd", &["cloud"]);
        let args = [&["--initrd", initrd.to_str().unwrap()], args].concat();
        Self::boot_kernel(&kernel("cloud", "bzImage"), &args, disk)
    }

    pub(crate) fn boot_kernel(kernel: &str, args: &[&str], disk: &str) -> Self {
        let mut command = minivmm(&["--kernel", kernel, "--memory", "512M"]);
        command
            .args(args)
            .args(["--disk", disk, "--append", "root=/dev/vda", "--rng"]);
        Self::on_terminal(&command)
    }

    pub(crate) fn on_terminal(command: &Command) -> Self {
        let terminal = Terminal::new();
        let session = terminal.run(command);
        Self { terminal, session }
    }

    #[track_caller]
    pub(crate) fn log_in(&self) {
        self.terminal.wait_for("debian login: ");
        self.terminal.type_in("root\r");
        self.terminal.wait_for("Password: ");
        self.terminal.type_in("minivmm\r");
        self.terminal.wait_for("root@debian:~# ");
    }

    /// Types a command, whose output has `wanted` in it; the command itself, which the terminal shows, must not.
    #[track_caller]
    pub(crate) fn run(&self, command: &str, wanted: &str) {
        self.terminal.type_in(format!("{command}\r"));
        self.terminal.wait_for(wanted);
    }

    #[track_caller]
    pub(crate) fn power_off(mut self) {
        self.terminal.type_in("systemctl poweroff\r");
        assert_eq!(self.session.status(), 0, "{}", self.terminal.text());
    }

    /// The same, when minivmm is to end.
    #[track_caller]
    pub(crate) fn terminate(mut self) {
        self.session.signal("TERM");
        assert_eq!(self.session.status(), 0, "{}", self.terminal.text());
        self.terminal.wait_for("reboot: Power down");
    }
}

/// A guest that was saved when it had booted, and is to go on.
pub(crate) struct Saved(TempDir);

impl Saved {
    /// With the demo initramfs and tests/guest/witness.c; at some place, `script` takes the snapshot.
    #[track_caller]
    pub(crate) fn new(kernel: &str, args: &[&str], script: &str) -> Self {
        let initramfs = super::project("build/restore.cpio");
        let args = [&["--initrd", initramfs.to_str().unwrap()], args].concat();
        Self::of(boot_command(kernel, &args, script))
    }

    /// What this command boots.
    #[track_caller]
    pub(crate) fn of(mut command: Command) -> Self {
        let saved = Self(tempfile::tempdir().unwrap());
        let at = format!("7={},exit", saved.snapshot().display());
        run(command.args(["--snapshot-at", &at])).assert_code(0);
        saved
    }

    pub(crate) fn snapshot(&self) -> PathBuf {
        self.path("snapshot")
    }

    /// A file beside it.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn restore(&self, args: &[&str]) -> Ended {
        run(minivmm(&["restore"]).arg(self.snapshot()).args(args))
    }
}

/// How often something is done: more often when there is time for it.
pub(crate) fn rounds(usual: usize, long: usize) -> usize {
    if is_long() { long } else { usual }
}

/// Whether all is to be tried, which takes an hour: MINIVMM_TEST_LONG.
pub(crate) fn is_long() -> bool {
    env::var_os("MINIVMM_TEST_LONG").is_some()
}

/// Microseconds since 1970.
pub(crate) fn now() -> u128 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap().as_micros()
}

/// A script, which takes a snapshot while a process for each CPU sleeps 1 ms again and again, and then goes on with `rest`. When it
/// has ended, they have all woken, and each has said what it saw.
pub(crate) fn with_witnesses(rest: &str) -> String {
    format!(
        "witness & usleep 300000; guestctl snapshot 7 sh -c '{rest};
        killall -USR1 witness; while pidof witness >/dev/null; do usleep 20000; done'"
    )
    .replace('\n', " ")
}

/// The word behind each `name` in what guests have printed.
pub(crate) fn values<'a>(out: &'a str, name: &str) -> Vec<&'a str> {
    let behind = out.split(name).skip(1);
    behind
        .filter_map(|rest| rest.split_whitespace().next())
        .collect()
}

/// Saves a guest and restores it twice: each gets its argument, has the time of the host and random numbers of its own, wakes from
/// the sleep that it was saved in on each of its vCPUs, and ends with its status.
#[track_caller]
pub(crate) fn expect_restored(kernel: &str, cpus: usize) {
    const COMMAND: &str = "echo argument $MINIVMM_ARGUMENT;
        echo clocksource $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource);
        echo random $(head -c 16 /dev/urandom | sha256sum)";
    /// In microseconds: the guest's clock has a frequency of its own.
    const TOLERANCE: u128 = 100_000;
    let script = with_witnesses(COMMAND) + "; guestctl exit 7";
    let saved = Saved::new(kernel, &["--cpus", &cpus.to_string()], &script);
    // A guest whose clock has only gone on is late now.
    thread::sleep(Duration::from_secs(1));
    let mut random = BTreeSet::new();
    for (argument, clock) in [("one", "continue"), ("two", "realtime")] {
        let before = now();
        let ended = saved.restore(&["--argument", argument, "--clock", clock]);
        let allowed = before - TOLERANCE..=now() + TOLERANCE;
        ended.assert_code(7);
        let wanted = [
            &format!("argument {argument}\r\n"),
            "clocksource kvm-clock\r\n",
            "witnesses done\r\n",
        ];
        ended.assert_printed(&wanted);
        let out = ended.out();
        let times = values(&out, "wall ");
        assert_eq!(times.len(), cpus, "{out}");
        for time in times {
            assert!(
                allowed.contains(&time.parse().unwrap()),
                "{time}, not in {allowed:?}: {out}"
            );
        }
        random.extend(values(&out, "random ").into_iter().map(str::to_owned));
    }
    assert_eq!(random.len(), 2 * (1 + cpus), "{random:?}");
}
