//! A host of the overlay that knows nothing of offloads, played by the test: one packet a datagram, one datagram a call.

use super::{
    Overlay, inside,
    wire::{End, LONGEST, Wire, recv_within},
};
use flannel::{
    lab::{Container, Host, HostOptions},
    packet::{IcmpPacket, Icmpv6Packet, IpPacket, TcpSegment, UdpDatagram, protocol},
};
use ipnet::{Ipv4Net, Ipv6Net};
use mio::{Events, Interest, Poll, Token, Waker, unix::SourceFd};
use nix::sys::socket::{
    setsockopt,
    sockopt::{RcvBufForce, UdpGsoSegment},
};
use std::{
    io::{self, ErrorKind},
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    os::fd::AsRawFd,
    sync::{Arc, Mutex},
    thread::{self, JoinHandle},
    time::Duration,
};

/// The tunnel's port, the default of `Backend.Port`.
const PORT: u16 = 8285;

/// What the peer's socket may hold while the test is busy elsewhere: some 3,500 packets of 1,500 bytes by the kernel's
/// accounting, more than what a TCP connection has under way.
const BUFFER_BYTES: usize = 8 << 20;

/// The peer's socket in the underlay, and its subnets.
pub(crate) struct PlainPeer {
    pub(crate) host: Host,
    pub(crate) subnet: Ipv4Net,
    /// Only in a dual-stack network.
    pub(crate) subnet_v6: Option<Ipv6Net>,
    /// The overlay's MTU.
    mtu: usize,
    daemon: SocketAddr,
    /// Whether the daemon sends from the port that it receives on.
    one_port: bool,
    socket: UdpSocket,
}

impl PlainPeer {
    /// Joins the overlay with the first free subnets and waits until the first host's daemon knows of it: the only one that this
    /// peer talks to.
    pub(crate) fn join(overlay: &mut Overlay, options: &HostOptions) -> PlainPeer {
        let host = overlay.lab.host_with("peer", options).unwrap();
        let (subnet, subnet_v6) = (free_subnet(overlay), free_subnet_v6(overlay));
        let subnets = subnet_v6.map_or(subnet.to_string(), |v6| format!("{subnet},{v6}"));
        let public_ip = host.ip().to_string();
        // Before the lease is there, so that nothing is sent to a port that nobody has.
        let socket = inside(host.ns(), || UdpSocket::bind((host.ip(), PORT))).unwrap();
        socket.set_nonblocking(true).unwrap();
        setsockopt(&socket, RcvBufForce, &BUFFER_BYTES).unwrap();
        let reserve = ["leases", "reserve", &subnets, "--public-ip", &public_ip];
        overlay.registry.flanneld(host.ns(), &reserve);
        let daemon = &overlay.daemons[0];
        daemon.wait_for_log(&format!("peer {subnets} at {public_ip}"));
        PlainPeer {
            subnet,
            subnet_v6,
            mtu: daemon.subnet().mtu as usize,
            daemon: SocketAddr::from((overlay.hosts[0].ip(), PORT)),
            one_port: true,
            socket,
            host,
        }
    }

    /// With a daemon that spreads its flows over source ports.
    pub(crate) fn with_any_source_port(self) -> PlainPeer {
        PlainPeer {
            one_port: false,
            ..self
        }
    }

    /// Sends what may be several datagrams of `segment` bytes as one message, as a peer does that knows of offloads.
    pub(crate) fn send_segmented(&self, datagrams: &[u8], segment: usize) {
        setsockopt(&self.socket, UdpGsoSegment, &(segment as i32)).unwrap();
        let sent = self.socket.send_to(datagrams, self.daemon);
        setsockopt(&self.socket, UdpGsoSegment, &0).unwrap();
        sent.unwrap();
    }

    /// From now on a kernel is behind the peer, which has the first address of its subnet. Ends when dropped.
    pub(crate) fn carry(self) -> Carrier {
        let ns = self.host.ns().clone();
        let wire = Wire::open(&ns, self.mtu as u32, &[]);
        let ip = Ipv4Addr::from(u32::from(self.subnet.network()) + 1);
        ns.ip(&format!(
            "address add {ip}/{} dev {}",
            self.subnet.prefix_len(),
            wire.name()
        ))
        .unwrap();
        ns.ip(&format!("route add 10.5.0.0/16 dev {}", wire.name())).unwrap();
        let poll = Poll::new().unwrap();
        for (token, fd) in [(0, wire.as_raw_fd()), (1, self.socket.as_raw_fd())] {
            poll.registry()
                .register(&mut SourceFd(&fd), Token(token), Interest::READABLE)
                .unwrap();
        }
        let stop = Waker::new(poll.registry(), Token(2)).unwrap();
        let seen = Arc::new(Mutex::new(Seen::default()));
        let seeing = Arc::clone(&seen);
        let thread = thread::spawn(move || carry(poll, &self, &wire, &seeing));
        Carrier {
            endpoint: Container {
                name: "peer".to_owned(),
                ns,
                ip,
            },
            seen,
            stop,
            thread: Some(thread),
        }
    }

    fn try_recv(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let (length, source) = self.socket.recv_from(buffer)?;
        if self.one_port {
            assert_eq!(source, self.daemon, "one socket for both directions");
        }
        Ok(length)
    }
}

impl End for PlainPeer {
    fn send(&self, packet: &[u8]) {
        match self.socket.send_to(packet, self.daemon) {
            // Lost, as on any network.
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            sent => drop(sent.unwrap()),
        }
    }

    /// Fails the test when what comes is not one whole packet.
    fn recv(&self, limit: Duration) -> Option<Vec<u8>> {
        let mut buffer = vec![0; LONGEST];
        let length = recv_within(limit, &self.socket, || self.try_recv(&mut buffer))?;
        buffer.truncate(length);
        check_whole(&buffer, self.mtu).unwrap();
        Some(buffer)
    }
}

/// A peer with a kernel behind it; see [`PlainPeer::carry`].
pub(crate) struct Carrier {
    /// Where programs of the peer run, and its address in the overlay.
    pub(crate) endpoint: Container,
    seen: Arc<Mutex<Seen>>,
    stop: Waker,
    thread: Option<JoinHandle<()>>,
}

/// What came from the daemon.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen {
    pub(crate) packets: u64,
    /// Length of the longest packet.
    pub(crate) longest: usize,
    /// What was the matter with the first datagram that was not one whole packet.
    wrong: Option<String>,
}

impl Carrier {
    /// What came so far. Fails the test when something was not one whole packet of at most the MTU with right checksums.
    pub(crate) fn seen(&self) -> Seen {
        let seen = self.seen.lock().unwrap().clone();
        assert_eq!(seen.wrong, None, "after {} packets", seen.packets);
        seen
    }
}

impl Drop for Carrier {
    fn drop(&mut self) {
        self.stop.wake().unwrap();
        let ended = self.thread.take().map(JoinHandle::join);
        if !thread::panicking() {
            ended.unwrap().unwrap();
        } else if let Ok(Seen { wrong: Some(wrong), .. }) = self.seen.lock().as_deref() {
            // Not passed on, which is what the test has failed for.
            eprintln!("the peer has received {wrong}");
        }
    }
}

/// As the original does it: read one, write one.
fn carry(mut poll: Poll, peer: &PlainPeer, wire: &Wire, seen: &Mutex<Seen>) {
    let mut events = Events::with_capacity(3);
    let mut buffer = vec![0; LONGEST];
    loop {
        match poll.poll(&mut events, None) {
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            polled => polled.unwrap(),
        }
        if events.iter().any(|event| event.token() == Token(2)) {
            return;
        }
        while let Ok(length) = wire.try_recv(&mut buffer) {
            // What the socket does not take is lost, as on any network.
            let _ = peer.socket.send_to(&buffer[..length], peer.daemon);
        }
        while let Ok(length) = peer.try_recv(&mut buffer) {
            let packet = &buffer[..length];
            let mut checked = check_whole(packet, peer.mtu);
            if has_right_checksum(packet) == Some(false) {
                checked = Err(format!("a wrong checksum: {packet:02x?}"));
            }
            let mut seen = seen.lock().unwrap();
            seen.packets += 1;
            seen.longest = seen.longest.max(length);
            if let Err(wrong) = checked {
                seen.wrong.get_or_insert(wrong);
            } else {
                // Fails only when the lab is being removed.
                let _ = wire.try_send(packet);
            }
        }
    }
}

/// Whether these bytes are one whole IP packet of at most `mtu` bytes, with nothing behind it.
fn check_whole(bytes: &[u8], mtu: usize) -> Result<(), String> {
    let packet = IpPacket::parse(bytes).map_err(|error| format!("{error}: {bytes:02x?}"))?;
    let (length, total) = (bytes.len(), packet.total_len());
    if total != length || length > mtu {
        return Err(format!(
            "a datagram of {length} bytes holds a packet of {total}, where the MTU is {mtu}"
        ));
    }
    match packet {
        IpPacket::V4(packet) if !packet.verify_checksum() => {
            Err(format!("a wrong header checksum: {:02x?}", packet.header()))
        }
        _ => Ok(()),
    }
}

/// Whether the checksum of TCP, UDP or ICMP in a whole packet is right; `None` for anything else, and for fragments.
pub(crate) fn has_right_checksum(packet: &[u8]) -> Option<bool> {
    let (protocol, payload, pseudo_header) = match IpPacket::parse(packet).ok()? {
        IpPacket::V4(view) if view.is_fragment() => return None,
        IpPacket::V4(view) => (view.protocol(), &packet[view.header_len()..], view.pseudo_header()),
        IpPacket::V6(view) => {
            let upper = view.upper_layer().ok().filter(|upper| upper.fragment.is_none())?;
            let payload = &packet[upper.offset..];
            let pseudo_header = view.pseudo_header(upper.protocol, payload.len() as u32);
            (upper.protocol, payload, pseudo_header)
        }
    };
    match protocol {
        protocol::TCP => Some(TcpSegment::new_checked(payload).ok()?.verify_checksum(pseudo_header)),
        protocol::UDP => Some(UdpDatagram::new_checked(payload).ok()?.verify_checksum(pseudo_header)),
        protocol::ICMP => Some(IcmpPacket::new_checked(payload).ok()?.verify_checksum()),
        protocol::ICMPV6 => Some(Icmpv6Packet::new_checked(payload).ok()?.verify_checksum(pseudo_header)),
        _ => None,
    }
}

/// A subnet of the overlay that no host has.
pub(crate) fn free_subnet(overlay: &Overlay) -> Ipv4Net {
    let leases = overlay.registry.flanneld(overlay.hosts[0].ns(), &["leases", "list"]);
    let mut subnets = (1..=255).map(|third| Ipv4Net::new_assert(Ipv4Addr::new(10, 5, third, 0), 24));
    subnets.find(|subnet| !leases.contains(&subnet.to_string())).unwrap()
}

/// The same for IPv6; `None` where the overlay has none.
fn free_subnet_v6(overlay: &Overlay) -> Option<Ipv6Net> {
    let taken = overlay.daemons[0].subnet_v6()?;
    let leases = overlay.registry.flanneld(overlay.hosts[0].ns(), &["leases", "list"]);
    let network = Ipv6Net::new(taken.network(), 48).unwrap();
    let mut subnets = network.subnets(64).unwrap().skip(1);
    subnets.find(|subnet| !leases.contains(&subnet.to_string()))
}
