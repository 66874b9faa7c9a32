//! What the `vxlan` backend follows while it runs: the external interface's MTU and address. Needs root.

mod lab;

use flannel::lab::{HostOptions, wait_until};
use lab::{
    Overlay, PATIENCE,
    flow::Flows,
    original::{lease, public_ip, vxlan_lease},
    programmed::{
        NEW_ADDRESS, Programmed, REPAIR, assert_comes, assert_programmed, by_hand, ifindex, link, mac, readdress,
        tunnels,
    },
    vxlan::{CONFIG, DEVICE, MTU, info, is_up, mtu},
};
use std::{thread, time::Duration};

#[test]
fn device_and_subnet_file_follow_the_external_mtu() {
    let (mut overlay, _server) = Overlay::start_on_etcd("vx_mtu", CONFIG, 2);
    overlay.assert_all_reach_all();
    let (ns, index) = (overlay.hosts[0].ns().clone(), ifindex(overlay.hosts[0].ns(), DEVICE));
    let flows = Flows::start(&overlay.containers[0], &overlay.containers[1]);
    for (external, inner) in [(1_400, 1_350), (1_500, MTU)] {
        by_hand(&ns, &format!("ip link set eth0 mtu {external}"));
        assert_comes(PATIENCE, "device and subnet file to follow", || {
            (
                (mtu(&ns, DEVICE), overlay.daemons[0].subnet().mtu),
                (inner.into(), inner),
            )
        });
        overlay.daemons[0].wait_for_log("Docker");
        assert_programmed(&overlay.hosts[0], DEVICE, &tunnels(&overlay, 0, DEVICE), REPAIR);
    }
    assert_eq!(ifindex(&ns, DEVICE), index, "the device is the same");
    flows.finish_without_loss();
    overlay.daemons[0].assert_running();
}

#[test]
fn a_configured_mtu_does_not_follow_the_external_one() {
    let config = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan","MTU":1400}}"#;
    let (overlay, _server) = Overlay::start_on_etcd("vx_fixed", config, 1);
    let ns = overlay.hosts[0].ns();
    by_hand(ns, "ip link set eth0 mtu 1480");
    // When this is mended, the daemon has looked at everything since.
    by_hand(ns, "ip link del flannel.1");
    wait_until(REPAIR, "the device to be made again", || is_up(ns, DEVICE)).unwrap();
    assert_eq!(mtu(ns, DEVICE), 1_350);
    assert_eq!(overlay.daemons[0].subnet().mtu, 1_350);
}

#[test]
fn the_lease_follows_the_external_address_and_traffic_goes_on() {
    let (mut overlay, server) = Overlay::start_on_etcd("vx_address", CONFIG, 2);
    overlay.assert_all_reach_all();
    let (ns, subnet, old, new) = (
        overlay.hosts[0].ns().clone(),
        overlay.subnet(0),
        overlay.hosts[0].ip(),
        public_ip(101),
    );
    readdress(&ns, old, new);
    assert_comes(NEW_ADDRESS, "the new address to be published", || {
        (lease(&server, subnet), vxlan_lease(new, &mac(&ns, DEVICE)))
    });
    assert_eq!(info(&ns, DEVICE)["local"], new.to_string());
    assert_programmed(&overlay.hosts[0], DEVICE, &tunnels(&overlay, 0, DEVICE), REPAIR);
    let seen = Programmed::default().with_tunnel(DEVICE, subnet, &mac(&ns, DEVICE), new);
    assert_programmed(&overlay.hosts[1], DEVICE, &seen, PATIENCE);
    overlay.assert_all_reach_all();
    overlay.daemons[0].assert_running();
    assert_eq!(overlay.subnet(0), subnet);
}

#[test]
fn a_public_ip_of_ones_own_stays_when_the_external_address_changes() {
    let flags = ["--iface=eth0", "--public-ip=192.168.77.1"];
    let hosts = [(HostOptions::default(), &flags[..]), (HostOptions::default(), &[])];
    let (mut overlay, server) = Overlay::start_hosts_on_etcd("vx_nat", CONFIG, &hosts);
    overlay.assert_all_reach_all();
    let ns = overlay.hosts[0].ns().clone();
    readdress(&ns, overlay.hosts[0].ip(), public_ip(101));
    assert_comes(PATIENCE, "the device to follow", || {
        let local = link(&ns, DEVICE).map(|mut link| link["linkinfo"]["info_data"]["local"].take());
        (local, Some(public_ip(101).to_string().into()))
    });
    // As a NAT in front of the host would: what is for the PublicIP reaches it.
    by_hand(&ns, "ip address add 192.168.77.1/32 dev eth0");
    overlay.assert_all_reach_all();
    let published = vxlan_lease(public_ip(1), &mac(&ns, DEVICE));
    assert_eq!(lease(&server, overlay.subnet(0)), published);
    overlay.daemons[0].assert_running();
}

#[test]
fn the_lease_follows_an_address_that_changes_again_at_once() {
    let (mut overlay, server) = Overlay::start_on_etcd("vx_twice", CONFIG, 2);
    overlay.assert_all_reach_all();
    let (ns, subnet) = (overlay.hosts[0].ns().clone(), overlay.subnet(0));
    // For as long as the first change takes until it is seen, and a little longer.
    for (pause, addresses) in [(0, [1, 101, 102]), (60, [102, 103, 1]), (0, [1, 104, 1])] {
        for pair in addresses.windows(2) {
            readdress(&ns, public_ip(pair[0]), public_ip(pair[1]));
            thread::sleep(Duration::from_millis(pause));
        }
        let last = public_ip(addresses[2]);
        assert_comes(NEW_ADDRESS, "the last address to be published", || {
            (lease(&server, subnet), vxlan_lease(last, &mac(&ns, DEVICE)))
        });
        let seen = Programmed::default().with_tunnel(DEVICE, subnet, &mac(&ns, DEVICE), last);
        assert_programmed(&overlay.hosts[1], DEVICE, &seen, PATIENCE);
        overlay.assert_all_reach_all();
    }
    overlay.daemons[0].assert_running();
}
