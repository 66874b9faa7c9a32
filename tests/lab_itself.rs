//! The laboratory that the demo and the other black-box tests stand on, without any daemon. Needs root.

use flannel::lab::{HostOptions, Lab, LabError, Ping, Process, Segment, SubnetEnv, throughput, wait_until};
use std::{fs, path::Path, time::Duration};

/// Whether anything of the lab `id` is left: namespaces, or its directory.
fn is_left(id: &str) -> bool {
    let netns = fs::read_dir("/run/netns").unwrap();
    let any = netns
        .filter_map(|e| e.unwrap().file_name().into_string().ok())
        .any(|name| name.starts_with(id));
    any || Path::new("/tmp").join(id).exists()
}

/// The name of the program that process `pid` runs.
fn comm(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm"))
        .unwrap_or_default()
        .trim()
        .to_owned()
}

#[test]
fn containers_reach_one_another_through_routing_hosts() {
    let mut lab = Lab::new("routed").unwrap();
    let (mut h1, mut h2) = (lab.host("h1").unwrap(), lab.host("h2").unwrap());
    let env = |subnet: &str| SubnetEnv {
        subnet: subnet.parse().unwrap(),
        mtu: 1400,
    };
    let c1 = h1.add_container("c1", env("10.9.1.1/24")).unwrap();
    let c2 = h2.add_container("c2", env("10.9.2.1/24")).unwrap();
    let c3 = h2.add_container("c3", env("10.9.2.1/24")).unwrap();
    assert_eq!(
        [c1.ip, c2.ip, c3.ip].map(|ip| ip.to_string()),
        ["10.9.1.2", "10.9.2.2", "10.9.2.3"]
    );
    h1.ns().ip(&format!("route add 10.9.2.0/24 via {}", h2.ip())).unwrap();
    h2.ns().ip(&format!("route add 10.9.1.0/24 via {}", h1.ip())).unwrap();

    for target in [&c2, &c3] {
        let ping = Ping::run(&c1.ns, target.ip.into(), 3).unwrap();
        assert_eq!((ping.sent, ping.received), (3, 3));
        assert_eq!(ping.ttl, Some(62), "two kernels forward");
        assert!(ping.rtt.unwrap().min > 0.0);
    }
    assert!(c1.ns.ip("link show eth0").unwrap().contains("mtu 1400"));

    let mut seconds = Vec::new();
    let total = throughput((&c1.ns, &c2.ns), c2.ip.into(), 2, lab.dir(), |mbits| {
        seconds.extend(mbits);
        Ok::<(), LabError>(())
    });
    assert!(total.unwrap().mbits > 0.0);
    assert_eq!(seconds.len(), 2, "{seconds:?}");
}

#[test]
fn host_is_attached_as_asked() {
    let mut lab = Lab::new("options").unwrap();
    let options = HostOptions {
        address: Some("192.168.77.99/24".parse().unwrap()),
        mtu: 9000,
        default_route: false,
        ..HostOptions::default()
    };
    let host = lab.host_with("big", &options).unwrap();
    let plain = lab.host("plain").unwrap();
    assert_eq!(host.ip().to_string(), "192.168.77.99");
    assert_eq!(plain.ip().to_string(), "192.168.77.2");
    assert!(host.ns().ip("link show eth0").unwrap().contains("mtu 9000"));
    assert!(!host.ns().ip("route").unwrap().contains("default"));
    assert!(plain.ns().ip("route").unwrap().contains("default via 192.168.77.254"));
    assert_eq!(Ping::run(plain.ns(), host.ip().into(), 1).unwrap().received, 1);
}

#[test]
fn a_router_is_between_the_two_segments() {
    let mut lab = Lab::new("segments").unwrap();
    let far = HostOptions {
        segment: Segment::Second,
        ..HostOptions::default()
    };
    let hosts = [
        lab.host("h1").unwrap(),
        lab.host("h2").unwrap(),
        lab.host_with("h3", &far).unwrap(),
        lab.host_with("h4", &far).unwrap(),
    ];
    assert_eq!(
        hosts.each_ref().map(|host| host.ip().to_string()),
        ["192.168.77.1", "192.168.77.2", "192.168.78.3", "192.168.78.4"]
    );
    let ttl = |from: usize, to: usize| Ping::run(hosts[from].ns(), hosts[to].ip().into(), 1).unwrap().ttl;
    for neighbours in [[0, 1], [2, 3]] {
        assert_eq!(ttl(neighbours[0], neighbours[1]), Some(64), "nobody forwards");
    }
    for apart in [[0, 2], [3, 1]] {
        assert_eq!(ttl(apart[0], apart[1]), Some(63), "the router forwards");
    }
}

#[test]
fn dropping_a_lab_removes_namespaces_processes_and_directory() {
    let mut lab = Lab::new("dropped").unwrap();
    let id = lab.id().to_owned();
    let host = lab.host("h1").unwrap();
    let mut sleep = host.ns().detached_command("sleep");
    sleep.arg("600");
    let mut sleep = Process::spawn("sleep", sleep, &lab.dir().join("sleep.log")).unwrap();
    sleep.detach();
    // Before nsenter has become sleep, the process is not in the namespace.
    wait_until(Duration::from_secs(5), "sleep to start", || {
        comm(sleep.pid()) == "sleep"
    })
    .unwrap();
    assert!(is_left(&id));

    drop(lab);

    assert!(!is_left(&id));
    sleep.wait(Duration::from_secs(5)).unwrap();
}

#[test]
fn panicking_owner_leaves_nothing() {
    let (tell, told) = std::sync::mpsc::channel();
    let owner = std::thread::spawn(move || {
        let mut lab = Lab::new("panicked").unwrap();
        lab.host("h1").unwrap();
        tell.send(lab.id().to_owned()).unwrap();
        panic!("as the test wants");
    });
    let id = told.recv().unwrap();
    assert!(owner.join().is_err());
    assert!(!is_left(&id));
}

#[test]
fn child_dies_with_the_thread_that_spawned_it() {
    let mut lab = Lab::new("orphan").unwrap();
    let host = lab.host("h1").unwrap();
    let mut command = host.ns().command("sleep");
    command.arg("600");
    let spawner = std::thread::spawn(move || {
        let child = command.spawn().unwrap();
        // Only once setpriv has become sleep is the death signal in place.
        wait_until(Duration::from_secs(5), "sleep to start", || comm(child.id()) == "sleep").unwrap();
        child
    });
    let mut child = spawner.join().unwrap();
    let mut status = None;
    wait_until(Duration::from_secs(5), "the child to die", || {
        status = child.try_wait().unwrap();
        status.is_some()
    })
    .unwrap();
    assert!(!status.unwrap().success());
}

#[test]
fn sweep_leaves_labs_of_live_owners_alone() {
    let lab = Lab::new("alive").unwrap();
    Lab::sweep_stale().unwrap();
    assert!(is_left(lab.id()));
    assert!(lab.switch().ip("link show br0").is_ok());
}

#[test]
fn sweep_removes_the_lab_of_a_dead_owner() {
    // A dead owner's lab, made by hand: 4194304 is the kernel's largest pid, so one above has nobody.
    let id = "fl4194305-dead";
    flannel::lab::run(flannel::lab::command("ip").args(["netns", "add", &format!("{id}-a-host")])).unwrap();
    fs::create_dir(format!("/tmp/{id}")).unwrap();
    Lab::sweep_stale().unwrap();
    assert!(!is_left(id));
}

#[test]
fn two_labs_of_one_name_stand_side_by_side() {
    let (one, two) = (Lab::new("twin").unwrap(), Lab::new("twin").unwrap());
    assert_ne!(one.id(), two.id());
    let gone = two.id().to_owned();
    two.remove().unwrap();
    assert!(!is_left(&gone));
    assert!(one.switch().ip("link show br0").is_ok());
}
