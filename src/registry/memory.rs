//! The registry in memory, for tests: the real semantics, a clock that tokio's tests can move, and faults on demand.

use std::{fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use tokio::{sync::watch, time::Instant};

use super::{
    Error, Event, Record, Registry, Revision, TtlId, Watch,
    prefix::Prefix,
    store::{self, Store},
};

/// A registry in memory. Clones share its records; so do the handles for other networks that [`MemoryRegistry::network`]
/// gives.
///
/// Time is tokio's, so that a test may pause it and let a day pass at once.
#[derive(Clone)]
pub struct MemoryRegistry {
    prefix: Prefix,
    epoch: Instant,
    state: Arc<watch::Sender<State>>,
}

#[derive(Debug)]
struct State {
    store: Store,
    available: bool,
    /// Whether it takes no more records, as etcd does when its disk quota is used up.
    full: bool,
    /// How often the running watches were made to fail; a watch ends when it is not what it was at its start.
    faults: u64,
}

impl MemoryRegistry {
    /// An empty registry with flannel's default prefix.
    pub fn new() -> MemoryRegistry {
        let state = State {
            store: Store::default(),
            available: true,
            full: false,
            faults: 0,
        };
        MemoryRegistry {
            prefix: Prefix::new("/coreos.com/network"),
            epoch: Instant::now(),
            state: Arc::new(watch::Sender::new(state)),
        }
    }

    /// The network at another prefix in the same registry.
    pub fn network(&self, prefix: &str) -> MemoryRegistry {
        MemoryRegistry {
            prefix: Prefix::new(prefix),
            ..self.clone()
        }
    }

    /// Ends all running watches with an error, as a broken connection does.
    pub fn fail_watches(&self) {
        self.state.send_modify(|state| state.faults += 1);
    }

    /// Makes the registry unreachable, or reachable again. While it is not, each call fails and running watches end.
    pub fn set_available(&self, available: bool) {
        self.state.send_modify(|state| {
            state.available = available;
            state.faults += u64::from(!available);
        });
    }

    /// Lets the registry take no more records, or take them again. While it is full it can be read, times to live can be started anew
    /// and records be deleted.
    pub fn set_full(&self, full: bool) {
        self.state.send_modify(|state| state.full = full);
    }

    /// Nothing can be written to a registry that is full.
    fn has_room(&self) -> Result<(), Error> {
        if self.state.borrow().full {
            return Err(Error::Failed {
                registry: self.describe(),
                reason: "it was made full".to_owned(),
            });
        }
        Ok(())
    }

    fn now(&self) -> Duration {
        self.epoch.elapsed()
    }

    fn unavailable(&self, reason: &str) -> Error {
        Error::Unavailable {
            registry: self.describe(),
            reason: reason.to_owned(),
        }
    }

    /// Does something with the records that are alive, and wakes the watches if it changed any.
    fn with_store<T>(&self, act: impl FnOnce(&mut Store, Duration) -> T) -> Result<T, Error> {
        let now = self.now();
        let mut outcome = None;
        self.state.send_if_modified(|state| {
            if !state.available {
                return false;
            }
            let before = state.store.revision();
            state.store.expire(now);
            outcome = Some(act(&mut state.store, now));
            state.store.revision() != before
        });
        outcome.ok_or_else(|| self.unavailable("it was made unavailable"))
    }
}

impl Default for MemoryRegistry {
    fn default() -> MemoryRegistry {
        MemoryRegistry::new()
    }
}

impl fmt::Debug for MemoryRegistry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryRegistry")
            .field("prefix", &self.prefix)
            .finish_non_exhaustive()
    }
}

#[async_trait]
impl Registry for MemoryRegistry {
    fn describe(&self) -> String {
        "memory".to_owned()
    }

    fn full_key(&self, key: &str) -> String {
        self.prefix.full(key)
    }

    async fn get(&self, key: &str) -> Result<Option<Record>, Error> {
        let found = self.with_store(|store, _| store.get(&self.full_key(key)))?;
        Ok(found.map(|record| self.prefix.relative_record(record)))
    }

    async fn list(&self, start: &str) -> Result<Vec<Record>, Error> {
        let found = self.with_store(|store, _| store.list(&self.full_key(start)))?;
        Ok(found
            .into_iter()
            .map(|record| self.prefix.relative_record(record))
            .collect())
    }

    async fn watch(&self, start: &str) -> Result<(Vec<Record>, Box<dyn Watch>), Error> {
        let changed = self.state.subscribe();
        let faults = changed.borrow().faults;
        let picture = self.list(start).await?;
        let watch = MemoryWatch {
            registry: self.clone(),
            start: start.to_owned(),
            begun_at: self.with_store(|store, _| store.revision())?,
            changed,
            faults,
            picture: picture.clone(),
        };
        Ok((picture, Box::new(watch)))
    }

    async fn create(&self, key: &str, value: &[u8], ttl: Option<Duration>) -> Result<Option<Record>, Error> {
        self.has_room()?;
        let made = self.with_store(|store, now| store.create(&self.full_key(key), value, ttl, now))?;
        Ok(made.map(|record| self.prefix.relative_record(record)))
    }

    async fn replace(&self, record: &Record, value: &[u8]) -> Result<Option<Record>, Error> {
        self.has_room()?;
        let made =
            self.with_store(|store, _| store.replace(&self.full_key(&record.key), record.revision, value, record.ttl))?;
        Ok(made.map(|record| self.prefix.relative_record(record)))
    }

    async fn delete(&self, record: &Record) -> Result<bool, Error> {
        self.with_store(|store, _| store.delete(&self.full_key(&record.key), record.revision))
    }

    async fn put(&self, key: &str, value: &[u8]) -> Result<(), Error> {
        self.has_room()?;
        self.with_store(|store, _| store.put(&self.full_key(key), value))
    }

    async fn refresh(&self, ttl: TtlId) -> Result<Option<Duration>, Error> {
        self.with_store(|store, now| store.refresh(ttl, now))
    }

    async fn time_left(&self, ttl: TtlId) -> Result<Option<Duration>, Error> {
        self.with_store(|store, now| store.time_left(ttl, now))
    }

    async fn similar_configs(&self) -> Vec<String> {
        self.with_store(|store, _| store.keys_ending_in("/config"))
            .unwrap_or_default()
    }
}

struct MemoryWatch {
    registry: MemoryRegistry,
    start: String,
    begun_at: Revision,
    changed: watch::Receiver<State>,
    faults: u64,
    /// What has been told so far.
    picture: Vec<Record>,
}

#[async_trait]
impl Watch for MemoryWatch {
    fn begun_at(&self) -> Revision {
        self.begun_at
    }

    async fn next(&mut self) -> Result<Vec<Event>, Error> {
        loop {
            if self.changed.borrow_and_update().faults != self.faults {
                return Err(self.registry.unavailable("the watch was made to fail"));
            }
            let start = self.registry.full_key(&self.start);
            let (picture, expiry) = self
                .registry
                .with_store(|store, _| (store.list(&start), store.next_expiry()))?;
            let picture: Vec<Record> = picture
                .into_iter()
                .map(|record| self.registry.prefix.relative_record(record))
                .collect();
            let events = store::changes(&self.picture, &picture);
            self.picture = picture;
            if !events.is_empty() {
                return Ok(events);
            }
            let expiry = expiry.map(|expiry| self.registry.epoch + expiry);
            tokio::select! {
                // Not by chance, so that a test of simulated time runs the same each time.
                biased;
                // The sender lives as long as `registry`, so this ends with a change only.
                _ = self.changed.changed() => {}
                () = sleep_until(expiry) => {}
            }
        }
    }
}

async fn sleep_until(end: Option<Instant>) {
    match end {
        Some(end) => tokio::time::sleep_until(end).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: Duration = Duration::from_secs(86_400);

    #[tokio::test(start_paused = true)]
    async fn a_watch_sees_a_lease_expire_after_a_day_without_polling() {
        let registry = MemoryRegistry::new();
        registry.create("subnets/a", b"1", Some(DAY)).await.unwrap().unwrap();
        let (picture, mut watch) = registry.watch("subnets/").await.unwrap();
        assert_eq!(picture.len(), 1);
        let started = Instant::now();
        assert_eq!(
            watch.next().await.unwrap(),
            [Event::Delete {
                key: "subnets/a".to_owned()
            }]
        );
        // Tokio's timer counts in whole milliseconds.
        assert!(
            started.elapsed() <= DAY + Duration::from_millis(2),
            "{:?}",
            started.elapsed()
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_refreshed_lease_outlives_its_first_day() {
        let registry = MemoryRegistry::new();
        let ttl = registry
            .create("subnets/a", b"1", Some(DAY))
            .await
            .unwrap()
            .unwrap()
            .ttl
            .unwrap();
        tokio::time::advance(DAY - Duration::from_secs(1)).await;
        assert_eq!(registry.refresh(ttl).await.unwrap(), Some(DAY));
        tokio::time::advance(DAY - Duration::from_secs(1)).await;
        assert!(registry.get("subnets/a").await.unwrap().is_some());
    }

    #[tokio::test]
    async fn failed_watches_end_and_a_new_one_works() {
        let registry = MemoryRegistry::new();
        let (_, mut watch) = registry.watch("").await.unwrap();
        registry.fail_watches();
        let error = watch.next().await.unwrap_err();
        assert!(matches!(error, Error::Unavailable { .. }), "{error}");

        let (_, mut watch) = registry.watch("").await.unwrap();
        registry.put("config", b"{}").await.unwrap();
        assert!(matches!(&watch.next().await.unwrap()[..], [Event::Put(record)] if record.key == "config"));
    }

    #[tokio::test]
    async fn an_unavailable_registry_fails_calls_and_watches_until_it_is_back() {
        let registry = MemoryRegistry::new();
        let (_, mut watch) = registry.watch("").await.unwrap();
        registry.set_available(false);
        assert!(matches!(registry.get("config").await, Err(Error::Unavailable { .. })));
        assert!(matches!(watch.next().await, Err(Error::Unavailable { .. })));
        registry.set_available(true);
        assert!(registry.get("config").await.unwrap().is_none());
        assert!(watch.next().await.is_err(), "the old watch missed changes");
    }
}
