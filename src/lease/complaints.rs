//! Complaints of records: each is named once, as long as there are not too many, and neither the log nor the memory grows with
//! what somebody may write into the registry.

use std::collections::HashMap;

use tokio::time::Instant;
use tracing::warn;

use crate::{observe::lines::Lines, registry::Revision};

/// How many records are remembered as named: in a network that is well there is none, and a person who mends one by one has long
/// looked for what they have in common. What is behind that may be named again after a broken connection.
const MOST_NAMED: usize = 1_000;

/// What was said of records that are no good.
#[derive(Debug, Default)]
pub(super) struct Complaints {
    /// The keys of records that were named, and their changes at that time.
    named: HashMap<String, Revision>,
    /// The same of the picture before, while a new one is taken.
    before: HashMap<String, Revision>,
    lines: Lines,
}

impl Complaints {
    /// A whole new picture is taken: what is not complained of again till [`end_picture`](Self::end_picture) is well, or gone.
    pub(super) fn begin_picture(&mut self) {
        // The one before may not have come to its end.
        self.before.extend(self.named.drain());
    }

    pub(super) fn end_picture(&mut self) {
        self.before = HashMap::new();
    }

    /// Complains of the record at `key` that was made by the change `revision`, unless that was done.
    pub(super) fn say(&mut self, key: &str, revision: Revision, text: impl FnOnce() -> String) {
        if self.named.get(key) == Some(&revision) {
            return;
        }
        let said = self.before.get(key) == Some(&revision);
        if !said && !self.lines.may_say(Instant::now()) {
            return;
        }
        if !said {
            let text = text();
            warn!("{text}");
        }
        if self.named.len() < MOST_NAMED || self.named.contains_key(key) {
            self.named.insert(key.to_owned(), revision);
        }
    }

    /// The record is gone, or is good now.
    pub(super) fn forget(&mut self, key: &str) {
        self.named.remove(key);
    }

    /// When [`sum_up`](Self::sum_up) has something to say.
    pub(super) fn due(&self) -> Option<Instant> {
        self.lines.due()
    }

    /// Says how many more there are, if it is time.
    pub(super) fn sum_up(&mut self) {
        if let Some(more) = self.lines.sum_up(Instant::now()) {
            warn!("and {more} more records among the leases cannot be used; `flanneld leases list` shows them");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of these records are named.
    fn named(complaints: &mut Complaints, keys: impl Iterator<Item = usize>, revision: i64) -> usize {
        let mut named = 0;
        for key in keys {
            complaints.say(&format!("subnets/{key}"), Revision(revision), || {
                named += 1;
                String::new()
            });
        }
        named
    }

    #[tokio::test(start_paused = true)]
    async fn each_is_named_once_and_again_when_it_has_changed_or_comes_back() {
        let mut complaints = Complaints::default();
        assert_eq!(named(&mut complaints, [1, 2, 1].into_iter(), 5), 2);
        assert_eq!(named(&mut complaints, [1].into_iter(), 6), 1);
        complaints.forget("subnets/1");
        assert_eq!(named(&mut complaints, [1].into_iter(), 6), 1);
        complaints.begin_picture();
        assert_eq!(
            named(&mut complaints, [1].into_iter(), 6),
            0,
            "the connection was lost meanwhile"
        );
        complaints.end_picture();
        assert_eq!(
            named(&mut complaints, [1, 2].into_iter(), 6),
            1,
            "the second one was away"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_hundred_thousand_records_take_neither_log_nor_memory() {
        let mut complaints = Complaints::default();
        for minute in 0..3 {
            assert!(named(&mut complaints, 0..100_000, minute) <= 20);
            assert!(complaints.due().is_some());
            tokio::time::sleep(std::time::Duration::from_secs(60)).await;
            complaints.sum_up();
        }
        assert!(complaints.named.len() <= MOST_NAMED);
    }
}
