//! The `udp` backend: a TUN device, UDP sockets, and the engine between them.
//!
//! Compatible with the original's on the wire: the datagram's payload is the IP packet, sent from the external address and
//! the configured port to the peer's PublicIP and the same port.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    num::NonZeroUsize,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use tokio::sync::mpsc::UnboundedSender;
use tracing::{info, warn};

use crate::{
    engine::{
        self, Engine, Failure, IcmpSource, Observer, Offloads, Parts, Sockets,
        admission::{self, Admission},
        io::Way,
        peers::PeerIds,
        snapshot::WorkerSnapshot,
    },
    kernel::{Kernel, external::External, monitor::Change},
    lease::{record::Lease, watch::Picture},
    network::{self, BackendKind, Network, SourceCheck},
    observe::{board::Report, chain, outage::Outage, status::Counts},
    route_table::{Peer, RouteTable, Routes},
    sandbox::Sandbox,
    sys::{
        tun::{Tun, TunOffload},
        udp, uring,
    },
};

use super::{
    Backend, Descriptors, Error, LEAST_MTU,
    repairs::Repairs,
    udp_device,
    udp_report::{Facts, overflow, peer_before, worker_before},
    udp_sockets,
};

/// The kernel puts the first free number in.
pub(super) const DEVICE: &str = "flannel%d";

/// Outer IPv4 header without options (20 bytes) and UDP header (8).
const OVERHEAD: u32 = 28;

/// The longest IPv4 packet (RFC 791): loopback has a larger MTU.
const LONGEST_PACKET: u32 = 65_535;

/// More workers than this by default would only wait for each other; `--workers` goes further.
const MOST_DEFAULT_WORKERS: usize = 16;

/// The way to move packets that is the better one where the kernel has both: the benchmark decides.
const BEST_WAY: Way = Way::Mmsg;

/// How long a device lives at least before it is made again when somebody removes it: who does so each time must not keep this
/// host busy.
const LIFETIME: Duration = Duration::from_secs(1);

/// How the TUN device is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TunMode {
    /// Queues for each worker; plain where the kernel has no multi-queue.
    #[default]
    Auto,
    /// One queue, through the `tun-tap` crate.
    Plain,
}

/// How packets are moved between the TUN device, the workers and the sockets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum IoMode {
    /// Whichever is the faster of those that the kernel lets us have.
    #[default]
    Auto,
    /// System calls, for batches of packets where there are such: `recvmmsg`, `sendmmsg`.
    Mmsg,
    /// `io_uring`: requests and answers through memory that is shared with the kernel.
    Uring,
}

impl IoMode {
    /// The way that is tried first.
    pub fn way(self) -> Way {
        match self {
            Self::Auto => BEST_WAY,
            Self::Mmsg => Way::Mmsg,
            Self::Uring => Way::Uring,
        }
    }
}

/// What the user chose.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Number of workers; from the processors by default.
    pub workers: Option<NonZeroUsize>,
    /// Whether the kernel may hand over and take packets in bulk.
    pub offload: bool,
    /// How the TUN device is opened.
    pub tun: TunMode,
    /// How packets are moved.
    pub io: IoMode,
    /// Whether each worker stays on a processor of its own.
    pub pin: bool,
    /// How long a worker looks for packets before it sleeps; 0: it sleeps at once.
    pub busy_poll: Duration,
}

/// The `udp` backend.
pub struct Udp {
    external: External,
    configuration: network::Udp,
    options: Options,
    workers: usize,
    mtu: u32,
    routes: Routes,
    peers: Arc<Mutex<PeerIds>>,
    failures: UnboundedSender<Failure>,
    sandbox: Sandbox,
    /// Each worker's. They outlive the engine: what comes while another one is made waits in them.
    sockets: Vec<Sockets>,
    /// A device's queues that an earlier process has left.
    left: Vec<OwnedFd>,
    /// Whether that process uses them still.
    shared: bool,
    /// What it was started with.
    started: Option<(Network, Lease)>,
    /// `None` also while it cannot be made again.
    device: Option<Device>,
    /// Whether packets are to be carried.
    carrying: bool,
    /// Whether they have been, so that whatever the system refuses now is tried again.
    has_carried: bool,
    engine: Option<Engine>,
    /// Where the workers count, on which those of the next engine go on.
    observer: Option<Observer>,
    repairs: Repairs,
    /// What is told, of the engine that runs or of the last one that did.
    facts: Option<Arc<ArcSwap<Facts>>>,
    /// How often the descriptors have changed.
    generation: u64,
    /// Whether others may have changed the device.
    unsure: bool,
    trouble: Outage,
    /// How long to wait before what did not work is tried again.
    again_after: Option<Duration>,
}

/// What there is once the device is set up.
struct Device {
    /// It goes with its last queue.
    tun: Tun,
    index: u32,
    tun_offload: TunOffload,
    /// When it was made.
    since: Instant,
    facts: Arc<Facts>,
}

impl Udp {
    /// Takes the tunnel's port on the external address, and of what an earlier process has `left` what fits. Workers that cannot
    /// go on say why through `failures`; `sandbox` confines them.
    ///
    /// # Errors
    /// When the port is in use, or the external MTU is too small.
    pub fn new(
        external: &External,
        configuration: network::Udp,
        options: Options,
        left: Descriptors,
        failures: UnboundedSender<Failure>,
        sandbox: Sandbox,
    ) -> Result<Self, Error> {
        let mtu = mtu_over(external)?;
        let workers = match (options.tun, options.workers) {
            (TunMode::Plain, _) => 1,
            (TunMode::Auto, Some(chosen)) => chosen.get(),
            (TunMode::Auto, None) => thread::available_parallelism()
                .map_or(1, NonZeroUsize::get)
                .min(MOST_DEFAULT_WORKERS),
        };
        let workers = if left.shared && !left.queues.is_empty() {
            // The kernel would give a new queue its part of the flows before there is a worker for it.
            let running = left.workers().clamp(1, left.queues.len());
            if running != workers {
                info!("going on with the {running} worker(s) of the running flanneld; a restart makes them {workers}");
            }
            running
        } else {
            workers
        };
        let sockets = udp_sockets::bind_on(external, &configuration, workers, left.sockets)?;
        Ok(Self {
            external: external.clone(),
            configuration,
            options,
            workers,
            mtu,
            routes: Routes::default(),
            peers: Arc::default(),
            failures,
            sandbox,
            sockets,
            left: left.queues,
            shared: left.shared,
            started: None,
            device: None,
            carrying: false,
            has_carried: false,
            engine: None,
            observer: None,
            repairs: Repairs::default(),
            facts: None,
            generation: 0,
            unsure: false,
            trouble: Outage::of("looking after the TUN device"),
            again_after: None,
        })
    }

    /// The device that was left, if it fits, or else a new one.
    fn take_device(&mut self, kernel: &mut Kernel, own: &Lease, way: Way) -> Result<(Tun, TunOffload), Error> {
        let left = std::mem::take(&mut self.left);
        let queues = match self.options.tun {
            TunMode::Plain => 1,
            TunMode::Auto => self.workers * engine::queues_each(way),
        };
        if !left.is_empty() {
            // What lies in a queue that is closed is lost, and a new one would get its part of the flows at once, which the running
            // daemon does not read.
            let most = self.workers * engine::MOST_QUEUES_EACH;
            let queues = match left.len().min(most) {
                kept if self.shared => kept,
                kept => kept.max(queues),
            };
            match udp_device::adopt(kernel, left, &self.options, queues, own) {
                Ok(device) => return Ok(device),
                Err((why, _)) if self.shared => return Err(Error::Misfit(why)),
                Err((why, index)) => {
                    info!("making the TUN device anew, since that of the run before does not fit: {why}");
                    // Whoever else keeps it would keep its route, too.
                    index.map_or(Ok(()), |index| kernel.remove_link(index))?;
                }
            }
        }
        let (device, offload) = udp_device::open(&self.options, queues)?;
        self.workers = self.workers.min(device.queues.len());
        self.sockets.truncate(self.workers);
        Ok((device, offload))
    }

    /// What the kernel does for these sockets and for this device.
    fn offloads(&self, tun_offload: TunOffload) -> Offloads {
        let wanted = self.options.offload;
        let all = self.sockets.iter().flat_map(|sockets| sockets.iter());
        let mut tunnels = self.sockets.iter().map(|sockets| &sockets[0]);
        Offloads {
            tun_tcp: tun_offload >= TunOffload::Tcp,
            tun_udp: tun_offload == TunOffload::TcpUdp,
            udp_segment: wanted && all.into_iter().all(udp::can_segment),
            udp_gro: if wanted {
                tunnels.all(|socket| udp::enable_gro(socket).is_ok())
            } else {
                // An earlier process may have switched it on; a kernel that does not know it has it off.
                tunnels.for_each(|socket| drop(udp::disable_gro(socket)));
                false
            },
        }
    }

    fn say_up(&self) {
        let (Some((_, own)), Some(Device { facts, .. })) = (&self.started, &self.device) else {
            return;
        };
        info!(
            "{} is up: address {}, MTU {}, {} worker{}, UDP {}:{} on {}, I/O {}, offloads: {}",
            facts.device,
            own.subnets.v4().addr(),
            self.mtu,
            self.workers,
            if self.workers == 1 { "" } else { "s" },
            self.external.address,
            self.configuration.port,
            self.external.name,
            facts.way,
            facts.observer.offloads(),
        );
    }
}

impl Backend for Udp {
    fn kind(&self) -> BackendKind {
        BackendKind::Udp
    }

    fn mtu(&self) -> u32 {
        self.mtu
    }

    fn start(&mut self, network: &Network, own: &Lease) -> Result<(), Error> {
        self.started = Some((network.clone(), own.clone()));
        self.make(network, own)
    }

    fn resume(&mut self) -> Result<(), Error> {
        self.carrying = true;
        match self.start_engine() {
            // What has carried packets will do so again.
            Err(error) if self.has_carried => self.try_again(&error),
            started => started?,
        }
        self.has_carried = true;
        Ok(())
    }

    fn pause(&mut self) {
        self.carrying = false;
        self.engine = None;
    }

    fn descriptors(&self) -> io::Result<Descriptors> {
        let queues = self.device.iter().flat_map(|device| &device.tun.queues);
        let queues: io::Result<_> = queues.map(|queue| queue.as_fd().try_clone_to_owned()).collect();
        let ports = self.sockets.first().map_or(0, |sockets| sockets.len());
        let by_port = (0..ports).flat_map(|port| self.sockets.iter().map(move |sockets| &sockets[port]));
        let sockets: io::Result<_> = by_port.map(|socket| socket.as_fd().try_clone_to_owned()).collect();
        Ok(Descriptors {
            queues: queues?,
            sockets: sockets?,
            shared: true,
        })
    }

    fn generation(&self) -> u64 {
        self.generation
    }

    fn count_from(&mut self, before: &Counts) {
        let workers: Vec<WorkerSnapshot> = before.workers.iter().map(worker_before).collect();
        let offloads = self.observer.as_ref().map(Observer::offloads).unwrap_or_default();
        let observer = Observer::new(&self.sockets, offloads, &workers);
        let mut ids = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        for (host, traffic) in &before.peers {
            observer.add_peer(&peer_before(ids.id(*host), traffic));
        }
        drop(ids);
        self.repairs.count_from(&before.repairs);
        self.observe(observer);
    }

    fn apply(&mut self, picture: &Picture) -> Result<(), Error> {
        self.look_after_device();
        let port = self.configuration.port;
        let mut ids = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        let routes = picture.peers.values().flat_map(|lease| {
            let host = lease.value.public_ip.into();
            let peer = Peer {
                addr: SocketAddr::new(host, port),
                id: ids.id(host),
            };
            lease.subnets.nets().map(move |net| (net, peer))
        });
        let table = RouteTable::new(routes);
        self.routes.publish(table);
        Ok(())
    }

    fn notice(&mut self, changes: &[Change]) -> bool {
        let Some(device) = &self.device else { return false };
        let overlay = self.started.as_ref().and_then(|(network, _)| network.ipv4());
        self.unsure |= changes.iter().any(|change| match change {
            Change::Link { index, .. } => *index == device.index,
            Change::Address { link, .. } => *link == device.index,
            Change::Route { found, gone } => {
                *gone && overlay.is_some_and(|plan| found.route.to == IpNet::V4(plan.network()))
            }
            Change::Lost => true,
            Change::Neighbour { .. } | Change::Fdb { .. } => false,
        });
        self.unsure
    }

    fn recheck(&mut self) {
        self.unsure = true;
    }

    fn recheck_after(&self) -> Option<Duration> {
        self.again_after
    }

    /// Another address needs other sockets, and so other workers: packets wait in the device until these run.
    fn adapt(&mut self, external: &External) -> Result<(), Error> {
        let mtu = mtu_over(external)?;
        let sockets = if external.address == self.external.address {
            None
        } else {
            Some(udp_sockets::bind_on(
                external,
                &self.configuration,
                self.workers,
                Vec::new(),
            )?)
        };
        if mtu != self.mtu
            && let Some(device) = &mut self.device
        {
            let mut kernel = Kernel::open()?;
            if kernel.links()?.iter().any(|link| link.index == device.index) {
                kernel.set_mtu(device.index, mtu)?;
            }
            device.facts = Arc::new(Facts {
                mtu,
                ..(*device.facts).clone()
            });
            let facts = Arc::clone(&device.facts);
            self.tell(&facts);
        }
        self.external = external.clone();
        self.mtu = mtu;
        if let Some(sockets) = sockets {
            self.exchange(sockets);
        }
        Ok(())
    }

    fn report(&self) -> Option<Report> {
        let facts = Arc::clone(self.facts.as_ref()?);
        Some(Arc::new(move || facts.load().report()))
    }
}

impl Drop for Udp {
    fn drop(&mut self) {
        self.tell_counters();
    }
}

impl Udp {
    /// Makes the device, or takes the one that was left, and lets the engine run on it if it is to run.
    fn make(&mut self, network: &Network, own: &Lease) -> Result<(), Error> {
        let mut kernel = Kernel::open()?;
        let (way, refused) = choose_way(self.options.io, uring::probe);
        if let Some(reason) = refused {
            warn!("cannot use io_uring: {reason}; packets are moved with system calls (--io=mmsg) instead");
        }
        let (tun, tun_offload) = self.take_device(&mut kernel, own, way)?;
        let index = udp_device::configure(&mut kernel, &tun.name, self.mtu, &self.external, network, own)?;
        let offloads = self.offloads(tun_offload);
        let observer = match &self.observer {
            Some(before) => before.on_others(&self.sockets, offloads),
            None => Observer::new(&self.sockets, offloads, &[]),
        };
        let facts = Arc::new(Facts {
            device: tun.name.clone(),
            mtu: self.mtu,
            way,
            options: self.options,
            observer: observer.clone(),
            peers: Arc::clone(&self.peers),
            repairs: self.repairs.clone(),
        });
        self.device = Some(Device {
            tun,
            index,
            tun_offload,
            since: Instant::now(),
            facts,
        });
        self.generation += 1;
        self.observe(observer);
        self.say_up();
        self.start_engine()
    }

    /// Lets the workers run, if they are to run and do not yet.
    fn start_engine(&mut self) -> Result<(), Error> {
        let (true, None, Some((_, own)), Some(device)) = (self.carrying, &self.engine, &self.started, &self.device)
        else {
            return Ok(());
        };
        let parts = Parts {
            queues: device.tun.queues.clone(),
            sockets: self.sockets.clone(),
            observer: device.facts.observer.clone(),
            routes: self.routes.clone(),
            admission: Admission::new(source_check(self.configuration.source_check), own.subnets.nets()),
            icmp_source: icmp_source(own),
            way: device.facts.way,
            pin: self.options.pin,
            busy_poll: self.options.busy_poll,
        };
        let failures = self.failures.clone();
        // Nobody listens any more when the daemon is ending.
        let failed = move |failure| drop(failures.send(failure));
        let confined = self.sandbox.workers(parts.way == Way::Uring);
        let engine = Engine::start(parts, move || confined.confine(), failed).map_err(Error::Engine)?;
        self.engine = Some(engine);
        Ok(())
    }

    /// Goes on with other sockets. What the workers have in hand is carried first; what still waits in the sockets before is lost.
    fn exchange(&mut self, sockets: Vec<Sockets>) {
        self.engine = None;
        let before = std::mem::replace(&mut self.sockets, sockets);
        self.generation += 1;
        let Some(tun_offload) = self.device.as_ref().map(|device| device.tun_offload) else {
            return;
        };
        let offloads = self.offloads(tun_offload);
        if let Some(observer) = &self.observer {
            self.observe(observer.on_others(&self.sockets, offloads));
        }
        // Asked a last time what it has dropped.
        drop(before);
        self.say_up();
        if let Err(error) = self.start_engine() {
            self.try_again(&error);
        }
    }

    /// The system does not let it for the moment.
    fn try_again(&mut self, error: &Error) {
        self.again_after = Some(self.trouble.failed(&chain(error)));
        self.unsure = true;
    }

    /// Tells of what these workers count.
    fn observe(&mut self, observer: Observer) {
        self.observer = Some(observer.clone());
        if let Some(device) = &mut self.device {
            device.facts = Arc::new(Facts {
                observer,
                ..(*device.facts).clone()
            });
            let facts = Arc::clone(&device.facts);
            self.tell(&facts);
        }
    }

    /// Looks whether the device is still as it was set up, if that is not certain, and makes it again if it is gone.
    fn look_after_device(&mut self) {
        let Some((network, own)) = self.started.clone() else {
            return;
        };
        if self.device.is_some() && !self.unsure {
            return;
        }
        self.again_after = None;
        match self.put_right(&network, &own) {
            Ok(()) => {
                self.unsure = self.again_after.is_some();
                self.trouble.over();
            }
            Err(error) => self.try_again(&error),
        }
    }

    fn put_right(&mut self, network: &Network, own: &Lease) -> Result<(), Error> {
        if let Some(device) = &self.device {
            let mut kernel = Kernel::open()?;
            let name = &device.tun.name;
            if udp_device::put_right(&mut kernel, device.index, name, self.mtu, network, own, &self.repairs)? {
                return self.start_engine();
            }
            if let Some(left) = LIFETIME.checked_sub(device.since.elapsed()) {
                self.again_after = Some(left);
                return Ok(());
            }
            warn!(
                "the TUN device {name} was removed: making it again, as packets are lost without it; to be rid of it, stop \
                 this daemon"
            );
            self.repairs.count("device");
        }
        self.stop();
        self.make(network, own)
    }

    /// Ends the engine, and with it the device.
    fn stop(&mut self) {
        self.tell_counters();
        self.engine = None;
        self.device = None;
    }

    fn tell(&mut self, facts: &Arc<Facts>) {
        match &self.facts {
            Some(told) => told.store(Arc::clone(facts)),
            None => self.facts = Some(Arc::new(ArcSwap::new(Arc::clone(facts)))),
        }
    }

    /// What the engine has done, for the log.
    fn tell_counters(&self) {
        let Some(Device { facts, .. }) = &self.device else {
            return;
        };
        let device = &facts.device;
        let overflow = overflow(device).map_or(String::new(), |packets| {
            format!("; {device}'s queue overflowed {packets} times")
        });
        info!("{}{overflow}", facts.observer.snapshot().summary());
    }
}

/// The way that the user wants, or the one that every kernel has, with the reason, where that is refused.
fn choose_way<E>(wanted: IoMode, probe: impl FnOnce() -> Result<(), E>) -> (Way, Option<E>) {
    match wanted.way() {
        Way::Mmsg => (Way::Mmsg, None),
        Way::Uring => match probe() {
            Ok(()) => (Way::Uring, None),
            Err(reason) => (Way::Mmsg, Some(reason)),
        },
    }
}

fn source_check(configured: SourceCheck) -> admission::SourceCheck {
    match configured {
        SourceCheck::Strict => admission::SourceCheck::Strict,
        SourceCheck::Peer => admission::SourceCheck::Peer,
        SourceCheck::Off => admission::SourceCheck::Off,
    }
}

/// What of the external interface's MTU is left for the packets inside; `None`: too little.
fn overlay_mtu(external: u32) -> Option<u32> {
    external
        .min(LONGEST_PACKET)
        .checked_sub(OVERHEAD)
        .filter(|mtu| *mtu >= LEAST_MTU)
}

fn mtu_over(external: &External) -> Result<u32, Error> {
    overlay_mtu(external.mtu).ok_or_else(|| Error::Mtu {
        interface: external.name.clone(),
        mtu: external.mtu,
        least: LEAST_MTU + OVERHEAD,
    })
}

/// Errors come from the subnet's first host address, which is the containers' gateway. The device's own, the subnet's lowest,
/// is a broadcast address to the containers' kernels before Linux 5.14, which drop packets from it.
fn icmp_source(own: &Lease) -> IcmpSource {
    let first_v4 = |net: Ipv4Net| Ipv4Addr::from(u32::from(net.network()) | 1);
    let first_v6 = |net: Ipv6Net| (u128::from(net.network()) | 1).into();
    IcmpSource {
        v4: first_v4(own.subnets.v4()),
        v6: own.subnets.v6().map(first_v6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn io_uring_is_used_where_it_is_wanted_and_not_refused() {
        let (there, refused) = (|| Ok::<_, &str>(()), || Err("an old kernel"));
        assert_eq!(choose_way(IoMode::Uring, there), (Way::Uring, None));
        assert_eq!(choose_way(IoMode::Uring, refused), (Way::Mmsg, Some("an old kernel")));
        // Not even asked for.
        assert_eq!(choose_way(IoMode::Mmsg, refused), (Way::Mmsg, None));
    }

    #[test]
    fn the_overlays_packets_fit_the_interface_and_a_datagram() {
        assert_eq!(overlay_mtu(1_500), Some(1_472));
        assert_eq!(overlay_mtu(65_536), Some(65_507));
        assert_eq!(overlay_mtu(96), Some(68));
        assert_eq!(overlay_mtu(95), None);
        assert_eq!(overlay_mtu(0), None);
    }
}
