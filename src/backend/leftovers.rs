//! What an earlier run has left in the kernel and the present backend has no use for: the device of a `vxlan` network that
//! has now another VNI or another backend, and the routes of the backends that let the kernel carry the packets.
//!
//! Those backends leave everything in place when they end, so that a restart breaks no flow; so whoever comes next clears
//! away. Only this overlay's: another daemon's on the same host stays untouched.

use ipnet::IpNet;
use tracing::info;

use super::{
    Overlays,
    reconcile::{Actual, Desired, Scope, reconcile},
    vxlan::{self, device_name},
};
use crate::{
    kernel::{Error, Kernel},
    network::Backend,
};

/// Removes what `backend` will not use. The routes that `host-gw` and `vxlan` find they replace or remove themselves, once
/// they know the peers.
///
/// # Errors
/// As the kernel says.
pub fn remove(kernel: &mut Kernel, overlays: &Overlays, backend: &Backend) -> Result<(), Error> {
    let used = match backend {
        Backend::Vxlan(vxlan) => Some(device_name(vxlan.vni)),
        Backend::Udp(_) | Backend::HostGw => None,
    };
    for device in kernel.vxlan_links()? {
        let (name, addresses) = (&device.link.name, &device.link.addresses);
        if *name == device_name(device.vni) && used.as_ref() != Some(name) && is_ours(addresses, overlays) {
            info!("removing the device {name}, which an earlier run has left");
            kernel.remove_link(device.link.index)?;
        }
    }
    if let Backend::Udp(_) = backend {
        remove_routes(kernel, overlays)?;
    }
    Ok(())
}

/// A device without an address, which a daemon has that is starting just now, is not.
fn is_ours(addresses: &[IpNet], overlays: &Overlays) -> bool {
    vxlan::overlay_address(addresses, overlays).is_some()
}

/// They are narrower than the route into a TUN device, and would be taken before it.
fn remove_routes(kernel: &mut Kernel, overlays: &Overlays) -> Result<(), Error> {
    let scope = Scope {
        networks: overlays.all(),
        device: None,
    };
    let found = Actual::seen(scope, kernel.routes()?, Vec::new(), Vec::new(), &Actual::default());
    let operations = reconcile(&Desired::default(), &found);
    if operations.is_empty() {
        return Ok(());
    }
    info!("removing {} routes, which an earlier run has left", operations.len());
    kernel.apply(&operations)?.into_iter().collect()
}
