//! The configuration's `Backend`: how packets travel between hosts.

use std::{fmt, str::FromStr};

use serde_json::{Value, json};

use super::{ConfigError, Reader};
use crate::json::excerpt;

/// The `udp` backend's port unless configured, as in the original.
pub const UDP_PORT: u16 = 8285;

/// The `vxlan` backend's port unless configured: Linux's, which is older than IANA's 4789 (RFC 7348, section 8.1).
pub const VXLAN_PORT: u16 = 8472;

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
        let max_port = u64::from(u16::MAX);
        Ok(match kind {
            BackendKind::Udp => Backend::Udp(Udp {
                port: keys.number_in("Port", 1, max_port)?.unwrap_or(UDP_PORT),
            }),
            BackendKind::Vxlan => Backend::Vxlan(Vxlan {
                vni: keys.number_in("VNI", 0, Vni::MAX.0.into())?.map_or(Vni(1), Vni),
                port: keys
                    .number_in("Port", 0, max_port)?
                    .filter(|port| *port != 0)
                    .unwrap_or(VXLAN_PORT),
                gbp: keys.flag("GBP")?.unwrap_or(false),
                learning: keys.flag("Learning")?.unwrap_or(false),
                direct_routing: keys.flag("DirectRouting")?.unwrap_or(false),
                mtu: keys.number_in("MTU", 0, max_port)?.filter(|mtu| *mtu != 0),
            }),
            BackendKind::HostGw => Backend::HostGw,
        })
    }

    /// The configuration's `Backend` with each default spelt out.
    pub(super) fn to_json(&self) -> Value {
        let kind = self.kind().name();
        match self {
            Backend::Udp(Udp { port }) => json!({ "Type": kind, "Port": port }),
            Backend::Vxlan(vxlan) => json!({
                "Type": kind,
                "VNI": vxlan.vni.get(),
                "Port": vxlan.port,
                "GBP": vxlan.gbp,
                "Learning": vxlan.learning,
                "DirectRouting": vxlan.direct_routing,
                "MTU": vxlan.mtu,
            }),
            Backend::HostGw => json!({ "Type": kind }),
        }
    }
}

/// What the original takes where the configuration names none.
impl Default for Backend {
    fn default() -> Self {
        Backend::Udp(Udp { port: UDP_PORT })
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
        };
        let json =
            r#"{"type":"VxLAN","vni":42,"PORT":4789,"Directrouting":true,"mtu":1400,"gbp":true,"learning":true}"#;
        assert_eq!(backend(json), Backend::Vxlan(expected));
    }

    #[test]
    fn each_backend_has_its_defaults() {
        assert_eq!(backend("{}"), Backend::Udp(Udp { port: 8285 }));
        assert_eq!(backend("null"), Backend::Udp(Udp { port: 8285 }));
        assert_eq!(
            backend(r#"{"Type":"udp","Port":9000}"#),
            Backend::Udp(Udp { port: 9000 })
        );
        assert_eq!(backend(r#"{"Type":"host-gw"}"#), Backend::HostGw);
        let vxlan = Vxlan {
            vni: Vni(1),
            port: 8472,
            gbp: false,
            learning: false,
            direct_routing: false,
            mtu: None,
        };
        assert_eq!(backend(r#"{"Type":"vxlan"}"#), Backend::Vxlan(vxlan.clone()));
        assert_eq!(backend(r#"{"Type":"vxlan","Port":0,"MTU":0}"#), Backend::Vxlan(vxlan));
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
            (
                r#"{"Type":"vxlan","VNI":16777216}"#,
                &["Backend.VNI is 16777216", "0 to 16777215"],
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
