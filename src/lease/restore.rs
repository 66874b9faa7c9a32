//! This host's lease put right: made again when it is gone and the subnet is still free, written again when somebody has
//! written something else into it.
//!
//! The original ends as soon as its key is deleted. But where nobody else has the subnet there is nothing that an end would be
//! good for: the daemon would take the same subnet again when it is started. So it ends only when the subnet is another's.

use std::time::Duration;

use tokio::time::Instant;
use tracing::{info, warn};

use super::{
    acquire::{SUBNET_TTL, is_a_share},
    holding::Holding,
    record::{Lease, LeaseValue, SUBNETS, Subnets, subnets_of},
    watch::{OwnAddresses, Revoked},
};
use crate::{
    network::{self, LoadError, Network},
    registry::{self, Record, Registry, TtlId},
};

/// How often this host's record is written again at most: another program that does the same must not make a busy loop of it.
const PAUSE: Duration = Duration::from_secs(10);

/// How often the record is looked at again when it changes under our hands: each time somebody else was faster, and what they
/// do next the watch tells.
const TRIES: u32 = 10;

/// Why it was not put right.
#[derive(Debug)]
pub(super) enum Failure {
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

/// How it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Settled {
    /// The registry has gone back in time: it has lost data, such as the leases of other hosts.
    pub(super) went_back: bool,
    /// When it is to be looked at again, if not all is well yet.
    pub(super) again: Option<Instant>,
}

/// Puts it right.
#[derive(Debug)]
pub(super) struct Restorer {
    holding: Holding,
    addresses: OwnAddresses,
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
    pub(super) fn new(holding: Holding, addresses: OwnAddresses) -> Self {
        Self {
            holding,
            addresses,
            written: None,
        }
    }

    /// `record`: what the registry has at this host's key.
    pub(super) async fn settle(&mut self, registry: &dyn Registry, record: Option<Record>) -> Result<Settled, Failure> {
        let before = self.holding.now().lease;
        let again = self.put_right(registry, record, &before).await?;
        Ok(Settled {
            // Revisions only ever grow, and this is the same record or a later one.
            went_back: self.holding.now().lease.revision < before.revision,
            again,
        })
    }

    async fn put_right(
        &mut self,
        registry: &dyn Registry,
        mut record: Option<Record>,
        own: &Lease,
    ) -> Result<Option<Instant>, Failure> {
        let subnets = own.subnets;
        for _ in 0..TRIES {
            let made = match &record {
                None => self.make(registry, own).await?,
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
                        write_again(registry, there, own).await?
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
        let network = match network::load(registry).await {
            Ok(parsed) if !subnets.fit(&parsed.network) => {
                return Err(lost(
                    "its key is gone, and it does not fit the network's configuration any more".to_owned(),
                ));
            }
            Ok(parsed) => Some(parsed.network),
            // The configuration is for the operator to write, or to write again; this host needs it no more.
            Err(LoadError::Missing { .. } | LoadError::Invalid { .. }) => None,
            Err(LoadError::Registry(error)) => return Err(error.into()),
        };
        if let Some(other) = in_the_way(registry, subnets, network.as_ref()).await? {
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

/// A subnet that another record names and that overlaps ours.
async fn in_the_way(
    registry: &dyn Registry,
    subnets: Subnets,
    network: Option<&Network>,
) -> Result<Option<String>, registry::Error> {
    let records = registry.list(SUBNETS).await?;
    // Keys count as taken even where their values are broken, but not if they name most of the network, as when a subnet is chosen.
    let plan = network.and_then(Network::ipv4);
    let mut taken = records
        .iter()
        .filter_map(|record| subnets_of(&record.key))
        .filter(|subnets| plan.is_none_or(|plan| is_a_share(plan, &subnets.v4())));
    let other = taken.find(|other| *other != subnets && other.overlap(&subnets));
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
