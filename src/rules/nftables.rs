//! Rules as text for `nft -f -`, and what `nft list table` says of them.
//!
//! One table for each family, `flannel-ipv4` and `flannel-ipv6`, with a chain for each job. A chain that is there is emptied and
//! filled in one transaction: to delete it and make it anew would leave packets a moment without it.

use std::fmt::Write;

use super::{Error, Family, Job, KUBE_PROXY_MARK, Rule, Rules, Then, When, Within, tool::Tool};

/// nftables' name of a family.
fn protocol(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    }
}

/// The table with its family, as commands take it.
fn table(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip flannel-ipv4",
        Family::V6 => "ip6 flannel-ipv6",
    }
}

impl Job {
    /// The chain's name.
    fn nft_chain(self) -> &'static str {
        match self {
            Job::Masquerade => "postrtg",
            Job::Forward => "forward",
        }
    }

    /// Where packets come into the chain. The priorities are those of `srcnat` and `filter`, in numbers for versions that do not
    /// know the names.
    fn hook(self) -> &'static str {
        match self {
            Job::Masquerade => "type nat hook postrouting priority 100",
            Job::Forward => "type filter hook forward priority 0",
        }
    }
}

/// What is there of ours in one family: the table as `nft` lists it; `None`: there is none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Picture(Option<String>);

impl Picture {
    fn has(&self, job: Job) -> bool {
        let chain = format!("chain {} {{", job.nft_chain());
        let lines = self.0.iter().flat_map(|table| table.lines());
        lines.into_iter().any(|line| line.trim() == chain)
    }

    /// The commands that make `rules` of this; empty: it is so already, none are wanted and there is no table.
    fn transaction(&self, rules: &Rules) -> String {
        let table = table(rules.family);
        let mut text = String::new();
        let mut command = |line: std::fmt::Arguments<'_>| {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{line}");
        };
        if rules.is_empty() {
            if self.0.is_some() {
                command(format_args!("delete table {table}"));
            }
            return text;
        }
        // Makes what is not there.
        command(format_args!("add table {table}"));
        for job in Job::ALL {
            let chain = job.nft_chain();
            let rules_of_job = rules.job(job);
            if !rules_of_job.is_empty() {
                command(format_args!(
                    "add chain {table} {chain} {{ {}; policy accept; }}",
                    job.hook()
                ));
                command(format_args!("flush chain {table} {chain}"));
                for rule in rules_of_job {
                    command(format_args!(
                        "add rule {table} {chain} {}",
                        render(rules.family, job, rule)
                    ));
                }
            } else if self.has(job) {
                command(format_args!("flush chain {table} {chain}"));
                command(format_args!("delete chain {table} {chain}"));
            }
        }
        text
    }

    /// Whether this can be what a transaction for `rules` leaves. What exactly a rule looks like differs between versions.
    pub(super) fn is_complete(&self, rules: &Rules) -> bool {
        if rules.is_empty() {
            return self.0.is_none();
        }
        let table = self.0.as_deref().unwrap_or_default();
        Job::ALL.into_iter().all(|job| {
            let comment = format!("comment \"{}\"", job.comment());
            table.matches(&comment).count() == rules.job(job).len()
        })
    }
}

fn render(family: Family, job: Job, rule: &Rule) -> String {
    let protocol = protocol(family);
    let mut words = Vec::new();
    match rule.when {
        When::Marked => words.push(format!("meta mark & {KUBE_PROXY_MARK} == {KUBE_PROXY_MARK}")),
        When::Addresses(from, to) => {
            for (field, within) in [("saddr", from), ("daddr", to)] {
                match within {
                    Some(Within::In(net)) => words.push(format!("{protocol} {field} {net}")),
                    Some(Within::NotIn(net)) => words.push(format!("{protocol} {field} != {net}")),
                    None => {}
                }
            }
        }
    }
    let verdict = match rule.then {
        Then::Return => "return",
        Then::Accept => "accept",
        Then::Masquerade { fully_random: true } => "masquerade fully-random",
        Then::Masquerade { fully_random: false } => "masquerade",
    };
    words.push(format!("{verdict} comment \"{}\"", job.comment()));
    words.join(" ")
}

/// The `nft` program.
#[derive(Debug, Clone)]
pub(super) struct Nftables(Tool);

impl Nftables {
    /// If it is installed.
    pub(super) fn find() -> Option<Nftables> {
        Tool::find("nft").map(Nftables)
    }

    /// What is there.
    pub(super) async fn look(&self, family: Family) -> Result<Picture, Error> {
        let table = table(family);
        // The list of all tables first: the message for a table that is not there differs between versions.
        let tables = self.0.run(&["list", "tables"], "").await?;
        let ours = format!("table {table}");
        if !tables.lines().any(|line| line.trim() == ours) {
            return Ok(Picture(None));
        }
        let mut arguments = vec!["list", "table"];
        arguments.extend(table.split(' '));
        Ok(Picture(Some(self.0.run(&arguments, "").await?)))
    }

    /// Makes `rules` of what is there.
    pub(super) async fn put(&self, picture: &Picture, rules: &Rules) -> Result<(), Error> {
        let text = picture.transaction(rules);
        if !text.is_empty() {
            self.0.run(&["-f", "-"], &text).await?;
        }
        Ok(())
    }

    /// A chain, but for `ours`, that drops what is forwarded, whatever other chains accept: a packet has to pass all of them.
    pub(super) async fn dropping_chain(&self, ours: Option<&str>) -> Result<Option<String>, Error> {
        Ok(dropping_chain(&self.0.run(&["list", "chains"], "").await?, ours))
    }
}

/// Finds a chain of IPv4, or of both families, at the forward hook whose policy is to drop.
fn dropping_chain(listed: &str, ours: Option<&str>) -> Option<String> {
    let (mut table, mut chain) = ("", "");
    for line in listed.lines().map(str::trim) {
        let opened = line.strip_suffix(" {").unwrap_or_default();
        if let Some(name) = opened.strip_prefix("table ") {
            table = name;
        } else if let Some(name) = opened.strip_prefix("chain ") {
            chain = name;
        } else if line.contains("hook forward") && line.contains("policy drop") {
            let sees_ipv4 = table.starts_with("ip ") || table.starts_with("inet ");
            let found = format!("{table} {chain}");
            if sees_ipv4 && ours != Some(&found) {
                return Some(found);
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            Options,
            tests::{ALL, v4, v6},
        },
        *,
    };

    const TEXT: &str = r#"add table ip flannel-ipv4
add chain ip flannel-ipv4 postrtg { type nat hook postrouting priority 100; policy accept; }
flush chain ip flannel-ipv4 postrtg
add rule ip flannel-ipv4 postrtg meta mark & 0x4000 == 0x4000 return comment "flanneld masq"
add rule ip flannel-ipv4 postrtg ip saddr 10.5.34.0/24 ip daddr 10.5.0.0/16 return comment "flanneld masq"
add rule ip flannel-ipv4 postrtg ip saddr 10.5.0.0/16 ip daddr 10.5.34.0/24 return comment "flanneld masq"
add rule ip flannel-ipv4 postrtg ip saddr != 10.5.0.0/16 ip daddr 10.5.34.0/24 return comment "flanneld masq"
add rule ip flannel-ipv4 postrtg ip saddr 10.5.0.0/16 ip daddr != 224.0.0.0/4 masquerade fully-random comment "flanneld masq"
add rule ip flannel-ipv4 postrtg ip saddr != 10.5.0.0/16 ip daddr 10.5.0.0/16 masquerade fully-random comment "flanneld masq"
add chain ip flannel-ipv4 forward { type filter hook forward priority 0; policy accept; }
flush chain ip flannel-ipv4 forward
add rule ip flannel-ipv4 forward ip saddr 10.5.0.0/16 accept comment "flanneld forward"
add rule ip flannel-ipv4 forward ip daddr 10.5.0.0/16 accept comment "flanneld forward"
"#;

    fn listed() -> Picture {
        let table = "table ip flannel-ipv4 {\n\tchain postrtg {\n\t\ttype nat hook postrouting priority srcnat; policy accept;\n\t}\n\n\
            \tchain forward {\n\t\ttype filter hook forward priority filter; policy accept;\n\t}\n}\n";
        Picture(Some(table.to_owned()))
    }

    #[test]
    fn the_text_is_the_originals_rules_in_its_order() {
        assert_eq!(Picture(None).transaction(&v4(&ALL)), TEXT);
        // The same when it is there already: nothing is deleted.
        assert_eq!(listed().transaction(&v4(&ALL)), TEXT);
    }

    #[test]
    fn ipv6_has_a_table_of_its_own() {
        let options = Options {
            fully_random: false,
            ..ALL
        };
        let text = Picture(None).transaction(&v6(&options));
        assert!(
            !text.contains("ip flannel-ipv4") && !text.contains("ip saddr"),
            "{text}"
        );
        let rule = "add rule ip6 flannel-ipv6 postrtg ip6 saddr fd00:12::/48 ip6 daddr != ff00::/8 masquerade comment \"flanneld masq\"";
        assert!(text.lines().any(|line| line == rule), "{text}");
        assert_eq!(text.lines().count(), TEXT.lines().count());
    }

    #[test]
    fn what_is_not_wanted_goes() {
        let only_forward = v4(&Options {
            masquerade: false,
            ..ALL
        });
        let text = listed().transaction(&only_forward);
        assert!(
            text.starts_with(
                "add table ip flannel-ipv4\nflush chain ip flannel-ipv4 postrtg\ndelete chain ip flannel-ipv4 postrtg\n\
                 add chain ip flannel-ipv4 forward"
            ),
            "{text}"
        );
        assert!(!Picture(None).transaction(&only_forward).contains("postrtg"));
        let none = Rules::none(Family::V4);
        assert_eq!(listed().transaction(&none), "delete table ip flannel-ipv4\n");
        assert_eq!(Picture(None).transaction(&none), "");
    }

    #[test]
    fn rules_that_are_missing_or_doubled_are_noticed() {
        let rules = v4(&ALL);
        assert!(Picture(Some(TEXT.to_owned())).is_complete(&rules));
        assert!(!Picture(None).is_complete(&rules) && !listed().is_complete(&rules));
        let last = TEXT.lines().last().unwrap();
        for changed in [TEXT.replace(last, ""), format!("{TEXT}{last}")] {
            assert!(!Picture(Some(changed)).is_complete(&rules));
        }
        assert!(Picture(None).is_complete(&Rules::none(Family::V4)));
        assert!(!listed().is_complete(&Rules::none(Family::V4)));
    }

    #[test]
    fn a_chain_that_drops_what_is_forwarded_is_found() {
        let of = |family: &str, policy: &str| {
            format!(
                "table {family} filter {{\n\tchain INPUT {{\n\t\ttype filter hook input priority filter; policy drop;\n\t}}\n\
                 \tchain FORWARD {{\n\t\ttype filter hook forward priority filter; policy {policy};\n\t}}\n}}\n"
            )
        };
        let found = |listed: &str| dropping_chain(listed, None);
        assert_eq!(found(&of("ip", "drop")).unwrap(), "ip filter FORWARD");
        assert_eq!(found(&of("inet", "drop")).unwrap(), "inet filter FORWARD");
        assert_eq!(found(&of("ip", "accept")), None);
        assert_eq!(found(&of("ip6", "drop")), None);
        assert_eq!(found(""), None);
        let both = of("ip", "drop") + &of("inet", "drop");
        assert_eq!(
            dropping_chain(&both, Some("ip filter FORWARD")).unwrap(),
            "inet filter FORWARD"
        );
    }
}
