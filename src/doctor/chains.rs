//! What iptables' rules do with a packet, from the text of `iptables-save`.
//!
//! Only what can be said of the first packet of a connection by its addresses and interfaces. A rule with any other condition
//! (a mark, a set, a protocol) may apply or not: the walk goes on as if it did not, and remembers it.

use std::{collections::BTreeMap, net::Ipv4Addr};

use ipnet::Ipv4Net;

/// How deep chains may lead into one another; the kernel's own limit is of this order.
const DEEPEST: usize = 16;

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
        for line in &self.0.get(chain)?.rules {
            let rule = Rule::parse(line);
            let Some(target) = rule.target else { continue };
            match rule.applies(packet) {
                Applies::No => {}
                Applies::Yes => match target {
                    "RETURN" => return None,
                    "LOG" | "NFLOG" | "MARK" | "CONNMARK" | "TCPMSS" | "CT" | "SET" | "CLASSIFY" => {}
                    other if self.0.contains_key(other) => {
                        let ended = self.follow(other, packet, perhaps, depth + 1);
                        // What was gone to and not called does not come back here.
                        if ended.is_some() || rule.goes {
                            return ended;
                        }
                    }
                    verdict => return Some((verdict.to_owned(), line.clone())),
                },
                Applies::Perhaps => {
                    if self.0.contains_key(target) {
                        let mut inside = Vec::new();
                        let ended = self.follow(target, packet, &mut inside, depth + 1);
                        perhaps.extend(ended.map(|(_, line)| line));
                        perhaps.append(&mut inside);
                    } else if target != "RETURN" {
                        perhaps.push(line.clone());
                    }
                }
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
    /// Its connection states do not have that of a first packet.
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
                "-m" => rule.others |= !matches!(value(), "comment" | "conntrack" | "state"),
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
