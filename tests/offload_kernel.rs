//! Splitting and coalescing against the kernel itself: it has to take what is merged, and to understand what is split. Needs
//! root.

mod lab;

use std::{
    collections::BTreeMap,
    io::{self, ErrorKind, IoSlice, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsFd, AsRawFd},
    sync::Arc,
    thread,
    time::Instant,
};

use flannel::{
    lab::Namespace,
    offload::{Coalescer, GsoKind, Headers, MAX_PACKET, Merge, VirtioNetHdr, split},
    packet::{Hop, IpPacket, Ipv4Packet, Ipv6Packet, TcpFlags, build},
    sys::tun::{self, Tun, TunOffload, TunQueue},
};
use lab::{PATIENCE, inside, new_lab};
use mio::{Events, Interest, Poll, Token, Waker, unix::SourceFd};
use nix::sys::socket::{setsockopt, sockopt::UdpGsoSegment};

/// A device inside the namespace with everything the kernel offers.
fn open_offload(ns: &Namespace) -> Tun {
    let (device, offload) = inside(ns, || tun::open_offload("tun%d", 1)).unwrap();
    assert_eq!(offload, TunOffload::TcpUdp, "these tests need Linux 6.2");
    device
}

fn set_up(ns: &Namespace, device: &str, addresses: &[&str]) {
    for address in addresses {
        let nodad = if address.contains(':') { "nodad" } else { "" };
        ns.ip(&format!("address add {address} dev {device} {nodad}")).unwrap();
    }
    ns.ip(&format!("link set {device} up")).unwrap();
}

/// Calls `step` when the queue has something to read, until it says that it has all it wants.
fn read_until(queue: &TunQueue, mut step: impl FnMut(&[u8]) -> bool) {
    let mut poll = Poll::new().unwrap();
    let mut events = Events::with_capacity(1);
    poll.registry()
        .register(&mut SourceFd(&queue.as_raw_fd()), Token(0), Interest::READABLE)
        .unwrap();
    let deadline = Instant::now() + PATIENCE;
    let mut buffer = vec![0; VirtioNetHdr::LEN + MAX_PACKET];
    loop {
        match queue.recv(&mut buffer) {
            Ok(length) if step(&buffer[..length]) => return,
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                let left = deadline.saturating_duration_since(Instant::now());
                assert!(!left.is_zero(), "the device hands over nothing more");
                poll.poll(&mut events, Some(left)).unwrap();
            }
            Err(error) => panic!("{error}"),
        }
    }
}

/// Coalesces `packets` and writes them; how many packets were in each write.
fn deliver(queue: &TunQueue, packets: &[Vec<u8>]) -> io::Result<Vec<(GsoKind, usize)>> {
    let arena = packets.concat();
    let mut coalescer = Coalescer::new(Merge::ALL);
    let mut start = 0;
    for packet in packets {
        coalescer.push(&arena, start..start + packet.len());
        start += packet.len();
    }
    coalescer
        .writes(&arena)
        .map(|write| {
            let parts: Vec<_> = write.parts().map(IoSlice::new).collect();
            queue.send_parts(&parts)?;
            Ok((write.kind(), write.count()))
        })
        .collect()
}

const SENDER_V4: Ipv4Addr = Ipv4Addr::new(10, 5, 1, 2);
const SENDER_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 2);
const SENDERS: [IpAddr; 2] = [IpAddr::V4(SENDER_V4), IpAddr::V6(SENDER_V6)];

/// A packet by its index, its payload's length, and whether it is the last.
type MakePacket = Box<dyn Fn(u32, usize, bool) -> Vec<u8>>;

#[test]
fn what_is_merged_leaves_the_kernel_as_the_packets_that_came() {
    let mut lab = new_lab("merged");
    let host = lab.host("h1").unwrap();
    host.ns().sysctl("ipv6/conf/all/forwarding", "1").unwrap();
    let input = open_offload(host.ns());
    // Without offload, so that the kernel itself cuts what it forwards there.
    let output = inside(host.ns(), || tun::open_multi_queue("tun%d", 1)).unwrap();
    set_up(host.ns(), &input.name, &["10.5.1.1/24", "fd00:1::1/64"]);
    set_up(host.ns(), &output.name, &["10.5.2.1/24", "fd00:2::1/64"]);

    let v4 = build::Ipv4::new(SENDER_V4, [10, 5, 2, 2].into()).tos(0x0a);
    let v6 = build::Ipv6::new(SENDER_V6, "fd00:2::2".parse().unwrap()).traffic_class(0x0a);
    let payload = |index: u32, len: usize| -> Vec<u8> { (0..len).map(|at| (at as u32 * 31 + index) as u8).collect() };
    let tcp = |index: u32, last: bool| build::Tcp {
        src_port: 40_000,
        dst_port: 443,
        seq: 0xffff_f000u32.wrapping_add(1_400 * index),
        ack: 99,
        flags: if last {
            TcpFlags::ACK | TcpFlags::PSH
        } else {
            TcpFlags::ACK
        },
        window: 501,
        options: &[1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2],
    };
    // Runs of each kind that fill a write, end with a shorter packet, and begin near the identification's wrap.
    let runs: [(GsoKind, u32, MakePacket); 4] = [
        (
            GsoKind::TcpV4,
            44,
            Box::new(move |index, len, last| {
                let ip = v4.ident(0xfff0u16.wrapping_add(index as u16)).dont_fragment(true);
                ip.tcp(&tcp(index, last), &payload(index, len))
            }),
        ),
        (
            GsoKind::TcpV6,
            44,
            Box::new(move |index, len, last| v6.tcp(&tcp(index, last), &payload(index, len))),
        ),
        (
            GsoKind::UdpL4,
            44,
            Box::new(move |index, len, _| {
                v4.ident(0xfff0u16.wrapping_add(index as u16))
                    .udp(7, 8, &payload(index, len))
            }),
        ),
        (
            GsoKind::UdpL4,
            128,
            Box::new(move |index, len, _| v6.udp(7, 8, &payload(index, len.min(36 + len % 2)))),
        ),
    ];
    for (kind, count, packet) in runs {
        let packets: Vec<_> = (0..count)
            .map(|index| {
                let last = index + 1 == count;
                packet(index, if last { 1_001 } else { 1_400 }, last)
            })
            .collect();
        let writes = deliver(&input.queues[0], &packets).unwrap();
        let merged: usize = writes.iter().map(|(_, count)| count).sum();
        assert!(
            writes.len() <= 2 && writes[0].0 == kind && merged == packets.len(),
            "{writes:?}"
        );

        let mut expected = packets.into_iter().map(one_hop_older);
        let mut next = expected.next();
        read_until(&output.queues[0], |received| {
            // The kernel speaks on the device on its own, too.
            let forwarded = IpPacket::parse(received).is_ok_and(|packet| SENDERS.contains(&packet.src()));
            if forwarded {
                assert!(
                    next.as_deref() == Some(received),
                    "{kind:?}: {:02x?}",
                    &received[..60.min(received.len())]
                );
                next = expected.next();
            }
            next.is_none()
        });
    }
}

fn one_hop_older(mut packet: Vec<u8>) -> Vec<u8> {
    let hop = if packet[0] >> 4 == 4 {
        Ipv4Packet::new_checked(&mut packet[..]).unwrap().decrement_ttl()
    } else {
        Ipv6Packet::new_checked(&mut packet[..]).unwrap().decrement_hop_limit()
    };
    assert_eq!(hop, Hop::Forward);
    packet
}

#[test]
fn a_device_with_offload_is_nobody_elses_and_its_offload_can_be_taken_back() {
    let mut lab = new_lab("device");
    let host = lab.host("h1").unwrap();
    let device = inside(host.ns(), || tun::open_offload("twice%d", 2)).unwrap().0;
    assert_eq!(device.queues.len(), 2);
    let taken = inside(host.ns(), || tun::open_offload(&device.name, 1)).unwrap_err();
    assert_eq!(taken.raw_os_error(), Some(nix::libc::EBUSY));
    for offload in [TunOffload::Tcp, TunOffload::None, TunOffload::TcpUdp] {
        device.queues[1].set_offload(offload).unwrap();
    }
}

/// The most segments in a superpacket read, and the most packets in a write, by kind.
#[derive(Debug, Default)]
struct Seen {
    split: BTreeMap<String, usize>,
    merged: BTreeMap<String, usize>,
}

/// Carries packets between two devices until woken: each superpacket is split, and what comes of a batch coalesced.
fn carry(mut poll: Poll, devices: [Tun; 2]) -> Seen {
    let queues = devices.each_ref().map(|device| &device.queues[0]);
    for (index, queue) in queues.iter().enumerate() {
        poll.registry()
            .register(&mut SourceFd(&queue.as_raw_fd()), Token(index), Interest::READABLE)
            .unwrap();
    }
    let mut seen = Seen::default();
    let mut events = Events::with_capacity(3);
    let mut buffer = vec![0; VirtioNetHdr::LEN + MAX_PACKET];
    loop {
        poll.poll(&mut events, None).unwrap();
        for event in &events {
            let Some(from) = queues.get(event.token().0) else {
                return seen;
            };
            let mut packets = Vec::new();
            loop {
                match from.recv(&mut buffer) {
                    Ok(length) => split_into(&mut packets, &mut buffer[..length], &mut seen),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(error) => panic!("{error}"),
                }
            }
            let to = queues[1 - event.token().0];
            for (kind, count) in deliver(to, &packets).unwrap() {
                let most = seen.merged.entry(format!("{kind:?}")).or_default();
                *most = count.max(*most);
            }
        }
    }
}

fn split_into(packets: &mut Vec<Vec<u8>>, read: &mut [u8], seen: &mut Seen) {
    let (header, packet) = read.split_at_mut(VirtioNetHdr::LEN);
    let header = VirtioNetHdr::parse(header).unwrap();
    let mut headers = Headers::default();
    let segments = split::plan(&header, packet, &mut headers).unwrap();
    assert!(segments.full_len() <= 1_500, "{header:?} of {} bytes", packet.len());
    packets.extend(
        segments
            .iter(&headers, packet)
            .map(|(head, tail)| [head, tail].concat()),
    );
    let most = seen.split.entry(format!("{:?}", header.gso)).or_default();
    *most = segments.count().max(*most);
}

#[test]
fn connections_through_split_and_coalesce_lose_and_change_nothing() {
    // About 200 superpackets each way.
    const STREAM: usize = 12 << 20;
    const DATAGRAM: usize = 1_000;

    let mut lab = new_lab("carried");
    let (a, b) = (lab.host("a").unwrap(), lab.host("b").unwrap());
    let devices = [&a, &b].map(|host| open_offload(host.ns()));
    for (host, device, own, other) in [(&a, &devices[0], 1, 2), (&b, &devices[1], 2, 1)] {
        set_up(
            host.ns(),
            &device.name,
            &[&format!("10.5.{own}.1/24"), &format!("fd00:{own}::1/64")],
        );
        for (family, destination) in [
            ("-4", format!("10.5.{other}.0/24")),
            ("-6", format!("fd00:{other}::/64")),
        ] {
            host.ns()
                .ip(&format!("{family} route add {destination} dev {}", device.name))
                .unwrap();
        }
    }
    let poll = Poll::new().unwrap();
    let stop = Arc::new(Waker::new(poll.registry(), Token(2)).unwrap());
    let carrier = thread::spawn(move || carry(poll, devices));

    let pattern = |len: usize| -> Vec<u8> { (0..len).map(|at| (at ^ at >> 8 ^ at >> 16) as u8).collect() };
    for address in ["10.5.2.1:7000", "[fd00:2::1]:7000"] {
        let address: SocketAddr = address.parse().unwrap();
        let listener = inside(b.ns(), || TcpListener::bind(address)).unwrap();
        let echo = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let mut data = vec![0; STREAM];
            stream.read_exact(&mut data).unwrap();
            stream.write_all(&data).unwrap();
        });
        let mut stream = inside(a.ns(), || TcpStream::connect_timeout(&address, PATIENCE)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let sent = pattern(STREAM);
        stream.write_all(&sent).unwrap();
        let mut back = vec![0; STREAM];
        stream.read_exact(&mut back).unwrap();
        assert!(back == sent, "{address}: the stream is not what was sent");
        echo.join().unwrap();

        let receiver = inside(b.ns(), || UdpSocket::bind(address)).unwrap();
        receiver.set_read_timeout(Some(PATIENCE)).unwrap();
        let unspecified: SocketAddr = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }.parse().unwrap();
        let sender = inside(a.ns(), || UdpSocket::bind(unspecified)).unwrap();
        setsockopt(&sender.as_fd(), UdpGsoSegment, &(DATAGRAM as i32)).unwrap();
        let sent = pattern(DATAGRAM * 30 + 7);
        sender.send_to(&sent, address).unwrap();
        for datagram in sent.chunks(DATAGRAM) {
            let mut buffer = [0; 2 * DATAGRAM];
            let length = receiver.recv(&mut buffer).unwrap();
            assert!(&buffer[..length] == datagram, "{address}: a datagram of {length} bytes");
        }
    }
    stop.wake().unwrap();
    let seen = carrier.join().unwrap();
    for kind in [GsoKind::TcpV4, GsoKind::TcpV6, GsoKind::UdpL4] {
        let kind = format!("{kind:?}");
        assert!(seen.split.get(&kind).is_some_and(|&most| most > 10), "{kind}: {seen:?}");
        assert!(
            seen.merged.get(&kind).is_some_and(|&most| most > 10),
            "{kind}: {seen:?}"
        );
    }
}
