//! Hosts on the lab's switch, and the containers in them.

use super::{Lab, LabError, Namespace};
use ipnet::Ipv4Net;
use std::{fs, net::Ipv4Addr, path::Path};

/// The bridge in a host that its containers hang on, as Docker's `docker0`.
pub const CONTAINER_BRIDGE: &str = "cbr0";

/// Which of a lab's two networks a host is in. The switch routes between them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Segment {
    /// 192.168.77.0/24, on the switch's `br0`.
    #[default]
    First,
    /// 192.168.78.0/24, on its `br1`.
    Second,
}

impl Segment {
    /// Of both networks.
    pub(super) const PREFIX_LEN: u8 = 24;

    /// The bridge in the switch's namespace.
    pub(super) const fn bridge(self) -> &'static str {
        match self {
            Segment::First => "br0",
            Segment::Second => "br1",
        }
    }

    /// The switch's own address, the hosts' default gateway; hosts are numbered upwards from .1.
    pub const fn switch_address(self) -> Ipv4Addr {
        match self {
            Segment::First => Ipv4Addr::new(192, 168, 77, 254),
            Segment::Second => Ipv4Addr::new(192, 168, 78, 254),
        }
    }
}

/// How a host is attached to the switch; see [`Lab::host_with`](super::Lab::host_with).
#[derive(Clone, Debug)]
pub struct HostOptions {
    /// The network that `eth0` is in.
    pub segment: Segment,
    /// The address of `eth0`; `None`: the next free one of the segment.
    pub address: Option<Ipv4Net>,
    /// MTU of `eth0` and of the switch's port, in bytes.
    pub mtu: u16,
    /// Whether the host has a default route, to the switch's own address.
    pub default_route: bool,
}

impl Default for HostOptions {
    fn default() -> HostOptions {
        HostOptions {
            segment: Segment::First,
            address: None,
            mtu: 1500,
            default_route: true,
        }
    }
}

/// A host: a namespace with `eth0` on the switch, which forwards IPv4.
#[derive(Debug)]
pub struct Host {
    name: String,
    ns: Namespace,
    address: Ipv4Net,
    /// Namespace names of containers start with it.
    prefix: String,
    containers: u32,
}

/// What a container runtime takes from the subnet file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SubnetEnv {
    /// `FLANNEL_SUBNET`: the host's address in its subnet, with the subnet's length (`10.5.34.1/24`).
    pub subnet: Ipv4Net,
    /// `FLANNEL_MTU`: the largest IP packet of the overlay, in bytes.
    pub mtu: u32,
}

impl SubnetEnv {
    /// Reads the file that flanneld has written at `path`.
    ///
    /// # Errors
    /// [`LabError::File`], and [`LabError::SubnetEnv`] when a value is missing or not what it should be.
    pub fn read(path: &Path) -> Result<SubnetEnv, LabError> {
        let text = fs::read_to_string(path).map_err(|source| LabError::File {
            action: "read",
            path: path.to_owned(),
            source,
        })?;
        let value = |key: &'static str| {
            let found = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
            found.ok_or_else(|| LabError::SubnetEnv {
                key,
                path: path.to_owned(),
                value: "nothing".to_owned(),
            })
        };
        let wrong = |key, value: &str| LabError::SubnetEnv {
            key,
            path: path.to_owned(),
            value: format!("`{value}`"),
        };
        let (subnet, mtu) = (value("FLANNEL_SUBNET")?, value("FLANNEL_MTU")?);
        Ok(SubnetEnv {
            subnet: subnet.parse().map_err(|_| wrong("FLANNEL_SUBNET", subnet))?,
            mtu: mtu.parse().map_err(|_| wrong("FLANNEL_MTU", mtu))?,
        })
    }
}

/// A container: a namespace with `eth0` on its host's bridge, the host as its default gateway.
#[derive(Clone, Debug)]
pub struct Container {
    /// The name given, `c1`.
    pub name: String,
    /// Where it lives.
    pub ns: Namespace,
    /// The address of its `eth0`.
    pub ip: Ipv4Addr,
}

impl Host {
    /// Makes the host and wires it to port `port` of the lab's switch.
    pub(super) fn attach(
        lab: &Lab,
        name: &str,
        port: u8,
        address: Ipv4Net,
        options: &HostOptions,
    ) -> Result<Host, LabError> {
        let mtu = options.mtu;
        let prefix = format!("{}-", lab.id());
        let ns = Namespace::create(format!("{prefix}{name}"))?;
        let switch = lab.switch();
        switch.ip(&format!(
            "link add p{port} mtu {mtu} type veth peer name eth0 mtu {mtu} netns {}",
            ns.name()
        ))?;
        switch.ip(&format!("link set p{port} master {} up", options.segment.bridge()))?;
        ns.ip(&format!("address add {address} dev eth0"))?;
        ns.ip("link set eth0 up")?;
        if options.default_route {
            let gateway = options.segment.switch_address();
            ns.ip(&format!("route add default via {gateway} dev eth0"))?;
        }
        ns.sysctl("ipv4/ip_forward", "1")?;
        Ok(Host {
            name: name.to_owned(),
            ns,
            address,
            prefix,
            containers: 0,
        })
    }

    /// The name given, `h1`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where the host lives.
    pub fn ns(&self) -> &Namespace {
        &self.ns
    }

    /// The address of `eth0`.
    pub fn ip(&self) -> Ipv4Addr {
        self.address.addr()
    }

    /// Adds a container to the host's subnet. The first one makes the bridge [`CONTAINER_BRIDGE`] with the host's address
    /// in the subnet; containers get the addresses after it.
    ///
    /// # Errors
    /// [`LabError::SubnetFull`], and what `ip` fails with.
    pub fn add_container(&mut self, name: &str, env: SubnetEnv) -> Result<Container, LabError> {
        let SubnetEnv { subnet: gateway, mtu } = env;
        let number = self.containers + 1;
        let full = || LabError::SubnetFull {
            container: name.to_owned(),
            subnet: gateway,
        };
        let ip = u32::from(gateway.addr())
            .checked_add(number)
            .map(Ipv4Addr::from)
            .ok_or_else(full)?;
        if !gateway.contains(&ip) || ip == gateway.broadcast() {
            return Err(full());
        }
        if self.containers == 0 {
            self.ns
                .ip(&format!("link add {CONTAINER_BRIDGE} mtu {mtu} type bridge"))?;
            self.ns.ip(&format!("address add {gateway} dev {CONTAINER_BRIDGE}"))?;
            self.ns.ip(&format!("link set {CONTAINER_BRIDGE} up"))?;
        }
        let ns = Namespace::create(format!("{}{name}", self.prefix))?;
        let port = format!("veth{number}");
        self.ns.ip(&format!(
            "link add {port} mtu {mtu} type veth peer name eth0 mtu {mtu} netns {}",
            ns.name()
        ))?;
        self.ns.ip(&format!("link set {port} master {CONTAINER_BRIDGE} up"))?;
        ns.ip(&format!("address add {ip}/{} dev eth0", gateway.prefix_len()))?;
        ns.ip("link set eth0 up")?;
        ns.ip(&format!("route add default via {}", gateway.addr()))?;
        self.containers = number;
        Ok(Container {
            name: name.to_owned(),
            ns,
            ip,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(name: &str, text: &str) -> Result<SubnetEnv, LabError> {
        let path = std::env::temp_dir().join(format!("flannel-{name}-{}.env", std::process::id()));
        fs::write(&path, text).unwrap();
        let read = SubnetEnv::read(&path);
        fs::remove_file(path).unwrap();
        read
    }

    #[test]
    fn subnet_and_mtu_are_read() {
        let text = "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.34.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n";
        let expected = SubnetEnv {
            subnet: "10.5.34.1/24".parse().unwrap(),
            mtu: 1472,
        };
        assert_eq!(read("whole", text).unwrap(), expected);
    }

    #[test]
    fn missing_and_wrong_values_are_named() {
        let error = read("missing", "FLANNEL_SUBNET=10.5.34.1/24\n")
            .unwrap_err()
            .to_string();
        assert!(error.contains("nothing as FLANNEL_MTU"), "{error}");
        let error = read("wrong", "FLANNEL_SUBNET=10.5.34.1\nFLANNEL_MTU=1472\n")
            .unwrap_err()
            .to_string();
        assert!(error.contains("`10.5.34.1` as FLANNEL_SUBNET"), "{error}");
    }
}
