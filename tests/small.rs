//! Ring 3: the small kernel of guest-kernels/kernel/, which `make kernel` builds.
//!
//! Where and how it runs, see tests/linux.rs.

mod common;

use std::path::Path;
use std::process::Command;

use common::image::Image;
use common::linux::{Debian, boot, debian_disk, expect, expect_restored, guest, initramfs, kernel};
use common::{Ended, minivmm, run, run_with_input};
use tempfile::NamedTempFile;

fn bzimage() -> String {
    kernel("small", "bzImage")
}

#[test]
fn each_entry_and_several_cpus() {
    // 0xff is a loader without a number of its own, 0xb0 is PVH.
    for (file, protocol, cpus, loader) in [
        ("bzImage", "linux64", "4", "loader 255"),
        ("vmlinux", "linux64", "1", "loader 255"),
        ("vmlinux", "pvh", "2", "loader 176"),
    ] {
        expect(
            &kernel("small", file),
            &["--boot-protocol", protocol, "--cpus", cpus],
            "uname -r; echo loader $(cat /proc/sys/kernel/bootloader_type); nproc",
            &["-minivmm\r\n", loader, &format!("\n{cpus}\r\n")],
        );
    }
}

/// From a disk with a root file system as small as can be, whose init says what it sees, writes, and resets: without ACPI
/// there is no other end. All drivers are built in, so that there is no initrd.
#[track_caller]
fn boot_from_disk(cpus: &str, append: &str) -> Ended {
    const INIT: &str = "#!/bin/busybox sh
        busybox mount -t proc proc /proc
        busybox mount -t sysfs sys /sys
        busybox mount -o remount,rw /
        busybox grep ' / ' /proc/mounts
        busybox grep virtio /proc/interrupts
        echo cpus $(busybox nproc) acpi $(busybox ls /sys/firmware | busybox grep -c acpi)
        echo written by process $$ >/note
        busybox mount -o remount,ro /
        busybox stty sane
        busybox reboot -f\n";
    let busybox = guest("fetch", &["--offline", "busybox"]).join("busybox");
    let tree = tempfile::tempdir().unwrap();
    let disk = NamedTempFile::new().unwrap();
    disk.as_file().set_len(16 << 20).unwrap();
    let script = "cd $0; mkdir bin dev proc sys sbin; cp $1 bin/busybox
        printf %s \"$2\" >sbin/init; chmod 755 sbin/init; mkfs.ext4 -q -d . $3";
    let status = Command::new("sh")
        .args(["-ec", script])
        .args([tree.path(), &busybox, Path::new(INIT), disk.path()])
        .status();
    assert!(status.unwrap().success());

    let mut command = minivmm(&["--kernel", &bzimage(), "--cpus", cpus]);
    command.args(["--disk", &format!("path={}", disk.path().display())]);
    command.args(["--append", &format!("root=/dev/vda {append}")]);
    let ended = run(&mut command);
    ended.assert_code(0);
    ended.assert_printed(&[" / ext4 rw", "IO-APIC"]);
    let script = "e2fsck -fn $0; debugfs -R 'cat /note' $0 | grep 'written by process 1'";
    let checked = Command::new("sh")
        .args(["-ec", script])
        .arg(disk.path())
        .output();
    let checked = checked.unwrap();
    assert!(checked.status.success(), "{checked:?} {}", ended.out());
    ended
}

#[test]
fn root_disk_is_found_by_acpi() {
    boot_from_disk("2", "").assert_printed(&["cpus 2 acpi 1\r\n"]);
}

#[test]
fn root_disk_is_found_without_acpi() {
    // By virtio_mmio.device=, which minivmm adds, and the MP table.
    boot_from_disk("3", "acpi=off").assert_printed(&["cpus 3 acpi 0\r\n"]);
}

#[test]
fn all_virtio_devices_are_driven() {
    let disk = NamedTempFile::new().unwrap();
    disk.as_file().set_len(3 << 20).unwrap();
    let disk = format!("path={}", disk.path().display());
    for append in ["", "acpi=off "] {
        let mut command = minivmm(&["--kernel", &bzimage(), "--initrd", &initramfs(), "--rng"]);
        command.args(["--console", "virtio", "--disk", &disk]);
        let script = "tty; cat /sys/class/misc/hw_random/rng_current; cat /sys/block/vda/size";
        command.args(["--append", &format!("{append}-- sh -c \"{script}\"")]);
        let ended = run(&mut command);
        ended.assert_code(0);
        ended.assert_printed(&["/dev/hvc0\r\nvirtio_rng.0\r\n6144\r\n"]);
    }
}

#[test]
fn an_overlay_networks_and_namespaces() {
    let overlay = "mkdir /m; mount -t tmpfs t /m; cd /m; mkdir lower upper work merged; echo old >lower/file
        mount -t overlay o -o lowerdir=lower,upperdir=upper,workdir=work merged; echo new >>merged/file
        echo $(cat lower/file) and $(cat upper/file)";
    let network = "ip link set lo up; ip link add left type veth peer name right; ip link add bridge type bridge
        ip link set left master bridge; ping -c 1 127.0.0.1; ping -c 1 ::1
        unshare -n -m -u -i -U -r -p -f --mount-proc cat /proc/self/stat
        mount -t cgroup2 c /sys/fs/cgroup; cat /sys/fs/cgroup/cgroup.controllers";
    let wanted = [
        "old and old new\r\n",
        "1 packets transmitted, 1 packets received, 0% packet loss",
        "\n1 (cat)",
        "cpuset cpu io memory pids",
    ];
    let script = format!("set -e; {overlay}; {network}").replace('\n', ";");
    let ended = expect(&bzimage(), &[], &script, &wanted);
    assert_eq!(ended.out().matches(" 0% packet loss").count(), 2);
}

#[test]
fn it_powers_off_and_its_ports_are_there_for_a_shell() {
    let mut command = minivmm(&["--kernel", &bzimage(), "--initrd", &initramfs()]);
    run_with_input(&mut command, b"poweroff\n").assert_code(0);
    let script = "echo -n a | dd of=/dev/port bs=1 seek=244 conv=notrunc";
    boot(&bzimage(), &[], script).assert_code(i32::from(b'a'));
}

#[test]
fn panic_is_reported_by_pvpanic() {
    // Which it has built in: without panic= there is no reset.
    let mut command = minivmm(&["--kernel", &bzimage()]);
    run(command.args(["--cmdline", "console=ttyS0"])).assert_code(134);
}

#[test]
fn a_restored_guest_goes_on() {
    expect_restored(&bzimage(), 2);
}

#[test]
fn a_container_image_runs_on_it() {
    let image = Image::new();
    // The kernel that is found without being named.
    let mut command = minivmm(&["run"]);
    command
        .arg(image.path())
        .args(["sh", "-c", "uname -r; exit 7"]);
    command.env("XDG_CACHE_HOME", image.store());
    let kernels = Path::new(&bzimage())
        .parent()
        .unwrap()
        .parent()
        .unwrap()
        .to_owned();
    std::fs::create_dir(image.store().join("minivmm")).unwrap();
    std::os::unix::fs::symlink(kernels, image.store().join("minivmm/kernels")).unwrap();
    let ended = run(&mut command);
    ended.assert_code(7);
    ended.assert_printed(&["-minivmm\n"]);
    let ended = image.sh(
        &bzimage(),
        &["--cpus", "2"],
        "busybox nproc; cat /proc/filesystems",
    );
    ended
        .assert_code(0)
        .assert_printed(&["2\n", "erofs\n", "overlay\n"]);
}

#[test]
fn debian_with_systemd_runs_on_it() {
    let disk = format!("path={},ephemeral", debian_disk().display());
    let debian = Debian::boot_kernel(&bzimage(), &[], &disk);
    debian.log_in();
    debian.run("systemctl is-system-running --wait", "running\r\n");
    debian.run("uname -r", "-minivmm\r\n");
    debian.power_off();
}
