//! What the black-box tests share: the real binary as a daemon on a host of the lab, and ways to look at what it does.
//! The hosts themselves are `flannel::lab`, the same as in `flanneld demo`.
#![allow(dead_code, reason = "each test program uses its own part of this")]

pub(crate) mod certificates;
pub(crate) mod clock;
pub(crate) mod etcd;
pub(crate) mod faults;
pub(crate) mod flow;
pub(crate) mod memory;
pub(crate) mod original;
pub(crate) mod pair;
pub(crate) mod plain_peer;
pub(crate) mod pour;
pub(crate) mod probe;
pub(crate) mod programmed;
pub(crate) mod proxy;
pub(crate) mod relay;
pub(crate) mod seccomp;
pub(crate) mod stream;
pub(crate) mod supervisor;
pub(crate) mod traffic;
pub(crate) mod vitals;
pub(crate) mod vxlan;
pub(crate) mod wire;

use etcd::{EtcdOptions, EtcdServer};
use flannel::lab::{
    self, Container, Host, HostOptions, Lab, LabError, Namespace, Ping, Process, SubnetEnv, wait_for, wait_until,
};
use flannel::observe::status::{Status, Worker};
use ipnet::{Ipv4Net, Ipv6Net};
use nix::sys::signal::Signal;
use std::{
    ffi::OsStr,
    fs,
    io::{self, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    os::unix::net::UnixDatagram,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Output},
    sync::Once,
    thread,
    time::Duration,
};
use supervisor::Supervisor;

/// The binary under test.
pub(crate) const FLANNELD: &str = env!("CARGO_BIN_EXE_flanneld");

/// Longer than anything here takes on a busy machine, so that what never comes fails the test.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// The flag that each daemon has, up to its value.
const SUBNET_FILE: &str = "--subnet-file=";

/// The configuration of most tests: the `udp` backend in 10.5.0.0/16.
pub(crate) const CONFIG: &str = r#"{"Network":"10.5.0.0/16"}"#;

/// How much of a daemon's log a failed test shows.
const LOG_LINES: usize = 40;

/// An empty lab. The first one in a test program clears away what killed runs have left.
pub(crate) fn new_lab(name: &str) -> Lab {
    static SWEEP: Once = Once::new();
    SWEEP.call_once(|| drop(Lab::sweep_stale().unwrap()));
    Lab::new(name).unwrap()
}

/// Whether anything of the lab with this id is there: a namespace, or its directory.
pub(crate) fn is_left(id: &str) -> bool {
    let namespaces = fs::read_dir("/run/netns").unwrap();
    let mut names = namespaces.filter_map(|entry| entry.unwrap().file_name().into_string().ok());
    names.any(|name| name.starts_with(&format!("{id}-"))) || fs::exists(format!("/tmp/{id}")).unwrap()
}

/// Says on standard error that something was not tested, and why. Past the capture of a passing test's output: what was not
/// tested must be seen.
pub(crate) fn not_tested(why: &str) {
    io::stderr()
        .write_all(format!("not tested: {why}\n").as_bytes())
        .unwrap();
}

/// The flags that lead flanneld to a registry.
#[derive(Clone, Debug)]
pub(crate) struct Registry {
    flags: Vec<String>,
}

impl Registry {
    /// The embedded one, in the lab's directory.
    pub(crate) fn embedded(lab: &Lab) -> Registry {
        Registry {
            flags: vec![format!("--registry-dir={}", lab.dir().join("registry").display())],
        }
    }

    /// An etcd, or several (comma separated).
    pub(crate) fn etcd(urls: &str) -> Registry {
        Registry {
            flags: vec![format!("--etcd-endpoints={urls}")],
        }
    }

    /// With one more flag: another prefix, TLS files, a password.
    pub(crate) fn with(mut self, flag: impl Into<String>) -> Registry {
        self.flags.push(flag.into());
        self
    }

    /// The flags themselves, for a flanneld that is started in a way of its own.
    pub(crate) fn flags(&self) -> &[String] {
        &self.flags
    }

    /// Writes the network's configuration with `flanneld network set`, run in `ns`.
    pub(crate) fn configure(&self, ns: &Namespace, json: &str) {
        self.flanneld(ns, &["network", "set", json]);
    }

    /// What a subcommand of flanneld on this registry prints, run in `ns`; it must succeed.
    pub(crate) fn flanneld(&self, ns: &Namespace, arguments: &[&str]) -> String {
        let output = self.try_flanneld(ns, arguments);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "flanneld {arguments:?}: {} {stderr}",
            output.status
        );
        String::from_utf8(output.stdout).unwrap()
    }

    /// How a subcommand of flanneld on this registry ends, run in `ns`.
    pub(crate) fn try_flanneld(&self, ns: &Namespace, arguments: &[&str]) -> Output {
        flanneld(ns).args(arguments).args(&self.flags).output().unwrap()
    }
}

/// A command that runs the binary in `ns`, free of what this process's environment says to daemons.
pub(crate) fn flanneld(ns: &Namespace) -> Command {
    let mut command = ns.command(FLANNELD);
    lab::without_daemon_env(&mut command);
    command
}

/// A flanneld on a host; first described, then [started](Daemon::start), and stopped and started again at will.
/// It is killed when dropped, and shows the end of its log when that is because the test failed.
#[derive(Debug)]
pub(crate) struct Daemon {
    name: String,
    ns: Namespace,
    dir: PathBuf,
    flags: Vec<String>,
    /// System calls that the kernel refuses to it.
    refused: Vec<libc::c_long>,
    /// A program that runs it, with its arguments.
    under: Vec<String>,
    runs: usize,
    process: Option<Process>,
    /// Where `sd_notify` of the run under way arrives.
    notify: Option<UnixDatagram>,
    /// Who listens there in its place, over all runs.
    supervisor: Option<Supervisor>,
    /// Whether there is nobody to be told anything.
    alone: bool,
}

impl Daemon {
    /// A daemon that uses `registry`, not started; the host's interface is chosen by the default route.
    pub(crate) fn new(lab: &Lab, host: &Host, registry: &Registry) -> Daemon {
        Daemon::named(host.name(), lab, host, registry)
    }

    /// As [`Daemon::new`], with another name than the host's: for a second one on the same host.
    pub(crate) fn named(name: &str, lab: &Lab, host: &Host, registry: &Registry) -> Daemon {
        let mut flags = registry.flags.clone();
        flags.push(format!(
            "{SUBNET_FILE}{}",
            lab.dir().join(format!("{name}.env")).display()
        ));
        Daemon::not_started(name, host.ns(), lab.dir(), flags)
    }

    /// Another one on the same host, that takes over from this one when it is started.
    pub(crate) fn heir(&self, name: &str) -> Daemon {
        let mut flags = self.flags.clone();
        flags.retain(|flag| flag != "--handover");
        flags.push("--handover".to_owned());
        Daemon::not_started(name, &self.ns, &self.dir, flags)
    }

    fn not_started(name: &str, ns: &Namespace, dir: &Path, flags: Vec<String>) -> Daemon {
        Daemon {
            name: name.to_owned(),
            ns: ns.clone(),
            dir: dir.to_owned(),
            flags,
            refused: Vec::new(),
            under: Vec::new(),
            runs: 0,
            process: None,
            notify: None,
            supervisor: None,
            alone: false,
        }
    }

    /// Run by a supervisor with a store for so many descriptors.
    pub(crate) fn supervised(mut self, store: usize) -> Daemon {
        let socket = UnixDatagram::bind(self.notify_socket()).unwrap();
        self.supervisor = Some(Supervisor::listen(socket, store));
        // Only the process itself knows its number before it begins.
        self.under(&["sh", "-c", "export LISTEN_PID=$$; exec \"$@\"", "sh"])
    }

    /// Run by nobody, as from a shell: it tells nobody when it is ready.
    pub(crate) fn unsupervised(mut self) -> Daemon {
        self.alone = true;
        self
    }

    /// Who runs it.
    pub(crate) fn supervisor(&self) -> &Supervisor {
        self.supervisor.as_ref().expect("it is supervised")
    }

    fn notify_socket(&self) -> PathBuf {
        self.dir.join(format!("{}.{}.notify", self.name, self.runs))
    }

    /// With one more flag.
    pub(crate) fn with(mut self, flag: impl Into<String>) -> Daemon {
        self.flags.push(flag.into());
        self
    }

    /// With these flags in the place of those that were added.
    pub(crate) fn set_flags(&mut self, flags: &[&str]) {
        let last = self.flags.iter().rposition(|flag| flag.starts_with("--subnet-file="));
        self.flags.truncate(last.map_or(0, |last| last + 1));
        self.flags.extend(flags.iter().map(|&flag| flag.to_owned()));
    }

    /// With a kernel that refuses io_uring to it.
    pub(crate) fn without_io_uring(self) -> Daemon {
        self.refused(libc::SYS_io_uring_setup)
    }

    /// With a kernel that refuses it this system call.
    pub(crate) fn refused(mut self, call: libc::c_long) -> Daemon {
        self.refused.push(call);
        self
    }

    /// Run by a program that becomes it in the end, such as `env` or `setpriv`, with these arguments.
    pub(crate) fn under(mut self, program: &[impl AsRef<str>]) -> Daemon {
        self.under = program.iter().map(|word| word.as_ref().to_owned()).collect();
        self
    }

    /// With its subnet file there.
    pub(crate) fn with_subnet_file(mut self, path: &Path) -> Daemon {
        self.flags.retain(|flag| !flag.starts_with(SUBNET_FILE));
        self.with(format!("{SUBNET_FILE}{}", path.display()))
    }

    /// Starts it, again if it has run before.
    pub(crate) fn start(&mut self) {
        assert!(self.process.is_none(), "{} runs already", self.name);
        self.runs += 1;
        let mut command = match self.under.split_first() {
            Some((program, arguments)) => {
                let mut command = self.ns.command(program);
                command.args(arguments).arg(FLANNELD);
                command
            }
            None => self.ns.command(FLANNELD),
        };
        lab::without_daemon_env(&mut command);
        command.args(&self.flags);
        if let Some(supervisor) = &self.supervisor {
            supervisor.hand_to(&mut command);
            // That of the time when it was described.
            command.env("NOTIFY_SOCKET", self.dir.join(format!("{}.0.notify", self.name)));
        } else if self.alone {
            command.env_remove("NOTIFY_SOCKET");
        } else {
            let socket = self.notify_socket();
            let notify = UnixDatagram::bind(&socket).unwrap();
            // Short, since between two messages it is looked whether the daemon still runs.
            notify.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
            command.env("NOTIFY_SOCKET", socket);
            self.notify = Some(notify);
        }
        for call in &self.refused {
            seccomp::refuse(&mut command, *call);
        }
        let log = self.dir.join(format!("{}.{}.log", self.name, self.runs));
        let process = Process::spawn(&self.name, command, &log).unwrap();
        if let Some(supervisor) = &self.supervisor {
            supervisor.has_started(process.pid());
        }
        self.process = Some(process);
    }

    /// Starts it and waits until it is ready.
    pub(crate) fn start_and_wait(&mut self) -> SubnetEnv {
        self.start();
        self.wait_ready()
    }

    /// Waits until it tells its supervisor `READY=1`; what its subnet file says then.
    pub(crate) fn wait_ready(&mut self) -> SubnetEnv {
        if let Some(supervisor) = self.supervisor.take() {
            supervisor.wait_told(self, "READY=1");
            // Of the next run it shall be told anew.
            supervisor.forget_told();
            self.supervisor = Some(supervisor);
            return self.subnet();
        }
        wait_for(PATIENCE, &format!("{} to be ready", self.name), || {
            self.assert_running();
            let mut message = [0; 512];
            let notify = self.notify.as_ref().expect("start() was called");
            Ok::<_, LabError>(match notify.recv(&mut message) {
                Ok(len) if message[..len].split(|&b| b == b'\n').any(|line| line == b"READY=1") => Some(()),
                _ => None,
            })
        })
        .unwrap();
        self.subnet()
    }

    /// What its subnet file says.
    pub(crate) fn subnet(&self) -> SubnetEnv {
        SubnetEnv::read(&self.subnet_file()).unwrap()
    }

    /// The IPv6 subnet in it, in a dual-stack network.
    pub(crate) fn subnet_v6(&self) -> Option<Ipv6Net> {
        let file = fs::read_to_string(self.subnet_file()).unwrap();
        let subnet = file
            .lines()
            .find_map(|line| line.strip_prefix("FLANNEL_IPV6_SUBNET="))?;
        Some(subnet.parse().unwrap())
    }

    /// Where its subnet file is.
    pub(crate) fn subnet_file(&self) -> PathBuf {
        let mut flags = self.flags.iter();
        flags.find_map(|flag| flag.strip_prefix(SUBNET_FILE)).unwrap().into()
    }

    /// Where it can be asked to hand over.
    pub(crate) fn handover_socket(&self) -> PathBuf {
        self.subnet_file().with_extension("handover")
    }

    /// Where it remembers what it knows.
    pub(crate) fn state_file(&self) -> PathBuf {
        self.subnet_file().with_extension("state")
    }

    /// Waits until it remembers this many peers.
    pub(crate) fn wait_until_remembered(&self, peers: usize) {
        self.wait_until_state(&format!("{peers} peers"), |text| {
            let state: serde_json::Value = serde_json::from_str(text).unwrap_or_default();
            state["Peers"].as_array().is_some_and(|known| known.len() == peers)
        });
    }

    /// Takes the peers out of what it remembers.
    pub(crate) fn forget_peers(&self) {
        let text = fs::read_to_string(self.state_file()).unwrap();
        let mut state: serde_json::Value = serde_json::from_str(&text).unwrap();
        state["Peers"] = serde_json::json!([]);
        fs::write(self.state_file(), state.to_string()).unwrap();
    }

    /// Waits until what it remembers contains `text`.
    pub(crate) fn wait_until_state_has(&self, text: &str) {
        self.wait_until_state(text, |state| state.contains(text));
    }

    fn wait_until_state(&self, wanted: &str, has: impl Fn(&str) -> bool) {
        let what = format!("{} to remember {wanted}", self.name);
        wait_until(PATIENCE, &what, || {
            fs::read_to_string(self.state_file()).is_ok_and(|state| has(&state))
        })
        .unwrap();
    }

    /// What it says of itself.
    pub(crate) fn status(&self) -> Status {
        let socket = self.subnet_file().with_extension("sock");
        let flag = format!("--status-socket={}", socket.display());
        let output = flanneld(&self.ns).args(["status", "--json", &flag]).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}: {stderr}", self.name);
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// How many packets its device's queues and its sockets had no room for since they were made, as on a machine that gives it no
    /// time.
    pub(crate) fn overflowed(&self) -> u64 {
        let engine = self.status().backend.and_then(|backend| backend.engine).unwrap();
        engine.device_overflow.unwrap() + Worker::total(&engine.workers).socket_overflow
    }

    /// The process of the run under way.
    pub(crate) fn process(&mut self) -> &mut Process {
        self.process.as_mut().expect("start() was called")
    }

    /// Ends it with SIGTERM, as its supervisor would.
    pub(crate) fn stop(&mut self) -> ExitStatus {
        self.end_with(Signal::SIGTERM)
    }

    /// Sends `signal` and waits for the daemon to end in its own time.
    pub(crate) fn end_with(&mut self, signal: Signal) -> ExitStatus {
        self.process().signal(signal);
        self.wait_exit()
    }

    /// Waits for it to end by itself.
    pub(crate) fn wait_exit(&mut self) -> ExitStatus {
        self.wait_exit_within(PATIENCE)
    }

    /// As [`Daemon::wait_exit`], for what takes longer by design.
    pub(crate) fn wait_exit_within(&mut self, limit: Duration) -> ExitStatus {
        let status = self.process().wait(limit).unwrap();
        self.remember_log();
        status
    }

    /// Ends it with SIGKILL: it has no chance to put anything in order.
    pub(crate) fn kill9(&mut self) {
        self.process().kill();
        self.remember_log();
    }

    /// As [`Daemon::kill9`], unless it has ended already.
    pub(crate) fn kill9_if_running(&mut self) {
        if self.process.is_some() {
            self.kill9();
        }
    }

    /// What it has logged in the run under way, or else in the last one.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.dir.join(format!("{}.{}.log", self.name, self.runs))).unwrap_or_default()
    }

    /// Waits until a line of the log contains `text`; the line.
    pub(crate) fn wait_for_log(&self, text: &str) -> String {
        let what = format!("{} to log `{text}`", self.name);
        let line = || self.log().lines().find(|line| line.contains(text)).map(str::to_owned);
        wait_for(PATIENCE, &what, || Ok::<_, LabError>(line())).unwrap()
    }

    /// Fails the test when it has ended.
    pub(crate) fn assert_running(&mut self) {
        let exited = self.process().exited();
        assert!(
            exited.is_none(),
            "{} has ended: {}\n{}",
            self.name,
            exited.unwrap(),
            self.log()
        );
    }

    /// Fails the test when it has complained of anything.
    pub(crate) fn assert_content(&self) {
        let log = self.log();
        assert!(!log.contains("WARN") && !log.contains("ERROR"), "{}: {log}", self.name);
    }

    fn remember_log(&mut self) {
        self.process = None;
        self.notify = None;
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!(
                "--- the end of {}'s log\n{}\n---",
                self.name,
                lab::tail(&self.log(), LOG_LINES)
            );
        }
    }
}

/// Hosts with a running daemon and a container each, on the embedded registry or on one that is given.
/// The order of the fields is that in which they go.
pub(crate) struct Overlay {
    pub(crate) daemons: Vec<Daemon>,
    pub(crate) containers: Vec<Container>,
    pub(crate) hosts: Vec<Host>,
    pub(crate) registry: Registry,
    pub(crate) lab: Lab,
}

impl Overlay {
    /// `count` hosts on the embedded registry, with [`CONFIG`]; all daemons are ready.
    pub(crate) fn start(name: &str, count: usize) -> Overlay {
        let lab = new_lab(name);
        let registry = Registry::embedded(&lab);
        Overlay::start_on(lab, registry, CONFIG, count)
    }

    /// `count` hosts in `lab`, with this registry and network configuration.
    pub(crate) fn start_on(lab: Lab, registry: Registry, config: &str, count: usize) -> Overlay {
        let plain = vec![(HostOptions::default(), &[][..]); count];
        Overlay::start_hosts(lab, registry, config, &plain)
    }

    /// Hosts that differ: how each is attached, and more flags for its daemon.
    pub(crate) fn start_hosts(
        mut lab: Lab,
        registry: Registry,
        config: &str,
        wanted: &[(HostOptions, &[&str])],
    ) -> Overlay {
        let mut hosts = Vec::new();
        let mut daemons = Vec::new();
        for (number, (options, flags)) in (1..).zip(wanted) {
            let host = lab.host_with(&format!("h{number}"), options).unwrap();
            daemons.push(
                flags
                    .iter()
                    .fold(Daemon::new(&lab, &host, &registry), |daemon, flag| daemon.with(*flag)),
            );
            hosts.push(host);
        }
        registry.configure(hosts[0].ns(), config);
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

    /// `count` hosts on an etcd of their own in the switch's namespace, with this network configuration.
    pub(crate) fn start_on_etcd(name: &str, config: &str, count: usize) -> (Overlay, EtcdServer) {
        let plain = vec![(HostOptions::default(), &[][..]); count];
        Overlay::start_hosts_on_etcd(name, config, &plain)
    }

    /// As [`Overlay::start_on_etcd`], with hosts that differ, see [`Overlay::start_hosts`].
    pub(crate) fn start_hosts_on_etcd(
        name: &str,
        config: &str,
        wanted: &[(HostOptions, &[&str])],
    ) -> (Overlay, EtcdServer) {
        let lab = new_lab(name);
        let server = EtcdServer::start_with(EtcdOptions::on_switch(&lab));
        let registry = Registry::etcd(&server.url());
        (Overlay::start_hosts(lab, registry, config, wanted), server)
    }

    /// The subnet of host `index`.
    pub(crate) fn subnet(&self, index: usize) -> Ipv4Net {
        self.daemons[index].subnet().subnet.trunc()
    }

    /// Ends all daemons in this way, then starts them again and waits until they are ready.
    pub(crate) fn restart_all(&mut self, end: impl Fn(&mut Daemon)) {
        self.daemons.iter_mut().for_each(end);
        self.daemons.iter_mut().for_each(Daemon::start);
        for daemon in &mut self.daemons {
            daemon.wait_ready();
        }
    }

    /// Fails the test unless each container reaches each other, once the peers had time to learn of one another.
    pub(crate) fn assert_all_reach_all(&self) {
        for (i, from) in self.containers.iter().enumerate() {
            for to in &self.containers[i + 1..] {
                assert_reaches(&from.ns, to.ip);
            }
        }
    }
}

/// All that the kernel says of the `udp` backend's device, but how much it has carried.
pub(crate) fn tunnel_device(ns: &Namespace) -> String {
    let told = [
        "-d -o link show dev flannel0",
        "-o address show dev flannel0",
        "route show dev flannel0",
    ];
    let told = told.map(|command| ns.ip(command).unwrap()).concat();
    let features = output_of(ns, "ethtool", ["-k", "flannel0"]);
    assert!(features.contains("tx-checksum-ip-generic"), "{features}");
    told + &features
}

/// One run of ping with `count` requests.
pub(crate) fn ping(from: &Namespace, to: Ipv4Addr, count: u32) -> Ping {
    Ping::run(from, to.into(), count).unwrap()
}

/// Fails the test unless `to` answers sooner or later.
pub(crate) fn assert_reaches(from: &Namespace, to: Ipv4Addr) {
    let what = format!("{to} to answer a ping from {}", from.name());
    wait_until(PATIENCE, &what, || ping(from, to, 1).received == 1).unwrap();
}

/// Fails the test unless `to` stops answering sooner or later.
pub(crate) fn assert_loses(from: &Namespace, to: Ipv4Addr) {
    let what = format!("{to} to no longer answer a ping from {}", from.name());
    wait_until(PATIENCE, &what, || ping(from, to, 1).received == 0).unwrap();
}

/// Runs `work` in a thread inside the namespace and returns its result: sockets opened there stay there.
pub(crate) fn inside<T: Send>(ns: &Namespace, work: impl FnOnce() -> T + Send) -> T {
    ns.inside(work).unwrap()
}

/// The status code and the body that `GET path` gets from `address` inside the namespace.
pub(crate) fn http_get(ns: &Namespace, address: SocketAddr, path: &str) -> io::Result<(u16, String)> {
    inside(ns, || {
        let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let code = answer.split(' ').nth(1).and_then(|code| code.parse().ok());
        let (_, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
        code.map(|code| (code, body.to_owned()))
            .ok_or_else(|| io::Error::other(answer.clone()))
    })
}

/// Runs a program in the namespace; its standard output, whatever its exit status.
pub(crate) fn output_of(
    ns: &Namespace,
    program: &str,
    arguments: impl IntoIterator<Item = impl AsRef<OsStr>>,
) -> String {
    let output = ns.command(program).args(arguments).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}
