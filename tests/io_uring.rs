//! The `udp` overlay with io_uring, alone and together with system calls. Needs root; skipped before Linux 6.7.

mod lab;

use flannel::{lab::HostOptions, sys::uring::probe};
use lab::{CONFIG, Daemon, Overlay, Registry, new_lab, stream, traffic::transfer};
use std::time::Duration;

const URING: &str = "--io=uring";

/// Bytes of a transfer: more than all queues on the way hold.
const BYTES: usize = 8 << 20;

/// Whether there is no io_uring to test here, which is said.
fn skipped() -> bool {
    let refused = probe().err();
    refused.inspect(|reason| eprintln!("skipped: {reason}")).is_some()
}

/// Hosts whose daemons have these flags; those that are to use io_uring do.
fn start(name: &str, flags: &[&[&str]]) -> Overlay {
    let lab = new_lab(name);
    let registry = Registry::embedded(&lab);
    let hosts: Vec<_> = flags.iter().map(|flags| (HostOptions::default(), *flags)).collect();
    let overlay = Overlay::start_hosts(lab, registry, CONFIG, &hosts);
    for (daemon, flags) in overlay.daemons.iter().zip(flags) {
        let way = if flags.contains(&URING) {
            "I/O uring"
        } else {
            "I/O mmsg"
        };
        daemon.wait_for_log(way);
    }
    overlay.assert_all_reach_all();
    overlay
}

#[test]
fn hosts_with_and_without_io_uring_understand_one_another() {
    if skipped() {
        return;
    }
    let flags = [
        &[URING][..],
        &[URING, "--no-offload"],
        &[URING, "-tun=plain"],
        &["--io=mmsg"],
    ];
    let mut overlay = start("uring", &flags);
    for from in &overlay.containers {
        for to in overlay.containers.iter().filter(|to| to.name != from.name) {
            transfer(&[(from, to)], BYTES);
        }
    }
    for daemon in &mut overlay.daemons {
        daemon.assert_running();
        assert!(!daemon.log().contains("cannot use io_uring"), "{}", daemon.log());
    }
}

#[test]
fn datagrams_stay_in_order_beside_a_transfer_that_fills_the_queues() {
    if skipped() {
        return;
    }
    let overlay = start("uringorder", &[&[URING][..]; 2]);
    let [one, two] = &overlay.containers[..] else {
        unreachable!()
    };
    let there = stream::Stream::start(one, two, Duration::from_micros(500));
    transfer(&[(two, one)], BYTES);
    transfer(&[(one, two)], BYTES);
    let report = there.finish();
    assert!((report.lost.len() as u64) < report.sent / 2, "{report:?}");
    assert_eq!((report.duplicates, report.reordered), (0, 0));
}

#[test]
fn a_daemon_that_ends_leaves_no_device_and_one_that_is_killed_is_no_hindrance_to_the_next() {
    if skipped() {
        return;
    }
    let mut overlay = start("uringend", &[&[URING][..]; 2]);
    assert!(overlay.daemons[0].stop().success());
    let links = overlay.hosts[0].ns().ip("-br link").unwrap();
    assert!(!links.contains("flannel"), "{links}");
    for _ in 0..3 {
        overlay.daemons[0].start_and_wait();
        overlay.daemons[0].wait_for_log("flannel0 is up");
        overlay.assert_all_reach_all();
        overlay.daemons[0].kill9();
    }
}

#[test]
fn without_io_uring_packets_take_the_other_way_and_the_log_says_why() {
    let mut lab = new_lab("nouring");
    let host = lab.host("h1").unwrap();
    let registry = Registry::embedded(&lab);
    registry.configure(host.ns(), CONFIG);
    let mut daemon = Daemon::new(&lab, &host, &registry).with(URING).without_io_uring();
    daemon.start_and_wait();
    daemon.wait_for_log("I/O mmsg");
    let warning = daemon.wait_for_log("cannot use io_uring");
    assert!(warning.contains("WARN") && warning.contains("seccomp"), "{warning}");
}
