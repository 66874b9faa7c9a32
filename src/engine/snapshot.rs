//! What an engine has done so far, at one moment.

use super::{
    Offloads,
    counters::{Counters, Drop, Flow},
};
use crate::route_table::PeerId;

/// All counters, and what the kernel has dropped before the engine saw it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// One for each worker.
    pub workers: Vec<WorkerSnapshot>,
    /// Peers with any traffic, by number, all workers together.
    pub peers: Vec<PeerSnapshot>,
    /// What the kernel still does for the engine.
    pub offloads: Offloads,
    /// Peers whose way refuses segmented messages.
    pub refusing_peers: usize,
}

/// Packets and their bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// How many.
    pub packets: u64,
    /// How long together.
    pub bytes: u64,
}

/// What one worker has done. The fields are those of [`Counters`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "each is the counter of the same name")]
pub struct WorkerSnapshot {
    pub sent: Traffic,
    pub received: Traffic,
    pub superpackets_split: u64,
    pub segments: u64,
    pub messages_sent: u64,
    pub messages_received: u64,
    pub superpackets_merged: u64,
    pub merges: u64,
    pub icmp_errors: u64,
    /// Packets by the reason for which they went no further.
    pub drops: Vec<(Drop, u64)>,
    /// Packets that the socket did not take, by the name of the error.
    pub send_errors: Vec<(&'static str, u64)>,
    /// Messages for which the socket's receive buffer had no room.
    pub socket_overflow: u64,
}

/// What was exchanged with one peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerSnapshot {
    /// Which.
    pub id: PeerId,
    /// To it.
    pub sent: Traffic,
    /// From it.
    pub received: Traffic,
    /// When it was last heard of: seconds of [`counters::uptime`](super::counters::uptime); 0: never.
    pub last_received: u64,
    /// Packets for it that the socket did not take.
    pub unsent: u64,
    /// Packets from it that were not let in.
    pub refused: u64,
}

impl Traffic {
    fn of(flow: &Flow) -> Self {
        Self {
            packets: flow.packets.get(),
            bytes: flow.bytes.get(),
        }
    }

    fn add(&mut self, other: Self) {
        self.packets += other.packets;
        self.bytes += other.bytes;
    }
}

impl WorkerSnapshot {
    /// Of a worker whose socket has dropped `socket_overflow` messages.
    pub fn of(counters: &Counters, socket_overflow: u64) -> Self {
        Self {
            sent: Traffic::of(&counters.sent),
            received: Traffic::of(&counters.received),
            superpackets_split: counters.superpackets_split.get(),
            segments: counters.segments.get(),
            messages_sent: counters.messages_sent.get(),
            messages_received: counters.messages_received.get(),
            superpackets_merged: counters.superpackets_merged.get(),
            merges: counters.merges.get(),
            icmp_errors: counters.icmp_errors.get(),
            drops: Drop::ALL.map(|reason| (reason, counters.dropped(reason))).to_vec(),
            send_errors: counters.send_errors().collect(),
            socket_overflow,
        }
    }
}

/// The traffic of each peer that has any, summed over workers.
pub(super) fn peers<'a>(workers: impl Iterator<Item = &'a Counters>) -> Vec<PeerSnapshot> {
    let mut all: Vec<PeerSnapshot> = Vec::new();
    for (id, traffic) in workers.flat_map(Counters::peers) {
        let index = id.index();
        while all.len() <= index {
            // Of which there are fewer than `PeerId::COUNT`, since `index` is one of them.
            let id = PeerId::new(all.len()).unwrap_or_default();
            all.push(PeerSnapshot {
                id,
                sent: Traffic::default(),
                received: Traffic::default(),
                last_received: 0,
                unsent: 0,
                refused: 0,
            });
        }
        let peer = &mut all[index];
        peer.sent.add(Traffic::of(&traffic.sent));
        peer.received.add(Traffic::of(&traffic.received));
        peer.last_received = peer.last_received.max(traffic.last_received.get());
        peer.unsent += traffic.unsent.get();
        peer.refused += traffic.refused.get();
    }
    all.retain(|peer| peer.sent.packets + peer.received.packets + peer.unsent + peer.refused > 0);
    all
}

impl Snapshot {
    /// A line for the log: what all workers together have carried and dropped.
    pub fn summary(&self) -> String {
        let sum = |count: &dyn Fn(&WorkerSnapshot) -> u64| self.workers.iter().map(count).sum::<u64>();
        let by_reason = Drop::ALL.into_iter().map(|reason| {
            let of_reason = |worker: &WorkerSnapshot| {
                worker
                    .drops
                    .iter()
                    .find(|(known, _)| *known == reason)
                    .map_or(0, |(_, count)| *count)
            };
            (reason.name(), sum(&of_reason))
        });
        let drops: String = by_reason
            .chain([("socket_overflow", sum(&|worker| worker.socket_overflow))])
            .filter(|(_, count)| *count > 0)
            .map(|(name, count)| format!(", {name} {count}"))
            .collect();
        format!(
            "sent {} packets ({} bytes) in {} messages, received {} ({} bytes) in {}, ICMP errors {}; dropped{}",
            sum(&|worker| worker.sent.packets),
            sum(&|worker| worker.sent.bytes),
            sum(&|worker| worker.messages_sent),
            sum(&|worker| worker.received.packets),
            sum(&|worker| worker.received.bytes),
            sum(&|worker| worker.messages_received),
            sum(&|worker| worker.icmp_errors),
            drops.strip_prefix(',').unwrap_or(" none"),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(workers: &[&Counters]) -> Snapshot {
        Snapshot {
            workers: workers.iter().map(|counters| WorkerSnapshot::of(counters, 3)).collect(),
            peers: peers(workers.iter().copied()),
            offloads: Offloads::default(),
            refusing_peers: 0,
        }
    }

    #[test]
    fn a_peers_traffic_is_that_of_all_workers() {
        let (one, two) = (Counters::default(), Counters::default());
        let id = PeerId::new(300).unwrap();
        one.peer(id).sent.add(2, 20);
        two.peer(id).sent.add(3, 30);
        two.peer(id).received.add(1, 5);
        one.peer(id).last_received.set(7);
        two.peer(id).last_received.set(9);
        two.peer(id).unsent.add(4);
        one.peer(id).refused.add(6);
        let peer = PeerSnapshot {
            id,
            sent: Traffic { packets: 5, bytes: 50 },
            received: Traffic { packets: 1, bytes: 5 },
            last_received: 9,
            unsent: 4,
            refused: 6,
        };
        assert_eq!(snapshot(&[&one, &two]).peers, [peer]);
    }

    #[test]
    fn counting_goes_on_from_a_snapshot() {
        let before = Counters::default();
        before.sent.add(2, 300);
        before.received.add(5, 60);
        before.merges.add(7);
        before.drop_several(Drop::Spoofed, 7);
        before.drop_unsent(3, &std::io::Error::from_raw_os_error(libc::EPERM));
        before.drop_unsent(4, &std::io::Error::from_raw_os_error(libc::ENOTSOCK));
        let id = PeerId::new(300).unwrap();
        before.peer(id).received.add(1, 5);
        before.peer(id).last_received.set(9);
        let after = Counters::default();
        after.add(&WorkerSnapshot::of(&before, 0));
        for peer in &peers([&before].into_iter()) {
            after.peer(peer.id).add(peer);
        }
        assert_eq!(snapshot(&[&after]), snapshot(&[&before]));
        after.sent.add(1, 1);
        assert_eq!(snapshot(&[&after]).workers[0].sent, Traffic { packets: 3, bytes: 301 });
    }

    #[test]
    fn the_summary_names_what_was_dropped() {
        let counters = Counters::default();
        counters.sent.add(2, 300);
        counters.drop_several(Drop::Spoofed, 7);
        let summary = snapshot(&[&counters, &Counters::default()]).summary();
        assert!(summary.starts_with("sent 2 packets (300 bytes)"), "{summary}");
        assert!(summary.ends_with("dropped spoofed 7, socket_overflow 6"), "{summary}");
    }
}
