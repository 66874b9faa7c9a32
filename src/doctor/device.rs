//! The overlay's device and routes, and what another backend has left.

use std::net::{IpAddr, Ipv4Addr};

use ipnet::{IpNet, Ipv4Net};

use super::{Check, Group, Other, Own, Picture};
use crate::{
    kernel::{Link, entries},
    network::BackendKind,
};

/// How many names a finding lists.
const MOST_NAMED: usize = 5;

/// The overlay's device: the one that the daemon names, else the one that has the subnet's own address.
pub(super) fn of_overlay<'a>(
    picture: &'a Picture,
    kind: Option<BackendKind>,
    named: Option<&str>,
    subnet: Option<Ipv4Net>,
) -> Option<&'a Link> {
    if kind == Some(BackendKind::HostGw) {
        return None;
    }
    let has_name = |link: &&Link| Some(link.name.as_str()) == named;
    let has_address = |link: &&Link| {
        let address = subnet.map(|subnet| IpAddr::V4(subnet.network()));
        link.name.starts_with("flannel") && address.is_some_and(|address| link.has(address))
    };
    // A device of another backend may still have the address.
    let fits = |link: &&Link| {
        let vxlan = picture.vxlan.iter().any(|vxlan| vxlan.link.index == link.index);
        kind.is_none_or(|kind| vxlan == (kind == BackendKind::Vxlan))
    };
    let links = || picture.links.iter();
    links()
        .find(has_name)
        .or_else(|| links().filter(fits).find(has_address))
}

pub(super) fn judge(own: &Own, picture: &Picture, others: &[Other]) -> Vec<Check> {
    let mut checks = Vec::new();
    checks.extend(device(own));
    checks.extend(routes(own, picture, others));
    checks.extend(stale(own, picture));
    checks
}

fn device(own: &Own) -> Option<Check> {
    const NAME: &str = "device";
    let kind = own.kind?;
    if kind == BackendKind::HostGw {
        return Some(Check::ok(Group::Device, NAME, "host-gw needs none"));
    }
    let restart = if own.running {
        "`systemctl restart flanneld`"
    } else {
        "`systemctl start flanneld`"
    };
    let Some(link) = &own.device else {
        return Some(Check::fail(
            Group::Device,
            NAME,
            format!("there is no device of the {} backend", kind.name()),
            format!("the daemon makes it when it starts: {restart}"),
        ));
    };
    let name = &link.name;
    if !link.up {
        return Some(Check::fail(
            Group::Device,
            NAME,
            format!("{name} is down, and its routes are gone with that"),
            format!("the daemon brings it up again within seconds while it runs: {restart} if it does not"),
        ));
    }
    Some(match own.mtu {
        Some(mtu) if mtu != link.mtu => Check::fail(
            Group::Device,
            NAME,
            format!(
                "{name} has MTU {}, and the subnet file tells containers {mtu}",
                link.mtu
            ),
            format!("`ip link set {name} mtu {mtu}`; if the interface to the other hosts has changed: {restart}"),
        ),
        _ => Check::ok(Group::Device, NAME, format!("{name} is up, MTU {}", link.mtu)),
    })
}

/// The routes that packets for the other hosts' containers need.
fn routes(own: &Own, picture: &Picture, others: &[Other]) -> Option<Check> {
    const NAME: &str = "routes";
    let restart = "`systemctl restart flanneld`; if they go again, look for what removes them: `ip monitor route`";
    let link_to = |to: Ipv4Net| {
        let mut there = picture.routes.iter().filter(|found| found.route.to == IpNet::V4(to));
        // Of several, that with the least metric.
        there.by_ref().min_by_key(|found| found.metric).map(|found| found.route)
    };
    match (own.kind?, &own.device) {
        (BackendKind::Udp, Some(device)) => {
            let network = own.network?;
            Some(match link_to(network) {
                Some(route) if route.link == device.index => {
                    Check::ok(Group::Device, NAME, format!("{network} goes to {}", device.name))
                }
                Some(route) => Check::fail(
                    Group::Device,
                    NAME,
                    format!("{network} goes to {}, not to {}", picture.name(route.link), device.name),
                    format!(
                        "`ip route del {network} dev {}`, then {restart}",
                        picture.name(route.link)
                    ),
                ),
                None => Check::fail(
                    Group::Device,
                    NAME,
                    format!("there is no route for {network} to {}", device.name),
                    format!("`ip route add {network} dev {}`, or {restart}", device.name),
                ),
            })
        }
        // Without its device there is nothing to route to.
        (BackendKind::Udp | BackendKind::Vxlan, None) => None,
        (BackendKind::Vxlan | BackendKind::HostGw, device) => {
            let carried: Vec<&Other> = others.iter().filter(|other| other.other_backend.is_none()).collect();
            let goes = |other: &&&Other| {
                link_to(other.subnet).is_some_and(|route| {
                    device.as_ref().is_some_and(|device| route.link == device.index)
                        // host-gw, and vxlan with DirectRouting.
                        || route.via == Some(other.public_ip.into())
                })
            };
            let missing: Vec<String> = carried
                .iter()
                .filter(|other| !goes(other))
                .map(|other| other.subnet.to_string())
                .collect();
            Some(if missing.is_empty() {
                Check::ok(
                    Group::Device,
                    NAME,
                    format!("each of {} other hosts has one", carried.len()),
                )
            } else {
                Check::fail(
                    Group::Device,
                    NAME,
                    format!("no route of the overlay for {}", named(&missing)),
                    restart,
                )
            })
        }
    }
}

/// `a, b and 7 more`.
fn named(all: &[String]) -> String {
    let first = all[..all.len().min(MOST_NAMED)].join(", ");
    match all.len().saturating_sub(MOST_NAMED) {
        0 => first,
        more => format!("{first} and {more} more"),
    }
}

/// VXLAN devices and routes that no daemon of this configuration makes.
fn stale(own: &Own, picture: &Picture) -> Vec<Check> {
    const NAME: &str = "left-over";
    let Some(kind) = own.kind else { return Vec::new() };
    let ours = |address: Ipv4Addr| own.network.is_some_and(|network| network.contains(&address));
    let mut checks = Vec::new();
    for vxlan in &picture.vxlan {
        let link = &vxlan.link;
        let expected = kind == BackendKind::Vxlan && own.vni.is_none_or(|vni| vni == vxlan.vni.get());
        if expected || !link.name.starts_with("flannel.") {
            continue;
        }
        let has_address = link.addresses.iter().any(|net| match net {
            IpNet::V4(net) => ours(net.addr()),
            IpNet::V6(_) => false,
        });
        let takes = picture.routes.iter().any(|found| {
            found.route.link == link.index && matches!(found.route.to, IpNet::V4(to) if ours(to.network()))
        });
        let what = format!(
            "{} is a device of the vxlan backend, and this network's is {}",
            link.name,
            kind.name()
        );
        let remedy = format!("`ip link del {}`, with which its routes go", link.name);
        checks.push(if takes || has_address {
            Check::fail(
                Group::Device,
                NAME,
                format!("{what}; it takes part of the overlay's packets"),
                remedy,
            )
        } else {
            Check::warn(Group::Device, NAME, what, remedy)
        });
    }
    let device = own.device.as_ref().map(|device| device.index);
    let removed = |link: u32| picture.vxlan.iter().any(|vxlan| vxlan.link.index == link);
    for found in &picture.routes {
        let IpNet::V4(to) = found.route.to else { continue };
        // The daemon's own, for the backends that have some; and what goes with a device that is named above.
        let ours_now = kind != BackendKind::Udp || device == Some(found.route.link);
        if found.protocol == entries::PROTOCOL && ours(to.network()) && !ours_now && !removed(found.route.link) {
            checks.push(Check::fail(
                Group::Device,
                NAME,
                format!(
                    "the route for {to} by {} was left by another backend, and takes packets from {}",
                    picture.name(found.route.link),
                    own.device.as_ref().map_or("the overlay", |device| device.name.as_str())
                ),
                format!("`ip route del {to} proto {}`", entries::PROTOCOL),
            ));
        }
    }
    if checks.is_empty() {
        checks.push(Check::ok(
            Group::Device,
            NAME,
            "no devices or routes of another backend",
        ));
    }
    checks
}

#[cfg(test)]
pub(super) mod tests {
    use super::{super::State, *};
    use crate::{
        kernel::{
            entries::{FoundRoute, Route},
            vxlan::VxlanLink,
        },
        network::Vni,
    };

    pub(crate) fn link(index: u32, name: &str, address: &str) -> Link {
        Link {
            index,
            name: name.to_owned(),
            mtu: 1472,
            up: true,
            loopback: false,
            mac: None,
            addresses: vec![address.parse().unwrap()],
        }
    }

    fn route(to: &str, link: u32, protocol: u8) -> FoundRoute {
        FoundRoute {
            route: Route {
                to: to.parse().unwrap(),
                via: None,
                link,
                onlink: false,
            },
            protocol,
            metric: 0,
            multipath: false,
        }
    }

    fn own(kind: BackendKind, device: Option<Link>) -> Own {
        Own {
            running: true,
            kind: Some(kind),
            network: Some("10.5.0.0/16".parse().unwrap()),
            subnet: Some("10.5.1.0/24".parse().unwrap()),
            mtu: Some(1472),
            device,
            ..Own::default()
        }
    }

    fn states(own: &Own, picture: &Picture, others: &[Other]) -> Vec<State> {
        judge(own, picture, others).iter().map(|check| check.state).collect()
    }

    #[test]
    fn a_device_that_is_up_with_its_route_is_well() {
        use State::{Fail, Ok};
        let tun = link(7, "flannel0", "10.5.1.0/32");
        let picture = Picture {
            links: vec![tun.clone()],
            routes: vec![route("10.5.0.0/16", 7, 0)],
            ..Picture::default()
        };
        let found = of_overlay(
            &picture,
            Some(BackendKind::Udp),
            None,
            own(BackendKind::Udp, None).subnet,
        );
        assert_eq!(found, Some(&tun));
        assert_eq!(
            states(&own(BackendKind::Udp, Some(tun.clone())), &picture, &[]),
            [Ok, Ok, Ok]
        );

        let without = Picture {
            routes: vec![route("10.5.0.0/16", 3, 3)],
            ..picture
        };
        let down = Link {
            up: false,
            ..tun.clone()
        };
        assert_eq!(
            states(&own(BackendKind::Udp, Some(down)), &without, &[]),
            [Fail, Fail, Ok]
        );
        let large = Link { mtu: 1500, ..tun };
        assert_eq!(
            states(&own(BackendKind::Udp, Some(large)), &Picture::default(), &[]),
            [Fail, Fail, Ok]
        );
        assert_eq!(
            states(&own(BackendKind::Udp, None), &Picture::default(), &[]),
            [Fail, Ok]
        );
    }

    #[test]
    fn each_peer_of_a_kernel_backend_needs_its_route() {
        use State::{Fail, Ok};
        let other = |subnet: &str, public_ip: &str| Other {
            subnet: subnet.parse().unwrap(),
            public_ip: public_ip.parse().unwrap(),
            other_backend: None,
        };
        let others = [other("10.5.2.0/24", "192.0.2.2"), other("10.5.3.0/24", "192.0.2.3")];
        let mut direct = route("10.5.3.0/24", 2, entries::PROTOCOL);
        direct.route.via = Some([192, 0, 2, 3].into());
        let mut picture = Picture {
            routes: vec![route("10.5.2.0/24", 9, entries::PROTOCOL), direct],
            ..Picture::default()
        };
        let vxlan = own(BackendKind::Vxlan, Some(link(9, "flannel.1", "10.5.1.0/32")));
        assert_eq!(states(&vxlan, &picture, &others), [Ok, Ok, Ok]);
        picture.routes.remove(0);
        assert_eq!(states(&vxlan, &picture, &others), [Ok, Fail, Ok]);
        assert!(judge(&vxlan, &picture, &others)[1].what.contains("10.5.2.0/24"));
    }

    #[test]
    fn what_another_backend_left_is_found_and_worse_when_it_takes_packets() {
        use State::{Fail, Warn};
        let tun = own(BackendKind::Udp, Some(link(7, "flannel0", "10.5.1.0/32")));
        let left = |address: &str, routes: Vec<FoundRoute>| Picture {
            vxlan: vec![VxlanLink {
                link: link(9, "flannel.1", address),
                vni: Vni::new(1).unwrap(),
                parent: None,
                local: None,
                port: 8472,
                gbp: false,
                learning: false,
            }],
            routes,
            ..Picture::default()
        };
        let last = |picture: &Picture| stale(&tun, picture).pop().unwrap().state;
        assert_eq!(last(&left("172.30.0.0/32", Vec::new())), Warn);
        assert_eq!(last(&left("10.5.1.0/32", Vec::new())), Fail);
        assert_eq!(last(&left("172.30.0.0/32", vec![route("10.5.2.0/24", 9, 85)])), Fail);
        let alone = Picture {
            routes: vec![route("10.5.2.0/24", 2, 85)],
            ..Picture::default()
        };
        assert_eq!(last(&alone), Fail);
    }
}
