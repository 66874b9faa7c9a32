//! What may be merged with what: the kernel's rules for GRO as functions of packets.

use crate::{
    offload::{GsoKind, MAX_PACKET},
    packet::{TcpFlags, array, be16, be32, checksum, ipv4, ipv6, protocol, tcp, udp},
};

use super::{MAX_MERGED, Run};

/// Where the transport header is in an IPv4 packet without options, the only kind that is merged.
pub(super) const IPV4_TRANSPORT: usize = ipv4::HEADER_LEN;

/// The same for IPv6 without extension headers.
pub(super) const IPV6_TRANSPORT: usize = ipv6::HEADER_LEN;

/// A packet by what may be done with it.
pub(super) enum Class {
    /// Part of a flow.
    Flow(Shape),
    /// May be part of any flow between its addresses, such as a fragment: it must not be overtaken by them.
    Between,
    /// Part of none that is ever merged.
    Other,
}

/// Where the parts of a packet of a flow are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    /// What merging makes of the packet.
    pub(super) kind: GsoKind,
    /// Where the transport header begins.
    pub(super) transport: usize,
    /// Length of all headers; means nothing unless the packet is mergeable.
    pub(super) header_len: usize,
    /// Whether the packet may be merged with any other.
    pub(super) mergeable: bool,
}

impl Shape {
    /// That of a packet of no flow.
    pub(super) const NONE: Self = Self {
        kind: GsoKind::None,
        transport: 0,
        header_len: 0,
        mergeable: false,
    };

    #[inline]
    pub(super) fn is_tcp(self) -> bool {
        matches!(self.kind, GsoKind::TcpV4 | GsoKind::TcpV6)
    }
}

/// How the IPv4 identification goes on from packet to packet of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ident {
    /// One more each time, as segmentation makes it. IPv6 has none, and counts as this.
    Ascending,
    /// The first packet's, which is only allowed with DF.
    Constant,
}

/// What `packet` is to the coalescer. It may be anything.
#[inline]
pub(super) fn classify(packet: &[u8]) -> Class {
    match packet.first().map(|byte| byte >> 4) {
        Some(4) if packet.len() >= ipv4::HEADER_LEN => {
            let protocol = packet[ipv4::PROTOCOL];
            // The reserved bit, MF and the offset.
            let fragment = be16(packet, ipv4::FRAGMENT) & !0x4000 != 0;
            let has_options = packet[0] != 0x45;
            if fragment || has_options && is_transport(protocol) {
                return Class::Between;
            }
            let whole = usize::from(be16(packet, ipv4::TOTAL_LEN)) == packet.len();
            classify_transport(packet, IPV4_TRANSPORT, protocol, whole)
        }
        Some(6) if packet.len() >= ipv6::HEADER_LEN => {
            let protocol = packet[ipv6::NEXT_HEADER];
            if ipv6::EXTENSION_HEADERS.contains(&protocol) {
                return Class::Between;
            }
            let whole = usize::from(be16(packet, ipv6::PAYLOAD_LEN)) == packet.len() - ipv6::HEADER_LEN;
            classify_transport(packet, IPV6_TRANSPORT, protocol, whole)
        }
        _ => Class::Other,
    }
}

/// The same for what is behind a plain IP header. `whole`: the packet is as long as it states.
#[inline]
fn classify_transport(packet: &[u8], transport: usize, protocol: u8, whole: bool) -> Class {
    let bytes = &packet[transport..];
    match protocol {
        protocol::UDP if bytes.len() >= udp::HEADER_LEN => Class::Flow(Shape {
            kind: GsoKind::UdpL4,
            transport,
            header_len: transport + udp::HEADER_LEN,
            mergeable: whole
                && bytes.len() > udp::HEADER_LEN
                && usize::from(be16(bytes, udp::LEN)) == bytes.len()
                && be16(bytes, udp::CHECKSUM) != 0,
        }),
        protocol::TCP if bytes.len() >= tcp::HEADER_LEN => {
            let header_len = usize::from(bytes[tcp::DATA_OFFSET] >> 4) * 4;
            let special = TcpFlags::SYN | TcpFlags::FIN | TcpFlags::RST | TcpFlags::URG | TcpFlags::CWR;
            Class::Flow(Shape {
                kind: if transport == IPV4_TRANSPORT {
                    GsoKind::TcpV4
                } else {
                    GsoKind::TcpV6
                },
                transport,
                header_len: transport + header_len,
                // A segment without data is an acknowledgement, each of which counts.
                mergeable: whole
                    && header_len >= tcp::HEADER_LEN
                    && bytes.len() > header_len
                    && !TcpFlags(bytes[tcp::FLAGS]).intersects(special),
            })
        }
        _ if is_transport(protocol) => Class::Between,
        _ => Class::Other,
    }
}

#[inline]
fn is_transport(protocol: u8) -> bool {
    matches!(protocol, protocol::TCP | protocol::UDP)
}

/// Whether the packet's data is to be handed to the application at once, which ends a run.
#[inline]
pub(super) fn pushes(packet: &[u8], shape: Shape) -> bool {
    shape.is_tcp() && TcpFlags(packet[shape.transport + tcp::FLAGS]).contains(TcpFlags::PSH)
}

/// Whether all checksums of a mergeable packet are right: merging would declare a damaged one good.
#[inline]
pub(super) fn is_intact(packet: &[u8], shape: Shape) -> bool {
    let (ip, transport) = packet.split_at(shape.transport);
    if shape.transport == IPV4_TRANSPORT && checksum::checksum(ip) != 0 {
        return false;
    }
    // The length was found to be what a 16-bit field states.
    let pseudo_header = pseudo_header(ip, shape, transport.len() as u16);
    checksum::fold(checksum::combine(pseudo_header, checksum::sum(transport))) == 0xffff
}

/// Partial sum of the pseudo header of a packet with the IP header `ip`.
#[inline]
pub(super) fn pseudo_header(ip: &[u8], shape: Shape, transport_len: u16) -> u32 {
    let protocol = if shape.is_tcp() { protocol::TCP } else { protocol::UDP };
    checksum::sum(addresses(ip)) + u32::from(protocol) + u32::from(transport_len)
}

/// Both addresses of a packet with a whole IP header; those of the two versions differ in length.
#[inline]
pub(super) fn addresses(packet: &[u8]) -> &[u8] {
    match packet[0] >> 4 {
        4 => &packet[ipv4::SRC..ipv4::HEADER_LEN],
        _ => &packet[ipv6::SRC..ipv6::HEADER_LEN],
    }
}

/// Addresses, ports and protocol.
#[inline]
pub(super) fn flow_key(packet: &[u8], shape: Shape) -> [u64; 5] {
    let word = |at: usize| u64::from_ne_bytes(array(packet, at));
    let ports = u64::from(be32(packet, shape.transport)) | u64::from(shape.is_tcp()) << 32;
    match shape.transport {
        IPV4_TRANSPORT => [word(ipv4::SRC), 0, 0, 0, ports],
        _ => {
            let [src, dst] = [ipv6::SRC, ipv6::DST];
            [word(src), word(src + 8), word(dst), word(dst + 8), ports]
        }
    }
}

/// A hash of the flow, with its best bits at the top.
#[inline]
pub(super) fn flow_hash(packet: &[u8], shape: Shape) -> u64 {
    // 2^64 divided by the golden ratio: Knuth's multiplicative hashing.
    const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;
    flow_key(packet, shape)
        .into_iter()
        .fold(0, |hash: u64, word| (hash.rotate_left(5) ^ word).wrapping_mul(SPREAD))
}

impl Run {
    /// Whether `packet`, a mergeable one of the run's flow, continues the run that began with `first`, checksums aside; if
    /// so, how the identification goes on.
    #[inline]
    pub(super) fn continued_by(&self, first: &[u8], packet: &[u8], shape: Shape) -> Option<Ident> {
        let payload_len = packet.len() - shape.header_len;
        let fits = shape.header_len == self.shape.header_len
            && payload_len <= self.payload_len
            && self.total_len + payload_len <= MAX_PACKET
            && self.count < MAX_MERGED;
        if !fits || shape.is_tcp() && !self.continued_by_segment(first, packet) {
            return None;
        }
        if shape.transport == IPV4_TRANSPORT {
            self.continued_by_ipv4(first, packet)
        } else {
            // Version, traffic class and flow label; hop limit.
            let same = first[..4] == packet[..4] && first[ipv6::HOP_LIMIT] == packet[ipv6::HOP_LIMIT];
            same.then_some(Ident::Ascending)
        }
    }

    #[inline]
    fn continued_by_ipv4(&self, first: &[u8], packet: &[u8]) -> Option<Ident> {
        // Version, header length and type of service; flags, fragment offset and TTL.
        let same = first[..=ipv4::TOS] == packet[..=ipv4::TOS]
            && first[ipv4::FRAGMENT..=ipv4::TTL] == packet[ipv4::FRAGMENT..=ipv4::TTL];
        if !same {
            return None;
        }
        let distance = be16(packet, ipv4::IDENT).wrapping_sub(be16(first, ipv4::IDENT));
        let dont_fragment = be16(first, ipv4::FRAGMENT) & 0x4000 != 0;
        let ident = match distance {
            0 if dont_fragment => Ident::Constant,
            _ if usize::from(distance) == self.count => Ident::Ascending,
            _ => return None,
        };
        // The second packet decides.
        (self.count == 1 || ident == self.ident).then_some(ident)
    }

    #[inline]
    fn continued_by_segment(&self, first: &[u8], packet: &[u8]) -> bool {
        // The word that begins with the data offset ends with the window; the flags in it may differ in PSH.
        const PSH: u32 = (TcpFlags::PSH.0 as u32) << 16;

        let transport = self.shape.transport;
        let (first, segment) = (&first[transport..], &packet[transport..]);
        let options = tcp::HEADER_LEN..self.shape.header_len - transport;
        be32(segment, tcp::SEQ) == self.next_seq
            && be32(first, tcp::ACK) == be32(segment, tcp::ACK)
            && (be32(first, tcp::DATA_OFFSET) ^ be32(segment, tcp::DATA_OFFSET)) & !PSH == 0
            && be16(first, tcp::URGENT) == be16(segment, tcp::URGENT)
            && first[options.clone()] == segment[options]
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{Coalescer, Merge, sample::*},
        *,
    };
    use crate::packet::{build, put16};

    #[test]
    fn a_gap_or_an_overlap_in_sequence_numbers_is_not_merged() {
        assert_eq!(counts(&[segment(0), segment(2)]), [1, 1]);
        assert_eq!(counts(&[segment(1), segment(0)]), [1, 1]);
        assert_eq!(counts(&[segment(0), segment(0)]), [1, 1]);
    }

    #[test]
    fn sequence_numbers_may_wrap() {
        let at = |index: u16, seq| V4.ident(index).tcp(&tcp(seq), &noise(100));
        assert_eq!(counts(&[at(0, 0xffff_ffce), at(1, 50)]), [2]);
    }

    #[test]
    fn a_retransmission_ends_the_run_and_may_start_one() {
        assert_eq!(
            counts(&[segment(0), segment(1), segment(1), segment(2)]),
            [2, 2],
            "the identification continues from the retransmitted one"
        );
    }

    #[test]
    fn a_shorter_segment_ends_the_run() {
        let short = V4.ident(1).tcp(&tcp(100), &noise(99));
        let next = V4.ident(2).tcp(&tcp(199), &noise(99));
        assert_eq!(counts(&[segment(0), short, next]), [2, 1]);
    }

    #[test]
    fn a_longer_segment_starts_a_run() {
        let long = V4.ident(1).tcp(&tcp(100), &noise(101));
        let next = V4.ident(2).tcp(&tcp(201), &noise(101));
        assert_eq!(counts(&[segment(0), long, next]), [1, 2]);
    }

    #[test]
    fn a_shorter_datagram_ends_the_run() {
        let packets = [
            datagram(0, 50),
            datagram(1, 50),
            datagram(2, 49),
            datagram(3, 49),
            datagram(4, 50),
        ];
        assert_eq!(counts(&packets), [3, 1, 1]);
    }

    #[test]
    fn push_ends_the_run_and_is_kept() {
        let pushed = |index: u16| {
            let header = build::Tcp {
                flags: ACK | TcpFlags::PSH,
                ..tcp(100 * u32::from(index))
            };
            V4.ident(index).tcp(&header, &noise(100))
        };
        assert_eq!(counts(&[segment(0), pushed(1), segment(2), segment(3)]), [2, 2]);
        assert_eq!(counts(&[pushed(0), segment(1), segment(2)]), [1, 2]);
    }

    #[test]
    fn syn_fin_rst_urg_and_cwr_are_never_merged_and_end_the_run() {
        for flag in [
            TcpFlags::SYN,
            TcpFlags::FIN,
            TcpFlags::RST,
            TcpFlags::URG,
            TcpFlags::CWR,
        ] {
            let special = |index: u16| {
                let header = build::Tcp {
                    flags: ACK | flag,
                    ..tcp(100 * u32::from(index))
                };
                V4.ident(index).tcp(&header, &noise(100))
            };
            assert_eq!(
                counts(&[segment(0), segment(1), special(2), special(3), segment(4), segment(5)]),
                [2, 1, 1, 2],
                "{flag:?}"
            );
        }
    }

    #[test]
    fn ece_must_be_on_all_or_none() {
        let ece = |index: u16| {
            let header = build::Tcp {
                flags: ACK | TcpFlags::ECE,
                ..tcp(100 * u32::from(index))
            };
            V4.ident(index).tcp(&header, &noise(100))
        };
        assert_eq!(counts(&[ece(0), ece(1), segment(2), segment(3)]), [2, 2]);
    }

    #[test]
    fn reserved_bits_must_be_the_same() {
        let accurate_ecn = |index| changed(segment(index), |packet| packet[32] |= 1);
        assert_eq!(counts(&[segment(0), accurate_ecn(1), accurate_ecn(2)]), [1, 2]);
    }

    #[test]
    fn acknowledgements_without_data_are_seen_for_themselves_and_end_the_run() {
        let ack = V4.ident(1).tcp(&tcp(100), &[]);
        let after = |index: u16| V4.ident(index + 1).tcp(&tcp(100 * u32::from(index)), &noise(100));
        assert_eq!(counts(&[segment(0), ack.clone(), after(1), after(2)]), [1, 1, 2]);
        assert_eq!(counts(&[ack.clone(), ack]), [1, 1]);
    }

    /// A field's name, and what changes it.
    type Change = (&'static str, fn(&mut [u8]));

    #[test]
    fn each_of_these_must_be_the_same_in_a_run() {
        let changes: [Change; 8] = [
            ("type of service", |packet| packet[1] ^= 4),
            ("ECN", |packet| packet[1] ^= 3),
            ("DF", |packet| packet[6] ^= 0x40),
            ("TTL", |packet| packet[8] -= 1),
            ("acknowledgement", |packet| packet[31] ^= 1),
            ("window", |packet| packet[35] ^= 1),
            ("urgent pointer", |packet| packet[39] ^= 1),
            ("options", |packet| packet[47] ^= 1),
        ];
        for (what, change) in changes {
            let packets = [segment(0), changed(segment(1), change), changed(segment(2), change)];
            assert_eq!(counts(&packets), [1, 2], "{what}");
        }
        let changes: [Change; 4] = [
            ("traffic class", |packet| packet[1] ^= 0x40),
            ("ECN", |packet| packet[1] ^= 0x10),
            ("flow label", |packet| packet[3] ^= 1),
            ("hop limit", |packet| packet[7] -= 1),
        ];
        for (what, change) in changes {
            let packets = [
                segment_v6(0),
                changed(segment_v6(1), change),
                changed(segment_v6(2), change),
            ];
            assert_eq!(counts(&packets), [1, 2], "{what}");
        }
    }

    #[test]
    fn each_of_these_makes_another_flow() {
        // Source and destination address and port, last bytes.
        for at in [15, 19, 21, 23] {
            let other = |index| changed(segment(index), |packet| packet[at] ^= 1);
            assert_eq!(
                counts(&[segment(0), other(0), segment(1), other(1)]),
                [2, 2],
                "byte {at}"
            );
        }
        for at in [8, 23, 24, 39, 41, 43] {
            let other = |index| changed(segment_v6(index), |packet| packet[at] ^= 1);
            assert_eq!(
                counts(&[segment_v6(0), other(0), segment_v6(1), other(1)]),
                [2, 2],
                "byte {at}"
            );
        }
    }

    #[test]
    fn options_of_different_length_are_not_merged() {
        let bare = V4.ident(1).tcp(
            &build::Tcp {
                options: &[],
                ..tcp(100)
            },
            &noise(100),
        );
        assert_eq!(counts(&[segment(0), bare]), [1, 1]);
    }

    #[test]
    fn without_df_only_consecutive_identifications_are_merged() {
        let at = |ident: u16| V4.ident(ident).udp(1, 2, b"data");
        assert_eq!(counts(&[at(7), at(8), at(9)]), [3]);
        assert_eq!(counts(&[at(0xffff), at(0), at(1)]), [3], "they wrap");
        assert_eq!(counts(&[at(7), at(7)]), [1, 1]);
        assert_eq!(counts(&[at(7), at(9)]), [1, 1]);
        assert_eq!(counts(&[at(7), at(6)]), [1, 1]);
    }

    #[test]
    fn with_df_a_constant_identification_is_merged_too_but_no_mixture() {
        let at = |ident: u16| V4.dont_fragment(true).ident(ident).udp(1, 2, b"data");
        let counts = |idents: &[u16]| {
            let packets: Vec<_> = idents.iter().map(|&ident| at(ident)).collect();
            let arena = packets.concat();
            let mut coalescer = Coalescer::new(Merge::ALL);
            for index in 0..packets.len() {
                coalescer.push(&arena, index * 32..(index + 1) * 32);
            }
            coalescer.writes(&arena).map(|write| write.count()).collect::<Vec<_>>()
        };
        assert_eq!(counts(&[0, 0, 0]), [3]);
        assert_eq!(counts(&[7, 8, 9]), [3]);
        assert_eq!(counts(&[7, 7, 8]), [2, 1]);
        assert_eq!(counts(&[7, 7, 9]), [2, 1]);
        assert_eq!(counts(&[7, 8, 7]), [2, 1]);
        assert_eq!(counts(&[7, 8, 8]), [2, 1]);
        assert_eq!(counts(&[7, 9]), [1, 1]);
    }

    #[test]
    fn fragments_are_not_merged_and_are_not_overtaken() {
        let fragment = changed(datagram(2, 50), |packet| packet[6] |= 0x20);
        let later = changed(datagram(2, 50), |packet| packet[7] = 9);
        let elsewhere = changed(fragment.clone(), |packet| packet[19] ^= 1);
        let [a, b] = [datagram(0, 50), datagram(1, 50)];
        assert_eq!(counts(&[a.clone(), fragment, b.clone()]), [1, 1, 1]);
        assert_eq!(counts(&[a.clone(), later, b.clone()]), [1, 1, 1]);
        assert_eq!(
            counts(&[a.clone(), elsewhere, b.clone()]),
            [2, 1],
            "other addresses are not in the way"
        );
        let reserved = changed(datagram(2, 50), |packet| packet[6] |= 0x80);
        assert_eq!(counts(&[a, reserved, b]), [1, 1, 1]);
    }

    #[test]
    fn ipv4_options_are_not_merged_and_are_not_overtaken() {
        let with_options = |index| {
            let plain = datagram(index, 50);
            let mut packet = [&plain[..20], &[1, 1, 1, 0], &plain[20..]].concat();
            packet[0] = 0x46;
            put16(&mut packet, ipv4::TOTAL_LEN, 82);
            changed(packet, |_| ())
        };
        assert_eq!(counts(&[with_options(0), with_options(1)]), [1, 1]);
        assert_eq!(counts(&[datagram(0, 50), with_options(9), datagram(1, 50)]), [1, 1, 1]);
    }

    #[test]
    fn extension_headers_are_not_merged_and_are_not_overtaken() {
        let plain = V6.udp(1, 2, b"data");
        let extended = V6.raw(60, &[&[17, 0, 1, 4, 0, 0, 0, 0], &plain[40..]].concat());
        assert_eq!(counts(&[extended.clone(), extended.clone()]), [1, 1]);
        assert_eq!(counts(&[plain.clone(), extended, plain]), [1, 1, 1]);
    }

    #[test]
    fn other_protocols_are_not_merged_and_in_nobody_s_way() {
        for other in [
            V4.icmp_echo(1, 2, b"ping"),
            V4.raw(47, &noise(60)),
            V4.raw(132, &noise(60)),
        ] {
            assert_eq!(counts(&[segment(0), other.clone(), segment(1), other]), [2, 1, 1]);
        }
    }

    #[test]
    fn a_wrong_checksum_is_not_merged() {
        // A byte of the IP header's checksum, of the transport's, of the payload.
        for at in [10, 37, 120] {
            let damaged = |index| {
                let mut packet = segment(index);
                packet[at] ^= 1;
                packet
            };
            assert_eq!(counts(&[segment(0), damaged(1), segment(2)]), [1, 1, 1], "byte {at}");
            assert_eq!(counts(&[damaged(0), segment(1), segment(2)]), [1, 2], "byte {at}");
        }
        let mut damaged = segment_v6(1);
        damaged[100] ^= 1;
        assert_eq!(counts(&[segment_v6(0), damaged, segment_v6(2)]), [1, 1, 1]);
    }

    #[test]
    fn udp_without_a_checksum_is_not_merged() {
        let without = |index| {
            let mut packet = datagram(index, 50);
            put16(&mut packet, 26, 0);
            packet
        };
        assert_eq!(counts(&[without(0), without(1)]), [1, 1]);
        assert_eq!(counts(&[datagram(0, 50), without(1), datagram(2, 50)]), [1, 1, 1]);
    }

    #[test]
    fn empty_datagrams_are_not_merged() {
        assert_eq!(counts(&[datagram(0, 0), datagram(1, 0)]), [1, 1]);
    }

    #[test]
    fn padding_is_not_merged() {
        let padded = |index| [segment(index), vec![0; 2]].concat();
        let arena = [segment(0), padded(1), segment(2)].concat();
        let mut coalescer = Coalescer::new(Merge::ALL);
        for range in [0..152, 152..306, 306..458] {
            coalescer.push(&arena, range);
        }
        assert_eq!(
            coalescer.writes(&arena).map(|write| write.count()).collect::<Vec<_>>(),
            [1, 1, 1]
        );
    }

    #[test]
    fn no_write_is_longer_than_an_ip_packet_can_be() {
        let big = |index: u16| V4.ident(index).tcp(&tcp(8_000 * u32::from(index)), &noise(8_000));
        assert_eq!(counts(&(0..10).map(big).collect::<Vec<_>>()), [8, 2]);
        let exact = |index: u16, len| V4.ident(index).udp(1, 2, &noise(len));
        // 28 bytes of headers and twice this are 65,534 and 65,536.
        assert_eq!(counts(&[exact(0, 32_753), exact(1, 32_753)]), [2]);
        assert_eq!(counts(&[exact(0, 32_754), exact(1, 32_754)]), [1, 1]);
        assert_eq!(counts(&[exact(0, 32_754), exact(1, 32_753)]), [2], "65,535 bytes");
    }

    #[test]
    fn no_write_has_more_packets_than_a_vectored_write_takes() {
        let packets: Vec<_> = (0..300).map(|index| datagram(index, 1)).collect();
        assert_eq!(counts(&packets), [MAX_MERGED, MAX_MERGED, 300 - 2 * MAX_MERGED]);
    }
}
