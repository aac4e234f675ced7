//! A bzImage whose kernel minivmm enters directly: where it lies, what it finds, and the cache that it comes from. Real Linux,
//! run by `make test`, in the lab where need be.

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::linux::{initramfs, kernel};
use common::{minivmm, run};
use tempfile::{NamedTempFile, TempDir};

fn command(kernel: &Path, cache: &Path, append: &str) -> Command {
    let mut command = minivmm(&["--deadline", "100s", "--initrd", &initramfs()]);
    command
        .arg("--kernel")
        .arg(kernel)
        .args(["--append", append])
        .env("XDG_CACHE_HOME", cache);
    command
}

/// A boot of a bzImage with its cache in `cache`: how the kernel was loaded, and the output of `script`.
fn boot(kernel: &Path, cache: &Path, cmdline: &str, script: &str) -> (String, String) {
    let timeline = NamedTempFile::new().unwrap();
    let append = format!("{cmdline} loglevel=4 -- sh -c \"{script}\"");
    let mut command = command(kernel, cache, &append);
    let ended = run(command.arg("--timeline").arg(timeline.path()));
    ended.assert_code(0);
    let json = fs::read_to_string(timeline.path()).unwrap();
    let timeline: serde_json::Value = serde_json::from_str(&json).unwrap();
    let loading = timeline["kernel"]["loading"].as_str().unwrap();
    (loading.into(), ended.out())
}

/// The first address in the line that has `word`.
fn address(out: &str, word: &str) -> u64 {
    let line = out.lines().find(|line| line.contains(word)).expect(out);
    let digits = line.trim_start().trim_start_matches("0x");
    let end = digits
        .find(|c: char| !c.is_ascii_hexdigit())
        .unwrap_or(digits.len());
    u64::from_str_radix(&digits[..end], 16).expect(line)
}

#[test]
fn a_cached_bzimage_is_somewhere_else_at_every_boot() {
    const BOOTS: usize = 20;
    // Where the kernel is in virtual and in physical memory, and where vmalloc's memory begins.
    let script = "grep ' _text$' /proc/kallsyms; grep 'Kernel code' /proc/iomem; \
                  echo 1 >/proc/sys/kernel/kptr_restrict; head -n 1 /proc/vmallocinfo";
    let cache = TempDir::new().unwrap();
    let kernel = PathBuf::from(kernel("cloud", "bzImage"));
    let places = |cmdline: &str| {
        let (loading, out) = boot(&kernel, cache.path(), cmdline, script);
        let of = |word| address(&out, word);
        (loading, [of(" _text"), of("Kernel code"), of("-0x")])
    };
    assert_eq!(places("").0, "decompressed");
    let mut seen = Vec::new();
    for _ in 0..BOOTS {
        let (loading, place) = places("");
        assert_eq!(loading, "cached");
        seen.push(place);
    }
    // Of about 490 places in virtual memory, and 90 in 256 MiB.
    for (which, least) in [(0, BOOTS - 4), (1, BOOTS / 2), (2, BOOTS - 4)] {
        let different: BTreeSet<_> = seen.iter().map(|place| place[which]).collect();
        assert!(different.len() >= least, "{which}: {seen:x?}");
    }
    let pinned = [0xffff_ffff_8100_0000, 0x100_0000, 0xffff_c900_0000_0000];
    assert_eq!(places("nokaslr"), ("cached".into(), pinned));
}

#[test]
fn a_kernel_that_decompresses_itself_finds_the_same_machine() {
    let script = "cat /proc/cmdline; grep -v Kernel /proc/iomem; cd /sys/firmware/memmap; \
                  for i in *; do cat $i/start $i/end $i/type; done";
    let dir = TempDir::new().unwrap();
    let direct = PathBuf::from(kernel("cloud", "bzImage"));
    // Where its payload is, it knows by itself: what the setup header says of it is for others.
    let itself = dir.path().join("bzImage");
    let mut image = fs::read(&direct).unwrap();
    image[0x24c..0x250].fill(0);
    fs::write(&itself, image).unwrap();

    let machine = |kernel: &Path, expected: &str| {
        let (loading, out) = boot(kernel, dir.path(), "", script);
        assert_eq!(loading, expected);
        let (_, shown) = out.split_once("minivmm-demo: userspace").expect(&out);
        shown.to_owned()
    };
    let (one, other) = (machine(&direct, "decompressed"), machine(&itself, "copied"));
    assert_eq!(one, other);
    for wanted in ["console=ttyS0", "System RAM", "Reserved"] {
        assert!(one.contains(wanted), "no {wanted:?} in {one}");
    }
}

/// A file system in memory.
struct Mounted(TempDir);

impl Mounted {
    fn new(options: &str) -> Self {
        let dir = TempDir::new().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", options, "tmp"])
            .arg(dir.path())
            .status();
        assert!(mounted.unwrap().success(), "mount needs root");
        Self(dir)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        _ = Command::new("umount").arg(self.0.path()).status();
    }
}

#[test]
fn a_cache_on_a_full_or_read_only_disk_stops_no_boot() {
    let kernel = PathBuf::from(kernel("cloud", "bzImage"));
    for options in ["size=1m", "ro"] {
        let cache = Mounted::new(options);
        for _ in 0..2 {
            let (loading, out) = boot(&kernel, cache.0.path(), "", "echo all is well");
            assert_eq!(loading, "decompressed", "{options}");
            assert!(out.contains("all is well"), "{options}: {out}");
        }
        // Not even a part of it is left.
        let dir = cache.0.path().join("minivmm/kernels-v1");
        assert!(!dir.exists() || fs::read_dir(dir).unwrap().count() == 0);
    }
}

#[test]
fn two_may_write_the_cache_at_once_and_one_may_be_killed() {
    let cache = TempDir::new().unwrap();
    let kernel = PathBuf::from(kernel("cloud", "bzImage"));
    let mut children: Vec<_> = (0..3)
        .map(|_| {
            command(&kernel, cache.path(), "-- true")
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap()
        })
        .collect();
    let dir = cache.path().join("minivmm/kernels-v1");
    while fs::read_dir(&dir).map_or(0, Iterator::count) == 0 {
        std::thread::yield_now();
    }
    children[0].kill().unwrap();
    assert!(!children[0].wait().unwrap().success());
    for child in &mut children[1..] {
        assert!(child.wait().unwrap().success());
    }
    assert_eq!(boot(&kernel, cache.path(), "", "true").0, "cached");
}
