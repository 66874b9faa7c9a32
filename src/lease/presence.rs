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
use tracing::{debug, error, warn};

use crate::registry::{self, Registry, TtlId};

/// How long a record outlives its daemon: a host that lost power is back no sooner.
const TTL: Duration = Duration::from_secs(30);
/// How often it is refreshed: two refreshes may be lost.
const REFRESH: Duration = Duration::from_secs(10);
/// How often another's record is looked at to see whether it is being refreshed.
const LOOK: Duration = Duration::from_secs(1);

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
    key: String,
    value: Vec<u8>,
    ttl: Option<TtlId>,
    /// Bound for as long as the claim lives.
    _alive: UnixDatagram,
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
    /// The registry failed.
    #[error(transparent)]
    Registry(#[from] registry::Error),
}

impl Presence {
    /// Claims `public_ip` for this process. Takes up to [`TTL`] when another's record is there and only time can tell
    /// whether that daemon is alive.
    ///
    /// # Errors
    /// [`ClaimError::InUse`] when it is.
    pub async fn claim(registry: &Arc<dyn Registry>, public_ip: Ipv4Addr) -> Result<Self, ClaimError> {
        let (instance, alive) = Instance::of_this_process()?;
        let mut presence = Self {
            registry: Arc::clone(registry),
            key: format!("hosts/{public_ip}"),
            // A struct of strings and a number always has a JSON form.
            value: serde_json::to_vec(&instance).unwrap_or_default(),
            ttl: None,
            _alive: alive,
        };
        loop {
            if presence.create().await? {
                return Ok(presence);
            }
            let Some(held) = registry.get(&presence.key).await? else {
                continue;
            };
            let holder: Option<Instance> = serde_json::from_slice(&held.value).ok();
            if holder
                .as_ref()
                .is_some_and(|holder| holder.is_dead_neighbour(&instance))
            {
                debug!(
                    "{} was left by a daemon of this host that is gone",
                    registry.full_key(&presence.key)
                );
                registry.delete(&held).await?;
                continue;
            }
            let hostname = holder.map_or_else(|| "unknown".to_owned(), |holder| holder.hostname);
            warn!(
                "{} says that a flanneld on host {hostname:?} uses this host's PublicIP {public_ip}: waiting up to {} s to \
                 see whether it is alive",
                registry.full_key(&presence.key),
                TTL.as_secs()
            );
            if is_refreshed(&**registry, &held).await? {
                return Err(ClaimError::InUse {
                    public_ip,
                    hostname,
                    key: registry.full_key(&presence.key),
                    registry: registry.describe(),
                });
            }
        }
    }

    /// Keeps the claim until dropped. An unreachable registry is not mentioned: the watch of the leases does that.
    pub async fn keep(&mut self) {
        let mut taken_said = false;
        loop {
            tokio::time::sleep(REFRESH).await;
            let refreshed = match self.ttl {
                Some(ttl) => self.registry.refresh(ttl).await,
                None => Ok(None),
            };
            match refreshed {
                Ok(Some(_)) => {}
                // Lapsed while the registry could not be reached.
                Ok(None) => match self.create().await {
                    Ok(true) => taken_said = false,
                    Ok(false) if taken_said => {}
                    Ok(false) => {
                        taken_said = true;
                        error!(
                            "another flanneld has taken this host's PublicIP ({}) while the registry could not be reached: \
                             two hosts must not share one; look at --iface and --public-ip of both",
                            self.registry.full_key(&self.key)
                        );
                    }
                    Err(error) => debug!("cannot renew {}: {error}", self.key),
                },
                Err(error) => debug!("cannot refresh {}: {error}", self.key),
            }
        }
    }

    /// Gives the PublicIP up, so that the next daemon need not wait. Best effort.
    pub async fn withdraw(self) {
        if let Ok(Some(record)) = self.registry.get(&self.key).await
            && record.value == self.value
        {
            // The record lapses by itself if this fails.
            let _ = self.registry.delete(&record).await;
        }
    }

    /// Whether the record could be made, or is ours already.
    async fn create(&mut self) -> Result<bool, registry::Error> {
        if let Some(record) = self.registry.create(&self.key, &self.value, Some(TTL)).await? {
            self.ttl = record.ttl;
            return Ok(true);
        }
        // A reply may get lost after the record was made.
        let ours = self
            .registry
            .get(&self.key)
            .await?
            .filter(|record| record.value == self.value);
        self.ttl = ours.as_ref().and_then(|record| record.ttl).or(self.ttl);
        Ok(ours.is_some())
    }
}

/// Watches another's record until it is refreshed (its daemon is alive) or gone.
async fn is_refreshed(registry: &dyn Registry, held: &registry::Record) -> Result<bool, registry::Error> {
    // A record that does not expire was not made by a daemon that lives.
    let Some(ttl) = held.ttl else {
        return registry.delete(held).await.map(|_| false);
    };
    let mut least = Duration::MAX;
    loop {
        match registry.time_left(ttl).await? {
            None => return Ok(false),
            // Time left goes down by itself; registries round it to seconds.
            Some(left) if left > least.saturating_add(Duration::from_secs(1)) => return Ok(true),
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
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
            .map_err(identity("cannot read /proc/sys/kernel/random/boot_id"))?
            .trim()
            .to_owned();
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

    /// Whether this instance ran in the same network namespace as `own` and does so no longer.
    fn is_dead_neighbour(&self, own: &Self) -> bool {
        if self.boot != own.boot || self.network_namespace != own.network_namespace {
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
        let mut presence = Presence::claim(&registry, PUBLIC_IP).await.unwrap();
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
        let refusal = Presence::claim(&registry, PUBLIC_IP).await.unwrap_err().to_string();
        for part in ["192.0.2.1", "far-away", "--iface", "10.0.2.15"] {
            assert!(refusal.contains(part), "{refusal}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_second_daemon_in_the_same_namespace_is_refused_while_the_first_lives() {
        let registry = registry();
        let mut first = Presence::claim(&registry, PUBLIC_IP).await.unwrap();
        let keeping = tokio::spawn(async move { first.keep().await });
        assert!(matches!(
            Presence::claim(&registry, PUBLIC_IP).await,
            Err(ClaimError::InUse { .. })
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
        let mut presence = Presence::claim(&registry, PUBLIC_IP).await.unwrap();
        tokio::spawn(async move { presence.keep().await });
        memory.set_available(false);
        tokio::time::sleep(TTL * 4).await;
        memory.set_available(true);
        tokio::time::sleep(REFRESH * 2).await;
        assert!(registry.get(KEY).await.unwrap().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_public_ip_that_another_has_taken_is_told_once() {
        use std::{io::Write, sync::Mutex};

        #[derive(Clone, Default)]
        struct Log(Arc<Mutex<Vec<u8>>>);
        impl Write for Log {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0.lock().unwrap().write(bytes)
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }

        let log = Log::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt().with_writer(move || writer.clone()).finish();
        let _guard = tracing::subscriber::set_default(subscriber);
        let registry = registry();
        let mut presence = Presence::claim(&registry, PUBLIC_IP).await.unwrap();
        let record = registry.get(KEY).await.unwrap().unwrap();
        registry.delete(&record).await.unwrap();
        let other = stranger(&registry).await;
        let refresh = async {
            for _ in 0..20 {
                tokio::time::sleep(REFRESH).await;
                registry.refresh(other.ttl.unwrap()).await.unwrap();
            }
        };
        tokio::select! {
            () = presence.keep() => {}
            () = refresh => {}
        }
        let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
        assert_eq!(text.matches("has taken this host's PublicIP").count(), 1, "{text}");
    }
}
