//! This host's lease put right: made again when it is gone and the subnet is still free, written again when somebody has
//! written something else into it.
//!
//! The original ends as soon as its key is deleted. But where nobody else has the subnet there is nothing that an end would be
//! good for: the daemon would take the same subnet again when it is started. So it ends only when the subnet is another's.

use std::{
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::Duration,
};

use tokio::{sync::watch::Receiver, time::Instant};
use tracing::{info, warn};

use super::{
    acquire::SUBNET_TTL,
    holding::Holding,
    record::{Lease, LeaseValue, SUBNETS, Subnets, subnets_of},
    watch::{OwnAddresses, Revoked, at},
};
use crate::{
    network::{self, LoadError, Network},
    observe::outage::Outage,
    registry::{self, Record, Registry, TtlId},
};

/// How often this host's record is written again at most: another program that does the same must not make a busy loop of it.
const PAUSE: Duration = Duration::from_secs(10);

/// How often the record is looked at again when it changes under our hands: each time somebody else was faster, and what they
/// do next the watch tells.
const TRIES: u32 = 10;

/// Why it was not put right.
#[derive(Debug)]
enum Failure {
    /// It is not this host's any more.
    Lost(Revoked),
    /// Not known: the registry failed.
    Registry(registry::Error),
}

impl From<registry::Error> for Failure {
    fn from(error: registry::Error) -> Self {
        Failure::Registry(error)
    }
}

/// Puts it right.
#[derive(Debug)]
pub(super) struct Restorer {
    holding: Holding,
    addresses: OwnAddresses,
    /// As this host runs in it; what the registry has may be gone.
    network: Network,
    /// When it was last written again.
    written: Option<Instant>,
}

/// What a record at this host's key is.
enum State {
    /// As it should be.
    Right(Lease),
    /// This host's, but it says what this host does not.
    Wrong,
    /// Nothing that can be read.
    Broken(String),
    /// Another host's.
    Anothers(String),
}

impl Restorer {
    pub(super) fn new(holding: Holding, addresses: OwnAddresses, network: Network) -> Self {
        Self {
            holding,
            addresses,
            network,
            written: None,
        }
    }

    /// Puts it right whenever that is needed, as often as it takes the registry to let us, until it is another's. `told`: what the
    /// watch has seen at this host's key. `in_trouble` says whether the registry does not let us just now.
    pub(super) async fn keep(
        &mut self,
        registry: &dyn Registry,
        mut told: Receiver<Option<Record>>,
        in_trouble: &AtomicBool,
    ) -> Revoked {
        let key = self.holding.now().lease.subnets.key();
        let mut outage = Outage::of("putting this host's lease right");
        let mut again = None;
        loop {
            let news = tokio::select! {
                biased;
                Ok(()) = told.changed() => Some(told.borrow_and_update().clone()),
                () = at(again) => None,
            };
            let record = match news {
                Some(record) => Ok(record),
                None => registry.get(&key).await.map_err(Failure::Registry),
            };
            let settled = match record {
                Ok(record) => self.settle(registry, record).await,
                Err(failure) => Err(failure),
            };
            again = match settled {
                Ok(again) => {
                    outage.over();
                    in_trouble.store(false, Relaxed);
                    again
                }
                Err(Failure::Lost(revoked)) => return revoked,
                Err(Failure::Registry(error)) => {
                    in_trouble.store(true, Relaxed);
                    Some(Instant::now() + outage.failed(&error.to_string()))
                }
            };
        }
    }

    /// Puts it right once. `record`: what the registry has at this host's key. When it is to be looked at again, if not all is well yet.
    async fn settle(
        &mut self,
        registry: &dyn Registry,
        mut record: Option<Record>,
    ) -> Result<Option<Instant>, Failure> {
        let own = self.holding.now().lease;
        let subnets = own.subnets;
        for _ in 0..TRIES {
            let made = match &record {
                None => self.make(registry, &own).await?,
                Some(there) => match self.judge(there, &own.value) {
                    State::Right(lease) => {
                        self.holding.found(lease);
                        return Ok(None);
                    }
                    State::Anothers(reason) => return Err(Failure::Lost(Revoked::new(subnets, &reason))),
                    // It is being changed by this process.
                    State::Wrong if !self.addresses.settled() => return Ok(None),
                    wrong => {
                        if let Some(wait) = self.written.map(|written| written + PAUSE)
                            && wait > Instant::now()
                        {
                            return Ok(Some(wait));
                        }
                        self.written = Some(Instant::now());
                        let reason = match wrong {
                            State::Broken(reason) => reason,
                            _ => "it does not say what this host is".to_owned(),
                        };
                        warn!(
                            "somebody has written over this host's lease {} ({reason}): writing it again",
                            subnets.to_cidrs()
                        );
                        write_again(registry, there, &own).await?
                    }
                },
            };
            record = match made {
                Some(made) => Some(made),
                None => registry.get(&subnets.key()).await?,
            };
        }
        Ok(Some(Instant::now() + PAUSE))
    }

    fn judge(&self, record: &Record, own: &LeaseValue) -> State {
        match Lease::from_record(record) {
            Ok(lease) if !self.addresses.ever_contained(lease.value.public_ip) => {
                State::Anothers(format!("it now belongs to PublicIP {}", lease.value.public_ip))
            }
            Ok(lease) if lease.value != *own => State::Wrong,
            Ok(lease) => State::Right(lease),
            Err(error) => State::Broken(error.to_string()),
        }
    }

    /// Makes the record where there is none; `None` if there is one by now.
    async fn make(&self, registry: &dyn Registry, own: &Lease) -> Result<Option<Record>, Failure> {
        let subnets = own.subnets;
        let lost = |reason: String| Failure::Lost(Revoked::new(subnets, &reason));
        let loaded = match network::load(registry).await {
            Ok(parsed) => Some(parsed.network),
            // The configuration is for the operator to write, or to write again; this host needs it no more.
            Err(LoadError::Missing { .. } | LoadError::Invalid { .. }) => None,
            Err(LoadError::Registry(error)) => return Err(error.into()),
        };
        let network = loaded.as_ref().unwrap_or(&self.network);
        if !subnets.fit(network) {
            return Err(lost(
                "its key is gone, and it does not fit the network's configuration any more".to_owned(),
            ));
        }
        if let Some(other) = in_the_way(registry, subnets, network).await? {
            return Err(lost(format!(
                "its key is gone, and {other}, which overlaps it, is taken"
            )));
        }
        let made = registry
            .create(&subnets.key(), &own.value.to_bytes(), Some(SUBNET_TTL))
            .await?;
        if let Some(made) = &made {
            if made.revision < own.revision {
                warn!(
                    "{} has lost its data; this host has its lease {} again",
                    registry.describe(),
                    subnets.to_cidrs()
                );
            } else {
                info!(
                    "the lease {} was gone from the registry and the subnet still free: this host has taken it again",
                    subnets.to_cidrs()
                );
            }
        }
        Ok(made)
    }
}

/// A subnet that another record names and that overlaps ours, which fits the network. One that does not fit is in nobody's way: whoever
/// has it, all [serve](super::screen::Screen::settle) ours.
async fn in_the_way(
    registry: &dyn Registry,
    subnets: Subnets,
    network: &Network,
) -> Result<Option<String>, registry::Error> {
    let records = registry.list(SUBNETS).await?;
    // Keys count as taken even where their values are broken, as when a subnet is chosen.
    let mut taken = records.iter().filter_map(|record| subnets_of(&record.key));
    let other = taken.find(|other| *other != subnets && other.overlap(&subnets) && other.fit(network));
    Ok(other.map(|other| other.to_cidrs()))
}

/// The record with the right value again; `None` when it has changed meanwhile.
async fn write_again(registry: &dyn Registry, there: &Record, own: &Lease) -> Result<Option<Record>, registry::Error> {
    // Who writes a key with `etcdctl put` takes its time to live away, unless they mean to. A lease stays a lease.
    let readable = Lease::from_record(there).is_ok();
    let ttl: Option<TtlId> = if readable { there.ttl } else { there.ttl.or(own.ttl) };
    let bound = Record { ttl, ..there.clone() };
    let value = own.value.to_bytes();
    if let Some(made) = registry.replace(&bound, &value).await? {
        return Ok(Some(made));
    }
    if ttl == there.ttl || !registry.delete(there).await? {
        return Ok(None);
    }
    // Its time has run out as well.
    registry.create(&own.subnets.key(), &value, Some(SUBNET_TTL)).await
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::{
        lease::acquire::Own,
        registry::{Revision, memory::MemoryRegistry},
    };

    const DUAL: &str = r#"{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:12::/48"}"#;

    /// What comes of a lease whose record is gone, while others have these, with the configuration in the registry or not.
    async fn without_its_record(own: &str, network: &str, others: &[&str], configured: bool) -> Result<(), String> {
        let registry = MemoryRegistry::new();
        if configured {
            registry.put("config", network.as_bytes()).await.unwrap();
        }
        for other in others {
            let key = Subnets::from_cidrs(other).unwrap().key();
            registry.put(&key, br#"{"PublicIP":"192.0.2.66"}"#).await.unwrap();
        }
        let value = LeaseValue::new(Ipv4Addr::new(192, 0, 2, 1));
        let lease = Lease {
            subnets: Subnets::from_cidrs(own).unwrap(),
            value: value.clone(),
            revision: Revision(1),
            created: Revision(1),
            ttl: None,
        };
        let (addresses, key) = (OwnAddresses::new(value.public_ip), lease.subnets.key());
        let holding = Holding::new(Own { lease, left: None }, true);
        let network = Network::parse(network).unwrap().network;
        match Restorer::new(holding, addresses, network).settle(&registry, None).await {
            Ok(_) => {
                assert_eq!(registry.get(&key).await.unwrap().unwrap().value, value.to_bytes());
                Ok(())
            }
            Err(Failure::Lost(revoked)) => Err(revoked.to_string()),
            Err(Failure::Registry(error)) => panic!("{error}"),
        }
    }

    #[tokio::test]
    async fn records_that_do_not_fit_the_network_keep_no_host_from_making_its_lease_again() {
        let junk = [
            "10.5.0.0/17",
            "10.5.0.0/16",
            "10.5.1.0/25",
            "10.5.1.7/32",
            "10.5.0.0/20",
            "0.0.0.0/0",
        ];
        for configured in [true, false] {
            for other in junk {
                let made =
                    without_its_record("10.5.1.0/24", r#"{"Network":"10.5.0.0/16"}"#, &[other], configured).await;
                assert_eq!(made, Ok(()), "{other}");
            }
            let made = without_its_record("10.5.1.0/24", r#"{"Network":"10.5.0.0/16"}"#, &junk, configured).await;
            assert_eq!(made, Ok(()));
        }
    }

    #[tokio::test]
    async fn a_subnet_of_which_another_host_has_one_family_is_lost() {
        let own = "10.5.1.0/24,fd00:12:0:1::/64";
        for configured in [true, false] {
            for other in ["10.5.1.0/24,fd00:12:0:9::/64", "10.5.9.0/24,fd00:12:0:1::/64"] {
                let lost = without_its_record(own, DUAL, &[other], configured).await.unwrap_err();
                assert!(lost.contains(other) && lost.contains("is taken"), "{lost}");
            }
            let apart = ["10.5.9.0/24,fd00:12:0:9::/64"];
            assert_eq!(without_its_record(own, DUAL, &apart, configured).await, Ok(()));
        }
    }
}
