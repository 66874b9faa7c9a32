//! What a daemon last knew of its network, on disk: so that one that starts while the registry is away has its subnet and its
//! peers, and packets flow.
//!
//! It is used only while the registry does not serve this host, and only while nobody else can have been given the subnet: until
//! the lease runs out, or for ever where it is a reservation. Peers have no limit of their own. Nobody can tell which of them are
//! gone while the registry is away, and a daemon that runs keeps all of them then, too. The own lease's limit, a day, is theirs
//! as well; a host with a reservation serves peers of any age.
//!
//! The time that the lease has left is measured by the time since the machine started, which no change of the clock touches;
//! after another start of the machine by the clock, if that is not behind the time at which the file was written.

use std::{
    convert::Infallible,
    fs,
    future::pending,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::{
    sync::watch::Receiver,
    task::spawn_blocking,
    time::{Instant, sleep},
};
use tracing::warn;

use super::{
    acquire::Own,
    holding::Held,
    record::{Lease, LeaseError},
    watch::{PeerSet, Picture},
};
use crate::{
    files,
    observe::outage::Outage,
    registry::{Record, Registry, Revision, TtlId},
    sys::boot,
};

/// Of the form of the file. One of another form is not read.
const VERSION: u32 = 1;

/// How often it is written at most: a storm of thousands of changes must not make as many writes. What changed in the last
/// seconds before an end is known by the next start unless the registry went away in just these.
const PAUSE: Duration = Duration::from_secs(5);
/// After a time without changes it is less, and grows while they go on: a daemon of a kernel backend that is killed, and started without
/// the registry, withdraws what it does not find in the file.
const FIRST_PAUSE: Duration = Duration::from_secs(1);

/// So much earlier than by our count the lease counts as run out: the registry's count began before we had its answer, which
/// may take as long as a slow registry is waited for.
const MARGIN: Duration = Duration::from_secs(20);

/// For root: nobody else needs it.
const MODE: u32 = 0o600;

/// What was known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remembered {
    /// The text of the network's configuration.
    pub config: String,
    /// This host's lease, with what is left of it now.
    pub own: Own,
    /// The records of the peers.
    pub peers: Vec<Record>,
    /// How long ago that was, by the better of the two clocks.
    pub age: Duration,
}

/// Where it was known from: another registry's leases are of no use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Origin {
    registry: String,
    config_key: String,
}

impl Origin {
    /// This one.
    pub fn of(registry: &dyn Registry) -> Self {
        Self {
            registry: registry.describe(),
            // With or without the slash is found out only when the registry answers.
            config_key: registry
                .full_key(crate::network::CONFIG_KEY)
                .trim_start_matches('/')
                .to_owned(),
        }
    }
}

/// Why the file is of no use. Never a reason not to start.
#[derive(Debug, thiserror::Error)]
pub enum Useless {
    /// It is there and cannot be read.
    #[error("cannot read {}: {reason}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: io::Error,
    },
    /// It is not what a daemon of this version writes.
    #[error("{} is not what this flanneld writes ({reason})", path.display())]
    Broken {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The flags name another registry or network now.
    #[error("what {} tells is of {was}, and not of {is}", path.display())]
    Elsewhere {
        /// The file.
        path: PathBuf,
        /// Of which registry it tells.
        was: String,
        /// Which one it is now.
        is: String,
    },
    /// Another host may have the subnet by now.
    #[error("the lease {subnets} that {} tells of has run out, so that another host may have it by now", path.display())]
    Expired {
        /// The file.
        path: PathBuf,
        /// The subnets.
        subnets: String,
    },
    /// What the clock says cannot be.
    #[error(
        "the clock stands before the time at which {} was written, so that nobody can tell whether this host's lease has run \
         out", path.display()
    )]
    ClockBehind {
        /// The file.
        path: PathBuf,
    },
    /// The machine does not tell its time.
    #[error("cannot tell how long this machine has run: {0}")]
    Clock(io::Error),
}

/// A moment by all clocks there are.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Moment {
    /// The kernel's identifier of this start of the machine.
    boot: String,
    /// Since then, sleep included (`CLOCK_BOOTTIME`).
    running: Duration,
    /// Unix time.
    clock: Duration,
}

impl Moment {
    fn now() -> io::Result<Self> {
        Ok(Self {
            boot: boot::id()?,
            running: boot::uptime(),
            // A clock before 1970 is behind any file.
            clock: SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default(),
        })
    }
}

/// The file. Times are whole seconds.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct File {
    version: u32,
    #[serde(flatten)]
    origin: Origin,
    config: String,
    boot: String,
    /// Since the start of the machine, at the time of writing.
    running: u64,
    /// Unix time, at the time of writing.
    clock: u64,
    own: Entry,
    /// What was left of the own lease at the time of writing; `null`: a reservation.
    left: Option<u64>,
    peers: Vec<Entry>,
}

/// A lease's record.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Entry {
    key: String,
    value: Value,
    revision: i64,
    created: i64,
    ttl: Option<i64>,
}

impl From<&Lease> for Entry {
    fn from(lease: &Lease) -> Self {
        Self {
            key: lease.subnets.key(),
            // It is JSON, as a lease always is.
            value: serde_json::from_slice(&lease.value.to_bytes()).unwrap_or_default(),
            revision: lease.revision.0,
            created: lease.created.0,
            ttl: lease.ttl.map(|ttl| ttl.0),
        }
    }
}

impl From<Entry> for Record {
    fn from(entry: Entry) -> Self {
        Self {
            key: entry.key,
            value: entry.value.to_string().into_bytes(),
            revision: Revision(entry.revision),
            created: Revision(entry.created),
            ttl: entry.ttl.map(TtlId),
        }
    }
}

/// The file of the daemon that writes this subnet file: beside it, and named as it is, so that several daemons of one machine
/// keep apart.
pub fn beside(subnet_file: &Path) -> PathBuf {
    subnet_file.with_extension("state")
}

/// The file.
#[derive(Debug)]
pub struct Memory {
    path: PathBuf,
    /// Whether what is known is not so any more. Held while the file is changed.
    void: Arc<Mutex<bool>>,
}

impl Memory {
    /// In this file.
    pub fn new(path: PathBuf) -> Self {
        Self {
            path,
            void: Arc::default(),
        }
    }

    /// Reads the file; `None` when there is none.
    ///
    /// # Errors
    /// It is of no use.
    pub fn read(&self, origin: &Origin) -> Result<Option<Remembered>, Useless> {
        let path = &self.path;
        match fs::read(path) {
            Ok(bytes) => understand(path, &bytes, origin, &Moment::now().map_err(Useless::Clock)?).map(Some),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(reason) => Err(Useless::Unreadable {
                path: path.clone(),
                reason,
            }),
        }
    }

    /// Keeps the file up to date with what is known, for as long as this is awaited. What the registry has not confirmed was read
    /// from it, and is not written.
    pub async fn keep(
        &self,
        origin: Origin,
        config: &str,
        mut held: Receiver<Held>,
        mut pictures: Receiver<Option<Picture>>,
    ) -> Infallible {
        let mut outage = Outage::of("remembering the leases for a start without the registry");
        let (mut pause, mut last) = (FIRST_PAUSE, Instant::now());
        loop {
            let (own, others) = (held.borrow_and_update().clone(), pictures.borrow_and_update().clone());
            if let (true, Some(Picture { peers, complete: true })) = (own.confirmed, others) {
                match self.write(&origin, config, &own, &peers).await {
                    Ok(()) => outage.over(),
                    Err(reason) => {
                        sleep(outage.failed(&reason)).await;
                        continue;
                    }
                }
                if last.elapsed() > 2 * PAUSE {
                    pause = FIRST_PAUSE;
                }
                last = Instant::now();
                sleep(pause).await;
                pause = PAUSE.min(2 * pause);
            }
            // Who sends lives as long as the daemon.
            tokio::select! {
                Ok(()) = held.changed() => {}
                Ok(()) = pictures.changed() => {}
                else => pending().await,
            }
        }
    }

    async fn write(&self, origin: &Origin, config: &str, held: &Held, peers: &PeerSet) -> Result<(), String> {
        let now = Moment::now().map_err(|error| Useless::Clock(error).to_string())?;
        let text = render(origin, config, held, peers, &now);
        let (path, void) = (self.path.clone(), Arc::clone(&self.void));
        // A disk may take its time, and the control plane has but one thread.
        let written = spawn_blocking(move || {
            let void = void.lock().unwrap_or_else(PoisonError::into_inner);
            if *void {
                return Ok(());
            }
            files::replace(&path, &text, MODE)
        });
        match written.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(format!("{error}; --state-file names another place")),
            Err(error) => Err(format!("cannot write {}: {error}", self.path.display())),
        }
    }

    /// Removes the file, and writes it no more: what it tells is not so. Best effort.
    pub fn forget(&self) {
        let mut void = self.void.lock().unwrap_or_else(PoisonError::into_inner);
        *void = true;
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                warn!(
                    "cannot remove {}, which is not true any more: {error}",
                    self.path.display()
                );
            }
            _ => {}
        }
    }
}

fn understand(path: &Path, bytes: &[u8], origin: &Origin, now: &Moment) -> Result<Remembered, Useless> {
    let broken = |reason: String| Useless::Broken {
        path: path.to_owned(),
        reason,
    };
    /// Read first, since what else there is depends on it.
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Form {
        version: u32,
    }
    let form: Form = serde_json::from_slice(bytes).map_err(|error| broken(error.to_string()))?;
    if form.version != VERSION {
        return Err(broken(format!("its version is {}, not {VERSION}", form.version)));
    }
    let file: File = serde_json::from_slice(bytes).map_err(|error| broken(error.to_string()))?;
    if file.origin != *origin {
        let name = |origin: &Origin| format!("{} in {}", origin.config_key, origin.registry);
        return Err(Useless::Elsewhere {
            path: path.to_owned(),
            was: name(&file.origin),
            is: name(origin),
        });
    }
    let lease = Lease::from_record(&file.own.into()).map_err(|error: LeaseError| broken(error.to_string()))?;
    let (then, now_there) = if file.boot == now.boot {
        (file.running, now.running)
    } else {
        (file.clock, now.clock)
    };
    let age = now_there
        .checked_sub(Duration::from_secs(then))
        .ok_or_else(|| Useless::ClockBehind { path: path.to_owned() })?;
    let left = file
        .left
        .map(|left| Duration::from_secs(left).saturating_sub(age + MARGIN));
    if left == Some(Duration::ZERO) {
        return Err(Useless::Expired {
            path: path.to_owned(),
            subnets: lease.subnets.to_cidrs(),
        });
    }
    Ok(Remembered {
        config: file.config,
        own: Own { lease, left },
        peers: file.peers.into_iter().map(Record::from).collect(),
        age,
    })
}

/// The file's text.
fn render(origin: &Origin, config: &str, held: &Held, peers: &PeerSet, now: &Moment) -> Vec<u8> {
    let file = File {
        version: VERSION,
        origin: origin.clone(),
        config: config.to_owned(),
        boot: now.boot.clone(),
        running: now.running.as_secs(),
        clock: now.clock.as_secs(),
        own: Entry::from(&held.lease),
        left: held.left().map(|left| left.as_secs()),
        peers: peers.values().map(|lease| Entry::from(&**lease)).collect(),
    };
    // Strings, numbers and JSON values have a JSON form.
    serde_json::to_vec(&file).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::{net::Ipv4Addr, os::unix::fs::PermissionsExt, process};

    use tokio::sync::watch;

    use super::*;
    use crate::{
        lease::{
            holding::Holding,
            record::{LeaseValue, Subnets},
        },
        network::BackendKind,
        registry::memory::MemoryRegistry,
    };

    const CONFIG: &str = r#"{"Network":"10.5.0.0/16"}"#;
    const HOUR: Duration = Duration::from_secs(3_600);
    const DAY: Duration = Duration::from_secs(86_400);

    fn lease(number: u8) -> Lease {
        Lease {
            subnets: Subnets::new(format!("10.5.{number}.0/24").parse().unwrap(), None),
            value: LeaseValue {
                backend_type: BackendKind::Vxlan.into(),
                backend_data: Some(serde_json::json!({"VNI": 1, "VtepMAC": "d2:72:c5:90:ff:8c"})),
                ..LeaseValue::new(Ipv4Addr::new(192, 0, 2, number))
            },
            revision: Revision(number.into()),
            created: Revision(number.into()),
            ttl: Some(TtlId(1 << 60)),
        }
    }

    fn own(left: Option<Duration>) -> Own {
        Own { lease: lease(1), left }
    }

    fn peers(count: u8) -> PeerSet {
        (2..count + 2)
            .map(|number| (lease(number).subnets, Arc::new(lease(number))))
            .collect()
    }

    fn origin() -> Origin {
        Origin::of(&MemoryRegistry::new())
    }

    fn moment() -> Moment {
        Moment {
            boot: "one".to_owned(),
            running: 10 * HOUR,
            clock: 20_000 * DAY,
        }
    }

    /// What is understood at `now` of what was written at [`moment`] with this much left.
    fn after(left: Option<Duration>, now: &Moment) -> Result<Remembered, Useless> {
        let held = Holding::new(own(left), true).now();
        let text = render(&origin(), CONFIG, &held, &peers(2), &moment());
        understand(Path::new("/run/x"), &text, &origin(), now)
    }

    #[test]
    fn what_is_written_is_read() {
        let read = after(None, &moment()).unwrap();
        assert_eq!(
            (read.config.as_str(), read.own, read.age),
            (CONFIG, own(None), Duration::ZERO)
        );
        let leases = read.peers.iter().map(|record| Lease::from_record(record).unwrap());
        assert!(leases.eq([lease(2), lease(3)]));
    }

    #[test]
    fn a_peer_with_the_most_nested_value_that_is_a_lease_is_read_again() {
        let value = |levels: usize| {
            let (open, close) = ("[".repeat(levels), "]".repeat(levels));
            let text = format!(r#"{{"PublicIP":"192.0.2.2","BackendData":{open}{close}}}"#);
            LeaseValue::parse(text.as_bytes())
        };
        let deepest = (1..).take_while(|levels| value(*levels).is_ok()).last().unwrap();
        let peer = Lease {
            value: value(deepest).unwrap(),
            ..lease(2)
        };
        let held = Holding::new(own(None), true).now();
        let peers = PeerSet::from([(peer.subnets, Arc::new(peer.clone()))]);
        let text = render(&origin(), CONFIG, &held, &peers, &moment());
        let read = understand(Path::new("/run/x"), &text, &origin(), &moment()).unwrap();
        assert_eq!(Lease::from_record(&read.peers[0]).unwrap(), peer);
    }

    #[test]
    fn a_clock_that_jumps_changes_nothing_while_the_machine_runs() {
        for clock in [Duration::ZERO, 19_999 * DAY, 20_400 * DAY] {
            let now = Moment {
                running: 11 * HOUR,
                clock,
                ..moment()
            };
            let read = after(Some(DAY), &now).unwrap();
            assert_eq!(read.age, HOUR);
            let left = read.own.left.unwrap();
            // The time that the test itself takes counts, too.
            assert!(left <= 23 * HOUR - MARGIN && left > 23 * HOUR - 2 * MARGIN, "{left:?}");
        }
    }

    #[test]
    fn a_lease_that_may_have_run_out_is_of_no_use() {
        for (passed, usable) in [(22 * HOUR, true), (DAY - MARGIN, false), (100 * DAY, false)] {
            let now = Moment {
                running: 10 * HOUR + passed,
                ..moment()
            };
            let read = after(Some(DAY), &now);
            assert_eq!(read.is_ok(), usable, "{passed:?}");
            assert!(matches!(read, Ok(_) | Err(Useless::Expired { .. })));
            assert!(after(None, &now).is_ok(), "a reservation does not");
        }
    }

    #[test]
    fn after_another_start_of_the_machine_the_clock_counts_unless_it_is_behind() {
        let at = |clock| Moment {
            boot: "two".to_owned(),
            running: Duration::from_secs(30),
            clock,
        };
        assert_eq!(after(Some(DAY), &at(20_000 * DAY + HOUR)).unwrap().age, HOUR);
        assert!(matches!(
            after(Some(DAY), &at(20_001 * DAY)),
            Err(Useless::Expired { .. })
        ));
        for reservation_or_not in [None, Some(DAY)] {
            assert!(matches!(
                after(reservation_or_not, &at(Duration::ZERO)),
                Err(Useless::ClockBehind { .. })
            ));
        }
    }

    #[test]
    fn what_is_broken_or_of_another_registry_is_named_and_not_used() {
        let held = Holding::new(own(None), true).now();
        let text = render(&origin(), CONFIG, &held, &peers(1), &moment());
        let understood = |bytes: &[u8]| understand(Path::new("/run/x"), bytes, &origin(), &moment());
        for length in [0, 1, text.len() / 2, text.len() - 1] {
            let error = understood(&text[..length]).unwrap_err();
            assert!(matches!(error, Useless::Broken { .. }), "{length}: {error}");
        }
        let other_version = String::from_utf8(text.clone()).unwrap().replace(":1,", ":2,");
        let error = understood(other_version.as_bytes()).unwrap_err().to_string();
        assert!(error.contains("its version is 2, not 1"), "{error}");

        let elsewhere = Origin::of(&MemoryRegistry::new().network("/other"));
        let error = understand(Path::new("/run/x"), &text, &elsewhere, &moment()).unwrap_err();
        for part in ["/run/x", "coreos.com/network/config", "other/config"] {
            assert!(error.to_string().contains(part), "{part} is not in {error}");
        }
    }

    /// A memory in a directory of its own, removed in the end.
    struct Dir(PathBuf);

    impl Dir {
        fn new(test: &str) -> Self {
            Dir(std::env::temp_dir().join(format!("flannel-remembered-{test}-{}", process::id())))
        }

        fn memory(&self) -> Memory {
            Memory::new(self.0.join("subnet.state"))
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_storm_of_changes_makes_few_writes_and_the_last_is_known() {
        let dir = Dir::new("storm");
        let (memory, holding) = (dir.memory(), Holding::new(own(Some(DAY)), true));
        let (publish, told) = watch::channel(None);
        let keeping = memory.keep(origin(), CONFIG, holding.subscribe(), told);
        let storm = async {
            let mut writes = 0;
            let mut before = None;
            for count in 0..2_000_u32 {
                publish.send_replace(Some(Picture::complete(peers((count % 200) as u8))));
                sleep(Duration::from_millis(10)).await;
                let inode = fs::metadata(&memory.path).ok().map(|file| {
                    use std::os::unix::fs::MetadataExt;
                    (file.ino(), file.mtime_nsec(), file.size())
                });
                writes += u32::from(inode != before);
                before = inode;
            }
            sleep(2 * PAUSE).await;
            writes
        };
        let writes = tokio::select! {
            writes = storm => writes,
            never = keeping => match never {},
        };
        assert!((1..=6).contains(&writes), "{writes} writes in 20 s");
        let read = memory.read(&origin()).unwrap().unwrap();
        assert_eq!(read.peers.len(), 1_999 % 200);
        let mode = fs::metadata(&memory.path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, MODE);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_not_confirmed_is_not_written_and_what_is_forgotten_stays_so() {
        let dir = Dir::new("forgotten");
        let (memory, holding) = (dir.memory(), Holding::new(own(Some(DAY)), false));
        let (publish, told) = watch::channel(Some(Picture::complete(peers(1))));
        let keeping = memory.keep(origin(), CONFIG, holding.subscribe(), told);
        let changes = async {
            sleep(3 * PAUSE).await;
            assert_eq!(memory.read(&origin()).unwrap(), None);
            holding.found(lease(1));
            sleep(3 * PAUSE).await;
            assert!(memory.read(&origin()).unwrap().is_some());
            memory.forget();
            publish.send_replace(Some(Picture::complete(peers(2))));
            sleep(3 * PAUSE).await;
            assert_eq!(memory.read(&origin()).unwrap(), None);
        };
        tokio::select! {
            () = changes => {}
            never = keeping => match never {},
        }
    }
}
