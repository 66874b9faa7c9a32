//! The `udp` overlay with peers that know nothing of offloads: whatever packet goes in comes out, byte for byte. Needs root.
//!
//! The packets that the tests make themselves leave and enter a host by a [`Wire`], and the other host is a [`PlainPeer`]: each
//! takes one whole packet a call. Between them are two hops, the host's kernel and its daemon.

mod lab;

use std::{iter, net::Ipv4Addr, time::Duration};

use flannel::{
    lab::HostOptions,
    packet::{Ipv4Packet, Ipv6Packet, TcpFlags, build, protocol},
};
use lab::{
    CONFIG, Overlay, Registry, assert_reaches, new_lab,
    pair::{Ends, MTU, Pair, Shipment},
    plain_peer::PlainPeer,
    traffic::{Burst, pattern, transfer},
    wire::End,
};

/// Packets in a run: of a full size, two thirds of what a superpacket holds.
const RUN: u16 = 30;

/// Bytes of each stream: some dozens of superpackets.
const STREAM: usize = 4 << 20;

const GRE: u8 = 47;
const ESP: u8 = 50;
const SCTP: u8 = 132;
/// For experiments (RFC 3692): nothing anywhere knows it.
const UNKNOWN: u8 = 253;

/// An IPv4 packet with these options, a multiple of four bytes.
fn with_options(packet: &[u8], options: &[u8]) -> Vec<u8> {
    let (header, payload) = packet.split_at(20);
    let mut packet = [header, options, payload].concat();
    packet[0] = 0x45 + options.len() as u8 / 4;
    let length = packet.len() as u16;
    packet[2..4].copy_from_slice(&length.to_be_bytes());
    // The lengths were just written.
    Ipv4Packet::new_checked(&mut packet[..]).unwrap().fill_checksum();
    packet
}

/// A fragment of an IPv4 packet: what it carries of it, and from where.
fn fragment(packet: &[u8], from: usize, length: usize) -> Vec<u8> {
    let (header, payload) = packet.split_at(20);
    let end = payload.len().min(from + length);
    let mut fragment = [header, &payload[from..end]].concat();
    let total = fragment.len() as u16;
    fragment[2..4].copy_from_slice(&total.to_be_bytes());
    let mut view = Ipv4Packet::new_checked(&mut fragment[..]).unwrap();
    view.set_fragment(from, end < payload.len());
    view.fill_checksum();
    fragment
}

/// The packet with a wrong checksum in its UDP (bytes 6 and 7) or TCP header (bytes 16 and 17).
fn corrupted(mut packet: Vec<u8>, at: usize) -> Vec<u8> {
    packet[20 + at] ^= 0x55;
    packet
}

/// An IPv4 packet with UDP that has no checksum.
fn without_checksum(mut packet: Vec<u8>) -> Vec<u8> {
    packet[26..28].fill(0);
    packet
}

fn segment(seq: u32, last: bool) -> build::Tcp<'static> {
    build::Tcp {
        src_port: 40_000,
        dst_port: 443,
        seq,
        ack: 99,
        flags: if last {
            TcpFlags::ACK | TcpFlags::PSH
        } else {
            TcpFlags::ACK
        },
        window: 501,
        // Two that do nothing, and time stamps.
        options: &[1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2],
    }
}

/// A packet of each kind that differs from what engines are made for.
fn odd_packets(ends: Ends) -> Vec<Shipment> {
    let ip = |ident| ends.v4().ident(ident);
    let some = pattern(1_001, 0);
    let whole = ip(100).udp(7, 9, &pattern(3_500, 1));
    let syn = build::Tcp {
        flags: TcpFlags::SYN,
        options: &[2, 4, 5, 0xb4, 1, 3, 3, 7],
        ..segment(1, false)
    };
    // What is behind the packet in its datagram is not part of it.
    let padded = ip(32).udp(7, 9, &some);
    let padding = Shipment {
        what: "a packet with padding",
        sent: [&padded[..], &[0xff; 100]].concat(),
        expected: padded,
    };
    let mut short_udp = ip(30).udp(7, 9, &some);
    short_udp[24..26].copy_from_slice(&108u16.to_be_bytes());
    let mut long_udp = ip(31).udp(7, 9, &some);
    long_udp[24..26].copy_from_slice(&1_400u16.to_be_bytes());
    let mut no_tcp = ip(33).tcp(&segment(5, false), b"four");
    no_tcp[32] = 0xf0 | no_tcp[32] & 0xf;
    let packets = [
        ("UDP", ip(1).udp(7, 9, &some)),
        ("UDP without a payload", ip(2).udp(7, 9, b"")),
        ("UDP without a checksum", without_checksum(ip(3).udp(7, 9, &some))),
        ("UDP with a wrong checksum", corrupted(ip(4).udp(7, 9, &some), 6)),
        ("UDP that ends before its packet", short_udp),
        ("UDP that would end behind its packet", long_udp),
        ("TCP's SYN", ip(5).tcp(&syn, b"")),
        ("TCP", ip(6).dont_fragment(true).tcp(&segment(2, true), &some)),
        (
            "TCP with a wrong checksum",
            corrupted(ip(7).tcp(&segment(3, true), &some), 16),
        ),
        ("TCP whose header would end behind its packet", no_tcp),
        ("ICMP echo", ip(8).icmp_echo(1, 2, &some)),
        ("an answer to an ICMP echo", ip(9).icmp(0, 0, 7, &some)),
        (
            "GRE",
            ip(10).raw(GRE, &[&[0, 0, 8, 0], &ip(1).udp(1, 2, &some)[..]].concat()),
        ),
        (
            "SCTP",
            ip(11).raw(
                SCTP,
                &[&[0x12, 0x34, 0x56, 0x78, 0, 0, 0, 9, 1, 2, 3, 4], &some[..]].concat(),
            ),
        ),
        ("ESP", ip(12).raw(ESP, &some)),
        ("an unknown protocol", ip(13).raw(UNKNOWN, &some)),
        ("a header alone", ip(14).raw(UNKNOWN, b"")),
        ("the MTU", ip(15).raw(UNKNOWN, &pattern(MTU - 20, 2))),
        (
            "UDP of the MTU",
            ip(16).dont_fragment(true).udp(7, 9, &pattern(MTU - 28, 3)),
        ),
        ("type of service and congestion", ip(17).tos(0xbb).udp(7, 9, &some)),
        // Do nothing, router alert, one for experiments (RFC 4727) that is copied, end.
        (
            "options",
            with_options(&ip(18).udp(7, 9, &some), &[1, 148, 4, 0, 0, 158, 6, 1, 2, 3, 4, 0]),
        ),
        (
            "options before TCP",
            with_options(&ip(19).tcp(&segment(4, true), &some), &[1, 1, 1, 1]),
        ),
        ("the first fragment", fragment(&whole, 0, 1_448)),
        ("a middle fragment", fragment(&whole, 1_448, 1_448)),
        ("the last fragment", fragment(&whole, 2_896, 1_448)),
        ("a tiny first fragment", fragment(&ip(101).udp(7, 9, &some), 0, 8)),
        (
            "the rest behind a tiny first fragment",
            fragment(&ip(101).udp(7, 9, &some), 8, 1_448),
        ),
    ];
    let packets = packets.into_iter().map(|(what, packet)| Shipment::new(what, packet));
    packets.chain(iter::once(padding)).collect()
}

/// The same for IPv6. Two packets are told apart by their flow label.
fn odd_packets_v6(ends: Ends) -> Vec<Shipment> {
    let some = pattern(1_001, 0);
    let ip = ends.v6();
    let behind = |headers: &[u8], packet: &[u8]| [headers, &packet[40..]].concat();
    // Six bytes of padding behind the number of the next header and the length (RFC 8200 4.2).
    let padding = |next| [next, 0, 1, 4, 0, 0, 0, 0];
    let fragment = |next, offset_and_more: u16| {
        let [high, low] = offset_and_more.to_be_bytes();
        [next, 0, high, low, 0, 0, 1, 2]
    };
    let udp = ip.udp(7, 9, &some);
    let tcp = ip.tcp(&segment(1, true), &some);
    let (hop_by_hop, routing, fragmented, options) = (0, 43, 44, 60);
    let packets = [
        ("UDP", udp.clone()),
        ("TCP", tcp.clone()),
        ("ICMPv6 echo", ip.icmp_echo(1, 2, &some)),
        ("an unknown protocol", ip.raw(UNKNOWN, &some)),
        ("nothing at all", ip.raw(59, b"")),
        ("traffic class", ip.traffic_class(0xbb).udp(7, 9, &some)),
        ("the MTU", ip.raw(UNKNOWN, &pattern(MTU - 40, 2))),
        (
            "hop by hop options",
            ip.raw(hop_by_hop, &behind(&padding(protocol::UDP), &udp)),
        ),
        (
            "destination options",
            ip.raw(options, &behind(&padding(protocol::TCP), &tcp)),
        ),
        // Of a type for experiments (RFC 4727), with no segments left.
        (
            "a routing header",
            ip.raw(routing, &behind(&[protocol::UDP, 0, 253, 0, 0, 0, 0, 0], &udp)),
        ),
        (
            "several headers",
            ip.raw(
                hop_by_hop,
                &behind(&[padding(options), padding(protocol::UDP)].concat(), &udp),
            ),
        ),
        (
            "a fragment of all",
            ip.raw(fragmented, &behind(&fragment(protocol::UDP, 0), &udp)),
        ),
        (
            "the first fragment",
            ip.raw(fragmented, &behind(&fragment(protocol::TCP, 1), &tcp)),
        ),
        (
            "a middle fragment",
            ip.raw(
                fragmented,
                &[&fragment(protocol::TCP, 1_448 | 1), &some[..1_000]].concat(),
            ),
        ),
        (
            "the last fragment",
            ip.raw(fragmented, &[&fragment(protocol::TCP, 2_448), &some[..77]].concat()),
        ),
    ];
    let labelled = |(label, (what, mut packet)): (u32, (_, Vec<u8>))| {
        Ipv6Packet::new_checked(&mut packet[..]).unwrap().set_flow_label(label);
        Shipment::new(what, packet)
    };
    (1..).zip(packets).map(labelled).collect()
}

/// Makes a packet of a run by its number.
type MakePacket = Box<dyn Fn(u16) -> Vec<u8>>;

/// Packets of a flow, as engines like to merge them, and between them what must not be merged with them.
fn runs(ends: Ends) -> Vec<(&'static str, MakePacket)> {
    let tcp = move |index: u16, last| {
        let segment = segment(0xffff_f000u32.wrapping_add(1_400 * u32::from(index)), last);
        let ip = ends.v4().ident(1_000 + index).dont_fragment(true);
        ip.tcp(&segment, &pattern(1_400, index.into()))
    };
    let udp = move |index: u16, length| ends.v4().ident(2_000 + index).udp(7, 9, &pattern(length, index.into()));
    let udp_v6 = move |index: u16, length| {
        let mut packet = ends.v6().udp(7, 9, &pattern(length, index.into()));
        let label = 3_000 + u32::from(index);
        Ipv6Packet::new_checked(&mut packet[..]).unwrap().set_flow_label(label);
        packet
    };
    let once_corrupt = |packet: Vec<u8>, index, at| if index == 11 { corrupted(packet, at) } else { packet };
    vec![
        ("TCP", Box::new(move |index| tcp(index, index + 1 == RUN))),
        (
            "TCP, one corrupt",
            Box::new(move |index| once_corrupt(tcp(index, false), index, 16)),
        ),
        (
            "UDP",
            Box::new(move |index| udp(index, if index + 1 == RUN { 701 } else { 1_200 })),
        ),
        ("small UDP", Box::new(move |index| udp(index, 18))),
        ("UDP of the MTU", Box::new(move |index| udp(index, MTU - 28))),
        (
            "UDP that grows",
            Box::new(move |index| udp(index, 40 * usize::from(index))),
        ),
        (
            "UDP, one corrupt",
            Box::new(move |index| once_corrupt(udp(index, 500), index, 6)),
        ),
        (
            "UDP without checksums",
            Box::new(move |index| without_checksum(udp(index, 1_200))),
        ),
        ("UDP over IPv6", Box::new(move |index| udp_v6(index, 1_200))),
        (
            "two flows, options and fragments",
            Box::new(move |index| match index % 5 {
                0 | 1 => tcp(index, false),
                2 | 3 => udp(index, 1_200),
                _ if index % 2 == 0 => fragment(&udp(index, 1_200), 0, 800),
                _ => with_options(&udp(index, 1_200), &[1, 1, 1, 0]),
            }),
        ),
    ]
}

fn packets_cross_unharmed(name: &str, flags: &[&str]) {
    let mut pair = Pair::start(name, flags);
    pair.ship(odd_packets);
    pair.ship(odd_packets_v6);
    for run in 0..runs(Ends {
        from: pair.near,
        to: pair.far,
    })
    .len()
    {
        pair.ship(|ends| {
            let (what, packet) = &runs(ends)[run];
            (0..RUN).map(|index| Shipment::new(what, packet(index))).collect()
        });
    }
    pair.overlay.daemons[0].assert_running();
}

#[test]
fn packets_of_every_kind_cross_the_fast_path_unharmed() {
    packets_cross_unharmed("odd_fast", &["--io=mmsg"]);
}

#[test]
fn packets_of_every_kind_cross_io_uring_unharmed() {
    packets_cross_unharmed("odd_uring", &["--io=uring"]);
}

#[test]
fn packets_of_every_kind_cross_a_daemon_without_offloads_unharmed() {
    packets_cross_unharmed("odd_single", &["--offload=false"]);
}

#[test]
fn packets_of_every_kind_cross_the_plain_path_unharmed() {
    packets_cross_unharmed("odd_plain", &["--tun=plain"]);
}

#[test]
fn packets_of_every_kind_cross_the_plain_path_without_offloads_unharmed() {
    packets_cross_unharmed("odd_plainest", &["--tun=plain", "--offload=false"]);
}

/// Bursts whose datagrams fill the MTU, end with a shorter one, and are small.
const BURSTS: [Burst; 4] = [
    Burst {
        segment: MTU - 28,
        last: MTU - 28,
        count: 44,
    },
    Burst {
        segment: 1_000,
        last: 7,
        count: 60,
    },
    Burst {
        segment: 100,
        last: 100,
        count: 64,
    },
    Burst {
        segment: Burst::LABEL,
        last: Burst::LABEL,
        count: 64,
    },
];

/// What the container's kernel leaves to others to cut, and what the peer sends piece by piece.
fn a_plain_host_understands(name: &str, flags: &[&str]) {
    let Pair { peer, mut overlay, .. } = Pair::start(name, flags);
    let peer = peer.carry();
    let [near, far] = [&overlay.containers[0], &peer.endpoint];
    assert_reaches(&near.ns, far.ip);
    for burst in BURSTS {
        burst.exchange(near, far);
        burst.exchange(far, near);
    }
    transfer(&[(near, far)], STREAM);
    transfer(&[(far, near)], STREAM);
    // Both at once.
    transfer(&[(near, far), (far, near)], STREAM);
    assert_eq!(peer.seen().longest, MTU, "TCP fills its packets");
    overlay.daemons[0].assert_running();
}

#[test]
fn a_plain_host_understands_the_fast_path() {
    a_plain_host_understands("bulk_fast", &["--io=mmsg"]);
}

#[test]
fn a_plain_host_understands_io_uring() {
    a_plain_host_understands("bulk_uring", &["--io=uring"]);
}

#[test]
fn a_plain_host_understands_a_daemon_without_offloads() {
    a_plain_host_understands("bulk_single", &["--offload=false"]);
}

#[test]
fn a_plain_host_understands_the_plain_path() {
    a_plain_host_understands("bulk_plain", &["--tun=plain"]);
}

/// What is no packet, and packets that must not be delivered.
fn garbage(ends: Ends) -> Vec<Vec<u8>> {
    let ip = ends.v4();
    let packet = ip.udp(7, 9, &pattern(100, 0));
    let with = |changes: &[(usize, u8)]| {
        let mut packet = packet.clone();
        for &(at, byte) in changes {
            packet[at] = byte;
        }
        packet
    };
    let packet_v6 = ends.v6().udp(7, 9, &pattern(100, 0));
    let mut long_v6 = packet_v6.clone();
    long_v6[4] = 0xff;
    vec![
        vec![],
        vec![0],
        vec![0x45],
        vec![0x60],
        vec![0x45; 19],
        vec![0x60; 39],
        vec![0; MTU],
        vec![0xff; MTU],
        // Longer than any packet of the overlay, and than the longest IP packet less its headers.
        vec![0x45; 9_000],
        vec![0x45; 65_507],
        // The version; the header's length; the total length.
        with(&[(0, 0x05)]),
        with(&[(0, 0x55)]),
        with(&[(0, 0x65)]),
        with(&[(0, 0x44)]),
        with(&[(0, 0x40)]),
        with(&[(2, 0), (3, 0)]),
        with(&[(2, 0), (3, 19)]),
        with(&[(2, 0), (3, 129)]),
        with(&[(2, 0xff), (3, 0xff)]),
        // The header would end behind the packet.
        [&[0x4f], &packet[1..40]].concat(),
        packet[..127].to_vec(),
        packet_v6[..147].to_vec(),
        long_v6,
        ip.ttl(0).udp(7, 9, b"dead"),
        ip.ttl(1).udp(7, 9, b"dying"),
        ends.v6().hop_limit(0).udp(7, 9, b"dead"),
        // To the host itself, to the peer, to everyone, to nobody.
        build::Ipv4::new(ends.from.0, ends.from.0).udp(7, 9, b"to its sender"),
        build::Ipv4::new(ends.to.0, ends.from.0).udp(7, 9, b"from its receiver"),
        build::Ipv4::new(ends.from.0, Ipv4Addr::BROADCAST).udp(7, 9, b"to everyone"),
        build::Ipv4::new(ends.from.0, Ipv4Addr::UNSPECIFIED).udp(7, 9, b"to nobody"),
        build::Ipv4::new(Ipv4Addr::LOCALHOST, Ipv4Addr::LOCALHOST).udp(7, 9, b"to itself"),
    ]
}

/// A peer that sends all datagrams of `segment` bytes that it is given at once as one message.
struct InOneMessage<'a> {
    peer: &'a PlainPeer,
    segment: usize,
}

impl End for InOneMessage<'_> {
    fn send(&self, datagrams: &[u8]) {
        self.peer.send_segmented(datagrams, self.segment);
    }

    fn recv(&self, limit: Duration) -> Option<Vec<u8>> {
        self.peer.recv(limit)
    }
}

fn garbage_does_no_harm(name: &str, flags: &[&str]) {
    let mut pair = Pair::start(name, flags);
    let ends = Ends {
        from: pair.far,
        to: pair.near,
    };
    let good = |ident: u16| ends.v4().ident(ident).udp(7, 9, &pattern(300, ident.into()));
    for (ident, garbage) in (1..).zip(garbage(ends)) {
        pair.peer.send(&garbage);
        pair.carry(
            &pair.peer,
            &pair.wire,
            &[Shipment::new("a good packet after garbage", good(ident))],
        );

        // Between two good packets, in a message that the kernel hands over in one piece where it may.
        let mut cut = garbage;
        cut.resize(good(0).len(), 0);
        let [first, last] = [good(1_000 + ident), good(2_000 + ident)];
        let sent = [&first[..], &cut, &last].concat();
        let shipment = |what, expected| Shipment {
            what,
            sent: sent.clone(),
            expected,
        };
        let message = InOneMessage {
            peer: &pair.peer,
            segment: cut.len(),
        };
        let around = [shipment("before garbage", first), shipment("behind garbage", last)];
        pair.carry(&message, &pair.wire, &around);
    }
    pair.overlay.daemons[0].assert_running();
    let peer = pair.peer.carry();
    assert_reaches(&pair.overlay.containers[0].ns, peer.endpoint.ip);
}

#[test]
fn garbage_does_the_fast_path_no_harm() {
    garbage_does_no_harm("garbage_fast", &["--io=mmsg"]);
}

#[test]
fn garbage_does_io_uring_no_harm() {
    garbage_does_no_harm("garbage_uring", &["--io=uring"]);
}

#[test]
fn garbage_does_the_plain_path_no_harm() {
    garbage_does_no_harm("garbage_plain", &["--tun=plain", "--offload=false"]);
}

#[test]
fn daemons_with_and_without_offloads_understand_one_another() {
    let lab = new_lab("mixed");
    let registry = Registry::embedded(&lab);
    let host = HostOptions::default;
    let flags = [
        (host(), &[][..]),
        (host(), &["--offload=false"]),
        (host(), &["-tun=plain", "--offload=false"]),
    ];
    let overlay = Overlay::start_hosts(lab, registry, CONFIG, &flags);
    overlay.assert_all_reach_all();
    let device = |host: usize| overlay.hosts[host].ns().ip("-d link show flannel0").unwrap();
    assert!(device(0).contains("vnet_hdr on"));
    assert!(device(1).contains("vnet_hdr off") && device(2).contains("vnet_hdr off"));
    for from in &overlay.containers {
        for to in overlay.containers.iter().filter(|to| to.name != from.name) {
            BURSTS.iter().for_each(|burst| burst.exchange(from, to));
            transfer(&[(from, to)], STREAM);
        }
    }
}
