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
    time::Duration,
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use tokio::sync::mpsc::UnboundedSender;
use tracing::{info, warn};

use crate::{
    engine::{
        Engine, IcmpSource, Observer, Offloads, Parts, Sockets,
        admission::{self, Admission},
        io::Way,
        peers::PeerIds,
        snapshot::WorkerSnapshot,
    },
    kernel::{Kernel, external::External, monitor::Change},
    lease::{record::Lease, watch::PeerSet},
    network::{self, BackendKind, Network, SourceCheck},
    observe::{board::Report, chain, outage::Outage, status::Counts},
    route_table::{Peer, RouteTable, Routes},
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
    failures: UnboundedSender<String>,
    /// For each worker.
    sockets: Vec<Sockets>,
    /// A device's queues that an earlier process has left.
    left: Vec<OwnedFd>,
    /// Whether that process uses them still.
    shared: bool,
    started: Option<Started>,
    engine: Option<Engine>,
    /// Whether others may have changed the device.
    unsure: bool,
    trouble: Outage,
}

/// What there is once the device is set up.
struct Started {
    network: Network,
    own: Lease,
    /// The device goes with its last queue.
    device: Tun,
    index: u32,
    tun_offload: TunOffload,
    facts: Arc<Facts>,
}

impl Udp {
    /// Takes the tunnel's port on the external address, and of what an earlier process has `left` what fits. Workers that cannot
    /// go on say why through `failures`.
    ///
    /// # Errors
    /// When the port is in use, or the external MTU is too small.
    pub fn new(
        external: &External,
        configuration: network::Udp,
        options: Options,
        left: Descriptors,
        failures: UnboundedSender<String>,
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
            if left.queues.len() != workers {
                info!(
                    "going on with the {} worker(s) of the running flanneld; a restart makes them {workers}",
                    left.queues.len()
                );
            }
            left.queues.len()
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
            sockets,
            left: left.queues,
            shared: left.shared,
            started: None,
            engine: None,
            unsure: false,
            trouble: Outage::of("looking after the TUN device"),
        })
    }

    /// The device that was left, if it fits, or else a new one.
    fn device(&mut self, kernel: &mut Kernel, own: &Lease) -> Result<(Tun, TunOffload), Error> {
        let left = std::mem::take(&mut self.left);
        if !left.is_empty() {
            match udp_device::adopt(kernel, left, &self.options, self.workers, own) {
                Ok(device) => return Ok(device),
                Err((why, _)) if self.shared => return Err(Error::Misfit(why)),
                Err((why, index)) => {
                    info!("making the TUN device anew, since that of the run before does not fit: {why}");
                    // Whoever else keeps it would keep its route, too.
                    index.map_or(Ok(()), |index| kernel.remove_link(index))?;
                }
            }
        }
        let (device, offload) = udp_device::open(&self.options, self.workers)?;
        self.workers = device.queues.len();
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
        let Some(Started { own, facts, .. }) = &self.started else {
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
        let mut kernel = Kernel::open()?;
        let (device, tun_offload) = self.device(&mut kernel, own)?;
        let index = udp_device::configure(&mut kernel, &device.name, self.mtu, &self.external, network, own)?;
        let (way, refused) = choose_way(self.options.io, uring::probe);
        if let Some(reason) = refused {
            warn!("cannot use io_uring: {reason}; packets are moved with system calls (--io=mmsg) instead");
        }
        let facts = Arc::new(Facts {
            device: device.name.clone(),
            mtu: self.mtu,
            way,
            options: self.options,
            observer: Observer::new(&self.sockets, self.offloads(tun_offload), &[]),
            peers: Arc::clone(&self.peers),
            repairs: Repairs::default(),
        });
        self.started = Some(Started {
            network: network.clone(),
            own: own.clone(),
            device,
            index,
            tun_offload,
            facts,
        });
        self.say_up();
        Ok(())
    }

    fn resume(&mut self) -> Result<(), Error> {
        let (None, Some(started)) = (&self.engine, &self.started) else {
            return Ok(());
        };
        let parts = Parts {
            queues: started.device.queues.clone(),
            observer: started.facts.observer.clone(),
            routes: self.routes.clone(),
            admission: Admission::new(
                source_check(self.configuration.source_check),
                started.own.subnets.nets(),
            ),
            icmp_source: icmp_source(&started.own),
            way: started.facts.way,
            pin: self.options.pin,
            busy_poll: self.options.busy_poll,
        };
        let failures = self.failures.clone();
        // Nobody listens any more when the daemon is ending.
        let engine = Engine::start(parts, move |reason| drop(failures.send(reason))).map_err(Error::Engine)?;
        self.engine = Some(engine);
        Ok(())
    }

    fn pause(&mut self) {
        self.engine = None;
    }

    fn descriptors(&self) -> io::Result<Descriptors> {
        let queues = self.started.iter().flat_map(|started| &started.device.queues);
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

    fn count_from(&mut self, before: &Counts) {
        let Some(started) = &mut self.started else { return };
        let workers: Vec<WorkerSnapshot> = before.workers.iter().map(worker_before).collect();
        let observer = Observer::new(&self.sockets, started.facts.observer.offloads(), &workers);
        let mut ids = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        for (host, traffic) in &before.peers {
            observer.add_peer(&peer_before(ids.id(*host), traffic));
        }
        drop(ids);
        started.facts.repairs.count_from(&before.repairs);
        started.facts = Arc::new(Facts {
            observer,
            ..(*started.facts).clone()
        });
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
        let Some(started) = &self.started else { return false };
        let overlay = started.network.ipv4();
        self.unsure |= changes.iter().any(|change| match change {
            Change::Link { name, .. } => *name == started.facts.device,
            Change::Address { link, .. } => *link == started.index,
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

    /// Another address needs other sockets, and so other workers: packets wait in the device until these run.
    fn adapt(&mut self, external: &External) -> Result<(), Error> {
        let mtu = mtu_over(external)?;
        let sockets = if external.address == self.external.address {
            None
        } else {
            Some(udp_sockets::bind_on(external, &self.configuration, self.workers, Vec::new())?)
        };
        if mtu != self.mtu
            && let Some(started) = &mut self.started
        {
            let mut kernel = Kernel::open()?;
            if let Some(link) = kernel.links()?.iter().find(|link| link.name == started.device.name) {
                kernel.set_mtu(link.index, mtu)?;
            }
            started.facts = Arc::new(Facts {
                mtu,
                ..(*started.facts).clone()
            });
        }
        self.external = external.clone();
        self.mtu = mtu;
        if let Some(sockets) = sockets {
            self.exchange(sockets).inspect_err(|error| {
                // There is no way back: the daemon ends, and its supervisor tries again.
                drop(self.failures.send(error.to_string()));
            })?;
        }
        Ok(())
    }

    fn report(&self) -> Option<Report> {
        let facts = Arc::clone(&self.started.as_ref()?.facts);
        Some(Arc::new(move || facts.report()))
    }
}

impl Drop for Udp {
    fn drop(&mut self) {
        self.tell_counters();
    }
}

impl Udp {
    /// Goes on with other sockets; what has come to those before is carried first.
    fn exchange(&mut self, sockets: Vec<Sockets>) -> Result<(), Error> {
        let was_running = self.engine.is_some();
        self.pause();
        self.sockets = sockets;
        let Some(tun_offload) = self.started.as_ref().map(|started| started.tun_offload) else {
            return Ok(());
        };
        let offloads = self.offloads(tun_offload);
        if let Some(started) = &mut self.started {
            started.facts = Arc::new(Facts {
                observer: started.facts.observer.on_others(&self.sockets, offloads),
                ..(*started.facts).clone()
            });
        }
        if was_running {
            self.resume()?;
        }
        self.say_up();
        Ok(())
    }

    /// Looks whether the device is still as it was set up, if that is not certain.
    fn look_after_device(&mut self) {
        let (true, Some(started)) = (self.unsure, &self.started) else {
            return;
        };
        let Started { network, own, .. } = started;
        let Facts { device, repairs, .. } = &*started.facts;
        let looked = Kernel::open()
            .and_then(|mut kernel| udp_device::put_right(&mut kernel, device, self.mtu, network, own, repairs));
        match looked {
            Ok(()) => {
                self.unsure = false;
                self.trouble.over();
            }
            // The next news, or the next full look, tries again.
            Err(error) => drop(self.trouble.failed(&chain(&error))),
        }
    }

    /// What the engine has done, for the log.
    fn tell_counters(&self) {
        let Some(Started { facts, .. }) = &self.started else {
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
