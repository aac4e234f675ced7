//! What a snapshot holds of an ephemeral disk: a table of the clusters that were written, and their data.
//!
//! ```text
//! number of runs                                  u64, as all numbers little-endian
//! run: first cluster, number of clusters          u64 each; ascending
//! ... to a multiple of 4096 bytes
//! the clusters of all runs, 4096 bytes each       zeroes may be holes
//! ```
//!
//! A restored disk reads it in place. Clones share it, and a restore copies nothing.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::transfer::{Cancelled, go_on};

/// The unit of copying, in bytes. File systems write whole pages, so that next to nothing has to be copied.
pub(super) const CLUSTER: u64 = 4096;
/// Most runs: it bounds what a table makes this process allocate.
const MAX_RUNS: u64 = 1 << 22;
const RUN_LEN: u64 = 16;
/// Bytes that are copied at once.
const PIECE: u64 = 64 << 10;

/// Clusters in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Run {
    pub(super) first: u64,
    pub(super) count: u64,
}

impl Run {
    fn end(&self) -> u64 {
        self.first + self.count
    }

    /// The clusters of `some`, ascending, and of `others`.
    pub(super) fn union(
        some: impl Iterator<Item = Self>,
        others: impl Iterator<Item = Self>,
    ) -> Vec<Self> {
        let mut runs: Vec<Self> = Vec::new();
        let mut add = |run: Self| match runs.last_mut() {
            Some(last) if run.first <= last.end() => {
                last.count = last.end().max(run.end()) - last.first;
            }
            _ => runs.push(run),
        };
        let (mut some, mut others) = (some.peekable(), others.peekable());
        loop {
            let is_some = match (some.peek(), others.peek()) {
                (Some(a), Some(b)) => a <= b,
                (a, _) => a.is_some(),
            };
            let next = if is_some { some.next() } else { others.next() };
            match next {
                Some(run) => add(run),
                None => return runs,
            }
        }
    }
}

/// Where the clusters begin, from the beginning of the table.
fn data_offset(runs: u64) -> u64 {
    (8 + RUN_LEN * runs).next_multiple_of(CLUSTER)
}

/// Writes these clusters of a disk of `len` bytes to `out` at `at`. `place` says where a range is, and how much of it is there.
pub(super) fn save<'a>(
    runs: &[Run],
    len: u64,
    place: impl Fn(u64, u64) -> (&'a File, u64, u64),
    (out, at): (&File, u64),
    cancelled: Cancelled<'_>,
) -> io::Result<u64> {
    let count = runs.len() as u64;
    if count > MAX_RUNS {
        return Err(io::Error::other(format!(
            "what was written to an ephemeral disk is in {count} pieces: at most {MAX_RUNS} can be saved"
        )));
    }
    let mut table = count.to_le_bytes().to_vec();
    for run in runs {
        table.extend(run.first.to_le_bytes());
        table.extend(run.count.to_le_bytes());
    }
    out.write_all_at(&table, at)?;
    let mut to = at + data_offset(count);
    let mut buffer = [0; PIECE as usize];
    for run in runs {
        let start = run.first * CLUSTER;
        // The disk's last cluster may be shorter.
        let (mut offset, end) = (start, len.min(run.end() * CLUSTER));
        while offset < end {
            go_on(cancelled)?;
            let (file, from, some) = place(offset, PIECE.min(end - offset));
            let piece = buffer.get_mut(..some as usize).unwrap_or_default();
            file.read_exact_at(piece, from)?;
            if piece.iter().any(|byte| *byte != 0) {
                out.write_all_at(piece, to + (offset - start))?;
            }
            offset += some;
        }
        to += run.count * CLUSTER;
    }
    if out.metadata()?.len() < to {
        out.set_len(to)?;
    }
    Ok(to - at)
}

/// What was saved of an ephemeral disk.
pub(super) struct SavedOverlay {
    file: Arc<File>,
    /// Each with the offset of its data in the file.
    runs: Vec<(Run, u64)>,
}

impl SavedOverlay {
    /// Reads and checks the table that is at `offset`. With the clusters, it has `len` bytes. The disk has `disk_len`.
    pub(super) fn open(
        file: Arc<File>,
        offset: u64,
        len: u64,
        disk_len: u64,
    ) -> Result<Self, String> {
        let end = offset.checked_add(len).ok_or("it is beyond any file")?;
        let mut number = [0; 8];
        if len < 8 {
            return Err(format!("it has {len} bytes"));
        }
        let read = |bytes: &mut [u8], at| file.read_exact_at(bytes, at).map_err(|e| e.to_string());
        read(&mut number, offset)?;
        let count = u64::from_le_bytes(number);
        if count > MAX_RUNS || data_offset(count) > len {
            return Err(format!("{len} bytes with {count} pieces"));
        }
        let mut table = vec![0; (count * RUN_LEN) as usize];
        read(&mut table, offset + 8)?;
        let mut at = offset + data_offset(count);
        let mut last = 0;
        let mut runs = Vec::with_capacity(count as usize);
        for numbers in table.as_chunks::<8>().0.as_chunks::<2>().0 {
            let [first, count] = numbers.map(u64::from_le_bytes);
            let clusters = disk_len.div_ceil(CLUSTER);
            let is_on_disk = first < clusters && count <= clusters - first;
            // Behind the data of the disk's clusters, of which there are far less than 2^52, nothing overflows.
            if first < last || count == 0 || !is_on_disk || count * CLUSTER > end - at {
                return Err(format!("{count} clusters at {first} are out of place"));
            }
            runs.push((Run { first, count }, at));
            (last, at) = (first + count, at + count * CLUSTER);
        }
        Ok(Self { file, runs })
    }

    /// Bytes of its table.
    pub(super) fn memory_bound(&self) -> usize {
        size_of_val(self.runs.as_slice())
    }

    pub(super) fn runs(&self) -> impl Iterator<Item = Run> {
        self.runs.iter().map(|(run, _)| *run)
    }

    /// Where a range is, here or in the base, and how much of it is there.
    pub(super) fn place<'a>(
        &'a self,
        base: &'a File,
        offset: u64,
        len: u64,
    ) -> (&'a File, u64, u64) {
        let cluster = offset / CLUSTER;
        let next = self.runs.partition_point(|(run, _)| run.end() <= cluster);
        match self.runs.get(next) {
            Some((run, at)) if run.first <= cluster => {
                let into = offset - run.first * CLUSTER;
                (&self.file, at + into, len.min(run.count * CLUSTER - into))
            }
            Some((run, _)) => (base, offset, len.min(run.first * CLUSTER - offset)),
            None => (base, offset, len),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;
    use vm_memory::VolatileSlice;

    use super::super::{Direction, Disk, DiskMode};
    use super::*;

    const CLUSTERS: u64 = 40;
    /// The last cluster is a part of one.
    const LEN: u64 = CLUSTERS * CLUSTER - 512;

    fn disk(base: &tempfile::NamedTempFile) -> Disk {
        Disk::open(base.path(), DiskMode::Ephemeral).unwrap()
    }

    fn transfer(disk: &Disk, direction: Direction, offset: u64, bytes: &mut [u8]) {
        let len = bytes.len() as u64;
        let slices = [VolatileSlice::from(bytes)];
        disk.transfer(direction, &slices, len, offset, &mut Vec::new(), &|| false)
            .unwrap();
    }

    fn read(disk: &Disk) -> Vec<u8> {
        let mut bytes = vec![0xee; LEN as usize];
        transfer(disk, Direction::Read, 0, &mut bytes);
        bytes
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        /// Through any writes and restores, also of what was restored, the disk is what was written, and the base as it was.
        #[test]
        fn a_restored_overlay_is_what_was_written(
            writes in vec((0..LEN / 512, 1u64..20, any::<u8>(), 0u8..4), 1..40),
        ) {
            let base = tempfile::NamedTempFile::new().unwrap();
            let mut wanted: Vec<u8> = (0..LEN).map(|at| (at / 512) as u8 | 1).collect();
            std::fs::write(base.path(), &wanted).unwrap();
            let original = wanted.clone();
            let mut disk = disk(&base);
            let snapshot = Arc::new(tempfile::tempfile().unwrap());
            let mut at = 3 * CLUSTER;
            for (sector, sectors, value, what) in writes {
                let (start, end) = (sector * 512, LEN.min((sector + sectors) * 512));
                match what {
                    0 => {
                        let len = disk.save_overlay(&snapshot, at, &|| false).unwrap();
                        prop_assert!(len.is_multiple_of(CLUSTER));
                        disk = self::disk(&base);
                        disk.restore_overlay(snapshot.clone(), at, len).unwrap();
                        at += len;
                    }
                    1 => {
                        disk.write_zeroes(start, end - start, true, &|| false).unwrap();
                        wanted[start as usize..end as usize].fill(0);
                    }
                    _ => {
                        let mut bytes = vec![value; (end - start) as usize];
                        transfer(&disk, Direction::Write, start, &mut bytes);
                        wanted[start as usize..end as usize].fill(value);
                    }
                }
                prop_assert!(read(&disk) == wanted);
            }
            prop_assert!(std::fs::read(base.path()).unwrap() == original);
        }

        #[test]
        fn any_table_is_refused_or_can_be_read(
            runs in vec((0u64..50, 0u64..50), 0..4),
            count in prop_oneof![Just(None), any::<u64>().prop_map(Some)],
            len in 0u64..50 * CLUSTER,
        ) {
            let base = tempfile::NamedTempFile::new().unwrap();
            base.as_file().set_len(LEN).unwrap();
            let mut table = count.unwrap_or(runs.len() as u64).to_le_bytes().to_vec();
            for (first, count) in runs {
                table.extend(first.to_le_bytes());
                table.extend(count.to_le_bytes());
            }
            let file = Arc::new(tempfile::tempfile().unwrap());
            file.write_all_at(&table, 512).unwrap();
            file.set_len(512 + len).unwrap();
            let mut disk = disk(&base);
            if disk.restore_overlay(file, 512, len).is_ok() {
                prop_assert!(read(&disk) == vec![0; LEN as usize]);
                disk.save_overlay(&tempfile::tempfile().unwrap(), 0, &|| false).unwrap();
            }
        }
    }

    #[test]
    fn what_cannot_be_an_overlay_is_refused() {
        let base = tempfile::NamedTempFile::new().unwrap();
        base.as_file().set_len(LEN).unwrap();
        for (numbers, len, error) in [
            (&[][..], 7, "it has 7 bytes"),
            (&[MAX_RUNS + 1], 1 << 40, "with 4194305 pieces"),
            (&[1], 4095, "4095 bytes with 1 pieces"),
            (&[1, 39, 2], 1 << 20, "2 clusters at 39 are out of place"),
            (&[1, u64::MAX, 2], 1 << 20, "are out of place"),
            (&[1, 1, u64::MAX], 1 << 20, "are out of place"),
            (&[1, 1, 0], 1 << 20, "0 clusters at 1"),
            (&[2, 1, 2, 2, 1], 1 << 20, "1 clusters at 2"),
            (&[1, 0, 2], 2 * CLUSTER, "2 clusters at 0"),
            (&[1, 0, 1], u64::MAX, "beyond any file"),
            (&[300, 0, 1], 1 << 20, "failed to fill"),
        ] {
            let file = Arc::new(tempfile::tempfile().unwrap());
            let table: Vec<u8> = numbers.iter().flat_map(|n: &u64| n.to_le_bytes()).collect();
            file.write_all_at(&table, 1).unwrap();
            let found = disk(&base).restore_overlay(file, 1, len).unwrap_err();
            assert!(found.to_string().contains(error), "{found}");
        }
        let mut plain = Disk::open(base.path(), DiskMode::ReadOnly).unwrap();
        let file = Arc::new(tempfile::tempfile().unwrap());
        assert_eq!(plain.save_overlay(&file, 0, &|| false).unwrap(), 0);
        assert!(plain.restore_overlay(file, 0, 8).is_err());
    }
}
