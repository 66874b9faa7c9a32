//! Why the demo did not come to its end.

use crate::lab::LabError;
use nix::sys::signal::Signal;
use std::{io, process::ExitStatus, time::Duration};

/// Why the demo did not come to its end, or not to a good one.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// Namespaces need root.
    #[error("the demo makes network namespaces, which needs root: run it with sudo, or scripts/demo, which does so")]
    NotRoot,
    /// Programs are missing.
    #[error("the demo needs {programs}: install with `apt-get install {packages}`, or use scripts/demo, which does so")]
    Missing {
        /// Their names.
        programs: String,
        /// The Debian packages that have them.
        packages: String,
    },
    /// This binary cannot be found again, to run the daemons from it.
    #[error("cannot find the path of this very program, which the demo runs as its daemons: {0}")]
    OwnPath(io::Error),
    /// The lab failed.
    #[error(transparent)]
    Lab(#[from] LabError),
    /// Signals cannot be caught.
    #[error("cannot prepare for Ctrl-C: {0}; without it an interrupted demo would leave its lab behind")]
    Signals(io::Error),
    /// The result cannot be shown.
    #[error("cannot write the result to standard output: {0}")]
    Output(#[from] io::Error),
    /// A program of the lab ended though it should run.
    #[error("{name} has ended by itself ({status}); the end of its log is above")]
    Ended {
        /// The program: a daemon by its host, or etcd.
        name: String,
        /// How it ended.
        status: ExitStatus,
    },
    /// A daemon is up, but not ready.
    #[error("{name} has written no subnet file within {} s; the end of its log is above", limit.as_secs())]
    NotReady {
        /// The daemon by its host.
        name: String,
        /// For how long it was waited for.
        limit: Duration,
    },
    /// Containers that do not reach one another.
    #[error(
        "{failed} of {pairs} pairs of containers do not reach one another; the ends of the daemons' logs are above"
    )]
    Unreachable {
        /// Pairs without an answer.
        failed: usize,
        /// All pairs.
        pairs: usize,
    },
    /// Ctrl-C, or another signal that ends a process.
    #[error("ended by {0}; everything that the demo made is removed")]
    Interrupted(Signal),
}

impl DemoError {
    /// The exit code, as a shell would report it: 130 for Ctrl-C.
    pub fn exit_code(&self) -> u8 {
        match self {
            // The largest signal number is 64.
            DemoError::Interrupted(signal) => 128 + *signal as u8,
            _ => 1,
        }
    }
}
