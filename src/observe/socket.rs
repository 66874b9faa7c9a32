//! The status socket: whoever connects is given the daemon's [`Status`] as one JSON document. Only root may.
//!
//! A Unix socket with a name of its own, so that it works without a port, and while the registry is away. By hand:
//! `socat - UNIX-CONNECT:/run/flannel/subnet.sock`.

use std::{
    fs, io,
    io::Read,
    os::{
        fd::OwnedFd,
        unix::{fs::MetadataExt, net::UnixStream},
    },
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use nix::sys::stat::{Mode, umask};
use tokio::{io::AsyncWriteExt, net::UnixListener, task::JoinHandle, time::timeout};

use super::{board::Board, status::Status};

/// How long a reader may take over a document, and a daemon that is asked may take to answer: both are on one machine.
const PATIENCE: Duration = Duration::from_secs(5);

/// How often, and with which pauses, a socket that seems to be in use is looked at again: half a second in all.
const LAST_LOOKS: u32 = 10;
const LAST_LOOK: Duration = Duration::from_millis(50);

/// The socket of the daemon that writes this subnet file: beside it, and named as it is, so that several daemons of one
/// machine (in network namespaces) keep apart.
pub fn beside(subnet_file: &Path) -> PathBuf {
    subnet_file.with_extension("sock")
}

/// A socket could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot open the socket {}: {reason}", path.display())]
pub struct OpenError {
    path: PathBuf,
    reason: io::Error,
}

/// A running daemon's status could not be had.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// Nobody listens.
    #[error(
        "no flanneld runs on this host with its status at {}: start it, or name the socket with --status-socket, or its \
         subnet file with --subnet-file", path.display()
    )]
    NotRunning {
        /// The socket.
        path: PathBuf,
    },
    /// Not root.
    #[error("may not read {}: flanneld's status is for root", path.display())]
    Denied {
        /// The socket.
        path: PathBuf,
    },
    /// It does not answer, or not with a status.
    #[error("flanneld at {} does not give its status: {reason}", path.display())]
    Failed {
        /// The socket.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

/// A socket of this daemon's, with a name that is removed when this goes.
#[derive(Debug)]
pub struct Listener {
    path: PathBuf,
    listener: std::os::unix::net::UnixListener,
    /// The file of that name, when this was opened.
    file: Option<FileId>,
    /// Whether the name is another process's to remove.
    left: bool,
}

/// Which file a name leads to: a file system may give the same number again, but not in the same nanosecond.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct FileId {
    device: u64,
    inode: u64,
    made: (i64, i64),
}

impl FileId {
    fn of(path: &Path) -> Option<Self> {
        let file = fs::metadata(path).ok()?;
        Some(Self {
            device: file.dev(),
            inode: file.ino(),
            made: (file.mtime(), file.mtime_nsec()),
        })
    }
}

impl Listener {
    /// Opens the socket at `path`, in place of one that a daemon which is gone has left. Only root may connect.
    ///
    /// # Errors
    /// When another daemon listens there, or the directory cannot be written.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let listener = bind(path).map_err(|reason| OpenError {
            path: path.to_owned(),
            reason,
        })?;
        Ok(Self {
            path: path.to_owned(),
            listener,
            file: FileId::of(path),
            left: false,
        })
    }

    /// The socket that another process has opened, if it is the one at `path`. The name is that one's until it is
    /// [claimed](Self::claim).
    pub fn adopt(path: &Path, descriptor: OwnedFd) -> Option<Self> {
        let listener = std::os::unix::net::UnixListener::from(descriptor);
        let is_it = listener
            .local_addr()
            .is_ok_and(|address| address.as_pathname() == Some(path));
        is_it.then(|| Self {
            path: path.to_owned(),
            listener,
            file: FileId::of(path),
            left: true,
        })
    }

    /// The name is this process's to remove. The socket is opened anew if its name is gone or leads elsewhere: the process that
    /// has opened it has ended without leaving it.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn claim(mut self) -> Result<Self, OpenError> {
        if self.is_in_place() {
            self.left = false;
            return Ok(self);
        }
        let path = self.path.clone();
        drop(self);
        Self::open(&path)
    }

    /// Whether who connects to the name comes here.
    fn is_in_place(&self) -> bool {
        self.file.is_some() && FileId::of(&self.path) == self.file
    }

    /// The same socket, for another process.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn hand(&self) -> io::Result<OwnedFd> {
        Ok(self.listener.try_clone()?.into())
    }

    /// Another process goes on with it: the name stays.
    pub fn leave(&mut self) {
        self.left = true;
    }

    /// It does not after all.
    pub fn stay(&mut self) {
        self.left = false;
    }

    /// To wait for those who connect.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn accept_connections(&self) -> Result<UnixListener, OpenError> {
        let connections = self.listener.set_nonblocking(true);
        let connections = connections.and_then(|()| UnixListener::from_std(self.listener.try_clone()?));
        connections.map_err(|reason| OpenError {
            path: self.path.clone(),
            reason,
        })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // What another process has put in its place is that one's.
        if !self.left && self.is_in_place() {
            // Gone already, or in a directory that cannot be written any more: the next daemon replaces it.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Serves until it is dropped.
#[derive(Debug)]
pub struct Server {
    /// The socket, which goes with the server.
    pub listener: Listener,
    task: JoinHandle<()>,
}

impl Server {
    /// Tells what is on the `board` to those who connect.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn open(listener: Listener, board: Board) -> Result<Self, OpenError> {
        let connections = listener.accept_connections()?;
        let task = tokio::spawn(async move {
            loop {
                match connections.accept().await {
                    Ok((mut stream, _)) => {
                        let board = board.clone();
                        tokio::spawn(async move {
                            // A status is made of strings, numbers and lists of them, which have a JSON form.
                            let document = serde_json::to_vec(&board.status()).unwrap_or_default();
                            // A reader that is gone, or does not read, has no use for it.
                            let _ = timeout(PATIENCE, stream.write_all(&document)).await;
                        });
                    }
                    // Out of descriptors, say: not worth a daemon's life.
                    Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
                }
            }
        });
        Ok(Self { listener, task })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn bind(path: &Path) -> io::Result<std::os::unix::net::UnixListener> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    // What a killed daemon was just starting has its socket until it runs its own program: for some milliseconds.
    let mut looks = 0;
    while UnixStream::connect(path).is_ok() {
        looks += 1;
        if looks > LAST_LOOKS {
            return Err(io::Error::other("another flanneld listens there"));
        }
        thread::sleep(LAST_LOOK);
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // The socket must not exist for a moment with more rights. The mask is the process's, but nothing else makes files while
    // this thread is here.
    let before = umask(Mode::from_bits_truncate(0o177));
    let listener = std::os::unix::net::UnixListener::bind(path);
    umask(before);
    listener
}

/// The status of the daemon that listens at `path`.
///
/// # Errors
/// See [`ReadError`].
pub fn read(path: &Path) -> Result<Status, ReadError> {
    let failed = |error: io::Error| {
        let path = path.to_owned();
        match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => ReadError::NotRunning { path },
            io::ErrorKind::PermissionDenied => ReadError::Denied { path },
            io::ErrorKind::WouldBlock => ReadError::Failed {
                path,
                reason: format!("no answer within {} s", PATIENCE.as_secs()),
            },
            _ => ReadError::Failed {
                path,
                reason: error.to_string(),
            },
        }
    };
    let mut document = Vec::new();
    let mut stream = UnixStream::connect(path).map_err(failed)?;
    stream.set_read_timeout(Some(PATIENCE)).map_err(failed)?;
    stream.read_to_end(&mut document).map_err(failed)?;
    serde_json::from_slice(&document).map_err(|error| ReadError::Failed {
        path: path.to_owned(),
        reason: format!("it is of another version: {error}"),
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// A directory of its own for each test, removed with it.
    struct Dir(PathBuf);

    impl Dir {
        fn new(name: &str) -> Self {
            let dir = std::env::temp_dir().join(format!("flannel-socket-{}-{name}", std::process::id()));
            fs::create_dir(&dir).unwrap();
            Self(dir)
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[tokio::test]
    async fn who_connects_is_given_the_status() {
        let dir = Dir::new("read");
        let path = dir.0.join("made/subnet.sock");
        let board = Board::new("a test".to_owned());
        board.waiting_for("better times");
        let server = Server::open(Listener::open(&path).unwrap(), board.clone()).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let asked = path.clone();
        let status = tokio::task::spawn_blocking(move || read(&asked))
            .await
            .unwrap()
            .unwrap();
        assert_eq!(status.waiting_for.as_deref(), Some("better times"));
        assert_eq!(status.registry.name, "a test");
        drop(server);
        assert!(matches!(read(&path), Err(ReadError::NotRunning { .. })));
    }

    #[tokio::test]
    async fn what_a_killed_daemon_has_left_is_replaced_and_a_live_one_is_not() {
        let dir = Dir::new("stale");
        let path = dir.0.join("subnet.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let board = Board::new("a test".to_owned());
        let _server = Server::open(Listener::open(&path).unwrap(), board).unwrap();
        let error = Listener::open(&path).unwrap_err().to_string();
        assert!(error.contains("another flanneld listens there"), "{error}");
    }

    #[tokio::test]
    async fn a_socket_that_is_handed_over_keeps_its_name_when_the_first_process_is_gone() {
        let dir = Dir::new("handed");
        let path = dir.0.join("subnet.sock");
        let mut first = Listener::open(&path).unwrap();
        drop(Listener::adopt(&path, first.hand().unwrap()).unwrap());
        assert!(path.exists(), "it was not claimed");
        let second = Listener::adopt(&path, first.hand().unwrap()).unwrap();
        assert!(Listener::adopt(&dir.0.join("another.sock"), first.hand().unwrap()).is_none());
        first.leave();
        drop(first);
        let second = second.claim().unwrap();
        let server = Server::open(second, Board::new("a test".to_owned())).unwrap();
        let asked = path.clone();
        let read = tokio::task::spawn_blocking(move || read(&asked));
        assert_eq!(read.await.unwrap().unwrap().registry.name, "a test");
        drop(server);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_socket_whose_name_has_gone_with_the_first_process_is_opened_anew() {
        let dir = Dir::new("anew");
        let path = dir.0.join("subnet.sock");
        let first = Listener::open(&path).unwrap();
        let second = Listener::adopt(&path, first.hand().unwrap()).unwrap();
        drop(first);
        assert!(!path.exists());
        let second = second.claim().unwrap();
        // Another's is left alone.
        fs::remove_file(&path).unwrap();
        let third = Listener::open(&path).unwrap();
        drop(second);
        let server = Server::open(third, Board::new("a test".to_owned())).unwrap();
        let read = tokio::task::spawn_blocking(move || read(&path));
        assert_eq!(read.await.unwrap().unwrap().registry.name, "a test");
        drop(server);
    }

    #[test]
    fn the_socket_lies_beside_the_subnet_file() {
        assert_eq!(
            beside(Path::new("/run/flannel/subnet.env")),
            Path::new("/run/flannel/subnet.sock")
        );
    }
}
