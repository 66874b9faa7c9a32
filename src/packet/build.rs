//! Whole packets, built into a new vector: for tests, benches, fuzz seeds and the demo's probes, not for the data path.
//!
//! ```
//! use flannel::packet::{Ipv4Packet, build};
//!
//! let bytes = build::Ipv4::new([10, 5, 34, 2].into(), [10, 5, 72, 2].into()).ttl(3).udp(4000, 53, b"hello");
//! assert_eq!(Ipv4Packet::new_checked(&bytes).unwrap().ttl(), 3);
//! ```
//!
//! Every checksum is filled in. A payload that does not fit the 16-bit length field panics.

use std::net::{Ipv4Addr, Ipv6Addr};

use super::{IcmpPacket, Icmpv6Packet, Ipv4Packet, Ipv6Packet, TcpFlags, TcpSegment, UdpDatagram};
use super::{icmp, icmpv6, ipv4, ipv6, protocol, put16, put32, tcp, udp};

/// The hop count that hosts start with.
const HOPS: u8 = 64;

/// An IPv4 packet in the making: no options, DF clear, identification and type of service zero.
#[derive(Clone, Copy, Debug)]
pub struct Ipv4 {
    src: Ipv4Addr,
    dst: Ipv4Addr,
    ttl: u8,
    tos: u8,
    ident: u16,
    dont_fragment: bool,
}

impl Ipv4 {
    /// A packet from `src` to `dst` with a TTL of 64.
    pub const fn new(src: Ipv4Addr, dst: Ipv4Addr) -> Self {
        Self {
            src,
            dst,
            ttl: HOPS,
            tos: 0,
            ident: 0,
            dont_fragment: false,
        }
    }

    /// With this time to live.
    pub fn ttl(self, ttl: u8) -> Self {
        Self { ttl, ..self }
    }

    /// With this type of service byte.
    pub fn tos(self, tos: u8) -> Self {
        Self { tos, ..self }
    }

    /// With this identification.
    pub fn ident(self, ident: u16) -> Self {
        Self { ident, ..self }
    }

    /// With the DF bit set or clear.
    pub fn dont_fragment(self, dont_fragment: bool) -> Self {
        Self { dont_fragment, ..self }
    }

    /// The packet with any payload.
    pub fn raw(self, protocol: u8, payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; ipv4::HEADER_LEN];
        bytes.extend_from_slice(payload);
        bytes[0] = 0x45;
        let total_len = length(bytes.len());
        put16(&mut bytes, 2, total_len);
        // The version, header length and total length were just written.
        let mut packet = Ipv4Packet::new_checked(bytes.as_mut_slice()).expect("a complete header");
        packet.set_tos(self.tos);
        packet.set_ident(self.ident);
        packet.set_dont_fragment(self.dont_fragment);
        packet.set_ttl(self.ttl);
        packet.set_protocol(protocol);
        packet.set_src(self.src);
        packet.set_dst(self.dst);
        packet.fill_checksum();
        bytes
    }

    /// The packet with a UDP datagram.
    pub fn udp(self, src_port: u16, dst_port: u16, payload: &[u8]) -> Vec<u8> {
        self.raw(
            protocol::UDP,
            &udp_datagram(src_port, dst_port, payload, |len| {
                self.pseudo_header(protocol::UDP, len)
            }),
        )
    }

    /// The packet with a TCP segment.
    pub fn tcp(self, header: &Tcp<'_>, payload: &[u8]) -> Vec<u8> {
        self.raw(
            protocol::TCP,
            &header.segment(payload, |len| self.pseudo_header(protocol::TCP, len)),
        )
    }

    /// The packet with an ICMP message of any type; `rest` is the second word of its header.
    pub fn icmp(self, kind: u8, code: u8, rest: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = icmp_message(kind, code, rest, payload);
        // The message was just made with a whole header.
        IcmpPacket::new_checked(bytes.as_mut_slice())
            .expect("a complete header")
            .fill_checksum();
        self.raw(protocol::ICMP, &bytes)
    }

    /// The packet with an ICMP echo request.
    pub fn icmp_echo(self, ident: u16, seq: u16, payload: &[u8]) -> Vec<u8> {
        self.icmp(icmp::ECHO_REQUEST, 0, u32::from(ident) << 16 | u32::from(seq), payload)
    }

    fn pseudo_header(self, protocol: u8, len: usize) -> u32 {
        super::checksum::pseudo_header_v4(self.src, self.dst, protocol, length(len))
    }
}

/// An IPv6 packet in the making: no extension headers, traffic class and flow label zero.
#[derive(Clone, Copy, Debug)]
pub struct Ipv6 {
    src: Ipv6Addr,
    dst: Ipv6Addr,
    hop_limit: u8,
    traffic_class: u8,
}

impl Ipv6 {
    /// A packet from `src` to `dst` with a hop limit of 64.
    pub const fn new(src: Ipv6Addr, dst: Ipv6Addr) -> Self {
        Self {
            src,
            dst,
            hop_limit: HOPS,
            traffic_class: 0,
        }
    }

    /// With this hop limit.
    pub fn hop_limit(self, hop_limit: u8) -> Self {
        Self { hop_limit, ..self }
    }

    /// With this traffic class byte.
    pub fn traffic_class(self, traffic_class: u8) -> Self {
        Self { traffic_class, ..self }
    }

    /// The packet with any payload.
    pub fn raw(self, next_header: u8, payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; ipv6::HEADER_LEN];
        bytes.extend_from_slice(payload);
        bytes[0] = 0x60;
        put16(&mut bytes, 4, length(payload.len()));
        // The version and payload length were just written.
        let mut packet = Ipv6Packet::new_checked(bytes.as_mut_slice()).expect("a complete header");
        packet.set_traffic_class(self.traffic_class);
        packet.set_next_header(next_header);
        packet.set_hop_limit(self.hop_limit);
        packet.set_src(self.src);
        packet.set_dst(self.dst);
        bytes
    }

    /// The packet with a UDP datagram.
    pub fn udp(self, src_port: u16, dst_port: u16, payload: &[u8]) -> Vec<u8> {
        self.raw(
            protocol::UDP,
            &udp_datagram(src_port, dst_port, payload, |len| {
                self.pseudo_header(protocol::UDP, len)
            }),
        )
    }

    /// The packet with a TCP segment.
    pub fn tcp(self, header: &Tcp<'_>, payload: &[u8]) -> Vec<u8> {
        self.raw(
            protocol::TCP,
            &header.segment(payload, |len| self.pseudo_header(protocol::TCP, len)),
        )
    }

    /// The packet with an ICMPv6 message of any type; `rest` is the second word of its header.
    pub fn icmp(self, kind: u8, code: u8, rest: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = icmp_message(kind, code, rest, payload);
        let pseudo_header = self.pseudo_header(protocol::ICMPV6, bytes.len());
        // The message was just made with a whole header.
        Icmpv6Packet::new_checked(bytes.as_mut_slice())
            .expect("a complete header")
            .fill_checksum(pseudo_header);
        self.raw(protocol::ICMPV6, &bytes)
    }

    /// The packet with an ICMPv6 echo request.
    pub fn icmp_echo(self, ident: u16, seq: u16, payload: &[u8]) -> Vec<u8> {
        self.icmp(
            icmpv6::ECHO_REQUEST,
            0,
            u32::from(ident) << 16 | u32::from(seq),
            payload,
        )
    }

    fn pseudo_header(self, protocol: u8, len: usize) -> u32 {
        super::checksum::pseudo_header_v6(self.src, self.dst, protocol, u32::from(length(len)))
    }
}

/// The header of a TCP segment in the making.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tcp<'a> {
    /// The source port.
    pub src_port: u16,
    /// The destination port.
    pub dst_port: u16,
    /// The sequence number.
    pub seq: u32,
    /// The acknowledgement number.
    pub ack: u32,
    /// The control bits.
    pub flags: TcpFlags,
    /// The receive window.
    pub window: u16,
    /// The options: a multiple of 4, at most 40 bytes, or the build panics.
    pub options: &'a [u8],
}

impl Tcp<'_> {
    fn segment(&self, payload: &[u8], pseudo_header: impl Fn(usize) -> u32) -> Vec<u8> {
        let header_len = tcp::HEADER_LEN + self.options.len();
        assert!(
            header_len.is_multiple_of(4) && header_len <= 60,
            "{} bytes of TCP options",
            self.options.len()
        );
        let mut bytes = vec![0; tcp::HEADER_LEN];
        bytes.extend_from_slice(self.options);
        bytes.extend_from_slice(payload);
        bytes[12] = (header_len as u8 / 4) << 4;
        let pseudo_header = pseudo_header(bytes.len());
        // The data offset was just written.
        let mut segment = TcpSegment::new_checked(bytes.as_mut_slice()).expect("a complete header");
        segment.set_src_port(self.src_port);
        segment.set_dst_port(self.dst_port);
        segment.set_seq(self.seq);
        segment.set_ack(self.ack);
        segment.set_flags(self.flags);
        segment.set_window(self.window);
        segment.fill_checksum(pseudo_header);
        bytes
    }
}

fn udp_datagram(src_port: u16, dst_port: u16, payload: &[u8], pseudo_header: impl Fn(usize) -> u32) -> Vec<u8> {
    let mut bytes = vec![0; udp::HEADER_LEN];
    bytes.extend_from_slice(payload);
    let len = length(bytes.len());
    put16(&mut bytes, 4, len);
    let pseudo_header = pseudo_header(bytes.len());
    // The length was just written.
    let mut datagram = UdpDatagram::new_checked(bytes.as_mut_slice()).expect("a complete header");
    datagram.set_src_port(src_port);
    datagram.set_dst_port(dst_port);
    datagram.fill_checksum(pseudo_header);
    bytes
}

/// An ICMP message of either version, its checksum zero.
fn icmp_message(kind: u8, code: u8, rest: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![kind, code, 0, 0, 0, 0, 0, 0];
    put32(&mut bytes, 4, rest);
    bytes.extend_from_slice(payload);
    bytes
}

/// A length as its 16-bit field has it.
fn length(len: usize) -> u16 {
    assert!(
        len <= usize::from(u16::MAX),
        "{len} bytes do not fit a 16-bit length field"
    );
    len as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    const V4: (Ipv4Addr, Ipv4Addr) = (Ipv4Addr::new(10, 5, 1, 2), Ipv4Addr::new(10, 5, 2, 2));
    const V6: (Ipv6Addr, Ipv6Addr) = (
        Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 2),
        Ipv6Addr::new(0xfd00, 2, 0, 0, 0, 0, 0, 2),
    );

    #[test]
    fn ipv4_packets_verify() {
        let ip = Ipv4::new(V4.0, V4.1).ttl(7).tos(0x12).ident(99).dont_fragment(true);
        for bytes in [
            ip.udp(1, 2, b"odd"),
            ip.tcp(&Tcp::default(), b"data"),
            ip.icmp_echo(1, 2, b"ping"),
        ] {
            let packet = Ipv4Packet::new_checked(bytes.as_slice()).unwrap();
            assert!(packet.verify_checksum());
            assert_eq!((packet.ttl(), packet.tos(), packet.ident()), (7, 0x12, 99));
            assert!(packet.dont_fragment() && !packet.is_fragment());
            let intact = match packet.protocol() {
                protocol::UDP => UdpDatagram::new_checked(packet.payload())
                    .unwrap()
                    .verify_checksum(packet.pseudo_header()),
                protocol::TCP => TcpSegment::new_checked(packet.payload())
                    .unwrap()
                    .verify_checksum(packet.pseudo_header()),
                _ => IcmpPacket::new_checked(packet.payload()).unwrap().verify_checksum(),
            };
            assert!(intact, "protocol {}", packet.protocol());
        }
    }

    #[test]
    fn ipv6_packets_verify() {
        let ip = Ipv6::new(V6.0, V6.1).hop_limit(7).traffic_class(0x12);
        for bytes in [
            ip.udp(1, 2, b"odd"),
            ip.tcp(&Tcp::default(), b"data"),
            ip.icmp_echo(1, 2, b"ping"),
        ] {
            let packet = Ipv6Packet::new_checked(bytes.as_slice()).unwrap();
            assert_eq!((packet.hop_limit(), packet.traffic_class()), (7, 0x12));
            let pseudo_header = packet.pseudo_header(packet.next_header(), u32::from(packet.payload_len()));
            let intact = match packet.next_header() {
                protocol::UDP => UdpDatagram::new_checked(packet.payload())
                    .unwrap()
                    .verify_checksum(pseudo_header),
                protocol::TCP => TcpSegment::new_checked(packet.payload())
                    .unwrap()
                    .verify_checksum(pseudo_header),
                _ => Icmpv6Packet::new_checked(packet.payload())
                    .unwrap()
                    .verify_checksum(pseudo_header),
            };
            assert!(intact, "protocol {}", packet.next_header());
        }
    }
}
