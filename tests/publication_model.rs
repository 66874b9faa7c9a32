//! What the workers share with the rest of the daemon without locks, under a scheduler that lets the threads take turns in thousands
//! of ways: route tables that are published while packets are under way, the counters of peers that come and go, and what the
//! kernel has refused. The counters and the refusals are the engine's own source; only the primitives below them are these here,
//! which let another thread run before each step. `arc-swap`, which publishes the tables, is taken for what it promises: one step.
//!
//! That the model finds what it is meant to find is tested, too, by faults that are put in on purpose.

#[allow(dead_code, unreachable_pub, reason = "the model uses a part of it")]
#[path = "../src/engine/counters.rs"]
mod counters;
#[allow(dead_code, unreachable_pub, reason = "the model uses a part of it")]
#[path = "../src/engine/fallbacks.rs"]
mod fallbacks;

#[allow(
    dead_code,
    unreachable_pub,
    unfulfilled_lint_expectations,
    reason = "the model uses a part of it"
)]
#[path = "../src/engine/snapshot.rs"]
mod snapshot;

/// What the engine's source finds at these places.
mod route_table {
    pub(crate) use flannel::route_table::PeerId;
}
mod offload {
    pub(crate) use flannel::offload::{GsoKind, Merge};
}

/// The primitives: the standard library's, between whose steps others may run.
mod shared {
    use std::{
        cell::Cell,
        sync::{
            Arc, Mutex,
            atomic::{self, Ordering},
        },
    };

    thread_local! {
        static MODELLED: Cell<bool> = const { Cell::new(false) };
        /// Whether two changes of one [`ArcSwap`] at a time lose one: the fault that the model has to find.
        pub(crate) static LOSING: Cell<bool> = const { Cell::new(false) };
    }

    /// Runs a body within the model: all its threads are on this one.
    pub(crate) fn modelled(body: impl FnOnce()) {
        MODELLED.set(true);
        body();
        MODELLED.set(false);
    }

    /// Another thread may run here.
    pub(crate) fn step() {
        if MODELLED.get() {
            shuttle::thread::yield_now();
        }
    }

    #[derive(Debug, Default)]
    pub(crate) struct AtomicU64(atomic::AtomicU64);

    impl AtomicU64 {
        pub(crate) fn load(&self, order: Ordering) -> u64 {
            step();
            self.0.load(order)
        }

        pub(crate) fn store(&self, value: u64, order: Ordering) {
            step();
            self.0.store(value, order);
        }
    }

    #[derive(Debug, Default)]
    pub(crate) struct AtomicBool(atomic::AtomicBool);

    impl AtomicBool {
        pub(crate) fn load(&self, order: Ordering) -> bool {
            step();
            self.0.load(order)
        }

        pub(crate) fn store(&self, value: bool, order: Ordering) {
            step();
            self.0.store(value, order);
        }

        pub(crate) fn swap(&self, value: bool, order: Ordering) -> bool {
            step();
            self.0.swap(value, order)
        }
    }

    #[derive(Debug)]
    pub(crate) struct OnceLock<T>(std::sync::OnceLock<T>);

    impl<T> OnceLock<T> {
        pub(crate) const fn new() -> Self {
            Self(std::sync::OnceLock::new())
        }

        pub(crate) fn get(&self) -> Option<&T> {
            step();
            self.0.get()
        }

        pub(crate) fn get_or_init(&self, make: impl FnOnce() -> T) -> &T {
            step();
            self.0.get_or_init(make)
        }
    }

    /// A value that is replaced as a whole: reading it is one step, and so is replacing it if it is still what was read.
    #[derive(Debug, Default)]
    pub(crate) struct ArcSwap<T>(Mutex<Arc<T>>);

    impl<T> ArcSwap<T> {
        pub(crate) fn load(&self) -> Arc<T> {
            step();
            Arc::clone(&self.0.lock().unwrap())
        }

        pub(crate) fn rcu(&self, change: impl Fn(&Arc<T>) -> Arc<T>) {
            loop {
                let before = self.load();
                let after = change(&before);
                step();
                let mut there = self.0.lock().unwrap();
                if Arc::ptr_eq(&there, &before) || LOSING.get() {
                    *there = after;
                    return;
                }
            }
        }
    }
}

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    panic::{self, AssertUnwindSafe},
    sync::{Arc, Mutex},
};

use flannel::{
    engine::{Offloads, peers::PeerIds},
    route_table::{Peer, PeerId, RouteTable, Routes},
};
use ipnet::Ipv4Net;
use shuttle::{Config, Runner, scheduler::RandomScheduler, thread};

use counters::{Counter, Counters};
use fallbacks::Fallbacks;
use shared::{modelled, step};

/// How many orders of steps are tried: in so many each of the faults below is found, and they take seconds in a debug build.
const ORDERS: usize = 500;

/// A thread's stack, in bytes. A piece of peers' counters is made on it (14 KiB), by frames that nothing has optimised.
const STACK: usize = 1 << 20;

/// Tries the body in many orders of its threads' steps.
fn in_all_orders(body: impl Fn() + Send + Sync + 'static) {
    let mut config = Config::new();
    config.stack_size = STACK;
    Runner::new(RandomScheduler::new(ORDERS), config).run(move || modelled(&body));
}

/// Whether some order makes the body fail, as a body with a fault must.
fn is_found(body: impl Fn() + Send + Sync + 'static) -> bool {
    panic::catch_unwind(AssertUnwindSafe(|| in_all_orders(body))).is_err()
}

fn host(number: u8) -> IpAddr {
    Ipv4Addr::new(192, 0, 2, number).into()
}

/// How peers get their numbers.
trait Numbers: Default + Send + 'static {
    /// The number of the peer at `address`, from now on in the table.
    fn id(&mut self, address: IpAddr) -> PeerId;
    /// The peers that are in the table now; others are not any more.
    fn only(&mut self, present: &[IpAddr]);
    /// Whose number is whose.
    fn addresses(&self) -> HashMap<PeerId, IpAddr>;
}

impl Numbers for PeerIds {
    fn id(&mut self, address: IpAddr) -> PeerId {
        PeerIds::id(self, address)
    }

    fn only(&mut self, _: &[IpAddr]) {}

    fn addresses(&self) -> HashMap<PeerId, IpAddr> {
        PeerIds::addresses(self)
    }
}

/// The fault: numbers of peers that are gone are given to others, though some worker may still have the table before.
#[derive(Default)]
struct Reused(Vec<Option<IpAddr>>);

impl Numbers for Reused {
    fn id(&mut self, address: IpAddr) -> PeerId {
        let place = self.0.iter().position(|known| *known == Some(address));
        let place = place.or_else(|| self.0.iter().position(Option::is_none));
        let place = place.unwrap_or_else(|| {
            self.0.push(None);
            self.0.len() - 1
        });
        self.0[place] = Some(address);
        PeerId::new(place + 1).unwrap()
    }

    fn only(&mut self, present: &[IpAddr]) {
        for known in &mut self.0 {
            *known = known.filter(|address| present.contains(address));
        }
    }

    fn addresses(&self) -> HashMap<PeerId, IpAddr> {
        let known = self.0.iter().enumerate();
        known
            .filter_map(|(place, address)| Some((PeerId::new(place + 1).unwrap(), (*address)?)))
            .collect()
    }
}

const SUBNET: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 5, 2, 0), 24);

/// What was counted for each address.
fn counted<N: Numbers>(workers: &[Arc<Counters>], numbers: &Mutex<N>) -> HashMap<IpAddr, u64> {
    let mut counted = HashMap::new();
    for worker in workers {
        for (id, traffic) in worker.peers().take(8) {
            let packets = traffic.sent.packets.get();
            if packets > 0 {
                let address = numbers.lock().unwrap().addresses().get(&id).copied();
                *counted
                    .entry(address.expect("whoever is counted for has a number"))
                    .or_default() += packets;
            }
        }
    }
    counted
}

/// A subnet moves from host to host while two workers send to it, and while somebody looks at the counters.
fn a_subnet_moves<N: Numbers>() {
    let routes = Routes::new(RouteTable::default());
    let numbers = Arc::new(Mutex::new(N::default()));
    let sent: Arc<Mutex<HashMap<IpAddr, u64>>> = Arc::default();
    let workers: Vec<Arc<Counters>> = (0..2).map(|_| Arc::default()).collect();
    let mut threads = Vec::new();
    for counters in &workers {
        let (counters, sent, mut reader) = (Arc::clone(counters), Arc::clone(&sent), routes.reader());
        threads.push(thread::spawn(move || {
            for _ in 0..3 {
                step();
                // As a batch goes: first all packets find their peers, then they are sent, and then they are counted.
                let destination = Ipv4Addr::new(10, 5, 2, 7);
                let batch: Vec<Peer> = (0..2).filter_map(|_| reader.load().lookup_v4(destination)).collect();
                for peer in batch {
                    step();
                    *sent.lock().unwrap().entry(peer.addr.ip()).or_default() += 1;
                    counters.peer(peer.id).sent.add(1, 100);
                }
            }
        }));
    }
    let (publishing, known) = (routes.clone(), Arc::clone(&numbers));
    threads.push(thread::spawn(move || {
        for number in [1, 2, 3, 1] {
            let address = host(number);
            let id = {
                let mut numbers = known.lock().unwrap();
                numbers.only(&[address]);
                numbers.id(address)
            };
            let addr = SocketAddr::new(address, 8285);
            publishing.publish(RouteTable::new([(SUBNET.into(), Peer { addr, id })]));
            step();
        }
    }));
    let (looked_at, known, ledger) = (workers.clone(), Arc::clone(&numbers), Arc::clone(&sent));
    threads.push(thread::spawn(move || {
        let counted = counted(&looked_at, &known);
        let sent = ledger.lock().unwrap().clone();
        for (address, packets) in counted {
            assert!(
                packets <= sent[&address],
                "{packets} counted for {address}, {sent:?} were sent"
            );
        }
    }));
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    let counted = counted(&workers, &numbers);
    assert_eq!(
        counted,
        *sent.lock().unwrap(),
        "each packet is counted for the host it was sent to"
    );
}

#[test]
fn packets_are_counted_for_the_host_they_went_to_whatever_is_published_meanwhile() {
    in_all_orders(a_subnet_moves::<PeerIds>);
}

#[test]
fn numbers_that_are_used_again_would_be_found() {
    assert!(is_found(a_subnet_moves::<Reused>));
}

/// `writers` count in one counter, and somebody reads it all the while.
fn one_counter(writers: u64) {
    let counter = Arc::new(Counter::default());
    let mut threads: Vec<_> = (0..writers)
        .map(|_| {
            let counter = Arc::clone(&counter);
            thread::spawn(move || (0..3).for_each(|_| counter.add(1)))
        })
        .collect();
    let read = Arc::clone(&counter);
    threads.push(thread::spawn(move || {
        let mut last = 0;
        for _ in 0..3 {
            let now = read.get();
            assert!(now >= last && now <= 3 * writers, "{last}, then {now}");
            last = now;
        }
    }));
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    assert_eq!(counter.get(), 3 * writers);
}

#[test]
fn a_counter_with_one_writer_loses_nothing_and_never_goes_back() {
    in_all_orders(|| one_counter(1));
}

#[test]
fn a_counter_with_two_writers_would_be_found() {
    assert!(is_found(|| one_counter(2)));
}

/// The ways to two peers refuse segmented messages at the same time; each worker has to remember its own, and the other's.
fn two_ways_refuse() {
    let fallbacks = Arc::new(Fallbacks::default());
    let peers = [host(1), host(2)].map(|address| SocketAddr::new(address, 8285));
    let threads = peers.map(|peer| {
        let fallbacks = Arc::clone(&fallbacks);
        thread::spawn(move || {
            fallbacks.route_refuses(peer, &io::Error::from_raw_os_error(libc::EIO));
            assert!(fallbacks.is_refusing(peer), "{peer} has just refused");
        })
    });
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    assert!(peers.iter().all(|peer| fallbacks.is_refusing(*peer)));
    assert_eq!(fallbacks.refusing_peers(), 2);
}

#[test]
fn no_refusal_is_forgotten_when_two_come_at_once() {
    in_all_orders(two_ways_refuse);
}

#[test]
fn a_refusal_that_overwrites_another_would_be_found() {
    shared::LOSING.set(true);
    assert!(is_found(two_ways_refuse));
    shared::LOSING.set(false);
}
