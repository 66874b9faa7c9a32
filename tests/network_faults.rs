//! What networks do to hosts: links that flap, addresses and routes that change, partitions, ways that narrow, and all that a
//! socket may answer to a sender. Each is done to real daemons under traffic; `--nocapture` shows what was lost. Needs root.

mod lab;

use flannel::{
    lab::{Container, HostOptions, Segment, wait_until},
    observe::status::Status,
    sys::uring,
};
use lab::{
    CONFIG, Daemon, Overlay, PATIENCE, Registry, assert_loses, assert_reaches,
    etcd::EtcdServer,
    faults::{
        Holdings, Queues, Trial, assert_becomes, assert_idle, dropped, lasting, run, send_errors, status, traffic_with,
        try_for_status, wait_for_status,
    },
    inside, new_lab, not_tested,
    original::public_ip,
    plain_peer::free_subnet,
    programmed::{by_hand, plug_in, readdress, unplug},
    relay::{Mischief, Relay},
    stream::Stream,
    traffic::{Burst, new_port, transfer},
};
use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, UdpSocket},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::Duration,
};

/// Bytes of each transfer: some dozens of superpackets.
const STREAM: usize = 4 << 20;

/// How long a partition lasts: not so long that TCP's next try, each after twice the time, comes late for a test. At length, longer
/// than a claim to a PublicIP lives.
const PARTITION: (Duration, Duration) = (Duration::from_secs(3), Duration::from_secs(60));

/// Hosts in the first segment, or the second, with these flags for all daemons.
fn hosts_in(name: &str, segments: &[Segment], flags: &[&str]) -> Overlay {
    let lab = new_lab(name);
    let registry = Registry::embedded(&lab);
    let options = |&segment| HostOptions {
        segment,
        ..HostOptions::default()
    };
    let hosts: Vec<_> = segments.iter().map(|segment| (options(segment), flags)).collect();
    let overlay = Overlay::start_hosts(lab, registry, CONFIG, &hosts);
    overlay.assert_all_reach_all();
    overlay
}

/// Packets that could not be sent because there is no route.
fn unsent(status: &Status) -> u64 {
    send_errors(status).get("ENETUNREACH").copied().unwrap_or_default()
}

/// Waits until the daemon knows of a peer at this address.
fn wait_for_peer(daemon: &Daemon, public_ip: Ipv4Addr) {
    wait_for_status(daemon, &format!("the peer to be at {public_ip}"), |status| {
        status
            .peers
            .iter()
            .any(|peer| peer.public_ip == public_ip)
            .then_some(())
    });
}

#[test]
fn a_link_that_flaps_costs_what_is_sent_meanwhile_and_no_default_route_is_needed_again() {
    let mut overlay = hosts_in("nf_flap", &[Segment::First; 2], &[]);
    let [one, two] = &overlay.containers[..] else {
        unreachable!()
    };
    let before = Holdings::of(&mut overlay.daemons[0]);
    let ns = overlay.hosts[0].ns();
    for (from, to, what) in [
        (one, two, "the sender's external link is down"),
        (two, one, "the receiver's external link is down"),
    ] {
        let trial = Trial::start(what, from, to);
        let failed = unsent(&status(&overlay.daemons[0]));
        by_hand(ns, "ip link set eth0 down");
        let sent = trial.sent();
        wait_until(PATIENCE, "more datagrams to be sent", || trial.sent() > sent + 500).unwrap();
        if from.ip == one.ip {
            wait_for_status(&overlay.daemons[0], "what cannot be sent to be counted", |status| {
                (unsent(status) > failed + 500).then_some(())
            });
        }
        by_hand(ns, "ip link set eth0 up");
        trial.over();
        assert_eq!(
            run(ns, "ip route show default"),
            "",
            "it went with the link, and nobody put it back"
        );
    }
    before.assert_no_more(&mut overlay.daemons[0]);
    overlay.daemons.iter().for_each(Daemon::assert_content);
}

#[test]
fn an_address_that_goes_is_exchanged_for_another_and_taken_again_when_it_is_back() {
    let overlay = hosts_in("nf_address", &[Segment::First; 2], &[]);
    let [one, two] = &overlay.containers[..] else {
        unreachable!()
    };
    let [daemon, peer] = &overlay.daemons[..] else {
        unreachable!()
    };
    let (ns, first, other) = (overlay.hosts[0].ns(), overlay.hosts[0].ip(), public_ip(200));
    // One that wanders between hosts: it stays when the first one goes.
    ns.sysctl("ipv4/conf/eth0/promote_secondaries", "1").unwrap();
    by_hand(ns, &format!("ip address add {other}/24 dev eth0"));

    let trial = Trial::start("the address goes and another one is taken for it", one, two);
    by_hand(ns, &format!("ip address del {first}/24 dev eth0"));
    wait_for_peer(peer, other);
    trial.over();
    assert_eq!(status(daemon).external.unwrap().address, other);

    let trial = Trial::start("the address comes back behind the other one", one, two);
    by_hand(ns, &format!("ip address add {first}/24 dev eth0"));
    wait_for_peer(peer, first);
    trial.over();
    assert_eq!(status(daemon).external.unwrap().address, first);

    // Away for a moment: nothing is exchanged.
    let trial = Trial::start("the address is away for a moment", one, two);
    by_hand(ns, &format!("ip address del {first}/24 dev eth0"));
    by_hand(ns, &format!("ip address add {first}/24 dev eth0"));
    trial.over();
    wait_for_peer(peer, first);

    let trial = Trial::start("the host is given an address that nobody knew", one, two);
    by_hand(ns, &format!("ip address del {other}/24 dev eth0"));
    readdress(ns, first, public_ip(101));
    wait_for_peer(peer, public_ip(101));
    trial.over();
    // The engines changed three times, and what they counted is one sum.
    let sent = traffic_with(&status(daemon), overlay.hosts[1].ip()).sent.packets;
    let received = traffic_with(&status(peer), public_ip(101)).received.packets;
    assert!(
        sent > received,
        "{sent} of all engines, {received} from the last address"
    );
}

#[test]
fn a_default_route_that_moves_costs_nothing() {
    let overlay = hosts_in("nf_route", &[Segment::First, Segment::First, Segment::Second], &[]);
    let [one, two, three] = &overlay.containers[..] else {
        unreachable!()
    };
    let ns = overlay.hosts[0].ns();
    // Another gateway on the same link carries what goes to another one.
    by_hand(overlay.lab.switch(), "ip address add 192.168.77.253/24 dev br0");
    let trial = Trial::start("the default route moves to another gateway", one, three);
    by_hand(ns, "ip route replace default via 192.168.77.253 dev eth0");
    trial.over_without_loss();

    // Another interface, as of a VPN: the external one stays, for it was chosen and has its address.
    by_hand(ns, "ip link add vpn0 type bridge");
    by_hand(ns, "ip address add 172.16.0.1/24 dev vpn0");
    by_hand(ns, "ip link set vpn0 up");
    let on_the_link = Trial::start("the default route moves to another interface", one, two);
    let beyond = Trial::start("the default route leads to hosts on other links nowhere", one, three);
    by_hand(ns, "ip route replace default via 172.16.0.254 dev vpn0");
    assert_loses(&one.ns, three.ip);
    by_hand(ns, "ip route replace default via 192.168.77.254 dev eth0");
    assert!(!beyond.over().lost.is_empty());
    on_the_link.over_without_loss();
    assert_eq!(status(&overlay.daemons[0]).external.unwrap().interface, "eth0");
    assert!(!overlay.daemons[0].log().contains("has changed"));
}

#[test]
fn an_external_interface_that_is_made_again_is_waited_for_and_connections_hold() {
    let mut overlay = hosts_in("nf_unplug", &[Segment::First; 2], &[]);
    let [one, two] = &overlay.containers[..] else {
        unreachable!()
    };
    let trials = [(one, two), (two, one)].map(|(from, to)| {
        let what = format!(
            "the external interface of h1 is taken out and put in again, {} sends",
            from.name
        );
        Trial::start(&what, from, to)
    });
    unplug(&overlay, 0);
    overlay.daemons[0].wait_for_log("interface eth0 is gone");
    plug_in(&overlay, 0);
    trials.into_iter().for_each(|trial| drop(trial.over()));
    overlay.daemons[0].wait_for_log("following the external interface works again");
    overlay.daemons.iter_mut().for_each(Daemon::assert_running);
}

#[test]
fn a_peer_that_comes_back_with_another_public_ip_and_its_subnet_takes_its_connections_along() {
    let mut overlay = hosts_in("nf_reboot", &[Segment::First; 3], &[]);
    let subnet = overlay.subnet(1);
    let (old, new) = (overlay.hosts[1].ip(), public_ip(99));
    let [one, two, three] = &overlay.containers[..] else {
        unreachable!()
    };
    let trial = Trial::start("a peer loses power and comes back with another PublicIP", one, two);
    let bystander = Trial::start("another peer loses power", one, three);
    overlay.daemons[1].kill9();
    readdress(overlay.hosts[1].ns(), old, new);
    // The old lease is of a host that is gone, as far as anyone knows.
    let release = ["leases", "release", &subnet.to_string()];
    overlay.registry.flanneld(overlay.hosts[0].ns(), &release);
    assert_eq!(overlay.daemons[1].start_and_wait().subnet.trunc(), subnet);
    wait_for_peer(&overlay.daemons[0], new);
    trial.over();
    bystander.over_without_loss();
}

#[test]
fn connections_outlive_a_partition() {
    let (mut overlay, server) = Overlay::start_on_etcd("nf_partition", CONFIG, 3);
    overlay.assert_all_reach_all();
    let lasts = lasting(PARTITION.0, PARTITION.1);
    let patience = PATIENCE + lasts * 3;
    let [one, two, three] = &overlay.containers[..] else {
        unreachable!()
    };
    let switch = overlay.lab.switch();
    let across = [(one, two), (two, one)].map(|(from, to)| {
        let what = format!("{} is cut off from {} and from etcd for {lasts:?}", two.name, one.name);
        Trial::start_for(&what, from, to, patience)
    });
    let bystander = Trial::start("another host is cut off", one, three);
    // Without a word: the link stays up.
    by_hand(switch, "ip link set p2 nomaster");
    bystander.over_without_loss();
    // Not an event that is waited for: the fault's own length.
    thread::sleep(lasts);
    by_hand(switch, "ip link set p2 master br0");
    across.into_iter().for_each(|trial| drop(trial.over()));
    overlay.daemons.iter_mut().for_each(Daemon::assert_running);
    wait_for_status(&overlay.daemons[1], "etcd to be there again", |status| {
        status.registry.connected.then_some(())
    });
    assert_still_leased(&overlay, &server);
}

fn assert_still_leased(overlay: &Overlay, server: &EtcdServer) {
    let keys = server.etcdctl(&["get", "--prefix", "--keys-only", "/coreos.com/network/subnets/"]);
    for index in 0..overlay.daemons.len() {
        let key = overlay.subnet(index).to_string().replace('/', "-");
        assert!(keys.contains(&key), "{key} is not in {keys}");
    }
}

fn a_bad_network_changes_nothing(name: &str, flags: &[&str]) {
    let mut overlay = hosts_in(name, &[Segment::First, Segment::Second], flags);
    let relay = Relay::between_segments(&overlay.lab);
    let [one, two] = &overlay.containers[..] else {
        unreachable!()
    };
    assert_reaches(&one.ns, two.ip);

    let queues = Queues::between(one, two);
    let overflow = queues.overflow();
    let streams = [
        Stream::start(one, two, Duration::from_millis(1)),
        Stream::start(two, one, Duration::from_millis(1)),
    ];
    relay.set(Mischief {
        lose: 10,
        double: 20,
        hold_back: 20,
    });
    // TCP's content is looked at byte by byte.
    transfer(&[(one, two), (two, one)], STREAM);
    wait_until(PATIENCE, "datagrams to be treated badly", || {
        relay.done().passed > 2_000
    })
    .unwrap();
    let reports = streams.map(Stream::finish);
    let done = relay.done();
    relay.set(Mischief::default());

    let sum = |of: fn(&lab::stream::Report) -> u64| reports.iter().map(of).sum::<u64>();
    let lost = sum(|report| report.lost.len() as u64);
    println!(
        "{name}: {} of {} datagrams lost, {} doubled, {} reordered; the network did {done:?}; TCP whole",
        lost,
        sum(|report| report.sent),
        sum(|report| report.duplicates),
        sum(|report| report.reordered)
    );
    // On a machine that has no time for anyone queues may have overflowed besides.
    let overflowed = queues.overflow() - overflow;
    assert!(
        (done.lost..=done.lost + overflowed).contains(&lost),
        "nothing is lost but what the network has lost, and {overflowed} that overflowed queues"
    );
    let doubled = sum(|report| report.duplicates);
    assert!(
        (done.doubled.saturating_sub(overflowed)..=done.doubled).contains(&doubled),
        "what comes twice is delivered twice"
    );
    assert!(done.lost > 0 && done.doubled > 0 && done.held_back > 0, "{done:?}");
    assert!(sum(|report| report.reordered) > 0);

    // Superpackets whose parts overtake one another: what is merged on arrival is what belongs together.
    relay.set(Mischief {
        hold_back: 200,
        ..Mischief::default()
    });
    for (from, to) in [(one, two), (two, one)] {
        let burst = Burst {
            segment: 1_400,
            last: 700,
            count: 40,
        };
        burst.exchange(from, to);
    }
    transfer(&[(one, two), (two, one)], STREAM / 4);
    relay.set(Mischief::default());
    Trial::start("the network is good again", one, two).over_without_loss();
    overlay.daemons.iter_mut().for_each(Daemon::assert_running);
    overlay.daemons.iter().for_each(Daemon::assert_content);
}

#[test]
fn loss_doubles_and_disorder_pass_as_they_are_and_corrupt_nothing() {
    a_bad_network_changes_nothing("nf_bad", &[]);
}

#[test]
fn loss_doubles_and_disorder_corrupt_nothing_on_the_plain_path() {
    a_bad_network_changes_nothing("nf_bad_plain", &["--tun=plain", "--offload=false"]);
}

#[test]
fn loss_doubles_and_disorder_corrupt_nothing_with_io_uring() {
    match uring::probe() {
        Ok(()) => a_bad_network_changes_nothing("nf_bad_uring", &["--io=uring"]),
        Err(refused) => not_tested(&format!("a bad network under io_uring: {refused}")),
    }
}

/// Lets TCP transfers run both ways, one after the other, while `change` is made.
fn transferring(overlay: &Overlay, change: impl FnOnce()) {
    let [one, two] = &overlay.containers[..] else {
        unreachable!()
    };
    let (done, transfers) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                transfer(&[(one, two), (two, one)], STREAM);
                transfers.fetch_add(1, Ordering::Relaxed);
            }
        });
        let wait_for_more = || {
            let before = transfers.load(Ordering::Relaxed);
            // One that has begun since then.
            let more = wait_until(PATIENCE * 2, "more transfers", || {
                transfers.load(Ordering::Relaxed) > before + 1
            });
            done.store(more.is_err(), Ordering::Relaxed);
            more.unwrap();
        };
        wait_for_more();
        change();
        wait_for_more();
        done.store(true, Ordering::Relaxed);
    });
}

#[test]
fn an_interface_whose_mtu_changes_in_the_middle_of_transfers_breaks_none() {
    let overlay = hosts_in("nf_mtu", &[Segment::First; 2], &[]);
    let [one, two] = &overlay.containers[..] else {
        unreachable!()
    };
    for (external, inner) in [(1_300, 1_272), (1_500, 1_472)] {
        transferring(&overlay, || {
            for (host, daemon) in overlay.hosts.iter().zip(&overlay.daemons) {
                by_hand(host.ns(), &format!("ip link set eth0 mtu {external}"));
                wait_until(PATIENCE, "the overlay to follow", || daemon.subnet().mtu == inner).unwrap();
            }
        });
        // Containers do not know yet. Their hosts tell them, or fragment.
        Burst::of_one(1_400).exchange(one, two);
        Burst::of_one(1_400).exchange(two, one);
        Trial::start("the interface's MTU has changed", one, two).over_without_loss();
    }
}

#[test]
fn a_way_that_narrows_in_the_middle_of_transfers_breaks_none() {
    let mut overlay = hosts_in("nf_narrow", &[Segment::First, Segment::Second], &[]);
    let (ns, switch) = (overlay.hosts[0].ns(), overlay.lab.switch());
    let far = overlay.hosts[1].ip();
    let path_mtu = || run(ns, &format!("ip route get {far}"));
    assert!(!path_mtu().contains("mtu 1300"));
    transferring(&overlay, || {
        // The router answers "fragmentation needed" from now on, and drops: the outer datagrams must not be fragmented by others.
        by_hand(switch, "ip link set br1 mtu 1300");
        wait_until(PATIENCE, "the sender's kernel to be told", || {
            path_mtu().contains("mtu 1300")
        })
        .unwrap();
    });
    let [one, two] = &overlay.containers[..] else {
        unreachable!()
    };
    for payload in [1_444, 20_000] {
        Burst::of_one(payload).exchange(one, two);
        Burst::of_one(payload).exchange(two, one);
    }
    overlay.daemons[0].wait_for_log("refuses segmented messages");
    assert_eq!(
        overlay.daemons[0].subnet().mtu,
        1_472,
        "the overlay's MTU is the interface's"
    );
    Trial::start("the way is narrow", one, two).over_without_loss();
    overlay.daemons.iter_mut().for_each(Daemon::assert_running);
}

/// Sends datagrams to `to` as fast as it can until told to stop.
fn flood(from: &Container, to: Ipv4Addr, stop: &AtomicBool) {
    let socket = inside(&from.ns, || UdpSocket::bind((from.ip, 0))).unwrap();
    while !stop.load(Ordering::Relaxed) {
        // An error is that a queue is full, or an ICMP answer to an earlier datagram.
        let _ = socket.send_to(&[0xff; 1_000], (to, 9));
    }
}

#[test]
fn a_socket_that_is_full_costs_what_does_not_fit_and_nothing_that_comes() {
    let mut overlay = hosts_in("nf_full", &[Segment::First; 2], &[]);
    let [one, two] = &overlay.containers[..] else {
        unreachable!()
    };
    let ns = overlay.hosts[0].ns();
    // What waits here fills the sockets: it holds more than their buffers, and for long.
    run(ns, "tc qdisc add dev eth0 root tbf rate 10mbit burst 16kb limit 100mb");
    let queues = Queues::to(one);
    let overflow = queues.overflow();
    let coming = Stream::start(two, one, Duration::from_millis(1));
    let stop = AtomicBool::new(false);
    let refused = thread::scope(|scope| {
        scope.spawn(|| flood(one, two.ip, &stop));
        let full = try_for_status(&overlay.daemons[0], "the sockets to be full", |status| {
            let refused = send_errors(status).get("EAGAIN").copied().unwrap_or_default();
            (refused >= 1_000).then_some(refused)
        });
        let before = coming.arrived();
        let go_on = wait_until(PATIENCE, "more to come meanwhile", || coming.arrived() > before + 500);
        stop.store(true, Ordering::Relaxed);
        go_on.unwrap();
        full.unwrap()
    });
    let report = coming.finish();
    println!(
        "the sockets are full: {refused} packets refused; of {} that came the other way {} lost, the longest silence {:?}",
        report.sent,
        report.lost.len(),
        report.longest_silence
    );
    let overflowed = queues.overflow() - overflow;
    assert!(
        report.lost.len() as u64 <= overflowed,
        "{report:?}, and {overflowed} overflowed queues"
    );
    assert!(dropped(&status(&overlay.daemons[0]), "queue_full") >= refused);
    run(ns, "tc qdisc del dev eth0 root");
    Trial::start("the sockets are empty again", one, two).over_without_loss();

    // A queue that drops what does not fit says nothing to the sockets. TCP finds its rate.
    run(ns, "tc qdisc add dev eth0 root tbf rate 50mbit burst 8kb limit 20kb");
    transfer(&[(one, two), (two, one)], STREAM / 2);
    let shown = run(ns, "tc -s qdisc show dev eth0");
    let lost = shown.split("dropped ").nth(1).unwrap().split(',').next().unwrap();
    println!("a queue of 20 kB at 50 Mbit/s: {lost} datagrams dropped by it; TCP whole");
    assert_ne!(lost, "0", "{shown}");
    run(ns, "tc qdisc del dev eth0 root");
    assert_idle(&mut overlay.daemons[0]);
}

/// Datagrams sent to each peer that cannot be reached.
const VAIN: u64 = 200;

#[test]
fn a_peer_that_cannot_be_reached_costs_its_own_packets_and_is_counted_by_the_systems_error() {
    let mut overlay = hosts_in("nf_errors", &[Segment::First; 3], &["--iface=eth0"]);
    let ns = overlay.hosts[0].ns().clone();
    // No default route: who is on no link of ours is nowhere.
    by_hand(&ns, "ip route del default");
    let peers: Vec<(&str, Ipv4Addr)> = vec![
        ("EPERM", public_ip(150)),
        ("EHOSTUNREACH", public_ip(151)),
        ("EACCES", public_ip(152)),
        ("EINVAL", public_ip(153)),
        ("ENETUNREACH", Ipv4Addr::new(203, 0, 113, 9)),
    ];
    for line in [
        "nft add table inet fault",
        "nft add chain inet fault out { type filter hook output priority 0 ; }",
        "nft add rule inet fault out ip daddr 192.168.77.150 udp dport 8285 drop",
        "ip route add unreachable 192.168.77.151/32",
        "ip route add prohibit 192.168.77.152/32",
        "ip route add blackhole 192.168.77.153/32",
    ] {
        run(&ns, line);
    }
    let targets: Vec<Ipv4Addr> = peers
        .iter()
        .map(|(_, public_ip)| {
            let subnet = free_subnet(&overlay);
            let reserve = [
                "leases",
                "reserve",
                &subnet.to_string(),
                "--public-ip",
                &public_ip.to_string(),
            ];
            overlay.registry.flanneld(&ns, &reserve);
            wait_for_peer(&overlay.daemons[0], *public_ip);
            subnet.hosts().nth(8).unwrap()
        })
        .collect();
    let [one, two, three] = &overlay.containers[..] else {
        unreachable!()
    };
    let socket = inside(&one.ns, || UdpSocket::bind((one.ip, new_port()))).unwrap();
    let vainly = |to: Ipv4Addr| {
        for _ in 0..VAIN {
            // An error is an ICMP answer to an earlier one.
            while socket.send_to(&[7; 100], (to, 9)).is_err() {}
        }
    };
    let bystander = Trial::start("five peers cannot be reached, and one's daemon is dead", one, two);
    for ((error, public_ip), target) in peers.iter().zip(&targets) {
        vainly(*target);
        assert_becomes(error, &(VAIN, Some(VAIN)), || {
            let status = status(&overlay.daemons[0]);
            let unsent = traffic_with(&status, *public_ip).unsent;
            (unsent, send_errors(&status).get(*error).copied())
        });
    }
    let counted: BTreeMap<String, u64> = peers.iter().map(|(error, _)| ((*error).to_owned(), VAIN)).collect();
    let now = status(&overlay.daemons[0]);
    assert_eq!(send_errors(&now), counted);
    assert_eq!(dropped(&now, "send_failed"), VAIN * peers.len() as u64);
    assert_eq!(
        now.backend.unwrap().engine.unwrap().refusing_peers,
        0,
        "none of them minds segments"
    );

    // Its kernel answers each datagram: "port unreachable".
    let dead = overlay.hosts[2].ip();
    overlay.daemons[2].kill9();
    let sent = traffic_with(&status(&overlay.daemons[0]), dead).sent.packets;
    vainly(three.ip);
    wait_for_status(&overlay.daemons[0], "the datagrams to be sent", |status| {
        (traffic_with(status, dead).sent.packets >= sent + VAIN).then_some(())
    });
    bystander.over_without_loss();
    println!(
        "{} datagrams to five peers, counted: {counted:?}; {VAIN} to a dead daemon",
        VAIN * 5
    );
    assert_eq!(
        send_errors(&status(&overlay.daemons[0])),
        counted,
        "nothing is blamed on others"
    );
    assert_idle(&mut overlay.daemons[0]);
    overlay.daemons[2].start_and_wait();
    assert_reaches(&one.ns, three.ip);

    // Where the reason goes the packets flow again, without a restart.
    run(&ns, "nft delete table inet fault");
    vainly(targets[0]);
    wait_for_status(&overlay.daemons[0], "the firewall's peer to be sent to", |status| {
        (traffic_with(status, peers[0].1).sent.packets >= VAIN).then_some(())
    });
    Trial::start("the firewall is gone", one, two).over_without_loss();
}
