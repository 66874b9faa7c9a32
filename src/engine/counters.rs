//! What a worker counts. Each worker writes its own; anyone reads at any time without stopping it.

use std::{io, sync::atomic::Ordering::Relaxed, time::Duration};

use nix::time::{ClockId, clock_gettime};

use super::shared::{AtomicU64, OnceLock};
use super::snapshot::{PeerSnapshot, Traffic, WorkerSnapshot};
use crate::route_table::PeerId;

/// A number that one thread adds to and all may read.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `amount`. Only the owning worker may call this: a load and a store, without a locked instruction.
    #[inline]
    pub fn add(&self, amount: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_add(amount), Relaxed);
    }

    /// Puts `value` in place of what is there. Only the owning worker may call this.
    #[inline]
    pub fn set(&self, value: u64) {
        self.0.store(value, Relaxed);
    }

    /// The sum so far.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// Packets and their bytes, inner IP header included.
#[derive(Debug, Default)]
pub struct Flow {
    /// How many.
    pub packets: Counter,
    /// How long together.
    pub bytes: Counter,
}

impl Flow {
    /// Adds `packets` of `bytes` together.
    #[inline]
    pub fn add(&self, packets: usize, bytes: usize) {
        self.packets.add(packets as u64);
        self.bytes.add(bytes as u64);
    }

    fn add_traffic(&self, before: Traffic) {
        self.packets.add(before.packets);
        self.bytes.add(before.bytes);
    }
}

/// One worker's counters. Aligned so that no two workers write to one cache line (128 bytes: processors fetch lines in
/// pairs).
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Counters {
    /// TUN to UDP: packets that the socket took.
    pub sent: Flow,
    /// UDP to TUN: packets that the device took.
    pub received: Flow,
    /// Superpackets that the device handed over.
    pub superpackets_split: Counter,
    /// Packets of the MTU that they were cut into.
    pub segments: Counter,
    /// Messages that the socket took: a datagram or, segmented, several.
    pub messages_sent: Counter,
    /// Messages that the socket gave: a datagram or, merged by GRO, several.
    pub messages_received: Counter,
    /// Superpackets that the device took.
    pub superpackets_merged: Counter,
    /// Packets that they were made of.
    pub merges: Counter,
    /// ICMP errors sent.
    pub icmp_errors: Counter,
    drops: [Counter; Drop::ALL.len()],
    send_errors: [Counter; SEND_ERRORS.len() + 1],
    peers: PeerCounters,
}

impl Counters {
    /// Counts one dropped packet.
    #[inline]
    pub fn drop_one(&self, reason: Drop) {
        self.drop_several(reason, 1);
    }

    /// Counts dropped packets.
    #[inline]
    pub fn drop_several(&self, reason: Drop, packets: usize) {
        self.drops[reason as usize].add(packets as u64);
    }

    /// How many packets were dropped for `reason`.
    pub fn dropped(&self, reason: Drop) -> u64 {
        self.drops[reason as usize].get()
    }

    /// Counts packets that the socket did not take because of `error`, by reason and by error.
    pub fn drop_unsent(&self, packets: usize, error: &io::Error) {
        let full = error.kind() == io::ErrorKind::WouldBlock || error.raw_os_error() == Some(libc::ENOBUFS);
        self.drop_several(if full { Drop::QueueFull } else { Drop::SendFailed }, packets);
        let known = SEND_ERRORS
            .iter()
            .position(|(errno, _)| error.raw_os_error() == Some(*errno));
        self.send_errors[known.unwrap_or(SEND_ERRORS.len())].add(packets as u64);
    }

    /// Packets that the socket did not take, by the name of the error; `other` comes last.
    pub fn send_errors(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let names = SEND_ERRORS.iter().map(|(_, name)| *name).chain(["other"]);
        names.zip(self.send_errors.iter().map(Counter::get))
    }

    /// Adds what another has counted; only before a worker counts here.
    pub(super) fn add(&self, before: &WorkerSnapshot) {
        self.sent.add_traffic(before.sent);
        self.received.add_traffic(before.received);
        for (counter, before) in [
            (&self.superpackets_split, before.superpackets_split),
            (&self.segments, before.segments),
            (&self.messages_sent, before.messages_sent),
            (&self.messages_received, before.messages_received),
            (&self.superpackets_merged, before.superpackets_merged),
            (&self.merges, before.merges),
            (&self.icmp_errors, before.icmp_errors),
        ] {
            counter.add(before);
        }
        for (reason, packets) in &before.drops {
            self.drops[*reason as usize].add(*packets);
        }
        for (name, packets) in &before.send_errors {
            let known = SEND_ERRORS.iter().position(|(_, known)| known == name);
            self.send_errors[known.unwrap_or(SEND_ERRORS.len())].add(*packets);
        }
    }

    /// What was sent to a peer and received from it.
    #[inline]
    pub fn peer(&self, id: PeerId) -> &PeerTraffic {
        self.peers.of(id)
    }

    /// All peers that were ever counted for, in the order of their numbers, and some besides.
    pub fn peers(&self) -> impl Iterator<Item = (PeerId, &PeerTraffic)> {
        self.peers.iter()
    }
}

/// The errors of `sendmsg(2)` that tell of a network or a firewall rather than of a bug (udp(7), ip(7)).
const SEND_ERRORS: [(i32, &str); 10] = [
    (libc::EAGAIN, "EAGAIN"),
    (libc::ENOBUFS, "ENOBUFS"),
    (libc::EPERM, "EPERM"),
    (libc::EACCES, "EACCES"),
    (libc::ENETUNREACH, "ENETUNREACH"),
    (libc::EHOSTUNREACH, "EHOSTUNREACH"),
    (libc::ECONNREFUSED, "ECONNREFUSED"),
    (libc::EMSGSIZE, "EMSGSIZE"),
    (libc::EINVAL, "EINVAL"),
    (libc::EIO, "EIO"),
];

/// The error of this name, as [`Counters::send_errors`] names it: `other` for one that has none there.
pub fn send_error(name: &str) -> &'static str {
    let known = SEND_ERRORS.iter().find(|(_, known)| *known == name);
    known.map_or("other", |(_, name)| name)
}

/// What was exchanged with one peer.
#[derive(Debug, Default)]
pub struct PeerTraffic {
    /// Packets that the socket took for it.
    pub sent: Flow,
    /// Packets from it that were let in.
    pub received: Flow,
    /// When the last of those came: seconds of [`uptime`].
    pub last_received: Counter,
    /// Packets for it that the socket did not take.
    pub unsent: Counter,
    /// Packets from it that were not let in.
    pub refused: Counter,
}

impl PeerTraffic {
    /// As [`Counters::add`].
    pub(super) fn add(&self, before: &PeerSnapshot) {
        self.sent.add_traffic(before.sent);
        self.received.add_traffic(before.received);
        self.last_received
            .set(self.last_received.get().max(before.last_received));
        self.unsent.add(before.unsent);
        self.refused.add(before.refused);
    }
}

/// Seconds on the same clock: exact enough to tell how long a peer has been silent.
#[inline]
pub fn uptime() -> u64 {
    coarse_uptime().as_secs()
}

/// Time on a clock that never goes back, as of the kernel's last tick, some milliseconds ago: cheap enough to be read for each
/// batch (clock_gettime(2), `CLOCK_MONOTONIC_COARSE`).
#[inline]
pub fn coarse_uptime() -> Duration {
    // Linux has this clock since 2.6.32.
    clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE).map_or(Duration::ZERO, Duration::from)
}

/// Peers in one piece of [`PeerCounters`]: 14 KiB.
const PIECE: usize = 256;

/// The traffic of all peers, in pieces that are made when the first of their peers is counted for.
#[derive(Debug)]
struct PeerCounters {
    pieces: [OnceLock<Box<[PeerTraffic; PIECE]>>; PeerId::COUNT / PIECE],
}

impl Default for PeerCounters {
    fn default() -> Self {
        Self {
            pieces: [const { OnceLock::new() }; PeerId::COUNT / PIECE],
        }
    }
}

impl PeerCounters {
    #[inline]
    fn of(&self, id: PeerId) -> &PeerTraffic {
        let piece = &self.pieces[id.index() / PIECE];
        let piece = piece.get_or_init(|| Box::new(std::array::from_fn(|_| PeerTraffic::default())));
        &piece[id.index() % PIECE]
    }

    fn iter(&self) -> impl Iterator<Item = (PeerId, &PeerTraffic)> {
        self.pieces.iter().enumerate().flat_map(|(number, piece)| {
            let traffic = piece.get().into_iter().flat_map(|piece| piece.iter());
            traffic
                .enumerate()
                .filter_map(move |(index, traffic)| Some((PeerId::new(number * PIECE + index)?, traffic)))
        })
    }
}

/// Why a packet went no further.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drop {
    /// Not an IP packet, or one whose lengths contradict each other.
    Malformed,
    /// No peer's subnet holds the destination.
    NoRoute,
    /// The time to live ran out here.
    TtlExpired,
    /// It was about to leave with an address that no single host elsewhere has.
    Martian,
    /// It was about to leave for a group.
    Multicast,
    /// It was about to leave for all hosts of a subnet.
    Broadcast,
    /// The datagram came from no peer's address.
    UnknownPeer,
    /// The packet's source is not in the subnet of the peer that sent it, or its destination not in this host's.
    Spoofed,
    /// The socket's or the device's queue stayed full.
    QueueFull,
    /// The system refused to send the datagram.
    SendFailed,
    /// The device refused the packet.
    DeliverFailed,
}

impl Drop {
    /// All reasons, in the order of their counters.
    pub const ALL: [Self; 11] = [
        Self::Malformed,
        Self::NoRoute,
        Self::TtlExpired,
        Self::Martian,
        Self::Multicast,
        Self::Broadcast,
        Self::UnknownPeer,
        Self::Spoofed,
        Self::QueueFull,
        Self::SendFailed,
        Self::DeliverFailed,
    ];

    /// The reason of that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.name() == name)
    }

    /// The reason's name in logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::NoRoute => "no_route",
            Self::TtlExpired => "ttl_expired",
            Self::Martian => "martian",
            Self::Multicast => "multicast",
            Self::Broadcast => "broadcast",
            Self::UnknownPeer => "unknown_peer",
            Self::Spoofed => "spoofed",
            Self::QueueFull => "queue_full",
            Self::SendFailed => "send_failed",
            Self::DeliverFailed => "deliver_failed",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_has_its_own_counter() {
        let counters = Counters::default();
        for (index, reason) in Drop::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, index);
            for _ in 0..=index {
                counters.drop_one(reason);
            }
        }
        for (index, reason) in Drop::ALL.into_iter().enumerate() {
            assert_eq!(counters.dropped(reason), index as u64 + 1);
        }
    }

    #[test]
    fn unsent_packets_are_counted_by_reason_and_by_error() {
        let counters = Counters::default();
        for (packets, errno) in [
            (1, libc::ENOBUFS),
            (2, libc::EPERM),
            (3, libc::EAGAIN),
            (4, libc::ENOTSOCK),
        ] {
            counters.drop_unsent(packets, &io::Error::from_raw_os_error(errno));
        }
        assert_eq!(counters.dropped(Drop::QueueFull), 4);
        assert_eq!(counters.dropped(Drop::SendFailed), 6);
        let counted: Vec<_> = counters.send_errors().filter(|(_, packets)| *packets > 0).collect();
        assert_eq!(counted, [("EAGAIN", 3), ("ENOBUFS", 1), ("EPERM", 2), ("other", 4)]);
    }

    #[test]
    fn peers_are_counted_apart_from_the_first_number_to_the_last() {
        let counters = Counters::default();
        assert_eq!(counters.peers().count(), 0);
        let ids = [0, 1, PIECE - 1, PIECE, PeerId::COUNT - 1].map(|index| PeerId::new(index).unwrap());
        for (packets, id) in (1..).zip(ids) {
            counters.peer(id).sent.add(packets, 10 * packets);
        }
        let counted: Vec<_> = counters
            .peers()
            .filter(|(_, traffic)| traffic.sent.packets.get() > 0)
            .map(|(id, traffic)| (id, traffic.sent.bytes.get()))
            .collect();
        assert_eq!(counted, ids.into_iter().zip([10, 20, 30, 40, 50]).collect::<Vec<_>>());
    }
}
