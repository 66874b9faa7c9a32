//! IPv6 and its extension headers (RFC 8200).

use std::net::Ipv6Addr;

use super::{Hop, Malformed, array, be16, be32, checksum, put16, put32};

/// Length in bytes of the fixed header, which is the shortest packet.
pub const HEADER_LEN: usize = 40;

// Offsets of the fields, RFC 8200 section 3.
pub(crate) const PAYLOAD_LEN: usize = 4;
pub(crate) const NEXT_HEADER: usize = 6;
pub(crate) const HOP_LIMIT: usize = 7;
pub(crate) const SRC: usize = 8;
pub(crate) const DST: usize = 24;

// Extension headers that are walked over, RFC 8200 section 4 and RFC 4302. ESP (50) hides what follows, and
// mobility (135), HIP (139) and shim6 (140) are followed by nothing a router cares for: to us they are protocols.
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION_OPTIONS: u8 = 60;

/// The extension headers that are walked over.
pub(crate) const EXTENSION_HEADERS: [u8; 5] = [HOP_BY_HOP, ROUTING, FRAGMENT, AUTHENTICATION, DESTINATION_OPTIONS];

/// RFC 8200 section 4.1 knows six extension headers in one packet (destination options twice); two more are patience.
const MAX_EXTENSION_HEADERS: usize = 8;

/// A view over an IPv6 packet.
#[derive(Clone, Copy, Debug)]
pub struct Ipv6Packet<T> {
    buffer: T,
}

/// What a packet carries behind its extension headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UpperLayer {
    /// The protocol, one of [`protocol`](super::protocol); 59 is "no next header".
    pub protocol: u8,
    /// Where its header starts, in bytes from the start of the packet; in a later fragment, where its data goes on.
    pub offset: usize,
    /// Set if the packet has a fragment header.
    pub fragment: Option<Fragment>,
}

impl UpperLayer {
    /// Whether this is a fragment other than the first: one without the header of the upper layer.
    pub fn is_later_fragment(&self) -> bool {
        self.fragment.is_some_and(|fragment| fragment.offset != 0)
    }
}

/// The fragment header, RFC 8200 section 4.5.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment {
    /// Where the data belongs in the whole datagram, in bytes.
    pub offset: usize,
    /// The M bit: more fragments follow.
    pub more: bool,
    /// The identification, which the fragments of one datagram share.
    pub ident: u32,
}

impl<T: AsRef<[u8]>> Ipv6Packet<T> {
    /// A view over a whole packet. The buffer may be longer than the packet, never shorter.
    ///
    /// A jumbogram (RFC 2675) states a payload length of zero and is taken at its word.
    #[inline]
    pub fn new_checked(buffer: T) -> Result<Self, Malformed> {
        let packet = Self::header_checked(buffer)?;
        if packet.buffer.as_ref().len() < packet.total_len() {
            return Err(Malformed::Truncated);
        }
        Ok(packet)
    }

    /// A view over a packet of which only the fixed header has to be there: the quote in an ICMPv6 error, or a header
    /// built apart from its payload.
    #[inline]
    pub fn header_checked(buffer: T) -> Result<Self, Malformed> {
        let bytes = buffer.as_ref();
        if bytes.len() < HEADER_LEN {
            return Err(Malformed::Truncated);
        }
        if bytes[0] >> 4 != 6 {
            return Err(Malformed::Version);
        }
        Ok(Self { buffer })
    }

    /// Gives the buffer back.
    pub fn into_inner(self) -> T {
        self.buffer
    }

    /// The version field: always 6.
    #[inline]
    pub fn version(&self) -> u8 {
        self.buffer.as_ref()[0] >> 4
    }

    /// The traffic class byte: DSCP and ECN together.
    #[inline]
    pub fn traffic_class(&self) -> u8 {
        (be16(self.buffer.as_ref(), 0) >> 4) as u8
    }

    /// The flow label, 20 bits.
    #[inline]
    pub fn flow_label(&self) -> u32 {
        be32(self.buffer.as_ref(), 0) & 0xf_ffff
    }

    /// Length in bytes of what follows the fixed header, extension headers included.
    #[inline]
    pub fn payload_len(&self) -> u16 {
        be16(self.buffer.as_ref(), PAYLOAD_LEN)
    }

    /// Length of the packet in bytes, header included.
    #[inline]
    pub fn total_len(&self) -> usize {
        HEADER_LEN + usize::from(self.payload_len())
    }

    /// What follows the fixed header: an extension header or a protocol.
    #[inline]
    pub fn next_header(&self) -> u8 {
        self.buffer.as_ref()[NEXT_HEADER]
    }

    /// The hop limit.
    #[inline]
    pub fn hop_limit(&self) -> u8 {
        self.buffer.as_ref()[HOP_LIMIT]
    }

    /// The source address.
    #[inline]
    pub fn src(&self) -> Ipv6Addr {
        array::<16>(self.buffer.as_ref(), SRC).into()
    }

    /// The destination address.
    #[inline]
    pub fn dst(&self) -> Ipv6Addr {
        array::<16>(self.buffer.as_ref(), DST).into()
    }

    /// What follows the fixed header, without padding; after [`header_checked`](Self::header_checked), what there is of
    /// it.
    #[inline]
    pub fn payload(&self) -> &[u8] {
        let bytes = self.buffer.as_ref();
        &bytes[HEADER_LEN..self.total_len().min(bytes.len())]
    }

    /// Walks over the extension headers to what the packet carries.
    ///
    /// The walk ends at a protocol, or behind the fragment header of a later fragment.
    ///
    /// # Errors
    /// [`Malformed::Truncated`] if the packet ends within the chain, [`Malformed::HeaderLength`] if the chain is longer
    /// than eight headers.
    pub fn upper_layer(&self) -> Result<UpperLayer, Malformed> {
        let bytes = self.buffer.as_ref();
        let bytes = &bytes[..self.total_len().min(bytes.len())];
        let mut upper = UpperLayer {
            protocol: self.next_header(),
            offset: HEADER_LEN,
            fragment: None,
        };
        for _ in 0..MAX_EXTENSION_HEADERS {
            if !EXTENSION_HEADERS.contains(&upper.protocol) {
                return Ok(upper);
            }
            let header = bytes.get(upper.offset..upper.offset + 8).ok_or(Malformed::Truncated)?;
            let len = match upper.protocol {
                FRAGMENT => 8,
                AUTHENTICATION => (usize::from(header[1]) + 2) * 4,
                _ => (usize::from(header[1]) + 1) * 8,
            };
            if upper.offset + len > bytes.len() {
                return Err(Malformed::Truncated);
            }
            if upper.protocol == FRAGMENT {
                let offset = usize::from(be16(header, 2) & 0xfff8);
                upper.fragment = Some(Fragment {
                    offset,
                    more: header[3] & 1 != 0,
                    ident: be32(header, 4),
                });
            }
            upper.protocol = header[0];
            upper.offset += len;
            if upper.is_later_fragment() {
                return Ok(upper);
            }
        }
        Err(Malformed::HeaderLength)
    }

    /// Partial sum of the pseudo header for a checksum of `len` bytes of `protocol`, both behind the extension headers.
    #[inline]
    pub fn pseudo_header(&self, protocol: u8, len: u32) -> u32 {
        checksum::pseudo_header_v6(self.src(), self.dst(), protocol, len)
    }
}

/// Setters.
impl<T: AsRef<[u8]> + AsMut<[u8]>> Ipv6Packet<T> {
    /// Sets the traffic class byte.
    #[inline]
    pub fn set_traffic_class(&mut self, class: u8) {
        let rest = be32(self.buffer.as_ref(), 0) & 0xf00f_ffff;
        put32(self.buffer.as_mut(), 0, rest | u32::from(class) << 20);
    }

    /// Sets the flow label, of which the low 20 bits are taken.
    #[inline]
    pub fn set_flow_label(&mut self, label: u32) {
        let rest = be32(self.buffer.as_ref(), 0) & 0xfff0_0000;
        put32(self.buffer.as_mut(), 0, rest | label & 0xf_ffff);
    }

    /// Sets the length in bytes of what follows the fixed header.
    #[inline]
    pub fn set_payload_len(&mut self, len: u16) {
        put16(self.buffer.as_mut(), PAYLOAD_LEN, len);
    }

    /// Sets what follows the fixed header.
    #[inline]
    pub fn set_next_header(&mut self, next: u8) {
        self.buffer.as_mut()[NEXT_HEADER] = next;
    }

    /// Sets the hop limit.
    #[inline]
    pub fn set_hop_limit(&mut self, limit: u8) {
        self.buffer.as_mut()[HOP_LIMIT] = limit;
    }

    /// Sets the source address.
    #[inline]
    pub fn set_src(&mut self, src: Ipv6Addr) {
        self.buffer.as_mut()[SRC..SRC + 16].copy_from_slice(&src.octets());
    }

    /// Sets the destination address.
    #[inline]
    pub fn set_dst(&mut self, dst: Ipv6Addr) {
        self.buffer.as_mut()[DST..DST + 16].copy_from_slice(&dst.octets());
    }

    /// What follows the fixed header, to be written.
    #[inline]
    pub fn payload_mut(&mut self) -> &mut [u8] {
        let total_len = self.total_len();
        let bytes = self.buffer.as_mut();
        let end = total_len.min(bytes.len());
        &mut bytes[HEADER_LEN..end]
    }

    /// Takes one hop from the packet, as RFC 8200 section 3 asks of a node that forwards. No checksum covers it.
    #[inline]
    pub fn decrement_hop_limit(&mut self) -> Hop {
        let limit = self.hop_limit();
        if limit <= 1 {
            return Hop::Expired;
        }
        self.set_hop_limit(limit - 1);
        Hop::Forward
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::packet::{build, protocol};

    const SRC_ADDR: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x12, 0x13, 0, 0, 0, 0, 2);
    const DST_ADDR: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x12, 0x14, 0, 0, 0, 0, 2);

    /// A packet whose first next header is `first`, followed by `rest`.
    fn chain(first: u8, rest: &[u8]) -> Vec<u8> {
        build::Ipv6::new(SRC_ADDR, DST_ADDR).raw(first, rest)
    }

    fn upper_layer(bytes: &[u8]) -> Result<UpperLayer, Malformed> {
        Ipv6Packet::new_checked(bytes).unwrap().upper_layer()
    }

    #[test]
    fn setters_write_what_getters_read() {
        let mut bytes = chain(17, b"payload!");
        let mut packet = Ipv6Packet::new_checked(bytes.as_mut_slice()).unwrap();
        packet.set_traffic_class(0xb9);
        packet.set_flow_label(0xfabcde);
        packet.set_payload_len(7);
        packet.set_next_header(6);
        packet.set_hop_limit(3);
        packet.set_src(DST_ADDR);
        packet.set_dst(SRC_ADDR);
        packet.payload_mut()[0] = b'P';

        let packet = Ipv6Packet::new_checked(bytes.as_slice()).unwrap();
        assert_eq!(
            (packet.version(), packet.traffic_class(), packet.flow_label()),
            (6, 0xb9, 0xabcde)
        );
        assert_eq!((packet.payload_len(), packet.total_len()), (7, 47));
        assert_eq!((packet.next_header(), packet.hop_limit()), (6, 3));
        assert_eq!((packet.src(), packet.dst()), (DST_ADDR, SRC_ADDR));
        assert_eq!(packet.payload(), b"Payload");
    }

    #[test]
    fn each_defect_has_its_reason() {
        let bytes = chain(17, b"12345678");
        let mut ipv4 = bytes.clone();
        ipv4[0] = 0x45;
        assert_eq!(Ipv6Packet::new_checked(&bytes[..39]).unwrap_err(), Malformed::Truncated);
        assert_eq!(Ipv6Packet::new_checked(&bytes[..47]).unwrap_err(), Malformed::Truncated);
        assert_eq!(Ipv6Packet::new_checked(&ipv4).unwrap_err(), Malformed::Version);
        assert_eq!(Ipv6Packet::header_checked(&bytes[..44]).unwrap().payload(), b"1234");
    }

    #[test]
    fn padding_is_no_payload() {
        let mut bytes = chain(17, b"four");
        bytes.extend([0xee; 6]);
        assert_eq!(Ipv6Packet::new_checked(bytes.as_slice()).unwrap().payload(), b"four");
    }

    #[test]
    fn packet_without_extensions_carries_its_next_header() {
        let upper = upper_layer(&chain(protocol::UDP, b"12345678")).unwrap();
        assert_eq!(
            upper,
            UpperLayer {
                protocol: protocol::UDP,
                offset: 40,
                fragment: None
            }
        );
    }

    #[test]
    fn chain_is_walked_to_its_end() {
        let mut rest = vec![DESTINATION_OPTIONS, 0, 1, 4, 0, 0, 0, 0];
        rest.extend([AUTHENTICATION, 1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        rest.extend([FRAGMENT, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        rest.extend([protocol::TCP, 0, 0, 1, 0, 0, 0, 7]);
        rest.extend([0; 20]);
        let upper = upper_layer(&chain(HOP_BY_HOP, &rest)).unwrap();
        assert_eq!(upper.protocol, protocol::TCP);
        assert_eq!(upper.offset, 40 + 8 + 16 + 16 + 8);
        assert_eq!(
            upper.fragment,
            Some(Fragment {
                offset: 0,
                more: true,
                ident: 7
            })
        );
        assert!(!upper.is_later_fragment());
    }

    #[test]
    fn later_fragment_ends_the_walk() {
        // 0x05a9: offset 1448, more to come. The data looks like a header and must not be taken for one.
        let bytes = chain(
            FRAGMENT,
            &[
                DESTINATION_OPTIONS,
                0,
                0x05,
                0xa9,
                1,
                2,
                3,
                4,
                0xff,
                0xff,
                0,
                0,
                0,
                0,
                0,
                0,
            ],
        );
        let upper = upper_layer(&bytes).unwrap();
        assert_eq!((upper.protocol, upper.offset), (DESTINATION_OPTIONS, 48));
        assert_eq!(
            upper.fragment,
            Some(Fragment {
                offset: 1448,
                more: true,
                ident: 0x0102_0304
            })
        );
        assert!(upper.is_later_fragment());
    }

    #[test]
    fn esp_is_a_protocol() {
        assert_eq!(upper_layer(&chain(50, &[0; 16])).unwrap().protocol, 50);
    }

    #[test]
    fn chain_that_leaves_the_packet_is_truncated() {
        assert_eq!(upper_layer(&chain(HOP_BY_HOP, b"")), Err(Malformed::Truncated));
        assert_eq!(upper_layer(&chain(HOP_BY_HOP, &[17, 0, 0])), Err(Malformed::Truncated));
        assert_eq!(
            upper_layer(&chain(ROUTING, &[17, 255, 0, 0, 0, 0, 0, 0])),
            Err(Malformed::Truncated)
        );
    }

    #[test]
    fn endless_chain_is_given_up() {
        let rest: Vec<u8> = (0..100)
            .flat_map(|_| [DESTINATION_OPTIONS, 0, 0, 0, 0, 0, 0, 0])
            .collect();
        assert_eq!(
            upper_layer(&chain(DESTINATION_OPTIONS, &rest)),
            Err(Malformed::HeaderLength)
        );
    }

    #[test]
    fn hop_limit_runs_out_at_one() {
        let mut bytes = build::Ipv6::new(SRC_ADDR, DST_ADDR).hop_limit(2).udp(1, 2, b"x");
        let mut packet = Ipv6Packet::new_checked(bytes.as_mut_slice()).unwrap();
        assert_eq!(packet.decrement_hop_limit(), Hop::Forward);
        assert_eq!(packet.hop_limit(), 1);
        assert_eq!(packet.decrement_hop_limit(), Hop::Expired);
        assert_eq!(packet.hop_limit(), 1);
    }

    proptest! {
        #[test]
        fn walk_over_arbitrary_bytes_stays_within_the_packet(
            first in proptest::sample::select(vec![HOP_BY_HOP, ROUTING, FRAGMENT, AUTHENTICATION, DESTINATION_OPTIONS]),
            rest in proptest::collection::vec(0u8..64, 0..200),
        ) {
            let bytes = chain(first, &rest);
            if let Ok(upper) = upper_layer(&bytes) {
                prop_assert!((48..=bytes.len()).contains(&upper.offset));
            }
        }
    }
}
