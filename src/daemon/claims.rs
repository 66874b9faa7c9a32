//! The claim to this host's PublicIP: made, kept, exchanged for another, and taken back.

use std::{cell::RefCell, future::pending, net::Ipv4Addr, sync::Arc, time::Duration};

use tokio::time::{Instant, sleep};
use tracing::warn;

use super::Error;
use crate::{
    lease::presence::{ClaimError, Presence},
    observe::outage::Outage,
    registry::Registry,
};

/// How long, and how often, a claim to a new PublicIP is tried while another host has it: two hosts may swap addresses, and a
/// claim that is not kept any more is forgotten within 30 s.
const HANDOVER: Duration = Duration::from_secs(60);
const HANDOVER_RETRY: Duration = Duration::from_secs(5);

/// The claims that are to be taken back in the end: more than one while the PublicIP changes.
pub(super) type Claims = RefCell<Vec<Arc<Presence>>>;

/// Claims the PublicIP, as long as it takes the registry to answer; where that fails for longer than `patience` it is still wanted.
pub(super) async fn claim(
    registry: &Arc<dyn Registry>,
    public_ip: Ipv4Addr,
    claims: &Claims,
    patience: Option<Duration>,
) -> Result<Claiming, Error> {
    let mut outage = Outage::of("claiming this host's PublicIP");
    let begun = Instant::now();
    loop {
        match Presence::claim(registry, public_ip).await {
            Ok(presence) => {
                outage.over();
                return Ok(Claiming::Done(Some(noted(presence, claims))));
            }
            Err(ClaimError::Registry(error)) if error.is_transient() => {
                let pause = outage.failed(&error.to_string());
                if patience.is_some_and(|patience| begun.elapsed() >= patience) {
                    return Ok(Claiming::Wanted(public_ip));
                }
                sleep(pause).await;
            }
            Err(ClaimError::Registry(error)) => {
                warn!(
                    "two hosts with one PublicIP will not be noticed, because the key hosts/{public_ip} cannot be written: {error}"
                );
                return Ok(Claiming::Done(None));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Claims the PublicIP once the registry lets us: one that refuses this client may yet take its new certificate.
async fn claim_in_time(
    registry: &Arc<dyn Registry>,
    public_ip: Ipv4Addr,
    claims: &Claims,
) -> Result<Arc<Presence>, ClaimError> {
    let mut outage = Outage::of("claiming this host's PublicIP");
    loop {
        match Presence::claim(registry, public_ip).await {
            Err(ClaimError::Registry(error)) => sleep(outage.failed(&error.to_string())).await,
            claimed => {
                outage.over();
                return Ok(noted(claimed?, claims));
            }
        }
    }
}

/// Notes that it is to be taken back.
fn noted(presence: Presence, claims: &Claims) -> Arc<Presence> {
    let presence = Arc::new(presence);
    claims.borrow_mut().push(Arc::clone(&presence));
    presence
}

/// As [`claim`], of an address that another host may have had till now, and may not have noticed yet.
pub(super) async fn claim_after_others(
    registry: &Arc<dyn Registry>,
    public_ip: Ipv4Addr,
    claims: &Claims,
) -> Result<Claiming, Error> {
    let begun = Instant::now();
    loop {
        match claim(registry, public_ip, claims, None).await {
            Err(Error::Claim(ClaimError::InUse { hostname, .. })) if begun.elapsed() < HANDOVER => {
                warn!("the new PublicIP {public_ip} is still claimed by host {hostname}: trying again");
                sleep(HANDOVER_RETRY).await;
            }
            claimed => return claimed,
        }
    }
}

/// Takes claims back.
pub(super) async fn withdraw(claims: Vec<Arc<Presence>>) {
    for claim in claims {
        claim.withdraw().await;
    }
}

/// How far the claim to the PublicIP is.
#[derive(Debug)]
pub(super) enum Claiming {
    /// Still to be made: the registry did not serve this host.
    Wanted(Ipv4Addr),
    /// Made; `None` where the registry does not let us.
    Done(Option<Arc<Presence>>),
}

/// Keeps the claim for as long as this is awaited; returns when another daemon has it.
pub(super) async fn keep_presence(registry: &Arc<dyn Registry>, claims: &Claims, claiming: Claiming) -> Error {
    let claimed = match claiming {
        Claiming::Wanted(public_ip) => claim_in_time(registry, public_ip, claims).await.map(Some),
        Claiming::Done(claimed) => Ok(claimed),
    };
    match claimed {
        Ok(Some(presence)) => presence.keep().await.into(),
        Ok(None) => pending().await,
        Err(error) => error.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::memory::MemoryRegistry;

    const HOST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

    #[tokio::test(start_paused = true)]
    async fn a_claim_that_the_registry_does_not_take_is_made_when_it_does() {
        let memory = MemoryRegistry::new();
        let (registry, claims): (Arc<dyn Registry>, _) = (Arc::new(memory.clone()), Claims::default());
        memory.set_full(true);
        let claiming = claim(&registry, HOST, &claims, Some(Duration::from_secs(1)))
            .await
            .unwrap();
        assert!(matches!(claiming, Claiming::Wanted(HOST)), "{claiming:?}");
        let waiting = async {
            sleep(Duration::from_secs(600)).await;
            assert!(claims.borrow().is_empty());
            memory.set_full(false);
            sleep(Duration::from_secs(10)).await;
        };
        tokio::select! {
            () = waiting => {}
            lost = keep_presence(&registry, &claims, claiming) => panic!("{lost}"),
        }
        assert_eq!(claims.borrow().len(), 1);
        assert!(registry.get("hosts/192.0.2.1").await.unwrap().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_claim_without_which_the_run_cannot_begin_is_waited_for() {
        let memory = MemoryRegistry::new();
        let (registry, claims): (Arc<dyn Registry>, _) = (Arc::new(memory.clone()), Claims::default());
        memory.set_full(true);
        let waiting = async {
            sleep(Duration::from_secs(600)).await;
            memory.set_full(false);
            pending::<()>().await
        };
        tokio::select! {
            () = waiting => {}
            claimed = claim(&registry, HOST, &claims, None) => {
                assert!(matches!(claimed, Ok(Claiming::Done(Some(_)))), "{claimed:?}");
            }
        }
    }
}
