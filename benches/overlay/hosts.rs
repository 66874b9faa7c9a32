//! Two hosts with one wire between them.
//!
//! ```text
//!   fl<pid>-bench-a                        fl<pid>-bench-b
//!   lo   10.5.1.1                          lo   10.5.2.1       the overlay's addresses: traffic goes between these
//!   eth0 198.51.100.1 ====== veth ======== eth0 198.51.100.2   the underlay (TEST-NET-2, RFC 5737), MTU 1500
//! ```

use super::{
    error::BenchError,
    wire::{DEVICE, Wire},
};
use flannel::lab::{Lab, Namespace, command, run};
use ipnet::Ipv4Net;
use std::{ffi::OsStr, net::Ipv4Addr, path::Path, process::Command};

/// The overlay: each host has a /24 of it.
pub(crate) const OVERLAY: &str = "10.5.0.0/16";

/// One of the two.
#[derive(Debug)]
pub(crate) struct Host {
    /// `a` or `b`.
    pub(crate) name: &'static str,
    /// Where it lives.
    pub(crate) ns: Namespace,
    /// Its address on the wire.
    pub(crate) underlay: Ipv4Addr,
    /// Its part of the overlay.
    pub(crate) subnet: Ipv4Net,
    /// The only processor that its programs may run on.
    processor: Option<usize>,
}

impl Host {
    fn new(lab: &Lab, name: &'static str, number: u8, pin: bool) -> Result<Host, BenchError> {
        let host = Host {
            name,
            ns: lab.namespace(name)?,
            underlay: Ipv4Addr::new(198, 51, 100, number),
            subnet: Ipv4Net::new_assert(Ipv4Addr::new(10, 5, number, 0), 24),
            processor: pin.then_some(usize::from(number) - 1),
        };
        host.ns.ip(&format!("address add {}/32 dev lo", host.overlay()))?;
        Ok(host)
    }

    /// Its address in the overlay, the first of its subnet.
    pub(crate) fn overlay(&self) -> Ipv4Addr {
        let [a, b, c, _] = self.subnet.network().octets();
        Ipv4Addr::new(a, b, c, 1)
    }

    /// A command that runs `program` here, on the processor that the host has for itself if it has one. Its children inherit
    /// that.
    pub(crate) fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let Some(processor) = self.processor else {
            return self.ns.command(Path::new(program.as_ref()));
        };
        let mut command = self.ns.command("taskset");
        command.arg("--cpu-list").arg(processor.to_string()).arg(program);
        command
    }

    /// Sets up the end of the wire here.
    fn plug_in(&self, wire: Wire) -> Result<(), BenchError> {
        wire.apply(&self.ns)?;
        self.ns.ip(&format!("address add {}/24 dev {DEVICE}", self.underlay))?;
        self.ns.ip(&format!("link set {DEVICE} up"))?;
        if let Some(processor) = self.processor {
            // Without this the sender's processor does the receiver's work up to the socket. `ip netns exec`, unlike nsenter,
            // shows the namespace's own devices in /sys.
            let script = format!(
                "echo {:x} > /sys/class/net/{DEVICE}/queues/rx-0/rps_cpus",
                1 << processor
            );
            run(command("ip").args(["netns", "exec", self.ns.name(), "sh", "-c", &script]))?;
        }
        Ok(())
    }
}

/// Both of them; they go with the lab.
#[derive(Debug)]
pub(crate) struct Hosts {
    /// Sends.
    pub(crate) a: Host,
    /// Receives.
    pub(crate) b: Host,
}

impl Hosts {
    /// Makes them in `lab`, with `wire` between them; with `pin`, each on a processor of its own.
    pub(crate) fn new(lab: &Lab, wire: Wire, pin: bool) -> Result<Hosts, BenchError> {
        let hosts = Hosts {
            a: Host::new(lab, "a", 1, pin)?,
            b: Host::new(lab, "b", 2, pin)?,
        };
        hosts.a.ns.ip(&format!(
            "link add {DEVICE} mtu 1500 type veth peer name {DEVICE} mtu 1500 netns {}",
            hosts.b.ns.name()
        ))?;
        hosts.a.plug_in(wire)?;
        hosts.b.plug_in(wire)?;
        Ok(hosts)
    }

    /// Each with the other one.
    pub(crate) fn pairs(&self) -> [(&Host, &Host); 2] {
        [(&self.a, &self.b), (&self.b, &self.a)]
    }
}
