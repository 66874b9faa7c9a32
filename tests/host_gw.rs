//! The `host-gw` backend with a real etcd: plain routes, that they stay, and hosts of the original beside ours. Needs root.

mod lab;

use flannel::lab::{Host, HostOptions, Segment};
use lab::{
    Daemon, Overlay, PATIENCE, Registry, assert_reaches,
    etcd::{EtcdOptions, EtcdServer},
    flow::Flows,
    new_lab,
    original::{Original, add_route, delete_lease, host_gw_lease, lease, other_subnet, public_ip, put_lease},
    output_of, ping,
    programmed::{
        NEW_ADDRESS, Programmed, REPAIR, assert_comes, assert_mends, assert_programmed, by_hand, external_damages,
        link, overlay_devices, plug_in, readdress, routes, unplug,
    },
    traffic::transfer,
};
use std::time::Duration;

const CONFIG: &str = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"host-gw"}}"#;

/// The device whose neighbours and forwarding entries are looked at: there is to be none.
const DEVICE: &str = "flannel.1";

/// One host with a ready daemon, and an etcd in which the test is all the others.
fn alone(name: &str) -> (Overlay, EtcdServer) {
    Overlay::start_on_etcd(name, CONFIG, 1)
}

fn assert_routes(host: &Host, expected: &Programmed, limit: Duration) {
    assert_programmed(host, DEVICE, expected, limit);
}

#[test]
fn every_pair_is_connected_by_plain_routes() {
    let (overlay, server) = Overlay::start_on_etcd("gw_pairs", CONFIG, 3);
    overlay.assert_all_reach_all();
    for (index, host) in overlay.hosts.iter().enumerate() {
        assert_routes(host, &routes(&overlay, index), PATIENCE);
        assert_eq!(lease(&server, overlay.subnet(index)), host_gw_lease(host.ip()));
        assert_eq!(overlay.daemons[index].subnet().mtu, 1_500);
        assert_eq!(overlay_devices(host.ns()), [""; 0]);
    }
    let [one, two, _] = &overlay.containers[..] else {
        unreachable!()
    };
    assert_eq!(ping(&one.ns, two.ip, 1).ttl, Some(62), "only the two kernels forward");
    // ICMP and IPv4 headers take 28 bytes.
    let said = output_of(
        &one.ns,
        "ping",
        ["-M", "do", "-c", "1", "-s", "1472", &two.ip.to_string()],
    );
    assert!(said.contains(" 1 received"), "{said}");
    transfer(&[(one, two), (two, one)], 4 << 20);
    overlay.daemons.iter().for_each(Daemon::assert_content);
}

#[test]
fn whatever_someone_breaks_is_mended_within_two_seconds() {
    let (mut overlay, _server) = Overlay::start_on_etcd("gw_mend", CONFIG, 3);
    overlay.assert_all_reach_all();
    let ns = overlay.hosts[0].ns().clone();
    let (subnet, other) = (overlay.subnet(1), overlay.subnet(2));
    let mut damages = vec![
        ("a route is deleted", vec![format!("ip route del {subnet}")]),
        ("our routes are flushed", vec!["ip route flush proto 85".to_owned()]),
        (
            "a route leads elsewhere",
            vec![format!(
                "ip route replace {subnet} via 192.168.77.254 dev eth0 proto static"
            )],
        ),
        (
            "a route of our own number leads elsewhere",
            vec![format!(
                "ip route replace {subnet} via 192.168.77.254 dev eth0 proto 85"
            )],
        ),
        (
            "a route becomes a black hole",
            vec![
                format!("ip route del {subnet}"),
                format!("ip route add blackhole {subnet} proto static"),
                format!("ip route del {other}"),
            ],
        ),
    ];
    let peer = overlay.hosts[1].ip();
    damages.extend([
        (
            "a route gets a second way",
            vec![format!(
                "ip route replace {subnet} nexthop via {peer} dev eth0 nexthop via 192.168.77.254 dev eth0"
            )],
        ),
        (
            "a route leads to a next hop of its own kind",
            vec![
                format!("ip nexthop replace id 7 via {peer} dev eth0"),
                format!("ip route replace {subnet} nhid 7"),
            ],
        ),
    ]);
    damages.extend(external_damages(&overlay, 0));
    let expected = routes(&overlay, 0);
    let look = || (Programmed::of(&ns, DEVICE), expected.clone());
    assert_mends(&mut overlay.daemons[0], &ns, &damages, look);
    overlay.assert_all_reach_all();
}

#[test]
fn what_others_have_made_is_left_alone() {
    let (mut overlay, server) = alone("gw_foreign");
    let ns = overlay.hosts[0].ns().clone();
    let foreign: [&[&str]; 3] = [
        &[
            // In the overlay's network, to the same subnet with another metric, to a part of it, and another overlay's.
            "10.5.200.0/24 via 192.168.77.254 dev eth0 proto static",
            "10.5.251.0/24 via 192.168.77.254 dev eth0 proto static metric 500",
            "10.5.251.7 via 192.168.77.254 dev eth0 proto static",
            "10.99.1.0/24 via 192.168.77.254 dev eth0 proto 85",
        ],
        &[],
        &[],
    ];
    for route in foreign[0] {
        by_hand(&ns, &format!("ip route add {route}"));
    }
    put_lease(&server, other_subnet(251), &host_gw_lease(public_ip(251)));
    let ours = Programmed::default()
        .with_foreign(foreign)
        .with_route(other_subnet(251), public_ip(251));
    assert_routes(&overlay.hosts[0], &ours, PATIENCE);

    // A peer that comes and goes, a repair, and both ways of starting anew.
    put_lease(&server, other_subnet(250), &host_gw_lease(public_ip(250)));
    let both = ours.clone().with_route(other_subnet(250), public_ip(250));
    assert_routes(&overlay.hosts[0], &both, PATIENCE);
    by_hand(&ns, "ip route del 10.5.250.0/24");
    assert_routes(&overlay.hosts[0], &both, REPAIR);
    overlay.restart_all(|daemon| assert!(daemon.stop().success()));
    assert_routes(&overlay.hosts[0], &both, Duration::ZERO);
    overlay.restart_all(Daemon::kill9);
    assert_routes(&overlay.hosts[0], &both, Duration::ZERO);
    delete_lease(&server, other_subnet(250));
    assert_routes(&overlay.hosts[0], &ours, PATIENCE);
}

#[test]
fn a_route_to_the_same_subnet_by_another_way_is_replaced_at_the_start() {
    let (mut overlay, server) = alone("gw_replace");
    let ns = overlay.hosts[0].ns().clone();
    assert!(overlay.daemons[0].stop().success());
    put_lease(&server, other_subnet(250), &host_gw_lease(public_ip(250)));
    by_hand(&ns, "ip route add 10.5.250.0/24 via 192.168.77.254 dev eth0");
    overlay.daemons[0].start_and_wait();
    let expected = Programmed::default().with_route(other_subnet(250), public_ip(250));
    assert_routes(&overlay.hosts[0], &expected, Duration::ZERO);
}

#[test]
fn restart_and_kill_9_of_both_daemons_lose_no_packet() {
    let (mut overlay, _server) = Overlay::start_on_etcd("gw_restart", CONFIG, 2);
    overlay.assert_all_reach_all();
    let flows = Flows::start(&overlay.containers[0], &overlay.containers[1]);
    overlay.restart_all(|daemon| assert!(daemon.stop().success()));
    overlay.restart_all(Daemon::kill9);
    flows.finish_without_loss();
    for (index, host) in overlay.hosts.iter().enumerate() {
        assert_routes(host, &routes(&overlay, index), PATIENCE);
    }
}

#[test]
fn a_daemon_killed_at_any_moment_of_its_start_loses_no_packet() {
    let (mut overlay, _server) = Overlay::start_on_etcd("gw_moments", CONFIG, 2);
    overlay.assert_all_reach_all();
    let flows = Flows::start(&overlay.containers[0], &overlay.containers[1]);
    overlay.daemons[0].kill9();
    for moment in ["external interface", "host-gw is up", "peer ", "wrote "] {
        overlay.daemons[0].start();
        overlay.daemons[0].wait_for_log(moment);
        overlay.daemons[0].kill9();
    }
    overlay.daemons[0].start_and_wait();
    flows.finish_without_loss();
    assert_routes(&overlay.hosts[0], &routes(&overlay, 0), Duration::ZERO);
}

#[test]
fn an_external_interface_that_is_made_again_is_taken_up_again() {
    let (mut overlay, server) = Overlay::start_on_etcd("gw_replug", CONFIG, 2);
    overlay.assert_all_reach_all();
    let published = lease(&server, overlay.subnet(0));
    unplug(&overlay, 0);
    assert_routes(&overlay.hosts[0], &Programmed::default(), Duration::ZERO);
    overlay.daemons[0].wait_for_log("WARN");
    plug_in(&overlay, 0);
    assert_routes(&overlay.hosts[0], &routes(&overlay, 0), REPAIR);
    assert_eq!(lease(&server, overlay.subnet(0)), published);
    overlay.assert_all_reach_all();
    overlay.daemons[0].assert_running();
}

#[test]
fn what_left_or_moved_while_the_daemon_was_dead_is_right_after_its_start() {
    let (mut overlay, server) = alone("gw_stale");
    for third in [250, 251] {
        put_lease(&server, other_subnet(third), &host_gw_lease(public_ip(third)));
    }
    let both = Programmed::default()
        .with_route(other_subnet(250), public_ip(250))
        .with_route(other_subnet(251), public_ip(251));
    assert_routes(&overlay.hosts[0], &both, PATIENCE);
    overlay.daemons[0].kill9();
    delete_lease(&server, other_subnet(250));
    put_lease(&server, other_subnet(251), &host_gw_lease(public_ip(252)));
    overlay.daemons[0].start_and_wait();
    let expected = Programmed::default().with_route(other_subnet(251), public_ip(252));
    assert_routes(&overlay.hosts[0], &expected, Duration::ZERO);
    // And while it runs.
    put_lease(&server, other_subnet(251), &host_gw_lease(public_ip(253)));
    let expected = Programmed::default().with_route(other_subnet(251), public_ip(253));
    assert_routes(&overlay.hosts[0], &expected, PATIENCE);
}

#[test]
fn a_public_ip_that_is_not_the_interfaces_is_refused_before_a_lease_is_taken() {
    let mut lab = new_lab("gw_public");
    let server = EtcdServer::start_with(EtcdOptions::on_switch(&lab));
    let registry = Registry::etcd(&server.url());
    let host = lab.host("h1").unwrap();
    registry.configure(host.ns(), CONFIG);
    let mut daemon = Daemon::new(&lab, &host, &registry)
        .with("--iface=eth0")
        .with("--public-ip=192.168.77.200");
    daemon.start();
    assert_eq!(daemon.wait_exit().code(), Some(1));
    let log = daemon.log();
    for part in ["host-gw", "192.168.77.200", &host.ip().to_string(), "--public-ip"] {
        assert!(log.contains(part), "{part} is not in {log}");
    }
    let leases = registry.flanneld(host.ns(), &["leases", "list"]);
    assert!(leases.starts_with("no leases"), "{leases}");
}

#[test]
fn a_peer_that_is_not_on_the_link_is_warned_of_once_and_the_others_work() {
    let far = HostOptions {
        segment: Segment::Second,
        ..HostOptions::default()
    };
    let hosts = [
        (HostOptions::default(), &[][..]),
        (HostOptions::default(), &[]),
        (far, &[]),
    ];
    let (overlay, _server) = Overlay::start_hosts_on_etcd("gw_far", CONFIG, &hosts);
    assert_reaches(&overlay.containers[0].ns, overlay.containers[1].ip);
    let reachable = Programmed::default().with_route(overlay.subnet(1), overlay.hosts[1].ip());
    assert_routes(&overlay.hosts[0], &reachable, PATIENCE);
    let far = overlay.hosts[2].ip().to_string();
    let warnings = || {
        let log = overlay.daemons[0].log();
        log.lines()
            .filter(|line| line.contains("WARN") && line.contains(&far))
            .count()
    };
    assert_comes(PATIENCE, "a warning of the far host", || (warnings(), 1));
    // Whatever makes the daemon look again.
    by_hand(overlay.hosts[0].ns(), &format!("ip route del {}", overlay.subnet(1)));
    assert_routes(&overlay.hosts[0], &reachable, REPAIR);
    assert_eq!(warnings(), 1);
}

#[test]
fn the_subnet_file_follows_the_external_mtu() {
    let (mut overlay, _server) = Overlay::start_on_etcd("gw_mtu", CONFIG, 2);
    overlay.assert_all_reach_all();
    for mtu in [1_400, 1_500] {
        by_hand(overlay.hosts[0].ns(), &format!("ip link set eth0 mtu {mtu}"));
        assert_comes(PATIENCE, "the subnet file to follow", || {
            (overlay.daemons[0].subnet().mtu, mtu)
        });
        overlay.daemons[0].wait_for_log("Docker");
    }
    assert_eq!(link(overlay.hosts[0].ns(), "eth0").unwrap()["mtu"], 1_500);
    assert_routes(&overlay.hosts[0], &routes(&overlay, 0), REPAIR);
    overlay.daemons[0].assert_running();
}

#[test]
fn the_lease_follows_the_external_address_and_traffic_goes_on() {
    let (mut overlay, server) = Overlay::start_on_etcd("gw_address", CONFIG, 2);
    overlay.assert_all_reach_all();
    let (ns, subnet, old, new) = (
        overlay.hosts[0].ns().clone(),
        overlay.subnet(0),
        overlay.hosts[0].ip(),
        public_ip(101),
    );
    readdress(&ns, old, new);
    assert_comes(NEW_ADDRESS, "the new address to be published", || {
        (lease(&server, subnet), host_gw_lease(new))
    });
    assert_routes(&overlay.hosts[0], &routes(&overlay, 0), REPAIR);
    assert_routes(
        &overlay.hosts[1],
        &Programmed::default().with_route(subnet, new),
        PATIENCE,
    );
    overlay.assert_all_reach_all();
    overlay.daemons[0].assert_running();
    assert_eq!(overlay.subnet(0), subnet);
}

#[test]
fn a_host_of_the_original_is_understood_and_understands() {
    let (mut overlay, server) = Overlay::start_on_etcd("gw_interop", CONFIG, 2);
    overlay.assert_all_reach_all();
    let original = Original::host_gw(&mut overlay, &server);
    for (index, host) in overlay.hosts.iter().enumerate() {
        let expected = routes(&overlay, index).with_route(original.subnet, original.host.ip());
        assert_routes(host, &expected, PATIENCE);
        assert_reaches(&overlay.containers[index].ns, original.container.ip);
        assert_reaches(&original.container.ns, overlay.containers[index].ip);
    }
    let ours = &overlay.containers[0];
    transfer(&[(ours, &original.container), (&original.container, ours)], 4 << 20);
}

#[test]
fn a_host_of_the_original_is_taken_over_without_losing_a_packet() {
    let (mut overlay, server) = alone("gw_takeover");
    let original = Original::host_gw(&mut overlay, &server);
    let ns = original.host.ns();
    let theirs = Programmed::default().with_route(original.subnet, original.host.ip());
    assert_routes(&overlay.hosts[0], &theirs, PATIENCE);
    assert_reaches(&overlay.containers[0].ns, original.container.ip);
    // Not in the shape that vxlan's routes have: nobody can tell whose it is.
    add_route(ns, other_subnet(250), public_ip(250));

    let flows = Flows::start(&original.container, &overlay.containers[0]);
    let mut daemon = Daemon::new(&overlay.lab, &original.host, &overlay.registry);
    assert_eq!(daemon.start_and_wait().subnet.trunc(), original.subnet);
    let ours = Programmed::default()
        .with_route(overlay.subnet(0), overlay.hosts[0].ip())
        .with_foreign([&["10.5.250.0/24 via 192.168.77.250 dev eth0"], &[], &[]]);
    assert_routes(&original.host, &ours, REPAIR);
    flows.finish_without_loss();
    assert_eq!(lease(&server, original.subnet), host_gw_lease(original.host.ip()));
}
