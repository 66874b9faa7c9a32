//! The registry in an etcd v3 cluster.
//!
//! Nothing connects until it is needed, and everything that fails for want of a server can be called again: the
//! connection to the cluster moves from server to server by itself (see `etcd/connection.rs`). A running watch does not:
//! it ends with the server it is on, and its owner takes a new picture and a new watch.

mod config;
mod connection;
mod reason;

use std::{
    collections::hash_map::RandomState,
    fmt,
    future::Future,
    hash::BuildHasher,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use etcd_client::{
    Compare, CompareOp, EventType, GetOptions, KeyValue, LeaseGrantOptions, PutOptions, Txn, TxnOp, TxnOpResponse,
    TxnResponse, WatchOptions, WatchResponse, WatchStream,
};

pub use self::config::{ConfigError, EtcdConfig, Member};
use self::{
    connection::{Cluster, Connection, Repeat},
    reason::{Fault, NO_LEADER},
};
use super::{Error, Event, LONGEST_VALUE, Record, Registry, Revision, TtlId, Watch, prefix::Prefix};

/// The largest answer we take. etcd does not bound what it sends, and a record is at most 1.5 MB (`--max-request-bytes`): room
/// for ten of these, and for 50,000 leases.
const MAX_ANSWER: usize = 16 << 20;

/// The most keys that are listed: a /8 has 65,536 subnets of /24. With [`LONGEST_VALUE`] and [`LONGEST_KEY`] it bounds the memory
/// of one list, to some 250 MB, and a registry with more under one prefix is used for something else besides.
const MOST_RECORDS: usize = 1 << 18;

/// The longest key that is shown. Those that this program uses have some 70 bytes; etcd allows more than a million.
const LONGEST_KEY: usize = 256;

/// How much of a value that is [too long](LONGEST_VALUE) is shown: with this the note is far shorter than what it stands for.
const EXCERPT: usize = 64;

/// How many keys are looked through for configurations at other prefixes; it is only for a hint.
const MAX_KEYS_FOR_HINT: i64 = 10_000;

/// What etcd answers to a grant that it has carried out already (`ErrGRPCLeaseExist`).
const LEASE_IS_THERE: &str = "lease already exists";

/// A registry in etcd. Clones share one connection.
#[derive(Clone)]
pub struct EtcdRegistry {
    cluster: Arc<Cluster>,
    prefix: Prefix,
    /// The form of the prefix, with or without the leading slash, under which a configuration was found.
    found: Arc<OnceLock<Prefix>>,
    /// etcd leases that no record is meant to hang on, but which could not be revoked yet. Left alone each would live for
    /// as long as it was granted for, and one is granted at each try.
    left_over: Arc<Mutex<Vec<i64>>>,
}

impl EtcdRegistry {
    /// The registry that `config` names. Reads the TLS files but does not connect: etcd may be down.
    ///
    /// # Errors
    /// What the user must mend in the flags.
    pub fn connect(config: EtcdConfig) -> Result<EtcdRegistry, ConfigError> {
        let cluster = Cluster::new(config.servers()?, config.credentials()?);
        Ok(EtcdRegistry {
            cluster: Arc::new(cluster),
            prefix: Prefix::new(&config.prefix),
            found: Arc::new(OnceLock::new()),
            left_over: Arc::default(),
        })
    }

    /// Carries out a call; `tried` and `key` say what it is for the message when it is refused.
    async fn call<T, F>(
        &self,
        (tried, key): (&str, &str),
        repeat: Repeat,
        call: impl FnMut(Connection) -> F,
    ) -> Result<T, Error>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        self.cluster
            .call(repeat, call)
            .await?
            .map_err(|fault| self.error(tried, key, fault))
    }

    fn error(&self, tried: &str, key: &str, fault: Fault) -> Error {
        let registry = self.describe();
        match fault {
            Fault::Unreachable { reason, .. } | Fault::Broken { reason } => Error::Unavailable { registry, reason },
            Fault::NoLeader => Error::Unavailable {
                registry,
                reason: NO_LEADER.to_owned(),
            },
            Fault::Denied { reason } | Fault::StaleToken { reason } => Error::Denied {
                registry,
                reason: format!("{tried} {key}: {reason}"),
            },
            Fault::Compacted => Error::Compacted,
            Fault::NoLease => Error::Failed {
                registry,
                reason: format!("{tried} {key}: its etcd lease has ended"),
            },
            Fault::AuthNotEnabled => Error::Failed {
                registry,
                reason: format!("{tried} {key}: it has no users"),
            },
            Fault::Refused { reason } => Error::Failed {
                registry,
                reason: format!("{tried} {key}: {reason}"),
            },
        }
    }

    /// The form of the prefix under which this network's keys are. People write the configuration with or without the
    /// leading slash, and the other keys must go where it is; while there is none, that is with the slash.
    async fn prefix(&self) -> Result<Prefix, Error> {
        if let Some(found) = self.found.get() {
            return Ok(found.clone());
        }
        for form in [self.prefix.clone(), self.prefix.without_slash()] {
            let key = form.full("config");
            let options = GetOptions::new().with_count_only();
            let get = |connection: Connection| {
                let (key, options) = (key.clone(), options.clone());
                async move { connection.client.kv_client().get(key, Some(options)).await }
            };
            match self.cluster.call(Repeat::Yes, get).await? {
                Ok(answer) if answer.count() > 0 => return Ok(self.found.get_or_init(|| form).clone()),
                // A role may well cover one of the forms only; what is not to be seen is not there.
                Ok(_) | Err(Fault::Denied { .. }) => {}
                Err(fault) => return Err(self.error("reading", &key, fault)),
            }
        }
        Ok(self.prefix.clone())
    }

    /// All records from `start` on, and the revision at which they were read.
    async fn range(&self, prefix: &Prefix, start: &str) -> Result<(Vec<Record>, Revision), Error> {
        let start = prefix.full(start);
        let end = range_end(&start);
        let mut from = start.clone().into_bytes();
        let (mut records, mut revision) = (Vec::new(), 0);
        let mut page = Page::default();
        loop {
            // Later pages are read at the revision of the first, so that together they are one picture.
            let options = GetOptions::new()
                .with_range(end.clone())
                .with_limit(page.limit())
                .with_revision(revision);
            let get = |connection: Connection| {
                let (from, options) = (from.clone(), options.clone());
                let mut client = connection.client.kv_client().max_decoding_message_size(MAX_ANSWER);
                async move {
                    match client.get(from, Some(options)).await {
                        Err(etcd_client::Error::GRpcStatus(status)) if is_too_large(&status) => Ok(None),
                        answer => answer.map(Some),
                    }
                }
            };
            let Some(answer) = self.call(("listing", &start), Repeat::Yes, get).await? else {
                if page.shrink() {
                    continue;
                }
                let reason = format!(
                    "listing {start}: a record from {} on is longer than {MAX_ANSWER} bytes",
                    shown_key(&from)
                );
                return Err(self.failed(reason));
            };
            if revision == 0 {
                revision = answer.header().map_or(0, |header| header.revision());
            }
            page.adapt(
                answer
                    .kvs()
                    .iter()
                    .map(|entry| entry.key().len() + entry.value().len())
                    .sum(),
            );
            records.extend(answer.kvs().iter().map(|entry| short_record(prefix, entry)));
            if records.len() > MOST_RECORDS {
                let reason = format!(
                    "there are more than {MOST_RECORDS} keys under {start}, where only leases belong: remove the others, or give \
                     this network another --etcd-prefix"
                );
                return Err(self.failed(reason));
            }
            match answer.kvs().last() {
                Some(last) if answer.more() => {
                    from = last.key().to_vec();
                    from.push(0);
                }
                _ => return Ok((records, Revision(revision))),
            }
        }
    }

    fn failed(&self, reason: String) -> Error {
        Error::Failed {
            registry: self.describe(),
            reason,
        }
    }

    async fn transact(&self, tried: &str, key: &str, repeat: Repeat, txn: &Txn) -> Result<TxnResponse, Error> {
        self.try_transact(repeat, txn)
            .await?
            .map_err(|fault| self.error(tried, key, fault))
    }

    async fn try_transact(&self, repeat: Repeat, txn: &Txn) -> Result<Result<TxnResponse, Fault>, Error> {
        let send = |connection: Connection| {
            let txn = txn.clone();
            async move { connection.client.kv_client().txn(txn).await }
        };
        self.cluster.call(repeat, send).await
    }

    async fn grant(&self, key: &str, ttl: Duration) -> Result<i64, Error> {
        // etcd counts whole seconds, and raises what is shorter than an election (2 s by default).
        let seconds = i64::try_from(ttl.as_millis().div_ceil(1000)).unwrap_or(i64::MAX).max(1);
        // An identifier of ours, so that a grant whose answer was lost can be repeated without leaving a second lease. etcd
        // takes any above 0, and of 2^63 no two will ever meet.
        let id = (RandomState::new().hash_one(key) >> 1).max(1).cast_signed();
        let options = LeaseGrantOptions::new().with_id(id);
        let grant = |connection: Connection| {
            let options = options.clone();
            async move {
                match connection.client.lease_client().grant(seconds, Some(options)).await {
                    Err(etcd_client::Error::GRpcStatus(status)) if status.message().ends_with(LEASE_IS_THERE) => Ok(id),
                    granted => granted.map(|granted| granted.id()),
                }
            }
        };
        let granted = self.call(("getting an etcd lease for", key), Repeat::Yes, grant).await;
        if let Err(Error::Unavailable { .. }) = granted {
            // Only the answer may have been lost.
            self.left_over().push(id);
        }
        granted
    }

    /// Ends an etcd lease that nothing is to hang on any more; if no server can be reached, at the next chance.
    async fn revoke(&self, lease: i64) {
        if let Err(error) = self.try_revoke(lease).await {
            tracing::debug!(lease, %error, "an etcd lease is left over");
            self.left_over().push(lease);
        }
    }

    async fn try_revoke(&self, lease: i64) -> Result<(), Error> {
        let revoke = |connection: Connection| async move { connection.client.lease_client().revoke(lease).await };
        match self.cluster.call(Repeat::Yes, revoke).await? {
            Ok(_) | Err(Fault::NoLease) => {}
            // It runs out by itself.
            Err(fault) => tracing::debug!(lease, ?fault, "etcd does not revoke a lease"),
        }
        Ok(())
    }

    /// Revokes what is left over. A record that was made on such a lease all the same goes with it, and a transaction for
    /// one that is still under way fails.
    async fn revoke_left_over(&self) -> Result<(), Error> {
        loop {
            let Some(lease) = self.left_over().first().copied() else {
                return Ok(());
            };
            self.try_revoke(lease).await?;
            self.left_over().retain(|other| *other != lease);
        }
    }

    fn left_over(&self) -> MutexGuard<'_, Vec<i64>> {
        // A list of numbers is whole at any moment.
        self.left_over.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a transaction has written. `created`: of a record that was there before.
fn written(key: &str, value: &[u8], created: Option<Revision>, lease: i64, answer: &TxnResponse) -> Record {
    let revision = Revision(answer.header().map_or(0, |header| header.revision()));
    Record {
        key: key.to_owned(),
        value: value.to_vec(),
        revision,
        created: created.unwrap_or(revision),
        ttl: ttl_id(lease),
    }
}

impl fmt::Debug for EtcdRegistry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdRegistry")
            .field("cluster", &self.cluster.name())
            .field("prefix", &self.prefix)
            .finish()
    }
}

#[async_trait]
impl Registry for EtcdRegistry {
    fn describe(&self) -> String {
        self.cluster.name().to_owned()
    }

    fn full_key(&self, key: &str) -> String {
        self.found.get().unwrap_or(&self.prefix).full(key)
    }

    async fn get(&self, key: &str) -> Result<Option<Record>, Error> {
        let prefix = self.prefix().await?;
        let full = prefix.full(key);
        let get = |connection: Connection| {
            let full = full.clone();
            async move { connection.client.kv_client().get(full, None).await }
        };
        let answer = self.call(("reading", &full), Repeat::Yes, get).await?;
        Ok(answer.kvs().first().map(|entry| record(&prefix, entry)))
    }

    async fn list(&self, start: &str) -> Result<Vec<Record>, Error> {
        let prefix = self.prefix().await?;
        Ok(self.range(&prefix, start).await?.0)
    }

    async fn watch(&self, start: &str) -> Result<(Vec<Record>, Box<dyn Watch>), Error> {
        let prefix = self.prefix().await?;
        let (picture, revision) = self.range(&prefix, start).await?;
        let start = prefix.full(start);
        let options = WatchOptions::new()
            .with_range(range_end(&start))
            .with_start_revision(revision.0 + 1)
            .with_fragment();
        let open = |connection: Connection| {
            let (start, options) = (start.clone(), options.clone());
            let mut client = connection.client.watch_client().max_decoding_message_size(MAX_ANSWER);
            async move {
                let mut stream = client.watch(start, Some(options)).await?;
                // The first answer says whether the watch is accepted; a refusal belongs to this call.
                let first = stream.message().await?;
                Ok((connection, stream, first))
            }
        };
        let (connection, stream, first) = self.call(("watching", &start), Repeat::Yes, open).await?;
        let mut watch = EtcdWatch {
            registry: self.clone(),
            connection,
            prefix,
            start,
            begun_at: revision,
            stream,
            early: Vec::new(),
        };
        watch.early = watch.events(first).await?;
        Ok((picture, Box::new(watch)))
    }

    async fn create(&self, key: &str, value: &[u8], ttl: Option<Duration>) -> Result<Option<Record>, Error> {
        let prefix = self.prefix().await?;
        let full = prefix.full(key);
        let lease = match ttl {
            Some(ttl) => {
                self.revoke_left_over().await?;
                self.grant(&full, ttl).await?
            }
            None => 0,
        };
        let put = TxnOp::put(full.as_str(), value, Some(PutOptions::new().with_lease(lease)));
        let txn = Txn::new()
            .when([Compare::version(full.as_str(), CompareOp::Equal, 0)])
            .and_then([put])
            .or_else([TxnOp::get(full.as_str(), None)]);
        // The new lease marks what is ours, so that a lost answer is no riddle: ask again and look whose record it is.
        let repeat = if lease == 0 { Repeat::No } else { Repeat::Yes };
        match self.transact("creating", &full, repeat, &txn).await {
            Ok(answer) if answer.succeeded() => Ok(Some(written(key, value, None, lease, &answer))),
            Ok(answer) => {
                let there = current(&answer).filter(|there| lease != 0 && there.lease() == lease);
                if there.is_none() && lease != 0 {
                    self.revoke(lease).await;
                }
                Ok(there.map(|there| record(&prefix, &there)))
            }
            Err(error) => {
                match error {
                    _ if lease == 0 => {}
                    // To try now would only take as long again.
                    Error::Unavailable { .. } => self.left_over().push(lease),
                    _ => self.revoke(lease).await,
                }
                Err(error)
            }
        }
    }

    async fn replace(&self, record: &Record, value: &[u8]) -> Result<Option<Record>, Error> {
        let full = self.prefix().await?.full(&record.key);
        let lease = record.ttl.map_or(0, |ttl| ttl.0);
        let put = TxnOp::put(full.as_str(), value, Some(PutOptions::new().with_lease(lease)));
        let unchanged = Compare::mod_revision(full.as_str(), CompareOp::Equal, record.revision.0);
        let txn = Txn::new().when([unchanged]).and_then([put]);
        match self.try_transact(Repeat::No, &txn).await? {
            Ok(answer) if answer.succeeded() => {
                Ok(Some(written(&record.key, value, Some(record.created), lease, &answer)))
            }
            Ok(_) | Err(Fault::NoLease) => Ok(None),
            Err(fault) => Err(self.error("replacing", &full, fault)),
        }
    }

    async fn delete(&self, record: &Record) -> Result<bool, Error> {
        let full = self.prefix().await?.full(&record.key);
        let unchanged = Compare::mod_revision(full.as_str(), CompareOp::Equal, record.revision.0);
        let txn = Txn::new()
            .when([unchanged])
            .and_then([TxnOp::delete(full.as_str(), None)]);
        let deleted = self.transact("deleting", &full, Repeat::No, &txn).await?.succeeded();
        if let (true, Some(ttl)) = (deleted, record.ttl) {
            self.revoke(ttl.0).await;
        }
        Ok(deleted)
    }

    async fn put(&self, key: &str, value: &[u8]) -> Result<(), Error> {
        let full = self.prefix().await?.full(key);
        let put = |connection: Connection| {
            let (full, value) = (full.clone(), value.to_vec());
            async move { connection.client.kv_client().put(full, value, None).await }
        };
        self.call(("writing", &full), Repeat::Yes, put).await.map(drop)
    }

    async fn refresh(&self, ttl: TtlId) -> Result<Option<Duration>, Error> {
        // The record was made although the answer was lost; the caller has found it and wants it.
        self.left_over().retain(|lease| *lease != ttl.0);
        let refresh = |connection: Connection| async move {
            let (mut keeper, mut answers) = connection.client.lease_client().keep_alive(ttl.0).await?;
            // The client keeps the first answer to itself, so ask once more to see how long there is.
            keeper.keep_alive().await?;
            Ok(answers.message().await?.map_or(0, |answer| answer.ttl()))
        };
        match self.cluster.call(Repeat::Yes, refresh).await? {
            Ok(seconds) => Ok(u64::try_from(seconds)
                .ok()
                .filter(|left| *left > 0)
                .map(Duration::from_secs)),
            Err(Fault::NoLease) => Ok(None),
            Err(fault) => Err(self.error("keeping alive", &lease_name(ttl), fault)),
        }
    }

    async fn time_left(&self, ttl: TtlId) -> Result<Option<Duration>, Error> {
        let look = |connection: Connection| async move {
            let answer = connection.client.lease_client().time_to_live(ttl.0, None).await?;
            Ok(answer.ttl())
        };
        match self.cluster.call(Repeat::Yes, look).await? {
            // Below 0 for a lease that has ended; 0 is its last second.
            Ok(seconds) => Ok(u64::try_from(seconds).ok().map(Duration::from_secs)),
            Err(Fault::NoLease) => Ok(None),
            Err(fault) => Err(self.error("looking at", &lease_name(ttl), fault)),
        }
    }

    async fn similar_configs(&self) -> Vec<String> {
        let options = GetOptions::new()
            .with_all_keys()
            .with_keys_only()
            .with_limit(MAX_KEYS_FOR_HINT);
        let look = |connection: Connection| {
            let options = options.clone();
            let mut client = connection.client.kv_client().max_decoding_message_size(MAX_ANSWER);
            async move { client.get("", Some(options)).await }
        };
        let Ok(answer) = self.call(("listing", "all keys"), Repeat::Yes, look).await else {
            return Vec::new();
        };
        let keys = answer.kvs().iter().filter_map(|entry| entry.key_str().ok());
        keys.filter(|key| key.ends_with("/config")).map(str::to_owned).collect()
    }
}

struct EtcdWatch {
    registry: EtcdRegistry,
    connection: Connection,
    prefix: Prefix,
    /// The full name that the watched keys begin with.
    start: String,
    begun_at: Revision,
    stream: WatchStream,
    /// What came with the watch's first answer.
    early: Vec<Event>,
}

#[async_trait]
impl Watch for EtcdWatch {
    fn begun_at(&self) -> Revision {
        self.begun_at
    }

    async fn next(&mut self) -> Result<Vec<Event>, Error> {
        let mut events = std::mem::take(&mut self.early);
        while events.is_empty() {
            let answer = match self.stream.message().await {
                Ok(answer) => answer,
                Err(error) => return Err(self.failed(Fault::from(error)).await),
            };
            events = self.events(answer).await?;
        }
        Ok(events)
    }
}

impl EtcdWatch {
    async fn events(&self, answer: Option<WatchResponse>) -> Result<Vec<Event>, Error> {
        let ended = match &answer {
            None => "the server has closed the watch",
            Some(answer) if answer.compact_revision() != 0 => return Err(Error::Compacted),
            Some(answer) if answer.canceled() => answer.cancel_reason(),
            Some(answer) => return Ok(answer.events().iter().filter_map(|event| self.event(event)).collect()),
        };
        // The reasons are the texts that calls fail with, but come without their codes.
        let fault = match ended {
            "etcdserver: permission denied" => Fault::from(tonic::Status::permission_denied(ended)),
            _ => Fault::from(tonic::Status::unavailable(ended)),
        };
        Err(self.failed(fault).await)
    }

    /// The error that ends this watch. The next call goes to another server if this one has failed.
    async fn failed(&self, fault: Fault) -> Error {
        let reason = match fault {
            Fault::Unreachable { reason, .. } | Fault::Broken { reason } => reason,
            Fault::NoLeader => NO_LEADER.to_owned(),
            fault => return self.registry.error("watching", &self.start, fault),
        };
        self.registry.cluster.discard(&self.connection).await;
        Error::Unavailable {
            registry: self.registry.describe(),
            reason: format!("{}: {reason}", self.registry.cluster.url(&self.connection)),
        }
    }

    fn event(&self, event: &etcd_client::Event) -> Option<Event> {
        let entry = event.kv()?;
        Some(match event.event_type() {
            EventType::Put => Event::Put(short_record(&self.prefix, entry)),
            EventType::Delete => Event::Delete {
                key: relative(&self.prefix, entry),
            },
        })
    }
}

fn record(prefix: &Prefix, entry: &KeyValue) -> Record {
    Record {
        key: relative(prefix, entry),
        value: entry.value().to_vec(),
        revision: Revision(entry.mod_revision()),
        created: Revision(entry.create_revision()),
        ttl: ttl_id(entry.lease()),
    }
}

/// One of many, without a value that would take room for nothing.
fn short_record(prefix: &Prefix, entry: &KeyValue) -> Record {
    if entry.value().len() <= LONGEST_VALUE {
        return record(prefix, entry);
    }
    let start = String::from_utf8_lossy(&entry.value()[..EXCERPT]);
    let note = format!(
        "({} bytes, too many for a record, which begin with) {start}",
        entry.value().len()
    );
    Record {
        key: relative(prefix, entry),
        value: note.into_bytes(),
        revision: Revision(entry.mod_revision()),
        created: Revision(entry.create_revision()),
        ttl: ttl_id(entry.lease()),
    }
}

fn relative(prefix: &Prefix, entry: &KeyValue) -> String {
    prefix.relative(&shown_key(entry.key())).to_owned()
}

/// A key that is no UTF-8, or too long, is none of ours; made readable and cut, it is what a message can show.
fn shown_key(key: &[u8]) -> String {
    match key.get(..LONGEST_KEY) {
        None => String::from_utf8_lossy(key).into_owned(),
        Some(start) => format!("{}…", String::from_utf8_lossy(start)),
    }
}

/// How many records are asked for at once: few at first, and so many that an answer is of the size that a server reads and we take
/// without effort.
#[derive(Debug)]
struct Page(i64);

impl Page {
    /// Values of any size that etcd takes by default make 200 MB: more than we take, but less than harms the server.
    const FIRST: i64 = 128;
    /// At some 300 bytes a lease, 2.5 MB.
    const MOST: i64 = 8_192;
    /// The size of an answer, in bytes, below which more are asked for, and above which fewer.
    const SMALL: usize = 1 << 20;
    const LARGE: usize = 4 << 20;

    fn limit(&self) -> i64 {
        self.0
    }

    /// An answer had this many bytes.
    fn adapt(&mut self, bytes: usize) {
        if bytes < Self::SMALL {
            self.0 = (self.0 * 2).min(Self::MOST);
        } else if bytes > Self::LARGE {
            self.shrink();
        }
    }

    /// An answer was too large; `false`: there is no smaller one.
    fn shrink(&mut self) -> bool {
        let before = self.0;
        self.0 = (before / 8).max(1);
        self.0 < before
    }
}

impl Default for Page {
    fn default() -> Self {
        Page(Self::FIRST)
    }
}

/// Whether the answer was there but larger than we take ([`MAX_ANSWER`]), or than the server sends (2 GiB).
fn is_too_large(status: &tonic::Status) -> bool {
    match status.code() {
        tonic::Code::OutOfRange => status.message().contains("message length too large"),
        tonic::Code::ResourceExhausted => status.message().contains("message larger than max"),
        _ => false,
    }
}

fn ttl_id(lease: i64) -> Option<TtlId> {
    (lease != 0).then_some(TtlId(lease))
}

/// The way `etcdctl lease` writes it.
fn lease_name(ttl: TtlId) -> String {
    format!("etcd lease {:x}", ttl.0)
}

/// What the `or_else` of a transaction found at its key.
fn current(answer: &TxnResponse) -> Option<KeyValue> {
    answer.op_responses().into_iter().find_map(|response| match response {
        TxnOpResponse::Get(mut found) => found.take_kvs().into_iter().next(),
        _ => None,
    })
}

/// The end of the range of keys that begin with `start`: `start` with its last byte raised by one. UTF-8 has no byte 0xff,
/// so there is no carry.
fn range_end(start: &str) -> Vec<u8> {
    let mut end = start.as_bytes().to_vec();
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_becomes_as_large_as_its_answers_allow() {
        let mut page = Page::default();
        let mut listed = 0;
        let mut calls = 0;
        while listed < 10_000 {
            listed += page.limit();
            calls += 1;
            page.adapt(300 * page.limit() as usize);
        }
        assert!(calls <= 8, "{calls}");
        let mut page = Page::default();
        while 1_500_000 * page.limit() as usize > MAX_ANSWER {
            assert!(page.shrink());
        }
        page.adapt(1_500_000 * page.limit() as usize);
        assert!(page.limit() >= 1);
        page = Page(1);
        assert!(!page.shrink());
    }

    #[test]
    fn a_key_that_is_too_long_or_no_text_can_be_shown_and_is_no_leases() {
        let long = shown_key(&[b'a'; 1_000_000]);
        assert!(long.len() < LONGEST_KEY + 4 && long.ends_with('…'));
        // Cut behind what would be a lease's key.
        let mut key = vec![b'/'; LONGEST_KEY - 11];
        key.extend(b"10.5.2.0-24 and so on");
        assert!(shown_key(&key).ends_with("10.5.2.0-24…"));
        assert_eq!(shown_key(b"/subnets/\xff\xfe"), "/subnets/\u{fffd}\u{fffd}");
    }

    #[test]
    fn a_range_ends_before_the_first_key_that_begins_otherwise() {
        assert_eq!(range_end("/n/subnets/"), b"/n/subnets0");
    }

    #[test]
    fn the_registry_names_itself_without_secrets() {
        let registry = EtcdRegistry::connect(EtcdConfig {
            endpoints: vec!["192.0.2.1".to_owned(), "http://192.0.2.2:4001".to_owned()],
            prefix: "atomic.io/network/".to_owned(),
            username: Some("root".to_owned()),
            password: Some("secret".to_owned()),
            ..EtcdConfig::default()
        })
        .unwrap();
        assert_eq!(
            registry.describe(),
            "etcd at http://192.0.2.1:2379, http://192.0.2.2:4001"
        );
        assert_eq!(registry.full_key("config"), "/atomic.io/network/config");
        assert!(!format!("{registry:?}").contains("secret"));
    }
}
