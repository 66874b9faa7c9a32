//! Watching all leases: what the registry holds, as the [`PeerSet`] that the backend is to serve.

use std::{
    collections::{BTreeMap, HashMap},
    net::Ipv4Addr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::watch::Sender;
use tracing::{info, warn};

use crate::{
    observe::outage::Outage,
    registry::{Event, Record, Registry, Revision},
};

use super::record::{BackendType, Lease, SUBNETS, Subnets, subnets_of};

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

/// How many peers of one picture are told of one by one.
const LINES: usize = 50;

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
pub async fn watch(
    registry: &dyn Registry,
    own: &Lease,
    addresses: &OwnAddresses,
    peers: &Sender<Option<Arc<PeerSet>>>,
) -> Revoked {
    let mut outage = Outage::of("watching the leases");
    let mut view = View::new(own, addresses.clone());
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
                    // Unread news is replaced: only the latest set matters.
                    peers.send_if_modified(|published| {
                        let changed = published.as_deref() != Some(&view.peers);
                        if changed {
                            *published = Some(Arc::new(view.peers.clone()));
                        }
                        changed
                    });
                    match changes.next().await {
                        Ok(events) => outcome = events.into_iter().try_for_each(|event| view.apply(event)),
                        Err(error) => break error,
                    }
                }
            }
        };
        tokio::time::sleep(outage.failed(&error.to_string())).await;
    }
}

/// The leases as last seen.
struct View {
    own: Subnets,
    addresses: OwnAddresses,
    backend: BackendType,
    peers: PeerSet,
    /// Records that were warned of, so that each is once.
    warned: HashMap<String, Revision>,
}

impl View {
    fn new(own: &Lease, addresses: OwnAddresses) -> Self {
        Self {
            own: own.subnets,
            addresses,
            backend: own.value.backend_type.clone(),
            peers: PeerSet::new(),
            warned: HashMap::new(),
        }
    }

    /// Takes a whole new picture.
    fn reset(&mut self, records: Vec<Record>) -> Result<(), Revoked> {
        let known = std::mem::take(&mut self.peers);
        let mut own_seen = false;
        for record in records {
            own_seen |= record.key == self.own.key();
            self.put(record)?;
        }
        self.tell_all(&known);
        if own_seen {
            Ok(())
        } else {
            Err(self.revoked("it is not in the registry any more"))
        }
    }

    fn apply(&mut self, event: Event) -> Result<(), Revoked> {
        match event {
            Event::Put(record) => {
                let Some(subnets) = subnets_of(&record.key) else {
                    return self.put(record);
                };
                let known = self.peers.remove(&subnets);
                self.put(record)?;
                match (self.peers.get(&subnets), known) {
                    (Some(lease), known) => self.tell(known.as_deref(), lease),
                    (None, Some(_)) => info!("peer {} is gone", subnets.to_cidrs()),
                    (None, None) => {}
                }
            }
            Event::Delete { key } if key == self.own.key() => {
                return Err(self.revoked("its key was deleted or has expired"));
            }
            Event::Delete { key } => {
                self.warned.remove(&key);
                if let Some(subnets) = subnets_of(&key)
                    && self.peers.remove(&subnets).is_some()
                {
                    info!("peer {} is gone", subnets.to_cidrs());
                }
            }
        }
        Ok(())
    }

    /// Adds a record's lease to the peers, if it is one.
    fn put(&mut self, record: Record) -> Result<(), Revoked> {
        let lease = match Lease::from_record(&record) {
            Ok(lease) => lease,
            Err(error) => {
                self.warn_once(&record, &error.to_string());
                return Ok(());
            }
        };
        if lease.subnets == self.own {
            if !self.addresses.ever_contained(lease.value.public_ip) {
                return Err(self.revoked(&format!("it now belongs to PublicIP {}", lease.value.public_ip)));
            }
        } else if self.addresses.contain(lease.value.public_ip) {
            // Left from before a reservation, say: packets sent there would come back here and go round until they die.
            let text = format!(
                "skipping {}: it carries this host's PublicIP, but this host uses {}",
                lease.subnets.to_cidrs(),
                self.own.to_cidrs()
            );
            self.warn_once(&record, &text);
        } else if lease.value.backend_type != self.backend {
            let text = format!(
                "skipping peer {}: its backend is {}, this host's is {}",
                lease.subnets.to_cidrs(),
                lease.value.backend_type,
                self.backend
            );
            self.warn_once(&record, &text);
        } else {
            self.peers.insert(lease.subnets, Arc::new(lease));
        }
        Ok(())
    }

    /// Says what is new against `known`; if that is much, only how much.
    fn tell_all(&self, known: &PeerSet) {
        let news = self
            .peers
            .iter()
            .filter(|(subnets, lease)| known.get(subnets) != Some(lease));
        let gone = known.keys().filter(|subnets| !self.peers.contains_key(subnets));
        let (count, gone_count) = (news.clone().count(), gone.clone().count());
        if count + gone_count > LINES {
            info!("{count} peers are new or have changed, {gone_count} are gone");
            return;
        }
        for (subnets, lease) in news {
            self.tell(known.get(subnets).map(|lease| &**lease), lease);
        }
        for gone in gone {
            info!("peer {} is gone", gone.to_cidrs());
        }
    }

    fn tell(&self, known: Option<&Lease>, lease: &Lease) {
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

    fn warn_once(&mut self, record: &Record, text: &str) {
        if self.warned.insert(record.key.clone(), record.revision) != Some(record.revision) {
            warn!("{text}");
        }
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

    use tokio::{sync::watch::Receiver, task::JoinHandle};

    use super::*;
    use crate::{lease::record::LeaseValue, registry::memory::MemoryRegistry};

    const OWN: &str = "subnets/10.5.1.0-24";

    /// A watch by the host 192.0.2.1, which has [`OWN`].
    struct Fixture {
        registry: MemoryRegistry,
        peers: Receiver<Option<Arc<PeerSet>>>,
        addresses: OwnAddresses,
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
        let task = tokio::spawn(async move { watch(&shared, &own, &addresses, &publish).await });
        Fixture {
            registry,
            peers,
            addresses: known,
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
