//! One slot: one peer on one wire, set up anew, with all tests one after another.

mod tcp;
mod udp;

use super::{
    agent::{Agent, Launcher, Pinged, Pings},
    error::{BenchError, check},
    hosts::Hosts,
    metric::{Metric, Test},
    peer::{Peer, check_running},
    plan::{Durations, Plan},
    processors::Look,
    wire::Wire,
};
use flannel::lab::{Interrupt, Lab, Process, wait_for};
use serde::Serialize;
use std::{
    collections::BTreeMap,
    fs,
    time::{Duration, Instant},
};

/// How long the overlay may take to answer once it is set up: the daemons must learn of one another.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);

/// UDP payload of a ping, bytes.
const PING_SIZE: usize = 64;

/// The flows of the tests with several.
const FLOWS: usize = 8;

/// What came of a slot.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Sample {
    /// From 1.
    pub(crate) round: u32,
    /// Over which wire.
    pub(crate) wire: Wire,
    /// The peer's name.
    pub(crate) peer: String,
    /// The figures.
    pub(crate) values: BTreeMap<Metric, f64>,
    /// The offers from which the figures of the UDP tests were found.
    pub(crate) offers: BTreeMap<Test, udp::Offers>,
    /// Processor time that others took during each test, as a share of all that there was.
    pub(crate) noise: BTreeMap<Test, f64>,
    /// The machine's load average over one minute when the slot began.
    pub(crate) load: f64,
    /// How long the slot took.
    pub(crate) seconds: f64,
    /// What the daemon of the first host logged of itself: its device with what it makes use of, and all warnings.
    pub(crate) said: Vec<String>,
    /// What went wrong, a line each.
    pub(crate) errors: Vec<String>,
}

impl Sample {
    /// The worst of all tests.
    pub(crate) fn noise(&self) -> f64 {
        self.noise.values().copied().fold(0.0, f64::max)
    }
}

/// Measures `peer` on `wire`. A test that fails is named in the sample, and so is a failure to set the slot up.
///
/// # Errors
/// Only [`BenchError::Interrupted`].
pub(crate) fn slot(
    plan: &Plan,
    (round, wire, peer): (u32, Wire, &Peer),
    interrupt: &Interrupt,
) -> Result<Sample, BenchError> {
    let start = Instant::now();
    let mut sample = Sample {
        round,
        wire,
        peer: peer.name.clone(),
        values: BTreeMap::new(),
        offers: BTreeMap::new(),
        noise: BTreeMap::new(),
        load: load_average(),
        seconds: 0.0,
        said: Vec::new(),
        errors: Vec::new(),
    };
    let outcome = Slot::set_up(plan, wire, peer, interrupt).and_then(|mut slot| {
        for test in &plan.tests {
            let measured = slot.measure(*test, &mut sample);
            check(interrupt)?;
            if let Err(error) = measured {
                sample.errors.push(one_line(&error));
            }
        }
        sample
            .values
            .extend(slot.memory().map(|mebibytes| (Metric::Memory, mebibytes)));
        sample.said = slot
            .daemons
            .first()
            .map_or_else(Vec::new, |daemon| noteworthy(&daemon.log()));
        slot.tear_down()
    });
    check(interrupt)?;
    if let Err(error) = outcome {
        sample.errors.push(one_line(&error));
    }
    sample.seconds = start.elapsed().as_secs_f64();
    Ok(sample)
}

/// Everything that runs. The order of the fields is that in which they go: programs before the lab that they are in.
struct Slot<'a> {
    durations: Durations,
    interrupt: &'a Interrupt,
    /// The number of the last run of datagrams.
    run: u32,
    sender: Agent,
    receiver: Agent,
    daemons: Vec<Process>,
    hosts: Hosts,
    lab: Lab,
}

impl<'a> Slot<'a> {
    fn set_up(plan: &Plan, wire: Wire, peer: &Peer, interrupt: &'a Interrupt) -> Result<Slot<'a>, BenchError> {
        let lab = Lab::new("bench")?;
        let hosts = Hosts::new(&lab, wire, plan.pin)?;
        let daemons = peer.start(&lab, &hosts, interrupt)?;
        let agent = |host, launcher: &Launcher| Agent::start(host, launcher, lab.dir(), interrupt);
        let (sender, receiver) = (agent(&hosts.a, &plan.launcher)?, agent(&hosts.b, &plan.launcher)?);
        let mut slot = Slot {
            durations: plan.durations,
            interrupt,
            run: 0,
            sender,
            receiver,
            daemons,
            hosts,
            lab,
        };
        wait_for(ANSWER_LIMIT, "the other host to answer through the overlay", || {
            slot.daemons.iter_mut().try_for_each(check_running)?;
            let pinged = slot.ping(Duration::from_millis(20))?;
            Ok::<_, BenchError>((pinged.answers > 0).then_some(()))
        })?;
        Ok(slot)
    }

    fn measure(&mut self, test: Test, sample: &mut Sample) -> Result<(), BenchError> {
        let own = [self.hosts.a.ns.clone(), self.hosts.b.ns.clone()];
        let own = [&own[0], &own[1]];
        let look = Look::now(&own);
        let values = self.run(test, &mut sample.offers);
        sample.noise.insert(test, look.since(&own).noise);
        let values = values?;
        // What was measured while a daemon died is no figure of its.
        self.daemons.iter_mut().try_for_each(check_running)?;
        sample.values.extend(values);
        Ok(())
    }

    fn run(&mut self, test: Test, offers: &mut BTreeMap<Test, udp::Offers>) -> Result<Vec<(Metric, f64)>, BenchError> {
        let (size, flows, best, overload) = match test {
            Test::Ping => return percentiles(&self.ping(self.durations.ping)?, [Metric::PingP50, Metric::PingP99]),
            Test::PingLoaded => {
                return percentiles(&self.ping_beside_tcp()?, [Metric::LoadedP50, Metric::LoadedP99]);
            }
            Test::Tcp1 => {
                let (report, usage) = self.tcp(Metric::Tcp1, &[])?;
                let per_gigabyte = usage.busy / report.gigabytes();
                return Ok(vec![(Metric::Tcp1, report.gbits()), (Metric::CpuPerGb, per_gigabyte)]);
            }
            Test::Tcp4 => return self.tcp_rate(Metric::Tcp4, &["--parallel", "4"]),
            Test::TcpBoth => return self.tcp_rate(Metric::TcpBoth, &["--bidir"]),
            Test::Udp64 => (64, 1, Metric::Udp64, Metric::Overload64),
            Test::Udp64x8 => (64, FLOWS, Metric::Udp64x8, Metric::Overload64x8),
            Test::Udp1400 => (1_400, 1, Metric::Udp1400, Metric::Overload1400),
            Test::Udp1400x8 => (1_400, FLOWS, Metric::Udp1400x8, Metric::Overload1400x8),
        };
        let (found, made) = self.udp(size, flows)?;
        let full_speed = made.full_speed.delivered;
        offers.insert(test, made);
        let rate = found.ok_or(BenchError::NoResult {
            test: best.title(),
            why: "more than 1 % was lost at each rate that was tried".to_owned(),
        })?;
        Ok(vec![(best, rate / 1e3), (overload, full_speed / rate * 100.0)])
    }

    fn tcp_rate(&mut self, metric: Metric, flags: &[&str]) -> Result<Vec<(Metric, f64)>, BenchError> {
        Ok(vec![(metric, self.tcp(metric, flags)?.0.gbits())])
    }

    fn ping(&mut self, time: Duration) -> Result<Pinged, BenchError> {
        let pings = Pings {
            from: self.hosts.a.overlay(),
            to: self.hosts.b.overlay(),
            size: PING_SIZE,
            seconds: time.as_secs_f64(),
        };
        self.sender.ping(pings, self.interrupt)
    }

    /// The most memory that a daemon had resident since its start, MiB; the larger of both hosts.
    fn memory(&self) -> Option<f64> {
        let peaks = self.daemons.iter().filter_map(|daemon| {
            let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid())).ok()?;
            peak_kibibytes(&status)
        });
        peaks.max().map(|kibibytes| kibibytes as f64 / 1024.0)
    }

    /// Removes all of it.
    fn tear_down(self) -> Result<(), BenchError> {
        // The lab asks all programs to end at once; they are not waited for one by one.
        Ok(self.lab.remove()?)
    }
}

/// An error may have the end of a log in it.
fn one_line(error: &BenchError) -> String {
    let text = error.to_string();
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    lines.collect::<Vec<_>>().join("; ")
}

fn percentiles(pinged: &Pinged, [p50, p99]: [Metric; 2]) -> Result<Vec<(Metric, f64)>, BenchError> {
    let (Some(half), Some(nearly_all)) = (pinged.p50, pinged.p99) else {
        return Err(BenchError::NoResult {
            test: p50.title(),
            why: format!("no ping of {} was answered", pinged.lost),
        });
    };
    Ok(vec![(p50, half), (p99, nearly_all)])
}

/// `2026-01-02T03:04:05Z  WARN text`: the texts of warnings and errors, and of the line on the device, which tells how the
/// daemon really works, whatever its flags ask for.
fn noteworthy(log: &str) -> Vec<String> {
    let texts = log.lines().filter_map(|line| {
        let (_, rest) = line.split_once(' ')?;
        let (level, text) = rest.trim_start().split_once(' ')?;
        (matches!(level, "WARN" | "ERROR") || text.contains(" is up: ")).then(|| text.to_owned())
    });
    texts.collect()
}

/// `VmHWM: 1234 kB` of /proc/<pid>/status, see proc(5).
fn peak_kibibytes(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

fn load_average() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace()
        .next()
        .and_then(|load| load.parse().ok())
        .unwrap_or(0.0)
}

#[cfg(test)]
#[allow(unused, reason = "cargo builds benchmarks with cfg(test), but without tests")]
mod tests {
    use super::*;

    #[test]
    fn peak_memory_is_read() {
        let status = "Name:\tflanneld\nVmPeak:\t  300000 kB\nVmHWM:\t   14336 kB\nVmRSS:\t   12288 kB\n";
        assert_eq!(peak_kibibytes(status), Some(14_336));
        assert_eq!(peak_kibibytes("Name:\tkthreadd\n"), None);
    }

    #[test]
    fn device_and_warnings_are_picked_from_a_log() {
        let log = "\
2026-01-02T03:04:05.6Z  INFO took subnet 10.5.1.0/24
2026-01-02T03:04:05.7Z  WARN the kernel lacks it: going on without
2026-01-02T03:04:05.8Z  INFO flannel0 is up: address 10.5.1.0, 2 workers
";
        let expected = [
            "the kernel lacks it: going on without",
            "flannel0 is up: address 10.5.1.0, 2 workers",
        ];
        assert_eq!(noteworthy(log), expected);
    }
}
