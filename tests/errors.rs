//! The mistakes that people make most: each gets one clear message with a hint, and its status.

mod common;

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};

use common::skip::skip;
use common::{Ended, boot_tiny, minivmm, run, tiny};

/// The least that is a bzImage: a setup header of protocol 2.15, and code that halts.
fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 3 * 512];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[2]); // setup_sects
    put(0x1f4, &(0x1000u32 / 16).to_le_bytes()); // syssize
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(0x202, b"HdrS\x0f\x02");
    put(0x211, &[1]); // loadflags: LOADED_HIGH
    put(0x22c, &0x7fff_ffffu32.to_le_bytes()); // initrd_addr_max
    put(0x230, &0x20_0000u32.to_le_bytes()); // kernel_alignment
    put(0x236, &[1]); // xloadflags: XLF_KERNEL_64
    put(0x238, &2047u32.to_le_bytes()); // cmdline_size
    put(0x258, &0x100_0000u64.to_le_bytes()); // pref_address
    put(0x260, &0x200_0000u32.to_le_bytes()); // init_size
    image.resize(3 * 512 + 0x1000, 0xf4);
    image
}

/// hello with one of its bytes changed.
fn elf_with(at: usize, value: u8) -> Vec<u8> {
    let mut elf = fs::read(tiny("hello")).unwrap();
    elf[at] = value;
    elf
}

/// minivmm given these bytes as the file named `name`, as its kernel, with `args`.
fn kernel(name: &str, bytes: &[u8], args: &[&str]) -> Ended {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    fs::write(&path, bytes).unwrap();
    let mut command = minivmm(&["--kernel", path.to_str().unwrap()]);
    run(command.args(args))
}

/// Status 125, and one line with all of these in it.
#[track_caller]
fn says(ended: &Ended, fragments: &[&str]) {
    ended.assert_code(125);
    assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
    for fragment in fragments {
        assert!(
            ended.stderr.contains(fragment),
            "no {fragment:?} in {}",
            ended.stderr
        );
    }
    let causes = ended.stderr.matches("os error").count();
    assert!(causes <= 1, "a cause is repeated: {}", ended.stderr);
}

/// Status 125 and one line with all of these in it, with a file system of one's own at /dev, in which `make_kvm` prepares
/// /dev/kvm.
#[track_caller]
fn says_with_dev(make_kvm: &str, fragments: &[&str]) {
    let script = format!("mount -t tmpfs none /dev || exit 77; {make_kvm} exec \"$@\"");
    let mut command = Command::new("unshare");
    command
        .args(["--map-root-user", "--mount", "sh", "-c", &script, "sh"])
        .arg(env!("CARGO_BIN_EXE_minivmm"))
        // Before any other file is looked at.
        .args(["--kernel", "/no/where"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let ended = run(&mut command);
    if matches!(ended.code(), 1 | 77 | 127) {
        skip(&format!("no mount namespace here: {}", ended.stderr));
    } else {
        says(&ended, fragments);
    }
}

#[test]
fn no_dev_kvm() {
    says_with_dev("", &["/dev/kvm", "not there", "modprobe kvm_intel"]);
}

#[test]
fn dev_kvm_is_not_kvm() {
    let wanted = ["/dev/kvm", "mknod /dev/kvm c 10 232"];
    says_with_dev("touch /dev/kvm;", &wanted);
}

#[test]
fn no_permission() {
    // Even root has none without capabilities.
    let denied = "touch /dev/kvm; chmod 0 /dev/kvm; set -- setpriv --bounding-set=-all \"$@\";";
    says_with_dev(denied, &["/dev/kvm", "permission denied", "group"]);
}

#[test]
fn not_a_kernel() {
    let ended = kernel("notes.txt", b"dear diary", &[]);
    says(&ended, &["notes.txt", "not a kernel", "bzImage (vmlinuz)"]);
}

#[test]
fn a_kernel_for_another_machine() {
    // e_machine.
    says(&kernel("k", &elf_with(18, 183), &[]), &["ARM64", "amd64"]);
    says(
        &kernel("k", &elf_with(18, 40), &[]),
        &["ARM (32-bit)", "amd64"],
    );
    let mut arm_image = vec![0; 4096];
    arm_image[0x38..0x3c].copy_from_slice(b"ARM\x64");
    says(&kernel("Image", &arm_image, &[]), &["ARM64", "amd64"]);
    let mut old = bzimage();
    old[0x236] = 0;
    says(
        &kernel("vmlinuz", &old, &[]),
        &["32-bit", "give a 64-bit one"],
    );
}

#[test]
fn a_truncated_kernel() {
    let image = bzimage();
    // The header counts units of 16 bytes: up to 15 may be missing.
    for cut in [0x210, 600, image.len() - 16] {
        let ended = kernel("vmlinuz", &image[..cut], &[]);
        says(&ended, &["truncated", &format!("{cut} bytes"), "again"]);
    }
    let elf = fs::read(tiny("hello")).unwrap();
    says(&kernel("vmlinux", &elf[..70], &[]), &["truncated", "again"]);
    says(&kernel("vmlinux", b"", &[]), &["empty"]);
}

#[test]
fn no_such_file() {
    let ended = run(&mut minivmm(&["--kernel", "/no/where"]));
    says(&ended, &["no kernel at /no/where"]);
    let ended = run(&mut boot_tiny("hello", "", &["--initrd", "/no/where"]));
    says(&ended, &["no initrd at /no/where"]);
}

#[test]
fn an_initrd_too_big() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(20 << 20).unwrap();
    let initrd = file.path().to_str().unwrap();
    let ended = run(&mut boot_tiny("hello", "", &["--initrd", initrd]));
    says(&ended, &["initrd", "20971520 bytes", "--memory "]);
    // No memory would do.
    file.as_file().set_len(1 << 40).unwrap();
    let ended = run(&mut boot_tiny("hello", "", &["--initrd", initrd]));
    says(&ended, &["make the initrd smaller"]);
}

#[test]
fn too_little_memory() {
    let ended = kernel("vmlinuz", &bzimage(), &["--memory", "32M"]);
    says(&ended, &["memory too small", "48 MiB", "--memory 48M"]);
}

#[test]
fn a_directory_for_a_file() {
    says(
        &run(&mut minivmm(&["--kernel", "/"])),
        &["directory", "kernel file itself"],
    );
    let ended = run(&mut boot_tiny("hello", "", &["--initrd", "/"]));
    says(&ended, &["directory", "initrd file itself"]);
    says(&run(&mut minivmm(&["--config", "/"])), &["directory"]);
}

#[test]
fn a_fifo_a_socket_or_a_device_for_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let made = Command::new("mkfifo").arg(at("fifo")).status().unwrap();
    assert!(made.success());
    let _socket = UnixListener::bind(at("socket")).unwrap();
    let (fifo, socket) = (at("fifo"), at("socket"));
    for file in [&fifo, &socket, "/dev/zero"] {
        says(
            &run(&mut minivmm(&["--kernel", file])),
            &[file, "kernel file itself"],
        );
        let ended = run(&mut boot_tiny("hello", "", &["--initrd", file]));
        says(&ended, &[file, "initrd file itself"]);
        for options in ["", ",ro", ",ephemeral"] {
            let disk = format!("path={file}{options}");
            says(
                &run(&mut boot_tiny("hello", "", &["--disk", &disk])),
                &[file],
            );
        }
    }
    for (file, why) in [
        (&fifo, "nobody reads this FIFO"),
        (&socket, "it is a socket"),
    ] {
        for args in [["--serial", &format!("file={file}")], ["--timeline", file]] {
            says(&run(&mut boot_tiny("hello", "", &args)), &[file, why]);
        }
    }
    for (file, why) in [
        (socket.as_str(), "No such device"),
        ("/dev/zero", "larger than 1 MiB"),
    ] {
        says(&run(&mut minivmm(&["--config", file])), &[file, why]);
    }
}

#[test]
fn a_compressed_vmlinux() {
    let ended = kernel("vmlinux.gz", b"\x1f\x8b\x08\0\0\0\0\0", &[]);
    says(&ended, &["compressed with gzip", "gzip -dc", "> vmlinux"]);
}

#[test]
fn a_kvm_without_hardware_runs_no_stock_kernel() {
    let ended = kernel("vmlinuz", &bzimage(), &["--deadline", "1s"]);
    let has = |module| Path::new("/sys/module").join(module).exists();
    if has("kvm_intel") || has("kvm_amd") {
        // It runs, and halts at once.
        ended.assert_code(124);
    } else {
        says(&ended, &["PVM", "tests/lab/run", "minivmm doctor"]);
    }
}

#[test]
fn a_wrong_command_line() {
    for (args, fragment) in [
        (&["--kernel", "k", "--cpus", "65"][..], "1..=64"),
        (&["--kernel", "k", "--memory", "512"], "512M"),
        (&["--kernel", "k", "--memory", "4M"], "16M to 4T"),
        (&["--kernel", "k", "--memory", "5T"], "16M to 4T"),
        (&["--kernel", "k", "--memory", "lots"], "512M or 2G"),
        (&["--kernel", "k", "--deadline", "10"], "10s"),
        (&["--kernel", "k", "--serial", "tty"], "file=PATH"),
        (&["--kernel", "k", "--colour", "red"], "--help"),
        (&[], "--kernel FILE"),
    ] {
        let ended = run(&mut minivmm(args));
        ended.assert_code(2);
        assert!(
            ended.stderr.contains(fragment),
            "{args:?}: {}",
            ended.stderr
        );
    }
}

#[test]
fn invalid_disk_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let place = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    fs::write(place("short"), "short").unwrap();
    fs::write(place("odd"), [0; 10240]).unwrap();
    for (disk, status, wanted) in [
        (
            format!("path={}", place("missing")),
            125,
            "missing cannot be opened for writing: No such file",
        ),
        (format!("path={}", place("short")), 125, "5 bytes"),
        (
            format!("path={},ro", place("")),
            125,
            "neither a regular file",
        ),
        ("path=/dev/null".into(), 125, "neither a regular file"),
        ("x.img".into(), 2, "path=FILE[,ro][,ephemeral][,format=raw]"),
        ("path=x,queues=99".into(), 2, "1 to 8 queues"),
        ("path=x,format=qcow2".into(), 2, "qemu-img convert -O raw"),
        ("path=x,sector=1024".into(), 2, "512 or 4096"),
        (
            format!("path={},sector=4096", place("odd")),
            125,
            "10240 bytes",
        ),
        ("path=x,ro,ephemeral".into(), 2, "ephemeral and ro"),
        ("path=x,id=123456789012345678901".into(), 2, "1 to 20"),
    ] {
        let ended = run(&mut boot_tiny("hello", "", &["--disk", &disk]));
        ended.assert_code(status);
        assert!(ended.stderr.contains(wanted), "{disk}: {}", ended.stderr);
    }
}

#[test]
fn an_image_that_is_not_raw_is_refused_whatever_a_guest_may_do_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("root.qcow2");
    let image = [b"QFI\xfb\0\0\0\x03", &[0; 65528][..]].concat();
    fs::write(&path, &image).unwrap();
    let path = path.to_str().unwrap();
    let boot = |options: &str| {
        let disk = format!("path={path}{options}");
        run(&mut boot_tiny("hello", "", &["--disk", &disk]))
    };
    let convert = format!("qemu-img convert -f qcow2 -O raw {path} {path}.raw");
    for options in ["", ",ro", ",ephemeral"] {
        says(&boot(options), &["a qcow2 image", &convert, "format=raw"]);
        boot(&format!("{options},format=raw")).assert_code(0);
    }
    let config = dir.path().join("vm.json");
    let boot = |fields: &str| {
        let disks = format!(r#"{{"disks": [{{"path": "{path}"{fields}}}]}}"#);
        fs::write(&config, disks).unwrap();
        let config = config.to_str().unwrap();
        run(&mut boot_tiny("hello", "", &["--config", config]))
    };
    says(&boot(""), &["a qcow2 image"]);
    says(&boot(r#", "format": "qcow2""#), &["qcow2", "raw"]);
    boot(r#", "format": "raw""#).assert_code(0);
    assert!(fs::read(path).unwrap() == image);
}
