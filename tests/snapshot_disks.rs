//! Snapshots of VMs with disks: what was written is there again, and a file that is another one is not taken for the disk.

mod common;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use common::{Ended, boot_tiny, minivmm, run, run_with_input};
use minivmm::vmm::snapshot::load::Snapshot;

const LEN: usize = 1 << 20;
/// What the guest `disk` writes to its first [`WRITTEN`] bytes.
const FILL: u8 = 0x5a;
const WRITTEN: usize = 64 << 10;

struct Dir(tempfile::TempDir);

impl Dir {
    /// With a disk in it.
    fn new() -> Self {
        let dir = Self(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap());
        fs::write(dir.image(), [7; LEN]).unwrap();
        dir
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn image(&self) -> PathBuf {
        self.path("image")
    }

    /// Has a guest write to the disk, and saves it at mark 7.
    fn save(&self, guest: &str, cmdline: &str, options: &str) -> PathBuf {
        let path = self.path("snapshot");
        let at = format!("7={},exit", path.display());
        let disk = format!("path={}{options}", self.image().display());
        let args = ["--snapshot-at", &at, "--disk", &disk];
        run(&mut boot_tiny(guest, cmdline, &args)).assert_code(0);
        path
    }
}

fn go_on(how: &str, path: &Path, args: &[&str]) -> Ended {
    run(minivmm(&[how]).arg(path).args(args))
}

fn restore(path: &Path, args: &[&str]) -> Ended {
    go_on("restore", path, &[&["--deadline", "200s"], args].concat())
}

#[track_caller]
fn assert_refused(ended: &Ended, parts: &[&str]) {
    ended.assert_code(125);
    for part in parts {
        ended.assert_said(part);
    }
}

#[test]
fn an_ephemeral_disk_holds_in_every_vm_what_was_written() {
    let dir = Dir::new();
    let path = dir.save("disk", "", ",ephemeral,id=scratch");
    Snapshot::open(&path).unwrap().verify().unwrap();
    for _ in 0..2 {
        let ended = restore(&path, &[]);
        ended.assert_code(0);
        assert_eq!(ended.stderr, "");
    }
    go_on("fork", &path, &["-n", "6", "-j", "3"]).assert_code(0);
    // The snapshot of a restored VM has what its disk's file and the first snapshot hold.
    let second = dir.path("second");
    let at = format!("8={},exit", second.display());
    restore(&path, &["--snapshot-at", &at]).assert_code(0);
    fs::remove_file(&path).unwrap();
    restore(&second, &[]).assert_code(0);
    assert!(fs::read(dir.image()).unwrap() == [7; LEN]);
    let info = go_on("snapshot", Path::new("info"), &[second.to_str().unwrap()]);
    info.assert_printed(&["scratch: ", dir.image().to_str().unwrap()]);
    // What was written is checked as memory is.
    let file = File::options().write(true).open(&second).unwrap();
    let end = file.metadata().unwrap().len();
    file.write_all_at(&[1], end - 1).unwrap();
    assert_refused(
        &go_on("snapshot", Path::new("verify"), &[second.to_str().unwrap()]),
        &["the checksum of a disk's writes is wrong"],
    );
}

#[test]
fn a_disk_that_its_vm_writes_is_opened_again() {
    for engine in [",engine=sync", ",engine=io_uring"] {
        let dir = Dir::new();
        let path = dir.save("disk", "", engine);
        let image = fs::read(dir.image()).unwrap();
        assert!(image[..WRITTEN].iter().all(|byte| *byte == FILL));
        assert!(image[WRITTEN..].iter().all(|byte| *byte == 7));
        for _ in 0..2 {
            restore(&path, &[]).assert_code(0);
        }
        // Others of its VMs would write to it at the same time.
        for args in [&[][..], &["--disk", "id=0,path=/dev/null"]] {
            let ended = go_on("fork", &path, &[&["-n", "1"], args].concat());
            let image = dir.image();
            assert_refused(&ended, &["side by side", image.to_str().unwrap()]);
        }
    }
}

#[test]
fn a_queue_goes_on_where_it_was() {
    for options in [
        ",engine=sync",
        ",engine=io_uring",
        ",ro,engine=io_uring",
        ",ephemeral",
    ] {
        let dir = Dir::new();
        let path = dir.save("reads", "500", options);
        for _ in 0..2 {
            restore(&path, &[]).assert_code(0);
        }
        if options != ",engine=sync" && options != ",engine=io_uring" {
            go_on("fork", &path, &["-n", "4", "-j", "4"]).assert_code(0);
        }
    }
}

#[test]
fn what_a_disk_has_not_begun_is_done_by_the_restored_vm() {
    for engine in ["sync", "io_uring"] {
        let dir = Dir::new();
        let image = File::options().write(true).open(dir.image()).unwrap();
        image.set_len((1 << 30) + LEN as u64).unwrap();
        let path = dir.path("snapshot");
        let at = format!("7={},exit", path.display());
        let disk = format!("path={},engine={engine}", dir.image().display());
        let args = ["--snapshot-at", &at, "--disk", &disk];
        // 256 small writes, and the mark at once.
        let ended = run_with_input(&mut boot_tiny("hog", "mws", &args), b"x");
        ended.assert_code(0);
        // Else the disk would have been written to since. This guest halts.
        let ended = run(minivmm(&["restore", "--deadline", "1s"]).arg(&path));
        ended.assert_code(124);
    }
}

#[test]
fn a_disk_that_has_changed_is_not_taken_unless_it_is_named() {
    for options in ["", ",ephemeral"] {
        let dir = Dir::new();
        let path = dir.save("disk", "", options);
        let image = dir.image();
        let replace = |id: &str, file: &Path| {
            let disk = format!("id={id},path={}", file.display());
            restore(&path, &["--disk", &disk])
        };
        let named = [image.to_str().unwrap(), "--disk id=0,path=FILE"];
        let refused = |why| assert_refused(&restore(&path, &[]), &[named[0], named[1], why]);

        let file = File::options().write(true).open(&image).unwrap();
        file.set_modified(UNIX_EPOCH).unwrap();
        refused("written to since");
        replace("0", &image).assert_code(0);
        let copy = dir.path("copy");
        fs::copy(&image, &copy).unwrap();
        fs::rename(&image, dir.path("moved")).unwrap();
        refused("No such file");
        fs::rename(&copy, &image).unwrap();
        refused("another file");
        replace("0", &dir.path("moved")).assert_code(0);

        file.set_len(LEN as u64 + 512).unwrap();
        let ended = replace("0", &dir.path("moved"));
        assert_refused(&ended, &["it had 1048576 bytes and has 1049088"]);
        let ended = replace("data", &image);
        assert_refused(&ended, &["has no disk data; it has 0"]);
        fs::write(dir.path("empty"), "").unwrap();
        assert_refused(&replace("0", &dir.path("empty")), &["less than one sector"]);
        let ended = restore(&path, &["--disk", "id=0,ro,path=x"]);
        assert!(ended.stderr.contains("write id=ID,path=FILE"));
    }
}

#[test]
fn files_named_by_a_snapshot_that_others_can_write_are_not_opened() {
    let dir = Dir::new();
    let path = dir.save("disk", "", ",id=data");
    let image = dir.image();
    for mode in [0o620, 0o602] {
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        let why = ["others can write to it", "--disk id=data,path=FILE"];
        assert_refused(&restore(&path, &[]), &why);
        let disk = format!("id=data,path={}", image.display());
        restore(&path, &["--disk", &disk]).assert_code(0);
    }
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    restore(&path, &[]).assert_code(0);
}
