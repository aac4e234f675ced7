//! A bzImage whose kernel minivmm enters directly: where it lies, what it finds, the cache that it comes from, and what two of
//! them share. Real Linux, run by `make test`, in the lab where need be.

mod common;

use std::collections::{BTreeSet, HashMap};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Lines, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::Sender;
use std::thread;
use std::time::Duration;

use common::limit::{until, watch};
use common::linux::{initramfs, kernel};
use common::skip::skip;
use common::{PATIENCE, boot_tiny, minivmm, run, wait};
use tempfile::{NamedTempFile, TempDir};

fn command(kernel: &Path, cache: &Path, append: &str) -> Command {
    let mut command = minivmm(&["--initrd", &initramfs()]);
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
fn cached_bzimage_gets_a_new_kaslr_slot_every_boot() {
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
fn self_decompressing_kernel_sees_the_same_machine() {
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
fn full_or_read_only_cache_does_not_stop_a_boot() {
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
    let is_written = || fs::read_dir(&dir).is_ok_and(|dir| dir.count() > 0);
    assert!(until(is_written), "nobody writes the cache");
    children[0].kill().unwrap();
    for (child, success) in children.into_iter().zip([false, true, true]) {
        assert_eq!(wait(child, PATIENCE).status.success(), success);
    }
    assert_eq!(boot(&kernel, cache.path(), "", "true").0, "cached");
}

/// KSM on the host, running fast; afterwards as it was.
struct Ksm(Vec<(PathBuf, String)>);

impl Ksm {
    fn run() -> Self {
        let mut ksm = Self(Vec::new());
        for (name, value) in [
            ("pages_to_scan", "10000"),
            ("sleep_millisecs", "1"),
            ("run", "1"),
        ] {
            let file = Path::new("/sys/kernel/mm/ksm").join(name);
            let before = fs::read_to_string(&file).expect("the host has KSM");
            ksm.0.push((file.clone(), before));
            fs::write(&file, value).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        }
        ksm
    }
}

impl Drop for Ksm {
    fn drop(&mut self) {
        for (file, before) in &self.0 {
            _ = fs::write(file, before);
        }
    }
}

/// A running guest, which ends with the test.
struct Guest {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
    _watched: Sender<()>,
}

impl Guest {
    fn start(command: &mut Command) -> Self {
        let mut child = command
            .args(["--memory", "128M"])
            .stdin(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self {
            _watched: watch(&child),
            child,
            lines,
        }
    }

    /// The next line of its output that has `word`.
    fn line(&mut self, word: &str) -> String {
        let mut lines = self.lines.by_ref().map_while(Result::ok);
        lines
            .find(|line| line.contains(word))
            .unwrap_or_else(|| panic!("no line with {word:?}"))
    }

    fn tell(&mut self, line: &str) {
        let mut stdin = self.child.stdin.as_ref().unwrap();
        writeln!(stdin, "{line}").unwrap();
    }

    fn proc(&self, file: &str) -> String {
        format!("/proc/{}/{file}", self.child.id())
    }

    /// Where it begins, the memory of the process that KSM may merge; guest RAM.
    fn mergeable(&self) -> Option<u64> {
        let smaps = fs::read_to_string(self.proc("smaps")).unwrap();
        let mut start = None;
        for line in smaps.lines() {
            match line.split_once(' ') {
                Some(("VmFlags:", flags)) if flags.split(' ').any(|flag| flag == "mg") => {
                    return start;
                }
                Some((range, _)) => {
                    let address = range.split_once('-').map(|(start, _)| start);
                    start = address
                        .and_then(|start| u64::from_str_radix(start, 16).ok())
                        .or(start);
                }
                None => {}
            }
        }
        None
    }

    /// The host's page frames below guest RAM, as /proc/PID/pagemap has them
    /// (Documentation/admin-guide/mm/pagemap.rst): bit 63 if there is one, and its number in bits 0 to 54.
    fn frames(&self, gpas: &Range<u64>) -> Vec<u64> {
        let start = self.mergeable().expect("mergeable memory") + gpas.start;
        let mut entries = vec![0; (gpas.end - gpas.start) as usize / 4096 * 8];
        let pagemap = File::open(self.proc("pagemap")).unwrap();
        let offset = start / 4096 * 8;
        pagemap.read_exact_at(&mut entries, offset).unwrap();
        entries
            .chunks_exact(8)
            .map(|entry| u64::from_le_bytes(entry.try_into().unwrap()))
            .map(|entry| (entry >> 63) * (entry & ((1 << 55) - 1)))
            .collect()
    }

    /// What is in guest RAM.
    fn bytes(&self, gpas: &Range<u64>) -> Vec<u8> {
        let start = self.mergeable().expect("mergeable memory") + gpas.start;
        let mut bytes = vec![0; (gpas.end - gpas.start) as usize];
        let memory = File::open(self.proc("mem")).unwrap();
        memory.read_exact_at(&mut bytes, start).unwrap();
        bytes
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        _ = self.child.kill();
        _ = self.child.wait();
    }
}

#[test]
fn two_guests_that_may_be_merged_share_their_kernels_text() {
    let in_lab = fs::read_to_string("/proc/cmdline").is_ok_and(|line| line.contains("lab.job="));
    // A host of CI has no other guests.
    if !in_lab && std::env::var_os("CI").is_none() {
        return skip("outside the lab it would change how the host merges memory");
    }
    let cache = TempDir::new().unwrap();
    let kernel = PathBuf::from(kernel("cloud", "bzImage"));
    // A static key, by which the kernel changes its text.
    let script = "grep -E ' _(text|etext)$' /proc/kallsyms; read word; echo 1 >/proc/sys/kernel/sched_schedstats; \
                  echo $word: $((6 * 7)); read word";
    let append = format!("nokaslr -- sh -c \"{script}\"");
    let command = || command(&kernel, cache.path(), &append);

    let mut alone = Guest::start(&mut command());
    alone.line(" _etext");
    assert_eq!(alone.mergeable(), None);
    drop(alone);
    let warned = run(&mut boot_tiny("hello", "", &["--mergeable"])).stderr;
    assert!(warned.contains("KSM does not run"), "{warned}");

    let _ksm = Ksm::run();
    let mut guests = [(); 2].map(|()| Guest::start(command().arg("--mergeable")));
    let [first, second] = &mut guests;
    // At the same place in both: where Linux maps its image, the virtual addresses begin at 0xffffffff80000000.
    let [text, etext] = [" _text", " _etext"].map(|word| {
        let lines = [first.line(word), second.line(word)];
        assert_eq!(lines[0], lines[1]);
        address(&lines[0], word) & 0x3fff_ffff
    });
    let gpas = text..etext & !0xfff;
    // Padding is the same many times over, and KSM has one frame for 256 of the same at most.
    let before = second.bytes(&gpas);
    let mut times = HashMap::new();
    for page in before.chunks(4096) {
        *times.entry(page).or_insert(0) += 1;
    }
    let own = || before.chunks(4096).map(|page| times[page] == 1);
    let all = own().filter(|own| *own).count();
    let shared = until(|| {
        thread::sleep(Duration::from_millis(500));
        let frames = [first.frames(&gpas), second.frames(&gpas)];
        let shared = own()
            .zip(frames[0].iter().zip(&frames[1]))
            .filter(|(own, (one, other))| *own && one == other && **one != 0)
            .count();
        println!("{shared} of {all} pages of text are shared");
        shared * 100 >= all * 95
    });
    assert!(shared, "they stay apart");

    // One changes its text, and the other one's stays.
    let before = [first.bytes(&gpas), second.bytes(&gpas)];
    first.tell("answer");
    first.line("answer: 42");
    assert!(first.bytes(&gpas) != before[0], "no text has changed");
    assert!(
        second.bytes(&gpas) == before[1],
        "the other one's text has changed"
    );
    second.tell("answer");
    second.line("answer: 42");
}
