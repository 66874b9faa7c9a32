//! The `vxlan` backend: the kernel's VXLAN device `flannel.<VNI>`, programmed as the original does it. Other hosts may run
//! either.
//!
//! A peer's subnet is routed through the device to an imagined gateway; the gateway's MAC is that of the peer's device, and
//! the forwarding entry of that MAC is the peer's PublicIP. With DirectRouting, peers on the same link get a plain route.

use std::{collections::HashMap, net::IpAddr, time::Duration};

use ipnet::IpNet;
use serde_json::{Value, json};
use tracing::{info, warn};

use super::{
    Backend, Error, LEAST_MTU, Overlays,
    programming::{Complaints, Programming},
    reconcile::Desired,
};
use crate::{
    kernel::{
        self, Kernel, Path,
        entries::Mac,
        external::External,
        monitor::Change,
        vxlan::{VxlanLink, VxlanSpec},
    },
    lease::{record::Lease, watch::Picture},
    network::{self, BackendKind, Network, Vni},
    observe::{board::Report, status::Counts},
    sys::ethtool,
};

/// What a packet grows by: outer IPv4 header without options (20 bytes), UDP header (8), VXLAN header (8, RFC 7348 section
/// 5) and inner Ethernet header (14).
const OVERHEAD: u32 = 50;

/// The device of a network, as the original calls it.
pub(super) fn device_name(vni: Vni) -> String {
    format!("flannel.{vni}")
}

/// The first of the addresses by which a device belongs to one of the overlays.
pub(super) fn overlay_address(addresses: &[IpNet], overlays: &Overlays) -> Option<IpNet> {
    addresses.iter().copied().find(|address| overlays.contain(address))
}

/// The `vxlan` backend.
pub struct Vxlan {
    external: External,
    configuration: network::Vxlan,
    overlays: Overlays,
    name: String,
    mtu: u32,
    /// The device's, and what the lease announces.
    mac: Mac,
    /// The address of the device once there is a lease.
    address: Option<IpNet>,
    /// The device's index while it is known to be as it should be.
    device: Option<u32>,
    /// Whether it was so, by what this daemon knows now: what is put right from then on was changed by others.
    settled: bool,
    programming: Programming,
    complaints: Complaints,
    /// Those that are found by looking at the device, which is not done each time.
    device_complaints: Complaints,
}

impl Vxlan {
    /// Makes the device, or takes over the one that is there: its MAC stands in the lease. `known_as`: the data of this host's lease
    /// as an earlier run has remembered it, so that after the machine's restart the other hosts still know the device.
    ///
    /// # Errors
    /// When the kernel does not let us have the device, or the external MTU is too small.
    pub fn new(
        external: &External,
        configuration: network::Vxlan,
        overlays: &Overlays,
        known_as: Option<&Value>,
    ) -> Result<Self, Error> {
        let new = Mac::random_local();
        let mut vxlan = Self {
            external: external.clone(),
            name: device_name(configuration.vni),
            mtu: overlay_mtu(external, configuration.mtu)?,
            mac: vtep(known_as, configuration.vni, new).unwrap_or(new),
            configuration,
            overlays: overlays.clone(),
            address: None,
            device: None,
            settled: false,
            programming: Programming::new(Kernel::open()?, overlays),
            complaints: Complaints::default(),
            device_complaints: Complaints::default(),
        };
        if let Some(wanted) = vxlan.configuration.mtu.map(u32::from)
            && wanted > external.mtu
        {
            warn!(
                "Backend.MTU is {wanted}, more than the {} of {}: taking that",
                external.mtu, external.name
            );
        }
        // Peers know the device by its MAC.
        if let Some(found) = vxlan.find()? {
            vxlan.refuse_anothers(&found)?;
            vxlan.mac = found.link.mac.unwrap_or(vxlan.mac);
        }
        vxlan.device()?;
        Ok(vxlan)
    }

    fn find(&mut self) -> Result<Option<VxlanLink>, kernel::Error> {
        let links = self.programming.kernel().vxlan_links()?;
        Ok(links.into_iter().find(|device| device.link.name == self.name))
    }

    /// A device with an address of somebody else's overlay is that one's.
    fn refuse_anothers(&self, found: &VxlanLink) -> Result<(), Error> {
        let addresses = &found.link.addresses;
        // An IPv6 address may be the kernel's own doing.
        match addresses.iter().find(|address| address.addr().is_ipv4()) {
            Some(address) if overlay_address(addresses, &self.overlays).is_none() => Err(Error::ForeignDevice {
                name: self.name.clone(),
                address: *address,
                overlay: self.overlays.current,
            }),
            _ => Ok(()),
        }
    }

    fn spec(&self) -> VxlanSpec {
        VxlanSpec {
            name: self.name.clone(),
            vni: self.configuration.vni,
            parent: self.external.index,
            local: self.external.address,
            port: self.configuration.port,
            gbp: self.configuration.gbp,
            learning: self.configuration.learning,
            mtu: self.mtu,
            mac: self.mac,
        }
    }

    /// The device's index; what is not as it should be is put right.
    fn device(&mut self) -> Result<u32, Error> {
        if let Some(index) = self.device {
            return Ok(index);
        }
        let spec = self.spec();
        let found = self.find()?;
        if let Some(found) = found.as_ref().filter(|_| !self.settled) {
            // Two daemons that start at once may both have found it without an address.
            self.refuse_anothers(found)?;
        }
        let (found, made) = match found {
            Some(found) => match difference(&spec, &found) {
                None => (found, false),
                Some(difference) => {
                    info!("making {} anew: {difference}", self.name);
                    self.programming.kernel().remove_link(found.link.index)?;
                    (self.add(&spec)?, true)
                }
            },
            None => (self.add(&spec)?, true),
        };
        let put_right = self.put_right(&found)?;
        if self.settled {
            let changed = if made { vec!["device"] } else { put_right };
            changed
                .into_iter()
                .for_each(|what| self.programming.repairs().count(what));
        }
        let index = found.link.index;
        self.programming.set_device(index);
        self.device = Some(index);
        self.settled = self.address.is_some();
        Ok(index)
    }

    fn add(&mut self, spec: &VxlanSpec) -> Result<VxlanLink, Error> {
        let kernel = self.programming.kernel();
        if let Err(source) = kernel.add_vxlan(spec) {
            let hint = match source.io().raw_os_error() {
                Some(libc::EEXIST) => {
                    let others = kernel.vxlan_links().unwrap_or_default();
                    let other = others
                        .iter()
                        .find(|other| other.vni == spec.vni && other.port == spec.port);
                    match other {
                        Some(other) => format!(
                            "{} has VNI {} and port {} already; remove it, or give this network another Backend.VNI",
                            other.link.name, spec.vni, spec.port
                        ),
                        None => "there is an interface of that name, which is no VXLAN device; remove it".to_owned(),
                    }
                }
                Some(libc::EOPNOTSUPP) => {
                    "this kernel has no VXLAN: run `modprobe vxlan`, or use the udp backend, which needs none"
                        .to_owned()
                }
                Some(libc::ENODEV) => format!("the external interface {} is gone", self.external.name),
                _ => "the kernel refuses".to_owned(),
            };
            return Err(Error::Vxlan {
                name: spec.name.clone(),
                hint,
                source,
            });
        }
        info!(
            "made the device {} on {}, MAC {}",
            spec.name, self.external.name, spec.mac
        );
        self.find()?.ok_or_else(|| Error::VxlanGone(spec.name.clone()))
    }

    /// What can be changed while packets flow; what of it was not as it should be.
    fn put_right(&mut self, found: &VxlanLink) -> Result<Vec<&'static str>, Error> {
        let (index, mac, mtu) = (found.link.index, self.mac, self.mtu);
        let kernel = self.programming.kernel();
        let mut put_right = Vec::new();
        if found.link.mac != Some(mac) {
            // The other hosts send to the one that they know.
            info!("setting the MAC of {} back to {mac}", self.name);
            kernel.set_mac(index, mac)?;
            put_right.push("mac");
        }
        if found.link.mtu != mtu {
            kernel.set_mtu(index, mtu)?;
            put_right.push("mtu");
        }
        if let Some(address) = self.address {
            // First, since the kernel takes all routes and neighbours away with a device's last address.
            if !found.link.addresses.contains(&address) {
                kernel.add_address(index, address)?;
                put_right.push("address");
            }
            for other in &found.link.addresses {
                if *other != address && self.overlays.contain(other) {
                    kernel.remove_address(index, *other)?;
                    put_right.push("address");
                }
            }
        }
        if !found.link.up {
            kernel.set_up(index)?;
            put_right.push("link");
        }
        if !self.configuration.tx_checksum
            && let Err(error) = no_tx_checksum(&self.name)
        {
            self.device_complaints.say(&format!(
                "cannot switch off the checksum offload of {}: {error}",
                self.name
            ));
        }
        self.device_complaints.end_round();
        Ok(put_right)
    }

    fn try_apply(&mut self, picture: &Picture) -> Result<(), Error> {
        let peers = &picture.peers;
        let device = self.device()?;
        let nowhere = HashMap::new();
        let paths = if self.configuration.direct_routing {
            let hosts: Vec<IpAddr> = peers.values().map(|lease| lease.value.public_ip.into()).collect();
            self.programming.paths(&hosts)?
        } else {
            &nowhere
        };
        let mut desired = Desired::new(picture.complete);
        let mut tunnels = Vec::new();
        for lease in peers.values() {
            let (subnet, host) = (IpNet::V4(lease.subnets.v4()), IpAddr::V4(lease.value.public_ip));
            if !self.overlays.current.contains(&subnet) {
                self.complaints.say(&format!(
                    "skipping peer {subnet}: its subnet is not in the overlay {}",
                    self.overlays.current
                ));
                continue;
            }
            if let Some(Some(path)) = paths.get(&host)
                && is_direct(host, path)
            {
                desired.route_directly(subnet, host, path.link);
                continue;
            }
            match vtep(lease.value.backend_data.as_ref(), self.configuration.vni, self.mac) {
                Ok(mac) => tunnels.push((subnet, mac, host, lease.created)),
                Err(reason) => {
                    self.complaints
                        .say(&format!("skipping peer {subnet} at {host}: {reason}"));
                }
            }
        }
        // A MAC is where the older lease says, so that nobody takes a peer's packets by claiming its MAC.
        tunnels.sort_by_key(|(_, _, _, age)| *age);
        let mut places: HashMap<Mac, (IpNet, IpAddr)> = HashMap::new();
        for (subnet, mac, host, age) in tunnels {
            let (other, there) = *places.entry(mac).or_insert((subnet, host));
            if there == host {
                desired.tunnel(subnet, mac, host, age, device);
            } else {
                self.complaints.say(&format!(
                    "skipping peer {subnet} at {host}: its VtepMAC {mac} is that of {other} at {there}, whose lease is the older. If \
                     that one is left over, release it (`flanneld leases release {other}`); if both hosts live, remove the VXLAN \
                     device on one and start flanneld again there"
                ));
            }
        }
        Ok(self.programming.make(&desired)?)
    }
}

/// Whether the host is on a link of ours. What the kernel sends to itself has itself as its source.
fn is_direct(host: IpAddr, path: &Path) -> bool {
    path.gateway.is_none() && path.source != Some(host)
}

/// The MAC of a peer's device, or why it is none.
fn vtep(data: Option<&Value>, vni: Vni, own: Mac) -> Result<Mac, String> {
    let member = |name: &str| {
        let members = data.and_then(Value::as_object)?;
        // As the original reads JSON.
        let mut alike = members.iter().filter(|(key, _)| key.eq_ignore_ascii_case(name));
        alike.next().map(|(_, value)| value).filter(|value| !value.is_null())
    };
    // Older releases did not write it.
    if let Some(theirs) = member("VNI")
        && theirs.as_u64() != Some(vni.get().into())
    {
        return Err(format!("its VNI is {theirs}, this host's is {vni}"));
    }
    let Some(text) = member("VtepMAC") else {
        return Err("its lease has no VtepMAC, the address of its VXLAN device".to_owned());
    };
    let mac: Option<Mac> = text.as_str().and_then(|text| text.parse().ok());
    match mac {
        Some(mac) if mac == own => Err(format!(
            "its VtepMAC {mac} is that of this host's device, perhaps because one is a copy of the other; remove the device \
             on one of them and start flanneld again there"
        )),
        // The lowest bit of the first byte stands for groups of receivers (IEEE 802, I/G).
        Some(mac) if mac.0[0] & 1 == 0 && mac.0 != [0; 6] => Ok(mac),
        _ => Err(format!("its VtepMAC is {text}, which is no device's address")),
    }
}

/// What of the underlay's MTU is left for the packets inside. The device cannot have more than its parent has room for.
fn overlay_mtu(external: &External, configured: Option<u16>) -> Result<u32, Error> {
    let underlay = configured.map_or(external.mtu, |configured| external.mtu.min(configured.into()));
    underlay
        .checked_sub(OVERHEAD)
        .filter(|mtu| *mtu >= LEAST_MTU)
        .ok_or_else(|| Error::Mtu {
            interface: external.name.clone(),
            mtu: underlay,
            least: LEAST_MTU + OVERHEAD,
        })
}

/// What the device has otherwise than it should, of what cannot be changed while it lives.
fn difference(wanted: &VxlanSpec, found: &VxlanLink) -> Option<String> {
    let differs = |what: &str, wanted: String, found: String| {
        (wanted != found).then(|| format!("its {what} is {found} and must be {wanted}"))
    };
    let number = |index: Option<u32>| index.map_or("none".to_owned(), |index| index.to_string());
    differs("VNI", wanted.vni.to_string(), found.vni.to_string())
        .or_else(|| differs("interface", number(Some(wanted.parent)), number(found.parent)))
        .or_else(|| {
            let local = found.local.map_or("none".to_owned(), |local| local.to_string());
            differs("local address", wanted.local.to_string(), local)
        })
        .or_else(|| differs("port", wanted.port.to_string(), found.port.to_string()))
        .or_else(|| differs("GBP", wanted.gbp.to_string(), found.gbp.to_string()))
        .or_else(|| differs("learning", wanted.learning.to_string(), found.learning.to_string()))
}

fn no_tx_checksum(name: &str) -> std::io::Result<()> {
    if ethtool::tx_checksum(name)? {
        ethtool::set_tx_checksum(name, false)?;
        info!("switched off the checksum offload of {name} (TxChecksum: false)");
    }
    Ok(())
}

impl Backend for Vxlan {
    fn kind(&self) -> BackendKind {
        BackendKind::Vxlan
    }

    fn data(&self) -> Option<Value> {
        Some(json!({ "VNI": self.configuration.vni.get(), "VtepMAC": self.mac.to_string() }))
    }

    fn mtu(&self) -> u32 {
        self.mtu
    }

    fn start(&mut self, _: &Network, own: &Lease) -> Result<(), Error> {
        // The subnet's own address, alone: the rest of the subnet is the containers'.
        let address = IpNet::from(IpAddr::V4(own.subnets.v4().network()));
        self.address = Some(address);
        self.device = None;
        self.device()?;
        info!(
            "{} is up: address {address}, MAC {}, MTU {}, VNI {}, UDP {}:{} on {}",
            self.name,
            self.mac,
            self.mtu,
            self.configuration.vni,
            self.external.address,
            self.configuration.port,
            self.external.name,
        );
        Ok(())
    }

    fn apply(&mut self, picture: &Picture) -> Result<(), Error> {
        if let Err(error) = self.try_apply(picture) {
            let reason = match std::error::Error::source(&error) {
                Some(source) => format!("{error}: {source}"),
                None => error.to_string(),
            };
            self.complaints.say(&format!("{reason}; trying again"));
            self.recheck();
            self.programming.note_trouble();
        }
        self.complaints.end_round();
        Ok(())
    }

    fn notice(&mut self, changes: &[Change]) -> bool {
        let device = self.device;
        let touched = |change: &Change| match change {
            Change::Link { index, .. } | Change::Address { link: index, .. } => {
                device == Some(*index) || *index == self.external.index
            }
            Change::Lost => true,
            _ => false,
        };
        if changes.iter().any(touched) {
            self.device = None;
        }
        self.programming.notice(changes) || self.device.is_none()
    }

    fn recheck_after(&self) -> Option<Duration> {
        Some(self.programming.recheck_after())
    }

    fn recheck(&mut self) {
        self.device = None;
        self.programming.distrust();
    }

    fn adapt(&mut self, external: &External) -> Result<(), Error> {
        self.mtu = overlay_mtu(external, self.configuration.mtu)?;
        self.external = external.clone();
        self.settled = false;
        self.recheck();
        Ok(())
    }

    fn count_from(&mut self, before: &Counts) {
        self.programming.repairs().count_from(&before.repairs);
    }

    fn report(&self) -> Option<Report> {
        let repairs = self.programming.repairs();
        Some(repairs.report(self.kind(), Some(self.name.clone()), self.mtu))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: Mac = Mac([2, 0, 0, 0, 0, 1]);

    fn vni(number: u32) -> Vni {
        Vni::new(number).unwrap()
    }

    fn read(json: &str) -> Result<String, String> {
        let data: Value = serde_json::from_str(json).unwrap();
        vtep(Some(&data), vni(1), OWN).map(|mac| mac.to_string())
    }

    #[test]
    fn a_peers_device_is_read_with_and_without_vni_and_with_members_that_are_unknown() {
        let mac = Ok("d2:72:c5:90:ff:8c".to_owned());
        assert_eq!(read(r#"{"VNI":1,"VtepMAC":"d2:72:c5:90:ff:8c"}"#), mac);
        assert_eq!(read(r#"{"VtepMAC":"d2:72:c5:90:ff:8c"}"#), mac);
        assert_eq!(read(r#"{"Extra":[1],"vtepmac":"D2:72:C5:90:FF:8C","vni":1}"#), mac);
    }

    #[test]
    fn a_peer_that_cannot_be_reached_is_skipped_with_the_reason() {
        for (json, part) in [
            (
                r#"{"VNI":2,"VtepMAC":"d2:72:c5:90:ff:8c"}"#,
                "VNI is 2, this host's is 1",
            ),
            (r#"{"VNI":"1","VtepMAC":"d2:72:c5:90:ff:8c"}"#, "VNI is \"1\""),
            (r#"{"VNI":1,"VtepMAC":"d2:72:c5:90:ff"}"#, "\"d2:72:c5:90:ff\""),
            (r#"{"VNI":1,"VtepMAC":"01:00:5e:00:00:01"}"#, "no device's address"),
            (r#"{"VNI":1,"VtepMAC":"00:00:00:00:00:00"}"#, "no device's address"),
            (r#"{"VNI":1,"VtepMAC":7}"#, "VtepMAC is 7"),
            (
                r#"{"VNI":1,"VtepMAC":"02:00:00:00:00:01"}"#,
                "that of this host's device",
            ),
            (r#"{"VNI":1}"#, "no VtepMAC"),
            (r#"{}"#, "no VtepMAC"),
        ] {
            let reason = read(json).unwrap_err();
            assert!(reason.contains(part), "{json}: {reason:?} lacks {part:?}");
        }
        assert!(vtep(None, vni(1), OWN).unwrap_err().contains("no VtepMAC"));
    }

    #[test]
    fn the_overlays_packets_fit_the_interface() {
        let external = |mtu| External {
            index: 2,
            name: "eth0".into(),
            mtu,
            address: "192.0.2.1".parse().unwrap(),
            public_ip: "192.0.2.1".parse().unwrap(),
        };
        assert_eq!(overlay_mtu(&external(1_500), None).unwrap(), 1_450);
        assert_eq!(overlay_mtu(&external(1_500), Some(1_400)).unwrap(), 1_350);
        assert_eq!(overlay_mtu(&external(1_500), Some(9_000)).unwrap(), 1_450);
        assert_eq!(overlay_mtu(&external(118), None).unwrap(), 68);
        let refusal = overlay_mtu(&external(117), None).unwrap_err().to_string();
        assert!(refusal.contains("117") && refusal.contains("118"), "{refusal}");
    }
}
