//! A daemon of the `udp` backend ends and begins again under traffic: what is lost, with a supervisor that keeps its descriptors
//! and without. Needs root.

mod lab;

use flannel::lab::{HostOptions, Namespace, wait_until};
use lab::{CONFIG, Daemon, Overlay, Registry, etcd::EtcdServer, flow::Flows, new_lab, not_tested};
use nix::sys::signal::Signal;
use std::{process::Stdio, time::Instant};

/// More descriptors than any daemon here has.
const ROOM: usize = 64;

/// Datagrams that a worker may have in hand when it is killed: those that came while it waited for a processor.
const IN_HAND: u64 = 64;

/// What a restart without a store may lose at 1,000 a second: the device is away in the meantime.
const AWAY: usize = 40;

/// How often that is tried.
const TRIES: usize = 10;

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

/// All that the kernel says of the device, but how much it has carried.
fn device(ns: &Namespace) -> String {
    [
        "-d -o link show dev flannel0",
        "-o address show dev flannel0",
        "route show dev flannel0",
    ]
    .map(|command| ns.ip(command).unwrap())
    .concat()
}

/// The same without what a device that is made anew has of its own: its number, and the address that the kernel makes up.
fn settings(ns: &Namespace) -> Vec<String> {
    let text = device(ns);
    let lines = text.lines().filter(|line| !line.contains("fe80"));
    let without_number = |line: &str| match line.split_once(": ") {
        Some((_, rest)) => rest.to_owned(),
        None => line.to_owned(),
    };
    lines.map(without_number).collect()
}

/// Flows in both directions.
struct BothWays([Flows; 2]);

impl BothWays {
    fn start(overlay: &Overlay) -> BothWays {
        let [one, two] = &overlay.containers[..] else {
            unreachable!("two hosts")
        };
        BothWays([Flows::start(one, two), Flows::start(two, one)])
    }

    /// Ends them; the datagrams that were lost, and how many were sent. The connections must have held.
    fn lost(self) -> (usize, u64) {
        let reports = self.0.map(Flows::finish);
        let lost = reports.iter().map(|report| report.lost.len()).sum();
        (lost, reports.iter().map(|report| report.sent).sum())
    }
}

#[test]
fn a_supervised_restart_loses_nothing_and_a_crash_only_what_was_in_hand() {
    for io in ["mmsg", "uring"] {
        let (mut overlay, _etcd) = supervised(&format!("store_{io}"), ROOM, &[&format!("--io={io}"), "--workers=2"]);
        let ns = overlay.hosts[0].ns().clone();
        let (before, subnet) = (device(&ns), overlay.subnet(0));
        if !overlay.daemons[0].log().contains(&format!("I/O {io}")) {
            not_tested("this kernel has no io_uring for us");
            return;
        }
        for (signal, times, most) in [(Signal::SIGTERM, 3, 0), (Signal::SIGKILL, 3, IN_HAND)] {
            let before_it: u64 = overlay.daemons.iter().map(Daemon::overflowed).sum();
            let flows = BothWays::start(&overlay);
            for _ in 0..times {
                overlay.daemons[0].end_with(signal);
                assert_eq!(device(&ns), before);
                overlay.daemons[0].start_and_wait();
                overlay.daemons[0].assert_content();
                assert_eq!((device(&ns), overlay.subnet(0)), (before.clone(), subnet));
            }
            let (lost, sent) = flows.lost();
            // A restart that takes longer than the queues hold what comes.
            let overflowed = overlay.daemons.iter().map(Daemon::overflowed).sum::<u64>() - before_it;
            eprintln!(
                "{io}, {signal}: {lost} of {sent} lost in {times} restarts, {overflowed} of them for want of room"
            );
            assert!(lost as u64 <= most + overflowed, "{io}, {signal}: {lost} of {sent}");
        }
        assert!(overlay.daemons[0].stop().success());
        // As when the service is stopped for good.
        overlay.daemons[0].supervisor().empty();
        wait_until(lab::PATIENCE, "the device to go", || {
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
    let names = |overlay: &Overlay| {
        let mut names = overlay.daemons[0].supervisor().stored();
        names.sort();
        names
    };
    let (queue, socket) = ("flanneld-queue", "flanneld-socket");
    assert_eq!(names(&overlay), [queue, queue, socket, socket]);
    let before = index(&ns);
    let with = |overlay: &mut Overlay, flags: &[&str]| {
        assert!(overlay.daemons[0].stop().success());
        overlay.daemons[0].set_flags(flags);
        overlay.daemons[0].start_and_wait();
        overlay.assert_all_reach_all();
    };
    // More workers get more queues and sockets, fewer leave some; nothing of those stays behind.
    with(&mut overlay, &["--workers=3"]);
    assert_eq!(names(&overlay), [queue, queue, queue, socket, socket, socket]);
    with(&mut overlay, &["--workers=1"]);
    assert_eq!(names(&overlay), [queue, socket]);
    assert_eq!(index(&ns), before);
    // Another kind of device has to be made anew; the port stays.
    with(&mut overlay, &["--workers=1", "--offload=false"]);
    assert!(
        overlay.daemons[0]
            .log()
            .contains("does not fit: --offload is another now")
    );
    assert_eq!(names(&overlay), [queue, socket]);
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
    assert_eq!(names(&overlay), [queue, socket, socket, socket]);
    assert_eq!(index(&ns), before);

    // The device is gone although its queues are kept.
    assert!(overlay.daemons[0].stop().success());
    ns.ip("link del flannel0").unwrap();
    overlay.daemons[0].start_and_wait();
    assert!(overlay.daemons[0].log().contains("does not fit: it is gone"));
    overlay.assert_all_reach_all();
}

fn with_started(overlay: &mut Overlay) {
    overlay.daemons[0].start_and_wait();
    overlay.daemons[1].wait_ready();
    overlay.assert_all_reach_all();
}

#[test]
fn a_store_that_is_too_small_keeps_what_it_can_and_the_daemon_says_so() {
    let (mut overlay, _etcd) = supervised("small", 2, &["--workers=2"]);
    assert!(overlay.daemons[0].log().contains("FileDescriptorStoreMax="));
    assert_eq!(overlay.daemons[0].supervisor().stored().len(), 2);
    let before = device(overlay.hosts[0].ns());
    assert!(overlay.daemons[0].stop().success());
    overlay.daemons[0].start_and_wait();
    assert_eq!(device(overlay.hosts[0].ns()), before);
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
        let lost = flows.lost().0 / 2;
        losses.push((lost, program_start));
        is_enough |= lost <= AWAY + program_start;
        assert_eq!((settings(&ns), overlay.subnet(0)), (before.clone(), subnet));
    }
    eprintln!("lost by a fresh start, and the ms that the program takes to start: {losses:?}");
    assert!(is_enough, "{losses:?}");
}

#[test]
fn what_was_remembered_and_is_not_so_any_more_is_exchanged() {
    let (mut overlay, _etcd) = Overlay::start_on_etcd("outdated", CONFIG, 2);
    let ns = overlay.hosts[0].ns().clone();
    let ip = overlay.hosts[0].ip().to_string();
    // Another subnet, and then another network.
    overlay.daemons[0].kill9();
    overlay
        .registry
        .flanneld(&ns, &["leases", "reserve", "10.5.250.0/24", "--public-ip", &ip]);
    let subnet = overlay.daemons[0].start_and_wait().subnet;
    assert_eq!(subnet.trunc().to_string(), "10.5.250.0/24");
    overlay.daemons[0].wait_for_log("begun with the subnet that was last known");
    assert!(device(&ns).contains("10.5.250.0/32"));
    wait_until(lab::PATIENCE, "the new lease to be remembered", || {
        let state = overlay.daemons[0].subnet_file().with_extension("state");
        std::fs::read_to_string(state).is_ok_and(|state| state.contains("10.5.250.0-24"))
    })
    .unwrap();
    overlay.daemons[0].kill9();
    let other = r#"{"Network":"10.9.0.0/16"}"#;
    overlay.registry.flanneld(&ns, &["network", "set", other, "--force"]);
    let subnet = overlay.daemons[0].start_and_wait().subnet;
    assert!(subnet.to_string().starts_with("10.9."), "{subnet}");
    let device = device(&ns);
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
