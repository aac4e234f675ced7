#![allow(unsafe_code, reason = "a ring is given memory of which it cannot know")]

use std::io::Write;

use tempfile::NamedTempFile;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::super::open::DiskMode;
use super::*;

#[test]
fn a_ring_does_nothing_but_its_disks_requests() {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(&[7; 512]).unwrap();
    let disk = Disk::open(file.path(), DiskMode::ReadWrite).unwrap();
    let Ok(mut ring) = Ring::new(Arc::new(disk), 4) else {
        return crate::skip::skip("no io_uring");
    };
    ring.attach(&GuestMemoryMmap::new()).unwrap();
    let mut result = |entry: squeue::Entry| {
        ring.push(&entry).unwrap();
        ring.submit().unwrap();
        ring.ring.completion().next().map(|entry| entry.result())
    };
    let not_allowed = Some(-libc::EACCES);
    assert_eq!(result(opcode::Nop::new().build()), not_allowed);
    assert_eq!(
        result(opcode::Close::new(io_uring::types::Fd(0)).build()),
        not_allowed
    );
    let link = opcode::Fsync::new(DISK)
        .build()
        .flags(squeue::Flags::IO_LINK);
    assert_eq!(result(link), not_allowed);
    let cancel = opcode::AsyncCancel::new(1).build();
    assert_eq!(result(cancel), Some(-libc::ENOENT));
    let submitter = ring.ring.submitter();
    assert!(submitter.unregister_files().is_err());
}

#[test]
fn a_ring_takes_so_many_iovecs_at_once() {
    const PIECES: usize = 1024;
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(&[7; PIECES]).unwrap();
    let disk = Disk::open(file.path(), DiskMode::ReadWrite).unwrap();
    let Ok(mut ring) = Ring::new(Arc::new(disk), 8) else {
        return crate::skip::skip("no io_uring");
    };
    let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), PIECES)]).unwrap();
    let byte = |at| mem.get_slice(GuestAddress(at), 1).unwrap();
    let slices: Vec<_> = (0..PIECES as u64).map(byte).collect();
    ring.attach(&mem).unwrap();
    let mut done = 0;
    for round in 0..2 {
        let mut taken = 0;
        while ring.has_room() {
            let job = Job::Transfer(Direction::Read, 0);
            // SAFETY: the slices lie in `mem`.
            unsafe { ring.start(taken, job, &slices, PIECES as u64) }.unwrap();
            taken += 1;
        }
        assert_eq!(usize::from(taken), MAX_IOVECS / PIECES, "round {round}");
        while ring.in_flight() > 0 {
            ring.submit().unwrap();
            while let Some((_, result)) = ring.completed(false).unwrap() {
                result.unwrap();
                done += 1;
            }
        }
    }
    assert_eq!(done, 2 * MAX_IOVECS / PIECES);
}
