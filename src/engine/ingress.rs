//! From the peers to the device: datagrams, several in a message where the kernel has merged them, become as few writes as
//! the flows in them allow.

use std::{
    io::{self, IoSlice},
    net::UdpSocket,
};

use tracing::warn;

use crate::{
    offload::{
        Coalescer, GsoKind, Merge, VirtioNetHdr,
        coalesce::{MAX_MERGED, Write},
    },
    route_table::RouteTable,
    sys::{
        tun::TunQueue,
        udp::{BATCH, RecvBatch},
    },
};

use super::{
    counters::{Counters, Drop},
    forward::{self, Verdict},
    refusal::Refusals,
};

/// Bytes that a batch should bring: what stays in the processor's second cache between receiving and writing.
const BATCH_BYTES: usize = 256 << 10;

/// The virtio header of a packet as it stands.
const PLAIN: [u8; VirtioNetHdr::LEN] = [0; VirtioNetHdr::LEN];

pub(super) struct Ingress {
    received: RecvBatch,
    coalescer: Coalescer,
    merge: Merge,
    /// How many messages to ask for next.
    most: usize,
}

impl Ingress {
    pub(super) fn new(merge: Merge) -> Self {
        Self {
            received: RecvBatch::new(),
            coalescer: Coalescer::new(merge),
            merge,
            most: BATCH,
        }
    }

    /// Moves one batch; whether there may be more.
    pub(super) fn run(
        &mut self,
        queue: &TunQueue,
        socket: &UdpSocket,
        routes: &RouteTable,
        refusals: &mut Refusals,
        counters: &Counters,
    ) -> bool {
        let asked = self.most;
        let count = match self.received.recv(socket, asked) {
            Ok(count) => count,
            // Other errors are about earlier datagrams (an ICMP answer, say); the next call is clean.
            Err(error) => return error.kind() != io::ErrorKind::WouldBlock,
        };
        self.coalescer.clear();
        let mut bytes = 0;
        for index in 0..count {
            let (message, segment) = self.received.message(index);
            bytes += message.len();
            let arena = self.received.arena();
            let mut start = message.start;
            // An empty datagram is a message of none.
            while start < message.end {
                let end = (start + segment).min(message.end);
                let packet = &mut arena[start..end];
                match forward::ingress(packet) {
                    Verdict::Forward(()) => self.coalescer.push(arena, start..end),
                    Verdict::Refuse(error, reason) => {
                        counters.drop_one(reason);
                        if refusals.answer_remote(packet, error, routes, socket) {
                            counters.icmp_errors.add(1);
                        }
                    }
                    Verdict::Drop(reason) => counters.drop_one(reason),
                }
                start = end;
            }
        }
        let mut merge = self.merge;
        for write in self.coalescer.writes(self.received.arena()) {
            deliver(&write, queue, &mut merge, counters);
        }
        if merge != self.merge {
            self.merge = merge;
            self.coalescer.set_merge(merge);
        }
        self.most = (BATCH_BYTES / (bytes / count.max(1)).max(1)).clamp(4, BATCH);
        // Fewer than asked for: the socket was empty then. It may have filled since, which is an edge of its own.
        count == asked
    }
}

/// Hands one write to the device. A merged one that the kernel refuses goes packet by packet, and its kind is merged no more.
fn deliver(write: &Write<'_>, queue: &TunQueue, merge: &mut Merge, counters: &Counters) {
    let sent = if !queue.has_headers() {
        // Nothing is merged for such a device.
        write.packets().try_for_each(|packet| queue.send(packet))
    } else if write.count() == 1 {
        // Spared the long list of parts.
        write.packets().try_for_each(|packet| send_plain(queue, packet))
    } else {
        let mut parts = [IoSlice::new(&[]); 1 + MAX_MERGED];
        let mut count = 0;
        for (slot, part) in parts.iter_mut().zip(write.parts()) {
            *slot = IoSlice::new(part);
            count += 1;
        }
        queue.send_parts(&parts[..count])
    };
    match sent {
        Ok(()) => {
            counters.received_packets.add(write.count() as u64);
            let bytes: usize = write.packets().map(<[u8]>::len).sum();
            counters.received_bytes.add(bytes as u64);
        }
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) && write.count() > 1 => {
            let (allowed, protocol) = match write.kind() {
                GsoKind::UdpL4 => (&mut merge.udp, "UDP"),
                _ => (&mut merge.tcp, "TCP"),
            };
            if std::mem::replace(allowed, false) {
                warn!("the TUN device refuses superpackets of {protocol} ({error}): writing packet by packet");
            }
            for packet in write.packets() {
                match send_plain(queue, packet) {
                    Ok(()) => {
                        counters.received_packets.add(1);
                        counters.received_bytes.add(packet.len() as u64);
                    }
                    Err(error) => count_undelivered(1, &error, counters),
                }
            }
        }
        Err(error) => count_undelivered(write.count(), &error, counters),
    }
}

/// Hands a packet as it stands to a device with virtio headers.
fn send_plain(queue: &TunQueue, packet: &[u8]) -> io::Result<()> {
    queue.send_parts(&[IoSlice::new(&PLAIN), IoSlice::new(packet)])
}

fn count_undelivered(packets: usize, error: &io::Error, counters: &Counters) {
    let full = error.kind() == io::ErrorKind::WouldBlock;
    for _ in 0..packets {
        counters.drop_one(if full { Drop::QueueFull } else { Drop::DeliverFailed });
    }
}
