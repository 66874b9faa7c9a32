//! Packets from peers into as few writes to the TUN device as possible: those that follow one another in a flow become one
//! superpacket, by the rules of the kernel's own GRO (`inet_gro_receive`, `tcp_gro_receive`, `udp_gro_receive_segment`), so
//! that segmentation gives back exactly the packets that came.
//!
//! ```
//! use flannel::offload::{Coalescer, Merge};
//! use flannel::packet::build;
//!
//! let ip = build::Ipv4::new([10, 5, 34, 2].into(), [10, 5, 72, 2].into());
//! let arena = [ip.ident(1).udp(4000, 53, b"hello"), ip.ident(2).udp(4000, 53, b"world")].concat();
//! let mut coalescer = Coalescer::new(Merge::ALL);
//! coalescer.push(&arena, 0..33);
//! coalescer.push(&arena, 33..66);
//! let write = coalescer.writes(&arena).next().unwrap();
//! assert_eq!(write.count(), 2);
//! assert_eq!(write.parts().skip(1).collect::<Vec<_>>(), [b"hello", b"world"]);
//! ```
//!
//! Where the kernel leaves a choice:
//! - CWR and FIN are never merged. Segmentation leaves CWR on the first piece only (RFC 3168), which is wrong for a run of
//!   packets that all have it (accurate ECN), and the virtio header cannot tell the two apart.
//! - UDP without a checksum is never merged: the kernel does not either, and its segmentation would give the pieces one.
//! - With DF set, packets of one constant identification merge and leave the device with ascending ones: RFC 6864 gives the
//!   field no meaning there.

mod rules;
#[cfg(test)]
mod sample;

use std::ops::Range;

use crate::packet::{TcpFlags, be32, checksum, ipv4, ipv6, put16, tcp, udp};

use super::{GsoKind, PartialChecksum, VirtioNetHdr};

use rules::{Class, IPV4_TRANSPORT, Ident, Shape};

/// Packets in one write: as many as one segmented send of the other side can bring (`UDP_MAX_SEGMENTS` since Linux 6.9), and
/// few enough that a vectored write, of 1,024 parts at most, takes them.
pub const MAX_MERGED: usize = 128;

/// Flows that are told apart in a batch, a power of two. Two that fall on one slot only merge less.
const FLOWS: usize = 128;

/// The longest header of a merged packet: virtio, IPv6 without extensions, TCP with 40 bytes of options.
const MAX_HEAD: usize = VirtioNetHdr::LEN + ipv6::HEADER_LEN + 60;

/// The head of a packet as it stands: nothing to compute, nothing to cut.
const PLAIN_HEAD: &[u8] = &[0; VirtioNetHdr::LEN];

/// End of a list of pieces.
const NONE: u32 = u32::MAX;

/// What is merged: what the device takes (`TUNSETOFFLOAD`), less what it has refused since.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Merge {
    /// TCP segments, of either IP version.
    pub tcp: bool,
    /// UDP datagrams, of either IP version.
    pub udp: bool,
}

impl Merge {
    /// Everything.
    pub const ALL: Self = Self { tcp: true, udp: true };
    /// Nothing: each packet is a write of its own.
    pub const NOTHING: Self = Self { tcp: false, udp: false };

    #[inline]
    fn allows(self, kind: GsoKind) -> bool {
        match kind {
            GsoKind::None => false,
            GsoKind::TcpV4 | GsoKind::TcpV6 => self.tcp,
            GsoKind::UdpL4 => self.udp,
        }
    }
}

/// A batch of packets on its way to the device. Allocates while the largest batch so far grows, and never after.
///
/// Packets lie in one contiguous buffer of the caller's, the arena, and are known by their ranges in it; every call of a
/// batch is given the same arena.
#[derive(Debug)]
pub struct Coalescer {
    merge: Merge,
    runs: Vec<Run>,
    pieces: Vec<Piece>,
    heads: Vec<Head>,
    /// For each hash of a flow its newest run, counted from one; 0 if there is none.
    flows: [u32; FLOWS],
    /// The run that the last packet went to.
    latest: usize,
}

/// What one write is made of: a packet, or several of one flow that will be a superpacket.
#[derive(Clone, Copy, Debug)]
struct Run {
    shape: Shape,
    /// Whether the next packet of the flow may be appended.
    open: bool,
    /// Whether the first packet's checksums were found good, which is not looked into before there is a second one.
    verified: bool,
    ident: Ident,
    /// Whether the last packet had PSH.
    push: bool,
    /// Payload bytes of each packet but the last, which may have less.
    payload_len: usize,
    /// Length of the headers and all payloads.
    total_len: usize,
    next_seq: u32,
    count: usize,
    first: u32,
    last: u32,
}

/// A packet in the arena.
#[derive(Clone, Copy, Debug)]
struct Piece {
    start: usize,
    len: u32,
    next: u32,
}

#[derive(Clone, Copy, Debug)]
struct Head {
    bytes: [u8; MAX_HEAD],
}

impl Coalescer {
    /// With nothing in it.
    pub fn new(merge: Merge) -> Self {
        Self {
            merge,
            runs: Vec::new(),
            pieces: Vec::new(),
            heads: Vec::new(),
            flows: [0; FLOWS],
            latest: 0,
        }
    }

    /// Changes what is merged. To be called between batches: within one, a flow could overtake itself.
    pub fn set_merge(&mut self, merge: Merge) {
        self.merge = merge;
    }

    /// Starts the next batch.
    pub fn clear(&mut self) {
        self.runs.clear();
        self.pieces.clear();
        self.flows.fill(0);
        self.latest = 0;
    }

    /// Takes the packet at `range` of `arena`, its hop taken already, behind all that were taken before.
    ///
    /// Any bytes will do: what is no packet that can be merged becomes a write of its own, byte for byte.
    ///
    /// # Panics
    /// If `range` is not within `arena`.
    #[inline]
    pub fn push(&mut self, arena: &[u8], range: Range<usize>) {
        let packet = &arena[range.clone()];
        match rules::classify(packet) {
            Class::Flow(shape) if self.merge.allows(shape.kind) => {
                self.push_to_flow(arena, range.start, packet, shape);
                return;
            }
            Class::Between => self.close_between(arena, packet),
            _ => {}
        }
        let piece = self.add_piece(range.start, packet);
        self.runs.push(Run::alone(piece, packet));
    }

    /// The batch as writes, ordered by their first packets. A flow's packets keep their order.
    pub fn writes<'a>(&'a mut self, arena: &'a [u8]) -> impl ExactSizeIterator<Item = Write<'a>> {
        self.heads.clear();
        for run in self.runs.iter().filter(|run| run.is_merged()) {
            let first = self.pieces[run.first as usize].bytes(arena);
            self.heads.push(Head::of(run, first));
        }
        let mut heads = self.heads.iter();
        let pieces = &self.pieces;
        self.runs.iter().map(move |run| {
            // Each merged run has its head, in the same order.
            let head = if run.is_merged() { heads.next() } else { None };
            Write {
                head: head.map_or(PLAIN_HEAD, |head| head.used(run)),
                kind: head.map_or(GsoKind::None, |_| run.shape.kind),
                header_len: head.map_or(0, |_| run.shape.header_len),
                total_len: run.total_len,
                packets: Packets {
                    arena,
                    pieces,
                    next: run.first,
                    left: run.count,
                },
            }
        })
    }

    /// Appends the packet to its flow's newest run, or starts one.
    #[inline]
    fn push_to_flow(&mut self, arena: &[u8], start: usize, packet: &[u8], shape: Shape) {
        let mut newest = self.latest;
        if !self.is_of_flow(newest, arena, packet, shape) {
            newest = (self.flows[slot(packet, shape)] as usize).wrapping_sub(1);
            if !self.is_of_flow(newest, arena, packet, shape) {
                newest = usize::MAX;
            }
        }
        self.latest = if self.append(newest, arena, start, packet, shape) {
            newest
        } else {
            let piece = self.add_piece(start, packet);
            self.runs.push(Run::of_flow(piece, packet, shape));
            self.flows[slot(packet, shape)] = self.runs.len() as u32;
            self.runs.len() - 1
        };
    }

    /// Whether the packet's flow is that of the run.
    #[inline]
    fn is_of_flow(&self, run: usize, arena: &[u8], packet: &[u8], shape: Shape) -> bool {
        let Some(run) = self.runs.get(run) else {
            return false;
        };
        (run.shape.kind, run.shape.transport) == (shape.kind, shape.transport)
            && rules::flow_key(self.pieces[run.first as usize].bytes(arena), shape) == rules::flow_key(packet, shape)
    }

    /// Appends the packet to the run, which is of its flow, if there is one and the packet continues it; whether it does.
    #[inline]
    fn append(&mut self, run: usize, arena: &[u8], start: usize, packet: &[u8], shape: Shape) -> bool {
        let Some(run) = self.runs.get_mut(run).filter(|run| run.open && shape.mergeable) else {
            return false;
        };
        let first = self.pieces[run.first as usize].bytes(arena);
        let Some(ident) = run.continued_by(first, packet, shape) else {
            return false;
        };
        if !run.verified {
            run.verified = rules::is_intact(first, run.shape);
            run.open = run.verified;
        }
        if !run.open || !rules::is_intact(packet, shape) {
            return false;
        }
        let payload_len = packet.len() - shape.header_len;
        run.ident = ident;
        run.push = rules::pushes(packet, shape);
        run.open = payload_len == run.payload_len && !run.push;
        run.next_seq = run.next_seq.wrapping_add(payload_len as u32);
        run.total_len += payload_len;
        run.count += 1;
        let before = run.last;
        run.last = self.pieces.len() as u32;
        self.pieces[before as usize].next = run.last;
        self.add_piece(start, packet);
        true
    }

    fn add_piece(&mut self, start: usize, packet: &[u8]) -> u32 {
        self.pieces.push(Piece {
            start,
            // What a datagram held: far below 2^32.
            len: packet.len() as u32,
            next: NONE,
        });
        // A batch of 2^32 packets does not fit into memory.
        self.pieces.len() as u32 - 1
    }

    /// Ends the runs of all flows between the packet's addresses. Looks at each flow: such packets are few, and each costs
    /// the kernel far more than this.
    fn close_between(&mut self, arena: &[u8], packet: &[u8]) {
        for &slot in self.flows.iter().filter(|&&slot| slot != 0) {
            let run = &mut self.runs[slot as usize - 1];
            let first = self.pieces[run.first as usize].bytes(arena);
            if rules::addresses(first) == rules::addresses(packet) {
                run.open = false;
            }
        }
    }
}

impl Run {
    /// A packet that stays the only one.
    fn alone(piece: u32, packet: &[u8]) -> Self {
        Self {
            shape: Shape::NONE,
            open: false,
            verified: false,
            ident: Ident::Ascending,
            push: false,
            payload_len: 0,
            total_len: packet.len(),
            next_seq: 0,
            count: 1,
            first: piece,
            last: piece,
        }
    }

    /// The first packet of a flow, or the first that does not continue the run before.
    fn of_flow(piece: u32, packet: &[u8], shape: Shape) -> Self {
        let mut run = Self {
            shape,
            ..Self::alone(piece, packet)
        };
        if shape.mergeable {
            run.payload_len = packet.len() - shape.header_len;
            run.push = rules::pushes(packet, shape);
            run.open = !run.push;
            if shape.is_tcp() {
                run.next_seq = be32(packet, shape.transport + tcp::SEQ).wrapping_add(run.payload_len as u32);
            }
        }
        run
    }

    fn is_merged(&self) -> bool {
        self.count > 1
    }
}

impl Piece {
    #[inline]
    fn bytes<'a>(&self, arena: &'a [u8]) -> &'a [u8] {
        &arena[self.start..][..self.len as usize]
    }
}

impl Head {
    /// The headers of a merged run, of whose packets `first` is the first.
    fn of(run: &Run, first: &[u8]) -> Self {
        let shape = run.shape;
        let field = if shape.is_tcp() { tcp::CHECKSUM } else { udp::CHECKSUM };
        let virtio = VirtioNetHdr {
            gso: shape.kind,
            ecn: false,
            hdr_len: shape.header_len as u16,
            gso_size: run.payload_len as u16,
            checksum: Some(PartialChecksum {
                start: shape.transport as u16,
                offset: field as u16,
            }),
        };
        let mut head = Self { bytes: [0; MAX_HEAD] };
        head.bytes[..VirtioNetHdr::LEN].copy_from_slice(&virtio.emit());
        let header = &mut head.bytes[VirtioNetHdr::LEN..][..shape.header_len];
        header.copy_from_slice(&first[..shape.header_len]);
        let (ip, transport) = header.split_at_mut(shape.transport);
        let transport_len = (run.total_len - shape.transport) as u16;
        if shape.transport == IPV4_TRANSPORT {
            put16(ip, ipv4::TOTAL_LEN, run.total_len as u16);
            put16(ip, ipv4::CHECKSUM, 0);
            let checksum = checksum::checksum(ip);
            put16(ip, ipv4::CHECKSUM, checksum);
        } else {
            put16(ip, ipv6::PAYLOAD_LEN, transport_len);
        }
        if !shape.is_tcp() {
            put16(transport, udp::LEN, transport_len);
        } else if run.push {
            transport[tcp::FLAGS] |= TcpFlags::PSH.0;
        }
        let pseudo_header = rules::pseudo_header(ip, shape, transport_len);
        put16(transport, field, checksum::fold(pseudo_header));
        head
    }

    fn used(&self, run: &Run) -> &[u8] {
        &self.bytes[..VirtioNetHdr::LEN + run.shape.header_len]
    }
}

/// One write to the device.
#[derive(Clone, Debug)]
pub struct Write<'a> {
    head: &'a [u8],
    kind: GsoKind,
    header_len: usize,
    total_len: usize,
    packets: Packets<'a>,
}

impl<'a> Write<'a> {
    /// How many packets are in it.
    pub fn count(&self) -> usize {
        self.packets.left
    }

    /// What the write asks of the device; [`GsoKind::None`] for a packet as it stands.
    pub fn kind(&self) -> GsoKind {
        self.kind
    }

    /// Length in bytes of the IP packet that is written, without the virtio header.
    pub fn total_len(&self) -> usize {
        self.total_len
    }

    /// Length in bytes of all packets in it together, as they came.
    pub fn packets_len(&self) -> usize {
        self.total_len + (self.count().max(1) - 1) * self.header_len
    }

    /// What to write, for a vectored write: the virtio header, in one with the merged packet's headers, then the payloads;
    /// or the virtio header and the only packet.
    pub fn parts(&self) -> impl Iterator<Item = &'a [u8]> + Clone + use<'a> {
        let header_len = self.header_len;
        let payloads = self.packets.clone().map(move |packet| &packet[header_len..]);
        std::iter::once(self.head).chain(payloads)
    }

    /// The packets as they came, for a device that refuses the merged one. Each takes an all-zero virtio header.
    pub fn packets(&self) -> impl ExactSizeIterator<Item = &'a [u8]> + use<'a> {
        self.packets.clone()
    }
}

/// The packets of a run.
#[derive(Clone, Debug)]
struct Packets<'a> {
    arena: &'a [u8],
    pieces: &'a [Piece],
    next: u32,
    left: usize,
}

impl<'a> Iterator for Packets<'a> {
    type Item = &'a [u8];

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        let piece = self.pieces.get(self.next as usize)?;
        self.next = piece.next;
        self.left -= 1;
        Some(piece.bytes(self.arena))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for Packets<'_> {}

/// Where the flow's newest run is noted.
#[inline]
fn slot(packet: &[u8], shape: Shape) -> usize {
    // The multiplication leaves the best bits at the top.
    (rules::flow_hash(packet, shape) >> (u64::BITS - FLOWS.ilog2())) as usize
}

#[cfg(test)]
mod tests {
    use super::{sample::*, *};
    use crate::packet::{Ipv4Packet, be16, build};

    #[test]
    fn segments_in_order_become_one_write() {
        assert_eq!(counts(&(0..44).map(segment).collect::<Vec<_>>()), [44]);
        assert_eq!(counts(&(0..44).map(segment_v6).collect::<Vec<_>>()), [44]);
    }

    #[test]
    fn datagrams_of_one_length_become_one_write() {
        assert_eq!(
            counts(&(0..9).map(|index| datagram(index, 50)).collect::<Vec<_>>()),
            [9]
        );
        assert_eq!(counts(&vec![V6.udp(1, 2, b"same"); 9]), [9]);
    }

    #[test]
    fn the_merged_header_is_what_the_kernel_expects() {
        let arena = [segment(0), segment(1)].concat();
        let mut coalescer = Coalescer::new(Merge::ALL);
        coalescer.push(&arena, 0..152);
        coalescer.push(&arena, 152..304);
        let write = coalescer.writes(&arena).next().unwrap();
        let head = write.parts().next().unwrap();
        let expected = VirtioNetHdr {
            gso: GsoKind::TcpV4,
            ecn: false,
            hdr_len: 52,
            gso_size: 100,
            checksum: Some(PartialChecksum { start: 20, offset: 16 }),
        };
        assert_eq!(head[..10], expected.emit());
        let ip = Ipv4Packet::header_checked(&head[10..]).unwrap();
        assert!(ip.verify_checksum());
        assert_eq!(ip.total_len(), 252);
        assert_eq!(be16(head, 10 + 20 + 16), checksum::fold(ip.pseudo_header()));
        assert_eq!((write.kind(), write.total_len()), (GsoKind::TcpV4, 252));
        assert_eq!(write.parts().skip(1).collect::<Vec<_>>(), [noise(100), noise(100)]);
    }

    #[test]
    fn a_single_packet_is_written_as_it_came() {
        let packet = segment(0);
        let mut coalescer = Coalescer::new(Merge::ALL);
        coalescer.push(&packet, 0..packet.len());
        let write = coalescer.writes(&packet).next().unwrap();
        assert_eq!(write.parts().collect::<Vec<_>>(), [&[0; 10][..], &packet]);
        assert_eq!((write.kind(), write.count()), (GsoKind::None, 1));
    }

    #[test]
    fn an_empty_batch_has_no_writes() {
        let mut coalescer = Coalescer::new(Merge::ALL);
        assert_eq!(coalescer.writes(&[]).len(), 0);
        let packet = segment(0);
        coalescer.push(&packet, 0..packet.len());
        coalescer.clear();
        assert_eq!(coalescer.writes(&packet).len(), 0);
    }

    #[test]
    fn a_batch_knows_nothing_of_the_one_before() {
        let arena = [segment(0), segment(1)].concat();
        let mut coalescer = Coalescer::new(Merge::ALL);
        coalescer.push(&arena, 0..152);
        coalescer.clear();
        coalescer.push(&arena, 152..304);
        assert_eq!(
            coalescer.writes(&arena).map(|write| write.count()).collect::<Vec<_>>(),
            [1]
        );
    }

    #[test]
    fn what_the_device_refuses_is_not_merged() {
        let packets = [segment(0), datagram(0, 9), segment(1), datagram(1, 9)];
        let merge = |tcp, udp| counts_of(Merge { tcp, udp }, &packets);
        assert_eq!(merge(true, true), [2, 2]);
        assert_eq!(merge(true, false), [2, 1, 1]);
        assert_eq!(merge(false, true), [1, 2, 1]);
        assert_eq!(counts_of(Merge::NOTHING, &packets), [1; 4]);
    }

    #[test]
    fn flows_are_kept_apart_and_come_in_the_order_of_their_first_packets() {
        let other = |index: u16| {
            let tcp = build::Tcp {
                dst_port: 444,
                ..tcp(100 * u32::from(index))
            };
            V4.ident(index).tcp(&tcp, &noise(100))
        };
        let packets = [
            segment(0),
            other(0),
            other(1),
            segment(1),
            datagram(0, 8),
            segment(2),
            datagram(1, 8),
        ];
        assert_eq!(counts(&packets), [3, 2, 2]);
    }

    #[test]
    fn more_flows_than_slots_still_all_arrive_in_order() {
        let packets: Vec<_> = (0..2_000u16)
            .map(|index| V4.ident(index / 500).udp(index % 500, 9, &noise(20)))
            .collect();
        let arena = packets.concat();
        let mut coalescer = Coalescer::new(Merge::ALL);
        for index in 0..packets.len() {
            coalescer.push(&arena, index * 48..(index + 1) * 48);
        }
        let mut next = [0; 500];
        let mut writes = 0;
        for write in coalescer.writes(&arena) {
            writes += 1;
            for packet in write.packets() {
                let slot = &mut next[usize::from(be16(packet, 20))];
                assert_eq!(be16(packet, ipv4::IDENT), *slot);
                *slot += 1;
            }
        }
        assert!(writes <= 2_000 && next == [4; 500]);
    }

    #[test]
    fn what_is_no_packet_is_written_as_it_came() {
        let [v4, v6] = [segment(0), segment_v6(0)];
        let mut data_offset = v4.clone();
        data_offset[32] = 0x40;
        let mut beyond = v4.clone();
        beyond[32] = 0xf0;
        let junk = [
            vec![],
            vec![0x45],
            vec![0x75; 60],
            v4[..19].to_vec(),
            v4[..25].to_vec(),
            v4[..39].to_vec(),
            v4[..100].to_vec(),
            v6[..39].to_vec(),
            v6[..45].to_vec(),
            data_offset,
            beyond[..70].to_vec(),
        ];
        let arena = junk.concat();
        let mut coalescer = Coalescer::new(Merge::ALL);
        let mut start = 0;
        for bytes in junk.iter().chain(&junk) {
            start %= arena.len();
            coalescer.push(&arena, start..start + bytes.len());
            start += bytes.len();
        }
        let writes: Vec<_> = coalescer
            .writes(&arena)
            .map(|write| write.parts().last().unwrap())
            .collect();
        assert_eq!(writes, junk.iter().chain(&junk).collect::<Vec<_>>());
    }
}
