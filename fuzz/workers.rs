//! The targets for a whole worker of `flannel::engine`, without a kernel: what comes out on one side is held against what a
//! slow, obvious router makes of what went in on the other.

use std::{
    collections::{HashMap, VecDeque},
    hash::Hash,
    net::SocketAddr,
    sync::Arc,
};

use flannel::{
    engine::{
        Offloads,
        admission::SourceCheck,
        counters::{Counters, Drop, Flow as Traffic, PeerTraffic},
        io::memory::{Device, Incoming, Sent},
    },
    offload::{GsoKind, PartialChecksum, VirtioNetHdr, coalesce::MAX_MERGED},
    packet::{IpPacket, checksum, protocol},
    route_table::PeerId,
    sys::udp::BATCH,
};

use super::{
    longest,
    router::{Flow, Router, finished, flow},
    source::{Pair, Source, Stream, superpacket},
    superpackets::{Facts, adopt_ident, pseudo_header, split_slowly},
    world::{World, underlay},
};

const ALL: Offloads = Offloads {
    tun_tcp: true,
    tun_udp: true,
    udp_segment: true,
    udp_gro: true,
};

/// Bytes and packets after which an input is not read on: enough for several batches, which hold 128 KiB or 128 packets.
const MAX_BYTES: usize = 200_000;
const MAX_PACKETS: usize = 500;

/// Segments of one superpacket: several segmented messages of 63. More only take the fuzzer's time.
const MAX_SEGMENTS: usize = 256;

/// A whole worker fed with messages of peers and of strangers.
///
/// The device is given each packet that is to be let in, once, one hop older and in its flow's order, alone or within a
/// superpacket that is cut into just such; all else is counted under its reason.
pub fn ingress(data: &[u8]) {
    let mut source = Source(data);
    let [setup, routes] = [source.byte(), source.byte()];
    let check = [SourceCheck::Strict, SourceCheck::Peer, SourceCheck::Off][usize::from(setup & 3) % 3];
    let offloads = Offloads {
        tun_tcp: setup & 4 != 0,
        tun_udp: setup & 8 != 0,
        ..ALL
    };
    let refusal = match setup >> 5 {
        5 => Some(libc::EINVAL),
        6 => Some(libc::EAGAIN),
        7 => Some(libc::EIO),
        _ => None,
    };
    let mut world = World::new(2, check, offloads, 1);
    world.add_routes(routes % 4, &mut source);
    world.memory().device.headers |= setup & 16 != 0;
    world.memory().device.refuse_superpackets = refusal;

    let mut router = Router::default();
    let mut streams = SENDERS.map(|(from, container, to)| Stream::of(Pair::new(from, container, to)));
    let (mut messages, mut bytes) = (0, 0);
    while let Some(form) = source.next()
        && messages < MAX_PACKETS
        && bytes < MAX_BYTES
    {
        let who = source.byte();
        let number = usize::from(who & 7);
        let from = match who >> 3 & 7 {
            // A stranger, and those that may pose as others.
            4 => 99,
            other @ 5.. => other - 4,
            _ => SENDERS[number].0,
        };
        for message in incoming(form, from, &mut streams[number], &mut source) {
            messages += 1;
            bytes += message.bytes.len();
            router.arrives(&world, &message);
            world.memory().datagrams.waiting.push_back(message);
        }
        if who & 0xc0 == 0xc0 {
            world.drain();
        }
    }
    world.drain();

    let written = Written::of(&world.memory().device, offloads);
    let found = assert_in_order(&router.flows(), &written.flows(), |delivered, bytes| {
        delivered.is(bytes)
    });
    let lost = router.out.len() - written.packets.len();
    match refusal {
        Some(libc::EAGAIN) => router.count(Drop::QueueFull, lost),
        Some(libc::EIO) => router.count(Drop::DeliverFailed, lost),
        _ => assert_eq!(lost, 0, "packets are lost"),
    }
    if lost == 0 {
        assert_not_overtaken(&written.packets, &found);
    }
    router.assert_counted(&world.counters);
    let told = std::mem::take(&mut world.socket().peers.sent);
    let told: Vec<_> = told.into_iter().map(|sent| (sent.to, sent.bytes)).collect();
    router.assert_told(&told, |to| Some(longest(&world.routes, to)?.addr));
    let counters = &world.counters;
    assert_eq!(counters.icmp_errors.get(), told.len() as u64);
    assert_eq!(counters.messages_received.get(), messages as u64);
    assert_eq!(counters.received.packets.get(), written.packets.len() as u64);
    assert_eq!(
        counters.received.bytes.get(),
        sum(&written.packets, |it| it.bytes.len())
    );
    assert_eq!(counters.superpackets_merged.get(), written.superpackets.len() as u64);
    assert_eq!(counters.merges.get(), sum(&written.superpackets, |packets| *packets));
    let of_peers = router.out.iter().map(|(peer, bytes)| (peer.id, bytes.len()));
    assert_by_peer(counters, |traffic| &traffic.received, of_peers);
}

/// A whole worker fed with what a device could hand over, and with bytes that none would; its socket refuses now and then.
///
/// Each peer is sent what is its, cut into packets as one would write that down, one hop older; a flow's packets in order and
/// from one port. What is not sent is counted under its reason.
pub fn egress(data: &[u8]) {
    let mut source = Source(data);
    let [setup, sources, most, routes] = [source.byte(), source.byte(), source.byte(), source.byte()];
    let offloads = Offloads {
        tun_tcp: setup & 1 == 0,
        udp_segment: setup & 2 == 0,
        ..Offloads::default()
    };
    let refusal = match setup >> 2 & 7 {
        2 => Some(libc::EIO),
        3 => Some(libc::EINVAL),
        4 => Some(libc::EMSGSIZE),
        5 => Some(libc::EOPNOTSUPP),
        6 => Some(libc::EAGAIN),
        7 => Some(libc::EPERM),
        _ => None,
    };
    let sources = sources % 64 + 1;
    let mut world = World::new(1, SourceCheck::Strict, offloads, sources);
    world.add_routes(routes % 8, &mut source);
    world.socket().most = usize::from(most) % BATCH + 1;
    world.socket().peers.refuse_segmented = refusal;

    let mut router = Router::default();
    let mut streams: Vec<Stream> = (0..8).map(|number| Stream::of(outgoing(number))).collect();
    let (mut reads, mut bytes, mut refusals) = (0, 0, 0);
    while let Some(form) = source.next()
        && reads + router.out.len() < MAX_PACKETS
        && bytes < MAX_BYTES
    {
        let read = match form & 7 {
            0 => {
                world.drain();
                continue;
            }
            1 => {
                refusals += 1;
                let errno = ERRORS[usize::from(form >> 4 & 7)];
                world.socket().peers.refuse_next.push_back(errno);
                continue;
            }
            _ => read(form, &mut streams, world.headers, &mut source),
        };
        reads += 1;
        bytes += read.len();
        router.is_read(&world, &read);
        world.memory().packets.waiting.push_back(read);
    }
    world.drain();

    let sent = std::mem::take(&mut world.socket().peers.sent);
    // One port keeps all of a peer's packets in order.
    let lane = |to, bytes: &[u8]| (to, if sources == 1 { None } else { flow(bytes) });
    let planned: Vec<_> = router.out.iter().map(|(peer, it)| (lane(peer.addr, it), it)).collect();
    let taken: Vec<_> = sent.iter().map(|it| (lane(it.to, &it.bytes), &it.bytes)).collect();
    assert_in_order(&planned, &taken, |one, other| one == other);
    let mut ports = HashMap::new();
    for datagram in &sent {
        let port = ports.entry(flow(&datagram.bytes)).or_insert(datagram.source);
        assert!(
            datagram.source == *port && *port < sources,
            "a flow has one source port"
        );
    }
    let counters = Arc::clone(&world.counters);
    for reason in [Drop::QueueFull, Drop::SendFailed] {
        router.count(reason, counters.dropped(reason) as usize);
    }
    let lost = counters.dropped(Drop::QueueFull) + counters.dropped(Drop::SendFailed);
    assert_eq!(
        lost,
        (router.out.len() - sent.len()) as u64,
        "packets are lost uncounted"
    );
    assert_eq!(counters.send_errors().map(|(_, packets)| packets).sum::<u64>(), lost);
    if refusals == 0 && !matches!(refusal, Some(libc::EAGAIN | libc::EPERM)) {
        assert_eq!(lost, 0, "packets are lost where only their going together is refused");
    }
    router.assert_counted(&counters);
    let told = std::mem::take(&mut world.memory().local.sent);
    router.assert_told(&told, Some);
    assert_eq!(counters.icmp_errors.get(), told.len() as u64);
    assert_eq!(counters.sent.packets.get(), sent.len() as u64);
    assert_eq!(counters.sent.bytes.get(), sum(&sent, |it| it.bytes.len()));
    assert_eq!(counters.messages_sent.get(), world.socket().peers.messages as u64);
    assert_eq!(counters.superpackets_split.get(), router.superpackets);
    assert_eq!(counters.segments.get(), router.segments);
    let ids: HashMap<SocketAddr, PeerId> = router.out.iter().map(|(peer, _)| (peer.addr, peer.id)).collect();
    let of_peers = sent.iter().map(|it| (ids[&it.to], it.bytes.len()));
    assert_by_peer(&counters, |traffic| &traffic.sent, of_peers);
}

/// The same packets from one host to another, each with all offloads or with none: in all four cases the receiver's device
/// is given the same, which is what the sender's handed over, two hops older.
pub fn fast_plain(data: &[u8]) {
    let mut source = Source(data);
    let sources = source.byte() % 64 + 1;
    let (mut fast, mut plain) = (Vec::new(), Vec::new());
    let mut streams: Vec<Stream> = (0..4).map(|container| Stream::of(Pair::new(1, container, 2))).collect();
    let mut bytes = 0;
    while let Some(form) = source.next()
        && plain.len() < MAX_PACKETS
        && bytes < MAX_BYTES
    {
        let container = form >> 2 & 3;
        let open = form & 0x10 != 0;
        let (header, packet) = if form & 3 == 0 {
            modest_superpacket(&mut source, Pair::new(1, container, 2), open)
        } else {
            let which = source.byte();
            with_header(streams[usize::from(container)].packet(which, &mut source), open)
        };
        bytes += packet.len();
        fast.push([&header.emit()[..], &packet].concat());
        if header.gso == GsoKind::None {
            plain.push(finished(&header, &packet));
        } else {
            plain.extend(split_slowly(&header, &packet));
        }
    }

    let sender = |offloads| World::new(1, SourceCheck::Strict, offloads, sources);
    let receiver = |offloads| World::new(2, SourceCheck::Strict, offloads, 1);
    let none = Offloads::default();
    let (mut first, mut second) = (Router::default(), Router::default());
    let (one, other) = (sender(none), receiver(none));
    plain.iter().for_each(|packet| first.is_read(&one, packet));
    let on_the_way = first.out.into_iter().map(|(_, bytes)| from_host(1, None, bytes));
    on_the_way.for_each(|message| second.arrives(&other, &message));
    for (from, reads) in [(ALL, fast), (none, plain)] {
        let mut sender = sender(from);
        sender.memory().packets.waiting.extend(reads);
        sender.drain();
        let sent = std::mem::take(&mut sender.socket().peers.sent);
        for to in [ALL, none] {
            let mut receiver = receiver(to);
            let messages = if to.udp_gro { merged(&sent) } else { single(&sent) };
            receiver.memory().datagrams.waiting.extend(messages);
            receiver.drain();
            let written = Written::of(&receiver.memory().device, to);
            assert_in_order(&second.flows(), &written.flows(), |delivered, bytes| {
                delivered.is(bytes)
            });
            assert_eq!(written.packets.len(), second.out.len(), "from {from} to {to}");
        }
    }
}

/// Containers that send to host 2 or to another, as (host, container, receiving host). Nobody is host 5.
const SENDERS: [(u8, u8, u8); 8] = [
    (1, 2, 2),
    (1, 3, 2),
    (3, 2, 2),
    (4, 2, 2),
    (1, 4, 2),
    (2, 2, 2),
    (5, 2, 2),
    (1, 2, 3),
];

/// Containers of host 1 that send to hosts 2 to 4, and to 5, which is none.
fn outgoing(number: u8) -> Pair {
    Pair::new(1, 2 + (number >> 2), 2 + (number & 3))
}

/// What a socket says of a message: that it is full, that a route cannot cut it, or of a network or a firewall.
const ERRORS: [i32; 8] = [
    libc::EAGAIN,
    libc::ENOBUFS,
    libc::EPERM,
    libc::EIO,
    libc::EINTR,
    libc::ENETUNREACH,
    libc::EINVAL,
    libc::ECONNREFUSED,
];

/// What a device hands over, or could not.
fn read(form: u8, streams: &mut [Stream], headers: bool, source: &mut Source<'_>) -> Vec<u8> {
    let number = form >> 4 & 7;
    let open = form & 8 != 0;
    let (header, packet) = match form & 7 {
        2 => {
            let len = usize::from(source.number()) % 2_048;
            return source.take(len).to_vec();
        }
        3 => {
            let len = usize::from(source.number()) % 2_048;
            (VirtioNetHdr::default(), source.take(len).to_vec())
        }
        4 | 5 => modest_superpacket(source, outgoing(number), open),
        _ => {
            let which = source.byte();
            with_header(streams[usize::from(number)].packet(which, source), open)
        }
    };
    if headers {
        [&header.emit()[..], &packet].concat()
    } else {
        packet
    }
}

/// A superpacket of not too many segments.
fn modest_superpacket(source: &mut Source<'_>, pair: Pair, open: bool) -> (VirtioNetHdr, Vec<u8>) {
    let (header, packet) = superpacket(source, pair, open);
    // A packet has at most 65,535 bytes.
    let gso_size = header.gso_size.max(packet.len().div_ceil(MAX_SEGMENTS) as u16);
    (VirtioNetHdr { gso_size, ..header }, packet)
}

/// The packet and its header; `open`: the transport checksum, if there is one, is left to the device.
fn with_header(mut packet: Vec<u8>, open: bool) -> (VirtioNetHdr, Vec<u8>) {
    let checksum = if open { open_checksum(&mut packet) } else { None };
    let header = VirtioNetHdr {
        checksum,
        ..VirtioNetHdr::default()
    };
    (header, packet)
}

fn open_checksum(packet: &mut [u8]) -> Option<PartialChecksum> {
    let (upper, transport) = match IpPacket::parse(packet).ok()? {
        IpPacket::V4(ip) => (ip.protocol(), ip.header_len()),
        IpPacket::V6(ip) => (ip.next_header(), 40),
    };
    let offset = match upper {
        protocol::TCP => 16,
        protocol::UDP => 6,
        _ => return None,
    };
    let sum = checksum::fold(pseudo_header(packet, upper, transport));
    let field = packet.get_mut(transport + offset..transport + offset + 2)?;
    field.copy_from_slice(&sum.to_be_bytes());
    Some(PartialChecksum {
        start: transport as u16,
        offset: offset as u16,
    })
}

/// Messages of any bytes, or of packets of the stream, put together as GRO does or as it never would.
fn incoming(form: u8, from: u8, stream: &mut Stream, source: &mut Source<'_>) -> Vec<Incoming> {
    if form >> 5 == 0 {
        let len = usize::from(source.number()) % 2_048;
        let segment = usize::from(form) * 8;
        return vec![from_host(
            from,
            (segment > 0).then_some(segment),
            source.take(len).to_vec(),
        )];
    }
    let packets = (0..=form & 7).map(|_| {
        let which = source.byte();
        stream.packet(which, source)
    });
    let packets: Vec<Vec<u8>> = packets.collect();
    match form >> 3 & 3 {
        0 => packets
            .into_iter()
            .map(|packet| from_host(from, None, packet))
            .collect(),
        1 => gro(from, packets),
        // Cut where its packets may not begin.
        2 => vec![from_host(from, Some(packets[0].len().max(1)), packets.concat())],
        _ => {
            let segment = usize::from(source.byte()) + 1;
            vec![from_host(from, Some(segment), packets.concat())]
        }
    }
}

fn from_host(number: u8, segment: Option<usize>, bytes: Vec<u8>) -> Incoming {
    Incoming {
        from: underlay(number),
        segment,
        bytes,
    }
}

/// Datagrams as GRO hands them over: those of one length in one message, a shorter one at its end
/// (`udp_gro_receive_segment`).
fn gro(from: u8, datagrams: Vec<Vec<u8>>) -> Vec<Incoming> {
    // UDP_GRO_CNT_MAX
    const MOST: usize = 64;
    let mut messages: Vec<Incoming> = Vec::new();
    let mut room = 0;
    for datagram in datagrams {
        let size = messages
            .last()
            .map_or(0, |last| last.segment.unwrap_or(last.bytes.len()));
        match messages.last_mut() {
            Some(last) if room > 0 && datagram.len() <= size && last.bytes.len() + datagram.len() <= 65_507 => {
                last.segment = Some(size);
                room = if datagram.len() == size { room - 1 } else { 0 };
                last.bytes.extend(datagram);
            }
            _ => {
                room = if datagram.is_empty() { 0 } else { MOST - 1 };
                messages.push(from_host(from, None, datagram));
            }
        }
    }
    messages
}

/// Host 1's datagrams, one by one.
fn single(sent: &[Sent]) -> Vec<Incoming> {
    sent.iter().map(|it| from_host(1, None, it.bytes.clone())).collect()
}

/// Host 1's datagrams merged, those of each source port for themselves.
fn merged(sent: &[Sent]) -> Vec<Incoming> {
    sent.chunk_by(|one, other| one.source == other.source)
        .flat_map(|sent| gro(1, sent.iter().map(|it| it.bytes.clone()).collect()))
        .collect()
}

impl Router {
    /// What goes on, by flow.
    fn flows(&self) -> Vec<(Option<Flow>, &[u8])> {
        self.out.iter().map(|(_, bytes)| (flow(bytes), &bytes[..])).collect()
    }
}

/// What a device was given, superpackets cut slowly.
struct Written {
    packets: Vec<Delivered>,
    /// How many packets each superpacket is.
    superpackets: Vec<usize>,
}

/// A packet that a device was given.
struct Delivered {
    bytes: Vec<u8>,
    /// Whether it came in a superpacket.
    merged: bool,
}

impl Written {
    fn of(device: &Device, offloads: Offloads) -> Self {
        let mut all = Self {
            packets: Vec::new(),
            superpackets: Vec::new(),
        };
        for written in &device.written {
            let (header, packet) = if device.headers {
                let header = VirtioNetHdr::parse(written).expect("a header of ours");
                (header, &written[VirtioNetHdr::LEN..])
            } else {
                (VirtioNetHdr::default(), &written[..])
            };
            let taken = match header.gso {
                GsoKind::None => {
                    assert_eq!(header, VirtioNetHdr::default());
                    let (bytes, merged) = (packet.to_vec(), false);
                    all.packets.push(Delivered { bytes, merged });
                    continue;
                }
                GsoKind::TcpV4 | GsoKind::TcpV6 => offloads.tun_tcp,
                GsoKind::UdpL4 => offloads.tun_udp,
            };
            let packets = split_slowly(&header, packet);
            assert!(taken, "the device takes no {:?}", header.gso);
            assert!(packet.len() <= 65_535 && (2..=MAX_MERGED).contains(&packets.len()));
            all.superpackets.push(packets.len());
            let merged = true;
            all.packets
                .extend(packets.into_iter().map(|bytes| Delivered { bytes, merged }));
        }
        all
    }

    /// The packets by flow.
    fn flows(&self) -> Vec<(Option<Flow>, &Delivered)> {
        self.packets.iter().map(|it| (flow(&it.bytes), it)).collect()
    }
}

impl Delivered {
    /// Whether this is that packet; a merged one may have another identification where that means nothing.
    fn is(&self, packet: &[u8]) -> bool {
        self.bytes == packet
            || self.merged && self.bytes.len() == packet.len() && {
                let mut adopted = self.bytes.clone();
                adopt_ident(&mut adopted, packet);
                adopted == packet
            }
    }
}

/// Checks that what came out is some of what went in, in each flow's order; for each, which of those.
fn assert_in_order<K: Hash + Eq, In, Out>(
    went_in: &[(K, In)],
    came_out: &[(K, Out)],
    is: impl Fn(&Out, &In) -> bool,
) -> Vec<usize> {
    let mut waiting: HashMap<&K, VecDeque<usize>> = HashMap::new();
    for (index, (flow, _)) in went_in.iter().enumerate() {
        waiting.entry(flow).or_default().push_back(index);
    }
    let mut found = Vec::new();
    for (position, (flow, out)) in came_out.iter().enumerate() {
        let of_flow = waiting.entry(flow).or_default();
        // The first that it can be leaves the most for those behind it.
        let place = std::iter::from_fn(|| of_flow.pop_front()).find(|index| is(out, &went_in[*index].1));
        assert!(
            place.is_some(),
            "packet {position} of what came out did not go in, or was overtaken"
        );
        found.extend(place);
    }
    found
}

/// Checks that no packet has overtaken one that hides its flow, or the reverse. `places`: where each was.
fn assert_not_overtaken(packets: &[Delivered], places: &[usize]) {
    let facts: Vec<Facts> = packets.iter().map(|it| Facts::of(&it.bytes)).collect();
    for (position, place) in places.iter().enumerate() {
        for later in position + 1..places.len() {
            assert!(
                places[later] > *place
                    || !facts[position].obstructs(&facts[later]) && !facts[later].obstructs(&facts[position]),
                "a fragment is overtaken, or the like"
            );
        }
    }
}

/// Checks that packets of these lengths, and no others, were counted for their peers.
fn assert_by_peer(
    counters: &Counters,
    direction: impl Fn(&PeerTraffic) -> &Traffic,
    packets: impl Iterator<Item = (PeerId, usize)>,
) {
    let mut expected: HashMap<PeerId, (u64, u64)> = HashMap::new();
    for (id, len) in packets {
        let (packets, bytes) = expected.entry(id).or_default();
        *packets += 1;
        *bytes += len as u64;
    }
    for (id, traffic) in counters.peers() {
        let Traffic { packets, bytes } = direction(traffic);
        let expected = expected.remove(&id).unwrap_or_default();
        assert_eq!((packets.get(), bytes.get()), expected, "{id:?}");
    }
    assert!(expected.is_empty(), "peers are not counted for at all");
}

fn sum<T>(all: &[T], length: impl Fn(&T) -> usize) -> u64 {
    all.iter().map(|it| length(it) as u64).sum()
}
