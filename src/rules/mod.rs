//! Traffic rules: what leaves the overlay is masqueraded (`--ip-masq`), and what is forwarded to or from it passes
//! (`--iptables-forward-rules`).
//!
//! What is wanted is a value ([`Rules`], one for each address family), which [`iptables`] and [`nftables`] render as text and
//! put in place in one transaction. A [`Keeper`] does so at the start, looks each few seconds whether all is still there, and
//! puts it back. Nothing is taken away at the end: packets flow on while the daemon restarts.
//!
//! The rules, their order, the chains' names and the comments are the original's.

mod host;
pub mod iptables;
mod keeper;
pub mod look;
pub mod nftables;
mod tool;

use std::{io, net::IpAddr, time::Duration};

use ipnet::IpNet;

pub use self::keeper::{Keeper, Mechanism};
use crate::{lease::record::Subnets, network::Network, subnet_file::Share};

/// What the user chose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Whether to masquerade what leaves the overlay.
    pub masquerade: bool,
    /// Whether masquerading takes source ports wholly at random, where the kernel and the tool can.
    pub fully_random: bool,
    /// Whether to accept forwarded packets of the overlay.
    pub forward: bool,
    /// How often to look whether the rules are still there.
    pub resync: Duration,
}

/// Whether a program may be started to look at rules, or to change them, that asks the kernel through a raw socket: legacy
/// iptables does, also where another one is in use, since its rules are looked at.
pub fn may_ask_by_raw_socket() -> bool {
    iptables::is_installed()
}

/// An address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both.
    pub const ALL: [Family; 2] = [Family::V4, Family::V6];

    /// As people call it.
    pub fn name(self) -> &'static str {
        match self {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        }
    }

    /// All multicast addresses: RFC 5771, RFC 4291 section 2.7.
    fn multicast(self) -> IpNet {
        let (base, length) = match self {
            Family::V4 => (IpAddr::from([224, 0, 0, 0]), 4),
            Family::V6 => (IpAddr::from([0xff00, 0, 0, 0, 0, 0, 0, 0]), 8),
        };
        IpNet::new_assert(base, length)
    }
}

/// What rules are for. Each has a chain of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Job {
    /// Masquerading, where packets leave the host.
    Masquerade,
    /// Accepting what the host forwards.
    Forward,
}

impl Job {
    /// Both.
    pub const ALL: [Job; 2] = [Job::Masquerade, Job::Forward];

    /// The comment on each of its rules.
    pub fn comment(self) -> &'static str {
        match self {
            Job::Masquerade => "flanneld masq",
            Job::Forward => "flanneld forward",
        }
    }
}

/// The mark of packets that kube-proxy masquerades itself: twice would be once too often. The value is also the mask.
const KUBE_PROXY_MARK: &str = "0x4000";

/// Which packets a rule is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// Those that kube-proxy has marked, to masquerade them itself.
    Marked,
    /// Those whose addresses are so; `None`: any.
    Addresses(Option<Within>, Option<Within>),
}

/// Where an address is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Within {
    /// In the block.
    In(IpNet),
    /// Not in it.
    NotIn(IpNet),
}

/// What a rule does with its packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    /// No later rule of the chain sees them.
    Return,
    /// They pass.
    Accept,
    /// They leave with the host's address.
    Masquerade {
        /// With a source port wholly at random.
        fully_random: bool,
    },
}

/// One rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// Which packets it is for.
    pub when: When,
    /// What it does with them.
    pub then: Then,
}

/// What one family is to have; no rules: none of ours are to be there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    /// The family.
    pub family: Family,
    masquerade: Vec<Rule>,
    forward: Vec<Rule>,
}

impl Rules {
    /// For both families of a network and this host's subnets in it.
    pub fn of(options: &Options, network: &Network, subnets: &Subnets) -> [Rules; 2] {
        let v4 = network.ipv4().map(|plan| Share {
            network: plan.network().into(),
            subnet: subnets.v4().into(),
        });
        let v6 = network.ipv6().zip(subnets.v6()).map(|(plan, subnet)| Share {
            network: plan.network().into(),
            subnet: subnet.into(),
        });
        [(Family::V4, v4), (Family::V6, v6)].map(|(family, share)| Rules::for_share(options, family, share))
    }

    /// For one family; without a share of it there is nothing to do.
    pub fn for_share(options: &Options, family: Family, share: Option<Share<IpNet>>) -> Rules {
        let mut rules = Rules::none(family);
        if let Some(share) = share {
            if options.masquerade {
                rules.masquerade = masquerade(family, share, options.fully_random);
            }
            if options.forward {
                rules.forward = forward(share.network);
            }
        }
        rules
    }

    /// None at all.
    pub fn none(family: Family) -> Rules {
        Rules {
            family,
            masquerade: Vec::new(),
            forward: Vec::new(),
        }
    }

    /// Those for one job, in order.
    pub fn job(&self, job: Job) -> &[Rule] {
        match job {
            Job::Masquerade => &self.masquerade,
            Job::Forward => &self.forward,
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.masquerade.is_empty() && self.forward.is_empty()
    }
}

fn masquerade(family: Family, Share { network, subnet }: Share<IpNet>, fully_random: bool) -> Vec<Rule> {
    use Within::{In, NotIn};
    let rule = |from, to, then| Rule {
        when: When::Addresses(Some(from), Some(to)),
        then,
    };
    let masquerade = Then::Masquerade { fully_random };
    vec![
        Rule {
            when: When::Marked,
            then: Then::Return,
        },
        // Containers see one another by their own addresses.
        rule(In(subnet), In(network), Then::Return),
        rule(In(network), In(subnet), Then::Return),
        // What comes from outside to a container here has its answer come back this way by itself.
        rule(NotIn(network), In(subnet), Then::Return),
        rule(In(network), NotIn(family.multicast()), masquerade),
        // What comes from outside to a container elsewhere has to come back this way, too.
        rule(NotIn(network), In(network), masquerade),
    ]
}

fn forward(network: IpNet) -> Vec<Rule> {
    let network = Some(Within::In(network));
    [(network, None), (None, network)]
        .map(|(from, to)| Rule {
            when: When::Addresses(from, to),
            then: Then::Accept,
        })
        .to_vec()
}

/// Why rules are not in place.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing to masquerade with.
    #[error(
        "--ip-masq needs iptables or nft, and neither is installed: install the package iptables or nftables, or run without \
         --ip-masq and let Docker masquerade"
    )]
    NoTool,
    /// A family's tool is missing beside the other's.
    #[error("the network has {}, and `{program}` is not installed: install it (it is in the package iptables)", .family.name())]
    NoFamilyTool {
        /// What it would be for.
        family: Family,
        /// What was looked for on the PATH.
        program: String,
    },
    /// A tool cannot be started.
    #[error("cannot start `{command}`: is the program executable, and may this process start programs?")]
    Start {
        /// With its arguments.
        command: String,
        /// As the system says.
        source: io::Error,
    },
    /// A tool failed.
    #[error(
        "`{command}` failed ({status}): {said}; nothing was changed. Try it by hand, as root; if that \
         works, a wrapper of it may need rights that flanneld gives up: see --sandbox"
    )]
    Failed {
        /// With its arguments.
        command: String,
        /// How it ended.
        status: std::process::ExitStatus,
        /// What it wrote, on one line.
        said: String,
    },
    /// A tool hangs.
    #[error("`{command}` did not end within {limit:?}: does another program keep the lock of iptables?")]
    TimedOut {
        /// With its arguments.
        command: String,
        /// How long it was given.
        limit: Duration,
    },
    /// What was written was not there afterwards.
    #[error(
        "the {} rules were put in place and are not there: another program has changed them in the same moment, or the kernel \
         dropped them",
        .0.name()
    )]
    NotThere(Family),
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) const ALL: Options = Options {
        masquerade: true,
        fully_random: true,
        forward: true,
        resync: Duration::from_secs(5),
    };

    pub(crate) fn v4(options: &Options) -> Rules {
        let share = Share {
            network: "10.5.0.0/16".parse().unwrap(),
            subnet: "10.5.34.0/24".parse().unwrap(),
        };
        Rules::for_share(options, Family::V4, Some(share))
    }

    pub(crate) fn v6(options: &Options) -> Rules {
        let share = Share {
            network: "fd00:12::/48".parse().unwrap(),
            subnet: "fd00:12:0:7::/64".parse().unwrap(),
        };
        Rules::for_share(options, Family::V6, Some(share))
    }

    #[test]
    fn a_network_has_rules_for_the_families_that_it_has() {
        let network = |json: &str| Network::parse(json).unwrap().network;
        let subnets = |text| Subnets::from_cidrs(text).unwrap();
        let [first, second] = Rules::of(&ALL, &network(r#"{"Network":"10.5.0.0/16"}"#), &subnets("10.5.34.0/24"));
        assert_eq!((first, second), (v4(&ALL), Rules::none(Family::V6)));

        let dual = network(r#"{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:12::/48"}"#);
        let [first, second] = Rules::of(&ALL, &dual, &subnets("10.5.34.0/24,fd00:12:0:7::/64"));
        assert_eq!((first, second), (v4(&ALL), v6(&ALL)));
    }

    #[test]
    fn there_are_only_the_rules_that_were_asked_for() {
        let only_forward = v4(&Options {
            masquerade: false,
            ..ALL
        });
        assert_eq!(only_forward.job(Job::Masquerade), []);
        assert_eq!(only_forward.job(Job::Forward).len(), 2);
        let only_masquerade = v4(&Options { forward: false, ..ALL });
        assert_eq!(only_masquerade.job(Job::Masquerade).len(), 6);
        assert_eq!(only_masquerade.job(Job::Forward), []);
        assert!(Rules::for_share(&ALL, Family::V6, None).is_empty());
    }
}
