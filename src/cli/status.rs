//! `flanneld status`: what this host's daemon is doing.

use std::{
    io::{self, IsTerminal, Write},
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use clap::Args;

use super::table::table;
use crate::observe::{
    socket::{self, ReadError},
    status::{Engine, Peer, Sandbox, Status, Traffic, Worker},
};

/// `flanneld status`.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub struct StatusArgs {
    /// For programs
    #[arg(long)]
    json: bool,
    /// Again and again, every so many seconds, with rates
    #[arg(
        long,
        value_name = "SECONDS",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "2",
        value_parser = clap::value_parser!(u64).range(1..=3_600)
    )]
    watch: Option<u64>,
    /// The subnet file of the daemon: its socket lies beside it
    #[arg(
        long,
        env = "FLANNELD_SUBNET_FILE",
        value_name = "FILE",
        default_value = "/run/flannel/subnet.env"
    )]
    subnet_file: PathBuf,
    /// The socket itself, where the daemon was given another one
    #[arg(long, env = "FLANNELD_STATUS_SOCKET", value_name = "PATH")]
    status_socket: Option<PathBuf>,
}

/// Why the status could not be shown.
#[derive(Debug, thiserror::Error)]
pub enum StatusError {
    /// The daemon does not tell.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The answer could not be shown.
    #[error("cannot write the answer: {0}")]
    Output(#[from] io::Error),
}

/// Shows the status on `out`; with `--watch` until the daemon or the reader is gone.
///
/// # Errors
/// See [`StatusError`].
pub fn run(args: &StatusArgs, out: &mut (impl Write + IsTerminal)) -> Result<(), StatusError> {
    let path = args
        .status_socket
        .clone()
        .unwrap_or_else(|| socket::beside(&args.subnet_file));
    let mut before: Option<(Status, Instant)> = None;
    loop {
        let status = socket::read(&path)?;
        let now = Instant::now();
        let text = if args.json {
            // A status is made of strings, numbers and lists of them, which have a JSON form.
            serde_json::to_string_pretty(&status).unwrap_or_default() + "\n"
        } else {
            let rates = before
                .as_ref()
                // Of another process it would be nonsense.
                .filter(|(before, _)| before.pid == status.pid)
                .map(|(before, then)| (before, now.duration_since(*then)));
            render(&status, rates)
        };
        if args.watch.is_some() && !args.json && out.is_terminal() {
            // Home, and clear what is below (ECMA-48, CUP and ED): without a flicker.
            out.write_all(b"\x1b[H\x1b[J")?;
        }
        out.write_all(text.as_bytes())?;
        out.flush()?;
        let Some(seconds) = args.watch else { return Ok(()) };
        before = Some((status, now));
        thread::sleep(Duration::from_secs(seconds));
    }
}

/// For people. `before`: an earlier status of the same daemon and how long ago that was, for rates.
fn render(status: &Status, before: Option<(&Status, Duration)>) -> String {
    let mut lines = vec![format!(
        "flanneld {}, process {}, up {}: {}",
        status.version,
        status.pid,
        duration(status.uptime_seconds),
        match (&status.waiting_for, status.ready) {
            (_, true) if status.degraded.is_some() => "ready, but DEGRADED".to_owned(),
            (_, true) => "ready".to_owned(),
            (Some(what), false) => format!("NOT READY, waiting for {what}"),
            (None, false) => "NOT READY".to_owned(),
        }
    )];
    let mut fact = |name: &str, text: String| lines.push(format!("{name:<10} {text}"));
    if let Some(why) = &status.degraded {
        fact("Degraded", why.clone());
    }
    if let Some(backend) = &status.backend {
        let device = backend
            .device
            .as_ref()
            .map_or(String::new(), |device| format!(", {device}"));
        let engine = backend.engine.as_ref().map_or(String::new(), |engine| {
            format!(", {} workers, I/O {}", engine.workers.len(), engine.io)
        });
        fact(
            "Backend",
            format!("{}{device}, MTU {}{engine}", backend.kind, backend.mtu),
        );
        if let Some(engine) = &backend.engine {
            fact("Offloads", offloads(engine));
        }
    }
    let repairs: Vec<String> = repairs(status)
        .filter(|(_, count)| *count > 0)
        .map(|(what, count)| format!("{what} {count}"))
        .collect();
    if !repairs.is_empty() {
        fact("Repaired", repairs.join(", "));
    }
    if let Some(external) = &status.external {
        let public = if external.public_ip == external.address {
            String::new()
        } else {
            format!(", PublicIP {}", external.public_ip)
        };
        fact(
            "Interface",
            format!(
                "{}, {}, MTU {}{public}",
                external.interface, external.address, external.mtu
            ),
        );
    }
    if let Some(lease) = &status.lease {
        let v6 = lease
            .ipv6_subnet
            .as_ref()
            .map_or(String::new(), |net| format!(", {net}"));
        let left = match lease.seconds_left {
            Some(left) => format!("{} left", duration(left)),
            None => "reserved".to_owned(),
        };
        fact("Lease", format!("{}{v6}, {left}", lease.subnet));
    }
    let registry = &status.registry;
    let event = registry
        .seconds_since_event
        .map_or(String::new(), |age| format!(", last change {} ago", duration(age)));
    let contact = match (&registry.trouble, registry.seconds_since_answer) {
        (None, Some(_)) => "connected".to_owned(),
        (None, None) => "not asked yet".to_owned(),
        (Some(trouble), Some(age)) => format!("NO ANSWER since {}: {trouble}", duration(age)),
        (Some(trouble), None) => format!("NO ANSWER yet: {trouble}"),
    };
    fact("Registry", format!("{}: {contact}{event}", registry.name));
    fact("Sandbox", sandbox(&status.sandbox));
    if let Some(total) = engine_total(status) {
        let then = before.and_then(|(before, past)| Some((engine_total(before)?, past)));
        let rate = |now: Traffic, of: fn(&Worker) -> Traffic| {
            then.as_ref().map_or(String::new(), |(then, past)| {
                format!(" ({})", rate(of(then), now, *past))
            })
        };
        fact(
            "Traffic",
            format!(
                "sent {}{}, received {}{}",
                amount(total.sent),
                rate(total.sent, |worker| worker.sent),
                amount(total.received),
                rate(total.received, |worker| worker.received)
            ),
        );
        fact("Dropped", dropped(status, &total));
    }
    let mut text = lines.join("\n") + "\n\n";
    if status.peers.is_empty() {
        text += "No other host has a lease of this backend.\n";
    } else {
        text += &peers(status, before);
    }
    text
}

/// What others had changed and was put right, with how often.
fn repairs(status: &Status) -> impl Iterator<Item = (&str, u64)> {
    let backend = status.backend.iter().flat_map(|backend| &backend.repairs);
    backend
        .map(|(what, count)| (what.as_str(), *count))
        .chain([("rules", status.rule_repairs)])
}

/// What the daemon may still do.
fn sandbox(sandbox: &Sandbox) -> String {
    if !sandbox.on {
        return "off".to_owned();
    }
    let kept = match &sandbox.capabilities[..] {
        [] => "no capabilities".to_owned(),
        some => some.join(", "),
    };
    let workers = match sandbox.worker_filter {
        None => "",
        Some(true) => "; workers may only move packets",
        Some(false) => "; workers have none, and NO FILTER",
    };
    let mut text = format!("on, keeps {kept}{workers}");
    for trouble in &sandbox.troubles {
        text += &format!("; without {trouble}");
    }
    let refused: Vec<String> = sandbox
        .refused
        .iter()
        .map(|(call, count)| format!("{call} {count}"))
        .collect();
    if !refused.is_empty() {
        text += &format!("; REFUSED {}", refused.join(", "));
    }
    text
}

fn engine_total(status: &Status) -> Option<Worker> {
    let engine = status.backend.as_ref()?.engine.as_ref()?;
    Some(Worker::total(&engine.workers))
}

fn offloads(engine: &Engine) -> String {
    let on: Vec<&str> = engine
        .offloads
        .iter()
        .filter(|offload| offload.on)
        .map(|offload| offload.name.as_str())
        .collect();
    let mut text = if on.is_empty() {
        "none".to_owned()
    } else {
        on.join(", ")
    };
    for offload in engine.offloads.iter().filter(|offload| !offload.on) {
        let why = offload.why_not.as_deref().unwrap_or("not known why");
        text += &format!("; {} off: {why}", offload.name);
    }
    if engine.refusing_peers > 0 {
        text += &format!(
            "; {} peers get single datagrams: their way refuses segments",
            engine.refusing_peers
        );
    }
    text
}

fn dropped(status: &Status, total: &Worker) -> String {
    let device = status
        .backend
        .as_ref()
        .and_then(|backend| backend.engine.as_ref()?.device_overflow)
        .unwrap_or_default();
    let named = total.dropped.iter().map(|(name, count)| (name.as_str(), *count));
    let all = named.chain([("socket_overflow", total.socket_overflow), ("device_overflow", device)]);
    let some: Vec<String> = all
        .filter(|(_, count)| *count > 0)
        .map(|(name, count)| format!("{name} {count}"))
        .collect();
    if some.is_empty() {
        "nothing".to_owned()
    } else {
        some.join(", ")
    }
}

fn peers(status: &Status, before: Option<(&Status, Duration)>) -> String {
    let earlier = |peer: &Peer| {
        let (before, past) = before?;
        let known = before.peers.iter().find(|known| known.subnet == peer.subnet)?;
        Some((known.traffic?, past))
    };
    let rows = status.peers.iter().map(|peer| {
        let subnet = match &peer.ipv6_subnet {
            Some(v6) => format!("{},{v6}", peer.subnet),
            None => peer.subnet.clone(),
        };
        let Some(traffic) = peer.traffic else {
            let unknown = || "-".to_owned();
            return [
                subnet,
                peer.public_ip.to_string(),
                unknown(),
                unknown(),
                unknown(),
                unknown(),
            ];
        };
        let (sent, received) = match earlier(peer) {
            Some((then, past)) => (
                rate(then.sent, traffic.sent, past),
                rate(then.received, traffic.received, past),
            ),
            None => (amount(traffic.sent), amount(traffic.received)),
        };
        let drops = [("unsent", traffic.unsent), ("refused", traffic.refused)];
        let drops: Vec<String> = drops
            .into_iter()
            .filter(|(_, count)| *count > 0)
            .map(|(name, count)| format!("{name} {count}"))
            .collect();
        [
            subnet,
            peer.public_ip.to_string(),
            sent,
            received,
            traffic
                .seconds_since_received
                .map_or("never".to_owned(), |age| format!("{} ago", duration(age))),
            if drops.is_empty() {
                "-".to_owned()
            } else {
                drops.join(", ")
            },
        ]
    });
    table(
        ["SUBNET", "PUBLIC IP", "SENT", "RECEIVED", "LAST SEEN", "DROPPED"],
        rows,
    )
}

/// `3 d 4 h`, `12 min`, `7 s`: as exact as a person wants it.
fn duration(seconds: u64) -> String {
    const MINUTE: u64 = 60;
    const HOUR: u64 = 60 * MINUTE;
    const DAY: u64 = 24 * HOUR;
    match seconds {
        0..MINUTE => format!("{seconds} s"),
        MINUTE..HOUR => format!("{} min", seconds / MINUTE),
        HOUR..DAY => format!("{} h {} min", seconds / HOUR, seconds % HOUR / MINUTE),
        _ => format!("{} d {} h", seconds / DAY, seconds % DAY / HOUR),
    }
}

/// `1234 packets, 1.2 MB`.
fn amount(traffic: Traffic) -> String {
    format!("{} packets, {}B", traffic.packets, scaled(traffic.bytes as f64))
}

/// `83 k packets/s, 940 Mbit/s`.
fn rate(then: Traffic, now: Traffic, past: Duration) -> String {
    let per_second = |then: u64, now: u64| now.saturating_sub(then) as f64 / past.as_secs_f64().max(f64::MIN_POSITIVE);
    format!(
        "{}packets/s, {}bit/s",
        scaled(per_second(then.packets, now.packets)),
        scaled(8.0 * per_second(then.bytes, now.bytes))
    )
}

/// A number with the SI prefix of its unit, which is to follow at once: `1.2 M`, `17 `.
fn scaled(number: f64) -> String {
    let (scale, prefix) = [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")]
        .into_iter()
        .find(|(scale, _)| number >= *scale)
        .unwrap_or((1.0, ""));
    let number = number / scale;
    let digits = usize::from(number < 10.0 && !prefix.is_empty());
    format!("{number:.digits$} {prefix}")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::observe::{
        board::Board,
        status::{Backend, External, Lease, Offload, PeerTraffic},
    };

    fn traffic(packets: u64) -> Traffic {
        Traffic {
            packets,
            bytes: 1_000 * packets,
        }
    }

    fn status(packets: u64) -> Status {
        let mut status = Board::new("etcd at http://192.0.2.9:2379".to_owned()).status();
        (status.pid, status.version) = (4711, "1.2.3".to_owned());
        status.uptime_seconds = 3_725;
        status.ready = true;
        status.external = Some(External {
            interface: "eth0".to_owned(),
            address: [192, 0, 2, 1].into(),
            mtu: 1500,
            public_ip: [203, 0, 113, 1].into(),
        });
        status.lease = Some(Lease {
            subnet: "10.5.1.0/24".to_owned(),
            ipv6_subnet: None,
            seconds_left: Some(86_399),
            renew_margin_seconds: 3_600,
        });
        status.registry.connected = true;
        status.registry.seconds_since_answer = Some(1);
        status.registry.seconds_since_event = Some(61);
        let offload = |name: &str, why_not: Option<&str>| Offload {
            name: name.to_owned(),
            on: why_not.is_none(),
            why_not: why_not.map(str::to_owned),
        };
        status.backend = Some(Backend {
            kind: "udp".to_owned(),
            device: Some("flannel0".to_owned()),
            mtu: 1472,
            repairs: BTreeMap::new(),
            engine: Some(Engine {
                io: "mmsg".to_owned(),
                offloads: vec![offload("tun_tcp", None), offload("udp_gro", Some("an old kernel"))],
                workers: vec![
                    Worker {
                        sent: traffic(packets),
                        dropped: BTreeMap::from([("no_route".to_owned(), 3)]),
                        ..Worker::default()
                    };
                    2
                ],
                device_overflow: Some(5),
                refusing_peers: 0,
            }),
        });
        status.peers = vec![Peer {
            subnet: "10.5.2.0/24".to_owned(),
            ipv6_subnet: None,
            public_ip: [192, 0, 2, 2].into(),
            public_ipv6: None,
            traffic: Some(PeerTraffic {
                sent: traffic(2 * packets),
                received: Traffic::default(),
                seconds_since_received: None,
                unsent: 7,
                refused: 0,
            }),
        }];
        status
    }

    #[test]
    fn what_the_daemon_may_do_is_told_on_one_line() {
        let confined = Sandbox {
            on: true,
            capabilities: ["NET_ADMIN", "NET_RAW"].map(str::to_owned).to_vec(),
            no_new_privs: true,
            control_filter: true,
            worker_filter: Some(true),
            troubles: vec![],
            refused: BTreeMap::new(),
        };
        assert_eq!(
            sandbox(&confined),
            "on, keeps NET_ADMIN, NET_RAW; workers may only move packets"
        );
        let kernel_backend = Sandbox {
            worker_filter: None,
            capabilities: vec![],
            ..confined.clone()
        };
        assert_eq!(sandbox(&kernel_backend), "on, keeps no capabilities");
        let in_trouble = Sandbox {
            worker_filter: Some(false),
            troubles: vec!["a filter of system calls: Function not implemented".to_owned()],
            refused: BTreeMap::from([("socket".to_owned(), 3)]),
            ..confined
        };
        assert_eq!(
            sandbox(&in_trouble),
            "on, keeps NET_ADMIN, NET_RAW; workers have none, and NO FILTER; without a filter of system calls: Function not \
             implemented; REFUSED socket 3"
        );
    }

    #[test]
    fn a_status_is_told_on_a_few_lines() {
        let expected = "\
flanneld 1.2.3, process 4711, up 1 h 2 min: ready
Backend    udp, flannel0, MTU 1472, 2 workers, I/O mmsg
Offloads   tun_tcp; udp_gro off: an old kernel
Interface  eth0, 192.0.2.1, MTU 1500, PublicIP 203.0.113.1
Lease      10.5.1.0/24, 23 h 59 min left
Registry   etcd at http://192.0.2.9:2379: connected, last change 1 min ago
Sandbox    off
Traffic    sent 2000 packets, 2.0 MB, received 0 packets, 0 B
Dropped    no_route 6, device_overflow 5

SUBNET        PUBLIC IP   SENT                   RECEIVED         LAST SEEN   DROPPED
10.5.2.0/24   192.0.2.2   2000 packets, 2.0 MB   0 packets, 0 B   never       unsent 7
";
        assert_eq!(render(&status(1_000), None), expected);
    }

    #[test]
    fn two_moments_give_rates() {
        let text = render(&status(2_000), Some((&status(1_000), Duration::from_secs(2))));
        assert!(
            text.contains("sent 4000 packets, 4.0 MB (1.0 kpackets/s, 8.0 Mbit/s)"),
            "{text}"
        );
        assert!(
            text.contains("10.5.2.0/24   192.0.2.2   1.0 kpackets/s, 8.0 Mbit/s"),
            "{text}"
        );
    }

    #[test]
    fn a_daemon_that_waits_says_for_what() {
        let board = Board::new("a test".to_owned());
        board.waiting_for("the network's configuration");
        let text = render(&board.status(), None);
        assert!(
            text.contains("NOT READY, waiting for the network's configuration\n"),
            "{text}"
        );
        assert!(text.contains("Registry   a test: not asked yet\n"), "{text}");
        assert!(text.ends_with("No other host has a lease of this backend.\n"), "{text}");
    }

    #[test]
    fn durations_and_numbers_are_short() {
        let durations = [0, 59, 60, 3_599, 3_600, 86_400, 90_000].map(duration);
        assert_eq!(
            durations,
            ["0 s", "59 s", "1 min", "59 min", "1 h 0 min", "1 d 0 h", "1 d 1 h"]
        );
        let numbers = [0.0, 999.0, 1_000.0, 12_345.0, 9.9e6, 2.5e12].map(scaled);
        assert_eq!(numbers, ["0 ", "999 ", "1.0 k", "12 k", "9.9 M", "2.5 T"]);
    }
}
