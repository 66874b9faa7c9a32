//! What a host's kernel is programmed with, as `ip` and `bridge` show it, and the same tools by hand.

use super::{Daemon, Overlay, pair::Asleep};
use flannel::lab::{self, Host, LabError, Namespace, wait_for};
use ipnet::Ipv4Net;
use serde_json::Value;
use std::{
    collections::BTreeSet,
    fmt::Debug,
    fs,
    net::Ipv4Addr,
    time::{Duration, Instant},
};

/// How soon what someone breaks is to be mended.
pub(crate) const REPAIR: Duration = Duration::from_secs(2);

/// How soon a new external address is to be published: the connection to etcd dies with the old one, and a silent server is
/// noticed after 15 s.
pub(crate) const NEW_ADDRESS: Duration = Duration::from_secs(40);

/// A host's entries for the overlay, in the words of `ip` and `bridge`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Programmed {
    /// All of the main table but the default route and those that the kernel has made itself.
    pub(crate) routes: BTreeSet<String>,
    /// Those of the vxlan device.
    pub(crate) neighbours: BTreeSet<String>,
    /// Those of the vxlan device.
    pub(crate) forwarding: BTreeSet<String>,
}

impl Programmed {
    /// What is there now; `device` need not be.
    pub(crate) fn of(ns: &Namespace, device: &str) -> Programmed {
        let lines = |output: Result<String, LabError>| {
            let text = output.unwrap_or_default();
            text.lines().map(words).collect::<BTreeSet<String>>()
        };
        let mut routes = lines(ns.ip("-4 route show table main"));
        routes.retain(|route| !route.starts_with("default ") && !route.contains(" proto kernel "));
        Programmed {
            routes,
            neighbours: lines(ns.ip(&format!("-4 neigh show dev {device}"))),
            forwarding: lines(try_by_hand(ns, &format!("bridge fdb show dev {device}"))),
        }
    }

    /// And the three entries for a peer behind `device`, as the original makes them, with our protocol number.
    pub(crate) fn with_tunnel(mut self, device: &str, subnet: Ipv4Net, mac: &str, public_ip: Ipv4Addr) -> Programmed {
        let gateway = subnet.network();
        self.routes
            .insert(format!("{subnet} via {gateway} dev {device} proto 85 onlink"));
        self.neighbours
            .insert(format!("{gateway} lladdr {mac} PERMANENT proto 85"));
        self.forwarding.insert(format!("{mac} dst {public_ip} self permanent"));
        self
    }

    /// And the plain route for a peer on the link.
    pub(crate) fn with_route(mut self, subnet: Ipv4Net, public_ip: Ipv4Addr) -> Programmed {
        self.routes
            .insert(format!("{subnet} via {public_ip} dev eth0 proto 85"));
        self
    }

    /// And all of another one.
    pub(crate) fn and(mut self, other: Programmed) -> Programmed {
        self.routes.extend(other.routes);
        self.neighbours.extend(other.neighbours);
        self.forwarding.extend(other.forwarding);
        self
    }

    /// And entries of others: lines of `ip route`, `ip neigh` and `bridge fdb`.
    pub(crate) fn with_foreign(mut self, [routes, neighbours, forwarding]: [&[&str]; 3]) -> Programmed {
        self.routes.extend(routes.iter().map(|line| words(line)));
        self.neighbours.extend(neighbours.iter().map(|line| words(line)));
        self.forwarding.extend(forwarding.iter().map(|line| words(line)));
        self
    }
}

/// What host `index` is to have when it reaches all others through `device`.
pub(crate) fn tunnels(overlay: &Overlay, index: usize, device: &str) -> Programmed {
    let mut all = Programmed::default();
    for (other, host) in overlay.hosts.iter().enumerate() {
        if other != index {
            all = all.with_tunnel(device, overlay.subnet(other), &mac(host.ns(), device), host.ip());
        }
    }
    all
}

/// What host `index` is to have when it reaches all others by plain routes.
pub(crate) fn routes(overlay: &Overlay, index: usize) -> Programmed {
    let mut all = Programmed::default();
    for (other, host) in overlay.hosts.iter().enumerate() {
        if other != index {
            all = all.with_route(overlay.subnet(other), host.ip());
        }
    }
    all
}

/// The line with single spaces, as versions of iproute2 differ in them.
fn words(line: &str) -> String {
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Fails the test unless the host comes to be programmed like this, and with nothing else, in time.
pub(crate) fn assert_programmed(host: &Host, device: &str, expected: &Programmed, limit: Duration) {
    assert_comes(limit, &format!("{} to be programmed as it should", host.name()), || {
        (Programmed::of(host.ns(), device), expected.clone())
    });
}

/// Fails the test unless what is there, the first of the two, comes to be what it should be in time; shows both.
pub(crate) fn assert_comes<T: PartialEq + Debug>(limit: Duration, what: &str, look: impl Fn() -> (T, T)) {
    let came = wait_for(limit, what, || {
        let (found, expected) = look();
        Ok::<_, LabError>((found == expected).then_some(()))
    });
    if let Err(error) = came {
        let (found, expected) = look();
        panic!("{error}: found\n{found:#?}\nand not\n{expected:#?}");
    }
}

/// What someone does to a host, in words, and as commands of `ip` and `bridge`.
pub(crate) type Damage = (&'static str, Vec<String>);

/// Does each of these damages to the host `ns` twice, and fails the test unless the daemon mends it within [`REPAIR`]: once while
/// it looks on, and once while it sleeps, when it can be seen that there is damage. `look` gives what is there, and what should
/// be.
pub(crate) fn assert_mends<T: PartialEq + Debug>(
    daemon: &mut Daemon,
    ns: &Namespace,
    damages: &[Damage],
    look: impl Fn() -> (T, T),
) {
    for (what, commands) in damages {
        assert_mends_while_it_looks_on(daemon, ns, (what, commands), &look);
        let asleep = Asleep::of(daemon);
        for command in commands {
            by_hand(ns, command);
        }
        let (found, expected) = look();
        assert!(found != expected, "{what}: there is no damage in {found:#?}");
        drop(asleep);
        assert_comes(
            REPAIR,
            &format!("{what}, and the daemon wakes up: to be as it was"),
            &look,
        );
        daemon.assert_running();
    }
}

/// The first half of [`assert_mends`], for what need not show.
pub(crate) fn assert_mends_while_it_looks_on<T: PartialEq + Debug>(
    daemon: &mut Daemon,
    ns: &Namespace,
    (what, commands): (&str, &[String]),
    look: impl Fn() -> (T, T),
) {
    for command in commands {
        by_hand(ns, command);
    }
    let done = Instant::now();
    assert_comes(REPAIR, &format!("{what}: to be as it was"), look);
    println!("{what}: mended after {:?}", done.elapsed());
    daemon.assert_running();
}

/// The external address of host `index` is removed and added, and its interface set down and up. With it goes the default
/// route, which somebody else puts back.
pub(crate) fn external_damages(overlay: &Overlay, index: usize) -> Vec<Damage> {
    let ip = overlay.hosts[index].ip();
    let route = "ip route add default via 192.168.77.254 dev eth0";
    vec![
        (
            "the external interface is set down and up, and the default route comes late",
            ["ip link set eth0 down", "ip link set eth0 up"]
                .map(str::to_owned)
                .to_vec(),
        ),
        (
            "the external interface is set down and up",
            ["ip link set eth0 down", "ip link set eth0 up", route]
                .map(str::to_owned)
                .to_vec(),
        ),
        (
            "the external address is removed and added",
            vec![
                format!("ip address del {ip}/24 dev eth0"),
                format!("ip address add {ip}/24 dev eth0"),
                route.to_owned(),
            ],
        ),
    ]
}

/// Gives the external interface another address. With the old one goes the default route, which somebody else puts back.
pub(crate) fn readdress(ns: &Namespace, old: Ipv4Addr, new: Ipv4Addr) {
    for line in [
        format!("ip address del {old}/24 dev eth0"),
        format!("ip address add {new}/24 dev eth0"),
        "ip route add default via 192.168.77.254 dev eth0".to_owned(),
    ] {
        by_hand(ns, &line);
    }
}

/// Runs `ip ...` or `bridge ...` in the namespace, as an administrator would.
pub(crate) fn by_hand(ns: &Namespace, line: &str) -> String {
    try_by_hand(ns, line).unwrap()
}

fn try_by_hand(ns: &Namespace, line: &str) -> Result<String, LabError> {
    let (program, arguments) = line.split_once(' ').unwrap();
    assert!(matches!(program, "ip" | "bridge"), "{line}");
    lab::run(
        lab::command(program)
            .args(["-n", ns.name()])
            .args(arguments.split_whitespace()),
    )
}

/// Runs these commands of `ip` in the namespace, each without the word `ip`, in one go: thousands of them take no time.
pub(crate) fn in_one_go(overlay: &Overlay, ns: &Namespace, commands: impl Iterator<Item = String>) {
    let file = overlay.lab.dir().join("ip.batch");
    fs::write(&file, commands.fold(String::new(), |all, line| all + &line + "\n")).unwrap();
    by_hand(ns, &format!("ip -batch {}", file.display()));
}

/// Takes the external interface of host `index` away, and everything that hangs on it.
pub(crate) fn unplug(overlay: &Overlay, index: usize) {
    by_hand(overlay.hosts[index].ns(), "ip link del eth0");
}

/// Gives it another one, with the same address.
pub(crate) fn plug_in(overlay: &Overlay, index: usize) {
    let (host, switch, port) = (&overlay.hosts[index], overlay.lab.switch(), index + 1);
    for line in [
        format!(
            "ip link add p{port} type veth peer name eth0 netns {}",
            host.ns().name()
        ),
        format!("ip link set p{port} master br0 up"),
    ] {
        by_hand(switch, &line);
    }
    for line in [
        format!("ip address add {}/24 dev eth0", host.ip()),
        "ip link set eth0 up".to_owned(),
        "ip route add default via 192.168.77.254 dev eth0".to_owned(),
    ] {
        by_hand(host.ns(), &line);
    }
}

/// Everything about a link, as in `ip -d -j link show`; `None`: it is not there.
pub(crate) fn link(ns: &Namespace, name: &str) -> Option<Value> {
    let shown = ns.ip(&format!("-d -j link show dev {name}")).ok()?;
    let mut links: Value = serde_json::from_str(&shown).unwrap();
    Some(links[0].take())
}

/// The link's index: another one when it was made anew. 0: it is not there.
pub(crate) fn ifindex(ns: &Namespace, name: &str) -> u64 {
    link(ns, name).map_or(0, |link| link["ifindex"].as_u64().unwrap())
}

/// The link's MAC address; empty: it is not there.
pub(crate) fn mac(ns: &Namespace, name: &str) -> String {
    link(ns, name).map_or_else(String::new, |link| link["address"].as_str().unwrap().to_owned())
}

/// The IPv4 addresses on a link, with their prefix lengths.
pub(crate) fn addresses(ns: &Namespace, name: &str) -> Vec<String> {
    let Ok(shown) = ns.ip(&format!("-4 -j address show dev {name}")) else {
        return Vec::new();
    };
    let links: Value = serde_json::from_str(&shown).unwrap();
    // Some versions list links without an address as empty objects.
    let all = links.as_array().unwrap().iter();
    all.filter_map(|link| link["addr_info"].as_array())
        .flatten()
        .map(|address| format!("{}/{}", address["local"].as_str().unwrap(), address["prefixlen"]))
        .collect()
}

/// The names of the overlays' devices that a host has.
pub(crate) fn overlay_devices(ns: &Namespace) -> Vec<String> {
    let links: Value = serde_json::from_str(&ns.ip("-j link show").unwrap()).unwrap();
    let names = links
        .as_array()
        .unwrap()
        .iter()
        .map(|link| link["ifname"].as_str().unwrap());
    names
        .filter(|name| name.starts_with("flannel"))
        .map(str::to_owned)
        .collect()
}
