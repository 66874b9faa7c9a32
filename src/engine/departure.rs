//! Which packets of this host and its containers may leave it: those that can be answered. Pure.
//!
//! A packet that comes from no single host, or goes to none, is dropped before it costs the underlay anything (RFC 1812 section
//! 5.3.7, RFC 6890, RFC 4291). Sources outside this host's subnet are none of these: a host may forward for others.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net};

use crate::{
    packet::{IpPacket, ipv4},
    route_table::RouteTable,
};

use super::counters::Drop;

/// What this host lets out.
#[derive(Debug, Clone, Copy, Default)]
pub struct Departure {
    /// This host's subnet.
    own: Option<Ipv4Net>,
}

impl Departure {
    /// For a host with these subnets, at most one of each family.
    pub fn new(own: impl IntoIterator<Item = IpNet>) -> Self {
        let mut v4 = own.into_iter().filter_map(|net| match net {
            IpNet::V4(net) => Some(net),
            // There is no broadcast in IPv6.
            IpNet::V6(_) => None,
        });
        Self { own: v4.next() }
    }

    /// Whether a packet that a peer's subnet covers may go there.
    ///
    /// # Errors
    /// Why not: [`Drop::Martian`] by its source, [`Drop::Broadcast`] by its destination.
    #[inline]
    pub fn allow(&self, packet: &IpPacket<'_>, routes: &RouteTable) -> Result<(), Drop> {
        if !self.is_source(packet) {
            return Err(Drop::Martian);
        }
        match packet {
            IpPacket::V4(packet) if routes.is_broadcast(packet.dst()) => Err(Drop::Broadcast),
            _ => Ok(()),
        }
    }

    /// Why a packet that no peer's subnet covers was not meant for one; `None` if it only found none.
    pub fn stray(&self, packet: &IpPacket<'_>) -> Option<Drop> {
        let reason = match packet.dst() {
            IpAddr::V4(to) if to.is_broadcast() || self.own.is_some_and(|own| own.broadcast() == to) => Drop::Broadcast,
            to if to.is_multicast() => Drop::Multicast,
            IpAddr::V4(to) if !ipv4::is_host(to) && !self.is_of_class_e(to) => Drop::Martian,
            IpAddr::V6(to) if !is_host_v6(to) => Drop::Martian,
            _ if !self.is_source(packet) => Drop::Martian,
            _ => return None,
        };
        Some(reason)
    }

    /// Whether the address is of class E, like the network.
    fn is_of_class_e(&self, address: Ipv4Addr) -> bool {
        let is = |address: Ipv4Addr| address.octets()[0] >= 240;
        is(address) && self.own.is_some_and(|own| is(own.network()))
    }

    /// Whether whoever sent the packet could be answered at all.
    #[inline]
    fn is_source(&self, packet: &IpPacket<'_>) -> bool {
        match packet {
            // The network may lie in class E, which Linux takes for addresses like any other.
            IpPacket::V4(packet) => match self.own {
                Some(own) if own.contains(&packet.src()) => packet.src() != own.broadcast(),
                _ => ipv4::is_host(packet.src()),
            },
            IpPacket::V6(packet) => is_host_v6(packet.src()),
        }
    }
}

/// Whether the address can be that of a single host elsewhere: not unspecified, loopback, multicast, of one link only, or an
/// IPv4 address in disguise (RFC 4291 sections 2.5 and 2.7).
#[inline]
fn is_host_v6(address: Ipv6Addr) -> bool {
    // `::/96` holds `::` and `::1`.
    let disguised = matches!(u128::from(address) >> 32, 0 | 0xffff);
    !(disguised || address.is_multicast() || address.is_unicast_link_local())
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;
    use crate::{
        packet::build,
        route_table::{Peer, PeerId},
    };

    fn routes() -> RouteTable {
        let peer = Peer {
            addr: SocketAddr::from(([192, 0, 2, 2], 8285)),
            id: PeerId::OTHERS,
        };
        RouteTable::new(["10.5.2.0/24", "10.5.4.0/22", "fd00:2::/64"].map(|net| (net.parse().unwrap(), peer)))
    }

    fn departure(own: &str) -> Departure {
        Departure::new([own, "fd00:1::/64"].map(|net| net.parse().unwrap()))
    }

    fn packet(src: &str, dst: &str) -> Vec<u8> {
        match (src.parse().unwrap(), dst.parse().unwrap()) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => build::Ipv4::new(src, dst).udp(1, 2, b"hello"),
            (IpAddr::V6(src), IpAddr::V6(dst)) => build::Ipv6::new(src, dst).udp(1, 2, b"hello"),
            _ => panic!("two families"),
        }
    }

    fn allow(src: &str, dst: &str) -> Result<(), Drop> {
        departure("10.5.1.0/24").allow(&IpPacket::parse(&packet(src, dst)).unwrap(), &routes())
    }

    fn stray(src: &str, dst: &str) -> Option<Drop> {
        departure("10.5.1.0/24").stray(&IpPacket::parse(&packet(src, dst)).unwrap())
    }

    #[test]
    fn what_can_be_answered_leaves_also_from_elsewhere() {
        // A container, the device itself, the host's underlay, another network behind it, a link-local service of a cloud.
        for src in [
            "10.5.1.2",
            "10.5.1.0",
            "192.0.2.1",
            "172.17.0.2",
            "169.254.169.254",
            "1.0.0.0",
            "223.255.255.254",
        ] {
            assert_eq!(allow(src, "10.5.2.9"), Ok(()), "{src}");
        }
        for src in ["fd00:1::2", "2001:db8::1", "64:ff9b::192.0.2.1", "fec0::1", "::1:0:0:0"] {
            assert_eq!(allow(src, "fd00:2::9"), Ok(()), "{src}");
        }
    }

    #[test]
    fn a_source_that_is_no_host_stays_here() {
        for src in [
            "0.0.0.0",
            "0.1.2.3",
            "127.0.0.1",
            "127.255.255.255",
            "224.0.0.1",
            "239.255.255.255",
            "240.0.0.1",
            "255.255.255.255",
            "10.5.1.255",
        ] {
            assert_eq!(allow(src, "10.5.2.9"), Err(Drop::Martian), "{src}");
        }
        for src in [
            "::",
            "::1",
            "ff02::1",
            "fe80::1",
            "febf::1",
            "::ffff:10.5.1.2",
            "::10.5.1.2",
        ] {
            assert_eq!(allow(src, "fd00:2::9"), Err(Drop::Martian), "{src}");
        }
    }

    #[test]
    fn a_peers_broadcast_address_is_no_destination() {
        for dst in ["10.5.2.255", "10.5.7.255"] {
            assert_eq!(allow("10.5.1.2", dst), Err(Drop::Broadcast), "{dst}");
        }
        // Within the longer subnet it is an address like any other.
        assert_eq!(allow("10.5.1.2", "10.5.4.255"), Ok(()));
        assert_eq!(allow("fd00:1::2", "fd00:2::ffff:ffff:ffff:ffff"), Ok(()));
    }

    #[test]
    fn what_was_not_meant_for_a_peer_is_told_from_what_found_none() {
        for (dst, reason) in [
            ("255.255.255.255", Some(Drop::Broadcast)),
            ("10.5.1.255", Some(Drop::Broadcast)),
            ("224.0.0.251", Some(Drop::Multicast)),
            ("239.1.2.3", Some(Drop::Multicast)),
            ("0.0.0.0", Some(Drop::Martian)),
            ("127.0.0.1", Some(Drop::Martian)),
            ("240.0.0.1", Some(Drop::Martian)),
            ("10.5.99.1", None),
        ] {
            assert_eq!(stray("10.5.1.2", dst), reason, "{dst}");
        }
        for (dst, reason) in [
            ("ff02::2", Some(Drop::Multicast)),
            ("::1", Some(Drop::Martian)),
            ("fe80::1", Some(Drop::Martian)),
            ("fd00:99::1", None),
        ] {
            assert_eq!(stray("fd00:1::2", dst), reason, "{dst}");
        }
        assert_eq!(stray("127.0.0.1", "10.5.99.1"), Some(Drop::Martian));
    }

    #[test]
    fn a_network_of_class_e_has_hosts() {
        let packet = packet("240.5.1.2", "240.5.2.9");
        let view = IpPacket::parse(&packet).unwrap();
        assert_eq!(departure("240.5.1.0/24").allow(&view, &routes()), Ok(()));
        assert_eq!(departure("240.5.1.0/24").stray(&view), None);
        assert_eq!(departure("10.5.1.0/24").allow(&view, &routes()), Err(Drop::Martian));
        assert_eq!(departure("10.5.1.0/24").stray(&view), Some(Drop::Martian));
    }
}
