//! Flows stay in order, however many workers carry them. Needs root.
//!
//! What is looked at is the order in which the daemons take and give packets, not that of the machine's scheduler: a thread that
//! is moved to another processor may overtake, there, what it has left behind in the first one's receive queue. So each thread
//! that sends stays on one processor.

mod lab;

use std::{
    io,
    net::{SocketAddr, UdpSocket},
    sync::{Condvar, Mutex},
    thread,
    time::Duration,
};

use flannel::lab::{Container, HostOptions};
use lab::{
    CONFIG, Daemon, Overlay, Registry, inside, new_lab,
    traffic::{QUIET, new_port, pattern, transfer},
    wire::LONGEST,
};
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    sys::socket::{setsockopt, sockopt::UdpGsoSegment},
    unistd::Pid,
};

/// As many as the engine is asked to keep in order.
const FLOWS: usize = 8;

/// Datagrams of each flow.
const DATAGRAMS: u32 = 1_000;

/// How many of them may be under way: with 16 flows at once, half of what the shortest queue on the way holds (1,000 packets).
const WINDOW: u32 = 32;

/// When nothing has come for this long, what is under way is taken for lost and the flow goes on.
const LOST: Duration = Duration::from_millis(300);

/// The first word of a conversation, shorter than any other, and how often it is said before nobody listens.
const GREETING: &[u8] = b"hello";
const ATTEMPTS: usize = 50;

/// What a flow sends in turn: how many datagrams as one message, of how many bytes each, and of how many the last.
const MESSAGES: [(u32, usize, usize); 6] = [
    (1, 1_444, 1_444),
    (1, 16, 16),
    (10, 1_000, 1_000),
    (1, 600, 600),
    (1, 600, 600),
    (7, 200, 33),
];

/// The flow's and the datagram's number, in front of each payload.
const LABEL: usize = 6;

/// One direction between two sockets.
struct Flow<'a> {
    number: usize,
    from: &'a UdpSocket,
    to: &'a UdpSocket,
    progress: &'a Progress,
    /// That of the flow in the other direction, if there is one.
    back: Option<&'a Progress>,
    pattern: &'a [u8],
}

/// How far a flow has come: its two ends tell each other, past the network.
#[derive(Default)]
struct Progress {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// The number after that of the last datagram that came.
    next: u32,
    /// No more will be sent.
    ended: bool,
}

impl Progress {
    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap());
        self.changed.notify_all();
    }

    fn has_ended(&self) -> bool {
        self.state.lock().unwrap().ended
    }

    /// Waits as long as this holds of the state, at most for [`LOST`]; whether it does no more.
    fn wait_while(&self, mut holds: impl FnMut(&State) -> bool) -> bool {
        let state = self.state.lock().unwrap();
        let waited = self
            .changed
            .wait_timeout_while(state, LOST, |state| holds(state))
            .unwrap();
        !waited.1.timed_out()
    }
}

impl Flow<'_> {
    fn payload(&self, number: u32, length: usize) -> Vec<u8> {
        let label = [&(self.number as u16).to_be_bytes()[..], &number.to_be_bytes()].concat();
        // Another part of the pattern for each.
        let rest = &self.pattern[number as usize..][..length - LABEL];
        [&label, rest].concat()
    }

    /// Sends all datagrams, no more at once than the window holds.
    fn send(&self) {
        // Up to where datagrams have arrived for sure, or are lost.
        let (mut sent, mut settled) = (0, 0);
        for &(count, segment, last) in MESSAGES.iter().cycle() {
            let count = count.min(DATAGRAMS - sent);
            if count == 0 {
                break;
            }
            let end = sent + count;
            if !self.progress.wait_while(|state| end > settled.max(state.next) + WINDOW) {
                settled = sent;
            }
            let length = |number| if number + 1 == end { last } else { segment };
            let message: Vec<u8> = (sent..end)
                .flat_map(|number| self.payload(number, length(number)))
                .collect();
            let merged = if count > 1 { segment as i32 } else { 0 };
            setsockopt(self.from, UdpGsoSegment, &merged).unwrap();
            // An error is a loss like any other.
            let _ = self.from.send(&message);
            sent = end;
        }
        self.progress.change(|state| state.ended = true);
        // That nothing comes back for seconds is another reason for the kernel to choose anew, see `settle`.
        while let Some(back) = self.back
            && !back.wait_while(|state| !state.ended)
        {
            let _ = self.from.send(GREETING);
        }
    }

    /// Receives what comes until all has come, or nothing more does; how many datagrams that were.
    fn recv(&self) -> Result<u32, String> {
        let mut received = 0;
        let outcome = self.recv_in_order(|number| {
            received += 1;
            self.progress.change(|state| state.next = number + 1);
        });
        // Nobody need wait for this end any more.
        self.progress.change(|state| state.next = DATAGRAMS);
        outcome.map(|()| received)
    }

    fn recv_in_order(&self, mut arrived: impl FnMut(u32)) -> Result<(), String> {
        let (mut buffer, mut next) = (vec![0; LONGEST], 0);
        self.to.set_read_timeout(Some(QUIET)).unwrap();
        while next < DATAGRAMS {
            let payload = match self.to.recv(&mut buffer) {
                Ok(length) => &buffer[..length],
                // Nothing came in time.
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => GREETING,
                Err(error) => panic!("cannot receive: {error}"),
            };
            if payload == GREETING {
                if self.progress.has_ended() {
                    break;
                }
                continue;
            }
            let number = payload
                .get(2..LABEL)
                .map(|bytes| u32::from_be_bytes(bytes.try_into().unwrap()));
            match number.filter(|&number| number < DATAGRAMS && payload == self.payload(number, payload.len())) {
                None => return Err(format!("flow {}: not sent: {payload:02x?}", self.number)),
                Some(number) if number < next => {
                    return Err(format!("flow {}: {number} behind {}", self.number, next - 1));
                }
                Some(number) => {
                    next = number + 1;
                    arrived(number);
                }
            }
        }
        Ok(())
    }
}

/// The processors that this process may use.
fn processors() -> Vec<usize> {
    let usable = sched_getaffinity(Pid::from_raw(0)).unwrap();
    (0..CpuSet::count())
        .filter(|&cpu| usable.is_set(cpu).unwrap())
        .collect()
}

/// Keeps the calling thread on one processor.
fn pin(number: usize) {
    let processors = processors();
    let mut only = CpuSet::new();
    only.set(processors[number % processors.len()]).unwrap();
    sched_setaffinity(Pid::from_raw(0), &only).unwrap();
}

/// Two sockets for each flow, connected to one another.
fn sockets(one: &Container, two: &Container) -> Vec<[UdpSocket; 2]> {
    let pair = |_| {
        let ends = [(one, new_port()), (two, new_port())];
        let sockets =
            ends.map(|(container, port)| inside(&container.ns, || UdpSocket::bind((container.ip, port))).unwrap());
        for (socket, (container, port)) in sockets.iter().zip(ends.into_iter().rev()) {
            socket.connect(SocketAddr::from((container.ip, port))).unwrap();
        }
        sockets
    };
    (0..FLOWS).map(pair).collect()
}

/// Sends a greeting each way until it arrives.
///
/// The kernel hands what it sends to the queue that last brought something of the same flow (`tun_flow_update`), and before that
/// to one of its own choice. What the first answer finds under way in the other queue may be overtaken.
fn settle(sockets: &[[UdpSocket; 2]]) {
    for [one, two] in sockets {
        for (from, to) in [(two, one), (one, two)] {
            to.set_read_timeout(Some(LOST)).unwrap();
            let greeted = (0..ATTEMPTS).any(|_| {
                from.send(GREETING).unwrap();
                to.recv(&mut [0; GREETING.len()]).is_ok()
            });
            assert!(greeted, "no greeting arrives");
        }
    }
}

/// Runs a flow from the first to the second of each pair of sockets, or one each way, all at once.
fn assert_order(sockets: &[[UdpSocket; 2]], both_ways: bool) {
    let pattern = pattern(DATAGRAMS as usize + LONGEST, 0);
    let ends = sockets.iter().flat_map(|[one, two]| [(one, two), (two, one)]);
    let progress: Vec<_> = ends.clone().map(|_| Progress::default()).collect();
    let flows = ends.enumerate().map(|(number, (from, to))| Flow {
        number,
        from,
        to,
        progress: &progress[number],
        back: both_ways.then(|| &progress[number ^ 1]),
        pattern: &pattern,
    });
    let flows: Vec<_> = flows.step_by(if both_ways { 1 } else { 2 }).collect();
    let received: Result<Vec<u32>, String> = thread::scope(|scope| {
        let mut receivers = Vec::new();
        for flow in &flows {
            scope.spawn(|| {
                // Both directions of a pair on the same one.
                pin(flow.number / 2);
                flow.send();
            });
            receivers.push(scope.spawn(|| flow.recv()));
        }
        receivers.into_iter().map(|receiver| receiver.join().unwrap()).collect()
    });
    let received = received.unwrap();
    // So few are under way that no queue overflows; but what is lost must not hide what is wrong.
    assert!(
        received.iter().all(|&count| count > DATAGRAMS / 2),
        "{received:?} of {DATAGRAMS} arrived"
    );
}

fn flows_stay_in_order(name: &str, config: &str, flags: &[&str]) {
    let lab = new_lab(name);
    let registry = Registry::embedded(&lab);
    let flags = [flags, &["--pin"]].concat();
    let host = (HostOptions::default(), &flags[..]);
    let mut overlay = Overlay::start_hosts(lab, registry, config, &[host.clone(), host]);
    overlay.assert_all_reach_all();
    let [one, two] = &overlay.containers[..] else {
        unreachable!()
    };

    assert_order(&sockets(one, two), false);
    let talking = sockets(one, two);
    settle(&talking);
    assert_order(&talking, true);
    transfer(&[[(one, two); FLOWS], [(two, one); FLOWS]].concat(), 1 << 20);
    overlay.daemons.iter_mut().for_each(Daemon::assert_running);
}

#[test]
fn flows_stay_in_order_with_two_workers() {
    flows_stay_in_order("order_2", CONFIG, &["--workers=2", "--io=mmsg"]);
}

#[test]
fn flows_stay_in_order_with_four_workers() {
    flows_stay_in_order("order_4", CONFIG, &["--workers=4", "--io=mmsg"]);
}

#[test]
fn flows_stay_in_order_with_io_uring() {
    flows_stay_in_order("order_uring", CONFIG, &["--workers=2", "--io=uring"]);
}

#[test]
fn flows_stay_in_order_over_several_source_ports() {
    let config = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"udp","SourcePorts":8}}"#;
    flows_stay_in_order("order_ports", config, &["--workers=4"]);
}
