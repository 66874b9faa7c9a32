//! What the kernel should hold and what it holds → the operations that lead from one to the other. Pure.
//!
//! Whose an entry is, decides the kernel's own record of it:
//! - a route is ours by its protocol number ([`PROTOCOL`]) and by where it leads: into this overlay, since another daemon on
//!   the same host marks its routes with the same number;
//! - a neighbour is ours by the same two;
//! - a forwarding entry has no such mark. It is ours if a neighbour of ours has its MAC, or if this process has put it. So
//!   each is put after its neighbour and removed before it: wherever a crash cuts the operations off, what is left can be
//!   told by whoever comes next;
//! - what the original has made on the device that we take over from it, in exactly its shape (a route to a subnet via the
//!   subnet's own address, `onlink`, and that gateway's permanent neighbour), is ours as well.
//!
//! All else is foreign and left alone, except where it stands in the place of what is desired.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
};

use ipnet::IpNet;

use crate::{
    kernel::entries::{
        FdbEntry, FoundFdbEntry, FoundNeighbour, FoundRoute, Mac, Neighbour, Operation, PROTOCOL, Route,
    },
    registry::Revision,
};

/// The metric of a route that was given none: IPv4 has 0 then, IPv6 1024 (`IP6_RT_PRIO_USER`, net/ip6_route.h).
fn default_metric(to: &IpNet) -> u32 {
    match to {
        IpNet::V4(_) => 0,
        IpNet::V6(_) => 1024,
    }
}

/// Where our entries are to be found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Scope {
    /// The overlay; at start also the one before it, whose routes may be left.
    pub networks: Vec<IpNet>,
    /// Index of the VXLAN device; the backend that has none has neither neighbours nor forwarding entries.
    pub device: Option<u32>,
}

impl Scope {
    /// Whether a route to `net` is the overlay's business.
    pub fn covers(&self, net: &IpNet) -> bool {
        self.networks.iter().any(|network| network.contains(net))
    }

    fn is_ours(&self, found: &FoundRoute) -> bool {
        self.covers(&found.route.to) && (found.protocol == PROTOCOL || self.is_the_originals(found))
    }

    /// The shape in which the original routes into the device.
    fn is_the_originals(&self, found: &FoundRoute) -> bool {
        let Route { to, via, link, onlink } = found.route;
        self.device == Some(link) && onlink && via == Some(to.network()) && !found.multipath
    }
}

/// What the kernel should hold.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Desired {
    routes: BTreeMap<IpNet, Route>,
    neighbours: BTreeMap<IpAddr, Neighbour>,
    fdb: BTreeMap<Mac, Claim>,
    /// Whether what is there for other subnets stays.
    others_stay: bool,
}

/// Where a MAC is, as a peer says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Claim {
    entry: FdbEntry,
    age: Revision,
}

impl Claim {
    fn is(&self, found: &FoundFdbEntry) -> bool {
        found.entry == self.entry && found.permanent
    }
}

impl Desired {
    /// Nothing yet. `complete`: whether there is to be nothing else.
    pub fn new(complete: bool) -> Self {
        Self {
            others_stay: !complete,
            ..Self::default()
        }
    }

    /// Whether there is to be nothing else.
    pub fn is_complete(&self) -> bool {
        !self.others_stay
    }

    /// A peer that is on-link: its subnet lies behind its own address.
    pub fn route_directly(&mut self, subnet: IpNet, peer: IpAddr, link: u32) {
        let to = subnet.trunc();
        self.routes.insert(
            to,
            Route {
                to,
                via: Some(peer),
                link,
                onlink: false,
            },
        );
    }

    /// A peer that is reached through the VXLAN device `link`, as the original does it: the subnet lies behind an imagined
    /// gateway with the subnet's own address, whose MAC is that of the peer's device.
    ///
    /// A MAC has one place: of two peers that claim it, the one whose lease is the older is believed, so that nobody takes a
    /// peer's packets by claiming its MAC.
    pub fn tunnel(&mut self, subnet: IpNet, mac: Mac, peer: IpAddr, age: Revision, link: u32) {
        let to = subnet.trunc();
        let gateway = to.network();
        let entry = FdbEntry { link, mac, to: peer };
        let claim = self.fdb.entry(mac).or_insert(Claim { entry, age });
        if age < claim.age {
            *claim = Claim { entry, age };
        }
        self.neighbours.insert(
            gateway,
            Neighbour {
                link,
                address: gateway,
                mac,
            },
        );
        self.routes.insert(
            to,
            Route {
                to,
                via: Some(gateway),
                link,
                onlink: true,
            },
        );
    }

    /// How many subnets are routed.
    pub fn len(&self) -> usize {
        self.routes.len()
    }

    /// Whether there is nothing to reach.
    pub fn is_empty(&self) -> bool {
        self.routes.is_empty()
    }
}

/// What the kernel holds, as far as it concerns the overlay: as it was listed, and as our operations have changed it since.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Actual {
    scope: Scope,
    /// Into the overlay, whoever made them, without those of another metric: they do not stand in each other's way.
    routes: BTreeMap<IpNet, FoundRoute>,
    /// On the device.
    neighbours: BTreeMap<IpAddr, Held>,
    /// On the device.
    fdb: BTreeMap<Mac, FoundFdbEntry>,
    /// MACs for which this process has put a forwarding entry.
    put: BTreeSet<Mac>,
}

/// A neighbour entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Held {
    neighbour: Neighbour,
    ours: bool,
    /// As we would have put it: it needs no operation if the MAC is right.
    marked: bool,
}

impl Actual {
    /// Takes what the kernel lists. `before`: what was known till now.
    pub fn seen(
        scope: Scope,
        routes: Vec<FoundRoute>,
        neighbours: Vec<FoundNeighbour>,
        fdb: Vec<FoundFdbEntry>,
        before: &Actual,
    ) -> Self {
        let mut actual = Actual::default();
        // A device that was made again holds nothing that this process has put.
        if scope.device == before.scope.device {
            actual.put.clone_from(&before.put);
        }
        for found in routes {
            let to = found.route.to;
            if scope.covers(&to) && found.metric == default_metric(&to) {
                // Of several the kernel uses the first.
                actual.routes.entry(to).or_insert(found);
            }
        }
        let on_device = |link| scope.device == Some(link);
        for found in neighbours.into_iter().filter(|found| on_device(found.neighbour.link)) {
            let address = found.neighbour.address;
            // Its route is the one to the subnet that the address is the first of.
            let is_gateway = || {
                let routes = actual.routes.range(first_at(address)..);
                let mut here = routes.take_while(|(to, _)| to.network() == address);
                here.any(|(_, route)| scope.is_the_originals(route))
            };
            let is_marked = found.protocol == PROTOCOL && scope.covers(&IpNet::from(address));
            let held = Held {
                neighbour: found.neighbour,
                ours: is_marked || found.permanent && is_gateway(),
                marked: found.protocol == PROTOCOL && found.permanent,
            };
            actual.neighbours.insert(address, held);
        }
        let fdb = fdb.into_iter().filter(|found| on_device(found.entry.link));
        actual.fdb = fdb.map(|found| (found.entry.mac, found)).collect();
        actual.scope = scope;
        actual
    }

    /// Takes note of an operation that the kernel has carried out.
    pub fn apply(&mut self, operation: &Operation) {
        match *operation {
            Operation::PutRoute(route) => {
                let found = FoundRoute {
                    route,
                    protocol: PROTOCOL,
                    metric: default_metric(&route.to),
                    multipath: false,
                };
                self.routes.insert(route.to, found);
            }
            Operation::RemoveRoute(route) => {
                let known = self.routes.get(&route.to);
                if known.is_some_and(|known| known.route == route && known.protocol == PROTOCOL) {
                    self.routes.remove(&route.to);
                }
            }
            Operation::RemoveFoundRoute(found) => {
                if self.routes.get(&found.route.to) == Some(&found) {
                    self.routes.remove(&found.route.to);
                }
            }
            Operation::PutNeighbour(neighbour) => {
                let held = Held {
                    neighbour,
                    ours: true,
                    marked: true,
                };
                self.neighbours.insert(neighbour.address, held);
            }
            Operation::RemoveNeighbour(neighbour) => {
                self.neighbours.remove(&neighbour.address);
            }
            Operation::PutFdb(entry) => {
                self.put.insert(entry.mac);
                self.fdb.insert(entry.mac, FoundFdbEntry { entry, permanent: true });
            }
            Operation::RemoveFdb(entry) => {
                self.put.remove(&entry.mac);
                self.fdb.remove(&entry.mac);
            }
        }
    }

    /// Whether routes to these destinations are looked at at all.
    pub fn concerns(&self, to: &IpNet) -> bool {
        self.scope.covers(to)
    }

    /// Whether routes of ours leave by this link.
    pub fn uses(&self, link: u32) -> bool {
        let mut ours = self.routes.values().filter(|found| found.protocol == PROTOCOL);
        ours.any(|found| found.route.link == link)
    }

    /// Whether what the kernel tells of a route is no news: our own operation, or none of our business.
    pub fn knows_route(&self, found: &FoundRoute, gone: bool) -> bool {
        let to = found.route.to;
        if !self.scope.covers(&to) || found.metric != default_metric(&to) {
            return true;
        }
        let known = self.routes.get(&to);
        if gone {
            known.is_none_or(|known| known.route != found.route)
        } else {
            known == Some(found)
        }
    }

    /// The same of a neighbour, as it is now.
    pub fn knows_neighbour(&self, link: u32, address: IpAddr, now: Option<&FoundNeighbour>) -> bool {
        if self.scope.device != Some(link) {
            return true;
        }
        match (self.neighbours.get(&address), now) {
            (None, None) => true,
            // What the kernel has found out by itself, of an address that we know nothing of.
            (None, Some(found)) => !found.permanent,
            (Some(_), None) => false,
            (Some(held), Some(found)) => {
                let marked = found.protocol == PROTOCOL && found.permanent;
                held.neighbour == found.neighbour && held.marked == marked
            }
        }
    }

    /// The same of a forwarding entry.
    pub fn knows_fdb(&self, found: &FoundFdbEntry, gone: bool) -> bool {
        if self.scope.device != Some(found.entry.link) {
            return true;
        }
        match self.fdb.get(&found.entry.mac) {
            None => gone || !found.permanent,
            Some(known) if gone => known.entry != found.entry,
            Some(known) => known == found,
        }
    }

    /// How many neighbours of ours have each MAC.
    fn holders(&self) -> HashMap<Mac, usize> {
        let mut holders = HashMap::new();
        for held in self.neighbours.values().filter(|held| held.ours) {
            *holders.entry(held.neighbour.mac).or_default() += 1;
        }
        holders
    }
}

/// Before all routes to subnets that begin with `address`.
fn first_at(address: IpAddr) -> IpNet {
    // Length 0 exists in both families.
    IpNet::new_assert(address, 0)
}

/// The keys where two maps differ, in order, with what each has there. One walk over both: of thousands of peers, mostly one
/// has changed.
fn differences<'a, K: Ord, D, A>(
    desired: &'a BTreeMap<K, D>,
    actual: &'a BTreeMap<K, A>,
    same: impl Fn(&D, &A) -> bool,
) -> Vec<(Option<&'a D>, Option<&'a A>)> {
    let (mut desired, mut actual) = (desired.iter().peekable(), actual.iter().peekable());
    let mut differences = Vec::new();
    loop {
        let order = match (desired.peek(), actual.peek()) {
            (None, None) => return differences,
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some((wanted, _)), Some((there, _))) => wanted.cmp(there),
        };
        let wanted = if order.is_le() { desired.next() } else { None }.map(|(_, value)| value);
        let there = if order.is_ge() { actual.next() } else { None }.map(|(_, value)| value);
        if !matches!((wanted, there), (Some(wanted), Some(there)) if same(wanted, there)) {
            differences.push((wanted, there));
        }
    }
}

/// The operations that turn `actual` into `desired`, to be carried out in this order.
///
/// After each of them, every route of ours has its neighbour, and every peer that is desired as it was before, or only
/// by another way, can be reached. The one exception: a peer that has changed its MAC is without a forwarding entry for a
/// moment; with the old one it was not reached either.
pub fn reconcile(desired: &Desired, actual: &Actual) -> Vec<Operation> {
    let routes = differences(&desired.routes, &actual.routes, |route, found| {
        found.route == *route && found.protocol == PROTOCOL && !found.multipath
    });
    let neighbours = differences(&desired.neighbours, &actual.neighbours, |neighbour, held| {
        held.neighbour == *neighbour && held.marked
    });
    let fdb = differences(&desired.fdb, &actual.fdb, Claim::is);
    let mut operations = Vec::new();
    if routes.is_empty() && neighbours.is_empty() && fdb.is_empty() {
        return operations;
    }

    // 1. Neighbours, each with its forwarding entry behind it.
    let mut holders = actual.holders();
    let (mut removed, mut put) = (BTreeSet::new(), BTreeSet::new());
    for (neighbour, held) in &neighbours {
        let Some(neighbour) = neighbour else { continue };
        if let Some(held) = held.filter(|held| held.ours) {
            let old = held.neighbour.mac;
            let count = holders.entry(old).or_default();
            *count = count.saturating_sub(1);
            // Once the neighbour has the new MAC, nothing would show that the old one's entry is ours.
            if old != neighbour.mac
                && *count == 0
                && let Some(found) = actual.fdb.get(&old)
                && removed.insert(old)
            {
                operations.push(Operation::RemoveFdb(found.entry));
            }
        }
        operations.push(Operation::PutNeighbour(**neighbour));
        let mac = neighbour.mac;
        *holders.entry(mac).or_default() += 1;
        let there = actual.fdb.get(&mac).filter(|_| !removed.contains(&mac));
        if let Some(claim) = desired.fdb.get(&mac)
            && there.is_none_or(|found| !claim.is(found))
            && put.insert(mac)
        {
            operations.push(Operation::PutFdb(claim.entry));
        }
    }
    // Those whose neighbour is there already.
    for (claim, _) in &fdb {
        if let Some(claim) = claim
            && put.insert(claim.entry.mac)
        {
            operations.push(Operation::PutFdb(claim.entry));
        }
    }
    let put_routes = routes
        .iter()
        .filter_map(|(route, _)| route.map(|route| Operation::PutRoute(*route)));
    if desired.others_stay {
        operations.extend(put_routes);
        return operations;
    }
    // The original's, which are going: without its route nothing would show that such a neighbour is ours.
    let going = neighbours.iter().filter(|(wanted, _)| wanted.is_none());
    let going = going.filter_map(|(_, held)| held.filter(|held| held.ours));
    for held in going.clone().filter(|held| !held.marked) {
        operations.push(Operation::PutNeighbour(held.neighbour));
    }

    // 2. Routes: those that replace others do so in one step.
    operations.extend(put_routes);

    // 3. What is left over, in the opposite order.
    for (wanted, found) in &routes {
        let found = found.filter(|found| wanted.is_none() && actual.scope.is_ours(found));
        operations.extend(found.map(|found| Operation::RemoveFoundRoute(*found)));
    }
    for (wanted, found) in &fdb {
        let ours = |mac| actual.put.contains(mac) || holders.get(mac).is_some_and(|count| *count > 0);
        let found = found.filter(|found| {
            let mac = &found.entry.mac;
            wanted.is_none() && ours(mac) && !removed.contains(mac)
        });
        operations.extend(found.map(|found| Operation::RemoveFdb(found.entry)));
    }
    operations.extend(going.map(|held| Operation::RemoveNeighbour(held.neighbour)));
    operations
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use proptest::prelude::*;

    use super::*;

    const ETH0: u32 = 2;
    const DEVICE: u32 = 7;

    /// `proto boot`, which routes have that were made by hand or by the original.
    const BOOT: u8 = 3;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn scope() -> Scope {
        Scope {
            networks: vec![net("10.5.0.0/16")],
            device: Some(DEVICE),
        }
    }

    fn subnet(number: u8) -> IpNet {
        net(&format!("10.5.{number}.0/24"))
    }

    fn mac(number: u8) -> Mac {
        Mac([2, 0, 0, 0, 0, number])
    }

    /// A small kernel: what it does with our operations, written down by itself.
    #[derive(Debug, Clone, Default, PartialEq)]
    struct World {
        routes: BTreeMap<(IpNet, u32), FoundRoute>,
        neighbours: BTreeMap<IpAddr, FoundNeighbour>,
        fdb: BTreeMap<Mac, FoundFdbEntry>,
    }

    impl World {
        fn carry_out(&mut self, operation: &Operation) {
            match *operation {
                Operation::PutRoute(route) => self.route(route, PROTOCOL, 0),
                Operation::RemoveRoute(_) => panic!("says less than was found"),
                Operation::RemoveFoundRoute(found) => {
                    let there = self.routes.remove(&(found.route.to, found.metric)).unwrap();
                    assert_eq!(there, found);
                }
                Operation::PutNeighbour(neighbour) => self.neighbour(neighbour, PROTOCOL),
                Operation::RemoveNeighbour(neighbour) => {
                    let there = self.neighbours.remove(&neighbour.address).unwrap();
                    assert_eq!(there.neighbour, neighbour);
                }
                Operation::PutFdb(entry) => self.fdb(entry),
                Operation::RemoveFdb(entry) => {
                    let there = self.fdb.remove(&entry.mac).unwrap();
                    assert_eq!(there.entry, entry);
                }
            }
        }

        fn route(&mut self, route: Route, protocol: u8, metric: u32) {
            let found = FoundRoute {
                route,
                protocol,
                metric,
                multipath: false,
            };
            self.routes.insert((route.to, metric), found);
        }

        fn neighbour(&mut self, neighbour: Neighbour, protocol: u8) {
            let found = FoundNeighbour {
                neighbour,
                protocol,
                permanent: true,
            };
            self.neighbours.insert(neighbour.address, found);
        }

        fn fdb(&mut self, entry: FdbEntry) {
            self.fdb.insert(entry.mac, FoundFdbEntry { entry, permanent: true });
        }

        fn seen(&self, before: &Actual) -> Actual {
            Actual::seen(
                scope(),
                self.routes.values().copied().collect(),
                self.neighbours.values().copied().collect(),
                self.fdb.values().copied().collect(),
                before,
            )
        }

        /// What others have put there: nothing of it has to do with a peer, except that someone routes the subnet of `taken`.
        fn with_foreign(taken: u8) -> World {
            let mut world = World::default();
            let plain = |to: IpNet, via: &str| Route {
                to,
                via: Some(via.parse().unwrap()),
                link: ETH0,
                onlink: false,
            };
            world.route(plain(net("10.6.1.0/24"), "192.0.2.77"), PROTOCOL, 0);
            world.route(plain(net("10.5.99.0/24"), "192.0.2.77"), BOOT, 0);
            world.route(plain(subnet(1), "192.0.2.78"), BOOT, 50);
            world.route(plain(subnet(taken), "192.0.2.79"), BOOT, 0);
            let neighbour = Neighbour {
                link: DEVICE,
                address: "10.5.200.1".parse().unwrap(),
                mac: mac(200),
            };
            world.neighbour(neighbour, 0);
            world.fdb(FdbEntry {
                link: DEVICE,
                mac: mac(200),
                to: "192.0.2.80".parse().unwrap(),
            });
            world
        }

        /// What the original makes for these peers.
        fn programmed_by_the_original(&mut self, peers: &Peers) {
            let desired = peers.desired();
            for route in desired.routes.values().filter(|route| route.onlink) {
                self.route(*route, BOOT, 0);
            }
            for neighbour in desired.neighbours.values() {
                self.neighbour(*neighbour, 0);
            }
            for claim in desired.fdb.values() {
                self.fdb(claim.entry);
            }
        }

        /// Whether a packet to the subnet gets to the host at `ip`, whose device has this MAC.
        fn reaches(&self, subnet: IpNet, mac: Mac, ip: IpAddr) -> bool {
            let Some(found) = self.routes.get(&(subnet, 0)) else {
                return false;
            };
            if found.route.link != DEVICE {
                return found.route.via == Some(ip);
            }
            let neighbour = found.route.via.and_then(|via| self.neighbours.get(&via));
            let entry = neighbour.and_then(|found| self.fdb.get(&found.neighbour.mac));
            entry.is_some_and(|found| found.entry.mac == mac && found.entry.to == ip)
        }

        fn assert_routes_have_neighbours(&self) {
            for found in self.routes.values().filter(|found| found.route.link == DEVICE) {
                let via = found.route.via.unwrap();
                assert!(self.neighbours.contains_key(&via), "{found:?} has no neighbour");
            }
        }
    }

    /// Peers by the number of their subnet: whether they are on-link, and which host they are. Hosts have a MAC, and a
    /// PublicIP that they may change.
    #[derive(Debug, Clone, Default)]
    struct Peers {
        hosts: BTreeMap<u8, (bool, u8)>,
        places: [u8; 4],
    }

    impl Peers {
        fn ip(&self, host: u8) -> IpAddr {
            Ipv4Addr::new(192, 0, 2, host * 10 + self.places[usize::from(host)]).into()
        }

        fn desired(&self) -> Desired {
            let mut desired = Desired::default();
            for (number, (direct, host)) in &self.hosts {
                match direct {
                    true => desired.route_directly(subnet(*number), self.ip(*host), ETH0),
                    false => desired.tunnel(subnet(*number), mac(*host), self.ip(*host), Revision(1), DEVICE),
                }
            }
            desired
        }
    }

    fn peers() -> impl Strategy<Value = Peers> {
        let hosts = prop::collection::btree_map(1..6_u8, (prop::bool::weighted(0.3), 0..4_u8), 0..6);
        (hosts, prop::array::uniform4(0..2_u8)).prop_map(|(hosts, places)| Peers { hosts, places })
    }

    /// Carries the operations out, and looks at what holds after each.
    fn carry_out(world: &mut World, actual: &mut Actual, peers: &Peers, operations: &[Operation]) {
        let before = world.clone();
        let mut after = world.clone();
        operations.iter().for_each(|operation| after.carry_out(operation));
        let staying: Vec<_> = peers
            .hosts
            .iter()
            .map(|(number, (_, host))| (subnet(*number), mac(*host), peers.ip(*host)))
            .filter(|(subnet, mac, ip)| before.reaches(*subnet, *mac, *ip) && after.reaches(*subnet, *mac, *ip))
            .collect();
        for operation in operations {
            world.carry_out(operation);
            actual.apply(operation);
            world.assert_routes_have_neighbours();
            for (subnet, mac, ip) in &staying {
                assert!(
                    world.reaches(*subnet, *mac, *ip),
                    "{subnet} is lost by {operation:?} of {operations:?}"
                );
            }
        }
    }

    /// What there must be in the end: what is desired, and the foreign entries that do not stand in its place.
    fn assert_converged(world: &World, foreign: &World, desired: &Desired) {
        let mut expected = foreign.clone();
        desired
            .routes
            .values()
            .for_each(|route| expected.route(*route, PROTOCOL, 0));
        desired
            .neighbours
            .values()
            .for_each(|neighbour| expected.neighbour(*neighbour, PROTOCOL));
        desired.fdb.values().for_each(|claim| expected.fdb(claim.entry));
        // Someone else's route in the place of a desired one is gone for good.
        let mut world = world.clone();
        for (key, found) in &foreign.routes {
            world.routes.entry(*key).or_insert_with(|| *found);
        }
        assert_eq!(world, expected);
    }

    proptest! {
        #[test]
        fn whatever_is_there_and_wherever_a_crash_comes_it_converges_without_loss(
            original in prop::option::of(peers()),
            taken in 1..6_u8,
            pictures in prop::collection::vec((peers(), prop::option::of(0..30_usize)), 1..6),
        ) {
            let foreign = World::with_foreign(taken);
            let mut world = foreign.clone();
            if let Some(original) = &original {
                world.programmed_by_the_original(original);
            }
            let mut known: Option<Actual> = None;
            for (peers, crash) in pictures {
                let desired = peers.desired();
                let mut actual = known.take().unwrap_or_else(|| world.seen(&Actual::default()));
                let operations = reconcile(&desired, &actual);
                let until = crash.unwrap_or(usize::MAX).min(operations.len());
                carry_out(&mut world, &mut actual, &peers, &operations[..until]);
                if until < operations.len() {
                    // Another process comes next, and knows nothing.
                    continue;
                }
                assert_converged(&world, &foreign, &desired);
                prop_assert_eq!(reconcile(&desired, &actual), []);
                let seen = world.seen(&actual);
                prop_assert_eq!(reconcile(&desired, &seen), []);
                prop_assert_eq!(&seen, &actual, "what was believed is what is there");
                known = Some(actual);
            }
            // And from wherever it stands, back to nothing.
            let actual = known.unwrap_or_else(|| world.seen(&Actual::default()));
            for operation in reconcile(&Desired::default(), &actual) {
                world.carry_out(&operation);
            }
            assert_converged(&world, &foreign, &Desired::default());
        }

        #[test]
        fn what_is_known_in_part_adds_and_replaces_and_takes_nothing_away(
            before in peers(),
            in_part in peers(),
            all in peers(),
            taken in 1..6_u8,
        ) {
            let foreign = World::with_foreign(taken);
            let mut world = foreign.clone();
            let mut actual = world.seen(&Actual::default());
            let operations = reconcile(&before.desired(), &actual);
            carry_out(&mut world, &mut actual, &before, &operations);
            let held = world.clone();

            let mut actual = world.seen(&Actual::default());
            let desired = Desired { others_stay: true, ..in_part.desired() };
            let operations = reconcile(&desired, &actual);
            carry_out(&mut world, &mut actual, &in_part, &operations);
            prop_assert_eq!(reconcile(&desired, &actual), []);
            for (number, (_, host)) in &in_part.hosts {
                prop_assert!(world.reaches(subnet(*number), mac(*host), in_part.ip(*host)));
            }
            // By what is known in part a host may have moved, or have another MAC.
            let others = before.hosts.iter().filter(|(number, _)| !in_part.hosts.contains_key(number));
            for (number, (direct, host)) in others {
                let key = (subnet(*number), 0);
                prop_assert_eq!(world.routes.get(&key), held.routes.get(&key));
                let moved = !direct && in_part.hosts.values().any(|(direct, other)| !direct && other == host);
                let ip = if moved { in_part.ip(*host) } else { before.ip(*host) };
                prop_assert!(world.reaches(subnet(*number), mac(*host), ip), "{} is lost", number);
            }

            let operations = reconcile(&all.desired(), &actual);
            carry_out(&mut world, &mut actual, &all, &operations);
            assert_converged(&world, &foreign, &all.desired());
        }
    }

    fn one_peer() -> (Desired, World) {
        let mut desired = Desired::default();
        desired.tunnel(subnet(1), mac(1), "192.0.2.1".parse().unwrap(), Revision(1), DEVICE);
        (desired, World::default())
    }

    #[test]
    fn of_two_peers_with_one_mac_the_older_is_believed() {
        let ips: [IpAddr; 2] = ["192.0.2.1", "192.0.2.2"].map(|ip| ip.parse().unwrap());
        for (ages, believed) in [([1, 2], ips[0]), ([2, 1], ips[1])] {
            let mut desired = Desired::default();
            for number in [0, 1] {
                let age = Revision(ages[number]);
                desired.tunnel(subnet(1 + number as u8), mac(1), ips[number], age, DEVICE);
            }
            assert_eq!(desired.fdb[&mac(1)].entry.to, believed);
            assert_eq!(desired.len(), 2);
        }
    }

    #[test]
    fn a_peer_is_added_from_the_far_end_and_removed_from_the_near_one() {
        let (desired, mut world) = one_peer();
        let kinds = |operations: &[Operation]| -> Vec<String> {
            let name = |operation: &Operation| format!("{operation:?}").split('(').next().unwrap().to_owned();
            operations.iter().map(name).collect()
        };
        let operations = reconcile(&desired, &world.seen(&Actual::default()));
        assert_eq!(kinds(&operations), ["PutNeighbour", "PutFdb", "PutRoute"]);
        operations.iter().for_each(|operation| world.carry_out(operation));
        let operations = reconcile(&Desired::default(), &world.seen(&Actual::default()));
        assert_eq!(kinds(&operations), ["RemoveFoundRoute", "RemoveFdb", "RemoveNeighbour"]);
    }

    #[test]
    fn what_others_do_to_our_entries_is_news_and_our_own_operations_are_none() {
        let (desired, mut world) = one_peer();
        let mut actual = world.seen(&Actual::default());
        for operation in reconcile(&desired, &actual) {
            world.carry_out(&operation);
            actual.apply(&operation);
        }
        let route = world.routes[&(subnet(1), 0)];
        let neighbour = *world.neighbours.values().next().unwrap();
        let entry = *world.fdb.values().next().unwrap();
        assert!(actual.knows_route(&route, false) && !actual.knows_route(&route, true));
        let address = neighbour.neighbour.address;
        assert!(actual.knows_neighbour(DEVICE, address, Some(&neighbour)));
        assert!(!actual.knows_neighbour(DEVICE, address, None));
        assert!(actual.knows_neighbour(ETH0, address, None), "another link's");
        assert!(actual.knows_fdb(&entry, false) && !actual.knows_fdb(&entry, true));

        let mut elsewhere = route;
        elsewhere.route.link = ETH0;
        assert!(!actual.knows_route(&elsewhere, false), "replaced by someone");
        let outside = FoundRoute {
            route: Route {
                to: net("10.6.0.0/16"),
                ..route.route
            },
            ..route
        };
        assert!(
            actual.knows_route(&outside, false),
            "another overlay's is none of our business"
        );

        for operation in reconcile(&Desired::default(), &actual) {
            actual.apply(&operation);
        }
        assert!(actual.knows_route(&world.routes[&(subnet(1), 0)], true));
        assert!(actual.knows_neighbour(DEVICE, address, None) && actual.knows_fdb(&entry, true));
    }

    #[test]
    fn routes_of_the_network_before_are_removed_and_of_no_other() {
        let (desired, mut world) = one_peer();
        let mut old = Desired::default();
        for to in ["10.9.1.0/24", "10.8.1.0/24"] {
            old.route_directly(net(to), "192.0.2.9".parse().unwrap(), ETH0);
        }
        old.routes.values().for_each(|route| world.route(*route, PROTOCOL, 0));
        let mut wide = scope();
        wide.networks.push(net("10.9.0.0/16"));
        let actual = Actual::seen(
            wide,
            world.routes.values().copied().collect(),
            vec![],
            vec![],
            &Actual::default(),
        );
        let removed: Vec<_> = reconcile(&desired, &actual)
            .into_iter()
            .filter_map(|operation| match operation {
                Operation::RemoveFoundRoute(found) => Some(found.route.to),
                _ => None,
            })
            .collect();
        assert_eq!(removed, [net("10.9.1.0/24")]);
    }
}
