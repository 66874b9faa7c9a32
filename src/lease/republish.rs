//! Another PublicIP, or whatever else has changed, in the lease that this host has: the subnet stays.

use std::time::Duration;

use tokio::time::sleep;
use tracing::info;

use super::{
    record::{Lease, LeaseValue, SUBNETS},
    watch::OwnAddresses,
};
use crate::{
    observe::outage::Outage,
    registry::{self, Registry},
};

/// How often a record that is gone, or nothing that can be read, is looked for again: the watch of the leases makes it again in a
/// moment once it knows.
const AGAIN: Duration = Duration::from_secs(3);

/// Puts `value` into the record of `own` as [`republish`] does, as long as it takes the registry to answer and the watch to put the
/// record right where it is gone. Where it cannot be put right the watch ends, and with it the run.
///
/// # Errors
/// The registry does not let us.
pub async fn publish(
    registry: &dyn Registry,
    own: &Lease,
    addresses: &OwnAddresses,
    value: &LeaseValue,
) -> Result<Lease, registry::Error> {
    let mut outage = Outage::of("publishing the new PublicIP");
    loop {
        match republish(registry, own, addresses, value).await {
            Ok(Some(lease)) => {
                outage.over();
                return Ok(lease);
            }
            Ok(None) => {
                outage.over();
                sleep(AGAIN).await;
            }
            Err(error) if error.is_transient() => sleep(outage.failed(&error.to_string())).await,
            Err(error) => return Err(error),
        }
    }
}

/// Puts `value` into the record of `own`, which keeps its time to live; what stands there then. `None` when the record is
/// gone, cannot be read or is, by its PublicIP, none of `addresses`: of that the watch of the leases tells.
///
/// Other leases with the PublicIP of `value` are released: they are this host's from an earlier time, and others would send
/// to both. Reservations stay, as when a lease is taken.
///
/// # Errors
/// When the registry fails. Trying again does no harm.
pub async fn republish(
    registry: &dyn Registry,
    own: &Lease,
    addresses: &OwnAddresses,
    value: &LeaseValue,
) -> Result<Option<Lease>, registry::Error> {
    let mut others = Vec::new();
    for record in registry.list(SUBNETS).await? {
        if let Ok(lease) = Lease::from_record(&record)
            && lease.subnets != own.subnets
            && lease.value.public_ip == value.public_ip
            && !lease.is_reservation()
        {
            others.push((lease, record));
        }
    }
    for (lease, record) in others {
        // One that has changed meanwhile stays: it may be a reservation now.
        if registry.delete(&record).await? {
            info!("released this host's other lease {}", lease.subnets.to_cidrs());
        }
    }
    loop {
        let Some(record) = registry.get(&own.subnets.key()).await? else {
            return Ok(None);
        };
        let Ok(there) = Lease::from_record(&record) else {
            return Ok(None);
        };
        if there.value == *value {
            return Ok(Some(there));
        }
        if !addresses.ever_contained(there.value.public_ip) {
            return Ok(None);
        }
        if let Some(record) = registry.replace(&record, &value.to_bytes()).await? {
            return Ok(Some(Lease {
                value: value.clone(),
                revision: record.revision,
                ..there
            }));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{net::Ipv4Addr, time::Duration};

    use super::*;
    use crate::registry::memory::MemoryRegistry;

    const DAY: Duration = Duration::from_secs(86_400);

    fn host(number: u8) -> LeaseValue {
        LeaseValue::new(Ipv4Addr::new(192, 0, 2, number))
    }

    async fn move_to(registry: &MemoryRegistry, own: &Lease, number: u8) -> Option<Lease> {
        let addresses = OwnAddresses::new(own.value.public_ip);
        addresses.add(host(number).public_ip);
        republish(registry, own, &addresses, &host(number)).await.unwrap()
    }

    async fn leased(registry: &MemoryRegistry, key: &str, number: u8) -> Lease {
        let record = registry
            .create(key, &host(number).to_bytes(), Some(DAY))
            .await
            .unwrap()
            .unwrap();
        Lease::from_record(&record).unwrap()
    }

    #[tokio::test]
    async fn the_subnet_and_its_time_stay_and_the_address_changes() {
        let registry = MemoryRegistry::new();
        let own = leased(&registry, "subnets/10.5.1.0-24", 1).await;
        let new = move_to(&registry, &own, 9).await.unwrap();
        assert_eq!((new.subnets, new.ttl), (own.subnets, own.ttl));
        let stored = registry.get("subnets/10.5.1.0-24").await.unwrap().unwrap();
        assert_eq!(stored.value, host(9).to_bytes());
        assert_eq!((stored.revision, stored.ttl), (new.revision, own.ttl));
        assert_eq!(move_to(&registry, &own, 9).await, Some(new));
    }

    #[tokio::test]
    async fn this_hosts_older_leases_are_released_and_reservations_and_others_stay() {
        let registry = MemoryRegistry::new();
        let own = leased(&registry, "subnets/10.5.1.0-24", 1).await;
        leased(&registry, "subnets/10.5.2.0-24", 9).await;
        leased(&registry, "subnets/10.5.3.0-24", 3).await;
        registry.put("subnets/10.5.4.0-24", &host(9).to_bytes()).await.unwrap();
        move_to(&registry, &own, 9).await.unwrap();
        let keys: Vec<_> = registry
            .list(SUBNETS)
            .await
            .unwrap()
            .into_iter()
            .map(|record| record.key)
            .collect();
        assert_eq!(
            keys,
            ["subnets/10.5.1.0-24", "subnets/10.5.3.0-24", "subnets/10.5.4.0-24"]
        );
    }

    #[tokio::test]
    async fn a_lease_that_is_gone_or_anothers_is_left_alone() {
        let registry = MemoryRegistry::new();
        let own = leased(&registry, "subnets/10.5.1.0-24", 1).await;
        registry.put("subnets/10.5.1.0-24", &host(7).to_bytes()).await.unwrap();
        assert_eq!(move_to(&registry, &own, 9).await, None);
        let record = registry.get("subnets/10.5.1.0-24").await.unwrap().unwrap();
        assert_eq!(record.value, host(7).to_bytes());
        registry.delete(&record).await.unwrap();
        assert_eq!(move_to(&registry, &own, 9).await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_that_changes_while_the_record_is_gone_or_junk_is_published_once_it_is_there_again() {
        for junk in [false, true] {
            let registry = MemoryRegistry::new();
            let own = leased(&registry, "subnets/10.5.1.0-24", 1).await;
            let record = registry.get("subnets/10.5.1.0-24").await.unwrap().unwrap();
            registry.delete(&record).await.unwrap();
            if junk {
                registry.put("subnets/10.5.1.0-24", b"{broken").await.unwrap();
            }
            let addresses = OwnAddresses::new(own.value.public_ip);
            addresses.add(host(9).public_ip);
            let (shared, lease) = (registry.clone(), own.clone());
            let publishing = tokio::spawn(async move { publish(&shared, &lease, &addresses, &host(9)).await.unwrap() });
            sleep(Duration::from_secs(3_600)).await;
            assert!(!publishing.is_finished());
            // As the watch does it, which knows of no other address yet.
            registry.put("subnets/10.5.1.0-24", &host(1).to_bytes()).await.unwrap();
            let new = publishing.await.unwrap();
            let stored = registry.get("subnets/10.5.1.0-24").await.unwrap().unwrap();
            assert_eq!(Lease::from_record(&stored).unwrap(), new);
            assert_eq!(new.value, host(9));
        }
    }
}
