//! Copy-on-write: what is written to an ephemeral disk lies in a temporary file, and its base stays as it is.

use std::fs::File;
use std::io;
use std::ops::RangeInclusive;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError, RwLock};

use super::saved::{CLUSTER, Run, SavedOverlay};

/// Longest disk in bytes, 16 TiB: its map has 512 MiB, of which the host gives only what is used.
pub(super) const MAX_LEN: u64 = 1 << 44;

/// The temporary file. It is sparse, has no name and is gone with its last user; every cluster in it has the place that
/// it has on the disk.
///
/// Locks: `filling` before `present`.
pub(super) struct Overlay {
    top: File,
    /// What a snapshot holds: it lies between `top` and the base.
    saved: Option<SavedOverlay>,
    /// Length of the disk in bytes.
    len: u64,
    /// A bit for each cluster that is all in `top`. It is never taken back.
    present: RwLock<Vec<u64>>,
    /// Held while clusters come into `top`. Of two writers of different sectors, each must find what the other has
    /// written, and not copy the base over it.
    filling: Mutex<()>,
}

impl Overlay {
    /// One for a disk of `len` bytes, at most [`MAX_LEN`], in `TMPDIR` or /tmp.
    pub(super) fn new(len: u64) -> io::Result<Self> {
        let top = tempfile::tempfile()?;
        top.set_len(len)?;
        Ok(Self {
            top,
            saved: None,
            len,
            present: RwLock::new(vec![0; len.div_ceil(CLUSTER * 64) as usize]),
            filling: Mutex::new(()),
        })
    }

    /// Bytes of its map and of what it keeps of a snapshot.
    pub(super) fn memory_bound(&self) -> usize {
        let saved = self.saved.as_ref().map_or(0, SavedOverlay::memory_bound);
        self.len.div_ceil(CLUSTER * 64) as usize * size_of::<u64>() + saved
    }

    /// Puts what a snapshot holds below it, before it is used.
    pub(super) fn restore(&mut self, saved: SavedOverlay) {
        self.saved = Some(saved);
    }

    /// Where to read the disk at `offset`: the file, the offset in it, and how many of the next `len` bytes lie there.
    pub(super) fn place<'a>(
        &'a self,
        base: &'a File,
        offset: u64,
        len: u64,
    ) -> (&'a File, u64, u64) {
        let is_present = self.are(true, offset / CLUSTER..=offset / CLUSTER);
        let end = (offset / CLUSTER + 1..=(offset + len - 1) / CLUSTER)
            .find(|cluster| !self.are(is_present, *cluster..=*cluster))
            .map_or(offset + len, |cluster| cluster * CLUSTER);
        if is_present {
            (&self.top, offset, end - offset)
        } else {
            self.below(base, offset, end - offset)
        }
    }

    /// The same for a range of which nothing is in the temporary file.
    fn below<'a>(&'a self, base: &'a File, offset: u64, len: u64) -> (&'a File, u64, u64) {
        match &self.saved {
            Some(saved) => saved.place(base, offset, len),
            None => (base, offset, len),
        }
    }

    /// The clusters that are not the base's.
    pub(super) fn changed(&self) -> Vec<Run> {
        let map = self.present.read().unwrap_or_else(PoisonError::into_inner);
        let words = (0..).step_by(64).zip(map.iter());
        let set = words
            .filter(|(_, word)| **word != 0)
            .flat_map(|(first, word)| {
                (0..64)
                    .filter(move |bit| word >> bit & 1 != 0)
                    .map(move |bit| first + bit)
            });
        let set = set.map(|first| Run { first, count: 1 });
        let saved = self.saved.iter().flat_map(SavedOverlay::runs);
        Run::union(set, saved)
    }

    /// Has `change` write all of this range, which is not empty, in the temporary file. What lies around it in its
    /// clusters is there before. If that fails, the disk may have changed in the range, and nowhere else.
    pub(super) fn change<T>(
        &self,
        base: &File,
        offset: u64,
        len: u64,
        change: impl FnOnce(&File) -> io::Result<T>,
    ) -> io::Result<T> {
        let clusters = offset / CLUSTER..=(offset + len - 1) / CLUSTER;
        if self.are(true, clusters.clone()) {
            return change(&self.top);
        }
        let _filling = self.filling.lock().unwrap_or_else(PoisonError::into_inner);
        for cluster in [*clusters.start(), *clusters.end()] {
            let start = cluster * CLUSTER;
            let end = self.len.min(start + CLUSTER);
            let is_partial = start < offset || end > offset + len;
            if is_partial && !self.are(true, cluster..=cluster) {
                let mut bytes = [0; CLUSTER as usize];
                let bytes = bytes.get_mut(..(end - start) as usize).unwrap_or_default();
                let (file, at, _) = self.below(base, start, end - start);
                file.read_exact_at(bytes, at)?;
                self.top.write_all_at(bytes, start)?;
                self.add(cluster..=cluster);
            }
        }
        let changed = change(&self.top)?;
        self.add(clusters);
        Ok(changed)
    }

    /// Whether each of these clusters is in the temporary file, or none of them is.
    fn are(&self, present: bool, mut clusters: RangeInclusive<u64>) -> bool {
        let map = self.present.read().unwrap_or_else(PoisonError::into_inner);
        clusters.all(|cluster| {
            let word = map.get((cluster / 64) as usize).unwrap_or(&0);
            (word >> (cluster % 64) & 1 != 0) == present
        })
    }

    fn add(&self, clusters: RangeInclusive<u64>) {
        let mut map = self.present.write().unwrap_or_else(PoisonError::into_inner);
        for cluster in clusters {
            if let Some(word) = map.get_mut((cluster / 64) as usize) {
                *word |= 1 << (cluster % 64);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writers_of_one_cluster_do_not_undo_each_other() {
        const CLUSTERS: u64 = 1000;
        let base = tempfile::tempfile().unwrap();
        base.set_len(CLUSTERS * 4096).unwrap();
        let overlay = Overlay::new(CLUSTERS * 4096).unwrap();
        let barrier = std::sync::Barrier::new(4);
        std::thread::scope(|scope| {
            for writer in 0..4u8 {
                let (overlay, base, barrier) = (&overlay, &base, &barrier);
                scope.spawn(move || {
                    for cluster in 0..CLUSTERS {
                        let (len, at) = if writer == 3 {
                            (5 * 512, 3)
                        } else {
                            (512, u64::from(writer))
                        };
                        let offset = cluster * 4096 + at * 512;
                        barrier.wait();
                        let bytes = vec![writer + 1; len];
                        let write = |top: &File| top.write_all_at(&bytes, offset);
                        overlay.change(base, offset, len as u64, write).unwrap();
                    }
                });
            }
        });
        for cluster in 0..CLUSTERS {
            let (file, at, len) = overlay.place(&base, cluster * 4096, 4096);
            let mut bytes = [0; 4096];
            file.read_exact_at(&mut bytes, at).unwrap();
            assert_eq!((len, bytes[0], bytes[512], bytes[1024]), (4096, 1, 2, 3));
            assert!(bytes[1536..] == [4; 2560]);
        }
    }
}
