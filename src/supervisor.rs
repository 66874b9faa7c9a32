//! The supervisor that runs the daemon, such as systemd: it is told how the daemon is (`NOTIFY_SOCKET`, sd_notify(3)), and keeps
//! the daemon's descriptors in a store, so that the next process goes on where this one has ended (`FDSTORE=1`).
//!
//! What is in the store lives on when the daemon ends, by a crash too: the TUN device stays, and its queues and the tunnel's
//! sockets hold the packets that come meanwhile. Each descriptor tells by itself what it is (its device, its address and
//! port), so that two names are enough: [`QUEUES`] and [`SOCKETS`]. systemd empties the store when the unit is stopped, so that
//! the device goes then.

use std::{
    env, io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixDatagram},
    },
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use crate::{backend::Descriptors, sys::rights};

/// The names of descriptors in the store: at most 255 characters, none of them a colon (sd_pid_notify_with_fds(3)).
pub const QUEUES: &str = "flanneld-queue";
/// See [`QUEUES`].
pub const SOCKETS: &str = "flanneld-socket";

/// Where the supervisor listens.
const SOCKET: &str = "NOTIFY_SOCKET";

/// How many descriptors its store takes. systemd says so itself since v254; the unit says so for those before.
const STORE: &str = "FDSTORE";

/// How long a supervisor that is busy may take to read a message. One that hangs is no reason to hang, too.
const PATIENCE: Duration = Duration::from_secs(1);

/// The supervisor, if there is one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Supervisor {
    /// Where it listens: a path or, behind an `@`, an abstract name.
    socket: Option<String>,
    /// How many descriptors its store takes.
    store: usize,
}

impl Supervisor {
    /// The one that has started this process.
    pub fn of_this_process() -> Self {
        Self {
            socket: env::var(SOCKET).ok().filter(|socket| !socket.is_empty()),
            store: env::var(STORE)
                .ok()
                .and_then(|most| most.trim().parse().ok())
                .unwrap_or(0),
        }
    }

    /// Whether there is none.
    pub fn is_none(&self) -> bool {
        self.socket.is_none()
    }

    /// This daemon serves.
    pub fn tell_ready(&self) {
        self.tell("READY=1");
    }

    /// This daemon ends.
    pub fn tell_stopping(&self) {
        self.tell("STOPPING=1");
    }

    /// Another process is the daemon from now on.
    pub fn tell_main_process(&self, pid: u32) {
        self.tell(&format!("MAINPID={pid}"));
    }

    /// Without a supervisor there is nobody to tell, and one that does not listen is no reason to stop.
    fn tell(&self, state: &str) {
        let _ = self.send(state, &[]);
    }

    /// Puts what packets are carried through into the store, in the place of all that this daemon has there. What does not fit
    /// is left out: the next process makes that anew, and what has come meanwhile is lost.
    pub fn park(&self, descriptors: &Descriptors) {
        if self.is_none() || self.store == 0 {
            return;
        }
        // A socket that nobody reads any more would still be given its part of the datagrams.
        self.forget(QUEUES);
        self.forget(SOCKETS);
        let Descriptors { queues, sockets, .. } = descriptors;
        // The queues and the tunnel's own sockets: to nothing else do packets come.
        let needed = queues.len() + descriptors.workers();
        let (wanted, most) = (queues.len() + sockets.len(), self.store);
        if needed > most {
            warn!(
                "the supervisor's store takes {most} descriptors, and this daemon needs {needed}: a restart will lose packets. Raise \
                 FileDescriptorStoreMax= (and {STORE} in Environment=) in its unit, or lower --workers"
            );
        } else if wanted > most {
            info!(
                "the supervisor's store takes {most} descriptors of {wanted}: flows will leave by other source ports after a \
                 restart"
            );
        }
        // Half a device is of no use, and the tunnel's own sockets come before those that nothing arrives at.
        let of_queues = if queues.len() <= most { &queues[..] } else { &[] };
        let of_sockets = &sockets[..sockets.len().min(most - of_queues.len())];
        let parked = self.put(QUEUES, of_queues).and_then(|()| self.put(SOCKETS, of_sockets));
        if let Err(error) = parked {
            warn!("cannot put descriptors into the supervisor's store, so that a restart will lose packets: {error}");
        }
    }

    /// Takes out of the store what has this name.
    fn forget(&self, name: &str) {
        self.tell(&format!("FDSTOREREMOVE=1\nFDNAME={name}"));
    }

    fn put(&self, name: &str, descriptors: &[OwnedFd]) -> io::Result<()> {
        let descriptors: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
        // Without FDPOLL=0 the supervisor lets go of what reports an error, as a socket may that has been told of one by ICMP.
        let state = format!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0");
        descriptors
            .chunks(rights::MOST)
            .try_for_each(|some| self.send(&state, some))
    }

    fn send(&self, state: &str, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let Some(name) = &self.socket else { return Ok(()) };
        let socket = UnixDatagram::unbound()?;
        socket.set_write_timeout(Some(PATIENCE))?;
        match name.strip_prefix('@') {
            Some(name) => socket.connect_addr(&SocketAddr::from_abstract_name(name)?)?,
            None => socket.connect(name)?,
        }
        rights::send(socket.as_fd(), state.as_bytes(), descriptors).map(drop)
    }

    /// What an earlier process of this service has left in the store.
    pub fn left_behind(&mut self) -> Descriptors {
        let descriptors = inherited();
        // Whoever hands descriptors over has a store for them, and says how large it is or not.
        self.store = self.store.max(descriptors.queues.len() + descriptors.sockets.len());
        descriptors
    }
}

fn inherited() -> Descriptors {
    let inherited = rights::inherited().unwrap_or_else(|error| {
        warn!("cannot take the descriptors that the supervisor hands over, going on without: {error}");
        Vec::new()
    });
    let mut descriptors = Descriptors::default();
    for (name, descriptor) in inherited {
        match name.as_str() {
            QUEUES => descriptors.queues.push(descriptor),
            SOCKETS => descriptors.sockets.push(descriptor),
            other => {
                warn!("the supervisor hands over a descriptor named {other:?}, which is none of flanneld's: closing it")
            }
        }
    }
    if !descriptors.is_empty() {
        info!(
            "the supervisor has kept {} TUN queue(s) and {} UDP socket(s) of the run before",
            descriptors.queues.len(),
            descriptors.sockets.len()
        );
    }
    descriptors
}

#[cfg(test)]
mod tests {
    use std::{fs::File, path::PathBuf};

    use super::*;

    /// A supervisor that listens in a directory of a test's own.
    struct Listening {
        dir: PathBuf,
        socket: UnixDatagram,
    }

    impl Listening {
        fn new(test: &str) -> Self {
            let dir = env::temp_dir().join(format!("flannel-supervisor-{test}-{}", std::process::id()));
            std::fs::create_dir_all(&dir).unwrap();
            let socket = UnixDatagram::bind(dir.join("notify")).unwrap();
            socket.set_nonblocking(true).unwrap();
            Self { dir, socket }
        }

        fn with_store(&self, store: usize) -> Supervisor {
            Supervisor {
                socket: Some(self.dir.join("notify").to_str().unwrap().to_owned()),
                store,
            }
        }

        /// What it was told, and how many descriptors came with each.
        fn heard(&self) -> Vec<(String, usize)> {
            let mut heard = Vec::new();
            let mut buffer = [0; 256];
            while let Ok((length, descriptors)) = rights::recv(self.socket.as_fd(), &mut buffer) {
                heard.push((
                    String::from_utf8_lossy(&buffer[..length]).into_owned(),
                    descriptors.len(),
                ));
            }
            heard
        }
    }

    impl Drop for Listening {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }

    fn some(count: usize) -> Vec<OwnedFd> {
        (0..count).map(|_| File::open("/dev/null").unwrap().into()).collect()
    }

    fn descriptors(queues: usize, sockets: usize) -> Descriptors {
        Descriptors {
            queues: some(queues),
            sockets: some(sockets),
            shared: false,
        }
    }

    const QUEUE: &str = "FDSTORE=1\nFDNAME=flanneld-queue\nFDPOLL=0";
    const OF_SOCKET: &str = "FDSTORE=1\nFDNAME=flanneld-socket\nFDPOLL=0";

    #[test]
    fn descriptors_are_parked_under_two_names_as_many_as_the_store_takes() {
        let listening = Listening::new("park");
        for (store, expected) in [
            (9, vec![(QUEUE, 2), (OF_SOCKET, 4)]),
            (6, vec![(QUEUE, 2), (OF_SOCKET, 4)]),
            (5, vec![(QUEUE, 2), (OF_SOCKET, 3)]),
            (2, vec![(QUEUE, 2)]),
            (1, vec![(OF_SOCKET, 1)]),
            (0, vec![]),
        ] {
            listening.with_store(store).park(&descriptors(2, 4));
            let heard = listening.heard();
            let parked = heard.iter().map(|(state, count)| (state.as_str(), *count));
            let parked: Vec<(&str, usize)> = parked
                .filter(|(state, _)| !state.starts_with("FDSTOREREMOVE=1"))
                .collect();
            assert_eq!(parked, expected, "{store}");
            assert_eq!(heard.len() - expected.len(), if store == 0 { 0 } else { 2 });
        }
    }

    #[test]
    fn more_descriptors_than_a_message_takes_go_in_several() {
        let listening = Listening::new("many");
        listening.with_store(1_000).park(&descriptors(1, rights::MOST + 2));
        let counts: Vec<usize> = listening.heard().into_iter().map(|(_, count)| count).collect();
        assert_eq!(counts, [0, 0, 1, rights::MOST, 2]);
    }

    #[test]
    fn a_supervisor_is_told_and_one_that_is_not_there_is_missed_by_nobody() {
        let listening = Listening::new("tell");
        let supervisor = listening.with_store(0);
        supervisor.tell_ready();
        supervisor.tell_main_process(7);
        supervisor.forget(QUEUES);
        let heard: Vec<String> = listening.heard().into_iter().map(|(state, _)| state).collect();
        assert_eq!(
            heard,
            ["READY=1", "MAINPID=7", "FDSTOREREMOVE=1\nFDNAME=flanneld-queue"]
        );
        drop(listening);
        supervisor.tell_stopping();
        supervisor.park(&descriptors(1, 1));
        Supervisor::default().tell_ready();
    }
}
