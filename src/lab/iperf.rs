//! TCP throughput between two namespaces, measured by `iperf3`.

use super::process::{Process, one_line, wait_for};
use super::{LabError, Namespace};
use std::{net::IpAddr, path::Path, time::Duration};

/// How long the server may take to listen.
const LISTEN_LIMIT: Duration = Duration::from_secs(5);

/// How much longer than asked for a measurement may take: connecting, and the exchange of results at its end.
const EXTRA: Duration = Duration::from_secs(10);

/// What a finished measurement says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Throughput {
    /// What the receiver got, in megabits (10^6) a second.
    pub mbits: f64,
}

/// A line of iperf3's report.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Line {
    /// One second of the running measurement, in Mbit/s.
    Interval(f64),
    /// The whole measurement as the receiver saw it, in Mbit/s.
    Receiver(f64),
}

/// Sends TCP from `client` to `server`, which listens on `ip`, for `seconds`. `on_second` gets each second's Mbit/s as
/// soon as it is there, and is called with `None` in between; an error that it returns ends the measurement.
/// The programs' own reports stay in `dir`.
///
/// # Errors
/// What `on_second` fails with; [`LabError::TimedOut`] and [`LabError::Output`] when no result comes.
pub fn throughput<E: From<LabError>>(
    (client, server): (&Namespace, &Namespace),
    ip: IpAddr,
    seconds: u32,
    dir: &Path,
    mut on_second: impl FnMut(Option<f64>) -> Result<(), E>,
) -> Result<Throughput, E> {
    let mut listen = server.command("iperf3");
    listen.args(["--server", "--one-off", "--forceflush", "--bind", &ip.to_string()]);
    let mut listening = Process::spawn("iperf3 server", listen, &dir.join("iperf3-server.log"))?;
    wait_for(LISTEN_LIMIT, "iperf3 to listen", || -> Result<_, E> {
        on_second(None)?;
        if listening.exited().is_some() {
            return Err(no_result(&listening).into());
        }
        Ok(listening.log().contains("Server listening").then_some(()))
    })?;

    let mut send = client.command("iperf3");
    // One form of number whatever the speed (`-f m`), each line written when it is due.
    send.args([
        "--format",
        "m",
        "--interval",
        "1",
        "--forceflush",
        "--connect-timeout",
        "3000",
    ]);
    send.args(["--time", &seconds.to_string(), "--client", &ip.to_string()]);
    let mut sending = Process::spawn("iperf3 client", send, &dir.join("iperf3-client.log"))?;
    let mut shown = 0;
    let limit = Duration::from_secs(seconds.into()) + EXTRA;
    wait_for(limit, "iperf3 to finish", || -> Result<_, E> {
        let ended = sending.exited();
        let report = sending.log();
        let intervals = report.lines().filter_map(parse_line).filter_map(|line| match line {
            Line::Interval(mbits) => Some(mbits),
            Line::Receiver(_) => None,
        });
        for mbits in intervals.skip(shown) {
            shown += 1;
            on_second(Some(mbits))?;
        }
        on_second(None)?;
        let Some(status) = ended else { return Ok(None) };
        let total = report.lines().filter_map(parse_line).find_map(|line| match line {
            Line::Receiver(mbits) => Some(Throughput { mbits }),
            Line::Interval(_) => None,
        });
        total
            .filter(|_| status.success())
            .map(Some)
            .ok_or_else(|| no_result(&sending).into())
    })
}

fn no_result(process: &Process) -> LabError {
    LabError::Output {
        program: "iperf3",
        output: one_line(&process.log()),
    }
}

/// `[  5]   0.00-1.00   sec  1.10 GBytes  9420 Mbits/sec  12   1.2 MBytes`, or at the end the same with `receiver`.
fn parse_line(line: &str) -> Option<Line> {
    if !line.starts_with('[') || line.ends_with("sender") {
        return None;
    }
    let (before, after) = line.split_once(" Mbits/sec")?;
    let mbits = before.rsplit(' ').next()?.parse().ok()?;
    Some(if after.trim_end().ends_with("receiver") {
        Line::Receiver(mbits)
    } else {
        Line::Interval(mbits)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn report_is_read_line_by_line() {
        let report = "\
Connecting to host 10.0.0.2, port 5201
[  5] local 10.0.0.1 port 40000 connected to 10.0.0.2 port 5201
[ ID] Interval           Transfer     Bitrate         Retr  Cwnd
[  5]   0.00-1.00   sec  1.10 GBytes  9420 Mbits/sec  12   1.2 MBytes
[  5]   1.00-2.00   sec   128 KBytes  1.05 Mbits/sec    0   1.2 MBytes
- - - - - - - - - - - - - - - - - - - - - - - - -
[ ID] Interval           Transfer     Bitrate         Retr
[  5]   0.00-2.00   sec  1.10 GBytes  4711 Mbits/sec   12             sender
[  5]   0.00-2.00   sec  1.10 GBytes  4700 Mbits/sec                  receiver

iperf Done.";
        let lines: Vec<Line> = report.lines().filter_map(parse_line).collect();
        assert_eq!(
            lines,
            [Line::Interval(9420.0), Line::Interval(1.05), Line::Receiver(4700.0)]
        );
    }
}
