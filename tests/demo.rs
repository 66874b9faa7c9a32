//! `flanneld demo`, as a newcomer runs it. Needs root.

mod lab;

use flannel::lab::{Process, wait_until};
use lab::{FLANNELD, PATIENCE, is_left};
use nix::sys::signal::Signal;
use std::{
    fs,
    path::PathBuf,
    process::{Command, ExitStatus, Output},
    time::Duration,
};

/// The whole demo takes less, with two hosts.
const DEMO_LIMIT: Duration = Duration::from_secs(60);

/// A demo under way; what it says goes to a file.
struct Demo {
    process: Process,
    log: PathBuf,
}

impl Demo {
    fn start(arguments: &[&str]) -> Demo {
        let mut command = Command::new(FLANNELD);
        command.arg("demo").args(arguments);
        let unique = format!(
            "flannel-demo-{}-{:?}.log",
            std::process::id(),
            std::thread::current().id()
        );
        let log = std::env::temp_dir().join(unique);
        Demo {
            process: Process::spawn("demo", command, &log).unwrap(),
            log,
        }
    }

    /// The id of its lab.
    fn lab(&self) -> String {
        format!("fl{}-demo", self.process.pid())
    }

    fn wait_to_say(&mut self, text: &str) {
        wait_until(DEMO_LIMIT, &format!("the demo to say `{text}`"), || {
            assert!(self.process.exited().is_none(), "{}", self.process.log());
            self.process.log().contains(text)
        })
        .unwrap();
    }

    fn end_with(&mut self, signal: Signal) -> ExitStatus {
        self.process.signal(signal);
        self.process.wait(PATIENCE).unwrap()
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        // It may never have been made.
        let _ = fs::remove_file(&self.log);
    }
}

/// A test that fails must not leave its lab either.
struct TakeDown;

impl Drop for TakeDown {
    fn drop(&mut self) {
        run(&["--down"]);
    }
}

fn run(arguments: &[&str]) -> Output {
    Command::new(FLANNELD).arg("demo").args(arguments).output().unwrap()
}

/// The id of the demo's lab that `output` speaks of: the first `fl` with a number behind it.
fn lab_in(output: &str) -> String {
    let mut starts = output.match_indices("fl").map(|(start, _)| &output[start..]);
    let id = starts
        .find(|rest| rest[2..].starts_with(|c: char| c.is_ascii_digit()))
        .unwrap();
    id[..id.find("-demo").unwrap() + 5].to_owned()
}

#[test]
fn every_pair_is_shown_with_throughput_and_leases_and_nothing_is_left() {
    let output = run(&["--hosts", "3"]);
    let (out, err) = (
        String::from_utf8(output.stdout).unwrap(),
        String::from_utf8(output.stderr).unwrap(),
    );
    assert!(output.status.success(), "{err}");
    for pair in [["c1 ", "c2 "], ["c1 ", "c3 "], ["c2 ", "c3 "]] {
        let line = out
            .lines()
            .find(|line| line.starts_with(pair[0]) && line.contains(pair[1]));
        let line = line.unwrap_or_else(|| panic!("no {pair:?} in {out}"));
        assert!(line.contains(" flannel0 ") && line.contains(" 5/5 "), "{out}");
        assert!(
            line.ends_with(" 60"),
            "two kernels and two daemons take one each from the TTL: {out}"
        );
    }
    assert!(out.contains("TCP throughput c1 to c2: "), "{out}");
    for host in ["192.168.77.1", "192.168.77.2", "192.168.77.3"] {
        assert!(out.contains(host), "lease of {host}: {out}");
    }
    assert!(!is_left(&lab_in(&err)), "{err}");
}

/// Runs the demo of this backend, and looks for the path of each pair in its table, where nobody but the kernels take from the
/// TTL: the two hosts', and the router's unless the packets are in a tunnel.
fn a_demo_shows(backend: &str, paths: &[(&str, &str, &str)]) {
    let output = run(&["--hosts", "3", "--backend", backend]);
    let (out, err) = (
        String::from_utf8(output.stdout).unwrap(),
        String::from_utf8(output.stderr).unwrap(),
    );
    assert!(output.status.success(), "{err}");
    for (from, to, path) in paths {
        let mut lines = out.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let line = lines
            .find(|words| matches!(&words[..], [one, _, other, ..] if one == from && other == to))
            .unwrap_or_else(|| panic!("no {from} to {to} in {out}"));
        assert_eq!((line[4], line[5], *line.last().unwrap()), (*path, "5/5", "62"), "{out}");
    }
    assert!(out.contains("TCP throughput c1 to c2: "), "{out}");
    assert!(!is_left(&lab_in(&err)), "{err}");
}

#[test]
fn vxlan_is_shown_with_its_device() {
    a_demo_shows(
        "vxlan",
        &[
            ("c1", "c2", "flannel.1"),
            ("c1", "c3", "flannel.1"),
            ("c2", "c3", "flannel.1"),
        ],
    );
}

#[test]
fn host_gw_is_shown_with_the_external_interface() {
    a_demo_shows(
        "host-gw",
        &[("c1", "c2", "eth0"), ("c1", "c3", "eth0"), ("c2", "c3", "eth0")],
    );
}

#[test]
fn direct_routing_is_shown_with_a_path_for_each_side_of_the_router() {
    a_demo_shows(
        "direct-routing",
        &[
            ("c1", "c2", "eth0"),
            ("c1", "c3", "flannel.1"),
            ("c2", "c3", "flannel.1"),
        ],
    );
}

#[test]
fn real_etcd_is_used_when_asked_for() {
    let output = run(&["--hosts", "2", "--etcd"]);
    let (out, err) = (
        String::from_utf8(output.stdout).unwrap(),
        String::from_utf8(output.stderr).unwrap(),
    );
    assert!(output.status.success(), "{err}");
    assert!(err.contains("etcd at http://192.168.77.3:2379"), "{err}");
    assert!(out.contains(" 5/5 ") && !out.contains("FAILED"), "{out}");
    assert!(!is_left(&lab_in(&err)), "{err}");
}

#[test]
fn signal_at_any_moment_leaves_nothing() {
    let moments = [
        ("on a switch", Signal::SIGINT, 130),
        ("registry:", Signal::SIGTERM, 143),
        ("in each subnet", Signal::SIGHUP, 129),
        ("second 1", Signal::SIGINT, 130),
    ];
    for (moment, signal, code) in moments {
        let mut demo = Demo::start(&["--hosts", "2"]);
        demo.wait_to_say(moment);
        assert!(is_left(&demo.lab()), "there is something to remove");
        assert_eq!(
            demo.end_with(signal).code(),
            Some(code),
            "{moment}: {}",
            demo.process.log()
        );
        assert!(!is_left(&demo.lab()), "{moment}: {}", demo.process.log());
    }
}

#[test]
fn what_a_killed_demo_leaves_is_removed_by_the_next() {
    let mut killed = Demo::start(&["--hosts", "2"]);
    killed.wait_to_say("in each subnet");
    killed.end_with(Signal::SIGKILL);
    assert!(is_left(&killed.lab()));

    let next = run(&["--hosts", "2"]);

    assert!(next.status.success(), "{}", String::from_utf8_lossy(&next.stderr));
    assert!(!is_left(&killed.lab()));
}

#[test]
fn kept_lab_goes_on_working_until_it_is_taken_down() {
    let kept = run(&["--hosts", "2", "--keep"]);
    let out = String::from_utf8(kept.stdout).unwrap();
    assert!(kept.status.success(), "{out}");
    let id = lab_in(&out);
    let _cleanup = TakeDown;
    assert!(is_left(&id), "{out}");

    // The line that the demo prints, word for word, but for an end.
    let line = out
        .lines()
        .find_map(|line| line.trim_start().strip_prefix("in a container"))
        .unwrap();
    let ping = Command::new("sh")
        .args(["-c", &format!("{line} -c 3")])
        .output()
        .unwrap();
    assert!(ping.status.success(), "{line}: {ping:?}");
    let line = out
        .lines()
        .find_map(|line| line.trim_start().strip_prefix("leases"))
        .unwrap();
    let leases = Command::new("sh").args(["-c", line]).output().unwrap();
    assert!(
        String::from_utf8_lossy(&leases.stdout).contains("192.168.77.2"),
        "{line}: {leases:?}"
    );

    let down = run(&["--down"]);
    assert!(down.status.success());
    assert!(
        String::from_utf8_lossy(&down.stdout).contains(&format!("Removed {id}.")),
        "{down:?}"
    );
    assert!(!is_left(&id));
}

#[test]
fn without_root_the_demo_says_so() {
    // The binary may be in a directory that only root can enter: it is opened before root is given up.
    let nobody = [
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        "/proc/self/fd/9",
        "demo",
    ];
    let mut command = Command::new("bash");
    command
        .args(["-c", r#"exec setpriv "$@" 9<"$0""#, FLANNELD])
        .args(nobody);
    let output = command.output().unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{err}");
    assert!(err.contains("needs root") && err.contains("sudo"), "{err}");
}

#[test]
fn missing_program_is_named_with_its_package() {
    let output = Command::new(FLANNELD)
        .args(["demo"])
        .env("PATH", "/nowhere")
        .output()
        .unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{err}");
    assert!(
        err.contains("`ping`") && err.contains("apt-get install") && err.contains("iputils-ping"),
        "{err}"
    );
}
