//! What happens to hosts: devices that are taken away, limits that are reached, disks that are full, clocks that jump, processes
//! that are stopped. Each is done to real daemons under traffic; `--nocapture` shows what was lost. Needs root.

mod lab;

use flannel::{
    lab::{Host, HostOptions, Lab, Namespace, wait_until},
    sys::uring,
};
use lab::{
    CONFIG, Daemon, Overlay, PATIENCE, Registry, assert_reaches,
    clock::WallClock,
    etcd::{EtcdOptions, EtcdServer},
    faults::{
        Holdings, Trial, assert_becomes, assert_idle, lasting, repairs, run, status, ticks, traffic_with,
        wait_for_status,
    },
    http_get,
    memory::MemoryLimit,
    new_lab, not_tested,
    plain_peer::free_subnet,
    programmed::by_hand,
    traffic::transfer,
};
use nix::sys::signal::Signal;
use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    thread,
    time::{Duration, Instant},
};

/// How long a daemon is stopped. At length, longer than its claim to its PublicIP lives (30 s), and than etcd answers to nobody.
const STOPPED: (Duration, Duration) = (Duration::from_secs(20), Duration::from_secs(60));

/// What a daemon is to do with, and what the kernel holds for it: the smallest hosts that run containers have 512 MiB.
const LITTLE_MEMORY: usize = 32 << 20;

/// Seconds of a day.
const DAY: i64 = 86_400;

/// Hosts whose daemons are described further by `describe`.
fn overlay_of(mut lab: Lab, registry: Registry, count: usize, describe: impl Fn(Daemon) -> Daemon) -> Overlay {
    let mut hosts: Vec<Host> = (1..=count).map(|n| lab.host(&format!("h{n}")).unwrap()).collect();
    registry.configure(hosts[0].ns(), CONFIG);
    let daemons = hosts.iter().map(|host| describe(Daemon::new(&lab, host, &registry)));
    let mut daemons: Vec<Daemon> = daemons.collect();
    daemons.iter_mut().for_each(Daemon::start);
    let containers = (1..).zip(hosts.iter_mut().zip(&mut daemons));
    let containers = containers
        .map(|(n, (host, daemon))| host.add_container(&format!("c{n}"), daemon.wait_ready()).unwrap())
        .collect();
    let overlay = Overlay {
        daemons,
        containers,
        hosts,
        registry,
        lab,
    };
    overlay.assert_all_reach_all();
    overlay
}

/// Two hosts whose daemons have these flags.
fn two_hosts(name: &str, flags: &[&str]) -> Overlay {
    let lab = new_lab(name);
    let registry = Registry::embedded(&lab);
    let host = (HostOptions::default(), flags);
    let overlay = Overlay::start_hosts(lab, registry, CONFIG, &[host.clone(), host]);
    overlay.assert_all_reach_all();
    overlay
}

/// The device's addresses, its routes and its link, as far as they are set up.
fn device(ns: &Namespace) -> (String, String, bool) {
    let shown = |what: &str| ns.ip(what).unwrap_or_default();
    let addresses = shown("-4 -br address show flannel0");
    (
        addresses,
        shown("route show dev flannel0"),
        shown("link show flannel0").contains("mtu 1472"),
    )
}

#[test]
fn what_is_taken_from_the_device_comes_back_and_connections_hold() {
    let overlay = two_hosts("hf_device", &[]);
    let [one, two] = &overlay.containers[..] else {
        unreachable!()
    };
    let (daemon, ns) = (&overlay.daemons[0], overlay.hosts[0].ns());
    let before = device(ns);
    let own = overlay.subnet(0).network();
    for (what, right, lines) in [
        ("flannel0 is set down", "link", &["ip link set flannel0 down"][..]),
        (
            "flannel0 is set down and up",
            "route",
            &["ip link set flannel0 down", "ip link set flannel0 up"],
        ),
        ("flannel0 gets another MTU", "link", &["ip link set flannel0 mtu 1000"]),
        (
            "flannel0 loses its address",
            "address",
            &[&format!("ip address del {own}/32 dev flannel0")],
        ),
        (
            "flannel0 loses its route",
            "route",
            &["ip route del 10.5.0.0/16 dev flannel0"],
        ),
    ] {
        let mended = repairs(&status(daemon), right);
        let trial = Trial::start(what, one, two);
        lines.iter().for_each(|line| drop(by_hand(ns, line)));
        assert_becomes(what, &before, || device(ns));
        trial.over();
        wait_for_status(daemon, "the repair to be counted", |status| {
            (repairs(status, right) > mended).then_some(())
        });
    }
}

/// Deletes the device of the first host while packets flow both ways.
fn a_device_is_deleted(name: &str, flags: &[&str]) {
    let mut overlay = two_hosts(name, flags);
    let [one, two] = &overlay.containers[..] else {
        unreachable!()
    };
    let (ns, peer) = (overlay.hosts[0].ns().clone(), overlay.hosts[1].ip());
    let (before, held) = (device(&ns), Holdings::of(&mut overlay.daemons[0]));
    for round in 1..=2 {
        let trials = [(one, two), (two, one)].map(|(from, to)| {
            Trial::start(
                &format!("{name}: flannel0 of h1 is deleted, {} sends", from.name),
                from,
                to,
            )
        });
        let counted = traffic_with(&status(&overlay.daemons[0]), peer);
        by_hand(&ns, "ip link del flannel0");
        wait_for_status(&overlay.daemons[0], "the device to be made again", |status| {
            (repairs(status, "device") == round).then_some(())
        });
        trials.into_iter().for_each(|trial| drop(trial.over()));
        assert_becomes("the device to be as it was", &before, || device(&ns));
        let now = traffic_with(&status(&overlay.daemons[0]), peer);
        assert!(
            now.sent.packets > counted.sent.packets && now.received.packets > counted.received.packets,
            "what was counted goes on: {counted:?}, {now:?}"
        );
    }
    overlay.daemons[0].wait_for_log("flannel0 was removed: making it again");
    transfer(&[(one, two), (two, one)], 4 << 20);
    held.assert_no_more(&mut overlay.daemons[0]);
    assert_idle(&mut overlay.daemons[0]);
}

#[test]
fn a_device_that_is_deleted_is_made_again_and_connections_hold() {
    a_device_is_deleted("hf_del", &[]);
}

#[test]
fn a_deleted_device_is_made_again_on_the_plain_path() {
    a_device_is_deleted("hf_del_plain", &["--tun=plain", "--offload=false"]);
}

#[test]
fn a_deleted_device_is_made_again_with_io_uring() {
    match uring::probe() {
        Ok(()) => a_device_is_deleted("hf_del_uring", &["--io=uring", "--workers=3"]),
        Err(refused) => not_tested(&format!("a device that is deleted under io_uring: {refused}")),
    }
}

#[test]
fn who_deletes_the_device_each_time_does_not_keep_the_daemon_busy() {
    let mut overlay = two_hosts("hf_fight", &[]);
    let ns = overlay.hosts[0].ns().clone();
    let held = Holdings::of(&mut overlay.daemons[0]);
    let (begun, before) = (Instant::now(), ticks(&mut overlay.daemons[0]));
    // As a network manager does that minds devices which are not its own.
    let mut deleted = 0;
    wait_until(PATIENCE, "the device to be deleted four times", || {
        deleted += u64::from(ns.ip("link del flannel0").is_ok());
        deleted == 4
    })
    .unwrap();
    let seconds = begun.elapsed().as_secs() + 1;
    assert_reaches(&overlay.containers[0].ns, overlay.containers[1].ip);
    let trial = Trial::start(
        "the device is left alone again",
        &overlay.containers[0],
        &overlay.containers[1],
    );
    let made = repairs(&status(&overlay.daemons[0]), "device");
    let used = ticks(&mut overlay.daemons[0]) - before;
    println!("deleted {deleted} times in {seconds} s, made again {made} times, {used} ticks of processor time");
    // One that is deleted while it is being made is made again before its second is over.
    assert!(deleted <= 2 * seconds, "{deleted} times in {seconds} s");
    trial.over_without_loss();
    held.assert_no_more(&mut overlay.daemons[0]);
}

/// Where the daemons' health ports are.
const HEALTH: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 8471);

#[test]
fn a_daemon_without_a_free_descriptor_carries_packets_and_recovers() {
    let lab = new_lab("hf_files");
    let mut server = EtcdServer::start_with(EtcdOptions::on_switch(&lab));
    let registry = Registry::etcd(&server.url());
    let mut overlay = overlay_of(lab, registry, 2, |daemon| {
        daemon.with("--healthz-ip=127.0.0.1").with("--healthz-port=8471")
    });
    let [one, two] = &overlay.containers[..] else {
        unreachable!()
    };
    let ns = overlay.hosts[0].ns().clone();
    let daemon = &mut overlay.daemons[0];
    let held = Holdings::of(daemon);
    let pid = daemon.process().pid();
    let limit_to = |files: usize| run(&ns, &format!("prlimit --pid {pid} --nofile={files}:"));
    let opened = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let highest = opened.map(|file| file.unwrap().file_name().to_str().unwrap().parse::<usize>().unwrap());
    let trial = Trial::start("no descriptor is free", one, two);
    limit_to(highest.max().unwrap() + 1);

    // Whoever asks waits: there are a few gaps, and then no connection is taken up.
    let waiting: Vec<_> = (0..held.descriptors + 8)
        .filter_map(|_| std::os::unix::net::UnixStream::connect(daemon.subnet_file().with_extension("sock")).ok())
        .collect();
    assert!(!waiting.is_empty());
    server.kill();
    daemon.wait_for_log("watching the leases failed");
    assert_idle_but_for_flows(daemon);
    server.restart();
    trial.over_without_loss();

    // And what has to be made anew waits for descriptors: those that the old device leaves are above the limit.
    limit_to(4);
    by_hand(&ns, "ip link del flannel0");
    daemon.wait_for_log("looking after the TUN device failed");
    limit_to(1_024);
    daemon.wait_for_log("flannel0 was removed");
    assert_reaches(&one.ns, two.ip);
    drop(waiting);
    wait_for_status(daemon, "etcd to be there again", |status| {
        status.registry.connected.then_some(())
    });
    assert_eq!(http_get(&ns, HEALTH, "/readyz").unwrap().0, 200);
    let (subnet, public_ip) = (free_subnet(&overlay), "192.168.77.200");
    let reserve = ["leases", "reserve", &subnet.to_string(), "--public-ip", public_ip];
    overlay.registry.flanneld(&ns, &reserve);
    overlay.daemons[0].wait_for_log(&format!("peer {subnet} at {public_ip}"));
    held.assert_no_more(&mut overlay.daemons[0]);
}

/// Fails the test when the daemon uses the processor for more than the few packets of the flows.
fn assert_idle_but_for_flows(daemon: &mut Daemon) {
    const WATCHED: Duration = Duration::from_secs(2);
    let before = ticks(daemon);
    // Not an event that is waited for: a spin shows in time.
    thread::sleep(WATCHED);
    let used = ticks(daemon) - before;
    println!("{used} ticks in {WATCHED:?} beside 4,000 packets a second");
    // One thread that spins uses 200, unless others keep it from the processor.
    assert!(used < 120, "{used} ticks in {WATCHED:?}\n{}", daemon.log());
}

/// A daemon with a small disk of its own for its subnet file, which others do not see but through its process.
fn on_small_disk(daemon: Daemon, disk: &Path, prepare: &str) -> Daemon {
    fs::create_dir_all(disk).unwrap();
    let at = disk.display();
    let script = format!(r#"set -e; mount -t tmpfs -o size=16k fault {at}; cd {at}; {prepare}; cd /; exec "$@""#);
    daemon
        .with_subnet_file(&disk.join("subnet.env"))
        .with(format!("--status-socket={at}.sock"))
        .under(&["unshare", "--mount", "sh", "-c", &script, "sh"])
}

/// Does something where the daemon sees its disk.
fn on_its_disk(daemon: &mut Daemon, ns: &Namespace, line: &str) -> String {
    run(
        ns,
        &format!("nsenter --mount --target {} {line}", daemon.process().pid()),
    )
}

#[test]
fn a_subnet_file_that_cannot_be_written_stops_nothing_and_is_written_later() {
    let mut overlay = two_hosts("hf_disk", &[]);
    let host = overlay.lab.host("h3").unwrap();
    let ns = host.ns().clone();
    let disk = overlay.lab.dir().join("disk");
    let (file, socket) = (disk.join("subnet.env"), disk.with_extension("sock"));
    let daemon = Daemon::new(&overlay.lab, &host, &overlay.registry);
    let mut daemon = on_small_disk(daemon, &disk, "head -c 16384 /dev/zero > full");
    daemon.start();
    let subnet = daemon
        .wait_for_log("took subnet")
        .rsplit_once(' ')
        .unwrap()
        .1
        .to_owned();
    let own: Ipv4Addr = subnet.split('/').next().unwrap().parse().unwrap();
    daemon.wait_for_log("No space left on device");
    let waits = || flannel::observe::socket::read(&socket).unwrap().waiting_for;
    assert_becomes(
        "what it waits for",
        &Some("the subnet file to be written".to_owned()),
        waits,
    );
    // Packets flow all the same.
    assert_reaches(&overlay.containers[1].ns, own);
    on_its_disk(&mut daemon, &ns, &format!("rm {}/full", disk.display()));
    daemon.wait_for_log("ready: subnet");
    let written = on_its_disk(&mut daemon, &ns, &format!("cat {}", file.display()));
    assert!(written.contains("FLANNEL_MTU=1472"), "{written}");

    // As of a host whose disk has failed: what there is stays, and is written when it can be.
    on_its_disk(&mut daemon, &ns, &format!("mount -o remount,ro {}", disk.display()));
    by_hand(&ns, "ip link set eth0 mtu 1400");
    daemon.wait_for_log("Read-only file system");
    assert_reaches(&overlay.containers[1].ns, own);
    let stale = on_its_disk(&mut daemon, &ns, &format!("cat {}", file.display()));
    assert_eq!(stale, written);
    on_its_disk(&mut daemon, &ns, &format!("mount -o remount,rw {}", disk.display()));
    wait_until(PATIENCE, "the subnet file to say the new MTU", || {
        on_its_disk(&mut daemon, &ns, &format!("cat {}", file.display())).contains("FLANNEL_MTU=1372")
    })
    .unwrap();
    let written = on_its_disk(&mut daemon, &ns, &format!("cat {}", file.display()));
    assert!(daemon.stop().success());

    // A file that says all already is enough.
    let kept = overlay.lab.dir().join("kept.env");
    fs::write(&kept, written).unwrap();
    let daemon = Daemon::named("h3b", &overlay.lab, &host, &overlay.registry);
    let prepare = format!(
        "cp {} subnet.env; mount -o remount,ro {}",
        kept.display(),
        disk.display()
    );
    let mut daemon = on_small_disk(daemon, &disk, &prepare);
    daemon.start();
    daemon.wait_for_log("but it says already what it has to");
    daemon.wait_for_log(&format!("ready: subnet {subnet}"));
    daemon.assert_running();
}

/// Lets the wall clock of both daemons jump, and fails the test unless they mind neither that nor the way back. `look` is called
/// after each jump.
fn the_wall_clock_jumps(lab: Lab, registry: Registry, look: impl Fn(&Overlay)) {
    let clock = WallClock::new(lab.dir());
    let mut overlay = overlay_of(lab, registry, 2, |daemon| daemon.under(&clock.runner()));
    let [one, two] = &overlay.containers[..] else {
        unreachable!()
    };
    // A little more than a lease's time.
    for (what, seconds) in [("a day forward", DAY + 3_600), ("two days back", -DAY - 3_600)] {
        let trial = Trial::start(
            &format!(
                "{}: the wall clock jumps {what}",
                status(&overlay.daemons[0]).registry.name
            ),
            one,
            two,
        );
        clock.set_off_by(seconds);
        look(&overlay);
        trial.over_without_loss();
    }
    let leases = overlay.registry.flanneld(overlay.hosts[0].ns(), &["leases", "list"]);
    for index in 0..2 {
        let subnet = overlay.subnet(index).to_string();
        assert!(leases.contains(&subnet), "{subnet} is not in {leases}");
    }
    overlay.daemons.iter_mut().for_each(Daemon::assert_running);
    overlay.daemons.iter().for_each(Daemon::assert_content);
    // That the daemons have seen it: what they log last bears its date.
    assert!(overlay.daemons[0].stop().success());
    let log = overlay.daemons[0].log();
    let (first, last) = (log.lines().next().unwrap(), log.lines().last().unwrap());
    assert!(last[..10] < first[..10], "{log}");
}

#[test]
fn a_wall_clock_that_jumps_ends_no_lease_in_the_embedded_registry() {
    let lab = new_lab("hf_clock");
    let registry = Registry::embedded(&lab);
    // Each daemon renews its claim in the directory every ten seconds. Whoever does so takes out what is over.
    the_wall_clock_jumps(lab, registry, |overlay| {
        let renewed = |daemon: &Daemon| {
            let requests = status(daemon).registry.requests;
            requests.get("refresh").map_or(0, |refresh| refresh.answered)
        };
        let before: Vec<u64> = overlay.daemons.iter().map(renewed).collect();
        wait_until(PATIENCE, "both claims to be renewed", || {
            overlay
                .daemons
                .iter()
                .zip(&before)
                .all(|(daemon, before)| renewed(daemon) > *before)
        })
        .unwrap();
    });
}

#[test]
fn a_wall_clock_that_jumps_ends_no_lease_in_etcd() {
    let lab = new_lab("hf_clock_etcd");
    let server = EtcdServer::start_with(EtcdOptions::on_switch(&lab));
    let registry = Registry::etcd(&server.url());
    // There the server's clock counts, and in the daemon none that anybody sets.
    the_wall_clock_jumps(lab, registry, |overlay| {
        let subnet = free_subnet(overlay);
        let reserve = [
            "leases",
            "reserve",
            &subnet.to_string(),
            "--public-ip",
            "192.168.77.200",
        ];
        overlay.registry.flanneld(overlay.hosts[0].ns(), &reserve);
        overlay.daemons[0].wait_for_log(&format!("peer {subnet} at 192.168.77.200"));
    });
}

#[test]
fn a_daemon_that_is_stopped_for_long_goes_on_with_its_lease_its_claim_and_its_connections() {
    let (mut overlay, server) = Overlay::start_on_etcd("hf_stop", CONFIG, 3);
    overlay.assert_all_reach_all();
    let lasts = lasting(STOPPED.0, STOPPED.1);
    let patience = PATIENCE + lasts * 3;
    let [one, two, three] = &overlay.containers[..] else {
        unreachable!()
    };
    let subnet = overlay.daemons[0].subnet();
    let trials = [(one, two), (two, one)].map(|(from, to)| {
        let what = format!("the daemon of h1 is stopped for {lasts:?}, {} sends", from.name);
        Trial::start_for(&what, from, to, patience)
    });
    let bystander = Trial::start("another host's daemon is stopped", two, three);
    overlay.daemons[0].process().signal(Signal::SIGSTOP);
    bystander.over_without_loss();
    // Not an event that is waited for: the fault's own length.
    thread::sleep(lasts);
    overlay.daemons[0].process().signal(Signal::SIGCONT);
    trials.into_iter().for_each(|trial| drop(trial.over()));
    let claim = format!("/coreos.com/network/hosts/{}", overlay.hosts[0].ip());
    wait_until(PATIENCE, "the claim to be there", || {
        server.etcdctl(&["get", "--keys-only", &claim]).contains(&claim)
    })
    .unwrap();
    wait_for_status(&overlay.daemons[0], "etcd to be there", |status| {
        status.registry.connected.then_some(())
    });
    assert_eq!(overlay.daemons[0].subnet(), subnet);
    overlay.daemons.iter_mut().for_each(Daemon::assert_running);
    assert_reaches(&one.ns, three.ip);
    assert_idle(&mut overlay.daemons[0]);
}

#[test]
fn a_daemon_works_in_32_mebibytes_with_traffic() {
    let limit = match MemoryLimit::new("hf_memory", LITTLE_MEMORY) {
        Ok(limit) => limit,
        Err(refused) => {
            return not_tested(&format!(
                "a daemon with little memory, for want of control groups: {refused}"
            ));
        }
    };
    let lab = new_lab("hf_memory");
    let registry = Registry::embedded(&lab);
    let mut overlay = overlay_of(lab, registry, 2, |daemon| {
        if daemon.subnet_file().ends_with("h1.env") {
            daemon.under(&limit.runner())
        } else {
            daemon
        }
    });
    let [one, two] = &overlay.containers[..] else {
        unreachable!()
    };
    let trial = Trial::start("32 MiB of memory for the daemon and its sockets", one, two);
    transfer(&[(one, two), (two, one), (one, two), (two, one)], 16 << 20);
    trial.over();
    overlay.daemons[0].assert_running();
    println!("at most {:?} bytes of {LITTLE_MEMORY}", limit.peak());
    assert_eq!(limit.killed(), 0);
    assert!(overlay.daemons[0].stop().success());
}

#[test]
fn a_processor_that_is_taken_away_costs_nothing() {
    let mut overlay = two_hosts("hf_processor", &["--workers=2", "--pin"]);
    let [one, two] = &overlay.containers[..] else {
        unreachable!()
    };
    let ns = overlay.hosts[0].ns().clone();
    let daemon = &mut overlay.daemons[0];
    let pid = daemon.process().pid();
    let allowed = run(&ns, &format!("taskset -cp {pid}"));
    let first = allowed.trim().rsplit([' ', ',', '-']).next().unwrap();
    let held = Holdings::of(daemon);
    let there = Trial::start("all workers share a processor, the host sends", one, two);
    let back = Trial::start("all workers share a processor, the host receives", two, one);
    // As the kernel does with the threads of a processor that is switched off.
    run(&ns, &format!("taskset -a -cp {first} {pid}"));
    transfer(&[(one, two), (two, one)], 4 << 20);
    there.over();
    back.over();
    assert_eq!(Holdings::of(daemon).threads, held.threads);
    assert_idle(daemon);
    // And started there: more workers than processors.
    assert!(daemon.stop().success());
    let again = Daemon::named("h1b", &overlay.lab, &overlay.hosts[0], &overlay.registry);
    let mut again = again.under(&["taskset", "-c", first]).with("--workers=4").with("--pin");
    again.start_and_wait();
    Trial::start("four workers on one processor", one, two).over_without_loss();
    assert_eq!(status(&again).backend.unwrap().engine.unwrap().workers.len(), 4);
}
