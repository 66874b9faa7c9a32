//! One host, one PublicIP: each running daemon keeps a short-lived record `hosts/<PublicIP>` beside the leases.
//!
//! A lease lives for a day, so that a host finds its subnet again after a restart; whether the daemon that holds it is
//! alive, the lease does not tell. Two hosts that publish one PublicIP (each took the address of its NAT interface, say)
//! would share one lease, and traffic for both would go astray. The presence record tells, within seconds.
//!
//! The original neither writes nor reads this key, so it does not disturb it; and its daemons are not protected by it.

use std::{
    io,
    net::Ipv4Addr,
    os::{
        fd::OwnedFd,
        linux::net::SocketAddrExt,
        unix::{
            fs::MetadataExt,
            net::{SocketAddr, UnixDatagram},
        },
    },
    sync::Arc,
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};
use tracing::{debug, warn};

use crate::{
    registry::{self, Registry},
    sys::boot,
};

/// What the records' keys begin with, relative to the network's prefix.
const HOSTS: &str = "hosts/";
/// How long a record outlives its daemon: a host that lost power is back no sooner.
const TTL: Duration = Duration::from_secs(30);
/// How often it is refreshed: two refreshes may be lost.
const REFRESH: Duration = Duration::from_secs(10);
/// How often the time that another's record has left must grow before its daemon counts as alive: a new etcd leader starts
/// the time of all leases anew, once. A daemon that lives does it twice within two [`REFRESH`].
const SIGNS_OF_LIFE: u32 = 2;
/// How often another's record is looked at to see whether it is being refreshed.
const LOOK: Duration = Duration::from_secs(1);
/// How often, and with which pauses, a neighbour that seems alive is looked at again: a second in all.
const LAST_LOOKS: u32 = 10;
const LAST_LOOK: Duration = Duration::from_millis(100);

/// A claim on its way to another process of this host, which goes on with it as it is.
#[derive(Debug)]
pub struct Handed {
    /// The instance as it stands in the record.
    pub instance: String,
    /// What is bound for as long as the claim lives.
    pub alive: OwnedFd,
}

/// Which daemon a record belongs to: enough to tell whether it still runs, from beside it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Instance {
    hostname: String,
    /// The kernel's boot identifier: the same on all that runs on one machine since it started.
    boot: String,
    /// Inode of the network namespace.
    network_namespace: u64,
    /// Name of an abstract Unix socket that is bound for as long as the daemon lives. Such names belong to one network
    /// namespace.
    socket: String,
}

/// The claim of the running daemon to its PublicIP.
#[derive(Debug)]
pub struct Presence {
    registry: Arc<dyn Registry>,
    public_ip: Ipv4Addr,
    key: String,
    instance: Instance,
    /// The instance as it stands in the record.
    value: Vec<u8>,
    /// Bound for as long as the claim lives.
    alive: UnixDatagram,
}

/// Why a PublicIP could not be claimed.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// Another daemon is alive under it.
    #[error(
        "PublicIP {public_ip} belongs to another flanneld that is alive, on host {hostname:?} ({key} in {registry}). Two hosts \
         cannot share one PublicIP. Usually both took the address of an interface that looks the same on each (a NAT \
         interface, 10.0.2.15 under Vagrant or VirtualBox): name the interface that faces the other hosts with --iface or \
         --iface-can-reach, or this host's address with --public-ip. If it runs on this very host, stop it first"
    )]
    InUse {
        /// The address.
        public_ip: Ipv4Addr,
        /// Where the other daemon runs, as it says.
        hostname: String,
        /// It runs where this process does: on this machine, in this network namespace.
        here: bool,
        /// The record.
        key: String,
        /// As [`Registry::describe`] says it.
        registry: String,
    },
    /// This host does not tell who it is.
    #[error("cannot tell this daemon from others: {what}")]
    Identity {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// What another process has handed over is no claim.
    #[error("cannot read the claim to this host's PublicIP that the running flanneld has handed over")]
    Handed(#[source] serde_json::Error),
    /// The registry failed.
    #[error(transparent)]
    Registry(#[from] registry::Error),
}

/// Whose record it is that claims a PublicIP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// The name of the host where that daemon runs.
    pub hostname: String,
    /// It runs, or ran, where this process does: on this machine since it started, in this network namespace.
    pub here: bool,
    /// It runs on a host of this one's name: this one before it was started anew, say.
    pub same_name: bool,
}

impl Holder {
    /// Reads all records of the registry's network; those that are none are left out.
    ///
    /// # Errors
    /// The registry's, or that this host does not tell who it is.
    pub async fn all(registry: &dyn Registry) -> Result<Vec<(Ipv4Addr, Holder)>, ClaimError> {
        let (own, _alive) = Instance::of_this_process()?;
        let records = registry.list(HOSTS).await?;
        let holders = records.iter().filter_map(|record| {
            let address = record.key.strip_prefix(HOSTS)?.parse().ok()?;
            let instance: Instance = serde_json::from_slice(&record.value).ok()?;
            let holder = Holder {
                here: instance.is_beside(&own),
                same_name: instance.hostname == own.hostname,
                hostname: instance.hostname,
            };
            Some((address, holder))
        });
        Ok(holders.collect())
    }
}

impl Presence {
    /// Claims `public_ip` for this process. Takes up to half a minute when another's record is there and only time can tell
    /// whether that daemon is alive, and longer if etcd elects a leader meanwhile.
    ///
    /// # Errors
    /// [`ClaimError::InUse`] when it is.
    pub async fn claim(registry: &Arc<dyn Registry>, public_ip: Ipv4Addr) -> Result<Self, ClaimError> {
        let (instance, alive) = Instance::of_this_process()?;
        let presence = Self {
            registry: Arc::clone(registry),
            public_ip,
            key: format!("{HOSTS}{public_ip}"),
            // A struct of strings and a number always has a JSON form.
            value: serde_json::to_vec(&instance).unwrap_or_default(),
            instance,
            alive,
        };
        presence.take().await?;
        Ok(presence)
    }

    /// Goes on with the claim of another process, whose record stays as it is.
    ///
    /// # Errors
    /// [`ClaimError::Handed`] when this is no claim.
    pub fn adopt(registry: &Arc<dyn Registry>, public_ip: Ipv4Addr, handed: Handed) -> Result<Self, ClaimError> {
        Ok(Self {
            registry: Arc::clone(registry),
            public_ip,
            key: format!("{HOSTS}{public_ip}"),
            instance: serde_json::from_str(&handed.instance).map_err(ClaimError::Handed)?,
            value: handed.instance.into_bytes(),
            alive: UnixDatagram::from(handed.alive),
        })
    }

    /// The claim, for another process to [adopt](Self::adopt). As long as this one keeps it too, it is both's.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn hand(&self) -> io::Result<Handed> {
        Ok(Handed {
            // It was made of a string.
            instance: String::from_utf8_lossy(&self.value).into_owned(),
            alive: self.alive.try_clone()?.into(),
        })
    }

    /// What is claimed.
    pub fn public_ip(&self) -> Ipv4Addr {
        self.public_ip
    }

    /// Keeps the claim until dropped, or until another daemon that is alive has it; returns [`ClaimError::InUse`] then. A
    /// claim that lapsed while the registry could not be reached, or was deleted, is made anew if it is free.
    ///
    /// An unreachable registry is not mentioned: the watch of the leases does that.
    pub async fn keep(&self) -> ClaimError {
        loop {
            tokio::time::sleep(REFRESH).await;
            match self.renew().await {
                Ok(()) => {}
                Err(lost @ ClaimError::InUse { .. }) => return lost,
                Err(error) => debug!("cannot renew {}: {error}", self.key),
            }
        }
    }

    /// The record first, then its time: a time to live that still runs does not show that the record is there.
    async fn renew(&self) -> Result<(), ClaimError> {
        if let Some(ttl) = self.ours().await?.and_then(|record| record.ttl)
            && self.registry.refresh(ttl).await?.is_some()
        {
            return Ok(());
        }
        self.take().await
    }

    /// Makes the record. Waits for that of a daemon that is gone to lapse.
    async fn take(&self) -> Result<(), ClaimError> {
        let full_key = || self.registry.full_key(&self.key);
        loop {
            if self.create().await? {
                return Ok(());
            }
            let Some(held) = self.registry.get(&self.key).await? else {
                continue;
            };
            let holder: Option<Instance> = serde_json::from_slice(&held.value).ok();
            if let Some(holder) = &holder
                && self.outlives(holder).await
            {
                debug!("{} was left by a daemon of this host that is gone", full_key());
                self.registry.delete(&held).await?;
                continue;
            }
            let here = holder.as_ref().is_some_and(|holder| holder.is_beside(&self.instance));
            let hostname = holder.map_or_else(|| "unknown".to_owned(), |holder| holder.hostname);
            warn!(
                "{} says that a flanneld on host {hostname:?} uses this host's PublicIP {}: waiting some {} s to see \
                 whether it is alive",
                full_key(),
                self.public_ip,
                TTL.as_secs()
            );
            if is_refreshed(&*self.registry, &held).await? {
                return Err(ClaimError::InUse {
                    public_ip: self.public_ip,
                    hostname,
                    here,
                    key: full_key(),
                    registry: self.registry.describe(),
                });
            }
        }
    }

    /// Whether the holder is a daemon of this host that is gone. What it was just starting when it was killed has its files until
    /// it runs its own program, so that it seems alive for some milliseconds.
    async fn outlives(&self, holder: &Instance) -> bool {
        for _ in 0..LAST_LOOKS {
            if holder.is_dead_neighbour(&self.instance) {
                return true;
            }
            tokio::time::sleep(LAST_LOOK).await;
        }
        holder.is_dead_neighbour(&self.instance)
    }

    /// Gives the PublicIP up, so that the next daemon need not wait. Best effort.
    pub async fn withdraw(&self) {
        if let Ok(Some(record)) = self.ours().await {
            // The record lapses by itself if this fails.
            let _ = self.registry.delete(&record).await;
        }
    }

    /// The record, if it is there and ours.
    async fn ours(&self) -> Result<Option<registry::Record>, registry::Error> {
        let record = self.registry.get(&self.key).await?;
        Ok(record.filter(|record| record.value == self.value))
    }

    /// Whether the record could be made, or is ours already: a reply may get lost after it was made.
    async fn create(&self) -> Result<bool, registry::Error> {
        let made = self.registry.create(&self.key, &self.value, Some(TTL)).await?;
        Ok(made.is_some() || self.ours().await?.is_some())
    }
}

/// Watches another's record until it has been refreshed [often enough](SIGNS_OF_LIFE) (its daemon is alive) or is gone.
async fn is_refreshed(registry: &dyn Registry, held: &registry::Record) -> Result<bool, registry::Error> {
    // A record that does not expire was not made by a daemon that lives.
    let Some(ttl) = held.ttl else {
        return registry.delete(held).await.map(|_| false);
    };
    let (mut least, mut signs) = (Duration::MAX, 0);
    loop {
        match registry.time_left(ttl).await? {
            None => return Ok(false),
            // Time left goes down by itself; registries round it to seconds.
            Some(left) if left > least.saturating_add(Duration::from_secs(1)) => {
                signs += 1;
                if signs == SIGNS_OF_LIFE {
                    return Ok(true);
                }
                least = left;
            }
            Some(left) => least = least.min(left),
        }
        if registry.get(&held.key).await?.is_none_or(|now| now.value != held.value) {
            return Ok(false);
        }
        tokio::time::sleep(LOOK).await;
    }
}

impl Instance {
    fn of_this_process() -> Result<(Self, UnixDatagram), ClaimError> {
        let identity = |what| move |source| ClaimError::Identity { what, source };
        let started = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        let socket = format!("flanneld-{}-{}", std::process::id(), started.as_nanos());
        let alive = SocketAddr::from_abstract_name(&socket)
            .and_then(|name| UnixDatagram::bind_addr(&name))
            .map_err(identity("cannot bind an abstract Unix socket"))?;
        let hostname = nix::unistd::gethostname()
            .map_err(io::Error::from)
            .map_err(identity("cannot read the host's name"))?
            .to_string_lossy()
            .into_owned();
        let boot = boot::id().map_err(identity("cannot read /proc/sys/kernel/random/boot_id"))?;
        let network_namespace = std::fs::metadata("/proc/self/ns/net")
            .map_err(identity("cannot read /proc/self/ns/net"))?
            .ino();
        Ok((
            Self {
                hostname,
                boot,
                network_namespace,
                socket,
            },
            alive,
        ))
    }

    /// Whether this instance runs, or ran, in the same network namespace as `own`.
    fn is_beside(&self, own: &Self) -> bool {
        self.boot == own.boot && self.network_namespace == own.network_namespace
    }

    /// Whether this instance ran in the same network namespace as `own` and does so no longer.
    fn is_dead_neighbour(&self, own: &Self) -> bool {
        if !self.is_beside(own) {
            return false;
        }
        let bound = SocketAddr::from_abstract_name(&self.socket).and_then(|name| {
            let probe = UnixDatagram::unbound()?;
            probe.connect_addr(&name)
        });
        matches!(bound, Err(error) if error.kind() == io::ErrorKind::ConnectionRefused)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::memory::MemoryRegistry;

    const PUBLIC_IP: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
    const KEY: &str = "hosts/192.0.2.1";

    /// The record of a daemon elsewhere.
    async fn stranger(registry: &Arc<dyn Registry>) -> registry::Record {
        let instance = Instance {
            hostname: "far-away".into(),
            boot: "another".into(),
            network_namespace: 1,
            socket: "flanneld-1-1".into(),
        };
        registry
            .create(KEY, &serde_json::to_vec(&instance).unwrap(), Some(TTL))
            .await
            .unwrap()
            .unwrap()
    }

    fn registry() -> Arc<dyn Registry> {
        Arc::new(MemoryRegistry::new())
    }

    #[tokio::test(start_paused = true)]
    async fn a_claim_holds_for_as_long_as_it_is_kept() {
        let registry = registry();
        let presence = Presence::claim(&registry, PUBLIC_IP).await.unwrap();
        let keeping = tokio::spawn(async move { presence.keep().await });
        tokio::time::sleep(TTL * 20).await;
        assert!(registry.get(KEY).await.unwrap().is_some());
        keeping.abort();
        tokio::time::sleep(TTL * 2).await;
        assert!(registry.get(KEY).await.unwrap().is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_living_daemon_keeps_its_public_ip() {
        let registry = registry();
        let held = stranger(&registry).await;
        let refresher = Arc::clone(&registry);
        tokio::spawn(async move {
            while refresher.refresh(held.ttl.unwrap()).await.unwrap().is_some() {
                tokio::time::sleep(REFRESH).await;
            }
        });
        let refusal = Presence::claim(&registry, PUBLIC_IP).await.unwrap_err();
        assert!(matches!(refusal, ClaimError::InUse { here: false, .. }));
        let refusal = refusal.to_string();
        for part in ["192.0.2.1", "far-away", "--iface", "10.0.2.15"] {
            assert!(refusal.contains(part), "{refusal}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_second_daemon_in_the_same_namespace_is_refused_while_the_first_lives() {
        let registry = registry();
        let first = Presence::claim(&registry, PUBLIC_IP).await.unwrap();
        let keeping = tokio::spawn(async move { first.keep().await });
        assert!(matches!(
            Presence::claim(&registry, PUBLIC_IP).await,
            Err(ClaimError::InUse { here: true, .. })
        ));
        keeping.abort();
    }

    #[tokio::test(start_paused = true)]
    async fn a_killed_daemons_claim_passes_to_the_next_of_the_same_namespace_at_once() {
        let registry = registry();
        drop(Presence::claim(&registry, PUBLIC_IP).await.unwrap());
        let before = tokio::time::Instant::now();
        Presence::claim(&registry, PUBLIC_IP).await.unwrap();
        assert_eq!(before.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn a_host_that_lost_power_gets_its_public_ip_back_when_its_claim_lapses() {
        let registry = registry();
        stranger(&registry).await;
        let before = tokio::time::Instant::now();
        Presence::claim(&registry, PUBLIC_IP).await.unwrap();
        assert!(before.elapsed() <= TTL + LOOK, "{:?}", before.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn withdrawing_leaves_nothing_and_touches_no_others_claim() {
        let registry = registry();
        Presence::claim(&registry, PUBLIC_IP).await.unwrap().withdraw().await;
        assert_eq!(registry.get(KEY).await.unwrap(), None);

        let mine = Presence::claim(&registry, PUBLIC_IP).await.unwrap();
        let record = registry.get(KEY).await.unwrap().unwrap();
        registry.delete(&record).await.unwrap();
        stranger(&registry).await;
        mine.withdraw().await;
        assert!(registry.get(KEY).await.unwrap().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_claim_that_lapsed_in_an_outage_is_renewed_after_it() {
        let memory = MemoryRegistry::new();
        let registry: Arc<dyn Registry> = Arc::new(memory.clone());
        let presence = Presence::claim(&registry, PUBLIC_IP).await.unwrap();
        tokio::spawn(async move { presence.keep().await });
        memory.set_available(false);
        tokio::time::sleep(TTL * 4).await;
        memory.set_available(true);
        tokio::time::sleep(REFRESH * 2).await;
        assert!(registry.get(KEY).await.unwrap().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_claim_that_is_handed_over_goes_on_unchanged_when_the_first_process_is_gone() {
        let registry = registry();
        let first = Presence::claim(&registry, PUBLIC_IP).await.unwrap();
        let before = registry.get(KEY).await.unwrap().unwrap();
        let second = Presence::adopt(&registry, PUBLIC_IP, first.hand().unwrap()).unwrap();
        drop(first);
        assert!(
            !second.instance.is_dead_neighbour(&second.instance),
            "its socket is still bound"
        );
        assert!(is_kept_for(&second, TTL * 3).await);
        assert_eq!(registry.get(KEY).await.unwrap().unwrap(), before);
        second.withdraw().await;
        assert_eq!(registry.get(KEY).await.unwrap(), None);
    }

    /// A claim of ours whose record is gone.
    async fn without_record(registry: &Arc<dyn Registry>) -> Presence {
        let presence = Presence::claim(registry, PUBLIC_IP).await.unwrap();
        let record = registry.get(KEY).await.unwrap().unwrap();
        registry.delete(&record).await.unwrap();
        presence
    }

    #[tokio::test(start_paused = true)]
    async fn a_claim_that_another_living_daemon_has_taken_is_lost() {
        let registry = registry();
        let presence = without_record(&registry).await;
        let other = stranger(&registry).await;
        let refresher = Arc::clone(&registry);
        tokio::spawn(async move {
            while refresher.refresh(other.ttl.unwrap()).await.unwrap().is_some() {
                tokio::time::sleep(REFRESH).await;
            }
        });
        let lost = presence.keep().await;
        assert!(
            matches!(&lost, ClaimError::InUse { hostname, .. } if hostname == "far-away"),
            "{lost}"
        );
        presence.withdraw().await;
        assert!(registry.get(KEY).await.unwrap().is_some(), "the other keeps its claim");
    }

    /// Whether the record is this daemon's again after some time of keeping, and the claim was not given up.
    async fn is_kept_for(presence: &Presence, time: Duration) -> bool {
        let lost = tokio::time::timeout(time, presence.keep()).await;
        lost.is_err() && presence.ours().await.unwrap().is_some()
    }

    #[tokio::test(start_paused = true)]
    async fn a_claim_whose_key_is_deleted_is_made_again_at_the_next_refresh() {
        let registry = registry();
        let presence = without_record(&registry).await;
        assert!(is_kept_for(&presence, REFRESH + LOOK).await);
    }

    #[tokio::test(start_paused = true)]
    async fn a_claim_that_a_host_took_which_is_gone_again_comes_back() {
        let registry = registry();
        let presence = without_record(&registry).await;
        stranger(&registry).await;
        assert!(is_kept_for(&presence, REFRESH + TTL + LOOK * 2).await);
    }

    #[tokio::test(start_paused = true)]
    async fn one_refresh_is_no_sign_of_life_since_a_new_etcd_leader_does_that() {
        let registry = registry();
        let held = stranger(&registry).await;
        let elected = Arc::clone(&registry);
        tokio::spawn(async move {
            tokio::time::sleep(REFRESH).await;
            elected.refresh(held.ttl.unwrap()).await.unwrap();
        });
        Presence::claim(&registry, PUBLIC_IP).await.unwrap();
    }
}
