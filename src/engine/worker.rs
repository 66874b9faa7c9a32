//! One worker: the thread that moves packets between TUN queues and a UDP socket.

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use crossbeam_channel::Receiver;

use crate::{offload::Merge, route_table::Routes};

use super::{
    Command, IcmpSource, Offloads,
    admission::Admission,
    context::Common,
    counters::Counters,
    departure::Departure,
    egress::Egress,
    fallbacks::Fallbacks,
    flows::Flows,
    ingress::Ingress,
    io::{Io, Parts, Ready},
    refusal::Refusals,
};

/// What a worker goes by.
pub struct Setup {
    /// Where packets go.
    pub routes: Routes,
    /// Whose packets get in.
    pub admission: Admission,
    /// Where the worker's own ICMP errors come from.
    pub icmp_source: IcmpSource,
    /// What the kernel does for it.
    pub offloads: Offloads,
    /// Number of source ports that flows are spread over, at least 1.
    pub sources: u8,
    /// How long it looks for packets before it sleeps.
    pub busy_poll: Duration,
    /// How many workers share the host's limit of ICMP errors.
    pub sharers: usize,
    /// What it counts.
    pub counters: Arc<Counters>,
    /// What the kernel has refused.
    pub fallbacks: Arc<Fallbacks>,
}

/// See the module.
pub struct Worker<I> {
    io: I,
    common: Common,
    busy_poll: Duration,
    egress: Egress,
    ingress: Ingress,
    /// What is known to be waiting.
    ready: Ready,
}

impl<I: Io> Worker<I> {
    /// A worker that moves packets by `io`.
    pub fn new(io: I, setup: Setup) -> Self {
        let merge = Merge {
            tcp: setup.offloads.tun_tcp,
            udp: setup.offloads.tun_udp,
        };
        Self {
            io,
            common: Common {
                routes: setup.routes.reader(),
                refusals: Refusals::new(setup.icmp_source, setup.sharers),
                counters: setup.counters,
                fallbacks: setup.fallbacks,
                flows: Flows::new(),
            },
            busy_poll: setup.busy_poll,
            egress: Egress::new(
                Departure::new(setup.admission.own()),
                setup.offloads.udp_segment,
                setup.sources,
            ),
            ingress: Ingress::new(merge, setup.admission),
            ready: Ready {
                packets: true,
                datagrams: true,
                bell: false,
            },
        }
    }

    /// What the worker moves packets by.
    pub fn io(&mut self) -> &mut I {
        &mut self.io
    }

    /// Moves packets until told to stop, or until the device is gone (an error).
    pub(super) fn run(&mut self, inbox: &Receiver<Command>) -> io::Result<()> {
        let mut last_busy = Instant::now();
        loop {
            let limit = if self.is_busy() {
                Some(Duration::ZERO)
            } else if self.busy_poll > Duration::ZERO && last_busy.elapsed() < self.busy_poll {
                std::hint::spin_loop();
                Some(Duration::ZERO)
            } else {
                None
            };
            self.look(limit)?;
            if std::mem::take(&mut self.ready.bell)
                && let Ok(Command::Stop) = inbox.try_recv()
            {
                return self.finish();
            }
            if self.busy_poll > Duration::ZERO && self.is_busy() {
                last_busy = Instant::now();
            }
            self.turn()?;
        }
    }

    /// Gives out what was taken from the kernel already; the rest stays there, for another worker perhaps.
    fn finish(&mut self) -> io::Result<()> {
        let left = self.leave();
        self.egress.finish(self.io.parts().peers, &self.common.context());
        left
    }

    fn leave(&mut self) -> io::Result<()> {
        loop {
            self.ready = self.io.leave()?;
            if !self.is_busy() {
                return Ok(());
            }
            self.turn()?;
        }
    }

    /// Moves all that is waiting. Only for an [`Io`] that runs dry.
    ///
    /// # Errors
    /// When the device is gone.
    pub fn drain(&mut self) -> io::Result<()> {
        self.look(Some(Duration::ZERO))?;
        while self.is_busy() {
            self.turn()?;
            self.look(Some(Duration::ZERO))?;
        }
        Ok(())
    }

    fn is_busy(&self) -> bool {
        self.ready.packets || self.ready.datagrams
    }

    /// Learns what is waiting. A side stays ready until it has said that it has nothing left.
    fn look(&mut self, limit: Option<Duration>) -> io::Result<()> {
        let Ready {
            packets,
            datagrams,
            bell,
        } = self.io.wait(limit)?;
        self.ready.packets |= packets;
        self.ready.datagrams |= datagrams;
        self.ready.bell |= bell;
        Ok(())
    }

    /// Moves a batch each way: while both sides have packets they take turns, so that neither direction starves the other.
    fn turn(&mut self) -> io::Result<()> {
        let Parts {
            packets,
            peers,
            datagrams,
            device,
            local,
        } = self.io.parts();
        let mut context = self.common.context();
        if self.ready.packets {
            self.ready.packets = self.egress.run(packets, peers, local, &mut context)?;
        }
        if self.ready.datagrams {
            self.ready.datagrams = self.ingress.run(datagrams, device, peers, &mut context);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use super::*;
    use crate::{
        engine::{
            admission::SourceCheck,
            counters::Drop,
            egress::FLUSH_PACKETS,
            flows::{Class, Moves},
            io::memory::{Incoming, Memory, Sent},
        },
        offload::{GsoKind, PartialChecksum, VirtioNetHdr},
        packet::{Ipv4Packet, build, checksum},
        route_table::{Peer, PeerId, RouteTable},
    };

    const ALL: Offloads = Offloads {
        tun_tcp: true,
        tun_udp: true,
        udp_segment: true,
        udp_gro: true,
    };

    fn peer(number: u8) -> Peer {
        Peer {
            addr: ([192, 0, 2, number], 8285).into(),
            id: PeerId::new(number.into()).unwrap(),
        }
    }

    fn worker(offloads: Offloads, sources: u8) -> Worker<Memory> {
        let routes = Routes::default();
        routes.publish(RouteTable::new(
            [2, 3].map(|number| (format!("10.5.{number}.0/24").parse().unwrap(), peer(number))),
        ));
        let mut io = Memory::default();
        io.packets.headers = offloads.tun_tcp;
        io.device.headers = offloads.tun_tcp;
        Worker::new(
            io,
            Setup {
                routes,
                admission: Admission::new(SourceCheck::Strict, ["10.5.1.0/24".parse().unwrap()]),
                icmp_source: IcmpSource {
                    v4: Ipv4Addr::new(10, 5, 1, 1),
                    v6: None,
                },
                offloads,
                sources,
                busy_poll: Duration::ZERO,
                sharers: 1,
                counters: Arc::default(),
                fallbacks: Arc::default(),
            },
        )
    }

    fn packet(to: u8, port: u16, payload: &[u8]) -> Vec<u8> {
        build::Ipv4::new([10, 5, 1, 2].into(), [10, 5, to, 2].into()).udp(port, 53, payload)
    }

    /// As it arrives: one hop older.
    fn older(mut packet: Vec<u8>) -> Vec<u8> {
        let _ = Ipv4Packet::new_checked(packet.as_mut_slice()).unwrap().decrement_ttl();
        packet
    }

    fn with_header(header: VirtioNetHdr, packet: &[u8]) -> Vec<u8> {
        [&header.emit()[..], packet].concat()
    }

    /// A superpacket of UDP for peer 2 and the datagrams that it stands for.
    fn superpacket(size: u16, payload: &[u8]) -> (Vec<u8>, Vec<Vec<u8>>) {
        let mut bytes = packet(2, 9, payload);
        let pseudo_header = Ipv4Packet::new_checked(&bytes).unwrap().pseudo_header();
        bytes[26..28].copy_from_slice(&checksum::fold(pseudo_header).to_be_bytes());
        let header = VirtioNetHdr {
            gso: GsoKind::UdpL4,
            gso_size: size,
            checksum: Some(PartialChecksum { start: 20, offset: 6 }),
            ..VirtioNetHdr::default()
        };
        let pieces = payload.chunks(size.into()).zip(0..).map(|(piece, ident)| {
            let ip = build::Ipv4::new([10, 5, 1, 2].into(), [10, 5, 2, 2].into());
            older(ip.ident(ident).udp(9, 53, piece))
        });
        (with_header(header, &bytes), pieces.collect())
    }

    fn plain(packet: &[u8]) -> Vec<u8> {
        with_header(VirtioNetHdr::default(), packet)
    }

    fn sent(worker: &mut Worker<Memory>) -> Vec<Sent> {
        std::mem::take(&mut worker.io().peers.sent)
    }

    fn sent_bytes(worker: &mut Worker<Memory>) -> Vec<Vec<u8>> {
        sent(worker).into_iter().map(|sent| sent.bytes).collect()
    }

    fn from_peer(number: u8, bytes: Vec<u8>) -> Incoming {
        Incoming {
            from: peer(number).addr.ip(),
            segment: None,
            bytes,
        }
    }

    /// From peer 2 to this host.
    fn arriving(ident: u16, payload: &[u8]) -> Vec<u8> {
        build::Ipv4::new([10, 5, 2, 2].into(), [10, 5, 1, 2].into())
            .ident(ident)
            .udp(9, 53, payload)
    }

    #[test]
    fn packets_reach_their_peers_in_few_messages_and_are_counted() {
        let mut worker = worker(ALL, 1);
        let packets = [packet(2, 1, &[1; 64]), packet(3, 2, &[2; 64]), packet(2, 3, &[3; 64])];
        worker
            .io()
            .packets
            .waiting
            .extend(packets.iter().map(|bytes| plain(bytes)));
        worker.drain().unwrap();
        assert_eq!(worker.io().peers.messages, 2);
        let [one, two, three] = packets.map(older);
        let of = |number, bytes: Vec<u8>| Sent {
            source: 0,
            to: peer(number).addr,
            bytes,
        };
        assert_eq!(sent(&mut worker), [of(2, one), of(2, three), of(3, two)]);
        let counters = &worker.common.counters;
        assert_eq!((counters.sent.packets.get(), counters.sent.bytes.get()), (3, 276));
        assert_eq!(counters.messages_sent.get(), 2);
        assert_eq!(counters.peer(peer(2).id).sent.packets.get(), 2);
        assert_eq!(counters.peer(peer(3).id).sent.bytes.get(), 92);
    }

    #[test]
    fn what_comes_for_a_flow_that_sends_much_is_written_to_the_queue_for_bulk() {
        let mut worker = worker(ALL, 1);
        let arrive = |worker: &mut Worker<Memory>, to: u16| {
            let answer = build::Ipv4::new([10, 5, 2, 2].into(), [10, 5, 1, 2].into()).udp(53, to, b"answer");
            worker.io().datagrams.waiting.push_back(from_peer(2, answer));
            worker.drain().unwrap();
            worker.io().device.classes.pop().unwrap()
        };
        let leave = |worker: &mut Worker<Memory>, port: u16, count: usize| {
            let packet = plain(&packet(2, port, &[7; 1_400]));
            worker.io().packets.waiting.extend(std::iter::repeat_n(packet, count));
            worker.drain().unwrap();
        };
        worker.io().packets.from = Class::Sparse;
        // What is bulk is so for 256 ms only, in which a busy machine may get nothing done.
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            leave(&mut worker, 1, 40);
            leave(&mut worker, 2, 1);
            let classes = [1, 2].map(|port| arrive(&mut worker, port));
            if classes == [Class::Bulk, Class::Sparse] {
                break;
            }
            assert!(Instant::now() < deadline, "{classes:?}");
        }
        // What it has left in the other queue is read first, once.
        leave(&mut worker, 2, 1);
        assert!(worker.io().packets.sparse_first);
        leave(&mut worker, 2, 1);
        assert!(!worker.io().packets.sparse_first);
        // There may be packets of it from before the worker's start.
        worker.io().packets.moves = Moves::ToBulk;
        leave(&mut worker, 2, 1);
        assert_eq!(arrive(&mut worker, 3), Class::Bulk);
    }

    #[test]
    fn the_end_of_a_long_batch_goes_with_the_next_one_and_nothing_is_lost_when_there_is_none() {
        let count = 2 * FLUSH_PACKETS;
        // 1,428 bytes each: a batch ends after 184 of them, four messages of 45 and four datagrams.
        let packets: Vec<_> = (0..count).map(|port| packet(2, port as u16, &[7; 1_400])).collect();
        let mut worker = worker(ALL, 1);
        let plain_packets = packets.iter().map(|bytes| plain(bytes));
        worker.io().packets.waiting.extend(plain_packets);
        worker.look(None).unwrap();
        worker.turn().unwrap();
        assert_eq!((worker.io().peers.messages, worker.io().peers.sent.len()), (4, 180));
        worker.turn().unwrap();
        assert_eq!((worker.io().peers.messages, worker.io().peers.sent.len()), (8, 360));
        // It is told to stop here: the rest is left to others, and what was taken from the device is not.
        worker.finish().unwrap();
        let left = worker.io().packets.waiting.len();
        let expected: Vec<_> = packets.into_iter().map(older).collect();
        assert_eq!(sent_bytes(&mut worker), expected[..count - left]);
        assert_eq!(worker.common.counters.sent.packets.get(), (count - left) as u64);
        worker.drain().unwrap();
        assert_eq!(sent_bytes(&mut worker), expected[count - left..]);
    }

    #[test]
    fn what_a_full_message_had_no_room_for_waits_for_one_more_look_at_the_device() {
        // 45 datagrams fill a message of 1,428 bytes each.
        let packets: Vec<_> = (0..100).map(|port| packet(2, port, &[7; 1_400])).collect();
        let expected: Vec<_> = packets.iter().cloned().map(older).collect();
        let mut worker = worker(ALL, 1);
        let arrive = |worker: &mut Worker<Memory>, packets: &[Vec<u8>]| {
            worker
                .io()
                .packets
                .waiting
                .extend(packets.iter().map(|bytes| plain(bytes)));
            worker.look(None).unwrap();
            worker.turn().unwrap();
            (worker.io().peers.messages, worker.io().peers.sent.len())
        };
        assert_eq!(arrive(&mut worker, &packets[..46]), (1, 45));
        assert!(worker.is_busy(), "it does not sleep on it");
        assert_eq!(
            arrive(&mut worker, &packets[46..92]),
            (2, 90),
            "one joined by 44, and two more"
        );
        worker.turn().unwrap();
        assert_eq!((worker.io().peers.messages, worker.io().peers.sent.len()), (3, 92));
        assert!(!worker.is_busy());
        // Of another length or for another peer it is no overflow, and is not late.
        let shorter = packet(2, 9, &[7; 100]);
        let elsewhere = packet(3, 9, &[7; 1_400]);
        for other in [shorter, elsewhere] {
            let sent = worker.io().peers.sent.len();
            let batch = [&packets[..2], std::slice::from_ref(&other)].concat();
            arrive(&mut worker, &batch);
            assert_eq!(worker.io().peers.sent.len(), sent + 3);
            assert!(!worker.is_busy());
        }
        assert_eq!(sent_bytes(&mut worker)[..92], expected[..92]);
    }

    #[test]
    fn packets_that_go_nowhere_make_a_batch_too_and_their_sender_is_told() {
        let mut worker = worker(ALL, 1);
        let lost = plain(&packet(9, 1, b"anyone?"));
        worker.io().packets.waiting.extend(vec![lost; FLUSH_PACKETS + 1]);
        worker.look(None).unwrap();
        worker.turn().unwrap();
        assert_eq!(worker.common.counters.dropped(Drop::NoRoute), FLUSH_PACKETS as u64);
        worker.drain().unwrap();
        assert_eq!(worker.common.counters.dropped(Drop::NoRoute), FLUSH_PACKETS as u64 + 1);
        let errors = &worker.io().local.sent;
        assert!(!errors.is_empty());
        assert!(errors.iter().all(|(to, _)| *to == IpAddr::from([10, 5, 1, 2])));
    }

    #[test]
    fn a_route_that_refuses_segments_gets_every_datagram_once_and_in_order() {
        let mut worker = worker(ALL, 1);
        worker.io().peers.refuse_segmented = Some(libc::EIO);
        let (bytes, pieces) = superpacket(100, &[7; 950]);
        worker
            .io()
            .packets
            .waiting
            .extend([bytes.clone(), plain(&packet(3, 1, b"x"))]);
        worker.drain().unwrap();
        assert_eq!(
            sent_bytes(&mut worker),
            [pieces.clone(), vec![older(packet(3, 1, b"x"))]].concat()
        );
        assert!(worker.common.fallbacks.is_refusing(peer(2).addr));
        // No segmented message is tried any more, and none is lost.
        worker.io().peers.refuse_segmented = None;
        worker.io().peers.messages = 0;
        worker.io().packets.waiting.push_back(bytes);
        worker.drain().unwrap();
        assert_eq!((sent_bytes(&mut worker), worker.io().peers.messages), (pieces, 10));
        assert_eq!(worker.common.counters.dropped(Drop::SendFailed), 0);
    }

    #[test]
    fn a_full_socket_is_tried_again_and_then_given_up() {
        let mut worker = worker(ALL, 1);
        worker.io().peers.refuse_next.extend([libc::EAGAIN, libc::ENOBUFS]);
        worker.io().packets.waiting.push_back(plain(&packet(2, 1, b"patience")));
        worker.drain().unwrap();
        assert_eq!(sent(&mut worker).len(), 1);
        worker.io().peers.refuse_next.extend([libc::ENOBUFS; 5]);
        worker.io().packets.waiting.push_back(plain(&packet(2, 1, b"too late")));
        worker.io().packets.waiting.push_back(plain(&packet(3, 1, b"in time")));
        worker.drain().unwrap();
        assert_eq!(sent_bytes(&mut worker), [older(packet(3, 1, b"in time"))]);
        assert_eq!(worker.common.counters.dropped(Drop::QueueFull), 1);
    }

    #[test]
    fn a_socket_that_stays_full_is_waited_for_once_a_batch_and_not_for_each_message() {
        let mut worker = worker(ALL, 1);
        worker.io().peers.refuse_all = Some(libc::EAGAIN);
        for number in [2, 3, 2, 3] {
            let port = 1_000 + u16::from(number);
            // Of different lengths, so that each is a message of its own.
            let payload = vec![0; 100 + worker.io().packets.waiting.len()];
            worker
                .io()
                .packets
                .waiting
                .push_back(plain(&packet(number, port, &payload)));
        }
        worker.drain().unwrap();
        assert_eq!(worker.common.counters.dropped(Drop::QueueFull), 4);
        assert_eq!(worker.io().peers.waits.get(), 4, "4 ms in all");
    }

    #[test]
    fn a_route_that_takes_nothing_at_all_is_not_said_to_refuse_segments() {
        let mut worker = worker(ALL, 1);
        // What a blackhole says, and a socket whose address is gone.
        worker.io().peers.refuse_all = Some(libc::EINVAL);
        worker.io().packets.waiting.push_back(superpacket(100, &[7; 950]).0);
        worker.drain().unwrap();
        assert_eq!(worker.common.counters.dropped(Drop::SendFailed), 10);
        assert!(!worker.common.fallbacks.is_refusing(peer(2).addr));
    }

    #[test]
    fn a_firewall_costs_the_message_that_it_refuses_and_no_other() {
        let mut worker = worker(ALL, 1);
        worker.io().peers.refuse_next.push_back(libc::EPERM);
        for number in [2, 3] {
            worker.io().packets.waiting.push_back(plain(&packet(number, 1, b"x")));
        }
        worker.drain().unwrap();
        assert_eq!(sent_bytes(&mut worker), [older(packet(3, 1, b"x"))]);
        assert_eq!(
            worker.common.counters.send_errors().find(|(_, count)| *count > 0),
            Some(("EPERM", 1))
        );
    }

    #[test]
    fn a_flow_keeps_its_source_port_and_flows_use_all() {
        let mut worker = worker(ALL, 4);
        let flows = 1_000..1_064u16;
        for round in 0..2 {
            let packets = flows.clone().map(|port| plain(&packet(2, port, &[round; 64])));
            worker.io().packets.waiting.extend(packets);
        }
        worker.drain().unwrap();
        let sent = sent(&mut worker);
        assert_eq!(sent.len(), 128);
        for port in flows {
            let of_flow: Vec<_> = sent
                .iter()
                .filter(|sent| sent.bytes[20..22] == port.to_be_bytes())
                .map(|sent| (sent.source, sent.bytes[28]))
                .collect();
            assert!(
                matches!(of_flow[..], [(first, 0), (second, 1)] if first == second),
                "{of_flow:?}"
            );
        }
        for source in 0..4 {
            assert!(
                sent.iter().any(|sent| sent.source == source),
                "port {source} is not used"
            );
        }
    }

    #[test]
    fn a_devices_refusal_of_superpackets_loses_nothing_and_is_remembered() {
        let mut worker = worker(ALL, 1);
        worker.io().device.refuse_superpackets = Some(libc::EINVAL);
        let arrive = |worker: &mut Worker<Memory>| {
            let datagrams = (0..4).map(|ident| from_peer(2, arriving(ident, &[7; 64])));
            worker.io().datagrams.waiting.extend(datagrams);
            worker.drain().unwrap();
            std::mem::take(&mut worker.io().device.written)
        };
        let expected: Vec<_> = (0..4).map(|ident| plain(&older(arriving(ident, &[7; 64])))).collect();
        assert_eq!(arrive(&mut worker), expected);
        worker.io().device.refuse_superpackets = None;
        assert_eq!(arrive(&mut worker), expected);
        let counters = &worker.common.counters;
        assert_eq!(counters.received.packets.get(), 8);
        assert_eq!(counters.peer(peer(2).id).received.packets.get(), 8);
        assert_eq!(counters.dropped(Drop::DeliverFailed), 0);
    }

    #[test]
    fn what_is_behind_a_refused_superpacket_does_not_overtake_it() {
        let mut worker = worker(ALL, 1);
        worker.io().device.refuse_superpackets = Some(libc::EINVAL);
        // The third packet is too long to be merged with the two before it.
        let packets = [arriving(0, &[7; 64]), arriving(1, &[7; 64]), arriving(2, &[7; 65])];
        let datagrams = packets.iter().map(|packet| from_peer(2, packet.clone()));
        worker.io().datagrams.waiting.extend(datagrams);
        worker.drain().unwrap();
        assert_eq!(worker.io().device.written, packets.map(|packet| plain(&older(packet))));
    }

    #[test]
    fn a_merged_message_is_taken_apart_and_merged_for_the_device() {
        let mut worker = worker(ALL, 1);
        let bytes: Vec<u8> = (0..3).flat_map(|ident| arriving(ident, &[ident as u8; 64])).collect();
        worker.io().datagrams.waiting.push_back(Incoming {
            segment: Some(92),
            ..from_peer(2, bytes)
        });
        worker.drain().unwrap();
        let written = &worker.io().device.written;
        assert_eq!(written.len(), 1);
        assert_eq!(VirtioNetHdr::parse(&written[0]).unwrap().gso, GsoKind::UdpL4);
        let counters = &worker.common.counters;
        assert_eq!(
            (counters.messages_received.get(), counters.received.packets.get()),
            (1, 3)
        );
        assert_eq!((counters.superpackets_merged.get(), counters.merges.get()), (1, 3));
        assert_eq!(counters.received.bytes.get(), 3 * 92);
    }

    #[test]
    fn without_offloads_packets_travel_as_they_are() {
        let mut worker = worker(Offloads::default(), 1);
        let (out, back) = (packet(2, 1, &[1; 64]), arriving(1, &[2; 64]));
        worker.io().packets.waiting.extend([out.clone(), out.clone()]);
        worker
            .io()
            .datagrams
            .waiting
            .extend([from_peer(2, back.clone()), from_peer(2, back.clone())]);
        worker.drain().unwrap();
        assert_eq!(
            (sent_bytes(&mut worker), worker.io().peers.messages),
            (vec![older(out); 2], 2)
        );
        assert_eq!(worker.io().device.written, [older(back.clone()), older(back)]);
    }

    #[test]
    fn what_cannot_be_answered_does_not_leave_in_bulk_either() {
        let mut worker = worker(ALL, 1);
        let (superpacket, _) = superpacket(100, &[7; 1_000]);
        let with_source = |source: [u8; 4]| {
            let mut bytes = superpacket.clone();
            let mut ip = Ipv4Packet::new_checked(&mut bytes[VirtioNetHdr::LEN..]).unwrap();
            ip.set_src(source.into());
            ip.fill_checksum();
            bytes
        };
        let broadcast = build::Ipv4::new([10, 5, 1, 2].into(), [10, 5, 3, 255].into()).udp(1, 2, b"x");
        worker.io().packets.waiting.extend([
            with_source([127, 0, 0, 1]),
            with_source([10, 5, 1, 255]),
            plain(&broadcast),
            plain(&packet(3, 1, b"x")),
        ]);
        worker.drain().unwrap();
        assert_eq!(sent_bytes(&mut worker), [older(packet(3, 1, b"x"))]);
        let counters = &worker.common.counters;
        assert_eq!(
            (counters.dropped(Drop::Martian), counters.dropped(Drop::Broadcast)),
            (2, 1)
        );
        assert!(worker.io().local.sent.is_empty());
    }

    #[test]
    fn what_strangers_send_does_not_reach_the_device() {
        let mut worker = worker(ALL, 1);
        let forged = build::Ipv4::new([10, 5, 3, 2].into(), [10, 5, 1, 2].into()).udp(1, 2, b"x");
        worker.io().datagrams.waiting.extend([
            from_peer(9, arriving(1, b"x")),
            from_peer(2, forged),
            from_peer(2, vec![]),
            from_peer(2, vec![0x45]),
        ]);
        worker.drain().unwrap();
        assert!(worker.io().device.written.is_empty());
        for reason in [Drop::UnknownPeer, Drop::Spoofed, Drop::Malformed] {
            assert_eq!(worker.common.counters.dropped(reason), 1, "{reason:?}");
        }
    }

    #[test]
    fn a_peer_is_told_of_an_expired_packet() {
        let mut worker = worker(ALL, 1);
        let ip = build::Ipv4::new([10, 5, 2, 2].into(), [10, 5, 1, 2].into());
        worker
            .io()
            .datagrams
            .waiting
            .push_back(from_peer(2, ip.ttl(1).udp(1, 2, b"x")));
        worker.drain().unwrap();
        let sent = sent(&mut worker);
        assert_eq!(sent.len(), 1);
        let error = Ipv4Packet::new_checked(&sent[0].bytes).unwrap();
        assert_eq!((sent[0].to, error.src()), (peer(2).addr, Ipv4Addr::new(10, 5, 1, 1)));
        assert_eq!(worker.common.counters.icmp_errors.get(), 1);
    }
}
