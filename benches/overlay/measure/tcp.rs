//! TCP throughput, by iperf3.

use super::super::agent::Pinged;
use super::{
    super::{
        error::{BenchError, check},
        metric::Metric,
        peer::check_running,
        processors::{Look, Usage},
    },
    Slot,
};
use flannel::lab::{Process, wait_for};
use serde_json::Value;
use std::{fs, process::Command, time::Duration};

/// How long the server may take to listen, and the client to connect and to send its first bytes.
const START_LIMIT: Duration = Duration::from_secs(10);

/// How much longer than asked for a measurement may take: connecting, and the exchange of results at its end.
const EXTRA: Duration = Duration::from_secs(10);

/// How much longer than the pings the stream beside them is to last: it is stopped when they are done.
const LOAD_EXTRA: u64 = 30;

/// What a finished measurement says, all streams and directions together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Report {
    bits_per_second: f64,
    bytes: f64,
}

impl Report {
    /// Received, Gbit/s.
    pub(super) fn gbits(&self) -> f64 {
        self.bits_per_second / 1e9
    }

    /// Received, 10^9 bytes.
    pub(super) fn gigabytes(&self) -> f64 {
        self.bytes / 1e9
    }

    /// From the output of `iperf3 --json`; an error is what iperf3 says, or what is missing.
    fn parse(json: &str) -> Result<Report, String> {
        let report: Value = serde_json::from_str(json).map_err(|error| format!("{error} in: {json}"))?;
        if let Some(error) = report["error"].as_str() {
            return Err(error.to_owned());
        }
        let end = &report["end"];
        let sum = |key: &str| {
            let (forward, reverse) = (&end["sum_received"][key], &end["sum_received_bidir_reverse"][key]);
            let forward = forward
                .as_f64()
                .ok_or_else(|| format!("no `{key}` received in the report of iperf3"))?;
            Ok::<_, String>(forward + reverse.as_f64().unwrap_or(0.0))
        };
        let report = Report {
            bits_per_second: sum("bits_per_second")?,
            bytes: sum("bytes")?,
        };
        if report.bytes > 0.0 {
            Ok(report)
        } else {
            Err("nothing was received".to_owned())
        }
    }
}

impl Slot<'_> {
    /// Sends TCP from the first host to the second, with `flags` of iperf3; also what the processors did meanwhile.
    pub(super) fn tcp(&mut self, metric: Metric, flags: &[&str]) -> Result<(Report, Usage), BenchError> {
        let _server = self.start_server()?;
        let own = [&self.hosts.a.ns, &self.hosts.b.ns];
        let look = Look::now(&own);
        let mut command = self.client(self.durations.tcp);
        command.arg("--json").args(flags);
        let log = self.lab.dir().join("iperf3.json");
        // Each report by itself: a log is appended to, and that there is none yet is no failure.
        let _ = fs::remove_file(&log);
        let mut client = Process::spawn("iperf3", command, &log)?;
        let limit = Duration::from_secs(self.durations.tcp) + EXTRA;
        wait_for(limit, "iperf3 to finish", || {
            check(self.interrupt)?;
            Ok::<_, BenchError>(client.exited())
        })?;
        let usage = look.since(&own);
        let report = Report::parse(&client.log()).map_err(|why| BenchError::NoResult {
            test: metric.title(),
            why: format!("iperf3: {why}"),
        })?;
        Ok((report, usage))
    }

    /// Plays ping-pong while a TCP stream saturates whatever is the narrowest.
    pub(super) fn ping_beside_tcp(&mut self) -> Result<Pinged, BenchError> {
        let _server = self.start_server()?;
        let time = self.durations.ping_loaded;
        let mut command = self.client(time.as_secs() + LOAD_EXTRA);
        command.args(["--interval", "0.1", "--forceflush"]);
        let log = self.lab.dir().join("iperf3-load.log");
        let mut load = Process::spawn("iperf3", command, &log)?;
        wait_for(START_LIMIT, "TCP to flow", || {
            check(self.interrupt)?;
            check_running(&mut load)?;
            Ok::<_, BenchError>(load.log().contains("bits/sec").then_some(()))
        })?;
        let pinged = self.ping(time)?;
        check_running(&mut load)?;
        Ok(pinged)
    }

    fn client(&self, seconds: u64) -> Command {
        let (from, to) = (self.hosts.a.overlay(), self.hosts.b.overlay());
        let mut command = self.hosts.a.command("iperf3");
        command.args(["--client", &to.to_string(), "--bind", &from.to_string()]);
        command.args(["--connect-timeout", "3000", "--time", &seconds.to_string()]);
        command
    }

    /// A server for one measurement, which listens.
    fn start_server(&self) -> Result<Process, BenchError> {
        let mut command = self.hosts.b.command("iperf3");
        let address = self.hosts.b.overlay().to_string();
        command.args(["--server", "--one-off", "--forceflush", "--bind", &address]);
        let log = self.lab.dir().join("iperf3-server.log");
        let _ = fs::remove_file(&log);
        let mut server = Process::spawn("iperf3 server", command, &log)?;
        wait_for(START_LIMIT, "iperf3 to listen", || {
            check(self.interrupt)?;
            check_running(&mut server)?;
            Ok::<_, BenchError>(server.log().contains("Server listening").then_some(()))
        })?;
        Ok(server)
    }
}

#[cfg(test)]
#[allow(unused, reason = "cargo builds benchmarks with cfg(test), but without tests")]
mod tests {
    use super::*;

    #[test]
    fn what_was_received_counts() {
        let json = r#"{"start": {}, "end": {
            "sum_sent": {"bytes": 2500000000, "bits_per_second": 20e9, "retransmits": 3},
            "sum_received": {"bytes": 2400000000, "bits_per_second": 19.2e9}}}"#;
        let report = Report::parse(json).unwrap();
        assert!((report.gbits() - 19.2).abs() < 1e-9 && (report.gigabytes() - 2.4).abs() < 1e-9);
    }

    #[test]
    fn both_directions_are_added() {
        let json = r#"{"end": {
            "sum_received": {"bytes": 1000000000, "bits_per_second": 8e9},
            "sum_received_bidir_reverse": {"bytes": 500000000, "bits_per_second": 4e9}}}"#;
        assert!((Report::parse(json).unwrap().gbits() - 12.0).abs() < 1e-9);
    }

    #[test]
    fn failure_is_told() {
        let refused = Report::parse(r#"{"end": {}, "error": "unable to connect to server: Connection refused"}"#);
        assert_eq!(refused.unwrap_err(), "unable to connect to server: Connection refused");
        assert!(Report::parse(r#"{"end": {}}"#).unwrap_err().contains("bits_per_second"));
        let silent = r#"{"end": {"sum_received": {"bytes": 0, "bits_per_second": 0}}}"#;
        assert!(Report::parse(silent).unwrap_err().contains("nothing"));
        assert!(Report::parse("iperf3: not found").unwrap_err().contains("not found"));
    }
}
