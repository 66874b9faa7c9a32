//! One worker: a TUN queue, a UDP socket, and the thread that moves packets between them.

use std::{
    io,
    net::{IpAddr, SocketAddr, UdpSocket},
    os::fd::AsRawFd,
    sync::Arc,
    time::{Duration, Instant},
};

use crossbeam_channel::Receiver;
use mio::{Events, Interest, Poll, Token, Waker, unix::SourceFd};

use crate::{
    packet::{self, IcmpError, IpPacket},
    route_table::{RouteTable, Routes, RoutesReader},
    sys::{
        raw::RawSender,
        tun::TunQueue,
        udp::{self, BATCH, MAX_DATAGRAM, RecvBatch, SendBatch},
    },
};

use super::{
    Command, IcmpSource,
    counters::{Counters, Drop},
    forward::{self, Verdict},
    rate_limit::RateLimit,
};

const TUN: Token = Token(0);
const UDP: Token = Token(1);
const WAKE: Token = Token(2);

/// How often a full socket is tried again before the batch's rest is dropped, and how long it is waited for each time.
/// 4 ms in all: the time in which the socket's buffer drains at 8 Gbit/s; longer only moves the loss into the TUN queue.
const SEND_RETRIES: u32 = 4;
const SEND_WAIT: Duration = Duration::from_millis(1);

/// What a worker is made of.
pub(super) struct Parts<'a> {
    pub(super) queue: TunQueue,
    pub(super) socket: UdpSocket,
    pub(super) routes: &'a Routes,
    pub(super) icmp_source: IcmpSource,
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
    outbound: Outbound,
    received: RecvBatch,
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
        let worker = Self {
            poll,
            queue: parts.queue,
            socket: parts.socket,
            routes: parts.routes.reader(),
            inbox: parts.inbox,
            counters: parts.counters,
            outbound: Outbound::new(),
            received: RecvBatch::new(),
            refusals: Refusals {
                source: parts.icmp_source,
                raw: RawSender::new()?,
                limit: RateLimit::icmp_share(parts.sharers, Instant::now()),
                reply: Box::new([0; packet::icmpv6::MAX_ERROR_LEN]),
            },
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
            if tun_ready {
                tun_ready = self.egress()?;
            }
            if udp_ready {
                udp_ready = self.ingress();
            }
        }
    }

    /// One batch from the device to the peers; whether there may be more.
    fn egress(&mut self) -> io::Result<bool> {
        let routes = self.routes.load();
        self.outbound.clear();
        let mut more = true;
        // Counts what is read, not what is kept: packets that go nowhere must not hold off the other direction and the
        // commands for as long as they come.
        for _ in 0..BATCH {
            let Some(space) = self.outbound.space() else { break };
            let length = match self.queue.recv(space) {
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    more = false;
                    break;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.raw_os_error() == Some(libc::EBADFD) => {
                    return Err(io::Error::other("its TUN device was removed"));
                }
                Err(error) => return Err(error),
            };
            let packet = &mut space[..length];
            match forward::egress(packet, routes) {
                Verdict::Forward(to) => self.outbound.keep(length, to),
                Verdict::Refuse(error, reason) => {
                    self.counters.drop_one(reason);
                    if self.refusals.answer_local(packet, error) {
                        self.counters.icmp_errors.add(1);
                    }
                }
                Verdict::Drop(reason) => self.counters.drop_one(reason),
            }
        }
        self.outbound.send(&self.socket, &self.counters);
        Ok(more)
    }

    /// One batch from the peers to the device; whether there may be more.
    fn ingress(&mut self) -> bool {
        let count = match self.received.recv(&self.socket) {
            Ok(count) => count,
            // Other errors are about earlier datagrams (an ICMP answer, say); the next call is clean.
            Err(error) => return error.kind() != io::ErrorKind::WouldBlock,
        };
        for index in 0..count {
            let packet = self.received.datagram(index);
            match forward::ingress(packet) {
                Verdict::Forward(()) => match self.queue.send(packet) {
                    Ok(()) => {
                        self.counters.received_packets.add(1);
                        self.counters.received_bytes.add(packet.len() as u64);
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        self.counters.drop_one(Drop::QueueFull);
                    }
                    Err(_) => self.counters.drop_one(Drop::DeliverFailed),
                },
                Verdict::Refuse(error, reason) => {
                    self.counters.drop_one(reason);
                    if self
                        .refusals
                        .answer_remote(packet, error, self.routes.load(), &self.socket)
                    {
                        self.counters.icmp_errors.add(1);
                    }
                }
                Verdict::Drop(reason) => self.counters.drop_one(reason),
            }
        }
        // Fewer than asked for: the socket was empty then. It may have filled since, which is an edge of its own.
        count == BATCH
    }
}

/// A batch on its way to the peers: packets one behind another in a buffer, and where each goes.
struct Outbound {
    buffer: Box<[u8]>,
    used: usize,
    entries: Vec<Entry>,
    batch: SendBatch,
}

struct Entry {
    start: usize,
    length: usize,
    to: SocketAddr,
}

/// Room for a batch of packets of the usual MTU (up to 2,048 bytes with alignment) and then one of any length, with its
/// alignment, so that a read never cuts a packet. A batch of longer ones is sent in several.
const OUTBOUND_BYTES: usize = BATCH * 2_048 + MAX_DATAGRAM.next_multiple_of(PACKET_ALIGNMENT);

/// Packets begin on cache lines.
const PACKET_ALIGNMENT: usize = 64;

impl Outbound {
    fn new() -> Self {
        Self {
            buffer: vec![0; OUTBOUND_BYTES].into_boxed_slice(),
            used: 0,
            entries: Vec::with_capacity(BATCH),
            batch: SendBatch::new(),
        }
    }

    fn clear(&mut self) {
        self.used = 0;
        self.entries.clear();
    }

    /// Where the next packet may be read to; `None` when the batch is full.
    fn space(&mut self) -> Option<&mut [u8]> {
        let room = self.entries.len() < BATCH && self.buffer.len() - self.used >= MAX_DATAGRAM;
        room.then(|| &mut self.buffer[self.used..self.used + MAX_DATAGRAM])
    }

    /// Keeps the packet of `length` bytes that was read into [`Self::space`], for `to`.
    fn keep(&mut self, length: usize, to: SocketAddr) {
        self.entries.push(Entry {
            start: self.used,
            length,
            to,
        });
        self.used = (self.used + length).next_multiple_of(PACKET_ALIGNMENT);
    }

    /// Sends the batch. What the socket does not take in time, or refuses, is dropped and counted.
    fn send(&mut self, socket: &UdpSocket, counters: &Counters) {
        let mut rest = &self.entries[..];
        let mut retries = SEND_RETRIES;
        while !rest.is_empty() {
            let datagrams = rest.iter().map(|e| (&self.buffer[e.start..e.start + e.length], e.to));
            let error = match self.batch.send(socket, datagrams) {
                Ok(count) => {
                    let (sent, unsent) = rest.split_at(count);
                    counters.sent_packets.add(count as u64);
                    counters
                        .sent_bytes
                        .add(sent.iter().map(|entry| entry.length as u64).sum());
                    rest = unsent;
                    continue;
                }
                Err(error) => error,
            };
            let full = error.kind() == io::ErrorKind::WouldBlock || error.raw_os_error() == Some(libc::ENOBUFS);
            if full && retries > 0 {
                retries -= 1;
                udp::wait_writable(socket, SEND_WAIT);
            } else if error.kind() != io::ErrorKind::Interrupted {
                counters.drop_one(if full { Drop::QueueFull } else { Drop::SendFailed });
                rest = &rest[1..];
            }
        }
    }
}

/// Tells senders, at a limited rate, that their packets went no further.
struct Refusals {
    source: IcmpSource,
    raw: RawSender,
    limit: RateLimit,
    reply: Box<[u8; packet::icmpv6::MAX_ERROR_LEN]>,
}

impl Refusals {
    /// For a packet of this host or its containers; whether an answer went out.
    fn answer_local(&mut self, packet: &[u8], error: IcmpError) -> bool {
        let Some((length, to)) = self.compose(packet, error) else {
            return false;
        };
        self.raw.send(&self.reply[..length], to).is_ok()
    }

    /// For a packet that came from a peer; whether an answer went out.
    fn answer_remote(&mut self, packet: &[u8], error: IcmpError, routes: &RouteTable, socket: &UdpSocket) -> bool {
        let Some((length, to)) = self.compose(packet, error) else {
            return false;
        };
        routes
            .lookup(to)
            .is_some_and(|peer| socket.send_to(&self.reply[..length], peer.addr).is_ok())
    }

    /// The answer's length in `reply` and its receiver; `None` when there must be none.
    fn compose(&mut self, packet: &[u8], error: IcmpError) -> Option<(usize, IpAddr)> {
        let to = IpPacket::parse(packet).ok()?.src();
        let reply = &mut self.reply[..];
        let length = match to {
            IpAddr::V4(_) => packet::icmp::error_reply(packet, error, self.source.v4, reply)?,
            IpAddr::V6(_) => packet::icmpv6::error_reply(packet, error, self.source.v6?, reply)?,
        };
        self.limit.allow(Instant::now()).then_some((length, to))
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, net::Ipv4Addr};

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    use super::*;
    use crate::packet::build;

    #[test]
    fn packets_that_go_nowhere_make_a_batch_too() {
        // Keeps packets apart and their order, as a TUN queue does.
        let (device, kernel) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC,
        )
        .unwrap();
        let lost = build::Ipv4::new([10, 5, 1, 2].into(), [10, 5, 9, 9].into()).udp(1, 2, b"anyone?");
        for _ in 0..BATCH + 1 {
            nix::unistd::write(&kernel, &lost).unwrap();
        }
        let counters = Arc::new(Counters::default());
        let (_commands, inbox) = crossbeam_channel::unbounded();
        let (mut worker, _waker) = Worker::new(Parts {
            queue: TunQueue::from(File::from(device)),
            socket: UdpSocket::bind("127.0.0.1:0").unwrap(),
            routes: &Routes::default(),
            icmp_source: IcmpSource {
                v4: Ipv4Addr::LOCALHOST,
                v6: None,
            },
            inbox,
            counters: Arc::clone(&counters),
            sharers: 1,
        })
        .unwrap();
        assert!(worker.egress().unwrap(), "there is one left");
        assert_eq!(counters.dropped(Drop::NoRoute), BATCH as u64);
        assert!(!worker.egress().unwrap());
        assert_eq!(counters.dropped(Drop::NoRoute), BATCH as u64 + 1);
    }

    #[test]
    fn packets_of_any_length_fit_until_there_is_no_room_for_one_more() {
        let to = SocketAddr::from(([192, 0, 2, 2], 8285));
        // 65,492: the overlay's MTU over IP over InfiniBand (65,520).
        for length in [1, 64, 1_472, 8_972, 65_492, MAX_DATAGRAM] {
            let mut outbound = Outbound::new();
            let mut kept = 0;
            while let Some(space) = outbound.space() {
                assert_eq!(space.len(), MAX_DATAGRAM);
                outbound.keep(length, to);
                kept += 1;
            }
            assert!(
                kept == BATCH || (length > 2_048 && kept > 1),
                "{kept} of {length} bytes"
            );
        }
    }
}
