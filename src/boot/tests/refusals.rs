//! Files that cannot be booted, and the message for each.

use super::*;

#[test]
fn files_that_are_no_files() {
    let mem = mem(32);
    let dir = TempDir::new().unwrap();
    let try_path = |path: PathBuf| load(&mem, &source(&path)).unwrap_err().to_string();
    contains(
        &try_path(dir.path().join("absent")),
        &["there is no kernel at", "absent"],
    );
    contains(&try_path(dir.path().to_owned()), &["is a directory"]);
    contains(&try_path("/dev/zero".into()), &["/dev/zero is a device"]);
    let empty = NamedTempFile::new().unwrap();
    contains(&try_path(empty.path().to_owned()), &["is empty"]);
    let fifo = dir.path().join("fifo");
    assert!(
        std::process::Command::new("mkfifo")
            .arg(&fifo)
            .status()
            .unwrap()
            .success()
    );
    contains(&try_path(fifo), &["is a pipe"]);
    std::os::unix::net::UnixListener::bind(dir.path().join("socket")).unwrap();
    contains(&try_path(dir.path().join("socket")), &["is a socket"]);

    let kernel = file(&bzimage());
    for (initrd, expected) in [
        ("/nowhere/initrd", "there is no initrd at /nowhere/initrd"),
        ("/tmp", "a directory"),
    ] {
        let source = BootSource {
            initrd: Some(Path::new(initrd)),
            ..source(kernel.path())
        };
        contains(&load(&mem, &source).unwrap_err().to_string(), &[expected]);
    }
}

#[test]
fn files_that_are_no_kernels() {
    contains(
        &error(b"just a text file"),
        &[
            "is not a kernel: its 16 bytes begin with 6a 75 73 74",
            "just a t",
        ],
    );
    contains(&error(b"\x00"), &["begin with 00;"]);
    contains(
        &error(b"070701000000"),
        &["a cpio archive", "as the initrd"],
    );
    contains(
        &error(b"\x28\xb5\x2f\xfd...."),
        &["compressed with zstd", "zstd -dc /"],
    );
    contains(
        &error(b"\x1f\x8b\x08"),
        &["compressed with gzip", "gzip -dc /"],
    );
    contains(&error(b"\xfd7zXZ\0"), &["xz -dc /"]);
    contains(&error(b"#!/bin/sh"), &["a script"]);
    contains(
        &error(b"MZ a unified kernel image"),
        &["an EFI application", "-j .linux"],
    );
    let mut arm = vec![0; 0x40];
    put(&mut arm, 0x38, b"ARM\x64");
    contains(&error(&arm), &["ARM64", "x86_64"]);

    let mut multiboot = elf64(&[]);
    put(&mut multiboot, 0x304, &0x1bad_b002u32.to_le_bytes());
    contains(&error(&multiboot), &["a multiboot kernel", "PVH"]);
    put(&mut multiboot, 0x340, b"This is GNU Mach 1.8");
    contains(&error(&multiboot), &["is GNU Mach;"]);
    put(&mut multiboot, 0x340, b"Xen version %d.%d");
    contains(&error(&multiboot), &["is the Xen hypervisor;"]);
    // With the PVH entry it can be started.
    let mut pvh = elf64(&notes(&(LOAD as u32).to_le_bytes()));
    put(&mut pvh, 0x304, &0x1bad_b002u32.to_le_bytes());
    load_bytes(&pvh, &mem(64)).unwrap();
    contains(
        &error(b"\x48\x89\xe7 U-Boot 2023.01"),
        &["is the boot loader U-Boot;"],
    );
    let mut dynamic = elf64(&[0; 4]);
    put(&mut dynamic, 64 + 2 * 56, &[2]);
    load_bytes(&dynamic, &mem(64)).unwrap();
    put(&mut dynamic, 0x340, b"U-Boot 2023.01");
    contains(&error(&dynamic), &["is the boot loader U-Boot;"]);
    let mut high = elf32(&[0; 16]);
    put(&mut high, 52 + 12, &0xfff0_0000u32.to_le_bytes());
    put(&mut high, 0x200, b"U-Boot 2023.01");
    contains(&error(&high), &["is the boot loader U-Boot;"]);

    let mut elf = elf64(&[]);
    put(&mut elf, 18, &183u16.to_le_bytes());
    contains(&error(&elf), &["an ELF file for ARM64"]);
    put(&mut elf, 18, &62u16.to_le_bytes());
    put(&mut elf, 16, &3u16.to_le_bytes());
    contains(&error(&elf), &["position-independent"]);

    let kernel = file(&bzimage());
    for (bytes, expected) in [(bzimage(), "as the kernel"), (elf64(&[]), "an ELF file")] {
        let initrd = file(&bytes);
        let source = BootSource {
            initrd: Some(initrd.path()),
            ..source(kernel.path())
        };
        contains(
            &load(&mem(64), &source).unwrap_err().to_string(),
            &["the initrd", expected],
        );
    }
}

#[test]
fn a_file_may_end_within_the_last_unit_of_its_size() {
    let mut image = bzimage();
    image.truncate(image.len() - 15);
    let loaded = load_bytes(&image, &mem(64)).unwrap();
    assert_eq!(loaded.kernel_bytes, 4096 - 15);
    image.truncate(image.len() - 1);
    contains(&error(&image), &["truncated"]);
}

#[test]
fn bad_bzimages() {
    contains(
        &error(&bzimage()[..5000]),
        &["truncated", "ends at byte 5632", "has 5000 bytes"],
    );
    contains(
        &error(&bzimage()[..0x210]),
        &["truncated", "setup header", "528 bytes"],
    );
    contains(
        &error_with(|image| put(image, 0x236, &[0])),
        &["32-bit kernel", "CONFIG_64BIT"],
    );
    contains(
        &error_with(|image| put(image, 0x206, &[0x04, 0x02])),
        &["boot protocol 2.04", "3.8"],
    );
    contains(&error_with(|image| put(image, 0x1fe, &[0])), &["boot flag"]);
    contains(
        &error_with(|image| put(image, 0x201, &[0])),
        &["setup header ends at 0x202"],
    );
    contains(
        &error_with(|image| put(image, 0x1f4, &[0; 4])),
        &["has 0 bytes (syssize)"],
    );
    contains(
        &error_with(|image| put(image, 0x1f4, &[0xff; 4])),
        &["truncated", "68719478"],
    );
    contains(
        &error_with(|image| put(image, 0x24c, &[0xff; 4])),
        &["payload", "ends after"],
    );
    contains(
        &error_with(|image| put(image, 0x258, &[0xff; 8])),
        &["pref"],
    );
    contains(
        &error_with(|image| put(image, 0x258, &0x7000u64.to_le_bytes())),
        &["below 1 MiB"],
    );
    contains(
        &error_with(|image| put(image, 0x260, &[0xff; 4])),
        &["init_size", "3072 MiB"],
    );

    let message = load_bytes(&bzimage(), &mem(18)).unwrap_err().to_string();
    contains(
        &message,
        &["memory too small", "at least 20 MiB", "the VM has 18 MiB"],
    );
    load_bytes(&bzimage(), &mem(20)).unwrap();

    let kernel = file(&bzimage());
    let source = BootSource {
        protocol: BootProtocol::Pvh,
        ..source(kernel.path())
    };
    contains(
        &load(&mem(64), &source).unwrap_err().to_string(),
        &["pvh", "no PVH entry", "linux64"],
    );
}

#[test]
fn bad_elf_kernels() {
    let with = |at: usize, value: &[u8]| {
        let mut image = elf64(&notes(&(LOAD as u32).to_le_bytes()));
        put(&mut image, at, value);
        error(&image)
    };
    let (first, note) = (64, 64 + 2 * 56);
    contains(&with(56, &[0, 0]), &["0 program headers"]);
    contains(&with(56, &[0xff, 0xff]), &["65535 program headers"]);
    contains(
        &with(32, &[0xff; 8]),
        &["truncated", "program header table"],
    );
    contains(
        &with(first + 24, &0x7000u64.to_le_bytes()),
        &["0x7000, below 1 MiB"],
    );
    contains(
        &with(first + 24, &(LOAD + 0x800).to_le_bytes()),
        &["overlap"],
    );
    contains(&with(first + 24, &u64::MAX.to_le_bytes()), &["MMIO gap"]);
    contains(
        &with(first + 40, &0x10u64.to_le_bytes()),
        &["0x100 bytes in the file and 0x10 in memory"],
    );
    contains(
        &with(first + 8, &u64::MAX.to_le_bytes()),
        &["truncated", "segment for 0x1000000"],
    );
    contains(
        &with(note + 32, &u64::MAX.to_le_bytes()),
        &["bytes of notes"],
    );
    contains(
        &with(note + 8, &0x500u64.to_le_bytes()),
        &["truncated", "note segment"],
    );
    contains(
        &error(&elf64(&notes(&0x900_0000u32.to_le_bytes()))),
        &["PVH entry 0x9000000 lies in none"],
    );
    contains(&error(&elf64(&notes(b"abc"))), &["PVH note has 3 bytes"]);
    contains(
        &error(&elf64(&notes(&u64::MAX.to_le_bytes()))),
        &["no 32-bit address"],
    );
    contains(
        &error(&elf32(&[0; 16])),
        &["32-bit kernel", "without a PVH note"],
    );
    contains(&error(&elf64(&[])[..0x320]), &["truncated"]);
    contains(&error(&elf64(&[])[..40]), &["truncated", "ELF header"]);
    let mut image = elf64(&[]);
    put(&mut image, 24, &0u64.to_le_bytes());
    contains(&error(&image), &["entry 0x0 lies in none"]);
    let message = load_bytes(&elf64(&[]), &mem(16)).unwrap_err().to_string();
    contains(&message, &["at least 17 MiB, the VM has 16 MiB"]);
}
