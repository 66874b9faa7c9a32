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
use std::sync::Arc;

use arc_swap::ArcSwap;
use arc_swap::cache::Cache;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// The most slots that a family's array may have.
///
/// 2^16 slots are every /24 of a /8, the largest network that people give to an overlay. Twice that leaves room for one
/// subnet length more, and at eight bytes a slot is 1 MiB: the array stays in a server core's second level cache.
pub const MAX_SLOTS: usize = 1 << 17;

/// Where packets for a subnet go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Peer {
    /// The underlay address and port that the subnet's host receives datagrams on.
    pub addr: SocketAddr,
    /// The number under which its packets are counted.
    pub id: PeerId,
}

/// A peer's number, small and dense: an index into counters. The default is [`OTHERS`](Self::OTHERS).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PeerId(u16);

impl PeerId {
    /// The number of all peers that have none of their own.
    pub const OTHERS: Self = Self(0);

    /// How many there are: 15 bits, what a slot of the route table has left, and three times the hosts of a large cluster.
    pub const COUNT: usize = 1 << 15;

    /// `None` from [`COUNT`](Self::COUNT) on.
    pub fn new(index: usize) -> Option<Self> {
        (index < Self::COUNT).then_some(Self(index as u16))
    }

    /// The number, below [`COUNT`](Self::COUNT).
    #[inline]
    pub fn index(self) -> usize {
        self.0.into()
    }
}

/// All routes of one moment. Longest prefix wins.
#[derive(Debug, Default)]
pub struct RouteTable {
    v4: Family<u32>,
    v6: Family<u128>,
    broadcasts: Broadcasts,
    /// The peers' hosts, in order and each once.
    hosts: Box<[(IpAddr, PeerId)]>,
}

impl RouteTable {
    /// A table of these routes. Host bits of a prefix are ignored; of routes with the same prefix the last one wins.
    ///
    /// The time is that of a stable sort, which is linear for routes that come in order.
    pub fn new(routes: impl IntoIterator<Item = (IpNet, Peer)>) -> Self {
        let (mut v4, mut v6, mut hosts) = (Vec::new(), Vec::new(), Vec::new());
        for (net, peer) in routes {
            hosts.push((peer.addr.ip(), peer.id));
            let len = net.prefix_len();
            match net {
                IpNet::V4(net) => v4.push(Route {
                    first: net.network().into(),
                    len,
                    peer,
                }),
                IpNet::V6(net) => v6.push(Route {
                    first: net.network().into(),
                    len,
                    peer,
                }),
            }
        }
        hosts.sort();
        hosts.dedup_by_key(|(host, _)| *host);
        Self {
            broadcasts: Broadcasts::of(&v4),
            v4: Family::new(v4),
            v6: Family::new(v6),
            hosts: hosts.into(),
        }
    }

    /// The number of the peer whose underlay address this is.
    pub fn host(&self, address: IpAddr) -> Option<PeerId> {
        let at = self.hosts.binary_search_by_key(&address, |(host, _)| *host).ok()?;
        Some(self.hosts[at].1)
    }

    /// The peer of the longest prefix that covers `dst`.
    #[inline]
    pub fn lookup(&self, dst: IpAddr) -> Option<Peer> {
        match dst {
            IpAddr::V4(dst) => self.lookup_v4(dst),
            IpAddr::V6(dst) => self.lookup_v6(dst),
        }
    }

    /// The same for an IPv4 destination.
    #[inline]
    pub fn lookup_v4(&self, dst: Ipv4Addr) -> Option<Peer> {
        self.v4.lookup(dst.into())
    }

    /// The same for an IPv6 destination.
    #[inline]
    pub fn lookup_v6(&self, dst: Ipv6Addr) -> Option<Peer> {
        self.v6.lookup(dst.into())
    }

    /// Whether `dst` is the broadcast address of a route's prefix (RFC 919): of none that is longer than 30 bits, which has no
    /// such address (RFC 3021).
    #[inline]
    pub fn is_broadcast(&self, dst: Ipv4Addr) -> bool {
        self.broadcasts.contains(dst.into())
    }

    /// Number of routes with different prefixes.
    pub fn len(&self) -> usize {
        self.v4.routes.len() + self.v6.routes.len()
    }

    /// Whether there is no route at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All routes, IPv4 before IPv6, each family by address and then by length.
    pub fn iter(&self) -> impl Iterator<Item = (IpNet, Peer)> {
        self.v4.iter().chain(self.v6.iter())
    }
}

/// One route, its prefix without host bits.
#[derive(Clone, Copy, Debug)]
struct Route<N> {
    first: N,
    len: u8,
    peer: Peer,
}

impl<N: Number> Route<N> {
    /// The highest address that the route covers.
    fn last(&self) -> N {
        self.first.last_of_prefix(self.len)
    }

    /// Where it belongs in order: behind those that it lies within.
    fn key(&self) -> (N, u8) {
        (self.first, self.len)
    }
}

/// The broadcast addresses of the routes' prefixes.
#[derive(Debug, Default)]
struct Broadcasts {
    /// The low bits that all of them have: nearly every other address lacks one.
    common: u32,
    /// In order.
    addresses: Box<[u32]>,
}

impl Broadcasts {
    fn of(routes: &[Route<u32>]) -> Self {
        let mut addresses: Vec<u32> = routes.iter().filter(|route| route.len <= 30).map(Route::last).collect();
        addresses.sort_unstable();
        let low_ones = addresses.iter().map(|address| address.trailing_ones()).min();
        Self {
            // At least two ones, by the length.
            common: low_ones.map_or(0, |ones| u32::MAX >> (u32::BITS - ones)),
            addresses: addresses.into(),
        }
    }

    #[inline]
    fn contains(&self, address: u32) -> bool {
        address & self.common == self.common && self.addresses.binary_search(&address).is_ok()
    }
}

/// The routes of one address family.
#[derive(Debug)]
struct Family<N> {
    /// In order of [`Route::key`].
    routes: Vec<Route<N>>,
    layout: Layout<N>,
}

impl<N: Number> Default for Family<N> {
    fn default() -> Self {
        Self::new(Vec::new())
    }
}

impl<N: Number> Family<N> {
    fn new(mut routes: Vec<Route<N>>) -> Self {
        routes.sort_by_key(Route::key);
        routes.dedup_by(|route, kept| {
            let same = route.key() == kept.key();
            if same {
                *kept = *route;
            }
            same
        });
        let layout = Layout::new(&routes);
        Self { routes, layout }
    }

    #[inline]
    fn lookup(&self, dst: N) -> Option<Peer> {
        let slot = self.layout.lookup(dst);
        if slot & INLINE != 0 {
            return Some(Peer {
                addr: SocketAddr::from((Ipv4Addr::from(slot as u32), (slot >> 32) as u16)),
                id: PeerId((slot >> 48) as u16 & (PeerId::COUNT - 1) as u16),
            });
        }
        if slot == NO_ROUTE {
            return None;
        }
        self.routes.get(slot as u32 as usize).map(|route| route.peer)
    }

    fn iter(&self) -> impl Iterator<Item = (IpNet, Peer)> {
        self.routes.iter().map(|route| (route.first.net(route.len), route.peer))
    }
}

/// Which peer, in eight bytes, a quarter of a [`Peer`]: the peers of 65,000 routes stay in the cache.
///
/// Zero where no route is (an array of zeroes comes from the kernel and costs only the pages that are written to); with the
/// bit [`INLINE`], the number (15 bits), the port and the address of an IPv4 peer; with the bit [`INDEX`] a route's index
/// otherwise.
type Slot = u64;

const NO_ROUTE: Slot = 0;
const INLINE: Slot = 1 << 63;
const INDEX: Slot = 1 << 62;

fn slot(index: usize, peer: &Peer) -> Slot {
    match peer.addr {
        SocketAddr::V4(addr) => {
            let id = (peer.id.index() as u64) << 48;
            INLINE | id | u64::from(addr.port()) << 32 | u64::from(u32::from(*addr.ip()))
        }
        // 2^32 routes do not fit into memory.
        SocketAddr::V6(_) => INDEX | u64::from(index as u32),
    }
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
    /// The layout of routes that are in order and have no host bits.
    fn new(routes: &[Route<N>]) -> Self {
        Self::direct(routes).unwrap_or_else(|| Self::intervals(routes))
    }

    /// One slot for each block of the longest prefix length; `None` if that takes more than [`MAX_SLOTS`].
    fn direct(routes: &[Route<N>]) -> Option<Self> {
        let Some(&Route { first: base, .. }) = routes.first() else {
            return Some(Self::Direct {
                base: N::MIN,
                shift: 0,
                slots: Box::default(),
            });
        };
        let end = routes.iter().map(Route::last).max().unwrap_or(base);
        let longest = routes.iter().map(|route| u32::from(route.len)).max().unwrap_or(0);
        // A lone default route needs no bit of the destination, but a number cannot be shifted by all of its bits:
        // it takes two slots.
        let shift = (N::BITS - longest).min(N::BITS - 1);

        let last = end.blocks_from(base, shift);
        if last >= MAX_SLOTS {
            return None;
        }
        let mut slots = vec![NO_ROUTE; last + 1].into_boxed_slice();
        // A route comes after those that it lies within, and overwrites them.
        for (index, route) in routes.iter().enumerate() {
            let blocks = route.first.blocks_from(base, shift)..=route.last().blocks_from(base, shift);
            slots[blocks].fill(slot(index, &route.peer));
        }
        Some(Self::Direct { base, shift, slots })
    }

    /// Disjoint intervals, in each of which one route is the longest.
    fn intervals(routes: &[Route<N>]) -> Self {
        let mut intervals = Intervals {
            starts: Vec::new(),
            slots: Vec::new(),
        };
        // The last address and the peer of each route that covers the current address, the longest on top.
        let mut open: Vec<(N, Slot)> = Vec::new();
        for (index, route) in routes.iter().enumerate() {
            while let Some((last, _)) = open.pop_if(|(last, _)| *last < route.first) {
                intervals.close(last, &open);
            }
            let slot = slot(index, &route.peer);
            intervals.start(route.first, slot);
            open.push((route.last(), slot));
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
            // The base is a multiple of the block size, so a destination below it wraps round to a block behind the
            // last slot.
            Self::Direct { base, shift, slots } => *slots.get(dst.blocks_from(*base, *shift)).unwrap_or(&NO_ROUTE),
            Self::Intervals { starts, slots } => match starts.partition_point(|start| *start <= dst) {
                0 => NO_ROUTE,
                after => *slots.get(after - 1).unwrap_or(&NO_ROUTE),
            },
        }
    }
}

/// Intervals in the making.
struct Intervals<N> {
    starts: Vec<N>,
    slots: Vec<Slot>,
}

impl<N: Number> Intervals<N> {
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
            self.start(next, open.last().map_or(NO_ROUTE, |(_, slot)| *slot));
        }
    }
}

/// An address as a number.
trait Number: Copy + Ord {
    const BITS: u32;
    const MIN: Self;

    /// The number after this one, if there is one.
    fn next(self) -> Option<Self>;

    /// The highest address of the prefix of this length that starts here.
    fn last_of_prefix(self, len: u8) -> Self;

    /// The prefix of this length that starts here. The length must be one of the family.
    fn net(self, len: u8) -> IpNet;

    /// How many blocks of 2^`shift` addresses lie between `base` and this number; `usize::MAX` if too many to count.
    /// A number below `base` wraps round.
    fn blocks_from(self, base: Self, shift: u32) -> usize;
}

macro_rules! number {
    ($number:ty, $net:ty) => {
        impl Number for $number {
            const BITS: u32 = <$number>::BITS;
            const MIN: Self = <$number>::MIN;

            fn next(self) -> Option<Self> {
                self.checked_add(1)
            }

            fn last_of_prefix(self, len: u8) -> Self {
                self | Self::MAX.checked_shr(len.into()).unwrap_or(0)
            }

            fn net(self, len: u8) -> IpNet {
                // Does not panic: each length came out of a prefix of this family.
                <$net>::new_assert(self.into(), len).into()
            }

            #[inline]
            fn blocks_from(self, base: Self, shift: u32) -> usize {
                usize::try_from(self.wrapping_sub(base) >> shift).unwrap_or(usize::MAX)
            }
        }
    };
}

number!(u32, Ipv4Net);
number!(u128, Ipv6Net);

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
            id: id(number as usize % PeerId::COUNT),
        }
    }

    fn id(index: usize) -> PeerId {
        PeerId::new(index).unwrap()
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
    fn peers_of_either_family_come_out_whole() {
        let peers: [SocketAddr; 4] =
            ["0.0.0.0:0", "255.255.255.255:65535", "[::]:0", "[fe80::1%7]:8285"].map(|addr| addr.parse().unwrap());
        for wide in [false, true] {
            let nets = (1..).map(|number| Ipv4Net::new_assert(Ipv4Addr::new(10, 5, number, 0), 24).into());
            let peers = (1..).zip(peers).map(|(number, addr)| Peer {
                addr,
                id: id(PeerId::COUNT - number),
            });
            let routes = nets.zip(peers.clone());
            let default = wide.then(|| ("0.0.0.0/0".parse().unwrap(), peer(1)));
            let table = RouteTable::new(routes.chain(default));
            assert_eq!(matches!(table.v4.layout, Layout::Intervals { .. }), wide);
            for (number, peer) in (1..).zip(peers) {
                assert_eq!(table.lookup_v4(Ipv4Addr::new(10, 5, number, 9)), Some(peer));
            }
        }
    }

    #[test]
    fn hosts_are_known_by_their_underlay_address() {
        let table = table(&[("10.5.34.0/24", 7), ("fd00:1::/64", 7), ("10.5.35.0/24", 2)]);
        let host = |number: u32| table.host(Ipv4Addr::from(number).into());
        assert_eq!((host(7), host(2), host(3)), (Some(id(7)), Some(id(2)), None));
    }

    #[test]
    fn there_are_as_many_numbers_as_a_slot_can_hold() {
        assert_eq!(PeerId::new(PeerId::COUNT), None);
        assert_eq!(id(PeerId::COUNT - 1).index(), PeerId::COUNT - 1);
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
            prop_assert_eq!(table.lookup(dst), naive(&routes, dst), "{}", dst);
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
