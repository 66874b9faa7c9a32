//! The demo's tables.

use crate::lab::{Ping, Rtt};
use comfy_table::{CellAlignment, Table, presets};
use std::net::Ipv4Addr;

/// Two containers, and what came of the ping from one to the other.
#[derive(Clone, Debug)]
pub(super) struct PairResult {
    /// Name and address of the sender.
    pub(super) from: (String, Ipv4Addr),
    /// Name and address of the one that answers.
    pub(super) to: (String, Ipv4Addr),
    /// The device by which the sender's host sends to the other; `None`: it has no route.
    pub(super) path: Option<String>,
    /// The outcome; `None`: ping did not get as far as sending.
    pub(super) ping: Option<Ping>,
}

impl PairResult {
    /// Whether not a single answer came.
    pub(super) fn failed(&self) -> bool {
        self.ping.is_none_or(|ping| ping.received == 0)
    }
}

/// One line for each pair; those that failed say so.
pub(super) fn ping_table(pairs: &[PairResult]) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header(["FROM", "TO", "PATH", "ANSWERS", "RTT MIN", "RTT AVG", "TTL"]);
    for pair in pairs {
        let end = |(name, ip): &(String, Ipv4Addr)| format!("{name} {ip}");
        let (answers, [min, avg], ttl) = match pair.ping {
            Some(Ping {
                sent,
                received,
                rtt: Some(Rtt { min, avg }),
                ttl,
            }) if received > 0 => (
                format!("{received}/{sent}"),
                [min, avg].map(|ms| format!("{ms:.3} ms")),
                ttl.map_or_else(String::new, |ttl| ttl.to_string()),
            ),
            _ => ("FAILED".to_owned(), ["-", "-"].map(str::to_owned), "-".to_owned()),
        };
        let path = pair.path.clone().unwrap_or_else(|| "-".to_owned());
        table.add_row([end(&pair.from), end(&pair.to), path, answers, min, avg, ttl]);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    for column in table.column_iter_mut().skip(3) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.trim_fmt()
}

/// A rate as people say it: `9.42 Gbit/s`, `870 Mbit/s`.
pub(super) fn rate(mbits: f64) -> String {
    if mbits >= 1000.0 {
        format!("{:.2} Gbit/s", mbits / 1000.0)
    } else {
        format!("{mbits:.0} Mbit/s")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(ping: Option<Ping>) -> PairResult {
        PairResult {
            from: ("c1".to_owned(), Ipv4Addr::new(10, 5, 1, 2)),
            to: ("c2".to_owned(), Ipv4Addr::new(10, 5, 2, 2)),
            path: ping.map(|_| "flannel.1".to_owned()),
            ping,
        }
    }

    #[test]
    fn answered_pair_shows_path_times_and_ttl() {
        let ping = Ping {
            sent: 5,
            received: 4,
            ttl: Some(60),
            rtt: Some(Rtt { min: 0.0614, avg: 0.1 }),
        };
        let table = ping_table(&[pair(Some(ping))]);
        let words: Vec<&str> = table.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!(
            words,
            [
                "c1",
                "10.5.1.2",
                "c2",
                "10.5.2.2",
                "flannel.1",
                "4/5",
                "0.061",
                "ms",
                "0.100",
                "ms",
                "60"
            ]
        );
    }

    #[test]
    fn pair_without_an_answer_is_failed() {
        let silent = pair(Some(Ping {
            sent: 5,
            received: 0,
            ttl: None,
            rtt: None,
        }));
        let unsent = pair(None);
        assert!(silent.failed() && unsent.failed());
        assert_eq!(ping_table(&[silent, unsent]).matches("FAILED").count(), 2);
    }

    #[test]
    fn rates_are_rounded_for_people() {
        assert_eq!(rate(9421.0), "9.42 Gbit/s");
        assert_eq!(rate(870.4), "870 Mbit/s");
    }
}
