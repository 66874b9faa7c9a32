//! The targets for `flannel::offload`: each is a function of bytes that panics on a finding, and the slow, obvious
//! implementations that the fast ones are held against.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use flannel::{
    offload::{Coalescer, GsoKind, Headers, Merge, VirtioNetHdr, coalesce::MAX_MERGED, split},
    packet::{IpPacket, Ipv4Packet, TcpFlags, TcpSegment, UdpDatagram, checksum, protocol},
};

use super::source::{Pair, Source, stream, superpacket};

/// Whatever parses is emitted in a form that parses to the same.
pub fn virtio(data: &[u8]) {
    let Ok(header) = VirtioNetHdr::parse(data) else {
        return;
    };
    assert_eq!(VirtioNetHdr::parse(&header.emit()), Ok(header));
    assert!(header.gso == GsoKind::None || header.gso_size > 0);
}

/// Bytes as the device could hand them over: a virtio header and a packet, neither of which need make sense; and a
/// superpacket made of the bytes, which does.
pub fn split(data: &[u8]) {
    if let Ok(header) = VirtioNetHdr::parse(data) {
        check_split(&header, &data[VirtioNetHdr::LEN..], false);
    }
    let mut source = Source(data);
    let open = source.byte() & 1 == 0;
    let (header, packet) = superpacket(&mut source, Pair::FIRST, open);
    check_split(&header, &packet, true);
}

/// Packets as peers could send them: any bytes, cut into pieces; and packets made of the bytes, which often belong together.
pub fn coalesce(data: &[u8]) {
    let mut source = Source(data);
    let mut raw = Vec::new();
    while let Some(len) = source.next() {
        raw.push(source.take(usize::from(len)).to_vec());
    }
    raw.retain(|packet: &Vec<u8>| !packet.is_empty());
    check_coalesce(&raw);

    let packets = stream(&mut Source(data));
    let groups: Vec<_> = check_coalesce(&packets);
    assert_eq!(groups, coalesce_slowly(&packets), "of {} packets", packets.len());
}

/// A superpacket's segments are merged to the superpacket again, and that is split into the same segments: both ways round,
/// nothing is lost or changed.
pub fn split_coalesce(data: &[u8]) {
    let (header, packet) = superpacket(&mut Source(data), Pair::FIRST, true);
    check_split(&header, &packet, true);
    let segments = split_slowly(&header, &packet);
    let groups = check_coalesce(&segments);
    let mergeable = segments.len() > 1 && segments.iter().all(|segment| Facts::of(segment).mergeable());
    if mergeable {
        let fewest = segments.len().div_ceil(MAX_MERGED);
        assert_eq!(groups.len(), fewest, "{} segments of one superpacket", segments.len());
    }
    if mergeable && groups.len() == 1 {
        let (arena, mut coalescer) = coalesced(&segments);
        let write = coalescer.writes(&arena).next().expect("there are segments");
        let written: Vec<u8> = write.parts().flatten().copied().collect();
        let hdr_len = VirtioNetHdr::parse(&written).expect("a header of ours").hdr_len;
        same(
            &written,
            &[&VirtioNetHdr { hdr_len, ..header }.emit()[..], &packet].concat(),
        );
    }
}

fn check_split(header: &VirtioNetHdr, original: &[u8], valid: bool) {
    let mut packet = original.to_vec();
    let mut headers = Headers::default();
    let segments = match split::plan(header, &mut packet, &mut headers) {
        Ok(segments) => segments,
        Err(reason) => {
            assert!(packet == original, "a refused packet stays as it was");
            return assert!(!valid, "{reason}");
        }
    };
    let pieces: Vec<Vec<u8>> = segments
        .iter(&headers, &packet)
        .map(|(head, tail)| [head, tail].concat())
        .collect();
    assert_eq!(pieces.len(), segments.count());
    assert_eq!(pieces.iter().map(Vec::len).sum::<usize>(), segments.total_len());
    for (index, piece) in pieces.iter().enumerate() {
        let last = index + 1 == pieces.len();
        assert!(piece.len() == segments.full_len() || last && piece.len() <= segments.full_len());
    }
    if header.gso != GsoKind::None {
        assert!(packet == original, "the superpacket stays as it was");
        if valid {
            let slow = split_slowly(header, original);
            assert_eq!(pieces.len(), slow.len());
            pieces.iter().zip(&slow).for_each(|(piece, slow)| same(piece, slow));
        }
        for piece in &pieces {
            let packet = IpPacket::parse(piece).expect("a segment is a packet");
            assert_eq!(packet.total_len(), piece.len());
        }
    }
}

/// Checks that nothing is lost, changed or reordered within a flow; the indexes of the packets in each write.
fn check_coalesce(packets: &[Vec<u8>]) -> Vec<Vec<usize>> {
    let (arena, mut coalescer) = coalesced(packets);
    let mut groups = Vec::new();
    for write in coalescer.writes(&arena) {
        let group: Vec<usize> = write
            .packets()
            .map(|packet| index_of(packets, &arena, packet))
            .collect();
        let written: Vec<u8> = write.parts().flatten().copied().collect();
        let header = VirtioNetHdr::parse(&written).expect("a header of ours");
        let packet = &written[VirtioNetHdr::LEN..];
        assert_eq!(packet.len(), write.total_len());
        if let [index] = group[..] {
            assert_eq!(header, VirtioNetHdr::default());
            same(packet, &packets[index]);
        } else {
            assert!(packet.len() <= 65_535 && group.len() <= MAX_MERGED);
            let mut cut = split_slowly(&header, packet);
            assert_eq!(cut.len(), group.len());
            for (segment, &index) in cut.iter_mut().zip(&group) {
                adopt_ident(segment, &packets[index]);
                same(segment, &packets[index]);
            }
            check_split(&header, packet, true);
        }
        groups.push(group);
    }
    let mut seen: Vec<usize> = groups.concat();
    for (position, &index) in seen.iter().enumerate() {
        if let Some(flow) = Facts::of(&packets[index]).flow {
            for &later in &seen[position + 1..] {
                assert!(
                    later > index || Facts::of(&packets[later]).flow != Some(flow),
                    "a flow is reordered"
                );
            }
        }
    }
    assert!(
        groups.windows(2).all(|pair| pair[0][0] < pair[1][0]),
        "writes are ordered by their first packets"
    );
    seen.sort_unstable();
    assert!(seen.into_iter().eq(0..packets.len()), "each packet is written once");
    groups
}

/// Like `assert_eq`, but tells where and not what: packets are long.
pub(super) fn same(left: &[u8], right: &[u8]) {
    let difference = left.iter().zip(right).position(|(left, right)| left != right);
    assert!(
        left == right,
        "{} and {} bytes, which differ from {difference:?} on; the headers: {:02x?}",
        left.len(),
        right.len(),
        &left[..left.len().min(100)],
    );
}

fn coalesced(packets: &[Vec<u8>]) -> (Vec<u8>, Coalescer) {
    let arena = packets.concat();
    let mut coalescer = Coalescer::new(Merge::ALL);
    let mut start = 0;
    for packet in packets {
        coalescer.push(&arena, start..start + packet.len());
        start += packet.len();
    }
    (arena, coalescer)
}

/// Which of `packets`, that lie one behind the other in `arena`, this part of it is. None is empty.
fn index_of(packets: &[Vec<u8>], arena: &[u8], packet: &[u8]) -> usize {
    let at = packet.as_ptr().addr() - arena.as_ptr().addr();
    let mut start = 0;
    packets
        .iter()
        .position(|candidate| {
            let here = start == at && candidate.len() == packet.len();
            start += candidate.len();
            here
        })
        .expect("a packet that was pushed")
}

/// With DF a constant identification may come back as an ascending one.
pub(super) fn adopt_ident(segment: &mut [u8], original: &[u8]) {
    if let Ok(mut packet) = Ipv4Packet::new_checked(segment)
        && packet.dont_fragment()
    {
        packet.set_ident(u16::from_be_bytes([original[4], original[5]]));
        packet.fill_checksum();
    }
}

/// Segmentation as one would write it down first: whole packets, whole checksums.
pub(super) fn split_slowly(header: &VirtioNetHdr, packet: &[u8]) -> Vec<Vec<u8>> {
    let (upper, transport) = match IpPacket::parse(packet).expect("a packet") {
        IpPacket::V4(ip) => (ip.protocol(), ip.header_len()),
        IpPacket::V6(ip) => {
            let upper = ip.upper_layer().expect("whole headers");
            (upper.protocol, upper.offset)
        }
    };
    let header_len = match upper {
        protocol::TCP => transport + TcpSegment::new_checked(&packet[transport..]).expect("TCP").header_len(),
        _ => transport + 8,
    };
    let (headers, payload) = packet.split_at(header_len);
    let mss = usize::from(header.gso_size);
    let mut chunks: Vec<&[u8]> = payload.chunks(mss).collect();
    if chunks.is_empty() {
        chunks.push(&[]);
    }
    let count = chunks.len();
    let cut = |(index, chunk): (usize, &[u8])| {
        let mut segment = [headers, chunk].concat();
        let total_len = segment.len();
        if packet[0] >> 4 == 4 {
            let mut ip = Ipv4Packet::header_checked(&mut segment[..]).expect("IPv4");
            ip.set_total_len(total_len as u16);
            ip.set_ident(ip.ident().wrapping_add(index as u16));
            ip.fill_checksum();
        } else {
            segment[4..6].copy_from_slice(&(total_len as u16 - 40).to_be_bytes());
        }
        if upper == protocol::TCP {
            let mut tcp = TcpSegment::new_checked(&mut segment[transport..]).expect("TCP");
            tcp.set_seq(tcp.seq().wrapping_add((index * mss) as u32));
            let mut flags = tcp.flags();
            if index > 0 {
                flags = flags.without(TcpFlags::CWR);
            }
            if index + 1 < count {
                flags = flags.without(TcpFlags::FIN | TcpFlags::PSH);
            }
            tcp.set_flags(flags);
        } else {
            segment[transport + 4..transport + 6].copy_from_slice(&((total_len - transport) as u16).to_be_bytes());
        }
        if upper == protocol::TCP || header.checksum.is_some() || headers[transport + 6..transport + 8] != [0, 0] {
            fill_transport_checksum(&mut segment, upper, transport);
        }
        segment
    };
    chunks.into_iter().enumerate().map(cut).collect()
}

fn fill_transport_checksum(packet: &mut [u8], upper: u8, transport: usize) {
    let pseudo_header = pseudo_header(packet, upper, transport);
    if upper == protocol::TCP {
        TcpSegment::new_checked(&mut packet[transport..])
            .expect("TCP")
            .fill_checksum(pseudo_header);
    } else {
        UdpDatagram::new_checked(&mut packet[transport..])
            .expect("UDP")
            .fill_checksum(pseudo_header);
    }
}

pub(super) fn pseudo_header(packet: &[u8], upper: u8, transport: usize) -> u32 {
    let len = (packet.len() - transport) as u16;
    match IpPacket::parse(packet).expect("a packet") {
        IpPacket::V4(ip) => checksum::pseudo_header_v4(ip.src(), ip.dst(), upper, len),
        IpPacket::V6(ip) => checksum::pseudo_header_v6(ip.src(), ip.dst(), upper, u32::from(len)),
    }
}

/// Coalescing as one would write it down first: every packet against all that came before.
fn coalesce_slowly(packets: &[Vec<u8>]) -> Vec<Vec<usize>> {
    let mut groups: Vec<Vec<usize>> = Vec::new();
    for (index, packet) in packets.iter().enumerate() {
        let facts = Facts::of(packet);
        let newest = groups.iter_mut().rev().find(|group| {
            let other = Facts::of(&packets[group[0]]);
            other.flow.is_some() && other.flow == facts.flow || other.obstructs(&facts)
        });
        match newest {
            Some(group) if continues(packets, group, packet) => group.push(index),
            _ => groups.push(vec![index]),
        }
    }
    groups
}

/// Whether all of the group and then the packet could be one superpacket.
fn continues(packets: &[Vec<u8>], group: &[usize], packet: &[u8]) -> bool {
    let run: Vec<&[u8]> = group.iter().map(|&index| &packets[index][..]).chain([packet]).collect();
    let facts: Vec<Facts> = run.iter().map(|packet| Facts::of(packet)).collect();
    let (first, last) = (&facts[0], facts.len() - 1);
    let total: usize = first.header_len + facts.iter().map(|facts| facts.payload_len).sum::<usize>();
    let idents = |step: u16| {
        let expected = |index: usize| first.ident.wrapping_add(index as u16 * step);
        facts
            .iter()
            .enumerate()
            .all(|(index, facts)| facts.ident == expected(index))
    };
    run.len() <= MAX_MERGED
        && total <= 65_535
        && facts.iter().all(Facts::mergeable)
        && facts
            .iter()
            .all(|facts| facts.flow == first.flow && facts.alike == first.alike)
        && facts[..last]
            .iter()
            .all(|facts| !facts.push && facts.payload_len == first.payload_len)
        && facts[last].payload_len <= first.payload_len
        && facts.windows(2).all(|pair| pair[0].next_seq == pair[1].seq)
        && (!first.has_ident || idents(1) || first.dont_fragment && idents(0))
}

type Flow = (IpAddr, IpAddr, u8, [u8; 4]);

/// What there is to know of a packet.
pub(super) struct Facts {
    /// `None`: not known, or none.
    flow: Option<Flow>,
    /// Without a flow: whether it may be part of one.
    hidden_flow: Option<(IpAddr, IpAddr)>,
    /// All that must be the same in a run.
    alike: Vec<u8>,
    intact: bool,
    plain: bool,
    has_ident: bool,
    ident: u16,
    dont_fragment: bool,
    push: bool,
    seq: u32,
    next_seq: u32,
    header_len: usize,
    payload_len: usize,
}

impl Facts {
    pub(super) fn of(bytes: &[u8]) -> Self {
        let mut facts = Self {
            flow: None,
            hidden_flow: None,
            alike: Vec::new(),
            intact: false,
            plain: false,
            has_ident: false,
            ident: 0,
            dont_fragment: false,
            push: false,
            seq: 0,
            next_seq: 0,
            header_len: 0,
            payload_len: 0,
        };
        // Addresses and protocol are believed even where the rest of the header contradicts itself.
        let (addresses, upper, transport) = match bytes.first().map(|byte| byte >> 4) {
            Some(4) if bytes.len() >= 20 => ((v4_at(bytes, 12), v4_at(bytes, 16)), bytes[9], 20),
            Some(6) if bytes.len() >= 40 => ((v6_at(bytes, 8), v6_at(bytes, 24)), bytes[6], 40),
            _ => return facts,
        };
        let transports = matches!(upper, protocol::TCP | protocol::UDP);
        let (hidden, plain) = if transport == 20 {
            let (fragment, options) = (bytes[6] & 0xbf != 0 || bytes[7] != 0, bytes[0] != 0x45);
            (fragment || options && transports, !fragment && !options)
        } else {
            let extension = matches!(upper, 0 | 43 | 44 | 51 | 60);
            (extension, !extension)
        };
        let least = if upper == protocol::TCP { 20 } else { 8 };
        let rest = &bytes[transport..];
        if hidden || transports && rest.len() < least {
            facts.hidden_flow = Some(addresses);
            return facts;
        }
        if !plain || !transports {
            return facts;
        }
        facts.flow = Some((addresses.0, addresses.1, upper, [rest[0], rest[1], rest[2], rest[3]]));
        let Ok(ip) = IpPacket::parse(bytes) else {
            return facts;
        };
        if ip.total_len() != bytes.len() {
            return facts;
        }
        match ip {
            IpPacket::V4(ip) => {
                facts.has_ident = true;
                facts.ident = ip.ident();
                facts.dont_fragment = ip.dont_fragment();
                facts.intact = ip.verify_checksum();
                facts.alike.extend([ip.tos(), ip.ttl(), ip.dont_fragment().into()]);
            }
            IpPacket::V6(ip) => {
                facts.intact = true;
                facts.alike.extend([ip.traffic_class(), ip.hop_limit()]);
                facts.alike.extend(ip.flow_label().to_be_bytes());
            }
        }
        let pseudo_header = pseudo_header(bytes, upper, transport);
        if upper == protocol::TCP {
            let Ok(tcp) = TcpSegment::new_checked(rest) else {
                return facts;
            };
            let special = TcpFlags::SYN | TcpFlags::FIN | TcpFlags::RST | TcpFlags::URG | TcpFlags::CWR;
            facts.plain = !tcp.flags().intersects(special) && !tcp.payload().is_empty();
            facts.intact &= tcp.verify_checksum(pseudo_header);
            facts.push = tcp.flags().contains(TcpFlags::PSH);
            facts.seq = tcp.seq();
            facts.next_seq = tcp.seq().wrapping_add(tcp.payload().len() as u32);
            facts.header_len = transport + tcp.header_len();
            facts.payload_len = tcp.payload().len();
            facts.alike.extend(tcp.ack().to_be_bytes());
            facts.alike.extend(tcp.window().to_be_bytes());
            facts
                .alike
                .extend([tcp.flags().without(TcpFlags::PSH).0, rest[12], rest[18], rest[19]]);
            facts.alike.extend(tcp.options());
        } else if let Ok(udp) = UdpDatagram::new_checked(rest) {
            facts.plain = udp.has_checksum() && usize::from(udp.len()) == rest.len() && rest.len() > 8;
            facts.intact &= udp.verify_checksum(pseudo_header);
            facts.header_len = transport + 8;
            facts.payload_len = rest.len() - 8;
        }
        facts
    }

    fn mergeable(&self) -> bool {
        self.plain && self.intact
    }

    /// Whether this is a packet of no known flow that packets of the other's must not overtake.
    pub(super) fn obstructs(&self, other: &Self) -> bool {
        match (self.hidden_flow, other.flow) {
            (Some(addresses), Some((src, dst, ..))) => addresses == (src, dst),
            _ => false,
        }
    }
}

fn v4_at(bytes: &[u8], at: usize) -> IpAddr {
    Ipv4Addr::from(*bytes[at..].first_chunk::<4>().expect("a whole header")).into()
}

fn v6_at(bytes: &[u8], at: usize) -> IpAddr {
    Ipv6Addr::from(*bytes[at..].first_chunk::<16>().expect("a whole header")).into()
}
