//! `flanneld status` and the health port: what people and Prometheus see of a running daemon.

mod lab;

use std::{fs, net::SocketAddr, os::unix::fs::PermissionsExt, path::PathBuf};

use flannel::{lab::wait_until, observe::status::Status};
use nix::sys::signal::Signal;

use lab::{
    CONFIG, Daemon, Overlay, PATIENCE, Registry,
    etcd::{EtcdOptions, EtcdServer},
    flanneld, http_get, new_lab, ping,
};

const HEALTH: &str = "127.0.0.1:8471";

/// The flags for it.
const HEALTH_FLAGS: [&str; 2] = ["--healthz-ip=127.0.0.1", "--healthz-port=8471"];

fn socket(daemon: &Daemon) -> PathBuf {
    daemon.subnet_file().with_extension("sock")
}

fn status_command(overlay: &Overlay, host: usize, flags: &[&str]) -> std::process::Output {
    let mut command = flanneld(overlay.hosts[host].ns());
    command.arg("status").args(flags);
    command.arg(format!(
        "-subnet-file={}",
        overlay.daemons[host].subnet_file().display()
    ));
    command.output().unwrap()
}

fn status(overlay: &Overlay, host: usize) -> Status {
    let output = status_command(overlay, host, &["--json"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The value of the metric whose line begins so.
fn metric(page: &str, start: &str) -> f64 {
    let value = page
        .lines()
        .find_map(|line| line.strip_prefix(start)?.strip_prefix(' '));
    value
        .unwrap_or_else(|| panic!("no {start} in\n{page}"))
        .parse()
        .unwrap()
}

fn no_route(status: &Status) -> u64 {
    let engine = status.backend.as_ref().unwrap().engine.as_ref().unwrap();
    engine.workers.iter().map(|worker| worker.dropped["no_route"]).sum()
}

#[test]
fn status_and_metrics_tell_what_was_carried_and_what_was_not() {
    let lab = new_lab("status");
    let registry = Registry::embedded(&lab);
    let hosts = vec![(Default::default(), &HEALTH_FLAGS[..]); 2];
    let overlay = Overlay::start_hosts(lab, registry, CONFIG, &hosts);
    overlay.assert_all_reach_all();
    let [one, two] = &overlay.containers[..] else {
        unreachable!()
    };
    let before = status(&overlay, 0);
    assert_eq!(ping(&one.ns, two.ip, 5).received, 5);
    // In the overlay, and no host's.
    assert_eq!(ping(&one.ns, [10, 5, 255, 1].into(), 1).received, 0);

    let after = status(&overlay, 0);
    assert!(after.ready && after.registry.connected, "{after:?}");
    assert_eq!(after.external.as_ref().unwrap().address, overlay.hosts[0].ip());
    let left = after.lease.as_ref().unwrap().seconds_left.unwrap();
    assert!((86_000..=86_400).contains(&left), "{left}");
    let [peer] = &after.peers[..] else {
        panic!("{:?}", after.peers)
    };
    assert_eq!(peer.public_ip, overlay.hosts[1].ip());
    let (traffic, earlier) = (peer.traffic.unwrap(), before.peers[0].traffic.unwrap());
    for (now, then) in [(traffic.sent, earlier.sent), (traffic.received, earlier.received)] {
        assert_eq!(now.packets - then.packets, 5);
        assert_eq!(
            now.bytes - then.bytes,
            5 * 84,
            "echo requests of 56 bytes, with their headers"
        );
    }
    assert!(traffic.seconds_since_received.unwrap() < PATIENCE.as_secs());
    let engine = after.backend.as_ref().unwrap().engine.as_ref().unwrap();
    assert!(engine.offloads.iter().all(|offload| offload.on), "{engine:?}");
    // Until the hosts knew of each other there may have been others.
    let no_route = no_route(&after);
    assert_eq!(no_route, self::no_route(&before) + 1);

    let address: SocketAddr = HEALTH.parse().unwrap();
    let get = |path| http_get(overlay.hosts[0].ns(), address, path).unwrap();
    let (code, page) = get("/metrics");
    assert_eq!(code, 200);
    let peer = format!("flannel_peer_sent_packets_total{{peer=\"{}\"}}", overlay.hosts[1].ip());
    assert_eq!(metric(&page, &peer), traffic.sent.packets as f64);
    assert_eq!(metric(&page, "flannel_ready"), 1.0);
    assert_eq!(metric(&page, "flannel_peers"), 1.0);
    let dropped: f64 = (0..engine.workers.len())
        .map(|worker| {
            let line = format!("flannel_dropped_packets_total{{worker=\"{worker}\",reason=\"no_route\"}}");
            metric(&page, &line)
        })
        .sum();
    assert_eq!(dropped, no_route as f64);
    let (code, text) = get("/readyz?verbose");
    assert_eq!(code, 200);
    assert!(
        text.starts_with("ok\n[+] interface ok: eth0\n[+] lease ok: 10.5."),
        "{text}"
    );

    let text = String::from_utf8(status_command(&overlay, 0, &[]).stdout).unwrap();
    assert!(text.contains(": ready\nBackend    udp, flannel0, MTU 1472, "), "{text}");
    let dropped = text.lines().find(|line| line.starts_with("Dropped ")).unwrap();
    assert!(dropped.contains(&format!(" no_route {no_route}")), "{text}");
}

#[test]
fn what_is_switched_off_is_told_with_its_reason() {
    let lab = new_lab("status_off");
    let registry = Registry::embedded(&lab);
    let overlay = Overlay::start_hosts(lab, registry, CONFIG, &[(Default::default(), &["--no-offload"])]);
    let status = status(&overlay, 0);
    let engine = status.backend.unwrap().engine.unwrap();
    for offload in engine.offloads {
        assert!(!offload.on && offload.why_not.unwrap().contains("--offload=false"));
    }
}

#[test]
fn the_socket_is_roots_and_goes_with_the_daemon_but_not_with_a_killed_one() {
    let mut overlay = Overlay::start("status_socket", 1);
    let socket = socket(&overlay.daemons[0]);
    assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    overlay.daemons[0].kill9();
    assert!(socket.exists());
    let output = status_command(&overlay, 0, &[]);
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains("no flanneld runs on this host"), "{error}");
    overlay.daemons[0].start_and_wait();
    assert!(status(&overlay, 0).ready);
    assert!(overlay.daemons[0].stop().success());
    assert!(!socket.exists());
}

#[test]
fn a_daemon_that_waits_says_for_what_and_with_etcd_away_too() {
    let mut lab = new_lab("status_waits");
    let host = lab.host("h1").unwrap();
    let etcd = EtcdServer::start_with(EtcdOptions {
        address: host.ip().into(),
        namespace: Some(host.ns().name().to_owned()),
        ..EtcdOptions::default()
    });
    let registry = Registry::etcd(&etcd.url());
    let mut daemon = Daemon::new(&lab, &host, &registry)
        .with(HEALTH_FLAGS[0])
        .with(HEALTH_FLAGS[1]);
    daemon.start();
    let address: SocketAddr = HEALTH.parse().unwrap();
    let readyz = || http_get(host.ns(), address, "/readyz").map(|(code, text)| (code, text.trim_end().to_owned()));
    let waiting = (503, "not ready: waiting for the network's configuration".to_owned());
    wait_until(PATIENCE, "the daemon to wait for a configuration", || {
        readyz().is_ok_and(|answer| answer == waiting)
    })
    .unwrap();

    registry.configure(host.ns(), CONFIG);
    daemon.wait_ready();
    assert_eq!(readyz().unwrap(), (200, "ok".to_owned()));
    drop(etcd);
    let overlay = Overlay {
        daemons: vec![daemon],
        containers: Vec::new(),
        hosts: vec![host],
        registry,
        lab,
    };
    wait_until(PATIENCE, "the daemon to notice", || {
        let status = status(&overlay, 0);
        status.ready && !status.registry.connected && status.registry.trouble.is_some()
    })
    .unwrap();
    let text = String::from_utf8(status_command(&overlay, 0, &[]).stdout).unwrap();
    assert!(text.contains("NO ANSWER since "), "{text}");
}

#[test]
fn watching_shows_rates_until_the_daemon_is_gone() {
    let mut overlay = Overlay::start("status_watch", 2);
    overlay.assert_all_reach_all();
    let mut command = flanneld(overlay.hosts[0].ns());
    command.args(["status", "--watch=1"]);
    command.arg(format!("--subnet-file={}", overlay.daemons[0].subnet_file().display()));
    let output = overlay.lab.dir().join("watch.txt");
    let file = fs::File::create(&output).unwrap();
    let mut watcher = command
        .stdout(file)
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    wait_until(PATIENCE, "rates to be shown", || {
        fs::read_to_string(&output).is_ok_and(|text| text.contains("packets/s"))
    })
    .unwrap();
    assert!(overlay.daemons[0].end_with(Signal::SIGTERM).success());
    let ended = watcher.wait().unwrap();
    assert_eq!(ended.code(), Some(1));
}

#[test]
fn where_the_kernel_carries_the_packets_repairs_are_told() {
    let lab = new_lab("status_vxlan");
    let registry = Registry::embedded(&lab);
    let config = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#;
    let overlay = Overlay::start_on(lab, registry, config, 2);
    overlay.assert_all_reach_all();
    let before = status(&overlay, 0);
    let backend = before.backend.unwrap();
    assert_eq!(
        (backend.kind.as_str(), backend.device.as_deref(), backend.mtu),
        ("vxlan", Some("flannel.1"), 1450)
    );
    assert!(
        backend.engine.is_none() && backend.repairs.is_empty(),
        "{:?}",
        backend.repairs
    );
    assert_eq!(before.peers[0].traffic, None);

    overlay.hosts[0].ns().ip("route flush proto 85").unwrap();
    wait_until(PATIENCE, "the route to be put back", || {
        status(&overlay, 0).backend.unwrap().repairs.get("route") == Some(&1)
    })
    .unwrap();
    overlay.hosts[0].ns().ip("link delete flannel.1").unwrap();
    wait_until(PATIENCE, "the device to be made again", || {
        status(&overlay, 0).backend.unwrap().repairs.get("device") == Some(&1)
    })
    .unwrap();
    let text = String::from_utf8(status_command(&overlay, 0, &[]).stdout).unwrap();
    assert!(text.contains("Backend    vxlan, flannel.1, MTU 1450\n"), "{text}");
    assert!(text.contains("Repaired   device 1, route 1\n"), "{text}");
}
