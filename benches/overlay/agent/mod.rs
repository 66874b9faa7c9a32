//! Load generators. One agent runs in each host, as a process of its own, and does what the benchmark asks it over a Unix
//! socket, which network namespaces do not separate: offer datagrams, count those that arrive, answer pings, ping.
//!
//! They share no code with the daemon: what measures does not use what is measured.

mod client;
mod ping;
mod sink;
mod source;

pub(crate) use client::{Agent, Launcher};

use serde::{Deserialize, Serialize};
use sink::Sink;
use std::{
    env,
    io::{self, BufRead, BufReader, Write},
    net::Ipv4Addr,
    os::unix::net::UnixStream,
};

/// The environment variable that tells an agent the path of its socket.
pub(crate) const SOCKET_VARIABLE: &str = "FLANNEL_BENCH_AGENT";

/// Where an agent counts datagrams.
const SINK_PORT: u16 = 7001;

/// Where an agent sends datagrams back.
const ECHO_PORT: u16 = 7002;

/// What an agent is asked: one line of JSON.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Request {
    /// Count, and echo, what comes to this address.
    Serve(Ipv4Addr),
    /// Send datagrams to the sink of another agent.
    Offer(Offer),
    /// How many datagrams of this run have arrived?
    Count(u32),
    /// Play ping-pong with the echo of another agent.
    Ping(Pings),
}

/// Datagrams to send.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Offer {
    /// From where.
    pub(crate) from: Ipv4Addr,
    /// To the sink at this address.
    pub(crate) to: Ipv4Addr,
    /// Is in each datagram, so that late ones of another run are not taken for those of this.
    pub(crate) run: u32,
    /// From how many ports.
    pub(crate) flows: usize,
    /// UDP payload, bytes.
    pub(crate) size: usize,
    /// Datagrams a second; `None`: as many as can be.
    pub(crate) rate: Option<f64>,
    /// For how long.
    pub(crate) seconds: f64,
}

/// Round trips to take.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Pings {
    /// From where.
    pub(crate) from: Ipv4Addr,
    /// To the echo at this address.
    pub(crate) to: Ipv4Addr,
    /// UDP payload, bytes.
    pub(crate) size: usize,
    /// For how long.
    pub(crate) seconds: f64,
}

/// What an agent answers: one line of JSON.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Answer {
    /// To [`Request::Serve`].
    Serving,
    /// To [`Request::Offer`].
    Sent(Sent),
    /// To [`Request::Count`].
    Counted(Counted),
    /// To [`Request::Ping`].
    Pinged(Pinged),
    /// It could not be done, for this reason.
    Failed(String),
}

/// What was sent.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Sent {
    /// Datagrams.
    pub(crate) datagrams: u64,
    /// From the first to the end of the run.
    pub(crate) seconds: f64,
}

/// What has arrived.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Counted {
    /// Datagrams.
    pub(crate) datagrams: u64,
    /// From the first to the last of them.
    pub(crate) seconds: f64,
}

/// How long round trips took.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Pinged {
    /// Answers that came.
    pub(crate) answers: usize,
    /// Pings without one.
    pub(crate) lost: usize,
    /// Half took no longer, µs; `None` without an answer.
    pub(crate) p50: Option<f64>,
    /// 99 % took no longer, µs; `None` without an answer.
    pub(crate) p99: Option<f64>,
}

/// The agent's main function; it ends when the benchmark closes the connection.
///
/// # Errors
/// When there is no socket to connect to, or the connection breaks.
pub(crate) fn main() -> io::Result<()> {
    let path = env::var_os(SOCKET_VARIABLE)
        .ok_or_else(|| io::Error::other(format!("no {SOCKET_VARIABLE}: only the benchmark starts an agent")))?;
    let mut answers = UnixStream::connect(path)?;
    let requests = BufReader::new(answers.try_clone()?);
    let mut sink = None;
    for line in requests.lines() {
        let answer = serde_json::from_str(&line?)
            .map_err(io::Error::other)
            .and_then(|request| answer(&mut sink, &request))
            .unwrap_or_else(|error| Answer::Failed(error.to_string()));
        writeln!(answers, "{}", serde_json::to_string(&answer)?)?;
    }
    Ok(())
}

fn answer(sink: &mut Option<Sink>, request: &Request) -> io::Result<Answer> {
    match request {
        Request::Serve(address) => {
            *sink = Some(Sink::start((*address, SINK_PORT))?);
            ping::start_echo((*address, ECHO_PORT))?;
            Ok(Answer::Serving)
        }
        Request::Offer(offer) => source::send(offer).map(Answer::Sent),
        Request::Count(run) => {
            let sink = sink.as_ref().ok_or_else(|| io::Error::other("counts nothing yet"))?;
            sink.counted(*run).map(Answer::Counted)
        }
        Request::Ping(pings) => ping::ping(pings).map(Answer::Pinged),
    }
}
