//! vxlan with `DirectRouting`: plain routes to the hosts on the link, tunnels to those behind a router. Needs root.

mod lab;

use flannel::lab::{HostOptions, Segment};
use lab::{
    Daemon, Overlay, PATIENCE, assert_reaches,
    etcd::EtcdServer,
    flow::Flows,
    original::{Original, delete_lease, lease, other_subnet, put_lease, vxlan_lease},
    ping,
    programmed::{
        Programmed, REPAIR, addresses, assert_comes, assert_mends, assert_programmed, by_hand, external_damages,
        ifindex, mac,
    },
    traffic::transfer,
};
use std::{net::Ipv4Addr, time::Duration};

const DEVICE: &str = "flannel.1";

/// As in a tutorial of the original, in its spelling.
const CONFIG: &str = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"VxLAN","Directrouting":true}}"#;

fn far() -> HostOptions {
    HostOptions {
        segment: Segment::Second,
        ..HostOptions::default()
    }
}

/// Hosts in the first segment, and in the second.
fn overlay(name: &str, near: usize, far_away: usize) -> (Overlay, EtcdServer) {
    let near = std::iter::repeat_n((HostOptions::default(), &[][..]), near);
    let hosts: Vec<_> = near.chain(std::iter::repeat_n((far(), &[][..]), far_away)).collect();
    Overlay::start_hosts_on_etcd(name, CONFIG, &hosts)
}

/// What host `index` is to have: its neighbours by plain routes, the others through the device.
fn expected(overlay: &Overlay, index: usize) -> Programmed {
    let segment = |index: usize| overlay.hosts[index].ip().octets()[2];
    let mut all = Programmed::default();
    for (other, host) in overlay.hosts.iter().enumerate().filter(|(other, _)| *other != index) {
        let subnet = overlay.subnet(other);
        all = if segment(other) == segment(index) {
            all.with_route(subnet, host.ip())
        } else {
            all.with_tunnel(DEVICE, subnet, &mac(host.ns(), DEVICE), host.ip())
        };
    }
    all
}

#[test]
fn neighbours_are_routed_to_and_those_behind_the_router_tunnelled_to() {
    let (overlay, server) = overlay("dr_pairs", 2, 2);
    overlay.assert_all_reach_all();
    for (index, host) in overlay.hosts.iter().enumerate() {
        assert_programmed(host, DEVICE, &expected(&overlay, index), PATIENCE);
        let subnet = overlay.subnet(index);
        assert_eq!(lease(&server, subnet), vxlan_lease(host.ip(), &mac(host.ns(), DEVICE)));
        assert_eq!(addresses(host.ns(), DEVICE), [format!("{}/32", subnet.network())]);
        // Peers may be moved behind a router at any time.
        assert_eq!(overlay.daemons[index].subnet().mtu, 1_450);
    }
    let [one, two, three, _] = &overlay.containers[..] else {
        unreachable!()
    };
    for other in [two, three] {
        assert_eq!(
            ping(&one.ns, other.ip, 1).ttl,
            Some(62),
            "the router is not seen from within the tunnel"
        );
    }
    transfer(&[(one, two), (two, three), (three, one)], 2 << 20);
    overlay.daemons.iter().for_each(Daemon::assert_content);
}

#[test]
fn whatever_someone_breaks_is_mended_within_two_seconds() {
    let (mut overlay, _server) = overlay("dr_mend", 2, 1);
    overlay.assert_all_reach_all();
    let ns = overlay.hosts[0].ns().clone();
    let (near, distant) = (overlay.subnet(1), overlay.subnet(2));
    let mut damages = vec![
        ("a plain route is deleted", vec![format!("ip route del {near}")]),
        ("our routes are flushed", vec!["ip route flush proto 85".to_owned()]),
        (
            "the plain route leads through the device",
            vec![format!(
                "ip route replace {near} via {} dev flannel.1 onlink",
                near.network()
            )],
        ),
        (
            "the device's route leads elsewhere",
            vec![format!("ip route replace {distant} via 192.168.77.254 dev eth0")],
        ),
        ("the device is deleted", vec!["ip link del flannel.1".to_owned()]),
    ];
    damages.extend(external_damages(&overlay, 0));
    let all = expected(&overlay, 0);
    let look = || (Programmed::of(&ns, DEVICE), all.clone());
    assert_mends(&mut overlay.daemons[0], &ns, &damages, look);
    overlay.assert_all_reach_all();
}

#[test]
fn a_peer_that_moves_behind_the_router_and_back_leaves_nothing_behind() {
    let (mut overlay, server) = overlay("dr_moves", 1, 0);
    let (near, distant) = (Ipv4Addr::new(192, 168, 77, 250), Ipv4Addr::new(192, 168, 78, 250));
    let peer_mac = "d2:72:c5:90:ff:50";
    let direct = Programmed::default().with_route(other_subnet(250), near);
    let tunnelled = Programmed::default().with_tunnel(DEVICE, other_subnet(250), peer_mac, distant);
    for (address, expected) in [
        (near, &direct),
        (distant, &tunnelled),
        (near, &direct),
        (distant, &tunnelled),
    ] {
        put_lease(&server, other_subnet(250), &vxlan_lease(address, peer_mac));
        assert_programmed(&overlay.hosts[0], DEVICE, expected, PATIENCE);
    }
    // And while nobody looks.
    overlay.daemons[0].kill9();
    put_lease(&server, other_subnet(250), &vxlan_lease(near, peer_mac));
    overlay.daemons[0].start_and_wait();
    assert_programmed(&overlay.hosts[0], DEVICE, &direct, Duration::ZERO);
    delete_lease(&server, other_subnet(250));
    assert_programmed(&overlay.hosts[0], DEVICE, &Programmed::default(), PATIENCE);
}

#[test]
fn a_host_that_comes_onto_a_peers_link_or_leaves_it_moves_its_packets_over() {
    let (overlay, server) = overlay("dr_link", 1, 0);
    let distant = Ipv4Addr::new(192, 168, 78, 250);
    let peer_mac = "d2:72:c5:90:ff:50";
    put_lease(&server, other_subnet(250), &vxlan_lease(distant, peer_mac));
    let direct = Programmed::default().with_route(other_subnet(250), distant);
    let tunnelled = Programmed::default().with_tunnel(DEVICE, other_subnet(250), peer_mac, distant);
    let host = &overlay.hosts[0];
    assert_programmed(host, DEVICE, &tunnelled, PATIENCE);
    by_hand(host.ns(), "ip address add 192.168.78.200/24 dev eth0");
    assert_programmed(host, DEVICE, &direct, REPAIR);
    by_hand(host.ns(), "ip address del 192.168.78.200/24 dev eth0");
    assert_programmed(host, DEVICE, &tunnelled, REPAIR);
}

#[test]
fn restart_and_kill_9_lose_no_packet_on_either_path() {
    let (mut overlay, _server) = overlay("dr_restart", 2, 1);
    overlay.assert_all_reach_all();
    let device = ifindex(overlay.hosts[0].ns(), DEVICE);
    let [one, two, three] = &overlay.containers[..] else {
        unreachable!()
    };
    let flows = [Flows::start(one, two), Flows::start(one, three)];
    overlay.restart_all(|daemon| assert!(daemon.stop().success()));
    overlay.restart_all(Daemon::kill9);
    flows.into_iter().for_each(Flows::finish_without_loss);
    assert_eq!(ifindex(overlay.hosts[0].ns(), DEVICE), device);
    for (index, host) in overlay.hosts.iter().enumerate() {
        assert_programmed(host, DEVICE, &expected(&overlay, index), PATIENCE);
    }
}

#[test]
fn switching_it_on_and_off_moves_all_peers_over_without_losing_a_packet() {
    let (mut overlay, _server) = overlay("dr_switch", 2, 1);
    overlay.assert_all_reach_all();
    let without = CONFIG.replace("true", "false");
    let [one, two, three] = overlay.containers.clone().try_into().unwrap();
    let flows = [
        Flows::start(&one, &two),
        Flows::start(&two, &three),
        Flows::start(&three, &one),
    ];
    for (config, direct) in [(without.as_str(), false), (CONFIG, true)] {
        overlay.registry.configure(overlay.hosts[0].ns(), config);
        overlay.restart_all(|daemon| assert!(daemon.stop().success()));
        for (index, host) in overlay.hosts.iter().enumerate() {
            assert_comes(PATIENCE, "the peers to be moved over", || {
                let wanted = if direct {
                    expected(&overlay, index)
                } else {
                    lab::programmed::tunnels(&overlay, index, DEVICE)
                };
                (Programmed::of(host.ns(), DEVICE), wanted)
            });
        }
    }
    flows.into_iter().for_each(Flows::finish_without_loss);
}

#[test]
fn a_host_of_the_original_behind_the_router_is_understood_and_understands() {
    let (mut overlay, server) = overlay("dr_interop", 1, 1);
    overlay.assert_all_reach_all();
    let original = Original::vxlan(&mut overlay, &server, &far());
    let (subnet, ip) = (original.subnet, original.host.ip());
    let near = expected(&overlay, 0).with_tunnel(DEVICE, subnet, original.mac, ip);
    assert_programmed(&overlay.hosts[0], DEVICE, &near, PATIENCE);
    let beside = expected(&overlay, 1).with_route(subnet, ip);
    assert_programmed(&overlay.hosts[1], DEVICE, &beside, PATIENCE);
    for container in &overlay.containers {
        // The one beside it sends by the plain route and gets its answers through the tunnel.
        assert_reaches(&container.ns, original.container.ip);
        assert_reaches(&original.container.ns, container.ip);
    }
}
