//! The status socket: whoever connects is given the daemon's [`Status`] as one JSON document. Only root may.
//!
//! A Unix socket with a name of its own, so that it works without a port, and while the registry is away. By hand:
//! `socat - UNIX-CONNECT:/run/flannel/subnet.sock`.

use std::{
    fs, io,
    io::Read,
    os::unix::net::UnixStream,
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

/// The status socket could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot open the status socket {}: {reason}", path.display())]
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

/// Serves until it is dropped, and removes the socket then.
#[derive(Debug)]
pub struct Server {
    path: PathBuf,
    task: JoinHandle<()>,
}

impl Server {
    /// Opens the socket at `path`, in place of one that a daemon which is gone has left.
    ///
    /// # Errors
    /// When another daemon listens there, or the directory cannot be written.
    pub fn open(path: &Path, board: Board) -> Result<Self, OpenError> {
        let listener = bind(path).map_err(|reason| OpenError {
            path: path.to_owned(),
            reason,
        })?;
        let task = tokio::spawn(async move {
            loop {
                match listener.accept().await {
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
        Ok(Self {
            path: path.to_owned(),
            task,
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
        // Gone already, or in a directory that cannot be written any more: the next daemon replaces it.
        let _ = fs::remove_file(&self.path);
    }
}

fn bind(path: &Path) -> io::Result<UnixListener> {
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
    let listener = UnixListener::bind(path);
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
        let server = Server::open(&path, board.clone()).unwrap();
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
        let _server = Server::open(&path, board.clone()).unwrap();
        let error = Server::open(&path, board).unwrap_err().to_string();
        assert!(error.contains("another flanneld listens there"), "{error}");
    }

    #[test]
    fn the_socket_lies_beside_the_subnet_file() {
        assert_eq!(
            beside(Path::new("/run/flannel/subnet.env")),
            Path::new("/run/flannel/subnet.sock")
        );
    }
}
