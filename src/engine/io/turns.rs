//! Which of a worker's two queues is read next: that for sparse flows, but not for ever.

use crate::engine::{
    DEVICE_QUEUE,
    flows::{Class, Moves},
};

/// See the module. A worker with one queue has that for sparse flows.
#[derive(Debug)]
pub(super) struct Turns {
    /// What may have packets, as far as is known.
    sparse_waits: bool,
    bulk_waits: bool,
    /// Whether all that lies in the queue for sparse flows is read before more of bulk is.
    drain: bool,
    /// How many packets of sparse flows were read while bulk waited.
    ahead: u32,
    /// Whether this batch begins with bulk.
    bulk_first: bool,
    /// How many packets of bulk there may be from before the worker's start.
    old: u32,
}

impl Turns {
    /// For a worker with two queues, or one.
    pub(super) fn new(two: bool) -> Self {
        Self {
            sparse_waits: true,
            bulk_waits: two,
            drain: true,
            ahead: 0,
            bulk_first: false,
            old: if two { DEVICE_QUEUE } else { 0 },
        }
    }

    /// Takes in that a queue has packets.
    pub(super) fn wake(&mut self, class: Class) {
        *self.waits(class) = true;
    }

    /// Begins a batch; with `sparse_first` whatever the queue for sparse flows holds now is read before more of bulk is, up to what
    /// a queue holds: a flood must not keep bulk waiting for ever. Otherwise bulk goes first if it has waited for the whole batch
    /// before.
    pub(super) fn start(&mut self, sparse_first: bool) {
        self.drain |= sparse_first;
        self.sparse_waits |= self.drain;
        self.bulk_first = self.bulk_waits && self.ahead >= if self.drain { DEVICE_QUEUE } else { 1 };
        if self.bulk_first {
            self.drain = sparse_first;
        }
    }

    /// Which queue to read from, if any may have packets.
    #[inline]
    pub(super) fn next(&self) -> Option<Class> {
        match (self.sparse_waits, self.bulk_waits) {
            (true, true) if self.bulk_first => Some(Class::Bulk),
            (true, _) => Some(Class::Sparse),
            (false, true) => Some(Class::Bulk),
            (false, false) => None,
        }
    }

    /// Takes in that a packet was read.
    #[inline]
    pub(super) fn read(&mut self, class: Class) {
        match class {
            Class::Sparse if self.bulk_waits => self.ahead = self.ahead.saturating_add(1),
            Class::Sparse => {}
            Class::Bulk => {
                self.ahead = 0;
                self.old = self.old.saturating_sub(1);
            }
        }
    }

    /// Takes in that a queue has nothing more.
    pub(super) fn emptied(&mut self, class: Class) {
        *self.waits(class) = false;
        match class {
            Class::Sparse => self.drain = false,
            Class::Bulk => (self.ahead, self.old) = (0, 0),
        }
    }

    /// How flows can be moved between the queues now.
    pub(super) fn moves(&self) -> Moves {
        if self.old > 0 { Moves::ToBulk } else { Moves::Both }
    }

    fn waits(&mut self, class: Class) -> &mut bool {
        match class {
            Class::Sparse => &mut self.sparse_waits,
            Class::Bulk => &mut self.bulk_waits,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::VecDeque, time::Duration};

    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::engine::flows::Flows;

    /// What a batch of at most `most` packets holds of endless queues.
    fn flood(turns: &mut Turns, most: usize, sparse_first: bool) -> [usize; 2] {
        turns.start(sparse_first);
        let mut counts = [0; 2];
        for _ in 0..most {
            let class = turns.next().unwrap();
            turns.read(class);
            counts[usize::from(class == Class::Bulk)] += 1;
        }
        counts
    }

    #[test]
    fn sparse_flows_come_first_and_bulk_has_its_turn_in_a_flood_of_them_however_short_a_batch_is() {
        for most in [1, 4, 64] {
            let mut turns = Turns::new(true);
            turns.emptied(Class::Bulk);
            assert_eq!(flood(&mut turns, most, false), [most, 0]);
            turns.emptied(Class::Sparse);
            assert_eq!(turns.next(), None);
            // Bulk was not kept waiting by the batch before: there was none.
            turns.wake(Class::Bulk);
            turns.wake(Class::Sparse);
            let batches: Vec<_> = (0..4).map(|_| flood(&mut turns, most, false)).collect();
            assert_eq!(batches, [[most, 0], [0, most], [most, 0], [0, most]]);
        }
    }

    #[test]
    fn no_flood_keeps_bulk_waiting_for_more_than_a_queue_holds_though_flows_are_moved_all_the_time() {
        for most in [1, 4, 64, 189] {
            let mut turns = Turns::new(true);
            let mut waited = 0;
            let mut turns_of_bulk = 0;
            for _ in 0..10_000 {
                let [sparse, bulk] = flood(&mut turns, most, true);
                assert!(sparse == 0 || bulk == 0);
                waited = if bulk > 0 { 0 } else { waited + sparse };
                turns_of_bulk += usize::from(bulk > 0);
                assert!(waited < DEVICE_QUEUE as usize + most, "{waited} with {most} a batch");
            }
            assert!(turns_of_bulk > 5, "{turns_of_bulk} with {most} a batch");
        }
    }

    #[test]
    fn flows_are_not_taken_for_new_before_what_lay_in_the_queue_for_bulk_is_read() {
        let mut turns = Turns::new(true);
        assert_eq!(turns.moves(), Moves::ToBulk);
        // And what lay in the other queue comes before it.
        assert_eq!([(); 3].map(|()| flood(&mut turns, 64, false)), [[64, 0]; 3]);
        turns.emptied(Class::Sparse);
        (1..DEVICE_QUEUE).for_each(|_| turns.read(Class::Bulk));
        assert_eq!(turns.moves(), Moves::ToBulk);
        turns.read(Class::Bulk);
        assert_eq!(turns.moves(), Moves::Both);
        let mut turns = Turns::new(true);
        turns.emptied(Class::Bulk);
        assert_eq!(turns.moves(), Moves::Both);
        assert_eq!(Turns::new(false).moves(), Moves::Both);
    }

    /// Half of them send much at a time, the others one question after the other.
    const FLOWS: usize = 16;
    const MUCH: usize = 40 << 10;
    const LITTLE: usize = 100;

    /// A device with two queues that puts a flow where its answers were written, and the worker that reads it.
    struct World {
        queues: [VecDeque<(usize, u32)>; 2],
        /// Where the device puts each flow.
        places: [Class; FLOWS],
        sent: [u32; FLOWS],
        read: [u32; FLOWS],
        turns: Turns,
        flows: Flows,
    }

    impl World {
        fn new(places: [Class; FLOWS]) -> Self {
            let mut world = Self {
                queues: Default::default(),
                places,
                sent: [0; FLOWS],
                read: [0; FLOWS],
                turns: Turns::new(true),
                flows: Flows::new(),
            };
            // No flow is known yet.
            world.flows.set_time(Duration::from_secs(1_000));
            (0..FLOWS).for_each(|flow| world.send(flow, 20));
            world
        }

        fn queue(&mut self, class: Class) -> &mut VecDeque<(usize, u32)> {
            &mut self.queues[usize::from(class == Class::Bulk)]
        }

        fn is_bulk(flow: usize) -> bool {
            flow.is_multiple_of(2)
        }

        fn hash(flow: usize) -> u32 {
            (flow as u32) << 24
        }

        fn send(&mut self, flow: usize, count: usize) {
            for _ in 0..count {
                let asking = !Self::is_bulk(flow) && self.sent[flow] > self.read[flow];
                let place = self.places[flow];
                if !asking && self.queue(place).len() < DEVICE_QUEUE as usize {
                    let number = self.sent[flow];
                    self.queue(place).push_back((flow, number));
                    self.turns.wake(place);
                    self.sent[flow] += 1;
                }
            }
        }

        fn run_batch(&mut self, most: usize) {
            self.turns.start(self.flows.take_moved());
            for _ in 0..most {
                let packet = loop {
                    let Some(class) = self.turns.next() else { break None };
                    match self.queue(class).pop_front() {
                        Some(packet) => break Some((packet, class)),
                        None => self.turns.emptied(class),
                    }
                };
                let Some(((flow, number), class)) = packet else { break };
                self.turns.read(class);
                let bytes = if Self::is_bulk(flow) { MUCH } else { LITTLE };
                self.flows.sent(Self::hash(flow), bytes, class);
                assert_eq!(number, self.read[flow], "a packet of flow {flow} has overtaken another");
                self.read[flow] += 1;
            }
            self.flows.set_moves(self.turns.moves());
        }
    }

    proptest! {
        #[test]
        fn a_flow_stays_in_order_wherever_its_packets_lie_and_is_moved(
            places in vec(any::<bool>(), FLOWS),
            steps in vec((0..3, 0..FLOWS, 1_usize..60), 1..600),
        ) {
            let class = |bulk| if bulk { Class::Bulk } else { Class::Sparse };
            let mut world = World::new(std::array::from_fn(|flow| class(places[flow])));
            world.run_batch(1);
            for (step, flow, count) in steps {
                match step {
                    0 => world.send(flow, count / 4),
                    1 => world.run_batch(count),
                    _ => world.places[flow] = world.flows.class_of(World::hash(flow)),
                }
            }
            // In the end bulk is bulk, and the others are not.
            for _ in 0..100 {
                world.run_batch(60);
            }
            for _ in 0..2 {
                for flow in 0..FLOWS {
                    world.send(flow, 1);
                    world.run_batch(60);
                    world.places[flow] = world.flows.class_of(World::hash(flow));
                }
            }
            let expected: [Class; FLOWS] = std::array::from_fn(|flow| class(World::is_bulk(flow)));
            assert_eq!(world.places, expected);
        }
    }
}
