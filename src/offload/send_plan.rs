//! What one `sendmmsg` carries: packet → run → message. Packets of one length to one destination become one segmented
//! message (`UDP_SEGMENT`), whichever superpackets they were cut from and whatever goes elsewhere between them. Pure:
//! positions, no bytes.

use super::Segments;

/// The payload of a UDP datagram over IPv4 (65,535 less two headers), which bounds a segmented message as a whole.
const MAX_BYTES: usize = 65_507;

/// Slices in one message (`UIO_MAXIOV`).
const MAX_PIECES: usize = 1_024;

/// The datagrams of a segmented message: 64 before Linux 6.9, 128 since (`UDP_MAX_SEGMENTS`); one less, because older kernels
/// count the UDP header against the limit and refuse a message that is just full.
pub const MAX_SEGMENTS: usize = 63;

/// How many datagrams, and bytes, are kept back from a batch at most: they are copied, which costs less than a message of their own
/// does at this end and at the other.
const MAX_KEPT: usize = 8;
const MAX_KEPT_BYTES: usize = 12 << 10;

/// How many of the latest runs a packet is compared with. More destinations than that at once only merge less.
const LOOK_BACK: usize = 16;

/// End of a list of pieces.
const NONE: u32 = u32::MAX;

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
    /// All that was [kept back](SendPlan::keep_back) from the batch before.
    Kept,
}

/// One or several datagrams to one destination. `L` says which.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run<L> {
    /// Where to.
    pub lane: L,
    /// Length in bytes of each datagram but the last, which may be shorter.
    pub segment: usize,
    /// Datagrams.
    pub count: usize,
    /// Bytes of all of them.
    pub bytes: usize,
    /// How many pieces its bytes are made of: [`SendPlan::pieces`].
    pub pieces: usize,
    /// Whether the next datagram may still join.
    open: bool,
    first: u32,
    last: u32,
}

/// The messages of a batch, in order. Allocates while the largest batch so far grows, and never after.
///
/// Packets of one lane leave in the order in which they came; those of different lanes may overtake one another.
#[derive(Debug)]
pub struct SendPlan<L> {
    runs: Vec<Run<L>>,
    /// The pieces of all runs, each with the next one of its run.
    pieces: Vec<(Piece, u32)>,
    superpackets: Vec<(Segments, usize)>,
    bytes: usize,
}

impl<L> Default for SendPlan<L> {
    fn default() -> Self {
        Self {
            runs: Vec::new(),
            pieces: Vec::new(),
            superpackets: Vec::new(),
            bytes: 0,
        }
    }
}

impl<L: Copy + PartialEq> SendPlan<L> {
    /// Starts the next batch.
    pub fn clear(&mut self) {
        self.runs.clear();
        self.pieces.clear();
        self.superpackets.clear();
        self.bytes = 0;
    }

    /// The messages so far.
    pub fn runs(&self) -> &[Run<L>] {
        &self.runs
    }

    /// What the bytes of `run`, one of this plan's, are made of.
    pub fn pieces(&self, run: &Run<L>) -> impl Iterator<Item = Piece> + Clone + use<'_, L> {
        let mut next = run.first;
        (0..run.pieces).map_while(move |_| {
            let (piece, after) = *self.pieces.get(next as usize)?;
            next = after;
            Some(piece)
        })
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
    pub fn push_packet(&mut self, start: usize, len: usize, lane: L, merge: bool) {
        let (run, joined) = self.run_for(lane, len, 1, merge);
        let last = self.runs[run].last as usize;
        match self.pieces.get_mut(last) {
            Some((
                Piece::Packet {
                    start: first,
                    len: length,
                },
                _,
            )) if joined && *first + *length == start => *length += len,
            _ => self.add_piece(run, Piece::Packet { start, len }),
        }
    }

    /// Adds the segments of the superpacket at `start` of the packet buffer. `merge`: they may share messages.
    pub fn push_segments(&mut self, segments: &Segments, start: usize, lane: L, merge: bool) {
        let superpacket = self.superpackets.len();
        self.superpackets.push((*segments, start));
        for index in 0..segments.count() {
            let payload = segments.payload(index);
            let (run, _) = self.run_for(lane, segments.header_len() + payload.len(), 2, merge);
            self.add_piece(run, Piece::Header { superpacket, index });
            let piece = Piece::Packet {
                start: start + payload.start,
                len: payload.len(),
            };
            self.add_piece(run, piece);
        }
    }

    /// Whether the last run is what the one before it had no room for.
    pub fn is_overflowing(&self) -> bool {
        let [.., before, last] = &self.runs[..] else {
            return false;
        };
        before.open && before.lane == last.lane && before.segment == last.segment
    }

    /// Takes the last run out of the plan if it would be a short message, which the next batch can go on with, behind others. What
    /// was kept back once is not again.
    pub fn keep_back(&mut self) -> Option<Run<L>> {
        let short = |run: &mut Run<L>| run.open && run.count <= MAX_KEPT && run.bytes <= MAX_KEPT_BYTES;
        if self.runs.len() < 2 {
            return None;
        }
        let kept = self.runs.pop_if(short)?;
        self.bytes -= kept.bytes;
        Some(kept)
    }

    /// Begins a batch with what was kept back from the one before.
    pub fn go_on(&mut self, kept: &Run<L>) {
        self.bytes += kept.bytes;
        self.runs.push(Run {
            pieces: 0,
            first: NONE,
            last: NONE,
            ..kept.clone()
        });
        self.add_piece(self.runs.len() - 1, Piece::Kept);
    }

    /// The run for a datagram of `len` bytes in `pieces` pieces: the lane's latest one if it may join that (true), or a new one.
    #[inline]
    fn run_for(&mut self, lane: L, len: usize, pieces: usize, merge: bool) -> (usize, bool) {
        self.bytes += len;
        let end = self.runs.len();
        let recent = end.saturating_sub(LOOK_BACK);
        // Only the lane's latest will do: in an earlier one the datagram would overtake.
        let latest = self.runs[recent..].iter().rposition(|run| run.lane == lane);
        if let Some(at) = latest.map(|at| recent + at) {
            let run = &mut self.runs[at];
            if run.open
                && merge
                && len <= run.segment
                && run.count < MAX_SEGMENTS
                && run.bytes + len <= MAX_BYTES
                && run.pieces + pieces <= MAX_PIECES
            {
                run.count += 1;
                run.bytes += len;
                // A shorter one can only be the last.
                run.open = len == run.segment;
                return (at, true);
            }
        }
        self.runs.push(Run {
            lane,
            segment: len,
            count: 1,
            bytes: len,
            pieces: 0,
            // A message of empty datagrams would have none.
            open: merge && len > 0,
            first: NONE,
            last: NONE,
        });
        (end, false)
    }

    #[inline]
    fn add_piece(&mut self, run: usize, piece: Piece) {
        // A batch has far fewer than 2^32 pieces.
        let index = self.pieces.len() as u32;
        self.pieces.push((piece, NONE));
        let run = &mut self.runs[run];
        match self.pieces.get_mut(run.last as usize) {
            Some((_, next)) => *next = index,
            None => run.first = index,
        }
        run.last = index;
        run.pieces += 1;
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

    /// Length and number of datagrams of each message, and of how many pieces it is made.
    fn shape(plan: &SendPlan<u8>) -> Vec<(usize, usize, usize)> {
        plan.runs()
            .iter()
            .map(|run| (run.segment, run.count, run.pieces))
            .collect()
    }

    /// Packets of these lengths, one behind another, each for a lane.
    fn plan_of(packets: &[(usize, u8)]) -> SendPlan<u8> {
        let mut plan = SendPlan::default();
        let mut at = 64;
        for (len, to) in packets {
            plan.push_packet(at, *len, *to, true);
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
    fn each_lane_has_its_messages_and_packets_between_do_not_part_them() {
        let plan = plan_of(&[(92, 1), (92, 2), (92, 1), (92, 1), (92, 2)]);
        assert_eq!(shape(&plan), [(92, 3, 2), (92, 2, 2)]);
        let starts = |run: usize| -> Vec<usize> {
            let pieces = plan.pieces(&plan.runs()[run]);
            pieces
                .map(|piece| match piece {
                    Piece::Packet { start, .. } => start,
                    other => panic!("{other:?} was not pushed"),
                })
                .collect()
        };
        assert_eq!((starts(0), starts(1)), (vec![64, 248], vec![156, 432]));
    }

    #[test]
    fn a_lane_whose_latest_message_is_closed_does_not_fall_back_to_an_earlier_one() {
        assert_eq!(
            shape(&plan_of(&[(92, 1), (60, 1), (92, 1), (92, 2), (92, 1)])),
            [(92, 2, 1), (92, 2, 2), (92, 1, 1)]
        );
    }

    #[test]
    fn more_lanes_at_once_than_are_looked_at_merge_less_and_lose_nothing() {
        let lanes: Vec<(usize, u8)> = (0..2 * LOOK_BACK).map(|at| (92, at as u8)).collect();
        let plan = plan_of(&lanes.repeat(2));
        assert_eq!(shape(&plan), [(92, 1, 1)].repeat(4 * LOOK_BACK));
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
        let mut plan = SendPlan::<u8>::default();
        for index in 0..3 {
            plan.push_packet(64 + index * 92, 92, 1, false);
        }
        plan.push_packet(64 + 3 * 92, 92, 1, true);
        assert_eq!(shape(&plan), [(92, 1, 1); 4]);
    }

    #[test]
    fn superpackets_that_follow_one_another_share_messages() {
        let (mut headers, mut plan) = (Headers::default(), SendPlan::<u8>::default());
        // 45 segments of 1,472 bytes each: one more than a message takes.
        for start in [64, 70_000] {
            let segments = superpacket(&mut headers, 45 * 1_444, 1_444);
            plan.push_segments(&segments, start, 1, true);
        }
        assert_eq!(shape(&plan), [(1_472, 44, 88), (1_472, 44, 88), (1_472, 2, 4)]);
        assert_eq!(plan.bytes(), 90 * 1_472);
    }

    #[test]
    fn a_short_end_is_kept_back_once_and_joined_by_the_next_batch() {
        let mut plan = plan_of(&[(92, 1); 65]);
        let kept = plan.keep_back().unwrap();
        assert_eq!((shape(&plan), plan.bytes()), (vec![(92, 63, 1)], 63 * 92));
        assert_eq!((kept.count, kept.bytes), (2, 184));
        plan.clear();
        plan.go_on(&kept);
        assert_eq!(plan.bytes(), 184);
        let alone = plan.keep_back();
        assert_eq!(alone, None, "it has waited long enough");
        for index in 0..62 {
            plan.push_packet(64 + index * 92, 92, 1, true);
        }
        assert_eq!(shape(&plan), [(92, 63, 2), (92, 1, 1)]);
        let pieces: Vec<_> = plan.pieces(&plan.runs()[0]).collect();
        assert_eq!(
            pieces,
            [
                Piece::Kept,
                Piece::Packet {
                    start: 64,
                    len: 61 * 92
                }
            ]
        );
    }

    #[test]
    fn what_nothing_can_join_or_is_no_short_message_is_not_kept_back() {
        let end = |packets: &[(usize, u8)]| plan_of(packets).keep_back().map(|run| run.count);
        assert_eq!(end(&[(92, 1); 63 + MAX_KEPT]), Some(MAX_KEPT));
        assert_eq!(end(&[(92, 1); 63 + MAX_KEPT + 1]), None);
        assert_eq!(end(&[(92, 1); MAX_KEPT]), None, "all there is");
        assert_eq!(end(&[(92, 2), (92, 1), (60, 1)]), None, "a shorter one ends a message");
        assert_eq!(end(&[(92, 2), (92, 1)]), Some(1));
        assert_eq!(end(&[(8_972, 1); 14]), None, "a full message of few datagrams");
    }

    #[test]
    fn a_superpacket_with_a_short_end_closes_its_message() {
        let (mut headers, mut plan) = (Headers::default(), SendPlan::<u8>::default());
        for start in [64, 8_000] {
            plan.push_segments(&superpacket(&mut headers, 2_500, 1_000), start, 1, true);
        }
        assert_eq!(shape(&plan), [(1_028, 3, 6), (1_028, 3, 6)]);
    }

    proptest! {
        #[test]
        fn every_packet_is_sent_once_and_in_its_lanes_order(
            packets in proptest::collection::vec((prop_oneof![Just(60usize), Just(92), 1usize..3_000], 1u8..6), 0..300),
            cut in 0usize..300,
        ) {
            let (first, second) = packets.split_at(cut.min(packets.len()));
            // Where each datagram begins, its length and lane, in the order of the messages.
            let mut sent = Vec::new();
            let bytes_of = |plan: &SendPlan<u8>, run: &Run<u8>, kept: &[usize]| -> Vec<usize> {
                let bytes_of_piece = |piece| match piece {
                    Piece::Packet { start, len } => (start..start + len).collect(),
                    Piece::Kept => kept.to_vec(),
                    other => panic!("{other:?} was not pushed"),
                };
                plan.pieces(run).flat_map(bytes_of_piece).collect()
            };
            let mut send = |plan: &SendPlan<u8>, kept: &[usize]| -> Result<(), TestCaseError> {
                for run in plan.runs() {
                    let bytes = bytes_of(plan, run, kept);
                    prop_assert_eq!(bytes.len(), run.bytes);
                    let datagrams: Vec<&[usize]> = bytes.chunks(run.segment).collect();
                    prop_assert_eq!(datagrams.len(), run.count);
                    for datagram in datagrams {
                        prop_assert!(datagram.windows(2).all(|pair| pair[1] == pair[0] + 1), "one packet a datagram");
                        sent.push((datagram[0], datagram.len(), run.lane));
                    }
                }
                prop_assert_eq!(plan.runs().iter().map(|run| run.bytes).sum::<usize>(), plan.bytes());
                Ok(())
            };
            let mut plan = plan_of(first);
            let kept = plan.keep_back();
            let kept_bytes = kept.as_ref().map_or_else(Vec::new, |run| bytes_of(&plan, run, &[]));
            send(&plan, &[])?;
            plan.clear();
            if let Some(kept) = &kept {
                plan.go_on(kept);
            }
            let mut at = 64 + first.iter().map(|(len, _)| len).sum::<usize>();
            for (len, lane) in second {
                plan.push_packet(at, *len, *lane, true);
                at += len;
            }
            send(&plan, &kept_bytes)?;
            for lane in 1..6 {
                let of_lane: Vec<_> = sent.iter().filter(|(.., to)| *to == lane).map(|(at, ..)| *at).collect();
                prop_assert!(of_lane.is_sorted());
            }
            sent.sort();
            let mut at = 64;
            let pushed: Vec<_> = packets.iter().map(|(len, to)| { at += len; (at - len, *len, *to) }).collect();
            prop_assert_eq!(sent, pushed);
        }
    }
}
