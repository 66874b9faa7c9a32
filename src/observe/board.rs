//! The board on which the daemon writes what it is doing, for those who look: the status socket, the health port.

use std::{
    collections::BTreeMap,
    process,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::status::{BackendReport, Counts, External, Lease, Peer, Registry, Requests, Status};
use crate::{
    kernel::external,
    lease::{record, watch::PeerSet},
    sandbox::Sandbox,
};

/// Clones share the board.
#[derive(Clone)]
pub struct Board(Arc<Shared>);

impl std::fmt::Debug for Board {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Board").field(&self.0.registry).finish()
    }
}

struct Shared {
    started: Instant,
    registry: String,
    notes: Mutex<Notes>,
}

/// Asks a backend what it is doing.
pub type Report = Arc<dyn Fn() -> BackendReport + Send + Sync>;

#[derive(Default)]
struct Notes {
    waiting_for: Option<String>,
    ready: bool,
    degraded: Option<String>,
    external: Option<External>,
    own: Option<(record::Lease, Option<Instant>)>,
    renew_margin: Duration,
    rule_repairs: u64,
    sandbox: Sandbox,
    backend: Option<Report>,
    peers: Arc<PeerSet>,
    contact: Contact,
}

/// How the registry answers.
#[derive(Default)]
struct Contact {
    trouble: Option<String>,
    answered: Option<Instant>,
    told: Option<Instant>,
    requests: BTreeMap<String, Requests>,
}

impl Board {
    /// For a daemon that begins now and whose registry describes itself so.
    pub fn new(registry: String) -> Self {
        Self(Arc::new(Shared {
            started: Instant::now(),
            registry,
            notes: Mutex::default(),
        }))
    }

    fn notes(&self) -> MutexGuard<'_, Notes> {
        // Each note is written in one step, so that a panic elsewhere leaves none half written.
        self.0.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What stands between the daemon and its being ready, as in "the network's configuration".
    pub fn waiting_for(&self, what: impl Into<String>) {
        let mut notes = self.notes();
        notes.waiting_for = Some(what.into());
        notes.ready = false;
    }

    /// The daemon serves.
    pub fn ready(&self) {
        let mut notes = self.notes();
        notes.waiting_for = None;
        notes.ready = true;
    }

    /// The daemon serves, but by what may not be so any more, and why; `None`: that is over.
    pub fn degraded(&self, why: Option<String>) {
        self.notes().degraded = why;
    }

    /// The interface that faces the other hosts.
    pub fn external(&self, external: &external::External) {
        self.notes().external = Some(External {
            interface: external.name.clone(),
            address: external.address,
            mtu: external.mtu,
            public_ip: external.public_ip,
        });
    }

    /// This host's lease, how long it has (`None`: it is a reservation), and with how much of that it is renewed.
    pub fn lease(&self, own: &record::Lease, left: Option<Duration>, renew_margin: Duration) {
        let mut notes = self.notes();
        notes.renew_margin = renew_margin;
        notes.own = Some((own.clone(), left.and_then(expiry)));
    }

    /// How long the lease has after it was renewed.
    pub fn renewed(&self, left: Duration) {
        if let Some((_, expires)) = &mut self.notes().own {
            *expires = expiry(left);
        }
    }

    /// Traffic rules that others had changed are back.
    pub fn rules_repaired(&self) {
        self.notes().rule_repairs += 1;
    }

    /// What the daemon is confined by.
    pub fn sandbox(&self, sandbox: Sandbox) {
        self.notes().sandbox = sandbox;
    }

    /// What carries the packets.
    pub fn backend(&self, report: Report) {
        self.notes().backend = Some(report);
    }

    /// The other hosts.
    pub fn peers(&self, peers: Arc<PeerSet>) {
        self.notes().peers = peers;
    }

    /// The registry was asked something and took this long; with why it did not answer, if it did not.
    pub(super) fn asked(&self, operation: &'static str, took: Duration, trouble: Option<String>) {
        let contact = &mut self.notes().contact;
        let requests = contact.requests.entry(operation.to_owned()).or_default();
        requests.seconds += took.as_secs_f64();
        if trouble.is_some() {
            requests.failed += 1;
        } else {
            requests.answered += 1;
            contact.answered = Some(Instant::now());
        }
        contact.trouble = trouble;
    }

    /// The registry has told of changes, or why it tells of none any more.
    pub(super) fn told(&self, trouble: Option<String>) {
        let contact = &mut self.notes().contact;
        if trouble.is_none() {
            let now = Instant::now();
            (contact.answered, contact.told) = (Some(now), Some(now));
        }
        contact.trouble = trouble;
    }

    /// What was counted so far, for another process to go on with.
    pub fn counts(&self) -> Counts {
        let report = self.notes().backend.clone().map(|report| report());
        let notes = self.notes();
        let mut counts = Counts {
            rule_repairs: notes.rule_repairs,
            requests: notes.contact.requests.clone(),
            ..Counts::default()
        };
        if let Some(BackendReport { backend, traffic }) = report {
            counts.repairs = backend.repairs;
            counts.workers = backend.engine.map_or_else(Vec::new, |engine| engine.workers);
            counts.peers = traffic.unwrap_or_default();
        }
        counts
    }

    /// Goes on counting from what another process has counted; the backend does so by itself.
    pub fn count_from(&self, before: &Counts) {
        let mut notes = self.notes();
        notes.rule_repairs += before.rule_repairs;
        for (name, before) in &before.requests {
            let requests = notes.contact.requests.entry(name.clone()).or_default();
            requests.answered += before.answered;
            requests.failed += before.failed;
            requests.seconds += before.seconds;
        }
    }

    /// Whether the daemon serves, and what it waits for if it does not, or why what it serves may not be so any more.
    pub fn readiness(&self) -> (bool, Option<String>) {
        let notes = self.notes();
        let why = if notes.ready {
            notes.degraded()
        } else {
            notes.waiting_for.clone()
        };
        (notes.ready, why)
    }

    /// This moment.
    pub fn status(&self) -> Status {
        let (report, peers) = {
            let notes = self.notes();
            (notes.backend.clone(), Arc::clone(&notes.peers))
        };
        // Without the lock: it asks the kernel.
        let report = report.map(|report| report());
        let notes = self.notes();
        let seconds_since = |moment: Option<Instant>| moment.map(|moment| moment.elapsed().as_secs());
        let contact = &notes.contact;
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: process::id(),
            uptime_seconds: self.0.started.elapsed().as_secs(),
            ready: notes.ready,
            waiting_for: notes.waiting_for.clone(),
            degraded: notes.degraded(),
            external: notes.external.clone(),
            lease: notes.own.as_ref().map(|(lease, expires)| Lease {
                subnet: lease.subnets.v4().to_string(),
                ipv6_subnet: lease.subnets.v6().map(|net| net.to_string()),
                renew_margin_seconds: notes.renew_margin.as_secs(),
                seconds_left: expires.map(|expires| expires.saturating_duration_since(Instant::now()).as_secs()),
            }),
            rule_repairs: notes.rule_repairs,
            sandbox: notes.sandbox.report(),
            registry: Registry {
                name: self.0.registry.clone(),
                connected: contact.trouble.is_none() && contact.answered.is_some(),
                trouble: contact.trouble.clone(),
                seconds_since_answer: seconds_since(contact.answered),
                seconds_since_event: seconds_since(contact.told),
                requests: contact.requests.clone(),
            },
            peers: peers.values().map(|lease| peer(lease, report.as_ref())).collect(),
            backend: report.map(|report| report.backend),
        }
    }
}

/// `None` for a time that has no end: etcd takes any number of seconds.
fn expiry(left: Duration) -> Option<Instant> {
    Instant::now().checked_add(left)
}

impl Notes {
    fn degraded(&self) -> Option<String> {
        self.degraded.clone().or_else(|| self.run_out())
    }

    /// What there is to say of a lease that was not renewed in time.
    fn run_out(&self) -> Option<String> {
        let (lease, expires) = self.own.as_ref()?;
        let over = (*expires)?.elapsed();
        (!over.is_zero()).then(|| {
            format!(
                "the lease {} ran out {} s ago by this host's count, because the registry did not answer",
                lease.subnets.to_cidrs(),
                over.as_secs()
            )
        })
    }
}

fn peer(lease: &record::Lease, report: Option<&BackendReport>) -> Peer {
    let traffic = report.and_then(|report| report.traffic.as_ref());
    let host = lease.value.public_ip.into();
    Peer {
        subnet: lease.subnets.v4().to_string(),
        ipv6_subnet: lease.subnets.v6().map(|net| net.to_string()),
        public_ip: lease.value.public_ip,
        public_ipv6: lease.value.public_ipv6,
        // A host that nothing was exchanged with is not among them.
        traffic: traffic.map(|traffic| traffic.get(&host).copied().unwrap_or_default()),
    }
}
