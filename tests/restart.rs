//! A daemon of the `udp` backend ends and begins again under traffic: what is lost, with a supervisor that keeps its descriptors
//! and without. Needs root.

mod lab;

use flannel::{
    lab::{HostOptions, Namespace, wait_until},
    sys::tun,
};
use lab::{
    CONFIG, Daemon, Overlay, PATIENCE, Registry, etcd::EtcdServer, flow::BothWays, inside, new_lab, not_tested,
    plain_peer::free_subnet, tunnel_device,
};
use nix::sys::signal::Signal;
use std::{
    os::fd::AsFd,
    process::Stdio,
    time::{Duration, Instant},
};

/// More descriptors than any daemon here has.
const ROOM: usize = 64;

/// Datagrams that a worker may have in hand when it is killed: those that came while it waited for a processor.
const IN_HAND: u64 = 64;

/// 500 datagrams, and messages over TCP, a second: a queue holds those of nearly two seconds, in which a debug build is started
/// again on a busy machine, too.
const PACE: Duration = Duration::from_millis(2);

/// What the best of several starts without a store may lose at 1,000 a second, the device being away in the meantime: a debug build on
/// a busy machine takes much longer than a release on one of its own.
const AWAY: usize = 250;

/// How often that is tried.
const TRIES: usize = 5;

/// Two hosts with a container each, on an etcd; the first one's daemon is run by a supervisor.
fn supervised(name: &str, store: usize, flags: &[&str]) -> (Overlay, EtcdServer) {
    let (mut overlay, etcd) = Overlay::start_on_etcd(name, CONFIG, 2);
    let host = &overlay.hosts[0];
    overlay.daemons[0].stop();
    let daemon = Daemon::named("supervised", &overlay.lab, host, &overlay.registry).supervised(store);
    overlay.daemons[0] = flags.iter().fold(daemon, |daemon, flag| daemon.with(*flag));
    overlay.daemons[0].start_and_wait();
    overlay.assert_all_reach_all();
    (overlay, etcd)
}

/// The device without what one that is made anew has of its own: its number, and the address that the kernel makes up.
fn settings(ns: &Namespace) -> Vec<String> {
    let text = tunnel_device(ns);
    let lines = text.lines().filter(|line| !line.contains("fe80"));
    let without_number = |line: &str| match line.split_once(": ") {
        Some((_, rest)) => rest.to_owned(),
        None => line.to_owned(),
    };
    lines.map(without_number).collect()
}

/// What the queues of all hosts had no room for.
fn overflowed(overlay: &Overlay) -> u64 {
    overlay.daemons.iter().map(Daemon::overflowed).sum()
}

/// The names of all that the first host's supervisor keeps.
fn kept(overlay: &Overlay) -> Vec<String> {
    let mut names = overlay.daemons[0].supervisor().stored();
    names.sort();
    names
}

const QUEUE: &str = "flanneld-queue";
const SOCKET: &str = "flanneld-socket";

#[test]
fn a_supervised_restart_loses_nothing_and_a_crash_only_what_was_in_hand() {
    for io in ["mmsg", "uring"] {
        let (mut overlay, _etcd) = supervised(&format!("store_{io}"), ROOM, &[&format!("--io={io}"), "--workers=2"]);
        let ns = overlay.hosts[0].ns().clone();
        let (before, subnet) = (tunnel_device(&ns), overlay.subnet(0));
        if !overlay.daemons[0].log().contains(&format!("I/O {io}")) {
            not_tested("this kernel has no io_uring for us");
            return;
        }
        for (signal, times, most) in [(Signal::SIGTERM, 3, 0), (Signal::SIGKILL, 3, IN_HAND)] {
            let before_it = overflowed(&overlay);
            let flows = BothWays::start_every(&overlay, PACE);
            for _ in 0..times {
                overlay.daemons[0].end_with(signal);
                assert_eq!(tunnel_device(&ns), before);
                overlay.daemons[0].start_and_wait();
                overlay.daemons[0].assert_content();
                assert_eq!((tunnel_device(&ns), overlay.subnet(0)), (before.clone(), subnet));
            }
            let lost = flows.finish();
            // A restart that takes longer than the queues hold what comes.
            let overflowed = overflowed(&overlay) - before_it;
            eprintln!("{io}, {signal}, {times} restarts: {lost:?}, {overflowed} for want of room");
            assert!(lost.most() as u64 <= most + overflowed, "{io}, {signal}: {lost:?}");
        }
        assert!(overlay.daemons[0].stop().success());
        // As when the service is stopped for good.
        overlay.daemons[0].supervisor().empty();
        wait_until(PATIENCE, "the device to go", || {
            !ns.ip("-br link").unwrap().contains("flannel0")
        })
        .unwrap();
    }
}

#[test]
fn what_the_supervisor_has_kept_is_used_as_far_as_it_fits() {
    let (mut overlay, _etcd) = supervised("fit", ROOM, &["--workers=2"]);
    let ns = overlay.hosts[0].ns().clone();
    let index = |ns: &Namespace| {
        let link = ns.ip("-o link show type tun").unwrap();
        link.split(':').next().unwrap().to_owned()
    };
    assert_eq!(kept(&overlay), used_by(2, 1));
    let before = index(&ns);
    let with = |overlay: &mut Overlay, flags: &[&str]| {
        assert!(overlay.daemons[0].stop().success());
        overlay.daemons[0].set_flags(flags);
        overlay.daemons[0].start_and_wait();
        overlay.assert_all_reach_all();
    };
    // More workers get more queues and sockets, fewer leave some; nothing of those stays behind.
    with(&mut overlay, &["--workers=3"]);
    assert_eq!(kept(&overlay), used_by(3, 1));
    with(&mut overlay, &["--workers=1"]);
    assert_eq!(kept(&overlay), used_by(1, 1));
    assert_eq!(index(&ns), before);
    // Another kind of device has to be made anew; the port stays.
    with(&mut overlay, &["--workers=1", "--offload=false"]);
    assert!(
        overlay.daemons[0]
            .log()
            .contains("does not fit: --offload is another now")
    );
    assert_eq!(kept(&overlay), used_by(1, 1));
    assert_ne!(index(&ns), before);
    assert!(ns.ip("-br link").unwrap().contains("flannel0"));

    // Another port: other sockets, the same device.
    let before = index(&ns);
    assert!(overlay.daemons[0].stop().success());
    overlay.daemons[1].stop();
    let other = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"udp","Port":8555,"SourcePorts":3}}"#;
    overlay.registry.flanneld(&ns, &["network", "set", other, "--force"]);
    overlay.daemons[1].start();
    with_started(&mut overlay);
    assert!(overlay.daemons[0].log().contains("which are not on 192.168.77.1:8555"));
    assert_eq!(kept(&overlay), used_by(1, 3));
    assert_eq!(index(&ns), before);

    // The device is gone although its queues are kept.
    assert!(overlay.daemons[0].stop().success());
    ns.ip("link del flannel0").unwrap();
    overlay.daemons[0].start_and_wait();
    assert!(overlay.daemons[0].log().contains("does not fit: it is gone"));
    overlay.assert_all_reach_all();

    // Of another device only, which does not spoil those that are there.
    let before = index(&ns);
    assert!(overlay.daemons[0].stop().success());
    let gone = inside(&ns, || tun::open_multi_queue("gone%d", 1)).unwrap();
    ns.ip("link del gone0").unwrap();
    let dead = gone.queues[0].as_fd().try_clone_to_owned().unwrap();
    overlay.daemons[0].supervisor().keep(QUEUE, dead);
    overlay.daemons[0].start_and_wait();
    assert_eq!(index(&ns), before);
    assert_eq!(kept(&overlay), used_by(1, 3));
    overlay.assert_all_reach_all();
}

/// What so many workers use with so many source ports: each two queues, and a socket for each port.
fn used_by(workers: usize, ports: usize) -> Vec<&'static str> {
    [vec![QUEUE; 2 * workers], vec![SOCKET; workers * ports]].concat()
}

fn with_started(overlay: &mut Overlay) {
    overlay.daemons[0].start_and_wait();
    overlay.daemons[1].wait_ready();
    overlay.assert_all_reach_all();
}

#[test]
fn a_store_that_is_too_small_keeps_what_it_can_and_the_daemon_says_so() {
    let (mut overlay, _etcd) = supervised("small", 4, &["--workers=2"]);
    assert!(overlay.daemons[0].log().contains("FileDescriptorStoreMax="));
    assert_eq!(overlay.daemons[0].supervisor().stored().len(), 4);
    let before = tunnel_device(overlay.hosts[0].ns());
    assert!(overlay.daemons[0].stop().success());
    overlay.daemons[0].start_and_wait();
    assert_eq!(tunnel_device(overlay.hosts[0].ns()), before);
    overlay.assert_all_reach_all();
}

#[test]
fn a_killed_daemon_that_is_started_afresh_loses_little_and_no_connection() {
    let (mut overlay, _etcd) = Overlay::start_on_etcd("fresh", CONFIG, 2);
    overlay.assert_all_reach_all();
    let ns = overlay.hosts[0].ns().clone();
    let (before, subnet) = (settings(&ns), overlay.subnet(0));
    let mut losses = Vec::new();
    let mut is_enough = false;
    while losses.len() < TRIES && (losses.len() < 3 || !is_enough) {
        // What any program takes to start on a busy machine is not the daemon's doing.
        let begun = Instant::now();
        assert!(
            lab::flanneld(&ns)
                .arg("--version")
                .stdout(Stdio::null())
                .status()
                .unwrap()
                .success()
        );
        let program_start = begun.elapsed().as_millis() as usize;
        let flows = BothWays::start(&overlay);
        overlay.daemons[0].kill9();
        overlay.daemons[0].start_and_wait();
        overlay.daemons[0].wait_for_log("begun with the subnet that was last known");
        // The connections must have held each time.
        let lost = flows.finish().most();
        losses.push((lost, program_start));
        is_enough |= lost <= AWAY + program_start;
        assert_eq!((settings(&ns), overlay.subnet(0)), (before.clone(), subnet));
    }
    println!(
        "lost by a fresh start, in the direction that lost more, and the ms that the program takes to start: {losses:?}"
    );
    assert!(is_enough, "{losses:?}");
}

#[test]
fn what_was_remembered_and_is_not_so_any_more_is_exchanged() {
    let (mut overlay, _etcd) = Overlay::start_on_etcd("outdated", CONFIG, 2);
    let ns = overlay.hosts[0].ns().clone();
    let ip = overlay.hosts[0].ip().to_string();
    // Another subnet, and then another network.
    let reserved = free_subnet(&overlay);
    overlay.daemons[0].kill9();
    let reserve = ["leases", "reserve", &reserved.to_string(), "--public-ip", &ip];
    overlay.registry.flanneld(&ns, &reserve);
    assert_eq!(overlay.daemons[0].start_and_wait().subnet.trunc(), reserved);
    overlay.daemons[0].wait_for_log("begun with the subnet that was last known");
    assert!(tunnel_device(&ns).contains(&format!("{}/32", reserved.network())));
    overlay.daemons[0].wait_until_state_has(&reserved.to_string().replace('/', "-"));
    overlay.daemons[0].kill9();
    let other = r#"{"Network":"10.9.0.0/16"}"#;
    overlay.registry.flanneld(&ns, &["network", "set", other, "--force"]);
    let subnet = overlay.daemons[0].start_and_wait().subnet;
    assert!(subnet.to_string().starts_with("10.9."), "{subnet}");
    let device = tunnel_device(&ns);
    assert!(device.contains("10.9.0.0/16") && !device.contains("10.5."), "{device}");
}

#[test]
fn sigterm_without_a_store_removes_the_device() {
    let lab = new_lab("plain");
    let registry = Registry::embedded(&lab);
    let mut overlay = Overlay::start_hosts(lab, registry, CONFIG, &[(HostOptions::default(), &[])]);
    assert!(overlay.daemons[0].stop().success());
    assert!(!overlay.hosts[0].ns().ip("-br link").unwrap().contains("flannel0"));
}

#[test]
fn a_supervised_restart_loses_nothing_while_etcd_hangs() {
    let (mut overlay, etcd) = supervised("hangs", ROOM, &["--workers=2"]);
    overlay.daemons[0].wait_until_remembered(1);
    let flows = BothWays::start_every(&overlay, PACE);
    etcd.pause();
    // It waits for its claim to be taken back, and carries packets until then.
    assert!(overlay.daemons[0].stop().success());
    overlay.daemons[0].start_and_wait();
    etcd.resume();
    let lost = flows.finish();
    eprintln!("restart while etcd hangs: {lost:?}");
    assert_eq!(lost.most(), 0, "{lost:?}");
}

#[test]
fn what_fewer_workers_do_not_need_is_let_go_before_the_registry_is_asked() {
    let (mut overlay, etcd) = supervised("fewer", ROOM, &["--workers=3"]);
    overlay.daemons[0].wait_until_remembered(1);
    assert!(overlay.daemons[0].stop().success());
    assert_eq!(kept(&overlay), used_by(3, 1));
    // A start that waits for the configuration, for as long as there is none.
    let key = "/coreos.com/network/config";
    etcd.etcdctl(&["del", key]);
    overlay.daemons[0].set_flags(&["--workers=1"]);
    overlay.daemons[0].start();
    wait_until(PATIENCE, "the supervisor to keep what is used", || {
        kept(&overlay) == used_by(1, 1)
    })
    .unwrap();
    overlay.assert_all_reach_all();
    assert!(!overlay.daemons[0].supervisor().was_told("READY=1"));
    etcd.etcdctl(&["put", key, CONFIG]);
    overlay.daemons[0].wait_ready();
    assert_eq!(kept(&overlay), used_by(1, 1));
    overlay.assert_all_reach_all();
}

#[test]
fn a_remembered_network_that_does_not_fit_any_more_leaves_what_was_kept_to_the_start() {
    let (mut overlay, _etcd) = supervised("misfit", ROOM, &["--workers=2"]);
    overlay.daemons[0].wait_until_remembered(1);
    assert!(overlay.daemons[0].stop().success());
    let ns = overlay.hosts[0].ns().clone();
    for command in [
        "route del 10.5.0.0/16 dev flannel0",
        "link add elsewhere type veth peer name nowhere",
        "link set elsewhere up",
        "link set nowhere up",
        "route add 10.5.0.0/16 dev elsewhere",
    ] {
        ns.ip(command).unwrap();
    }
    let other = r#"{"Network":"10.9.0.0/16"}"#;
    overlay.registry.flanneld(&ns, &["network", "set", other, "--force"]);
    let subnet = overlay.daemons[0].start_and_wait().subnet;
    assert!(subnet.to_string().starts_with("10.9."), "{subnet}");
    let log = overlay.daemons[0].log();
    assert!(!log.contains("begun with the subnet that was last known"), "{log}");
    assert_eq!(kept(&overlay), used_by(2, 1));
}

#[test]
fn what_another_host_has_taken_meanwhile_is_remembered_no_more() {
    let mut overlay = Overlay::start("taken", 2);
    overlay.daemons[0].wait_until_remembered(1);
    let claimed = overlay.hosts[0].ip();
    assert!(overlay.daemons[0].stop().success());
    let impostor = overlay.lab.host("h3").unwrap();
    let mut third = Daemon::new(&overlay.lab, &impostor, &overlay.registry)
        .with(format!("--public-ip={claimed}"))
        .with("--iface=eth0");
    third.start_and_wait();
    overlay.daemons[0].start();
    overlay.daemons[0].wait_for_log("begun with the subnet that was last known");
    // The other one's claim must be seen to be refreshed twice, which it is every 10 s.
    assert_eq!(overlay.daemons[0].wait_exit_within(2 * PATIENCE).code(), Some(1));
    assert!(!overlay.daemons[0].state_file().exists());
}
