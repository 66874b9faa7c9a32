//! What one `sendmmsg` carries: packet → run → message. Packets of one length to one peer that follow one another become one
//! segmented message (`UDP_SEGMENT`), whichever superpackets they were cut from. Pure: positions, no bytes.

use std::{net::SocketAddr, ops::Range};

use super::Segments;

/// The payload of a UDP datagram over IPv4 (65,535 less two headers), which bounds a segmented message as a whole.
const MAX_BYTES: usize = 65_507;

/// Slices in one message (`UIO_MAXIOV`).
const MAX_PIECES: usize = 1_024;

/// The datagrams of a segmented message: 64 before Linux 6.9, 128 since (`UDP_MAX_SEGMENTS`); one less, because older kernels
/// count the UDP header against the limit and refuse a message that is just full.
pub const MAX_SEGMENTS: usize = 63;

/// Part of a message's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece {
    /// A range of the batch's packet buffer.
    Packet {
        /// In bytes from the buffer's start.
        start: usize,
        /// In bytes.
        len: usize,
    },
    /// A segment's header in the scratch space.
    Header {
        /// The superpacket, as it was pushed: an index into [`SendPlan::superpacket`].
        superpacket: usize,
        /// Which of its segments.
        index: usize,
    },
}

/// One or several datagrams to one peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// The peer.
    pub to: SocketAddr,
    /// Length in bytes of each datagram but the last, which may be shorter.
    pub segment: usize,
    /// Datagrams.
    pub count: usize,
    /// Bytes of all of them.
    pub bytes: usize,
    /// Its bytes, in [`SendPlan::pieces`].
    pub pieces: Range<usize>,
}

/// The messages of a batch, in order. Allocates while the largest batch so far grows, and never after.
#[derive(Debug, Default)]
pub struct SendPlan {
    runs: Vec<Run>,
    pieces: Vec<Piece>,
    superpackets: Vec<(Segments, usize)>,
    bytes: usize,
    /// Whether the next datagram may still join the last run.
    open: bool,
}

impl SendPlan {
    /// Starts the next batch.
    pub fn clear(&mut self) {
        self.runs.clear();
        self.pieces.clear();
        self.superpackets.clear();
        self.bytes = 0;
        self.open = false;
    }

    /// The messages so far.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// What the messages' bytes are made of.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// The superpacket that a [`Piece::Header`] belongs to, and where it begins in the packet buffer.
    pub fn superpacket(&self, index: usize) -> (Segments, usize) {
        self.superpackets[index]
    }

    /// Bytes in all messages.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Adds the packet of `len` bytes at `start` of the packet buffer. `merge`: it may share a message.
    #[inline]
    pub fn push_packet(&mut self, start: usize, len: usize, to: SocketAddr, merge: bool) {
        let contiguous = self.join(to, len, 1, merge);
        match self.pieces.last_mut() {
            Some(Piece::Packet {
                start: first,
                len: length,
            }) if contiguous && *first + *length == start => *length += len,
            _ => self.pieces.push(Piece::Packet { start, len }),
        }
        self.end_run();
    }

    /// Adds the segments of the superpacket at `start` of the packet buffer. `merge`: they may share messages.
    pub fn push_segments(&mut self, segments: &Segments, start: usize, to: SocketAddr, merge: bool) {
        let superpacket = self.superpackets.len();
        self.superpackets.push((*segments, start));
        for index in 0..segments.count() {
            let payload = segments.payload(index);
            self.join(to, segments.header_len() + payload.len(), 2, merge);
            self.pieces.push(Piece::Header { superpacket, index });
            self.pieces.push(Piece::Packet {
                start: start + payload.start,
                len: payload.len(),
            });
            self.end_run();
        }
    }

    /// Makes room for a datagram of `len` bytes in `pieces` pieces: at the end of the last run (true), or in a new one.
    #[inline]
    fn join(&mut self, to: SocketAddr, len: usize, pieces: usize, merge: bool) -> bool {
        self.bytes += len;
        let next = self.pieces.len();
        if let Some(run) = self.runs.last_mut()
            && self.open
            && merge
            && run.to == to
            && len <= run.segment
            && run.count < MAX_SEGMENTS
            && run.bytes + len <= MAX_BYTES
            && next - run.pieces.start + pieces <= MAX_PIECES
        {
            run.count += 1;
            run.bytes += len;
            // A shorter one can only be the last.
            self.open = len == run.segment;
            return true;
        }
        self.runs.push(Run {
            to,
            segment: len,
            count: 1,
            bytes: len,
            pieces: next..next,
        });
        // A message of empty datagrams would have none.
        self.open = merge && len > 0;
        false
    }

    #[inline]
    fn end_run(&mut self) {
        let end = self.pieces.len();
        if let Some(run) = self.runs.last_mut() {
            run.pieces.end = end;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        offload::{GsoKind, Headers, PartialChecksum, VirtioNetHdr, split},
        packet::build,
    };

    fn peer(number: u8) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, number], 8285))
    }

    /// Length and number of datagrams of each message, and of how many pieces it is made.
    fn shape(plan: &SendPlan) -> Vec<(usize, usize, usize)> {
        plan.runs()
            .iter()
            .map(|run| (run.segment, run.count, run.pieces.len()))
            .collect()
    }

    /// Packets of these lengths, one behind another, each for a peer.
    fn plan_of(packets: &[(usize, u8)]) -> SendPlan {
        let mut plan = SendPlan::default();
        let mut at = 64;
        for (len, to) in packets {
            plan.push_packet(at, *len, peer(*to), true);
            at += len;
        }
        plan
    }

    /// A superpacket with `payload` bytes in segments of `size`, cut.
    fn superpacket(headers: &mut Headers, payload: usize, size: u16) -> Segments {
        let ip = build::Ipv4::new([10, 5, 1, 2].into(), [10, 5, 2, 2].into());
        let mut packet = ip.udp(1, 2, &vec![7; payload]);
        let checksum = Some(PartialChecksum { start: 20, offset: 6 });
        let header = VirtioNetHdr {
            gso: GsoKind::UdpL4,
            gso_size: size,
            checksum,
            ..VirtioNetHdr::default()
        };
        split::plan(&header, &mut packet, headers).unwrap()
    }

    #[test]
    fn equal_packets_to_one_peer_are_one_message_of_one_piece() {
        assert_eq!(shape(&plan_of(&[(92, 1); 10])), [(92, 10, 1)]);
    }

    #[test]
    fn a_shorter_packet_ends_a_message_and_a_longer_one_begins_another() {
        assert_eq!(
            shape(&plan_of(&[(92, 1), (92, 1), (60, 1), (60, 1), (92, 1)])),
            [(92, 3, 1), (60, 1, 1), (92, 1, 1)]
        );
    }

    #[test]
    fn another_peer_begins_another_message() {
        assert_eq!(shape(&plan_of(&[(92, 1), (92, 2), (92, 1)])), [(92, 1, 1); 3]);
    }

    #[test]
    fn a_message_holds_no_more_than_the_kernel_takes() {
        assert_eq!(shape(&plan_of(&[(92, 1); 70])), [(92, 63, 1), (92, 7, 1)]);
        let long = plan_of(&[(1_472, 1); 50]);
        assert_eq!(shape(&long), [(1_472, 44, 1), (1_472, 6, 1)]);
        assert!(long.runs().iter().all(|run| run.bytes <= MAX_BYTES));
    }

    #[test]
    fn without_merging_each_packet_is_a_message() {
        let mut plan = SendPlan::default();
        for index in 0..3 {
            plan.push_packet(64 + index * 92, 92, peer(1), false);
        }
        plan.push_packet(64 + 3 * 92, 92, peer(1), true);
        assert_eq!(shape(&plan), [(92, 1, 1); 4]);
    }

    #[test]
    fn superpackets_that_follow_one_another_share_messages() {
        let (mut headers, mut plan) = (Headers::default(), SendPlan::default());
        // 45 segments of 1,472 bytes each: one more than a message takes.
        for start in [64, 70_000] {
            let segments = superpacket(&mut headers, 45 * 1_444, 1_444);
            plan.push_segments(&segments, start, peer(1), true);
        }
        assert_eq!(shape(&plan), [(1_472, 44, 88), (1_472, 44, 88), (1_472, 2, 4)]);
        assert_eq!(plan.bytes(), 90 * 1_472);
    }

    #[test]
    fn a_superpacket_with_a_short_end_closes_its_message() {
        let (mut headers, mut plan) = (Headers::default(), SendPlan::default());
        for start in [64, 8_000] {
            plan.push_segments(&superpacket(&mut headers, 2_500, 1_000), start, peer(1), true);
        }
        assert_eq!(shape(&plan), [(1_028, 3, 6), (1_028, 3, 6)]);
    }

    proptest! {
        #[test]
        fn every_byte_is_sent_once_and_in_order(
            packets in proptest::collection::vec((prop_oneof![Just(60usize), Just(92), 1usize..3_000], 1u8..4), 0..300),
        ) {
            let plan = plan_of(&packets);
            let mut next = 64;
            for piece in plan.pieces() {
                let Piece::Packet { start, len } = *piece else { panic!("no headers were pushed") };
                prop_assert_eq!(start, next);
                next += len;
            }
            prop_assert_eq!(next - 64, packets.iter().map(|(len, _)| len).sum::<usize>());
            // Cut at its segment length, each message gives its packets back.
            let cut: Vec<(usize, SocketAddr)> = plan.runs().iter().flat_map(|run| {
                (0..run.count).map(|index| {
                    (run.segment.min(run.bytes - index * run.segment), run.to)
                })
            }).collect();
            let pushed: Vec<(usize, SocketAddr)> = packets.iter().map(|(len, to)| (*len, peer(*to))).collect();
            prop_assert_eq!(cut, pushed);
        }
    }
}
