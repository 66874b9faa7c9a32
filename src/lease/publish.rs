//! From changes to published sets of peers: a change that comes alone is published at once, of a storm only a set every now and
//! then, so that thousands of hosts that come at the same time do not keep this one busy.

use std::{sync::Arc, time::Duration};

use tokio::{sync::watch::Sender, time::Instant};
use tracing::info;

use super::{
    record::Lease,
    watch::{PeerSet, Picture},
};

/// How close publications follow one another at most. A person does not notice, a new host needs longer to start its first
/// container.
const SPACING: Duration = Duration::from_millis(50);

/// While many changes go on they come less and less often, until there is so much time between two for each peer that there is,
/// but a second at most: whoever is told has to look at all of them, and takes the processors from the packets meanwhile.
const PER_PEER: Duration = Duration::from_micros(40);
const LONGEST_SPACING: Duration = Duration::from_secs(1);

/// One part in so many of the time may go into making sets: where that takes long, because there are very many leases or many
/// that overlap, they come less often.
const SHARE: u32 = 10;

/// How close the log tells of changes at most, and of how many at a time one by one.
const TELLING: Duration = Duration::from_secs(1);
const LINES: usize = 50;

/// Publishes, and tells of it.
#[derive(Debug)]
pub(super) struct Publisher<'a> {
    pictures: &'a Sender<Option<Picture>>,
    /// Whether the registry has shown all there is.
    complete: bool,
    /// How many changes there are to publish.
    changes: usize,
    /// Not before then.
    next: Option<Instant>,
    /// How long after the last one that is.
    spacing: Duration,
    /// What the log has told of.
    told: Arc<PeerSet>,
    /// When it is to tell again, if there is something to tell.
    telling: Option<Instant>,
    last_told: Option<Instant>,
}

impl<'a> Publisher<'a> {
    pub(super) fn new(pictures: &'a Sender<Option<Picture>>) -> Self {
        Self {
            pictures,
            complete: false,
            changes: 0,
            next: None,
            spacing: SPACING,
            told: Arc::default(),
            telling: None,
            last_told: None,
        }
    }

    /// There is something to publish.
    pub(super) fn note_change(&mut self) {
        self.note_changes(1);
    }

    /// There is, if there are any, as much to publish.
    pub(super) fn note_changes(&mut self, count: usize) {
        self.changes += count;
    }

    /// The registry has shown all there is.
    pub(super) fn note_picture(&mut self) {
        self.complete = true;
        self.changes += 1;
    }

    /// When [`run`](Self::run) has something to do.
    pub(super) fn due(&self) -> Option<Instant> {
        let publication = (self.changes > 0).then(|| self.next.unwrap_or_else(Instant::now));
        publication.into_iter().chain(self.telling).min()
    }

    /// Does what is due. `set` makes the peers as they are now.
    pub(super) fn run(&mut self, set: impl FnOnce() -> PeerSet) {
        let now = Instant::now();
        if self.changes > 0 && self.next.is_none_or(|next| next <= now) {
            self.publish(set);
        }
        if self.telling.is_some_and(|telling| telling <= now) {
            self.tell(now);
        }
    }

    /// Publishes at once what has changed: nothing more may come for long.
    pub(super) fn flush(&mut self, set: impl FnOnce() -> PeerSet) {
        if self.changes > 0 {
            self.publish(set);
        }
    }

    fn publish(&mut self, set: impl FnOnce() -> PeerSet) {
        let begun = Instant::now();
        let set = set();
        // One that comes alone and is put right at once, as a lease that somebody has written over, is no storm; nor is what comes
        // after a silence.
        let silent = self.next.is_none_or(|next| begun > next + self.spacing);
        self.spacing = match std::mem::take(&mut self.changes) {
            2.. if !silent => (self.spacing * 2)
                .min(PER_PEER * set.len() as u32)
                .clamp(SPACING, LONGEST_SPACING),
            _ => SPACING,
        };
        // Unread news is replaced: only the latest set matters.
        let picture = Picture {
            peers: Arc::new(set),
            complete: self.complete,
        };
        let modified = self.pictures.send_if_modified(|published| {
            let changed = published.as_ref() != Some(&picture);
            if changed {
                *published = Some(picture);
            }
            changed
        });
        if modified {
            let next = self.last_told.map_or(begun, |last| last + TELLING);
            self.telling.get_or_insert(next);
        }
        let now = Instant::now();
        self.next = Some(now + self.spacing.max((now - begun) * (SHARE - 1)));
    }

    /// Says what is new since it was last said; if that is much, only how much.
    fn tell(&mut self, now: Instant) {
        self.telling = None;
        self.last_told = Some(now);
        let Picture { peers: present, .. } = self.pictures.borrow().clone().unwrap_or_default();
        let known = std::mem::replace(&mut self.told, Arc::clone(&present));
        let news = present
            .iter()
            .filter(|(subnets, lease)| known.get(subnets) != Some(lease));
        let gone = known.keys().filter(|subnets| !present.contains_key(subnets));
        let (count, gone_count) = (news.clone().count(), gone.clone().count());
        if count + gone_count > LINES {
            info!("{count} peers are new or have changed, {gone_count} are gone");
            return;
        }
        for (subnets, lease) in news {
            tell_of(known.get(subnets).map(|lease| &**lease), lease);
        }
        for gone in gone {
            info!("peer {} is gone", gone.to_cidrs());
        }
    }
}

fn tell_of(known: Option<&Lease>, lease: &Lease) {
    match known {
        None => info!("peer {} at {}", lease.subnets.to_cidrs(), lease.value.public_ip),
        Some(known) if known.value.public_ip != lease.value.public_ip => {
            info!(
                "peer {} moved from {} to {}",
                lease.subnets.to_cidrs(),
                known.value.public_ip,
                lease.value.public_ip
            );
        }
        Some(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use tokio::sync::watch;

    use super::*;
    use crate::{
        lease::record::{LeaseValue, Subnets},
        registry::Revision,
    };

    fn peers(count: u32) -> PeerSet {
        let lease = |number: u32| Lease {
            subnets: Subnets::new(
                ipnet::Ipv4Net::new_assert((0x0a00_0000 + (number << 8)).into(), 24),
                None,
            ),
            value: LeaseValue::new(Ipv4Addr::new(192, 0, 2, 1)),
            revision: Revision(1),
            created: Revision(1),
            ttl: None,
        };
        (0..count)
            .map(lease)
            .map(|lease| (lease.subnets, Arc::new(lease)))
            .collect()
    }

    fn published(receiver: &watch::Receiver<Option<Picture>>) -> usize {
        receiver.borrow().as_ref().map_or(0, |picture| picture.peers.len())
    }

    #[tokio::test(start_paused = true)]
    async fn a_lone_change_is_published_at_once() {
        let (sender, receiver) = watch::channel(None);
        let mut publisher = Publisher::new(&sender);
        for count in 0..5 {
            publisher.note_change();
            assert!(publisher.due().unwrap() <= Instant::now());
            publisher.run(|| peers(count));
            assert_eq!(published(&receiver), count as usize);
            tokio::time::sleep(SPACING).await;
        }
        assert!(receiver.has_changed().unwrap(), "an empty set is news, too");
    }

    #[tokio::test(start_paused = true)]
    async fn a_storm_is_few_sets_and_the_last_one_is_published() {
        let (sender, mut receiver) = watch::channel(None);
        let mut publisher = Publisher::new(&sender);
        let (mut made, begun) = (0, Instant::now());
        for count in 0..10_000 {
            publisher.note_change();
            publisher.run(|| {
                made += 1;
                peers(count)
            });
            if count % 5 == 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        let most = begun.elapsed().div_duration_f64(SPACING) as u32 + 1;
        assert!((2..=most).contains(&made) && most < 100, "{made} of {most}");
        tokio::time::sleep_until(publisher.due().unwrap()).await;
        publisher.run(|| peers(9_999));
        receiver.mark_unchanged();
        assert_eq!(published(&receiver), 9_999);
    }

    #[tokio::test(start_paused = true)]
    async fn the_more_peers_there_are_the_fewer_sets_a_storm_is_until_it_is_over() {
        let storm = async |count| {
            let (sender, _receiver) = watch::channel(None);
            let mut publisher = Publisher::new(&sender);
            let set = peers(count);
            let mut times = Vec::new();
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_secs(4) {
                publisher.note_change();
                publisher.run(|| {
                    times.push(begun.elapsed());
                    set.clone()
                });
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            // The last of it, and after a while some that come together.
            tokio::time::sleep_until(publisher.due().unwrap()).await;
            publisher.run(|| set.clone());
            tokio::time::sleep(Duration::from_secs(2)).await;
            publisher.note_changes(9);
            publisher.run(|| set.clone());
            assert!(publisher.next.unwrap() - Instant::now() <= SPACING);
            times
        };
        let many = storm(10_000).await;
        assert!(
            many[1] <= SPACING && many[2] <= 4 * SPACING,
            "the first ones wait as long as ever: {many:?}"
        );
        assert!((10..=14).contains(&many.len()), "{many:?}");
        let few = storm(100).await;
        assert!((75..=80).contains(&few.len()), "{few:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn what_has_changed_is_published_before_a_long_silence() {
        let (sender, receiver) = watch::channel(None);
        let mut publisher = Publisher::new(&sender);
        publisher.note_change();
        publisher.run(|| peers(1));
        publisher.note_change();
        publisher.run(|| peers(2));
        assert_eq!(published(&receiver), 1, "too soon");
        publisher.flush(|| peers(2));
        assert_eq!(published(&receiver), 2);
    }
}
