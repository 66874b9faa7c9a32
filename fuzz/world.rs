//! A host of an overlay with one worker and no kernel. Hosts 1 to 4 have 10.5.n.0/24 and fd00:n::/64 and are reached at
//! 192.0.2.n.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use flannel::{
    engine::{
        IcmpSource, Offloads,
        admission::{Admission, SourceCheck},
        counters::Counters,
        io::{
            DatagramSink, Io, Parts, Ready,
            memory::{self, Memory},
        },
        worker::{Setup, Worker},
    },
    route_table::{Peer, PeerId, RouteTable, Routes},
    sys::udp::{BATCH, MAX_SLICES, Message},
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::source::Source;

/// A host.
pub(super) struct World {
    pub(super) worker: Worker<Kernel>,
    pub(super) counters: Arc<Counters>,
    /// What is published.
    pub(super) routes: Vec<(IpNet, Peer)>,
    published: Routes,
    pub(super) own: [IpNet; 2],
    pub(super) check: SourceCheck,
    pub(super) icmp_source: (Ipv4Addr, Ipv6Addr),
    /// Whether its device has virtio headers.
    pub(super) headers: bool,
}

impl World {
    /// Host `number`, whose device has virtio headers if it takes superpackets.
    pub(super) fn new(number: u8, check: SourceCheck, offloads: Offloads, sources: u8) -> Self {
        let others = (1..5).filter(|other| *other != number);
        let routes: Vec<_> = others
            .flat_map(|other| subnets(other).map(|net| (net, peer(other))))
            .collect();
        let published = Routes::default();
        published.publish(RouteTable::new(routes.iter().copied()));
        let headers = offloads.tun_tcp || offloads.tun_udp;
        let mut io = Kernel::default();
        io.memory.packets.headers = headers;
        io.memory.device.headers = headers;
        let (counters, own) = (Arc::<Counters>::default(), subnets(number));
        let icmp_source = (
            Ipv4Addr::new(10, 5, number, 1),
            Ipv6Addr::new(0xfd00, number.into(), 0, 0, 0, 0, 0, 1),
        );
        let setup = Setup {
            routes: published.clone(),
            admission: Admission::new(check, own),
            icmp_source: IcmpSource {
                v4: icmp_source.0,
                v6: Some(icmp_source.1),
            },
            offloads,
            sources,
            busy_poll: Duration::ZERO,
            sharers: 1,
            counters: Arc::clone(&counters),
            fallbacks: Arc::default(),
        };
        Self {
            worker: Worker::new(io, setup),
            counters,
            routes,
            published,
            own,
            check,
            icmp_source,
            headers,
        }
    }

    /// Adds routes of any length, which may lie within one another.
    pub(super) fn add_routes(&mut self, count: u8, source: &mut Source<'_>) {
        for _ in 0..count {
            let [len, third, host] = [source.byte(), source.byte(), source.byte()];
            let net = if host & 0x80 == 0 {
                IpNet::from(Ipv4Net::new([10, 5, third, 0].into(), len % 33).expect("a length"))
            } else {
                let address = Ipv6Addr::new(0xfd00, third.into(), 0, 0, 0, 0, 0, 0);
                IpNet::from(Ipv6Net::new(address, len % 129).expect("a length"))
            };
            self.routes.retain(|(known, _)| known.trunc() != net.trunc());
            self.routes.push((net, peer(host & 0x7f)));
        }
        self.published.publish(RouteTable::new(self.routes.iter().copied()));
    }

    pub(super) fn memory(&mut self) -> &mut Memory {
        &mut self.worker.io().memory
    }

    pub(super) fn socket(&mut self) -> &mut Socket {
        &mut self.worker.io().socket
    }

    /// Moves all that is waiting.
    pub(super) fn drain(&mut self) {
        self.worker.drain().expect("the device is there");
    }
}

/// Where a host is reached.
pub(super) fn underlay(number: u8) -> IpAddr {
    [192, 0, 2, number].into()
}

pub(super) fn peer(number: u8) -> Peer {
    Peer {
        addr: (underlay(number), 8_285).into(),
        id: PeerId::new(number.into()).expect("far fewer than there are"),
    }
}

fn subnets(number: u8) -> [IpNet; 2] {
    let v6 = Ipv6Addr::new(0xfd00, number.into(), 0, 0, 0, 0, 0, 0);
    [
        Ipv4Net::new([10, 5, number, 0].into(), 24).expect("a length").into(),
        Ipv6Net::new(v6, 64).expect("a length").into(),
    ]
}

/// [`Memory`] with a socket that minds the kernel's limits.
#[derive(Default)]
pub(super) struct Kernel {
    memory: Memory,
    socket: Socket,
}

/// A socket that does not take every message at once, and panics at one that the kernel never takes.
pub(super) struct Socket {
    pub(super) peers: memory::Peers,
    /// How many messages it takes in one call.
    pub(super) most: usize,
}

impl Default for Socket {
    fn default() -> Self {
        Self {
            peers: memory::Peers::default(),
            most: BATCH,
        }
    }
}

impl Io for Kernel {
    type Packets = memory::Packets;
    type Peers = Socket;
    type Datagrams = memory::Datagrams;
    type Device = memory::Device;
    type Local = memory::Local;

    fn wait(&mut self, limit: Option<Duration>) -> io::Result<Ready> {
        self.memory.wait(limit)
    }

    fn parts(&mut self) -> Parts<'_, Self::Packets, Self::Peers, Self::Datagrams, Self::Device, Self::Local> {
        let parts = self.memory.parts();
        Parts {
            packets: parts.packets,
            peers: &mut self.socket,
            datagrams: parts.datagrams,
            device: parts.device,
            local: parts.local,
        }
    }
}

impl DatagramSink for Socket {
    fn send<'bytes>(
        &mut self,
        source: u8,
        messages: &[Message],
        slices: impl Iterator<Item = &'bytes [u8]>,
    ) -> io::Result<usize> {
        let slices: Vec<&[u8]> = slices.collect();
        let mut rest = &slices[..];
        assert!((1..=BATCH).contains(&messages.len()));
        for message in messages {
            let (own, others) = rest.split_at(message.slices);
            rest = others;
            let len: usize = own.iter().map(|slice| slice.len()).sum();
            assert!(message.slices <= MAX_SLICES);
            if let Some(segment) = message.segment.map(usize::from) {
                // Several datagrams, which together are no longer than one over IPv4 can be, and fewer than UDP_MAX_SEGMENTS
                // before Linux 6.9.
                assert!(0 < segment && segment < len && len <= 65_507 && len.div_ceil(segment) < 64);
            }
        }
        assert!(rest.is_empty(), "slices of no message");
        let now = &messages[..self.most.min(messages.len())];
        self.peers.send(source, now, slices.into_iter())
    }

    fn send_one(&mut self, datagram: &[u8], to: SocketAddr) -> io::Result<()> {
        self.peers.send_one(datagram, to)
    }

    fn wait_writable(&self, source: u8, limit: Duration) {
        self.peers.wait_writable(source, limit);
    }
}
