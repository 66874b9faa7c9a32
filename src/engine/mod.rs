//! The packet engine: moves IP packets between the queues of a TUN device and UDP sockets.
//!
//! Each worker has a socket and one or two TUN queues of its own, the second for flows that send little ([`flows`]), and runs each
//! packet to completion. What it shares with the rest of the daemon: the published route table (one atomic load a batch), a
//! channel for commands, and its [`Counters`]. It knows nothing of the registry, takes no lock, and neither allocates nor logs per
//! packet; what the kernel refuses while it runs is said once.

pub mod admission;
mod context;
pub mod counters;
pub mod departure;
mod egress;
pub mod fallbacks;
pub mod flows;
pub mod forward;
mod ingress;
pub mod io;
pub mod peers;
mod rate_limit;
mod refusal;
mod shared;
pub mod snapshot;
pub mod worker;

use std::{
    fmt,
    io::Result,
    net::{Ipv4Addr, Ipv6Addr, UdpSocket},
    sync::{Arc, Weak},
    thread::JoinHandle,
    time::Duration,
};

use crossbeam_channel::{Receiver, Sender};
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};

use crate::{
    route_table::Routes,
    sys::{priority, tun::TunQueue, udp},
};
use admission::Admission;
use counters::Counters;
use fallbacks::Fallbacks;
use io::{Bell, Io, Queues, Way, mmsg::Mmsg, uring::Uring};
use snapshot::{PeerSnapshot, Snapshot, WorkerSnapshot};
use worker::{Setup, Worker};

/// What an engine is made of.
#[derive(Debug)]
pub struct Parts {
    /// One for each worker, and behind these, as far as there are so many, a second one for each. After a restart they may be in
    /// another order: flows find their places again. Whoever else keeps one, keeps the device.
    pub queues: Vec<Arc<TunQueue>>,
    /// One for each worker. Whoever else keeps them open has what comes while no engine runs.
    pub sockets: Vec<Sockets>,
    /// Where the workers count, made for these sockets.
    pub observer: Observer,
    /// Where packets go; published to from outside while the engine runs.
    pub routes: Routes,
    /// Whose packets get in.
    pub admission: Admission,
    /// Where the engine's own ICMP errors come from.
    pub icmp_source: IcmpSource,
    /// How packets are moved.
    pub way: Way,
    /// Whether each worker keeps to a processor of its own.
    pub pin: bool,
    /// How long a worker looks for packets before it sleeps.
    pub busy_poll: Duration,
}

/// What the kernel does for the engine, as it was probed and as the user allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offloads {
    /// The device takes superpackets of TCP.
    pub tun_tcp: bool,
    /// The device takes superpackets of UDP.
    pub tun_udp: bool,
    /// The sockets cut long messages into datagrams (`UDP_SEGMENT`).
    pub udp_segment: bool,
    /// The sockets merge datagrams into long messages (`UDP_GRO`).
    pub udp_gro: bool,
}

impl fmt::Display for Offloads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = [
            (self.tun_tcp, "TUN TCP"),
            (self.tun_udp, "TUN UDP"),
            (self.udp_segment, "UDP_SEGMENT"),
            (self.udp_gro, "UDP_GRO"),
        ];
        let on: Vec<&str> = names.into_iter().filter_map(|(on, name)| on.then_some(name)).collect();
        f.write_str(
            if on.is_empty() {
                "none".to_owned()
            } else {
                on.join(", ")
            }
            .as_str(),
        )
    }
}

/// The addresses under which this hop tells senders of its errors.
#[derive(Debug, Clone, Copy)]
pub struct IcmpSource {
    /// For errors about IPv4 packets.
    pub v4: Ipv4Addr,
    /// For errors about IPv6 packets; without it none are sent.
    pub v6: Option<Ipv6Addr>,
}

/// What a worker can be told.
#[derive(Debug)]
enum Command {
    Stop,
}

/// Why a worker has ended by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// Its device is gone. Another one needs another engine.
    DeviceGone,
    /// What cannot be mended.
    Broken(String),
}

/// A running engine. Dropping it stops it: what the workers have taken from the kernel is carried to its end, and nothing more is
/// taken.
pub struct Engine {
    workers: Vec<Handle>,
}

struct Handle {
    commands: Sender<Command>,
    bell: Bell,
    thread: Option<JoinHandle<()>>,
}

/// Packets that may wait in a queue of the device for its worker. The kernel's 500 for TUN devices is less than what one TCP
/// stream sends in the time that a worker is off its processor; 1,000 is what Ethernet devices have.
pub const DEVICE_QUEUE: u32 = 1_000;

/// How many queues of the device a worker can use, at most.
pub const MOST_QUEUES_EACH: usize = 2;

/// How many queues of the device a worker has use for. io_uring brings the packets of several in no certain order, so that flows
/// cannot be moved between them.
pub fn queues_each(way: Way) -> usize {
    match way {
        Way::Mmsg => MOST_QUEUES_EACH,
        Way::Uring => 1,
    }
}

/// The sockets of each worker: the tunnel's own, on the tunnel's port, and behind it one for each source port more.
pub type Sockets = Arc<[UdpSocket]>;

/// Sees what an engine has done, from any thread, also when the engine is gone: one that is started with the same observer goes
/// on counting.
#[derive(Debug, Clone)]
pub struct Observer {
    workers: Vec<Observed>,
    offloads: Offloads,
    fallbacks: Arc<Fallbacks>,
}

#[derive(Debug, Clone)]
struct Observed {
    counters: Arc<Counters>,
    /// The worker's, to ask the tunnel's own what it has dropped; not kept open by that.
    sockets: Weak<[UdpSocket]>,
    /// What those before them had dropped.
    overflow_before: u64,
}

impl Engine {
    /// Starts one worker for each socket of the tunnel's own. `confine` is called by each when it has all that it needs, before its
    /// first packet; `on_failure`, from the worker's thread too, with the reason when it cannot go on.
    ///
    /// # Errors
    /// When the system gives no thread, processor, poller, ring or raw socket.
    pub fn start(
        parts: Parts,
        confine: impl Fn() + Send + Clone + 'static,
        on_failure: impl Fn(Failure) + Send + Clone + 'static,
    ) -> Result<Self> {
        let count = parts.sockets.len();
        let Observer {
            workers,
            offloads,
            fallbacks,
        } = parts.observer;
        debug_assert_eq!(count, workers.len(), "one observed for each worker");
        debug_assert!(count <= parts.queues.len(), "a queue for each worker");
        let processors = if parts.pin { processors()? } else { Vec::new() };
        let mut engine = Self {
            workers: Vec::with_capacity(count),
        };
        let queues = parts.queues.iter().enumerate().map(|(index, queue)| {
            let second = parts.queues.get(count + index);
            Queues::new(Arc::clone(queue), second.map(Arc::clone))
        });
        for (index, ((queues, sockets), observed)) in queues.zip(parts.sockets).zip(workers).enumerate() {
            let setup = Setup {
                routes: parts.routes.clone(),
                admission: parts.admission,
                icmp_source: parts.icmp_source,
                offloads,
                // At most 64, by the configuration.
                sources: sockets.len() as u8,
                busy_poll: parts.busy_poll,
                sharers: count,
                counters: observed.counters,
                fallbacks: Arc::clone(&fallbacks),
            };
            let (commands, inbox) = crossbeam_channel::unbounded();
            let (started, outcome) = crossbeam_channel::bounded(1);
            let start = Start {
                index,
                queues,
                sockets,
                setup,
                // More workers than processors take turns on them.
                processor: processors.get(index % processors.len().max(1)).copied(),
                inbox,
                started,
            };
            let (way, confine, on_failure) = (parts.way, confine.clone(), on_failure.clone());
            let thread = priority::start(format!("worker-{index}"), move || match way {
                Way::Mmsg => work(start, Mmsg::new, confine, &on_failure),
                Way::Uring => work(start, Uring::new, confine, &on_failure),
            })?;
            // A worker that is gone without a word has panicked, which it has reported.
            let bell = outcome.recv().unwrap_or(Err(std::io::ErrorKind::Other.into()))?;
            engine.workers.push(Handle {
                commands,
                bell,
                thread: Some(thread),
            });
        }
        Ok(engine)
    }
}

impl Observer {
    /// For an engine with these sockets, that the kernel does so much for. `before`: what was counted for each worker till now;
    /// of more workers than there are now, the last goes on for all of them.
    pub fn new(sockets: &[Sockets], offloads: Offloads, before: &[WorkerSnapshot]) -> Self {
        let last = sockets.len().saturating_sub(1);
        let workers = sockets.iter().enumerate().map(|(index, sockets)| {
            let counters = Counters::default();
            let mut overflow = 0;
            for (_, before) in before
                .iter()
                .enumerate()
                .filter(|(number, _)| (*number).min(last) == index)
            {
                counters.add(before);
                overflow += before.socket_overflow;
            }
            Observed {
                counters: Arc::new(counters),
                // A socket has not forgotten what it has dropped for the engine before.
                overflow_before: overflow.saturating_sub(dropped(sockets)),
                sockets: Arc::downgrade(sockets),
            }
        });
        Self {
            workers: workers.collect(),
            offloads,
            fallbacks: Arc::default(),
        }
    }

    /// For an engine that goes on with other sockets, as many as before, for which the kernel does so much.
    #[must_use]
    pub fn on_others(&self, sockets: &[Sockets], offloads: Offloads) -> Self {
        let workers = self.workers.iter().zip(sockets).map(|(worker, sockets)| Observed {
            counters: Arc::clone(&worker.counters),
            overflow_before: (worker.overflow() + worker.overflow_before).saturating_sub(dropped(sockets)),
            sockets: Arc::downgrade(sockets),
        });
        Self {
            workers: workers.collect(),
            offloads,
            fallbacks: Arc::clone(&self.fallbacks),
        }
    }

    /// Adds to what was exchanged with a peer; only before an engine counts here.
    pub fn add_peer(&self, before: &PeerSnapshot) {
        if let Some(worker) = self.workers.first() {
            worker.counters.peer(before.id).add(before);
        }
    }

    /// What the engine could do when it began; [`Snapshot::offloads`] is what is left of it.
    pub fn offloads(&self) -> Offloads {
        self.offloads
    }

    /// What the engine has done so far. No worker waits for it.
    pub fn snapshot(&self) -> Snapshot {
        let workers = self
            .workers
            .iter()
            .map(|worker| WorkerSnapshot::of(&worker.counters, worker.overflow_before + worker.overflow()));
        let merge = self.fallbacks.limit(crate::offload::Merge {
            tcp: self.offloads.tun_tcp,
            udp: self.offloads.tun_udp,
        });
        Snapshot {
            workers: workers.collect(),
            peers: snapshot::peers(self.workers.iter().map(|worker| &*worker.counters)),
            offloads: Offloads {
                tun_tcp: merge.tcp,
                tun_udp: merge.udp,
                ..self.offloads
            },
            refusing_peers: self.fallbacks.refusing_peers(),
        }
    }
}

impl Observed {
    /// What its socket had no room for. One that is closed has nothing to tell.
    fn overflow(&self) -> u64 {
        self.sockets.upgrade().as_ref().map_or(0, dropped)
    }
}

/// What a worker's tunnel socket had no room for. A kernel that does not tell counts nothing.
fn dropped(sockets: &Sockets) -> u64 {
    let first = sockets.first().map(udp::dropped);
    first.and_then(Result::ok).unwrap_or_default().into()
}

/// What a worker's thread begins with.
struct Start {
    index: usize,
    queues: Queues,
    sockets: Sockets,
    setup: Setup,
    processor: Option<usize>,
    inbox: Receiver<Command>,
    /// Where its bell, or why there is none, is waited for.
    started: Sender<Result<Bell>>,
}

/// A worker's thread. It makes its way to the kernel itself: a ring belongs to the thread that has made it.
fn work<I: Io>(
    start: Start,
    make: impl FnOnce(Queues, Sockets) -> Result<(I, Bell)>,
    confine: impl FnOnce(),
    on_failure: &impl Fn(Failure),
) {
    let index = start.index;
    let panicked = PanicReport { on_failure, index };
    let pinned = start.processor.map_or(Ok(()), pin);
    // Whoever starts the worker waits for what is sent.
    match pinned.and_then(|()| make(start.queues, start.sockets)) {
        Err(error) => drop(start.started.send(Err(error))),
        Ok((io, bell)) => {
            confine();
            drop(start.started.send(Ok(bell)));
            if let Err(reason) = Worker::new(io, start.setup).run(&start.inbox) {
                on_failure(match reason.raw_os_error() {
                    Some(libc::EBADFD) => Failure::DeviceGone,
                    _ => Failure::Broken(format!("worker {index} cannot go on: {reason}")),
                });
            }
        }
    }
    std::mem::forget(panicked);
}

/// The processors that this process may run on.
fn processors() -> Result<Vec<usize>> {
    let allowed = sched_getaffinity(Pid::from_raw(0))?;
    Ok((0..CpuSet::count())
        .filter(|processor| allowed.is_set(*processor).unwrap_or(false))
        .collect())
}

/// Keeps this thread to one processor.
fn pin(processor: usize) -> Result<()> {
    let mut only = CpuSet::new();
    only.set(processor)?;
    Ok(sched_setaffinity(Pid::from_raw(0), &only)?)
}

impl Drop for Engine {
    fn drop(&mut self) {
        for worker in &self.workers {
            // A worker that is gone needs no command.
            let _ = worker.commands.send(Command::Stop);
            let _ = (worker.bell)();
        }
        for worker in &mut self.workers {
            if let Some(thread) = worker.thread.take() {
                // A panic has been reported already.
                let _ = thread.join();
            }
        }
    }
}

/// Reports a worker's panic: dropped only when the worker unwinds.
struct PanicReport<'a, F: Fn(Failure)> {
    on_failure: &'a F,
    index: usize,
}

impl<F: Fn(Failure)> Drop for PanicReport<'_, F> {
    fn drop(&mut self) {
        (self.on_failure)(Failure::Broken(format!(
            "worker {} panicked: this is a bug, please report it with the log",
            self.index
        )));
    }
}
