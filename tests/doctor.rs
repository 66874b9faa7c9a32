//! `flanneld doctor`: each fault is provoked and must be found, with its remedy, among what is well. Needs root.

mod lab;

use flannel::lab::{Host, HostOptions, Lab, Namespace, run, wait_until};
use lab::{
    CONFIG, Daemon, Overlay, PATIENCE, Registry,
    certificates::Authority,
    etcd::{EtcdOptions, EtcdServer},
    flanneld, new_lab, ping,
};
use serde::Deserialize;
use std::{
    fs,
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// How long the command may take, whatever is wrong; on a machine that others use as well.
const LIMIT: Duration = Duration::from_secs(10);

/// One check of `--json`.
#[derive(Debug, Deserialize)]
struct Found {
    check: String,
    state: String,
    what: String,
    remedy: Option<String>,
}

/// What the doctor says.
#[derive(Debug)]
struct Diagnosis {
    found: Vec<Found>,
    code: i32,
}

impl Diagnosis {
    /// Of a host, with the flags of its daemon.
    fn of(ns: &Namespace, registry: &Registry, subnet_file: &Path) -> Diagnosis {
        let begun = Instant::now();
        let file = format!("--subnet-file={}", subnet_file.display());
        let output = registry.try_flanneld(ns, &["doctor", "--json", &file]);
        let took = begun.elapsed();
        assert!(took < LIMIT, "the doctor took {took:?}");
        let said = String::from_utf8_lossy(&output.stdout);
        let found = serde_json::from_str(&said).unwrap_or_else(|error| {
            let stderr = String::from_utf8_lossy(&output.stderr);
            panic!("{error}: {said} {stderr}")
        });
        Diagnosis {
            found,
            code: output.status.code().unwrap(),
        }
    }

    /// Fails the test unless this check came out so.
    fn assert(&self, check: &str, state: &str, what: &str, remedy: &str) {
        let fits = |found: &&Found| {
            found.check == check
                && found.state == state
                && found.what.contains(what)
                && found.remedy.as_deref().unwrap_or_default().contains(remedy)
        };
        assert!(
            self.found.iter().any(|found| fits(&found)),
            "no {state} of {check} with {what:?} and {remedy:?} in {self:#?}"
        );
        if state == "fail" {
            assert_eq!(self.code, 1);
        }
    }

    fn assert_fails(&self, check: &str, what: &str, remedy: &str) {
        self.assert(check, "fail", what, remedy);
    }

    /// Fails the test when this check says anything but that all is well.
    fn assert_ok(&self, check: &str) {
        let states: Vec<&str> = self
            .found
            .iter()
            .filter(|found| found.check == check)
            .map(|found| found.state.as_str())
            .collect();
        assert_eq!(states, ["ok"], "{check} in {self:#?}");
    }

    /// Fails the test unless nothing is wrong, and nothing odd.
    fn assert_healthy(&self) {
        let odd: Vec<&Found> = self.found.iter().filter(|found| found.state != "ok").collect();
        assert!(odd.is_empty() && self.code == 0, "{odd:#?}");
    }
}

fn diagnose(overlay: &Overlay, host: usize) -> Diagnosis {
    Diagnosis::of(
        overlay.hosts[host].ns(),
        &overlay.registry,
        &overlay.daemons[host].subnet_file(),
    )
}

/// Runs a shell line in the namespace; it must succeed.
fn sh(ns: &Namespace, line: &str) {
    run(ns.command("sh").args(["-ec", line])).unwrap();
}

/// Waits until the doctor of the first host finds nothing wrong: the hosts may not know of each other yet.
fn wait_healthy(overlay: &Overlay) {
    overlay.assert_all_reach_all();
    // When that does not come, what is wrong is the better message.
    let _ = wait_until(PATIENCE, "the doctor to find nothing wrong", || {
        diagnose(overlay, 0).code == 0
    });
    diagnose(overlay, 0).assert_healthy();
}

#[test]
fn what_is_wrong_with_device_rules_and_docker_is_found() {
    let lab = new_lab("doctor_host");
    let registry = Registry::embedded(&lab);
    let flags: &[&str] = &["--iptables-forward-rules=false"];
    let overlay = Overlay::start_hosts(
        lab,
        registry,
        CONFIG,
        &[(HostOptions::default(), flags), (HostOptions::default(), &[])],
    );
    wait_healthy(&overlay);
    let ns = overlay.hosts[0].ns();
    let subnet = overlay.daemons[0].subnet().subnet.trunc();
    let device = subnet.network();

    let docker_rule = format!("POSTROUTING -s {subnet} ! -o docker0 -j MASQUERADE");
    let (add_rule, delete_rule) = (
        format!("iptables -t nat -A {docker_rule}"),
        format!("iptables -t nat -D {docker_rule}"),
    );
    let add_vxlan = format!(
        "ip link add flannel.1 type vxlan id 1 dstport 8472 dev eth0; ip address add {device}/32 dev flannel.1; \
         ip link set flannel.1 up"
    );
    let bridge = overlay.daemons[0].subnet().subnet;
    let add_docker = format!(
        "ip address del {bridge} dev cbr0; ip link add docker0 type bridge; ip address add 172.17.0.1/16 dev docker0"
    );
    let delete_docker = format!("ip link del docker0; ip address add {bridge} dev cbr0");
    let subnet_file = overlay.daemons[0].subnet_file();
    let edit = |from: u32, to: u32| format!("sed -i s/MTU={from}/MTU={to}/ {}", subnet_file.display());
    let (other_mtu, own_mtu) = (edit(1472, 1400), edit(1400, 1472));
    // What is done, what is to be found, and how it is undone.
    for (doing, check, what, remedy, undoing) in [
        (
            "sysctl -qw net.ipv4.ip_forward=0",
            "forwarding/ip-forward",
            "forwards nothing",
            "sysctl -w net.ipv4.ip_forward=1",
            "sysctl -qw net.ipv4.ip_forward=1",
        ),
        (
            "iptables -P FORWARD DROP",
            "forwarding/forward",
            "the policy of FORWARD is DROP",
            "--iptables-forward-rules=true",
            "iptables -P FORWARD ACCEPT",
        ),
        (
            "nft add table inet fw; nft 'add chain inet fw guard { type filter hook forward priority 0; policy drop; }'",
            "forwarding/forward",
            "the nftables chain inet fw guard drops",
            "nft insert rule inet fw guard",
            "nft delete table inet fw",
        ),
        (
            "ip link add stray type bridge; ip link set stray up; ip route add 192.168.77.2/32 dev stray; \
             sysctl -qw net.ipv4.conf.eth0.rp_filter=1",
            "forwarding/rp-filter",
            "the way back to 192.168.77.2 leaves by stray",
            "net.ipv4.conf.eth0.rp_filter=2",
            "ip link del stray; sysctl -qw net.ipv4.conf.eth0.rp_filter=0",
        ),
        (&add_rule, "docker/masquerade", "are hidden", &delete_rule, &delete_rule),
        (
            "ip link set cbr0 mtu 1500",
            "docker/mtu",
            "cbr0 has MTU 1500, and the overlay's is 1472",
            "flanneld docker-opts",
            "ip link set cbr0 mtu 1472",
        ),
        (
            &add_docker,
            "docker/bridge",
            "docker0 has 172.17.0.1/16",
            "flanneld docker-opts",
            &delete_docker,
        ),
        (
            &add_vxlan,
            "device/left-over",
            "flannel.1 is a device of the vxlan backend",
            "ip link del flannel.1",
            "ip link del flannel.1",
        ),
        (
            "ip route add 10.5.200.0/24 via 192.168.77.2 proto 85",
            "device/left-over",
            "the route for 10.5.200.0/24 by eth0 was left by another backend",
            "ip route del 10.5.200.0/24 proto 85",
            "ip route del 10.5.200.0/24 proto 85",
        ),
        // What is only taken away the daemon puts back at once.
        (
            &other_mtu,
            "device/device",
            "flannel0 has MTU 1472, and the subnet file tells containers 1400",
            "ip link set flannel0 mtu 1400",
            &own_mtu,
        ),
        (
            "ip route replace 10.5.0.0/16 dev eth0",
            "device/routes",
            "10.5.0.0/16 goes to eth0, not to flannel0",
            "ip route del 10.5.0.0/16 dev eth0",
            "ip route replace 10.5.0.0/16 dev flannel0",
        ),
    ] {
        sh(ns, doing);
        diagnose(&overlay, 0).assert_fails(check, what, remedy);
        sh(ns, undoing);
    }
    wait_healthy(&overlay);
}

#[test]
fn each_way_of_not_reaching_a_peer_is_told_from_the_others() {
    let mut overlay = Overlay::start("doctor_peers", 5);
    overlay.assert_all_reach_all();
    let [_, filtered, dead, unplugged, narrow] = &overlay.hosts[..] else {
        unreachable!()
    };
    sh(
        filtered.ns(),
        "nft add table ip fw; nft 'add chain ip fw in { type filter hook input priority 0; }'; \
         nft add rule ip fw in udp dport 8285 drop",
    );
    let port = |number: u8, what: &str| overlay.lab.switch().ip(&format!("link set p{number} {what}")).unwrap();
    port(4, "down");
    port(5, "mtu 1400");
    let addresses = [filtered, dead, unplugged, narrow].map(|host| format!("peers/{}", host.ip()));
    overlay.daemons[2].kill9();
    // What the host still knows of an Ethernet address it would believe for some seconds.
    overlay.hosts[0].ns().ip("neighbour flush dev eth0").unwrap();

    let diagnosis = diagnose(&overlay, 0);
    let [filtered, dead, unplugged, narrow] = &addresses;
    diagnosis.assert_fails(
        filtered,
        "a firewall drops UDP port 8285",
        "iptables -I INPUT -p udp --dport 8285 -j ACCEPT",
    );
    diagnosis.assert_fails(dead, "flanneld does not run there", "systemctl start flanneld");
    diagnosis.assert_fails(unplugged, "is down: no route to host", "start the host");
    diagnosis.assert_fails(narrow, "none of the MTU, 1472 bytes", "ping -M do");
    for check in [
        "lease/daemon",
        "lease/lease",
        "device/device",
        "device/routes",
        "forwarding/forward",
    ] {
        diagnosis.assert_ok(check);
    }
}

/// A host, an etcd on the switch, and a daemon that may run.
struct Site {
    daemon: Daemon,
    etcd: EtcdServer,
    host: Host,
    registry: Registry,
    lab: Lab,
}

impl Site {
    fn new(name: &str) -> Site {
        let mut lab = new_lab(name);
        let host = lab.host("h1").unwrap();
        let etcd = EtcdServer::start_with(EtcdOptions {
            address: Ipv4Addr::new(192, 168, 77, 254).into(),
            namespace: Some(lab.switch().name().to_owned()),
            ..EtcdOptions::default()
        });
        let registry = Registry::etcd(&etcd.url());
        Site {
            daemon: Daemon::new(&lab, &host, &registry),
            etcd,
            host,
            registry,
            lab,
        }
    }

    fn diagnose(&self) -> Diagnosis {
        self.diagnose_with(&self.registry)
    }

    fn diagnose_with(&self, registry: &Registry) -> Diagnosis {
        Diagnosis::of(self.host.ns(), registry, &self.daemon.subnet_file())
    }
}

#[test]
fn what_is_wrong_with_configuration_and_lease_is_found() {
    let mut site = Site::new("doctor_lease");
    let elsewhere = site.registry.clone().with("--etcd-prefix=/atomic.io/network");
    elsewhere.configure(site.host.ns(), CONFIG);
    let diagnosis = site.diagnose();
    diagnosis.assert_fails(
        "registry/configuration",
        "no network configuration at /coreos.com/network/config",
        "--etcd-prefix /atomic.io/network",
    );
    diagnosis.assert_fails("lease/daemon", "flanneld does not run", "systemctl start flanneld");

    site.registry.configure(site.host.ns(), CONFIG);
    site.diagnose()
        .assert_fails("lease/lease", "was never taken", "systemctl start flanneld");
    let subnet = site.daemon.start_and_wait().subnet.trunc();
    site.diagnose().assert_healthy();

    // Another daemon runs under the same address: each of the two is told when it starts, and the doctor tells on both.
    let stranger = r#"{"Hostname":"elsewhere","Boot":"b","NetworkNamespace":1,"Socket":"s"}"#;
    assert!(site.daemon.stop().success());
    site.etcd
        .etcdctl(&["put", "/coreos.com/network/hosts/192.168.77.1", stranger]);
    site.diagnose().assert_fails(
        "lease/public-ip",
        "two hosts with PublicIP 192.168.77.1: hosts/192.168.77.1 in the registry is the daemon's on host \"elsewhere\"",
        "--iface",
    );
    site.etcd.etcdctl(&["del", "/coreos.com/network/hosts/192.168.77.1"]);

    let key = format!("/coreos.com/network/subnets/{}", subnet.to_string().replace('/', "-"));
    site.etcd.etcdctl(&["put", &key, r#"{"PublicIP":"192.168.77.9"}"#]);
    site.diagnose().assert_fails(
        "lease/lease",
        &format!("this host's subnet {subnet} is leased to PublicIP 192.168.77.9"),
        "--public-ip=192.168.77.9",
    );
    site.etcd.etcdctl(&["del", &key]);
    let diagnosis = site.diagnose();
    diagnosis.assert_fails(
        "lease/lease",
        &format!("or of subnet {subnet}: it has expired"),
        "flanneld",
    );
    diagnosis.assert_ok("registry/configuration");

    // For people, with the same code.
    let file = format!("--subnet-file={}", site.daemon.subnet_file().display());
    let output = site.registry.try_flanneld(site.host.ns(), &["doctor", &file]);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stdout).unwrap();
    for part in [
        "Registry\n  ok    etcd ",
        "\nFAIL lease/daemon: flanneld does not run",
        "\n     -> `systemctl start flanneld`",
    ] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
}

#[test]
fn each_way_of_not_reaching_etcd_is_told_from_the_others() {
    let mut site = Site::new("doctor_etcd");
    site.registry.configure(site.host.ns(), CONFIG);
    site.daemon.start_and_wait();

    // While etcd is away, the daemon still says what this host's part is.
    site.etcd.stop();
    let diagnosis = site.diagnose();
    diagnosis.assert_fails("registry/etcd", "connection refused", "start etcd on 192.168.77.254");
    for check in ["lease/daemon", "lease/subnet-file", "device/device", "device/routes"] {
        diagnosis.assert_ok(check);
    }

    let nobody = Registry::etcd("http://192.168.77.200:2379");
    site.diagnose_with(&nobody)
        .assert_fails("registry/etcd", "no route to host", "ip route get 192.168.77.200");

    sh(
        site.lab.switch(),
        "nft add table ip fw; nft 'add chain ip fw in { type filter hook input priority 0; }'; \
         nft add rule ip fw in tcp dport 2379 drop",
    );
    site.diagnose().assert_fails(
        "registry/etcd",
        "timed out",
        "iptables -I INPUT -p tcp --dport 2379 -j ACCEPT",
    );

    let local = EtcdServer::start_with(EtcdOptions {
        address: Ipv4Addr::LOCALHOST.into(),
        namespace: Some(site.host.ns().name().to_owned()),
        ..EtcdOptions::default()
    });
    site.diagnose_with(&Registry::etcd("http://192.168.77.1:2379"))
        .assert_fails(
            "registry/etcd",
            "etcd listens on localhost only",
            "--listen-client-urls http://0.0.0.0:2379",
        );
    drop(local);
}

/// A file's name for a flag.
fn flag(name: &str, path: &Path) -> String {
    format!("--{name}={}", path.display())
}

#[test]
fn what_keeps_us_out_of_etcd_is_found() {
    let mut lab = new_lab("doctor_secure");
    let host = lab.host("h1").unwrap();
    let namespace = Some(host.ns().name().to_owned());
    let subnet_file: PathBuf = lab.dir().join("none.env");
    let address: IpAddr = Ipv4Addr::new(127, 0, 0, 7).into();

    let authority = Authority::new(lab.dir(), "authority");
    let stranger = Authority::new(lab.dir(), "stranger");
    let files = authority.issue("server", &[address.to_string()]);
    let options = EtcdOptions {
        address,
        namespace: namespace.clone(),
        ..EtcdOptions::default()
    };
    let secure = EtcdServer::start_with(options.with_tls(&files.certificate, &files.key, &authority.file));
    let with_authority =
        |authority: &Authority| Registry::etcd(&secure.url()).with(flag("etcd-cafile", &authority.file));
    let diagnose = |registry: &Registry| Diagnosis::of(host.ns(), registry, &subnet_file);
    diagnose(&with_authority(&stranger)).assert_fails(
        "registry/configuration",
        "certificate signed by unknown authority",
        "--etcd-cafile",
    );
    diagnose(&with_authority(&authority)).assert_fails("registry/configuration", "--etcd-certfile", "etcdctl");
    diagnose(&Registry::etcd(&secure.url())).assert_fails("registry/configuration", "needs --etcd-cafile", "flags");
    drop(secure);

    let mut users = EtcdServer::start_with(EtcdOptions {
        address,
        namespace,
        ..EtcdOptions::default()
    });
    users.etcdctl(&["user", "add", "root:secret"]);
    users.etcdctl(&["auth", "enable"]);
    users.set_client_arguments(&["--user", "root:secret"]);
    let guessed = Registry::etcd(&users.url())
        .with("--etcd-username=root")
        .with("--etcd-password=guessed");
    diagnose(&guessed).assert_fails(
        "registry/configuration",
        "wrong user name or password",
        "FLANNELD_ETCD_",
    );
    diagnose(&Registry::etcd(&users.url())).assert_fails(
        "registry/configuration",
        "wants a user name and password",
        "etcdctl",
    );
}

#[test]
fn the_units_environment_leads_the_doctor_to_the_daemon() {
    let overlay = Overlay::start("doctor_env", 1);
    let registry = overlay.lab.dir().join("registry");
    let mut command = flanneld(overlay.hosts[0].ns());
    command
        .arg("doctor")
        .env("FLANNELD_REGISTRY_DIR", &registry)
        .env("FLANNELD_SUBNET_FILE", overlay.daemons[0].subnet_file())
        .env("FLANNELD_IFACE", "eth0")
        .env("FLANNELD_PUBLIC_IP", "");
    let output = command.output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success() && text.ends_with("\nNothing is wrong.\n"),
        "{text}"
    );
    assert_eq!(
        ping(&overlay.containers[0].ns, overlay.daemons[0].subnet().subnet.addr(), 1).received,
        1
    );
}

#[test]
fn the_units_file_of_options_does_for_the_doctor_in_a_shell() {
    let overlay = Overlay::start("doctor_options", 1);
    let file = overlay.lab.dir().join("flanneld");
    let options = format!(
        "--registry-dir={} --iface=eth0 --ip-masq=false --healthz-port=8080 --iface-regex=^192[.]168[.]*",
        overlay.lab.dir().join("registry").display()
    );
    let subnet_file = overlay.daemons[0].subnet_file();
    let text = format!(
        "FLANNELD_SUBNET_FILE={}\nFLANNEL_OPTIONS=\"{options}\"\n",
        subnet_file.display()
    );
    fs::write(&file, text).unwrap();
    // As in the README.
    let line = format!(
        "set -af; . {}; {} doctor -etcd-endpoints=$FLANNEL_ETCD_ENDPOINTS -etcd-prefix=$FLANNEL_ETCD_PREFIX $FLANNEL_OPTIONS",
        file.display(),
        env!("CARGO_BIN_EXE_flanneld")
    );
    let output = overlay.hosts[0]
        .ns()
        .command("sh")
        .args(["-c", &line])
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && text.ends_with("\nNothing is wrong.\n"),
        "{text}{errors}"
    );
}
