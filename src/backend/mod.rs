//! Backends: how packets get from one host's subnet to another's.
//!
//! A [`Backend`] is level-triggered: it is given the whole set of peers, compares it with what is there and fixes the
//! difference. [`udp`] carries the packets itself, with the [engine](crate::engine).

pub mod udp;
mod udp_report;

use std::io;

use crate::{
    kernel,
    lease::{record::Lease, watch::PeerSet},
    network::{BackendKind, Network},
    observe::board::Report,
};

/// Whether this version has the backend; a daemon refuses a configuration with another.
pub fn carries(kind: BackendKind) -> bool {
    kind == BackendKind::Udp
}

/// A way of carrying packets between hosts.
pub trait Backend: Send {
    /// Its type, as this host's lease announces it.
    fn kind(&self) -> BackendKind;

    /// The largest packet in bytes that containers may send (`FLANNEL_MTU`).
    fn mtu(&self) -> u32;

    /// Sets up the device for this host's lease; no peers yet.
    ///
    /// # Errors
    /// When the kernel refuses; what was set up till then goes with the backend.
    fn start(&mut self, network: &Network, own: &Lease) -> Result<(), Error>;

    /// Makes `peers` reachable, and none besides.
    ///
    /// # Errors
    /// When the kernel refuses.
    fn apply(&mut self, peers: &PeerSet) -> Result<(), Error>;

    /// What tells of the backend's doings, from any thread, also when the backend is gone; once it has started.
    fn report(&self) -> Option<Report>;
}

/// Why a backend cannot work.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The tunnel's port is not to be had.
    #[error("cannot bind the tunnel's UDP socket to {address}: {hint}")]
    Bind {
        /// External address and configured port.
        address: std::net::SocketAddr,
        /// What to do.
        hint: &'static str,
        /// As the system says.
        source: io::Error,
    },
    /// The device cannot be made.
    #[error("cannot make the TUN device {pattern}: {hint}")]
    Tun {
        /// The name asked for.
        pattern: &'static str,
        /// What to do.
        hint: &'static str,
        /// As the system says.
        source: io::Error,
    },
    /// The MTU leaves no room for packets.
    #[error("the MTU {mtu} of interface {interface} is too small: it must be at least {least}")]
    Mtu {
        /// The external interface.
        interface: String,
        /// Its MTU in bytes.
        mtu: u32,
        /// The least that works.
        least: u32,
    },
    /// The overlay's route is taken.
    #[error(
        "cannot route the overlay {network} into {device}: there is a route to it already, through {other}. Another \
         overlay or a daemon of another backend uses the same network: stop it, or remove the route with `ip route del \
         {network}`"
    )]
    RouteTaken {
        /// The whole overlay.
        network: ipnet::IpNet,
        /// Our device.
        device: String,
        /// The device that has the route.
        other: String,
    },
    /// The overlay's route is taken by the underlay's own.
    #[error(
        "the overlay {network} is the very network that interface {interface} is in, so packets to other hosts would never \
         leave: give the overlay a block that no host is in (`flanneld network set`)"
    )]
    OverlayIsUnderlay {
        /// The whole overlay.
        network: ipnet::IpNet,
        /// The external interface.
        interface: String,
    },
    /// The engine does not start.
    #[error("cannot start the packet engine")]
    Engine(#[source] io::Error),
    /// The kernel refuses.
    #[error(transparent)]
    Kernel(#[from] kernel::Error),
}
