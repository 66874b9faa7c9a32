//! `Backend.SourcePorts` on the wire: flows leave from several ports, each flow from one. Needs root.

mod lab;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{SocketAddr, UdpSocket},
};

use flannel::{
    lab::HostOptions,
    packet::{IpPacket, UdpDatagram, protocol},
};
use lab::{
    Overlay, Registry, assert_reaches, inside, new_lab,
    plain_peer::{PlainPeer, free_subnet},
    traffic::{QUIET, transfer},
};

const PORT: u16 = 8285;

/// By 32 flows, each of 8 ports is left out with a probability of 1 in 70, and all but one with one of 10^-27.
const CONFIG: &str = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"udp","SourcePorts":8}}"#;
const FLOWS: usize = 32;

fn overlay(name: &str, hosts: usize) -> Overlay {
    let lab = new_lab(name);
    let registry = Registry::embedded(&lab);
    let hosts = vec![(HostOptions::default(), &[][..]); hosts];
    Overlay::start_hosts(lab, registry, CONFIG, &hosts)
}

#[test]
fn each_flow_leaves_from_one_of_several_ports() {
    let mut overlay = overlay("source_ports", 1);
    let host = overlay.lab.host("peer").unwrap();
    let (subnet, public_ip) = (free_subnet(&overlay), host.ip().to_string());
    let peer = inside(host.ns(), || UdpSocket::bind((host.ip(), PORT))).unwrap();
    peer.set_read_timeout(Some(QUIET)).unwrap();
    let reserve = ["leases", "reserve", &subnet.to_string(), "--public-ip", &public_ip];
    overlay.registry.flanneld(host.ns(), &reserve);
    overlay.daemons[0].wait_for_log(&format!("peer {subnet} at {public_ip}"));

    let to = SocketAddr::from((subnet.hosts().next().unwrap(), 9));
    let flows: Vec<UdpSocket> = inside(&overlay.containers[0].ns, || {
        (0..FLOWS).map(|_| UdpSocket::bind("0.0.0.0:0").unwrap()).collect()
    });
    // What is under way at once is far less than any queue on the way holds; what is lost all the same is sent in the next round.
    let mut ports: BTreeMap<u16, BTreeSet<u16>> = BTreeMap::new();
    for round in 0..10u8 {
        for flow in &flows {
            flow.send_to(&[round; 8], to).unwrap();
        }
        let mut arrived = 0;
        while arrived < FLOWS {
            let mut buffer = [0; 1_500];
            let Ok((length, from)) = peer.recv_from(&mut buffer) else {
                break;
            };
            assert_eq!(from.ip(), overlay.hosts[0].ip(), "the external address");
            let Ok(IpPacket::V4(packet)) = IpPacket::parse(&buffer[..length]) else {
                panic!("no packet: {:02x?}", &buffer[..length]);
            };
            if packet.protocol() == protocol::UDP {
                let datagram = UdpDatagram::new_checked(packet.payload()).unwrap();
                ports.entry(datagram.src_port()).or_default().insert(from.port());
                arrived += 1;
            }
        }
    }
    assert_eq!(ports.len(), FLOWS);
    assert!(
        ports.values().all(|used| used.len() == 1),
        "a flow that moves: {ports:?}"
    );
    let used: BTreeSet<u16> = ports.values().flatten().copied().collect();
    assert!((2..=8).contains(&used.len()), "{used:?}");
}

#[test]
fn hosts_with_several_ports_understand_one_another() {
    let overlay = overlay("many_ports", 2);
    overlay.assert_all_reach_all();
    let [one, two] = &overlay.containers[..] else {
        panic!("two hosts have two containers");
    };
    transfer(&[(one, two), (two, one), (one, two), (two, one)], 4 << 20);
}

#[test]
fn a_host_that_knows_of_one_port_is_served_from_several() {
    let mut overlay = overlay("one_port", 1);
    let peer = PlainPeer::join(&mut overlay, &HostOptions::default()).with_any_source_port();
    let peer = peer.carry();
    let one = &overlay.containers[0];
    assert_reaches(&one.ns, peer.endpoint.ip);
    transfer(&[(one, &peer.endpoint), (&peer.endpoint, one)], 1 << 20);
    peer.seen();
}
