//! What this host holds: its lease as it is known to be, shared by those that change it (the watch, the keeper, a new
//! PublicIP) and those that want to know (the board, the memory on disk).

use std::time::Duration;

use tokio::sync::watch::{Receiver, Sender};

use super::{
    acquire::{Own, SUBNET_TTL},
    record::Lease,
};
use crate::sys::boot::uptime;

/// The lease at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// What stands in the registry, as far as is known.
    pub lease: Lease,
    /// When it runs out unless it is renewed, by the time since the machine started: leases run out while it sleeps, too. `None`: it
    /// is a reservation.
    pub expires: Option<Duration>,
    /// Whether the registry has said so in this run. Not so after a start from what was [remembered](super::remembered), until
    /// the registry answers.
    pub confirmed: bool,
}

impl Held {
    /// How long it has.
    pub fn left(&self) -> Option<Duration> {
        self.expires.map(|expires| expires.saturating_sub(uptime()))
    }
}

/// This host's lease. Clones share it.
#[derive(Debug, Clone)]
pub struct Holding(Sender<Held>);

impl Holding {
    /// `own`, as just taken (`confirmed`) or remembered.
    pub fn new(own: Own, confirmed: bool) -> Self {
        Self(Sender::new(Held {
            expires: own.left.map(in_so_long),
            lease: own.lease,
            confirmed,
        }))
    }

    /// This moment.
    pub fn now(&self) -> Held {
        self.0.borrow().clone()
    }

    /// Tells of changes from now on.
    pub fn subscribe(&self) -> Receiver<Held> {
        self.0.subscribe()
    }

    /// The registry says this of it.
    pub fn found(&self, lease: Lease) {
        self.0.send_if_modified(|held| {
            let changed = !held.confirmed || held.lease != lease;
            if held.lease.ttl != lease.ttl {
                // A new one has a day. What others have bound it to is found out when it is refreshed.
                held.expires = lease.ttl.map(|_| in_so_long(SUBNET_TTL));
            }
            held.lease = lease;
            held.confirmed = true;
            changed
        });
    }

    /// It has this long now.
    pub fn renewed(&self, left: Duration) {
        self.0.send_modify(|held| held.expires = Some(in_so_long(left)));
    }
}

fn in_so_long(left: Duration) -> Duration {
    // etcd takes any number of seconds.
    uptime().saturating_add(left)
}
