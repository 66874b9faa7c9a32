//! Which flows are bulk, so that others need not wait behind them: flows that send little have a queue of the device that bulk does
//! not fill.
//!
//! Who sends by TCP fills the device's queue up to its window, megabytes that lie there for milliseconds, since to TCP a packet
//! has left once it is in the queue. The kernel puts what a flow sends into the queue that the flow's packets from the other side
//! were last written to (`tun_automq_select_queue`), and so a worker chooses by writing. A flow that is new, or that nothing comes
//! back to, is in a queue by its hash.
//!
//! # Order
//! A flow's packets must not overtake each other because some lie in the one queue and some in the other.
//! - From the queue for sparse flows to that for bulk: what lies in the former is read before anything else
//!   ([`PacketSource::start`](super::io::PacketSource::start)).
//! - Back: when the flow has sent nothing for a quarter of a second, or next to nothing lately and never much. Where a full queue
//!   lasts longer, on a slow way out, it may overtake itself then, once.
//! - A flow that is not known is taken for a new one, of which nothing is under way; but not while there may be packets of any flow
//!   in the queue for bulk that came before this worker did.
//!
//! The kernel moves flows, too: what nothing has been written to for three seconds, or has found no place in its table of 4,096,
//! goes by its hash again, and fragments do so by another one than whole packets. Flows that share a slot are one flow here.

use std::{cell::Cell, time::Duration};

use crate::packet::{IpPacket, flow};

/// How much a flow sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Class {
    /// Little: questions and answers, keystrokes, acknowledgements.
    Sparse,
    /// As much as it can, or nearly.
    #[default]
    Bulk,
}

/// Flows are told apart by this many bits of their hash. 12 KiB for each worker; a sparse flow shares its slot with one of a
/// hundred bulk flows once in ten.
const BITS: u32 = 10;

/// What a flow has sent is halved each time that so much time has gone.
const TICK: Duration = Duration::from_millis(16);

/// From so many bytes on a flow is bulk: of one that sends evenly, from 8 Mbit/s on.
const MOST_SPARSE: u32 = 32 << 10;

/// After so many ticks in which it has sent nothing, a flow is as good as a new one.
const QUIET: u32 = 16;

/// What a flow may have sent for all of it to have been read: a question and another one.
const FEW: u32 = 2 << 10;

/// How flows can be moved between a worker's queues.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Moves {
    /// Not at all, if they are known: packets of two queues come in no certain order.
    Never,
    /// To the queue for bulk: there may be packets in it, of any flow, that came before the worker did.
    ToBulk,
    /// Both ways.
    #[default]
    Both,
}

/// What the flows that this worker has carried from the device have sent lately.
#[derive(Debug)]
pub(super) struct Flows {
    slots: Box<[Cell<Slot>]>,
    now: u32,
    moves: Moves,
    /// Whether a flow was moved to the queue for bulk since that was last asked.
    moved: Cell<bool>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    /// The tick in which it has sent last.
    last: u32,
    /// What it has sent, in bytes, fading.
    sent: u32,
    /// Whether that was much since it was last quiet.
    bulk: bool,
    /// The class whose queue it has come by last, or is to come by.
    at: Class,
}

impl Flows {
    pub(super) fn new() -> Self {
        Self {
            slots: vec![Cell::default(); 1 << BITS].into_boxed_slice(),
            now: 0,
            moves: Moves::default(),
            moved: Cell::new(false),
        }
    }

    /// Goes on so long after the host's start.
    pub(super) fn set_time(&mut self, uptime: Duration) {
        // After two years it begins anew, which the differences do not mind.
        self.now = (uptime.as_millis() / TICK.as_millis()) as u32;
    }

    /// Whether a flow was moved to the queue for bulk since that was last asked: all that lies in the other one is to be read first.
    pub(super) fn take_moved(&mut self) -> bool {
        self.moved.take()
    }

    /// Takes in how flows can be moved from now on.
    pub(super) fn set_moves(&mut self, moves: Moves) {
        self.moves = moves;
    }

    /// Takes in that the flow with this hash has sent so many bytes, by the queue for a class.
    #[inline]
    pub(super) fn sent(&mut self, hash: u32, bytes: usize, from: Class) {
        let now = self.now;
        let slot = self.slots[index(hash)].get_mut();
        let gone = now.wrapping_sub(slot.last);
        if gone >= QUIET {
            *slot = Slot {
                at: from,
                ..Slot::default()
            };
        }
        // A packet has at most 64 KiB.
        slot.sent = slot.sent.unbounded_shr(gone).saturating_add(bytes as u32);
        slot.bulk |= slot.sent > MOST_SPARSE;
        slot.last = now;
        // What a flow that was moved to bulk has left behind comes from where it was; and one that the kernel puts elsewhere all the
        // same must not be moved again and again.
        if !(slot.bulk && slot.at == Class::Bulk) {
            slot.at = from;
        }
    }

    /// The class of the flow that this packet belongs to, in whichever direction: the flow is to come by the queue for it from now
    /// on.
    #[inline]
    pub(super) fn class(&self, packet: &[u8]) -> Class {
        match IpPacket::parse(packet) {
            Ok(view) => self.class_of(flow::hash(&view)),
            Err(_) => Class::Sparse,
        }
    }

    /// As [`class`](Self::class), of the flow with this hash.
    #[inline]
    pub(super) fn class_of(&self, hash: u32) -> Class {
        let cell = &self.slots[index(hash)];
        let mut slot = cell.get();
        let gone = self.now.wrapping_sub(slot.last);
        if gone >= QUIET {
            return if self.moves == Moves::ToBulk {
                self.moved.set(true);
                Class::Bulk
            } else {
                Class::Sparse
            };
        }
        match (slot.at, self.moves) {
            (Class::Sparse, Moves::ToBulk | Moves::Both) if slot.bulk => {
                slot.at = Class::Bulk;
                self.moved.set(true);
            }
            (Class::Bulk, Moves::Both) if !slot.bulk && slot.sent.unbounded_shr(gone) <= FEW => slot.at = Class::Sparse,
            _ => return slot.at,
        }
        cell.set(slot);
        slot.at
    }
}

#[inline]
fn index(hash: u32) -> usize {
    // The higher bits are the better ones.
    (hash >> (u32::BITS - BITS)) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::build;

    /// So long after its start that no flow is known to a host any more.
    const LATER: Duration = Duration::from_secs(1_000);

    const HOSTS: [[u8; 4]; 2] = [[10, 5, 1, 2], [10, 5, 2, 2]];

    fn packet(port: u16) -> Vec<u8> {
        build::Ipv4::new(HOSTS[0].into(), HOSTS[1].into()).udp(port, 53, b"x")
    }

    fn answer(port: u16) -> Vec<u8> {
        build::Ipv4::new(HOSTS[1].into(), HOSTS[0].into()).udp(53, port, b"x")
    }

    fn send_by(flows: &mut Flows, port: u16, bytes: usize, from: Class) {
        let packet = packet(port);
        flows.sent(flow::hash(&IpPacket::parse(&packet).unwrap()), bytes, from);
    }

    fn send(flows: &mut Flows, port: u16, bytes: usize) {
        send_by(flows, port, bytes, Class::Sparse);
    }

    #[test]
    fn a_flow_that_has_sent_much_is_bulk_in_both_directions_until_it_is_quiet() {
        let mut flows = Flows::new();
        let at = |ticks: u32| LATER + ticks * TICK;
        flows.set_time(at(0));
        assert_eq!(flows.class(&answer(1)), Class::Sparse);
        send(&mut flows, 1, 32 << 10);
        assert_eq!(flows.class(&answer(1)), Class::Sparse);
        send(&mut flows, 1, 1);
        assert_eq!(flows.class(&answer(1)), Class::Bulk);
        assert_eq!(flows.class(&packet(1)), Class::Bulk);
        assert_eq!(flows.class(&answer(2)), Class::Sparse, "another flow");
        // A little keeps it what it is.
        flows.set_time(at(15));
        send(&mut flows, 1, 1);
        flows.set_time(at(30));
        assert_eq!(flows.class(&answer(1)), Class::Bulk);
        flows.set_time(at(31));
        assert_eq!(flows.class(&answer(1)), Class::Sparse);
        send(&mut flows, 1, 1);
        assert_eq!(flows.class(&answer(1)), Class::Sparse);
    }

    #[test]
    fn a_flow_is_bulk_from_eight_megabits_a_second_on() {
        for (bytes, class) in [(15 << 10, Class::Sparse), (17 << 10, Class::Bulk)] {
            let mut flows = Flows::new();
            for tick in 0..1_000 {
                flows.set_time(tick * TICK);
                for _ in 0..16 {
                    send(&mut flows, 1, bytes / 16);
                }
            }
            assert_eq!(flows.class(&answer(1)), class, "{bytes} a tick");
        }
    }

    #[test]
    fn a_flow_that_leaves_the_queue_for_sparse_flows_has_it_read_first() {
        let mut flows = Flows::new();
        flows.set_time(LATER);
        send(&mut flows, 1, 64 << 10);
        assert!(!flows.take_moved());
        assert_eq!(flows.class(&answer(1)), Class::Bulk);
        assert!(flows.take_moved());
        // It is where it belongs.
        assert_eq!(flows.class(&answer(1)), Class::Bulk);
        assert!(!flows.take_moved());
        for from in [Class::Sparse, Class::Bulk, Class::Sparse] {
            send_by(&mut flows, 1, 1, from);
            assert_eq!(flows.class(&answer(1)), Class::Bulk);
            assert!(!flows.take_moved(), "only once");
        }
    }

    #[test]
    fn one_that_the_kernel_has_put_to_bulk_stays_there_while_it_sends_more_than_a_question() {
        let mut flows = Flows::new();
        send_by(&mut flows, 2, 100, Class::Bulk);
        assert_eq!(flows.class(&answer(2)), Class::Sparse);
        send_by(&mut flows, 3, 3 << 10, Class::Bulk);
        assert_eq!(flows.class(&answer(3)), Class::Bulk);
        flows.set_time(TICK);
        assert_eq!(flows.class(&answer(3)), Class::Sparse);
        assert!(!flows.take_moved());
    }

    #[test]
    fn flows_are_moved_only_as_the_queues_allow() {
        let classes = |moves| {
            let mut flows = Flows::new();
            flows.set_time(LATER);
            flows.set_moves(moves);
            send(&mut flows, 1, 64 << 10);
            send_by(&mut flows, 2, 100, Class::Bulk);
            [1, 2, 3].map(|port| (flows.class(&answer(port)), flows.take_moved()))
        };
        let (bulk, sparse) = ((Class::Bulk, false), (Class::Sparse, false));
        let to_bulk = (Class::Bulk, true);
        assert_eq!(classes(Moves::Both), [to_bulk, sparse, sparse]);
        assert_eq!(classes(Moves::ToBulk), [to_bulk, bulk, to_bulk]);
        assert_eq!(classes(Moves::Never), [sparse, bulk, sparse]);
    }

    #[test]
    fn no_number_of_bytes_is_too_large_and_what_is_no_packet_is_sparse() {
        let mut flows = Flows::new();
        for _ in 0..40_000 {
            send(&mut flows, 1, 65_535);
        }
        assert_eq!(flows.class(&answer(1)), Class::Bulk);
        assert_eq!(flows.class(&[]), Class::Sparse);
    }
}
