//! Leases: which host has which subnet.
//!
//! [`record`] is their form in the registry, [`choose`] picks a free subnet (pure), [`acquire`] takes this host's lease,
//! [`keep`] keeps it, [`republish`] changes what it says, [`watch`] follows everybody's and puts this host's own right,
//! [`screen`] says who of them is a peer,
//! [`holding`] is what all of these know of it, [`remembered`] is that on disk, and [`presence`] guards against two hosts with
//! one PublicIP.

pub mod acquire;
pub mod choose;
mod complaints;
pub mod holding;
pub mod keep;
#[cfg(test)]
mod model;
pub mod presence;
mod publish;
pub mod record;
pub mod remembered;
pub mod republish;
mod restore;
pub mod screen;
pub mod watch;
