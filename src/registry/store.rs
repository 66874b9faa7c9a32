//! The state of a registry that is not etcd: records, revisions and times to live as a pure state machine.
//!
//! It does no I/O and reads no clock: the time is passed in, as the distance from an epoch that the owner chooses once
//! (`now`). [`memory`](super::memory) keeps one in memory, [`file`](super::file) writes it to a file as JSON. Keys are full
//! names here, prefix included, so that several networks share one store.

use std::{collections::BTreeMap, time::Duration};

use serde::{Deserialize, Serialize};

use super::{Event, Record, Revision, TtlId};

/// All records of a registry.
///
/// The calls that look at or change records do not expire any by themselves: call [`Store::expire`] first.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Store {
    /// The revision of the last change.
    revision: i64,
    /// The last id given to a time to live; ids are not reused, so that a late refresh cannot hit a stranger's record.
    last_ttl: i64,
    records: BTreeMap<String, Stored>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Stored {
    value: Value,
    revision: i64,
    /// `None`: written by an earlier version, which did not note it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    created: Option<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ttl: Option<Ttl>,
}

impl Stored {
    /// Of what earlier versions wrote only the last change is known.
    fn created(&self) -> i64 {
        self.created.unwrap_or(self.revision)
    }
}

/// A time to live; it belongs to one record only and ends with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Ttl {
    id: i64,
    length_ms: u64,
    expires_ms: u64,
}

/// Values are JSON text in practice, so they are kept as text, which people can read; bytes that are not are a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
enum Value {
    Text(String),
    Bytes(Vec<u8>),
}

impl Value {
    fn new(value: &[u8]) -> Value {
        match std::str::from_utf8(value) {
            Ok(text) => Value::Text(text.to_owned()),
            Err(_) => Value::Bytes(value.to_vec()),
        }
    }

    fn to_bytes(&self) -> Vec<u8> {
        match self {
            Value::Text(text) => text.as_bytes().to_vec(),
            Value::Bytes(bytes) => bytes.clone(),
        }
    }
}

impl Store {
    /// The revision of the last change; 0 if there was none.
    pub fn revision(&self) -> Revision {
        Revision(self.revision)
    }

    /// Drops each record whose time to live has run out at `now`. Whether there was any.
    pub fn expire(&mut self, now: Duration) -> bool {
        let before = self.records.len();
        let now = millis(now);
        self.records
            .retain(|_, stored| stored.ttl.is_none_or(|ttl| ttl.expires_ms > now));
        let gone = before - self.records.len();
        // One revision each, as etcd does it; a count of records fits i64.
        self.revision += gone as i64;
        gone > 0
    }

    /// When the next record expires, on the clock of `now`.
    pub fn next_expiry(&self) -> Option<Duration> {
        self.records
            .values()
            .filter_map(|stored| stored.ttl)
            .map(|ttl| Duration::from_millis(ttl.expires_ms))
            .min()
    }

    /// The record at `key`.
    pub fn get(&self, key: &str) -> Option<Record> {
        self.records.get(key).map(|stored| record(key, stored))
    }

    /// The records whose key begins with `start`, by key.
    pub fn list(&self, start: &str) -> Vec<Record> {
        self.records
            .range(start.to_owned()..)
            .take_while(|(key, _)| key.starts_with(start))
            .map(|(key, stored)| record(key, stored))
            .collect()
    }

    /// All keys that end in `end`.
    pub fn keys_ending_in(&self, end: &str) -> Vec<String> {
        self.records.keys().filter(|key| key.ends_with(end)).cloned().collect()
    }

    /// Makes a record where there is none; see [`Registry::create`](super::Registry::create).
    pub fn create(&mut self, key: &str, value: &[u8], ttl: Option<Duration>, now: Duration) -> Option<Record> {
        if self.records.contains_key(key) {
            return None;
        }
        let ttl = ttl.map(|length| {
            self.last_ttl += 1;
            Ttl {
                id: self.last_ttl,
                length_ms: millis(length),
                expires_ms: millis(now.saturating_add(length)),
            }
        });
        Some(self.write(key, value, ttl))
    }

    /// Gives the record at `key` a new value if it is still at `seen`, bound to `ttl`: its own time to live, or none any more.
    pub fn replace(&mut self, key: &str, seen: Revision, value: &[u8], ttl: Option<TtlId>) -> Option<Record> {
        let stored = self.records.get(key).filter(|stored| stored.revision == seen.0)?;
        let ttl = match ttl {
            // A time to live belongs to one record only: any other one has ended, or is a stranger's.
            Some(ttl) => Some(stored.ttl.filter(|own| own.id == ttl.0)?),
            None => None,
        };
        Some(self.write(key, value, ttl))
    }

    /// Deletes the record at `key` if it is still at `seen`.
    pub fn delete(&mut self, key: &str, seen: Revision) -> bool {
        let unchanged = self.records.get(key).is_some_and(|stored| stored.revision == seen.0);
        if unchanged {
            self.records.remove(key);
            self.revision += 1;
        }
        unchanged
    }

    /// Writes a record that never expires, whatever is there.
    pub fn put(&mut self, key: &str, value: &[u8]) {
        self.write(key, value, None);
    }

    /// Starts a time to live anew: its length, or `None` when it has ended.
    pub fn refresh(&mut self, ttl: TtlId, now: Duration) -> Option<Duration> {
        let ttl = self
            .records
            .values_mut()
            .filter_map(|stored| stored.ttl.as_mut())
            .find(|own| own.id == ttl.0)?;
        let length = Duration::from_millis(ttl.length_ms);
        ttl.expires_ms = millis(now.saturating_add(length));
        Some(length)
    }

    /// How long a time to live still has, or `None` when it has ended.
    pub fn time_left(&self, ttl: TtlId, now: Duration) -> Option<Duration> {
        let ttl = self
            .records
            .values()
            .filter_map(|stored| stored.ttl)
            .find(|own| own.id == ttl.0)?;
        ttl.expires_ms
            .checked_sub(millis(now))
            .filter(|left| *left > 0)
            .map(Duration::from_millis)
    }

    fn write(&mut self, key: &str, value: &[u8], ttl: Option<Ttl>) -> Record {
        self.revision += 1;
        let before = self.records.get(key).map(Stored::created);
        let stored = Stored {
            value: Value::new(value),
            revision: self.revision,
            created: Some(before.unwrap_or(self.revision)),
            ttl,
        };
        let written = record(key, &stored);
        self.records.insert(key.to_owned(), stored);
        written
    }
}

/// What leads from one picture of records to another, each by key: what is gone, and then what is new or has a new value,
/// oldest first. Deletions come first because a host that moves frees its old subnet before it takes another.
pub fn changes(before: &[Record], after: &[Record]) -> Vec<Event> {
    let old: BTreeMap<&str, Revision> = before
        .iter()
        .map(|record| (record.key.as_str(), record.revision))
        .collect();
    let new: BTreeMap<&str, Revision> = after
        .iter()
        .map(|record| (record.key.as_str(), record.revision))
        .collect();
    let gone = old
        .keys()
        .filter(|key| !new.contains_key(*key))
        .map(|key| Event::Delete { key: (*key).to_owned() });
    let mut written: Vec<&Record> = after
        .iter()
        .filter(|record| old.get(record.key.as_str()) != Some(&record.revision))
        .collect();
    written.sort_by_key(|record| record.revision);
    gone.chain(written.into_iter().cloned().map(Event::Put)).collect()
}

fn record(key: &str, stored: &Stored) -> Record {
    Record {
        key: key.to_owned(),
        value: stored.value.to_bytes(),
        revision: Revision(stored.revision),
        created: Revision(stored.created()),
        ttl: stored.ttl.map(|ttl| TtlId(ttl.id)),
    }
}

/// Milliseconds; what does not fit (half a billion years) is the end of time.
fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOW: Duration = Duration::from_secs(1_000);
    const TTL: Duration = Duration::from_secs(10);

    fn seconds(count: u64) -> Duration {
        NOW + Duration::from_secs(count)
    }

    #[test]
    fn a_record_is_created_only_where_none_is() {
        let mut store = Store::default();
        assert!(store.create("/a", b"1", None, NOW).is_some());
        assert_eq!(store.create("/a", b"2", None, NOW), None);
        assert_eq!(store.get("/a").unwrap().value, b"1");
    }

    #[test]
    fn replace_and_delete_need_the_revision_that_is_there() {
        let mut store = Store::default();
        let first = store.create("/a", b"1", Some(TTL), NOW).unwrap();
        let second = store.replace("/a", first.revision, b"2", first.ttl).unwrap();
        assert_eq!(second.ttl, first.ttl);
        assert!(second.revision > first.revision);
        assert_eq!(store.replace("/a", first.revision, b"3", first.ttl), None);
        assert!(!store.delete("/a", first.revision));
        assert!(store.delete("/a", second.revision));
        assert_eq!(store.replace("/a", second.revision, b"3", second.ttl), None);
    }

    #[test]
    fn a_replaced_record_is_bound_to_its_own_time_or_to_none() {
        let mut store = Store::default();
        let first = store.create("/a", b"1", Some(TTL), NOW).unwrap();
        let other = store.create("/b", b"1", Some(TTL), NOW).unwrap();
        assert_eq!(store.replace("/a", first.revision, b"2", other.ttl), None);
        let free = store.replace("/a", first.revision, b"2", None).unwrap();
        assert_eq!(free.ttl, None);
        assert_eq!(
            store.replace("/a", free.revision, b"3", first.ttl),
            None,
            "that has ended"
        );
    }

    #[test]
    fn a_record_expires_at_the_end_of_its_time_and_not_before() {
        let mut store = Store::default();
        let leased = store.create("/a", b"1", Some(TTL), NOW).unwrap();
        store.create("/b", b"1", None, NOW).unwrap();
        assert_eq!(store.next_expiry(), Some(seconds(10)));
        assert!(!store.expire(seconds(10) - Duration::from_millis(1)));
        let before = store.revision();
        assert!(store.expire(seconds(10)));
        assert_eq!(store.get("/a"), None);
        assert!(store.get("/b").is_some());
        assert!(store.revision() > before);
        assert_eq!(store.refresh(leased.ttl.unwrap(), seconds(10)), None);
        assert_eq!(store.next_expiry(), None);
    }

    #[test]
    fn refresh_starts_the_time_anew() {
        let mut store = Store::default();
        let ttl = store.create("/a", b"1", Some(TTL), NOW).unwrap().ttl.unwrap();
        assert_eq!(store.time_left(ttl, seconds(4)), Some(Duration::from_secs(6)));
        assert_eq!(store.refresh(ttl, seconds(9)), Some(TTL));
        assert!(!store.expire(seconds(18)));
        assert_eq!(store.time_left(ttl, seconds(18)), Some(Duration::from_secs(1)));
        assert_eq!(store.time_left(ttl, seconds(19)), None);
    }

    #[test]
    fn put_makes_a_record_permanent() {
        let mut store = Store::default();
        let ttl = store.create("/a", b"1", Some(TTL), NOW).unwrap().ttl.unwrap();
        store.put("/a", b"2");
        assert_eq!(store.get("/a").unwrap().ttl, None);
        assert_eq!(store.time_left(ttl, NOW), None);
        assert!(!store.expire(seconds(100)));
    }

    #[test]
    fn list_gives_a_prefix_and_nothing_else() {
        let mut store = Store::default();
        for key in [
            "/n/subnets/b",
            "/n/subnets/a",
            "/n/subnet",
            "/n/subnets0",
            "/m/subnets/a",
        ] {
            store.put(key, b"");
        }
        let keys: Vec<String> = store.list("/n/subnets/").into_iter().map(|record| record.key).collect();
        assert_eq!(keys, ["/n/subnets/a", "/n/subnets/b"]);
    }

    #[test]
    fn text_is_kept_readable_and_other_bytes_survive() {
        let mut store = Store::default();
        store.put("/text", br#"{"Network":"10.5.0.0/16"}"#);
        store.put("/bytes", &[0xff, 0, 7]);
        let json = serde_json::to_string(&store).unwrap();
        assert!(json.contains(r#"\"Network\":\"10.5.0.0/16\""#), "{json}");
        let read: Store = serde_json::from_str(&json).unwrap();
        assert_eq!(read.get("/bytes").unwrap().value, [0xff, 0, 7]);
    }

    #[derive(Debug, Clone)]
    enum Step {
        Create { key: u8, ttl: Option<u8> },
        Replace { key: u8, stale: bool },
        Delete { key: u8, stale: bool },
        Put { key: u8 },
        Refresh { key: u8 },
        Wait { seconds: u8 },
    }

    fn step() -> impl Strategy<Value = Step> {
        let key = 0..4_u8;
        prop_oneof![
            (key.clone(), proptest::option::of(1..20_u8)).prop_map(|(key, ttl)| Step::Create { key, ttl }),
            (key.clone(), any::<bool>()).prop_map(|(key, stale)| Step::Replace { key, stale }),
            (key.clone(), any::<bool>()).prop_map(|(key, stale)| Step::Delete { key, stale }),
            key.clone().prop_map(|key| Step::Put { key }),
            key.prop_map(|key| Step::Refresh { key }),
            (1..10_u8).prop_map(|seconds| Step::Wait { seconds }),
        ]
    }

    /// What must be at a key, kept in the plainest way: value and the second at which it ends.
    type Model = BTreeMap<String, (Vec<u8>, Option<(u64, u64)>)>;

    proptest! {
        #[test]
        fn store_agrees_with_a_plain_model(steps in proptest::collection::vec(step(), 1..60)) {
            let (mut store, mut model, mut clock) = (Store::default(), Model::new(), 0_u64);
            for (number, step) in steps.into_iter().enumerate() {
                let value = number.to_string().into_bytes();
                let before = (store.revision(), store.list(""));
                let seen = |store: &Store, key: &str, stale: bool| {
                    store.get(key).map_or(Revision(0), |record| Revision(record.revision.0 - i64::from(stale)))
                };
                match step {
                    Step::Create { key, ttl } => {
                        let key = format!("/{key}");
                        let made = store.create(&key, &value, ttl.map(|ttl| Duration::from_secs(ttl.into())), seconds(clock));
                        prop_assert_eq!(made.is_some(), !model.contains_key(&key));
                        model.entry(key).or_insert((value, ttl.map(|ttl| (ttl.into(), clock + u64::from(ttl)))));
                    }
                    Step::Replace { key, stale } => {
                        let key = format!("/{key}");
                        let revision = seen(&store, &key, stale);
                        let ttl = store.get(&key).and_then(|record| record.ttl);
                        let made = store.replace(&key, revision, &value, ttl);
                        prop_assert_eq!(made.is_some(), !stale && model.contains_key(&key));
                        if let (true, Some(entry)) = (made.is_some(), model.get_mut(&key)) {
                            entry.0 = value;
                        }
                    }
                    Step::Delete { key, stale } => {
                        let key = format!("/{key}");
                        let revision = seen(&store, &key, stale);
                        let gone = store.delete(&key, revision);
                        prop_assert_eq!(gone, !stale && model.contains_key(&key));
                        if gone {
                            model.remove(&key);
                        }
                    }
                    Step::Put { key } => {
                        let key = format!("/{key}");
                        store.put(&key, &value);
                        model.insert(key, (value, None));
                    }
                    Step::Refresh { key } => {
                        let key = format!("/{key}");
                        if let Some(ttl) = store.get(&key).and_then(|record| record.ttl) {
                            let entry = model.get_mut(&key).unwrap();
                            let (length, _) = entry.1.unwrap();
                            prop_assert_eq!(store.refresh(ttl, seconds(clock)), Some(Duration::from_secs(length)));
                            entry.1 = Some((length, clock + length));
                        }
                    }
                    Step::Wait { seconds: count } => {
                        clock += u64::from(count);
                        store.expire(seconds(clock));
                        model.retain(|_, entry| entry.1.is_none_or(|(_, end)| end > clock));
                    }
                }
                let after = store.list("");
                let found: BTreeMap<_, _> = after.iter().map(|record| (record.key.clone(), record.value.clone())).collect();
                let wanted: BTreeMap<_, _> = model.iter().map(|(key, entry)| (key.clone(), entry.0.clone())).collect();
                prop_assert_eq!(found, wanted);
                let ends = model.values().filter_map(|entry| entry.1).map(|(_, end)| seconds(end)).min();
                prop_assert_eq!(store.next_expiry(), ends);

                prop_assert!(store.revision() >= before.0);
                prop_assert_eq!(store.revision() > before.0, after != before.1);
                prop_assert!(after.iter().all(|record| record.revision <= store.revision()));

                let mut replayed = before.1.clone();
                for event in changes(&before.1, &after) {
                    let key = match &event { Event::Put(record) => &record.key, Event::Delete { key } => key };
                    replayed.retain(|record| record.key != *key);
                    if let Event::Put(record) = event {
                        replayed.push(record);
                    }
                }
                replayed.sort_by(|one, other| one.key.cmp(&other.key));
                prop_assert_eq!(replayed, after);

                let read: Store = serde_json::from_slice(&serde_json::to_vec(&store).unwrap()).unwrap();
                prop_assert_eq!(&read, &store);
            }
        }
    }
}
