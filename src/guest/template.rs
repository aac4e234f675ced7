//! The first process of a VM that becomes a template, and of those that go on from it: between the two is one instruction.
#![allow(unsafe_code, reason = "there is no safe interface for random(4)")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use minivmm_devices::platform::control::Restored;
use rustix::time::{ClockId, Timespec, clock_settime};

use super::failure::{Failure, cannot};
use super::orders::Orders;
use super::port;

/// The boot mark at which the template is saved.
pub const TEMPLATE_MARK: u8 = 1;

/// Waits, as a template, for orders: what comes behind the mark happens in a VM that was restored.
pub(super) fn wait_for_orders() -> Result<Orders, Failure> {
    port::allow(port::BOOT_MARK).map_err(cannot("reach the boot-mark port"))?;
    port::write(port::BOOT_MARK, TEMPLATE_MARK);
    // What lies behind the moment that is told takes time as well.
    let began = Instant::now();
    let what = "read the orders";
    let told = Restored::read(|bytes| port::read(port::BOOT_MARK, bytes));
    let (restored, nanoseconds) = told
        .ok_or("this VM was not restored")
        .map_err(cannot(what))?;
    // Until then, random numbers are those of every VM of this template.
    reseed(restored.seed).map_err(cannot("reseed the kernel's random numbers"))?;
    let now = Duration::from_nanos(nanoseconds) + began.elapsed();
    let now = Timespec {
        tv_sec: now.as_secs() as i64,
        tv_nsec: now.subsec_nanos().into(),
    };
    clock_settime(ClockId::Realtime, now).map_err(cannot("set the clock"))?;
    serde_json::from_slice(&restored.argument).map_err(cannot(what))
}

/// The seed goes into the kernel's pool, and its generator takes a new key from there at once.
fn reseed(seed: [u8; 32]) -> io::Result<()> {
    /// `struct rand_pool_info` of <linux/random.h>.
    #[repr(C)]
    struct Entropy {
        bits: libc::c_int,
        size: libc::c_int,
        seed: [u8; 32],
    }
    // <linux/random.h>
    const RNDADDENTROPY: libc::Ioctl =
        rustix::ioctl::opcode::write::<[libc::c_int; 2]>(b'R', 3) as _;
    const RNDRESEEDCRNG: libc::Ioctl = rustix::ioctl::opcode::none(b'R', 7) as _;
    let entropy = Entropy {
        bits: 256,
        size: 32,
        seed,
    };
    let file = File::open("/dev/urandom")?;
    // SAFETY: the kernel reads the structure, with as many bytes behind the head as this says, which lives until the call returns.
    let added = unsafe { libc::ioctl(file.as_raw_fd(), RNDADDENTROPY, &raw const entropy) };
    // SAFETY: it takes no pointer.
    if added != 0 || unsafe { libc::ioctl(file.as_raw_fd(), RNDRESEEDCRNG) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
