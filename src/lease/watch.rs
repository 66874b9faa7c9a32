//! Watching all leases: what the registry holds, as the [`PeerSet`] that the backend is to serve.

use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::{sync::watch::Sender, time::Instant};

use crate::{
    observe::outage::Outage,
    registry::{Event, Record, Registry},
};

use super::{
    complaints::Complaints,
    publish::Publisher,
    record::{Lease, SUBNETS, Subnets, subnets_of},
    screen::Screen,
};

/// All other hosts that use this host's backend, by subnet. The leases are shared, so that the whole set can be published anew
/// for each change to one of thousands.
pub type PeerSet = BTreeMap<Subnets, Arc<Lease>>;

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

    /// Whether a record with this address may have been written by this process.
    pub fn ever_contained(&self, address: Ipv4Addr) -> bool {
        self.locked().ever.contains(&address)
    }

    /// Nobody panics while holding it.
    fn locked(&self) -> MutexGuard<'_, Addresses> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why this host's lease is no longer its own.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the lease {} of this host was revoked: {reason}. Exiting, so that a restart takes a new one", subnets.to_cidrs())]
pub struct Revoked {
    subnets: Subnets,
    reason: String,
}

/// Follows the leases and publishes the peers after each change, until this host's own lease is gone.
///
/// A watch that ends, for whatever reason, is begun again with a new picture; peers that are in both are left alone,
/// because what is published is the whole set.
///
/// `screen` says which leases are peers. What it refuses is said once, and never stands in the way of the others.
pub async fn watch(
    registry: &dyn Registry,
    own: &Lease,
    addresses: &OwnAddresses,
    screen: &Screen,
    peers: &Sender<Option<Arc<PeerSet>>>,
) -> Revoked {
    let mut outage = Outage::of("watching the leases");
    let mut view = View::new(own, addresses.clone(), screen.clone());
    let mut publisher = Publisher::new(peers);
    loop {
        let error = match registry.watch(SUBNETS).await {
            Err(error) => error,
            Ok((records, mut changes)) => {
                outage.over();
                let mut outcome = view.reset(records);
                loop {
                    if let Err(revoked) = outcome {
                        return revoked;
                    }
                    if std::mem::take(&mut view.changed) {
                        publisher.note_change();
                    }
                    publisher.run(|| view.served());
                    view.complaints.sum_up();
                    let due = [publisher.due(), view.complaints.due()].into_iter().flatten().min();
                    outcome = tokio::select! {
                        events = changes.next() => match events {
                            Ok(events) => events.into_iter().try_for_each(|event| view.apply(event)),
                            Err(error) => break error,
                        },
                        () = view.screen.changed() => {
                            view.changed = true;
                            Ok(())
                        }
                        () = at(due) => Ok(()),
                    };
                }
            }
        };
        // The registry may be away for long.
        publisher.flush(|| view.served());
        tokio::time::sleep(outage.failed(&error.to_string())).await;
    }
}

/// Waits until then, or for ever.
async fn at(then: Option<Instant>) {
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
    /// Those that may be peers, each by itself; some may overlap.
    leases: PeerSet,
    /// Whether they have changed since this was last looked at.
    changed: bool,
    complaints: Complaints,
}

impl View {
    fn new(own: &Lease, addresses: OwnAddresses, screen: Screen) -> Self {
        Self {
            own: own.subnets,
            addresses,
            screen,
            leases: PeerSet::new(),
            changed: false,
            complaints: Complaints::default(),
        }
    }

    /// Takes a whole new picture.
    fn reset(&mut self, records: Vec<Record>) -> Result<(), Revoked> {
        self.leases.clear();
        self.complaints.begin_picture();
        let mut own_seen = false;
        for record in records {
            own_seen |= record.key == self.own.key();
            self.put(record)?;
        }
        // Who overlaps whom is known only when all are there.
        self.complain_of_losers();
        self.complaints.end_picture();
        self.changed = true;
        if own_seen {
            Ok(())
        } else {
            Err(self.revoked("it is not in the registry any more"))
        }
    }

    fn apply(&mut self, event: Event) -> Result<(), Revoked> {
        match event {
            Event::Put(record) => {
                if let Some(subnets) = subnets_of(&record.key) {
                    self.changed |= self.leases.remove(&subnets).is_some();
                }
                self.put(record)?;
            }
            Event::Delete { key } if key == self.own.key() => {
                return Err(self.revoked("its key was deleted or has expired"));
            }
            Event::Delete { key } => {
                self.complaints.forget(&key);
                if let Some(subnets) = subnets_of(&key) {
                    self.changed |= self.leases.remove(&subnets).is_some();
                }
            }
        }
        Ok(())
    }

    /// Adds a record's lease to those that may be peers, if it is one.
    fn put(&mut self, record: Record) -> Result<(), Revoked> {
        let why_not = match Lease::from_record(&record) {
            Err(error) => error.to_string(),
            Ok(lease) if lease.subnets == self.own => {
                if !self.addresses.ever_contained(lease.value.public_ip) {
                    return Err(self.revoked(&format!("it now belongs to PublicIP {}", lease.value.public_ip)));
                }
                return Ok(());
            }
            // Left from before a reservation, say: packets sent there would come back here and go round until they die.
            Ok(lease) if self.addresses.contain(lease.value.public_ip) => format!(
                "skipping {}: it carries this host's PublicIP, but this host uses {}",
                lease.subnets.to_cidrs(),
                self.own.to_cidrs()
            ),
            Ok(lease) => match self.screen.check(&lease) {
                Err(unfit) => unfit.to_string(),
                Ok(()) => {
                    self.leases.insert(lease.subnets, Arc::new(lease));
                    self.changed = true;
                    return Ok(());
                }
            },
        };
        self.complaints.say(&record.key, record.revision, || why_not);
        Ok(())
    }

    /// The peers. Of leases that overlap one is served, and of the others it is said why not.
    fn served(&mut self) -> PeerSet {
        let settled = self.screen.settle(&self.leases);
        for (lease, unfit) in &settled.losers {
            self.complaints
                .say(&lease.subnets.key(), lease.revision, || unfit.to_string());
        }
        settled.peers
    }

    fn complain_of_losers(&mut self) {
        self.served();
    }

    fn revoked(&self, reason: &str) -> Revoked {
        Revoked {
            subnets: self.own,
            reason: reason.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{net::Ipv4Addr, time::Duration};

    use ipnet::Ipv4Net;
    use tokio::{sync::watch::Receiver, task::JoinHandle};

    use super::*;
    use crate::{lease::record::LeaseValue, network::Network, registry::memory::MemoryRegistry};

    const OWN: &str = "subnets/10.5.1.0-24";

    /// A watch by the host 192.0.2.1, which has [`OWN`].
    struct Fixture {
        registry: MemoryRegistry,
        peers: Receiver<Option<Arc<PeerSet>>>,
        addresses: OwnAddresses,
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
        let (publish, peers) = tokio::sync::watch::channel(None);
        let shared = registry.clone();
        let addresses = OwnAddresses::new(own.value.public_ip);
        let known = addresses.clone();
        let network = Network::parse(r#"{"Network":"10.5.0.0/16"}"#).unwrap().network;
        let (here, addresses_here) = tokio::sync::watch::channel(vec!["192.0.2.1/24".parse().unwrap()]);
        let screen = Screen::new(&network, &own, addresses_here);
        let task = tokio::spawn(async move { watch(&shared, &own, &addresses, &screen, &publish).await });
        Fixture {
            registry,
            peers,
            addresses: known,
            here,
            task,
        }
    }

    impl Fixture {
        /// Waits until the peers are these, as `subnet@public-ip`.
        async fn expect(&mut self, expected: &[&str]) {
            let is_expected = |peers: &Option<Arc<PeerSet>>| {
                let texts = peers.iter().flat_map(|peers| peers.values());
                peers.is_some()
                    && texts
                        .map(|l| format!("{}@{}", l.subnets, l.value.public_ip))
                        .eq(expected.iter().copied())
            };
            let seen = tokio::time::timeout(Duration::from_secs(60), self.peers.wait_for(is_expected)).await;
            assert!(matches!(seen, Ok(Ok(_))), "expected {expected:?}");
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
            let peers = watch.peers.borrow_and_update().clone().unwrap();
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
                watch.peers.borrow_and_update().as_ref().unwrap().len(),
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
        // The old address may be another host's now, and the new one is no peer's.
        watch.here.send_replace(vec!["192.0.2.9/24".parse().unwrap()]);
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

    #[tokio::test(start_paused = true)]
    async fn losing_ones_own_lease_ends_the_watch() {
        let mut watch = start(&[]).await;
        watch.expect(&[]).await;
        watch.delete(OWN).await;
        assert!(watch.task.await.unwrap().to_string().contains("deleted or has expired"));

        let mut watch = start(&[]).await;
        watch.expect(&[]).await;
        watch.registry.put(OWN, &value(8)).await.unwrap();
        assert!(
            watch
                .task
                .await
                .unwrap()
                .to_string()
                .contains("belongs to PublicIP 192.0.2.8")
        );

        let mut watch = start(&[]).await;
        watch.expect(&[]).await;
        watch.registry.set_available(false);
        tokio::task::yield_now().await;
        watch.registry.set_available(true);
        watch.delete(OWN).await;
        assert!(watch.task.await.unwrap().to_string().contains("10.5.1.0/24"));
    }
}
