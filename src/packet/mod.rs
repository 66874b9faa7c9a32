//! Packets as views over bytes: checked construction, then getters and setters that cannot panic.
//!
//! | file | protocol | source |
//! | --- | --- | --- |
//! | [`ipv4`] | IPv4 header, TTL | RFC 791, 1812, 1624 |
//! | [`ipv6`] | IPv6 header, extension headers | RFC 8200 |
//! | [`icmp`] | ICMP, and the errors a router sends | RFC 792, 1122, 1812 |
//! | [`icmpv6`] | the same for IPv6 | RFC 4443 |
//! | [`tcp`] | TCP header | RFC 9293 |
//! | [`udp`] | UDP header | RFC 768 |
//! | [`checksum`] | the Internet checksum | RFC 1071, 1624 |
//! | [`flow`] | which packets belong together | |
//! | [`build`] | whole packets, for tests, benches and the lab | |
//!
//! A view is generic over its buffer: `&[u8]` to read, `&mut [u8]` to write. `new_checked` is the only way to one, so
//! whoever holds a view holds a header that is complete and consistent. Nothing here allocates (but [`build`]), does
//! I/O, or knows of a peer.

use std::fmt;
use std::net::IpAddr;

pub mod build;
pub mod checksum;
pub mod flow;
pub mod icmp;
pub mod icmpv6;
pub mod ipv4;
pub mod ipv6;
pub mod tcp;
pub mod udp;

pub use icmp::IcmpPacket;
pub use icmpv6::Icmpv6Packet;
pub use ipv4::Ipv4Packet;
pub use ipv6::Ipv6Packet;
pub use tcp::{TcpFlags, TcpSegment};
pub use udp::UdpDatagram;

/// Numbers of the protocols that are carried in IP, from IANA's "Assigned Internet Protocol Numbers".
pub mod protocol {
    /// ICMP for IPv4, RFC 792.
    pub const ICMP: u8 = 1;
    /// TCP, RFC 9293.
    pub const TCP: u8 = 6;
    /// UDP, RFC 768.
    pub const UDP: u8 = 17;
    /// ICMP for IPv6, RFC 4443.
    pub const ICMPV6: u8 = 58;
}

/// Why bytes are not a packet of the protocol that they were taken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Malformed {
    /// The bytes end before the header does, or before the length that the header claims.
    Truncated,
    /// The version is not that of the protocol.
    Version,
    /// The header length is below the protocol's minimum, or a chain of headers is longer than any sane one.
    HeaderLength,
    /// The length field is below the length of the header itself.
    TotalLength,
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Truncated => "the packet ends before its header or its stated length does",
            Self::Version => "the IP version is not the expected one",
            Self::HeaderLength => "the header length is out of range",
            Self::TotalLength => "the stated length is shorter than the header",
        })
    }
}

impl std::error::Error for Malformed {}

/// The version of an IP packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IpVersion {
    /// RFC 791.
    V4,
    /// RFC 8200.
    V6,
}

impl IpVersion {
    /// The version that the packet's first four bits state. Nothing else is looked at.
    #[inline]
    pub fn of(packet: &[u8]) -> Result<Self, Malformed> {
        match packet.first().map(|byte| byte >> 4) {
            Some(4) => Ok(Self::V4),
            Some(6) => Ok(Self::V6),
            Some(_) => Err(Malformed::Version),
            None => Err(Malformed::Truncated),
        }
    }
}

/// A packet as it comes out of a TUN device: an IP header of either version in front.
#[derive(Clone, Copy, Debug)]
pub enum IpPacket<'a> {
    /// An IPv4 packet.
    V4(Ipv4Packet<&'a [u8]>),
    /// An IPv6 packet.
    V6(Ipv6Packet<&'a [u8]>),
}

impl<'a> IpPacket<'a> {
    /// Classifies `bytes` by the version and checks the header of that version.
    #[inline]
    pub fn parse(bytes: &'a [u8]) -> Result<Self, Malformed> {
        Ok(match IpVersion::of(bytes)? {
            IpVersion::V4 => Self::V4(Ipv4Packet::new_checked(bytes)?),
            IpVersion::V6 => Self::V6(Ipv6Packet::new_checked(bytes)?),
        })
    }

    /// The source address.
    #[inline]
    pub fn src(&self) -> IpAddr {
        match self {
            Self::V4(packet) => packet.src().into(),
            Self::V6(packet) => packet.src().into(),
        }
    }

    /// The destination address.
    #[inline]
    pub fn dst(&self) -> IpAddr {
        match self {
            Self::V4(packet) => packet.dst().into(),
            Self::V6(packet) => packet.dst().into(),
        }
    }

    /// Length of the packet in bytes, header included; what follows in the buffer is padding.
    #[inline]
    pub fn total_len(&self) -> usize {
        match self {
            Self::V4(packet) => usize::from(packet.total_len()),
            Self::V6(packet) => packet.total_len(),
        }
    }
}

/// What becomes of a packet when a router takes its hop from it.
#[must_use = "an expired packet must not be forwarded"]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Hop {
    /// The TTL or hop limit is one lower now: forward the packet.
    Forward,
    /// The last hop is used up. The packet is left as it came, for the ICMP error to quote.
    Expired,
}

/// The ICMP errors that a router of an overlay sends, in either IP version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IcmpError {
    /// No route covers the destination.
    NetUnreachable,
    /// The packet's last hop was used up on the way.
    TimeExceeded,
}

/// `N` bytes of `bytes` from `at`.
#[inline]
pub(crate) fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

/// The big-endian 16-bit number at `at`.
#[inline]
pub(crate) fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(array(bytes, at))
}

/// The big-endian 32-bit number at `at`.
#[inline]
pub(crate) fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(array(bytes, at))
}

/// Writes `value` in network order at `at`.
#[inline]
pub(crate) fn put16(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

/// Writes `value` in network order at `at`.
#[inline]
pub(crate) fn put32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;

    #[test]
    fn version_decides_the_view() {
        let v4 = build::Ipv4::new(Ipv4Addr::new(10, 5, 1, 2), Ipv4Addr::new(10, 5, 2, 2)).udp(1, 2, b"x");
        let v6 = build::Ipv6::new(Ipv6Addr::LOCALHOST, Ipv6Addr::UNSPECIFIED).udp(1, 2, b"x");

        let IpPacket::V4(_) = IpPacket::parse(&v4).unwrap() else {
            panic!("not IPv4")
        };
        let IpPacket::V6(_) = IpPacket::parse(&v6).unwrap() else {
            panic!("not IPv6")
        };
        assert_eq!(IpPacket::parse(&v4).unwrap().dst(), IpAddr::from([10, 5, 2, 2]));
        assert_eq!(IpPacket::parse(&v6).unwrap().src(), IpAddr::from(Ipv6Addr::LOCALHOST));
        assert_eq!(IpPacket::parse(&v4).unwrap().total_len(), v4.len());
        assert_eq!(IpPacket::parse(&v6).unwrap().total_len(), v6.len());
    }

    #[test]
    fn neither_version_is_refused() {
        assert_eq!(IpPacket::parse(&[]).unwrap_err(), Malformed::Truncated);
        assert_eq!(IpPacket::parse(&[0x50; 40]).unwrap_err(), Malformed::Version);
        assert_eq!(IpPacket::parse(&[0x45; 4]).unwrap_err(), Malformed::Truncated);
        assert_eq!(IpPacket::parse(&[0x60; 4]).unwrap_err(), Malformed::Truncated);
    }
}
