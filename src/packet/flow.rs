//! Which flow a packet belongs to, as a number: what keeps a flow's packets together where flows are spread.

use std::net::Ipv6Addr;

use super::{IpPacket, array, ipv6, protocol};

/// SCTP, RFC 9260: its ports lie where those of TCP and UDP do.
const SCTP: u8 = 132;

const NO_PORTS: [u16; 2] = [0; 2];

/// 2^64 divided by the golden ratio: an odd number without a pattern (Knuth, The Art of Computer Programming, 6.4).
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;

/// A hash of addresses, protocol and, where there are any, ports: the same for both directions. The fragments of a packet share
/// one, which ignores the ports: only the first has them.
///
/// The higher bits are the better ones; [`lane`] uses them.
#[inline]
pub fn hash(packet: &IpPacket<'_>) -> u32 {
    match packet {
        IpPacket::V4(packet) => {
            let ports = if packet.is_fragment() {
                NO_PORTS
            } else {
                ports(packet.protocol(), packet.payload())
            };
            let words = [packet.src(), packet.dst()].map(|address| u32::from(address).into());
            mix(words, packet.protocol(), ports)
        }
        IpPacket::V6(packet) => {
            let words = [packet.src(), packet.dst()].map(word_v6);
            match packet.upper_layer() {
                Ok(upper) if upper.fragment.is_none() => {
                    let payload = &packet.payload()[upper.offset - ipv6::HEADER_LEN..];
                    mix(words, upper.protocol, ports(upper.protocol, payload))
                }
                Ok(upper) => mix(words, upper.protocol, NO_PORTS),
                Err(_) => mix(words, packet.next_header(), NO_PORTS),
            }
        }
    }
}

/// One of `lanes` for a flow with this hash, each for as many flows.
#[inline]
pub fn lane(hash: u32, lanes: u8) -> u8 {
    // Below `lanes`.
    ((u64::from(hash) * u64::from(lanes)) >> 32) as u8
}

/// Source and destination port.
#[inline]
fn ports(protocol: u8, payload: &[u8]) -> [u16; 2] {
    if payload.len() >= 4 && matches!(protocol, protocol::TCP | protocol::UDP | SCTP) {
        [0, 2].map(|at| u16::from_be_bytes(array(payload, at)))
    } else {
        NO_PORTS
    }
}

#[inline]
fn word_v6(address: Ipv6Addr) -> u64 {
    let address = u128::from(address);
    (address >> 64) as u64 ^ (address as u64).wrapping_mul(SPREAD)
}

#[inline]
fn mix([src, dst]: [u64; 2], protocol: u8, [from, to]: [u16; 2]) -> u32 {
    // The two ends in the order of their numbers.
    let (low, high) = if (src, from) <= (dst, to) {
        ((src, from), (dst, to))
    } else {
        ((dst, to), (src, from))
    };
    let ports = u32::from(low.1) << 16 | u32::from(high.1);
    let mut state = (low.0.rotate_left(32) ^ high.0).wrapping_mul(SPREAD);
    state = (state ^ state >> 32 ^ u64::from(ports) << 8 ^ u64::from(protocol)).wrapping_mul(SPREAD);
    ((state ^ state >> 29).wrapping_mul(SPREAD) >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::{Ipv4Packet, build};

    fn of(bytes: &[u8]) -> u32 {
        hash(&IpPacket::parse(bytes).unwrap())
    }

    fn v4(host: u8, port: u16) -> Vec<u8> {
        build::Ipv4::new([10, 5, 1, host].into(), [10, 5, 2, 2].into()).udp(port, 53, b"question")
    }

    fn v6(host: u16, port: u16) -> Vec<u8> {
        build::Ipv6::new([0xfd00, 1, 0, 0, 0, 0, 0, host].into(), "fd00:2::2".parse().unwrap()).udp(
            port,
            53,
            b"question",
        )
    }

    #[test]
    fn a_flows_packets_share_a_hash_whatever_they_carry() {
        let ip = build::Ipv4::new([10, 5, 1, 2].into(), [10, 5, 2, 2].into());
        assert_eq!(
            of(&ip.ttl(3).ident(9).udp(1, 2, b"x")),
            of(&ip.ttl(4).udp(1, 2, &[0; 900]))
        );
    }

    #[test]
    fn both_directions_share_a_hash_and_other_ends_have_another() {
        let [here, there] = [[10, 5, 1, 2].into(), [10, 5, 2, 2].into()];
        let v4 = |src, dst, from, to| of(&build::Ipv4::new(src, dst).udp(from, to, b"x"));
        assert_eq!(v4(here, there, 700, 53), v4(there, here, 53, 700));
        assert_ne!(v4(here, there, 700, 53), v4(here, there, 53, 700));
        let [here, there] = ["fd00:1::2", "fd00:2::2"].map(|address| address.parse().unwrap());
        let v6 = |src, dst, from, to| of(&build::Ipv6::new(src, dst).udp(from, to, b"x"));
        assert_eq!(v6(here, there, 700, 53), v6(there, here, 53, 700));
        assert_ne!(v6(here, there, 700, 53), v6(here, there, 53, 700));
    }

    #[test]
    fn flows_spread_over_all_lanes_evenly() {
        let by_port = (1_000..9_000).map(|port| of(&v4(2, port)));
        let by_host = (0..=255).flat_map(|host| (0..32).map(move |port| of(&v4(host, port))));
        let v6 = (0..8_000u16).map(|port| of(&v6(port % 97, port)));
        for hashes in [by_port.collect::<Vec<_>>(), by_host.collect(), v6.collect()] {
            let mut counts = [0; 7];
            for hash in &hashes {
                counts[usize::from(lane(*hash, 7))] += 1;
            }
            let even = hashes.len() / 7;
            assert!(
                counts
                    .iter()
                    .all(|count| (even * 8 / 10..even * 12 / 10).contains(count)),
                "{counts:?}"
            );
        }
    }

    #[test]
    fn all_fragments_of_a_packet_share_a_hash() {
        let mut packet = v4(2, 77);
        let mut fragment = |offset, more| {
            let mut view = Ipv4Packet::new_checked(packet.as_mut_slice()).unwrap();
            view.set_fragment(offset, more);
            of(&packet)
        };
        let first = fragment(0, true);
        assert_eq!(first, fragment(64, true));
        assert_eq!(first, fragment(128, false));
    }

    #[test]
    fn one_lane_takes_all() {
        assert_eq!((lane(0, 1), lane(u32::MAX, 1), lane(u32::MAX, 64)), (0, 0, 63));
    }

    #[test]
    fn a_packet_that_ends_with_its_ip_header_has_a_hash_too() {
        let mut short = v4(2, 77);
        Ipv4Packet::new_checked(short.as_mut_slice()).unwrap().set_total_len(20);
        of(&short[..20]);
    }
}
