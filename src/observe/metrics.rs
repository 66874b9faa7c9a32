//! What a daemon is doing, in the text format of Prometheus: names, units and suffixes by its conventions
//! (prometheus.io, "Metric and label naming").

use std::{
    collections::BTreeMap,
    fmt,
    time::{Duration, SystemTime},
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, prometheus_text},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::Registry,
};

use super::status::{Backend, Engine, PeerTraffic, Sandbox, Status, Worker};

pub use prometheus_text::CONTENT_TYPE;

/// How many peers have series of their own, those with the most packets: each has seven, and a server of metrics keeps all
/// that it has ever seen in memory. A host talks to fewer than this even in a large network.
const MOST_PEERS: usize = 500;

/// All metrics of one moment.
pub fn render(status: &Status) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Moment(status.clone())));
    let mut text = String::new();
    // Writing to a String cannot fail, and nothing here is of a kind that the format lacks.
    let _ = prometheus_text::encode(&mut text, &registry);
    text
}

#[derive(Debug)]
struct Moment(Status);

impl Collector for Moment {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        // A clock before 1970 tells nothing.
        let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        let mut page = Page { encoder, now };
        page.daemon(&self.0)?;
        page.registry(&self.0)?;
        if let Some(backend) = &self.0.backend {
            page.backend(backend)?;
        }
        if let Some(engine) = self.0.backend.as_ref().and_then(|backend| backend.engine.as_ref()) {
            page.engine(engine)?;
        }
        page.repairs(&self.0)?;
        page.sandbox(&self.0.sandbox)?;
        page.peers(&self.0)
    }
}

/// A label and its value.
type Label<'a> = (&'a str, String);

struct Page<'a> {
    encoder: DescriptorEncoder<'a>,
    /// In Unix time.
    now: Duration,
}

impl Page<'_> {
    fn gauges<const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = ([Label<'static>; N], f64)>,
    ) -> fmt::Result {
        let mut family = self.encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (labels, value) in samples {
            ConstGauge::new(value).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }

    /// So many seconds ago, in Unix time.
    fn moment(&self, age: u64) -> f64 {
        self.now.saturating_sub(Duration::from_secs(age)).as_secs() as f64
    }

    fn gauge(&mut self, name: &str, help: &str, value: f64) -> fmt::Result {
        let family = self.encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        ConstGauge::new(value).encode(family)
    }

    /// The format puts `_total` behind the name.
    fn counters<const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = ([Label<'static>; N], u64)>,
    ) -> fmt::Result {
        let mut family = self.encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for (labels, value) in samples {
            ConstCounter::new(value).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }

    fn daemon(&mut self, status: &Status) -> fmt::Result {
        let version = [("version", status.version.clone())];
        self.gauges("flannel_build_info", "The version that runs", [(version, 1.0)])?;
        self.gauge(
            "flannel_start_time_seconds",
            "When the daemon started, in Unix time",
            self.moment(status.uptime_seconds),
        )?;
        self.gauge(
            "flannel_ready",
            "Whether subnet file, backend and rules are in place",
            flag(status.ready),
        )?;
        self.gauge(
            "flannel_degraded",
            "Whether what the daemon serves may not be so any more: it was started while the registry was away, or could not renew \
             its lease",
            flag(status.degraded.is_some()),
        )?;
        if let Some(external) = &status.external {
            let labels = [
                ("interface", external.interface.clone()),
                ("public_ip", external.public_ip.to_string()),
            ];
            self.gauges(
                "flannel_external_interface_info",
                "The interface that faces the other hosts",
                [(labels, 1.0)],
            )?;
        }
        if let Some(lease) = &status.lease {
            let labels = [("subnet", lease.subnet.clone())];
            self.gauges("flannel_lease_info", "This host's subnet", [(labels, 1.0)])?;
            if let Some(left) = lease.seconds_left {
                self.gauge(
                    "flannel_lease_remaining_seconds",
                    "Until this host's lease expires unless it is renewed; absent for a reservation",
                    left as f64,
                )?;
                self.gauge(
                    "flannel_lease_renew_margin_seconds",
                    "How much is left of the lease when it is renewed",
                    lease.renew_margin_seconds as f64,
                )?;
            }
        }
        Ok(())
    }

    fn registry(&mut self, status: &Status) -> fmt::Result {
        let registry = &status.registry;
        self.gauge(
            "flannel_registry_connected",
            "Whether the last thing that was asked of the registry was answered",
            flag(registry.connected),
        )?;
        if let Some(age) = registry.seconds_since_answer {
            self.gauge(
                "flannel_registry_last_answer_timestamp_seconds",
                "When the registry last answered or told of a change, in Unix time",
                self.moment(age),
            )?;
        }
        if let Some(age) = registry.seconds_since_event {
            self.gauge(
                "flannel_registry_last_event_timestamp_seconds",
                "When the registry last told of a change, in Unix time",
                self.moment(age),
            )?;
        }
        self.counters(
            "flannel_registry_requests",
            "What was asked of the registry",
            registry.requests.iter().flat_map(|(operation, requests)| {
                let labels = move |result: &str| [("operation", operation.clone()), ("result", result.to_owned())];
                [
                    (labels("answered"), requests.answered),
                    (labels("failed"), requests.failed),
                ]
            }),
        )?;
        let mut family = self.encoder.encode_descriptor(
            "flannel_registry_request_seconds",
            "How long the registry took over all that was asked of it",
            None,
            MetricType::Counter,
        )?;
        for (operation, requests) in &registry.requests {
            let labels = [("operation", operation.clone())];
            ConstCounter::new(requests.seconds).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }

    fn backend(&mut self, backend: &Backend) -> fmt::Result {
        let labels = [
            ("backend", backend.kind.clone()),
            ("device", backend.device.clone().unwrap_or_default()),
        ];
        self.gauges("flannel_backend_info", "What carries the packets", [(labels, 1.0)])?;
        self.gauge(
            "flannel_mtu_bytes",
            "The largest packet that containers may send",
            f64::from(backend.mtu),
        )?;
        Ok(())
    }

    fn repairs(&mut self, status: &Status) -> fmt::Result {
        let backend = status.backend.iter().flat_map(|backend| &backend.repairs);
        let all = backend
            .map(|(what, count)| (what.clone(), *count))
            .chain([("rules".to_owned(), status.rule_repairs)]);
        self.counters(
            "flannel_repairs",
            "What others had changed in the kernel and was put right",
            all.map(|(what, count)| ([("what", what)], count)),
        )
    }

    fn sandbox(&mut self, sandbox: &Sandbox) -> fmt::Result {
        let parts = [
            ("no_new_privs", Some(sandbox.no_new_privs)),
            ("control_filter", Some(sandbox.control_filter)),
            ("worker_filter", sandbox.worker_filter),
        ];
        self.gauge(
            "flannel_sandbox_enabled",
            "Whether the daemon is to be confined",
            flag(sandbox.on),
        )?;
        self.gauges(
            "flannel_sandbox_part_enabled",
            "What it is confined by",
            parts
                .into_iter()
                .filter_map(|(part, on)| Some(([("part", part.to_owned())], flag(on?)))),
        )?;
        self.gauges(
            "flannel_sandbox_capability",
            "What is left to the daemon of root's capabilities",
            sandbox
                .capabilities
                .iter()
                .map(|name| ([("capability", name.clone())], 1.0)),
        )?;
        self.counters(
            "flannel_sandbox_refused_calls",
            "System calls that workers were refused",
            sandbox
                .refused
                .iter()
                .map(|(call, count)| ([("call", call.clone())], *count)),
        )
    }

    fn engine(&mut self, engine: &Engine) -> fmt::Result {
        let io = [("io", engine.io.clone())];
        self.gauges("flannel_engine_info", "How packets are moved", [(io, 1.0)])?;
        self.gauges(
            "flannel_offload_enabled",
            "What the kernel does for the engine",
            engine
                .offloads
                .iter()
                .map(|offload| ([("offload", offload.name.clone())], flag(offload.on))),
        )?;
        self.gauge(
            "flannel_peers_refusing_segments",
            "Hosts to which the way refuses segmented messages just now",
            engine.refusing_peers as f64,
        )?;
        type Count = fn(&Worker) -> u64;
        let counts: [(&str, &str, Count); 10] = [
            ("sent_packets", "Packets sent to peers", |worker| worker.sent.packets),
            ("sent_bytes", "Bytes of the packets sent to peers", |worker| {
                worker.sent.bytes
            }),
            ("received_packets", "Packets received from peers", |worker| {
                worker.received.packets
            }),
            ("received_bytes", "Bytes of the packets received from peers", |worker| {
                worker.received.bytes
            }),
            (
                "sent_messages",
                "Messages that the socket took, of one datagram or several",
                |worker| worker.messages_sent,
            ),
            (
                "received_messages",
                "Messages that the socket gave, of one datagram or several",
                |worker| worker.messages_received,
            ),
            (
                "superpackets_split",
                "Superpackets that the device handed over",
                |worker| worker.superpackets_split,
            ),
            ("superpackets_merged", "Superpackets that the device took", |worker| {
                worker.superpackets_merged
            }),
            ("icmp_errors", "ICMP errors sent", |worker| worker.icmp_errors),
            (
                "socket_overflow",
                "Messages for which the socket's receive buffer had no room",
                |worker| worker.socket_overflow,
            ),
        ];
        for (name, help, count) in counts {
            let workers = engine.workers.iter().enumerate();
            self.counters(
                &format!("flannel_worker_{name}"),
                help,
                workers.map(|(number, worker)| ([("worker", number.to_string())], count(worker))),
            )?;
        }
        self.by_name(
            "flannel_dropped_packets",
            "Packets that went no further",
            "reason",
            engine.workers.iter().map(|worker| &worker.dropped),
        )?;
        self.by_name(
            "flannel_send_errors",
            "Packets that the socket did not take, by the system's error",
            "error",
            engine.workers.iter().map(|worker| &worker.send_errors),
        )?;
        if let Some(overflow) = engine.device_overflow {
            self.counters(
                "flannel_device_overflow",
                "Packets that the device could not queue for the engine",
                [([], overflow)],
            )?;
        }
        Ok(())
    }

    fn by_name<'s>(
        &mut self,
        name: &str,
        help: &str,
        label: &'static str,
        workers: impl Iterator<Item = &'s BTreeMap<String, u64>>,
    ) -> fmt::Result {
        let samples = workers.enumerate().flat_map(|(number, counts)| {
            counts
                .iter()
                .map(move |(name, count)| ([("worker", number.to_string()), (label, name.clone())], *count))
        });
        self.counters(name, help, samples)
    }

    fn peers(&mut self, status: &Status) -> fmt::Result {
        self.gauge(
            "flannel_peers",
            "The other hosts of the network",
            status.peers.len() as f64,
        )?;
        // By host and not by subnet: that is what is counted.
        let mut hosts: BTreeMap<_, PeerTraffic> = BTreeMap::new();
        for peer in &status.peers {
            if let Some(traffic) = peer.traffic {
                hosts.insert(peer.public_ip, traffic);
            }
        }
        if hosts.is_empty() {
            return Ok(());
        }
        let mut hosts: Vec<_> = hosts.into_iter().collect();
        hosts.sort_by_key(|(_, traffic)| std::cmp::Reverse(traffic.sent.packets + traffic.received.packets));
        self.gauge(
            "flannel_peers_without_series",
            "Hosts that have no series of their own, because others have more traffic",
            hosts.len().saturating_sub(MOST_PEERS) as f64,
        )?;
        hosts.truncate(MOST_PEERS);
        type Count = fn(&PeerTraffic) -> u64;
        let counts: [(&str, &str, Count); 6] = [
            ("sent_packets", "Packets sent to the peer", |peer| peer.sent.packets),
            ("sent_bytes", "Bytes of the packets sent to the peer", |peer| {
                peer.sent.bytes
            }),
            ("received_packets", "Packets received from the peer", |peer| {
                peer.received.packets
            }),
            (
                "received_bytes",
                "Bytes of the packets received from the peer",
                |peer| peer.received.bytes,
            ),
            (
                "unsent_packets",
                "Packets for the peer that the socket did not take",
                |peer| peer.unsent,
            ),
            (
                "refused_packets",
                "Packets from the peer that were not let in",
                |peer| peer.refused,
            ),
        ];
        for (name, help, count) in counts {
            self.counters(
                &format!("flannel_peer_{name}"),
                help,
                hosts
                    .iter()
                    .map(|(host, traffic)| ([("peer", host.to_string())], count(traffic))),
            )?;
        }
        let moments: Vec<_> = hosts
            .iter()
            .filter_map(|(host, traffic)| {
                let moment = self.moment(traffic.seconds_since_received?);
                Some(([("peer", host.to_string())], moment))
            })
            .collect();
        self.gauges(
            "flannel_peer_last_received_timestamp_seconds",
            "When the last packet of the peer came, in Unix time; absent until one has",
            moments,
        )
    }
}

fn flag(set: bool) -> f64 {
    f64::from(u8::from(set))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::{
        board::Board,
        status::{Lease, Offload, Peer, Requests, Traffic},
    };

    fn status(peers: u32) -> Status {
        let mut status = Board::new("a test".to_owned()).status();
        let traffic = |packets| Traffic {
            packets,
            bytes: 100 * packets,
        };
        status.lease = Some(Lease {
            subnet: "10.5.1.0/24".to_owned(),
            ipv6_subnet: None,
            seconds_left: Some(3_600),
            renew_margin_seconds: 1_800,
        });
        let asked = Requests {
            answered: 3,
            failed: 1,
            seconds: 0.25,
        };
        status.registry.requests.insert("get".to_owned(), asked);
        (
            status.registry.seconds_since_answer,
            status.registry.seconds_since_event,
        ) = (Some(1), Some(2));
        status.rule_repairs = 3;
        status.backend = Some(Backend {
            kind: "udp".to_owned(),
            device: Some("flannel0".to_owned()),
            mtu: 1472,
            repairs: BTreeMap::from([("route".to_owned(), 2)]),
            engine: Some(Engine {
                io: "mmsg".to_owned(),
                offloads: vec![Offload {
                    name: "udp_gro".to_owned(),
                    on: true,
                    why_not: None,
                }],
                workers: vec![
                    Worker::default(),
                    Worker {
                        sent: traffic(7),
                        dropped: BTreeMap::from([("no_route".to_owned(), 5)]),
                        ..Worker::default()
                    },
                ],
                device_overflow: Some(9),
                refusing_peers: 0,
            }),
        });
        status.peers = (0..peers)
            .map(|number| Peer {
                subnet: format!("10.5.{number}.0/24"),
                ipv6_subnet: None,
                public_ip: (0xc000_0200 + number).into(),
                public_ipv6: None,
                traffic: Some(PeerTraffic {
                    sent: traffic(number.into()),
                    seconds_since_received: (number > 0).then_some(4),
                    ..PeerTraffic::default()
                }),
            })
            .collect();
        status
    }

    #[test]
    fn each_number_of_a_status_has_its_line() {
        let text = render(&status(2));
        for line in [
            &format!("flannel_build_info{{version=\"{}\"}} 1.0", env!("CARGO_PKG_VERSION")),
            "flannel_ready 0.0",
            "flannel_lease_remaining_seconds 3600.0",
            "flannel_registry_requests_total{operation=\"get\",result=\"failed\"} 1",
            "flannel_registry_request_seconds_total{operation=\"get\"} 0.25",
            "flannel_backend_info{backend=\"udp\",device=\"flannel0\"} 1.0",
            "flannel_lease_renew_margin_seconds 1800.0",
            "flannel_repairs_total{what=\"route\"} 2",
            "flannel_repairs_total{what=\"rules\"} 3",
            "flannel_offload_enabled{offload=\"udp_gro\"} 1.0",
            "flannel_worker_sent_bytes_total{worker=\"1\"} 700",
            "flannel_dropped_packets_total{worker=\"1\",reason=\"no_route\"} 5",
            "flannel_device_overflow_total 9",
            "flannel_peers 2.0",
            "flannel_peer_sent_packets_total{peer=\"192.0.2.1\"} 1",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
        assert!(
            !text.contains("last_received_age_seconds{peer=\"192.0.2.0\"}"),
            "{text}"
        );
    }

    #[test]
    fn each_name_is_described_once_and_ends_as_its_kind_demands() {
        let text = render(&status(3));
        let mut names = Vec::new();
        for line in text.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
            let (name, kind) = line.split_once(' ').unwrap();
            assert_eq!(name.ends_with("_total"), kind == "counter", "{line}");
            assert!(text.contains(&format!("# HELP {name} ")), "{line}");
            names.push(name);
        }
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn what_the_dashboard_and_the_alerts_look_at_is_there() {
        let text = render(&status(2));
        let files = [
            include_str!("../../docs/monitoring/alerts.yml"),
            include_str!("../../docs/monitoring/dashboard.json"),
        ];
        let name = regex::Regex::new(r"\bflannel_[a-z_]+").unwrap();
        let names: Vec<&str> = files
            .iter()
            .flat_map(|file| name.find_iter(file))
            .map(|found| found.as_str())
            .collect();
        assert!(names.len() > 20, "{names:?}");
        for name in names {
            assert!(text.contains(&format!("# TYPE {name} ")), "no metric is called {name}");
        }
    }

    #[test]
    fn only_the_busiest_peers_have_series_of_their_own() {
        let text = render(&status(600));
        let series = text
            .lines()
            .filter(|line| line.starts_with("flannel_peer_sent_packets_total{"));
        assert_eq!(series.count(), MOST_PEERS);
        assert!(text.contains("flannel_peers_without_series 100.0"), "{text}");
        assert!(
            text.contains("flannel_peer_sent_packets_total{peer=\"192.0.4.87\"} 599"),
            "{text}"
        );
        assert!(
            !text.contains("flannel_peer_sent_packets_total{peer=\"192.0.2.99\"}"),
            "{text}"
        );
    }
}
