//! What a daemon gives up once it serves (`--sandbox`), as the kernel tells it. Needs root.

mod lab;

use std::{fs, path::Path};

use flannel::{
    lab::{Host, HostOptions, Lab, wait_until},
    observe::status,
    rules,
    sys::uring,
};
use lab::{
    CONFIG, Daemon, Overlay, PATIENCE, Registry, assert_reaches, flanneld, http_get, new_lab, not_tested,
    programmed::readdress,
};

// capabilities(7)
const NET_BIND_SERVICE: u64 = 1 << 10;
const NET_ADMIN: u64 = 1 << 12;
const NET_RAW: u64 = 1 << 13;
const SYS_ADMIN: u64 = 1 << 21;

/// With a filter, in the word of proc_pid_status(5).
const FILTERED: &str = "2";

/// A thread of a process: its name, what it may do, and how far others go first.
#[derive(Debug)]
struct Thread {
    id: String,
    name: String,
    status: String,
    nice: i32,
}

impl Thread {
    fn all_of(daemon: &mut Daemon) -> Vec<Thread> {
        let tasks = format!("/proc/{}/task", daemon.process().pid());
        let tasks = fs::read_dir(tasks).unwrap();
        tasks.map(|task| Thread::at(&task.unwrap().path())).collect()
    }

    /// By its directory in `/proc`.
    fn at(task: &Path) -> Thread {
        let [status, stat] = ["status", "stat"].map(|name| fs::read_to_string(task.join(name)).unwrap());
        // proc_pid_stat(5): the 19th field, or the 17th behind the name in parentheses, which may hold anything.
        let nice = stat.rsplit(") ").next().unwrap().split(' ').nth(16).unwrap();
        Thread {
            id: field(&status, "Pid").to_owned(),
            name: field(&status, "Name").to_owned(),
            nice: nice.parse().unwrap(),
            status,
        }
    }

    fn is_worker(&self) -> bool {
        self.name.starts_with("worker-")
    }

    fn capabilities(&self, set: &str) -> u64 {
        u64::from_str_radix(field(&self.status, set), 16).unwrap()
    }
}

fn field<'s>(status: &'s str, name: &str) -> &'s str {
    let value = status
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    value.unwrap_or_else(|| panic!("no {name} in {status}")).trim()
}

/// Fails the test unless each thread of the daemon has just this much left; the number of workers.
fn assert_confined(daemon: &mut Daemon, kept: u64) -> usize {
    // Those that ran errands while the daemon was set up.
    wait_until(PATIENCE, "threads of the set-up to end", || {
        let threads = Thread::all_of(daemon);
        threads.iter().all(|thread| thread.capabilities("CapPrm") & !kept == 0)
    })
    .unwrap();
    let threads = Thread::all_of(daemon);
    for thread in &threads {
        let left = if thread.is_worker() { 0 } else { kept };
        let [effective, permitted, bounding, ambient] =
            ["CapEff", "CapPrm", "CapBnd", "CapAmb"].map(|set| thread.capabilities(set));
        assert_eq!((effective, permitted, ambient), (left, left, 0), "{thread:?}");
        // What a worker may never gain is the daemon's to say, which has settled when it starts one anew.
        assert!(
            bounding == left || (thread.is_worker() && bounding == kept),
            "{thread:?}"
        );
        assert_eq!(field(&thread.status, "NoNewPrivs"), "1", "{thread:?}");
        assert_eq!(field(&thread.status, "Seccomp"), FILTERED, "{thread:?}");
    }
    threads.iter().filter(|thread| thread.is_worker()).count()
}

fn told(lab: &Lab, host: &Host, daemon: &Daemon) -> status::Sandbox {
    let file = format!("--subnet-file={}", daemon.subnet_file().display());
    let json = Registry::embedded(lab).flanneld(host.ns(), &["status", "--json", &file]);
    serde_json::from_str::<status::Status>(&json).unwrap().sandbox
}

/// As people see it.
fn told_line(host: &Host, daemon: &Daemon) -> String {
    let mut command = flanneld(host.ns());
    command
        .arg("status")
        .arg(format!("--subnet-file={}", daemon.subnet_file().display()));
    let text = String::from_utf8(command.output().unwrap().stdout).unwrap();
    text.lines()
        .find(|line| line.starts_with("Sandbox "))
        .unwrap()
        .to_owned()
}

/// Legacy iptables asks by raw sockets, where it is installed.
fn for_rules() -> u64 {
    if rules::may_ask_by_raw_socket() { NET_RAW } else { 0 }
}

#[test]
fn a_udp_daemon_keeps_two_capabilities_and_its_workers_none() {
    let lab = new_lab("sb_udp");
    let registry = Registry::embedded(&lab);
    let flags: [&[&str]; 2] = [
        &[
            "--workers=2",
            "--io=mmsg",
            "--healthz-ip=127.0.0.1",
            "--healthz-port=8471",
        ],
        &["--workers=2", "--io=uring"],
    ];
    if let Err(reason) = uring::probe() {
        not_tested(&format!("the sandbox with io_uring: {reason}"));
    }
    let hosts = flags.map(|flags| (HostOptions::default(), flags));
    let mut overlay = Overlay::start_hosts(lab, registry, CONFIG, &hosts);
    overlay.assert_all_reach_all();
    for daemon in &mut overlay.daemons {
        assert_eq!(assert_confined(daemon, NET_ADMIN | NET_RAW), 2);
    }
    // Others' programs, and what nobody answers, have been through it, too.
    let one = &overlay.containers[0].ns;
    assert!(lab::output_of(one, "ping", ["-n", "-c1", "-W1", "10.5.255.9"]).contains("Net Unreachable"));

    for (host, daemon) in overlay.hosts.iter().zip(&overlay.daemons) {
        let status::Sandbox {
            on,
            capabilities,
            no_new_privs,
            control_filter,
            worker_filter,
            troubles,
            refused,
        } = told(&overlay.lab, host, daemon);
        assert!(on && no_new_privs && control_filter && worker_filter == Some(true));
        assert_eq!(capabilities, ["NET_ADMIN", "NET_RAW"]);
        assert!(troubles.is_empty() && refused.is_empty(), "{troubles:?} {refused:?}");
        assert_eq!(
            told_line(host, daemon),
            "Sandbox    on, keeps NET_ADMIN, NET_RAW; workers may only move packets"
        );
        daemon.assert_content();
    }
    let (_, page) = http_get(overlay.hosts[0].ns(), ([127, 0, 0, 1], 8471).into(), "/metrics").unwrap();
    for line in [
        "flannel_sandbox_enabled 1.0",
        "flannel_sandbox_part_enabled{part=\"worker_filter\"} 1.0",
        "flannel_sandbox_capability{capability=\"NET_ADMIN\"} 1.0",
    ] {
        assert!(page.contains(line), "{line} is not in {page}");
    }
}

/// The workers' ids. Fails the test unless they are as the daemon was started, and the control plane lets them go first.
fn assert_workers_go_first(daemon: &mut Daemon) -> Vec<String> {
    let pid = daemon.process().pid().to_string();
    let first = Thread::at(Path::new("/proc/thread-self")).nice;
    let stepped_back = (first + 5).min(19);
    let threads = Thread::all_of(daemon);
    let (workers, others): (Vec<_>, Vec<_>) = threads.into_iter().partition(Thread::is_worker);
    assert!(
        others
            .iter()
            .any(|thread| thread.id == pid && thread.nice == stepped_back),
        "{others:?}"
    );
    assert!(workers.iter().all(|worker| worker.nice == first), "{workers:?}");
    workers.into_iter().map(|worker| worker.id).collect()
}

#[test]
fn the_control_plane_lets_workers_go_first_and_those_that_are_started_anew() {
    let lab = new_lab("sb_nice");
    let registry = Registry::embedded(&lab);
    let flags = (HostOptions::default(), &["--workers=2"][..]);
    let mut overlay = Overlay::start_hosts(lab, registry, CONFIG, &vec![flags; 2]);
    overlay.assert_all_reach_all();
    let before = assert_workers_go_first(&mut overlay.daemons[0]);
    assert_eq!(before.len(), 2);
    overlay.hosts[0].ns().ip("link del flannel0").unwrap();
    wait_until(PATIENCE, "other workers", || {
        let threads = Thread::all_of(&mut overlay.daemons[0]);
        let workers: Vec<_> = threads.iter().filter(|thread| thread.is_worker()).collect();
        workers.len() == 2 && workers.iter().all(|worker| !before.contains(&worker.id))
    })
    .unwrap();
    overlay.assert_all_reach_all();
    assert_workers_go_first(&mut overlay.daemons[0]);
}

#[test]
fn kernel_backends_have_no_workers_and_keep_less() {
    for kind in ["vxlan", "host-gw"] {
        let lab = new_lab(&format!("sb_{}", kind.replace('-', "")));
        let registry = Registry::embedded(&lab);
        let config = format!(r#"{{"Network":"10.5.0.0/16","Backend":{{"Type":"{kind}"}}}}"#);
        let mut overlay = Overlay::start_on(lab, registry, &config, 2);
        overlay.assert_all_reach_all();
        for daemon in &mut overlay.daemons {
            assert_eq!(assert_confined(daemon, NET_ADMIN | for_rules()), 0);
            daemon.assert_content();
        }
        assert_eq!(
            told(&overlay.lab, &overlay.hosts[0], &overlay.daemons[0]).worker_filter,
            None
        );
    }
}

#[test]
fn a_low_port_is_bound_again_on_another_address() {
    let lab = new_lab("sb_port");
    let registry = Registry::embedded(&lab);
    let config = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"udp","Port":500}}"#;
    let mut overlay = Overlay::start_on(lab, registry, config, 2);
    overlay.assert_all_reach_all();
    let kept = NET_ADMIN | NET_RAW | NET_BIND_SERVICE;
    let workers = assert_confined(&mut overlay.daemons[0], kept);
    readdress(overlay.hosts[0].ns(), overlay.hosts[0].ip(), [192, 168, 77, 101].into());
    overlay.daemons[0].wait_for_log("published the new PublicIP");
    let [one, two] = &overlay.containers[..] else {
        unreachable!()
    };
    assert_reaches(&one.ns, two.ip);
    assert_eq!(assert_confined(&mut overlay.daemons[0], kept), workers);
}

#[test]
fn off_leaves_all_as_it_was_and_says_so() {
    let mut lab = new_lab("sb_off");
    let registry = Registry::embedded(&lab);
    let host = lab.host("h1").unwrap();
    registry.configure(host.ns(), CONFIG);
    let mut daemon = Daemon::new(&lab, &host, &registry).with("-sandbox=off");
    daemon.start_and_wait();
    let own = fs::read_to_string("/proc/self/status").unwrap();
    for thread in Thread::all_of(&mut daemon) {
        assert_eq!(thread.capabilities("CapEff") & SYS_ADMIN, SYS_ADMIN, "{thread:?}");
        for name in ["NoNewPrivs", "Seccomp", "CapBnd"] {
            assert_eq!(field(&thread.status, name), field(&own, name), "{name} of {thread:?}");
        }
    }
    assert_eq!(told_line(&host, &daemon), "Sandbox    off");
    assert!(daemon.stop().success());
}

#[test]
fn a_kernel_without_filters_is_told_of_once_and_carries_packets() {
    let mut lab = new_lab("sb_none");
    let registry = Registry::embedded(&lab);
    let mut host = lab.host("h1").unwrap();
    registry.configure(host.ns(), CONFIG);
    let mut daemon = Daemon::new(&lab, &host, &registry).refused(libc::SYS_seccomp);
    let subnet = daemon.start_and_wait();
    let container = host.add_container("c1", subnet).unwrap();
    assert!(lab::output_of(&container.ns, "ping", ["-n", "-c1", "-W1", "10.5.255.9"]).contains("Net Unreachable"));
    for what in ["a filter of system calls", "a filter of the workers' system calls"] {
        let log = daemon.log();
        let lines: Vec<_> = log
            .lines()
            .filter(|line| line.contains(&format!("refuses {what}: ")))
            .collect();
        assert_eq!(lines.len(), 1, "{what}: {log}");
    }
    let line = told_line(&host, &daemon);
    assert!(
        line.contains("workers have none, and NO FILTER; without a filter of the workers'"),
        "{line}"
    );
    let threads = Thread::all_of(&mut daemon);
    assert!(
        threads
            .iter()
            .filter(|thread| thread.is_worker())
            .all(|worker| worker.capabilities("CapPrm") == 0)
    );
    daemon.assert_running();
    assert!(daemon.stop().success());
}
