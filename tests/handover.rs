//! `flanneld --handover` under traffic: the new daemon goes on where the running one ends, and the running one goes on where the
//! new one fails. Needs root.

mod lab;

use flannel::{
    handover::wire::{Connection, Hello, MAJOR, ToHeir, ToRunning},
    lab::{HostOptions, LabError, wait_for, wait_until},
    observe::status::{Status, Worker},
};
use lab::{
    CONFIG, Daemon, Overlay, PATIENCE, Registry, etcd::EtcdServer, flow::BothWays, new_lab, pair::Asleep,
    supervisor::Supervisor, tunnel_device,
};
use nix::sys::signal::Signal;
use std::{fs, os::fd::OwnedFd, path::Path, time::Duration};
use tokio::net::{UnixListener, UnixStream};

/// Two hosts with a container each, on an etcd.
fn pair(name: &str, backend: &str) -> (Overlay, EtcdServer) {
    let config = format!(r#"{{"Network":"10.5.0.0/16","Backend":{{"Type":"{backend}"}}}}"#);
    let (overlay, etcd) = Overlay::start_on_etcd(name, &config, 2);
    overlay.assert_all_reach_all();
    (overlay, etcd)
}

fn status(overlay: &Overlay) -> Status {
    overlay.daemons[0].status()
}

/// What the queues of both hosts had no room for.
fn overflowed(overlay: &Overlay) -> u64 {
    overlay.daemons.iter().map(Daemon::overflowed).sum()
}

/// What the first host's daemon has counted: packets sent and received by its engine and with its peer, and requests answered.
fn counted(status: &Status) -> [u64; 5] {
    let engine = status.backend.as_ref().and_then(|backend| backend.engine.as_ref());
    let total = engine.map_or_else(Worker::default, |engine| Worker::total(&engine.workers));
    let peer = status.peers[0].traffic.unwrap_or_default();
    let answered = status
        .registry
        .requests
        .values()
        .map(|requests| requests.answered)
        .sum();
    [
        total.sent.packets,
        total.received.packets,
        peer.sent.packets,
        peer.received.packets,
        answered,
    ]
}

/// The lease and the claim of the first host as they stand in the registry: with key, value and revision.
fn records(overlay: &Overlay, etcd: &EtcdServer) -> [String; 2] {
    let subnet = overlay.subnet(0).to_string().replace('/', "-");
    [format!("subnets/{subnet}"), format!("hosts/{}", overlay.hosts[0].ip())]
        .map(|key| etcd.etcdctl(&["get", "-w", "fields", &format!("/coreos.com/network/{key}")]))
        .map(|fields| {
            let fields = fields.lines().filter(|line| {
                ["\"Key\"", "\"Value\"", "\"ModRevision\"", "\"Lease\""]
                    .iter()
                    .any(|name| line.starts_with(name))
            });
            let fields: Vec<&str> = fields.collect();
            assert_eq!(fields.len(), 4, "{fields:?}");
            fields.join("\n")
        })
}

/// What a running daemon says of a new one that had no processor for half a second; it may try again.
const TOO_SLOW: &str = "did not start within";

/// 500 datagrams, and messages over TCP, a second: a queue holds those of nearly two seconds, in which a new daemon's workers run on
/// a busy machine, too.
const PACE: Duration = Duration::from_millis(2);

/// How often a busy machine may make a new daemon too slow.
const TRIES: usize = 5;

/// Lets a new daemon take over from the first host's, which then is the first host's; the one before.
fn hand_over(overlay: &mut Overlay, name: &str, flags: &[&str]) -> Daemon {
    for number in 0..TRIES {
        let mut heir = overlay.daemons[0].heir(&format!("{name}.{number}"));
        heir.set_flags(&[&["--handover"], flags].concat());
        heir.start();
        let over = wait_for(PATIENCE, "one of the two daemons to end", || {
            let given_up = heir.process().exited().map(|_| false);
            let handed_over = overlay.daemons[0].process().exited().map(|_| true);
            Ok::<_, LabError>(given_up.or(handed_over))
        });
        if !over.unwrap() {
            assert!(heir.log().contains(TOO_SLOW), "{}", heir.log());
            continue;
        }
        heir.wait_ready();
        let mut before = std::mem::replace(&mut overlay.daemons[0], heir);
        let ended = before.wait_exit();
        assert_eq!(ended.code(), Some(0), "{}", before.log());
        overlay.daemons[0].assert_content();
        return before;
    }
    panic!("{TRIES} new daemons were too slow: {}", overlay.daemons[0].log());
}

#[test]
fn a_new_daemon_takes_everything_over_and_no_packet_is_lost() {
    let (mut overlay, etcd) = pair("handover", "udp");
    let (device_before, records_before, subnet) = (
        tunnel_device(overlay.hosts[0].ns()),
        records(&overlay, &etcd),
        overlay.daemons[0].subnet(),
    );
    let flows = BothWays::start_every(&overlay, PACE);
    let mut before = status(&overlay);
    for (number, io) in ["uring", "mmsg", "mmsg", "uring", "uring", "mmsg"]
        .into_iter()
        .enumerate()
    {
        let ended = hand_over(&mut overlay, &format!("heir{number}"), &[&format!("--io={io}")]);
        if !ended.log().contains(TOO_SLOW) {
            ended.assert_content();
        }
        let now = status(&overlay);
        assert_ne!(now.pid, before.pid);
        let (was, is) = (counted(&before), counted(&now));
        assert!(was.iter().zip(is).all(|(was, is)| is > *was), "{was:?}, then {is:?}");
        assert_eq!(tunnel_device(overlay.hosts[0].ns()), device_before);
        assert_eq!(records(&overlay, &etcd), records_before);
        assert_eq!(overlay.daemons[0].subnet(), subnet);
        before = now;
    }
    let lost = flows.finish();
    eprintln!("6 handovers: {lost:?}");
    assert!(lost.most() as u64 <= overflowed(&overlay), "{lost:?}");
    // What it has taken over it lets go of as any other.
    assert!(overlay.daemons[0].stop().success());
    assert!(!overlay.hosts[0].ns().ip("-br link").unwrap().contains("flannel0"));
    assert_eq!(
        etcd.etcdctl(&["get", &format!("/coreos.com/network/hosts/{}", overlay.hosts[0].ip())]),
        ""
    );
    overlay.daemons[0].start_and_wait();
}

#[test]
fn where_the_kernel_carries_the_packets_lease_and_counts_go_over() {
    for backend in ["vxlan", "host-gw"] {
        let (mut overlay, etcd) = pair(&format!("kernel_{backend}").replace('-', "_"), backend);
        let records_before = records(&overlay, &etcd);
        let flows = BothWays::start(&overlay);
        let before = status(&overlay);
        hand_over(&mut overlay, "heir", &[]);
        let now = status(&overlay);
        assert!(counted(&now)[4] > counted(&before)[4]);
        assert_eq!(records(&overlay, &etcd), records_before);
        assert_eq!(flows.finish().most(), 0);
    }
}

/// Runs what speaks the handover's language.
fn speak<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(work)
}

async fn connect(path: &Path) -> Connection {
    Connection::new(UnixStream::connect(path).await.unwrap())
}

/// What the running daemon says next.
async fn hear(connection: &mut Connection) -> Option<ToHeir> {
    let heard = tokio::time::timeout(PATIENCE, connection.recv()).await;
    heard.expect("the running daemon answers").unwrap()
}

/// A new daemon that has said hello and was given everything.
async fn given(path: &Path) -> (Connection, Vec<OwnedFd>) {
    let mut connection = connect(path).await;
    connection.send(&ToRunning::Hello(Hello::own()), &[]).await.unwrap();
    let heard = hear(&mut connection).await;
    let Some(ToHeir::Hello(offer)) = heard else {
        panic!("nothing is offered: {heard:?}")
    };
    let descriptors: Vec<OwnedFd> = offer.descriptors.iter().map(|_| connection.take().unwrap()).collect();
    (connection, descriptors)
}

async fn stopped(connection: &mut Connection) {
    connection.send(&ToRunning::Prepared, &[]).await.unwrap();
    let heard = hear(connection).await;
    assert!(matches!(heard, Some(ToHeir::Stopped(_))), "{heard:?}");
}

#[test]
fn the_running_daemon_goes_on_wherever_the_new_one_fails() {
    let (mut overlay, etcd) = pair("fails", "udp");
    let records_before = records(&overlay, &etcd);
    let socket = overlay.daemons[0].handover_socket();
    // So few that the device's queue of 1,000 holds what comes while a new daemon hangs, on a busy machine too.
    let flows = BothWays::start_every(&overlay, Duration::from_millis(5));
    let before = counted(&status(&overlay));
    speak(async {
        // It goes without a word; with everything; when the running one has stopped.
        drop(connect(&socket).await);
        drop(given(&socket).await);
        let (mut connection, descriptors) = given(&socket).await;
        stopped(&mut connection).await;
        drop((connection, descriptors));
        // It hangs when the running one has stopped.
        let (mut connection, _descriptors) = given(&socket).await;
        stopped(&mut connection).await;
        assert!(matches!(hear(&mut connection).await, Some(ToHeir::TakenBack { .. })));
        assert_eq!(hear(&mut connection).await, None);
        // It ends as soon as it carries packets: the running one hears both at once.
        let (mut connection, descriptors) = given(&socket).await;
        stopped(&mut connection).await;
        let asleep = Asleep::of(&mut overlay.daemons[0]);
        connection.send(&ToRunning::Running, &[]).await.unwrap();
        drop((connection, descriptors, asleep));
        // It talks rubbish.
        let (mut connection, _descriptors) = given(&socket).await;
        connection.send(&"rubbish", &[]).await.unwrap();
        assert_eq!(hear(&mut connection).await, None);
        // There is one new daemon at a time, and another when it is gone.
        let (one, _descriptors) = given(&socket).await;
        let mut other = connect(&socket).await;
        other.send(&ToRunning::Hello(Hello::own()), &[]).await.unwrap();
        let Some(ToHeir::Refused { reason }) = hear(&mut other).await else {
            panic!("two at a time")
        };
        assert!(reason.contains("just taking over"), "{reason}");
        drop(one);
    });
    // A real one, killed while it prepares: the registry does not let it go on.
    let mut heir = overlay.daemons[0].heir("killed");
    heir.set_flags(&["--handover", "--etcd-prefix=/nowhere"]);
    heir.start();
    heir.wait_for_log("no network configuration");
    heir.kill9();

    let now = counted(&status(&overlay));
    assert!(
        now.iter().zip(before).all(|(now, before)| *now >= before),
        "{before:?}, then {now:?}"
    );
    assert!(
        now[..4].iter().zip(before).all(|(now, before)| *now > before),
        "{before:?}, then {now:?}"
    );
    let lost = flows.finish();
    eprintln!("failed handovers: {lost:?}");
    assert!(lost.most() as u64 <= overflowed(&overlay), "{lost:?}");
    overlay.daemons[0].assert_running();
    assert_eq!(records(&overlay, &etcd), records_before);
    // And hands over when one comes that does not fail.
    hand_over(&mut overlay, "heir", &[]);
}

#[test]
fn another_version_is_refused_in_words_and_the_running_daemon_goes_on() {
    let (mut overlay, _etcd) = pair("version", "udp");
    let socket = overlay.daemons[0].handover_socket();
    speak(async {
        let mut connection = connect(&socket).await;
        let hello = serde_json::json!({"message": "hello", "major": MAJOR + 1, "version": "9.0.0", "colour": "blue"});
        connection.send(&hello, &[]).await.unwrap();
        let Some(ToHeir::Refused { reason }) = hear(&mut connection).await else {
            panic!("not refused")
        };
        assert!(reason.contains(&format!("version {}", MAJOR + 1)), "{reason}");
    });
    overlay.daemons[0].wait_for_log("refusing to hand over to flanneld 9.0.0");
    overlay.daemons[0].assert_running();

    // The other way round: a running daemon of a later version, that offers all the same.
    let mut heir = overlay.daemons[0].heir("heir");
    let elsewhere = overlay.lab.dir().join("later.handover");
    speak(async {
        let listener = UnixListener::bind(&elsewhere).unwrap();
        heir = overlay.daemons[0].heir("heir").with(format!(
            "--status-socket={}",
            elsewhere.with_extension("sock").display()
        ));
        heir.start();
        let mut connection = Connection::new(listener.accept().await.unwrap().0);
        let Some(ToRunning::Hello(hello)) = connection.recv().await.unwrap() else {
            panic!("no hello")
        };
        assert_eq!(hello.major, MAJOR);
        let offer = serde_json::json!({
            "message": "hello", "major": MAJOR + 1, "version": "9.0.0", "pid": 1, "network_namespace": 1, "backend": "udp",
            "public_ip": "192.0.2.1", "subnets": "10.5.1.0-24"
        });
        connection.send(&offer, &[]).await.unwrap();
    });
    assert_eq!(heir.wait_exit().code(), Some(1));
    assert!(
        heir.log().contains("the running flanneld 9.0.0 speaks version"),
        "{}",
        heir.log()
    );
    overlay.assert_all_reach_all();
}

#[test]
fn a_new_daemon_that_would_do_something_else_says_so_and_ends() {
    let (mut overlay, _etcd) = pair("differs", "udp");
    let flows = BothWays::start(&overlay);
    for (name, flag, said) in [
        ("offload", "--offload=false", "--offload is another now"),
        ("address", "--public-ip=192.168.77.99", "has the PublicIP 192.168.77.1"),
    ] {
        let mut heir = overlay.daemons[0].heir(name);
        heir.set_flags(&["--handover", flag]);
        heir.start();
        assert_eq!(heir.wait_exit().code(), Some(1), "{}", heir.log());
        assert!(heir.log().contains(said), "{said} is not in {}", heir.log());
        overlay.daemons[0].assert_running();
    }
    // What can be another is.
    hand_over(&mut overlay, "pinned", &["--workers=7", "--pin", "--busy-poll=10"]);
    assert!(flows.finish().most() as u64 <= overflowed(&overlay));
    overlay.daemons[0].wait_for_log("a restart makes them 7");
}

#[test]
fn without_a_running_daemon_it_starts_as_always() {
    let mut lab = new_lab("nobody");
    let host = lab.host("h1").unwrap();
    let registry = Registry::embedded(&lab);
    registry.configure(host.ns(), CONFIG);
    let mut daemon = Daemon::new(&lab, &host, &registry).with("--handover");
    for _ in 0..2 {
        daemon.start_and_wait();
        daemon.wait_for_log("there is nothing to take over");
        // Its socket stays behind.
        daemon.kill9();
    }
}

#[test]
fn a_daemon_that_dies_in_the_midst_is_succeeded_all_the_same() {
    let lab = new_lab("dies");
    let registry = Registry::embedded(&lab);
    let mut overlay = Overlay::start_hosts(lab, registry, CONFIG, &[(HostOptions::default(), &[])]);
    let subnet = overlay.daemons[0].subnet();
    let socket = overlay.daemons[0].handover_socket();
    // Its last words, and all that it has.
    let offer = speak(async {
        let mut connection = connect(&socket).await;
        connection.send(&ToRunning::Hello(Hello::own()), &[]).await.unwrap();
        let Some(ToHeir::Hello(offer)) = hear(&mut connection).await else {
            panic!("nothing is offered")
        };
        let descriptors: Vec<OwnedFd> = offer.descriptors.iter().map(|_| connection.take().unwrap()).collect();
        (offer, descriptors)
    });
    overlay.daemons[0].kill9();
    let mut heir = overlay.daemons[0].heir("heir");
    fs::remove_file(&socket).unwrap();
    speak(async {
        let listener = UnixListener::bind(&socket).unwrap();
        heir.start();
        let mut connection = Connection::new(listener.accept().await.unwrap().0);
        assert!(matches!(connection.recv().await.unwrap(), Some(ToRunning::Hello(_))));
        let (offer, descriptors) = offer;
        connection.send(&ToHeir::Hello(offer), &descriptors).await.unwrap();
        assert_eq!(connection.recv().await.unwrap(), Some(ToRunning::Prepared));
    });
    assert_eq!(heir.wait_ready(), subnet);
    assert!(heir.log().contains("has ended before it has handed over"));
    overlay.daemons[0] = heir;
    let answers = lab::output_of(&overlay.containers[0].ns, "ping", ["-n", "-c1", "-W2", "10.5.255.9"]);
    assert!(answers.contains("Net Unreachable"), "{answers}");
}

#[test]
fn a_supervisor_learns_of_the_new_daemon_and_keeps_its_descriptors() {
    let (mut overlay, _etcd) = pair("mainpid", "udp");
    overlay.daemons[0].stop();
    let host = &overlay.hosts[0];
    overlay.daemons[0] = Daemon::named("unit", &overlay.lab, host, &overlay.registry).supervised(64);
    overlay.daemons[0].start_and_wait();
    overlay.assert_all_reach_all();
    let flows = BothWays::start(&overlay);
    // By hand, outside the service; first one that fails.
    let mut misfit = overlay.daemons[0].heir("misfit").unsupervised();
    misfit.set_flags(&["--handover", "--offload=false"]);
    misfit.start();
    assert_eq!(misfit.wait_exit().code(), Some(1), "{}", misfit.log());
    let mut heir = overlay.daemons[0].heir("heir").unsupervised();
    heir.start();
    let pid = heir.process().pid();
    assert!(overlay.daemons[0].wait_exit().success());
    let supervisor: &Supervisor = overlay.daemons[0].supervisor();
    wait_until(PATIENCE, "the supervisor to learn of the new daemon", || {
        supervisor.was_told(&format!("MAINPID={pid}")) && supervisor.was_told("READY=1")
    })
    .unwrap();
    assert!(!supervisor.was_told("STOPPING=1"));
    heir.assert_content();
    // Which is killed, and started again by the supervisor.
    heir.end_with(Signal::SIGKILL);
    overlay.daemons[0].start_and_wait();
    let lost = flows.finish();
    eprintln!("handover and kill -9 under a supervisor: {lost:?}");
    // A worker may have had a batch in its hands.
    assert!(lost.most() as u64 <= 64 + overflowed(&overlay), "{lost:?}");
    // The new daemon has spoken when it was the main process, and the one that failed not at all.
    assert_eq!(overlay.daemons[0].supervisor().refused(), [""; 0]);
    overlay.assert_all_reach_all();
}

#[test]
fn a_daemon_that_is_stopped_while_another_prepares_leaves_that_reachable() {
    let (mut overlay, etcd) = pair("stopped", "udp");
    overlay.daemons[0].wait_until_remembered(1);
    let mut heir = overlay.daemons[0].heir("heir");
    // So that it is not prepared at once.
    etcd.pause();
    heir.start();
    heir.wait_for_log("taking over from flanneld");
    let asleep = Asleep::of(&mut heir);
    etcd.resume();
    assert!(overlay.daemons[0].stop().success());
    drop(asleep);
    heir.wait_ready();
    heir.wait_for_log("has ended before it has handed over");
    overlay.daemons[0] = heir;
    let pid = overlay.daemons[0].process().pid();
    assert_eq!(status(&overlay).pid, pid);
    overlay.assert_all_reach_all();
    hand_over(&mut overlay, "next", &[]);
}
