//! The device is there again before the registry has been asked anything: a `udp` daemon that is started again sets up its device
//! and its sockets by what was last known, while it finds out whether that is still so. What it finds out otherwise, it does as
//! if it had just begun.
//!
//! A device that goes with its daemon takes the way to all other hosts along. To read the configuration, to claim the PublicIP,
//! and to take the lease takes a dozen answers of the registry, and the choice of a mechanism for the rules some programs. What
//! comes meanwhile waits in the kernel, until the registry has told of the peers; if that takes it too long, it is carried to
//! those that were last known. Until this host's lease runs out nobody else is given its subnet.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{sync::mpsc::UnboundedSender, task::JoinHandle, time::sleep};
use tracing::{debug, info, warn};

use super::{Settings, backend_of};
use crate::{
    backend::{self, Backend, Descriptors, Overlays},
    engine::Failure,
    kernel::external::External,
    lease::{
        record::{Lease, LeaseValue},
        remembered::{Origin, Remembered},
        watch::{PeerSet, Picture},
    },
    network::{BackendKind, Network},
    observe::chain,
    subnet_file::Previous,
    supervisor::Supervisor,
};

/// How long packets wait for the registry to tell of the peers. It takes some 50 ms when it is well; a device's queue of 1,000
/// packets holds three times as long at 1,000 a second.
const HOLD: Duration = Duration::from_millis(300);

/// A backend that is set up already.
pub(super) struct Early {
    /// Of this network.
    pub(super) network: Network,
    /// For this lease.
    pub(super) lease: Lease,
    backend: Arc<Mutex<Option<Box<dyn Backend>>>>,
    holding: JoinHandle<()>,
}

impl Early {
    /// Begins with what is remembered, if it was this host's with this address; `left`: what an earlier process has left, of which
    /// nothing is left then. What does not work is tried again, and told of, by the start as it always is, with all that was
    /// `left`. What the `supervisor` keeps is from now on what packets are carried through.
    pub(super) fn begin(
        settings: &Settings,
        external: &External,
        previous: &Previous,
        left: &mut Descriptors,
        failures: &UnboundedSender<Failure>,
        supervisor: &Supervisor,
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
        let picture = Picture {
            peers: peers.into(),
            complete: false,
        };
        let overlays = Overlays::new(&network, previous)?;
        // The originals are closed when it is certain that they are not needed.
        let copies = left.try_clone().ok()?;
        let begun = backend_of(&network, external, &overlays, settings, copies, failures.clone(), None)
            .and_then(|backend| set_up(backend, &network, &lease, &picture));
        match begun {
            Ok(backend) => {
                *left = Descriptors::default();
                // To a queue or a socket that the supervisor alone has still come packets, and nobody reads them.
                match backend.descriptors() {
                    Ok(descriptors) => supervisor.park(&descriptors),
                    Err(error) => warn!("cannot copy descriptors for the supervisor: {error}"),
                }
                let backend = Arc::new(Mutex::new(Some(backend)));
                let holding = tokio::spawn(hold(Arc::clone(&backend), picture.peers.len()));
                info!(
                    "begun with the subnet that was last known: packets wait until the registry has told of the peers"
                );
                Some(Self {
                    network,
                    lease,
                    backend,
                    holding,
                })
            }
            Err(error) => {
                debug!("cannot begin with what was last known: {}", chain(&error));
                None
            }
        }
    }

    /// The backend, which carries packets or does not yet.
    pub(super) fn into_backend(self) -> Option<Box<dyn Backend>> {
        self.backend.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// What it leaves to another backend that takes its place: as much as fits is used again, and a supervisor may have all of it,
    /// too.
    pub(super) fn give_up(self) -> Descriptors {
        let Some(backend) = self.into_backend() else {
            return Descriptors::default();
        };
        let left = backend.descriptors().unwrap_or_default();
        // Carries what it has taken to its end.
        drop(backend);
        Descriptors { shared: false, ..left }
    }
}

impl Drop for Early {
    fn drop(&mut self) {
        self.holding.abort();
    }
}

/// Lets packets wait no longer than they can.
async fn hold(backend: Arc<Mutex<Option<Box<dyn Backend>>>>, peers: usize) {
    sleep(HOLD).await;
    if let Some(backend) = &mut *backend.lock().unwrap_or_else(PoisonError::into_inner) {
        match backend.resume() {
            Ok(()) => info!(
                "the registry has not told of the peers within {} ms: carrying packets to the {peers} that were last known",
                HOLD.as_millis()
            ),
            Err(error) => warn!("cannot carry packets yet: {}", chain(&error)),
        }
    }
}

fn set_up(
    mut backend: Box<dyn Backend>,
    network: &Network,
    lease: &Lease,
    picture: &Picture,
) -> Result<Box<dyn Backend>, backend::Error> {
    backend.start(network, lease)?;
    backend.apply(picture)?;
    Ok(backend)
}
