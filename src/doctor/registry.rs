//! The registry: whether etcd can be reached, lets us in, and has the network's configuration.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::Duration,
};

use tokio::{
    net::{TcpStream, lookup_host},
    time::timeout,
};

use super::{Check, Group, Options, Own, Picture};
use crate::{
    lease::{
        presence::Holder,
        record::{Lease, SUBNETS},
    },
    network::{self, LoadError, Network, Parsed},
    observe,
    registry::{Error, Registry, etcd::Member},
};

/// How long a connection may take: the kernel asks three times, a second apart, for the Ethernet address of a host that is not
/// there, and only then says that there is no route.
const CONNECT_PATIENCE: Duration = Duration::from_millis(3_300);

/// How long a server that accepts connections may take to answer all that is asked.
const ANSWER_PATIENCE: Duration = Duration::from_secs(3);

/// What became of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Outcome {
    Reached,
    Refused,
    NoRoute,
    TimedOut,
    NotPermitted,
    UnknownName(String),
    Failed(String),
}

/// One of etcd's addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Endpoint {
    member: Member,
    outcome: Outcome,
    /// It is an address of this host, and no loopback address.
    ours: bool,
    /// The same port of 127.0.0.1 accepts connections.
    on_loopback: bool,
}

/// What the registry says.
#[derive(Debug)]
pub(super) struct Facts {
    /// Empty for another registry than etcd.
    endpoints: Vec<Endpoint>,
    answers: Result<Answers, String>,
}

/// What a registry that can be talked to says.
#[derive(Debug)]
struct Answers {
    name: String,
    configuration: Result<Parsed, LoadError>,
    leases: Result<Vec<Lease>, String>,
    holders: Result<Vec<(Ipv4Addr, Holder)>, String>,
}

impl Facts {
    pub(super) async fn look(options: &Options, picture: Option<&Picture>) -> Facts {
        let members = match &options.etcd {
            Some(etcd) => etcd.members().unwrap_or_default(),
            None => Vec::new(),
        };
        let addresses: Vec<IpAddr> = picture
            .into_iter()
            .flat_map(|picture| &picture.links)
            .filter(|link| !link.loopback)
            .flat_map(|link| &link.addresses)
            .map(|net| net.addr())
            .collect();
        let looks = members.into_iter().map(|member| endpoint(member, &addresses));
        let endpoints = futures_util::future::join_all(looks).await;
        let reached = |endpoint: &Endpoint| endpoint.outcome == Outcome::Reached;
        let answers = match &options.registry {
            Err(why) => Err(why.clone()),
            Ok(_) if !endpoints.is_empty() && !endpoints.iter().any(reached) => {
                Err("no endpoint of etcd can be reached".to_owned())
            }
            Ok(registry) => timeout(ANSWER_PATIENCE, Answers::of(&**registry)).await.map_err(|_| {
                format!(
                    "{} accepts connections and does not answer within {} s",
                    registry.describe(),
                    ANSWER_PATIENCE.as_secs()
                )
            }),
        };
        Facts { endpoints, answers }
    }

    pub(super) fn network(&self) -> Option<&Network> {
        let answers = self.answers.as_ref().ok()?;
        Some(&answers.configuration.as_ref().ok()?.network)
    }

    /// All leases of the network; `None`: not known, as without a configuration, where there are none because the prefix is
    /// another one.
    pub(super) fn leases(&self) -> Option<&[Lease]> {
        let answers = self.answers.as_ref().ok()?;
        match answers.configuration {
            Err(LoadError::Missing { .. }) => None,
            _ => answers.leases.as_deref().ok(),
        }
    }

    /// Who claims the address; `Err`: the registry does not say.
    pub(super) fn holder(&self, public_ip: Ipv4Addr) -> Result<Option<&Holder>, &str> {
        let answers = self.answers.as_ref().map_err(String::as_str)?;
        let holders = answers.holders.as_ref().map_err(String::as_str)?;
        Ok(holders
            .iter()
            .find(|(address, _)| *address == public_ip)
            .map(|(_, holder)| holder))
    }
}

impl Answers {
    async fn of(registry: &dyn Registry) -> Answers {
        let configuration = network::load(registry).await;
        let leases = registry.list(SUBNETS).await.map(|records| {
            // What is no lease touches nobody: the daemon warns of it.
            records
                .iter()
                .filter_map(|record| Lease::from_record(record).ok())
                .collect()
        });
        let holders = Holder::all(registry).await;
        Answers {
            name: registry.describe(),
            configuration,
            leases: leases.map_err(|error| error.to_string()),
            holders: holders.map_err(|error| observe::chain(&error).to_string()),
        }
    }
}

async fn endpoint(member: Member, own: &[IpAddr]) -> Endpoint {
    let name = (member.host.clone(), member.port);
    let found = timeout(CONNECT_PATIENCE, lookup_host(name)).await;
    let (outcome, ours) = match found {
        Err(_) => (Outcome::UnknownName("no name server answers".to_owned()), false),
        Ok(Err(error)) => (Outcome::UnknownName(error.to_string()), false),
        Ok(Ok(addresses)) => {
            let mut outcome = Outcome::UnknownName("it has no address".to_owned());
            let mut ours = false;
            for address in addresses {
                ours |= own.contains(&address.ip());
                outcome = connect(address).await;
                if outcome == Outcome::Reached {
                    break;
                }
            }
            (outcome, ours)
        }
    };
    let on_loopback = outcome == Outcome::Refused
        && ours
        && connect(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), member.port)).await == Outcome::Reached;
    Endpoint {
        member,
        outcome,
        ours,
        on_loopback,
    }
}

async fn connect(address: SocketAddr) -> Outcome {
    match timeout(CONNECT_PATIENCE, TcpStream::connect(address)).await {
        Err(_) => Outcome::TimedOut,
        Ok(Ok(_)) => Outcome::Reached,
        Ok(Err(error)) => match error.kind() {
            io::ErrorKind::ConnectionRefused => Outcome::Refused,
            io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => Outcome::NoRoute,
            io::ErrorKind::TimedOut => Outcome::TimedOut,
            io::ErrorKind::PermissionDenied => Outcome::NotPermitted,
            _ => Outcome::Failed(error.to_string()),
        },
    }
}

/// What is wrong with an endpoint that is not reached, and what to do.
fn explain(endpoint: &Endpoint) -> (String, String) {
    let Endpoint { member, ours, .. } = endpoint;
    let Member { url, host, port } = member;
    let listen = format!(
        "`etcd --listen-client-urls http://0.0.0.0:{port} --advertise-client-urls {url}` (on Debian ETCD_LISTEN_CLIENT_URLS and \
         ETCD_ADVERTISE_CLIENT_URLS in /etc/default/etcd)"
    );
    match &endpoint.outcome {
        Outcome::Reached => (format!("{url} accepts connections"), String::new()),
        Outcome::Refused if endpoint.on_loopback => (
            format!("{url}: connection refused, but 127.0.0.1:{port} accepts: etcd listens on localhost only"),
            format!("let it listen on all addresses: {listen}"),
        ),
        Outcome::Refused => {
            let there = if *ours { "this host" } else { host };
            (
                format!("{url}: connection refused: {there} is up, and nothing listens on its TCP port {port}"),
                format!(
                    "start etcd on {there}, or give its address with --etcd-endpoints; an etcd that runs there may listen on \
                     localhost only, as it does by default: {listen}"
                ),
            )
        }
        Outcome::NoRoute => (
            format!("{url}: no route to host: it is down, or this host is cut off from it"),
            format!(
                "see where packets to it go with `ip route get {host}` and whether `ping {host}` answers; start the host"
            ),
        ),
        Outcome::TimedOut => (
            format!(
                "{url}: timed out, nothing came back within {} s: a firewall drops TCP port {port}, or the host is down",
                CONNECT_PATIENCE.as_secs()
            ),
            format!(
                "on {host}: `iptables -I INPUT -p tcp --dport {port} -j ACCEPT`, and the same in the cloud's security group; see \
                 whether `ping {host}` answers"
            ),
        ),
        Outcome::NotPermitted => (
            format!("{url}: not permitted by this host's own firewall"),
            format!("`iptables -I OUTPUT -p tcp --dport {port} -j ACCEPT`, or look at `nft list ruleset`"),
        ),
        Outcome::UnknownName(why) => (
            format!("{url}: the name {host} is not known: {why}"),
            "give an address with --etcd-endpoints, or mend /etc/resolv.conf or /etc/hosts".to_owned(),
        ),
        Outcome::Failed(why) => (
            format!("{url}: {why}"),
            format!("try `etcdctl --endpoints {url} endpoint health`"),
        ),
    }
}

pub(super) fn judge(facts: &Facts, own: &Own) -> Vec<Check> {
    let mut checks = endpoints(&facts.endpoints);
    let unreached = checks.iter().any(|check| check.state == super::State::Fail);
    match &facts.answers {
        Ok(answers) => checks.extend(configuration(answers, own)),
        Err(why) if unreached => checks.push(Check::unseen(Group::Registry, "configuration", why)),
        Err(why) => checks.push(Check::fail(
            Group::Registry,
            "configuration",
            why.as_str(),
            "mend the flags if it names one; else see whether etcd is healthy: `etcdctl endpoint health --cluster`",
        )),
    }
    checks
}

fn endpoints(endpoints: &[Endpoint]) -> Vec<Check> {
    const NAME: &str = "etcd";
    let (reached, unreached): (Vec<&Endpoint>, Vec<&Endpoint>) = endpoints
        .iter()
        .partition(|endpoint| endpoint.outcome == Outcome::Reached);
    if reached.is_empty() {
        return unreached
            .into_iter()
            .map(|endpoint| {
                let (what, remedy) = explain(endpoint);
                Check::fail(Group::Registry, NAME, what, remedy)
            })
            .collect();
    }
    let urls: Vec<&str> = reached.iter().map(|endpoint| endpoint.member.url.as_str()).collect();
    let mut checks = vec![Check::ok(
        Group::Registry,
        NAME,
        format!("{} accepts connections", urls.join(", ")),
    )];
    checks.extend(
        unreached
            .into_iter()
            // The default endpoints are two, of which no etcd has both.
            .filter(|endpoint| endpoint.member.host != "127.0.0.1")
            .map(|endpoint| {
                let (what, remedy) = explain(endpoint);
                Check::warn(Group::Registry, NAME, what, remedy)
            }),
    );
    checks
}

fn configuration(answers: &Answers, own: &Own) -> Vec<Check> {
    const NAME: &str = "configuration";
    let by_hand = "try it by hand with the same names: `etcdctl --endpoints URL --cacert CAFILE --cert CERTFILE --key KEYFILE \
                   --user USERNAME get --prefix PREFIX`";
    let failed = |what: String, remedy: String| vec![Check::fail(Group::Registry, NAME, what, remedy)];
    let parsed = match &answers.configuration {
        Ok(parsed) => parsed,
        Err(error @ LoadError::Missing { key, registry, .. }) => {
            return failed(
                format!("no network configuration at {key} in {registry}"),
                error.remedy().unwrap_or_default(),
            );
        }
        Err(LoadError::Registry(error)) => {
            let remedy = match error {
                Error::Denied { .. } => format!("mend the flags that it names (or FLANNELD_ETCD_…); {by_hand}"),
                _ if error.to_string().contains("TLS") => {
                    format!("https needs --etcd-cafile, and often --etcd-certfile and --etcd-keyfile; {by_hand}")
                }
                _ => format!("see whether etcd is healthy: `etcdctl endpoint health --cluster`; {by_hand}"),
            };
            return failed(error.to_string(), remedy);
        }
        Err(error) => {
            return failed(
                observe::chain(error).to_string(),
                error.remedy().unwrap_or_else(|| by_hand.to_owned()),
            );
        }
    };
    let mut checks = Vec::new();
    let kind = parsed.network.backend().kind();
    let network = own
        .network
        .map_or("IPv6 only".to_owned(), |network| network.to_string());
    match own.kind {
        Some(running) if own.running && running != kind => checks.push(Check::fail(
            Group::Registry,
            NAME,
            format!(
                "it says backend {}, and the daemon here still runs with {}",
                kind.name(),
                running.name()
            ),
            "restart the daemon, on all hosts: `systemctl restart flanneld`",
        )),
        _ => checks.push(Check::ok(
            Group::Registry,
            NAME,
            format!("{network}, backend {}, in {}", kind.name(), answers.name),
        )),
    }
    checks.extend(parsed.warnings.iter().map(|warning| {
        Check::warn(
            Group::Registry,
            NAME,
            warning.as_str(),
            "correct it with `flanneld network set`",
        )
    }));
    if let Err(why) = &answers.leases {
        checks.push(Check::fail(
            Group::Registry,
            "leases",
            why.as_str(),
            format!("flanneld must read and write all below --etcd-prefix; {by_hand}"),
        ));
    }
    checks
}

#[cfg(test)]
pub(super) mod tests {
    use super::{super::State, *};

    /// A registry that says this.
    pub(crate) fn facts(leases: Vec<Lease>, holders: Vec<(Ipv4Addr, Holder)>) -> Facts {
        Facts {
            endpoints: Vec::new(),
            answers: Ok(Answers {
                name: "a test".to_owned(),
                configuration: Ok(Network::parse(r#"{"Network":"10.5.0.0/16"}"#).unwrap()),
                leases: Ok(leases),
                holders: Ok(holders),
            }),
        }
    }

    /// A registry that says nothing.
    pub(crate) fn silent() -> Facts {
        Facts {
            endpoints: Vec::new(),
            answers: Err("it is away".to_owned()),
        }
    }

    fn endpoint(host: &str, outcome: Outcome) -> Endpoint {
        Endpoint {
            member: Member {
                url: format!("http://{host}:2379"),
                host: host.to_owned(),
                port: 2379,
            },
            outcome,
            ours: false,
            on_loopback: false,
        }
    }

    #[test]
    fn each_way_of_not_reaching_etcd_is_told_from_the_others() {
        let localhost = Endpoint {
            ours: true,
            on_loopback: true,
            ..endpoint("192.0.2.1", Outcome::Refused)
        };
        for (endpoint, what, remedy) in [
            (
                localhost,
                "listens on localhost only",
                "--listen-client-urls http://0.0.0.0:2379",
            ),
            (
                endpoint("192.0.2.1", Outcome::Refused),
                "refused",
                "start etcd on 192.0.2.1",
            ),
            (
                endpoint("192.0.2.1", Outcome::NoRoute),
                "no route",
                "ip route get 192.0.2.1",
            ),
            (endpoint("192.0.2.1", Outcome::TimedOut), "timed out", "--dport 2379"),
            (
                endpoint("etcd", Outcome::UnknownName("why".to_owned())),
                "the name etcd is not known: why",
                "/etc/hosts",
            ),
        ] {
            let [check] = &endpoints(&[endpoint])[..] else {
                panic!("one check")
            };
            assert_eq!(check.state, State::Fail);
            assert!(check.what.contains(what), "{check:?}");
            assert!(check.remedy.as_ref().unwrap().contains(remedy), "{check:?}");
        }
    }

    #[test]
    fn one_member_that_is_reached_is_enough_and_the_others_are_noted() {
        let states = |all: &[Endpoint]| endpoints(all).iter().map(|check| check.state).collect::<Vec<_>>();
        let reached = endpoint("192.0.2.1", Outcome::Reached);
        let down = endpoint("192.0.2.2", Outcome::NoRoute);
        assert_eq!(states(&[down, reached.clone()]), [State::Ok, State::Warn]);
        let default = endpoint("127.0.0.1", Outcome::Refused);
        assert_eq!(states(&[default, reached]), [State::Ok]);
    }

    #[test]
    fn a_daemon_with_another_backend_than_the_configurations_is_found() {
        let own = Own {
            running: true,
            kind: Some(network::BackendKind::Vxlan),
            ..Own::default()
        };
        let checks = judge(&facts(Vec::new(), Vec::new()), &own);
        assert_eq!(checks[0].state, State::Fail);
        assert!(checks[0].what.contains("backend udp"), "{checks:?}");
    }
}
