//! The heap of musl's build.

use std::alloc::{GlobalAlloc, Layout};
use std::ptr;

use dlmalloc::GlobalDlmalloc;

/// From this size in bytes on, memory is a mapping of its own: it is zeros without being written, and goes back when it is freed. A
/// kernel is unpacked into such.
const LARGE: usize = 1 << 20;
/// No page is smaller; larger alignments are left to the other allocator.
const PAGE: usize = 4096;

/// musl's own allocator takes memory from the kernel and gives it back in small pieces: some 60 system calls for a command line. This one
/// keeps what was freed, if it is small.
pub struct Heap;

fn is_large(layout: &Layout) -> bool {
    layout.size() >= LARGE && layout.align() <= PAGE
}

// SAFETY: what is allocated in one way is freed in the same, since that follows from the layout alone; a mapping is as large and as
// aligned as the layout wants, and nothing else's.
#[allow(unsafe_code, reason = "it is an allocator")]
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if !is_large(&layout) {
            // SAFETY: as the caller promises.
            return unsafe { GlobalDlmalloc.alloc(layout) };
        }
        let (protection, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        );
        // SAFETY: it maps memory where nothing is.
        let memory =
            unsafe { libc::mmap(ptr::null_mut(), layout.size(), protection, flags, -1, 0) };
        if memory == libc::MAP_FAILED {
            ptr::null_mut()
        } else {
            memory.cast()
        }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        if is_large(&layout) {
            // SAFETY: it is a mapping of this size, which the caller has no use for any more.
            unsafe { libc::munmap(memory.cast(), layout.size()) };
        } else {
            // SAFETY: as the caller promises.
            unsafe { GlobalDlmalloc.dealloc(memory, layout) };
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if is_large(&layout) {
            // SAFETY: as the caller promises. A new mapping is zeros.
            unsafe { self.alloc(layout) }
        } else {
            // SAFETY: as the caller promises.
            unsafe { GlobalDlmalloc.alloc_zeroed(layout) }
        }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller promises that the size fits.
        let new = unsafe { Layout::from_size_align_unchecked(size, layout.align()) };
        match (is_large(&layout), is_large(&new)) {
            // SAFETY: as the caller promises.
            (false, false) => unsafe { GlobalDlmalloc.realloc(memory, layout, size) },
            (true, true) => {
                // SAFETY: it is a mapping of this size, which the caller has no use for any more where it is moved.
                let moved = unsafe {
                    libc::mremap(memory.cast(), layout.size(), size, libc::MREMAP_MAYMOVE)
                };
                if moved == libc::MAP_FAILED {
                    ptr::null_mut()
                } else {
                    moved.cast()
                }
            }
            _ => {
                // SAFETY: both are memory of at least the smaller size, and not the same.
                unsafe {
                    let moved = self.alloc(new);
                    if !moved.is_null() {
                        ptr::copy_nonoverlapping(memory, moved, layout.size().min(size));
                        self.dealloc(memory, layout);
                    }
                    moved
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(unsafe_code, reason = "it calls the allocator")]
    fn memory_keeps_its_content_however_it_grows_and_shrinks() {
        let sizes = [
            16,
            LARGE - 1,
            LARGE,
            5 * LARGE + 1,
            LARGE + 1,
            100,
            3 * LARGE,
        ];
        let layout = |size| Layout::from_size_align(size, 8).unwrap();
        // SAFETY: each layout is that of the memory at hand.
        unsafe {
            let mut memory = Heap.alloc_zeroed(layout(sizes[0]));
            memory.write(7);
            for pair in sizes.windows(2) {
                memory = Heap.realloc(memory, layout(pair[0]), pair[1]);
                assert_eq!(memory.read(), 7);
                memory.add(pair[1] - 1).write(1);
            }
            Heap.dealloc(memory, layout(sizes[6]));
            let zeroed = Heap.alloc_zeroed(layout(2 * LARGE));
            assert_eq!(zeroed.add(LARGE).read(), 0);
            Heap.dealloc(zeroed, layout(2 * LARGE));
        }
    }
}
