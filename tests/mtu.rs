//! The overlay's MTU: what fits passes, what does not is fragmented or answered as by any router, and nothing longer leaves for a
//! peer. Needs root.

mod lab;

use std::{collections::BTreeMap, iter, net::UdpSocket};

use flannel::{
    lab::{CONTAINER_BRIDGE, Container, HostOptions, Namespace, wait_until},
    packet::{IcmpPacket, Icmpv6Packet, IpPacket, Ipv4Packet, protocol},
};
use lab::{
    CONFIG, Overlay, PATIENCE, Registry, assert_reaches, inside, new_lab, output_of,
    pair::{ATTEMPTS, Ends, MTU, Pair},
    plain_peer::PlainPeer,
    traffic::{Burst, QUIET, new_port, pattern, transfer},
    wire::End,
};
use nix::sys::socket::{getsockopt, sockopt::IpMtu};

/// What the tunnel adds: an IPv4 header (20 bytes) and a UDP header (8). The inner headers of a ping are as long.
const HEADERS: u32 = 28;

/// Bytes of each stream: some dozens of superpackets.
const STREAM: usize = 4 << 20;

/// Hosts whose underlay has this MTU: two with daemons, and a plain peer that looks at each datagram it gets.
fn an_underlay_of(name: &str, underlay: u16) {
    let lab = new_lab(name);
    lab.switch().ip(&format!("link set br0 mtu {underlay}")).unwrap();
    let registry = Registry::embedded(&lab);
    let host = HostOptions {
        mtu: underlay,
        ..HostOptions::default()
    };
    let mut overlay = Overlay::start_hosts(lab, registry, CONFIG, &[(host.clone(), &[]), (host.clone(), &[])]);
    let peer = PlainPeer::join(&mut overlay, &host).carry();
    overlay.assert_all_reach_all();
    let mtu = overlay.daemons[0].subnet().mtu;
    assert_eq!(mtu, u32::from(underlay) - HEADERS);

    let [one, two] = &overlay.containers[..] else {
        unreachable!()
    };
    for from in [&one.ns, overlay.hosts[0].ns()] {
        for to in [two, &peer.endpoint] {
            assert_fits(from, to, mtu);
        }
    }
    transfer(&[(one, two), (two, one)], STREAM);
    transfer(&[(one, &peer.endpoint), (&peer.endpoint, one)], STREAM);
    // A superpacket, and datagrams that the container's own kernel has to fragment.
    let payload = (mtu - HEADERS) as usize;
    let superpacket = Burst {
        segment: payload,
        last: payload - 100,
        count: (65_000 / payload).min(64),
    };
    for to in [two, &peer.endpoint] {
        for burst in [superpacket, Burst::of_one(2 * payload), Burst::of_one(60_000)] {
            burst.exchange(one, to);
            burst.exchange(to, one);
        }
    }
    assert_eq!(
        peer.seen().longest,
        mtu as usize,
        "TCP fills its packets, and nothing is longer"
    );
    overlay.daemons.iter_mut().for_each(lab::Daemon::assert_running);
}

/// Fails the test unless a ping of exactly the MTU that must not be fragmented is answered, and one of a byte more is refused by
/// the sender's own kernel.
fn assert_fits(from: &Namespace, to: &Container, mtu: u32) {
    let ping = |packet: u32, wait: &str| {
        let (payload, to) = ((packet - HEADERS).to_string(), to.ip.to_string());
        output_of(
            from,
            "ping",
            ["-n", "-M", "do", "-c", "1", "-W", wait, "-s", &payload, &to],
        )
    };
    let what = format!("{} to answer a ping of {mtu} bytes from {}", to.name, from.name());
    wait_until(PATIENCE, &what, || ping(mtu, "1").contains("1 received")).unwrap();
    let beyond = ping(mtu + 1, "0.1");
    assert!(
        beyond.contains("0 received, +1 errors"),
        "of {} bytes: {beyond}",
        mtu + 1
    );
}

#[test]
fn an_underlay_of_9000() {
    an_underlay_of("mtu_9000", 9_000);
}

#[test]
fn an_underlay_of_1500() {
    an_underlay_of("mtu_1500", 1_500);
}

#[test]
fn an_underlay_of_1280() {
    an_underlay_of("mtu_1280", 1_280);
}

#[test]
fn an_underlay_of_576() {
    an_underlay_of("mtu_576", 576);
}

/// Containers whose own links take more than the overlay does: their host is the router that has to tell them.
fn containers_learn(name: &str, flags: &[&str]) {
    let lab = new_lab(name);
    let registry = Registry::embedded(&lab);
    let overlay = Overlay::start_hosts(
        lab,
        registry,
        CONFIG,
        &[(HostOptions::default(), flags), (HostOptions::default(), &[])],
    );
    let [from, to] = &overlay.containers[..] else {
        unreachable!()
    };
    assert_reaches(&from.ns, to.ip);
    for (host, container) in overlay.hosts.iter().zip(&overlay.containers) {
        for link in [CONTAINER_BRIDGE, "veth1"] {
            host.ns().ip(&format!("link set {link} mtu 1500")).unwrap();
        }
        container.ns.ip("link set eth0 mtu 1500").unwrap();
    }

    // Sockets leave "don't fragment" away: the host fragments, and tells nobody.
    from.ns.sysctl("ipv4/ip_no_pmtu_disc", "1").unwrap();
    for length in [1_444, 1_445, 1_472, 20_000] {
        Burst::of_one(length).exchange(from, to);
    }

    // By default they set it on what their own link takes.
    from.ns.sysctl("ipv4/ip_no_pmtu_disc", "0").unwrap();
    let socket = inside(&from.ns, || UdpSocket::bind((from.ip, 0))).unwrap();
    socket.connect((to.ip, new_port())).unwrap();
    let path_mtu = || getsockopt(&socket, IpMtu).unwrap();
    assert_eq!(path_mtu(), 1_500);
    wait_until(PATIENCE, "the container to be told of the overlay's MTU", || {
        // An error is the answer to an earlier one.
        let _ = socket.send(&pattern(1_445, 0));
        path_mtu() != 1_500
    })
    .unwrap();
    assert_eq!(path_mtu(), MTU as i32);
    Burst::of_one(1_472).exchange(from, to);
    // Both believe in segments of 1,460 bytes until they are told, the second one now.
    transfer(&[(from, to), (to, from)], STREAM);
}

#[test]
fn containers_learn_of_the_fast_paths_mtu() {
    containers_learn("learn_fast", &[]);
}

#[test]
fn containers_learn_of_the_plain_paths_mtu() {
    containers_learn("learn_plain", &["--tun=plain", "--offload=false"]);
}

/// The MTU that an ICMP error about a packet tells its sender; `None` for any other packet.
fn told_mtu(packet: &[u8], about: &[u8]) -> Option<u32> {
    let (rest, quote) = match IpPacket::parse(packet).ok()? {
        // Destination unreachable, fragmentation needed (RFC 792, RFC 1191).
        IpPacket::V4(ip) if ip.protocol() == protocol::ICMP => {
            let icmp = IcmpPacket::new_checked(ip.payload()).ok()?;
            ((icmp.kind(), icmp.code()) == (3, 4)).then(|| (icmp.rest(), icmp.payload().to_vec()))?
        }
        // Packet too big (RFC 4443).
        IpPacket::V6(ip) if ip.next_header() == protocol::ICMPV6 => {
            let icmp = Icmpv6Packet::new_checked(ip.payload()).ok()?;
            ((icmp.kind(), icmp.code()) == (2, 0)).then(|| (icmp.rest(), icmp.payload().to_vec()))?
        }
        _ => return None,
    };
    // Its ports and what is behind them; hops and checksums have changed on the way.
    let ports = if about[0] >> 4 == 4 { 20..28 } else { 40..48 };
    assert_eq!(quote[ports.clone()], about[ports], "the error quotes the packet");
    Some(rest)
}

/// Sends a packet until an ICMP error about it comes back; the kernel sends only so many in a second.
fn assert_told(end: &impl End, packet: &[u8]) {
    let told = (0..ATTEMPTS).find_map(|_| {
        end.send(packet);
        iter::from_fn(|| end.recv(QUIET)).find_map(|answer| told_mtu(&answer, packet))
    });
    assert_eq!(told, Some(MTU as u32));
}

/// Sends packets, all at once for the daemon, until the fragments of each have arrived: none longer than the MTU, and together
/// what the packet holds.
fn assert_fragmented(pair: &Pair, from: &impl End, to: &impl End, packets: &[Vec<u8>]) {
    let mut pieces: BTreeMap<u16, BTreeMap<usize, Vec<u8>>> = BTreeMap::new();
    let mut missing: Vec<_> = packets
        .iter()
        .map(|packet| Ipv4Packet::new_checked(&packet[..]).unwrap())
        .collect();
    for _ in 0..ATTEMPTS {
        let asleep = pair.daemon_asleep();
        packets.iter().for_each(|packet| from.send(packet));
        drop(asleep);
        while let Some(fragment) = to.recv(QUIET) {
            assert!(fragment.len() <= MTU);
            let Ok(view) = Ipv4Packet::new_checked(&fragment[..]) else {
                continue;
            };
            let pieces = pieces.entry(view.ident()).or_default();
            pieces.insert(view.fragment_offset(), view.payload().to_vec());
            let whole: Vec<u8> = pieces.values().flatten().copied().collect();
            missing.retain(|packet| packet.ident() != view.ident() || packet.payload() != whole);
            if missing.is_empty() {
                return;
            }
        }
    }
    panic!("{} of {} packets did not arrive whole", missing.len(), packets.len());
}

/// Packets that are too large for the overlay, from both sides: from behind the host into the tunnel, and out of a tunnel whose
/// other end thinks more of it.
fn too_large_packets_meet_a_router(name: &str, flags: &[&str]) {
    let mut pair = Pair::start(name, flags);
    let link = format!("link set {} mtu {MTU}", pair.wire.name());
    pair.overlay.hosts[0].ns().ip(&link).unwrap();
    let payload = pattern(1_460, 0);
    let there = Ends {
        from: pair.near,
        to: pair.far,
    };
    let back = Ends {
        from: pair.far,
        to: pair.near,
    };
    let udp = |ends: Ends| ends.v4().dont_fragment(true).udp(7, 9, &payload);
    assert_told(&pair.wire, &udp(there));
    assert_told(&pair.peer, &udp(back));
    assert_told(&pair.wire, &there.v6().udp(7, 9, &payload));
    assert_told(&pair.peer, &back.v6().udp(7, 9, &payload));

    let run = |ends: Ends| -> Vec<Vec<u8>> {
        let packet = |index: u16| ends.v4().ident(index).udp(7, 9, &pattern(1_460, index.into()));
        (1..=20).map(packet).collect()
    };
    assert_fragmented(&pair, &pair.wire, &pair.peer, &run(there));
    assert_fragmented(&pair, &pair.peer, &pair.wire, &run(back));
    pair.overlay.daemons[0].assert_running();
}

#[test]
fn too_large_packets_meet_a_router_on_the_fast_path() {
    too_large_packets_meet_a_router("router_fast", &[]);
}

#[test]
fn too_large_packets_meet_a_router_on_the_plain_path() {
    too_large_packets_meet_a_router("router_plain", &["--tun=plain", "--offload=false"]);
}
