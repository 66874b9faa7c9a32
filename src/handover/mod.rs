//! `flanneld --handover`: a daemon that is started beside the running one goes on in its place, and no packet is lost.
//!
//! | file | what |
//! | --- | --- |
//! | [`wire`] | what the two say to one another, and how |
//! | [`server`] | the running daemon: listens, offers, stops, and goes on if nothing comes of it |
//! | [`heir`] | the new daemon: asks, prepares, takes over |
//!
//! ```text
//!   new                                    running
//!    | hello                                  |   carries packets
//!    | -------------------------------------> |
//!    |              hello, with copies of all descriptors, the lease and the claim
//!    | <------------------------------------- |
//!    | reads the configuration, learns the peers, looks after rules and routes
//!    | prepared                               |
//!    | -------------------------------------> |   stops its workers: packets wait in the kernel
//!    |                     stopped, with what was counted
//!    | <------------------------------------- |
//!    | starts its workers                     |
//!    | running                                |
//!    | -------------------------------------> |
//!    |                               released |   ends with 0
//!    | <------------------------------------- |
//! ```
//! The running daemon has its own copies of the descriptors until the end. If the new one ends, or does not run in time, it starts
//! its workers again and says so (`taken_back`), upon which the new one ends. If the running daemon ends without a word, the new
//! one goes on alone.
//!
//! # Versions
//! A hello bears a major and a minor number. With another major number nothing is handed over and the running daemon goes on
//! untouched. Within one, members and kinds of descriptors may be added: those that are not known are left out. Hello's two
//! numbers and `refused` with its reason are the same in all versions.

pub mod heir;
pub mod server;
pub mod wire;

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

/// How long either may take to answer a question that needs no work.
const PATIENCE: Duration = Duration::from_secs(5);

/// The socket on which the daemon with this status socket is asked to hand over: beside it.
pub fn beside(status_socket: &Path) -> PathBuf {
    status_socket.with_extension("handover")
}

/// The network namespace that this process is in, by its inode.
pub(crate) fn network_namespace() -> io::Result<u64> {
    Ok(fs::metadata("/proc/self/ns/net")?.ino())
}
