//! The TUN device's place in the kernel: its addresses and the overlay's route into it.

use std::io;

use ipnet::IpNet;
use tracing::info;

use super::{Error, repairs::Repairs, udp::DEVICE};
use crate::{
    kernel::{self, Kernel, external::External},
    lease::record::Lease,
    network::Network,
};

/// Packets that may wait for a worker. The kernel's 500 for TUN devices is less than what one TCP stream sends in the time
/// that a worker is off its processor; 1,000 is what Ethernet devices have.
const DEVICE_QUEUE: u32 = 1_000;

/// Gives the device its addresses, brings it up and routes the overlay into it; its index.
pub(super) fn configure(
    kernel: &mut Kernel,
    name: &str,
    mtu: u32,
    external: &External,
    network: &Network,
    own: &Lease,
) -> Result<u32, Error> {
    let links = kernel.links()?;
    let name_of = |index| {
        links
            .iter()
            .find(|link| link.index == index)
            .map_or("?", |link| link.name.as_str())
    };
    let index = links
        .iter()
        .find(|link| link.name == name)
        .map(|link| link.index)
        .ok_or_else(|| Error::Tun {
            pattern: DEVICE,
            hint: "it was removed in the moment in which it was made",
            source: io::ErrorKind::NotFound.into(),
        })?;
    kernel.bring_up(index, mtu, DEVICE_QUEUE)?;
    for net in own.subnets.nets() {
        kernel.add_address(index, own_address(net))?;
    }
    for overlay in overlays(network) {
        kernel.add_route(overlay, index).or_else(|error| {
            if error.io().raw_os_error() != Some(libc::EEXIST) {
                return Err(error.into());
            }
            let other = kernel.link_of_route(overlay)?;
            // To remove that route would cut the host off.
            if other == Some(external.index) {
                return Err(Error::OverlayIsUnderlay {
                    network: overlay,
                    interface: external.name.clone(),
                });
            }
            Err(Error::RouteTaken {
                network: overlay,
                device: name.to_owned(),
                other: other.map_or("?", name_of).to_owned(),
            })
        })?;
    }
    Ok(index)
}

/// Puts back what others have taken from the device `index`; what that was is counted. Whether the device is there at all.
///
/// # Errors
/// As the kernel says.
pub(super) fn put_right(
    kernel: &mut Kernel,
    index: u32,
    name: &str,
    mtu: u32,
    network: &Network,
    own: &Lease,
    repairs: &Repairs,
) -> Result<bool, kernel::Error> {
    let links = kernel.links()?;
    let Some(link) = links.iter().find(|link| link.index == index) else {
        return Ok(false);
    };
    let mut put_right = Vec::new();
    if !link.up || link.mtu != mtu {
        kernel.bring_up(link.index, mtu, DEVICE_QUEUE)?;
        put_right.push("link");
    }
    for address in own.subnets.nets().map(own_address) {
        if !link.addresses.contains(&address) {
            kernel.add_address(link.index, address)?;
            put_right.push("address");
        }
    }
    for overlay in overlays(network) {
        // Another's route to the same place was put there on purpose.
        if kernel.link_of_route(overlay)?.is_none() {
            kernel.add_route(overlay, link.index)?;
            put_right.push("route");
        }
    }
    if !put_right.is_empty() {
        info!(
            "put {} of {name} right, which others had changed",
            put_right.join(" and ")
        );
        put_right.into_iter().for_each(|what| repairs.count(what));
    }
    Ok(true)
}

/// The subnet's own address, alone: the rest of the subnet is the containers'.
fn own_address(subnet: IpNet) -> IpNet {
    IpNet::from(subnet.network())
}

/// What is routed into the device.
fn overlays(network: &Network) -> impl Iterator<Item = IpNet> {
    let v4 = network.ipv4().map(|plan| IpNet::V4(plan.network()));
    let v6 = network.ipv6().map(|plan| IpNet::V6(plan.network()));
    v4.into_iter().chain(v6)
}
