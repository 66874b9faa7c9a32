//! One superpacket from the TUN device into packets of the MTU, without copying its payload: each segment is a header built
//! in scratch space and a range of the packet. A packet that is none has its checksum finished in place.
//!
//! ```
//! use flannel::offload::{Headers, VirtioNetHdr, split};
//! use flannel::packet::build;
//!
//! let mut headers = Headers::default();
//! let mut packet = build::Ipv4::new([10, 5, 34, 2].into(), [10, 5, 72, 2].into()).udp(4000, 53, b"hello");
//! let segments = split::plan(&VirtioNetHdr::default(), &mut packet, &mut headers).unwrap();
//! assert_eq!(segments.count(), 1);
//! assert_eq!(segments.iter(&headers, &packet).next(), Some((&[][..], &packet[..])));
//! ```

use std::ops::Range;

use crate::packet::{
    IpVersion, Ipv4Packet, Ipv6Packet, TcpFlags, TcpSegment, UdpDatagram, be16, be32, checksum, ipv4, ipv6, protocol,
    put16, put32, tcp, udp,
};

use super::{GsoKind, Malformed, PartialChecksum, VirtioNetHdr};

/// The most scratch space that one packet takes, in bytes. Linux cuts TCP into pieces of 48 bytes at the least
/// (`TCP_MIN_SND_MSS`), 1,365 of them, which take 164 kB with the longest headers but IPv6's extensions, and UDP into 128
/// pieces at the most.
pub const MAX_HEADERS: usize = 256 << 10;

/// Scratch space for the headers of a batch of superpackets: grows to what the largest batch takes, then stays.
#[derive(Debug, Default)]
pub struct Headers {
    bytes: Vec<u8>,
}

impl Headers {
    /// Forgets all headers: every [`Segments`] planned with them is spent.
    pub fn clear(&mut self) {
        self.bytes.clear();
    }
}

/// The segments of one packet, in order. Holds positions and no bytes, so that the buffers stay free until they are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segments {
    /// Where the first header is in the scratch space.
    headers_at: usize,
    /// 0 for a packet that is its own only segment.
    header_len: usize,
    /// Payload bytes of each segment but the last.
    payload_len: usize,
    packet_len: usize,
    count: usize,
}

impl Segments {
    /// How many there are, at least one.
    #[inline]
    pub fn count(&self) -> usize {
        self.count
    }

    /// Length in bytes of each segment but the last, which is not longer: what `UDP_SEGMENT` is told.
    #[inline]
    pub fn full_len(&self) -> usize {
        (self.header_len + self.payload_len).min(self.packet_len)
    }

    /// Length in bytes of all segments together.
    #[inline]
    pub fn total_len(&self) -> usize {
        self.packet_len + (self.count - 1) * self.header_len
    }

    /// Length in bytes of each segment's header; 0 for a packet that is its own only segment.
    #[inline]
    pub fn header_len(&self) -> usize {
        self.header_len
    }

    /// Where in the packet the payload of segment `index` is.
    #[inline]
    pub fn payload(&self, index: usize) -> Range<usize> {
        let start = self.header_len + index * self.payload_len;
        start..(start + self.payload_len).min(self.packet_len)
    }

    /// The header of segment `index`.
    ///
    /// # Panics
    /// If `index` is not below [`count`](Self::count), or `headers` are not those that were planned with.
    #[inline]
    pub fn header<'a>(&self, index: usize, headers: &'a Headers) -> &'a [u8] {
        &headers.bytes[self.headers_at + index * self.header_len..][..self.header_len]
    }

    /// Header and payload of segment `index`; the header is empty when the packet is its own only segment.
    ///
    /// # Panics
    /// If `index` is not below [`count`](Self::count), or `headers` and `packet` are not those that were planned with.
    #[inline]
    pub fn get<'a>(&self, index: usize, headers: &'a Headers, packet: &'a [u8]) -> (&'a [u8], &'a [u8]) {
        (self.header(index, headers), &packet[self.payload(index)])
    }

    /// Header and payload of each segment; see [`get`](Self::get).
    #[inline]
    pub fn iter<'a>(
        &self,
        headers: &'a Headers,
        packet: &'a [u8],
    ) -> impl ExactSizeIterator<Item = (&'a [u8], &'a [u8])> + use<'a> {
        let segments = *self;
        (0..self.count).map(move |index| segments.get(index, headers, packet))
    }
}

/// Plans the segments of `packet`, which the device handed over behind `header`; their headers are appended to `headers`.
///
/// The packet's hop must have been taken before: each segment's IP header is a copy of the packet's. The packet's own
/// bytes change only where a checksum is finished in place.
///
/// # Errors
/// Why the two cannot belong together. `headers` and `packet` are as before then.
pub fn plan(header: &VirtioNetHdr, packet: &mut [u8], headers: &mut Headers) -> Result<Segments, Malformed> {
    if header.gso == GsoKind::None {
        if let Some(checksum) = header.checksum {
            finish_checksum(packet, checksum)?;
        }
        return Ok(Segments {
            headers_at: headers.bytes.len(),
            header_len: 0,
            payload_len: packet.len(),
            packet_len: packet.len(),
            count: 1,
        });
    }
    let superpacket = Superpacket::parse(header, packet)?;
    let segments = Segments {
        headers_at: headers.bytes.len(),
        header_len: superpacket.header_len,
        payload_len: usize::from(header.gso_size),
        packet_len: packet.len(),
        count: superpacket.count,
    };
    headers.bytes.reserve(segments.count * segments.header_len);
    match superpacket.protocol {
        protocol::TCP => superpacket.write_headers(&mut headers.bytes, &TcpCut::new(&superpacket)),
        _ => superpacket.write_headers(&mut headers.bytes, &UdpCut::new(&superpacket)),
    }
    Ok(segments)
}

/// Computes the checksum that the kernel left to the device: the field holds the pseudo header's sum already.
fn finish_checksum(packet: &mut [u8], position: PartialChecksum) -> Result<(), Malformed> {
    let start = usize::from(position.start);
    let field = start + usize::from(position.offset);
    if field + 2 > packet.len() {
        return Err(bad_checksum(position));
    }
    let result = checksum::checksum(&packet[start..]);
    // For TCP the two forms of zero are the same.
    put16(packet, field, udp::transmitted(result));
    Ok(())
}

fn bad_checksum(position: PartialChecksum) -> Malformed {
    Malformed::Checksum {
        start: position.start,
        offset: position.offset,
    }
}

/// A packet whose headers and virtio header agree that it is to be cut.
struct Superpacket<'a> {
    bytes: &'a [u8],
    version: IpVersion,
    protocol: u8,
    /// Where the transport header begins.
    transport: usize,
    /// Length of all headers.
    header_len: usize,
    gso_size: usize,
    count: usize,
    /// Whether the segments are to have transport checksums.
    checksummed: bool,
    /// Partial sum of the pseudo header without its length.
    pseudo_header: u32,
}

impl<'a> Superpacket<'a> {
    fn parse(header: &VirtioNetHdr, bytes: &'a [u8]) -> Result<Self, Malformed> {
        let version = IpVersion::of(bytes)?;
        let (protocol, transport, stated) = match version {
            IpVersion::V4 => {
                let packet = Ipv4Packet::new_checked(bytes)?;
                if packet.is_fragment() {
                    return Err(Malformed::Fragment);
                }
                (packet.protocol(), packet.header_len(), usize::from(packet.total_len()))
            }
            IpVersion::V6 => {
                let packet = Ipv6Packet::new_checked(bytes)?;
                let upper = packet.upper_layer()?;
                if upper.fragment.is_some() {
                    return Err(Malformed::Fragment);
                }
                (upper.protocol, upper.offset, packet.total_len())
            }
        };
        let fits = match header.gso {
            GsoKind::None => false,
            GsoKind::TcpV4 => (protocol, version) == (protocol::TCP, IpVersion::V4),
            GsoKind::TcpV6 => (protocol, version) == (protocol::TCP, IpVersion::V6),
            GsoKind::UdpL4 => protocol == protocol::UDP,
        };
        if !fits {
            return Err(Malformed::Kind(header.gso));
        }
        check_length(stated, bytes.len())?;
        let transport_bytes = &bytes[transport..];
        // A payload of IPv4 or IPv6 whose length was just found to be as stated fits 16 bits.
        let transport_len = transport_bytes.len() as u16;
        let (transport_header_len, field) = if protocol == protocol::TCP {
            (TcpSegment::new_checked(transport_bytes)?.header_len(), tcp::CHECKSUM)
        } else {
            let datagram = UdpDatagram::new_checked(transport_bytes)?;
            check_length(usize::from(datagram.len()), transport_bytes.len())?;
            (udp::HEADER_LEN, udp::CHECKSUM)
        };
        let in_place = be16(transport_bytes, field);
        let pseudo_header = match header.checksum {
            // The kernel's own segmentation starts from this field too. With a routing header it is the only place that
            // knows the final destination.
            Some(position) if (usize::from(position.start), usize::from(position.offset)) == (transport, field) => {
                u32::from(in_place) + u32::from(!transport_len)
            }
            Some(position) => return Err(bad_checksum(position)),
            None => match version {
                IpVersion::V4 => {
                    let packet = Ipv4Packet::new_checked(bytes)?;
                    checksum::pseudo_header_v4(packet.src(), packet.dst(), protocol, 0)
                }
                IpVersion::V6 => {
                    let packet = Ipv6Packet::new_checked(bytes)?;
                    checksum::pseudo_header_v6(packet.src(), packet.dst(), protocol, 0)
                }
            },
        };
        let gso_size = usize::from(header.gso_size);
        if gso_size == 0 {
            return Err(Malformed::GsoSize);
        }
        let header_len = transport + transport_header_len;
        let payload = bytes.len() - header_len;
        let count = payload.div_ceil(gso_size).max(1);
        if count * header_len > MAX_HEADERS {
            return Err(Malformed::TooManySegments {
                size: header.gso_size,
                payload,
            });
        }
        Ok(Self {
            bytes,
            version,
            protocol,
            transport,
            header_len,
            gso_size,
            count,
            checksummed: protocol == protocol::TCP || header.checksum.is_some() || in_place != 0,
            pseudo_header,
        })
    }

    /// Appends the header of each segment to `out`. The payload is read once, for its checksum.
    fn write_headers(&self, out: &mut Vec<u8>, cut: &impl Cut) {
        let (header, mut payload) = self.bytes.split_at(self.header_len);
        let ip = IpCut::new(self.version, &header[..self.transport]);
        for index in 0..self.count {
            let (piece, rest) = payload.split_at(self.gso_size.min(payload.len()));
            payload = rest;
            let at = out.len();
            out.extend_from_slice(header);
            let (ip_header, transport_header) = out[at..].split_at_mut(self.transport);
            let transport_len = (transport_header.len() + piece.len()) as u16;
            ip.patch(ip_header, index, transport_len);
            let place = Place {
                index,
                last: index + 1 == self.count,
                transport_len,
            };
            cut.patch(transport_header, place, piece);
        }
    }
}

fn check_length(stated: usize, actual: usize) -> Result<(), Malformed> {
    if stated == actual {
        Ok(())
    } else {
        Err(Malformed::Length { stated, actual })
    }
}

/// What changes in the IP header from segment to segment.
enum IpCut {
    V4 {
        /// Partial sum of the header without the fields that change.
        rest: u32,
        ident: u16,
    },
    V6,
}

impl IpCut {
    fn new(version: IpVersion, header: &[u8]) -> Self {
        match version {
            IpVersion::V4 => {
                let changing = [ipv4::TOTAL_LEN, ipv4::IDENT, ipv4::CHECKSUM];
                Self::V4 {
                    rest: sum_without(header, changing),
                    ident: be16(header, ipv4::IDENT),
                }
            }
            IpVersion::V6 => Self::V6,
        }
    }

    #[inline]
    fn patch(&self, header: &mut [u8], index: usize, transport_len: u16) {
        match *self {
            Self::V4 { rest, ident } => {
                let total_len = header.len() as u16 + transport_len;
                let ident = ident.wrapping_add(index as u16);
                put16(header, ipv4::TOTAL_LEN, total_len);
                put16(header, ipv4::IDENT, ident);
                let sum = rest + u32::from(total_len) + u32::from(ident);
                put16(header, ipv4::CHECKSUM, !checksum::fold(sum));
            }
            Self::V6 => {
                let extensions = (header.len() - ipv6::HEADER_LEN) as u16;
                put16(header, ipv6::PAYLOAD_LEN, extensions + transport_len);
            }
        }
    }
}

/// Which of the segments this is.
#[derive(Clone, Copy)]
struct Place {
    index: usize,
    last: bool,
    /// Length of transport header and payload.
    transport_len: u16,
}

/// What changes in the transport header from segment to segment.
trait Cut {
    fn patch(&self, header: &mut [u8], place: Place, payload: &[u8]);
}

struct TcpCut {
    /// Partial sum of pseudo header and header without lengths and the fields that change.
    rest: u32,
    seq: u32,
    flags: TcpFlags,
    gso_size: u32,
}

impl TcpCut {
    fn new(superpacket: &Superpacket<'_>) -> Self {
        let header = &superpacket.bytes[superpacket.transport..superpacket.header_len];
        let changing = [tcp::SEQ, tcp::SEQ + 2, tcp::DATA_OFFSET, tcp::CHECKSUM];
        Self {
            rest: checksum::combine(superpacket.pseudo_header, sum_without(header, changing)),
            seq: be32(header, tcp::SEQ),
            flags: TcpFlags(header[tcp::FLAGS]),
            gso_size: superpacket.gso_size as u32,
        }
    }
}

impl Cut for TcpCut {
    #[inline]
    fn patch(&self, header: &mut [u8], place: Place, payload: &[u8]) {
        // A position within the packet: below 2^16.
        let seq = self.seq.wrapping_add(place.index as u32 * self.gso_size);
        let mut flags = self.flags;
        if place.index > 0 {
            flags = flags.without(TcpFlags::CWR);
        }
        if !place.last {
            flags = flags.without(TcpFlags::FIN | TcpFlags::PSH);
        }
        put32(header, tcp::SEQ, seq);
        header[tcp::FLAGS] = flags.0;
        let fields = u32::from(place.transport_len)
            + (seq >> 16)
            + (seq & 0xffff)
            + u32::from(be16(header, tcp::DATA_OFFSET))
            + checksum::sum(payload);
        put16(
            header,
            tcp::CHECKSUM,
            !checksum::fold(checksum::combine(self.rest, fields)),
        );
    }
}

struct UdpCut {
    /// Partial sum of pseudo header and header without lengths and checksum.
    rest: u32,
    checksummed: bool,
}

impl UdpCut {
    fn new(superpacket: &Superpacket<'_>) -> Self {
        let header = &superpacket.bytes[superpacket.transport..superpacket.header_len];
        let changing = [udp::LEN, udp::CHECKSUM];
        Self {
            rest: checksum::combine(superpacket.pseudo_header, sum_without(header, changing)),
            checksummed: superpacket.checksummed,
        }
    }
}

impl Cut for UdpCut {
    #[inline]
    fn patch(&self, header: &mut [u8], place: Place, payload: &[u8]) {
        put16(header, udp::LEN, place.transport_len);
        if self.checksummed {
            // The length counts twice: in the pseudo header and in the header itself.
            let fields = 2 * u32::from(place.transport_len) + checksum::sum(payload);
            let result = !checksum::fold(checksum::combine(self.rest, fields));
            put16(header, udp::CHECKSUM, udp::transmitted(result));
        }
    }
}

/// Partial sum of `header` without the 16-bit fields at `fields`, at most 16 bits wide: in one's complement, adding the
/// complement takes away.
fn sum_without<const N: usize>(header: &[u8], fields: [usize; N]) -> u32 {
    let others = fields.iter().fold(checksum::sum(header), |sum, &field| {
        sum + u32::from(!be16(header, field))
    });
    u32::from(checksum::fold(others))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::build;

    const V4: build::Ipv4 = build::Ipv4::new(
        std::net::Ipv4Addr::new(10, 5, 1, 2),
        std::net::Ipv4Addr::new(10, 5, 2, 2),
    );
    const V6: build::Ipv6 = build::Ipv6::new(
        std::net::Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 2),
        std::net::Ipv6Addr::new(0xfd00, 2, 0, 0, 0, 0, 0, 2),
    );

    fn noise(len: usize) -> Vec<u8> {
        (0..len).map(|at| (at * 31 + at / 256) as u8).collect()
    }

    fn tcp_header() -> build::Tcp<'static> {
        build::Tcp {
            src_port: 40_000,
            dst_port: 443,
            seq: 0xffff_fe00,
            ack: 99,
            flags: TcpFlags::ACK,
            window: 501,
            options: &[1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2],
        }
    }

    /// As the kernel hands it over: the checksum field holds the sum of the pseudo header.
    fn leave_checksum(packet: &mut [u8], transport: usize, field: usize) -> Option<PartialChecksum> {
        let len = (packet.len() - transport) as u16;
        let sum = match IpVersion::of(packet).unwrap() {
            IpVersion::V4 => {
                let view = Ipv4Packet::new_checked(&*packet).unwrap();
                checksum::pseudo_header_v4(view.src(), view.dst(), view.protocol(), len)
            }
            IpVersion::V6 => {
                let view = Ipv6Packet::new_checked(&*packet).unwrap();
                let upper = view.upper_layer().unwrap();
                checksum::pseudo_header_v6(view.src(), view.dst(), upper.protocol, u32::from(len))
            }
        };
        put16(packet, transport + field, checksum::fold(sum));
        Some(PartialChecksum {
            start: transport as u16,
            offset: field as u16,
        })
    }

    fn gso(kind: GsoKind, size: u16, checksum: Option<PartialChecksum>) -> VirtioNetHdr {
        VirtioNetHdr {
            gso: kind,
            gso_size: size,
            // Whatever it says, nobody looks at it.
            hdr_len: 9_999,
            checksum,
            ..Default::default()
        }
    }

    fn pieces(header: &VirtioNetHdr, packet: &[u8]) -> Vec<Vec<u8>> {
        let (mut packet, mut headers) = (packet.to_vec(), Headers::default());
        let before = packet.clone();
        let segments = plan(header, &mut packet, &mut headers).unwrap();
        assert_eq!(packet, before, "the superpacket stays as it was");
        let pieces: Vec<_> = segments.iter(&headers, &packet).map(|(h, p)| [h, p].concat()).collect();
        assert_eq!(pieces.len(), segments.count());
        assert_eq!(pieces.iter().map(Vec::len).sum::<usize>(), segments.total_len());
        let (last, full) = pieces.split_last().unwrap();
        assert!(full.iter().all(|piece| piece.len() == segments.full_len()) && last.len() <= segments.full_len());
        pieces
    }

    #[test]
    fn tcp_over_ipv4_becomes_what_the_sender_would_have_sent_itself() {
        let payload = noise(3_001);
        let ip = V4.ident(0xffff).ttl(9).tos(2).dont_fragment(true);
        let flags = TcpFlags::ACK | TcpFlags::PSH | TcpFlags::FIN | TcpFlags::CWR | TcpFlags::ECE;
        let mut packet = ip.tcp(&build::Tcp { flags, ..tcp_header() }, &payload);
        let checksum = leave_checksum(&mut packet, 20, 16);

        let expected: Vec<_> = [
            (0, TcpFlags::ACK | TcpFlags::ECE | TcpFlags::CWR),
            (1, TcpFlags::ACK | TcpFlags::ECE),
            (2, TcpFlags::ACK | TcpFlags::ECE | TcpFlags::PSH | TcpFlags::FIN),
        ]
        .into_iter()
        .map(|(index, flags)| {
            let header = build::Tcp {
                seq: 0xffff_fe00u32.wrapping_add(1_400 * index),
                flags,
                ..tcp_header()
            };
            let start = 1_400 * index as usize;
            ip.ident(0xffffu16.wrapping_add(index as u16))
                .tcp(&header, &payload[start..(start + 1_400).min(3_001)])
        })
        .collect();
        assert_eq!(pieces(&gso(GsoKind::TcpV4, 1_400, checksum), &packet), expected);
    }

    #[test]
    fn tcp_over_ipv6_becomes_what_the_sender_would_have_sent_itself() {
        let payload = noise(2_800);
        let ip = V6.hop_limit(9).traffic_class(0xb9);
        let mut packet = ip.tcp(&tcp_header(), &payload);
        let checksum = leave_checksum(&mut packet, 40, 16);
        let second = build::Tcp {
            seq: tcp_header().seq.wrapping_add(1_400),
            ..tcp_header()
        };
        assert_eq!(
            pieces(&gso(GsoKind::TcpV6, 1_400, checksum), &packet),
            [
                ip.tcp(&tcp_header(), &payload[..1_400]),
                ip.tcp(&second, &payload[1_400..])
            ]
        );
    }

    #[test]
    fn udp_becomes_datagrams_of_their_own() {
        let payload = noise(250);
        for kind in [4, 6] {
            let build = |index: u16, payload: &[u8]| match kind {
                4 => V4.ident(7 + index).udp(1, 2, payload),
                _ => V6.udp(1, 2, payload),
            };
            let mut packet = build(0, &payload);
            let checksum = leave_checksum(&mut packet, if kind == 4 { 20 } else { 40 }, 6);
            let expected: Vec<_> = payload
                .chunks(100)
                .zip(0..)
                .map(|(piece, index)| build(index, piece))
                .collect();
            assert_eq!(pieces(&gso(GsoKind::UdpL4, 100, checksum), &packet), expected);
        }
    }

    #[test]
    fn a_udp_checksum_of_zero_is_sent_as_ffff() {
        let mut packet = V4.udp(1, 2, &[0; 4]);
        let checksum = leave_checksum(&mut packet, 20, 6);
        // The payload makes the second datagram's sum 0xffff.
        let rest = !Ipv4Packet::new_checked(&V4.udp(1, 2, &[0; 2])).unwrap().payload()[6..8]
            .iter()
            .fold(0u16, |sum, &byte| sum << 8 | u16::from(byte));
        put16(&mut packet, 30, !rest);
        let pieces = pieces(&gso(GsoKind::UdpL4, 2, checksum), &packet);
        assert_eq!(pieces[1][26..28], [0xff, 0xff]);
    }

    #[test]
    fn udp_without_a_checksum_stays_without() {
        let mut packet = V4.udp(1, 2, &noise(30));
        put16(&mut packet, 26, 0);
        for piece in pieces(&gso(GsoKind::UdpL4, 10, None), &packet) {
            assert_eq!(piece[26..28], [0, 0]);
        }
    }

    #[test]
    fn a_superpacket_with_a_whole_checksum_is_cut_all_the_same() {
        let payload = noise(20);
        let expected = [V4.udp(1, 2, &payload[..10]), V4.ident(1).udp(1, 2, &payload[10..])];
        assert_eq!(
            pieces(&gso(GsoKind::UdpL4, 10, None), &V4.udp(1, 2, &payload)),
            expected
        );
        let packet = V6.tcp(&tcp_header(), &payload);
        let first = V6.tcp(&tcp_header(), &payload[..10]);
        assert_eq!(pieces(&gso(GsoKind::TcpV6, 10, None), &packet)[0], first);
    }

    #[test]
    fn extension_headers_go_with_each_segment() {
        let segment = |seq: u32, payload: &[u8]| {
            let packet = V6.tcp(&build::Tcp { seq, ..tcp_header() }, payload);
            // Hop-by-hop options: next header TCP, 8 bytes, padding.
            let chain = [&[6, 0, 1, 4, 0, 0, 0, 0], &packet[40..]].concat();
            V6.raw(0, &chain)
        };
        let payload = noise(20);
        let mut packet = segment(1, &payload);
        let checksum = leave_checksum(&mut packet, 48, 16);
        assert_eq!(
            pieces(&gso(GsoKind::TcpV6, 10, checksum), &packet),
            [segment(1, &payload[..10]), segment(11, &payload[10..])]
        );
    }

    #[test]
    fn ipv4_options_go_with_each_segment() {
        let plain = V4.udp(1, 2, &noise(20));
        let mut packet = [&plain[..20], &[1, 1, 1, 0], &plain[20..]].concat();
        packet[0] = 0x46;
        put16(&mut packet, 2, 52);
        let checksum = leave_checksum(&mut packet, 24, 6);
        for piece in pieces(&gso(GsoKind::UdpL4, 10, checksum), &packet) {
            let view = Ipv4Packet::new_checked(&piece).unwrap();
            assert!(view.verify_checksum() && view.options() == [1, 1, 1, 0]);
            let datagram = UdpDatagram::new_checked(view.payload()).unwrap();
            assert!(datagram.has_checksum() && datagram.verify_checksum(view.pseudo_header()));
        }
    }

    #[test]
    fn a_packet_that_is_not_cut_only_has_its_checksum_finished() {
        for whole in [
            V4.udp(1, 2, &noise(33)),
            V6.udp(1, 2, &noise(33)),
            V4.tcp(&tcp_header(), &[]),
        ] {
            let transport = if whole[0] >> 4 == 4 { 20 } else { 40 };
            let field = if whole.len() == 52 { 16 } else { 6 };
            let mut packet = whole.clone();
            let header = VirtioNetHdr {
                checksum: leave_checksum(&mut packet, transport, field),
                ..Default::default()
            };
            assert_ne!(packet, whole);
            let mut headers = Headers::default();
            let segments = plan(&header, &mut packet, &mut headers).unwrap();
            assert_eq!(packet, whole);
            assert_eq!(
                (segments.count(), segments.full_len(), segments.total_len()),
                (1, whole.len(), whole.len())
            );
            assert_eq!(segments.get(0, &headers, &packet), (&[][..], &whole[..]));
        }
    }

    #[test]
    fn a_finished_checksum_of_zero_becomes_ffff() {
        let mut packet = [0xff, 0xfe, 0, 1];
        let checksum = Some(PartialChecksum { start: 0, offset: 2 });
        let header = VirtioNetHdr {
            checksum,
            ..Default::default()
        };
        plan(&header, &mut packet, &mut Headers::default()).unwrap();
        assert_eq!(packet[2..], [0xff, 0xff]);
    }

    #[test]
    fn several_packets_share_the_scratch_space() {
        let mut headers = Headers::default();
        let mut packets: Vec<_> = [1, 2, 3].into_iter().map(|port| V4.udp(port, 9, &noise(30))).collect();
        let header = gso(GsoKind::UdpL4, 10, None);
        let planned: Vec<_> = packets
            .iter_mut()
            .map(|packet| plan(&header, packet, &mut headers).unwrap())
            .collect();
        for (port, (segments, packet)) in (1..).zip(planned.iter().zip(&packets)) {
            for (header, _) in segments.iter(&headers, packet) {
                assert_eq!(be16(header, 20), port);
            }
        }
        headers.clear();
        assert_eq!(plan(&header, &mut packets[0], &mut headers), Ok(planned[0]));
    }

    #[test]
    fn each_defect_has_its_reason() {
        let reason = |header: &VirtioNetHdr, packet: &[u8]| {
            let (mut bytes, mut headers) = (packet.to_vec(), Headers::default());
            let reason = plan(header, &mut bytes, &mut headers).unwrap_err();
            assert!(bytes == packet && headers.bytes.is_empty(), "nothing changes");
            reason
        };
        let at = |start, offset| Some(PartialChecksum { start, offset });
        let misplaced = |start, offset| Malformed::Checksum { start, offset };
        let tcp = V4.tcp(&tcp_header(), &noise(100));
        let udp = V4.udp(1, 2, &noise(100));
        let tso = gso(GsoKind::TcpV4, 10, at(20, 16));

        assert_eq!(reason(&gso(GsoKind::TcpV4, 0, None), &tcp), Malformed::GsoSize);
        for kind in [GsoKind::TcpV6, GsoKind::UdpL4] {
            assert_eq!(reason(&gso(kind, 10, None), &tcp), Malformed::Kind(kind));
        }
        assert_eq!(reason(&tso, &udp), Malformed::Kind(GsoKind::TcpV4));
        for (start, offset) in [(0, 16), (20, 6), (24, 16), (40, 16), (u16::MAX, u16::MAX)] {
            let header = gso(GsoKind::TcpV4, 10, at(start, offset));
            assert_eq!(reason(&header, &tcp), misplaced(start, offset));
        }
        for (start, offset) in [(tcp.len() as u16, 0), (tcp.len() as u16 - 1, 0), (u16::MAX, u16::MAX)] {
            assert_eq!(
                reason(&gso(GsoKind::None, 0, at(start, offset)), &tcp),
                misplaced(start, offset)
            );
        }
        assert_eq!(
            reason(&tso, &[&tcp[..], b"x"].concat()),
            Malformed::Length {
                stated: 152,
                actual: 153
            }
        );
        let mut lying = udp.clone();
        put16(&mut lying, 24, 107);
        assert_eq!(
            reason(&gso(GsoKind::UdpL4, 10, None), &lying),
            Malformed::Length {
                stated: 107,
                actual: 108
            }
        );
        let mut fragment = tcp.clone();
        Ipv4Packet::new_checked(&mut fragment[..])
            .unwrap()
            .set_fragment(0, true);
        assert_eq!(reason(&tso, &fragment), Malformed::Fragment);
        assert_eq!(
            reason(
                &gso(GsoKind::UdpL4, 10, None),
                &V6.raw(44, &[17, 0, 0, 1, 0, 0, 0, 1, 0, 1, 0, 2, 0, 8, 0, 0])
            ),
            Malformed::Fragment
        );
        // 28 bytes of headers each; one piece less would fit.
        let big = V4.udp(1, 2, &noise(9_363));
        assert_eq!(
            reason(&gso(GsoKind::UdpL4, 1, None), &big),
            Malformed::TooManySegments {
                size: 1,
                payload: 9_363
            }
        );
        for cut in [0, 1, 19, 20, 39, 51, 100] {
            let reason = reason(&tso, &tcp[..cut]);
            assert!(matches!(reason, Malformed::Packet(_)), "{cut} bytes: {reason}");
        }
    }

    #[test]
    fn a_superpacket_without_payload_is_one_segment() {
        let packet = V4.tcp(&tcp_header(), &[]);
        assert_eq!(pieces(&gso(GsoKind::TcpV4, 10, None), &packet), [packet]);
    }
}
