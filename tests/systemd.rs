//! The units in `scripts/systemd`, as far as they can be tried without systemd as the first process. Needs root.

mod lab;

use flannel::lab::{has_program, wait_until};
use lab::{CONFIG, Daemon, FLANNELD, PATIENCE, Registry, new_lab, not_tested};
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

const SCRIPTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts");

/// What `systemd-analyze security` may find, out of 100: what is left is root, the network's configuration, and /proc/sys.
const MOST_EXPOSURE: &str = "--threshold=30";

/// A service as the docker package has one, that the drop-in is for.
const DOCKER: &str = "[Unit]\nDescription=Docker\n[Service]\nType=notify\nExecStart=/usr/bin/dockerd -H fd://\n";

/// The units with the programs' places of this build, in a directory of a test's own.
struct Units(PathBuf);

impl Units {
    fn new(name: &str) -> Units {
        let dir = std::env::temp_dir().join(format!("flannel-units-{name}-{}", std::process::id()));
        fs::create_dir_all(dir.join("docker.service.d")).unwrap();
        fs::write(dir.join("docker.service"), placed(DOCKER)).unwrap();
        for unit in ["flanneld.service", "docker.service.d/flannel.conf"] {
            let text = fs::read_to_string(Path::new(SCRIPTS).join("systemd").join(unit)).unwrap();
            fs::write(dir.join(unit), placed(&text)).unwrap();
        }
        Units(dir)
    }

    fn analyze(&self, arguments: &[&str]) -> Output {
        // Its own units are found beside ours.
        Command::new("systemd-analyze")
            .args(["--no-pager", "--man=no"])
            .args(arguments)
            .env("SYSTEMD_UNIT_PATH", format!("{}:", self.0.display()))
            .current_dir(&self.0)
            .output()
            .unwrap()
    }
}

impl Drop for Units {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn placed(unit: &str) -> String {
    unit.replace("/usr/bin/flanneld", FLANNELD)
        .replace("/usr/lib/flannel", SCRIPTS)
        .replace("/usr/bin/dockerd", "/bin/true")
        // Which systemd would look for.
        .replace("=dockerd ", "=/bin/true ")
}

/// The values of a setting of flanneld's unit.
fn settings(name: &str) -> Vec<String> {
    let unit = fs::read_to_string(Path::new(SCRIPTS).join("systemd/flanneld.service")).unwrap();
    let values = unit
        .lines()
        .filter_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    values.map(str::to_owned).collect()
}

fn has_systemd_analyze() -> bool {
    let here = has_program("systemd-analyze");
    if !here {
        not_tested("systemd-analyze is not installed");
    }
    here
}

#[test]
fn units_are_sound() {
    if !has_systemd_analyze() {
        return;
    }
    let units = Units::new("sound");
    let output = units.analyze(&["verify", "flanneld.service", "docker.service"]);
    let said = String::from_utf8_lossy(&output.stderr);
    // What it thinks of the system's own units is not about ours.
    let ours: Vec<&str> = said
        .lines()
        .filter(|line| line.contains("flannel") || line.contains("docker"))
        .collect();
    assert!(output.status.success() && ours.is_empty(), "{said}");

    // It would have noticed.
    let unit = units.0.join("flanneld.service");
    let text = fs::read_to_string(&unit).unwrap();
    fs::write(
        &unit,
        text.replace("Type=notify", "Typ=notify")
            .replace(FLANNELD, "/nowhere/flanneld"),
    )
    .unwrap();
    let output = units.analyze(&["verify", "flanneld.service"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("Typ") && said.contains("/nowhere/flanneld"), "{said}");
}

#[test]
fn dockers_options_are_those_of_the_subnet_file_at_each_start() {
    let units = Units::new("options");
    let drop_in = fs::read_to_string(Path::new(SCRIPTS).join("systemd/docker.service.d/flannel.conf")).unwrap();
    let command = drop_in
        .lines()
        .find_map(|line| line.strip_prefix("ExecStartPre="))
        .unwrap();
    let (subnet_file, output) = (units.0.join("subnet.env"), units.0.join("docker"));
    fs::write(
        &subnet_file,
        "FLANNEL_SUBNET=10.5.34.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=true\n",
    )
    .unwrap();
    let command = placed(command).replace("/run/flannel/docker", output.to_str().unwrap());
    // As at a later start, when systemd has read what the first one wrote.
    for before in ["", " --bip=10.9.9.1/24 --mtu=1400"] {
        let status = Command::new("sh")
            .arg("-c")
            .arg(format!("{command} -f {}", subnet_file.display()))
            .env("DOCKER_NETWORK_OPTIONS", before)
            .status()
            .unwrap();
        assert!(status.success());
        assert_eq!(
            fs::read_to_string(&output).unwrap(),
            "DOCKER_NETWORK_OPTIONS=\" --bip=10.5.34.1/24 --ip-masq=false --mtu=1472\"\n"
        );
    }
}

#[test]
fn the_daemon_is_confined() {
    if !has_systemd_analyze() {
        return;
    }
    let units = Units::new("confined");
    let unit = units.0.join("flanneld.service");
    let output = units.analyze(&["security", "--offline=yes", MOST_EXPOSURE, unit.to_str().unwrap()]);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{said}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(said.contains("Overall exposure level"), "{said}");
}

/// The daemon's arguments as systemd makes them of the unit and these variables: `${NAME}` is a part of a word, and `$NAME` as
/// many words as the value has.
fn arguments(variables: &[(&str, &str)]) -> Vec<String> {
    let value = |name: &str| {
        let found = variables.iter().find(|(known, _)| *known == name);
        found.map_or("", |(_, value)| value).to_owned()
    };
    let command = settings("ExecStart").pop().unwrap();
    let mut words = Vec::new();
    for word in command.split(' ').skip(1) {
        if let Some((before, rest)) = word.split_once("${") {
            let (name, after) = rest.split_once('}').unwrap();
            words.push(format!("{before}{}{after}", value(name)));
        } else if let Some(name) = word.strip_prefix('$') {
            words.extend(value(name).split_whitespace().map(str::to_owned));
        } else {
            words.push(word.to_owned());
        }
    }
    words
}

#[test]
fn variables_of_the_distributions_are_the_daemons_flags_and_may_all_be_missing() {
    assert_eq!(arguments(&[]), ["-etcd-endpoints=", "-etcd-prefix="]);
    let mut lab = new_lab("unit");
    let registry = Registry::embedded(&lab);
    let host = lab.host("h1").unwrap();
    registry.configure(host.ns(), CONFIG);

    let started = |daemon: Daemon, variables: &[(&str, &str)]| {
        let mut daemon = arguments(variables).into_iter().fold(daemon, Daemon::with);
        daemon.start();
        daemon
    };
    let options = [("FLANNEL_OPTIONS", "--iface=eth0 --healthz-port=8080")];
    let mut daemon = started(Daemon::new(&lab, &host, &registry), &options);
    daemon.wait_ready();
    wait_until(PATIENCE, "the health port", || {
        lab::http_get(host.ns(), ([127, 0, 0, 1], 8080).into(), "/readyz").is_ok_and(|(code, _)| code == 200)
    })
    .unwrap();
    assert!(daemon.stop().success());

    // Nobody listens there.
    let nowhere = Registry::etcd("http://127.0.0.1:1");
    let daemon = Daemon::named("other", &lab, &host, &nowhere);
    let variables = [
        ("FLANNEL_ETCD_ENDPOINTS", "http://127.0.0.1:2"),
        ("FLANNEL_ETCD_PREFIX", "/other"),
    ];
    let mut daemon = started(daemon, &variables);
    daemon.wait_for_log("127.0.0.1:2");
    daemon.kill9();
}

#[test]
fn the_capabilities_of_the_unit_are_enough() {
    let mut lab = new_lab("unit_caps");
    let registry = Registry::embedded(&lab);
    let mut host = lab.host("h1").unwrap();
    registry.configure(host.ns(), CONFIG);
    let allowed = settings("CapabilityBoundingSet").pop().unwrap();
    let allowed: Vec<String> = allowed
        .split(' ')
        .map(|name| format!("+{}", name.trim_start_matches("CAP_").to_lowercase()))
        .collect();
    let bounding_set = format!("--bounding-set=-all,{}", allowed.join(","));
    let setpriv = ["setpriv", "--no-new-privs", "--inh-caps=-all", &bounding_set];
    let mut daemon = Daemon::new(&lab, &host, &registry).under(&setpriv).with("--ip-masq");
    daemon.start_and_wait();
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.process().pid())).unwrap();
    // CAP_NET_ADMIN is number 12 and CAP_NET_RAW 13, capabilities(7).
    assert!(status.contains("CapEff:\t0000000000003000"), "{status}");
    assert!(status.contains("NoNewPrivs:\t1"), "{status}");
    assert!(daemon.log().contains("traffic rules by"), "{}", daemon.log());

    // A packet that the daemon answers has been through the device, a worker, and back.
    let container = host.add_container("c1", daemon.subnet()).unwrap();
    wait_until(PATIENCE, "the daemon to answer that nobody has the address", || {
        let answer = lab::output_of(&container.ns, "ping", ["-n", "-c1", "-W1", "10.5.255.9"]);
        answer.contains("Net Unreachable")
    })
    .unwrap();
    daemon.assert_running();
    assert!(daemon.stop().success());
}
