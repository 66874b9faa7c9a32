//! The kernel layer against what `ip`, `bridge` and `ethtool` say of the same namespace. Needs root.

mod lab;

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use flannel::{
    kernel::{
        Kernel,
        entries::{FdbEntry, FoundNeighbour, FoundRoute, Mac, Neighbour, Operation, PROTOCOL, Route},
        monitor::{Change, Monitor},
        vxlan::VxlanSpec,
    },
    lab::{Host, Lab, Namespace, command, run, wait_until},
    network::Vni,
    sys::ethtool,
};
use ipnet::IpNet;
use lab::{PATIENCE, inside, new_lab};
use nix::{
    sched::{CloneFlags, unshare},
    time::{ClockId, clock_gettime},
};
use serde_json::Value;
use tokio::time::timeout;

/// A host's namespace and a handle on its configuration.
struct Bench {
    kernel: Kernel,
    host: Host,
    _lab: Lab,
}

impl Bench {
    fn new(name: &str) -> Bench {
        let mut lab = new_lab(name);
        let host = lab.host("h").unwrap();
        let kernel = inside(host.ns(), || Kernel::open().unwrap());
        Bench {
            kernel,
            host,
            _lab: lab,
        }
    }

    fn ns(&self) -> &Namespace {
        self.host.ns()
    }

    fn ip(&self, arguments: &str) -> String {
        self.ns().ip(arguments).unwrap()
    }

    /// What `ip -j` prints.
    fn json(&self, arguments: &str) -> Vec<Value> {
        list(&self.ip(&format!("-d -j {arguments}")))
    }

    fn fdb_json(&self, device: &str) -> Vec<Value> {
        let mut bridge = command("bridge");
        list(&run(bridge.args(["-n", self.ns().name(), "-j", "fdb", "show", "dev", device])).unwrap())
    }

    /// Index of a link, by its name.
    fn index(&mut self, name: &str) -> u32 {
        let links = self.kernel.links().unwrap();
        links.iter().find(|link| link.name == name).unwrap().index
    }

    /// Makes the changes, all of which must succeed.
    fn apply(&mut self, operations: &[Operation]) {
        for outcome in self.kernel.apply(operations).unwrap() {
            outcome.unwrap();
        }
    }

    /// What is found at these destinations, in the kernel's order.
    fn routes_to(&mut self, to: &str) -> Vec<FoundRoute> {
        let to = to.parse().unwrap();
        let routes = self.kernel.routes().unwrap();
        routes.into_iter().filter(|found| found.route.to == to).collect()
    }

    fn spec(&mut self) -> VxlanSpec {
        VxlanSpec {
            name: "flannel.7".to_owned(),
            vni: Vni::new(7).unwrap(),
            parent: self.index("eth0"),
            local: self.host.ip(),
            port: 8472,
            gbp: false,
            learning: false,
            mtu: 1450,
            mac: Mac::random_local(),
        }
    }

    /// A VXLAN device that is up, its index.
    fn vxlan(&mut self) -> u32 {
        let spec = self.spec();
        self.add_vxlan(&spec);
        let index = self.index(&spec.name);
        self.kernel.set_up(index).unwrap();
        index
    }

    /// Inside the namespace: /proc/sys shows that of the thread.
    fn add_vxlan(&mut self, spec: &VxlanSpec) {
        let Bench { kernel, host, .. } = self;
        inside(host.ns(), || kernel.add_vxlan(spec)).unwrap();
    }
}

fn list(json: &str) -> Vec<Value> {
    // `bridge` prints nothing for nothing.
    if json.trim().is_empty() {
        return Vec::new();
    }
    serde_json::from_str(json).unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn mac(text: &str) -> Mac {
    text.parse().unwrap()
}

fn route(to: &str, via: Option<&str>, link: u32) -> Route {
    Route {
        to: to.parse().unwrap(),
        via: via.map(ip),
        link,
        onlink: false,
    }
}

#[test]
fn routes_are_put_found_and_removed() {
    let mut bench = Bench::new("routes");
    bench.ip("address add fd77::1/64 dev eth0 nodad");
    let eth0 = bench.index("eth0");
    let ours = [
        route("10.5.1.0/24", Some("192.168.77.9"), eth0),
        route("10.5.2.0/24", None, eth0),
        Route {
            onlink: true,
            ..route("10.5.3.0/24", Some("10.5.3.0"), eth0)
        },
        route("fd05:1::/64", Some("fd77::9"), eth0),
        Route {
            onlink: true,
            ..route("fd05:2::/64", Some("fd05:2::"), eth0)
        },
        route("10.5.4.0/24", Some("fd77::9"), eth0),
    ];
    bench.apply(&ours.map(Operation::PutRoute));

    let shown = bench.json("route show proto 85");
    let shown: Vec<(&str, &str, bool)> = shown
        .iter()
        .map(|route| {
            let gateway = route["gateway"].as_str().or(route["via"]["host"].as_str());
            let flags = route["flags"].as_array().unwrap();
            (
                route["dst"].as_str().unwrap(),
                gateway.unwrap_or("-"),
                flags.contains(&"onlink".into()),
            )
        })
        .collect();
    let expected = [
        ("10.5.1.0/24", "192.168.77.9", false),
        ("10.5.2.0/24", "-", false),
        ("10.5.3.0/24", "10.5.3.0", true),
        ("10.5.4.0/24", "fd77::9", false),
    ];
    assert_eq!(shown, expected);
    let v6 = bench.ip("-6 route show proto 85");
    assert!(v6.contains("fd05:1::/64 via fd77::9 dev eth0 metric 1024"), "{v6}");
    assert!(
        v6.contains("fd05:2::/64 via fd05:2:: dev eth0 metric 1024 onlink"),
        "{v6}"
    );

    let mut found = bench.kernel.routes().unwrap();
    found.retain(|found| found.protocol == PROTOCOL);
    for ours in ours {
        let metric = if ours.to.addr().is_ipv4() { 0 } else { 1024 };
        let ours = FoundRoute {
            route: ours,
            protocol: PROTOCOL,
            metric,
            multipath: false,
        };
        assert!(found.contains(&ours), "{ours:?} in {found:?}");
    }
    assert_eq!(found.len(), ours.len());

    // Twice: what is gone is gone.
    for _ in 0..2 {
        bench.apply(&ours.map(Operation::RemoveRoute));
        let routes = bench.kernel.routes().unwrap();
        assert!(routes.iter().all(|found| found.protocol != PROTOCOL), "{routes:?}");
    }
}

#[test]
fn a_namespace_without_a_main_table_has_no_routes() {
    let routes = thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let mut kernel = Kernel::open().unwrap();
        (kernel.routes().unwrap(), kernel.default_route().unwrap())
    });
    assert_eq!(routes.join().unwrap(), (vec![], None));
}

#[test]
fn foreign_routes_are_told_from_ours_and_left_alone() {
    let mut bench = Bench::new("foreign");
    let eth0 = bench.index("eth0");
    bench.ip("route add 10.5.1.0/24 via 192.168.77.8 metric 50");
    bench.ip("route add 10.5.1.0/24 via 192.168.77.9");
    bench.ip("route add 10.5.2.0/24 nexthop via 192.168.77.8 nexthop via 192.168.77.9");
    bench.ip("route add blackhole 10.5.3.0/24");
    bench.ip("route add 10.5.4.0/24 via 192.168.77.9 table 7");
    bench.apply(
        &["10.5.1.0/24", "10.5.2.0/24", "10.5.4.0/24"]
            .map(|to| Operation::RemoveRoute(route(to, Some("192.168.77.9"), eth0))),
    );

    let [plain, lower] = bench.routes_to("10.5.1.0/24")[..] else {
        panic!()
    };
    assert_eq!(plain.route, route("10.5.1.0/24", Some("192.168.77.9"), eth0));
    assert_eq!((plain.protocol, plain.metric, lower.metric), (3, 0, 50));
    let [several] = bench.routes_to("10.5.2.0/24")[..] else {
        panic!()
    };
    assert!(several.multipath);
    assert_eq!(several.route.via, Some(ip("192.168.77.8")));
    assert!(bench.routes_to("10.5.3.0/24").is_empty(), "not unicast");
    assert!(bench.routes_to("10.5.4.0/24").is_empty(), "another table");

    // By its protocol and metric, and no other.
    bench.apply(&[Operation::RemoveFoundRoute(lower)]);
    assert_eq!(bench.routes_to("10.5.1.0/24"), [plain]);
    bench.apply(&[Operation::RemoveFoundRoute(plain)]);
    assert!(bench.routes_to("10.5.1.0/24").is_empty());
}

#[test]
fn a_route_that_is_put_replaces_that_of_the_same_metric() {
    let mut bench = Bench::new("replace");
    let eth0 = bench.index("eth0");
    let ours = |to| route(to, Some("192.168.77.9"), eth0);
    bench.ip("route add 10.5.1.0/24 via 192.168.77.8");
    bench.ip("route add 10.5.1.0/24 via 192.168.77.8 metric 50");
    bench.ip("route add 10.5.2.0/24 nexthop via 192.168.77.8 nexthop via 192.168.77.9");
    bench.ip("route add blackhole 10.5.3.0/24");
    // Ours behind another one.
    bench.ip("route add 10.5.4.0/24 via 192.168.77.8");
    bench.ip("route append 10.5.4.0/24 via 192.168.77.9 proto 85");
    let destinations = ["10.5.1.0/24", "10.5.2.0/24", "10.5.3.0/24", "10.5.4.0/24"];
    for _ in 0..2 {
        bench.apply(&destinations.map(|to| Operation::PutRoute(ours(to))));
        for to in destinations {
            let found = bench.routes_to(to);
            assert_eq!((found[0].route, found[0].protocol), (ours(to), PROTOCOL), "{found:?}");
            assert_eq!(found.len(), if to == "10.5.1.0/24" { 2 } else { 1 }, "{found:?}");
        }
    }
}

#[test]
fn neighbours_are_put_found_and_removed() {
    let mut bench = Bench::new("neighbours");
    let (eth0, vxlan) = (bench.index("eth0"), bench.vxlan());
    let neighbour = |address, mac: &str| Neighbour {
        link: vxlan,
        address: ip(address),
        mac: mac.parse().unwrap(),
    };
    let (first, second) = ("02:00:00:00:00:01", "02:00:00:00:00:02");
    bench.ip(&format!(
        "neigh add 10.5.3.0 lladdr {first} dev flannel.7 nud permanent"
    ));
    bench.ip(&format!("neigh add 10.5.4.0 lladdr {first} dev flannel.7 nud stale"));
    bench.ip(&format!("neigh add 192.168.77.9 lladdr {first} dev eth0 nud permanent"));
    bench.ip("neigh add proxy 10.5.9.9 dev flannel.7");
    let ours = [neighbour("10.5.1.0", first), neighbour("fd05::1", first)];
    bench.apply(&ours.map(Operation::PutNeighbour));

    let shown = bench.json("neigh show dev flannel.7 nud permanent");
    let shown = shown.iter().find(|entry| entry["dst"] == "10.5.1.0").unwrap();
    assert_eq!((&shown["lladdr"], &shown["protocol"]), (&first.into(), &"85".into()));
    let found = |neighbour, protocol, permanent| FoundNeighbour {
        neighbour,
        protocol,
        permanent,
    };
    let mut expected = vec![
        found(ours[0], PROTOCOL, true),
        found(ours[1], PROTOCOL, true),
        found(neighbour("10.5.3.0", first), 0, true),
        found(neighbour("10.5.4.0", first), 0, false),
    ];
    let sorted = |mut list: Vec<FoundNeighbour>| {
        // The kernel adds the multicast addresses that it sends to by itself.
        list.retain(|found| !found.neighbour.address.is_multicast());
        list.sort_by_key(|found| found.neighbour);
        list
    };
    expected = sorted(expected);
    assert_eq!(sorted(bench.kernel.neighbours(vxlan).unwrap()), expected);
    assert!(bench.kernel.neighbours(9_999).unwrap().is_empty());

    // Another MAC, and one that was foreign or learned becomes ours.
    let moved = ["10.5.1.0", "10.5.3.0", "10.5.4.0"].map(|address| neighbour(address, second));
    bench.apply(&moved.map(Operation::PutNeighbour));
    let now = bench.kernel.neighbours(vxlan).unwrap();
    for moved in moved {
        assert!(now.contains(&found(moved, PROTOCOL, true)), "{moved} in {now:?}");
    }
    for _ in 0..2 {
        bench.apply(&moved.map(Operation::RemoveNeighbour));
        bench.apply(&[Operation::RemoveNeighbour(ours[1])]);
        assert_eq!(sorted(bench.kernel.neighbours(vxlan).unwrap()), []);
    }
    assert_eq!(sorted(bench.kernel.neighbours(eth0).unwrap()).len(), 1);
}

#[test]
fn forwarding_entries_are_put_replaced_and_removed() {
    let mut bench = Bench::new("fdb");
    let vxlan = bench.vxlan();
    let entry = |mac: &str, to| FdbEntry {
        link: vxlan,
        mac: mac.parse().unwrap(),
        to: ip(to),
    };
    let (first, second) = ("02:00:00:00:00:01", "02:00:00:00:00:02");
    let shown = |bench: &Bench| {
        let mut shown: Vec<(String, String, String)> = bench
            .fdb_json("flannel.7")
            .iter()
            .map(|entry| ["mac", "dst", "state"].map(|key| entry[key].as_str().unwrap_or_default().to_owned()))
            .map(|[mac, dst, state]| (mac, dst, state))
            .collect();
        shown.sort();
        shown
    };
    let line = |mac: &str, to: &str| (mac.to_owned(), to.to_owned(), "permanent".to_owned());
    let found = |bench: &mut Bench| {
        let mut found = bench.kernel.fdb(vxlan).unwrap();
        found.sort_by_key(|found| found.entry);
        assert!(found.iter().all(|found| found.permanent));
        found.into_iter().map(|found| found.entry).collect::<Vec<_>>()
    };

    let ours = [entry(first, "192.168.77.8"), entry(second, "192.168.77.9")];
    for _ in 0..2 {
        bench.apply(&ours.map(Operation::PutFdb));
        assert_eq!(
            shown(&bench),
            [line(first, "192.168.77.8"), line(second, "192.168.77.9")]
        );
        assert_eq!(found(&mut bench), ours);
    }
    let moved = entry(first, "192.168.77.9");
    bench.apply(&[Operation::PutFdb(moved)]);
    assert_eq!(found(&mut bench), [moved, ours[1]]);
    // It leads elsewhere by now.
    bench.apply(&[Operation::RemoveFdb(ours[0])]);
    assert_eq!(found(&mut bench), [moved, ours[1]]);
    for _ in 0..2 {
        bench.apply(&[Operation::RemoveFdb(moved), Operation::RemoveFdb(ours[1])]);
        assert_eq!(shown(&bench), []);
        assert_eq!(found(&mut bench), []);
    }
    assert!(bench.kernel.fdb(9_999).unwrap().is_empty());
}

#[test]
fn a_vxlan_device_is_made_as_asked() {
    for (gbp, learning) in [(false, false), (true, true)] {
        let mut bench = Bench::new(&format!("vxlan_{gbp}"));
        let spec = VxlanSpec {
            gbp,
            learning,
            port: 4789,
            mtu: 1400,
            ..bench.spec()
        };
        bench.add_vxlan(&spec);

        let shown = &bench.json("link show flannel.7")[0];
        let data = &shown["linkinfo"]["info_data"];
        assert_eq!(shown["address"], spec.mac.to_string());
        assert_eq!(shown["mtu"], 1400);
        assert_eq!(shown["inet6_addr_gen_mode"], "none");
        assert!(!shown["flags"].as_array().unwrap().contains(&"UP".into()));
        assert_eq!(shown["linkinfo"]["info_kind"], "vxlan");
        assert_eq!(data["id"], 7);
        assert_eq!(data["local"], bench.host.ip().to_string());
        assert_eq!(data["link"], "eth0");
        assert_eq!(data["port"], 4789);
        assert_eq!(data["learning"], learning);
        assert_eq!(data["gbp"].as_bool().unwrap_or(false), gbp, "{data}");
        let accept_ra = bench
            .ns()
            .command("cat")
            .arg("/proc/sys/net/ipv6/conf/flannel.7/accept_ra")
            .output();
        assert_eq!(accept_ra.unwrap().stdout, b"0\n");

        bench.ip("address add 10.5.7.0/32 dev flannel.7");
        bench.ip("link add other type vxlan id 9 dstport 1000");
        bench.ip("link add outer type vxlan external dstport 1001");
        let [ours, other] = &bench.kernel.vxlan_links().unwrap()[..] else {
            panic!()
        };
        assert_eq!(ours.link.name, "flannel.7");
        assert_eq!(ours.link.mac, Some(spec.mac));
        assert_eq!(ours.link.addresses, ["10.5.7.0/32".parse().unwrap()]);
        assert_eq!((ours.link.mtu, ours.link.up), (1400, false));
        assert_eq!((ours.vni, ours.port), (spec.vni, 4789));
        assert_eq!((ours.parent, ours.local), (Some(spec.parent), Some(spec.local.into())));
        assert_eq!((ours.gbp, ours.learning), (gbp, learning));
        assert_eq!((other.vni.get(), other.port), (9, 1000));
        assert_eq!((other.parent, other.local, other.learning), (None, None, true));

        let again = bench.kernel.add_vxlan(&spec).unwrap_err();
        assert_eq!(again.io().raw_os_error(), Some(libc::EEXIST));
        assert!(
            again.to_string().contains("flannel.7 with VNI 7 and UDP port 4789"),
            "{again}"
        );
    }
}

#[test]
fn a_vxlan_device_is_made_where_ipv6_is_off() {
    let mut bench = Bench::new("vxlan_v4");
    bench.ns().sysctl("ipv6/conf/default/disable_ipv6", "1").unwrap();
    // Below what IPv6 needs: the device has no IPv6 state at all.
    let spec = VxlanSpec {
        mtu: 1200,
        ..bench.spec()
    };
    bench.add_vxlan(&spec);
    assert_eq!(bench.kernel.vxlan_links().unwrap()[0].link.mtu, 1200);
}

#[test]
fn links_are_changed_and_removed() {
    let mut bench = Bench::new("links");
    let vxlan = bench.vxlan();
    let flags = |bench: &Bench| bench.json("link show flannel.7")[0]["flags"].to_string();
    assert!(flags(&bench).contains("\"UP\""));
    // No IPv6 address came up with it.
    let address = "10.5.7.0/32".parse().unwrap();
    bench.kernel.add_address(vxlan, address).unwrap();
    let links = bench.kernel.links().unwrap();
    let link = links.iter().find(|link| link.index == vxlan).unwrap();
    assert_eq!(link.addresses, [address]);
    assert_eq!(links.iter().find(|link| link.name == "lo").unwrap().mac, None);

    let mac = mac("02:00:00:00:00:07");
    bench.kernel.set_mac(vxlan, mac).unwrap();
    bench.kernel.set_mtu(vxlan, 1300).unwrap();
    let shown = &bench.json("link show flannel.7")[0];
    assert_eq!(
        (&shown["address"], &shown["mtu"]),
        (&mac.to_string().into(), &1300.into())
    );
    assert!(flags(&bench).contains("\"UP\""), "they leave it up");

    for _ in 0..2 {
        bench.kernel.remove_address(vxlan, address).unwrap();
        assert_eq!(
            bench.json("address show dev flannel.7")[0]["addr_info"],
            Value::Array(vec![])
        );
    }
    for _ in 0..2 {
        bench.kernel.remove_link(vxlan).unwrap();
        assert!(bench.kernel.vxlan_links().unwrap().is_empty());
    }
    // All that was on it has gone with it.
    bench.kernel.remove_address(vxlan, address).unwrap();
    bench.apply(&[
        Operation::RemoveRoute(route("10.5.1.0/24", None, vxlan)),
        Operation::RemoveNeighbour(Neighbour {
            link: vxlan,
            address: ip("10.5.1.0"),
            mac,
        }),
        Operation::RemoveFdb(FdbEntry {
            link: vxlan,
            mac,
            to: ip("192.168.77.9"),
        }),
    ]);
    let error = bench.kernel.set_mtu(vxlan, 1300).unwrap_err();
    assert_eq!(error.io().raw_os_error(), Some(libc::ENODEV));
    // As another handle sees them: statistics by name pass the kernel's strict checks.
    assert_eq!(bench.kernel.dropped("eth0").unwrap(), 0);
}

#[test]
fn a_list_is_whole_although_it_changes_meanwhile() {
    let mut bench = Bench::new("whole");
    // Enough that the kernel hands the list over in several parts.
    let addresses: Vec<IpNet> = (0..1_000u32)
        .map(|number| {
            IpNet::new(
                (u32::from(Ipv4Addr::new(10, 3, 0, 1)) + number).to_be_bytes().into(),
                32,
            )
            .unwrap()
        })
        .collect();
    let eth0 = bench.index("eth0");
    for address in &addresses {
        bench.kernel.add_address(eth0, *address).unwrap();
    }
    let ns = bench.ns().clone();
    // Of another scope it goes in front of the others, so that they move in the list.
    let first: IpNet = "10.2.0.1/32".parse().unwrap();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                for verb in ["add", "del"] {
                    ns.ip(&format!("address {verb} {first} scope link dev eth0")).unwrap();
                }
            }
        });
        let lists: Vec<_> = (0..50).map(|_| bench.kernel.links()).collect();
        done.store(true, Ordering::Relaxed);
        for links in lists {
            let link = links.unwrap().into_iter().find(|link| link.index == eth0).unwrap();
            let found: Vec<&IpNet> = link
                .addresses
                .iter()
                .filter(|found| addresses.contains(found))
                .collect();
            assert!(found.iter().copied().eq(&addresses), "{} of them", found.len());
        }
    });
}

#[test]
fn checksum_offload_is_switched() {
    let mut bench = Bench::new("checksum");
    bench.vxlan();
    let feature = |bench: &Bench| {
        let output = bench
            .ns()
            .command("ethtool")
            .args(["-k", "flannel.7"])
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let line = text
            .lines()
            .find(|line| line.contains("tx-checksum-ip-generic"))
            .unwrap();
        line.ends_with(": on")
    };
    for on in [true, false, true] {
        inside(bench.ns(), || ethtool::set_tx_checksum("flannel.7", on)).unwrap();
        assert_eq!(feature(&bench), on);
        assert_eq!(inside(bench.ns(), || ethtool::tx_checksum("flannel.7")).unwrap(), on);
    }
    for name in ["none", "a-name-that-no-device-can-have"] {
        let error = inside(bench.ns(), || ethtool::tx_checksum(name)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENODEV));
    }
}

#[test]
fn paths_tell_what_is_on_the_link() {
    let mut bench = Bench::new("paths");
    let eth0 = bench.index("eth0");
    bench.ip("route del default");
    bench.ip("route add 10.8.0.0/16 via 192.168.77.9");
    for (kind, to) in [
        ("blackhole", "10.9.1.0/24"),
        ("unreachable", "10.9.2.0/24"),
        ("prohibit", "10.9.3.0/24"),
    ] {
        bench.ip(&format!("route add {kind} {to}"));
    }
    let there = ["192.168.77.5", "10.8.3.4"].map(ip);
    let not_there = ["10.7.0.1", "10.9.1.1", "10.9.2.1", "10.9.3.1"].map(ip);
    let destinations: Vec<IpAddr> = [there.as_slice(), &not_there, &there].concat().repeat(20);
    let paths = bench.kernel.paths(&destinations).unwrap();
    assert_eq!(paths.len(), destinations.len());
    for (destination, path) in destinations.iter().zip(paths) {
        let path = path.map(|path| (path.link, path.gateway, path.source));
        let source = Some(bench.host.ip().into());
        let expected = match there.iter().position(|there| there == destination) {
            Some(0) => Some((eth0, None, source)),
            Some(_) => Some((eth0, Some(ip("192.168.77.9")), source)),
            None => None,
        };
        assert_eq!(path, expected, "{destination}");
    }
    assert_eq!(
        bench.kernel.path_to(there[1]).unwrap().gateway,
        Some(ip("192.168.77.9"))
    );
}

/// How many peers the kernel layer must bear, three entries for each.
const PEERS: u32 = 5_000;

/// What programs `PEERS` peers on the device `link`, in the order in which a backend does.
fn peers(link: u32) -> Vec<Operation> {
    let peer = |number: u32| {
        let subnet = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 64, 0, 0)) + (number << 8));
        let [_, a, b, c] = number.to_be_bytes();
        let mac = Mac([2, 0, 0, a, b, c]);
        let to = Ipv4Addr::from(u32::from(Ipv4Addr::new(172, 16, 0, 0)) + number).into();
        [
            Operation::PutNeighbour(Neighbour {
                link,
                address: subnet.into(),
                mac,
            }),
            Operation::PutFdb(FdbEntry { link, mac, to }),
            Operation::PutRoute(Route {
                to: ipnet::Ipv4Net::new(subnet, 24).unwrap().into(),
                via: Some(subnet.into()),
                link,
                onlink: true,
            }),
        ]
    };
    (0..PEERS).flat_map(peer).collect()
}

/// What this thread has used of the processors.
fn cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap().into()
}

#[test]
fn thousands_of_entries_are_applied_and_a_refused_one_keeps_none_from_it() {
    let mut bench = Bench::new("scale");
    let vxlan = bench.vxlan();
    let mut operations = peers(vxlan);
    // The gateway is on no link.
    let bad = operations.len() / 2;
    let refused = route("10.5.0.0/24", Some("203.0.113.1"), vxlan);
    operations.insert(bad, Operation::PutRoute(refused));

    let (start, cpu) = (Instant::now(), cpu_time());
    let outcomes = bench.kernel.apply(&operations).unwrap();
    let applied = (start.elapsed(), cpu_time() - cpu);
    // Not by the clock: other tests run at the same time.
    assert!(applied.1 < Duration::from_secs(3), "{applied:?}");
    assert_eq!(outcomes.len(), operations.len());
    for (index, outcome) in outcomes.into_iter().enumerate() {
        match outcome {
            Ok(()) => assert_ne!(index, bad),
            Err(error) => {
                assert_eq!(index, bad, "{error}");
                assert_eq!(error.io().raw_os_error(), Some(libc::ENETUNREACH));
                let text = error.to_string();
                assert!(
                    text.starts_with("cannot add the route 10.5.0.0/24 via 203.0.113.1 over "),
                    "{text}"
                );
                assert!(
                    text.ends_with("(Nexthop has invalid gateway)"),
                    "the kernel's own words: {text}"
                );
            }
        }
    }
    operations.remove(bad);

    let (start, cpu) = (Instant::now(), cpu_time());
    let (routes, neighbours, fdb) = (
        bench.kernel.routes().unwrap(),
        bench.kernel.neighbours(vxlan).unwrap(),
        bench.kernel.fdb(vxlan).unwrap(),
    );
    let listed = (start.elapsed(), cpu_time() - cpu);
    let mut found: Vec<Operation> = Vec::new();
    found.extend(
        routes
            .iter()
            .filter(|found| found.protocol == PROTOCOL)
            .map(|found| Operation::PutRoute(found.route)),
    );
    let ours = neighbours
        .iter()
        .filter(|found| found.protocol == PROTOCOL && found.permanent);
    found.extend(ours.map(|found| Operation::PutNeighbour(found.neighbour)));
    found.extend(fdb.iter().map(|found| Operation::PutFdb(found.entry)));
    let key = |operation: &Operation| format!("{operation:?}");
    found.sort_by_cached_key(key);
    operations.sort_by_cached_key(key);
    assert_eq!(found.len(), operations.len());
    assert!(found == operations);
    let count = operations.len();
    println!("{count} operations (time, CPU time): applied {applied:?}, listed {listed:?}");

    // One peer among them comes back with another MAC and at another host.
    let [neighbour, entry, route] = peers(vxlan)[..3] else {
        panic!()
    };
    let (Operation::PutNeighbour(mut moved), Operation::PutFdb(old)) = (neighbour, entry) else {
        panic!()
    };
    moved.mac = mac("02:00:00:ff:ff:ff");
    let new = FdbEntry {
        mac: moved.mac,
        to: ip("172.31.0.1"),
        ..old
    };
    let change = [
        Operation::PutFdb(new),
        Operation::PutNeighbour(moved),
        route,
        Operation::RemoveFdb(old),
    ];
    let cpu = cpu_time();
    bench.apply(&change);
    let changed = cpu_time() - cpu;
    println!("one peer changed in {changed:?} of CPU time");
    assert!(changed < Duration::from_millis(10), "{changed:?}");
    bench.apply(&[Operation::RemoveFdb(new), entry]);

    let removals: Vec<Operation> = operations
        .iter()
        .map(|operation| match *operation {
            Operation::PutRoute(route) => Operation::RemoveRoute(route),
            Operation::PutFdb(entry) => Operation::RemoveFdb(entry),
            Operation::PutNeighbour(neighbour) => Operation::RemoveNeighbour(neighbour),
            other => other,
        })
        .collect();
    bench.apply(&removals);
    assert!(bench.kernel.fdb(vxlan).unwrap().is_empty());
    let left = bench.kernel.neighbours(vxlan).unwrap();
    assert!(left.iter().all(|found| found.protocol != PROTOCOL), "{left:?}");
    assert!(
        bench
            .kernel
            .routes()
            .unwrap()
            .iter()
            .all(|found| found.protocol != PROTOCOL)
    );
}

/// Reads a monitor, in the thread of the test.
struct Listener {
    runtime: tokio::runtime::Runtime,
    monitor: Monitor,
}

impl Listener {
    fn open(ns: &Namespace) -> Listener {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let monitor = inside(ns, || {
            let _context = runtime.enter();
            Monitor::open().unwrap()
        });
        Listener { runtime, monitor }
    }

    fn next(&mut self) -> Vec<Change> {
        let next = async { timeout(PATIENCE, self.monitor.next()).await };
        let changes = self.runtime.block_on(next).expect("nothing changes").unwrap();
        assert!(!changes.is_empty());
        changes
    }

    /// Waits for a change that `is_it`; all that came before it, too.
    fn until(&mut self, is_it: impl Fn(&Change) -> bool) -> Vec<Change> {
        let start = Instant::now();
        let mut seen = Vec::new();
        while !seen.iter().any(&is_it) {
            assert!(start.elapsed() < PATIENCE, "not among {seen:?}");
            seen.append(&mut self.next());
        }
        seen
    }
}

#[test]
fn the_monitor_tells_of_routes() {
    let mut bench = Bench::new("monitor_routes");
    let eth0 = bench.index("eth0");
    let mut listener = Listener::open(bench.ns());
    let told = |change: &Change, via: Option<&str>, protocol: u8, was_gone: bool| {
        matches!(change, Change::Route { found, gone } if *gone == was_gone && found.protocol == protocol
            && found.route == route("10.5.1.0/24", via, if via.is_some() { eth0 } else { 0 }))
    };
    let (first, second) = (Some("192.168.77.8"), Some("192.168.77.9"));
    bench.ip("route add 10.5.1.0/24 via 192.168.77.8 proto 85");
    listener.until(|change| told(change, first, 85, false));
    bench.ip("route replace 10.5.1.0/24 via 192.168.77.9");
    listener.until(|change| told(change, second, 3, false));
    bench.ip("route replace blackhole 10.5.1.0/24");
    listener.until(|change| told(change, None, 3, false));
    bench.ip("route del blackhole 10.5.1.0/24");
    listener.until(|change| told(change, None, 3, true));
    bench.ip("address add fd77::1/64 dev eth0 nodad");
    bench.ip("route add fd05::/64 via fd77::9 proto 85");
    let v6 = Route {
        to: "fd05::/64".parse().unwrap(),
        via: Some(ip("fd77::9")),
        link: eth0,
        onlink: false,
    };
    listener.until(|change| matches!(change, Change::Route { found, gone: false } if found.route == v6));
    // Another table's are none of ours.
    bench.ip("route add 10.5.2.0/24 via 192.168.77.8 table 7");
    bench.ip("route flush proto 85");
    bench.ip("-6 route flush proto 85");
    let seen = listener.until(|change| matches!(change, Change::Route { found, gone: true } if found.route == v6));
    let other = "10.5.2.0/24".parse().unwrap();
    assert!(
        !seen
            .iter()
            .any(|change| matches!(change, Change::Route { found, .. } if found.route.to == other))
    );
}

#[test]
fn the_monitor_tells_of_links_and_addresses() {
    let mut bench = Bench::new("monitor_links");
    let mut listener = Listener::open(bench.ns());
    let spec = bench.spec();
    bench.add_vxlan(&spec);
    let vxlan = bench.index(&spec.name);
    let is = |change: &Change, is_up: bool, is_mtu: u32, is_gone: bool| {
        matches!(change, Change::Link { index, name, up, mtu, gone }
            if (*index, name.as_str(), *up, *mtu, *gone) == (vxlan, "flannel.7", is_up, is_mtu, is_gone))
    };
    listener.until(|change| is(change, false, 1450, false));
    bench.ip("link set flannel.7 up");
    listener.until(|change| is(change, true, 1450, false));
    bench.ip("link set flannel.7 mtu 1400");
    listener.until(|change| is(change, true, 1400, false));
    for (verb, was_gone) in [("add", false), ("del", true)] {
        for address in ["10.5.7.0/32", "fd77::7/64"] {
            bench.ip(&format!("address {verb} {address} dev flannel.7"));
            let address = address.parse().unwrap();
            listener.until(|change| {
                *change
                    == Change::Address {
                        link: vxlan,
                        address,
                        gone: was_gone,
                    }
            });
        }
    }
    bench.ip("link set flannel.7 down");
    listener.until(|change| is(change, false, 1400, false));
    // In a bridge and out of it: the link is still there.
    bench.ip("link add cbr0 type bridge");
    bench.ip("link set flannel.7 master cbr0");
    bench.ip("link set flannel.7 nomaster");
    bench.ip("link set flannel.7 mtu 1300");
    let seen = listener.until(|change| is(change, false, 1300, false));
    assert!(
        !seen
            .iter()
            .any(|change| matches!(change, Change::Link { gone: true, .. })),
        "{seen:?}"
    );
    bench.ip("link del flannel.7");
    listener.until(|change| is(change, false, 1300, true));
}

#[test]
fn the_monitor_tells_of_neighbours_and_forwarding_entries() {
    let mut bench = Bench::new("monitor_neighbours");
    let vxlan = bench.vxlan();
    let mut listener = Listener::open(bench.ns());
    let address = ip("10.5.1.0");
    let neighbour = |mac: &str, protocol, permanent| FoundNeighbour {
        neighbour: Neighbour {
            link: vxlan,
            address,
            mac: mac.parse().unwrap(),
        },
        protocol,
        permanent,
    };
    let expect = |listener: &mut Listener, now: Option<FoundNeighbour>| {
        let link = vxlan;
        listener.until(|change| *change == Change::Neighbour { link, address, now });
    };
    let (first, second) = ("02:00:00:00:00:01", "02:00:00:00:00:02");
    bench.ip(&format!(
        "neigh add 10.5.1.0 lladdr {first} dev flannel.7 nud permanent protocol 85"
    ));
    expect(&mut listener, Some(neighbour(first, 85, true)));
    bench.ip(&format!(
        "neigh replace 10.5.1.0 lladdr {second} dev flannel.7 nud stale"
    ));
    expect(&mut listener, Some(neighbour(second, 85, false)));
    bench.ip("neigh del 10.5.1.0 dev flannel.7");
    expect(&mut listener, None);

    let bridge = |arguments: &str| {
        run(command("bridge")
            .args(["-n", bench.ns().name()])
            .args(arguments.split(' ')))
        .unwrap();
    };
    let told = |change: &Change, to: &str, was_gone: bool| {
        let entry = FdbEntry {
            link: vxlan,
            mac: first.parse().unwrap(),
            to: ip(to),
        };
        matches!(change, Change::Fdb { found, gone } if *gone == was_gone && found.entry == entry && found.permanent)
    };
    bridge(&format!("fdb add {first} dev flannel.7 dst 192.168.77.8"));
    listener.until(|change| told(change, "192.168.77.8", false));
    bridge(&format!("fdb replace {first} dev flannel.7 dst 192.168.77.9"));
    listener.until(|change| told(change, "192.168.77.9", false));
    bridge(&format!("fdb del {first} dev flannel.7"));
    listener.until(|change| told(change, "192.168.77.9", true));
}

#[test]
fn the_monitor_leaves_out_what_its_own_kernel_handle_does() {
    let mut bench = Bench::new("monitor_own");
    let vxlan = bench.vxlan();
    let mut listener = Listener::open(bench.ns());
    listener.monitor.ignore(&bench.kernel);
    let own = route("10.5.1.0/24", None, vxlan);
    let neighbour = Neighbour {
        link: vxlan,
        address: ip("10.5.1.0"),
        mac: mac("02:00:00:00:00:01"),
    };
    bench.apply(&[
        Operation::PutRoute(own),
        Operation::PutNeighbour(neighbour),
        Operation::RemoveRoute(own),
    ]);
    bench.ip("route add 10.5.2.0/24 dev flannel.7");
    let foreign = route("10.5.2.0/24", None, vxlan);
    let seen = listener.until(|change| matches!(change, Change::Route { found, .. } if found.route == foreign));
    assert_eq!(seen.len(), 1, "{seen:?}");
}

#[test]
fn the_monitor_tells_that_it_lost_changes_and_goes_on() {
    let mut bench = Bench::new("monitor_lost");
    let vxlan = bench.vxlan();
    let mut listener = Listener::open(bench.ns());
    // Nobody reads meanwhile.
    bench.apply(&peers(vxlan));
    listener.until(|change| *change == Change::Lost);
    bench.ip("link set flannel.7 mtu 1300");
    let seen = listener.until(|change| matches!(change, Change::Link { mtu: 1300, .. }));
    assert!(
        seen.iter().filter(|change| **change == Change::Lost).count() <= 1,
        "told once"
    );
    assert!(seen.len() < peers(vxlan).len());
}

#[test]
fn a_monitor_that_is_not_waited_for_loses_nothing() {
    let bench = Bench::new("monitor_cancel");
    let mut listener = Listener::open(bench.ns());
    let Listener { runtime, monitor } = &mut listener;
    runtime.block_on(async {
        for _ in 0..3 {
            let nothing = timeout(Duration::from_millis(1), monitor.next()).await;
            assert!(nothing.is_err(), "{nothing:?}");
        }
    });
    bench.ip("route add 10.5.2.0/24 dev eth0");
    let told = wait_until(PATIENCE, "the route", || {
        listener
            .next()
            .iter()
            .any(|change| matches!(change, Change::Route { gone: false, .. }))
    });
    told.unwrap();
}
