//! The benchmark's end of an agent.

use super::super::{
    error::{BenchError, check},
    hosts::Host,
    peer::check_running,
};
use super::{Answer, Counted, Offer, Pinged, Pings, Request, SOCKET_VARIABLE, Sent};
use flannel::lab::{Interrupt, LabError, Process, wait_for};
use std::{
    ffi::OsString,
    io::{self, BufRead, BufReader, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// How long an agent may take to start, and to answer beyond the time that it was asked to spend; longer than all pings that
/// may be lost.
const LIMIT: Duration = Duration::from_secs(10);

/// How often a wait for an answer looks for Ctrl-C and for the end of the agent.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// How an agent is started: a program whose `main`, with these arguments, is [`super::main`].
#[derive(Clone, Debug)]
pub(crate) struct Launcher {
    /// The program.
    pub(crate) program: PathBuf,
    /// Its arguments.
    pub(crate) arguments: Vec<OsString>,
}

/// An agent in a host.
pub(crate) struct Agent {
    process: Process,
    stream: BufReader<UnixStream>,
    host: &'static str,
}

impl Agent {
    /// Starts it; its socket and its log are in `dir`.
    pub(crate) fn start(
        host: &Host,
        launcher: &Launcher,
        dir: &Path,
        interrupt: &Interrupt,
    ) -> Result<Agent, BenchError> {
        let path = dir.join(format!("agent-{}.socket", host.name));
        let failed = |source| BenchError::File {
            action: "listen on",
            path: path.clone(),
            source,
        };
        let listener = UnixListener::bind(&path).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let mut command = host.command(&launcher.program);
        command.args(&launcher.arguments).env(SOCKET_VARIABLE, &path);
        let log = dir.join(format!("agent-{}.log", host.name));
        let mut process = Process::spawn(&format!("the load generator on host {}", host.name), command, &log)?;
        let stream = wait_for(LIMIT, "a load generator to start", || {
            check(interrupt)?;
            check_running(&mut process)?;
            match listener.accept() {
                Ok((stream, _)) => Ok(Some(stream)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
                Err(error) => Err(failed(error)),
            }
        })?;
        stream.set_nonblocking(false).map_err(failed)?;
        stream.set_read_timeout(Some(LOOK_AGAIN)).map_err(failed)?;
        let mut agent = Agent {
            process,
            stream: BufReader::new(stream),
            host: host.name,
        };
        match agent.ask(&Request::Serve(host.overlay()), 0.0, interrupt)? {
            Answer::Serving => Ok(agent),
            other => Err(agent.surprised(&other)),
        }
    }

    /// Sends datagrams.
    pub(crate) fn offer(&mut self, offer: Offer, interrupt: &Interrupt) -> Result<Sent, BenchError> {
        match self.ask(&Request::Offer(offer), offer.seconds, interrupt)? {
            Answer::Sent(sent) => Ok(sent),
            other => Err(self.surprised(&other)),
        }
    }

    /// Tells what has arrived of a run.
    pub(crate) fn count(&mut self, run: u32, interrupt: &Interrupt) -> Result<Counted, BenchError> {
        match self.ask(&Request::Count(run), 0.0, interrupt)? {
            Answer::Counted(counted) => Ok(counted),
            other => Err(self.surprised(&other)),
        }
    }

    /// Plays ping-pong.
    pub(crate) fn ping(&mut self, pings: Pings, interrupt: &Interrupt) -> Result<Pinged, BenchError> {
        match self.ask(&Request::Ping(pings), pings.seconds, interrupt)? {
            Answer::Pinged(pinged) => Ok(pinged),
            other => Err(self.surprised(&other)),
        }
    }

    /// The answer to `request`, which takes so many seconds to carry out.
    fn ask(&mut self, request: &Request, seconds: f64, interrupt: &Interrupt) -> Result<Answer, BenchError> {
        let line = serde_json::to_string(request).map_err(|error| self.failed(error))?;
        writeln!(self.stream.get_mut(), "{line}").map_err(|error| self.failed(error))?;
        let limit = LIMIT + Duration::from_secs_f64(seconds);
        let asked = Instant::now();
        let mut answer = Vec::new();
        while !answer.ends_with(b"\n") {
            check(interrupt)?;
            check_running(&mut self.process)?;
            if asked.elapsed() > limit {
                let what = format!("an answer of {}", self.process.name());
                return Err(LabError::TimedOut { what, limit }.into());
            }
            match self.stream.read_until(b'\n', &mut answer) {
                Ok(0) => return Err(self.failed("has closed its connection")),
                // What came before a timeout is in `answer` already.
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(self.failed(error)),
                _ => {}
            }
        }
        serde_json::from_slice(&answer).map_err(|error| self.failed(error))
    }

    fn surprised(&self, answer: &Answer) -> BenchError {
        match answer {
            Answer::Failed(why) => self.failed(why),
            other => self.failed(format!("answered {other:?}")),
        }
    }

    fn failed(&self, why: impl ToString) -> BenchError {
        BenchError::Agent {
            host: self.host,
            why: why.to_string(),
        }
    }
}
