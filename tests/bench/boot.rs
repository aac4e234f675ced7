//! Boots of Linux side by side: minivmm and QEMU's microvm, with the same kernel, initramfs and command line.
//!
//! `make bench`, or `cargo bench --bench boot -- [ROUNDS]`. Where the host's own KVM cannot boot Linux, each boot is the first of a
//! lab of its own: an emulator translates what it runs, and a guest in memory that another one ran in pays for the old
//! translations, more than for anything of its own.

#[path = "../common/mod.rs"]
mod common;
mod host;

use std::error::Error;
use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::linux::{initramfs, kernel};
use common::{project, tiny};
use host::{host, load};
use minivmm::config::DEFAULT_CMDLINE;
use minivmm::console::Signals;
use minivmm::observe::memory::GuestShare;
use minivmm::tools::bench::{DEMO_MARKER, QEMU_MICROVM};
use minivmm::tools::measure::{self, Summary, Watch};

/// Rounds, unless the command line says otherwise.
const ROUNDS: usize = 5;
/// Longest that a guest may take.
const PATIENCE: Duration = Duration::from_secs(100);
/// Guest RAM in MiB.
const MEMORY: u64 = 128;
const QEMU: &str = "qemu-system-x86_64";

/// The kernel command line, QEMU's too.
fn kernel_cmdline() -> String {
    format!("{DEFAULT_CMDLINE} -- true")
}

type Outcome<T> = Result<T, Box<dyn Error>>;

/// What is measured.
struct Row {
    /// QEMU, or else minivmm.
    qemu: bool,
    /// As guest-kernels/fetch calls it.
    flavor: &'static str,
    file: &'static str,
    /// Whether minivmm may use its kernel cache, which has the kernel.
    cache: bool,
}

/// Debian's cloud kernel is packed with LZ4, its generic kernel with xz; the small one is there after `make kernel`.
const ROWS: [Row; 10] = [
    minivmm("cloud", "bzImage", true),
    minivmm("cloud", "bzImage", false),
    minivmm("cloud", "vmlinux", true),
    qemu("cloud", "bzImage"),
    qemu("cloud", "vmlinux"),
    minivmm("generic", "bzImage", true),
    minivmm("generic", "bzImage", false),
    qemu("generic", "bzImage"),
    minivmm("small", "bzImage", true),
    qemu("small", "bzImage"),
];

const fn minivmm(flavor: &'static str, file: &'static str, cache: bool) -> Row {
    Row {
        qemu: false,
        flavor,
        file,
        cache,
    }
}

const fn qemu(flavor: &'static str, file: &'static str) -> Row {
    Row {
        qemu: true,
        flavor,
        file,
        cache: false,
    }
}

impl Row {
    fn name(&self) -> String {
        let monitor = if self.qemu { "QEMU microvm" } else { "minivmm" };
        let cache = match (self.qemu, self.file, self.cache) {
            (false, "bzImage", true) => ", cached",
            (false, "bzImage", false) => ", no cache",
            _ => "",
        };
        format!("{monitor}, {} {}{cache}", self.flavor, self.file)
    }

    /// The words of its command, for a kernel file.
    fn words(&self, kernel: &str) -> Vec<OsString> {
        let (start, rest, cmdline) = if self.qemu {
            (
                format!("{QEMU} {QEMU_MICROVM} -m {MEMORY}M"),
                "-",
                "-append",
            )
        } else {
            let own = env!("CARGO_BIN_EXE_minivmm");
            let cache = if self.cache { "" } else { "--no-kernel-cache" };
            (
                format!("{own} --memory {MEMORY}M {cache}"),
                "--",
                "--cmdline",
            )
        };
        let mut words: Vec<OsString> = start.split_whitespace().map(OsString::from).collect();
        for (option, value) in [("kernel", kernel), ("initrd", &initramfs())] {
            words.extend([format!("{rest}{option}").into(), value.into()]);
        }
        words.extend([cmdline.into(), kernel_cmdline().into()]);
        words
    }
}

/// One boot where KVM is, after the page cache has what is needed and the monitor has run once, with a guest of a few bytes.
/// Prints the milliseconds to the marker, and the monitor's private memory beyond the guest's, in KiB.
fn one(row: &Row, cache: &Path) -> Outcome<()> {
    let kernel = kernel(row.flavor, row.file);
    for path in [&kernel, &initramfs()] {
        fs::read(path)?;
    }
    // The lab has it from this machine, and reads it more slowly than its own files.
    let memory = tempfile::tempdir_in("/dev/shm")?;
    let copied = Command::new("cp")
        .arg("-a")
        .arg(cache)
        .arg(memory.path())
        .status()?;
    if !copied.success() {
        return Err("cannot copy the kernel cache".into());
    }
    #[allow(
        unsafe_code,
        reason = "the environment is set before there are threads"
    )]
    // SAFETY: this process has one thread.
    unsafe {
        std::env::set_var("XDG_CACHE_HOME", memory.path().join("cache"))
    };
    let signals = Signals::block()?;
    let tiny = tiny(if row.qemu { "hello-pvh" } else { "hello" });
    let warm_up = row.words(tiny.to_str().ok_or("not UTF-8")?);
    measure::run(
        &warm_up,
        Watch {
            limit: PATIENCE,
            ..Watch::default()
        },
        &signals,
    )?;

    let mut share = None;
    let mut look = |pid| share = GuestShare::read(pid, MEMORY << 20);
    let watch = Watch {
        marker: Some(DEMO_MARKER),
        limit: PATIENCE,
        sample: Some(&mut look),
        ..Watch::default()
    };
    let run = measure::run(&row.words(&kernel), watch, &signals)?;
    let (Some(marker), true) = (
        run.marker,
        run.status.is_some_and(|status| status.success()),
    ) else {
        return Err(format!("{run:?}").into());
    };
    let own = share.ok_or("the guest's memory was not found")?.own_bytes;
    println!("boot {} {}", marker.as_secs_f64() * 1e3, own >> 10);
    Ok(())
}

/// [`one`] where KVM can boot Linux, in a lab of its own if need be.
fn boot(row: usize, share: &Path) -> Outcome<(Duration, u64)> {
    let output = Command::new(project("tests/lab/with-kvm"))
        .arg(std::env::current_exe()?)
        .args(["--one", &row.to_string()])
        .arg(share.join("cache"))
        .env("MINIVMM_LAB_SHARE", share)
        .stdin(Stdio::null())
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let numbers = text.lines().find_map(|line| line.strip_prefix("boot "));
    let parsed = numbers.and_then(|numbers| {
        let (ms, own) = numbers.split_once(' ')?;
        Some((ms.parse::<f64>().ok()?, own.parse().ok()?))
    });
    match parsed {
        Some((ms, own)) => Ok((Duration::from_secs_f64(ms / 1e3), own)),
        None => Err(format!(
            "{}: {text}{}",
            ROWS[row].name(),
            String::from_utf8_lossy(&output.stderr)
        )
        .into()),
    }
}

fn main() -> Outcome<()> {
    // Cargo adds --bench.
    let args: Vec<String> = std::env::args()
        .skip(1)
        .filter(|arg| arg != "--bench")
        .collect();
    let rounds = match &args[..] {
        [one_boot, row, cache] if one_boot == "--one" => {
            let row: usize = row.parse()?;
            return one(ROWS.get(row).ok_or("no such row")?, Path::new(cache));
        }
        [] => ROUNDS,
        [rounds] => rounds
            .parse()
            .ok()
            .filter(|rounds| *rounds > 0)
            .ok_or("ROUNDS must be a number, and not 0")?,
        _ => return Err("usage: cargo bench --bench boot -- [ROUNDS]".into()),
    };
    let share = tempfile::tempdir()?;
    let cache = share.path().join("cache");
    fs::create_dir(&cache)?;
    let mut flavors: Vec<&str> = ROWS.iter().map(|row| row.flavor).collect();
    flavors.dedup();
    flavors.retain(|flavor| {
        let there = is_there(flavor);
        if !there {
            eprintln!("there is no {flavor} kernel, so it is left out");
        }
        there
    });
    for flavor in &flavors {
        fill(&cache, share.path(), flavor)?;
    }

    let mut results: Vec<Measured> = (0..ROWS.len())
        .filter(|row| flavors.contains(&ROWS[*row].flavor))
        .map(|row| (row, Vec::new(), Vec::new()))
        .collect();
    for round in 1..=rounds {
        for (row, times, own) in &mut results {
            eprintln!("round {round} of {rounds}: {}", ROWS[*row].name());
            let (time, kib) = boot(*row, share.path())?;
            times.push(time);
            own.push(kib);
        }
    }
    print(rounds, results)
}

/// The row's index, its times, and its private memory in KiB.
type Measured = (usize, Vec<Duration>, Vec<u64>);

/// Prints the table.
fn print(rounds: usize, mut results: Vec<Measured>) -> Outcome<()> {
    println!(
        "From just before the fork of the monitor's process to the first line of the demo initramfs on its stdout, in ms: medians \
         of {rounds}\nrounds, in each of which every row boots once, in a fresh lab where there is no KVM for Linux. Own: private \
         pages (smaps) of the\nmonitor beyond the guest's RAM of {MEMORY} MiB at that moment.\n"
    );
    println!(
        "{:<36} {:>8} {:>8} {:>8} {:>8} {:>8}",
        "", "median", "min", "max", "x QEMU", "own, MiB"
    );
    let mut summaries = Vec::new();
    for (row, times, own) in &mut results {
        own.sort_unstable();
        let times = Summary::new(times).ok_or("nothing was measured")?;
        summaries.push((&ROWS[*row], times, own[own.len() / 2] as f64 / 1024.0));
    }
    for (row, times, own) in &summaries {
        let qemu = summaries
            .iter()
            .find(|(other, ..)| other.qemu && (other.flavor, other.file) == (row.flavor, row.file))
            .map_or(f64::NAN, |(_, times, _)| times.median_ms);
        println!(
            "{:<36} {:>8.0} {:>8.0} {:>8.0} {:>8.2} {own:>8.1}",
            row.name(),
            times.median_ms,
            times.min_ms,
            times.max_ms,
            times.median_ms / qemu,
        );
    }
    let cmdline = kernel_cmdline();
    println!("\nminivmm --memory {MEMORY}M --kernel FILE --initrd demo.cpio --cmdline '{cmdline}'");
    println!(
        "{QEMU} {QEMU_MICROVM} -m {MEMORY}M -kernel FILE -initrd demo.cpio -append '{cmdline}'"
    );
    println!("\n{}; load average {} after", host(&[QEMU]), load());
    Ok(())
}

/// Whether this kernel has been fetched or built.
fn is_there(flavor: &str) -> bool {
    Command::new(project("guest-kernels/fetch"))
        .args(["--offline", flavor])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// Unpacks a kernel into the cache.
fn fill(cache: &Path, share: &Path, flavor: &str) -> Outcome<()> {
    let mut setting = OsString::from("XDG_CACHE_HOME=");
    setting.push(cache);
    let status = Command::new(project("tests/lab/with-kvm"))
        .arg("env")
        .arg(setting)
        .arg(env!("CARGO_BIN_EXE_minivmm"))
        .args(["--kernel", &kernel(flavor, "bzImage")])
        .args(["--initrd", &initramfs(), "--cmdline", &kernel_cmdline()])
        .env("MINIVMM_LAB_SHARE", share)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("a boot of {flavor} that fills the cache: {status}").into())
    }
}
