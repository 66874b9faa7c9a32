//! Medians, extremes, ratios within a round.

use serde::Serialize;
use std::collections::BTreeMap;

/// What several rounds came to.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Summary {
    /// The middle value; of an even number of values, the mean of the middle two.
    pub(crate) median: f64,
    /// The smallest.
    pub(crate) min: f64,
    /// The largest.
    pub(crate) max: f64,
    /// How many rounds there are.
    pub(crate) rounds: usize,
}

impl Summary {
    /// Of `values` in any order; `None` without any.
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Option<Summary> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let upper = values.len() / 2;
        let median = if values.len().is_multiple_of(2) {
            f64::midpoint(values[upper - 1], values[upper])
        } else {
            values[upper]
        };
        Some(Summary {
            median,
            min,
            max,
            rounds: values.len(),
        })
    }
}

/// One value to another, round by round: what disturbed a whole round disturbs both, and cancels out. A round that lacks
/// one of them, or has nothing to divide by, does not count.
pub(crate) fn ratio(values: &BTreeMap<u32, f64>, reference: &BTreeMap<u32, f64>) -> Option<Summary> {
    let ratios = values.iter().filter_map(|(round, value)| {
        let divisor = reference.get(round).filter(|divisor| **divisor > 0.0)?;
        Some(value / divisor)
    });
    Summary::of(ratios)
}

/// The smallest value that at least `share` (0 to 1) of `sorted` do not exceed (nearest rank); `None` without any.
pub(crate) fn percentile(sorted: &[u64], share: f64) -> Option<u64> {
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied()
}

#[cfg(test)]
#[allow(unused, reason = "cargo builds benchmarks with cfg(test), but without tests")]
mod tests {
    use super::*;

    #[test]
    fn median_lies_in_the_middle() {
        let summary = Summary::of([3.0, 1.0, 2.0]).unwrap();
        assert_eq!(
            (summary.median, summary.min, summary.max, summary.rounds),
            (2.0, 1.0, 3.0, 3)
        );
        assert_eq!(Summary::of([4.0, 1.0, 2.0, 3.0]).unwrap().median, 2.5);
        assert_eq!(Summary::of([]), None);
    }

    #[test]
    fn ratio_is_taken_within_a_round() {
        // The machine was three times as fast in the second round, and the reference was lost in the third.
        let values = BTreeMap::from([(1, 2.0), (2, 6.6), (3, 100.0)]);
        let reference = BTreeMap::from([(1, 1.0), (2, 3.0), (4, 7.0)]);
        let ratio = ratio(&values, &reference).unwrap();
        assert_eq!((ratio.min, ratio.rounds), (2.0, 2));
        assert!(
            (ratio.max - 2.2).abs() < 1e-9 && (ratio.median - 2.1).abs() < 1e-9,
            "{ratio:?}"
        );
    }

    #[test]
    fn nothing_is_divided_by_zero() {
        assert_eq!(ratio(&BTreeMap::from([(1, 2.0)]), &BTreeMap::from([(1, 0.0)])), None);
    }

    #[test]
    fn percentile_is_a_value_that_occurred() {
        let sorted: Vec<u64> = (1..=200).collect();
        assert_eq!(percentile(&sorted, 0.5), Some(100));
        assert_eq!(percentile(&sorted, 0.99), Some(198));
        assert_eq!(percentile(&sorted, 1.0), Some(200));
        assert_eq!(percentile(&[7], 0.5), Some(7));
        assert_eq!(percentile(&[], 0.5), None);
    }
}
