//! The `host-gw` backend: a plain route to each peer's subnet, via the peer. All hosts share a link.

use std::{net::IpAddr, time::Duration};

use ipnet::IpNet;
use tracing::info;

use super::{
    Backend, Error, LEAST_MTU, Overlays,
    programming::{Complaints, Programming},
    reconcile::Desired,
};
use crate::{
    kernel::{self, Kernel, external::External, monitor::Change},
    lease::{record::Lease, watch::Picture},
    network::{BackendKind, Network},
    observe::{board::Report, status::Counts},
};

/// The `host-gw` backend.
pub struct HostGw {
    external: External,
    overlay: IpNet,
    programming: Programming,
    complaints: Complaints,
}

impl HostGw {
    /// Nothing is made yet.
    ///
    /// # Errors
    /// [`Error::NotTheInterfaces`], [`Error::Mtu`], and when there is no netlink socket.
    pub fn new(external: &External, overlays: &Overlays) -> Result<Self, Error> {
        check(external)?;
        Ok(Self {
            external: external.clone(),
            overlay: overlays.current,
            programming: Programming::new(Kernel::open()?, overlays),
            complaints: Complaints::default(),
        })
    }

    fn try_apply(&mut self, picture: &Picture) -> Result<(), kernel::Error> {
        let peers = &picture.peers;
        let hosts: Vec<IpAddr> = peers.values().map(|lease| lease.value.public_ip.into()).collect();
        let paths = self.programming.paths(&hosts)?;
        let mut desired = Desired::new(picture.complete);
        for lease in peers.values() {
            let (subnet, host) = (IpNet::V4(lease.subnets.v4()), IpAddr::V4(lease.value.public_ip));
            let path = paths.get(&host).and_then(Option::as_ref);
            if !self.overlay.contains(&subnet) {
                self.complaints.say(&format!(
                    "skipping peer {subnet}: its subnet is not in the overlay {}",
                    self.overlay
                ));
            } else if path.is_some_and(|path| path.gateway.is_none() && path.link == self.external.index) {
                desired.route_directly(subnet, host, self.external.index);
            } else {
                let how = match path {
                    None => "there is no route to it".to_owned(),
                    Some(path) => match path.gateway {
                        Some(gateway) => format!("it is behind the router {gateway}"),
                        None => "it is reached by another interface".to_owned(),
                    },
                };
                self.complaints.say(&format!(
                    "cannot reach peer {subnet}: its host {host} is not on the link of {}: {how}. The host-gw backend needs \
                     all hosts on one link; vxlan and udp do not",
                    self.external.name
                ));
            }
        }
        self.programming.make(&desired)
    }
}

/// Other hosts send to the PublicIP as to a router on their link: it must be the interface's own.
fn check(external: &External) -> Result<(), Error> {
    if external.public_ip != external.address {
        return Err(Error::NotTheInterfaces {
            public_ip: external.public_ip,
            address: external.address,
            interface: external.name.clone(),
        });
    }
    if external.mtu < LEAST_MTU {
        return Err(Error::Mtu {
            interface: external.name.clone(),
            mtu: external.mtu,
            least: LEAST_MTU,
        });
    }
    Ok(())
}

impl Backend for HostGw {
    fn kind(&self) -> BackendKind {
        BackendKind::HostGw
    }

    fn mtu(&self) -> u32 {
        self.external.mtu
    }

    fn start(&mut self, _: &Network, own: &Lease) -> Result<(), Error> {
        info!(
            "host-gw is up: the other hosts route {} to {} on {}",
            own.subnets.v4(),
            self.external.address,
            self.external.name
        );
        Ok(())
    }

    fn apply(&mut self, picture: &Picture) -> Result<(), Error> {
        if let Err(error) = self.try_apply(picture) {
            self.complaints.say(&format!("{error}; trying again"));
            self.programming.distrust();
            self.programming.note_trouble();
        }
        self.complaints.end_round();
        Ok(())
    }

    fn notice(&mut self, changes: &[Change]) -> bool {
        self.programming.notice(changes)
    }

    fn recheck_after(&self) -> Option<Duration> {
        Some(self.programming.recheck_after())
    }

    fn recheck(&mut self) {
        self.programming.distrust();
    }

    fn adapt(&mut self, external: &External) -> Result<(), Error> {
        check(external)?;
        self.external = external.clone();
        self.programming.distrust();
        Ok(())
    }

    fn count_from(&mut self, before: &Counts) {
        self.programming.repairs().count_from(&before.repairs);
    }

    fn report(&self) -> Option<Report> {
        let repairs = self.programming.repairs();
        Some(repairs.report(self.kind(), None, self.mtu()))
    }
}
