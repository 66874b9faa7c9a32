//! Docker's bridge.

use std::net::IpAddr;

use super::{
    Check, Group, Own, Picture,
    chains::Packet,
    forwarding::{Rules, Variant, ends},
};
use crate::kernel::Link;

/// The bridge that Docker makes.
const DOCKER_BRIDGE: &str = "docker0";

/// The bridge of this host's containers: whatever has an address of our subnet, else Docker's own.
pub(super) fn bridge<'a>(own: &Own, picture: &'a Picture) -> Option<&'a Link> {
    let device = own.device.as_ref().map(|device| device.index);
    let others = || {
        let links = picture.links.iter();
        links.filter(move |link| Some(link.index) != device && !link.name.starts_with("flannel"))
    };
    let in_subnet = others().find(|link| is_in_subnet(own, link));
    in_subnet.or_else(|| others().find(|link| link.name == DOCKER_BRIDGE))
}

fn is_in_subnet(own: &Own, link: &Link) -> bool {
    link.addresses.iter().any(|net| match net.addr() {
        IpAddr::V4(address) => own.subnet.is_some_and(|subnet| subnet.contains(&address)),
        IpAddr::V6(_) => false,
    })
}

pub(super) fn judge(own: &Own, rules: &Rules, bridge: Option<&Link>) -> Vec<Check> {
    const OPTIONS: &str = "start Docker with the options of `flanneld docker-opts -c` (scripts/mk-docker-opts.sh), for which \
                           docker.service.d/flannel.conf is a drop-in, then `systemctl restart docker`";
    let (Some(bridge), Some(subnet)) = (bridge, own.subnet) else {
        return vec![Check::ok(Group::Docker, "bridge", "no bridge of containers yet")];
    };
    let name = &bridge.name;
    let mut checks = Vec::new();
    if is_in_subnet(own, bridge) {
        checks.push(Check::ok(
            Group::Docker,
            "bridge",
            format!("{name} is in this host's subnet {subnet}"),
        ));
    } else {
        let addresses: Vec<String> = bridge.addresses.iter().map(ToString::to_string).collect();
        checks.push(Check::fail(
            Group::Docker,
            "bridge",
            format!(
                "{name} has {}, and this host's subnet is {subnet}: no other host reaches its containers",
                if addresses.is_empty() {
                    "no address".to_owned()
                } else {
                    addresses.join(", ")
                }
            ),
            OPTIONS,
        ));
    }
    checks.extend(own.mtu.map(|mtu| {
        let what = format!("{name} has MTU {}, and the overlay's is {mtu}", bridge.mtu);
        match bridge.mtu {
            same if same == mtu => Check::ok(Group::Docker, "mtu", format!("{name} has the overlay's MTU {mtu}")),
            larger if larger > mtu => Check::fail(
                Group::Docker,
                "mtu",
                format!("{what}: full packets of containers do not fit"),
                OPTIONS,
            ),
            _ => Check::warn(
                Group::Docker,
                "mtu",
                format!("{what}: it works, with smaller packets than could be"),
                OPTIONS,
            ),
        }
    }));
    checks.push(masquerade(own, rules, bridge));
    checks.extend(direct(own, rules, bridge));
    checks
}

/// Whether Docker drops what other hosts send to containers' own addresses, as it does from version 28 on (the "direct access"
/// of its packet filtering documentation).
fn direct(own: &Own, rules: &Rules, bridge: &Link) -> Option<Check> {
    let (subnet, [(_, _), (remote, input)]) = (own.subnet?, ends(own, Some(bridge))?);
    rules.tables("raw").find_map(|(variant, table)| {
        let rule = table.drop_within("PREROUTING", remote, input, subnet)?;
        let variant = variant.name;
        Some(Check::fail(
            Group::Docker,
            "direct-access",
            format!("Docker drops what other hosts send to its containers, by a rule of {variant}: `{rule}`"),
            "start dockerd with --allow-direct-routing (from Docker 28.2 on), then `systemctl restart docker`",
        ))
    })
}

/// Whether what goes from containers here to containers elsewhere keeps its source.
fn masquerade(own: &Own, rules: &Rules, bridge: &Link) -> Check {
    const NAME: &str = "masquerade";
    let Some([(from, _), (to, output)]) = ends(own, Some(bridge)) else {
        return Check::unseen(Group::Docker, NAME, "the overlay's network is not known");
    };
    let packet = Packet {
        from,
        to,
        input: None,
        output: Some(output),
    };
    for (
        Variant {
            name: variant, program, ..
        },
        table,
    ) in rules.tables("nat")
    {
        let Some(walk) = table.walk("POSTROUTING", packet) else {
            continue;
        };
        let (Some(rule), "MASQUERADE" | "SNAT") = (&walk.rule, walk.verdict.as_str()) else {
            continue;
        };
        let what = format!(
            "the sources of packets to other hosts' containers are hidden: a rule of {variant} masquerades them: `{rule}`"
        );
        let remedy = format!(
            "start Docker with --ip-masq=false, and flanneld with --ip-masq; the options of `flanneld docker-opts -c` say so. \
             For now: `{program} -t nat {}`",
            rule.replacen("-A", "-D", 1)
        );
        return match walk.perhaps.iter().find(|rule| rule.ends_with("-j ACCEPT")) {
            Some(rule) => Check::warn(
                Group::Docker,
                NAME,
                format!("{what}, unless this does: `{rule}`"),
                remedy,
            ),
            None => Check::fail(Group::Docker, NAME, what, remedy),
        };
    }
    Check::ok(
        Group::Docker,
        NAME,
        "containers' packets keep their source in the overlay",
    )
}

#[cfg(test)]
mod tests {
    use super::{
        super::{State, device::tests::link, forwarding::tests::saved},
        *,
    };

    fn own() -> Own {
        Own {
            network: Some("10.5.0.0/16".parse().unwrap()),
            subnet: Some("10.5.1.0/24".parse().unwrap()),
            mtu: Some(1472),
            device: Some(link(7, "flannel0", "10.5.1.0/32")),
            ..Own::default()
        }
    }

    fn states(links: Vec<Link>, nat: &str) -> Vec<State> {
        let picture = Picture {
            links,
            ..Picture::default()
        };
        let rules = saved(&format!("*nat\n:POSTROUTING ACCEPT [0:0]\n{nat}COMMIT\n"));
        let checks = judge(&own(), &rules, bridge(&own(), &picture));
        checks.iter().map(|check| check.state).collect()
    }

    #[test]
    fn the_bridge_in_our_subnet_counts_whatever_its_name() {
        use State::Ok;
        let tun = link(7, "flannel0", "10.5.1.0/32");
        assert_eq!(states(vec![tun.clone()], ""), [Ok]);
        let docker = link(8, "docker0", "172.17.0.1/16");
        let ours = link(9, "cbr0", "10.5.1.1/24");
        assert_eq!(states(vec![tun, docker, ours], ""), [Ok, Ok, Ok]);
    }

    #[test]
    fn a_bridge_elsewhere_or_with_another_mtu_is_wrong() {
        use State::{Fail, Ok, Warn};
        assert_eq!(states(vec![link(8, "docker0", "172.17.0.1/16")], ""), [Fail, Ok, Ok]);
        let large = Link {
            mtu: 1500,
            ..link(8, "docker0", "10.5.1.1/24")
        };
        let small = Link {
            mtu: 1400,
            ..large.clone()
        };
        assert_eq!(states(vec![large], ""), [Ok, Fail, Ok]);
        assert_eq!(states(vec![small], ""), [Ok, Warn, Ok]);
    }

    #[test]
    fn what_docker_drops_before_it_is_forwarded_is_found() {
        let checks = |raw: &str| {
            let bridge = link(8, "docker0", "10.5.1.1/24");
            let rules = saved(&format!("*raw\n:PREROUTING ACCEPT [0:0]\n{raw}COMMIT\n"));
            let checks = judge(&own(), &rules, Some(&bridge));
            let wrong = checks.into_iter().filter(|check| check.state == State::Fail);
            wrong.map(|check| check.name).collect::<Vec<_>>()
        };
        assert_eq!(
            checks("-A PREROUTING -d 10.5.1.2/32 ! -i docker0 -j DROP\n"),
            ["direct-access"]
        );
        assert!(checks("-A PREROUTING -d 10.5.1.2/32 -i eth9 -j DROP\n").is_empty());
        assert!(checks("-A PREROUTING -d 172.17.0.2/32 ! -i docker0 -j DROP\n").is_empty());
        assert!(checks("").is_empty());
    }

    #[test]
    fn dockers_masquerading_of_the_overlay_is_found() {
        use State::{Fail, Ok, Warn};
        let docker = || vec![link(8, "docker0", "10.5.1.1/24")];
        let rule = "-A POSTROUTING -s 10.5.1.0/24 ! -o docker0 -j MASQUERADE\n";
        assert_eq!(states(docker(), rule), [Ok, Ok, Fail]);
        let accepted = format!("-A POSTROUTING -d 10.5.0.0/16 -j ACCEPT\n{rule}");
        assert_eq!(states(docker(), &accepted), [Ok, Ok, Ok]);
        let perhaps = format!("-A POSTROUTING -p tcp -j ACCEPT\n{rule}");
        assert_eq!(states(docker(), &perhaps), [Ok, Ok, Warn]);
        // It is for what kube-proxy has marked, and to remove it would break services.
        let kube = "\
:KUBE-POSTROUTING - [0:0]
-A POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING -m comment --comment \"kubernetes service traffic requiring SNAT\" -j MASQUERADE --random-fully
";
        assert_eq!(states(docker(), kube), [Ok, Ok, Ok]);
    }
}
