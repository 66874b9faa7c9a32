//! The other hosts: whether each is reached through the overlay, and if not, why.

use std::{net::Ipv4Addr, time::Duration};

use futures_util::future::join_all;
use tokio::task::spawn_blocking;

use super::{
    Check, Group, Other, Others, Own,
    probe::{self, Echo, Port, SMALL},
};
use crate::{lease::record::Lease, network::BackendKind, observe::status::Status};

/// How many peers are asked unless all are wanted: enough to see what is wrong, and one thread each.
const MOST: usize = 50;

/// How long an answer through the overlay may take: round the world and back takes a third of that.
const OVERLAY_PATIENCE: Duration = Duration::from_secs(1);

/// How long one at the PublicIP may take: the kernel says only after three seconds that a host of its own link is not there.
const UNDERLAY_PATIENCE: Duration = Duration::from_millis(3_300);

/// The other hosts, by the registry or else by the daemon.
pub(super) fn others(own: &Own, leases: Option<&[Lease]>, status: Option<&Status>) -> Others {
    let mut others: Others = match (leases, status) {
        (Some(leases), _) => leases
            .iter()
            // A reservation of a host that is not there yet would be in vain to ask, but nothing tells it from others.
            .map(|lease| Other::of_lease(lease, own.kind))
            .collect(),
        (None, Some(status)) => {
            let peers = status.peers.iter();
            peers
                .filter_map(|peer| {
                    Some(Other {
                        subnet: peer.subnet.parse().ok()?,
                        public_ip: peer.public_ip,
                        other_backend: None,
                    })
                })
                .collect()
        }
        (None, None) => Vec::new(),
    };
    others.retain(|other| Some(other.public_ip) != own.public_ip && Some(other.subnet) != own.subnet);
    others.sort_by_key(|other| other.public_ip);
    others
}

/// How a peer answered.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Answer {
    /// Through the overlay, a small packet; `None`: not asked, since there is no device here.
    overlay: Option<Echo>,
    /// One as large as containers may send, if the small one was answered.
    large: Option<Echo>,
    /// At its PublicIP, if the overlay does not answer.
    underlay: Option<Echo>,
    /// At the backend's port, if the overlay does not answer and there is such a port.
    port: Option<Port>,
}

/// What was asked.
#[derive(Debug)]
pub(super) struct Probed {
    /// In the order of the peers; fewer of them.
    answers: Vec<Option<Answer>>,
}

impl Probed {
    pub(super) async fn look(own: &Own, others: &[Other], all: bool) -> Probed {
        let most = if all { others.len() } else { MOST };
        let asked = others.iter().take(most).map(|other| async {
            if other.other_backend.is_some() {
                return None;
            }
            Some(ask(own, other).await)
        });
        Probed {
            answers: join_all(asked).await,
        }
    }
}

/// The address through which a peer is asked: that of its device, or, with `host-gw`, that of its containers' bridge.
fn inside(own: &Own, other: &Other) -> Ipv4Addr {
    let network = other.subnet.network();
    match own.kind {
        Some(BackendKind::HostGw) => Ipv4Addr::from(u32::from(network) | 1),
        _ => network,
    }
}

async fn ask(own: &Own, other: &Other) -> Answer {
    let can = own.device.as_ref().is_some_and(|device| device.up) || own.kind == Some(BackendKind::HostGw);
    let to = inside(own, other);
    let overlay = match can {
        true => Some(blocking(move || probe::echo(to, SMALL, OVERLAY_PATIENCE), Echo::Failed).await),
        false => None,
    };
    if let Some(Echo::Answered(_)) = overlay {
        let large = match own.mtu {
            Some(mtu) => Some(blocking(move || probe::echo(to, mtu as usize, OVERLAY_PATIENCE), Echo::Failed).await),
            None => None,
        };
        return Answer {
            overlay,
            large,
            underlay: None,
            port: None,
        };
    }
    let public_ip = other.public_ip;
    let (underlay, port) = tokio::join!(
        blocking(move || probe::echo(public_ip, SMALL, UNDERLAY_PATIENCE), Echo::Failed),
        async {
            let number = own.port?;
            Some(blocking(move || probe::port(public_ip, number, UNDERLAY_PATIENCE), Port::Failed).await)
        }
    );
    Answer {
        overlay,
        large: None,
        underlay: Some(underlay),
        port,
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static, failed: fn(String) -> T) -> T {
    spawn_blocking(work)
        .await
        .unwrap_or_else(|error| failed(error.to_string()))
}

pub(super) fn judge(own: &Own, others: &[Other], probed: &Probed) -> Vec<Check> {
    if others.is_empty() {
        return vec![Check::ok(Group::Peers, "all", "no other host is known")];
    }
    let mut checks: Vec<Check> = others
        .iter()
        .zip(&probed.answers)
        .map(|(other, answer)| match answer {
            Some(answer) => peer(own, other, answer),
            None => Check::warn(
                Group::Peers,
                other.public_ip.to_string(),
                format!(
                    "{} is of backend {}, and this host's is another: they do not reach each other",
                    other.subnet,
                    other.other_backend.as_deref().unwrap_or("unknown")
                ),
                "restart flanneld there, so that it takes the configuration's backend",
            ),
        })
        .collect();
    let left = others.len().saturating_sub(probed.answers.len());
    if left > 0 {
        checks.push(Check::warn(
            Group::Peers,
            "all",
            format!("{left} more hosts were not asked"),
            "`flanneld doctor --all-peers`",
        ));
    }
    checks
}

fn peer(own: &Own, other: &Other, answer: &Answer) -> Check {
    let Other { subnet, public_ip, .. } = other;
    let name = public_ip.to_string();
    let fail = |what: String, remedy: String| Check::fail(Group::Peers, name.as_str(), what, remedy);
    if let Some(Echo::Answered(time)) = &answer.overlay {
        let mtu = own.mtu.unwrap_or_default();
        return match &answer.large {
            None | Some(Echo::Answered(_)) => Check::ok(
                Group::Peers,
                name.as_str(),
                format!(
                    "{subnet} answers in {:.1} ms{}",
                    time.as_secs_f64() * 1e3,
                    if answer.large.is_some() {
                        format!(", also to packets of {mtu} bytes")
                    } else {
                        String::new()
                    }
                ),
            ),
            Some(_) => fail(
                format!(
                    "{subnet} answers small packets and none of the MTU, {mtu} bytes: a link on the way to {public_ip} takes less \
                     than this host's interface"
                ),
                format!(
                    "find how much passes with `ping -M do -s 1400 {public_ip}`, and give the interface that MTU (`ip link set DEV \
                     mtu N`) or, with vxlan, the network (\"MTU\" in the configuration's Backend); then restart flanneld and \
                     Docker on all hosts"
                ),
            ),
        };
    }
    let through = match &answer.overlay {
        Some(Echo::Failed(why)) => format!("{subnet} cannot be asked through the overlay ({why})"),
        Some(_) => format!("{subnet} does not answer through the overlay"),
        None => format!("{subnet} was not asked through the overlay, of which there is no device here"),
    };
    let port = own.port.unwrap_or_default();
    let start = format!(
        "on {public_ip}: `systemctl start flanneld`, and `flanneld doctor` there; why it ended says `journalctl -u flanneld -e`"
    );
    match (&answer.underlay, &answer.port) {
        (_, Some(Port::Refused)) => fail(
            format!(
                "{through}; {public_ip} is up, and nothing listens on its UDP port {port}: flanneld does not run there"
            ),
            start,
        ),
        (Some(Echo::Answered(_)), Some(_)) if answer.overlay.is_some() => fail(
            format!(
                "{through}; {public_ip} answers pings, so that a firewall drops UDP port {port} between the two hosts, in one \
                 direction or both"
            ),
            format!(
                "on both hosts `iptables -I INPUT -p udp --dport {port} -j ACCEPT` (firewalld: `firewall-cmd --add-port={port}/udp`), \
                 and UDP {port} both ways in the cloud's security groups; then `flanneld doctor` on {public_ip}, too"
            ),
        ),
        (Some(Echo::Answered(_)), Some(_)) => Check::warn(
            Group::Peers,
            name.as_str(),
            format!("{through}; {public_ip} answers pings"),
            "mend what is wrong here first",
        ),
        // host-gw: there is no port, and the bridge is there only once Docker runs.
        (Some(Echo::Answered(_)), None) => Check::warn(
            Group::Peers,
            name.as_str(),
            format!(
                "{}; {public_ip} answers pings",
                through.replace("through the overlay", "at its bridge's address")
            ),
            format!("on {public_ip}: does Docker run, with an address of {subnet}? `flanneld doctor` there"),
        ),
        (Some(Echo::HostUnreachable), _) => fail(
            format!("{through}; {public_ip} is down: no route to host, nobody has this address on its link"),
            format!(
                "start the host, or look at its cable and address; if it is gone for good: `flanneld leases release {subnet}`"
            ),
        ),
        (Some(Echo::NetworkUnreachable), _) => fail(
            format!("{through}; this host has no route to {public_ip}"),
            format!(
                "`ip route get {public_ip}`: give this host a route to it, or that host a --public-ip that is reached from here"
            ),
        ),
        (Some(Echo::Failed(why)), _) => {
            Check::unseen(Group::Peers, name.as_str(), format!("{through}; {public_ip}: {why}"))
        }
        (Some(Echo::Silent | Echo::TooBig) | None, _) => fail(
            format!(
                "{through}, and {public_ip} answers no pings either: it is down or unreachable, or a firewall drops everything"
            ),
            format!(
                "see how far packets get with `traceroute {public_ip}`; is that the address at which it is reached (its --iface, \
                 --public-ip)? If it is gone for good: `flanneld leases release {subnet}`"
            ),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::State, *};
    use crate::network::UDP_PORT;

    fn own() -> Own {
        Own {
            running: true,
            kind: Some(BackendKind::Udp),
            mtu: Some(1472),
            port: Some(UDP_PORT),
            public_ip: Some([192, 0, 2, 1].into()),
            subnet: Some("10.5.1.0/24".parse().unwrap()),
            ..Own::default()
        }
    }

    fn other() -> Other {
        Other {
            subnet: "10.5.2.0/24".parse().unwrap(),
            public_ip: [192, 0, 2, 2].into(),
            other_backend: None,
        }
    }

    fn judged(
        overlay: Option<Echo>,
        large: Option<Echo>,
        underlay: Option<Echo>,
        port: Option<Port>,
    ) -> (State, String) {
        let answer = Answer {
            overlay,
            large,
            underlay,
            port,
        };
        let check = peer(&own(), &other(), &answer);
        (check.state, check.what)
    }

    #[test]
    fn each_way_of_not_answering_has_its_own_cause() {
        let answered = || Some(Echo::Answered(Duration::from_millis(1)));
        let silent = || Some(Echo::Silent);
        for (overlay, large, underlay, port, state, said) in [
            (
                answered(),
                answered(),
                None,
                None,
                State::Ok,
                "1.0 ms, also to packets of 1472 bytes",
            ),
            (
                answered(),
                silent(),
                None,
                None,
                State::Fail,
                "none of the MTU, 1472 bytes",
            ),
            (
                answered(),
                Some(Echo::TooBig),
                None,
                None,
                State::Fail,
                "none of the MTU",
            ),
            (
                silent(),
                None,
                answered(),
                Some(Port::Refused),
                State::Fail,
                "flanneld does not run there",
            ),
            (
                silent(),
                None,
                answered(),
                Some(Port::Silent),
                State::Fail,
                "a firewall drops UDP port 8285",
            ),
            (
                silent(),
                None,
                Some(Echo::HostUnreachable),
                Some(Port::Silent),
                State::Fail,
                "is down: no route to host",
            ),
            (
                silent(),
                None,
                silent(),
                Some(Port::Silent),
                State::Fail,
                "down or unreachable",
            ),
            (None, None, answered(), Some(Port::Silent), State::Warn, "was not asked"),
            (
                None,
                None,
                answered(),
                Some(Port::Refused),
                State::Fail,
                "does not run there",
            ),
            (silent(), None, answered(), None, State::Warn, "at its bridge's address"),
        ] {
            let (found, what) = judged(overlay, large, underlay, port);
            assert_eq!(found, state, "{what}");
            assert!(what.contains(said), "{what} lacks {said}");
        }
    }

    #[test]
    fn hosts_that_are_not_asked_are_counted() {
        let others = vec![other(); 3];
        let probed = Probed { answers: vec![None] };
        let checks = judge(&own(), &others, &probed);
        assert_eq!(checks.len(), 2);
        assert!(checks[1].what.contains("2 more hosts"), "{checks:?}");
        assert_eq!(judge(&own(), &[], &probed)[0].state, State::Ok);
    }
}
