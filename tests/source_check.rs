//! Whose packets get in (`Backend.SourceCheck`): what is forged is sent in front of what is not, and must not arrive in front
//! of it. Needs root.

mod lab;

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};

use flannel::{lab::HostOptions, packet::build};
use ipnet::IpNet;
use lab::{
    Overlay, PATIENCE, Registry, inside, new_lab,
    plain_peer::PlainPeer,
    wire::{End, Wire},
};

const PORT: u16 = 8285;

/// A host with a daemon, a peer, and a host that is none.
struct Gate {
    overlay: Overlay,
    peer: PlainPeer,
    stranger: UdpSocket,
    /// What the daemon lets in for half of its subnet.
    inner: Wire,
    /// An address there, and one in the peer's subnet.
    ours: Ipv4Addr,
    theirs: Ipv4Addr,
}

impl Gate {
    fn with(check: &str) -> Gate {
        let lab = new_lab(&format!("gate_{check}"));
        let registry = Registry::embedded(&lab);
        let config = format!(r#"{{"Network":"10.5.0.0/16","Backend":{{"Type":"udp","SourceCheck":"{check}"}}}}"#);
        let mut overlay = Overlay::start_hosts(lab, registry, &config, &[(HostOptions::default(), &[])]);
        let peer = PlainPeer::join(&mut overlay, &HostOptions::default());
        let stranger = overlay.lab.host("stranger").unwrap();
        let stranger = inside(stranger.ns(), || UdpSocket::bind((stranger.ip(), PORT))).unwrap();
        let subnet = overlay.daemons[0].subnet().subnet.trunc();
        let upper = subnet.subnets(25).unwrap().nth(1).unwrap();
        // Elsewhere in the overlay too, to see what is let through.
        let elsewhere: IpNet = "10.5.0.0/24".parse().unwrap();
        let inner = Wire::open(overlay.hosts[0].ns(), 1_500, &[IpNet::V4(upper), elsewhere]);
        Gate {
            ours: upper.hosts().next().unwrap(),
            theirs: peer.subnet.hosts().next().unwrap(),
            overlay,
            peer,
            stranger,
            inner,
        }
    }

    /// A packet that tells itself by its payload.
    fn packet(&self, from: Ipv4Addr, to: Ipv4Addr, payload: &str) -> Vec<u8> {
        build::Ipv4::new(from, to).udp(7, 9, payload.as_bytes())
    }

    /// The payloads that arrive, up to that of a good packet which is sent last.
    fn arriving(&self) -> Vec<String> {
        let good = "good";
        self.peer.send(&self.packet(self.theirs, self.ours, good));
        let mut all = Vec::new();
        loop {
            let packet = self.inner.recv(PATIENCE).expect("the good packet is lost");
            // The kernel itself talks over IPv6 on a new device.
            if packet[0] >> 4 == 4 {
                let payload = String::from_utf8(packet[28..].to_vec()).unwrap();
                if payload == good {
                    return all;
                }
                all.push(payload);
            }
        }
    }

    /// Sends each kind of forged packet; which of them arrive.
    fn forge(&self) -> Vec<String> {
        let daemon = SocketAddr::from((self.overlay.hosts[0].ip(), PORT));
        let stranger = self.packet(self.theirs, self.ours, "of a stranger");
        self.stranger.send_to(&stranger, daemon).unwrap();
        // What two hosts send is in no order, unlike the packets of one: it is given several chances to arrive.
        let mut rounds = (0..10).map(|_| self.arriving());
        let mut arrived = rounds.find(|arrived| !arrived.is_empty()).unwrap_or_default();
        let unleased = Ipv4Addr::new(10, 5, 0, 9);
        self.peer.send(&self.packet(unleased, self.ours, "from no subnet"));
        self.peer.send(&self.packet(self.ours, self.ours, "from ours"));
        self.peer.send(&self.packet(self.theirs, unleased, "to elsewhere"));
        arrived.extend(self.arriving());
        arrived
    }
}

#[test]
fn only_a_peers_own_packets_for_this_host_get_in() {
    assert_eq!(Gate::with("strict").forge(), [""; 0]);
}

#[test]
fn a_peer_may_forward_for_others_where_it_is_allowed() {
    assert_eq!(
        Gate::with("peer").forge(),
        ["from no subnet", "from ours", "to elsewhere"]
    );
}

#[test]
fn anyone_may_send_where_nobody_looks() {
    assert_eq!(
        Gate::with("off").forge(),
        ["of a stranger", "from no subnet", "from ours", "to elsewhere"]
    );
}
