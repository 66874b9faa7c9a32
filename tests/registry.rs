//! One suite for all registries: what the text of `flannel::registry` promises, through its public door.

#[path = "lab/etcd.rs"]
mod etcd_server;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use flannel::registry::{
    Event, Record, Registry, Revision, Watch,
    etcd::{EtcdConfig, EtcdRegistry},
    file::FileRegistry,
    memory::MemoryRegistry,
};
use tokio::{task::JoinSet, time::timeout};

use etcd_server::EtcdServer;

/// Longer than anything here takes, so that what never comes fails the test.
const PATIENCE: Duration = Duration::from_secs(20);

const PREFIX: &str = "/coreos.com/network";

/// A kind of registry to test.
trait Lab {
    /// A new and empty registry.
    fn new() -> Self;

    /// A client of its own for the network at `prefix`.
    fn network(&self, prefix: &str) -> Arc<dyn Registry>;

    /// A time to live that is short and yet kept to.
    const TTL: Duration;
}

struct Memory(MemoryRegistry);

impl Lab for Memory {
    const TTL: Duration = Duration::from_millis(200);

    fn new() -> Memory {
        Memory(MemoryRegistry::new())
    }

    fn network(&self, prefix: &str) -> Arc<dyn Registry> {
        Arc::new(self.0.network(prefix))
    }
}

struct Directory(PathBuf);

impl Lab for Directory {
    const TTL: Duration = Duration::from_millis(400);

    fn new() -> Directory {
        use std::hash::{BuildHasher, RandomState};
        let name = format!("flannel-registry-{:016x}", RandomState::new().hash_one(0));
        Directory(std::env::temp_dir().join(name))
    }

    fn network(&self, prefix: &str) -> Arc<dyn Registry> {
        Arc::new(FileRegistry::open(&self.0, prefix).unwrap())
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        // What is left behind in the place for temporary files is no reason to fail.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

struct Etcd(EtcdServer);

impl Lab for Etcd {
    /// etcd grants nothing shorter.
    const TTL: Duration = Duration::from_secs(2);

    fn new() -> Etcd {
        Etcd(EtcdServer::start())
    }

    fn network(&self, prefix: &str) -> Arc<dyn Registry> {
        let config = EtcdConfig {
            endpoints: vec![self.0.url()],
            prefix: prefix.to_owned(),
            ..EtcdConfig::default()
        };
        Arc::new(EtcdRegistry::connect(config).unwrap())
    }
}

/// Runs each test against each kind of registry.
macro_rules! conformance {
    ($($test:ident)*) => {
        mod memory { $(#[tokio::test] async fn $test() { super::$test::<super::Memory>().await; })* }
        mod file { $(#[tokio::test] async fn $test() { super::$test::<super::Directory>().await; })* }
        mod etcd { $(#[tokio::test] async fn $test() { super::$test::<super::Etcd>().await; })* }
    };
}

conformance! {
    a_record_is_created_only_where_none_is
    one_of_twenty_creators_wins
    a_record_is_replaced_only_at_the_revision_that_was_seen
    a_record_is_deleted_only_at_the_revision_that_was_seen
    each_change_has_a_larger_revision
    an_expired_record_is_gone_for_all
    a_refreshed_record_stays
    a_replaced_record_keeps_its_time_to_live
    a_record_without_time_to_live_stays
    a_record_that_was_put_never_expires
    a_list_is_in_order_and_holds_nothing_else
    values_of_any_bytes_come_back
    a_watch_tells_of_each_kind_of_change
    a_watch_begins_where_its_picture_ends
    a_watch_hears_of_its_part_only
    two_networks_do_not_see_each_other
    all_spellings_of_a_prefix_are_one_network
    similar_configurations_are_found
}

async fn a_record_is_created_only_where_none_is<L: Lab>() {
    let lab = L::new();
    let registry = lab.network(PREFIX);
    let made = registry
        .create("subnets/10.5.1.0-24", b"first", None)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(
        (made.key.as_str(), &made.value[..]),
        ("subnets/10.5.1.0-24", &b"first"[..])
    );
    assert_eq!(
        registry.create("subnets/10.5.1.0-24", b"second", None).await.unwrap(),
        None
    );
    assert_eq!(registry.get("subnets/10.5.1.0-24").await.unwrap(), Some(made));
    assert_eq!(registry.get("subnets/10.5.2.0-24").await.unwrap(), None);
}

async fn one_of_twenty_creators_wins<L: Lab>() {
    let lab = L::new();
    let mut creators = JoinSet::new();
    for number in 0..20_u8 {
        let registry = lab.network(PREFIX);
        creators.spawn(async move {
            registry
                .create("subnets/a", &[number], Some(Duration::from_secs(60)))
                .await
        });
    }
    let outcomes = creators.join_all().await;
    let winners: Vec<Record> = outcomes.into_iter().filter_map(Result::unwrap).collect();
    assert_eq!(winners.len(), 1);
    assert_eq!(
        lab.network(PREFIX).get("subnets/a").await.unwrap().as_ref(),
        winners.first()
    );
}

async fn a_record_is_replaced_only_at_the_revision_that_was_seen<L: Lab>() {
    let lab = L::new();
    let registry = lab.network(PREFIX);
    let first = registry.create("hosts/a", b"1", None).await.unwrap().unwrap();
    let second = registry.replace(&first, b"2").await.unwrap().unwrap();
    assert_eq!(registry.replace(&first, b"3").await.unwrap(), None);
    assert_eq!(registry.get("hosts/a").await.unwrap().unwrap(), second);
    assert!(registry.delete(&second).await.unwrap());
    assert_eq!(registry.replace(&second, b"3").await.unwrap(), None);
    assert_eq!(registry.get("hosts/a").await.unwrap(), None);
}

async fn a_record_is_deleted_only_at_the_revision_that_was_seen<L: Lab>() {
    let lab = L::new();
    let registry = lab.network(PREFIX);
    let first = registry
        .create("hosts/a", b"1", Some(Duration::from_secs(60)))
        .await
        .unwrap()
        .unwrap();
    let second = registry.replace(&first, b"2").await.unwrap().unwrap();
    assert!(!registry.delete(&first).await.unwrap());
    assert!(registry.delete(&second).await.unwrap());
    assert!(!registry.delete(&second).await.unwrap());
    assert_eq!(registry.get("hosts/a").await.unwrap(), None);
    assert_eq!(
        registry.time_left(second.ttl.unwrap()).await.unwrap(),
        None,
        "its time to live ends with it"
    );
}

async fn each_change_has_a_larger_revision<L: Lab>() {
    let lab = L::new();
    let registry = lab.network(PREFIX);
    let mut seen = vec![Revision(0)];
    let mut first_put = None;
    for round in 0..3_u8 {
        let made = registry.create("a", &[round], None).await.unwrap().unwrap();
        let replaced = registry.replace(&made, b"x").await.unwrap().unwrap();
        registry.put("b", &[round]).await.unwrap();
        let put = registry.get("b").await.unwrap().unwrap();
        assert_eq!(made.created, made.revision);
        assert_eq!(replaced.created, made.revision, "a record is as old as it was");
        assert_eq!(registry.get("a").await.unwrap().as_ref(), Some(&replaced));
        assert_eq!(put.created, *first_put.get_or_insert(put.revision), "whoever writes it");
        assert!(registry.delete(&replaced).await.unwrap());
        seen.extend([made.revision, replaced.revision, put.revision]);
    }
    assert!(seen.is_sorted_by(|one, next| one < next), "{seen:?}");
}

async fn an_expired_record_is_gone_for_all<L: Lab>() {
    let lab = L::new();
    let (registry, other) = (lab.network(PREFIX), lab.network(PREFIX));
    let made = registry.create("subnets/a", b"1", Some(L::TTL)).await.unwrap().unwrap();
    let ttl = made.ttl.unwrap();
    assert!(registry.time_left(ttl).await.unwrap().unwrap() <= L::TTL);
    let (picture, mut watch) = other.watch("subnets/").await.unwrap();
    assert_eq!(picture, [made]);

    assert_eq!(next(&mut watch).await, [gone("subnets/a")]);
    assert_eq!(registry.get("subnets/a").await.unwrap(), None);
    assert_eq!(registry.list("").await.unwrap(), []);
    assert_eq!(registry.refresh(ttl).await.unwrap(), None);
    assert_eq!(registry.time_left(ttl).await.unwrap(), None);
    assert!(registry.create("subnets/a", b"2", None).await.unwrap().is_some());
}

async fn a_refreshed_record_stays<L: Lab>() {
    let lab = L::new();
    let registry = lab.network(PREFIX);
    let kept = registry.create("kept", b"1", Some(L::TTL)).await.unwrap().unwrap();
    registry.create("left", b"1", Some(L::TTL)).await.unwrap().unwrap();
    let (_, mut watch) = registry.watch("left").await.unwrap();
    let left_expires = next(&mut watch);
    tokio::pin!(left_expires);
    loop {
        tokio::select! {
            events = &mut left_expires => {
                assert_eq!(events, [gone("left")]);
                break;
            }
            () = tokio::time::sleep(L::TTL / 4) => {
                assert_eq!(registry.refresh(kept.ttl.unwrap()).await.unwrap(), Some(L::TTL));
            }
        }
    }
    assert_eq!(
        registry.get("kept").await.unwrap(),
        Some(kept),
        "refreshing changes no revision"
    );
}

async fn a_replaced_record_keeps_its_time_to_live<L: Lab>() {
    let lab = L::new();
    let registry = lab.network(PREFIX);
    let made = registry.create("subnets/a", b"1", Some(L::TTL)).await.unwrap().unwrap();
    let replaced = registry.replace(&made, b"2").await.unwrap().unwrap();
    assert_eq!(replaced.ttl, made.ttl);
    let (picture, mut watch) = registry.watch("subnets/").await.unwrap();
    assert_eq!(picture, [replaced]);
    assert_eq!(next(&mut watch).await, [gone("subnets/a")]);
}

async fn a_record_without_time_to_live_stays<L: Lab>() {
    let lab = L::new();
    let registry = lab.network(PREFIX);
    let reserved = registry.create("reserved", b"1", None).await.unwrap().unwrap();
    assert_eq!(reserved.ttl, None);
    let reserved = registry.replace(&reserved, b"2").await.unwrap().unwrap();
    registry.create("leased", b"1", Some(L::TTL)).await.unwrap().unwrap();
    let (_, mut watch) = registry.watch("").await.unwrap();
    assert_eq!(next(&mut watch).await, [gone("leased")]);
    assert_eq!(registry.list("").await.unwrap(), [reserved]);
}

async fn a_record_that_was_put_never_expires<L: Lab>() {
    let lab = L::new();
    let registry = lab.network(PREFIX);
    registry.create("config", b"1", Some(L::TTL)).await.unwrap().unwrap();
    registry.create("leased", b"1", Some(L::TTL)).await.unwrap().unwrap();
    registry.put("config", b"2").await.unwrap();
    let (_, mut watch) = registry.watch("leased").await.unwrap();
    assert_eq!(next(&mut watch).await, [gone("leased")]);
    let config = registry.get("config").await.unwrap().unwrap();
    assert_eq!((&config.value[..], config.ttl), (&b"2"[..], None));
}

async fn a_list_is_in_order_and_holds_nothing_else<L: Lab>() {
    let lab = L::new();
    let registry = lab.network(PREFIX);
    for key in ["subnets/b", "subnets/a", "subnets/c", "subnet", "subnets0", "config"] {
        registry.put(key, key.as_bytes()).await.unwrap();
    }
    let found = registry.list("subnets/").await.unwrap();
    assert_eq!(keys(&found), ["subnets/a", "subnets/b", "subnets/c"]);
    assert_eq!(found[0].value, b"subnets/a");
    assert_eq!(registry.list("").await.unwrap().len(), 6);
    assert_eq!(registry.list("nothing/").await.unwrap(), []);
}

async fn values_of_any_bytes_come_back<L: Lab>() {
    let lab = L::new();
    let registry = lab.network(PREFIX);
    let all: Vec<u8> = (0..=255).collect();
    for value in [
        &b""[..],
        b"{\"PublicIP\":\"192.0.2.1\"}",
        "\u{0}\n\u{2713}".as_bytes(),
        &all,
    ] {
        registry.put("value", value).await.unwrap();
        assert_eq!(registry.get("value").await.unwrap().unwrap().value, value);
    }
}

async fn a_watch_tells_of_each_kind_of_change<L: Lab>() {
    let lab = L::new();
    let (registry, other) = (lab.network(PREFIX), lab.network(PREFIX));
    let (picture, mut watch) = other.watch("subnets/").await.unwrap();
    assert_eq!(picture, []);
    let made = registry
        .create("subnets/a", b"1", Some(Duration::from_secs(60)))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(next(&mut watch).await, [Event::Put(made.clone())]);
    let replaced = registry.replace(&made, b"2").await.unwrap().unwrap();
    assert_eq!(next(&mut watch).await, [Event::Put(replaced.clone())]);
    assert!(registry.delete(&replaced).await.unwrap());
    assert_eq!(next(&mut watch).await, [gone("subnets/a")]);
    registry.put("subnets/a", b"3").await.unwrap();
    let put = registry.get("subnets/a").await.unwrap().unwrap();
    assert_eq!(next(&mut watch).await, [Event::Put(put)]);
}

async fn a_watch_begins_where_its_picture_ends<L: Lab>() {
    const WRITERS: u8 = 4;
    const ROUNDS: u8 = 15;
    let lab = L::new();
    let mut writers = JoinSet::new();
    for writer in 0..WRITERS {
        let registry = lab.network(PREFIX);
        writers.spawn(async move {
            for round in 0..ROUNDS {
                let made = registry
                    .create(&format!("w/{writer}/{round:02}"), b"", None)
                    .await
                    .unwrap()
                    .unwrap();
                if round % 3 == 0 {
                    assert!(registry.delete(&made).await.unwrap());
                }
                registry.put(&format!("w/{writer}/counter"), &[round]).await.unwrap();
            }
        });
    }
    let mut watchers = JoinSet::new();
    for _ in 0..5 {
        let registry = lab.network(PREFIX);
        watchers.spawn(async move {
            let (picture, mut watch) = registry.watch("w/").await.unwrap();
            let mut seen: BTreeMap<String, Record> =
                picture.into_iter().map(|record| (record.key.clone(), record)).collect();
            let finished = |seen: &BTreeMap<String, Record>| {
                let counters = seen.values().filter(|record| record.key.ends_with("/counter"));
                counters.filter(|record| record.value == [ROUNDS - 1]).count() == usize::from(WRITERS)
            };
            while !finished(&seen) {
                for event in next(&mut watch).await {
                    match event {
                        Event::Put(record) => {
                            let before = seen.insert(record.key.clone(), record.clone());
                            assert!(
                                before.is_none_or(|before| before.revision < record.revision),
                                "told twice"
                            );
                        }
                        Event::Delete { key } => {
                            seen.remove(&key);
                        }
                    }
                }
            }
            seen
        });
        // The next watch begins somewhere else in the middle of the changes.
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    writers.join_all().await;
    let there: BTreeSet<String> = keys(&lab.network(PREFIX).list("w/").await.unwrap())
        .into_iter()
        .collect();
    for seen in watchers.join_all().await {
        assert_eq!(seen.into_keys().collect::<BTreeSet<_>>(), there);
    }
}

async fn a_watch_hears_of_its_part_only<L: Lab>() {
    let lab = L::new();
    let registry = lab.network(PREFIX);
    let (_, mut watch) = registry.watch("subnets/").await.unwrap();
    for key in ["config", "subnets0", "hosts/a", "subnets/a"] {
        registry.put(key, b"").await.unwrap();
    }
    let events = next(&mut watch).await;
    assert!(
        matches!(&events[..], [Event::Put(record)] if record.key == "subnets/a"),
        "{events:?}"
    );
}

async fn two_networks_do_not_see_each_other<L: Lab>() {
    let lab = L::new();
    let (one, longer) = (lab.network("/net"), lab.network("/network"));
    let (_, mut watch) = one.watch("").await.unwrap();
    longer.put("config", b"longer").await.unwrap();
    one.put("config", b"one").await.unwrap();
    let events = next(&mut watch).await;
    assert!(
        matches!(&events[..], [Event::Put(record)] if record.value == b"one"),
        "{events:?}"
    );
    for (registry, value) in [(&one, &b"one"[..]), (&longer, b"longer")] {
        let all = registry.list("").await.unwrap();
        assert_eq!(keys(&all), ["config"]);
        assert_eq!(all[0].value, value);
    }
}

async fn all_spellings_of_a_prefix_are_one_network<L: Lab>() {
    let lab = L::new();
    lab.network("/atomic.io/network").put("config", b"{}").await.unwrap();
    for spelling in ["atomic.io/network", "/atomic.io/network/", "atomic.io/network/"] {
        let registry = lab.network(spelling);
        assert!(registry.get("config").await.unwrap().is_some(), "{spelling}");
        assert_eq!(registry.full_key("config"), "/atomic.io/network/config");
    }
}

async fn similar_configurations_are_found<L: Lab>() {
    let lab = L::new();
    let registry = lab.network(PREFIX);
    assert_eq!(registry.similar_configs().await, [] as [String; 0]);
    lab.network("/atomic.io/network").put("config", b"{}").await.unwrap();
    lab.network("/atomic.io/network").put("subnets/a", b"{}").await.unwrap();
    assert_eq!(registry.similar_configs().await, ["/atomic.io/network/config"]);
}

async fn next(watch: &mut Box<dyn Watch>) -> Vec<Event> {
    timeout(PATIENCE, watch.next())
        .await
        .expect("an event comes")
        .expect("the watch lives")
}

fn gone(key: &str) -> Event {
    Event::Delete { key: key.to_owned() }
}

fn keys(records: &[Record]) -> Vec<String> {
    records.iter().map(|record| record.key.clone()).collect()
}
