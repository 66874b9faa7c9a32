//! The external interface: the one that faces the other hosts, and the address that they reach this host by.
//!
//! Follows the original's choice: `--iface` and `--iface-regex` in the order given, the first that matches; else
//! `--iface-can-reach`; else, with `--public-ip` alone, the interface that has that address; else the default route's.

use std::{
    fmt::Write as _,
    io,
    net::{IpAddr, Ipv4Addr},
};

use regex::Regex;
use tracing::warn;

use super::{Error as KernelError, Kernel, Link, Path};

/// What the user asked for; all empty: the default route's interface.
#[derive(Debug, Clone, Default)]
pub struct Wish {
    /// Names or addresses of interfaces (`--iface`).
    pub interfaces: Vec<String>,
    /// Patterns tried on addresses, then on names (`--iface-regex`), after `interfaces`.
    pub patterns: Vec<Regex>,
    /// Take the interface and source address by which the kernel reaches this address (`--iface-can-reach`).
    pub can_reach: Option<IpAddr>,
    /// The address to publish (`--public-ip`), if not the interface's own.
    pub public_ip: Option<Ipv4Addr>,
}

/// The interface that was chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct External {
    /// Interface index.
    pub index: u32,
    /// Interface name.
    pub name: String,
    /// In bytes.
    pub mtu: u32,
    /// The interface's own address: the tunnel's socket is bound to it.
    pub address: Ipv4Addr,
    /// The address that other hosts send to; differs from `address` behind a NAT.
    pub public_ip: Ipv4Addr,
}

/// Why no interface was chosen.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing fits the wish.
    #[error("no network interface matches {wish}; this host has: {there}")]
    NoMatch {
        /// The flags as given.
        wish: String,
        /// What there is: names with addresses.
        there: String,
    },
    /// The wish is empty and there is no default route.
    #[error(
        "cannot choose the external interface: this host has no IPv4 default route; name an interface with --iface \
         (this host has: {there})"
    )]
    NoDefaultRoute {
        /// What there is: names with addresses.
        there: String,
    },
    /// An interface was found, but without an IPv4 address.
    #[error(
        "interface {name} has no IPv4 address: give it one, or choose another with --iface (this host has: {there})"
    )]
    NoAddress {
        /// The interface.
        name: String,
        /// What there is: names with addresses.
        there: String,
    },
    /// The interface that was chosen is no more.
    #[error("interface {name} is gone (this host has: {there})")]
    Gone {
        /// The interface.
        name: String,
        /// What there is: names with addresses.
        there: String,
    },
    /// The kernel did not answer.
    #[error(transparent)]
    Kernel(#[from] KernelError),
}

/// Chooses the external interface.
///
/// # Errors
/// Each names what was looked for and what there is.
pub fn choose(kernel: &mut Kernel, wish: &Wish) -> Result<External, Error> {
    let links = kernel.links()?;
    let path = match wish.can_reach {
        Some(target) if wish.interfaces.is_empty() && wish.patterns.is_empty() => match kernel.path_to(target) {
            Err(error) if error.io().kind() == io::ErrorKind::NetworkUnreachable => {
                return Err(Error::NoMatch {
                    wish: format!("--iface-can-reach={target}, to which there is no route"),
                    there: inventory(&links),
                });
            }
            path => Some(path?),
        },
        _ => kernel.default_route()?,
    };
    let external = select(&links, path.as_ref(), wish)?;
    // Not by the interface: hosts that are reached by routing protocols have an address of their own on it.
    if external.address.is_loopback() {
        warn!(
            "the external interface {} has the loopback address {}: other hosts cannot reach this one; name the \
             interface that faces them with --iface",
            external.name, external.address
        );
    }
    Ok(external)
}

/// What has become of the interface that was `chosen` earlier: another MTU, index or address. It stays the chosen one for
/// as long as it has its address, unless the one that was chosen `first` has its address again: that one the wish has led to.
/// When both have lost theirs the wish decides again, but not the default route: that leads elsewhere when a VPN comes up, and
/// may be gone for a moment when addresses are changed.
///
/// # Errors
/// When there is no such interface, or it has no address: it may come back.
pub fn again(kernel: &mut Kernel, wish: &Wish, chosen: &External, first: &External) -> Result<External, Error> {
    let links = kernel.links()?;
    if let Some(still) = still(&links, first).or_else(|| still(&links, chosen)) {
        return Ok(still);
    }
    let path = match wish.can_reach {
        Some(target) if wish.interfaces.is_empty() && wish.patterns.is_empty() => Some(kernel.path_to(target)?),
        _ => None,
    };
    let again = choose_again(&links, path.as_ref(), wish, chosen)?;
    // What a host gives itself when no DHCP server answers is no address that others reach it by.
    if again.address.is_link_local() && !chosen.address.is_link_local() {
        return Err(Error::NoAddress {
            name: again.name,
            there: inventory(&links),
        });
    }
    Ok(again)
}

/// The chosen interface as it is now, if it has its address.
fn still(links: &[Link], chosen: &External) -> Option<External> {
    let link = links.iter().find(|link| link.name == chosen.name)?;
    link.has(chosen.address.into()).then(|| External {
        index: link.index,
        mtu: link.mtu,
        ..chosen.clone()
    })
}

/// As [`select`], where the default route decided then the interface of that name.
fn choose_again(links: &[Link], path: Option<&Path>, wish: &Wish, chosen: &External) -> Result<External, Error> {
    let wished = !wish.interfaces.is_empty() || !wish.patterns.is_empty() || wish.can_reach.is_some();
    if wished {
        return select(links, path, wish);
    }
    let there = || inventory(links);
    let name = || chosen.name.clone();
    let link = links.iter().find(|link| link.name == chosen.name);
    let link = link.ok_or_else(|| Error::Gone {
        name: name(),
        there: there(),
    })?;
    let address = link.ipv4().ok_or_else(|| Error::NoAddress {
        name: name(),
        there: there(),
    })?;
    Ok(External {
        index: link.index,
        name: name(),
        mtu: link.mtu,
        address,
        public_ip: wish.public_ip.unwrap_or(address),
    })
}

/// The choice itself. `path`: to the address of `--iface-can-reach` if that decides, else the default route.
fn select(links: &[Link], path: Option<&Path>, wish: &Wish) -> Result<External, Error> {
    let there = || inventory(links);
    let no_match = |wish: String| Error::NoMatch { wish, there: there() };

    // The address is `None` where the link's own first one is meant.
    let (link, address) = if !wish.interfaces.is_empty() || !wish.patterns.is_empty() {
        by_name(links, wish).ok_or_else(|| no_match(wish.to_string()))?
    } else if let (Some(target), Some(path)) = (wish.can_reach, path) {
        (
            by_index(links, path.link).ok_or_else(|| no_match(format!("--iface-can-reach={target}")))?,
            path.source,
        )
    } else if let Some(link) = wish
        .public_ip
        .and_then(|ip| links.iter().find(|link| link.has(ip.into())))
    {
        (link, wish.public_ip.map(IpAddr::V4))
    } else {
        let link = path.and_then(|path| by_index(links, path.link));
        (
            link.ok_or_else(|| Error::NoDefaultRoute { there: there() })?,
            path.and_then(|path| path.source),
        )
    };
    let address = match address {
        Some(IpAddr::V4(address)) => Some(address),
        _ => link.ipv4(),
    };
    let address = address.ok_or_else(|| Error::NoAddress {
        name: link.name.clone(),
        there: there(),
    })?;
    Ok(External {
        index: link.index,
        name: link.name.clone(),
        mtu: link.mtu,
        address,
        public_ip: wish.public_ip.unwrap_or(address),
    })
}

/// The first match of `--iface`, then of `--iface-regex`; with the address that matched, if it was an address.
fn by_name<'a>(links: &'a [Link], wish: &Wish) -> Option<(&'a Link, Option<IpAddr>)> {
    let exact = wish
        .interfaces
        .iter()
        .find_map(|wanted| match wanted.parse::<IpAddr>() {
            Ok(address) => links
                .iter()
                .find(|link| link.has(address))
                .map(|link| (link, Some(address))),
            Err(_) => links.iter().find(|link| link.name == *wanted).map(|link| (link, None)),
        });
    exact.or_else(|| {
        wish.patterns.iter().find_map(|pattern| {
            let addresses = links
                .iter()
                .flat_map(|link| link.addresses.iter().map(move |net| (link, net.addr())));
            addresses
                .filter(|(_, address)| address.is_ipv4())
                .find(|(_, address)| pattern.is_match(&address.to_string()))
                .map(|(link, address)| (link, Some(address)))
                .or_else(|| {
                    links
                        .iter()
                        .find(|link| pattern.is_match(&link.name))
                        .map(|link| (link, None))
                })
        })
    })
}

fn by_index(links: &[Link], index: u32) -> Option<&Link> {
    links.iter().find(|link| link.index == index)
}

/// `eth0 (192.0.2.1), lo (127.0.0.1), eth1 (no address, down)`.
fn inventory(links: &[Link]) -> String {
    let mut text = String::new();
    for link in links {
        let separator = if text.is_empty() { "" } else { ", " };
        let mut notes: Vec<String> = link.addresses.iter().map(|net| net.addr().to_string()).collect();
        if notes.is_empty() {
            notes.push("no address".into());
        }
        if !link.up {
            notes.push("down".into());
        }
        // Writing to a String cannot fail.
        let _ = write!(text, "{separator}{} ({})", link.name, notes.join(", "));
    }
    text
}

impl std::fmt::Display for Wish {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names = self.interfaces.iter().map(|name| format!("--iface={name}"));
        let patterns = self.patterns.iter().map(|pattern| format!("--iface-regex={pattern}"));
        f.write_str(&names.chain(patterns).collect::<Vec<_>>().join(" or "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(index: u32, name: &str, addresses: &[&str]) -> Link {
        Link {
            index,
            name: name.into(),
            mtu: 1500,
            up: true,
            loopback: name == "lo",
            mac: None,
            addresses: addresses.iter().map(|net| net.parse().unwrap()).collect(),
        }
    }

    fn host() -> Vec<Link> {
        vec![
            link(1, "lo", &["127.0.0.1/8", "::1/128"]),
            link(2, "eth0", &["10.0.2.15/24", "fe80::1/64"]),
            link(3, "eth1", &["169.254.7.7/16", "192.168.64.3/24", "192.168.64.4/24"]),
            link(4, "eth2", &[]),
        ]
    }

    fn default_route() -> Path {
        Path {
            link: 2,
            gateway: None,
            source: None,
        }
    }

    fn chosen(wish: &Wish) -> (String, String, String) {
        let chosen = select(&host(), Some(&default_route()), wish).unwrap();
        (chosen.name, chosen.address.to_string(), chosen.public_ip.to_string())
    }

    fn expect(wish: Wish, name: &str, address: &str, public_ip: &str) {
        assert_eq!(
            chosen(&wish),
            (name.into(), address.into(), public_ip.into()),
            "{wish:?}"
        );
    }

    fn interfaces(names: &[&str]) -> Wish {
        Wish {
            interfaces: names.iter().map(|name| (*name).into()).collect(),
            ..Wish::default()
        }
    }

    #[test]
    fn without_a_wish_the_default_route_decides() {
        expect(Wish::default(), "eth0", "10.0.2.15", "10.0.2.15");
    }

    #[test]
    fn names_and_addresses_are_taken_and_the_first_match_wins() {
        expect(interfaces(&["eth1"]), "eth1", "192.168.64.3", "192.168.64.3");
        expect(interfaces(&["192.168.64.4"]), "eth1", "192.168.64.4", "192.168.64.4");
        expect(
            interfaces(&["wlan0", "eth1", "eth0"]),
            "eth1",
            "192.168.64.3",
            "192.168.64.3",
        );
    }

    #[test]
    fn patterns_are_tried_on_addresses_before_names_and_after_interfaces() {
        let wish = |interfaces: &[&str], pattern: &str| Wish {
            interfaces: interfaces.iter().map(|name| (*name).into()).collect(),
            patterns: vec![Regex::new(pattern).unwrap()],
            ..Wish::default()
        };
        expect(wish(&[], r"^192\.168\."), "eth1", "192.168.64.3", "192.168.64.3");
        expect(wish(&[], "^eth"), "eth0", "10.0.2.15", "10.0.2.15");
        expect(wish(&["eth1"], "^eth0$"), "eth1", "192.168.64.3", "192.168.64.3");
        expect(wish(&["wlan0"], "eth1|lo"), "lo", "127.0.0.1", "127.0.0.1");
    }

    #[test]
    fn can_reach_takes_the_kernels_interface_and_source() {
        let wish = Wish {
            can_reach: Some("192.168.64.9".parse().unwrap()),
            ..Wish::default()
        };
        let path = Path {
            link: 3,
            gateway: None,
            source: Some("192.168.64.4".parse().unwrap()),
        };
        let chosen = select(&host(), Some(&path), &wish).unwrap();
        assert_eq!(
            (chosen.name.as_str(), chosen.address.to_string().as_str()),
            ("eth1", "192.168.64.4")
        );
    }

    #[test]
    fn a_public_ip_alone_finds_its_interface_and_behind_nat_the_default_route() {
        let wish = |ip: &str| Wish {
            public_ip: Some(ip.parse().unwrap()),
            ..Wish::default()
        };
        expect(wish("192.168.64.4"), "eth1", "192.168.64.4", "192.168.64.4");
        expect(wish("203.0.113.9"), "eth0", "10.0.2.15", "203.0.113.9");
        let both = Wish {
            public_ip: Some("203.0.113.9".parse().unwrap()),
            ..interfaces(&["eth1"])
        };
        expect(both, "eth1", "192.168.64.3", "203.0.113.9");
    }

    #[test]
    fn the_chosen_interface_stays_it_for_as_long_as_it_has_its_address() {
        let chosen = select(&host(), Some(&default_route()), &Wish::default()).unwrap();
        let mut links = host();
        links[1].index = 9;
        links[1].mtu = 1400;
        links[1].addresses.insert(0, "10.0.2.99/24".parse().unwrap());
        let expected = External {
            index: 9,
            mtu: 1400,
            ..chosen.clone()
        };
        assert_eq!(still(&links, &chosen), Some(expected));
        let address = links[1].addresses.remove(1);
        assert_eq!(still(&links, &chosen), None);
        let moved = choose_again(&links, None, &Wish::default(), &chosen).unwrap();
        assert_eq!(
            (moved.index, moved.address.to_string(), moved.public_ip.to_string()),
            (9, "10.0.2.99".into(), "10.0.2.99".into())
        );
        // And it is the chosen one again when its address comes back, behind the other.
        links[1].addresses.push(address);
        assert_eq!(still(&links, &chosen).unwrap().address, chosen.address);
    }

    #[test]
    fn an_interface_that_the_default_route_chose_is_waited_for_and_no_other_is_taken() {
        let chosen = select(&host(), Some(&default_route()), &Wish::default()).unwrap();
        let mut links = host();
        links.remove(1);
        let error = choose_again(&links, None, &Wish::default(), &chosen)
            .unwrap_err()
            .to_string();
        assert!(error.contains("interface eth0 is gone"), "{error}");
        let wish = interfaces(&["eth0", "eth1"]);
        assert_eq!(choose_again(&links, None, &wish, &chosen).unwrap().name, "eth1");
    }

    #[test]
    fn errors_list_what_there_is() {
        let text = |wish: &Wish, path: Option<&Path>| select(&host(), path, wish).unwrap_err().to_string();
        let unmatched = text(&interfaces(&["wlan0", "10.9.9.9"]), None);
        assert!(unmatched.contains("--iface=wlan0 or --iface=10.9.9.9"), "{unmatched}");
        assert!(unmatched.contains("eth0 (10.0.2.15, fe80::1)"), "{unmatched}");
        assert!(unmatched.contains("eth2 (no address)"), "{unmatched}");
        assert!(text(&Wish::default(), None).contains("no IPv4 default route"));
        assert!(text(&interfaces(&["eth2"]), None).contains("interface eth2 has no IPv4 address"));
    }
}
