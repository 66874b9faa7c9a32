//! `--ip-blackhole-route`: packets to addresses of this host's subnet that no container has are dropped here. Without it
//! they follow the overlay's route, or the default route, out and may come back.

use ipnet::IpNet;
use tracing::{info, warn};

use crate::{
    backend::Overlays,
    kernel::{Error, Kernel, entries::PROTOCOL, monitor::Change},
    observe::outage::Outage,
};

/// The routes to keep.
#[derive(Debug)]
pub(super) struct Blackhole {
    wanted: Vec<IpNet>,
    outage: Outage,
}

impl Blackhole {
    /// Keeps those to `wanted`, and removes what an earlier run of this overlay has left besides.
    pub(super) fn new(kernel: &mut Kernel, wanted: Vec<IpNet>, overlays: &Overlays) -> Self {
        if let Err(error) = remove_others(kernel, &wanted, overlays) {
            warn!("an earlier run's blackhole routes may be left: {error}");
        }
        let mut blackhole = Self {
            wanted,
            outage: Outage::of("keeping the blackhole route"),
        };
        blackhole.keep(kernel);
        blackhole
    }

    /// Puts back what is missing.
    pub(super) fn keep(&mut self, kernel: &mut Kernel) {
        match self.wanted.iter().try_for_each(|to| kernel.add_blackhole(*to)) {
            Ok(()) => self.outage.over(),
            Err(error) => drop(self.outage.failed(&crate::observe::chain(&error))),
        }
    }

    /// Whether one of them is gone.
    pub(super) fn is_hit(&self, changes: &[Change]) -> bool {
        changes.iter().any(|change| match change {
            Change::Route { found, gone: true } => found.protocol == PROTOCOL && self.wanted.contains(&found.route.to),
            Change::Lost => !self.wanted.is_empty(),
            _ => false,
        })
    }
}

fn remove_others(kernel: &mut Kernel, wanted: &[IpNet], overlays: &Overlays) -> Result<(), Error> {
    for found in kernel.blackholes()? {
        if overlays.contain(&found) && !wanted.contains(&found) {
            info!("removing the blackhole route to {found}, which an earlier run has left");
            kernel.remove_blackhole(found)?;
        }
    }
    Ok(())
}
