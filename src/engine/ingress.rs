//! From the peers to the device: datagrams, several in a message where the kernel has merged them, become as few writes as
//! the flows in them allow.

use std::{cell::Cell, io, net::IpAddr, ops::Range};

use crate::{
    offload::{Coalescer, Merge, VirtioNetHdr, Write},
    route_table::PeerId,
    sys::udp::{BATCH, Received},
};

use super::{
    admission::Admission,
    context::Context,
    counters::{Counters, Drop, uptime},
    flows::{Class, Flows},
    forward::{self, Verdict},
    io::{DatagramSink, DatagramSource, InParts, PacketSink},
};

/// Bytes that a batch should bring: eight full messages, so that what the end of one begins is written with the next one's start.
pub(super) const BATCH_BYTES: usize = 512 << 10;

/// The virtio header of a packet as it stands.
const PLAIN: &[u8] = &[0; VirtioNetHdr::LEN];

pub(super) struct Ingress {
    coalescer: Coalescer,
    /// What the device takes.
    merge: Merge,
    admission: Admission,
    /// How many messages to ask for next.
    most: usize,
}

impl Ingress {
    pub(super) fn new(merge: Merge, admission: Admission) -> Self {
        Self {
            coalescer: Coalescer::new(merge),
            merge,
            admission,
            most: BATCH,
        }
    }

    /// Moves one batch; whether there may be more.
    pub(super) fn run(
        &mut self,
        datagrams: &mut impl DatagramSource,
        device: &mut impl PacketSink,
        peers: &mut impl DatagramSink,
        context: &mut Context<'_>,
    ) -> bool {
        let asked = self.most;
        let count = match datagrams.recv(asked) {
            Ok(count) => count,
            // Other errors are about earlier datagrams (an ICMP answer, say); the next call is clean.
            Err(error) => return error.kind() != io::ErrorKind::WouldBlock,
        };
        self.coalescer.clear();
        self.coalescer.set_merge(context.fallbacks.limit(self.merge));
        let mut tally = Tally::default();
        let mut bytes = 0;
        for index in 0..count {
            let message = datagrams.message(index);
            bytes += message.bytes.len();
            self.take(message, datagrams.arena(), peers, &mut tally, context);
        }
        tally.flush(context.counters);
        context.counters.messages_received.add(count as u64);
        deliver(self.coalescer.writes(datagrams.arena()), device, context);
        self.most = (BATCH_BYTES / (bytes / count.max(1)).max(1)).clamp(4, BATCH);
        // Fewer than asked for: the source was empty then. It may have filled since, which is told anew.
        count == asked
    }

    /// Takes the packets of a message, each of which is let in, answered or dropped.
    #[inline]
    fn take(
        &mut self,
        message: Received,
        arena: &mut [u8],
        peers: &mut impl DatagramSink,
        tally: &mut Tally,
        context: &mut Context<'_>,
    ) {
        let Range { mut start, end } = message.bytes;
        // An empty datagram is a message of none.
        while start < end {
            let packet = start..(start + message.segment).min(end);
            start = packet.end;
            let bytes = &mut arena[packet.clone()];
            match forward::ingress(bytes, message.from, context.routes, &self.admission) {
                Verdict::Forward(id) => {
                    tally.add(id, bytes.len(), context.counters);
                    self.coalescer.push(arena, packet);
                }
                Verdict::Refuse(error, reason) => {
                    refuse(message.from, reason, context);
                    if context.refusals.answer_remote(bytes, error, context.routes, peers) {
                        context.counters.icmp_errors.add(1);
                    }
                }
                Verdict::Drop(reason) => refuse(message.from, reason, context),
            }
        }
    }
}

/// Counts a packet from `from` that is not let in.
#[cold]
fn refuse(from: IpAddr, reason: Drop, context: &Context<'_>) {
    context.counters.drop_one(reason);
    if let Some(id) = context.routes.host(from) {
        context.counters.peer(id).refused.add(1);
    }
}

/// What one peer after the other has sent: most batches are all one peer's.
#[derive(Default)]
struct Tally {
    id: PeerId,
    packets: usize,
    bytes: usize,
}

impl Tally {
    #[inline]
    fn add(&mut self, id: PeerId, bytes: usize, counters: &Counters) {
        if id != self.id {
            self.flush(counters);
            self.id = id;
        }
        self.packets += 1;
        self.bytes += bytes;
    }

    fn flush(&mut self, counters: &Counters) {
        if self.packets > 0 {
            let peer = counters.peer(self.id);
            peer.received.add(self.packets, self.bytes);
            peer.last_received.set(uptime());
            (self.packets, self.bytes) = (0, 0);
        }
    }
}

/// A write for a device with or without virtio headers.
struct Prepared<'a, 'f> {
    write: Write<'a>,
    headers: bool,
    flows: &'f Flows,
}

impl<'a> InParts<'a> for Prepared<'a, '_> {
    fn parts(&self) -> impl Iterator<Item = &'a [u8]> + Clone {
        self.write.parts().skip(usize::from(!self.headers))
    }

    fn class(&self) -> Class {
        let first = self.write.packets().next();
        first.map_or(Class::Sparse, |packet| self.flows.class(packet))
    }
}

/// A packet as it stands, for a device with virtio headers.
struct Plain<'a, 'f> {
    packet: &'a [u8],
    flows: &'f Flows,
}

impl<'a> InParts<'a> for Plain<'a, '_> {
    fn parts(&self) -> impl Iterator<Item = &'a [u8]> + Clone {
        [PLAIN, self.packet].into_iter()
    }

    fn class(&self) -> Class {
        self.flows.class(self.packet)
    }
}

/// Hands the writes to the device. A merged one that the kernel refuses goes packet by packet, before those behind it, and its
/// kind is merged no more.
fn deliver<'a>(mut writes: impl Iterator<Item = Write<'a>>, device: &mut impl PacketSink, context: &Context<'_>) {
    let Context {
        counters,
        fallbacks,
        flows,
        ..
    } = context;
    let headers = device.has_headers();
    // Allocates only after a refusal, which comes once for each kind.
    let mut refused: Vec<Write<'_>> = Vec::new();
    loop {
        let going = Cell::new(true);
        // What is behind a refused write may be of its flow.
        let next = std::iter::from_fn(|| if going.get() { writes.next() } else { None });
        device.write(
            next.map(|write| Prepared { write, headers, flows }),
            |Prepared { write, .. }, result| match result {
                Ok(()) => {
                    counters.received.add(write.count(), write.packets_len());
                    if write.count() > 1 {
                        counters.superpackets_merged.add(1);
                        counters.merges.add(write.count() as u64);
                    }
                }
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) && write.count() > 1 => {
                    fallbacks.device_refuses(write.kind(), &error);
                    going.set(false);
                    refused.push(write);
                }
                Err(error) => count_undelivered(write.count(), &error, counters),
            },
        );
        if refused.is_empty() {
            return;
        }
        for write in refused.drain(..) {
            device.write(
                write.packets().map(|packet| Plain { packet, flows }),
                |Plain { packet, .. }, result| match result {
                    Ok(()) => counters.received.add(1, packet.len()),
                    Err(error) => count_undelivered(1, &error, counters),
                },
            );
        }
    }
}

fn count_undelivered(packets: usize, error: &io::Error, counters: &Counters) {
    let full = error.kind() == io::ErrorKind::WouldBlock;
    let reason = if full { Drop::QueueFull } else { Drop::DeliverFailed };
    counters.drop_several(reason, packets);
}
