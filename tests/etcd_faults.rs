//! What happens to etcd, and between a host and etcd, done to real daemons under traffic: 1,000 datagrams a second, none of which
//! may be lost where it need not be, and a TCP connection. Needs root.
//!
//! `FLANNEL_TEST_OUTAGE` is how many seconds all members of etcd are down, 20 by default; 600 is the long form.

mod lab;

use flannel::lab::{CONTAINER_BRIDGE, Host, HostOptions, LabError, wait_for, wait_until};
use lab::{
    CONFIG, Daemon, Overlay, PATIENCE, Registry, assert_loses, assert_reaches,
    certificates::{Authority, IssuedFiles},
    etcd::{EtcdOptions, EtcdServer},
    flow::Flows,
    http_get, inside, new_lab,
    proxy::Proxy,
};
use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    sync::mpsc,
    time::{Duration, Instant},
};

const PREFIX: &str = "/coreos.com/network";

const HEALTH: &str = "127.0.0.1:8471";
const HEALTH_FLAGS: &[&str] = &["--healthz-ip=127.0.0.1", "--healthz-port=8471"];

/// A call to a server that takes 5 s for each answer may be answered only at the third try, and a start makes a dozen.
const SLOW_PATIENCE: Duration = Duration::from_secs(240);

fn outage() -> Duration {
    let seconds = std::env::var("FLANNEL_TEST_OUTAGE").map_or(20, |seconds| seconds.parse().unwrap());
    Duration::from_secs(seconds)
}

/// `count` hosts with a health port.
fn plain(count: usize) -> Vec<(HostOptions, &'static [&'static str])> {
    vec![(HostOptions::default(), HEALTH_FLAGS); count]
}

/// The key of a lease.
fn key(subnet: impl ToString) -> String {
    format!("{PREFIX}/subnets/{}", subnet.to_string().replace('/', "-"))
}

/// Writes the lease of a host that is not there, and waits until each daemon knows of it: its watch works.
fn assert_changes_are_seen<'a>(
    server: &EtcdServer,
    number: u8,
    daemons: impl IntoIterator<Item = &'a Daemon>,
    patience: Duration,
) {
    let (subnet, host) = (format!("10.5.{number}.0/24"), format!("192.168.77.{number}"));
    let value = format!(r#"{{"PublicIP":"{host}","PublicIPv6":null}}"#);
    wait_until(patience, "etcd to take a change", || {
        server.try_etcdctl(&["put", &key(&subnet), &value]).is_ok()
    })
    .unwrap();
    for daemon in daemons {
        let told = || daemon.log().contains(&format!("peer {subnet} at {host}"));
        wait_until(patience, &format!("all to learn of {subnet}"), told).unwrap();
    }
}

/// The etcd lease that the key is bound to; 0: none, and `None` where the key is not there.
fn etcd_lease(server: &EtcdServer, key: &str) -> Option<i64> {
    let answer: serde_json::Value = serde_json::from_str(&server.etcdctl(&["get", "-w", "json", key])).unwrap();
    let record = answer["kvs"].as_array()?.first()?.clone();
    Some(record["lease"].as_i64().unwrap_or(0))
}

fn value(server: &EtcdServer, key: &str) -> String {
    server.etcdctl(&["get", "--print-value-only", key]).trim().to_owned()
}

fn plain_value(host: &Host) -> String {
    format!(r#"{{"PublicIP":"{}","PublicIPv6":null}}"#, host.ip())
}

fn health(host: &Host, path: &str) -> (u16, String) {
    http_get(host.ns(), HEALTH.parse::<SocketAddr>().unwrap(), path).unwrap()
}

/// Lets what the host sends to etcd vanish, and only that: a neighbour that is not there.
fn cut_off(host: &Host, etcd: Ipv4Addr) {
    host.ns()
        .ip(&format!(
            "neigh replace {etcd} lladdr 02:00:00:00:00:01 dev eth0 nud permanent"
        ))
        .unwrap();
}

fn mend(host: &Host, etcd: Ipv4Addr) {
    host.ns().ip(&format!("neigh del {etcd} dev eth0")).unwrap();
}

/// No daemon has given up a peer, nor complained of its own lease.
fn assert_no_peer_was_lost(overlay: &Overlay) {
    for (index, daemon) in overlay.daemons.iter().enumerate() {
        let log = daemon.log();
        for other in 0..overlay.daemons.len() {
            assert!(
                other == index || !log.contains(&format!("peer {} is gone", overlay.subnet(other))),
                "{log}"
            );
        }
    }
}

// Members that fail.

/// The server that leads the cluster, once all agree on it, and the members' identifiers.
fn leader(servers: &[EtcdServer]) -> (usize, Vec<u64>) {
    let status = |server: &EtcdServer| -> Option<(u64, u64)> {
        let told = server.try_etcdctl(&["endpoint", "status", "-w", "json"]).ok()?;
        let told: serde_json::Value = serde_json::from_str(&told).ok()?;
        let status = &told[0]["Status"];
        Some((status["header"]["member_id"].as_u64()?, status["leader"].as_u64()?))
    };
    wait_for(PATIENCE, "the cluster to have a leader", || {
        let Some(told) = servers.iter().map(status).collect::<Option<Vec<_>>>() else {
            return Ok::<_, LabError>(None);
        };
        let leads = told[0].1;
        let agreed = told.iter().all(|(_, other)| *other == leads);
        let ids: Vec<u64> = told.iter().map(|(id, _)| *id).collect();
        let number = ids.iter().position(|id| *id == leads);
        Ok(number.filter(|_| agreed).map(|number| (number, ids)))
    })
    .unwrap()
}

#[test]
fn a_cluster_that_loses_members_and_leaders_costs_no_packet_and_no_lease() {
    let lab = new_lab("ef_cluster");
    let options = (0..3).map(|number| EtcdOptions {
        port: 2379 + 2 * number,
        ..EtcdOptions::on_switch(&lab)
    });
    let mut servers = EtcdServer::start_cluster_of(options.collect());
    let urls: Vec<String> = servers.iter().map(EtcdServer::url).collect();
    let overlay = Overlay::start_hosts(lab, Registry::etcd(&urls.join(",")), CONFIG, &plain(2));
    overlay.assert_all_reach_all();
    let leases: Vec<_> = (0..2)
        .map(|host| etcd_lease(&servers[0], &key(overlay.subnet(host))))
        .collect();
    let flows = Flows::start(&overlay.containers[0], &overlay.containers[1]);

    for number in 0..3 {
        servers[number].kill();
        let other = (number + 1) % 3;
        assert_changes_are_seen(&servers[other], 200 + number as u8, &overlay.daemons, PATIENCE);
        servers[number].restart();
    }
    for number in 0..3 {
        let (leads, ids) = leader(&servers);
        let next = (leads + 1) % 3;
        wait_until(PATIENCE, "the leader to hand over", || {
            servers[leads]
                .try_etcdctl(&["move-leader", &format!("{:x}", ids[next])])
                .is_ok()
        })
        .unwrap();
        assert_changes_are_seen(&servers[leads], 210 + number, &overlay.daemons, PATIENCE);
    }
    let (leads, _) = leader(&servers);
    servers[leads].kill();
    assert_changes_are_seen(&servers[(leads + 1) % 3], 220, &overlay.daemons, 2 * PATIENCE);

    // All are down.
    servers.iter_mut().for_each(EtcdServer::kill);
    for daemon in &overlay.daemons {
        wait_until(PATIENCE, "the outage to be seen", || {
            !daemon.status().registry.connected
        })
        .unwrap();
    }
    std::thread::sleep(outage());
    let told = overlay.daemons[0].status();
    assert!(told.ready && told.registry.trouble.is_some(), "{told:?}");
    assert!(
        told.registry.seconds_since_answer.unwrap() >= outage().as_secs(),
        "{told:?}"
    );
    EtcdServer::restart_cluster(&mut servers);
    assert_changes_are_seen(&servers[0], 230, &overlay.daemons, 2 * PATIENCE);
    for (host, lease) in leases.iter().enumerate() {
        assert_eq!(
            etcd_lease(&servers[0], &key(overlay.subnet(host))),
            *lease,
            "it did not lapse"
        );
    }
    assert_no_peer_was_lost(&overlay);
    flows.finish_without_loss();
}

// A start without etcd.

#[test]
fn a_daemon_that_starts_while_etcd_is_down_serves_from_what_it_knew() {
    let lab = new_lab("ef_start");
    let mut server = EtcdServer::start_with(EtcdOptions::on_switch(&lab));
    let mut overlay = Overlay::start_hosts(lab, Registry::etcd(&server.url()), CONFIG, &plain(3));
    overlay.assert_all_reach_all();
    let (subnet, claim) = (overlay.subnet(0), format!("{PREFIX}/hosts/{}", overlay.hosts[0].ip()));
    let (lease, claimed) = (etcd_lease(&server, &key(subnet)), value(&server, &claim));
    overlay.daemons[0].wait_until_remembered(2);
    server.kill();
    // The second is of hosts that nothing happens to.
    let restarted = Flows::start(&overlay.containers[0], &overlay.containers[1]);
    let others = Flows::start(&overlay.containers[1], &overlay.containers[2]);

    for kill in [true, false, true] {
        if kill {
            overlay.daemons[0].kill9();
        } else {
            assert!(overlay.daemons[0].stop().success());
        }
        let begun = Instant::now();
        assert_eq!(overlay.daemons[0].start_and_wait().subnet.trunc(), subnet);
        println!("serves {:?} after its start", begun.elapsed());
        overlay.assert_all_reach_all();
    }
    let host = &overlay.hosts[0];
    let log = overlay.daemons[0].log();
    assert!(
        log.contains("started from the leases as they were") && log.contains("2 peers"),
        "{log}"
    );
    let (code, text) = health(host, "/readyz?verbose");
    assert_eq!(code, 200);
    assert!(
        text.starts_with("ok, but degraded: started from the leases") && text.contains("[-] registry not there"),
        "{text}"
    );
    let told = overlay.daemons[0].status();
    assert!(
        told.ready && told.degraded.is_some() && told.peers.len() == 2,
        "{told:?}"
    );
    assert!(health(host, "/metrics").1.contains("\nflannel_degraded 1.0\n"));
    let file = format!("--subnet-file={}", overlay.daemons[0].subnet_file().display());
    let doctor = overlay.registry.try_flanneld(host.ns(), &["doctor", &file]);
    let said = String::from_utf8_lossy(&doctor.stdout).into_owned();
    assert!(said.contains("is ready, but started from the leases"), "{said}");

    server.restart();
    overlay.daemons[0].wait_for_log("the registry answers: configuration and lease are as they were remembered");
    assert_eq!(health(host, "/readyz"), (200, "ok\n".to_owned()));
    assert!(health(host, "/metrics").1.contains("\nflannel_degraded 0.0\n"));
    assert_changes_are_seen(&server, 250, &overlay.daemons, PATIENCE);
    assert_eq!(etcd_lease(&server, &key(subnet)), lease, "it is the same still");
    wait_until(PATIENCE, "the PublicIP to be claimed anew", || {
        let now = value(&server, &claim);
        !now.is_empty() && now != claimed
    })
    .unwrap();
    assert_no_peer_was_lost(&overlay);
    let lost = restarted.finish();
    println!(
        "lost {} of {} datagrams over three restarts",
        lost.lost.len(),
        lost.sent
    );
    others.finish_without_loss();
}

#[test]
fn a_start_without_etcd_waits_where_what_is_remembered_is_of_no_use() {
    let lab = new_lab("ef_useless");
    let mut server = EtcdServer::start_with(EtcdOptions::on_switch(&lab));
    let mut overlay = Overlay::start_hosts(lab, Registry::etcd(&server.url()), CONFIG, &plain(1));
    let daemon = &mut overlay.daemons[0];
    let before = daemon.subnet();
    daemon.wait_until_remembered(0);
    let good = fs::read_to_string(daemon.state_file()).unwrap();
    assert!(daemon.stop().success());
    server.kill();
    let mut expired: serde_json::Value = serde_json::from_str(&good).unwrap();
    expired["Left"] = 1.into();
    let elsewhere = good.replace("192.168.77.254", "192.168.77.253");
    for (text, why) in [
        (&good[..good.len() / 2], "is not what this flanneld writes"),
        ("", "is not what this flanneld writes"),
        (&elsewhere, "http://192.168.77.253:2379, and not of"),
        (&expired.to_string(), "has run out, so that another host may have it"),
    ] {
        fs::write(daemon.state_file(), text).unwrap();
        daemon.start();
        daemon.wait_for_log(why);
        daemon.wait_for_log("reading the network's configuration failed");
        assert_eq!(health(&overlay.hosts[0], "/readyz").0, 503);
        daemon.kill9();
    }
    // Its device has gone, so that it cannot be in use; what is not this host's any more is no use either.
    fs::write(daemon.state_file(), good).unwrap();
    let mut renumbered = Daemon::named("renumbered", &overlay.lab, &overlay.hosts[0], &overlay.registry)
        .with(format!("--state-file={}", daemon.state_file().display()))
        .with("--public-ip=192.0.2.77");
    renumbered.start();
    renumbered.wait_for_log("claiming this host's PublicIP failed");
    renumbered.kill9();

    daemon.start();
    daemon.wait_ready();
    server.restart();
    daemon.wait_for_log("the registry answers");
    assert_eq!(daemon.subnet(), before);
}

#[test]
fn a_configuration_that_was_changed_while_the_host_was_cut_off_ends_a_daemon_that_began_with_the_old_one() {
    let lab = new_lab("ef_reconf");
    let server = EtcdServer::start_with(EtcdOptions::on_switch(&lab));
    let mut overlay = Overlay::start_hosts(lab, Registry::etcd(&server.url()), CONFIG, &plain(1));
    let etcd = "192.168.77.254".parse().unwrap();
    let daemon = &mut overlay.daemons[0];
    daemon.wait_until_remembered(0);
    daemon.kill9();
    cut_off(&overlay.hosts[0], etcd);
    server.etcdctl(&["put", &format!("{PREFIX}/config"), r#"{"Network":"10.9.0.0/16"}"#]);
    assert!(daemon.start_and_wait().subnet.to_string().starts_with("10.5."));
    mend(&overlay.hosts[0], etcd);
    assert_eq!(
        daemon.wait_exit_within(2 * PATIENCE).code(),
        Some(1),
        "a supervisor restarts it"
    );
    assert!(daemon.log().contains("configuration was changed"), "{}", daemon.log());
    assert!(daemon.start_and_wait().subnet.to_string().starts_with("10.9."));
}

#[test]
fn a_daemon_that_began_without_etcd_takes_its_lease_again_if_it_can_and_ends_if_another_host_has_it() {
    let (mut overlay, server) = Overlay::start_on_etcd("ef_began", CONFIG, 2);
    let (etcd, subnet) = ("192.168.77.254".parse().unwrap(), overlay.subnet(0));
    let right = plain_value(&overlay.hosts[0]);
    overlay.daemons[0].wait_until_remembered(1);
    let anothers = r#"{"PublicIP":"192.168.77.99","PublicIPv6":null}"#;
    for taken in [false, true] {
        overlay.daemons[0].kill9();
        cut_off(&overlay.hosts[0], etcd);
        server.etcdctl(&["del", &key(subnet)]);
        if taken {
            server.etcdctl(&["put", &key(subnet), anothers]);
        }
        assert_eq!(overlay.daemons[0].start_and_wait().subnet.trunc(), subnet);
        overlay.daemons[0].wait_for_log("started from the leases as they were");
        mend(&overlay.hosts[0], etcd);
        if taken {
            assert_eq!(overlay.daemons[0].wait_exit_within(2 * PATIENCE).code(), Some(1));
            let log = overlay.daemons[0].log();
            assert!(log.contains("belongs to PublicIP 192.168.77.99"), "{log}");
            assert_eq!(value(&server, &key(subnet)), anothers);
        } else {
            wait_until(2 * PATIENCE, "the lease to be made again", || {
                value(&server, &key(subnet)) == right
            })
            .unwrap();
            overlay.assert_all_reach_all();
            overlay.daemons[0].assert_running();
        }
    }
}

#[test]
fn a_daemon_that_starts_while_etcd_takes_no_records_serves_from_what_it_knew() {
    let lab = new_lab("ef_full");
    let server = EtcdServer::start_with(EtcdOptions {
        arguments: vec!["--quota-backend-bytes=4000000".to_owned()],
        ..EtcdOptions::on_switch(&lab)
    });
    let mut overlay = Overlay::start_hosts(lab, Registry::etcd(&server.url()), CONFIG, &plain(2));
    overlay.assert_all_reach_all();
    let (own, right) = (overlay.subnet(0), plain_value(&overlay.hosts[0]));
    let claim = format!("{PREFIX}/hosts/{}", overlay.hosts[0].ip());
    overlay.daemons[0].wait_until_remembered(1);
    // As long as one argument may be.
    let filler = "x".repeat(100_000);
    wait_until(PATIENCE, "etcd to be full", || {
        server.try_etcdctl(&["put", "/filler", &filler]).is_err()
    })
    .unwrap();
    assert!(server.etcdctl(&["alarm", "list"]).contains("NOSPACE"));

    overlay.daemons[0].kill9();
    assert_eq!(overlay.daemons[0].start_and_wait().subnet.trunc(), own);
    overlay.daemons[0].wait_for_log("did not take this host's claim or lease");
    overlay.assert_all_reach_all();
    // There is no room for it; that of the killed one may still be there.
    let of_this_process = format!("flanneld-{}-", overlay.daemons[0].process().pid());
    assert!(!value(&server, &claim).contains(&of_this_process));
    // What others delete is seen, also by a host whose own lease cannot be made again.
    server.etcdctl(&["del", &key(own)]);
    overlay.daemons[1].wait_for_log(&format!("peer {own} is gone"));
    overlay.daemons[0].wait_for_log("putting this host's lease right failed");
    let other = overlay.subnet(1);
    let others = value(&server, &key(other));
    server.etcdctl(&["del", &key(other)]);
    overlay.daemons[0].wait_for_log(&format!("peer {other} is gone"));

    server.etcdctl(&["del", "/filler"]);
    let status: serde_json::Value =
        serde_json::from_str(&server.etcdctl(&["endpoint", "status", "-w", "json"])).unwrap();
    let revision = status[0]["Status"]["header"]["revision"].to_string();
    server.etcdctl(&["compact", "--physical", &revision]);
    server.etcdctl(&["defrag"]);
    server.etcdctl(&["alarm", "disarm"]);
    for (subnet, right) in [(own, &right), (other, &others)] {
        wait_until(PATIENCE, "the lease to be made again", || {
            value(&server, &key(subnet)) == *right
        })
        .unwrap();
    }
    wait_until(PATIENCE, "the PublicIP to be claimed", || {
        value(&server, &claim).contains(&of_this_process)
    })
    .unwrap();
    overlay.assert_all_reach_all();
    overlay.daemons.iter_mut().for_each(Daemon::assert_running);
}

// Data that is gone or wrong.

#[test]
fn an_etcd_that_has_lost_its_data_gets_the_leases_again_and_no_packet_is_lost() {
    let lab = new_lab("ef_wiped");
    let mut server = EtcdServer::start_with(EtcdOptions::on_switch(&lab));
    let mut overlay = Overlay::start_hosts(lab, Registry::etcd(&server.url()), CONFIG, &plain(3));
    overlay.assert_all_reach_all();
    let flows = Flows::start(&overlay.containers[0], &overlay.containers[1]);
    let subnets: Vec<_> = (0..3).map(|host| overlay.subnet(host)).collect();

    server.restart_empty();
    for (host, subnet) in overlay.hosts.iter().zip(&subnets) {
        wait_until(PATIENCE, "the lease to be made again", || {
            value(&server, &key(subnet)) == plain_value(host)
        })
        .unwrap();
        assert_ne!(etcd_lease(&server, &key(subnet)), Some(0), "it expires as before");
    }
    assert_changes_are_seen(&server, 250, &overlay.daemons, PATIENCE);
    // The configuration is the operator's to write again. A daemon that starts waits for it; the others need it no more.
    let third = &mut overlay.daemons[2];
    assert!(third.stop().success());
    third.start();
    third.wait_for_log("no network configuration");
    server.etcdctl(&["put", &format!("{PREFIX}/config"), CONFIG]);
    assert_eq!(third.wait_ready().subnet.trunc(), subnets[2]);
    overlay.assert_all_reach_all();
    overlay.daemons.iter_mut().for_each(Daemon::assert_running);
    assert_no_peer_was_lost(&overlay);
    flows.finish_without_loss();
}

#[test]
fn this_hosts_lease_is_put_right_when_somebody_writes_over_it() {
    let (mut overlay, server) = Overlay::start_on_etcd("ef_junk", CONFIG, 2);
    overlay.assert_all_reach_all();
    let own = key(overlay.subnet(0));
    let (lease, right) = (etcd_lease(&server, &own), plain_value(&overlay.hosts[0]));
    let flows = Flows::start(&overlay.containers[0], &overlay.containers[1]);
    server.etcdctl(&["put", &own, "{broken"]);
    wait_until(PATIENCE, "the lease to be put right", || value(&server, &own) == right).unwrap();
    assert_eq!(etcd_lease(&server, &own), lease, "with the time that it had");
    overlay.daemons[0].wait_for_log("somebody has written over this host's lease");
    overlay.assert_all_reach_all();
    overlay.daemons.iter_mut().for_each(Daemon::assert_running);
    let report = flows.finish();
    println!("lost {} of {} datagrams", report.lost.len(), report.sent);
}

// Slowness.

#[test]
fn an_etcd_that_takes_five_seconds_for_each_answer_serves_all_the_same() {
    let mut lab = new_lab("ef_slow");
    let server = EtcdServer::start_with(EtcdOptions::on_switch(&lab));
    let address = "192.168.77.254:4001".parse().unwrap();
    let target = "192.168.77.254:2379".parse().unwrap();
    let line = inside(lab.switch(), || Proxy::start_thread(address, target));
    let late = lab.host("late").unwrap();
    let registry = Registry::etcd(&format!("http://{address}"));
    let mut overlay = Overlay::start_hosts(lab, registry, CONFIG, &plain(2));
    overlay.assert_all_reach_all();
    let flows = Flows::start(&overlay.containers[0], &overlay.containers[1]);
    line.delay(Duration::from_secs(5));
    assert_changes_are_seen(&server, 250, &overlay.daemons, SLOW_PATIENCE);

    let begun = Instant::now();
    let mut newcomer = Daemon::new(&overlay.lab, &late, &overlay.registry);
    newcomer.start();
    wait_until(SLOW_PATIENCE, "a start on a slow etcd", || {
        newcomer.subnet_file().exists()
    })
    .unwrap();
    println!("ready {:?} after its start", begun.elapsed());
    let subnet = newcomer.subnet().subnet;
    for (host, daemon) in overlay.hosts.iter().zip(&overlay.daemons) {
        wait_until(SLOW_PATIENCE, "all to learn of the new host", || {
            daemon.log().contains(&format!("peer {}", subnet.trunc()))
        })
        .unwrap();
        assert_reaches(host.ns(), subnet.network());
    }
    line.delay(Duration::ZERO);
    overlay.daemons.iter_mut().for_each(Daemon::assert_running);
    assert_no_peer_was_lost(&overlay);
    flows.finish_without_loss();
}

// Secrets that change.

fn path(path: &Path) -> String {
    path.display().to_string()
}

#[test]
fn certificates_that_are_rotated_on_disk_are_used_without_a_restart() {
    let lab = new_lab("ef_certs");
    let dir = lab.dir().to_owned();
    let issue = |authority: &Authority| -> (IssuedFiles, IssuedFiles) {
        let server = authority.issue("server", &["192.168.77.254".to_owned()]);
        (server, authority.issue("client", &[]))
    };
    let authority = Authority::new(&dir, "authority");
    let (server_files, client) = issue(&authority);
    let tls = [
        ("cacert", "cafile", path(&authority.file)),
        ("cert", "certfile", path(&client.certificate)),
        ("key", "keyfile", path(&client.key)),
    ];
    let mut server = EtcdServer::start_with(EtcdOptions {
        client_arguments: tls.iter().map(|(name, _, file)| format!("--{name}={file}")).collect(),
        ..EtcdOptions::on_switch(&lab).with_tls(&server_files.certificate, &server_files.key, &authority.file)
    });
    let registry = tls
        .iter()
        .fold(Registry::etcd(&server.url()), |registry, (_, name, file)| {
            registry.with(format!("--etcd-{name}={file}"))
        });
    let overlay = Overlay::start_hosts(lab, registry, CONFIG, &plain(2));
    overlay.assert_all_reach_all();
    let flows = Flows::start(&overlay.containers[0], &overlay.containers[1]);

    // Half of a rotation: the new certificate is there, its key is not.
    let old_key = fs::read(&client.key).unwrap();
    authority.issue("client", &[]);
    let new_key = fs::read(&client.key).unwrap();
    fs::write(&client.key, old_key).unwrap();
    server.restart();
    for daemon in &overlay.daemons {
        daemon.wait_for_log("using the TLS files as they were before");
        daemon.wait_for_log("watching the leases works again");
    }
    fs::write(&client.key, new_key).unwrap();
    assert_changes_are_seen(&server, 250, &overlay.daemons, PATIENCE);

    // All of it, and nothing of the old is good for anything any more.
    issue(&Authority::new(&dir, "authority"));
    server.restart();
    assert_changes_are_seen(&server, 251, &overlay.daemons, 2 * PATIENCE);
    assert_no_peer_was_lost(&overlay);
    flows.finish_without_loss();
}

#[test]
fn password_tokens_that_run_out_or_are_forgotten_cost_nothing() {
    let lab = new_lab("ef_tokens");
    let mut server = EtcdServer::start_with(EtcdOptions {
        arguments: vec!["--auth-token-ttl=2".to_owned()],
        ..EtcdOptions::on_switch(&lab)
    });
    server.etcdctl(&["user", "add", "root:secret"]);
    server.etcdctl(&["auth", "enable"]);
    server.set_client_arguments(&["--user", "root:secret"]);
    let registry = Registry::etcd(&server.url())
        .with("--etcd-username=root")
        .with("--etcd-password=secret");
    let overlay = Overlay::start_hosts(lab, registry, CONFIG, &plain(2));
    overlay.assert_all_reach_all();
    let flows = Flows::start(&overlay.containers[0], &overlay.containers[1]);
    // Only time makes a token run out. The claims are renewed each 10 s, with one that has run out five times over.
    let claim = format!("{PREFIX}/hosts/{}", overlay.hosts[0].ip());
    let claimed = etcd_lease(&server, &claim);
    std::thread::sleep(Duration::from_secs(12));
    assert_changes_are_seen(&server, 250, &overlay.daemons, PATIENCE);
    // A server that starts anew has forgotten them all.
    server.restart();
    assert_changes_are_seen(&server, 251, &overlay.daemons, PATIENCE);
    assert_eq!(etcd_lease(&server, &claim), claimed);
    assert_no_peer_was_lost(&overlay);
    flows.finish_without_loss();
}

// A lease that is lost.

/// A subnet, and for how long it is leased: long enough for a refresh each 10 s on a busy machine.
const SHORT: &str = "10.5.77.0/24";
const SHORT_TTL: &str = "20";

#[test]
fn a_host_that_was_cut_off_until_another_took_its_subnet_ends_and_takes_another() {
    let mut lab = new_lab("ef_lost");
    let server = EtcdServer::start_with(EtcdOptions::on_switch(&lab));
    let (etcd, heir) = ("192.168.77.254".parse().unwrap(), lab.host("heir").unwrap());
    // The address that the next host will have: a lease that it finds is its own, with the time that it has.
    let granted = server.etcdctl(&["lease", "grant", SHORT_TTL]);
    let lease = granted.split(' ').nth(1).unwrap();
    let first = r#"{"PublicIP":"192.168.77.2","PublicIPv6":null}"#;
    server.etcdctl(&["put", &format!("--lease={lease}"), &key(SHORT), first]);
    // The daemons may take their time on a busy machine.
    let (started, waiting) = mpsc::channel::<()>();
    let mut overlay = std::thread::scope(|scope| {
        let (server, lease) = (&server, &lease);
        scope.spawn(move || {
            while waiting.recv_timeout(Duration::from_secs(5)) == Err(mpsc::RecvTimeoutError::Timeout) {
                server.etcdctl(&["lease", "keep-alive", "--once", lease]);
            }
        });
        let overlay = Overlay::start_hosts(lab, Registry::etcd(&server.url()), CONFIG, &plain(2));
        drop(started);
        overlay
    });
    assert_eq!(overlay.subnet(0).to_string(), SHORT);
    overlay.assert_all_reach_all();
    overlay.daemons[0].wait_until_remembered(1);
    // It is renewed for as long as it can be.
    std::thread::sleep(Duration::from_secs(22));
    assert_eq!(value(&server, &key(SHORT)), first);

    cut_off(&overlay.hosts[0], etcd);
    let gone = || overlay.daemons[1].log().contains(&format!("peer {SHORT} is gone"));
    wait_until(3 * PATIENCE, "the lease to run out", gone).unwrap();
    // The others neither send to it any more nor let its packets in, whatever it does; it cannot know whether etcd is away for all.
    assert_loses(&overlay.containers[0].ns, overlay.containers[1].ip);
    overlay.daemons[0].wait_for_log("has run out by its own count");
    let told = overlay.daemons[0].status();
    assert!(
        told.degraded.as_ref().is_some_and(|why| why.contains("ran out")),
        "{told:?}"
    );

    let mut new = Daemon::new(&overlay.lab, &heir, &overlay.registry);
    fs::write(new.subnet_file(), "FLANNEL_SUBNET=10.5.77.1/24\n").unwrap();
    assert_eq!(new.start_and_wait().subnet.trunc().to_string(), SHORT);
    let mut heir = heir;
    let owner = heir.add_container("owner", new.subnet()).unwrap();
    assert_reaches(&overlay.containers[1].ns, owner.ip);
    let flows = Flows::start(&overlay.containers[1], &owner);

    mend(&overlay.hosts[0], etcd);
    let mended = Instant::now();
    assert_eq!(overlay.daemons[0].wait_exit_within(2 * PATIENCE).code(), Some(1));
    println!("noticed {:?} after the partition", mended.elapsed());
    let log = overlay.daemons[0].log();
    for part in [
        "has lost its subnet 10.5.77.0/24",
        &format!("belongs to PublicIP {}", heir.ip()),
        "Docker",
    ] {
        assert!(log.contains(part), "{part} is not in {log}");
    }
    assert!(!overlay.hosts[0].ns().ip("-br link").unwrap().contains("flannel0"));
    assert!(!overlay.daemons[0].state_file().exists(), "it is not true any more");
    // The container keeps the old addresses, and with them the bridge, until somebody starts Docker anew.
    overlay.hosts[0]
        .ns()
        .ip(&format!("link del {CONTAINER_BRIDGE}"))
        .unwrap();
    let next = overlay.daemons[0].start_and_wait().subnet.trunc();
    assert_ne!(next.to_string(), SHORT);
    overlay.daemons[0].wait_for_log(&format!("subnet is {next}, and was {SHORT} in the run before"));
    assert_reaches(&overlay.containers[1].ns, next.network());
    flows.finish_without_loss();
}

#[test]
fn a_host_whose_subnet_is_anothers_leaves_no_routes_in_the_kernel() {
    let config = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"host-gw"}}"#;
    let (mut overlay, server) = Overlay::start_on_etcd("ef_gw", config, 2);
    overlay.assert_all_reach_all();
    let (own, other) = (overlay.subnet(0), overlay.subnet(1).to_string());
    let routes = overlay.hosts[0].ns().clone();
    assert!(routes.ip("route").unwrap().contains(&other));
    let anothers = r#"{"PublicIP":"192.168.77.99","PublicIPv6":null,"BackendType":"host-gw"}"#;
    server.etcdctl(&["put", &key(own), anothers]);
    assert_eq!(overlay.daemons[0].wait_exit().code(), Some(1));
    assert!(!routes.ip("route").unwrap().contains(&other));
    assert_eq!(value(&server, &key(own)), anothers, "it is left alone");
}
