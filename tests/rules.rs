//! Traffic rules by what they do to real packets, with each program that can put them in place. Needs root.

mod lab;

use flannel::lab::{Container, Host, HostOptions, Lab, Namespace, has_program, run, wait_until};
use lab::{CONFIG, Daemon, Overlay, PATIENCE, Registry, assert_loses, assert_reaches, inside, new_lab, ping};
use socket2::SockRef;
use std::{
    collections::BTreeSet,
    fs,
    io::ErrorKind,
    net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket},
    os::unix::fs::symlink,
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

/// The configuration with the rules in nftables.
const NFT_CONFIG: &str = r#"{"Network":"10.5.0.0/16","EnableNFTables":true}"#;

/// Looked after as often as can be.
const RESYNC: &str = "--iptables-resync=1";

/// Longer than any test: nothing is put back.
const NO_RESYNC: &str = "--iptables-resync=86400";

/// Any port will do.
const PORT: u16 = 7_000;

/// Who puts the rules in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    IptablesNft,
    IptablesLegacy,
    Nftables,
}

impl Way {
    /// Those that this machine has.
    fn all() -> Vec<Way> {
        let all = [Way::IptablesNft, Way::IptablesLegacy, Way::Nftables];
        let here = |way: &Way| {
            let here = has_program(way.program());
            if !here {
                eprintln!("not tested: {} is not installed", way.program());
            }
            here
        };
        let found: Vec<Way> = all.into_iter().filter(here).collect();
        assert!(!found.is_empty(), "neither iptables nor nft is installed");
        found
    }

    fn program(self) -> &'static str {
        match self {
            Way::IptablesNft => "iptables-nft",
            Way::IptablesLegacy => "iptables-legacy",
            Way::Nftables => "nft",
        }
    }

    /// For names of labs.
    fn short(self) -> &'static str {
        match self {
            Way::IptablesNft => "in",
            Way::IptablesLegacy => "il",
            Way::Nftables => "n",
        }
    }

    fn config(self) -> &'static str {
        match self {
            Way::Nftables => NFT_CONFIG,
            _ => CONFIG,
        }
    }

    /// A PATH on which `iptables` is the variant.
    fn path(self, lab: &Lab) -> String {
        let dir = lab.dir().join(self.short());
        if self != Way::Nftables && !dir.exists() {
            fs::create_dir(&dir).unwrap();
            for name in ["iptables", "ip6tables"] {
                let variant = self.program().replacen("iptables", name, 1);
                for suffix in ["", "-save", "-restore"] {
                    let file = run(Command::new("sh").args(["-c", &format!("command -v {variant}{suffix}")])).unwrap();
                    symlink(file.trim(), dir.join(format!("{name}{suffix}"))).unwrap();
                }
            }
        }
        format!("PATH={}:{}", dir.display(), std::env::var("PATH").unwrap())
    }

    /// A daemon with this way.
    fn daemon(self, name: &str, lab: &Lab, host: &Host, registry: &Registry, flags: &[&str]) -> Daemon {
        let daemon = Daemon::named(name, lab, host, registry).under(&["env", &self.path(lab)]);
        flags.iter().fold(daemon, |daemon, flag| daemon.with(*flag))
    }

    /// Two hosts with a container each.
    fn overlay(self, name: &str, flags: &[&str]) -> Overlay {
        let mut lab = new_lab(&format!("{name}_{}", self.short()));
        let registry = Registry::embedded(&lab);
        let mut hosts: Vec<Host> = ["h1", "h2"].map(|name| lab.host(name).unwrap()).into();
        registry.configure(hosts[0].ns(), self.config());
        let mut daemons: Vec<Daemon> = hosts
            .iter()
            .map(|host| self.daemon(host.name(), &lab, host, &registry, flags))
            .collect();
        daemons.iter_mut().for_each(Daemon::start);
        let containers = (1..)
            .zip(hosts.iter_mut().zip(&mut daemons))
            .map(|(n, (host, daemon))| host.add_container(&format!("c{n}"), daemon.wait_ready()).unwrap())
            .collect();
        Overlay {
            daemons,
            containers,
            hosts,
            registry,
            lab,
        }
    }

    /// The lines of ours in the namespace, in order, without what differs from one moment to the next.
    fn ours(self, ns: &Namespace) -> Vec<String> {
        let text = match self {
            Way::Nftables => sh(
                ns,
                "for table in 'ip flannel-ipv4' 'ip6 flannel-ipv6'; do nft list table $table 2>/dev/null || true; done",
            ),
            _ => sh(ns, &format!("{0}-save -t nat; {0}-save -t filter", self.program())),
        };
        let lines = text.lines().map(str::trim);
        lines
            .filter(|line| line.contains("flannel") || line.contains("FLANNEL"))
            // Counters of chains.
            .filter(|line| !line.starts_with(':'))
            .map(str::to_owned)
            .collect()
    }
}

/// What a shell in the namespace prints; it must succeed.
fn sh(ns: &Namespace, script: &str) -> String {
    run(ns.command("sh").args(["-ec", script])).unwrap()
}

/// A socket in the namespace that hears datagrams to its port.
fn listen(ns: &Namespace) -> UdpSocket {
    let socket = inside(ns, || UdpSocket::bind((Ipv4Addr::UNSPECIFIED, PORT))).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    socket
}

/// Sends a datagram from a socket of its own, so that it is a connection of its own to the kernel; to a group by `interface`.
fn send(ns: &Namespace, from: Ipv4Addr, to: Ipv4Addr, interface: Option<Ipv4Addr>) {
    inside(ns, || {
        let socket = UdpSocket::bind((from, 0)).unwrap();
        if let Some(interface) = interface {
            SockRef::from(&socket).set_multicast_if_v4(&interface).unwrap();
        }
        socket.send_to(b"whence", (to, PORT)).unwrap();
    });
}

/// The address that a datagram arrives from. What is lost, while the peers learn of one another, is sent again.
fn source_heard(listener: &UdpSocket, send: impl Fn()) -> IpAddr {
    let mut source = None;
    wait_until(PATIENCE, "a datagram to arrive", || {
        send();
        source = listener.recv_from(&mut [0; 16]).ok().map(|(_, from)| from.ip());
        source.is_some()
    })
    .unwrap();
    source.unwrap()
}

/// The same from one namespace to an address in another.
fn source_seen(from: &Namespace, to: &Namespace, address: Ipv4Addr) -> IpAddr {
    source_heard(&listen(to), || send(from, Ipv4Addr::UNSPECIFIED, address, None))
}

#[test]
fn sources_are_kept_inside_the_overlay_and_masqueraded_outside() {
    for way in Way::all() {
        let mut overlay = way.overlay("masq", &["--ip-masq", NO_RESYNC]);
        let outside = overlay.lab.host("out").unwrap();
        let [c1, c2] = &overlay.containers[..] else {
            unreachable!()
        };
        let host = &overlay.hosts[0];
        let file = fs::read_to_string(overlay.daemons[0].subnet_file()).unwrap();
        assert!(file.contains("FLANNEL_IPMASQ=true"), "{way:?}: {file}");

        assert_eq!(source_seen(&c1.ns, &c2.ns, c2.ip), c1.ip, "{way:?}: inside");
        assert_eq!(
            source_seen(&c1.ns, outside.ns(), outside.ip()),
            host.ip(),
            "{way:?}: out"
        );

        // From outside through this host: to its own container unchanged, and with an address of ours to another host's, whose
        // answer would not come back here else.
        outside
            .ns()
            .ip(&format!("route add 10.5.0.0/16 via {}", host.ip()))
            .unwrap();
        assert_eq!(source_seen(outside.ns(), &c1.ns, c1.ip), outside.ip(), "{way:?}: in");
        let subnet = overlay.daemons[0].subnet().subnet;
        let source = source_seen(outside.ns(), &c2.ns, c2.ip);
        assert_eq!(source, subnet.network(), "{way:?}: in and on");
    }
}

#[test]
fn multicast_and_what_kube_proxy_has_marked_are_left_alone() {
    for way in Way::all() {
        let mut overlay = way.overlay("alone", &["--ip-masq", NO_RESYNC]);
        let outside = overlay.lab.host("out").unwrap();
        let (c1, host) = (&overlay.containers[0], &overlay.hosts[0]);

        let group = Ipv4Addr::new(239, 1, 2, 3);
        let listener = listen(outside.ns());
        listener.join_multicast_v4(&group, &outside.ip()).unwrap();
        let bridge = overlay.daemons[0].subnet().subnet.addr();
        let source = source_heard(&listener, || send(host.ns(), bridge, group, Some(host.ip())));
        assert_eq!(source, bridge, "{way:?}: multicast");
        // The same address to one receiver is masqueraded: it was the group that mattered.
        let source = source_heard(&listener, || send(host.ns(), bridge, outside.ip(), None));
        assert_eq!(source, host.ip(), "{way:?}: unicast");

        let mark = match way {
            Way::Nftables => "nft add table ip marks
                 nft add chain ip marks prerouting '{ type filter hook prerouting priority -150; }'
                 nft add rule ip marks prerouting udp dport 7000 meta mark set 0x4001"
                .to_owned(),
            _ => format!(
                "{} -t mangle -A PREROUTING -p udp --dport 7000 -j MARK --set-mark 0x4001",
                way.program()
            ),
        };
        sh(host.ns(), &mark);
        let source = source_heard(&listener, || send(&c1.ns, Ipv4Addr::UNSPECIFIED, outside.ip(), None));
        assert_eq!(source, c1.ip, "{way:?}: marked");
    }
}

#[test]
fn forwarded_packets_pass_under_a_drop_policy() {
    for way in Way::all() {
        let mut overlay = way.overlay("drop", &[NO_RESYNC, "--iptables-forward-rules=false"]);
        let [c1, c2] = &overlay.containers[..] else {
            unreachable!()
        };
        assert_reaches(&c1.ns, c2.ip);
        let policy = match way {
            // In nftables only the rules of the chain itself can save a packet from its policy.
            Way::Nftables => "nft add table ip flannel-ipv4
                 nft add chain ip flannel-ipv4 forward '{ type filter hook forward priority 0; policy drop; }'"
                .to_owned(),
            _ => format!("{} -P FORWARD DROP", way.program()),
        };
        let set_policy = |hosts: &[Host]| hosts.iter().for_each(|host| drop(sh(host.ns(), &policy)));
        set_policy(&overlay.hosts);
        assert_loses(&c1.ns, c2.ip);

        for (daemon, host) in overlay.daemons.iter_mut().zip(&overlay.hosts) {
            daemon.stop();
            *daemon = way.daemon(
                &format!("{}_again", host.name()),
                &overlay.lab,
                host,
                &overlay.registry,
                &[NO_RESYNC],
            );
            daemon.start_and_wait();
        }
        if way == Way::Nftables {
            set_policy(&overlay.hosts);
        }
        assert_reaches(&c1.ns, c2.ip);
        assert_reaches(&c2.ns, c1.ip);
    }
}

#[test]
fn a_chain_of_others_that_drops_whatever_ours_accepts_is_named() {
    let ways = Way::all();
    for (way, other) in ways
        .iter()
        .flat_map(|&way| ways.iter().map(move |&other| (way, other)))
        .filter(|(way, other)| way != other)
    {
        let mut lab = new_lab(&format!("named_{}_{}", way.short(), other.short()));
        let registry = Registry::embedded(&lab);
        let host = lab.host("h1").unwrap();
        registry.configure(host.ns(), way.config());
        let mut daemon = way.daemon("h1", &lab, &host, &registry, &[RESYNC]);
        daemon.start_and_wait();
        // Docker, which does so, starts after us.
        let (drop, named) = match other {
            Way::Nftables => (
                "nft add table inet wall
                 nft add chain inet wall forward '{ type filter hook forward priority 0; policy drop; }'",
                "inet wall forward of nftables",
            ),
            Way::IptablesNft => ("iptables-nft -P FORWARD DROP", "ip filter FORWARD of nftables"),
            Way::IptablesLegacy => ("iptables-legacy -P FORWARD DROP", "FORWARD of iptables-legacy"),
        };
        assert!(!daemon.log().contains("is to drop"), "{}", daemon.log());
        sh(host.ns(), drop);
        let line = daemon.wait_for_log(named);
        assert!(line.contains("ACCEPT`") || line.contains("policy accept"), "{line}");
    }
}

#[test]
fn rules_that_are_removed_or_changed_are_put_back_in_order() {
    for way in Way::all() {
        let mut lab = new_lab(&format!("back_{}", way.short()));
        let registry = Registry::embedded(&lab);
        let host = lab.host("h1").unwrap();
        registry.configure(host.ns(), way.config());
        let mut daemon = way.daemon("h1", &lab, &host, &registry, &["--ip-masq", RESYNC]);
        daemon.start_and_wait();
        let whole = way.ours(host.ns());
        assert!(whole.len() >= 8, "{way:?}: {whole:#?}");
        for change in changes(way) {
            sh(host.ns(), &change);
            assert_ne!(way.ours(host.ns()), whole, "{way:?}: nothing changed by {change}");
            let what = format!("{way:?}: the rules to be back after {change}");
            wait_until(PATIENCE, &what, || way.ours(host.ns()) == whole).unwrap();
        }
        daemon.wait_for_log("another program has changed or removed the IPv4 traffic rules");
        daemon.assert_running();
    }
}

/// What other programs and people do to rules.
fn changes(way: Way) -> Vec<String> {
    if way == Way::Nftables {
        let first = "$(nft -a list chain ip flannel-ipv4 postrtg | sed -n '/comment/s/.*# handle //p' | head -n 1)";
        return [
            "nft flush chain ip flannel-ipv4 postrtg",
            "nft flush table ip flannel-ipv4",
            "nft delete table ip flannel-ipv4",
            "nft flush ruleset",
            "nft add rule ip flannel-ipv4 forward ip saddr 10.5.0.0/16 accept comment '\"flanneld forward\"'",
            &format!("nft delete rule ip flannel-ipv4 postrtg handle {first}"),
            // The first rule comes last.
            &format!(
                "nft \"delete rule ip flannel-ipv4 postrtg handle {first}; add rule ip flannel-ipv4 postrtg \
                 meta mark & 0x4000 == 0x4000 return comment \\\"flanneld masq\\\"\""
            ),
        ]
        .map(str::to_owned)
        .into();
    }
    [
        "-t nat -D POSTROUTING -m comment --comment 'flanneld masq' -j FLANNEL-POSTRTG",
        "-t nat -A POSTROUTING -m comment --comment 'flanneld masq' -j FLANNEL-POSTRTG",
        "-t nat -F FLANNEL-POSTRTG",
        "-t nat -D FLANNEL-POSTRTG 3",
        "-t nat -F",
        "-D FORWARD -m comment --comment 'flanneld forward' -j FLANNEL-FWD",
        "-A FLANNEL-FWD -s 10.5.0.0/16 -m comment --comment 'flanneld forward' -j ACCEPT",
        "-I FLANNEL-FWD -d 10.5.0.0/16 -j DROP",
        "-F && iptables -X",
        // The first rule comes last.
        "-t nat -D FLANNEL-POSTRTG 1 && iptables -t nat -A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment \
         'flanneld masq' -j RETURN",
    ]
    .map(|arguments| format!("iptables {arguments}").replace("iptables ", &format!("{} ", way.program())))
    .into()
}

#[test]
fn rules_of_an_earlier_network_and_of_another_program_go_and_stay_till_then() {
    let ways = Way::all();
    for (before, after) in ways
        .iter()
        .flat_map(|&before| ways.iter().map(move |&after| (before, after)))
    {
        let mut lab = new_lab(&format!("old_{}_{}", before.short(), after.short()));
        let registry = Registry::embedded(&lab);
        let host = lab.host("h1").unwrap();
        registry.configure(host.ns(), before.config());
        let mut daemon = before.daemon("before", &lab, &host, &registry, &["--ip-masq", NO_RESYNC]);
        daemon.start_and_wait();
        let old = before.ours(host.ns());
        daemon.stop();
        assert_eq!(before.ours(host.ns()), old, "{before:?}: gone with the daemon");

        let config = after.config().replace("10.5.0.0", "10.9.0.0");
        registry.flanneld(host.ns(), &["network", "set", "--force", &config]);
        let mut daemon = after.daemon("after", &lab, &host, &registry, &["--ip-masq", NO_RESYNC]);
        daemon.start_and_wait();
        for way in &ways {
            let ours = way.ours(host.ns()).join("\n");
            assert!(!ours.contains("10.5."), "{before:?}, {after:?}, {way:?}: {ours}");
        }
        let new = after.ours(host.ns());
        assert_eq!(new.len(), if before == after { old.len() } else { new.len() });
        let matching = new.iter().filter(|line| line.contains("10.9.0.0/16")).count();
        assert_eq!(matching, 7, "{before:?}, {after:?}: {new:#?}");
        daemon.stop();

        let mut daemon = after.daemon("none", &lab, &host, &registry, &["--iptables-forward-rules=false"]);
        daemon.start_and_wait();
        for way in &ways {
            let nobody: [&str; 0] = [];
            assert_eq!(
                way.ours(host.ns()),
                nobody,
                "{before:?}, {after:?}, {way:?}: not wanted"
            );
        }
    }
}

#[test]
fn packets_never_show_a_wrong_source_while_rules_are_put_back() {
    for way in Way::all() {
        let mut overlay = way.overlay("window", &["--ip-masq", RESYNC]);
        let outside = overlay.lab.host("out").unwrap();
        let [c1, c2] = &overlay.containers[..] else {
            unreachable!()
        };
        assert_reaches(&c1.ns, c2.ip);
        let host = &overlay.hosts[0];
        let whole = way.ours(host.ns());
        // Changes nothing for any packet, and has the rules written anew.
        let change = match way {
            Way::Nftables => "nft add rule ip flannel-ipv4 postrtg return comment '\"flanneld masq\"'".to_owned(),
            _ => format!(
                "{} -t nat -A FLANNEL-POSTRTG -m comment --comment 'flanneld masq' -j RETURN",
                way.program()
            ),
        };

        let stop = AtomicBool::new(false);
        let (out, within) = thread::scope(|scope| {
            let out = scope.spawn(|| stream(c1, outside.ns(), outside.ip(), &stop));
            let within = scope.spawn(|| stream(c1, &c2.ns, c2.ip, &stop));
            let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                for _ in 0..3 {
                    sh(host.ns(), &change);
                    wait_until(PATIENCE, "the rules to be back", || way.ours(host.ns()) == whole).unwrap();
                }
                // And a daemon that dies and is started again.
                overlay.daemons[0].kill9();
                overlay.daemons[0].start_and_wait();
            }));
            stop.store(true, Ordering::Relaxed);
            done.unwrap();
            (out.join().unwrap(), within.join().unwrap())
        });
        assert_eq!(out, BTreeSet::from([host.ip().into()]), "{way:?}: outside");
        assert_eq!(within, BTreeSet::from([c1.ip.into()]), "{way:?}: inside");
    }
}

/// The sources that are seen of datagrams that go out one after the other, each a connection of its own.
fn stream(from: &Container, to: &Namespace, address: Ipv4Addr, stop: &AtomicBool) -> BTreeSet<IpAddr> {
    let listener = listen(to);
    listener.set_nonblocking(true).unwrap();
    let mut sources = BTreeSet::new();
    let mut hear = || {
        loop {
            match listener.recv_from(&mut [0; 16]) {
                Ok((_, source)) => sources.insert(source.ip()),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => panic!("cannot receive: {error}"),
            };
        }
    };
    inside(&from.ns, || {
        while !stop.load(Ordering::Relaxed) {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
            // While the daemon is away there is no route inside.
            let _ = socket.send_to(b"whence", SocketAddr::from((address, PORT)));
            hear();
            // Slow enough for both kernels to remember all of them.
            thread::sleep(Duration::from_millis(1));
        }
    });
    sources
}

#[test]
fn both_families_of_a_dual_stack_network_have_rules() {
    let config = r#""Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:12:13::/48""#;
    for way in Way::all() {
        let mut lab = new_lab(&format!("dual_{}", way.short()));
        let registry = Registry::embedded(&lab);
        let host = lab.host("h1").unwrap();
        let nft = way == Way::Nftables;
        registry.configure(host.ns(), &format!("{{{config},\"EnableNFTables\":{nft}}}"));
        let mut daemon = way.daemon("h1", &lab, &host, &registry, &["--ip-masq", RESYNC]);
        daemon.start_and_wait();
        let (see, destroy) = match way {
            Way::Nftables => (
                "nft list table ip6 flannel-ipv6 2>/dev/null || true".to_owned(),
                "nft delete table ip6 flannel-ipv6".to_owned(),
            ),
            _ => {
                let program = way.program().replace("ip", "ip6");
                (format!("{program}-save"), format!("{program} -t nat -F"))
            }
        };
        let complete = || {
            let rules = sh(host.ns(), &see);
            let ours = rules.lines().filter(|line| line.contains("fd00:12:13::/48"));
            // Five for masquerading, two for forwarding.
            ours.count() == 7 && rules.contains("ff00::/8")
        };
        assert!(complete(), "{way:?}: {}", sh(host.ns(), &see));
        sh(host.ns(), &destroy);
        assert!(!complete());
        wait_until(PATIENCE, "the IPv6 rules to be back", complete).unwrap();
        assert!(
            daemon.log().contains("net.ipv6.conf.all.forwarding"),
            "{}",
            daemon.log()
        );
    }
}

/// Runs its arguments where no program for rules is installed.
const WITHOUT_TOOLS: &str = "mount -t tmpfs none /usr/sbin && exec \"$@\"";

/// A host with a daemon for which neither iptables nor nft is installed, but for what is in `path`.
fn without_tools(name: &str, path: &str, flags: &[&str]) -> (Daemon, Host, Lab) {
    let mut lab = new_lab(name);
    let registry = Registry::embedded(&lab);
    let host = lab.host("h1").unwrap();
    registry.configure(host.ns(), CONFIG);
    let path = format!("PATH={}/{path}:/usr/bin:/bin", lab.dir().display());
    let daemon = Daemon::new(&lab, &host, &registry).under(&[
        "unshare",
        "--mount",
        "env",
        &path,
        "sh",
        "-c",
        WITHOUT_TOOLS,
        "sh",
    ]);
    let daemon = flags.iter().fold(daemon, |daemon, flag| daemon.with(*flag));
    (daemon, host, lab)
}

#[test]
fn without_any_tool_only_masquerading_is_an_error() {
    let (mut daemon, _host, _lab) = without_tools("bare", "none", &[]);
    daemon.start_and_wait();
    let line = daemon.wait_for_log("neither iptables nor nft is installed");
    assert!(line.contains("--iptables-forward-rules=false"), "{line}");
    assert!(daemon.stop().success());

    let (mut daemon, _host, _lab) = without_tools("bare_quiet", "none", &["--iptables-forward-rules=false"]);
    daemon.start_and_wait();
    assert!(!daemon.log().contains("nft is installed"), "{}", daemon.log());

    let (mut daemon, _host, _lab) = without_tools("bare_masq", "none", &["--ip-masq"]);
    daemon.start();
    assert_eq!(daemon.wait_exit().code(), Some(1));
    let log = daemon.log();
    let last = log.lines().last().unwrap();
    assert!(last.contains("--ip-masq needs iptables or nft"), "{last}");
    assert!(last.contains("install the package"), "{last}");
}

#[test]
fn where_only_nft_is_installed_the_rules_go_there() {
    if !Way::all().contains(&Way::Nftables) {
        return;
    }
    let (mut daemon, host, lab) = without_tools("only", "bin", &["--ip-masq"]);
    fs::create_dir(lab.dir().join("bin")).unwrap();
    let nft = run(Command::new("sh").args(["-c", "command -v nft"])).unwrap();
    fs::copy(nft.trim(), lab.dir().join("bin/nft")).unwrap();
    daemon.start_and_wait();
    daemon.wait_for_log("EnableNFTables is not set, and iptables is not installed");
    assert!(Way::Nftables.ours(host.ns()).len() > 8);
}

#[test]
fn a_host_that_does_not_forward_is_told_so() {
    let mut lab = new_lab("forwarding");
    let registry = Registry::embedded(&lab);
    let host = lab.host_with("h1", &HostOptions::default()).unwrap();
    host.ns().sysctl("ipv4/ip_forward", "0").unwrap();
    registry.configure(host.ns(), CONFIG);
    let mut daemon = Daemon::new(&lab, &host, &registry);
    daemon.start_and_wait();
    let line = daemon.wait_for_log("net.ipv4.ip_forward");
    assert!(line.contains("sysctl -w net.ipv4.ip_forward=1"), "{line}");
}

#[test]
fn two_capabilities_are_enough_for_packets_and_rules() {
    for way in Way::all() {
        let mut lab = new_lab(&format!("caps_{}", way.short()));
        let registry = Registry::embedded(&lab);
        let mut hosts: Vec<Host> = ["h1", "h2"].map(|name| lab.host(name).unwrap()).into();
        registry.configure(hosts[0].ns(), way.config());
        let path = way.path(&lab);
        // What scripts/systemd/flanneld.service leaves to the daemon.
        let setpriv = [
            "env",
            &path,
            "setpriv",
            "--no-new-privs",
            "--inh-caps=-all",
            "--bounding-set=-all,+net_admin,+net_raw",
        ];
        let mut daemons: Vec<Daemon> = hosts
            .iter()
            .map(|host| Daemon::new(&lab, host, &registry).under(&setpriv).with("--ip-masq"))
            .collect();
        daemons.iter_mut().for_each(Daemon::start);
        let containers: Vec<Container> = hosts
            .iter_mut()
            .zip(&mut daemons)
            .map(|(host, daemon)| {
                host.add_container(&format!("c{}", host.name()), daemon.wait_ready())
                    .unwrap()
            })
            .collect();
        assert_reaches(&containers[0].ns, containers[1].ip);
        assert_eq!(ping(&containers[1].ns, hosts[0].ip(), 1).received, 1);
        assert!(way.ours(hosts[0].ns()).len() > 8, "{way:?}");
    }
}
