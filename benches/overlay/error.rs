//! Why the benchmark, or one measurement of it, did not come to its end.

use flannel::lab::{Interrupt, LabError};
use nix::sys::signal::Signal;
use std::{io, path::PathBuf, process::ExitStatus};

/// See the module.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BenchError {
    /// The lab failed.
    #[error(transparent)]
    Lab(#[from] LabError),
    /// Ctrl-C, or another signal that ends a process.
    #[error("ended by {0}; everything that the benchmark made is removed, and no result is written")]
    Interrupted(Signal),
    /// Signals cannot be caught.
    #[error("cannot prepare for Ctrl-C: {0}; without it an interrupted run would leave its namespaces behind")]
    Signals(io::Error),
    /// Programs are missing.
    #[error(
        "the benchmark needs {programs}: install with `apt-get install {packages}`, or use scripts/bench, which does so"
    )]
    Missing {
        /// Their names.
        programs: String,
        /// The Debian packages that have them.
        packages: String,
    },
    /// Fewer processors than `--pin` needs.
    #[error("--pin gives each of two hosts a processor of its own, and there is only one: leave it out")]
    OneProcessor,
    /// A program ended though it should run.
    #[error("{name} has ended by itself ({status}); the end of its log: {log}")]
    Ended {
        /// The program and its host.
        name: String,
        /// How it ended.
        status: ExitStatus,
        /// The last it wrote.
        log: String,
    },
    /// A load generator could not do what it was asked.
    #[error("the load generator on host {host}: {why}")]
    Agent {
        /// The host that it is in.
        host: &'static str,
        /// What went wrong.
        why: String,
    },
    /// No figure came of a measurement.
    #[error("{test}: {why}")]
    NoResult {
        /// Which one.
        test: &'static str,
        /// What was there instead.
        why: String,
    },
    /// The veth does not do as it is told.
    #[error("the veth keeps {features} switched on, so that packets larger than the MTU would cross")]
    Wire {
        /// Names of features, as ethtool has them.
        features: String,
    },
    /// A file cannot be read or written.
    #[error("cannot {action} {path}: {source}", path = path.display())]
    File {
        /// The verb.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// An error once a signal has asked this process to end: to be called in each wait.
pub(crate) fn check(interrupt: &Interrupt) -> Result<(), BenchError> {
    interrupt
        .signal()
        .map_or(Ok(()), |signal| Err(BenchError::Interrupted(signal)))
}
