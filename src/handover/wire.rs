//! What two daemons say to one another: JSON documents, each behind its length in four bytes (big endian), on a Unix stream
//! socket; descriptors go along with the first bytes of a document (`SCM_RIGHTS`).

use std::{
    collections::VecDeque,
    io,
    net::Ipv4Addr,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::{io::Interest, net::UnixStream};

use crate::{observe::status::Counts, supervisor::Supervisor, sys::rights};

/// What both must speak. See the module's documentation.
pub const MAJOR: u32 = 1;
/// What the one may know that the other does not.
pub const MINOR: u32 = 0;

/// Bytes in a document: what was exchanged with 32,768 hosts, the most that are counted by themselves, is a fifth of it.
const LONGEST: usize = 64 << 20;

/// Bytes that are read at once.
const CHUNK: usize = 64 << 10;

/// What the new daemon says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "snake_case")]
pub enum ToRunning {
    /// Asks for everything.
    Hello(Hello),
    /// It could start its workers now.
    Prepared,
    /// They run.
    Running,
}

/// What the running daemon says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "snake_case")]
pub enum ToHeir {
    /// Here is everything.
    Hello(Box<Offer>),
    /// Nothing is handed over.
    Refused {
        /// For people, on one line.
        reason: String,
    },
    /// The workers have stopped, and this is what was counted.
    Stopped(Box<Counts>),
    /// They were started again.
    TakenBack {
        /// For people, on one line.
        reason: String,
    },
    /// The new daemon is the only one.
    Released,
}

/// Who asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`MAJOR`]
    pub major: u32,
    /// [`MINOR`]
    #[serde(default)]
    pub minor: u32,
    /// The program's version.
    #[serde(default)]
    pub version: String,
}

impl Hello {
    /// This program's.
    pub fn own() -> Self {
        Self {
            major: MAJOR,
            minor: MINOR,
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }
}

/// What a running daemon has.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Offer {
    /// Who it is.
    #[serde(flatten)]
    pub hello: Hello,
    /// Its process.
    pub pid: u32,
    /// Inode of its network namespace.
    pub network_namespace: u64,
    /// `udp`, `vxlan` or `host-gw`.
    pub backend: String,
    /// Under which other hosts know it.
    pub public_ip: Ipv4Addr,
    /// Its lease, as in the lease's key: `10.5.34.0-24`.
    pub subnets: String,
    /// The record of its claim to the PublicIP, if it has one.
    #[serde(default)]
    pub claim: Option<String>,
    /// Who runs it.
    #[serde(default)]
    pub supervisor: Supervisor,
    /// What each descriptor is that comes along, in order: see [`Kind`].
    #[serde(default)]
    pub descriptors: Vec<String>,
}

/// What a descriptor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A queue of the TUN device.
    Queue,
    /// A UDP socket: first the tunnel's, one for each queue, then those of the other source ports.
    Socket,
    /// What is bound as long as the claim lives.
    Claim,
    /// The status socket.
    Status,
    /// The socket of the handover itself.
    Handover,
    /// The health port.
    Health,
}

impl Kind {
    const ALL: [Kind; 6] = [
        Self::Queue,
        Self::Socket,
        Self::Claim,
        Self::Status,
        Self::Handover,
        Self::Health,
    ];

    /// Its name in [`Offer::descriptors`].
    pub fn name(self) -> &'static str {
        match self {
            Self::Queue => "queue",
            Self::Socket => "socket",
            Self::Claim => "claim",
            Self::Status => "status",
            Self::Handover => "handover",
            Self::Health => "health",
        }
    }

    /// That of this name; `None`: a later version's.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

/// One end.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    /// What has come of the next document.
    bytes: Vec<u8>,
    descriptors: VecDeque<OwnedFd>,
}

impl Connection {
    /// For a socket that is connected.
    pub fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            bytes: Vec::new(),
            descriptors: VecDeque::new(),
        }
    }

    /// The user that the process at the other end belonged to when it connected or listened.
    ///
    /// # Errors
    /// As `getsockopt(2)`.
    pub fn user(&self) -> io::Result<u32> {
        Ok(self.stream.peer_cred()?.uid())
    }

    /// The process at the other end, if it is in a namespace that this one sees.
    pub fn process(&self) -> Option<u32> {
        let process = self.stream.peer_cred().ok()?.pid()?;
        u32::try_from(process).ok()
    }

    /// Whether the other end is there still. What it has said and was not received yet does not matter.
    pub fn is_open(&self) -> bool {
        rights::is_open(self.stream.as_fd())
    }

    /// Says something, with copies of `descriptors`.
    ///
    /// # Errors
    /// When the other end is gone.
    pub async fn send(&mut self, message: &impl Serialize, descriptors: &[OwnedFd]) -> io::Result<()> {
        let document = serde_json::to_vec(message)?;
        let length = u32::try_from(document.len()).map_err(|_| io::ErrorKind::InvalidData)?;
        let bytes = [&length.to_be_bytes()[..], &document].concat();
        let descriptors: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
        let mut sent = 0;
        for some in descriptors.chunks(rights::MOST) {
            // A byte for each load of descriptors: a document has more of those than it has loads.
            sent += self.send_some(&bytes[sent..=sent], some).await?;
        }
        while sent < bytes.len() {
            sent += self.send_some(&bytes[sent..], &[]).await?;
        }
        Ok(())
    }

    async fn send_some(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<usize> {
        let send = || rights::send(self.stream.as_fd(), bytes, descriptors);
        self.stream.async_io(Interest::WRITABLE, send).await
    }

    /// What the other end says next; `None` when it is gone. Nothing is lost when this is not waited for to the end.
    ///
    /// # Errors
    /// `InvalidData` when it is no such message.
    pub async fn recv<T: DeserializeOwned>(&mut self) -> io::Result<Option<T>> {
        loop {
            if let Some((length, rest)) = self.bytes.split_first_chunk() {
                let length = u32::from_be_bytes(*length) as usize;
                if length > LONGEST {
                    return Err(io::ErrorKind::InvalidData.into());
                }
                if let Some(document) = rest.get(..length) {
                    let message = serde_json::from_slice(document)?;
                    self.bytes.drain(..4 + length);
                    return Ok(Some(message));
                }
            }
            let mut chunk = vec![0; CHUNK];
            let recv = || rights::recv(self.stream.as_fd(), &mut chunk);
            let (count, descriptors) = match self.stream.async_io(Interest::READABLE, recv).await {
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => (0, Vec::new()),
                received => received?,
            };
            if count == 0 {
                return Ok(None);
            }
            self.bytes.extend_from_slice(&chunk[..count]);
            self.descriptors.extend(descriptors);
        }
    }

    /// The next descriptor that has come.
    pub fn take(&mut self) -> Option<OwnedFd> {
        self.descriptors.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    fn offer() -> Offer {
        Offer {
            hello: Hello::own(),
            pid: 7,
            network_namespace: 8,
            backend: "udp".to_owned(),
            public_ip: [192, 0, 2, 1].into(),
            subnets: "10.5.1.0-24".to_owned(),
            claim: None,
            supervisor: Supervisor::default(),
            descriptors: vec!["queue".to_owned()],
        }
    }

    fn pair() -> (Connection, Connection) {
        let (one, other) = UnixStream::pair().unwrap();
        (Connection::new(one), Connection::new(other))
    }

    #[tokio::test]
    async fn messages_and_more_descriptors_than_one_load_arrive() {
        let (mut one, mut other) = pair();
        let descriptors: Vec<OwnedFd> = (0..2 * rights::MOST + 1)
            .map(|_| File::open("/dev/null").unwrap().into())
            .collect();
        let hello = ToHeir::Hello(Box::new(offer()));
        let reason = "x".repeat(3 * CHUNK);
        let refused = ToHeir::Refused { reason };
        let sent = async {
            one.send(&hello, &descriptors).await.unwrap();
            one.send(&refused, &[]).await.unwrap();
            drop(one);
        };
        let received = async {
            let messages = [other.recv().await.unwrap(), other.recv().await.unwrap()];
            assert_eq!(messages, [Some(hello.clone()), Some(refused.clone())]);
            assert_eq!(other.recv::<ToHeir>().await.unwrap(), None);
        };
        tokio::join!(sent, received);
        assert_eq!(std::iter::from_fn(|| other.take()).count(), descriptors.len());
    }

    #[tokio::test]
    async fn what_a_later_version_says_besides_is_left_out() {
        let (mut one, mut other) = pair();
        let mut document = serde_json::to_value(ToHeir::Hello(Box::new(offer()))).unwrap();
        document["minor"] = 9.into();
        document["colour"] = "blue".into();
        one.send(&document, &[]).await.unwrap();
        one.send(&serde_json::json!({"message": "stopped", "weight": [1, 2]}), &[])
            .await
            .unwrap();
        let Some(ToHeir::Hello(said)) = other.recv().await.unwrap() else {
            panic!("no hello")
        };
        assert_eq!((said.hello.minor, said.pid), (9, 7));
        let stopped: Option<ToHeir> = other.recv().await.unwrap();
        assert_eq!(stopped, Some(ToHeir::Stopped(Box::default())));
        assert_eq!(Kind::named("colour"), None);
        assert!(Kind::ALL.iter().all(|kind| Kind::named(kind.name()) == Some(*kind)));
    }

    #[tokio::test]
    async fn an_end_that_is_gone_is_seen_at_once() {
        let (mut one, other) = pair();
        assert!(other.is_open());
        one.send(&ToRunning::Running, &[]).await.unwrap();
        assert!(other.is_open());
        drop(one);
        assert!(!other.is_open());
    }

    #[tokio::test]
    async fn rubbish_is_an_error() {
        for rubbish in [&b"\0\0\0\x05hello"[..], b"\xff\xff\xff\xff", b"\0\0\0\x02{}"] {
            let (one, mut other) = pair();
            one.send_some(rubbish, &[]).await.unwrap();
            let error = other.recv::<ToRunning>().await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{rubbish:?}");
        }
    }
}
