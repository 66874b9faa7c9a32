//! Segmentation offload without the hardware: superpackets that the TUN device hands over become packets of the MTU, and
//! packets from peers become superpackets. Pure: bytes in, ranges of bytes out; no payload is copied, nothing is allocated
//! for each packet.
//!
//! | file | what it does |
//! | --- | --- |
//! | [`virtio`] | the header in front of each packet of a TUN device opened with `IFF_VNET_HDR` |
//! | [`split`] | device to peers: one superpacket becomes headers in scratch space and ranges of its payload |
//! | [`coalesce`] | peers to device: packets of one flow become one write, by the kernel's rules for GRO |
//!
//! The kernel's names: TSO is segmentation of TCP, USO of UDP (`SKB_GSO_UDP_L4`), GRO their reverse.

pub mod coalesce;
pub mod send_plan;
pub mod split;
pub mod virtio;

pub use coalesce::{Coalescer, Merge, Write};
pub use send_plan::SendPlan;
pub use split::{Headers, Segments};
pub use virtio::{GsoKind, PartialChecksum, VirtioNetHdr};

use crate::packet;

/// Length in bytes of the longest IP packet that is split or written: the 16-bit total length of IPv4.
pub const MAX_PACKET: usize = 65_535;

/// Why a packet and its virtio header cannot be what the device handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// The buffer ends before the virtio header does.
    #[error("a virtio header takes 10 bytes, and there are {0}")]
    HeaderTruncated(usize),
    /// A kind of segmentation that was never switched on: UFO, or UDP tunnels.
    #[error("gso_type {0:#04x} of the virtio header is none of those asked of the device (TCPv4, TCPv6, UDP_L4)")]
    GsoType(u8),
    /// A superpacket whose segments have no payload.
    #[error("gso_size of the virtio header is 0 on a packet that is to be segmented")]
    GsoSize,
    /// More segments than any transport makes.
    #[error(
        "gso_size {size} cuts {payload} bytes of payload into so many segments that their headers exceed {max} bytes",
        max = split::MAX_HEADERS
    )]
    TooManySegments {
        /// Payload bytes per segment.
        size: u16,
        /// Payload bytes in all.
        payload: usize,
    },
    /// The checksum to be finished does not lie within the packet, or not where its transport has it.
    #[error("csum_start {start} and csum_offset {offset} of the virtio header point at no checksum of the packet")]
    Checksum {
        /// Where summing starts, in bytes from the start of the packet.
        start: u16,
        /// Where the checksum is, in bytes from `start`.
        offset: u16,
    },
    /// The packet's protocol is not that of its gso_type.
    #[error("the packet is not of the protocol that gso_type {0:?} of the virtio header states")]
    Kind(GsoKind),
    /// The length field of the IP or UDP header is not that of the packet.
    #[error("a packet of {actual} bytes to be segmented states a length of {stated}")]
    Length {
        /// By the header, in bytes.
        stated: usize,
        /// In fact.
        actual: usize,
    },
    /// A superpacket that is a fragment.
    #[error("a packet to be segmented is an IP fragment")]
    Fragment,
    /// The IP or transport header is none.
    #[error("cannot read the headers of a packet to be segmented: {0}")]
    Packet(#[from] packet::Malformed),
}
