//! The network configuration: the JSON that every host of one overlay reads from `<prefix>/config`.
//!
//! A [`Network`] that exists is valid: whatever could be wrong with it is a [`ConfigError`] of [`Network::parse`]. Keys,
//! defaults and limits are the original's:
//!
//! | key | meaning | default |
//! | --- | --- | --- |
//! | `Network` | the whole overlay, IPv4 | mandatory with IPv4 |
//! | `SubnetLen` | prefix length of one host's subnet | 24; two longer than a Network over /22 |
//! | `SubnetMin`, `SubnetMax` | first and last subnet to hand out | the second; the last |
//! | `EnableIPv4`, `EnableIPv6` | which families the overlay has | true, false |
//! | `IPv6Network`, `IPv6SubnetLen`, … | the same for IPv6 | length 64; two longer than a Network over /62 |
//! | `EnableNFTables` | traffic rules through nftables | false |
//! | `Backend` | `Type` (`udp`, `vxlan`, `host-gw`) and that backend's keys | `udp` |
//!
//! Some of the backends' keys are this program's own; the original ignores them:
//!
//! | key | meaning | default |
//! | --- | --- | --- |
//! | `SourcePorts` (`udp`) | how many UDP source ports flows are hashed over, 1 to 64 | 1: all leaves from `Port` |
//! | `SourceCheck` (`udp`) | which datagrams are let in: `strict`, `peer` or `off`, see [`SourceCheck`] | `strict` |
//! | `TxChecksum` (`vxlan`) | `false` turns the device's checksum offload off | true: it is left as it is |
//!
//! Keys, `Type` and `SourceCheck` are matched without regard to case. `0`, `0.0.0.0` and `::` stand for the default of a length or a
//! bound, as in the original.

mod backend;
mod plan;

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde_json::{Map, Value};

pub use self::{
    backend::{Backend, BackendKind, SourceCheck, SourcePorts, UDP_PORT, Udp, UnknownBackend, VXLAN_PORT, Vni, Vxlan},
    plan::{AddressPlan, Block, Keys},
};
use crate::{
    json::{GivenTwice, Members, excerpt, type_of},
    registry::{self, Registry},
};

/// The configuration's key, relative to the network's prefix.
pub const CONFIG_KEY: &str = "config";

/// A valid network configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Network {
    ipv4: Option<AddressPlan<Ipv4Net>>,
    ipv6: Option<AddressPlan<Ipv6Net>>,
    enable_nftables: bool,
    backend: Backend,
}

/// A configuration and what is odd about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parsed {
    /// What the text says.
    pub network: Network,
    /// What was ignored or corrected, each one line for the log.
    pub warnings: Vec<String>,
}

/// Why a text is no network configuration. Each says what would be right.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum ConfigError {
    #[error(
        "it is not JSON: {reason} in `{text}`; if it was written from a shell, put it in single quotes, as in \
         '{{\"Network\":\"10.5.0.0/16\"}}', or use `flanneld network set --network 10.5.0.0/16`"
    )]
    NotJson { reason: String, text: String },
    #[error("it is {found}, but must be an object such as {{\"Network\":\"10.5.0.0/16\"}}")]
    NotAnObject { found: &'static str },
    #[error("it has both {first:?} and {second:?}, which are the same key: remove one of them")]
    GivenTwice { first: String, second: String },
    #[error("{key} is missing: give the overlay's whole address block, as in \"{key}\":\"{example}\"")]
    NetworkMissing { key: &'static str, example: &'static str },
    #[error("EnableIPv4 is false and EnableIPv6 is not true: turn on at least one of them")]
    NoFamily,
    #[error("{key} is {value}, {found}, but must be {wanted}")]
    WrongType {
        key: String,
        value: String,
        found: &'static str,
        wanted: &'static str,
    },
    #[error("{key} is {value:?}, but must be a block with its length, such as {example:?}")]
    NotCidr {
        key: &'static str,
        value: String,
        example: &'static str,
    },
    #[error("{key} is {value:?}, but must be the first address of a subnet, without a length, such as {example:?}")]
    NotAddress {
        key: &'static str,
        value: String,
        example: String,
    },
    #[error("{key} is {value}, which is every address there is: give a block of your own, such as 10.5.0.0/16")]
    NetworkIsEverything { key: &'static str, value: IpNet },
    #[error("{key} is {value}, which cannot hold four subnets of four addresses: give a /{longest} or larger")]
    NetworkTooSmall {
        key: &'static str,
        value: IpNet,
        longest: u8,
    },
    #[error(
        "{key} is {value}, but must be {shortest} to {longest}, so that {network} holds at least four subnets of at \
         least four addresses"
    )]
    SubnetLen {
        key: &'static str,
        value: u64,
        network: IpNet,
        shortest: u8,
        longest: u8,
    },
    #[error("{key} is {value}, but must lie in {network}")]
    OutsideNetwork {
        key: &'static str,
        value: IpAddr,
        network: IpNet,
    },
    #[error("{key} is {value}, which is inside the subnet {nearest}: give the first address of a /{length}")]
    OffBoundary {
        key: &'static str,
        value: IpAddr,
        length: u8,
        nearest: IpNet,
    },
    #[error("{min_key} is {min}, after {max_key}, {max}: exchange them")]
    MinAboveMax {
        min_key: &'static str,
        min: IpNet,
        max_key: &'static str,
        max: IpNet,
    },
    #[error("Backend.Type: {0}")]
    UnknownType(UnknownBackend),
    #[error("{key} is {value:?}, but must be {wanted}")]
    UnknownName {
        key: &'static str,
        value: String,
        wanted: &'static str,
    },
    #[error("{key} is {value}, but must be {first} to {last}")]
    OutOfRange {
        key: String,
        value: u64,
        first: u64,
        last: u64,
    },
}

impl From<GivenTwice> for ConfigError {
    fn from(GivenTwice { first, second }: GivenTwice) -> Self {
        ConfigError::GivenTwice { first, second }
    }
}

impl Network {
    /// Reads a configuration.
    ///
    /// # Errors
    /// The first thing that is wrong with it.
    pub fn parse(json: &str) -> Result<Parsed, ConfigError> {
        let value: Value = serde_json::from_str(json).map_err(|error| ConfigError::NotJson {
            reason: error.to_string(),
            text: excerpt(json),
        })?;
        let Value::Object(object) = value else {
            return Err(ConfigError::NotAnObject { found: type_of(&value) });
        };
        let mut keys = Reader {
            path: "",
            members: Members::new(object)?,
        };
        let mut warnings = Vec::new();

        let ipv4 = keys.plan::<Ipv4Net>("EnableIPv4", true, "10.5.0.0/16", &mut warnings)?;
        let ipv6 = keys.plan::<Ipv6Net>("EnableIPv6", false, "fd00:12:13::/48", &mut warnings)?;
        if ipv4.is_none() && ipv6.is_none() {
            return Err(ConfigError::NoFamily);
        }
        let enable_nftables = keys.flag("EnableNFTables")?.unwrap_or(false);
        let backend = match keys.members.take("Backend") {
            None => Backend::default(),
            Some(Value::Object(object)) => {
                let mut keys = Reader {
                    path: "Backend.",
                    members: Members::new(object)?,
                };
                let backend = Backend::read(&mut keys)?;
                keys.warn_of_rest(&mut warnings);
                backend
            }
            Some(other) => return Err(keys.wrong_type("Backend", &other, "an object such as {\"Type\":\"udp\"}")),
        };
        keys.warn_of_rest(&mut warnings);
        Ok(Parsed {
            network: Network {
                ipv4,
                ipv6,
                enable_nftables,
                backend,
            },
            warnings,
        })
    }

    /// How IPv4 is divided; at least one of the two families is there.
    pub fn ipv4(&self) -> Option<&AddressPlan<Ipv4Net>> {
        self.ipv4.as_ref()
    }

    /// How IPv6 is divided; at least one of the two families is there.
    pub fn ipv6(&self) -> Option<&AddressPlan<Ipv6Net>> {
        self.ipv6.as_ref()
    }

    /// Traffic rules through nftables instead of iptables.
    pub fn enable_nftables(&self) -> bool {
        self.enable_nftables
    }

    /// How packets travel.
    pub fn backend(&self) -> &Backend {
        &self.backend
    }

    /// The configuration with each default spelt out; [`Network::parse`] reads it as this very network.
    pub fn to_json(&self) -> Map<String, Value> {
        let mut object = Map::new();
        object.insert("EnableIPv4".into(), self.ipv4.is_some().into());
        object.insert("EnableIPv6".into(), self.ipv6.is_some().into());
        object.insert("EnableNFTables".into(), self.enable_nftables.into());
        if let Some(plan) = &self.ipv4 {
            object.extend(plan_to_json(plan));
        }
        if let Some(plan) = &self.ipv6 {
            object.extend(plan_to_json(plan));
        }
        object.insert("Backend".into(), self.backend.to_json());
        object
    }
}

fn plan_to_json<N: Block>(plan: &AddressPlan<N>) -> [(String, Value); 4] {
    let first = |subnet: N| subnet.into().network().to_string();
    [
        (N::KEYS.network.into(), plan.network().to_string().into()),
        (N::KEYS.subnet_len.into(), plan.subnet_len().into()),
        (N::KEYS.subnet_min.into(), first(plan.min()).into()),
        (N::KEYS.subnet_max.into(), first(plan.max()).into()),
    ]
}

/// Takes typed values out of an object's members.
struct Reader {
    /// What stands before a key in messages: the object's own key and a dot.
    path: &'static str,
    members: Members,
}

impl Reader {
    /// One family's share of the configuration; `None`: it is not enabled.
    fn plan<N: Block>(
        &mut self,
        enable: &'static str,
        enabled_by_default: bool,
        example: &'static str,
        warnings: &mut Vec<String>,
    ) -> Result<Option<AddressPlan<N>>, ConfigError> {
        let enabled = self.flag(enable)?.unwrap_or(enabled_by_default);
        let Keys {
            network,
            subnet_len,
            subnet_min,
            subnet_max,
        } = N::KEYS;
        if !enabled {
            for key in [network, subnet_len, subnet_min, subnet_max] {
                if self.members.take(key).is_some() {
                    warnings.push(format!("{key} is ignored, because {enable} is not true"));
                }
            }
            return Ok(None);
        }
        let Some(text) = self.text(network, "a string")? else {
            return Err(ConfigError::NetworkMissing { key: network, example });
        };
        let not_cidr = || ConfigError::NotCidr {
            key: network,
            value: excerpt(&text),
            example,
        };
        let block = N::from_str(&text).map_err(|_| not_cidr())?;
        let whole = N::around(block.first(), block.length());
        if whole != block {
            warnings.push(format!(
                "{network} is {block}, taken as {whole}: its last bits belong to a host"
            ));
        }
        // 0 and the unspecified address are "not set" to the original.
        let subnet_len = self.number(subnet_len)?.filter(|len| *len != 0);
        let min = self.address(subnet_min, example)?;
        let max = self.address(subnet_max, example)?;
        AddressPlan::new(whole, subnet_len, min, max).map(Some)
    }

    fn flag(&mut self, key: &str) -> Result<Option<bool>, ConfigError> {
        let Some(value) = self.members.take(key) else {
            return Ok(None);
        };
        value
            .as_bool()
            .map(Some)
            .ok_or_else(|| self.wrong_type(key, &value, "true or false, without quotes"))
    }

    fn text(&mut self, key: &str, wanted: &'static str) -> Result<Option<String>, ConfigError> {
        match self.members.take(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.wrong_type(key, &other, wanted)),
        }
    }

    fn number(&mut self, key: &str) -> Result<Option<u64>, ConfigError> {
        let Some(value) = self.members.take(key) else {
            return Ok(None);
        };
        value
            .as_u64()
            .map(Some)
            .ok_or_else(|| self.wrong_type(key, &value, "a whole number, without quotes"))
    }

    /// A number from `first` to `last`, which `T` can hold.
    fn number_in<T: TryFrom<u64>>(&mut self, key: &str, first: u64, last: u64) -> Result<Option<T>, ConfigError> {
        let Some(value) = self.number(key)? else {
            return Ok(None);
        };
        let number = if (first..=last).contains(&value) {
            T::try_from(value).ok()
        } else {
            None
        };
        let key = format!("{}{key}", self.path);
        number.map(Some).ok_or(ConfigError::OutOfRange {
            key,
            value,
            first,
            last,
        })
    }

    /// `SubnetMin` or `SubnetMax`; whose family it is, is for the plan to judge.
    fn address(&mut self, key: &'static str, network: &str) -> Result<Option<IpAddr>, ConfigError> {
        let Some(text) = self.text(key, "an address, as a string")? else {
            return Ok(None);
        };
        let example = network.split('/').next().unwrap_or(network).to_owned();
        let address: IpAddr = text.parse().map_err(|_| ConfigError::NotAddress {
            key,
            value: excerpt(&text),
            example,
        })?;
        Ok(Some(address).filter(|address| !address.is_unspecified()))
    }

    fn wrong_type(&self, key: &str, value: &Value, wanted: &'static str) -> ConfigError {
        let (key, found) = (format!("{}{key}", self.path), type_of(value));
        ConfigError::WrongType {
            key,
            value: excerpt(&value.to_string()),
            found,
            wanted,
        }
    }

    /// Says which keys nobody took.
    fn warn_of_rest(self, warnings: &mut Vec<String>) {
        let path = self.path;
        let rest = self.members.into_rest().into_iter();
        warnings.extend(rest.map(|key| {
            format!(
                "{:?} is not a key that is known here; it is ignored",
                format!("{path}{key}")
            )
        }));
    }
}

/// Why there is no configuration to work with.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Nobody has written one, or the prefix is another one.
    #[error(
        "no network configuration at {key} in {registry}; {}",
        write_it(key, registry, similar)
    )]
    Missing {
        /// The full key that was looked for.
        key: String,
        /// Where, as [`Registry::describe`] says it.
        registry: String,
        /// Full keys of what looks like the configuration of other networks.
        similar: Vec<String>,
    },
    /// There is one, and it is wrong.
    #[error("the network configuration at {key} cannot be used")]
    Invalid {
        /// Its full key.
        key: String,
        /// What is wrong with it.
        source: ConfigError,
    },
    /// The registry did not answer.
    #[error("cannot read the network configuration")]
    Registry(#[from] registry::Error),
}

impl LoadError {
    /// What to do about it, where that is the same for everybody.
    pub fn remedy(&self) -> Option<String> {
        match self {
            LoadError::Missing { key, registry, similar } => Some(write_it(key, registry, similar)),
            LoadError::Invalid { .. } => Some(
                "show it with `flanneld network get`, and write a right one with `flanneld network set`; then restart flanneld \
                 on all hosts"
                    .to_owned(),
            ),
            LoadError::Registry(_) => None,
        }
    }
}

/// What to do about a configuration that is missing.
fn write_it(key: &str, registry: &str, similar: &[String]) -> String {
    let mut text = String::new();
    let prefixes: Vec<&str> = similar.iter().filter_map(|key| key.strip_suffix("/config")).collect();
    if !prefixes.is_empty() {
        let list = prefixes.join(" or --etcd-prefix ");
        text += &format!(
            "there is {}: if that is the one meant, give --etcd-prefix {list}; else ",
            similar.join(", ")
        );
    }
    text += "write one with `flanneld network set --network 10.5.0.0/16` and the same registry flags";
    if registry.starts_with("etcd") {
        text += &format!(", or `etcdctl put {key} '{{\"Network\":\"10.5.0.0/16\"}}'`");
    }
    text
}

/// Reads the configuration of the registry's network.
///
/// # Errors
/// [`LoadError::Missing`] and [`LoadError::Invalid`] last until somebody writes a configuration.
pub async fn load(registry: &dyn Registry) -> Result<Parsed, LoadError> {
    Ok(load_with_text(registry).await?.0)
}

/// As [`load`], with the text of the configuration.
///
/// # Errors
/// See [`LoadError`].
pub async fn load_with_text(registry: &dyn Registry) -> Result<(Parsed, String), LoadError> {
    let stored = load_stored(registry).await?;
    let key = registry.full_key(CONFIG_KEY);
    match Network::parse(&stored) {
        Ok(parsed) => Ok((parsed, stored)),
        Err(source) => Err(LoadError::Invalid { key, source }),
    }
}

/// The text of the configuration, right or wrong.
///
/// # Errors
/// [`LoadError::Missing`] or [`LoadError::Registry`].
pub async fn load_stored(registry: &dyn Registry) -> Result<String, LoadError> {
    if let Some(record) = registry.get(CONFIG_KEY).await? {
        return Ok(String::from_utf8_lossy(&record.value).into_owned());
    }
    let key = registry.full_key(CONFIG_KEY);
    let mut similar = registry.similar_configs().await;
    similar.retain(|other| *other != key);
    Err(LoadError::Missing {
        key,
        registry: registry.describe(),
        similar,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::registry::memory::MemoryRegistry;

    fn network(json: &str) -> Network {
        let parsed = Network::parse(json).unwrap();
        assert_eq!(parsed.warnings, [""; 0], "{json}");
        parsed.network
    }

    fn error(json: &str) -> String {
        Network::parse(json).unwrap_err().to_string()
    }

    #[test]
    fn the_shortest_configuration_has_the_originals_defaults() {
        let network = network(r#"{"Network":"10.5.0.0/16"}"#);
        let plan = network.ipv4().unwrap();
        assert_eq!(plan.network(), "10.5.0.0/16".parse().unwrap());
        assert_eq!(
            (plan.min(), plan.max()),
            ("10.5.1.0/24".parse().unwrap(), "10.5.255.0/24".parse().unwrap())
        );
        assert_eq!(network.ipv6(), None);
        assert!(!network.enable_nftables());
        assert_eq!(network.backend(), &Backend::default());
    }

    #[test]
    fn keys_are_read_without_regard_to_case() {
        let network = network(
            r#"{"network":"10.5.0.0/16","SUBNETLEN":20,"subnetMin":"10.5.16.0","SubnetMAX":"10.5.32.0",
                "enableNFTables":true,"backend":{"type":"host-gw"}}"#,
        );
        let plan = network.ipv4().unwrap();
        assert_eq!(
            (plan.min(), plan.max()),
            ("10.5.16.0/20".parse().unwrap(), "10.5.32.0/20".parse().unwrap())
        );
        assert!(network.enable_nftables());
        assert_eq!(network.backend(), &Backend::HostGw);
    }

    #[test]
    fn both_families_or_ipv6_alone_may_be_enabled() {
        let both = network(r#"{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:12::/48"}"#);
        assert!(both.ipv4().is_some());
        assert_eq!(both.ipv6().unwrap().min(), "fd00:12:0:1::/64".parse().unwrap());
        let alone =
            network(r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:12::/48","IPv6SubnetLen":56}"#);
        assert!(alone.ipv4().is_none());
        assert_eq!(alone.ipv6().unwrap().min(), "fd00:12:0:100::/56".parse().unwrap());
    }

    #[test]
    fn zero_stands_for_the_default() {
        let zeros = r#"{"Network":"10.5.0.0/16","SubnetLen":0,"SubnetMin":"0.0.0.0","SubnetMax":"0.0.0.0"}"#;
        assert_eq!(network(zeros), network(r#"{"Network":"10.5.0.0/16"}"#));
    }

    #[test]
    fn what_is_odd_but_harmless_is_a_warning() {
        let parsed = Network::parse(
            r#"{"Network":"10.5.3.1/16","Colour":"red","IPv6Network":"oops","Backend":{"Type":"host-gw","Port":1}}"#,
        )
        .unwrap();
        assert_eq!(parsed.network.ipv4().unwrap().network(), "10.5.0.0/16".parse().unwrap());
        assert_eq!(
            parsed.warnings,
            [
                "Network is 10.5.3.1/16, taken as 10.5.0.0/16: its last bits belong to a host",
                "IPv6Network is ignored, because EnableIPv6 is not true",
                "\"Backend.Port\" is not a key that is known here; it is ignored",
                "\"Colour\" is not a key that is known here; it is ignored",
            ]
        );
    }

    #[test]
    fn each_wrong_value_is_named_with_what_would_be_right() {
        for (json, parts) in [
            (
                "{Network:10.5.0.0/16}",
                &["not JSON", "line 1 column 2", "single quotes", "{Network:10.5.0.0/16}"][..],
            ),
            ("", &["not JSON", "line 1 column 0"]),
            ("[]", &["a list", "an object"]),
            ("{}", &["Network is missing", "10.5.0.0/16"]),
            (
                r#"{"Network":"10.5.0.0/16","network":"10.6.0.0/16"}"#,
                &["\"Network\"", "\"network\"", "same key"],
            ),
            (r#"{"Network":7}"#, &["Network is 7, a number", "a string"]),
            (r#"{"Network":"10.5.0.0"}"#, &["Network is \"10.5.0.0\"", "10.5.0.0/16"]),
            (r#"{"Network":"10.5.0.0/33"}"#, &["Network is \"10.5.0.0/33\""]),
            (
                r#"{"Network":"fd00::/48"}"#,
                &["Network is \"fd00::/48\"", "10.5.0.0/16"],
            ),
            (r#"{"Network":"0.0.0.0/0"}"#, &["Network is 0.0.0.0/0"]),
            (r#"{"Network":"10.5.0.0/29"}"#, &["Network is 10.5.0.0/29", "/28"]),
            (
                r#"{"Network":"10.5.0.0/16","SubnetLen":31}"#,
                &["SubnetLen is 31", "18 to 30"],
            ),
            (
                r#"{"Network":"10.5.0.0/16","SubnetLen":17}"#,
                &["SubnetLen is 17", "18 to 30", "four subnets"],
            ),
            (
                r#"{"Network":"10.5.0.0/16","SubnetLen":"24"}"#,
                &["SubnetLen is \"24\", a string", "without quotes"],
            ),
            (
                r#"{"Network":"10.5.0.0/16","SubnetLen":-1}"#,
                &["SubnetLen is -1", "whole number"],
            ),
            (
                r#"{"Network":"10.5.0.0/16","SubnetMin":"10.5.1.0/24"}"#,
                &["SubnetMin is \"10.5.1.0/24\"", "without a length"],
            ),
            (
                r#"{"Network":"10.5.0.0/16","SubnetMin":"10.6.0.0"}"#,
                &["SubnetMin is 10.6.0.0", "10.5.0.0/16"],
            ),
            (
                r#"{"Network":"10.5.0.0/16","SubnetMin":"fd00::1"}"#,
                &["SubnetMin is fd00::1", "10.5.0.0/16"],
            ),
            (
                r#"{"Network":"10.5.0.0/16","SubnetMin":"10.5.1.7"}"#,
                &["SubnetMin is 10.5.1.7", "10.5.1.0/24"],
            ),
            (
                r#"{"Network":"10.5.0.0/16","SubnetMax":"10.6.0.0"}"#,
                &["SubnetMax is 10.6.0.0", "10.5.0.0/16"],
            ),
            (
                r#"{"Network":"10.5.0.0/16","SubnetMin":"10.5.9.0","SubnetMax":"10.5.8.0"}"#,
                &["SubnetMin is 10.5.9.0/24", "SubnetMax, 10.5.8.0/24"],
            ),
            (
                r#"{"Network":"10.5.0.0/16","Backend":"udp"}"#,
                &["Backend is \"udp\", a string", "{\"Type\":\"udp\"}"],
            ),
            (
                r#"{"Network":"10.5.0.0/16","EnableNFTables":"true"}"#,
                &["EnableNFTables is \"true\"", "without quotes"],
            ),
            (r#"{"EnableIPv4":false}"#, &["EnableIPv4", "EnableIPv6"]),
            (
                r#"{"Network":"10.5.0.0/16","EnableIPv6":true}"#,
                &["IPv6Network is missing", "fd00:12:13::/48"],
            ),
            (
                r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00::/125"}"#,
                &["IPv6Network is fd00::/125", "/124"],
            ),
            (
                r#"{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48","IPv6SubnetLen":127}"#,
                &["IPv6SubnetLen is 127", "50 to 126"],
            ),
        ] {
            let message = error(json);
            for part in parts {
                assert!(message.contains(part), "{json}: {message:?} lacks {part:?}");
            }
            assert!(!message.contains('\n'), "{json}: {message:?}");
        }
    }

    #[test]
    fn a_missing_configuration_is_reported_with_the_key_the_similar_ones_and_the_remedy() {
        let missing = |registry: &str, similar: &[&str]| {
            let similar = similar.iter().map(|key| key.to_string()).collect();
            LoadError::Missing {
                key: "/coreos.com/network/config".into(),
                registry: registry.into(),
                similar,
            }
            .to_string()
        };
        let message = missing("etcd at http://192.0.2.1:2379", &["/atomic.io/network/config"]);
        for part in [
            "/coreos.com/network/config in etcd at http://192.0.2.1:2379",
            "there is /atomic.io/network/config",
            "--etcd-prefix /atomic.io/network;",
            "flanneld network set --network 10.5.0.0/16",
            "etcdctl put /coreos.com/network/config '{\"Network\":\"10.5.0.0/16\"}'",
        ] {
            assert!(message.contains(part), "{message:?} lacks {part:?}");
        }
        let message = missing("directory /srv/registry", &[]);
        assert!(
            !message.contains("there is") && !message.contains("etcdctl"),
            "{message:?}"
        );
    }

    #[tokio::test]
    async fn a_configuration_is_loaded_or_the_reason_names_its_key() {
        let registry = MemoryRegistry::new();
        registry
            .network("/atomic.io/network")
            .put("config", b"{}")
            .await
            .unwrap();
        match load(&registry).await {
            Err(LoadError::Missing { key, similar, .. }) => {
                assert_eq!(key, "/coreos.com/network/config");
                assert_eq!(similar, ["/atomic.io/network/config"]);
            }
            other => panic!("{other:?}"),
        }
        registry.put("config", b"{oops}").await.unwrap();
        let error = load(&registry).await.unwrap_err();
        assert!(error.to_string().contains("/coreos.com/network/config"), "{error}");
        assert!(matches!(
            error,
            LoadError::Invalid {
                source: ConfigError::NotJson { .. },
                ..
            }
        ));
        registry.put("config", br#"{"Network":"10.5.0.0/16"}"#).await.unwrap();
        assert_eq!(
            load(&registry).await.unwrap(),
            Network::parse(r#"{"Network":"10.5.0.0/16"}"#).unwrap()
        );
        registry.set_available(false);
        assert!(matches!(load(&registry).await, Err(LoadError::Registry(_))));
    }

    fn any_config() -> impl Strategy<Value = String> {
        let backend = prop_oneof![
            (any::<u16>(), 0u8..66, 0..4usize).prop_map(|(port, source_ports, check)| {
                let check = ["strict", "PEER", "Off", "none"][check];
                format!(r#"{{"Type":"udp","Port":{port},"SourcePorts":{source_ports},"SourceCheck":"{check}"}}"#)
            }),
            (0u32..1 << 25, any::<bool>(), any::<u16>()).prop_map(|(vni, flag, mtu)| format!(
                r#"{{"Type":"vxlan","VNI":{vni},"DirectRouting":{flag},"MTU":{mtu}}}"#
            )),
            Just(r#"{"Type":"host-gw"}"#.to_owned()),
        ];
        let v4 = (any::<[u8; 4]>(), 0u8..34, 0u8..34).prop_map(|([a, b, c, d], len, subnet_len)| {
            format!(r#""Network":"{a}.{b}.{c}.{d}/{len}","SubnetLen":{subnet_len}"#)
        });
        let v6 = (any::<u128>(), 0u8..130, 0u8..130, any::<bool>()).prop_map(|(address, len, subnet_len, on)| {
            let address = std::net::Ipv6Addr::from_bits(address);
            format!(r#""EnableIPv6":{on},"IPv6Network":"{address}/{len}","IPv6SubnetLen":{subnet_len}"#)
        });
        (v4, v6, backend).prop_map(|(v4, v6, backend)| format!(r#"{{{v4},{v6},"Backend":{backend}}}"#))
    }

    proptest! {
        /// Writing a network out and reading it again gives the same network, with nothing to warn of.
        #[test]
        fn what_is_spelt_out_reads_back_as_the_same_network(config in any_config()) {
            if let Ok(parsed) = Network::parse(&config) {
                let spelt_out = Value::Object(parsed.network.to_json()).to_string();
                let again = Network::parse(&spelt_out).unwrap();
                prop_assert_eq!(again, Parsed { network: parsed.network, warnings: vec![] });
            }
        }
    }
}
