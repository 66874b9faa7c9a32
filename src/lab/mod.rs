//! A laboratory: hosts and containers as network namespaces of this machine, joined by a bridge, or by two with a router
//! between them.
//!
//! Used by `flanneld demo`, the black-box tests and the benchmark, so that what a newcomer sees is what is tested and
//! measured.
//!
//! ```text
//!   fl<pid>-<lab>-switch     br0 192.168.77.254/24      <- routes ->      br1 192.168.78.254/24
//!                            |p1             |p2                                |p3
//!   fl<pid>-<lab>-h1   eth0 .1         h2   eth0 .2                       h3   eth0 .3     hosts: flanneld runs here
//!                      cbr0 10.5.34.1       cbr0 10.5.68.1                     cbr0 10.5.7.1
//!                            |veth1          |veth1                             |veth1
//!   fl<pid>-<lab>-c1   eth0 .2         c2   eth0 .2                       c3   eth0 .2     containers
//!
//!                      Segment::First                                     Segment::Second
//! ```
//!
//! - The second bridge is made with the first host that is to be in it; until then the switch routes nothing. Each host's
//!   default route leads to the switch's address in its segment.
//! - The machine's own namespace is never touched: no interface, route, rule or sysctl in it changes.
//! - Everything is made by running `ip`, `nsenter`, `setpriv` (and `setsid`), so each step can be repeated by hand.
//! - A lab's namespaces, processes and directory go when the [`Lab`] is dropped, also by a panic. What a killed run
//!   leaves is found by its name and removed by [`Lab::sweep_stale`] of the next.

mod error;
mod host;
mod interrupt;
mod iperf;
mod namespace;
mod ping;
mod process;

pub use error::LabError;
pub use host::{CONTAINER_BRIDGE, Container, Host, HostOptions, Segment, SubnetEnv};
pub use interrupt::Interrupt;
pub use iperf::{Throughput, throughput};
pub use namespace::Namespace;
pub use ping::{Ping, Rtt, ping_command};
pub use process::{Process, command, has_program, run, run_within, tail, wait_for, wait_until, without_daemon_env};

use ipnet::Ipv4Net;
use nix::{
    sys::signal::{self, Signal},
    unistd::Pid,
};
use std::{
    collections::BTreeSet,
    fs::{self, DirBuilder},
    io,
    net::Ipv4Addr,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
    time::Duration,
};

/// Where iproute2 keeps named network namespaces, see ip-netns(8).
const RUN_NETNS: &str = "/run/netns";

/// Labs keep their directories here and not in `$TMPDIR`: runs with different environments must see one another's labs.
const LAB_DIRS: &str = "/tmp";

/// In a lab's directory: the start time of the process that owns it.
const OWNER_FILE: &str = "owner";

/// In a lab's directory: its owner left it up on purpose.
const KEPT_FILE: &str = "kept";

/// How many hosts fit below the switch's own address in a segment.
const MAX_HOSTS: u8 = Segment::First.switch_address().octets()[3] - 1;

/// How long the programs of a lab that is being removed may take to end after SIGTERM: flanneld removes its device.
const GRACE: Duration = Duration::from_secs(2);

/// How long SIGKILL may take; only a process stuck in the kernel needs more.
const KILL_LIMIT: Duration = Duration::from_secs(5);

/// Hosts on a switch, with a directory for their files. Needs root.
#[derive(Debug)]
pub struct Lab {
    /// `fl<pid>-<name>`: the start of all its namespaces' names, and its directory's name.
    id: String,
    dir: PathBuf,
    switch: Namespace,
    hosts: u8,
    /// Whether there is a second segment.
    routed: bool,
    kept: bool,
}

impl Lab {
    /// Makes an empty lab: a directory, and the switch. `name` may contain lower-case letters, digits and underscores;
    /// the same name twice in one process is told apart by a number.
    ///
    /// # Errors
    /// [`LabError::Name`], [`LabError::File`] for the directory, and what `ip` fails with (without root: permission).
    pub fn new(name: &str) -> Result<Lab, LabError> {
        if !is_lab_name(name) {
            return Err(LabError::Name { name: name.to_owned() });
        }
        let (id, dir) = claim_directory(name)?;
        let built = (|| {
            // Lets a sweep tell this process from a later one that happens to get the same pid.
            let owner = dir.join(OWNER_FILE);
            let started = start_time(std::process::id()).unwrap_or_default();
            fs::write(&owner, started).map_err(|source| LabError::File {
                action: "write",
                path: owner,
                source,
            })?;
            let switch = Namespace::create(format!("{id}-switch"))?;
            add_segment(&switch, Segment::First)?;
            Ok(switch)
        })();
        match built {
            Ok(switch) => Ok(Lab {
                id,
                dir,
                switch,
                hosts: 0,
                routed: false,
                kept: false,
            }),
            Err(error) => {
                remove_or_warn(&id);
                Err(error)
            }
        }
    }

    /// `fl<pid>-<name>`, the start of the names of all its namespaces.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// A directory for the lab's files (logs, registry, subnet files), removed with it.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The namespace of the switch, where each host's traffic can be seen on its port `p1`, `p2`, ...
    pub fn switch(&self) -> &Namespace {
        &self.switch
    }

    /// Adds a host to the first segment, with the next free address, MTU 1500 and a default route.
    ///
    /// # Errors
    /// As [`Lab::host_with`].
    pub fn host(&mut self, name: &str) -> Result<Host, LabError> {
        self.host_with(name, &HostOptions::default())
    }

    /// Adds a host. `name` must be new in this lab, for containers and hosts alike.
    ///
    /// # Errors
    /// [`LabError::TooManyHosts`], and what `ip` fails with.
    pub fn host_with(&mut self, name: &str, options: &HostOptions) -> Result<Host, LabError> {
        if self.hosts == MAX_HOSTS {
            return Err(LabError::TooManyHosts {
                host: name.to_owned(),
                limit: MAX_HOSTS,
            });
        }
        if options.segment == Segment::Second && !self.routed {
            add_segment(&self.switch, Segment::Second)?;
            self.switch.sysctl("ipv4/ip_forward", "1")?;
            self.routed = true;
        }
        let port = self.hosts + 1;
        let [a, b, c, _] = options.segment.switch_address().octets();
        let default = Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, port), Segment::PREFIX_LEN);
        let host = Host::attach(self, name, port, options.address.unwrap_or(default), options)?;
        self.hosts = port;
        Ok(host)
    }

    /// Adds a namespace that is wired to nothing. `name` must be new in this lab.
    ///
    /// # Errors
    /// What `ip` fails with.
    pub fn namespace(&self, name: &str) -> Result<Namespace, LabError> {
        Namespace::create(format!("{}-{name}", self.id))
    }

    /// Leaves the lab up when this process ends; [`Lab::remove_kept`] removes it later.
    ///
    /// # Errors
    /// [`LabError::File`] when the mark cannot be written: the lab is removed then.
    pub fn keep(mut self) -> Result<(), LabError> {
        let path = self.dir.join(KEPT_FILE);
        fs::write(&path, "").map_err(|source| LabError::File {
            action: "write",
            path,
            source,
        })?;
        self.kept = true;
        Ok(())
    }

    /// Removes the lab, as dropping it does, and tells what went wrong.
    ///
    /// # Errors
    /// [`LabError::Unkillable`], [`LabError::File`], and what `ip` fails with.
    pub fn remove(mut self) -> Result<(), LabError> {
        // Dropping must not try the same again.
        self.kept = true;
        remove(&self.id)
    }

    /// Removes what runs that were killed have left: labs whose owner is gone and that were not kept.
    /// Returns their [`Lab::id`]s.
    ///
    /// # Errors
    /// As [`Lab::remove`], for the first lab that fails.
    pub fn sweep_stale() -> Result<Vec<String>, LabError> {
        remove_all(is_stale)
    }

    /// Removes the labs left up by [`Lab::keep`]. Returns their [`Lab::id`]s.
    ///
    /// # Errors
    /// As [`Lab::remove`], for the first lab that fails.
    pub fn remove_kept() -> Result<Vec<String>, LabError> {
        remove_all(is_kept)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if !self.kept {
            remove_or_warn(&self.id);
        }
    }
}

/// Makes the bridge of `segment`, with the switch's address on it.
fn add_segment(switch: &Namespace, segment: Segment) -> Result<(), LabError> {
    let (bridge, address) = (segment.bridge(), segment.switch_address());
    switch.ip(&format!("link add {bridge} type bridge"))?;
    switch.ip(&format!("address add {address}/{} dev {bridge}", Segment::PREFIX_LEN))?;
    switch.ip(&format!("link set {bridge} up"))?;
    Ok(())
}

/// A lab's name is put between dashes in its namespaces' names, so it has none itself.
fn is_lab_name(name: &str) -> bool {
    (1..=24).contains(&name.len())
        && name
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
}

/// The owner's pid and the lab's name in `fl<pid>-<name>`.
fn parse_id(id: &str) -> Option<(u32, &str)> {
    let (pid, name) = id.strip_prefix("fl")?.split_once('-')?;
    is_lab_name(name).then_some((pid.parse().ok()?, name))
}

/// Making a directory either succeeds or fails because it exists: that decides who has an id.
fn claim_directory(name: &str) -> Result<(String, PathBuf), LabError> {
    let first = format!("fl{}-{name}", std::process::id());
    let mut id = first.clone();
    let mut number = 1;
    loop {
        let dir = Path::new(LAB_DIRS).join(&id);
        match DirBuilder::new().mode(0o755).create(&dir) {
            Ok(()) => return Ok((id, dir)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                number += 1;
                id = format!("{first}{number}");
            }
            Err(source) => {
                return Err(LabError::File {
                    action: "make",
                    path: dir,
                    source,
                });
            }
        }
    }
}

/// When process `pid` started, in clock ticks since boot (proc(5), stat, field 22); `None`: there is none.
fn start_time(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field, the program's name in parentheses, may itself contain spaces and parentheses.
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_whitespace().nth(19).map(str::to_owned)
}

fn is_kept(id: &str) -> bool {
    Path::new(LAB_DIRS).join(id).join(KEPT_FILE).exists()
}

fn is_stale(id: &str) -> bool {
    if is_kept(id) {
        // The machine was started anew: the namespaces are gone, the directory may not be.
        return namespaces_of(id).is_empty();
    }
    let Some((pid, _)) = parse_id(id) else { return false };
    let Some(running) = start_time(pid) else { return true };
    // Between making the directory and writing the file, the owner is known by its pid alone.
    match fs::read_to_string(Path::new(LAB_DIRS).join(id).join(OWNER_FILE)) {
        Ok(recorded) => !recorded.is_empty() && recorded != running,
        Err(_) => false,
    }
}

/// The ids of all labs of this machine, found by their namespaces and directories.
fn all_labs() -> BTreeSet<String> {
    let mut labs = BTreeSet::new();
    for name in names_in(RUN_NETNS) {
        // The name of a host may contain dashes, what comes before it does not.
        let id = name.match_indices('-').nth(1).map(|(end, _)| &name[..end]);
        labs.extend(id.filter(|id| parse_id(id).is_some()).map(str::to_owned));
    }
    for name in names_in(LAB_DIRS) {
        // Anyone may put such a name into /tmp: only what root made is a lab's.
        let by_root = fs::symlink_metadata(Path::new(LAB_DIRS).join(&name)).is_ok_and(|m| m.is_dir() && m.uid() == 0);
        if by_root && parse_id(&name).is_some() {
            labs.insert(name);
        }
    }
    labs
}

fn namespaces_of(id: &str) -> Vec<Namespace> {
    let prefix = format!("{id}-");
    let names = names_in(RUN_NETNS).into_iter().filter(|name| name.starts_with(&prefix));
    names.map(Namespace::existing).collect()
}

/// The entries of a directory; one that is not there has none.
fn names_in(dir: &str) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect()
}

fn remove_all(which: fn(&str) -> bool) -> Result<Vec<String>, LabError> {
    let labs: Vec<String> = all_labs().into_iter().filter(|id| which(id)).collect();
    labs.iter().try_for_each(|id| remove(id))?;
    Ok(labs)
}

fn remove_or_warn(id: &str) {
    if let Err(error) = remove(id) {
        tracing::warn!("the lab {id} is not wholly removed: {error}");
    }
}

/// Ends what runs in the lab, then removes its namespaces and its directory. Whatever has gone already is no error:
/// two sweeps may run at once.
fn remove(id: &str) -> Result<(), LabError> {
    let namespaces = namespaces_of(id);
    if !namespaces.is_empty() && !signal_all(&namespaces, Signal::SIGTERM, GRACE) {
        signal_all(&namespaces, Signal::SIGKILL, KILL_LIMIT);
        let pids = namespace::processes_in(&namespaces);
        if !pids.is_empty() {
            return Err(LabError::Unkillable {
                lab: id.to_owned(),
                pids,
            });
        }
    }
    for ns in namespaces {
        let removed = run(command("ip").args(["netns", "delete", ns.name()]));
        if ns.path().exists() {
            removed?;
        }
    }
    let dir = Path::new(LAB_DIRS).join(id);
    match fs::remove_dir_all(&dir) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(LabError::File {
            action: "remove",
            path: dir,
            source,
        }),
        _ => Ok(()),
    }
}

/// Sends `signal` to each process in the namespaces once, also to those that appear meanwhile; whether all have gone
/// within `limit`.
fn signal_all(namespaces: &[Namespace], signal: Signal, limit: Duration) -> bool {
    let mut told = BTreeSet::new();
    wait_until(limit, "the lab's processes to end", || {
        let pids = namespace::processes_in(namespaces);
        for &pid in &pids {
            if told.insert(pid) {
                // Fails only when the process has just gone by itself.
                let _ = signal::kill(Pid::from_raw(pid), signal);
            }
        }
        pids.is_empty()
    })
    .is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lab_ids_carry_owner_and_name() {
        assert_eq!(parse_id("fl123-two_hosts"), Some((123, "two_hosts")));
        for other in [
            "",
            "fl",
            "fl123",
            "fl123-",
            "fl-demo",
            "flx-demo",
            "fl12-a-b",
            "cni-1",
            "fl123-Demo",
        ] {
            assert_eq!(parse_id(other), None, "{other}");
        }
    }

    #[test]
    fn name_with_a_dash_is_refused() {
        let error = Lab::new("two-hosts").unwrap_err().to_string();
        assert!(
            error.contains("`two-hosts`") && error.contains("underscores"),
            "{error}"
        );
    }

    #[test]
    fn own_process_has_a_start_time_and_an_unused_pid_has_none() {
        assert!(start_time(std::process::id()).unwrap().parse::<u64>().unwrap() > 0);
        assert_eq!(start_time(u32::MAX), None);
    }

    #[test]
    fn lab_of_a_dead_owner_is_stale_and_of_a_live_one_is_not() {
        // Above the kernel's largest pid, 2^22: nobody has it.
        assert!(is_stale("fl4194305-gone"));
        assert!(!is_stale(&format!("fl{}-alive", std::process::id())));
    }
}
