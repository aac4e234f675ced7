//! Whatever requests a block device gets, each is answered or ends in a reset, and what is read is what was written.
#![no_main]

use std::os::unix::fs::FileExt;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use minivmm_devices::virtio::F_EVENT_IDX;
use minivmm_devices::virtio::testing::{
    DATA, Driver, HIGH, INDIRECT, NEEDS_RESET, NEXT, SEAM, WRITE, wait,
};
use minivmm_fuzz::{DISK_SIZE, DiskKind, Length, Place, block, disk_bytes, file};

#[derive(Debug, Arbitrary)]
struct Request {
    kind: u8,
    sector: Sector,
    /// Of a discard or a write of zeroes: sector, count and flags.
    segment: (Sector, Length, u8),
    buffers: Vec<Length>,
    indirect: bool,
    /// While another is in flight: alone, a write does not come to io_uring.
    behind_a_read: bool,
    oddity: u8,
    hostile: Place,
}

#[derive(Debug, Arbitrary)]
enum Sector {
    OnDisk(u8),
    /// Counted from the end.
    Last(u8),
    Any(u64),
}

impl Sector {
    fn number(&self) -> u64 {
        match self {
            Self::OnDisk(sector) => (*sector).into(),
            Self::Last(sectors) => DISK_SIZE as u64 / 512 - u64::from(sectors % 18),
            Self::Any(sector) => *sector,
        }
    }
}

#[derive(Debug, Arbitrary)]
struct Input {
    disk: DiskKind,
    event_idx: bool,
    flush: bool,
    requests: Vec<Request>,
}

const IN: u8 = 0;
const OUT: u8 = 1;
const DISCARD: u8 = 11;
const WRITE_ZEROES: u8 = 13;
/// Flush, the ID, and two that there are not.
const KINDS: [u8; 8] = [IN, OUT, 4, 8, DISCARD, WRITE_ZEROES, 2, 99];

// What is odd about a request, if its number is one of these.
const NO_STATUS: u8 = 0;
const SHORT_HEADER: u8 = 1;
const OTHER_DIRECTION: u8 = 2;
const MIXED_DIRECTIONS: u8 = 3;
const HOSTILE_BUFFER: u8 = 4;

/// Header and segment; the data lie elsewhere, across a seam of RAM.
const HEADER: u64 = DATA;
const BUFFERS: u64 = SEAM - 0x800;
const TABLE: u64 = DATA + 0x2000;
/// Header and head of the read before a request.
const READ_HEADER: u64 = DATA + 0x1000;
const READ: u16 = 14;
/// VIRTIO_BLK_F_FLUSH.
const F_FLUSH: u64 = 1 << 9;

/// Whether these are bytes that the disk may have there.
fn is_same(bytes: &[u8], disk: &[Option<u8>]) -> bool {
    let mut pairs = bytes.iter().zip(disk);
    bytes.len() == disk.len() && pairs.all(|(byte, known)| known.is_none_or(|known| known == *byte))
}

fuzz_target!(|input: Input| {
    let file = file(&disk_bytes());
    // What it must have; a byte that was discarded may be anything.
    let mut disk: Vec<Option<u8>> = disk_bytes().into_iter().map(Some).collect();
    let mut driver = Driver::new(Box::new(block(&file, input.disk)));
    let without_event_idx = if input.event_idx { 0 } else { F_EVENT_IDX };
    let without = without_event_idx | if input.flush { 0 } else { F_FLUSH };
    driver.start(without);
    for request in input.requests.iter().take(16) {
        let sector = request.sector.number();
        let kind = KINDS[usize::from(request.kind) % KINDS.len()];
        let mut header = u64::from(kind).to_le_bytes().to_vec();
        header.extend(sector.to_le_bytes());
        let (segment_sector, count, flags) = &request.segment;
        header.extend(segment_sector.number().to_le_bytes());
        let count = count.bytes() / 16;
        header.extend(count.to_le_bytes());
        header.extend(u32::from(flags % 3).to_le_bytes());
        driver.write(HEADER, &header);
        let header_len = match (request.oddity, kind) {
            (SHORT_HEADER, _) => 15,
            (_, DISCARD | WRITE_ZEROES) => 32,
            _ => 16,
        };

        let mut chain = vec![(HEADER, header_len, 0)];
        let mut next = BUFFERS;
        for (index, len) in request.buffers.iter().take(12).enumerate() {
            let len = len.bytes() % 0x2001;
            let is_writable = match request.oddity {
                OTHER_DIRECTION => kind == OUT,
                MIXED_DIRECTIONS => index % 2 == 1,
                _ => kind != OUT,
            };
            chain.push((next, len, if is_writable { WRITE } else { 0 }));
            next += u64::from(len);
        }
        let data = next - BUFFERS;
        let fill: Vec<u8> = (0..data)
            .map(|at| (at * 13 + u64::from(kind)) as u8)
            .collect();
        driver.write(BUFFERS, &fill);
        if request.oddity != NO_STATUS {
            chain.push((next, 1, WRITE));
        }
        if request.oddity == HOSTILE_BUFFER {
            let middle = chain.len() / 2;
            chain[middle].0 = request.hostile.address();
        }
        let last = chain.len() - 1;
        for (index, (address, len, flags)) in chain.iter().enumerate() {
            let flags = flags | if index == last { 0 } else { NEXT };
            let table = if request.indirect { TABLE } else { 0x1000 };
            driver.descriptor_in(table, index as u16, *address, *len, flags, index as u16 + 1);
        }
        if request.indirect {
            driver.descriptor(0, TABLE, 16 * chain.len() as u32, INDIRECT, 0);
        }
        let used = driver.used_index();
        // What a hostile buffer does to it is not foreseen.
        let is_behind_a_read = request.behind_a_read && request.oddity != HOSTILE_BUFFER;
        if is_behind_a_read {
            driver.write(READ_HEADER, &[0; 16]);
            driver.descriptor(READ, READ_HEADER, 16, NEXT, READ + 1);
            driver.descriptor(READ + 1, HIGH, DISK_SIZE as u32 + 1, WRITE, 0);
            driver.offer(READ);
        }
        driver.offer(0);
        driver.notify();
        let are_answered =
            |driver: &Driver| driver.used_index().wrapping_sub(used) > u16::from(is_behind_a_read);
        wait("an answer", || {
            are_answered(&driver) || driver.status() & NEEDS_RESET != 0
        });
        if !are_answered(&driver) {
            driver.start(without);
            continue;
        }
        let mut answer = driver.wait_used();
        if is_behind_a_read {
            let other = driver.wait_used();
            let (read, rest) = if other.0 == 0 {
                (answer, other)
            } else {
                (other, answer)
            };
            assert_eq!(read, (READ.into(), DISK_SIZE as u32 + 1));
            assert_eq!(driver.read(HIGH + DISK_SIZE as u64, 1), [0]);
            answer = rest;
        }
        let (head, written) = answer;
        let writable: u64 = chain
            .iter()
            .filter(|b| b.2 & WRITE != 0)
            .map(|b| u64::from(b.1))
            .sum();
        assert_eq!(head, 0);
        assert!(
            u64::from(written) <= writable,
            "{written} of {writable} bytes written"
        );
        if [NO_STATUS, SHORT_HEADER, HOSTILE_BUFFER].contains(&request.oddity) {
            // It may have been another request than it seems.
            if input.disk != DiskKind::ReadOnly {
                disk.fill(None);
            }
            continue;
        }
        let status = driver.read(next, 1)[0];
        assert!(status <= 2, "status {status}");
        let in_memory = driver.read(BUFFERS, data as usize);
        if status != 0 {
            assert_eq!(in_memory, fill, "a request that failed wrote");
            continue;
        }
        let (sector, len) = match kind {
            DISCARD | WRITE_ZEROES => (segment_sector.number(), u64::from(count) * 512),
            _ => (sector, data),
        };
        // A flush and the ID are of no place.
        let place = || sector as usize * 512..(sector * 512 + len) as usize;
        match kind {
            IN => assert!(is_same(&in_memory, &disk[place()])),
            OUT => disk[place()]
                .copy_from_slice(&in_memory.iter().copied().map(Some).collect::<Vec<_>>()),
            DISCARD => disk[place()].fill(None),
            WRITE_ZEROES => disk[place()].fill(Some(0)),
            _ => continue,
        }
        assert!(kind == IN || input.disk != DiskKind::ReadOnly);
    }
    driver.start(0);
    driver.any_request();
    drop(driver);
    assert_eq!(file.metadata().unwrap().len(), DISK_SIZE as u64);
    let mut bytes = vec![0; DISK_SIZE];
    file.read_exact_at(&mut bytes, 0).unwrap();
    if input.disk == DiskKind::Ephemeral {
        assert!(
            bytes == disk_bytes(),
            "the file of an ephemeral disk was written"
        );
    } else {
        assert!(is_same(&bytes, &disk));
    }
});
