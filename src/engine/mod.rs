//! The packet engine: moves IP packets between the queues of a TUN device and UDP sockets.
//!
//! One worker for each TUN queue, with a socket of its own; it runs each packet to completion. What it shares with the
//! rest of the daemon: the published route table (one atomic load a batch), a channel for commands, and its
//! [`Counters`]. It knows nothing of the registry, takes no lock, and neither allocates nor logs per packet; what the kernel
//! refuses while it runs is said once.

pub mod counters;
mod egress;
pub mod forward;
mod ingress;
mod rate_limit;
mod refusal;
mod worker;

use std::{
    fmt, io,
    net::{Ipv4Addr, Ipv6Addr, UdpSocket},
    sync::Arc,
    thread::{self, JoinHandle},
};

use crossbeam_channel::Sender;
use mio::Waker;

use crate::{route_table::Routes, sys::tun::TunQueue};
use counters::Counters;
use worker::Worker;

/// What an engine is made of.
#[derive(Debug)]
pub struct Parts {
    /// One for each worker.
    pub queues: Vec<TunQueue>,
    /// As many as `queues`, all on the tunnel's port.
    pub sockets: Vec<UdpSocket>,
    /// Where packets go; published to from outside while the engine runs.
    pub routes: Routes,
    /// Where the engine's own ICMP errors come from.
    pub icmp_source: IcmpSource,
    /// What the kernel does for the engine.
    pub offloads: Offloads,
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

/// A running engine. Dropping it stops it.
pub struct Engine {
    workers: Vec<Handle>,
}

struct Handle {
    commands: Sender<Command>,
    waker: Arc<Waker>,
    counters: Arc<Counters>,
    thread: Option<JoinHandle<()>>,
}

impl Engine {
    /// Starts one worker for each queue. `on_failure` is called, from the worker's thread, with the reason when a worker
    /// cannot go on.
    ///
    /// # Errors
    /// When the system gives no thread, poller or raw socket.
    pub fn start(parts: Parts, on_failure: impl Fn(String) + Send + Clone + 'static) -> io::Result<Self> {
        let count = parts.queues.len();
        debug_assert_eq!(count, parts.sockets.len(), "a socket for each queue");
        let mut engine = Self {
            workers: Vec::with_capacity(count),
        };
        for (index, (queue, socket)) in parts.queues.into_iter().zip(parts.sockets).enumerate() {
            let (commands, inbox) = crossbeam_channel::unbounded();
            let counters = Arc::new(Counters::default());
            let (mut worker, waker) = Worker::new(worker::Parts {
                queue,
                socket,
                routes: &parts.routes,
                icmp_source: parts.icmp_source,
                offloads: parts.offloads,
                inbox,
                counters: Arc::clone(&counters),
                sharers: count,
            })?;
            let on_failure = on_failure.clone();
            let thread = thread::Builder::new().name(format!("worker-{index}")).spawn(move || {
                let panicked = PanicReport {
                    on_failure: &on_failure,
                    index,
                };
                let outcome = worker.run();
                std::mem::forget(panicked);
                if let Err(reason) = outcome {
                    on_failure(format!("worker {index} cannot go on: {reason}"));
                }
            })?;
            engine.workers.push(Handle {
                commands,
                waker,
                counters,
                thread: Some(thread),
            });
        }
        Ok(engine)
    }

    /// What all workers together have carried and dropped, for the log.
    pub fn summary(&self) -> String {
        let sum = |count: &dyn Fn(&Counters) -> u64| self.counters().map(count).sum::<u64>();
        let drops: String = counters::Drop::ALL
            .into_iter()
            .map(|reason| (reason.name(), sum(&|counters| counters.dropped(reason))))
            .filter(|(_, count)| *count > 0)
            .map(|(name, count)| format!(", {name} {count}"))
            .collect();
        format!(
            "sent {} packets ({} bytes), received {} ({} bytes), ICMP errors {}; dropped{}",
            sum(&|counters| counters.sent_packets.get()),
            sum(&|counters| counters.sent_bytes.get()),
            sum(&|counters| counters.received_packets.get()),
            sum(&|counters| counters.received_bytes.get()),
            sum(&|counters| counters.icmp_errors.get()),
            drops.strip_prefix(',').unwrap_or(" none"),
        )
    }

    /// The counters of each worker.
    pub fn counters(&self) -> impl Iterator<Item = &Counters> {
        self.workers.iter().map(|worker| &*worker.counters)
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        for worker in &self.workers {
            // A worker that is gone needs no command.
            let _ = worker.commands.send(Command::Stop);
            let _ = worker.waker.wake();
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
struct PanicReport<'a, F: Fn(String)> {
    on_failure: &'a F,
    index: usize,
}

impl<F: Fn(String)> Drop for PanicReport<'_, F> {
    fn drop(&mut self) {
        (self.on_failure)(format!(
            "worker {} panicked: this is a bug, please report it with the log",
            self.index
        ));
    }
}
