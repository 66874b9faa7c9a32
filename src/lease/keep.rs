//! Keeping this host's lease: its time to live is started anew in good time, for as long as the daemon runs.

use std::time::Duration;

use tokio::time::Instant;
use tracing::{debug, warn};

use crate::{
    observe::outage::Outage,
    registry::{Registry, TtlId},
    sys::boot::uptime,
};

/// The longest pause between tries when the registry fails, as the original's.
const RETRY: Duration = Duration::from_secs(60);
/// The shortest: when the lease is about to run out, or has run out by this host's count. About as often the watch tries.
const HASTE: Duration = Duration::from_secs(2);
/// So many tries there are at least in what is left: a registry that is back before the end is not missed.
const CHANCES: u32 = 4;
/// The shortest pause after a success: a margin as long as the whole time to live must not make a busy loop.
const SHORTEST: Duration = Duration::from_secs(10);
/// The longest, whatever the margin: pauses do not go on while the machine sleeps, but the lease runs out. After twelve hours of sleep
/// a pause of hours would come too late.
const LONGEST: Duration = Duration::from_secs(3_600);

/// Refreshes `ttl` whenever `margin` of it is left (`--subnet-lease-renew-margin`), and each hour before that; `left`: how much it has now, 0: that is not
/// known, so that it is refreshed at once. `renewed` is told how much it has after each time. Returns when there is none any
/// more: the record is gone, which the watch of the leases tells, or has become a reservation.
///
/// A lease that runs out while the registry cannot be reached is only told of, not given up: most likely the registry is away
/// for all, and then nobody else can be given the subnet. Where only this host is cut off the others withdraw its routes in
/// time, and let in no more packets of it.
pub async fn keep(
    registry: &dyn Registry,
    ttl: TtlId,
    mut left: Duration,
    margin: Duration,
    renewed: impl Fn(Duration),
) {
    let mut outage = Outage::of("renewing this host's lease");
    loop {
        // By the clock of the pauses, and by the one that counts sleep.
        let (known, begun, awake) = (left, Instant::now(), uptime());
        if !known.is_zero() {
            tokio::time::sleep(known.saturating_sub(margin).clamp(SHORTEST, LONGEST)).await;
        }
        let mut told = false;
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
                    let passed = begun.elapsed().max(uptime().saturating_sub(awake));
                    let left = (!known.is_zero()).then(|| known.saturating_sub(passed));
                    if left == Some(Duration::ZERO) && !told {
                        told = true;
                        warn!(
                            "this host's lease has run out by its own count, for want of a registry that renews it: another \
                             host may be given its subnet. Packets go on, since the registry may be away for all"
                        );
                    }
                    let pause = left.map_or(HASTE, |left| left / CHANCES).clamp(HASTE, RETRY);
                    tokio::time::sleep(pause).await;
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
    async fn a_registry_that_is_back_seconds_before_the_end_is_in_time() {
        let (registry, _task) = kept(HOUR).await;
        registry.set_available(false);
        tokio::time::sleep(DAY - Duration::from_secs(5)).await;
        registry.set_available(true);
        tokio::time::sleep(DAY).await;
        assert!(is_there(&registry).await);
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_of_unknown_time_is_refreshed_at_once() {
        let (registry, task) = kept(HOUR).await;
        task.abort();
        tokio::time::sleep(DAY / 2).await;
        let ttl = registry.get("subnets/10.5.1.0-24").await.unwrap().unwrap().ttl.unwrap();
        let shared = registry.clone();
        tokio::spawn(async move { keep(&shared, ttl, Duration::ZERO, HOUR, |_| {}).await });
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(registry.time_left(ttl).await.unwrap().unwrap() > DAY - HOUR);
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

    #[tokio::test(start_paused = true)]
    async fn a_lease_is_refreshed_each_hour_so_that_half_a_day_of_sleep_does_not_end_it() {
        for hours in [3, 13, 22] {
            let (registry, task) = kept(HOUR).await;
            tokio::time::sleep(hours * HOUR + HOUR / 2).await;
            let ttl = registry.get("subnets/10.5.1.0-24").await.unwrap().unwrap().ttl.unwrap();
            let left = registry.time_left(ttl).await.unwrap().unwrap();
            assert!(left > DAY - HOUR, "{left:?} after {hours} h");
            task.abort();
        }
    }
}
