//! Which leases are peers: what stands in the registry is written by anyone who may write there, by hand, by scripts, by hosts that
//! have another configuration, and must neither lead this host's packets astray nor take any good peer's place. Pure.

use std::{collections::BTreeMap, net::Ipv4Addr, sync::Arc};

use ipnet::{IpNet, Ipv4Net};
use tokio::sync::watch;

use super::{
    record::{BackendType, Lease, Subnets},
    watch::PeerSet,
};
use crate::network::{BackendKind, Block, Network};

/// What this host is, against which the others' leases are looked at.
#[derive(Debug, Clone)]
pub struct Screen {
    network: Network,
    own: Subnets,
    backend: BackendType,
    here: Here,
}

/// The addresses that this host's interfaces have, with the lengths of their networks. They change; whoever knows tells.
pub type Here = watch::Receiver<Vec<Ipv4Net>>;

/// Why a lease is no peer's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    /// Its host does not receive what this one sends.
    #[error("skipping peer {subnets}: its backend is {theirs}, this host's is {ours}")]
    Backend {
        /// As people write them.
        subnets: String,
        /// The lease's.
        theirs: BackendType,
        /// This host's.
        ours: BackendType,
    },
    /// No packet to it would ever come to the backend.
    #[error(
        "skipping peer {subnets} at {public_ip}: it is not in the network {network}. It is from another configuration, or was written \
         by hand; `flanneld leases release {subnets}` removes it"
    )]
    OutsideNetwork {
        /// As people write them.
        subnets: String,
        /// The lease's.
        public_ip: Ipv4Addr,
        /// Of the family in question.
        network: IpNet,
    },
    /// It claims addresses of this host's containers.
    #[error(
        "skipping peer {subnets} at {public_ip}: it claims addresses of this host's own subnet {own}, which stays this host's. \
         `flanneld leases release {subnets}` removes it"
    )]
    OverlapsOwn {
        /// As people write them.
        subnets: String,
        /// The lease's.
        public_ip: Ipv4Addr,
        /// This host's.
        own: String,
    },
    /// Two claim the same addresses.
    #[error(
        "skipping peer {subnets} at {public_ip}: it claims addresses of {other}, which {why}. `flanneld leases release {subnets}` \
         removes it"
    )]
    Overlaps {
        /// As people write them.
        subnets: String,
        /// The lease's.
        public_ip: Ipv4Addr,
        /// Whose addresses they are.
        other: String,
        /// Why they are that one's.
        why: &'static str,
    },
    /// Its subnet is where other hosts are.
    #[error(
        "skipping peer {subnets} at {public_ip}: it claims addresses among which {host} is, the host of {other}, which {why}. \
         `flanneld leases release {subnets}` removes it"
    )]
    ClaimsHost {
        /// As people write them.
        subnets: String,
        /// The lease's.
        public_ip: Ipv4Addr,
        /// The other's PublicIP.
        host: Ipv4Addr,
        /// The other's subnets.
        other: String,
        /// Why that one is believed.
        why: &'static str,
    },
    /// Nobody can be reached there.
    #[error("skipping peer {subnets}: its PublicIP {public_ip} {why}")]
    PublicIp {
        /// As people write them.
        subnets: String,
        /// The lease's.
        public_ip: Ipv4Addr,
        /// What is wrong with it.
        why: String,
    },
}

/// The leases that are served, and why the others are not.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Settled {
    /// No two of them overlap.
    pub peers: PeerSet,
    /// Those that are not.
    pub losers: Vec<(Arc<Lease>, Unfit)>,
}

impl Screen {
    /// For the host that has the lease `own`.
    pub fn new(network: &Network, own: &Lease, here: Here) -> Self {
        Self {
            network: network.clone(),
            own: own.subnets,
            backend: own.value.backend_type.clone(),
            here,
        }
    }

    /// The network that this host runs in.
    pub(super) fn network(&self) -> &Network {
        &self.network
    }

    /// Waits until this host's addresses have changed, and with them perhaps which leases are [served](Self::settle).
    pub async fn changed(&mut self) {
        if self.here.changed().await.is_err() {
            // Nobody is left who could tell.
            std::future::pending().await
        }
    }

    /// Looks at one lease, which is not this host's own, by itself.
    ///
    /// # Errors
    /// Why it is no peer's.
    pub fn check(&self, lease: &Lease) -> Result<(), Unfit> {
        let subnets = || lease.subnets.to_cidrs();
        let public_ip = lease.value.public_ip;
        if lease.value.backend_type != self.backend {
            return Err(Unfit::Backend {
                subnets: subnets(),
                theirs: lease.value.backend_type.clone(),
                ours: self.backend.clone(),
            });
        }
        if let Some(network) = self.not_around(&lease.subnets) {
            return Err(Unfit::OutsideNetwork {
                subnets: subnets(),
                public_ip,
                network,
            });
        }
        if lease.subnets.overlap(&self.own) {
            return Err(Unfit::OverlapsOwn {
                subnets: subnets(),
                public_ip,
                own: self.own.to_cidrs(),
            });
        }
        match trouble_anywhere(public_ip) {
            None => Ok(()),
            Some(why) => Err(unreachable(lease, why.to_owned())),
        }
    }

    /// The network that does not hold the subnet of its family. What a network without IPv6 has of it is nobody's business.
    fn not_around(&self, subnets: &Subnets) -> Option<IpNet> {
        let v4 = self.network.ipv4().map(|plan| plan.network());
        let v6 = self.network.ipv6().map(|plan| plan.network()).zip(subnets.v6());
        v4.filter(|network| !network.contains(&subnets.v4()))
            .map(IpNet::V4)
            .or_else(|| v6.and_then(|(network, subnet)| (!network.contains(&subnet)).then_some(IpNet::V6(network))))
    }

    /// Whether only peers' subnets are routed, each by itself, and not the whole overlay's block: with all backends but `udp`.
    fn routes_subnets(&self) -> bool {
        self.backend != BackendType::Known(BackendKind::Udp)
    }

    /// Why no other host can be reached at the address of this lease by this one.
    fn trouble_here(&self, lease: &Lease, here: &[Ipv4Net]) -> Option<String> {
        let address = lease.value.public_ip;
        if self.own.v4().contains(&address) {
            return Some(format!("is in this host's own subnet {}", self.own.v4()));
        }
        for own in here {
            if own.addr() == address {
                return Some("is an address of this host, too: packets would not leave it".to_owned());
            }
            // In networks of two (RFC 3021) and of one all addresses are hosts'.
            if own.prefix_len() <= 30 && (address == own.broadcast() || address == own.network()) {
                return Some(format!("stands for all hosts of {} (broadcast)", own.trunc()));
            }
        }
        if self.routes_subnets() {
            // The block may well be the underlay's, too: whether containers have the address, the leases say.
            let v4 = lease.subnets.v4();
            return v4
                .contains(&address)
                .then(|| format!("is in its own subnet {v4}, where containers are"));
        }
        let plan = self.network.ipv4()?;
        let number = u128::from(u32::from(address));
        let is_containers = (plan.min().first()..=plan.max().last()).contains(&number);
        // Where a network of this host's is the narrower one, the kernel goes by that.
        let is_near = || {
            here.iter()
                .any(|own| own.prefix_len() > plan.network().prefix_len() && own.contains(&address))
        };
        // Each packet to such a peer would come back to the backend in a packet of its own, and so on without end.
        (is_containers && !is_near())
            .then(|| format!("is in the overlay {} itself, where containers are", plan.network()))
    }

    /// Whether the subnet of one may hold the host of another.
    fn may_hold_hosts(&self, peers: &PeerSet) -> bool {
        let network = self.network.ipv4().map(|plan| plan.network());
        let is_inside = |lease: &Arc<Lease>| network.is_some_and(|network| network.contains(&lease.value.public_ip));
        self.routes_subnets() && peers.values().any(is_inside)
    }

    /// Of leases that [pass](Self::check) by themselves, those that are served: all whose hosts can be reached from here or, where
    /// some overlap, those that are as the network's configuration wants them before the others, and the older before the younger.
    /// Where only subnets are routed (`routes_subnets`), the address of a host counts as that host's in the same way.
    ///
    /// The outcome depends on the leases only, not on the order in which they came: all hosts of one link come to the same.
    pub fn settle(&self, leases: &PeerSet) -> Settled {
        let mut settled = Settled::default();
        let here = self.here.borrow();
        for (subnets, lease) in leases {
            match self.trouble_here(lease, &here) {
                None => {
                    settled.peers.insert(*subnets, Arc::clone(lease));
                }
                Some(why) => settled.losers.push((Arc::clone(lease), unreachable(lease, why))),
            }
        }
        if !are_apart(settled.peers.keys()) || self.may_hold_hosts(&settled.peers) {
            self.decide(&mut settled);
        }
        settled
    }

    /// Leaves only peers that do not overlap.
    fn decide(&self, settled: &mut Settled) {
        let mut ranked: Vec<Arc<Lease>> = std::mem::take(&mut settled.peers).into_values().collect();
        ranked.sort_by_key(|lease| (!lease.subnets.fit(&self.network), lease.created, lease.subnets));
        let mut taken = AllTaken::default();
        let mut hosts = BTreeMap::new();
        for lease in ranked {
            if let Some(unfit) = self.in_the_way(&lease, &taken, &hosts) {
                settled.losers.push((lease, unfit));
                continue;
            }
            taken.insert(lease.subnets);
            hosts.entry(lease.value.public_ip).or_insert(lease.subnets);
            settled.peers.insert(lease.subnets, lease);
        }
    }

    /// Why this lease cannot be served beside those that are believed before it: `taken` are their subnets, `hosts` their hosts.
    fn in_the_way(&self, lease: &Lease, taken: &AllTaken, hosts: &BTreeMap<Ipv4Addr, Subnets>) -> Option<Unfit> {
        let (subnets, public_ip) = (lease.subnets, lease.value.public_ip);
        let why = |other: &Subnets| {
            if other.fit(&self.network) && !subnets.fit(&self.network) {
                "is as the network's configuration wants subnets to be"
            } else {
                "is the older lease"
            }
        };
        if let Some(other) = taken.holder(&subnets) {
            return Some(Unfit::Overlaps {
                subnets: subnets.to_cidrs(),
                public_ip,
                other: other.to_cidrs(),
                why: why(&other),
            });
        }
        if !self.routes_subnets() {
            return None;
        }
        if let Some(other) = taken.v4.holder(&Ipv4Net::from(public_ip)) {
            let why = format!("is in the subnet {} of another peer, where containers are", other.v4());
            return Some(unreachable(lease, why));
        }
        let v4 = subnets.v4();
        let (host, other) = hosts.range(v4.network()..=v4.broadcast()).next()?;
        Some(Unfit::ClaimsHost {
            subnets: subnets.to_cidrs(),
            public_ip,
            host: *host,
            other: other.to_cidrs(),
            why: why(other),
        })
    }
}

/// Why no host at all can be reached at this address (RFC 1122 3.2.1.3, RFC 5771). 240.0.0.0/4 is reserved, but in use within some
/// clouds.
fn trouble_anywhere(address: Ipv4Addr) -> Option<&'static str> {
    if address.octets()[0] == 0 {
        Some("is no host's address")
    } else if address.is_loopback() {
        Some("is a loopback address: packets would not leave this host")
    } else if address.is_multicast() {
        Some("stands for a group of hosts (multicast)")
    } else if address.is_broadcast() {
        Some("stands for all hosts (broadcast)")
    } else {
        None
    }
}

fn unreachable(lease: &Lease, why: String) -> Unfit {
    Unfit::PublicIp {
        subnets: lease.subnets.to_cidrs(),
        public_ip: lease.value.public_ip,
        why,
    }
}

/// Adds those of `others` to the peers that overlap none of them.
pub(super) fn add_apart<'a>(peers: &mut PeerSet, others: impl Iterator<Item = &'a Arc<Lease>>) {
    let mut taken = AllTaken::default();
    peers.keys().for_each(|subnets| taken.insert(*subnets));
    for lease in others {
        if taken.holder(&lease.subnets).is_none() {
            taken.insert(lease.subnets);
            peers.insert(lease.subnets, Arc::clone(lease));
        }
    }
}

/// Whether no two overlap. `subnets` come in order.
fn are_apart<'a>(subnets: impl Iterator<Item = &'a Subnets>) -> bool {
    let mut v6 = Vec::new();
    let mut last = None;
    for subnets in subnets {
        let v4 = subnets.v4();
        // Of two that overlap one holds the other, and the wider one comes first.
        if last.is_some_and(|last| last >= v4.first()) {
            return false;
        }
        last = Some(v4.last());
        v6.extend(subnets.v6());
    }
    v6.sort_unstable();
    v6.windows(2).all(|pair| pair[0].last() < pair[1].first())
}

/// Subnets that are apart.
#[derive(Debug, Default)]
struct AllTaken {
    v4: Taken,
    v6: Taken,
}

impl AllTaken {
    /// Who has some of these.
    fn holder(&self, subnets: &Subnets) -> Option<Subnets> {
        let v6 = || subnets.v6().and_then(|net| self.v6.holder(&net));
        self.v4.holder(&subnets.v4()).or_else(v6)
    }

    fn insert(&mut self, subnets: Subnets) {
        self.v4.insert(&subnets.v4(), subnets);
        if let Some(net) = subnets.v6() {
            self.v6.insert(&net, subnets);
        }
    }
}

/// Blocks of one family that are apart, by their first address, and whose they are.
#[derive(Debug, Default)]
struct Taken(BTreeMap<u128, (u128, Subnets)>);

impl Taken {
    /// Whose block overlaps this one.
    fn holder<N: Block>(&self, block: &N) -> Option<Subnets> {
        let (_, (last, holder)) = self.0.range(..=block.last()).next_back()?;
        (*last >= block.first()).then_some(*holder)
    }

    fn insert<N: Block>(&mut self, block: &N, holder: Subnets) {
        self.0.insert(block.first(), (block.last(), holder));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        lease::record::LeaseValue,
        network::BackendKind,
        registry::{Revision, TtlId},
    };
    use proptest::prelude::*;

    const NETWORK: &str = r#"{"Network":"10.5.0.0/16"}"#;
    const DUAL: &str = r#"{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:12::/48"}"#;

    fn lease(subnets: &str, public_ip: &str, revision: i64) -> Lease {
        Lease {
            subnets: Subnets::from_cidrs(subnets).unwrap(),
            value: LeaseValue::new(public_ip.parse().unwrap()),
            // Renewed since, in the other order.
            revision: Revision(1_000 - revision),
            created: Revision(revision),
            ttl: Some(TtlId(revision)),
        }
    }

    /// Of the host with 10.5.1.0/24 at 192.0.2.1/24.
    fn screen(network: &str) -> Screen {
        let network = Network::parse(network).unwrap().network;
        let here = ["192.0.2.1/24", "10.5.1.0/32", "10.5.1.1/24", "127.0.0.1/8"];
        Screen::new(&network, &lease("10.5.1.0/24", "192.0.2.1", 1), at(&here))
    }

    fn at(addresses: &[&str]) -> Here {
        let addresses = addresses.iter().map(|net| net.parse().unwrap()).collect();
        watch::channel(addresses).1
    }

    fn reason(screen: &Screen, subnets: &str, public_ip: &str) -> Option<String> {
        let lease = lease(subnets, public_ip, 7);
        let alone = screen.check(&lease).err();
        let settled = || {
            settle(screen, &[lease])
                .losers
                .into_iter()
                .map(|(_, unfit)| unfit)
                .next()
        };
        alone.or_else(settled).map(|unfit| unfit.to_string())
    }

    #[test]
    fn a_good_lease_is_a_peers() {
        let screen = screen(NETWORK);
        for subnets in [
            "10.5.2.0/24",
            "10.5.0.0/24",
            "10.5.255.0/24",
            "10.5.2.0/25",
            "10.5.128.0/17",
        ] {
            assert_eq!(reason(&screen, subnets, "192.0.2.2"), None, "{subnets}");
        }
        for public_ip in [
            "192.0.2.254",
            "198.51.100.255",
            "198.51.100.0",
            "240.0.0.7",
            "169.254.1.1",
            "10.6.0.1",
        ] {
            assert_eq!(reason(&screen, "10.5.2.0/24", public_ip), None, "{public_ip}");
        }
    }

    #[test]
    fn subnets_outside_the_network_are_no_peers() {
        let screen = screen(NETWORK);
        for subnets in [
            "10.6.2.0/24",
            "0.0.0.0/0",
            "10.4.0.0/15",
            "192.0.2.0/24",
            "127.0.0.0/8",
            "224.0.0.0/24",
        ] {
            let reason = reason(&screen, subnets, "192.0.2.2").unwrap();
            for part in [subnets, "192.0.2.2", "10.5.0.0/16", "leases release"] {
                assert!(reason.contains(part), "{reason}");
            }
        }
    }

    #[test]
    fn this_hosts_own_subnet_is_nobody_elses_in_any_length() {
        let screen = screen(NETWORK);
        for subnets in ["10.5.1.0/25", "10.5.1.128/32", "10.5.0.0/23", "10.5.0.0/16"] {
            let reason = reason(&screen, subnets, "192.0.2.2").unwrap();
            assert!(reason.contains("own subnet 10.5.1.0/24"), "{reason}");
        }
    }

    #[test]
    fn a_public_ip_where_no_other_host_can_be_is_refused_with_the_reason() {
        let screen = screen(NETWORK);
        for (public_ip, why) in [
            ("0.0.0.0", "no host's"),
            ("0.1.2.3", "no host's"),
            ("255.255.255.255", "broadcast"),
            ("224.0.0.1", "multicast"),
            ("239.255.255.255", "multicast"),
            ("127.0.0.1", "loopback"),
            ("127.9.9.9", "loopback"),
            ("192.0.2.1", "of this host, too"),
            ("192.0.2.255", "all hosts of 192.0.2.0/24"),
            ("192.0.2.0", "all hosts of 192.0.2.0/24"),
            ("10.5.1.7", "own subnet 10.5.1.0/24"),
            ("10.5.1.255", "own subnet 10.5.1.0/24"),
            ("10.5.2.9", "in the overlay 10.5.0.0/16 itself"),
            ("10.5.255.255", "in the overlay 10.5.0.0/16 itself"),
        ] {
            let reason = reason(&screen, "10.5.2.0/24", public_ip).unwrap();
            assert!(
                reason.contains(why) && reason.contains(public_ip),
                "{public_ip}: {reason}"
            );
        }
    }

    #[test]
    fn hosts_within_the_overlays_block_are_reached_where_the_kernel_has_a_narrower_network_or_no_subnet_is() {
        let network = Network::parse(r#"{"Network":"10.5.0.0/16","SubnetMin":"10.5.16.0"}"#)
            .unwrap()
            .network;
        let own = lease("10.5.17.0/24", "10.5.1.1", 1);
        let screen = Screen::new(&network, &own, at(&["10.5.1.1/24"]));
        assert_eq!(reason(&screen, "10.5.18.0/24", "10.5.1.2"), None);
        assert_eq!(reason(&screen, "10.5.18.0/24", "10.5.3.2"), None, "below SubnetMin");
        assert!(reason(&screen, "10.5.18.0/24", "10.5.20.2").is_some());
        let near = Screen::new(&network, &own, at(&["10.5.20.1/24"]));
        assert_eq!(reason(&near, "10.5.18.0/24", "10.5.20.2"), None, "on the link");
    }

    #[test]
    fn hosts_of_a_routed_underlay_within_the_block_are_peers_where_only_subnets_are_routed() {
        let network = Network::parse(r#"{"Network":"10.0.0.0/8","SubnetMin":"10.128.0.0"}"#)
            .unwrap()
            .network;
        for kind in [BackendKind::Vxlan, BackendKind::HostGw, BackendKind::Udp] {
            let of = |subnets: &str, public_ip: &str, age: i64| {
                let mut lease = lease(subnets, public_ip, age);
                lease.value.backend_type = kind.into();
                lease
            };
            let screen = |here: &str| Screen::new(&network, &of("10.129.1.0/24", "10.20.1.7", 1), at(&[here]));
            let good = [
                // Behind a router, and below SubnetMin or not.
                of("10.129.2.0/24", "10.20.2.8", 2),
                of("10.129.3.0/24", "10.200.2.8", 3),
            ];
            for here in ["10.20.1.7/24", "10.20.1.7/8"] {
                let settled = settle(&screen(here), &good);
                let expected = if kind == BackendKind::Udp { 1 } else { 2 };
                assert_eq!(settled.peers.len(), expected, "{kind:?} {here} {:?}", settled.losers);
            }
        }
    }

    #[test]
    fn nobody_claims_the_addresses_of_an_older_peers_host_and_no_host_is_where_containers_are() {
        let network = Network::parse(r#"{"Network":"10.0.0.0/8"}"#).unwrap().network;
        let of = |subnets: &str, public_ip: &str, age: i64| {
            let mut lease = lease(subnets, public_ip, age);
            lease.value.backend_type = BackendKind::Vxlan.into();
            lease
        };
        let screen = Screen::new(&network, &of("10.129.1.0/24", "10.20.1.7", 1), at(&["10.20.1.7/24"]));
        let settled = settle(
            &screen,
            &[
                of("10.129.2.0/24", "10.20.2.8", 2),
                of("10.20.2.0/24", "10.20.3.66", 3),
                of("10.129.4.0/24", "10.129.2.66", 4),
                of("10.129.5.0/24", "10.129.5.66", 5),
            ],
        );
        assert_eq!(served(&settled), ["10.129.2.0/24"]);
        for (subnet, why) in [
            (
                "10.20.2.0/24",
                "10.20.2.8 is, the host of 10.129.2.0/24, which is the older",
            ),
            ("10.129.4.0/24", "is in the subnet 10.129.2.0/24 of another peer"),
            ("10.129.5.0/24", "is in its own subnet 10.129.5.0/24"),
        ] {
            let text = settled
                .losers
                .iter()
                .map(|(_, unfit)| unfit.to_string())
                .find(|text| text.contains(&format!("peer {subnet}")))
                .unwrap();
            assert!(text.contains(why), "{text}");
        }
    }

    #[test]
    fn another_backends_lease_is_no_peers() {
        let screen = screen(NETWORK);
        let mut other = lease("10.5.2.0/24", "192.0.2.2", 7);
        other.value.backend_type = BackendKind::Vxlan.into();
        let reason = screen.check(&other).unwrap_err().to_string();
        assert_eq!(
            reason,
            "skipping peer 10.5.2.0/24: its backend is vxlan, this host's is udp"
        );
    }

    fn settle(screen: &Screen, leases: &[Lease]) -> Settled {
        let leases = leases
            .iter()
            .map(|lease| (lease.subnets, Arc::new(lease.clone())))
            .collect();
        screen.settle(&leases)
    }

    fn served(settled: &Settled) -> Vec<String> {
        settled.peers.keys().map(Subnets::to_cidrs).collect()
    }

    #[test]
    fn of_leases_that_overlap_the_configured_length_wins_whatever_the_age() {
        let screen = screen(NETWORK);
        let settled = settle(
            &screen,
            &[
                lease("10.5.2.0/24", "192.0.2.2", 90),
                lease("10.5.2.0/25", "192.0.2.66", 3),
                lease("10.5.2.200/32", "192.0.2.66", 4),
                lease("10.5.0.0/17", "192.0.2.66", 5),
                lease("10.5.3.0/24", "192.0.2.3", 91),
            ],
        );
        assert_eq!(served(&settled), ["10.5.2.0/24", "10.5.3.0/24"]);
        assert_eq!(settled.losers.len(), 3);
        for (loser, unfit) in &settled.losers {
            let text = unfit.to_string();
            assert!(
                text.contains(&loser.subnets.to_cidrs()) && text.contains("configuration wants"),
                "{text}"
            );
        }
    }

    #[test]
    fn of_equal_claims_the_older_wins() {
        let dual = screen(DUAL);
        let settled = settle(
            &dual,
            &[
                lease("10.5.2.0/24,fd00:12:0:2::/64", "192.0.2.2", 9),
                lease("10.5.2.0/24,fd00:12:0:3::/64", "192.0.2.66", 10),
                lease("10.5.4.0/24,fd00:12:0:2::/64", "192.0.2.66", 11),
                lease("10.5.5.0/24,fd00:12:0:5::/64", "192.0.2.5", 12),
            ],
        );
        assert_eq!(
            served(&settled),
            ["10.5.2.0/24,fd00:12:0:2::/64", "10.5.5.0/24,fd00:12:0:5::/64"]
        );
        assert!(settled.losers[0].1.to_string().contains("older lease"));
        let old_length = settle(
            &screen(NETWORK),
            &[
                lease("10.5.2.0/25", "192.0.2.2", 5),
                lease("10.5.2.0/26", "192.0.2.66", 4),
            ],
        );
        assert_eq!(served(&old_length), ["10.5.2.0/26"]);
    }

    #[test]
    fn an_ipv6_subnet_outside_is_refused_and_one_in_a_network_without_ipv6_is_nobodys_business() {
        let subnets = "10.5.2.0/24,fd00:99:0:2::/64";
        let outside = reason(&screen(DUAL), subnets, "192.0.2.2").unwrap();
        assert!(outside.contains("fd00:12::/48"), "{outside}");
        assert_eq!(reason(&screen(NETWORK), subnets, "192.0.2.2"), None);
    }

    fn any_lease() -> impl Strategy<Value = Lease> {
        let v4 = (0u32..1 << 12, 20u8..=32)
            .prop_map(|(bits, len)| Ipv4Net::new_assert((0x0a05_0000 | bits << 4).into(), len));
        let v6 = prop::option::of((0u128..8, 62u8..=64)).prop_map(|v6| {
            v6.map(|(bits, len)| ipnet::Ipv6Net::new_assert((0xfd00_0012_u128 << 96 | bits << 64).into(), len))
        });
        (v4, v6, 1i64..1_000, 2u8..250).prop_map(|(v4, v6, revision, host)| Lease {
            subnets: Subnets::new(v4, v6),
            value: LeaseValue::new(Ipv4Addr::new(192, 0, 2, host)),
            revision: Revision(1_000 - revision),
            created: Revision(revision),
            ttl: None,
        })
    }

    proptest! {
        #[test]
        fn whoever_is_served_overlaps_nobody_and_each_loser_overlaps_one_that_ranks_before_it(
            leases in prop::collection::vec(any_lease(), 0..60),
        ) {
            let screen = screen(DUAL);
            let settled = settle(&screen, &leases);
            let all: PeerSet = leases.iter().map(|lease| (lease.subnets, Arc::new(lease.clone()))).collect();
            prop_assert_eq!(settled.peers.len() + settled.losers.len(), all.len());
            let served: Vec<Subnets> = settled.peers.keys().copied().collect();
            for (index, one) in served.iter().enumerate() {
                prop_assert!(served[index + 1..].iter().all(|other| !one.overlap(other)));
            }
            let rank = |lease: &Lease| (!lease.subnets.fit(&screen.network), lease.created, lease.subnets);
            for (loser, _) in &settled.losers {
                let beats = |winner: &Arc<Lease>| winner.subnets.overlap(&loser.subnets) && rank(winner) < rank(loser);
                prop_assert!(settled.peers.values().any(beats));
            }
        }
    }
}
