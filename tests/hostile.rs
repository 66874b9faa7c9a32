//! What may stand in etcd besides good leases, under traffic: real daemons on a real etcd into which somebody writes all that
//! leads astray, fills memory and floods logs. Needs root.

mod lab;

use std::time::Instant;

use flannel::{
    lab::{HostOptions, wait_until},
    registry::LONGEST_VALUE,
};
use lab::{
    Daemon, Overlay, PATIENCE, assert_reaches,
    etcd::{EtcdOptions, EtcdServer},
    flow::Flows,
    new_lab,
    pour::{PREFIX, pour},
    programmed::{Programmed, mac},
    vitals::{Drops, Vitals, assert_accounted},
};

/// How much memory a daemon of the debug build may take when it is given all of this; some 25 MiB without.
const MEMORY_KIB: u64 = 120 << 10;

/// How many lines of complaint there may be for each minute, of the leases and of the backend, and what was said before.
const LINES_A_MINUTE: usize = 2 * 21;

/// A lease's value with this PublicIP, of a backend as in the configuration.
fn value(backend: &str, public_ip: &str, data: &str) -> String {
    match backend {
        "udp" => format!(r#"{{"PublicIP":"{public_ip}","PublicIPv6":null}}"#),
        _ => {
            format!(r#"{{"PublicIP":"{public_ip}","PublicIPv6":null,"BackendType":"{backend}","BackendData":{data}}}"#)
        }
    }
}

/// Records that must harm nobody, each with what must be said of it. `own` is the first host's subnet, `good` another host's.
fn hostile(backend: &str, own: &str, good: &str) -> Vec<(String, String, String)> {
    const VTEP: &str = r#"{"VNI":1,"VtepMAC":"02:00:00:00:00:66"}"#;
    let good_value = || value(backend, "192.168.77.66", VTEP);
    let third = |subnet: &str| subnet.split('.').nth(2).unwrap().parse::<u8>().unwrap();
    let part = |subnet: &str, last: u8, length: u8| format!("10.5.{}.{last}-{length}", third(subnet));
    let said = |subnet: &str, what: &str| format!("{}: {what}", subnet.replace('-', "/"));
    let at = |subnet: &str, what: &str| format!("{} at 192.168.77.66: {what}", subnet.replace('-', "/"));
    let mut all = Vec::new();
    // Subnets.
    for (key, what) in [
        (part(own, 0, 25), "it claims addresses of this host's own subnet"),
        (part(own, 77, 32), "it claims addresses of this host's own subnet"),
        (part(good, 0, 25), "it claims addresses of"),
        (part(good, 128, 26), "it claims addresses of"),
        ("10.6.1.0-24".to_owned(), "it is not in the network 10.5.0.0/16"),
        ("0.0.0.0-0".to_owned(), "it is not in the network 10.5.0.0/16"),
        (
            "10.5.0.0-16".to_owned(),
            "it claims addresses of this host's own subnet",
        ),
    ] {
        all.push((format!("subnets/{key}"), good_value(), at(&key, what)));
    }
    // PublicIPs. No host of the lab is given a subnet so high by chance: they come from the first hundred.
    for (number, (public_ip, what)) in (230..).zip([
        ("0.0.0.0", "its PublicIP 0.0.0.0 is no host's address"),
        ("255.255.255.255", "its PublicIP 255.255.255.255 stands for all hosts"),
        (
            "192.168.77.255",
            "its PublicIP 192.168.77.255 stands for all hosts of 192.168.77.0/24",
        ),
        ("239.1.2.3", "its PublicIP 239.1.2.3 stands for a group"),
        ("127.0.0.1", "its PublicIP 127.0.0.1 is a loopback address"),
        ("10.5.235.1", "its PublicIP 10.5.235.1 is in"),
    ]) {
        let key = format!("10.5.{number}.0-24");
        all.push((
            format!("subnets/{key}"),
            value(backend, public_ip, VTEP),
            said(&key, what),
        ));
    }
    let inside = format!("10.5.{}.66", third(good));
    all.push((
        "subnets/10.5.236.0-24".to_owned(),
        value(backend, &inside, VTEP),
        format!("10.5.236.0/24: its PublicIP {inside} is in"),
    ));
    // Values and keys.
    let deep = format!(
        r#"{{"PublicIP":"192.168.77.66","BackendData":{}1{}}}"#,
        "[".repeat(900),
        "]".repeat(900)
    );
    all.push((
        "subnets/10.5.245.0-24".to_owned(),
        deep,
        r#""subnets/10.5.245.0-24" cannot be used"#.to_owned(),
    ));
    all.push((
        "subnets/10.5.246.0-24".to_owned(),
        "x".repeat(1_400_000),
        "(1400000 bytes".to_owned(),
    ));
    all.push((
        "subnets/10.5.247.0-24".to_owned(),
        r#"{"PublicIP":["192.168.77.66"]}"#.to_owned(),
        "its PublicIP is".to_owned(),
    ));
    all.push((
        format!("subnets/10.5.248.0-24{}", "9".repeat(100_000)),
        good_value(),
        "is not a subnet key".to_owned(),
    ));
    all
}

/// What must be said of the peers that only `vxlan` can judge.
fn hostile_vxlan(own_mac: &str) -> Vec<(String, String, String)> {
    let no_device = |mac: &str| format!("its VtepMAC is {mac}, which is no device's address");
    let data = [
        (
            format!(r#"{{"VNI":1,"VtepMAC":"{own_mac}"}}"#),
            format!("its VtepMAC {own_mac} is that of this host's device"),
        ),
        (
            r#"{"VNI":1,"VtepMAC":"00:00:00:00:00:00"}"#.to_owned(),
            no_device(r#""00:00:00:00:00:00""#),
        ),
        (
            r#"{"VNI":1,"VtepMAC":"01:00:5e:00:00:01"}"#.to_owned(),
            no_device(r#""01:00:5e:00:00:01""#),
        ),
        (
            r#"{"VNI":1,"VtepMAC":"ff:ff:ff:ff:ff:ff"}"#.to_owned(),
            no_device(r#""ff:ff:ff:ff:ff:ff""#),
        ),
        (
            r#"{"VNI":2,"VtepMAC":"02:00:00:00:00:67"}"#.to_owned(),
            "its VNI is 2".to_owned(),
        ),
        (r#"{"VNI":1}"#.to_owned(), "its lease has no VtepMAC".to_owned()),
        (r#"[[],{}]"#.to_owned(), "its lease has no VtepMAC".to_owned()),
        (r#"{"VNI":1,"VtepMAC":{"a":7}}"#.to_owned(), no_device(r#"{"a":7}"#)),
    ];
    (210..)
        .zip(data)
        .map(|(third, (data, what))| {
            let said = format!("10.5.{third}.0/24 at 192.168.77.66: {what}");
            (
                format!("subnets/10.5.{third}.0-24"),
                value("vxlan", "192.168.77.66", &data),
                said,
            )
        })
        .collect()
}

/// Waits until somebody says of the claim to the first host's MAC whose it is.
fn assert_keeps_its_mac(daemon: &Daemon, own_mac: &str, own: &str) {
    let line = daemon.wait_for_log(&format!(
        "10.5.210.0/24 at 192.168.77.66: its VtepMAC {own_mac} is that of {own}"
    ));
    assert!(line.contains("the older"), "{line}");
}

/// Writes the leases of these subnets again as they are, on their etcd leases, as the original does at each renewal.
fn renew(server: &EtcdServer, subnets: &[String]) {
    for subnet in subnets {
        let key = format!("{PREFIX}/subnets/{}", subnet.replace('/', "-"));
        let value = server.etcdctl(&["get", "--print-value-only", &key]);
        server.etcdctl(&["put", "--ignore-lease", &key, value.trim_end()]);
    }
}

/// Whether the daemon of this host serves the peer with this subnet.
fn serves(overlay: &Overlay, host: usize, subnet: &str) -> bool {
    let peers = overlay.daemons[host].status().peers;
    peers.iter().any(|peer| peer.subnet == subnet)
}

fn warnings(daemon: &Daemon) -> usize {
    daemon.log().lines().filter(|line| line.contains("WARN")).count()
}

/// Pours all of it over two hosts that have traffic, lets a third one start into it, and cleans up.
fn hostile_data_harms_nobody(name: &str, backend: &str, junk: usize) {
    let config = format!(r#"{{"Network":"10.5.0.0/16","Backend":{{"Type":"{backend}"}}}}"#);
    let lab = new_lab(name);
    let server = EtcdServer::start_with(EtcdOptions {
        // Thousands of writes need no disk.
        arguments: vec!["--unsafe-no-fsync".to_owned()],
        ..EtcdOptions::on_switch(&lab)
    });
    let registry = lab::Registry::etcd(&server.url());
    let two = vec![(HostOptions::default(), &[][..]); 2];
    let mut overlay = Overlay::start_hosts(lab, registry, &config, &two);
    overlay.assert_all_reach_all();
    let device = "flannel.1";
    let before = Programmed::of(overlay.hosts[0].ns(), device);
    let at_first = overlay
        .daemons
        .iter_mut()
        .map(Vitals::of)
        .max_by_key(|vitals| vitals.peak)
        .unwrap();
    let drops = Drops::so_far(&overlay, &[0, 1]);
    let flows = Flows::start(&overlay.containers[0], &overlay.containers[1]);
    let begun = Instant::now();

    let [own, good] = [0, 1].map(|host| overlay.subnet(host).to_string());
    let mut records = hostile(backend, &own, &good);
    if backend == "vxlan" {
        records.extend(hostile_vxlan(&mac(overlay.hosts[0].ns(), device)));
    }
    let full = |key: &str| format!("{PREFIX}/{key}");
    pour(
        &overlay.lab,
        &server,
        records.iter().map(|(key, value, _)| (full(key), value.clone())),
    );
    for (_, _, said) in &records {
        overlay.daemons[0].wait_for_log(said);
    }
    let named = begun.elapsed();
    renew(&server, &[own.clone(), good.clone()]);

    // Keys that are no text, more than a megabyte each in forty values, and junk without end.
    let no_text = (0..8u8).map(|byte| {
        (
            [full("subnets/").as_bytes(), &[0xff, 0xfe, byte]].concat(),
            b"junk".to_vec(),
        )
    });
    pour(&overlay.lab, &server, no_text);
    let huge = (0..40).map(|number| (full(&format!("subnets/huge{number:02}")), vec![b'{'; 1_400_000]));
    pour(&overlay.lab, &server, huge);
    // As long as is taken without being cut, or short.
    let filling = "x".repeat(LONGEST_VALUE - 40);
    let junk = (0..junk).map(|number| {
        let (place, filling) = if number % 2 == 0 {
            ("subnets", &filling[..])
        } else {
            ("hosts", "")
        };
        let value = format!(r#"{{"PublicIP":7,"Filling":"{filling}"}}"#);
        (full(&format!("{place}/junk{number:06}")), value)
    });
    pour(&overlay.lab, &server, junk);
    // What comes behind all that has been seen when this is.
    pour(
        &overlay.lab,
        &server,
        std::iter::once((
            full("subnets/10.5.229.0-24"),
            value(backend, "192.168.77.229", r#"{"VNI":1,"VtepMAC":"02:00:00:00:00:e5"}"#),
        )),
    );
    for daemon in &overlay.daemons {
        daemon.wait_for_log("peer 10.5.229.0/24 at 192.168.77.229");
        daemon.wait_for_log("more records among the leases cannot be used");
    }

    // Who starts into it finds its way, and the others find it.
    let host = overlay.lab.host("h3").unwrap();
    let mut newcomer = Daemon::new(&overlay.lab, &host, &overlay.registry);
    let started = Instant::now();
    newcomer.start();
    overlay.hosts.push(host);
    overlay.daemons.push(newcomer);
    let subnet = overlay.daemons[2].wait_ready();
    let ready = started.elapsed();
    // A packet of the newcomer's that comes before the news of it would be an unknown peer's.
    for host in 0..2 {
        let what = format!("h{} to serve the newcomer", host + 1);
        let subnet = subnet.subnet.trunc().to_string();
        wait_until(PATIENCE, &what, || serves(&overlay, host, &subnet)).unwrap();
    }
    let container = overlay.hosts[2].add_container("c3", subnet).unwrap();
    for other in &overlay.containers {
        assert_reaches(&container.ns, other.ip);
    }
    let report = flows.finish();
    assert_accounted(name, &report, &Drops::so_far(&overlay, &[0, 1]).since(&drops));
    if backend == "vxlan" {
        let own_mac = mac(overlay.hosts[0].ns(), device);
        for other in &overlay.daemons[1..] {
            assert_keeps_its_mac(other, &own_mac, &own);
        }
        let entry = format!("{own_mac} dst {} self permanent", overlay.hosts[0].ip());
        for host in &overlay.hosts[1..] {
            let forwarding = Programmed::of(host.ns(), device).forwarding;
            assert!(forwarding.contains(&entry), "{forwarding:?} lacks {entry:?}");
        }
    }

    let minutes = begun.elapsed().as_secs() as usize / 60 + 1;
    for daemon in &mut overlay.daemons {
        let vitals = Vitals::of(daemon);
        let lines = warnings(daemon);
        println!(
            "{name}: all kinds named after {named:?}; a newcomer was ready after {ready:?}; memory {} KiB at most, {} before; {lines} \
             warnings",
            vitals.peak, at_first.peak
        );
        assert!(vitals.peak < MEMORY_KIB, "{vitals:?}");
        assert!(
            lines <= records.len() + minutes * LINES_A_MINUTE,
            "{lines}: {}",
            daemon.log()
        );
        for good in [&own, &good] {
            assert!(
                !daemon.log().contains(&format!("skipping peer {good}")),
                "{}",
                daemon.log()
            );
        }
        daemon.assert_running();
    }

    // Nothing of it has come into the kernel, but the one that was good.
    if backend != "udp" {
        let now = Programmed::of(overlay.hosts[0].ns(), device);
        let new: Vec<&String> = now.routes.difference(&before.routes).collect();
        let expected = [subnet.subnet.trunc().to_string(), "10.5.229.0/24".to_owned()];
        assert_eq!(new.len(), expected.len(), "{new:?}");
        for route in new {
            assert!(expected.iter().any(|subnet| route.starts_with(subnet)), "{route}");
        }
        assert!(before.routes.is_subset(&now.routes), "{now:?}");
    }
}

#[test]
fn hostile_data_harms_no_udp_host() {
    hostile_data_harms_nobody("hostile_udp", "udp", 100_000);
}

#[test]
fn hostile_data_harms_no_vxlan_host() {
    hostile_data_harms_nobody("hostile_vxlan", "vxlan", 20_000);
}

#[test]
fn hostile_data_harms_no_host_gw_host() {
    hostile_data_harms_nobody("hostile_gw", "host-gw", 20_000);
}
