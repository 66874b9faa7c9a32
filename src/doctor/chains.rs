//! What iptables' rules do with a packet, from the text of `iptables-save`.
//!
//! Only what can be said of the first packet of a connection, that nothing has marked, by its addresses and interfaces. A rule
//! with any other condition (a set, a protocol) may apply or not: the walk goes on as if it did not, and remembers it. Where such
//! a rule leaves a chain, the rest of that chain may be met or not, too.

use std::{collections::BTreeMap, net::Ipv4Addr};

use ipnet::Ipv4Net;

/// How deep chains may lead into one another; the kernel's own limit is of this order.
const DEEPEST: usize = 16;

/// The targets after which the next rule is met.
const GOING_ON: [&str; 8] = ["LOG", "NFLOG", "MARK", "CONNMARK", "TCPMSS", "CT", "SET", "CLASSIFY"];

/// The chains of one table.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Table(BTreeMap<String, Chain>);

#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Chain {
    /// `ACCEPT` or `DROP`; `-` for those that are not built in.
    policy: String,
    /// The rules as they stand there.
    rules: Vec<String>,
}

/// The first packet of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Packet<'a> {
    pub(super) from: Ipv4Addr,
    pub(super) to: Ipv4Addr,
    /// The interface that it came in by; `None` where rules cannot ask for it.
    pub(super) input: Option<&'a str>,
    /// The interface that it leaves by.
    pub(super) output: Option<&'a str>,
}

/// How a packet ends in a chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Walk {
    /// `ACCEPT`, `DROP`, `MASQUERADE`, ..
    pub(super) verdict: String,
    /// The rule that says so; `None`: the chain's policy.
    pub(super) rule: Option<String>,
    /// Rules before that which may have ended it otherwise.
    pub(super) perhaps: Vec<String>,
}

impl Table {
    /// The table of this name in what `iptables-save` says; empty if there is none.
    pub(super) fn parse(saved: &str, name: &str) -> Table {
        let lines = saved.lines().skip_while(|line| line.strip_prefix('*') != Some(name));
        let mut chains: BTreeMap<String, Chain> = BTreeMap::new();
        for line in lines.skip(1).take_while(|line| *line != "COMMIT") {
            if let Some(declared) = line.strip_prefix(':') {
                let mut words = declared.split(' ');
                let chain = words.next().unwrap_or_default();
                chains.entry(chain.to_owned()).or_default().policy = words.next().unwrap_or("-").to_owned();
            } else if let Some(rule) = line.strip_prefix("-A ") {
                let chain = rule.split(' ').next().unwrap_or_default();
                chains.entry(chain.to_owned()).or_default().rules.push(line.to_owned());
            }
        }
        Table(chains)
    }

    /// What happens to the packet in a built-in chain; `None`: there is no such chain, so nothing does.
    pub(super) fn walk(&self, chain: &str, packet: Packet<'_>) -> Option<Walk> {
        let mut perhaps = Vec::new();
        let ended = self.follow(chain, packet, &mut perhaps, 0);
        let (verdict, rule) = match ended {
            Some((verdict, rule)) => (verdict, Some(rule)),
            None => (self.0.get(chain)?.policy.clone(), None),
        };
        Some(Walk { verdict, rule, perhaps })
    }

    /// The table with a rule at the start of the chain that accepts all; `None`: there is no such chain.
    pub(super) fn accepting_in(&self, chain: &str) -> Option<Table> {
        let mut table = self.clone();
        let rules = &mut table.0.get_mut(chain)?.rules;
        rules.insert(0, format!("-A {chain} -j ACCEPT"));
        Some(table)
    }

    /// The rule of a chain that drops what comes from `from` by the interface `input` to one address of `subnet`.
    pub(super) fn drop_within(&self, chain: &str, from: Ipv4Addr, input: &str, subnet: Ipv4Net) -> Option<&str> {
        let drops = |line: &&String| {
            let rule = Rule::parse(line);
            let to = rule
                .to
                .and_then(|(turned, to)| (!turned).then_some(to)?.strip_suffix("/32"));
            to.and_then(|to| to.parse().ok()).is_some_and(|to| {
                let packet = Packet {
                    from,
                    to,
                    input: Some(input),
                    output: None,
                };
                subnet.contains(&to) && rule.target == Some("DROP") && rule.applies(packet) == Applies::Yes
            })
        };
        self.0.get(chain)?.rules.iter().find(drops).map(String::as_str)
    }

    /// The verdict and the rule that gives it; `None`: the packet comes back from the chain.
    fn follow(
        &self,
        chain: &str,
        packet: Packet<'_>,
        perhaps: &mut Vec<String>,
        depth: usize,
    ) -> Option<(String, String)> {
        if depth > DEEPEST {
            return None;
        }
        // An earlier rule may have left this chain already.
        let mut left = false;
        for line in &self.0.get(chain)?.rules {
            let rule = Rule::parse(line);
            let Some(target) = rule.target.filter(|target| !GOING_ON.contains(target)) else {
                continue;
            };
            match rule.applies(packet) {
                Applies::No => {}
                Applies::Yes => {
                    let ended = if target == "RETURN" {
                        None
                    } else if self.0.contains_key(target) {
                        let ended = self.follow(target, packet, perhaps, depth + 1);
                        // What was gone to and not called does not come back here.
                        if ended.is_none() && !rule.goes {
                            continue;
                        }
                        ended
                    } else {
                        Some((target.to_owned(), line.clone()))
                    };
                    if !left {
                        return ended;
                    }
                    // It ends by this rule, or it is back where the chain was called.
                    perhaps.extend(ended.map(|(_, line)| line));
                    return None;
                }
                Applies::Perhaps if target == "RETURN" => left = true,
                Applies::Perhaps if self.0.contains_key(target) => {
                    let mut inside = Vec::new();
                    let ended = self.follow(target, packet, &mut inside, depth + 1);
                    perhaps.extend(ended.map(|(_, line)| line));
                    perhaps.append(&mut inside);
                    left |= rule.goes;
                }
                Applies::Perhaps => perhaps.push(line.clone()),
            }
        }
        None
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Applies {
    Yes,
    No,
    Perhaps,
}

/// A rule's conditions on addresses and interfaces, each with whether it is turned round.
#[derive(Debug, Default)]
struct Rule<'a> {
    from: Option<(bool, &'a str)>,
    to: Option<(bool, &'a str)>,
    input: Option<(bool, &'a str)>,
    output: Option<(bool, &'a str)>,
    /// It is for packets of other connection states than the first one's, or for marked ones.
    never: bool,
    /// It has other conditions.
    others: bool,
    target: Option<&'a str>,
    /// `-g`, not `-j`.
    goes: bool,
}

impl<'a> Rule<'a> {
    fn parse(line: &'a str) -> Rule<'a> {
        let words = words(line);
        let mut words = words.into_iter().skip(2);
        let mut rule = Rule::default();
        let mut not = false;
        while let Some(word) = words.next() {
            let mut value = || words.next().unwrap_or_default();
            match word {
                "!" => {
                    not = true;
                    continue;
                }
                "-s" => rule.from = Some((not, value())),
                "-d" => rule.to = Some((not, value())),
                "-i" => rule.input = Some((not, value())),
                "-o" => rule.output = Some((not, value())),
                "--comment" => drop(value()),
                "--ctstate" | "--state" => {
                    let new = value().split(',').any(|state| state == "NEW");
                    rule.never |= new == not;
                }
                // `value/mask`: what has no mark has 0 under each mask.
                "--mark" => match number(value().split('/').next().unwrap_or_default()) {
                    Some(mark) => rule.never |= (mark == 0) == not,
                    None => rule.others = true,
                },
                "-m" => rule.others |= !matches!(value(), "comment" | "conntrack" | "state" | "mark"),
                "-j" | "-g" => {
                    rule.goes = word == "-g";
                    rule.target = Some(value());
                    // What follows is how the target does its work.
                    break;
                }
                _ => rule.others = true,
            }
            not = false;
        }
        rule
    }

    fn applies(&self, packet: Packet<'_>) -> Applies {
        let address = |wanted: Option<(bool, &str)>, address: Ipv4Addr| {
            wanted.is_none_or(|(not, net)| net_of(net).is_some_and(|net| net.contains(&address) != not))
        };
        let interface = |wanted: Option<(bool, &str)>, name: Option<&str>| {
            wanted.is_none_or(|(not, pattern)| {
                let matches = name.is_some_and(|name| match pattern.strip_suffix('+') {
                    Some(start) => name.starts_with(start),
                    None => name == pattern,
                });
                matches != not
            })
        };
        let all = !self.never
            && address(self.from, packet.from)
            && address(self.to, packet.to)
            && interface(self.input, packet.input)
            && interface(self.output, packet.output);
        match (all, self.others) {
            (false, _) => Applies::No,
            (true, false) => Applies::Yes,
            (true, true) => Applies::Perhaps,
        }
    }
}

/// A mark, as `iptables-save` writes it: `0x4000`.
fn number(text: &str) -> Option<u32> {
    u32::from_str_radix(text.strip_prefix("0x")?, 16).ok()
}

fn net_of(text: &str) -> Option<Ipv4Net> {
    text.parse()
        .ok()
        .or_else(|| Some(Ipv4Net::from(text.parse::<Ipv4Addr>().ok()?)))
}

/// The words of a line; what stands in double quotes is one.
fn words(line: &str) -> Vec<&str> {
    let mut words = Vec::new();
    let mut rest = line.trim_start();
    while !rest.is_empty() {
        let (word, after) = match rest.strip_prefix('"').and_then(|quoted| quoted.split_once('"')) {
            Some(split) => split,
            None => rest.split_once(' ').unwrap_or((rest, "")),
        };
        words.push(word);
        rest = after.trim_start();
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAVED: &str = "\
*nat
:POSTROUTING ACCEPT [0:0]
:FLANNEL-POSTRTG - [0:0]
-A POSTROUTING -m comment --comment \"flanneld masq\" -j FLANNEL-POSTRTG
-A POSTROUTING -s 10.5.1.0/24 ! -o docker0 -j MASQUERADE
-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment \"flanneld masq\" -j RETURN
-A FLANNEL-POSTRTG -s 10.5.1.0/24 -d 10.5.0.0/16 -m comment --comment \"flanneld masq\" -j RETURN
-A FLANNEL-POSTRTG -s 10.5.0.0/16 ! -d 224.0.0.0/4 -m comment --comment \"flanneld masq\" -j MASQUERADE --random-fully
COMMIT
*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [3:252]
:DOCKER - [0:0]
-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -p tcp -j ACCEPT
-A FORWARD -o docker0 -j DOCKER
-A FORWARD -s 192.0.2.7 -g DOCKER
-A FORWARD -i veth+ -j ACCEPT
-A DOCKER -s 10.5.2.9/32 -j REJECT --reject-with icmp-port-unreachable
COMMIT
";

    fn walk(table: &str, chain: &str, from: &str, to: &str, input: &str, output: &str) -> Walk {
        let packet = Packet {
            from: from.parse().unwrap(),
            to: to.parse().unwrap(),
            input: Some(input).filter(|name| !name.is_empty()),
            output: Some(output),
        };
        Table::parse(SAVED, table).walk(chain, packet).unwrap()
    }

    #[test]
    fn who_returns_from_a_chain_meets_what_follows_its_call() {
        let walk = walk("nat", "POSTROUTING", "10.5.1.2", "10.5.2.2", "", "flannel0");
        assert_eq!(walk.verdict, "MASQUERADE");
        assert_eq!(
            walk.rule.unwrap(),
            "-A POSTROUTING -s 10.5.1.0/24 ! -o docker0 -j MASQUERADE"
        );
        let outward = self::walk("nat", "POSTROUTING", "10.5.1.2", "198.51.100.1", "", "eth0");
        assert!(outward.rule.unwrap().contains("--random-fully"));
        let local = self::walk("nat", "POSTROUTING", "10.5.1.2", "10.5.1.3", "", "docker0");
        assert_eq!((local.verdict.as_str(), local.rule), ("ACCEPT", None));
    }

    #[test]
    fn rules_for_other_packets_are_passed_and_unknown_conditions_remembered() {
        let dropped = walk("filter", "FORWARD", "10.5.1.2", "10.5.2.2", "docker0", "flannel0");
        assert_eq!((dropped.verdict.as_str(), dropped.rule), ("DROP", None));
        assert_eq!(dropped.perhaps, ["-A FORWARD -p tcp -j ACCEPT"]);
        assert_eq!(
            walk("filter", "FORWARD", "10.5.2.9", "10.5.1.2", "flannel0", "docker0").verdict,
            "REJECT"
        );
        assert_eq!(
            walk("filter", "FORWARD", "10.5.2.8", "10.5.1.2", "veth12", "eth0").verdict,
            "ACCEPT"
        );
        // Gone to, and at its end: the policy.
        assert_eq!(
            walk("filter", "FORWARD", "192.0.2.7", "10.5.1.2", "veth12", "eth0").verdict,
            "DROP"
        );
    }

    /// The nat table with these lines in a chain that POSTROUTING calls.
    fn walk_through(lines: &str) -> Walk {
        let saved = format!("*nat\n:POSTROUTING ACCEPT [0:0]\n:KUBE - [0:0]\n-A POSTROUTING -j KUBE\n{lines}COMMIT\n");
        let packet = Packet {
            from: [10, 5, 1, 2].into(),
            to: [10, 5, 2, 2].into(),
            input: None,
            output: Some("flannel0"),
        };
        Table::parse(&saved, "nat").walk("POSTROUTING", packet).unwrap()
    }

    #[test]
    fn what_nothing_has_marked_is_not_masqueraded_by_kube_proxy() {
        let walk = walk_through(
            "-A KUBE -m mark ! --mark 0x4000/0x4000 -j RETURN\n\
             -A KUBE -j MARK --set-xmark 0x4000/0x0\n\
             -A KUBE -m comment --comment \"kubernetes service traffic requiring SNAT\" -j MASQUERADE --random-fully\n",
        );
        assert_eq!((walk.verdict.as_str(), walk.rule), ("ACCEPT", None));
        assert!(walk.perhaps.is_empty(), "{:?}", walk.perhaps);
        assert_eq!(
            walk_through("-A KUBE -m mark --mark 0x1 -j MASQUERADE\n").verdict,
            "ACCEPT"
        );
    }

    #[test]
    fn after_a_rule_that_perhaps_leaves_the_chain_the_rest_of_it_is_not_certain() {
        let masquerade = "-A KUBE -j MASQUERADE";
        for leaving in [
            "-A KUBE -m set --match-set far dst -j RETURN\n",
            ":AWAY - [0:0]\n-A KUBE -p udp -g AWAY\n",
        ] {
            let walk = walk_through(&format!(
                "{leaving}{masquerade}\n-A POSTROUTING -j SNAT --to-source 192.0.2.1\n"
            ));
            // What stands behind the call is met by whoever comes back.
            assert_eq!(
                (walk.verdict.as_str(), walk.perhaps),
                ("SNAT", vec![masquerade.to_owned()])
            );
        }
        // Only the chain that is left: not the one that called it.
        let walk = walk_through("-A KUBE -p udp -j RETURN\n-A POSTROUTING -j MASQUERADE\n");
        assert_eq!((walk.verdict.as_str(), walk.perhaps.len()), ("MASQUERADE", 0));
        let walk = walk_through("-A KUBE -p udp -j ACCEPT\n-A KUBE -j MASQUERADE\n");
        assert_eq!(
            (walk.verdict.as_str(), walk.perhaps.as_slice()),
            ("MASQUERADE", ["-A KUBE -p udp -j ACCEPT".to_owned()].as_slice())
        );
    }

    #[test]
    fn a_table_that_is_not_there_does_nothing() {
        let packet = Packet {
            from: Ipv4Addr::LOCALHOST,
            to: Ipv4Addr::LOCALHOST,
            input: None,
            output: None,
        };
        assert_eq!(Table::parse(SAVED, "mangle").walk("FORWARD", packet), None);
    }
}
