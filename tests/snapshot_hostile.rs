//! Hostile and broken snapshot files: an error each, never a panic. Sections are rewritten with their right checksums.

mod common;

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use common::{boot_tiny, minivmm, run};
use minivmm::error_chain;
use minivmm::vmm::snapshot::load::Snapshot;

const HEADER: usize = 4096;

/// A snapshot of a tiny guest with one vCPU and 16 MiB: all that is before its RAM, and the file's length.
fn good() -> &'static (Vec<u8>, u64) {
    static GOOD: OnceLock<(Vec<u8>, u64)> = OnceLock::new();
    GOOD.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("good");
        let at = format!("7={},exit", path.display());
        run(&mut boot_tiny("marks", "", &["--snapshot-at", &at])).assert_code(0);
        let bytes = fs::read(&path).unwrap();
        let ram = entry(&bytes, count(&bytes) - 1);
        let offset = number(&bytes, ram.start + 8) as usize;
        (bytes[..offset].to_vec(), bytes.len() as u64)
    })
}

fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn count(bytes: &[u8]) -> usize {
    u32::from_le_bytes(bytes[16..20].try_into().unwrap()) as usize
}

/// Where entry `index` of the table is.
fn entry(_: &[u8], index: usize) -> Range<usize> {
    32 + index * 32..64 + index * 32
}

/// Makes the checksums of the header and all sections right.
fn sign(bytes: &mut [u8]) {
    for index in 0..count(bytes).min(127).saturating_sub(1) {
        let at = entry(bytes, index).start;
        let start = number(bytes, at + 8) as usize;
        let len = number(bytes, at + 16) as usize;
        if let Some(section) = start.checked_add(len).and_then(|end| bytes.get(start..end)) {
            let crc = crc32fast::hash(section);
            bytes[at + 24..at + 28].copy_from_slice(&crc.to_le_bytes());
        }
    }
    bytes[20..24].fill(0);
    let crc = crc32fast::hash(&bytes[..HEADER]);
    bytes[20..24].copy_from_slice(&crc.to_le_bytes());
}

/// Writes `front` as a file that is `len` bytes long.
fn write(dir: &Path, front: &[u8], len: u64) -> PathBuf {
    let path = dir.join("hostile");
    let file = File::create(&path).unwrap();
    file.write_all_at(front, 0).unwrap();
    file.set_len(len).unwrap();
    path
}

/// The error that opening a changed snapshot gives.
fn refused(change: impl FnOnce(&mut Vec<u8>), signed: bool) -> String {
    let dir = tempfile::tempdir().unwrap();
    let (mut front, len) = good().clone();
    change(&mut front);
    if signed {
        sign(&mut front);
    }
    match Snapshot::open(&write(dir.path(), &front, len)) {
        Ok(_) => "accepted".to_owned(),
        Err(e) => error_chain(&e),
    }
}

#[track_caller]
fn assert_refused(change: impl FnOnce(&mut Vec<u8>), signed: bool, why: &str) {
    let error = refused(change, signed);
    assert!(error.contains(why), "{why:?} is not in {error:?}");
}

fn put<B: AsRef<[u8]>>(at: usize, value: B) -> impl FnOnce(&mut Vec<u8>) + use<B> {
    let value = value.as_ref().to_vec();
    move |bytes| bytes[at..at + value.len()].copy_from_slice(&value)
}

/// The section with this number, with `change` in its text.
fn replace(kind: u32, from: &str, to: &str) -> impl FnOnce(&mut Vec<u8>) {
    move |bytes| {
        let range = section(bytes, kind);
        let text = String::from_utf8(bytes[range.clone()].to_vec()).unwrap();
        assert!(text.contains(from), "{text}");
        let changed = text.replacen(from, to, 1);
        let room = range.len();
        // JSON may have white space at its end, or lose what is not needed.
        let changed = format!("{changed:<room$}");
        assert_eq!(changed.len(), room, "{changed}");
        bytes[range].copy_from_slice(changed.as_bytes());
    }
}

fn section(bytes: &[u8], kind: u32) -> Range<usize> {
    let at = (0..count(bytes))
        .map(|index| entry(bytes, index).start)
        .find(|at| bytes[*at..*at + 4] == kind.to_le_bytes())
        .unwrap();
    let start = number(bytes, at + 8) as usize;
    start..start + number(bytes, at + 16) as usize
}

const META: u32 = 1;
const CLOCK: u32 = 2;
const VCPU: u32 = 3;
const DEVICES: u32 = 4;

#[test]
fn what_is_no_snapshot_is_told_so() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(refused(|_| {}, true), "accepted");
    assert_refused(put(0, b"X"), true, "not a snapshot");
    assert_refused(put(8, &[2, 0]), true, "format version 2.0");
    assert_refused(put(12, &[183, 0]), true, "another architecture");
    assert_refused(put(2000, b"X"), false, "checksum of its header");
    // A newer minor version only adds.
    assert_eq!(refused(put(10, &[9, 0]), true), "accepted");
    let error = Snapshot::open(dir.path()).err().unwrap();
    assert!(error_chain(&error).contains("no regular file"));
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (front, len) = good();
    let path = write(dir.path(), front, *len);
    let file = File::options().write(true).open(&path).unwrap();
    let end = section(front, VCPU).end.max(section(front, DEVICES).end) as u64;
    let cuts = [len - 1, len - 4096, front.len() as u64]
        .into_iter()
        .chain((0..end).rev().filter(|at| at % 61 == 0 || *at < 100));
    for cut in cuts {
        file.set_len(cut).unwrap();
        assert!(Snapshot::open(&path).is_err(), "{cut}");
    }
    file.set_len(len + 4096).unwrap();
    assert!(Snapshot::open(&path).is_err());
}

#[test]
fn impossible_tables_are_refused() {
    let (front, len) = good();
    let sections = count(front);
    let ram = entry(front, sections - 1).start;
    let second = entry(front, 1).start;
    for value in [0, 128, u32::MAX] {
        assert_refused(put(16, value.to_le_bytes()), true, "table of sections");
    }
    // In the header, over the one before, past the end, overflowing, at the end of the file.
    for offset in [0, 4097, u64::MAX, u64::MAX - 4096, *len] {
        let change = put(second + 8, offset.to_le_bytes());
        assert_refused(change, true, "table of sections");
    }
    for bytes in [u64::MAX, 1 << 40, *len] {
        let change = put(second + 16, bytes.to_le_bytes());
        assert_refused(change, true, "table of sections");
    }
    // RAM: misaligned, overflowing, longer and shorter than the file.
    for offset in [4096u64, 3 << 20, u64::MAX, 1 << 40] {
        let change = put(ram + 8, offset.to_le_bytes());
        assert_refused(change, true, "table of sections");
    }
    assert_refused(put(ram + 16, u64::MAX.to_le_bytes()), true, "table of");
    assert_refused(
        put(ram + 16, (32u64 << 20).to_le_bytes()),
        true,
        "cut short",
    );
    assert_refused(put(ram + 16, (8u64 << 20).to_le_bytes()), true, "table of");
}

#[test]
fn sections_that_nobody_knows_are_skipped_only_if_they_may_be() {
    let change = |optional: u8| {
        move |bytes: &mut Vec<u8>| {
            // One more between the last and the RAM.
            let sections = count(bytes);
            let ram = entry(bytes, sections - 1);
            let moved = bytes[ram.clone()].to_vec();
            bytes[ram.end..ram.end + 32].copy_from_slice(&moved);
            bytes[ram.start..ram.start + 4].copy_from_slice(&99u32.to_le_bytes());
            bytes[ram.start + 4] = optional;
            let offset = number(&moved, 8) - 16;
            bytes[ram.start + 8..][..8].copy_from_slice(&offset.to_le_bytes());
            bytes[ram.start + 16..][..8].copy_from_slice(&16u64.to_le_bytes());
            bytes[16] += 1;
        }
    };
    assert_eq!(refused(change(1), true), "accepted");
    assert_refused(change(0), true, "kind 99");
}

#[test]
fn damaged_sections_are_noticed_and_nonsense_is_refused() {
    let (front, _) = good();
    for kind in [META, CLOCK, VCPU, DEVICES] {
        let range = section(front, kind);
        assert_refused(put(range.start, b"\xff"), false, "the checksum of section");
        let zeros = |bytes: &mut Vec<u8>| bytes[range.clone()].fill(0);
        let error = refused(zeros, true);
        // The devices are looked at when there are some.
        assert_eq!(
            error == "accepted",
            [CLOCK, DEVICES].contains(&kind),
            "{error}"
        );
    }
}

#[test]
fn sections_that_contradict_each_other_are_refused() {
    for (from, to, why) in [
        ("\"cpus\":1", "\"cpus\":0", "0 vCPUs"),
        ("\"cpus\":1", "\"cpus\":2", "1 vCPUs for a VM of 2"),
        ("\"memory\":\"16M\"", "\"memory\":\"17M\"", "for a VM of"),
        ("\"memory\":\"16M\"", "\"memory\":\"1M\"", "memory"),
        ("\"config\":", "\"confix\":", "description"),
        (
            "\"disks\":[],\"nets\":[]",
            "\"nets\":[{\"fd\":1}]",
            "file descriptors from 3 on",
        ),
        (
            "\"mergeable\":false,\"disks\":[],\"nets\":[]",
            "\"nets\":[{\"queues\":9}]",
            "a network device has 1 to 8 pairs of queues",
        ),
    ] {
        assert_refused(replace(META, from, to), true, why);
    }
    let (front, _) = good();
    let vcpu = section(front, VCPU).start;
    for (field, value) in [(1, 257u32), (1, 0), (2, u32::MAX), (3, 4092), (3, u32::MAX)] {
        let change = put(vcpu + field * 4, value.to_le_bytes());
        assert_refused(change, true, "its vCPUs cannot be read");
    }
}

#[test]
fn state_that_kvm_or_a_device_refuses_is_an_error_that_names_it() {
    let (front, len) = good();
    let dir = tempfile::tempdir().unwrap();
    // Behind 6 numbers with MP_STATE, REGS (18 numbers); in SREGS, CR4 follows 8 segments, 2 tables and CR0, 2 and 3.
    let sregs = section(front, VCPU).start + 6 * 4 + 18 * 8;
    let cr4 = sregs + 8 * 24 + 2 * 16 + 3 * 8;
    let reserved = u64::MAX.to_le_bytes();
    let devices = section(front, DEVICES);
    let shorter = b"{}";
    let emptied = move |bytes: &mut Vec<u8>| {
        bytes[devices.clone()].fill(b' ');
        bytes[devices.start..devices.start + 2].copy_from_slice(shorter);
    };
    let mut bad_cr4 = front.clone();
    put(cr4, reserved)(&mut bad_cr4);
    let mut no_devices = front.clone();
    emptied(&mut no_devices);
    let changes = [
        (bad_cr4, "KVM_SET_SREGS failed"),
        (no_devices, "no such device"),
    ];
    for (mut bytes, why) in changes {
        sign(&mut bytes);
        let path = write(dir.path(), &bytes, *len);
        let ended = run(minivmm(&["restore"]).arg(&path));
        ended.assert_code(125);
        ended.assert_said(why);
    }
}

type Change<'a> = &'a dyn Fn(&mut Vec<u8>);

#[test]
fn what_is_said_of_disks_is_checked() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let path = dir.path().join("good");
    let at = format!("7={},exit", path.display());
    let disk = format!("path={},ephemeral", image.display());
    let args = ["--snapshot-at", &at, "--disk", &disk];
    run(&mut boot_tiny("disk", "", &args)).assert_code(0);
    let good = fs::read(&path).unwrap();
    let restore = |change: Change<'_>| {
        let mut bytes = good.clone();
        change(&mut bytes);
        sign(&mut bytes);
        fs::write(&path, &bytes).unwrap();
        run(minivmm(&["restore"]).arg(&path))
    };
    restore(&|_| {}).assert_code(0);
    let overlay = entry(&good, count(&good) - 1);
    let overlay_at = number(&good, overlay.start + 8) as usize;
    let run_at = |field: usize, value: u64| {
        move |bytes: &mut Vec<u8>| put(overlay_at + field * 8, value.to_le_bytes())(bytes)
    };
    let meta = section(&good, META);
    let meta = std::str::from_utf8(&good[meta]).unwrap();
    let (files, _) = meta.rsplit_once(",\"cmdline\"").unwrap();
    let files = &files[files.rfind("\"disks\"").unwrap()..];
    let lost = |bytes: &mut Vec<u8>| {
        bytes[16] -= 1;
        bytes.truncate(overlay_at);
    };
    let twice = |bytes: &mut Vec<u8>| {
        let mut more = bytes[overlay.clone()].to_vec();
        more[8..16].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
        bytes[overlay.end..overlay.end + 32].copy_from_slice(&more);
        bytes.extend_from_within(overlay_at..);
        bytes[16] += 1;
    };
    let in_meta = |from: &'static str, to: &'static str| {
        move |bytes: &mut Vec<u8>| replace(META, from, to)(bytes)
    };
    let changes: [(Change<'_>, &str); 9] = [
        (&run_at(0, u64::MAX), "pieces"),
        (&run_at(1, u64::MAX), "out of place"),
        (&run_at(1, 256), "out of place"),
        (&run_at(2, 1 << 52), "out of place"),
        (&lost, "1 files and the writes of 0 disks"),
        (&twice, "1 files and the writes of 2 disks"),
        (
            &in_meta("\"ro\":false,\"ephemeral\":true", "\"ephemeral\":false"),
            "of which 0 are ephemeral",
        ),
        (
            &|bytes| replace(META, files, "\"disks\":[]")(bytes),
            "0 files and the writes of 1 disks",
        ),
        (&in_meta("\"len\":1048576", "\"len\":1048575"), "it had"),
    ];
    for (change, why) in changes {
        let ended = restore(change);
        ended.assert_code(125);
        ended.assert_said(why);
    }
}
