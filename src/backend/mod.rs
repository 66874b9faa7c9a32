//! Backends: how packets get from one host's subnet to another's.
//!
//! A [`Backend`] is level-triggered: it is given the whole set of peers, compares it with what is there and fixes the
//! difference. [`udp`] carries the packets itself, with the [engine](crate::engine). [`vxlan`] and [`host_gw`] let the
//! kernel carry them and keep it programmed ([`programming`], [`reconcile`]). What an earlier run has left for another
//! backend is removed at start ([`leftovers`]).

pub mod host_gw;
pub mod leftovers;
pub mod programming;
pub mod reconcile;
mod repairs;
pub mod udp;
mod udp_device;
mod udp_report;
mod udp_sockets;
pub mod vxlan;

use std::{
    io,
    net::Ipv4Addr,
    os::fd::{AsRawFd, OwnedFd},
    time::Duration,
};

use ipnet::IpNet;
use nix::sys::socket::{SockaddrStorage, getsockname};
use serde_json::Value;

use crate::{
    kernel::{self, external::External, monitor::Change},
    lease::{record::Lease, watch::Picture},
    network::{BackendKind, Network},
    observe::{board::Report, status::Counts},
    subnet_file::Previous,
};

/// The least MTU of an IPv4 link (RFC 791).
const LEAST_MTU: u32 = 68;

/// A way of carrying packets between hosts.
pub trait Backend: Send {
    /// Its type, as this host's lease announces it.
    fn kind(&self) -> BackendKind;

    /// What else the lease announces (`BackendData`).
    fn data(&self) -> Option<Value> {
        None
    }

    /// The largest packet in bytes that containers may send (`FLANNEL_MTU`).
    fn mtu(&self) -> u32;

    /// Sets up the device for this host's lease; no peers yet, and packets wait until [`Backend::resume`].
    ///
    /// # Errors
    /// When the kernel refuses; what was set up till then goes with the backend, except what the kernel carries packets by.
    fn start(&mut self, network: &Network, own: &Lease) -> Result<(), Error>;

    /// Carries packets from now on, if it is the backend that does; a second call changes nothing.
    ///
    /// # Errors
    /// When the system does not give what that takes.
    fn resume(&mut self) -> Result<(), Error> {
        Ok(())
    }

    /// Carries no more packets until [`Backend::resume`], if it is the backend that does: those that it has taken are carried to
    /// their end, and all others wait in the kernel.
    fn pause(&mut self) {}

    /// What packets are carried through, for another process to go on with; nothing where the kernel carries them.
    ///
    /// # Errors
    /// Out of descriptors.
    fn descriptors(&self) -> io::Result<Descriptors> {
        Ok(Descriptors::default())
    }

    /// Changes whenever the descriptors are others than before.
    fn generation(&self) -> u64 {
        0
    }

    /// Goes on counting from what the process before has counted; only while no packets are carried.
    fn count_from(&mut self, before: &Counts);

    /// Makes the peers of `picture` reachable, and none besides if these are all; else what the kernel holds for others stays.
    ///
    /// # Errors
    /// When the backend cannot go on. What the kernel refuses for the moment is logged, and tried again.
    fn apply(&mut self, picture: &Picture) -> Result<(), Error>;

    /// Takes note of what has changed in the kernel: whether [`Backend::apply`] has to look at it.
    fn notice(&mut self, changes: &[Change]) -> bool {
        let _ = changes;
        false
    }

    /// How long after an [`apply`](Backend::apply) the kernel is to be [looked at](Backend::recheck) even though it told of
    /// nothing.
    fn recheck_after(&self) -> Option<Duration> {
        None
    }

    /// Believes nothing of what it knew of the kernel: the next `apply` looks for itself.
    fn recheck(&mut self) {}

    /// Goes on with another state of the external interface: another MTU, address or index. An `apply` has to follow.
    ///
    /// # Errors
    /// When it cannot work that way; it goes on as it was, if the error does not say that it has ended.
    fn adapt(&mut self, external: &External) -> Result<(), Error>;

    /// What tells of the backend's doings, from any thread, also when the backend is gone; once it has started. Another one
    /// after an [`adapt`](Backend::adapt).
    fn report(&self) -> Option<Report>;
}

/// What packets are carried through, as descriptors that outlive a process.
#[derive(Debug, Default)]
pub struct Descriptors {
    /// The queues of the TUN device.
    pub queues: Vec<OwnedFd>,
    /// The UDP sockets: those on the tunnel's port first, then those of the other source ports.
    pub sockets: Vec<OwnedFd>,
    /// Whether another process uses them still, and goes on with them if this one does not.
    pub shared: bool,
}

impl Descriptors {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.queues.is_empty() && self.sockets.is_empty()
    }

    /// How many workers they are for: each has a socket on the tunnel's port.
    pub fn workers(&self) -> usize {
        let address = |socket: &OwnedFd| getsockname::<SockaddrStorage>(socket.as_raw_fd()).ok();
        let first = self.sockets.first().and_then(address);
        let of_tunnel = |socket: &&OwnedFd| first.is_some() && address(socket) == first;
        self.sockets.iter().take_while(of_tunnel).count()
    }

    /// Copies of them.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn try_clone(&self) -> io::Result<Self> {
        let copies = |of: &[OwnedFd]| of.iter().map(OwnedFd::try_clone).collect::<io::Result<_>>();
        Ok(Self {
            queues: copies(&self.queues)?,
            sockets: copies(&self.sockets)?,
            shared: self.shared,
        })
    }
}

/// The IPv4 overlays whose routes and devices are this daemon's business: the one that is configured, and the one of the run
/// before, if that was another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Overlays {
    /// The network's.
    pub current: IpNet,
    /// What the subnet file says.
    pub previous: Option<IpNet>,
}

impl Overlays {
    /// `None` for a network without IPv4.
    pub fn new(network: &Network, previous: &Previous) -> Option<Self> {
        let current = IpNet::V4(network.ipv4()?.network());
        let previous = previous.network.map(IpNet::V4);
        Some(Self {
            current,
            previous: previous.filter(|previous| *previous != current),
        })
    }

    /// Both, or the one.
    pub fn all(&self) -> Vec<IpNet> {
        std::iter::once(self.current).chain(self.previous).collect()
    }

    /// Whether the address lies in one of them.
    pub fn contain(&self, address: &IpNet) -> bool {
        self.all().iter().any(|network| network.contains(&address.addr()))
    }
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
    /// The backend carries IPv4 only.
    #[error(
        "the network has EnableIPv6 true, which the {0} backend does not carry: set EnableIPv6 to false, or use Backend.Type \
         udp, which carries both"
    )]
    DualStack(BackendKind),
    /// IPv4 is switched off.
    #[error("the network has EnableIPv4 false: the {0} backend needs an IPv4 network")]
    NoIpv4(BackendKind),
    /// The peers' routes lead to an address that the interface does not have.
    #[error(
        "PublicIP {public_ip} is not the address {address} of interface {interface}: with the host-gw backend the other hosts \
         route straight to the interface, so leave --public-ip out, or name the interface that has it with --iface"
    )]
    NotTheInterfaces {
        /// What the lease would announce.
        public_ip: Ipv4Addr,
        /// What the interface has.
        address: Ipv4Addr,
        /// The external interface.
        interface: String,
    },
    /// The VXLAN device cannot be made.
    #[error("cannot make the device {name}: {hint}")]
    Vxlan {
        /// Its name.
        name: String,
        /// What to do.
        hint: String,
        /// As the kernel says.
        source: kernel::Error,
    },
    /// The VXLAN device was removed again at once.
    #[error(
        "the device {0} was removed in the moment in which it was made: something else manages it; exempt it there"
    )]
    VxlanGone(String),
    /// The VXLAN device belongs to someone else.
    #[error(
        "the device {name} has the address {address} and so belongs to another overlay than {overlay}: give this network \
         another Backend.VNI, or remove the device with `ip link del {name}` if nothing uses it any more"
    )]
    ForeignDevice {
        /// Its name.
        name: String,
        /// The address that tells.
        address: IpNet,
        /// The network's.
        overlay: IpNet,
    },
    /// What another daemon has handed over does not fit.
    #[error(
        "cannot go on with the running flanneld's TUN device: {0}. It goes on by itself; to change that, stop it and start this \
         one without --handover"
    )]
    Misfit(String),
    /// The engine does not start.
    #[error("cannot start the packet engine")]
    Engine(#[source] io::Error),
    /// The kernel refuses.
    #[error(transparent)]
    Kernel(#[from] kernel::Error),
}
