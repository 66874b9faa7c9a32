//! What a daemon takes of its machine, as `/proc` shows it, and what it says of itself.

use super::{Daemon, Overlay, flanneld, output_of, stream::Report};
use flannel::{
    lab::Namespace,
    observe::status::{Engine, Status},
};
use std::{fs, time::Duration};

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

/// What the daemon of this host says of itself.
pub(crate) fn status(overlay: &Overlay, host: usize) -> Status {
    let output = flanneld(overlay.hosts[host].ns())
        .args(["status", "--json"])
        .arg(format!(
            "-subnet-file={}",
            overlay.daemons[host].subnet_file().display()
        ))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The engine's part of it, with the `udp` backend.
pub(crate) fn engine(status: &Status) -> Option<&Engine> {
    status.backend.as_ref()?.engine.as_ref()
}

/// Packets that were dropped and counted: by the daemons' engines, and by the kernel where they were queued.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Drops {
    /// By the engines, by the queues of their devices and by their sockets.
    pub(crate) engines: u64,
    /// By sockets in the containers that were full.
    pub(crate) containers: u64,
    /// By the backlogs of the machine's processors, where packets go from one namespace to another (softnet_data, net/core/dev.c).
    pub(crate) backlogs: u64,
}

impl Drops {
    /// So far, of the daemons of these hosts and of all containers.
    pub(crate) fn so_far(overlay: &Overlay, hosts: &[usize]) -> Drops {
        let engines = hosts
            .iter()
            .filter_map(|&host| engine(&status(overlay, host)).map(dropped));
        let sockets = overlay.containers.iter().map(|container| receive_errors(&container.ns));
        Drops {
            engines: engines.sum(),
            containers: sockets.sum(),
            backlogs: backlog_drops(),
        }
    }

    /// How many there are in all.
    pub(crate) fn all(&self) -> u64 {
        self.engines + self.containers + self.backlogs
    }

    /// Those since `before`.
    pub(crate) fn since(&self, before: &Drops) -> Drops {
        Drops {
            engines: self.engines - before.engines,
            containers: self.containers - before.containers,
            backlogs: self.backlogs - before.backlogs,
        }
    }
}

fn dropped(engine: &Engine) -> u64 {
    let of_workers = engine.workers.iter().map(|worker| {
        let dropped: u64 = worker.dropped.values().sum();
        dropped + worker.socket_overflow
    });
    of_workers.sum::<u64>() + engine.device_overflow.unwrap_or_default()
}

/// `InErrors` of UDP, which hold those for which a socket had no room.
fn receive_errors(ns: &Namespace) -> u64 {
    let snmp = output_of(ns, "cat", ["/proc/net/snmp"]);
    let mut udp = snmp.lines().filter(|line| line.starts_with("Udp:"));
    let (names, values) = (udp.next().unwrap(), udp.next().unwrap());
    let place = names.split_whitespace().position(|name| name == "InErrors").unwrap();
    values.split_whitespace().nth(place).unwrap().parse().unwrap()
}

/// The second number of each processor's line, in hexadecimal.
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
