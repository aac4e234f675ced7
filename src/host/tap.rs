//! TAP devices: the host's ends of network interfaces that a program feeds (Documentation/networking/tuntap.rst).

use std::fs::OpenOptions;
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixDatagram;

use minivmm_devices::virtio::net::SetOffloads;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
};

/// Where TAP devices are opened.
pub const DEVICE: &str = "/dev/net/tun";

/// Why a TAP device cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// There is no such interface.
    #[error(
        "there is no network interface {0}; create it: ip tuntap add {0} mode tap user $USER, then ip link set {0} up"
    )]
    Absent(String),
    /// The kernel has no TAP devices, or none for this process.
    #[error("cannot open {DEVICE}{}", if .0.kind() == ErrorKind::NotFound { "; load its module: modprobe tun" } else { "" })]
    Open(#[source] io::Error),
    /// The interface cannot be taken.
    #[error("cannot use the network interface {}{}", .0, attach_hint(.1))]
    Attach(String, #[source] io::Error),
    /// A file descriptor that is none of a TAP device, or one with other headers.
    #[error("file descriptor {0} is not that of a TAP device with IFF_NO_PI and IFF_VNET_HDR")]
    NotTap(RawFd),
    /// The kernel refused a step of the set-up.
    #[error("cannot set up the TAP device: {0} failed")]
    SetUp(&'static str, #[source] io::Error),
}

fn attach_hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM) => "; it belongs to another user: ip tuntap add has user NAME",
        Some(libc::EBUSY) => "; another process has it",
        Some(libc::EINVAL) => {
            "; it is no TAP interface, or one with several queues (ip tuntap add has multi_queue) where one was asked for, or the reverse"
        }
        _ => "",
    }
}

/// A TAP device that gives and takes frames behind `struct virtio_net_hdr_v1`.
#[derive(Debug)]
pub struct Tap {
    /// The interface's name.
    pub name: String,
    /// The descriptors of its queues.
    pub queues: Vec<OwnedFd>,
    /// The interface's MTU, if it is known.
    pub mtu: Option<u16>,
    /// How it is told of offloads, if it can do them.
    pub set_offloads: Option<SetOffloads>,
}

impl Tap {
    /// Takes the TAP interface of this name, which must exist, with so many queues. More than one takes an interface with IFF_MULTI_QUEUE.
    pub fn open(name: &str, queues: u16) -> Result<Self, TapError> {
        let absent = || TapError::Absent(name.to_owned());
        let mut request = request(name).ok_or_else(absent)?;
        let mtu = mtu(&mut request).map_err(|_| absent())?;
        let multi = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | multi;
        let queue = |_| {
            let mut options = OpenOptions::new();
            options.read(true).write(true);
            let file = options.custom_flags(libc::O_NONBLOCK).open(DEVICE);
            let fd = file.map_err(TapError::Open)?.into();
            request.ifr_ifru.ifru_flags = flags as libc::c_short;
            interface_ioctl(&fd, libc::TUNSETIFF, &mut request)
                .map_err(|source| TapError::Attach(name.to_owned(), source))?;
            Ok(fd)
        };
        let queues = (0..queues).map(queue).collect::<Result<_, _>>()?;
        Self::set_up(name.to_owned(), queues, mtu)
    }

    /// Takes a TAP device that the caller of this process has opened. The descriptor stays open for another time.
    pub fn from_inherited(number: RawFd) -> Result<Self, TapError> {
        let not_tap = || TapError::NotTap(number);
        let fd = duplicate(number).map_err(|_| not_tap())?;
        let mut request = request("").ok_or_else(not_tap)?;
        interface_ioctl(&fd, libc::TUNGETIFF, &mut request).map_err(|_| not_tap())?;
        let flags = libc::c_int::from(flags_of(&request));
        let wanted = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if flags & wanted != wanted {
            return Err(not_tap());
        }
        // It may be an interface of another network namespace.
        let mtu = mtu(&mut request).unwrap_or(None);
        Self::set_up(name_of(&request), vec![fd], mtu)
    }

    fn set_up(name: String, queues: Vec<OwnedFd>, mtu: Option<u16>) -> Result<Self, TapError> {
        // With num_buffers (virtio 1.2 § 5.1.6).
        let header_len: libc::c_int = 12;
        let all = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
        let mut can_offload = true;
        for fd in &queues {
            int_ioctl(fd, libc::TUNSETVNETHDRSZ, &raw const header_len as usize)
                .map_err(|source| TapError::SetUp("TUNSETVNETHDRSZ", source))?;
            can_offload &= int_ioctl(fd, libc::TUNSETOFFLOAD, all as usize).is_ok();
        }
        Ok(Self {
            name,
            queues,
            mtu,
            set_offloads: can_offload.then_some(set_offloads),
        })
    }
}

/// What the guest's driver accepts of the host: the features that begin with GUEST.
fn set_offloads(fd: BorrowedFd<'_>, features: u64) -> io::Result<()> {
    let mut flags = 0;
    // § 5.1.3.1: the others mean nothing without it.
    if features & 1 << VIRTIO_NET_F_GUEST_CSUM != 0 {
        for (feature, flag) in [
            (VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
            (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
            (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
            (VIRTIO_NET_F_GUEST_ECN, libc::TUN_F_TSO_ECN),
        ] {
            if features & 1 << feature != 0 {
                flags |= flag;
            }
        }
    }
    int_ioctl(&fd, libc::TUNSETOFFLOAD, flags as usize)
}

/// A request for the interface of this name, if a name it can be (netdevice(7)).
#[allow(unsafe_code, reason = "an ifreq has a union, which only zeroes fill")]
fn request(name: &str) -> Option<libc::ifreq> {
    // SAFETY: an all-zero ifreq is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let is_name = name.len() < request.ifr_name.len() && !name.contains(['/', '\0', '%']);
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *place = byte as libc::c_char;
    }
    is_name.then_some(request)
}

fn name_of(request: &libc::ifreq) -> String {
    let name = request.ifr_name.map(|byte| byte as u8);
    let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(name).into_owned()
}

#[allow(unsafe_code, reason = "a union's field is read")]
fn flags_of(request: &libc::ifreq) -> libc::c_short {
    // SAFETY: all fields of the union are plain numbers and bytes, which the kernel or `request` has set.
    unsafe { request.ifr_ifru.ifru_flags }
}

/// The interface's MTU; `None` if it is no 16-bit number.
#[allow(unsafe_code, reason = "a union's field is read")]
fn mtu(request: &mut libc::ifreq) -> io::Result<Option<u16>> {
    const SIOCGIFMTU: libc::Ioctl = 0x8921; // include/uapi/linux/sockios.h
    interface_ioctl(&UnixDatagram::unbound()?.into(), SIOCGIFMTU, request)?;
    // SAFETY: as in `flags_of`.
    Ok(u16::try_from(unsafe { request.ifr_ifru.ifru_mtu }).ok())
}

#[allow(unsafe_code, reason = "the safe interfaces have no such ioctls")]
fn interface_ioctl(fd: &OwnedFd, call: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: the ioctls of this module's callers read and write an ifreq at most, which the borrow keeps alive.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), call, request as *mut libc::ifreq) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[allow(unsafe_code, reason = "the safe interfaces have no such ioctls")]
fn int_ioctl(fd: &impl AsRawFd, call: libc::Ioctl, argument: usize) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes a number; TUNSETVNETHDRSZ reads the int of which its caller gives the address.
    if unsafe { libc::ioctl(fd.as_raw_fd(), call, argument) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[allow(unsafe_code, reason = "the number is the user's")]
fn duplicate(number: RawFd) -> io::Result<OwnedFd> {
    if number < 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: if the number is no open descriptor, the kernel says so; it is only borrowed for the call.
    let fd = unsafe { BorrowedFd::borrow_raw(number) };
    fd.try_clone_to_owned()
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::process::Command;

    use super::*;

    fn ip(args: &str) -> bool {
        let status = Command::new("ip").args(args.split(' ')).status();
        status.is_ok_and(|status| status.success())
    }

    #[test]
    fn what_is_no_tap_device_is_refused() {
        for name in ["", "minivmm-none", "a/b", "longer-than-any-name"] {
            let error = Tap::open(name, 1).unwrap_err().to_string();
            assert!(error.contains("ip tuntap add"), "{name}: {error}");
        }
        let file = File::open("/dev/null").unwrap();
        for number in [file.as_raw_fd(), -1, 1 << 20] {
            let error = Tap::from_inherited(number).unwrap_err();
            assert!(matches!(error, TapError::NotTap(_)), "{error}");
        }
    }

    #[test]
    fn a_name_ends_with_its_field_or_before() {
        for name in ["", "tap0", "fifteen-letters"] {
            assert_eq!(name_of(&request(name).unwrap()), name);
        }
        let mut full = request("").unwrap();
        full.ifr_name.fill(b'x' as libc::c_char);
        assert_eq!(name_of(&full), "x".repeat(full.ifr_name.len()));
    }

    #[test]
    fn a_tap_interface_is_taken_once() {
        if !ip("tuntap add mvtap-unit mode tap") {
            return crate::skip::skip("TAP interfaces cannot be made here");
        }
        let mtu = ip("link set mvtap-unit mtu 1400");
        let several = Tap::open("mvtap-unit", 2);
        let tap = Tap::open("mvtap-unit", 1);
        let again = Tap::open("mvtap-unit", 1);
        let inherited = tap
            .as_ref()
            .map(|tap| Tap::from_inherited(tap.queues[0].as_raw_fd()));
        let deleted = ip("link delete mvtap-unit");
        assert!(mtu && deleted);
        let error = again.unwrap_err().to_string();
        assert!(error.ends_with("another process has it"), "{error}");
        let error = several.unwrap_err().to_string();
        assert!(error.contains("multi_queue"), "{error}");
        let inherited = inherited.unwrap().unwrap();
        let tap = tap.unwrap();
        for tap in [&tap, &inherited] {
            assert_eq!((tap.mtu, tap.set_offloads.is_some()), (Some(1400), true));
            assert_eq!(tap.name, "mvtap-unit");
        }
    }

    #[test]
    fn a_tap_interface_has_several_queues() {
        if !ip("tuntap add mvtap-queues mode tap multi_queue") {
            return crate::skip::skip("TAP interfaces cannot be made here");
        }
        let several = Tap::open("mvtap-queues", 8).map(|tap| tap.queues.len());
        let one = Tap::open("mvtap-queues", 1);
        assert!(ip("link delete mvtap-queues"));
        assert_eq!(several.unwrap(), 8);
        let error = one.unwrap_err().to_string();
        assert!(error.contains("multi_queue"), "{error}");
    }
}
