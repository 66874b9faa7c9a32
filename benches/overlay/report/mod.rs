//! What the samples come to, as a table for people, a fragment for the README, a chart and JSON.

mod chart;
mod table;

pub(crate) use chart::chart;
pub(crate) use table::{markdown, text};

use super::{
    error::BenchError,
    machine::Machine,
    measure::Sample,
    metric::Metric,
    peer::{Peer, REFERENCE},
    plan::{Durations, Output, Plan},
    statistics::{Summary, ratio},
    wire::Wire,
};
use serde::Serialize;
use std::{
    collections::BTreeMap,
    env, fs, io,
    os::unix::fs::chown,
    path::{Path, PathBuf},
};

/// A slot in which others took more of the processors than this is named as noisy: ratios of a few percent say nothing then.
const NOISY: f64 = 0.05;

/// Everything that a run has found out.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Results {
    /// Where and when.
    pub(crate) machine: Machine,
    /// The arguments of the benchmark.
    pub(crate) arguments: Vec<String>,
    /// How often everything was measured.
    pub(crate) rounds: u32,
    /// Each host had a processor of its own.
    pub(crate) pinned: bool,
    /// How long each test took.
    pub(crate) durations: Durations,
    /// What was compared.
    pub(crate) peers: Vec<Peer>,
    /// On which wires.
    pub(crate) wires: Vec<Wire>,
    /// Each slot.
    pub(crate) samples: Vec<Sample>,
}

/// A metric of a peer on a wire, over all rounds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Figure {
    /// The values themselves.
    pub(crate) value: Summary,
    /// Their ratios to [`REFERENCE`]; `None` for itself, without it, and where a ratio says nothing.
    pub(crate) ratio: Option<Summary>,
}

/// How disturbed the run was.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Noise {
    /// Processor time that others took, as a share of all, over the slots; each slot by its worst test.
    pub(crate) share: Summary,
    /// Slots above [`NOISY`].
    pub(crate) noisy: usize,
}

/// The file's layout: the summary first, for whoever looks at its beginning.
#[derive(Serialize)]
struct Document<'a> {
    summary: BTreeMap<Wire, BTreeMap<&'a str, BTreeMap<Metric, Figure>>>,
    noise: Option<Noise>,
    #[serde(flatten)]
    results: &'a Results,
}

impl Results {
    /// Nothing yet.
    pub(crate) fn new(plan: &Plan, machine: Machine, arguments: Vec<String>) -> Results {
        Results {
            machine,
            arguments,
            rounds: plan.rounds,
            pinned: plan.pin,
            durations: plan.durations,
            peers: plan.peers.clone(),
            wires: plan.wires.clone(),
            samples: Vec::new(),
        }
    }

    /// What the rounds came to; `None` when no round has a value.
    pub(crate) fn figure(&self, wire: Wire, peer: &str, metric: Metric) -> Option<Figure> {
        let values = self.values(wire, peer, metric);
        let is_compared = peer != REFERENCE && metric.has_ratio();
        Some(Figure {
            value: Summary::of(values.values().copied())?,
            ratio: is_compared
                .then(|| ratio(&values, &self.values(wire, REFERENCE, metric)))
                .flatten(),
        })
    }

    /// By round.
    fn values(&self, wire: Wire, peer: &str, metric: Metric) -> BTreeMap<u32, f64> {
        let samples = self
            .samples
            .iter()
            .filter(|sample| sample.wire == wire && sample.peer == peer);
        samples
            .filter_map(|sample| Some((sample.round, *sample.values.get(&metric)?)))
            .collect()
    }

    /// How disturbed the run was; `None` when nothing was measured.
    pub(crate) fn noise(&self) -> Option<Noise> {
        let shares = || {
            self.samples
                .iter()
                .filter(|sample| !sample.noise.is_empty())
                .map(Sample::noise)
        };
        Some(Noise {
            share: Summary::of(shares())?,
            noisy: shares().filter(|share| *share > NOISY).count(),
        })
    }

    /// What the daemons of a peer logged of themselves, each line once.
    fn said(&self, peer: &str) -> Vec<&str> {
        let samples = self.samples.iter().filter(|sample| sample.peer == peer);
        let mut lines: Vec<&str> = Vec::new();
        for line in samples.flat_map(|sample| &sample.said) {
            if !lines.contains(&line.as_str()) {
                lines.push(line);
            }
        }
        lines
    }

    /// What went wrong, a line each.
    pub(crate) fn errors(&self) -> impl Iterator<Item = String> {
        self.samples.iter().flat_map(|sample| {
            let slot = format!("round {}, {}, {}", sample.round, sample.wire.name(), sample.peer);
            sample.errors.iter().map(move |error| format!("{slot}: {error}"))
        })
    }

    /// All of it, with what it comes to.
    fn json(&self) -> String {
        let of_peer = |wire, peer: &str| {
            let figures = Metric::ALL.into_iter();
            figures
                .filter_map(|metric| Some((metric, self.figure(wire, peer, metric)?)))
                .collect()
        };
        let of_wire = |wire| {
            self.peers
                .iter()
                .map(|peer| (peer.name.as_str(), of_peer(wire, &peer.name)))
                .collect()
        };
        let document = Document {
            summary: self.wires.iter().map(|wire| (*wire, of_wire(*wire))).collect(),
            noise: self.noise(),
            results: self,
        };
        // Only maps with keys that are not text cannot be written, and there is none.
        serde_json::to_string_pretty(&document).unwrap_or_default() + "\n"
    }
}

/// A ratio with as many decimals as it deserves.
fn times(ratio: f64) -> String {
    let decimals = match ratio {
        10.0.. => 0,
        3.0.. => 1,
        _ => 2,
    };
    format!("{ratio:.decimals$}")
}

/// Writes the files; their paths.
pub(crate) fn write(results: &Results, output: &Output) -> Result<Vec<PathBuf>, BenchError> {
    let failed = |action, path: &PathBuf| {
        let path = path.clone();
        move |source| BenchError::File { action, path, source }
    };
    if !output.dir.exists() {
        fs::create_dir_all(&output.dir).map_err(failed("make", &output.dir))?;
        give_to_caller(&output.dir).map_err(failed("change the owner of", &output.dir))?;
    }
    let contents = [
        ("json", Some(results.json())),
        ("md", Some(markdown(results))),
        ("svg", chart(results)),
    ];
    let mut written = Vec::new();
    for (extension, content) in contents {
        let path = output.dir.join(format!("{}.{extension}", output.name));
        if let Some(content) = content {
            fs::write(&path, content).map_err(failed("write", &path))?;
            give_to_caller(&path).map_err(failed("change the owner of", &path))?;
            written.push(path);
        }
    }
    Ok(written)
}

/// What root writes is the caller's, who ran this through sudo.
fn give_to_caller(path: &Path) -> io::Result<()> {
    let id = |name| env::var(name).ok()?.parse().ok();
    match (id("SUDO_UID"), id("SUDO_GID")) {
        (Some(user), Some(group)) => chown(path, Some(user), Some(group)),
        _ => Ok(()),
    }
}

#[cfg(test)]
#[allow(unused, reason = "cargo builds benchmarks with cfg(test), but without tests")]
mod example {
    use super::super::metric::Test;
    use super::*;
    use std::time::Duration;

    /// Three rounds on two wires; flanneld has 1.4, 1.5 and 1.6 times the throughput of vxlan.
    pub(super) fn results() -> Results {
        let wires = vec![Wire::Offload, Wire::Gro];
        let peers: Vec<_> = ["bare", "vxlan", "flanneld"]
            .map(|name| Peer::known(name).unwrap())
            .to_vec();
        let mut samples = Vec::new();
        for round in 1..=3 {
            for wire in &wires {
                for peer in &peers {
                    samples.push(sample(round, *wire, &peer.name));
                }
            }
        }
        // One disturbed slot.
        samples[4].noise.insert(Test::Tcp1, 0.3);
        Results {
            machine: Machine {
                processor: "Example CPU".to_owned(),
                processors: 2,
                kernel: "6.18.0".to_owned(),
                date: "2026-01-02".to_owned(),
                commit: "abc".to_owned(),
                congestion_control: "cubic".to_owned(),
                iperf3: "iperf 3.12".to_owned(),
            },
            arguments: vec!["--rounds".to_owned(), "3".to_owned()],
            rounds: 3,
            pinned: false,
            durations: Durations {
                ping: Duration::from_secs(1),
                tcp: 1,
                full_speed: Duration::from_secs(1),
                probe: Duration::from_secs(1),
                probes: 1,
                ping_loaded: Duration::from_secs(1),
            },
            peers,
            wires,
            samples,
        }
    }

    fn sample(round: u32, wire: Wire, peer: &str) -> Sample {
        let values = match peer {
            "bare" => vec![(Metric::Tcp1, 20.0), (Metric::PingP50, 40.0)],
            "vxlan" => vec![(Metric::Tcp1, 10.0), (Metric::PingP50, 50.0)],
            _ => {
                let tcp = 13.0 + f64::from(round);
                vec![(Metric::Tcp1, tcp), (Metric::PingP50, 60.0), (Metric::Memory, 12.5)]
            }
        };
        Sample {
            round,
            wire,
            peer: peer.to_owned(),
            values: values.into_iter().collect(),
            offers: BTreeMap::new(),
            noise: BTreeMap::from([(Test::Ping, 0.0), (Test::Tcp1, 0.01)]),
            load: 0.5,
            seconds: 1.0,
            said: if peer == "flanneld" {
                vec!["flannel0 is up: fast".to_owned()]
            } else {
                Vec::new()
            },
            errors: Vec::new(),
        }
    }

    #[test]
    fn document_holds_summary_and_samples() {
        let document: serde_json::Value = serde_json::from_str(&results().json()).unwrap();
        let tcp = &document["summary"]["wire-gro"]["flanneld"]["tcp1"];
        assert_eq!(tcp["value"]["median"], 15.0);
        assert_eq!(tcp["ratio"]["max"], 1.6);
        assert!(document["summary"]["offload"]["vxlan"]["tcp1"]["ratio"].is_null());
        assert_eq!(document["samples"].as_array().unwrap().len(), 18);
        assert_eq!(document["samples"][0]["values"]["ping-p50"], 40.0);
        assert_eq!(document["machine"]["kernel"], "6.18.0");
        assert_eq!(document["noise"]["noisy"], 1);
    }

    #[test]
    fn ratios_lose_decimals_as_they_grow() {
        assert_eq!([0.054, 1.5, 4.26, 159.34].map(times), ["0.05", "1.50", "4.3", "159"]);
    }
}
