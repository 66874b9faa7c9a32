//! What is to be measured, from the command line.

use super::{agent::Launcher, metric::Test, peer::Peer, wire::Wire};
use clap::{Parser, ValueEnum};
use serde::Serialize;
use std::{path::PathBuf, time::Duration};

/// Rounds of a full run: a median of five is not moved by two disturbed ones.
const ROUNDS: u32 = 5;

/// Measures the overlay between two network namespaces, beside the kernel's vxlan and plain routing.
#[derive(Clone, Debug, Parser)]
#[command(bin_name = "scripts/bench", max_term_width = 100)]
pub(crate) struct Options {
    /// How often everything is measured; peers take turns within a round [default: 5; with --quick 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: Option<u32>,

    /// Only these tests
    #[arg(long, value_name = "TEST,...", value_delimiter = ',', value_enum)]
    only: Vec<Test>,

    /// What to compare: bare (plain routing), vxlan (the kernel's), flanneld
    #[arg(
        long,
        value_name = "PEER,...",
        value_delimiter = ',',
        value_parser = known_peer,
        default_value = "bare,vxlan,flanneld"
    )]
    peers: Vec<Peer>,

    /// One more flanneld, with more flags, under a name of its own; repeatable
    #[arg(long, value_name = "NAME=FLAGS")]
    variant: Vec<Peer>,

    /// What may cross between the hosts in one piece
    #[arg(
        long,
        value_name = "WIRE,...",
        value_delimiter = ',',
        value_enum,
        default_value = "offload,wire,wire-gro"
    )]
    wires: Vec<Wire>,

    /// Give each host one processor: the measure of cost per packet
    #[arg(long)]
    pin: bool,

    /// Shorter tests: a first impression
    #[arg(long)]
    quick: bool,

    /// Write NAME.json, NAME.md and NAME.svg into this directory; the last one given counts
    #[arg(long, value_name = "DIR", overrides_with = "out")]
    out: Option<PathBuf>,

    /// NAME for --out [default: overlay, with --pin overlay-pinned; and -quick behind it with --quick]
    #[arg(long)]
    name: Option<String>,

    /// Cargo passes this to each benchmark
    #[arg(long, hide = true)]
    bench: bool,

    /// What `cargo bench FILTER` passes to each benchmark: those whose name does not contain it are left out
    #[arg(hide = true)]
    filter: Option<String>,
}

fn known_peer(name: &str) -> Result<Peer, String> {
    Peer::known(name).ok_or_else(|| "use bare, vxlan or flanneld; --variant adds others".to_owned())
}

/// What to do.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// How often.
    pub(crate) rounds: u32,
    /// Which tests, in this order.
    pub(crate) tests: Vec<Test>,
    /// What is compared.
    pub(crate) peers: Vec<Peer>,
    /// On which wires.
    pub(crate) wires: Vec<Wire>,
    /// Each host on a processor of its own.
    pub(crate) pin: bool,
    /// How long each test takes.
    pub(crate) durations: Durations,
    /// How a load generator is started.
    pub(crate) launcher: Launcher,
}

/// How long each test takes.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Durations {
    /// Ping-pong on an idle machine.
    pub(crate) ping: Duration,
    /// Each TCP test, in whole seconds as iperf3 has it.
    pub(crate) tcp: u64,
    /// UDP at full speed.
    pub(crate) full_speed: Duration,
    /// One probe of the search for the best UDP rate.
    pub(crate) probe: Duration,
    /// How many of those there may be.
    pub(crate) probes: usize,
    /// Ping-pong beside a TCP stream.
    pub(crate) ping_loaded: Duration,
}

impl Durations {
    /// Five rounds of three peers on three wires in less than 20 minutes: 45 slots of 16 to 24 s.
    const FULL: Durations = Durations {
        ping: Duration::from_millis(1_500),
        tcp: 3,
        full_speed: Duration::from_millis(500),
        probe: Duration::from_millis(300),
        probes: 6,
        ping_loaded: Duration::from_secs(2),
    };

    /// One round in less than three minutes: nine slots of 7 to 12 s.
    const QUICK: Durations = Durations {
        ping: Duration::from_millis(500),
        tcp: 1,
        full_speed: Duration::from_millis(300),
        probe: Duration::from_millis(200),
        probes: 5,
        ping_loaded: Duration::from_millis(1_000),
    };
}

/// Where the results go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Output {
    /// The directory.
    pub(crate) dir: PathBuf,
    /// The files' names without what is behind the dot.
    pub(crate) name: String,
}

impl Options {
    /// Whether `cargo bench FILTER` means other benchmarks only.
    pub(crate) fn is_left_out(&self) -> bool {
        self.filter
            .as_ref()
            .is_some_and(|filter| !"overlay".contains(filter.as_str()))
    }

    /// Where to write files; `None`: nowhere.
    pub(crate) fn output(&self) -> Option<Output> {
        let default = || {
            let pinned = if self.pin { "-pinned" } else { "" };
            let quick = if self.is_quick() { "-quick" } else { "" };
            format!("overlay{pinned}{quick}")
        };
        Some(Output {
            dir: self.out.clone()?,
            name: self.name.clone().unwrap_or_else(default),
        })
    }

    /// What to do, with load generators started by `launcher`.
    ///
    /// # Errors
    /// When two peers have one name.
    pub(crate) fn plan(&self, launcher: Launcher) -> Result<Plan, String> {
        let peers: Vec<Peer> = self.peers.iter().chain(&self.variant).cloned().collect();
        for (index, peer) in peers.iter().enumerate() {
            if peers[..index].iter().any(|other| other.name == peer.name) {
                return Err(format!("two peers are called {}: give each another name", peer.name));
            }
        }
        let is_wanted = |test: &Test| self.only.is_empty() || self.only.contains(test);
        Ok(Plan {
            rounds: self.rounds.unwrap_or(if self.is_quick() { 1 } else { ROUNDS }),
            tests: Test::value_variants().iter().copied().filter(is_wanted).collect(),
            peers,
            wires: self.wires.clone(),
            pin: self.pin,
            durations: if self.is_quick() {
                Durations::QUICK
            } else {
                Durations::FULL
            },
            launcher,
        })
    }

    /// `cargo bench` among all other benchmarks is for a first impression; whoever wants more says so.
    fn is_quick(&self) -> bool {
        self.quick || (self.rounds.is_none() && self.out.is_none())
    }
}

#[cfg(test)]
#[allow(unused, reason = "cargo builds benchmarks with cfg(test), but without tests")]
mod tests {
    use super::*;

    fn options(arguments: &[&str]) -> Options {
        Options::try_parse_from([&["overlay"], arguments].concat()).unwrap()
    }

    fn plan(arguments: &[&str]) -> Result<Plan, String> {
        options(arguments).plan(Launcher {
            program: PathBuf::new(),
            arguments: Vec::new(),
        })
    }

    #[test]
    fn full_run_is_everything_five_times() {
        let plan = plan(&["--out", "docs/bench", "--bench"]).unwrap();
        let names: Vec<_> = plan.peers.iter().map(|peer| peer.name.as_str()).collect();
        assert_eq!(names, ["bare", "vxlan", "flanneld"]);
        assert_eq!((plan.rounds, plan.wires.len(), plan.tests.len()), (5, 3, 9));
        assert_eq!(plan.durations.tcp, Durations::FULL.tcp);
    }

    #[test]
    fn run_without_a_wish_is_quick() {
        for arguments in [&["--bench"][..], &["--quick", "--out", "docs/bench"]] {
            let plan = plan(arguments).unwrap();
            assert_eq!(
                (plan.rounds, plan.durations.tcp),
                (1, Durations::QUICK.tcp),
                "{arguments:?}"
            );
        }
    }

    #[test]
    fn tests_keep_their_order() {
        let plan = plan(&["--only", "tcp1,ping", "--wires=wire-gro", "--rounds=2"]).unwrap();
        assert_eq!(plan.tests, [Test::Ping, Test::Tcp1]);
        assert_eq!((plan.wires, plan.rounds), (vec![Wire::Gro], 2));
    }

    #[test]
    fn variants_are_added_under_names_of_their_own() {
        let plan_of = |second| plan(&["--peers=vxlan", "--variant", "plain=--tun plain", "--variant", second]);
        let names: Vec<_> = plan_of("alone=--workers=1")
            .unwrap()
            .peers
            .into_iter()
            .map(|peer| peer.name)
            .collect();
        assert_eq!(names, ["vxlan", "plain", "alone"]);
        assert!(plan_of("plain=--workers=1").unwrap_err().contains("two peers"));
    }

    #[test]
    fn files_of_different_runs_have_different_names() {
        let name = |arguments: &[&str]| options(&[arguments, &["--out", "x"]].concat()).output().unwrap().name;
        assert_eq!(name(&[]), "overlay");
        assert_eq!(name(&["--pin"]), "overlay-pinned");
        assert_eq!(name(&["--quick"]), "overlay-quick");
        assert_eq!(name(&["--pin", "--name", "io"]), "io");
        assert_eq!(options(&["--quick"]).output(), None);
        let twice = options(&["--out", "docs/bench", "--out=/elsewhere"]).output().unwrap();
        assert_eq!(
            twice.dir,
            PathBuf::from("/elsewhere"),
            "scripts/bench puts its own before that of its user"
        );
    }

    #[test]
    fn filter_of_cargo_bench_is_heeded() {
        assert!(!options(&["--bench"]).is_left_out());
        assert!(!options(&["over", "--bench"]).is_left_out());
        assert!(options(&["checksum", "--bench"]).is_left_out());
    }

    #[test]
    fn unknown_peers_tests_and_wires_are_refused() {
        for arguments in [
            ["--peers", "wireguard"],
            ["--only", "sctp"],
            ["--wires", "copper"],
            ["--rounds", "0"],
        ] {
            assert!(
                Options::try_parse_from([&["overlay"][..], &arguments].concat()).is_err(),
                "{arguments:?}"
            );
        }
    }
}
