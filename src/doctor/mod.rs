//! `flanneld doctor`: finds and explains what is wrong on a host, each with its remedy.
//!
//! For each group of checks there is a file with two halves. *Looking* does I/O (registry, netlink, `/proc/sys`, the daemon's
//! status, other programs' rules, probes), within limits of its own, and gives facts; what could not be looked at is a fact, too.
//! *Judging* makes checks of facts, and is pure. It works with the daemon running or not, and with the registry up or down: what
//! one source does not tell, another may.
//!
//! IPv4 only: with dual-stack networks the IPv6 side is not examined.

mod chains;
mod device;
mod docker;
mod forwarding;
mod interface;
mod lease;
mod peers;
mod probe;
mod registry;

use std::{
    fs, io,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use ipnet::Ipv4Net;
use serde::Serialize;
use tokio::time::timeout;

use crate::{
    kernel::{
        Kernel, Link,
        entries::FoundRoute,
        external::{self, External, Wish},
        vxlan::VxlanLink,
    },
    lease::record::Lease,
    network::{Backend, BackendKind, Network, UDP_PORT, VXLAN_PORT},
    observe::{socket, status::Status},
    registry::{Registry, etcd::EtcdConfig},
    subnet_file::{Previous, variables},
};

/// How long the daemon may take to tell its status, and other programs to list their rules: all is on this machine.
const LOCAL_PATIENCE: Duration = Duration::from_secs(3);

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// As it should be.
    Ok,
    /// A note: it may be meant so, or could not be looked at.
    Warn,
    /// Wrong.
    Fail,
}

/// What a check is about, in the order in which a host depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Group {
    /// etcd, and the network's configuration in it.
    Registry,
    /// The daemon and its lease.
    Lease,
    /// The interface to the other hosts.
    Interface,
    /// The overlay's device and routes.
    Device,
    /// What this host forwards.
    Forwarding,
    /// Docker's bridge.
    Docker,
    /// The other hosts.
    Peers,
}

impl Group {
    /// As it is called in a check's name.
    pub fn name(self) -> &'static str {
        match self {
            Group::Registry => "registry",
            Group::Lease => "lease",
            Group::Interface => "interface",
            Group::Device => "device",
            Group::Forwarding => "forwarding",
            Group::Docker => "docker",
            Group::Peers => "peers",
        }
    }

    /// For people.
    pub fn title(self) -> &'static str {
        match self {
            Group::Registry => "Registry",
            Group::Lease => "Lease",
            Group::Interface => "Interface",
            Group::Device => "Device and routes",
            Group::Forwarding => "Forwarding and rules",
            Group::Docker => "Docker",
            Group::Peers => "Peers",
        }
    }
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    /// What it belongs to.
    pub group: Group,
    /// Its name in the group; for a peer its PublicIP.
    pub name: String,
    /// How it came out.
    pub state: State,
    /// What was found, on one line.
    pub what: String,
    /// What to do about it: a command or a flag; `None`: nothing.
    pub remedy: Option<String>,
}

impl Check {
    fn ok(group: Group, name: impl Into<String>, what: impl Into<String>) -> Check {
        Check {
            group,
            name: name.into(),
            state: State::Ok,
            what: what.into(),
            remedy: None,
        }
    }

    fn warn(group: Group, name: impl Into<String>, what: impl Into<String>, remedy: impl Into<String>) -> Check {
        Check {
            state: State::Warn,
            remedy: Some(remedy.into()),
            ..Check::ok(group, name, what)
        }
    }

    fn fail(group: Group, name: impl Into<String>, what: impl Into<String>, remedy: impl Into<String>) -> Check {
        Check {
            state: State::Fail,
            ..Check::warn(group, name, what, remedy)
        }
    }

    /// What could not be looked at, and why; there is nothing to do about it, or another check says it.
    fn unseen(group: Group, name: impl Into<String>, why: impl std::fmt::Display) -> Check {
        Check {
            state: State::Warn,
            ..Check::ok(group, name, format!("could not look: {why}"))
        }
    }

    /// `registry/configuration`: what it is called in JSON.
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.group.name(), self.name)
    }
}

/// What is to be examined.
#[derive(Debug)]
pub struct Options {
    /// The daemon's registry, or why its flags cannot be used.
    pub registry: Result<Arc<dyn Registry>, String>,
    /// How to reach it, where that is etcd.
    pub etcd: Option<EtcdConfig>,
    /// The daemon's subnet file.
    pub subnet_file: PathBuf,
    /// The daemon's status socket.
    pub status_socket: PathBuf,
    /// The daemon's choice of an interface.
    pub external: Wish,
    /// Whether to ask all peers, however many there are.
    pub all_peers: bool,
}

/// What the subnet file says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Told {
    network: Option<Ipv4Net>,
    subnet: Option<Ipv4Net>,
    mtu: Option<u32>,
    masquerade: bool,
}

impl Told {
    fn parse(text: &str) -> Told {
        let Previous { network, subnet, .. } = Previous::parse(text);
        let last = |wanted| variables(text).filter(|(name, _)| *name == wanted).last();
        Told {
            network,
            subnet,
            mtu: last("FLANNEL_MTU").and_then(|(_, value)| value.parse().ok()),
            masquerade: last("FLANNEL_IPMASQ").is_some_and(|(_, value)| value == "true"),
        }
    }

    fn read(path: &Path) -> Result<Told, String> {
        let text = fs::read_to_string(path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => format!("there is no {}", path.display()),
            _ => format!("cannot read {}: {error}", path.display()),
        })?;
        Ok(Told::parse(&text))
    }
}

/// The kernel's part of the network.
#[derive(Debug, Clone, Default)]
struct Picture {
    links: Vec<Link>,
    routes: Vec<FoundRoute>,
    vxlan: Vec<VxlanLink>,
}

impl Picture {
    fn look() -> Result<Picture, String> {
        let look = || {
            let mut kernel = Kernel::open()?;
            Ok(Picture {
                links: kernel.links()?,
                routes: kernel.routes()?,
                vxlan: kernel.vxlan_links()?,
            })
        };
        look().map_err(|error: crate::kernel::Error| error.to_string())
    }

    fn link(&self, index: u32) -> Option<&Link> {
        self.links.iter().find(|link| link.index == index)
    }

    /// The name of a link, for people.
    fn name(&self, index: u32) -> &str {
        self.link(index).map_or("nowhere", |link| link.name.as_str())
    }
}

/// What all sources together say of this host's part of the overlay. The running daemon knows best, then the registry, then the
/// subnet file.
#[derive(Debug, Clone, Default)]
struct Own {
    /// The daemon runs.
    running: bool,
    public_ip: Option<Ipv4Addr>,
    subnet: Option<Ipv4Net>,
    network: Option<Ipv4Net>,
    mtu: Option<u32>,
    kind: Option<BackendKind>,
    /// The number of a VXLAN.
    vni: Option<u32>,
    /// The tunnel's UDP port; `None` with `host-gw`.
    port: Option<u16>,
    /// The overlay's device.
    device: Option<Link>,
    /// The name of the interface to the other hosts.
    outward: Option<String>,
}

impl Own {
    fn gather(
        status: Option<&Status>,
        external: Option<&External>,
        registry: &registry::Facts,
        told: Option<&Told>,
        picture: Option<&Picture>,
    ) -> Own {
        let network = registry.network();
        let public_ip = status
            .and_then(|status| Some(status.external.as_ref()?.public_ip))
            .or_else(|| Some(external?.public_ip));
        let leased = || {
            let before = told.and_then(|told| told.subnet);
            Some(lease::held(registry.leases()?, public_ip?, before)?.subnets.v4())
        };
        let subnet = status
            .and_then(|status| status.lease.as_ref()?.subnet.parse().ok())
            .or_else(leased)
            .or_else(|| told?.subnet);
        let running = status.and_then(|status| status.backend.as_ref());
        let kind = running
            .and_then(|backend| backend.kind.parse().ok())
            .or_else(|| Some(network?.backend().kind()));
        // A daemon may still run with what the configuration was before.
        let configured = network
            .map(Network::backend)
            .filter(|backend| Some(backend.kind()) == kind);
        let (vni, port) = match (configured, kind) {
            (Some(Backend::Vxlan(vxlan)), _) => (Some(vxlan.vni.get()), Some(vxlan.port)),
            (Some(Backend::Udp(udp)), _) => (None, Some(udp.port)),
            (None, Some(BackendKind::Udp)) => (None, Some(UDP_PORT)),
            (None, Some(BackendKind::Vxlan)) => (None, Some(VXLAN_PORT)),
            (Some(Backend::HostGw), _) | (None, _) => (None, None),
        };
        let device = picture.and_then(|picture| {
            let named = running.and_then(|backend| backend.device.as_deref());
            device::of_overlay(picture, kind, named, subnet).cloned()
        });
        Own {
            running: status.is_some(),
            public_ip,
            subnet,
            network: network
                .and_then(|network| Some(network.ipv4()?.network()))
                .or_else(|| told?.network),
            mtu: told.and_then(|told| told.mtu).or_else(|| Some(running?.mtu)),
            kind,
            vni,
            port,
            device,
            outward: external.map(|external| external.name.clone()),
        }
    }
}

/// Examines this host; the checks in the order of their groups. Ends within ten seconds.
pub async fn examine(options: &Options) -> Vec<Check> {
    let picture = Picture::look();
    let external = Kernel::open()
        .map_err(|error| error.to_string())
        .and_then(|mut kernel| external::choose(&mut kernel, &options.external).map_err(|error| error.to_string()));
    let told = Told::read(&options.subnet_file);
    let (status, registry, rules) = tokio::join!(
        status(options.status_socket.clone()),
        registry::Facts::look(options, picture.as_ref().ok()),
        forwarding::Rules::look()
    );
    let own = Own::gather(
        status.as_ref().ok(),
        external.as_ref().ok(),
        &registry,
        told.as_ref().ok(),
        picture.as_ref().ok(),
    );
    let others = peers::others(&own, registry.leases(), status.as_ref().ok());
    let probed = peers::Probed::look(&own, &others, options.all_peers).await;

    let mut checks = registry::judge(&registry, &own);
    checks.extend(lease::judge(&own, &status, &registry, &told, &options.subnet_file));
    checks.extend(interface::judge(&external, status.as_ref().ok()));
    match &picture {
        Ok(picture) => {
            checks.extend(device::judge(&own, picture, &others));
            let ways = forwarding::Ways::look(&own, picture, external.as_ref().ok(), &others);
            let bridge = docker::bridge(&own, picture);
            let masquerade = told.as_ref().is_ok_and(|told| told.masquerade);
            checks.extend(forwarding::judge(&own, picture, &ways, &rules, bridge, masquerade));
            checks.extend(docker::judge(&own, &rules, bridge));
        }
        Err(why) => checks.push(Check::unseen(Group::Device, "device", why)),
    }
    checks.extend(peers::judge(&own, &others, &probed));
    checks
}

/// What the daemon tells of itself, or why it does not.
async fn status(path: PathBuf) -> Result<Status, socket::ReadError> {
    let silent = socket::ReadError::Failed {
        path: path.clone(),
        reason: format!("no answer within {} s", LOCAL_PATIENCE.as_secs()),
    };
    let read = tokio::task::spawn_blocking(move || socket::read(&path));
    match timeout(LOCAL_PATIENCE, read).await {
        Ok(Ok(status)) => status,
        // The task cannot be cancelled, and does not panic.
        Ok(Err(_)) | Err(_) => Err(silent),
    }
}

/// A setting below `/proc/sys/net`; `None` where this kernel has no such thing.
fn sysctl(key: &str) -> Option<String> {
    let value = fs::read_to_string(Path::new("/proc/sys/net").join(key)).ok()?;
    Some(value.trim().to_owned())
}

/// Other hosts' leases, by PublicIP.
type Others = Vec<Other>;

/// Another host.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Other {
    subnet: Ipv4Net,
    public_ip: Ipv4Addr,
    /// Its backend's name; `None`: the same as ours.
    other_backend: Option<String>,
}

impl Other {
    fn of_lease(lease: &Lease, kind: Option<BackendKind>) -> Other {
        let name = lease.value.backend_type.name();
        let same = kind.is_none_or(|kind| kind.name() == name);
        Other {
            subnet: lease.subnets.v4(),
            public_ip: lease.value.public_ip,
            other_backend: (!same).then(|| name.to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_of_several_lines_of_the_subnet_file_counts_and_broken_ones_do_not() {
        let told = Told::parse(
            "FLANNEL_MTU=1\nFLANNEL_SUBNET=10.5.34.1/24\nexport FLANNEL_MTU='1472'\nFLANNEL_IPMASQ=true\nx",
        );
        assert_eq!(
            told,
            Told {
                network: None,
                subnet: Some("10.5.34.0/24".parse().unwrap()),
                mtu: Some(1472),
                masquerade: true
            }
        );
    }
}
