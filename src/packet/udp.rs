//! UDP (RFC 768).

use super::{Malformed, be16, checksum, put16};

/// Length in bytes of the header, and of the shortest datagram.
pub const HEADER_LEN: usize = 8;

// Offsets of the fields.
const SRC_PORT: usize = 0;
const DST_PORT: usize = 2;
pub(crate) const LEN: usize = 4;
pub(crate) const CHECKSUM: usize = 6;

/// A view over a UDP datagram: the payload of an IP packet.
#[derive(Clone, Copy, Debug)]
pub struct UdpDatagram<T> {
    buffer: T,
}

impl<T: AsRef<[u8]>> UdpDatagram<T> {
    /// A view over a whole datagram. The buffer may be longer than the datagram, never shorter.
    #[inline]
    pub fn new_checked(buffer: T) -> Result<Self, Malformed> {
        let datagram = Self::header_checked(buffer)?;
        if datagram.buffer.as_ref().len() < usize::from(datagram.len()) {
            return Err(Malformed::Truncated);
        }
        Ok(datagram)
    }

    /// A view over a datagram of which only the header has to be there: a first fragment, or a header built apart from
    /// its payload.
    #[inline]
    pub fn header_checked(buffer: T) -> Result<Self, Malformed> {
        let bytes = buffer.as_ref();
        if bytes.len() < HEADER_LEN {
            return Err(Malformed::Truncated);
        }
        if usize::from(be16(bytes, LEN)) < HEADER_LEN {
            return Err(Malformed::TotalLength);
        }
        Ok(Self { buffer })
    }

    /// Gives the buffer back.
    pub fn into_inner(self) -> T {
        self.buffer
    }

    /// The source port.
    #[inline]
    pub fn src_port(&self) -> u16 {
        be16(self.buffer.as_ref(), SRC_PORT)
    }

    /// The destination port.
    #[inline]
    pub fn dst_port(&self) -> u16 {
        be16(self.buffer.as_ref(), DST_PORT)
    }

    /// Length of the datagram in bytes, header included: never below 8.
    #[inline]
    #[expect(clippy::len_without_is_empty, reason = "a length field; no datagram is empty")]
    pub fn len(&self) -> u16 {
        be16(self.buffer.as_ref(), LEN)
    }

    /// The checksum as it stands in the datagram; zero means that the sender computed none.
    #[inline]
    pub fn checksum(&self) -> u16 {
        be16(self.buffer.as_ref(), CHECKSUM)
    }

    /// Whether the datagram carries a checksum. Without one it is legal over IPv4 (RFC 768) but not over IPv6 (RFC 8200
    /// section 8.1).
    #[inline]
    pub fn has_checksum(&self) -> bool {
        self.checksum() != 0
    }

    /// Whether the checksum agrees with the datagram, or there is none; `pseudo_header` is the IP view's.
    #[inline]
    pub fn verify_checksum(&self, pseudo_header: u32) -> bool {
        !self.has_checksum() || checksum::fold(checksum::combine(pseudo_header, checksum::sum(self.bytes()))) == 0xffff
    }

    /// The data, without padding; after [`header_checked`](Self::header_checked), what there is of it.
    #[inline]
    pub fn payload(&self) -> &[u8] {
        self.bytes().get(HEADER_LEN..).unwrap_or_default()
    }

    /// Header and data, without padding.
    #[inline]
    fn bytes(&self) -> &[u8] {
        let bytes = self.buffer.as_ref();
        &bytes[..usize::from(self.len()).min(bytes.len())]
    }
}

/// Setters. None of them touches the checksum: call [`fill_checksum`](Self::fill_checksum) in the end.
impl<T: AsRef<[u8]> + AsMut<[u8]>> UdpDatagram<T> {
    /// Sets the source port.
    #[inline]
    pub fn set_src_port(&mut self, port: u16) {
        put16(self.buffer.as_mut(), SRC_PORT, port);
    }

    /// Sets the destination port.
    #[inline]
    pub fn set_dst_port(&mut self, port: u16) {
        put16(self.buffer.as_mut(), DST_PORT, port);
    }

    /// Sets the length of the datagram in bytes, header included.
    #[inline]
    pub fn set_len(&mut self, len: u16) {
        put16(self.buffer.as_mut(), LEN, len);
    }

    /// Sets the checksum.
    #[inline]
    pub fn set_checksum(&mut self, checksum: u16) {
        put16(self.buffer.as_mut(), CHECKSUM, checksum);
    }

    /// Computes the checksum and writes it; `pseudo_header` is the IP view's.
    #[inline]
    pub fn fill_checksum(&mut self, pseudo_header: u32) {
        self.set_checksum(0);
        let sum = checksum::combine(pseudo_header, checksum::sum(self.bytes()));
        self.set_checksum(transmitted(!checksum::fold(sum)));
    }
}

/// The checksum as it is sent: a result of zero goes out as `0xffff`, since zero would mean "none" (RFC 768).
#[inline]
pub fn transmitted(checksum: u16) -> u16 {
    if checksum == 0 { 0xffff } else { checksum }
}

#[cfg(test)]
mod tests {

    use proptest::prelude::*;

    use super::*;
    use crate::packet::{Ipv4Packet, build};

    const DATAGRAM: [u8; 12] = [0x20, 0x5d, 0, 53, 0, 11, 0, 0, b'a', b'b', b'c', 0xee];

    #[test]
    fn fields_are_read_where_rfc_768_puts_them() {
        let datagram = UdpDatagram::new_checked(&DATAGRAM).unwrap();
        assert_eq!(
            (datagram.src_port(), datagram.dst_port(), datagram.len()),
            (8285, 53, 11)
        );
        assert_eq!(datagram.payload(), b"abc");
        assert!(!datagram.has_checksum());
        assert!(datagram.verify_checksum(12_345), "no checksum cannot be wrong");
    }

    #[test]
    fn setters_write_what_getters_read() {
        let mut bytes = DATAGRAM;
        let mut datagram = UdpDatagram::new_checked(&mut bytes).unwrap();
        datagram.set_src_port(1);
        datagram.set_dst_port(2);
        datagram.set_len(12);
        datagram.fill_checksum(99);
        assert_eq!((datagram.src_port(), datagram.dst_port(), datagram.len()), (1, 2, 12));
        assert_eq!(datagram.payload(), b"abc\xee");
        assert!(datagram.has_checksum() && datagram.verify_checksum(99) && !datagram.verify_checksum(98));
    }

    #[test]
    fn each_defect_has_its_reason() {
        let with_len = |len: u8| {
            let mut bytes = DATAGRAM;
            bytes[5] = len;
            UdpDatagram::new_checked(bytes).map(|_| ())
        };
        assert_eq!(
            UdpDatagram::new_checked(&DATAGRAM[..7]).unwrap_err(),
            Malformed::Truncated
        );
        assert_eq!(with_len(7), Err(Malformed::TotalLength));
        assert_eq!(with_len(13), Err(Malformed::Truncated));
        assert_eq!(with_len(8), Ok(()));
        assert_eq!(UdpDatagram::header_checked(&DATAGRAM[..9]).unwrap().payload(), b"a");
    }

    #[test]
    fn checksum_of_zero_is_sent_as_ffff() {
        // 0x205d + 53 + 8, made up to 0xffff by the pseudo header: the checksum comes out as zero.
        let mut bytes = [0x20, 0x5d, 0, 53, 0, 8, 0, 0];
        let pseudo_header = 0xffff - 0x205d - 53 - 8;
        let mut datagram = UdpDatagram::new_checked(&mut bytes).unwrap();
        datagram.fill_checksum(pseudo_header);
        assert_eq!(datagram.checksum(), 0xffff);
        assert!(datagram.verify_checksum(pseudo_header));
    }

    proptest! {
        #[test]
        fn built_datagram_verifies(payload in proptest::collection::vec(any::<u8>(), 0..100), src: u32, dst: u32) {
            let bytes = build::Ipv4::new(src.into(), dst.into()).udp(1, 2, &payload);
            let packet = Ipv4Packet::new_checked(bytes.as_slice()).unwrap();
            let datagram = UdpDatagram::new_checked(packet.payload()).unwrap();
            prop_assert!(datagram.has_checksum());
            prop_assert!(datagram.verify_checksum(packet.pseudo_header()));
            prop_assert!(!datagram.verify_checksum(packet.pseudo_header() + 1));
            prop_assert_eq!(datagram.payload(), payload.as_slice());
        }
    }
}
