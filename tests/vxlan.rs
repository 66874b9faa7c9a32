//! The `vxlan` backend with a real etcd: what the kernel is programmed with, that it stays so, and hosts of the original beside
//! ours. Needs root.

mod lab;

use flannel::lab::{HostOptions, Lab, Namespace, Process, wait_until};
use ipnet::Ipv4Net;
use lab::{
    Daemon, Overlay, PATIENCE, Registry, assert_reaches,
    etcd::{EtcdOptions, EtcdServer},
    flow::Flows,
    new_lab,
    original::{
        Original, add_tunnel, delete_lease, lease, other_subnet, public_ip, put_lease, put_leases, vxlan_lease,
    },
    output_of, ping,
    programmed::{
        Damage, Programmed, REPAIR, addresses, assert_mends, assert_mends_while_it_looks_on, assert_programmed,
        by_hand, external_damages, ifindex, in_one_go, link, mac, plug_in, tunnels, unplug,
    },
    traffic::transfer,
    vxlan::{CONFIG, DEVICE, MTU, info, is_up, mtu},
};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::{
    fs,
    net::Ipv4Addr,
    time::{Duration, Instant},
};

/// One host with a ready daemon, and an etcd in which the test is all the others.
fn alone(name: &str) -> (Overlay, EtcdServer) {
    Overlay::start_on_etcd(name, CONFIG, 1)
}

#[test]
fn every_pair_is_connected_and_all_is_as_the_original_makes_it() {
    let (overlay, server) = Overlay::start_on_etcd("vx_pairs", CONFIG, 3);
    overlay.assert_all_reach_all();
    for (index, host) in overlay.hosts.iter().enumerate() {
        let (ns, subnet, mac) = (host.ns(), overlay.subnet(index), mac(host.ns(), DEVICE));
        assert_programmed(host, DEVICE, &tunnels(&overlay, index, DEVICE), PATIENCE);
        assert_eq!(lease(&server, subnet), vxlan_lease(host.ip(), &mac));

        let link = link(ns, DEVICE).unwrap();
        assert_eq!(link["linkinfo"]["info_kind"], "vxlan");
        assert_eq!(link["mtu"], MTU);
        assert_eq!(link["inet6_addr_gen_mode"], "none");
        assert!(is_up(ns, DEVICE), "{link}");
        let info = info(ns, DEVICE);
        assert_eq!(
            (&info["id"], &info["port"], &info["learning"]),
            (&1.into(), &8472.into(), &false.into()),
            "{info}"
        );
        assert_eq!(
            (info["local"].as_str(), info["link"].as_str()),
            (Some(host.ip().to_string().as_str()), Some("eth0")),
            "{info}"
        );
        assert!(!has_gbp(&info), "{info}");
        assert_eq!(addresses(ns, DEVICE), [format!("{}/32", subnet.network())]);
        let accept_ra = output_of(ns, "cat", ["/proc/sys/net/ipv6/conf/flannel.1/accept_ra"]);
        assert_eq!(accept_ra, "0\n");
        let first = u8::from_str_radix(&mac[..2], 16).unwrap();
        assert_eq!(first & 0b11, 0b10, "{mac} is locally administered, and no group");
        assert_eq!(overlay.daemons[index].subnet().mtu, MTU);
    }

    let [one, two, _] = &overlay.containers[..] else {
        unreachable!()
    };
    assert_eq!(ping(&one.ns, two.ip, 1).ttl, Some(62), "only the two kernels forward");
    // ICMP and IPv4 headers take 28 bytes.
    let longest = (MTU - 28).to_string();
    let said = output_of(
        &one.ns,
        "ping",
        ["-M", "do", "-c", "1", "-s", &longest, &two.ip.to_string()],
    );
    assert!(said.contains(" 1 received"), "{said}");
    transfer(&[(one, two), (two, one)], 4 << 20);
    overlay.daemons.iter().for_each(Daemon::assert_content);
}

fn has_gbp(info: &Value) -> bool {
    // Without a value in some versions of iproute2.
    info.get("gbp").is_some_and(|gbp| *gbp != false)
}

#[test]
fn the_options_of_the_configuration_are_on_the_device() {
    let config = r#"{"network":"10.5.0.0/16","Backend":{"type":"VxLAN","vni":42,"PORT":4789,"learning":true,"gbp":true,
                     "mtu":1400,"TxChecksum":false}}"#;
    let (overlay, server) = Overlay::start_on_etcd("vx_options", config, 2);
    overlay.assert_all_reach_all();
    for (index, host) in overlay.hosts.iter().enumerate() {
        let device = "flannel.42";
        let info = info(host.ns(), device);
        assert_eq!(
            (&info["id"], &info["port"], &info["learning"]),
            (&42.into(), &4789.into(), &true.into()),
            "{info}"
        );
        assert!(has_gbp(&info), "{info}");
        assert_eq!(mtu(host.ns(), device), 1_350);
        assert_eq!(overlay.daemons[index].subnet().mtu, 1_350);
        let mac = mac(host.ns(), device);
        let expected = vxlan_lease(host.ip(), &mac).replace(r#""VNI":1"#, r#""VNI":42"#);
        assert_eq!(lease(&server, overlay.subnet(index)), expected);
        let off = || output_of(host.ns(), "ethtool", ["-k", device]).contains("tx-checksum-ip-generic: off");
        assert!(off());
        let index = ifindex(host.ns(), device);
        by_hand(host.ns(), &format!("ip link del {device}"));
        wait_until(REPAIR, "the device to be made again", || {
            ![0, index].contains(&ifindex(host.ns(), device)) && off()
        })
        .unwrap();
    }
}

/// What someone may do to the device and the entries of the first host.
fn damages(overlay: &Overlay) -> Vec<Damage> {
    let peer = &overlay.hosts[1];
    let (own, subnet) = (overlay.subnet(0).network(), overlay.subnet(1));
    let (gateway, peer_mac) = (subnet.network(), mac(peer.ns(), DEVICE));
    let peer_ip = peer.ip();
    vec![
        (
            "the device is set down and up",
            vec![
                "ip link set flannel.1 down".to_owned(),
                "ip link set flannel.1 up".to_owned(),
            ],
        ),
        ("the device is set down", vec!["ip link set flannel.1 down".to_owned()]),
        (
            "the device gets another MTU",
            vec!["ip link set flannel.1 mtu 1300".to_owned()],
        ),
        (
            "the device loses its address",
            vec![format!("ip address del {own}/32 dev flannel.1")],
        ),
        ("the device is deleted", vec!["ip link del flannel.1".to_owned()]),
        (
            "the device gets another MAC",
            vec!["ip link set flannel.1 address 02:00:00:00:00:07".to_owned()],
        ),
        ("our routes are flushed", vec!["ip route flush proto 85".to_owned()]),
        (
            "a route is replaced",
            vec![format!("ip route replace {subnet} via {peer_ip} dev eth0")],
        ),
        (
            "a forwarding entry is deleted",
            vec![format!("bridge fdb del {peer_mac} dev flannel.1 dst {peer_ip} self")],
        ),
        (
            "a forwarding entry leads elsewhere",
            vec![format!(
                "bridge fdb replace {peer_mac} dev flannel.1 dst 192.168.77.99 self permanent"
            )],
        ),
        (
            "a neighbour is deleted",
            vec![format!("ip neigh del {gateway} dev flannel.1")],
        ),
        (
            "a neighbour gets another MAC",
            vec![format!(
                "ip neigh replace {gateway} lladdr 02:00:00:00:00:08 dev flannel.1 nud permanent"
            )],
        ),
        (
            "a neighbour is no longer permanent",
            vec![format!(
                "ip neigh replace {gateway} lladdr {peer_mac} dev flannel.1 nud stale"
            )],
        ),
        (
            "a forwarding entry leads to another port",
            vec![format!(
                "bridge fdb replace {peer_mac} dev flannel.1 dst {peer_ip} port 9999 self permanent"
            )],
        ),
        (
            "all entries go at once",
            vec![
                format!("ip route del {subnet}"),
                format!("bridge fdb del {peer_mac} dev flannel.1 dst {peer_ip} self"),
                format!("ip neigh del {gateway} dev flannel.1"),
            ],
        ),
    ]
}

#[test]
fn whatever_someone_breaks_is_mended_within_two_seconds() {
    let (mut overlay, server) = Overlay::start_on_etcd("vx_mend", CONFIG, 2);
    overlay.assert_all_reach_all();
    let (ns, ip, subnet) = (overlay.hosts[0].ns().clone(), overlay.hosts[0].ip(), overlay.subnet(0));
    let (damages, external) = (damages(&overlay), external_damages(&overlay, 0));
    let state = || {
        let device = (mtu(&ns, DEVICE), is_up(&ns, DEVICE), addresses(&ns, DEVICE));
        (Programmed::of(&ns, DEVICE), device, lease(&server, subnet))
    };
    let (programmed, device, _) = state();
    let look = || {
        // The MAC may be another one, as long as all are told.
        let published = vxlan_lease(ip, &mac(&ns, DEVICE));
        (state(), (programmed.clone(), device.clone(), published))
    };
    // The kernel looks for neighbours itself when there are packets for them.
    let flows = Flows::start(&overlay.containers[0], &overlay.containers[1]);
    assert_mends(&mut overlay.daemons[0], &ns, &damages, look);
    // The tunnels do not mind them.
    for (what, commands) in &external {
        assert_mends_while_it_looks_on(&mut overlay.daemons[0], &ns, (what, commands), look);
    }
    flows.finish();
    assert_programmed(&overlay.hosts[1], DEVICE, &tunnels(&overlay, 1, DEVICE), REPAIR);
    overlay.assert_all_reach_all();
}

#[test]
fn what_others_have_made_is_left_alone() {
    let (mut overlay, server) = alone("vx_foreign");
    let (passing, passing_mac) = (other_subnet(250), "d2:72:c5:90:ff:50");
    let (staying, staying_mac) = (other_subnet(251), "d2:72:c5:90:ff:51");
    put_lease(&server, staying, &vxlan_lease(public_ip(251), staying_mac));
    let ours = Programmed::default().with_tunnel(DEVICE, staying, staying_mac, public_ip(251));
    assert_programmed(&overlay.hosts[0], DEVICE, &ours, PATIENCE);

    let foreign: [&[&str]; 3] = [
        &[
            // In the overlay's network, to the same subnet with another metric, through the device, and another overlay's.
            "10.5.200.0/24 via 192.168.77.254 dev eth0 proto static",
            "10.5.251.0/24 via 192.168.77.254 dev eth0 proto static metric 500",
            "10.66.0.0/16 via 10.5.251.0 dev flannel.1 proto static onlink",
            "10.99.1.0/24 via 192.168.77.254 dev eth0 proto 85",
        ],
        &["10.5.201.7 lladdr 02:00:00:00:01:01 PERMANENT"],
        // One of them for all MACs that are not known.
        &[
            "02:00:00:00:01:01 dst 192.168.77.201 self permanent",
            "00:00:00:00:00:00 dst 192.168.77.202 self permanent",
        ],
    ];
    let ns = overlay.hosts[0].ns().clone();
    for route in foreign[0] {
        by_hand(&ns, &format!("ip route add {route}"));
    }
    by_hand(
        &ns,
        "ip neigh add 10.5.201.7 lladdr 02:00:00:00:01:01 dev flannel.1 nud permanent",
    );
    for entry in foreign[2] {
        by_hand(
            &ns,
            &format!("bridge fdb append {} dev flannel.1 {}", &entry[..17], &entry[18..]),
        );
    }
    let ours = ours.with_foreign(foreign);
    assert_programmed(&overlay.hosts[0], DEVICE, &ours, Duration::ZERO);

    // A peer that comes and goes, a repair, and both ways of starting anew.
    put_lease(&server, passing, &vxlan_lease(public_ip(250), passing_mac));
    let both = ours.clone().with_tunnel(DEVICE, passing, passing_mac, public_ip(250));
    assert_programmed(&overlay.hosts[0], DEVICE, &both, PATIENCE);
    by_hand(&ns, "ip neigh del 10.5.250.0 dev flannel.1");
    assert_programmed(&overlay.hosts[0], DEVICE, &both, REPAIR);
    overlay.restart_all(|daemon| assert!(daemon.stop().success()));
    assert_programmed(&overlay.hosts[0], DEVICE, &both, Duration::ZERO);
    overlay.restart_all(Daemon::kill9);
    assert_programmed(&overlay.hosts[0], DEVICE, &both, Duration::ZERO);
    delete_lease(&server, passing);
    assert_programmed(&overlay.hosts[0], DEVICE, &ours, PATIENCE);
}

#[test]
fn restart_and_kill_9_of_both_daemons_lose_no_packet() {
    let (mut overlay, _server) = Overlay::start_on_etcd("vx_restart", CONFIG, 2);
    overlay.assert_all_reach_all();
    let devices: Vec<_> = overlay.hosts.iter().map(|host| ifindex(host.ns(), DEVICE)).collect();
    let flows = Flows::start(&overlay.containers[0], &overlay.containers[1]);
    let watcher = Watcher::start(&overlay, 0);
    overlay.restart_all(|daemon| assert!(daemon.stop().success()));
    overlay.restart_all(Daemon::kill9);
    let seen = watcher.finish();
    assert_eq!(seen.matches("flannel.1").count(), 0, "nothing is written anew:\n{seen}");
    flows.finish_without_loss();
    let kept: Vec<_> = overlay.hosts.iter().map(|host| ifindex(host.ns(), DEVICE)).collect();
    assert_eq!(kept, devices);
    for (index, host) in overlay.hosts.iter().enumerate() {
        assert_programmed(host, DEVICE, &tunnels(&overlay, index, DEVICE), PATIENCE);
    }
}

/// What `ip monitor` sees on a host.
struct Watcher {
    ns: Namespace,
    monitor: Process,
}

impl Watcher {
    /// Sees what happens from now on.
    fn start(overlay: &Overlay, index: usize) -> Watcher {
        let ns = overlay.hosts[index].ns().clone();
        let mut command = ns.command("ip");
        command.args(["monitor", "link", "address", "route", "neigh"]);
        let monitor = Process::spawn("ip monitor", command, &overlay.lab.dir().join("monitor.log")).unwrap();
        let watcher = Watcher { ns, monitor };
        watcher.wait_for_mark("10.98.0.1");
        watcher
    }

    /// All that it has seen.
    fn finish(self) -> String {
        self.wait_for_mark("10.98.0.2");
        self.monitor.log()
    }

    /// Makes a change of its own, again and again, and waits until it is seen, and with it all that came before.
    fn wait_for_mark(&self, address: &str) {
        wait_until(PATIENCE, "ip monitor to see a change", || {
            by_hand(&self.ns, &format!("ip address add {address}/32 dev lo"));
            by_hand(&self.ns, &format!("ip address del {address}/32 dev lo"));
            self.monitor.log().contains(address)
        })
        .unwrap();
    }
}

#[test]
fn a_daemon_killed_at_any_moment_of_its_start_loses_no_packet() {
    let (mut overlay, _server) = Overlay::start_on_etcd("vx_moments", CONFIG, 2);
    overlay.assert_all_reach_all();
    let flows = Flows::start(&overlay.containers[0], &overlay.containers[1]);
    let back = Flows::start(&overlay.containers[1], &overlay.containers[0]);
    overlay.daemons[0].kill9();
    for moment in ["external interface", "flannel.1 is up", "peer ", "wrote "] {
        overlay.daemons[0].start();
        overlay.daemons[0].wait_for_log(moment);
        overlay.daemons[0].kill9();
    }
    overlay.daemons[0].start_and_wait();
    flows.finish_without_loss();
    back.finish_without_loss();
    assert_programmed(&overlay.hosts[0], DEVICE, &tunnels(&overlay, 0, DEVICE), Duration::ZERO);
}

#[test]
fn without_etcd_damage_is_mended_and_a_new_start_breaks_no_flow() {
    let (mut overlay, mut server) = Overlay::start_on_etcd("vx_noetcd", CONFIG, 2);
    overlay.assert_all_reach_all();
    overlay.daemons[0].wait_until_remembered(1);
    server.kill();
    let (before, known_as) = (tunnels(&overlay, 0, DEVICE), mac(overlay.hosts[0].ns(), DEVICE));
    by_hand(overlay.hosts[0].ns(), "ip link del flannel.1");
    assert_programmed(&overlay.hosts[0], DEVICE, &before, REPAIR);
    assert_eq!(
        mac(overlay.hosts[0].ns(), DEVICE),
        known_as,
        "nobody could learn of another one"
    );
    assert_reaches(&overlay.containers[0].ns, overlay.containers[1].ip);

    let flows = Flows::start(&overlay.containers[0], &overlay.containers[1]);
    overlay.daemons.iter_mut().for_each(Daemon::kill9);
    // As if the other one had come just now: what is known is written down once in some seconds at most.
    overlay.daemons[0].forget_peers();
    overlay.daemons.iter_mut().for_each(Daemon::start);
    overlay.daemons[0].wait_ready();
    overlay.daemons[0].wait_for_log("0 peers. Packets flow");
    assert_programmed(&overlay.hosts[0], DEVICE, &before, Duration::ZERO);
    server.restart();
    overlay.daemons[0].wait_for_log("the registry answers");
    overlay.daemons[1].wait_ready();
    flows.finish_without_loss();
    assert_programmed(&overlay.hosts[0], DEVICE, &before, Duration::ZERO);
}

#[test]
fn a_machine_that_starts_again_is_known_by_the_same_mac() {
    let (mut overlay, mut server) = Overlay::start_on_etcd("vx_reboot", CONFIG, 2);
    overlay.assert_all_reach_all();
    overlay.daemons[0].wait_until_remembered(1);
    let ns = overlay.hosts[0].ns().clone();
    let (programmed, known_as) = (tunnels(&overlay, 0, DEVICE), mac(&ns, DEVICE));
    let published = lease(&server, overlay.subnet(0));
    for etcd_is_there in [true, false] {
        if !etcd_is_there {
            server.kill();
        }
        overlay.daemons[0].kill9();
        by_hand(&ns, "ip link del flannel.1");
        overlay.daemons[0].start_and_wait();
        assert_eq!(mac(&ns, DEVICE), known_as, "etcd is there: {etcd_is_there}");
        assert_programmed(&overlay.hosts[0], DEVICE, &programmed, REPAIR);
        assert_reaches(&overlay.containers[0].ns, overlay.containers[1].ip);
        assert_reaches(&overlay.containers[1].ns, overlay.containers[0].ip);
    }
    server.restart();
    overlay.daemons[0].wait_for_log("the registry answers");
    assert_eq!(lease(&server, overlay.subnet(0)), published);
}

#[test]
fn more_changes_than_the_kernel_can_tell_of_are_noticed() {
    let (mut overlay, _server) = Overlay::start_on_etcd("vx_flood", CONFIG, 2);
    overlay.assert_all_reach_all();
    let ns = overlay.hosts[0].ns().clone();
    let expected = tunnels(&overlay, 0, DEVICE);
    overlay.daemons[0].process().signal(Signal::SIGSTOP);
    // Each is some hundred bytes for whoever listens, and in the kernel's accounting far more than any buffer holds.
    let flood = |what| {
        (0..40_000_u32).map(move |n| {
            format!(
                "route {what} 172.{}.{}.{} dev eth0",
                16 + (n >> 16),
                n >> 8 & 255,
                n & 255
            )
        })
    };
    in_one_go(&overlay, &ns, flood("add"));
    by_hand(&ns, "ip route flush proto 85");
    by_hand(&ns, "ip neigh flush dev flannel.1 nud permanent");
    in_one_go(&overlay, &ns, flood("del"));
    assert_eq!(Programmed::of(&ns, DEVICE).routes.len(), 0);
    overlay.daemons[0].process().signal(Signal::SIGCONT);
    assert_programmed(&overlay.hosts[0], DEVICE, &expected, REPAIR);
    assert_reaches(&overlay.containers[0].ns, overlay.containers[1].ip);
}

#[test]
fn an_external_interface_that_is_made_again_is_taken_up_again() {
    let (mut overlay, server) = Overlay::start_on_etcd("vx_replug", CONFIG, 2);
    overlay.assert_all_reach_all();
    let ns = overlay.hosts[0].ns().clone();
    let (expected, published) = (tunnels(&overlay, 0, DEVICE), lease(&server, overlay.subnet(0)));
    unplug(&overlay, 0);
    assert_eq!(
        ifindex(&ns, DEVICE),
        0,
        "the device goes with the interface that it is on"
    );
    overlay.daemons[0].wait_for_log("WARN");
    overlay.daemons[0].assert_running();
    plug_in(&overlay, 0);
    assert_programmed(&overlay.hosts[0], DEVICE, &expected, REPAIR);
    assert_eq!(lease(&server, overlay.subnet(0)), published);
    overlay.assert_all_reach_all();
    // It is the new one that is followed from now on.
    by_hand(&ns, "ip link set eth0 mtu 1400");
    wait_until(PATIENCE, "the device to follow", || mtu(&ns, DEVICE) == 1_350).unwrap();
}

/// The lease of peer `number` of thousands.
fn one_of_many(number: u32) -> (Ipv4Net, String) {
    let [_, _, high, low] = number.to_be_bytes();
    let mac = format!("d2:72:c5:90:{high:02x}:{low:02x}");
    // The host takes one of the first hundred.
    let subnet = Ipv4Net::new_assert(Ipv4Addr::new(10, 129 + high, low, 0), 24);
    (subnet, vxlan_lease(Ipv4Addr::new(172, 16, high, low), &mac))
}

/// How much processor time a process has had.
fn processor_time(pid: u32) -> Duration {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let nanoseconds = tasks.map(|task| {
        // A thread that has just ended has had its time.
        let stat = fs::read_to_string(task.unwrap().path().join("schedstat")).unwrap_or_default();
        stat.split_whitespace().next().map_or(0, |time| time.parse().unwrap())
    });
    Duration::from_nanos(nanoseconds.sum())
}

#[test]
fn five_thousand_peers_are_programmed_at_the_start_and_one_more_costs_little() {
    const PEERS: u32 = 5_000;
    // What is wanted of an optimised build, and what still tells a cost for each pair of peers from one for each peer without.
    let (longest_start, most_time) = if cfg!(debug_assertions) {
        (Duration::from_secs(10), Duration::from_millis(500))
    } else {
        (Duration::from_secs(3), Duration::from_millis(10))
    };
    let config = CONFIG.replace("10.5.0.0/16", "10.128.0.0/9");
    let (mut overlay, server) = Overlay::start_on_etcd("vx_many", &config, 1);
    let ns = overlay.hosts[0].ns().clone();
    assert!(overlay.daemons[0].stop().success());
    put_leases(&overlay.lab, &server, (1..=PEERS).map(one_of_many));

    let start = Instant::now();
    overlay.daemons[0].start_and_wait();
    let took = start.elapsed();
    let all = Programmed::of(&ns, DEVICE);
    for entries in [&all.routes, &all.neighbours, &all.forwarding] {
        assert_eq!(entries.len(), PEERS as usize);
    }
    assert!(took < longest_start, "{took:?}");

    let pid = overlay.daemons[0].process().pid();
    let before = processor_time(pid);
    let (subnet, value) = one_of_many(PEERS + 1);
    put_lease(&server, subnet, &value);
    wait_until(PATIENCE, "the route to one more", || {
        !by_hand(&ns, &format!("ip route show {subnet}")).is_empty()
    })
    .unwrap();
    let cost = processor_time(pid) - before;
    println!("{PEERS} peers programmed within {took:?} of the start, one more within {cost:?} of processor time");
    assert!(cost < most_time, "{cost:?}");

    // A restart finds all as it should be.
    overlay.daemons[0].kill9();
    let start = Instant::now();
    overlay.daemons[0].start_and_wait();
    println!("a restart took {:?}", start.elapsed());
    assert_eq!(Programmed::of(&ns, DEVICE).routes.len(), all.routes.len() + 1);
}

#[test]
fn what_left_or_changed_while_the_daemon_was_dead_is_right_after_its_start() {
    let (mut overlay, server) = alone("vx_stale");
    let put = |third: u8, host: u8, mac: &str| {
        put_lease(&server, other_subnet(third), &vxlan_lease(public_ip(host), mac));
        Programmed::default().with_tunnel(DEVICE, other_subnet(third), mac, public_ip(host))
    };
    let [a, b, c, d] = [10, 11, 12, 13].map(|last| format!("d2:72:c5:90:ff:{last:02x}"));
    let before = put(250, 250, &a).and(put(251, 251, &b)).and(put(252, 252, &c));
    assert_programmed(&overlay.hosts[0], DEVICE, &before, PATIENCE);
    overlay.daemons[0].kill9();
    delete_lease(&server, other_subnet(250));
    // One has another MAC, one another address, and one is new.
    let after = put(251, 251, &d).and(put(252, 253, &c)).and(put(253, 250, &a));
    overlay.daemons[0].start_and_wait();
    assert_programmed(&overlay.hosts[0], DEVICE, &after, Duration::ZERO);
}

#[test]
fn a_peer_with_another_mac_or_address_leaves_nothing_of_the_old() {
    let (overlay, server) = alone("vx_moves");
    let [one, two] = [250, 251].map(other_subnet);
    let [a, b, c] = ["d2:72:c5:90:ff:0a", "d2:72:c5:90:ff:0b", "d2:72:c5:90:ff:0c"];
    let comes = |leases: &[(Ipv4Net, u8, &str)]| {
        let mut expected = Programmed::default();
        for &(subnet, last, mac) in leases {
            let value = vxlan_lease(public_ip(last), mac);
            if lease(&server, subnet) != value {
                put_lease(&server, subnet, &value);
            }
            expected = expected.with_tunnel(DEVICE, subnet, mac, public_ip(last));
        }
        assert_programmed(&overlay.hosts[0], DEVICE, &expected, PATIENCE);
    };
    comes(&[(one, 250, a)]);
    // Another MAC, another address, both.
    comes(&[(one, 250, b)]);
    comes(&[(one, 251, b)]);
    comes(&[(one, 250, a)]);
    comes(&[(one, 250, a), (two, 251, b)]);
    // The hosts are exchanged; for a moment both subnets are said to be at the same one.
    comes(&[(one, 251, b), (two, 250, a)]);
    // The only thing that changes of one is what was the other's.
    comes(&[(one, 251, c), (two, 250, b)]);
    delete_lease(&server, two);
    comes(&[(one, 251, c)]);
    delete_lease(&server, one);
    comes(&[]);
}

/// A lease of 10.5.`third`.0/24 at 192.168.77.`third`, with these members beside the address.
fn put_other(server: &EtcdServer, third: u8, members: &str) {
    let value = format!(r#"{{"PublicIP":"{}","PublicIPv6":null,{members}}}"#, public_ip(third));
    put_lease(server, other_subnet(third), &value);
}

#[test]
fn leases_of_the_original_are_understood_in_all_their_forms_and_others_skipped() {
    let (overlay, server) = alone("vx_leases");
    let good = [
        (
            250,
            r#""BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"d2:72:c5:90:ff:50"}"#,
            "d2:72:c5:90:ff:50",
        ),
        // Of an older release.
        (
            251,
            r#""BackendType":"vxlan","BackendData":{"VtepMAC":"d2:72:c5:90:ff:51"}"#,
            "d2:72:c5:90:ff:51",
        ),
        (
            252,
            r#""New":[1],"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"d2:72:c5:90:ff:52","Speed":{"Gbit":10}}"#,
            "d2:72:c5:90:ff:52",
        ),
        // Of a dual-stack host.
        (
            253,
            r#""BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"D2:72:C5:90:FF:53"},"BackendV6Data":{"VNI":1,"VtepMAC":"d2:72:c5:90:ff:54"}"#,
            "d2:72:c5:90:ff:53",
        ),
    ];
    let mut expected = Programmed::default();
    for (third, members, mac) in good {
        put_other(&server, third, members);
        expected = expected.with_tunnel(DEVICE, other_subnet(third), mac, public_ip(third));
    }
    assert_programmed(&overlay.hosts[0], DEVICE, &expected, PATIENCE);

    let bad = [
        (
            240,
            r#""BackendType":"vxlan","BackendData":{"VNI":2,"VtepMAC":"d2:72:c5:90:ff:40"}"#,
        ),
        (
            241,
            r#""BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"d2:72:c5:90:ff"}"#,
        ),
        (242, r#""BackendType":"vxlan","BackendData":{"VNI":1}"#),
        (243, r#""BackendType":"vxlan""#),
        (244, r#""BackendType":"host-gw""#),
        // The original's udp names no type.
        (245, r#""BackendData":null"#),
        (246, r#""BackendType":"wireguard","BackendData":{"PublicKey":"x"}"#),
    ];
    for (third, members) in bad {
        put_other(&server, third, members);
    }
    put_lease(&server, other_subnet(247), "{broken");
    server.etcdctl(&["put", "/coreos.com/network/subnets/10.5.248-24", "{}"]);
    // What was a peer and is one no longer, in the middle of all the others.
    put_lease(&server, other_subnet(251), "{broken");
    put_other(
        &server,
        254,
        r#""BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"d2:72:c5:90:ff:55"}"#,
    );
    let gone = Programmed::default().with_tunnel(DEVICE, other_subnet(251), "d2:72:c5:90:ff:51", public_ip(251));
    expected.routes.retain(|line| !gone.routes.contains(line));
    expected.neighbours.retain(|line| !gone.neighbours.contains(line));
    expected.forwarding.retain(|line| !gone.forwarding.contains(line));
    let expected = expected.with_tunnel(DEVICE, other_subnet(254), "d2:72:c5:90:ff:55", public_ip(254));
    assert_programmed(&overlay.hosts[0], DEVICE, &expected, PATIENCE);

    let log = overlay.daemons[0].log();
    for third in (240..=248).chain([251]) {
        let names = [
            format!("10.5.{third}.0-24"),
            format!("10.5.{third}.0/24"),
            format!("10.5.{third}-24"),
        ];
        let warned = log
            .lines()
            .any(|line| line.contains("WARN") && names.iter().any(|name| line.contains(name)));
        assert!(warned, "no warning of 10.5.{third}.0/24 in\n{log}");
    }
}

#[test]
fn a_device_that_fits_is_kept_and_any_other_is_made_anew() {
    let (mut overlay, server) = Overlay::start_on_etcd("vx_device", CONFIG, 2);
    overlay.assert_all_reach_all();
    let (ns, ip) = (overlay.hosts[0].ns().clone(), overlay.hosts[0].ip());
    ns.ip("link add other type bridge").unwrap();
    let make = |kind: &str| {
        by_hand(&ns, "ip link del flannel.1");
        by_hand(&ns, &format!("ip link add flannel.1 type {kind}"));
    };
    let fits = format!("vxlan id 1 local {ip} dev eth0 dstport 8472 nolearning");
    for kind in [
        fits.replace("id 1", "id 7"),
        fits.replace("8472", "4789"),
        fits.replace("eth0", "other"),
        fits.replace("dev eth0", ""),
        fits.replace(&ip.to_string(), "192.168.77.99"),
        format!("{fits} gbp"),
        fits.replace("nolearning", "learning"),
    ] {
        assert!(overlay.daemons[0].stop().success());
        make(&kind);
        by_hand(
            &ns,
            &format!("ip address add {}/32 dev flannel.1", overlay.subnet(0).network()),
        );
        overlay.daemons[0].start_and_wait();
        let info = info(&ns, DEVICE);
        assert_eq!(
            (
                &info["id"],
                &info["port"],
                &info["learning"],
                &info["link"],
                &info["local"]
            ),
            (
                &1.into(),
                &8472.into(),
                &false.into(),
                &"eth0".into(),
                &ip.to_string().into()
            ),
            "{kind}: {info}"
        );
        assert!(!has_gbp(&info), "{kind}: {info}");
        assert_eq!(
            lease(&server, overlay.subnet(0)),
            vxlan_lease(ip, &mac(&ns, DEVICE)),
            "{kind}"
        );
        assert_programmed(&overlay.hosts[0], DEVICE, &tunnels(&overlay, 0, DEVICE), Duration::ZERO);
        assert_reaches(&overlay.containers[0].ns, overlay.containers[1].ip);
    }

    // One that fits, but is not as it should be in what can be changed.
    assert!(overlay.daemons[0].stop().success());
    make(&fits);
    for line in [
        "ip link set flannel.1 address 02:00:00:00:00:09 mtu 1400",
        "ip address add 10.5.99.0/32 dev flannel.1",
    ] {
        by_hand(&ns, line);
    }
    let index = ifindex(&ns, DEVICE);
    overlay.daemons[0].start_and_wait();
    assert_eq!(ifindex(&ns, DEVICE), index, "it is kept");
    assert_eq!(mac(&ns, DEVICE), "02:00:00:00:00:09");
    assert_eq!(lease(&server, overlay.subnet(0)), vxlan_lease(ip, "02:00:00:00:00:09"));
    assert_eq!(mtu(&ns, DEVICE), u64::from(MTU));
    assert_eq!(addresses(&ns, DEVICE), [format!("{}/32", overlay.subnet(0).network())]);
    assert_reaches(&overlay.containers[0].ns, overlay.containers[1].ip);
}

#[test]
fn a_device_that_is_somebody_elses_is_named_and_left_alone() {
    let (mut overlay, _server) = alone("vx_taken");
    let ns = overlay.hosts[0].ns().clone();
    for (kind, address) in [
        ("bridge", "10.5.1.0/32"),
        // Another overlay's, which has the same VNI.
        ("vxlan id 1 dev eth0 dstport 8472 nolearning", "10.99.1.0/32"),
    ] {
        assert!(overlay.daemons[0].stop().success());
        by_hand(&ns, "ip link del flannel.1");
        by_hand(&ns, &format!("ip link add flannel.1 type {kind}"));
        by_hand(&ns, &format!("ip address add {address} dev flannel.1"));
        let index = ifindex(&ns, DEVICE);
        overlay.daemons[0].start();
        assert_eq!(overlay.daemons[0].wait_exit().code(), Some(1));
        let log = overlay.daemons[0].log();
        assert!(log.contains("flanneld: ") && log.contains("flannel.1"), "{kind}: {log}");
        assert_eq!(
            (ifindex(&ns, DEVICE), addresses(&ns, DEVICE)),
            (index, vec![address.to_owned()])
        );
        by_hand(&ns, "ip link del flannel.1");
        overlay.daemons[0].start_and_wait();
    }
}

#[test]
fn ipv6_is_refused_with_what_has_it() {
    let mut lab = new_lab("vx_dual");
    let registry = Registry::embedded(&lab);
    let host = lab.host("h1").unwrap();
    let families = r#""EnableIPv6":true,"IPv6Network":"fd00:12:13::/48""#;
    registry.configure(
        host.ns(),
        &CONFIG.replace(r#""Backend""#, &format!(r#"{families},"Backend""#)),
    );
    let mut daemon = Daemon::new(&lab, &host, &registry);
    daemon.start();
    assert_eq!(daemon.wait_exit().code(), Some(1));
    let log = daemon.log();
    for part in ["EnableIPv6", "vxlan", "udp"] {
        assert!(log.contains(part), "{part} is not in {log}");
    }
    assert_eq!(ifindex(host.ns(), DEVICE), 0);
}

#[test]
fn a_new_subnet_takes_the_place_of_the_old_one_on_the_device() {
    let (mut overlay, server) = Overlay::start_on_etcd("vx_subnet", CONFIG, 2);
    overlay.assert_all_reach_all();
    let (before, ns) = (overlay.subnet(0), overlay.hosts[0].ns().clone());
    let index = ifindex(&ns, DEVICE);
    assert!(overlay.daemons[0].stop().success());
    delete_lease(&server, before);
    let taken = [before, overlay.subnet(1)];
    let reserved = (7..).map(other_subnet).find(|subnet| !taken.contains(subnet)).unwrap();
    let ip = overlay.hosts[0].ip().to_string();
    let reserve = ["leases", "reserve", &reserved.to_string(), "--public-ip", &ip];
    overlay.registry.flanneld(&ns, &reserve);
    overlay.daemons[0].start_and_wait();
    assert_eq!(overlay.subnet(0), reserved);
    assert_eq!(addresses(&ns, DEVICE), [format!("{}/32", reserved.network())]);
    assert_eq!(ifindex(&ns, DEVICE), index);
    for (index, host) in overlay.hosts.iter().enumerate() {
        assert_programmed(host, DEVICE, &tunnels(&overlay, index, DEVICE), PATIENCE);
    }
    assert_reaches(overlay.hosts[1].ns(), reserved.network());
}

#[test]
fn a_host_of_the_original_is_understood_and_understands() {
    let (mut overlay, server) = Overlay::start_on_etcd("vx_interop", CONFIG, 2);
    overlay.assert_all_reach_all();
    let original = Original::vxlan(&mut overlay, &server, &HostOptions::default());
    for (index, host) in overlay.hosts.iter().enumerate() {
        let expected =
            tunnels(&overlay, index, DEVICE).with_tunnel(DEVICE, original.subnet, original.mac, original.host.ip());
        assert_programmed(host, DEVICE, &expected, PATIENCE);
        assert_reaches(&overlay.containers[index].ns, original.container.ip);
        assert_reaches(&original.container.ns, overlay.containers[index].ip);
    }
    let ours = &overlay.containers[0];
    transfer(&[(ours, &original.container), (&original.container, ours)], 4 << 20);
}

#[test]
fn a_host_of_the_original_is_taken_over_without_losing_a_packet() {
    let (mut overlay, server) = alone("vx_takeover");
    let original = Original::vxlan(&mut overlay, &server, &HostOptions::default());
    let (ns, ip) = (original.host.ns(), original.host.ip());
    // A peer that left while nobody was there to remove it.
    add_tunnel(ns, other_subnet(250), "d2:72:c5:90:ff:50", public_ip(250));
    let theirs = Programmed::default().with_tunnel(DEVICE, original.subnet, original.mac, ip);
    assert_programmed(&overlay.hosts[0], DEVICE, &theirs, PATIENCE);
    assert_reaches(&overlay.containers[0].ns, original.container.ip);

    let index = ifindex(ns, DEVICE);
    let flows = Flows::start(&original.container, &overlay.containers[0]);
    let back = Flows::start(&overlay.containers[0], &original.container);
    let mut daemon = Daemon::new(&overlay.lab, &original.host, &overlay.registry);
    assert_eq!(daemon.start_and_wait().subnet.trunc(), original.subnet);
    let ours = Programmed::default().with_tunnel(
        DEVICE,
        overlay.subnet(0),
        &mac(overlay.hosts[0].ns(), DEVICE),
        overlay.hosts[0].ip(),
    );
    assert_programmed(&original.host, DEVICE, &ours, REPAIR);
    flows.finish_without_loss();
    back.finish_without_loss();
    assert_eq!(ifindex(ns, DEVICE), index, "the device is the same");
    assert_eq!(lease(&server, original.subnet), vxlan_lease(ip, original.mac));
    assert_programmed(&overlay.hosts[0], DEVICE, &theirs, Duration::ZERO);
}

#[test]
fn a_lease_that_is_taken_away_is_made_again_with_all_that_it_said() {
    let mut lab: Lab = new_lab("vx_deleted");
    let server = EtcdServer::start_with(EtcdOptions::on_switch(&lab));
    let registry = Registry::etcd(&server.url());
    let host = lab.host("h1").unwrap();
    registry.configure(host.ns(), CONFIG);
    let mut daemon = Daemon::new(&lab, &host, &registry);
    let subnet = daemon.start_and_wait().subnet.trunc();
    delete_lease(&server, subnet);
    daemon.wait_for_log(&format!("the lease {subnet} was gone from the registry"));
    daemon.assert_running();
    assert_eq!(lease(&server, subnet), vxlan_lease(host.ip(), &mac(host.ns(), DEVICE)));
}
