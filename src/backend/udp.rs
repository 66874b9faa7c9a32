//! The `udp` backend: a TUN device, UDP sockets, and the engine between them.
//!
//! Compatible with the original's on the wire: the datagram's payload is the IP packet, sent from the external address and
//! the configured port to the peer's PublicIP and the same port.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    num::NonZeroUsize,
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
        Engine, Failure, IcmpSource, Offloads, Parts,
        admission::{self, Admission},
        counters::Counters,
        io::Way,
        peers::PeerIds,
    },
    kernel::{Kernel, external::External, monitor::Change},
    lease::{record::Lease, watch::PeerSet},
    network::{self, BackendKind, Network, SourceCheck},
    observe::{board::Report, chain, outage::Outage},
    route_table::{Peer, RouteTable, Routes},
    sandbox::Sandbox,
    sys::{
        tun::{self, Tun, TunOffload},
        udp, uring,
    },
};

use super::{
    Backend, Error, LEAST_MTU,
    repairs::Repairs,
    udp_device,
    udp_report::{Facts, overflow},
};

/// The kernel puts the first free number in.
pub(super) const DEVICE: &str = "flannel%d";

/// Outer IPv4 header without options (20 bytes) and UDP header (8).
const OVERHEAD: u32 = 28;

/// The longest IPv4 packet (RFC 791): loopback has a larger MTU.
const LONGEST_PACKET: u32 = 65_535;

/// How long, and how often, a port that is taken is tried again: the kernel closes the files of a killed daemon that has used
/// io_uring some 20 ms after its end ([`crate::sys::uring`]), on a busy machine later.
const PORT_PATIENCE: Duration = Duration::from_millis(500);
const PORT_RETRY: Duration = Duration::from_millis(10);

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
    /// A queue for each worker; plain where the kernel has no multi-queue.
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
    sockets: Vec<Arc<[UdpSocket]>>,
    /// What it was started with.
    started: Option<(Network, Lease)>,
    /// `None` also while the device cannot be made again.
    running: Option<Running>,
    /// What the workers have counted, on which those of the next engine go on.
    counters: Vec<Arc<Counters>>,
    repairs: Repairs,
    /// What is told, of the engine that runs or of the last one that did.
    facts: Option<Arc<ArcSwap<Facts>>>,
    /// Whether others may have changed the device.
    unsure: bool,
    trouble: Outage,
    /// How long to wait before what did not work is tried again.
    again_after: Option<Duration>,
}

/// What there is once the device is set up.
struct Running {
    /// Stops when it is dropped, and the device goes with it.
    engine: Engine,
    /// The device's.
    index: u32,
    /// When the device was made.
    since: Instant,
    facts: Arc<Facts>,
}

impl Udp {
    /// Takes the tunnel's port on the external address. Workers that cannot go on say why through `failures`; `sandbox` confines
    /// them.
    ///
    /// # Errors
    /// When the port is in use, or the external MTU is too small.
    pub fn new(
        external: &External,
        configuration: network::Udp,
        options: Options,
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
        let sockets = bind_on(external, &configuration, workers)?;
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
            started: None,
            running: None,
            counters: Vec::new(),
            repairs: Repairs::default(),
            facts: None,
            unsure: false,
            trouble: Outage::of("looking after the TUN device"),
            again_after: None,
        })
    }

    fn open_queues(&self) -> io::Result<(Tun, TunOffload)> {
        if self.options.offload {
            tun::open_offload(DEVICE, self.workers)
        } else {
            tun::open_multi_queue(DEVICE, self.workers).map(|device| (device, TunOffload::None))
        }
    }

    /// Opens the TUN device, by the plain path where the fast one is refused.
    fn open_device(&mut self) -> Result<(Tun, TunOffload), Error> {
        let opened = match self.options.tun {
            TunMode::Plain => tun::open_plain(DEVICE).map(|device| (device, TunOffload::None)),
            TunMode::Auto => self.open_queues().or_else(|error| {
                if error.raw_os_error() != Some(libc::EINVAL) {
                    return Err(error);
                }
                warn!("the kernel refuses a TUN device with several queues ({error}): using one queue and one worker");
                self.workers = 1;
                self.sockets.truncate(1);
                tun::open_plain(DEVICE).map(|device| (device, TunOffload::None))
            }),
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

    fn apply(&mut self, peers: &PeerSet) -> Result<(), Error> {
        self.look_after_device();
        let port = self.configuration.port;
        let mut ids = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        let routes = peers.values().flat_map(|lease| {
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
        let Some(running) = &self.running else { return false };
        let overlay = self.started.as_ref().and_then(|(network, _)| network.ipv4());
        self.unsure |= changes.iter().any(|change| match change {
            Change::Link { index, .. } => *index == running.index,
            Change::Address { link, .. } => *link == running.index,
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

    /// Another address needs other sockets, and so another engine: packets are lost until it runs. All else is changed in place.
    fn adapt(&mut self, external: &External) -> Result<(), Error> {
        let mtu = mtu_over(external)?;
        if external.address != self.external.address {
            let sockets = bind_on(external, &self.configuration, self.workers)?;
            self.stop();
            self.sockets = sockets;
            self.external = external.clone();
            self.mtu = mtu;
            self.look_after_device();
            return Ok(());
        }
        if let Some(running) = &mut self.running
            && mtu != self.mtu
        {
            let mut kernel = Kernel::open()?;
            if kernel.links()?.iter().any(|link| link.index == running.index) {
                kernel.set_mtu(running.index, mtu)?;
            }
            running.facts = Arc::new(Facts {
                mtu,
                ..(*running.facts).clone()
            });
            let facts = Arc::clone(&running.facts);
            self.tell(&facts);
        }
        self.external = external.clone();
        self.mtu = mtu;
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
    /// Makes the device, and an engine on it.
    fn make(&mut self, network: &Network, own: &Lease) -> Result<(), Error> {
        let (device, tun_offload) = self.open_device()?;
        let index = udp_device::configure(
            &mut Kernel::open()?,
            &device.name,
            self.mtu,
            &self.external,
            network,
            own,
        )?;
        let offload = self.options.offload;
        let offloads = Offloads {
            tun_tcp: tun_offload >= TunOffload::Tcp,
            tun_udp: tun_offload == TunOffload::TcpUdp,
            udp_segment: offload && self.sockets.iter().flat_map(|sockets| &**sockets).all(udp::can_segment),
            udp_gro: offload && self.sockets.iter().all(|sockets| udp::enable_gro(&sockets[0]).is_ok()),
        };
        let (way, refused) = choose_way(self.options.io, uring::probe);
        if let Some(reason) = refused {
            warn!("cannot use io_uring: {reason}; packets are moved with system calls (--io=mmsg) instead");
        }
        let failures = self.failures.clone();
        let parts = Parts {
            queues: device.queues,
            sockets: self.sockets.clone(),
            counters: self.counters.clone(),
            routes: self.routes.clone(),
            admission: Admission::new(source_check(self.configuration.source_check), own.subnets.nets()),
            icmp_source: icmp_source(own),
            offloads,
            way,
            pin: self.options.pin,
            busy_poll: self.options.busy_poll,
        };
        // Nobody listens any more when the daemon is ending.
        let failed = move |failure| drop(failures.send(failure));
        let confined = self.sandbox.workers(way == Way::Uring);
        let engine = Engine::start(parts, move || confined.confine(), failed).map_err(Error::Engine)?;
        info!(
            "{} is up: address {}, MTU {}, {} worker{}, UDP {}:{} on {}, I/O {way}, offloads: {offloads}",
            device.name,
            own.subnets.v4().addr(),
            self.mtu,
            self.workers,
            if self.workers == 1 { "" } else { "s" },
            self.external.address,
            self.configuration.port,
            self.external.name,
        );
        let facts = Arc::new(Facts {
            device: device.name,
            mtu: self.mtu,
            way,
            options: self.options,
            observer: engine.observer().clone(),
            peers: Arc::clone(&self.peers),
            repairs: self.repairs.clone(),
        });
        self.tell(&facts);
        self.running = Some(Running {
            engine,
            index,
            since: Instant::now(),
            facts,
        });
        Ok(())
    }

    /// Looks whether the device is still as it was set up, if that is not certain, and makes it again if it is gone.
    fn look_after_device(&mut self) {
        let Some((network, own)) = self.started.clone() else {
            return;
        };
        if self.running.is_some() && !self.unsure {
            return;
        }
        self.again_after = None;
        match self.put_right(&network, &own) {
            Ok(()) => {
                self.unsure = self.again_after.is_some();
                self.trouble.over();
            }
            Err(error) => self.again_after = Some(self.trouble.failed(&chain(&error))),
        }
    }

    fn put_right(&mut self, network: &Network, own: &Lease) -> Result<(), Error> {
        if let Some(running) = &self.running {
            let mut kernel = Kernel::open()?;
            let device = &running.facts.device;
            if udp_device::put_right(
                &mut kernel,
                running.index,
                device,
                self.mtu,
                network,
                own,
                &self.repairs,
            )? {
                return Ok(());
            }
            if let Some(left) = LIFETIME.checked_sub(running.since.elapsed()) {
                self.again_after = Some(left);
                return Ok(());
            }
            warn!(
                "the TUN device {device} was removed: making it again, as packets are lost without it; to be rid of it, stop \
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
        if let Some(Running { engine, .. }) = self.running.take() {
            let observer = engine.observer().clone();
            drop(engine);
            self.counters = observer.counters();
        }
    }

    fn tell(&mut self, facts: &Arc<Facts>) {
        match &self.facts {
            Some(told) => told.store(Arc::clone(facts)),
            None => self.facts = Some(Arc::new(ArcSwap::new(Arc::clone(facts)))),
        }
    }

    /// What the engine has done, for the log.
    fn tell_counters(&self) {
        let Some(Running { facts, .. }) = &self.running else {
            return;
        };
        let device = &facts.device;
        let overflow = overflow(device).map_or(String::new(), |packets| {
            format!("; {device}'s queue overflowed {packets} times")
        });
        info!("{}{overflow}", facts.observer.snapshot().summary());
    }
}

fn bind_on(external: &External, configuration: &network::Udp, workers: usize) -> Result<Vec<Arc<[UdpSocket]>>, Error> {
    let address = SocketAddr::new(external.address.into(), configuration.port);
    bind(address, workers, configuration.source_ports.get()).map_err(|source| Error::Bind {
        address,
        hint: match source.kind() {
            io::ErrorKind::AddrInUse => {
                "another process has the port, perhaps another flanneld; stop it, or give this network another Backend.Port"
            }
            io::ErrorKind::AddrNotAvailable => "this host does not have the address any more",
            _ => "the system refuses",
        },
        source,
    })
}

/// For each worker the tunnel's socket and, with more than one source port, one for each of the others. All workers have the same
/// ports, so that a flow keeps its own whichever worker carries it.
fn bind(address: SocketAddr, workers: usize, source_ports: u8) -> io::Result<Vec<Arc<[UdpSocket]>>> {
    let begun = Instant::now();
    let tunnel = loop {
        match udp::bind_group(address, workers) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && begun.elapsed() < PORT_PATIENCE => {
                thread::sleep(PORT_RETRY);
            }
            bound => break bound?,
        }
    };
    let mut sockets: Vec<Vec<UdpSocket>> = tunnel.into_iter().map(|socket| vec![socket]).collect();
    for _ in 1..source_ports {
        let source = udp::bind_source(address.ip(), workers)?;
        sockets
            .iter_mut()
            .zip(source)
            .for_each(|(of_worker, socket)| of_worker.push(socket));
    }
    Ok(sockets.into_iter().map(Arc::from).collect())
}

/// The way that the user wants, or the one that every kernel has, with the reason, where that is refused.
fn choose_way<E>(wanted: IoMode, probe: impl FnOnce() -> Result<(), E>) -> (Way, Option<E>) {
    let wanted = match wanted {
        IoMode::Auto => BEST_WAY,
        IoMode::Mmsg => Way::Mmsg,
        IoMode::Uring => Way::Uring,
    };
    match wanted {
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
