//! The registry: where a network's configuration and its leases are kept.
//!
//! A [`Registry`] is a small transactional key-value store with keys that expire. Three of them exist: etcd v3 ([`etcd`]),
//! a directory that the daemons of one machine share ([`mod@file`]) and memory ([`memory`], for tests). All keys are relative
//! to one network's prefix (`config`, `subnets/10.5.34.0-24`, `hosts/192.0.2.1`): this layer knows nothing of what they
//! mean.
//!
//! The semantics are etcd's, and `tests/registry.rs` runs one suite against all three:
//! - every change has a [`Revision`], larger than all before it, and a record keeps the one that it was created by;
//! - a record is created only where none is, and replaced or deleted only at the revision that the caller has seen;
//! - a record may be bound to a time to live, which [`Registry::refresh`] starts anew; one that is not bound (an etcd
//!   lease of 0: a *reservation*, if it is a subnet) stays until it is deleted;
//! - [`Registry::watch`] gives what is there and then each change to it, with no gap in between. Where a key changes
//!   several times in a row, the last change is certain to be told; those before it may be left out.

pub mod etcd;
pub mod file;
pub mod memory;
mod prefix;
pub mod store;

use std::{fmt, time::Duration};

use async_trait::async_trait;

/// The longest value that lists and watches give, in bytes: twice the longest lease of this program's backends and of flannel's
/// others that have one shape (some 250 bytes: dual stack, with a MAC or a key for each family). A longer one is junk, or of a
/// backend that is not this host's, and thousands of them would fill the memory; a note about it, which is no JSON, stands in its
/// place. The registry that only root can write to gives all as it is.
pub const LONGEST_VALUE: usize = 512;

/// The number of a change. Grows with each change to the whole registry; never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Revision(pub i64);

/// What a record's time to live hangs on (an etcd lease). Opaque to all but the registry that gave it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TtlId(pub i64);

/// One key and its value as the registry holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The key, relative to the network's prefix, without a leading slash.
    pub key: String,
    /// The value, as it is stored; of one among many that is [too long](LONGEST_VALUE) a note in its place.
    pub value: Vec<u8>,
    /// The change that made this value.
    pub revision: Revision,
    /// The change that made the record, which it has had since, whatever was written into it: its age.
    pub created: Revision,
    /// What the record's life hangs on; `None`: it never expires.
    pub ttl: Option<TtlId>,
}

/// A change seen by a [`Watch`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A record was created or replaced.
    Put(Record),
    /// A record was deleted or has expired. The key is relative to the prefix.
    Delete {
        /// Which record is gone.
        key: String,
    },
}

/// A running watch. Dropping it ends it.
#[async_trait]
pub trait Watch: Send {
    /// The registry's revision when its picture was taken. One that is lower than a revision seen before tells that the registry
    /// has lost data.
    fn begun_at(&self) -> Revision;

    /// The next changes, in order; at least one. Nothing is lost when the future is dropped before it is ready.
    ///
    /// # Errors
    /// Whatever ended the watch: the connection, a compaction, a lost leader. The watch is over then; what it missed is
    /// found by calling [`Registry::watch`] again and comparing.
    async fn next(&mut self) -> Result<Vec<Event>, Error>;
}

/// A store of records; see the module's text for what holds.
#[async_trait]
pub trait Registry: Send + Sync + fmt::Debug {
    /// For people: what kind of registry and where, without secrets (`etcd at http://192.0.2.1:2379`).
    fn describe(&self) -> String;

    /// For people: the full name of a key, prefix included, as the user would type it (`/coreos.com/network/config`).
    fn full_key(&self, key: &str) -> String;

    /// The record at `key`, if any.
    async fn get(&self, key: &str) -> Result<Option<Record>, Error>;

    /// All records whose key begins with `start`, by key.
    async fn list(&self, start: &str) -> Result<Vec<Record>, Error>;

    /// All records whose key begins with `start`, and a watch of each change after that picture.
    async fn watch(&self, start: &str) -> Result<(Vec<Record>, Box<dyn Watch>), Error>;

    /// Makes a record where there is none: `None` when there is one. With a `ttl` it expires unless refreshed.
    async fn create(&self, key: &str, value: &[u8], ttl: Option<Duration>) -> Result<Option<Record>, Error>;

    /// Gives a record a new value, bound to `record.ttl`, which is its own time to live or, where that was taken away by a `put`,
    /// the one that it had: `None` when it has changed or gone since it was read, or that time has run out.
    async fn replace(&self, record: &Record, value: &[u8]) -> Result<Option<Record>, Error>;

    /// Deletes a record: `false` when it has changed or gone since it was read.
    async fn delete(&self, record: &Record) -> Result<bool, Error>;

    /// Writes a record that never expires, whatever is there (for configuration, which people write).
    async fn put(&self, key: &str, value: &[u8]) -> Result<(), Error>;

    /// Starts the time to live anew: how long it now has, or `None` when it has run out already.
    async fn refresh(&self, ttl: TtlId) -> Result<Option<Duration>, Error>;

    /// How long the time to live still has, or `None` when it has run out.
    async fn time_left(&self, ttl: TtlId) -> Result<Option<Duration>, Error>;

    /// Full names of keys, anywhere in this registry, that look like the configuration of some network: for the message
    /// to a user whose prefix is wrong. Best effort: empty when it cannot be told.
    async fn similar_configs(&self) -> Vec<String>;
}

/// Why a registry could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be reached just now; trying again may help.
    #[error("{registry} cannot be reached: {reason}")]
    Unavailable {
        /// As [`Registry::describe`] says it.
        registry: String,
        /// Each endpoint tried and why it failed, for people.
        reason: String,
    },
    /// It refuses this client: wrong password, no permission, certificate not accepted. Trying again will not help.
    #[error("{registry} refuses this client: {reason}")]
    Denied {
        /// As [`Registry::describe`] says it.
        registry: String,
        /// What the registry said and what to check.
        reason: String,
    },
    /// The watched past is no longer there; take a new picture and compare.
    #[error("the registry has compacted the changes since this watch began")]
    Compacted,
    /// Anything else, with what was tried.
    #[error("{registry}: {reason}")]
    Failed {
        /// As [`Registry::describe`] says it.
        registry: String,
        /// What was tried and why it failed.
        reason: String,
    },
}

impl Error {
    /// Whether the same call may succeed later with nothing else changed.
    pub fn is_transient(&self) -> bool {
        !matches!(self, Error::Denied { .. })
    }
}
