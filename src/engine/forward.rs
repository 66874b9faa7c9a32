//! What to do with a packet: the router's part of the engine. Pure; the worker carries out the [`Verdict`].
//!
//! Each direction takes one from the time to live, as two hops of a route would, and as the original does.

use std::net::IpAddr;

use crate::{
    packet::{Hop, IcmpError, IpPacket, IpVersion, Ipv4Packet, Ipv6Packet, Malformed, flow},
    route_table::{Peer, PeerId, RouteTable},
};

use super::{admission::Admission, counters::Drop, departure::Departure};

/// What becomes of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict<Next> {
    /// It goes on, one hop older.
    Forward(Next),
    /// It goes no further and its sender is told why.
    Refuse(IcmpError, Drop),
    /// It goes no further.
    Drop(Drop),
}

/// A packet that came out of the TUN device: to which peer, and with which hash of its flow?
#[inline]
pub fn egress(packet: &mut [u8], routes: &RouteTable, departure: &Departure) -> Verdict<(Peer, u32)> {
    let Ok(view) = IpPacket::parse(packet) else {
        return Verdict::Drop(Drop::Malformed);
    };
    match routes.lookup(view.dst()) {
        None => match departure.stray(&view) {
            Some(reason) => Verdict::Drop(reason),
            None => Verdict::Refuse(IcmpError::NetUnreachable, Drop::NoRoute),
        },
        Some(peer) => {
            if let Err(reason) = departure.allow(&view, routes) {
                return Verdict::Drop(reason);
            }
            let hash = flow::hash(&view);
            age(packet, (peer, hash))
        }
    }
}

/// A packet that came in a datagram from the address `from`: fit for the TUN device? Under which peer's number it counts.
#[inline]
pub fn ingress(packet: &mut [u8], from: IpAddr, routes: &RouteTable, admission: &Admission) -> Verdict<PeerId> {
    let Ok(view) = IpPacket::parse(packet) else {
        return Verdict::Drop(Drop::Malformed);
    };
    match admission.admit(&view, from, routes) {
        Ok(id) => age(packet, id),
        Err(reason) => Verdict::Drop(reason),
    }
}

/// Takes one from the time to live.
#[inline]
fn age<Next>(packet: &mut [u8], next: Next) -> Verdict<Next> {
    match take_hop(packet) {
        Ok(Hop::Forward) => Verdict::Forward(next),
        Ok(Hop::Expired) => Verdict::Refuse(IcmpError::TimeExceeded, Drop::TtlExpired),
        Err(_) => Verdict::Drop(Drop::Malformed),
    }
}

fn take_hop(packet: &mut [u8]) -> Result<Hop, Malformed> {
    match IpVersion::of(packet)? {
        IpVersion::V4 => Ok(Ipv4Packet::new_checked(packet)?.decrement_ttl()),
        IpVersion::V6 => Ok(Ipv6Packet::new_checked(packet)?.decrement_hop_limit()),
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddr};

    use super::*;
    use crate::{engine::admission::SourceCheck, packet::build};

    const HOST: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 2));

    const PEER: Peer = Peer {
        addr: SocketAddr::new(HOST, 8285),
        id: PeerId::OTHERS,
    };

    fn routes() -> RouteTable {
        RouteTable::new([
            ("10.5.2.0/24".parse().unwrap(), PEER),
            ("fd00:2::/64".parse().unwrap(), PEER),
        ])
    }

    /// The same packet of either version, with `hops` left.
    fn packets(v4: &str, v6: &str, hops: u8) -> [Vec<u8>; 2] {
        [
            build::Ipv4::new([10, 5, 1, 2].into(), v4.parse().unwrap())
                .ttl(hops)
                .udp(1, 2, &[7; 100]),
            build::Ipv6::new("fd00:1::2".parse().unwrap(), v6.parse().unwrap())
                .hop_limit(hops)
                .udp(1, 2, &[7; 100]),
        ]
    }

    fn leaving(packet: &mut [u8]) -> Verdict<(Peer, u32)> {
        egress(packet, &routes(), &Departure::default())
    }

    fn from_peer(packet: &mut [u8]) -> Verdict<PeerId> {
        ingress(packet, HOST, &routes(), &Admission::new(SourceCheck::Off, []))
    }

    fn to_peer(hops: u8) -> [Vec<u8>; 2] {
        packets("10.5.2.9", "fd00:2::9", hops)
    }

    #[test]
    fn a_packet_for_a_peer_goes_to_it_one_hop_older() {
        for (mut packet, older) in to_peer(9).into_iter().zip(to_peer(8)) {
            let hash = flow::hash(&IpPacket::parse(&packet).unwrap());
            assert_eq!(leaving(&mut packet), Verdict::Forward((PEER, hash)));
            assert_eq!(packet, older);
        }
    }

    #[test]
    fn a_packet_from_a_peer_is_delivered_one_hop_older() {
        for (mut packet, older) in to_peer(2).into_iter().zip(to_peer(1)) {
            assert_eq!(from_peer(&mut packet), Verdict::Forward(PEER.id));
            assert_eq!(packet, older);
        }
    }

    #[test]
    fn a_destination_without_a_lease_is_unreachable_and_the_packet_stays_as_it_was() {
        for mut packet in packets("10.5.3.9", "fd00:3::9", 1) {
            let before = packet.clone();
            assert_eq!(
                leaving(&mut packet),
                Verdict::Refuse(IcmpError::NetUnreachable, Drop::NoRoute)
            );
            assert_eq!(packet, before);
        }
    }

    #[test]
    fn the_end_of_the_time_to_live_is_told_in_both_directions() {
        for mut packet in to_peer(1) {
            assert_eq!(
                leaving(&mut packet),
                Verdict::Refuse(IcmpError::TimeExceeded, Drop::TtlExpired)
            );
            assert_eq!(
                from_peer(&mut packet),
                Verdict::Refuse(IcmpError::TimeExceeded, Drop::TtlExpired)
            );
        }
    }

    #[test]
    fn what_cannot_be_answered_is_dropped_as_it_is_and_nobody_is_told() {
        for mut packet in packets("224.0.0.251", "ff02::fb", 1) {
            let before = packet.clone();
            assert_eq!(leaving(&mut packet), Verdict::Drop(Drop::Multicast));
            assert_eq!(packet, before);
        }
        let [mut broadcast, _] = packets("10.5.2.255", "fd00:2::1", 1);
        assert_eq!(leaving(&mut broadcast), Verdict::Drop(Drop::Broadcast));
    }

    #[test]
    fn what_is_no_packet_is_dropped() {
        let [v4, v6] = to_peer(9);
        for broken in [&[][..], &[0x45], &v4[..19], &v4[..100], &[0x75; 40], &v6[..39]] {
            assert_eq!(leaving(&mut broken.to_vec()), Verdict::Drop(Drop::Malformed));
            assert_eq!(from_peer(&mut broken.to_vec()), Verdict::Drop(Drop::Malformed));
        }
    }
}
