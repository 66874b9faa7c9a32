//! The password for etcd is seen nowhere: not in logs, `status`, `/metrics`, `doctor`, nor by other users of the host. Needs root.

mod lab;

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
    process::Output,
};

use flannel::lab::Lab;
use lab::{
    CONFIG, Daemon, Overlay, Registry,
    etcd::{EtcdOptions, EtcdServer},
    flanneld, http_get, new_lab, output_of,
};

/// Like nothing else that is printed.
const PASSWORD: &str = "Xq7-battery-staple";

const HEALTH_PORT: &str = "--healthz-port=8471";

/// An etcd that wants a password, and flags to it without one.
fn guarded(lab: &Lab) -> (EtcdServer, Registry) {
    let mut server = EtcdServer::start_with(EtcdOptions::on_switch(lab));
    server.etcdctl(&["user", "add", &format!("root:{PASSWORD}")]);
    server.etcdctl(&["auth", "enable"]);
    server.set_client_arguments(&["--user", &format!("root:{PASSWORD}")]);
    let registry = Registry::etcd(&server.url()).with("-etcd-username=root");
    (server, registry)
}

fn text(output: &Output) -> String {
    [&output.stdout, &output.stderr]
        .map(|bytes| String::from_utf8_lossy(bytes).into_owned())
        .concat()
}

#[track_caller]
fn assert_hidden(what: &str, text: &str) {
    assert!(!text.is_empty(), "{what} is empty");
    assert!(!text.contains(PASSWORD), "the password is in {what}: {text}");
}

/// Runs a daemon that was given the password in some way, and looks at all that it shows.
fn assert_kept(lab: &mut Lab, registry: &Registry, with_password: impl Fn(Daemon) -> Daemon, name: &str) {
    let host = lab.host(name).unwrap();
    let daemon = Daemon::new(lab, &host, registry).with("-v=10").with(HEALTH_PORT);
    let mut daemon = with_password(daemon);
    daemon.start_and_wait();
    let pid = daemon.process().pid();
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap();
    assert_hidden("the command line", &String::from_utf8(line).unwrap());
    assert_hidden(
        "ps",
        &output_of(host.ns(), "ps", ["-ww", "-o", "args", "-p", &pid.to_string()]),
    );
    let file = format!("--subnet-file={}", daemon.subnet_file().display());
    for arguments in [&["status"][..], &["status", "--json"]] {
        let output = flanneld(host.ns()).args(arguments).arg(&file).output().unwrap();
        assert!(output.status.success());
        assert_hidden("the status", &text(&output));
    }
    for path in ["/metrics", "/readyz?verbose"] {
        let (_, page) = http_get(host.ns(), ([127, 0, 0, 1], 8471).into(), path).unwrap();
        assert_hidden(path, &page);
    }
    let mut doctor = flanneld(host.ns());
    doctor.args(["doctor", "-v=10"]).args(registry.flags()).arg(&file);
    doctor.env("FLANNELD_ETCD_PASSWORD", PASSWORD);
    let said = text(&doctor.output().unwrap());
    assert!(said.contains("etcd at http"), "{said}");
    assert_hidden("the doctor's findings", &said);
    assert!(daemon.stop().success());
    // With all that the libraries say, too.
    let log = daemon.log();
    assert!(log.contains("TRACE") || log.contains("DEBUG"), "{log}");
    assert_hidden("the log", &log);
}

#[test]
fn a_password_is_taken_from_a_file_the_environment_or_a_flag_and_never_shown() {
    let mut lab = new_lab("secrets");
    let (_server, registry) = guarded(&lab);
    let file = lab.dir().join("password");
    fs::write(&file, format!("{PASSWORD}\n")).unwrap();
    fs::set_permissions(&file, Permissions::from_mode(0o600)).unwrap();
    let from_file = format!("-etcd-password-file={}", file.display());

    // What the daemon starts has no use for it either: this nft tells what it was given.
    let programs = lab.dir().join("programs");
    let environment = lab.dir().join("environment");
    fs::create_dir(&programs).unwrap();
    let nft = programs.join("nft");
    let script = format!(
        "#!/bin/sh\nexport >>{}\nexec /usr/sbin/nft \"$@\"\n",
        environment.display()
    );
    fs::write(&nft, script).unwrap();
    fs::set_permissions(&nft, Permissions::from_mode(0o755)).unwrap();

    let switch = lab.switch().clone();
    let config = r#"{"Network":"10.5.0.0/16","EnableNFTables":true}"#;
    registry.clone().with(&from_file).configure(&switch, config);
    assert_kept(&mut lab, &registry, |daemon| daemon.with(&from_file), "file");
    let path = format!("PATH={}:{}", programs.display(), std::env::var("PATH").unwrap());
    let variable = format!("FLANNELD_ETCD_PASSWORD={PASSWORD}");
    assert_kept(
        &mut lab,
        &registry,
        |daemon| daemon.under(&["env", &variable, &path]),
        "variable",
    );
    assert_hidden("the environment of nft", &fs::read_to_string(&environment).unwrap());
    for (name, flag) in [
        ("equals", vec![format!("-etcd-password={PASSWORD}")]),
        ("word", vec!["--etcd-password".to_owned(), PASSWORD.to_owned()]),
    ] {
        let given = |daemon: Daemon| flag.iter().fold(daemon, |daemon, word| daemon.with(word));
        assert_kept(&mut lab, &registry, given, name);
    }
}

/// The commands of SECURITY.md that give the daemon's user its rights.
fn rights() -> Vec<Vec<String>> {
    let text = include_str!("../SECURITY.md");
    let commands = text.lines().filter_map(|line| line.trim().strip_prefix("$ etcdctl "));
    commands
        .map(|command| command.split(' ').map(str::to_owned).collect())
        .collect()
}

#[test]
fn the_rights_that_are_recommended_are_enough_and_no_more() {
    let mut lab = new_lab("rights");
    let mut server = EtcdServer::start_with(EtcdOptions::on_switch(&lab));
    let switch = lab.switch().clone();
    Registry::etcd(&server.url()).configure(&switch, CONFIG);
    let commands = rights();
    assert!(commands.len() > 5, "{commands:?}");
    for mut command in commands {
        if command.starts_with(&["user".to_owned(), "add".to_owned()]) {
            // What it asks for at a terminal.
            command.last_mut().unwrap().push_str(&format!(":{PASSWORD}"));
        }
        server.etcdctl(&command.iter().map(String::as_str).collect::<Vec<_>>());
    }
    server.set_client_arguments(&["--user", &format!("root:{PASSWORD}")]);
    let registry = Registry::etcd(&server.url())
        .with("-etcd-username=flannel")
        .with(format!("-etcd-password={PASSWORD}"));
    let mut hosts = Vec::from(["h1", "h2"].map(|name| lab.host(name).unwrap()));
    let mut daemons: Vec<Daemon> = hosts.iter().map(|host| Daemon::new(&lab, host, &registry)).collect();
    let members = hosts.iter_mut().zip(&mut daemons);
    let containers = members.zip(["c1", "c2"]).map(|((host, daemon), name)| {
        let subnet = daemon.start_and_wait();
        host.add_container(name, subnet).unwrap()
    });
    let mut overlay = Overlay {
        containers: containers.collect(),
        daemons,
        hosts,
        registry,
        lab,
    };
    overlay.assert_all_reach_all();
    let subnets = [0, 1].map(|index| overlay.subnet(index));
    overlay.restart_all(|daemon| assert!(daemon.stop().success()));
    assert_eq!([0, 1].map(|index| overlay.subnet(index)), subnets);
    overlay.assert_all_reach_all();
    overlay.daemons.iter().for_each(Daemon::assert_content);
    // Only root changes the network.
    let output = overlay.registry.try_flanneld(
        overlay.hosts[0].ns(),
        &["network", "set", r#"{"Network":"10.6.0.0/16"}"#, "--force"],
    );
    assert!(
        !output.status.success() && text(&output).contains("permission denied"),
        "{}",
        text(&output)
    );
}

#[test]
fn a_password_in_a_url_is_refused_and_not_repeated() {
    let mut lab = new_lab("secret_url");
    let host = lab.host("h1").unwrap();
    let endpoint = format!("-etcd-endpoints=http://root:{PASSWORD}@192.168.77.254:2379");
    for arguments in [&[][..], &["network", "get"], &["leases", "list"], &["doctor"]] {
        let output = flanneld(host.ns())
            .args(arguments)
            .args([&endpoint, "-v=10"])
            .output()
            .unwrap();
        assert!(!output.status.success());
        let said = text(&output);
        assert!(said.contains("--etcd-password"), "{arguments:?}: {said}");
        assert_hidden("what is said", &said);
    }
}

#[test]
fn a_wrong_password_is_not_repeated() {
    let mut lab = new_lab("secret_wrong");
    let (_server, registry) = guarded(&lab);
    let host = lab.host("h1").unwrap();
    let wrong = "Yz9-wrong-horse";
    let registry = registry.with(format!("-etcd-password={wrong}"));
    for arguments in [&["network", "get", "-v=10"][..], &["doctor", "-v=10"]] {
        let output = registry.try_flanneld(host.ns(), arguments);
        let said = text(&output);
        assert!(
            !output.status.success() && said.contains("wrong user name or password"),
            "{said}"
        );
        assert!(!said.contains(wrong), "{said}");
    }
}
