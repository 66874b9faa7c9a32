//! Trouble that lasts: said once, said again when its reason changes and every few minutes, and said when it is over.

use std::time::{Duration, Instant};

use tracing::{debug, info, warn};

/// The pauses between tries: double from the first to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LAST_PAUSE: Duration = Duration::from_secs(5);
/// How long the same trouble goes unmentioned.
const REMINDER: Duration = Duration::from_secs(300);
/// How long a new reason goes unmentioned after the last line: reasons may alternate (two endpoints, say).
const QUIET: Duration = Duration::from_secs(10);

/// Follows one thing that is tried again and again until it works.
#[derive(Debug)]
pub struct Outage {
    what: &'static str,
    trouble: Option<Trouble>,
}

#[derive(Debug)]
struct Trouble {
    since: Instant,
    said: Instant,
    reason: String,
    pause: Duration,
}

impl Outage {
    /// `what`: the thing that is tried, as in "watching the leases".
    pub fn of(what: &'static str) -> Self {
        Self { what, trouble: None }
    }

    /// It failed for `reason`; how long to wait before the next try.
    pub fn failed(&mut self, reason: &str) -> Duration {
        self.failed_at(reason, Instant::now()).0
    }

    /// It worked.
    pub fn over(&mut self) {
        if let Some(trouble) = self.trouble.take() {
            info!("{} works again after {:.0?}", self.what, trouble.since.elapsed());
        }
    }

    /// The pause, and whether the failure was mentioned.
    fn failed_at(&mut self, reason: &str, now: Instant) -> (Duration, bool) {
        let Some(trouble) = &mut self.trouble else {
            warn!("{} failed, trying again until it works: {reason}", self.what);
            self.trouble = Some(Trouble {
                since: now,
                said: now,
                reason: reason.to_owned(),
                pause: FIRST_PAUSE,
            });
            return (FIRST_PAUSE, true);
        };
        let silence = now.saturating_duration_since(trouble.said);
        let mention = silence >= REMINDER || (reason != trouble.reason && silence >= QUIET);
        if mention {
            let lasting = now.saturating_duration_since(trouble.since);
            warn!("{} has been failing for {lasting:.0?}: {reason}", self.what);
            trouble.said = now;
            reason.clone_into(&mut trouble.reason);
        } else {
            debug!("{} failed: {reason}", self.what);
        }
        trouble.pause = (trouble.pause * 2).min(LAST_PAUSE);
        (trouble.pause, mention)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_trouble_is_mentioned_once_and_then_every_five_minutes() {
        let start = Instant::now();
        let mut outage = Outage::of("a test");
        let mentioned = (0..900)
            .filter(|s| outage.failed_at("refused", start + Duration::from_secs(*s)).1)
            .count();
        assert_eq!(mentioned, 3);
    }

    #[test]
    fn alternating_reasons_make_no_flood() {
        let start = Instant::now();
        let mut outage = Outage::of("a test");
        let mentioned = (0..100)
            .filter(|s| {
                outage
                    .failed_at(["refused", "timed out"][s % 2], start + Duration::from_secs(*s as u64))
                    .1
            })
            .count();
        assert!((2..=11).contains(&mentioned), "{mentioned}");
    }

    #[test]
    fn pauses_grow_to_a_limit_and_start_anew_after_success() {
        let mut outage = Outage::of("a test");
        let pauses: Vec<u128> = (0..6).map(|_| outage.failed("refused").as_millis()).collect();
        assert_eq!(pauses, [500, 1_000, 2_000, 4_000, 5_000, 5_000]);
        outage.over();
        assert_eq!(outage.failed("refused"), FIRST_PAUSE);
    }
}
