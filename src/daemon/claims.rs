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

/// Claims the PublicIP, as long as it takes the registry to answer. `None` where the registry does not let us.
pub(super) async fn claim(
    registry: &Arc<dyn Registry>,
    public_ip: Ipv4Addr,
    claims: &Claims,
) -> Result<Option<Arc<Presence>>, Error> {
    let mut outage = Outage::of("claiming this host's PublicIP");
    loop {
        match Presence::claim(registry, public_ip).await {
            Ok(presence) => {
                outage.over();
                let presence = Arc::new(presence);
                claims.borrow_mut().push(Arc::clone(&presence));
                return Ok(Some(presence));
            }
            Err(ClaimError::Registry(error)) if error.is_transient() => {
                sleep(outage.failed(&error.to_string())).await;
            }
            Err(ClaimError::Registry(error)) => {
                warn!(
                    "two hosts with one PublicIP will not be noticed, because the key hosts/{public_ip} cannot be written: {error}"
                );
                return Ok(None);
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// As [`claim`], of an address that another host may have had till now, and may not have noticed yet.
pub(super) async fn claim_after_others(
    registry: &Arc<dyn Registry>,
    public_ip: Ipv4Addr,
    claims: &Claims,
) -> Result<Option<Arc<Presence>>, Error> {
    let begun = Instant::now();
    loop {
        match claim(registry, public_ip, claims).await {
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
pub(super) enum Claiming {
    /// Still to be made: the registry did not answer.
    Wanted(Ipv4Addr),
    /// Made; `None` where the registry does not let us.
    Done(Option<Arc<Presence>>),
}

/// Keeps the claim for as long as this is awaited; returns when another daemon has it.
pub(super) async fn keep_presence(registry: &Arc<dyn Registry>, claims: &Claims, claiming: Claiming) -> Error {
    let claimed = match claiming {
        Claiming::Wanted(public_ip) => claim(registry, public_ip, claims).await,
        Claiming::Done(claimed) => Ok(claimed),
    };
    match claimed {
        Ok(Some(presence)) => presence.keep().await.into(),
        Ok(None) => pending().await,
        Err(error) => error,
    }
}
