//! One connection to one server of the cluster at a time, and the change to another when it fails.
//!
//! The client library can balance over several servers itself, but then a server that hangs takes its share of the calls
//! and the reason of a failure is lost. Here each failure belongs to a server and has a reason.

use std::{
    future::Future,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::Duration,
};

use etcd_client::{Channel, Client, ConnectOptions};
use tokio::{
    sync::Mutex,
    time::{Instant, timeout},
};

use super::{
    config::{Credentials, Server},
    reason::{Fault, NO_LEADER},
};
use crate::registry::Error;

/// How long a server may take to accept a connection and the password, and then for each call. A healthy one takes
/// milliseconds, a cluster that elects a leader about two seconds.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long it may take at most, once no server has answered in time: each time then it is twice as long. A call may be two
/// questions one after the other, each behind another one on a line that takes 5 s.
const MOST_PATIENCE: Duration = Duration::from_secs(20);

/// How long to wait before the next server is asked when one has no leader; an election is over after a few of these.
const ELECTION_PAUSE: Duration = Duration::from_millis(300);

/// The cluster, of which one server is connected at a time.
pub(super) struct Cluster {
    name: String,
    servers: Vec<Server>,
    credentials: Option<Credentials>,
    state: Mutex<State>,
    connections: AtomicU64,
    /// In milliseconds, from [`PATIENCE`] to [`MOST_PATIENCE`].
    patience: AtomicU64,
}

#[derive(Default)]
struct State {
    connected: Option<Connection>,
    /// The server to try first.
    first: usize,
    /// The last time that no server could be connected to, and why.
    failed: Option<(Instant, Vec<Failure>)>,
}

/// A connection and the server it leads to.
#[derive(Clone)]
pub(super) struct Connection {
    pub(super) client: Client,
    /// Tells connections apart, also those to one server.
    number: u64,
    server: usize,
}

/// Why a server could not be used.
#[derive(Debug, Clone)]
struct Failure {
    server: usize,
    reason: String,
    denied: bool,
    timed_out: bool,
}

/// What may be done with a call whose answer was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Repeat {
    /// Ask another server: doing it twice is the same as doing it once.
    Yes,
    /// Report it: the caller must look what has become of it.
    No,
}

impl Cluster {
    pub(super) fn new(servers: Vec<Server>, credentials: Option<Credentials>) -> Cluster {
        let urls: Vec<&str> = servers.iter().map(|server| server.url.as_str()).collect();
        let name = format!("etcd at {}", urls.join(", "));
        Cluster {
            name,
            servers,
            credentials,
            state: Mutex::default(),
            connections: AtomicU64::new(0),
            patience: AtomicU64::new(millis(PATIENCE)),
        }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Carries out a call on the connected server, or on the others in turn while servers fail. A fault that is
    /// returned is an answer; when no server gives any, that is an error of the cluster.
    pub(super) async fn call<T, F>(
        &self,
        repeat: Repeat,
        mut call: impl FnMut(Connection) -> F,
    ) -> Result<Result<T, Fault>, Error>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let mut failures = Vec::new();
        let (mut token_renewed, mut replaced) = (false, false);
        let started = Instant::now();
        loop {
            let (connection, fresh) = self.connection(started, &mut failures).await?;
            let (patience, asked) = (self.patience(), Instant::now());
            let outcome = timeout(patience, call(connection.clone())).await;
            let timed_out = outcome.is_err();
            let outcome = match outcome {
                Ok(outcome) => outcome
                    .inspect(|_| self.answered_after(asked.elapsed()))
                    .map_err(Fault::from),
                Err(_) => Err(Fault::timed_out(patience)),
            };
            match outcome {
                Err(Fault::Unreachable { reason, maybe_done }) => {
                    self.discard(&connection).await;
                    failures.push(Failure {
                        timed_out,
                        ..self.failure(connection.server, reason)
                    });
                    if maybe_done && repeat == Repeat::No {
                        self.grow_patience(&failures);
                        return Err(self.unavailable(&failures));
                    }
                }
                Err(Fault::Broken { reason }) => {
                    self.discard(&connection).await;
                    let hint = match (fresh, self.servers[connection.server].is_secure()) {
                        (false, _) => "",
                        (true, true) => ": does it want --etcd-certfile and --etcd-keyfile?",
                        (true, false) => ": does it want https?",
                    };
                    let failure = self.failure(connection.server, format!("{reason}{hint}"));
                    if repeat == Repeat::No {
                        return Err(self.unavailable(&[failure]));
                    }
                    // That an old connection is at its end says nothing about the server, which may run again.
                    if fresh || replaced {
                        failures.push(failure);
                    }
                    replaced = true;
                }
                Err(Fault::NoLeader) => {
                    self.discard(&connection).await;
                    if started.elapsed() < PATIENCE {
                        tokio::time::sleep(ELECTION_PAUSE).await;
                    } else {
                        failures.push(self.failure(connection.server, NO_LEADER.to_owned()));
                    }
                }
                // Connecting again gets a new token.
                Err(Fault::StaleToken { .. }) if !token_renewed => {
                    self.discard(&connection).await;
                    token_renewed = true;
                }
                // And takes a new password from its file.
                Err(Fault::Denied { .. }) if !fresh && !token_renewed && self.may_log_in_anew() => {
                    self.discard(&connection).await;
                    token_renewed = true;
                }
                outcome => return Ok(outcome),
            }
        }
    }

    /// The connection that is there, or a new one to the first server that can be connected to and is not among
    /// `failures`; and whether it is new.
    async fn connection(&self, started: Instant, failures: &mut Vec<Failure>) -> Result<(Connection, bool), Error> {
        let mut state = self.state.lock().await;
        if let Some(connection) = &state.connected
            && failures.iter().all(|failure| failure.server != connection.server)
        {
            return Ok((connection.clone(), false));
        }
        // Many tasks may have waited here while one found out that there is no server; once is enough.
        if let Some((when, failed)) = &state.failed
            && failures.is_empty()
            && *when > started
        {
            return Err(self.unavailable(failed));
        }
        for server in (0..self.servers.len()).map(|step| (state.first + step) % self.servers.len()) {
            if failures.iter().any(|failure| failure.server == server) {
                continue;
            }
            match self.connect(server).await {
                Ok(connection) => {
                    tracing::debug!(server = self.servers[server].url, "connected to etcd");
                    state.first = server;
                    state.connected = Some(connection.clone());
                    return Ok((connection, true));
                }
                Err(failure) => failures.push(failure),
            }
        }
        self.grow_patience(failures);
        state.failed = Some((Instant::now(), failures.clone()));
        Err(self.unavailable(failures))
    }

    async fn connect(&self, server: usize) -> Result<Connection, Failure> {
        let patience = self.patience();
        // A server whose kernel does not even answer is not slow but away: to wait longer for it would only be noticed later that
        // it is back. Behind TLS the two cannot be told apart.
        let reached = AtomicBool::new(self.servers[server].is_secure());
        let connect = async {
            let channel = self.servers[server].endpoint(patience).connect().await?;
            reached.store(true, Ordering::Relaxed);
            self.log_in(Channel::Tonic(channel)).await
        };
        let outcome = timeout(patience, connect).await;
        let timed_out = outcome.is_err() && reached.load(Ordering::Relaxed);
        let outcome = outcome.unwrap_or_else(|_| Err(Fault::timed_out(patience)));
        let number = self.connections.fetch_add(1, Ordering::Relaxed);
        match outcome {
            Ok(client) => Ok(Connection { client, number, server }),
            Err(Fault::Denied { reason }) => Err(Failure {
                denied: true,
                ..self.failure(server, reason)
            }),
            Err(
                Fault::Unreachable { reason, .. }
                | Fault::Broken { reason }
                | Fault::Refused { reason }
                | Fault::StaleToken { reason },
            ) => Err(Failure {
                timed_out,
                ..self.failure(server, reason)
            }),
            Err(Fault::NoLeader) => Err(self.failure(server, NO_LEADER.to_owned())),
            Err(fault) => Err(self.failure(server, format!("unexpected answer ({fault:?})"))),
        }
    }

    async fn log_in(&self, channel: Channel) -> Result<Client, Fault> {
        // A server that has lost its leader would otherwise keep a watch open that never tells anything.
        let options = ConnectOptions::new().with_require_leader(true);
        let Some(credentials) = &self.credentials else {
            return Ok(Client::from_channel(channel, Some(options)).await?);
        };
        let with_user = options
            .clone()
            .with_user(&credentials.username, credentials.current_password())
            .with_auto_token_refresh(true);
        match Client::from_channel(channel.clone(), Some(with_user))
            .await
            .map_err(Fault::from)
        {
            Err(Fault::AuthNotEnabled) => Ok(Client::from_channel(channel, Some(options)).await?),
            outcome => outcome,
        }
    }

    /// Gives up a connection that has failed; the next one is to another server, if there is one.
    pub(super) async fn discard(&self, connection: &Connection) {
        let mut state = self.state.lock().await;
        if state
            .connected
            .as_ref()
            .is_some_and(|connected| connected.number == connection.number)
        {
            state.connected = None;
            state.first = (connection.server + 1) % self.servers.len();
        }
    }

    /// The server that a connection leads to, for people.
    pub(super) fn url(&self, connection: &Connection) -> &str {
        &self.servers[connection.server].url
    }

    fn failure(&self, server: usize, reason: String) -> Failure {
        tracing::debug!(server = self.servers[server].url, reason, "etcd server failed");
        Failure {
            server,
            reason,
            denied: false,
            timed_out: false,
        }
    }

    fn may_log_in_anew(&self) -> bool {
        self.credentials.as_ref().is_some_and(Credentials::may_change)
    }

    fn patience(&self) -> Duration {
        Duration::from_millis(self.patience.load(Ordering::Relaxed))
    }

    /// A server that hangs is passed over soon, and costs no more; but where none answers in time, all may be slow.
    fn grow_patience(&self, failures: &[Failure]) {
        if failures.iter().any(|failure| failure.timed_out) {
            let longer = (self.patience() * 2).min(MOST_PATIENCE);
            self.patience.store(millis(longer), Ordering::Relaxed);
        }
    }

    /// Whoever answers fast again is waited for no longer than at first. Half of that time is far from both.
    fn answered_after(&self, took: Duration) {
        if took < PATIENCE / 2 {
            self.patience.store(millis(PATIENCE), Ordering::Relaxed);
        }
    }

    fn unavailable(&self, failures: &[Failure]) -> Error {
        let registry = self.name.clone();
        let reasons: Vec<String> = failures
            .iter()
            .map(|failure| format!("{}: {}", self.servers[failure.server].url, failure.reason))
            .collect();
        let reason = reasons.join("; ");
        // Users and certificates are those of the cluster: what one server refuses, one that is down refuses as well.
        if failures.iter().any(|failure| failure.denied) {
            Error::Denied { registry, reason }
        } else {
            Error::Unavailable { registry, reason }
        }
    }
}

/// Of a span that is seconds.
fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}
