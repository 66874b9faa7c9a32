//! An overlay at work for as long as one likes: traffic of all kinds, leases that come and go, and in the end nothing may have grown,
//! leaked, or gone missing without being counted. A minute by default; `scripts/soak` runs it for longer. Needs root.

mod lab;

use std::{
    env,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use etcd_client::{Client, Txn, TxnOp};
use flannel::lab::{Container, Namespace, Ping};
use lab::{
    Daemon, Overlay,
    etcd::{EtcdOptions, EtcdServer},
    flow::Flows,
    inside, new_lab,
    pour::{PREFIX, runtime},
    stream::Stream,
    traffic::transfer,
    vitals::{Drops, Vitals},
};
use nix::sys::signal::Signal;

/// How long it takes where nothing else is asked for.
const SECONDS: u64 = 60;

/// How many samples there are of each daemon at most.
const SAMPLES: u32 = 240;

/// How much more memory a daemon may have in the last quarter of the time than in the second, in KiB, each the median of the
/// samples. The first quarter is for buffers to grow to what the traffic needs, and for the allocator to find its size.
const GROWTH_KIB: u64 = 2 << 10;

/// Datagrams that the underlay carries in two fragments, at 200 a second.
const LONG: usize = 2_800;
const LONG_INTERVAL: Duration = Duration::from_millis(5);

/// What a TCP transfer carries at a time, and the pause between two.
const TRANSFER: usize = 2 << 20;
const TRANSFER_PAUSE: Duration = Duration::from_millis(200);

/// How often a lease comes, goes or changes.
const CHURN: Duration = Duration::from_millis(20);

/// The most merged datagrams of one message: what is counted between two engines, where a socket or a backlog overflows, may stand
/// for so many packets.
const MERGED: u64 = 64;

/// A number of seconds from the environment.
fn seconds(name: &str) -> Option<Duration> {
    let text = env::var(name).ok()?;
    Some(Duration::from_secs(
        text.parse()
            .unwrap_or_else(|_| panic!("{name}={text} is no number of seconds")),
    ))
}

/// Pseudo-random numbers (SplitMix64), the same in each run.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// Lets leases of hosts that do not exist come, move and go, and now and then records that are none, until told to stop; how many
/// changes that were. 10.5.128.0/24 and up, far above those that the lab's hosts are given.
fn churn(switch: &Namespace, etcd: &str, stop: &AtomicBool) -> u64 {
    inside(switch, || {
        runtime().block_on(async {
            let mut client = Client::connect([etcd], None).await.unwrap();
            let (mut state, mut changes) = (7, 0);
            while !stop.load(Ordering::Relaxed) {
                let number = random(&mut state);
                let key = format!("{PREFIX}/subnets/10.5.{}.0-24", 128 + number % 128);
                let value = format!(
                    r#"{{"PublicIP":"192.168.77.{}","PublicIPv6":null}}"#,
                    100 + (number >> 8) % 150
                );
                // Fails while etcd is started anew: that change is left out then.
                let done = match (number >> 32) % 100 {
                    0..50 => client.put(key, value, None).await.is_ok(),
                    50..90 => client.delete(key, None).await.is_ok(),
                    90..95 => client.put(key, "{broken", None).await.is_ok(),
                    95..98 => client.put(format!("{key}{}", number % 7), value, None).await.is_ok(),
                    // All at once.
                    _ => {
                        let all = (128..=255).map(|third| {
                            TxnOp::put(format!("{PREFIX}/subnets/10.5.{third}.0-24"), value.clone(), None)
                        });
                        let txn = Txn::new().and_then(all.collect::<Vec<_>>());
                        client.txn(txn).await.is_ok()
                    }
                };
                changes += u64::from(done);
                tokio::time::sleep(CHURN).await;
            }
            changes
        })
    })
}

/// Carries bytes over TCP, round after round, and looks at each; how many.
fn transfers(pairs: &[(&Container, &Container)], stop: &AtomicBool) -> u64 {
    let mut carried = 0;
    while !stop.load(Ordering::Relaxed) {
        transfer(pairs, TRANSFER);
        carried += (TRANSFER * pairs.len()) as u64;
        thread::sleep(TRANSFER_PAUSE);
    }
    carried
}

/// Pings until told to stop, ten a second.
fn pings(from: &Container, to: &Container, stop: &AtomicBool) -> Ping {
    let mut all = Ping {
        sent: 0,
        received: 0,
        ttl: None,
        rtt: None,
    };
    while !stop.load(Ordering::Relaxed) {
        let round = lab::ping(&from.ns, to.ip, 10);
        all.sent += round.sent;
        all.received += round.received;
    }
    all
}

/// Takes samples of all daemons but the last until the end, and of that if it is left alone; meanwhile the last one and etcd are started anew every now and then.
fn look_on(daemons: &mut [Daemon], server: &mut EtcdServer, length: Duration) -> (Vec<Vec<Vitals>>, u32) {
    let (restart, restart_etcd) = (seconds("FLANNEL_SOAK_RESTART"), seconds("FLANNEL_SOAK_RESTART_ETCD"));
    let begun = Instant::now();
    let mut next_restart = restart.map(|every| begun + every);
    let mut next_etcd = restart_etcd.map(|every| begun + every);
    let sampled = daemons.len() - usize::from(restart.is_some());
    let mut samples = vec![Vec::new(); sampled];
    let mut restarts = 0;
    let interval = (length / SAMPLES).max(Duration::from_millis(250));
    while begun.elapsed() < length {
        for (daemon, samples) in daemons.iter_mut().zip(&mut samples) {
            daemon.assert_running();
            samples.push(Vitals::of(daemon));
        }
        if let (Some(every), Some(at)) = (restart, next_restart)
            && at <= Instant::now()
        {
            let last = daemons.last_mut().unwrap();
            match restarts % 2 {
                0 => assert!(last.end_with(Signal::SIGTERM).success()),
                _ => last.kill9(),
            }
            last.start_and_wait();
            restarts += 1;
            next_restart = Some(Instant::now() + every);
        }
        if let (Some(every), Some(at)) = (restart_etcd, next_etcd)
            && at <= Instant::now()
        {
            server.restart();
            restarts += 1;
            next_etcd = Some(Instant::now() + every);
        }
        thread::sleep(interval);
    }
    (samples, restarts)
}

fn median(values: impl Iterator<Item = u64>) -> u64 {
    let mut values: Vec<u64> = values.collect();
    values.sort_unstable();
    values[values.len() / 2]
}

/// The samples of this quarter of the time, from 0 to 3.
fn quarter(samples: &[Vitals], number: usize) -> &[Vitals] {
    &samples[samples.len() * number / 4..samples.len() * (number + 1) / 4]
}

/// Fails the test if a daemon has grown; says how it is.
fn assert_flat(name: &str, samples: &[Vitals]) {
    let resident = |number| median(quarter(samples, number).iter().map(|vitals| vitals.resident));
    // Some are there for a moment only, such as a netlink socket, or a thread that writes a file; what is leaked stays.
    let descriptors = |number| quarter(samples, number).iter().map(|vitals| vitals.descriptors).min();
    let threads = |number| quarter(samples, number).iter().map(|vitals| vitals.threads).min();
    let [memory, open, running] = [
        format!("{} and {} KiB", resident(1), resident(3)),
        format!("{:?} and {:?}", descriptors(1).unwrap(), descriptors(3).unwrap()),
        format!("{} and {}", threads(1).unwrap(), threads(3).unwrap()),
    ];
    let processor = samples.last().unwrap().processor - samples[0].processor;
    println!("| {name} | memory {memory} | descriptors {open} | threads {running} | processor time {processor:.1?} |");
    assert!(resident(3) <= resident(1) + GROWTH_KIB, "{name} has grown: {memory}");
    assert!(descriptors(3) <= descriptors(1), "{name} leaks descriptors: {open}");
    assert_eq!(threads(1), threads(3), "threads of {name}");
}

/// What the engine of one host has sent to another's, and that has received from it.
fn between(overlay: &Overlay, from: usize, to: usize) -> (u64, u64) {
    let traffic = |at: usize, peer: usize| {
        let peers = overlay.daemons[at].status().peers;
        let peer = peers
            .into_iter()
            .find(|known| known.public_ip == overlay.hosts[peer].ip())
            .unwrap();
        peer.traffic.unwrap()
    };
    (traffic(from, to).sent.packets, traffic(to, from).received.packets)
}

#[test]
fn an_overlay_at_work_neither_grows_nor_leaks_nor_loses_what_it_does_not_count() {
    let length = seconds("FLANNEL_SOAK_SECONDS").unwrap_or(Duration::from_secs(SECONDS));
    let lab = new_lab("soak");
    let mut server = EtcdServer::start_with(EtcdOptions::on_switch(&lab));
    let registry = lab::Registry::etcd(&server.url());
    let mut overlay = Overlay::start_on(lab, registry, lab::CONFIG, 3);
    overlay.assert_all_reach_all();
    // What is exchanged with the third host, which may be started anew, is looked at by its content only.
    let alone = seconds("FLANNEL_SOAK_RESTART").is_none();
    let accounted: &[usize] = if alone { &[0, 1, 2] } else { &[0, 1] };
    let before = Drops::so_far(&overlay, accounted);
    let (sent_before, received_before) = between(&overlay, 0, 1);

    let stop = AtomicBool::new(false);
    let Overlay {
        daemons,
        containers,
        lab,
        ..
    } = &mut overlay;
    let (switch, etcd) = (lab.switch().clone(), server.url());
    let [one, two, three] = &containers[..] else {
        unreachable!("three hosts were started")
    };
    let flows = Flows::start(one, two);
    let long = Stream::start_long(two, one, LONG_INTERVAL, LONG);
    let (samples, restarts, changes, carried, ping) = thread::scope(|scope| {
        let churning = scope.spawn(|| churn(&switch, &etcd, &stop));
        let transferring = scope.spawn(|| transfers(&[(one, two), (two, three), (three, one)], &stop));
        let pinging = scope.spawn(|| pings(one, two, &stop));
        let (samples, restarts) = look_on(daemons, &mut server, length);
        stop.store(true, Ordering::Relaxed);
        let changes = churning.join().unwrap();
        (
            samples,
            restarts,
            changes,
            transferring.join().unwrap(),
            pinging.join().unwrap(),
        )
    });
    let (small, long) = (flows.finish(), long.finish());

    let drops = Drops::so_far(&overlay, accounted).since(&before);
    let (sent, received) = between(&overlay, 0, 1);
    let (sent, received) = (sent - sent_before, received - received_before);
    println!("| soak of {length:?} | {changes} changes of leases | {restarts} restarts |");
    for (number, samples) in (1..).zip(&samples) {
        assert_flat(&format!("daemon {number}"), samples);
    }
    println!(
        "| UDP, 8 bytes | {} sent | {} lost | {} twice |",
        small.sent,
        small.lost.len(),
        small.duplicates
    );
    println!(
        "| UDP, {LONG} bytes | {} sent | {} lost | {} twice |",
        long.sent,
        long.lost.len(),
        long.duplicates
    );
    println!("| ping | {} sent | {} lost | |", ping.sent, ping.sent - ping.received);
    println!("| TCP | {} MiB carried, each byte as it was sent | | |", carried >> 20);
    println!("| from engine to engine | {sent} packets sent | {received} received | counted {drops:?} |");
    let lost = small.lost.len() + long.lost.len() + (ping.sent - ping.received) as usize;
    assert!(
        lost as u64 <= drops.all(),
        "{lost} are missing, and only {drops:?} are accounted for"
    );
    assert_eq!(small.duplicates + long.duplicates, 0, "nothing arrives twice");
    assert!(
        received <= sent && sent - received <= (drops.sockets + drops.backlogs) * MERGED,
        "{sent} sent, {received} received, {drops:?}"
    );
    assert!(carried > 0 && changes > 0 && ping.received > 0);
    overlay.assert_all_reach_all();
}
