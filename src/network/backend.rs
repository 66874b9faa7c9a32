//! The configuration's `Backend`: how packets travel between hosts.

use std::{fmt, str::FromStr};

use serde_json::{Value, json};

use super::{ConfigError, Reader};
use crate::json::excerpt;

/// The `udp` backend's port unless configured, as in the original.
pub const UDP_PORT: u16 = 8285;

/// The `vxlan` backend's port unless configured: Linux's, which is older than IANA's 4789 (RFC 7348, section 8.1).
pub const VXLAN_PORT: u16 = 8472;

/// The largest that a device can be named after: an interface's name has at most 15 characters (`IFNAMSIZ`, linux/if.h), of
/// which `flannel.` takes eight.
const LARGEST_VNI: u64 = 9_999_999;

/// Ports are numbers of 16 bits (RFC 768).
const MAX_PORT: u64 = u16::MAX as u64;

/// How packets travel between hosts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Backend {
    /// Packets in UDP datagrams, carried by this program.
    Udp(Udp),
    /// Packets in VXLAN, carried by the kernel.
    Vxlan(Vxlan),
    /// Plain routes; all hosts share a link.
    HostGw,
}

/// The `udp` backend's settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Udp {
    /// The port of every host; not 0.
    pub port: u16,
    /// How many ports datagrams leave from.
    pub source_ports: SourcePorts,
    /// Which datagrams are let in.
    pub source_check: SourceCheck,
}

/// The original's port, and the defaults of what it does not know.
impl Default for Udp {
    fn default() -> Self {
        Udp {
            port: UDP_PORT,
            source_ports: SourcePorts::ONE,
            source_check: SourceCheck::default(),
        }
    }
}

impl Udp {
    fn read(keys: &mut Reader) -> Result<Self, ConfigError> {
        let most = u64::from(SourcePorts::MAX.0);
        Ok(Udp {
            port: keys.number_in("Port", 1, MAX_PORT)?.unwrap_or(UDP_PORT),
            source_ports: keys
                .number_in("SourcePorts", 1, most)?
                .map_or(SourcePorts::ONE, SourcePorts),
            source_check: SourceCheck::read(keys)?,
        })
    }
}

/// Over how many UDP source ports a host's flows are hashed: 1 to 64.
///
/// Receivers that spread datagrams by their ports (RSS, ECMP, `SO_REUSEPORT`) see as many flows. The original does not look
/// at the port that a datagram comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SourcePorts(u8);

impl SourcePorts {
    /// Everything leaves from the configured port, as the original's.
    pub const ONE: SourcePorts = SourcePorts(1);

    /// The most there may be. A network card has fewer receive queues, and a route fewer paths: more would spread nothing
    /// further, and each is a socket.
    pub const MAX: SourcePorts = SourcePorts(64);

    /// `None` for 0 and beyond [`SourcePorts::MAX`].
    pub fn new(number: u8) -> Option<Self> {
        (Self::ONE.0..=Self::MAX.0)
            .contains(&number)
            .then_some(SourcePorts(number))
    }

    /// The number; not 0.
    pub fn get(self) -> u8 {
        self.0
    }
}

impl fmt::Display for SourcePorts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Which datagrams are let in, by where they and the packets in them come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum SourceCheck {
    /// `strict`: from a peer's PublicIP, with a packet from that peer's subnet to this host's.
    #[default]
    Strict,
    /// `peer`: from a peer's PublicIP, whatever is inside.
    Peer,
    /// `off`: from anyone, as the original.
    Off,
}

impl SourceCheck {
    /// All there are.
    pub const ALL: [SourceCheck; 3] = [SourceCheck::Strict, SourceCheck::Peer, SourceCheck::Off];

    /// The name, as it stands in configurations.
    pub fn name(self) -> &'static str {
        match self {
            SourceCheck::Strict => "strict",
            SourceCheck::Peer => "peer",
            SourceCheck::Off => "off",
        }
    }

    fn read(keys: &mut Reader) -> Result<Self, ConfigError> {
        const WANTED: &str = "\"strict\", \"peer\" or \"off\"";
        let Some(name) = keys.text("SourceCheck", WANTED)? else {
            return Ok(SourceCheck::default());
        };
        let mut all = SourceCheck::ALL.into_iter();
        let known = all.find(|check| check.name().eq_ignore_ascii_case(&name));
        known.ok_or_else(|| ConfigError::UnknownName {
            key: "Backend.SourceCheck",
            value: excerpt(&name),
            wanted: WANTED,
        })
    }
}

impl fmt::Display for SourceCheck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The `vxlan` backend's settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vxlan {
    /// The overlay's number.
    pub vni: Vni,
    /// The port of every host; not 0.
    pub port: u16,
    /// Carry the group policy (the packet's mark).
    pub gbp: bool,
    /// Let the device learn where addresses live.
    pub learning: bool,
    /// Plain routes to hosts on the same link.
    pub direct_routing: bool,
    /// The underlay's MTU; `None`: the external interface's.
    pub mtu: Option<u16>,
    /// Whether the kernel may leave the device's checksums to the network card; `false` where they arrive broken, which
    /// happens behind some NATs. A key of this program's own.
    pub tx_checksum: bool,
}

/// A VXLAN network identifier: 24 bits (RFC 7348, section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Vni(u32);

impl Vni {
    /// The largest there is.
    pub const MAX: Vni = Vni((1 << 24) - 1);

    /// `None` beyond [`Vni::MAX`].
    pub fn new(number: u32) -> Option<Self> {
        (number <= Self::MAX.0).then_some(Vni(number))
    }

    /// The number.
    pub fn get(self) -> u32 {
        self.0
    }
}

impl fmt::Display for Vni {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The backends by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BackendKind {
    /// `udp`
    Udp,
    /// `vxlan`
    Vxlan,
    /// `host-gw`
    HostGw,
}

impl BackendKind {
    /// All there are.
    pub const ALL: [BackendKind; 3] = [BackendKind::Udp, BackendKind::Vxlan, BackendKind::HostGw];

    /// The name, as it stands in configurations and leases.
    pub fn name(self) -> &'static str {
        match self {
            BackendKind::Udp => "udp",
            BackendKind::Vxlan => "vxlan",
            BackendKind::HostGw => "host-gw",
        }
    }
}

impl fmt::Display for BackendKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Reads a name without regard to case: `VxLAN` is in use.
impl FromStr for BackendKind {
    type Err = UnknownBackend;

    fn from_str(name: &str) -> Result<Self, UnknownBackend> {
        let known = BackendKind::ALL
            .into_iter()
            .find(|kind| kind.name().eq_ignore_ascii_case(name));
        known.ok_or_else(|| UnknownBackend(excerpt(name)))
    }
}

/// A backend that this program does not have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is none of the backends that this flanneld has: udp, vxlan and host-gw")]
pub struct UnknownBackend(pub String);

impl Backend {
    /// Which one it is.
    pub fn kind(&self) -> BackendKind {
        match self {
            Backend::Udp(_) => BackendKind::Udp,
            Backend::Vxlan(_) => BackendKind::Vxlan,
            Backend::HostGw => BackendKind::HostGw,
        }
    }

    /// Takes the members of the configuration's `Backend`.
    ///
    /// # Errors
    /// The first thing that is wrong with it.
    pub(super) fn read(keys: &mut Reader) -> Result<Self, ConfigError> {
        let kind = match keys.text("Type", "the name of a backend: \"udp\", \"vxlan\" or \"host-gw\"")? {
            None => BackendKind::Udp,
            Some(name) => name.parse().map_err(ConfigError::UnknownType)?,
        };
        Ok(match kind {
            BackendKind::Udp => Backend::Udp(Udp::read(keys)?),
            BackendKind::Vxlan => Backend::Vxlan(Vxlan {
                vni: keys.number_in("VNI", 0, LARGEST_VNI)?.map_or(Vni(1), Vni),
                port: keys
                    .number_in("Port", 0, MAX_PORT)?
                    .filter(|port| *port != 0)
                    .unwrap_or(VXLAN_PORT),
                gbp: keys.flag("GBP")?.unwrap_or(false),
                learning: keys.flag("Learning")?.unwrap_or(false),
                direct_routing: keys.flag("DirectRouting")?.unwrap_or(false),
                mtu: keys.number_in("MTU", 0, MAX_PORT)?.filter(|mtu| *mtu != 0),
                tx_checksum: keys.flag("TxChecksum")?.unwrap_or(true),
            }),
            BackendKind::HostGw => Backend::HostGw,
        })
    }

    /// The configuration's `Backend` with each default spelt out.
    pub(super) fn to_json(&self) -> Value {
        let kind = self.kind().name();
        match self {
            Backend::Udp(udp) => json!({
                "Type": kind,
                "Port": udp.port,
                "SourcePorts": udp.source_ports.get(),
                "SourceCheck": udp.source_check.name(),
            }),
            Backend::Vxlan(vxlan) => json!({
                "Type": kind,
                "VNI": vxlan.vni.get(),
                "Port": vxlan.port,
                "GBP": vxlan.gbp,
                "Learning": vxlan.learning,
                "DirectRouting": vxlan.direct_routing,
                "MTU": vxlan.mtu,
                "TxChecksum": vxlan.tx_checksum,
            }),
            Backend::HostGw => json!({ "Type": kind }),
        }
    }
}

/// What the original takes where the configuration names none.
impl Default for Backend {
    fn default() -> Self {
        Backend::Udp(Udp::default())
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.kind().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::Network;

    fn config(backend: &str) -> String {
        format!(r#"{{"Network":"10.5.0.0/16","Backend":{backend}}}"#)
    }

    fn backend(json: &str) -> Backend {
        let parsed = Network::parse(&config(json)).unwrap();
        assert_eq!(parsed.warnings, [""; 0], "{json}");
        parsed.network.backend().clone()
    }

    #[test]
    fn keys_and_type_are_read_without_regard_to_case() {
        let expected = Vxlan {
            vni: Vni(42),
            port: 4789,
            gbp: true,
            learning: true,
            direct_routing: true,
            mtu: Some(1400),
            tx_checksum: false,
        };
        let vxlan = r#"{"type":"VxLAN","vni":42,"PORT":4789,"Directrouting":true,"mtu":1400,"gbp":true,"learning":true,
            "txChecksum":false}"#;
        assert_eq!(backend(vxlan), Backend::Vxlan(expected));
        let expected = Udp {
            port: 8286,
            source_ports: SourcePorts(8),
            source_check: SourceCheck::Peer,
        };
        let udp = r#"{"TYPE":"UDP","port":8286,"sourcePorts":8,"SOURCECHECK":"Peer"}"#;
        assert_eq!(backend(udp), Backend::Udp(expected));
    }

    #[test]
    fn each_backend_has_its_defaults() {
        let udp = Udp {
            port: 8285,
            source_ports: SourcePorts(1),
            source_check: SourceCheck::Strict,
        };
        assert_eq!(backend("{}"), Backend::Udp(udp.clone()));
        assert_eq!(backend("null"), Backend::Udp(udp.clone()));
        assert_eq!(
            backend(r#"{"Type":"udp","Port":9000}"#),
            Backend::Udp(Udp { port: 9000, ..udp })
        );
        assert_eq!(backend(r#"{"Type":"host-gw"}"#), Backend::HostGw);
        let vxlan = Vxlan {
            vni: Vni(1),
            port: 8472,
            gbp: false,
            learning: false,
            direct_routing: false,
            mtu: None,
            tx_checksum: true,
        };
        assert_eq!(backend(r#"{"Type":"vxlan"}"#), Backend::Vxlan(vxlan.clone()));
        assert_eq!(backend(r#"{"Type":"vxlan","Port":0,"MTU":0}"#), Backend::Vxlan(vxlan));
    }

    #[test]
    fn each_source_check_is_known_by_its_name() {
        for check in SourceCheck::ALL {
            let expected = Udp {
                source_check: check,
                ..Udp::default()
            };
            assert_eq!(
                backend(&format!(r#"{{"SourceCheck":"{check}"}}"#)),
                Backend::Udp(expected)
            );
        }
    }

    #[test]
    fn a_host_has_1_to_64_source_ports() {
        for number in [1, 64] {
            let Backend::Udp(udp) = backend(&format!(r#"{{"SourcePorts":{number}}}"#)) else {
                panic!("udp is the default");
            };
            assert_eq!(
                (udp.source_ports.get(), Some(udp.source_ports)),
                (number, SourcePorts::new(number))
            );
        }
        assert_eq!([0, 65].map(SourcePorts::new), [None; 2]);
    }

    #[test]
    fn each_wrong_value_is_named_with_what_would_be_right() {
        for (json, parts) in [
            (r#"{"Type":7}"#, &["Backend.Type is 7", "\"vxlan\""][..]),
            (
                r#"{"Type":"wireguard"}"#,
                &["Backend.Type: \"wireguard\"", "udp, vxlan and host-gw"],
            ),
            (r#"{"Port":0}"#, &["Backend.Port is 0", "1 to 65535"]),
            (r#"{"Port":65536}"#, &["Backend.Port is 65536", "1 to 65535"]),
            (r#"{"SourcePorts":0}"#, &["Backend.SourcePorts is 0", "1 to 64"]),
            (r#"{"SourcePorts":65}"#, &["Backend.SourcePorts is 65", "1 to 64"]),
            // 256 more than a number that is right.
            (r#"{"SourcePorts":257}"#, &["Backend.SourcePorts is 257", "1 to 64"]),
            (
                r#"{"SourcePorts":"8"}"#,
                &["Backend.SourcePorts is \"8\", a string", "without quotes"],
            ),
            (
                r#"{"SourceCheck":"loose"}"#,
                &["Backend.SourceCheck is \"loose\"", "\"strict\", \"peer\" or \"off\""],
            ),
            (
                r#"{"SourceCheck":false}"#,
                &["Backend.SourceCheck is false", "\"strict\", \"peer\" or \"off\""],
            ),
            (
                r#"{"Type":"vxlan","VNI":10000000}"#,
                &["Backend.VNI is 10000000", "0 to 9999999"],
            ),
        ] {
            let message = Network::parse(&config(json)).unwrap_err().to_string();
            for part in parts {
                assert!(message.contains(part), "{json}: {message:?} lacks {part:?}");
            }
            assert!(!message.contains('\n'), "{json}: {message:?}");
        }
    }
}
