//! What a daemon takes of its machine, as `/proc` shows it, and what it says of itself.

use super::{Daemon, Overlay, output_of, stream::Report};
use flannel::{
    engine::counters::Drop,
    lab::{Host, Namespace},
    observe::status::{Engine, Status},
};
use std::{collections::BTreeMap, fs, time::Duration};

/// A process at one moment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Vitals {
    /// Resident memory, in KiB.
    pub(crate) resident: u64,
    /// The most that it ever was, in KiB.
    pub(crate) peak: u64,
    /// Open descriptors.
    pub(crate) descriptors: usize,
    /// Threads.
    pub(crate) threads: u64,
    /// Processor time so far, user and system.
    pub(crate) processor: Duration,
}

impl Vitals {
    /// Of a daemon that runs.
    pub(crate) fn of(daemon: &mut Daemon) -> Vitals {
        Vitals::of_process(daemon.process().pid())
    }

    /// Of a process that runs.
    pub(crate) fn of_process(pid: u32) -> Vitals {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let number = |name: &str| -> u64 {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let line = line.unwrap_or_else(|| panic!("no {name} in {status}"));
            line.split_whitespace().next().unwrap().parse().unwrap()
        };
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        // Behind the name, which may hold anything (proc_pid_stat(5)): utime and stime are the 14th and 15th of all fields.
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        let ticks: u64 = fields[11..=12].iter().map(|field| field.parse::<u64>().unwrap()).sum();
        Vitals {
            resident: number("VmRSS:"),
            peak: number("VmHWM:"),
            descriptors: fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count(),
            threads: number("Threads:"),
            // The kernel counts hundredths of a second for user space, whatever its own clock (USER_HZ).
            processor: Duration::from_millis(ticks * 10),
        }
    }
}

/// The engine's part of it, with the `udp` backend.
pub(crate) fn engine(status: &Status) -> Option<&Engine> {
    status.backend.as_ref()?.engine.as_ref()
}

/// Packets that were dropped and counted: where they were queued, by the daemons' engines and by the kernel, which a busy machine
/// excuses, and by the engines for other reasons, which nothing does.
#[derive(Clone, Debug)]
pub(crate) struct Drops {
    /// By the queues of the engines' devices, and by engines whose sockets and devices had no room.
    pub(crate) queues: u64,
    /// By the engines' sockets that were full: of messages, each of which may have been several packets.
    pub(crate) sockets: u64,
    /// By sockets in the containers that were full.
    pub(crate) containers: u64,
    /// By the backlogs of the machine's processors, where packets go from one namespace to another. No more than the whole machine
    /// has dropped there, and no more than the lab's own devices have not received.
    pub(crate) backlogs: u64,
    machine: u64,
    devices: u64,
    /// By engines that did not know where to or from whom, or could not send.
    pub(crate) wrong: BTreeMap<&'static str, u64>,
}

/// Why no packet between hosts that are well may be dropped.
const WRONG: [Drop; 4] = [Drop::NoRoute, Drop::UnknownPeer, Drop::Spoofed, Drop::SendFailed];

impl Drops {
    /// So far, of the daemons of these hosts and of all containers.
    pub(crate) fn so_far(overlay: &Overlay, hosts: &[usize]) -> Drops {
        let statuses: Vec<Status> = hosts.iter().map(|&host| overlay.daemons[host].status()).collect();
        let engines: Vec<&Engine> = statuses.iter().filter_map(engine).collect();
        let workers = || engines.iter().flat_map(|engine| &engine.workers);
        let dropped = |reason: Drop| -> u64 { workers().filter_map(|worker| worker.dropped.get(reason.name())).sum() };
        let device_queues: u64 = engines.iter().filter_map(|engine| engine.device_overflow).sum();
        let spaces = overlay.hosts.iter().map(Host::ns);
        let spaces = spaces.chain(overlay.containers.iter().map(|container| &container.ns));
        Drops {
            queues: dropped(Drop::QueueFull) + device_queues,
            sockets: workers().map(|worker| worker.socket_overflow).sum(),
            containers: overlay
                .containers
                .iter()
                .map(|container| receive_errors(&container.ns))
                .sum(),
            backlogs: 0,
            machine: backlog_drops(),
            devices: spaces.chain([overlay.lab.switch()]).map(not_received).sum(),
            wrong: WRONG.map(|reason| (reason.name(), dropped(reason))).into(),
        }
    }

    /// How many there are that were queued.
    pub(crate) fn all(&self) -> u64 {
        self.queues + self.sockets + self.containers + self.backlogs
    }

    /// Those since `before`. Fails the test if there are some for which a busy machine is no excuse.
    pub(crate) fn since(&self, before: &Drops) -> Drops {
        let (machine, devices) = (self.machine - before.machine, self.devices - before.devices);
        let since = Drops {
            queues: self.queues - before.queues,
            sockets: self.sockets - before.sockets,
            containers: self.containers - before.containers,
            backlogs: machine.min(devices),
            machine,
            devices,
            wrong: self
                .wrong
                .iter()
                .map(|(reason, count)| (*reason, count - before.wrong[reason]))
                .collect(),
        };
        assert!(since.wrong.values().all(|count| *count == 0), "{since:?}");
        since
    }
}

/// What the devices of a namespace had no room for, or no use.
fn not_received(ns: &Namespace) -> u64 {
    let devices = output_of(ns, "cat", ["/proc/net/dev"]);
    // Two lines of heads; then bytes, packets, errors and drops (net/core/net-procfs.c).
    let drops = devices.lines().skip(2).map(|line| {
        let (_, numbers) = line.split_once(':').unwrap();
        numbers.split_whitespace().nth(3).unwrap().parse::<u64>().unwrap()
    });
    drops.sum()
}

/// `InErrors` of UDP, which hold those for which a socket had no room.
fn receive_errors(ns: &Namespace) -> u64 {
    let snmp = output_of(ns, "cat", ["/proc/net/snmp"]);
    let mut udp = snmp.lines().filter(|line| line.starts_with("Udp:"));
    let (names, values) = (udp.next().unwrap(), udp.next().unwrap());
    let place = names.split_whitespace().position(|name| name == "InErrors").unwrap();
    values.split_whitespace().nth(place).unwrap().parse().unwrap()
}

/// The second number of each processor's line, in hexadecimal (softnet_data, net/core/dev.c).
pub(crate) fn backlog_drops() -> u64 {
    let softnet = fs::read_to_string("/proc/net/softnet_stat").unwrap();
    let dropped = softnet
        .lines()
        .filter_map(|line| u64::from_str_radix(line.split_whitespace().nth(1)?, 16).ok());
    dropped.sum()
}

/// Fails the test if more is missing than was counted.
pub(crate) fn assert_accounted(what: &str, report: &Report, drops: &Drops) {
    println!(
        "{what}: {} of {} datagrams lost, counted {drops:?}",
        report.lost.len(),
        report.sent
    );
    assert!(
        report.lost.len() as u64 <= drops.all(),
        "{what}: {:?} of {} datagrams are missing, and only {drops:?} are accounted for",
        report.lost,
        report.sent
    );
}
