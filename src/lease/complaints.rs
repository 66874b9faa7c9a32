//! Complaints of records: each is named once, as long as there are not too many, and neither the log nor the memory grows with
//! what somebody may write into the registry.

use std::{
    collections::{HashMap, hash_map::RandomState},
    hash::BuildHasher,
};

use tokio::time::Instant;
use tracing::warn;

use crate::{observe::lines::Lines, registry::Revision};

/// How many records are remembered as complained of: as many as a registry of ours may list, in some 8 MB. What is behind that is
/// counted again each time.
const MOST_REMEMBERED: usize = 1 << 18;

/// What was said of records that are no good.
#[derive(Debug, Default)]
pub(super) struct Complaints {
    /// By their keys' hashes, the records that were named or counted, and their changes at that time. The hashes are keyed by
    /// chance, so that nobody can write a record that passes for another.
    told: HashMap<u64, Revision>,
    /// The same of the picture before, while a new one is taken.
    before: HashMap<u64, Revision>,
    hasher: RandomState,
    lines: Lines,
}

impl Complaints {
    /// A whole new picture is taken: what is not complained of again till [`end_picture`](Self::end_picture) is well, or gone.
    pub(super) fn begin_picture(&mut self) {
        // The one before may not have come to its end.
        let room = MOST_REMEMBERED.saturating_sub(self.before.len());
        self.before.extend(self.told.drain().take(room));
    }

    pub(super) fn end_picture(&mut self) {
        self.before = HashMap::new();
    }

    /// Complains of the record at `key` that was made by the change `revision`, unless that was done.
    pub(super) fn say(&mut self, key: &str, revision: Revision, text: impl FnOnce() -> String) {
        let key = self.hasher.hash_one(key);
        if self.told.get(&key) == Some(&revision) {
            return;
        }
        if self.before.get(&key) != Some(&revision) {
            self.say_anew(text);
        }
        if self.told.len() < MOST_REMEMBERED || self.told.contains_key(&key) {
            self.told.insert(key, revision);
        }
    }

    /// Complains of what is known to be new.
    pub(super) fn say_anew(&mut self, text: impl FnOnce() -> String) {
        if self.lines.may_say(Instant::now()) {
            let text = text();
            warn!("{text}");
        }
    }

    /// The record is gone, or is good now.
    pub(super) fn forget(&mut self, key: &str) {
        self.told.remove(&self.hasher.hash_one(key));
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
            assert_eq!(named(&mut complaints, 0..100_000, minute), 20);
            assert!(complaints.due().is_some());
            tokio::time::sleep(std::time::Duration::from_secs(60)).await;
            complaints.sum_up();
        }
        named(&mut complaints, 0..400_000, 99);
        assert_eq!(complaints.told.len(), MOST_REMEMBERED);
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_counted_is_not_counted_again_and_hides_no_new_trouble() {
        let mut complaints = Complaints::default();
        assert_eq!(named(&mut complaints, 0..10_000, 5), 20);
        for _ in 0..3 {
            tokio::time::sleep(std::time::Duration::from_secs(61)).await;
            complaints.sum_up();
            assert_eq!(named(&mut complaints, 0..10_000, 5), 0);
            complaints.begin_picture();
            assert_eq!(
                named(&mut complaints, 0..10_000, 5),
                0,
                "a broken connection is no news"
            );
            complaints.end_picture();
            assert_eq!(complaints.due(), None, "nothing is counted");
        }
        assert_eq!(named(&mut complaints, 0..10_001, 5), 1, "a new one is named");
    }
}
