//! Ring 3: disks under real Linux. Debian from its own disk, file systems, fio, kill -9, a full host.
//!
//! Where and how it runs, see tests/linux.rs.

mod common;

use std::fs;
use std::hash::{BuildHasher, RandomState};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use common::limit::watch;
use common::linux::{Debian, Saved, debian_disk, rounds, virtio, virtio_command};
use common::network::{self, own_network};
use common::{Ended, PATIENCE, boot_tiny, run, wait};
use tempfile::NamedTempFile;

/// Runs a script with these as $0, $1, ..., and expects it to succeed.
#[track_caller]
fn sh(script: &str, args: &[&Path]) {
    let mut command = Command::new("sh");
    let output = command.args(["-ec", script]).args(args).output().unwrap();
    assert!(
        output.status.success(),
        "{script} with {args:?}: {output:?}"
    );
}

/// The checksum that the host sees.
fn md5(file: &Path) -> String {
    let output = Command::new("md5sum").arg(file).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.split_whitespace().next().expect("a sum").into()
}

/// A disk of random bytes, no multiple of 4 KiB.
fn random_disk() -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    let mut random = fs::File::open("/dev/urandom")
        .unwrap()
        .take((4 << 20) + 512);
    std::io::copy(&mut random, &mut file).unwrap();
    file
}

/// Has the guest read and write a disk with these options; gives the sum that it saw in the end, and the file's.
#[track_caller]
fn read_and_write(cpus: &str, options: &str, queues: u16) -> (String, String) {
    let disk = random_disk();
    let first = md5(disk.path());
    let disk_option = format!("path={},id=a-serial{options}", disk.path().display());
    let out = virtio(
        "read-write",
        &["--cpus", cpus, "--disk", &disk_option],
        &[
            "size 8193 ro 0 serial a-serial",
            &format!("queues {queues}"),
            &format!("first-sum {first}"),
            "IO-APIC   5-edge",
        ],
    );
    let (_, last) = out.split_once("last-sum ").expect("a sum");
    let last = last.split_whitespace().next().expect("a sum");
    assert_ne!(last, first);
    assert!(out.contains(&format!("again-sum {last}")), "{last}: {out}");
    (last.into(), md5(disk.path()))
}

#[test]
fn a_disk_is_read_and_written() {
    for (cpus, options, queues) in [
        ("2", "", 2),
        ("4", ",engine=io_uring", 4),
        ("4", ",engine=sync,queues=3", 3),
    ] {
        let (seen, file) = read_and_write(cpus, options, queues);
        assert_eq!(seen, file, "{options}");
    }
}

#[test]
fn an_ephemeral_disk_leaves_its_file_alone() {
    let (seen, file) = read_and_write("4", ",ephemeral", 4);
    assert_ne!(seen, file);
}

#[test]
fn a_read_only_disk_refuses_writes_and_a_second_takes_them() {
    let (source, copy) = (random_disk(), random_disk());
    let sum = md5(source.path());
    let path = |file: &NamedTempFile| format!("path={}", file.path().display());
    virtio(
        "read-only",
        &[
            "--disk",
            &format!("{},ro", path(&source)),
            "--disk",
            &path(&copy),
        ],
        &[
            "vda 1 vdb 0",
            "Operation not permitted",
            &format!("sum {sum}"),
        ],
    );
    assert_eq!((md5(source.path()), md5(copy.path())), (sum.clone(), sum));
}

#[test]
fn a_file_system_is_clean_after_the_guest() {
    let tree = tempfile::tempdir().unwrap();
    let disk = NamedTempFile::new().unwrap();
    disk.as_file().set_len(32 << 20).unwrap();
    sh(
        "head -c 3000000 /dev/urandom >$0/data; (cd $0; sha256sum data >sums)
        sed -i s,data,/mnt/data, $0/sums",
        &[tree.path()],
    );
    for (options, sector) in [("", 512), (",sector=4096", 4096)] {
        sh(
            "mkfs.ext4 -qF -b 4096 -d $0 $1",
            &[tree.path(), disk.path()],
        );
        let option = format!("path={}{options}", disk.path().display());
        let sector = format!("65536 sectors, logical blocks of {sector}");
        virtio(
            "file-system",
            &["--disk", &option],
            &[&sector, "/mnt/data: OK"],
        );
        sh(
            "e2fsck -fn $0; debugfs -R 'cat /note' $0 | grep 'from the guest'",
            &[disk.path()],
        );
    }
}

/// A block device on a file.
struct Loop(String);

impl Loop {
    fn new(options: &str, file: &Path) -> Self {
        let output = Command::new("sh")
            .args(["-ec", &format!("losetup {options} --find --show $0")])
            .arg(file)
            .output()
            .unwrap();
        assert!(output.status.success(), "losetup needs root: {output:?}");
        Self(String::from_utf8(output.stdout).unwrap().trim().into())
    }

    fn boot(&self, options: &str) -> Ended {
        let disk = format!("path={}{options}", self.0);
        run(&mut boot_tiny("hello", "", &["--disk", &disk]))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

#[test]
fn a_block_device_has_its_own_sectors_and_may_be_read_only() {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let device = Loop::new("--read-only", file.path());
    let ended = device.boot("");
    ended.assert_code(125);
    let wanted = format!("{} is a read-only block device: add ro", device.0);
    ended.assert_said(&wanted);
    for options in [",ro", ",ephemeral", ",sector=4096,ro"] {
        device.boot(options).assert_code(0);
    }
    drop(device);

    let device = Loop::new("--sector-size 4096", file.path());
    for options in ["", ",sector=4096"] {
        device.boot(options).assert_code(0);
    }
    let ended = device.boot(",sector=512");
    ended.assert_code(125);
    let wanted = format!("{} has logical blocks of 4096", device.0);
    ended.assert_said(&wanted);
}

/// A copy of Debian's disk.
fn debian_copy() -> NamedTempFile {
    let copy = NamedTempFile::new().unwrap();
    let script = "cp --sparse=always \"$1\" \"$0\"; chmod u+w \"$0\"";
    sh(script, &[copy.path(), &debian_disk()]);
    copy
}

#[test]
fn debian_boots_to_a_login_and_leaves_its_disk_clean() {
    let disk = debian_copy();
    let debian = Debian::boot(&format!("path={}", disk.path().display()), &[]);
    debian.log_in();
    // No unit has failed, and none is still to start.
    debian.run("systemctl is-system-running --wait", "running\r\n");
    debian.run("findmnt --noheadings /", "/dev/vda ext4   rw");
    debian.run("uname -r; echo $((6*7))-is >/note", "-cloud-amd64\r\n");
    debian.power_off();
    sh(
        "e2fsck -fn $0; debugfs -R 'cat /note' $0 | grep 42-is",
        &[disk.path()],
    );
}

#[test]
fn debian_gives_a_login_on_hvc0_and_installs_a_package_from_the_network() {
    own_network(1500);
    let repository = network::repository();
    network::files("127.0.0.1:8000", repository.path().into());
    let disk = format!("path={},ephemeral", debian_disk().display());
    // The driver of hvc0 is a module. Both consoles are on one terminal, and their logins would mix.
    let consoles = "console=ttyS0 console=hvc0 systemd.mask=serial-getty@ttyS0.service";
    let net = "passt,host-loopback";
    let args = ["--console", "virtio", "--append", consoles, "--net", net];
    let debian = Debian::boot(&disk, &args);
    debian.log_in();
    debian.run("tty", "/dev/hvc0\r\n");
    // Debian's own DHCP client, and then systemd's, which takes ip=dhcp, which minivmm adds with passt, from the kernel's command line.
    debian.run("dhclient -v eth0", "bound to 192.0.2.2 -- renewal in");
    debian.run(
        "dhclient -r eth0; [ -z \"$(ip -4 -oneline address show eth0)\" ] && echo released-$((6*7))",
        "released-42",
    );
    debian.run(
        "systemctl start systemd-network-generator systemd-networkd; \
        /lib/systemd/systemd-networkd-wait-online --ipv4; networkctl status --no-pager eth0",
        "192.0.2.2 (DHCP4 via 192.0.2.1)",
    );
    // The gateway's address leads to this host's servers.
    debian.run(
        "echo 'deb [trusted=yes] http://192.0.2.1:8000 ./' >/etc/apt/sources.list; \
        apt-get -qq update && apt-get -qq install greet && greet",
        "greetings-42",
    );
    debian.power_off();
}

#[test]
fn two_debians_share_one_ephemeral_disk() {
    let disk = debian_copy();
    let sum = md5(disk.path());
    let path = format!("path={},ephemeral", disk.path().display());
    let debians = [1, 2].map(|_| Debian::boot(&path, &[]));
    for debian in &debians {
        debian.log_in();
        // Nothing of the other's.
        debian.run(
            "cat /note; echo mine-$((6*7)) >>/note; sync; cat /note",
            "No such file or directory\r\nmine-42",
        );
    }
    for debian in debians {
        debian.power_off();
    }
    assert_eq!(md5(disk.path()), sum);
}

#[test]
fn fio_reads_back_what_it_wrote() {
    let debian = format!("path={},ro", debian_disk().display());
    let mut args = vec!["--cpus", "4", "--disk", &debian];
    // No size is a multiple of 4 KiB.
    let disks =
        [(1, "sync"), (4, "sync"), (1, "io_uring"), (4, "io_uring")].map(|(queues, engine)| {
            let file = NamedTempFile::new().unwrap();
            let sectors = (4 << 11) + 2 * queues + 1;
            file.as_file().set_len(sectors * 512).unwrap();
            let disk = format!(
                "path={},queues={queues},engine={engine}",
                file.path().display()
            );
            (file, disk, queues, sectors)
        });
    for (_, disk, ..) in &disks {
        args.extend(["--disk", disk]);
    }
    let out = virtio("fio", &args, &[]);
    for ((.., queues, sectors), name) in disks.iter().zip(["vdb", "vdc", "vdd", "vde"]) {
        let line = out.lines().find(|line| line.starts_with(name)).expect(&out);
        let words: Vec<&str> = line.split_whitespace().collect();
        let count = |name: &str| -> u64 {
            let at = words.iter().position(|word| *word == name).expect(name);
            words[at + 1].parse().unwrap()
        };
        assert_eq!(count("queues"), *queues, "{line}");
        for (what, times) in [("read", 2), ("written", 1), ("discarded", 1)] {
            assert!(count(what) >= times * sectors, "{what}: {sectors}: {line}");
        }
        assert!(count("flushes") > 0, "{line}");
    }
}

#[test]
fn fio_reads_back_what_it_wrote_through_snapshots() {
    let debian = format!("path={},ro", debian_disk().display());
    let mut args = vec!["--cpus", "2", "--disk", &debian];
    let disks = ["engine=sync", "engine=io_uring", "ephemeral"].map(|options| {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let disk = format!("path={},{options}", file.path().display());
        (file, disk)
    });
    for (_, disk) in &disks {
        args.extend(["--disk", disk]);
    }
    let snapshots = rounds(2, 20);
    let saved = Saved::of(virtio_command(&format!("saved {snapshots}"), &args));
    let next = saved.path("next");
    let at = format!("7={},exit", next.display());
    for number in 1..snapshots {
        let ended = saved.restore(&["--snapshot-at", &at]);
        ended.assert_code(0).assert_printed(&["under way: "]);
        eprintln!(
            "snapshot {number}: {:?}: {}",
            ended.took,
            ended.out().trim()
        );
        fs::rename(&next, saved.snapshot()).unwrap();
    }
    let ended = saved.restore(&[]);
    ended.assert_code(0).assert_printed(&["all-read-back"]);
}

/// Less than `limit`.
fn random(limit: u64) -> u64 {
    RandomState::new().hash_one(()) % limit
}

#[test]
fn flushed_writes_survive_sigkill() {
    let [files, sectors, copy] = [16, 16, 16].map(|mib| {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(mib << 20).unwrap();
        file
    });
    let log = NamedTempFile::new().unwrap();
    writeln!(&log, "0").unwrap();
    sh(
        "mkfs.ext4 -q $0; debugfs -w -R \"write $1 log\" $0 2>/dev/null",
        &[files.path(), log.path()],
    );
    let mut told = 0;
    for round in 0..20 {
        let engine = ["sync", "io_uring"][round % 2];
        let disk = |file: &NamedTempFile| format!("path={},engine={engine}", file.path().display());
        let args = ["--disk", &disk(&files), "--disk", &disk(&sectors)];
        let mut child = virtio_command("told", &args).spawn().unwrap();
        let _watched = watch(&child);
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let enough = told + 1 + random(8);
        let mut read_on = |until: u64| {
            // What the kill has cut short is less than was said.
            while told < until
                && let Some(Ok(line)) = lines.next()
            {
                if let Some(number) = line.strip_prefix("on-disk ") {
                    told = told.max(number.trim().parse().unwrap_or(0));
                }
            }
        };
        read_on(enough);
        thread::sleep(Duration::from_micros(random(100_000)));
        child.kill().unwrap();
        read_on(u64::MAX);
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(
            told >= enough,
            "round {round}: {told} of {enough}: {stderr}"
        );

        let image = fs::read(sectors.path()).unwrap();
        for number in 1..=told {
            let sector = &image[number as usize * 512..][..512];
            assert_eq!(sector, format!("{number:<512}").as_bytes(), "round {round}");
        }
        // On a copy, so that the next guest has a journal to recover, too.
        sh(
            "cp --sparse=always $0 $1; e2fsck -fy $1 || [ $? = 1 ]; e2fsck -fn $1; debugfs -R 'cat /log' $1 >$2",
            &[files.path(), copy.path(), log.path()],
        );
        let numbers = fs::read_to_string(log.path()).unwrap();
        let numbers: Vec<u64> = numbers.lines().map(|line| line.parse().unwrap()).collect();
        assert!(
            numbers.len() as u64 > told,
            "round {round}: {told}, {numbers:?}"
        );
        assert!(
            numbers.iter().copied().eq(0..numbers.len() as u64),
            "{numbers:?}"
        );
    }
}

#[test]
fn a_full_host_is_an_error_to_the_guest_until_there_is_room() {
    for how in ["engine=sync", "engine=io_uring", "ephemeral"] {
        let dir = tempfile::tempdir().unwrap();
        let disk = format!("path={}/disk,{how}", dir.path().display());
        let command = virtio_command("full-host", &["--disk", &disk]);
        // The file system is in a mount namespace of minivmm's own, for which nobody has to be root.
        let mut child = Command::new("unshare")
            .args(["--user", "--map-root-user", "--mount", "sh", "-ec"])
            .arg("mount -t tmpfs -o size=6m full $0; head -c 4m /dev/zero >$0/ballast; truncate -s 16m $0/disk; exec \"$@\"")
            .arg(dir.path())
            .arg(command.get_program())
            .args(command.get_args())
            // What an ephemeral disk takes.
            .env("TMPDIR", dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let _watched = watch(&child);
        let mut lines = BufReader::new(child.stdout.take().unwrap())
            .lines()
            .map(Result::unwrap);
        let mut out: Vec<String> = lines
            .by_ref()
            .take_while(|line| line.trim() != "disk-is-full")
            .collect();
        let ballast = format!("/proc/{}/root/{}/ballast", child.id(), dir.path().display());
        fs::remove_file(ballast).unwrap_or_else(|e| panic!("{how}: {e}: {out:?}"));
        child.stdin.take().unwrap().write_all(b"again\n").unwrap();
        out.extend(lines);
        let output = wait(child, PATIENCE);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{how}: {out:?} {stderr}");
        for wanted in ["I/O error", "written-again"] {
            assert!(
                out.iter().any(|line| line.contains(wanted)),
                "{how}, {wanted}: {out:?} {stderr}"
            );
        }
    }
}
