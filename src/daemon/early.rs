//! Packets flow again before the registry has been asked anything: a `udp` daemon that is started again begins to carry them by
//! what was last known, while it finds out whether that is still so. What it finds out otherwise, it does as if it had just begun.
//!
//! A device that goes with its daemon takes the way to all other hosts along. To read the configuration, to claim the PublicIP,
//! and to take the lease takes a dozen answers of the registry, and the choice of a mechanism for the rules some programs.
//! Until this host's lease runs out nobody else is given its subnet.

use tokio::sync::mpsc::UnboundedSender;
use tracing::{debug, info};

use super::{Settings, backend_of};
use crate::{
    backend::{self, Backend, Descriptors, Overlays},
    engine::Failure,
    kernel::external::External,
    lease::{
        record::{Lease, LeaseValue},
        remembered::{Origin, Remembered},
        watch::PeerSet,
    },
    network::{BackendKind, Network},
    observe::chain,
    subnet_file::Previous,
};

/// A backend that carries packets already.
pub(super) struct Early {
    /// Of this network.
    pub(super) network: Network,
    /// For this lease.
    pub(super) lease: Lease,
    pub(super) backend: Box<dyn Backend>,
}

impl Early {
    /// Begins with what is remembered, if it was this host's with this address; `left`: what an earlier process has left. What
    /// does not work is tried again, and told of, by the start as it always is.
    pub(super) fn begin(
        settings: &Settings,
        external: &External,
        previous: &Previous,
        left: &mut Descriptors,
        failures: &UnboundedSender<Failure>,
    ) -> Option<Self> {
        // Told when it counts: when the registry does not answer.
        let remembered = settings.memory.read(&Origin::of(&*settings.registry)).ok()??;
        let network = Network::parse(&remembered.config).ok()?.network;
        let value = LeaseValue {
            public_ipv6: settings.public_ipv6,
            backend_type: BackendKind::Udp.into(),
            ..LeaseValue::new(external.public_ip)
        };
        let Remembered { own, peers, .. } = remembered;
        let lease = own.lease;
        // The others leave everything in place when they end.
        if network.backend().kind() != BackendKind::Udp || lease.value != value || !lease.subnets.fit(&network) {
            return None;
        }
        let leases = peers.iter().filter_map(|record| Lease::from_record(record).ok());
        let peers: PeerSet = leases.map(|lease| (lease.subnets, lease.into())).collect();
        let overlays = Overlays::new(&network, previous)?;
        let left = std::mem::take(left);
        let begun = backend_of(&network, external, &overlays, settings, left, failures.clone())
            .and_then(|backend| carry(backend, &network, &lease, &peers));
        match begun {
            Ok(backend) => {
                info!(
                    "carrying packets to {} peer(s) as they were last known, while the registry is asked",
                    peers.len()
                );
                Some(Self {
                    network,
                    lease,
                    backend,
                })
            }
            Err(error) => {
                debug!("cannot begin with what was last known: {}", chain(&error));
                None
            }
        }
    }
}

/// What a backend that has begun with something else leaves to the one that takes its place: as much as fits is used again, and a
/// supervisor may have all of it, too.
pub(super) fn what_is_left(backend: Box<dyn Backend>) -> Descriptors {
    let left = backend.descriptors().unwrap_or_default();
    // Carries what it has taken to its end.
    drop(backend);
    Descriptors { shared: false, ..left }
}

fn carry(
    mut backend: Box<dyn Backend>,
    network: &Network,
    lease: &Lease,
    peers: &PeerSet,
) -> Result<Box<dyn Backend>, backend::Error> {
    backend.start(network, lease)?;
    backend.apply(peers)?;
    backend.resume()?;
    Ok(backend)
}
