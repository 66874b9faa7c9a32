//! The run: from the network's configuration to packets that flow, and back down again.
//!
//! In this order, as the original: choose the external interface, wait for the configuration, claim the PublicIP and take the
//! lease, set up the backend's device, put the traffic rules in place and serve the first picture of the peers, write the subnet
//! file, say that we are ready; then follow the leases, the kernel and the external interface until a signal comes, this
//! host's subnet or PublicIP is another host's. SIGTERM and SIGINT end it at any point.
//!
//! The `udp` backend is set up earlier where an earlier run is remembered, since its device went with that run.
//! Where the registry does not answer, what an earlier run has remembered takes the place of configuration, claim and lease.

mod blackhole;
mod claims;
mod doors;
mod early;
mod pace;
mod remembered;
mod succession;

use std::{
    cell::RefCell,
    future::pending,
    io,
    net::{Ipv6Addr, SocketAddr},
    path::PathBuf,
    pin::{Pin, pin},
    sync::Arc,
    time::Duration,
};

use ipnet::Ipv4Net;
use serde_json::Value;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, oneshot, watch},
    time::{Instant, sleep, sleep_until, timeout},
};
use tracing::{info, warn};

use crate::{
    backend::{self, Backend, Descriptors, Overlays, host_gw::HostGw, leftovers, udp, vxlan::Vxlan},
    engine::{Failure, io::Way},
    handover::{
        self,
        heir::{self, Predecessor},
        server::Event,
    },
    kernel::{
        self, Kernel,
        external::{self, External, Wish},
        monitor::{Change, Monitor},
    },
    lease::{
        acquire::{self, AcquireError, Own},
        holding::Holding,
        keep,
        presence::{ClaimError, Presence},
        record::{Lease, LeaseValue},
        remembered::{Memory, Origin, Remembered},
        republish::publish,
        screen::Screen,
        watch::{self as lease_watch, OwnAddresses, PeerSet, Picture, Revoked},
    },
    network::{self, BackendKind, LoadError, Network},
    observe::{self, board::Board, health, outage::Outage, registry::Observed},
    registry::Registry,
    rules::{self, Keeper, Mechanism},
    sandbox::{Needs, Sandbox},
    subnet_file::{Previous, Share, SubnetFile, WriteError},
    supervisor::Supervisor,
    sys::priority,
};

use blackhole::Blackhole;
use claims::{Claiming, Claims, claim, claim_after_others, keep_presence, withdraw};
use doors::Doors;
use early::Early;
use pace::{Look, Pace};
use remembered::{Beginning, Leased, Unverified};
use succession::Stage;

/// How long the external address may be away before another one is taken for it: a DHCP client, or a person, removes and adds it
/// in this time. And how long it has to be back before it is taken again.
const AWAY: Duration = Duration::from_secs(2);

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
    /// What is remembered for a start without the registry.
    pub memory: Memory,
    /// How much of the lease's time is left when it is renewed.
    pub renew_margin: Duration,
    /// Where `/healthz`, `/readyz` and `/metrics` answer.
    pub health: Option<SocketAddr>,
    /// Where `flanneld status` asks.
    pub status_socket: PathBuf,
    /// Whether what no container has is dropped.
    pub blackhole_route: bool,
    /// Which traffic rules to keep.
    pub rules: rules::Options,
    /// For the `udp` backend.
    pub udp: udp::Options,
    /// Whether to go on in the place of the running daemon.
    pub handover: bool,
    /// What the daemon has given up already, and will.
    pub sandbox: Sandbox,
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
    /// The backend does not work.
    #[error(transparent)]
    Backend(#[from] backend::Error),
    /// No traffic rules.
    #[error(transparent)]
    Rules(#[from] rules::Error),
    /// A worker of the engine has stopped.
    #[error("the packet engine has failed: {0}")]
    Engine(String),
    /// The health port cannot be opened.
    #[error(transparent)]
    Health(#[from] health::Error),
    /// Our subnet is another host's.
    #[error(transparent)]
    Revoked(#[from] Revoked),
    /// The network is not what it was.
    #[error(
        "the network's configuration was changed while the registry was away, and this daemon began with the one before: \
         ending, so that the next start takes the new one"
    )]
    Reconfigured,
    /// The running daemon does not hand over.
    #[error(transparent)]
    Handover(#[from] heir::Error),
    /// The kernel does not answer.
    #[error(transparent)]
    Kernel(#[from] kernel::Error),
    /// The kernel does not tell what changes.
    #[error("cannot listen to what changes in the kernel")]
    Monitor(#[source] io::Error),
    /// No signals to be had.
    #[error("cannot wait for signals")]
    Signal(#[source] io::Error),
}

impl Error {
    /// Whether the next start must not begin with what is remembered: it is another host's, or not so any more. What a daemon that
    /// was started twice finds there is the other one's.
    fn outdates_memory(&self) -> bool {
        match self {
            Self::Revoked(_) | Self::Reconfigured => true,
            Self::Claim(ClaimError::InUse { here, .. }) => !here,
            _ => false,
        }
    }
}

/// How a run ends well.
enum End {
    /// Someone has stopped it.
    Stopped,
    /// Another daemon goes on in its place.
    HandedOver,
}

/// Runs until SIGTERM or SIGINT or until another daemon has taken over (`Ok`), or until it cannot go on. The `udp` backend's
/// device is gone when this returns, unless another process has it too: a supervisor that keeps descriptors, or the other daemon.
/// What the kernel carries packets by stays, so that a restart breaks no flow.
///
/// # Errors
/// What the daemon cannot mend by waiting. An unreachable registry or a missing configuration is not among them.
pub async fn run(mut settings: Settings) -> Result<(), Error> {
    let board = Board::new(settings.registry.describe());
    board.sandbox(settings.sandbox.clone());
    settings.registry = Arc::new(Observed::new(settings.registry, board.clone()));
    let mut terminate = signal(SignalKind::terminate()).map_err(Error::Signal)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(Error::Signal)?;
    let claims = Claims::default();
    let supervisor = RefCell::new(Supervisor::of_this_process());
    let mut serving = Box::pin(serve(&settings, &board, &claims, &supervisor));
    let outcome = tokio::select! {
        _ = terminate.recv() => stopping("SIGTERM"),
        _ = interrupt.recv() => stopping("SIGINT"),
        ended = &mut serving => ended,
    };
    if let Ok(End::HandedOver) = outcome {
        return Ok(());
    }
    supervisor.borrow().tell_stopping();
    if let Err(error) = &outcome
        && error.outdates_memory()
    {
        settings.memory.forget();
    }
    // An unreachable registry forgets the claims by itself. The workers of a daemon that was stopped carry packets all the while.
    let _ = timeout(LEAVE, withdraw(claims.take())).await;
    // With all that it holds: the engine, and with it the device.
    drop(serving);
    outcome.map(drop)
}

fn stopping(signal: &str) -> Result<End, Error> {
    info!("{signal} received: stopping");
    Ok(End::Stopped)
}

async fn serve(
    settings: &Settings,
    board: &Board,
    claims: &Claims,
    supervisor: &RefCell<Supervisor>,
) -> Result<End, Error> {
    // Not only when the device is made: this host's lease would have been taken by then.
    if !kernel::may_administer() {
        return Err(Error::Unprivileged);
    }
    let registry = &*settings.registry;
    let mut left = supervisor.borrow_mut().left_behind();
    let mut before = predecessor(settings).await?;
    let mut doors = Doors::open(settings, before.as_mut()).await?;
    match &mut before {
        Some(before) => left = before.descriptors(),
        None => doors.serve(board)?,
    }
    let their_supervisor = before.as_ref().map(Predecessor::supervisor);
    let mut kernel = Kernel::open()?;
    let external = external::choose(&mut kernel, &settings.external)?;
    info!(
        "external interface {} (address {}, MTU {}), PublicIP {}",
        external.name, external.address, external.mtu, external.public_ip
    );
    board.external(&external);
    let previous = previous(settings);
    let (failures, mut failed) = mpsc::unbounded_channel();
    let early = match before {
        None => Early::begin(
            settings,
            &external,
            &previous,
            &mut left,
            &failures,
            &supervisor.borrow(),
        ),
        // That one carries the packets.
        Some(_) => None,
    };
    board.waiting_for("the network's configuration");
    let Beginning {
        network,
        config,
        remembered,
        configured,
    } = remembered::begin(settings, registry).await?;
    if let Some(before) = &before {
        before.fits(&network, &external, remembered.as_ref().filter(|_| !configured))?;
    }
    let begun_with = network.clone();
    warn_of_overlap(&network, &external);
    let mechanism = Mechanism::choose(&settings.rules, &network).await?;
    // Before anything is looked at: what changes from then on is told.
    let mut monitor = Monitor::open().map_err(Error::Monitor)?;
    let overlays = Overlays::new(&network, &previous).ok_or(backend::Error::NoIpv4(network.backend().kind()))?;
    let early = match early {
        Some(early) if early.network != network => {
            left = early.give_up();
            None
        }
        early => early,
    };
    let backend = match &early {
        Some(_) => None,
        None => {
            let left = std::mem::take(&mut left);
            let known = remembered.as_ref().map(|remembered| &remembered.own.lease.value);
            // One that came to another address is another host, maybe a copy of this one.
            let known = known.filter(|known| known.public_ip == external.public_ip);
            let known_as = known.and_then(|known| known.backend_data.as_ref());
            Some(backend_of(
                &network,
                &external,
                &overlays,
                settings,
                left,
                failures.clone(),
                known_as,
            )?)
        }
    };
    let value = LeaseValue {
        public_ipv6: settings.public_ipv6,
        backend_type: network.backend().kind().into(),
        backend_data: backend.as_ref().and_then(|backend| backend.data()),
        ..LeaseValue::new(external.public_ip)
    };
    // What other hosts know of this one must still be so: they cannot be told now.
    let remembered = remembered.filter(|remembered| remembered.own.lease.value == value);
    // It is not this daemon's to take back before the other one is gone.
    let handed = before.as_mut().and_then(Predecessor::claim);
    let handed = handed.map(|handed| Presence::adopt(&settings.registry, external.public_ip, handed));
    let mut handed = handed.transpose()?.map(Arc::new);
    // A registry that gives the configuration may yet take neither claim nor lease. Where another daemon carries the packets that is
    // waited for.
    let patience = (remembered.is_some() && before.is_none()).then_some(remembered::PATIENCE);
    let mut from_memory = remembered.is_some() && !configured;
    let claiming = match &handed {
        Some(handed) => Claiming::Done(Some(Arc::clone(handed))),
        None if from_memory => Claiming::Wanted(external.public_ip),
        None => {
            board.waiting_for("this host's PublicIP to be free");
            claim(&settings.registry, external.public_ip, claims, patience).await?
        }
    };
    from_memory |= matches!(claiming, Claiming::Wanted(_));
    let mut present = Box::pin(keep_presence(&settings.registry, claims, claiming));
    let leased = match remembered {
        Some(remembered) if from_memory => Leased::Remembered(remembered),
        remembered => {
            board.waiting_for("a lease");
            let fallback = remembered.filter(|_| before.is_none());
            tokio::select! {
                leased = lease(registry, &network, &value, &previous, before.as_ref(), fallback) => leased?,
                lost = &mut present => return Err(lost),
            }
        }
    };
    let (own, first, mut unverified) = match leased {
        Leased::Taken(own) => (own, None, None),
        Leased::Remembered(remembered) => {
            let unverified = Unverified::begin(registry, &remembered, configured, board);
            (remembered.own, Some(remembered.peers), Some(unverified))
        }
    };
    board.lease(&own.lease, own.left, settings.renew_margin);
    warn_of_renumbering(settings, &previous, &own);
    leftovers::remove(&mut kernel, &overlays, network.backend())?;
    let begun = match early {
        Some(early) if early.lease.subnets == own.lease.subnets => early.into_backend(),
        Some(early) => {
            left = early.give_up();
            None
        }
        None => None,
    };
    // Of what was begun with the supervisor has copies.
    let parked = begun.as_ref().map(|begun| begun.generation());
    let backend = match (begun, backend) {
        (Some(begun), _) => begun,
        (None, backend) => {
            let mut backend = match backend {
                Some(backend) => backend,
                None => backend_of(&network, &external, &overlays, settings, left, failures, None)?,
            };
            backend.start(&network, &own.lease)?;
            backend
        }
    };
    let dropped = if settings.blackhole_route {
        own.lease.subnets.nets().collect()
    } else {
        Vec::new()
    };
    let blackhole = Blackhole::new(&mut kernel, dropped, &overlays);

    let addresses = OwnAddresses::new(own.lease.value.public_ip);
    let (publish, mut pictures) = watch::channel(None);
    let (here, addresses_here) = watch::channel(kernel.ipv4_addresses()?);
    let screen = Screen::new(&network, &own.lease, addresses_here);
    let holding = Holding::new(own.clone(), first.is_none());
    let mut held = holding.subscribe();
    let mut watching = pin!(lease_watch::watch(
        registry,
        &holding,
        &addresses,
        &screen,
        first.as_deref(),
        &publish
    ));
    let mut keeping = pin!(keep_lease(registry, &holding, own.left, settings.renew_margin, board));
    let mut remembering = pin!(settings.memory.keep(
        Origin::of(registry),
        &config,
        holding.subscribe(),
        publish.subscribe()
    ));
    let mut configured: Pin<Box<dyn Future<Output = Result<(), Error>>>> = if configured {
        Box::pin(pending())
    } else {
        Box::pin(remembered::still_configured(registry, &begun_with))
    };
    let (in_place, mut rules_in_place) = oneshot::channel();
    let rules = Keeper::new(settings.rules, mechanism, &network, &own.lease.subnets);
    let mut ruling = pin!(rules.keep(in_place, || board.rules_repaired()));
    let mut moving: MovingLease = Box::pin(pending());
    let mut stopping: StoppingOther = Box::pin(pending());
    let mut settling: SettlingOther = Box::pin(pending());
    let mut run = Run {
        settings,
        network,
        kernel,
        first: external.clone(),
        external,
        backend,
        blackhole,
        lease: own.lease,
        picture: None,
        here,
        board,
        ruled: false,
        ready: false,
        settled: false,
        stage: if before.is_some() {
            Stage::Preparing
        } else {
            Stage::Alone
        },
        offered: None,
        supervisor,
        parked,
        interface: Outage::of("following the external interface"),
        away_since: None,
        again: None,
        file_is_due: false,
        file: Outage::of("writing the subnet file"),
        pace: Pace::new(Instant::now()),
    };
    run.park();
    run.tell_of_backend();
    run.become_ready();
    loop {
        if run.is_prepared()
            && let Some(before) = before.take()
        {
            stopping = Box::pin(before.stop());
        }
        if let Some(again) = run.again.take() {
            run.pace.look_at(again);
        }
        let (at, look) = run.pace.next(run.backend.recheck_after());
        tokio::select! {
            Some(failure) = failed.recv() => run.engine_failed(failure)?,
            revoked = &mut watching => {
                run.let_go();
                return Err(revoked.into());
            }
            () = &mut keeping => {}
            never = &mut remembering => match never {},
            lost = &mut present => {
                // Who has this host's PublicIP has its subnet, too.
                run.let_go();
                return Err(lost);
            }
            Ok(()) = held.changed() => {
                let now = held.borrow_and_update().clone();
                let another = now.lease.ttl != run.lease.ttl;
                board.lease(&now.lease, now.left(), settings.renew_margin);
                run.lease = now.lease;
                let verified = unverified.as_mut().filter(|unverified| now.confirmed && !unverified.leased);
                if another || verified.is_some() {
                    // How much time it has is to be found out.
                    keeping.set(keep_lease(
                        registry,
                        &holding,
                        run.lease.ttl.map(|_| Duration::ZERO),
                        settings.renew_margin,
                        board,
                    ));
                }
                if let Some(verified) = verified {
                    verified.leased = true;
                }
                unverified = unverified.filter(|unverified| !unverified.is_over(board));
            }
            same = &mut configured => {
                configured = Box::pin(pending());
                if let Err(changed) = same {
                    run.let_go();
                    return Err(changed);
                }
                if let Some(unverified) = &mut unverified {
                    unverified.configured = true;
                }
                unverified = unverified.filter(|unverified| !unverified.is_over(board));
            }
            Ok(()) = pictures.changed() => {
                run.picture = pictures.borrow_and_update().clone();
                run.apply()?;
            }
            Ok(()) = &mut rules_in_place, if !run.ruled => {
                run.ruled = true;
                run.become_ready();
            }
            never = &mut ruling => match never {},
            event = doors.next() => match event {
                // Whoever has asked may be gone.
                Event::Asked(reply) => drop(reply.send(run.offer(&doors, claims))),
                Event::Prepared(heir) => {
                    if run.hand_over(heir, &mut doors, claims).await? {
                        return Ok(End::HandedOver);
                    }
                }
            },
            stopped = &mut stopping => {
                stopping = Box::pin(pending());
                let mut stopped = stopped?;
                run.carry_on(&stopped.counts)?;
                // At once: the other one waits for no longer than half a second.
                stopped.tell_running().await;
                run.apply()?;
                run.tell_of_backend();
                settling = Box::pin(stopped.settle());
            }
            settled = &mut settling => {
                settling = Box::pin(pending());
                settled?;
                claims.borrow_mut().extend(handed.take());
                // First, since who is told that this daemon is ready may ask it.
                if let Err(error) = doors.serve(board) {
                    // There is no other any more that could go on.
                    warn!("{error}: nobody answers there");
                }
                run.is_alone(their_supervisor.as_ref());
            }
            changes = monitor.next() => run.notice(&changes.map_err(Error::Monitor)?),
            () = sleep_until(at) => {
                if let Some(value) = run.look(look)? {
                    addresses.add(value.public_ip);
                    // The address before is another host's to claim now.
                    present = Box::pin(keep_presence(&settings.registry, claims, Claiming::Done(None)));
                    moving = Box::pin(move_lease(settings, claims, run.lease.clone(), &addresses, value));
                }
            }
            moved = &mut moving => {
                moving = Box::pin(pending());
                let Moved { lease, claimed } = moved?;
                let public_ip = lease.value.public_ip;
                info!("published the new PublicIP {public_ip}");
                addresses.settle(public_ip);
                holding.found(lease);
                // Another host may have the address before, and was taken for this one.
                watching.set(lease_watch::watch(registry, &holding, &addresses, &screen, None, &publish));
                let (kept, released) = claims.take().into_iter().partition(|held| held.public_ip() == public_ip);
                claims.replace(kept);
                present = Box::pin(keep_presence(&settings.registry, claims, claimed));
                // The registry may be slow, and forgets them by itself.
                tokio::spawn(timeout(LEAVE, withdraw(released)));
            }
        }
    }
}

type StoppingOther = Pin<Box<dyn Future<Output = Result<heir::Stopped, heir::Error>>>>;
type SettlingOther = Pin<Box<dyn Future<Output = Result<(), heir::Error>>>>;
type MovingLease<'a> = Pin<Box<dyn Future<Output = Result<Moved, Error>> + 'a>>;

/// A lease with a new PublicIP.
struct Moved {
    lease: Lease,
    /// The claim to that.
    claimed: Claiming,
}

/// A daemon that has its lease.
struct Run<'a> {
    settings: &'a Settings,
    network: Network,
    kernel: Kernel,
    external: External,
    /// What was chosen at the start. It is gone back to when it is there again.
    first: External,
    backend: Box<dyn Backend>,
    blackhole: Blackhole,
    lease: Lease,
    /// `None` until the registry has told.
    picture: Option<Picture>,
    /// Where the watch of the leases learns this host's addresses from.
    here: watch::Sender<Vec<Ipv4Net>>,
    board: &'a Board,
    /// Whether the traffic rules are in place.
    ruled: bool,
    ready: bool,
    /// Whether the daemon has given up what it needed for setting up.
    settled: bool,
    /// Whether another daemon is to end for this one.
    stage: Stage,
    /// What a new daemon was offered to go on with: descriptors of this generation, and the lease.
    offered: Option<(u64, Lease)>,
    supervisor: &'a RefCell<Supervisor>,
    /// Of which generation the descriptors are that the supervisor keeps.
    parked: Option<u64>,
    /// The external interface's coming and going.
    interface: Outage,
    /// Since when its address has been away, or a better one has been there.
    away_since: Option<Instant>,
    /// When something is to be looked at again.
    again: Option<Instant>,
    /// Whether the subnet file says what is no longer so.
    file_is_due: bool,
    file: Outage,
    pace: Pace,
}

impl Run<'_> {
    /// Lets the backend serve the peers. What is to be carried to them has waited till then.
    fn apply(&mut self) -> Result<(), Error> {
        let Some(picture) = &self.picture else { return Ok(()) };
        self.backend.apply(picture)?;
        if self.stage != Stage::Preparing {
            self.backend.resume()?;
        }
        self.park();
        let Some(picture) = &self.picture else { return Ok(()) };
        self.board.peers(Arc::clone(&picture.peers));
        self.become_ready();
        Ok(())
    }

    /// A worker has ended by itself. A device that is gone is the backend's to make again.
    fn engine_failed(&mut self, failure: Failure) -> Result<(), Error> {
        match failure {
            Failure::DeviceGone => {
                self.backend.recheck();
                self.apply()
            }
            Failure::Broken(reason) => Err(Error::Engine(reason)),
        }
    }

    /// Lets packets come, once the rules and the first picture of the peers are in place.
    fn become_ready(&mut self) {
        match &self.picture {
            None => self.board.waiting_for("the other hosts' leases"),
            Some(_) if !self.ruled => self.board.waiting_for("the traffic rules"),
            Some(_) if self.stage != Stage::Alone => self.board.waiting_for("the other flanneld to hand over"),
            Some(picture) if !self.ready => {
                let peers = picture.peers.len();
                if !self.settled {
                    self.settled = true;
                    self.settings.sandbox.settle(self.needs());
                    if let Err(error) = priority::step_back() {
                        warn!("the control plane lets nobody go first: {error}");
                    }
                }
                self.keep_file();
                if self.file_is_due {
                    self.board.waiting_for("the subnet file to be written");
                    return;
                }
                self.ready = true;
                self.board.ready();
                self.supervisor.borrow().tell_ready();
                let subnets = self.lease.subnets.to_cidrs();
                info!("ready: subnet {subnets}, {peers} peer(s)");
            }
            Some(_) => {}
        }
    }

    /// Lets no more packets out: their source would be another host's, or nobody's.
    fn let_go(&mut self) {
        // The daemon that carries them sees to that itself.
        if self.stage == Stage::Preparing {
            return;
        }
        // The udp backend's device goes with it; routes in the kernel would stay.
        if let Err(error) = self.backend.apply(&Picture::complete(PeerSet::new())) {
            warn!("{error}; packets may still leave with addresses of a subnet that is another host's");
        }
    }

    /// What serving takes from now on, as far as it differs.
    fn needs(&self) -> Needs {
        let udp = match self.network.backend() {
            network::Backend::Udp(udp) => Some(udp),
            _ => None,
        };
        Needs {
            raw_sockets: udp.is_some() || rules::may_ask_by_raw_socket(),
            port: udp.map(|udp| udp.port),
            io_uring: udp.is_some() && self.settings.udp.io.way() == Way::Uring,
        }
    }

    fn notice(&mut self, changes: &[Change]) {
        let of_interfaces =
            |change: &Change| matches!(change, Change::Link { .. } | Change::Address { .. } | Change::Lost);
        if self.backend.notice(changes) || self.blackhole.is_hit(changes) || changes.iter().any(of_interfaces) {
            self.pace.has_news(Instant::now());
        }
    }

    /// Looks at the external interface, and lets the backend look at the kernel. What the lease is to say, if it has to say
    /// something else from now on.
    fn look(&mut self, look: Look) -> Result<Option<LeaseValue>, Error> {
        if look == Look::Recheck {
            self.backend.recheck();
        }
        let news = self.follow_interface()?;
        let here = self.kernel.ipv4_addresses()?;
        self.here.send_if_modified(|known| {
            let changed = *known != here;
            if changed {
                *known = here;
            }
            changed
        });
        if self.file_is_due && self.ready {
            self.keep_file();
        }
        self.blackhole.keep(&mut self.kernel);
        self.settings.sandbox.tell_of_refusals();
        self.apply()?;
        self.pace.looked(look, Instant::now());
        Ok(news)
    }

    fn look_again_at(&mut self, then: Instant) {
        self.again = Some(self.again.map_or(then, |again| again.min(then)));
    }

    fn follow_interface(&mut self) -> Result<Option<LeaseValue>, Error> {
        let now = match external::again(&mut self.kernel, &self.settings.external, &self.external, &self.first) {
            Ok(now) => now,
            Err(error) => {
                // The pause is the kernel's next news.
                self.interface.failed(&error.to_string());
                return Ok(None);
            }
        };
        if now == self.external {
            self.interface.over();
            self.away_since = None;
            return Ok(None);
        }
        if now.address != self.external.address {
            let since = *self.away_since.get_or_insert(Instant::now());
            if since.elapsed() < AWAY {
                self.look_again_at(since + AWAY);
                return Ok(None);
            }
        }
        self.away_since = None;
        let mtu = self.backend.mtu();
        if let Err(error) = self.backend.adapt(&now) {
            self.interface.failed(&error.to_string());
            return Ok(None);
        }
        self.interface.over();
        info!(
            "the external interface {} has changed: index {}, address {}, MTU {}; before: {}, index {}, address {}, MTU {}",
            now.name,
            now.index,
            now.address,
            now.mtu,
            self.external.name,
            self.external.index,
            self.external.address,
            self.external.mtu
        );
        let before = std::mem::replace(&mut self.external, now);
        self.board.external(&self.external);
        self.tell_of_backend();
        if self.backend.mtu() != mtu && self.ready {
            self.file_is_due = true;
            warn!(
                "containers may now send packets of {} bytes, and not of {mtu}: restart Docker, or what else reads {}, so that \
                 they learn of it",
                self.backend.mtu(),
                self.settings.subnet_file.display()
            );
        }
        let public_ip = self.external.public_ip;
        Ok((public_ip != before.public_ip).then(|| LeaseValue {
            public_ip,
            ..self.lease.value.clone()
        }))
    }

    fn tell_of_backend(&self) {
        if let Some(report) = self.backend.report() {
            self.board.backend(report);
        }
    }

    /// Writes the subnet file, later again if that fails: a full or read-only /run is no reason to stop what works.
    fn keep_file(&mut self) {
        match self.write_subnet_file() {
            Ok(()) => {
                self.file.over();
                self.file_is_due = false;
            }
            Err(error) => {
                self.file_is_due = true;
                let pause = self.file.failed(&observe::chain(&error));
                self.look_again_at(Instant::now() + pause);
            }
        }
    }

    fn write_subnet_file(&self) -> Result<(), WriteError> {
        let subnets = self.lease.subnets;
        let file = SubnetFile {
            ipv4: self.network.ipv4().map(|plan| Share {
                network: plan.network(),
                subnet: subnets.v4(),
            }),
            ipv6: self.network.ipv6().zip(subnets.v6()).map(|(plan, subnet)| Share {
                network: plan.network(),
                subnet,
            }),
            mtu: self.backend.mtu(),
            ip_masq: self.settings.rules.masquerade,
        };
        let path = &self.settings.subnet_file;
        match file.write_atomically(path) {
            Ok(()) => info!("wrote {}", path.display()),
            // As after a restart.
            Err(error) if file.is_at(path) => warn!("{error}; but it says already what it has to"),
            Err(error) => return Err(error),
        }
        Ok(())
    }
}

/// Claims another PublicIP, and publishes it in this host's lease.
async fn move_lease(
    settings: &Settings,
    claims: &Claims,
    own: Lease,
    addresses: &OwnAddresses,
    value: LeaseValue,
) -> Result<Moved, Error> {
    // An address that comes back has its claim still.
    let held = claims
        .borrow()
        .iter()
        .find(|held| held.public_ip() == value.public_ip)
        .cloned();
    let claimed = match held {
        Some(held) => Claiming::Done(Some(held)),
        None => claim_after_others(&settings.registry, value.public_ip, claims).await?,
    };
    let published = publish(&*settings.registry, &own, addresses, &value).await;
    Ok(Moved {
        lease: published.map_err(AcquireError::from)?,
        claimed,
    })
}

/// The running daemon, if it is to hand over.
async fn predecessor(settings: &Settings) -> Result<Option<Predecessor>, heir::Error> {
    if !settings.handover {
        return Ok(None);
    }
    let path = handover::beside(&settings.status_socket);
    let found = Predecessor::find(&path).await?;
    if found.is_none() {
        info!(
            "no flanneld runs that listens at {}: there is nothing to take over",
            path.display()
        );
    }
    Ok(found)
}

/// What an earlier run has written into the subnet file.
fn previous(settings: &Settings) -> Previous {
    Previous::read(&settings.subnet_file).unwrap_or_else(|error| {
        let file = settings.subnet_file.display();
        warn!("cannot read {file}, taking no subnet from it: {error}");
        Previous::default()
    })
}

/// Waits for a configuration; an invalid one is an error at once.
async fn configuration(registry: &dyn Registry) -> Result<(Network, String), Error> {
    let mut outage = Outage::of("reading the network's configuration");
    let mut missing_said = false;
    loop {
        match network::load_with_text(registry).await {
            Ok((parsed, text)) => {
                outage.over();
                for warning in &parsed.warnings {
                    warn!("{warning}");
                }
                return Ok((parsed.network, text));
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

/// Containers keep their addresses until somebody gives them others.
fn warn_of_renumbering(settings: &Settings, previous: &Previous, own: &Own) {
    let now = own.lease.subnets.v4();
    if let Some(before) = previous.subnet
        && before != now
    {
        warn!(
            "this host's subnet is {now}, and was {before} in the run before: containers are cut off until Docker, or what else \
             reads {}, is started again",
            settings.subnet_file.display()
        );
    }
}

fn backend_of(
    network: &Network,
    external: &External,
    overlays: &Overlays,
    settings: &Settings,
    left: Descriptors,
    failures: mpsc::UnboundedSender<Failure>,
    known_as: Option<&Value>,
) -> Result<Box<dyn Backend>, backend::Error> {
    let kind = network.backend().kind();
    if network.ipv6().is_some() && kind != BackendKind::Udp {
        return Err(backend::Error::DualStack(kind));
    }
    Ok(match network.backend() {
        network::Backend::Udp(udp) => {
            let sandbox = settings.sandbox.clone();
            Box::new(udp::Udp::new(
                external,
                udp.clone(),
                settings.udp,
                left,
                failures,
                sandbox,
            )?)
        }
        network::Backend::Vxlan(vxlan) => Box::new(Vxlan::new(external, vxlan.clone(), overlays, known_as)?),
        network::Backend::HostGw => Box::new(HostGw::new(external, overlays)?),
    })
}

/// Takes this host's lease, or goes on with that of the daemon `before`, as long as it takes the registry to answer; where there is
/// something remembered it takes the place of a registry that fails for longer than a moment.
async fn lease(
    registry: &dyn Registry,
    network: &Network,
    value: &LeaseValue,
    previous: &Previous,
    before: Option<&Predecessor>,
    mut remembered: Option<Remembered>,
) -> Result<Leased, Error> {
    let mut outage = Outage::of("taking a lease");
    let begun = Instant::now();
    loop {
        let taken = match before {
            None => acquire::acquire(registry, network, value, previous).await,
            Some(before) => match acquire::go_on(registry, before.subnets(), value).await {
                Ok(None) => return Err(before.lost_its_lease().into()),
                Ok(Some(own)) => Ok(own),
                Err(error) => Err(error.into()),
            },
        };
        match taken {
            Ok(own) => {
                outage.over();
                return Ok(Leased::Taken(own));
            }
            Err(AcquireError::Registry(error)) if error.is_transient() || remembered.is_some() => {
                let pause = outage.failed(&error.to_string());
                if let Some(remembered) = remembered.take_if(|_| begun.elapsed() >= remembered::PATIENCE) {
                    return Ok(Leased::Remembered(remembered));
                }
                sleep(pause).await;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// `left`: how much time the lease has; `None`: it is a reservation.
async fn keep_lease(
    registry: &dyn Registry,
    holding: &Holding,
    left: Option<Duration>,
    margin: Duration,
    board: &Board,
) {
    if let Some((ttl, left)) = holding.now().lease.ttl.zip(left) {
        keep::keep(registry, ttl, left, margin, |left| {
            board.renewed(left);
            holding.renewed(left);
        })
        .await;
    }
    // A reservation needs no keeping; of a lease that ran out the watch tells.
    pending().await
}
