//! The `vxlan` backend's device, as `ip` shows it.

use super::programmed::link;
use flannel::lab::Namespace;
use serde_json::Value;

/// The device of VNI 1.
pub(crate) const DEVICE: &str = "flannel.1";

/// The configuration of most tests of it.
pub(crate) const CONFIG: &str = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#;

/// What vxlan leaves of 1,500 bytes.
pub(crate) const MTU: u32 = 1_450;

/// What makes it a vxlan device.
pub(crate) fn info(ns: &Namespace, device: &str) -> Value {
    let mut link = link(ns, device).unwrap_or_else(|| panic!("{} has no {device}", ns.name()));
    link["linkinfo"]["info_data"].take()
}

/// Whether it is there and set up.
pub(crate) fn is_up(ns: &Namespace, device: &str) -> bool {
    link(ns, device).is_some_and(|link| link["flags"].as_array().unwrap().contains(&"UP".into()))
}

/// In bytes; 0: it is not there.
pub(crate) fn mtu(ns: &Namespace, device: &str) -> u64 {
    link(ns, device).map_or(0, |link| link["mtu"].as_u64().unwrap())
}
