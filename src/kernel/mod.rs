//! The kernel's networking configuration over rtnetlink: links and addresses here; routes, neighbours and forwarding
//! entries ([`entries`]); VXLAN devices ([`vxlan`]); what changes in it ([`monitor`]); and which interface faces the other
//! hosts ([`external`]).
//!
//! Calls block; each takes microseconds, with thousands of entries milliseconds. Nothing here runs the `ip` command.

mod blackhole;
pub mod entries;
pub mod external;
pub mod monitor;
mod netlink;
pub mod vxlan;

use std::{
    collections::HashMap,
    fs, io,
    net::{IpAddr, Ipv4Addr},
};

use ipnet::{IpNet, Ipv4Net};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage as Message,
    address::{AddressAttribute, AddressMessage},
    link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage},
    route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType},
};

use entries::Mac;
use netlink::{Answer, Netlink, Refusal};

/// A handle on the kernel's configuration of the network namespace in which it was opened.
#[derive(Debug)]
pub struct Kernel {
    netlink: Netlink,
}

/// A network interface and its addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Interface index.
    pub index: u32,
    /// Interface name.
    pub name: String,
    /// In bytes.
    pub mtu: u32,
    /// Administratively up.
    pub up: bool,
    /// The loopback interface.
    pub loopback: bool,
    /// Its Ethernet address; `None` for what has none, such as a TUN device.
    pub mac: Option<Mac>,
    /// In the kernel's order, so that the primary address comes first.
    pub addresses: Vec<IpNet>,
}

/// How the kernel sends to some destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Path {
    /// Index of the interface that it leaves by.
    pub link: u32,
    /// The router on the way; `None`: the destination is on the link itself.
    pub gateway: Option<IpAddr>,
    /// The source address it takes.
    pub source: Option<IpAddr>,
}

/// Why the kernel refused.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}{}", .reason.as_ref().map(|words| format!(" ({words})")).unwrap_or_default())]
pub struct Error {
    what: String,
    source: io::Error,
    /// The kernel's own words.
    reason: Option<String>,
}

impl Error {
    /// The system's error.
    pub fn io(&self) -> &io::Error {
        &self.source
    }
}

/// Whether this process has `CAP_NET_ADMIN`, without which it can neither make a device nor configure one. `true` where
/// that cannot be told: the kernel has the last word.
pub fn may_administer() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    net_admin(&status).unwrap_or(true)
}

/// Whether `CAP_NET_ADMIN` is among the effective capabilities, by `/proc/<pid>/status` (proc_pid_status(5)).
fn net_admin(status: &str) -> Option<bool> {
    // capabilities(7), linux/capability.h
    const CAP_NET_ADMIN: u64 = 1 << 12;
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    let effective = u64::from_str_radix(effective.trim(), 16).ok()?;
    Some(effective & CAP_NET_ADMIN != 0)
}

impl Kernel {
    /// # Errors
    /// When the kernel gives no netlink socket.
    pub fn open() -> Result<Self, Error> {
        Netlink::open()
            .map(|netlink| Self { netlink })
            .map_err(tried("cannot open a netlink socket"))
    }

    /// The number that notifications of what was done through this handle bear: see [`monitor::Monitor::ignore`].
    pub fn port(&self) -> u32 {
        self.netlink.port()
    }

    /// All interfaces with their addresses, by index.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn links(&mut self) -> Result<Vec<Link>, Error> {
        let replies = self
            .netlink
            .dump(Message::GetLink(LinkMessage::default()))
            .map_err(tried("cannot list the network interfaces"))?;
        let mut links: Vec<Link> = replies
            .iter()
            .filter_map(|reply| match reply {
                Message::NewLink(message) => Some(link_of(message)),
                _ => None,
            })
            .collect();
        links.sort_by_key(|link| link.index);
        self.add_addresses(links.iter_mut())?;
        Ok(links)
    }

    /// The IPv4 addresses of all interfaces, with the lengths of their networks.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn ipv4_addresses(&mut self) -> Result<Vec<Ipv4Net>, Error> {
        let links = self.links()?;
        let all = links.into_iter().flat_map(|link| link.addresses);
        Ok(all
            .filter_map(|net| match net {
                IpNet::V4(net) => Some(net),
                IpNet::V6(_) => None,
            })
            .collect())
    }

    /// Looks up the addresses of `links`.
    fn add_addresses<'a>(&mut self, links: impl Iterator<Item = &'a mut Link>) -> Result<(), Error> {
        let replies = self
            .netlink
            .dump(Message::GetAddress(AddressMessage::default()))
            .map_err(tried("cannot list the addresses of the network interfaces"))?;
        let mut by_link: HashMap<u32, Vec<IpNet>> = HashMap::new();
        let addresses = replies.iter().filter_map(|reply| match reply {
            Message::NewAddress(message) => address_of(message),
            _ => None,
        });
        for (index, address) in addresses {
            by_link.entry(index).or_default().push(address);
        }
        for link in links {
            link.addresses = by_link.remove(&link.index).unwrap_or_default();
        }
        Ok(())
    }

    /// How many packets the device `name` could not queue for whoever reads them (`tx_dropped`).
    ///
    /// # Errors
    /// `ENODEV` when there is no such device.
    pub fn dropped(&mut self, name: &str) -> Result<u64, Error> {
        let what = || format!("cannot read the statistics of {name}");
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        let replies = self
            .netlink
            .request(Message::GetLink(message), 0)
            .map_err(tried(what()))?;
        replies
            .into_iter()
            .find_map(|reply| {
                let Message::NewLink(link) = reply else { return None };
                link.attributes.into_iter().find_map(|attribute| match attribute {
                    LinkAttribute::Stats64(stats) => Some(stats.tx_dropped),
                    _ => None,
                })
            })
            .ok_or_else(|| tried(what())(io::Error::other("the kernel's answer holds none")))
    }

    /// How the kernel would send to `destination`, by its routing policy.
    ///
    /// # Errors
    /// `ENETUNREACH` when it has no route.
    pub fn path_to(&mut self, destination: IpAddr) -> Result<Path, Error> {
        let what = || format!("cannot find a route to {destination}");
        let replies = self.netlink.request(lookup(destination), 0).map_err(tried(what()))?;
        replies
            .iter()
            .find_map(path_of)
            .ok_or_else(|| tried(what())(io::Error::other("the kernel's answer names no interface")))
    }

    /// How the kernel would send to each of `destinations`, in order; `None`: it has no route, or one that forbids it.
    ///
    /// # Errors
    /// As the kernel says; not for destinations without a route.
    pub fn paths(&mut self, destinations: &[IpAddr]) -> Result<Vec<Option<Path>>, Error> {
        let what = "cannot look up the routes to the other hosts";
        let answers = self
            .netlink
            .batch(destinations.iter().map(|destination| (lookup(*destination), 0)))
            .map_err(tried(what))?;
        answers
            .into_iter()
            .map(|answer| match answer {
                Ok(replies) => Ok(replies.iter().find_map(path_of)),
                Err(refusal) => match refusal.code() {
                    // No route; or an unreachable, prohibit or blackhole route, in this order.
                    Some(libc::ENETUNREACH | libc::EHOSTUNREACH | libc::EACCES | libc::EINVAL) => Ok(None),
                    _ => Err(tried(what)(refusal)),
                },
            })
            .collect()
    }

    /// The interface of the IPv4 default route with the lowest metric, if there is one.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn default_route(&mut self) -> Result<Option<Path>, Error> {
        Ok(self
            .main_routes(AddressFamily::Inet)?
            .into_iter()
            .filter(|route| route.header.destination_prefix_length == 0 && route.header.kind == RouteType::Unicast)
            .min_by_key(|route| {
                route.attributes.iter().find_map(|attribute| match attribute {
                    RouteAttribute::Priority(metric) => Some(*metric),
                    _ => None,
                })
            })
            .and_then(|route| path_of(&Message::NewRoute(route))))
    }

    /// Sets the MTU and the transmit queue's length (packets) of a link and brings it up.
    ///
    /// # Errors
    /// As the kernel says: `EINVAL` for an MTU that the device cannot have, `EPERM` without `CAP_NET_ADMIN`.
    pub fn bring_up(&mut self, index: u32, mtu: u32, queue_length: u32) -> Result<(), Error> {
        let attributes = vec![LinkAttribute::Mtu(mtu), LinkAttribute::TxQueueLen(queue_length)];
        self.set_link(index, LinkFlags::Up, attributes)
            .map_err(tried(format!("cannot bring interface {index} up with MTU {mtu}")))
    }

    /// Adds an address to a link.
    ///
    /// # Errors
    /// As the kernel says; `EEXIST` when it is there already.
    pub fn add_address(&mut self, index: u32, address: IpNet) -> Result<(), Error> {
        let message = Message::NewAddress(address_message(index, address));
        self.netlink
            .request(message, NLM_F_CREATE | NLM_F_EXCL)
            .map(drop)
            .map_err(tried(format!("cannot add the address {address} to interface {index}")))
    }

    /// Takes an address off a link; one that is not there, or whose link is not, is taken off already.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn remove_address(&mut self, index: u32, address: IpNet) -> Result<(), Error> {
        let message = Message::DelAddress(address_message(index, address));
        gone_is_done(self.netlink.request(message, 0)).map_err(tried(format!(
            "cannot take the address {address} off interface {index}"
        )))
    }

    /// Removes a link; one that is not there is removed already.
    ///
    /// # Errors
    /// As the kernel says: `EOPNOTSUPP` for hardware.
    pub fn remove_link(&mut self, index: u32) -> Result<(), Error> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        gone_is_done(self.netlink.request(Message::DelLink(message), 0))
            .map_err(tried(format!("cannot remove interface {index}")))
    }

    /// Sets a link's MTU (bytes).
    ///
    /// # Errors
    /// As the kernel says: `EINVAL` for one that the device cannot have.
    pub fn set_mtu(&mut self, index: u32, mtu: u32) -> Result<(), Error> {
        self.set_link(index, LinkFlags::empty(), vec![LinkAttribute::Mtu(mtu)])
            .map_err(tried(format!("cannot set the MTU of interface {index} to {mtu}")))
    }

    /// Sets a link's Ethernet address.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn set_mac(&mut self, index: u32, mac: Mac) -> Result<(), Error> {
        self.set_link(index, LinkFlags::empty(), vec![LinkAttribute::Address(mac.0.to_vec())])
            .map_err(tried(format!("cannot set the address of interface {index} to {mac}")))
    }

    /// Brings a link up.
    ///
    /// # Errors
    /// As the kernel says: `EADDRINUSE` for a VXLAN device when something else has its UDP port.
    pub fn set_up(&mut self, index: u32) -> Result<(), Error> {
        self.set_link(index, LinkFlags::Up, Vec::new())
            .map_err(tried(format!("cannot bring interface {index} up")))
    }

    /// Switches `flags` on and sets `attributes` of a link.
    fn set_link(&mut self, index: u32, flags: LinkFlags, attributes: Vec<LinkAttribute>) -> Result<(), Refusal> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.header.flags = flags;
        message.header.change_mask = flags;
        message.attributes = attributes;
        self.netlink.request(Message::SetLink(message), 0).map(drop)
    }

    /// Adds the route `destination dev <link>` to the main table.
    ///
    /// # Errors
    /// As the kernel says; `EEXIST` when there is a route to the same destination.
    pub fn add_route(&mut self, destination: IpNet, index: u32) -> Result<(), Error> {
        let mut message = RouteMessage::default();
        message.header = RouteHeader {
            address_family: family(destination.addr()),
            destination_prefix_length: destination.prefix_len(),
            table: RouteHeader::RT_TABLE_MAIN,
            protocol: RouteProtocol::Boot,
            scope: RouteScope::Universe,
            kind: RouteType::Unicast,
            ..RouteHeader::default()
        };
        message
            .attributes
            .push(RouteAttribute::Destination(destination.network().into()));
        message.attributes.push(RouteAttribute::Oif(index));
        self.netlink
            .request(Message::NewRoute(message), NLM_F_CREATE | NLM_F_EXCL)
            .map(drop)
            .map_err(tried(format!(
                "cannot add the route {destination} over interface {index}"
            )))
    }

    /// The index of the link that the main table's route to exactly `destination` leaves by.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn link_of_route(&mut self, destination: IpNet) -> Result<Option<u32>, Error> {
        let wanted = RouteAddress::from(destination.network());
        Ok(self
            .main_routes(family(destination.addr()))?
            .into_iter()
            .filter(|route| route.header.destination_prefix_length == destination.prefix_len())
            .find(|route| route.attributes.contains(&RouteAttribute::Destination(wanted.clone())))
            .and_then(|route| path_of(&Message::NewRoute(route)))
            .map(|path| path.link))
    }

    fn main_routes(&mut self, family: AddressFamily) -> Result<Vec<RouteMessage>, Error> {
        let mut message = RouteMessage::default();
        message.header.address_family = family;
        // What a kernel before 4.20 does not look at.
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        let replies = match self.netlink.dump(Message::GetRoute(message)) {
            // A namespace has no table before its first route.
            Err(refusal) if refusal.code() == Some(libc::ENOENT) => Vec::new(),
            replies => replies.map_err(tried("cannot list the routes"))?,
        };
        Ok(replies
            .into_iter()
            .filter_map(|reply| match reply {
                Message::NewRoute(route)
                    if route.header.table == RouteHeader::RT_TABLE_MAIN && route.header.address_family == family =>
                {
                    Some(route)
                }
                _ => None,
            })
            .collect())
    }
}

impl Link {
    /// The IPv4 address that other hosts know this interface by: its first that is not link-local, else its first.
    pub fn ipv4(&self) -> Option<Ipv4Addr> {
        let mut addresses = self.addresses.iter().filter_map(|net| match net {
            IpNet::V4(net) => Some(net.addr()),
            IpNet::V6(_) => None,
        });
        let first = addresses.clone().next();
        addresses.find(|address| !address.is_link_local()).or(first)
    }

    /// Whether one of its addresses is `address`.
    pub fn has(&self, address: IpAddr) -> bool {
        self.addresses.iter().any(|net| net.addr() == address)
    }
}

fn tried<E: Into<Refusal>>(what: impl Into<String>) -> impl FnOnce(E) -> Error {
    move |refusal| {
        let Refusal { error, reason } = refusal.into();
        Error {
            what: what.into(),
            source: error,
            reason,
        }
    }
}

/// Success, also when what was to be removed is not there: `ESRCH` of routes, `ENOENT` of neighbours and forwarding entries,
/// `EADDRNOTAVAIL` of addresses, `ENODEV` and `ENXIO` when the link is gone with all that was on it.
fn gone_is_done(answer: Answer) -> Result<(), Refusal> {
    match answer {
        Err(refusal)
            if matches!(
                refusal.code(),
                Some(libc::ESRCH | libc::ENOENT | libc::EADDRNOTAVAIL | libc::ENODEV | libc::ENXIO)
            ) =>
        {
            Ok(())
        }
        answer => answer.map(drop),
    }
}

fn address_message(index: u32, address: IpNet) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(address.addr());
    message.header.prefix_len = address.prefix_len();
    message.header.index = index;
    message.attributes.push(AddressAttribute::Local(address.addr()));
    message.attributes.push(AddressAttribute::Address(address.addr()));
    message
}

fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    }
}

/// Asks for the route to one address.
fn lookup(destination: IpAddr) -> Message {
    let mut message = RouteMessage::default();
    message.header.address_family = family(destination);
    message.header.destination_prefix_length = if destination.is_ipv4() { 32 } else { 128 };
    message.attributes.push(RouteAttribute::Destination(destination.into()));
    Message::GetRoute(message)
}

fn link_of(message: &LinkMessage) -> Link {
    let flags = message.header.flags;
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        mtu: 0,
        up: flags.contains(LinkFlags::Up),
        loopback: flags.contains(LinkFlags::Loopback),
        mac: None,
        addresses: Vec::new(),
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Address(address) if message.header.link_layer_type == LinkLayerType::Ether => {
                link.mac = Mac::of(address);
            }
            _ => {}
        }
    }
    link
}

fn address_of(message: &AddressMessage) -> Option<(u32, IpNet)> {
    // IFA_LOCAL is this end's address of a point-to-point link, where IFA_ADDRESS is the other end's; IPv6 has only the
    // latter unless there is a peer (if_addr.h).
    let mut address = None;
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(local) => address = Some(*local),
            AddressAttribute::Address(other) => address = address.or(Some(*other)),
            _ => {}
        }
    }
    let net = IpNet::new(address?, message.header.prefix_len).ok()?;
    Some((message.header.index, net))
}

fn path_of(message: &Message) -> Option<Path> {
    let Message::NewRoute(message) = message else {
        return None;
    };
    let source = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::PrefSource(address) => entries::ip_of(address),
        _ => None,
    });
    let hop = entries::first_hop(message)?;
    Some(Path {
        link: hop.link,
        gateway: hop.via,
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_capability_is_read_from_the_processs_status() {
        assert_eq!(net_admin("Name:\tx\nCapEff:\t000001ffffffffff\n"), Some(true));
        assert_eq!(net_admin("CapEff:\t0000000000001000\n"), Some(true));
        assert_eq!(
            net_admin("CapPrm:\t0000000000001000\nCapEff:\t000001ffffffefff\n"),
            Some(false)
        );
        assert_eq!(net_admin("Name:\tx\n"), None);
    }
}
