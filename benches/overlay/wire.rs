//! What may cross the wire between the two hosts in one piece.

use super::error::BenchError;
use clap::ValueEnum;
use flannel::lab::{LabError, Namespace, run};
use serde::Serialize;

/// The device of each host.
pub(crate) const DEVICE: &str = "eth0";

/// A way to set up both ends of the veth pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Wire {
    /// As the kernel makes it: superpackets of 64 KiB cross whole, as between two containers of one machine.
    Offload,
    /// Only packets of the MTU cross, and the receiver gets each by itself. Pessimistic: hardly any network card is so.
    #[value(name = "wire")]
    #[serde(rename = "wire")]
    Packets,
    /// Only packets of the MTU cross, and the receiver puts them together (GRO): nearest to a network card.
    #[value(name = "wire-gro")]
    #[serde(rename = "wire-gro")]
    Gro,
}

impl Wire {
    /// What it is called everywhere.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Wire::Offload => "offload",
            Wire::Packets => "wire",
            Wire::Gro => "wire-gro",
        }
    }

    /// What it means, in one line.
    pub(crate) fn meaning(self) -> &'static str {
        match self {
            Wire::Offload => "superpackets cross whole",
            Wire::Packets => "only MTU-size packets cross",
            Wire::Gro => "only MTU-size packets cross, GRO at the receiver",
        }
    }

    /// Sets [`DEVICE`] in `ns` up accordingly.
    pub(crate) fn apply(self, ns: &Namespace) -> Result<(), BenchError> {
        if self == Wire::Offload {
            return Ok(());
        }
        let features = features(ns)?;
        let mut command = ns.command("ethtool");
        command.args(["-K", DEVICE]);
        for feature in segmentation(&features) {
            command.args([feature, "off"]);
        }
        command.args(["gro", if self == Wire::Gro { "on" } else { "off" }]);
        run(&mut command)?;
        let left = segmentation(&self::features(ns)?).join(", ");
        if left.is_empty() {
            Ok(())
        } else {
            Err(BenchError::Wire { features: left })
        }
    }
}

fn features(ns: &Namespace) -> Result<String, LabError> {
    run(ns.command("ethtool").args(["-k", DEVICE]))
}

/// The features in the output of `ethtool -k` that let packets larger than the MTU leave and that are on: also those for
/// packets in tunnels, since vxlan's superpackets would use them.
fn segmentation(features: &str) -> Vec<&str> {
    let on = features.lines().filter_map(|line| line.trim().strip_suffix(": on"));
    on.filter(|name| name.contains("segmentation") || *name == "tx-gso-list")
        .collect()
}

#[cfg(test)]
#[allow(unused, reason = "cargo builds benchmarks with cfg(test), but without tests")]
mod tests {
    use super::*;

    #[test]
    fn features_that_make_superpackets_are_found() {
        let output = "\
Features for eth0:
rx-checksumming: on
tx-checksumming: on
\ttx-checksum-ip-generic: on
tcp-segmentation-offload: on
\ttx-tcp-segmentation: on
\ttx-tcp-mangleid-segmentation: off
generic-segmentation-offload: on
generic-receive-offload: off
tx-udp_tnl-segmentation: on
tx-gso-partial: off [fixed]
tx-gso-list: on
tx-esp-segmentation: off [fixed]
tx-nocache-copy: off";
        let expected = [
            "tcp-segmentation-offload",
            "tx-tcp-segmentation",
            "generic-segmentation-offload",
            "tx-udp_tnl-segmentation",
            "tx-gso-list",
        ];
        assert_eq!(segmentation(output), expected);
    }
}
