//! The backends that let the kernel carry the packets, on real packets: that they start, survive and clear away. What exactly
//! they program is looked at in `vxlan.rs` and `host_gw.rs`. Needs root.

mod lab;

use flannel::{
    backend::{Backend, Overlays, vxlan::Vxlan},
    kernel::{
        Kernel,
        external::{self, Wish},
    },
    lab::{Namespace, wait_until},
    lease::{
        record::{Lease, LeaseValue, Subnets},
        watch::{PeerSet, Picture},
    },
    network::{self, BackendKind, Network},
    registry::Revision,
    subnet_file::Previous,
};
use ipnet::Ipv4Net;
use lab::{Daemon, Overlay, PATIENCE, Registry, inside, new_lab, output_of, ping};
use nix::sys::signal::Signal;
use std::{
    fmt::Write as _,
    net::Ipv4Addr,
    process::Stdio,
    sync::Arc,
    time::{Duration, Instant},
};

/// How long a repair may take.
const REPAIR: Duration = Duration::from_secs(2);

fn config(backend: &str) -> String {
    format!(r#"{{"Network":"10.5.0.0/16","Backend":{backend}}}"#)
}

const VXLAN: &str = r#"{"Type":"vxlan"}"#;
const DIRECT: &str = r#"{"Type":"vxlan","DirectRouting":true}"#;
const HOST_GW: &str = r#"{"Type":"host-gw"}"#;
const UDP: &str = r#"{"Type":"udp"}"#;

fn overlay(name: &str, backend: &str, count: usize) -> Overlay {
    let lab = new_lab(name);
    let registry = Registry::embedded(&lab);
    let overlay = Overlay::start_on(lab, registry, &config(backend), count);
    overlay.assert_all_reach_all();
    overlay
}

/// What a host's kernel is programmed with for the overlay, as `ip` and `bridge` show it.
fn programmed(host: &Namespace) -> String {
    let mut text = String::new();
    for (title, command) in [
        ("devices", "ip -br link show type vxlan | tr -s ' '"),
        ("routes", "ip -4 route show proto 85"),
        ("neighbours", "ip -4 neigh show nud permanent"),
        ("forwarding", "bridge fdb show | grep ' dst '"),
    ] {
        let output = output_of(host, "sh", ["-c", command]);
        let mut lines: Vec<&str> = output.lines().map(str::trim_end).collect();
        lines.sort_unstable();
        writeln!(text, "{title}: {}", lines.join("; ")).unwrap();
    }
    text
}

/// Waits until the kernel of `host` is programmed as `before`; how long that took.
fn assert_repaired(host: &Namespace, before: &str) -> Duration {
    let start = Instant::now();
    wait_until(PATIENCE, "the kernel to be programmed again", || {
        programmed(host) == before
    })
    .unwrap();
    let time = start.elapsed();
    assert!(time < REPAIR, "{time:?}");
    time
}

#[test]
fn vxlan_hosts_reach_one_another_through_the_originals_device() {
    let overlay = overlay("kb_vxlan", VXLAN, 3);
    let [host, peer] = [0, 1].map(|number| overlay.hosts[number].ns());
    let [own, subnet] = [0, 1].map(|number| overlay.daemons[number].subnet().subnet.trunc());
    let link = host.ip("-d link show flannel.1").unwrap();
    for part in [
        "mtu 1450",
        "vxlan id 1",
        "local 192.168.77.1 dev eth0",
        "dstport 8472",
        "nolearning",
    ] {
        assert!(link.contains(part), "{part} is not in {link}");
    }
    let addresses = host.ip("-4 -br addr show flannel.1").unwrap();
    assert!(addresses.contains(&format!("{}/32", own.addr())), "{addresses}");
    let route = host.ip(&format!("route show {subnet}")).unwrap();
    assert_eq!(
        route.trim(),
        format!("{subnet} via {} dev flannel.1 proto 85 onlink", subnet.addr())
    );
    let mac = peer.ip("-br link show flannel.1").unwrap();
    let mac = mac.split_whitespace().nth(2).unwrap();
    let neighbour = host.ip(&format!("neigh show {} dev flannel.1", subnet.addr())).unwrap();
    assert!(
        neighbour.contains(&format!("lladdr {mac}")) && neighbour.contains("PERMANENT"),
        "{neighbour}"
    );
    let forwarding = output_of(host, "bridge", ["fdb", "show", "dev", "flannel.1"]);
    assert!(
        forwarding.contains(&format!("{mac} dst 192.168.77.2 self permanent")),
        "{forwarding}"
    );
    let ttl = ping(&overlay.containers[0].ns, overlay.containers[1].ip, 1).ttl;
    assert_eq!(ttl, Some(62), "two kernels");
}

#[test]
fn host_gw_hosts_reach_one_another_by_plain_routes() {
    let overlay = overlay("kb_host_gw", HOST_GW, 3);
    let subnet = overlay.daemons[1].subnet();
    assert_eq!(subnet.mtu, 1500);
    let subnet = subnet.subnet.trunc();
    let route = overlay.hosts[0].ns().ip(&format!("route show {subnet}")).unwrap();
    assert_eq!(route.trim(), format!("{subnet} via 192.168.77.2 dev eth0 proto 85"));
}

#[test]
fn neither_kill_nor_restart_loses_a_packet() {
    for (name, backend) in [
        ("kb_kill_vxlan", VXLAN),
        ("kb_kill_gw", HOST_GW),
        ("kb_kill_direct", DIRECT),
    ] {
        let mut overlay = overlay(name, backend, 2);
        let before = programmed(overlay.hosts[0].ns());
        let (from, to) = (overlay.containers[0].ns.clone(), overlay.containers[1].ip);
        // 500 a second: an interruption of some milliseconds shows.
        let mut flood = from.command("ping");
        flood.args(["-n", "-q", "-i", "0.002", "-W", "1", &to.to_string()]);
        let flood = flood.stdout(Stdio::piped()).spawn().unwrap();
        for daemon in &mut overlay.daemons {
            daemon.kill9();
            daemon.start_and_wait();
            assert!(daemon.stop().success());
            daemon.start_and_wait();
        }
        let pid = nix::unistd::Pid::from_raw(flood.id().try_into().unwrap());
        nix::sys::signal::kill(pid, Signal::SIGINT).unwrap();
        let output = String::from_utf8(flood.wait_with_output().unwrap().stdout).unwrap();
        assert!(output.contains(" 0% packet loss"), "{backend}: {output}");
        assert_eq!(programmed(overlay.hosts[0].ns()), before);
    }
}

#[test]
fn what_someone_takes_away_is_put_back() {
    let overlay = overlay("kb_repair", VXLAN, 3);
    let host = overlay.hosts[0].ns();
    let before = programmed(host);
    let peer = overlay.daemons[1].subnet().subnet.trunc();
    let mac = before.split("lladdr ").nth(1).unwrap().split(' ').next().unwrap();
    for damage in [
        "ip link del flannel.1".to_owned(),
        "ip route flush proto 85".to_owned(),
        format!(
            "ip neigh flush dev flannel.1 nud permanent; ip neigh del {} dev flannel.1",
            peer.addr()
        ),
        format!("bridge fdb del {mac} dev flannel.1"),
        format!("ip route replace {peer} via 192.168.77.3"),
        "ip link set flannel.1 down".to_owned(),
        "ip link set flannel.1 address 02:00:00:00:00:07".to_owned(),
        "ip link set flannel.1 mtu 1000; ip addr flush dev flannel.1".to_owned(),
        "ip link set eth0 down; ip link set eth0 up; ip route add default via 192.168.77.254".to_owned(),
        "ip addr del 192.168.77.1/24 dev eth0; ip addr add 192.168.77.1/24 dev eth0".to_owned(),
    ] {
        output_of(host, "sh", ["-c", &damage]);
        let time = assert_repaired(host, &before);
        println!("{damage}: {time:?}");
        overlay.assert_all_reach_all();
    }
    let subnet = overlay.daemons[0].subnet().subnet;
    let addresses = host.ip("-4 -br addr show flannel.1").unwrap();
    assert!(
        addresses.contains(&format!("{}/32", subnet.trunc().addr())),
        "{addresses}"
    );
    assert!(host.ip("link show flannel.1").unwrap().contains("mtu 1450"));
}

#[test]
fn a_change_of_the_backend_leaves_nothing() {
    let mut overlay = overlay("kb_switch", UDP, 2);
    let host = overlay.hosts[0].ns().clone();
    let nothing = programmed(&host);
    for backend in [VXLAN, HOST_GW, UDP, HOST_GW, DIRECT, r#"{"Type":"vxlan","VNI":7}"#, UDP] {
        overlay.registry.configure(&host, &config(backend));
        for daemon in &mut overlay.daemons {
            assert!(daemon.stop().success());
            daemon.start();
        }
        for daemon in &mut overlay.daemons {
            daemon.wait_ready();
        }
        overlay.assert_all_reach_all();
        let now = programmed(&host);
        let devices = output_of(&host, "ip", ["-br", "link"]);
        match backend {
            UDP => assert_eq!(now, nothing),
            HOST_GW => assert!(!devices.contains("flannel"), "{devices}"),
            _ => assert!(!devices.contains("flannel0"), "{devices}"),
        }
        assert!(!backend.contains("VNI") || !devices.contains("flannel.1@"), "{devices}");
    }
}

/// The PublicIP in the lease of the daemon, as `flanneld leases` shows it.
fn published(overlay: &Overlay, daemon: &Daemon) -> String {
    let leases = overlay.registry.flanneld(overlay.hosts[1].ns(), &["leases", "list"]);
    let subnet = daemon.subnet().subnet.trunc().to_string();
    leases
        .lines()
        .find(|line| line.contains(&subnet))
        .unwrap_or_default()
        .to_owned()
}

#[test]
fn a_new_address_of_the_host_is_published_without_a_restart() {
    for (name, backend) in [("kb_move_vxlan", VXLAN), ("kb_move_gw", HOST_GW), ("kb_move_udp", UDP)] {
        let mut overlay = overlay(name, backend, 2);
        let host = overlay.hosts[0].ns().clone();
        let subnet = overlay.daemons[0].subnet();
        host.ip("addr del 192.168.77.1/24 dev eth0").unwrap();
        overlay.daemons[0].wait_for_log("has no IPv4 address");
        host.ip("addr add 192.168.77.40/24 dev eth0").unwrap();
        wait_until(PATIENCE, "the new address to be published", || {
            published(&overlay, &overlay.daemons[0]).contains("192.168.77.40")
        })
        .unwrap();
        overlay.assert_all_reach_all();
        overlay.daemons.iter_mut().for_each(Daemon::assert_running);
        assert_eq!(overlay.daemons[0].subnet(), subnet);
    }
}

#[test]
fn device_and_subnet_file_follow_the_interfaces_mtu() {
    for (name, backend, device, overhead) in [
        ("kb_mtu_vxlan", VXLAN, Some("flannel.1"), 50),
        ("kb_mtu_gw", HOST_GW, None, 0),
        ("kb_mtu_udp", UDP, Some("flannel0"), 28),
    ] {
        let overlay = overlay(name, backend, 2);
        let host = overlay.hosts[0].ns();
        for mtu in [1300, 1400] {
            host.ip(&format!("link set eth0 mtu {mtu}")).unwrap();
            let what = format!("the subnet file to say {}", mtu - overhead);
            wait_until(PATIENCE, &what, || overlay.daemons[0].subnet().mtu == mtu - overhead).unwrap();
            overlay.daemons[0].wait_for_log("restart Docker");
            if let Some(device) = device {
                wait_until(PATIENCE, "the device to follow", || {
                    host.ip(&format!("link show {device}"))
                        .unwrap()
                        .contains(&format!("mtu {} ", mtu - overhead))
                })
                .unwrap();
            }
        }
    }
}

#[test]
fn an_interface_that_is_made_again_is_waited_for() {
    for (name, backend) in [("kb_gone_vxlan", VXLAN), ("kb_gone_gw", HOST_GW)] {
        let mut overlay = overlay(name, backend, 2);
        let (host, switch) = (overlay.hosts[0].ns().clone(), overlay.lab.switch().clone());
        let before = programmed(&host);
        // Takes the other end, eth0, along.
        switch.ip("link del p1").unwrap();
        overlay.daemons[0].wait_for_log("interface eth0 is gone");
        switch
            .ip(&format!("link add p1 type veth peer name eth0 netns {}", host.name()))
            .unwrap();
        switch.ip("link set p1 master br0 up").unwrap();
        host.ip("addr add 192.168.77.1/24 dev eth0").unwrap();
        host.ip("link set eth0 up").unwrap();
        assert_repaired(&host, &before);
        overlay.assert_all_reach_all();
        overlay.daemons[0].assert_running();
    }
}

#[test]
fn what_the_original_has_made_is_taken_over_and_what_is_foreign_stays() {
    let mut lab = new_lab("kb_original");
    let host = lab.host("h1").unwrap();
    let registry = Registry::embedded(&lab);
    registry.configure(host.ns(), &config(VXLAN));
    for command in [
        "link add flannel.1 address d2:72:c5:90:ff:8c type vxlan id 1 local 192.168.77.1 dev eth0 dstport 8472 nolearning",
        "addr add 10.5.77.0/32 dev flannel.1",
        "link set flannel.1 up",
        // A host that has gone while no daemon ran here.
        "neigh replace 10.5.9.0 lladdr 02:00:00:00:00:09 dev flannel.1 nud permanent",
        "route add 10.5.9.0/24 via 10.5.9.0 dev flannel.1 onlink",
        // Not the original's.
        "neigh replace 10.5.200.1 lladdr 02:00:00:00:00:c8 dev flannel.1 nud permanent",
        "route add 10.5.201.0/24 via 192.168.77.9",
        "route add 10.6.1.0/24 via 192.168.77.9 proto 85",
    ] {
        host.ns().ip(command).unwrap();
    }
    let fdb = "for mac in 09 c8; do bridge fdb add 02:00:00:00:00:$mac dev flannel.1 dst 192.168.77.9; done";
    output_of(host.ns(), "sh", ["-c", fdb]);
    let index = host.ns().ip("-o link show flannel.1").unwrap();
    let index = index.split(':').next().unwrap();

    let mut daemon = Daemon::new(&lab, &host, &registry);
    daemon.start_and_wait();
    let link = host.ns().ip("-o link show flannel.1").unwrap();
    assert_eq!(link.split(':').next(), Some(index), "not made anew: {link}");
    assert!(link.contains("d2:72:c5:90:ff:8c"), "{link}");
    let text = programmed(host.ns());
    assert!(!text.contains("02:00:00:00:00:09"), "{text}");
    assert!(text.contains("neighbours: 10.5.200.1"), "{text}");
    assert!(text.contains("forwarding: 02:00:00:00:00:c8"), "{text}");
    assert!(text.contains("routes: 10.6.1.0/24 via 192.168.77.9 dev eth0"), "{text}");
    let routes = host.ns().ip("route show root 10.5.0.0/16").unwrap();
    assert_eq!(routes.trim(), "10.5.201.0/24 via 192.168.77.9 dev eth0");
}

#[test]
fn what_a_backend_does_not_carry_is_refused_with_what_would_do() {
    let mut lab = new_lab("kb_refused");
    let host = lab.host("h1").unwrap();
    let registry = Registry::embedded(&lab);
    let refused = |daemon: Daemon, parts: &[&str]| {
        let mut daemon = daemon;
        daemon.start();
        assert!(!daemon.wait_exit().success());
        let log = daemon.log();
        for part in parts {
            assert!(log.contains(part), "{part} is not in {log}");
        }
    };
    registry.configure(host.ns(), &config(HOST_GW));
    refused(
        Daemon::named("gw", &lab, &host, &registry).with("--public-ip=203.0.113.9"),
        &["203.0.113.9", "192.168.77.1", "eth0", "host-gw"],
    );
    registry.configure(
        host.ns(),
        &format!(r#"{{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:12::/48","Backend":{VXLAN}}}"#),
    );
    refused(
        Daemon::named("dual", &lab, &host, &registry),
        &["EnableIPv6", "vxlan", "Backend.Type udp"],
    );
    registry.configure(host.ns(), &config(VXLAN));
    host.ns().ip("link add flannel.1 type bridge").unwrap();
    refused(
        Daemon::named("name", &lab, &host, &registry),
        &["flannel.1", "no VXLAN device"],
    );
    host.ns().ip("link del flannel.1").unwrap();
    host.ns()
        .ip("link add flannel.1 type vxlan id 1 local 192.168.77.1 dev eth0 dstport 8472")
        .unwrap();
    host.ns().ip("addr add 10.9.1.0/32 dev flannel.1").unwrap();
    refused(
        Daemon::named("other", &lab, &host, &registry),
        &["10.9.1.0", "another overlay", "Backend.VNI"],
    );
}

/// The processor's time that this thread has used.
fn thread_time() -> Duration {
    let schedstat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    let nanoseconds = schedstat.split(' ').next().unwrap().parse().unwrap();
    Duration::from_nanos(nanoseconds)
}

fn lease(number: u32) -> Lease {
    let subnet = Ipv4Addr::from_bits(u32::from(Ipv4Addr::new(10, 16, 0, 0)) + (number << 8));
    let [_, b, c, d] = number.to_be_bytes();
    let mac = format!("02:00:00:{b:02x}:{c:02x}:{d:02x}");
    Lease {
        subnets: Subnets::new(Ipv4Net::new_assert(subnet, 24), None),
        value: LeaseValue {
            backend_type: BackendKind::Vxlan.into(),
            backend_data: Some(serde_json::json!({ "VNI": 1, "VtepMAC": mac })),
            ..LeaseValue::new(Ipv4Addr::from_bits(u32::from(Ipv4Addr::new(192, 168, 0, 0)) + number))
        },
        revision: Revision(1),
        created: Revision(1),
        ttl: None,
    }
}

#[test]
fn thousands_of_peers_are_programmed_in_seconds_and_a_change_of_one_in_milliseconds() {
    const PEERS: u32 = 5_000;
    // What an optimised build does in 10 ms.
    let limit = Duration::from_millis(if cfg!(debug_assertions) { 100 } else { 10 });
    for (name, direct) in [("kb_scale", false), ("kb_scale_direct", true)] {
        let mut lab = new_lab(name);
        let host = lab.host("h1").unwrap();
        host.ns().ip("addr add 192.168.77.1/16 dev eth0").unwrap();
        let network = format!(r#"{{"Network":"10.0.0.0/8","Backend":{{"Type":"vxlan","DirectRouting":{direct}}}}}"#);
        let network = Network::parse(&network).unwrap().network;
        let network::Backend::Vxlan(configuration) = network.backend().clone() else {
            unreachable!()
        };
        let overlays = Overlays::new(&network, &Previous::default()).unwrap();
        let peers: PeerSet = (0..PEERS)
            .map(lease)
            .map(|lease| (lease.subnets, Arc::new(lease)))
            .collect();
        let mut picture = Picture::complete(peers);
        inside(host.ns(), || {
            let wish = Wish::default();
            let external = external::choose(&mut Kernel::open().unwrap(), &wish).unwrap();
            let timed = |what: &str, work: &mut dyn FnMut()| {
                let (start, busy) = (Instant::now(), thread_time());
                work();
                let (wall, busy) = (start.elapsed(), thread_time() - busy);
                println!("{PEERS} peers, DirectRouting {direct}: {what}: {wall:.1?}, {busy:.1?} of a processor");
                // The machine may have other things to do meanwhile.
                busy
            };
            let start = || {
                let mut vxlan = Vxlan::new(&external, configuration.clone(), &overlays, None).unwrap();
                vxlan.start(&network, &lease(PEERS)).unwrap();
                vxlan
            };
            let mut vxlan = start();
            let busy = timed("all of them", &mut || vxlan.apply(&picture).unwrap());
            assert!(busy < Duration::from_secs(3), "{busy:?}");
            let mut vxlan = start();
            timed("found as they are", &mut || vxlan.apply(&picture).unwrap());
            let busy = timed("nothing has changed", &mut || vxlan.apply(&picture).unwrap());
            assert!(busy < limit, "{busy:?}");
            let (gone, new) = (lease(7), lease(PEERS + 1));
            let peers = Arc::make_mut(&mut picture.peers);
            peers.remove(&gone.subnets);
            peers.insert(new.subnets, Arc::new(new));
            let busy = timed("one gone and one new", &mut || vxlan.apply(&picture).unwrap());
            assert!(busy < limit, "{busy:?}");
        });
        let count = host.ns().ip("route show proto 85").unwrap().lines().count();
        assert_eq!(count, PEERS as usize);
    }
}
