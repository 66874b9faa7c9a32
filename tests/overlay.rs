//! The `udp` overlay on real packets: hosts and containers in network namespaces, the real daemon on each. Needs root.

mod lab;

use flannel::{
    lab::{HostOptions, Namespace, wait_until},
    packet::{Ipv4Packet, build},
};
use lab::{
    CONFIG, Daemon, Overlay, PATIENCE, Registry, assert_loses, assert_reaches, inside, new_lab,
    original::{lease, public_ip},
    output_of, ping,
    plain_peer::free_subnet,
    programmed::{NEW_ADDRESS, assert_comes, by_hand, link, readdress},
    stream,
    traffic::transfer,
};
use std::{
    io,
    net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket},
    time::{Duration, Instant},
};

/// An address of the overlay that no host has leased.
fn unleased(overlay: &Overlay) -> Ipv4Addr {
    free_subnet(overlay).hosts().nth(6).unwrap()
}

/// How long a TCP connection attempt takes to fail, and how it does.
fn refusal(from: &Namespace, to: Ipv4Addr) -> (Duration, io::ErrorKind) {
    let start = Instant::now();
    let attempt = inside(from, || {
        TcpStream::connect_timeout(&SocketAddr::from((to, 80)), PATIENCE)
    });
    (start.elapsed(), attempt.unwrap_err().kind())
}

#[test]
fn two_hosts_reach_each_other_and_the_time_to_live_counts_both_daemons() {
    let overlay = Overlay::start("two", 2);
    overlay.assert_all_reach_all();
    let [from, to] = &overlay.containers[..] else {
        unreachable!()
    };
    assert_eq!(
        ping(&from.ns, to.ip, 1).ttl,
        Some(60),
        "from a container: two kernels, two daemons"
    );
    assert_eq!(
        ping(overlay.hosts[0].ns(), to.ip, 1).ttl,
        Some(61),
        "from the host itself"
    );
}

#[test]
fn five_hosts_reach_one_another() {
    Overlay::start("five", 5).assert_all_reach_all();
}

#[test]
fn device_route_and_subnet_file_are_as_the_originals() {
    let overlay = Overlay::start("device", 2);
    let subnet = overlay.daemons[0].subnet().subnet;
    let host = overlay.hosts[0].ns();
    let link = host.ip("-d link show flannel0").unwrap();
    for part in ["POINTOPOINT", "NOARP", "UP", "mtu 1472", "tun type tun pi off"] {
        assert!(link.contains(part), "{part} is not in {link}");
    }
    let network_address = format!("inet {}/32", subnet.network());
    assert!(host.ip("-4 addr show flannel0").unwrap().contains(&network_address));
    assert_eq!(
        host.ip("route show 10.5.0.0/16").unwrap().trim(),
        "10.5.0.0/16 dev flannel0"
    );
    let file = std::fs::read_to_string(overlay.daemons[0].subnet_file()).unwrap();
    assert_eq!(
        file,
        format!("FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET={subnet}\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n")
    );
    assert_eq!(subnet.addr().octets()[3], 1);
    let sockets = output_of(host, "ss", ["-Hlun"]);
    let bound = format!("{}:8285", overlay.hosts[0].ip());
    assert!(sockets.contains(&bound), "{bound} is not in {sockets}");
}

#[test]
fn a_destination_without_a_lease_is_unreachable_at_once_from_container_and_host() {
    let overlay = Overlay::start("dead", 2);
    let nowhere = unleased(&overlay);
    for from in [&overlay.containers[0].ns, overlay.hosts[0].ns()] {
        let output = output_of(from, "ping", ["-n", "-c", "1", "-W", "5", &nowhere.to_string()]);
        assert!(output.contains("Destination Net Unreachable"), "{output}");
        let (time, kind) = refusal(from, nowhere);
        assert_eq!(kind, io::ErrorKind::NetworkUnreachable);
        assert!(time < Duration::from_secs(3), "{time:?}");
    }
}

#[test]
fn traceroute_shows_each_hop() {
    let overlay = Overlay::start("trace", 2);
    overlay.assert_all_reach_all();
    let [from, to] = &overlay.containers[..] else {
        unreachable!()
    };
    let [near, far] = [0, 1].map(|host| overlay.daemons[host].subnet().subnet);
    for method in ["-U", "-I"] {
        let output = output_of(
            &from.ns,
            "traceroute",
            ["-n", "-w", "5", "-q", "1", "-N", "1", method, &to.ip.to_string()],
        );
        let hops: Vec<&str> = output
            .lines()
            .skip(1)
            .filter_map(|line| line.split_whitespace().nth(1))
            .collect();
        let expected = [near.addr(), near.addr(), far.addr(), far.network(), to.ip].map(|hop| hop.to_string());
        assert_eq!(
            hops, expected,
            "own kernel, own daemon, far daemon, far kernel, container: {output}"
        );
    }
}

#[test]
fn icmp_errors_are_rate_limited() {
    let overlay = Overlay::start("limit", 2);
    let nowhere = unleased(&overlay);
    let from = &overlay.containers[0];
    let before = unreachables(&from.ns);
    let start = Instant::now();
    inside(&from.ns, || {
        let socket = UdpSocket::bind((from.ip, 0)).unwrap();
        for _ in 0..50_000 {
            // Errors that earlier ones brought back are of no interest here.
            let _ = socket.send_to(b"anyone?", (nowhere, 9));
        }
    });
    wait_until(PATIENCE, "the first errors", || unreachables(&from.ns) > before).unwrap();
    let answers = unreachables(&from.ns) - before;
    // 1,000 a second and a burst of 50 for each worker; the sender's kernel drops some of them, too.
    let most = 1_000.0 * start.elapsed().as_secs_f64() + 50.0 * 64.0;
    assert!((answers as f64) <= most, "{answers} answers in {:?}", start.elapsed());
}

/// How many ICMP "destination unreachable" messages the namespace has received.
fn unreachables(ns: &Namespace) -> u64 {
    let snmp = output_of(ns, "cat", ["/proc/net/snmp"]);
    let mut icmp = snmp.lines().filter_map(|line| line.strip_prefix("Icmp: "));
    let (names, values) = (icmp.next().unwrap(), icmp.next().unwrap());
    let column = names.split(' ').position(|name| name == "InDestUnreachs").unwrap();
    values.split(' ').nth(column).unwrap().parse().unwrap()
}

#[test]
fn a_large_transfer_arrives_whole_in_both_directions() {
    let overlay = Overlay::start("bulk", 2);
    overlay.assert_all_reach_all();
    let [one, two] = &overlay.containers[..] else {
        unreachable!()
    };
    transfer(&[(one, two)], 8 << 20);
    transfer(&[(two, one)], 8 << 20);
}

#[test]
fn a_path_that_refuses_segmented_messages_gets_single_ones() {
    let mut overlay = Overlay::start("refused", 2);
    overlay.assert_all_reach_all();
    let [one, two] = &overlay.containers[..] else {
        unreachable!()
    };
    // Datagrams of the overlay's MTU no longer fit: the kernel refuses to cut them together, and fragments them alone.
    let peer = overlay.hosts[1].ip();
    overlay.hosts[0]
        .ns()
        .ip(&format!("route add {peer}/32 dev eth0 mtu 1400"))
        .unwrap();
    transfer(&[(one, two)], 8 << 20);
    overlay.daemons[0].assert_running();
}

#[test]
fn the_number_of_workers_and_the_plain_device_are_the_users_choice() {
    let lab = new_lab("choice");
    let registry = Registry::embedded(&lab);
    let hosts = [
        (HostOptions::default(), &["--workers=5"][..]),
        (HostOptions::default(), &["-tun=plain"]),
    ];
    let overlay = Overlay::start_hosts(lab, registry, CONFIG, &hosts);
    overlay.daemons[0].wait_for_log("5 workers");
    overlay.daemons[1].wait_for_log("1 worker,");
    let device = |host: usize| overlay.hosts[host].ns().ip("-d link show flannel0").unwrap();
    assert!(device(0).contains("numqueues 10"));
    assert!(!device(1).contains("multi_queue"));
    overlay.assert_all_reach_all();
}

#[test]
fn ipv6_travels_beside_ipv4() {
    let lab = new_lab("dual");
    let registry = Registry::embedded(&lab);
    let config = r#"{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:12:13::/48"}"#;
    let overlay = Overlay::start_on(lab, registry, config, 2);
    overlay.assert_all_reach_all();
    let subnets = overlay.daemons.iter().map(|daemon| daemon.subnet_v6().unwrap());
    let [near, far] = subnets.collect::<Vec<_>>()[..] else {
        unreachable!()
    };
    assert!(
        near != far && near.addr() != near.network(),
        "the bridge's address is the first one: {near}"
    );
    let host = overlay.hosts[0].ns();
    assert!(
        host.ip("-6 addr show flannel0")
            .unwrap()
            .contains(&format!("{}/128", near.network()))
    );
    assert!(
        host.ip("-6 route show fd00:12:13::/48")
            .unwrap()
            .contains("dev flannel0")
    );
    wait_until(PATIENCE, "an answer over IPv6", || {
        output_of(
            host,
            "ping",
            ["-6", "-n", "-c", "1", "-W", "1", &far.network().to_string()],
        )
        .contains("1 received")
    })
    .unwrap();
    // Nobody has the last one: an ICMPv6 error at once.
    let nowhere = output_of(host, "ping", ["-6", "-n", "-c", "1", "-W", "5", "fd00:12:13:ffff::7"]);
    assert!(nowhere.contains("No route"), "{nowhere}");
}

#[test]
fn a_second_daemon_on_the_same_host_serves_another_network() {
    let mut lab = new_lab("second");
    let mut hosts = vec![lab.host("h1").unwrap(), lab.host("h2").unwrap()];
    let first = Registry::embedded(&lab);
    let second = Registry::embedded(&lab).with("--etcd-prefix=/second/network");
    first.configure(hosts[0].ns(), CONFIG);
    second.configure(
        hosts[0].ns(),
        r#"{"Network":"10.6.0.0/16","Backend":{"Type":"udp","Port":8286}}"#,
    );
    let mut daemons = Vec::new();
    for host in &hosts {
        let mut one = Daemon::new(&lab, host, &first);
        one.start_and_wait();
        let mut other = Daemon::named(&format!("{}b", host.name()), &lab, host, &second);
        other.start_and_wait();
        other.wait_for_log("flannel1 is up");
        daemons.push((one, other));
    }
    let subnets: Vec<_> = daemons.iter().map(|(_, second)| second.subnet()).collect();
    let near = hosts[0].add_container("c1", subnets[0]).unwrap();
    let far = hosts[1].add_container("c2", subnets[1]).unwrap();
    assert_reaches(&near.ns, far.ip);

    // Neither disturbs the other when it goes.
    assert!(daemons[0].0.stop().success());
    assert_reaches(&near.ns, far.ip);
}

#[test]
fn two_networks_cannot_share_a_port() {
    let mut lab = new_lab("port");
    let host = lab.host("h1").unwrap();
    let first = Registry::embedded(&lab);
    let second = Registry::embedded(&lab).with("--etcd-prefix=/second/network");
    first.configure(host.ns(), CONFIG);
    second.configure(host.ns(), r#"{"Network":"10.6.0.0/16"}"#);
    let mut daemon = Daemon::new(&lab, &host, &first);
    daemon.start_and_wait();
    let mut other = Daemon::named("h1b", &lab, &host, &second);
    other.start();
    assert_eq!(other.wait_exit().code(), Some(1));
    assert!(other.log().contains("another process has the port"), "{}", other.log());
    daemon.assert_running();
}

#[test]
fn peers_come_move_and_go_while_packets_flow() {
    let mut overlay = Overlay::start("move", 3);
    overlay.assert_all_reach_all();
    let [c1, c2, c3] = &overlay.containers[..] else {
        unreachable!()
    };
    let bystander = stream::Stream::start(c1, c3, Duration::from_millis(2));

    // Host 2 moves to another address: its daemon is started anew with the address it has now.
    let host = overlay.hosts[1].ns();
    assert!(overlay.daemons[1].stop().success());
    let subnet = overlay.daemons[1].subnet().subnet;
    overlay
        .registry
        .flanneld(host, &["leases", "release", &subnet.trunc().to_string()]);
    assert_loses(&c1.ns, c2.ip);
    host.ip("addr flush dev eth0").unwrap();
    host.ip("addr add 192.168.77.99/24 dev eth0").unwrap();
    host.ip("route add default via 192.168.77.254").unwrap();
    overlay.daemons[1].start();
    let again = overlay.daemons[1].wait_ready().subnet;
    assert_eq!(again, subnet, "the subnet file's subnet is free: it is taken again");
    assert_reaches(&c1.ns, c2.ip);
    overlay.daemons[0].wait_for_log("192.168.77.99");

    let report = bystander.finish();
    assert_eq!(
        report.lost, [0; 0],
        "of {} datagrams between the other hosts",
        report.sent
    );
    assert_eq!((report.duplicates, report.reordered), (0, 0));
}

#[test]
fn a_lease_that_points_elsewhere_takes_its_traffic_along() {
    let overlay = Overlay::start("repoint", 2);
    let [one, two] = &overlay.hosts[..] else { unreachable!() };
    // A lease written by hand, as a host that moved would write it: first at host 2, then at a socket of this test.
    let decoy = Ipv4Addr::new(192, 168, 77, 254);
    let subnet = free_subnet(&overlay);
    let far = subnet.hosts().nth(8).unwrap();
    overlay.registry.flanneld(
        one.ns(),
        &[
            "leases",
            "reserve",
            &subnet.to_string(),
            "--public-ip",
            &decoy.to_string(),
        ],
    );
    let peer = inside(overlay.lab.switch(), || UdpSocket::bind((decoy, 8285))).unwrap();
    peer.set_read_timeout(Some(PATIENCE)).unwrap();
    overlay.daemons[0].wait_for_log(&format!("peer {subnet} at {decoy}"));

    let from = &overlay.containers[0];
    let sender = inside(&from.ns, || UdpSocket::bind((from.ip, 4000))).unwrap();
    sender.send_to(b"hello", (far, 5000)).unwrap();
    let mut datagram = [0; 2000];
    let (length, source) = peer.recv_from(&mut datagram).unwrap();
    assert_eq!(
        source,
        SocketAddr::from((one.ip(), 8285)),
        "one socket for both directions"
    );
    let expected = build::Ipv4::new(from.ip, far).ttl(62).dont_fragment(true);
    let sent = Ipv4Packet::new_checked(&datagram[..length]).unwrap();
    assert!(sent.verify_checksum());
    assert_eq!(
        &datagram[..length],
        expected.ident(sent.ident()).udp(4000, 5000, b"hello"),
        "the bare IP packet"
    );

    // And back: a plain datagram with an IP packet in it, from a peer that is no flanneld.
    let reply = build::Ipv4::new(far, from.ip).udp(5000, 4000, b"hello yourself");
    peer.send_to(&reply, source).unwrap();
    sender.set_read_timeout(Some(PATIENCE)).unwrap();
    let (length, source) = sender.recv_from(&mut datagram).unwrap();
    assert_eq!(&datagram[..length], b"hello yourself");
    assert_eq!(source, SocketAddr::from((far, 5000)));

    // Rubbish does no harm.
    for rubbish in [&b""[..], b"x", &[0x45; 19], &[0x60; 39], &[0xff; 1472]] {
        peer.send_to(rubbish, (one.ip(), 8285)).unwrap();
    }
    assert_reaches(&from.ns, overlay.containers[1].ip);
    assert_reaches(two.ns(), from.ip);
}

#[test]
fn the_overlay_follows_the_external_address_and_mtu() {
    let (mut overlay, server) = Overlay::start_on_etcd("follow", CONFIG, 2);
    overlay.assert_all_reach_all();
    let (ns, subnet) = (overlay.hosts[0].ns().clone(), overlay.subnet(0));
    for (external, inner) in [(1_400, 1_372), (1_500, 1_472)] {
        by_hand(&ns, &format!("ip link set eth0 mtu {external}"));
        assert_comes(PATIENCE, "device and subnet file to follow", || {
            let device = link(&ns, "flannel0").map_or(0, |link| link["mtu"].as_u64().unwrap());
            ((device, overlay.daemons[0].subnet().mtu), (inner.into(), inner))
        });
        overlay.daemons[0].wait_for_log("Docker");
        overlay.assert_all_reach_all();
    }

    readdress(&ns, overlay.hosts[0].ip(), public_ip(101));
    assert_comes(NEW_ADDRESS, "the new address to be published", || {
        let expected = r#"{"PublicIP":"192.168.77.101","PublicIPv6":null}"#;
        (lease(&server, subnet), expected.to_owned())
    });
    overlay.assert_all_reach_all();
    overlay.daemons[0].assert_running();
    assert_eq!(overlay.subnet(0), subnet);
}

#[test]
fn what_others_take_from_the_device_is_put_back() {
    let overlay = Overlay::start("mended", 2);
    overlay.assert_all_reach_all();
    let ns = overlay.hosts[0].ns();
    let whole = || {
        (
            ns.ip("-4 address show flannel0").unwrap(),
            ns.ip("route show dev flannel0").unwrap(),
        )
    };
    let before = whole();
    for damage in [
        "route delete 10.5.0.0/16",
        "address flush dev flannel0",
        "link set flannel0 down",
        "link set flannel0 mtu 1300",
    ] {
        ns.ip(damage).unwrap();
        wait_until(PATIENCE, &format!("`ip {damage}` to be mended"), || whole() == before).unwrap();
        overlay.assert_all_reach_all();
    }
    overlay.daemons[0].wait_for_log("put route of flannel0 right");
}
