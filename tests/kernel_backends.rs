//! The backends that let the kernel carry the packets, on real packets: that they start, survive and clear away. What exactly
//! they program is looked at in `vxlan.rs` and `host_gw.rs`. Needs root.

mod lab;

use flannel::lab::{Namespace, wait_until};
use lab::{Daemon, Overlay, PATIENCE, Registry, new_lab, output_of, ping};
use nix::sys::signal::Signal;
use std::{
    fmt::Write as _,
    process::Stdio,
    time::{Duration, Instant},
};

/// How long a repair may take.
const REPAIR: Duration = Duration::from_secs(2);

fn config(backend: &str) -> String {
    format!(r#"{{"Network":"10.5.0.0/16","Backend":{backend}}}"#)
}

const VXLAN: &str = r#"{"Type":"vxlan"}"#;
const DIRECT: &str = r#"{"Type":"vxlan","DirectRouting":true}"#;
const HOST_GW: &str = r#"{"Type":"host-gw"}"#;
const UDP: &str = r#"{"Type":"udp"}"#;

fn overlay(name: &str, backend: &str, count: usize) -> Overlay {
    let lab = new_lab(name);
    let registry = Registry::embedded(&lab);
    let overlay = Overlay::start_on(lab, registry, &config(backend), count);
    overlay.assert_all_reach_all();
    overlay
}

/// What a host's kernel is programmed with for the overlay, as `ip` and `bridge` show it.
fn programmed(host: &Namespace) -> String {
    let mut text = String::new();
    for (title, command) in [
        ("devices", "ip -br link show type vxlan | tr -s ' '"),
        ("routes", "ip -4 route show proto 85"),
        ("neighbours", "ip -4 neigh show nud permanent"),
        ("forwarding", "bridge fdb show | grep ' dst '"),
    ] {
        let output = output_of(host, "sh", ["-c", command]);
        let mut lines: Vec<&str> = output.lines().map(str::trim_end).collect();
        lines.sort_unstable();
        writeln!(text, "{title}: {}", lines.join("; ")).unwrap();
    }
    text
}

/// Waits until the kernel of `host` is programmed as `before`; how long that took.
fn assert_repaired(host: &Namespace, before: &str) -> Duration {
    let start = Instant::now();
    wait_until(PATIENCE, "the kernel to be programmed again", || {
        programmed(host) == before
    })
    .unwrap();
    let time = start.elapsed();
    assert!(time < REPAIR, "{time:?}");
    time
}

#[test]
fn vxlan_hosts_reach_one_another_through_the_originals_device() {
    let overlay = overlay("kb_vxlan", VXLAN, 3);
    let [host, peer] = [0, 1].map(|number| overlay.hosts[number].ns());
    let [own, subnet] = [0, 1].map(|number| overlay.daemons[number].subnet().subnet.trunc());
    let link = host.ip("-d link show flannel.1").unwrap();
    for part in [
        "mtu 1450",
        "vxlan id 1",
        "local 192.168.77.1 dev eth0",
        "dstport 8472",
        "nolearning",
    ] {
        assert!(link.contains(part), "{part} is not in {link}");
    }
    let addresses = host.ip("-4 -br addr show flannel.1").unwrap();
    assert!(addresses.contains(&format!("{}/32", own.addr())), "{addresses}");
    let route = host.ip(&format!("route show {subnet}")).unwrap();
    assert_eq!(
        route.trim(),
        format!("{subnet} via {} dev flannel.1 proto 85 onlink", subnet.addr())
    );
    let mac = peer.ip("-br link show flannel.1").unwrap();
    let mac = mac.split_whitespace().nth(2).unwrap();
    let neighbour = host.ip(&format!("neigh show {} dev flannel.1", subnet.addr())).unwrap();
    assert!(
        neighbour.contains(&format!("lladdr {mac}")) && neighbour.contains("PERMANENT"),
        "{neighbour}"
    );
    let forwarding = output_of(host, "bridge", ["fdb", "show", "dev", "flannel.1"]);
    assert!(
        forwarding.contains(&format!("{mac} dst 192.168.77.2 self permanent")),
        "{forwarding}"
    );
    let ttl = ping(&overlay.containers[0].ns, overlay.containers[1].ip, 1).ttl;
    assert_eq!(ttl, Some(62), "two kernels");
}

#[test]
fn host_gw_hosts_reach_one_another_by_plain_routes() {
    let overlay = overlay("kb_host_gw", HOST_GW, 3);
    let subnet = overlay.daemons[1].subnet();
    assert_eq!(subnet.mtu, 1500);
    let subnet = subnet.subnet.trunc();
    let route = overlay.hosts[0].ns().ip(&format!("route show {subnet}")).unwrap();
    assert_eq!(route.trim(), format!("{subnet} via 192.168.77.2 dev eth0 proto 85"));
}

#[test]
fn neither_kill_nor_restart_loses_a_packet() {
    for (name, backend) in [
        ("kb_kill_vxlan", VXLAN),
        ("kb_kill_gw", HOST_GW),
        ("kb_kill_direct", DIRECT),
    ] {
        let mut overlay = overlay(name, backend, 2);
        let before = programmed(overlay.hosts[0].ns());
        let (from, to) = (overlay.containers[0].ns.clone(), overlay.containers[1].ip);
        // 500 a second: an interruption of some milliseconds shows.
        let mut flood = from.command("ping");
        flood.args(["-n", "-q", "-i", "0.002", "-W", "1", &to.to_string()]);
        let flood = flood.stdout(Stdio::piped()).spawn().unwrap();
        for daemon in &mut overlay.daemons {
            daemon.kill9();
            daemon.start_and_wait();
            assert!(daemon.stop().success());
            daemon.start_and_wait();
        }
        let pid = nix::unistd::Pid::from_raw(flood.id().try_into().unwrap());
        nix::sys::signal::kill(pid, Signal::SIGINT).unwrap();
        let output = String::from_utf8(flood.wait_with_output().unwrap().stdout).unwrap();
        assert!(output.contains(" 0% packet loss"), "{backend}: {output}");
        assert_eq!(programmed(overlay.hosts[0].ns()), before);
    }
}

#[test]
fn what_someone_takes_away_is_put_back() {
    let overlay = overlay("kb_repair", VXLAN, 3);
    let host = overlay.hosts[0].ns();
    let before = programmed(host);
    let peer = overlay.daemons[1].subnet().subnet.trunc();
    let mac = before.split("lladdr ").nth(1).unwrap().split(' ').next().unwrap();
    for damage in [
        "ip link del flannel.1".to_owned(),
        "ip route flush proto 85".to_owned(),
        format!(
            "ip neigh flush dev flannel.1 nud permanent; ip neigh del {} dev flannel.1",
            peer.addr()
        ),
        format!("bridge fdb del {mac} dev flannel.1"),
        format!("ip route replace {peer} via 192.168.77.3"),
        "ip link set flannel.1 down".to_owned(),
        "ip link set flannel.1 address 02:00:00:00:00:07".to_owned(),
        "ip link set flannel.1 mtu 1000; ip addr flush dev flannel.1".to_owned(),
        "ip link set eth0 down; ip link set eth0 up; ip route add default via 192.168.77.254".to_owned(),
        "ip addr del 192.168.77.1/24 dev eth0; ip addr add 192.168.77.1/24 dev eth0".to_owned(),
    ] {
        output_of(host, "sh", ["-c", &damage]);
        let time = assert_repaired(host, &before);
        println!("{damage}: {time:?}");
        overlay.assert_all_reach_all();
    }
    let subnet = overlay.daemons[0].subnet().subnet;
    let addresses = host.ip("-4 -br addr show flannel.1").unwrap();
    assert!(
        addresses.contains(&format!("{}/32", subnet.trunc().addr())),
        "{addresses}"
    );
    assert!(host.ip("link show flannel.1").unwrap().contains("mtu 1450"));
}

#[test]
fn a_change_of_the_backend_leaves_nothing() {
    let mut overlay = overlay("kb_switch", UDP, 2);
    let host = overlay.hosts[0].ns().clone();
    let nothing = programmed(&host);
    for backend in [VXLAN, HOST_GW, UDP, HOST_GW, DIRECT, r#"{"Type":"vxlan","VNI":7}"#, UDP] {
        overlay.registry.configure(&host, &config(backend));
        for daemon in &mut overlay.daemons {
            assert!(daemon.stop().success());
            daemon.start();
        }
        for daemon in &mut overlay.daemons {
            daemon.wait_ready();
        }
        overlay.assert_all_reach_all();
        let now = programmed(&host);
        let devices = output_of(&host, "ip", ["-br", "link"]);
        match backend {
            UDP => assert_eq!(now, nothing),
            HOST_GW => assert!(!devices.contains("flannel"), "{devices}"),
            _ => assert!(!devices.contains("flannel0"), "{devices}"),
        }
        assert!(!backend.contains("VNI") || !devices.contains("flannel.1@"), "{devices}");
    }
}

/// The PublicIP in the lease of the daemon, as `flanneld leases` shows it.
fn published(overlay: &Overlay, daemon: &Daemon) -> String {
    let leases = overlay.registry.flanneld(overlay.hosts[1].ns(), &["leases", "list"]);
    let subnet = daemon.subnet().subnet.trunc().to_string();
    leases
        .lines()
        .find(|line| line.contains(&subnet))
        .unwrap_or_default()
        .to_owned()
}

#[test]
fn a_new_address_of_the_host_is_published_without_a_restart() {
    for (name, backend) in [("kb_move_vxlan", VXLAN), ("kb_move_gw", HOST_GW), ("kb_move_udp", UDP)] {
        let mut overlay = overlay(name, backend, 2);
        let host = overlay.hosts[0].ns().clone();
        let subnet = overlay.daemons[0].subnet();
        host.ip("addr del 192.168.77.1/24 dev eth0").unwrap();
        overlay.daemons[0].wait_for_log("has no IPv4 address");
        host.ip("addr add 192.168.77.40/24 dev eth0").unwrap();
        wait_until(PATIENCE, "the new address to be published", || {
            published(&overlay, &overlay.daemons[0]).contains("192.168.77.40")
        })
        .unwrap();
        overlay.assert_all_reach_all();
        overlay.daemons.iter_mut().for_each(Daemon::assert_running);
        assert_eq!(overlay.daemons[0].subnet(), subnet);
    }
}

#[test]
fn device_and_subnet_file_follow_the_interfaces_mtu() {
    for (name, backend, device, overhead) in [
        ("kb_mtu_vxlan", VXLAN, Some("flannel.1"), 50),
        ("kb_mtu_gw", HOST_GW, None, 0),
        ("kb_mtu_udp", UDP, Some("flannel0"), 28),
    ] {
        let overlay = overlay(name, backend, 2);
        let host = overlay.hosts[0].ns();
        for mtu in [1300, 1400] {
            host.ip(&format!("link set eth0 mtu {mtu}")).unwrap();
            let what = format!("the subnet file to say {}", mtu - overhead);
            wait_until(PATIENCE, &what, || overlay.daemons[0].subnet().mtu == mtu - overhead).unwrap();
            overlay.daemons[0].wait_for_log("restart Docker");
            if let Some(device) = device {
                wait_until(PATIENCE, "the device to follow", || {
                    host.ip(&format!("link show {device}"))
                        .unwrap()
                        .contains(&format!("mtu {} ", mtu - overhead))
                })
                .unwrap();
            }
        }
    }
}
