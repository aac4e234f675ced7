//! Start-up, whole processes side by side: what KVM costs at the least (a C program, with either C library), minivmm, QEMU's
//! microvm, a container; and the same of VMs that go on from a snapshot.
//!
//! `make bench`, or `cargo bench --bench startup -- [RUNS]`. Every round runs each command once, so that what disturbs the
//! host disturbs all alike, and in another order, so that none always finds in the caches what the same one left there. What
//! is not installed is left out, and said to be.

#[path = "../common/mod.rs"]
mod common;
mod host;

use std::error::Error;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{project, tiny};
use host::{command_line, host, load, version_of};
use minivmm::tools::bench::QEMU_MICROVM;
use minivmm::tools::measure::Summary;

/// Measured rounds, unless the command line says otherwise.
const RUNS: usize = 200;
/// Rounds before them that are not counted: page cache, CPU clocks.
const WARM_UPS: usize = 10;

const QEMU: &str = "qemu-system-x86_64";

type Outcome<T> = Result<T, Box<dyn Error>>;

/// VMs that go on from one snapshot in one process.
const CLONES: usize = 100;

/// One line of a table.
struct Row {
    name: &'static str,
    command: Command,
    times: Vec<Duration>,
}

impl Row {
    /// A command that has shown that it works: it ends with 0 after this output, whose lines may come in any order.
    fn new<S: AsRef<std::ffi::OsStr>>(
        name: &'static str,
        program: impl AsRef<std::ffi::OsStr>,
        args: &[S],
        expected: &str,
    ) -> Outcome<Self> {
        let mut command = Command::new(program);
        command.args(args).stdin(Stdio::null());
        let output = command.output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        let [mut lines, mut expected_lines] =
            [&text, expected].map(|text| text.lines().collect::<Vec<_>>());
        lines.sort();
        expected_lines.sort();
        if !output.status.success() || lines != expected_lines {
            return Err(format!("{name} does not work: {command:?}: {output:?}").into());
        }
        command
            .stdin(File::open("/dev/null")?)
            .stdout(File::create("/dev/null")?)
            .stderr(Stdio::inherit());
        Ok(Self {
            name,
            command,
            times: Vec::new(),
        })
    }

    fn run(&mut self) -> Outcome<()> {
        let start = Instant::now();
        let status = self.command.spawn()?.wait()?;
        self.times.push(start.elapsed());
        if status.success() {
            Ok(())
        } else {
            Err(format!("{:?}: {status}", self.command).into())
        }
    }
}

/// Orders that differ from round to round and are the same in each run: a linear congruential generator (MMIX's).
struct Order(u64);

impl Order {
    fn shuffle<T>(&mut self, rows: &mut [T]) {
        for last in (1..rows.len()).rev() {
            self.0 = self
                .0
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            rows.swap(last, (self.0 >> 33) as usize % (last + 1));
        }
    }
}

fn main() -> Outcome<()> {
    // Cargo adds --bench.
    let runs = match std::env::args().skip(1).find(|arg| arg != "--bench") {
        Some(arg) => arg
            .parse()
            .ok()
            .filter(|runs| *runs > 0)
            .ok_or(format!("{arg} is no number of runs"))?,
        None => RUNS,
    };
    let mut tables = tables()?;
    let host = host(&[QEMU, "runc"]);
    let mut order = Order(1);
    for round in 0..WARM_UPS + runs {
        let mut rows: Vec<_> = tables.iter_mut().flatten().collect();
        order.shuffle(&mut rows);
        for row in rows {
            row.run()?;
            if round < WARM_UPS {
                row.times.clear();
            }
        }
    }

    println!(
        "Whole processes, from just before posix_spawn(3) to the return of waitpid(2), in ms;"
    );
    println!(
        "{runs} runs of each, in another order each round, after {WARM_UPS} that are not counted."
    );
    for rows in &tables {
        print(rows)?;
    }
    println!();
    for row in tables.iter().flatten() {
        println!("{}: {}", row.name, command_line(&row.command));
    }
    let target = if cfg!(target_env = "musl") {
        "musl"
    } else {
        "glibc"
    };
    println!(
        "\nminivmm is built for {target}; {host}; load average {} after",
        load()
    );
    Ok(())
}

/// Prints a table, whose first row is the floor.
fn print(rows: &[Row]) -> Outcome<()> {
    println!(
        "\n{:<32} {:>8} {:>8} {:>8} {:>8} {:>9}",
        "", "median", "p90", "p99", "min", "x floor"
    );
    let mut floor = None;
    for row in rows {
        let times = Summary::new(&row.times).ok_or("nothing was measured")?;
        println!(
            "{:<32} {:>8.2} {:>8.2} {:>8.2} {:>8.2} {:>9.2}",
            row.name,
            times.median_ms,
            times.p90_ms,
            times.p99_ms,
            times.min_ms,
            times.median_ms / *floor.get_or_insert(times.median_ms)
        );
    }
    Ok(())
}

/// All that is to be measured and can be.
fn tables() -> Outcome<[Vec<Row>; 3]> {
    let glibc = build_floor("cc", "floor-glibc", &[])?;
    // musl-gcc knows no headers but musl's own; KVM's are the kernel's.
    let kernel_headers = ["/usr/include", "/usr/include/x86_64-linux-gnu"];
    let idirafter = kernel_headers.map(|dir| ["-idirafter", dir]).concat();
    let musl = build_floor("musl-gcc", "floor-musl", &idirafter);
    if let Err(e) = &musl {
        println!("left out: bare KVM, musl (apt-get install musl-tools): {e}");
    }
    let (restored, forked) = snapshot_rows(musl.as_ref().unwrap_or(&glibc))?;
    Ok([boot_rows(musl.as_deref().ok(), &glibc)?, restored, forked])
}

/// Saves a VM just before its last byte, with the floor and with minivmm. Gives one that goes on, and many.
fn snapshot_rows(floor: &Path) -> Outcome<(Vec<Row>, Vec<Row>)> {
    let minivmm = env!("CARGO_BIN_EXE_minivmm");
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let [saved, snapshot] =
        ["startup.floor", "startup.snapshot"].map(|name| path_text(dir.join(name)));
    let (saved, snapshot) = (saved?, snapshot?);
    let marks = path_text(tiny("marks"))?;
    Row::new("saving: bare KVM", floor, &["save", &marks, &saved], "ab")?;
    let at = format!("8={snapshot},exit");
    let args = ["--memory", "16M", "--kernel", &marks, "--snapshot-at", &at];
    Row::new("saving", minivmm, &args, "ab")?;

    let args = ["restore", &saved, "1"];
    let restored = vec![
        Row::new("floor: bare KVM, restore", floor, &args, "c")?,
        Row::new("minivmm restore", minivmm, &["restore", &snapshot], "c")?,
    ];
    let count = CLONES.to_string();
    let lines: String = (0..CLONES).map(|index| format!("{index}: c\n")).collect();
    let fork = ["fork", &snapshot, "-n", &count];
    let one_by_one = [&fork[..], &["-j", "1"]].concat();
    let args = ["restore", &saved, &count];
    let forked = vec![
        Row::new(
            "floor: bare KVM, restore 100",
            floor,
            &args,
            &"c".repeat(CLONES),
        )?,
        Row::new("minivmm fork -n 100 -j 1", minivmm, &one_by_one, &lines)?,
        Row::new("minivmm fork -n 100", minivmm, &fork, &lines)?,
    ];
    Ok((restored, forked))
}

/// VMs that boot, the lowest floor first.
fn boot_rows(musl: Option<&Path>, glibc: &Path) -> Outcome<Vec<Row>> {
    let minivmm = env!("CARGO_BIN_EXE_minivmm");
    let hello = path_text(tiny("hello"))?;
    let disk = path_text(Path::new(env!("CARGO_TARGET_TMPDIR")).join("startup.img"))?;
    File::create(&disk)?.set_len(1 << 20)?;
    let disk_option = format!("path={disk}");

    let mut rows = Vec::new();
    if let Some(musl) = musl {
        rows.push(Row::new("floor: bare KVM, musl", musl, &[&hello], "!")?);
    }
    rows.push(Row::new("floor: bare KVM, glibc", glibc, &[&hello], "!")?);

    let vm = |name, args: &[&str]| {
        let args = [&["--kernel", &hello, "--memory"], args].concat();
        Row::new(name, minivmm, &args, "!")
    };
    rows.push(vm("minivmm", &["16M"])?);
    rows.push(vm("minivmm, no sandbox", &["16M", "--sandbox", "off"])?);
    rows.push(vm("minivmm, a disk", &["16M", "--disk", &disk_option])?);
    let reads = path_text(tiny("reads"))?;
    let args = ["--memory", "16M", "--disk", &disk_option];
    let args = [&args[..], &["--cmdline", "16", "--kernel", &reads]].concat();
    rows.push(Row::new("minivmm, 16 reads of it", minivmm, &args, "")?);
    rows.push(vm("minivmm, 1 GiB", &["1G"])?);
    rows.push(vm("minivmm, 2 vCPUs", &["16M", "--cpus", "2"])?);
    if version_of(QEMU).is_some() {
        let pvh = path_text(tiny("hello-pvh"))?;
        let drive = format!("file={disk},format=raw,if=none,id=d");
        let guest = ["-m", "16M", "-kernel", &pvh];
        let args: Vec<&str> = QEMU_MICROVM.split(' ').chain(guest).collect();
        rows.push(Row::new("QEMU microvm", QEMU, &args, "!")?);
        let disk = ["-drive", &drive, "-device", "virtio-blk-device,drive=d"];
        let args = [&args[..], &disk].concat();
        rows.push(Row::new("QEMU microvm, a disk", QEMU, &args, "!")?);
    } else {
        println!("left out: QEMU microvm (apt-get install qemu-system-x86)");
    }
    match (version_of("runc"), static_busybox()) {
        (Some(_), Some(busybox)) => {
            let bundle = path_text(make_bundle(&busybox)?)?;
            let args = ["run", "--bundle", &bundle, "minivmm-bench"];
            match Row::new("runc, busybox echo", "runc", &args, "!\n") {
                Ok(row) => rows.push(row),
                Err(e) => println!("left out: {e}"),
            }
        }
        _ => println!("left out: runc (apt-get install runc busybox-static)"),
    }
    rows.push(Row::new::<&str>("a static program, no VM", glibc, &[], "")?);
    Ok(rows)
}

/// Compiles the bare sequence of KVM calls.
fn build_floor(compiler: &str, name: &str, options: &[&str]) -> Outcome<PathBuf> {
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let status = Command::new(compiler)
        .args(["-O2", "-static", "-Wall", "-Wextra", "-Werror"])
        .args(options)
        .arg("-o")
        .args([&program, &project("tests/bench/floor.c")])
        .status()?;
    status
        .success()
        .then_some(program)
        .ok_or_else(|| "floor.c does not compile".into())
}

/// A container as small as the tiny guest: runc's own default, but for the program and the terminal.
fn make_bundle(busybox: &Path) -> Outcome<PathBuf> {
    let bundle = Path::new(env!("CARGO_TARGET_TMPDIR")).join("bundle");
    fs::create_dir_all(bundle.join("rootfs/bin"))?;
    fs::copy(busybox, bundle.join("rootfs/bin/busybox"))?;
    let config = bundle.join("config.json");
    if config.exists() {
        fs::remove_file(&config)?;
    }
    let made = Command::new("runc")
        .args(["spec", "--bundle"])
        .arg(&bundle)
        .status()?;
    if !made.success() {
        return Err(format!("runc spec: {made}").into());
    }
    let mut spec: serde_json::Value = serde_json::from_str(&fs::read_to_string(&config)?)?;
    spec["process"]["terminal"] = false.into();
    spec["process"]["args"] = serde_json::json!(["/bin/busybox", "echo", "!"]);
    fs::write(&config, spec.to_string())?;
    Ok(bundle)
}

/// busybox where Debian's package busybox-static has it, if it is one file that needs no other.
fn static_busybox() -> Option<PathBuf> {
    let path = PathBuf::from("/bin/busybox");
    let ldd = Command::new("ldd").arg(&path).output().ok()?;
    (path.exists() && !ldd.status.success()).then_some(path)
}

fn path_text(path: PathBuf) -> Outcome<String> {
    Ok(path.to_str().ok_or("a path that is no text")?.to_owned())
}
