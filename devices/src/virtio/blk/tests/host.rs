//! What the host does: locks, failures, missing io_uring, a full file system.

use std::path::Path;
use std::time::Duration;

use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INTERRUPT_ACK,
    VIRTIO_MMIO_INTERRUPT_STATUS,
};

use super::*;
use crate::interrupt::IrqLine;
use crate::state::Suspend;
use crate::virtio::transport::mmio::MmioTransport;

#[test]
fn a_disk_is_a_file_that_is_free() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let message = |result: Result<Disk, DiskError>| result.err().unwrap().to_string();
    let missing = message(Disk::open(&path, ReadWrite));
    assert!(
        missing.contains("for writing") && missing.contains("disk"),
        "{missing}"
    );
    fs::write(&path, [0; 511]).unwrap();
    assert!(message(Disk::open(&path, ReadOnly)).contains("511 bytes"));
    assert!(message(Disk::open(dir.path(), ReadOnly)).contains("neither"));
    assert!(message(Disk::open("/dev/null".as_ref(), ReadWrite)).contains("neither"));
    // What is beyond the last whole sector is not seen.
    fs::write(&path, [0; 1004]).unwrap();
    assert_eq!(Disk::open(&path, ReadWrite).unwrap().sectors(), 1);

    let reader = Disk::open(&path, ReadOnly).unwrap();
    let second = Disk::open(&path, ReadOnly).unwrap();
    assert!(message(Disk::open(&path, ReadWrite)).contains("in use"));
    drop((reader, second));
    let writer = Disk::open(&path, ReadWrite).unwrap();
    assert!(message(Disk::open(&path, ReadWrite)).contains("in use"));
    assert!(message(Disk::open(&path, ReadOnly)).contains("in use"));
    // A device that was started and dropped has let go of it.
    drop(Driver::started(block(writer, Engine::Sync), 0));
    Disk::open(&path, ReadWrite).unwrap();
}

#[test]
fn an_image_that_was_truncated_gives_an_error_and_no_more() {
    for engine in ENGINES {
        let mut rig = Rig::new(engine, ReadWrite, 0);
        rig.file.as_file().set_len(5 * 512 + 100).unwrap();
        let data = [(BUFFER, 1024, WRITE)];
        assert_eq!(rig.request(VIRTIO_BLK_T_IN, 5, &data), (IOERR, 1));
        assert_eq!(rig.request(VIRTIO_BLK_T_IN, 10, &data), (IOERR, 1));
        assert_eq!(rig.request(VIRTIO_BLK_T_IN, 3, &data), (OK, 1025));
    }
}

/// Writes 64 KiB while something is in flight, so that io_uring takes it.
fn write_behind_a_read(driver: &mut Driver, sector: u64) -> u8 {
    put(driver, 1, VIRTIO_BLK_T_IN, 0, &[(BUFFER, 512, WRITE)]);
    put(driver, 0, VIRTIO_BLK_T_OUT, sector, &[(HIGH, 0x1_0000, 0)]);
    driver.notify();
    driver.wait_used();
    driver.wait_used();
    let status_of = |place| driver.read(space(driver, place) + 16, 1)[0];
    assert_eq!(status_of(1), OK);
    status_of(0)
}

#[test]
fn a_write_that_the_host_refuses_gives_an_error_and_no_more() {
    for engine in ENGINES {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let disk = Disk::open(file.path(), ReadWrite)
            .unwrap()
            .with_file(File::open(file.path()).unwrap());
        let mut driver = Driver::started(block(disk, engine), 0);
        assert_eq!(write_behind_a_read(&mut driver, 0), IOERR);
        submit(&mut driver, VIRTIO_BLK_T_OUT, 0, (BUFFER, 512, 0));
        assert_eq!(status(&mut driver), IOERR);
        driver.any_request();
    }
}

#[test]
fn a_driver_without_flush_writes_through() {
    for engine in ENGINES {
        let mut rig = Rig::new(engine, ReadWrite, 1 << VIRTIO_BLK_F_FLUSH);
        rig.driver.write(BUFFER, &[9; 512]);
        assert_eq!(
            rig.request(VIRTIO_BLK_T_OUT, 2, &[(BUFFER, 512, 0)]),
            (OK, 1)
        );
        assert_eq!(rig.contents()[1024..1536], [9; 512]);
    }
}

#[test]
fn what_cannot_be_made_durable_is_an_error() {
    for engine in ENGINES {
        // It takes every write, and has no fdatasync.
        let start = |without| {
            let file = cold_file(1 << 20);
            let zero = File::options()
                .read(true)
                .write(true)
                .open("/dev/zero")
                .unwrap();
            let disk = Disk::open(file.path(), ReadWrite).unwrap().with_file(zero);
            Driver::started(block(disk, engine), without)
        };
        let mut driver = start(0);
        submit(&mut driver, VIRTIO_BLK_T_OUT, 0, (BUFFER, 512, 0));
        assert_eq!(status(&mut driver), OK);
        put(&mut driver, 0, VIRTIO_BLK_T_FLUSH, 0, &[]);
        driver.notify();
        assert_eq!(status(&mut driver), IOERR);
        // To a driver that cannot flush, a write is done when it is durable.
        let mut driver = start(1 << VIRTIO_BLK_F_FLUSH);
        submit(&mut driver, VIRTIO_BLK_T_OUT, 0, (BUFFER, 512, 0));
        assert_eq!(status(&mut driver), IOERR);
        submit(&mut driver, VIRTIO_BLK_T_IN, 0, (BUFFER, 512, WRITE));
        assert_eq!(status(&mut driver), OK);
    }
}

#[test]
fn after_a_flush_that_failed_none_succeeds() {
    let flush = |block: Box<Block>| {
        let mut driver = Driver::started(block, 0);
        put(&mut driver, 0, VIRTIO_BLK_T_FLUSH, 0, &[]);
        driver.notify();
        status(&mut driver)
    };
    for first in ENGINES {
        for second in ENGINES {
            let file = NamedTempFile::new().unwrap();
            file.as_file().set_len(1 << 20).unwrap();
            let disk = Disk::open(file.path(), ReadWrite).unwrap();
            let zero = File::open("/dev/zero").unwrap();
            let failing = block(disk.with_file(zero), first);
            let disk = Arc::clone(&failing.disk);
            assert_eq!(flush(failing), IOERR);
            // What the host says next is that all is well.
            let disk = Arc::into_inner(disk).unwrap();
            let disk = disk.with_file(file.reopen().unwrap());
            assert_eq!(flush(block(disk, second)), IOERR);
        }
    }
}

/// What was logged.
struct Messages(Mutex<Vec<String>>);

impl log::Log for Messages {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        self.0.lock().unwrap().push(record.args().to_string());
    }

    fn flush(&self) {}
}

#[test]
fn the_first_failure_of_the_host_is_reported() {
    static MESSAGES: Messages = Messages(Mutex::new(Vec::new()));
    log::set_logger(&MESSAGES).unwrap();
    log::set_max_level(log::LevelFilter::Warn);
    for engine in ENGINES {
        for (mode, is_shorter) in [(ReadWrite, false), (ReadOnly, true), (Ephemeral, true)] {
            let file = NamedTempFile::new().unwrap();
            file.as_file().set_len(1 << 20).unwrap();
            let disk = Disk::open(file.path(), mode).unwrap();
            // Open for reading only, or truncated.
            let (disk, kind, buffer) = if is_shorter {
                file.as_file().set_len(512).unwrap();
                (disk, VIRTIO_BLK_T_IN, (BUFFER, 512, WRITE))
            } else {
                let disk = disk.with_file(File::open(file.path()).unwrap());
                (disk, VIRTIO_BLK_T_OUT, (BUFFER, 512, 0))
            };
            let mut driver = Driver::started(block(disk, engine), 0);
            for _ in 0..3 {
                submit(&mut driver, kind, 1024, buffer);
                assert_eq!(status(&mut driver), IOERR);
            }
            // What a guest does wrong is no failure of the host.
            submit(&mut driver, kind, 1 << 40, buffer);
            assert_eq!(status(&mut driver), IOERR);
            let path = file.path().to_str().unwrap();
            let messages = MESSAGES.0.lock().unwrap();
            let of_disk: Vec<_> = messages.iter().filter(|m| m.contains(path)).collect();
            let [message] = of_disk[..] else {
                panic!("{engine:?} {mode:?}: {of_disk:?}");
            };
            let wanted = if is_shorter {
                "has become shorter"
            } else {
                "fails: Bad file"
            };
            assert!(message.contains(wanted), "{message}");
        }
    }
}

#[test]
fn io_uring_is_tested_here() {
    if let Err(e) = io_uring::IoUring::new(1) {
        crate::skip::skip(&format!(
            "no io_uring ({e}): the tests of its engine ran with the other one"
        ));
    }
}

/// Whether this is the process of its own that a test needs. If not, runs the test once more in one, which the shell
/// script `start` starts by `exec "$0" "$@"`.
fn is_own_process(test: &str, start: &str) -> bool {
    const MARK: &str = "MINIVMM_OWN_PROCESS";
    if std::env::var_os(MARK).is_some() {
        return true;
    }
    let output = std::process::Command::new("sh")
        .args(["-ec", start])
        .arg(std::env::current_exe().unwrap())
        .args([
            "--exact",
            &format!("virtio::blk::tests::host::{test}"),
            "--nocapture",
        ])
        .env(MARK, "1")
        .output()
        .unwrap();
    let out = String::from_utf8_lossy(&output.stdout);
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && out.contains("1 passed"),
        "{out}{err}"
    );
    false
}

#[test]
fn without_io_uring_there_is_another_way() {
    if !is_own_process(
        "without_io_uring_there_is_another_way",
        "ulimit -n 64; exec \"$0\" \"$@\"",
    ) {
        return;
    }
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(&pattern()).unwrap();
    // A ring is a file: the device is made where all others that it needs just fit.
    let mut files: Vec<File> = std::iter::from_fn(|| File::open("/dev/null").ok()).collect();
    let block = loop {
        assert!(files.pop().is_some());
        if let Ok(disk) = Disk::open(file.path(), ReadWrite)
            && let Ok(block) = Block::new(disk, "", 1, Engine::IoUring, &ThreadStarter::default())
        {
            break block;
        }
    };
    let mut driver = Driver::started(Box::new(block), 0);
    assert!(
        File::open("/dev/null").is_err(),
        "there was room for a ring"
    );
    for _ in 0..5 {
        submit(&mut driver, VIRTIO_BLK_T_IN, 1, (BUFFER, 512, WRITE));
        assert_eq!(status(&mut driver), OK);
        assert_eq!(driver.read(BUFFER, 512), pattern()[512..1024]);
    }
}

#[test]
fn a_full_host_gives_an_error_and_no_more() {
    // A file system that is nearly full, seen by one process alone.
    const UNSHARE: &str = "unshare --user --map-root-user --mount";
    let can = std::process::Command::new("sh")
        .args(["-c", &format!("{UNSHARE} true")])
        .status();
    if !can.is_ok_and(|status| status.success()) {
        return crate::skip::skip(&format!("this host has no user namespaces for {UNSHARE}"));
    }
    let start = format!(
        r#"TMPDIR=$(mktemp -d); export TMPDIR; trap 'rmdir "$TMPDIR"' EXIT
        {UNSHARE} sh -ec 'mount -t tmpfs -o size=100k tmpfs "$TMPDIR"; exec "$0" "$@"' "$0" "$@""#
    );
    if !is_own_process("a_full_host_gives_an_error_and_no_more", &start) {
        return;
    }
    // A ring keeps its file, and the room that it takes, a moment longer: that comes last.
    for (engine, mode) in [
        (Engine::Sync, ReadWrite),
        (Engine::Sync, Ephemeral),
        (Engine::IoUring, ReadWrite),
    ] {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let mut driver = multi_queue(&file, engine, mode, 1);
        let mut write = |sector| write_behind_a_read(&mut driver, sector);
        assert_eq!(write(0), OK);
        assert_eq!(write(1024), IOERR);
        // There is room again, or no need for more.
        assert_eq!(write(0), OK);
        submit(&mut driver, VIRTIO_BLK_T_FLUSH, 0, (BUFFER, 0, 0));
        assert_eq!(status(&mut driver), OK);
    }
}

#[test]
fn a_driver_is_told_of_what_is_behind_a_disk_that_was_empty() {
    let empty = NamedTempFile::new().unwrap();
    let drive = |path: &Path| {
        let options = DiskOptions {
            force_raw: true,
            ..DiskMode::ReadOnly.into()
        };
        block(Disk::open(path, options).unwrap(), Engine::Sync)
    };
    let mut driver = Driver::started(drive(empty.path()), 0);
    let full = NamedTempFile::new().unwrap();
    full.as_file().set_len(8 << 9).unwrap();
    driver.restore(|| drive(full.path()));
    assert!(driver.transport.resume());
    assert_eq!(driver.get(VIRTIO_MMIO_CONFIG), 8);
    let changed = driver.get(VIRTIO_MMIO_INTERRUPT_STATUS) & VIRTIO_MMIO_INT_CONFIG;
    assert_eq!(changed, VIRTIO_MMIO_INT_CONFIG);
    driver.set(VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INT_CONFIG);
    // It is told once, and a disk that was not empty cannot become another.
    driver.restore(|| drive(full.path()));
    assert!(driver.transport.resume());
    assert_eq!(
        driver.get(VIRTIO_MMIO_INTERRUPT_STATUS) & VIRTIO_MMIO_INT_CONFIG,
        0
    );
    assert!(driver.transport.pause(Duration::from_secs(20)));
    let record = driver.transport.save().unwrap();
    full.as_file().set_len(9 << 9).unwrap();
    let other = drive(full.path());
    let mut other = MmioTransport::new(other, driver.mem.clone(), IrqLine::new(|| Ok(())));
    assert!(other.restore(&record).is_err());
}
