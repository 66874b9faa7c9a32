//! Blackhole routes: what is sent to a subnet and to no address that has a route of its own is dropped here, and does not
//! leave by the default route.
//!
//! They are the last resort by their metric: a bridge's route to the same subnet comes before them.

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage as Message,
    route::{RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType},
};

use super::{
    Error, Kernel,
    entries::{FoundRoute, PROTOCOL},
    family, gone_is_done, tried,
};

/// The highest, which is the least preferred.
const METRIC: u32 = u32::MAX;

impl Kernel {
    /// The destinations of our blackhole routes in the main table, of both families.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn blackholes(&mut self) -> Result<Vec<IpNet>, Error> {
        let mut found = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let routes = self.main_routes(family)?;
            let ours = routes
                .iter()
                .filter(|route| route.header.kind == RouteType::BlackHole)
                .filter_map(FoundRoute::of)
                .filter(|found| found.protocol == PROTOCOL && found.metric == METRIC);
            found.extend(ours.map(|found| found.route.to));
        }
        Ok(found)
    }

    /// Adds one, unless it is there.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn add_blackhole(&mut self, to: IpNet) -> Result<(), Error> {
        let added = self
            .netlink
            .request(Message::NewRoute(message(to)), NLM_F_CREATE | NLM_F_EXCL);
        match added {
            Err(refusal) if refusal.code() != Some(libc::EEXIST) => {
                Err(tried(format!("cannot add the blackhole route to {to}"))(refusal))
            }
            _ => Ok(()),
        }
    }

    /// Removes one, if it is there.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn remove_blackhole(&mut self, to: IpNet) -> Result<(), Error> {
        gone_is_done(self.netlink.request(Message::DelRoute(message(to)), 0))
            .map_err(tried(format!("cannot remove the blackhole route to {to}")))
    }
}

fn message(to: IpNet) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header = RouteHeader {
        address_family: family(to.addr()),
        destination_prefix_length: to.prefix_len(),
        table: RouteHeader::RT_TABLE_MAIN,
        protocol: RouteProtocol::from(PROTOCOL),
        scope: RouteScope::Universe,
        kind: RouteType::BlackHole,
        ..RouteHeader::default()
    };
    message
        .attributes
        .push(RouteAttribute::Destination(to.network().into()));
    message.attributes.push(RouteAttribute::Priority(METRIC));
    message
}
