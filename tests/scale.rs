//! Thousands of hosts in a real etcd, most of them only leases: that all are known in the end, that packets flow all the while,
//! and what it costs, which is printed (`scripts/soak --scale`). Needs root.

mod lab;

use std::{
    env,
    net::Ipv4Addr,
    thread,
    time::{Duration, Instant},
};

use etcd_client::Client;
use flannel::lab::{HostOptions, wait_until};
use ipnet::Ipv4Net;
use lab::{
    Overlay, PATIENCE,
    etcd::{EtcdOptions, EtcdServer},
    flow::Flows,
    inside, new_lab,
    pour::{PREFIX, pour, runtime},
    probe::{Probe, Times},
    vitals::{Drops, Vitals, assert_accounted},
};

/// How many hosts that are only leases.
const LEASES: u32 = 10_000;

/// How many writers the storm comes from; each waits for the answer to one change before it makes the next.
const WRITERS: u32 = 50;

/// How much memory a daemon of the debug build may take for them.
const MEMORY_KIB: u64 = 150 << 10;

/// For how long it is calm before each storm, to have something to compare with.
const CALM: Duration = Duration::from_secs(2);

/// How many storms there are that come as fast as etcd can take them.
const STORMS: u32 = 3;

/// From one change to the next in a storm that leaves the machine's processors to the daemons, too.
const PACE: Duration = Duration::from_millis(1);

/// Where nobody watches.
const ELSEWHERE: &str = "/elsewhere";

/// The subnets of the leases, 10.16.0.0/24 and so on: far above those that the lab's hosts are given, which are among the first
/// hundred of 10.0.0.0/8.
fn subnet(number: u32) -> Ipv4Net {
    Ipv4Net::new_assert((0x0a10_0000 + (number << 8)).into(), 24)
}

fn record(backend: &str, number: u32, generation: u32) -> (String, String) {
    let key = format!("{PREFIX}/subnets/{}", subnet(number).to_string().replace('/', "-"));
    let public_ip = public_ip(number, generation);
    let value = match backend {
        "udp" => format!(r#"{{"PublicIP":"{public_ip}","PublicIPv6":null}}"#),
        _ => {
            let mac = format!("02:00:00:{:02x}:{:02x}:{generation:02x}", number >> 8, number & 0xff);
            format!(
                r#"{{"PublicIP":"{public_ip}","PublicIPv6":null,"BackendType":"{backend}","BackendData":{{"VNI":1,"VtepMAC":"{mac}"}}}}"#
            )
        }
    };
    (key, value)
}

/// Another one after each change.
fn public_ip(number: u32, generation: u32) -> Ipv4Addr {
    (0xac10_0000 + (generation << 16) + number).into()
}

/// Changes each record under `prefix`, one by one, from many writers at once, and no faster than `pace`; how long that took.
fn storm(
    overlay: &Overlay,
    server: &EtcdServer,
    (prefix, pace): (&str, Duration),
    backend: &str,
    generation: u32,
) -> Duration {
    let begun = Instant::now();
    inside(overlay.lab.switch(), || {
        runtime().block_on(async {
            let client = Client::connect([server.url()], None).await.unwrap();
            let writers = (0..WRITERS).map(|writer| {
                let mut client = client.kv_client();
                async move {
                    for number in (writer..LEASES).step_by(WRITERS as usize) {
                        tokio::time::sleep_until((begun + pace * number).into()).await;
                        let (key, value) = record(backend, number, generation);
                        let key = key.replacen(PREFIX, prefix, 1);
                        client.put(key, value, None).await.unwrap();
                    }
                }
            });
            futures_util::future::join_all(writers).await;
        });
    });
    begun.elapsed()
}

/// Whether the daemon of this host knows all leases as they are after this many changes.
fn knows_all(overlay: &Overlay, host: usize, generation: u32) -> bool {
    let peers = overlay.daemons[host].status().peers;
    let last = |number: u32| {
        let subnet = subnet(number).to_string();
        peers
            .iter()
            .any(|peer| peer.subnet == subnet && peer.public_ip == public_ip(number, generation))
    };
    peers.len() == LEASES as usize + 1 && last(0) && last(LEASES / 2) && last(LEASES - 1)
}

fn wait_until_all_are_known(overlay: &Overlay, generation: u32) {
    for host in 0..overlay.daemons.len() {
        wait_until(PATIENCE, &format!("h{} to know all leases", host + 1), || {
            knows_all(overlay, host, generation)
        })
        .unwrap();
    }
}

fn say(name: &str, times: &Times) {
    println!(
        "scale: round trip, {name}: median {:?}, 99 % {:?}, {} of them, {} lost",
        times.quantile(0.5),
        times.quantile(0.99),
        times.count(),
        times.lost
    );
}

/// Starts hosts into thousands of leases, changes all of these while packets flow, and takes them away.
fn thousands_of_leases_disturb_no_packet(name: &str, backend: &str) {
    let config = format!(r#"{{"Network":"10.0.0.0/8","SubnetLen":24,"Backend":{{"Type":"{backend}"}}}}"#);
    let lab = new_lab(name);
    let server = EtcdServer::start_with(EtcdOptions {
        // What a disk is good for is not the question here.
        arguments: vec!["--unsafe-no-fsync".to_owned()],
        ..EtcdOptions::on_switch(&lab)
    });
    pour(&lab, &server, (0..LEASES).map(|number| record(backend, number, 0)));
    let registry = lab::Registry::etcd(&server.url());
    let begun = Instant::now();
    let two = vec![(HostOptions::default(), &[][..]); 2];
    let mut overlay = Overlay::start_hosts(lab, registry, &config, &two);
    println!(
        "scale: {backend}: {} hosts that start at once are ready after {:?}",
        2,
        begun.elapsed()
    );
    overlay.assert_all_reach_all();
    wait_until_all_are_known(&overlay, 0);
    let calm = Vitals::of(&mut overlay.daemons[0]);
    println!(
        "scale: {backend}: {LEASES} leases: resident {} KiB, peak {} KiB",
        calm.resident, calm.peak
    );

    let drops = Drops::so_far(&overlay, &[0, 1]);
    let flows = Flows::start(&overlay.containers[0], &overlay.containers[1]);
    let probed = |doing: &mut dyn FnMut()| {
        let probe = Probe::start(&overlay.containers[0], &overlay.containers[1]);
        doing();
        probe.finish()
    };
    let (mut calm, mut elsewhere, mut storming) = (Times::default(), Times::default(), Times::default());
    let (mut took, mut busy) = (Duration::ZERO, Duration::ZERO);
    for generation in 1..=STORMS {
        calm.add(probed(&mut || thread::sleep(CALM)));
        // The machine has the same to do, and the daemons nothing.
        elsewhere.add(probed(&mut || {
            storm(&overlay, &server, (ELSEWHERE, Duration::ZERO), backend, generation);
        }));
        let before = Vitals::of(&mut overlay.daemons[0]).processor;
        storming.add(probed(&mut || {
            took += storm(&overlay, &server, (PREFIX, Duration::ZERO), backend, generation);
        }));
        wait_until_all_are_known(&overlay, generation);
        busy += Vitals::of(&mut overlay.daemons[0]).processor - before;
    }
    let paced_elsewhere = probed(&mut || {
        storm(&overlay, &server, (ELSEWHERE, PACE), backend, STORMS + 1);
    });
    let paced = probed(&mut || {
        storm(&overlay, &server, (PREFIX, PACE), backend, STORMS + 1);
    });
    wait_until_all_are_known(&overlay, STORMS + 1);
    let after = Vitals::of(&mut overlay.daemons[0]);
    say("calm", &calm);
    say("as many changes elsewhere in etcd", &elsewhere);
    say("storm", &storming);
    say("1,000 changes a second elsewhere", &paced_elsewhere);
    say("storm of 1,000 changes a second", &paced);
    println!(
        "scale: {backend}: {STORMS} times {LEASES} changes in {took:?}: {:?} of processor time for each; resident {} KiB, peak {} KiB",
        busy / (STORMS * LEASES),
        after.resident,
        after.peak
    );
    let report = flows.finish();
    assert_accounted("scale", &report, &Drops::so_far(&overlay, &[0, 1]).since(&drops));
    assert!(after.peak < MEMORY_KIB, "{after:?}");
    // Told of in few lines, though each was a change.
    let lines = overlay.daemons[0].log().lines().count();
    assert!(lines < 500 + 51 * took.as_secs() as usize, "{lines} lines");

    server.etcdctl(&["del", "--prefix", &format!("{PREFIX}/subnets/10.16")]);
    server.etcdctl(&["del", "--prefix", &format!("{PREFIX}/subnets/10.3")]);
    wait_until(PATIENCE, "the leases that are gone to be forgotten", || {
        let peers = overlay.daemons[0].status().peers;
        peers
            .iter()
            .all(|peer| !peer.subnet.starts_with("10.16.") && !peer.subnet.starts_with("10.3"))
    })
    .unwrap();
    overlay.assert_all_reach_all();
    overlay.daemons.iter_mut().for_each(lab::Daemon::assert_running);
}

#[test]
fn ten_thousand_leases_and_a_change_to_each_disturb_no_packet() {
    // The others are for the figures: they program the kernel, which takes its time in a debug build.
    let backend = env::var("FLANNEL_SCALE_BACKEND").unwrap_or_else(|_| "udp".to_owned());
    thousands_of_leases_disturb_no_packet("scale", &backend);
}
