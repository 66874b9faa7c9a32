//! What the kernel is programmed with to reach the other hosts: routes, neighbours and the forwarding entries of VXLAN
//! devices; as plain values, listed as they are found and changed in batches.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage as Message,
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState},
    route::{
        RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
        RouteVia,
    },
};

use super::{Error, Kernel, family, gone_is_done, tried};

/// Our number as the originator of routes and neighbours, by which we know our own again: `proto 85` in `ip route` and
/// `ip neigh`. One of those that the kernel leaves to routing daemons (rtnetlink(7), `rtm_protocol`) and that
/// iproute2 has no name for; UDP port 8285 is flannel's.
pub const PROTOCOL: u8 = 85;

/// An Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Mac(pub [u8; 6]);

/// A route: `<to> [via <via>] dev <link> [onlink]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Route {
    /// The destinations; without host bits.
    pub to: IpNet,
    /// The next hop; `None`: the destinations are on the link itself.
    pub via: Option<IpAddr>,
    /// Index of the interface.
    pub link: u32,
    /// The next hop is on the link, whatever the host's addresses say.
    pub onlink: bool,
}

/// A route of the main table, as found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FoundRoute {
    /// With several next hops, that of the first. The link is 0 where there is none (`blackhole`, `unreachable`).
    pub route: Route,
    /// Who made it: [`PROTOCOL`] are we, 2 the kernel, 3 `ip route`.
    pub protocol: u8,
    /// The lowest is taken among routes to the same destinations. 0 if none was given, with IPv6 1024.
    pub metric: u32,
    /// It has several next hops.
    pub multipath: bool,
}

/// A neighbour: `<address> dev <link> lladdr <mac>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Neighbour {
    /// Index of the interface.
    pub link: u32,
    /// The neighbour's address.
    pub address: IpAddr,
    /// Its Ethernet address.
    pub mac: Mac,
}

/// A neighbour whose Ethernet address is known, as found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FoundNeighbour {
    /// The entry.
    pub neighbour: Neighbour,
    /// Who made it: [`PROTOCOL`] are we, 0 says nothing.
    pub protocol: u8,
    /// It was configured, not learned.
    pub permanent: bool,
}

/// A forwarding entry of a VXLAN device: `<mac> dst <to> self`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FdbEntry {
    /// Index of the VXLAN device.
    pub link: u32,
    /// Frames to this address ..
    pub mac: Mac,
    /// .. are sent to this host.
    pub to: IpAddr,
}

/// A forwarding entry, as found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FoundFdbEntry {
    /// The entry.
    pub entry: FdbEntry,
    /// It was configured, not learned, and leads there as ours do: by the device's own port, VNI and choice of interface.
    pub permanent: bool,
}

/// One change; [`Kernel::apply`] makes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operation {
    /// Adds a route with [`PROTOCOL`] and no metric to the main table; replaces that to the same destinations with the same
    /// metric, whoever made it, without a moment in which there is none.
    PutRoute(Route),
    /// Removes the route if its protocol is [`PROTOCOL`].
    RemoveRoute(Route),
    /// Removes the route with the protocol and metric found.
    RemoveFoundRoute(FoundRoute),
    /// Adds or replaces the permanent entry of this address, with [`PROTOCOL`].
    PutNeighbour(Neighbour),
    /// Removes the entry of this address, whatever its MAC and protocol.
    RemoveNeighbour(Neighbour),
    /// Adds a permanent entry, or changes where the frames to this MAC go.
    PutFdb(FdbEntry),
    /// Removes the entry if frames to this MAC go there.
    RemoveFdb(FdbEntry),
}

impl Kernel {
    /// The unicast routes of the main table, IPv4 first.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn routes(&mut self) -> Result<Vec<FoundRoute>, Error> {
        let mut routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let found = self.main_routes(family)?;
            let unicast = found.iter().filter(|route| route.header.kind == RouteType::Unicast);
            routes.extend(unicast.filter_map(FoundRoute::of));
        }
        Ok(routes)
    }

    /// The neighbours on a link whose Ethernet address is known. None if there is no such link.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn neighbours(&mut self, link: u32) -> Result<Vec<FoundNeighbour>, Error> {
        let mut message = NeighbourMessage::default();
        message.attributes.push(NeighbourAttribute::IfIndex(link));
        let replies = self
            .netlink
            .dump(Message::GetNeighbour(message))
            .map_err(tried(format!("cannot list the neighbours on interface {link}")))?;
        Ok(replies
            .iter()
            .filter_map(|reply| match reply {
                Message::NewNeighbour(message) => FoundNeighbour::of(message),
                _ => None,
            })
            .filter(|found| found.neighbour.link == link)
            .collect())
    }

    /// The forwarding entries of a VXLAN device. None if there is no such link.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn fdb(&mut self, link: u32) -> Result<Vec<FoundFdbEntry>, Error> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Bridge;
        message.header.ifindex = link;
        let what = || format!("cannot list the forwarding entries of interface {link}");
        let replies = match self.netlink.dump(Message::GetNeighbour(message)) {
            Err(refusal) if refusal.code() == Some(libc::ENODEV) => Vec::new(),
            replies => replies.map_err(tried(what()))?,
        };
        Ok(replies
            .iter()
            .filter_map(|reply| match reply {
                Message::NewNeighbour(message) => FoundFdbEntry::of(message),
                _ => None,
            })
            .filter(|found| found.entry.link == link)
            .collect())
    }

    /// Makes the changes in the order given; the outcome of each. What fails does not keep the others from being tried.
    /// Removing what is not there succeeds.
    ///
    /// # Errors
    /// When it is not known what has been done: list what there is, and begin anew.
    pub fn apply(&mut self, operations: &[Operation]) -> Result<Vec<Result<(), Error>>, Error> {
        let what = "cannot tell whether the kernel has taken all changes of routes";
        let requests = operations.iter().map(Operation::request);
        let mut answers = self.netlink.batch(requests).map_err(tried(what))?;
        for (operation, answer) in operations.iter().zip(&mut answers) {
            // The very route is there, but behind another one to the same destinations, as `ip route append` makes them:
            // the kernel does not move it to the front.
            if let Operation::PutRoute(route) = operation
                && answer
                    .as_ref()
                    .is_err_and(|refusal| refusal.code() == Some(libc::EEXIST))
            {
                let again = [Operation::RemoveRoute(*route), *operation];
                let again = self.netlink.batch(again.iter().map(Operation::request));
                *answer = again.map_err(tried(what))?.pop().unwrap_or_else(|| Ok(Vec::new()));
            }
        }
        Ok(operations
            .iter()
            .zip(answers)
            .map(|(operation, answer)| {
                let outcome = if operation.removes() {
                    gone_is_done(answer)
                } else {
                    answer.map(drop)
                };
                outcome.map_err(|refusal| tried(format!("cannot {operation}"))(refusal))
            })
            .collect())
    }
}

impl Operation {
    fn removes(&self) -> bool {
        match self {
            Self::PutRoute(_) | Self::PutNeighbour(_) | Self::PutFdb(_) => false,
            Self::RemoveRoute(_) | Self::RemoveFoundRoute(_) | Self::RemoveNeighbour(_) | Self::RemoveFdb(_) => true,
        }
    }

    /// The message, and its flags besides `NLM_F_REQUEST`.
    fn request(&self) -> (Message, u16) {
        let put = NLM_F_CREATE | NLM_F_REPLACE;
        match *self {
            Self::PutRoute(route) => {
                // As `ip route`: without a next hop the destinations are not beyond the link.
                let scope = route.via.map_or(RouteScope::Link, |_| RouteScope::Universe);
                (Message::NewRoute(route.message(PROTOCOL, scope)), put)
            }
            // For removal, "nowhere" stands for any scope (fib_table_delete()).
            Self::RemoveRoute(route) => (Message::DelRoute(route.message(PROTOCOL, RouteScope::NoWhere)), 0),
            Self::RemoveFoundRoute(found) => {
                let mut message = found.route.message(found.protocol, RouteScope::NoWhere);
                message.attributes.push(RouteAttribute::Priority(found.metric));
                (Message::DelRoute(message), 0)
            }
            Self::PutNeighbour(neighbour) => (Message::NewNeighbour(neighbour.message()), put),
            Self::RemoveNeighbour(neighbour) => (Message::DelNeighbour(neighbour.message()), 0),
            Self::PutFdb(entry) => (Message::NewNeighbour(entry.message()), put),
            Self::RemoveFdb(entry) => (Message::DelNeighbour(entry.message()), 0),
        }
    }
}

/// The end of "cannot ..".
impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PutRoute(route) => write!(f, "add the route {route}"),
            Self::RemoveRoute(route) => write!(f, "remove the route {route}"),
            Self::RemoveFoundRoute(found) => write!(f, "remove the route {}", found.route),
            Self::PutNeighbour(neighbour) => write!(f, "add the neighbour {neighbour}"),
            Self::RemoveNeighbour(neighbour) => write!(f, "remove the neighbour {neighbour}"),
            Self::PutFdb(entry) => write!(f, "add the forwarding entry {entry}"),
            Self::RemoveFdb(entry) => write!(f, "remove the forwarding entry {entry}"),
        }
    }
}

impl Route {
    fn message(&self, protocol: u8, scope: RouteScope) -> RouteMessage {
        let mut message = RouteMessage::default();
        message.header = RouteHeader {
            address_family: family(self.to.addr()),
            destination_prefix_length: self.to.prefix_len(),
            table: RouteHeader::RT_TABLE_MAIN,
            protocol: RouteProtocol::from(protocol),
            scope,
            kind: RouteType::Unicast,
            flags: if self.onlink {
                RouteFlags::Onlink
            } else {
                RouteFlags::empty()
            },
            ..RouteHeader::default()
        };
        let attributes = &mut message.attributes;
        attributes.push(RouteAttribute::Destination(self.to.network().into()));
        match self.via {
            Some(via) if via.is_ipv4() == self.to.addr().is_ipv4() => {
                attributes.push(RouteAttribute::Gateway(via.into()))
            }
            Some(IpAddr::V4(via)) => attributes.push(RouteAttribute::Via(RouteVia::Inet(via))),
            Some(IpAddr::V6(via)) => attributes.push(RouteAttribute::Via(RouteVia::Inet6(via))),
            None => {}
        }
        attributes.push(RouteAttribute::Oif(self.link));
        message
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.to)?;
        if let Some(via) = self.via {
            write!(f, " via {via}")?;
        }
        write!(f, " over interface {}", self.link)
    }
}

impl FoundRoute {
    /// Any route of the main table.
    pub(super) fn of(message: &RouteMessage) -> Option<Self> {
        let header = &message.header;
        let unspecified: IpAddr = match header.address_family {
            AddressFamily::Inet => Ipv4Addr::UNSPECIFIED.into(),
            AddressFamily::Inet6 => Ipv6Addr::UNSPECIFIED.into(),
            _ => return None,
        };
        let (mut to, mut metric, mut multipath) = (unspecified, 0, false);
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Destination(address) => to = ip_of(address)?,
                RouteAttribute::Priority(number) => metric = *number,
                RouteAttribute::MultiPath(hops) => multipath = hops.len() > 1,
                _ => {}
            }
        }
        let hop = first_hop(message).unwrap_or_default();
        Some(Self {
            route: Route {
                to: IpNet::new(to, header.destination_prefix_length).ok()?,
                via: hop.via,
                link: hop.link,
                onlink: hop.onlink,
            },
            protocol: header.protocol.into(),
            metric,
            multipath,
        })
    }
}

/// Where a route leads to.
#[derive(Debug, Default)]
pub(super) struct Hop {
    pub(super) link: u32,
    pub(super) via: Option<IpAddr>,
    onlink: bool,
}

/// The next hop of a route, the first if it has several; `None` if it leads nowhere.
pub(super) fn first_hop(message: &RouteMessage) -> Option<Hop> {
    let several = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::MultiPath(hops) => hops.first(),
        _ => None,
    });
    let (link, onlink, attributes) = match several {
        Some(hop) => {
            let onlink = u32::from(hop.flags.bits()) & RouteFlags::Onlink.bits() != 0;
            (Some(hop.interface_index), onlink, &hop.attributes)
        }
        None => {
            let link = message.attributes.iter().find_map(|attribute| match attribute {
                RouteAttribute::Oif(index) => Some(*index),
                _ => None,
            });
            let onlink = message.header.flags.contains(RouteFlags::Onlink);
            (link, onlink, &message.attributes)
        }
    };
    let via = attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Gateway(address) => ip_of(address),
        RouteAttribute::Via(RouteVia::Inet(address)) => Some((*address).into()),
        RouteAttribute::Via(RouteVia::Inet6(address)) => Some((*address).into()),
        _ => None,
    });
    Some(Hop {
        link: link?,
        via,
        onlink,
    })
}

pub(super) fn ip_of(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}

impl Neighbour {
    fn message(&self) -> NeighbourMessage {
        let mut message = NeighbourMessage::default();
        message.header.family = family(self.address);
        message.header.ifindex = self.link;
        message.header.state = NeighbourState::Permanent;
        message.attributes = vec![
            NeighbourAttribute::Destination(self.address.into()),
            NeighbourAttribute::LinkLayerAddress(self.mac.0.to_vec()),
            NeighbourAttribute::Protocol(PROTOCOL.into()),
        ];
        message
    }
}

impl fmt::Display for Neighbour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { link, address, mac } = self;
        write!(f, "{address} with the address {mac} on interface {link}")
    }
}

impl FoundNeighbour {
    pub(super) fn of(message: &NeighbourMessage) -> Option<Self> {
        let (address, mac) = (neighbour_address(message)?, neighbour_mac(message)?);
        let protocol = message.attributes.iter().find_map(|attribute| match attribute {
            NeighbourAttribute::Protocol(protocol) => Some(u8::from(*protocol)),
            _ => None,
        });
        // Those that only answer for others (`ip neigh add proxy`) are another list.
        if message.header.flags.contains(NeighbourFlags::Proxy) {
            return None;
        }
        Some(Self {
            neighbour: Neighbour {
                link: message.header.ifindex,
                address,
                mac,
            },
            protocol: protocol.unwrap_or(0),
            permanent: is_permanent(message),
        })
    }
}

/// Whom a neighbour message of IPv4 or IPv6 is about.
pub(super) fn neighbour_address(message: &NeighbourMessage) -> Option<IpAddr> {
    message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => Some((*address).into()),
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => Some((*address).into()),
        _ => None,
    })
}

/// The state is a set of bits: `bridge fdb add` sets `NUD_NOARP` besides.
fn is_permanent(message: &NeighbourMessage) -> bool {
    u16::from(message.header.state) & u16::from(NeighbourState::Permanent) != 0
}

fn neighbour_mac(message: &NeighbourMessage) -> Option<Mac> {
    message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::LinkLayerAddress(bytes) => Mac::of(bytes),
        _ => None,
    })
}

impl FdbEntry {
    fn message(&self) -> NeighbourMessage {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Bridge;
        message.header.ifindex = self.link;
        message.header.state = NeighbourState::Permanent;
        // `self`: the device's own table and not that of a bridge that it is a port of.
        message.header.flags = NeighbourFlags::Own;
        message.attributes = vec![
            NeighbourAttribute::LinkLayerAddress(self.mac.0.to_vec()),
            NeighbourAttribute::Destination(self.to.into()),
        ];
        message
    }
}

impl fmt::Display for FdbEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "of {} to {} on interface {}", self.mac, self.to, self.link)
    }
}

impl FoundFdbEntry {
    /// `None` for other than VXLAN's: a bridge's entries lead to no host.
    pub(super) fn of(message: &NeighbourMessage) -> Option<Self> {
        let header = &message.header;
        if header.family != AddressFamily::Bridge || !header.flags.contains(NeighbourFlags::Own) {
            return None;
        }
        let to = message.attributes.iter().find_map(|attribute| match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => ip_from(bytes),
            _ => None,
        })?;
        // The kernel tells of them only where they differ from the device's.
        let by_another_way = message.attributes.iter().any(|attribute| {
            use NeighbourAttribute::{IfIndex, Port, Vni};
            matches!(attribute, Port(_) | Vni(_) | IfIndex(_))
        });
        Some(Self {
            entry: FdbEntry {
                link: header.ifindex,
                mac: neighbour_mac(message)?,
                to,
            },
            permanent: is_permanent(message) && !by_another_way,
        })
    }
}

/// An address of either family by its bytes.
fn ip_from(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}

impl Mac {
    /// A new one, random and locally administered (the second lowest bit of the first byte is set), for one station (the
    /// lowest is not): IEEE 802, 8.2.
    pub fn random_local() -> Self {
        use std::hash::{BuildHasher, RandomState};
        // The standard library seeds its hash maps from the system's random numbers.
        let [_, _, mut bytes @ ..] = RandomState::new().hash_one(0).to_be_bytes();
        bytes[0] = bytes[0] & !1 | 2;
        Self(bytes)
    }

    /// `None` for the addresses of other than Ethernet, which are of other lengths.
    pub(super) fn of(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// Why a text is no Ethernet address.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is not an Ethernet address, which has the form d2:72:c5:90:ff:8c")]
pub struct NotAMac(String);

impl FromStr for Mac {
    type Err = NotAMac;

    /// Six numbers of one or two hexadecimal digits, separated by colons.
    fn from_str(text: &str) -> Result<Self, NotAMac> {
        let mut mac = Self([0; 6]);
        let mut parts = text.split(':');
        let good = mac.0.iter_mut().all(|byte| {
            parts
                .next()
                .filter(|part| (1..=2).contains(&part.len()) && part.bytes().all(|digit| digit.is_ascii_hexdigit()))
                .and_then(|part| u8::from_str_radix(part, 16).ok())
                .map(|number| *byte = number)
                .is_some()
        });
        if good && parts.next().is_none() {
            Ok(mac)
        } else {
            Err(NotAMac(text.to_owned()))
        }
    }
}

#[cfg(test)]
mod tests {
    use netlink_packet_core::{Emitable, Parseable};

    use super::*;

    const MAC: Mac = Mac([0xd2, 0x72, 0xc5, 0x90, 0xff, 0x8c]);

    fn bytes(message: &impl Emitable) -> Vec<u8> {
        let mut bytes = vec![0; message.buffer_len()];
        message.emit(&mut bytes);
        bytes
    }

    /// An attribute: length with its header, kind, value.
    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let length = 4 + value.len() as u16;
        let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
        bytes.extend_from_slice(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn a_mac_is_written_as_it_is_read() {
        assert_eq!(MAC.to_string(), "d2:72:c5:90:ff:8c");
        assert_eq!("D2:72:c5:90:FF:8c".parse::<Mac>().unwrap(), MAC);
        assert_eq!("2:0:0:0:0:1".parse::<Mac>().unwrap(), Mac([2, 0, 0, 0, 0, 1]));
        for wrong in [
            "",
            "d2:72:c5:90:ff",
            "d2:72:c5:90:ff:8c:01",
            "d2:72:c5:90:ff:+8",
            "d2:72:c5:90:ff:08c",
            "d272.c590.ff8c",
        ] {
            let error = wrong.parse::<Mac>().unwrap_err().to_string();
            assert!(error.starts_with(&format!("`{wrong}` is not")), "{error}");
        }
    }

    #[test]
    fn a_random_mac_is_local_and_of_one_station() {
        let macs: std::collections::BTreeSet<Mac> = (0..100).map(|_| Mac::random_local()).collect();
        assert_eq!(macs.len(), 100);
        assert!(macs.iter().all(|mac| mac.0[0] & 3 == 2));
    }

    #[test]
    fn a_route_is_the_bytes_that_ip_route_sends() {
        let route = Route {
            to: "10.5.2.0/24".parse().unwrap(),
            via: Some("10.5.2.0".parse().unwrap()),
            link: 7,
            onlink: true,
        };
        let (Message::NewRoute(message), flags) = Operation::PutRoute(route).request() else {
            panic!()
        };
        assert_eq!(flags, NLM_F_CREATE | NLM_F_REPLACE);
        // struct rtmsg: family, lengths of destination and source, tos, table, protocol, scope, type; flags.
        let mut expected = vec![2, 24, 0, 0, 254, PROTOCOL, 0, 1];
        expected.extend_from_slice(&4u32.to_ne_bytes());
        expected.extend(attribute(1, &[10, 5, 2, 0]));
        expected.extend(attribute(5, &[10, 5, 2, 0]));
        expected.extend(attribute(4, &7u32.to_ne_bytes()));
        assert_eq!(bytes(&message), expected);
        let found = FoundRoute::of(&RouteMessage::parse(&expected[..]).unwrap()).unwrap();
        let ours = FoundRoute {
            route,
            protocol: PROTOCOL,
            metric: 0,
            multipath: false,
        };
        assert_eq!(found, ours);

        // Removal names the protocol, so that nobody else's is hit, and any scope.
        let (Message::DelRoute(message), 0) = Operation::RemoveRoute(route).request() else {
            panic!()
        };
        assert_eq!(bytes(&message)[..8], [2, 24, 0, 0, 254, PROTOCOL, 255, 1]);
    }

    #[test]
    fn the_first_of_several_next_hops_is_told() {
        let hop = |via: [u8; 4], link: u32, flags: u8| {
            let gateway = attribute(5, &via);
            let mut bytes = (8 + gateway.len() as u16).to_ne_bytes().to_vec();
            bytes.extend_from_slice(&[flags, 0]);
            bytes.extend_from_slice(&link.to_ne_bytes());
            bytes.extend(gateway);
            bytes
        };
        let mut message = vec![2, 0, 0, 0, 254, 3, 0, 1, 0, 0, 0, 0];
        message.extend(attribute(6, &20u32.to_ne_bytes()));
        message.extend(attribute(
            9,
            &[hop([192, 0, 2, 1], 3, 4), hop([192, 0, 2, 2], 4, 0)].concat(),
        ));
        let found = FoundRoute::of(&RouteMessage::parse(&message[..]).unwrap()).unwrap();
        let first = FoundRoute {
            route: Route {
                to: "0.0.0.0/0".parse().unwrap(),
                via: Some("192.0.2.1".parse().unwrap()),
                link: 3,
                onlink: true,
            },
            protocol: 3,
            metric: 20,
            multipath: true,
        };
        assert_eq!(found, first);
    }

    #[test]
    fn neighbours_and_forwarding_entries_are_told_apart() {
        // struct ndmsg: family and padding, link, state, flags, type.
        let header = |family: u8, flags: u8| {
            let mut bytes = vec![family, 0, 0, 0];
            bytes.extend_from_slice(&7u32.to_ne_bytes());
            bytes.extend_from_slice(&0x80u16.to_ne_bytes());
            bytes.extend_from_slice(&[flags, 0]);
            bytes
        };
        let neighbour = Neighbour {
            link: 7,
            address: "10.5.2.0".parse().unwrap(),
            mac: MAC,
        };
        let expected = [
            header(2, 0),
            attribute(1, &[10, 5, 2, 0]),
            attribute(2, &MAC.0),
            attribute(12, &[PROTOCOL]),
        ]
        .concat();
        assert_eq!(bytes(&neighbour.message()), expected);
        let parsed = NeighbourMessage::parse(&expected[..]).unwrap();
        let found = FoundNeighbour {
            neighbour,
            protocol: PROTOCOL,
            permanent: true,
        };
        assert_eq!(
            (FoundNeighbour::of(&parsed), FoundFdbEntry::of(&parsed)),
            (Some(found), None)
        );

        for to in ["192.0.2.1", "2001:db8::1"].map(|to| to.parse::<IpAddr>().unwrap()) {
            let entry = FdbEntry { link: 7, mac: MAC, to };
            let octets = match to {
                IpAddr::V4(to) => to.octets().to_vec(),
                IpAddr::V6(to) => to.octets().to_vec(),
            };
            let expected = [header(7, 2), attribute(2, &MAC.0), attribute(1, &octets)].concat();
            assert_eq!(bytes(&entry.message()), expected);
            let parsed = NeighbourMessage::parse(&expected[..]).unwrap();
            let found = FoundFdbEntry { entry, permanent: true };
            assert_eq!(
                (FoundNeighbour::of(&parsed), FoundFdbEntry::of(&parsed)),
                (None, Some(found))
            );
        }
        // Changed by someone to another port (NDA_PORT, 6).
        let ip = [192, 0, 2, 1];
        let moved = [
            header(7, 2),
            attribute(2, &MAC.0),
            attribute(1, &ip),
            attribute(6, &9_999_u16.to_be_bytes()),
        ]
        .concat();
        let found = FoundFdbEntry::of(&NeighbourMessage::parse(&moved[..]).unwrap()).unwrap();
        assert_eq!((found.entry.to, found.permanent), (ip.into(), false));
        // Of a bridge: no host behind it.
        let learned = [header(7, 4), attribute(2, &MAC.0)].concat();
        assert_eq!(FoundFdbEntry::of(&NeighbourMessage::parse(&learned[..]).unwrap()), None);
    }
}
