//! What a running daemon is doing, as a value: `flanneld status` shows it, [`metrics`](super::metrics) counts it.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use serde::{Deserialize, Serialize};

/// One moment of a daemon. As JSON it is what `flanneld status --json` prints: members are never left out, and are `null`
/// while there is nothing to say. Ages and times left are whole seconds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The daemon's version.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// How long it has run.
    pub uptime_seconds: u64,
    /// Whether subnet file, backend and rules are in place.
    pub ready: bool,
    /// What it waits for until then.
    pub waiting_for: Option<String>,
    /// Why what it serves may not be so any more: it was started while the registry was away, or could not renew the lease.
    pub degraded: Option<String>,
    /// The interface that faces the other hosts.
    pub external: Option<External>,
    /// This host's subnet.
    pub lease: Option<Lease>,
    /// What carries the packets.
    pub backend: Option<Backend>,
    /// How often traffic rules that others had changed were put back.
    pub rule_repairs: u64,
    /// What it is confined by.
    pub sandbox: Sandbox,
    /// Where configuration and leases are.
    pub registry: Registry,
    /// The other hosts, by subnet.
    pub peers: Vec<Peer>,
}

/// What the daemon has given up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sandbox {
    /// Whether it is wanted (`--sandbox`).
    pub on: bool,
    /// What is left of root's capabilities, without `CAP_`. Workers have none while it is on.
    pub capabilities: Vec<String>,
    /// Whether programs that the daemon starts can gain no rights.
    pub no_new_privs: bool,
    /// Whether the system calls that no daemon makes are refused; once the daemon serves.
    pub control_filter: bool,
    /// Whether workers may only move packets; `null` while there are none.
    pub worker_filter: Option<bool>,
    /// What the system does not let it give up, and why.
    pub troubles: Vec<String>,
    /// How often workers were refused a system call, by its name.
    pub refused: BTreeMap<String, u64>,
}

/// The external interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct External {
    /// Its name.
    pub interface: String,
    /// Its own address.
    pub address: Ipv4Addr,
    /// In bytes.
    pub mtu: u32,
    /// The address that other hosts send to.
    pub public_ip: Ipv4Addr,
}

/// This host's lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// As in `10.5.34.0/24`.
    pub subnet: String,
    /// Of a dual-stack network.
    pub ipv6_subnet: Option<String>,
    /// Until it expires, unless it is renewed; `null`: a reservation, which does not.
    pub seconds_left: Option<u64>,
    /// How much is left when it is renewed (`--subnet-lease-renew-margin`).
    pub renew_margin_seconds: u64,
}

/// What carries the packets.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Backend {
    /// `udp`, `vxlan` or `host-gw`.
    pub kind: String,
    /// Its device, if it has one.
    pub device: Option<String>,
    /// The largest packet that containers may send, in bytes.
    pub mtu: u32,
    /// How often something that others had changed in the kernel was put right, by what it was.
    pub repairs: BTreeMap<String, u64>,
    /// The packet engine of the `udp` backend.
    pub engine: Option<Engine>,
}

/// The packet engine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Engine {
    /// How packets are moved: `mmsg` or `uring`.
    pub io: String,
    /// What the kernel does for it.
    pub offloads: Vec<Offload>,
    /// Each by itself.
    pub workers: Vec<Worker>,
    /// Packets that the device could not queue for the engine; `null` where the kernel does not tell.
    pub device_overflow: Option<u64>,
    /// Hosts to which the way refuses segmented messages just now.
    pub refusing_peers: u64,
}

/// Something that the kernel does, or could do, for the engine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offload {
    /// `tun_tcp`, `tun_udp`, `udp_segment` or `udp_gro`.
    pub name: String,
    /// Whether it does.
    pub on: bool,
    /// Why it does not.
    pub why_not: Option<String>,
}

/// Packets and their bytes, inner IP headers included.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Traffic {
    /// How many.
    pub packets: u64,
    /// How long together.
    pub bytes: u64,
}

/// One worker of the engine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Worker {
    /// To peers.
    pub sent: Traffic,
    /// From peers.
    pub received: Traffic,
    /// Messages that the socket took: a datagram or, segmented, several.
    pub messages_sent: u64,
    /// Messages that the socket gave: a datagram or, merged, several.
    pub messages_received: u64,
    /// Superpackets that the device handed over.
    pub superpackets_split: u64,
    /// Superpackets that the device took.
    pub superpackets_merged: u64,
    /// ICMP errors sent to those whose packets went no further.
    pub icmp_errors: u64,
    /// Packets that went no further, by reason.
    pub dropped: BTreeMap<String, u64>,
    /// Packets that the socket did not take, by the system's error.
    pub send_errors: BTreeMap<String, u64>,
    /// Messages for which the socket's receive buffer had no room.
    pub socket_overflow: u64,
}

/// Where configuration and leases are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Registry {
    /// What kind and where, without secrets.
    pub name: String,
    /// Whether the last thing that was asked of it was answered.
    pub connected: bool,
    /// Why it was not.
    pub trouble: Option<String>,
    /// Since it last answered or told of a change.
    pub seconds_since_answer: Option<u64>,
    /// Since it last told of a change.
    pub seconds_since_event: Option<u64>,
    /// What it was asked so far, by operation.
    pub requests: BTreeMap<String, Requests>,
}

/// Requests of one kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Requests {
    /// How many were answered.
    pub answered: u64,
    /// How many were not.
    pub failed: u64,
    /// How long all of them together took.
    pub seconds: f64,
}

/// Another host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// As in `10.5.34.0/24`.
    pub subnet: String,
    /// Of a dual-stack network.
    pub ipv6_subnet: Option<String>,
    /// The address that it is reached at.
    pub public_ip: Ipv4Addr,
    /// The same over IPv6.
    pub public_ipv6: Option<Ipv6Addr>,
    /// What was exchanged with it; `null` where the kernel carries the packets.
    pub traffic: Option<PeerTraffic>,
}

/// What was exchanged with a host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PeerTraffic {
    /// To it.
    pub sent: Traffic,
    /// From it.
    pub received: Traffic,
    /// Since its last packet came; `null`: none has come yet.
    pub seconds_since_received: Option<u64>,
    /// Packets for it that the socket did not take.
    pub unsent: u64,
    /// Packets from it that were not let in.
    pub refused: u64,
}

/// What a daemon has counted, for the one that goes on in its place. A version that knows other counts leaves out what the other
/// does not know.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Counts {
    /// Each worker of the packet engine.
    pub workers: Vec<Worker>,
    /// What was exchanged with each host, by PublicIP.
    pub peers: BTreeMap<IpAddr, PeerTraffic>,
    /// See [`Backend::repairs`].
    pub repairs: BTreeMap<String, u64>,
    /// See [`Status::rule_repairs`].
    pub rule_repairs: u64,
    /// See [`Registry::requests`].
    pub requests: BTreeMap<String, Requests>,
}

/// What a backend tells of itself.
#[derive(Debug, Clone, PartialEq)]
pub struct BackendReport {
    /// Itself.
    pub backend: Backend,
    /// What it has exchanged with each host, by PublicIP; `None` where the kernel carries the packets.
    pub traffic: Option<BTreeMap<IpAddr, PeerTraffic>>,
}

impl std::ops::AddAssign for Traffic {
    fn add_assign(&mut self, other: Self) {
        self.packets += other.packets;
        self.bytes += other.bytes;
    }
}

impl Worker {
    /// What all of `workers` have done.
    pub fn total(workers: &[Worker]) -> Worker {
        let mut total = Worker::default();
        for worker in workers {
            total.sent += worker.sent;
            total.received += worker.received;
            total.messages_sent += worker.messages_sent;
            total.messages_received += worker.messages_received;
            total.superpackets_split += worker.superpackets_split;
            total.superpackets_merged += worker.superpackets_merged;
            total.icmp_errors += worker.icmp_errors;
            total.socket_overflow += worker.socket_overflow;
            for (sum, counts) in [
                (&mut total.dropped, &worker.dropped),
                (&mut total.send_errors, &worker.send_errors),
            ] {
                for (name, count) in counts {
                    *sum.entry(name.clone()).or_default() += count;
                }
            }
        }
        total
    }
}
