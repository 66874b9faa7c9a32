//! VXLAN devices: what there is, and making new ones.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr},
};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::{
    RouteNetlinkMessage as Message,
    link::{
        AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkInfo, LinkMessage,
    },
};
use tracing::warn;

use super::{Error, Kernel, Link, entries::Mac, link_of, tried};
use crate::network::Vni;

/// A device to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VxlanSpec {
    /// `flannel.<VNI>`
    pub name: String,
    /// The network's number.
    pub vni: Vni,
    /// Index of the interface that faces the other hosts.
    pub parent: u32,
    /// The address that this host sends from.
    pub local: Ipv4Addr,
    /// The UDP port, of every host.
    pub port: u16,
    /// Carry the group policy (the packet's mark).
    pub gbp: bool,
    /// Let the device learn where addresses live.
    pub learning: bool,
    /// In bytes.
    pub mtu: u32,
    /// The device's Ethernet address. udev leaves a device alone whose address was given when it was made.
    pub mac: Mac,
}

/// A device that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VxlanLink {
    /// The device as an interface.
    pub link: Link,
    /// The network's number.
    pub vni: Vni,
    /// Index of the interface that it sends by, if that is fixed.
    pub parent: Option<u32>,
    /// The address that it sends from, if that is fixed.
    pub local: Option<IpAddr>,
    /// The UDP port that it receives on and sends to.
    pub port: u16,
    /// It carries the group policy.
    pub gbp: bool,
    /// It learns where addresses live.
    pub learning: bool,
}

impl Kernel {
    /// All VXLAN devices of the namespace, by index; those of a single network each (not `external`).
    ///
    /// # Errors
    /// As the kernel says.
    pub fn vxlan_links(&mut self) -> Result<Vec<VxlanLink>, Error> {
        // The kernel filters by the kind, unless it does not know VXLAN at all.
        let mut message = LinkMessage::default();
        message
            .attributes
            .push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Vxlan)]));
        let replies = self
            .netlink
            .dump(Message::GetLink(message))
            .map_err(tried("cannot list the VXLAN devices"))?;
        let mut links: Vec<VxlanLink> = replies
            .iter()
            .filter_map(|reply| match reply {
                Message::NewLink(message) => vxlan_of(message),
                _ => None,
            })
            .collect();
        links.sort_by_key(|vxlan| vxlan.link.index);
        self.add_addresses(links.iter_mut().map(|vxlan| &mut vxlan.link))?;
        Ok(links)
    }

    /// Makes a VXLAN device without any address of its own, also an IPv6 one. It is not up yet.
    ///
    /// # Errors
    /// As the kernel says: `EEXIST` when there is a device of that name, or one of the same VNI and port that this one would
    /// take packets from; `EOPNOTSUPP` when the kernel has no VXLAN; `ENODEV` when the parent is gone; `EINVAL` when the
    /// parent's MTU does not allow this one's.
    pub fn add_vxlan(&mut self, spec: &VxlanSpec) -> Result<(), Error> {
        let name = &spec.name;
        self.netlink
            .request(Message::NewLink(spec.message()), NLM_F_CREATE | NLM_F_EXCL)
            .map_err(tried(format!(
                "cannot make the VXLAN device {name} with VNI {} and UDP port {}",
                spec.vni, spec.port
            )))?;
        // Refusals of the following do no harm: where IPv6 is off there are no addresses anyway, and router advertisements
        // can reach a device only from a host that floods them.
        let mut quiet = LinkMessage::default();
        quiet.attributes = vec![
            LinkAttribute::IfName(name.clone()),
            LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(
                In6AddrGenMode::None,
            )])]),
        ];
        let no_addresses = self.netlink.request(Message::SetLink(quiet), 0);
        let no_advertisements = fs::write(format!("/proc/sys/net/ipv6/conf/{name}/accept_ra"), "0");
        let no_addresses = no_addresses.map(drop).map_err(|refusal| refusal.error);
        for (what, outcome) in [("addrgenmode", no_addresses), ("accept_ra", no_advertisements)] {
            match outcome {
                Err(error) if !without_ipv6(&error) => warn!("cannot switch off IPv6's {what} on {name}: {error}"),
                _ => {}
            }
        }
        Ok(())
    }
}

/// Whether the device has no IPv6 state: IPv6 is off, or the MTU is below 1280.
fn without_ipv6(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
        || matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP))
}

impl VxlanSpec {
    fn message(&self) -> LinkMessage {
        let mut data = vec![
            InfoVxlan::Id(self.vni.get()),
            InfoVxlan::Link(self.parent),
            InfoVxlan::Local(self.local),
            InfoVxlan::Port(self.port),
            InfoVxlan::Learning(self.learning),
        ];
        if self.gbp {
            data.push(InfoVxlan::Gbp);
        }
        let mut message = LinkMessage::default();
        message.attributes = vec![
            LinkAttribute::IfName(self.name.clone()),
            LinkAttribute::Mtu(self.mtu),
            LinkAttribute::Address(self.mac.0.to_vec()),
            LinkAttribute::LinkInfo(vec![
                LinkInfo::Kind(InfoKind::Vxlan),
                LinkInfo::Data(InfoData::Vxlan(data)),
            ]),
        ];
        message
    }
}

fn vxlan_of(message: &LinkMessage) -> Option<VxlanLink> {
    let data = message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => infos.iter().find_map(|info| match info {
            LinkInfo::Data(InfoData::Vxlan(data)) => Some(data),
            _ => None,
        }),
        _ => None,
    })?;
    // The kernel's words for "none": no parent is 0 or left out, no local address is left out.
    let mut vxlan = VxlanLink {
        link: link_of(message),
        vni: Vni::new(0)?,
        parent: None,
        local: None,
        port: 0,
        gbp: false,
        learning: false,
    };
    for info in data {
        match info {
            InfoVxlan::Id(number) => vxlan.vni = Vni::new(*number)?,
            InfoVxlan::Link(index) => vxlan.parent = Some(*index).filter(|index| *index != 0),
            InfoVxlan::Local(address) => vxlan.local = Some((*address).into()),
            InfoVxlan::Local6(address) => vxlan.local = Some((*address).into()),
            InfoVxlan::Port(port) => vxlan.port = *port,
            InfoVxlan::Gbp => vxlan.gbp = true,
            InfoVxlan::Learning(learning) => vxlan.learning = *learning,
            InfoVxlan::CollectMetadata(true) => return None,
            _ => {}
        }
    }
    Some(vxlan)
}

#[cfg(test)]
mod tests {
    use netlink_packet_core::{Emitable, Parseable};

    use super::*;

    #[test]
    fn a_device_is_found_as_it_was_asked_for() {
        for flag in [false, true] {
            let spec = VxlanSpec {
                name: "flannel.1".to_owned(),
                vni: Vni::MAX,
                parent: 3,
                local: Ipv4Addr::new(192, 0, 2, 1),
                port: 8472,
                gbp: flag,
                learning: flag,
                mtu: 1450,
                mac: Mac([2, 0, 0, 0, 0, 1]),
            };
            let message = spec.message();
            let mut bytes = vec![0; message.buffer_len()];
            message.emit(&mut bytes);
            let found = vxlan_of(&LinkMessage::parse(&bytes[..]).unwrap()).unwrap();
            assert_eq!(found.link.name, spec.name);
            assert_eq!(found.link.mtu, spec.mtu);
            assert_eq!((found.vni, found.port), (spec.vni, spec.port));
            assert_eq!((found.parent, found.local), (Some(3), Some(spec.local.into())));
            assert_eq!((found.gbp, found.learning), (flag, flag));
        }
    }

    #[test]
    fn other_devices_are_none() {
        let mut message = LinkMessage::default();
        assert_eq!(vxlan_of(&message), None);
        // One of all networks (`ip link add type vxlan external`).
        let data = vec![InfoVxlan::Id(0), InfoVxlan::CollectMetadata(true)];
        let infos = vec![LinkInfo::Kind(InfoKind::Vxlan), LinkInfo::Data(InfoData::Vxlan(data))];
        message.attributes.push(LinkAttribute::LinkInfo(infos));
        assert_eq!(vxlan_of(&message), None);
    }
}
