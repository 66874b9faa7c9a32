//! Rules as text for `iptables-restore`, and what `iptables-save` says of them. Both its variants, nft and legacy, are the same
//! here.
//!
//! A chain of our own is replaced as a whole, in the transaction that `iptables-restore --noflush` makes of a table; the
//! built-in chain jumps to it. The jump is at the end, as the original's: what Docker and the administrator have there before
//! keeps its say.

use std::{fmt::Write, fs, str::FromStr};

use super::{
    Error, Family, Job, KUBE_PROXY_MARK, Rule, Rules, Then, When, Within,
    tool::{LOCK_PATIENCE, Tool},
};

/// The chain, as nftables calls it, that [`Variant::Nft`] has its rules for forwarded packets of IPv4 in.
pub(super) const NFT_FORWARD: &str = "ip filter FORWARD";

/// The first version with `--random-fully`, and with `--wait` for `iptables-restore`.
const RANDOM_AND_WAIT: Version = Version(1, 6, 2);

/// A version of iptables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Version(u32, u32, u32);

/// Where a variant of iptables keeps its rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Variant {
    /// In nftables.
    Nft,
    /// In tables of its own.
    Legacy,
}

/// What `iptables --version` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct About {
    version: Version,
    variant: Variant,
}

impl FromStr for About {
    type Err = ();

    /// Reads `iptables v1.8.9 (nf_tables)`. Before 1.8 there was one variant and no word about it.
    fn from_str(text: &str) -> Result<Self, ()> {
        let (_, text) = text.trim().split_once(" v").ok_or(())?;
        let (version, rest) = text.split_once(' ').unwrap_or((text, ""));
        let mut numbers = version.split('.').map(|number| number.parse::<u32>().map_err(drop));
        let mut next = || numbers.next().unwrap_or(Ok(0));
        Ok(About {
            version: Version(next()?, next()?, next()?),
            variant: if rest.contains("nf_tables") {
                Variant::Nft
            } else {
                Variant::Legacy
            },
        })
    }
}

impl Job {
    /// The table that its rules are in.
    fn table(self) -> &'static str {
        match self {
            Job::Masquerade => "nat",
            Job::Forward => "filter",
        }
    }

    /// The built-in chain that packets go through.
    fn built_in(self) -> &'static str {
        match self {
            Job::Masquerade => "POSTROUTING",
            Job::Forward => "FORWARD",
        }
    }

    /// The chain of our own.
    fn chain(self) -> &'static str {
        match self {
            Job::Masquerade => "FLANNEL-POSTRTG",
            Job::Forward => "FLANNEL-FWD",
        }
    }

    /// The rule in the built-in chain.
    fn jump(self) -> String {
        let (built_in, comment, chain) = (self.built_in(), self.comment(), self.chain());
        format!("-A {built_in} -m comment --comment \"{comment}\" -j {chain}")
    }
}

/// What `iptables-save` says of ours, for one job: its lines, word for word, without what others have there.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Found {
    /// Whether our chain is there.
    chain: bool,
    /// The rules in it.
    rules: Vec<String>,
    /// The rules in the built-in chain: the jump, and those of releases before there were chains.
    built_in: Vec<String>,
    /// Whether a rule of someone else leads to our chain.
    referenced: bool,
}

impl Found {
    fn parse(job: Job, saved: &str) -> Found {
        let chain = format!(":{} ", job.chain());
        let rule = format!("-A {} ", job.chain());
        let built_in = format!("-A {} ", job.built_in());
        let comment = format!("--comment \"{}\"", job.comment());
        let leads_to_it = |line: &str| {
            let mut words = line.split(' ').rev();
            // Nothing stands behind a target that is a chain.
            words.next() == Some(job.chain()) && matches!(words.next(), Some("-j" | "-g"))
        };
        let mut found = Found::default();
        for line in saved.lines() {
            if line.starts_with(&chain) {
                found.chain = true;
            } else if line.starts_with(&rule) {
                found.rules.push(line.to_owned());
            } else if line.starts_with(&built_in) && (leads_to_it(line) || line.contains(&comment)) {
                found.built_in.push(line.to_owned());
            } else if leads_to_it(line) {
                found.referenced = true;
            }
        }
        found
    }

    /// The lines for `iptables-restore` that make `rules` of this, and nothing else of ours; empty: it is so already, none are
    /// wanted and none are there.
    fn transaction(&self, job: Job, rules: &[Rule], random: bool) -> String {
        let mut lines = Vec::new();
        let delete = |line: &String| line.replacen("-A ", "-D ", 1);
        if rules.is_empty() {
            lines.extend(self.built_in.iter().map(delete));
            if self.chain {
                lines.push(format!("-F {}", job.chain()));
            }
            if self.chain && !self.referenced {
                lines.push(format!("-X {}", job.chain()));
            }
        } else {
            // Makes the chain, or empties it.
            lines.push(format!(":{} - [0:0]", job.chain()));
            lines.extend(rules.iter().map(|rule| render(job, rule, random)));
            let jump = job.jump();
            let kept = self.built_in.iter().position(|line| *line == jump);
            let others = self.built_in.iter().enumerate().filter(|(at, _)| Some(*at) != kept);
            lines.extend(others.map(|(_, line)| delete(line)));
            if kept.is_none() {
                lines.push(jump);
            }
        }
        if lines.is_empty() {
            return String::new();
        }
        format!("*{}\n{}\nCOMMIT\n", job.table(), lines.join("\n"))
    }

    /// Whether this can be what a transaction for `rules` leaves. What exactly a rule looks like differs between versions.
    fn is_complete(&self, rules: &[Rule]) -> bool {
        let jumps = usize::from(!rules.is_empty());
        self.rules.len() == rules.len() && self.built_in.len() == jumps
    }
}

/// A rule as `iptables-save` would write it.
fn render(job: Job, rule: &Rule, random: bool) -> String {
    let mut line = format!("-A {}", job.chain());
    let mut address = |flag: &str, within: Option<Within>| {
        // Writing to a string cannot fail.
        let _ = match within {
            Some(Within::In(net)) => write!(line, " {flag} {net}"),
            Some(Within::NotIn(net)) => write!(line, " ! {flag} {net}"),
            None => Ok(()),
        };
    };
    match rule.when {
        When::Marked => line.push_str(&format!(" -m mark --mark {KUBE_PROXY_MARK}/{KUBE_PROXY_MARK}")),
        When::Addresses(from, to) => {
            address("-s", from);
            address("-d", to);
        }
    }
    let target = match rule.then {
        Then::Return => "RETURN",
        Then::Accept => "ACCEPT",
        Then::Masquerade { fully_random } if fully_random && random => "MASQUERADE --random-fully",
        Then::Masquerade { .. } => "MASQUERADE",
    };
    line.push_str(&format!(" -m comment --comment \"{}\" -j {target}", job.comment()));
    line
}

/// What is there of ours, in one family.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Picture([Found; 2]);

/// iptables, or one of its variants by name.
#[derive(Debug, Clone)]
pub(super) struct Iptables {
    /// What stands between `iptables` and `-save`: nothing, `-nft` or `-legacy`.
    infix: &'static str,
    about: About,
}

/// Whether any variant is.
pub(super) fn is_installed() -> bool {
    let names = ["", "-legacy"].map(|infix| program(Family::V4, infix, ""));
    names.iter().any(|name| Tool::find(name).is_some())
}

impl Iptables {
    /// The one that the host uses, if it is installed.
    pub(super) async fn of_host() -> Option<Iptables> {
        let tool = Tool::find(&program(Family::V4, "", ""))?;
        let text = tool.run(&["--version"], "").await.unwrap_or_default();
        // One that says something else, or nothing, is taken for a new one; what it cannot do it will say later.
        let unknown = About {
            version: Version(u32::MAX, 0, 0),
            variant: Variant::Nft,
        };
        Some(Iptables {
            infix: "",
            about: text.parse().unwrap_or(unknown),
        })
    }

    /// A variant by its own name, if it is installed.
    pub(super) fn variant(variant: Variant) -> Option<Iptables> {
        let infix = match variant {
            Variant::Nft => "-nft",
            Variant::Legacy => "-legacy",
        };
        Tool::find(&program(Family::V4, infix, "-save"))?;
        // Only since 1.8 do variants have names.
        let version = Version(1, 8, 0);
        Some(Iptables {
            infix,
            about: About { version, variant },
        })
    }

    /// The variant that it is not.
    pub(super) fn other(&self) -> Variant {
        match self.about.variant {
            Variant::Nft => Variant::Legacy,
            Variant::Legacy => Variant::Nft,
        }
    }

    /// The variant that it is.
    pub(super) fn used(&self) -> Variant {
        self.about.variant
    }

    /// What stands between `iptables` and `-save`.
    pub(super) fn infix(&self) -> &'static str {
        self.infix
    }

    /// Which one it is.
    pub(super) fn is(&self, variant: Variant) -> bool {
        self.about.variant == variant
    }

    /// Whether its FORWARD chain of IPv4 drops what no rule accepts.
    pub(super) async fn drops_forwarded(&self) -> Result<bool, Error> {
        let table = Job::Forward.table();
        if self.is(Variant::Legacy) && !legacy_has(Family::V4, table) {
            return Ok(false);
        }
        let saved = tool(Family::V4, self.infix, "-save")?.run(&["-t", table], "").await?;
        Ok(saved.lines().any(|line| line.starts_with(":FORWARD DROP ")))
    }

    /// For the log.
    pub(super) fn describe(&self) -> &'static str {
        match self.about.variant {
            Variant::Nft => "iptables (nft)",
            Variant::Legacy => "iptables (legacy)",
        }
    }

    /// What is there.
    pub(super) async fn look(&self, family: Family) -> Result<Picture, Error> {
        let mut picture = Picture(Default::default());
        for (job, found) in Job::ALL.into_iter().zip(&mut picture.0) {
            // Asking the legacy variant for a table makes it, and each packet goes through it from then on.
            if self.is(Variant::Nft) || legacy_has(family, job.table()) {
                let save = tool(family, self.infix, "-save")?;
                *found = Found::parse(job, &save.run(&["-t", job.table()], "").await?);
            }
        }
        Ok(picture)
    }

    /// Makes `rules` of what is there.
    pub(super) async fn put(&self, picture: &Picture, rules: &Rules) -> Result<(), Error> {
        let recent = self.about.version >= RANDOM_AND_WAIT;
        let jobs = Job::ALL.into_iter().zip(&picture.0);
        let text: String = jobs
            .map(|(job, found)| found.transaction(job, rules.job(job), recent))
            .collect();
        if text.is_empty() {
            return Ok(());
        }
        let wait = format!("--wait={}", LOCK_PATIENCE.as_secs());
        let arguments = ["--noflush", &wait];
        let restore = tool(rules.family, self.infix, "-restore")?;
        restore.run(&arguments[..1 + usize::from(recent)], &text).await?;
        Ok(())
    }
}

impl Picture {
    /// Whether this can be what `rules` look like once they are there.
    pub(super) fn is_complete(&self, rules: &Rules) -> bool {
        let mut jobs = Job::ALL.into_iter().zip(&self.0);
        jobs.all(|(job, found)| found.is_complete(rules.job(job)))
    }
}

fn program(family: Family, infix: &str, suffix: &str) -> String {
    let name = match family {
        Family::V4 => "iptables",
        Family::V6 => "ip6tables",
    };
    format!("{name}{infix}{suffix}")
}

pub(super) fn tool(family: Family, infix: &str, suffix: &str) -> Result<Tool, Error> {
    let program = program(family, infix, suffix);
    Tool::find(&program).ok_or(Error::NoFamilyTool { family, program })
}

/// Whether there can be IPv4 rules of the variant: the legacy one has none before it was asked for a table.
pub(super) fn may_have_rules(variant: Variant) -> bool {
    variant == Variant::Nft || Job::ALL.into_iter().any(|job| legacy_has(Family::V4, job.table()))
}

/// Whether the legacy variant has this table.
fn legacy_has(family: Family, table: &str) -> bool {
    let file = match family {
        Family::V4 => "/proc/net/ip_tables_names",
        Family::V6 => "/proc/net/ip6_tables_names",
    };
    // There is no such file where the kernel does not have it.
    fs::read_to_string(file).is_ok_and(|names| names.lines().any(|name| name == table))
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

    const MASQUERADE: &str = "*nat
:FLANNEL-POSTRTG - [0:0]
-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment \"flanneld masq\" -j RETURN
-A FLANNEL-POSTRTG -s 10.5.34.0/24 -d 10.5.0.0/16 -m comment --comment \"flanneld masq\" -j RETURN
-A FLANNEL-POSTRTG -s 10.5.0.0/16 -d 10.5.34.0/24 -m comment --comment \"flanneld masq\" -j RETURN
-A FLANNEL-POSTRTG ! -s 10.5.0.0/16 -d 10.5.34.0/24 -m comment --comment \"flanneld masq\" -j RETURN
-A FLANNEL-POSTRTG -s 10.5.0.0/16 ! -d 224.0.0.0/4 -m comment --comment \"flanneld masq\" -j MASQUERADE --random-fully
-A FLANNEL-POSTRTG ! -s 10.5.0.0/16 -d 10.5.0.0/16 -m comment --comment \"flanneld masq\" -j MASQUERADE --random-fully
-A POSTROUTING -m comment --comment \"flanneld masq\" -j FLANNEL-POSTRTG
COMMIT
";

    const FORWARD: &str = "*filter
:FLANNEL-FWD - [0:0]
-A FLANNEL-FWD -s 10.5.0.0/16 -m comment --comment \"flanneld forward\" -j ACCEPT
-A FLANNEL-FWD -d 10.5.0.0/16 -m comment --comment \"flanneld forward\" -j ACCEPT
-A FORWARD -m comment --comment \"flanneld forward\" -j FLANNEL-FWD
COMMIT
";

    fn transaction(job: Job, saved: &str, rules: &Rules) -> String {
        Found::parse(job, saved).transaction(job, rules.job(job), true)
    }

    /// What `iptables-save` says once a transaction is done that began with nothing.
    fn saved(transaction: &str) -> String {
        let (table, rest) = transaction.split_once('\n').unwrap();
        format!("# Generated\n{table}\n:POSTROUTING ACCEPT [0:0]\n:FORWARD DROP [12:345]\n{rest}# Completed\n")
    }

    #[test]
    fn the_text_is_the_originals_rules_in_its_order() {
        assert_eq!(transaction(Job::Masquerade, "", &v4(&ALL)), MASQUERADE);
        assert_eq!(transaction(Job::Forward, "", &v4(&ALL)), FORWARD);
    }

    #[test]
    fn ipv6_has_its_own_multicast_addresses() {
        let text = transaction(Job::Masquerade, "", &v6(&ALL));
        assert!(
            text.contains("-A FLANNEL-POSTRTG -s fd00:12::/48 ! -d ff00::/8 -m comment"),
            "{text}"
        );
        assert!(
            text.contains("-s fd00:12:0:7::/64 -d fd00:12::/48 -m comment"),
            "{text}"
        );
        assert_eq!(text.lines().count(), MASQUERADE.lines().count());
    }

    #[test]
    fn ports_are_random_only_where_they_can_be_and_are_wanted() {
        let disabled = Options {
            fully_random: false,
            ..ALL
        };
        assert!(!transaction(Job::Masquerade, "", &v4(&disabled)).contains("random"));
        let old = Found::default().transaction(Job::Masquerade, v4(&ALL).job(Job::Masquerade), false);
        assert_eq!(old, MASQUERADE.replace(" --random-fully", ""));
    }

    #[test]
    fn a_jump_that_is_there_stays_where_it_is() {
        let there = saved(MASQUERADE);
        assert!(Found::parse(Job::Masquerade, &there).is_complete(v4(&ALL).job(Job::Masquerade)));
        let jump = Job::Masquerade.jump() + "\n";
        assert_eq!(
            transaction(Job::Masquerade, &there, &v4(&ALL)),
            MASQUERADE.replace(&jump, "")
        );
    }

    #[test]
    fn a_second_jump_and_rules_of_old_releases_go() {
        let there = saved(FORWARD)
            + "-A FORWARD -m comment --comment \"flanneld forward\" -j FLANNEL-FWD\n\
               -A FORWARD -s 10.9.0.0/16 -m comment --comment \"flanneld forward\" -j ACCEPT\n\
               -A FORWARD -s 10.9.0.0/16 -j ACCEPT\n-A DOCKER-USER -j FLANNEL-FWD\n";
        assert!(!Found::parse(Job::Forward, &there).is_complete(v4(&ALL).job(Job::Forward)));
        let text = transaction(Job::Forward, &there, &v4(&ALL));
        let deleted: Vec<&str> = text.lines().filter(|line| line.starts_with("-D")).collect();
        assert_eq!(
            deleted,
            [
                "-D FORWARD -m comment --comment \"flanneld forward\" -j FLANNEL-FWD",
                "-D FORWARD -s 10.9.0.0/16 -m comment --comment \"flanneld forward\" -j ACCEPT"
            ]
        );
        assert!(!text.contains("-A FORWARD"), "{text}");
    }

    #[test]
    fn rules_that_are_missing_or_doubled_are_noticed() {
        let rules = v4(&ALL);
        let rules = rules.job(Job::Masquerade);
        let there = saved(MASQUERADE);
        for line in there.lines().filter(|line| line.starts_with("-A")) {
            for changed in [
                there.replace(&format!("{line}\n"), ""),
                there.replace(line, &format!("{line}\n{line}")),
            ] {
                assert!(!Found::parse(Job::Masquerade, &changed).is_complete(rules), "{changed}");
            }
        }
    }

    #[test]
    fn the_order_of_rules_makes_a_difference_and_counters_and_others_rules_do_not() {
        let there = saved(FORWARD);
        let found = |saved: &str| Found::parse(Job::Forward, saved);
        let mut lines: Vec<&str> = there.lines().collect();
        let first = lines
            .iter()
            .position(|line| line.starts_with("-A FLANNEL-FWD"))
            .unwrap();
        lines.swap(first, first + 1);
        assert_ne!(found(&lines.join("\n")), found(&there));
        let more = there.replace("[12:345]", "[99:999]") + "-A FORWARD -j DOCKER-USER\n";
        assert_eq!(found(&more), found(&there));
    }

    #[test]
    fn what_is_not_wanted_goes_with_its_chain_unless_someone_uses_it() {
        let none = Rules::none(Family::V4);
        assert_eq!(
            transaction(Job::Forward, "*filter\n:FORWARD DROP [0:0]\nCOMMIT\n", &none),
            ""
        );
        let there = saved(FORWARD);
        assert_eq!(
            transaction(Job::Forward, &there, &none),
            "*filter\n-D FORWARD -m comment --comment \"flanneld forward\" -j FLANNEL-FWD\n-F FLANNEL-FWD\n-X FLANNEL-FWD\nCOMMIT\n"
        );
        let used = transaction(Job::Forward, &(there + "-A DOCKER-USER -j FLANNEL-FWD\n"), &none);
        assert!(used.contains("-F FLANNEL-FWD\nCOMMIT"), "{used}");
    }

    #[test]
    fn versions_are_told_apart() {
        for (text, version, variant) in [
            ("iptables v1.8.9 (nf_tables)\n", Version(1, 8, 9), Variant::Nft),
            ("iptables v1.8.10 (legacy)", Version(1, 8, 10), Variant::Legacy),
            ("iptables v1.4.21", Version(1, 4, 21), Variant::Legacy),
        ] {
            assert_eq!(text.parse(), Ok(About { version, variant }), "{text}");
        }
        assert!(Version(1, 8, 10) > RANDOM_AND_WAIT && Version(1, 6, 1) < RANDOM_AND_WAIT);
        assert_eq!("BusyBox".parse::<About>(), Err(()));
        assert_eq!("iptables vX".parse::<About>(), Err(()));
    }
}
