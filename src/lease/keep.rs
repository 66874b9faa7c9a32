//! Keeping this host's lease: its time to live is started anew in good time, for as long as the daemon runs.

use std::time::Duration;

use tracing::debug;

use crate::{
    observe::outage::Outage,
    registry::{Registry, TtlId},
};

/// The pause between tries when the registry fails, as the original's.
const RETRY: Duration = Duration::from_secs(60);
/// The shortest pause after a success: a margin as long as the whole time to live must not make a busy loop.
const SHORTEST: Duration = Duration::from_secs(10);

/// Refreshes `ttl` whenever `margin` of it is left (`--subnet-lease-renew-margin`); `left`: how much it has now. `renewed` is
/// told how much it has after each time. Returns
/// when there is none any more: the record is gone, which the watch of the leases tells, or has become a reservation.
pub async fn keep(
    registry: &dyn Registry,
    ttl: TtlId,
    mut left: Duration,
    margin: Duration,
    renewed: impl Fn(Duration),
) {
    let mut outage = Outage::of("renewing this host's lease");
    loop {
        tokio::time::sleep(left.saturating_sub(margin).max(SHORTEST)).await;
        left = loop {
            match registry.refresh(ttl).await {
                Ok(Some(left)) => break left,
                Ok(None) => {
                    // Not for the log: it may have become a reservation, and of a real loss the watch tells.
                    debug!("this host's lease has run out, or does not expire any more");
                    return;
                }
                Err(error) => {
                    outage.failed(&error.to_string());
                    tokio::time::sleep(RETRY).await;
                }
            }
        };
        outage.over();
        renewed(left);
        debug!("lease renewed: {} s left", left.as_secs());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::memory::MemoryRegistry;

    const DAY: Duration = Duration::from_secs(86_400);
    const HOUR: Duration = Duration::from_secs(3_600);

    async fn kept(margin: Duration) -> (MemoryRegistry, tokio::task::JoinHandle<()>) {
        let registry = MemoryRegistry::new();
        let ttl = registry
            .create("subnets/10.5.1.0-24", b"", Some(DAY))
            .await
            .unwrap()
            .unwrap()
            .ttl
            .unwrap();
        let shared = registry.clone();
        let task = tokio::spawn(async move { keep(&shared, ttl, DAY, margin, |_| {}).await });
        (registry, task)
    }

    async fn is_there(registry: &MemoryRegistry) -> bool {
        registry.get("subnets/10.5.1.0-24").await.unwrap().is_some()
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_lives_for_as_long_as_it_is_kept() {
        for margin in [HOUR / 60, HOUR, DAY - Duration::from_secs(60)] {
            let (registry, task) = kept(margin).await;
            tokio::time::sleep(30 * DAY).await;
            assert!(is_there(&registry).await, "margin {margin:?}");
            task.abort();
            tokio::time::sleep(2 * DAY).await;
            assert!(!is_there(&registry).await);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_survives_an_outage_shorter_than_the_margin() {
        let (registry, _task) = kept(HOUR).await;
        tokio::time::sleep(DAY - HOUR - Duration::from_secs(10)).await;
        registry.set_available(false);
        tokio::time::sleep(HOUR - Duration::from_secs(90)).await;
        registry.set_available(true);
        tokio::time::sleep(DAY).await;
        assert!(is_there(&registry).await);
    }

    #[tokio::test(start_paused = true)]
    async fn keeping_ends_when_the_lease_has_run_out() {
        let (registry, task) = kept(HOUR).await;
        registry.set_available(false);
        tokio::time::sleep(2 * DAY).await;
        registry.set_available(true);
        task.await.unwrap();
        assert!(!is_there(&registry).await);
    }
}
