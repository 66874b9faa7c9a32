//! The daemon, its lease, and what it has told Docker.

use std::{net::Ipv4Addr, path::Path};

use ipnet::Ipv4Net;

use super::{Check, Group, Own, Told, registry::Facts};
use crate::{
    lease::{presence::Holder, record::Lease},
    observe::{socket::ReadError, status::Status},
};

const START: &str = "`systemctl start flanneld`; why it ended says `journalctl -u flanneld -e`";

pub(super) fn judge(
    own: &Own,
    status: &Result<Status, ReadError>,
    registry: &Facts,
    told: &Result<Told, String>,
    subnet_file: &Path,
) -> Vec<Check> {
    let mut checks = vec![daemon(status)];
    let left = status
        .as_ref()
        .ok()
        .and_then(|status| status.lease.as_ref()?.seconds_left);
    match registry.leases() {
        Some(leases) => checks.push(lease(own, leases, left)),
        None => checks.push(Check::unseen(
            Group::Lease,
            "lease",
            "the registry does not say whose subnets are whose",
        )),
    }
    if let Some(public_ip) = own.public_ip {
        checks.push(match registry.holder(public_ip) {
            Ok(holder) => claim(own, &public_ip.to_string(), holder),
            Err(why) => Check::unseen(Group::Lease, "public-ip", why),
        });
    }
    checks.push(file(own, told, subnet_file));
    checks
}

fn daemon(status: &Result<Status, ReadError>) -> Check {
    const NAME: &str = "daemon";
    match status {
        Ok(Status {
            pid,
            ready: true,
            degraded: Some(why),
            ..
        }) => Check::warn(
            Group::Lease,
            NAME,
            format!("flanneld runs as process {pid} and is ready, but {why}"),
            "packets flow by what was last known: make the registry answer, and the daemon asks it by itself whether that is still so",
        ),
        Ok(status) if status.ready => Check::ok(
            Group::Lease,
            NAME,
            format!(
                "flanneld {} runs as process {} and is ready",
                status.version, status.pid
            ),
        ),
        Ok(status) => {
            let waiting = status.waiting_for.as_deref().unwrap_or("something");
            let trouble = status.registry.trouble.as_ref();
            let trouble = trouble.map_or(String::new(), |trouble| format!(" ({trouble})"));
            Check::fail(
                Group::Lease,
                NAME,
                format!(
                    "flanneld runs as process {} and is not ready: it waits for {waiting}{trouble}",
                    status.pid
                ),
                "see the other findings; it goes on by itself when they are gone",
            )
        }
        Err(ReadError::NotRunning { path }) => Check::fail(
            Group::Lease,
            NAME,
            format!(
                "flanneld does not run on this host: nobody listens at {}",
                path.display()
            ),
            format!("{START}; a daemon with another --subnet-file or --status-socket needs the same flag here"),
        ),
        Err(error @ ReadError::Denied { .. }) => Check::fail(
            Group::Lease,
            NAME,
            error.to_string(),
            "run `flanneld doctor` as root: `sudo -E flanneld doctor`",
        ),
        Err(error @ ReadError::Failed { .. }) => Check::fail(
            Group::Lease,
            NAME,
            error.to_string(),
            "restart it: `systemctl restart flanneld`",
        ),
    }
}

/// The host's lease among all of them: of several, as where a subnet was reserved for it while it has another, that of `subnet`.
pub(super) fn held(leases: &[Lease], public_ip: Ipv4Addr, subnet: Option<Ipv4Net>) -> Option<&Lease> {
    let mut all = leases.iter().filter(|lease| lease.value.public_ip == public_ip);
    let in_use = all.clone().find(|lease| Some(lease.subnets.v4()) == subnet);
    in_use.or_else(|| all.next())
}

/// What the registry says of this host's lease.
fn lease(own: &Own, leases: &[Lease], seconds_left: Option<u64>) -> Check {
    const NAME: &str = "lease";
    let restart = "`systemctl restart flanneld`: it takes its subnet back if nobody else has it, and writes the subnet file; \
                   restart Docker if the subnet has changed";
    let Some(public_ip) = own.public_ip else {
        return Check::unseen(Group::Lease, NAME, "this host's PublicIP is not known");
    };
    let held = held(leases, public_ip, own.subnet);
    let subnets = |lease: &Lease| lease.subnets.v4();
    if let Some(lease) = held
        && own.subnet.is_none_or(|subnet| subnet == subnets(lease))
    {
        let left = match (lease.is_reservation(), seconds_left) {
            (true, _) => ", reserved".to_owned(),
            (false, Some(left)) => format!(", {} min left", left / 60),
            (false, None) => String::new(),
        };
        return Check::ok(
            Group::Lease,
            NAME,
            format!("{} is leased to PublicIP {public_ip}{left}", subnets(lease)),
        );
    }
    let taken = own
        .subnet
        .and_then(|subnet| leases.iter().find(|lease| subnets(lease) == subnet));
    match (held, own.subnet, taken) {
        (_, Some(subnet), Some(taken)) => Check::fail(
            Group::Lease,
            NAME,
            format!(
                "this host's subnet {subnet} is leased to PublicIP {}, and this host's PublicIP is {public_ip}",
                taken.value.public_ip
            ),
            format!(
                "if {} is this host as well, name its interface with --iface, or --public-ip={}; else {restart}",
                taken.value.public_ip, taken.value.public_ip
            ),
        ),
        (Some(lease), Some(subnet), None) => Check::fail(
            Group::Lease,
            NAME,
            format!(
                "this host uses {subnet}, and the registry has leased {} to it",
                subnets(lease)
            ),
            restart,
        ),
        (_, subnet, _) => Check::fail(
            Group::Lease,
            NAME,
            format!(
                "no lease of PublicIP {public_ip}{}: it has expired, was deleted, or was never taken",
                subnet.map_or(String::new(), |subnet| format!(" or of subnet {subnet}"))
            ),
            if own.running { restart } else { START },
        ),
    }
}

/// Whether another host claims this host's address.
fn claim(own: &Own, public_ip: &str, holder: Option<&Holder>) -> Check {
    const NAME: &str = "public-ip";
    let Some(holder) = holder.filter(|holder| !holder.here) else {
        return Check::ok(Group::Lease, NAME, format!("no other host has PublicIP {public_ip}"));
    };
    if holder.same_name && !own.running {
        return Check::warn(
            Group::Lease,
            NAME,
            format!(
                "hosts/{public_ip} in the registry is another daemon's, on a host of this one's name: this host before it was \
                 started anew, or another with the same PublicIP"
            ),
            "start flanneld: it waits half a minute, and then says which",
        );
    }
    Check::fail(
        Group::Lease,
        NAME,
        format!(
            "two hosts with PublicIP {public_ip}: hosts/{public_ip} in the registry is the daemon's on host {:?}",
            holder.hostname
        ),
        "usually both took the address of an interface that looks the same on each (a NAT interface, 10.0.2.15 under Vagrant or \
         VirtualBox): on both, name the interface that faces the other hosts with --iface or --iface-can-reach, or its address \
         with --public-ip",
    )
}

/// The subnet file against what the daemon and the registry say.
fn file(own: &Own, told: &Result<Told, String>, path: &Path) -> Check {
    const NAME: &str = "subnet-file";
    let restart =
        "restart flanneld, which writes it, and then Docker, which reads it: `systemctl restart flanneld docker`";
    match told {
        Err(why) => Check::fail(
            Group::Lease,
            NAME,
            format!("{why}, so that Docker cannot know this host's subnet"),
            format!("{START}; it is written when the daemon is ready. Elsewhere? --subnet-file"),
        ),
        Ok(Told {
            subnet: Some(subnet),
            mtu: Some(mtu),
            ..
        }) if own.subnet == Some(*subnet) => Check::ok(
            Group::Lease,
            NAME,
            format!("{} says {subnet}, MTU {mtu}", path.display()),
        ),
        Ok(Told { subnet, mtu, .. }) => {
            let said = |value: Option<String>| value.unwrap_or_else(|| "none".to_owned());
            Check::fail(
                Group::Lease,
                NAME,
                format!(
                    "{} says subnet {}, MTU {}, and this host's subnet is {}",
                    path.display(),
                    said(subnet.map(|subnet| subnet.to_string())),
                    said(mtu.map(|mtu| mtu.to_string())),
                    said(own.subnet.map(|subnet| subnet.to_string()))
                ),
                restart,
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::State, *};
    use crate::{
        kernel::external::External,
        lease::record::{LeaseValue, Subnets},
        registry::Revision,
    };

    fn leased(subnet: &str, public_ip: &str) -> Lease {
        Lease {
            subnets: Subnets::from_cidrs(subnet).unwrap(),
            value: LeaseValue::new(public_ip.parse().unwrap()),
            revision: Revision(1),
            created: Revision(1),
            ttl: None,
        }
    }

    fn own() -> Own {
        Own {
            running: true,
            public_ip: Some([192, 0, 2, 1].into()),
            subnet: Some("10.5.1.0/24".parse().unwrap()),
            ..Own::default()
        }
    }

    #[test]
    fn a_lease_of_our_own_is_told_from_another_hosts_and_from_none() {
        let judged = |leases: &[Lease]| {
            let check = lease(&own(), leases, None);
            (check.state, check.what)
        };
        assert_eq!(judged(&[leased("10.5.1.0/24", "192.0.2.1")]).0, State::Ok);
        for (leases, said) in [
            (vec![], "expired"),
            (vec![leased("10.5.2.0/24", "192.0.2.2")], "expired"),
            (
                vec![leased("10.5.1.0/24", "192.0.2.9")],
                "is leased to PublicIP 192.0.2.9",
            ),
            (vec![leased("10.5.7.0/24", "192.0.2.1")], "has leased 10.5.7.0/24 to it"),
        ] {
            let (state, what) = judged(&leases);
            assert_eq!(state, State::Fail);
            assert!(what.contains(said), "{what}");
        }
    }

    #[test]
    fn a_reservation_beside_the_lease_in_use_is_not_taken_for_it() {
        let leases = [leased("10.5.0.0/24", "192.0.2.1"), leased("10.5.1.0/24", "192.0.2.1")];
        let check = lease(&own(), &leases, None);
        assert_eq!(check.state, State::Ok);
        assert!(check.what.starts_with("10.5.1.0/24 "), "{check:?}");

        let gathered = |subnet: Option<&str>| {
            let told = Told {
                subnet: subnet.map(|subnet| subnet.parse().unwrap()),
                ..Told::default()
            };
            let external = External {
                index: 2,
                name: "eth0".to_owned(),
                mtu: 1500,
                address: [192, 0, 2, 1].into(),
                public_ip: [192, 0, 2, 1].into(),
            };
            let registry = super::super::registry::tests::facts(leases.to_vec(), Vec::new());
            Own::gather(None, Some(&external), &registry, Some(&told), None).subnet
        };
        assert_eq!(gathered(Some("10.5.1.0/24")), own().subnet);
        // Of no use to anybody: the first that there is.
        for other in [Some("10.5.9.0/24"), None] {
            assert_eq!(gathered(other), Some("10.5.0.0/24".parse().unwrap()));
        }
    }

    #[test]
    fn only_a_claim_from_elsewhere_is_a_second_host() {
        let holder = |here, same_name| Holder {
            hostname: "far".to_owned(),
            here,
            same_name,
        };
        let state = |own: &Own, holder: Option<Holder>| claim(own, "192.0.2.1", holder.as_ref()).state;
        let stopped = Own::default();
        assert_eq!(state(&own(), None), State::Ok);
        assert_eq!(state(&own(), Some(holder(true, true))), State::Ok);
        assert_eq!(state(&own(), Some(holder(false, true))), State::Fail);
        assert_eq!(state(&stopped, Some(holder(false, false))), State::Fail);
        // Before it was started anew, it had another boot identifier.
        assert_eq!(state(&stopped, Some(holder(false, true))), State::Warn);
    }

    #[test]
    fn what_the_registry_does_not_say_is_not_held_against_the_host() {
        let registry = super::super::registry::tests::silent();
        let not_running = ReadError::NotRunning { path: "/x".into() };
        let told = Ok(Told {
            subnet: own().subnet,
            mtu: Some(1472),
            ..Told::default()
        });
        let checks = judge(&own(), &Err(not_running), &registry, &told, Path::new("/x"));
        let states: Vec<State> = checks.iter().map(|check| check.state).collect();
        assert_eq!(states, [State::Fail, State::Warn, State::Warn, State::Ok], "{checks:?}");
    }

    #[test]
    fn a_subnet_file_of_another_subnet_is_found() {
        let told = Ok(Told::parse("FLANNEL_SUBNET=10.5.9.1/24\nFLANNEL_MTU=1472\n"));
        let check = file(&own(), &told, Path::new("/x"));
        assert_eq!(check.state, State::Fail);
        assert!(
            check.what.contains("10.5.9.0/24") && check.what.contains("10.5.1.0/24"),
            "{check:?}"
        );
    }
}
