//! What carries the packets between the hosts: what is compared.

use super::{
    error::{BenchError, check},
    hosts::{Host, Hosts, OVERLAY},
    wire::DEVICE,
};
use flannel::lab::{self, Interrupt, Lab, Process, tail, wait_for};
use serde::Serialize;
use std::{path::Path, str::FromStr, time::Duration};

/// The daemon under test, from the same build as this benchmark.
const FLANNELD: &str = env!("CARGO_BIN_EXE_flanneld");

/// The one that all others are compared with.
pub(crate) const REFERENCE: &str = "vxlan";

/// How long a daemon may take from its start to the subnet file.
const READY_LIMIT: Duration = Duration::from_secs(20);

/// How much of a daemon's log an error shows.
const LOG_LINES: usize = 10;

/// One way from host to host, with a name that is unique in a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Peer {
    /// `bare`, `vxlan`, `flanneld`, or a variant's.
    pub(crate) name: String,
    /// Which of them.
    kind: Kind,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Kind {
    /// No overlay: routes over the wire, as flannel's host-gw backend sets them. Nothing can be faster.
    Bare,
    /// The kernel's vxlan, as flannel's vxlan backend sets it up.
    Vxlan,
    /// The daemon's `udp` backend, with these flags.
    Flanneld { flags: Vec<String> },
}

impl Peer {
    /// The peer of this name; `None`: there is none, unless it is a variant.
    pub(crate) fn known(name: &str) -> Option<Peer> {
        let kind = match name {
            "bare" => Kind::Bare,
            REFERENCE => Kind::Vxlan,
            "flanneld" => Kind::Flanneld { flags: Vec::new() },
            _ => return None,
        };
        Some(Peer {
            name: name.to_owned(),
            kind,
        })
    }

    /// What it is and, for a daemon with flags of its own, which.
    pub(crate) fn meaning(&self) -> String {
        match &self.kind {
            Kind::Bare => "plain routing, no overlay".to_owned(),
            Kind::Vxlan => "the kernel's vxlan".to_owned(),
            Kind::Flanneld { flags } if flags.is_empty() => "flanneld, udp backend".to_owned(),
            Kind::Flanneld { flags } => format!("flanneld, udp backend, {}", flags.join(" ")),
        }
    }

    /// Sets it up between `hosts`, up to where packets may pass; the daemons, if it has any.
    pub(crate) fn start(&self, lab: &Lab, hosts: &Hosts, interrupt: &Interrupt) -> Result<Vec<Process>, BenchError> {
        match &self.kind {
            Kind::Bare => hosts
                .pairs()
                .into_iter()
                .try_for_each(route_directly)
                .map(|()| Vec::new()),
            Kind::Vxlan => {
                for (host, _) in hosts.pairs() {
                    make_vxlan(host)?;
                }
                hosts
                    .pairs()
                    .into_iter()
                    .try_for_each(route_by_vxlan)
                    .map(|()| Vec::new())
            }
            Kind::Flanneld { flags } => start_daemons(lab, hosts, flags, interrupt),
        }
    }
}

/// `NAME=FLAGS`: flanneld with more flags, under another name.
impl FromStr for Peer {
    type Err = String;

    fn from_str(text: &str) -> Result<Peer, String> {
        let (name, flags) = text
            .split_once('=')
            .ok_or("write NAME=FLAGS, as in plain=--tun plain")?;
        let is_name = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        if name.is_empty() || !name.bytes().all(is_name) {
            return Err("a name consists of letters, digits and dashes".to_owned());
        }
        if Peer::known(name).is_some() {
            return Err(format!("{name} is taken: choose another name"));
        }
        Ok(Peer {
            name: name.to_owned(),
            kind: Kind::Flanneld {
                flags: flags.split_whitespace().map(str::to_owned).collect(),
            },
        })
    }
}

fn route_directly((host, other): (&Host, &Host)) -> Result<(), BenchError> {
    host.ns.ip(&format!(
        "route add {} via {} dev {DEVICE} src {}",
        other.subnet,
        other.underlay,
        host.overlay()
    ))?;
    Ok(())
}

/// The device's MAC address, made from the host's number.
fn mac(host: &Host) -> String {
    format!("02:00:00:00:00:{:02x}", host.underlay.octets()[3])
}

/// MTU 1450: the outer Ethernet, IPv4, UDP and vxlan headers take 50 bytes.
fn make_vxlan(host: &Host) -> Result<(), BenchError> {
    let (ns, mac) = (&host.ns, mac(host));
    ns.ip(&format!(
        "link add flannel.1 address {mac} mtu 1450 type vxlan id 1 local {} dev {DEVICE} dstport 8472 nolearning",
        host.underlay
    ))?;
    ns.ip(&format!("address add {}/32 dev flannel.1", host.subnet.network()))?;
    ns.ip("link set flannel.1 up")?;
    Ok(())
}

/// Neighbour, forwarding entry and route to the other host, in flannel's order.
fn route_by_vxlan((host, other): (&Host, &Host)) -> Result<(), BenchError> {
    let (gateway, mac) = (other.subnet.network(), mac(other));
    host.ns.ip(&format!(
        "neigh replace {gateway} lladdr {mac} dev flannel.1 nud permanent"
    ))?;
    let far = other.underlay.to_string();
    let entry = [
        "fdb",
        "replace",
        &mac,
        "dev",
        "flannel.1",
        "dst",
        &far,
        "self",
        "permanent",
    ];
    lab::run(lab::command("bridge").args(["-n", host.ns.name()]).args(entry))?;
    host.ns.ip(&format!(
        "route add {} via {gateway} dev flannel.1 onlink src {}",
        other.subnet,
        host.overlay()
    ))?;
    Ok(())
}

fn start_daemons(
    lab: &Lab,
    hosts: &Hosts,
    flags: &[String],
    interrupt: &Interrupt,
) -> Result<Vec<Process>, BenchError> {
    let registry = format!("--registry-dir={}", lab.dir().join("registry").display());
    let flanneld = |host: &Host| {
        let mut command = host.command(FLANNELD);
        lab::without_daemon_env(&mut command);
        command
    };
    lab::run(flanneld(&hosts.a).args(["network", "set", "--network", OVERLAY, "--backend", "udp", &registry]))?;
    for (host, _) in hosts.pairs() {
        let (subnet, address) = (host.subnet.to_string(), host.underlay.to_string());
        // So that each gets the subnet that its overlay address is in.
        lab::run(flanneld(host).args(["leases", "reserve", &subnet, "--public-ip", &address, &registry]))?;
    }
    let mut daemons = Vec::new();
    for (host, _) in hosts.pairs() {
        let mut command = flanneld(host);
        command.arg(&registry);
        command.arg(format!("--iface={DEVICE}"));
        command.arg(format!("--subnet-file={}", subnet_file(lab, host).display()));
        command.args(["--healthz-port=0", "--iptables-forward-rules=false"]);
        command.args(flags);
        let log = lab.dir().join(format!("flanneld-{}.log", host.name));
        daemons.push(Process::spawn(
            &format!("flanneld on host {}", host.name),
            command,
            &log,
        )?);
    }
    wait_for(READY_LIMIT, "both flanneld to be ready", || {
        check(interrupt)?;
        daemons.iter_mut().try_for_each(check_running)?;
        let ready = hosts.pairs().iter().all(|(host, _)| subnet_file(lab, host).exists());
        Ok::<_, BenchError>(ready.then_some(()))
    })?;
    Ok(daemons)
}

fn subnet_file(lab: &Lab, host: &Host) -> std::path::PathBuf {
    lab.dir().join(Path::new(host.name).with_extension("env"))
}

/// An error when `process` has ended.
pub(crate) fn check_running(process: &mut Process) -> Result<(), BenchError> {
    let Some(status) = process.exited() else { return Ok(()) };
    Err(BenchError::Ended {
        name: process.name().to_owned(),
        status,
        log: tail(&process.log(), LOG_LINES),
    })
}

#[cfg(test)]
#[allow(unused, reason = "cargo builds benchmarks with cfg(test), but without tests")]
mod tests {
    use super::*;

    #[test]
    fn variant_is_flanneld_with_flags() {
        let variant: Peer = "plain=--tun plain --workers=1".parse().unwrap();
        assert_eq!(variant.name, "plain");
        assert_eq!(variant.meaning(), "flanneld, udp backend, --tun plain --workers=1");
        let bare: Peer = "again=".parse().unwrap();
        assert_eq!(bare.meaning(), "flanneld, udp backend");
    }

    #[test]
    fn variant_without_flags_or_with_a_taken_or_odd_name_is_refused() {
        for (text, reason) in [
            ("plain", "NAME=FLAGS"),
            ("=--tun plain", "letters"),
            ("a b=--tun plain", "letters"),
            ("vxlan=--tun plain", "taken"),
            ("flanneld=--tun plain", "taken"),
        ] {
            let error = text.parse::<Peer>().unwrap_err();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }
}
