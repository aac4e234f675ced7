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
use minivmm::event_loop::Signals;
use minivmm::measure::{self, GuestShare, Summary, Watch};

/// Rounds, unless the command line says otherwise.
const ROUNDS: usize = 5;
/// Longest that a guest may take.
const PATIENCE: Duration = Duration::from_secs(100);
/// Guest RAM in MiB.
const MEMORY: u64 = 128;
const CMDLINE: &str = "console=ttyS0 panic=-1 quiet -- true";
const MARKER: &str = "minivmm-demo: userspace";
const QEMU: &str = "qemu-system-x86_64 -M microvm,pit=off,pic=off,rtc=off -enable-kvm -cpu host,-arch-capabilities -nodefaults \
     -no-user-config -no-reboot -display none -serial stdio -m 128M";

type Outcome<T> = Result<T, Box<dyn Error>>;

/// What is measured: the table's line, monitor, Debian's kernel, its file, and options.
const ROWS: [(&str, &str, &str, &str, &[&str]); 8] = [
    (
        "minivmm, bzImage out of the cache",
        "minivmm",
        "cloud",
        "bzImage",
        &[],
    ),
    (
        "minivmm, bzImage, no cache",
        "minivmm",
        "cloud",
        "bzImage",
        &["--no-kernel-cache"],
    ),
    ("minivmm, vmlinux", "minivmm", "cloud", "vmlinux", &[]),
    ("QEMU microvm, bzImage", "QEMU", "cloud", "bzImage", &[]),
    ("QEMU microvm, vmlinux", "QEMU", "cloud", "vmlinux", &[]),
    (
        "minivmm, bzImage (xz) out of the cache",
        "minivmm",
        "generic",
        "bzImage",
        &[],
    ),
    (
        "minivmm, bzImage (xz), no cache",
        "minivmm",
        "generic",
        "bzImage",
        &["--no-kernel-cache"],
    ),
    (
        "QEMU microvm, bzImage (xz)",
        "QEMU",
        "generic",
        "bzImage",
        &[],
    ),
];

/// The words of a row's command, for a kernel file.
fn words(row: usize, kernel: &str) -> Vec<OsString> {
    let (_, monitor, .., options) = ROWS[row];
    let mut words: Vec<OsString> = match monitor {
        "minivmm" => vec![
            env!("CARGO_BIN_EXE_minivmm").into(),
            "--memory".into(),
            format!("{MEMORY}M").into(),
        ],
        _ => QEMU.split_whitespace().map(OsString::from).collect(),
    };
    let (line, start) = match monitor {
        "minivmm" => ("--cmdline", "--"),
        _ => ("-append", "-"),
    };
    for (option, value) in [("kernel", kernel), ("initrd", &initramfs())] {
        words.extend([format!("{start}{option}").into(), value.into()]);
    }
    words.extend([line.into(), CMDLINE.into()]);
    words.extend(options.iter().map(OsString::from));
    words
}

/// One boot where KVM is, after the page cache has what is needed and the monitor has run once, with a guest of a few bytes.
/// Prints the milliseconds to the marker, and the monitor's private memory beyond the guest's, in KiB.
fn one(row: usize, cache: &Path) -> Outcome<()> {
    let (_, monitor, flavor, file, _) = ROWS[row];
    let kernel = kernel(flavor, file);
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
    let tiny = tiny(if monitor == "minivmm" {
        "hello"
    } else {
        "hello-pvh"
    });
    let warm_up = words(row, tiny.to_str().ok_or("not UTF-8")?);
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
        marker: Some(MARKER),
        limit: PATIENCE,
        look: Some(&mut look),
        ..Watch::default()
    };
    let run = measure::run(&words(row, &kernel), watch, &signals)?;
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
            ROWS[row].0,
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
            return one(row.parse()?, Path::new(cache));
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
    fs::create_dir(share.path().join("cache"))?;
    fill(&share.path().join("cache"), share.path())?;

    let mut results = vec![(Vec::new(), Vec::new()); ROWS.len()];
    for round in 1..=rounds {
        for (row, (times, own)) in results.iter_mut().enumerate() {
            eprintln!("round {round} of {rounds}: {}", ROWS[row].0);
            let (time, kib) = boot(row, share.path())?;
            times.push(time);
            own.push(kib);
        }
    }
    println!(
        "From just before the fork of the monitor's process to the first line of the demo initramfs on its stdout, in ms: medians \
         of {rounds}\nrounds, in each of which every row boots once, in a fresh lab where there is no KVM for Linux. Own: private \
         pages (smaps) of the\nmonitor beyond the guest's RAM of {MEMORY} MiB at that moment.\n"
    );
    println!(
        "{:<40} {:>8} {:>8} {:>8} {:>8} {:>8}",
        "", "median", "min", "max", "x QEMU", "own, MiB"
    );
    let summaries = results
        .iter()
        .map(|(times, _)| Summary::new(times).ok_or("nothing was measured"))
        .collect::<Result<Vec<_>, _>>()?;
    for (row, (times, (_, own))) in summaries.iter().zip(&mut results).enumerate() {
        let kernel_of = |row: usize| (ROWS[row].2, ROWS[row].3);
        let qemu = (0..ROWS.len())
            .find(|other| ROWS[*other].1 == "QEMU" && kernel_of(*other) == kernel_of(row))
            .map_or(f64::NAN, |qemu| summaries[qemu].median_ms);
        own.sort_unstable();
        println!(
            "{:<40} {:>8.0} {:>8.0} {:>8.0} {:>8.2} {:>8.1}",
            ROWS[row].0,
            times.median_ms,
            times.min_ms,
            times.max_ms,
            times.median_ms / qemu,
            own[own.len() / 2] as f64 / 1024.0
        );
    }
    println!("\nminivmm --memory {MEMORY}M --kernel FILE --initrd demo.cpio --cmdline '{CMDLINE}'");
    println!("{QEMU} -kernel FILE -initrd demo.cpio -append '{CMDLINE}'");
    println!(
        "\n{}; load average {} after",
        host(&["qemu-system-x86_64"]),
        load()
    );
    Ok(())
}

/// Unpacks the kernels into the cache.
fn fill(cache: &Path, share: &Path) -> Outcome<()> {
    for flavor in ["cloud", "generic"] {
        let mut setting = OsString::from("XDG_CACHE_HOME=");
        setting.push(cache);
        let status = Command::new(project("tests/lab/with-kvm"))
            .arg("env")
            .arg(setting)
            .arg(env!("CARGO_BIN_EXE_minivmm"))
            .args([
                "--kernel",
                &kernel(flavor, "bzImage"),
                "--initrd",
                &initramfs(),
            ])
            .args(["--cmdline", CMDLINE])
            .env("MINIVMM_LAB_SHARE", share)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status()?;
        if !status.success() {
            return Err(format!("a boot of {flavor} that fills the cache: {status}").into());
        }
    }
    Ok(())
}
