//! Watching all leases: what the registry holds, as the [`PeerSet`] that the backend is to serve.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    convert::Infallible,
    net::Ipv4Addr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::{sync::watch::Sender, time::Instant};
use tracing::warn;

use crate::{
    observe::outage::Outage,
    registry::{Error, Event, Record, Registry, Revision, Watch},
};

use super::{
    complaints::Complaints,
    holding::Holding,
    publish::Publisher,
    record::{Lease, SUBNETS, Subnets, subnets_of},
    restore::Restorer,
    screen::{self, Screen},
};

/// All other hosts that use this host's backend, by subnet. The leases are shared, so that the whole set can be published anew
/// for each change to one of thousands.
pub type PeerSet = BTreeMap<Subnets, Arc<Lease>>;

/// The peers as far as they are known.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Picture {
    /// Those.
    pub peers: Arc<PeerSet>,
    /// Whether these are all, as the registry has it. What an earlier run has remembered may lack the last ones that came.
    pub complete: bool,
}

impl Picture {
    /// All of them.
    pub fn complete(peers: PeerSet) -> Self {
        Self {
            peers: Arc::new(peers),
            complete: true,
        }
    }
}

/// The PublicIPs by which this host knows its own lease.
#[derive(Debug, Clone)]
pub struct OwnAddresses(Arc<Mutex<Addresses>>);

#[derive(Debug)]
struct Addresses {
    /// The one that the host has and, while it changes, the one to come.
    present: Vec<Ipv4Addr>,
    /// All that this process has ever published or was about to: the watch may lag behind.
    ever: Vec<Ipv4Addr>,
}

impl OwnAddresses {
    /// The one.
    pub fn new(address: Ipv4Addr) -> Self {
        Self(Arc::new(Mutex::new(Addresses {
            present: vec![address],
            ever: vec![address],
        })))
    }

    /// One to come.
    pub fn add(&self, address: Ipv4Addr) {
        let mut addresses = self.locked();
        addresses.present.push(address);
        if !addresses.ever.contains(&address) {
            addresses.ever.push(address);
        }
    }

    /// The others are not this host's any more.
    pub fn settle(&self, address: Ipv4Addr) {
        self.locked().present = vec![address];
    }

    /// Whether a host with this address is this one.
    pub fn contain(&self, address: Ipv4Addr) -> bool {
        self.locked().present.contains(&address)
    }

    /// Whether there is only one: none is about to become another.
    pub fn settled(&self) -> bool {
        self.locked().present.len() == 1
    }

    /// Whether a record with this address may have been written by this process.
    pub fn ever_contained(&self, address: Ipv4Addr) -> bool {
        self.locked().ever.contains(&address)
    }

    /// Nobody panics while holding it.
    fn locked(&self) -> MutexGuard<'_, Addresses> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How long peers are kept that a registry which has lost its data does not know any more: their daemons notice within 13 s that
/// the one before is gone, ask again within 5 s, and may have to wait for some members of the cluster that do not answer.
const GRACE: Duration = Duration::from_secs(60);

/// Why this host's lease is no longer its own.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "this host has lost its subnet {}: {reason}. Ending, so that not one more packet leaves with an address that is another \
     host's by now. The next start takes another subnet; Docker, or what else reads the subnet file, has to be started again \
     then", subnets.to_cidrs()
)]
pub struct Revoked {
    subnets: Subnets,
    reason: String,
}

impl Revoked {
    pub(super) fn new(subnets: Subnets, reason: &str) -> Self {
        Self {
            subnets,
            reason: reason.to_owned(),
        }
    }
}

/// Follows the leases and publishes the peers after each change, until this host's own lease is another's. `first`: the peers'
/// records as they were last known, published until the registry tells.
///
/// A watch that ends, for whatever reason, is begun again with a new picture; peers that are in both are left alone,
/// because what is published is the whole set. Peers that are gone while the registry cannot be reached are kept till it can:
/// nobody could tell them from those that are still there. This host's own lease is put right where it can
/// be, beside all of that: peers need not wait for it. What stands there is told to `holding`.
///
/// `screen` says which leases are peers. What it refuses is said once, and never stands in the way of the others.
pub async fn watch(
    registry: &dyn Registry,
    holding: &Holding,
    addresses: &OwnAddresses,
    screen: &Screen,
    first: Option<&[Record]>,
    peers: &Sender<Option<Picture>>,
) -> Revoked {
    let in_trouble = AtomicBool::new(false);
    let mut restorer = Restorer::new(holding.clone(), addresses.clone(), screen.network().clone());
    let mut view = View::new(&holding.now().lease, addresses.clone(), screen.clone());
    let mut publisher = Publisher::new(peers);
    if let Some(first) = first {
        view.remember(first);
        publisher.note_change();
        publisher.flush(|| view.served());
    }
    let (tell, told) = tokio::sync::watch::channel(None);
    tokio::select! {
        biased;
        revoked = restorer.keep(registry, told, &in_trouble) => revoked,
        never = follow_on(registry, &mut view, &tell, &in_trouble, &mut publisher) => match never {},
    }
}

/// One watch after the other. `tell` learns what is at this host's own key.
async fn follow_on(
    registry: &dyn Registry,
    view: &mut View,
    tell: &Sender<Option<Record>>,
    in_trouble: &AtomicBool,
    publisher: &mut Publisher<'_>,
) -> Infallible {
    let mut outage = Outage::of("watching the leases");
    loop {
        let error = match registry.watch(SUBNETS).await {
            Err(error) => error,
            Ok((records, changes)) => {
                outage.over();
                follow(view, tell, in_trouble, records, changes, publisher).await
            }
        };
        // The registry may be away for long.
        publisher.flush(|| view.served());
        tokio::time::sleep(outage.failed(&error.to_string())).await;
    }
}

/// One watch, from its picture to its end, and why it has ended.
async fn follow(
    view: &mut View,
    tell: &Sender<Option<Record>>,
    in_trouble: &AtomicBool,
    records: Vec<Record>,
    mut changes: Box<dyn Watch>,
    publisher: &mut Publisher<'_>,
) -> Error {
    let own = view.take(records, changes.begun_at());
    tell.send_replace(own);
    publisher.note_picture();
    publisher.flush(|| view.served());
    view.complaints.end_picture();
    loop {
        publisher.run(|| view.served());
        view.complaints.sum_up();
        let due = [view.missing_until(), publisher.due(), view.complaints.due()];
        let due = due.into_iter().flatten().min();
        // In this order, so that neither a flood of changes keeps what is due waiting, nor chance decides what a test sees.
        tokio::select! {
            biased;
            () = at(due) => {
                if view.give_up_missing(in_trouble.load(Relaxed)) {
                    publisher.note_change();
                }
            }
            events = changes.next() => match events {
                Ok(events) => {
                    publisher.note_changes(events.len());
                    for event in events {
                        if let Some(own) = view.apply(event) {
                            tell.send_replace(own);
                        }
                    }
                }
                Err(error) => return error,
            },
            () = view.screen.changed() => publisher.note_change(),
        }
    }
}

/// Waits until then, or for ever.
pub(super) async fn at(then: Option<Instant>) {
    match then {
        Some(then) => tokio::time::sleep_until(then).await,
        None => std::future::pending().await,
    }
}

/// The leases as last seen.
struct View {
    own: Subnets,
    addresses: OwnAddresses,
    screen: Screen,
    /// The leases that are peers' by themselves. Some may overlap.
    peers: PeerSet,
    /// Those that a registry which has lost its data does not know again yet, and until when they are kept.
    missing: Option<(PeerSet, Instant)>,
    /// The highest revision that was seen: the registry's is never lower, unless it has lost data.
    highest: Revision,
    /// Those of the peers that were not served when that was last decided, and their changes.
    losers: HashMap<Subnets, Revision>,
    complaints: Complaints,
}

impl View {
    fn new(own: &Lease, addresses: OwnAddresses, screen: Screen) -> Self {
        Self {
            own: own.subnets,
            addresses,
            screen,
            peers: PeerSet::new(),
            missing: None,
            highest: own.revision,
            losers: HashMap::new(),
            complaints: Complaints::default(),
        }
    }

    /// Reads a whole new picture: this host's own record, if it is there, and the peers.
    fn picture(&mut self, records: Vec<Record>) -> (Option<Record>, PeerSet) {
        self.complaints.begin_picture();
        let own_key = self.own.key();
        let (mut own, mut peers) = (None, PeerSet::new());
        for record in records {
            if record.key == own_key {
                own = Some(record);
            } else if let Some(lease) = self.peer(&record) {
                peers.insert(lease.subnets, Arc::new(lease));
            }
        }
        (own, peers)
    }

    /// Takes the peers of an earlier run for what is, until the registry tells.
    fn remember(&mut self, records: &[Record]) {
        self.peers = self.picture(records.to_vec()).1;
        self.see(self.peers.values().map(|lease| lease.revision).max());
    }

    fn see(&mut self, revision: Option<Revision>) {
        self.highest = self.highest.max(revision.unwrap_or_default());
    }

    /// Takes the peers of a picture, made when the registry was at `revision`, for what is. What is at this host's own key.
    fn take(&mut self, records: Vec<Record>, revision: Revision) -> Option<Record> {
        let (own, picture) = self.picture(records);
        let is_older = |lease: &Arc<Lease>| {
            let known = self.peers.get(&lease.subnets);
            known.is_some_and(|known| lease.revision < known.revision)
        };
        // It was made anew, or from a backup, which may have grown since.
        let went_back = revision < self.highest || picture.values().any(is_older);
        self.highest = revision;
        let known = if went_back { self.served() } else { PeerSet::new() };
        self.peers = picture;
        let gone = known
            .into_iter()
            .filter(|(subnets, _)| !self.peers.contains_key(subnets));
        let gone: PeerSet = gone.collect();
        if !gone.is_empty() {
            warn!(
                "the registry has lost the leases of {} peers: keeping them for {} s, in which their hosts should have them again",
                gone.len(),
                GRACE.as_secs()
            );
            self.missing = Some((gone, Instant::now() + GRACE));
        }
        own
    }

    /// What is to be served; of what is not, and should be by itself, it is said why.
    fn served(&mut self) -> PeerSet {
        let mut settled = self.screen.settle(&self.peers);
        let mut losers = HashMap::with_capacity(settled.losers.len());
        for (lease, unfit) in &settled.losers {
            if self.losers.get(&lease.subnets) != Some(&lease.revision) {
                self.complaints.say_anew(|| unfit.to_string());
            }
            losers.insert(lease.subnets, lease.revision);
        }
        self.losers = losers;
        if let Some((missing, _)) = &self.missing {
            // The subnet may have another host by now, or the host another subnet.
            let addresses: HashSet<Ipv4Addr> = settled.peers.values().map(|lease| lease.value.public_ip).collect();
            let alone = missing
                .values()
                .filter(|lease| !addresses.contains(&lease.value.public_ip));
            screen::add_apart(&mut settled.peers, alone);
        }
        settled.peers
    }

    fn missing_until(&self) -> Option<Instant> {
        self.missing.as_ref().map(|(_, until)| *until)
    }

    /// Gives those up whose time is over; whether there were any. Where this host's own lease cannot be put right (`in_trouble`), theirs
    /// most likely cannot either.
    fn give_up_missing(&mut self, in_trouble: bool) -> bool {
        let now = Instant::now();
        if let Some((_, until)) = &mut self.missing
            && in_trouble
        {
            *until = (*until).max(now + GRACE / 2);
        }
        self.missing.take_if(|(_, until)| *until <= now).is_some()
    }

    /// Takes a change; what this host's own record is, if it is that which has changed.
    fn apply(&mut self, event: Event) -> Option<Option<Record>> {
        if let Event::Put(record) = &event {
            self.see(Some(record.revision));
        }
        match event {
            Event::Put(record) if record.key == self.own.key() => return Some(Some(record)),
            Event::Put(record) => {
                if let Some(subnets) = subnets_of(&record.key) {
                    self.peers.remove(&subnets);
                }
                if let Some(lease) = self.peer(&record) {
                    self.complaints.forget(&record.key);
                    self.peers.insert(lease.subnets, Arc::new(lease));
                }
            }
            Event::Delete { key } if key == self.own.key() => return Some(None),
            Event::Delete { key } => {
                self.complaints.forget(&key);
                if let Some(subnets) = subnets_of(&key) {
                    self.peers.remove(&subnets);
                }
            }
        }
        None
    }

    /// The lease of a record that is not this host's own, if it is a peer's.
    fn peer(&mut self, record: &Record) -> Option<Lease> {
        let why_not = match Lease::from_record(record) {
            Err(error) => error.to_string(),
            // Left from before a reservation, say: packets sent there would come back here and go round until they die.
            Ok(lease) if self.addresses.contain(lease.value.public_ip) => format!(
                "skipping {}: it carries this host's PublicIP, but this host uses {}",
                lease.subnets.to_cidrs(),
                self.own.to_cidrs()
            ),
            Ok(lease) => match self.screen.check(&lease) {
                Ok(()) => return Some(lease),
                Err(unfit) => unfit.to_string(),
            },
        };
        self.complaints.say(&record.key, record.revision, || why_not);
        None
    }
}

#[cfg(test)]
mod tests {
    use std::{net::Ipv4Addr, time::Duration};

    use ipnet::Ipv4Net;
    use tokio::{sync::watch::Receiver, task::JoinHandle};

    use super::*;
    use crate::{
        lease::{acquire::Own, record::LeaseValue},
        network::Network,
        registry::memory::MemoryRegistry,
    };

    const OWN: &str = "subnets/10.5.1.0-24";

    /// A watch by the host 192.0.2.1, which has [`OWN`].
    struct Fixture {
        registry: MemoryRegistry,
        peers: Receiver<Option<Picture>>,
        addresses: OwnAddresses,
        holding: Holding,
        here: Sender<Vec<Ipv4Net>>,
        task: JoinHandle<Revoked>,
    }

    fn value(number: u8) -> Vec<u8> {
        LeaseValue::new(Ipv4Addr::new(192, 0, 2, number)).to_bytes()
    }

    async fn start(before: &[(&str, &[u8])]) -> Fixture {
        let registry = MemoryRegistry::new();
        registry.put(OWN, &value(1)).await.unwrap();
        for (key, value) in before {
            registry.put(key, value).await.unwrap();
        }
        let own = Lease::from_record(&registry.get(OWN).await.unwrap().unwrap()).unwrap();
        start_with(registry, own, None)
    }

    /// As one that has `own`, and remembers the records of `first`.
    fn start_with(registry: MemoryRegistry, own: Lease, first: Option<Vec<Record>>) -> Fixture {
        let (publish, peers) = tokio::sync::watch::channel(None);
        let addresses = OwnAddresses::new(own.value.public_ip);
        let holding = Holding::new(Own { lease: own, left: None }, first.is_none());
        let (shared, known, held) = (registry.clone(), addresses.clone(), holding.clone());
        let network = Network::parse(r#"{"Network":"10.5.0.0/16"}"#).unwrap().network;
        let (here, addresses_here) = tokio::sync::watch::channel(vec!["192.0.2.1/24".parse().unwrap()]);
        let screen = Screen::new(&network, &holding.now().lease, addresses_here);
        let task =
            tokio::spawn(async move { watch(&shared, &held, &known, &screen, first.as_deref(), &publish).await });
        Fixture {
            registry,
            peers,
            addresses,
            holding,
            here,
            task,
        }
    }

    impl Fixture {
        /// Waits until the peers are these, as `subnet@public-ip`.
        async fn expect(&mut self, expected: &[&str]) {
            let is_expected = |picture: &Option<Picture>| {
                let texts = picture.iter().flat_map(|picture| picture.peers.values());
                picture.is_some()
                    && texts
                        .map(|l| format!("{}@{}", l.subnets, l.value.public_ip))
                        .eq(expected.iter().copied())
            };
            let seen = tokio::time::timeout(Duration::from_secs(60), self.peers.wait_for(is_expected)).await;
            assert!(matches!(seen, Ok(Ok(_))), "expected {expected:?}");
        }

        /// Whether the peers are all that there are.
        fn all_are_known(&self) -> bool {
            self.peers.borrow().as_ref().unwrap().complete
        }

        async fn delete(&self, key: &str) {
            let record = self.registry.get(key).await.unwrap().unwrap();
            assert!(self.registry.delete(&record).await.unwrap());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn peers_come_move_and_go() {
        let mut watch = start(&[("subnets/10.5.2.0-24", &value(2))]).await;
        watch.expect(&["10.5.2.0-24@192.0.2.2"]).await;
        watch.registry.put("subnets/10.5.3.0-24", &value(3)).await.unwrap();
        watch.expect(&["10.5.2.0-24@192.0.2.2", "10.5.3.0-24@192.0.2.3"]).await;
        watch.registry.put("subnets/10.5.2.0-24", &value(9)).await.unwrap();
        watch.expect(&["10.5.2.0-24@192.0.2.9", "10.5.3.0-24@192.0.2.3"]).await;
        watch.delete("subnets/10.5.2.0-24").await;
        watch.expect(&["10.5.3.0-24@192.0.2.3"]).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_host_alone_learns_that_it_is_alone() {
        start(&[]).await.expect(&[]).await;
    }

    #[tokio::test(start_paused = true)]
    async fn another_lease_of_this_host_is_no_peer() {
        let mut watch = start(&[("subnets/10.5.2.0-24", &value(1)), ("subnets/10.5.3.0-24", &value(3))]).await;
        watch.expect(&["10.5.3.0-24@192.0.2.3"]).await;
        watch.registry.put("subnets/10.5.3.0-24", &value(1)).await.unwrap();
        watch.expect(&[]).await;
    }

    #[tokio::test(start_paused = true)]
    async fn broken_records_and_other_backends_touch_no_good_peer() {
        let vxlan = br#"{"PublicIP":"192.0.2.4","PublicIPv6":null,"BackendType":"vxlan"}"#;
        let mut watch = start(&[
            ("subnets/10.5.2.0-24", &value(2)),
            ("subnets/10.5.3.0-24", b"{broken"),
            ("subnets/10.5.4.0-24", vxlan),
            ("subnets/nonsense", &value(5)),
        ])
        .await;
        watch.expect(&["10.5.2.0-24@192.0.2.2"]).await;
        watch.registry.put("subnets/10.5.3.0-24", &value(3)).await.unwrap();
        watch.expect(&["10.5.2.0-24@192.0.2.2", "10.5.3.0-24@192.0.2.3"]).await;
        watch
            .registry
            .put("subnets/10.5.3.0-24", b"{broken again")
            .await
            .unwrap();
        watch.expect(&["10.5.2.0-24@192.0.2.2"]).await;
    }

    #[tokio::test(start_paused = true)]
    async fn what_others_write_takes_no_good_peers_place() {
        let mut watch = start(&[("subnets/10.5.2.0-24", &value(2)), ("subnets/10.5.3.0-24", &value(3))]).await;
        watch.expect(&["10.5.2.0-24@192.0.2.2", "10.5.3.0-24@192.0.2.3"]).await;
        let at = |address: &str| LeaseValue::new(address.parse().unwrap()).to_bytes();
        let deep = format!(
            r#"{{"PublicIP":"192.0.2.66","BackendData":{}1{}}}"#,
            "[".repeat(500),
            "]".repeat(500)
        );
        for (key, value) in [
            ("10.5.2.0-25", value(66)),
            ("10.5.0.0-17", value(66)),
            ("10.5.1.0-25", value(66)),
            ("10.5.0.0-16", value(66)),
            ("10.9.1.0-24", value(66)),
            ("0.0.0.0-0", value(66)),
            ("10.5.9.0-24", at("0.0.0.0")),
            ("10.5.10.0-24", at("255.255.255.255")),
            ("10.5.11.0-24", at("192.0.2.255")),
            ("10.5.12.0-24", at("10.5.12.1")),
            ("10.5.13.0-24", at("127.0.0.1")),
            ("10.5.14.0-24", deep.into_bytes()),
            ("10.5.15.0-24", vec![0xff; 4_096]),
            ("10.5.16.0-24", Vec::new()),
            ("\u{fffd}", value(66)),
        ] {
            let key = format!("subnets/{key}");
            watch.registry.put(&key, &value).await.unwrap();
            tokio::time::sleep(Duration::from_millis(100)).await;
            watch.expect(&["10.5.2.0-24@192.0.2.2", "10.5.3.0-24@192.0.2.3"]).await;
        }
        // And the same in a new picture.
        watch.registry.fail_watches();
        watch.registry.put("subnets/10.5.4.0-24", &value(4)).await.unwrap();
        watch
            .expect(&[
                "10.5.2.0-24@192.0.2.2",
                "10.5.3.0-24@192.0.2.3",
                "10.5.4.0-24@192.0.2.4",
            ])
            .await;
        // One that loses to another is served when that is gone.
        watch.delete("subnets/10.5.2.0-24").await;
        watch
            .expect(&[
                "10.5.2.0-25@192.0.2.66",
                "10.5.3.0-24@192.0.2.3",
                "10.5.4.0-24@192.0.2.4",
            ])
            .await;
    }

    #[tokio::test(start_paused = true)]
    async fn peers_that_are_not_served_are_counted_once_whatever_else_changes() {
        let put = |key: &str, number: u8, revision: i64| {
            Event::Put(Record {
                key: format!("subnets/{key}"),
                value: value(number),
                revision: Revision(revision),
                created: Revision(revision),
                ttl: None,
            })
        };
        let network = Network::parse(r#"{"Network":"10.5.0.0/16"}"#).unwrap().network;
        let Event::Put(own) = put("10.5.1.0-24", 1, 1) else {
            unreachable!("it is one")
        };
        let own = Lease::from_record(&own).unwrap();
        let (_tell, here) = tokio::sync::watch::channel(Vec::new());
        let screen = Screen::new(&network, &own, here);
        let mut view = View::new(&own, OwnAddresses::new(own.value.public_ip), screen);
        view.apply(put("10.5.2.0-24", 2, 2));
        for number in 0..100 {
            view.apply(put(&format!("10.5.2.{number}-32"), 66, 3));
        }
        assert_eq!(view.served().len(), 1);
        assert!(view.complaints.due().is_some(), "not all are named");
        for round in 0..100 {
            tokio::time::sleep(Duration::from_secs(2)).await;
            view.complaints.sum_up();
            view.apply(put("10.5.3.0-24", 3, 10 + round));
            assert_eq!(view.served().len(), 2);
            assert_eq!(view.complaints.due(), None, "round {round}");
        }
        for number in 0..100 {
            view.apply(put(&format!("10.5.2.{number}-32"), 66, 500));
        }
        view.served();
        assert!(view.complaints.due().is_some(), "they are others now");
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_with_this_hosts_address_is_served_once_that_is_the_peers_alone() {
        let mut watch = start(&[("subnets/10.5.2.0-24", &value(7))]).await;
        watch.expect(&["10.5.2.0-24@192.0.2.7"]).await;
        let both = ["192.0.2.1/24", "192.0.2.7/24"].map(|net| net.parse().unwrap());
        watch.here.send_replace(both.to_vec());
        watch.expect(&[]).await;
        watch.here.send_replace(both[..1].to_vec());
        watch.expect(&["10.5.2.0-24@192.0.2.7"]).await;
    }

    #[tokio::test(start_paused = true)]
    async fn what_changed_while_cut_off_is_found_and_peers_in_both_pictures_are_never_withdrawn() {
        let mut watch = start(&[("subnets/10.5.2.0-24", &value(2)), ("subnets/10.5.3.0-24", &value(3))]).await;
        watch.expect(&["10.5.2.0-24@192.0.2.2", "10.5.3.0-24@192.0.2.3"]).await;
        watch.registry.set_available(false);
        tokio::time::sleep(Duration::from_secs(600)).await;
        assert!(!watch.peers.has_changed().unwrap(), "an outage changes no peers");
        watch.registry.set_available(true);
        watch.delete("subnets/10.5.3.0-24").await;
        watch.registry.put("subnets/10.5.4.0-24", &value(4)).await.unwrap();
        let mut seen = Vec::new();
        while seen.last() != Some(&vec!["10.5.2.0-24".to_owned(), "10.5.4.0-24".to_owned()]) {
            watch.peers.changed().await.unwrap();
            let peers = watch.peers.borrow_and_update().clone().unwrap().peers;
            seen.push(peers.keys().map(ToString::to_string).collect());
        }
        assert!(
            seen.iter().all(|peers| peers.contains(&"10.5.2.0-24".to_owned())),
            "{seen:?}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_broken_watch_is_begun_again() {
        let mut watch = start(&[]).await;
        watch.expect(&[]).await;
        for round in 2..10 {
            watch.registry.fail_watches();
            watch
                .registry
                .put(&format!("subnets/10.5.{round}.0-24"), &value(round))
                .await
                .unwrap();
            watch.peers.changed().await.unwrap();
            assert_eq!(
                watch.peers.borrow_and_update().as_ref().unwrap().peers.len(),
                usize::from(round) - 1
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_change_of_ones_own_public_ip_that_was_announced_is_no_loss() {
        let mut watch = start(&[("subnets/10.5.2.0-24", &value(2))]).await;
        watch.expect(&["10.5.2.0-24@192.0.2.2"]).await;
        watch.addresses.add(Ipv4Addr::new(192, 0, 2, 9));
        watch.registry.put(OWN, &value(9)).await.unwrap();
        watch.addresses.settle(Ipv4Addr::new(192, 0, 2, 9));
        let stored = watch.registry.get(OWN).await.unwrap().unwrap();
        watch.holding.found(Lease::from_record(&stored).unwrap());
        watch.here.send_replace(vec!["192.0.2.9/24".parse().unwrap()]);
        // The old address may be another host's now, and the new one is no peer's.
        watch.registry.put("subnets/10.5.3.0-24", &value(1)).await.unwrap();
        watch.registry.put("subnets/10.5.2.0-24", &value(9)).await.unwrap();
        watch.expect(&["10.5.3.0-24@192.0.2.1"]).await;
        watch.registry.put(OWN, &value(8)).await.unwrap();
        assert!(
            watch
                .task
                .await
                .unwrap()
                .to_string()
                .contains("belongs to PublicIP 192.0.2.8")
        );
    }

    impl Fixture {
        /// Waits until the record at this key is as it should be, and held so.
        async fn expect_own(&self) -> Record {
            for _ in 0..1_000 {
                let stored = self.registry.get(OWN).await.unwrap();
                if let Some(stored) = stored
                    && Lease::from_record(&stored).is_ok_and(|lease| lease == self.holding.now().lease)
                    && stored.value == value(1)
                {
                    return stored;
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            panic!("{:?} is not {:?}", self.registry.get(OWN).await, self.holding.now());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_that_is_deleted_is_made_again_for_a_day() {
        let mut watch = start(&[("subnets/10.5.2.0-24", &value(2))]).await;
        watch.expect(&["10.5.2.0-24@192.0.2.2"]).await;
        for _ in 0..3 {
            watch.delete(OWN).await;
            let made = watch.expect_own().await;
            let left = watch.registry.time_left(made.ttl.unwrap()).await.unwrap().unwrap();
            assert!(left > Duration::from_secs(86_000), "{left:?}");
        }
        // Also when it happens while nobody looks.
        watch.registry.set_available(false);
        tokio::time::sleep(Duration::from_secs(1)).await;
        watch.registry.set_available(true);
        watch.delete(OWN).await;
        watch.expect_own().await;
        assert!(!watch.peers.has_changed().unwrap(), "it concerns no peer");
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_that_is_written_over_is_written_again_but_not_in_a_busy_loop() {
        let mut watch = start(&[]).await;
        watch.expect(&[]).await;
        let other_backend = br#"{"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"vxlan"}"#;
        for wrong in [&b"{broken"[..], b"", other_backend] {
            watch.registry.put(OWN, wrong).await.unwrap();
            watch.expect_own().await;
        }
        let begun = Instant::now();
        for _ in 0..5 {
            watch.registry.put(OWN, b"again").await.unwrap();
            watch.expect_own().await;
        }
        assert!(begun.elapsed() > Duration::from_secs(40), "{:?}", begun.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_that_becomes_a_reservation_stays_one() {
        let mut watch = start(&[]).await;
        watch.expect(&[]).await;
        watch.delete(OWN).await;
        let leased = watch.expect_own().await;
        watch.registry.put(OWN, &leased.value).await.unwrap();
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert_eq!(watch.expect_own().await.ttl, None);
        assert_eq!(watch.holding.now().expires, None);
    }

    /// How a watch ends when this is done to the registry.
    async fn lost_by(change: impl AsyncFnOnce(&MemoryRegistry)) -> String {
        let mut watch = start(&[]).await;
        watch.expect(&[]).await;
        watch.registry.set_available(false);
        tokio::time::sleep(Duration::from_secs(1)).await;
        watch.registry.set_available(true);
        change(&watch.registry).await;
        watch.task.await.unwrap().to_string()
    }

    async fn delete_own(registry: &MemoryRegistry) {
        let record = registry.get(OWN).await.unwrap().unwrap();
        registry.delete(&record).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_subnet_that_another_host_has_ends_the_watch() {
        let mut watch = start(&[]).await;
        watch.expect(&[]).await;
        watch.registry.put(OWN, &value(8)).await.unwrap();
        let lost = watch.task.await.unwrap().to_string();
        for part in ["10.5.1.0/24", "belongs to PublicIP 192.0.2.8", "Docker"] {
            assert!(lost.contains(part), "{lost}");
        }

        let lost = lost_by(async |registry| registry.put(OWN, &value(8)).await.unwrap()).await;
        assert!(lost.contains("belongs to PublicIP 192.0.2.8"), "{lost}");
        // Or nobody may have it any more.
        let lost = lost_by(async |registry| {
            registry.put("config", br#"{"Network":"10.9.0.0/16"}"#).await.unwrap();
            delete_own(registry).await;
        })
        .await;
        assert!(lost.contains("does not fit"), "{lost}");
    }

    #[tokio::test(start_paused = true)]
    async fn an_empty_registry_gets_the_lease_again_and_costs_no_peer_that_comes_back() {
        let registry = MemoryRegistry::new();
        let record = |number: u8, revision| Record {
            key: format!("subnets/10.5.{number}.0-24"),
            value: value(number),
            revision: Revision(revision),
            created: Revision(revision),
            ttl: None,
        };
        let first = vec![record(2, 701), record(3, 702), record(4, 703)];
        let own = Lease::from_record(&record(1, 700)).unwrap();
        let mut watch = start_with(registry, own, Some(first));
        let all = [
            "10.5.2.0-24@192.0.2.2",
            "10.5.3.0-24@192.0.2.3",
            "10.5.4.0-24@192.0.2.4",
        ];
        watch.expect(&all).await;
        watch.expect_own().await;
        assert!(watch.holding.now().confirmed);
        tokio::time::sleep(GRACE / 2).await;
        assert!(!watch.peers.has_changed().unwrap(), "none is given up yet");
        // One comes back, one elsewhere, and one does not.
        watch.registry.put("subnets/10.5.2.0-24", &value(2)).await.unwrap();
        watch.registry.put("subnets/10.5.9.0-24", &value(3)).await.unwrap();
        watch
            .expect(&[
                "10.5.2.0-24@192.0.2.2",
                "10.5.4.0-24@192.0.2.4",
                "10.5.9.0-24@192.0.2.3",
            ])
            .await;
        tokio::time::sleep(GRACE / 4).await;
        assert!(!watch.peers.has_changed().unwrap(), "time is not over yet");
        watch.expect(&["10.5.2.0-24@192.0.2.2", "10.5.9.0-24@192.0.2.3"]).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_registry_that_has_lost_data_is_known_also_by_the_host_that_came_first_and_by_old_records_of_others() {
        let record = |number: u8, revision| Record {
            key: format!("subnets/10.5.{number}.0-24"),
            value: value(number),
            revision: Revision(revision),
            created: Revision(revision),
            ttl: None,
        };
        let all = ["10.5.2.0-24@192.0.2.2", "10.5.3.0-24@192.0.2.3"];
        // Others have been there again before this host is: the own record is as new as it was, or newer.
        for (writes, others) in [(50, 700), (50, 701), (50, 51)] {
            let registry = MemoryRegistry::new();
            for _ in 0..writes {
                registry.put("config", br#"{"Network":"10.5.0.0/16"}"#).await.unwrap();
            }
            registry.put("subnets/10.5.2.0-24", &value(2)).await.unwrap();
            registry.put(OWN, &value(1)).await.unwrap();
            let own = Lease::from_record(&record(1, 4)).unwrap();
            let mut watch = start_with(registry, own, Some(vec![record(2, others + 1), record(3, others)]));
            watch.expect(&all).await;
            watch.expect_own().await;
            tokio::time::sleep(GRACE / 2).await;
            watch.expect(&all).await;
            watch.expect(&all[..1]).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn peers_need_not_wait_for_a_lease_that_cannot_be_written() {
        let mut watch = start(&[("subnets/10.5.2.0-24", &value(2)), ("subnets/10.5.3.0-24", &value(3))]).await;
        watch.expect(&["10.5.2.0-24@192.0.2.2", "10.5.3.0-24@192.0.2.3"]).await;
        watch.delete(OWN).await;
        watch.registry.set_full(true);
        watch.delete("subnets/10.5.2.0-24").await;
        watch.expect(&["10.5.3.0-24@192.0.2.3"]).await;
        // Also with a new picture.
        watch.registry.set_available(false);
        watch.registry.set_available(true);
        watch.delete("subnets/10.5.3.0-24").await;
        watch.expect(&[]).await;
        assert_eq!(watch.registry.get(OWN).await.unwrap(), None);
        watch.registry.set_full(false);
        watch.expect_own().await;
    }

    #[tokio::test(start_paused = true)]
    async fn peers_that_cannot_come_back_to_a_registry_that_takes_no_records_are_kept_until_they_can() {
        let registry = MemoryRegistry::new();
        registry.set_full(true);
        let record = |number: u8| Record {
            key: format!("subnets/10.5.{number}.0-24"),
            value: value(number),
            revision: Revision(700),
            created: Revision(700),
            ttl: None,
        };
        let (own, peer) = (Lease::from_record(&record(1)).unwrap(), record(2));
        let mut watch = start_with(registry, own, Some(vec![peer]));
        watch.expect(&["10.5.2.0-24@192.0.2.2"]).await;
        tokio::time::sleep(10 * GRACE).await;
        assert!(!watch.peers.has_changed().unwrap(), "it is kept");
        watch.registry.set_full(false);
        watch.expect_own().await;
        watch.expect(&[]).await;
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_remembered_is_served_until_the_registry_tells() {
        let registry = MemoryRegistry::new();
        registry.put(OWN, &value(1)).await.unwrap();
        registry.put("subnets/10.5.3.0-24", &value(3)).await.unwrap();
        let own = Lease::from_record(&registry.get(OWN).await.unwrap().unwrap()).unwrap();
        registry.set_available(false);
        let first = ["10.5.2.0-24", "10.5.3.0-24"].map(|subnet| Record {
            key: format!("subnets/{subnet}"),
            value: value(if subnet.starts_with("10.5.2") { 2 } else { 3 }),
            revision: Revision(1),
            created: Revision(1),
            ttl: None,
        });
        let mut watch = start_with(registry, own, Some(first.to_vec()));
        watch.expect(&["10.5.2.0-24@192.0.2.2", "10.5.3.0-24@192.0.2.3"]).await;
        assert!(!watch.all_are_known());
        tokio::time::sleep(Duration::from_secs(600)).await;
        assert!(!watch.peers.has_changed().unwrap() && !watch.holding.now().confirmed);
        watch.registry.set_available(true);
        watch.expect(&["10.5.3.0-24@192.0.2.3"]).await;
        assert!(watch.holding.now().confirmed && watch.all_are_known());
    }

    #[tokio::test(start_paused = true)]
    async fn that_what_is_remembered_was_all_is_news_too() {
        let registry = MemoryRegistry::new();
        registry.put(OWN, &value(1)).await.unwrap();
        registry.put("subnets/10.5.3.0-24", &value(3)).await.unwrap();
        let record = async |key| registry.get(key).await.unwrap().unwrap();
        let own = Lease::from_record(&record(OWN).await).unwrap();
        let first = vec![record("subnets/10.5.3.0-24").await];
        registry.set_available(false);
        let mut watch = start_with(registry, own, Some(first));
        watch.expect(&["10.5.3.0-24@192.0.2.3"]).await;
        assert!(!watch.all_are_known());
        watch.registry.set_available(true);
        watch.peers.changed().await.unwrap();
        assert!(watch.all_are_known());
    }
}
