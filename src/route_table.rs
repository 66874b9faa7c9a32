//! Destination to peer: an immutable table, built from all routes at once, and its publication to the workers.
//!
//! A table never changes. Whoever learns of a new set of routes builds a new table and publishes it through [`Routes`];
//! each worker holds a [`RoutesReader`] and picks the newest table up once per batch, without a lock and without a
//! reference count per packet.
//!
//! # Layout
//! The overlay's subnets lie close together and have one length, nearly always. So each family has its slots in an
//! array, one for each block of the longest prefix length, from the first route to the last: a lookup is
//! `(destination - base) >> shift` and one read, however many routes there are. Shorter prefixes fill several slots.
//!
//! Where that takes more than [`MAX_SLOTS`] slots (a default route, IPv6 subnets far apart), the prefixes are flattened
//! into disjoint intervals, which a binary search finds. Both are written once, for both families.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::NonZeroU32;
use std::sync::Arc;

use arc_swap::ArcSwap;
use arc_swap::cache::Cache;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// The most slots that a family's array may have.
///
/// 2^16 slots are every /24 of a /8, the largest network that people give to an overlay. Twice that leaves room for one
/// subnet length more, and at four bytes a slot is 512 KiB: the array stays in a server core's second level cache.
pub const MAX_SLOTS: usize = 1 << 17;

/// Where packets for a subnet go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Peer {
    /// The underlay address and port that the subnet's host receives datagrams on.
    pub addr: SocketAddr,
}

/// All routes of one moment. Longest prefix wins.
#[derive(Debug, Default)]
pub struct RouteTable {
    v4: Family<Ipv4Net>,
    v6: Family<Ipv6Net>,
}

impl RouteTable {
    /// A table of these routes. Host bits of a prefix are ignored; of routes with the same prefix the last one wins.
    ///
    /// The time is that of a stable sort, which is linear for routes that come in order.
    pub fn new(routes: impl IntoIterator<Item = (IpNet, Peer)>) -> Self {
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        for (net, peer) in routes {
            match net {
                IpNet::V4(net) => v4.push((net.trunc(), peer)),
                IpNet::V6(net) => v6.push((net.trunc(), peer)),
            }
        }
        Self {
            v4: Family::new(v4),
            v6: Family::new(v6),
        }
    }

    /// The peer of the longest prefix that covers `dst`.
    #[inline]
    pub fn lookup(&self, dst: IpAddr) -> Option<&Peer> {
        match dst {
            IpAddr::V4(dst) => self.lookup_v4(dst),
            IpAddr::V6(dst) => self.lookup_v6(dst),
        }
    }

    /// The same for an IPv4 destination.
    #[inline]
    pub fn lookup_v4(&self, dst: Ipv4Addr) -> Option<&Peer> {
        self.v4.lookup(dst.into())
    }

    /// The same for an IPv6 destination.
    #[inline]
    pub fn lookup_v6(&self, dst: Ipv6Addr) -> Option<&Peer> {
        self.v6.lookup(dst.into())
    }

    /// Number of routes with different prefixes.
    pub fn len(&self) -> usize {
        self.v4.peers.len() + self.v6.peers.len()
    }

    /// Whether there is no route at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All routes, IPv4 before IPv6, each family by address and then by length.
    pub fn iter(&self) -> impl Iterator<Item = (IpNet, &Peer)> {
        self.v4.iter().chain(self.v6.iter())
    }
}

/// The routes of one address family.
#[derive(Debug)]
struct Family<P: Prefix> {
    /// In order, each before those that lie within it.
    prefixes: Box<[P]>,
    /// The peers of `prefixes`, at the same indices.
    peers: Box<[Peer]>,
    layout: Layout<P::Number>,
}

impl<P: Prefix> Default for Family<P> {
    fn default() -> Self {
        Self::new(Vec::new())
    }
}

impl<P: Prefix> Family<P> {
    fn new(mut routes: Vec<(P, Peer)>) -> Self {
        routes.sort_by_key(|(prefix, _)| *prefix);
        routes.dedup_by(|(prefix, peer), (kept_prefix, kept_peer)| {
            let same = prefix == kept_prefix;
            if same {
                *kept_peer = *peer;
            }
            same
        });
        let (prefixes, peers): (Vec<_>, Vec<_>) = routes.into_iter().unzip();
        let layout = Layout::new(&prefixes);
        Self {
            prefixes: prefixes.into(),
            peers: peers.into(),
            layout,
        }
    }

    #[inline]
    fn lookup(&self, dst: P::Number) -> Option<&Peer> {
        let route = self.layout.lookup(dst)?;
        self.peers.get(route.get() as usize - 1)
    }

    fn iter(&self) -> impl Iterator<Item = (IpNet, &Peer)> {
        self.prefixes.iter().map(|prefix| (*prefix).into()).zip(&self.peers)
    }
}

/// The index of a route plus one, or `None` where no route is: four bytes, and an array of `None` comes zeroed from the
/// kernel, which costs only the pages that are written to.
type Slot = Option<NonZeroU32>;

fn slot(index: usize) -> Slot {
    u32::try_from(index + 1).ok().and_then(NonZeroU32::new)
}

/// How the route of a destination is found.
#[derive(Debug)]
enum Layout<N> {
    /// `slots[i]` is the route of the 2^`shift` addresses from `base + (i << shift)`.
    Direct { base: N, shift: u32, slots: Box<[Slot]> },
    /// `slots[i]` is the route of the addresses from `starts[i]` to the next start. Starts ascend.
    Intervals { starts: Box<[N]>, slots: Box<[Slot]> },
}

impl<N: Number> Layout<N> {
    /// The layout of prefixes that are in order and have no host bits.
    fn new<P: Prefix<Number = N>>(prefixes: &[P]) -> Self {
        Self::direct(prefixes).unwrap_or_else(|| Self::intervals(prefixes))
    }

    /// One slot for each block of the longest prefix length; `None` if that takes more than [`MAX_SLOTS`].
    fn direct<P: Prefix<Number = N>>(prefixes: &[P]) -> Option<Self> {
        let base = prefixes.iter().map(Prefix::first).min().unwrap_or(N::MIN);
        let end = prefixes.iter().map(Prefix::last).max().unwrap_or(N::MIN);
        let longest = prefixes.iter().map(Prefix::len).max().unwrap_or(N::BITS);
        // A lone default route needs no bit of the destination, but a number cannot be shifted by all of its bits:
        // it takes two slots.
        let shift = (N::BITS - longest).min(N::BITS - 1);
        let slot_of = |number: N| number.blocks_from(base, shift);

        let count = if prefixes.is_empty() {
            0
        } else {
            slot_of(end).checked_add(1)?
        };
        if count > MAX_SLOTS {
            return None;
        }
        let mut slots = vec![None; count].into_boxed_slice();
        // A prefix comes after those that it lies within, and overwrites them.
        for (index, prefix) in prefixes.iter().enumerate() {
            slots[slot_of(prefix.first())..=slot_of(prefix.last())].fill(slot(index));
        }
        Some(Self::Direct { base, shift, slots })
    }

    /// Disjoint intervals, in each of which one route is the longest.
    fn intervals<P: Prefix<Number = N>>(prefixes: &[P]) -> Self {
        let mut intervals = Flatten {
            starts: Vec::new(),
            slots: Vec::new(),
        };
        // The prefixes that cover the current address, the longest on top.
        let mut open: Vec<(N, Slot)> = Vec::new();
        for (index, prefix) in prefixes.iter().enumerate() {
            while let Some((last, _)) = open.pop_if(|(last, _)| *last < prefix.first()) {
                intervals.close(last, &open);
            }
            intervals.start(prefix.first(), slot(index));
            open.push((prefix.last(), slot(index)));
        }
        while let Some((last, _)) = open.pop() {
            intervals.close(last, &open);
        }
        Self::Intervals {
            starts: intervals.starts.into(),
            slots: intervals.slots.into(),
        }
    }

    #[inline]
    fn lookup(&self, dst: N) -> Slot {
        match self {
            // A destination below the base wraps round to a block behind the last slot.
            Self::Direct { base, shift, slots } => *slots.get(dst.blocks_from(*base, *shift))?,
            Self::Intervals { starts, slots } => {
                let after = starts.partition_point(|start| *start <= dst);
                *slots.get(after.checked_sub(1)?)?
            }
        }
    }
}

/// Intervals in the making.
struct Flatten<N> {
    starts: Vec<N>,
    slots: Vec<Slot>,
}

impl<N: Number> Flatten<N> {
    /// From `start` on, `slot` holds.
    fn start(&mut self, start: N, slot: Slot) {
        // Prefixes that start, or end, at the same address: the one seen last holds.
        if self.starts.last() == Some(&start) {
            self.starts.pop();
            self.slots.pop();
        }
        self.starts.push(start);
        self.slots.push(slot);
    }

    /// Behind `last`, the innermost of the prefixes that are still open holds.
    fn close(&mut self, last: N, open: &[(N, Slot)]) {
        if let Some(next) = last.next() {
            self.start(next, open.last().and_then(|(_, slot)| *slot));
        }
    }
}

/// An address as a number.
trait Number: Copy + Ord {
    const BITS: u32;
    const MIN: Self;

    /// The number after this one, if there is one.
    fn next(self) -> Option<Self>;

    /// How many blocks of 2^`shift` addresses lie between `base` and this number; `usize::MAX` if too many to count.
    /// A number below `base` wraps round.
    fn blocks_from(self, base: Self, shift: u32) -> usize;
}

macro_rules! number {
    ($type:ty) => {
        impl Number for $type {
            const BITS: u32 = <$type>::BITS;
            const MIN: Self = <$type>::MIN;

            #[inline]
            fn next(self) -> Option<Self> {
                self.checked_add(1)
            }

            #[inline]
            fn blocks_from(self, base: Self, shift: u32) -> usize {
                usize::try_from(self.wrapping_sub(base) >> shift).unwrap_or(usize::MAX)
            }
        }
    };
}

number!(u32);
number!(u128);

/// A network prefix of one family, without host bits. In order, it follows those that it lies within.
trait Prefix: Copy + Ord + Into<IpNet> {
    type Number: Number;

    /// The lowest address.
    fn first(&self) -> Self::Number;

    /// The highest address.
    fn last(&self) -> Self::Number;

    /// The prefix length in bits.
    fn len(&self) -> u32;
}

macro_rules! prefix {
    ($net:ty, $number:ty) => {
        impl Prefix for $net {
            type Number = $number;

            fn first(&self) -> $number {
                self.network().into()
            }

            fn last(&self) -> $number {
                self.broadcast().into()
            }

            fn len(&self) -> u32 {
                self.prefix_len().into()
            }
        }
    };
}

prefix!(Ipv4Net, u32);
prefix!(Ipv6Net, u128);

/// The place where the newest table is published. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Routes(Arc<ArcSwap<RouteTable>>);

impl Routes {
    /// A place that starts with `table`.
    pub fn new(table: RouteTable) -> Self {
        Self(Arc::new(ArcSwap::from_pointee(table)))
    }

    /// Replaces the table. Each reader sees the new one at its next [`RoutesReader::load`]; the old one is freed when the
    /// last reader has gone on.
    pub fn publish(&self, table: RouteTable) {
        self.0.store(Arc::new(table));
    }

    /// The newest table, for those who ask seldom: the status, the tests.
    pub fn current(&self) -> Arc<RouteTable> {
        self.0.load_full()
    }

    /// A reader for one thread.
    pub fn reader(&self) -> RoutesReader {
        RoutesReader(Cache::new(Arc::clone(&self.0)))
    }
}

/// One thread's access to the newest table.
#[derive(Clone, Debug)]
pub struct RoutesReader(Cache<Arc<ArcSwap<RouteTable>>, Arc<RouteTable>>);

impl RoutesReader {
    /// The newest table: one relaxed load and a compare as long as nothing new is published.
    ///
    /// Call it once per batch. The table stays the same, and alive, until the next call.
    #[inline]
    pub fn load(&mut self) -> &RouteTable {
        self.0.load()
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use proptest::prelude::*;

    use super::*;

    /// A peer that can be told by its number.
    fn peer(number: u32) -> Peer {
        Peer {
            addr: (Ipv4Addr::from(number), 8285).into(),
        }
    }

    fn table(routes: &[(&str, u32)]) -> RouteTable {
        RouteTable::new(routes.iter().map(|(net, number)| (net.parse().unwrap(), peer(*number))))
    }

    fn found(table: &RouteTable, dst: &str) -> Option<u32> {
        table.lookup(dst.parse().unwrap()).map(|peer| match peer.addr {
            SocketAddr::V4(addr) => u32::from(*addr.ip()),
            SocketAddr::V6(_) => unreachable!("tests use IPv4 peers"),
        })
    }

    /// The definition of a route lookup, without any cleverness.
    fn naive(routes: &[(IpNet, Peer)], dst: IpAddr) -> Option<Peer> {
        // Of equal keys, `max_by_key` gives the last one.
        let covering = routes.iter().filter(|(net, _)| net.contains(&dst));
        covering.max_by_key(|(net, _)| net.prefix_len()).map(|(_, peer)| *peer)
    }

    #[test]
    fn empty_table_has_no_route() {
        let table = RouteTable::default();
        assert!(table.is_empty());
        assert_eq!(found(&table, "0.0.0.0"), None);
        assert_eq!(found(&table, "::"), None);
    }

    #[test]
    fn subnets_of_one_length_are_indexed_directly() {
        let table = table(&[
            ("10.5.34.0/24", 1),
            ("10.5.36.0/24", 2),
            ("fd00:5:34::/64", 3),
            ("fd00:5:34:9::/64", 4),
        ]);
        assert!(matches!(&table.v4.layout, Layout::Direct { slots, .. } if slots.len() == 3));
        assert!(matches!(&table.v6.layout, Layout::Direct { slots, .. } if slots.len() == 10));

        for (dst, number) in [
            ("10.5.33.255", None),
            ("10.5.34.0", Some(1)),
            ("10.5.34.255", Some(1)),
            ("10.5.35.0", None),
            ("10.5.36.7", Some(2)),
            ("10.5.37.0", None),
            ("0.0.0.0", None),
            ("255.255.255.255", None),
            ("fd00:5:34::1", Some(3)),
            ("fd00:5:34:1::1", None),
            ("fd00:5:34:9:ffff::", Some(4)),
            ("fd00:5:33:ffff::", None),
            ("::", None),
            ("ffff::", None),
        ] {
            assert_eq!(found(&table, dst), number, "{dst}");
        }
    }

    #[test]
    fn longest_prefix_wins_in_either_layout() {
        let near = [("10.5.0.0/16", 1), ("10.5.34.0/24", 2), ("10.5.34.128/25", 3)];
        let far = [near.as_slice(), &[("0.0.0.0/0", 9)]].concat();
        let (near, far) = (table(&near), table(&far));
        assert!(matches!(near.v4.layout, Layout::Direct { .. }));
        assert!(matches!(far.v4.layout, Layout::Intervals { .. }));

        for table in [&near, &far] {
            assert_eq!(found(table, "10.5.33.1"), Some(1));
            assert_eq!(found(table, "10.5.34.1"), Some(2));
            assert_eq!(found(table, "10.5.34.129"), Some(3));
            assert_eq!(found(table, "10.5.35.1"), Some(1));
        }
        assert_eq!(found(&near, "10.6.0.0"), None);
        assert_eq!(found(&far, "10.6.0.0"), Some(9));
        assert_eq!(found(&far, "255.255.255.255"), Some(9));
    }

    #[test]
    fn edges_of_the_address_space_are_covered() {
        let table = table(&[
            ("0.0.0.0/1", 1),
            ("0.0.0.0/32", 2),
            ("255.255.255.255/32", 3),
            ("::/0", 4),
            ("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/128", 5),
        ]);
        assert_eq!(found(&table, "0.0.0.0"), Some(2));
        assert_eq!(found(&table, "127.255.255.255"), Some(1));
        assert_eq!(found(&table, "128.0.0.0"), None);
        assert_eq!(found(&table, "255.255.255.255"), Some(3));
        assert_eq!(found(&table, "::"), Some(4));
        assert_eq!(found(&table, "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"), Some(5));
    }

    #[test]
    fn lone_default_route_covers_all() {
        let table = table(&[("0.0.0.0/0", 1), ("::/0", 2)]);
        for (dst, number) in [("0.0.0.0", 1), ("255.255.255.255", 1), ("::", 2), ("ffff::", 2)] {
            assert_eq!(found(&table, dst), Some(number), "{dst}");
        }
    }

    #[test]
    fn slots_are_bounded() {
        let widest = table(&[("10.0.0.0/24", 1), ("11.255.255.0/24", 2)]);
        assert!(matches!(&widest.v4.layout, Layout::Direct { slots, .. } if slots.len() == MAX_SLOTS));
        let too_wide = table(&[("10.0.0.0/24", 1), ("12.0.0.0/24", 2)]);
        assert!(matches!(too_wide.v4.layout, Layout::Intervals { .. }));
        for table in [widest, too_wide] {
            assert_eq!(found(&table, "10.0.0.1"), Some(1));
            assert_eq!(found(&table, "10.0.1.0"), None);
            assert_eq!(found(&table, "12.0.1.0"), None);
        }
    }

    #[test]
    fn last_of_duplicate_prefixes_wins() {
        let table = table(&[("10.5.34.0/24", 1), ("10.5.35.0/24", 2), ("10.5.34.7/24", 3)]);
        assert_eq!(table.len(), 2);
        assert_eq!(found(&table, "10.5.34.1"), Some(3));
    }

    #[test]
    fn iteration_is_in_order_and_without_host_bits() {
        let table = table(&[
            ("fd00::1/64", 4),
            ("10.5.35.1/24", 2),
            ("10.5.0.0/16", 3),
            ("10.5.34.1/24", 1),
        ]);
        let routes: Vec<String> = table
            .iter()
            .map(|(net, peer)| format!("{net} {}", peer.addr.ip()))
            .collect();
        assert_eq!(
            routes,
            [
                "10.5.0.0/16 0.0.0.3",
                "10.5.34.0/24 0.0.0.1",
                "10.5.35.0/24 0.0.0.2",
                "fd00::/64 0.0.0.4"
            ]
        );
    }

    #[test]
    fn reader_sees_what_is_published() {
        let routes = Routes::default();
        let mut reader = routes.reader();
        assert_eq!(found(reader.load(), "10.5.34.1"), None);

        routes.publish(table(&[("10.5.34.0/24", 1)]));
        assert_eq!(found(reader.load(), "10.5.34.1"), Some(1));
        assert_eq!(found(&routes.current(), "10.5.34.1"), Some(1));

        routes.publish(table(&[]));
        assert_eq!(found(reader.load(), "10.5.34.1"), None);
    }

    #[test]
    fn readers_see_whole_tables_in_order_during_100_000_publications() {
        const LAST: u32 = 100_000;
        // Odd and even tables differ in layout. All routes of one table lead to the peer with the table's number.
        let nth = |number: u32| {
            let wide = (number % 2 == 1).then_some(("0.0.0.0/0", number));
            let routes = [
                ("10.5.34.0/24", number),
                ("10.5.35.0/24", number),
                ("fd00::/64", number),
            ];
            table(&routes.into_iter().chain(wide).collect::<Vec<_>>())
        };
        let routes = Routes::new(nth(0));

        thread::scope(|scope| {
            for _ in 0..3 {
                let mut reader = routes.reader();
                scope.spawn(move || {
                    let mut seen = 0;
                    while seen < LAST {
                        let table = reader.load();
                        let number = found(table, "10.5.34.1").expect("each table has this route");
                        assert!((seen..=LAST).contains(&number), "table {number} after table {seen}");
                        assert_eq!(found(table, "10.5.35.255"), Some(number));
                        assert_eq!(found(table, "fd00::7"), Some(number));
                        assert_eq!(found(table, "192.0.2.1"), (number % 2 == 1).then_some(number));
                        assert_eq!(table.len(), 3 + number as usize % 2);
                        seen = number;
                    }
                });
            }
            for number in 1..=LAST {
                routes.publish(nth(number));
            }
        });
        assert_eq!(found(&routes.current(), "10.5.34.1"), Some(LAST));
    }

    /// Addresses that collide often: few values of few bytes.
    fn v4_address() -> impl Strategy<Value = u32> {
        let byte = || proptest::sample::select(vec![0u8, 1, 2, 127, 128, 255]);
        [byte(), byte(), byte(), byte()].prop_map(u32::from_be_bytes)
    }

    fn v4_routes(lengths: std::ops::RangeInclusive<u8>) -> impl Strategy<Value = Vec<IpNet>> {
        let net = (v4_address(), lengths).prop_map(|(addr, len)| Ipv4Net::new_assert(addr.into(), len).into());
        proptest::collection::vec(net, 0..40)
    }

    fn v6_address() -> impl Strategy<Value = u128> {
        let words = [v4_address(), v4_address(), v4_address(), v4_address()];
        words.prop_map(|words| words.iter().fold(0, |number, word| number << 32 | u128::from(*word)))
    }

    fn v6_routes(lengths: std::ops::RangeInclusive<u8>) -> impl Strategy<Value = Vec<IpNet>> {
        let net = (v6_address(), lengths).prop_map(|(addr, len)| Ipv6Net::new_assert(addr.into(), len).into());
        proptest::collection::vec(net, 0..40)
    }

    /// Compares with the naive model at `probes`, and at both edges of each prefix and one address beyond.
    fn agrees(nets: &[IpNet], probes: impl IntoIterator<Item = IpAddr>) -> Result<(), TestCaseError> {
        let routes: Vec<(IpNet, Peer)> = nets.iter().copied().zip((1..).map(peer)).collect();
        let table = RouteTable::new(routes.iter().copied());
        let edges = nets.iter().flat_map(|net| match net {
            IpNet::V4(net) => {
                let (first, last) = (u32::from(net.network()), u32::from(net.broadcast()));
                [first, last, first.wrapping_sub(1), last.wrapping_add(1)].map(|edge| Ipv4Addr::from(edge).into())
            }
            IpNet::V6(net) => {
                let (first, last) = (u128::from(net.network()), u128::from(net.broadcast()));
                [first, last, first.wrapping_sub(1), last.wrapping_add(1)].map(|edge| Ipv6Addr::from(edge).into())
            }
        });
        for dst in probes.into_iter().chain(edges) {
            prop_assert_eq!(table.lookup(dst).copied(), naive(&routes, dst), "{}", dst);
        }
        Ok(())
    }

    proptest! {
        #[test]
        fn mixed_ipv4_lengths_agree_with_the_naive_model(
            nets in v4_routes(0..=32),
            probes in proptest::collection::vec(v4_address(), 20),
        ) {
            agrees(&nets, probes.into_iter().map(|dst| Ipv4Addr::from(dst).into()))?;
        }

        #[test]
        fn short_ipv4_lengths_agree_with_the_naive_model(nets in v4_routes(0..=16)) {
            // Always a direct layout.
            agrees(&nets, [])?;
        }

        #[test]
        fn mixed_ipv6_lengths_agree_with_the_naive_model(
            nets in v6_routes(0..=128),
            probes in proptest::collection::vec(v6_address(), 20),
        ) {
            agrees(&nets, probes.into_iter().map(|dst| Ipv6Addr::from(dst).into()))?;
        }

        #[test]
        fn subnets_of_one_network_agree_with_the_naive_model(
            len in 20u8..=28,
            numbers in proptest::collection::vec(0u32..300, 0..60),
        ) {
            let subnet = |number: u32| {
                let v4 = Ipv4Net::new_assert((0x0a05_0000 + (number << (32 - len))).into(), len);
                let v6 = Ipv6Net::new_assert((0xfd00u128 << 112 | u128::from(number) << 64).into(), 64);
                [IpNet::from(v4), IpNet::from(v6)]
            };
            agrees(&numbers.into_iter().flat_map(subnet).collect::<Vec<_>>(), [])?;
        }
    }
}
