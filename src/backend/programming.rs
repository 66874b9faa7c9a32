//! What `vxlan` and `host-gw` have in common: the kernel is kept programmed.
//!
//! What the kernel holds is listed once, and from then on believed: the operations that it has carried out are added, and
//! what it tells of agrees with that or does not. Only where it does not, after a loss of such news, and every now and then,
//! all is listed again. So one change among thousands of peers costs a comparison in memory and a few messages.

use std::{
    collections::{HashMap, HashSet},
    hash::{DefaultHasher, Hash, Hasher},
    net::IpAddr,
    time::Duration,
};

use ipnet::IpNet;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::{
    Overlays,
    reconcile::{Actual, Desired, Scope, reconcile},
    repairs::Repairs,
};
use crate::{
    kernel::{Error, Kernel, Path, monitor::Change},
    observe::lines::Lines,
};

/// How often the kernel is looked at even though it tells of nothing: what happens to it without a word is rare.
const FULL_CHECK: Duration = Duration::from_secs(60);

/// How soon after something was refused: the original's pause between two looks at its routes. What mends it is mostly told
/// of, and then tried at once.
const RETRY: Duration = Duration::from_secs(10);

/// The kernel's tables, as far as they are one backend's.
#[derive(Debug)]
pub(super) struct Programming {
    kernel: Kernel,
    scope: Scope,
    /// The scope's networks once nothing of an earlier one is left.
    lasting: Vec<IpNet>,
    actual: Actual,
    /// Whether `actual` is what the kernel holds, or has to be listed anew.
    believed: bool,
    /// Whether `actual` was ever listed.
    listed: bool,
    paths: Paths,
    refusals: Complaints,
    trouble: bool,
    repairs: Repairs,
}

/// How the kernel sends to the other hosts, as it was last asked.
#[derive(Debug, Default)]
struct Paths {
    known: HashMap<IpAddr, Option<Path>>,
    stale: bool,
}

impl Paths {
    /// Whether packets to some host may take a route to `to` from now on, or took it till now.
    fn may_take(&self, to: &IpNet) -> bool {
        self.known.keys().any(|host| to.contains(host))
    }

    /// Whether packets to some host leave by this link.
    fn use_link(&self, index: u32) -> bool {
        self.known.values().flatten().any(|path| path.link == index)
    }
}

impl Programming {
    pub(super) fn new(kernel: Kernel, overlays: &Overlays) -> Self {
        Self {
            kernel,
            scope: Scope {
                networks: overlays.all(),
                device: None,
            },
            lasting: vec![overlays.current],
            actual: Actual::default(),
            believed: false,
            listed: false,
            paths: Paths::default(),
            refusals: Complaints::default(),
            trouble: false,
            repairs: Repairs::default(),
        }
    }

    pub(super) fn kernel(&mut self) -> &mut Kernel {
        &mut self.kernel
    }

    /// What was put right so far.
    pub(super) fn repairs(&self) -> &Repairs {
        &self.repairs
    }

    /// The VXLAN device's index, which changes when it is made again.
    pub(super) fn set_device(&mut self, index: u32) {
        if self.scope.device != Some(index) {
            self.scope.device = Some(index);
            self.believed = false;
        }
    }

    /// Believes nothing any more.
    pub(super) fn distrust(&mut self) {
        self.believed = false;
        self.paths.stale = true;
    }

    /// How long until the kernel is to be looked at again.
    pub(super) fn recheck_after(&self) -> Duration {
        if self.trouble { RETRY } else { FULL_CHECK }
    }

    /// Something besides the tables is not as it should be.
    pub(super) fn note_trouble(&mut self) {
        self.trouble = true;
    }

    /// How the kernel sends to each of `hosts`; `None` where it does not know.
    pub(super) fn paths(&mut self, hosts: &[IpAddr]) -> Result<&HashMap<IpAddr, Option<Path>>, Error> {
        let mut before = std::mem::take(&mut self.paths.known);
        if self.paths.stale {
            before.clear();
        }
        let known = &mut self.paths.known;
        known.extend(hosts.iter().filter_map(|host| before.remove_entry(host)));
        let new: Vec<IpAddr> = hosts.iter().copied().filter(|host| !known.contains_key(host)).collect();
        if !new.is_empty() {
            let found = self.kernel.paths(&new)?;
            known.extend(new.into_iter().zip(found));
        }
        self.paths.stale = false;
        Ok(&self.paths.known)
    }

    /// Makes the kernel hold what is desired. What it refuses is logged, and tried again.
    pub(super) fn make(&mut self, desired: &Desired) -> Result<(), Error> {
        self.trouble = false;
        let mut repairing = false;
        if !self.believed {
            // What was there already by our own doing, and is not any more.
            repairing = self.listed && reconcile(desired, &self.actual).is_empty();
            self.list()?;
        }
        let operations = reconcile(desired, &self.actual);
        if !operations.is_empty() {
            // An error leaves nothing that could be believed.
            self.believed = false;
            let outcomes = self.kernel.apply(&operations)?;
            self.believed = true;
            for (operation, outcome) in operations.iter().zip(outcomes) {
                match outcome {
                    Ok(()) => {
                        self.actual.apply(operation);
                        if repairing {
                            self.repairs.count_operation(operation);
                        }
                    }
                    Err(error) => {
                        self.refusals.say(&format!("{error}; trying again"));
                        self.trouble = true;
                    }
                }
            }
            if repairing {
                info!(
                    "put {} entries of the kernel right, which others had changed",
                    operations.len()
                );
            }
            debug!("{} operations for {} subnets", operations.len(), desired.len());
        }
        self.refusals.end_round();
        if !self.trouble && desired.is_complete() {
            self.scope.networks.clone_from(&self.lasting);
        }
        Ok(())
    }

    fn list(&mut self) -> Result<(), Error> {
        let routes = self.kernel.routes()?;
        let (neighbours, fdb) = match self.scope.device {
            Some(device) => (self.kernel.neighbours(device)?, self.kernel.fdb(device)?),
            None => Default::default(),
        };
        self.actual = Actual::seen(self.scope.clone(), routes, neighbours, fdb, &self.actual);
        self.believed = true;
        self.listed = true;
        Ok(())
    }

    /// Takes note of what has changed: whether the kernel may not hold any more what it should.
    pub(super) fn notice(&mut self, changes: &[Change]) -> bool {
        for change in changes {
            let (known, concerns_paths) = match change {
                Change::Route { found, gone } => (
                    self.actual.knows_route(found, *gone),
                    !self.actual.concerns(&found.route.to) && self.paths.may_take(&found.route.to),
                ),
                Change::Neighbour { link, address, now } => {
                    (self.actual.knows_neighbour(*link, *address, now.as_ref()), false)
                }
                Change::Fdb { found, gone } => (self.actual.knows_fdb(found, *gone), false),
                // A link that goes down or loses an address takes routes and neighbours along, without a word of each.
                Change::Link { index, .. } | Change::Address { link: index, .. } => {
                    let ours = self.scope.device == Some(*index) || self.actual.uses(*index);
                    // One that is new brings its routes, which are told of.
                    (!ours, self.scope.device != Some(*index) && self.paths.use_link(*index))
                }
                Change::Lost => (false, true),
            };
            self.believed &= known;
            self.paths.stale |= concerns_paths;
        }
        !self.believed || self.paths.stale && !self.paths.known.is_empty()
    }
}

/// What is wrong for as long as it is: said once, and again if it comes back after it was well. Only so many lines a minute:
/// thousands of peers can have the same trouble.
#[derive(Debug, Default)]
pub(super) struct Complaints {
    /// Hashes of the texts, which would take memory.
    said: HashSet<u64>,
    round: HashSet<u64>,
    lines: Lines,
}

impl Complaints {
    /// Whether it is new; it may all the same be one line too many.
    pub(super) fn say(&mut self, text: &str) -> bool {
        // The same text has the same hash for as long as the program runs.
        let hash = {
            let mut hasher = DefaultHasher::new();
            text.hash(&mut hasher);
            hasher.finish()
        };
        let is_new = self.round.insert(hash) && !self.said.contains(&hash);
        if is_new && self.lines.may_say(Instant::now()) {
            warn!("{text}");
        }
        is_new
    }

    /// What was not said since the last end of a round is well again.
    pub(super) fn end_round(&mut self) {
        if let Some(more) = self.lines.sum_up(Instant::now()) {
            warn!("and {more} more of that kind");
        }
        self.said = std::mem::take(&mut self.round);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_complaint_is_new_once_until_it_was_well() {
        let mut complaints = Complaints::default();
        let mut round = |texts: &[&str]| {
            let new = texts.iter().filter(|text| complaints.say(text)).count();
            complaints.end_round();
            new
        };
        assert_eq!(round(&["a", "b", "a"]), 2);
        assert_eq!(round(&["a", "c"]), 1);
        assert_eq!(round(&["b"]), 1);
        assert_eq!(round(&[]), 0);
        assert_eq!(round(&["b"]), 1);
    }
}
