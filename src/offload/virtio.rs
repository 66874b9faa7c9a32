//! The virtio network header (Linux `include/uapi/linux/virtio_net.h`): what a TUN device puts in front of each packet, and
//! expects there, when it was opened with `IFF_VNET_HDR`.
//!
//! TUN uses the ten-byte form without `num_buffers`, in the machine's byte order.

use super::Malformed;

/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`: the checksum field holds the sum of the pseudo header only.
const FLAG_NEEDS_CSUM: u8 = 1;

/// `VIRTIO_NET_HDR_GSO_ECN`, or-ed to the type: the segment carries CWR, which belongs to its first piece only.
const GSO_ECN: u8 = 0x80;

// `VIRTIO_NET_HDR_GSO_*`. 3 is UFO, which fragments and which Linux 4.14 gave up.
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;

/// How a superpacket is to be cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum GsoKind {
    /// Not at all: a packet of at most the MTU.
    #[default]
    None,
    /// TCP over IPv4.
    TcpV4,
    /// TCP over IPv6.
    TcpV6,
    /// UDP over either: each piece is a datagram of its own.
    UdpL4,
}

/// A checksum that is still to be computed (`VIRTIO_NET_HDR_F_NEEDS_CSUM`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PartialChecksum {
    /// Where the transport header begins and summing starts, in bytes from the start of the packet.
    pub start: u16,
    /// Where the checksum field is, in bytes from `start`. It holds the folded sum of the pseudo header.
    pub offset: u16,
}

/// The virtio network header. The default is that of a packet as it stands: nothing to compute, nothing to cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct VirtioNetHdr {
    /// How to cut the packet.
    pub gso: GsoKind,
    /// Whether the kind carried the ECN bit: the packet's CWR flag belongs to its first segment.
    pub ecn: bool,
    /// Length in bytes of all headers. A hint only: the kernel's forwarding path puts other lengths here.
    pub hdr_len: u16,
    /// Bytes of payload in each segment but the last; 0 when there is nothing to cut.
    pub gso_size: u16,
    /// The checksum to be finished, if any.
    pub checksum: Option<PartialChecksum>,
}

impl VirtioNetHdr {
    /// Length of the header in bytes.
    pub const LEN: usize = 10;

    /// The header at the start of `bytes`. Flags other than `NEEDS_CSUM` are hints to receivers and dropped.
    ///
    /// # Errors
    /// [`Malformed::HeaderTruncated`], [`Malformed::GsoType`], and [`Malformed::GsoSize`] for a kind without a size.
    #[inline]
    pub fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
        let Some(&bytes) = bytes.first_chunk::<{ Self::LEN }>() else {
            return Err(Malformed::HeaderTruncated(bytes.len()));
        };
        let [flags, gso_type, ..] = bytes;
        let number = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        let gso = match gso_type & !GSO_ECN {
            GSO_NONE => GsoKind::None,
            GSO_TCPV4 => GsoKind::TcpV4,
            GSO_TCPV6 => GsoKind::TcpV6,
            GSO_UDP_L4 => GsoKind::UdpL4,
            _ => return Err(Malformed::GsoType(gso_type)),
        };
        let gso_size = number(4);
        if gso != GsoKind::None && gso_size == 0 {
            return Err(Malformed::GsoSize);
        }
        Ok(Self {
            gso,
            ecn: gso_type & GSO_ECN != 0,
            hdr_len: number(2),
            gso_size,
            checksum: (flags & FLAG_NEEDS_CSUM != 0).then(|| PartialChecksum {
                start: number(6),
                offset: number(8),
            }),
        })
    }

    /// The header as the device takes it.
    #[inline]
    pub fn emit(&self) -> [u8; Self::LEN] {
        let kind = match self.gso {
            GsoKind::None => GSO_NONE,
            GsoKind::TcpV4 => GSO_TCPV4,
            GsoKind::TcpV6 => GSO_TCPV6,
            GsoKind::UdpL4 => GSO_UDP_L4,
        };
        let (flags, start, offset) = match self.checksum {
            Some(checksum) => (FLAG_NEEDS_CSUM, checksum.start, checksum.offset),
            None => (0, 0, 0),
        };
        let mut bytes = [0; Self::LEN];
        bytes[0] = flags;
        bytes[1] = kind | if self.ecn { GSO_ECN } else { 0 };
        for (slot, number) in
            bytes[2..]
                .as_chunks_mut::<2>()
                .0
                .iter_mut()
                .zip([self.hdr_len, self.gso_size, start, offset])
        {
            *slot = number.to_ne_bytes();
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bytes(flags: u8, gso_type: u8, numbers: [u16; 4]) -> Vec<u8> {
        let mut bytes = vec![flags, gso_type];
        bytes.extend(numbers.into_iter().flat_map(u16::to_ne_bytes));
        bytes
    }

    #[test]
    fn fields_are_read_where_virtio_net_h_puts_them() {
        let header = VirtioNetHdr::parse(&bytes(1, 0x81, [66, 1_448, 34, 16])).unwrap();
        assert_eq!(
            header,
            VirtioNetHdr {
                gso: GsoKind::TcpV4,
                ecn: true,
                hdr_len: 66,
                gso_size: 1_448,
                checksum: Some(PartialChecksum { start: 34, offset: 16 }),
            }
        );
        assert_eq!(header.emit()[..], bytes(1, 0x81, [66, 1_448, 34, 16]));
    }

    #[test]
    fn each_kind_has_its_number() {
        for (number, kind) in [
            (0, GsoKind::None),
            (1, GsoKind::TcpV4),
            (4, GsoKind::TcpV6),
            (5, GsoKind::UdpL4),
        ] {
            let header = VirtioNetHdr::parse(&bytes(0, number, [0, 9, 0, 0])).unwrap();
            assert_eq!((header.gso, header.ecn), (kind, false));
            assert_eq!(header.emit()[1], number);
        }
    }

    #[test]
    fn kinds_that_were_never_asked_for_are_refused() {
        // UFO, the UDP tunnel kinds of Linux 6.17, and a number nobody has given out.
        for kind in [3, 0x21, 0x44, 0x7f, 0x83] {
            assert_eq!(
                VirtioNetHdr::parse(&bytes(0, kind, [0, 9, 0, 0])),
                Err(Malformed::GsoType(kind))
            );
        }
    }

    #[test]
    fn a_kind_without_a_size_is_refused() {
        assert_eq!(
            VirtioNetHdr::parse(&bytes(0, 5, [40, 0, 0, 0])),
            Err(Malformed::GsoSize)
        );
    }

    #[test]
    fn a_cut_header_is_refused() {
        for len in 0..VirtioNetHdr::LEN {
            assert_eq!(
                VirtioNetHdr::parse(&[0; 10][..len]),
                Err(Malformed::HeaderTruncated(len))
            );
        }
    }

    #[test]
    fn the_header_of_a_packet_as_it_stands_is_all_zeros() {
        assert_eq!(VirtioNetHdr::default().emit(), [0; 10]);
        assert_eq!(VirtioNetHdr::parse(&[0; 10]), Ok(VirtioNetHdr::default()));
    }

    #[test]
    fn data_valid_is_no_checksum_to_be_finished() {
        let header = VirtioNetHdr::parse(&bytes(2, 0, [0, 0, 20, 16])).unwrap();
        assert_eq!(header.checksum, None);
    }

    proptest! {
        #[test]
        fn what_is_parsed_is_emitted_and_parsed_again(bytes: [u8; 12]) {
            if let Ok(header) = VirtioNetHdr::parse(&bytes) {
                prop_assert_eq!(VirtioNetHdr::parse(&header.emit()), Ok(header));
            }
        }
    }
}
