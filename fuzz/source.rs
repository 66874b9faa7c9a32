//! Packets made of a fuzzer's bytes: mostly such as hosts send, so that little is refused at once.

use std::net::{Ipv4Addr, Ipv6Addr};

use flannel::{
    offload::{GsoKind, PartialChecksum, VirtioNetHdr},
    packet::{Ipv4Packet, Ipv6Packet, TcpFlags, build, checksum, protocol},
};

use super::superpackets::pseudo_header;

/// Choices made by bytes; all zero when they run out.
pub(super) struct Source<'a>(pub(super) &'a [u8]);

impl<'a> Source<'a> {
    pub(super) fn next(&mut self) -> Option<u8> {
        let (&byte, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(byte)
    }

    pub(super) fn byte(&mut self) -> u8 {
        self.next().unwrap_or(0)
    }

    pub(super) fn take(&mut self, len: usize) -> &'a [u8] {
        let (bytes, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        bytes
    }

    pub(super) fn number(&mut self) -> u16 {
        u16::from_be_bytes([self.byte(), self.byte()])
    }

    /// `len` bytes of payload, different for different `seed`.
    pub(super) fn payload(seed: u8, len: usize) -> Vec<u8> {
        // A fuzzer watches each step of a loop over bytes: whole copies of the pattern are a hundred times as fast.
        let pattern: [u8; 256] = std::array::from_fn(|at| (at as u8).wrapping_mul(31).wrapping_add(seed));
        let mut payload = pattern.repeat(len.div_ceil(pattern.len()));
        payload.truncate(len);
        payload
    }
}

const OPTIONS: [&[u8]; 3] = [&[], &[1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2], &[1; 40]];

/// Two containers, one of which sends to the other over both versions of IP.
#[derive(Clone, Copy)]
pub(super) struct Pair {
    v4: build::Ipv4,
    v6: build::Ipv6,
}

impl Pair {
    /// Of the overlay's hosts 1 and 2.
    pub(super) const FIRST: Self = Self::new(1, 2, 2);

    /// Container `container` of host `from`, and container 2 of host `to`: host n has 10.5.n.0/24 and fd00:n::/64.
    pub(super) const fn new(from: u8, container: u8, to: u8) -> Self {
        Self {
            v4: build::Ipv4::new(Ipv4Addr::new(10, 5, from, container), Ipv4Addr::new(10, 5, to, 2)),
            v6: build::Ipv6::new(
                Ipv6Addr::new(0xfd00, from as u16, 0, 0, 0, 0, 0, container as u16),
                Ipv6Addr::new(0xfd00, to as u16, 0, 0, 0, 0, 0, 2),
            ),
        }
    }
}

/// A superpacket that the kernel could hand over: of any kind, with its checksum left open or finished.
pub(super) fn superpacket(source: &mut Source<'_>, pair: Pair, open: bool) -> (VirtioNetHdr, Vec<u8>) {
    let [form, flags, seed] = [source.byte(), source.byte(), source.byte()];
    let len = usize::from(source.number()).min(65_535 - 100);
    // At most 2,048 segments, whose headers have room.
    let size = source.number().max(len.div_ceil(2_048) as u16).max(1);
    let payload = Source::payload(seed, len);
    let udp = form & 1 != 0;
    let tcp = build::Tcp {
        src_port: 40_000,
        dst_port: 443,
        seq: u32::from(source.number()) << 16,
        ack: u32::from(source.number()),
        flags: TcpFlags(flags),
        window: 501,
        options: OPTIONS[usize::from(form >> 4) % OPTIONS.len()],
    };
    let mut packet = if form & 2 != 0 {
        let ip = pair.v6.traffic_class(seed).hop_limit(seed);
        if udp {
            ip.udp(1, 2, &payload)
        } else {
            ip.tcp(&tcp, &payload)
        }
    } else {
        let ip = pair
            .v4
            .ident(source.number())
            .dont_fragment(form & 4 != 0)
            .tos(seed)
            .ttl(seed);
        if udp {
            ip.udp(1, 2, &payload)
        } else {
            ip.tcp(&tcp, &payload)
        }
    };
    let (upper, offset) = if udp { (protocol::UDP, 6) } else { (protocol::TCP, 16) };
    let transport = if form & 2 != 0 { 40 } else { 20 };
    if open {
        let sum = checksum::fold(pseudo_header(&packet, upper, transport));
        packet[transport + offset..transport + offset + 2].copy_from_slice(&sum.to_be_bytes());
    }
    let header = VirtioNetHdr {
        gso: match (udp, form & 2 != 0) {
            (true, _) => GsoKind::UdpL4,
            (false, false) => GsoKind::TcpV4,
            (false, true) => GsoKind::TcpV6,
        },
        ecn: false,
        hdr_len: 0,
        gso_size: size,
        checksum: open.then_some(PartialChecksum {
            start: transport as u16,
            offset: offset as u16,
        }),
    };
    (header, packet)
}

/// Packets of the first pair's flows, as the bytes choose.
pub(super) fn stream(source: &mut Source<'_>) -> Vec<Vec<u8>> {
    let mut stream = Stream::of(Pair::FIRST);
    let mut packets = Vec::new();
    while let Some(which) = source.next() {
        packets.push(stream.packet(which, source));
    }
    // The slow path takes the square of their number.
    packets.truncate(300);
    packets.retain(|packet| !packet.is_empty());
    packets
}

/// Four flows of a pair, each of which mostly goes on where it was, sometimes with a difference.
pub(super) struct Stream {
    pair: Pair,
    flows: [At; 4],
}

#[derive(Clone, Copy, Default)]
struct At {
    seq: u32,
    ident: u16,
}

impl Stream {
    pub(super) fn of(pair: Pair) -> Self {
        Self {
            pair,
            flows: [At::default(); 4],
        }
    }

    /// The next packet of flow `which & 3`; the other bits and the source choose its length and what is special about it.
    pub(super) fn packet(&mut self, which: u8, source: &mut Source<'_>) -> Vec<u8> {
        let number = usize::from(which & 3);
        let change = if which & 0x80 != 0 { source.byte() } else { 0 };
        let amount = if change != 0 { source.byte() } else { 0 };
        let at = &mut self.flows[number];
        let len = match which >> 2 & 7 {
            0 => usize::from(amount),
            1 => 99,
            2 => 1_400,
            3 if change & 0x0f == 15 => 32_000,
            _ => 100,
        };
        let mut tcp = build::Tcp {
            src_port: 40_000,
            dst_port: 443,
            seq: at.seq,
            ack: 7,
            flags: TcpFlags::ACK,
            window: 501,
            options: OPTIONS[1],
        };
        let mut ip = self.pair.v4.ident(at.ident).dont_fragment(which & 0x40 != 0);
        let mut ip6 = self.pair.v6;
        match change & 0x0f {
            1 => tcp.flags = TcpFlags(amount),
            2 => tcp.ack += u32::from(amount),
            3 => tcp.window += u16::from(amount),
            4 => tcp.seq = tcp.seq.wrapping_sub(u32::from(amount)),
            5 => tcp.options = OPTIONS[usize::from(amount) % 3],
            6 => (ip, ip6) = (ip.tos(amount), ip6.traffic_class(amount)),
            7 => (ip, ip6) = (ip.ttl(amount), ip6.hop_limit(amount)),
            8 => ip = ip.ident(at.ident.wrapping_sub(u16::from(amount))),
            _ => {}
        }
        let payload = Source::payload(amount, len);
        let mut packet = match number {
            0 => ip.tcp(&tcp, &payload),
            1 => ip.udp(1, 2, &payload),
            2 => ip6.tcp(&tcp, &payload),
            _ => ip6.udp(1, 2, &payload),
        };
        at.seq = tcp.seq.wrapping_add(len as u32);
        at.ident = at.ident.wrapping_add(u16::from(change & 0x10 == 0));
        match change & 0x0f {
            // Damage, a cut, padding, no UDP checksum, a fragment, an unknown protocol.
            9 => {
                // Not in what makes the flow: two that share a slot of the flow table merge less, which is allowed.
                let flow = if number < 2 { 9..24 } else { 6..44 };
                let position = Some(usize::from(amount) % packet.len()).filter(|position| !flow.contains(position));
                let position = position.unwrap_or(packet.len() - 1);
                packet[position] ^= change >> 4 | 1;
            }
            10 => packet.truncate(packet.len() - usize::from(amount).min(packet.len())),
            11 => packet.extend_from_slice(&[0; 3][..usize::from(amount) % 4]),
            12 if number == 1 => packet[26..28].fill(0),
            13 if number < 2 => {
                let mut view = Ipv4Packet::new_checked(&mut packet[..]).expect("IPv4");
                view.set_fragment(usize::from(amount), change & 0x20 != 0);
                view.fill_checksum();
            }
            13 => {
                let mut view = Ipv6Packet::new_checked(&mut packet[..]).expect("IPv6");
                view.set_next_header(amount);
            }
            14 if number < 2 => {
                let mut view = Ipv4Packet::new_checked(&mut packet[..]).expect("IPv4");
                view.set_protocol(amount);
                view.fill_checksum();
            }
            _ => {}
        }
        packet
    }
}
