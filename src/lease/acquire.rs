//! Taking a lease: the one this host had, else a free subnet, by transaction.

use std::time::Duration;

use ipnet::Ipv4Net;
use tracing::{info, warn};

use crate::{
    network::{AddressPlan, Block, Network},
    registry::{self, Registry},
    subnet_file::Previous,
};

use super::{
    choose::{self, OutOfSubnets},
    record::{Lease, LeaseValue, SUBNETS, Subnets, subnets_of},
};

/// How long a lease outlives its daemon: the original's day, in which a host finds its subnet again.
pub const SUBNET_TTL: Duration = Duration::from_secs(86_400);

/// How often a race for a subnet may be lost before giving up: each loss means that another host has won, so that this many
/// in a row mean that something else is wrong.
const TRIES: u32 = 100;

/// This host's lease, as just taken or as remembered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Own {
    /// What stands in the registry.
    pub lease: Lease,
    /// How long it has; `None`: a reservation, which does not expire.
    pub left: Option<Duration>,
}

/// Why there is no lease.
#[derive(Debug, thiserror::Error)]
pub enum AcquireError {
    /// No free subnet is left.
    #[error(transparent)]
    OutOfSubnets(#[from] OutOfSubnets),
    /// Others were faster each time.
    #[error(
        "lost the race for a subnet {TRIES} times in a row: {registry} answers, but no transaction of ours succeeds"
    )]
    Races {
        /// As [`Registry::describe`] says it.
        registry: String,
    },
    /// The registry failed.
    #[error(transparent)]
    Registry(#[from] registry::Error),
}

/// Takes the lease of the host whose PublicIP `value` carries.
///
/// In this order, as the original: the lease that carries our PublicIP, if it fits the network (one that does not is
/// deleted); `previous`, what the subnet file says, if it is free; one of the free subnets at random. Where there are
/// several of ours, a reservation comes before leases, and the leases that are not used are released.
///
/// # Errors
/// When there is no free subnet, or the registry fails. Nothing is left half done: the record is made in one transaction.
pub async fn acquire(
    registry: &dyn Registry,
    network: &Network,
    value: &LeaseValue,
    previous: &Previous,
) -> Result<Own, AcquireError> {
    for _ in 0..TRIES {
        let (mut ours, mut taken) = (Vec::new(), Vec::new());
        for record in registry.list(SUBNETS).await? {
            match Lease::from_record(&record) {
                Ok(lease) if lease.value.public_ip == value.public_ip => ours.push((lease, record)),
                // Keys count as taken even where their values are broken.
                _ => taken.extend(subnets_of(&record.key)),
            }
        }
        let (mut ours, misfits): (Vec<_>, Vec<_>) = ours.into_iter().partition(|(lease, _)| lease.subnets.fit(network));
        for (lease, record) in misfits {
            warn!(
                "the lease {} of this host does not fit the network's configuration any more: giving it up",
                lease.subnets.to_cidrs()
            );
            registry.delete(&record).await?;
        }
        // Reservations first; the sort keeps the registry's order otherwise.
        ours.sort_by_key(|(lease, _)| !lease.is_reservation());
        let mut ours = ours.into_iter();
        if let Some((lease, record)) = ours.next() {
            let Some(own) = reuse(registry, &record, lease, value).await? else {
                // It changed or ran out in this moment.
                continue;
            };
            for (lease, record) in ours.filter(|(lease, _)| !lease.is_reservation()) {
                // One that has changed meanwhile stays: it may be a reservation now.
                if registry.delete(&record).await? {
                    info!("released this host's other lease {}", lease.subnets.to_cidrs());
                }
            }
            return Ok(own);
        }
        let subnets = choose_subnets(network, &taken, previous)?;
        if let Some(record) = registry
            .create(&subnets.key(), &value.to_bytes(), Some(SUBNET_TTL))
            .await?
        {
            info!("took subnet {}", subnets.to_cidrs());
            let lease = Lease {
                subnets,
                value: value.clone(),
                revision: record.revision,
                created: record.created,
                ttl: record.ttl,
            };
            return Ok(Own {
                lease,
                left: Some(SUBNET_TTL),
            });
        }
    }
    Err(AcquireError::Races {
        registry: registry.describe(),
    })
}

/// Goes on with the lease that another process of this host has at this moment; `None` when it is not there any more, or not
/// with the PublicIP that `value` carries.
///
/// # Errors
/// When the registry fails.
pub async fn go_on(
    registry: &dyn Registry,
    subnets: Subnets,
    value: &LeaseValue,
) -> Result<Option<Own>, registry::Error> {
    while let Some(record) = registry.get(&subnets.key()).await? {
        match Lease::from_record(&record) {
            Ok(lease) if lease.value.public_ip == value.public_ip => {
                if let Some(own) = reuse(registry, &record, lease, value).await? {
                    return Ok(Some(own));
                }
            }
            _ => return Ok(None),
        }
    }
    Ok(None)
}

/// Makes a lease that carries our PublicIP ours again; `None` when it changed or ran out meanwhile.
async fn reuse(
    registry: &dyn Registry,
    record: &registry::Record,
    mut lease: Lease,
    value: &LeaseValue,
) -> Result<Option<Own>, registry::Error> {
    let left = match lease.ttl {
        Some(ttl) => match registry.refresh(ttl).await? {
            Some(left) => Some(left),
            None => return Ok(None),
        },
        None => None,
    };
    if lease.value != *value {
        match registry.replace(record, &value.to_bytes()).await? {
            Some(record) => {
                lease = Lease {
                    value: value.clone(),
                    revision: record.revision,
                    ..lease
                }
            }
            None => return Ok(None),
        }
    }
    let kind = if left.is_some() { "lease" } else { "reservation" };
    info!("found this host's {kind} {}: using it again", lease.subnets.to_cidrs());
    Ok(Some(Own { lease, left }))
}

/// A free subnet of each family that the network has.
fn choose_subnets(network: &Network, taken: &[Subnets], previous: &Previous) -> Result<Subnets, OutOfSubnets> {
    let v4 = match network.ipv4() {
        Some(plan) => {
            let taken = taken.iter().map(Subnets::v4).filter(|net| is_a_share(plan, net));
            choose::choose(plan, taken, previous.subnet, random())?
        }
        None => Ipv4Net::default(),
    };
    let v6 = network
        .ipv6()
        .map(|plan| {
            let taken = taken.iter().filter_map(Subnets::v6).filter(|net| is_a_share(plan, net));
            choose::choose(plan, taken, previous.ipv6_subnet, random())
        })
        .transpose()?;
    Ok(Subnets::new(v4, v6))
}

/// Whether the block may have been handed out by some configuration of this network, which has at least four subnets. A key that
/// names half of the network or all of it is a mistake, or malice, and must not keep all hosts from having a subnet.
fn is_a_share<N: Block>(plan: &AddressPlan<N>, block: &N) -> bool {
    block.length() >= plan.network().length() + 2
}

/// A random number: the standard library seeds its hash maps from the system's.
fn random() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    #[cfg(test)]
    if let Some(thrown) = super::model::throw() {
        return thrown;
    }
    RandomState::new().hash_one(0)
}

#[cfg(test)]
mod tests {
    use std::{net::Ipv4Addr, sync::Arc};

    use super::*;
    use crate::registry::memory::MemoryRegistry;

    /// Subnets 10.5.1.0/24 to 10.5.4.0/24.
    const FOUR: &str = r#"{"Network":"10.5.0.0/16","SubnetMin":"10.5.1.0","SubnetMax":"10.5.4.0"}"#;

    fn network() -> Network {
        Network::parse(FOUR).unwrap().network
    }

    fn host(number: u8) -> LeaseValue {
        LeaseValue::new(Ipv4Addr::new(192, 0, 2, number))
    }

    async fn take(registry: &MemoryRegistry, value: &LeaseValue) -> Result<Own, AcquireError> {
        acquire(registry, &network(), value, &Previous::default()).await
    }

    #[tokio::test]
    async fn a_new_host_gets_a_free_subnet_for_a_day() {
        let registry = MemoryRegistry::new();
        let own = take(&registry, &host(1)).await.unwrap();
        assert!(own.lease.subnets.fit(&network()));
        assert_eq!(own.left, Some(SUBNET_TTL));
        let stored = registry.get(&own.lease.subnets.key()).await.unwrap().unwrap();
        assert_eq!(stored.value, br#"{"PublicIP":"192.0.2.1","PublicIPv6":null}"#);
    }

    #[tokio::test]
    async fn a_restarted_host_gets_its_lease_again_without_writing_it() {
        let registry = MemoryRegistry::new();
        let first = take(&registry, &host(1)).await.unwrap();
        take(&registry, &host(2)).await.unwrap();
        let again = take(&registry, &host(1)).await.unwrap();
        assert_eq!(again.lease, first.lease);
    }

    #[tokio::test]
    async fn a_lease_that_is_handed_over_stays_as_it_is_and_one_that_is_gone_is_missed() {
        let registry = MemoryRegistry::new();
        let first = take(&registry, &host(1)).await.unwrap().lease;
        let own = go_on(&registry, first.subnets, &host(1)).await.unwrap().unwrap();
        assert_eq!((&own.lease, own.left), (&first, Some(SUBNET_TTL)));
        assert!(go_on(&registry, first.subnets, &host(2)).await.unwrap().is_none());
        let record = registry.get(&first.subnets.key()).await.unwrap().unwrap();
        registry.delete(&record).await.unwrap();
        assert!(go_on(&registry, first.subnets, &host(1)).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn a_lease_left_by_another_backend_is_rewritten_in_place() {
        let registry = MemoryRegistry::new();
        let vxlan = br#"{"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1}}"#;
        let old = registry
            .create("subnets/10.5.3.0-24", vxlan, Some(SUBNET_TTL))
            .await
            .unwrap()
            .unwrap();
        let own = take(&registry, &host(1)).await.unwrap();
        let stored = registry.get("subnets/10.5.3.0-24").await.unwrap().unwrap();
        assert_eq!(stored.value, host(1).to_bytes());
        assert_eq!((stored.revision, stored.ttl), (own.lease.revision, old.ttl));
    }

    #[tokio::test]
    async fn a_reservation_is_used_and_stays_one() {
        let registry = MemoryRegistry::new();
        registry.put("subnets/10.5.2.0-24", &host(7).to_bytes()).await.unwrap();
        let own = take(&registry, &host(7)).await.unwrap();
        assert_eq!(own.lease.subnets.to_string(), "10.5.2.0-24");
        assert_eq!(own.left, None);
        assert!(
            registry
                .get("subnets/10.5.2.0-24")
                .await
                .unwrap()
                .unwrap()
                .ttl
                .is_none()
        );
    }

    #[tokio::test]
    async fn a_reservation_comes_before_a_lease_which_is_released_then() {
        let registry = MemoryRegistry::new();
        registry
            .create("subnets/10.5.1.0-24", &host(1).to_bytes(), Some(SUBNET_TTL))
            .await
            .unwrap();
        for reserved in ["10.5.2.0-24", "10.5.3.0-24"] {
            let key = format!("subnets/{reserved}");
            registry.put(&key, &host(1).to_bytes()).await.unwrap();
        }
        let others = registry
            .create("subnets/10.5.4.0-24", &host(2).to_bytes(), Some(SUBNET_TTL))
            .await
            .unwrap();
        let own = take(&registry, &host(1)).await.unwrap();
        assert_eq!(own.lease.subnets.to_string(), "10.5.2.0-24");
        assert_eq!(own.left, None);
        assert_eq!(registry.get("subnets/10.5.1.0-24").await.unwrap(), None);
        assert!(registry.get("subnets/10.5.3.0-24").await.unwrap().is_some());
        assert_eq!(registry.get("subnets/10.5.4.0-24").await.unwrap(), others);
    }

    #[tokio::test]
    async fn a_reservation_that_does_not_fit_leaves_the_lease_in_use() {
        let registry = MemoryRegistry::new();
        let leased = take(&registry, &host(1)).await.unwrap();
        registry.put("subnets/10.9.1.0-24", &host(1).to_bytes()).await.unwrap();
        assert_eq!(take(&registry, &host(1)).await.unwrap().lease, leased.lease);
    }

    #[tokio::test]
    async fn a_lease_that_does_not_fit_any_more_is_given_up() {
        let registry = MemoryRegistry::new();
        registry
            .create("subnets/10.9.1.0-24", &host(1).to_bytes(), Some(SUBNET_TTL))
            .await
            .unwrap();
        let own = take(&registry, &host(1)).await.unwrap();
        assert!(own.lease.subnets.fit(&network()));
        assert_eq!(registry.get("subnets/10.9.1.0-24").await.unwrap(), None);
    }

    #[tokio::test]
    async fn the_subnet_files_subnet_is_taken_if_it_is_free() {
        let registry = MemoryRegistry::new();
        let previous = Previous::parse("FLANNEL_SUBNET=10.5.4.1/24");
        let own = acquire(&registry, &network(), &host(1), &previous).await.unwrap();
        assert_eq!(own.lease.subnets.to_string(), "10.5.4.0-24");
        let other = acquire(&registry, &network(), &host(2), &previous).await.unwrap();
        assert_ne!(other.lease.subnets, own.lease.subnets);
    }

    #[tokio::test]
    async fn keys_with_broken_values_count_as_taken() {
        let registry = MemoryRegistry::new();
        for taken in ["10.5.1.0-24", "10.5.2.0-24", "10.5.4.0-24"] {
            registry.put(&format!("subnets/{taken}"), b"{broken").await.unwrap();
        }
        registry.put("subnets/rubbish", b"{broken").await.unwrap();
        assert_eq!(
            take(&registry, &host(1)).await.unwrap().lease.subnets.to_string(),
            "10.5.3.0-24"
        );
    }

    #[tokio::test]
    async fn a_key_that_names_all_of_the_network_keeps_nobody_from_a_subnet() {
        let registry = MemoryRegistry::new();
        for key in ["10.5.0.0-16", "10.5.0.0-17", "10.5.128.0-17", "0.0.0.0-0", "10.0.0.0-8"] {
            registry.put(&format!("subnets/{key}"), b"{}").await.unwrap();
        }
        let own = take(&registry, &host(1)).await.unwrap();
        assert!(own.lease.subnets.fit(&network()));
    }

    #[tokio::test]
    async fn hosts_that_race_get_a_subnet_each_until_none_is_left() {
        let registry = Arc::new(MemoryRegistry::new());
        let mut tasks = tokio::task::JoinSet::new();
        for number in 1..=20 {
            let registry = Arc::clone(&registry);
            tasks.spawn(async move { take(&registry, &host(number)).await });
        }
        let (mut won, mut lost) = (std::collections::HashSet::new(), 0);
        while let Some(outcome) = tasks.join_next().await {
            match outcome.unwrap() {
                Ok(own) => assert!(won.insert(own.lease.subnets), "{} went to two hosts", own.lease.subnets),
                Err(AcquireError::OutOfSubnets(_)) => lost += 1,
                Err(other) => panic!("{other}"),
            }
        }
        assert_eq!((won.len(), lost), (4, 16));
    }
}
