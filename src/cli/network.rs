//! `flanneld network`: the configuration that all hosts read.

use std::{
    fs,
    io::{self, Read, Write},
    net::IpAddr,
    path::{Path, PathBuf},
};

use clap::{ArgGroup, Args, Subcommand, value_parser};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::table::table;
use crate::{
    lease::record::{SUBNETS, Subnets},
    network::{self, AddressPlan, Block, CONFIG_KEY, ConfigError, LoadError, Network, Parsed, SourcePorts},
    registry::{self, Registry},
};

/// `flanneld network`.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub struct NetworkArgs {
    /// What to do with it.
    #[command(subcommand)]
    pub action: NetworkAction,
}

/// What to do with the configuration.
#[derive(Debug, Clone, PartialEq, Eq, Subcommand)]
pub enum NetworkAction {
    /// Check a configuration and write it
    Set(SetArgs),
    /// Show the configuration, and what follows from it
    Get {
        /// For programs
        #[arg(long)]
        json: bool,
    },
}

/// `flanneld network set`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Args)]
#[group(skip)]
#[command(group = ArgGroup::new("source").args(["json", "file", "network"]).required(true))]
pub struct SetArgs {
    /// The configuration in JSON; `-`: read it from the standard input
    pub json: Option<String>,
    /// Read the configuration from this file
    #[arg(long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// The overlay's whole address block, instead of JSON
    #[arg(long, value_name = "CIDR")]
    pub network: Option<String>,
    /// The length of one host's subnet
    #[arg(long, value_name = "BITS", conflicts_with_all = ["json", "file"])]
    pub subnet_len: Option<u8>,
    /// The first subnet to hand out
    #[arg(long, value_name = "IP", conflicts_with_all = ["json", "file"])]
    pub subnet_min: Option<IpAddr>,
    /// The last subnet to hand out
    #[arg(long, value_name = "IP", conflicts_with_all = ["json", "file"])]
    pub subnet_max: Option<IpAddr>,
    /// How packets travel: udp, vxlan or host-gw
    #[arg(long, value_name = "TYPE", conflicts_with_all = ["json", "file"])]
    pub backend: Option<String>,
    /// The backend's UDP port
    #[arg(long, value_name = "PORT", conflicts_with_all = ["json", "file"])]
    pub port: Option<u16>,
    /// Hash flows over this many UDP source ports, 1 to 64 (udp)
    #[arg(
        long,
        value_name = "N",
        value_parser = value_parser!(u8).range(1..=i64::from(SourcePorts::MAX.get())),
        conflicts_with_all = ["json", "file"]
    )]
    pub source_ports: Option<u8>,
    /// Which datagrams to let in: strict, peer or off (udp)
    #[arg(long, value_name = "HOW", conflicts_with_all = ["json", "file"])]
    pub source_check: Option<String>,
    /// Write it even if hosts have subnets that do not fit it
    #[arg(long)]
    pub force: bool,
}

/// Why the configuration could not be written or shown.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The new configuration could not be read.
    #[error("cannot read the configuration from {0}: {1}")]
    Input(String, io::Error),
    /// The new configuration is wrong.
    #[error("this configuration cannot be used, so nothing is written")]
    Invalid(#[from] ConfigError),
    /// Hosts would lose their subnets.
    #[error(
        "nothing is written, since {count} of the leases would not fit: {examples}; their hosts would get other subnets \
         when their daemons are started again, and their containers other addresses; if that is what you want, repeat it \
         with --force"
    )]
    LeasesDoNotFit {
        /// How many.
        count: usize,
        /// Which ones, or the first of them.
        examples: String,
    },
    /// There is no configuration, or no usable one.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The registry failed.
    #[error(transparent)]
    Registry(#[from] registry::Error),
    /// The answer could not be shown.
    #[error("cannot write the answer: {0}")]
    Output(io::Error),
}

/// Carries out the subcommand; what there is to say goes to `out`.
///
/// # Errors
/// See [`NetworkError`]. Whatever fails, the configuration is the old one or the new one.
pub async fn run(args: &NetworkArgs, registry: &dyn Registry, out: &mut impl Write) -> Result<(), NetworkError> {
    let answer = match &args.action {
        NetworkAction::Set(args) => set(&args.configuration(&mut io::stdin())?, args.force, registry).await?,
        NetworkAction::Get { json: true } => get_json(registry).await?,
        NetworkAction::Get { json: false } => get(registry).await?,
    };
    out.write_all(answer.as_bytes())
        .and_then(|()| out.flush())
        .map_err(NetworkError::Output)
}

/// A configuration of the few keys that have flags, in the order in which people write them.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Simple<'a> {
    network: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    subnet_len: Option<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    subnet_min: Option<IpAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    subnet_max: Option<IpAddr>,
    backend: SimpleBackend<'a>,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct SimpleBackend<'a> {
    r#type: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    port: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    source_ports: Option<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    source_check: Option<&'a str>,
}

impl SetArgs {
    /// The configuration's text, from wherever it is to come.
    fn configuration(&self, stdin: &mut impl Read) -> Result<String, NetworkError> {
        let read = |file: &Path| {
            fs::read_to_string(file).map_err(|error| NetworkError::Input(file.display().to_string(), error))
        };
        match (&self.network, &self.file, &self.json) {
            (Some(network), _, _) => {
                let (subnet_len, subnet_min, subnet_max) = (self.subnet_len, self.subnet_min, self.subnet_max);
                let backend = SimpleBackend {
                    r#type: self.backend.as_deref().unwrap_or("udp"),
                    port: self.port,
                    source_ports: self.source_ports,
                    source_check: self.source_check.as_deref(),
                };
                let simple = Simple {
                    network,
                    subnet_len,
                    subnet_min,
                    subnet_max,
                    backend,
                };
                // Strings and numbers always have a JSON form.
                Ok(serde_json::to_string(&simple).expect("plain fields"))
            }
            (None, Some(file), _) => read(file),
            (None, None, Some(json)) if json == "-" => {
                io::read_to_string(stdin).map_err(|error| NetworkError::Input("the standard input".to_owned(), error))
            }
            (None, None, json) => Ok(json.clone().unwrap_or_default()),
        }
    }
}

async fn set(configuration: &str, force: bool, registry: &dyn Registry) -> Result<String, NetworkError> {
    let configuration = configuration.trim();
    let Parsed { network, warnings } = Network::parse(configuration)?;
    let leases: Vec<Subnets> = registry
        .list(SUBNETS)
        .await?
        .iter()
        // A broken key is nobody's subnet.
        .filter_map(|record| record.key.strip_prefix(SUBNETS)?.parse().ok())
        .collect();
    let misfits: Vec<&Subnets> = leases.iter().filter(|subnets| !subnets.fit(&network)).collect();
    if !misfits.is_empty() && !force {
        return Err(NetworkError::LeasesDoNotFit {
            count: misfits.len(),
            examples: examples(&misfits),
        });
    }
    // As the user wrote it: other versions may know more keys than this one.
    registry.put(CONFIG_KEY, configuration.as_bytes()).await?;

    let mut lines = vec![
        format!("wrote {} in {}:", registry.full_key(CONFIG_KEY), registry.describe()),
        format!("  {configuration}"),
    ];
    lines.extend(network.ipv4().map(summary));
    lines.extend(network.ipv6().map(summary));
    lines.push(format!("backend {}", network.backend()));
    lines.extend(warnings.iter().map(|warning| format!("warning: {warning}")));
    if !leases.is_empty() {
        lines.push(format!(
            "note: there are {} leases; daemons that run keep the old configuration until they are started again",
            leases.len()
        ));
    }
    Ok(lines.join("\n") + "\n")
}

/// The first few of them by name.
fn examples(misfits: &[&Subnets]) -> String {
    // As many as one reads in a line.
    const SHOWN: usize = 5;
    let mut shown: Vec<String> = misfits.iter().take(SHOWN).map(|subnets| subnets.to_cidrs()).collect();
    if misfits.len() > SHOWN {
        shown.push(format!("and {} more", misfits.len() - SHOWN));
    }
    shown.join(", ")
}

fn summary<N: Block>(plan: &AddressPlan<N>) -> String {
    format!(
        "{} subnets for hosts, from {} to {}",
        plan.count(),
        plan.min(),
        plan.max()
    )
}

async fn get(registry: &dyn Registry) -> Result<String, NetworkError> {
    let (stored, Parsed { network, warnings }) = load(registry).await?;
    let stored = flat(&stored);
    let stored_value = |key: &str| {
        let found = stored.iter().find(|(stored, _)| stored.eq_ignore_ascii_case(key));
        found.map_or("-".to_owned(), |(_, value)| value.clone())
    };
    let rows = flat(&network.to_json()).into_iter().map(|(key, effective)| {
        let stored = stored_value(&key);
        [key, stored, effective]
    });
    let mut answer = format!("{} in {}\n\n", registry.full_key(CONFIG_KEY), registry.describe());
    answer += &table(["KEY", "STORED", "EFFECTIVE"], rows);
    for warning in warnings {
        answer += &format!("\nwarning: {warning}");
    }
    Ok(answer.trim_end().to_owned() + "\n")
}

async fn get_json(registry: &dyn Registry) -> Result<String, NetworkError> {
    let (stored, Parsed { network, warnings }) = load(registry).await?;
    let answer = json!({
        "key": registry.full_key(CONFIG_KEY),
        "registry": registry.describe(),
        "stored": stored,
        "effective": network.to_json(),
        "warnings": warnings,
    });
    Ok(format!("{answer:#}\n"))
}

/// The configuration as it is stored, and what it means.
async fn load(registry: &dyn Registry) -> Result<(Map<String, Value>, Parsed), LoadError> {
    let text = network::load_stored(registry).await?;
    let invalid = |source| LoadError::Invalid {
        key: registry.full_key(CONFIG_KEY),
        source,
    };
    let parsed = Network::parse(&text).map_err(invalid)?;
    // What has been parsed is an object.
    let stored = serde_json::from_str(&text).unwrap_or_default();
    Ok((stored, parsed))
}

/// Keys and values for people, those of `Backend` last and with its name before theirs.
fn flat(object: &Map<String, Value>) -> Vec<(String, String)> {
    let text = |value: &Value| match value {
        Value::String(text) => text.clone(),
        Value::Null => "-".to_owned(),
        other => other.to_string(),
    };
    let (backend, others): (Vec<_>, Vec<_>) = object.iter().partition(|(key, _)| key.eq_ignore_ascii_case("Backend"));
    let others = others.into_iter().map(|(key, value)| (key.clone(), text(value)));
    let backend = backend.into_iter().filter_map(|(_, value)| value.as_object()).flatten();
    others
        .chain(backend.map(|(key, value)| (format!("Backend.{key}"), text(value))))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::memory::MemoryRegistry;

    const PLAIN: &str = r#"{"Network":"10.5.0.0/16"}"#;

    fn set_args(json: &str) -> SetArgs {
        SetArgs {
            json: Some(json.into()),
            ..SetArgs::default()
        }
    }

    async fn run(action: NetworkAction, registry: &MemoryRegistry) -> Result<String, NetworkError> {
        let mut out = Vec::new();
        super::run(&NetworkArgs { action }, registry, &mut out).await?;
        Ok(String::from_utf8(out).unwrap())
    }

    async fn stored(registry: &MemoryRegistry) -> Option<String> {
        let record = registry.get("config").await.unwrap()?;
        Some(String::from_utf8(record.value).unwrap())
    }

    #[tokio::test]
    async fn a_configuration_is_written_as_it_is_given() {
        let registry = MemoryRegistry::new();
        let json = r#"{ "Network": "10.5.0.0/16", "Colour": "red" }"#;
        let answer = run(NetworkAction::Set(set_args(&format!("{json}\n"))), &registry)
            .await
            .unwrap();
        assert_eq!(stored(&registry).await.as_deref(), Some(json));
        for part in [
            "/coreos.com/network/config in memory",
            json,
            "255 subnets",
            "10.5.1.0/24",
            "backend udp",
            "\"Colour\"",
        ] {
            assert!(answer.contains(part), "{answer:?} lacks {part:?}");
        }
    }

    #[tokio::test]
    async fn a_wrong_configuration_is_not_written() {
        let registry = MemoryRegistry::new();
        let error = run(NetworkAction::Set(set_args(r#"{"Network":"10.5.0.0"}"#)), &registry)
            .await
            .unwrap_err();
        assert!(
            matches!(error, NetworkError::Invalid(ConfigError::NotCidr { .. })),
            "{error:?}"
        );
        assert_eq!(stored(&registry).await, None);
    }

    #[tokio::test]
    async fn leases_that_would_not_fit_are_named_and_need_force() {
        let registry = MemoryRegistry::new();
        for key in ["subnets/10.5.34.0-24", "subnets/10.9.1.0-24", "subnets/broken"] {
            registry.put(key, br#"{"PublicIP":"192.0.2.1"}"#).await.unwrap();
        }
        let error = run(NetworkAction::Set(set_args(PLAIN)), &registry)
            .await
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("1 of the leases would not fit: 10.9.1.0/24;") && error.contains("--force"),
            "{error}"
        );
        assert_eq!(stored(&registry).await, None);

        let force = SetArgs {
            force: true,
            ..set_args(PLAIN)
        };
        let answer = run(NetworkAction::Set(force), &registry).await.unwrap();
        assert!(answer.contains("2 leases"), "{answer}");
        assert_eq!(stored(&registry).await.as_deref(), Some(PLAIN));
    }

    #[test]
    fn many_misfits_are_counted() {
        let subnets: Vec<Subnets> = (1..=7).map(|i| format!("10.9.{i}.0-24").parse().unwrap()).collect();
        let shown = examples(&subnets.iter().collect::<Vec<_>>());
        assert_eq!(
            shown,
            "10.9.1.0/24, 10.9.2.0/24, 10.9.3.0/24, 10.9.4.0/24, 10.9.5.0/24, and 2 more"
        );
    }

    #[test]
    fn the_configuration_comes_from_flags_a_file_an_argument_or_the_standard_input() {
        let text = |args: SetArgs| args.configuration(&mut PLAIN.as_bytes());
        assert_eq!(text(set_args("{}")).unwrap(), "{}");
        assert_eq!(text(set_args("-")).unwrap(), PLAIN);
        let flags = SetArgs {
            network: Some("10.5.0.0/16".into()),
            ..SetArgs::default()
        };
        assert_eq!(
            text(flags.clone()).unwrap(),
            r#"{"Network":"10.5.0.0/16","Backend":{"Type":"udp"}}"#
        );
        let flags = SetArgs {
            subnet_len: Some(20),
            subnet_min: "10.5.16.0".parse().ok(),
            subnet_max: "10.5.32.0".parse().ok(),
            backend: Some("vxlan".into()),
            port: Some(4789),
            ..flags
        };
        assert_eq!(
            text(flags.clone()).unwrap(),
            r#"{"Network":"10.5.0.0/16","SubnetLen":20,"SubnetMin":"10.5.16.0","SubnetMax":"10.5.32.0","Backend":{"Type":"vxlan","Port":4789}}"#
        );
        let flags = SetArgs {
            network: flags.network,
            source_ports: Some(8),
            source_check: Some("peer".into()),
            ..SetArgs::default()
        };
        assert_eq!(
            text(flags).unwrap(),
            r#"{"Network":"10.5.0.0/16","Backend":{"Type":"udp","SourcePorts":8,"SourceCheck":"peer"}}"#
        );
        let missing = SetArgs {
            file: Some("/nowhere/config.json".into()),
            ..SetArgs::default()
        };
        assert!(text(missing).unwrap_err().to_string().contains("/nowhere/config.json"));
    }

    #[tokio::test]
    async fn stored_and_effective_values_are_shown() {
        let registry = MemoryRegistry::new();
        let json = r#"{"network":"10.5.0.0/16","Backend":{"type":"VxLAN","VNI":7},"Colour":1}"#;
        registry.put("config", json.as_bytes()).await.unwrap();
        let answer = run(NetworkAction::Get { json: false }, &registry).await.unwrap();
        let rows: Vec<Vec<&str>> = answer.lines().map(|line| line.split_whitespace().collect()).collect();
        for row in [
            ["KEY", "STORED", "EFFECTIVE"],
            ["Network", "10.5.0.0/16", "10.5.0.0/16"],
            ["SubnetMin", "-", "10.5.1.0"],
            ["Backend.Type", "VxLAN", "vxlan"],
            ["Backend.VNI", "7", "7"],
            ["Backend.Port", "-", "8472"],
        ] {
            assert!(rows.contains(&row.to_vec()), "{answer} lacks {row:?}");
        }
        assert!(answer.contains("warning: \"Colour\""), "{answer}");

        let answer = run(NetworkAction::Get { json: true }, &registry).await.unwrap();
        let answer: Value = serde_json::from_str(&answer).unwrap();
        assert_eq!(answer["key"], "/coreos.com/network/config");
        assert_eq!(answer["stored"], serde_json::from_str::<Value>(json).unwrap());
        assert_eq!(answer["effective"]["Backend"]["Port"], 8472);
        assert_eq!(answer["warnings"].as_array().unwrap().len(), 1);
    }

    #[tokio::test]
    async fn without_a_configuration_the_key_is_named() {
        let error = run(NetworkAction::Get { json: false }, &MemoryRegistry::new())
            .await
            .unwrap_err();
        assert!(matches!(&error, NetworkError::Load(LoadError::Missing { .. })));
        assert!(error.to_string().contains("/coreos.com/network/config"));
    }
}
