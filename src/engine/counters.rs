//! What a worker counts. Each worker writes its own; anyone reads at any time without stopping it.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// A number that one thread adds to and all may read.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `amount`. Only the owning worker may call this: a load and a store, without a locked instruction.
    pub fn add(&self, amount: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_add(amount), Relaxed);
    }

    /// The sum so far.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// One worker's counters. Aligned so that no two workers write to one cache line (128 bytes: processors fetch lines in
/// pairs).
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Counters {
    /// TUN to UDP: packets that the socket took.
    pub sent_packets: Counter,
    /// TUN to UDP: bytes of those, inner IP header included.
    pub sent_bytes: Counter,
    /// UDP to TUN: packets that the device took.
    pub received_packets: Counter,
    /// UDP to TUN: bytes of those, inner IP header included.
    pub received_bytes: Counter,
    /// ICMP errors sent.
    pub icmp_errors: Counter,
    drops: [Counter; Drop::ALL.len()],
}

impl Counters {
    /// Counts one dropped packet.
    pub fn drop_one(&self, reason: Drop) {
        self.drops[reason as usize].add(1);
    }

    /// How many packets were dropped for `reason`.
    pub fn dropped(&self, reason: Drop) -> u64 {
        self.drops[reason as usize].get()
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
    /// The socket's or the device's queue stayed full.
    QueueFull,
    /// The system refused to send the datagram.
    SendFailed,
    /// The device refused the packet.
    DeliverFailed,
}

impl Drop {
    /// All reasons, in the order of their counters.
    pub const ALL: [Self; 6] = [
        Self::Malformed,
        Self::NoRoute,
        Self::TtlExpired,
        Self::QueueFull,
        Self::SendFailed,
        Self::DeliverFailed,
    ];

    /// The reason's name in logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::NoRoute => "no_route",
            Self::TtlExpired => "ttl_expired",
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
}
