//! `flanneld leases`: which host has which subnet.

use std::{
    io::{self, Write},
    net::{Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use clap::{Args, Subcommand};
use futures_util::{StreamExt, TryStreamExt, stream};
use serde::Serialize;

use super::{run_args::public_ip, table::table};
use crate::{
    lease::record::{Lease, LeaseError, LeaseValue, SUBNETS, Subnets, SubnetsError},
    network::{self, LoadError, Network},
    registry::{self, Record, Registry},
};

/// `flanneld leases`.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub struct LeasesArgs {
    /// What to do with them.
    #[command(subcommand)]
    pub action: LeasesAction,
}

/// What to do with the leases.
#[derive(Debug, Clone, PartialEq, Eq, Subcommand)]
pub enum LeasesAction {
    /// Show each host's subnet, how the host is reached, and when the lease expires
    List {
        /// For programs
        #[arg(long)]
        json: bool,
    },
    /// Keep a subnet for a host for ever
    Reserve(ReserveArgs),
    /// Take a subnet, leased or reserved, from its host
    Release {
        /// The subnet, as `flanneld leases list` shows it
        subnet: String,
    },
}

/// `flanneld leases reserve`.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub struct ReserveArgs {
    /// The subnet, as in 10.5.34.0/24; in a dual-stack network 10.5.34.0/24,fd00:12:13::/64
    #[arg(value_name = "SUBNET", value_parser = subnets)]
    pub subnets: Subnets,
    /// The address at which the other hosts reach this one
    #[arg(long, value_name = "IP", value_parser = public_ip)]
    pub public_ip: Ipv4Addr,
    /// The same for IPv6, in a dual-stack network
    #[arg(long, value_name = "IP")]
    pub public_ipv6: Option<Ipv6Addr>,
}

/// A subnet as people write it, with messages in the same form.
fn subnets(text: &str) -> Result<Subnets, String> {
    Subnets::from_cidrs(text).map_err(|error| match error {
        SubnetsError::Malformed(_) => "write it as in 10.5.34.0/24".to_owned(),
        SubnetsError::NotCanonical { canonical, .. } => {
            format!("the subnet is {}", canonical.replace('-', "/").replace('&', ","))
        }
    })
}

/// Why the leases could not be shown or changed.
#[derive(Debug, thiserror::Error)]
pub enum LeasesError {
    /// No host of this network may have the subnet.
    #[error("cannot reserve {subnets}: it does not fit the network, whose subnets are {fitting}")]
    DoesNotFit {
        /// What was to be reserved.
        subnets: String,
        /// What could be.
        fitting: String,
    },
    /// Somebody else has it, or a part of it.
    #[error(
        "cannot reserve {subnets} for {public_ip}: {other} is in its way; `flanneld leases release {key}` takes that from \
         its host, once its daemon is stopped"
    )]
    Taken {
        /// What was to be reserved.
        subnets: String,
        /// For whom.
        public_ip: Ipv4Addr,
        /// What is there, and whose it is.
        other: String,
        /// As `release` takes it.
        key: String,
    },
    /// There is no such lease.
    #[error("no lease of {subnet} in {registry}; `flanneld leases list` shows what there is")]
    NotFound {
        /// What was looked for.
        subnet: String,
        /// Where, as [`Registry::describe`] says it.
        registry: String,
    },
    /// Somebody changed it between our look and our change.
    #[error("the lease of {0} has changed just now, and nothing was done; look at it and try again")]
    Changed(String),
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
/// See [`LeasesError`]. Whatever fails, each lease is as it was or as it was to be.
pub async fn run(args: &LeasesArgs, registry: &dyn Registry, out: &mut impl Write) -> Result<(), LeasesError> {
    let answer = match &args.action {
        LeasesAction::List { json } => list(*json, registry).await?,
        LeasesAction::Reserve(args) => reserve(args, registry).await?,
        LeasesAction::Release { subnet } => release(subnet, registry).await?,
    };
    out.write_all(answer.as_bytes())
        .and_then(|()| out.flush())
        .map_err(LeasesError::Output)
}

/// A lease, or what should be one, as `--json` shows it. Members that do not apply are `null`, never left out.
#[derive(Debug, Serialize)]
struct Entry {
    key: String,
    subnet: Option<String>,
    ipv6_subnet: Option<String>,
    public_ip: Option<Ipv4Addr>,
    public_ipv6: Option<Ipv6Addr>,
    backend: Option<String>,
    reservation: bool,
    expires_in_seconds: Option<u64>,
    /// Why the record is no lease.
    error: Option<String>,
}

/// A lease as it is shown; `None` when it has run out since it was listed.
async fn shown(lease: &Lease, record: &Record, registry: &dyn Registry) -> Result<Option<Entry>, registry::Error> {
    let Some(ttl) = lease.ttl else {
        return Ok(Some(Entry::of_lease(lease, record, None)));
    };
    let left = registry.time_left(ttl).await?;
    Ok(left.map(|left| Entry::of_lease(lease, record, Some(left))))
}

/// How many leases the registry is asked about at once: a far one answers thousands in seconds then, not minutes.
const QUESTIONS: usize = 64;

async fn list(json: bool, registry: &dyn Registry) -> Result<String, LeasesError> {
    let (mut leases, mut broken) = (Vec::new(), Vec::new());
    for record in registry.list(SUBNETS).await? {
        match Lease::from_record(&record) {
            Ok(lease) => leases.push((lease, record)),
            Err(error) => broken.push((error, record)),
        }
    }
    // Not by key, in which 10 stands before 9.
    leases.sort_by_key(|(lease, _)| lease.subnets);

    let questions = leases.iter().map(|(lease, record)| shown(lease, record, registry));
    let entries: Vec<Option<Entry>> = stream::iter(questions).buffered(QUESTIONS).try_collect().await?;
    let mut entries: Vec<Entry> = entries.into_iter().flatten().collect();
    entries.extend(broken.iter().map(|(error, record)| Entry::of_broken(error, record)));
    if json {
        // Strings and numbers always have a JSON form.
        return Ok(serde_json::to_string_pretty(&entries).expect("plain fields") + "\n");
    }
    if entries.is_empty() {
        return Ok(format!(
            "no leases at {} in {}\n",
            registry.full_key(SUBNETS),
            registry.describe()
        ));
    }
    let mut answer = table(
        ["SUBNET", "PUBLIC IP", "BACKEND", "EXPIRES"],
        entries.iter().filter_map(Entry::row),
    );
    for error in entries.iter().filter_map(|entry| entry.error.as_ref()) {
        answer += &format!("broken: {error}\n");
    }
    Ok(answer)
}

impl Entry {
    fn of_lease(lease: &Lease, record: &Record, left: Option<Duration>) -> Self {
        Entry {
            key: record.key.clone(),
            subnet: Some(lease.subnets.v4().to_string()),
            ipv6_subnet: lease.subnets.v6().map(|v6| v6.to_string()),
            public_ip: Some(lease.value.public_ip),
            public_ipv6: lease.value.public_ipv6,
            backend: Some(lease.value.backend_type.to_string()),
            reservation: lease.is_reservation(),
            expires_in_seconds: left.map(|left| left.as_secs()),
            error: None,
        }
    }

    fn of_broken(error: &LeaseError, record: &Record) -> Self {
        Entry {
            key: record.key.clone(),
            subnet: None,
            ipv6_subnet: None,
            public_ip: None,
            public_ipv6: None,
            backend: None,
            reservation: record.ttl.is_none(),
            expires_in_seconds: None,
            error: Some(error.to_string()),
        }
    }

    /// `None`: it is broken, and there is nothing to put into the columns.
    fn row(&self) -> Option<[String; 4]> {
        let both = |v4: String, v6: Option<String>| v6.map_or(v4.clone(), |v6| format!("{v4},{v6}"));
        let expires = self
            .expires_in_seconds
            .map_or("never (reservation)".to_owned(), |left| format!("in {}", span(left)));
        Some([
            both(self.subnet.clone()?, self.ipv6_subnet.clone()),
            both(self.public_ip?.to_string(), self.public_ipv6.map(|ip| ip.to_string())),
            self.backend.clone()?,
            expires,
        ])
    }
}

/// A span of time in its two largest units.
fn span(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m {}s", seconds / 60, seconds % 60),
        _ => format!("{}h {}m", seconds / 3600, seconds % 3600 / 60),
    }
}

async fn reserve(args: &ReserveArgs, registry: &dyn Registry) -> Result<String, LeasesError> {
    let ReserveArgs {
        subnets,
        public_ip,
        public_ipv6,
    } = *args;
    let shown = subnets.to_cidrs();
    let network = network::load(registry).await?.network;
    if !subnets.fit(&network) {
        return Err(LeasesError::DoesNotFit {
            subnets: shown,
            fitting: fitting(&network),
        });
    }

    let records = registry.list(SUBNETS).await?;
    let mut ours = None;
    let (mut leased, mut reserved) = (None, None);
    for record in &records {
        let lease = Lease::from_record(record).ok();
        let holder = lease.as_ref().map(|lease| lease.value.public_ip);
        // A record with a broken value still has its key: to the original it is taken.
        let Some(taken) = record
            .key
            .strip_prefix(SUBNETS)
            .and_then(|key| key.parse::<Subnets>().ok())
        else {
            continue;
        };
        if taken == subnets && holder == Some(public_ip) {
            ours = Some(record);
        } else if taken.overlap(&subnets) {
            let key = taken.to_cidrs();
            let other = match holder {
                Some(holder) => format!("{key} of {holder}"),
                None => format!("{key}, whose value is broken,"),
            };
            return Err(LeasesError::Taken {
                subnets: shown,
                public_ip,
                other,
                key,
            });
        } else if holder == Some(public_ip) {
            let elsewhere = if record.ttl.is_some() {
                &mut leased
            } else {
                &mut reserved
            };
            *elsewhere = Some(taken.to_cidrs());
        }
    }

    let mut answer = match ours {
        Some(Record { ttl: None, .. }) => format!("{shown} is reserved for {public_ip} already\n"),
        Some(record) => {
            // There is no call that takes a record's time to live away only if it is unchanged. But only the host itself
            // ever changes this record, when it starts, and then to the same or nearly the same value.
            registry.put(&record.key, &record.value).await?;
            format!("reserved {shown} for {public_ip}, which has it already; the lease does not expire any more\n")
        }
        None => {
            let value = LeaseValue {
                public_ipv6,
                ..LeaseValue::new(public_ip)
            };
            let made = registry.create(&subnets.key(), &value.to_bytes(), None).await?;
            made.ok_or_else(|| LeasesError::Changed(shown.clone()))?;
            format!("reserved {shown} for {public_ip}; its daemon takes it when it starts\n")
        }
    };
    if let Some(other) = leased {
        answer += &format!(
            "note: {public_ip} has a lease of {other}, too; its daemon exchanges that for a reservation when it is started \
             again\n"
        );
    }
    if let Some(other) = reserved {
        answer += &format!(
            "note: {other} is reserved for {public_ip}, too, and a daemon takes only one; give back the other: `flanneld \
             leases release SUBNET`\n"
        );
    }
    Ok(answer)
}

/// Which subnets a host may have, for people.
fn fitting(network: &Network) -> String {
    let v4 = network.ipv4().map(|plan| format!("{} to {}", plan.min(), plan.max()));
    let v6 = network.ipv6().map(|plan| format!("{} to {}", plan.min(), plan.max()));
    let families: Vec<String> = v4.into_iter().chain(v6).collect();
    families.join(" with ")
}

async fn release(subnet: &str, registry: &dyn Registry) -> Result<String, LeasesError> {
    let record = find(subnet, registry).await?;
    if !registry.delete(&record).await? {
        return Err(LeasesError::Changed(subnet.to_owned()));
    }
    let Ok(lease) = Lease::from_record(&record) else {
        return Ok(format!(
            "removed {}, which was no lease\n",
            registry.full_key(&record.key)
        ));
    };
    let (shown, host) = (lease.subnets.to_cidrs(), lease.value.public_ip);
    let was = if lease.is_reservation() {
        "reserved for"
    } else {
        "leased to"
    };
    Ok(format!(
        "released {shown}, which was {was} {host}\n\
         note: a daemon that runs there takes it again at once: to give it to another host, stop it first\n"
    ))
}

/// The record of a subnet, or of what somebody wrote in a subnet's place.
async fn find(subnet: &str, registry: &dyn Registry) -> Result<Record, LeasesError> {
    for name in [subnet.replace('/', "-").replace(',', "&"), subnet.to_owned()] {
        if let Some(record) = registry.get(&format!("{SUBNETS}{name}")).await? {
            return Ok(record);
        }
    }
    Err(LeasesError::NotFound {
        subnet: subnet.to_owned(),
        registry: registry.describe(),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::registry::memory::MemoryRegistry;

    const DAY: Duration = Duration::from_secs(86_400);

    async fn registry() -> MemoryRegistry {
        let registry = MemoryRegistry::new();
        registry.put("config", br#"{"Network":"10.5.0.0/16"}"#).await.unwrap();
        registry
    }

    async fn lease(registry: &MemoryRegistry, key: &str, value: &str, ttl: Option<Duration>) {
        registry.create(key, value.as_bytes(), ttl).await.unwrap().unwrap();
    }

    async fn run(action: LeasesAction, registry: &MemoryRegistry) -> Result<String, LeasesError> {
        let mut out = Vec::new();
        super::run(&LeasesArgs { action }, registry, &mut out).await?;
        Ok(String::from_utf8(out).unwrap())
    }

    fn reservation(subnet: &str, public_ip: &str) -> LeasesAction {
        let (subnets, public_ip) = (Subnets::from_cidrs(subnet).unwrap(), public_ip.parse().unwrap());
        LeasesAction::Reserve(ReserveArgs {
            subnets,
            public_ip,
            public_ipv6: None,
        })
    }

    fn release(subnet: &str) -> LeasesAction {
        LeasesAction::Release { subnet: subnet.into() }
    }

    #[tokio::test(start_paused = true)]
    async fn leases_are_listed_by_subnet_and_broken_ones_with_the_reason() {
        let registry = registry().await;
        lease(
            &registry,
            "subnets/10.5.34.0-24",
            r#"{"PublicIP":"192.0.2.1"}"#,
            Some(DAY),
        )
        .await;
        let vxlan = r#"{"PublicIP":"192.0.2.2","BackendType":"vxlan"}"#;
        lease(&registry, "subnets/10.5.9.0-24", vxlan, None).await;
        lease(&registry, "subnets/10.5.8.0-24", "{broken", Some(DAY)).await;
        tokio::time::advance(Duration::from_secs(61)).await;

        let answer = run(LeasesAction::List { json: false }, &registry).await.unwrap();
        let lines: Vec<&str> = answer.lines().collect();
        assert_eq!(lines.len(), 4, "{answer}");
        assert_eq!(
            lines[0].split_whitespace().collect::<Vec<_>>(),
            ["SUBNET", "PUBLIC", "IP", "BACKEND", "EXPIRES"]
        );
        assert_eq!(lines[1], "10.5.9.0/24    192.0.2.2   vxlan     never (reservation)");
        assert_eq!(lines[2], "10.5.34.0/24   192.0.2.1   udp       in 23h 58m");
        assert!(
            lines[3].starts_with("broken: the lease \"subnets/10.5.8.0-24\" cannot be used"),
            "{answer}"
        );

        let answer = run(LeasesAction::List { json: true }, &registry).await.unwrap();
        let answer: Value = serde_json::from_str(&answer).unwrap();
        assert_eq!(
            answer[1],
            json!({
                "key": "subnets/10.5.34.0-24", "subnet": "10.5.34.0/24", "ipv6_subnet": null,
                "public_ip": "192.0.2.1", "public_ipv6": null, "backend": "udp",
                "reservation": false, "expires_in_seconds": 86_339, "error": null,
            })
        );
        assert_eq!(
            (&answer[0]["reservation"], &answer[0]["expires_in_seconds"]),
            (&json!(true), &Value::Null)
        );
        assert!(answer[2]["error"].as_str().unwrap().contains("not JSON"));
    }

    #[tokio::test]
    async fn an_empty_list_says_where_it_looked() {
        let registry = MemoryRegistry::new();
        let answer = run(LeasesAction::List { json: false }, &registry).await.unwrap();
        assert_eq!(answer, "no leases at /coreos.com/network/subnets/ in memory\n");
        assert_eq!(run(LeasesAction::List { json: true }, &registry).await.unwrap(), "[]\n");
    }

    #[tokio::test]
    async fn a_reservation_is_a_lease_that_does_not_expire() {
        let registry = registry().await;
        run(reservation("10.5.34.0/24", "192.0.2.1"), &registry).await.unwrap();
        let record = registry.get("subnets/10.5.34.0-24").await.unwrap().unwrap();
        assert_eq!(record.value, br#"{"PublicIP":"192.0.2.1","PublicIPv6":null}"#);
        assert_eq!(record.ttl, None);

        let again = run(reservation("10.5.34.0/24", "192.0.2.1"), &registry).await.unwrap();
        assert!(again.contains("already"), "{again}");
        assert_eq!(registry.get("subnets/10.5.34.0-24").await.unwrap(), Some(record));
    }

    #[tokio::test]
    async fn the_lease_of_the_same_host_becomes_a_reservation() {
        let registry = registry().await;
        let value = r#"{"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"host-gw"}"#;
        lease(&registry, "subnets/10.5.34.0-24", value, Some(DAY)).await;
        run(reservation("10.5.34.0/24", "192.0.2.1"), &registry).await.unwrap();
        let record = registry.get("subnets/10.5.34.0-24").await.unwrap().unwrap();
        assert_eq!((record.value, record.ttl), (value.into(), None));
    }

    #[tokio::test]
    async fn a_host_with_another_lease_is_told_how_to_change_over() {
        let registry = registry().await;
        lease(
            &registry,
            "subnets/10.5.9.0-24",
            r#"{"PublicIP":"192.0.2.1"}"#,
            Some(DAY),
        )
        .await;
        let answer = run(reservation("10.5.34.0/24", "192.0.2.1"), &registry).await.unwrap();
        assert!(
            answer.contains("a lease of 10.5.9.0/24") && answer.contains("started again"),
            "{answer}"
        );
        let answer = run(reservation("10.5.35.0/24", "192.0.2.1"), &registry).await.unwrap();
        assert!(answer.contains("10.5.34.0/24 is reserved"), "{answer}");
    }

    #[tokio::test]
    async fn what_others_have_or_the_network_has_not_is_not_reserved() {
        let registry = registry().await;
        lease(
            &registry,
            "subnets/10.5.34.0-24",
            r#"{"PublicIP":"192.0.2.9"}"#,
            Some(DAY),
        )
        .await;
        lease(&registry, "subnets/10.5.48.0-20", r#"{"PublicIP":"192.0.2.8"}"#, None).await;
        lease(&registry, "subnets/10.5.7.0-24", "{broken", None).await;
        let before = registry.list("").await.unwrap();
        for (subnet, parts) in [
            (
                "10.5.34.0/24",
                ["10.5.34.0/24 of 192.0.2.9", "leases release 10.5.34.0/24"],
            ),
            (
                "10.5.50.0/24",
                ["10.5.48.0/20 of 192.0.2.8", "leases release 10.5.48.0/20"],
            ),
            ("10.5.7.0/24", ["broken", "leases release 10.5.7.0/24"]),
            ("10.5.0.0/24", ["does not fit", "10.5.1.0/24 to 10.5.255.0/24"]),
            ("10.6.1.0/24", ["does not fit", "10.5.1.0/24"]),
            ("10.5.64.0/20", ["does not fit", "10.5.1.0/24"]),
        ] {
            let message = run(reservation(subnet, "192.0.2.1"), &registry)
                .await
                .unwrap_err()
                .to_string();
            assert!(parts.iter().all(|part| message.contains(part)), "{subnet}: {message}");
        }
        assert_eq!(registry.list("").await.unwrap(), before);
        let error = run(reservation("10.5.1.0/24", "192.0.2.1"), &MemoryRegistry::new())
            .await
            .unwrap_err();
        assert!(matches!(error, LeasesError::Load(LoadError::Missing { .. })));
    }

    #[tokio::test]
    async fn leases_reservations_and_broken_records_are_released() {
        let registry = registry().await;
        lease(
            &registry,
            "subnets/10.5.34.0-24",
            r#"{"PublicIP":"192.0.2.1"}"#,
            Some(DAY),
        )
        .await;
        lease(&registry, "subnets/10.5.35.0-24", r#"{"PublicIP":"192.0.2.2"}"#, None).await;
        lease(&registry, "subnets/10.5.36.0/24", "x", None).await;
        for (subnet, part) in [
            ("10.5.34.0/24", "leased to 192.0.2.1"),
            ("10.5.35.0-24", "reserved for 192.0.2.2"),
            ("10.5.36.0/24", "no lease"),
        ] {
            let answer = run(release(subnet), &registry).await.unwrap();
            assert!(answer.contains(part), "{subnet}: {answer}");
        }
        assert_eq!(registry.list(SUBNETS).await.unwrap(), []);
        let message = run(release("10.5.34.0/24"), &registry).await.unwrap_err().to_string();
        assert!(
            message.contains("10.5.34.0/24 in memory") && message.contains("leases list"),
            "{message}"
        );
    }

    #[test]
    fn spans_have_two_units() {
        assert_eq!(
            [0, 59, 60, 3599, 3600, 86_399].map(span),
            ["0s", "59s", "1m 0s", "59m 59s", "1h 0m", "23h 59m"]
        );
    }
}
