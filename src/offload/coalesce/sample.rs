//! Packets for the tests, and what becomes of them.

use super::*;
use crate::{
    offload::{Headers, split},
    packet::{Ipv4Packet, Ipv6Packet, build, protocol},
};

pub(super) const V4: build::Ipv4 = build::Ipv4::new(
    std::net::Ipv4Addr::new(10, 5, 1, 2),
    std::net::Ipv4Addr::new(10, 5, 2, 2),
);
pub(super) const V6: build::Ipv6 = build::Ipv6::new(
    std::net::Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 2),
    std::net::Ipv6Addr::new(0xfd00, 2, 0, 0, 0, 0, 0, 2),
);
pub(super) const ACK: TcpFlags = TcpFlags::ACK;
pub(super) const TIMESTAMP: &[u8] = &[1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2];

pub(super) fn noise(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 31 + at / 256) as u8).collect()
}

pub(super) fn tcp(seq: u32) -> build::Tcp<'static> {
    build::Tcp {
        src_port: 40_000,
        dst_port: 443,
        seq,
        ack: 99,
        flags: ACK,
        window: 501,
        options: TIMESTAMP,
    }
}

/// Segment `index` of a stream of 100-byte segments.
pub(super) fn segment(index: u16) -> Vec<u8> {
    V4.ident(index).tcp(&tcp(100 * u32::from(index)), &noise(100))
}

pub(super) fn segment_v6(index: u16) -> Vec<u8> {
    V6.tcp(&tcp(100 * u32::from(index)), &noise(100))
}

pub(super) fn datagram(index: u16, len: usize) -> Vec<u8> {
    V4.ident(index).udp(1, 2, &noise(len))
}

/// The packet with the headers changed and all checksums right again.
pub(super) fn changed(mut packet: Vec<u8>, change: impl FnOnce(&mut [u8])) -> Vec<u8> {
    change(&mut packet);
    let v4 = packet[0] >> 4 == 4;
    let (transport, pseudo_header, protocol) = if v4 {
        let mut view = Ipv4Packet::new_checked(&mut packet[..]).unwrap();
        view.fill_checksum();
        (view.header_len(), view.pseudo_header(), view.protocol())
    } else {
        let view = Ipv6Packet::new_checked(&packet[..]).unwrap();
        (
            40,
            view.pseudo_header(view.next_header(), (packet.len() - 40) as u32),
            view.next_header(),
        )
    };
    let field = transport
        + if protocol == protocol::UDP {
            udp::CHECKSUM
        } else {
            tcp::CHECKSUM
        };
    put16(&mut packet, field, 0);
    let sum = checksum::combine(pseudo_header, checksum::sum(&packet[transport..]));
    put16(&mut packet, field, !checksum::fold(sum));
    packet
}

/// How many packets are in each write; every write is cut again and must give back what came.
pub(super) fn counts(packets: &[Vec<u8>]) -> Vec<usize> {
    counts_of(Merge::ALL, packets)
}

pub(super) fn counts_of(merge: Merge, packets: &[Vec<u8>]) -> Vec<usize> {
    let arena = packets.concat();
    let mut coalescer = Coalescer::new(merge);
    let mut start = 0;
    for packet in packets {
        coalescer.push(&arena, start..start + packet.len());
        start += packet.len();
    }
    let mut counts = Vec::new();
    for write in coalescer.writes(&arena) {
        let originals: Vec<_> = write.packets().map(<[u8]>::to_vec).collect();
        assert!(originals.iter().all(|packet| packets.contains(packet)));
        assert_eq!(cut(&write), originals);
        counts.push(write.count());
    }
    assert_eq!(counts.iter().sum::<usize>(), packets.len());
    counts
}

/// What segmentation makes of the write.
pub(super) fn cut(write: &Write<'_>) -> Vec<Vec<u8>> {
    let bytes: Vec<u8> = write.parts().flatten().copied().collect();
    let header = VirtioNetHdr::parse(&bytes).unwrap();
    let mut packet = bytes[VirtioNetHdr::LEN..].to_vec();
    assert_eq!(packet.len(), write.total_len());
    assert_eq!(header.gso, write.kind());
    if write.count() == 1 {
        assert_eq!(header, VirtioNetHdr::default());
    } else if packet[0] >> 4 == 4 {
        assert!(Ipv4Packet::new_checked(&packet[..]).unwrap().verify_checksum());
    }
    let mut headers = Headers::default();
    let segments = split::plan(&header, &mut packet, &mut headers).unwrap();
    segments
        .iter(&headers, &packet)
        .map(|(head, tail)| [head, tail].concat())
        .collect()
}
