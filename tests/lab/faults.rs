//! What a fault costs: flows that see what was lost and when, and what a daemon holds, uses and says meanwhile.

use super::{Daemon, PATIENCE, flow::Flows, stream::Report, vitals::backlog_drops};
use flannel::{
    lab::{self, Container, LabError, Namespace, wait_for, wait_until},
    observe::{
        socket,
        status::{PeerTraffic, Status},
    },
};
use std::{collections::BTreeMap, env, fmt::Debug, fs, net::Ipv4Addr, thread, time::Duration};

/// With this in the environment, faults that last are done for as long as they are meant to be; without, as long as a test of many
/// may take.
const AT_LENGTH: &str = "FLANNEL_LONG_FAULTS";

/// Datagrams that flow undisturbed before a fault, and after it.
const CALM: u64 = 300;

/// What may be under way at the begin of a fault, or be sent before it takes effect: half a second's, on a busy machine.
const UNDER_WAY: u64 = 500;

/// How long a daemon is watched doing nothing, and the processor time that it may use meanwhile, in ticks of 10 ms (`USER_HZ`): a
/// fifth of what one thread that spins would.
const IDLE: Duration = Duration::from_secs(1);
const IDLE_TICKS: u64 = 20;

/// How long a fault lasts.
pub(crate) fn lasting(short: Duration, at_length: Duration) -> Duration {
    if env::var_os(AT_LENGTH).is_some() {
        at_length
    } else {
        short
    }
}

/// Flows from one container to another, to which something is about to happen.
pub(crate) struct Trial {
    what: String,
    flows: Flows,
    before: u64,
    patience: Duration,
    queues: Queues,
    overflow_before: u64,
}

impl Trial {
    /// Lets them flow undisturbed at first.
    pub(crate) fn start(what: &str, from: &Container, to: &Container) -> Trial {
        Trial::start_for(what, from, to, PATIENCE)
    }

    /// As [`Trial::start`], for a fault that lasts: the connection has to bear that nothing passes for as long as `patience`.
    pub(crate) fn start_for(what: &str, from: &Container, to: &Container, patience: Duration) -> Trial {
        let queues = Queues::between(from, to);
        let overflow_before = queues.overflow();
        let flows = Flows::start_for(from, to, patience);
        wait_until(PATIENCE, "datagrams to flow", || flows.udp().arrived() >= CALM).unwrap();
        Trial {
            what: what.to_owned(),
            before: flows.udp().sent(),
            flows,
            patience,
            queues,
            overflow_before,
        }
    }

    /// How many datagrams have been sent so far.
    pub(crate) fn sent(&self) -> u64 {
        self.flows.udp().sent()
    }

    /// The fault is over: fails the test unless datagrams come to flow again, without loss from then on as before, and the
    /// connection has held. What the [queues](Queues::overflow) could not hold does not count.
    pub(crate) fn over(self) -> Report {
        let udp = self.flows.udp();
        let (mended, overflow_mended) = (udp.sent(), self.queues.overflow());
        let what = format!("datagrams to flow again after this: {}", self.what);
        wait_until(self.patience, &what, || udp.arrived() > mended).unwrap();
        let again = udp.arrived();
        wait_until(PATIENCE, "datagrams to flow on", || udp.arrived() >= again + CALM).unwrap();
        let report = self.flows.finish();
        println!(
            "{}: {} of {} datagrams lost, from {:?} to {:?}, TCP held",
            self.what,
            report.lost.len(),
            report.sent,
            report.lost.first(),
            report.lost.last()
        );
        let meanwhile = self.before.saturating_sub(UNDER_WAY)..again;
        let outside: Vec<u64> = report
            .lost
            .iter()
            .copied()
            .filter(|number| !meanwhile.contains(number))
            .collect();
        let overflowed = self.queues.overflow().saturating_sub(overflow_mended);
        assert!(
            outside.len() as u64 <= overflowed,
            "{}: {outside:?} lost outside of {meanwhile:?}, and {overflowed} overflowed queues",
            self.what
        );
        report
    }

    /// As [`Trial::over`], of what must not be noticed at all.
    pub(crate) fn over_without_loss(self) {
        let (what, queues, before) = (self.what.clone(), self.queues.clone(), self.overflow_before);
        let report = self.over();
        let overflowed = queues.overflow().saturating_sub(before);
        assert!(
            report.lost.len() as u64 <= overflowed,
            "{what}: {:?} of {} datagrams lost, and {overflowed} overflowed queues",
            report.lost,
            report.sent
        );
    }
}

/// The queues on the way between containers: in their namespaces and in those of their hosts.
#[derive(Clone)]
pub(crate) struct Queues {
    namespaces: Vec<String>,
    /// Whether the hosts' TUN devices, which hold what is sent, are among them.
    devices: bool,
}

impl Queues {
    /// Those on the ways between two containers.
    pub(crate) fn between(one: &Container, other: &Container) -> Queues {
        Queues {
            namespaces: [one, other].map(places).concat(),
            devices: true,
        }
    }

    /// Those on the way to a container, once its host is reached.
    pub(crate) fn to(container: &Container) -> Queues {
        Queues {
            namespaces: places(container).into(),
            devices: false,
        }
    }

    /// How many packets they could not hold so far: those of sockets, of TUN devices, and of the machine's processors between
    /// namespaces. On a machine that has no time for anyone that is no loss of the daemon's.
    pub(crate) fn overflow(&self) -> u64 {
        let of_namespaces = self.namespaces.iter().map(|name| {
            let mut look = lab::command("nsenter");
            look.arg(format!("--net=/run/netns/{name}"));
            let shown = lab::run(look.args(["cat", "/proc/net/snmp", "/proc/net/dev"])).unwrap();
            let number = |text: &str| text.parse::<u64>().unwrap();
            // The names, and then the values.
            let mut udp = shown.lines().filter(|line| line.starts_with("Udp:"));
            let (names, values) = (udp.next().unwrap(), udp.next().unwrap());
            let at = names.split_whitespace().position(|name| name == "RcvbufErrors");
            let of_sockets = number(values.split_whitespace().nth(at.unwrap()).unwrap());
            // Eight numbers of what the device has received, then of what it has sent: bytes, packets, errors, dropped.
            let device = shown.lines().find_map(|line| line.trim().strip_prefix("flannel0:"));
            let device = device.filter(|_| self.devices);
            let of_device = device.and_then(|numbers| numbers.split_whitespace().nth(11));
            of_sockets + of_device.map_or(0, number)
        });
        of_namespaces.sum::<u64>() + backlog_drops()
    }
}

/// The namespaces of a container and of its host: c1 is on h1.
fn places(container: &Container) -> [String; 2] {
    let name = container.ns.name();
    let (lab, number) = name.rsplit_once("-c").unwrap();
    [name.to_owned(), format!("{lab}-h{number}")]
}

/// What the daemon says of itself.
pub(crate) fn status(daemon: &Daemon) -> Status {
    socket::read(&socket::beside(&daemon.subnet_file())).unwrap()
}

/// Waits until the daemon says of itself what is wanted; what that is.
pub(crate) fn wait_for_status<T>(daemon: &Daemon, what: &str, wanted: impl Fn(&Status) -> Option<T>) -> T {
    try_for_status(daemon, what, wanted).unwrap_or_else(|error| panic!("{error}: {:#?}", status(daemon)))
}

/// As [`wait_for_status`], for a test that has something to end before it fails.
pub(crate) fn try_for_status<T>(
    daemon: &Daemon,
    what: &str,
    wanted: impl Fn(&Status) -> Option<T>,
) -> Result<T, LabError> {
    let path = socket::beside(&daemon.subnet_file());
    wait_for(PATIENCE, what, || {
        Ok(socket::read(&path).ok().as_ref().and_then(&wanted))
    })
}

/// Packets that the daemon's sockets did not take, by the system's error; without those of which there were none.
pub(crate) fn send_errors(status: &Status) -> BTreeMap<String, u64> {
    let mut errors = BTreeMap::new();
    let engine = status.backend.as_ref().and_then(|backend| backend.engine.as_ref());
    for (name, count) in engine
        .iter()
        .flat_map(|engine| &engine.workers)
        .flat_map(|worker| &worker.send_errors)
    {
        *errors.entry(name.clone()).or_default() += count;
    }
    errors.retain(|_, count| *count > 0);
    errors
}

/// Packets that the daemon has dropped for this reason.
pub(crate) fn dropped(status: &Status, reason: &str) -> u64 {
    let engine = status.backend.as_ref().unwrap().engine.as_ref().unwrap();
    engine.workers.iter().map(|worker| worker.dropped[reason]).sum()
}

/// What was exchanged with the peer at this address.
pub(crate) fn traffic_with(status: &Status, public_ip: Ipv4Addr) -> PeerTraffic {
    let peer = status.peers.iter().find(|peer| peer.public_ip == public_ip);
    peer.and_then(|peer| peer.traffic).unwrap()
}

/// How often the daemon has put this right.
pub(crate) fn repairs(status: &Status, what: &str) -> u64 {
    let repairs = &status.backend.as_ref().unwrap().repairs;
    repairs.get(what).copied().unwrap_or_default()
}

/// What a process holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Holdings {
    pub(crate) descriptors: usize,
    pub(crate) threads: usize,
}

impl Holdings {
    pub(crate) fn of(daemon: &mut Daemon) -> Holdings {
        let pid = daemon.process().pid();
        let count = |what: &str| fs::read_dir(format!("/proc/{pid}/{what}")).unwrap().count();
        Holdings {
            descriptors: count("fd"),
            threads: count("task"),
        }
    }

    /// Fails the test unless the daemon comes to hold no more than this.
    pub(crate) fn assert_no_more(self, daemon: &mut Daemon) {
        let mut now = Holdings::of(daemon);
        let came = wait_until(PATIENCE, "the daemon to hold no more than before", || {
            now = Holdings::of(daemon);
            now.descriptors <= self.descriptors && now.threads <= self.threads
        });
        assert!(came.is_ok(), "before {self:?}, now {now:?}");
    }
}

/// What the daemon has used of the processors, in ticks of `USER_HZ` (proc(5), stat, fields 14 and 15).
pub(crate) fn ticks(daemon: &mut Daemon) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{}/stat", daemon.process().pid())).unwrap();
    // The second field, the program's name in parentheses, may itself contain spaces.
    let fields = stat.rsplit_once(')').unwrap().1.split_whitespace();
    fields.skip(11).take(2).map(|field| field.parse::<u64>().unwrap()).sum()
}

/// Fails the test when the daemon, which has nothing to do, uses the processor all the same.
pub(crate) fn assert_idle(daemon: &mut Daemon) {
    let before = ticks(daemon);
    // Not an event that is waited for: the time in which there is none.
    thread::sleep(IDLE);
    let used = ticks(daemon) - before;
    assert!(used <= IDLE_TICKS, "{used} ticks in {IDLE:?}\n{}", daemon.log());
}

/// Runs a command inside the namespace, its words separated by spaces; what it printed. It must succeed.
pub(crate) fn run(ns: &Namespace, line: &str) -> String {
    let mut words = line.split_whitespace();
    let mut command = ns.command(words.next().unwrap());
    lab::run(command.args(words)).unwrap()
}

/// Fails the test unless `look` comes to give what is expected; what it gave last is shown.
pub(crate) fn assert_becomes<T: PartialEq + Debug>(what: &str, expected: &T, look: impl Fn() -> T) {
    if let Err(error) = wait_until(PATIENCE, what, || look() == *expected) {
        panic!("{error}: {:?} and not {expected:?}", look());
    }
}
