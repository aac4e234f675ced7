//! Reads and writes of guest memory in pieces, one call of the host's kernel each.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd};

use vm_memory::VolatileSlice;

/// iovecs that the kernel takes in one call (UIO_MAXIOV).
pub(super) const MAX_IOVECS: usize = 1024;

/// Room for iovecs, which mean nothing between two calls of the kernel.
#[derive(Default)]
pub(super) struct Iovecs(Vec<libc::iovec>);

#[allow(unsafe_code, reason = "iovecs are raw pointers")]
// SAFETY: nothing follows the pointers but the call for which they were written.
unsafe impl Send for Iovecs {}

impl Iovecs {
    /// Most bytes that it takes.
    pub(super) const MEMORY_BOUND: usize = MAX_IOVECS * size_of::<libc::iovec>();

    /// Reads at least one byte; `None` if there is none yet, UnexpectedEof if there will not be one.
    pub(super) fn read<'a>(
        &mut self,
        fd: &impl AsFd,
        slices: impl Iterator<Item = VolatileSlice<'a>>,
    ) -> io::Result<Option<usize>> {
        match self.transfer(libc::readv, fd, slices)? {
            Some(0) => Err(io::Error::new(
                ErrorKind::UnexpectedEof,
                "its other end is closed",
            )),
            count => Ok(count),
        }
    }

    /// Writes at least one byte; `None` if there is no room yet.
    pub(super) fn write<'a>(
        &mut self,
        fd: &impl AsFd,
        slices: impl Iterator<Item = VolatileSlice<'a>>,
    ) -> io::Result<Option<usize>> {
        self.transfer(libc::writev, fd, slices)
    }

    #[allow(
        unsafe_code,
        reason = "the safe interfaces to vectored I/O want slices, which guest memory must not be made into: the guest \
                  writes it at any time"
    )]
    fn transfer<'a>(
        &mut self,
        call: unsafe extern "C" fn(libc::c_int, *const libc::iovec, libc::c_int) -> libc::ssize_t,
        fd: &impl AsFd,
        slices: impl Iterator<Item = VolatileSlice<'a>>,
    ) -> io::Result<Option<usize>> {
        let fd = fd.as_fd();
        self.0.clear();
        self.0
            .extend(slices.take(MAX_IOVECS).map(|slice| libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            }));
        loop {
            // SAFETY: the iovecs are those of slices that outlive the call: pieces of a live mapping, or of memory that is
            // borrowed by one of them alone. The file descriptor is open as long as `fd` is there.
            let result =
                unsafe { call(fd.as_raw_fd(), self.0.as_ptr(), self.0.len() as libc::c_int) };
            if let Ok(count) = usize::try_from(result) {
                return Ok(Some(count));
            }
            let error = io::Error::last_os_error();
            match error.kind() {
                ErrorKind::Interrupted => {}
                ErrorKind::WouldBlock => return Ok(None),
                _ => return Err(error),
            }
        }
    }
}

/// Copies what is in these slices to the end of `bytes`.
pub(super) fn append<'a>(bytes: &mut Vec<u8>, slices: impl Iterator<Item = VolatileSlice<'a>>) {
    for slice in slices {
        let start = bytes.len();
        bytes.resize(start + slice.len(), 0);
        slice.copy_to(bytes.get_mut(start..).unwrap_or_default());
    }
}
