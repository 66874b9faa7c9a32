//! What the fuzz targets check, as plain functions: `fuzz_targets/` hands them a fuzzer's bytes, `tests/fuzz_corpus.rs`
//! the committed corpora. Each of them panics if bytes from the network, or from etcd, break a promise of the library.

mod control;
mod router;
mod source;
mod superpackets;
mod workers;
mod world;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use flannel::packet::{
    Hop, IcmpError, IcmpPacket, Icmpv6Packet, Ipv4Packet, Ipv6Packet, TcpSegment, UdpDatagram, icmp, icmpv6, ipv6,
    protocol,
};
use flannel::route_table::{Peer, PeerId, RouteTable, Routes};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

pub use control::{lease_value, network_config, subnet_file, subnet_key};
pub use superpackets::{coalesce, split, split_coalesce, virtio};
pub use workers::{egress, fast_plain, ingress};

/// A target: panics if `data` breaks a promise.
pub type Target = fn(data: &[u8]);

/// All targets by name.
pub const TARGETS: &[(&str, Target)] = &[
    ("coalesce", coalesce),
    ("egress", egress),
    ("fast_plain", fast_plain),
    ("icmp", icmp),
    ("ingress", ingress),
    ("ipv4", ipv4),
    ("ipv6", ipv6),
    ("lease_value", lease_value),
    ("network_config", network_config),
    ("route_table", route_table),
    ("split", split),
    ("split_coalesce", split_coalesce),
    ("subnet_file", subnet_file),
    ("subnet_key", subnet_key),
    ("tcp", tcp),
    ("udp", udp),
    ("virtio", virtio),
];

/// The partial sum of some pseudo header: the checks hold for any.
const PSEUDO_HEADER: u32 = 0x1_2345;

/// IPv4 view: lengths add up, fields survive a round trip, a lost hop leaves the rest and the checksum's truth alone.
pub fn ipv4(data: &[u8]) {
    let Ok(packet) = Ipv4Packet::new_checked(data) else {
        return;
    };
    let total_len = usize::from(packet.total_len());
    assert_eq!(packet.version(), 4);
    assert_eq!(packet.header().len(), packet.header_len());
    assert_eq!(packet.header_len() + packet.payload().len(), total_len);
    assert_eq!(packet.payload().len(), usize::from(packet.payload_len()));
    assert_eq!(packet.options().len() + 20, packet.header_len());
    assert_eq!(packet.tos(), packet.dscp() << 2 | packet.ecn());
    assert_eq!(
        packet.is_fragment(),
        packet.more_fragments() || packet.is_later_fragment()
    );
    assert!(
        Ipv4Packet::new_checked(&data[..total_len]).is_ok(),
        "padding is not needed"
    );
    assert!(
        Ipv4Packet::new_checked(&data[..total_len - 1]).is_err(),
        "the last byte is"
    );

    let mut copy = data.to_vec();
    let mut written = Ipv4Packet::new_checked(copy.as_mut_slice()).unwrap();
    written.set_tos(packet.tos());
    written.set_total_len(packet.total_len());
    written.set_ident(packet.ident());
    written.set_dont_fragment(packet.dont_fragment());
    written.set_ttl(packet.ttl());
    written.set_protocol(packet.protocol());
    written.set_checksum(packet.checksum());
    written.set_src(packet.src());
    written.set_dst(packet.dst());
    written.payload_mut().copy_from_slice(packet.payload());
    assert_eq!(copy, data);

    let mut forwarded = Ipv4Packet::new_checked(copy.as_mut_slice()).unwrap();
    match forwarded.decrement_ttl() {
        Hop::Expired => {
            assert!(packet.ttl() <= 1);
            assert_eq!(copy, data);
        }
        Hop::Forward => {
            assert_eq!(forwarded.ttl(), packet.ttl() - 1);
            assert_eq!(forwarded.verify_checksum(), packet.verify_checksum());
            let mut changed = (0..data.len()).filter(|at| copy[*at] != data[*at]);
            assert!(
                changed.all(|at| [8, 10, 11].contains(&at)),
                "only TTL and checksum change"
            );
        }
    }

    let mut filled = Ipv4Packet::new_checked(copy.as_mut_slice()).unwrap();
    filled.fill_checksum();
    assert!(filled.verify_checksum());
}

/// IPv6 view: lengths add up, fields survive a round trip, the walk over extension headers stays within the packet.
pub fn ipv6(data: &[u8]) {
    let Ok(packet) = Ipv6Packet::new_checked(data) else {
        return;
    };
    let total_len = packet.total_len();
    assert_eq!(packet.version(), 6);
    assert_eq!(packet.payload().len(), usize::from(packet.payload_len()));
    assert_eq!(ipv6::HEADER_LEN + packet.payload().len(), total_len);
    assert!(
        Ipv6Packet::new_checked(&data[..total_len]).is_ok(),
        "padding is not needed"
    );
    assert!(
        Ipv6Packet::new_checked(&data[..total_len - 1]).is_err(),
        "the last byte is"
    );

    if let Ok(upper) = packet.upper_layer() {
        assert!((ipv6::HEADER_LEN..=total_len).contains(&upper.offset));
        assert!(upper.offset > ipv6::HEADER_LEN || upper.protocol == packet.next_header());
        assert!(!upper.is_later_fragment() || upper.offset >= ipv6::HEADER_LEN + 8);
    }

    let mut copy = data.to_vec();
    let mut written = Ipv6Packet::new_checked(copy.as_mut_slice()).unwrap();
    written.set_traffic_class(packet.traffic_class());
    written.set_flow_label(packet.flow_label());
    written.set_payload_len(packet.payload_len());
    written.set_next_header(packet.next_header());
    written.set_hop_limit(packet.hop_limit());
    written.set_src(packet.src());
    written.set_dst(packet.dst());
    written.payload_mut().copy_from_slice(packet.payload());
    assert_eq!(copy, data);

    let mut forwarded = Ipv6Packet::new_checked(copy.as_mut_slice()).unwrap();
    let hop = forwarded.decrement_hop_limit();
    assert_eq!(hop == Hop::Expired, packet.hop_limit() <= 1);
    assert_eq!(
        forwarded.hop_limit(),
        packet.hop_limit() - u8::from(hop == Hop::Forward)
    );
}

/// ICMP errors of both versions. The first byte decides how much room there is for the reply.
pub fn icmp(data: &[u8]) {
    let Some((room, original)) = data.split_first() else {
        return;
    };
    let mut out = vec![0xaa; usize::from(*room) * 6];
    for error in [IcmpError::NetUnreachable, IcmpError::TimeExceeded] {
        icmp_v4(original, error, &mut out);
        icmp_v6(original, error, &mut out);

        // A fuzzer does not find the header checksum by itself, and without it nothing is answered.
        let mut mended = original.to_vec();
        if let Ok(mut packet) = Ipv4Packet::new_checked(mended.as_mut_slice()) {
            packet.fill_checksum();
            icmp_v4(&mended, error, &mut out);
        }
    }
}

fn icmp_v4(original: &[u8], error: IcmpError, out: &mut [u8]) {
    const ROUTER: Ipv4Addr = Ipv4Addr::new(10, 5, 34, 0);
    out.fill(0xaa);
    let Some(len) = icmp::error_reply(original, error, ROUTER, out) else {
        return;
    };
    let (reply, rest) = out.split_at(len);
    assert!(len <= icmp::MAX_ERROR_LEN);
    assert!(
        rest.iter().all(|byte| *byte == 0xaa),
        "nothing is written behind the reply"
    );

    let cause = Ipv4Packet::new_checked(original).unwrap();
    assert!(cause.verify_checksum() && !cause.is_later_fragment());
    assert!(
        cause.protocol() != protocol::ICMP || !icmp::is_error(cause.payload()[0]),
        "an error was answered"
    );
    for address in [cause.src(), cause.dst()] {
        assert!(!address.is_multicast() && !address.is_broadcast() && !address.is_loopback());
        assert!(!address.is_unspecified());
    }

    let packet = Ipv4Packet::new_checked(reply).unwrap();
    assert_eq!((usize::from(packet.total_len()), packet.ttl()), (len, 64));
    assert_eq!(
        (packet.src(), packet.dst(), packet.protocol()),
        (ROUTER, cause.src(), protocol::ICMP)
    );
    assert!(packet.verify_checksum());
    let message = IcmpPacket::new_checked(packet.payload()).unwrap();
    assert!(message.verify_checksum() && icmp::is_error(message.kind()));
    assert!(original.starts_with(message.payload()));
    let whole = usize::from(cause.total_len());
    assert!(
        message.payload().len() >= whole.min(cause.header_len() + 8),
        "the ports are quoted"
    );
    assert!(message.payload().len() <= whole, "padding is not");
    assert_eq!(
        icmp::error_reply(reply, error, ROUTER, &mut [0; 1500]),
        None,
        "errors answer each other"
    );
}

fn icmp_v6(original: &[u8], error: IcmpError, out: &mut [u8]) {
    const ROUTER: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x12, 0x13, 0, 0, 0, 0, 0);
    out.fill(0xaa);
    let Some(len) = icmpv6::error_reply(original, error, ROUTER, out) else {
        return;
    };
    let (reply, rest) = out.split_at(len);
    assert!(len <= icmpv6::MAX_ERROR_LEN);
    assert!(
        rest.iter().all(|byte| *byte == 0xaa),
        "nothing is written behind the reply"
    );

    let cause = Ipv6Packet::new_checked(original).unwrap();
    let upper = cause.upper_layer().unwrap();
    assert!(!upper.is_later_fragment());
    assert!(
        upper.protocol != protocol::ICMPV6 || !icmpv6::is_error(original[upper.offset]),
        "an error was answered"
    );
    for address in [cause.src(), cause.dst()] {
        assert!(!address.is_multicast() && !address.is_loopback() && !address.is_unspecified());
    }

    let packet = Ipv6Packet::new_checked(reply).unwrap();
    assert_eq!((packet.total_len(), packet.hop_limit()), (len, 64));
    assert_eq!(
        (packet.src(), packet.dst(), packet.next_header()),
        (ROUTER, cause.src(), protocol::ICMPV6)
    );
    let message = Icmpv6Packet::new_checked(packet.payload()).unwrap();
    assert!(message.verify_checksum(packet.pseudo_header(protocol::ICMPV6, u32::from(packet.payload_len()))));
    assert!(icmpv6::is_error(message.kind()));
    assert!(original.starts_with(message.payload()));
    assert!(
        message.payload().len() >= cause.total_len().min(ipv6::HEADER_LEN + 8),
        "the ports are quoted"
    );
    assert!(message.payload().len() <= cause.total_len(), "padding is not");
    assert_eq!(
        icmpv6::error_reply(reply, error, ROUTER, &mut [0; 1500]),
        None,
        "errors answer each other"
    );
}

/// TCP view: lengths add up, fields survive a round trip, a filled checksum verifies.
pub fn tcp(data: &[u8]) {
    let Ok(segment) = TcpSegment::new_checked(data) else {
        return;
    };
    assert_eq!(segment.header_len() + segment.payload().len(), data.len());
    assert_eq!(segment.options().len() + 20, segment.header_len());

    let mut copy = data.to_vec();
    let mut written = TcpSegment::new_checked(copy.as_mut_slice()).unwrap();
    written.set_src_port(segment.src_port());
    written.set_dst_port(segment.dst_port());
    written.set_seq(segment.seq());
    written.set_ack(segment.ack());
    written.set_flags(segment.flags());
    written.set_window(segment.window());
    written.set_checksum(segment.checksum());
    written.payload_mut().copy_from_slice(segment.payload());
    assert_eq!(copy, data);

    let mut filled = TcpSegment::new_checked(copy.as_mut_slice()).unwrap();
    filled.fill_checksum(PSEUDO_HEADER);
    assert!(filled.verify_checksum(PSEUDO_HEADER) && !filled.verify_checksum(PSEUDO_HEADER + 1));
}

/// UDP view: lengths add up, fields survive a round trip, a filled checksum verifies and is never zero.
pub fn udp(data: &[u8]) {
    let Ok(datagram) = UdpDatagram::new_checked(data) else {
        return;
    };
    assert_eq!(datagram.payload().len() + 8, usize::from(datagram.len()));
    assert!(
        UdpDatagram::new_checked(&data[..usize::from(datagram.len())]).is_ok(),
        "padding is not needed"
    );
    assert!(
        UdpDatagram::new_checked(&data[..usize::from(datagram.len()) - 1]).is_err(),
        "the last byte is"
    );

    let mut copy = data.to_vec();
    let mut written = UdpDatagram::new_checked(copy.as_mut_slice()).unwrap();
    written.set_src_port(datagram.src_port());
    written.set_dst_port(datagram.dst_port());
    written.set_len(datagram.len());
    written.set_checksum(datagram.checksum());
    assert_eq!(copy, data);

    let mut filled = UdpDatagram::new_checked(copy.as_mut_slice()).unwrap();
    filled.fill_checksum(PSEUDO_HEADER);
    assert!(filled.has_checksum());
    assert!(filled.verify_checksum(PSEUDO_HEADER) && !filled.verify_checksum(PSEUDO_HEADER + 1));
}

/// Route table, published and read, against a list that is searched from end to end.
///
/// Each six bytes are an operation: what to do and to which family, a prefix length, four bytes of address.
pub fn route_table(data: &[u8]) {
    let routes = Routes::default();
    let mut reader = routes.reader();
    let mut model: Vec<(IpNet, Peer)> = Vec::new();
    for (number, operation) in data.chunks_exact(6).enumerate() {
        let word = u32::from_be_bytes([operation[2], operation[3], operation[4], operation[5]]);
        let net = if operation[0] & 1 == 0 {
            IpNet::from(Ipv4Net::new(word.into(), operation[1] % 33).unwrap())
        } else {
            // The same word at both ends, so that any prefix length has something to tell apart.
            let address = u128::from(word) << 96 | u128::from(word);
            IpNet::from(Ipv6Net::new(address.into(), operation[1] % 129).unwrap())
        };
        match operation[0] >> 1 & 0b11 {
            0 | 1 => {
                let address = if operation[0] & 0x80 == 0 {
                    IpAddr::from(Ipv4Addr::from(number as u32))
                } else {
                    IpAddr::from(Ipv6Addr::from(number as u128))
                };
                model.retain(|(known, _)| known.trunc() != net.trunc());
                model.push((
                    net,
                    Peer {
                        addr: SocketAddr::new(address, 8285),
                        id: PeerId::new(number % PeerId::COUNT).expect("it is below the count"),
                    },
                ));
            }
            2 => model.retain(|(known, _)| known.trunc() != net.trunc()),
            _ => {
                routes.publish(RouteTable::new(model.iter().copied()));
                let table = reader.load();
                assert_eq!(table.len(), model.len());
                for dst in [net.addr(), net.network(), net.broadcast()] {
                    assert_eq!(table.lookup(dst), longest(&model, dst), "{dst}");
                }
            }
        }
    }

    let table = RouteTable::new(model.iter().copied());
    for (net, peer) in table.iter() {
        assert_eq!(net, net.trunc());
        assert!(
            model
                .iter()
                .any(|(known, known_peer)| known.trunc() == net && *known_peer == peer)
        );
        for dst in [net.network(), net.broadcast()] {
            assert_eq!(table.lookup(dst), longest(&model, dst), "{dst}");
        }
    }
}

/// The definition of a route lookup.
fn longest(routes: &[(IpNet, Peer)], dst: IpAddr) -> Option<Peer> {
    let covering = routes.iter().filter(|(net, _)| net.contains(&dst));
    covering.max_by_key(|(net, _)| net.prefix_len()).map(|(_, peer)| *peer)
}
