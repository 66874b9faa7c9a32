//! What a daemon takes of its machine, as `/proc` shows it, and what it says of itself.

use super::{Daemon, Overlay, flanneld};
use flannel::observe::status::{Engine, Status};
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

/// Packets that the engine, or the kernel on its behalf, has dropped and counted.
pub(crate) fn counted_drops(engine: &Engine) -> u64 {
    let of_workers = engine.workers.iter().map(|worker| {
        let dropped: u64 = worker.dropped.values().sum();
        dropped + worker.socket_overflow
    });
    of_workers.sum::<u64>() + engine.device_overflow.unwrap_or_default()
}
