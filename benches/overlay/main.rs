//! The overlay as a whole, between two network namespaces, beside the kernel's vxlan and plain routing.
//!
//! `scripts/bench` runs all of it and writes the figures down; `cargo bench --bench overlay` gives a first impression.
//! Needs root, and says so when it is skipped.
//!
//! A slot is one peer on one wire, set up anew. Within a round all peers take their turn, so that a ratio compares what was
//! measured within a minute or two; the medians of those ratios over all rounds are what counts.
//!
//! | module | what lives there |
//! | --- | --- |
//! | [`plan`] | the command line, and how long everything takes |
//! | [`hosts`], [`wire`], [`peer`] | two hosts, the veth between them, and what carries the packets |
//! | [`agent`] | load generators, a process in each host |
//! | [`measure`] | the tests of a slot |
//! | [`search`], [`statistics`], [`metric`] | the best rate, medians and ratios, what is measured; pure |
//! | [`processors`], [`machine`] | who used the processors; where the figures are from |
//! | [`report`] | tables, chart, JSON |

#![forbid(unsafe_code)]

pub(crate) mod agent;
pub(crate) mod error;
mod hosts;
mod machine;
mod measure;
mod metric;
mod peer;
pub(crate) mod plan;
mod processors;
pub(crate) mod report;
mod search;
mod statistics;
mod wire;

use agent::Launcher;
use clap::{CommandFactory, Parser};
use error::{BenchError, check};
use flannel::lab::{self, Interrupt, Lab};
use machine::Machine;
use metric::Metric;
use plan::{Options, Plan};
use report::Results;
use std::{
    env, fs,
    io::{self, Write},
    os::unix::fs::MetadataExt,
    process::ExitCode,
};

/// What makes this program a load generator instead, as its first two arguments.
const AS_AGENT: [&str; 2] = ["--as", "agent"];

/// The programs the benchmark runs, and the Debian packages that have them.
const PROGRAMS: [(&str, &str); 7] = [
    ("ip", "iproute2"),
    ("bridge", "iproute2"),
    ("ethtool", "ethtool"),
    ("iperf3", "iperf3"),
    ("nsenter", "util-linux"),
    ("setpriv", "util-linux"),
    ("taskset", "util-linux"),
];

fn main() -> ExitCode {
    if env::args().skip(1).take(2).eq(AS_AGENT) {
        return ended(agent::main().map_err(|error| format!("load generator: {error}")));
    }
    let options = Options::parse();
    if options.is_left_out() {
        return ExitCode::SUCCESS;
    }
    if !fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0) {
        say("skipped: needs root, to make network namespaces; scripts/bench runs it through sudo");
        return ExitCode::SUCCESS;
    }
    let launcher = match env::current_exe() {
        Ok(program) => Launcher {
            program,
            arguments: AS_AGENT.map(Into::into).to_vec(),
        },
        Err(error) => return ended(Err(format!("cannot find the path of this very program: {error}"))),
    };
    match options.plan(launcher) {
        Ok(plan) => bench(&options, &plan),
        Err(error) => Options::command()
            .error(clap::error::ErrorKind::ValueValidation, error)
            .exit(),
    }
}

fn ended(result: Result<(), String>) -> ExitCode {
    let Err(error) = result else { return ExitCode::SUCCESS };
    say(&error);
    ExitCode::FAILURE
}

fn bench(options: &Options, plan: &Plan) -> ExitCode {
    let outcome = prepare(plan).and_then(|interrupt| {
        let results = run(plan, env::args().skip(1).collect(), &interrupt, say)?;
        // Nobody reading is no reason not to write the files.
        let _ = write!(io::stdout(), "\n{}", report::text(&results));
        for path in options
            .output()
            .map_or(Ok(Vec::new()), |output| report::write(&results, &output))?
        {
            say(&format!("wrote {}", path.display()));
        }
        Ok(results.errors().count())
    });
    match outcome {
        Ok(0) => ExitCode::SUCCESS,
        Ok(failed) => ended(Err(format!("{failed} measurements failed, see above"))),
        // As a shell reports it; the largest signal number is 64.
        Err(BenchError::Interrupted(signal)) => {
            say(&BenchError::Interrupted(signal).to_string());
            ExitCode::from(128 + signal as u8)
        }
        Err(error) => ended(Err(error.to_string())),
    }
}

/// Looks whether it can begin, and clears away what killed runs have left.
fn prepare(plan: &Plan) -> Result<Interrupt, BenchError> {
    let missing: Vec<_> = PROGRAMS
        .into_iter()
        .filter(|(program, _)| !lab::has_program(program))
        .collect();
    if !missing.is_empty() {
        let (programs, mut packages): (Vec<_>, Vec<_>) = missing.into_iter().unzip();
        packages.dedup();
        return Err(BenchError::Missing {
            programs: programs.join(", "),
            packages: packages.join(" "),
        });
    }
    if plan.pin && processors::count() < 2 {
        return Err(BenchError::OneProcessor);
    }
    let interrupt = Interrupt::install().map_err(BenchError::Signals)?;
    for id in Lab::sweep_stale()? {
        say(&format!("removed {id}, left by a run that was killed"));
    }
    Ok(interrupt)
}

/// Measures everything that is planned; what fails is in the results, too. To be called from a thread that lives on until
/// it returns, since what it starts dies with that. `tell` gets a line for each slot.
///
/// # Errors
/// [`BenchError::Interrupted`].
pub(crate) fn run(
    plan: &Plan,
    arguments: Vec<String>,
    interrupt: &Interrupt,
    tell: impl Fn(&str),
) -> Result<Results, BenchError> {
    let mut results = Results::new(plan, Machine::look(), arguments);
    let slots = plan.rounds as usize * plan.wires.len() * plan.peers.len();
    for round in 1..=plan.rounds {
        for wire in &plan.wires {
            for peer in turns(&plan.peers, round) {
                check(interrupt)?;
                let sample = measure::slot(plan, (round, *wire, peer), interrupt)?;
                tell(&format!(
                    "{} of {slots}: {}",
                    results.samples.len() + 1,
                    progress(&sample)
                ));
                results.samples.push(sample);
            }
        }
    }
    Ok(results)
}

/// Each round begins with the next peer, so that none is always the one after a certain other.
fn turns<T>(peers: &[T], round: u32) -> impl Iterator<Item = &T> {
    let first = (round as usize - 1) % peers.len().max(1);
    peers[first..].iter().chain(&peers[..first])
}

/// One slot in one line.
fn progress(sample: &measure::Sample) -> String {
    let shown = [Metric::Tcp1, Metric::Udp64, Metric::PingP50].into_iter();
    let values = shown.filter_map(|metric| {
        let value = sample.values.get(&metric)?;
        Some(format!(
            "{} {} {}",
            metric.title(),
            metric.format(*value),
            metric.unit()
        ))
    });
    let mut parts = vec![format!(
        "round {}, {}, {}",
        sample.round,
        sample.wire.name(),
        sample.peer
    )];
    parts.extend(values);
    parts.push(format!(
        "{:.1} s, noise {:.1} %",
        sample.seconds,
        sample.noise() * 100.0
    ));
    parts.extend(sample.errors.iter().map(|error| format!("FAILED: {error}")));
    parts.join("; ")
}

/// On standard error; that nobody reads is no reason to stop, with a lab to be removed.
fn say(text: &str) {
    let _ = writeln!(io::stderr(), "bench: {text}");
}
