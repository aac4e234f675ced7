//! Packets (§ 5.10.6): a header, behind which a packet of data has its bytes.

use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Length of `struct virtio_vsock_hdr`.
pub(super) const HEADER_LEN: usize = 44;

/// The host's context ID (§ 5.10.4).
pub(super) const HOST_CID: u64 = 2;

/// The one type of sockets that there is: streams (§ 5.10.6).
pub(super) const STREAM: u16 = 1;

/// VMADDR_PORT_ANY of Linux: no port.
pub(super) const NO_PORT: u32 = u32::MAX;

/// Operations (§ 5.10.6).
pub(super) mod op {
    pub(crate) const REQUEST: u16 = 1;
    pub(crate) const RESPONSE: u16 = 2;
    pub(crate) const RST: u16 = 3;
    pub(crate) const SHUTDOWN: u16 = 4;
    pub(crate) const RW: u16 = 5;
    pub(crate) const CREDIT_UPDATE: u16 = 6;
    pub(crate) const CREDIT_REQUEST: u16 = 7;
}

/// Flags of SHUTDOWN: its sender will not receive, and not send (§ 5.10.6.5).
pub(super) const NO_RECEIVE: u32 = 1;
pub(super) const NO_SEND: u32 = 2;
pub(super) const BOTH: u32 = NO_RECEIVE | NO_SEND;

/// The two ports that tell a connection from others of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Ports {
    pub(super) host: u32,
    /// [`NO_PORT`] where the guest knows nothing of the connection, or no longer.
    pub(super) guest: u32,
}

impl Ports {
    /// As a number, for epoll(7).
    pub(super) fn token(self) -> u64 {
        u64::from(self.host) << 32 | u64::from(self.guest)
    }

    pub(super) fn from_token(token: u64) -> Self {
        Self {
            host: (token >> 32) as u32,
            guest: token as u32,
        }
    }
}

/// `struct virtio_vsock_hdr`, little-endian as this processor is, without what it means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C, packed(4))]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    pub(super) len: u32,
    /// `type`
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    pub(super) buf_alloc: u32,
    pub(super) fwd_cnt: u32,
}

impl Header {
    pub(super) fn parse(bytes: &[u8; HEADER_LEN]) -> Self {
        zerocopy::transmute!(*bytes)
    }

    pub(super) fn bytes(&self) -> [u8; HEADER_LEN] {
        zerocopy::transmute!(*self)
    }

    /// The connection that a packet of the guest belongs to.
    pub(super) fn ports(&self) -> Ports {
        Ports {
            host: self.dst_port,
            guest: self.src_port,
        }
    }

    /// What resets that connection, also where no such one can be.
    pub(super) fn reset(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            kind: self.kind,
            ..Self::reset_of(self.ports(), self.src_cid)
        }
    }

    /// What resets this connection of the guest.
    pub(super) fn reset_of(ports: Ports, guest_cid: u64) -> Self {
        Self {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: ports.host,
            dst_port: ports.guest,
            len: 0,
            kind: STREAM,
            op: op::RST,
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        }
    }
}
