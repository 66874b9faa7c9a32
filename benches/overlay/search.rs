//! The highest rate that gets through: a geometric bisection of short probes. Pure; the caller does the probing.

use serde::Serialize;

/// A rate counts as carried when no more than this share is lost.
pub(crate) const LOSS_LIMIT: f64 = 0.01;

/// The first probe, as a share of what was delivered of an offer at full speed: near the answer for whoever sheds load
/// gracefully.
const FIRST_GUESS: f64 = 0.9;

/// A probe never goes further beyond the best rate than this: whoever collapses under load delivers little of the first
/// offer, so the answer may be far above the first guess.
const GROWTH: f64 = 1.6;

/// How far to go down from a rate that failed while none has been carried.
const RETREAT: f64 = 0.6;

/// Close enough: what lies between the best rate and the worst failure is within the noise of a probe.
const PRECISION: f64 = 1.03;

/// A loss below this may be one hiccup of the machine: the same rate gets a second chance.
const NEAR_MISS: f64 = 0.15;

/// The sender itself was short of processor time if it offered less than this share of what it was asked for.
const FULL_OFFER: f64 = 0.93;

/// What one offer came to; rates in datagrams a second.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Outcome {
    /// What was really sent.
    pub(crate) offered: f64,
    /// What arrived.
    pub(crate) delivered: f64,
    /// The share that did not, 0 to 1.
    pub(crate) loss: f64,
}

/// The state of the search.
#[derive(Clone, Debug)]
pub(crate) struct Search {
    /// The highest rate offered without loss, 0 for none.
    carried: f64,
    /// The lowest that is known to be too much.
    failed: f64,
    /// The highest delivered at a loss within the limit.
    best: Option<f64>,
    /// The next probe; `None`: the search is over.
    next: Option<f64>,
    /// How many more probes there may be.
    left: usize,
    /// The rate that has had its second chance.
    repeated: Option<f64>,
}

impl Search {
    /// Begins with what an offer at full speed came to; at most `probes` probes follow. None does when the offer was carried:
    /// then it is the sender that sets the bound.
    pub(crate) fn new(full_speed: Outcome, probes: usize) -> Search {
        let carried = full_speed.loss <= LOSS_LIMIT;
        let first = (full_speed.delivered * FIRST_GUESS).max(1.0);
        Search {
            carried: 0.0,
            failed: full_speed.offered,
            best: carried.then_some(full_speed.delivered),
            next: (!carried && probes > 0).then_some(first),
            left: probes,
            repeated: None,
        }
    }

    /// The rate to probe next; `None` when the search is over.
    pub(crate) fn next_rate(&self) -> Option<f64> {
        self.next
    }

    /// What the probe at [`Self::next_rate`] came to.
    pub(crate) fn record(&mut self, outcome: Outcome) {
        let Some(rate) = self.next else { return };
        self.left = self.left.saturating_sub(1);
        if outcome.loss <= LOSS_LIMIT {
            self.best = Some(self.best.map_or(outcome.delivered, |best| best.max(outcome.delivered)));
            self.carried = rate;
            if outcome.offered < rate * FULL_OFFER {
                self.failed = rate;
            }
        } else if outcome.loss < NEAR_MISS && self.repeated != Some(rate) {
            self.repeated = Some(rate);
            self.next = (self.left > 0).then_some(rate);
            return;
        } else {
            self.failed = rate;
        }
        let over = self.left == 0 || (self.carried > 0.0 && self.failed < self.carried * PRECISION);
        self.next = (!over).then(|| self.between());
    }

    fn between(&self) -> f64 {
        if self.carried == 0.0 {
            return self.failed * RETREAT;
        }
        (self.carried * self.failed).sqrt().min(self.carried * GROWTH)
    }

    /// The highest rate delivered at a loss within [`LOSS_LIMIT`]; `None` when no probe got there.
    pub(crate) fn best(&self) -> Option<f64> {
        self.best
    }
}

#[cfg(test)]
#[allow(unused, reason = "cargo builds benchmarks with cfg(test), but without tests")]
mod tests {
    use super::*;

    /// A path that carries `capacity`, and of more than that only `share` of its capacity.
    fn path(capacity: f64, share: f64) -> impl Fn(f64) -> Outcome {
        move |offered| {
            let delivered = if offered <= capacity { offered } else { capacity * share };
            Outcome {
                offered,
                delivered,
                loss: 1.0 - delivered / offered,
            }
        }
    }

    /// Searches along `path`, at full speed 1,000,000; the best rate, and the rates probed.
    fn search(path: impl Fn(f64) -> Outcome, probes: usize) -> (Option<f64>, Vec<f64>) {
        let mut search = Search::new(path(1e6), probes);
        let mut probed = Vec::new();
        while let Some(rate) = search.next_rate() {
            probed.push(rate);
            search.record(path(rate));
        }
        (search.best(), probed)
    }

    #[test]
    fn capacity_is_found_within_a_few_percent() {
        for capacity in [50_000.0, 300_000.0, 620_000.0, 980_000.0] {
            let (best, probed) = search(path(capacity, 1.0), 8);
            let best = best.unwrap();
            assert!(
                best <= capacity && best > capacity * 0.93,
                "{capacity}: {best} after {probed:?}"
            );
        }
    }

    #[test]
    fn capacity_is_found_though_the_path_collapses_under_load() {
        let (best, probed) = search(path(300_000.0, 0.4), 8);
        let best = best.unwrap();
        assert!(best <= 300_000.0 && best > 280_000.0, "{best} after {probed:?}");
    }

    #[test]
    fn whoever_carries_the_full_offer_is_not_probed() {
        let (best, probed) = search(path(2e6, 1.0), 8);
        assert_eq!((best, probed.len()), (Some(1e6), 0));
    }

    #[test]
    fn search_ends_after_the_probes_allowed() {
        assert_eq!(search(path(300_000.0, 0.4), 3).1.len(), 3);
        assert_eq!(search(path(300_000.0, 0.4), 0), (None, vec![]));
    }

    #[test]
    fn one_near_miss_is_forgiven_and_two_are_not() {
        let full_speed = path(300_000.0, 1.0)(1e6);
        let miss = |offered| Outcome {
            offered,
            delivered: offered * 0.95,
            loss: 0.05,
        };
        let mut search = Search::new(full_speed, 8);
        let first = search.next_rate().unwrap();
        search.record(miss(first));
        assert_eq!(search.next_rate(), Some(first));
        let mut forgiven = search.clone();
        forgiven.record(path(300_000.0, 1.0)(first));
        assert!(forgiven.next_rate().unwrap() > first);
        search.record(miss(first));
        assert!(search.next_rate().unwrap() < first);
    }

    #[test]
    fn rate_that_the_sender_cannot_offer_is_not_exceeded() {
        let mut search = Search::new(path(600_000.0, 0.5)(1e6), 8);
        let rate = search.next_rate().unwrap();
        search.record(Outcome {
            offered: rate * 0.8,
            delivered: rate * 0.8,
            loss: 0.0,
        });
        assert_eq!(search.next_rate(), None);
        assert_eq!(search.best(), Some(rate * 0.8));
    }

    #[test]
    fn path_that_always_loses_has_no_best_rate() {
        let lossy = |offered| Outcome {
            offered,
            delivered: offered * 0.5,
            loss: 0.5,
        };
        let (best, probed) = search(lossy, 5);
        assert_eq!(best, None);
        assert!(probed.is_sorted_by(|earlier, later| earlier > later), "{probed:?}");
    }
}
