//! `flanneld demo`: a whole overlay on this machine, seen at work.
//!
//! Each host is a network namespace with a daemon process of its own, run from this very binary; each subnet has one
//! container. Nothing outside the lab is touched, and nothing of it stays, also after Ctrl-C; see [`crate::lab`].

mod error;
mod overlay;
mod progress;
mod report;

pub use error::DemoError;
pub use overlay::DemoBackend;

use super::DemoArgs;
use crate::lab::{self, Container, Host, HostOptions, Interrupt, Lab, LabError, Ping, Process, Segment, SubnetEnv};
use nix::sys::signal::Signal;
use progress::Step;
use report::PairResult;
use std::{
    collections::VecDeque,
    env, fs,
    io::{self, Write},
    net::Ipv4Addr,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

/// How long etcd may take to come up, on a slow disk.
const ETCD_LIMIT: Duration = Duration::from_secs(30);

/// How long a program may take to end after SIGTERM: flanneld removes its device.
const GRACE: Duration = Duration::from_secs(2);

/// How long a subcommand may take; it gives up on a registry that does not answer sooner by itself.
const SUBCOMMAND_LIMIT: Duration = Duration::from_secs(15);

/// How long the daemons may take from their start to the subnet file.
const READY_LIMIT: Duration = Duration::from_secs(30);

/// How long after the daemons are ready a pair may stay silent: the last one's lease must reach all others.
const CONVERGENCE_LIMIT: Duration = Duration::from_secs(10);

/// Echo requests for each pair, a tenth of a second apart.
const PINGS: u32 = 5;

/// How many pairs are pinged at once: few enough not to spoil one another's times.
const PINGS_AT_ONCE: usize = 8;

/// How long TCP throughput is measured.
const THROUGHPUT_SECONDS: u32 = 3;

/// How often the pings are looked after.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// How much of a daemon's log is shown when something went wrong.
const LOG_LINES: usize = 15;

/// The programs the demo runs, and the Debian packages that have them.
const PROGRAMS: [(&str, &str); 6] = [
    ("ip", "iproute2"),
    ("ping", "iputils-ping"),
    ("iperf3", "iperf3"),
    ("nsenter", "util-linux"),
    ("setpriv", "util-linux"),
    ("setsid", "util-linux"),
];

/// As [`PROGRAMS`], for a real etcd.
const ETCD_PROGRAM: (&str, &str) = ("etcd", "etcd-server");

/// Runs the demo; the result goes to standard output, everything else to standard error. To be called from the main
/// thread, since what it starts dies with the calling thread.
///
/// # Errors
/// See [`DemoError`]; the lab is removed in any case but one: with `--keep` it stays, for a look at what failed.
pub fn run(args: &DemoArgs) -> Result<(), DemoError> {
    if fs::metadata("/proc/self")?.uid() != 0 {
        return Err(DemoError::NotRoot);
    }
    check_programs(args.etcd)?;
    if args.down {
        return take_down(&mut io::stdout().lock());
    }
    let interrupt = Interrupt::install().map_err(DemoError::Signals)?;
    let stale = Lab::sweep_stale()?;
    if !stale.is_empty() {
        Step::start("left by a run that was killed").done(&format!("removed {}", stale.join(", ")));
    }
    let mut demo = Demo::new(args.clone(), interrupt.clone())?;
    let played = demo.play(&mut io::stdout().lock());
    // A wait that a signal cut short may have failed in some other way.
    if let Some(signal) = interrupt.signal() {
        demo.remove()?;
        return Err(DemoError::Interrupted(signal));
    }
    let ended = if args.keep && demo.has_daemons() {
        demo.keep(&mut io::stdout().lock())
    } else {
        demo.remove()
    };
    played.and(ended)
}

/// Removes kept labs, and what killed runs have left: whoever asks for this wants a clean machine.
fn take_down(out: &mut impl Write) -> Result<(), DemoError> {
    let mut removed = Lab::remove_kept()?;
    removed.extend(Lab::sweep_stale()?);
    if removed.is_empty() {
        writeln!(out, "There is no lab that an earlier `flanneld demo` has left.")?;
    }
    for id in removed {
        writeln!(out, "Removed {id}.")?;
    }
    Ok(())
}

fn check_programs(etcd: bool) -> Result<(), DemoError> {
    let wanted = PROGRAMS.into_iter().chain(etcd.then_some(ETCD_PROGRAM));
    let missing: Vec<_> = wanted.filter(|(program, _)| !lab::has_program(program)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let mut packages: Vec<&str> = missing.iter().map(|&(_, package)| package).collect();
    packages.dedup();
    let programs: Vec<String> = missing.iter().map(|(program, _)| format!("`{program}`")).collect();
    Err(DemoError::Missing {
        programs: programs.join(", "),
        packages: packages.join(" "),
    })
}

/// One host of the demo.
struct Node {
    host: Host,
    daemon: Option<Process>,
    subnet_file: PathBuf,
}

/// A running demo. The order of its fields is that in which they go: programs before the lab that they are in.
struct Demo {
    args: DemoArgs,
    interrupt: Interrupt,
    flanneld: PathBuf,
    /// The flags that lead each flanneld to the demo's registry.
    registry: Vec<String>,
    etcd: Option<Process>,
    nodes: Vec<Node>,
    containers: Vec<Container>,
    lab: Lab,
}

impl Demo {
    fn new(args: DemoArgs, interrupt: Interrupt) -> Result<Demo, DemoError> {
        let flanneld = env::current_exe().map_err(DemoError::OwnPath)?;
        let lab = Lab::new("demo")?;
        Ok(Demo {
            args,
            interrupt,
            flanneld,
            registry: Vec::new(),
            etcd: None,
            nodes: Vec::new(),
            containers: Vec::new(),
            lab,
        })
    }

    fn play(&mut self, out: &mut impl Write) -> Result<(), DemoError> {
        self.make_hosts()?;
        self.start_registry()?;
        self.start_daemons()?;
        self.add_containers()?;
        let mut pairs = self.ping_all()?;
        self.find_paths(&mut pairs);
        writeln!(out, "\n{}\n", report::ping_table(&pairs))?;
        let failed = pairs.iter().filter(|pair| pair.failed()).count();
        if failed == 0 {
            self.measure_throughput(out)?;
        }
        writeln!(out, "Leases:\n{}", self.leases()?.trim_end())?;
        if failed > 0 {
            for node in &self.nodes {
                show_log(node.daemon.as_ref());
            }
            return Err(DemoError::Unreachable {
                failed,
                pairs: pairs.len(),
            });
        }
        Ok(())
    }

    /// Whether there is something to look at.
    fn has_daemons(&self) -> bool {
        self.nodes.iter().any(|node| node.daemon.is_some())
    }

    fn check_interrupt(&self) -> Result<(), DemoError> {
        self.interrupt
            .signal()
            .map_or(Ok(()), |signal| Err(DemoError::Interrupted(signal)))
    }

    fn make_hosts(&mut self) -> Result<(), DemoError> {
        let count = self.args.hosts;
        let segment = |number| self.args.backend.segment(number, count);
        let on_a_router = segment(count) == Segment::Second;
        let step = Step::start(format!(
            "{count} hosts on {}",
            if on_a_router {
                "two links with a router between"
            } else {
                "a switch"
            }
        ));
        for number in 1..=count {
            self.check_interrupt()?;
            let options = HostOptions {
                segment: segment(number),
                ..HostOptions::default()
            };
            let host = self.lab.host_with(&format!("h{number}"), &options)?;
            let subnet_file = self.lab.dir().join(format!("h{number}.env"));
            self.nodes.push(Node {
                host,
                daemon: None,
                subnet_file,
            });
        }
        step.done(&format!("network namespaces {}-h1 to -h{count}", self.lab.id()));
        Ok(())
    }

    fn start_registry(&mut self) -> Result<(), DemoError> {
        let step = Step::start("registry");
        let kind = if self.args.etcd {
            step.tell("waiting for etcd");
            let url = self.start_etcd()?;
            self.registry = vec![format!("--etcd-endpoints={url}")];
            format!("etcd at {url}")
        } else {
            let dir = self.lab.dir().join("registry");
            self.registry = vec![format!("--registry-dir={}", dir.display())];
            format!("embedded, in {}", dir.display())
        };
        let configuration = self.args.backend.configuration();
        self.configure(&configuration)?;
        step.done(&format!("{kind}; the configuration is {configuration}"));
        Ok(())
    }

    /// Starts etcd on a host of its own; its client URL.
    fn start_etcd(&mut self) -> Result<String, DemoError> {
        let host = self.lab.host("etcd")?;
        let url = format!("http://{}:2379", host.ip());
        let mut etcd = self.command(&host, Path::new("etcd"));
        etcd.arg("--data-dir").arg(self.lab.dir().join("etcd"));
        etcd.args(["--listen-client-urls", &url, "--advertise-client-urls", &url]);
        self.etcd = Some(Process::spawn("etcd", etcd, &self.lab.dir().join("etcd.log"))?);
        Ok(url)
    }

    /// Writes the network's configuration, again and again until etcd is up.
    fn configure(&mut self, configuration: &str) -> Result<(), DemoError> {
        let start = Instant::now();
        loop {
            self.check_interrupt()?;
            if let Some(etcd) = &mut self.etcd
                && let Some(status) = etcd.exited()
            {
                show_log(Some(etcd));
                return Err(DemoError::Ended {
                    name: etcd.name().to_owned(),
                    status,
                });
            }
            match self.flanneld(&["network", "set", configuration]) {
                Ok(_) => return Ok(()),
                Err(DemoError::Lab(_)) if self.etcd.is_some() && start.elapsed() < ETCD_LIMIT => {
                    std::thread::sleep(LOOK_AGAIN);
                }
                Err(error) => {
                    if matches!(error, DemoError::Lab(_)) {
                        show_log(self.etcd.as_ref());
                    }
                    return Err(error);
                }
            }
        }
    }

    /// Runs a subcommand of flanneld on the first host.
    fn flanneld(&self, arguments: &[&str]) -> Result<String, DemoError> {
        let mut command = self.nodes[0].host.ns().command(&self.flanneld);
        lab::without_daemon_env(&mut command)
            .args(arguments)
            .args(&self.registry);
        lab::run_within(&mut command, SUBCOMMAND_LIMIT, || self.check_interrupt())
    }

    /// A program that runs for as long as the lab is up.
    fn command(&self, host: &Host, program: &Path) -> Command {
        if self.args.keep {
            host.ns().detached_command(program)
        } else {
            host.ns().command(program)
        }
    }

    fn start_daemons(&mut self) -> Result<(), DemoError> {
        let step = Step::start("one flanneld on each host");
        for i in 0..self.nodes.len() {
            let Node { host, subnet_file, .. } = &self.nodes[i];
            let mut command = self.command(host, &self.flanneld);
            lab::without_daemon_env(&mut command).args(&self.registry);
            command.args(["--iface=eth0", "--healthz-port=0", "--iptables-forward-rules=false"]);
            command.arg(format!("--subnet-file={}", subnet_file.display()));
            let log = self.lab.dir().join(format!("{}.log", host.name()));
            let daemon = Process::spawn(&format!("flanneld on {}", host.name()), command, &log)?;
            self.nodes[i].daemon = Some(daemon);
        }
        let start = Instant::now();
        let mut ready = 0;
        // The first that is not ready is looked at again and again; one that has ended is noticed wherever it is.
        while ready < self.nodes.len() {
            self.check_interrupt()?;
            if let Some(ended) = self.ended_daemon() {
                return Err(ended);
            }
            if self.nodes[ready].subnet_file.exists() {
                ready += 1;
                step.tell(&format!("{ready} of {} ready", self.nodes.len()));
            } else if start.elapsed() > READY_LIMIT {
                let daemon = self.nodes[ready].daemon.as_ref();
                show_log(daemon);
                let name = daemon.map_or_else(String::new, |daemon| daemon.name().to_owned());
                return Err(DemoError::NotReady {
                    name,
                    limit: READY_LIMIT,
                });
            } else {
                std::thread::sleep(LOOK_AGAIN);
            }
        }
        step.done("all ready");
        Ok(())
    }

    /// The daemon that has ended though nobody asked it to, if there is one; its log is shown.
    fn ended_daemon(&mut self) -> Option<DemoError> {
        self.nodes
            .iter_mut()
            .filter_map(|node| node.daemon.as_mut())
            .find_map(|daemon| {
                let status = daemon.exited()?;
                show_log(Some(daemon));
                Some(DemoError::Ended {
                    name: daemon.name().to_owned(),
                    status,
                })
            })
    }

    fn add_containers(&mut self) -> Result<(), DemoError> {
        let step = Step::start("a container in each subnet");
        for (number, node) in (1..).zip(&mut self.nodes) {
            let env = SubnetEnv::read(&node.subnet_file)?;
            self.containers
                .push(node.host.add_container(&format!("c{number}"), env)?);
            if let Some(signal) = self.interrupt.signal() {
                return Err(DemoError::Interrupted(signal));
            }
        }
        step.done(&format!("{}-c1 to -c{}", self.lab.id(), self.containers.len()));
        Ok(())
    }

    /// Pings between all containers, one way for each pair: an answer proves both.
    fn ping_all(&mut self) -> Result<Vec<PairResult>, DemoError> {
        let step = Step::start("ping");
        let mut pairs = Vec::new();
        for (i, from) in self.containers.iter().enumerate() {
            for to in &self.containers[i + 1..] {
                pairs.push((from.clone(), to.clone()));
            }
        }
        let mut results: Vec<PairResult> = pairs
            .iter()
            .map(|(from, to)| PairResult {
                from: (from.name.clone(), from.ip),
                to: (to.name.clone(), to.ip),
                path: None,
                ping: None,
            })
            .collect();
        let start = Instant::now();
        let mut waiting: VecDeque<usize> = (0..pairs.len()).collect();
        let mut running: Vec<(usize, Process)> = Vec::new();
        let mut over = 0;
        while over < pairs.len() {
            self.check_interrupt()?;
            if let Some(ended) = self.ended_daemon() {
                return Err(ended);
            }
            while running.len() < PINGS_AT_ONCE
                && let Some(i) = waiting.pop_front()
            {
                running.push((i, self.start_ping(&pairs[i].0, pairs[i].1.ip)?));
            }
            for (i, process) in running.extract_if(.., |(_, process)| process.exited().is_some()) {
                results[i].ping = Ping::parse(&process.log()).ok();
                if results[i].failed() && start.elapsed() < CONVERGENCE_LIMIT {
                    waiting.push_back(i);
                } else {
                    over += 1;
                    step.tell(&format!("{over} of {} pairs", pairs.len()));
                }
            }
            std::thread::sleep(LOOK_AGAIN);
        }
        let answered = results.iter().filter(|pair| !pair.failed()).count();
        step.done(&format!("{answered} of {} pairs answer", pairs.len()));
        Ok(results)
    }

    /// Asks each sender's host for its path to the other container; afterwards, when all peers are known.
    fn find_paths(&self, pairs: &mut [PairResult]) {
        for pair in pairs {
            let sender = self
                .containers
                .iter()
                .position(|container| container.name == pair.from.0);
            // A pair without a path is shown as such: whether it answers is what counts.
            pair.path = sender.and_then(|i| overlay::path(&self.nodes[i].host, pair.to.1).ok());
        }
    }

    fn start_ping(&self, from: &Container, to: Ipv4Addr) -> Result<Process, LabError> {
        let log = self.lab.dir().join(format!("ping-{}-{to}.log", from.name));
        // Only the last try counts, and a log is appended to; that there is none yet is no failure.
        let _ = fs::remove_file(&log);
        Process::spawn("ping", lab::ping_command(&from.ns, to.into(), PINGS), &log)
    }

    fn measure_throughput(&self, out: &mut impl Write) -> Result<(), DemoError> {
        let [from, to, ..] = &self.containers[..] else {
            return Ok(());
        };
        let step = Step::start(format!("TCP from {} to {}", from.name, to.name));
        let mut second = 0;
        let total = lab::throughput(
            (&from.ns, &to.ns),
            to.ip.into(),
            THROUGHPUT_SECONDS,
            self.lab.dir(),
            |mbits| {
                if let Some(mbits) = mbits {
                    second += 1;
                    step.tell(&format!("second {second}: {}", report::rate(mbits)));
                }
                self.check_interrupt()
            },
        )?;
        let rate = report::rate(total.mbits);
        step.done(&rate);
        writeln!(
            out,
            "TCP throughput {} to {}: {rate} over {THROUGHPUT_SECONDS} s (iperf3)\n",
            from.name, to.name
        )?;
        Ok(())
    }

    fn leases(&self) -> Result<String, DemoError> {
        self.flanneld(&["leases", "list"])
    }

    fn remove(mut self) -> Result<(), DemoError> {
        let step = Step::start("taking everything down");
        // The lab would find those that are in its namespaces, and one that was just started is on its way there. All are told at
        // once, so that they need not be waited for one after the other.
        self.programs().for_each(|program| program.signal(Signal::SIGTERM));
        for program in self.programs() {
            if program.wait(GRACE).is_err() {
                program.kill();
            }
        }
        let id = self.lab.id().to_owned();
        self.lab.remove()?;
        step.done(&format!("nothing is left of {id}"));
        Ok(())
    }

    /// The daemons, and etcd.
    fn programs(&mut self) -> impl Iterator<Item = &mut Process> {
        let daemons = self.nodes.iter_mut().filter_map(|node| node.daemon.as_mut());
        daemons.chain(&mut self.etcd)
    }

    /// Leaves the lab up and says how to enter it.
    fn keep(mut self, out: &mut impl Write) -> Result<(), DemoError> {
        let (id, dir) = (self.lab.id().to_owned(), self.lab.dir().to_owned());
        let flanneld = self.flanneld.display();
        let across = match &self.containers[..] {
            [c1, c2, ..] => format!("\n  in a container   ip netns exec {} ping {}", c1.ns.name(), c2.ip),
            _ => String::new(),
        };
        writeln!(
            out,
            "
The lab stays up; as root:
  on a host        ip netns exec {id}-h1 sh{across}
  leases           ip netns exec {id}-h1 {flanneld} leases list {registry}
  logs             {dir}/h1.log and so on
  subnet files     {dir}/h1.env and so on
  remove it        {flanneld} demo --down",
            registry = self.registry.join(" "),
            dir = dir.display(),
        )?;
        self.programs().for_each(Process::detach);
        Ok(self.lab.keep()?)
    }
}

/// Shows the end of a program's log on standard error.
fn show_log(process: Option<&Process>) {
    let Some(process) = process else { return };
    let path = process.log_path().display();
    let end = lab::tail(&process.log(), LOG_LINES);
    let end = if end.is_empty() { "(empty)" } else { &end };
    // As with the progress: nobody reading is no reason to stop.
    let _ = writeln!(io::stderr(), "\n--- {}: the end of {path}\n{end}\n---", process.name());
}
