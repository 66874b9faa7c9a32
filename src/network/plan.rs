//! How one address family of the overlay is divided among the hosts.

use std::{fmt, hash::Hash, net::IpAddr, str::FromStr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::ConfigError;

/// What IPv4 and IPv6 blocks have in common, so that dividing and choosing is written once. An address is a number here.
pub trait Block:
    Copy + Ord + Hash + fmt::Debug + fmt::Display + FromStr + Into<IpNet> + Send + Sync + sealed::Sealed + 'static
{
    /// The length of an address, in bits.
    const BITS: u8;
    /// The length of a host's subnet when the network has room for four of them.
    const USUAL_LENGTH: u8;
    /// What the configuration calls this family's keys.
    const KEYS: Keys;

    /// The block of `length` bits (at most [`Block::BITS`]) that the address lies in.
    fn around(address: u128, length: u8) -> Self;

    /// The first address.
    fn first(&self) -> u128;

    /// How many leading bits all its addresses share.
    fn length(&self) -> u8;

    /// An address as a number; `None`: it is of the other family.
    fn number(address: IpAddr) -> Option<u128>;

    /// The last address.
    fn last(&self) -> u128 {
        self.first() | host_bits::<Self>(self.length())
    }

    /// Whether the two have an address in common.
    fn overlaps(&self, other: &Self) -> bool {
        self.first() <= other.last() && other.first() <= self.last()
    }
}

/// The configuration's keys for one family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keys {
    /// The whole overlay.
    pub network: &'static str,
    /// The length of one host's subnet.
    pub subnet_len: &'static str,
    /// The first subnet to hand out.
    pub subnet_min: &'static str,
    /// The last subnet to hand out.
    pub subnet_max: &'static str,
}

impl Block for Ipv4Net {
    const BITS: u8 = 32;
    const USUAL_LENGTH: u8 = 24;
    const KEYS: Keys = Keys {
        network: "Network",
        subnet_len: "SubnetLen",
        subnet_min: "SubnetMin",
        subnet_max: "SubnetMax",
    };

    fn around(address: u128, length: u8) -> Self {
        // The numbers of IPv4 addresses have 32 bits: nothing is cut off.
        Ipv4Net::new_assert((address as u32).into(), length).trunc()
    }

    fn first(&self) -> u128 {
        self.network().to_bits().into()
    }

    fn length(&self) -> u8 {
        self.prefix_len()
    }

    fn number(address: IpAddr) -> Option<u128> {
        match address {
            IpAddr::V4(address) => Some(address.to_bits().into()),
            IpAddr::V6(_) => None,
        }
    }
}

impl Block for Ipv6Net {
    const BITS: u8 = 128;
    const USUAL_LENGTH: u8 = 64;
    const KEYS: Keys = Keys {
        network: "IPv6Network",
        subnet_len: "IPv6SubnetLen",
        subnet_min: "IPv6SubnetMin",
        subnet_max: "IPv6SubnetMax",
    };

    fn around(address: u128, length: u8) -> Self {
        Ipv6Net::new_assert(address.into(), length).trunc()
    }

    fn first(&self) -> u128 {
        self.network().to_bits()
    }

    fn length(&self) -> u8 {
        self.prefix_len()
    }

    fn number(address: IpAddr) -> Option<u128> {
        match address {
            IpAddr::V4(_) => None,
            IpAddr::V6(address) => Some(address.to_bits()),
        }
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for ipnet::Ipv4Net {}
    impl Sealed for ipnet::Ipv6Net {}
}

/// One family of the overlay: the whole, and the subnets of one length that hosts may have.
///
/// What holds: `network` is no single host's and not the whole address space; at least four subnets of at least four
/// addresses fit in it; `min` and `max` are subnets of it of the length `subnet_len`, and `min` is not after `max`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AddressPlan<N> {
    network: N,
    subnet_len: u8,
    min: N,
    max: N,
}

impl<N: Block> AddressPlan<N> {
    /// A subnet needs a host's address and a container's besides the two that are none: four addresses, two bits.
    const LONGEST_SUBNET: u8 = N::BITS - 2;
    /// The first subnet is left out, so that four is the least that leaves more than one host.
    const LONGEST_NETWORK: u8 = Self::LONGEST_SUBNET - 2;

    /// Divides `network`; what is `None` gets its default (see the module [`network`](super)).
    pub(super) fn new(
        network: N,
        subnet_len: Option<u64>,
        min: Option<IpAddr>,
        max: Option<IpAddr>,
    ) -> Result<Self, ConfigError> {
        let length = network.length();
        if length == 0 {
            return Err(ConfigError::NetworkIsEverything {
                key: N::KEYS.network,
                value: network.into(),
            });
        }
        if length > Self::LONGEST_NETWORK {
            let (key, value) = (N::KEYS.network, network.into());
            return Err(ConfigError::NetworkTooSmall {
                key,
                value,
                longest: Self::LONGEST_NETWORK,
            });
        }
        let subnet_len = match subnet_len {
            None if length + 2 <= N::USUAL_LENGTH => N::USUAL_LENGTH,
            None => length + 2,
            Some(given) => u8::try_from(given)
                .ok()
                .filter(|given| (length + 2..=Self::LONGEST_SUBNET).contains(given))
                .ok_or(ConfigError::SubnetLen {
                    key: N::KEYS.subnet_len,
                    value: given,
                    network: network.into(),
                    shortest: length + 2,
                    longest: Self::LONGEST_SUBNET,
                })?,
        };
        let size = host_bits::<N>(subnet_len) + 1;
        let bound = |key, given: Option<IpAddr>, default: u128| match given {
            None => Ok(N::around(default, subnet_len)),
            Some(address) => Self::bound(network, subnet_len, key, address),
        };
        let min = bound(N::KEYS.subnet_min, min, network.first() + size)?;
        let max = bound(N::KEYS.subnet_max, max, network.last())?;
        if min > max {
            let (min_key, max_key) = (N::KEYS.subnet_min, N::KEYS.subnet_max);
            return Err(ConfigError::MinAboveMax {
                min_key,
                min: min.into(),
                max_key,
                max: max.into(),
            });
        }
        Ok(AddressPlan {
            network,
            subnet_len,
            min,
            max,
        })
    }

    /// The subnet that begins at a `SubnetMin` or `SubnetMax`.
    fn bound(network: N, subnet_len: u8, key: &'static str, address: IpAddr) -> Result<N, ConfigError> {
        let outside = ConfigError::OutsideNetwork {
            key,
            value: address,
            network: network.into(),
        };
        let number = N::number(address)
            .filter(|n| (network.first()..=network.last()).contains(n))
            .ok_or(outside)?;
        let subnet = N::around(number, subnet_len);
        if subnet.first() != number {
            let nearest = subnet.into();
            return Err(ConfigError::OffBoundary {
                key,
                value: address,
                length: subnet_len,
                nearest,
            });
        }
        Ok(subnet)
    }

    /// The whole overlay of this family.
    pub fn network(&self) -> N {
        self.network
    }

    /// The length of each host's subnet, in bits.
    pub fn subnet_len(&self) -> u8 {
        self.subnet_len
    }

    /// The first subnet that may be handed out.
    pub fn min(&self) -> N {
        self.min
    }

    /// The last subnet that may be handed out.
    pub fn max(&self) -> N {
        self.max
    }

    /// How many subnets may be handed out; at least one.
    pub fn count(&self) -> u128 {
        ((self.max.first() - self.min.first()) >> (N::BITS - self.subnet_len)) + 1
    }

    /// Whether a host of this network may have this subnet: the right length, between the first and the last.
    pub fn fits(&self, subnet: &N) -> bool {
        subnet.length() == self.subnet_len && (self.min.first()..=self.max.first()).contains(&subnet.first())
    }
}

/// The bits of an address that are free in a block of this length.
fn host_bits<N: Block>(length: u8) -> u128 {
    // Only IPv6 and a length of 0 shifts by all 128 bits.
    1u128
        .checked_shl(u32::from(N::BITS - length))
        .map_or(u128::MAX, |size| size - 1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn plan(network: &str, subnet_len: Option<u64>) -> AddressPlan<Ipv4Net> {
        AddressPlan::new(network.parse().unwrap(), subnet_len, None, None).unwrap()
    }

    #[test]
    fn defaults_follow_the_size_of_the_network() {
        for (network, subnet_len, min, max, count) in [
            ("10.0.0.0/8", 24, "10.0.1.0/24", "10.255.255.0/24", 65_535),
            ("10.5.0.0/16", 24, "10.5.1.0/24", "10.5.255.0/24", 255),
            ("10.5.0.0/22", 24, "10.5.1.0/24", "10.5.3.0/24", 3),
            ("10.5.0.0/23", 25, "10.5.0.128/25", "10.5.1.128/25", 3),
            ("10.5.0.16/28", 30, "10.5.0.20/30", "10.5.0.28/30", 3),
        ] {
            let plan = plan(network, None);
            assert_eq!(plan.subnet_len(), subnet_len, "{network}");
            assert_eq!(
                (plan.min().to_string(), plan.max().to_string()),
                (min.into(), max.into()),
                "{network}"
            );
            assert_eq!(plan.count(), count, "{network}");
        }
    }

    #[test]
    fn ipv6_is_divided_by_the_same_rules() {
        for (network, subnet_len, min) in [
            ("fd00::/48", 64, "fd00:0:0:1::/64"),
            ("fd00::/62", 64, "fd00:0:0:1::/64"),
            ("fd00::/63", 65, "fd00:0:0:0:8000::/65"),
            ("fd00::/124", 126, "fd00::4/126"),
        ] {
            let plan = AddressPlan::<Ipv6Net>::new(network.parse().unwrap(), None, None, None).unwrap();
            assert_eq!(plan.subnet_len(), subnet_len, "{network}");
            assert_eq!(plan.min(), min.parse().unwrap(), "{network}");
        }
        assert!(AddressPlan::<Ipv6Net>::new("fd00::/125".parse().unwrap(), None, None, None).is_err());
    }

    #[test]
    fn a_subnet_fits_by_length_and_place() {
        let (min, max) = ("10.5.16.0".parse().ok(), "10.5.32.0".parse().ok());
        let plan = AddressPlan::<Ipv4Net>::new("10.5.0.0/16".parse().unwrap(), Some(20), min, max).unwrap();
        for (subnet, fits) in [
            ("10.5.16.0/20", true),
            ("10.5.32.0/20", true),
            ("10.5.0.0/20", false),
            ("10.5.48.0/20", false),
            ("10.5.16.0/21", false),
            ("10.6.16.0/20", false),
        ] {
            assert_eq!(plan.fits(&subnet.parse().unwrap()), fits, "{subnet}");
        }
        assert_eq!(plan.count(), 2);
    }

    #[test]
    fn blocks_overlap_when_one_holds_the_other() {
        let block = |text: &str| text.parse::<Ipv4Net>().unwrap();
        assert!(block("10.0.0.0/8").overlaps(&block("10.5.0.0/16")));
        assert!(block("10.5.0.0/16").overlaps(&block("10.0.0.0/8")));
        assert!(!block("10.5.0.0/24").overlaps(&block("10.5.1.0/24")));
        assert!(block("0.0.0.0/0").overlaps(&block("255.255.255.255/32")));
    }

    proptest! {
        /// Whatever is given: a plan that is made keeps what its documentation promises.
        #[test]
        fn a_plan_that_exists_is_sound(
            address: u32, length in 0u8..=32, subnet_len in prop::option::of(0u64..40),
            min in prop::option::of(any::<u16>()), max in prop::option::of(any::<u16>()),
        ) {
            let network = Ipv4Net::around(address.into(), length);
            let step = subnet_len.filter(|len| (1..=30).contains(len)).map_or(8, |len| 32 - len as u32);
            let bound = |index: Option<u16>| {
                index.map(|i| IpAddr::from((network.network().to_bits().wrapping_add(u32::from(i) << step)).to_be_bytes()))
            };
            if let Ok(plan) = AddressPlan::new(network, subnet_len, bound(min), bound(max)) {
                prop_assert!((1..=28).contains(&length));
                prop_assert!(plan.subnet_len() <= 30 && plan.subnet_len() >= length + 2);
                prop_assert!(network.contains(&plan.min()) && network.contains(&plan.max()));
                prop_assert!(plan.fits(&plan.min()) && plan.fits(&plan.max()));
                prop_assert!(plan.min() <= plan.max() && plan.count() >= 1);
            }
        }
    }
}
