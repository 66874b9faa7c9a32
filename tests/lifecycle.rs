//! The daemon's life: start, readiness, every way of ending, restart, and the accidents with leases. Needs root.

mod lab;

use flannel::lab::{Host, HostOptions, Lab, wait_until};
use lab::{CONFIG, Daemon, FLANNELD, Overlay, PATIENCE, Registry, assert_reaches, http_get, new_lab};
use nix::sys::signal::Signal;
use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

/// A lab with one host and a configured embedded registry.
fn one_host(name: &str) -> (Lab, Host, Registry) {
    let mut lab = new_lab(name);
    let host = lab.host("h1").unwrap();
    let registry = Registry::embedded(&lab);
    registry.configure(host.ns(), CONFIG);
    (lab, host, registry)
}

fn has_device(host: &Host) -> bool {
    host.ns().ip("-br link").unwrap().contains("flannel0")
}

#[test]
fn sigterm_and_sigint_end_a_running_daemon_cleanly() {
    let (lab, host, registry) = one_host("signals");
    let mut daemon = Daemon::new(&lab, &host, &registry);
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        daemon.start_and_wait();
        assert!(has_device(&host));
        assert_eq!(daemon.end_with(signal).code(), Some(0), "{}", daemon.log());
        assert!(!has_device(&host));
    }
}

#[test]
fn a_waiting_daemon_ends_on_a_signal_too() {
    let mut lab = new_lab("waiting");
    let host = lab.host("h1").unwrap();
    let unconfigured = Registry::embedded(&lab);
    // Nothing listens there.
    let unreachable = Registry::etcd(&format!("http://{}:2379", host.ip()));
    // Packets to there vanish.
    let silent = Registry::etcd("http://192.168.77.200:2379");
    for (name, registry, said) in [
        ("unconfigured", unconfigured, "no network configuration"),
        ("unreachable", unreachable, "connection refused"),
        ("silent", silent, "external interface"),
    ] {
        let mut daemon = Daemon::named(name, &lab, &host, &registry);
        for signal in [Signal::SIGTERM, Signal::SIGINT] {
            daemon.start();
            daemon.wait_for_log(said);
            let asked = Instant::now();
            assert_eq!(daemon.end_with(signal).code(), Some(0), "{}", daemon.log());
            assert!(
                asked.elapsed() < Duration::from_secs(4),
                "{name}: {:?}",
                asked.elapsed()
            );
        }
    }
}

#[test]
fn a_configuration_that_comes_later_is_waited_for_and_asked_for_once() {
    let mut lab = new_lab("later");
    let host = lab.host("h1").unwrap();
    let registry = Registry::embedded(&lab);
    let mut daemon = Daemon::new(&lab, &host, &registry);
    daemon.start();
    daemon.wait_for_log("no network configuration at /coreos.com/network/config");
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(
        daemon.log().matches("no network configuration").count(),
        1,
        "{}",
        daemon.log()
    );
    registry.configure(host.ns(), CONFIG);
    daemon.wait_ready();
}

#[test]
fn restart_and_kill_9_keep_subnet_and_reach() {
    let mut overlay = Overlay::start("restart", 2);
    overlay.assert_all_reach_all();
    let before = overlay.daemons[0].subnet();
    for kill in [false, true, true] {
        if kill {
            overlay.daemons[0].kill9();
        } else {
            assert!(overlay.daemons[0].stop().success());
        }
        let begun = Instant::now();
        assert_eq!(overlay.daemons[0].start_and_wait(), before);
        assert!(
            begun.elapsed() < Duration::from_secs(5),
            "the claim of the killed daemon was waited for"
        );
        overlay.assert_all_reach_all();
    }
    // Also when the subnet file is lost: the lease carries the PublicIP.
    overlay.daemons[0].kill9();
    std::fs::remove_file(overlay.daemons[0].subnet_file()).unwrap();
    assert_eq!(overlay.daemons[0].start_and_wait(), before);
}

#[test]
fn health_and_readiness_are_told_apart() {
    let mut lab = new_lab("health");
    let host = lab.host("h1").unwrap();
    let registry = Registry::embedded(&lab);
    let mut daemon = Daemon::new(&lab, &host, &registry)
        .with("--healthz-port=8471")
        .with("--healthz-ip=127.0.0.1");
    let address: SocketAddr = "127.0.0.1:8471".parse().unwrap();
    let get = |path| http_get(host.ns(), address, path).unwrap().0;
    daemon.start();
    daemon.wait_for_log("no network configuration");
    assert_eq!((get("/healthz"), get("/readyz"), get("/nothing")), (200, 503, 404));
    registry.configure(host.ns(), CONFIG);
    daemon.wait_ready();
    assert_eq!((get("/healthz"), get("/readyz")), (200, 200));

    let mut second = Daemon::named("h1b", &lab, &host, &registry)
        .with("--healthz-port=8471")
        .with("--healthz-ip=127.0.0.1");
    second.start();
    assert_eq!(second.wait_exit().code(), Some(1));
    assert!(
        second.log().contains("cannot open the health port 127.0.0.1:8471"),
        "{}",
        second.log()
    );
}

#[test]
fn a_lease_that_is_released_under_a_running_daemon_is_taken_again() {
    let mut overlay = Overlay::start("released", 2);
    overlay.assert_all_reach_all();
    let subnet = overlay.daemons[0].subnet().subnet.trunc().to_string();
    let said = overlay
        .registry
        .flanneld(overlay.hosts[0].ns(), &["leases", "release", &subnet]);
    assert!(said.contains("stop it first"), "{said}");
    overlay.daemons[0].wait_for_log(&format!("the lease {subnet} was gone from the registry"));
    // The other host has nothing to say of what was there again within a second.
    overlay.assert_all_reach_all();
    overlay.daemons[0].assert_running();
    let leases = overlay.registry.flanneld(overlay.hosts[0].ns(), &["leases", "list"]);
    assert!(leases.contains(&subnet), "{leases}");
}

#[test]
fn a_daemon_without_the_capability_says_so_before_it_takes_a_lease() {
    let (_lab, host, registry) = one_host("capless");
    let mut plain = host.ns().command("setpriv");
    plain
        .args(["--bounding-set=-net_admin", FLANNELD])
        .args(registry.flags());
    flannel::lab::without_daemon_env(&mut plain);
    let output = plain.output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("CAP_NET_ADMIN"), "{said}");
    let leases = registry.flanneld(host.ns(), &["leases", "list"]);
    assert!(leases.starts_with("no leases"), "{leases}");
}

#[test]
fn an_embedded_registry_that_may_not_be_written_ends_the_daemon_with_the_remedy() {
    let (_lab, host, registry) = one_host("readonly");
    let mut nobody = host.ns().command("setpriv");
    // Root without what makes root more than others, in a directory of somebody else.
    nobody.args([
        "--bounding-set=+net_admin,-dac_override,-dac_read_search,-fowner",
        FLANNELD,
    ]);
    let directory = registry.flags()[0].split_once('=').unwrap().1;
    let chown = |owner: u32| {
        std::os::unix::fs::chown(directory, Some(owner), Some(owner)).unwrap();
        std::os::unix::fs::chown(format!("{directory}/lock"), Some(owner), Some(owner)).unwrap();
    };
    chown(65_534);
    flannel::lab::without_daemon_env(&mut nobody);
    let output = nobody.args(registry.flags()).output().unwrap();
    chown(0);
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("run as root, or as a user who may write"), "{said}");
}

#[test]
fn a_loopback_interface_is_warned_of_and_its_mtu_is_cut_to_a_datagrams() {
    let (lab, host, registry) = one_host("loopback");
    let mut daemon = Daemon::new(&lab, &host, &registry).with("--iface=lo");
    daemon.start_and_wait();
    daemon.wait_for_log("other hosts cannot reach this one");
    assert!(host.ns().ip("link show flannel0").unwrap().contains("mtu 65507"));
}

#[test]
fn a_route_in_the_way_of_an_ipv6_overlay_is_named_with_its_device() {
    let mut lab = new_lab("v6route");
    let host = lab.host("h1").unwrap();
    let registry = Registry::embedded(&lab);
    registry.configure(
        host.ns(),
        r#"{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:12:13::/48"}"#,
    );
    host.ns().ip("link add other type bridge").unwrap();
    host.ns().ip("link set other up").unwrap();
    host.ns().ip("-6 route add fd00:12:13::/48 dev other").unwrap();
    let mut daemon = Daemon::new(&lab, &host, &registry);
    daemon.start();
    assert_eq!(daemon.wait_exit().code(), Some(1));
    let log = daemon.log();
    assert!(log.contains("through other."), "{log}");
}

#[test]
fn a_reservation_is_honoured_and_stays() {
    let (lab, host, registry) = one_host("reserved");
    registry.flanneld(
        host.ns(),
        &[
            "leases",
            "reserve",
            "10.5.77.0/24",
            "--public-ip",
            &host.ip().to_string(),
        ],
    );
    let mut daemon = Daemon::new(&lab, &host, &registry);
    assert_eq!(daemon.start_and_wait().subnet, "10.5.77.1/24".parse().unwrap());
    daemon.stop();
    let leases = registry.flanneld(host.ns(), &["leases", "list", "--json"]);
    let leases: serde_json::Value = serde_json::from_str(&leases).unwrap();
    assert_eq!(leases.as_array().unwrap().len(), 1, "{leases}");
    let listed = registry.flanneld(host.ns(), &["leases", "list"]);
    assert!(
        listed.contains("10.5.77.0/24") && listed.contains("reservation"),
        "{listed}"
    );
}

#[test]
fn a_host_that_has_a_lease_changes_over_to_its_reservation_at_the_next_start() {
    let (lab, host, registry) = one_host("changes");
    let mut daemon = Daemon::new(&lab, &host, &registry);
    let before = daemon.start_and_wait().subnet;
    let reserved = if before.to_string().starts_with("10.5.7.") {
        "10.5.8.0/24"
    } else {
        "10.5.7.0/24"
    };
    let ip = host.ip().to_string();
    registry.flanneld(host.ns(), &["leases", "reserve", reserved, "--public-ip", &ip]);
    daemon.assert_running();
    assert!(daemon.stop().success());
    assert_eq!(daemon.start_and_wait().subnet.trunc().to_string(), reserved);
    let listed = registry.flanneld(host.ns(), &["leases", "list"]);
    assert!(
        listed.contains(reserved) && !listed.contains(&before.trunc().to_string()),
        "{listed}"
    );
}

#[test]
fn the_subnet_files_subnet_is_taken_again_when_the_lease_is_lost() {
    let (lab, host, registry) = one_host("previous");
    let mut daemon = Daemon::new(&lab, &host, &registry);
    let before = daemon.start_and_wait();
    assert!(daemon.stop().success());
    registry.flanneld(host.ns(), &["leases", "release", &before.subnet.trunc().to_string()]);
    assert_eq!(daemon.start_and_wait(), before);
}

#[test]
fn a_lease_that_no_longer_fits_the_network_is_exchanged() {
    let (lab, host, registry) = one_host("unfit");
    let mut daemon = Daemon::new(&lab, &host, &registry);
    daemon.start_and_wait();
    assert!(daemon.stop().success());
    registry.flanneld(
        host.ns(),
        &["network", "set", r#"{"Network":"10.9.0.0/16"}"#, "--force"],
    );
    let subnet = daemon.start_and_wait().subnet;
    assert!(subnet.to_string().starts_with("10.9."), "{subnet}");
    let leases = registry.flanneld(host.ns(), &["leases", "list"]);
    assert!(!leases.contains("10.5."), "{leases}");
}

#[test]
fn a_second_host_with_the_same_public_ip_is_refused_while_the_first_is_alive() {
    let mut overlay = Overlay::start("twice", 2);
    overlay.assert_all_reach_all();
    let claimed = overlay.hosts[0].ip();
    let impostor = overlay.lab.host("h3").unwrap();
    let mut third = Daemon::new(&overlay.lab, &impostor, &overlay.registry)
        .with(format!("--public-ip={claimed}"))
        .with("--iface=eth0");
    third.start();
    // The first daemon's claim must be seen to be refreshed twice, which it is every 10 s.
    assert_eq!(third.wait_exit_within(2 * PATIENCE).code(), Some(1));
    let log = third.log();
    for part in [
        "belongs to another flanneld that is alive",
        &claimed.to_string(),
        "--iface",
        "NAT",
    ] {
        assert!(log.contains(part), "{part} is not in {log}");
    }
    overlay.assert_all_reach_all();

    // When the first one is gone for good, its address is free.
    assert!(overlay.daemons[0].stop().success());
    third.start_and_wait();
}

#[test]
fn an_exhausted_network_says_so_and_the_hosts_that_have_a_subnet_go_on() {
    let mut lab = new_lab("full");
    let hosts: Vec<Host> = (1..=3).map(|n| lab.host(&format!("h{n}")).unwrap()).collect();
    let registry = Registry::embedded(&lab);
    registry.configure(
        hosts[0].ns(),
        r#"{"Network":"10.5.0.0/16","SubnetMin":"10.5.1.0","SubnetMax":"10.5.2.0"}"#,
    );
    let mut daemons: Vec<Daemon> = hosts.iter().map(|host| Daemon::new(&lab, host, &registry)).collect();

    // One has the first; two race for the last.
    daemons[0].start_and_wait();
    daemons[1].start();
    daemons[2].start();
    let loser = loop {
        let [_, one, two] = &mut daemons[..] else {
            unreachable!()
        };
        match (one.process().exited(), two.process().exited()) {
            (Some(_), Some(_)) => panic!("both lost:\n{}\n{}", one.log(), two.log()),
            (Some(_), None) => break 1,
            (None, Some(_)) => break 2,
            (None, None) => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    assert_eq!(daemons[loser].wait_exit().code(), Some(1));
    assert!(
        daemons[loser].log().contains("out of subnets"),
        "{}",
        daemons[loser].log()
    );
    let winner = 3 - loser;
    let subnet = daemons[winner].wait_ready().subnet;
    assert_ne!(subnet, daemons[0].subnet().subnet);
    assert_reaches(hosts[winner].ns(), daemons[0].subnet().subnet.network());

    // A subnet that is given back can be taken.
    assert!(daemons[winner].stop().success());
    registry.flanneld(hosts[0].ns(), &["leases", "release", &subnet.trunc().to_string()]);
    daemons[loser].start_and_wait();
}

#[test]
fn what_no_container_has_is_dropped_if_that_is_wanted() {
    let lab = new_lab("blackhole");
    let registry = Registry::embedded(&lab);
    let mut overlay = Overlay::start_hosts(
        lab,
        registry,
        CONFIG,
        &[
            (HostOptions::default(), &["--ip-blackhole-route"][..]),
            (HostOptions::default(), &[]),
        ],
    );
    let subnet = overlay.daemons[0].subnet().subnet.trunc();
    let route = format!("blackhole {subnet} proto 85 metric 4294967295");
    let ns = overlay.hosts[0].ns().clone();
    let blackholes = || ns.ip("route show type blackhole").unwrap().trim().to_owned();
    assert_eq!(blackholes(), route);
    // The bridge's route to the same subnet comes first.
    overlay.assert_all_reach_all();
    ns.ip("route flush type blackhole").unwrap();
    wait_until(PATIENCE, "the route to be put back", || blackholes() == route).unwrap();

    let mut without = Daemon::named("without", &overlay.lab, &overlay.hosts[0], &overlay.registry);
    assert!(overlay.daemons[0].stop().success());
    assert_eq!(blackholes(), route);
    without.start_and_wait();
    assert_eq!(blackholes(), "");
}
