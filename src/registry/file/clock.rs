//! Which time it is in the embedded registry: the wall clock's when a boot of the machine first writes to it, and from then on
//! only what has passed since, whatever becomes of the wall clock. Somebody who sets that a day forward does not end all leases.
//!
//! It counts from the Unix epoch: leases outlive a reboot, at which every other clock begins anew.

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use crate::sys::boot::{self, uptime};

/// The time as of the last change of the registry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Clock {
    /// In which boot that was.
    boot: String,
    /// How long after its begin, in ms.
    uptime_ms: u64,
    /// Which time it was.
    now_ms: u64,
}

/// This boot of the machine.
#[derive(Debug, Clone)]
pub(super) struct Boot(String);

impl Boot {
    /// `None` where the kernel does not tell: then the wall clock has to do.
    pub(super) fn this() -> Option<Self> {
        boot::id().ok().map(Self)
    }
}

impl Clock {
    /// It is `now`, in this boot.
    pub(super) fn at(now: Duration, boot: &Boot) -> Self {
        Self {
            boot: boot.0.clone(),
            uptime_ms: millis(uptime()),
            now_ms: millis(now),
        }
    }
}

/// Which time it is, when the registry was last changed at `clock` (`None`: that is not known).
pub(super) fn now(clock: Option<&Clock>, boot: Option<&Boot>) -> Duration {
    after(clock, boot, uptime(), wall())
}

fn after(clock: Option<&Clock>, boot: Option<&Boot>, uptime: Duration, wall: Duration) -> Duration {
    let Some(clock) = clock else { return wall };
    let written = Duration::from_millis(clock.now_ms);
    if boot.is_some_and(|boot| boot.0 == clock.boot) {
        return written + uptime.saturating_sub(Duration::from_millis(clock.uptime_ms));
    }
    // Never back: the wall clock of a machine without a battery begins in 1970, and is set later.
    wall.max(written)
}

/// Before 1970 counts as 1970.
fn wall() -> Duration {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
}

fn millis(time: Duration) -> u64 {
    // 584 million years.
    time.as_millis() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: Duration = Duration::from_secs(86_400);
    const WALL: Duration = Duration::from_secs(1_700_000_000);

    fn boot(name: &str) -> Boot {
        Boot(name.to_owned())
    }

    fn clock() -> Clock {
        Clock {
            boot: "one".to_owned(),
            uptime_ms: 5_000,
            now_ms: millis(WALL),
        }
    }

    #[test]
    fn within_a_boot_only_what_passes_counts() {
        let later = Duration::from_secs(12);
        for wall in [WALL - DAY, WALL, WALL + DAY] {
            let now = after(Some(&clock()), Some(&boot("one")), later, wall);
            assert_eq!(now, WALL + Duration::from_secs(7));
        }
    }

    #[test]
    fn after_a_reboot_the_wall_clock_counts_but_never_goes_back() {
        let in_another = |wall| after(Some(&clock()), Some(&boot("two")), Duration::from_secs(1), wall);
        assert_eq!(in_another(WALL + DAY), WALL + DAY);
        assert_eq!(in_another(Duration::ZERO), WALL);
    }

    #[test]
    fn the_wall_clock_begins_it() {
        assert_eq!(after(None, Some(&boot("one")), DAY, WALL), WALL);
        assert_eq!(after(Some(&clock()), None, DAY, WALL + DAY), WALL + DAY);
    }
}
