//! The page that a vCPU shares with KVM (`struct kvm_run`, Documentation/virt/kvm/api.rst § 5), in a mapping of its own.
//!
//! kvm-ioctls gives out `&mut kvm_run` for its own mapping, which nothing may alias. Here is another one of the same page: for
//! the byte that other threads write, and for what kvm-ioctls does not decode.

#![allow(unsafe_code, reason = "KVM shares this page with the process")]

use std::mem::offset_of;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU8, Ordering, fence};

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// Bytes of the structure, which is within the first page.
const LEN: usize = size_of::<kvm_run>();

/// A vCPU's page; it may outlive the vCPU.
pub(super) struct RunPage(NonNull<kvm_run>);

// SAFETY: the mapping belongs to the process, not to a thread.
unsafe impl Send for RunPage {}
// SAFETY: `immediate_exit` is only accessed as an atomic, and what is read otherwise is written by KVM alone, on the thread
// that reads it.
unsafe impl Sync for RunPage {}

impl RunPage {
    /// Maps the page of `vcpu`.
    pub(super) fn map(vcpu: &VcpuFd) -> rustix::io::Result<Self> {
        // SAFETY: the descriptor is open as long as `vcpu` is borrowed; a new mapping at an address of the kernel's choice
        // touches no other.
        let page = unsafe {
            let fd = BorrowedFd::borrow_raw(vcpu.as_raw_fd());
            mmap(
                ptr::null_mut(),
                LEN,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                fd,
                0,
            )?
        };
        NonNull::new(page.cast())
            .map(Self)
            .ok_or(rustix::io::Errno::FAULT)
    }

    /// Makes KVM_RUN return at once whenever it is called, until [`Self::take_kick`]. To be called after the request that the vCPU's
    /// thread is to see.
    pub(super) fn kick(&self) {
        // See `take_kick`.
        fence(Ordering::SeqCst);
        self.set_immediate_exit(true);
    }

    /// Has KVM_RUN enter the guest again. To be called on the vCPU's thread before it reads the request.
    ///
    /// No kick is lost. The fences of `kick` and of this have an order. If this one comes first, what it clears does not undo
    /// that kick, and KVM_RUN returns at once. If it comes second, the thread sees the request of that kick, or a newer one.
    pub(super) fn take_kick(&self) {
        self.set_immediate_exit(false);
        fence(Ordering::SeqCst);
    }

    fn set_immediate_exit(&self, on: bool) {
        let offset = offset_of!(kvm_run, immediate_exit);
        // SAFETY: the byte is within the mapping, and everybody in this process accesses it as an atomic; KVM only reads it.
        let byte = unsafe { AtomicU8::from_ptr(self.0.as_ptr().cast::<u8>().add(offset)) };
        byte.store(on.into(), Ordering::Relaxed);
    }

    /// The bytes of one access to an I/O port, after an exit for such an access. To be called on the vCPU's thread.
    pub(super) fn port_width(&self) -> u8 {
        // SAFETY: the field is within the mapping, and any value is one of a u8. KVM writes it in KVM_RUN only.
        unsafe { ptr::addr_of!((*self.0.as_ptr()).__bindgen_anon_1.io.size).read_volatile() }
    }

    /// The kind of an internal error, after an exit for one. To be called on the vCPU's thread.
    pub(super) fn internal_error(&self) -> u32 {
        // SAFETY: as above.
        unsafe {
            ptr::addr_of!((*self.0.as_ptr()).__bindgen_anon_1.internal.suberror).read_volatile()
        }
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: the mapping was made with this address and length, and nothing borrows from it.
        let unmapped = unsafe { munmap(self.0.as_ptr().cast(), LEN) };
        debug_assert!(unmapped.is_ok());
    }
}
