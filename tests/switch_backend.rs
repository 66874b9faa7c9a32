//! A network whose backend is changed: all daemons are started again, and nothing of the old one is left. Needs root.

mod lab;

use flannel::lab::{Host, Namespace};
use lab::{
    Daemon, Overlay, PATIENCE,
    etcd::EtcdServer,
    original::{host_gw_lease, lease, vxlan_lease},
    programmed::{Programmed, addresses, assert_comes, mac, overlay_devices, routes, tunnels},
};
use std::collections::BTreeSet;

fn config(backend: &str) -> String {
    format!(r#"{{"Network":"10.5.0.0/16","Backend":{backend}}}"#)
}

const UDP: &str = r#"{"Type":"udp"}"#;
const VXLAN: &str = r#"{"Type":"vxlan"}"#;
const VXLAN_7: &str = r#"{"Type":"vxlan","VNI":7}"#;
const HOST_GW: &str = r#"{"Type":"host-gw"}"#;

/// The device of a backend; `host-gw` has none.
fn device(backend: &str) -> Option<&'static str> {
    match backend {
        UDP => Some("flannel0"),
        VXLAN => Some("flannel.1"),
        VXLAN_7 => Some("flannel.7"),
        HOST_GW => None,
        other => panic!("{other}"),
    }
}

/// Everything that an overlay may leave on a host: its devices with their addresses, and what it has programmed.
#[derive(Debug, PartialEq)]
struct Everything {
    devices: Vec<(String, Vec<String>)>,
    programmed: Programmed,
    /// Routes in all tables, of which the overlay has none but those of the main one.
    elsewhere: BTreeSet<String>,
}

impl Everything {
    fn of(ns: &Namespace, backend: &str) -> Everything {
        let devices = overlay_devices(ns).into_iter();
        let in_all = ns.ip("-4 route show table all").unwrap();
        Everything {
            devices: devices.map(|device| (device.clone(), addresses(ns, &device))).collect(),
            programmed: Programmed::of(ns, device(backend).unwrap_or("flannel.1")),
            elsewhere: in_all
                .lines()
                .filter(|line| line.contains("table ") && !line.contains("table local"))
                .map(str::to_owned)
                .collect(),
        }
    }

    /// With this backend alone.
    fn expected(overlay: &Overlay, index: usize, backend: &str) -> Everything {
        let device = device(backend);
        let own = overlay.subnet(index).network();
        let programmed = match (backend, device) {
            (UDP, _) => Programmed::default().with_foreign([&["10.5.0.0/16 dev flannel0"], &[], &[]]),
            (_, Some(device)) => tunnels(overlay, index, device),
            (_, None) => routes(overlay, index),
        };
        Everything {
            devices: device
                .map(|device| (device.to_owned(), vec![format!("{own}/32")]))
                .into_iter()
                .collect(),
            programmed,
            elsewhere: BTreeSet::new(),
        }
    }
}

/// Fails the test unless each host has what this backend makes, and nothing besides, and all containers reach one another.
fn assert_only(overlay: &Overlay, server: &EtcdServer, backend: &str) {
    overlay.assert_all_reach_all();
    for (index, host) in overlay.hosts.iter().enumerate() {
        assert_comes(PATIENCE, &format!("{backend} alone on {}", host.name()), || {
            (
                Everything::of(host.ns(), backend),
                Everything::expected(overlay, index, backend),
            )
        });
        assert_eq!(lease(server, overlay.subnet(index)), lease_of(host, backend));
    }
}

/// The lease that a host of this backend writes.
fn lease_of(host: &Host, backend: &str) -> String {
    let vxlan = |device| vxlan_lease(host.ip(), &mac(host.ns(), device));
    match backend {
        UDP => format!(r#"{{"PublicIP":"{}","PublicIPv6":null}}"#, host.ip()),
        VXLAN => vxlan("flannel.1"),
        VXLAN_7 => vxlan("flannel.7").replace(r#""VNI":1"#, r#""VNI":7"#),
        HOST_GW => host_gw_lease(host.ip()),
        other => panic!("{other}"),
    }
}

/// Changes the backend over and over; one host's daemon has the time to stop, the other's has not.
fn each_leaves_nothing(name: &str, backends: &[&str]) {
    let (mut overlay, server) = Overlay::start_on_etcd(name, &config(backends[0]), 2);
    assert_only(&overlay, &server, backends[0]);
    let subnets = [overlay.subnet(0), overlay.subnet(1)];
    for backend in &backends[1..] {
        overlay.registry.configure(overlay.hosts[0].ns(), &config(backend));
        assert!(overlay.daemons[0].stop().success());
        overlay.restart_all(Daemon::kill9_if_running);
        assert_only(&overlay, &server, backend);
        assert_eq!([overlay.subnet(0), overlay.subnet(1)], subnets);
    }
}

#[test]
fn udp_to_vxlan_to_host_gw_to_udp_leaves_nothing_of_the_old_one() {
    each_leaves_nothing("switch_round", &[UDP, VXLAN, HOST_GW, UDP]);
}

#[test]
fn udp_to_host_gw_to_vxlan_to_udp_leaves_nothing_of_the_old_one() {
    each_leaves_nothing("switch_back", &[UDP, HOST_GW, VXLAN, UDP]);
}

#[test]
fn another_vni_leaves_nothing_of_the_old_one() {
    each_leaves_nothing("switch_vni", &[VXLAN, VXLAN_7, HOST_GW, VXLAN]);
}

#[test]
fn another_network_leaves_nothing_of_the_old_one() {
    for (name, backend) in [("switch_net_vx", VXLAN), ("switch_net_gw", HOST_GW)] {
        let (mut overlay, server) = Overlay::start_on_etcd(name, &config(backend), 2);
        assert_only(&overlay, &server, backend);
        let other = config(backend).replace("10.5.", "10.9.");
        let set = ["network", "set", &other, "--force"];
        overlay.registry.flanneld(overlay.hosts[0].ns(), &set);
        assert!(overlay.daemons[0].stop().success());
        overlay.restart_all(Daemon::kill9_if_running);
        for (index, host) in overlay.hosts.iter().enumerate() {
            assert!(overlay.subnet(index).to_string().starts_with("10.9."));
            assert_comes(PATIENCE, &format!("{backend} alone on {}", host.name()), || {
                (
                    Everything::of(host.ns(), backend),
                    Everything::expected(&overlay, index, backend),
                )
            });
        }
        let far = overlay.subnet(1).network();
        // Nobody has the address on host-gw, where the host's bridge still has the old subnet's.
        if backend == VXLAN {
            lab::assert_reaches(overlay.hosts[0].ns(), far);
        }
    }
}

#[test]
fn a_daemon_that_finds_the_new_backend_first_waits_for_no_other() {
    let (mut overlay, server) = Overlay::start_on_etcd("switch_first", &config(VXLAN), 2);
    assert_only(&overlay, &server, VXLAN);
    overlay.registry.configure(overlay.hosts[0].ns(), &config(HOST_GW));
    assert!(overlay.daemons[0].stop().success());
    overlay.daemons[0].start_and_wait();
    // The other one is still of the old type: it is skipped, and nothing of it stays.
    let ns = overlay.hosts[0].ns();
    assert_eq!(overlay_devices(ns), [""; 0]);
    assert_eq!(Programmed::of(ns, "flannel.1"), Programmed::default());
    assert!(overlay.daemons[1].stop().success());
    overlay.daemons[1].start_and_wait();
    assert_only(&overlay, &server, HOST_GW);
}

#[test]
fn two_overlays_on_the_same_hosts_do_not_touch_each_other() {
    let (mut overlay, _server) = Overlay::start_on_etcd("switch_two", &config(VXLAN), 2);
    let registry = overlay.registry.clone().with("--etcd-prefix=/second");
    let configure = |overlay: &Overlay, backend: &str| {
        let other = config(backend).replace("10.5.", "10.9.");
        registry.configure(overlay.hosts[0].ns(), &other);
    };
    configure(&overlay, VXLAN_7);
    let mut second: Vec<Daemon> = overlay
        .hosts
        .iter()
        .map(|host| Daemon::named(&format!("{}b", host.name()), &overlay.lab, host, &registry))
        .collect();
    for daemon in &mut second {
        daemon.start_and_wait();
    }
    let subnet = |daemon: &Daemon| daemon.subnet().subnet.trunc();
    // The first overlay's entries, and the second one's.
    let expected = |overlay: &Overlay, second: &[Daemon], index: usize, backend: &str| {
        let (peer, subnet) = (&overlay.hosts[1 - index], subnet(&second[1 - index]));
        let first = tunnels(overlay, index, "flannel.1");
        let (one, two) = match backend {
            HOST_GW => (first.with_route(subnet, peer.ip()), Programmed::default()),
            _ => {
                let peer_mac = mac(peer.ns(), "flannel.7");
                let all = Programmed::default().with_tunnel("flannel.7", subnet, &peer_mac, peer.ip());
                let routes: Vec<&str> = all.routes.iter().map(String::as_str).collect();
                (first.with_foreign([&routes, &[], &[]]), all.clone())
            }
        };
        (one, two.neighbours, two.forwarding)
    };
    let look = |overlay: &Overlay, index: usize| {
        let ns = overlay.hosts[index].ns();
        let two = Programmed::of(ns, "flannel.7");
        (Programmed::of(ns, "flannel.1"), two.neighbours, two.forwarding)
    };
    let assert_both = |overlay: &Overlay, second: &[Daemon], backend: &str| {
        for index in [0, 1] {
            assert_comes(PATIENCE, "both overlays' entries", || {
                (look(overlay, index), expected(overlay, second, index, backend))
            });
        }
        overlay.assert_all_reach_all();
    };
    assert_both(&overlay, &second, VXLAN_7);
    lab::assert_reaches(overlay.hosts[0].ns(), subnet(&second[1]).network());

    // Starts of one, and of the other.
    overlay.restart_all(Daemon::kill9);
    assert_both(&overlay, &second, VXLAN_7);
    configure(&overlay, HOST_GW);
    for daemon in &mut second {
        assert!(daemon.stop().success());
        daemon.start_and_wait();
    }
    assert_both(&overlay, &second, HOST_GW);
    overlay.restart_all(|daemon| assert!(daemon.stop().success()));
    assert_both(&overlay, &second, HOST_GW);
    for host in &overlay.hosts {
        assert_eq!(overlay_devices(host.ns()), ["flannel.1"]);
    }
}
