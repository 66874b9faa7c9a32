//! A lease as it stands in the registry: the subnet is the key, who has it is the value.

use std::{
    fmt,
    net::{Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::Serialize;
use serde_json::Value;

use crate::{
    json::{GivenTwice, Members, excerpt, type_of},
    network::{BackendKind, Block, Network},
    registry::{Record, Revision, TtlId},
};

/// What all lease keys begin with, relative to the network's prefix.
pub const SUBNETS: &str = "subnets/";

/// How deep a backend's data may be nested: several times as deep as any backend of flannel's. What is much deeper cannot be stored
/// within other JSON and read again, which ends at 128 levels.
const DEEPEST: usize = 16;

/// The subnets of one host; its display is the last part of a lease's key.
///
/// `10.5.34.0-24`, or with IPv6 `10.5.34.0-24&fd00:12:13::-64`. There is one way to write each: it is the key's
/// uniqueness that keeps two hosts from having the same subnet, so another spelling (`10.5.34.7-24`, `10.5.34.0-024`) is
/// refused rather than read as the same. In a network without IPv4 the original writes `0.0.0.0-0` for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Subnets {
    v4: Ipv4Net,
    v6: Option<Ipv6Net>,
}

impl Subnets {
    /// The subnets that these addresses lie in.
    pub fn new(v4: Ipv4Net, v6: Option<Ipv6Net>) -> Self {
        Subnets {
            v4: v4.trunc(),
            v6: v6.map(|v6| v6.trunc()),
        }
    }

    /// The IPv4 subnet; its address is the network's.
    pub fn v4(&self) -> Ipv4Net {
        self.v4
    }

    /// The IPv6 subnet, in a dual-stack network; its address is the network's.
    pub fn v6(&self) -> Option<Ipv6Net> {
        self.v6
    }

    /// Those there are, of both families.
    pub fn nets(&self) -> impl Iterator<Item = IpNet> + use<> {
        std::iter::once(IpNet::V4(self.v4)).chain(self.v6.map(IpNet::V6))
    }

    /// The lease's key, relative to the network's prefix.
    pub fn key(&self) -> String {
        format!("{SUBNETS}{self}")
    }

    /// As people write them: `10.5.34.0/24`, or `10.5.34.0/24,fd00:12:13::/64`.
    pub fn to_cidrs(&self) -> String {
        self.to_string().replace('-', "/").replace('&', ",")
    }

    /// Reads what [`Subnets::to_cidrs`] writes.
    ///
    /// # Errors
    /// As for a key: the addresses must be the subnets' own.
    pub fn from_cidrs(text: &str) -> Result<Self, SubnetsError> {
        text.replace('/', "-").replace(',', "&").parse()
    }

    /// Whether a host of both would have an address twice.
    pub fn overlap(&self, other: &Subnets) -> bool {
        let v6 = self
            .v6
            .zip(other.v6)
            .is_some_and(|(ours, theirs)| ours.overlaps(&theirs));
        // What stands for no IPv4 in the key would overlap everything.
        let no_v4 = Ipv4Net::default();
        let v4 = self.v4 != no_v4 && other.v4 != no_v4 && self.v4.overlaps(&other.v4);
        v4 || v6
    }

    /// Whether a host of this network may have these: each family that the network has and no other, where it fits.
    pub fn fit(&self, network: &Network) -> bool {
        let v4 = match network.ipv4() {
            Some(plan) => plan.fits(&self.v4),
            None => self.v4 == Ipv4Net::default(),
        };
        let v6 = match (network.ipv6(), self.v6) {
            (Some(plan), Some(v6)) => plan.fits(&v6),
            (plan, v6) => plan.is_none() && v6.is_none(),
        };
        v4 && v6
    }
}

impl fmt::Display for Subnets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.v4.addr(), self.v4.prefix_len())?;
        match self.v6 {
            Some(v6) => write!(f, "&{}-{}", v6.addr(), v6.prefix_len()),
            None => Ok(()),
        }
    }
}

impl FromStr for Subnets {
    type Err = SubnetsError;

    fn from_str(text: &str) -> Result<Self, SubnetsError> {
        let (v4, v6) = match text.split_once('&') {
            Some((v4, v6)) => (v4, Some(v6)),
            None => (text, None),
        };
        let malformed = || SubnetsError::Malformed(excerpt(text));
        let v4 = block(v4).ok_or_else(malformed)?;
        let v6 = v6.map(|v6| block(v6).ok_or_else(malformed)).transpose()?;
        let subnets = Subnets::new(v4, v6);
        let canonical = subnets.to_string();
        if canonical != text {
            return Err(SubnetsError::NotCanonical {
                text: excerpt(text),
                canonical,
            });
        }
        Ok(subnets)
    }
}

/// The subnets that a lease's key, relative to the network's prefix, names; `None` if it is no such key.
pub fn subnets_of(key: &str) -> Option<Subnets> {
    key.strip_prefix(SUBNETS)?.parse().ok()
}

/// `10.5.34.0-24`, with `-` for the `/` that separates the parts of a key.
fn block<N: FromStr>(text: &str) -> Option<N> {
    let (address, length) = text.split_once('-')?;
    format!("{address}/{length}").parse().ok()
}

/// Why a text is no subnet key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubnetsError {
    /// Not of the form.
    #[error("{0:?} is not a subnet key such as 10.5.34.0-24 or 10.5.34.0-24&fd00:12:13::-64")]
    Malformed(String),
    /// Another spelling of a key.
    #[error("{text:?} is not how this subnet's key is written, which is {canonical:?}")]
    NotCanonical {
        /// What was read.
        text: String,
        /// How it should be written.
        canonical: String,
    },
}

/// The backend that a lease's host uses.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum BackendType {
    /// One that this program has, too.
    Known(BackendKind),
    /// Another one, by its name.
    Other(String),
}

impl BackendType {
    /// `udp`, `vxlan`, …
    pub fn name(&self) -> &str {
        match self {
            BackendType::Known(kind) => kind.name(),
            BackendType::Other(name) => name,
        }
    }
}

impl From<BackendKind> for BackendType {
    fn from(kind: BackendKind) -> Self {
        BackendType::Known(kind)
    }
}

/// The original's `udp` backend writes no type: no name is its name.
impl From<&str> for BackendType {
    fn from(name: &str) -> Self {
        match name.parse() {
            Ok(kind) => BackendType::Known(kind),
            Err(_) if name.is_empty() => BackendType::Known(BackendKind::Udp),
            Err(_) => BackendType::Other(name.to_owned()),
        }
    }
}

impl fmt::Display for BackendType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Who has a subnet, and how to reach it: a lease's value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseValue {
    /// Where the underlay reaches the host.
    pub public_ip: Ipv4Addr,
    /// The same over IPv6, in a dual-stack network.
    pub public_ipv6: Option<Ipv6Addr>,
    /// How the host sends and receives.
    pub backend_type: BackendType,
    /// What that backend tells its peers (`vxlan`: `VNI`, `VtepMAC`); an object if it is there.
    pub backend_data: Option<Value>,
    /// The same for IPv6.
    pub backend_v6_data: Option<Value>,
}

/// The members in the original's order; it writes `PublicIPv6` always and the others only when they say something.
#[derive(Serialize)]
struct Stored<'a> {
    #[serde(rename = "PublicIP")]
    public_ip: Ipv4Addr,
    #[serde(rename = "PublicIPv6")]
    public_ipv6: Option<Ipv6Addr>,
    #[serde(rename = "BackendType", skip_serializing_if = "Option::is_none")]
    backend_type: Option<&'a str>,
    #[serde(rename = "BackendData", skip_serializing_if = "Option::is_none")]
    backend_data: Option<&'a Value>,
    #[serde(rename = "BackendV6Data", skip_serializing_if = "Option::is_none")]
    backend_v6_data: Option<&'a Value>,
}

impl LeaseValue {
    /// What a reservation holds, and a lease of the `udp` backend that announces nothing.
    pub fn new(public_ip: Ipv4Addr) -> Self {
        LeaseValue {
            public_ip,
            public_ipv6: None,
            backend_type: BackendKind::Udp.into(),
            backend_data: None,
            backend_v6_data: None,
        }
    }

    /// Reads a value as it is stored.
    ///
    /// # Errors
    /// It is not JSON, not an object, or a member of it is missing or wrong. Unknown members are ignored.
    pub fn parse(value: &[u8]) -> Result<Self, ValueError> {
        let not_json = |error: serde_json::Error| ValueError::NotJson {
            reason: error.to_string(),
            text: excerpt(&String::from_utf8_lossy(value)),
        };
        let Value::Object(object) = serde_json::from_slice(value).map_err(not_json)? else {
            return Err(ValueError::NotAnObject(excerpt(&String::from_utf8_lossy(value))));
        };
        let mut members = Members::new(object)?;
        let public_ip = address(&mut members, "PublicIP", "an IPv4 address")?;
        let backend_type = match members.take("BackendType") {
            None => BackendType::from(""),
            Some(Value::String(name)) => BackendType::from(name.as_str()),
            Some(other) => return Err(wrong("BackendType", &other, "a string")),
        };
        Ok(LeaseValue {
            public_ip: public_ip.ok_or(ValueError::NoPublicIp)?,
            public_ipv6: address(&mut members, "PublicIPv6", "an IPv6 address")?,
            backend_type,
            backend_data: data(&mut members, "BackendData")?,
            backend_v6_data: data(&mut members, "BackendV6Data")?,
        })
    }

    /// The value as the original writes it, byte for byte: a `udp` lease names no type.
    pub fn to_bytes(&self) -> Vec<u8> {
        let stored = Stored {
            public_ip: self.public_ip,
            public_ipv6: self.public_ipv6,
            backend_type: match &self.backend_type {
                BackendType::Known(BackendKind::Udp) => None,
                named => Some(named.name()),
            },
            backend_data: self.backend_data.as_ref(),
            backend_v6_data: self.backend_v6_data.as_ref(),
        };
        // Writing to memory does not fail, and all keys are strings.
        serde_json::to_vec(&stored).expect("strings and JSON values")
    }
}

/// An address, if the member is there.
fn address<A: FromStr>(
    members: &mut Members,
    key: &'static str,
    wanted: &'static str,
) -> Result<Option<A>, ValueError> {
    let Some(value) = members.take(key) else {
        return Ok(None);
    };
    let address = value.as_str().and_then(|text| text.parse().ok());
    address.map(Some).ok_or_else(|| wrong(key, &value, wanted))
}

/// A backend's data, if the member is there.
fn data(members: &mut Members, key: &'static str) -> Result<Option<Value>, ValueError> {
    let data = members.take(key);
    match &data {
        Some(value) if is_deeper(value, DEEPEST) => Err(ValueError::TooDeep { key }),
        _ => Ok(data),
    }
}

/// Whether lists and objects are nested in more than so many levels.
fn is_deeper(value: &Value, levels: usize) -> bool {
    let below = |value: &Value| is_deeper(value, levels - 1);
    match value {
        Value::Array(_) | Value::Object(_) if levels == 0 => true,
        Value::Array(list) => list.iter().any(below),
        Value::Object(members) => members.values().any(below),
        _ => false,
    }
}

fn wrong(key: &'static str, value: &Value, wanted: &'static str) -> ValueError {
    ValueError::Wrong {
        key,
        value: excerpt(&value.to_string()),
        found: type_of(value),
        wanted,
    }
}

/// Why a lease's value cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ValueError {
    /// Not JSON at all.
    #[error("its value is not JSON: {reason} in `{text}`")]
    NotJson {
        /// What is wrong and where.
        reason: String,
        /// How it begins.
        text: String,
    },
    /// JSON, but not an object.
    #[error("its value is `{0}`, which is not an object")]
    NotAnObject(String),
    /// Two spellings of one key.
    #[error("its value has both {first:?} and {second:?}, which are the same key")]
    GivenTwice {
        /// One spelling.
        first: String,
        /// The other.
        second: String,
    },
    /// Nobody can be reached.
    #[error("its value has no PublicIP")]
    NoPublicIp,
    /// A member of the wrong type or form.
    #[error("its {key} is {value}, {found}, but must be {wanted}")]
    Wrong {
        /// Which member.
        key: &'static str,
        /// What it holds.
        value: String,
        /// Of which JSON type that is.
        found: &'static str,
        /// What would be right.
        wanted: &'static str,
    },
    /// No backend writes that.
    #[error("its {key} is nested in more than {DEEPEST} levels, which no backend writes")]
    TooDeep {
        /// Which member.
        key: &'static str,
    },
}

impl From<GivenTwice> for ValueError {
    fn from(GivenTwice { first, second }: GivenTwice) -> Self {
        ValueError::GivenTwice { first, second }
    }
}

/// One host's subnets, as the registry holds them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// What is leased.
    pub subnets: Subnets,
    /// To whom.
    pub value: LeaseValue,
    /// The change that made it so.
    pub revision: Revision,
    /// The change that made the lease: its age, which renewals, by whom ever, do not change.
    pub created: Revision,
    /// What its life hangs on; `None`: it is a reservation.
    pub ttl: Option<TtlId>,
}

/// Why a record is no lease. Such a record is skipped with a warning; it must not touch any other.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LeaseError {
    /// The key is none.
    #[error("the lease {key:?} cannot be used: {reason}")]
    Key {
        /// The record's key.
        key: String,
        /// Why.
        reason: SubnetsError,
    },
    /// The value is none.
    #[error("the lease {key:?} cannot be used: {reason}")]
    Value {
        /// The record's key.
        key: String,
        /// Why.
        reason: ValueError,
    },
}

impl Lease {
    /// Reads a record.
    ///
    /// # Errors
    /// Its key is not `subnets/` and a subnet key, or its value is not a lease's.
    pub fn from_record(record: &Record) -> Result<Self, LeaseError> {
        let key = || excerpt(&record.key);
        let subnets = record.key.strip_prefix(SUBNETS).unwrap_or(&record.key).parse();
        Ok(Lease {
            subnets: subnets.map_err(|reason| LeaseError::Key { key: key(), reason })?,
            value: LeaseValue::parse(&record.value).map_err(|reason| LeaseError::Value { key: key(), reason })?,
            revision: record.revision,
            created: record.created,
            ttl: record.ttl,
        })
    }

    /// Whether it never expires.
    pub fn is_reservation(&self) -> bool {
        self.ttl.is_none()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    /// A value with so many lists in one another.
    fn nested(levels: usize) -> String {
        let (open, close) = ("[".repeat(levels), "]".repeat(levels));
        format!(r#"{{"PublicIP":"192.0.2.1","BackendData":{open}1{close}}}"#)
    }

    #[test]
    fn backend_data_that_no_backend_nests_so_is_refused() {
        for levels in [0, 1, DEEPEST] {
            let value = LeaseValue::parse(nested(levels).as_bytes()).unwrap();
            assert_eq!(LeaseValue::parse(&value.to_bytes()).unwrap(), value);
        }
        for levels in [DEEPEST + 1, 120, 126] {
            let error = LeaseValue::parse(nested(levels).as_bytes()).unwrap_err();
            assert_eq!(error, ValueError::TooDeep { key: "BackendData" }, "{levels}");
        }
    }

    #[test]
    fn keys_are_read_and_written() {
        let subnets: Subnets = "10.5.34.0-24".parse().unwrap();
        assert_eq!(subnets, Subnets::new("10.5.34.0/24".parse().unwrap(), None));
        assert_eq!(subnets.key(), "subnets/10.5.34.0-24");
        let dual: Subnets = "10.5.34.0-24&fd00:12:13::-64".parse().unwrap();
        assert_eq!(dual.v6(), Some("fd00:12:13::/64".parse().unwrap()));
        assert_eq!(dual.to_string(), "10.5.34.0-24&fd00:12:13::-64");
    }

    #[test]
    fn people_write_subnets_with_slashes() {
        for text in ["10.5.34.0/24", "10.5.34.0/24,fd00:12:13::/64"] {
            assert_eq!(Subnets::from_cidrs(text).unwrap().to_cidrs(), text);
        }
        assert!(Subnets::from_cidrs("10.5.34.1/24").is_err());
    }

    #[test]
    fn subnets_overlap_in_either_family() {
        let overlap = |a: &str, b: &str| a.parse::<Subnets>().unwrap().overlap(&b.parse().unwrap());
        assert!(overlap("10.5.34.0-24", "10.5.32.0-20"));
        assert!(overlap("10.5.34.0-24&fd00::-64", "10.5.35.0-24&fd00::-60"));
        assert!(!overlap("10.5.34.0-24&fd00::-64", "10.5.35.0-24"));
        assert!(!overlap("0.0.0.0-0&fd00::-64", "10.5.35.0-24"));
    }

    #[test]
    fn what_is_no_key_is_refused() {
        for text in [
            "",
            "10",
            "10.12.13.0",
            "10.12.13-24",
            "10.12.13.300-24",
            "10.12.13.0-33",
            "10.12.13.0-24hi",
            "10.12.13.0/24",
            "10.12.13.0-24&",
            "&fd00::-64",
            "10.12.13.0-24&20011::-56",
            "10.12.13.0-24&2001-56",
            "10.12.13.0-24&fd00::-64&fd00::-64",
            "10.12.13.0-24&10.12.13.0-24",
            " 10.12.13.0-24",
        ] {
            assert!(
                matches!(text.parse::<Subnets>(), Err(SubnetsError::Malformed(_))),
                "{text}"
            );
        }
    }

    #[test]
    fn another_spelling_of_a_key_is_refused_with_the_right_one() {
        for (text, canonical) in [
            ("10.5.34.7-24", "10.5.34.0-24"),
            ("10.5.34.0-024", "10.5.34.0-24"),
            ("10.5.34.0-24&FD00::-64", "10.5.34.0-24&fd00::-64"),
            ("10.5.34.0-24&fd00:0::-64", "10.5.34.0-24&fd00::-64"),
        ] {
            match text.parse::<Subnets>() {
                Err(SubnetsError::NotCanonical { canonical: shown, .. }) => assert_eq!(shown, canonical),
                Err(SubnetsError::Malformed(_)) => {} // ipnet may refuse it first
                Ok(subnets) => panic!("{text} is read as {subnets}"),
            }
        }
    }

    #[test]
    fn subnets_fit_a_network_that_has_the_same_families() {
        let network = |json: &str| Network::parse(json).unwrap().network;
        let v4 = network(r#"{"Network":"10.5.0.0/16"}"#);
        let dual = network(r#"{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48"}"#);
        let v6 = network(r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00::/48"}"#);
        let fit = |key: &str| {
            let subnets: Subnets = key.parse().unwrap();
            [&v4, &dual, &v6].map(|network| subnets.fit(network))
        };
        assert_eq!(fit("10.5.34.0-24"), [true, false, false]);
        assert_eq!(fit("10.5.34.0-24&fd00:0:0:7::-64"), [false, true, false]);
        assert_eq!(fit("0.0.0.0-0&fd00:0:0:7::-64"), [false, false, true]);
        assert_eq!(fit("10.5.0.0-24"), [false, false, false]);
        assert_eq!(fit("10.5.34.0-24&fd00::-64"), [false, false, false]);
    }

    #[test]
    fn values_are_written_byte_for_byte_as_the_original_writes_them() {
        for text in [
            r#"{"PublicIP":"192.168.211.153","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"d2:72:c5:90:ff:8c"}}"#,
            r#"{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"host-gw"}"#,
            r#"{"PublicIP":"192.168.64.3","PublicIPv6":null}"#,
            r#"{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"wireguard"}"#,
            r#"{"PublicIP":"192.168.64.3","PublicIPv6":"2001:db8::3","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"d2:72:c5:90:ff:8c"},"BackendV6Data":{"VNI":1,"VtepMAC":"d2:72:c5:90:ff:8d"}}"#,
        ] {
            let value = LeaseValue::parse(text.as_bytes()).unwrap();
            assert_eq!(String::from_utf8(value.to_bytes()).unwrap(), text);
        }
    }

    #[test]
    fn a_lease_without_a_type_is_a_udp_hosts() {
        for member in [
            "",
            r#","BackendType":"""#,
            r#","BackendType":"udp""#,
            r#","BackendType":null"#,
            r#","backendtype":"UDP""#,
        ] {
            let text = format!(r#"{{"PublicIP":"192.168.64.3"{member}}}"#);
            assert_eq!(
                LeaseValue::parse(text.as_bytes()),
                Ok(LeaseValue::new(Ipv4Addr::new(192, 168, 64, 3))),
                "{text}"
            );
        }
    }

    #[test]
    fn old_and_extended_backend_data_is_kept() {
        let text = br#"{"PublicIP":"192.168.64.3","BackendType":"vxlan","BackendData":{"VtepMAC":"d2:72:c5:90:ff:8c","Extra":[1]},"New":1}"#;
        let value = LeaseValue::parse(text).unwrap();
        assert_eq!(
            value.backend_data,
            Some(json!({"VtepMAC": "d2:72:c5:90:ff:8c", "Extra": [1]}))
        );
    }

    #[test]
    fn broken_values_are_refused_with_the_reason() {
        for (text, part) in [
            ("{broken", "not JSON"),
            ("7", "not an object"),
            ("{}", "no PublicIP"),
            (r#"{"PublicIP":null}"#, "no PublicIP"),
            (r#"{"PublicIP":7}"#, "PublicIP is 7, a number"),
            (r#"{"PublicIP":"fd00::1"}"#, "PublicIP is \"fd00::1\""),
            (r#"{"PublicIP":"192.0.2.1","PublicIPv6":"x"}"#, "PublicIPv6 is \"x\""),
            (r#"{"PublicIP":"192.0.2.1","publicip":"192.0.2.2"}"#, "the same key"),
            (r#"{"PublicIP":"192.0.2.1","BackendType":[]}"#, "BackendType is []"),
        ] {
            let message = LeaseValue::parse(text.as_bytes()).unwrap_err().to_string();
            assert!(message.contains(part), "{text}: {message:?} lacks {part:?}");
        }
        assert!(LeaseValue::parse(b"\xff\xfe").is_err());
    }

    #[test]
    fn a_record_is_read_as_a_lease_or_named_in_the_error() {
        let mut record = Record {
            key: "subnets/10.5.34.0-24".into(),
            value: br#"{"PublicIP":"192.0.2.1"}"#.into(),
            revision: Revision(7),
            created: Revision(3),
            ttl: None,
        };
        let lease = Lease::from_record(&record).unwrap();
        assert!(lease.is_reservation());
        assert_eq!(
            (lease.subnets.to_string().as_str(), lease.revision, lease.created),
            ("10.5.34.0-24", Revision(7), Revision(3))
        );
        record.ttl = Some(TtlId(1));
        assert!(!Lease::from_record(&record).unwrap().is_reservation());
        record.value = b"{broken".into();
        assert!(
            Lease::from_record(&record)
                .unwrap_err()
                .to_string()
                .contains("\"subnets/10.5.34.0-24\"")
        );
        record.key = "subnets/10".into();
        assert!(
            Lease::from_record(&record)
                .unwrap_err()
                .to_string()
                .contains("\"subnets/10\" cannot be used: \"10\"")
        );
    }

    proptest! {
        #[test]
        fn keys_round_trip(v4: u32, len4 in 0u8..=32, v6 in prop::option::of((any::<u128>(), 0u8..=128))) {
            let v4 = Ipv4Net::around(v4.into(), len4);
            let subnets = Subnets::new(v4, v6.map(|(address, length)| Ipv6Net::around(address, length)));
            prop_assert_eq!(subnets.to_string().parse(), Ok(subnets));
        }

        #[test]
        fn a_key_that_is_read_is_written_the_same(text in "[0-9.&a-f:-]{0,30}") {
            if let Ok(subnets) = text.parse::<Subnets>() {
                prop_assert_eq!(subnets.to_string(), text);
            }
        }

        #[test]
        fn values_round_trip(ip: u32, ip6 in prop::option::of(any::<u128>()), kind in "(|udp|vxlan|host-gw|ipsec)", data in prop::option::of(any::<u32>())) {
            let value = LeaseValue {
                public_ip: ip.into(),
                public_ipv6: ip6.map(Ipv6Addr::from_bits),
                backend_type: kind.as_str().into(),
                backend_data: data.map(|vni| json!({ "VNI": vni })),
                backend_v6_data: None,
            };
            prop_assert_eq!(LeaseValue::parse(&value.to_bytes()), Ok(value));
        }
    }
}
