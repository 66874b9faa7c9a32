//! The life of leases as a whole, against a world of faults, in simulated time: hosts that take a lease, keep it, watch all and
//! start anew, as the daemon does, on a registry that is slow, loses answers, forgets, is cut off, or written to by others, all at
//! once. Days pass in milliseconds, and the same seed gives the same days.

use std::{
    cell::Cell,
    fmt,
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use ipnet::Ipv4Net;
use proptest::prelude::*;
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{Instant, sleep, sleep_until, timeout},
};

use super::{
    acquire::{AcquireError, acquire},
    holding::Holding,
    keep::keep,
    record::{Lease, LeaseValue, SUBNETS, Subnets, subnets_of},
    screen::Screen,
    watch::{OwnAddresses, Picture, watch as watch_leases},
};
use crate::{
    network::{CONFIG_KEY, Network},
    registry::{Error, Event, Record, Registry, Revision, TtlId, Watch, memory::MemoryRegistry},
    subnet_file::Previous,
};

const HOSTS: usize = 4;

/// Three subnets for four hosts: one waits, and takes at once what another has lost, whether that one knows or not.
const NETWORK: &str = r#"{"Network":"10.5.0.0/16","SubnetMin":"10.5.1.0","SubnetMax":"10.5.3.0"}"#;
const SUBNETS_IN_ALL: [&str; 3] = ["10.5.1.0/24", "10.5.2.0/24", "10.5.3.0/24"];

/// How long a host for which there is no subnet waits before it tries again.
const WAITING: Duration = Duration::from_secs(60);

/// The last host comes some time within this.
const COMING: Duration = Duration::from_secs(40_000);

/// `--subnet-lease-renew-margin` by default.
const MARGIN: Duration = Duration::from_secs(3_600);

/// How long a daemon waits for a registry that does not answer, and how long a silent connection goes unnoticed, as with etcd.
const PATIENCE: Duration = Duration::from_secs(5);
const SILENCE: Duration = Duration::from_secs(15);

/// For how long two hosts that can both reach the registry may believe that they have one subnet: the watch tries again within 5 s,
/// looks at the host's own record, and may have to wait for one answer.
const WATCH_DELAY: Duration = Duration::from_secs(15);

/// After this time without faults everything is as it should be: the grace for peers that a registry has lost is a minute.
const CALM: Duration = Duration::from_secs(120);

thread_local! {
    /// The dice of the world that runs in this thread.
    static DICE: Cell<Option<u64>> = const { Cell::new(None) };
}

/// What the dice show (SplitMix64); `None` outside of a world.
pub(super) fn throw() -> Option<u64> {
    let state = DICE.get()?.wrapping_add(0x9e37_79b9_7f4a_7c15);
    DICE.set(Some(state));
    let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    Some(mixed ^ (mixed >> 31))
}

/// Whether something happens that does so in so many of a hundred cases.
fn happens(percent: u64) -> bool {
    throw().is_some_and(|thrown| thrown % 100 < percent)
}

/// Up to this long.
fn a_while(most: Duration) -> Duration {
    most.mul_f64(throw().unwrap_or_default() as f64 / u64::MAX as f64)
}

/// How one host reaches the registry.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Link {
    /// How many faults cut it just now.
    cut: u32,
    /// How many make it slow, lose requests and answers, and tell changes twice.
    bad: u32,
    /// How often the registry has forgotten what the watches have not seen yet.
    compactions: u32,
}

impl Link {
    fn is_well(self) -> bool {
        self.cut == 0 && self.bad == 0
    }
}

/// The registry as one host sees it.
#[derive(Clone)]
struct Faulty {
    inner: MemoryRegistry,
    link: Arc<watch::Sender<Link>>,
}

impl fmt::Debug for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

impl Faulty {
    fn unavailable(&self, reason: &str) -> Error {
        Error::Unavailable {
            registry: self.describe(),
            reason: reason.to_owned(),
        }
    }

    /// A call over this link: it may be late, may not arrive, and its answer may not arrive.
    async fn call<T>(&self, call: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        let link = *self.link.borrow();
        if link.cut > 0 {
            sleep(PATIENCE).await;
            return Err(self.unavailable("cut off"));
        }
        if link.bad == 0 {
            return call.await;
        }
        if happens(30) {
            sleep(a_while(PATIENCE)).await;
        }
        if happens(20) {
            return Err(self.unavailable("the request was lost"));
        }
        let answer = call.await;
        if happens(20) {
            sleep(PATIENCE).await;
            return Err(self.unavailable("the answer was lost"));
        }
        answer
    }
}

#[async_trait]
impl Registry for Faulty {
    fn describe(&self) -> String {
        self.inner.describe()
    }

    fn full_key(&self, key: &str) -> String {
        self.inner.full_key(key)
    }

    async fn get(&self, key: &str) -> Result<Option<Record>, Error> {
        self.call(self.inner.get(key)).await
    }

    async fn list(&self, start: &str) -> Result<Vec<Record>, Error> {
        self.call(self.inner.list(start)).await
    }

    async fn watch(&self, start: &str) -> Result<(Vec<Record>, Box<dyn Watch>), Error> {
        let (picture, inner) = self.call(self.inner.watch(start)).await?;
        let link = self.link.subscribe();
        let compactions = link.borrow().compactions;
        let watch = FaultyWatch {
            registry: self.clone(),
            inner,
            link,
            compactions,
            late: Vec::new(),
        };
        Ok((picture, Box::new(watch)))
    }

    async fn create(&self, key: &str, value: &[u8], ttl: Option<Duration>) -> Result<Option<Record>, Error> {
        self.call(self.inner.create(key, value, ttl)).await
    }

    async fn replace(&self, record: &Record, value: &[u8]) -> Result<Option<Record>, Error> {
        self.call(self.inner.replace(record, value)).await
    }

    async fn delete(&self, record: &Record) -> Result<bool, Error> {
        self.call(self.inner.delete(record)).await
    }

    async fn put(&self, key: &str, value: &[u8]) -> Result<(), Error> {
        self.call(self.inner.put(key, value)).await
    }

    async fn refresh(&self, ttl: TtlId) -> Result<Option<Duration>, Error> {
        self.call(self.inner.refresh(ttl)).await
    }

    async fn time_left(&self, ttl: TtlId) -> Result<Option<Duration>, Error> {
        self.call(self.inner.time_left(ttl)).await
    }

    async fn similar_configs(&self) -> Vec<String> {
        self.inner.similar_configs().await
    }
}

struct FaultyWatch {
    registry: Faulty,
    inner: Box<dyn Watch>,
    link: watch::Receiver<Link>,
    compactions: u32,
    /// Told by the registry, and still under way.
    late: Vec<Event>,
}

#[async_trait]
impl Watch for FaultyWatch {
    fn begun_at(&self) -> Revision {
        self.inner.begun_at()
    }

    async fn next(&mut self) -> Result<Vec<Event>, Error> {
        loop {
            let link = *self.link.borrow_and_update();
            if link.cut > 0 {
                sleep(SILENCE).await;
                return Err(self.registry.unavailable("silent for too long"));
            }
            if link.compactions != self.compactions {
                return Err(Error::Compacted);
            }
            if !self.late.is_empty() {
                if link.bad > 0 {
                    sleep(a_while(PATIENCE)).await;
                }
                let mut events = std::mem::take(&mut self.late);
                if link.bad > 0 && happens(30) {
                    events.extend(events.clone());
                }
                return Ok(events);
            }
            tokio::select! {
                biased;
                // The sender lives as long as `registry`.
                _ = self.link.changed() => {}
                events = self.inner.next() => self.late = events?,
            }
        }
    }
}

/// What the hosts have come to believe, and what else is to be looked at in the end.
#[derive(Default)]
struct Journal {
    /// When who began to believe that it has what, or that it has nothing.
    beliefs: Vec<(Duration, usize, Option<Subnets>)>,
    /// From when to when which link was not well.
    troubles: Vec<(Duration, usize, Option<Duration>)>,
    /// What must never be, and was.
    wrong: Vec<String>,
}

/// A host, its daemon and its supervisor.
struct Host {
    /// `None`: not started, or killed.
    daemon: Option<JoinHandle<()>>,
    peers: watch::Receiver<Option<Picture>>,
    previous: Arc<Mutex<Previous>>,
}

struct World {
    begun: Instant,
    registry: MemoryRegistry,
    links: Vec<Arc<watch::Sender<Link>>>,
    hosts: Vec<Host>,
    /// When which of the faults end.
    endings: Vec<(Instant, Ending)>,
    journal: Arc<Mutex<Journal>>,
}

/// The end of a fault of one host.
#[derive(Debug, Clone, Copy)]
enum Ending {
    Cut(usize),
    Bad(usize),
    /// It is started.
    Down(usize),
}

fn value(host: usize) -> LeaseValue {
    LeaseValue::new([192, 0, 2, 1 + host as u8].into())
}

fn network() -> Network {
    Network::parse(NETWORK).unwrap().network
}

/// Runs a daemon, and starts it anew when it ends by itself, until it is aborted.
async fn supervise(
    number: usize,
    registry: Faulty,
    begun: Instant,
    previous: Arc<Mutex<Previous>>,
    publish: watch::Sender<Option<Picture>>,
    journal: Arc<Mutex<Journal>>,
) {
    let believe = |subnets| journal.lock().unwrap().beliefs.push((begun.elapsed(), number, subnets));
    loop {
        let before = *previous.lock().unwrap();
        let own = match acquire(&registry, &network(), &value(number), &before).await {
            Ok(own) => own,
            Err(AcquireError::OutOfSubnets(_)) => {
                sleep(WAITING).await;
                continue;
            }
            Err(_) => {
                sleep(PATIENCE).await;
                continue;
            }
        };
        let subnets = own.lease.subnets;
        previous.lock().unwrap().subnet = Some(subnets.v4());
        believe(Some(subnets));
        run(&registry, own, &publish, number, &journal).await;
        believe(None);
        publish.send_replace(None);
        // A supervisor's pause.
        sleep(Duration::from_secs(1)).await;
    }
}

/// From the lease to its loss, as the daemon does it.
async fn run(
    registry: &Faulty,
    own: super::acquire::Own,
    publish: &watch::Sender<Option<Picture>>,
    number: usize,
    journal: &Mutex<Journal>,
) {
    let subnets = own.lease.subnets;
    let addresses = OwnAddresses::new(own.lease.value.public_ip);
    let (_tell, here) = watch::channel(vec![Ipv4Net::new_assert(own.lease.value.public_ip, 24)]);
    let screen = Screen::new(&network(), &own.lease, here);
    let (mut ttl, mut left) = (own.lease.ttl, own.left);
    let holding = Holding::new(own, true);
    let mut held = holding.subscribe();
    let mut watching = std::pin::pin!(watch_leases(registry, &holding, &addresses, &screen, None, publish));
    let mut published = publish.subscribe();
    loop {
        let time = ttl.zip(left);
        let keeping = async {
            if let Some((ttl, left)) = time {
                keep(registry, ttl, left, MARGIN, |left| holding.renewed(left)).await;
            }
            std::future::pending().await
        };
        let mut keeping = std::pin::pin!(keeping);
        loop {
            tokio::select! {
                biased;
                _ = &mut watching => return,
                Ok(()) = held.changed() => {
                    let now = held.borrow_and_update().lease.ttl;
                    if now != ttl {
                        (ttl, left) = (now, now.map(|_| Duration::ZERO));
                        break;
                    }
                }
                Ok(()) = published.changed() => {
                    let picture = published.borrow_and_update().clone();
                    for peer in picture.iter().flat_map(|picture| picture.peers.values()) {
                        let own = peer.subnets.overlap(&subnets) || peer.value.public_ip == value(number).public_ip;
                        if own {
                            journal.lock().unwrap().wrong.push(format!("host {number} is its own peer: {peer:?}"));
                        }
                    }
                }
                never = &mut keeping => match never {},
            }
        }
    }
}

/// Something that happens to the world, or begins to: what lasts for some time overlaps with what comes next. Times are in seconds.
#[derive(Debug, Clone)]
enum Step {
    /// A host cannot reach the registry for so long.
    Cut(usize, u64),
    /// Nobody can.
    CutAll(u64),
    /// A host's link is bad for so long.
    Bad(usize, u64),
    /// A daemon is killed, and started again after so long.
    Crash(usize, u64),
    /// A host's subnet file is lost.
    Forget(usize),
    /// All running watches end.
    BreakWatches,
    /// The registry forgets what was before.
    Compact,
    /// Somebody deletes a host's lease.
    Delete(usize),
    /// Somebody deletes all of them.
    DeleteAll,
    /// Somebody writes something else over a host's lease.
    Overwrite(usize),
    /// Somebody gives a host's subnet to a host that is none of these.
    Usurp(usize),
    /// Somebody writes a record that overlaps what hosts have, or is none, or takes it away again.
    Junk(usize),
}

/// Long enough for a lease to run out, seldom.
fn a_time() -> impl Strategy<Value = u64> {
    prop_oneof![4 => 0u64..120, 2 => 120u64..7_200, 1 => 80_000u64..200_000]
}

/// A step, and how long it is until the next.
fn a_step() -> impl Strategy<Value = (Step, u64)> {
    let host = 0..HOSTS;
    let step = prop_oneof![
        3 => (host.clone(), a_time()).prop_map(|(host, time)| Step::Cut(host, time)),
        1 => a_time().prop_map(Step::CutAll),
        3 => (host.clone(), 1u64..600).prop_map(|(host, time)| Step::Bad(host, time)),
        3 => (host.clone(), a_time()).prop_map(|(host, time)| Step::Crash(host, time)),
        1 => host.clone().prop_map(Step::Forget),
        1 => Just(Step::BreakWatches),
        1 => Just(Step::Compact),
        2 => host.clone().prop_map(Step::Delete),
        1 => Just(Step::DeleteAll),
        1 => host.clone().prop_map(Step::Overwrite),
        1 => host.prop_map(Step::Usurp),
        2 => (0usize..JUNK.len()).prop_map(Step::Junk),
    ];
    (step, prop_oneof![3 => Just(0), 4 => a_time()])
}

/// Records that stand in somebody's way, or in nobody's.
const JUNK: [(&str, &str); 5] = [
    ("subnets/10.5.2.0-25", r#"{"PublicIP":"192.0.2.66"}"#),
    ("subnets/10.5.0.0-17", r#"{"PublicIP":"192.0.2.67"}"#),
    ("subnets/10.5.77.0-24", r#"{"PublicIP":"192.0.2.68"}"#),
    ("subnets/10.5.78.0-24", r#"{"PublicIP":"127.0.0.1"}"#),
    ("subnets/10.5.3", "{broken"),
];

impl World {
    fn new() -> World {
        let registry = MemoryRegistry::new();
        let begun = Instant::now();
        let journal = Arc::new(Mutex::new(Journal::default()));
        let links: Vec<_> = (0..HOSTS)
            .map(|_| Arc::new(watch::Sender::new(Link::default())))
            .collect();
        let mut world = World {
            begun,
            registry,
            links,
            hosts: Vec::new(),
            endings: Vec::new(),
            journal,
        };
        for number in 0..HOSTS {
            world.hosts.push(Host {
                daemon: None,
                peers: watch::channel(None).1,
                previous: Arc::default(),
            });
            if number < HOSTS - 1 {
                world.end(Ending::Down(number));
            } else {
                world.endings.push((begun + a_while(COMING), Ending::Down(number)));
            }
        }
        world
    }

    fn start(
        &self,
        number: usize,
        previous: &Arc<Mutex<Previous>>,
    ) -> (JoinHandle<()>, watch::Receiver<Option<Picture>>) {
        let (publish, peers) = watch::channel(None);
        let registry = Faulty {
            inner: self.registry.clone(),
            link: Arc::clone(&self.links[number]),
        };
        let (previous, journal) = (Arc::clone(previous), Arc::clone(&self.journal));
        let daemon = tokio::spawn(supervise(number, registry, self.begun, previous, publish, journal));
        (daemon, peers)
    }

    fn change_link(&self, number: usize, change: impl FnOnce(&mut Link)) {
        let now = self.begun.elapsed();
        self.links[number].send_modify(|link| {
            let before = link.is_well();
            change(link);
            let mut journal = self.journal.lock().unwrap();
            match (before, link.is_well()) {
                (true, false) => journal.troubles.push((now, number, None)),
                (false, true) => {
                    let last = journal.troubles.iter_mut().rev().find(|(_, host, _)| *host == number);
                    last.unwrap().2 = Some(now);
                }
                _ => {}
            }
        });
    }

    fn end(&mut self, ending: Ending) {
        match ending {
            Ending::Cut(host) => self.change_link(host, |link| link.cut -= 1),
            Ending::Bad(host) => self.change_link(host, |link| link.bad -= 1),
            Ending::Down(host) => {
                let previous = Arc::clone(&self.hosts[host].previous);
                let (daemon, peers) = self.start(host, &previous);
                (self.hosts[host].daemon, self.hosts[host].peers) = (Some(daemon), peers);
            }
        }
    }

    fn end_after(&mut self, seconds: u64, ending: Ending) {
        self.endings
            .push((Instant::now() + Duration::from_secs(seconds), ending));
    }

    /// Lets time pass, and what ends meanwhile end.
    async fn pass(&mut self, until: Instant) {
        loop {
            let due = self.endings.iter().enumerate().filter(|(_, (at, _))| *at <= until);
            let Some((next, _)) = due.min_by_key(|(_, (at, _))| *at) else {
                return sleep_until(until).await;
            };
            let (at, ending) = self.endings.remove(next);
            sleep_until(at).await;
            self.end(ending);
        }
    }

    /// Lets all faults end.
    async fn calm_down(&mut self) {
        let last = self.endings.iter().map(|(at, _)| *at).max();
        self.pass(last.unwrap_or_else(Instant::now) + CALM).await;
    }

    async fn delete(&self, key: &str) {
        if let Some(record) = self.registry.get(key).await.unwrap() {
            self.registry.delete(&record).await.unwrap();
        }
    }

    fn key_of(&self, host: usize) -> Option<String> {
        let subnet = self.hosts[host].previous.lock().unwrap().subnet?;
        Some(Subnets::new(subnet, None).key())
    }

    async fn take(&mut self, step: &Step) {
        match *step {
            Step::Cut(host, time) => {
                self.change_link(host, |link| link.cut += 1);
                self.end_after(time, Ending::Cut(host));
            }
            Step::CutAll(time) => {
                for host in 0..HOSTS {
                    self.change_link(host, |link| link.cut += 1);
                    self.end_after(time, Ending::Cut(host));
                }
            }
            Step::Bad(host, time) => {
                self.change_link(host, |link| link.bad += 1);
                self.end_after(time, Ending::Bad(host));
            }
            Step::Crash(host, time) => {
                if let Some(daemon) = self.hosts[host].daemon.take() {
                    daemon.abort();
                    let now = self.begun.elapsed();
                    self.journal.lock().unwrap().beliefs.push((now, host, None));
                    self.end_after(time, Ending::Down(host));
                }
            }
            Step::Forget(host) => *self.hosts[host].previous.lock().unwrap() = Previous::default(),
            Step::BreakWatches => self.registry.fail_watches(),
            Step::Compact => (0..HOSTS).for_each(|host| self.change_link(host, |link| link.compactions += 1)),
            Step::Delete(host) => {
                if let Some(key) = self.key_of(host) {
                    self.delete(&key).await;
                }
            }
            Step::DeleteAll => {
                for record in self.registry.list(SUBNETS).await.unwrap() {
                    self.registry.delete(&record).await.unwrap();
                }
            }
            Step::Overwrite(host) => {
                if let Some(key) = self.key_of(host) {
                    self.registry.put(&key, b"{broken").await.unwrap();
                }
            }
            Step::Usurp(host) => {
                if let Some(key) = self.key_of(host) {
                    let value = LeaseValue::new([192, 0, 2, 99].into()).to_bytes();
                    self.registry.put(&key, &value).await.unwrap();
                }
            }
            Step::Junk(number) => {
                let (key, value) = JUNK[number];
                match self.registry.get(key).await.unwrap() {
                    Some(_) => self.delete(key).await,
                    None => self.registry.put(key, value.as_bytes()).await.unwrap(),
                }
            }
        }
    }

    /// The peers that this host should have by what is in the registry: the obvious way to find them.
    async fn expected(&self, host: usize) -> Vec<(Subnets, std::net::Ipv4Addr)> {
        let (network, own) = (network(), self.believed(host));
        let records = self.registry.list(SUBNETS).await.unwrap();
        let mut leases: Vec<Lease> = records
            .iter()
            .filter_map(|record| Lease::from_record(record).ok())
            .collect();
        leases.retain(|lease| {
            let address = lease.value.public_ip;
            address != value(host).public_ip
                && !address.is_loopback()
                && own.is_none_or(|own| !own.overlap(&lease.subnets))
        });
        leases.sort_by_key(|lease| (!lease.subnets.fit(&network), lease.created));
        let mut peers: Vec<(Subnets, std::net::Ipv4Addr)> = Vec::new();
        for lease in leases {
            if peers.iter().all(|(subnets, _)| !subnets.overlap(&lease.subnets)) {
                peers.push((lease.subnets, lease.value.public_ip));
            }
        }
        peers.sort();
        peers
    }

    /// Whether there is a subnet that nobody has.
    async fn is_one_free(&self) -> bool {
        let records = self.registry.list(SUBNETS).await.unwrap();
        let taken: Vec<Subnets> = records.iter().filter_map(|record| subnets_of(&record.key)).collect();
        SUBNETS_IN_ALL.into_iter().any(|subnet| {
            let subnet = Subnets::from_cidrs(subnet).unwrap();
            taken.iter().all(|other| !other.overlap(&subnet))
        })
    }

    /// What this host believes that it has.
    fn believed(&self, host: usize) -> Option<Subnets> {
        let journal = self.journal.lock().unwrap();
        let mut beliefs = journal.beliefs.iter().rev();
        beliefs
            .find(|(_, who, _)| *who == host)
            .and_then(|(_, _, subnets)| *subnets)
    }
}

/// Two beliefs in one subnet at one time, while both hosts could have known better for longer than they may take.
fn conflicts(journal: &Journal, end: Duration) -> Vec<String> {
    let spans = |host: usize| {
        let mine: Vec<_> = journal.beliefs.iter().filter(|(_, who, _)| *who == host).collect();
        let ends = mine
            .iter()
            .skip(1)
            .map(|(at, _, _)| *at)
            .chain([end])
            .collect::<Vec<_>>();
        let spans = mine.into_iter().zip(ends);
        spans
            .filter_map(|((from, _, subnets), to)| Some((*from, to, (*subnets)?)))
            .collect::<Vec<_>>()
    };
    let mut found = Vec::new();
    for one in 0..HOSTS {
        for other in one + 1..HOSTS {
            for (from, to, subnets) in spans(one) {
                for (other_from, other_to, other_subnets) in spans(other) {
                    if !subnets.overlap(&other_subnets) {
                        continue;
                    }
                    // What is left of the time when the troubles of both are taken out.
                    let mut at = from.max(other_from);
                    let until = to.min(other_to);
                    let mut troubles: Vec<_> = journal
                        .troubles
                        .iter()
                        .filter(|(_, host, _)| *host == one || *host == other)
                        .map(|(from, _, to)| (*from, to.unwrap_or(end)))
                        .collect();
                    troubles.sort();
                    troubles.push((Duration::MAX, Duration::MAX));
                    for (trouble, over) in troubles {
                        if at < until && trouble.min(until).saturating_sub(at) > WATCH_DELAY {
                            found.push(format!(
                                "hosts {one} and {other} both had {subnets} from {at:?} to {:?}",
                                trouble.min(until)
                            ));
                        }
                        at = at.max(over);
                    }
                }
            }
        }
    }
    found
}

/// What came of a world.
#[derive(Debug, PartialEq, Eq)]
struct Outcome {
    beliefs: Vec<(Duration, usize, Option<Subnets>)>,
    revision: Revision,
    wrong: Vec<String>,
}

/// Lets all of this happen to a world, waits until it is calm, and looks at it.
fn live(seed: u64, steps: &[(Step, u64)]) -> Outcome {
    DICE.set(Some(seed));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    let outcome = runtime.block_on(async {
        let mut world = World::new();
        world.registry.put(CONFIG_KEY, NETWORK.as_bytes()).await.unwrap();
        world.pass(world.begun + Duration::from_secs(60)).await;
        for (step, pause) in steps {
            world.take(step).await;
            world.pass(Instant::now() + Duration::from_secs(*pause)).await;
        }
        world.calm_down().await;
        let mut wrong = Vec::new();
        for host in 0..HOSTS {
            let Some(own) = world.believed(host) else {
                if world.is_one_free().await {
                    wrong.push(format!("host {host} has no subnet, and one is free"));
                }
                continue;
            };
            let record = world.registry.get(&own.key()).await.unwrap();
            if record.is_none_or(|record| record.value != value(host).to_bytes()) {
                wrong.push(format!("host {host} believes in {own}, which is not in the registry"));
            }
            let expected = world.expected(host).await;
            let mut peers = world.hosts[host].peers.clone();
            let right = |picture: &Option<Picture>| {
                picture.as_ref().is_some_and(|picture| {
                    let peers = picture
                        .peers
                        .values()
                        .map(|lease| (lease.subnets, lease.value.public_ip));
                    peers.eq(expected.iter().copied())
                })
            };
            if timeout(Duration::from_secs(1), peers.wait_for(right)).await.is_err() {
                let found = peers.borrow().clone();
                let found = found.map(|picture| picture.peers.keys().map(ToString::to_string).collect::<Vec<_>>());
                wrong.push(format!(
                    "host {host} has the peers {found:?} and should have {expected:?}"
                ));
            }
        }
        for daemon in world.hosts.iter().filter_map(|host| host.daemon.as_ref()) {
            daemon.abort();
        }
        let revision = world
            .registry
            .list("")
            .await
            .unwrap()
            .iter()
            .map(|record| record.revision)
            .max();
        let journal = std::mem::take(&mut *world.journal.lock().unwrap());
        wrong.extend(conflicts(&journal, world.begun.elapsed()));
        wrong.extend(journal.wrong);
        Outcome {
            beliefs: journal.beliefs,
            revision: revision.unwrap_or_default(),
            wrong,
        }
    });
    DICE.set(None);
    outcome
}

/// The subnets that each host has ever believed in.
fn ever(outcome: &Outcome) -> Vec<Vec<Subnets>> {
    let of = |host| {
        let beliefs = outcome.beliefs.iter().filter(|(_, who, _)| *who == host);
        let mut subnets: Vec<Subnets> = beliefs.filter_map(|(_, _, subnets)| *subnets).collect();
        subnets.dedup();
        subnets
    };
    (0..HOSTS).map(of).collect()
}

/// Some seconds of a debug build; `PROPTEST_CASES` asks for more.
fn cases(by_default: u32) -> ProptestConfig {
    let asked = std::env::var_os("PROPTEST_CASES").is_some();
    let config = ProptestConfig::default();
    ProptestConfig {
        cases: if asked { config.cases } else { by_default },
        max_shrink_iters: 200,
        ..config
    }
}

proptest! {
    #![proptest_config(cases(16))]

    #[test]
    fn whatever_happens_no_two_hosts_keep_one_subnet_and_all_know_one_another_in_the_end(
        seed: u64,
        steps in prop::collection::vec(a_step(), 1..25),
    ) {
        let outcome = live(seed, &steps);
        prop_assert!(outcome.wrong.is_empty(), "{:#?}", outcome.wrong);
    }

    #[test]
    fn a_host_that_renews_its_lease_in_time_keeps_its_subnet(
        seed: u64,
        steps in prop::collection::vec((0..HOSTS, 0..5u8, 1u64..1_500, 0u64..600), 1..25),
    ) {
        // Less than a day, of which less than half is full of faults.
        let step = |(host, kind, time, pause)| (match kind {
            0 => Step::Cut(host, time),
            1 => Step::CutAll(time),
            2 => Step::Bad(host, time),
            3 => Step::Crash(host, time),
            _ => Step::BreakWatches,
        }, pause);
        let steps: Vec<(Step, u64)> = steps.into_iter().map(step).collect();
        let outcome = live(seed, &steps);
        prop_assert!(outcome.wrong.is_empty(), "{:#?}", outcome.wrong);
        let ever = ever(&outcome);
        prop_assert_eq!(ever.iter().flatten().count(), SUBNETS_IN_ALL.len(), "{:?}", outcome.beliefs);
        prop_assert!(ever.iter().all(|subnets| subnets.len() <= 1), "{:?}", outcome.beliefs);
    }
}

proptest! {
    #![proptest_config(cases(6))]

    #[test]
    fn the_same_seed_gives_the_same_days(seed: u64, steps in prop::collection::vec(a_step(), 1..12)) {
        prop_assert_eq!(live(seed, &steps), live(seed, &steps));
    }
}

#[test]
fn two_hosts_with_one_subnet_would_be_found() {
    let own = Subnets::new("10.5.1.0/24".parse().unwrap(), None);
    let journal = |troubles| Journal {
        beliefs: vec![
            (Duration::ZERO, 0, Some(own)),
            (Duration::from_secs(100), 1, Some(own)),
            (Duration::from_secs(200), 0, None),
        ],
        troubles,
        wrong: Vec::new(),
    };
    let end = Duration::from_secs(300);
    assert_eq!(conflicts(&journal(Vec::new()), end).len(), 1);
    let cut_off = (Duration::from_secs(50), 0, Some(Duration::from_secs(190)));
    assert_eq!(
        conflicts(&journal(vec![cut_off]), end),
        Vec::<String>::new(),
        "noticed in ten seconds"
    );
    let too_late = (Duration::from_secs(50), 0, Some(Duration::from_secs(150)));
    assert_eq!(conflicts(&journal(vec![too_late]), end).len(), 1);
}
