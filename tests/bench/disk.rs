//! virtio-blk side by side: minivmm's two engines and QEMU's microvm, with the same kernel, guest and image.
//!
//! `make bench`, or `cargo bench --bench disk -- [ROUNDS]` where KVM can boot stock kernels. The guest is the Debian of
//! guest-kernels/debian-disk, which runs fio and nothing else. Every round boots each of them once.

#[path = "../common/mod.rs"]
mod common;
mod host;

use std::error::Error;
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{project, wait};
use host::{command_line, host, load};
use minivmm::config::DEFAULT_CMDLINE;

/// Rounds, unless the command line says otherwise.
const ROUNDS: usize = 3;
/// Longest that a guest may take.
const PATIENCE: Duration = Duration::from_secs(300);
/// Bytes of the disk that is measured. All of it is written before, so that it lies in the host's page cache for all.
const DISK_LEN: u64 = 256 << 20;

const QEMU: &str = "qemu-system-x86_64";

/// What fio does: the table's line, and its job.
const JOBS: [(&str, &str); 5] = [
    (
        "4 KiB random read, depth 1",
        "--rw=randread --bs=4k --iodepth=1",
    ),
    (
        "4 KiB random read, depth 32",
        "--rw=randread --bs=4k --iodepth=32",
    ),
    (
        "4 KiB random write, depth 1",
        "--rw=randwrite --bs=4k --iodepth=1",
    ),
    (
        "4 KiB random write, depth 32",
        "--rw=randwrite --bs=4k --iodepth=32",
    ),
    (
        "1 MiB sequential read, depth 4",
        "--rw=read --bs=1M --iodepth=4",
    ),
];
/// Seconds that each job runs.
const SECONDS: u32 = 5;

type Outcome<T> = Result<T, Box<dyn Error>>;

/// One column of the table.
struct Column {
    name: &'static str,
    command: Command,
    /// Requests a second, by job and round.
    iops: [Vec<f64>; JOBS.len()],
}

impl Column {
    fn new(name: &'static str, command: Command) -> Self {
        Self {
            name,
            command,
            iops: Default::default(),
        }
    }

    /// Boots once, and notes what fio says.
    fn run(&mut self) -> Outcome<()> {
        let child = self
            .command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let output = wait(child, PATIENCE);
        let text = String::from_utf8_lossy(&output.stdout);
        let fail = |what| {
            let stderr = String::from_utf8_lossy(&output.stderr);
            format!("{}: {what} in: {text}\n{stderr}", self.name)
        };
        if !output.status.success() {
            return Err(fail(output.status.to_string()).into());
        }
        for (index, job) in self.iops.iter_mut().enumerate() {
            let iops = fio_iops(&text, &job_name(index));
            job.push(iops.ok_or_else(|| fail(format!("no result of job {index}")))?);
        }
        Ok(())
    }

    fn median(&self, job: usize) -> f64 {
        let mut runs = self.iops[job].clone();
        runs.sort_by(f64::total_cmp);
        runs[runs.len() / 2]
    }
}

fn job_name(index: usize) -> String {
    format!("job{index}")
}

/// Reads and writes a second in fio's terse output, version 3: fields 8 and 49 of the line with the job's name.
fn fio_iops(text: &str, job: &str) -> Option<f64> {
    let line = text
        .lines()
        .find(|line| line.starts_with("3;") && line.contains(&format!(";{job};")))?;
    let field = |n: usize| line.split(';').nth(n - 1)?.parse::<f64>().ok();
    Some(field(8)? + field(49)?).filter(|iops| *iops > 0.0)
}

fn main() -> Outcome<()> {
    // Cargo adds --bench.
    let rounds = match std::env::args().skip(1).find(|arg| arg != "--bench") {
        Some(arg) => arg
            .parse()
            .ok()
            .filter(|rounds| *rounds > 0)
            .ok_or(format!("{arg} is no number of rounds"))?,
        None => ROUNDS,
    };
    let mut disk = tempfile::NamedTempFile::new()?;
    std::io::copy(&mut File::open("/dev/urandom")?.take(DISK_LEN), &mut disk)?;
    disk.flush()?;
    let mut columns = columns(disk.path())?;
    let host = host(&[QEMU]);
    for round in 1..=rounds {
        for column in &mut columns {
            eprintln!("round {round} of {rounds}: {}", column.name);
            column.run()?;
        }
    }

    println!(
        "virtio-blk, requests a second as fio counts them in the guest, {SECONDS} s a job, O_DIRECT in the guest, the \
         host's\npage cache beneath; medians of {rounds} rounds, in each of which every VMM boots once. In brackets, times \
         QEMU's.\n"
    );
    print!("{:<32}", "");
    for column in &columns {
        print!(" {:>22}", column.name);
    }
    println!();
    for (index, (name, _)) in JOBS.iter().enumerate() {
        print!("{name:<32}");
        // QEMU is the last.
        let qemu = columns
            .last()
            .map_or(f64::NAN, |column| column.median(index));
        for column in &columns {
            let median = column.median(index);
            print!(" {:>14.0} ({:>5.2})", median, median / qemu);
        }
        println!();
    }
    println!();
    for column in &columns {
        println!("{}: {}", column.name, command_line(&column.command));
    }
    println!("\n{host}; load average {} after", load());
    Ok(())
}

/// What a script of guest-kernels/ prints: where a guest is.
fn guest(script: &str, args: &[&str]) -> Outcome<String> {
    let output = Command::new(project("guest-kernels").join(script))
        .args(args)
        .stderr(Stdio::inherit())
        .output()?;
    if !output.status.success() {
        return Err(format!("{script}: {}", output.status).into());
    }
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

/// All that is to be measured, QEMU last.
fn columns(disk: &Path) -> Outcome<Vec<Column>> {
    let kernel = format!("{}/bzImage", guest("fetch", &["--offline", "cloud"])?);
    let initrd = guest("debian-initrd", &["cloud"])?;
    let root = guest("debian-disk", &[])?;
    let disk = disk.display();

    let jobs: String = JOBS
        .iter()
        .enumerate()
        .map(|(index, (_, job))| format!(" --name={} --stonewall {job}", job_name(index)))
        .collect();
    // Which of vda and vdb is which differs between the two.
    let script = format!(
        "for d in vda vdb; do grep -q bench /sys/block/$d/serial && disk=$d; done; mount -t tmpfs tmp /tmp; cd /tmp; \
         fio --minimal --filename=/dev/$disk --direct=1 --ioengine=libaio --time_based --runtime={SECONDS} \
         --randrepeat=0 --norandommap{jobs}; poweroff -f"
    );
    let cmdline = format!("{DEFAULT_CMDLINE} root=LABEL=debian ro init=/bin/sh -- -c \"{script}\"");

    let minivmm = |engine: &str| {
        let mut command = common::minivmm(&["--memory", "512M", "--kernel", &kernel]);
        command.args(["--initrd", &initrd, "--cmdline", &cmdline]);
        command.args(["--disk", &format!("path={root},ro,engine={engine}")]);
        command.args(["--disk", &format!("path={disk},id=bench,engine={engine}")]);
        command
    };
    let mut qemu = Command::new(QEMU);
    qemu.args(
        "-M microvm,pit=off,pic=off,rtc=off,acpi=on -enable-kvm -cpu host -m 512M -nodefaults -no-user-config -no-reboot \
         -display none -serial stdio"
            .split(' '),
    );
    qemu.args(["-kernel", &kernel, "-initrd", &initrd, "-append", &cmdline]);
    for (id, file, more) in [
        ("root", &root, "readonly=on,"),
        ("bench", &disk.to_string(), ""),
    ] {
        // Its default cache mode, as minivmm's: the host's page cache, flushed when the guest asks for it.
        let drive = format!("file={file},format=raw,if=none,id={id},{more}aio=io_uring");
        let device = format!("virtio-blk-device,drive={id},serial={id}");
        qemu.args(["-drive", &drive, "-device", &device]);
    }
    Ok(vec![
        Column::new("minivmm, io_uring", minivmm("io_uring")),
        Column::new("minivmm, sync", minivmm("sync")),
        Column::new("QEMU microvm, io_uring", qemu),
    ])
}
