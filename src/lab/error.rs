use std::{io, path::PathBuf, process::ExitStatus, time::Duration};

/// Why the lab could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// A program could not be started at all.
    #[error("cannot start `{command}`: {source}; is the program installed and on the PATH?")]
    Start {
        /// The command line.
        command: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A program ran and reported failure.
    #[error("`{command}` failed ({status}): {output}")]
    Failed {
        /// The command line.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// Its standard error on one line, or its standard output when it wrote no error.
        output: String,
    },
    /// Something awaited did not happen in time.
    #[error("waited {} s for {what} in vain", limit.as_secs_f32())]
    TimedOut {
        /// What was awaited.
        what: String,
        /// For how long.
        limit: Duration,
    },
    /// A file or directory of the lab could not be read, written, made or removed.
    #[error("cannot {action} {path}: {source}; the lab needs root and a writable temporary directory", path = path.display())]
    File {
        /// The verb: read, write, make, remove.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A lab's name would not survive in a namespace's name.
    #[error("the lab's name `{name}` is not usable: use 1 to 24 lower-case letters, digits and underscores")]
    Name {
        /// The name asked for.
        name: String,
    },
    /// The lab's network has no address left for another host.
    #[error("no address left for host `{host}`: a lab holds at most {limit} hosts")]
    TooManyHosts {
        /// The host that found no address.
        host: String,
        /// The number of hosts that fit.
        limit: u8,
    },
    /// The subnet file lacks a value, or has a wrong one.
    #[error("{path} has {value} as {key}; flanneld writes the whole file in one step, so did something else?", path = path.display())]
    SubnetEnv {
        /// The variable.
        key: &'static str,
        /// The subnet file.
        path: PathBuf,
        /// What it has there.
        value: String,
    },
    /// A subnet is too small for a gateway and one more container.
    #[error("no address left for container `{container}` in {subnet}: use a subnet of /29 or larger")]
    SubnetFull {
        /// The container that found no address.
        container: String,
        /// The host's subnet, with the gateway's address.
        subnet: ipnet::Ipv4Net,
    },
    /// A program's output is not in the form that the lab knows.
    #[error("cannot make sense of the output of `{program}`: {output}")]
    Output {
        /// The program.
        program: &'static str,
        /// What it wrote, on one line.
        output: String,
    },
    /// Processes survived SIGKILL for longer than the lab is willing to wait.
    #[error("processes {pids:?} of the lab `{lab}` do not go away: end them by hand, then run `flanneld demo --down`")]
    Unkillable {
        /// The lab being removed.
        lab: String,
        /// The processes still there.
        pids: Vec<i32>,
    },
}
