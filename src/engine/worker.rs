//! One worker: a TUN queue, a UDP socket, and the thread that moves packets between them.

use std::{io, net::UdpSocket, os::fd::AsRawFd, sync::Arc, time::Duration};

use crossbeam_channel::Receiver;
use mio::{Events, Interest, Poll, Token, Waker, unix::SourceFd};

use crate::{
    offload::Merge,
    route_table::{Routes, RoutesReader},
    sys::tun::TunQueue,
};

use super::{Command, IcmpSource, Offloads, counters::Counters, egress::Egress, ingress::Ingress, refusal::Refusals};

const TUN: Token = Token(0);
const UDP: Token = Token(1);
const WAKE: Token = Token(2);

/// What a worker is made of.
pub(super) struct Parts<'a> {
    pub(super) queue: TunQueue,
    pub(super) socket: UdpSocket,
    pub(super) routes: &'a Routes,
    pub(super) icmp_source: IcmpSource,
    pub(super) offloads: Offloads,
    pub(super) inbox: Receiver<Command>,
    pub(super) counters: Arc<Counters>,
    /// How many workers share the host's ICMP limit.
    pub(super) sharers: usize,
}

pub(super) struct Worker {
    poll: Poll,
    queue: TunQueue,
    socket: UdpSocket,
    routes: RoutesReader,
    inbox: Receiver<Command>,
    counters: Arc<Counters>,
    egress: Egress,
    ingress: Ingress,
    refusals: Refusals,
}

impl Worker {
    pub(super) fn new(parts: Parts<'_>) -> io::Result<(Self, Arc<Waker>)> {
        let poll = Poll::new()?;
        let waker = Arc::new(Waker::new(poll.registry(), WAKE)?);
        poll.registry()
            .register(&mut SourceFd(&parts.queue.as_raw_fd()), TUN, Interest::READABLE)?;
        poll.registry()
            .register(&mut SourceFd(&parts.socket.as_raw_fd()), UDP, Interest::READABLE)?;
        let merge = Merge {
            tcp: parts.offloads.tun_tcp,
            udp: parts.offloads.tun_udp,
        };
        let worker = Self {
            poll,
            queue: parts.queue,
            socket: parts.socket,
            routes: parts.routes.reader(),
            inbox: parts.inbox,
            counters: parts.counters,
            egress: Egress::new(parts.offloads.udp_segment),
            ingress: Ingress::new(merge),
            refusals: Refusals::new(parts.icmp_source, parts.sharers)?,
        };
        Ok((worker, waker))
    }

    /// Moves packets until told to stop, or until the device is gone (an error).
    ///
    /// Readiness is edge-triggered: a side stays ready until it has said that it has nothing left. While both are, they
    /// take turns, one batch each, so that neither direction starves the other.
    pub(super) fn run(&mut self) -> io::Result<()> {
        let mut events = Events::with_capacity(4);
        let (mut tun_ready, mut udp_ready) = (true, true);
        loop {
            let timeout = if tun_ready || udp_ready {
                Some(Duration::ZERO)
            } else {
                None
            };
            match self.poll.poll(&mut events, timeout) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
            for event in &events {
                match event.token() {
                    TUN => tun_ready = true,
                    UDP => udp_ready = true,
                    _ => {
                        if let Ok(Command::Stop) = self.inbox.try_recv() {
                            return Ok(());
                        }
                    }
                }
            }
            let Self {
                queue,
                socket,
                refusals,
                counters,
                ..
            } = self;
            if tun_ready {
                tun_ready = self.egress.run(queue, socket, self.routes.load(), refusals, counters)?;
            }
            if udp_ready {
                udp_ready = self.ingress.run(queue, socket, self.routes.load(), refusals, counters);
            }
        }
    }
}
