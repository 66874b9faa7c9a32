//! Which flows are bulk, so that others need not wait behind them: flows that send little have a queue of the device that bulk does
//! not fill.
//!
//! Who sends by TCP fills the device's queue up to its window, megabytes that lie there for milliseconds, since to TCP a packet
//! has left once it is in the queue. The kernel puts what a flow sends into the queue that the flow's packets from the other side
//! were last written to (`tun_automq_select_queue`), and so a worker chooses by writing. A flow that is new, or that nothing comes
//! back to, is in a queue by its hash.
//!
//! # Order
//! A flow is moved only when none of its packets can lie in a queue that is read after the other one: from that for sparse flows,
//! which is read first, when that was read to its end; from that for bulk when it has sent nothing for longer than packets lie
//! there, or next to nothing.

use std::time::Duration;

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

/// After so many ticks in which it has sent nothing, a flow has no packet in a queue, and is as good as a new one.
const QUIET: u32 = 16;

/// What a flow may have sent for all of it to have been read: a question and another one.
const FEW: u32 = 2 << 10;

/// What the flows that this worker has carried from the device have sent lately.
#[derive(Debug)]
pub(super) struct Flows {
    slots: Box<[Slot]>,
    now: u32,
    /// Whether more of sparse flows waits than was read.
    behind: bool,
}

#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    /// The tick in which it has sent last.
    last: u32,
    /// What it has sent, in bytes, fading.
    sent: u32,
    /// Whether that was ever much.
    bulk: bool,
    /// The class whose queue it has come by.
    from: Class,
}

impl Flows {
    pub(super) fn new() -> Self {
        Self {
            slots: vec![Slot::default(); 1 << BITS].into_boxed_slice(),
            now: 0,
            behind: false,
        }
    }

    /// Begins a batch, so long after the host's start.
    pub(super) fn begin(&mut self, uptime: Duration) {
        // Where the ticks begin anew after two years, some flows' class is a wrong one for 256 ms.
        self.now = (uptime.as_millis() / TICK.as_millis()) as u32;
    }

    /// Takes in whether more packets of sparse flows are waiting than were read.
    pub(super) fn set_behind(&mut self, behind: bool) {
        self.behind = behind;
    }

    /// Takes in that the flow with this hash has sent so many bytes, by the queue for a class.
    #[inline]
    pub(super) fn sent(&mut self, hash: u32, bytes: usize, from: Class) {
        let now = self.now;
        let slot = &mut self.slots[index(hash)];
        let gone = now.wrapping_sub(slot.last);
        if gone >= QUIET {
            *slot = Slot::default();
        }
        // A packet has at most 64 KiB.
        slot.sent = slot.sent.unbounded_shr(gone).saturating_add(bytes as u32);
        slot.bulk |= slot.sent > MOST_SPARSE;
        (slot.last, slot.from) = (now, from);
    }

    /// The class of the flow that this packet belongs to, in whichever direction: the flow is to come by the queue for it from now
    /// on.
    #[inline]
    pub(super) fn class(&self, packet: &[u8]) -> Class {
        let Ok(view) = IpPacket::parse(packet) else {
            return Class::Sparse;
        };
        let slot = &self.slots[index(flow::hash(&view))];
        let gone = self.now.wrapping_sub(slot.last);
        let bulk = gone < QUIET
            && match slot.from {
                Class::Sparse => slot.bulk && !self.behind,
                Class::Bulk => slot.bulk || slot.sent.unbounded_shr(gone) > FEW,
            };
        if bulk { Class::Bulk } else { Class::Sparse }
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
        let at = |ticks: u32| Duration::from_secs(1_000) + ticks * TICK;
        flows.begin(at(0));
        assert_eq!(flows.class(&answer(1)), Class::Sparse);
        send(&mut flows, 1, 32 << 10);
        assert_eq!(flows.class(&answer(1)), Class::Sparse);
        send(&mut flows, 1, 1);
        assert_eq!(flows.class(&answer(1)), Class::Bulk);
        assert_eq!(flows.class(&packet(1)), Class::Bulk);
        assert_eq!(flows.class(&answer(2)), Class::Sparse, "another flow");
        // A little keeps it what it is.
        flows.begin(at(15));
        send(&mut flows, 1, 1);
        flows.begin(at(30));
        assert_eq!(flows.class(&answer(1)), Class::Bulk);
        flows.begin(at(31));
        assert_eq!(flows.class(&answer(1)), Class::Sparse);
        send(&mut flows, 1, 1);
        assert_eq!(flows.class(&answer(1)), Class::Sparse);
    }

    #[test]
    fn a_flow_is_bulk_from_eight_megabits_a_second_on() {
        for (bytes, class) in [(15 << 10, Class::Sparse), (17 << 10, Class::Bulk)] {
            let mut flows = Flows::new();
            for tick in 0..1_000 {
                flows.begin(tick * TICK);
                for _ in 0..16 {
                    send(&mut flows, 1, bytes / 16);
                }
            }
            assert_eq!(flows.class(&answer(1)), class, "{bytes} a tick");
        }
    }

    #[test]
    fn a_flow_does_not_overtake_itself_when_it_is_moved() {
        let mut flows = Flows::new();
        flows.begin(Duration::ZERO);
        send(&mut flows, 1, 64 << 10);
        flows.set_behind(true);
        assert_eq!(flows.class(&answer(1)), Class::Sparse, "some of it may still be there");
        flows.set_behind(false);
        assert_eq!(flows.class(&answer(1)), Class::Bulk);
        // One that the kernel has put to bulk stays there while it sends more than a question.
        send_by(&mut flows, 2, 100, Class::Bulk);
        assert_eq!(flows.class(&answer(2)), Class::Sparse);
        send_by(&mut flows, 3, 3 << 10, Class::Bulk);
        assert_eq!(flows.class(&answer(3)), Class::Bulk);
        flows.begin(TICK);
        assert_eq!(flows.class(&answer(3)), Class::Sparse);
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
