//! Two ends of an overlay between which a test carries packets of its own making: a wire into a host with a daemon, and a plain
//! peer. Between them are two hops, the host's kernel and its daemon.

use super::{
    Daemon, Overlay, PATIENCE, Registry, new_lab,
    plain_peer::{PlainPeer, has_right_checksum},
    traffic::QUIET,
    wire::{End, Wire},
};
use flannel::{
    lab::{HostOptions, wait_until},
    packet::{Ipv4Packet, Ipv6Packet, build, protocol},
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    fs::{self, DirEntry},
    io,
    net::{Ipv4Addr, Ipv6Addr},
};

/// Both families, so that packets of both can be carried.
const DUAL_STACK: &str = r#"{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:12:13::/48"}"#;

/// The MTU of an overlay over Ethernet.
pub(crate) const MTU: usize = 1_472;

/// How often a packet is sent again when it is lost, as may happen on a busy machine.
pub(crate) const ATTEMPTS: usize = 10;

/// What the kernel and the daemon take from the time to live.
const HOPS: u8 = 2;

/// What is sent, and what is to arrive but for the time to live.
pub(crate) struct Shipment {
    pub(crate) what: &'static str,
    pub(crate) sent: Vec<u8>,
    pub(crate) expected: Vec<u8>,
}

impl Shipment {
    pub(crate) fn new(what: &'static str, packet: Vec<u8>) -> Shipment {
        Shipment {
            what,
            expected: packet.clone(),
            sent: packet,
        }
    }
}

/// A host with a daemon, a container and a wire, and a plain peer. The order of the fields is that in which they go.
pub(crate) struct Pair {
    pub(crate) peer: PlainPeer,
    pub(crate) wire: Wire,
    /// Addresses behind the wire.
    pub(crate) near: (Ipv4Addr, Ipv6Addr),
    /// Addresses behind the peer.
    pub(crate) far: (Ipv4Addr, Ipv6Addr),
    daemon: Pid,
    pub(crate) overlay: Overlay,
}

impl Pair {
    /// Starts a daemon with these flags, in a dual-stack network.
    pub(crate) fn start(name: &str, flags: &[&str]) -> Pair {
        let lab = new_lab(name);
        let registry = Registry::embedded(&lab);
        let mut overlay = Overlay::start_hosts(lab, registry, DUAL_STACK, &[(HostOptions::default(), flags)]);
        let peer = PlainPeer::join(&mut overlay, &HostOptions::default());
        let (daemon, host) = (&mut overlay.daemons[0], &overlay.hosts[0]);
        assert_eq!(daemon.subnet().mtu as usize, MTU);
        // The upper half of the host's subnets: its containers have the lower.
        let v4 = daemon.subnet().subnet.trunc().subnets(25).unwrap().nth(1).unwrap();
        let v6 = daemon.subnet_v6().unwrap().trunc().subnets(65).unwrap().nth(1).unwrap();
        host.ns().sysctl("ipv6/conf/all/forwarding", "1").unwrap();
        let wire = Wire::open(host.ns(), 1_500, &[IpNet::V4(v4), IpNet::V6(v6)]);
        Pair {
            near: (ninth(v4), ninth_v6(v6)),
            far: (ninth(peer.subnet), ninth_v6(peer.subnet_v6.unwrap())),
            daemon: Pid::from_raw(daemon.process().pid().cast_signed()),
            peer,
            wire,
            overlay,
        }
    }

    /// Sends these shipments from the wire and from the peer, and looks at what arrives at the other.
    pub(crate) fn ship(&self, make: impl Fn(Ends) -> Vec<Shipment>) {
        let (near, far) = (self.near, self.far);
        self.carry(&self.wire, &self.peer, &make(Ends { from: near, to: far }));
        self.carry(&self.peer, &self.wire, &make(Ends { from: far, to: near }));
    }

    /// Lets the daemon sleep while the result lives, so that what is sent meanwhile is there for it at once.
    pub(crate) fn daemon_asleep(&self) -> Asleep {
        Asleep::new(self.daemon)
    }

    /// Sends shipments while the daemon sleeps, so that it finds them all at once, and fails the test unless each arrives as it
    /// is expected. What is lost is sent again; what is changed is never forgiven.
    pub(crate) fn carry(&self, from: &impl End, to: &impl End, shipments: &[Shipment]) {
        let mut missing: Vec<&Shipment> = shipments.iter().collect();
        for _ in 0..ATTEMPTS {
            let asleep = self.daemon_asleep();
            missing.iter().for_each(|shipment| from.send(&shipment.sent));
            drop(asleep);
            // What is not of these shipments is the kernel's own talk, or the late copy of one that was taken for lost.
            while !missing.is_empty()
                && let Some(packet) = to.recv(QUIET)
            {
                let label = label(&packet);
                if let Some(found) = missing
                    .iter()
                    .position(|shipment| self::label(&shipment.expected) == label)
                {
                    assert_arrived(missing.remove(found), &packet);
                }
            }
            if missing.is_empty() {
                return;
            }
        }
        let missing: Vec<_> = missing.iter().map(|shipment| shipment.what).collect();
        panic!("{missing:?} of {} shipments did not arrive", shipments.len());
    }
}

/// A process that does nothing while this lives.
pub(crate) struct Asleep(Pid);

impl Asleep {
    /// A daemon's.
    pub(crate) fn of(daemon: &mut Daemon) -> Asleep {
        Asleep::new(Pid::from_raw(daemon.process().pid().cast_signed()))
    }

    /// Returns when all of its threads have stopped.
    pub(crate) fn new(process: Pid) -> Asleep {
        kill(process, Signal::SIGSTOP).unwrap();
        let asleep = Asleep(process);
        let stopped = |task: io::Result<DirEntry>| {
            // A thread that has just ended is not stopped, and not there the next time.
            let stat = fs::read_to_string(task.unwrap().path().join("stat")).unwrap_or_default();
            // The state is behind the program's name, which may itself hold parentheses.
            stat.rsplit_once(')')
                .is_some_and(|(_, fields)| fields.starts_with(" T"))
        };
        let tasks = format!("/proc/{process}/task");
        wait_until(PATIENCE, "all threads of the daemon to stop", || {
            fs::read_dir(&tasks).unwrap().all(stopped)
        })
        .unwrap();
        asleep
    }
}

impl Drop for Asleep {
    fn drop(&mut self) {
        // Fails only when the process has ended, which the test will notice.
        let _ = kill(self.0, Signal::SIGCONT);
    }
}

fn ninth(net: Ipv4Net) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(net.network()) + 9)
}

fn ninth_v6(net: Ipv6Net) -> Ipv6Addr {
    Ipv6Addr::from(u128::from(net.network()) + 9)
}

/// Where a packet comes from and goes to, in both families.
#[derive(Clone, Copy)]
pub(crate) struct Ends {
    pub(crate) from: (Ipv4Addr, Ipv6Addr),
    pub(crate) to: (Ipv4Addr, Ipv6Addr),
}

impl Ends {
    /// An IPv4 packet from one to the other.
    pub(crate) fn v4(self) -> build::Ipv4 {
        build::Ipv4::new(self.from.0, self.to.0)
    }

    /// An IPv6 packet from one to the other.
    pub(crate) fn v6(self) -> build::Ipv6 {
        build::Ipv6::new(self.from.1, self.to.1)
    }
}

/// What tells a packet of a test from all others of it: addresses, protocol, identification and fragment offset; in IPv6 the
/// flow label for the latter two.
fn label(packet: &[u8]) -> Vec<u8> {
    if packet[0] >> 4 == 4 {
        [&packet[4..8], &packet[9..10], &packet[12..20]].concat()
    } else {
        [&packet[2..4], &packet[6..7], &packet[8..40]].concat()
    }
}

fn assert_arrived(shipment: &Shipment, packet: &[u8]) {
    let mut expected = shipment.expected.clone();
    let mut arrived = packet.to_vec();
    if let Ok(mut view) = Ipv4Packet::new_checked(&mut expected[..]) {
        view.set_ttl(view.ttl() - HOPS);
        view.fill_checksum();
        // A sender of UDP may leave the checksum out, and who cuts a superpacket of such may compute it.
        let (udp, at) = (
            view.protocol() == protocol::UDP && !view.is_fragment(),
            view.header_len() + 6,
        );
        if udp && expected[at..at + 2] == [0, 0] && has_right_checksum(packet) == Some(true) {
            arrived[at..at + 2].fill(0);
        }
    } else {
        let mut view = Ipv6Packet::new_checked(&mut expected[..]).unwrap();
        view.set_hop_limit(view.hop_limit() - HOPS);
    }
    assert!(
        arrived == expected,
        "{}: sent\n{:02x?}, expected\n{expected:02x?}, arrived\n{packet:02x?}",
        shipment.what,
        shipment.sent
    );
}
