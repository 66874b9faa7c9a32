//! The embedded registry: a directory that the daemons of one machine share.
//!
//! Its whole state is one file, `registry.json`. A change takes an exclusive lock (`flock` on the file `lock`), reads the
//! state, writes a new one beside it, syncs it and renames it into place; so a daemon that is killed at any moment leaves
//! the whole old state or the whole new one, and the kernel drops its lock. Readers need no lock. Watches are told of the
//! rename by inotify, read the state and compare it with what they have told so far.
//!
//! File work happens on the calling task. The state of a machine's daemons is a few kilobytes and each daemon changes it
//! a few times an hour, so a thread pool would be more to go wrong than it saves. Only the wait for the lock is without
//! a bound of its own, and that one is asynchronous and ends after 5 s.

mod clock;

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::{
        fd::{AsFd, AsRawFd, RawFd},
        unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    sys::inotify::{AddWatchFlags, InitFlags, Inotify},
};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::{Mutex, MutexGuard},
    time::Instant,
};

use super::{
    Error, Event, Record, Registry, Revision, TtlId, Watch,
    prefix::Prefix,
    store::{self, Store},
};
use clock::{Boot, Clock};

const STATE_FILE: &str = "registry.json";
const NEW_STATE_FILE: &str = "registry.json.new";
const LOCK_FILE: &str = "lock";

/// The format of the state file; a file of a newer one is refused, because writing it back would lose what is new in it.
const FORMAT: u32 = 1;

/// How long a change waits for the lock. A holder keeps it for two syncs of a small file, milliseconds; even a slow disk
/// with many daemons at once stays far below.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

/// How long to wait between two tries for the lock: about as long as a holder keeps it.
const LOCK_PAUSE: Duration = Duration::from_millis(5);

/// The longest sleep of a watch until the next expiry. The sleep does not count the time for which the machine is suspended, and
/// the registry does; so look at it once a minute.
const LONGEST_SLEEP: Duration = Duration::from_secs(60);

/// A registry in a directory. Clones are handles to the same one.
#[derive(Debug, Clone)]
pub struct FileRegistry {
    directory: Arc<Path>,
    prefix: Prefix,
    boot: Option<Boot>,
    /// Tasks of this process queue here, in order, and only the first of them tries for the file lock.
    turn: Arc<Mutex<()>>,
}

/// What the state file holds.
#[derive(Serialize, Deserialize)]
struct State {
    format: u32,
    store: Store,
    /// Which time it was when this was written; none from earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    clock: Option<Clock>,
}

/// The records that are alive at a moment.
struct Picture {
    store: Store,
    now: Duration,
}

/// The part of the state file that all formats share.
#[derive(Deserialize)]
struct Format {
    format: u32,
}

/// The lock on the directory; it ends when this is dropped.
struct Locked<'a> {
    _file: Flock<File>,
    _turn: MutexGuard<'a, ()>,
}

impl FileRegistry {
    /// The registry in `directory`, which is made (mode 0755) if it is missing, for the network at `prefix`.
    ///
    /// # Errors
    /// The directory cannot be made, or what it holds is no registry that this version can read.
    pub fn open(directory: &Path, prefix: &str) -> Result<FileRegistry, Error> {
        let registry = FileRegistry {
            directory: directory.into(),
            prefix: Prefix::new(prefix),
            boot: Boot::this(),
            turn: Arc::new(Mutex::new(())),
        };
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(directory)
            .map_err(|error| registry.failed("making the directory", directory, &error))?;
        registry.read()?;
        Ok(registry)
    }

    fn path(&self, file: &str) -> PathBuf {
        self.directory.join(file)
    }

    fn failed(&self, tried: &str, path: &Path, error: &io::Error) -> Error {
        let registry = self.describe();
        let reason = format!("{tried} {} failed: {error}", path.display());
        // EACCES and EPERM.
        if error.kind() == io::ErrorKind::PermissionDenied {
            let reason = format!("{reason}; run as root, or as a user who may write to the directory and all in it");
            Error::Denied { registry, reason }
        } else {
            Error::Failed { registry, reason }
        }
    }

    /// The records that are alive. No file yet is an empty registry; anything else that is no registry is an error and is
    /// left as it is.
    fn read(&self) -> Result<Picture, Error> {
        let path = self.path(STATE_FILE);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound && self.directory.is_dir() => {
                return Ok(Picture {
                    store: Store::default(),
                    now: clock::now(None, self.boot.as_ref()),
                });
            }
            Err(error) => return Err(self.failed("reading", &path, &error)),
        };
        let unreadable = |error: serde_json::Error| Error::Failed {
            registry: self.describe(),
            reason: format!(
                "{} is not a registry ({error}): put back a good copy, or move it away to begin with an empty one",
                path.display()
            ),
        };
        let Format { format } = serde_json::from_slice(&text).map_err(unreadable)?;
        if format != FORMAT {
            return Err(Error::Failed {
                registry: self.describe(),
                reason: format!(
                    "{} has format {format} and this flanneld knows format {FORMAT}: use the flanneld that wrote it",
                    path.display()
                ),
            });
        }
        let State { mut store, clock, .. } = serde_json::from_slice(&text).map_err(unreadable)?;
        let now = clock::now(clock.as_ref(), self.boot.as_ref());
        store.expire(now);
        Ok(Picture { store, now })
    }

    /// Puts a new state in the place of the old one, at once and for good. Only for the holder of the lock.
    fn write(&self, Picture { store, now }: Picture, _lock: &Locked<'_>) -> Result<(), Error> {
        let (new, path) = (self.path(NEW_STATE_FILE), self.path(STATE_FILE));
        let write = || -> io::Result<()> {
            let mut file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o644)
                .open(&new)?;
            let mut text = serde_json::to_vec_pretty(&State {
                format: FORMAT,
                store,
                clock: self.boot.as_ref().map(|boot| Clock::at(now, boot)),
            })?;
            text.push(b'\n');
            file.write_all(&text)?;
            // Without this a power cut after the rename could leave a name without its contents.
            file.sync_all()?;
            fs::rename(&new, &path)?;
            File::open(&self.directory)?.sync_all()
        };
        write().map_err(|error| self.failed("writing", &path, &error))
    }

    /// Waits for the exclusive lock, at most 5 s.
    async fn lock(&self) -> Result<Locked<'_>, Error> {
        let path = self.path(LOCK_FILE);
        let attempt = async {
            let turn = self.turn.lock().await;
            loop {
                if let Some(file) = try_lock(&path).map_err(|error| self.failed("locking", &path, &error))? {
                    return Ok(Locked {
                        _file: file,
                        _turn: turn,
                    });
                }
                tokio::time::sleep(LOCK_PAUSE).await;
            }
        };
        tokio::time::timeout(LOCK_PATIENCE, attempt).await.unwrap_or_else(|_| {
            Err(Error::Unavailable {
                registry: self.describe(),
                reason: format!(
                    "another process has held the lock {} for {} s: find it with fuser and end it if it hangs",
                    path.display(),
                    LOCK_PATIENCE.as_secs()
                ),
            })
        })
    }

    /// Does something with the records under the lock and keeps the outcome, if it changed any.
    async fn change<T: Send>(&self, act: impl FnOnce(&mut Store, Duration) -> T + Send) -> Result<T, Error> {
        let lock = self.lock().await?;
        let mut picture = self.read()?;
        let before = picture.store.clone();
        let outcome = act(&mut picture.store, picture.now);
        if picture.store != before {
            self.write(picture, &lock)?;
        }
        Ok(outcome)
    }

    /// The records whose key begins with `start`, and how long it is until the next of all records expires.
    fn picture(&self, start: &str) -> Result<(Vec<Record>, Option<Duration>), Error> {
        let Picture { store, now } = self.read()?;
        let found = store.list(&self.prefix.full(start));
        let records = found
            .into_iter()
            .map(|record| self.prefix.relative_record(record))
            .collect();
        Ok((records, store.next_expiry().map(|expiry| expiry.saturating_sub(now))))
    }
}

/// Takes the lock if it is free.
fn try_lock(path: &Path) -> io::Result<Option<Flock<File>>> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o644)
        .open(path)?;
    try_lock_opened(file, path)
}

fn try_lock_opened(file: File, path: &Path) -> io::Result<Option<Flock<File>>> {
    let file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(file) => file,
        Err((_, Errno::EWOULDBLOCK | Errno::EINTR)) => return Ok(None),
        Err((_, errno)) => return Err(errno.into()),
    };
    // Something that tidies up may have removed the file since it was opened; a lock on it would then exclude nobody.
    let same = fs::metadata(path).is_ok_and(|there| file.metadata().is_ok_and(|own| own.ino() == there.ino()));
    Ok(same.then_some(file))
}

#[async_trait]
impl Registry for FileRegistry {
    fn describe(&self) -> String {
        format!("registry directory {}", self.directory.display())
    }

    fn full_key(&self, key: &str) -> String {
        self.prefix.full(key)
    }

    async fn get(&self, key: &str) -> Result<Option<Record>, Error> {
        Ok(self
            .read()?
            .store
            .get(&self.prefix.full(key))
            .map(|record| self.prefix.relative_record(record)))
    }

    async fn list(&self, start: &str) -> Result<Vec<Record>, Error> {
        Ok(self.picture(start)?.0)
    }

    async fn watch(&self, start: &str) -> Result<(Vec<Record>, Box<dyn Watch>), Error> {
        // First the ear, then the look: a change in between is heard.
        let changed = DirectoryWatch::new(&self.directory).map_err(|error| match error.raw_os_error() {
            Some(libc::EMFILE | libc::ENOSPC) => Error::Failed {
                registry: self.describe(),
                reason: format!("watching the directory failed: {error}: raise the sysctls under fs.inotify"),
            },
            _ => self.failed("watching", &self.directory, &error),
        })?;
        let begun_at = self.read()?.store.revision();
        let (picture, _) = self.picture(start)?;
        let watch = FileWatch {
            registry: self.clone(),
            start: start.to_owned(),
            begun_at,
            changed,
            picture: picture.clone(),
        };
        Ok((picture, Box::new(watch)))
    }

    async fn create(&self, key: &str, value: &[u8], ttl: Option<Duration>) -> Result<Option<Record>, Error> {
        let made = self
            .change(|store, now| store.create(&self.prefix.full(key), value, ttl, now))
            .await?;
        Ok(made.map(|record| self.prefix.relative_record(record)))
    }

    async fn replace(&self, record: &Record, value: &[u8]) -> Result<Option<Record>, Error> {
        let key = self.prefix.full(&record.key);
        let made = self
            .change(|store, _| store.replace(&key, record.revision, value, record.ttl))
            .await?;
        Ok(made.map(|record| self.prefix.relative_record(record)))
    }

    async fn delete(&self, record: &Record) -> Result<bool, Error> {
        let key = self.prefix.full(&record.key);
        self.change(|store, _| store.delete(&key, record.revision)).await
    }

    async fn put(&self, key: &str, value: &[u8]) -> Result<(), Error> {
        self.change(|store, _| store.put(&self.prefix.full(key), value)).await
    }

    async fn refresh(&self, ttl: TtlId) -> Result<Option<Duration>, Error> {
        self.change(|store, now| store.refresh(ttl, now)).await
    }

    async fn time_left(&self, ttl: TtlId) -> Result<Option<Duration>, Error> {
        let Picture { store, now } = self.read()?;
        Ok(store.time_left(ttl, now))
    }

    async fn similar_configs(&self) -> Vec<String> {
        self.read()
            .map(|picture| picture.store.keys_ending_in("/config"))
            .unwrap_or_default()
    }
}

struct FileWatch {
    registry: FileRegistry,
    start: String,
    begun_at: Revision,
    changed: DirectoryWatch,
    /// What has been told so far.
    picture: Vec<Record>,
}

#[async_trait]
impl Watch for FileWatch {
    fn begun_at(&self) -> Revision {
        self.begun_at
    }

    async fn next(&mut self) -> Result<Vec<Event>, Error> {
        loop {
            let (picture, next_expiry) = self.registry.picture(&self.start)?;
            let events = store::changes(&self.picture, &picture);
            self.picture = picture;
            if !events.is_empty() {
                return Ok(events);
            }
            tokio::select! {
                heard = self.changed.next() => {
                    heard.map_err(|error| self.registry.failed("watching", &self.registry.directory, &error))?;
                }
                () = tokio::time::sleep_until(Instant::now() + next_expiry.unwrap_or(LONGEST_SLEEP).min(LONGEST_SLEEP)) => {}
            }
        }
    }
}

/// What says that a watched directory is no longer where it was.
const DIRECTORY_GONE: AddWatchFlags = AddWatchFlags::IN_DELETE_SELF
    .union(AddWatchFlags::IN_MOVE_SELF)
    .union(AddWatchFlags::IN_IGNORED);

/// Tells when a state file was put into a directory or taken out of it.
struct DirectoryWatch(AsyncFd<InotifyFd>);

/// `AsyncFd` wants the raw descriptor, which nix's type does not give.
struct InotifyFd(Inotify);

impl AsRawFd for InotifyFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl DirectoryWatch {
    fn new(directory: &Path) -> io::Result<DirectoryWatch> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        // Not the writes to the new file nor the opening of the lock: only what changes the state.
        let mask = AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_MOVED_FROM
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_DELETE_SELF
            | AddWatchFlags::IN_MOVE_SELF
            | AddWatchFlags::IN_ONLYDIR;
        inotify.add_watch(directory, mask)?;
        // Its successor is unsafe, because a type may give a descriptor that it does not own; this one owns it.
        #[allow(deprecated)]
        let inotify = AsyncFd::with_interest(InotifyFd(inotify), Interest::READABLE)?;
        Ok(DirectoryWatch(inotify))
    }

    /// Waits for the next change. A change that is of no consequence is told as well; the reader finds nothing new then.
    async fn next(&mut self) -> io::Result<()> {
        loop {
            let mut ready = self.0.readable().await?;
            match ready.try_io(|inotify| inotify.get_ref().0.read_events().map_err(io::Error::from)) {
                // Even if there is a new directory of that name by now: this watch would be deaf to it.
                Ok(Ok(events)) if events.iter().any(|event| event.mask.intersects(DIRECTORY_GONE)) => {
                    return Err(io::Error::other("it was removed or moved away"));
                }
                Ok(outcome) => return outcome.map(drop),
                Err(_) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A new directory under the system's own for temporary files, removed at the end.
    struct TempDir(PathBuf);

    impl TempDir {
        fn new(name: &str) -> TempDir {
            let path = std::env::temp_dir().join(format!("flannel-file-{name}-{}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            TempDir(path)
        }
    }

    impl Drop for TempDir {
        fn drop(&mut self) {
            // A directory that is left behind in the place for temporary files is no reason to fail.
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[tokio::test]
    async fn a_state_file_that_is_no_json_is_refused_and_left_as_it_is() {
        let directory = TempDir::new("broken");
        fs::write(directory.0.join(STATE_FILE), "{broken").unwrap();
        let error = FileRegistry::open(&directory.0, "/n").unwrap_err().to_string();
        assert!(error.contains("registry.json is not a registry"), "{error}");
        assert_eq!(fs::read(directory.0.join(STATE_FILE)).unwrap(), b"{broken");
    }

    #[tokio::test]
    async fn what_this_user_may_not_do_is_not_tried_for_ever() {
        let directory = TempDir::new("denied");
        let registry = FileRegistry::open(&directory.0, "/n").unwrap();
        let error = registry.failed("writing", &directory.0, &Errno::EACCES.into());
        assert!(!error.is_transient());
        assert!(error.to_string().contains("run as root"), "{error}");
        assert!(
            registry
                .failed("writing", &directory.0, &Errno::ENOSPC.into())
                .is_transient()
        );
    }

    #[tokio::test]
    async fn a_state_file_broken_later_fails_each_call_and_is_never_overwritten() {
        let directory = TempDir::new("broken-later");
        let registry = FileRegistry::open(&directory.0, "/n").unwrap();
        fs::write(directory.0.join(STATE_FILE), "").unwrap();
        assert!(registry.get("config").await.is_err());
        assert!(registry.put("config", b"{}").await.is_err());
        assert_eq!(fs::read(directory.0.join(STATE_FILE)).unwrap(), b"");
    }

    #[tokio::test]
    async fn a_state_file_of_a_newer_format_is_refused() {
        let directory = TempDir::new("newer");
        fs::write(directory.0.join(STATE_FILE), r#"{"format":2,"shape":"unheard of"}"#).unwrap();
        let error = FileRegistry::open(&directory.0, "/n").unwrap_err().to_string();
        assert!(error.contains("has format 2"), "{error}");
    }

    #[tokio::test]
    async fn a_missing_directory_is_made_and_readable_by_all() {
        let directory = TempDir::new("made");
        let deep = directory.0.join("a/b");
        FileRegistry::open(&deep, "/n").unwrap();
        assert_eq!(fs::metadata(&deep).unwrap().mode() & 0o755, 0o755);
    }

    #[tokio::test]
    async fn a_directory_that_is_removed_is_an_error_and_not_an_empty_registry() {
        let directory = TempDir::new("removed");
        let registry = FileRegistry::open(&directory.0, "/n").unwrap();
        registry.put("config", b"{}").await.unwrap();
        let (_, mut watch) = registry.watch("").await.unwrap();
        fs::remove_dir_all(&directory.0).unwrap();
        assert!(registry.list("").await.is_err());
        // The watch may first see the file go and then the directory.
        while watch.next().await.is_ok() {}
    }

    #[tokio::test(start_paused = true)]
    async fn a_lock_held_for_long_gives_up_and_names_the_lock_file() {
        let directory = TempDir::new("held");
        let registry = FileRegistry::open(&directory.0, "/n").unwrap();
        let held = try_lock(&directory.0.join(LOCK_FILE)).unwrap().unwrap();
        let error = registry.put("config", b"{}").await.unwrap_err();
        assert!(
            matches!(&error, Error::Unavailable { reason, .. } if reason.contains("/lock")),
            "{error}"
        );
        drop(held);
        registry.put("config", b"{}").await.unwrap();
    }

    #[test]
    fn a_lock_on_a_file_that_was_removed_since_it_was_opened_does_not_count() {
        let directory = TempDir::new("lock-removed");
        let path = directory.0.join(LOCK_FILE);
        let opened = File::create(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let held = try_lock(&path).unwrap();
        assert!(held.is_some());
        assert!(try_lock_opened(opened, &path).unwrap().is_none());
    }

    #[tokio::test]
    async fn reading_neither_takes_the_lock_nor_writes() {
        let directory = TempDir::new("reading");
        let registry = FileRegistry::open(&directory.0, "/n").unwrap();
        assert!(registry.list("").await.unwrap().is_empty());
        assert_eq!(fs::read_dir(&directory.0).unwrap().count(), 0);
    }
}
