//! The real daemon on a real etcd: what the tutorials do, and what happens to etcd in the field. Needs root.

mod lab;

use flannel::lab::{CONTAINER_BRIDGE, wait_until};
use lab::{
    CONFIG, Daemon, Overlay, PATIENCE, Registry,
    certificates::Authority,
    etcd::{EtcdOptions, EtcdServer},
    flow::Flows,
    new_lab,
    original::put_leases,
};
use std::{
    fs,
    time::{Duration, Instant},
};

/// `count` hosts on an etcd of their own, with [`CONFIG`].
fn overlay(name: &str, count: usize) -> (Overlay, EtcdServer) {
    Overlay::start_on_etcd(name, CONFIG, count)
}

/// Waits until the last line that tells of an outage says that it is over, on each host.
fn wait_until_connected(overlay: &Overlay) {
    for daemon in &overlay.daemons {
        daemon.wait_for_log("watching the leases works again");
    }
}

/// Removes host `index`'s lease by hand and waits for it to be made again, and writes that of a host that is not there, of which
/// all learn: their watches work.
fn assert_watches_work(overlay: &mut Overlay, server: &EtcdServer, index: usize) {
    let subnet = overlay.daemons[index].subnet().subnet.trunc().to_string();
    server.etcdctl(&[
        "del",
        &format!("/coreos.com/network/subnets/{}", subnet.replace('/', "-")),
    ]);
    server.etcdctl(&[
        "put",
        "/coreos.com/network/subnets/10.5.250.0-24",
        r#"{"PublicIP":"192.168.77.250","PublicIPv6":null}"#,
    ]);
    overlay.daemons[index].wait_for_log(&format!("the lease {subnet} was gone from the registry"));
    for daemon in &mut overlay.daemons {
        daemon.wait_for_log("peer 10.5.250.0/24 at 192.168.77.250");
        daemon.assert_running();
    }
}

#[test]
fn a_tutorial_with_etcdctl_works_and_leases_look_as_the_originals() {
    let mut lab = new_lab("tutorial");
    let server = EtcdServer::start_with(EtcdOptions::on_switch(&lab));
    server.etcdctl(&[
        "put",
        "/coreos.com/network/config",
        r#"{ "Network": "10.5.0.0/16", "Backend": {"Type": "udp"} }"#,
    ]);
    let hosts = [lab.host("h1").unwrap(), lab.host("h2").unwrap()];
    let registry = Registry::etcd(&server.url());
    let mut daemons = [
        Daemon::new(&lab, &hosts[0], &registry),
        Daemon::new(&lab, &hosts[1], &registry),
    ];
    for (host, daemon) in hosts.iter().zip(&mut daemons) {
        let subnet = daemon.start_and_wait().subnet.trunc().to_string().replace('/', "-");
        let key = format!("/coreos.com/network/subnets/{subnet}");
        let value = server.etcdctl(&["get", "--print-value-only", &key]);
        assert_eq!(
            value.trim(),
            format!(r#"{{"PublicIP":"{}","PublicIPv6":null}}"#, host.ip())
        );
        // Bound to an etcd lease of a day.
        let record: serde_json::Value = serde_json::from_str(&server.etcdctl(&["get", "-w", "json", &key])).unwrap();
        let lease = record["kvs"][0]["lease"]
            .as_i64()
            .expect("the key is bound to an etcd lease");
        let left = server.etcdctl(&["lease", "timetolive", &format!("{lease:x}")]);
        assert!(left.contains("granted with TTL(86400s)"), "{left}");
    }
    lab::assert_reaches(hosts[0].ns(), daemons[1].subnet().subnet.network());

    // What a second etcd client reads and writes, the daemons understand at once: a host of the original.
    server.etcdctl(&[
        "put",
        "/coreos.com/network/subnets/10.5.250.0-24",
        r#"{"PublicIP":"192.168.77.250","PublicIPv6":null}"#,
    ]);
    daemons[0].wait_for_log("peer 10.5.250.0/24 at 192.168.77.250");
}

#[test]
fn five_hosts_on_etcd_reach_one_another() {
    let (overlay, _server) = overlay("efive", 5);
    overlay.assert_all_reach_all();
}

#[test]
fn five_daemons_that_start_at_once_all_learn_of_one_another() {
    let (mut overlay, server) = overlay("rush", 5);
    for host in &overlay.hosts {
        // It stays behind with an address of the host's old subnet, which becomes another host's below.
        host.ns().ip(&format!("link del {CONTAINER_BRIDGE}")).unwrap();
    }
    for _ in 0..4 {
        for daemon in &mut overlay.daemons {
            daemon.kill9();
        }
        server.etcdctl(&["del", "--prefix", "/coreos.com/network/subnets/"]);
        for daemon in &mut overlay.daemons {
            fs::remove_file(daemon.subnet_file()).unwrap();
            daemon.start();
        }
        let subnets: Vec<_> = overlay
            .daemons
            .iter_mut()
            .map(|daemon| daemon.wait_ready().subnet)
            .collect();
        for (index, host) in overlay.hosts.iter().enumerate() {
            for (other, subnet) in subnets.iter().enumerate() {
                if other != index {
                    lab::assert_reaches(host.ns(), subnet.network());
                }
            }
        }
    }
}

#[test]
fn packets_flow_while_etcd_is_down_and_changes_made_at_its_return_are_seen() {
    let (mut overlay, mut server) = overlay("edown", 3);
    overlay.assert_all_reach_all();
    let flows = Flows::start(&overlay.containers[0], &overlay.containers[1]);
    server.kill();
    overlay.daemons[0].wait_for_log("watching the leases failed");
    server.restart();
    wait_until_connected(&overlay);
    flows.finish_without_loss();
    assert_watches_work(&mut overlay, &server, 2);
}

#[test]
fn an_etcd_compacted_while_the_hosts_are_cut_off_costs_no_peer() {
    let (mut overlay, server) = overlay("compact", 3);
    overlay.assert_all_reach_all();
    let flows = Flows::start(&overlay.containers[0], &overlay.containers[1]);
    let switch = overlay.lab.switch();
    // Cut off: the hosts' packets to etcd vanish, those to one another do not.
    switch.ip("addr del 192.168.77.254/24 dev br0").unwrap();
    let gone = overlay.daemons[2].subnet().subnet.trunc().to_string();
    overlay.daemons[2].kill9();
    switch.ip("addr add 192.168.77.254/24 dev lo").unwrap();
    server.etcdctl(&[
        "del",
        &format!("/coreos.com/network/subnets/{}", gone.replace('/', "-")),
    ]);
    server.etcdctl(&[
        "put",
        "/coreos.com/network/subnets/10.5.250.0-24",
        r#"{"PublicIP":"192.168.77.250","PublicIPv6":null}"#,
    ]);
    for filler in 0..50 {
        server.etcdctl(&["put", "/filler", &filler.to_string()]);
    }
    let status: serde_json::Value =
        serde_json::from_str(&server.etcdctl(&["endpoint", "status", "-w", "json"])).unwrap();
    let revision = status[0]["Status"]["header"]["revision"].to_string();
    server.etcdctl(&["compact", &revision]);
    overlay.daemons[0].wait_for_log("watching the leases failed");
    switch.ip("addr del 192.168.77.254/24 dev lo").unwrap();
    switch.ip("addr add 192.168.77.254/24 dev br0").unwrap();
    for daemon in &overlay.daemons[..2] {
        daemon.wait_for_log(&format!("peer {gone} is gone"));
        daemon.wait_for_log("peer 10.5.250.0/24 at 192.168.77.250");
    }
    flows.finish_without_loss();
    for daemon in &mut overlay.daemons[..2] {
        daemon.assert_running();
    }
}

#[test]
fn an_etcd_that_is_not_there_yet_is_told_once_and_waited_for() {
    let mut lab = new_lab("absent");
    let host = lab.host("h1").unwrap();
    let options = EtcdOptions::on_switch(&lab);
    let registry = Registry::etcd("http://192.168.77.254:2379");
    let mut daemon = Daemon::new(&lab, &host, &registry);
    daemon.start();
    let line = daemon.wait_for_log("reading the network's configuration failed");
    for part in ["http://192.168.77.254:2379", "connection refused"] {
        assert!(line.contains(part), "{part} is not in {line}");
    }
    std::thread::sleep(Duration::from_secs(5));
    assert_eq!(
        daemon.log().lines().count(),
        2,
        "interface and outage, no flood: {}",
        daemon.log()
    );

    let server = EtcdServer::start_with(options);
    server.etcdctl(&["put", "/coreos.com/network/config", CONFIG]);
    daemon.wait_ready();
}

#[test]
fn a_daemon_that_loses_its_public_ip_to_another_that_lives_ends() {
    let (mut overlay, server) = overlay("lost", 1);
    let key = format!("/coreos.com/network/hosts/{}", overlay.hosts[0].ip());
    // The other: a record in the claim's place that is kept alive.
    let granted = server.etcdctl(&["lease", "grant", "600"]);
    let lease = granted.split(' ').nth(1).unwrap();
    server.etcdctl(&["put", &format!("--lease={lease}"), &key, "{}"]);
    let daemon = &mut overlay.daemons[0];
    wait_until(3 * PATIENCE, "the daemon to end", || {
        server.etcdctl(&["lease", "keep-alive", "--once", lease]);
        std::thread::sleep(Duration::from_secs(3));
        daemon.process().exited().is_some()
    })
    .unwrap();
    assert_eq!(daemon.wait_exit().code(), Some(1));
    let log = daemon.log();
    assert!(log.contains("belongs to another flanneld that is alive"), "{log}");
    assert!(server.etcdctl(&["get", "--print-value-only", &key]).contains("{}"));
}

#[test]
fn a_claim_whose_key_was_deleted_is_made_again() {
    let (overlay, server) = overlay("unclaimed", 1);
    let key = format!("/coreos.com/network/hosts/{}", overlay.hosts[0].ip());
    let claim = || server.etcdctl(&["get", "--print-value-only", &key]);
    let before = claim();
    server.etcdctl(&["del", &key]);
    wait_until(PATIENCE, "the claim to be made again", || claim() == before).unwrap();
}

#[test]
fn an_etcd_that_hangs_is_told_once_and_a_signal_ends_the_waiting_daemon() {
    let mut lab = new_lab("hangs");
    let server = EtcdServer::start_with(EtcdOptions::on_switch(&lab));
    server.etcdctl(&["put", "/coreos.com/network/config", CONFIG]);
    server.pause();
    let host = lab.host("h1").unwrap();
    let mut daemon = Daemon::new(&lab, &host, &Registry::etcd(&server.url()));
    daemon.start();
    let line = daemon.wait_for_log("reading the network's configuration failed");
    assert!(line.contains("timed out"), "{line}");
    // Long enough for a second try.
    std::thread::sleep(Duration::from_secs(7));
    assert_eq!(
        daemon.log().lines().count(),
        2,
        "interface and outage: {}",
        daemon.log()
    );
    let asked = Instant::now();
    assert!(daemon.stop().success());
    assert!(asked.elapsed() < Duration::from_secs(1), "{:?}", asked.elapsed());

    daemon.start();
    daemon.wait_for_log("reading the network's configuration failed");
    server.resume();
    daemon.wait_ready();
}

#[test]
fn packets_flow_while_etcd_hangs_and_a_signal_ends_the_daemon_all_the_same() {
    let (mut overlay, server) = overlay("paused", 3);
    overlay.assert_all_reach_all();
    let flows = Flows::start(&overlay.containers[0], &overlay.containers[1]);
    server.pause();
    for daemon in &overlay.daemons {
        daemon.wait_for_log("watching the leases failed");
    }
    let asked = Instant::now();
    assert!(overlay.daemons[2].stop().success());
    assert!(asked.elapsed() < Duration::from_secs(4), "{:?}", asked.elapsed());
    server.resume();
    overlay.daemons.pop();
    wait_until_connected(&overlay);
    flows.finish_without_loss();
    assert_watches_work(&mut overlay, &server, 1);
}

#[test]
fn several_endpoints_serve_as_long_as_one_of_them_does() {
    let mut lab = new_lab("many");
    let server = EtcdServer::start_with(EtcdOptions::on_switch(&lab));
    server.etcdctl(&["put", "/coreos.com/network/config", CONFIG]);
    let host = lab.host("h1").unwrap();
    // The first refuses, the second swallows.
    let registry = Registry::etcd(&format!(
        "http://192.168.77.254:4001,http://192.168.77.200:2379,{}",
        server.url()
    ));
    Daemon::new(&lab, &host, &registry).start_and_wait();
}

#[test]
fn a_wrong_prefix_names_the_key_and_the_ones_that_are_there() {
    let mut lab = new_lab("prefix");
    let server = EtcdServer::start_with(EtcdOptions::on_switch(&lab));
    server.etcdctl(&["put", "/atomic.io/network/config", CONFIG]);
    let host = lab.host("h1").unwrap();
    let mut daemon = Daemon::new(&lab, &host, &Registry::etcd(&server.url()));
    daemon.start();
    let line = daemon.wait_for_log("no network configuration");
    for part in [
        "/coreos.com/network/config",
        "/atomic.io/network/config",
        "--etcd-prefix",
    ] {
        assert!(line.contains(part), "{part} is not in {line}");
    }
    // Written either way, the right one is found.
    for (number, prefix) in ["atomic.io/network", "/atomic.io/network/", "/atomic.io/network"]
        .iter()
        .enumerate()
    {
        let registry = Registry::etcd(&server.url()).with(format!("--etcd-prefix={prefix}"));
        let mut daemon = Daemon::named(&format!("p{number}"), &lab, &host, &registry);
        daemon.start_and_wait();
        assert!(daemon.stop().success());
    }
    // And so is a configuration whose key has no leading slash.
    server.etcdctl(&["put", "bare/network/config", CONFIG]);
    let registry = Registry::etcd(&server.url()).with("--etcd-prefix=/bare/network");
    let mut daemon = Daemon::named("bare", &lab, &host, &registry);
    daemon.start_and_wait();
    assert!(
        server
            .etcdctl(&["get", "--prefix", "--keys-only", "bare/network/subnets/"])
            .contains("10.5.")
    );
}

#[test]
fn tls_with_client_certificates_carries_an_overlay() {
    let lab = new_lab("tls");
    let authority = Authority::new(lab.dir(), "authority");
    let client_files = authority.issue("client", &[]);
    let path = |path: &std::path::Path| path.display().to_string();
    let options = EtcdOptions::on_switch(&lab);
    let files = authority.issue("server", &[options.address.to_string()]);
    let server = EtcdServer::start_with(options.with_tls(&files.certificate, &files.key, &authority.file));
    let (ca, cert, key) = (
        path(&authority.file),
        path(&client_files.certificate),
        path(&client_files.key),
    );
    let with_ca = Registry::etcd(&server.url()).with(format!("--etcd-cafile={ca}"));
    let registry = with_ca
        .clone()
        .with(format!("--etcd-certfile={cert}"))
        .with(format!("--etcd-keyfile={key}"));
    let overlay = Overlay::start_on(lab, registry, CONFIG, 2);
    overlay.assert_all_reach_all();

    // Without the client's certificate the server refuses, in words.
    let refused = with_ca.try_flanneld(overlay.hosts[0].ns(), &["network", "get"]);
    assert_eq!(refused.status.code(), Some(1));
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(said.contains("--etcd-certfile"), "{said}");
}

#[test]
fn a_user_with_a_password_outlives_its_tokens() {
    let mut lab = new_lab("auth");
    let mut server = EtcdServer::start_with(EtcdOptions {
        arguments: vec!["--auth-token-ttl=2".to_owned()],
        ..EtcdOptions::on_switch(&lab)
    });
    server.etcdctl(&["put", "/coreos.com/network/config", CONFIG]);
    for arguments in [
        &["user", "add", "root:secret-of-root"][..],
        &["role", "add", "flannel"],
        &[
            "role",
            "grant-permission",
            "--prefix=true",
            "flannel",
            "readwrite",
            "/coreos.com/network/",
        ],
        &["user", "add", "flannel:secret-of-flannel"],
        &["user", "grant-role", "flannel", "flannel"],
        &["auth", "enable"],
    ] {
        server.etcdctl(arguments);
    }
    server.set_client_arguments(&["--user", "root:secret-of-root"]);
    let hosts = [lab.host("h1").unwrap(), lab.host("h2").unwrap()];
    let user = |password: &str| {
        Registry::etcd(&server.url())
            .with("--etcd-username=flannel")
            .with(format!("--etcd-password={password}"))
    };

    let mut wrong = Daemon::named("wrong", &lab, &hosts[0], &user("guess"));
    wrong.start();
    assert_eq!(wrong.wait_exit().code(), Some(1));
    assert!(
        wrong.log().contains("--etcd-password") && !wrong.log().contains("guess"),
        "{}",
        wrong.log()
    );

    let mut first = Daemon::new(&lab, &hosts[0], &user("secret-of-flannel"));
    first.start_and_wait();
    std::thread::sleep(Duration::from_secs(5));
    // The token of the first daemon has run out twice over; it sees the second one all the same.
    let mut second = Daemon::new(&lab, &hosts[1], &user("secret-of-flannel"));
    let subnet = second.start_and_wait().subnet;
    first.wait_for_log(&format!("peer {}", subnet.trunc()));
    lab::assert_reaches(hosts[0].ns(), subnet.network());
    // Its presence has half a minute to live: only a refresh, under a new token, makes the time left grow.
    let key = format!("/coreos.com/network/hosts/{}", hosts[0].ip());
    let record: serde_json::Value = serde_json::from_str(&server.etcdctl(&["get", "-w", "json", &key])).unwrap();
    let lease = format!("{:x}", record["kvs"][0]["lease"].as_i64().unwrap());
    let left = || {
        let told = server.etcdctl(&["lease", "timetolive", &lease, "-w", "json"]);
        serde_json::from_str::<serde_json::Value>(&told).unwrap()["ttl"]
            .as_i64()
            .unwrap()
    };
    let mut least = left();
    wait_until(PATIENCE, "the presence to be refreshed", || {
        let now = left();
        let grown = now > least;
        least = now;
        grown
    })
    .unwrap();
    assert!(!first.log().contains("secret-of-flannel"));
}

#[test]
fn peers_of_another_backend_and_broken_leases_are_skipped_with_one_warning_each() {
    let (overlay, server) = overlay("skip", 2);
    let put = |subnet: &str, value: &str| {
        server.etcdctl(&["put", &format!("/coreos.com/network/subnets/{subnet}"), value]);
    };
    let vxlan =
        r#"{"PublicIP":"192.168.77.250","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"d2:72:c5:90:ff:8c"}}"#;
    put("10.5.250.0-24", vxlan);
    put("10.5.251.0-24", "{broken");
    put("10.5.300.0-24", "{}");
    put("10.5.252.0-24", r#"{"PublicIP":"not an address"}"#);
    put("10.5.253.0-24", r#"{"PublicIP":"192.168.77.253","PublicIPv6":null}"#);
    for daemon in &overlay.daemons {
        daemon.wait_for_log("peer 10.5.253.0/24 at 192.168.77.253");
        let log = daemon.log();
        for part in ["backend is vxlan", "10.5.251.0-24", "10.5.300.0-24", "10.5.252.0-24"] {
            assert_eq!(
                log.lines().filter(|line| line.contains(part)).count(),
                1,
                "{part}: {log}"
            );
        }
    }
    overlay.assert_all_reach_all();
}

#[test]
fn a_daemon_among_ten_thousand_leases_is_ready_in_seconds() {
    let mut lab = new_lab("scale");
    let server = EtcdServer::start_with(EtcdOptions::on_switch(&lab));
    server.etcdctl(&["put", "/coreos.com/network/config", r#"{"Network":"10.0.0.0/8"}"#]);
    let lease = |number: u32| {
        let [_, _, high, low] = number.to_be_bytes();
        let subnet = format!("10.{high}.{low}.0/24").parse().unwrap();
        (subnet, format!(r#"{{"PublicIP":"172.16.{high}.{low}"}}"#))
    };
    put_leases(&lab, &server, (256..10_256).map(lease));
    let host = lab.host("h1").unwrap();
    let mut daemon = Daemon::new(&lab, &host, &Registry::etcd(&server.url()));
    let begun = Instant::now();
    daemon.start_and_wait();
    assert!(begun.elapsed() < PATIENCE);
    daemon.wait_for_log("10000 peer(s)");
}
