//! IPv4 (RFC 791).

use std::net::Ipv4Addr;

use super::{Hop, Malformed, array, be16, checksum, put16};

/// Length in bytes of a header without options, and of the shortest packet.
pub const HEADER_LEN: usize = 20;

// Offsets of the fields, RFC 791 section 3.1.
pub(crate) const TOS: usize = 1;
pub(crate) const TOTAL_LEN: usize = 2;
pub(crate) const IDENT: usize = 4;
pub(crate) const FRAGMENT: usize = 6;
pub(crate) const TTL: usize = 8;
pub(crate) const PROTOCOL: usize = 9;
pub(crate) const CHECKSUM: usize = 10;
pub(crate) const SRC: usize = 12;
const DST: usize = 16;

const DONT_FRAGMENT: u16 = 0x4000;
const MORE_FRAGMENTS: u16 = 0x2000;
const FRAGMENT_OFFSET: u16 = 0x1fff;

/// Whether the address can be that of a single host elsewhere: not `0.0.0.0/8`, loopback, multicast (class D) or class E,
/// which ends with the limited broadcast (RFC 6890).
#[inline]
pub fn is_host(address: Ipv4Addr) -> bool {
    !matches!(address.octets()[0], 0 | 127 | 224..)
}

/// A view over an IPv4 packet.
#[derive(Clone, Copy, Debug)]
pub struct Ipv4Packet<T> {
    buffer: T,
}

impl<T: AsRef<[u8]>> Ipv4Packet<T> {
    /// A view over a whole packet. The buffer may be longer than the packet, never shorter.
    ///
    /// The header checksum is not looked at: see [`verify_checksum`](Self::verify_checksum).
    #[inline]
    pub fn new_checked(buffer: T) -> Result<Self, Malformed> {
        let packet = Self::header_checked(buffer)?;
        if packet.buffer.as_ref().len() < usize::from(packet.total_len()) {
            return Err(Malformed::Truncated);
        }
        Ok(packet)
    }

    /// A view over a packet of which only the header has to be there: the quote in an ICMP error, or a header built
    /// apart from its payload.
    #[inline]
    pub fn header_checked(buffer: T) -> Result<Self, Malformed> {
        let bytes = buffer.as_ref();
        if bytes.len() < HEADER_LEN {
            return Err(Malformed::Truncated);
        }
        if bytes[0] >> 4 != 4 {
            return Err(Malformed::Version);
        }
        let header_len = usize::from(bytes[0] & 0xf) * 4;
        if header_len < HEADER_LEN {
            return Err(Malformed::HeaderLength);
        }
        if usize::from(be16(bytes, TOTAL_LEN)) < header_len {
            return Err(Malformed::TotalLength);
        }
        if bytes.len() < header_len {
            return Err(Malformed::Truncated);
        }
        Ok(Self { buffer })
    }

    /// Gives the buffer back.
    pub fn into_inner(self) -> T {
        self.buffer
    }

    /// The version field: always 4.
    #[inline]
    pub fn version(&self) -> u8 {
        self.buffer.as_ref()[0] >> 4
    }

    /// Length of the header in bytes, options included: 20 to 60.
    #[inline]
    pub fn header_len(&self) -> usize {
        usize::from(self.buffer.as_ref()[0] & 0xf) * 4
    }

    /// The type of service byte: DSCP and ECN together, as one compares it.
    #[inline]
    pub fn tos(&self) -> u8 {
        self.buffer.as_ref()[TOS]
    }

    /// The differentiated services code point, RFC 2474.
    #[inline]
    pub fn dscp(&self) -> u8 {
        self.tos() >> 2
    }

    /// The congestion notification bits, RFC 3168.
    #[inline]
    pub fn ecn(&self) -> u8 {
        self.tos() & 0b11
    }

    /// Length of the packet in bytes, header included.
    #[inline]
    pub fn total_len(&self) -> u16 {
        be16(self.buffer.as_ref(), TOTAL_LEN)
    }

    /// The identification, which the fragments of one datagram share.
    #[inline]
    pub fn ident(&self) -> u16 {
        be16(self.buffer.as_ref(), IDENT)
    }

    /// The DF bit.
    #[inline]
    pub fn dont_fragment(&self) -> bool {
        be16(self.buffer.as_ref(), FRAGMENT) & DONT_FRAGMENT != 0
    }

    /// The MF bit.
    #[inline]
    pub fn more_fragments(&self) -> bool {
        be16(self.buffer.as_ref(), FRAGMENT) & MORE_FRAGMENTS != 0
    }

    /// Where the payload belongs in the whole datagram, in bytes.
    #[inline]
    pub fn fragment_offset(&self) -> usize {
        usize::from(be16(self.buffer.as_ref(), FRAGMENT) & FRAGMENT_OFFSET) * 8
    }

    /// Whether this is a part of a datagram: the first, a middle or the last one.
    #[inline]
    pub fn is_fragment(&self) -> bool {
        be16(self.buffer.as_ref(), FRAGMENT) & (MORE_FRAGMENTS | FRAGMENT_OFFSET) != 0
    }

    /// Whether this is a part other than the first: one without the header of the upper layer.
    #[inline]
    pub fn is_later_fragment(&self) -> bool {
        self.fragment_offset() != 0
    }

    /// The time to live, in hops.
    #[inline]
    pub fn ttl(&self) -> u8 {
        self.buffer.as_ref()[TTL]
    }

    /// The protocol of the payload, one of [`protocol`](super::protocol).
    #[inline]
    pub fn protocol(&self) -> u8 {
        self.buffer.as_ref()[PROTOCOL]
    }

    /// The header checksum as it stands in the packet.
    #[inline]
    pub fn checksum(&self) -> u16 {
        be16(self.buffer.as_ref(), CHECKSUM)
    }

    /// Whether the header checksum agrees with the header.
    #[inline]
    pub fn verify_checksum(&self) -> bool {
        checksum::checksum(self.header()) == 0
    }

    /// The source address.
    #[inline]
    pub fn src(&self) -> Ipv4Addr {
        array::<4>(self.buffer.as_ref(), SRC).into()
    }

    /// The destination address.
    #[inline]
    pub fn dst(&self) -> Ipv4Addr {
        array::<4>(self.buffer.as_ref(), DST).into()
    }

    /// The header, options included.
    #[inline]
    pub fn header(&self) -> &[u8] {
        &self.buffer.as_ref()[..self.header_len()]
    }

    /// The options, empty in nearly every packet.
    #[inline]
    pub fn options(&self) -> &[u8] {
        &self.buffer.as_ref()[HEADER_LEN..self.header_len()]
    }

    /// The payload, without padding; after [`header_checked`](Self::header_checked), what there is of it.
    #[inline]
    pub fn payload(&self) -> &[u8] {
        let bytes = self.buffer.as_ref();
        let end = usize::from(self.total_len()).min(bytes.len());
        bytes.get(self.header_len()..end).unwrap_or_default()
    }

    /// Length in bytes of the payload that the header states.
    #[inline]
    pub fn payload_len(&self) -> u16 {
        // A header is at most 60 bytes long.
        self.total_len().saturating_sub(self.header_len() as u16)
    }

    /// Partial sum of the pseudo header for the TCP or UDP checksum of the payload.
    #[inline]
    pub fn pseudo_header(&self) -> u32 {
        checksum::pseudo_header_v4(self.src(), self.dst(), self.protocol(), self.payload_len())
    }
}

/// Setters. None but [`decrement_ttl`](Self::decrement_ttl) touches the checksum: call
/// [`fill_checksum`](Self::fill_checksum) when the header is as it shall be.
impl<T: AsRef<[u8]> + AsMut<[u8]>> Ipv4Packet<T> {
    /// Sets the type of service byte.
    #[inline]
    pub fn set_tos(&mut self, tos: u8) {
        self.buffer.as_mut()[TOS] = tos;
    }

    /// Sets the length of the packet in bytes, header included.
    #[inline]
    pub fn set_total_len(&mut self, len: u16) {
        put16(self.buffer.as_mut(), TOTAL_LEN, len);
    }

    /// Sets the identification.
    #[inline]
    pub fn set_ident(&mut self, ident: u16) {
        put16(self.buffer.as_mut(), IDENT, ident);
    }

    /// Sets or clears the DF bit.
    #[inline]
    pub fn set_dont_fragment(&mut self, dont_fragment: bool) {
        let rest = be16(self.buffer.as_ref(), FRAGMENT) & !DONT_FRAGMENT;
        put16(
            self.buffer.as_mut(),
            FRAGMENT,
            rest | if dont_fragment { DONT_FRAGMENT } else { 0 },
        );
    }

    /// Makes the packet a fragment: `offset` in bytes, a multiple of 8 below 65,536 (the rest is cut off).
    #[inline]
    pub fn set_fragment(&mut self, offset: usize, more: bool) {
        let df = be16(self.buffer.as_ref(), FRAGMENT) & DONT_FRAGMENT;
        let offset = (offset / 8) as u16 & FRAGMENT_OFFSET;
        put16(
            self.buffer.as_mut(),
            FRAGMENT,
            df | offset | if more { MORE_FRAGMENTS } else { 0 },
        );
    }

    /// Sets the time to live.
    #[inline]
    pub fn set_ttl(&mut self, ttl: u8) {
        self.buffer.as_mut()[TTL] = ttl;
    }

    /// Sets the protocol of the payload.
    #[inline]
    pub fn set_protocol(&mut self, protocol: u8) {
        self.buffer.as_mut()[PROTOCOL] = protocol;
    }

    /// Sets the header checksum.
    #[inline]
    pub fn set_checksum(&mut self, checksum: u16) {
        put16(self.buffer.as_mut(), CHECKSUM, checksum);
    }

    /// Sets the source address.
    #[inline]
    pub fn set_src(&mut self, src: Ipv4Addr) {
        self.buffer.as_mut()[SRC..SRC + 4].copy_from_slice(&src.octets());
    }

    /// Sets the destination address.
    #[inline]
    pub fn set_dst(&mut self, dst: Ipv4Addr) {
        self.buffer.as_mut()[DST..DST + 4].copy_from_slice(&dst.octets());
    }

    /// The payload, to be written.
    #[inline]
    pub fn payload_mut(&mut self) -> &mut [u8] {
        let header_len = self.header_len();
        let total_len = usize::from(self.total_len());
        let bytes = self.buffer.as_mut();
        let end = total_len.min(bytes.len());
        bytes.get_mut(header_len..end).unwrap_or_default()
    }

    /// Computes the header checksum and writes it.
    #[inline]
    pub fn fill_checksum(&mut self) {
        self.set_checksum(0);
        let checksum = checksum::checksum(self.header());
        self.set_checksum(checksum);
    }

    /// Takes one hop from the packet, as RFC 1812 section 5.3.1 asks of a router.
    ///
    /// The checksum is updated by the difference (RFC 1624) and not computed anew: a header that was damaged on the
    /// way stays recognisably so.
    #[inline]
    pub fn decrement_ttl(&mut self) -> Hop {
        let ttl = self.ttl();
        if ttl <= 1 {
            return Hop::Expired;
        }
        let old = be16(self.buffer.as_ref(), TTL);
        let checksum = checksum::update_u16(self.checksum(), old, old - 0x0100);
        self.set_ttl(ttl - 1);
        self.set_checksum(checksum);
        Hop::Forward
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::packet::{build, protocol};

    const SRC_ADDR: Ipv4Addr = Ipv4Addr::new(10, 5, 34, 2);
    const DST_ADDR: Ipv4Addr = Ipv4Addr::new(10, 5, 72, 9);

    /// A header from the wild (an example that many texts on the IP checksum use).
    const SAMPLE: [u8; 20] = [
        0x45, 0x00, 0x00, 0x14, 0x1c, 0x46, 0x40, 0x00, 0x40, 0x06, 0xb1, 0xe6, 0xac, 0x10, 0x0a, 0x63, 0xac, 0x10,
        0x0a, 0x0c,
    ];

    #[test]
    fn fields_are_read_where_rfc_791_puts_them() {
        let mut bytes = SAMPLE;
        bytes[1] = 46 << 2 | 1;
        let packet = Ipv4Packet::new_checked(&bytes).unwrap();

        assert_eq!(packet.version(), 4);
        assert_eq!(packet.header_len(), 20);
        assert_eq!(packet.tos(), 0xb9);
        assert_eq!(packet.dscp(), 46);
        assert_eq!(packet.ecn(), 1);
        assert_eq!(packet.total_len(), 20);
        assert_eq!(packet.ident(), 0x1c46);
        assert!(packet.dont_fragment());
        assert!(!packet.more_fragments());
        assert_eq!(packet.fragment_offset(), 0);
        assert!(!packet.is_fragment());
        assert_eq!(packet.ttl(), 64);
        assert_eq!(packet.protocol(), protocol::TCP);
        assert_eq!(packet.checksum(), 0xb1e6);
        assert_eq!(packet.src(), Ipv4Addr::new(172, 16, 10, 99));
        assert_eq!(packet.dst(), Ipv4Addr::new(172, 16, 10, 12));
        assert_eq!(packet.payload(), b"");
        assert_eq!(packet.options(), b"");
    }

    #[test]
    fn setters_write_what_getters_read() {
        let mut bytes = build::Ipv4::new(SRC_ADDR, DST_ADDR).raw(17, b"payload!");
        let mut packet = Ipv4Packet::new_checked(bytes.as_mut_slice()).unwrap();

        packet.set_tos(0xb8);
        packet.set_total_len(27);
        packet.set_ident(0xbeef);
        packet.set_fragment(1480, true);
        packet.set_dont_fragment(true);
        packet.set_ttl(9);
        packet.set_protocol(6);
        packet.set_src(DST_ADDR);
        packet.set_dst(SRC_ADDR);
        packet.payload_mut()[0] = b'P';
        packet.fill_checksum();

        let packet = Ipv4Packet::new_checked(bytes.as_slice()).unwrap();
        assert_eq!((packet.tos(), packet.total_len(), packet.ident()), (0xb8, 27, 0xbeef));
        assert_eq!(
            (
                packet.fragment_offset(),
                packet.more_fragments(),
                packet.dont_fragment()
            ),
            (1480, true, true)
        );
        assert!(packet.is_later_fragment());
        assert_eq!((packet.ttl(), packet.protocol()), (9, 6));
        assert_eq!((packet.src(), packet.dst()), (DST_ADDR, SRC_ADDR));
        assert_eq!(packet.payload(), b"Payload");
        assert!(packet.verify_checksum());
    }

    #[test]
    fn each_defect_has_its_reason() {
        let with = |at: usize, value: u8| {
            let mut bytes = SAMPLE;
            bytes[at] = value;
            Ipv4Packet::new_checked(bytes).map(|_| ())
        };
        assert_eq!(
            Ipv4Packet::new_checked(&SAMPLE[..19]).unwrap_err(),
            Malformed::Truncated
        );
        assert_eq!(with(0, 0x65), Err(Malformed::Version));
        assert_eq!(with(0, 0x44), Err(Malformed::HeaderLength));
        assert_eq!(with(0, 0x46), Err(Malformed::TotalLength));
        assert_eq!(with(3, 19), Err(Malformed::TotalLength));
        assert_eq!(with(3, 21), Err(Malformed::Truncated));
        assert_eq!(with(3, 20), Ok(()));
    }

    #[test]
    fn padding_is_no_payload() {
        let mut bytes = build::Ipv4::new(SRC_ADDR, DST_ADDR).raw(17, b"four");
        bytes.extend([0xee; 22]);
        assert_eq!(Ipv4Packet::new_checked(bytes.as_slice()).unwrap().payload(), b"four");
    }

    #[test]
    fn header_alone_has_the_payload_that_is_there() {
        let bytes = build::Ipv4::new(SRC_ADDR, DST_ADDR).raw(17, b"payload");
        assert_eq!(Ipv4Packet::new_checked(&bytes[..24]).unwrap_err(), Malformed::Truncated);

        let packet = Ipv4Packet::header_checked(&bytes[..24]).unwrap();
        assert_eq!(packet.payload(), b"payl");
        assert_eq!(packet.payload_len(), 7);
    }

    #[test]
    fn options_lie_between_header_and_payload() {
        let mut bytes = SAMPLE.to_vec();
        bytes[0] = 0x46;
        bytes[3] = 26;
        bytes.extend([1, 1, 1, 0, b'o', b'k']);
        let packet = Ipv4Packet::new_checked(bytes).unwrap();
        assert_eq!(packet.header_len(), 24);
        assert_eq!(packet.options(), [1, 1, 1, 0]);
        assert_eq!(packet.payload(), b"ok");
    }

    #[test]
    fn first_fragment_is_no_later_one() {
        let mut bytes = build::Ipv4::new(SRC_ADDR, DST_ADDR).raw(17, b"12345678");
        let mut packet = Ipv4Packet::new_checked(bytes.as_mut_slice()).unwrap();
        packet.set_fragment(0, true);
        assert!(packet.is_fragment() && !packet.is_later_fragment());
        packet.set_fragment(8, false);
        assert!(packet.is_fragment() && packet.is_later_fragment());
    }

    #[test]
    fn last_hop_expires_and_leaves_the_packet_alone() {
        for ttl in [0, 1] {
            let mut bytes = build::Ipv4::new(SRC_ADDR, DST_ADDR).ttl(ttl).udp(1, 2, b"x");
            let before = bytes.clone();
            assert_eq!(
                Ipv4Packet::new_checked(bytes.as_mut_slice()).unwrap().decrement_ttl(),
                Hop::Expired
            );
            assert_eq!(bytes, before);
        }
    }

    proptest! {
        #[test]
        fn decrement_equals_recomputation(ident: u16, src: u32, dst: u32, ttl in 2u8.., tos: u8) {
            let mut bytes = build::Ipv4::new(src.into(), dst.into()).ttl(ttl).tos(tos).ident(ident).udp(1, 2, b"x");
            let mut packet = Ipv4Packet::new_checked(bytes.as_mut_slice()).unwrap();
            prop_assert_eq!(packet.decrement_ttl(), Hop::Forward);
            prop_assert_eq!(packet.ttl(), ttl - 1);
            let updated = packet.checksum();
            packet.fill_checksum();
            prop_assert_eq!(updated, packet.checksum());
        }

        #[test]
        fn bad_checksum_stays_bad_and_a_good_one_good(checksum: u16, ttl in 2u8.., ident: u16) {
            let mut bytes = build::Ipv4::new(SRC_ADDR, DST_ADDR).ttl(ttl).ident(ident).udp(1, 2, b"x");
            let mut packet = Ipv4Packet::new_checked(bytes.as_mut_slice()).unwrap();
            packet.set_checksum(checksum);
            let before = packet.verify_checksum();
            let _ = packet.decrement_ttl();
            prop_assert_eq!(packet.verify_checksum(), before);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            if let Ok(packet) = Ipv4Packet::new_checked(bytes.as_slice()) {
                prop_assert_eq!(packet.header().len() + packet.payload().len(), usize::from(packet.total_len()));
            }
        }
    }
}
