//! What `scripts/lab-docker` leaves behind, which is nothing. The lab as a whole is a step of `scripts/test`, where what it shows,
//! or why it cannot, is seen. Needs root.

mod lab;

use flannel::lab::{Process, command, wait_until};
use lab::{FLANNELD, is_left, new_lab, not_tested};
use nix::sys::signal::Signal;
use std::{collections::BTreeSet, env, fs, os::unix::fs::PermissionsExt, path::Path, process::Command, time::Duration};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/lab-docker");

/// How long two dockerd may take until containers run, or to be gone again, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// The lab's exit status where Docker does not run.
const CANNOT: i32 = 77;

fn lab_docker() -> Command {
    let mut script = command(SCRIPT);
    script.args(["--backend", "udp", "--binary", FLANNELD]);
    script
}

/// A lab that has come to where `sign` is in its output; `None`, where Docker does not run.
fn at(log: &Path, sign: &str) -> Option<Process> {
    let mut process = Process::spawn("lab-docker", lab_docker(), log).unwrap();
    wait_until(PATIENCE, sign, || {
        process.log().contains(sign) || process.exited().is_some()
    })
    .unwrap();
    match process.exited() {
        None => Some(process),
        Some(status) if status.code() == Some(CANNOT) => {
            not_tested(process.log().lines().last().unwrap_or_default());
            None
        }
        Some(status) => panic!("{status}: {}", process.log()),
    }
}

fn id_of(lab: &Process) -> String {
    format!("fl{}-docker", lab.pid())
}

/// Whether the kernel still has control groups of that lab.
fn has_control_groups(id: &str) -> bool {
    let mut find = Command::new("find");
    find.args(["/sys/fs/cgroup", "-type", "d", "-name"])
        .arg(format!("{id}-*"));
    !find.output().unwrap().stdout.is_empty()
}

/// How many processes are in the network namespace of a lab's host; those in containers have one of their own.
fn processes_on(id: &str, host: &str) -> usize {
    let output = command("ip")
        .args(["netns", "pids", &format!("{id}-{host}")])
        .output()
        .unwrap();
    output
        .stdout
        .split(|&byte| byte == b'\n')
        .filter(|line| !line.is_empty())
        .count()
}

/// How many processes are in the control groups of a lab's containers.
fn processes_in_containers(id: &str) -> usize {
    let mut find = Command::new("find");
    find.args(["/sys/fs/cgroup", "-path"])
        .arg(format!("*/{id}-*/cgroup.procs"))
        .args(["-exec", "cat", "{}", "+"]);
    let listed = find.output().unwrap().stdout;
    let pids: BTreeSet<&[u8]> = listed
        .split(|&byte| byte == b'\n')
        .filter(|pid| !pid.is_empty())
        .collect();
    pids.len()
}

#[test]
fn interrupted_docker_lab_leaves_nothing() {
    let logs = new_lab("docker_interrupted");
    let Some(mut lab) = at(&logs.dir().join("log"), "docker exec c2") else {
        return;
    };
    let id = id_of(&lab);
    assert!(is_left(&id) && has_control_groups(&id), "it has made nothing");

    lab.signal(Signal::SIGINT);
    let status = lab.wait(PATIENCE).unwrap();

    // As a shell reports Ctrl-C.
    assert_eq!(status.code(), Some(130), "{}", lab.log());
    assert!(!is_left(&id), "{}", lab.log());
    assert!(!has_control_groups(&id), "{}", lab.log());
}

#[test]
fn what_a_killed_docker_lab_leaves_goes_with_the_next() {
    let logs = new_lab("docker_killed");
    let Some(mut killed) = at(&logs.dir().join("log"), "docker exec c2") else {
        return;
    };
    let id = id_of(&killed);
    assert!(processes_on(&id, "h1") > 0, "no process on the host");
    assert!(processes_in_containers(&id) > 0, "no process in a container");

    killed.kill();

    // Its processes do not outlive it, those in containers neither.
    wait_until(PATIENCE, "all processes of the lab to end", || {
        processes_on(&id, "h1") + processes_on(&id, "h2") + processes_in_containers(&id) == 0
    })
    .unwrap();
    let Some(mut next) = at(&logs.dir().join("next"), "== udp") else {
        return;
    };
    assert!(!is_left(&id) && !has_control_groups(&id), "{}", next.log());
    let next_id = id_of(&next);
    next.signal(Signal::SIGTERM);
    assert_eq!(next.wait(PATIENCE).unwrap().code(), Some(143), "{}", next.log());
    assert!(!is_left(&next_id), "{}", next.log());
}

#[test]
fn docker_lab_says_why_it_cannot_run_here() {
    let files = new_lab("docker_cannot");
    // Found before the real one.
    let dockerd = files.dir().join("dockerd");
    fs::write(&dockerd, "#!/bin/sh\necho 'no cgroups here' >&2\nexit 1\n").unwrap();
    fs::set_permissions(&dockerd, fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", files.dir().display(), env::var("PATH").unwrap());

    let mut script = lab_docker();
    script.env("PATH", path);
    let mut lab = Process::spawn("lab-docker", script, &files.dir().join("log")).unwrap();
    let status = lab.wait(PATIENCE).unwrap();

    assert_eq!(status.code(), Some(CANNOT), "{}", lab.log());
    assert!(lab.log().contains("lab-docker: SKIPPED: "), "{}", lab.log());
    assert!(!is_left(&id_of(&lab)), "{}", lab.log());
}

#[test]
fn docker_lab_refuses_what_it_does_not_know() {
    for (arguments, told) in [
        (["--backend", "ipip"], "unknown backend `ipip`"),
        (["--hosts", "1"], "from 2 to 9"),
        (["--binary", "/nowhere/flanneld"], "no such file"),
        (["--keep", "it"], "unknown argument `--keep`"),
    ] {
        let output = command(SCRIPT).args(arguments).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains(told) && said.contains("usage: "), "{said}");
    }
}
