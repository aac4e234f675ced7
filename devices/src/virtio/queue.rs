//! Virtqueues (§ 2.7, split): rings and descriptor chains, checked.
//!
//! The rings' indices and the notification rules are crate virtio-queue's. Chains are walked here, because its iterator
//! ends a broken chain as it ends a whole one.

use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
pub use virtio_queue::QueueState;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Error as RingError, Queue, QueueOwnedT, QueueT};
use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryMmap, Permissions, VolatileSlice,
};

/// Longest chain in descriptors, indirect ones included. It bounds what one request makes this process allocate; a
/// driver must keep to the queue's size (§ 2.7.5.3.1), which is less for every device here.
pub const MAX_CHAIN: u32 = 1024;

/// Most pieces of a chain in a queue of this size: descriptors of the queue, the last of them a table.
pub(super) const fn max_pieces(size: u16) -> usize {
    size as usize + MAX_CHAIN as usize
}

const DESCRIPTOR_SIZE: u64 = size_of::<RawDescriptor>() as u64;

/// Why a queue cannot go on, mostly a rule that its driver broke. Every one of these ends in DEVICE_NEEDS_RESET.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// What the driver has put into a ring, a table or the queue's registers.
    #[error("{0}")]
    Bad(String),
    /// The available ring's index is further ahead than the queue is long, or the crate found another fault in a ring.
    #[error("bad ring: {0}")]
    Ring(#[from] RingError),
    /// A table or buffer is not in RAM.
    #[error("a descriptor refers to memory that is not there")]
    Memory(#[from] GuestMemoryError),
    /// Not the driver's fault: the device cannot go on.
    #[error("the host failed it: {0}")]
    Host(#[source] std::io::Error),
    /// A request that its device cannot even answer.
    #[error("a request that cannot be answered: {0}")]
    Unanswerable(&'static str),
}

/// The error about what the driver has done wrong.
pub(super) fn bad<T>(what: impl Into<String>) -> Result<T, QueueError> {
    Err(QueueError::Bad(what.into()))
}

/// Checks that the rings of this queue are aligned (§ 2.7) and lie in RAM.
pub(super) fn check_rings(state: &QueueState, mem: &GuestMemoryMmap) -> Result<(), QueueError> {
    let size = u64::from(state.size);
    let (descriptors, available, used) = (state.desc_table, state.avail_ring, state.used_ring);
    // Alignments, and lengths: flags, index and event are 2 bytes each, entries have 2 and 8.
    for (ring, address, align, len) in [
        ("descriptor table", descriptors, 16, DESCRIPTOR_SIZE * size),
        ("available ring", available, 2, 6 + 2 * size),
        ("used ring", used, 4, 6 + 8 * size),
    ] {
        if !address.is_multiple_of(align) {
            return bad(format!("the {ring} at {address:#x} is not aligned"));
        }
        if !mem.check_range(GuestAddress(address), len as usize, Permissions::ReadWrite) {
            return bad(format!(
                "the {ring} at {address:#x}, {len} bytes, is not in RAM"
            ));
        }
    }
    Ok(())
}

/// A queue that is ready, in the hands of its device.
pub struct Virtqueue {
    index: u16,
    queue: Queue,
    indirect: bool,
    /// Chains completed since [`Virtqueue::needs_interrupt`] was last asked.
    completed: u16,
}

impl Virtqueue {
    /// Queue number `index` in this state. `indirect` says whether VIRTIO_F_INDIRECT_DESC was negotiated.
    pub(super) fn new(
        index: u16,
        state: QueueState,
        indirect: bool,
        mem: &GuestMemoryMmap,
    ) -> Result<Self, QueueError> {
        check_rings(&state, mem)?;
        let queue = Queue::try_from(state)?;
        Ok(Self {
            index,
            queue,
            indirect,
            completed: 0,
        })
    }

    /// Its number.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Its size in entries.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Where it stands, as plain data.
    pub fn state(&self) -> QueueState {
        self.queue.state()
    }

    /// Takes the next available chain; `false` if there is none. `chain` holds nothing useful after an error.
    pub fn pop<'m>(
        &mut self,
        mem: &'m GuestMemoryMmap,
        chain: &mut Chain<'m>,
    ) -> Result<bool, QueueError> {
        chain.clear();
        let mut heads = self.queue.iter(mem)?;
        let Some(head) = heads.next() else {
            return Ok(false);
        };
        chain.head = head.head_index();
        self.walk(mem, chain)?;
        Ok(true)
    }

    /// Puts back the chain that was taken last, which has not been completed: it is the next again.
    pub fn put_back(&mut self) {
        let next = self.queue.next_avail().wrapping_sub(1);
        self.queue.set_next_avail(next);
    }

    /// Reads each descriptor once.
    fn walk<'m>(&self, mem: &'m GuestMemoryMmap, chain: &mut Chain<'m>) -> Result<(), QueueError> {
        let (mut table, mut len) = (self.queue.desc_table(), u32::from(self.queue.size()));
        let (mut index, mut left, mut in_indirect) = (chain.head, len, false);
        loop {
            if u32::from(index) >= len {
                return bad(format!("descriptor index {index} in a table of {len}"));
            }
            // A chain longer than its table.
            if left == 0 {
                return bad(format!("the descriptor chain at {} is a loop", chain.head));
            }
            left -= 1;
            let address = table.saturating_add(DESCRIPTOR_SIZE * u64::from(index));
            let descriptor: RawDescriptor = mem.read_obj(GuestAddress(address))?;
            let descriptor = Descriptor::from(descriptor);
            if descriptor.refers_to_indirect_table() {
                if in_indirect || !self.indirect || descriptor.has_next() {
                    return bad("an indirect descriptor where none may be");
                }
                let bytes = descriptor.len();
                if bytes == 0 || !u64::from(bytes).is_multiple_of(DESCRIPTOR_SIZE) {
                    return bad(format!("an indirect table of {bytes} bytes"));
                }
                table = descriptor.addr().0;
                len = bytes / DESCRIPTOR_SIZE as u32;
                if len > MAX_CHAIN {
                    return bad(format!("an indirect table of {len} descriptors"));
                }
                (index, left, in_indirect) = (0, len, true);
                continue;
            }
            chain.add(mem, &descriptor)?;
            if !descriptor.has_next() {
                return Ok(());
            }
            index = descriptor.next();
        }
    }

    /// Puts a chain in the used ring. `written` counts the bytes of its writable part that are now the device's.
    pub fn complete(
        &mut self,
        mem: &GuestMemoryMmap,
        head: u16,
        written: u32,
    ) -> Result<(), QueueError> {
        self.complete_together(mem, &[(head, written)])
    }

    /// The same for chains that the driver must see all at once: each a head and the bytes written.
    pub fn complete_together(
        &mut self,
        mem: &GuestMemoryMmap,
        chains: &[(u16, u32)],
    ) -> Result<(), QueueError> {
        let (ring, size) = (self.queue.used_ring(), self.queue.size());
        let mut next = self.queue.next_used();
        for (head, written) in chains {
            // § 2.7.8: id and len, 32 bits each, behind flags and index.
            let element = u64::from(*head) | u64::from(*written) << 32;
            let at = GuestAddress(ring + 4 + 8 * u64::from(next % size));
            mem.write_obj(element.to_le(), at)?;
            next = next.wrapping_add(1);
            self.completed = self.completed.wrapping_add(1);
        }
        self.queue.set_next_used(next);
        Ok(mem.store(next.to_le(), GuestAddress(ring + 2), Ordering::Release)?)
    }

    /// Whether the driver wants to hear of what was completed since this was last asked (§ 2.7.7).
    pub fn needs_interrupt(&mut self, mem: &GuestMemoryMmap) -> Result<bool, QueueError> {
        let completed = std::mem::take(&mut self.completed);
        let ring = self.queue.avail_ring();
        // The driver must not miss what was completed before it wrote what is read here.
        fence(Ordering::SeqCst);
        let read = |at| mem.load::<u16>(GuestAddress(at), Ordering::Relaxed);
        if self.queue.event_idx_enabled() {
            // Behind flags, index and entries (§ 2.7.6).
            let event = u16::from_le(read(ring + 4 + 2 * u64::from(self.queue.size()))?);
            let ahead = self.queue.next_used().wrapping_sub(event).wrapping_sub(1);
            return Ok(ahead < completed);
        }
        Ok(u32::from(u16::from_le(read(ring)?)) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }

    /// Asks the driver for no notifications (§ 2.7.10): the device looks by itself for now.
    pub fn disable_notifications(&mut self, mem: &GuestMemoryMmap) -> Result<(), QueueError> {
        Ok(self.queue.disable_notification(mem)?)
    }

    /// Asks for notifications again. `true` says that a chain has come meanwhile, of which none will tell.
    pub fn enable_notifications(&mut self, mem: &GuestMemoryMmap) -> Result<bool, QueueError> {
        Ok(self.queue.enable_notification(mem)?)
    }
}

/// One request: what the driver gives to read, and where it wants the answer. To be used again for the next one.
#[derive(Default)]
pub struct Chain<'m> {
    head: u16,
    /// What the device reads.
    pub readable: Buffers<'m>,
    /// What the device writes.
    pub writable: Buffers<'m>,
}

impl<'m> Chain<'m> {
    /// Most bytes of its lists for a queue of this size: each grows to the next power of two. A descriptor is one piece, since
    /// ranges of RAM do not touch.
    pub(super) const fn memory_bound(size: u16) -> usize {
        let pieces = max_pieces(size).next_power_of_two();
        2 * pieces * size_of::<VolatileSlice<'_>>()
    }

    /// The index that goes into the used ring.
    pub fn head(&self) -> u16 {
        self.head
    }

    fn clear(&mut self) {
        self.readable.clear();
        self.writable.clear();
    }

    fn add(&mut self, mem: &'m GuestMemoryMmap, descriptor: &Descriptor) -> Result<(), QueueError> {
        let buffers = if descriptor.is_write_only() {
            &mut self.writable
        } else if self.writable.slices.is_empty() {
            &mut self.readable
        } else {
            return bad("a readable descriptor behind a writable one");
        };
        buffers.add(mem, descriptor.addr(), descriptor.len())?;
        // § 2.7.5.2: 2^32 bytes in total.
        if self.readable.len + self.writable.len > 1 << 32 {
            return bad("a descriptor chain of more than 4 GiB");
        }
        Ok(())
    }
}

/// `len` bytes of these slices from `skip` on.
pub(super) fn window<'a: 'b, 'b>(
    slices: impl Iterator<Item = VolatileSlice<'a>> + Clone,
    mut skip: usize,
    mut len: usize,
) -> impl Iterator<Item = VolatileSlice<'b>> + Clone {
    slices.filter_map(move |slice| {
        let cut = skip.min(slice.len());
        skip -= cut;
        let count = len.min(slice.len() - cut);
        len -= count;
        let part = slice.subslice(cut, count).ok();
        part.filter(|part| !part.is_empty())
    })
}

/// Guest memory in pieces, all of it known to be RAM. Other threads and the guest may write it at any time.
#[derive(Default)]
pub struct Buffers<'m> {
    slices: Vec<VolatileSlice<'m>>,
    len: u64,
}

impl<'m> Buffers<'m> {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pieces, none of them empty.
    pub fn slices(&self) -> &[VolatileSlice<'m>] {
        &self.slices
    }

    fn clear(&mut self) {
        self.slices.clear();
        self.len = 0;
    }

    fn add(
        &mut self,
        mem: &'m GuestMemoryMmap,
        address: GuestAddress,
        len: u32,
    ) -> Result<(), QueueError> {
        // A descriptor may lie across two regions.
        let slices = mem.get_slices(address, len as usize, Permissions::ReadWrite)?;
        for slice in slices {
            self.slices.push(slice?);
        }
        self.len += u64::from(len);
        Ok(())
    }

    /// Takes the first bytes; `false`, and nothing is taken, if there are not as many.
    pub fn read_front(&mut self, out: &mut [u8]) -> bool {
        if self.len < out.len() as u64 {
            return false;
        }
        let mut done = 0;
        for slice in &self.slices {
            done += slice.copy_to(out.get_mut(done..).unwrap_or_default());
        }
        self.skip(out.len() as u64);
        true
    }

    /// Drops the first bytes; all of them if there are not as many.
    pub fn skip(&mut self, count: u64) {
        let mut rest = count.min(self.len);
        self.len -= rest;
        let mut used_up = 0;
        for slice in &mut self.slices {
            let count = rest.min(slice.len() as u64);
            rest -= count;
            match slice.offset(count as usize) {
                Ok(tail) if !tail.is_empty() => {
                    *slice = tail;
                    break;
                }
                _ => used_up += 1,
            }
        }
        self.slices.drain(..used_up);
    }

    /// Takes the last byte.
    pub fn take_last_byte(&mut self) -> Option<VolatileSlice<'m>> {
        let slice = self.slices.pop()?;
        let (rest, last) = slice.split_at(slice.len().checked_sub(1)?).ok()?;
        if !rest.is_empty() {
            self.slices.push(rest);
        }
        self.len -= 1;
        Some(last)
    }

    /// Copies `data` to the start, as much as there is room for; says how much that was.
    pub fn write_front(&self, data: &[u8]) -> usize {
        self.write_at(0, data)
    }

    /// Copies `data` to the bytes from `offset` on, as much as there is room for; says how much that was.
    pub fn write_at(&self, mut offset: usize, data: &[u8]) -> usize {
        let mut written = 0;
        for slice in &self.slices {
            let skipped = offset.min(slice.len());
            offset -= skipped;
            let Ok(slice) = slice.offset(skipped) else {
                break;
            };
            let rest = data.get(written..).unwrap_or_default();
            let count = rest.len().min(slice.len());
            slice.copy_from(rest.get(..count).unwrap_or_default());
            written += count;
        }
        written
    }
}
