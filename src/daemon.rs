//! The run: from the network's configuration to packets that flow, and back down again.
//!
//! In this order, as the original: choose the external interface, wait for the configuration, claim the PublicIP and take the
//! lease, set up the backend's device, put the traffic rules in place and serve the first picture of the peers, write the subnet
//! file, say that we are ready;
//! then follow the leases until a signal comes, this host's lease is gone, or another host has its PublicIP. SIGTERM and
//! SIGINT end it at any point.

use std::{
    future::pending,
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    pin::pin,
    sync::Arc,
    time::Duration,
};

use sd_notify::NotifyState;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, oneshot, watch},
    time::{sleep, timeout},
};
use tracing::{info, warn};

use crate::{
    backend::{self, Backend, udp},
    kernel::{
        self, Kernel,
        external::{self, External, Wish},
    },
    lease::{
        acquire::{self, AcquireError, Own},
        keep,
        presence::{ClaimError, Presence},
        record::LeaseValue,
        watch::{self as lease_watch, PeerSet, Revoked},
    },
    network::{self, LoadError, Network},
    observe::{board::Board, health, outage::Outage, registry::Observed, socket},
    registry::Registry,
    rules::{self, Keeper, Mechanism},
    subnet_file::{Previous, Share, SubnetFile, WriteError},
};

/// How long a stopping daemon waits for the registry to take its claim back.
const LEAVE: Duration = Duration::from_secs(2);

/// What one run needs to know.
#[derive(Debug)]
pub struct Settings {
    /// Where configuration and leases are.
    pub registry: Arc<dyn Registry>,
    /// Which interface faces the other hosts.
    pub external: Wish,
    /// The IPv6 address to publish beside the PublicIP.
    pub public_ipv6: Option<Ipv6Addr>,
    /// Where Docker and others read this host's subnet.
    pub subnet_file: PathBuf,
    /// How much of the lease's time is left when it is renewed.
    pub renew_margin: Duration,
    /// Where `/healthz`, `/readyz` and `/metrics` answer.
    pub health: Option<SocketAddr>,
    /// Where `flanneld status` asks.
    pub status_socket: PathBuf,
    /// Which traffic rules to keep.
    pub rules: rules::Options,
    /// For the `udp` backend.
    pub udp: udp::Options,
}

/// Why a run ended by itself.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not root.
    #[error("this process may not configure the network: run flanneld as root, or with CAP_NET_ADMIN")]
    Unprivileged,
    /// No external interface.
    #[error(transparent)]
    External(#[from] external::Error),
    /// The configuration cannot be used.
    #[error(transparent)]
    Config(#[from] LoadError),
    /// Another daemon has our PublicIP.
    #[error(transparent)]
    Claim(#[from] ClaimError),
    /// No lease.
    #[error(transparent)]
    Acquire(#[from] AcquireError),
    /// The backend of the configuration is not in this build.
    #[error(
        "the network's Backend.Type is {0}, which this version does not carry yet; it carries: udp. Set it with \
         `flanneld network set`"
    )]
    NoBackend(network::BackendKind),
    /// IPv4 is switched off.
    #[error("the network has EnableIPv4 false: the udp backend needs an IPv4 network")]
    NoIpv4,
    /// The backend does not work.
    #[error(transparent)]
    Backend(#[from] backend::Error),
    /// No traffic rules.
    #[error(transparent)]
    Rules(#[from] rules::Error),
    /// A worker of the engine has stopped.
    #[error("the packet engine has failed: {0}")]
    Engine(String),
    /// The subnet file cannot be written.
    #[error(transparent)]
    SubnetFile(#[from] WriteError),
    /// The health port cannot be opened.
    #[error(transparent)]
    Health(#[from] health::Error),
    /// Our lease is gone.
    #[error(transparent)]
    Revoked(#[from] Revoked),
    /// The kernel does not answer.
    #[error(transparent)]
    Kernel(#[from] kernel::Error),
    /// No signals to be had.
    #[error("cannot wait for signals")]
    Signal(#[source] io::Error),
}

/// Runs until SIGTERM or SIGINT (`Ok`), or until it cannot go on. The device is gone when this returns.
///
/// # Errors
/// What the daemon cannot mend by waiting. An unreachable registry or a missing configuration is not among them.
pub async fn run(mut settings: Settings) -> Result<(), Error> {
    let board = Board::new(settings.registry.describe());
    settings.registry = Arc::new(Observed::new(settings.registry, board.clone()));
    let mut terminate = signal(SignalKind::terminate()).map_err(Error::Signal)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(Error::Signal)?;
    let mut presence = None;
    // Whatever `serve` holds (the engine, and with it the device) is dropped when it ends or is abandoned here.
    let outcome = tokio::select! {
        _ = terminate.recv() => stopping("SIGTERM"),
        _ = interrupt.recv() => stopping("SIGINT"),
        ended = serve(&settings, &board, &mut presence) => ended,
    };
    tell_supervisor(NotifyState::Stopping);
    if let Some(presence) = presence {
        // An unreachable registry forgets the claim by itself.
        let _ = timeout(LEAVE, presence.withdraw()).await;
    }
    outcome
}

fn stopping(signal: &str) -> Result<(), Error> {
    info!("{signal} received: stopping");
    Ok(())
}

async fn serve(settings: &Settings, board: &Board, presence: &mut Option<Presence>) -> Result<(), Error> {
    // Not only when the device is made: this host's lease would have been taken by then.
    if !kernel::may_administer() {
        return Err(Error::Unprivileged);
    }
    let registry = &*settings.registry;
    if let Some(address) = settings.health {
        health::serve(address, board.clone()).await?;
    }
    // Whoever cannot be asked how it is can work all the same.
    let _status = socket::Server::open(&settings.status_socket, board.clone())
        .inspect_err(|error| warn!("{error}; `flanneld status` will not work"));
    let external = external::choose(&mut Kernel::open()?, &settings.external)?;
    info!(
        "external interface {} (address {}, MTU {}), PublicIP {}",
        external.name, external.address, external.mtu, external.public_ip
    );
    board.external(&external);
    board.waiting_for("the network's configuration");
    let network = configuration(registry).await?;
    warn_of_overlap(&network, &external);
    let mechanism = Mechanism::choose(&settings.rules, &network).await?;
    let (failures, mut failed) = mpsc::unbounded_channel();
    let mut backend = backend_of(&network, &external, settings, failures)?;
    board.waiting_for("this host's PublicIP to be free");
    let presence = claim(&settings.registry, external.public_ip, presence).await?;
    let mut present = pin!(keep_presence(presence));
    board.waiting_for("a lease");
    let own = tokio::select! {
        own = lease(settings, &network, &external, &*backend) => own?,
        lost = &mut present => return Err(lost.into()),
    };
    board.lease(&own.lease, own.left);
    backend.start(&network, &own.lease)?;
    if let Some(report) = backend.report() {
        board.backend(report);
    }
    board.waiting_for("the other hosts' leases");

    let (publish, mut peers) = watch::channel(None);
    let mut watching = pin!(lease_watch::watch(registry, &own.lease, &publish));
    let mut keeping = pin!(keep_lease(registry, &own, settings.renew_margin, board));
    let (in_place, mut rules_in_place) = oneshot::channel();
    let rules = Keeper::new(settings.rules, mechanism, &network, &own.lease.subnets);
    let mut ruling = pin!(rules.keep(in_place));
    // What is still to be done before packets may come: the rules, and the first picture of the peers.
    let (mut ruled, mut peers_known, mut ready) = (false, None, false);
    loop {
        tokio::select! {
            Some(reason) = failed.recv() => return Err(Error::Engine(reason)),
            revoked = &mut watching => return Err(revoked.into()),
            () = &mut keeping => {}
            lost = &mut present => return Err(lost.into()),
            Ok(()) = peers.changed() => {
                let latest: Option<Arc<PeerSet>> = peers.borrow_and_update().clone();
                let Some(latest) = latest else { continue };
                backend.apply(&latest)?;
                board.peers(Arc::clone(&latest));
                peers_known = Some(latest.len());
            }
            Ok(()) = &mut rules_in_place, if !ruled => ruled = true,
            never = &mut ruling => match never {},
        }
        if let (false, true, Some(peers)) = (ready, ruled, peers_known) {
            ready = true;
            write_subnet_file(settings, &network, &own, backend.mtu())?;
            board.ready();
            tell_supervisor(NotifyState::Ready);
            info!("ready: subnet {}, {peers} peer(s)", own.lease.subnets.to_cidrs());
        }
    }
}

/// Waits for a configuration; an invalid one is an error at once.
async fn configuration(registry: &dyn Registry) -> Result<Network, Error> {
    let mut outage = Outage::of("reading the network's configuration");
    let mut missing_said = false;
    loop {
        match network::load(registry).await {
            Ok(parsed) => {
                outage.over();
                for warning in &parsed.warnings {
                    warn!("{warning}");
                }
                return Ok(parsed.network);
            }
            Err(missing @ LoadError::Missing { .. }) => {
                outage.over();
                if !missing_said {
                    warn!("{missing}; waiting for it");
                    missing_said = true;
                }
                wait_for_key(registry).await;
            }
            Err(LoadError::Registry(error)) if error.is_transient() => {
                sleep(outage.failed(&error.to_string())).await;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Looks for the configuration's key each second; returns when it is there or cannot be looked for.
async fn wait_for_key(registry: &dyn Registry) {
    while let Ok(None) = registry.get(network::CONFIG_KEY).await {
        sleep(Duration::from_secs(1)).await;
    }
}

/// Some networks are made so on purpose, with all hosts on one link and SubnetMin beyond them: no reason to refuse.
fn warn_of_overlap(network: &Network, external: &External) {
    if let Some(plan) = network.ipv4()
        && plan.network().contains(&external.address)
    {
        warn!(
            "this host's own address {} lies in the overlay {}: packets to hosts that are not on its link go astray, and so \
             do those to addresses that the underlay and a subnet share; give the overlay a block that no host is in",
            external.address,
            plan.network()
        );
    }
}

fn backend_of(
    network: &Network,
    external: &External,
    settings: &Settings,
    failures: mpsc::UnboundedSender<String>,
) -> Result<Box<dyn Backend>, Error> {
    match network.backend() {
        network::Backend::Udp(udp) if network.ipv4().is_some() => {
            Ok(Box::new(udp::Udp::new(external, udp.clone(), settings.udp, failures)?))
        }
        network::Backend::Udp(_) => Err(Error::NoIpv4),
        other => Err(Error::NoBackend(other.kind())),
    }
}

/// Claims the PublicIP, as long as it takes the registry to answer. `None` where the registry does not let us.
async fn claim<'a>(
    registry: &Arc<dyn Registry>,
    public_ip: Ipv4Addr,
    slot: &'a mut Option<Presence>,
) -> Result<Option<&'a Presence>, Error> {
    let mut outage = Outage::of("claiming this host's PublicIP");
    loop {
        match Presence::claim(registry, public_ip).await {
            Ok(presence) => {
                outage.over();
                return Ok(Some(slot.insert(presence)));
            }
            Err(ClaimError::Registry(error)) if error.is_transient() => {
                sleep(outage.failed(&error.to_string())).await;
            }
            Err(ClaimError::Registry(error)) => {
                warn!(
                    "two hosts with one PublicIP will not be noticed, because the key hosts/{public_ip} cannot be written: {error}"
                );
                return Ok(None);
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Takes this host's lease, as long as it takes the registry to answer.
async fn lease(
    settings: &Settings,
    network: &Network,
    external: &External,
    backend: &dyn Backend,
) -> Result<Own, Error> {
    let value = LeaseValue {
        public_ipv6: settings.public_ipv6,
        backend_type: backend.kind().into(),
        ..LeaseValue::new(external.public_ip)
    };
    let previous = Previous::read(&settings.subnet_file).unwrap_or_else(|error| {
        warn!(
            "cannot read {}, taking no subnet from it: {error}",
            settings.subnet_file.display()
        );
        Previous::default()
    });
    let mut outage = Outage::of("taking a lease");
    loop {
        match acquire::acquire(&*settings.registry, network, &value, &previous).await {
            Ok(own) => {
                outage.over();
                return Ok(own);
            }
            Err(AcquireError::Registry(error)) if error.is_transient() => {
                sleep(outage.failed(&error.to_string())).await;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

async fn keep_lease(registry: &dyn Registry, own: &Own, margin: Duration, board: &Board) {
    if let (Some(ttl), Some(left)) = (own.lease.ttl, own.left) {
        keep::keep(registry, ttl, left, margin, |left| board.renewed(left)).await;
    }
    // A reservation needs no keeping; of a lease that ran out the watch tells.
    pending().await
}

/// Keeps the claim for as long as this is awaited; returns when another daemon has it.
async fn keep_presence(presence: Option<&Presence>) -> ClaimError {
    match presence {
        Some(presence) => presence.keep().await,
        None => pending().await,
    }
}

fn write_subnet_file(settings: &Settings, network: &Network, own: &Own, mtu: u32) -> Result<(), Error> {
    let subnets = own.lease.subnets;
    let file = SubnetFile {
        ipv4: network.ipv4().map(|plan| Share {
            network: plan.network(),
            subnet: subnets.v4(),
        }),
        ipv6: network.ipv6().zip(subnets.v6()).map(|(plan, subnet)| Share {
            network: plan.network(),
            subnet,
        }),
        mtu,
        ip_masq: settings.rules.masquerade,
    };
    file.write_atomically(&settings.subnet_file)?;
    info!("wrote {}", settings.subnet_file.display());
    Ok(())
}

/// For units of `Type=notify`. Without a supervisor there is nobody to tell, and one that does not listen is no reason to
/// stop.
fn tell_supervisor(state: NotifyState<'_>) {
    let _ = sd_notify::notify(&[state]);
}
