//! A flood starves nobody, and without traffic a daemon costs nothing. Needs root.

mod lab;

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use flannel::lab::{Container, HostOptions, wait_until};
use lab::{
    CONFIG, Daemon, Overlay, PATIENCE, Registry, inside, new_lab,
    plain_peer::free_subnet,
    traffic::{new_port, transfer},
};

/// Nobody has this address in the underlay.
const NOBODY: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 200);

/// Flows that a flood consists of, so that it keeps each worker busy.
const FLOOD_FLOWS: usize = 8;

/// What a flood begins with: more than what fits the queues on its way.
const FLOOD_START: u64 = 20_000;

/// What it ends after, whatever becomes of the test: more than one processor sends in the time that it has.
const FLOOD_LIMIT: u64 = 100_000_000;
const FLOOD_TIME: Duration = PATIENCE.saturating_mul(5);

/// How often something is asked during a flood, and for how long an answer is waited for before the next question: one that is
/// late counts all the same.
const QUESTIONS: u64 = 1_500;
const ANSWER_WAIT: Duration = Duration::from_millis(5);

/// Answers that show that somebody is not starved: to one question in 300. On a machine that was overrun, a daemon built without
/// optimisation was seen to leave one in 20 through.
const ANSWERS: u64 = 5;

/// How long a daemon is watched doing nothing.
const IDLE: Duration = Duration::from_secs(2);

/// Processor time that it may use meanwhile, in ticks of 10 ms (`USER_HZ`): a tenth of what one thread that spins would. Its
/// timers use less than one.
const IDLE_TICKS: u64 = 20;

/// Sends to `target` as fast as it can until told to stop, and counts what it has sent.
fn flood(from: &Container, target: SocketAddr, sent: &AtomicU64, stop: &AtomicBool) {
    let bind = |_| inside(&from.ns, || UdpSocket::bind((from.ip, new_port()))).unwrap();
    let sockets: Vec<_> = (0..FLOOD_FLOWS).map(bind).collect();
    let start = Instant::now();
    while sent.load(Ordering::Relaxed) < FLOOD_LIMIT && start.elapsed() < FLOOD_TIME && !stop.load(Ordering::Relaxed) {
        for socket in &sockets {
            // An error is that a queue is full, or an ICMP answer to an earlier datagram.
            let _ = socket.send_to(&[0xff; 300], target);
            sent.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Sends back what comes, until told to stop.
fn echo(socket: &UdpSocket, stop: &AtomicBool) {
    // Short, since in between it is looked whether to stop.
    socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    let mut question = [0; 8];
    while !stop.load(Ordering::Relaxed) {
        // An error is that nothing came, or that an answer was lost.
        let _ = socket
            .recv_from(&mut question)
            .and_then(|(_, from)| socket.send_to(&question, from));
    }
}

/// Asks until there are enough answers; how many there are.
fn ask(from: &Container, to: SocketAddr) -> u64 {
    let socket = inside(&from.ns, || UdpSocket::bind((from.ip, new_port()))).unwrap();
    socket.set_read_timeout(Some(ANSWER_WAIT)).unwrap();
    socket.connect(to).unwrap();
    let answered = (0..QUESTIONS).filter(|question| {
        let mut answer = [0; 8];
        let asked = socket.send(&question.to_be_bytes());
        asked.and_then(|_| socket.recv(&mut answer)).is_ok()
    });
    answered.take(ANSWERS as usize).count() as u64
}

/// Tells threads to stop when it goes, however that comes about.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Fails the test unless, while one of the containers floods an address, the first of each pair of containers gets answers from
/// the second.
fn assert_fair(containers: &[Container], (flooder, target): (usize, SocketAddr), pairs: &[(usize, usize)]) {
    // One flood at a time, on a machine that is not only for them.
    static FLOOD: Mutex<()> = Mutex::new(());
    let _alone = FLOOD.lock().unwrap_or_else(PoisonError::into_inner);
    let bind = |container: &Container| inside(&container.ns, || UdpSocket::bind((container.ip, new_port()))).unwrap();
    let echoes: Vec<_> = containers.iter().map(bind).collect();
    let (stop, sent) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        let stopping = Stop(&stop);
        for socket in &echoes {
            scope.spawn(|| echo(socket, &stop));
        }
        let flood = scope.spawn(|| flood(&containers[flooder], target, &sent, &stop));
        wait_until(PATIENCE, "the flood", || sent.load(Ordering::Relaxed) > FLOOD_START).unwrap();
        for &(from, to) in pairs {
            let answers = ask(&containers[from], echoes[to].local_addr().unwrap());
            let (from, to) = (&containers[from].name, &containers[to].name);
            assert_eq!(
                answers, ANSWERS,
                "so few of {QUESTIONS} questions from {from} to {to} were answered"
            );
        }
        assert!(!flood.is_finished(), "the flood has ended too early");
        drop(stopping);
    });
}

fn three_hosts(name: &str, flags: &[&str]) -> Overlay {
    let lab = new_lab(name);
    let registry = Registry::embedded(&lab);
    let host = (HostOptions::default(), flags);
    let overlay = Overlay::start_hosts(lab, registry, CONFIG, &[host.clone(), host.clone(), host]);
    overlay.assert_all_reach_all();
    overlay
}

fn a_flood_starves_nobody(name: &str, flags: &[&str]) {
    let mut overlay = three_hosts(name, flags);
    let containers = &overlay.containers;
    // Nobody reads it, but its port sends no errors back either.
    let two = &containers[1];
    let sink = inside(&two.ns, || UdpSocket::bind((two.ip, new_port()))).unwrap();
    let target = sink.local_addr().unwrap();
    // From the host that it leaves: to another peer, and back. From the host that it fills: against it, and to another peer.
    assert_fair(containers, (0, target), &[(0, 2), (2, 0), (1, 0), (1, 2)]);
    sink.set_read_timeout(Some(PATIENCE)).unwrap();
    assert!(sink.recv(&mut [0; 300]).is_ok(), "the flood itself arrives nowhere");
    overlay.daemons.iter_mut().for_each(Daemon::assert_running);
}

#[test]
fn a_flood_starves_nobody_with_one_worker() {
    a_flood_starves_nobody("flood_1", &["--workers=1", "--io=mmsg"]);
}

#[test]
fn a_flood_starves_nobody_with_two_workers() {
    a_flood_starves_nobody("flood_2", &["--workers=2", "--io=mmsg"]);
}

#[test]
fn a_flood_starves_nobody_on_the_plain_path() {
    a_flood_starves_nobody("flood_plain", &["--tun=plain", "--offload=false"]);
}

#[test]
fn a_flood_starves_nobody_with_io_uring() {
    a_flood_starves_nobody("flood_uring", &["--workers=1", "--io=uring"]);
}

#[test]
fn a_flood_towards_a_peer_that_is_gone_starves_nobody() {
    let overlay = three_hosts("flood_gone", &["--workers=1"]);
    let gone = free_subnet(&overlay);
    let reserve = [
        "leases",
        "reserve",
        &gone.to_string(),
        "--public-ip",
        &NOBODY.to_string(),
    ];
    overlay.registry.flanneld(overlay.hosts[0].ns(), &reserve);
    overlay.daemons[0].wait_for_log(&format!("peer {gone} at {NOBODY}"));
    let target = SocketAddr::from((gone.hosts().nth(8).unwrap(), new_port()));
    assert_fair(&overlay.containers, (0, target), &[(0, 1), (1, 0)]);
}

/// What the daemon has used of the processors, in ticks of `USER_HZ` (proc(5), stat, fields 14 and 15).
fn ticks(daemon: &mut Daemon) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{}/stat", daemon.process().pid())).unwrap();
    // The second field, the program's name in parentheses, may itself contain spaces.
    let fields = stat.rsplit_once(')').unwrap().1.split_whitespace();
    fields.skip(11).take(2).map(|field| field.parse::<u64>().unwrap()).sum()
}

#[test]
fn a_daemon_without_traffic_does_not_use_the_processor() {
    let lab = new_lab("idle");
    let registry = Registry::embedded(&lab);
    let host = HostOptions::default;
    let hosts = [
        (host(), &["--io=mmsg"][..]),
        (host(), &["--workers=4", "--io=uring"]),
        (host(), &["--tun=plain", "--offload=false"]),
    ];
    let mut overlay = Overlay::start_hosts(lab, registry, CONFIG, &hosts);
    overlay.assert_all_reach_all();
    let [one, two, three] = &overlay.containers[..] else {
        unreachable!()
    };
    // A spin may begin with the first traffic.
    transfer(&[(one, two), (two, three), (three, one)], 1 << 20);

    let before: Vec<_> = overlay.daemons.iter_mut().map(ticks).collect();
    // Not an event that is waited for: the time in which there is none.
    thread::sleep(IDLE);
    for (daemon, before) in overlay.daemons.iter_mut().zip(before) {
        let used = ticks(daemon) - before;
        assert!(used <= IDLE_TICKS, "{used} ticks in {IDLE:?}\n{}", daemon.log());
    }
}
