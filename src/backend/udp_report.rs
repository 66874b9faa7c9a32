//! What the `udp` backend tells of itself.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
};

use super::{
    repairs::Repairs,
    udp::{Options, TunMode},
};
use crate::{
    engine::{
        Observer, Offloads,
        counters::{self, Drop, uptime},
        io::Way,
        peers::PeerIds,
        snapshot::{self, PeerSnapshot, Snapshot, WorkerSnapshot},
    },
    kernel::Kernel,
    network::BackendKind,
    observe::status::{Backend, BackendReport, Engine, Offload, PeerTraffic, Traffic, Worker},
    route_table::PeerId,
};

/// What stays as it is while the backend runs, and where to look for the rest.
#[derive(Clone)]
pub(super) struct Facts {
    pub(super) device: String,
    pub(super) mtu: u32,
    pub(super) way: Way,
    pub(super) options: Options,
    pub(super) observer: Observer,
    pub(super) peers: Arc<Mutex<PeerIds>>,
    pub(super) repairs: Repairs,
}

impl Facts {
    /// This moment.
    pub(super) fn report(&self) -> BackendReport {
        let snapshot = self.observer.snapshot();
        BackendReport {
            backend: Backend {
                kind: BackendKind::Udp.name().to_owned(),
                device: Some(self.device.clone()),
                mtu: self.mtu,
                repairs: self.repairs.counts(),
                engine: Some(Engine {
                    io: self.way.to_string(),
                    offloads: offloads(self.options, self.observer.offloads(), snapshot.offloads),
                    device_overflow: overflow(&self.device),
                    refusing_peers: snapshot.refusing_peers as u64,
                    workers: snapshot.workers.iter().map(worker).collect(),
                }),
            },
            traffic: Some(self.traffic(&snapshot)),
        }
    }

    fn traffic(&self, snapshot: &Snapshot) -> BTreeMap<IpAddr, PeerTraffic> {
        let peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        let addresses = peers.addresses();
        let now = uptime();
        let known = snapshot
            .peers
            .iter()
            .filter_map(|peer| Some((*addresses.get(&peer.id)?, peer_traffic(peer, now))));
        known.collect()
    }
}

/// How many packets the device could not queue; `None` when it is gone, or the kernel does not answer.
pub(super) fn overflow(device: &str) -> Option<u64> {
    Kernel::open().ok()?.dropped(device).ok()
}

/// Each offload, and why it is not used: `at_first` is what the kernel could do when the engine began, `now` what is left.
fn offloads(options: Options, at_first: Offloads, now: Offloads) -> Vec<Offload> {
    let all = |offloads: Offloads| {
        [
            ("tun_tcp", offloads.tun_tcp),
            ("tun_udp", offloads.tun_udp),
            ("udp_segment", offloads.udp_segment),
            ("udp_gro", offloads.udp_gro),
        ]
    };
    let of_tun = |name: &str| name.starts_with("tun");
    let pairs = all(at_first).into_iter().zip(all(now));
    pairs
        .map(|((name, at_first), (_, on))| Offload {
            name: name.to_owned(),
            on,
            why_not: (!on).then(|| {
                let why = if !options.offload {
                    "switched off (--offload=false)"
                } else if options.tun == TunMode::Plain && of_tun(name) {
                    "a plain TUN device has none (--tun=plain)"
                } else if at_first {
                    "refused while running; see the log"
                } else {
                    "this kernel does not have it"
                };
                why.to_owned()
            }),
        })
        .collect()
}

fn traffic(traffic: snapshot::Traffic) -> Traffic {
    Traffic {
        packets: traffic.packets,
        bytes: traffic.bytes,
    }
}

fn peer_traffic(peer: &PeerSnapshot, now: u64) -> PeerTraffic {
    PeerTraffic {
        sent: traffic(peer.sent),
        received: traffic(peer.received),
        seconds_since_received: (peer.received.packets > 0).then(|| now.saturating_sub(peer.last_received)),
        unsent: peer.unsent,
        refused: peer.refused,
    }
}

fn worker(worker: &WorkerSnapshot) -> Worker {
    Worker {
        sent: traffic(worker.sent),
        received: traffic(worker.received),
        messages_sent: worker.messages_sent,
        messages_received: worker.messages_received,
        superpackets_split: worker.superpackets_split,
        superpackets_merged: worker.superpackets_merged,
        icmp_errors: worker.icmp_errors,
        dropped: worker
            .drops
            .iter()
            .map(|(reason, count)| (reason.name().to_owned(), *count))
            .collect(),
        send_errors: worker
            .send_errors
            .iter()
            .map(|(name, count)| ((*name).to_owned(), *count))
            .collect(),
        socket_overflow: worker.socket_overflow,
    }
}

/// What [`worker`] makes a worker of, as far as it is told.
pub(super) fn worker_before(worker: &Worker) -> WorkerSnapshot {
    let of = |traffic: Traffic| snapshot::Traffic {
        packets: traffic.packets,
        bytes: traffic.bytes,
    };
    WorkerSnapshot {
        sent: of(worker.sent),
        received: of(worker.received),
        superpackets_split: worker.superpackets_split,
        messages_sent: worker.messages_sent,
        messages_received: worker.messages_received,
        superpackets_merged: worker.superpackets_merged,
        icmp_errors: worker.icmp_errors,
        drops: worker
            .dropped
            .iter()
            .filter_map(|(name, count)| Some((Drop::named(name)?, *count)))
            .collect(),
        send_errors: worker
            .send_errors
            .iter()
            .map(|(name, count)| (counters::send_error(name), *count))
            .collect(),
        socket_overflow: worker.socket_overflow,
        ..WorkerSnapshot::default()
    }
}

/// What [`peer_traffic`] makes a peer of.
pub(super) fn peer_before(id: PeerId, peer: &PeerTraffic) -> PeerSnapshot {
    let of = |traffic: Traffic| snapshot::Traffic {
        packets: traffic.packets,
        bytes: traffic.bytes,
    };
    PeerSnapshot {
        id,
        sent: of(peer.sent),
        received: of(peer.received),
        last_received: peer
            .seconds_since_received
            .map_or(0, |seconds| uptime().saturating_sub(seconds)),
        unsent: peer.unsent,
        refused: peer.refused,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::backend::udp::IoMode;

    const OPTIONS: Options = Options {
        workers: None,
        offload: true,
        tun: TunMode::Auto,
        io: IoMode::Auto,
        pin: false,
        busy_poll: Duration::ZERO,
    };

    const ALL: Offloads = Offloads {
        tun_tcp: true,
        tun_udp: true,
        udp_segment: true,
        udp_gro: true,
    };

    fn why_not(options: Options, at_first: Offloads, now: Offloads) -> Vec<Option<String>> {
        let offloads = offloads(options, at_first, now);
        assert!(offloads.iter().all(|offload| offload.on == offload.why_not.is_none()));
        offloads.into_iter().map(|offload| offload.why_not).collect()
    }

    #[test]
    fn what_is_told_of_a_worker_and_a_peer_is_what_is_counted_from() {
        let told = Worker {
            sent: Traffic { packets: 1, bytes: 20 },
            messages_received: 3,
            dropped: Drop::ALL
                .iter()
                .zip(4..)
                .map(|(reason, count)| (reason.name().to_owned(), count))
                .collect(),
            send_errors: [("EPERM".to_owned(), 5), ("other".to_owned(), 6)].into(),
            socket_overflow: 7,
            ..Worker::default()
        };
        assert_eq!(worker(&worker_before(&told)), told);
        let told = PeerTraffic {
            received: Traffic { packets: 1, bytes: 20 },
            seconds_since_received: Some(0),
            refused: 3,
            ..PeerTraffic::default()
        };
        let again = peer_traffic(&peer_before(PeerId::OTHERS, &told), uptime());
        assert!(again.seconds_since_received.is_some_and(|seconds| seconds < 60));
        assert_eq!(
            PeerTraffic {
                seconds_since_received: Some(0),
                ..again
            },
            told
        );
    }

    #[test]
    fn what_is_not_used_has_its_reason() {
        assert_eq!(why_not(OPTIONS, ALL, ALL), [None, None, None, None]);
        let off = Offloads::default();
        let reasons = why_not(
            Options {
                offload: false,
                ..OPTIONS
            },
            off,
            off,
        );
        assert!(
            reasons.iter().flatten().all(|why| why.contains("--offload=false")),
            "{reasons:?}"
        );
        let lost = Offloads { tun_udp: false, ..ALL };
        assert!(
            why_not(OPTIONS, ALL, lost)[1]
                .as_ref()
                .unwrap()
                .contains("while running")
        );
        assert!(
            why_not(OPTIONS, lost, lost)[1]
                .as_ref()
                .unwrap()
                .contains("this kernel")
        );
        let plain = Options {
            tun: TunMode::Plain,
            ..OPTIONS
        };
        let no_tun = Offloads {
            tun_tcp: false,
            tun_udp: false,
            ..ALL
        };
        assert!(
            why_not(plain, no_tun, no_tun)[0]
                .as_ref()
                .unwrap()
                .contains("--tun=plain")
        );
    }
}
