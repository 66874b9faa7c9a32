//! Whose packets get in: only members', about their own business. Pure.

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::{
    packet::IpPacket,
    route_table::{PeerId, RouteTable},
};

use super::counters::Drop;

/// How closely a datagram is looked at before its packet is let in (`Backend.SourceCheck`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SourceCheck {
    /// It comes from a peer's address, the packet's source lies in that peer's subnets and its destination in this host's.
    #[default]
    Strict,
    /// It comes from a peer's address: for peers that masquerade, or forward for others.
    Peer,
    /// Not at all, as the original does.
    Off,
}

/// What this host lets in.
#[derive(Debug, Clone, Copy, Default)]
pub struct Admission {
    check: SourceCheck,
    v4: Option<Ipv4Net>,
    v6: Option<Ipv6Net>,
}

impl Admission {
    /// For a host with these subnets, at most one of each family.
    pub fn new(check: SourceCheck, own: impl IntoIterator<Item = IpNet>) -> Self {
        let mut admission = Self {
            check,
            ..Self::default()
        };
        for net in own {
            match net {
                IpNet::V4(net) => admission.v4 = Some(net),
                IpNet::V6(net) => admission.v6 = Some(net),
            }
        }
        admission
    }

    /// This host's subnets.
    pub fn own(&self) -> impl Iterator<Item = IpNet> {
        let v4 = self.v4.map(IpNet::V4);
        v4.into_iter().chain(self.v6.map(IpNet::V6))
    }

    /// Under whose number a packet that came in a datagram from `from` is counted.
    ///
    /// # Errors
    /// Why it is not let in: [`Drop::UnknownPeer`] or [`Drop::Spoofed`].
    #[inline]
    pub fn admit(&self, packet: &IpPacket<'_>, from: IpAddr, routes: &RouteTable) -> Result<PeerId, Drop> {
        // Whoever sends from its own subnet, as all do who have nothing to hide, is found by one look-up.
        match routes.lookup(packet.src()) {
            Some(peer) if peer.addr.ip() == from => {
                if self.check == SourceCheck::Strict && !self.is_ours(packet) {
                    return Err(Drop::Spoofed);
                }
                Ok(peer.id)
            }
            _ => match (self.check, routes.host(from)) {
                (SourceCheck::Strict, Some(_)) => Err(Drop::Spoofed),
                (SourceCheck::Strict | SourceCheck::Peer, None) => Err(Drop::UnknownPeer),
                (SourceCheck::Peer | SourceCheck::Off, Some(id)) => Ok(id),
                (SourceCheck::Off, None) => Ok(PeerId::default()),
            },
        }
    }

    #[inline]
    fn is_ours(&self, packet: &IpPacket<'_>) -> bool {
        match packet {
            IpPacket::V4(packet) => self.v4.is_some_and(|net| net.contains(&packet.dst())),
            IpPacket::V6(packet) => self.v6.is_some_and(|net| net.contains(&packet.dst())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{packet::build, route_table::Peer};

    const OWN: &str = "10.5.1.0/24";

    fn routes() -> RouteTable {
        let peer = |number: u8| Peer {
            addr: ([192, 0, 2, number], 8285).into(),
            id: PeerId::new(number.into()).unwrap(),
        };
        RouteTable::new([
            ("10.5.2.0/24".parse().unwrap(), peer(2)),
            ("fd00:2::/64".parse().unwrap(), peer(2)),
            ("10.5.3.0/24".parse().unwrap(), peer(3)),
        ])
    }

    fn admit(check: SourceCheck, from: u8, src: &str, dst: &str) -> Result<usize, Drop> {
        let packet = match (src.parse().unwrap(), dst.parse().unwrap()) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => build::Ipv4::new(src, dst).udp(1, 2, b"hello"),
            (IpAddr::V6(src), IpAddr::V6(dst)) => build::Ipv6::new(src, dst).udp(1, 2, b"hello"),
            _ => panic!("two families"),
        };
        Admission::new(check, [OWN, "fd00:1::/64"].map(|net| net.parse().unwrap()))
            .admit(&IpPacket::parse(&packet).unwrap(), [192, 0, 2, from].into(), &routes())
            .map(PeerId::index)
    }

    #[test]
    fn a_peers_packets_from_its_subnet_to_ours_get_in_and_count_for_it() {
        for check in [SourceCheck::Strict, SourceCheck::Peer, SourceCheck::Off] {
            assert_eq!(admit(check, 2, "10.5.2.9", "10.5.1.2"), Ok(2));
            assert_eq!(admit(check, 2, "fd00:2::9", "fd00:1::2"), Ok(2));
            // The device's own address.
            assert_eq!(admit(check, 3, "10.5.3.0", "10.5.1.0"), Ok(3));
        }
    }

    #[test]
    fn a_stranger_gets_in_only_where_nobody_looks() {
        let stranger = |check| admit(check, 9, "10.5.2.9", "10.5.1.2");
        assert_eq!(stranger(SourceCheck::Strict), Err(Drop::UnknownPeer));
        assert_eq!(stranger(SourceCheck::Peer), Err(Drop::UnknownPeer));
        assert_eq!(stranger(SourceCheck::Off), Ok(0));
    }

    #[test]
    fn a_peer_speaks_for_others_only_where_it_may() {
        for src in ["10.5.3.9", "10.5.1.9", "192.0.2.2", "8.8.8.8"] {
            let of_two = |check| admit(check, 2, src, "10.5.1.2");
            assert_eq!(of_two(SourceCheck::Strict), Err(Drop::Spoofed), "{src}");
            assert_eq!(of_two(SourceCheck::Peer), Ok(2), "{src}");
            assert_eq!(of_two(SourceCheck::Off), Ok(2), "{src}");
        }
    }

    #[test]
    fn nothing_is_let_through_to_elsewhere_under_the_strict_check() {
        for dst in ["10.5.2.1", "192.0.2.1", "127.0.0.1", "224.0.0.1", "255.255.255.255"] {
            assert_eq!(
                admit(SourceCheck::Strict, 2, "10.5.2.9", dst),
                Err(Drop::Spoofed),
                "{dst}"
            );
            assert_eq!(admit(SourceCheck::Peer, 2, "10.5.2.9", dst), Ok(2), "{dst}");
        }
        assert_eq!(
            admit(SourceCheck::Strict, 2, "fd00:2::9", "fd00:2::1"),
            Err(Drop::Spoofed)
        );
    }
}
