//! What changes in the kernel's configuration, as it happens.

use std::{io, net::IpAddr};

use ipnet::IpNet;
use netlink_packet_core::NetlinkPayload;
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage as Message,
    address::AddressMessage,
    link::LinkMessage,
    neighbour::NeighbourMessage,
    route::{RouteFlags, RouteHeader, RouteMessage},
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use tokio::io::{Interest, unix::AsyncFd};

use super::{
    Kernel, address_of,
    entries::{FoundFdbEntry, FoundNeighbour, FoundRoute, neighbour_address},
    link_of,
    netlink::{DATAGRAM, Messages, Received, receive},
};

/// The groups of notifications that we read (linux/rtnetlink.h, `RTNLGRP_*`); FDB entries come with the neighbours.
const GROUPS: [u32; 6] = [
    libc::RTNLGRP_LINK,
    libc::RTNLGRP_NEIGH,
    libc::RTNLGRP_IPV4_IFADDR,
    libc::RTNLGRP_IPV4_ROUTE,
    libc::RTNLGRP_IPV6_IFADDR,
    libc::RTNLGRP_IPV6_ROUTE,
];

/// Half of what waiting notifications are charged to the receive buffer, because the kernel doubles the value set
/// (socket(7)). Some 1,000 bytes each, so that a thousand changes may come between two calls; more are told as
/// [`Change::Lost`]. The kernel grants less where `net.core.rmem_max` is less.
const RECEIVE_BUFFER: usize = 512 * 1024;

/// How many changes one call gathers before it returns, so that a stream of changes that never ends does not keep its reader
/// from acting on it.
const AT_ONCE: usize = 1_024;

/// Reads the kernel's notifications in the network namespace in which it was opened.
#[derive(Debug)]
pub struct Monitor {
    socket: AsyncFd<Socket>,
    ignored: Option<u32>,
    buffer: Vec<u8>,
}

/// Something that has changed. It may have changed again since.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// A link was made, went up or down, was renamed, got another MTU or address; or any of its other properties changed.
    /// When a link goes down the kernel removes its routes and neighbours, some of them without a word.
    Link {
        /// Interface index.
        index: u32,
        /// Interface name.
        name: String,
        /// Administratively up.
        up: bool,
        /// In bytes.
        mtu: u32,
        /// The link is no more.
        gone: bool,
    },
    /// An address was added or removed.
    Address {
        /// Interface index.
        link: u32,
        /// The address, with the length of its prefix.
        address: IpNet,
        /// It is no more.
        gone: bool,
    },
    /// A route of the main table was added (it may have taken the place of another with the same destinations and metric,
    /// of which nothing is said) or removed.
    Route {
        /// The route, of any kind: the link is 0 for a `blackhole` and the like.
        found: FoundRoute,
        /// It is no more.
        gone: bool,
    },
    /// A neighbour was added, removed or has changed.
    Neighbour {
        /// Interface index.
        link: u32,
        /// The neighbour's address.
        address: IpAddr,
        /// What is known of it now; `None`: it is no more, or its Ethernet address is not known any more.
        now: Option<FoundNeighbour>,
    },
    /// A forwarding entry of a VXLAN device was added, changed or removed.
    Fdb {
        /// The entry.
        found: FoundFdbEntry,
        /// It is no more.
        gone: bool,
    },
    /// Notifications were lost, or not understood: anything may have changed, up to now.
    Lost,
}

impl Monitor {
    /// Begins to listen: what changes from now on is told. Must be called within tokio's runtime.
    ///
    /// # Errors
    /// When the kernel gives no netlink socket.
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.set_rx_buf_sz(RECEIVE_BUFFER as libc::c_int)?;
        socket.bind_auto()?;
        // Only the kernel may send here.
        socket.connect(&SocketAddr::new(0, 0))?;
        socket.set_non_blocking(true)?;
        for group in GROUPS {
            socket.add_membership(group)?;
        }
        // Its successor is unsafe, because a type may give a descriptor that it does not own; this one owns it.
        #[allow(deprecated)]
        let socket = AsyncFd::with_interest(socket, Interest::READABLE)?;
        Ok(Self {
            socket,
            ignored: None,
            buffer: Vec::with_capacity(DATAGRAM),
        })
    }

    /// Leaves out what is done through `kernel`, as far as the kernel says who did it: it does of routes and of neighbours
    /// that are put, not of neighbours that are removed nor of forwarding entries.
    pub fn ignore(&mut self, kernel: &Kernel) {
        self.ignored = Some(kernel.port());
    }

    /// Waits for changes; at least one, in the order in which they happened. Cancel-safe: nothing is lost when the future is
    /// dropped.
    ///
    /// # Errors
    /// As recv(2), when the socket is not usable any more.
    pub async fn next(&mut self) -> io::Result<Vec<Change>> {
        loop {
            let mut ready = self.socket.readable().await?;
            let mut changes = Vec::new();
            let mut lost = false;
            // Nothing awaits from here on.
            while lost || changes.len() < AT_ONCE {
                self.buffer.clear();
                match receive(self.socket.get_ref(), &mut self.buffer) {
                    // What is in the buffer is older than what was lost.
                    Ok(()) if lost => {}
                    Ok(()) => {
                        changes.extend(Messages(&self.buffer).filter_map(|message| change(message, self.ignored)));
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        ready.clear_ready();
                        break;
                    }
                    Err(error) if is_loss(&error) => lost = true,
                    Err(error) => return Err(error),
                }
            }
            // Only now: until the buffer was empty once, the kernel went on dropping without saying so again
            // (netlink_overrun(), `NETLINK_S_CONGESTED`).
            if lost {
                return Ok(vec![Change::Lost]);
            }
            if !changes.is_empty() {
                return Ok(changes);
            }
        }
    }
}

/// Whether only notifications are gone: the receive buffer was full (netlink(7)), or one was too long for ours.
fn is_loss(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENOBUFS) || error.kind() == io::ErrorKind::InvalidData
}

/// What a notification tells; `None`: nothing that matters here.
fn change(Received { header, payload }: Received, ignored: Option<u32>) -> Option<Change> {
    if Some(header.port_number) == ignored {
        return None;
    }
    let message = match payload {
        Some(NetlinkPayload::InnerMessage(message)) => message,
        Some(_) => return None,
        None => return Some(Change::Lost),
    };
    match &message {
        Message::NewLink(link) => link_change(link, false),
        Message::DelLink(link) => link_change(link, true),
        Message::NewAddress(address) => address_change(address, false),
        Message::DelAddress(address) => address_change(address, true),
        Message::NewRoute(route) => route_change(route, false),
        Message::DelRoute(route) => route_change(route, true),
        Message::NewNeighbour(neighbour) => neighbour_change(neighbour, false),
        Message::DelNeighbour(neighbour) => neighbour_change(neighbour, true),
        _ => None,
    }
}

fn link_change(message: &LinkMessage, gone: bool) -> Option<Change> {
    // Of another family is what a bridge tells of its ports: its RTM_DELLINK means that the link has left the bridge.
    if message.header.interface_family != AddressFamily::Unspec {
        return None;
    }
    let link = link_of(message);
    Some(Change::Link {
        index: link.index,
        name: link.name,
        up: link.up,
        mtu: link.mtu,
        gone,
    })
}

fn address_change(message: &AddressMessage, gone: bool) -> Option<Change> {
    let (link, address) = address_of(message)?;
    Some(Change::Address { link, address, gone })
}

fn route_change(message: &RouteMessage, gone: bool) -> Option<Change> {
    if message.header.table != RouteHeader::RT_TABLE_MAIN || message.header.flags.contains(RouteFlags::Cloned) {
        return None;
    }
    let found = FoundRoute::of(message)?;
    Some(Change::Route { found, gone })
}

fn neighbour_change(message: &NeighbourMessage, gone: bool) -> Option<Change> {
    if message.header.family == AddressFamily::Bridge {
        let found = FoundFdbEntry::of(message)?;
        return Some(Change::Fdb { found, gone });
    }
    Some(Change::Neighbour {
        link: message.header.ifindex,
        address: neighbour_address(message)?,
        now: FoundNeighbour::of(message).filter(|_| !gone),
    })
}
