//! The choice of a free subnet. Pure: the leases and the dice come from outside.

use std::cmp::max;

use ipnet::IpNet;

use crate::network::{AddressPlan, Block};

/// How many free subnets take part in the draw, as in the original: enough that hosts which start at the same moment
/// seldom draw the same one, and few enough that subnets stay together.
const CANDIDATES: usize = 100;

/// Every subnet that may be handed out is taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "out of subnets: the network {network} has {exist} of them from {first} to {last}, and leases take all; release \
     those that are no longer needed (`flanneld leases list`, `flanneld leases release SUBNET`), or configure a larger \
     network, wider bounds or smaller subnets (`flanneld network set`)"
)]
pub struct OutOfSubnets {
    /// The whole overlay.
    pub network: IpNet,
    /// How many subnets may be handed out in all.
    pub exist: u128,
    /// The first of them.
    pub first: IpNet,
    /// The last of them.
    pub last: IpNet,
}

/// Chooses a subnet for a host: `previous`, the one it had before, if it fits and is free; else one of the first
/// hundred free ones, drawn with `random`, a number of which all values are equally likely.
///
/// `taken` are the subnets of all leases and reservations, in any order, of any length, of this network or not. The
/// effort is that of sorting them; it does not grow with the size of the network.
///
/// # Errors
/// Each subnet of the plan overlaps a taken one.
pub fn choose<N: Block>(
    plan: &AddressPlan<N>,
    taken: impl IntoIterator<Item = N>,
    previous: Option<N>,
    random: u64,
) -> Result<N, OutOfSubnets> {
    let mut taken: Vec<N> = taken.into_iter().collect();
    let is_free = |subnet: &N| !taken.iter().any(|other| other.overlaps(subnet));
    if let Some(previous) = previous.filter(|subnet| plan.fits(subnet)).filter(is_free) {
        return Ok(previous);
    }

    taken.sort_unstable_by_key(Block::first);
    let mut taken = taken.iter().peekable();
    let mut free = Vec::with_capacity(CANDIDATES);
    let mut next = Some(plan.min().first());
    while let Some(at) = next.filter(|at| *at <= plan.max().first() && free.len() < CANDIDATES) {
        let candidate = N::around(at, plan.subnet_len());
        while taken.next_if(|block| block.last() < at).is_some() {}
        // Blocks are equal, nested or apart, so behind the larger of the two the next candidate begins.
        let end = match taken.peek() {
            Some(block) if block.overlaps(&candidate) => max(block.last(), candidate.last()),
            _ => {
                free.push(candidate);
                candidate.last()
            }
        };
        // `None`: that was the end of the address space.
        next = end.checked_add(1);
    }
    let drawn = random.checked_rem(free.len() as u64).map(|index| free[index as usize]);
    drawn.ok_or_else(|| OutOfSubnets {
        network: plan.network().into(),
        exist: plan.count(),
        first: plan.min().into(),
        last: plan.max().into(),
    })
}

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, time::Instant};

    use ipnet::{Ipv4Net, Ipv6Net};
    use proptest::prelude::*;

    use super::*;
    use crate::network::Network;

    fn plan(json: &str) -> AddressPlan<Ipv4Net> {
        *Network::parse(json).unwrap().network.ipv4().unwrap()
    }

    fn nets(texts: &[&str]) -> Vec<Ipv4Net> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn net(text: &str) -> Ipv4Net {
        text.parse().unwrap()
    }

    #[test]
    fn the_previous_subnet_is_taken_when_it_is_free_and_fits() {
        let plan = plan(r#"{"Network":"10.5.0.0/16"}"#);
        let choose = |taken: &[&str], previous| choose(&plan, nets(taken), Some(net(previous)), 0).unwrap();
        assert_eq!(choose(&[], "10.5.34.0/24"), net("10.5.34.0/24"));
        assert_eq!(choose(&["10.5.34.0/24"], "10.5.34.0/24"), net("10.5.1.0/24"));
        assert_eq!(choose(&["10.5.34.128/25"], "10.5.34.0/24"), net("10.5.1.0/24"));
        assert_eq!(choose(&[], "10.5.0.0/24"), net("10.5.1.0/24"));
        assert_eq!(choose(&[], "10.5.34.0/25"), net("10.5.1.0/24"));
        assert_eq!(choose(&[], "10.6.34.0/24"), net("10.5.1.0/24"));
    }

    #[test]
    fn one_of_the_first_hundred_free_subnets_is_drawn() {
        let plan = plan(r#"{"Network":"10.5.0.0/16"}"#);
        let drawn: HashSet<Ipv4Net> = (0..1000)
            .map(|random| choose(&plan, nets(&["10.5.2.0/24"]), None, random).unwrap())
            .collect();
        let expected = (1..=101)
            .filter(|third| *third != 2)
            .map(|third| net(&format!("10.5.{third}.0/24")));
        assert_eq!(drawn, expected.collect());
    }

    #[test]
    fn leases_of_other_lengths_are_stepped_over() {
        let plan = plan(r#"{"Network":"10.5.0.0/16","SubnetLen":24,"SubnetMax":"10.5.17.0"}"#);
        let taken = nets(&[
            "10.5.0.0/20",
            "10.5.3.0/24",
            "10.5.16.8/29",
            "10.5.16.200/30",
            "192.0.2.0/24",
        ]);
        assert_eq!(choose(&plan, taken, None, 12345).unwrap(), net("10.5.17.0/24"));
    }

    #[test]
    fn exhaustion_says_how_many_subnets_there_are_and_what_helps() {
        let plan = plan(r#"{"Network":"10.5.0.0/28"}"#);
        let taken = nets(&["10.5.0.4/30", "10.5.0.8/30", "10.5.0.12/30"]);
        let message = choose(&plan, taken, Some(net("10.5.0.8/30")), 7)
            .unwrap_err()
            .to_string();
        for part in [
            "10.5.0.0/28 has 3 of them from 10.5.0.4/30 to 10.5.0.12/30",
            "leases release",
            "network set",
        ] {
            assert!(message.contains(part), "{message:?} lacks {part:?}");
        }
    }

    #[test]
    fn a_lease_of_everything_leaves_nothing() {
        let plan = plan(r#"{"Network":"10.5.0.0/16"}"#);
        assert!(choose(&plan, nets(&["0.0.0.0/0"]), None, 0).is_err());
    }

    #[test]
    fn the_end_of_the_address_space_is_the_end() {
        let plan = plan(r#"{"Network":"255.255.255.0/24","SubnetLen":26}"#);
        assert_eq!(
            choose(&plan, nets(&["255.255.255.64/26"]), None, 1).unwrap(),
            net("255.255.255.192/26")
        );
        let config = r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"ffff::/16"}"#;
        let plan = *Network::parse(config).unwrap().network.ipv6().unwrap();
        let all_but_first =
            (0..16).map(|bit| Ipv6Net::around(plan.network().first() | 1 << (127 - 16 - bit), 17 + bit as u8));
        assert_eq!(
            choose(&plan, all_but_first, None, 0).unwrap(),
            "ffff:0:0:1::/64".parse().unwrap()
        );
    }

    #[test]
    fn ten_thousand_leases_in_a_large_network_cost_little() {
        let plan = plan(r#"{"Network":"10.0.0.0/8","SubnetLen":30}"#);
        let taken: Vec<Ipv4Net> = (0..10_000u32)
            .rev()
            .map(|i| Ipv4Net::around((0x0a00_0004 + 4 * i).into(), 30))
            .collect();
        let start = Instant::now();
        let chosen = choose(&plan, taken, None, 0).unwrap();
        assert_eq!(chosen, net("10.0.156.68/30"));
        // A walk over each pair of subnet and lease takes minutes.
        assert!(start.elapsed().as_secs() < 2, "{:?}", start.elapsed());
    }

    proptest! {
        /// Against the obvious way to do it.
        #[test]
        fn the_candidates_are_the_first_free_ones(
            blocks in prop::collection::vec((0u32..1 << 12, 22u8..=32), 0..60), random: u64,
        ) {
            let plan = plan(r#"{"Network":"10.5.0.0/20","SubnetLen":26}"#);
            let taken: Vec<Ipv4Net> =
                blocks.iter().map(|(offset, len)| Ipv4Net::around((0x0a05_0000 + offset).into(), *len)).collect();
            let free: Vec<Ipv4Net> = plan.network().subnets(26).unwrap()
                .filter(|subnet| plan.fits(subnet) && !taken.iter().any(|block| Block::overlaps(block, subnet)))
                .collect();
            match choose(&plan, taken, None, random) {
                Ok(subnet) => prop_assert_eq!(subnet, free[(random % free.len() as u64) as usize]),
                Err(error) => { prop_assert!(free.is_empty()); prop_assert_eq!(error.exist, 63); }
            }
        }
    }
}
