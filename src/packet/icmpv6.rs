//! ICMP for IPv6, and the errors that a router sends (RFC 4443).

use std::net::Ipv6Addr;

use super::{IcmpError, Ipv6Packet, Malformed, be16, be32, checksum, ipv6, protocol, put16, put32};

/// Length in bytes of the header that all messages share.
pub const HEADER_LEN: usize = 8;

/// Bytes of the longest error message, IP header included: RFC 4443 section 2.4 (c) says to quote as much as fits the
/// minimum MTU of IPv6.
pub const MAX_ERROR_LEN: usize = 1280;

// Types of messages, RFC 4443 section 2.1; below 128 are errors.
/// Error: the packet cannot be delivered.
pub const DESTINATION_UNREACHABLE: u8 = 1;
/// Error: the hop limit ran out.
pub const TIME_EXCEEDED: u8 = 3;
/// A ping.
pub const ECHO_REQUEST: u8 = 128;
/// The answer to an echo request.
pub const ECHO_REPLY: u8 = 129;
/// Use another router (RFC 4861 section 4.5). Not an error, but never answered with one either.
pub const REDIRECT: u8 = 137;

/// The first type that is not an error, RFC 4443 section 2.1.
const FIRST_INFORMATIONAL: u8 = 128;

/// The hop limit of an error message.
const HOP_LIMIT: u8 = 64;

/// The least worth quoting: the header and the 8 bytes where the ports are.
const MIN_QUOTE: usize = ipv6::HEADER_LEN + 8;

/// A view over an ICMPv6 message: the payload of an IPv6 packet.
#[derive(Clone, Copy, Debug)]
pub struct Icmpv6Packet<T> {
    buffer: T,
}

impl<T: AsRef<[u8]>> Icmpv6Packet<T> {
    /// A view over a message, whose header is within the buffer.
    #[inline]
    pub fn new_checked(buffer: T) -> Result<Self, Malformed> {
        if buffer.as_ref().len() < HEADER_LEN {
            return Err(Malformed::Truncated);
        }
        Ok(Self { buffer })
    }

    /// The type.
    #[inline]
    pub fn kind(&self) -> u8 {
        self.buffer.as_ref()[0]
    }

    /// The code, whose meaning depends on the type.
    #[inline]
    pub fn code(&self) -> u8 {
        self.buffer.as_ref()[1]
    }

    /// The checksum as it stands in the message.
    #[inline]
    pub fn checksum(&self) -> u16 {
        be16(self.buffer.as_ref(), 2)
    }

    /// The second word of the header: identifier and sequence number of an echo, unused in our errors.
    #[inline]
    pub fn rest(&self) -> u32 {
        be32(self.buffer.as_ref(), 4)
    }

    /// The data: the payload of an echo, the quoted packet of an error.
    #[inline]
    pub fn payload(&self) -> &[u8] {
        &self.buffer.as_ref()[HEADER_LEN..]
    }

    /// Whether the checksum agrees with the message; `pseudo_header` is the IP view's.
    #[inline]
    pub fn verify_checksum(&self, pseudo_header: u32) -> bool {
        checksum::fold(checksum::combine(pseudo_header, checksum::sum(self.buffer.as_ref()))) == 0xffff
    }
}

impl<T: AsRef<[u8]> + AsMut<[u8]>> Icmpv6Packet<T> {
    /// Computes the checksum over the whole buffer and writes it; `pseudo_header` is the IP view's.
    #[inline]
    pub fn fill_checksum(&mut self, pseudo_header: u32) {
        put16(self.buffer.as_mut(), 2, 0);
        let sum = checksum::combine(pseudo_header, checksum::sum(self.buffer.as_ref()));
        put16(self.buffer.as_mut(), 2, !checksum::fold(sum));
    }
}

/// Whether a message of this type must never be answered with an error: RFC 4443 section 2.4 (e.1) and (e.2).
#[inline]
pub fn is_error(kind: u8) -> bool {
    kind < FIRST_INFORMATIONAL || kind == REDIRECT
}

/// Writes the ICMPv6 error `error` about `original` into `out` and returns its length: a whole IPv6 packet from `source`
/// to the sender of `original`, with a hop limit of 64 and its checksum.
///
/// `original` is the packet as it came in, with the hop limit that it came in with. As much of it is quoted as fits
/// `out` and [`MAX_ERROR_LEN`].
///
/// `None` if `original` must not be answered (RFC 4443 section 2.4 (e)) because it
/// - is not a whole IPv6 packet, or its extension headers cannot be followed,
/// - carries an ICMPv6 error or a redirect, or too little of a message to tell,
/// - is a fragment other than the first: the first one has been answered,
/// - comes from or goes to an address that is not one node's: multicast, loopback, unspecified;
///
/// or if `out` does not hold the headers and the least quote, the original's header and 8 bytes.
pub fn error_reply(original: &[u8], error: IcmpError, source: Ipv6Addr, out: &mut [u8]) -> Option<usize> {
    let packet = Ipv6Packet::new_checked(original).ok()?;
    if !may_be_answered(&packet) {
        return None;
    }
    let original = &original[..packet.total_len()];
    let room = out
        .len()
        .min(MAX_ERROR_LEN)
        .checked_sub(ipv6::HEADER_LEN + HEADER_LEN)?;
    let quote = &original[..original.len().min(room)];
    if quote.len() < original.len().min(MIN_QUOTE) {
        return None;
    }

    let message_len = HEADER_LEN + quote.len();
    let (header, message) = out[..ipv6::HEADER_LEN + message_len].split_at_mut(ipv6::HEADER_LEN);
    header.fill(0);
    put32(header, 0, 0x6000_0000);
    let mut reply = Ipv6Packet::header_checked(header).ok()?;
    reply.set_payload_len(message_len as u16);
    reply.set_next_header(protocol::ICMPV6);
    reply.set_hop_limit(HOP_LIMIT);
    reply.set_src(source);
    reply.set_dst(packet.src());

    let (kind, code) = match error {
        IcmpError::NetUnreachable => (DESTINATION_UNREACHABLE, 0),
        IcmpError::TimeExceeded => (TIME_EXCEEDED, 0),
    };
    message[..HEADER_LEN].copy_from_slice(&[kind, code, 0, 0, 0, 0, 0, 0]);
    message[HEADER_LEN..].copy_from_slice(quote);
    let pseudo_header = reply.pseudo_header(protocol::ICMPV6, message_len as u32);
    Icmpv6Packet::new_checked(message).ok()?.fill_checksum(pseudo_header);
    Some(ipv6::HEADER_LEN + message_len)
}

fn may_be_answered(packet: &Ipv6Packet<&[u8]>) -> bool {
    let Ok(upper) = packet.upper_layer() else { return false };
    let carries_error = upper.protocol == protocol::ICMPV6
        && packet
            .payload()
            .get(upper.offset - ipv6::HEADER_LEN)
            .is_none_or(|kind| is_error(*kind));
    !upper.is_later_fragment() && is_one_node(packet.src()) && is_one_node(packet.dst()) && !carries_error
}

/// Whether the address can be that of a single node elsewhere.
fn is_one_node(address: Ipv6Addr) -> bool {
    !(address.is_multicast() || address.is_loopback() || address.is_unspecified())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::packet::build;

    const SRC: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x12, 0x13, 0, 0, 0, 0, 2);
    const DST: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x12, 0x99, 0, 0, 0, 0, 9);
    const ROUTER: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x12, 0x13, 0, 0, 0, 0, 1);

    fn reply(original: &[u8]) -> Option<Vec<u8>> {
        let mut out = [0xaa; 2048];
        let len = error_reply(original, IcmpError::NetUnreachable, ROUTER, &mut out)?;
        Some(out[..len].to_vec())
    }

    fn verify(packet: &Ipv6Packet<&[u8]>) -> bool {
        let pseudo_header = packet.pseudo_header(protocol::ICMPV6, u32::from(packet.payload_len()));
        Icmpv6Packet::new_checked(packet.payload())
            .unwrap()
            .verify_checksum(pseudo_header)
    }

    #[test]
    fn reply_is_what_rfc_4443_shows() {
        let original = build::Ipv6::new(SRC, DST).hop_limit(1).udp(33_434, 33_434, b"probe");
        for (error, kind) in [(IcmpError::NetUnreachable, 1), (IcmpError::TimeExceeded, 3)] {
            let mut out = [0xaa; MAX_ERROR_LEN];
            let len = error_reply(&original, error, ROUTER, &mut out).unwrap();

            assert_eq!(len, 48 + original.len());
            let packet = Ipv6Packet::new_checked(&out[..len]).unwrap();
            assert_eq!(packet.total_len(), len);
            assert_eq!((packet.src(), packet.dst()), (ROUTER, SRC));
            assert_eq!((packet.hop_limit(), packet.next_header()), (64, protocol::ICMPV6));
            let message = Icmpv6Packet::new_checked(packet.payload()).unwrap();
            assert_eq!((message.kind(), message.code(), message.rest()), (kind, 0, 0));
            assert!(verify(&packet));
            assert_eq!(message.payload(), original, "the quote has the hop limit that came in");
        }
    }

    #[test]
    fn quote_is_cut_at_the_minimum_mtu() {
        let reply = reply(&build::Ipv6::new(SRC, DST).udp(1, 2, &[7; 1400])).unwrap();
        assert_eq!(reply.len(), MAX_ERROR_LEN);
        assert!(verify(&Ipv6Packet::new_checked(reply.as_slice()).unwrap()));
    }

    #[test]
    fn short_buffer_gets_a_short_quote_or_none() {
        let original = build::Ipv6::new(SRC, DST).udp(1, 2, b"payload");
        let mut out = [0; 96];
        assert_eq!(
            error_reply(&original, IcmpError::TimeExceeded, ROUTER, &mut out),
            Some(96)
        );
        assert_eq!(
            error_reply(&original, IcmpError::TimeExceeded, ROUTER, &mut out[..95]),
            None
        );
        assert_eq!(error_reply(&original, IcmpError::TimeExceeded, ROUTER, &mut []), None);
    }

    #[test]
    fn errors_and_redirects_go_unanswered() {
        for kind in 0..=255 {
            let answered = reply(&build::Ipv6::new(SRC, DST).icmp(kind, 0, 0, b"whatever it quotes")).is_some();
            assert_eq!(answered, kind >= 128 && kind != REDIRECT, "type {kind}");
        }
        assert!(
            reply(&build::Ipv6::new(SRC, DST).raw(protocol::ICMPV6, b"")).is_none(),
            "no type to tell by"
        );
    }

    #[test]
    fn error_behind_extension_headers_goes_unanswered() {
        let hop_by_hop = |kind| {
            [
                &[protocol::ICMPV6, 0, 1, 4, 0, 0, 0, 0][..],
                &[kind, 0, 0, 0, 0, 0, 0, 0],
            ]
            .concat()
        };
        assert!(reply(&build::Ipv6::new(SRC, DST).raw(0, &hop_by_hop(TIME_EXCEEDED))).is_none());
        assert!(reply(&build::Ipv6::new(SRC, DST).raw(0, &hop_by_hop(ECHO_REQUEST))).is_some());
        assert!(
            reply(&build::Ipv6::new(SRC, DST).raw(0, b"short")).is_none(),
            "a chain that cannot be followed"
        );
    }

    #[test]
    fn only_the_first_fragment_is_answered() {
        let fragment = |offset: u8| {
            let header = [&[protocol::UDP, 0, 0, offset | 1, 0, 0, 0, 7][..], b"12345678"].concat();
            reply(&build::Ipv6::new(SRC, DST).raw(44, &header)).is_some()
        };
        assert!(fragment(0));
        assert!(!fragment(8));
    }

    #[test]
    fn addresses_that_are_no_node_go_unanswered() {
        let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
        for nobody in [Ipv6Addr::UNSPECIFIED, Ipv6Addr::LOCALHOST, all_nodes] {
            assert!(
                reply(&build::Ipv6::new(nobody, DST).udp(1, 2, b"x")).is_none(),
                "from {nobody}"
            );
            assert!(
                reply(&build::Ipv6::new(SRC, nobody).udp(1, 2, b"x")).is_none(),
                "to {nobody}"
            );
        }
    }

    #[test]
    fn damaged_packets_go_unanswered() {
        let original = build::Ipv6::new(SRC, DST).udp(1, 2, b"x");
        assert!(reply(&original[..original.len() - 1]).is_none(), "truncated");
        assert!(reply(&[0x45; 60]).is_none(), "IPv4");
    }

    proptest! {
        #[test]
        fn every_reply_verifies_within_its_bounds(
            payload in proptest::collection::vec(any::<u8>(), 0..1_500),
            next_header: u8,
            src: u128,
            room in 0usize..1_400,
        ) {
            let original = build::Ipv6::new(src.into(), DST).raw(next_header, &payload);
            let mut out = vec![0xaa; room];
            if let Some(len) = error_reply(&original, IcmpError::TimeExceeded, ROUTER, &mut out) {
                prop_assert!(len <= MAX_ERROR_LEN && len <= room);
                let packet = Ipv6Packet::new_checked(&out[..len]).unwrap();
                prop_assert!(verify(&packet));
                prop_assert!(original.starts_with(&packet.payload()[HEADER_LEN..]));
                prop_assert!(out[len..].iter().all(|byte| *byte == 0xaa), "nothing is written behind the reply");
            }
        }
    }
}
