//! `ping` of iputils: how it is run, and what it says.

use super::process::one_line;
use super::{LabError, Namespace};
use std::{net::IpAddr, process::Command};

/// Round-trip times in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rtt {
    /// The shortest.
    pub min: f64,
    /// The mean.
    pub avg: f64,
}

/// The outcome of one run of `ping`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ping {
    /// Echo requests sent.
    pub sent: u32,
    /// Answers that came back in time.
    pub received: u32,
    /// TTL (hop limit) of the first answer; `None` when there was none.
    pub ttl: Option<u8>,
    /// Times of the answers; `None` when there was none.
    pub rtt: Option<Rtt>,
}

/// `count` echo requests from `ns` to `target`, ten a second, each waited for one second.
pub fn ping_command(ns: &Namespace, target: IpAddr, count: u32) -> Command {
    let mut ping = ns.command("ping");
    ping.args([
        "-n",
        "-i",
        "0.1",
        "-W",
        "1",
        "-c",
        &count.to_string(),
        &target.to_string(),
    ]);
    ping
}

impl Ping {
    /// Reads what `ping` wrote, with or without answers.
    ///
    /// # Errors
    /// [`LabError::Output`] when it holds no statistics: ping did not get as far as sending.
    pub fn parse(output: &str) -> Result<Ping, LabError> {
        let statistics = output
            .lines()
            .find(|line| line.contains("packets transmitted"))
            .and_then(|line| {
                let mut parts = line.split(", ");
                Some((first_number(parts.next()?)?, first_number(parts.next()?)?))
            });
        let (sent, received) = statistics.ok_or_else(|| LabError::Output {
            program: "ping",
            output: one_line(output),
        })?;
        let rtt = output.lines().find(|line| line.starts_with("rtt ")).and_then(|line| {
            let mut times = line.split_once(" = ")?.1.split('/');
            Some(Rtt {
                min: times.next()?.parse().ok()?,
                avg: times.next()?.parse().ok()?,
            })
        });
        let ttl = output
            .lines()
            .find_map(|line| first_number(line.split_once(" ttl=")?.1))
            .and_then(|n| n.try_into().ok());
        Ok(Ping {
            sent,
            received,
            ttl,
            rtt,
        })
    }

    /// Runs `ping` to its end; no answer at all is an outcome, not an error.
    ///
    /// # Errors
    /// [`LabError::Start`], and [`LabError::Output`] with what ping wrote when it could not send.
    pub fn run(ns: &Namespace, target: IpAddr, count: u32) -> Result<Ping, LabError> {
        let mut command = ping_command(ns, target, count);
        let output = command.output().map_err(|source| LabError::Start {
            command: format!("ping {target}"),
            source,
        })?;
        let mut said = String::from_utf8_lossy(&output.stdout).into_owned();
        said.push_str(&String::from_utf8_lossy(&output.stderr));
        Ping::parse(&said)
    }
}

/// The number that the text starts with.
fn first_number(text: &str) -> Option<u32> {
    let text = text.trim_start();
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    text[..end].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_counted_and_timed() {
        let output = "\
PING 10.5.2.2 (10.5.2.2) 56(84) bytes of data.
64 bytes from 10.5.2.2: icmp_seq=1 ttl=60 time=0.123 ms
64 bytes from 10.5.2.2: icmp_seq=2 ttl=60 time=0.061 ms

--- 10.5.2.2 ping statistics ---
3 packets transmitted, 2 received, 33.3333% packet loss, time 812ms
rtt min/avg/max/mdev = 0.061/0.092/0.123/0.031 ms
";
        let expected = Ping {
            sent: 3,
            received: 2,
            ttl: Some(60),
            rtt: Some(Rtt { min: 0.061, avg: 0.092 }),
        };
        assert_eq!(Ping::parse(output).unwrap(), expected);
    }

    #[test]
    fn no_answer_is_an_outcome() {
        let output = "\
PING 10.5.2.2 (10.5.2.2) 56(84) bytes of data.
From 10.5.1.1 icmp_seq=1 Destination Net Unreachable

--- 10.5.2.2 ping statistics ---
1 packets transmitted, 0 received, +1 errors, 100% packet loss, time 0ms

";
        assert_eq!(
            Ping::parse(output).unwrap(),
            Ping {
                sent: 1,
                received: 0,
                ttl: None,
                rtt: None
            }
        );
    }

    #[test]
    fn ping_that_could_not_send_is_an_error_with_its_words() {
        let error = Ping::parse("ping: connect: Network is unreachable\n")
            .unwrap_err()
            .to_string();
        assert!(
            error.ends_with("output of `ping`: ping: connect: Network is unreachable"),
            "{error}"
        );
    }
}
