//! TCP (RFC 9293).

use std::ops::BitOr;

use super::{Malformed, be16, be32, checksum, put16, put32};

/// Length in bytes of a header without options, and of the shortest segment.
pub const HEADER_LEN: usize = 20;

// Offsets of the fields, RFC 9293 section 3.1.
const SRC_PORT: usize = 0;
const DST_PORT: usize = 2;
pub(crate) const SEQ: usize = 4;
pub(crate) const ACK: usize = 8;
pub(crate) const DATA_OFFSET: usize = 12;
pub(crate) const FLAGS: usize = 13;
pub(crate) const WINDOW: usize = 14;
pub(crate) const CHECKSUM: usize = 16;
pub(crate) const URGENT: usize = 18;

/// The control bits, in the order of the header's byte 13.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct TcpFlags(pub u8);

impl TcpFlags {
    /// The sender has no more data.
    pub const FIN: Self = Self(0x01);
    /// Synchronise sequence numbers.
    pub const SYN: Self = Self(0x02);
    /// Reset the connection.
    pub const RST: Self = Self(0x04);
    /// Push: hand the data to the application now.
    pub const PSH: Self = Self(0x08);
    /// The acknowledgement number counts.
    pub const ACK: Self = Self(0x10);
    /// The urgent pointer counts.
    pub const URG: Self = Self(0x20);
    /// Congestion was seen, RFC 3168.
    pub const ECE: Self = Self(0x40);
    /// The congestion window was reduced, RFC 3168.
    pub const CWR: Self = Self(0x80);

    /// Whether all of `flags` are set.
    #[inline]
    pub const fn contains(self, flags: Self) -> bool {
        self.0 & flags.0 == flags.0
    }

    /// Whether any of `flags` is set.
    #[inline]
    pub const fn intersects(self, flags: Self) -> bool {
        self.0 & flags.0 != 0
    }

    /// These flags without `flags`.
    #[inline]
    pub const fn without(self, flags: Self) -> Self {
        Self(self.0 & !flags.0)
    }
}

impl BitOr for TcpFlags {
    type Output = Self;

    #[inline]
    fn bitor(self, flags: Self) -> Self {
        Self(self.0 | flags.0)
    }
}

/// A view over a TCP segment: the payload of an IP packet, from the first byte to the last.
#[derive(Clone, Copy, Debug)]
pub struct TcpSegment<T> {
    buffer: T,
}

impl<T: AsRef<[u8]>> TcpSegment<T> {
    /// A view over a segment, whose header is within the buffer and at least 20 bytes long.
    #[inline]
    pub fn new_checked(buffer: T) -> Result<Self, Malformed> {
        let bytes = buffer.as_ref();
        if bytes.len() < HEADER_LEN {
            return Err(Malformed::Truncated);
        }
        let header_len = usize::from(bytes[DATA_OFFSET] >> 4) * 4;
        if header_len < HEADER_LEN {
            return Err(Malformed::HeaderLength);
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

    /// The sequence number of the payload's first byte.
    #[inline]
    pub fn seq(&self) -> u32 {
        be32(self.buffer.as_ref(), SEQ)
    }

    /// The acknowledgement number.
    #[inline]
    pub fn ack(&self) -> u32 {
        be32(self.buffer.as_ref(), ACK)
    }

    /// Length of the header in bytes, options included (the data offset): 20 to 60.
    #[inline]
    pub fn header_len(&self) -> usize {
        usize::from(self.buffer.as_ref()[DATA_OFFSET] >> 4) * 4
    }

    /// The control bits.
    #[inline]
    pub fn flags(&self) -> TcpFlags {
        TcpFlags(self.buffer.as_ref()[FLAGS])
    }

    /// The receive window, not scaled.
    #[inline]
    pub fn window(&self) -> u16 {
        be16(self.buffer.as_ref(), WINDOW)
    }

    /// The checksum as it stands in the segment.
    #[inline]
    pub fn checksum(&self) -> u16 {
        be16(self.buffer.as_ref(), CHECKSUM)
    }

    /// Whether the checksum agrees with the segment; `pseudo_header` is the IP view's.
    #[inline]
    pub fn verify_checksum(&self, pseudo_header: u32) -> bool {
        checksum::fold(checksum::combine(pseudo_header, checksum::sum(self.buffer.as_ref()))) == 0xffff
    }

    /// The options, padding included.
    #[inline]
    pub fn options(&self) -> &[u8] {
        &self.buffer.as_ref()[HEADER_LEN..self.header_len()]
    }

    /// The data.
    #[inline]
    pub fn payload(&self) -> &[u8] {
        &self.buffer.as_ref()[self.header_len()..]
    }
}

/// Setters. None of them touches the checksum: call [`fill_checksum`](Self::fill_checksum) in the end.
impl<T: AsRef<[u8]> + AsMut<[u8]>> TcpSegment<T> {
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

    /// Sets the sequence number.
    #[inline]
    pub fn set_seq(&mut self, seq: u32) {
        put32(self.buffer.as_mut(), SEQ, seq);
    }

    /// Sets the acknowledgement number.
    #[inline]
    pub fn set_ack(&mut self, ack: u32) {
        put32(self.buffer.as_mut(), ACK, ack);
    }

    /// Sets the control bits.
    #[inline]
    pub fn set_flags(&mut self, flags: TcpFlags) {
        self.buffer.as_mut()[FLAGS] = flags.0;
    }

    /// Sets the receive window.
    #[inline]
    pub fn set_window(&mut self, window: u16) {
        put16(self.buffer.as_mut(), WINDOW, window);
    }

    /// Sets the checksum.
    #[inline]
    pub fn set_checksum(&mut self, checksum: u16) {
        put16(self.buffer.as_mut(), CHECKSUM, checksum);
    }

    /// The data, to be written.
    #[inline]
    pub fn payload_mut(&mut self) -> &mut [u8] {
        let header_len = self.header_len();
        &mut self.buffer.as_mut()[header_len..]
    }

    /// Computes the checksum over the whole buffer and writes it; `pseudo_header` is the IP view's.
    #[inline]
    pub fn fill_checksum(&mut self, pseudo_header: u32) {
        self.set_checksum(0);
        let sum = checksum::combine(pseudo_header, checksum::sum(self.buffer.as_ref()));
        self.set_checksum(!checksum::fold(sum));
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use proptest::prelude::*;

    use super::*;
    use crate::packet::{Ipv4Packet, build};

    fn sample(options: &[u8], payload: &[u8]) -> Vec<u8> {
        let tcp = build::Tcp {
            src_port: 40_000,
            dst_port: 443,
            seq: 0x0102_0304,
            ack: 0x0506_0708,
            flags: TcpFlags::ACK | TcpFlags::PSH,
            window: 501,
            options,
        };
        build::Ipv4::new(Ipv4Addr::new(10, 5, 1, 2), Ipv4Addr::new(10, 5, 2, 2)).tcp(&tcp, payload)
    }

    #[test]
    fn fields_are_read_where_rfc_9293_puts_them() {
        let packet = sample(&[1, 1, 1, 0], b"data");
        let packet = Ipv4Packet::new_checked(&packet).unwrap();
        let bytes = packet.payload();
        assert_eq!(
            bytes[..16],
            [0x9c, 0x40, 1, 0xbb, 1, 2, 3, 4, 5, 6, 7, 8, 0x60, 0x18, 1, 0xf5]
        );

        let segment = TcpSegment::new_checked(bytes).unwrap();
        assert_eq!((segment.src_port(), segment.dst_port()), (40_000, 443));
        assert_eq!((segment.seq(), segment.ack()), (0x0102_0304, 0x0506_0708));
        assert_eq!((segment.header_len(), segment.window()), (24, 501));
        assert_eq!(segment.flags(), TcpFlags(0x18));
        assert_eq!(segment.options(), [1, 1, 1, 0]);
        assert_eq!(segment.payload(), b"data");
        assert!(segment.verify_checksum(packet.pseudo_header()));
    }

    #[test]
    fn setters_write_what_getters_read() {
        let mut bytes = sample(&[], b"data")[20..].to_vec();
        let mut segment = TcpSegment::new_checked(bytes.as_mut_slice()).unwrap();
        segment.set_src_port(1);
        segment.set_dst_port(2);
        segment.set_seq(3);
        segment.set_ack(4);
        segment.set_window(5);
        segment.set_flags(TcpFlags::SYN | TcpFlags::ECE | TcpFlags::CWR);
        segment.payload_mut()[0] = b'D';
        segment.fill_checksum(77);

        let segment = TcpSegment::new_checked(bytes.as_slice()).unwrap();
        assert_eq!(
            (segment.src_port(), segment.dst_port(), segment.seq(), segment.ack()),
            (1, 2, 3, 4)
        );
        assert_eq!(
            (segment.window(), segment.flags(), segment.payload()),
            (5, TcpFlags(0xc2), &b"Data"[..])
        );
        assert!(segment.verify_checksum(77));
        assert!(!segment.verify_checksum(78));
    }

    #[test]
    fn flags_are_sets() {
        let flags = TcpFlags::FIN | TcpFlags::ACK;
        assert!(flags.contains(TcpFlags::ACK) && !flags.contains(TcpFlags::ACK | TcpFlags::PSH));
        assert!(flags.intersects(TcpFlags::ACK | TcpFlags::PSH) && !flags.intersects(TcpFlags::RST | TcpFlags::URG));
        assert_eq!(flags.without(TcpFlags::FIN), TcpFlags::ACK);
    }

    #[test]
    fn each_defect_has_its_reason() {
        let bytes = sample(&[], b"");
        let with_offset = |offset: u8| {
            let mut bytes = bytes[20..].to_vec();
            bytes[DATA_OFFSET] = offset << 4;
            TcpSegment::new_checked(bytes).map(|_| ())
        };
        assert_eq!(
            TcpSegment::new_checked(&bytes[20..39]).unwrap_err(),
            Malformed::Truncated
        );
        assert_eq!(with_offset(4), Err(Malformed::HeaderLength));
        assert_eq!(with_offset(6), Err(Malformed::Truncated));
        assert_eq!(with_offset(5), Ok(()));
    }

    proptest! {
        #[test]
        fn one_flipped_bit_breaks_the_checksum(payload in proptest::collection::vec(any::<u8>(), 0..100), bit: usize) {
            let mut bytes = sample(&[], &payload);
            let pseudo_header = Ipv4Packet::new_checked(bytes.as_slice()).unwrap().pseudo_header();
            let bit = bit % ((bytes.len() - 20) * 8);
            bytes[20 + bit / 8] ^= 1 << (bit % 8);
            if let Ok(segment) = TcpSegment::new_checked(&bytes[20..]) {
                prop_assert!(!segment.verify_checksum(pseudo_header));
            }
        }
    }
}
