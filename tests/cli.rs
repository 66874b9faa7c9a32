//! The real binary's answers to its users' mistakes, and to their questions. Needs root for the daemon's own ones.

mod lab;

use flannel::lab::Host;
use lab::{CONFIG, Daemon, FLANNELD, Registry, new_lab};
use std::{
    fs,
    path::PathBuf,
    process::{Command, Output},
};

/// A registry directory of its own for subcommands.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Directory {
        let path = std::env::temp_dir().join(format!("flannel-cli-{name}-{}", std::process::id()));
        // Left by a killed run of the same pid.
        let _ = fs::remove_dir_all(&path);
        Directory(path)
    }

    fn flanneld(&self, arguments: &[&str]) -> Output {
        Command::new(FLANNELD)
            .arg("--registry-dir")
            .arg(&self.0)
            .args(arguments)
            .output()
            .unwrap()
    }

    fn succeeds(&self, arguments: &[&str]) -> String {
        let output = self.flanneld(arguments);
        assert!(
            output.status.success(),
            "{arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    }

    fn fails(&self, arguments: &[&str]) -> String {
        let output = self.flanneld(arguments);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(said.lines().count(), 1, "one line: {said}");
        said
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Starts a daemon that must give up by itself with status 1; its last line.
fn gives_up(mut daemon: Daemon) -> String {
    daemon.start();
    assert_eq!(daemon.wait_exit().code(), Some(1));
    daemon.log().lines().last().unwrap().to_owned()
}

#[test]
fn version_and_help_go_to_standard_output() {
    for flag in ["--version", "-version", "-V"] {
        let output = Command::new(FLANNELD).arg(flag).output().unwrap();
        assert!(output.status.success());
        assert_eq!(
            String::from_utf8_lossy(&output.stdout).trim(),
            concat!("flanneld ", env!("CARGO_PKG_VERSION"))
        );
    }
    let help = Command::new(FLANNELD).arg("-help").output().unwrap();
    assert!(help.status.success());
    let help = String::from_utf8(help.stdout).unwrap();
    for part in ["--etcd-endpoints", "--iface", "network", "leases", "demo"] {
        assert!(help.contains(part), "{part}");
    }
}

#[test]
fn a_bad_value_of_the_packet_engines_flags_is_named_with_what_would_be_right() {
    for (variable, flags, parts) in [
        (None, &["--io=epoll"][..], &["epoll", "--io", "auto, mmsg or uring"][..]),
        (None, &["-pin=perhaps"], &["perhaps", "--pin", "true or false"]),
        (None, &["-busy-poll", "50us"], &["50us", "--busy-poll", "0 to 1000000"]),
        (
            None,
            &["run", "--busy-poll=1000001"],
            &["1000001", "--busy-poll", "0 to 1000000"],
        ),
        (
            None,
            &["--offload=true", "--no-offload"],
            &["--offload=true", "--no-offload", "give one of them"],
        ),
        (
            Some(("FLANNELD_IO", "epoll")),
            &[],
            &["epoll", "--io", "auto, mmsg or uring"],
        ),
        (
            Some(("FLANNELD_BUSY_POLL", "-5")),
            &[],
            &["-5", "--busy-poll", "0 to 1000000"],
        ),
        (
            Some(("FLANNELD_NO_OFFLOAD", "no")),
            &[],
            &["no", "--no-offload", "true or false"],
        ),
    ] {
        let output = Command::new(FLANNELD).args(flags).envs(variable).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{variable:?} {flags:?}: {said}");
        for part in parts {
            assert!(said.contains(part), "{variable:?} {flags:?}: {part} is not in {said}");
        }
    }
}

#[test]
fn a_full_disk_behind_standard_error_does_not_change_the_exit_code() {
    let status = Command::new(FLANNELD)
        .args(["-etcd-endpoints=ftp://192.0.2.1", "network", "get"])
        .stderr(fs::File::options().write(true).open("/dev/full").unwrap())
        .status()
        .unwrap();
    assert_eq!(status.code(), Some(1));
}

#[test]
fn each_bad_configuration_has_its_own_message_with_key_and_value_from_command_and_daemon() {
    let cases = [
        (r#"{"Network":"10.5.0.0/16""#, &["JSON"][..]),
        (r#"{"SubnetLen":24}"#, &["Network"]),
        (r#"{"Network":"ten"}"#, &["Network", "ten"]),
        (r#"{"Network":"10.5.0.0/29"}"#, &["Network", "10.5.0.0/29"]),
        (
            r#"{"Network":"10.5.0.0/16","SubnetLen":31}"#,
            &["SubnetLen", "31", "30"],
        ),
        (
            r#"{"Network":"10.5.0.0/16","SubnetLen":17}"#,
            &["SubnetLen", "17", "18"],
        ),
        (
            r#"{"Network":"10.5.0.0/16","SubnetMin":"10.6.0.0"}"#,
            &["SubnetMin", "10.6.0.0", "10.5.0.0/16"],
        ),
        (
            r#"{"Network":"10.5.0.0/16","SubnetMax":"10.5.3.7"}"#,
            &["SubnetMax", "10.5.3.7"],
        ),
        (
            r#"{"Network":"10.5.0.0/16","SubnetMin":"10.5.9.0","SubnetMax":"10.5.3.0"}"#,
            &["SubnetMin", "SubnetMax"],
        ),
        (
            r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vlan"}}"#,
            &["vlan", "udp", "vxlan", "host-gw"],
        ),
        (
            r#"{"Network":"10.5.0.0/16","Backend":{"Port":70000}}"#,
            &["Port", "70000"],
        ),
        (
            r#"{"Network":"10.5.0.0/16","Backend":{"Type":"udp","SourcePorts":65}}"#,
            &["Backend.SourcePorts", "65", "1 to 64"],
        ),
        (
            r#"{"Network":"10.5.0.0/16","Backend":{"Type":"udp","sourcecheck":"loose"}}"#,
            &["Backend.SourceCheck", "loose", "strict", "peer", "off"],
        ),
    ];
    let mut lab = new_lab("config");
    let host = lab.host("h1").unwrap();
    for (number, (json, parts)) in cases.into_iter().enumerate() {
        let directory = Directory::new(&format!("bad{number}"));
        let refused = directory.fails(&["network", "set", json]);
        assert!(
            directory
                .fails(&["network", "get"])
                .contains("no network configuration"),
            "nothing was written"
        );

        // As somebody else has written it.
        let registry = Registry::embedded(&lab).with(format!("--etcd-prefix=/bad/{number}"));
        let stored = lab.dir().join("registry");
        put_by_hand(&stored, &format!("/bad/{number}/config"), json);
        let said = gives_up(Daemon::named(&format!("d{number}"), &lab, &host, &registry));
        for part in parts {
            assert!(refused.contains(part), "`network set`: {part} is not in {refused}");
            assert!(said.contains(part), "daemon: {part} is not in {said}");
        }
        assert!(said.contains(&format!("/bad/{number}/config")), "{said}");
    }
}

/// Adds a record to an embedded registry past all checks.
fn put_by_hand(directory: &std::path::Path, key: &str, value: &str) {
    use flannel::registry::{Registry as _, file::FileRegistry};
    let (prefix, name) = key.rsplit_once('/').unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        FileRegistry::open(directory, prefix)
            .unwrap()
            .put(name, value.as_bytes())
            .await
            .unwrap();
    });
}

#[test]
fn the_interface_is_chosen_as_asked_and_what_there_is_is_listed_when_nothing_matches() {
    let mut lab = new_lab("iface");
    let host: Host = lab.host("h1").unwrap();
    host.ns().ip("link add eth1 type veth peer name far1").unwrap();
    host.ns().ip("addr add 172.16.7.1/24 dev eth1").unwrap();
    host.ns().ip("link set eth1 up mtu 1400").unwrap();
    host.ns().ip("link set far1 up").unwrap();
    let registry = Registry::embedded(&lab);
    registry.configure(host.ns(), CONFIG);
    let eth0 = host.ip().to_string();
    for (number, (flag, address, public_ip, mtu)) in [
        ("--iptables-forward-rules=false", eth0.as_str(), eth0.as_str(), 1472),
        ("--iface=eth1", "172.16.7.1", "172.16.7.1", 1372),
        ("-iface=172.16.7.1", "172.16.7.1", "172.16.7.1", 1372),
        ("--iface-regex=^172\\.16\\.", "172.16.7.1", "172.16.7.1", 1372),
        ("--iface-regex=eth[1-9]", "172.16.7.1", "172.16.7.1", 1372),
        ("--iface-can-reach=172.16.7.9", "172.16.7.1", "172.16.7.1", 1372),
        ("--public-ip=172.16.7.1", "172.16.7.1", "172.16.7.1", 1372),
        ("--public-ip=203.0.113.7", eth0.as_str(), "203.0.113.7", 1472),
    ]
    .into_iter()
    .enumerate()
    {
        let mut daemon = Daemon::named(&format!("d{number}"), &lab, &host, &registry).with(flag);
        assert_eq!(daemon.start_and_wait().mtu, mtu, "{flag}");
        let line = daemon.wait_for_log("external interface");
        assert!(line.contains(&format!("address {address},")), "{flag}: {line}");
        assert!(line.ends_with(&format!("PublicIP {public_ip}")), "{flag}: {line}");
        assert!(daemon.stop().success());
    }
    for (number, (flag, part)) in [
        ("--iface=wlan0", "--iface=wlan0"),
        ("--iface-regex=^wlan", "--iface-regex=^wlan"),
        ("--iface=far1", "far1 has no IPv4 address"),
        ("--iface-can-reach=198.51.100.1", "--iface-can-reach=198.51.100.1"),
    ]
    .into_iter()
    .enumerate()
    {
        if flag.contains("can-reach") {
            host.ns().ip("route del default").unwrap();
        }
        let said = gives_up(Daemon::named(&format!("x{number}"), &lab, &host, &registry).with(flag));
        assert!(said.contains(part), "{flag}: {said}");
        assert!(
            said.contains(&format!("eth0 ({eth0}")) && said.contains("eth1 (172.16.7.1"),
            "{flag}: {said}"
        );
    }
    let said = gives_up(Daemon::named("nodefault", &lab, &host, &registry));
    assert!(
        said.contains("no IPv4 default route") && said.contains("--iface"),
        "{said}"
    );
}

#[test]
fn an_overlay_that_the_hosts_are_in_is_refused_or_warned_of() {
    let mut lab = new_lab("overlap");
    let host = lab.host("h1").unwrap();
    let same = Registry::embedded(&lab);
    same.configure(host.ns(), r#"{"Network":"192.168.77.0/24"}"#);
    let said = gives_up(Daemon::named("same", &lab, &host, &same));
    assert!(
        said.contains("very network that interface eth0 is in") && !said.contains("ip route del"),
        "{said}"
    );

    let around = Registry::embedded(&lab).with("--etcd-prefix=/around");
    around.configure(
        host.ns(),
        r#"{"Network":"192.168.0.0/16","SubnetMin":"192.168.128.0","SubnetMax":"192.168.160.0"}"#,
    );
    let mut daemon = Daemon::named("around", &lab, &host, &around);
    daemon.start_and_wait();
    daemon.wait_for_log("lies in the overlay 192.168.0.0/16");
}

#[test]
fn flags_are_read_from_the_environment_and_the_command_line_wins() {
    let directory = Directory::new("env");
    let get = |variables: &[(&str, &str)], arguments: &[&str]| {
        let output = Command::new(FLANNELD)
            .args(arguments)
            .envs(variables.iter().copied())
            .output()
            .unwrap();
        format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        )
    };
    let path = directory.0.display().to_string();
    directory.succeeds(&["network", "set", CONFIG]);
    let found = get(&[("FLANNELD_REGISTRY_DIR", &path)], &["network", "get"]);
    assert!(found.contains("10.5.0.0/16"), "{found}");
    let elsewhere = get(
        &[("FLANNELD_REGISTRY_DIR", &path), ("FLANNELD_ETCD_PREFIX", "/else")],
        &["-etcd-prefix=/there", "network", "get"],
    );
    assert!(
        elsewhere.contains("/there/config") && elsewhere.contains("/coreos.com/network"),
        "{elsewhere}"
    );
}

#[test]
fn configuration_and_leases_are_written_and_shown_in_both_forms() {
    let directory = Directory::new("leases");
    directory.succeeds(&[
        "network",
        "set",
        "--network",
        "10.5.0.0/16",
        "--subnet-len",
        "24",
        "--backend",
        "udp",
    ]);
    let network: serde_json::Value = serde_json::from_str(&directory.succeeds(&["network", "get", "--json"])).unwrap();
    assert!(network.to_string().contains("10.5.0.0/16"), "{network}");
    assert!(
        directory
            .succeeds(&["leases", "list"])
            .to_lowercase()
            .contains("no leases")
    );

    directory.succeeds(&["leases", "reserve", "10.5.9.0/24", "--public-ip", "192.0.2.9"]);
    let table = directory.succeeds(&["leases", "list"]);
    for part in ["SUBNET", "10.5.9.0/24", "192.0.2.9", "udp", "reservation"] {
        assert!(table.contains(part), "{part} is not in {table}");
    }
    let leases: serde_json::Value = serde_json::from_str(&directory.succeeds(&["leases", "list", "--json"])).unwrap();
    assert!(leases[0].to_string().contains("10.5.9.0/24"), "{leases}");

    assert!(
        directory
            .fails(&["leases", "reserve", "10.5.9.0/24", "--public-ip", "192.0.2.10"])
            .contains("192.0.2.9")
    );
    assert!(
        directory
            .fails(&["leases", "reserve", "10.6.9.0/24", "--public-ip", "192.0.2.10"])
            .contains("10.5.255.0/24")
    );
    assert!(
        directory
            .fails(&["network", "set", r#"{"Network":"10.6.0.0/16"}"#])
            .contains("10.5.9.0/24")
    );
    directory.succeeds(&["leases", "release", "10.5.9.0/24"]);
    assert!(
        directory
            .fails(&["leases", "release", "10.5.9.0/24"])
            .contains("10.5.9.0/24")
    );
}

#[test]
fn an_embedded_registry_that_cannot_be_read_is_told_and_left_alone() {
    let directory = Directory::new("broken");
    directory.succeeds(&["network", "set", CONFIG]);
    let state = directory.0.join("registry.json");
    fs::write(&state, "{ not what it was").unwrap();
    let said = directory.fails(&["network", "set", CONFIG]);
    assert!(said.contains("registry.json"), "{said}");
    assert_eq!(fs::read_to_string(&state).unwrap(), "{ not what it was");
}

#[test]
fn completions_are_what_a_shell_reads_and_the_manual_goes_into_a_directory() {
    let directory = Directory::new("pages");
    let completions = directory.succeeds(&["completions", "bash"]);
    fs::create_dir_all(&directory.0).unwrap();
    let script = directory.0.join("flanneld.bash");
    fs::write(&script, &completions).unwrap();
    let check = format!(
        ". {} && COMP_WORDS=(flanneld dock) COMP_CWORD=1 && _flanneld flanneld dock flanneld && echo \"${{COMPREPLY[*]}}\"",
        script.display()
    );
    let output = Command::new("bash").args(["-c", &check]).output().unwrap();
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "docker-opts\n",
        "{completions}"
    );

    let pages = directory.0.join("man8");
    directory.succeeds(&["man", pages.to_str().unwrap()]);
    let mut names: Vec<_> = fs::read_dir(&pages)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    assert!(
        names.contains(&"flanneld.8".into()) && names.contains(&"flanneld-leases-list.8".into()),
        "{names:?}"
    );
    assert!(
        !names.iter().any(|name| name.to_string_lossy().contains("completions")),
        "{names:?}"
    );
}
