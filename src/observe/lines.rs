//! A bound on what one kind of trouble may add to the log: thousands of records, or of peers, can have the same one.

use std::time::Duration;

use tokio::time::Instant;

/// How many lines there are in each [`WINDOW`]: as many as people read.
const LINES: usize = 20;
const WINDOW: Duration = Duration::from_secs(60);

/// How long it is waited for more before it is said how many more there are.
const BURST: Duration = Duration::from_secs(1);

/// Counts the lines of one kind of trouble, and what went without one.
#[derive(Debug, Default)]
pub struct Lines {
    /// When the present window began.
    begun: Option<Instant>,
    said: usize,
    unsaid: usize,
    /// When it was last said how many more there are.
    summed_up: Option<Instant>,
    /// When that is to be said again.
    due: Option<Instant>,
}

impl Lines {
    /// Whether a line may be said now. If not, it is counted.
    pub fn may_say(&mut self, now: Instant) -> bool {
        if self.begun.is_none_or(|begun| now >= begun + WINDOW) {
            self.begun = Some(now);
            self.said = 0;
        }
        if self.said < LINES {
            self.said += 1;
            return true;
        }
        self.unsaid += 1;
        let next = self.summed_up.map_or(now, |last| last + WINDOW);
        self.due.get_or_insert(next.max(now + BURST));
        false
    }

    /// When [`sum_up`](Self::sum_up) has something to say.
    pub fn due(&self) -> Option<Instant> {
        self.due
    }

    /// How many went without a line, once it is time to say so.
    pub fn sum_up(&mut self, now: Instant) -> Option<usize> {
        self.due.take_if(|due| *due <= now)?;
        self.summed_up = Some(now);
        Some(std::mem::take(&mut self.unsaid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hundred_thousand_at_once_are_a_few_lines_and_a_number() {
        let start = Instant::now();
        let mut lines = Lines::default();
        let said = (0..100_000).filter(|_| lines.may_say(start)).count();
        assert_eq!(said, LINES);
        assert_eq!(lines.sum_up(start), None, "more may come");
        assert_eq!(lines.due(), Some(start + BURST));
        assert_eq!(lines.sum_up(start + BURST), Some(100_000 - LINES));
        assert_eq!(lines.sum_up(start + WINDOW), None);
    }

    #[test]
    fn trouble_that_goes_on_for_an_hour_is_twenty_lines_a_minute_and_a_number() {
        let start = Instant::now();
        let (mut lines, mut said, mut sums) = (Lines::default(), 0, 0);
        let mut counted = 0;
        for tick in 0..3_600_u32 * 20 {
            let now = start + tick * Duration::from_millis(50);
            said += usize::from(lines.may_say(now));
            if let Some(more) = lines.sum_up(now) {
                sums += 1;
                counted += more;
            }
        }
        assert_eq!(said, 60 * LINES);
        assert!((59..=60).contains(&sums), "{sums}");
        assert!(counted + said <= 72_000 && counted + said > 72_000 - 1_300, "{counted}");
    }

    #[test]
    fn what_comes_seldom_is_all_said() {
        let start = Instant::now();
        let mut lines = Lines::default();
        for minute in 0..100 {
            assert!(lines.may_say(start + minute * WINDOW));
        }
        assert_eq!(lines.due(), None);
    }
}
