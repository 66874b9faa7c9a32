//! Trouble that lasts: said once, said again when its reason changes and every few minutes, and said when it is over.
//!
//! Trouble that comes and goes (a proxy that cuts each stream after some seconds) is said the first time; then, while it
//! is over at once each time, every few minutes, with how often it was there.

use std::time::{Duration, Instant};

use tracing::{debug, info, warn};

/// The pauses between tries: double from the first to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LAST_PAUSE: Duration = Duration::from_secs(5);
/// How long the same trouble goes unmentioned.
const REMINDER: Duration = Duration::from_secs(300);
/// How long a new reason goes unmentioned after the last line: reasons may alternate (two endpoints, say). And how long
/// trouble that was there a short time ago may last before it is mentioned again.
const QUIET: Duration = Duration::from_secs(10);

/// Follows one thing that is tried again and again until it works.
#[derive(Debug)]
pub struct Outage {
    what: &'static str,
    trouble: Option<Trouble>,
    /// When trouble was last mentioned, be it over or not.
    said: Option<Instant>,
    /// How many troubles have begun since then without a word.
    unsaid: u32,
}

#[derive(Debug)]
struct Trouble {
    since: Instant,
    mentioned: bool,
    reason: String,
    pause: Duration,
}

impl Outage {
    /// `what`: the thing that is tried, as in "watching the leases".
    pub fn of(what: &'static str) -> Self {
        Self {
            what,
            trouble: None,
            said: None,
            unsaid: 0,
        }
    }

    /// It failed for `reason`; how long to wait before the next try.
    pub fn failed(&mut self, reason: &str) -> Duration {
        self.failed_at(reason, Instant::now()).0
    }

    /// It worked.
    pub fn over(&mut self) {
        if let Some(trouble) = self.trouble.take() {
            let lasted = trouble.since.elapsed();
            if trouble.mentioned {
                info!("{} works again after {lasted:.0?}", self.what);
            } else {
                debug!("{} works again after {lasted:.0?}", self.what);
            }
        }
    }

    /// The pause, and whether the failure was mentioned.
    fn failed_at(&mut self, reason: &str, now: Instant) -> (Duration, bool) {
        let silence = self
            .said
            .map_or(Duration::MAX, |said| now.saturating_duration_since(said));
        let Some(trouble) = &mut self.trouble else {
            let mentioned = silence >= REMINDER;
            if mentioned {
                let again = match self.unsaid {
                    0 => String::new(),
                    times => format!(" (and failed {times} times, each for a moment, since this was last said)"),
                };
                warn!("{} failed, trying again until it works: {reason}{again}", self.what);
                self.said = Some(now);
                self.unsaid = 0;
            } else {
                debug!("{} failed: {reason}", self.what);
                self.unsaid += 1;
            }
            self.trouble = Some(Trouble {
                since: now,
                mentioned,
                reason: reason.to_owned(),
                pause: FIRST_PAUSE,
            });
            return (FIRST_PAUSE, mentioned);
        };
        let lasting = now.saturating_duration_since(trouble.since);
        let mention = if trouble.mentioned {
            silence >= REMINDER || (reason != trouble.reason && silence >= QUIET)
        } else {
            lasting >= QUIET
        };
        if mention {
            warn!("{} has been failing for {lasting:.0?}: {reason}", self.what);
            trouble.mentioned = true;
            self.said = Some(now);
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
    fn trouble_that_comes_and_goes_is_mentioned_every_five_minutes() {
        let start = Instant::now();
        let mut outage = Outage::of("a test");
        let mentioned: Vec<u64> = (0..900)
            .step_by(15)
            .filter(|second| {
                let (_, mentioned) = outage.failed_at("cut", start + Duration::from_secs(*second));
                outage.over();
                mentioned
            })
            .collect();
        assert_eq!(mentioned, [0, 300, 600]);
    }

    #[test]
    fn trouble_that_comes_back_and_stays_is_mentioned_soon() {
        let start = Instant::now();
        let mut outage = Outage::of("a test");
        outage.failed_at("cut", start);
        outage.over();
        let mentioned: Vec<u64> = (60..120)
            .filter(|second| outage.failed_at("refused", start + Duration::from_secs(*second)).1)
            .collect();
        assert_eq!(mentioned, [70]);
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
