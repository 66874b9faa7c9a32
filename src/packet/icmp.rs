//! ICMP for IPv4 (RFC 792), and the errors that a router sends (RFC 1122 section 3.2.2, RFC 1812 section 4.3.2).

use std::net::Ipv4Addr;

use super::{IcmpError, Ipv4Packet, Malformed, be16, be32, checksum, ipv4, protocol, put16, put32};

/// Length in bytes of the header that all messages share.
pub const HEADER_LEN: usize = 8;

/// Bytes of the longest error message, IP header included: RFC 1812 section 4.3.2.3 says to quote as much as fits the
/// 576 bytes that each host must accept.
pub const MAX_ERROR_LEN: usize = 576;

// Types of messages, RFC 792.
/// The answer to an echo request.
pub const ECHO_REPLY: u8 = 0;
/// Error: the packet cannot be delivered.
pub const DESTINATION_UNREACHABLE: u8 = 3;
/// Error, deprecated by RFC 6633: send more slowly.
pub const SOURCE_QUENCH: u8 = 4;
/// Error: use another router.
pub const REDIRECT: u8 = 5;
/// A ping.
pub const ECHO_REQUEST: u8 = 8;
/// Error: the TTL ran out.
pub const TIME_EXCEEDED: u8 = 11;
/// Error: the header makes no sense.
pub const PARAMETER_PROBLEM: u8 = 12;

/// The TTL of an error message: the Internet's default of RFC 1700.
const TTL: u8 = 64;

/// Precedence 6, internetwork control, as RFC 1812 section 4.3.2.5 asks for errors; DSCP CS6 in today's terms.
const TOS: u8 = 0xc0;

/// The least that RFC 792 has quoted: the header and 64 bits of what follows, where the ports are.
const MIN_QUOTED_PAYLOAD: usize = 8;

/// A view over an ICMP message: the payload of an IPv4 packet.
#[derive(Clone, Copy, Debug)]
pub struct IcmpPacket<T> {
    buffer: T,
}

impl<T: AsRef<[u8]>> IcmpPacket<T> {
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

    /// Whether the checksum agrees with the message.
    #[inline]
    pub fn verify_checksum(&self) -> bool {
        checksum::checksum(self.buffer.as_ref()) == 0
    }
}

impl<T: AsRef<[u8]> + AsMut<[u8]>> IcmpPacket<T> {
    /// Computes the checksum over the whole buffer and writes it.
    #[inline]
    pub fn fill_checksum(&mut self) {
        put16(self.buffer.as_mut(), 2, 0);
        let checksum = checksum::checksum(self.buffer.as_ref());
        put16(self.buffer.as_mut(), 2, checksum);
    }
}

/// Whether a message of this type is an error, which must never be answered with another one.
///
/// Only the types that RFC 1122 section 3.2.2 lists are errors. A type that nobody knows is none: were it one, the
/// exchange still ends with our answer, which is a known error.
#[inline]
pub fn is_error(kind: u8) -> bool {
    matches!(
        kind,
        DESTINATION_UNREACHABLE | SOURCE_QUENCH | REDIRECT | TIME_EXCEEDED | PARAMETER_PROBLEM
    )
}

/// Writes the ICMP error `error` about `original` into `out` and returns its length: a whole IPv4 packet from `source`
/// to the sender of `original`, with a TTL of 64 and both checksums.
///
/// `original` is the packet as it came in, with the TTL that it came in with: that is what its sender compares the
/// quote with. As much of it is quoted as fits `out` and [`MAX_ERROR_LEN`].
///
/// `None` if `original` must not be answered (RFC 1122 section 3.2.2, RFC 1812 section 4.3.2.7) because it
/// - is not an intact IPv4 packet,
/// - carries an ICMP error, or too little of an ICMP message to tell,
/// - is a fragment other than the first,
/// - comes from or goes to an address that is not one host's: multicast, broadcast, loopback, `0.0.0.0/8`, class E (a
///   subnet's own broadcast address looks like any other from here);
///
/// or if `out` does not hold the headers and the least quote, the original's header and 8 bytes.
pub fn error_reply(original: &[u8], error: IcmpError, source: Ipv4Addr, out: &mut [u8]) -> Option<usize> {
    let packet = Ipv4Packet::new_checked(original).ok()?;
    if !may_be_answered(&packet) {
        return None;
    }
    let original = &original[..usize::from(packet.total_len())];
    let room = out
        .len()
        .min(MAX_ERROR_LEN)
        .checked_sub(ipv4::HEADER_LEN + HEADER_LEN)?;
    let quote = &original[..original.len().min(room)];
    if quote.len() < original.len().min(packet.header_len() + MIN_QUOTED_PAYLOAD) {
        return None;
    }

    let len = ipv4::HEADER_LEN + HEADER_LEN + quote.len();
    let (header, message) = out[..len].split_at_mut(ipv4::HEADER_LEN);
    let (kind, code) = match error {
        IcmpError::NetUnreachable => (DESTINATION_UNREACHABLE, 0),
        IcmpError::TimeExceeded => (TIME_EXCEEDED, 0),
    };
    message[..HEADER_LEN].copy_from_slice(&[kind, code, 0, 0, 0, 0, 0, 0]);
    message[HEADER_LEN..].copy_from_slice(quote);
    IcmpPacket::new_checked(message).ok()?.fill_checksum();

    header.fill(0);
    put32(header, 0, 0x4500_0000 | u32::from(TOS) << 16 | len as u32);
    let mut reply = Ipv4Packet::header_checked(header).ok()?;
    // At 576 bytes no link cuts it, and without fragments no identification is needed: RFC 6864 section 4.1.
    reply.set_dont_fragment(true);
    reply.set_ttl(TTL);
    reply.set_protocol(protocol::ICMP);
    reply.set_src(source);
    reply.set_dst(packet.src());
    reply.fill_checksum();
    Some(len)
}

fn may_be_answered(packet: &Ipv4Packet<&[u8]>) -> bool {
    let carries_error =
        packet.protocol() == protocol::ICMP && packet.payload().first().is_none_or(|kind| is_error(*kind));
    packet.verify_checksum()
        && !packet.is_later_fragment()
        && ipv4::is_host(packet.src())
        && ipv4::is_host(packet.dst())
        && !carries_error
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::packet::build;

    const SRC: Ipv4Addr = Ipv4Addr::new(10, 5, 34, 2);
    const DST: Ipv4Addr = Ipv4Addr::new(10, 5, 99, 9);
    const ROUTER: Ipv4Addr = Ipv4Addr::new(10, 5, 34, 1);
    const BOTH: [IcmpError; 2] = [IcmpError::NetUnreachable, IcmpError::TimeExceeded];

    fn reply(original: &[u8]) -> Option<Vec<u8>> {
        let mut out = [0xaa; 2048];
        let len = error_reply(original, IcmpError::NetUnreachable, ROUTER, &mut out)?;
        Some(out[..len].to_vec())
    }

    #[test]
    fn reply_is_what_rfc_792_shows() {
        let original = build::Ipv4::new(SRC, DST).ttl(1).udp(33_434, 33_434, b"probe");
        for (error, kind) in BOTH.into_iter().zip([3, 11]) {
            let mut out = [0xaa; MAX_ERROR_LEN];
            let len = error_reply(&original, error, ROUTER, &mut out).unwrap();

            assert_eq!(len, 28 + original.len());
            let packet = Ipv4Packet::new_checked(&out[..len]).unwrap();
            assert_eq!(usize::from(packet.total_len()), len);
            assert_eq!((packet.src(), packet.dst()), (ROUTER, SRC));
            assert_eq!(
                (packet.ttl(), packet.protocol(), packet.tos()),
                (64, protocol::ICMP, 0xc0)
            );
            assert!(packet.verify_checksum() && packet.dont_fragment() && !packet.is_fragment());
            let message = IcmpPacket::new_checked(packet.payload()).unwrap();
            assert_eq!((message.kind(), message.code(), message.rest()), (kind, 0, 0));
            assert!(message.verify_checksum());
            assert_eq!(message.payload(), original, "the quote has the TTL that came in");
        }
    }

    #[test]
    fn quote_is_cut_at_576_bytes() {
        let reply = reply(&build::Ipv4::new(SRC, DST).udp(1, 2, &[7; 1400])).unwrap();
        assert_eq!(reply.len(), MAX_ERROR_LEN);
        let packet = Ipv4Packet::new_checked(reply.as_slice()).unwrap();
        assert!(IcmpPacket::new_checked(packet.payload()).unwrap().verify_checksum());
    }

    #[test]
    fn padding_is_not_quoted() {
        let mut original = build::Ipv4::new(SRC, DST).udp(1, 2, b"");
        let len = original.len();
        original.extend([0xee; 18]);
        assert_eq!(reply(&original).unwrap().len(), 28 + len);
    }

    #[test]
    fn short_buffer_gets_a_short_quote_or_none() {
        let original = build::Ipv4::new(SRC, DST).udp(1, 2, b"payload");
        let mut out = [0; 56];
        assert_eq!(
            error_reply(&original, IcmpError::TimeExceeded, ROUTER, &mut out),
            Some(56)
        );
        assert_eq!(
            error_reply(&original, IcmpError::TimeExceeded, ROUTER, &mut out[..55]),
            None
        );
        assert_eq!(error_reply(&original, IcmpError::TimeExceeded, ROUTER, &mut []), None);
    }

    #[test]
    fn only_icmp_errors_go_unanswered() {
        for kind in 0..=255 {
            let answered = reply(&build::Ipv4::new(SRC, DST).icmp(kind, 0, 0, b"whatever it quotes")).is_some();
            assert_eq!(answered, ![3, 4, 5, 11, 12].contains(&kind), "type {kind}");
        }
        assert!(
            reply(&build::Ipv4::new(SRC, DST).raw(protocol::ICMP, b"")).is_none(),
            "no type to tell by"
        );
    }

    #[test]
    fn reply_is_never_answered() {
        let error = reply(&build::Ipv4::new(SRC, DST).udp(1, 2, b"x")).unwrap();
        assert!(reply(&error).is_none());
    }

    #[test]
    fn only_the_first_fragment_is_answered() {
        let mut original = build::Ipv4::new(SRC, DST).udp(1, 2, b"12345678");
        let mut fragment = |offset, more| {
            let mut packet = Ipv4Packet::new_checked(original.as_mut_slice()).unwrap();
            packet.set_fragment(offset, more);
            packet.fill_checksum();
            reply(&original).is_some()
        };
        assert!(fragment(0, true));
        assert!(!fragment(8, true));
        assert!(!fragment(8, false));
    }

    #[test]
    fn addresses_that_are_no_host_go_unanswered() {
        let nobodies = [
            [0, 0, 0, 0],
            [0, 1, 2, 3],
            [127, 0, 0, 1],
            [224, 0, 0, 1],
            [239, 255, 255, 250],
            [240, 0, 0, 1],
            [255, 255, 255, 255],
        ];
        for nobody in nobodies.map(Ipv4Addr::from) {
            assert!(
                reply(&build::Ipv4::new(nobody, DST).udp(1, 2, b"x")).is_none(),
                "from {nobody}"
            );
            assert!(
                reply(&build::Ipv4::new(SRC, nobody).udp(1, 2, b"x")).is_none(),
                "to {nobody}"
            );
        }
    }

    #[test]
    fn damaged_packets_go_unanswered() {
        let original = build::Ipv4::new(SRC, DST).udp(1, 2, b"x");
        let mut damaged = original.clone();
        damaged[15] ^= 1;
        assert!(reply(&damaged).is_none(), "header checksum");
        assert!(reply(&original[..original.len() - 1]).is_none(), "truncated");
        assert!(reply(&[0x60; 60]).is_none(), "IPv6");
    }

    proptest! {
        #[test]
        fn every_reply_verifies_within_its_bounds(
            payload in proptest::collection::vec(any::<u8>(), 0..1_500),
            protocol: u8,
            src: u32,
            dst: u32,
            room in 0usize..700,
        ) {
            let original = build::Ipv4::new(src.into(), dst.into()).raw(protocol, &payload);
            let mut out = vec![0xaa; room];
            if let Some(len) = error_reply(&original, IcmpError::TimeExceeded, ROUTER, &mut out) {
                prop_assert!(len <= MAX_ERROR_LEN && len <= room);
                let packet = Ipv4Packet::new_checked(&out[..len]).unwrap();
                let message = IcmpPacket::new_checked(packet.payload()).unwrap();
                prop_assert!(packet.verify_checksum() && message.verify_checksum());
                prop_assert!(original.starts_with(message.payload()));
                prop_assert!(out[len..].iter().all(|byte| *byte == 0xaa), "nothing is written behind the reply");
            }
        }
    }
}
