//! From the device to the peers: packets and superpackets are read one behind another, cut by position, and sent as few,
//! long messages.

use std::{io, time::Duration};

use crate::{
    offload::{
        Headers, SendPlan,
        send_plan::{MAX_SEGMENTS, Piece, Run},
        split,
    },
    packet::flow,
    route_table::Peer,
    sys::udp::{BATCH, Message},
};

use super::{
    context::Context,
    counters::Drop,
    departure::Departure,
    forward::{self, Verdict},
    io::{DatagramSink, LocalSink, Packet, PacketSource},
};

/// Bytes after which a batch is sent: four superpackets, so that each fills the message that the one before has begun, and the
/// receiver is woken once for several messages. Half of it, with half of [`BATCH_BYTES`](super::ingress::BATCH_BYTES), took 9 % more
/// of the processors' time for a stream of TCP.
pub(super) const FLUSH_BYTES: usize = 256 << 10;

/// Packets after which a batch is sent, if they are small: three full messages, and some 150 µs of work.
pub(super) const FLUSH_PACKETS: usize = 3 * MAX_SEGMENTS;

/// How often, for all messages of a batch together, a full socket is tried again before one is dropped, and how long it is waited
/// for each time. 4 ms in all: the time in which the socket's buffer drains at 8 Gbit/s; longer only moves the loss into the
/// device's queue, and holds up what comes from the peers.
const SEND_RETRIES: u32 = 4;
const SEND_WAIT: Duration = Duration::from_millis(1);

/// Where a datagram goes, and from which port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Lane {
    peer: Peer,
    source: u8,
}

pub(super) struct Egress {
    departure: Departure,
    headers: Headers,
    plan: SendPlan<Lane>,
    /// The end of the batch before, which this one goes on with, and its bytes.
    kept: Option<Run<Lane>>,
    kept_bytes: Vec<u8>,
    /// Where the end of this batch is copied to, while the other is still to be sent.
    spare_bytes: Vec<u8>,
    /// The runs of one source port, by their place in the plan.
    chosen: Vec<usize>,
    messages: Vec<Message>,
    /// Whether messages may be segmented at all.
    segmenting: bool,
    /// Number of source ports that flows are spread over.
    sources: u8,
}

impl Egress {
    pub(super) fn new(departure: Departure, segmenting: bool, sources: u8) -> Self {
        Self {
            departure,
            headers: Headers::default(),
            plan: SendPlan::default(),
            kept: None,
            kept_bytes: Vec::new(),
            spare_bytes: Vec::new(),
            chosen: Vec::new(),
            messages: Vec::with_capacity(BATCH),
            segmenting,
            sources,
        }
    }

    /// Moves one batch; whether there may be more.
    ///
    /// # Errors
    /// `EBADFD` when the device is gone.
    pub(super) fn run(
        &mut self,
        packets: &mut impl PacketSource,
        peers: &mut impl DatagramSink,
        local: &mut impl LocalSink,
        context: &mut Context<'_>,
    ) -> io::Result<bool> {
        self.begin();
        packets.start(context.flows.take_moved());
        let mut more = Ok(true);
        for _ in 0..FLUSH_PACKETS {
            if self.plan.bytes() >= FLUSH_BYTES || self.plan.runs().len() >= BATCH {
                break;
            }
            let packet = match packets.next() {
                Ok(packet) => packet,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    more = match error.kind() {
                        io::ErrorKind::WouldBlock => Ok(false),
                        _ => Err(error),
                    };
                    break;
                }
            };
            if !self.take(packet, packets.arena(), local, context) {
                packets.forget();
            }
        }
        // While the others are sent, the next superpacket may come, whose segments belong behind the end of this one.
        let kept = match more {
            Ok(more) if more || self.plan.is_overflowing() => self.plan.keep_back(),
            _ => None,
        };
        if let Some(kept) = &kept {
            let content = Content {
                plan: &self.plan,
                headers: &self.headers,
                kept: &self.kept_bytes,
                arena: packets.arena(),
            };
            self.spare_bytes.clear();
            content
                .of(kept)
                .for_each(|bytes| self.spare_bytes.extend_from_slice(bytes));
        }
        context.flows.set_moves(packets.moves());
        self.send(packets.arena(), peers, context);
        std::mem::swap(&mut self.kept_bytes, &mut self.spare_bytes);
        self.kept = kept;
        Ok(more? || self.kept.is_some())
    }

    /// Sends what was kept back: no other batch comes.
    pub(super) fn finish(&mut self, peers: &mut impl DatagramSink, context: &Context<'_>) {
        self.begin();
        self.send(&[], peers, context);
    }

    fn begin(&mut self) {
        self.plan.clear();
        self.headers.clear();
        if let Some(kept) = self.kept.take() {
            self.plan.go_on(&kept);
        }
    }

    /// Plans what becomes of a packet; whether its bytes are still needed.
    #[inline]
    fn take(
        &mut self,
        packet: Packet,
        arena: &mut [u8],
        local: &mut impl LocalSink,
        context: &mut Context<'_>,
    ) -> bool {
        let start = packet.bytes.start;
        let bytes = &mut arena[packet.bytes];
        let Ok(header) = packet.header else {
            context.counters.drop_one(Drop::Malformed);
            return false;
        };
        let (peer, hash) = match forward::egress(bytes, context.routes, &self.departure) {
            Verdict::Forward(next) => next,
            Verdict::Refuse(error, reason) => {
                context.counters.drop_one(reason);
                if context.refusals.answer_local(bytes, error, local) {
                    context.counters.icmp_errors.add(1);
                }
                return false;
            }
            Verdict::Drop(reason) => {
                context.counters.drop_one(reason);
                return false;
            }
        };
        let Ok(segments) = split::plan(&header, bytes, &mut self.headers) else {
            context.counters.drop_one(Drop::Malformed);
            return false;
        };
        context.flows.sent(hash, bytes.len(), packet.from);
        let lane = Lane {
            peer,
            source: flow::lane(hash, self.sources),
        };
        let merge = self.segmenting && !context.fallbacks.is_refusing(peer.addr);
        if segments.count() == 1 && segments.header_len() == 0 {
            self.plan.push_packet(start, bytes.len(), lane, merge);
        } else {
            context.counters.superpackets_split.add(1);
            context.counters.segments.add(segments.count() as u64);
            self.plan.push_segments(&segments, start, lane, merge);
        }
        true
    }

    /// Sends the planned messages.
    fn send(&mut self, arena: &[u8], peers: &mut impl DatagramSink, context: &Context<'_>) {
        let mut patience = Patience(SEND_RETRIES);
        let content = Content {
            plan: &self.plan,
            headers: &self.headers,
            kept: &self.kept_bytes,
            arena,
        };
        for source in 0..self.sources {
            let runs = self.plan.runs().iter().enumerate();
            let of_source = runs.filter(|(_, run)| run.lane.source == source);
            self.chosen.clear();
            self.chosen.extend(of_source.map(|(index, _)| index));
            for chosen in self.chosen.chunks(BATCH) {
                let runs = Runs { content, chosen };
                runs.send(source, &mut self.messages, peers, &mut patience, context);
            }
        }
    }
}

/// How often a full socket is still waited for.
struct Patience(u32);

/// A plan and where its bytes are.
#[derive(Clone, Copy)]
struct Content<'a> {
    plan: &'a SendPlan<Lane>,
    headers: &'a Headers,
    kept: &'a [u8],
    arena: &'a [u8],
}

impl<'a> Content<'a> {
    /// The bytes of `run`, one of the plan's.
    fn of(self, run: &Run<Lane>) -> impl Iterator<Item = &'a [u8]> + Clone + use<'a> {
        self.plan.pieces(run).map(move |piece| match piece {
            Piece::Packet { start, len } => &self.arena[start..start + len],
            Piece::Header { superpacket, index } => self.plan.superpacket(superpacket).0.header(index, self.headers),
            Piece::Kept => self.kept,
        })
    }
}

/// Some of a plan's runs, for one call.
struct Runs<'a> {
    content: Content<'a>,
    chosen: &'a [usize],
}

impl<'a> Runs<'a> {
    fn run(&self, index: usize) -> &'a Run<Lane> {
        &self.content.plan.runs()[self.chosen[index]]
    }

    /// Sends all of them. What the socket does not take in time, or refuses, is dropped and counted.
    fn send(
        &self,
        source: u8,
        messages: &mut Vec<Message>,
        peers: &mut impl DatagramSink,
        patience: &mut Patience,
        context: &Context<'_>,
    ) {
        messages.clear();
        messages.extend((0..self.chosen.len()).map(|index| message(self.run(index))));
        let mut done = 0;
        while done < messages.len() {
            let rest = (done..messages.len()).flat_map(|index| self.content.of(self.run(index)));
            match patience.send(source, &messages[done..], rest, peers) {
                Ok(count) => {
                    for index in done..done + count {
                        let run = self.run(index);
                        count_sent(run.lane, run.count, run.bytes, context);
                    }
                    done += count;
                }
                Err(error) => {
                    let run = self.run(done);
                    done += 1;
                    if run.count > 1 && refuses_segments(&error) {
                        // A route that takes none singly either has something else to say by it.
                        if self.send_singly(run, peers, patience, context) {
                            context.fallbacks.route_refuses(run.lane.peer.addr, &error);
                        }
                    } else {
                        count_unsent(run.lane, run.count, &error, context);
                    }
                }
            }
        }
    }

    /// Sends the datagrams of a run one by one; whether any was taken. Only where a route refuses them together.
    fn send_singly(
        &self,
        run: &'a Run<Lane>,
        peers: &mut impl DatagramSink,
        patience: &mut Patience,
        context: &Context<'_>,
    ) -> bool {
        let mut any_taken = false;
        let bytes: Vec<u8> = self.content.of(run).flatten().copied().collect();
        for datagram in bytes.chunks(run.segment) {
            let message = Message {
                to: run.lane.peer.addr,
                slices: 1,
                segment: None,
            };
            match patience.send(run.lane.source, &[message], std::iter::once(datagram), peers) {
                Ok(_) => {
                    any_taken = true;
                    count_sent(run.lane, 1, datagram.len(), context);
                }
                Err(error) => count_unsent(run.lane, 1, &error, context),
            }
        }
        any_taken
    }
}

impl Patience {
    /// Sends what of `messages` the socket takes, and waits a little for it while it is full.
    fn send<'a>(
        &mut self,
        source: u8,
        messages: &[Message],
        slices: impl Iterator<Item = &'a [u8]> + Clone,
        peers: &mut impl DatagramSink,
    ) -> io::Result<usize> {
        loop {
            match peers.send(source, messages, slices.clone()) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if is_full(&error) && self.0 > 0 => {
                    self.0 -= 1;
                    peers.wait_writable(source, SEND_WAIT);
                }
                result => return result,
            }
        }
    }
}

fn count_sent(lane: Lane, packets: usize, bytes: usize, context: &Context<'_>) {
    context.counters.messages_sent.add(1);
    context.counters.sent.add(packets, bytes);
    context.counters.peer(lane.peer.id).sent.add(packets, bytes);
}

fn count_unsent(lane: Lane, packets: usize, error: &io::Error, context: &Context<'_>) {
    context.counters.drop_unsent(packets, error);
    context.counters.peer(lane.peer.id).unsent.add(packets as u64);
}

#[inline]
fn message(run: &Run<Lane>) -> Message {
    // At most 65,507 bytes in all where there are several.
    let segment = (run.count > 1).then_some(run.segment as u16);
    Message {
        to: run.lane.peer.addr,
        slices: run.pieces,
        segment,
    }
}

/// The socket's buffer is full, or the device's queue.
fn is_full(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock || error.raw_os_error() == Some(libc::ENOBUFS)
}

/// What the kernel says of a segmented message that the route's device cannot cut, or whose datagrams are longer than the
/// path takes (udp_send_skb).
fn refuses_segments(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EIO | libc::EINVAL | libc::EMSGSIZE | libc::EOPNOTSUPP)
    )
}
