//! When the kernel is looked at: soon after it told of changes, and every now and then.

use std::time::Duration;

use tokio::time::Instant;

/// Changes come in bursts: a link that is taken down takes hundreds of routes along. So long it is waited for the rest of one.
const BURST: Duration = Duration::from_millis(20);

/// How often the kernel is looked at while its changes do not end, as on a host that follows a routing protocol.
const PAUSE: Duration = Duration::from_millis(200);

/// How long between two looks at the external interface even though the kernel tells of nothing, in a backend that does not
/// look at the kernel by itself.
const LONGEST: Duration = Duration::from_secs(60);

/// Times of looks.
#[derive(Debug)]
pub(super) struct Pace {
    /// When what the kernel told of is looked at.
    news: Option<Instant>,
    looked: Instant,
    rechecked: Instant,
}

/// Why it is time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Look {
    /// The kernel told of changes.
    News,
    /// All has to be looked at.
    Recheck,
}

impl Pace {
    /// The first look is due at once.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            news: Some(now),
            looked: now,
            rechecked: now,
        }
    }

    pub(super) fn has_news(&mut self, now: Instant) {
        self.news.get_or_insert((now + BURST).max(self.looked + PAUSE));
    }

    /// There is something to look at then.
    pub(super) fn look_at(&mut self, then: Instant) {
        self.news = Some(self.news.map_or(then, |news| news.min(then)));
    }

    /// The next look. `recheck_after`: as the backend wishes.
    pub(super) fn next(&self, recheck_after: Option<Duration>) -> (Instant, Look) {
        let recheck = self.rechecked + recheck_after.unwrap_or(LONGEST);
        match self.news {
            Some(news) if news < recheck => (news, Look::News),
            _ => (recheck, Look::Recheck),
        }
    }

    pub(super) fn looked(&mut self, look: Look, now: Instant) {
        self.news = None;
        self.looked = now;
        if look == Look::Recheck {
            self.rechecked = now;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Option<Duration> = Some(Duration::from_secs(60));

    #[test]
    fn news_is_looked_at_after_its_burst_and_not_too_often() {
        let start = Instant::now();
        let mut pace = Pace::new(start);
        assert_eq!(pace.next(MINUTE), (start, Look::News));
        pace.looked(Look::News, start);
        let late = start + Duration::from_secs(1);
        pace.has_news(late);
        pace.has_news(late + BURST / 2);
        assert_eq!(pace.next(MINUTE), (late + BURST, Look::News));
        pace.looked(Look::News, late + BURST);
        pace.has_news(late + BURST);
        assert_eq!(pace.next(MINUTE), (late + BURST + PAUSE, Look::News));
    }

    #[test]
    fn a_recheck_comes_in_its_time_whatever_the_news() {
        let start = Instant::now();
        let mut pace = Pace::new(start);
        let mut now = start;
        while pace.next(MINUTE).1 == Look::News {
            pace.looked(Look::News, now);
            now += Duration::from_secs(1);
            pace.has_news(now);
        }
        assert_eq!(pace.next(MINUTE), (start + Duration::from_secs(60), Look::Recheck));
        pace.looked(Look::Recheck, now);
        assert_eq!(
            pace.next(Some(Duration::from_secs(10))),
            (now + Duration::from_secs(10), Look::Recheck)
        );
    }
}
