//! How many ICMP errors a worker may send.

use std::time::{Duration, Instant};

/// Linux' own defaults for all ICMP errors of a host: 1,000 a second after a burst of 50
/// (`net.ipv4.icmp_msgs_per_sec`, `icmp_msgs_burst`).
const PER_SECOND: u32 = 1_000;
const BURST: u32 = 50;

/// A token bucket: full at the start.
#[derive(Debug)]
pub(super) struct RateLimit {
    /// The time that one token takes to grow.
    interval: Duration,
    tokens: u32,
    /// When the last counted token had grown.
    since: Instant,
}

impl RateLimit {
    /// One of `sharers` equal shares of the host's limit.
    pub(super) fn icmp_share(sharers: usize, now: Instant) -> Self {
        // At most 64 workers share, so that the product stays far below 2^32.
        Self {
            interval: Duration::from_secs(1) / PER_SECOND * sharers as u32,
            tokens: BURST,
            since: now,
        }
    }

    /// Takes a token if there is one.
    pub(super) fn allow(&mut self, now: Instant) -> bool {
        let grown = now.saturating_duration_since(self.since).as_nanos() / self.interval.as_nanos();
        if grown >= u128::from(BURST - self.tokens) {
            self.tokens = BURST;
            self.since = now;
        } else {
            // Below BURST by the branch above.
            let grown = grown as u32;
            self.tokens += grown;
            self.since += self.interval * grown;
        }
        let allowed = self.tokens > 0;
        self.tokens -= u32::from(allowed);
        allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_and_then_the_rate_holds() {
        let start = Instant::now();
        let mut limit = RateLimit::icmp_share(1, start);
        let passed = (0..200).filter(|_| limit.allow(start)).count();
        assert_eq!(passed, BURST as usize);
        let passed = (1..=10_000)
            .filter(|i| limit.allow(start + Duration::from_micros(100) * *i))
            .count();
        assert_eq!(passed, PER_SECOND as usize);
    }

    #[test]
    fn workers_share_the_rate() {
        let start = Instant::now();
        let mut limit = RateLimit::icmp_share(4, start);
        while limit.allow(start) {}
        let passed = (1..=10_000)
            .filter(|i| limit.allow(start + Duration::from_micros(100) * *i))
            .count();
        assert_eq!(passed, PER_SECOND as usize / 4);
    }

    #[test]
    fn a_long_pause_refills_no_more_than_a_burst() {
        let start = Instant::now();
        let mut limit = RateLimit::icmp_share(1, start);
        while limit.allow(start) {}
        let later = start + Duration::from_secs(86_400);
        assert_eq!((0..200).filter(|_| limit.allow(later)).count(), BURST as usize);
    }
}
