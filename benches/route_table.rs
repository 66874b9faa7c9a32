//! Route lookup and publication. The goals: at most 5 ns a lookup in a hot table, flat from 10 to 65,000 routes; and
//! one peer among 10,000 replaced in less than a millisecond.

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use flannel::route_table::{Peer, PeerId, RouteTable, Routes};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

const COUNTS: [u32; 5] = [10, 100, 1_000, 10_000, 65_000];

/// Destinations that a measurement goes through, over and over: enough that nearly every cache line of the largest table
/// is among those they hit, and few enough not to push it out of the cache themselves.
const DESTINATIONS: usize = 1 << 15;

/// Each route has its own peer, as each host has one subnet.
fn peer(number: u32) -> Peer {
    Peer {
        addr: (Ipv4Addr::from(0xc0a8_0000 + number), 8285).into(),
        id: PeerId::new(number as usize).unwrap_or_default(),
    }
}

/// The /24 with this number in 10.0.0.0/8.
fn subnet_v4(number: u32) -> IpNet {
    Ipv4Net::new_assert((0x0a00_0000 + (number << 8)).into(), 24).into()
}

/// The /64 with this number in fd00::/48.
fn subnet_v6(number: u32) -> IpNet {
    Ipv6Net::new_assert((0xfd00u128 << 112 | u128::from(number) << 64).into(), 64).into()
}

/// Subnets of four lengths in 10.0.0.0/8, and a default route: nothing that an index could hold.
fn mixed(number: u32) -> IpNet {
    match number {
        0 => Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 0).into(),
        _ => Ipv4Net::new_assert((0x0a00_0000 + (number << 8)).into(), 24 + (number % 4) as u8).into(),
    }
}

fn table(count: u32, subnet: fn(u32) -> IpNet) -> RouteTable {
    RouteTable::new((0..count).map(|number| (subnet(number), peer(number))))
}

/// Pseudo-random numbers (SplitMix64), the same in each run.
fn random() -> impl FnMut() -> u64 {
    let mut state = 0u64;
    move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }
}

/// Hosts of random subnets among the first `count`.
fn destinations(count: u32, subnet: fn(u32) -> IpNet) -> Vec<IpAddr> {
    let mut random = random();
    let mut host = || match subnet((random() % u64::from(count)) as u32).addr() {
        IpAddr::V4(first) => Ipv4Addr::from(u32::from(first) + random() as u32 % 32).into(),
        IpAddr::V6(first) => Ipv6Addr::from(u128::from(first) + u128::from(random())).into(),
    };
    (0..DESTINATIONS).map(|_| host()).collect()
}

fn lookup(c: &mut Criterion) {
    let mut group = c.benchmark_group("lookup");
    for count in COUNTS {
        let v4: Vec<Ipv4Addr> = destinations(count, subnet_v4).into_iter().filter_map(to_v4).collect();
        let routes = table(count, subnet_v4);
        group.bench_function(BenchmarkId::new("ipv4", count), |b| {
            let mut turn = 0;
            b.iter(|| {
                turn += 1;
                // The peer is read, as the sender will.
                routes.lookup_v4(v4[turn % DESTINATIONS]).map(|peer| peer.addr.port())
            });
        });

        let v6: Vec<Ipv6Addr> = destinations(count, subnet_v6).into_iter().filter_map(to_v6).collect();
        let routes = table(count, subnet_v6);
        group.bench_function(BenchmarkId::new("ipv6", count), |b| {
            let mut turn = 0;
            b.iter(|| {
                turn += 1;
                routes.lookup_v6(v6[turn % DESTINATIONS]).map(|peer| peer.addr.port())
            });
        });

        let v4: Vec<Ipv4Addr> = destinations(count, mixed).into_iter().filter_map(to_v4).collect();
        let routes = table(count, mixed);
        group.bench_function(BenchmarkId::new("mixed lengths", count), |b| {
            let mut turn = 0;
            b.iter(|| {
                turn += 1;
                routes.lookup_v4(v4[turn % DESTINATIONS]).map(|peer| peer.addr.port())
            });
        });
    }
    group.finish();
}

fn to_v4(address: IpAddr) -> Option<Ipv4Addr> {
    match address {
        IpAddr::V4(address) => Some(address),
        IpAddr::V6(_) => None,
    }
}

fn to_v6(address: IpAddr) -> Option<Ipv6Addr> {
    match address {
        IpAddr::V4(_) => None,
        IpAddr::V6(address) => Some(address),
    }
}

fn publish(c: &mut Criterion) {
    let mut group = c.benchmark_group("replace one peer of 10000");
    let mut shuffled: Vec<u32> = (0..10_000).collect();
    let mut random = random();
    for at in (1..shuffled.len()).rev() {
        shuffled.swap(at, (random() % (at as u64 + 1)) as usize);
    }
    let ordered: Vec<u32> = (0..10_000).collect();
    for (name, numbers) in [("in order", ordered), ("in random order", shuffled)] {
        for (family, subnet) in [
            ("ipv4", subnet_v4 as fn(u32) -> IpNet),
            ("ipv6", subnet_v6),
            ("mixed", mixed),
        ] {
            let mut all: Vec<(IpNet, Peer)> = numbers.iter().map(|number| (subnet(*number), peer(*number))).collect();
            let routes = Routes::default();
            let mut reader = routes.reader();
            let mut turn = 0;
            group.bench_function(BenchmarkId::new(family, name), |b| {
                b.iter(|| {
                    turn += 1;
                    let at = turn % all.len();
                    all[at].1 = peer(turn as u32);
                    routes.publish(RouteTable::new(all.iter().copied()));
                    // The reader lets go of the old table, so freeing it is measured too.
                    reader.load().len()
                });
            });
        }
    }
    group.finish();
}

fn read(c: &mut Criterion) {
    let routes = Routes::new(table(10, subnet_v4));
    let mut reader = routes.reader();
    c.bench_function("load the newest table", |b| {
        b.iter(|| black_box(&mut reader).load().is_empty())
    });
}

criterion_group!(benches, lookup, publish, read);
criterion_main!(benches);
