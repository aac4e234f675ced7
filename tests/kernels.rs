//! Ring 3: every kernel that Debian offers, each way in, and the command lines that they are given.
//!
//! Where and how it runs, see tests/linux.rs.

mod common;

use std::fs;
use std::path::Path;

use common::linux::{boot, expect, guest, has_kernel, initramfs, kernel};
use common::{minivmm, run};

/// As guest-kernels/fetch calls them, with how many CPUs each is booted.
const OFFERED: [(&str, &str); 6] = [
    ("cloud", "1"),
    ("generic", "2"),
    ("rt", "2"),
    ("6.12", "4"),
    ("6.12-generic", "1"),
    ("6.12-rt", "2"),
];

/// An older and a newer one, from suites that this machine's mirror may not have.
const OTHERS: [(&str, &str); 2] = [
    ("5.10@bullseye-security", "2"),
    ("cloud@trixie-backports", "2"),
];

/// Boots it. It is the one that the package has, and its log has no complaint.
#[track_caller]
fn boots(dir: &Path, cpus: &str) {
    let package = fs::read_to_string(dir.join("package")).unwrap();
    let version = package.trim().trim_start_matches("linux-image-");
    let bzimage = dir.join("bzImage");
    // Brackets, because the log has the command line as well.
    let script = "echo cpus $(nproc) release $(uname -r); dmesg | grep -w -e [F]atal -e [W]ARNING -e [B]UG -e [O]ops; true";
    let ended = boot(bzimage.to_str().unwrap(), &["--cpus", cpus], script);
    ended.assert_code(0);
    assert_eq!(
        ended.out(),
        format!("minivmm-demo: userspace\r\ncpus {cpus} release {version}\r\n")
    );
}

#[test]
fn each_kernel_of_this_release_boots_without_a_complaint() {
    for (flavor, cpus) in OFFERED {
        boots(&guest("fetch", &["--offline", flavor]), cpus);
    }
}

#[test]
fn kernels_of_other_releases_boot_without_a_complaint() {
    for (flavor, cpus) in OTHERS {
        if has_kernel(flavor) {
            boots(&guest("fetch", &["--offline", flavor]), cpus);
        }
    }
}

/// Linux tells who loaded it: 0xff is a loader without a number of its own, 0xb0 is PVH.
const BOOTLOADER: &str = "uname -r; echo loader $(cat /proc/sys/kernel/bootloader_type)";

#[test]
fn vmlinux_by_the_64_bit_entry() {
    let wanted = ["-cloud-amd64", "loader 255"];
    expect(
        &kernel("cloud", "vmlinux"),
        &["--boot-protocol", "linux64"],
        BOOTLOADER,
        &wanted,
    );
}

#[test]
fn vmlinux_by_pvh() {
    let wanted = ["-cloud-amd64", "loader 176"];
    expect(
        &kernel("cloud", "vmlinux"),
        &["--boot-protocol", "pvh"],
        BOOTLOADER,
        &wanted,
    );
}

#[test]
fn without_acpi_on_the_mp_table() {
    let script =
        "uname -r; nproc; grep -c ACPI /proc/interrupts; cat /proc/interrupts | grep ttyS0";
    let generic = kernel("generic", "bzImage");
    let mut command = minivmm(&[
        "--kernel",
        &generic,
        "--initrd",
        &initramfs(),
        "--cpus",
        "2",
    ]);
    let append = format!("acpi=off loglevel=4 -- sh -c \"{script}\"");
    command.args(["--append", &append]);
    let ended = run(&mut command);
    ended.assert_code(0);
    for wanted in ["-amd64", "\n2\r\n", "IO-APIC"] {
        assert!(
            ended.out().contains(wanted),
            "no {wanted:?} in {}",
            ended.out()
        );
    }
}

#[test]
fn default_boot_logs_nothing() {
    for flavor in ["cloud", "generic", "6.12"] {
        let mut command = minivmm(&["--kernel", &kernel(flavor, "bzImage")]);
        command.args(["--initrd", &initramfs()]);
        let ended = run(command.args(["--append", "-- true"]));
        ended.assert_code(0);
        assert_eq!(ended.out(), "minivmm-demo: userspace\r\n", "{flavor}");
        assert_eq!(ended.stderr, "", "{flavor}");
    }
}

#[test]
fn command_line_for_other_vmms_works() {
    let mut command = minivmm(&["--kernel", &kernel("cloud", "bzImage")]);
    command.args(["--initrd", &initramfs(), "--cmdline"]);
    command.arg(
        "console=ttyS0 reboot=k panic=1 pci=off noapic acpi=off nosmp nolapic no-kvmclock quiet -- cat /proc/cmdline",
    );
    let ended = run(&mut command);
    ended.assert_code(0);
    ended.assert_printed(&["\nconsole=ttyS0 reboot=k panic=1 pci=off maxcpus=1 quiet -- cat"]);
    for word in ["noapic", "acpi=off", "nosmp", "nolapic", "no-kvmclock"] {
        ended.assert_said(&format!("warning: {word} "));
    }
}
