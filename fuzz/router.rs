//! What a worker is held against: a router that takes each packet for itself, looks at every route, and cuts superpackets
//! slowly.

use std::net::IpAddr;

use flannel::{
    engine::{
        admission::SourceCheck,
        counters::{Counters, Drop},
        io::memory::Incoming,
    },
    offload::{GsoKind, Headers, PartialChecksum, VirtioNetHdr, split},
    packet::{Hop, IcmpError, IpPacket, Ipv4Packet, Ipv6Packet, checksum, icmp, icmpv6, protocol},
    route_table::{Peer, PeerId},
};
use ipnet::IpNet;

use super::{
    longest,
    superpackets::{pseudo_header, split_slowly},
    world::World,
};

/// What the router has made of all that came so far.
#[derive(Default)]
pub(super) struct Router {
    /// What goes on, in order: to or from whom, and how.
    pub(super) out: Vec<(Peer, Vec<u8>)>,
    drops: [u64; Drop::ALL.len()],
    /// The ICMP errors that it would send if it sent as many as it liked, each with its receiver.
    answers: Vec<(IpAddr, Vec<u8>)>,
    /// Superpackets that were cut, and the packets that they became.
    pub(super) superpackets: u64,
    pub(super) segments: u64,
}

impl Router {
    /// What the device hands over.
    pub(super) fn is_read(&mut self, world: &World, read: &[u8]) {
        let (header, packet) = if world.headers {
            let Ok(header) = VirtioNetHdr::parse(read) else {
                return self.count(Drop::Malformed, 1);
            };
            (header, &read[VirtioNetHdr::LEN..])
        } else {
            (VirtioNetHdr::default(), read)
        };
        let Ok(view) = IpPacket::parse(packet) else {
            return self.count(Drop::Malformed, 1);
        };
        let found = longest(&world.routes, view.dst());
        if let Some(reason) = stays(world, &view, found.is_some()) {
            return self.count(reason, 1);
        }
        let Some(peer) = found else {
            return self.refuse(packet, IcmpError::NetUnreachable, Drop::NoRoute, world);
        };
        let Some(packet) = older(packet) else {
            return self.refuse(packet, IcmpError::TimeExceeded, Drop::TtlExpired, world);
        };
        let Some(packets) = cut(&header, &packet) else {
            return self.count(Drop::Malformed, 1);
        };
        if header.gso != GsoKind::None {
            self.superpackets += 1;
            self.segments += packets.len() as u64;
        }
        self.out.extend(packets.into_iter().map(|packet| (peer, packet)));
    }

    /// What a message brings.
    pub(super) fn arrives(&mut self, world: &World, message: &Incoming) {
        let segment = message.segment.unwrap_or(message.bytes.len()).max(1);
        for packet in message.bytes.chunks(segment) {
            let Ok(view) = IpPacket::parse(packet) else {
                self.count(Drop::Malformed, 1);
                continue;
            };
            match (admit(world, &view, message.from), older(packet)) {
                (Err(reason), _) => self.count(reason, 1),
                (Ok(_), None) => self.refuse(packet, IcmpError::TimeExceeded, Drop::TtlExpired, world),
                (Ok(id), Some(packet)) => {
                    let addr = (message.from, 8_285).into();
                    self.out.push((Peer { addr, id }, packet));
                }
            }
        }
    }

    fn refuse(&mut self, packet: &[u8], error: IcmpError, reason: Drop, world: &World) {
        self.count(reason, 1);
        let mut reply = [0; icmpv6::MAX_ERROR_LEN];
        let (v4, v6) = world.icmp_source;
        let to = IpPacket::parse(packet).expect("parsed before").src();
        let len = match to {
            IpAddr::V4(_) => icmp::error_reply(packet, error, v4, &mut reply),
            IpAddr::V6(_) => icmpv6::error_reply(packet, error, v6, &mut reply),
        };
        self.answers.extend(len.map(|len| (to, reply[..len].to_vec())));
    }

    pub(super) fn count(&mut self, reason: Drop, packets: usize) {
        self.drops[reason as usize] += packets as u64;
    }

    /// Whether each drop was counted under its reason.
    pub(super) fn assert_counted(&self, counters: &Counters) {
        for reason in Drop::ALL {
            assert_eq!(counters.dropped(reason), self.drops[reason as usize], "{reason:?}");
        }
    }

    /// Whether the senders that have an `address`, and nobody else, were told: all of them if they are few.
    pub(super) fn assert_told<A: PartialEq>(&self, told: &[(A, Vec<u8>)], address: impl Fn(IpAddr) -> Option<A>) {
        // The burst of the rate limit.
        const ALWAYS: usize = 50;
        let to_tell: Vec<_> = self
            .answers
            .iter()
            .filter_map(|(to, reply)| Some((address(*to)?, reply)))
            .collect();
        let mut left = to_tell.iter();
        for (to, reply) in told {
            assert!(
                left.any(|(expected, bytes)| expected == to && *bytes == reply),
                "an answer that nobody was to be sent"
            );
        }
        if self.answers.len() <= ALWAYS {
            assert_eq!(told.len(), to_tell.len(), "a sender was not told");
        }
    }
}

/// Why a packet that could not be answered does not leave, whether there is a route for it or not.
fn stays(world: &World, packet: &IpPacket<'_>, routed: bool) -> Option<Drop> {
    let no_hosts = |nets: &[&str], address: IpAddr| {
        let mut nets = nets.iter().map(|net| net.parse::<IpNet>().expect("a net"));
        nets.any(|net| net.contains(&address))
    };
    let nowhere = |address| {
        let v4 = ["0.0.0.0/8", "127.0.0.0/8", "224.0.0.0/3"];
        let v6 = ["::/96", "::ffff:0:0/96", "fe80::/10", "ff00::/8"];
        no_hosts(&v4, address) || no_hosts(&v6, address)
    };
    let last_of = |net: &IpNet, address| net.prefix_len() <= 30 && net.addr().is_ipv4() && net.broadcast() == address;
    let (src, dst) = (packet.src(), packet.dst());
    let no_source = nowhere(src) || world.own.iter().any(|own| last_of(own, src));
    if routed {
        let broadcast = world.routes.iter().any(|(net, _)| last_of(net, dst));
        return if no_source {
            Some(Drop::Martian)
        } else {
            broadcast.then_some(Drop::Broadcast)
        };
    }
    if no_hosts(&["255.255.255.255/32"], dst) || world.own.iter().any(|own| last_of(own, dst)) {
        Some(Drop::Broadcast)
    } else if dst.is_multicast() {
        Some(Drop::Multicast)
    } else {
        (nowhere(dst) || no_source).then_some(Drop::Martian)
    }
}

/// Under whose number a packet gets in that `from` has sent.
fn admit(world: &World, packet: &IpPacket<'_>, from: IpAddr) -> Result<PeerId, Drop> {
    let sender = world.routes.iter().find(|(_, peer)| peer.addr.ip() == from);
    let sender = sender.map(|(_, peer)| peer.id);
    match world.check {
        SourceCheck::Strict => {
            let sender = sender.ok_or(Drop::UnknownPeer)?;
            let owner = longest(&world.routes, packet.src());
            let honest = owner.is_some_and(|owner| owner.addr.ip() == from);
            let ours = world.own.iter().any(|net| net.contains(&packet.dst()));
            if honest && ours { Ok(sender) } else { Err(Drop::Spoofed) }
        }
        SourceCheck::Peer => sender.ok_or(Drop::UnknownPeer),
        SourceCheck::Off => Ok(sender.unwrap_or(PeerId::OTHERS)),
    }
}

/// The packet one hop older; `None` if that was its last.
fn older(packet: &[u8]) -> Option<Vec<u8>> {
    let mut packet = packet.to_vec();
    let hop = match IpPacket::parse(&packet).expect("parsed before") {
        IpPacket::V4(_) => Ipv4Packet::new_checked(packet.as_mut_slice())
            .expect("parsed before")
            .decrement_ttl(),
        IpPacket::V6(_) => Ipv6Packet::new_checked(packet.as_mut_slice())
            .expect("parsed before")
            .decrement_hop_limit(),
    };
    (hop == Hop::Forward).then_some(packet)
}

/// The packets that one of the device's stands for; `None` if its headers contradict each other, which `split` checks.
fn cut(header: &VirtioNetHdr, packet: &[u8]) -> Option<Vec<Vec<u8>>> {
    let mut copy = packet.to_vec();
    let mut headers = Headers::default();
    let planned = split::plan(header, &mut copy, &mut headers).ok()?;
    if header.gso == GsoKind::None {
        return Some(vec![finished(header, packet)]);
    }
    // The device may know a better pseudo header than the addresses make, which the slow way does not believe.
    let is_ordinary = header.checksum.is_none_or(|PartialChecksum { start, offset }| {
        let upper = if offset == 6 { protocol::UDP } else { protocol::TCP };
        let sum = checksum::fold(pseudo_header(packet, upper, start.into()));
        packet[usize::from(start) + usize::from(offset)..].starts_with(&sum.to_be_bytes())
    });
    Some(if is_ordinary {
        split_slowly(header, packet)
    } else {
        let planned = planned.iter(&headers, &copy);
        planned.map(|(head, tail)| [head, tail].concat()).collect()
    })
}

/// The packet with its checksum finished, word by word.
pub(super) fn finished(header: &VirtioNetHdr, packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    if let Some(PartialChecksum { start, offset }) = header.checksum {
        let start = usize::from(start);
        let mut sum = 0u32;
        for word in packet[start..].chunks(2) {
            sum += u32::from(word[0]) << 8 | u32::from(word.get(1).copied().unwrap_or(0));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        // Zero would say that there is none.
        let sum = if sum == 0xffff { 0xffff } else { !sum as u16 };
        packet[start + usize::from(offset)..][..2].copy_from_slice(&sum.to_be_bytes());
    }
    packet
}

/// What must stay in order: addresses, protocol and, where there are any, ports.
pub(super) type Flow = (IpAddr, IpAddr, u8, Option<[u8; 4]>);

/// The packet's flow, if it is a packet.
pub(super) fn flow(packet: &[u8]) -> Option<Flow> {
    const SCTP: u8 = 132;
    let view = IpPacket::parse(packet).ok()?;
    let (upper, payload) = match &view {
        IpPacket::V4(ip) => (ip.protocol(), (!ip.is_fragment()).then_some(ip.header_len())),
        IpPacket::V6(ip) => match ip.upper_layer() {
            Ok(upper) => (upper.protocol, upper.fragment.is_none().then_some(upper.offset)),
            Err(_) => (ip.next_header(), None),
        },
    };
    let has_ports = matches!(upper, protocol::TCP | protocol::UDP | SCTP);
    let payload = payload
        .filter(|_| has_ports)
        .and_then(|start| packet[..view.total_len()].get(start..));
    let ports = payload.and_then(|bytes| bytes.first_chunk()).copied();
    Some((view.src(), view.dst(), upper, ports))
}
