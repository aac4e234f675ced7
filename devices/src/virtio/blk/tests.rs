use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::sync::Mutex;

use proptest::prelude::*;
use tempfile::NamedTempFile;
use virtio_bindings::virtio_blk::*;

use super::*;
use crate::block::Access::{self, Ephemeral, ReadOnly, ReadWrite};
use crate::block::{DiskError, DiskOptions};
use crate::bus::BusDevice;
use crate::virtio::testing::{DATA, Driver, END, HIGH, INDIRECT, NEXT, SEAM, WRITE};

const OK: u8 = VIRTIO_BLK_S_OK as u8;
const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;

const ENGINES: [Engine; 2] = [Engine::IoUring, Engine::Sync];

/// Sectors of the test disk.
const SECTORS: u64 = 67;
const STATUS: u64 = DATA + 0x100;
const BUFFER: u64 = DATA + 0x8000;

/// What the test disk contains at first.
fn pattern() -> Vec<u8> {
    (0..SECTORS * 512)
        .map(|n| (n / 512 * 7 + n % 251) as u8)
        .collect()
}

struct Rig {
    driver: Driver,
    file: NamedTempFile,
}

impl Rig {
    fn new(engine: Engine, access: Access, without: u64) -> Self {
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(&pattern()).unwrap();
        let disk = Disk::open(file.path(), access).unwrap();
        let driver = Driver::started(
            Box::new(Block::new(disk, "a-serial", 1, engine, &ThreadStarter::default()).unwrap()),
            without,
        );
        Self { driver, file }
    }

    fn header(&self, kind: u32, sector: u64) {
        self.driver.write(DATA, &header(kind, sector));
    }

    /// A request of header, `data` and status; gives the status and the length written.
    fn request(&mut self, kind: u32, sector: u64, data: &[(u64, u32, u16)]) -> (u8, u32) {
        self.header(kind, sector);
        let mut chain = vec![(DATA, 16, 0)];
        chain.extend_from_slice(data);
        chain.push((STATUS, 1, WRITE));
        self.chain(&chain)
    }

    /// A chain whose status is at [`STATUS`].
    fn chain(&mut self, chain: &[(u64, u32, u16)]) -> (u8, u32) {
        self.driver.write(STATUS, &[0xee]);
        let len = self.driver.request(chain);
        (self.driver.read(STATUS, 1)[0], len)
    }

    fn contents(&self) -> Vec<u8> {
        fs::read(self.file.path()).unwrap()
    }
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0xaa; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

/// A disk of `queues` queues on this file, started.
fn multi_queue(file: &NamedTempFile, engine: Engine, access: Access, queues: u16) -> Driver {
    let disk = Disk::open(file.path(), access).unwrap();
    let mut driver = Driver::new(Box::new(
        Block::new(disk, "", queues, engine, &ThreadStarter::default()).unwrap(),
    ));
    driver.queues = 0..queues;
    driver.start(0);
    driver
}

#[test]
fn the_configuration_says_what_the_disk_is() {
    for engine in ENGINES {
        let mut rig = Rig::new(engine, ReadWrite, 0);
        let mut config = [0; 60];
        rig.driver.transport.read(0x100, &mut config);
        let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
        assert_eq!(u64::from_le_bytes(config[..8].try_into().unwrap()), SECTORS);
        assert_eq!((word(12), word(20)), (254, 512));
        assert_eq!((config[24], config[26]), (3, 8), "4 KiB physical blocks");
        assert_eq!((word(36), word(40), word(44)), (MAX_DISCARD_SECTORS, 1, 8));
        assert_eq!(
            (word(48), word(52), config[56]),
            (MAX_WRITE_ZEROES_SECTORS, 1, 1)
        );
        let writes = 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
        assert_eq!(rig.driver.offered() & writes, writes);
        let mut rig = Rig::new(engine, ReadOnly, 0);
        assert_eq!(rig.driver.offered() & writes, 0);
        assert_ne!(rig.driver.offered() & 1 << VIRTIO_BLK_F_RO, 0);
    }
}

#[test]
fn larger_sectors_leave_offsets_and_capacity_in_units_of_512() {
    for engine in ENGINES {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let options = DiskOptions {
            block_size: Some(4096),
            ..ReadWrite.into()
        };
        let disk = Disk::open(file.path(), options).unwrap();
        let mut driver = Driver::started(
            Box::new(Block::new(disk, "", 1, engine, &ThreadStarter::default()).unwrap()),
            0,
        );
        let mut config = [0; 60];
        driver.transport.read(0x100, &mut config);
        let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
        assert_eq!((word(0), word(20)), (2048, 4096));
        assert_eq!((config[24], config[26], word(44)), (0, 1, 8));
        assert_ne!(driver.offered() & 1 << VIRTIO_BLK_F_BLK_SIZE, 0);
        file.as_file().write_all_at(&[7; 4096], 16 * 512).unwrap();
        submit(&mut driver, VIRTIO_BLK_T_IN, 16, (BUFFER, 4096, WRITE));
        assert_eq!(status(&mut driver), OK);
        assert_eq!(driver.read(BUFFER, 4096), [7; 4096]);
        // To a driver that does not know of it, sectors have 512 bytes (§ 5.2.5).
        submit(&mut driver, VIRTIO_BLK_T_IN, 23, (BUFFER, 512, WRITE));
        assert_eq!(status(&mut driver), OK);
        submit(&mut driver, VIRTIO_BLK_T_IN, 2041, (BUFFER, 4096, WRITE));
        assert_eq!(status(&mut driver), IOERR);
    }
}

#[test]
fn reads_and_writes_move_the_right_bytes() {
    for engine in ENGINES {
        let mut rig = Rig::new(engine, ReadWrite, 0);
        let data = [(BUFFER, 1024, WRITE)];
        assert_eq!(rig.request(VIRTIO_BLK_T_IN, 3, &data), (OK, 1025));
        assert_eq!(rig.driver.read(BUFFER, 1024), pattern()[3 * 512..5 * 512]);
        // The whole disk into buffers of odd sizes, one of them across two regions and one above the gap.
        let rest = (SECTORS * 512) as u32 - 1000 - 333;
        let data = [
            (SEAM - 10, 1000, WRITE),
            (BUFFER, 333, WRITE),
            (HIGH, rest, WRITE),
        ];
        assert_eq!(
            rig.request(VIRTIO_BLK_T_IN, 0, &data),
            (OK, (SECTORS * 512) as u32 + 1)
        );
        let mut got = rig.driver.read(SEAM - 10, 1000);
        got.extend(rig.driver.read(BUFFER, 333));
        got.extend(rig.driver.read(HIGH, rest as usize));
        assert!(got == pattern());

        let mut wanted = pattern();
        wanted[66 * 512..].fill(0x5a);
        rig.driver.write(END - 200, &[0x5a; 200]);
        rig.driver.write(SEAM - 100, &[0x5a; 312]);
        let data = [(END - 200, 200, 0), (SEAM - 100, 312, 0)];
        assert_eq!(rig.request(VIRTIO_BLK_T_OUT, 66, &data), (OK, 1));
        assert!(rig.contents() == wanted);
        assert_eq!(rig.request(VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 1));
    }
}

#[test]
fn a_header_and_a_status_may_lie_anywhere() {
    for engine in ENGINES {
        let mut rig = Rig::new(engine, ReadWrite, 0);
        rig.header(VIRTIO_BLK_T_IN, 1);
        // The header in three pieces, the status in the data's last descriptor, and an empty descriptor.
        let chain = [
            (DATA, 5, 0),
            (DATA + 5, 10, 0),
            (DATA + 15, 1, 0),
            (BUFFER, 0, WRITE),
            (STATUS - 512, 513, WRITE),
        ];
        assert_eq!(rig.chain(&chain), (OK, 513));
        assert_eq!(rig.driver.read(STATUS - 512, 512), pattern()[512..1024]);
        // Data that follow the header in its descriptor.
        rig.driver.write(BUFFER, &[0; 16]);
        rig.driver.write(BUFFER, &VIRTIO_BLK_T_OUT.to_le_bytes());
        rig.driver.write(BUFFER + 16, &[7; 512]);
        assert_eq!(rig.chain(&[(BUFFER, 528, 0), (STATUS, 1, WRITE)]), (OK, 1));
        assert_eq!(rig.contents()[..512], [7; 512]);
    }
}

#[test]
fn bad_requests_get_their_status() {
    for engine in ENGINES {
        let mut rig = Rig::new(engine, ReadWrite, 0);
        let sector = |len| [(BUFFER, len, WRITE)];
        let given = |len| [(BUFFER, len, 0)];
        let (read, write) = (VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT);
        for (case, status, kind, at, data) in [
            ("no data", IOERR, read, 0, &[][..]),
            ("no data to write", IOERR, write, 0, &[]),
            ("half a sector", IOERR, read, 0, &sector(256)),
            ("a sector and a byte", IOERR, read, 0, &sector(513)),
            ("past the end", IOERR, read, SECTORS, &sector(512)),
            ("over the end", IOERR, read, SECTORS - 1, &sector(1024)),
            ("sectors overflow", IOERR, read, u64::MAX, &sector(512)),
            ("bytes overflow", IOERR, read, u64::MAX / 512, &sector(512)),
            ("bytes wrap to 0", IOERR, read, 1 << 55, &sector(512)),
            ("off_t overflows", IOERR, read, 1 << 54, &sector(512)),
            ("write past the end", IOERR, write, SECTORS, &given(512)),
            ("write overflows", IOERR, write, u64::MAX, &given(512)),
            ("read into readable", IOERR, read, 0, &given(512)),
            ("write from writable", IOERR, write, 0, &sector(512)),
            (
                "both ways",
                IOERR,
                read,
                0,
                &[(BUFFER, 512, 0), (BUFFER, 512, WRITE)],
            ),
            (
                "flush with data",
                IOERR,
                VIRTIO_BLK_T_FLUSH,
                0,
                &sector(512),
            ),
            ("short ID", IOERR, VIRTIO_BLK_T_GET_ID, 0, &sector(19)),
            (
                "ID the wrong way",
                IOERR,
                VIRTIO_BLK_T_GET_ID,
                0,
                &given(20),
            ),
            ("unknown", UNSUPP, 77, 0, &sector(512)),
            ("SCSI", UNSUPP, VIRTIO_BLK_T_SCSI_CMD, 0, &sector(512)),
            ("lifetime", UNSUPP, 10, 0, &sector(512)),
            (
                "secure erase",
                UNSUPP,
                VIRTIO_BLK_T_SECURE_ERASE,
                0,
                &given(16),
            ),
            ("all ones", UNSUPP, u32::MAX, 0, &[]),
        ] {
            assert_eq!(rig.request(kind, at, data), (status, 1), "{case}");
        }
        for len in [0, 1, 15] {
            let chain = [(DATA, len, 0), (STATUS, 1, WRITE)];
            assert_eq!(rig.chain(&chain), (IOERR, 1), "a header of {len}");
        }
        assert_eq!(rig.chain(&[(STATUS, 1, WRITE)]), (IOERR, 1), "no header");
        assert!(rig.contents() == pattern());
        let data = [(BUFFER, 20, WRITE)];
        assert_eq!(rig.request(VIRTIO_BLK_T_GET_ID, 0, &data), (OK, 21));
        assert_eq!(
            rig.driver.read(BUFFER, 20),
            *b"a-serial\0\0\0\0\0\0\0\0\0\0\0\0"
        );
    }
}

#[test]
fn a_request_without_a_status_needs_a_reset() {
    for engine in ENGINES {
        let mut rig = Rig::new(engine, ReadWrite, 0);
        for chain in [
            &[(DATA, 16, 0)][..],
            &[(DATA, 16, 0), (BUFFER, 512, 0)],
            &[(DATA, 16, 0), (STATUS, 0, WRITE)],
            &[(DATA, 0, 0)],
        ] {
            rig.driver.start(0);
            rig.header(VIRTIO_BLK_T_OUT, 0);
            rig.driver.chain(0, chain);
            rig.driver.offer(0);
            rig.driver.notify();
            rig.driver.expect_needs_reset("no status");
        }
        assert!(rig.contents() == pattern());
    }
}

#[test]
fn a_read_only_disk_stays_as_it_is() {
    for engine in ENGINES {
        let mut rig = Rig::new(engine, ReadOnly, 0);
        let clear = [(BUFFER, 16, 0)];
        rig.driver.write(BUFFER, &segment(0, 8, 0));
        assert_eq!(rig.request(VIRTIO_BLK_T_DISCARD, 0, &clear), (IOERR, 1));
        assert_eq!(
            rig.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, &clear),
            (IOERR, 1)
        );
        assert_eq!(
            rig.request(VIRTIO_BLK_T_OUT, 0, &[(BUFFER, 512, 0)]),
            (IOERR, 1)
        );
        assert_eq!(rig.request(VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 1));
        assert_eq!(
            rig.request(VIRTIO_BLK_T_IN, 0, &[(BUFFER, 512, WRITE)]),
            (OK, 513)
        );
        assert!(rig.contents() == pattern());
    }
}

fn segment(sector: u64, count: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(count.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

#[test]
fn discard_and_write_zeroes() {
    for engine in ENGINES {
        let mut rig = Rig::new(engine, ReadWrite, 0);
        let mut run = |kind, sector, count, flags, len| {
            rig.driver.write(BUFFER, &[0; 64]);
            rig.driver.write(BUFFER, &segment(sector, count, flags));
            rig.request(kind, 0, &[(BUFFER, len, 0)]).0
        };
        let (discard, zeroes) = (VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES);
        for (case, status, kind, sector, count, flags, len) in [
            ("no sectors", IOERR, discard, 0, 0, 0, 16),
            (
                "too many sectors",
                IOERR,
                discard,
                0,
                MAX_DISCARD_SECTORS + 1,
                0,
                16,
            ),
            (
                "too many zeroes",
                IOERR,
                zeroes,
                0,
                MAX_WRITE_ZEROES_SECTORS + 1,
                0,
                16,
            ),
            ("u32::MAX", IOERR, zeroes, 0, u32::MAX, 0, 16),
            ("over the end", IOERR, zeroes, SECTORS - 1, 2, 0, 16),
            ("overflow", IOERR, discard, u64::MAX, 1, 0, 16),
            ("discard with a flag", UNSUPP, discard, 0, 1, 1, 16),
            ("an unknown flag", UNSUPP, zeroes, 0, 1, 2, 16),
            ("a short segment", IOERR, zeroes, 0, 1, 0, 15),
            ("a long segment", IOERR, zeroes, 0, 1, 0, 17),
            ("two segments", IOERR, zeroes, 0, 1, 0, 32),
            ("none", IOERR, zeroes, 0, 1, 0, 0),
            ("discard", OK, discard, 8, 8, 0, 16),
            ("zeroes", OK, zeroes, 17, 1, 0, 16),
            ("zeroes, unmapped", OK, zeroes, 65, 2, 1, 16),
        ] {
            assert_eq!(run(kind, sector, count, flags, len), status, "{case}");
        }
        let mut wanted = pattern();
        wanted[8 * 512..16 * 512].fill(0);
        wanted[17 * 512..18 * 512].fill(0);
        wanted[65 * 512..].fill(0);
        assert!(rig.contents() == wanted);
    }
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
        let mut driver = Driver::started(
            Box::new(Block::new(disk, "", 1, engine, &ThreadStarter::default()).unwrap()),
            0,
        );
        assert_eq!(write_behind_a_read(&mut driver, 0), IOERR);
        submit(&mut driver, VIRTIO_BLK_T_OUT, 0, (BUFFER, 512, 0));
        assert_eq!(status(&mut driver), IOERR);
        driver.any_request();
    }
}

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
    drop(Driver::started(
        Box::new(Block::new(writer, "", 1, Engine::Sync, &ThreadStarter::default()).unwrap()),
        0,
    ));
    Disk::open(&path, ReadWrite).unwrap();
}

/// Puts a request in the driver's current queue, without a word to the device; its head is 4 times `place`.
fn put(driver: &mut Driver, place: u16, kind: u32, sector: u64, data: &[(u64, u32, u16)]) {
    let space = space(driver, place);
    driver.write(space, &header(kind, sector));
    driver.write(space + 16, &[0xee]);
    let mut chain = vec![(space, 16, 0)];
    chain.extend_from_slice(data);
    chain.push((space + 16, 1, WRITE));
    driver.chain(4 * place, &chain);
    driver.offer(4 * place);
}

/// Where the header and the status of a request are.
fn space(driver: &Driver, place: u16) -> u64 {
    DATA + 0x800 * u64::from(driver.queue) + 0x20 * u64::from(place)
}

/// A request alone in the driver's current queue.
fn submit(driver: &mut Driver, kind: u32, sector: u64, data: (u64, u32, u16)) {
    put(driver, 0, kind, sector, &[data]);
    driver.notify();
}

/// Waits for it and gives its status.
fn status(driver: &mut Driver) -> u8 {
    driver.wait_used();
    driver.read(space(driver, 0) + 16, 1)[0]
}

#[test]
fn every_queue_works_alone_and_with_the_others() {
    for engine in ENGINES {
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(&pattern()).unwrap();
        let mut driver = multi_queue(&file, engine, ReadWrite, MAX_QUEUES);
        let mut config = [0; 2];
        driver.transport.read(0x100 + 34, &mut config);
        assert_eq!(u16::from_le_bytes(config), MAX_QUEUES);
        let round = |driver: &mut Driver, queues: &[u16]| {
            for queue in queues {
                driver.queue = *queue;
                let at = BUFFER + 512 * u64::from(*queue);
                driver.write(at, &[0; 512]);
                submit(driver, VIRTIO_BLK_T_IN, u64::from(*queue), (at, 512, WRITE));
            }
            for queue in queues {
                driver.queue = *queue;
                assert_eq!(status(driver), OK);
                let at = 512 * usize::from(*queue);
                assert_eq!(
                    driver.read(BUFFER + at as u64, 512),
                    pattern()[at..at + 512]
                );
            }
        };
        let all: Vec<u16> = (0..MAX_QUEUES).collect();
        for _ in 0..20 {
            round(&mut driver, &all);
        }
        // One is taken back; the others go on from where they stand.
        driver.take_back(3);
        let others: Vec<u16> = all.iter().copied().filter(|queue| *queue != 3).collect();
        for _ in 0..20 {
            round(&mut driver, &others);
        }
        driver.queue = 3;
        let before = driver.used_index();
        driver.offer(0);
        driver.notify();
        // Again with fewer queues than there are, and a reset under requests of all.
        for queues in [2, MAX_QUEUES] {
            driver.queues = 0..queues;
            driver.start(0);
            round(&mut driver, &all[..queues.into()]);
        }
        assert_eq!(before, 20);
        for queue in all {
            driver.queue = queue;
            submit(&mut driver, VIRTIO_BLK_T_IN, 0, (BUFFER, 512, WRITE));
        }
        driver.reset();
        let before: Vec<u16> = (0..MAX_QUEUES)
            .map(|queue| used_of(&mut driver, queue))
            .collect();
        std::thread::yield_now();
        let after: Vec<u16> = (0..MAX_QUEUES)
            .map(|queue| used_of(&mut driver, queue))
            .collect();
        assert_eq!(before, after);
        driver.start(0);
        driver.any_request();
    }
}

fn used_of(driver: &mut Driver, queue: u16) -> u16 {
    driver.queue = queue;
    driver.used_index()
}

#[test]
fn a_fault_in_one_queue_stops_all() {
    for engine in ENGINES {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let mut driver = multi_queue(&file, engine, ReadWrite, 2);
        driver.queue = 1;
        driver.offer(999);
        driver.notify();
        driver.expect_needs_reset("a bad head in queue 1");
    }
}

/// What the queues of an ephemeral disk do at once: each a change of its own sectors, and a look at any.
#[derive(Debug, Clone, Copy)]
struct Change {
    kind: u32,
    sector: u64,
    count: u64,
    value: u8,
}

fn changes() -> impl Strategy<Value = Vec<Change>> {
    let kind = prop_oneof![
        4 => Just(VIRTIO_BLK_T_OUT),
        1 => Just(VIRTIO_BLK_T_DISCARD),
        1 => Just(VIRTIO_BLK_T_WRITE_ZEROES),
    ];
    let change =
        (kind, 0..SECTORS, 1u64..20, any::<u8>()).prop_map(|(kind, sector, count, value)| Change {
            kind,
            sector,
            count: count.min(SECTORS - sector),
            value,
        });
    proptest::collection::vec(change, 1..80)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Of changes that go on at once in several queues, in one cluster too, none is lost and none touches what lies beside
    /// it; the base stays as it is.
    #[test]
    fn an_ephemeral_disk_is_a_disk(changes in changes()) {
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(&pattern()).unwrap();
        let mut driver = multi_queue(&file, Engine::Sync, Ephemeral, 4);
        let mut model = pattern();
        let mut changes = &changes[..];
        while !changes.is_empty() {
            // As many as do not overlap, one a queue.
            let mut taken = [false; SECTORS as usize];
            let mut queues = 0;
            while let Some((change, rest)) = changes.split_first().filter(|_| queues < 4) {
                let sectors = change.sector as usize..(change.sector + change.count) as usize;
                if taken[sectors.clone()].contains(&true) {
                    break;
                }
                taken[sectors.clone()].fill(true);
                let bytes = sectors.start * 512..sectors.end * 512;
                driver.queue = queues;
                let buffer = BUFFER + 0x4000 * u64::from(queues);
                let data = if change.kind == VIRTIO_BLK_T_OUT {
                    // Different in every byte's neighbourhood.
                    let bytes_out: Vec<u8> = bytes.clone().map(|n| change.value ^ (n / 3) as u8).collect();
                    driver.write(buffer, &bytes_out);
                    model[bytes].copy_from_slice(&bytes_out);
                    (buffer, bytes_out.len() as u32, 0)
                } else {
                    driver.write(buffer, &segment(change.sector, change.count as u32, 0));
                    model[bytes].fill(0);
                    (buffer, 16, 0)
                };
                submit(&mut driver, change.kind, change.sector, data);
                (queues, changes) = (queues + 1, rest);
            }
            for queue in 0..queues {
                driver.queue = queue;
                prop_assert_eq!(status(&mut driver), OK);
            }
            driver.queue = 0;
            let odd = BUFFER + 0x4000;
            let whole = SECTORS as u32 * 512;
            submit(&mut driver, VIRTIO_BLK_T_IN, 0, (odd, whole, WRITE));
            prop_assert_eq!(status(&mut driver), OK);
            prop_assert!(driver.read(odd, whole as usize) == model);
        }
        drop(driver);
        prop_assert!(fs::read(file.path()).unwrap() == pattern());
    }
}

#[test]
fn many_share_the_base_of_an_ephemeral_disk() {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(&pattern()).unwrap();
    let mut one = multi_queue(&file, Engine::Sync, Ephemeral, 1);
    let mut other = multi_queue(&file, Engine::Sync, Ephemeral, 1);
    let reader = Disk::open(file.path(), ReadOnly).unwrap();
    assert!(Disk::open(file.path(), ReadWrite).is_err());
    drop(reader);
    assert_eq!(one.offered() & 1 << VIRTIO_BLK_F_RO, 0);
    one.write(BUFFER, &[1; 512]);
    submit(&mut one, VIRTIO_BLK_T_OUT, 66, (BUFFER, 512, 0));
    assert_eq!(status(&mut one), OK);
    submit(&mut other, VIRTIO_BLK_T_IN, 66, (BUFFER, 512, WRITE));
    assert_eq!(status(&mut other), OK);
    assert_eq!(other.read(BUFFER, 512), pattern()[66 * 512..]);
    // A change that needs bytes of a base that has gone fails, and does no more.
    file.as_file().set_len(512).unwrap();
    submit(&mut one, VIRTIO_BLK_T_OUT, 1, (BUFFER, 512, 0));
    assert_eq!(status(&mut one), IOERR);
    submit(&mut one, VIRTIO_BLK_T_OUT, 8, (BUFFER, 4096, 0));
    assert_eq!(status(&mut one), OK);
}

#[test]
fn an_ephemeral_disk_has_limits() {
    let file = NamedTempFile::new().unwrap();
    // Not every file system has files so long.
    if file.as_file().set_len((1 << 44) + 512).is_ok() {
        let error = Disk::open(file.path(), Ephemeral)
            .err()
            .unwrap()
            .to_string();
        assert!(error.contains("16 TiB"), "{error}");
    }
}

#[test]
fn many_requests_are_in_flight_at_once() {
    const COUNT: u16 = 60;
    for engine in ENGINES {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let disk = Disk::open(file.path(), ReadWrite).unwrap();
        let mut driver = Driver::new(Box::new(
            Block::new(disk, "", 1, engine, &ThreadStarter::default()).unwrap(),
        ));
        driver.size = 256;
        driver.start(0);
        let buffer = |place: u16| HIGH + 0x2000 * u64::from(place);
        for round in 0..20u8 {
            // Writes, with a flush among them and what fails; then reads of what was written.
            for kind in [VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_IN] {
                for place in 0..COUNT {
                    let is_write = kind == VIRTIO_BLK_T_OUT;
                    let sector = u64::from(place) * 8;
                    let value = if is_write { round ^ place as u8 } else { 0xff };
                    driver.write(buffer(place), &[value; 4096]);
                    let flags = if is_write { 0 } else { WRITE };
                    match place % 10 {
                        7 => put(&mut driver, place, VIRTIO_BLK_T_FLUSH, 0, &[]),
                        8 => put(
                            &mut driver,
                            place,
                            kind,
                            1 << 40,
                            &[(buffer(place), 512, flags)],
                        ),
                        _ => {
                            let (first, second) = (
                                (buffer(place), 1000, flags),
                                (buffer(place) + 1000, 3096, flags),
                            );
                            put(&mut driver, place, kind, sector, &[first, second]);
                        }
                    }
                }
                driver.notify();
                let mut done = [false; COUNT as usize];
                for _ in 0..COUNT {
                    let (head, len) = driver.wait_used();
                    let place = head as u16 / 4;
                    assert!(
                        !std::mem::replace(&mut done[usize::from(place)], true),
                        "{head} twice"
                    );
                    let status = driver.read(space(&driver, place) + 16, 1)[0];
                    let (wanted, moved) = match place % 10 {
                        7 => (OK, 0),
                        8 => (IOERR, 0),
                        _ if kind == VIRTIO_BLK_T_IN => (OK, 4096),
                        _ => (OK, 0),
                    };
                    assert_eq!((status, len), (wanted, moved + 1), "{place}");
                    if moved > 0 {
                        assert_eq!(
                            driver.read(buffer(place), 4096),
                            [round ^ place as u8; 4096]
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn as_many_requests_as_the_queue_has_entries_are_in_flight_at_once() {
    const COUNT: u16 = 256;
    for engine in ENGINES {
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(&pattern()).unwrap();
        let disk = Disk::open(file.path(), ReadWrite).unwrap();
        let mut driver = Driver::new(Box::new(
            Block::new(disk, "", 1, engine, &ThreadStarter::default()).unwrap(),
        ));
        driver.size = COUNT;
        driver.start(0);
        // An indirect table each, so that they take one entry each.
        let place = |head: u16| HIGH + 0x1000 * u64::from(head);
        for head in 0..COUNT {
            let (table, sector) = (place(head), u64::from(head) % SECTORS);
            driver.write(table + 0x100, &header(VIRTIO_BLK_T_IN, sector));
            driver.descriptor_in(table, 0, table + 0x100, 16, NEXT, 1);
            driver.descriptor_in(table, 1, table + 0x200, 512, NEXT | WRITE, 2);
            driver.descriptor_in(table, 2, table + 0x400, 1, WRITE, 0);
            driver.descriptor(head, table, 3 * 16, INDIRECT, 0);
            driver.offer(head);
        }
        driver.notify();
        for _ in 0..COUNT {
            assert_eq!(driver.wait_used().1, 513);
        }
        for head in 0..COUNT {
            let at = usize::from(head) % SECTORS as usize * 512;
            assert_eq!(
                driver.read(place(head) + 0x200, 512),
                pattern()[at..at + 512]
            );
            assert_eq!(driver.read(place(head) + 0x400, 1), [OK]);
        }
    }
}

#[test]
fn a_head_in_flight_cannot_be_made_available_again() {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let mut driver = multi_queue(&file, Engine::IoUring, ReadWrite, 1);
    put(&mut driver, 0, VIRTIO_BLK_T_IN, 0, &[(BUFFER, 512, WRITE)]);
    driver.offer(0);
    driver.notify();
    driver.expect_needs_reset("a head twice");
}

/// A disk whose bytes are not in memory, so that they come late.
fn cold_file(len: u64) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    std::io::copy(
        &mut File::open("/dev/urandom").unwrap().take(len),
        &mut file,
    )
    .unwrap();
    file.as_file().sync_all().unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    file
}

#[test]
fn after_a_reset_the_memory_is_the_drivers_again() {
    for engine in ENGINES {
        let file = cold_file(8 << 20);
        let mut driver = multi_queue(&file, engine, ReadWrite, 1);
        for round in 0..8 {
            driver.start(0);
            driver.write(HIGH, &[0; 0x40_0000]);
            for place in 0..4 {
                let at = HIGH + 0x10_0000 * u64::from(place);
                put(
                    &mut driver,
                    place,
                    VIRTIO_BLK_T_IN,
                    2048 * round,
                    &[(at, 0x10_0000, WRITE)],
                );
            }
            driver.notify();
            if round % 2 == 0 {
                driver.wait_used();
            }
            driver.reset();
            driver.write(HIGH, &[0x5a; 0x40_0000]);
            std::thread::sleep(std::time::Duration::from_millis(5));
            assert!(
                driver
                    .read(HIGH, 0x40_0000)
                    .iter()
                    .all(|byte| *byte == 0x5a)
            );
        }
    }
}

#[test]
fn a_stop_loses_no_request_and_does_none_twice() {
    for engine in ENGINES {
        let file = cold_file(8 << 20);
        let mut driver = multi_queue(&file, engine, ReadWrite, 2);
        for round in 0..4u16 {
            driver.start(0);
            for place in 0..4 {
                let (at, sector) = (
                    HIGH + 0x10_0000 * u64::from(place),
                    2048 * u64::from(round * 4 + place) % 16384,
                );
                put(
                    &mut driver,
                    place,
                    VIRTIO_BLK_T_IN,
                    sector,
                    &[(at, 0x10_0000, WRITE)],
                );
            }
            driver.notify();
            // Taking one queue back stops the device and starts it again with the other.
            driver.take_back(1);
            let mut heads: Vec<u32> = (0..4).map(|_| driver.wait_used().0).collect();
            heads.sort_unstable();
            assert_eq!(heads, [0, 4, 8, 12]);
            driver.any_request();
            assert_eq!(driver.used_index(), 5);
        }
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
            Driver::started(
                Box::new(Block::new(disk, "", 1, engine, &ThreadStarter::default()).unwrap()),
                without,
            )
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
    let flush = |block: Block| {
        let mut driver = Driver::started(Box::new(block), 0);
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
            let block = Block::new(
                disk.with_file(zero),
                "",
                1,
                first,
                &ThreadStarter::default(),
            )
            .unwrap();
            let disk = Arc::clone(&block.disk);
            assert_eq!(flush(block), IOERR);
            // What the host says next is that all is well.
            let disk = Arc::into_inner(disk).unwrap();
            let disk = disk.with_file(file.reopen().unwrap());
            assert_eq!(
                flush(Block::new(disk, "", 1, second, &ThreadStarter::default()).unwrap()),
                IOERR
            );
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
        for (access, is_shorter) in [(ReadWrite, false), (ReadOnly, true), (Ephemeral, true)] {
            let file = NamedTempFile::new().unwrap();
            file.as_file().set_len(1 << 20).unwrap();
            let disk = Disk::open(file.path(), access).unwrap();
            // Open for reading only, or truncated.
            let (disk, kind, buffer) = if is_shorter {
                file.as_file().set_len(512).unwrap();
                (disk, VIRTIO_BLK_T_IN, (BUFFER, 512, WRITE))
            } else {
                let disk = disk.with_file(File::open(file.path()).unwrap());
                (disk, VIRTIO_BLK_T_OUT, (BUFFER, 512, 0))
            };
            let mut driver = Driver::started(
                Box::new(Block::new(disk, "", 1, engine, &ThreadStarter::default()).unwrap()),
                0,
            );
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
                panic!("{engine:?} {access:?}: {of_disk:?}");
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
            &format!("virtio::blk::tests::{test}"),
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
    for (engine, access) in [
        (Engine::Sync, ReadWrite),
        (Engine::Sync, Ephemeral),
        (Engine::IoUring, ReadWrite),
    ] {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let mut driver = multi_queue(&file, engine, access, 1);
        let mut write = |sector| write_behind_a_read(&mut driver, sector);
        assert_eq!(write(0), OK);
        assert_eq!(write(1024), IOERR);
        // There is room again, or no need for more.
        assert_eq!(write(0), OK);
        submit(&mut driver, VIRTIO_BLK_T_FLUSH, 0, (BUFFER, 0, 0));
        assert_eq!(status(&mut driver), OK);
    }
}
