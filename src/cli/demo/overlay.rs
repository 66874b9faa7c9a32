//! The overlays that the demo can show, and how each is seen to carry packets.

use crate::lab::{Host, LabError, Segment};
use clap::ValueEnum;
use std::net::Ipv4Addr;

/// The overlay's network: /24 subnets for far more hosts than the demo has.
const NETWORK: &str = "10.5.0.0/16";

/// What carries the packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum DemoBackend {
    /// This program itself, in UDP datagrams
    #[default]
    Udp,
    /// The kernel, in VXLAN
    Vxlan,
    /// The kernel, by plain routes
    HostGw,
    /// The kernel, by plain routes on one link and in VXLAN beyond a router (vxlan with DirectRouting)
    #[value(alias = "direct")]
    DirectRouting,
}

impl DemoBackend {
    /// The network's configuration in JSON.
    pub(super) fn configuration(self) -> String {
        let backend = match self {
            DemoBackend::Udp => r#"{"Type":"udp"}"#,
            DemoBackend::Vxlan => r#"{"Type":"vxlan"}"#,
            DemoBackend::HostGw => r#"{"Type":"host-gw"}"#,
            DemoBackend::DirectRouting => r#"{"Type":"vxlan","DirectRouting":true}"#,
        };
        format!(r#"{{"Network":"{NETWORK}","Backend":{backend}}}"#)
    }

    /// Where host `number` of `hosts` is, counted from 1: all on one link, or the last half of them behind a router where it
    /// is to be seen that this makes a difference.
    pub(super) fn segment(self, number: u8, hosts: u8) -> Segment {
        match self {
            DemoBackend::DirectRouting if number > hosts.div_ceil(2) => Segment::Second,
            _ => Segment::First,
        }
    }
}

/// The device through which `host` sends packets for `to`, as its kernel says: the path that the overlay takes.
///
/// # Errors
/// What `ip` fails with, and [`LabError::Output`] when no device is in its answer.
pub(super) fn path(host: &Host, to: Ipv4Addr) -> Result<String, LabError> {
    let answer = host.ns().ip(&format!("route get {to}"))?;
    device_in(&answer).map(str::to_owned).ok_or_else(|| LabError::Output {
        program: "ip",
        output: answer.trim().to_owned(),
    })
}

/// `10.5.68.2 via 10.5.68.0 dev flannel.1 src 10.5.34.0 uid 0`: the word behind `dev`.
fn device_in(answer: &str) -> Option<&str> {
    answer.split_whitespace().skip_while(|word| *word != "dev").nth(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::{Backend, Network};

    #[test]
    fn each_backend_has_a_configuration_without_warnings() {
        for &backend in DemoBackend::value_variants() {
            let parsed = Network::parse(&backend.configuration()).unwrap();
            assert_eq!(parsed.warnings, [""; 0], "{backend:?}");
            let name = parsed.network.backend().kind().name();
            let direct = matches!(parsed.network.backend(), Backend::Vxlan(vxlan) if vxlan.direct_routing);
            let expected = match backend {
                DemoBackend::Udp => ("udp", false),
                DemoBackend::Vxlan => ("vxlan", false),
                DemoBackend::HostGw => ("host-gw", false),
                DemoBackend::DirectRouting => ("vxlan", true),
            };
            assert_eq!((name, direct), expected);
        }
    }

    #[test]
    fn hosts_are_on_both_sides_of_the_router_for_direct_routing_alone() {
        let sides = |backend: DemoBackend, hosts| {
            let second = (1..=hosts).filter(|&number| backend.segment(number, hosts) == Segment::Second);
            second.collect::<Vec<u8>>()
        };
        assert_eq!(sides(DemoBackend::DirectRouting, 2), [2]);
        assert_eq!(sides(DemoBackend::DirectRouting, 3), [3]);
        assert_eq!(sides(DemoBackend::DirectRouting, 4), [3, 4]);
        for one_link in [DemoBackend::Udp, DemoBackend::Vxlan, DemoBackend::HostGw] {
            assert_eq!(sides(one_link, 4), [0; 0]);
        }
    }

    #[test]
    fn the_device_is_the_word_behind_dev() {
        let answers = [
            (
                "10.5.68.2 via 10.5.68.0 dev flannel.1 src 10.5.34.0 uid 0 \n    cache \n",
                Some("flannel.1"),
            ),
            ("10.5.68.2 dev flannel0 src 10.5.34.0 uid 0", Some("flannel0")),
            ("unreachable 10.5.68.2 dev", None),
            ("", None),
        ];
        for (answer, device) in answers {
            assert_eq!(device_in(answer), device, "{answer}");
        }
    }
}
