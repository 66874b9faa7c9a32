//! The TUN device, made anew or as an earlier process has left it, and its place in the kernel: its addresses and the overlay's
//! route into it.

use std::{io, os::fd::OwnedFd};

use ipnet::IpNet;
use tracing::{info, warn};

use super::{
    Error,
    repairs::Repairs,
    udp::{DEVICE, Options, TunMode},
};
use crate::{
    engine::DEVICE_QUEUE,
    kernel::{self, Kernel, external::External},
    lease::record::Lease,
    network::Network,
    sys::tun::{self, Tun, TunOffload},
};

/// Makes the device, with so many queues: by the plain path, with one queue, where the fast one is refused.
pub(super) fn open(options: &Options, queues: usize) -> Result<(Tun, TunOffload), Error> {
    let none = |device| (device, TunOffload::None);
    let opened = match options.tun {
        TunMode::Plain => tun::open_plain(DEVICE).map(none),
        TunMode::Auto => {
            let opened = if options.offload {
                tun::open_offload(DEVICE, queues)
            } else {
                tun::open_multi_queue(DEVICE, queues).map(none)
            };
            opened.or_else(|error| {
                if error.raw_os_error() != Some(libc::EINVAL) {
                    return Err(error);
                }
                warn!("the kernel refuses a TUN device with several queues ({error}): using one queue and one worker");
                tun::open_plain(DEVICE).map(none)
            })
        }
    };
    opened.map_err(|source| Error::Tun {
        pattern: DEVICE,
        hint: match source.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
                "there is no TUN driver here: run `modprobe tun`, or give the container /dev/net/tun"
            }
            Some(libc::EPERM | libc::EACCES) => "run as root, or with CAP_NET_ADMIN",
            _ => "the system refuses",
        },
        source,
    })
}

/// The device whose queues an earlier process has left, with `wanted` queues and all that they hold.
///
/// # Errors
/// Why it does not fit, with the device's index if it is there.
pub(super) fn adopt(
    kernel: &mut Kernel,
    queues: Vec<OwnedFd>,
    options: &Options,
    wanted: usize,
    own: &Lease,
) -> Result<(Tun, TunOffload), (String, Option<u32>)> {
    let mut device = Tun::adopt(queues).map_err(|error| (format!("it is gone: {error}"), None))?;
    let links = kernel.links().map_err(|error| (error.to_string(), None))?;
    let Some(link) = links.iter().find(|link| link.name == device.name) else {
        return Err((format!("{} is not in this network namespace", device.name), None));
    };
    let misfit = |why: String| Err((why, Some(link.index)));
    let plain = options.tun == TunMode::Plain;
    if plain == device.multi_queue {
        return misfit("--tun is another now".to_owned());
    }
    if device.has_headers() != (options.offload && !plain) {
        return misfit("--offload is another now".to_owned());
    }
    // The link-local address is the kernel's own doing.
    let foreign = link.addresses.iter().find(|address| match address {
        IpNet::V6(v6) if v6.addr().is_unicast_link_local() => false,
        address => !own.subnets.nets().any(|net| own_address(net) == **address),
    });
    if let Some(address) = foreign {
        return misfit(format!(
            "it has the address {address}, and this host's subnet is {}",
            own.subnets.to_cidrs()
        ));
    }
    device.queues.truncate(wanted);
    while device.queues.len() < wanted {
        if let Err(error) = device.add_queue() {
            return misfit(format!("it gets no more queues: {error}"));
        }
    }
    let offload = if device.has_headers() {
        match device.set_most_offload() {
            Some(offload) => offload,
            None => return misfit("it refuses all offloads".to_owned()),
        }
    } else {
        TunOffload::None
    };
    Ok((device, offload))
}

/// Gives the device its addresses, as far as it has not got them, brings it up and routes the overlay into it; its index.
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
    let link = links.iter().find(|link| link.name == name);
    let link = link.ok_or_else(|| Error::Tun {
        pattern: DEVICE,
        hint: "it was removed in the moment in which it was made",
        source: io::ErrorKind::NotFound.into(),
    })?;
    let index = link.index;
    kernel.bring_up(index, mtu, DEVICE_QUEUE)?;
    for address in own.subnets.nets().map(own_address) {
        if !link.addresses.contains(&address) {
            kernel.add_address(index, address)?;
        }
    }
    for overlay in overlays(network) {
        kernel.add_route(overlay, index).or_else(|error| {
            if error.io().raw_os_error() != Some(libc::EEXIST) {
                return Err(error.into());
            }
            let other = kernel.link_of_route(overlay)?;
            if other == Some(index) {
                return Ok(());
            }
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
