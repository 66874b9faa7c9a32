//! From the device to the peers: packets and superpackets are read one behind another into a buffer, cut by position, and
//! sent as few, long messages.

use std::{
    io,
    net::{SocketAddr, UdpSocket},
    ops::Range,
    time::{Duration, Instant},
};

use tracing::warn;

use crate::{
    offload::{
        Headers, SendPlan, VirtioNetHdr,
        send_plan::{Piece, Run},
        split,
    },
    route_table::RouteTable,
    sys::{
        tun::TunQueue,
        udp::{self, BATCH, Message, SendBatch},
    },
};

use super::{
    counters::{Counters, Drop},
    forward::{self, Verdict},
    refusal::Refusals,
};

/// Bytes after which a batch is sent: two superpackets, so that the second fills the message that the first one has begun. Half
/// of it and four times as much were measured to make no difference to TCP.
const FLUSH_BYTES: usize = 128 << 10;

/// Packets after which a batch is sent, if they are small: some 100 µs of work.
const FLUSH_PACKETS: usize = 128;

/// The longest that one read brings: a virtio header and the longest IP packet.
const MAX_READ: usize = VirtioNetHdr::LEN + 65_535;

/// Where the first packet of a batch lies: a cache line in, so that there is room for its virtio header.
const FIRST: usize = 64;

/// What a batch may grow to before it is sent, and a read more.
const BUFFER_BYTES: usize = FIRST + FLUSH_BYTES + MAX_READ;

/// How often a full socket is tried again before a message is dropped, and how long it is waited for each time. 4 ms in all:
/// the time in which the socket's buffer drains at 8 Gbit/s; longer only moves the loss into the device's queue.
const SEND_RETRIES: u32 = 4;
const SEND_WAIT: Duration = Duration::from_millis(1);

/// How long a peer whose route refuses segmented messages gets single ones before it is tried again.
const SEGMENTING_PAUSE: Duration = Duration::from_secs(60);

pub(super) struct Egress {
    buffer: Box<[u8]>,
    headers: Headers,
    plan: SendPlan,
    messages: Vec<Message>,
    batch: SendBatch,
    /// Whether messages may be segmented at all.
    segmenting: bool,
    /// Peers whose route refuses it, and until when.
    refusing: Vec<(SocketAddr, Instant)>,
}

impl Egress {
    pub(super) fn new(segmenting: bool) -> Self {
        Self {
            buffer: vec![0; BUFFER_BYTES].into_boxed_slice(),
            headers: Headers::default(),
            plan: SendPlan::default(),
            messages: Vec::with_capacity(BATCH),
            batch: SendBatch::new(),
            segmenting,
            refusing: Vec::new(),
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
    ) -> io::Result<bool> {
        self.plan.clear();
        self.headers.clear();
        let mut at = FIRST;
        let mut more = true;
        for _ in 0..FLUSH_PACKETS {
            if self.plan.bytes() >= FLUSH_BYTES || self.plan.runs().len() >= BATCH {
                break;
            }
            let (header, length) = match read(queue, &mut self.buffer, at) {
                Ok(read) => read,
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
            let packet = &mut self.buffer[at..at + length];
            let Some(header) = header else {
                counters.drop_one(Drop::Malformed);
                continue;
            };
            match forward::egress(packet, routes) {
                Verdict::Forward(to) => {
                    let merge = self.segmenting && !is_refusing(&mut self.refusing, to);
                    match split::plan(&header, packet, &mut self.headers) {
                        Ok(segments) if segments.count() == 1 && segments.header_len() == 0 => {
                            self.plan.push_packet(at, length, to, merge);
                        }
                        Ok(segments) => self.plan.push_segments(&segments, at, to, merge),
                        Err(_) => {
                            counters.drop_one(Drop::Malformed);
                            continue;
                        }
                    }
                    at += length;
                }
                Verdict::Refuse(error, reason) => {
                    counters.drop_one(reason);
                    if refusals.answer_local(packet, error) {
                        counters.icmp_errors.add(1);
                    }
                }
                Verdict::Drop(reason) => counters.drop_one(reason),
            }
        }
        self.send(socket, counters);
        Ok(more)
    }

    /// Sends the planned messages. What the socket does not take in time, or refuses, is dropped and counted.
    fn send(&mut self, socket: &UdpSocket, counters: &Counters) {
        let Self {
            plan,
            headers,
            buffer,
            messages,
            batch,
            refusing,
            ..
        } = self;
        let bytes = |pieces: Range<usize>| {
            plan.pieces()[pieces].iter().map(|piece| match *piece {
                Piece::Packet { start, len } => &buffer[start..start + len],
                Piece::Header { superpacket, index } => plan.superpacket(superpacket).0.header(index, headers),
            })
        };
        for runs in plan.runs().chunks(BATCH) {
            messages.clear();
            messages.extend(runs.iter().map(message));
            // A chunk has a first and a last run, and pieces are in the order of the runs.
            let pieces = runs[0].pieces.start..runs[runs.len() - 1].pieces.end;
            let mut prepared = batch.prepare(messages, bytes(pieces));
            let mut retries = SEND_RETRIES;
            while let Some(run) = runs.get(prepared.done()) {
                let first = prepared.done();
                let error = match prepared.send(socket) {
                    Ok(count) => {
                        for run in &runs[first..first + count] {
                            counters.sent_packets.add(run.count as u64);
                            counters.sent_bytes.add(run.bytes as u64);
                        }
                        continue;
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(error) => error,
                };
                let full = is_full(&error);
                if full && retries > 0 {
                    retries -= 1;
                    udp::wait_writable(socket, SEND_WAIT);
                    continue;
                }
                prepared.skip();
                if run.count > 1 && refuses_segments(&error) {
                    if !is_refusing(refusing, run.to) {
                        warn!(
                            "the way to {} refuses segmented messages ({error}): sending single datagrams for now",
                            run.to
                        );
                        refusing.push((run.to, Instant::now() + SEGMENTING_PAUSE));
                    }
                    send_singly(run, bytes(run.pieces.clone()), socket, counters);
                } else {
                    count_unsent(run.count, full, counters);
                }
            }
        }
    }
}

/// Reads the next packet to `at`, where it ends the buffer's contents so far; its virtio header (`None`: malformed) and its
/// length.
///
/// The header comes in front of the packet, where the last one ends. That one's bytes are put back, so that packets lie
/// without a gap.
#[inline]
fn read(queue: &TunQueue, buffer: &mut [u8], at: usize) -> io::Result<(Option<VirtioNetHdr>, usize)> {
    if !queue.has_headers() {
        let length = queue.recv(&mut buffer[at..at + MAX_READ - VirtioNetHdr::LEN])?;
        return Ok((Some(VirtioNetHdr::default()), length));
    }
    let from = at - VirtioNetHdr::LEN;
    let space = &mut buffer[from..from + MAX_READ];
    let mut saved = [0; VirtioNetHdr::LEN];
    saved.copy_from_slice(&space[..VirtioNetHdr::LEN]);
    let read = queue.recv(space);
    let header = VirtioNetHdr::parse(space);
    space[..VirtioNetHdr::LEN].copy_from_slice(&saved);
    Ok((header.ok(), read?.saturating_sub(VirtioNetHdr::LEN)))
}

fn is_refusing(refusing: &mut Vec<(SocketAddr, Instant)>, peer: SocketAddr) -> bool {
    if refusing.is_empty() {
        return false;
    }
    let now = Instant::now();
    refusing.retain(|(_, until)| now < *until);
    refusing.iter().any(|(refused, _)| *refused == peer)
}

#[inline]
fn message(run: &Run) -> Message {
    // At most 65,507 bytes in all where there are several.
    let segment = (run.count > 1).then_some(run.segment as u16);
    Message {
        to: run.to,
        slices: run.pieces.len(),
        segment,
    }
}

/// Sends the datagrams of a run one by one. Only where a route refuses them together.
fn send_singly<'a>(run: &Run, slices: impl Iterator<Item = &'a [u8]>, socket: &UdpSocket, counters: &Counters) {
    let bytes: Vec<u8> = slices.flatten().copied().collect();
    for datagram in bytes.chunks(run.segment) {
        match socket.send_to(datagram, run.to) {
            Ok(_) => {
                counters.sent_packets.add(1);
                counters.sent_bytes.add(datagram.len() as u64);
            }
            Err(error) => count_unsent(1, is_full(&error), counters),
        }
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

fn count_unsent(datagrams: usize, full: bool, counters: &Counters) {
    let reason = if full { Drop::QueueFull } else { Drop::SendFailed };
    for _ in 0..datagrams {
        counters.drop_one(reason);
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, net::Ipv4Addr};

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    use super::*;
    use crate::{engine::IcmpSource, packet::build};

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
        let queue = TunQueue::from(File::from(device));
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let source = IcmpSource {
            v4: Ipv4Addr::LOCALHOST,
            v6: None,
        };
        let (counters, mut refusals) = (Counters::default(), Refusals::new(source, 1).unwrap());
        let (mut egress, routes) = (Egress::new(true), RouteTable::default());
        let mut run = || egress.run(&queue, &socket, &routes, &mut refusals, &counters).unwrap();

        let lost = build::Ipv4::new([10, 5, 1, 2].into(), [10, 5, 9, 9].into()).udp(1, 2, b"anyone?");
        for _ in 0..FLUSH_PACKETS + 1 {
            nix::unistd::write(&kernel, &lost).unwrap();
        }
        assert!(run(), "there is one left");
        assert_eq!(counters.dropped(Drop::NoRoute), FLUSH_PACKETS as u64);
        assert!(!run());
        assert_eq!(counters.dropped(Drop::NoRoute), FLUSH_PACKETS as u64 + 1);
    }
}
