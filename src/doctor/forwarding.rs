//! Whether this host forwards packets between its containers and the overlay.

use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;
use serde_json::Value;
use tokio::time::timeout;

use super::{
    Check, Group, LOCAL_PATIENCE, Other, Own, Picture,
    chains::{Packet, Table, Walk},
    sysctl,
};
use crate::{
    kernel::{Kernel, Link, external::External},
    network::BackendKind,
    rules::look,
};

/// A variant of iptables.
#[derive(Debug)]
pub(super) struct Variant {
    /// For people.
    pub(super) name: &'static str,
    /// What changes its rules.
    pub(super) program: String,
    /// What `iptables-save` says or why not.
    saved: Result<String, String>,
}

/// The program that the host's own variant is called by, and that flanneld uses.
const IPTABLES: &str = "iptables";

/// The chain that Docker has FORWARD begin with, and leaves to the administrator: what it has otherwise it makes anew when it starts.
const DOCKER_USER: &str = "DOCKER-USER";

/// The rules of this host, whoever made them.
#[derive(Debug, Default)]
pub(super) struct Rules {
    /// By iptables.
    iptables: Vec<Variant>,
    /// By nftables, as its JSON; `None`: not installed.
    nftables: Option<Result<String, String>>,
}

impl Rules {
    pub(super) async fn look() -> Rules {
        let late = || format!("no answer within {} s", LOCAL_PATIENCE.as_secs());
        let (iptables, nftables) = tokio::join!(
            timeout(LOCAL_PATIENCE, look::iptables_saved()),
            timeout(LOCAL_PATIENCE, look::nft_ruleset())
        );
        let words = |said: Result<String, crate::rules::Error>| said.map_err(|error| error.to_string());
        Rules {
            iptables: match iptables {
                Ok(all) => all
                    .into_iter()
                    .map(|saved| Variant {
                        name: saved.variant,
                        program: saved.program,
                        saved: words(saved.text),
                    })
                    .collect(),
                Err(_) => vec![Variant {
                    name: IPTABLES,
                    program: IPTABLES.to_owned(),
                    saved: Err(late()),
                }],
            },
            nftables: match nftables {
                Ok(listed) => listed.map(words),
                Err(_) => Some(Err(late())),
            },
        }
    }

    /// One table of each variant of iptables.
    pub(super) fn tables<'a>(&'a self, name: &'a str) -> impl Iterator<Item = (&'a Variant, Table)> + 'a {
        let variants = self.iptables.iter();
        variants.filter_map(move |variant| Some((variant, Table::parse(variant.saved.as_deref().ok()?, name))))
    }

    /// Why rules could not be looked at.
    fn unseen(&self) -> impl Iterator<Item = &str> {
        let iptables = self.iptables.iter().filter_map(|variant| variant.saved.as_ref().err());
        let nftables = self.nftables.iter().filter_map(|listed| listed.as_ref().err());
        iptables.chain(nftables).map(String::as_str)
    }

    /// Whether flanneld keeps its own by nftables.
    fn ours_by_nftables(&self) -> bool {
        let mut all = self.nft().into_iter();
        all.any(|entry| text(&entry["table"]["name"]).starts_with("flannel"))
    }

    /// The lists of chains and rules that nftables has.
    fn nft(&self) -> Vec<Value> {
        let listed = self.nftables.as_ref().and_then(|listed| listed.as_ref().ok());
        let parsed: Option<Value> = listed.and_then(|listed| serde_json::from_str(listed).ok());
        match parsed.as_ref().map(|parsed| &parsed["nftables"]) {
            Some(Value::Array(all)) => all.clone(),
            _ => Vec::new(),
        }
    }
}

/// Where packets to a source would leave: what is asked when one comes from there and the reverse path is checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Way {
    /// From where.
    from: Ipv4Addr,
    /// For people.
    whose: String,
    /// The interface that its packets come in by.
    arrives: String,
    /// The one that packets to it leave by.
    leaves: String,
}

/// The kernel's settings, and the ways back.
#[derive(Debug, Clone, Default)]
pub(super) struct Ways {
    ways: Vec<Way>,
    /// `net.ipv4.ip_forward`
    forward: Option<String>,
    /// `rp_filter` of all interfaces, and of those that packets come in by.
    all: Option<String>,
    each: Vec<(String, Option<String>)>,
}

impl Ways {
    pub(super) fn look(own: &Own, picture: &Picture, external: Option<&External>, others: &[Other]) -> Ways {
        let Ok(mut kernel) = Kernel::open() else {
            return Ways::default();
        };
        let external = external.and_then(|external| picture.link(external.index));
        let arrivals = arrivals(own, picture, external, others);
        let to: Vec<IpAddr> = arrivals.iter().map(|arrival| arrival.from.into()).collect();
        let paths = kernel.paths(&to).unwrap_or_default();
        let ways = arrivals.into_iter().zip(paths).filter_map(|(arrival, path)| {
            let Arrival { from, whose, by } = arrival;
            Some(Way {
                from,
                whose,
                arrives: by.name.clone(),
                leaves: picture.link(path?.link)?.name.clone(),
            })
        });
        let interfaces = external.into_iter().chain(&own.device);
        Ways {
            ways: ways.collect(),
            forward: sysctl("ipv4/ip_forward"),
            all: sysctl("ipv4/conf/all/rp_filter"),
            each: interfaces
                .map(|link| (link.name.clone(), sysctl(&format!("ipv4/conf/{}/rp_filter", link.name))))
                .collect(),
        }
    }

    /// Whether the interface drops what it would not send back by itself: 1 is strict, 2 loose, and the larger of the two
    /// settings counts (kernel, ip-sysctl.rst).
    fn is_strict(&self, interface: &str) -> bool {
        let number = |value: Option<&String>| value.and_then(|value| value.parse::<u8>().ok()).unwrap_or(0);
        let each = self.each.iter().find(|(name, _)| name == interface);
        number(self.all.as_ref()).max(number(each.and_then(|(_, value)| value.as_ref()))) == 1
    }
}

/// What comes from another host.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Arrival<'a> {
    from: Ipv4Addr,
    /// For people.
    whose: String,
    /// The interface that it comes in by.
    by: &'a Link,
}

/// What comes in from the other hosts of this backend: a tunnel's datagrams and what is in them, or the packets themselves.
fn arrivals<'a>(own: &'a Own, picture: &Picture, external: Option<&'a Link>, others: &[Other]) -> Vec<Arrival<'a>> {
    let mut arrivals = Vec::new();
    for other in others.iter().filter(|other| other.other_backend.is_none()) {
        arrivals.extend(external.map(|by| Arrival {
            from: other.public_ip,
            whose: format!("packets of host {}", other.public_ip),
            by,
        }));
        // With host-gw, and with vxlan's DirectRouting on the same link, they come without a tunnel, as ours go.
        let direct = picture.routes.iter().any(|found| {
            found.route.to == IpNet::V4(other.subnet) && found.route.via == Some(IpAddr::V4(other.public_ip))
        });
        let by = if direct { external } else { own.device.as_ref() };
        arrivals.extend(by.map(|by| Arrival {
            from: other.subnet.network(),
            whose: format!("packets of containers in {}", other.subnet),
            by,
        }));
    }
    arrivals
}

pub(super) fn judge(
    own: &Own,
    picture: &Picture,
    ways: &Ways,
    rules: &Rules,
    bridge: Option<&Link>,
    masquerade: bool,
) -> Vec<Check> {
    let mut checks = vec![ip_forward(ways), reverse_path(ways)];
    checks.extend(rules.unseen().map(|why| Check::unseen(Group::Forwarding, "rules", why)));
    checks.push(forward(own, rules, bridge));
    if masquerade {
        checks.push(masquerades(own, picture, rules));
    }
    checks
}

fn ip_forward(ways: &Ways) -> Check {
    const NAME: &str = "ip-forward";
    match ways.forward.as_deref() {
        None => Check::unseen(Group::Forwarding, NAME, "no net.ipv4.ip_forward here"),
        Some("0") => Check::fail(
            Group::Forwarding,
            NAME,
            "net.ipv4.ip_forward is 0: this host forwards nothing, so its containers reach no other host",
            "`sysctl -w net.ipv4.ip_forward=1`, and the same in a file in /etc/sysctl.d for the next boot",
        ),
        Some(_) => Check::ok(Group::Forwarding, NAME, "net.ipv4.ip_forward is on"),
    }
}

fn reverse_path(ways: &Ways) -> Check {
    const NAME: &str = "rp-filter";
    let strays = |way: &&Way| way.arrives != way.leaves && ways.is_strict(&way.arrives);
    match ways.ways.iter().find(strays) {
        None => Check::ok(Group::Forwarding, NAME, "drops nothing of the other hosts"),
        Some(Way {
            from,
            whose,
            arrives,
            leaves,
        }) => Check::fail(
            Group::Forwarding,
            NAME,
            format!(
                "{whose} come in by {arrives}, the way back to {from} leaves by {leaves}, and rp_filter is strict (1): the kernel \
                 drops them"
            ),
            format!(
                "mend the route (`ip route get {from}`), or `sysctl -w net.ipv4.conf.{arrives}.rp_filter=2` (the larger of this \
                 and net.ipv4.conf.all.rp_filter counts)"
            ),
        ),
    }
}

/// Addresses and interfaces of a container here, and of one elsewhere.
pub(super) fn ends<'a>(own: &'a Own, bridge: Option<&'a Link>) -> Option<[(Ipv4Addr, &'a str); 2]> {
    // The second host address: the first is the bridge's.
    let container = Ipv4Addr::from(u32::from(own.subnet?.network()).saturating_add(2));
    let network = own.network?;
    let subnet = own.subnet?;
    // The network's last address, or, where that is ours, one before ours.
    let last = Ipv4Addr::from(u32::from(network.broadcast()).saturating_sub(1));
    let elsewhere = if subnet.contains(&last) {
        Ipv4Addr::from(u32::from(subnet.network()).saturating_sub(2))
    } else {
        last
    };
    let here = bridge.map_or("docker0", |bridge| bridge.name.as_str());
    let there = match own.kind {
        // It has no device of its own.
        Some(BackendKind::HostGw) => own.outward.as_deref(),
        _ => own.device.as_ref().map(|device| device.name.as_str()),
    };
    let there = there.unwrap_or("flannel0");
    Some([(container, here), (elsewhere, there)])
}

fn forward(own: &Own, rules: &Rules, bridge: Option<&Link>) -> Check {
    const NAME: &str = "forward";
    let Some([here, there]) = ends(own, bridge) else {
        return Check::unseen(Group::Forwarding, NAME, "this host's subnet is not known");
    };
    // `ends` has looked for both.
    let network = own.network.map_or(String::new(), |network| network.to_string());
    for (
        Variant {
            name: variant, program, ..
        },
        table,
    ) in rules.tables("filter")
    {
        for ((from, input), (to, output)) in [(here, there), (there, here)] {
            let packet = Packet {
                from,
                to,
                input: Some(input),
                output: Some(output),
            };
            let Some(walk) = table.walk("FORWARD", packet) else {
                continue;
            };
            if !matches!(walk.verdict.as_str(), "DROP" | "REJECT") {
                continue;
            }
            let Walk { rule, perhaps, .. } = walk;
            let dropped = format!("packets from {input} to {output}, such as {from} to {to}");
            let what = match &rule {
                None => format!("the policy of FORWARD is DROP ({variant}), and no rule accepts {dropped}"),
                Some(rule) => format!("a rule of {variant} drops {dropped}: `{rule}`"),
            };
            let lasting = table
                .accepting_in(DOCKER_USER)
                .and_then(|table| table.walk("FORWARD", packet));
            let lasts = lasting.is_some_and(|walk| walk.verdict == "ACCEPT");
            let chain = if lasts { DOCKER_USER } else { "FORWARD" };
            let by_hand =
                format!("`{program} -I {chain} -s {network} -j ACCEPT; {program} -I {chain} -d {network} -j ACCEPT`");
            let remedy = match &rule {
                // Ours are elsewhere: this drops what they accept.
                None if program != IPTABLES || rules.ours_by_nftables() => {
                    format!("{by_hand} (flanneld's own rules are not there)")
                }
                None => format!(
                    "let flanneld keep its rules (--iptables-forward-rules=true, the default) and restart it: `systemctl restart \
                     flanneld`; by hand: {by_hand}"
                ),
                // Docker would put it there again.
                Some(rule) if lasts && of_docker(rule) => {
                    format!("accept the overlay's packets before Docker's rules: {by_hand}")
                }
                Some(rule) => format!(
                    "`{program} {}`, or accept the overlay's packets before it: {by_hand}",
                    rule.replacen("-A", "-D", 1)
                ),
            };
            return match perhaps.iter().find(|rule| rule.ends_with("ACCEPT")) {
                Some(rule) => Check::warn(
                    Group::Forwarding,
                    NAME,
                    format!("{what}, unless this does: `{rule}`"),
                    remedy,
                ),
                None => Check::fail(Group::Forwarding, NAME, what, remedy),
            };
        }
    }
    if let Some((chain, accepts)) = dropping_chain(&rules.nft()) {
        let what = format!("the nftables chain {chain} drops what it does not accept, whatever other chains say");
        let remedy = format!(
            "`nft insert rule {chain} ip saddr {network} accept; nft insert rule {chain} ip daddr {network} accept`, and the same \
             where that chain is configured"
        );
        return if accepts {
            Check::warn(
                Group::Forwarding,
                NAME,
                format!("{what}; it has rules that accept, perhaps the overlay's packets, too"),
                remedy,
            )
        } else {
            Check::fail(Group::Forwarding, NAME, what, remedy)
        };
    }
    Check::ok(Group::Forwarding, NAME, "no rule drops the overlay's packets")
}

/// Whether the rule is of a chain that Docker makes anew when it starts.
fn of_docker(rule: &str) -> bool {
    let chain = rule.split(' ').nth(1).unwrap_or_default();
    chain.starts_with("DOCKER") && chain != DOCKER_USER
}

/// A chain of nftables at the forward hook whose policy is to drop, and whether any rule of it accepts anything. iptables' own chain
/// is looked at with iptables.
fn dropping_chain(all: &[Value]) -> Option<(String, bool)> {
    let name = |of: &Value| format!("{} {} {}", text(&of["family"]), text(&of["table"]), text(&of["name"]));
    let chain = all.iter().map(|entry| &entry["chain"]).find(|chain| {
        chain["hook"] == "forward"
            && chain["policy"] == "drop"
            && (chain["family"] == "ip" || chain["family"] == "inet")
            && name(chain) != "ip filter FORWARD"
    })?;
    let accepts = all.iter().map(|entry| &entry["rule"]).any(|rule| {
        rule["family"] == chain["family"]
            && rule["table"] == chain["table"]
            && rule["chain"] == chain["name"]
            && rule["expr"].as_array().is_some_and(|expr| {
                expr.iter().any(|part| {
                    let part = part.as_object();
                    part.is_some_and(|part| {
                        ["accept", "jump", "goto"]
                            .iter()
                            .any(|verdict| part.contains_key(*verdict))
                    })
                })
            })
    });
    Some((name(chain), accepts))
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// Whether what leaves the overlay is masqueraded, as the subnet file says.
fn masquerades(own: &Own, picture: &Picture, rules: &Rules) -> Check {
    const NAME: &str = "masquerade";
    let Some([(container, _), _]) = ends(own, None) else {
        return Check::unseen(Group::Forwarding, NAME, "this host's subnet is not known");
    };
    // By whichever interface that is no part of the overlay.
    let outward = picture
        .links
        .iter()
        .find(|link| !link.loopback && Some(link.index) != own.device.as_ref().map(|device| device.index))
        .map(|link| link.name.as_str());
    let packet = Packet {
        from: container,
        // Of no network (RFC 5737).
        to: Ipv4Addr::new(198, 51, 100, 1),
        input: None,
        output: outward,
    };
    let walks: Vec<Walk> = rules
        .tables("nat")
        .filter_map(|(_, table)| table.walk("POSTROUTING", packet))
        .collect();
    let by_iptables = walks
        .iter()
        .any(|walk| matches!(walk.verdict.as_str(), "MASQUERADE" | "SNAT"));
    if by_iptables || rules.ours_by_nftables() {
        return Check::ok(Group::Forwarding, NAME, "what leaves the overlay is masqueraded");
    }
    let promised = "the subnet file says that flanneld masquerades (FLANNEL_IPMASQ=true), so Docker does not";
    let remedy = "`systemctl restart flanneld`; something removes its rules: `iptables -t nat -S FLANNEL-POSTRTG`";
    let mut perhaps = walks.iter().flat_map(|walk| &walk.perhaps);
    match perhaps.find(|rule| rule.contains("-j MASQUERADE") || rule.contains("-j SNAT")) {
        Some(rule) => Check::warn(
            Group::Forwarding,
            NAME,
            format!("{promised}; and no rule does, unless this does: `{rule}`"),
            remedy,
        ),
        None => Check::fail(Group::Forwarding, NAME, format!("{promised}; and no rule does"), remedy),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::{
        super::{State, device::tests::link},
        *,
    };
    use crate::kernel::entries::{FoundRoute, PROTOCOL, Route};

    /// What `iptables-save` says.
    pub(crate) fn saved(text: &str) -> Rules {
        Rules {
            iptables: vec![Variant {
                name: "iptables (nft)",
                program: IPTABLES.to_owned(),
                saved: Ok(text.to_owned()),
            }],
            nftables: None,
        }
    }

    fn own() -> Own {
        Own {
            network: Some("10.5.0.0/16".parse().unwrap()),
            subnet: Some("10.5.1.0/24".parse().unwrap()),
            ..Own::default()
        }
    }

    const OURS: &str = "\
-A FORWARD -m comment --comment \"flanneld forward\" -j FLANNEL-FWD
-A FLANNEL-FWD -s 10.5.0.0/16 -m comment --comment \"flanneld forward\" -j ACCEPT
-A FLANNEL-FWD -d 10.5.0.0/16 -m comment --comment \"flanneld forward\" -j ACCEPT
";

    fn filter(rules: &str) -> Rules {
        saved(&format!(
            "*filter\n:FORWARD DROP [0:0]\n:FLANNEL-FWD - [0:0]\n{rules}COMMIT\n"
        ))
    }

    #[test]
    fn a_policy_of_drop_is_wrong_without_our_rules() {
        assert_eq!(forward(&own(), &filter(OURS), None).state, State::Ok);
        let check = forward(&own(), &filter(""), None);
        assert_eq!(check.state, State::Fail);
        assert!(
            check
                .remedy
                .unwrap()
                .contains("iptables -I FORWARD -s 10.5.0.0/16 -j ACCEPT")
        );
        assert_eq!(
            forward(&own(), &filter("-A FORWARD -p tcp -j ACCEPT\n"), None).state,
            State::Warn
        );
        assert_eq!(forward(&own(), &saved(""), None).state, State::Ok);
    }

    #[test]
    fn a_rule_that_drops_before_ours_is_named() {
        let check = forward(
            &own(),
            &filter(&format!("-A FORWARD ! -i docker0 -o docker0 -j DROP\n{OURS}")),
            None,
        );
        assert_eq!(check.state, State::Fail);
        assert!(
            check
                .remedy
                .unwrap()
                .starts_with("`iptables -D FORWARD ! -i docker0 -o docker0 -j DROP`")
        );
    }

    #[test]
    fn the_remedy_is_for_the_program_that_has_the_rule() {
        let of_legacy = |text: &str| {
            let mut rules = filter(text);
            rules.iptables[0].program = "iptables-legacy".to_owned();
            forward(&own(), &rules, None).remedy.unwrap()
        };
        let by_hand = "`iptables-legacy -I FORWARD -s 10.5.0.0/16 -j ACCEPT; iptables-legacy -I FORWARD -d 10.5.0.0/16 \
                       -j ACCEPT`";
        let remedy = of_legacy("");
        assert!(remedy.starts_with(by_hand) && !remedy.contains("restart"), "{remedy}");
        let remedy = of_legacy("-A FORWARD -j DROP\n");
        assert!(
            remedy.starts_with("`iptables-legacy -D FORWARD -j DROP`") && remedy.ends_with(by_hand),
            "{remedy}"
        );
    }

    #[test]
    fn no_restart_helps_where_our_rules_are_by_nftables_and_the_policy_is_iptables() {
        let mut rules = filter("");
        rules.nftables = Some(Ok(
            r#"{"nftables":[{"table":{"family":"ip","name":"flannel-ipv4"}}]}"#.to_owned()
        ));
        let remedy = forward(&own(), &rules, None).remedy.unwrap();
        assert!(
            remedy.starts_with("`iptables -I FORWARD -s 10.5.0.0/16 -j ACCEPT;") && !remedy.contains("restart"),
            "{remedy}"
        );
    }

    #[test]
    fn dockers_rules_are_left_alone_where_its_chain_for_others_comes_first() {
        let docker = "\
:DOCKER - [0:0]
:DOCKER-USER - [0:0]
:KUBE-FORWARD - [0:0]
-A FORWARD -j KUBE-FORWARD
-A FORWARD -j DOCKER-USER
-A FORWARD -o docker0 -j DOCKER
";
        let user =
            "`iptables -I DOCKER-USER -s 10.5.0.0/16 -j ACCEPT; iptables -I DOCKER-USER -d 10.5.0.0/16 -j ACCEPT`";
        let remedy = |rules: &str| forward(&own(), &filter(rules), None).remedy.unwrap();
        let policy = remedy(docker);
        assert!(
            policy.contains("systemctl restart flanneld") && policy.ends_with(user),
            "{policy}"
        );
        let dropped = remedy(&format!("{docker}-A DOCKER ! -i docker0 -o docker0 -j DROP\n{OURS}"));
        assert!(dropped.ends_with(user) && !dropped.contains("-D"), "{dropped}");
        // The administrator's rules, which Docker leaves there.
        let dropped = remedy(&format!("{docker}-A DOCKER-USER -i flannel0 -j DROP\n{OURS}"));
        assert!(
            dropped.starts_with("`iptables -D DOCKER-USER -i flannel0 -j DROP`"),
            "{dropped}"
        );
        // What drops them before.
        let dropped = remedy(&format!("-A FORWARD -i flannel0 -j DROP\n{docker}{OURS}"));
        assert!(
            dropped.contains("-I FORWARD -s 10.5.0.0/16") && !dropped.contains("DOCKER"),
            "{dropped}"
        );
    }

    #[test]
    fn without_a_device_the_overlay_is_the_interface_to_the_other_hosts() {
        let own = Own {
            kind: Some(BackendKind::HostGw),
            outward: Some("eth1".to_owned()),
            ..own()
        };
        let rules = filter(&format!("-A FORWARD -i eth1 -j DROP\n{OURS}"));
        assert_eq!(forward(&own, &rules, None).state, State::Fail);
    }

    #[test]
    fn a_chain_of_nftables_that_drops_is_found() {
        let rules = |rule: &str| Rules {
            iptables: Vec::new(),
            nftables: Some(Ok(format!(
                r#"{{"nftables":[{{"chain":{{"family":"inet","table":"fw","name":"fwd","hook":"forward","policy":"drop"}}}}{rule}]}}"#
            ))),
        };
        let check = forward(&own(), &rules(""), None);
        assert_eq!(check.state, State::Fail);
        assert!(check.what.contains("inet fw fwd"), "{check:?}");
        let accepting = r#",{"rule":{"family":"inet","table":"fw","chain":"fwd","expr":[{"accept":null}]}}"#;
        assert_eq!(forward(&own(), &rules(accepting), None).state, State::Warn);
    }

    #[test]
    fn a_promise_to_masquerade_needs_a_rule() {
        let nat = |rule: &str| saved(&format!("*nat\n:POSTROUTING ACCEPT [0:0]\n{rule}COMMIT\n"));
        let picture = Picture::default();
        assert_eq!(masquerades(&own(), &picture, &nat("")).state, State::Fail);
        let rule = "-A POSTROUTING -s 10.5.0.0/16 ! -d 224.0.0.0/4 -j MASQUERADE --random-fully\n";
        assert_eq!(masquerades(&own(), &picture, &nat(rule)).state, State::Ok);
        let sometimes = "-A POSTROUTING -m set --match-set far dst -j MASQUERADE\n";
        assert_eq!(masquerades(&own(), &picture, &nat(sometimes)).state, State::Warn);
    }

    #[test]
    fn rp_filter_is_wrong_only_where_it_is_strict_and_the_way_back_another() {
        let way = |leaves: &str| Way {
            from: [192, 0, 2, 2].into(),
            whose: "packets".to_owned(),
            arrives: "eth0".to_owned(),
            leaves: leaves.to_owned(),
        };
        let state = |all: &str, each: &str, leaves: &str| {
            let ways = Ways {
                ways: vec![way(leaves)],
                forward: Some("1".to_owned()),
                all: Some(all.to_owned()),
                each: vec![("eth0".to_owned(), Some(each.to_owned()))],
            };
            reverse_path(&ways).state
        };
        assert_eq!(state("0", "1", "eth1"), State::Fail);
        assert_eq!(state("1", "0", "eth1"), State::Fail);
        assert_eq!(state("2", "1", "eth1"), State::Ok);
        assert_eq!(state("0", "0", "eth1"), State::Ok);
        assert_eq!(state("0", "1", "eth0"), State::Ok);
    }

    #[test]
    fn packets_of_containers_come_as_their_host_sends_them() {
        let tunnel = link(7, "flannel.1", "10.5.1.0/32");
        let eth = link(2, "eth0", "192.0.2.1/24");
        let other = |number: u8, other_backend: Option<&str>| Other {
            subnet: format!("10.5.{number}.0/24").parse().unwrap(),
            public_ip: [192, 0, 2, number].into(),
            other_backend: other_backend.map(str::to_owned),
        };
        let others = [other(2, None), other(3, None), other(4, Some("udp"))];
        let route = |to: &str, via: &str, link: u32| FoundRoute {
            route: Route {
                to: to.parse().unwrap(),
                via: Some(via.parse().unwrap()),
                link,
                onlink: link == 7,
            },
            protocol: PROTOCOL,
            metric: 0,
            multipath: false,
        };
        let picture = Picture {
            routes: vec![
                route("10.5.2.0/24", "10.5.2.0", 7),
                route("10.5.3.0/24", "192.0.2.3", 2),
            ],
            ..Picture::default()
        };
        let own = Own {
            device: Some(tunnel),
            ..own()
        };
        let arrivals = arrivals(&own, &picture, Some(&eth), &others);
        let come: Vec<(String, &str)> = arrivals
            .iter()
            .map(|arrival| (arrival.from.to_string(), arrival.by.name.as_str()))
            .collect();
        let expected = [
            ("192.0.2.2", "eth0"),
            ("10.5.2.0", "flannel.1"),
            ("192.0.2.3", "eth0"),
            ("10.5.3.0", "eth0"),
        ];
        assert_eq!(come, expected.map(|(from, by)| (from.to_owned(), by)));
    }

    #[test]
    fn forwarding_that_is_off_is_wrong() {
        let ways = |value: Option<&str>| Ways {
            forward: value.map(str::to_owned),
            ..Ways::default()
        };
        assert_eq!(ip_forward(&ways(Some("0"))).state, State::Fail);
        assert_eq!(ip_forward(&ways(Some("1"))).state, State::Ok);
        assert_eq!(ip_forward(&ways(None)).state, State::Warn);
    }
}
