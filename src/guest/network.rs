//! The guest's network interfaces, by the ioctls of netdevice(7).
#![allow(unsafe_code, reason = "there is no safe interface for these ioctls")]

use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::net::{AddressFamily, SocketType, socket};

use super::orders::Network;

/// What docker lets programs do that are not root's: listen at any port, and ping.
const PERMISSIONS: [(&str, &str); 2] = [
    ("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0"),
    ("/proc/sys/net/ipv4/ping_group_range", "0 2147483647"),
];

/// Brings up the loopback device, unless the kernel has none.
pub(super) fn set_up_loopback() {
    if let Ok(socket) = socket(AddressFamily::INET, SocketType::DGRAM, None) {
        let _ = bring_up(&socket, "lo");
    }
    for (path, value) in PERMISSIONS {
        let _ = fs::write(path, value);
    }
}

/// Brings up the first other device.
pub(super) fn set_up(network: &Network) -> io::Result<()> {
    let socket = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    let interface = "eth0";
    let mask = u32::MAX
        .checked_shl(32 - u32::from(network.bits))
        .unwrap_or(0);
    for (what, address) in [
        (libc::SIOCSIFADDR, network.address),
        (libc::SIOCSIFNETMASK, Ipv4Addr::from(mask)),
    ] {
        let mut request = request(interface);
        request.ifr_ifru.ifru_addr = internet(address);
        ioctl(&socket, what, &request)?;
    }
    bring_up(&socket, interface)?;
    // SAFETY: an all-zero rtentry is a valid value.
    let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
    route.rt_dst = internet(Ipv4Addr::UNSPECIFIED);
    route.rt_genmask = internet(Ipv4Addr::UNSPECIFIED);
    route.rt_gateway = internet(network.gateway);
    route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
    ioctl(&socket, libc::SIOCADDRT, &route)
}

fn bring_up(socket: &OwnedFd, interface: &str) -> io::Result<()> {
    let mut request = request(interface);
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    ioctl(socket, libc::SIOCSIFFLAGS, &request)
}

fn request(interface: &str) -> libc::ifreq {
    // SAFETY: an all-zero ifreq is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes()) {
        *to = from as libc::c_char;
    }
    request
}

/// The address as the kernel has it in a sockaddr (ip(7)): family, port, address.
fn internet(address: Ipv4Addr) -> libc::sockaddr {
    let mut sa_data = [0; 14];
    for (to, from) in sa_data.iter_mut().skip(2).zip(address.octets()) {
        *to = from as libc::c_char;
    }
    libc::sockaddr {
        sa_family: libc::AF_INET as libc::sa_family_t,
        sa_data,
    }
}

/// Gives the kernel a structure, which must be the one that `what` takes, without pointers to others.
fn ioctl<T>(socket: &OwnedFd, what: libc::c_ulong, argument: &T) -> io::Result<()> {
    // SAFETY: the kernel reads the structure, which lives until the call returns.
    match unsafe { libc::ioctl(socket.as_raw_fd(), what as _, argument) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
