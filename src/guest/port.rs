//! minivmm's own I/O ports.
#![allow(unsafe_code, reason = "only instructions reach an I/O port")]

use std::io;

/// The byte written becomes minivmm's exit status.
pub(super) const EXIT: u16 = 0xf4;
/// The byte written is a boot mark; what is read is for a VM that was restored.
pub(super) const BOOT_MARK: u16 = 0xf5;

/// Lets this thread reach a port.
pub(super) fn allow(port: u16) -> io::Result<()> {
    // SAFETY: the call gives this thread access to a port, and has no other effect.
    match unsafe { libc::syscall(libc::SYS_ioperm, u64::from(port), 1u64, 1u64) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Writes a byte to a port that was allowed.
pub(super) fn write(port: u16, byte: u8) {
    // SAFETY: nothing but minivmm's ports is there, and a write to them touches no memory.
    unsafe {
        std::arch::asm!("out dx, al", in("dx") port, in("al") byte, options(nomem, nostack));
    }
}

/// Fills `bytes` from a port that was allowed, with a string instruction, which takes one exit for many of them. It loses what it
/// has read when a page that it goes to is not there: they are written to first.
pub(super) fn read(port: u16, bytes: &mut [u8]) {
    std::hint::black_box(&mut *bytes).fill(0);
    // SAFETY: it writes as many bytes as there are.
    unsafe {
        std::arch::asm!(
            "rep insb", in("dx") port, inout("rdi") bytes.as_mut_ptr() => _, inout("rcx") bytes.len() => _,
            options(nostack, preserves_flags)
        );
    }
}
